"""What a message says (Event) and the rules that its type lives by (Policy)."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ClassVar, TypeAlias

from msgspec import Struct

__all__ = ["Append", "Delivery", "Event", "Lapse", "Latest", "Merge", "Now", "Policy", "timestamp"]

MergeFunction: TypeAlias = Callable[[Any, Any], Any]
"""`(pending, new) -> one event of the same type that says what both said`. Pure and quick."""

RESERVED_FIELDS = frozenset({"seq", "pos", "topic", "redelivered", "torn"})
"""Names that the router adds to frames. An event that brings one of its own would be read as ours."""


def timestamp() -> str:
    """This moment as RFC 3339 in UTC with a `Z`, the way the specification writes timestamps."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Event(Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """The fields of one message type. The tag is the `type` on the wire.

    Subclasses repeat `frozen=True` (type checkers want it) and give a `tag`. Fields that keep their default are not
    sent, so an optional field costs nothing where it is not used.
    """

    message_id: str | None = None
    requires_ack: bool = False


class Now(Struct, frozen=True):
    """At once, in order, never merged. Unlimited: the specification's "system events".

    `by` names the fields of the thing the event is about: what is held for the same thing goes out before it.
    """

    by: tuple[str, ...] = ()
    every: ClassVar[None] = None


class Latest(Struct, frozen=True):
    """Within a window only the newest event per key (the values of the fields `by`) survives.

    `every` is the window in seconds; None means the room's own (ROUTER_BROADCAST_EVERY, one second).
    """

    by: tuple[str, ...] = ()
    every: float | None = None


class Merge(Struct, frozen=True):
    """Within a window events of a key become one by `function(pending, new)`."""

    function: MergeFunction
    by: tuple[str, ...] = ()
    every: float | None = None


class Append(Struct, frozen=True):
    """Pieces of one stream (key `by`) are joined: `field` of the new piece is added to that of the pending one.

    All other fields are the newest's. 40 ms is what readers see as a steady flow, at 25 frames a second
    (research: Ably's roll-up default).
    """

    by: tuple[str, ...]
    field: str
    every: float | None = 0.04
    ends: str | None = None
    """A field that is true on a stream's last piece: that one goes at once, with what is pending."""
    index: str | None = None
    """A field that counts a stream's pieces from 0: the piece with 0 is known to be its beginning."""


class Lapse(Struct, frozen=True):
    """What to do when an event opened something and nothing more is heard of it.

    `after` seconds without another event about the same subject, the event `close(last)` is published.
    """

    after: float
    close: Callable[[Any], "Event"]


Delivery: TypeAlias = Now | Latest | Merge | Append


class Policy(Struct, frozen=True, kw_only=True):
    """What holds for every event of a type."""

    send: str | None = None
    """The grant a client needs to send it. None: clients cannot; only backends publish it."""
    receive: str = "view"
    """The grant a client needs to receive it."""
    deliver: Delivery = Now()
    settles: tuple[type[Event], ...] = ()
    """Types whose pending events of the same key this one makes obsolete: completed settles progress."""
    keep: bool = True
    """Numbered and kept in history. False: seen only by those who are here now, without `seq`."""
    ack: bool = False
    """Every event of the type requires acknowledgement, as if it had `requires_ack`."""
    lapse: Lapse | None = None
    """The event opens, or is a part of, something that must be closed if its producer dies."""
    cost: float = 1.0
    """What one of a client's messages takes from its user's rate (10 a second)."""
    debounce: float = 0.0
    """Seconds: of what one client sends within them, only the newest goes on. The first goes at once. 0: off."""
    internal: bool = False
    """Only the router itself publishes it."""
    plain: bool = True
    """Whether clients that did not offer `router.v1` get it: they know what the specification names, no more."""
