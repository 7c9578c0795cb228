"""Sees that nothing is missing: every number of a topic that is listened to arrives once and in order."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from random import uniform
from typing import TypeAlias

from msgspec import Struct

from router.brokers.base import Position
from router.brokers.script import AWAY, end
from router.errors import Unavailable

__all__ = ["Continuity", "Ended", "Entry", "Place", "Remembered", "Topic"]

PATIENCE = 5.0
"""Seconds that whoever waits for what is missing waits at most."""

WAITS = 3
"""How often a look at history that finds too few loose events is taken again."""

Entry: TypeAlias = tuple[int, bytes, float]
"""A number, header and payload with a line end between them, and its age in seconds by the server's clock."""


class Place(Struct, frozen=True):
    """Where a topic stands: its last number, and how many events without a number of their own were published."""

    epoch: str
    seq: int
    loose: int = 0


class Ended(Struct, frozen=True):
    """Up to where an epoch that is over holds. What was told beyond it, its server has lost."""

    seq: int
    loose: int
    doubtful: bool = False
    """Whether its server may have lost some that nobody here has heard of either."""


class Remembered(Struct, frozen=True):
    """Where a topic stands, and what the server remembers after some number, all of one moment."""

    place: Place
    entries: list[Entry] = []
    loose: list[Entry] = []
    """The last events without a number of their own, by their count."""
    past: Mapping[str, Ended] = {}
    """The epochs that went before, of which the present one is the continuation."""

    @property
    def position(self) -> Position:
        return Position(self.place.epoch, self.place.seq)

    def lacks(self, epoch: str, seq: int) -> bool:
        """Whether `epoch`, one of the `past`, went as far as `seq`, which this server does not have."""
        ended = self.ended(epoch)
        return ended is not None and ended.seq < seq

    def ended(self, epoch: str) -> Ended | None:
        """How far `epoch`, one of the `past`, holds today: as far as each of those that went on from it did."""
        names = list(self.past)  # the oldest first
        if epoch not in names:
            return None
        since = [self.past[name] for name in names[names.index(epoch) :]]
        return Ended(
            min(each.seq for each in since),
            min(each.loose for each in since),
            any(each.doubtful for each in since),
        )


class Topic:
    """A topic that this node listens to: where it stands in it, and what came too early."""

    __slots__ = (
        "ahead",
        "asked",
        "begun",
        "catching_up",
        "count",
        "doubtful",
        "epoch",
        "failed",
        "filling",
        "idle_since",
        "last",
        "loose",
        "ready",
        "seq",
        "waited",
        "waiting",
    )

    def __init__(self) -> None:
        self.count = 0
        """How many here want it. At 0 it is listened to a little longer, should somebody come back."""
        self.idle_since = 0.0
        self.epoch = ""
        self.seq = 0
        self.loose = 0
        """How many events without a number of their own came, or were published before."""
        self.last = 0
        """Hash of what came last: another event under its number tells that numbers were given twice. 0: not known."""
        self.ahead: list[Arrived] = []
        self.asked = 0
        """How often it was to be compared with what the server remembers."""
        self.filling = False
        """History is being read for it."""
        self.doubtful = False
        """Nothing was heard for so long that events may have come and gone with a server that is no more."""
        self.failed = False
        self.begun = False
        """Its position is known."""
        self.ready = asyncio.Event()
        """It has begun, or failed to."""
        self.catching_up = True
        """The position is being read; what arrives meanwhile waits in `ahead`."""
        self.waited = 0
        """How often it was waited for loose events that are perhaps only late."""
        self.waiting: list[asyncio.Future[None]] = []
        """Those who wait until nothing is missing."""


class Arrived(Struct, frozen=True):
    """One message of the topic's channel. `seq` 0: without a number of its own; `loose` counts those."""

    epoch: str
    seq: int
    loose: int
    rest: bytes


class Continuity:
    """The topics that are listened to, and the check that their numbers join up.

    A number that comes again is dropped. One that leaves a gap waits until what is missing was brought from history.
    Events without a number of their own are counted, and checked in the same way. An epoch may go on under another
    name (`moved`). What cannot be brought, or belongs to another epoch, is told to `lost`: nothing is passed over in
    silence.
    """

    def __init__(
        self,
        remembered: Callable[[str, int | None], Awaitable[Remembered]],
        renumber: Callable[[str, str], Awaitable[None]],
        deliver: Callable[[str, int, bytes], None],
        lost: Callable[[str, Position], None],
        moved: Callable[[str, Position], None] = lambda _topic, _position: None,
        lacking: Callable[[str, str, str, int], Awaitable[None]] | None = None,
    ) -> None:
        """`remembered(topic, after)` reads history, `renumber(topic, epoch)` has the server end that epoch.

        `lacking(topic, epoch, before, seen)` has the server, and the other nodes, know that `epoch` lacks something of
        the one before it.
        """
        self._remembered = remembered
        self._renumber = renumber
        self._deliver = deliver
        self._lost = lost
        self._moved = moved
        self._lacking = lacking
        self.topics: dict[str, Topic] = {}
        self._filling: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Bring nothing more."""
        await end(*self._filling)

    async def begin(self, name: str, topic: Topic) -> None:
        """Learn where `topic` stands; what arrives from then on counts from there."""
        asked = topic.asked
        place = (await self._remembered(name, None)).place
        topic.epoch, topic.seq, topic.loose, topic.begun = place.epoch, place.seq, place.loose, True
        if not self._caught_up(name, topic, 0, asked):
            self.fill(name)

    def take(self, name: str, epoch: str, seq: int, rest: bytes) -> None:
        """One message, as it arrived. The epoch of one without a number is followed by `/` and its count."""
        topic = self.topics.get(name)
        if topic is None:
            return
        epoch, _, loose = epoch.partition("/")
        arrived = Arrived(epoch, seq, int(loose or 0), rest)
        if topic.catching_up:
            topic.ahead.append(arrived)
        elif not self._accept(name, topic, arrived):
            topic.ahead.append(arrived)
            self.fill(name)

    def _accept(self, name: str, topic: Topic, arrived: Arrived) -> bool:
        """Let one message through, or drop it because it was seen; False when something before it is missing."""
        if arrived.seq:
            if arrived.epoch != topic.epoch or arrived.seq > topic.seq + 1:
                return False
            if arrived.seq <= topic.seq:
                return True
            topic.seq, topic.last = arrived.seq, hash(arrived.rest)
        elif arrived.loose:  # 0: of a publisher that does not count them
            if arrived.epoch != topic.epoch or arrived.loose > topic.loose + 1:
                return False
            if arrived.loose <= topic.loose:
                return True
            topic.loose = arrived.loose
        if topic.count:  # only what somebody here wants is worth reading
            self._deliver(name, arrived.seq, arrived.rest)
        return True

    def fill(self, name: str, *, doubtful: bool = False) -> None:
        """Have a topic compared with what the server remembers, and what is missing brought.

        `doubtful`: the server may have given out, and lost since, what was never heard here.
        """
        topic = self.topics.get(name)
        if topic is None:
            return
        topic.doubtful |= doubtful
        topic.asked += 1
        topic.catching_up = True
        if topic.begun and not topic.filling:
            topic.filling = True
            task = asyncio.get_running_loop().create_task(self._fill_until_done(name, topic))
            self._filling.add(task)
            task.add_done_callback(self._filling.discard)

    async def filled(self, name: str) -> None:
        """Return when all that was published before this call has been let through. Raises `Unavailable`."""
        topic = self.topics.get(name)
        if topic is None:
            return
        self.fill(name)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        topic.waiting.append(done)
        try:
            async with asyncio.timeout(PATIENCE):
                await done
        except TimeoutError:
            raise Unavailable("the broker cannot be reached", retry_after=1.0) from None

    async def _fill_until_done(self, name: str, topic: Topic) -> None:
        pause = 0.05
        try:
            while self.topics.get(name) is topic:
                old, asked = len(topic.ahead), topic.asked
                try:
                    found = await self._bring(name, topic)
                except (Unavailable, *AWAY):
                    await asyncio.sleep(uniform(pause / 2, pause))
                    pause = min(2.0, pause * 2)
                else:
                    if self._caught_up(name, topic, old, asked, found):
                        return
        finally:
            topic.filling = False  # in the same turn, or who asks in the next one would be overheard

    async def _bring(self, name: str, topic: Topic) -> Remembered:
        """Let through what the server remembers beyond what was seen, and return it; tell when it does not join up."""
        seen = topic.seq
        # One more than what is missing: the last one seen must still be what it was.
        found = await self._remembered(name, max(0, seen - 1))
        if found.place.epoch == topic.epoch and _forgot(found, topic):
            # The same numbers mean other events now, to whoever saw ours.
            await self._renumber(name, topic.epoch)
            found = await self._remembered(name, seen)
        # Where the epoch that we know ended, if it did and the present one continues it.
        ended = Ended(seen, topic.loose) if found.place.epoch == topic.epoch else found.ended(topic.epoch)
        entries = [entry for entry in found.entries if entry[0] > seen]
        if topic.epoch != found.place.epoch and (topic.doubtful or (ended is not None and ended.doubtful)):
            ended = None
        topic.doubtful = False
        if ended is None or ended.seq < seen or len(entries) != found.place.seq - seen:
            if self._lacking is not None and found.lacks(topic.epoch, seen):
                await self._lacking(name, found.place.epoch, topic.epoch, seen)
                found = await self._remembered(name, seen)
            self._begin_anew(name, topic, found)
            return found
        # Of those without a number our server may have lost some that came: what it counts on from is what it has.
        counted = min(topic.loose, ended.loose)
        loose = [entry for entry in found.loose if entry[0] > counted]
        if len(loose) != found.place.loose - counted:
            if topic.epoch == found.place.epoch and topic.waited < WAITS:
                topic.waited += 1  # they may be in the socket, not yet read
                raise Unavailable("events without a number are missing", retry_after=0.1)
            self._begin_anew(name, topic, found)
            return found
        topic.waited = 0
        topic.loose = counted
        if topic.epoch != found.place.epoch:
            topic.epoch = found.place.epoch
            self._moved(name, found.position)
        for seq, rest, _ in entries:
            self._accept(name, topic, Arrived(topic.epoch, seq, 0, rest))
        for count, rest, _ in loose:
            self._accept(name, topic, Arrived(topic.epoch, 0, count, rest))
        return found

    def _begin_anew(self, name: str, topic: Topic, found: Remembered) -> None:
        """What was seen does not join up with what there is."""
        place = found.place
        topic.epoch, topic.seq, topic.loose, topic.last = place.epoch, place.seq, place.loose, 0
        self._lost(name, found.position)

    def _caught_up(self, name: str, topic: Topic, old: int, asked: int, found: Remembered | None = None) -> bool:
        """Let through what arrived meanwhile; False when there is a gap again, or history was `asked` for once more.

        The first `old` of it came before history was read (`found`), so history has it. If not, it belongs to an epoch
        that is over, or to a write that a failover lost.
        """
        if topic.asked != asked:
            return False
        waiting, topic.ahead = topic.ahead, []
        for index, arrived in enumerate(waiting):
            if index < old and (arrived.seq or arrived.loose):
                if found is not None and arrived.loose and not _has(found, arrived) and topic.count:
                    self._deliver(name, 0, arrived.rest)  # nothing but this message tells of it
                continue
            if not self._accept(name, topic, arrived):
                topic.ahead = waiting[index:]
                return False
        topic.catching_up = False
        for done in topic.waiting:
            if not done.done():
                done.set_result(None)
        topic.waiting.clear()
        return True

    async def check(self, places: Callable[[list[str]], Awaitable[list[Place | None]]]) -> None:
        """Compare all topics' numbers with the server's. `places` asks for many at once."""
        names = [name for name, topic in self.topics.items() if not topic.catching_up]
        with contextlib.suppress(Unavailable, *AWAY):
            for name, place in zip(names, await places(names), strict=True):
                topic = self.topics.get(name)
                # A number that is ahead of ours may be on its way; to look costs no more than one read.
                if topic is not None and place != Place(topic.epoch, topic.seq, topic.loose):
                    self.fill(name)

    def idle(self, longer_than: float) -> list[str]:
        """Topics that nobody here has wanted for so many seconds."""
        before = time.monotonic() - longer_than
        return [name for name, topic in self.topics.items() if not topic.count and topic.idle_since <= before]


def _has(found: Remembered, arrived: Arrived) -> bool:
    """Whether the server has counted this event without a number: then it was among what it remembers, or came."""
    if arrived.epoch == found.place.epoch:
        return True
    ended = found.ended(arrived.epoch)
    return ended is not None and arrived.loose <= ended.loose


def _forgot(found: Remembered, topic: Topic) -> bool:
    """Whether the server lost events that were seen here: it counts less, or has another under the last number."""
    if found.place.seq < topic.seq:
        return True
    rest = next((rest for seq, rest, _ in found.entries if seq == topic.seq), None)
    return rest is not None and topic.last != 0 and hash(rest) != topic.last
