"""Texts that come in pieces (`Append`), and who was not given their beginning."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TypeAlias

from msgspec.structs import replace

from router import wire
from router.envelope import Envelope
from router.event import Append, Event
from router.pacing import Subject, subject_of

__all__ = ["Text", "Texts", "marked", "text_of", "without_torn"]

Text: TypeAlias = tuple[type[Event], Subject]
"""What names a text: the type of its pieces and the values of their `by` fields."""

OPEN = 1_000
"""Texts of one topic that go on at once, as far as it is known: the newest of them."""


class Texts:
    """The texts of one topic that go on, each with the sessions that were not given its beginning.

    By itself a piece of such a text says nothing to them; it is for whoever has loaded the text so far.
    """

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[Text, set[str]] = {}

    def follow(self, envelope: Envelope) -> frozenset[str]:
        """Note a piece. Returns the ids of the sessions that were not given the beginning of its text."""
        if not isinstance(envelope.policy.deliver, Append):
            return frozenset()
        text = text_of(envelope)
        if _ends(envelope):
            return frozenset(self._open.pop(text, ()))
        if text not in self._open and len(self._open) >= OPEN:
            del self._open[next(iter(self._open))]
        return frozenset(self._open.setdefault(text, set()))

    def tear(self, session: str, texts: frozenset[Text] | None = None) -> None:
        """`session` has no beginning of `texts`, or of any that goes on."""
        for text in self._open if texts is None else texts:
            self._open.setdefault(text, set()).add(session)

    def torn(self, session: str) -> set[Text]:
        """The texts whose beginning `session` was not given."""
        return {text for text, lacking in self._open.items() if session in lacking}

    def forget(self, session: str) -> None:
        """`session` is gone."""
        for lacking in self._open.values():
            lacking.discard(session)


def text_of(envelope: Envelope) -> Text:
    """The text that a piece belongs to."""
    return type(envelope.event), subject_of(envelope.event, envelope.policy.deliver.by)


def marked(envelope: Envelope) -> Envelope:
    """A piece for one who was not given the beginning of its text."""
    return replace(envelope, payload=wire.body(envelope)[:-1] + b',"torn":true}')


def without_torn(missed: Sequence[Envelope], breaks: Sequence[int] = ()) -> tuple[list[Envelope], frozenset[Text]]:
    """A stretch whose beginning is cut off, without pieces of texts that are not there from their beginning on; and
    which of these texts go on. After the numbers `breaks` something may be missing as well.
    """
    whole: set[Text] = set()
    """Texts of which everything is there from the last beginning, or end, on."""
    going_on: dict[Text, list[int]] = {}
    """Of each text that has not ended, the places of the pieces that are kept."""
    left_out: set[int] = set()
    ahead = sorted(breaks)
    for place, envelope in enumerate(missed):
        broken = bisect_left(ahead, envelope.seq)
        if broken:
            del ahead[:broken]
            whole.clear()
            for places in going_on.values():
                left_out.update(places)
                places.clear()
        if not isinstance(envelope.policy.deliver, Append):
            continue
        text = text_of(envelope)
        if _begins(envelope):
            whole.add(text)
        places = going_on.setdefault(text, [])
        if text in whole:
            places.append(place)
        else:
            left_out.add(place)
        if _ends(envelope):  # the next piece is another text's first
            whole.add(text)
            del going_on[text]
    torn = frozenset(text for text in going_on if text not in whole)
    return [envelope for place, envelope in enumerate(missed) if place not in left_out], torn


def _ends(envelope: Envelope) -> bool:
    deliver = envelope.policy.deliver
    return isinstance(deliver, Append) and deliver.ends is not None and bool(getattr(envelope.event, deliver.ends))


def _begins(envelope: Envelope) -> bool:
    deliver = envelope.policy.deliver
    return isinstance(deliver, Append) and deliver.index is not None and getattr(envelope.event, deliver.index) == 0
