"""What a project's viewers are told of who comes and goes. Who is here is the broker's to know: tests/contracts."""

import asyncio

import pytest

from router import Unavailable
from router.brokers.base import Notice, Person
from router.brokers.memory import MemoryBroker
from router.presence import PROMPT, Presence, PresenceJoined, PresenceLeft, PresenceUpdated
from router.testing import Clock


class Stage:
    """Presence on a broker in memory, what it told, and whether telling works at the moment."""

    def __init__(self):
        self.clock = Clock()
        self.broker = MemoryBroker(grace=15.0, clock=self.clock)
        self.presence = Presence(self.broker, self.announce, clock=self.clock)
        self.told = []
        self.fails = None
        self.refuses = None
        self.meanwhile = None

    async def announce(self, project, event):
        if self.fails is not None:
            raise self.fails
        if self.refuses == event.user_id:
            raise RuntimeError("a bug")
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            await meanwhile()
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
    assert stage.told == [("p", PresenceJoined(user_id="ada")), ("p", PresenceUpdated(user_id="ada", connections=1))]


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
    assert [event for _, event in stage.told if event.user_id == "bob"] == [PresenceLeft(user_id="bob")]
    assert {type(event) for _, event in stage.told if event.user_id == "ada"} == {PresenceJoined, PresenceUpdated}


async def test_whoever_comes_back_while_their_leaving_is_told_is_here_in_the_end(stage):
    await stage.presence.enter("p", "ada")
    await stage.presence.leave("p", "ada")
    stage.clock.move(15.0)
    stage.take()
    stage.meanwhile = lambda: stage.presence.enter("p", "ada")
    await stage.presence.tick()
    assert stage.told == [
        ("p", PresenceJoined(user_id="ada")),
        ("p", PresenceLeft(user_id="ada")),
        ("p", PresenceJoined(user_id="ada")),
        ("p", PresenceUpdated(user_id="ada", connections=1)),
    ]


async def test_the_true_number_is_told_also_when_it_changes_while_it_is_told(stage):
    await stage.presence.enter("p", "ada")
    await stage.broker.doubt([Notice("p", Person("ada", 0))])
    stage.take()
    stage.meanwhile = lambda: stage.presence.enter("p", "ada")
    await stage.presence.tick()
    assert stage.told[-1] == ("p", PresenceUpdated(user_id="ada", connections=2))


async def test_a_leaving_that_could_not_be_told_is_told_the_next_second(stage):
    await stage.presence.enter("p", "ada")
    await stage.presence.leave("p", "ada")
    stage.clock.move(15.0)
    stage.take()
    stage.fails = Unavailable("away")
    await stage.presence.tick()
    stage.fails = None
    await stage.presence.tick()
    await stage.presence.tick()
    assert stage.told == [("p", PresenceLeft(user_id="ada"))]


async def test_what_was_told_late_is_told_once_more_as_it_is_by_then(stage):
    async def late():
        stage.clock.move(PROMPT)
        await stage.broker.enter("p", "ada")

    stage.meanwhile = late
    await stage.presence.enter("p", "ada")
    await stage.presence.tick()
    assert stage.told[1:] == [("p", PresenceUpdated(user_id="ada", connections=2))]


async def test_what_the_broker_said_too_long_ago_is_not_told_but_how_it_is_now(stage, monkeypatch):
    leave = stage.broker.leave

    async def slow(project, user):
        person = await leave(project, user)
        stage.clock.move(PROMPT)
        await stage.broker.enter(project, user)
        return person

    await stage.presence.enter("p", "ada")
    stage.take()
    monkeypatch.setattr(stage.broker, "leave", slow)
    await stage.presence.leave("p", "ada")
    assert stage.told == []
    await stage.presence.tick()
    assert stage.told == [("p", PresenceUpdated(user_id="ada", connections=1))]


async def test_a_late_number_is_not_told_as_it_was(stage):
    await stage.presence.enter("p", "ada")
    await stage.presence.enter("p", "ada")
    stage.take()
    stage.fails = Unavailable("away")
    await stage.presence.leave("p", "ada")
    stage.fails = None
    await stage.presence.enter("p", "ada")
    await stage.presence.tick()
    assert stage.told[-1] == ("p", PresenceUpdated(user_id="ada", connections=2))


async def test_a_leave_that_the_broker_cannot_tell_of_yet_is_told_later(stage, monkeypatch):
    await stage.presence.enter("p", "ada")
    await stage.presence.enter("p", "ada")
    stage.take()
    leave = stage.broker.leave

    async def later(project, user):
        await leave(project, user)

    monkeypatch.setattr(stage.broker, "leave", later)
    await stage.presence.leave("p", "ada")
    await stage.presence.tick()
    assert stage.told == [("p", PresenceUpdated(user_id="ada", connections=1))]


@pytest.mark.parametrize("failure", [asyncio.CancelledError(), Unavailable("away")])
async def test_a_status_that_may_have_been_set_is_told(stage, monkeypatch, failure):
    await stage.presence.enter("p", "ada")
    stage.take()
    describe = stage.broker.set_status

    async def fail(*what):
        await describe(*what)
        raise failure

    monkeypatch.setattr(stage.broker, "set_status", fail)
    with pytest.raises(type(failure)):
        await stage.presence.update("p", "ada", "reading")
    await stage.presence.tick()
    assert stage.told == [("p", PresenceUpdated(user_id="ada", connections=1, status="reading"))]


async def test_a_status_of_whoever_is_not_here_is_not_told(stage):
    await stage.presence.enter("p", "ada")
    await stage.presence.leave("p", "ada")
    stage.take()
    await stage.presence.update("p", "ada", "reading")
    await stage.presence.tick()
    assert stage.told == [("p", PresenceUpdated(user_id="ada", connections=0))]


async def test_what_takes_too_long_to_be_handed_out_is_left_to_others(stage, monkeypatch):
    untold = stage.broker.untold

    async def slow():
        stage.clock.move(PROMPT)
        return await untold()

    await stage.broker.doubt([Notice("p", Person("ada", 0))])
    monkeypatch.setattr(stage.broker, "untold", slow)
    await stage.presence.tick()
    assert stage.told == []


async def test_one_who_cannot_be_told_of_holds_up_nobody(stage):
    for user in ("ada", "bob"):
        await stage.presence.enter("p", user)
        await stage.presence.leave("p", user)
    stage.clock.move(15.0)
    stage.take()
    stage.refuses = "ada"
    with pytest.raises(RuntimeError):
        await stage.presence.tick()
    stage.refuses = None
    assert stage.take() == [("p", PresenceLeft(user_id="bob"))]
    await stage.presence.tick()
    assert stage.take() == [("p", PresenceLeft(user_id="ada"))]


@pytest.mark.parametrize("asked", ["untold", "told", "doubt"])
async def test_a_broker_that_is_away_is_asked_again_the_next_second(stage, asked, monkeypatch):
    async def away(*_):
        raise Unavailable("away")

    await stage.presence.enter("p", "ada")
    await stage.presence.leave("p", "ada")
    stage.clock.move(15.0)
    stage.take()
    with monkeypatch.context() as patch:
        patch.setattr(stage.broker, asked, away)
        await stage.presence.tick()
    await stage.presence.tick()
    assert set(stage.told) == {("p", PresenceLeft(user_id="ada"))}
    assert await stage.broker.untold() == []


@pytest.mark.parametrize("failure", [asyncio.CancelledError(), RuntimeError("a bug")])
async def test_an_enter_that_fails_does_not_count(stage, failure):
    stage.fails = failure
    with pytest.raises(type(failure)):
        await stage.presence.enter("p", "ada")
    assert await stage.presence.people("p") == [Person("ada", 0)]
