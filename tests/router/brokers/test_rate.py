"""One budget for a user on several nodes."""

import asyncio

import pytest

from router.brokers.base import Limits


@pytest.fixture
async def both(one, two):
    """Two nodes with a connection of ada on each; what one tells the other arrives."""
    assert await one.seats.claim("ada", "p", Limits()) is None
    assert await two.seats.claim("ada", "p", Limits()) is None
    one.seats.tell(b"elsewhere ada")
    return one, two


async def spend(*parts, cost=1.0, rate=10.0, burst=3.0, user="ada"):
    return [await part.rates.spend(user, cost, rate, burst) for part in parts]


async def test_two_nodes_share_one_budget(both):
    one, two = both
    assert await spend(one, two, one) == [0.0, 0.0, 0.0]
    (wait,) = await spend(two)
    assert 0 < wait <= 0.1


async def test_whoever_waits_as_long_as_they_were_told_passes(both):
    one, two = both
    assert await spend(one, one, two, rate=50.0) == [0.0, 0.0, 0.0]
    (wait,) = await spend(two, rate=50.0)
    await asyncio.sleep(wait)
    assert await spend(one, rate=50.0) == [0.0]


async def test_what_costs_more_takes_more(both):
    assert await spend(both[0], cost=2.5) == [0.0]
    assert (await spend(both[1]))[0] > 0.0
    assert await spend(both[1], cost=0.5) == [0.0]


async def test_nobody_else_is_asked_for(both):
    asked = []
    both[0].scripts._send = asked.append
    assert await spend(both[0], both[0], user="bob", burst=1.0) == [0.0, 0.0]
    assert asked == []


async def test_the_second_node_learns_it_from_its_claim_and_the_first_is_told(one, two, client):
    async with client.pubsub() as pubsub:
        await pubsub.subscribe(f"router:node:{one.name}")
        await one.seats.claim("ada", "p", Limits())
        await one.seats.claim("ada", "p", Limits())
        assert (one.rates.shared(), two.rates.shared()) == ([], [])
        await two.seats.claim("ada", "p", Limits())
        assert two.rates.shared() == ["ada"]
        heard = None
        while heard is None or heard["type"] != "message":
            heard = await pubsub.get_message(timeout=5)
        assert heard["data"] == b"elsewhere ada"


async def test_it_is_forgotten_with_the_last_seat_here(both):
    one, _ = both
    await one.seats.claim("ada", "p", Limits())
    await one.seats.release("ada", "p")
    assert one.rates.shared() == ["ada"]
    await one.seats.release("ada", "p")
    assert one.rates.shared() == []


async def test_it_is_forgotten_when_the_answer_says_that_they_are_nowhere_else(both):
    one, two = both
    await two.seats.release("ada", "p")
    await spend(one)
    assert one.rates.shared() == []


async def test_unless_they_came_back_while_it_was_on_its_way(both):
    one, two = both
    await two.seats.release("ada", "p")
    asking = asyncio.create_task(spend(one))
    await asyncio.sleep(0)
    one.seats.tell(b"elsewhere ada")
    await asking
    assert one.rates.shared() == ["ada"]


async def test_after_a_break_everybody_here_may_be_elsewhere(one):
    await one.seats.claim("ada", "p", Limits())
    one.seats.missed()
    assert one.rates.shared() == ["ada"]
    one.seats.tell(b"elsewhere gone")
    one.seats.tell(b"probe")
    one.seats.sweep()
    assert one.rates.shared() == ["ada"]


async def test_a_message_whose_answer_was_lost_is_not_counted_twice(both):
    one, _ = both
    one.scripts.lose = ["answer"]
    assert await spend(one, one, one) == [0.0, 0.0, 0.0]
    assert (await spend(one))[0] > 0.0


async def test_without_an_answer_it_passes_and_nobody_is_held_up_for_a_while(both, monkeypatch):
    one, _ = both
    asked = []

    async def silent(*call):
        asked.append(call)
        await asyncio.Event().wait()

    monkeypatch.setattr("router.brokers.rate.PATIENCE", 0.01)
    monkeypatch.setattr(one.scripts, "call", silent)
    assert await spend(*[one] * 5, burst=1.0) == [0.0] * 5
    assert len(asked) == 1


async def test_also_while_the_server_is_away(make):
    part = await make(patience=0.0)
    part.seats.tell(b"elsewhere ada")
    part.scripts.lose = ["asked"]
    assert await spend(part) == [0.0]
