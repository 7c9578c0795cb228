"""Who has a project open, over all nodes, under the same leases as the seats."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from router.brokers.base import Arrived, Notice, Person
from router.brokers.lease import ANEW, DOUBTED, LEAVING, NODES, SETTLE, Lease, key
from router.brokers.script import AWAY, Scripts, away

__all__ = ["Roster"]

PATIENCE, PAUSE = 1.0, 0.05
"""Seconds in which a read is tried again, and between two tries."""
MOST = 100
"""People handed out, or noted, at once."""
TELLING = 3000
"""Milliseconds that a node has for telling of those whom it was handed out."""


class Roster:
    """People by project. One who has gone everywhere stays, with no connections, for the grace.

    Joined is who was nowhere before, and departed whose grace is over. Viewers believe what they were told last, so
    whatever may make that wrong is written down in the script in which it happens: a lease that others held people
    under as well is cleared away, a departure is being told, two nodes speak of the same person. Those are handed out
    (`untold`) until a node has told how it is. What stays a node's own to tell is of people whom it holds itself:
    should it die, its lease is cleared away.
    """

    def __init__(self, redis: Any, scripts: Scripts, lease: Lease, node: str) -> None:
        self._redis = redis
        self._scripts = scripts
        self._lease = lease
        self._node = node
        self._left: deque[str] = deque(maxlen=MOST)
        """The last who left from here. Should the server forget everything, nobody else knows that they are to be told
        as gone, should their last update have come after viewers asked who is here."""

    async def enter(self, project: str, user: str) -> Arrived:
        """See `Broker.enter`."""
        answer = await self._lease.take("enter", (_entry(project, user),), _keys(project), (project, user, SETTLE))
        _, joined, connections, status = answer
        if joined:
            self._lease.returned.discard(_entry(project, user))
        return Arrived(Person(user, connections, status.decode()), joined=bool(joined))

    async def leave(self, project: str, user: str) -> Person | None:
        """See `Broker.leave`."""
        arguments = (project, user, SETTLE, self._lease.grace_ms)
        answer = await self._lease.give("leave", (_entry(project, user),), _keys(project), arguments)
        if answer is None:
            return None
        if not answer[1]:
            self._left.append(f"{project} {user}")
        return Person(user, answer[1], answer[2].decode())

    async def people(self, project: str) -> list[Person]:
        """See `Broker.people`."""
        here, statuses, *_ = _keys(project)
        until, alive = time.monotonic() + PATIENCE, await self._alive()
        while True:
            found, said = await self._read(here), await self._read(statuses)
            before, alive = alive, await self._alive()
            # A lease that was replaced in between would count neither before nor after.
            if alive == before or time.monotonic() >= until:
                break
        connections: dict[bytes, int] = {}
        for field, count in found.items():
            lease, _, user = field.partition(b" ")
            connections[user] = connections.get(user, 0) + (int(count) if lease in alive else 0)
        people = [Person(user.decode(), count, said.get(user, b"").decode()) for user, count in connections.items()]
        return sorted(people, key=lambda person: person.user_id)

    async def _alive(self) -> set[bytes]:
        return set(await self._scripts.call("alive", (NODES,), ()))

    async def _read(self, name: str) -> dict[bytes, bytes]:
        """A whole hash. Not by a script: one of ten thousand entries takes that four times as long."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                found: dict[bytes, bytes] = await self._redis.hgetall(name)
                return found
            except AWAY as error:  # also of a connection that died while nobody used it
                if time.monotonic() >= until:
                    raise away(error) from None
                await asyncio.sleep(PAUSE)

    async def set_status(self, project: str, user: str, status: str) -> Person:
        """See `Broker.set_status`."""
        here, statuses, *_ = _keys(project)
        arguments = (project, user, status, self._node, SETTLE)
        connections, kept = await self._scripts.call("status", (NODES, here, statuses, DOUBTED), arguments)
        return Person(user, connections, kept.decode())

    async def untold(self) -> list[Notice]:
        """See `Broker.untold`."""
        await self._doubt_own()
        answer = await self._scripts.call("untold", (NODES, LEAVING, DOUBTED, ANEW), (MOST, TELLING))
        notices = []
        for who, mark, anew, here, connections, status in answer:
            project, user = _named(who.decode())
            person = Person(user, connections, status.decode())
            notices.append(Notice(project, person, here=bool(here), anew=bool(anew), mark=mark.decode()))
        return notices

    async def told(self, notices: Sequence[Notice]) -> None:
        """See `Broker.told`."""
        flat = [(_who(notice), notice.mark, int(not notice.here)) for notice in notices]
        for chunk in _chunks(flat):
            await self._scripts.call("told", (DOUBTED, ANEW), (self._node, SETTLE, *chunk))

    async def doubt(self, notices: Sequence[Notice]) -> None:
        """See `Broker.doubt`."""
        await self._doubt([(_who(notice), int(notice.anew), 1) for notice in notices])

    async def _doubt_own(self) -> None:
        """Note those whom this node holds, but others may have told otherwise while its lease was in doubt."""
        returned, self._lease.returned = self._lease.returned, set()
        changed, self._lease.changed = self._lease.changed, set()
        entries = [(entry, anew) for anew, entries in ((0, changed), (1, returned)) for entry in sorted(entries)]
        people = [(entry.partition(":")[2], anew, 0) for entry, anew in entries if entry.startswith("here:")]
        forgotten, self._lease.forgotten = self._lease.forgotten, False
        if forgotten:
            people += [(who, 0, 1) for who in self._left]
        try:
            await self._doubt(people)
        except BaseException:
            self._lease.forgotten |= forgotten
            self._lease.returned |= returned
            self._lease.changed |= changed
            raise

    async def _doubt(self, people: Sequence[tuple[str, int, int]]) -> None:
        for chunk in _chunks(people):
            await self._scripts.call("doubt", (NODES, DOUBTED, ANEW), (SETTLE, *chunk))


def _entry(project: str, user: str) -> str:
    return f"here:{project} {user}"


def _who(notice: Notice) -> str:
    return f"{notice.project} {notice.person.user_id}"


def _named(text: str) -> tuple[str, str]:
    """Project and user; a project's id has no spaces."""
    project, _, user = text.partition(" ")
    return project, user


def _chunks(rows: Sequence[tuple[Any, ...]]) -> Iterable[list[Any]]:
    for start in range(0, len(rows), MOST):
        yield [part for row in rows[start : start + MOST] for part in row]


def _keys(project: str) -> tuple[str, ...]:
    return key(f"here:{project}"), key(f"status:{project}"), LEAVING, DOUBTED, ANEW
