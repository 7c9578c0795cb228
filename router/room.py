"""What a room is: who is in it, grouped by what they are written, and the bytes that each group gets."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from router import wire
from router.envelope import Envelope
from router.errors import CloseCode
from router.session import Bookmark, Session

__all__ = ["Cohort", "Port", "Room", "Views", "Write", "admitted", "cut", "view"]

Write: TypeAlias = Callable[[bytes], None]

Views: TypeAlias = dict[tuple[bool, bool, int | None, tuple[int, ...]], list[bytes]]
"""Some envelopes as bytes, for each kind of client that is to be written them."""

MAX_BATCH, MAX_BATCH_BYTES = 64, 256 * 1024
"""Events and bytes in one frame: a flood becomes frames of bounded size."""


class Port(Protocol):
    """The way out to one client."""

    @property
    def framed(self) -> bool:
        """Whether `write` takes whole WebSocket frames; else it takes the text of one message."""
        ...

    @property
    def write(self) -> Write:
        """Takes bytes and returns at once. Harmless when the connection is gone."""
        ...

    def backlog(self) -> int:
        """Bytes written that have not left this process."""
        ...

    def heard(self) -> float | None:
        """When bytes last came from the client, by the event loop's clock; None when that cannot be known."""
        ...

    def close(self, code: CloseCode, reason: str) -> None:
        """Say goodbye: a close frame after what was written before."""
        ...

    def abort(self) -> None:
        """Cut the connection now, for a client that does not read any more."""
        ...


class Cohort(NamedTuple):
    """What decides on the bytes that a session gets. All sessions of a cohort get the same."""

    plain: bool
    framed: bool
    grants: frozenset[str]
    floor: int | None


class Room:
    """The sessions that listen to one topic, by cohort. `bookmark` is what all of them have."""

    __slots__ = ("cohorts", "known", "pos", "queue")

    def __init__(self) -> None:
        self.cohorts: dict[Cohort, dict[Session, Write]] = {}
        self.queue: list[Envelope] = []
        self.pos = 0
        self.known: set[int] = set()

    @property
    def bookmark(self) -> Bookmark:
        return Bookmark(self.pos, frozenset(self.known))

    def advance(self, envelopes: Iterable[Envelope], floor: int | None = None) -> None:
        """Note what is being written: the position moves by what frames say, later numbers are remembered.

        `floor`: the position that frames of this room may not pass.
        """
        for envelope in envelopes:
            if envelope.seq:
                self.known.add(envelope.seq)
                self.pos = max(self.pos, wire.position(envelope, floor))
        if self.known:
            self.known = {seq for seq in self.known if seq > self.pos}


def cut(queue: list[Envelope]) -> tuple[list[Envelope], list[Envelope]]:
    """What fits into one frame (at least one event), and the rest."""
    size = 0
    for count, envelope in enumerate(queue[:MAX_BATCH]):
        size += len(wire.body(envelope))
        if count and size > MAX_BATCH_BYTES:
            return queue[:count], queue[count:]
    return queue[:MAX_BATCH], queue[MAX_BATCH:]


def admitted(envelopes: Sequence[Envelope], cohort: Cohort) -> list[int]:
    """Which of the envelopes people of this cohort get."""
    return [
        i
        for i, envelope in enumerate(envelopes)
        if envelope.audience.admits(cohort.grants) and (envelope.policy.plain or not cohort.plain)
    ]


def view(
    views: Views,
    cohort: Cohort,
    envelopes: Sequence[Envelope],
    which: Sequence[int],
    floor: int | None = None,
) -> list[bytes]:
    """What a cohort is to be written, encoded once for all cohorts that see the same.

    `floor`: the position that frames may not pass, whatever the cohort; the same for all uses of `views`.
    """
    if not which:
        return []
    key = (cohort.plain, cohort.framed, cohort.floor, tuple(which))
    made = views.get(key)
    if made is None:
        chosen = [envelopes[i] for i in which]
        # A critical event holds the position back from the moment it is sent.
        floors = [e.first - 1 for e in chosen if e.requires_ack and e.first]
        floor = min((f for f in (*floors, cohort.floor, floor) if f is not None), default=None)
        if cohort.plain:
            texts = [wire.body(envelope) for envelope in chosen]
        elif len(chosen) == 1:
            texts = [wire.numbered(chosen[0], floor=floor)]
        else:
            texts = [wire.batch(chosen, floor)]
        made = views[key] = [b"".join(map(wire.text_frame, texts))] if cohort.framed else texts
    return made
