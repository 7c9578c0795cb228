"""What the product's own machinery costs: merging, catching up, slow clients, a large room beside a small one."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import uvloop

from tests.benchmarks.comparison import Comparison
from tests.benchmarks.report import Aim, Figure
from tests.benchmarks.server import Server, router, token_for
from tests.benchmarks.toolchain import LOAD
from tests.benchmarks.viewer import Viewer, enter, leave

if TYPE_CHECKING:
    from tests.benchmarks.scenarios import Bench

__all__ = ["ROOMS"]


def throttled_rooms(bench: "Bench") -> Iterator[Figure]:
    """Rooms of ten with twenty progress events a second each: merged to one a second, beside sent one by one."""
    rooms = 100 if bench.pairs <= 2 else 1000
    seconds = 2 if bench.pairs <= 2 else 5

    async def cost(kind: str, rooms: int, server: Server) -> tuple[float, float]:
        viewers = await enter(server, rooms * 10, path=lambda n: server.path_of(f"r{n % rooms}"))
        began, busy = time.monotonic(), cpu_seconds(server)
        for tick in range(seconds * 20):
            for room in range(rooms):
                viewers[room].send(json.dumps(progress(kind, tick)))
            await asyncio.sleep(max(0.0, began + (tick + 1) / 20 - time.monotonic()))
        await settled(server)
        events = rooms * seconds * 20
        used = cpu_seconds(server) - busy
        received = sum(viewer.events for viewer in viewers)
        leave(viewers)
        return used * 1e6 / events, received / len(viewers) / seconds

    merged, merged_events = with_router(bench, lambda server: cost("bench_progress", rooms, server))
    # As many as one core can serve when nothing is merged.
    single, single_events = with_router(bench, lambda server: cost("bench_now", min(rooms, 200), server))
    name = f"{rooms:,} rooms of 10, 20 progress events/s in each"
    yield beside(f"{name}: CPU us an event, merged | sent one by one", merged, single, digits=1)
    yield beside(f"{name}: events/s to each viewer, merged | one by one", merged_events, single_events, digits=1)


def coalescer(bench: "Bench") -> Iterator[Figure]:
    """Fan-out to 1,000 with the coalescer in the pipeline, beside the same without it."""
    from tests.benchmarks.scenarios import Load, compare, cpu_per_delivery, deliveries_per_second, interleave

    load = Load(mode="broadcast", conns=1000, window=1, duration=bench.seconds)
    without = {"ROUTER_MIDDLEWARE": "auth,permission,rate,audit"}
    with router(bench.cores.server, without) as bare, router(bench.cores.server) as full:
        pairs = interleave(
            lambda: bench.burst(full, load), lambda: bench.burst(bare, load), deliveries_per_second, enough=bench.pairs
        )
    found = compare(pairs, cpu_per_delivery)
    yield Figure(
        "CPU us a delivery, 1,000 connections, with coalescer | without",
        found,
        digits=2,
        aim=Aim("ratio <= 1.05", lambda c: c.ratio <= 1.05),
    )


def catching_up(bench: "Bench") -> Iterator[Figure]:
    """1,000 clients resume at once and get what they missed, beside 1,000 that come anew."""

    async def seconds(since: str, server: Server) -> float:
        async with publisher(server) as http:
            for start in range(0, 500, 50):
                body = [progress("bench_progress", start + i, step=f"s{i % 10}") for i in range(49)]
                body.append({"type": "bench_now", "n": start, "step": "x"})
                await http.post("/projects/bench/events", content=json.dumps(body))
            await http.post("/projects/bench/events", content='{"type":"bench_now","n":-77,"step":"last"}')
        epoch = await epoch_of(server)
        mark = b'"n":-77' if since else b""
        query = since.replace("EPOCH", epoch)
        began = time.monotonic()
        viewers = await enter(server, 1000, path=lambda _: server.path + query, mark=mark, atime=1000)
        while mark and not all(viewer.marked_at for viewer in viewers):
            await asyncio.sleep(0.005)
        took = time.monotonic() - began
        leave(viewers)
        return took

    resumed = with_router(bench, lambda server: seconds("&since=EPOCH:1", server))
    anew = with_router(bench, lambda server: seconds("", server))
    yield beside("seconds until 1,000 are in, resuming over 500 events | coming anew", resumed, anew, digits=2)


def slow_clients(bench: "Bench") -> Iterator[Figure]:
    """One that never reads, one that reads a byte a second and one that comes back, beside 100 that read."""

    async def run(slow: bool, server: Server) -> tuple[list[float], float]:
        quick = await enter(server, 100)
        stuck = await enter(server, 3 if slow else 0, path=lambda n: server.path_of("bench", user=f"slow{n}"))
        for viewer in stuck:
            viewer.transport.pause_reading()
        slowly = asyncio.create_task(little_by_little(stuck[1])) if slow else None
        before = rss_kb(server)
        rounds = 400 if bench.pairs <= 2 else 1500
        for number in range(rounds):
            quick[0].send(stamped(4000))
            await asyncio.sleep(0.004)
            if slow and number == rounds // 2:
                stuck[2].transport.resume_reading()
        await asyncio.sleep(0.5)
        if slow:
            assert stuck[2].lost or stuck[2].latencies, "the one that came back got what it missed"
            assert stuck[2].lost or len(stuck[2].latencies) == rounds, f"{len(stuck[2].latencies)} of {rounds}"
        if slowly is not None:
            slowly.cancel()
        grown = (rss_kb(server) - before) / 1024
        latencies = sorted(value for viewer in quick for value in viewer.latencies)
        assert len(latencies) == rounds * 100, "nobody else lost anything"
        leave([*quick, *stuck])
        return latencies, grown

    without, grown_without = with_router(bench, lambda server: run(False, server))
    with_them, grown = with_router(bench, lambda server: run(True, server))
    for share in (0.5, 0.99):
        yield beside(
            f"p{share * 100:.0f} ms of 100 clients, beside 3 slow ones | without",
            with_them[int(share * len(with_them))] * 1e3,
            without[int(share * len(without))] * 1e3,
            digits=2,
        )
    yield beside("MB that the server grew by, beside 3 slow ones | without", grown, max(grown_without, 0.1), digits=1)


def fairness(bench: "Bench") -> Iterator[Figure]:
    """A room of 10,000 that is published to all the time: what a room of ten beside it feels."""
    size = 2000 if bench.pairs <= 2 else 10_000

    async def run(busy: bool, server: Server) -> list[float]:
        small = await enter(server, 10, path=lambda _: server.path_of("small"))
        crowd_process = await crowd_of(server, size if busy else 0, bench.cores.load)
        async with publisher(server) as http:
            until = time.monotonic() + (2 if bench.pairs <= 2 else 6)

            async def crowd() -> None:
                while busy and time.monotonic() < until:
                    await http.post("/projects/large/events", content='{"type":"bench_now","n":1,"step":"x"}')
                    await asyncio.sleep(0.25)

            noise = asyncio.create_task(crowd())
            while time.monotonic() < until:
                small[0].send(stamped(200))
                await asyncio.sleep(0.01)
            await noise
            await asyncio.sleep(0.3)
        latencies = sorted(value for viewer in small for value in viewer.latencies)
        leave(small)
        if crowd_process is not None:
            crowd_process.kill()
            await crowd_process.wait()
        return latencies

    quiet = with_router(bench, lambda server: run(False, server))
    beside_crowd = with_router(bench, lambda server: run(True, server))
    for share in (0.5, 0.9, 0.99):
        yield beside(
            f"p{share * 100:.0f} ms in a room of 10, beside one of {size:,} | quiet",
            beside_crowd[int(share * len(beside_crowd))] * 1e3,
            quiet[int(share * len(quiet))] * 1e3,
            digits=2,
        )


ROOMS: dict[str, Callable[["Bench"], Iterator[Figure]]] = {
    each.__name__: each for each in (throttled_rooms, coalescer, catching_up, slow_clients, fairness)
}


def with_router(bench: "Bench", work: Callable[[Server], Awaitable[Any]]) -> Any:
    """Do `work` against a fresh router, from the load's core."""
    before = os.sched_getaffinity(0)
    with router(bench.cores.server) as server:
        os.sched_setaffinity(0, {bench.cores.load})
        try:
            return uvloop.run(work(server))
        finally:
            os.sched_setaffinity(0, before)


def beside(name: str, ours: float, other: float, *, digits: int = 0) -> Figure:
    return Figure(name, Comparison(ours, other, ours / other, steady=1, of=1), digits=digits)


def publisher(server: Server) -> httpx.AsyncClient:
    token = token_for(server.key, "*")
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.port}", headers={"Authorization": f"Bearer {token}"}, timeout=60
    )


def progress(kind: str, number: int, step: str = "s1") -> dict[str, Any]:
    return {"type": kind, "n": number, "step": step, "message": "Processing chunk 45/100 of the customers table"}


def stamped(size: int) -> str:
    pad = "x" * (size - 80)
    return f'{{"type":"bench_tick","data":{{"t":{time.monotonic_ns()},"pad":"{pad}"}}}}'


async def epoch_of(server: Server) -> str:
    (viewer,) = await enter(server, 1)
    leave([viewer])
    return viewer.epoch


async def little_by_little(viewer: Viewer) -> None:
    """A byte or so a second: reading is on for a moment, with a buffer that takes next to nothing."""
    while not viewer.lost:
        viewer.transport.resume_reading()
        await asyncio.sleep(0)
        viewer.transport.pause_reading()
        await asyncio.sleep(1)


async def crowd_of(server: Server, size: int, core: int) -> asyncio.subprocess.Process | None:
    """The large room, held by the C load client: one in this process would delay what is measured here."""
    if not size:
        return None
    command = (str(LOAD), "--port", str(server.port), "--path", server.path_of("large"), *server.handshake)
    options = ("--mode", "idle", "--conns", str(size), "--settle", "30", "--connect-timeout", "60", "--no-spin")
    process = await asyncio.create_subprocess_exec(
        "taskset", "-c", str(core), *command, *options, stdout=asyncio.subprocess.DEVNULL
    )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http, asyncio.timeout(90):
        while (await http.get("/readyz")).json()["connections"] < size:
            await asyncio.sleep(0.2)
    return process


async def settled(server: Server) -> None:
    """Wait until the server has nothing left to do of what it was sent."""
    before = -1.0
    while cpu_seconds(server) - before > 0.02:
        before = cpu_seconds(server)
        await asyncio.sleep(1.1)


def cpu_seconds(server: Server) -> float:
    fields = Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_kb(server: Server) -> float:
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1])
    return 0.0
