"""Whatever befalls Redis: nobody loses a connection, and what people do not get they are told to reload."""

import pytest

from tests.ordeal import ORDEALS

RELOADS = {"forgotten", "flushed"}
"""What a Redis without its memory cannot give back."""
MAY_RELOAD = {"failed_over", "failed_over_frozen", "cluster_failed_over", "cluster_failed_over_sharded"}
"""A replica may not have got all that people were told of."""


@pytest.mark.parametrize("name", ORDEALS)
async def test_nothing_is_lost_in_silence_and_nothing_comes_twice(name, program):
    outcome = await ORDEALS[name](program)
    assert (outcome.lost, outcome.twice, outcome.dropped, outcome.refused) == (0, 0, 0, 0), str(outcome)
    assert outcome.published
    if name in RELOADS:
        assert outcome.reloads
    elif name not in MAY_RELOAD:
        assert not outcome.reloads
        assert outcome.delivered == 10 * outcome.published
