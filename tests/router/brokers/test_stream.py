"""What only the inbox on Redis does: lost answers, a server that forgets, keys that grow and expire."""

import asyncio

import pytest
import redis.asyncio

from router.brokers import stream
from router.brokers.base import Bounds, Origin
from router.brokers.link import link_to
from router.brokers.script import Scripts
from router.brokers.stream import RedisInbox
from router.errors import Unavailable

MESSAGES, DEAD = "router:{inbox}:messages:said", "router:{inbox}:dead:said"


@pytest.fixture
async def link(redis_url):
    made = link_to(redis_url)
    yield made
    await made.close()


@pytest.fixture
async def inbox(link):
    scripts = Scripts(link.redis)
    yield RedisInbox(link.redis, scripts, Bounds(backlog=5000, unread=100))
    await scripts.close()


@pytest.fixture
async def operator(redis_url):
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield client


async def put(inbox, *texts):
    await asyncio.gather(*(inbox.put("said", Origin(id=f"id-{text}"), text.encode()) for text in texts))


async def take(inbox, consumer="a", wait=0.0):
    return await inbox.take(("said",), "g", consumer, 10_000, wait)


async def reclaim(inbox, consumer="b"):
    return await inbox.reclaim(("said",), "g", consumer, idle=0.0, tries=5, count=100)


def texts(messages):
    return [message.payload.decode() for message in messages]


class LosesAnswers(Scripts):
    """Has each script's first answer be lost on the way back."""

    async def _send(self, calls):
        answers = await super()._send(calls)
        if calls[0][2][-1] == 0:
            raise ConnectionError
        return answers


async def test_whatever_loses_its_answer_can_be_repeated(link, inbox):
    unlucky = RedisInbox(link.redis, LosesAnswers(link.redis))
    await put(unlucky, "a")
    await put(unlucky, "b")
    a, b = await take(unlucky)
    assert texts([a, b]) == ["a", "b"]
    assert await unlucky.hold(a, b) == []
    await unlucky.bury(a, "bad")
    letters = await inbox.dead("said")
    assert texts(letters) == ["a"]
    await unlucky.revive(*letters)
    assert texts(await take(inbox)) == ["a"]
    await unlucky.done(b)
    assert texts(await reclaim(inbox)) == ["a"]


async def test_what_was_taken_over_and_got_lost_on_the_way_is_left_alone_again(link, inbox):
    unlucky = RedisInbox(link.redis, LosesAnswers(link.redis))
    await put(inbox, "a")
    await take(inbox)
    found = await unlucky.reclaim(("said",), "g", "b", idle=60.0, tries=5, count=1)
    assert found == []
    assert [(m.payload, m.tries) for m in await reclaim(inbox)] == [(b"a", 2)]


async def test_groups_are_there_again_after_the_server_forgot_everything(inbox, operator):
    await put(inbox, "a")
    (a,) = await take(inbox)
    await operator.flushall()
    await inbox.done(a)
    assert await inbox.hold(a) == [a]
    await inbox.bury(a, "bad")
    assert await reclaim(inbox) == []
    assert await inbox.dead("said") == []
    await put(inbox, "b")
    assert texts(await take(inbox)) == ["b"]


async def test_one_who_waits_while_the_server_forgets_everything_gets_what_comes_then(inbox, operator):
    await take(inbox)
    waiting = asyncio.create_task(take(inbox, wait=2.0))
    while not (await operator.info("clients"))["blocked_clients"]:
        await asyncio.sleep(0.001)
    await operator.flushall()
    await put(inbox, "a")
    assert texts(await waiting or await take(inbox)) == ["a"]


async def test_one_who_stops_waiting_leaves_the_connection_in_order(inbox, operator):
    await take(inbox)
    waiting = asyncio.create_task(take(inbox, wait=2.0))
    while not (await operator.info("clients"))["blocked_clients"]:
        await asyncio.sleep(0.001)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await put(inbox, "a")
    assert texts(await take(inbox)) == ["a"]


async def test_what_nobody_ever_consumed_expires_and_what_somebody_does_never(inbox, operator):
    await put(inbox, "a")
    assert 0 < await operator.ttl(MESSAGES) <= 24 * 3600
    await take(inbox)
    assert await operator.ttl(MESSAGES) == -1
    await put(inbox, "b")
    assert await operator.ttl(MESSAGES) == -1


async def test_a_group_that_an_operator_made_is_not_cut_off(inbox, operator):
    await put(inbox, "a")
    await operator.xgroup_create(MESSAGES, "g", id="0")
    await put(inbox, *map(str, range(200)))
    assert len(await take(inbox)) == 201
    assert await operator.ttl(MESSAGES) == -1


async def test_a_group_that_an_operator_ended_holds_nothing_up_any_more(inbox, operator):
    await take(inbox)
    await put(inbox, *map(str, range(5000)))
    with pytest.raises(Unavailable):
        await put(inbox, "x")
    await operator.xgroup_destroy(MESSAGES, "g")
    await put(inbox, "y")
    assert await operator.xlen(MESSAGES) == 100


async def test_what_is_done_goes_long_before_there_is_no_more_room(inbox, operator):
    await take(inbox)
    await put(inbox, *map(str, range(2500)))
    *taken, last = await take(inbox)
    await inbox.done(*taken)
    assert await operator.xlen(MESSAGES) == 2500
    await put(inbox, *map(str, range(600)))
    assert await operator.xlen(MESSAGES) == 601
    assert texts(await reclaim(inbox)) == texts([last])


async def test_who_cannot_send_is_told_and_the_operator_once_which_group_is_behind(link, operator, caplog):
    inbox = RedisInbox(link.redis, Scripts(link.redis), Bounds(backlog=2))
    await inbox.take(("said",), "billing", "a", 1, 0.0)
    for text in "ab":
        await inbox.put("said", Origin(id=text), b"secret")
    for _ in range(3):
        with pytest.raises(Unavailable) as refused:
            await inbox.put("said", Origin(id="c"), b"secret")
        assert "billing" not in str(refused.value)
    (record,) = [record for record in caplog.records if record.event == "inbox_full"]
    assert "the group `billing`" in record.getMessage()
    assert "secret" not in caplog.text


async def test_what_somebody_wrote_by_hand_is_handed_out_as_it_is(inbox, operator):
    await put(inbox, "a")
    await operator.xadd(MESSAGES, {"e": b"not json\n{}"})
    await operator.xadd(MESSAGES, {"something": "else"})
    taken = await take(inbox)
    assert [(m.origin.id, m.payload) for m in taken] == [("id-a", b"a"), ("", b"{}"), ("", b"")]
    await inbox.bury(taken[2], "nothing in it")
    assert [m.payload for m in await inbox.dead("said")] == [b""]


async def test_what_was_deleted_by_hand_is_forgotten(inbox, operator):
    await put(inbox, "a", "b")
    a, _ = await take(inbox)
    await operator.xdel(MESSAGES, a.entry)
    assert texts(await reclaim(inbox)) == ["b"]
    assert (await operator.xpending(MESSAGES, "g"))["pending"] == 1


async def test_what_was_put_back_for_another_group_is_not_taken_over_either(inbox, operator):
    await put(inbox, "a")
    (a,) = await take(inbox)
    await inbox.bury(a, "bad")
    await inbox.revive(*await inbox.dead("said"))
    await operator.xgroup_create(MESSAGES, "other", id=a.entry)
    await operator.xreadgroup("other", "dead", {MESSAGES: ">"})
    assert await inbox.reclaim(("said",), "other", "b", idle=0.0, tries=1, count=1) == []
    assert await inbox.dead("said") == []
    assert (await operator.xpending(MESSAGES, "other"))["pending"] == 0


async def test_consumers_that_are_gone_are_forgotten_once_they_have_nothing(inbox, operator, monkeypatch):
    monkeypatch.setattr(stream, "FORGET", -1.0)
    await put(inbox, "a")
    await take(inbox, "idle")
    await put(inbox, "b")
    await take(inbox, "busy")
    await inbox.reclaim(("said",), "g", "new", idle=60.0, tries=5, count=1)
    assert [each["name"] for each in await operator.xinfo_consumers(MESSAGES, "g")] == [b"busy", b"idle"]
    await reclaim(inbox, "new")
    assert [each["name"] for each in await operator.xinfo_consumers(MESSAGES, "g")] == [b"new"]


async def test_a_server_that_is_away_is_told_by_all_of_them(own_server):
    link = link_to(own_server.url)
    inbox = RedisInbox(link.redis, Scripts(link.redis, patience=0.0))
    await put(inbox, "a")
    (a,) = await take(inbox)
    own_server.kill()
    for call in (put(inbox, "b"), take(inbox), inbox.done(a), inbox.hold(a), reclaim(inbox), inbox.dead("said")):
        with pytest.raises(Unavailable, match="the broker cannot be reached"):
            await call
    await link.close()
    own_server.start()
