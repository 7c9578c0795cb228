"""What somebody missed of a topic: read from history, merged, through the pipeline; once for all who missed the same."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from router import wire
from router.brokers.base import Broker
from router.envelope import Envelope
from router.pacing import Fault, conflate
from router.pipeline import Forward
from router.room import Views
from router.session import Bookmark
from router.standing import UNREAD_REACH, Holding, Standings
from router.text import Text, without_torn

__all__ = ["PART_BYTES", "Part", "Stretch", "Stretches"]

PART_BYTES = 256 * 1024
"""What is written to a client that catches up before looking whether it reads."""
KEPT_STRETCHES, KEPT_BYTES = 256, 16 * 1024 * 1024
"""Stretches kept for others who missed the same: the clients of many rooms come back together after a restart."""

Replay: TypeAlias = Callable[[Envelope, Forward], Awaitable[None]]
"""Runs an envelope through the outbound leg, to where it is told."""


class Part(Struct, frozen=True):
    """Some events that are written at once, and what that looks like for each kind of client."""

    envelopes: list[Envelope]
    views: Views


class Stretch(Struct, frozen=True):
    """What one was not there for. `arrived` is what somebody has who was told all of it."""

    top: int
    """The last number that there was."""
    complete: bool
    after: int
    """The number after which it begins."""
    arrived: Bookmark
    parts: list[Part]
    given: frozenset[Text]
    """Texts that go on, and whose beginning is in it, where it does not reach back to the first event."""

    @property
    def size(self) -> int:
        return sum(len(wire.body(envelope)) for part in self.parts for envelope in part.envelopes)


class Stretches:
    """Makes stretches, and keeps the last of them, bounded in number and bytes.

    What is kept is found by all that it depends on: a key that left something out gave somebody another's history.
    """

    def __init__(self, broker: Broker, holding: Holding, standings: Standings, replay: Replay, fault: Fault) -> None:
        self._broker = broker
        self._holding = holding
        self._standings = standings
        self._replay = replay
        self._fault = fault
        self._kept: OrderedDict[tuple[object, ...], Stretch] = OrderedDict()
        self._sizes: dict[tuple[object, ...], int] = {}
        self._size = 0

    async def missed(self, topic: str, bookmark: Bookmark, *, whole: bool = False) -> Stretch | None:
        """What somebody with `bookmark` missed, or, of the `whole`, all that there is. In the topic's turn.

        None when history is of another epoch than what has arrived here: news of that is on its way. Raises
        `Unavailable`.
        """
        standing = self._standings.get(topic)
        if standing is None:
            return None
        if whole:
            bookmark = Bookmark(0)
        held, unread = self._holding.held(topic), frozenset(standing.unread)
        key = (topic, standing.epoch, standing.version, standing.seen, bookmark, whole, held, unread)
        found = self._kept.get(key)
        if found is None:
            found = await self._make(topic, bookmark, held, whole=whole)
            if found is not None:
                self._keep(key, found)
        else:
            self._kept.move_to_end(key)
        return found

    def forget(self, topic: str) -> None:
        """Nobody listens to `topic` any more."""
        for key in [key for key in self._kept if key[0] == topic]:
            self._drop(key)

    async def _make(self, topic: str, bookmark: Bookmark, held: frozenset[int], *, whole: bool) -> Stretch | None:
        history = await self._broker.history(topic, bookmark.pos)
        standing = self._standings.get(topic)
        if standing is None or history.top.epoch != standing.epoch:
            return None
        seen = standing.seen
        unread = {seq for seq in history.unread if seq <= seen and not bookmark.has(seq)}
        near = {seq for seq in unread if seen - seq <= UNREAD_REACH}
        if near:
            self._standings.pass_over(topic, near)
        missed = [e for e in history.envelopes if e.seq <= seen and e.seq not in held]
        # A position cannot wait behind what is further back: then it is as if history did not have it.
        complete = history.complete and near == unread and (history.whole or not whole)
        complete &= all(number <= bookmark.pos for number in history.breaks)
        after, given = bookmark.pos, frozenset[Text]()
        if whole and not complete:
            oldest = min((*(e.seq for e in history.envelopes), *history.unread), default=seen + 1)
            after = min(oldest - 1, seen)
            missed, given = without_torn(missed, history.joints)
        parts: list[Part] = []
        if complete or whole:
            merged = conflate(missed, bookmark.known, repeat_critical=bookmark.claimed, fault=self._fault)
            parts = _parts(await self._through(merged))
        return Stretch(history.top.seq, complete, after, self._standings.delivered(topic), parts, given)

    async def _through(self, merged: Sequence[Envelope]) -> list[Envelope]:
        """Send `merged` through the outbound leg; what comes out at its end."""
        through: list[Envelope] = []

        async def keep(envelope: Envelope) -> None:
            through.append(envelope)

        for envelope in merged:
            with suppress(Exception):  # reported by the pipeline; one event is not to keep somebody from all others
                await self._replay(replace(envelope, replay=True), keep)
        return list(through)  # what a middleware forwards later comes too late

    def _keep(self, key: tuple[object, ...], stretch: Stretch) -> None:
        self._kept[key] = stretch
        self._sizes[key] = stretch.size
        self._size += self._sizes[key]
        while len(self._kept) > KEPT_STRETCHES or self._size > KEPT_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[object, ...]) -> None:
        del self._kept[key]
        self._size -= self._sizes.pop(key)


def _parts(envelopes: Sequence[Envelope]) -> list[Part]:
    """`envelopes` in parts of bounded size."""
    parts: list[Part] = []
    size = 0
    for envelope in envelopes:
        size += len(wire.body(envelope))
        if not parts or size > PART_BYTES:
            parts.append(Part([], {}))
            size = len(wire.body(envelope))
        parts[-1].envelopes.append(envelope)
    return parts
