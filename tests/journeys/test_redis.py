"""Two nodes and a real Redis or Valkey between them, with what may happen to it."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import redis.asyncio

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
        while (await broker._remembered("project:p1", None))[0].seq < 2:
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
