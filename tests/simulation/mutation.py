"""Whether the net is awake: breaks the router on purpose, a line at a time, and tells how soon a seed notices."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MUTATIONS", "Found", "Mutation", "Stale", "hunt", "main"]

ROOT = Path(__file__).parents[2]
BOTH = ("memory", "redis")


class Stale(Exception):
    """What a mutation replaces is not in the file any more: it has to be written anew for the code as it is."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """A slip as it happens when code is rebuilt: in `file`, `old` becomes `new`. It is never made in the work tree."""

    name: str
    file: str
    old: str
    new: str
    breaks: str
    """What promise that breaks."""
    brokers: tuple[str, ...] = BOTH
    """Where that code runs at all."""

    def apply(self, router: Path) -> None:
        """Make the change in a copy of the package. Raises `Stale`."""
        file = router / self.file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if text.count(self.old) != 1:
            raise Stale(f"{self.name}: router/{self.file} has this {text.count(self.old)} times, not once:\n{self.old}")
        file.write_text(text.replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one mutation on one broker. `seed` None: no seed noticed."""

    seed: int | None
    tried: int
    kinds: str
    seconds: float


MUTATIONS = (
    # -- recovery
    Mutation(
        "stretch-key-without-held",
        "stretch.py",
        "bookmark, whole, held, unread)",
        "bookmark, whole, unread)",
        "a page is given the history of another one, for which other events were held back: one is lost",
    ),
    Mutation(
        "join-without-release",
        "recovery.py",
        "        await self._holding.release(topic, bookmark.has)\n",
        "",
        "who moves within a window is sent what it has a second time, merged with more",
        ("redis",),
    ),
    Mutation(
        "join-before-flush",
        "recovery.py",
        "        await self._holding.release(topic, bookmark.has)\n        await self._hub.flush(topic)\n",
        "        await self._holding.release(topic, bookmark.has)\n",
        "what was let go for the others is written after the joining: the one who has it gets it again",
    ),
    Mutation(
        "enter-without-version",
        "recovery.py",
        "if starts[t].version != self.standings[t].version]",
        "if starts[t].epoch == '?']",
        "a client is welcomed with a position that a new numbering has overtaken, and is deaf from then on",
        ("redis",),
    ),
    Mutation(
        "known-left-out",
        "stretch.py",
        "conflate(missed, bookmark.known, repeat_critical",
        "conflate(missed, repeat_critical",
        "who comes back is sent again what it has beyond its position",
    ),
    Mutation(
        "arrived-passes-held",
        "standing.py",
        "return all_but(self._holding.held(topic) | standing.unread, standing.seen)",
        "return all_but(standing.unread, standing.seen)",
        "who catches up is told that it has what is still held back: it drops it as seen",
    ),
    # -- hub
    Mutation(
        "pause-without-away",
        "hub.py",
        "                self.away(session, topic)\n                self.leave(session, topic)\n            self.slow.",
        "                self.leave(session, topic)\n            self.slow.",
        "who reads slowly misses presence and whatever else has no number, and is not told",
    ),
    Mutation(
        "leave-without-bookmark",
        "hub.py",
        "        session.bookmarks[topic] = room.bookmark\n",
        "",
        "who reads slowly is sent again all that it got since it joined",
    ),
    Mutation(
        "floor-not-written",
        "hub.py",
        "count += await self._write(room, envelopes, floor)",
        "count += await self._write(room, envelopes, None)",
        "an event that a node cannot read counts as received by whoever hears what comes after it there",
        ("redis",),
    ),
    # -- continuity
    Mutation(
        "last-number-again",
        "brokers/continuity.py",
        "if arrived.seq <= topic.seq:",
        "if arrived.seq < topic.seq:",
        "the event at which history and the live stream meet is shown twice",
        ("redis",),
    ),
    Mutation(
        "old-not-skipped",
        "brokers/continuity.py",
        "if index < old and (arrived.seq or arrived.loose):",
        "if index < old and arrived.loose:",
        "a message of an epoch that is over makes the topic wait for ever: everybody is deaf",
        ("redis",),
    ),
    Mutation(
        "doubt-dropped",
        "brokers/continuity.py",
        "        topic.doubtful |= doubtful\n",
        "",
        "what a Redis gave out and lost while a node heard nothing is passed over in silence",
        ("redis",),
    ),
    Mutation(
        "loose-not-counted",
        "brokers/continuity.py",
        "if arrived.epoch != topic.epoch or arrived.loose > topic.loose + 1:",
        "if arrived.epoch != topic.epoch:",
        "presence that was published while a subscription was renewed is lost",
        ("redis",),
    ),
    Mutation(
        "numbers-given-twice",
        "brokers/continuity.py",
        "return rest is not None and topic.last != 0 and hash(rest) != topic.last",
        "return False",
        "numbers that a Redis with less memory gives out anew are taken for those that were seen",
        ("redis",),
    ),
    # -- windows
    Mutation(
        "position-past-held",
        "pacing.py",
        "pos = self._seen if floor is None else floor - 1",
        "pos = self._seen",
        "a position passes what is held back: who comes back misses it",
    ),
    Mutation(
        "first-forgotten",
        "pacing.py",
        "first = pending.first or new.first",
        "first = new.first",
        "a merged event is taken for its newest part: a position passes older parts that go out after others",
    ),
    Mutation(
        "subject-not-flushed",
        "pacing.py",
        "elif about == subject and (subject or kind is type(envelope.event)):",
        "elif about == subject and kind is type(envelope.event):",
        "what goes at once overtakes what is held about the same thing",
    ),
    Mutation(
        "timer-not-forgotten",
        "middleware/coalesce.py",
        "        self._timers.pop(topic, None)\n",
        "",
        "after a new numbering nothing that is throttled is ever let go",
    ),
    Mutation(
        "not-armed-again",
        "middleware/coalesce.py",
        "            released = window.flush(self._clock())\n            self._arm(key, window, forward)\n",
        "            released = window.flush(self._clock())\n",
        "of two window lengths only the first is ever flushed",
    ),
)


@contextmanager
def mutated(mutation: Mutation | None) -> Iterator[Path]:
    """A folder from which a mutated router is imported, with these tests. None: the router as it is."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        shutil.copytree(ROOT / "router", folder / "router")
        for other in ("tests", "plugins"):
            (folder / other).symlink_to(ROOT / other)
        if mutation is not None:
            mutation.apply(folder / "router")
        yield folder


def hunt(mutation: Mutation, broker: str, first: int, last: int) -> Found:
    """Play seeds against the mutated router until one breaks a promise that the router as it is keeps. Raises `Stale`."""
    began, tried = time.monotonic(), 0
    with mutated(mutation) as broken, mutated(None) as whole:
        while first <= last:
            told = _play(broken, broker, first, last)
            tried += told["seeds"]
            if not told["failed"]:
                break
            _, seed, kinds = told["failed"][0]
            if not _play(whole, broker, seed, seed)["failed"]:
                return Found(seed, tried, ", ".join(kinds), time.monotonic() - began)
            first = seed + 1  # the router's own fault, whatever else it may be
    return Found(None, tried, "", time.monotonic() - began)


def _play(folder: Path, broker: str, first: int, last: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.simulation", "--broker", broker, "--seeds", f"{first}-{last}"]
    done = subprocess.run(
        [*command, "--until-kind", "any", "--quiet", "--json"],
        cwd=folder,  # where `-m` looks first
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutation", description=__doc__)
    parser.add_argument("--most", type=int, default=300, help="Seeds on each broker.")
    parser.add_argument("--from", type=int, default=1, dest="first", metavar="SEED")
    parser.add_argument("--broker", choices=(*BOTH, "both"), default="both")
    parser.add_argument("names", nargs="*", help="Mutations; all of them without.")
    given = parser.parse_args(arguments)
    unknown = set(given.names) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(m.name for m in MUTATIONS)}")
    chosen = [mutation for mutation in MUTATIONS if mutation.name in given.names or not given.names]
    for mutation in chosen:  # before any time is spent
        with mutated(mutation):
            pass
    unseen = 0
    print(f"{'mutation':26} {'broker':7} {'first':>6} {'seeds':>6} {'seconds':>8}  kinds", flush=True)
    for mutation in chosen:
        noticed = False
        for broker in mutation.brokers:
            if given.broker in (broker, "both"):
                found = hunt(mutation, broker, given.first, given.first + given.most - 1)
                noticed |= found.seed is not None
                first = "-" if found.seed is None else str(found.seed)
                row = f"{mutation.name:26} {broker:7} {first:>6} {found.tried:6} {found.seconds:8.1f}  {found.kinds}"
                print(row, flush=True)
        unseen += not noticed
    print(f"{len(chosen) - unseen} of {len(chosen)} mutations were noticed")
    return bool(unseen)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Stale as stale:
        sys.exit(f"{stale}\nWrite the mutation anew for the code as it is.")
