"""Who is here, over several nodes: joined and departed are told once, whatever becomes of nodes and answers."""

import asyncio

import pytest

from router.brokers.base import Arrived, Notice, Person
from router.brokers.lease import ANEW, DOUBTED, LEAVING
from router.errors import Unavailable


async def pass_grace(client):
    """As if the grace of all who are leaving were over, and time enough had passed for what is to be told again."""
    await pass_time(client, LEAVING, DOUBTED)


async def pass_time(client, *names):
    """As if it were time to tell of all of these."""
    for name in names:
        for who in await client.zrange(name, 0, -1):
            await client.zadd(name, {who: 1})


async def arrive(part, user):
    """Somebody enters, and is told as joined if so it is."""
    arrived = await part.roster.enter("p", user)
    if arrived.joined:
        await part.roster.told([Notice("p", arrived.person)])
    return arrived


async def departed(part):
    """Whom `part` is to tell of as gone, and tells of; nobody else is to be told of."""
    notices = await part.roster.untold()
    assert not any(notice.here for notice in notices)
    await part.roster.told(notices)
    return [(notice.project, notice.person.user_id) for notice in notices]


async def recalled(part, client):
    """Who is here and is to be told of again by `part`: as joined, and only with their number."""
    await part.roster.untold()
    await pass_time(client, DOUBTED)
    notices = await part.roster.untold()
    await part.roster.told(notices)
    assert all(notice.here for notice in notices)
    return tuple(
        sorted((notice.project, notice.person.user_id) for notice in notices if notice.anew is anew)
        for anew in (True, False)
    )


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
    told = await asyncio.gather(*(departed(part) for part in parts))
    assert sorted(who for answer in told for who in answer) == sorted(("p", str(number)) for number in range(20))


async def test_whoever_comes_back_on_another_node_has_neither_left_nor_joined(one, two, client):
    await arrive(one, "ada")
    await one.roster.leave("p", "ada")
    assert not (await two.roster.enter("p", "ada")).joined
    await pass_grace(client)
    assert await recalled(two, client) == ([], [("p", "ada")])
    assert await one.roster.untold() == await two.roster.untold() == []


async def test_people_of_a_dead_node_leave_a_grace_after_it_was_cleared_away(one, two, client, table):
    await arrive(one, "ada")
    await arrive(one, "bob")
    await two.roster.enter("p", "bob")
    await table.lapse(one)
    assert await two.roster.people("p") == [Person("ada", 0), Person("bob", 1)]
    await two.lease.beat()
    assert await recalled(two, client) == ([], [("p", "bob")])
    await pass_grace(client)
    assert await departed(two) == [("p", "ada")]
    assert await two.roster.people("p") == [Person("bob", 1)]


@pytest.mark.parametrize("cleared", [False, True])
async def test_whoever_comes_from_a_dead_node_has_not_joined_again(one, two, client, table, cleared):
    await arrive(one, "ada")
    await two.roster.set_status("p", "ada", "editing")
    await table.lapse(one)
    if cleared:
        await two.lease.beat()
    assert await two.roster.enter("p", "ada") == Arrived(Person("ada", 1, "editing"), joined=False)
    await two.lease.beat()
    await pass_grace(client)
    assert await recalled(two, client) == ([], [("p", "ada")])
    assert await two.roster.untold() == []


async def test_one_who_is_due_but_here_is_not_told(one, client):
    await one.roster.enter("p", "ada")
    await client.zadd(LEAVING, {"p ada": 1})
    assert await one.roster.untold() == []
    assert await client.zcard(LEAVING) == 0


async def test_a_departure_is_handed_out_again_if_its_node_dies_before_it_was_told(one, two, client):
    await one.roster.enter("p", "ada")
    await one.roster.told([Notice("p", Person("ada", 1))])
    await one.roster.leave("p", "ada")
    await pass_grace(client)
    [first] = await one.roster.untold()
    assert not first.here
    assert await two.roster.untold() == []
    await pass_grace(client)
    [again] = await two.roster.untold()
    assert (again.person, again.here) == (first.person, False)
    await two.roster.told([again])
    assert await client.exists(DOUBTED, ANEW) == 0


@pytest.mark.parametrize("lost", ["asked", "answer"])
async def test_also_when_the_answer_or_what_was_told_is_lost_for_good(make, client, lost):
    part = await make(grace=0.0, patience=0.0)
    await part.roster.enter("p", "ada")
    await part.roster.leave("p", "ada")
    part.scripts.lose = [lost]
    with pytest.raises(Unavailable):
        await part.roster.untold()
    await pass_grace(client)
    notices = await part.roster.untold()
    part.scripts.lose = ["asked"]
    with pytest.raises(Unavailable):
        await part.roster.told(notices)
    await pass_grace(client)
    assert await departed(part) == [("p", "ada")]
    await pass_grace(client)
    assert await part.roster.untold() == []


@pytest.mark.parametrize("late", [False, True])
async def test_whoever_comes_back_while_they_are_told_as_gone_is_told_as_joined_once_more(one, two, client, late):
    await one.roster.enter("p", "ada")
    await one.roster.leave("p", "ada")
    await pass_grace(client)
    notices = await one.roster.untold()
    if late:  # so that another node told it as well, and was done with it
        await pass_grace(client)
        assert await departed(two) == [("p", "ada")]
    assert (await two.roster.enter("p", "ada")).joined
    await two.roster.told([Notice("p", Person("ada", 1))])
    await one.roster.told(notices)
    await pass_grace(client)
    [notice] = await two.roster.untold()
    assert (notice.person, notice.here, notice.anew) == (Person("ada", 1), True, True)
    await two.roster.told([notice])
    assert await client.exists(DOUBTED, ANEW) == 0


async def test_who_joined_is_told_as_joined_by_others_if_their_node_dies_before_it_told(one, two, client, table):
    for user in ("ada", "bob"):
        await one.roster.enter("p", user)
        await two.roster.enter("p", user)
    await one.roster.told([Notice("p", Person("bob", 1))])
    await table.lapse(one)
    await two.lease.beat()
    await pass_grace(client)
    assert await recalled(two, client) == ([("p", "ada")], [("p", "bob")])


async def test_when_two_nodes_speak_of_a_person_the_last_word_is_what_is_so(one, two, client):
    await one.roster.enter("p", "ada")
    assert await client.exists(DOUBTED) == 0, "while there is one node it costs nothing"
    for what in (
        two.roster.enter("p", "ada"),
        two.roster.set_status("p", "ada", "reading"),
        one.roster.set_status("p", "ada", "writing"),
        two.roster.leave("p", "ada"),
    ):
        await what
        assert await one.roster.untold() == [], "what is under way comes first"
        await pass_grace(client)
        [notice] = await one.roster.untold()
        assert [notice.person] == await two.roster.people("p")
        await one.roster.told([notice])
        assert await client.exists(DOUBTED) == 0


@pytest.mark.parametrize("change", ["enter", "leave", "status"])
async def test_who_changes_while_they_are_told_is_told_once_more(one, two, client, change):
    await one.roster.enter("p", "ada")
    await two.roster.doubt([Notice("p", Person("ada", 0))])
    await pass_grace(client)
    notices = await two.roster.untold()
    if change == "status":
        await one.roster.set_status("p", "ada", "reading")
    else:
        await getattr(one.roster, change)("p", "ada")
    await two.roster.told(notices)
    await pass_time(client, DOUBTED)
    [notice] = await two.roster.untold()
    assert notice.person != notices[0].person
    assert notice.person.connections == {"enter": 2, "leave": 0, "status": 1}[change]


async def test_of_one_whom_nobody_knows_is_told_that_they_have_left(one, client):
    await one.roster.doubt([Notice("p", Person("ada", 0))])
    await pass_grace(client)
    assert await departed(one) == [("p", "ada")]


async def test_whose_lease_was_replaced_and_counts_the_same_is_not_told_again(one, two, client):
    await one.roster.enter("p", "ada")
    await one.lease.renew()
    await one.lease.beat()
    await pass_grace(client)
    assert await one.roster.untold() == await two.roster.untold() == []


async def test_a_leave_whose_answer_was_lost_is_told_after_the_lease_was_replaced(make, client):
    part = await make(grace=60.0, patience=0.0)
    await part.roster.enter("p", "ada")
    await part.roster.enter("p", "ada")
    part.scripts.lose = ["asked"]
    assert await part.roster.leave("p", "ada") is None
    await part.lease.beat()
    assert await part.roster.untold() == []
    await pass_grace(client)
    [notice] = await part.roster.untold()
    assert notice.person == Person("ada", 1)


async def test_who_asks_while_a_lease_is_replaced_sees_everybody(one, two, monkeypatch):
    await one.roster.enter("p", "ada")
    read = two.roster._read

    async def slow(name):
        monkeypatch.setattr(two.roster, "_read", read)
        await one.lease.renew()
        await one.lease.beat()
        return await read(name)

    monkeypatch.setattr(two.roster, "_read", slow)
    assert await two.roster.people("p") == [Person("ada", 1)]


async def test_the_last_who_left_before_the_server_forgot_everything_are_told_as_gone(one, client):
    await one.roster.enter("p", "ada")
    await one.roster.leave("p", "ada")
    await client.flushdb()
    await one.lease.beat()
    await one.roster.untold()
    await pass_grace(client)
    assert await departed(one) == [("p", "ada")]


async def test_everybody_is_told_anew_after_the_server_forgot_everything(one, client):
    await one.roster.enter("p", "ada")
    await client.flushdb()
    await one.lease.beat()
    assert await recalled(one, client) == ([("p", "ada")], [])


async def test_joined_is_not_lost_with_its_answer(one, client):
    one.scripts.lose = ["answer"]
    assert await one.roster.enter("p", "ada") == Arrived(Person("ada", 1), joined=False)
    assert await recalled(one, client) == ([("p", "ada")], [])
    assert await recalled(one, client) == ([], [])


async def test_nor_told_twice_when_it_was_the_request_that_was_lost(one, client):
    one.scripts.lose = ["asked"]
    assert (await one.roster.enter("p", "ada")).joined
    assert await recalled(one, client) == ([], [])


async def test_joined_is_not_lost_with_an_enter_that_failed_after_it_was_counted(make, client):
    part, other = await make(grace=60.0, patience=0.0), await make(grace=60.0)
    part.scripts.lose = ["answer"]
    with pytest.raises(Unavailable):
        await part.roster.enter("p", "ada")
    assert not (await other.roster.enter("p", "ada")).joined
    await part.lease.beat()
    assert await recalled(part, client) == ([("p", "ada")], [])


async def test_an_enter_that_never_came_there_is_not_told(make, client):
    part = await make(patience=0.0)
    part.scripts.lose = ["asked"]
    with pytest.raises(Unavailable):
        await part.roster.enter("p", "ada")
    await part.lease.beat()
    assert await recalled(part, client) == ([], [])


async def test_it_is_told_also_when_the_first_try_to_write_anew_failed(make, client):
    part = await make(grace=60.0, patience=0.0)
    part.scripts.lose = ["answer"]
    with pytest.raises(Unavailable):
        await part.roster.enter("p", "ada")
    part.scripts.lose = [None, "asked"]
    with pytest.raises(Unavailable):
        await part.lease.beat()
    await part.lease.beat()
    assert await recalled(part, client) == ([("p", "ada")], [])


async def test_an_enter_that_failed_is_a_departure_if_it_was_counted(make, client):
    part = await make(grace=60.0, patience=0.0)
    part.scripts.lose = ["answer"]
    with pytest.raises(Unavailable):
        await part.roster.enter("p", "ada")
    await part.lease.beat()
    await pass_grace(client)
    assert await departed(part) == [("p", "ada")]
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
    assert await departed(part) == [("p", "ada")]


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
        await arrive(one, user)
    await two.roster.enter("p", "bob")
    await table.lapse(one)
    await two.lease.beat()
    assert await recalled(two, client) == ([], [("p", "bob")])
    await pass_grace(client)
    assert await departed(two) == [("p", "ada")]
    await one.lease.beat()
    assert await recalled(one, client) == ([("p", "ada")], [("p", "bob")])
    assert await recalled(one, client) == ([], [])
    assert await two.roster.people("p") == [Person("ada", 1), Person("bob", 2)]


async def test_one_who_was_told_while_the_first_try_to_write_anew_failed_has_returned_too(make, client, table):
    part, other = await make(patience=0.0), await make()
    await part.roster.enter("p", "ada")
    await table.lapse(part)
    await other.lease.beat()
    assert await departed(other) == [("p", "ada")]
    part.scripts.lose = [None, None, "asked"]  # beat, register, begin
    with pytest.raises(Unavailable):
        await part.lease.beat()
    await part.lease.beat()
    assert await recalled(part, client) == ([("p", "ada")], [])


async def test_whose_node_is_back_within_the_grace_has_not_left(one, two, client, table):
    await arrive(one, "ada")
    await table.lapse(one)
    await two.lease.beat()
    await one.lease.beat()
    assert await client.zcard(LEAVING) == 0
    assert await one.roster.people("p") == [Person("ada", 1)]
    assert await recalled(one, client) == ([], [("p", "ada")])


async def test_nothing_is_kept_of_people_who_have_left(make, table):
    part = await make(grace=0.0)
    await part.roster.enter("p", "ada")
    await part.roster.set_status("p", "ada", "editing")
    await part.roster.leave("p", "ada")
    assert await departed(part) == [("p", "ada")]
    assert await table.keys() == set()


async def test_who_counted_for_nobody_while_the_next_lease_was_written_down_is_told_again(one, client, table):
    await arrive(one, "ada")
    send = one.scripts._send

    async def lapse(calls):
        answers = await send(calls)
        if calls[0][0] == "register":
            await table.lapse(one)
        return answers

    one.scripts._send = lapse
    await one.lease.renew()
    assert await recalled(one, client) == ([], [("p", "ada")])


async def test_joined_is_not_lost_when_the_lease_was_replaced_before_the_answer_that_it_is_uncertain(
    one, client, monkeypatch
):
    call = one.lease._call

    async def late(*what):
        monkeypatch.setattr(one.lease, "_call", call)
        answer = await call(*what)
        await one.lease.renew()
        return answer

    monkeypatch.setattr(one.lease, "_call", late)
    one.scripts.lose = ["answer"]
    assert not (await one.roster.enter("p", "ada")).joined
    assert await recalled(one, client) == ([("p", "ada")], [])
