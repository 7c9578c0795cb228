"""What is measured: one function a scenario, each yields its figures."""

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from statistics import median
from typing import TypeAlias

from msgspec import Struct

from tests.benchmarks.comparison import Comparison, Measure, Pair, compare, interleave
from tests.benchmarks.load import Burst, Load, run
from tests.benchmarks.report import Aim, Figure, ours_at_most, ratio_at_least
from tests.benchmarks.server import Server, router, yardstick
from tests.benchmarks.toolchain import Cores

__all__ = ["SCENARIOS", "Bench", "Scenario"]


class Bench(Struct, frozen=True):
    """How long and where to measure."""

    cores: Cores
    pairs: int
    seconds: float

    def against_c(self, load: Load, ours: Callable[[int], AbstractContextManager[Server]] = router) -> list[Pair]:
        """Interleaved bursts of `load`, with both servers up all the time."""
        with yardstick(self.cores.server) as c, ours(self.cores.server) as server:
            return interleave(lambda: self.burst(server, load), lambda: self.burst(c, load), self.pairs)

    def burst(self, server: Server, load: Load) -> Burst:
        """One burst, once the server is done with the one before."""
        server.settle()
        return run(server, load, self.cores.load)


Scenario: TypeAlias = Callable[[Bench], Iterator[Figure]]


def deliveries(bench: Bench) -> Iterator[Figure]:
    """One sends to all, with four messages of 200 bytes in flight: what the fan-out costs."""
    for conns in (100, 1000):
        pairs = bench.against_c(Load(mode="broadcast", conns=conns, window=4, duration=bench.seconds))
        aim = ratio_at_least(0.85) if conns == 1000 else None
        yield from throughput(
            "deliveries", f", {conns:,} connections", pairs, deliveries_per_second, cpu_per_delivery, aim=aim
        )


def latency(bench: Bench) -> Iterator[Figure]:
    """One message in flight, so nothing queues: how long until people have it."""
    for conns in (100, 1000):
        pairs = bench.against_c(Load(mode="broadcast", conns=conns, window=1, duration=bench.seconds))
        for name, value in (("p50", p50), ("p99", p99)):
            found = compare(pairs, value, speed=deliveries_per_second)
            yield Figure(f"latency {name} in us, {conns:,} connections", found, flaws=flaws(pairs))


def memory(bench: Bench) -> Iterator[Figure]:
    """Connections that do nothing. Servers are fresh: one that has grown once would hide what a connection takes."""
    load = Load(mode="idle", conns=possible(5000), settle=1.0)
    with yardstick(bench.cores.server) as server:
        c = bench.burst(server, load)
    with router(bench.cores.server) as server:
        ours = bench.burst(server, load)
    found = Comparison(ours.kb_per_conn, c.kb_per_conn, ours.kb_per_conn / c.kb_per_conn, steady=1, of=1)
    odd = flaws([Pair(c, ours, c)])
    yield Figure(f"KB a connection, {load.conns:,} idle", found, digits=1, aim=ours_at_most(30), flaws=odd)


def handshakes(bench: Bench) -> Iterator[Figure]:
    """People arrive, 64 at a time, each with a token that must be checked."""
    pairs = bench.against_c(Load(mode="idle", conns=possible(5000)))
    yield from throughput("handshakes", "", pairs, handshakes_per_second, cpu_per_handshake)


def inbound(bench: Bench) -> Iterator[Figure]:
    """People send, nobody receives but an answer to each hundredth message."""
    load = Load(mode="echo", event="bench_sink", conns=64, pipeline=200, ack_every=100, duration=bench.seconds)
    yield from throughput("messages in", ", 64 connections", bench.against_c(load), sent_per_second, cpu_per_sent)


SCENARIOS: dict[str, Scenario] = {each.__name__: each for each in (deliveries, latency, memory, handshakes, inbound)}


def throughput(
    what: str, where: str, pairs: Sequence[Pair], rate: Measure, cpu: Measure, *, aim: Aim | None = None
) -> Iterator[Figure]:
    """How many a second, and what one of them takes of the server's core: the second holds where the load is the limit."""
    odd = flaws(pairs)
    c_use = median(rate(pair.before) * cpu(pair.before) / 1e6 for pair in pairs)
    if c_use < 0.9:
        odd += (
            f"C used {c_use:.0%} of its core, so the load was its limit and the ratio flatters us; see the CPU time",
        )
    yield Figure(f"{what}/s{where}", compare(pairs, rate, speed=rate), aim=aim, flaws=odd)
    yield Figure(f"  CPU us for each{where}", compare(pairs, cpu, speed=rate), digits=2)


def possible(conns: int) -> int:
    """As many as the limit of open files lets us have, where that is less."""
    return min(conns, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)


def flaws(pairs: Sequence[Pair]) -> tuple[str, ...]:
    bursts = (burst for pair in pairs for burst in (pair.before, pair.ours, pair.after))
    return tuple(dict.fromkeys(burst.flaw for burst in bursts if burst.flaw))


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
