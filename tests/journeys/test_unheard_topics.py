"""Numbers in topics that nobody listens to, and events without a number, through each fault of Redis: a row each.

`python -m tests.journeys.test_unheard_topics` prints the rows.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import redis.asyncio
from msgspec import Struct

from plugins.step import StepStarted
from router.backend import Backend
from tests.journeys.test_positions import Page, started
from tests.node import make_token, run_node
from tests.servers import find_server, run_cluster, run_sentinel, run_server

PROJECT = "p1"
META = "router:{project:p1}:meta"

Fault = Callable[[], Awaitable[None]]
World = tuple[str, Fault, Fault]
"""The broker's URL; what is done before the last events are published, and what then befalls Redis."""


class Row(Struct, frozen=True):
    """What one who had 70 of 70 numbers, and a watcher who stayed, were told."""

    fault: str
    recovered: bool
    resync: bool
    unheard: list[str]
    """What was shown without a word to one who came back, of events published after the fault; of 40."""
    loose: int
    """Events without a number that the watcher got, or was told to reload for; of 6."""

    def __str__(self) -> str:
        told = "resync" if self.resync else "recovered"
        return f"{self.fault:36} {told:10} {len(self.unheard):3} of 40 {self.loose:6} of 6"


async def nothing() -> None:
    """Not needed here."""


@asynccontextmanager
async def single(program: str, back: str) -> AsyncIterator[World]:
    """One server that is killed and comes back: with its log, an older `snapshot`, or `nothing`."""
    options = ("--appendonly", "yes") if back == "log" else ()
    with run_server(program, *options) as server:

        async def save() -> None:
            if back == "snapshot":
                async with redis.asyncio.Redis.from_url(server.url) as operator:
                    await operator.save()

        async def befall() -> None:
            server.kill()
            await asyncio.to_thread(server.start)

        yield server.url, save, befall


@asynccontextmanager
async def told(program: str, *command: str) -> AsyncIterator[World]:
    """One server that is told something: to forget all, or to end its subscriptions."""
    with run_server(program) as server:

        async def befall() -> None:
            async with redis.asyncio.Redis.from_url(server.url) as operator:
                await operator.execute_command(*command)

        yield server.url, nothing, befall


@asynccontextmanager
async def promoted(program: str) -> AsyncIterator[World]:
    """A master that is killed, and a replica that takes over without the last it was told of."""
    with run_sentinel(program) as sentinel:
        replica = next(server for server in sentinel.servers if server is not sentinel.master())

        async def stop_following() -> None:
            replica.freeze()

        async def befall() -> None:
            sentinel.kill_master()
            replica.thaw()
            await sentinel.wait_for_failover()

        yield sentinel.url, stop_following, befall


@asynccontextmanager
async def moved(program: str) -> AsyncIterator[World]:
    """The topic's slot of a cluster goes to another master."""
    with run_cluster(program) as cluster:

        async def befall() -> None:
            await asyncio.to_thread(cluster.move, META, (cluster.owner(META) + 1) % 3)

        yield cluster.url, nothing, befall


WORLDS = {
    "restarted, with its log": lambda program: single(program, "log"),
    "restarted, from an older snapshot": lambda program: single(program, "snapshot"),
    "restarted, with nothing": lambda program: single(program, "nothing"),
    "FLUSHALL": lambda program: told(program, "FLUSHALL"),
    "subscriptions killed": lambda program: told(program, "CLIENT", "KILL", "TYPE", "pubsub"),
    "replica promoted, lacks the last": promoted,
    "slot moved to another master": moved,
}


async def number(backend: Backend, *names: str) -> None:
    for name in names:
        await backend.publish(PROJECT, StepStarted(step_id=name))


async def come_back(world: World, fault: str) -> tuple[bool, bool, list[str]]:
    """Nobody listens to the topic, on no node, while it happens."""
    url, before, befall = world
    async with Backend(url, patience=20) as backend:
        async with run_node(broker=url) as node, node.client() as client:
            page = Page(client)
            await number(backend, *map(str, range(40)))
            await before()
            await number(backend, *map(str, range(40, 70)))
            await page.read(lambda page: page.pos == 70)
        await befall()
        await number(backend, *(f"after {each}" for each in range(40)))
        async with run_node(broker=url) as node, node.client(since=page.since) as client:
            again = Page(client)
            await node.publish(started("last"))
            await again.read(lambda page: "last" in page.steps())
            shown = [step for step in again.steps() if step.startswith("after")]
            return client.welcome["recovered"], bool(again.resyncs), shown


async def stay(world: World, fault: str) -> int:
    """A watcher stays, while people come and go: their presence has no number."""
    url, before, befall = world
    async with run_node(broker=url) as one, run_node(broker=url) as two, two.client() as client:
        page = Page(client)
        await page.read(lambda page: page.events)  # it is told of itself, so all of it is there
        await before()

        async def come(each: int) -> None:
            until = time.monotonic() + 20
            while time.monotonic() < until:
                try:
                    async with one.client(token=make_token(f"person-{each}")):
                        return
                except Exception:  # Redis is away
                    await asyncio.sleep(0.2)

        coming = asyncio.gather(*(come(each) for each in range(6)))
        await befall()
        await coming
        people = {f"person-{each}" for each in range(6)}

        def joined(page: Page) -> set[str]:
            return people & {e["user_id"] for e in page.events if e["type"] == "presence_joined"}

        await page.read(lambda page: len(joined(page)) == 6 or bool(page.resyncs))
        return 6 if page.resyncs else len(joined(page))


async def row(fault: str, program: str) -> Row:
    """What one fault comes to."""
    async with WORLDS[fault](program) as world:
        recovered, resync, shown = await come_back(world, fault)
    async with WORLDS[fault](program) as world:
        loose = await stay(world, fault)
    return Row(fault, recovered, resync, shown, loose)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", WORLDS)
async def test_nobody_takes_new_numbers_for_old_ones_or_misses_what_has_none(fault, program):
    found = await row(fault, program)
    assert found.recovered is not found.resync
    if found.recovered:
        assert len(found.unheard) == 40
    assert found.loose == 6
    if "killed" in fault:
        assert found.recovered


async def main() -> None:
    program = find_server()
    assert program is not None
    print(f"{'done to Redis while nobody listens':36} {'is told':10} {'shown':9} {'without a number'}")
    for fault in WORLDS:
        print(await row(fault, program), flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
