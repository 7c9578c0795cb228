"""What a node holds counts as long as its lease, and is put right whenever it is in doubt."""

import asyncio

import pytest

from router.brokers import lease as lease_module
from router.brokers.base import Limits, Person
from router.brokers.lease import ANEW, DOUBTED, LEAVING, NODES, key
from router.errors import Unavailable

LIMITS = Limits(user=5, project=5, system=5)


def record(part):
    """The names of the scripts that `part` runs from now on."""
    calls = []
    send = part.scripts._send

    async def sent(asked):
        calls.extend(name for name, _, _ in asked)
        return await send(asked)

    part.scripts._send = sent
    return calls


async def test_a_claim_whose_answer_was_lost_takes_one_seat(one, table):
    one.scripts.lose = ["answer"]
    assert await one.seats.claim("ada", "p", LIMITS) is None
    assert await table.total() == await table.seats("user:ada") == await table.seats("project:p") == 1


async def test_the_last_seat_is_not_refused_because_the_answer_that_gave_it_was_lost(one):
    one.scripts.lose = ["answer"]
    assert await one.seats.claim("ada", "p", Limits(user=1)) is None


async def test_a_claim_that_failed_leaves_no_seat_behind(make, table):
    part = await make(patience=0.0)
    part.scripts.lose = ["answer"]
    with pytest.raises(Unavailable):
        await part.seats.claim("ada", "p", LIMITS)
    assert await table.total() == 1
    await part.lease.beat()
    assert await table.total() == 0


async def test_a_claim_that_nobody_waits_for_any_more_leaves_no_seat_behind(one, table):
    sent = asyncio.Event()
    send = one.scripts._send

    async def tell(calls):
        answers = await send(calls)
        sent.set()
        await asyncio.sleep(0)
        return answers

    one.scripts._send = tell
    claiming = asyncio.create_task(one.seats.claim("ada", "p", LIMITS))
    await sent.wait()
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    assert await table.total() == 1
    await one.lease.beat()
    assert await table.total() == 0


@pytest.mark.parametrize("lost", ["asked", "answer"])
async def test_a_release_that_failed_is_made_good_by_the_next_beat(make, table, lost):
    part = await make(patience=0.0)
    for _ in range(2):
        await part.seats.claim("ada", "p", LIMITS)
    part.scripts.lose = [lost]
    await part.seats.release("ada", "p")
    await part.lease.beat()
    assert await table.total() == await table.seats("user:ada") == 1


@pytest.mark.parametrize("lost", ["asked", "answer"])
async def test_a_release_that_had_to_be_tried_again_gives_back_one_seat(one, table, lost):
    for _ in range(2):
        await one.seats.claim("ada", "p", LIMITS)
    one.scripts.lose = [lost]
    await one.seats.release("ada", "p")
    await one.lease.beat()
    assert await table.total() == 1


async def test_what_reaches_the_server_after_its_lease_was_given_up_changes_nothing(one, client, table):
    await one.seats.claim("ada", "p", LIMITS)
    await one.roster.enter("p", "ada")
    old = one.lease.id
    await one.lease.renew()
    seats = (key("all"), key("user:ada"), key("project:p"))
    people = (key("here:p"), key("status:p"), LEAVING, DOUBTED, ANEW)
    late = [
        ("claim", seats, (old, 9, 9, 9, "ada", "c:")),
        ("release", seats, (old,)),
        ("enter", people, (old, "p", "ada", 0)),
        ("leave", people, (old, "p", "ada", 0, 0)),
    ]
    for name, keys, arguments in late:
        answer = await one.scripts.call(name, (NODES, key(f"held:{old}"), *keys), arguments)
        assert answer[0] == b"lease", name
    assert await one.scripts.call("begin", (NODES,), (old, 60_000)) == 0
    assert (await one.scripts.call("beat", (NODES, key("all"), key(f"held:{old}")), (old, 60_000)))[0] == 0
    assert (
        await one.scripts.call("register", (NODES, key("held:x"), LEAVING, key("epoch"), ANEW), (old, 9, "e", "all", 7))
        == []
    )
    assert await table.total() == 1
    assert await one.roster.people("p") == [Person("ada", 1)]


async def test_a_node_that_was_cut_off_takes_a_new_lease_with_everything_that_it_holds(one, two, table):
    for user in ("ada", "bob"):
        await one.seats.claim(user, "p", LIMITS)
    await table.lapse(one)
    assert await table.total() == 0
    await two.lease.beat()
    await one.lease.beat()
    assert await table.total() == await table.seats("project:p") == 2


async def test_a_claim_finds_out_that_the_lease_has_ended_and_does_not_wait_for_the_beat(one, table):
    await one.seats.claim("ada", "p", LIMITS)
    await table.lapse(one)
    await one.seats.claim("bob", "p", LIMITS)
    assert await table.total() == 2


async def test_many_claims_at_once_share_one_new_lease(one, table):
    await table.lapse(one)
    before = one.lease._number
    await asyncio.gather(*(one.seats.claim(str(number), "p", Limits(project=50)) for number in range(40)))
    assert (await table.total(), one.lease._number) == (40, before + 1)


async def test_a_server_that_forgot_everything_is_told_again_by_the_next_beat(one, two, client, table):
    await one.seats.claim("ada", "p", LIMITS)
    await one.roster.enter("p", "ada")
    await two.seats.claim("ada", "p", LIMITS)
    await client.flushdb()
    for part in (one, two):
        await part.lease.beat()
    assert await table.seats("user:ada") == 2
    assert await two.roster.people("p") == [Person("ada", 1)]


async def test_a_count_that_is_wrong_for_whatever_reason_is_noticed_by_the_beat(make, client, table):
    one = await make(compare=True)
    await one.seats.claim("ada", "p", LIMITS)
    await client.hincrby(key("all"), one.lease.id, 3)
    await one.lease.beat()
    assert await table.total() == 1
    await client.srem(key(f"held:{one.lease.id}"), "user:ada")
    await one.lease.beat()
    assert await client.scard(key(f"held:{one.lease.id}")) == 3


async def test_a_beat_without_doubt_keeps_the_lease(make):
    one = await make(compare=True)
    await one.roster.enter("p", "ada")
    await one.seats.claim("ada", "p", LIMITS)
    before = one.lease.id
    await one.lease.beat()
    assert one.lease.id == before


async def test_seats_are_never_counted_twice_nor_missing_while_they_are_written_anew(make, client, table, monkeypatch):
    monkeypatch.setattr(lease_module, "CHUNK", 3)
    part = await make()
    for number in range(10):
        await part.seats.claim(str(number), "p", Limits(project=50))
    seen = set()
    send = part.scripts._send

    async def look(calls):
        seen.add(await table.total())
        return await send(calls)

    part.scripts._send = look
    await part.lease.renew()
    assert seen | {await table.total()} == {10}


async def test_a_claim_waits_while_everything_is_written_anew_and_holds_in_the_new_lease(one, table):
    await one.seats.claim("ada", "p", LIMITS)
    calls = record(one)
    renewal = asyncio.create_task(one.lease.renew())
    await asyncio.sleep(0)
    await one.seats.claim("bob", "p", LIMITS)
    await renewal
    assert calls == ["register", "begin", "claim"]
    assert await table.total() == 2


async def test_a_claim_that_is_under_way_when_the_lease_changes_is_made_again(one, table):
    claiming = asyncio.create_task(one.seats.claim("ada", "p", LIMITS))
    await asyncio.sleep(0)
    await one.lease.renew()
    assert await claiming is None
    assert await table.total() == 1


async def test_what_is_given_back_while_everything_is_written_anew_is_given_back(one, table):
    await one.seats.claim("ada", "p", LIMITS)
    renewal = asyncio.create_task(one.lease.renew())
    while not len(one.scripts):
        await asyncio.sleep(0)
    await one.seats.release("ada", "p")
    await renewal
    await one.lease.beat()
    assert await table.total() == 0


@pytest.mark.parametrize("lost", [["asked"], ["answer"], [None, "asked"], [None, "answer"]])
async def test_a_new_lease_that_could_not_be_finished_is_tried_again_and_clears_itself_away(make, client, table, lost):
    part = await make(patience=0.0)
    for _ in range(2):
        await part.seats.claim("ada", "p", LIMITS)
    part.scripts.lose = ["asked"]
    await part.seats.release("ada", "p")
    part.scripts.lose = [None, *lost]  # the beat's own, then those of `register` and `begin`
    with pytest.raises(Unavailable):
        await part.lease.beat()
    await part.lease.beat()
    assert await table.total() == 1
    for lease, ends in await client.zrange(NODES, 0, -1, withscores=True):
        if ends < 0:  # begun and not finished: its time passes
            await client.zadd(NODES, {lease: -1})
    await part.lease.beat()
    assert await table.keys() == {"all", "user:ada", "project:p", f"held:{part.lease.id}"}


async def test_the_tenth_lease_ends_the_ninth(one, table):
    await one.seats.claim("ada", "p", LIMITS)
    for _ in range(12):
        await one.lease.renew()
        assert await table.total() == 1


async def test_what_a_dead_node_left_is_cleared_away_in_small_portions(make, client, table):
    dead, alive = await make(), await make()
    limits = Limits(user=1000, project=1000, system=1000)
    await asyncio.gather(*(dead.seats.claim(str(number), "p", limits) for number in range(450)))
    await table.lapse(dead)
    calls = record(alive)
    await alive.lease.beat()
    assert calls.count("reap") == 4  # 452 entries by 200, and one to see that there is no other
    assert await table.keys() == set()


async def test_what_is_given_back_leaves_nothing_behind(one, table):
    await one.seats.claim("ada", "p", LIMITS)
    await one.seats.release("ada", "p")
    assert await table.keys() == set()


async def test_a_node_that_ends_leaves_nothing_behind(one, table):
    await one.seats.claim("ada", "p", LIMITS)
    await one.lease.end()
    assert await table.keys() == set()


async def test_one_beat_prolongs_everything(one, client):
    limits = Limits(user=1000, project=1000, system=1000)
    await asyncio.gather(*(one.seats.claim(str(number), "p", limits) for number in range(300)))
    calls = record(one)
    before = await client.zscore(NODES, one.lease.id)
    await asyncio.sleep(0.002)
    await one.lease.beat()
    assert calls == ["beat", "reap"]
    assert await client.zscore(NODES, one.lease.id) > before


async def test_a_beat_that_fails_is_not_the_last_one(one, monkeypatch, caplog):
    beats = []
    enough = asyncio.Event()

    async def beat():
        beats.append(1)
        if len(beats) == 3:
            enough.set()
        raise (Unavailable("away"), RuntimeError("a bug"))[len(beats) % 2]

    monkeypatch.setattr(one.lease, "beat", beat)
    monkeypatch.setattr(one.lease, "_length", 0.003)
    keeping = asyncio.create_task(one.lease.keep())
    await enough.wait()
    assert not keeping.done()
    keeping.cancel()
    assert [record.event for record in caplog.records if hasattr(record, "event")][:1] == ["lease_failed"]


async def test_what_a_lease_that_was_given_up_had_is_cleared_away_at_once(one, table):
    await one.roster.enter("p", "ada")
    keeping = asyncio.create_task(one.lease.keep())
    await one.lease.renew()
    async with asyncio.timeout(5):
        while len([key for key in await table.keys() if key.startswith("held:")]) > 1:
            await asyncio.sleep(0.001)
    keeping.cancel()
