"""Who has a project open."""

from collections.abc import Awaitable, Callable

from msgspec import Struct

from router.event import Event, Now, Policy
from router.plugin import Plugin

__all__ = ["PLUGINS", "Person", "Presence", "PresenceJoined", "PresenceLeft"]


class PresenceJoined(Event, frozen=True, tag="presence_joined"):
    """A person opened the project, with the first of maybe several windows."""

    user_id: str


class PresenceLeft(Event, frozen=True, tag="presence_left"):
    """A person has been gone for the grace period: no window of theirs is open any more."""

    user_id: str


_SEEN_BY_VIEWERS = Policy(deliver=Now(by=("user_id",)), keep=False, plain=False, internal=True)
PLUGINS = (Plugin(PresenceJoined, _SEEN_BY_VIEWERS), Plugin(PresenceLeft, _SEEN_BY_VIEWERS))


class Person(Struct, frozen=True):
    """Somebody who is here, and with how many connections: 0 within the grace, when they may be coming back."""

    user_id: str
    connections: int


class Presence:
    """Counts connections of each person in each project. Says joined at the first, left a grace after the last.

    The grace (seconds) keeps a reload or a tunnel from looking like leaving and coming back.
    """

    def __init__(
        self, announce: Callable[[str, Event], Awaitable[object]], clock: Callable[[], float], *, grace: float = 15.0
    ) -> None:
        self._announce = announce
        self._clock = clock
        self._grace = grace
        self._here: dict[str, dict[str, int]] = {}
        self._leaving: dict[tuple[str, str], float] = {}

    def people(self, project: str) -> list[Person]:
        """Who is here, by name."""
        return [Person(user, count) for user, count in sorted(self._here.get(project, {}).items())]

    async def enter(self, project: str, user: str) -> None:
        """One more connection."""
        people = self._here.setdefault(project, {})
        people[user] = people.get(user, 0) + 1
        if self._leaving.pop((project, user), None) is None and people[user] == 1:
            await self._announce(project, PresenceJoined(user_id=user))

    def leave(self, project: str, user: str) -> None:
        """One connection less."""
        people = self._here[project]
        people[user] -= 1
        if not people[user]:
            self._leaving[project, user] = self._clock() + self._grace

    async def tick(self) -> None:
        """Announce those whose grace is over."""
        now = self._clock()
        for (project, user), when in list(self._leaving.items()):
            if when <= now:
                del self._leaving[project, user]
                del self._here[project][user]
                if not self._here[project]:
                    del self._here[project]
                await self._announce(project, PresenceLeft(user_id=user))
