"""Whatever happens to nodes, answers and the server, its counts end as those of a plain model."""

import asyncio
import contextlib
import os
from collections import Counter

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.brokers import script
from router.brokers.base import Limits, Notice, Person
from router.brokers.lease import DOUBTED, LEAVING, NODES
from router.errors import Unavailable
from tests.router.brokers.nodes import Part, Table, connect

LIMITS = Limits(user=3, project=4, system=6)
NODE = st.integers(0, 2)
USER, PROJECT = st.sampled_from(["ada", "b o b"]), st.sampled_from(["p", "q"])
LOSS = st.sampled_from([None] * 6 + ["asked", "answer", "asked for good", "answer for good"])
ORDINARY = [
    st.tuples(st.just("claim"), NODE, PROJECT, USER),
    st.tuples(st.just("release"), NODE, st.integers(0, 9)),
    st.tuples(st.just("enter"), NODE, PROJECT, USER),
    st.tuples(st.just("leave"), NODE, st.integers(0, 9)),
    st.tuples(st.just("die"), NODE),
    st.tuples(st.just("beat"), NODE),
    st.tuples(st.just("renew"), NODE),
    st.tuples(st.just("grace"), NODE),
]
TROUBLE = [st.tuples(st.just("lapse"), NODE), st.tuples(st.just("flush"), NODE)]
HISTORIES = settings(
    max_examples=int(os.environ.get("ROUTER_TEST_EXAMPLES", "25")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class World:
    """Three nodes, what each of them holds by the model, and what a viewer was shown of who is here."""

    def __init__(self, client):
        self.client = client
        self.table = Table(client)
        self.parts: list[Part] = []
        self.seats: list[Counter] = []
        self.people: list[Counter] = []
        self.leaving: set = set()
        self.shown: set = set()
        self.orderly = True
        """Nothing has happened yet that may delay an answer or bring it twice."""

    async def begin(self):
        for place in range(3):
            self.parts.append(Part(self.client, grace=60.0))
            self.seats.append(Counter())
            self.people.append(Counter())
            await self.parts[place].lease.beat()

    @property
    def present(self):
        return {who for people in self.people for who in people}

    def count(self, kind, name):
        held = sum(self.seats, Counter())
        return sum(
            n for (project, user), n in held.items() if kind == "all" or name == {"user": user}.get(kind, project)
        )

    async def do(self, action, node, *what):
        await getattr(self, f"_{action}")(node, *what)

    async def _claim(self, node, project, user):
        full = await self.parts[node].seats.claim(user, project, LIMITS)
        if self.orderly:
            counts = [("system", "all", ""), ("user", "user", user), ("project", "project", project)]
            stands = [limit for limit, kind, name in counts if self.count(kind, name) >= getattr(LIMITS, limit)]
            assert full == (stands or [None])[0]
        if full is None:
            self.seats[node][project, user] += 1

    async def _release(self, node, index):
        if self.seats[node]:
            project, user = sorted(self.seats[node].elements())[index % self.seats[node].total()]
            self.seats[node] -= Counter([(project, user)])
            await self.parts[node].seats.release(user, project)

    async def _enter(self, node, project, user):
        who = (project, user)
        arrived = await self.parts[node].roster.enter(project, user)
        if self.orderly:
            connections = sum(people[who] for people in self.people) + 1
            joined = who not in self.present | self.leaving
            assert (arrived.person, arrived.joined) == (Person(user, connections), joined)
        self.people[node][who] += 1
        self.leaving.discard(who)
        if arrived.joined:
            self.shown.add(who)
            await self._tell(node, [Notice(project, arrived.person)])

    async def _leave(self, node, index):
        if self.people[node]:
            who = sorted(self.people[node].elements())[index % self.people[node].total()]
            self._gone(node, Counter([who]))
            person = await self.parts[node].roster.leave(*who)
            if self.orderly:
                assert person == Person(who[1], sum(people[who] for people in self.people))

    def _gone(self, node, people):
        self.people[node] -= people
        self.leaving |= set(people) - self.present

    async def _die(self, node):
        await self._beat(node)  # an answer that was lost the second before may take with it that somebody joined
        await self.table.lapse(self.parts[node])
        self.seats[node] = Counter()
        self._gone(node, Counter(self.people[node]))
        self.parts[node] = Part(self.client, grace=60.0)
        await self._beat(node)

    async def _beat(self, node):
        await self.parts[node].lease.beat()

    async def _renew(self, node):
        await self.parts[node].lease.renew()

    async def _lapse(self, node):
        self.orderly = False
        await self.table.lapse(self.parts[node])

    async def _flush(self, _node):
        self.orderly = False
        await self.client.flushdb()
        for node in range(3):  # a grace is longer than the time between two beats
            await self._beat(node)
        self.shown = self.present  # everybody reloads

    async def _grace(self, node):
        await self._beat(node)
        await self.parts[node].roster._doubt_own()
        for name in (LEAVING, DOUBTED):
            for who in await self.client.zrange(name, 0, -1):
                await self.client.zadd(name, {who: 1})
        notices = await self.parts[node].roster.untold()
        gone = [(notice.project, notice.person.user_id) for notice in notices if not notice.here]
        anew = {(notice.project, notice.person.user_id) for notice in notices if notice.here and notice.anew}
        if self.orderly:
            assert (set(gone), len(gone)) == (self.leaving, len(self.leaving))
            assert set(gone) <= self.shown
            assert not anew
        self.shown = (self.shown - set(gone)) | anew
        self.leaving -= set(gone)
        await self._tell(node, notices)

    async def _tell(self, node, notices):
        with contextlib.suppress(Unavailable):  # then those who were handed out are handed out again
            await self.parts[node].roster.told(notices)

    async def check(self):
        for part in self.parts:
            part.scripts.lose, part.scripts._patience = [], 1.0
        for lease, ends in await self.client.zrange(NODES, 0, -1, withscores=True):
            if ends < 0:  # begun, not finished, and given up
                await self.client.zadd(NODES, {lease: -1})
        for node in (0, 1, 2, 0, 1, 2):
            await self._beat(node)
        for node in (0, 1, 2):
            await self._grace(node)
        assert await self.table.total() == self.count("all", "")
        for kind, name in [("user", "ada"), ("user", "b o b"), ("project", "p"), ("project", "q")]:
            assert await self.table.seats(f"{kind}:{name}") == self.count(kind, name)
        for project in ("p", "q"):
            expected = sum(self.people, Counter())
            found = {
                (project, person.user_id): person.connections for person in await self.parts[1].roster.people(project)
            }
            assert found == {who: count for who, count in expected.items() if who[0] == project}
        assert self.shown == self.present
        holding = [place for place in range(3) if self.seats[place] or self.people[place]]
        keys = await self.table.keys()
        assert {key for key in keys if key.startswith("held:")} == {f"held:{self.parts[i].lease.id}" for i in holding}
        assert not {"leaving", "doubted", "anew"} & keys


async def play(url, actions):
    async with connect(url) as client:
        world = World(client)
        await world.begin()
        for action, loss in actions:
            scripts = world.parts[action[1]].scripts
            if loss is not None and action[0] not in ("flush", "die"):
                world.orderly = False
                scripts.lose = [loss.partition(" ")[0]]
                scripts._patience = 0.0 if loss.endswith("for good") else 1.0
            try:
                await world.do(*action)
            except Unavailable:
                assert loss is not None
            scripts.lose, scripts._patience = [], 1.0
        await world.check()


def run(url, actions):
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    asyncio.run(play(url, actions))


@HISTORIES
@given(st.lists(st.one_of(ORDINARY), max_size=40))
def test_without_trouble_every_answer_is_that_of_the_model(redis_url, actions):
    run(redis_url, [(action, None) for action in actions])


@HISTORIES
@given(st.lists(st.tuples(st.one_of(ORDINARY + TROUBLE), LOSS), max_size=40))
def test_after_any_trouble_the_server_has_what_the_nodes_hold(redis_url, actions):
    script.FIRST_PAUSE = 0.0005
    run(redis_url, actions)
