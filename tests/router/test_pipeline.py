"""The order is the list's; every outcome is reported."""

import pytest

from router import Denied, Event, Plugin
from router.pipeline import Pipeline
from router.testing import envelope


class Said(Event, frozen=True, tag="said"):
    text: str = ""


plugin = Plugin(Said)
MESSAGE = envelope(plugin, Said(text="hello"))


class Run:
    def __init__(self, *middleware):
        self.outcomes, self.arrived = [], []
        self.pipeline = Pipeline(middleware, self.end, lambda e, outcome: self.outcomes.append((e.event.text, outcome)))

    async def end(self, envelope):
        self.arrived.append(envelope.event.text)


def tag(letter):
    async def middleware(envelope, forward):
        await forward(envelope.saying(Said(text=envelope.event.text + letter)))

    return middleware


async def test_the_first_listed_meets_the_message_first():
    run = Run(tag("1"), tag("2"))
    await run.pipeline(MESSAGE)
    assert run.arrived == ["hello12"]
    assert run.outcomes == [("hello12", "delivered")]


async def test_a_message_that_is_not_forwarded_is_reported_as_held():
    async def keep(_envelope, _forward):
        pass

    run = Run(keep, tag("1"))
    await run.pipeline(MESSAGE)
    assert (run.arrived, run.outcomes) == ([], [("hello", "held")])


async def test_one_forwarded_later_is_reported_as_delivered_then():
    kept = []

    async def delay(envelope, forward):
        kept.append((envelope, forward))

    run = Run(delay, tag("1"))
    await run.pipeline(MESSAGE)
    envelope, forward = kept[0]
    await forward(envelope)
    assert run.outcomes == [("hello", "held"), ("hello1", "delivered")]


async def test_a_refusal_is_reported_with_its_code_and_raised():
    async def refuse(_envelope, _forward):
        raise Denied("chat")

    run = Run(tag("1"), refuse)
    with pytest.raises(Denied):
        await run.pipeline(MESSAGE)
    assert run.outcomes == [("hello", "refused:denied")]


async def test_a_failure_is_reported_and_raised():
    async def fail(_envelope, _forward):
        raise KeyError

    run = Run(fail)
    with pytest.raises(KeyError):
        await run.pipeline(MESSAGE)
    assert run.outcomes == [("hello", "failed")]


async def test_a_message_may_be_split():
    async def split(envelope, forward):
        await forward(envelope.narrowed(holding="staff"))
        await forward(envelope.narrowed(lacking="staff"))

    run = Run(split)
    await run.pipeline(MESSAGE)
    assert run.arrived == ["hello", "hello"]
