"""Two nodes and a real Redis or Valkey between them, with what may happen to it."""

import asyncio
import json
from contextlib import asynccontextmanager
from importlib.resources import files

import httpx
import pytest
import redis.asyncio

from plugins.notification import Notification
from router.audience import Audience
from router.brokers.redis import RedisBroker
from router.errors import Unavailable
from tests.contracts.test_broker import TOPIC, message, read
from tests.node import make_token, run_node


def started(step):
    return {"type": "step_started", "step_id": step}


@asynccontextmanager
async def two_nodes(url, **settings):
    async with run_node(broker=url, **settings) as one, run_node(broker=url, **settings) as two:
        yield one, two


async def seen(client, until):
    found = []
    while not found or found[-1] != until:
        found.append((await client.event("step_started"))["step_id"])
    return found


async def test_what_is_published_on_one_node_reaches_people_on_the_other(redis_url):
    async with two_nodes(redis_url) as (one, two), one.client() as here, two.client() as there:
        numbers = [(await one.publish(started("a")))[0], (await two.publish(started("b")))[0]]
        assert numbers == [1, 2]
        for client in (here, there):
            assert await seen(client, "b") == ["a", "b"]
        await here.send({"type": "chat_message", "role": "user", "content": "hello"})
        assert (await there.event("chat_message"))["content"] == "hello"


async def test_a_client_resumes_on_the_other_node(redis_url):
    async with two_nodes(redis_url) as (one, two):
        async with one.client() as client:
            await one.publish(started("a"))
            await seen(client, "a")
            epoch = client.welcome["epoch"]
        await one.publish(*(started(str(i)) for i in range(5)))
        async with two.client(since=f"{epoch}:1") as again:
            assert again.welcome["recovered"] is True
            assert await seen(again, "4") == list("01234")


async def test_a_backend_that_knows_nothing_of_us_publishes_as_the_specification_says(redis_url):
    async with (
        two_nodes(redis_url) as (one, two),
        one.client() as here,
        two.client(plain=True) as there,
        redis.asyncio.Redis.from_url(redis_url) as backend,
    ):
        event = {
            "type": "step_completed",
            "step_id": "s",
            "result": {"rows": 1},
            "timestamp": "2024-10-21T10:01:23",
        }
        await backend.publish("project:p1", json.dumps(event))
        assert await there.frame() == event
        assert await here.event("step_completed") == event
        await backend.publish("project:p1", "not json")
        await backend.publish("project:p1", json.dumps({"type": "nobody_knows"}))
        await backend.publish("project:p1", json.dumps(started("after")))
        assert (await here.event("step_started"))["step_id"] == "after"


async def test_messages_that_a_lost_subscription_missed_are_brought(redis_url):
    async with (
        two_nodes(redis_url) as (one, two),
        two.client() as there,
        redis.asyncio.Redis.from_url(redis_url) as operator,
    ):
        for round_ in range(5):
            await operator.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await one.publish(*(started(f"{round_}-{i}") for i in range(3)))
            assert await seen(there, f"{round_}-2") == [f"{round_}-{i}" for i in range(3)]


async def test_a_message_lost_without_a_word_is_noticed_by_the_next_number(redis_url):
    async with two_nodes(redis_url) as (one, two), two.client() as there:
        await one.publish(started("a"))
        await seen(there, "a")
        broker = two.router.broker
        continuity = broker._continuity
        take, continuity.take = continuity.take, lambda *_: None
        await one.publish(started("lost"))
        while (await broker._remembered("project:p1", None)).place.seq < 2:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        continuity.take = take
        await one.publish(started("next"))
        assert await seen(there, "next") == ["lost", "next"]


async def test_one_lost_without_a_word_and_without_a_next_is_noticed_by_the_check(redis_url):
    async with two_nodes(redis_url) as (one, two), two.client() as there:
        await one.publish(started("a"))
        await seen(there, "a")
        broker = two.router.broker
        continuity = broker._continuity
        take, continuity.take = continuity.take, lambda *_: None
        await one.publish(started("lost"))
        await asyncio.sleep(0.1)
        continuity.take = take
        await broker.check()
        assert await seen(there, "lost") == ["lost"]


async def test_seats_are_counted_over_nodes_and_freed_when_a_client_leaves(redis_url):
    async with two_nodes(redis_url, limit_user=2) as (one, two), one.client():
        async with two.client():
            token = make_token()
            async with httpx.AsyncClient() as http:
                answer = await http.get(
                    f"{one.url}/ws/project/p1",
                    headers={
                        "Authorization": f"Bearer {token}",
                        "Connection": "Upgrade",
                        "Upgrade": "websocket",
                        "Sec-WebSocket-Version": "13",
                        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
                    },
                )
                assert answer.status_code == 429
        async with redis.asyncio.Redis.from_url(redis_url) as operator, asyncio.timeout(10):
            while sum(map(int, (await operator.hgetall("router:{limits}:user:ada")).values())) > 1:
                await asyncio.sleep(0.001)
        async with two.client() as again:
            assert again.welcome


async def test_a_server_that_forgot_everything_costs_a_reload_and_nobody_a_connection(own_server):
    async with two_nodes(own_server.url) as (one, two), one.client() as here, two.client() as there:
        await one.publish(started("a"))
        for client in (here, there):
            await seen(client, "a")
        own_server.kill()
        async with httpx.AsyncClient(base_url=one.url) as http:
            token = make_token("backend", "*", ("publish",))
            answer = await http.post(
                "/projects/p1/events", content=json.dumps(started("x")), headers={"Authorization": f"Bearer {token}"}
            )
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert (await http.get("/readyz")).status_code == 503
        own_server.start()
        for client in (here, there):
            told = await client.events(lambda event: event["type"] == "resync" and "topic" not in event)
            assert told[-1]["pos"] == 0
        assert await one.publish(started("b")) == [1]
        for client in (here, there):
            assert await seen(client, "b") == ["b"]


async def test_a_server_that_holds_still_for_a_while_loses_nothing(own_server):
    async with two_nodes(own_server.url) as (one, two), two.client() as there:
        await one.publish(started("a"))
        await seen(there, "a")
        own_server.freeze()
        publishing = asyncio.create_task(one.publish(*(started(str(i)) for i in range(5))))
        await asyncio.sleep(0.3)
        own_server.thaw()
        assert await publishing == [2, 3, 4, 5, 6]
        assert await seen(there, "4") == list("01234")


async def test_a_publisher_is_told_who_acknowledged_on_whatever_node(redis_url):
    async with (
        two_nodes(redis_url) as (one, two),
        one.client(token=make_token("ada")) as ada,
        two.client(token=make_token("grace")) as grace,
        two.client(token=make_token("eve")),
    ):
        event = {"type": "step_completed", "step_id": "s", "result": {}, "requires_ack": True, "message_id": "m1"}

        async def read_and_acknowledge(client):
            await client.event("step_completed")
            await client.send({"type": "ack", "message_id": "m1"})

        async def publish():
            token = make_token("backend", "*", ("publish",))
            async with httpx.AsyncClient(base_url=one.url, headers={"Authorization": f"Bearer {token}"}) as http:
                return (await http.post("/projects/p1/events?acknowledged=1", content=json.dumps(event))).json()

        told, *_ = await asyncio.gather(publish(), read_and_acknowledge(ada), read_and_acknowledge(grace))
        assert told == {"seq": [1], "acknowledged": ["ada", "grace"], "missing": ["eve"]}


BAD = {
    "live channel, not our format": ("router:{project:p1}:live", lambda e: b"hello"),
    "note of a newer node": ("router:node:all", lambda e: b'note {"type":"drain","node":"x"}'),
    "note that is no JSON": ("router:node:all", lambda e: b"note hello"),
}


@pytest.mark.parametrize("which", BAD)
async def test_one_bad_message_does_not_make_a_node_deaf(redis_url, which):
    channel, make = BAD[which]
    async with (
        run_node(broker=redis_url) as node,
        node.client() as client,
        redis.asyncio.Redis.from_url(redis_url) as r,
    ):
        epoch = client.welcome["epoch"].encode()
        await r.publish(channel, make(epoch))
        await asyncio.sleep(0.3)
        await node.publish({"type": "step_started", "step_id": "s1"})
        assert await asyncio.wait_for(client.event("step_started"), 3)


async def test_a_bad_header_in_history_does_not_lock_the_project(redis_url):
    """Through publish.lua, as docs/reference/redis.md tells backends in other languages."""
    async with run_node(broker=redis_url) as node, redis.asyncio.Redis.from_url(redis_url) as r:
        lua = files("router.brokers").joinpath("lua", "publish.lua").read_text()
        p = r.register_script(lua)
        b = "router:{project:p1}"
        await p(
            keys=[f"{b}:meta", f"{b}:log", f"{b}:meta"],
            args=[
                '{"at": "2026-01-01T00:00:00Z"}\n{"type": "step_started", "step_id": "s1"}',
                "a" * 16,
                "PUBLISH",
                1000,
                300000,
                86400000,
                1,
                0,
            ],
        )
        async with node.client() as client:
            assert client.welcome["pos"] == 1


async def test_slow_client_that_resumes_while_redis_is_away_comes_back_into_its_room(own_server):
    async with run_node(broker=own_server.url) as node, node.client() as client:
        session = next(iter(node.router.hub))
        node.router.slow(session)
        await node.publish({"type": "step_started", "step_id": "missed"})
        while node.router._recovery.standings["project:p1"].seen < 1:
            await asyncio.sleep(0.01)
        own_server.freeze()
        node.router.resume(session)
        await asyncio.sleep(2)  # longer than anybody is waited for
        own_server.thaw()
        async with asyncio.timeout(10):
            while not await node.router.broker.ready():
                await asyncio.sleep(0.05)
        await node.router.broker.check()
        await node.publish({"type": "step_started", "step_id": "later"})
        await asyncio.wait_for(client.events(lambda e: e.get("step_id") == "later"), 5)


async def test_sweep_leaves_alone_what_was_wanted_again_meanwhile(own_server):
    arrived = []
    broker = RedisBroker(own_server.url, read, linger=0.0)
    await broker.start(arrived.append, lambda t, p: arrived.append((t, p)))
    try:
        await broker.subscribe("project:a")
        await broker.subscribe(TOPIC)
        await broker.unsubscribe("project:a")
        await broker.unsubscribe(TOPIC)
        sweep = asyncio.create_task(broker._sweep())
        await asyncio.sleep(0)
        # while the first topic is let go of, somebody comes for the second
        await broker.subscribe(TOPIC)
        await sweep
        await broker.publish(message("x"))
        await asyncio.sleep(0.3)
        await broker.check()
        assert [e.event.text for e in arrived] == ["x"]
    finally:
        await broker.stop()


async def test_topic_that_cannot_begin_is_not_listened_to(own_server):
    """NOREPLICAS, READONLY and the like: SUBSCRIBE works, a new topic's epoch cannot be written."""
    async with redis.asyncio.Redis.from_url(own_server.url) as admin:
        broker = RedisBroker(own_server.url, read, linger=0)
        await broker.start(lambda _: None, lambda *_: None)
        try:
            await admin.config_set("min-replicas-to-write", "1")
            for n in range(3):
                with pytest.raises(Unavailable):
                    await broker.subscribe(f"project:{n}")
            await broker._sweep()
            await asyncio.sleep(0.1)
            assert sorted(await admin.pubsub_channels("*project*")) == []
        finally:
            await admin.config_set("min-replicas-to-write", "0")
            await broker.stop()


async def test_receipts_asked_for_twice(redis_url):
    """A publisher asks again with the same id (its HTTP call timed out) while the first still waits for the other node."""
    async with run_node(broker=redis_url) as node, run_node(broker=redis_url) as dead, node.client():
        for t in dead.router.broker._tasks:
            t.cancel()
        dead.router.census.hear = lambda _: None
        dead.router.broker._hear = lambda _: None
        a = Audience("project:p1")

        async def ask(within):
            return await node.router.publish_and_wait(a, Notification(level="info", title="x"), within, message_id="m1")

        first = asyncio.create_task(ask(0.5))
        await asyncio.sleep(0.3)
        got = await asyncio.gather(first, ask(1.0), return_exceptions=True)
        assert not [g for g in got if isinstance(g, BaseException)], got
