"""How often: token buckets and windows. Values in, values out; the time `now` (seconds) is an argument."""

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from router.audience import Audience
from router.envelope import Envelope
from router.event import Append, Delivery, Event, Latest, Merge, Now

__all__ = ["Fault", "Subject", "TokenBucket", "Window", "conflate", "subject_of"]

Fault: TypeAlias = Callable[[Envelope, str], None]
"""Told when a type's merge function does not do its job: the event and what happened."""


SLOW_MERGE = 0.05
"""Seconds. Merging holds up the whole node, and what it says is two small values made one."""


MAX_JOINED = 64 * 1024
"""Characters of a stream in one event. A longer text comes in several, each of bounded size."""


class TokenBucket:
    """Lets `burst` through at once and `rate` a second after that.

    Kept as one number, the time at which the bucket will be full again (the generic cell rate algorithm), so an
    unused bucket needs no refilling and a full one can be forgotten.
    """

    __slots__ = ("_full_at", "burst", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self._full_at = 0.0

    def take(self, now: float, cost: float = 1.0) -> float:
        """Take `cost`; returns 0.0 when there was enough, else the seconds until there will be (nothing taken)."""
        full_at = max(self._full_at, now) + cost / self.rate
        wait = full_at - now - self.burst / self.rate
        if wait > 1e-9:
            return wait
        self._full_at = full_at
        return 0.0

    def full(self, now: float) -> bool:
        """Whether it holds all it can, so that a new one would be the same."""
        return self._full_at <= now


Subject: TypeAlias = tuple[tuple[str, Any], ...]
"""What an event is about: the names and values of its policy's `by` fields."""


class _Held(Struct):
    """One event that waits for its window, with everything that was merged into it."""

    envelope: Envelope
    subject: Subject
    due: float
    every: float
    seqs: set[int]


def subject_of(event: Event, fields: Iterable[str]) -> Subject:
    """What `event` is about."""
    return tuple((name, _hashable(getattr(event, name, None))) for name in fields)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


class Window:
    """What one room holds back, so that throttled types reach it at most once per `every` seconds.

    The first event goes at once; what comes within the window is merged by key (type, subject, audience) and goes
    out together when it ends. Types with an `every` of their own have a window of their own.

    Invariants (docs/explanation/delivery.md): nothing overtakes itself; every released envelope carries the position
    `pos` below which nothing is held any more.
    """

    __slots__ = ("_every", "_fault", "_held", "_leading", "_open_at", "_opened_by", "_seen", "_shunned")

    def __init__(self, every: float, *, leading: bool = True, fault: Fault | None = None) -> None:
        self._every = every
        self._leading = leading
        self._fault = fault
        self._held: dict[tuple[type[Event], Subject, Audience], _Held] = {}
        self._open_at: dict[float, float] = {}  # window length -> when the next event may go at once
        self._opened_by = 0
        self._shunned: set[Any] = set()
        self._seen = 0

    def offer(
        self, envelope: Envelope, now: float, deliver: Delivery | None = None
    ) -> tuple[list[Envelope], list[Envelope]]:
        """Take `envelope` in. Returns what goes out now, in order, and what was merged into something else."""
        deliver = deliver or envelope.policy.deliver
        self._seen = max(self._seen, envelope.seq)
        subject = subject_of(envelope.event, deliver.by)
        # A critical event is acknowledged by itself, so it is never merged.
        if isinstance(deliver, Now) or envelope.requires_ack:
            out, merged = self._make_way(envelope, subject)
            return self._positioned([*out, envelope]), merged
        return self._throttle(envelope, deliver, subject, now)

    def flush(self, now: float) -> list[Envelope]:
        """What is due, oldest first. A window that let something out starts anew."""
        out = []
        for key, held in list(self._held.items()):
            if held.due <= now:
                del self._held[key]
                out.append(held.envelope)
                self._open_at[held.every] = now + held.every
        return self._positioned(out)

    def due(self) -> float | None:
        """When to flush next; None while nothing is held."""
        return min((held.due for held in self._held.values()), default=None)

    def idle(self, now: float) -> bool:
        """Whether a new window would behave the same."""
        return not self._held and all(open_at <= now for open_at in self._open_at.values())

    def held(self) -> frozenset[int]:
        """The numbers that are held, merged or not: whoever joins now gets them with the next flush."""
        return frozenset(seq for held in self._held.values() for seq in held.seqs if seq)

    def release(self, has: Callable[[int], bool], now: float) -> list[Envelope]:
        """What must go out before somebody joins who `has` some of the numbers that are held, oldest first.

        Merged with more, what they have would come to them a second time. Of `Latest` that is harmless: the newest
        value stands for itself.
        """
        out = []
        for key, held in list(self._held.items()):
            if not isinstance(held.envelope.policy.deliver, Latest) and any(seq and has(seq) for seq in held.seqs):
                del self._held[key]
                out.append(held.envelope)
                self._open_at[held.every] = now + held.every
        return self._positioned(out)

    def _make_way(self, envelope: Envelope, subject: Subject) -> tuple[list[Envelope], list[Envelope]]:
        """What must go before `envelope` because it is about the same thing, and what it makes obsolete."""
        out: list[Envelope] = []
        settled: list[Envelope] = []
        for key, held in list(self._held.items()):
            kind, about, audience = key
            if kind in envelope.policy.settles and about == subject_of(envelope.event, held.envelope.policy.deliver.by):
                # For another audience it may be all they ever hear of it, so only the same one may lose it.
                (settled if audience == envelope.audience else out).append(held.envelope)
                del self._held[key]
            elif about == subject and (subject or kind is type(envelope.event)):
                out.append(held.envelope)
                del self._held[key]
        return out, settled

    def _throttle(
        self, envelope: Envelope, deliver: Delivery, subject: Subject, now: float
    ) -> tuple[list[Envelope], list[Envelope]]:
        every = self._every if deliver.every is None else deliver.every
        key = (type(envelope.event), subject, envelope.audience)
        held = self._held.pop(key, None)
        ends = isinstance(deliver, Append) and deliver.ends is not None and bool(getattr(envelope.event, deliver.ends))
        if held is None:
            open_now = now >= self._open_at.get(every, 0.0) and not self._waiting(every)
            # The second part of a message that was split goes with the first.
            at_once = self._leading and (open_now or (envelope.seq != 0 and envelope.seq == self._opened_by))
            if at_once or ends:
                if at_once:
                    self._open_at[every] = now + every
                    self._opened_by = envelope.seq
                return self._positioned([envelope]), []
            due = max(self._open_at.get(every, now), now) if self._leading else float("inf")
            self._held[key] = _Held(envelope, subject, due, every, {envelope.seq})
            return [], []
        joined = self._join(held.envelope, envelope, deliver)
        if joined is None:
            self._held[key] = _Held(envelope, subject, held.due, every, {envelope.seq})
            return self._positioned([held.envelope]), []
        if ends:
            return self._positioned([joined]), [held.envelope]
        held.seqs.add(envelope.seq)
        # Put in anew, so that a flush sends in the order of the newest part.
        self._held[key] = _Held(joined, subject, held.due, every, held.seqs)
        return [], [held.envelope]

    def _waiting(self, every: float) -> bool:
        return any(held.every == every for held in self._held.values())

    def _join(self, pending: Envelope, new: Envelope, deliver: Delivery) -> Envelope | None:
        """One envelope that stands for both; None when the type's merge function failed."""
        first = pending.first or new.first
        if isinstance(deliver, Append):
            before, after = getattr(pending.event, deliver.field), getattr(new.event, deliver.field)
            if len(before) + len(after) > MAX_JOINED:
                return None
            text = before + after
            return replace(new.saying(replace(new.event, **{deliver.field: text})), first=first)
        if not isinstance(deliver, Merge):
            return replace(new, first=first)
        if deliver.function in self._shunned:
            return None
        began = perf_counter()
        try:
            event = deliver.function(pending.event, new.event)
        except Exception as error:
            self._blame(new, f"its merge function raised {type(error).__name__}")
            return None
        if type(event) is not type(new.event):
            self._blame(new, f"its merge function returned {type(event).__name__}, not {type(new.event).__name__}")
            return None
        took = perf_counter() - began
        if took > SLOW_MERGE:
            self._shunned.add(deliver.function)
            self._blame(new, f"its merge function took {took:.3f} s, and everybody waited")
            return None
        return replace(new.saying(event), first=first)

    def _blame(self, envelope: Envelope, what: str) -> None:
        if self._fault is not None:
            self._fault(envelope, what)

    def _positioned(self, out: list[Envelope]) -> list[Envelope]:
        """`out` with positions: each covers all that is neither held nor still to be sent after it."""
        # The lowest number of what was merged is its `first`.
        floor = min((held.envelope.first for held in self._held.values() if held.envelope.first), default=None)
        pos = self._seen if floor is None else floor - 1
        placed = []
        for envelope in reversed(out):
            placed.append(replace(envelope, pos=pos) if envelope.seq and envelope.seq != pos else envelope)
            if envelope.first:
                pos = min(pos, envelope.first - 1)
        placed.reverse()
        return placed


def conflate(
    envelopes: Iterable[Envelope],
    known: frozenset[int] = frozenset(),
    *,
    repeat_critical: bool = False,
    fault: Fault | None = None,
) -> list[Envelope]:
    """Merge a stretch of history the way a window would have, had it been open all that time.

    So a hundred progress events become one and the pieces of an answer become the text so far. `known` are numbers
    in the stretch that the receiver has; what it has of a key it has from the beginning, so everything of that key
    up to there is left out. `repeat_critical`: but not critical events, whose acknowledgements may have been lost.
    """
    envelopes = list(envelopes)
    covered: dict[tuple[type[Event], Subject, Audience], int] = {}
    for envelope in envelopes:
        if envelope.seq in known:
            covered[_key(envelope)] = envelope.seq
    window = Window(float("inf"), leading=False, fault=fault)
    out = []
    for envelope in envelopes:
        has_it = (
            bool(covered)
            and envelope.seq <= covered.get(_key(envelope), 0)
            and not (repeat_critical and envelope.requires_ack)
        )
        if has_it and not isinstance(envelope.policy.deliver, Now):
            continue
        released, _ = window.offer(envelope, 0.0)
        # One that it has still settles what came before it, but is not told again.
        out += released[:-1] if has_it else released
    return out + window.flush(float("inf"))


def _key(envelope: Envelope) -> tuple[type[Event], Subject, Audience]:
    return type(envelope.event), subject_of(envelope.event, envelope.policy.deliver.by), envelope.audience
