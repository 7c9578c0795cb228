"""What every broker keeps. One suite; each broker that there is runs it."""

from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from router import Event, Plugin, Policy
from router.brokers.base import Broker, Limits
from router.brokers.memory import MemoryBroker
from router.testing import Clock, envelope


class Said(Event, frozen=True, tag="said"):
    text: str


kept, fleeting = Plugin(Said), Plugin(Said, Policy(keep=False))


def message(text: str = "", id_: str | None = None, plugin: Plugin = kept, size: int = 10):
    made = envelope(plugin, Said(text=text), project="p")
    return replace(made, message_id=id_, payload=b"x" * size, published_at=CLOCK.now)


CLOCK = Clock()
TOPIC = "project:p"


@pytest.fixture(params=["memory"])
async def broker(request: pytest.FixtureRequest) -> AsyncIterator[Broker]:
    made = MemoryBroker(max_events=10, max_age=60.0, max_bytes=1000, forget=600.0, clock=CLOCK)
    made.arrived = []
    await made.start(made.arrived.append)
    yield made
    await made.stop()


async def test_numbers_of_a_topic_are_one_two_three_and_arrive_in_order(broker):
    await broker.subscribe(TOPIC)
    published = [(await broker.publish(message(text))).position.seq for text in "abc"]
    assert published == [1, 2, 3]
    assert [(e.event.text, e.seq, e.first) for e in broker.arrived] == [("a", 1, 1), ("b", 2, 2), ("c", 3, 3)]


async def test_nothing_arrives_of_a_topic_that_nobody_subscribed_to(broker):
    await broker.publish(message("a"))
    await broker.subscribe(TOPIC)
    await broker.unsubscribe(TOPIC)
    await broker.publish(message("b"))
    assert broker.arrived == []


async def test_subscriptions_count(broker):
    await broker.subscribe(TOPIC)
    await broker.subscribe(TOPIC)
    await broker.unsubscribe(TOPIC)
    await broker.publish(message("a"))
    assert [e.event.text for e in broker.arrived] == ["a"]


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
    assert len(broker.arrived) == 1


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


async def test_history_is_bounded_in_bytes(broker):
    for number in range(5):
        await broker.publish(message(str(number), size=400))
    assert [e.event.text for e in (await broker.history(TOPIC, 0)).envelopes] == ["3", "4"]


async def test_history_is_bounded_in_age(broker):
    await broker.publish(message("old"))
    CLOCK.move(61.0)
    await broker.publish(message("new"))
    history = await broker.history(TOPIC, 0)
    assert ([e.event.text for e in history.envelopes], history.complete) == (["new"], False)


async def test_an_event_that_is_not_kept_arrives_without_a_number(broker):
    await broker.subscribe(TOPIC)
    await broker.publish(message("a", plugin=fleeting))
    assert [(e.event.text, e.seq) for e in broker.arrived] == [("a", 0)]
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


async def test_a_forgotten_topic_starts_a_new_epoch(broker):
    before = (await broker.publish(message("a"))).position
    CLOCK.move(601.0)
    for number in range(2000):
        await broker.history(f"project:{number}", 0)
    after = (await broker.publish(message("b"))).position
    assert after.seq == 1
    assert after.epoch != before.epoch
