"""Whatever befalls nodes, Redis, people and publishers at once: a few fixed seeds of what `tests/ordeal` has no end of."""

import asyncio

import pytest

from tests.ordeal.__main__ import run_random
from tests.ordeal.outcome import COLUMNS, Results
from tests.ordeal.schedule import draw

SEEDS = [("single", 3), ("single", 10), ("single", 15), ("sentinel", 1), ("cluster", 2)]
"""Chosen for their faults: each has others."""


def test_a_seed_draws_the_same_schedule_again_and_another_seed_another():
    assert draw(7, "single") == draw(7, "single")
    assert draw(7, "single") != draw(8, "single")


@pytest.mark.parametrize("on", ["single", "sentinel", "cluster"])
def test_no_fault_outlasts_the_calm_in_which_all_must_come_right(on):
    for seed in range(200):
        for fault in draw(seed, on).faults:
            assert fault.at - fault.lead > 0
            assert fault.at + fault.lasts < 11


def test_seeds_draw_every_kind_of_fault():
    drawn = {on: {fault.kind for seed in range(300) for fault in draw(seed, on).faults} for on in ("single", "cluster")}
    assert {"kill_node", "freeze_redis", "forget", "age", "tear", "flush", "full", "read_only"} <= drawn["single"]
    assert {"move_slot", "fail_over"} <= drawn["cluster"]


@pytest.mark.timeout(180)
async def test_nothing_is_lost_doubled_or_out_of_order_whatever_happens_at_once(program, tmp_path):
    async with asyncio.timeout(170):
        rows = await run_random(SEEDS, Results(tmp_path / "results"), jobs=len(SEEDS), quiet=True)
    for row in rows:
        assert not row.error, row.error
        assert row.published > 100
        assert row.delivered > 1000
        wrong = {column: row.counts[column] for column in COLUMNS if row.counts[column]}
        assert not wrong, f"{row.on} {row.seed} ({row.faults}):\n" + "\n".join(row.violations[:20])


async def test_rows_are_kept_and_not_run_again(tmp_path):
    results = Results(tmp_path / "results")
    [row] = await asyncio.gather(_invented(results))
    assert await run_random([("single", 1)], Results(tmp_path / "results"), jobs=1) == [row]


async def _invented(results: Results):
    from tests.ordeal.outcome import Row

    row = Row(seed=1, on="single", faults="none", published=1)
    results.add(row)
    return row
