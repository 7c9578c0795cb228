"""Interleaves bursts of ours with bursts of C, so that a machine whose speed drifts still gives steady ratios."""

from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import TypeAlias

from msgspec import Struct

from tests.benchmarks.load import Burst

__all__ = ["Comparison", "Measure", "Pair", "compare", "interleave"]

Measure: TypeAlias = Callable[[Burst], float]

UNSTEADY = 1.15
"""When the C bursts around one of ours differ by more than this factor, the machine changed in between."""


class Pair(Struct, frozen=True):
    """A burst of ours and the C bursts on both sides of it."""

    before: Burst
    ours: Burst
    after: Burst

    def steady(self, speed: Measure) -> bool:
        """Whether C was as fast before as after."""
        low, high = sorted((speed(self.before), speed(self.after)))
        return high <= low * UNSTEADY


class Comparison(Struct, frozen=True):
    """Medians over the pairs that count."""

    ours: float
    yardstick: float
    ratio: float
    steady: int
    of: int


def interleave(ours: Callable[[], Burst], yardstick: Callable[[], Burst], pairs: int) -> list[Pair]:
    """C, ours, C, ours, … C: each burst of ours has a C burst right before and right after it."""
    found: list[Pair] = []
    before = yardstick()
    for _ in range(pairs):
        middle, after = ours(), yardstick()
        found.append(Pair(before, middle, after))
        before = after
    return found


def compare(pairs: Sequence[Pair], value: Measure, *, speed: Measure) -> Comparison:
    """`value` of ours against C's. `speed` tells whether the machine held still; tail latency jumps by itself."""
    steady = [pair for pair in pairs if pair.steady(speed)]
    counted = steady or pairs
    beside = [fmean((value(pair.before), value(pair.after))) for pair in counted]
    return Comparison(
        ours=median(value(pair.ours) for pair in counted),
        yardstick=median(beside),
        ratio=median(value(pair.ours) / c for pair, c in zip(counted, beside, strict=True)),
        steady=len(steady),
        of=len(pairs),
    )
