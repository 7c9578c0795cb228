"""The inbox of one process: people's messages and the backends that take them, without a server between."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import time

from msgspec import Struct

from router.brokers.base import NEVER_DONE, Bounds, Dead, Inbox, Origin, Taken

__all__ = ["MemoryInbox"]

log = logging.getLogger("router")


class _Entry(Struct, frozen=True):
    origin: Origin
    payload: bytes
    group: str | None
    """The only one that gets it, or all of them."""


class _Pending(Struct):
    """An entry that was handed out and is not done."""

    consumer: str
    since: float
    tries: int


class _Group(Struct):
    """How far a group is: everything up to `number` was handed out, and is done unless it is `pending`."""

    number: int
    pending: dict[int, _Pending]


class _Kind:
    """One kind's messages and its groups. Numbers have no gaps: what is dropped is the oldest."""

    __slots__ = ("dead", "entries", "groups", "last", "touched")

    def __init__(self) -> None:
        self.entries: dict[int, _Entry] = {}
        self.groups: dict[str, _Group] = {}
        self.dead: dict[str, Dead] = {}
        self.last = 0
        self.touched = 0.0

    @property
    def first(self) -> int:
        """The oldest message there is, or the one to come."""
        return self.last + 1 - len(self.entries)

    def trim(self) -> None:
        """Drop what all groups have done."""
        low = min(min(group.pending, default=group.number + 1) for group in self.groups.values())
        for number in range(self.first, low):
            del self.entries[number]


class MemoryInbox(Inbox):
    """Keeps everything in this process, within `bounds`; `clock` tells seconds. What is in it ends with the process."""

    def __init__(self, bounds: Bounds = Bounds(), clock: Callable[[], float] = time) -> None:
        self._bounds = bounds
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}
        self._buried = 0
        self._arrived = asyncio.Event()

    async def put(self, kind: str, origin: Origin, payload: bytes) -> None:
        of = self._kind(kind)
        if of.groups and len(of.entries) >= self._bounds.backlog:
            of.trim()
            if len(of.entries) >= self._bounds.backlog:
                raise self._bounds.full(kind)
        self._add(of, _Entry(origin, payload, None))
        if not of.groups and len(of.entries) > self._bounds.unread:
            del of.entries[of.first]

    async def take(self, kinds: Sequence[str], group: str, consumer: str, count: int, wait: float) -> list[Taken]:
        arrived = self._arrived
        taken = self._new(kinds, group, consumer, count)
        if not taken and wait > 0:
            try:
                async with asyncio.timeout(wait):
                    await arrived.wait()
            except TimeoutError:
                return []
            taken = self._new(kinds, group, consumer, count)
        return taken

    def _new(self, kinds: Sequence[str], group: str, consumer: str, count: int) -> list[Taken]:
        taken: list[Taken] = []
        for kind in kinds:
            of = self._kind(kind)
            here = of.groups.setdefault(group, _Group(0, {}))
            room = count
            here.number = max(here.number, of.first - 1)
            while room and here.number < of.last:
                here.number += 1
                entry = of.entries[here.number]
                if entry.group in (None, group):
                    room -= 1
                    here.pending[here.number] = _Pending(consumer, self._clock(), 1)
                    taken.append(_taken(kind, here.number, entry, group, here.pending[here.number]))
        return taken

    async def done(self, *taken: Taken) -> None:
        for each in taken:
            of = self._kind(each.kind)
            if each.group in of.groups:
                of.groups[each.group].pending.pop(int(each.entry), None)
                of.trim()

    async def hold(self, *taken: Taken) -> list[Taken]:
        return self._left_alone(taken, 0.0)

    async def give_back(self, *taken: Taken, idle: float) -> None:
        self._left_alone(taken, idle)

    def _left_alone(self, taken: tuple[Taken, ...], idle: float) -> list[Taken]:
        lost = []
        for each in taken:
            pending = self._own(each)
            if pending is None:
                lost.append(each)
            else:
                pending.since = self._clock() - idle
        return lost

    async def reclaim(
        self, kinds: Sequence[str], group: str, consumer: str, *, idle: float, tries: int, count: int
    ) -> list[Taken]:
        taken: list[Taken] = []
        for kind in kinds:
            of = self._kind(kind)
            here = of.groups.get(group, _Group(0, {}))
            room = count
            for number, pending in sorted(here.pending.items()):
                if self._clock() - pending.since < idle:
                    continue
                entry = of.entries[number]
                if pending.tries >= tries:
                    self._bury(of, _taken(kind, number, entry, group, pending), NEVER_DONE)
                    log.error("a `%s` is a dead letter: %s", kind, NEVER_DONE, extra={"event": "dead_letter"})
                elif room:
                    room -= 1
                    pending.consumer, pending.since, pending.tries = consumer, self._clock(), pending.tries + 1
                    taken.append(_taken(kind, number, entry, group, pending))
        return taken

    async def bury(self, taken: Taken, reason: str) -> None:
        if self._own(taken) is not None:
            self._bury(self._kind(taken.kind), taken, reason)

    def _bury(self, of: _Kind, taken: Taken, reason: str) -> None:
        del of.groups[taken.group].pending[int(taken.entry)]
        self._buried += 1
        entry = str(self._buried)
        of.dead[entry] = Dead(taken.kind, entry, taken.origin, taken.payload, taken.group, taken.tries, reason)
        if len(of.dead) > self._bounds.backlog:
            del of.dead[next(iter(of.dead))]
        of.trim()

    async def dead(self, kind: str, count: int = 100) -> list[Dead]:
        return list(self._kind(kind).dead.values())[:count]

    async def revive(self, *dead: Dead) -> None:
        for letter in dead:
            of = self._kind(letter.kind)
            if of.dead.pop(letter.entry, None) is not None:
                self._add(of, _Entry(letter.origin, letter.payload, letter.group))

    def _add(self, of: _Kind, entry: _Entry) -> None:
        of.last += 1
        of.entries[of.last] = entry
        of.touched = self._clock()
        self._arrived.set()
        self._arrived = asyncio.Event()  # whoever waits from now on waits for the next one

    def _kind(self, kind: str) -> _Kind:
        of = self._kinds.setdefault(kind, _Kind())
        if not of.groups and of.touched < self._clock() - self._bounds.unread_for:
            of.entries.clear()
        return of

    def _own(self, taken: Taken) -> _Pending | None:
        """What is known of it, while it is still its consumer's own."""
        group = self._kind(taken.kind).groups.get(taken.group)
        pending = None if group is None else group.pending.get(int(taken.entry))
        return pending if pending is not None and pending.consumer == taken.consumer else None


def _taken(kind: str, number: int, entry: _Entry, group: str, pending: _Pending) -> Taken:
    return Taken(kind, str(number), entry.origin, entry.payload, group, pending.consumer, pending.tries)
