"""What every inbox keeps. One suite; each inbox that there is runs it."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from router.brokers.base import Bounds, Inbox, Origin
from router.brokers.link import link_to
from router.brokers.queue import MemoryInbox
from router.brokers.script import Scripts
from router.brokers.stream import RedisInbox
from router.errors import Unavailable

BOUNDS = Bounds(backlog=10, unread=5)
LONG = 60.0
"""Seconds that no test takes."""


@pytest.fixture
async def inbox(broker_url: str) -> AsyncIterator[Inbox]:
    if broker_url == "memory://":
        yield MemoryInbox(BOUNDS)
        return
    link = link_to(broker_url)
    scripts = Scripts(link.redis, refresh=link.refresh, lane_of=link.lane_of)
    yield RedisInbox(link.redis, scripts, BOUNDS)
    await scripts.close()
    await link.close()


async def put(inbox, *texts, kind="said"):
    for text in texts:
        await inbox.put(kind, Origin(project="p", user="ada", id=f"id-{text}"), text.encode())


async def take(inbox, *kinds, group="g", consumer="a", count=100, wait=0.0):
    return await inbox.take(kinds or ("said",), group, consumer, count, wait)


async def reclaim(inbox, consumer="b", group="g", idle=0.0, tries=5, count=100):
    return await inbox.reclaim(("said",), group, consumer, idle=idle, tries=tries, count=count)


def texts(messages):
    return [message.payload.decode() for message in messages]


async def test_messages_come_in_order_and_with_everything_that_is_known_of_them(inbox):
    origin = Origin(project="p", user="ada", session="s", at=7.5, id="x", traceparent="00-1-2-01")
    await inbox.put("said", origin, b'{"text":"\\n\xc3\xa4"}\n')
    await put(inbox, "b", "c")
    first, *others = await take(inbox)
    assert (first.kind, first.origin, first.payload, first.tries) == ("said", origin, b'{"text":"\\n\xc3\xa4"}\n', 1)
    assert (first.group, first.consumer, texts(others)) == ("g", "a", ["b", "c"])
    assert await take(inbox) == []


async def test_no_more_are_handed_out_than_were_asked_for(inbox):
    await put(inbox, *"abc")
    assert [texts(await take(inbox, count=2)) for _ in range(3)] == [["a", "b"], ["c"], []]


async def test_kinds_are_by_themselves_and_several_can_be_taken_at_once(inbox):
    await put(inbox, "a", "b")
    await put(inbox, "stop", kind="cancel")
    await put(inbox, "dead letters of nobody", kind="said:dead")
    assert texts(await take(inbox, "said", "cancel", count=1)) == ["a", "stop"]
    assert texts(await take(inbox, "cancel", "said")) == ["b"]


async def test_one_who_waits_is_handed_what_comes(inbox):
    await take(inbox)
    waiting = asyncio.create_task(take(inbox, wait=2.0))
    await asyncio.sleep(0)
    await put(inbox, "a")
    assert texts(await waiting) == ["a"]


async def test_a_wait_ends_with_nothing(inbox):
    assert await take(inbox, wait=0.001) == []


async def test_each_group_gets_everything_and_begins_with_the_oldest_that_is_there(inbox):
    await put(inbox, "a")
    assert texts(await take(inbox, group="one")) == ["a"]
    await put(inbox, "b")
    assert texts(await take(inbox, group="one")) == ["b"]
    assert texts(await take(inbox, group="two")) == ["a", "b"]


async def test_consumers_of_a_group_share_without_doubles(inbox):
    await take(inbox)
    await put(inbox, *"abcdefgh")
    shares = await asyncio.gather(*(take(inbox, consumer=str(n % 3), count=1) for n in range(12)))
    assert sorted(text for share in shares for text in texts(share)) == list("abcdefgh")


async def test_what_is_done_is_never_handed_out_again(inbox):
    await put(inbox, "a", "b")
    a, _ = await take(inbox)
    await inbox.done(a)
    await inbox.done(a)
    assert texts(await reclaim(inbox)) == ["b"]


async def test_what_one_group_has_done_another_still_gets_again(inbox):
    await put(inbox, "a")
    (one,), _ = await take(inbox, group="one"), await take(inbox, group="two")
    await inbox.done(one)
    assert await reclaim(inbox, group="one") == []
    assert texts(await reclaim(inbox, group="two")) == ["a"]


async def test_what_a_silent_consumer_had_goes_to_another_oldest_first(inbox):
    await put(inbox, *"abc")
    taken = await take(inbox)
    assert await reclaim(inbox, idle=LONG) == []
    again = await reclaim(inbox, count=2)
    assert [(m.entry, m.origin, m.payload, m.consumer, m.tries) for m in again] == [
        (m.entry, m.origin, m.payload, "b", 2) for m in taken[:2]
    ]
    assert await reclaim(inbox, "c", idle=LONG) == []


async def test_what_is_held_is_not_left_alone(inbox):
    await put(inbox, "a", "b")
    a, b = await take(inbox)
    await inbox.give_back(a, b, idle=LONG)
    assert await inbox.hold(b) == []
    (left,) = await reclaim(inbox, idle=LONG)
    assert (texts([left]), left.tries) == (["a"], 2)
    assert await reclaim(inbox, idle=LONG) == []
    assert await inbox.hold(b) == []


async def test_holding_a_message_is_no_try(inbox):
    await put(inbox, "a")
    (a,) = await take(inbox)
    for _ in range(5):
        await inbox.hold(a)
    assert [m.tries for m in await reclaim(inbox)] == [2]


async def test_one_who_was_silent_cannot_hold_or_give_back_what_another_took_over(inbox):
    await put(inbox, "a", "b")
    old = await take(inbox)
    new = await reclaim(inbox, "b", count=1)
    assert await inbox.hold(*old) == old[:1]
    await inbox.give_back(*old, idle=LONG)
    assert texts(await reclaim(inbox, "c", idle=LONG)) == ["b"]
    assert await inbox.hold(*new) == []


async def test_what_is_done_cannot_be_held(inbox):
    await put(inbox, "a")
    (a,) = await take(inbox)
    await inbox.done(a)
    assert await inbox.hold(a) == [a]
    assert await reclaim(inbox) == []


async def test_it_is_done_also_when_one_says_so_from_whom_it_was_taken_over(inbox):
    await put(inbox, "a")
    (a,) = await take(inbox)
    await reclaim(inbox, "b")
    await inbox.done(a)
    assert await reclaim(inbox, "c") == []


async def test_what_was_tried_often_enough_is_a_dead_letter_and_says_why(inbox):
    await put(inbox, "poison", "good")
    _, good = await take(inbox)
    await inbox.done(good)
    assert [m.tries for m in await reclaim(inbox, tries=3)] == [2]
    assert [m.tries for m in await reclaim(inbox, tries=3)] == [3]
    assert await inbox.dead("said") == []
    assert await reclaim(inbox, tries=3) == []
    (letter,) = await inbox.dead("said")
    assert (letter.kind, letter.payload, letter.origin.id, letter.group) == ("said", b"poison", "id-poison", "g")
    assert (letter.tries, letter.reason) == (3, "handed out as often as is tried, and never done")
    assert await reclaim(inbox, tries=99) == []


async def test_dead_letters_do_not_keep_others_from_being_reclaimed(inbox):
    await put(inbox, *"abc")
    await take(inbox, count=2)
    await reclaim(inbox)
    await take(inbox)
    assert texts(await reclaim(inbox, tries=2, count=1)) == ["c"]
    assert texts(await inbox.dead("said")) == ["a", "b"]


async def test_a_message_can_be_buried_at_once_by_whose_it_is(inbox):
    await put(inbox, "a", "b")
    a, b = await take(inbox)
    await inbox.bury(a, "cannot be read")
    assert [(m.payload, m.reason, m.tries) for m in await inbox.dead("said")] == [(b"a", "cannot be read", 1)]
    assert texts(await reclaim(inbox, "b")) == ["b"]
    await inbox.bury(b, "no longer mine")
    await inbox.bury(a, "twice")
    assert len(await inbox.dead("said")) == 1


async def test_a_dead_letter_that_is_put_back_goes_to_its_own_group_as_if_it_were_new(inbox):
    await put(inbox, "a")
    (a,), (other,) = await take(inbox, group="one"), await take(inbox, group="two")
    await inbox.done(other)
    await inbox.bury(a, "a mistake")
    dead = await inbox.dead("said")
    await inbox.revive(*dead)
    await inbox.revive(*dead)
    await put(inbox, "b")
    assert await inbox.dead("said") == []
    assert texts(await take(inbox, group="two")) == ["b"]
    back, b = await take(inbox, group="one")
    assert (back.payload, back.origin, back.tries, b.payload) == (b"a", a.origin, 1, b"b")
    assert texts(await reclaim(inbox, group="two")) == ["b"]


async def test_a_dead_letter_can_die_and_be_put_back_again(inbox):
    await put(inbox, "a")
    await take(inbox, group="two")
    for reason in ("first", "second"):
        (taken,) = await take(inbox)
        await inbox.bury(taken, reason)
        (letter,) = await inbox.dead("said")
        assert (letter.reason, letter.group, letter.tries) == (reason, "g", 1)
        await inbox.revive(letter)


async def test_nothing_that_a_group_has_not_done_is_dropped_for_what_is_new(inbox):
    await take(inbox)
    await put(inbox, *"0123456789")
    with pytest.raises(Unavailable, match="the backend is behind: 10 of `said`") as refused:
        await put(inbox, "x")
    assert refused.value.retry_after
    first, second, *_ = taken = await take(inbox)
    assert texts(taken) == list("0123456789")
    with pytest.raises(Unavailable):
        await put(inbox, "x")
    await inbox.done(second)
    with pytest.raises(Unavailable):
        await put(inbox, "x")
    await inbox.done(first)
    await put(inbox, "y", "z")
    assert texts(await take(inbox)) == ["y", "z"]
    assert texts(await reclaim(inbox)) == [*"23456789", "y", "z"]


async def test_the_group_that_is_furthest_behind_decides_what_is_kept(inbox):
    await take(inbox, group="quick"), await take(inbox, group="slow")
    await put(inbox, *"0123456789")
    await inbox.done(*await take(inbox, group="quick"))
    with pytest.raises(Unavailable):
        await put(inbox, "x")
    await inbox.done(*await take(inbox, group="slow", count=3))
    await put(inbox, "y")
    assert texts(await take(inbox, group="slow")) == [*"3456789", "y"]


async def test_while_there_is_no_group_the_newest_are_kept(inbox):
    await put(inbox, *"0123456789")
    assert texts(await take(inbox)) == list("56789")
    await put(inbox, *"abcde")
    assert texts(await take(inbox)) == list("abcde")


async def test_dead_letters_are_bounded_too(inbox):
    await take(inbox)
    for number in range(12):
        await put(inbox, str(number))
        await inbox.bury(*await take(inbox), "bad")
    assert texts(await inbox.dead("said")) == [str(number) for number in range(2, 12)]
    assert texts(await inbox.dead("said", 1)) == ["2"]
