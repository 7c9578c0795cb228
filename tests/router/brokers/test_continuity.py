"""Numbers that join up, whatever is lost, doubled or forgotten on the way."""

import asyncio
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.brokers.base import Position
from router.brokers.continuity import Continuity, Topic
from router.errors import Unavailable

NAME = "project:p"


class Server:
    """A model of what Redis keeps of one topic, and of what it may do to it."""

    def __init__(self, keeps=1000):
        self.epoch, self.seq, self.log, self.keeps = "e1", 0, {}, keeps
        self.said = {}
        self.away = False

    def publish(self):
        self.seq += 1
        text = b"%d said under %s, the %dth" % (self.seq, self.epoch.encode(), len(self.said))
        self.log[self.seq] = text
        self.log = dict(list(self.log.items())[-self.keeps :])
        self.said[text] = (self.epoch, self.seq)
        return self.epoch, self.seq, text

    def fail_over(self, losing):
        """A replica takes over that had not got the last events."""
        for _ in range(min(losing, self.seq)):
            self.log.pop(self.seq, None)
            self.seq -= 1

    def forget(self):
        self.epoch, self.seq, self.log = self.epoch + "'", 0, {}

    async def remembered(self, _name, after):
        if self.away:
            raise Unavailable("away")
        found = [] if after is None else [(seq, text) for seq, text in self.log.items() if seq > after]
        return Position(self.epoch, self.seq), found

    async def renumber(self, _name, epoch):
        if self.epoch == epoch:
            self.epoch += "+"


class Node:
    def __init__(self, server):
        self.server = server
        self.got = []
        self.continuity = Continuity(server.remembered, server.renumber, self._deliver, self._lost)

    def _deliver(self, _name, seq, text):
        self.got.append((seq, text))

    def _lost(self, _name, position):
        self.got.append(("reload", position))

    async def begin(self):
        topic = self.continuity.topics[NAME] = Topic()
        topic.count = 1
        await self.continuity.begin(NAME, topic)
        topic.ready.set()

    async def settle(self):
        self.continuity.fill(NAME)
        while self.continuity._filling:
            await asyncio.sleep(0)


def current(node):
    """What the node's clients end with: all that came since the last reload."""
    ends = [index for index, entry in enumerate(node.got) if entry[0] == "reload"]
    return node.got[ends[-1] + 1 if ends else 0 :]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(["arrives", "is lost", "arrives twice", "arrives late"])),
        st.tuples(st.just("fail over"), st.integers(1, 4)),
        st.tuples(st.just("forget"), st.none()),
        st.tuples(st.just("settle"), st.none()),
    ),
    max_size=25,
)


@given(steps, st.integers(2, 30))
@example(
    [
        ("publish", "is lost"),
        ("publish", "arrives"),
        ("fail over", 1),
        ("publish", "arrives"),
        ("publish", "arrives"),
    ],
    2,
)
@settings(max_examples=400, deadline=None)
def test_nothing_is_missing_that_is_not_told(history, keeps):
    async def play():
        server = Server(keeps)
        node = Node(server)
        await node.begin()
        late = []
        for what, how in history:
            if what == "publish":
                message = server.publish()
                if how == "arrives late":
                    late.append(message)
                elif how != "is lost":
                    for _ in range(2 if how == "arrives twice" else 1):
                        node.continuity.take(NAME, *message)
                    for old in late:
                        node.continuity.take(NAME, *old)
                    late.clear()
            elif what == "fail over":
                server.fail_over(how)
                await node.settle()  # a failover ends the connection, and a new one has all compared
            elif what == "forget":
                server.forget()
                await node.settle()
            else:
                await node.settle()
            await asyncio.sleep(0)
        await node.settle()
        mine = current(node)
        texts = [text for _, text in mine]
        assert len(texts) == len(set(texts)), "nothing twice"
        assert [seq for seq, _ in mine] == sorted(seq for seq, _ in mine)
        topic = node.continuity.topics[NAME]
        assert (topic.epoch, topic.seq) == (server.epoch, server.seq)
        start = mine[0][0] if mine else server.seq + 1
        if any(entry[0] == "reload" for entry in node.got):
            position = next(entry[1] for entry in reversed(node.got) if entry[0] == "reload")
            assert start == position.seq + 1
        else:
            assert start == 1
        assert [seq for seq, _ in mine] == list(range(start, server.seq + 1))
        for seq, text in mine:
            assert server.log.get(seq, text) == text, "what the server has now under a number is what was told"

    asyncio.run(play())


async def test_a_failover_that_gave_numbers_to_other_events_is_noticed_though_they_join_up():
    server = Server()
    node = Node(server)
    await node.begin()
    for _ in range(3):
        node.continuity.take(NAME, *server.publish())
    server.fail_over(2)
    for _ in range(2):
        server.publish()  # numbers 2 and 3 again, for other events, while nobody was connected
    await node.settle()
    assert node.got[-1] == ("reload", Position("e1+", 3))
    node.continuity.take(NAME, *server.publish())
    assert node.got[-1][0] == 4


async def test_what_nobody_here_wants_any_more_is_counted_but_not_read():
    server = Server()
    node = Node(server)
    await node.begin()
    topic = node.continuity.topics[NAME]
    topic.count = 0
    node.continuity.take(NAME, *server.publish())
    topic.count = 1
    node.continuity.take(NAME, *server.publish())
    assert [seq for seq, _ in node.got] == [2]


async def test_while_the_server_is_away_it_is_asked_again():
    server = Server()
    node = Node(server)
    await node.begin()
    server.publish()
    server.away = True
    node.continuity.fill(NAME)
    await asyncio.sleep(0)
    assert node.got == []
    server.away = False
    while not node.got:
        await asyncio.sleep(0.01)
    assert [seq for seq, _ in node.got] == [1]
    await node.continuity.stop()


async def test_a_gap_while_a_topic_begins_is_filled():
    delivered, server = [], [(n, b"m%d" % n) for n in range(1, 8)]

    async def remembered(name, after):
        await asyncio.sleep(0)
        if after is None:
            c.take("t", "e", 7, b"m7")  # 6 was lost on the way; we stand at 5
            return Position("e", 5), []
        return Position("e", 7), [x for x in server if x[0] > after]

    async def renumber(*_): ...

    c = Continuity(remembered, renumber, lambda t, s, r: delivered.append(s), lambda *a: delivered.append(a))
    t = c.topics["t"] = Topic()
    t.count = 1
    await c.begin("t", t)
    t.ready.set()
    for _ in range(20):
        await asyncio.sleep(0.01)

    async def places(names):
        return [Position("e", 7) for _ in names]

    await c.check(places)
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert not t.catching_up, (t.catching_up, t.ahead, delivered)
    assert delivered == [6, 7]


@given(st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_every_gap_is_filled_however_it_falls(seed):
    """A message with a gap in the very turn in which the filling before it ends."""

    async def play():
        rnd = Random(seed)
        log, delivered = [], []

        async def remembered(name, after):
            for _ in range(rnd.randrange(3)):
                await asyncio.sleep(0)
            top = len(log)
            answer = [(n, b"m%d" % n) for n in range((after or 0) + 1, top + 1)]
            for _ in range(rnd.randrange(3)):
                await asyncio.sleep(0)
            return Position("e", top), answer

        async def renumber(*_):
            raise AssertionError

        c = Continuity(remembered, renumber, lambda t, s, r: delivered.append(s), lambda *a: delivered.append(a))
        t = c.topics["t"] = Topic()
        t.count = 1
        await c.begin("t", t)
        t.ready.set()
        for _ in range(30):
            log.append(1)
            if rnd.random() < 0.5:
                c.take("t", "e", len(log), b"m%d" % len(log))
            for _ in range(rnd.randrange(3)):
                await asyncio.sleep(0)
        for _ in range(30):
            await asyncio.sleep(0)

        async def places(names):
            return [Position("e", len(log)) for _ in names]

        await c.check(places)
        for _ in range(30):
            await asyncio.sleep(0)
        assert not t.catching_up, (seed, t.ahead, t.seq)
        assert delivered == list(range(1, 31)), seed

    asyncio.run(play())


async def test_a_filling_of_a_topic_that_was_let_go_does_not_swallow_the_next_ones():
    away, delivered = [True], []

    async def remembered(name, after):
        await asyncio.sleep(0)
        if away[0] and after is not None:
            raise Unavailable("x")
        return Position("e", 3), [(n, b"m%d" % n) for n in range((after or 0) + 1, 4)]

    async def renumber(*_): ...

    c = Continuity(remembered, renumber, lambda t, s, r: delivered.append(s), lambda *a: delivered.append(a))
    old = c.topics["t"] = Topic()
    old.count = 1
    await c.begin("t", old)
    old.ready.set()
    c.fill("t")
    await asyncio.sleep(1.0)  # it backs off
    del c.topics["t"]  # as `_sweep`
    away[0] = False
    new = c.topics["t"] = Topic()
    new.count = 1
    await c.begin("t", new)
    new.ready.set()
    c.fill("t")  # reconnected once more
    await asyncio.sleep(3)
    assert not new.catching_up
