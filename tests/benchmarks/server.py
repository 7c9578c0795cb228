"""Starts the router and the yardstick on a core of their own, and ends them whatever happens."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import jwt
from msgspec import Struct

from tests.benchmarks.toolchain import YARDSTICK

__all__ = ["Server", "connects", "free_port", "process", "router", "token_for", "yardstick"]

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).parent / "plugins"
ROUTER_COMMAND = (sys.executable, "-m", "router.cli", "serve")
LONGEST_LIFE = 600
"""Seconds after which the kernel ends a server even if the benchmark itself was killed."""


class Server(Struct, frozen=True):
    """A running server, and how to open a WebSocket to it."""

    name: str
    pid: int
    port: int
    path: str
    sink_path: str
    """Where messages are taken in and only each hundredth is answered."""
    handshake: tuple[str, ...] = ()
    """What else the load must say, and wait for, to be connected: options of wsload."""
    key: str = ""
    """What its tokens are signed with."""

    def path_of(self, project: str, user: str = "bench") -> str:
        """Where to open a project as some user."""
        return f"/ws/project/{project}?token={token_for(self.key, project, user=user)}"

    def settle(self, *, limit: float = 10.0) -> None:
        """Wait until it has cleared up after the last burst, which would otherwise cost the next one."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            before = cpu_ticks(self.pid)
            time.sleep(0.2)
            if cpu_ticks(self.pid) - before <= 1:
                return


@contextmanager
def yardstick(core: int) -> Iterator[Server]:
    """The C server: one `send()` a delivery and nothing else."""
    port = free_port()
    with process((str(YARDSTICK), str(port)), core, {}, lambda: connects(port)) as pid:
        yield Server(name="C", pid=pid, port=port, path="/ws", sink_path="/sink")


@contextmanager
def router(core: int, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """The router with its full pipeline: auth, permission, rate, coalesce, and audit to a file."""
    port, key = free_port(), secrets.token_urlsafe(48)
    with tempfile.TemporaryDirectory(prefix="router-bench-") as scratch:
        environment = {
            "ROUTER_HOST": "127.0.0.1",
            "ROUTER_PORT": str(port),
            "ROUTER_BROKER": "memory://",
            "ROUTER_JWT_KEY": key,
            "ROUTER_JWT_ALGORITHMS": "HS256",
            "ROUTER_PLUGINS": str(PLUGINS),
            "ROUTER_AUDIT": str(Path(scratch) / "audit.jsonl"),
            # Limits are checked like everywhere, only far away.
            "ROUTER_LIMIT_USER": "1000000",
            "ROUTER_LIMIT_PROJECT": "1000000",
            "ROUTER_LIMIT_SYSTEM": "1000000",
            "ROUTER_LIMIT_RATE": "1000000000",
            **(settings or {}),
        }
        key = environment["ROUTER_JWT_KEY"]
        with process(ROUTER_COMMAND, core, environment, lambda: answers(f"http://127.0.0.1:{port}/readyz")) as pid:
            path = f"/ws/project/bench?token={token_for(key, 'bench')}"
            handshake = ("--subprotocol", "router.v1", "--ready", '"welcome"')
            yield Server(name="router", pid=pid, port=port, path=path, sink_path=path, handshake=handshake, key=key)


def token_for(key: str, project: str, *, user: str = "bench") -> str:
    """A token with every grant in `project`."""
    now = int(time.time())
    grants = {project: ["view", "chat", "edit", "publish"]}
    claims = {"sub": user, "iat": now, "exp": now + 2 * LONGEST_LIFE, "projects": grants}
    return jwt.encode(claims, key, algorithm="HS256")


@contextmanager
def process(
    command: Sequence[str], core: int, environment: Mapping[str, str], ready: Callable[[], bool]
) -> Iterator[int]:
    # Settings of the person who runs the benchmarks must not reach the server under test.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ROUTER_")}

    def pin_and_bound() -> None:
        os.sched_setaffinity(0, {core})
        signal.alarm(LONGEST_LIFE)

    with tempfile.TemporaryFile("w+") as output:
        running = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=pin_and_bound,  # noqa: PLW1509  # this process has one thread, so there is no lock to inherit
        )
        try:
            wait_until_ready(running, ready)
            yield running.pid
            check_alive(running)
        except Exception as problem:
            output.seek(0)
            # A server that fails a thousand connections says so a thousand times.
            if words := [line.rstrip()[:400] for line in output.readlines()[-8:]]:
                problem.add_note("\n".join(("The server's last words:", *words)))
            raise
        finally:
            end(running)


def wait_until_ready(running: "subprocess.Popen[bytes]", ready: Callable[[], bool], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not ready():
        check_alive(running)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{running.args!r} was not ready after {limit:.0f} s")
        time.sleep(0.05)


def check_alive(running: "subprocess.Popen[bytes]") -> None:
    if running.poll() is not None:
        raise RuntimeError(f"{running.args!r} ended by itself with {running.returncode}")


def end(running: "subprocess.Popen[bytes]") -> None:
    running.terminate()
    try:
        running.wait(10)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


def connects(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_ticks(pid: int) -> int:
    """What the process used so far, in hundredths of a second; 0 when it is gone."""
    try:
        # The name in parentheses may hold spaces: count the fields behind it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
