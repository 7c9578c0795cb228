"""Which sessions get what, encoded once, and never awaited."""

import asyncio
import json

import pytest

from router import Event, Identity, Plugin, Policy
from router.hub import SLICE, Hub
from router.session import Bookmark, Session, topics_of
from router.testing import Clock, envelope


class Said(Event, frozen=True, tag="said"):
    text: str


said = Plugin(Said)
TOPIC = "project:p1"


class Sink:
    """A port that keeps what it is written."""

    def __init__(self, *, framed=False):
        self.framed, self.written = framed, []

    def write(self, data):
        self.written.append(data)

    def backlog(self):
        return 0

    def close(self, code, reason):
        raise AssertionError

    abort = close

    @property
    def texts(self):
        return [json.loads(data).get("text") for data in self.written]


@pytest.fixture
def hub():
    return Hub(clock=Clock())


def enter(hub, name, grants=("view",), *, plain=False, framed=False, user="ada"):
    session = Session(name, Identity(user, frozenset(grants)), "p1", plain=plain, topics=topics_of("p1", user))
    sink = Sink(framed=framed)
    hub.add(session, sink)
    hub.join(session, TOPIC, Bookmark(0))
    return session, sink


async def tell(hub, *envelopes):
    for made in envelopes:
        await hub.deliver(made)
    return await hub.flush(TOPIC)


def say(text, seq=1, **narrowed):
    made = envelope(said, Said(text=text), seq=seq)
    return made.narrowed(**narrowed) if narrowed else made


async def test_only_those_who_hold_the_grants_and_lack_the_others_get_it(hub):
    _, viewer = enter(hub, "s1")
    _, staff = enter(hub, "s2", ("view", "staff"))
    assert await tell(hub, say("for staff", holding="staff"), say("for the rest", lacking="staff")) == 2
    assert (viewer.texts, staff.texts) == (["for the rest"], ["for staff"])


async def test_sessions_left_out_get_nothing_and_a_reply_goes_to_one_only(hub):
    _, one = enter(hub, "s1")
    _, two = enter(hub, "s2")
    await tell(hub, say("not you", without=frozenset({"s1"})))
    await tell(hub, say("only you", seq=0, only=frozenset({"s1"})))
    assert (one.texts, two.texts) == (["only you"], ["not you"])


async def test_the_same_bytes_go_to_everybody_who_sees_the_same(hub):
    sinks = [enter(hub, f"s{i}", framed=True)[1] for i in range(3)]
    await tell(hub, say("once"))
    first = sinks[0].written[0]
    assert all(sink.written[0] is first for sink in sinks)


async def test_several_events_of_one_flush_are_one_frame_for_router_v1_and_one_each_for_plain_clients(hub):
    _, modern = enter(hub, "s1")
    _, plain = enter(hub, "s2", plain=True)
    await tell(hub, say("a", 1), say("b", 2))
    (frame,) = map(json.loads, modern.written)
    assert (frame["type"], [e["text"] for e in frame["events"]], frame["pos"]) == ("batch", ["a", "b"], 2)
    assert plain.texts == ["a", "b"]
    assert "seq" not in json.loads(plain.written[0])


async def test_plain_clients_do_not_get_what_the_specification_does_not_name(hub):
    quiet = Plugin(Said, Policy(plain=False))
    _, plain = enter(hub, "s1", plain=True)
    assert await tell(hub, envelope(quiet, Said(text="x"), seq=1)) == 0
    assert plain.written == []


async def test_a_large_room_yields_to_the_others_between_slices(hub):
    sinks = [enter(hub, f"s{i}")[1] for i in range(4 * SLICE)]
    turns = 0

    async def other_room():
        nonlocal turns
        while not sinks[-1].written:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(other_room())
    await asyncio.sleep(0)
    await tell(hub, say("to all"))
    await other
    assert turns >= 4
    assert all(len(sink.written) == 1 for sink in sinks)


async def test_one_who_leaves_in_the_middle_of_a_large_room_has_what_the_bookmark_says(hub):
    made = [enter(hub, f"s{i}") for i in range(2 * SLICE)]
    await hub.deliver(say("a", 7))
    writing = asyncio.create_task(hub.flush(TOPIC))
    await asyncio.sleep(0)
    session, sink = made[-1]
    assert sink.written == []
    hub.pause(session)
    await writing
    assert sink.texts == ["a"]
    assert session.bookmarks[TOPIC] == Bookmark(7)


async def test_critical_events_hold_the_position_back_until_they_are_acknowledged(hub):
    critical = Plugin(Said, Policy(ack=True))
    session, sink = enter(hub, "s1")
    _, other = enter(hub, "s2")

    def made(text, seq):
        return envelope(critical, Said(text=text, message_id=f"m{seq}", requires_ack=True), seq=seq)

    from msgspec.structs import replace

    await tell(hub, replace(made("a", 1), message_id="m1"))
    await tell(hub, say("b", 2))
    hub.acknowledge(session, message_id="m1", pos=None)
    await tell(hub, say("c", 3))
    positions = [[json.loads(d).get("pos", json.loads(d)["seq"]) for d in s.written] for s in (sink, other)]
    assert positions == [[0, 0, 3], [0, 0, 0]]
    clock = hub._clock
    clock.move(10.0)
    await hub.redeliver(clock(), tries=3)
    assert json.loads(other.written[-1])["redelivered"] is True
    assert len(sink.written) == 3
    for _ in range(3):
        clock.move(10.0)
        given_up = await hub.redeliver(clock(), tries=3)
    assert [(s.id, e.seq) for s, e in given_up] == [("s2", 1)]
    assert not hub.awaiting


async def test_a_refiled_session_keeps_its_place(hub):
    session, sink = enter(hub, "s1")

    def lose():
        session.identity = Identity("ada", frozenset())

    hub.refile(session, lose)
    await tell(hub, say("no more", holding="view"))
    assert sink.written == []
    hub.remove(session)
    hub.remove(session)
    assert hub.listening(TOPIC) == 0


async def test_one_who_moves_or_leaves_in_the_middle_of_a_large_room_gets_it_once_whichever_cohort_is_under_way(hub):
    first = [enter(hub, f"a{i}") for i in range(2 * SLICE)]
    session, sink = enter(hub, "b", ("view", "staff"))
    await hub.deliver(say("a", 7))
    writing = asyncio.create_task(hub.flush(TOPIC))
    await asyncio.sleep(0)
    assert sink.written == []
    hub.pause(session)
    moved, moved_sink = first[0]

    def promote():
        moved.identity = Identity("ada", frozenset({"view", "staff"}))

    hub.refile(moved, promote)
    await writing
    assert (sink.texts, session.bookmarks[TOPIC]) == (["a"], Bookmark(7))
    assert moved_sink.texts == ["a"]


async def test_a_room_that_everybody_left_is_forgotten_with_its_position(hub):
    session, _ = enter(hub, "s1")
    await hub.deliver(say("a", 7))
    hub.remove(session)
    await hub.flush(TOPIC)
    newcomer, _ = enter(hub, "s2")
    hub.leave(newcomer, TOPIC)
    assert newcomer.bookmarks[TOPIC] == Bookmark(0)


async def test_a_flood_of_large_events_is_cut_into_frames_of_bounded_size(hub):
    _, sink = enter(hub, "s1")
    await tell(hub, *(say("x" * 100_000, seq) for seq in range(1, 11)))
    assert [json.loads(data)["pos"] for data in sink.written] == [2, 4, 6, 8, 10]


async def test_what_is_critical_is_not_repeated_to_one_who_may_not_hear_it_now(hub):
    critical = Plugin(Said, Policy(ack=True))
    made = envelope(critical, Said(text="a", message_id="m", requires_ack=True), seq=1).narrowed(holding="view")
    suspended, quiet = enter(hub, "s1")
    demoted, gone = enter(hub, "s2")
    await tell(hub, made)
    hub.suspend(suspended)
    demoted.identity = Identity("ada", frozenset())
    hub._clock.move(10.0)
    await hub.redeliver(hub._clock(), tries=3)
    assert (len(quiet.written), len(gone.written)) == (1, 1)


async def test_repeating_to_many_people_gives_others_a_turn(hub):
    critical = Plugin(Said, Policy(ack=True))
    sinks = [enter(hub, f"s{i}")[1] for i in range(3 * SLICE)]
    await tell(hub, envelope(critical, Said(text="a", message_id="m", requires_ack=True), seq=1))
    hub._clock.move(10.0)
    repeating = asyncio.create_task(hub.redeliver(hub._clock(), tries=3))
    await asyncio.sleep(0)
    assert 0 < sum(len(sink.written) == 2 for sink in sinks) < len(sinks)
    await repeating
    assert all(len(sink.written) == 2 for sink in sinks)
