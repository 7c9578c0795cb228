"""What is measured: one function a scenario, each yields its figures."""

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from msgspec import Struct

from tests.benchmarks.comparison import Comparison, Measure, Pair, compare, interleave
from tests.benchmarks.load import Burst, Load, run
from tests.benchmarks.report import Aim, Figure, ours_at_most, ratio_at_least
from tests.benchmarks.server import Server, router, yardstick
from tests.benchmarks.toolchain import Cores

__all__ = ["SCENARIOS", "Bench", "Scenario"]


Startable: TypeAlias = Callable[[int], AbstractContextManager[Server]]
"""Starts a server on a core."""


class Bench(Struct, frozen=True):
    """How long and where to measure."""

    cores: Cores
    pairs: int
    seconds: float

    def against_c(self, load: Load, speed: Measure, ours: Startable = router) -> list[Pair]:
        """Interleaved bursts of `load`, with both servers up all the time. `speed` tells if the machine holds still."""
        with yardstick(self.cores.server) as c, ours(self.cores.server) as server:
            return interleave(lambda: self.burst(server, load), lambda: self.burst(c, load), speed, enough=self.pairs)

    def burst(self, server: Server, load: Load) -> Burst:
        """One burst, once the server is done with the one before."""
        server.settle()
        return run(server, load, self.cores.load)


Scenario: TypeAlias = Callable[[Bench], Iterator[Figure]]


def deliveries(bench: Bench) -> Iterator[Figure]:
    """One sends to all, with four messages of 200 bytes in flight: what the fan-out costs."""
    for conns in (100, 1000):
        load = Load(mode="broadcast", conns=conns, window=4, duration=bench.seconds)
        pairs = bench.against_c(load, deliveries_per_second)
        aim = ratio_at_least(0.85) if conns == 1000 else None
        yield from throughput(
            "deliveries", f", {conns:,} connections", pairs, deliveries_per_second, cpu_per_delivery, aim=aim
        )


def latency(bench: Bench) -> Iterator[Figure]:
    """One message in flight, so nothing queues: how long until people have it, and what one frame each costs."""
    for conns in (100, 1000):
        load = Load(mode="broadcast", conns=conns, window=1, duration=bench.seconds)
        pairs = bench.against_c(load, deliveries_per_second)
        where = f", {conns:,} connections"
        yield Figure(f"latency p50 in us{where}", compare(pairs, p50), flaws=flaws(pairs))
        yield Figure(f"latency p99 in us{where}", compare(pairs, p99))
        yield Figure(f"  CPU us a delivery{where}", compare(pairs, cpu_per_delivery), digits=2)


def memory(bench: Bench) -> Iterator[Figure]:
    """Connections that do nothing. Servers are fresh: one that has grown once would hide what a connection takes."""
    load = Load(mode="idle", conns=possible(5000), settle=1.0)
    with yardstick(bench.cores.server) as server:
        c = bench.burst(server, load)
    with router(bench.cores.server) as server:
        ours = bench.burst(server, load)
    found = Comparison(ours.kb_per_conn, c.kb_per_conn, ours.kb_per_conn / c.kb_per_conn, steady=1, of=1)
    odd = flaws([Pair(c, ours, c, steady=True)])
    yield Figure(f"KB a connection, {load.conns:,} idle", found, digits=1, aim=ours_at_most(30), flaws=odd)


def handshakes(bench: Bench) -> Iterator[Figure]:
    """People arrive, 64 at a time, each with a token that must be checked."""
    pairs = bench.against_c(Load(mode="idle", conns=possible(5000)), handshakes_per_second)
    yield from throughput("handshakes", "", pairs, handshakes_per_second, cpu_per_handshake)


def inbound(bench: Bench) -> Iterator[Figure]:
    """People send, nobody receives but an answer to each hundredth message."""
    load = Load(mode="echo", event="bench_sink", conns=64, pipeline=200, ack_every=100, duration=bench.seconds)
    pairs = bench.against_c(load, sent_per_second)
    yield from throughput("messages in", ", 64 connections", pairs, sent_per_second, cpu_per_sent)


SCENARIOS: dict[str, Scenario] = {each.__name__: each for each in (deliveries, latency, memory, handshakes, inbound)}


def throughput(
    what: str, where: str, pairs: Sequence[Pair], rate: Measure, cpu: Measure, *, aim: Aim | None = None
) -> Iterator[Figure]:
    """How many a second, and what one of them takes of the server's core: the second holds where the load is the limit."""
    notes = [*flaws(pairs)]
    used = compare(pairs, lambda burst: rate(burst) * cpu(burst) / 1e6)
    if used.steady and used.yardstick < 0.9:
        notes.append(f"C had {1 - used.yardstick:.0%} of its core left: the load was its limit, the ratio flatters us")
    together = compare(pairs, lambda burst: max(burst.per_frame, 1.0)).ours
    if together > 1.05:
        notes.append(f"ours put {together:.1f} in a frame, C sends each alone; `latency` compares frame by frame")
    yield Figure(f"{what}/s{where}", compare(pairs, rate), aim=aim, flaws=tuple(notes))
    yield Figure(f"  CPU us for each{where}", compare(pairs, cpu), digits=2)


def possible(conns: int) -> int:
    """As many as the limit of open files lets us have, where that is less."""
    return min(conns, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)


def flaws(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """What was odd about these bursts, and whose they were."""
    ours = (f"ours: {pair.ours.flaw}" for pair in pairs if pair.ours.flaw)
    c = (f"C: {burst.flaw}" for pair in pairs for burst in (pair.before, pair.after) if burst.flaw)
    return tuple(dict.fromkeys((*ours, *c)))


def deliveries_per_second(burst: Burst) -> float:
    return burst.per_s


def cpu_per_delivery(burst: Burst) -> float:
    return burst.server_us_per_delivery


def sent_per_second(burst: Burst) -> float:
    return burst.sent_per_s


def cpu_per_sent(burst: Burst) -> float:
    return burst.server_cpu_frac * 1e6 / burst.sent_per_s


def handshakes_per_second(burst: Burst) -> float:
    return burst.handshakes_per_s


def cpu_per_handshake(burst: Burst) -> float:
    return burst.server_us_per_handshake


def p50(burst: Burst) -> float:
    return burst.lat_us.p50


def p99(burst: Burst) -> float:
    return burst.lat_us.p99
