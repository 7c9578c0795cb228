"""CI's share of the simulation: fixed seeds in a process of their own, whose clocks and chance are the simulation's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MEMORY_SEEDS = 700
REDIS_SEEDS = 300
"""Together a thousand. Long runs are started by hand: `python -m tests.simulation --minutes 60 --resume <file>`."""
JOBS = os.cpu_count() or 1
REPLAYED = {"memory": (1, 2, 3), "redis": (1, 2, 3)}

REACHED = {
    "memory": {
        "a full buffer",
        "a merged event",
        "a move within a window",
        "a redelivery",
        "a resync",
        "recovered: false",
        "recovered: true",
    },
    "redis": {
        "a command failed: after",
        "a command failed: before",
        "a command failed: late",
        "a command failed: never",
        "a flush",
        "a full buffer",
        "a merged event",
        "a move within a window",
        "a node was killed",
        "a node was stopped",
        "a redelivery",
        "a resync",
        "a subscription was killed",
        "a wrong clock",
        "an event that a node cannot read",
        "back with everything",
        "back with nothing",
        "back with snapshot",
        "recovered: false",
        "recovered: true",
        "redis said OOM",
        "redis said READONLY",
    },
}
"""What has to have happened, or that nothing failed would say nothing."""


def simulate(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=1500
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("broker", "seeds"), [("memory", MEMORY_SEEDS), ("redis", REDIS_SEEDS)])
def test_no_seed_breaks_a_promise(broker: str, seeds: int) -> None:
    told = simulate("--broker", broker, "--seeds", f"1-{seeds}", "--corpus", "--jobs", str(JOBS), "--json")
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    assert not found["failed"], told[-6000:]
    assert found["seeds"] >= seeds
    assert not REACHED[broker] - found["reached"].keys()


@pytest.mark.parametrize("broker", ["memory", "redis"])
def test_a_seed_plays_again_exactly(broker: str) -> None:
    for seed in REPLAYED[broker]:
        once, again = (simulate("--broker", broker, "--seed", str(seed), "--trace") for _ in range(2))
        assert once == again
