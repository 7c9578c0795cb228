"""What a server remembers may be odd, or forgotten soon: whoever listens is told, and everything else goes on."""

import asyncio

import pytest
import redis.asyncio
from msgspec.structs import replace

from router import wire
from router.brokers.layout import names_of
from router.presence import PresenceJoined
from router.testing import envelope
from tests.journeys.test_positions import Page, nodes, started


async def types(client):
    """Of all frames that still come."""
    found = []
    while True:
        try:
            found.append((await client.frame(timeout=0.5))["type"])
        except TimeoutError:
            return found


async def test_a_topic_in_which_nothing_was_published_is_not_told_to_reload_when_history_is_short(redis_url):
    async with nodes(redis_url, 1, history_seconds=1.0) as (node,), node.client() as client:
        for _ in range(2):
            await asyncio.sleep(1.2)
            await node.router.broker.check()  # as it does every 30 s
        assert "resync" not in await types(client)


@pytest.mark.parametrize(
    ("field", "value"), [("past", "nonsense"), ("loose", "many"), ("past", "a b c d ")], ids=["past", "loose", "words"]
)
async def test_a_topic_whose_meta_is_odd_is_not_deaf_once_it_is_mended(redis_url, field, value):
    """Its subscription is renewed while somebody has written there what nobody can read."""
    async with (
        nodes(redis_url, 1) as (node,),
        redis.asyncio.Redis.from_url(redis_url) as operator,
        node.client() as client,
    ):
        page = Page(client)
        await node.publish(started(1))
        await page.read(lambda page: page.pos == 1)
        meta = names_of("project:p1").meta
        before = await operator.hget(meta, field)
        await operator.hset(meta, field, value)
        node.router.broker._continuity.fill("project:p1")  # as after a lost connection
        await asyncio.sleep(0.5)
        await (operator.hdel(meta, field) if before is None else operator.hset(meta, field, before))
        await node.publish(started(2))
        await asyncio.wait_for(page.read(lambda page: "2" in page.steps() or page.resyncs), 5)


async def test_a_past_that_is_odd_does_not_hang_the_server(own_server):
    async with redis.asyncio.Redis.from_url(own_server.url) as operator, nodes(own_server.url, 1) as (node,):
        await node.publish(started(1))
        await operator.hset(names_of("project:p1").meta, mapping={"past": " " * 1001, "run": "0" * 40})
        await asyncio.wait_for(node.publish(started(2)), 5)


async def test_a_numbering_that_was_forgotten_counts_as_gone_also_when_writing_that_down_failed_once(redis_url):
    """A node remembers the epoch; the server forgot it, and is away at the moment when it is told so."""
    async with nodes(redis_url, 1) as (node,), redis.asyncio.Redis.from_url(redis_url) as operator:
        await node.publish(started(1))
        broker = node.router.broker
        assert (await broker.history("project:p1", 0)).whole
        await operator.flushall()
        run, failed = broker._scripts.run, []

        async def fails_once(script, *rest):
            if script == "lacking" and not failed:
                failed.append(script)
                raise ConnectionError
            return await run(script, *rest)

        broker._scripts.run = fails_once
        with pytest.raises(ConnectionError):
            await broker.history("project:p1", 0)
        assert not (await broker.history("project:p1", 0)).whole


async def test_a_burst_of_events_without_a_number_that_is_still_on_its_way_is_not_taken_for_lost(redis_url):
    """More of them than are kept: the node looks whether all is well while they wait in its socket."""
    async with (
        nodes(redis_url, 1) as (node,),
        redis.asyncio.Redis.from_url(redis_url) as operator,
        node.client() as client,
    ):
        broker = node.router.broker
        joined = envelope(node.router.catalog.plugin("presence_joined"), PresenceJoined(user_id="x"))
        joined = replace(joined, payload=wire.encode(joined.event))
        await operator.ping()
        burst = [asyncio.ensure_future(broker.publish(joined)) for _ in range(2000)]
        while not all(each.done() for each in burst):
            await broker.check()
        await asyncio.gather(*burst)
        assert "resync" not in await types(client)
