"""What publishers did: each publication with the mark that its text carries, and what its publisher was told of it."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Ledger", "Publication", "Way", "marks"]

Way = Literal["now", "latest", "merge", "append", "passing"]
"""How its type is delivered. `passing`: not kept (`keep=False`), and only the newest of its key counts."""
Outcome = Literal["published", "refused", "unknown"]

_MARK = re.compile(r"<([^<>:]+):(\d+)>")


def marks(event: Any) -> list[tuple[str, int]]:
    """The marks in an event, in the order in which they stand in it: pairs of a key and a number."""
    text = json.dumps(event, ensure_ascii=False)
    return [(key, int(number)) for key, number in _MARK.findall(text)] if "<" in text else []


@dataclass(slots=True)
class Publication:
    """One event that a publisher asked for."""

    key: str
    """What it is about, unique over topics and types: events of one key merge, and are shown in order."""
    number: int
    """Its place among those of its key, from 0."""
    topic: str
    """`project:<id>`, `user:<id>` or `all`."""
    kind: str
    way: Way
    asked_at: float
    line: str = ""
    """Publications of one line came one after the other: those that are never held are shown in that order."""
    about: str = ""
    """Publications about one thing came one after the other: none is shown after a later one that is never held."""
    settles: str | None = None
    """The key of which it makes obsolete what was published before it."""
    identified: bool = True
    """Whether all tries carried the same message id (or the publisher tried only once)."""
    probe: bool = False
    """Published at the end, when all is well: whoever misses it is deaf."""
    order: int = 0
    """Its place among all that were asked for."""
    told_at: float | None = None
    outcome: Outcome = "unknown"

    @property
    def mark(self) -> str:
        """What its text has to contain."""
        return f"<{self.key}:{self.number}>"

    def told(self, at: float, outcome: Outcome) -> None:
        """The publisher knows how it went. `unknown`: an error or a timeout after which it may stand all the same."""
        self.told_at, self.outcome = at, outcome


@dataclass(slots=True)
class Ledger:
    """All publications, in the order in which they were asked for."""

    publications: list[Publication] = field(default_factory=list)
    forgotten: list[float] = field(default_factory=list)
    """Moments at which the broker lost some of its memory: nobody can be shown from history what was before."""
    _numbers: dict[str, int] = field(default_factory=dict)

    def ask(self, topic: str, kind: str, way: Way, *, key: str, at: float, **more: Any) -> Publication:
        """Note that a publisher is about to publish. Its text must carry the answer's `mark`."""
        assert not set(key) & set("<>:"), key
        number = self._numbers.get(key, 0)
        self._numbers[key] = number + 1
        made = Publication(key, number, topic, kind, way, at, order=len(self.publications), **more)
        self.publications.append(made)
        return made
