"""A Redis on the virtual network: RESP in and out for real redis-py, with what goes wrong at the server's side."""

import asyncio
from collections import Counter
from random import Random
from typing import Any

import hiredis

from tests.simulation.redis_model import Memory, Session, encode

__all__ = ["RedisServer"]

LOOK = 0.01
"""Seconds between two looks whether a command that blocks has its answer."""


class RedisServer:
    """One server. To be made and used in the context of its own host.

    `flaky` names what may happen to a command, each with its chance: `before` the effect the connection is reset;
    `after` it; the answer comes `late`; it comes `never`.
    """

    def __init__(self, loop: Any, chance: Random, host: str = "redis", port: int = 6379) -> None:
        self.host, self.port = host, port
        self.flaky: dict[str, float] = {}
        self.memory = Memory(chance)
        self.counts: Counter[str] = Counter()
        self._loop = loop
        self._chance = chance
        self._listener: Any = None
        self._snapshots: list[Any] = []
        self.connections: dict[_Connection, None] = {}

    @property
    def up(self) -> bool:
        return self._listener is not None

    async def start(self) -> None:
        self._listener = await self._loop.create_server(lambda: _Connection(self), self.host, self.port)

    def ports(self) -> list[int]:
        return [each.getsockname()[1] for each in self._listener.sockets]

    def stop(self) -> None:
        """Killed: all connections end."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in list(self.connections):
            connection.end()

    def remember(self) -> None:
        """Write a snapshot."""
        self._snapshots.append(self.memory.copy())

    async def restart(self, what: str) -> None:
        """Back after `stop` with `nothing`, `everything`, or the last `snapshot`."""
        kept = {"nothing": None, "everything": self.memory.copy() if what == "everything" else None}.get(what)
        if what == "snapshot":
            kept = self._snapshots[-1] if self._snapshots else None
        self.memory = Memory(self._chance, kept, whole=what == "everything")
        self.counts[f"back with {what}"] += 1
        await self.start()

    def flush(self) -> None:
        self.memory.flush()

    def kill_pubsub(self) -> None:
        """As CLIENT KILL TYPE pubsub."""
        for connection in list(self.connections):
            if connection.session is not None and connection.session._pubsub:
                self.counts["a subscription was killed"] += 1
                connection.end()

    def kill_some(self, share: float) -> None:
        for connection in list(self.connections):
            if self._chance.random() < share:
                connection.end()

    def strike(self) -> str | None:
        """What goes wrong with the next command, if anything."""
        for what, likely in self.flaky.items():
            if self._chance.random() < likely:
                self.counts[f"a command failed: {what}"] += 1
                return what
        return None

    @property
    def patience(self) -> float:
        """Seconds that a late answer takes."""
        return self._chance.choice((0.05, 0.3, 1.2, 6.0))


class _Connection(asyncio.Protocol):
    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._reader = hiredis.Reader()
        self._out = bytearray()
        self._mute = False
        self._open_at = 0.0
        self.session: Session | None = None
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.session = Session(self._server.memory.server, self._answer, self._push)
        self._server.connections[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.pop(self, None)
        if self.session is not None:
            self.session.leave()
            self.session = None

    def end(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        self._work()

    def _wait(self) -> None:
        """A command that blocks holds up those behind it."""
        if self.session is not None:
            self.session.look_again()
            self._flush()
            self._work()

    def _work(self) -> None:
        while self.session is not None and self.session.parked is None:
            command = self._reader.gets()
            if command is False:
                break
            struck = self._server.strike() if self._server.flaky else None
            if struck == "before":
                self.end()
                return
            self.session._process_command(command)
            if struck == "after":
                self._out.clear()
                self.end()
                return
            if struck == "never":
                self._mute = True
            if struck == "late":
                self._open_at = self._server._loop.time() + self._server.patience
        if self.session is not None and self.session.parked is not None:
            self._server._loop.call_later(LOOK, self._wait)
        self._flush()

    def _answer(self, reply: Any) -> None:
        if not self._mute and self.session is not None:
            self._out += encode(reply, self.session.protocol)

    def _push(self, message: list[Any]) -> None:
        """What was published comes by itself."""
        if self.session is not None:
            self._out += encode(message, self.session.protocol, push=True)
            self._server._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._out:
            now = self._server._loop.time()
            if now < self._open_at:
                self._server._loop.call_at(self._open_at, self._flush)
                return
            self._transport.write(bytes(self._out))
            self._out.clear()
