"""What a client is told of its position is true, whatever happens between two awaits, two nodes or two lives of Redis."""

import asyncio
import json
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import redis.asyncio

from plugins.chat import ChatResponseChunk
from plugins.step import StepStarted
from router.backend import Backend
from tests.node import make_token, run_node
from tests.servers import run_server


def started(step):
    return {"type": "step_started", "step_id": str(step)}


def piece(text, *, stream="s", last=False, index=None):
    counted = {} if index is None else {"index": index}
    return {"type": "chat_response_chunk", "stream_id": stream, "content": text, "is_complete": last, **counted}


def progress(step, done):
    return {"type": "step_progress", "step_id": step, "progress": done}


@asynccontextmanager
async def nodes(url, count=2, **settings):
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(run_node(broker=url, **settings)) for _ in range(count)]


class Page:
    """Reads all that comes to one client, and keeps its position as the protocol page says."""

    def __init__(self, client):
        self.client = client
        self.frames = []
        self.events = []
        self.epoch, self.pos, self.known = "", 0, set()
        if client.welcome:
            self._place(client.welcome)

    def _place(self, frame):
        self.epoch, self.pos, self.known = frame["epoch"], frame["pos"], set(frame.get("known", ()))

    def take(self, frame):
        self.frames.append(frame)
        if frame.get("topic"):
            return
        if frame["type"] == "resync":
            self._place(frame)
        elif frame["type"] == "epoch":
            self.epoch = frame["epoch"]
        for event in frame["events"] if frame["type"] == "batch" else [frame]:
            seq = event.get("seq")
            if seq is not None and (seq <= self.pos or seq in self.known):
                continue
            if "seq" in event:
                self.known.add(seq)
            self.events.append(event)
        if "seq" in frame or "pos" in frame:
            self.pos = max(self.pos, frame.get("pos", frame.get("seq", 0)))

    async def read(self, until):
        while not until(self):
            self.take(await self.client.frame())

    async def idle(self, seconds=0.3):
        while True:
            try:
                self.take(await self.client.frame(timeout=seconds))
            except TimeoutError:
                return

    @property
    def since(self):
        beyond = ".".join(str(seq) for seq in sorted(self.known) if seq > self.pos)
        return f"{self.epoch}:{self.pos}{beyond and f':{beyond}'}"

    @property
    def text(self):
        pieces = [event for event in self.events if event["type"] == "chat_response_chunk"]
        return "".join(event["content"] for event in pieces if not event.get("torn"))

    @property
    def resyncs(self):
        return [frame for frame in self.frames if frame["type"] == "resync" and "topic" not in frame]

    def steps(self):
        return [event["step_id"] for event in self.events if event["type"] == "step_started"]


async def stay(client):
    return Page(client)


async def test_two_pages_that_open_while_a_text_streams_and_something_older_is_held_show_the_same(tmp_path):
    """D1: the second was given the stretch of the first, from before a flush that it was not there for."""
    (tmp_path / "slowly.py").write_text(
        "from router import Append, Event, Plugin, Policy\n\n\n"
        'class Line(Event, frozen=True, tag="line"):\n    text: str\n\n\n'
        'line = Plugin(Line, Policy(deliver=Append(by=(), field="text", every=0.5)))\n'
    )

    def text(page):
        return "".join(event["text"] for event in page.events if event["type"] == "line")

    def line(text):
        return {"type": "line", "text": text}

    async with run_node(plugins=(str(tmp_path),), broadcast_every=3.0) as node, AsyncExitStack() as stack:
        await stack.enter_async_context(node.client())
        await node.publish(progress("a", 0.1), progress("a", 0.2), line("one "), line("two "))
        pages = []
        for _ in range(2):
            pages.append(Page(await stack.enter_async_context(node.client(since="0"))))
            await pages[-1].idle(0.7)  # meanwhile the line goes out to those who are there; the progress is still held
        await node.publish(line("three"))
        for page in pages:
            await page.read(lambda page: text(page).endswith("three"))
        assert [text(page) for page in pages] == ["one two three"] * 2


async def test_a_stretch_is_made_once_for_all_who_missed_the_same_though_other_rooms_go_on(node):
    """D2: every event of every topic emptied the cache."""
    calls = []
    history = node.router.broker.history

    async def counted(topic, after):
        calls.append(topic)
        return await history(topic, after)

    async with node.client("quiet") as first:
        await node.publish(*map(started, range(50)), project="quiet")
        epoch = first.welcome["epoch"]
        node.router.broker.history = counted
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(node.client("busy"))
            for _ in range(4):
                client = await stack.enter_async_context(node.client("quiet", since=f"{epoch}:0"))
                assert len((await client.frame())["events"]) == 50
                await node.publish(started("x"), project="busy")
        assert calls.count("project:quiet") == 1


async def test_nobody_who_comes_back_while_redis_begins_anew_is_deaf(own_server):
    """D3: told of the new numbering, and then in the welcome of the old one."""
    async with nodes(own_server.url, 1) as (node,), AsyncExitStack() as stack:
        async with node.client() as client:
            await node.publish(*map(started, range(30)))
            old = client.welcome["epoch"]
        gate = asyncio.Event()
        broker = node.router.broker
        history, subscribe = broker.history, broker.subscribe

        async def slow(topic, after):
            found = await history(topic, after)
            await gate.wait()  # what was read may be over when it is told
            return found

        async def slow_subscribe(topic):
            position = await subscribe(topic)
            if topic == "all":
                await gate.wait()
            return position

        stay_at_it = await stack.enter_async_context(node.client())
        broker.history, broker.subscribe = slow, slow_subscribe
        coming = [
            asyncio.create_task(stack.enter_async_context(node.client(since=f"{old}:30"))),
            asyncio.create_task(stack.enter_async_context(node.client())),
            asyncio.create_task(stack.enter_async_context(node.client(since="0"))),
        ]
        await asyncio.sleep(0.2)
        own_server.kill()
        await asyncio.to_thread(own_server.start)
        while (await stay_at_it.frame())["type"] != "resync":
            pass
        broker.history, broker.subscribe = history, subscribe
        gate.set()
        pages = [Page(client) for client in await asyncio.gather(*coming)]
        await node.publish(started("after"))
        for page in pages:
            await page.read(lambda page: "after" in page.steps())


async def test_numbers_that_a_redis_gives_again_are_not_taken_for_those_that_a_client_has(own_server):
    """D4: nobody listens to the topic while Redis comes back from an older snapshot."""
    async with (
        nodes(own_server.url, 1) as (node,),
        redis.asyncio.Redis.from_url(own_server.url) as operator,
        node.client() as client,
    ):
        await node.publish(*map(started, range(40)))
        await operator.save()
        await node.publish(*map(started, range(40, 70)))
        page = Page(client)
        await page.read(lambda page: page.pos == 70)
    own_server.kill()
    await asyncio.to_thread(own_server.start)
    async with Backend(own_server.url) as backend:
        for number in range(40):
            await backend.publish("p1", StepStarted(step_id=f"new {number}"))
    async with nodes(own_server.url, 1) as (node,), node.client(since=page.since) as client:
        again = Page(client)
        assert client.welcome["recovered"] is False
        await node.publish(started("last"))
        await again.read(lambda page: "last" in page.steps())
        assert len(again.resyncs) == 1


async def test_who_was_away_while_redis_lost_what_it_had_given_out_is_told_to_reload(own_server):
    """What it has is all still there. What it would have got is not, and nobody is left who knows."""
    async with nodes(own_server.url, 1) as (node,), redis.asyncio.Redis.from_url(own_server.url) as operator:
        async with node.client() as client:
            await node.publish(*map(started, range(40)))
            page = Page(client)
            await page.read(lambda page: page.pos == 40)
        await operator.save()
        await node.publish(started("lost"))
        own_server.kill()
        await asyncio.to_thread(own_server.start)
        await _until_ready(node)
        await node.publish(started("new"))
        async with node.client(since=page.since) as client:
            assert client.welcome["recovered"] is False
            again = Page(client)
            await again.read(lambda page: page.resyncs)


async def test_who_is_connected_learns_under_which_epoch_the_numbers_go_on(program):
    with run_server(program, "--appendonly", "yes") as server:
        await _go_on_under_another_epoch(server)


async def _go_on_under_another_epoch(server):
    async with nodes(server.url, 2) as (node, other):
        async with node.client() as client:
            page = Page(client)
            await node.publish(started(1))
            await page.read(lambda page: page.pos == 1)
            server.kill()
            await asyncio.to_thread(server.start)
            await _until_ready(node)
            await _until_ready(other)
            await node.publish(started(2))
            await page.read(lambda page: page.pos == 2)
            assert not page.resyncs
        await node.publish(started(3))
        async with other.client(since=page.since) as client:
            assert client.welcome["recovered"] is True
            again = Page(client)
            await again.read(lambda page: page.steps() == ["3"])


async def test_who_is_connected_to_a_redis_that_came_back_from_a_snapshot_is_told_to_reload(own_server):
    """All that was published here was seen; what else it may have told of, nobody knows."""
    async with (
        nodes(own_server.url, 1) as (node,),
        redis.asyncio.Redis.from_url(own_server.url) as operator,
        node.client() as client,
    ):
        page = Page(client)
        await node.publish(started(1))
        await page.read(lambda page: page.pos == 1)
        await operator.save()
        own_server.kill()
        await asyncio.to_thread(own_server.start)
        await _until_ready(node)
        await page.read(lambda page: page.resyncs)
        await node.publish(started(2))
        await page.read(lambda page: page.steps() == ["1", "2"])


async def test_who_moves_to_a_node_that_holds_pieces_that_it_has_gets_no_piece_twice(redis_url):
    """D5: the other node's window joins what the client has with what it does not have."""
    async with nodes(redis_url) as (one, two), two.client() as watcher, one.client() as client:
        page, other = Page(client), Page(watcher)
        two.router._coalesce._every = 1.0
        # A window of `two` that is open: what follows waits there, while `one` has let it out.
        await one.publish(piece("0 "))
        await page.read(lambda page: page.text == "0 ")
        await other.read(lambda page: page.text == "0 ")
        pause = two.router._later
        held = []
        two.router._coalesce._later = lambda when, key, job: held.append((when, key, job))
        await one.publish(piece("1 "), piece("2 "))
        await page.read(lambda page: page.text == "0 1 2 ")
        while not two.router._coalesce.held("project:p1"):
            await asyncio.sleep(0.01)
        async with two.client(since=page.since) as moved:
            again = Page(moved)
            await one.publish(piece("3 "))
            while 4 not in two.router._coalesce.held("project:p1") and "3 " not in other.text:
                await other.idle(0.05)
            two.router._coalesce._later = pause
            for when, key, job in held:
                pause(when, key, job)
            await one.publish(piece("end", last=True))
            await again.read(lambda page: page.text.endswith("end"))
            await other.read(lambda page: page.text.endswith("end"))
            assert again.text == "3 end"
            assert other.text == "0 1 2 3 end"


async def test_a_client_that_is_ahead_of_its_new_node_is_neither_reloaded_nor_shown_anything_twice(redis_url):
    async with nodes(redis_url) as (one, two), two.client(), one.client() as client:
        page = Page(client)
        await one.publish(*map(started, range(3)))
        await page.read(lambda page: page.pos == 3)
        take = two.router.broker._continuity.take
        two.router.broker._continuity.take = lambda *_: None  # `two` has not heard of them yet
        await one.publish(*map(started, range(3, 6)))
        await page.read(lambda page: page.pos == 6)
        two.router.broker._continuity.take = take
        async with two.client(since=page.since) as moved:
            assert moved.welcome["recovered"] is True
            again = Page(moved)
            await one.publish(started("next"))
            await again.read(lambda page: "next" in page.steps())
            assert again.steps() == ["next"]


async def test_a_publisher_whose_clock_is_slow_is_seen_by_who_comes_back_and_who_comes_late(redis_url, monkeypatch):
    """D10: its events counted as too old at once."""
    async with nodes(redis_url, 1) as (node,), Backend(redis_url) as backend:
        real = backend._dispatch._wall
        backend._dispatch._wall = lambda: real() - 360
        async with node.client() as client:
            epoch = client.welcome["epoch"]
        await backend.publish("p1", StepStarted(step_id="late"))
        for since in (f"{epoch}:0", "0"):
            async with node.client(since=since) as client:
                assert client.welcome["recovered"] is True
                assert (await client.event("step_started"))["step_id"] == "late"


async def test_an_answer_of_a_backend_whose_clock_is_slow_is_not_declared_lost_while_it_streams(redis_url):
    """D22."""
    async with nodes(redis_url, 1) as (node,), Backend(redis_url) as backend, node.client() as client:
        real = backend._dispatch._wall
        backend._dispatch._wall = lambda: real() - 65
        for word in ("one ", "two "):
            await backend.publish("p1", ChatResponseChunk(content=word, is_complete=False, stream_id="s"))
        page = Page(client)
        await page.read(lambda page: page.text == "one two ")
        assert node.router.lapses.due() == []


async def test_an_event_without_a_number_that_a_broken_subscription_missed_is_brought(redis_url):
    """D17."""
    async with (
        nodes(redis_url) as (one, two),
        two.client() as watcher,
        redis.asyncio.Redis.from_url(redis_url) as operator,
    ):
        page = Page(watcher)
        for number in range(8):
            await operator.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            async with one.client(token=make_token(f"person-{number}")):
                pass
        joined = {f"person-{number}" for number in range(8)}
        await page.read(lambda page: joined <= {e["user_id"] for e in page.events if e["type"] == "presence_joined"})


async def test_merely_looking_at_a_project_leaves_no_key_that_stays_for_long(redis_url):
    """D20."""
    async with nodes(redis_url, 1, history_seconds=301.0) as (node,):
        for number in range(5):
            async with node.client(f"looked-{number}", token=make_token(project="*")):
                pass
        async with redis.asyncio.Redis.from_url(redis_url) as operator:
            keys = [key async for key in operator.scan_iter("router:{project:looked*")]
            lives = [await operator.pttl(key) for key in keys]
            assert lives
            assert all(0 < life <= 301_000 for life in lives)


async def test_an_event_of_a_type_that_one_node_lacks_is_given_to_who_moves_to_one_that_has_it(redis_url, tmp_path):
    """D21: a rolling deploy that brings a new type."""
    (tmp_path / "new.py").write_text(
        "from router import Event, Plugin\n\n\n"
        'class Novel(Event, frozen=True, tag="novel"):\n    word: str\n\n\nnovel = Plugin(Novel)\n'
    )
    async with (
        run_node(broker=redis_url) as old,
        run_node(broker=redis_url, plugins=(str(tmp_path),)) as new,
        old.client() as client,
    ):
        page = Page(client)
        await new.publish(started(1))
        await new.publish({"type": "novel", "word": "hello"})
        await new.publish(started(2), started(3))
        await page.read(lambda page: page.steps() == ["1", "2", "3"])
        assert page.pos == 1
        async with new.client(since=page.since) as moved:
            assert moved.welcome["recovered"] is True
            again = Page(moved)
            await again.read(lambda page: page.events != [])
            assert [event["type"] for event in again.events] == ["novel"]
            await again.idle(0.2)
            assert again.steps() == []
        # The same for who finds it in history, on the node that cannot read it.
        async with old.client(since=f"{page.epoch}:0") as late:
            again = Page(late)
            await again.read(lambda page: page.steps() == ["1", "2", "3"])
            assert again.pos == 1


async def test_a_position_does_not_wait_for_ever_behind_what_a_node_cannot_read(redis_url, tmp_path):
    async with run_node(broker=redis_url, history_events=2000) as node, node.client() as client:
        async with redis.asyncio.Redis.from_url(redis_url) as raw:
            publish = raw.register_script(Path("router/brokers/lua/publish.lua").read_text())
            base = "router:{project:p1}"
            keys = [f"{base}:meta", f"{base}:log", f"{base}:meta"]
            await publish(keys, ['{}\n{"type": "unheard_of"}', "a" * 16, "PUBLISH", 2000, 300_000, 600_000, 1, 0])
        page = Page(client)
        for start in range(0, 600, 200):
            await node.publish(*map(started, range(start, start + 200)))
        await page.read(lambda page: page.resyncs)
        await node.publish(started("after"))
        await page.read(lambda page: "after" in page.steps())
        assert page.pos == 602


async def test_who_asks_for_all_of_a_history_that_was_cut_is_told_so_and_shown_no_text_without_its_beginning():
    """D25."""
    async with run_node(history_events=50) as node:
        await node.publish(started("a"))
        await node.publish(*(piece(f"w{number} ") for number in range(80)))
        async with node.client(since="0") as client, node.client() as watcher:
            page, other = Page(client), Page(watcher)
            assert client.welcome["recovered"] is False
            await node.publish(started("b"), piece("w80 "))
            await page.read(lambda page: page.steps() == ["b"])
            [told] = page.resyncs
            assert told["pos"] == 81 - 50
            assert page.text == ""
            # What follows is marked: it is for a page that has loaded the text so far.
            await node.publish(piece("end", last=True), started("c"))
            await page.read(lambda page: page.steps() == ["b", "c"])
            await other.read(lambda page: page.steps()[-1:] == ["c"])
            assert [event["content"] for event in page.events if event.get("torn")] == ["w80 ", "end"]
            assert page.text == ""
            assert other.text == "w80 end"
            # The next text of the same stream is whole.
            await node.publish(piece("new "), piece("text", last=True))
            await page.read(lambda page: page.text == "new text")


async def test_a_text_that_began_after_the_cut_is_shown_whole():
    async with run_node(history_events=50) as node:
        await node.publish(*map(started, range(60)))
        await node.publish(*(piece(f"w{number} ", stream="counted", index=number) for number in range(5)))
        async with node.client(since="0") as client:
            page = Page(client)
            assert client.welcome["recovered"] is False
            await page.read(lambda page: page.text == "w0 w1 w2 w3 w4 ")


async def test_who_asks_for_all_of_a_history_that_is_whole_is_recovered():
    async with run_node(history_events=50) as node:
        await node.publish(*map(started, range(50)))
        async with node.client(since="0") as client:
            assert client.welcome["recovered"] is True


async def test_who_asks_for_all_after_history_has_forgotten_it_is_told_so():
    async with run_node(history_seconds=0.2) as node:
        await node.publish(started("a"))
        await asyncio.sleep(0.3)
        async with node.client(since="0") as client:
            assert client.welcome["recovered"] is False
            page = Page(client)
            await page.idle(0.1)
            assert [frame["pos"] for frame in page.resyncs] == [1]


async def test_who_knows_nothing_but_open_hears_what_is_published_right_after_it(redis_url):
    """D34: by a plain `PUBLISH`, which has no number."""
    async with nodes(redis_url, 1) as (node,), redis.asyncio.Redis.from_url(redis_url) as backend:
        for number in range(10):
            project = f"p{number}"
            token = make_token(project="*")
            async with _open_only(node, project, token) as client:
                await backend.publish(f"project:{project}", json.dumps(started(number)))
                assert json.loads(await asyncio.wait_for(client.recv(), 5)) == started(number)


@asynccontextmanager
async def _open_only(node, project, token):
    """A plain client that is used the moment it is open."""
    from websockets.asyncio.client import connect

    url = f"ws://127.0.0.1:{node.port}/ws/project/{project}?token={token}"
    async with connect(url, compression=None) as client:
        yield client


async def _until_ready(node):
    deadline = time.monotonic() + 15
    while not await node.router.broker.ready():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_who_asks_for_all_of_a_topic_that_redis_has_forgotten_before_is_told_so(redis_url):
    async with nodes(redis_url, 2) as (node, other), redis.asyncio.Redis.from_url(redis_url) as operator:
        async with node.client(since="0") as client:
            assert client.welcome["recovered"] is True
            await node.publish(started("old"))
            await client.event("step_started")
        await operator.flushdb()
        await other.publish(started("new"))
        async with node.client(since="0") as client:
            assert client.welcome["recovered"] is False
            page = Page(client)
            await page.read(lambda page: page.steps() == ["new"])
            assert [frame["pos"] for frame in page.resyncs] == [0]
        async with other.client(since="0") as client:
            assert client.welcome["recovered"] is False


async def test_a_text_of_a_producer_that_counts_from_one_is_whole_to_who_was_there_before_all():
    async with run_node() as node, node.client(since="0") as client:
        assert client.welcome["recovered"] is True
        await node.publish(piece("a ", index=1), piece("b", index=2, last=True))
        page = Page(client)
        await page.read(lambda page: page.text == "a b")
