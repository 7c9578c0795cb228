"""What a text without its beginning, or a middleware that fails, does to whoever joins or comes back."""

import asyncio
import json

from plugins.chat import ChatResponseChunk, chat_response_chunk
from router import Append, Audience, Event, Identity, Plugin, Policy, wire
from router.brokers.base import Position
from router.brokers.memory import MemoryBroker
from router.catalog import Catalog, Found
from router.errors import Refused
from router.flow import Router
from router.gateway import parse_since
from router.hub import LOOSE
from router.session import Session, topics_of
from router.testing import Clock, envelope


class Said(Event, frozen=True, tag="said"):
    number: int


class Line(Event, frozen=True, tag="line"):
    text: str


class Sink:
    """What one client reads. `on_write` is called within each write, as a transport calls `pause_writing`."""

    framed = False

    def __init__(self, on_write=lambda frame: None):
        self.frames = []
        self.on_write = on_write

    def write(self, data):
        self.frames.append(json.loads(data))
        self.on_write(self.frames[-1])

    def backlog(self):
        return 0

    @property
    def events(self):
        return [e for f in self.frames for e in (f["events"] if f["type"] == "batch" else [f])]

    @property
    def pieces(self):
        """The pieces of texts, those that are marked in brackets."""
        found = [e for e in self.events if e["type"] == "chat_response_chunk"]
        return [f"[{e['content']}]" if e.get("torn") else e["content"] for e in found]

    @property
    def types(self):
        return [frame["type"] for frame in self.frames]


PLUGINS = (Plugin(Said), chat_response_chunk, Plugin(Line, Policy(deliver=Append(by=(), field="text"))))


async def make(*, arrange=None, **options):
    clock = Clock()
    broker = MemoryBroker(clock=clock, **options)
    router = Router(
        Catalog([Found(plugin, "tests") for plugin in PLUGINS]), broker, None, clock=clock, wall=clock, arrange=arrange
    )
    await router.start()
    return router, broker, clock


async def come(router, name, *, since=None, plain=False, sink=None):
    sink = sink or Sink()
    topics = topics_of("p", name)
    identity = Identity(name, frozenset({"view"}))
    session = Session(name, identity, "p", plain=plain, topics=topics)
    asked = parse_since(since, topics)
    starts = await router.prepare(session, asked)
    await router.enter(session, sink, starts, asked, 30.0)
    return session, sink


async def piece(router, text, *, stream="s", last=False, index=None):
    event = ChatResponseChunk(content=text, is_complete=last, stream_id=stream, index=index)
    await router.publish(Audience("project:p"), event)
    await router._lanes.idle()


async def say(router, number):
    await router.publish(Audience("project:p"), Said(number=number))
    await router._lanes.idle()


async def test_a_text_that_ends_while_one_who_lacks_its_beginning_is_slow_comes_to_it_marked():
    router, _, clock = await make()
    await come(router, "quick")
    await piece(router, "one ", index=0)
    session, sink = await come(router, "slow", since="otherepoch:1")
    assert "resync" in sink.types
    router.slow(session)
    clock.now = clock() + 2
    await piece(router, "two", index=1, last=True)
    router.resume(session)
    await router._lanes.idle()
    assert sink.pieces == ["[two]"]


async def test_a_plain_client_that_is_slow_while_a_text_without_its_beginning_ends_gets_nothing_of_it():
    router, _, clock = await make(max_events=3)
    await come(router, "quick")
    await piece(router, "zero ", index=0)
    for number in range(2):
        await say(router, number)
    await piece(router, "one ", index=1)
    clock.now = clock() + 2
    session, sink = await come(router, "slow", since="0", plain=True)
    assert sink.pieces == []
    router.slow(session)
    await piece(router, "two", index=2, last=True)
    router.resume(session)
    await router._lanes.idle()
    assert sink.pieces == []


async def test_a_text_of_which_history_has_no_piece_any_more_is_marked_for_who_asked_for_all():
    router, _, clock = await make(max_events=3)
    await come(router, "quick")
    await piece(router, "zero ", index=0)
    for number in range(5):
        await say(router, number)
    _, sink = await come(router, "late", since="0")
    assert "resync" in sink.types
    clock.now = clock() + 2
    await piece(router, "one", index=1)
    assert sink.pieces == ["[one]"]


async def test_a_text_is_marked_for_who_asked_for_all_when_its_history_has_grown_too_old():
    router, _, clock = await make(max_age=10.0)
    await come(router, "quick")
    await piece(router, "zero ", index=0)
    clock.now = clock() + 20
    _, sink = await come(router, "late", since="0")
    assert "resync" in sink.types
    await piece(router, "one", index=1)
    assert sink.pieces == ["[one]"]


async def test_a_marked_piece_whose_write_fills_the_buffer_does_not_come_twice():
    router, _, clock = await make()
    await come(router, "quick")
    await piece(router, "zero ", index=0)
    clock.now = clock() + 2
    sink = Sink()
    session, _ = await come(router, "slow", since="otherepoch:1", sink=sink)
    assert "resync" in sink.types
    sink.on_write = lambda frame: router.slow(session)  # its transport is full after any write
    await piece(router, "one ", index=1)
    assert sink.pieces == ["[one ]"]
    sink.on_write = lambda frame: None
    clock.now = clock() + 2
    await piece(router, "two ", index=2)
    router.resume(session)
    await router._lanes.idle()
    assert "".join(sink.pieces).replace("][", "") == "[one two ]"


async def test_one_who_was_slow_while_a_middleware_failed_hears_what_comes_after():
    def arrange(middleware):
        async def choke(envelope, forward):
            if isinstance(envelope.event, Said) and envelope.event.number == 13:
                raise ValueError("13")
            await forward(envelope)

        return [*middleware.values(), choke]

    router, _, _ = await make(arrange=arrange)
    session, sink = await come(router, "slow")
    router.slow(session)
    await say(router, 13)
    router.resume(session)
    await router._lanes.idle()
    await say(router, 14)
    assert [e["number"] for e in sink.events if e["type"] == "said"] == [14]


async def test_one_who_comes_back_after_a_middleware_failed_gets_all_else():
    def arrange(middleware):
        async def choke(envelope, forward):
            if isinstance(envelope.event, Said) and envelope.event.number == 13:
                raise ValueError("13")
            await forward(envelope)

        return [*middleware.values(), choke]

    router, broker, _ = await make(arrange=arrange)
    await come(router, "quick")
    for number in (12, 13, 14):
        await say(router, number)
    epoch = (await broker.position("project:p")).epoch
    _, sink = await come(router, "back", since=f"{epoch}:0")
    assert [e["number"] for e in sink.events if e["type"] == "said"] == [12, 14]


async def test_one_who_is_told_that_too_much_went_by_and_is_slow_again_at_that_is_not_put_into_the_room():
    router, _, _ = await make()
    sink = Sink()
    session, _ = await come(router, "slow", sink=sink)
    router.slow(session)
    for _ in range(LOOSE + 1):
        await router.broker.publish(envelope(Plugin(Said, Policy(keep=False)), Said(number=0), project="p"))
    await router._lanes.idle()
    sink.on_write = lambda frame: router.slow(session)
    router.resume(session)
    await router._lanes.idle()
    assert "resync" in sink.types
    assert not router.hub.present(session, "project:p")


async def test_a_text_that_goes_on_under_new_numbers_and_ends_is_not_closed_once_more():
    """Redis begins anew in the middle of a text: its last piece has a lower number than the first one had."""
    router, _, clock = await make()
    await come(router, "quick")

    def numbered(seq, *, last=False):
        event = ChatResponseChunk(content="x", is_complete=last, stream_id="s")
        return envelope(chat_response_chunk, event, project="p", seq=seq)

    router.arrive(numbered(100))
    router._lost("project:p", Position("e2", 0))
    router.arrive(numbered(1))
    router.arrive(numbered(2, last=True))
    await router._lanes.idle()
    clock.now = clock() + 120
    assert router.lapses.due() == []


async def test_a_text_that_ends_while_the_first_who_listens_reads_history_is_not_taken_to_go_on():
    router, broker, clock = await make()
    await piece(router, "one ", index=0)
    history, gate, read = broker.history, asyncio.Event(), asyncio.Event()

    async def slow(topic, after):
        found = await history(topic, after)
        if topic == "project:p":
            read.set()
            await gate.wait()
        return found

    broker.history = slow
    coming = asyncio.create_task(come(router, "first"))
    await read.wait()
    await piece(router, "two", index=1, last=True)
    gate.set()
    await coming
    clock.now = clock() + 120
    assert router.lapses.due() == []


async def test_a_text_that_began_in_what_was_lost_comes_marked_to_who_was_told_to_reload():
    """The node missed its first pieces with all else; by `index` it can tell that this is no beginning."""
    router, _, _ = await make()
    _, sink = await come(router, "ada")
    router._lost("project:p", Position("e2", 3))
    event = ChatResponseChunk(content="three", is_complete=False, stream_id="s", index=3)
    router.arrive(envelope(chat_response_chunk, event, project="p", seq=4))
    await router._lanes.idle()
    assert "resync" in sink.types
    assert sink.pieces == ["[three]"]


async def test_a_text_whose_first_pieces_were_held_back_when_continuity_was_lost_comes_marked_afterwards():
    router, _, clock = await make()
    _, sink = await come(router, "ada")

    def numbered(index, stream="s"):
        event = ChatResponseChunk(content=f"{index} ", is_complete=False, stream_id=stream, index=index)
        return envelope(chat_response_chunk, event, project="p", seq=index + 2)

    await piece(router, "other", stream="t", index=0)  # opens the window: what follows waits
    router.arrive(numbered(0))
    router.arrive(numbered(1))
    await router._lanes.idle()
    assert router._coalesce.held("project:p") == {2, 3}
    router._lost("project:p", Position("e2", 3))
    clock.now = clock() + 5
    router.arrive(numbered(2))
    await router._lanes.idle()
    assert sink.pieces == ["other", "[2 ]"]


async def test_a_marked_piece_is_encoded_once_for_all_who_lack_the_beginning(monkeypatch):
    router, _, clock = await make()
    await come(router, "quick")
    await piece(router, "zero ", index=0)
    sinks = [(await come(router, f"user {number}", since="otherepoch:1"))[1] for number in range(50)]
    clock.now = clock() + 2
    made, numbered = [], wire.numbered

    def counted(envelope, **options):
        made.append(envelope)
        return numbered(envelope, **options)

    monkeypatch.setattr(wire, "numbered", counted)
    await piece(router, "one", index=1)
    assert [sink.pieces for sink in sinks] == [["[one]"]] * 50
    assert len(made) <= 4


async def test_who_names_an_epoch_that_is_over_does_not_have_history_merged_for_nothing():
    router, _, _ = await make()
    await come(router, "quick")
    for number in range(20):
        await say(router, number)
    replayed, outbound = [], router._outbound

    async def counted(envelope, *to):
        replayed.append(envelope)
        await outbound(envelope, *to)

    router._outbound = counted
    for number in range(5):
        await come(router, f"late {number}", since=f"otherepoch:{number}")
    assert replayed == []


async def test_one_who_moves_while_an_event_that_is_held_back_is_refused_further_on_is_let_in():
    """Before it joins, what is held and what it has of it goes out; a middleware declines that event alone."""
    refuse = []

    def arrange(middleware):
        async def pick(envelope, forward):
            if refuse and isinstance(envelope.event, ChatResponseChunk):
                raise Refused("not this one")
            await forward(envelope)

        return [*middleware.values(), pick]

    router, broker, _ = await make(arrange=arrange)
    await come(router, "quick")
    await piece(router, "other", stream="t", index=0)
    await piece(router, "zero", index=0)
    await piece(router, "one", index=1)
    assert router._coalesce.held("project:p") == {2, 3}
    refuse.append(True)
    epoch = (await broker.position("project:p")).epoch
    session, _ = await come(router, "moved", since=f"{epoch}:2")
    assert router.hub.present(session, "project:p")
