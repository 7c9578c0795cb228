"""Calls that share a round trip: none waits for another's fault, and none is made twice without saying so."""

import asyncio
import time

import pytest
import redis.asyncio

from plugins.step import StepStarted
from router.backend import Backend
from router.brokers.post import Post
from router.brokers.script import Scripts
from router.errors import Unavailable
from tests.contracts.test_broker import message
from tests.router.brokers.nodes import LossyScripts


async def test_many_publishes_at_once_pass_while_redis_is_well(redis_url):
    async with Backend(redis_url) as backend:
        answers = await asyncio.gather(
            *(backend.publish("p1", StepStarted(step_id="s")) for _ in range(1500)), return_exceptions=True
        )
        wrong = [a for a in answers if isinstance(a, BaseException)]
        assert not wrong, (len(wrong), wrong[0])


async def test_an_answer_that_was_lost_makes_no_second_event_on_a_busy_topic(redis_url):
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        lossy, other = LossyScripts(client, patience=5), Scripts(client)
        slow, quick = Post(lossy, "PUBLISH"), Post(other, "PUBLISH")
        lossy.lose = ["answer"]
        asking = asyncio.create_task(slow.publish(message("once")))
        while await client.xlen("router:{project:p}:log") < 1:
            await asyncio.sleep(0)
        for _ in range(2):
            await asyncio.gather(*(quick.publish(message("other")) for _ in range(150)))
        got = await asking
        entries = await client.xrange("router:{project:p}:log")
        assert sum(b'"once"' in f[b"e"] for _, f in entries) == 1, got


async def test_one_bad_call_does_not_fail_those_that_share_its_round_trip(redis_url):
    async with Backend(redis_url) as backend:
        bad, good = await asyncio.gather(
            backend.publish_to_user("x\ud800", StepStarted(step_id="s")),
            backend.publish("p1", StepStarted(step_id="s")),
            return_exceptions=True,
        )
        assert isinstance(bad, UnicodeEncodeError)
        assert good == [1]


async def test_a_call_that_can_never_work_does_not_hold_up_the_others(redis_url):
    """One topic whose log is of another type (or NOPERM, OOM ...): 30 s of tries, one batch a second for everybody."""
    async with redis.asyncio.Redis.from_url(redis_url) as client, Backend(redis_url) as backend:
        await client.set("router:{project:bad}:meta", "x")
        bad = asyncio.create_task(backend.publish("bad", StepStarted(step_id="s")))
        await asyncio.sleep(3)
        took = []
        for _ in range(4):
            t = time.monotonic()
            await backend.publish("p1", StepStarted(step_id="s"))
            took.append(time.monotonic() - t)
        bad.cancel()
        assert max(took) < 0.2, took


async def test_each_call_waits_no_longer_than_its_patience(own_server):
    async with Backend(own_server.url, patience=1.0) as backend:
        await backend.publish("p1", StepStarted(step_id="s"))
        own_server.freeze()
        try:

            async def one():
                t = time.monotonic()
                with pytest.raises(Unavailable):
                    await backend.publish("p1", StepStarted(step_id="s"))
                return time.monotonic() - t

            first = asyncio.create_task(one())
            await asyncio.sleep(0.2)
            second = asyncio.create_task(one())
            took = await asyncio.gather(first, second)
        finally:
            own_server.thaw()
        assert max(took) < 2, took
