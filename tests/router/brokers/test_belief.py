"""Once faults have stopped, everybody who watches believes of each person what is so, whatever died at whatever await.

Three nodes run their real `Presence`, `Roster` and `Lease` on a real server, in virtual time: the scripts read a clock
that the test moves, each call takes a while to get there and a while to come back, and everything that is drawn comes
from one seed.
"""

import asyncio
import contextlib
import heapq
import os
import random
from collections import Counter
from importlib.resources import files
from itertools import count

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.brokers.lease import Lease
from router.brokers.roster import Roster
from router.errors import Unavailable
from router.presence import Presence, PresenceJoined, PresenceLeft, PresenceUpdated

LENGTH, GRACE = 9.0, 4.0
ROUNDS, TROUBLE = 3, 8.0
"""Times in virtual seconds with faults. After each come as many as it may take until all is right."""
BOUND = LENGTH + GRACE + 5.0
PEOPLE = [("p", "ada"), ("q", "b o b")]
FAULTS = ("die", "part", "stall", "freeze", "lose", "cancel", "flush")


class Time:
    """A clock that goes on when nothing else can."""

    def __init__(self):
        self.now = 1_000_000.0
        self._waiting = []
        self._order = count()

    async def sleep(self, seconds):
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (self.now + seconds, next(self._order), woken))
        await woken

    async def run(self, seconds):
        ready = asyncio.get_running_loop()._ready
        end = self.now + seconds
        while True:
            await asyncio.sleep(0)
            while ready:
                await asyncio.sleep(0)
            if not self._waiting or self._waiting[0][0] > end:
                self.now = end
                return
            self.now, _, woken = heapq.heappop(self._waiting)
            if not woken.done():
                woken.set_result(None)


class Wire:
    """What a node has in place of `Scripts` and of its connection: calls of one lane follow each other."""

    def __init__(self, world):
        self.world = world
        self.cut_until = 0.0
        self.stalled_until = 0.0
        self.dead = False
        self._lane = asyncio.Lock()

    async def call(self, script, keys, arguments):
        return await self._there_and_back(lambda repeated: self.world.eval(script, keys, (*arguments, int(repeated))))

    async def hgetall(self, name):
        return await self._there_and_back(lambda _: self.world.client.hgetall(name))

    async def publish(self, project, event):
        await self._there_and_back(lambda _: self.world.log.append((project, event)))

    async def _there_and_back(self, act):
        world = self.world
        async with self._lane:
            for repeated in (False, True):
                if self.dead:
                    await asyncio.Event().wait()
                if world.time.now < self.cut_until:
                    await world.time.sleep(1.0)
                    raise Unavailable("cut off")
                lost = world.draw_loss()
                # Sent: from here on it gets there, even if the node dies.
                sent = asyncio.get_running_loop().create_task(self._there(act, repeated, lost))
                world.sent.append(sent)
                answer = await asyncio.shield(sent)
                await world.time.sleep(world.latency())
                while world.time.now < self.stalled_until:
                    await world.time.sleep(self.stalled_until - world.time.now)
                if self.dead:
                    await asyncio.Event().wait()
                if lost is None:
                    return answer
                if lost.endswith("for good"):
                    break
            raise Unavailable("lost")

    async def _there(self, act, repeated, lost):
        world = self.world
        await world.time.sleep(world.latency())
        while world.time.now < world.frozen_until:
            await world.time.sleep(world.frozen_until - world.time.now + world.latency())
        return None if lost is not None and lost.startswith("asked") else act(repeated)


class Node:
    """One node: who is connected to it, and what it does by itself."""

    def __init__(self, world):
        self.world = world
        self.wire = Wire(world)
        name = f"n{next(world.names)}"
        self.lease = Lease(self.wire, name, LENGTH, GRACE)
        self.roster = Roster(self.wire, self.wire, self.lease, name)
        self.presence = Presence(self.roster, self.wire.publish, clock=lambda: world.time.now)
        self.sessions = []
        self.tasks = set()
        self.spawn(self.keep())
        self.spawn(self.tick())

    def spawn(self, work):
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def pause(self, seconds):
        await self.world.time.sleep(seconds)
        while self.world.time.now < self.wire.stalled_until:
            await self.world.time.sleep(self.wire.stalled_until - self.world.time.now)
        if self.wire.dead:
            await asyncio.Event().wait()

    async def keep(self):
        while True:
            with contextlib.suppress(Unavailable):
                await self.lease.beat()
            await self.pause(LENGTH / 3)

    async def tick(self):
        while True:
            await self.pause(1.0)
            await self.presence.tick()

    async def connect(self, who):
        """One connection: as the gateway lets it in, and gives it back in any case."""
        session = Session(who)
        self.sessions.append(session)
        try:
            await self.presence.enter(*who)
            session.present = True
            await session.over.wait()
        except Unavailable:
            pass
        finally:
            self.sessions.remove(session)
            if session.present:
                await self.presence.leave(*who)

    async def describe(self, who, status):
        with contextlib.suppress(Unavailable):
            await self.presence.update(*who, status)


class Session:
    def __init__(self, who):
        self.who = who
        self.present = False
        self.over = asyncio.Event()


class Watcher:
    """Believes what it read when it was let in, and what it hears from then on."""

    def __init__(self, world, node):
        self.world = world
        self.node = node
        self.begin = len(world.log)
        self.people = None

    async def read(self):
        """Asked until it is answered, as a page does. What happened before it began to listen is not heard."""
        while True:
            try:
                found = {
                    (project, person.user_id): (person.connections, person.status)
                    for project in ("p", "q")
                    for person in await self.node.roster.people(project)
                }
            except Unavailable:
                await self.world.time.sleep(0.3)
                continue
            self.people = found
            return

    def believes(self):
        """How many connections and which status; and, by joined and left alone, who is here."""
        people, here = dict(self.people), set(self.people)
        for project, event in self.world.log[self.begin :]:
            who = (project, event.user_id)
            match event:
                case PresenceJoined():
                    people[who] = (1, "")
                    here.add(who)
                case PresenceLeft():
                    people.pop(who, None)
                    here.discard(who)
                case PresenceUpdated():
                    people[who] = (event.connections, event.status)
        return people, here


class World:
    def __init__(self, client, seed, faults):
        self.client = client
        self.random = random.Random(seed)
        # Of a node that dies while the server forgets everything nobody can know what it had said last.
        self.faults = [fault for fault in faults if fault != "die" or "flush" not in faults]
        self.time = Time()
        self.names = count()
        self.log = []
        self.sent = []
        self.frozen_until = 0.0
        self.losing_until = 0.0
        self.digests = {}
        self.nodes = []
        self.gone = []
        self.watchers = []

    def latency(self):
        return self.random.choice((0.001, 0.002, 0.01, 0.05, 0.12))

    def draw_loss(self):
        if self.time.now >= self.losing_until or self.random.random() < 0.6:
            return None
        return self.random.choice(("asked", "answer", "asked for good", "answer for good"))

    def eval(self, script, keys, arguments):
        if script not in self.digests:
            source = files("router.brokers").joinpath("lua", f"{script}.lua").read_text(encoding="utf-8")
            self.digests[script] = source.replace("redis.call('TIME')", "redis.call('LRANGE', 'clock', 0, 1)")
        seconds, rest = divmod(round(self.time.now * 1e6), 1_000_000)
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.delete("clock")
            pipeline.rpush("clock", seconds, rest)
            pipeline.eval(self.digests[script], len(keys), *keys, *arguments)
            return pipeline.execute()[-1]

    async def watch(self, after=0.0):
        await self.time.sleep(after)
        watcher = Watcher(self, self.random.choice(self.nodes))
        self.watchers.append(watcher)
        await watcher.read()

    async def play(self):
        self.nodes = [Node(self) for _ in range(3)]
        await self.time.run(1.0)
        self.reading = [asyncio.create_task(self.watch())]
        for _ in range(ROUNDS):
            end = self.time.now + TROUBLE
            while self.time.now < end:
                await self.act()
                await self.time.run(self.random.choice((0.0, 0.003, 0.02, 0.1, 0.3, 1.0, 2.5)))
            for _ in range(self.random.choice((0, 2, 3, 4))):  # the last words meet each other
                await self.act(("enter", "leave", "status"))
                await self.time.run(self.random.choice((0.0, 0.0, 0.002, 0.1)))
            self.losing_until = 0.0
            for node in self.nodes:
                node.wire.cut_until = 0.0
            await self.time.run(BOUND)
            self.check()

    async def act(self, among=None):
        choose = self.random
        node = choose.choice(self.nodes)
        present = [session for session in node.sessions if session.present and not session.over.is_set()]
        kinds = among or ("enter", "enter", "leave", "leave", "leave", "status", "watch", *self.faults)
        what = choose.choice(kinds)
        if what == "enter":
            node.spawn(node.connect(choose.choice(PEOPLE)))
        elif what == "leave" and present:
            choose.choice(present).over.set()
        elif what == "status" and present:
            node.spawn(node.describe(choose.choice(present).who, choose.choice(("", "reading", "writing"))))
        elif what == "watch" and len(self.watchers) < 9:
            self.reading.append(asyncio.create_task(self.watch()))
        elif what == "die":
            node.wire.dead = True
            for watcher in [one for one in self.watchers if one.node is node and one.people is None]:
                self.watchers.remove(watcher)
                self.reading.append(asyncio.create_task(self.watch()))
            self.gone.append(node)
            self.nodes[self.nodes.index(node)] = Node(self)
        elif what == "part":
            node.wire.cut_until = self.time.now + choose.choice((0.5, 4.0, LENGTH + 2.0))
        elif what == "stall":
            node.wire.stalled_until = self.time.now + choose.choice((0.5, 1.5, 4.0))
        elif what == "freeze":
            self.frozen_until = self.time.now + choose.choice((0.3, 1.5))
        elif what == "lose":
            self.losing_until = self.time.now + choose.choice((0.05, 0.3, 2.0))
        elif what == "cancel" and node.tasks:
            tasks = [task for task in node.tasks if task.get_coro().__name__ in ("connect", "describe")]
            if tasks:
                choose.choice(tasks).cancel()
        elif what == "flush":
            self.client.flushdb()
            # Numbering is gone with it, so all pages are told to reload. Nodes notice when what is under way is there.
            self.watchers.clear()
            self.reading.append(asyncio.create_task(self.watch(after=0.5)))

    def check(self):
        truth = Counter(session.who for node in self.nodes for session in node.sessions if session.present)
        assert self.watchers
        for watcher in self.watchers:
            people, here = watcher.believes()
            assert {who: connections for who, (connections, _) in people.items()} == dict(truth), "connections"
            assert here == set(truth), "who is here"
            for (project, user), (_, status) in people.items():
                assert status == (self.client.hget(f"router:{{limits}}:status:{project}", user) or b"").decode(), (
                    "status"
                )

    async def end(self):
        await asyncio.sleep(0)
        while running := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            for task in running:
                task.cancel()
            await asyncio.sleep(0)


async def play(client, seed, faults):
    world = World(client, seed, faults)
    try:
        await world.play()
    finally:
        await world.end()
    return world


def run(url, seed, faults):
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        return asyncio.run(play(client, seed, faults))


@settings(
    max_examples=int(os.environ.get("ROUTER_TEST_EXAMPLES", "25")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.integers(0, 2**32), st.sets(st.sampled_from(FAULTS)))
def test_in_the_end_everybody_believes_what_is_so(redis_url, seed, faults):
    run(redis_url, seed, sorted(faults))
