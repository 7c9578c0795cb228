"""Seats, people and rates that two nodes share, with what may happen to a node, to Redis, and to an answer."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest
import redis.asyncio
from websockets.exceptions import ConnectionClosed, InvalidStatus

from router import Unavailable
from router.brokers.lease import DOUBTED, LEAVING, key
from tests.node import make_token, run_node

LEASE = 1.0
"""Seconds. Shorter ones end by themselves where many tests share a machine; that heals, but takes its time."""
PRESENCE = ("presence_joined", "presence_left")


@asynccontextmanager
async def two_nodes(url, **settings):
    """Two nodes that look every few milliseconds who has left, instead of every second."""

    async def look(node):
        while True:
            await asyncio.sleep(0.005)
            await node.router.presence.tick()

    async with run_node(broker=url, **settings) as one, run_node(broker=url, **settings) as two:
        looking = [asyncio.create_task(look(node)) for node in (one, two)]
        try:
            yield one, two
        finally:
            for task in looking:
                task.cancel()
            await asyncio.gather(*looking, return_exceptions=True)


@pytest.fixture
async def operator(redis_url):
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield client


async def until(condition):
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.005)


def token(user):
    return make_token(user)


def vanish(node):
    """As if the process had been killed: from now on Redis hears nothing of it, not even goodbye."""

    async def silence(_calls):
        raise ConnectionError

    broker = node.router.broker
    for task in broker._tasks:
        task.cancel()
    broker._scripts._send, broker._scripts._patience = silence, 0.0


async def people(node, project="p1"):
    headers = {"Authorization": f"Bearer {token('looker')}"}
    async with httpx.AsyncClient(base_url=node.url, headers=headers) as http:
        answer = await http.get(f"/projects/{project}/presence")
        assert answer.status_code == 200, answer.text
        return {person.pop("user_id"): person for person in answer.json()["users"]}


async def told(viewer, node):
    """Whose coming and going `viewer` has been told of up to now."""
    await node.publish({"type": "step_started", "step_id": "marker"})
    seen = await viewer.events(lambda event: event.get("step_id") == "marker")
    return [(event["type"], event["user_id"]) for event in seen if event["type"] in PRESENCE]


async def connects(node, user):
    try:
        async with node.client(token=token(user)):
            return True
    except InvalidStatus as refused:
        if refused.response.status_code != 429:
            raise
        return False


# -- seats


async def test_each_limit_counts_over_nodes(redis_url):
    async with (
        two_nodes(redis_url, limit_user=2, limit_project=3, limit_system=4) as (one, two),
        one.client(token=token("ada")),
        two.client(token=token("ada")),
    ):
        assert not await connects(one, "ada")
        assert not await connects(two, "ada")
        async with one.client(token=token("bob")):
            assert not await connects(two, "cy")
            async with two.client("p2", token=make_token("cy", "p2")):
                with pytest.raises(InvalidStatus) as refused:
                    async with one.client("p3", token=make_token("dee", "p3")):
                        pass
                assert refused.value.response.status_code == 503


async def test_the_seats_of_a_node_that_vanished_are_free_within_a_lease(redis_url, operator):
    async with two_nodes(redis_url, limit_user=1, lease=LEASE) as (one, two), one.client(token=token("ada")):
        assert not await connects(two, "ada")
        vanish(one)
        await until(lambda: connects(two, "ada"))

        async def cleared():
            return await operator.hlen(key("all")) == 0

        await until(cleared)


# -- people


async def test_people_on_both_nodes_are_one_list_for_viewers_on_either(redis_url):
    async with two_nodes(redis_url, broadcast_every=0.02) as (one, two), one.client(token=token("ada")) as ada:
        async with two.client(token=token("bob")) as bob, two.client(token=token("ada")):
            assert await people(one) == await people(two) == {"ada": {"connections": 2}, "bob": {"connections": 1}}
            assert ("presence_joined", "bob") in await told(ada, one)
            await ada.send({"type": "presence_update", "status": "editing step s1"})
            updated = await bob.events(lambda event: event.get("status"))
            assert (updated[-1]["user_id"], updated[-1]["connections"]) == ("ada", 2)
            assert (await people(two))["ada"] == {"connections": 2, "status": "editing step s1"}
        left = await ada.events(lambda event: event["type"] == "presence_left")
        assert left[-1]["user_id"] == "bob"
        assert await people(two) == {"ada": {"connections": 1, "status": "editing step s1"}}


async def test_a_status_is_forgotten_when_its_person_has_left(redis_url):
    async with two_nodes(redis_url) as (one, two), two.client(token=token("bob")) as bob:
        async with one.client(token=token("ada")) as ada:
            await ada.send({"type": "presence_update", "status": "here"})
            await bob.events(lambda event: event.get("status") == "here")
        await bob.event("presence_left")
        async with two.client(token=token("ada")):
            assert (await people(one))["ada"] == {"connections": 1}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "presence_update", "status": "x" * 201}, "bad_message"),
        ({"type": "presence_update"}, "bad_message"),
        ({"type": "presence_updated", "user_id": "eve", "connections": 9}, "denied"),
    ],
)
async def test_a_status_is_a_short_text_of_ones_own(node, message, code):
    async with node.client() as ada:
        await ada.send(message)
        assert (await ada.event("error"))["code"] == code


async def test_whoever_comes_back_on_the_other_node_within_the_grace_has_neither_left_nor_joined(redis_url, operator):
    async with two_nodes(redis_url, presence_grace=15.0) as (one, two), two.client(token=token("bob")) as bob:
        async with one.client(token=token("ada")):
            pass

        async def gone():
            return (await people(two))["ada"] == {"connections": 0}

        await until(gone)
        async with two.client(token=token("ada")):
            assert await operator.zcard(LEAVING) == 0
            assert (await people(one))["ada"] == {"connections": 1}
            assert [one for one in await told(bob, one) if one[1] == "ada"] == [("presence_joined", "ada")]


async def test_people_of_a_node_that_vanished_have_left_after_the_grace_each_told_once(redis_url):
    async with (
        two_nodes(redis_url, lease=LEASE, presence_grace=0.05) as (one, two),
        two.client(token=token("bob")) as bob,
    ):
        async with one.client(token=token("ada")), one.client(token=token("bob")), one.client(token=token("cy")):
            for user in ("ada", "cy"):
                await bob.events(lambda e, user=user: e["type"] == "presence_joined" and e["user_id"] == user)
            vanish(one)
            left = [await bob.event("presence_left") for _ in range(2)]
            assert {event["user_id"] for event in left} == {"ada", "cy"}

            async def only_bob():
                return await people(two) == {"bob": {"connections": 1}}

            await until(only_bob)
        assert await told(bob, two) == []


async def test_whoever_comes_over_from_a_node_that_vanished_has_neither_left_nor_joined(redis_url, operator):
    async with two_nodes(redis_url, lease=LEASE) as (one, two), two.client(token=token("bob")) as bob:
        async with one.client(token=token("ada")):
            await bob.events(lambda e: e["type"] == "presence_joined" and e["user_id"] == "ada")
            vanish(one)
        async with two.client(token=token("ada")):

            async def cleared():
                return await operator.hlen(key("here:p1")) == 2

            await until(cleared)
            assert await told(bob, two) == []


async def test_a_window_on_a_node_that_vanished_is_taken_off_what_viewers_were_told(redis_url):
    async with (
        two_nodes(redis_url, lease=LEASE, broadcast_every=0.02) as (one, two),
        two.client(token=token("bob")) as bob,
        two.client(token=token("ada")),
        one.client(token=token("ada")),
    ):
        await bob.events(lambda event: event["type"] == "presence_updated" and event["connections"] == 2)
        vanish(one)
        await bob.events(lambda event: event["type"] == "presence_updated" and event["connections"] == 1)
        assert (await people(two))["ada"] == {"connections": 1}


async def test_whoever_is_on_two_nodes_is_told_of_as_they_are_whatever_their_last_windows_do(redis_url, operator):
    async with (
        two_nodes(redis_url, lease=LEASE, broadcast_every=0.02) as (one, two),
        two.client(token=token("bob")) as bob,
        two.client(token=token("ada")),
    ):
        async with one.client(token=token("ada")):
            pass

        async def told_in_the_end():
            return await operator.zcard(DOUBTED) == 0 and await people(two) == {
                "ada": {"connections": 1},
                "bob": {"connections": 1},
            }

        await until(told_in_the_end)
        await two.publish({"type": "step_started", "step_id": "marker"})
        seen = await bob.events(lambda event: event.get("step_id") == "marker")
        updates = [event for event in seen if event["type"] == "presence_updated" and event["user_id"] == "ada"]
        assert updates[-1]["connections"] == 1


# -- rates


async def test_a_users_rate_is_one_budget_over_nodes(redis_url):
    async with (
        two_nodes(redis_url, limit_rate=0.01, limit_burst=10) as (one, two),
        one.client(token=token("ada")) as here,
        two.client(token=token("ada")) as there,
    ):

        async def known():
            return all(node.router.broker._rates.shared() == ["ada"] for node in (one, two))

        await until(known)
        for number in range(10):
            for client in (here, there):
                await client.send({"type": "chat_message", "role": "user", "content": "x", "ref": str(number)})
        answers = [
            event
            for client in (here, there)
            for event in await client.events(lambda e: e["type"] == "error" and e["ref"] == "9")
        ]
        refused = [event["code"] for event in answers if event["type"] == "error"]
        assert refused == ["rate_limited"] * 10


async def test_while_redis_is_silent_each_node_keeps_its_own_limit(redis_url):
    async with (
        two_nodes(redis_url, limit_rate=0.01) as (one, two),
        one.client(token=token("ada")) as here,
        two.client(token=token("ada")),
    ):

        async def known():
            return one.router.broker._rates.shared() == ["ada"]

        await until(known)

        async def silent(*_):
            await asyncio.Event().wait()

        one.router.broker._rates._scripts = type("Silent", (), {"call": silent})()
        for _ in range(11):
            await here.send({"type": "chat_message", "role": "user", "content": "x"})
        assert [(await here.event("chat_message"))["content"] for _ in range(10)] == ["x"] * 10
        assert (await here.event("error"))["code"] == "rate_limited"


# -- failures


async def test_a_server_that_was_emptied_knows_everything_again_by_the_next_beat(redis_url, operator):
    async with (
        two_nodes(redis_url, lease=LEASE, limit_user=2) as (one, two),
        one.client(token=token("ada")),
        two.client(token=token("ada")),
        two.client(token=token("bob")),
    ):
        await operator.flushdb()

        async def whole():
            return await people(one) == {"ada": {"connections": 2}, "bob": {"connections": 1}}

        await until(whole)
        assert sum(map(int, await operator.hvals(key("user:ada")))) == 2
        assert not await connects(one, "ada")


async def test_connections_to_redis_that_break_leave_neither_seat_nor_person_behind(redis_url, operator):
    async with two_nodes(redis_url, lease=LEASE, limit_project=1000) as (one, two):
        done = asyncio.Event()

        async def break_connections():
            while not done.is_set():
                await operator.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await asyncio.sleep(0.02)

        async def come_and_go(number):
            try:
                async with (one, two)[number % 2].client(token=token(str(number % 7))):
                    await asyncio.sleep(0)
            except (InvalidStatus, ConnectionClosed):
                pass  # it was away for too long

        breaking = asyncio.create_task(break_connections())
        for _ in range(5):
            await asyncio.gather(*(come_and_go(number) for number in range(20)))
        done.set()
        await breaking

        async def empty():
            kinds = {found.decode().split(":")[2] async for found in operator.scan_iter(key("*"))}
            return kinds <= {"nodes", "epoch"}

        await until(empty)
        assert await people(one) == {}


async def test_nobody_is_let_in_while_redis_is_away(own_server):
    async with run_node(broker=own_server.url) as node:
        node.router.broker._scripts._patience = 0.05
        own_server.kill()
        with pytest.raises(InvalidStatus) as refused:
            async with node.client():
                pass
        assert refused.value.response.status_code == 503
        assert int(refused.value.response.headers["Retry-After"]) > 0
        async with httpx.AsyncClient(base_url=node.url, headers={"Authorization": f"Bearer {token('ada')}"}) as http:
            assert (await http.get("/projects/p1/presence")).status_code == 503
        own_server.start()


async def test_one_who_cannot_be_counted_as_here_is_closed_with_1013_and_holds_no_seat(node, monkeypatch):
    async def away(_project, _user):
        raise Unavailable("the broker cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(node.router.broker, "enter", away)
        async with node.client() as ada:
            assert (await ada.closed())[0] == 1013

    async def gone():
        return node.router.broker._connections == 0

    await until(gone)
    assert await people(node) == {}
