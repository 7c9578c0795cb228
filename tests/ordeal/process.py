"""The processes of a random ordeal beside its servers: nodes, and publishers whose clock is wrong."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import httpx

from router.errors import Unavailable
from tests.node import KEY
from tests.servers.process import Process, free_ports

__all__ = ["NodeProcess", "SlowBackend"]

AGAIN = 0.3
"""Seconds after which a node that has ended is started again, as whatever supervises it would."""


class NodeProcess:
    """`router serve`, always on the same port, which is started again whenever it ends, unless it is to be away."""

    def __init__(self, folder: Path, broker: str, **settings: float) -> None:
        folder.mkdir()
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts = 0
        lines = {
            "broker": broker,
            "jwt_key": KEY,
            "log_level": "WARNING",
            "lease": 3.0,
            "presence_grace": 1.0,
            "ack_after": 1.5,
            "ping_every": 1.0,
            "slow_deadline": 4.0,
            "drain": 0.5,
            "limit_rate": 100.0,
            "limit_burst": 100,
            **settings,
        }
        file = folder / "router.toml"
        file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
        # Settings of whoever runs this are not ours.
        foreign = [f"--unset={name}" for name in os.environ if name.startswith("ROUTER_")]
        command = ["env", *foreign, sys.executable, "-m", "router.cli", "serve"]
        self.said = folder / "output"
        self._folder = folder
        self._process = Process([*command, "--settings", str(file), "--port", str(self.port)], folder)
        self._away = False
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start it, and keep it running."""
        self._away = False
        self._run()
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())

    async def wait(self) -> None:
        """Until it is ready."""
        while not await self.is_ready():
            await asyncio.sleep(0.1)

    async def is_ready(self) -> bool:
        """Whether it says so."""
        try:
            async with httpx.AsyncClient(trust_env=False) as http:
                return (await http.get(f"{self.url}/readyz", timeout=2)).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it at once; it stays away until it is started."""
        self._away = True
        self._process.kill()

    async def terminate(self) -> None:
        """End it as a deploy does; it stays away until it is started."""
        self._away = True
        if not self._has_ended():
            os.kill(self._process.pid, signal.SIGTERM)
        for _ in range(80):
            if self._has_ended():
                return
            await asyncio.sleep(0.1)
        self._process.kill()

    def freeze(self) -> None:
        """Have it hold still."""
        self._process.freeze()

    def thaw(self) -> None:
        """Let it go on."""
        self._process.thaw()

    async def stop(self) -> None:
        """End it for good."""
        if self._keeping is not None:
            self._keeping.cancel()
        self._process.thaw()
        self.kill()

    def _run(self) -> None:
        # What it said in its earlier lives is kept.
        if self.said.exists():
            self.said.rename(self._folder / f"output.{self.starts}")
        self.starts += 1
        self._process.start()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(AGAIN)
            if not self._away and self._has_ended():
                self._run()

    def _has_ended(self) -> bool:
        try:
            self._process.check()
        except AssertionError:
            return True
        return False


class SlowBackend:
    """A `Backend` in a process of its own, whose wall clock is so many seconds slow, or fast where it is negative."""

    def __init__(self, url: str, slow: float, *options: str) -> None:
        self._command = (sys.executable, "-m", "tests.ordeal.remote", url, str(slow), *options)
        self._waiting: dict[int, asyncio.Future[list[int]]] = {}
        self._number = 0

    async def start(self) -> None:
        """Start it."""
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE)
        self._reading = asyncio.create_task(self._read())

    async def publish_json(self, place: str, event: dict[str, Any]) -> list[int]:
        """Publish to `place`: a project, `user:<name>` or `all`. Raises `Unavailable`."""
        self._number += 1
        number = self._number
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, place, event]).encode() + b"\n")
        try:
            return await future
        finally:
            del self._waiting[number]

    async def stop(self) -> None:
        """End it."""
        self._reading.cancel()
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            number, seq, error = json.loads(line)
            future = self._waiting.get(number)
            if future is not None and not future.done():
                if error is None:
                    future.set_result(seq)
                else:
                    future.set_exception(Unavailable(error))
