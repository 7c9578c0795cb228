"""Runs one burst of the C load client on a core of its own and reads what it measured."""

import subprocess

import msgspec
from msgspec import Struct

from tests.benchmarks.server import Server
from tests.benchmarks.toolchain import LOAD

__all__ = ["Burst", "Latency", "Load", "run"]


class Load(Struct, frozen=True, kw_only=True):
    """What one burst does. The fields are options of wsload, save `event`: the type that is sent."""

    mode: str
    conns: int
    event: str = "bench_tick"
    size: int = 200
    window: int = 1
    """Broadcasts in flight."""
    pipeline: int = 1
    """Messages in flight on each connection, in echo mode."""
    ack_every: int = 1
    warmup: float = 0.5
    duration: float = 0.0
    drain: float = 3.0
    settle: float = 0.3
    connect_timeout: float = 30.0


class Latency(Struct, frozen=True):
    """Microseconds."""

    p50: float
    p99: float


class Burst(Struct, frozen=True):
    """What wsload printed; fields that no scenario uses are left out."""

    conns: int
    opened: int
    closed_early: int
    protocol_errors: int
    fail_reason: str
    handshakes_per_s: float
    kb_per_conn: float
    per_s: float
    """Deliveries a second."""
    per_frame: float
    """Deliveries in one frame: the router puts together what is due together."""
    sent_per_s: float
    server_us_per_handshake: float
    server_us_per_delivery: float
    server_cpu_frac: float
    """Of its core; below some 0.9 the server could have done more than it was given."""
    client_cpu_frac: float
    """Of the load's core. It never sleeps while it measures, so less than all of it means that others were there."""
    lat_us: Latency
    missing: int
    stalled_rounds: int
    other_frames: int
    """Frames that are no deliveries: few pings are well, many are refusals."""

    @property
    def flaw(self) -> str | None:
        """Why its figures are worth less than they look, if they are."""
        found = {
            "closed early": self.closed_early,
            "protocol errors": self.protocol_errors,
            "deliveries missing": self.missing,
            "stalled rounds": self.stalled_rounds,
            # A long burst sees a ping or two on every connection.
            "frames that are no deliveries": self.other_frames if self.other_frames > 2 * self.conns else 0,
        }
        return ", ".join(f"{count:,} {what}" for what, count in found.items() if count) or None


def run(server: Server, load: Load, core: int) -> Burst:
    """One burst against `server`. Raises where connections failed: such a figure would be of another load."""
    command: list[str] = [
        *("taskset", "--cpu-list", str(core), str(LOAD), "--port", str(server.port), "--server-pid", str(server.pid)),
        *("--path", server.sink_path if load.mode == "echo" else server.path),
        *("--src-addrs", "8", *server.handshake),
        # Both servers get the same bytes; C does not care what they say.
        *("--prefix", f'{{"type":"{load.event}","data":', "--suffix", "}"),
        *(
            f"--{name.replace('_', '-')}={value}"
            for name, value in msgspec.structs.asdict(load).items()
            if name != "event"
        ),
    ]
    bound = load.connect_timeout + load.settle + load.warmup + load.duration + load.drain + 15
    done = subprocess.run(command, capture_output=True, timeout=bound, check=False)
    if done.returncode:
        raise RuntimeError(f"wsload ended with {done.returncode}: {done.stderr.decode().strip()}")
    burst = msgspec.json.decode(done.stdout, type=Burst)
    if burst.opened < load.conns:
        why = burst.fail_reason or "no answer in time"
        raise RuntimeError(f"{server.name}: {burst.opened} of {load.conns} connections opened ({why})")
    return burst
