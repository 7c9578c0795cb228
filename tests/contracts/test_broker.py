"""What every broker keeps. One suite; each broker that there is runs it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from msgspec.structs import replace

from router import Event, Plugin, Policy
from router.brokers.base import Arrived, Broker, Limits, Notice, Person, Position
from router.brokers.memory import MemoryBroker
from router.brokers.redis import RedisBroker
from router.testing import Clock, envelope


class Said(Event, frozen=True, tag="said"):
    text: str


kept, fleeting = Plugin(Said), Plugin(Said, Policy(keep=False))


def message(text: str = "", id_: str | None = None, plugin: Plugin = kept, size: int = 10):
    made = envelope(plugin, Said(text=text), project="p")
    payload = json.dumps({"type": "said", "text": text, "fleeting": plugin is fleeting, "x": "x" * size}).encode()
    return replace(made, message_id=id_, payload=payload, published_at=time.time())


CLOCK = Clock()
TOPIC = "project:p"


def read(payload: bytes):
    event = json.loads(payload)
    plugin = fleeting if event.get("fleeting") else kept
    return Said(text=event["text"]), plugin.policy


@pytest.fixture
async def make(broker_url: str) -> AsyncIterator[Callable[..., Awaitable[Broker]]]:
    """Makes brokers of a kind, and stops them."""
    made: list[Broker] = []

    async def make(**options) -> Broker:
        arrived: list = []
        if broker_url == "memory://":
            broker: Broker = MemoryBroker(max_events=10, max_age=60.0, clock=CLOCK, **options)
        else:
            broker = RedisBroker(broker_url, read, max_events=10, max_age=60.0, **options)
        broker.arrived = arrived
        await broker.start(arrived.append, lambda topic, position: arrived.append((topic, position)))
        made.append(broker)
        return broker

    yield make
    for broker in made:
        await broker.stop()


@pytest.fixture
async def broker(make) -> Broker:
    return await make()


async def arrived(broker, count):
    """What arrived, once it is `count`; a probe of our own tells that nothing more is on its way."""
    for _ in range(2000):
        if len(broker.arrived) >= count:
            break
        await asyncio.sleep(0.001)
    return broker.arrived


async def test_a_position_is_that_of_the_last_event_and_asking_changes_nothing(broker):
    before = await broker.position(TOPIC)
    assert before.seq == 0
    assert await broker.position(TOPIC) == before
    published = [(await broker.publish(message(text))).position for text in "ab"]
    assert await broker.position(TOPIC) == published[-1] == Position(before.epoch, 2)
    await broker.publish(message("fleeting", plugin=fleeting))
    assert await broker.position(TOPIC) == published[-1]
    assert await broker.subscribe(TOPIC) == published[-1]
    assert (await broker.history(TOPIC, 0)).top == published[-1]
    assert published[-1].since == f"{before.epoch}:2"


async def test_numbers_of_a_topic_are_one_two_three_and_arrive_in_order(broker):
    await broker.subscribe(TOPIC)
    published = [(await broker.publish(message(text))).position.seq for text in "abc"]
    assert published == [1, 2, 3]
    assert [(e.event.text, e.seq, e.first) for e in await arrived(broker, 3)] == [("a", 1, 1), ("b", 2, 2), ("c", 3, 3)]


async def test_nothing_arrives_of_a_topic_that_nobody_subscribed_to(broker):
    await broker.publish(message("a"))
    await broker.subscribe(TOPIC)
    await broker.unsubscribe(TOPIC)
    await broker.publish(message("b"))
    before = (await broker.subscribe(TOPIC)).seq
    after = (await broker.publish(message("c"))).position.seq
    # Through a cluster "b" may come as late as this; then the position is before it.
    assert [e.seq for e in await arrived(broker, after - before)] == list(range(before + 1, after + 1))


async def test_subscriptions_count(broker):
    await broker.subscribe(TOPIC)
    await broker.subscribe(TOPIC)
    await broker.unsubscribe(TOPIC)
    await broker.publish(message("a"))
    assert [e.event.text for e in await arrived(broker, 1)] == ["a"]


async def test_subscribing_tells_the_position_after_which_everything_arrives(broker):
    await broker.publish(message("a"))
    position = await broker.subscribe(TOPIC)
    published = await broker.publish(message("b"))
    assert (position.seq, published.position.seq) == (1, 2)
    assert position.epoch == published.position.epoch


async def test_the_same_message_id_is_published_once(broker):
    await broker.subscribe(TOPIC)
    first = await broker.publish(message("a", "id"))
    again = await broker.publish(message("a", "id"))
    assert (again.position, again.duplicate, first.duplicate) == (first.position, True, False)
    await broker.publish(message("b"))
    assert [e.event.text for e in await arrived(broker, 2)] == ["a", "b"]


async def test_history_has_what_came_after_a_number(broker):
    for text in "abc":
        await broker.publish(message(text))
    history = await broker.history(TOPIC, 1)
    assert ([e.event.text for e in history.envelopes], history.complete, history.top.seq) == (["b", "c"], True, 3)
    assert (await broker.history(TOPIC, 3)).complete
    assert not (await broker.history(TOPIC, 4)).complete


async def test_history_is_bounded_in_number_and_never_passes_for_whole(broker):
    for number in range(15):
        await broker.publish(message(str(number)))
    assert not (await broker.history(TOPIC, 4)).complete
    history = await broker.history(TOPIC, 5)
    assert (history.complete, len(history.envelopes)) == (True, 10)


async def test_an_event_that_is_not_kept_arrives_without_a_number(broker):
    await broker.subscribe(TOPIC)
    await broker.publish(message("a", plugin=fleeting))
    assert [(e.event.text, e.seq) for e in await arrived(broker, 1)] == [("a", 0)]
    assert (await broker.history(TOPIC, 0)).envelopes == []
    assert (await broker.publish(message("b"))).position.seq == 1


async def test_seats_are_counted_by_user_project_and_in_all(broker):
    limits = Limits(user=2, project=3, system=4)
    for user, project, full in [
        ("ada", "p", None),
        ("ada", "p", None),
        ("ada", "p", "user"),
        ("bob", "p", None),
        ("cy", "p", "project"),
        ("cy", "q", None),
        ("dee", "q", "system"),
    ]:
        assert await broker.claim(user, project, limits) == full
    await broker.release("ada", "p")
    assert await broker.claim("dee", "p", limits) is None


# -- people


async def test_who_was_nowhere_before_has_joined(broker):
    assert await broker.enter("p", "ada") == Arrived(Person("ada", 1), joined=True)
    assert await broker.enter("p", "ada") == Arrived(Person("ada", 2), joined=False)
    assert await broker.enter("q", "ada") == Arrived(Person("ada", 1), joined=True)
    assert await broker.enter("p", "bob of p") == Arrived(Person("bob of p", 1), joined=True)
    assert await broker.people("p") == [Person("ada", 2), Person("bob of p", 1)]
    assert await broker.people("nobody's") == []


async def test_whoever_comes_back_within_the_grace_had_never_left(make):
    broker = await make(grace=60.0)
    await broker.enter("p", "ada")
    assert await broker.leave("p", "ada") == Person("ada", 0)
    assert await broker.people("p") == [Person("ada", 0)]
    assert await broker.untold() == []
    assert await broker.enter("p", "ada") == Arrived(Person("ada", 1), joined=False)
    assert await broker.people("p") == [Person("ada", 1)]


async def untold(broker, count):
    """The next notices of `broker`, when there are so many, each handed out for the first time."""
    found: dict = {}
    async with asyncio.timeout(10):
        while len(found) < count:
            found.update({(notice.project, notice.person.user_id): notice for notice in await broker.untold()})
            await asyncio.sleep(0.005)
    return sorted(found.values(), key=lambda notice: notice.person.user_id)


async def test_whose_grace_is_over_has_departed_and_is_told_once(make):
    broker = await make(grace=0.0)
    for user in ("ada", "ada", "bob of p"):
        await broker.enter("p", user)
    assert await broker.leave("p", "ada") == Person("ada", 1)
    assert await broker.untold() == []
    await broker.leave("p", "ada")
    await broker.leave("p", "bob of p")
    notices = await untold(broker, 2)
    assert [(notice.person, notice.here) for notice in notices] == [
        (Person("ada", 0), False),
        (Person("bob of p", 0), False),
    ]
    await broker.told(notices)
    assert await broker.untold() == []
    assert await broker.people("p") == []
    assert (await broker.enter("p", "ada")).joined
    assert await broker.untold() == []


async def test_more_people_at_once_than_one_answer_holds_are_all_told(make):
    broker = await make(grace=0.0)
    for number in range(250):
        await broker.enter("p", str(number))
        await broker.leave("p", str(number))
    notices = await untold(broker, 250)
    assert not any(notice.here for notice in notices)
    await broker.told(notices)
    assert await broker.untold() == []


async def test_who_is_doubted_is_handed_out_as_they_are_until_that_was_told(make):
    broker = await make(grace=60.0)
    await broker.enter("p", "ada")
    await broker.set_status("p", "ada", "editing")
    await broker.doubt([Notice("p", Person("ada", 0), anew=True), Notice("p", Person("bob", 0))])
    ada, bob = await untold(broker, 2)
    assert (ada.person, ada.here, ada.anew) == (Person("ada", 1, "editing"), True, True)
    assert (bob.person, bob.here, bob.anew) == (Person("bob", 0), False, False)
    await broker.told([ada, bob])
    assert await broker.untold() == []


async def test_who_comes_back_while_they_are_told_as_gone_is_handed_out_once_more(make):
    broker = await make(grace=0.0)
    await broker.enter("p", "ada")
    await broker.leave("p", "ada")
    notices = await untold(broker, 1)
    arrived = await broker.enter("p", "ada")
    assert arrived.joined
    await broker.told([Notice("p", arrived.person)])
    await broker.told(notices)
    [again] = await untold(broker, 1)
    assert (again.person, again.here, again.anew) == (Person("ada", 1), True, True)
    await broker.told([again])
    assert await broker.untold() == []


async def test_a_status_is_seen_by_all_and_forgotten_when_its_person_has_left(make):
    broker = await make(grace=0.0)
    await broker.enter("p", "ada")
    assert await broker.set_status("p", "ada", "editing") == Person("ada", 1, "editing")
    assert await broker.people("p") == [Person("ada", 1, "editing")]
    assert await broker.enter("p", "ada") == Arrived(Person("ada", 2, "editing"), joined=False)
    assert await broker.set_status("p", "ada", "") == Person("ada", 2)
    await broker.set_status("p", "ada", "back")
    assert await broker.leave("p", "ada") == Person("ada", 1, "back")
    await broker.leave("p", "ada")
    await broker.told(await untold(broker, 1))
    assert await broker.enter("p", "ada") == Arrived(Person("ada", 1), joined=True)


async def test_whoever_is_not_here_has_no_status(broker):
    assert await broker.set_status("p", "ada", "editing") == Person("ada", 0)
    assert await broker.people("p") == []
    assert (await broker.enter("p", "ada")).person.status == ""


async def test_who_is_on_one_node_only_is_not_held_up_by_a_shared_budget(broker):
    await broker.claim("ada", "p", Limits())
    assert [await broker.spend("ada", 1.0, 10.0, 2.0) for _ in range(5)] == [0.0] * 5
