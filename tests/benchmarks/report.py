"""Prints what was found: one line a figure, with its aim and whether it was met."""

from collections.abc import Callable, Sequence

from msgspec import Struct

from tests.benchmarks.comparison import Comparison

__all__ = ["HEAD_BESIDE", "Aim", "Figure", "ours_at_most", "print_notes", "print_table", "ratio_at_least"]


class Aim(Struct, frozen=True):
    """What a figure should be."""

    text: str
    met: Callable[[Comparison], bool]


def ratio_at_least(limit: float) -> Aim:
    return Aim(f"ratio >= {limit:g}", lambda found: found.ratio >= limit)


def ours_at_most(limit: float) -> Aim:
    return Aim(f"ours <= {limit:g}", lambda found: found.ours <= limit)


class Figure(Struct, frozen=True):
    """One line of the table."""

    name: str
    found: Comparison
    digits: int = 0
    aim: Aim | None = None
    flaws: tuple[str, ...] = ()
    """What was odd about bursts that it comes from."""

    @property
    def verdict(self) -> str:
        if self.aim is None:
            return ""
        # One steady pair among many may be chance. Figures of a single pair have no neighbours to disagree with.
        if self.found.of > 1 and self.found.steady < 2:
            return "NOT SETTLED: too few steady pairs"
        return "met" if self.aim.met(self.found) else "NOT MET"

    def cells(self) -> tuple[str, ...]:
        found = self.found
        return (
            self.name + (" *" if self.flaws else ""),
            f"{found.ours:,.{self.digits}f}",
            f"{found.yardstick:,.{self.digits}f}",
            f"{found.ratio:.2f}",
            # One pair has no neighbours to disagree with.
            f"{found.steady}/{found.of}" if found.of > 1 else "",
            self.aim.text if self.aim else "",
            self.verdict,
        )


HEAD = ("figure", "ours", "C", "ratio", "steady", "aim", "")
HEAD_BESIDE = ("figure: this | beside", "this", "beside", "ratio", "steady", "aim", "")


def print_table(figures: Sequence[Figure], head: tuple[str, ...] = HEAD) -> None:
    """The result as a table, for people."""
    rows = [head, *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:5], widths[1:5], strict=True))
        words = (cell.ljust(width) for cell, width in zip(row[5:], widths[5:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *numbers, *words)).rstrip())


def print_notes(figures: Sequence[Figure]) -> None:
    """What must be known to read the tables, and which aims are met."""
    print(
        "\nC is a server that does one send() a delivery and nothing else. Only ratios mean anything: machines drift."
    )
    print("steady: pairs whose C bursts agree on a core nobody else used; the others are left out where there are any.")
    for figure in figures:
        for flaw in figure.flaws:
            print(f"* {figure.name}: {flaw}")
    aims = [figure for figure in figures if figure.aim]
    open_aims = [figure for figure in aims if figure.verdict != "met"]
    if aims:
        print(f"\n{len(aims) - len(open_aims)} of {len(aims)} aims met.")
    for figure in open_aims:
        print(f"{figure.verdict}: {figure.name}")
