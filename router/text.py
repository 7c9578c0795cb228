"""Texts that come in pieces (`Append`), and who was not given their beginning."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TypeAlias

from msgspec.structs import replace

from router import wire
from router.envelope import Envelope
from router.event import Append, Event
from router.pacing import Subject, subject_of

__all__ = ["Text", "Texts", "ends", "marked", "text_of", "without_torn"]

Text: TypeAlias = tuple[type[Event], Subject]
"""What names a text: the type of its pieces and the values of their `by` fields."""

OPEN = 1_000
"""Texts of one topic that go on at once, as far as it is known: the newest of them."""


class Texts:
    """The texts of one topic that go on, each with the sessions that were not given its beginning.

    By itself a piece of such a text says nothing to them; it is for whoever has loaded the text so far.
    """

    __slots__ = ("_open", "_reloaded")

    def __init__(self) -> None:
        self._open: dict[Text, set[str]] = {}
        self._reloaded: set[str] = set()
        """Sessions that were told to reload, and may lack the beginning of texts that nobody here has heard of yet."""

    def note(self, envelope: Envelope) -> None:
        """Note a piece on its way in, before it is merged with others: one that is not the first may be new here."""
        deliver = envelope.policy.deliver
        if isinstance(deliver, Append) and deliver.index is not None and self._reloaded:
            text = text_of(envelope)
            if text not in self._open and getattr(envelope.event, deliver.index):
                self._open[text] = set(self._reloaded)

    def follow(self, envelope: Envelope) -> frozenset[str]:
        """Note a piece. Returns the ids of the sessions that were not given the beginning of its text."""
        if not isinstance(envelope.policy.deliver, Append):
            return frozenset()
        text = text_of(envelope)
        if ends(envelope):
            return frozenset(self._open.pop(text, ()))
        if text not in self._open and len(self._open) >= OPEN:
            del self._open[next(iter(self._open))]
        return frozenset(self._open.setdefault(text, set()))

    def tear(self, session: str, *, but: frozenset[Text] = frozenset()) -> None:
        """`session` was not given the beginning of any text that goes on, `but` of those."""
        self._reloaded.add(session)
        for text, lacking in self._open.items():
            if text not in but:
                lacking.add(session)

    def mend(self, session: str, text: Text) -> None:
        """`session` has been sent the last piece of `text`."""
        lacking = self._open.get(text, set())
        lacking.discard(session)

    def keep(self, text: Text, sessions: set[str]) -> None:
        """`text` has ended, and `sessions`, which lack its beginning, are away: they have still to get the rest."""
        if sessions:
            self._open.setdefault(text, set()).update(sessions)

    def torn(self, session: str) -> set[Text]:
        """The texts whose beginning `session` was not given."""
        return {text for text, lacking in self._open.items() if session in lacking}

    def forget(self, session: str) -> None:
        """`session` is gone."""
        self._reloaded.discard(session)
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
    which texts that go on it has from their beginning. After the numbers `breaks` something may be missing as well.
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
        if ends(envelope):  # the next piece is another text's first
            whole.add(text)
            del going_on[text]
    given = frozenset(text for text, places in going_on.items() if text in whole and places)
    return [envelope for place, envelope in enumerate(missed) if place not in left_out], given


def ends(envelope: Envelope) -> bool:
    """Whether it is the last piece of its text."""
    deliver = envelope.policy.deliver
    return isinstance(deliver, Append) and deliver.ends is not None and bool(getattr(envelope.event, deliver.ends))


def _begins(envelope: Envelope) -> bool:
    deliver = envelope.policy.deliver
    return isinstance(deliver, Append) and deliver.index is not None and getattr(envelope.event, deliver.index) == 0
