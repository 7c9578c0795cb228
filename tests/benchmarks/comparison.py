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


CROWDED = 0.9
"""When the load got less of its core than this, something else ran there."""


class Pair(Struct, frozen=True):
    """A burst of ours and the C bursts on both sides of it."""

    before: Burst
    ours: Burst
    after: Burst
    steady: bool
    """Whether C was as fast before as after, and the load had its core for itself."""


class Comparison(Struct, frozen=True):
    """Medians over the pairs that count."""

    ours: float
    yardstick: float
    ratio: float
    steady: int
    of: int


def interleave(ours: Callable[[], Burst], yardstick: Callable[[], Burst], speed: Measure, *, enough: int) -> list[Pair]:
    """C, ours, C, ours, … C: each burst of ours has a C burst right before and right after it.

    Goes on until there are `enough` steady pairs, or twice as many of any kind: a busy machine may never hold still.
    """
    pairs: list[Pair] = []
    before = yardstick()
    while sum(pair.steady for pair in pairs) < enough and len(pairs) < 2 * enough:
        middle, after = ours(), yardstick()
        low, high = sorted((speed(before), speed(after)))
        # Bursts without a measured time span (connections that only open) have used no core in it.
        alone = all(burst.client_cpu_frac > CROWDED or not burst.sent_per_s for burst in (before, middle, after))
        pairs.append(Pair(before, middle, after, steady=alone and high <= low * UNSTEADY))
        before = after
    return pairs


def compare(pairs: Sequence[Pair], value: Measure) -> Comparison:
    """`value` of ours against C's, over the steady pairs where there are any."""
    counted = [pair for pair in pairs if pair.steady] or pairs
    beside = [fmean((value(pair.before), value(pair.after))) for pair in counted]
    return Comparison(
        ours=median(value(pair.ours) for pair in counted),
        yardstick=median(beside),
        ratio=median(value(pair.ours) / c for pair, c in zip(counted, beside, strict=True)),
        steady=sum(pair.steady for pair in pairs),
        of=len(pairs),
    )
