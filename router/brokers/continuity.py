"""Sees that nothing is missing: every number of a topic that is listened to arrives once and in order."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from random import uniform
from typing import TypeAlias

from router.brokers.base import Position
from router.brokers.script import AWAY, end
from router.errors import Unavailable

__all__ = ["Continuity", "Entry", "Remembered", "Topic"]

Entry: TypeAlias = tuple[int, bytes]
"""A number, and header and payload with a line end between them."""
Remembered: TypeAlias = tuple[Position, list[Entry]]
"""Where a topic stands, and what it remembers after some number."""


class Topic:
    """A topic that this node listens to: where it stands in it, and what came too early."""

    __slots__ = (
        "ahead",
        "asked",
        "begun",
        "catching_up",
        "count",
        "epoch",
        "failed",
        "filling",
        "idle_since",
        "last",
        "ready",
        "seq",
    )

    def __init__(self) -> None:
        self.count = 0
        """How many here want it. At 0 it is listened to a little longer, should somebody come back."""
        self.idle_since = 0.0
        self.epoch = ""
        self.seq = 0
        self.last = 0
        """Hash of what came last: after a failover another event may have its number. 0: not known."""
        self.ahead: list[tuple[str, int, bytes]] = []
        self.asked = 0
        """How often it was to be compared with what the server remembers."""
        self.filling = False
        """History is being read for it."""
        self.failed = False
        self.begun = False
        """Its position is known."""
        self.ready = asyncio.Event()
        """It has begun, or failed to."""
        self.catching_up = True
        """The position is being read; what arrives meanwhile waits in `ahead`."""


class Continuity:
    """The topics that are listened to, and the check that their numbers join up.

    A number that comes again is dropped. One that leaves a gap waits until what is missing was brought from history.
    What cannot be brought, or belongs to another epoch, is told to `lost`: nothing is passed over in silence.
    """

    def __init__(
        self,
        remembered: Callable[[str, int | None], Awaitable[Remembered]],
        renumber: Callable[[str, str], Awaitable[None]],
        deliver: Callable[[str, int, bytes], None],
        lost: Callable[[str, Position], None],
    ) -> None:
        """`remembered(topic, after)` reads history, `renumber(topic, epoch)` has the server end that epoch."""
        self._remembered = remembered
        self._renumber = renumber
        self._deliver = deliver
        self._lost = lost
        self.topics: dict[str, Topic] = {}
        self._filling: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Bring nothing more."""
        await end(*self._filling)

    async def begin(self, name: str, topic: Topic) -> None:
        """Learn where `topic` stands; what arrives from then on counts from there."""
        asked = topic.asked
        position, _ = await self._remembered(name, None)
        topic.epoch, topic.seq, topic.begun = position.epoch, position.seq, True
        if not self._caught_up(name, topic, 0, asked):
            self.fill(name)

    def take(self, name: str, epoch: str, seq: int, rest: bytes) -> None:
        """One message, as it arrived."""
        topic = self.topics.get(name)
        if topic is None:
            return
        if topic.catching_up:
            topic.ahead.append((epoch, seq, rest))
        elif not self._accept(name, topic, (epoch, seq, rest)):
            topic.ahead.append((epoch, seq, rest))
            self.fill(name)

    def _accept(self, name: str, topic: Topic, arrived: tuple[str, int, bytes]) -> bool:
        """Let one message through, or drop it because it was seen; False when something before it is missing."""
        epoch, seq, rest = arrived
        if seq:
            if epoch != topic.epoch or seq > topic.seq + 1:
                return False
            if seq <= topic.seq:
                return True
            topic.seq, topic.last = seq, hash(rest)
        if topic.count:  # only what somebody here wants is worth reading
            self._deliver(name, seq, rest)
        return True

    def fill(self, name: str) -> None:
        """Have a topic compared with what the server remembers, and what is missing brought."""
        topic = self.topics.get(name)
        if topic is None:
            return
        topic.asked += 1
        topic.catching_up = True
        if topic.begun and not topic.filling:
            topic.filling = True
            task = asyncio.get_running_loop().create_task(self._fill_until_done(name, topic))
            self._filling.add(task)
            task.add_done_callback(self._filling.discard)

    async def _fill_until_done(self, name: str, topic: Topic) -> None:
        pause = 0.05
        try:
            while self.topics.get(name) is topic:
                old, asked = len(topic.ahead), topic.asked
                try:
                    await self._bring(name, topic)
                except (Unavailable, *AWAY):
                    await asyncio.sleep(uniform(pause / 2, pause))
                    pause = min(2.0, pause * 2)
                else:
                    if self._caught_up(name, topic, old, asked):
                        return
        finally:
            topic.filling = False  # in the same turn, or who asks in the next one would be overheard

    async def _bring(self, name: str, topic: Topic) -> None:
        """Let through what the server remembers beyond what was seen; tell when that does not join up."""
        seen = topic.seq
        # One more than what is missing: the last one seen must still be what it was.
        position, entries = await self._remembered(name, max(0, seen - 1))
        if position.epoch == topic.epoch and _forgot(position, entries, topic):
            # A replica took over that had not got all of it. Its numbers mean other events now, to whoever saw ours.
            await self._renumber(name, topic.epoch)
            position, entries = await self._remembered(name, seen)
        entries = [entry for entry in entries if entry[0] > seen]
        if position.epoch != topic.epoch or len(entries) != position.seq - seen:
            topic.epoch, topic.seq, topic.last = position.epoch, position.seq, 0
            self._lost(name, position)
            return
        for seq, rest in entries:
            self._accept(name, topic, (topic.epoch, seq, rest))

    def _caught_up(self, name: str, topic: Topic, old: int, asked: int) -> bool:
        """Let through what arrived meanwhile; False when there is a gap again, or history was `asked` for once more.

        The first `old` of it came before history was read, so history has it. If not, it belongs to an epoch that is
        over, or to a write that a failover lost.
        """
        if topic.asked != asked:
            return False
        waiting, topic.ahead = topic.ahead, []
        for index, arrived in enumerate(waiting):
            if index < old and arrived[1]:
                continue
            if not self._accept(name, topic, arrived):
                topic.ahead = waiting[index:]
                return False
        topic.catching_up = False
        return True

    async def check(self, places: Callable[[list[str]], Awaitable[list[Position | None]]]) -> None:
        """Compare all topics' numbers with the server's. `places` asks for many at once."""
        names = [name for name, topic in self.topics.items() if not topic.catching_up]
        with contextlib.suppress(Unavailable, *AWAY):
            for name, place in zip(names, await places(names), strict=True):
                topic = self.topics.get(name)
                # A number that is ahead of ours may be on its way; to look costs no more than one read.
                if topic is not None and place != Position(topic.epoch, topic.seq):
                    self.fill(name)

    def idle(self, longer_than: float) -> list[str]:
        """Topics that nobody here has wanted for so many seconds."""
        before = time.monotonic() - longer_than
        return [name for name, topic in self.topics.items() if not topic.count and topic.idle_since <= before]


def _forgot(position: Position, entries: list[Entry], topic: Topic) -> bool:
    """Whether the server lost events that were seen here: it counts less, or has another under the last number."""
    if position.seq < topic.seq:
        return True
    found = next((rest for seq, rest in entries if seq == topic.seq), None)
    return found is not None and topic.last != 0 and hash(found) != topic.last
