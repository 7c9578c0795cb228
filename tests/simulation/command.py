"""The command line of the simulation."""

import argparse
import sys

from tests.simulation import seam
from tests.simulation.schedule import draw
from tests.simulation.world import run

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", default="1-20")
    parser.add_argument("--broker", default="memory")
    parser.add_argument("--trace", action="store_true")
    given = parser.parse_args(arguments)
    first, _, last = given.seeds.partition("-")
    seeds = [given.seed] if given.seed is not None else range(int(first), int(last) + 1)
    for seed in seeds:
        plan = draw(seed, given.broker)
        if given.trace:
            print(plan)
        t = seam.real_clock()
        outcome = run(plan, print if given.trace else None)
        print(seed, f"{seam.real_clock() - t:.2f}s", outcome.turns, hex(outcome.trace), dict(outcome.reached))
        for v in outcome.violations: print("   ", v)
        for c in outcome.complaints[:5]: print("   !", c)
    return 0
