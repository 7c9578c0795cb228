"""The command: `python -m tests.benchmarks [--quick] [--only NAME]`."""

import argparse
import signal
import sys
import time
import traceback

from tests.benchmarks.nodes import NODES
from tests.benchmarks.report import HEAD_BESIDE, Figure, print_notes, print_table
from tests.benchmarks.rooms import ROOMS
from tests.benchmarks.scenarios import SCENARIOS, Bench
from tests.benchmarks.toolchain import Unfit, prepare

ALL = {**SCENARIOS, **ROOMS, **NODES}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="The router beside the kernel's own limit."
    )
    parser.add_argument("--quick", action="store_true", help="short bursts: to see that all works, not to quote")
    parser.add_argument("--only", action="append", choices=ALL, metavar="NAME", help=", ".join(ALL))
    options = parser.parse_args()
    # So that the servers are ended too when somebody ends this.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        cores = prepare()
    except Unfit as lack:
        print(f"CANNOT MEASURE HERE: {lack}", file=sys.stderr)
        return 1
    bench = Bench(cores, pairs=2, seconds=0.7) if options.quick else Bench(cores, pairs=4, seconds=2.0)
    figures: list[Figure] = []
    rooms: list[Figure] = []
    broken: list[str] = []
    for name in options.only or ALL:
        started = time.monotonic()
        print(f"{name} …", end=" ", file=sys.stderr, flush=True)
        try:
            (figures if name in SCENARIOS else rooms).extend(ALL[name](bench))
        except Exception:
            # The other scenarios still tell something; the exit status remembers this one.
            traceback.print_exc()
            broken.append(name)
        print(f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print()
    if figures:
        print_table(figures)
        print()
    if rooms:
        print_table(rooms, HEAD_BESIDE)
    print_notes([*figures, *rooms])
    for name in broken:
        print(f"COULD NOT MEASURE: {name} (see above)")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
