"""What every broker keeps. One suite; each broker that there is runs it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from router import Event, Plugin, Policy
from router.brokers.base import Broker, Limits
from router.brokers.memory import MemoryBroker
from router.brokers.redis import RedisBroker
from router.testing import Clock, envelope


class Said(Event, frozen=True, tag="said"):
    text: str


kept, fleeting = Plugin(Said), Plugin(Said, Policy(keep=False))


def message(text: str = "", id_: str | None = None, plugin: Plugin = kept, size: int = 10):
    made = envelope(plugin, Said(text=text), project="p")
    payload = json.dumps({"type": "said", "text": text, "fleeting": plugin is fleeting, "x": "x" * size}).encode()
    return replace(made, message_id=id_, payload=payload, published_at=time.time())


CLOCK = Clock()
TOPIC = "project:p"


def read(payload: bytes):
    event = json.loads(payload)
    plugin = fleeting if event.get("fleeting") else kept
    return Said(text=event["text"]), plugin.policy


@pytest.fixture
async def broker(broker_url: str) -> AsyncIterator[Broker]:
    arrived: list = []
    if broker_url == "memory://":
        made: Broker = MemoryBroker(max_events=10, max_age=60.0, clock=CLOCK)
    else:
        made = RedisBroker(broker_url, read, max_events=10, max_age=60.0)
    made.arrived = arrived
    await made.start(arrived.append, lambda topic, position: arrived.append((topic, position)))
    yield made
    await made.stop()


async def arrived(broker, count):
    """What arrived, once it is `count`; a probe of our own tells that nothing more is on its way."""
    for _ in range(2000):
        if len(broker.arrived) >= count:
            break
        await asyncio.sleep(0.001)
    return broker.arrived


async def test_numbers_of_a_topic_are_one_two_three_and_arrive_in_order(broker):
    await broker.subscribe(TOPIC)
    published = [(await broker.publish(message(text))).position.seq for text in "abc"]
    assert published == [1, 2, 3]
    assert [(e.event.text, e.seq, e.first) for e in await arrived(broker, 3)] == [("a", 1, 1), ("b", 2, 2), ("c", 3, 3)]


async def test_nothing_arrives_of_a_topic_that_nobody_subscribed_to(broker):
    await broker.publish(message("a"))
    await broker.subscribe(TOPIC)
    await broker.unsubscribe(TOPIC)
    await broker.publish(message("b"))
    await broker.subscribe(TOPIC)
    await broker.publish(message("c"))
    assert [e.event.text for e in await arrived(broker, 1)] == ["c"]


async def test_subscriptions_count(broker):
    await broker.subscribe(TOPIC)
    await broker.subscribe(TOPIC)
    await broker.unsubscribe(TOPIC)
    await broker.publish(message("a"))
    assert [e.event.text for e in await arrived(broker, 1)] == ["a"]


async def test_subscribing_tells_the_position_after_which_everything_arrives(broker):
    await broker.publish(message("a"))
    position = await broker.subscribe(TOPIC)
    published = await broker.publish(message("b"))
    assert (position.seq, published.position.seq) == (1, 2)
    assert position.epoch == published.position.epoch


async def test_the_same_message_id_is_published_once(broker):
    await broker.subscribe(TOPIC)
    first = await broker.publish(message("a", "id"))
    again = await broker.publish(message("a", "id"))
    assert (again.position, again.duplicate, first.duplicate) == (first.position, True, False)
    await broker.publish(message("b"))
    assert [e.event.text for e in await arrived(broker, 2)] == ["a", "b"]


async def test_history_has_what_came_after_a_number(broker):
    for text in "abc":
        await broker.publish(message(text))
    history = await broker.history(TOPIC, 1)
    assert ([e.event.text for e in history.envelopes], history.complete, history.top.seq) == (["b", "c"], True, 3)
    assert (await broker.history(TOPIC, 3)).complete
    assert not (await broker.history(TOPIC, 4)).complete


async def test_history_is_bounded_in_number_and_never_passes_for_whole(broker):
    for number in range(15):
        await broker.publish(message(str(number)))
    assert not (await broker.history(TOPIC, 4)).complete
    history = await broker.history(TOPIC, 5)
    assert (history.complete, len(history.envelopes)) == (True, 10)


async def test_an_event_that_is_not_kept_arrives_without_a_number(broker):
    await broker.subscribe(TOPIC)
    await broker.publish(message("a", plugin=fleeting))
    assert [(e.event.text, e.seq) for e in await arrived(broker, 1)] == [("a", 0)]
    assert (await broker.history(TOPIC, 0)).envelopes == []
    assert (await broker.publish(message("b"))).position.seq == 1


async def test_seats_are_counted_by_user_project_and_in_all(broker):
    limits = Limits(user=2, project=3, system=4)
    for user, project, full in [
        ("ada", "p", None),
        ("ada", "p", None),
        ("ada", "p", "user"),
        ("bob", "p", None),
        ("cy", "p", "project"),
        ("cy", "q", None),
        ("dee", "q", "system"),
    ]:
        assert await broker.claim(user, project, limits) == full
    await broker.release("ada", "p")
    assert await broker.claim("dee", "p", limits) is None
