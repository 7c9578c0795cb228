"""Who has a project open, over all nodes, under the same leases as the seats."""

import asyncio
import time
from typing import Any

from router.brokers.base import Arrived, Person
from router.brokers.lease import LEAVING, NODES, Lease, key
from router.brokers.script import AWAY, Scripts, away
from router.errors import Unavailable

__all__ = ["Roster"]

PATIENCE, PAUSE = 1.0, 0.05
"""Seconds in which a read is tried again, and between two tries."""
MOST = 100
"""People handed out at once."""
REMEMBER = 600_000
"""Milliseconds that is kept what was handed out: until the node that missed the answer asks again."""


class Roster:
    """People by project. One who has gone everywhere stays, with no connections, for the grace.

    Joined is who was nowhere before, and departed whose grace is over; departed people are handed out to one node.
    A node that died leaves its people behind until its lease is cleared away; then their grace begins. Where an
    answer was lost somebody may be told as joined twice, but never not at all.
    """

    def __init__(self, redis: Any, scripts: Scripts, lease: Lease, node: str) -> None:
        self._redis = redis
        self._scripts = scripts
        self._lease = lease
        self._told = key(f"told:{node}")
        self._asked = 0

    async def enter(self, project: str, user: str) -> Arrived:
        """See `Broker.enter`."""
        answer = await self._lease.take("enter", (_entry(project, user),), _keys(project), (project, user))
        _, joined, connections, status = answer
        if joined:
            self._lease.returned.discard(_entry(project, user))
        return Arrived(Person(user, connections, status.decode()), joined=bool(joined))

    async def leave(self, project: str, user: str) -> Person | None:
        """See `Broker.leave`."""
        arguments = (project, user, self._lease.grace_ms)
        answer = await self._lease.give("leave", (_entry(project, user),), _keys(project), arguments)
        return None if answer is None else Person(user, answer[1], answer[2].decode())

    async def people(self, project: str) -> list[Person]:
        """See `Broker.people`."""
        here, statuses, _ = _keys(project)
        alive = set(await self._scripts.call("alive", (NODES,), ()))
        found, said = await self._read(here), await self._read(statuses)
        connections: dict[bytes, int] = {}
        for field, count in found.items():
            lease, _, user = field.partition(b" ")
            connections[user] = connections.get(user, 0) + (int(count) if lease in alive else 0)
        people = [Person(user.decode(), count, said.get(user, b"").decode()) for user, count in connections.items()]
        return sorted(people, key=lambda person: person.user_id)

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
        here, statuses, _ = _keys(project)
        connections = await self._scripts.call("status", (NODES, here, statuses), (user, status))
        return Person(user, connections, status)

    async def departed(self) -> list[tuple[str, str]]:
        """See `Broker.departed`."""
        answer = await self._scripts.call("departed", (NODES, LEAVING, self._told), (self._asked, MOST, REMEMBER))
        self._asked += 1
        return [_named(one.decode()) for one in answer]

    async def returned(self) -> list[tuple[str, str]]:
        """See `Broker.returned`."""
        entries, self._lease.returned = self._lease.returned, set()
        projects: dict[str, set[str]] = {}
        for entry in entries:
            kind, _, name = entry.partition(":")
            if kind == "here":
                project, user = _named(name)
                projects.setdefault(project, set()).add(user)
        try:
            here = {project: {person.user_id for person in await self.people(project)} for project in projects}
        except Unavailable:
            self._lease.returned |= entries
            raise
        return [(project, user) for project, users in projects.items() for user in sorted(users & here[project])]


def _entry(project: str, user: str) -> str:
    return f"here:{project} {user}"


def _named(text: str) -> tuple[str, str]:
    """Project and user; a project's id has no spaces."""
    project, _, user = text.partition(" ")
    return project, user


def _keys(project: str) -> tuple[str, str, str]:
    return key(f"here:{project}"), key(f"status:{project}"), LEAVING
