"""One row of the table of random ordeals, and the file in which the rows of a long run are kept."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from tests.ordeal.schedule import Kind

__all__ = ["COLUMNS", "Results", "Row", "fingerprint"]

COLUMNS = ("lost", "twice", "order", "deaf", "torn", "presence", "seat")
"""What is to be 0. The checker tells some kinds more exactly; see `Violation`."""
INTO = {"phantom": "twice", "nagged": "twice", "passing": "lost", "cut": "lost", "gap": "torn"}
ROOT = Path(__file__).parents[2]


class Row(Struct, frozen=True):
    """How one ordeal went, over all people."""

    seed: int
    on: Kind
    faults: str
    published: int = 0
    refused: int = 0
    """Publishes that were declined, or of which nobody knows."""
    delivered: int = 0
    resyncs: int = 0
    reached: dict[str, int] = {}
    """What happened beside that: connections, refused handshakes, starts of nodes, and by how many ms the machine was late."""
    counts: dict[str, int] = {}
    """Violations, by column."""
    caught_up: float = 0.0
    """Seconds from the end of the last fault until all was well."""
    violations: list[str] = []
    error: str = ""
    """Why there is no result, where there is none: the ordeal's own fault."""

    @property
    def failed(self) -> bool:
        """Whether a promise was broken."""
        return any(self.counts.values())

    def __str__(self) -> str:
        head = f"{self.on:8} {self.seed:6} {self.published:9,} {self.refused:7,} {self.delivered:9,} {self.resyncs:7,}"
        if self.error:
            return f"{head} {self.error}"
        counts = "".join(f" {self.counts.get(column, 0):{max(4, len(column))}}" for column in COLUMNS)
        return f"{head}{counts} {self.caught_up:9.1f}  {self.faults}"

    @staticmethod
    def head() -> str:
        """Names of the columns."""
        columns = "".join(f" {column:>{max(4, len(column))}}" for column in COLUMNS)
        return (
            f"{'on':8} {'seed':>6} {'published':>9} {'refused':>7} {'delivered':>9} {'resyncs':>7}{columns} "
            f"{'caught up':>9}  faults"
        )

    @staticmethod
    def sum(rows: Sequence["Row"]) -> str:
        """All of them in one line."""
        done = [row for row in rows if not row.error]
        columns = "".join(
            f" {sum(row.counts.get(column, 0) for row in done):{max(4, len(column))}}" for column in COLUMNS
        )
        return (
            f"{'all':8} {len(done):6} {sum(row.published for row in done):9,} {sum(row.refused for row in done):7,} "
            f"{sum(row.delivered for row in done):9,} {sum(row.resyncs for row in done):7,}{columns} "
            f"{max((row.caught_up for row in done), default=0.0):9.1f}  "
            f"{sum(row.failed for row in done)} failed, {len(rows) - len(done)} could not be run"
        )


class Results:
    """Rows on disk, one a line, written as they come. Those of other code than that which is here do not count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._code = fingerprint()
        self.rows: dict[tuple[Kind, int], Row] = {}
        if path.exists():
            for line in path.read_bytes().splitlines():
                code, row = msgspec.json.decode(line, type=tuple[str, Row])
                if code == self._code and not row.error:
                    self.rows[row.on, row.seed] = row

    def add(self, row: Row) -> None:
        """Keep one."""
        self.rows[row.on, row.seed] = row
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode((self._code, row)) + b"\n")


def fingerprint() -> str:
    """Names the code that is under test, and that tests it."""
    digest = hashlib.sha256()
    for folder in ("router", "plugins", "tests/ordeal", "tests/checker"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".lua"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
