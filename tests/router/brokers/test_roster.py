"""Who is here, over several nodes: joined and departed are told once, whatever becomes of nodes and answers."""

import asyncio

import pytest

from router.brokers.base import Arrived, Person
from router.brokers.lease import LEAVING, key
from router.errors import Unavailable


async def pass_grace(client):
    """As if the grace of all who are leaving were over."""
    for who in await client.zrange(LEAVING, 0, -1):
        await client.zadd(LEAVING, {who: 1})


@pytest.fixture
async def one(make):
    return await make(grace=60.0)


@pytest.fixture
async def two(make):
    return await make(grace=60.0)


async def test_people_are_counted_over_nodes(one, two):
    assert (await one.roster.enter("p", "ada")).joined
    assert await two.roster.enter("p", "ada") == Arrived(Person("ada", 2), joined=False)
    assert await one.roster.leave("p", "ada") == Person("ada", 1)
    assert await one.roster.people("p") == await two.roster.people("p") == [Person("ada", 1)]


async def test_each_departure_is_told_to_one_node(make):
    parts = [await make(grace=0.0) for _ in range(3)]
    for number in range(20):
        await parts[0].roster.enter("p", str(number))
        await parts[0].roster.leave("p", str(number))
    told = await asyncio.gather(*(part.roster.departed() for part in parts))
    assert sorted(who for answer in told for who in answer) == sorted(("p", str(number)) for number in range(20))


async def test_whoever_comes_back_on_another_node_has_neither_left_nor_joined(one, two, client):
    await one.roster.enter("p", "ada")
    await one.roster.leave("p", "ada")
    assert not (await two.roster.enter("p", "ada")).joined
    await pass_grace(client)
    assert await one.roster.departed() == await two.roster.departed() == []


async def test_people_of_a_dead_node_leave_a_grace_after_it_was_cleared_away(one, two, client, table):
    await one.roster.enter("p", "ada")
    await one.roster.enter("p", "bob")
    await two.roster.enter("p", "bob")
    await table.lapse(one)
    assert await two.roster.people("p") == [Person("ada", 0), Person("bob", 1)]
    await two.lease.beat()
    assert await two.roster.departed() == []
    await pass_grace(client)
    assert await two.roster.departed() == [("p", "ada")]
    assert await two.roster.people("p") == [Person("bob", 1)]


@pytest.mark.parametrize("cleared", [False, True])
async def test_whoever_comes_from_a_dead_node_has_not_joined_again(one, two, client, table, cleared):
    await one.roster.enter("p", "ada")
    await two.roster.set_status("p", "ada", "editing")
    await table.lapse(one)
    if cleared:
        await two.lease.beat()
    assert await two.roster.enter("p", "ada") == Arrived(Person("ada", 1, "editing"), joined=False)
    await two.lease.beat()
    await pass_grace(client)
    assert await two.roster.departed() == []


async def test_one_who_is_due_but_here_is_not_told(one, client):
    await one.roster.enter("p", "ada")
    await client.zadd(LEAVING, {"p ada": 1})
    assert await one.roster.departed() == []
    assert await client.zcard(LEAVING) == 0


async def test_an_answer_with_departed_people_that_was_lost_is_given_again(make):
    part = await make(grace=0.0)
    await part.roster.enter("p", "ada")
    await part.roster.leave("p", "ada")
    part.scripts.lose = ["answer"]
    assert await part.roster.departed() == [("p", "ada")]
    assert await part.roster.departed() == []


async def test_also_when_it_took_until_the_next_second(make):
    part = await make(grace=0.0, patience=0.0)
    for user in ("ada", "bob"):
        await part.roster.enter("p", user)
        await part.roster.leave("p", user)
        part.scripts.lose = ["answer"]
        with pytest.raises(Unavailable):
            await part.roster.departed()
        assert await part.roster.departed() == [("p", user)]
    assert await part.roster.departed() == []


async def test_joined_is_not_lost_with_its_answer(one):
    one.scripts.lose = ["answer"]
    assert await one.roster.enter("p", "ada") == Arrived(Person("ada", 1), joined=False)
    assert await one.roster.returned() == [("p", "ada")]
    assert await one.roster.returned() == []


async def test_nor_told_twice_when_it_was_the_request_that_was_lost(one):
    one.scripts.lose = ["asked"]
    assert (await one.roster.enter("p", "ada")).joined
    assert await one.roster.returned() == []


async def test_joined_is_not_lost_with_an_enter_that_failed_after_it_was_counted(make):
    part, other = await make(grace=60.0, patience=0.0), await make(grace=60.0)
    part.scripts.lose = ["answer"]
    with pytest.raises(Unavailable):
        await part.roster.enter("p", "ada")
    assert not (await other.roster.enter("p", "ada")).joined
    assert await part.roster.returned() == []
    await part.lease.beat()
    assert await part.roster.returned() == [("p", "ada")]


async def test_an_enter_that_never_came_there_is_not_told(make):
    part = await make(patience=0.0)
    part.scripts.lose = ["asked"]
    with pytest.raises(Unavailable):
        await part.roster.enter("p", "ada")
    await part.lease.beat()
    assert await part.roster.returned() == []


async def test_it_is_told_also_when_the_first_try_to_write_anew_failed(make):
    part = await make(grace=60.0, patience=0.0)
    part.scripts.lose = ["answer"]
    with pytest.raises(Unavailable):
        await part.roster.enter("p", "ada")
    part.scripts.lose = [None, "asked"]
    with pytest.raises(Unavailable):
        await part.lease.beat()
    await part.lease.beat()
    assert await part.roster.returned() == [("p", "ada")]


async def test_an_enter_that_failed_is_a_departure_if_it_was_counted(make, client):
    part = await make(grace=60.0, patience=0.0)
    part.scripts.lose = ["answer"]
    with pytest.raises(Unavailable):
        await part.roster.enter("p", "ada")
    await part.lease.beat()
    await pass_grace(client)
    assert await part.roster.departed() == [("p", "ada")]
    assert await part.roster.people("p") == []


@pytest.mark.parametrize("lost", ["asked", "answer"])
async def test_a_leave_that_failed_is_made_good_by_the_next_beat(make, client, lost):
    part = await make(grace=60.0, patience=0.0)
    await part.roster.enter("p", "ada")
    part.scripts.lose = [lost]
    assert await part.roster.leave("p", "ada") is None
    await part.lease.beat()
    assert await part.roster.people("p") == [Person("ada", 0)]
    await pass_grace(client)
    assert await part.roster.departed() == [("p", "ada")]


@pytest.mark.parametrize("lost", ["asked", "answer"])
async def test_a_leave_that_had_to_be_tried_again_is_one_connection_less(one, lost):
    for _ in range(2):
        await one.roster.enter("p", "ada")
    one.scripts.lose = [lost]
    assert await one.roster.leave("p", "ada") is None
    await one.lease.beat()
    assert await one.roster.people("p") == [Person("ada", 1)]


async def test_one_who_was_told_as_departed_while_the_node_was_cut_off_has_returned(one, two, client, table):
    for user in ("ada", "bob"):
        await one.roster.enter("p", user)
    await two.roster.enter("p", "bob")
    await table.lapse(one)
    await two.lease.beat()
    await pass_grace(client)
    assert await two.roster.departed() == [("p", "ada")]
    await one.lease.beat()
    assert await one.roster.returned() == [("p", "ada")]
    assert await one.roster.returned() == []
    assert await two.roster.people("p") == [Person("ada", 1), Person("bob", 2)]


async def test_one_who_was_told_while_the_first_try_to_write_anew_failed_has_returned_too(make, client, table):
    part, other = await make(patience=0.0), await make()
    await part.roster.enter("p", "ada")
    await table.lapse(part)
    await other.lease.beat()
    assert await other.roster.departed() == [("p", "ada")]
    part.scripts.lose = [None, None, "asked"]  # beat, register, begin
    with pytest.raises(Unavailable):
        await part.lease.beat()
    await part.lease.beat()
    assert await part.roster.returned() == [("p", "ada")]


async def test_whose_node_is_back_within_the_grace_has_not_left(one, two, client, table):
    await one.roster.enter("p", "ada")
    await table.lapse(one)
    await two.lease.beat()
    await one.lease.beat()
    assert await client.zcard(LEAVING) == 0
    assert await one.roster.people("p") == [Person("ada", 1)]
    assert await one.roster.returned() == []


async def test_nothing_is_kept_of_people_who_have_left(make, table):
    part = await make(grace=0.0)
    await part.roster.enter("p", "ada")
    await part.roster.set_status("p", "ada", "editing")
    await part.roster.leave("p", "ada")
    await part.roster.departed()
    assert await table.keys() == {f"told:{part.name}"}
    assert 0 < await table.client.pttl(key(f"told:{part.name}")) <= 600_000
