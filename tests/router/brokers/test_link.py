"""What the addresses of a broker come to, without a connection being made."""

import pytest
from redis.asyncio import BlockingConnectionPool, RedisCluster

from router.brokers.link import link_to
from router.errors import SetupError


def pool_of(url, **options):
    return link_to(url, **options).redis.connection_pool


def test_a_pool_has_at_most_a_hundred_connections_and_whoever_wants_one_more_waits():
    pool = pool_of("redis://127.0.0.1:1/3")
    assert isinstance(pool, BlockingConnectionPool)
    assert pool.max_connections == 100
    assert pool.connection_kwargs["db"] == 3


@pytest.mark.parametrize("url", ["redis://h:1", "redis+sentinel://h:1/m", "unix:///tmp/none"])
def test_redis_py_never_runs_anything_twice_by_itself(url):
    assert pool_of(url).connection_kwargs["retry"].get_retries() == 0


async def test_nor_in_a_cluster():
    redis = link_to("redis+cluster://127.0.0.1:1,127.0.0.1:2").redis
    assert isinstance(redis, RedisCluster)
    assert redis.retry.get_retries() == 0
    assert sorted(node.port for node in redis.nodes_manager.startup_nodes.values()) == [1, 2]


def test_user_and_password_are_read_from_the_url():
    kwargs = pool_of("redis://router:p%40ss@h:1").connection_kwargs
    assert (kwargs["username"], kwargs["password"]) == ("router", "p@ss")


def test_sentinels_have_names_and_passwords_of_their_own():
    url = "redis+sentinel://router:secret@one:1,[::1]:2,three/mymaster/4?sentinel_password=other"
    pool = pool_of(url)
    assert pool.service_name == "mymaster"
    assert pool.connection_kwargs["db"] == 4
    assert pool.connection_kwargs["password"] == "secret"
    asked = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(kwargs["host"], kwargs["port"]) for kwargs in asked] == [("one", 1), ("::1", 2), ("three", 26379)]
    assert {kwargs["password"] for kwargs in asked} == {"other"}
    assert isinstance(pool, BlockingConnectionPool)


def test_sharded_topics_are_for_those_who_ask():
    assert link_to("redis+cluster://h:1").verb == "PUBLISH"
    assert link_to("redis+cluster://h:1?sharded=yes").verb == "SPUBLISH"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://h:1", "http://; it is one of"),
        ("redis+cloud://h:1", "it is one of"),
        ("redis+sentinel://h:1", "mymaster"),
        ("redis+cluster://,h:1", "without a name"),
        ("redis://h:1?nonsense=1", "nonsense"),
        ("redis://h:port", "cannot be understood"),
    ],
)
def test_an_address_that_is_none_is_told_with_what_to_do(url, told):
    with pytest.raises(SetupError, match=r"ROUTER_BROKER") as error:
        link_to(url)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:hunter2/secret@h:6379/0",
        "redis+cluster://user:hunter2/secret@h:1",
        "redis+sentinel://u:hunter2#x@h:1/m",
    ],
)
def test_no_part_of_a_password_is_in_the_error(url):
    with pytest.raises(SetupError) as e:
        link_to(url)
    assert "hunter2" not in str(e.value)
