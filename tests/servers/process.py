"""Runs a server program, and sees to it that it ends."""

import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import SystemRandom

from redis.exceptions import RedisError

__all__ = ["Process", "drop_connections", "free_ports", "wait_until"]

LIFE = 900
"""Seconds after which a server ends by itself, whatever became of the tests."""
PORTS = range(10_000, 22_768)
"""Below those that systems lend to outgoing connections (from 32,768 on Linux): whoever tries again and again to reach
a server that is away could else be lent its very port, and be connected to itself. 6379 is not among them."""
BUS = 10_000
"""How far above its port a cluster's server listens to the others."""
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_taken: set[int] = set()


class Process:
    """One program that may be started, killed, frozen and thawed, again and again.

    It ends with the tests: after `LIFE`, and on Linux at once when they die, even by SIGKILL. What it says goes to
    `folder`, and is told when it does not start.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._command = command
        self._folder = folder
        self._said = folder / "output"
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def start(self) -> None:
        """Start it, without waiting until it answers. It ends with the thread that calls this."""
        parent = os.getpid()

        def bind_life() -> None:
            signal.alarm(LIFE)
            if _libc is not None:
                _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:  # who died before that was said
                    os._exit(1)

        with self._said.open("wb") as said:
            self._popen = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                preexec_fn=bind_life,  # noqa: PLW1509  # no threads that matter
            )

    def check(self) -> None:
        """Fails when it has ended by itself, and tells what it said."""
        assert self._popen is not None
        ended = self._popen.poll()
        assert ended is None, f"the server ended with {ended}: {self._said.read_text(errors='replace')[-2000:]}"

    def kill(self) -> None:
        """End it at once; everything that it knew is gone. Nothing happens to one that has ended."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait(10)

    def freeze(self) -> None:
        """Have it hold still: connections stay open and nothing answers."""
        assert self._popen is not None
        self._popen.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._popen is not None
        self._popen.send_signal(signal.SIGCONT)


def drop_connections() -> None:
    """Collect what is left of connections to a server that has ended.

    Whoever is cut off in the middle of connecting leaves its socket to the collector, which tells of it whenever it
    comes: in the middle of another test, which then fails.
    """
    told, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = told


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on, nor on the port `BUS` above each; none is told twice."""
    found: list[int] = []
    for port in SystemRandom().sample(PORTS, len(PORTS)):  # seeded by nobody: other tests may look at the same time
        if port not in _taken and _is_free(port) and _is_free(port + BUS):
            _taken.add(port)
            found.append(port)
            if len(found) == count:
                return found
    raise AssertionError(f"there are no {count} free ports from {PORTS.start} to {PORTS.stop}")


def wait_until(holds: Callable[[], bool], what: str, *, within: float = 10.0) -> None:
    """Look again and again, at most `within` seconds, until `holds`; an error of Redis means that it does not."""
    deadline = time.monotonic() + within
    while True:
        with suppress(RedisError, OSError):
            if holds():
                return
        assert time.monotonic() < deadline, f"not within {within} seconds: {what}"
        time.sleep(0.005)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
