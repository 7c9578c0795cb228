"""The command line of the simulation: plays seeds, tells which broke a promise, shortens what fails, goes on later."""

import argparse
import contextlib
import gc
import json
import os
import pickle
import selectors
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.simulation import seam
from tests.simulation.schedule import Plan, draw
from tests.simulation.world import Outcome, run

__all__ = ["main"]

CORPUS = Path(__file__).parent / "corpus.txt"


@dataclass(slots=True)
class _Played:
    """What came of one seed, small enough to be handed from process to process."""

    broker: str
    seed: int
    violations: list[str]
    kinds: list[str]
    reached: dict[str, int]
    trace: int
    error: str = ""


@dataclass(slots=True)
class _Tally:
    """What came of all seeds."""

    began: float
    seeds: int = 0
    failed: list[tuple[str, int, list[str]]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    reached: Counter[str] = field(default_factory=Counter)
    worlds: Counter[str] = field(default_factory=Counter)

    def take(self, played: _Played) -> None:
        self.seeds += 1
        self.reached.update(played.reached)
        self.worlds.update(played.reached.keys())
        if played.violations or played.error:
            self.failed.append((played.broker, played.seed, played.kinds))
            for kind in played.kinds:
                self.kinds[kind] += 1
                self.first.setdefault(kind, played.seed)


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    gc.collect()
    gc.freeze()  # what is imported now is never looked at again
    gc.disable()
    if given.seed is not None:
        return _one(given)
    return _many(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--broker", choices=("memory", "redis", "both"), default="both")
    parser.add_argument("--seeds", default="1-100", metavar="A-B")
    parser.add_argument("--seed", type=int, help="Play this one alone, and tell what happens.")
    parser.add_argument("--trace", action="store_true", help="With --seed: every frame and every step.")
    parser.add_argument("--shrink", action="store_true", help="Leave out steps for as long as it still fails.")
    parser.add_argument("--kind", help="With --shrink: the kind of violation that is to stay.")
    parser.add_argument("--minutes", type=float, help="Stop after so long, whatever is left of the seeds.")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--corpus", action="store_true", help="The seeds that once failed, before the others.")
    parser.add_argument("--resume", type=Path, help="A file in which it is noted how far this run has come.")
    parser.add_argument("--json", action="store_true", help="End with one line of JSON, for a program.")
    parser.add_argument("--quiet", action="store_true", help="Do not print the violations.")
    parser.add_argument("--until-kind", help="Stop at the first seed with this kind of violation, or `any`.")
    return parser


# -- one seed


def _one(given: Any) -> int:
    broker = "redis" if given.broker == "both" else given.broker
    plan = draw(given.seed, broker)
    if given.shrink:
        plan = _shrink(plan, given.kind)
        print("the shortest that still fails:")
    print(plan)
    outcome = _apart(plan, print if given.trace else None)
    print(outcome.crash, end="")
    for violation in outcome.violations:
        print(violation)
    for complaint in outcome.complaints[:20]:
        print("complaint:", complaint)
    print(f"trace {outcome.trace:08x}, {outcome.turns:,} turns, {len(outcome.violations)} violations")
    return bool(outcome.violations)


def _shrink(plan: Plan, kind: str | None) -> Plan:
    """Leave out what is not needed for a violation of the same kind: halves first, then single steps, then people."""
    found = _apart(plan).violations
    wanted = kind or (found[0].kind if found else "")

    def fails(trial: Plan) -> bool:
        kinds = {violation.kind for violation in _apart(trial).violations}
        return wanted in kinds

    if not wanted or not fails(plan):
        raise SystemExit(f"seed {plan.seed} breaks no promise{f' of kind {kind}' if kind else ''}")
    for name in ("steps", "viewers"):
        size = max(1, len(getattr(plan, name)) // 2)
        while size:
            start = 0
            while start < len(getattr(plan, name)):
                kept = getattr(plan, name)
                trial = _with(plan, **{name: kept[:start] + kept[start + size :]})
                if fails(trial):
                    plan = trial
                else:
                    start += size
            size //= 2
    for number in range(len(plan.steps)):
        for field_, values in (("pieces", (2, 3, 5, 10)), ("count", (1, 2, 4))):
            for value in values:
                step = plan.steps[number]
                if step.more.get(field_, 0) > value:
                    steps = list(plan.steps)
                    steps[number] = type(step)(step.at, step.what, {**step.more, field_: value})
                    if fails(trial := _with(plan, steps=steps)):
                        plan = trial
                        break
    return plan


def _with(plan: Plan, **changes: Any) -> Plan:
    from dataclasses import replace

    made = replace(plan, **changes)
    there = {viewer["host"] for viewer in made.viewers}
    made.steps = [step for step in made.steps if step.more.get("viewer", "") in there or "viewer" not in step.more]
    return made


def _apart(plan: Plan, tell: Any = None) -> Outcome:
    """What `run` says, from a process of its own: every world begins in the same memory, and ends with it."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            told: Any = run(plan, tell)
        except BaseException:
            told = traceback.format_exc()
        sys.stdout.flush()
        with os.fdopen(writing, "wb") as out:
            pickle.dump(told, out)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        data = answer.read()
    os.waitpid(child, 0)
    told = pickle.loads(data) if data else "the process of this world has died"
    return told if isinstance(told, Outcome) else Outcome(crash=str(told))


# -- many seeds


def _many(given: Any) -> int:
    first, _, last = given.seeds.partition("-")
    brokers = ("memory", "redis") if given.broker == "both" else (given.broker,)
    span = range(int(first), int(last or first) + 1)
    after = _resumed(given.resume)
    todo = [(broker, seed) for seed in span if seed > after for broker in brokers]
    waiting = dict.fromkeys(todo)
    if given.corpus:
        known = [(broker, seed) for broker, seed in _corpus() if broker in brokers]
        todo = known + [each for each in todo if each not in set(known)]
    tally = _Tally(seam.real_clock())
    until = None if given.minutes is None else tally.began + 60 * given.minutes
    for played in _play(todo, given.jobs, until):
        tally.take(played)
        if not given.quiet:
            if played.error:
                print(f"seed {played.seed} on {played.broker} CRASHED\n{played.error}")
            if played.violations:
                print(f"seed {played.seed} on {played.broker}:")
            for violation in played.violations[:12]:
                print(f"    {violation}"[:400])
            sys.stdout.flush()
        if given.resume is not None and (played.broker, played.seed) in waiting:
            waiting.pop((played.broker, played.seed))
            given.resume.write_text(f"{next(iter(waiting))[1] - 1 if waiting else span[-1]}\n")
        if given.until_kind in played.kinds or (given.until_kind == "any" and played.kinds):
            print(f"{', '.join(played.kinds)} at seed {played.seed} on {played.broker}, after {tally.seeds} seeds")
            break
    _report(tally)
    if given.json:
        print(
            json.dumps(
                {
                    "seeds": tally.seeds,
                    "failed": tally.failed,
                    "kinds": tally.kinds,
                    "reached": tally.worlds,
                    "seconds": seam.real_clock() - tally.began,
                }
            )
        )
    return bool(tally.failed)


def _play(todo: Sequence[tuple[str, int]], jobs: int, until: float | None) -> Iterator[_Played]:
    if jobs <= 1:
        for each in todo:
            if until is not None and seam.real_clock() > until:
                return
            yield _play_one(*each)
        return
    lines = selectors.DefaultSelector()
    children = []
    for number in range(jobs):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            with os.fdopen(writing, "w") as out:
                for each in _play(todo[number::jobs], 1, until):
                    out.write(json.dumps(asdict(each)) + "\n")
                    out.flush()
            os._exit(0)
        os.close(writing)
        children.append(child)
        lines.register(os.fdopen(reading), selectors.EVENT_READ)
    try:
        while lines.get_map():
            for key, _ in lines.select():
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if line:
                    yield _Played(**json.loads(line))
                else:
                    lines.unregister(key.fileobj)
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _play_one(broker: str, seed: int) -> _Played:
    outcome = _apart(draw(seed, broker))
    error = outcome.crash
    kinds = sorted({violation.kind for violation in outcome.violations} | ({"crash"} if error else set()))
    texts = [str(violation) for violation in outcome.violations]
    return _Played(broker, seed, texts, kinds, dict(outcome.reached), outcome.trace, error)


def _report(tally: _Tally) -> None:
    seconds = seam.real_clock() - tally.began
    print(f"{tally.seeds} seeds, {60 * tally.seeds / max(seconds, 0.001):,.0f} a minute; {len(tally.failed)} failed")
    for kind, count in tally.kinds.most_common():
        print(f"    {kind:10} in {count:5} seeds, first in {tally.first[kind]}")
    print(f"{'reached':44} {'times':>8} {'seeds':>6}")
    for what, count in sorted(tally.reached.items()):
        print(f"{what:44} {count:8,} {tally.worlds[what]:6}")


def _corpus() -> list[tuple[str, int]]:
    """The lines of corpus.txt: `<broker> <seed>  why`."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines() if CORPUS.exists() else []
    words = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return [(broker, int(seed)) for broker, seed, *_ in words]


def _resumed(file: Path | None) -> int:
    if file is None or not file.exists():
        return 0
    return int(file.read_text().strip() or 0)
