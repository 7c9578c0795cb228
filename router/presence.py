"""Tells a project's viewers who comes, who goes, and what they say of themselves."""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Annotated

from msgspec import Meta

from router.brokers.base import Broker, Person
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


_BY_USER = ("user_id",)
PLUGINS = (
    Plugin(PresenceJoined, _seen_by_viewers(Now(by=_BY_USER))),
    Plugin(PresenceLeft, _seen_by_viewers(Now(by=_BY_USER), settles=(PresenceUpdated,))),
    Plugin(PresenceUpdated, _seen_by_viewers(Latest(by=_BY_USER))),
    Plugin(PresenceUpdate, Policy(send="view", keep=False, plain=False, internal=True)),
)


class Presence:
    """Announces what the broker counts: joined at a person's first connection, left a grace after the last one.

    The grace keeps a reload or a tunnel from looking like leaving and coming back. What cannot be announced because
    the broker is away is announced when it is back.
    """

    def __init__(self, broker: Broker, announce: Callable[[str, Event], Awaitable[object]]) -> None:
        self._broker = broker
        self._announce = announce
        self._untold: deque[tuple[str, Event]] = deque(maxlen=10_000)

    async def people(self, project: str) -> list[Person]:
        """Who is here, by name. Raises `Unavailable`."""
        return await self._broker.people(project)

    async def enter(self, project: str, user: str) -> None:
        """One more connection. Raises `Unavailable`; then it does not count."""
        arrived = await self._broker.enter(project, user)
        try:
            await self._tell(project, PresenceJoined(user_id=user) if arrived.joined else _updated(arrived.person))
        except BaseException:
            await self._broker.leave(project, user)
            raise

    async def leave(self, project: str, user: str) -> None:
        """One connection less."""
        person = await self._broker.leave(project, user)
        if person is not None:
            await self._tell(project, _updated(person))

    async def update(self, project: str, user: str, status: str) -> None:
        """Somebody has another status. Raises `Unavailable`."""
        await self._tell(project, _updated(await self._broker.set_status(project, user, status)))

    async def tick(self) -> None:
        """Announce those whose grace is over, and what could not be announced before."""
        late = list(self._untold)
        self._untold.clear()
        try:
            late = [(project, event) for project, event in late if await self._still_so(project, event)]
            late += [(project, PresenceJoined(user_id=user)) for project, user in await self._broker.returned()]
            while late or (late := await self._departed()):
                await self._announce(*late[0])
                del late[0]
        except Unavailable:
            self._untold.extendleft(reversed(late))

    async def _tell(self, project: str, event: Event) -> None:
        try:
            await self._announce(project, event)
        except Unavailable:
            self._untold.append((project, event))

    async def _departed(self) -> list[tuple[str, Event]]:
        return [(project, PresenceLeft(user_id=user)) for project, user in await self._broker.departed()]

    async def _still_so(self, project: str, event: Event) -> bool:
        """Whether what is told late is true: somebody who left may have come back."""
        if not isinstance(event, PresenceLeft):
            return True
        return event.user_id not in {person.user_id for person in await self._broker.people(project)}


def _updated(person: Person) -> PresenceUpdated:
    return PresenceUpdated(user_id=person.user_id, connections=person.connections, status=person.status)
