"""Streams and steps whose producer died: closes them after a deadline, so that nobody waits for ever."""

import heapq
import logging
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from router.audience import Audience
from router.envelope import Envelope
from router.errors import place
from router.event import Append, Event
from router.pacing import Subject, subject_of

__all__ = ["Closing", "Lapses"]


log = logging.getLogger("router")


class Closing(Struct, frozen=True):
    """The event that ends something of which nothing more was heard."""

    topic: str
    event: Event
    message_id: str
    """The same on every node that notices, so that the broker takes it once."""

    @property
    def audience(self) -> Audience:
        return Audience(self.topic)


class Lapses:
    """Watches what has begun and not ended. A type's policy says `lapse`: after how long, and what closes it.

    An event of such a type starts or prolongs the watch over its subject (the values of its `by` fields); one about
    the same subject whose type has no `lapse`, or that is the last piece of its stream, ends it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` tells this node's own seconds: a publisher's may be wrong by minutes."""
        self._clock = clock
        self._open: dict[tuple[str, Subject], tuple[float, Envelope]] = {}
        self._heap: list[tuple[float, int, str, Subject]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._open)

    def note(self, envelope: Envelope, age: float = 0.0) -> None:
        """Take notice of an event on its way out. One that is told again to somebody says nothing about now.

        `age`: seconds since the broker took it, for one that is found in history.
        """
        deliver, lapse = envelope.policy.deliver, envelope.policy.lapse
        if not deliver.by or not envelope.seq or envelope.replay:
            return
        key = (envelope.topic, subject_of(envelope.event, deliver.by))
        before = self._open.get(key)
        if before is not None and envelope.seq < before[1].seq:
            return  # a repeat of something older than what is known
        ended = isinstance(deliver, Append) and deliver.ends is not None and getattr(envelope.event, deliver.ends)
        if lapse is None or ended:
            self._open.pop(key, None)
            return
        heard_at = self._clock() - age
        self._open[key] = (heard_at, envelope)
        if before is None:
            self._push(key, heard_at + lapse.after)

    def restart(self, topic: str) -> None:
        """Numbers of `topic` begin anew: what is known is older than all that comes."""
        for key, (heard_at, envelope) in list(self._open.items()):
            if key[0] == topic:
                self._open[key] = (heard_at, replace(envelope, seq=0))

    def forget(self, topic: str) -> None:
        """Nobody listens to `topic` any more, so nothing more of it is heard here."""
        for key in [key for key in self._open if key[0] == topic]:
            del self._open[key]

    def due(self) -> list[Closing]:
        """What is to be closed now."""
        now = self._clock()
        closings = []
        while self._heap and self._heap[0][0] <= now:
            _, _, topic, subject = heapq.heappop(self._heap)
            heard_at, last = self._open.get((topic, subject), (0.0, None))
            if last is None or last.policy.lapse is None:
                continue
            deadline = heard_at + last.policy.lapse.after
            if deadline > now:
                self._push((topic, subject), deadline)
                continue
            del self._open[topic, subject]
            try:
                event = last.policy.lapse.close(last.event)
            except Exception as error:  # a plugin's fault must not keep others' streams open
                what = f"{type(error).__name__} at {place(error)}"
                log.error("`lapse.close` of %s failed: %s", last.type, what, extra={"event": "plugin_failed"})
                continue
            closings.append(Closing(topic, event, f"lapse:{last.type}:{last.seq}"))
        return closings

    def _push(self, key: tuple[str, Subject], when: float) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, *key))
