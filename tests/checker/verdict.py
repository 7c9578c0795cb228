"""Compares what publishers did with what clients were shown, and names every broken promise."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.checker.client import Client, Closed, Dropped, Opened, Resync, Shown, Welcome
from tests.checker.ledger import Ledger, Publication, marks

__all__ = ["Violation", "judge"]

REACH = 3.0
"""Seconds within which an event that is not kept reaches those who are there: the longest window, and travel."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken: `lost`, `cut` (lost at the old end of history: `since=0` was answered as if it were
    all there is), `twice`, `nagged` (the same, of a critical event and a plain client, which cannot acknowledge), `order`,
    `torn`, `gap` (the same, of pieces that the broker itself forgot), `deaf`, `passing` (an event that is not kept did not reach one who was
    there), `late` (it came only when something else was published), `phantom` (refused, and shown). Whoever runs the checker adds `presence`, `seat`, `away`.
    """

    kind: str
    client: str
    topic: str
    what: str
    at: float

    def __str__(self) -> str:
        return f"{self.kind:8} {self.client} {self.topic} at {self.at:.3f}: {self.what}"


@dataclass(slots=True)
class _Segment:
    """What one client was shown of one topic without a break in continuity."""

    whole: bool = False
    """It begins with the first event that there is."""
    shown: dict[tuple[str, int], float] = field(default_factory=dict)
    last: dict[str, tuple[int, float]] = field(default_factory=dict)
    line: dict[str, Publication] = field(default_factory=dict)
    texts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass(slots=True)
class _Visit:
    """One connection, for what is only shown to those who are there."""

    begin: float
    end: float
    prompt: bool


def judge(ledger: Ledger, clients: Iterable[Client], *, ended: float, settled: float = float("inf")) -> list[Violation]:
    """Every broken promise. To be called when faults have stopped and there was time for all to come right.

    `settled`: when that time was over. What is shown after it, and is no probe, was overlooked until the probe came.

    Nothing is lost without `resync`: what a publisher was told is published, after a client knew its position, is
    shown to it, merged into something shown, settled, or covered by a `resync`. Only clients that are connected at
    the end are asked for it, for the others may still come back.
    """
    known = {(each.key, each.number): each for each in ledger.publications}
    settling: dict[str, list[Publication]] = defaultdict(list)
    for each in ledger.publications:
        if each.settles is not None:
            settling[each.settles].append(each)
    found: list[Violation] = []
    everyone = list(clients)
    for client in everyone:
        for topic in client.names.values():
            mine = [each for each in ledger.publications if each.topic == topic]
            # A plain client cannot be told what others are: that the broker lost its memory, which takes the nodes a
            # moment to notice, or that history does not reach back to what it missed.
            excused = float("-inf")
            if client.plain:
                excused = max(
                    [moment + REACH for moment in ledger.forgotten] + _breaks(everyone, topic), default=excused
                )
            found += _View(client, topic, mine, known, settling, ledger.forgotten, excused, ended, settled).violations()
    return sorted(found, key=lambda violation: violation.at)


def _breaks(clients: Iterable[Client], topic: str) -> list[float]:
    """When clients were told of a break in `topic` in the middle of their connections."""
    found = []
    for client in clients:
        welcomed = float("-inf")
        for note in client.record:
            if isinstance(note, Welcome):
                welcomed = note.at
            elif isinstance(note, Resync) and note.topic == topic and note.at > welcomed + 0.5:
                found.append(note.at)
    return found


class _View:
    """One topic as one client saw it."""

    def __init__(
        self,
        client: Client,
        topic: str,
        publications: list[Publication],
        known: dict[tuple[str, int], Publication],
        settling: dict[str, list[Publication]],
        forgotten: list[float],
        excused: float,
        ended: float,
        settled: float,
    ) -> None:
        self._client = client
        self._topic = topic
        self._publications = publications
        self._known = known
        self._settling = settling
        self._forgotten = forgotten
        self._excused = excused
        self._ended = ended
        self._settled = settled
        self._found: list[Violation] = []
        self._segments: list[_Segment] = []
        self._visits: list[_Visit] = []
        self._dropped: dict[tuple[str, int], str] = {}
        self._all_shown: set[tuple[str, int]] = set()
        self._newest: dict[str, int] = {}
        # One that is not kept has no number by which a try that was given up, and arrives late, could be known again.
        self._repeated = {each.key for each in publications if each.way == "passing" and not each.identified}
        self._twice: dict[str, list[tuple[int, float, Shown]]] = defaultdict(list)
        self._from: float | None = None
        """What was asked for from here on must be shown."""
        self._welcomed = float("-inf")
        self._cut = max(forgotten, default=float("-inf"))
        self._covered = float("-inf")
        self._recovered = ""
        self._walk()

    def violations(self) -> list[Violation]:
        lost = self._lost()
        self._torn(lost)
        self._passing()
        for key, again in self._twice.items():
            number, before, note = again[0]
            if self._client.plain and before < self._excused:
                continue  # a publisher said it again because the server had lost it; a plain client cannot be told
            more = f", and {len(again) - 1} more of it" if len(again) > 1 else ""
            nagged = self._client.plain and note.event.get("requires_ack")
            self._tell(
                "nagged" if nagged else "twice",
                f"<{key}:{number}> was shown at {before:.3f} already; again in {_short(note)}{more}",
                note.at,
            )
        return self._found

    def _tell(self, kind: str, what: str, at: float) -> None:
        self._found.append(Violation(kind, self._client.name, self._topic, what, at))

    # -- what was shown, in order

    def _walk(self) -> None:
        since: str | None = None
        for note in self._client.record:
            if isinstance(note, Opened):
                since = note.since
                self._visits.append(_Visit(float("inf"), float("inf"), note.prompt))
            elif isinstance(note, Welcome):
                self._visits[-1].begin = note.at
                self._recovered = f"; welcome at {note.at:.3f} said recovered: {str(note.recovered).lower()}"
                if since is None or since == "0" or self._from is None:
                    self._begin(note.at, whole=since == "0")
            elif isinstance(note, Closed):
                if self._visits:
                    self._visits[-1].end = note.at
            elif isinstance(note, Resync) and note.topic == self._topic:
                self._covered = note.at
                self._segments.append(_Segment())
            elif isinstance(note, Shown) and (note.topic == self._topic or self._client.plain):
                self._shown(note)  # a plain client is not told of which topic an event is
            elif isinstance(note, Dropped) and note.topic == self._topic:
                for mark in marks(note.event):
                    self._dropped.setdefault(mark, note.why)

    def _begin(self, at: float, *, whole: bool) -> None:
        """A page that knows nothing, and wants all that there is or all from now on."""
        cut = max((moment for moment in self._forgotten if moment <= at), default=float("-inf"))
        self._from = cut if whole else at
        self._welcomed = at
        self._covered = float("-inf")
        self._segments.append(_Segment(whole=whole))
        del self._visits[:-1]
        self._all_shown.clear()
        self._newest.clear()

    def _shown(self, note: Shown) -> None:
        if not self._segments:
            self._segments.append(_Segment())
        segment = self._segments[-1]
        for key, number in marks(note.event):
            publication = self._known.get((key, number))
            if publication is None or publication.topic != self._topic:
                continue
            again = (key, number) in segment.shown
            if publication.outcome == "refused":
                self._tell("phantom", f"{publication.mark} was refused, and is shown", note.at)
            if (
                again
                and publication.way != "passing"
                and (publication.identified or publication.outcome == "published")
            ):
                self._twice[key].append((number, segment.shown[key, number], note))
            if note.at > self._settled and not publication.probe and (key, number) not in self._all_shown:
                self._tell("late", f"{publication.mark} was shown only after everything had settled", note.at)
            orderly = not again and publication.outcome == "published" and key not in self._repeated
            if orderly and not note.event.get("redelivered"):
                self._check_order(segment, publication, note)
            segment.shown.setdefault((key, number), note.at)
            self._all_shown.add((key, number))
            self._newest[key] = max(number, self._newest.get(key, -1))
            if publication.way == "append" and not again:
                segment.texts[key].append(number)

    def _check_order(self, segment: _Segment, publication: Publication, note: Shown) -> None:
        key, number = publication.key, publication.number
        last, at = segment.last.get(key, (-1, 0.0))
        if number < last:
            self._tell("order", f"{publication.mark} after {last} (shown at {at:.3f}) in {_short(note)}", note.at)
        else:
            segment.last[key] = number, note.at
        now = publication.way == "now"
        for line in {publication.line if now else "", publication.about} - {""}:
            before = segment.line.get(line)
            if before is not None and before.order > publication.order:
                self._tell("order", f"{publication.mark} after {before.mark}, which was published later", note.at)
            elif now:
                segment.line[line] = publication

    # -- what was not shown

    def _lost(self) -> set[tuple[str, int]]:
        if not self._client.connected or self._from is None:
            return set()
        missing: dict[tuple[str, str], list[Publication]] = defaultdict(list)
        for each in self._publications:
            if each.way != "passing" and self._required(each) and not self._satisfied(each):
                if each.probe:
                    self._tell("deaf", f"{each.mark} of the end never came{self._why(each)}", self._ended)
                elif not self._client.plain:
                    cut = each.asked_at <= self._welcomed and self._is_oldest(each)
                    missing["cut" if cut else "lost", each.key].append(each)
        for (kind, key), them in missing.items():
            numbers = ", ".join(str(each.number) for each in them[:12]) + (" ..." if len(them) > 12 else "")
            self._tell(
                kind, f"<{key}:{numbers}> ({them[0].kind}) of {self._count(key)}{self._why(them[0])}", them[0].asked_at
            )
        return {(each.key, each.number) for them in missing.values() for each in them}

    def _is_oldest(self, publication: Publication) -> bool:
        """Whether nothing older of the same key is shown."""
        return publication.number < min((n for key, n in self._all_shown if key == publication.key), default=1 << 62)

    def _required(self, publication: Publication) -> bool:
        assert self._from is not None
        return publication.outcome == "published" and max(self._from, self._covered) < publication.asked_at

    def _satisfied(self, publication: Publication) -> bool:
        if (publication.key, publication.number) in self._all_shown:
            return True
        if publication.way == "latest" and self._newest.get(publication.key, -1) > publication.number:
            return True
        return any(
            each.order > publication.order and (each.key, each.number) in self._all_shown
            for each in self._settling.get(publication.key, ())
        )

    def _count(self, key: str) -> str:
        return f"{sum(each.key == key for each in self._publications)}"

    def _why(self, publication: Publication) -> str:
        why = self._dropped.get((publication.key, publication.number))
        return (f"; it came and was dropped: {why}" if why else "") + self._recovered

    def _torn(self, lost: set[tuple[str, int]]) -> None:
        if self._client.plain:
            return  # it cannot be told that continuity is lost
        for segment in self._segments:
            for key, numbers in segment.texts.items():
                first, final = numbers[0], max(numbers)
                holes = [
                    number
                    for number in range(first + 1, final)
                    if (key, number) not in segment.shown and self._stands(key, number, lost)
                ]
                if segment.whole and first > 0 and self._stands(key, 0, lost) and self._required(self._known[key, 0]):
                    self._tell("torn", f"{key} begins with piece {first}{self._recovered}", segment.shown[key, first])
                if holes:
                    # What the broker itself forgot cannot be shown; that it goes unsaid is another fault than a lost piece.
                    known_lost = all(self._known[key, number].asked_at <= self._cut for number in holes)
                    self._tell(
                        "gap" if known_lost else "torn",
                        f"{key} has holes at {holes[:12]}, between {first} and {final}",
                        self._ended,
                    )

    def _stands(self, key: str, number: int, lost: set[tuple[str, int]]) -> bool:
        publication = self._known.get((key, number))
        return (
            publication is not None
            and publication.outcome == "published"
            and (key, number) not in lost
            and publication.asked_at > max(self._covered, self._excused)
        )

    def _passing(self) -> None:
        if self._client.plain:
            return
        for each in self._publications:
            if each.way != "passing" or each.outcome != "published" or each.told_at is None:
                continue
            if each.key in self._repeated:
                continue
            until = each.told_at + REACH
            there = any(v.prompt and v.begin < each.asked_at and min(v.end, self._ended) > until for v in self._visits)
            if there and each.asked_at > self._covered and self._newest.get(each.key, -1) < each.number:
                self._tell(
                    "passing", f"{each.mark} ({each.kind}), not kept, never came to one who was there", each.asked_at
                )


def _short(note: Shown) -> str:
    text = ", ".join(f"{key}:{number}" for key, number in marks(note.event)[:6])
    return f"{note.event['type']} seq {note.event.get('seq')} [{text}]"
