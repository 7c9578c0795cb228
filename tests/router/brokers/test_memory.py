"""What only the memory broker does: bounds that a clock and a counter in this process decide."""

import pytest
from msgspec.structs import replace

from router import Event, Plugin
from router.brokers.memory import MemoryBroker
from router.testing import Clock, envelope


class Said(Event, frozen=True, tag="said"):
    text: str


said = Plugin(Said)
CLOCK = Clock()
TOPIC = "project:p"


def message(text: str, size: int = 10):
    return replace(envelope(said, Said(text=text), project="p"), payload=b"x" * size, published_at=CLOCK.now)


@pytest.fixture
async def broker():
    made = MemoryBroker(max_events=10, max_age=60.0, max_bytes=1000, forget=600.0, clock=CLOCK)
    await made.start(lambda _: None, lambda _topic, _position: None)
    return made


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


async def test_a_forgotten_topic_starts_a_new_epoch(broker):
    before = (await broker.publish(message("a"))).position
    CLOCK.move(601.0)
    for number in range(2000):
        await broker.history(f"project:{number}", 0)
    after = (await broker.publish(message("b"))).position
    assert after.seq == 1
    assert after.epoch != before.epoch
