"""The command: `python -m tests.benchmarks [--quick] [--only NAME]`."""

import argparse
import signal
import sys
import time
import traceback

from tests.benchmarks.report import Figure, print_table
from tests.benchmarks.scenarios import SCENARIOS, Bench
from tests.benchmarks.toolchain import Unfit, prepare


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="The router beside the kernel's own limit."
    )
    parser.add_argument("--quick", action="store_true", help="short bursts: to see that all works, not to quote")
    parser.add_argument("--only", action="append", choices=SCENARIOS, metavar="NAME", help=", ".join(SCENARIOS))
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
    broken: list[str] = []
    for name in options.only or SCENARIOS:
        started = time.monotonic()
        print(f"{name} …", end=" ", file=sys.stderr, flush=True)
        try:
            figures.extend(SCENARIOS[name](bench))
        except Exception:
            # The other scenarios still tell something; the exit status remembers this one.
            traceback.print_exc()
            broken.append(name)
        print(f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print()
    if figures:
        print_table(figures)
    for name in broken:
        print(f"COULD NOT MEASURE: {name} (see above)")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
