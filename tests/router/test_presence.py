"""What a project's viewers are told of who comes and goes. Who is here is the broker's to know: tests/contracts."""

import asyncio

import pytest

from router import Unavailable
from router.brokers.base import Person
from router.brokers.memory import MemoryBroker
from router.presence import Presence, PresenceJoined, PresenceLeft, PresenceUpdated
from router.testing import Clock


class Stage:
    """Presence on a broker in memory, what it told, and whether telling works at the moment."""

    def __init__(self):
        self.clock = Clock()
        self.broker = MemoryBroker(grace=15.0, clock=self.clock)
        self.presence = Presence(self.broker, self.announce)
        self.told = []
        self.fails = None

    async def announce(self, project, event):
        if self.fails is not None:
            raise self.fails
        self.told.append((project, event))

    def take(self):
        told, self.told = self.told, []
        return told


@pytest.fixture
def stage():
    return Stage()


async def test_the_first_connection_joins_and_the_last_leaves_after_the_grace(stage):
    await stage.presence.enter("p", "ada")
    assert stage.take() == [("p", PresenceJoined(user_id="ada"))]
    await stage.presence.leave("p", "ada")
    stage.take()
    stage.clock.move(14.9)
    await stage.presence.tick()
    assert stage.told == []
    stage.clock.move(0.1)
    await stage.presence.tick()
    assert stage.told == [("p", PresenceLeft(user_id="ada"))]
    assert await stage.presence.people("p") == []


async def test_a_changed_number_of_windows_is_an_update(stage):
    await stage.presence.enter("p", "ada")
    await stage.presence.update("p", "ada", "reading")
    stage.take()
    await stage.presence.enter("p", "ada")
    await stage.presence.leave("p", "ada")
    await stage.presence.leave("p", "ada")
    assert stage.take() == [
        ("p", PresenceUpdated(user_id="ada", connections=count, status="reading")) for count in (2, 1, 0)
    ]


async def test_a_reload_is_no_leaving_and_whoever_looks_meanwhile_sees_the_person(stage):
    await stage.presence.enter("p", "ada")
    await stage.presence.leave("p", "ada")
    assert await stage.presence.people("p") == [Person("ada", 0)]
    stage.clock.move(10.0)
    await stage.presence.enter("p", "ada")
    stage.clock.move(10.0)
    await stage.presence.tick()
    assert {type(event) for _, event in stage.told[1:]} == {PresenceUpdated}
    assert await stage.presence.people("p") == [Person("ada", 1)]


async def test_a_new_status_is_an_update(stage):
    await stage.presence.enter("p", "ada")
    await stage.presence.update("p", "ada", "editing step s1")
    assert stage.told[1:] == [("p", PresenceUpdated(user_id="ada", connections=1, status="editing step s1"))]


async def test_what_cannot_be_announced_is_announced_when_the_broker_is_back(stage):
    stage.fails = Unavailable("away")
    await stage.presence.enter("p", "ada")
    await stage.presence.tick()
    stage.fails = None
    await stage.presence.tick()
    await stage.presence.tick()
    assert stage.told == [("p", PresenceJoined(user_id="ada"))]


async def test_whoever_is_back_before_their_leaving_could_be_announced_is_not_told_as_left(stage):
    for user in ("ada", "bob"):
        await stage.presence.enter("p", user)
        await stage.presence.leave("p", user)
    stage.clock.move(15.0)
    stage.take()
    stage.fails = Unavailable("away")
    await stage.presence.tick()
    stage.fails = None
    await stage.presence.enter("p", "ada")
    await stage.presence.tick()
    assert stage.told == [("p", PresenceJoined(user_id="ada")), ("p", PresenceLeft(user_id="bob"))]


async def test_those_who_may_have_been_told_as_gone_are_told_as_joined(stage):
    async def returned():
        return [("p", "ada")]

    stage.broker.returned = returned
    await stage.presence.tick()
    assert stage.told == [("p", PresenceJoined(user_id="ada"))]


@pytest.mark.parametrize("asked", ["departed", "returned"])
async def test_a_broker_that_is_away_is_asked_again_the_next_second(stage, asked, monkeypatch):
    async def away():
        raise Unavailable("away")

    await stage.presence.enter("p", "ada")
    await stage.presence.leave("p", "ada")
    stage.clock.move(15.0)
    stage.take()
    with monkeypatch.context() as patch:
        patch.setattr(stage.broker, asked, away)
        await stage.presence.tick()
        assert stage.told == []
    await stage.presence.tick()
    assert stage.told == [("p", PresenceLeft(user_id="ada"))]


@pytest.mark.parametrize("failure", [asyncio.CancelledError(), RuntimeError("a bug")])
async def test_an_enter_that_fails_does_not_count(stage, failure):
    stage.fails = failure
    with pytest.raises(type(failure)):
        await stage.presence.enter("p", "ada")
    assert await stage.presence.people("p") == [Person("ada", 0)]
