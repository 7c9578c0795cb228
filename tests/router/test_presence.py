"""Who has a project open."""

import pytest

from router.presence import Person, Presence, PresenceJoined, PresenceLeft
from router.testing import Clock


@pytest.fixture
def told():
    return []


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def presence(told, clock):
    async def announce(project, event):
        told.append((project, event))

    return Presence(announce, clock, grace=15.0)


async def test_the_first_connection_joins_and_the_last_leaves_after_the_grace(presence, told, clock):
    await presence.enter("p", "ada")
    await presence.enter("p", "ada")
    presence.leave("p", "ada")
    presence.leave("p", "ada")
    clock.move(14.9)
    await presence.tick()
    assert told == [("p", PresenceJoined(user_id="ada"))]
    clock.move(0.1)
    await presence.tick()
    assert told[1:] == [("p", PresenceLeft(user_id="ada"))]
    assert presence.people("p") == []


async def test_a_reload_is_no_leaving_and_whoever_looks_meanwhile_sees_the_person(presence, told, clock):
    await presence.enter("p", "ada")
    presence.leave("p", "ada")
    assert presence.people("p") == [Person("ada", 0)]
    clock.move(10.0)
    await presence.enter("p", "ada")
    clock.move(10.0)
    await presence.tick()
    assert told == [("p", PresenceJoined(user_id="ada"))]
    assert presence.people("p") == [Person("ada", 1)]
