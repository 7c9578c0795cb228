"""Numbers that join up, whatever is lost, doubled or forgotten on the way."""

import asyncio
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.brokers.base import Position
from router.brokers.continuity import Continuity, Ended, Place, Remembered, Topic
from router.errors import Unavailable

NAME = "project:p"


def remembers(epoch, seq, entries=(), *, loose=(), past=()):
    """What a server answers that has counted as many loose events as `loose` ends with."""
    count = max((number for number, _ in loose), default=0)
    return Remembered(
        Place(epoch, seq, count),
        [(number, text, 0.0) for number, text in entries],
        [(number, text, 0.0) for number, text in loose],
        dict(past),
    )


class Server:
    """A model of what Redis keeps of one topic, and of what it may do to it."""

    def __init__(self, keeps=1000):
        self.epoch, self.seq, self.log, self.keeps = "e1", 0, {}, keeps
        self.said = {}
        self.past = {}
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

    def restart(self, losing):
        """It comes back, perhaps with less, and knows that it is not what it was."""
        self.fail_over(losing)
        self.past[self.epoch] = Ended(self.seq, 0)
        self.epoch += "r"

    def forget(self):
        self.epoch, self.seq, self.log = self.epoch + "'", 0, {}
        self.past = {}

    async def remembered(self, _name, after):
        if self.away:
            raise Unavailable("away")
        found = [] if after is None else [(seq, text) for seq, text in self.log.items() if seq > after]
        return Remembered(Place(self.epoch, self.seq), [(seq, text, 0.0) for seq, text in found], [], dict(self.past))

    async def renumber(self, _name, epoch):
        if self.epoch == epoch:
            self.epoch += "+"


class Node:
    def __init__(self, server):
        self.server = server
        self.got = []
        self.continuity = Continuity(server.remembered, server.renumber, self._deliver, self._lost, self._moved)
        self.moved = []

    def _deliver(self, _name, seq, text):
        self.got.append((seq, text))

    def _moved(self, _name, position):
        self.moved.append(position.epoch)

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
        st.tuples(st.just("restart"), st.integers(0, 4)),
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
            elif what == "restart":
                server.restart(how)  # whoever publishes next may be first to notice
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
            return remembers("e", 5)
        return remembers("e", 7, [x for x in server if x[0] > after])

    async def renumber(*_): ...

    c = Continuity(remembered, renumber, lambda t, s, r: delivered.append(s), lambda *a: delivered.append(a))
    t = c.topics["t"] = Topic()
    t.count = 1
    await c.begin("t", t)
    t.ready.set()
    for _ in range(20):
        await asyncio.sleep(0.01)

    async def places(names):
        return [Place("e", 7) for _ in names]

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
            return remembers("e", top, answer)

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
            return [Place("e", len(log)) for _ in names]

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
        return remembers("e", 3, [(n, b"m%d" % n) for n in range((after or 0) + 1, 4)])

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


async def test_a_server_that_restarts_with_all_it_had_goes_on_under_another_epoch_and_nobody_reloads():
    server = Server()
    node = Node(server)
    await node.begin()
    for _ in range(3):
        node.continuity.take(NAME, *server.publish())
    server.restart(losing=0)
    node.continuity.take(NAME, *server.publish())
    await node.settle()
    assert [seq for seq, _ in node.got] == [1, 2, 3, 4]
    assert node.moved == ["e1r"]


async def test_a_server_that_restarts_with_less_than_was_seen_has_everybody_reload():
    server = Server()
    node = Node(server)
    await node.begin()
    for _ in range(3):
        node.continuity.take(NAME, *server.publish())
    server.restart(losing=2)
    for _ in range(2):
        server.publish()  # 2 and 3 again
    await node.settle()
    assert node.got[-1] == ("reload", Position("e1r", 3))
    assert node.moved == []


class Loose:
    """A node beside a server that counts events without a number of their own."""

    def __init__(self, answer):
        self.answer, self.got, self.lost = answer, [], []
        self.continuity = Continuity(
            self.remembered, None, lambda _t, _s, text: self.got.append(text), lambda _t, place: self.lost.append(place)
        )

    async def remembered(self, _name, _after):
        return self.answer

    async def begin(self):
        topic = self.continuity.topics[NAME] = Topic()
        topic.count = 1
        await self.continuity.begin(NAME, topic)

    async def settle(self):
        self.continuity.fill(NAME)
        while self.continuity._filling:
            await asyncio.sleep(0)


async def test_loose_events_that_a_broken_subscription_missed_are_brought_once():
    node = Loose(remembers("e", 0))
    await node.begin()
    node.continuity.take(NAME, "e/1", 0, b"one")
    node.answer = remembers("e", 0, loose=[(1, b"one"), (2, b"two"), (3, b"three")])
    await node.settle()
    node.continuity.take(NAME, "e/3", 0, b"three")
    node.continuity.take(NAME, "e/4", 0, b"four")
    assert (node.got, node.lost) == ([b"one", b"two", b"three", b"four"], [])


async def test_a_gap_between_loose_events_is_filled():
    node = Loose(remembers("e", 0))
    await node.begin()
    node.answer = remembers("e", 0, loose=[(1, b"one"), (2, b"two")])
    node.continuity.take(NAME, "e/2", 0, b"two")
    while node.continuity._filling:
        await asyncio.sleep(0)
    assert node.got == [b"one", b"two"]


async def test_loose_events_that_nobody_remembers_have_everybody_reload():
    node = Loose(remembers("e", 0))
    await node.begin()
    node.answer = remembers("e", 0, loose=[(2, b"two")])
    await node.settle()
    assert node.lost == [Position("e", 0)]


async def test_loose_events_that_only_the_old_server_counted_are_not_told_again_and_new_ones_are():
    node = Loose(remembers("e", 0))
    await node.begin()
    for count in (1, 2, 3):
        node.continuity.take(NAME, f"e/{count}", 0, b"%d" % count)
    past = {"e": Ended(0, 1)}  # it came back with one of the three
    node.answer = remembers("f", 0, loose=[(1, b"1"), (2, b"new")], past=past)
    node.continuity.take(NAME, "f/2", 0, b"new")
    while node.continuity._filling:
        await asyncio.sleep(0)
    assert (node.got, node.lost) == ([b"1", b"2", b"3", b"new"], [])


async def test_a_loose_event_of_a_server_that_was_replaced_is_shown_though_nobody_remembers_it():
    node = Loose(remembers("e", 0))
    await node.begin()
    node.continuity.fill(NAME)
    node.continuity.take(NAME, "e/1", 0, b"one")  # while history is read
    node.answer = remembers("f", 0, past={"e": Ended(0, 0)})
    while node.continuity._filling:
        await asyncio.sleep(0)
    assert (node.got, node.lost) == ([b"one"], [])
