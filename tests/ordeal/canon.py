"""The fixed ordeals, one for each thing that is done to Redis.

Two nodes with clients on both, a backend that publishes all the while, and something that is done to Redis in the
middle. Everything is counted in the clients' own words: what came, what came twice, what never came.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from secrets import token_hex
from typing import Any

import redis.asyncio
from msgspec import Struct

from plugins.step import StepStarted
from router.backend import Backend
from router.errors import Unavailable
from tests.node import Client, Node, run_node
from tests.servers import black_hole, run_cluster, run_sentinel, run_server

__all__ = ["ORDEALS", "Outcome", "ordeal"]

EVERY = 0.02
"""Seconds between two publishes."""


class Outcome(Struct, frozen=True):
    """How it went, over all clients."""

    what: str
    published: int
    """Events that the backend was told are published."""
    refused: int
    """Events that it was told are not."""
    delivered: int
    """Events that came, over all clients."""
    twice: int
    """Events that a client got more than once."""
    reloads: int
    """Times that a client was told that continuity is lost and to reload."""
    lost: int
    """Events that a client neither got nor was told to reload for. To be 0."""
    dropped: int
    """Connections that did not live through it. To be 0."""
    caught_up: float
    """Seconds from the moment that Redis was back until every client had all."""

    def __str__(self) -> str:
        return (
            f"{self.what:44} {self.published:9,} {self.refused:7,} {self.delivered:9,} {self.twice:5} "
            f"{self.reloads:7} {self.lost:4} {self.dropped:7} {self.caught_up:9.2f}"
        )

    @staticmethod
    def head() -> str:
        """Names of the columns."""
        return (
            f"{'done to Redis':44} {'published':>9} {'refused':>7} {'delivered':>9} {'twice':>5} "
            f"{'reloads':>7} {'lost':>4} {'dropped':>7} {'caught up':>9}"
        )


class _Viewer:
    """One person's page: notes what comes, and what had been published when it was told to reload."""

    def __init__(self, client: Client, published: dict[str, float]) -> None:
        self.client = client
        self._published = published
        self.got: Counter[str] = Counter()
        self.covered: set[str] = set()
        self.reloads = 0
        self.gone = False

    async def read(self) -> None:
        try:
            while True:
                frame = await self.client.frame(timeout=60)
                for event in frame["events"] if frame["type"] == "batch" else [frame]:
                    self._take(event)
        except asyncio.CancelledError:
            raise
        except Exception:
            self.gone = True

    def _take(self, event: dict[str, Any]) -> None:
        if event["type"] == "step_started":
            self.got[event["step_id"]] += 1
        elif event["type"] == "resync" and "topic" not in event:
            self.reloads += 1
            self.covered.update(self._published)  # the page loads all that there is

    def has(self, names: set[str]) -> bool:
        return all(name in self.got or name in self.covered for name in names)

    def lacks(self) -> set[str]:
        return self._published.keys() - self.got.keys() - self.covered


async def ordeal(
    what: str,
    url: str,
    befall: Callable[[], Awaitable[Any]],
    *,
    clients: int = 10,
    node_url: str | None = None,
    lead: float = 0.3,
    tail: float = 0.5,
    limit: float = 30.0,
    **settings: Any,
) -> Outcome:
    """Have `befall` done to the Redis at `url`; it returns when Redis is back.

    `node_url`: the address that the nodes use, where that is another than the backend's. Times in seconds: `lead`
    before and `tail` after it in which is published, `limit` for catching up.
    """
    run = token_hex(4)  # the same server may have seen others
    published: dict[str, float] = {}
    refused: list[str] = []
    issued: list[str] = []
    async with AsyncExitStack() as stack:
        nodes: list[Node] = [
            await stack.enter_async_context(run_node(broker=node_url or url, limit_user=1000, **settings))
            for _ in range(2)
        ]
        backend = await stack.enter_async_context(Backend(url, patience=limit, room=10_000))
        viewers = []
        for number in range(clients):
            # Patient with pings: what is shown here is that the connection lives, not that a node is idle.
            client = await stack.enter_async_context(nodes[number % 2].client(ping_interval=None))
            viewers.append(_Viewer(client, published))
        reading = [asyncio.create_task(viewer.read()) for viewer in viewers]
        going = set()

        async def publish(name: str) -> None:
            try:
                await backend.publish("p1", StepStarted(step_id=name), message_id=name)
                published[name] = time.monotonic()
            except Unavailable:
                refused.append(name)

        async def publish_on() -> None:
            for number in range(1_000_000):
                issued.append(f"{run}-{number}")
                task = asyncio.create_task(publish(issued[-1]))
                going.add(task)
                task.add_done_callback(going.discard)
                await asyncio.sleep(EVERY)

        publishing = asyncio.create_task(publish_on())
        await asyncio.sleep(lead)
        await befall()
        back = time.monotonic()
        begun = set(issued)  # what came later meets a Redis that is there
        caught_up = limit
        until = back + tail
        while time.monotonic() < back + limit:
            if caught_up == limit and all(viewer.has(begun - set(refused)) for viewer in viewers):
                caught_up = time.monotonic() - back
            if time.monotonic() > until:
                publishing.cancel()
                if not going and caught_up < limit and not any(viewer.lacks() for viewer in viewers):
                    break
            await asyncio.sleep(0.005)
        await asyncio.gather(publishing, *going, return_exceptions=True)
        await asyncio.sleep(0.2)  # what comes twice would come now
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    return Outcome(
        what=what,
        published=len(published),
        refused=len(refused),
        delivered=sum(len(viewer.got) for viewer in viewers),
        twice=sum(count > 1 for viewer in viewers for count in viewer.got.values()),
        reloads=sum(viewer.reloads for viewer in viewers),
        lost=sum(len(viewer.lacks()) for viewer in viewers),
        dropped=sum(viewer.gone for viewer in viewers),
        caught_up=caught_up,
    )


# -- what is done to Redis


async def nothing(program: str) -> Outcome:
    """For comparison."""
    with run_server(program) as server:
        return await ordeal("nothing", server.url, lambda: asyncio.sleep(0.5))


async def forgotten(program: str) -> Outcome:
    """Killed, and started again without its memory."""
    with run_server(program) as server:

        async def befall() -> None:
            server.kill()
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.start)

        return await ordeal("killed, back after 0.5 s, knows nothing", server.url, befall)


async def remembered(program: str) -> Outcome:
    """Killed, and started again with what it wrote down (appendfsync always)."""
    with run_server(program, "--appendonly", "yes", "--appendfsync", "always") as server:

        async def befall() -> None:
            server.kill()
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.start)

        return await ordeal("killed, back after 0.5 s, with its AOF", server.url, befall)


async def frozen(program: str, seconds: float = 7.0) -> Outcome:
    """Held still, for longer than an answer may take."""
    with run_server(program) as server:

        async def befall() -> None:
            server.freeze()
            await asyncio.sleep(seconds)
            server.thaw()

        return await ordeal(f"SIGSTOP for {seconds:g} s", server.url, befall)


async def swallowed(program: str, seconds: float = 11.0) -> Outcome:
    """Its network takes everything and brings nothing, for the nodes; the backend has another way to it."""
    with run_server(program) as server:
        async with black_hole(server) as hole:

            async def befall() -> None:
                hole.swallow()
                await asyncio.sleep(seconds)
                hole.restore()

            what = f"black hole before both nodes for {seconds:g} s"
            return await ordeal(what, server.url, befall, node_url=hole.url)


async def cut(program: str) -> Outcome:
    """All connections reset, ten times."""
    with run_server(program) as server:
        async with black_hole(server) as hole:

            async def befall() -> None:
                for _ in range(10):
                    hole.cut()
                    await asyncio.sleep(0.05)

            return await ordeal("all connections reset ten times", hole.url, befall)


async def flushed(program: str) -> Outcome:
    """Told to forget everything."""
    with run_server(program) as server:

        async def befall() -> None:
            async with redis.asyncio.Redis.from_url(server.url) as operator:
                await operator.flushall()

        return await ordeal("FLUSHALL", server.url, befall)


async def failed_over(program: str) -> Outcome:
    """The master killed, and replaced by its replica."""
    with run_sentinel(program) as sentinel:

        async def befall() -> None:
            sentinel.kill_master()
            await sentinel.wait_for_failover()

        return await ordeal("master killed, Sentinel fails over", sentinel.url, befall)


async def failed_over_frozen(program: str) -> Outcome:
    """The master held still until it was replaced, then back, and for a while there are two."""
    with run_sentinel(program) as sentinel:

        async def befall() -> None:
            sentinel.freeze_master()
            await sentinel.wait_for_failover()
            sentinel.thaw_master()

        return await ordeal("master frozen, Sentinel fails over, it thaws", sentinel.url, befall)


async def cluster_failed_over(program: str, sharded: str = "") -> Outcome:
    """The master of the room's slot killed in a cluster, and replaced by its replica."""
    with run_cluster(program, replicas=True) as cluster:
        owner = cluster.owner("router:{project:p1}:meta")

        async def befall() -> None:
            cluster.kill(owner)
            await cluster.wait_for_failover(owner)

        what = f"cluster{' (sharded)' if sharded else ''}: the room's master killed"
        return await ordeal(what, f"{cluster.url}{sharded}", befall)


async def cluster_failed_over_sharded(program: str) -> Outcome:
    """The same with sharded pub/sub."""
    return await cluster_failed_over(program, "?sharded=yes")


async def slot_moved(program: str) -> Outcome:
    """The room's slot moved to another master, with sharded pub/sub."""
    with run_cluster(program) as cluster:
        key = "router:{project:p1}:meta"

        async def befall() -> None:
            await asyncio.to_thread(cluster.move, key, (cluster.owner(key) + 1) % 3)

        return await ordeal("cluster (sharded): the room's slot moved", f"{cluster.url}?sharded=yes", befall)


ORDEALS: dict[str, Callable[[str], Awaitable[Outcome]]] = {
    each.__name__: each
    for each in (
        nothing,
        forgotten,
        remembered,
        frozen,
        swallowed,
        cut,
        flushed,
        failed_over,
        failed_over_frozen,
        cluster_failed_over,
        cluster_failed_over_sharded,
        slot_moved,
    )
}
