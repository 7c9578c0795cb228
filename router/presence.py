"""Tells a project's viewers who comes, who goes, and what they say of themselves."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Annotated

from msgspec import Meta

from router.brokers.base import Broker, Notice, Person
from router.errors import Unavailable
from router.event import Event, Latest, Now, Policy
from router.plugin import Plugin

__all__ = ["PLUGINS", "Presence", "PresenceJoined", "PresenceLeft", "PresenceUpdate", "PresenceUpdated"]


class PresenceJoined(Event, frozen=True, tag="presence_joined"):
    """A person opened the project, with the first of maybe several windows."""

    user_id: str


class PresenceLeft(Event, frozen=True, tag="presence_left"):
    """A person has been gone for the grace period: no window of theirs is open any more."""

    user_id: str


class PresenceUpdated(Event, frozen=True, tag="presence_updated"):
    """A person has more or fewer windows than before, or another status. No window: they may be coming back."""

    user_id: str
    connections: int
    status: str = ""


class PresenceUpdate(Event, frozen=True, tag="presence_update"):
    """What a person says of themselves, such as "editing step s1"; empty for nothing.

    Viewers are told by `presence_updated`. It is forgotten when the person has left.
    """

    status: Annotated[str, Meta(max_length=200)]


def _seen_by_viewers(deliver: Now | Latest, settles: tuple[type[Event], ...] = ()) -> Policy:
    return Policy(deliver=deliver, settles=settles, keep=False, plain=False, internal=True)


PROMPT = 0.7
"""Seconds within which what the broker said is announced, or may be wrong: less than those after which it hands out
again people whose connections changed on several nodes."""

_BY_USER = ("user_id",)
PLUGINS = (
    Plugin(PresenceJoined, _seen_by_viewers(Now(by=_BY_USER))),
    Plugin(PresenceLeft, _seen_by_viewers(Now(by=_BY_USER), settles=(PresenceUpdated,))),
    Plugin(PresenceUpdated, _seen_by_viewers(Latest(by=_BY_USER))),
    Plugin(PresenceUpdate, Policy(send="view", keep=False, plain=False, internal=True)),
)


class Presence:
    """Announces what the broker counts: joined at a person's first connection, left a grace after the last one.

    The grace keeps a reload or a tunnel from looking like leaving and coming back.

    Viewers believe what was announced last, so that must be what is so. An announcement that failed, or may have come
    after a newer one of another node, is noted with the broker (`doubt`), which hands the person out again: then it is
    announced how they are, until nothing has changed meanwhile.
    """

    def __init__(
        self,
        broker: Broker,
        announce: Callable[[str, Event], Awaitable[object]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._announce = announce
        self._clock = clock
        self._doubts: dict[tuple[str, str], bool] = {}
        """Who is to be noted with the broker, and whether they may not have been told as joined."""
        self._joined: set[tuple[str, str]] = set()
        """Who was told as joined, which the broker is to know."""

    async def people(self, project: str) -> list[Person]:
        """Who is here, by name. Raises `Unavailable`."""
        return await self._broker.people(project)

    async def enter(self, project: str, user: str) -> None:
        """One more connection. Raises `Unavailable`; then it does not count."""
        began = self._clock()
        arrived = await self._broker.enter(project, user)
        event = PresenceJoined(user_id=user) if arrived.joined else _updated(arrived.person)
        try:
            await self._tell(project, user, event, began)
        except BaseException:
            await self._broker.leave(project, user)
            raise

    async def leave(self, project: str, user: str) -> None:
        """One connection less."""
        began = self._clock()
        try:
            person = await self._broker.leave(project, user)
        except BaseException:
            self._doubt(project, user)
            raise
        if person is None:
            self._doubt(project, user)
        else:
            await self._tell(project, user, _updated(person), began)

    async def update(self, project: str, user: str, status: str) -> None:
        """Somebody has another status. Raises `Unavailable`."""
        began = self._clock()
        try:
            person = await self._broker.set_status(project, user, status)
        except BaseException:  # it may have been set all the same
            self._doubt(project, user)
            raise
        if person.connections:
            await self._tell(project, user, _updated(person), began)
        else:  # the broker knows nothing of them: they are leaving, or it is to be told of them again
            self._doubt(project, user)

    async def tick(self) -> None:
        """Announce those whose grace is over, and how everybody is of whom viewers may believe something else."""
        with contextlib.suppress(Unavailable):
            await self._note()
            while notices := await self._untold():
                told = await asyncio.gather(*map(self._tell_anew, notices), return_exceptions=True)
                done = [notice for notice, failed in zip(notices, told, strict=True) if failed is None]
                await self._broker.told(done)
                for failed in told:
                    if failed is not None:
                        raise failed  # what was not told is handed out again

    async def _note(self) -> None:
        """Have the broker know what was told, and what was not."""
        joined = [_notice(*who) for who in self._joined]
        await self._broker.told(joined)
        self._joined.difference_update((notice.project, notice.person.user_id) for notice in joined)
        doubts, self._doubts = self._doubts, {}
        try:
            await self._broker.doubt([_notice(*who, anew=anew) for who, anew in doubts.items()])
        except BaseException:
            for who, anew in doubts.items():
                self._doubt(*who, anew=anew)
            raise

    async def _untold(self) -> list[Notice]:
        """Whom this node has to tell of, unless the answer took so long that others have to by now."""
        began = self._clock()
        notices = await self._broker.untold()
        return notices if self._clock() - began < PROMPT else []

    async def _tell_anew(self, notice: Notice) -> None:
        user = notice.person.user_id
        if not notice.here:
            await self._announce(notice.project, PresenceLeft(user_id=user))
            return
        if notice.anew:
            await self._announce(notice.project, PresenceJoined(user_id=user))
        await self._announce(notice.project, _updated(notice.person))

    async def _tell(self, project: str, user: str, event: Event, began: float) -> None:
        """Announce what the broker said, asked when it `began`, unless it may be no longer so."""
        joined = isinstance(event, PresenceJoined)
        try:
            if self._clock() - began < PROMPT:
                await self._announce(project, event)
                if joined:
                    self._joined.add((project, user))
                if self._clock() - began >= PROMPT:
                    self._doubt(project, user)
                return
        except Unavailable:
            pass
        except BaseException:
            self._doubt(project, user, anew=joined)
            raise
        self._doubt(project, user, anew=joined)

    def _doubt(self, project: str, user: str, *, anew: bool = False) -> None:
        self._doubts[project, user] = anew or self._doubts.get((project, user), False)


def _notice(project: str, user: str, *, anew: bool = False) -> Notice:
    return Notice(project, Person(user, 0), anew=anew)


def _updated(person: Person) -> PresenceUpdated:
    return PresenceUpdated(user_id=person.user_id, connections=person.connections, status=person.status)
