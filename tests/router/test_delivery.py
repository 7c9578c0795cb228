"""Whatever happens, every client ends with the same state as one that saw everything.

Hypothesis plays publishers, clocks, networks and clients against a whole node without sockets: events of all four
delivery kinds, time that passes or not, clients that join late, stop reading, lose what was on its way, and resume.
"""

import asyncio
import copy
import heapq
import json
import os
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router import Append, Audience, Event, Identity, Latest, Merge, Now, Plugin, Policy
from router.brokers.memory import MemoryBroker
from router.catalog import Catalog, Found
from router.flow import Router
from router.gateway import parse_since
from router.session import Session, topics_of
from router.testing import Clock


class Progress(Event, frozen=True, tag="progress"):
    step: str
    done: int


class Completed(Event, frozen=True, tag="completed"):
    step: str
    done: int


class Restarted(Event, frozen=True, tag="restarted"):
    step: str
    done: int


class Said(Event, frozen=True, tag="said"):
    number: int


class Piece(Event, frozen=True, tag="piece"):
    stream: str
    text: str
    last: bool = False


class Changed(Event, frozen=True, tag="changed"):
    things: list[int]


def union(pending: Changed, new: Changed) -> Changed:
    return Changed(things=sorted({*pending.things, *new.things}))


pytestmark = pytest.mark.timeout(400)
"""2,000 histories take half a minute of an idle core."""

PLUGINS = [
    Plugin(Progress, Policy(deliver=Latest(by=("step",)))),
    Plugin(Completed, Policy(deliver=Now(by=("step",)), settles=(Progress,))),
    Plugin(Restarted, Policy(deliver=Now(by=("step",)))),
    Plugin(Said, Policy(deliver=Now())),
    Plugin(Piece, Policy(deliver=Append(by=("stream",), field="text", ends="last"))),
    Plugin(Changed, Policy(deliver=Merge(union))),
]
PROJECT, USER, EVERYONE = topics_of("p", "ada")


class State:
    """What a page shows after the events that it was given."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[str, int]] = {}
        self.said: list[int] = []
        self.texts: dict[str, str] = {}
        self.things: set[int] = set()

    def apply(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind in ("progress", "completed", "restarted"):
            before = self.steps.get(event["step"], ("", -1))[1]
            assert event["done"] >= before, "progress ran backwards"
            self.steps[event["step"]] = (kind, event["done"])
        elif kind == "said":
            self.said.append(event["number"])
        elif kind == "piece":
            self.texts[event["stream"]] = self.texts.get(event["stream"], "") + event["text"]
        elif kind == "changed":
            self.things.update(event["things"])

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(vars(self))


class Page:
    """A client: keeps its position as the browser client does, drops numbers that it has seen, and may read slowly."""

    framed = False
    HIGH_WATER = 300

    def __init__(self, *, plain: bool) -> None:
        self.plain = plain
        self.state = State()
        self.session: Session | None = None
        self.epoch, self.pos = "", 0
        self.known: set[int] = set()
        self.ids: set[str] = set()
        self.unacknowledged: set[str] = set()
        self.buffer: list[bytes] = []
        self.reading = True
        self.paused = False
        self.frames: list[tuple[float, dict[str, Any]]] = []
        self.on_writable: Callable[[bool], None] = lambda _: None
        self.now: Callable[[], float] = lambda: 0.0

    # -- the port

    def write(self, data: bytes) -> None:
        if self.reading:
            self.read(data)
            return
        self.buffer.append(data)
        if self.backlog() > self.HIGH_WATER and not self.paused:
            self.paused = True
            self.on_writable(False)

    def backlog(self) -> int:
        return sum(map(len, self.buffer))

    def close(self, code: int, reason: str) -> None:
        raise AssertionError(f"closed with {code} {reason}")

    def abort(self) -> None:
        raise AssertionError("aborted")

    # -- the page

    def read(self, data: bytes) -> None:
        frame = json.loads(data)
        kind = frame["type"]
        self.frames.append((self.now(), frame))
        if kind == "welcome":
            self.epoch, self.pos = frame["epoch"], frame["pos"]
            self.known = {*self.known, *frame.get("known", ())}
            self.known = {seq for seq in self.known if seq > self.pos}
        elif kind == "resync":
            raise AssertionError("nothing here reaches further back than history")
        elif kind == "batch":
            for event in frame["events"]:
                self.take(event)
            self.move(frame["pos"])
        else:
            self.take(frame)
            if not self.plain:
                self.move(frame.get("pos", frame["seq"]))

    def take(self, event: dict[str, Any]) -> None:
        if not self.plain:
            if event["seq"] <= self.pos or event["seq"] in self.known:
                self.unacknowledged.update({event.get("message_id")} - {None})
                return
            self.known.add(event["seq"])
        id_ = event.get("message_id")
        if id_ is not None:
            self.unacknowledged.add(id_)
            if id_ in self.ids:
                return
            self.ids.add(id_)
        self.state.apply(event)

    def move(self, pos: int) -> None:
        assert pos >= self.pos or self.plain, "a position went back"
        self.pos = max(self.pos, pos)
        self.known = {seq for seq in self.known if seq > self.pos}

    def since(self) -> str:
        beyond = ".".join(map(str, sorted(self.known)))
        return f"{self.epoch}:{self.pos}" + (f":{beyond}" if beyond else "")


class Delivery(RuleBasedStateMachine):
    """The machine that Hypothesis drives."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.timers: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self.broken: list[BaseException] = []
        self.router = Router(
            Catalog([Found(plugin, "tests") for plugin in PLUGINS]),
            MemoryBroker(max_events=10**6, max_age=10**9, clock=self.clock),
            authenticate=None,  # type: ignore[arg-type]  # sessions are made by hand
            clock=self.clock,
            wall=self.clock,
            call_later=self.call_later,
        )
        self.run(self.router.start())
        self.truth = State()
        self.count = 0
        self.pages: list[Page] = []
        self.away: list[Page] = []
        self.reference = Page(plain=False)
        """Always reads, and so has what the room has."""
        self.arrive(self.reference, None)
        self.arrive(Page(plain=True), None)

    def teardown(self) -> None:
        try:
            self.check_everybody_agrees()
        finally:
            self.loop.close()

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        heapq.heappush(self.timers, (self.clock.now + delay, len(self.timers) + self.count * 1000, callback, args))

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        async def all_of_it() -> None:
            await work
            await self.router._lanes.idle()

        self.loop.run_until_complete(all_of_it())

    def arrive(self, page: Page, since: str | None) -> None:
        self.run(self.open(page, since))

    async def open(self, page: Page, since: str | None) -> None:
        self.count += 1
        session = Session(
            f"s{self.count}",
            Identity("ada", frozenset({"view"})),
            "p",
            plain=page.plain,
            topics=(PROJECT, USER, EVERYONE),
        )
        page.session, page.buffer, page.reading, page.paused = session, [], True, False
        page.now = self.clock

        def writable(can: bool) -> None:
            if can:
                self.router.resume(session)
            else:
                self.router.slow(session)

        page.on_writable = writable
        self.pages.append(page)
        await self.router.open(session, page, parse_since(since, session.topics), 30.0)

    def publish(self, event: Event) -> None:
        self.truth.apply(_told(event))
        self.count += 1
        self.run(self.router.publish(Audience(PROJECT), event))

    # -- what may happen

    @rule(step=st.sampled_from("ab"))
    def progress(self, step: str) -> None:
        self.publish(Progress(step=step, done=self.truth.steps.get(step, ("", -1))[1] + 1))

    @rule(step=st.sampled_from("ab"))
    def complete(self, step: str) -> None:
        self.publish(Completed(step=step, done=self.truth.steps.get(step, ("", -1))[1] + 1))

    @rule(step=st.sampled_from("ab"))
    def restart(self, step: str) -> None:
        self.publish(Restarted(step=step, done=self.truth.steps.get(step, ("", -1))[1] + 1))

    @rule(critical=st.booleans())
    def say(self, critical: bool) -> None:
        self.publish(Said(number=len(self.truth.said), requires_ack=critical))

    @rule(
        words=st.integers(2, 6),
        step=st.sampled_from("ab"),
        plain=st.booleans(),
        since=st.sampled_from([None, "0"]),
        pauses=st.integers(0, 3),
    )
    def much_happens_while_somebody_opens_the_page(
        self, words: int, step: str, plain: bool, since: str | None, pauses: int
    ) -> None:
        if len(self.pages) >= 6:
            return
        done = self.truth.steps.get(step, ("", -1))[1]
        events: list[Event] = [Said(number=len(self.truth.said) + i) for i in range(words)]
        events += [Progress(step=step, done=done + 1 + i) for i in range(words)]
        page = Page(plain=plain)

        async def all_at_once() -> None:
            half = len(events) // 2
            for event in events[:half]:
                await self.router.publish(Audience(PROJECT), event)
            opening = asyncio.gather(self.open(page, since))
            for _ in range(pauses):
                await asyncio.sleep(0)
            for event in events[half:]:
                await self.router.publish(Audience(PROJECT), event)
            await opening

        for event in events:
            self.truth.apply(_told(event))
        self.run(all_at_once())
        if since is None:
            # What it had not been there for; the rest must have come.
            missing = len(self.truth.said) - len(page.state.said)
            assert page.state.said == list(range(missing, len(self.truth.said)))
            self.pages.remove(page)
            assert page.session is not None
            self.run(self.router.close(page.session))

    @precondition(lambda self: len(self.pages) < 5)
    @rule(plain=st.booleans())
    def somebody_opens_the_page_with_the_state_from_elsewhere(self, plain: bool) -> None:
        page = Page(plain=plain)
        page.state = copy.deepcopy(self.reference.state)
        self.arrive(page, None)

    @rule(data=st.data())
    def somebody_acknowledges(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages))
        assert page.session is not None
        for id_ in page.unacknowledged:
            self.run(self.router.receive(page.session, json.dumps({"type": "ack", "message_id": id_})))
        page.unacknowledged.clear()

    @rule(stream=st.sampled_from("xy"), last=st.booleans())
    def stream(self, stream: str, last: bool) -> None:
        self.publish(Piece(stream=stream, text=f"{len(self.truth.texts.get(stream, ''))}.", last=last))

    @rule()
    def change(self) -> None:
        self.publish(Changed(things=[len(self.truth.things)]))

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.3, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while self.timers and self.timers[0][0] <= until:
            when, _, callback, args = heapq.heappop(self.timers)
            self.clock.now = max(self.clock.now, when)
            self.loop.run_until_complete(self._fire(callback, args))
        self.clock.now = until

    async def _fire(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        callback(*args)
        await self.router._lanes.idle()

    @rule(data=st.data())
    def somebody_stops_reading(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([page for page in self.pages if page is not self.reference])).reading = False

    @rule(data=st.data())
    def somebody_reads_again(self, data: st.DataObject) -> None:
        self.read_on(data.draw(st.sampled_from(self.pages)))

    def read_on(self, page: Page) -> None:
        page.reading = True
        waiting, page.buffer = page.buffer, []
        for part in waiting:
            page.read(part)
        if page.paused:
            page.paused = False
            self.run(self._fire(page.on_writable, (True,)))

    @precondition(lambda self: any(not p.plain and p is not self.reference for p in self.pages))
    @rule(data=st.data(), arrived=st.integers(0, 3))
    def a_connection_is_lost(self, data: st.DataObject, arrived: int) -> None:
        page = data.draw(st.sampled_from([p for p in self.pages if not p.plain and p is not self.reference]))
        for part in page.buffer[:arrived]:
            page.read(part)
        page.buffer = []
        self.pages.remove(page)
        self.away.append(page)
        assert page.session is not None
        self.run(self.router.close(page.session))

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def somebody_comes_back(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.away))
        self.away.remove(page)
        self.arrive(page, page.since())

    @precondition(lambda self: len(self.pages) < 5)
    @rule(plain=st.booleans())
    def somebody_opens_the_page_and_asks_for_everything(self, plain: bool) -> None:
        self.arrive(Page(plain=plain), "0")

    @invariant()
    def nobody_is_shown_more_than_was_published(self) -> None:
        for page in self.pages:
            assert page.state.said == list(range(len(page.state.said))), "an event was lost, doubled or overtaken"
            for stream, text in page.state.texts.items():
                assert self.truth.texts[stream].startswith(text), "pieces of a stream were lost or doubled"

    def check_throttle(self) -> None:
        """At most one throttled flush a second. Changes are about nothing in particular, so nothing hurries them."""
        times = [when for when, frame in self.reference.frames if b'"changed"' in msgspec.json.encode(frame)]
        assert all(later - earlier >= 1.0 - 1e-6 for earlier, later in pairwise(times)), times

    def check_everybody_agrees(self) -> None:
        for page in list(self.away):
            self.away.remove(page)
            self.arrive(page, page.since())
        for page in self.pages:
            self.read_on(page)
        self.time_passes(10.0)
        for page in self.pages:
            assert page.session is not None
            for id_ in page.unacknowledged:
                self.run(self.router.receive(page.session, json.dumps({"type": "ack", "message_id": id_})))
        self.check_throttle()
        self.publish(Completed(step="a", done=10**6))
        for page in self.pages:
            assert page.state == self.truth, "plain" if page.plain else "router.v1"
            if not page.plain:
                assert page.pos == self.router.broker._topics[PROJECT].seq, "the position did not come home"


def _told(event: Event) -> dict[str, Any]:
    """The event as a page is told of it."""
    return json.loads(msgspec.json.encode(event))


Delivery.TestCase.settings = settings(
    max_examples=int(os.environ.get("ROUTER_TEST_EXAMPLES", "2000")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_every_client_ends_with_the_same_state_whatever_happens = Delivery.TestCase
