"""Virtual TCP: bytes arrive late, in order, or not at all."""

import asyncio
import contextvars
import zlib
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from tests.simulation.seam import HOST

__all__ = ["Network", "Transport"]

WINDOW = 128 * 1024
"""Bytes under way or unread in one direction; more waits in the sender's buffer."""


class Network:
    """Who listens where, who is connected to whom, and how long a hop takes.

    A latency is drawn for each hop, as a rule and not as a fault: most are short, a few are long.
    """

    def __init__(self, loop: Any, chance: Random) -> None:
        self.loop = loop
        self.chance = chance
        self.pace = 1.0
        self.trace = 0
        self.counts: Counter[str] = Counter()
        self.filled: dict[str, None] = {}
        """Hosts that were sent more than they took."""
        self.tell: Callable[[str], None] | None = None
        self._context = contextvars.Context()
        self._listeners: dict[tuple[str, int], _Listener] = {}
        self._transports: dict[Transport, None] = {}
        self._holes: list[tuple[str, str | None, float]] = []
        self._port = 40_000

    def latency(self, one: str, other: str) -> float:
        """Seconds for one hop that begins now, with what is in its way."""
        draw = self.chance.random()
        if draw < 0.75:
            seconds = 0.0001 + self.chance.random() * 0.002
        elif draw < 0.95:
            seconds = 0.002 + self.chance.random() * 0.012
        else:
            seconds = 0.012 + self.chance.random() * 0.08
        seconds *= self.pace
        for a, b, until in self._holes:
            if until > self.loop.now and (a in (one, other)) and (b is None or b in (one, other)):
                seconds = max(seconds, until - self.loop.now + seconds)
        return seconds

    def hole(self, host: str, other: str | None, until: float) -> None:
        """What is sent to or from `host` (only between it and `other`) does not arrive before `until`."""
        self._holes = [hole for hole in self._holes if hole[2] > self.loop.now]
        self._holes.append((host, other, until))

    def note(self, *what: Any) -> None:
        """Something happened; two runs are the same when all that happened is."""
        self.trace = zlib.crc32(repr((round(self.loop.now, 9), *what)).encode(), self.trace)

    # -- ends of connections

    def listen(self, factory: Callable[[], Any], host: str, port: int) -> "_Listener":
        listener = _Listener(self, factory, host, port, contextvars.copy_context())
        if (host, port) in self._listeners:
            raise OSError(98, f"{host}:{port} is taken")
        self._listeners[host, port] = listener
        return listener

    def unlisten(self, listener: "_Listener") -> None:
        if self._listeners.get(listener.place) is listener:
            del self._listeners[listener.place]

    async def connect(self, factory: Callable[[], Any], host: str, port: int) -> tuple["Transport", Any]:
        me = HOST.get()
        await asyncio.sleep(self.latency(me, host))
        listener = self._listeners.get((host, port))
        if listener is None:
            await asyncio.sleep(self.latency(me, host))
            raise ConnectionRefusedError(111, f"Connect call failed ({host!r}, {port})")
        self._port += 1
        here = Transport(self, me, contextvars.copy_context(), (me, self._port), (host, port))
        there = Transport(self, host, listener.context, (host, port), (me, self._port))
        here.peer, there.peer = there, here
        self._transports[here] = self._transports[there] = None
        self.note("connect", me, host)
        there.begin(listener.context.run(listener.factory))
        try:
            await asyncio.sleep(self.latency(me, host))
        except BaseException:
            here.abort()
            raise
        protocol = factory()
        here.begin(protocol, direct=True)
        return here, protocol

    def kill(self, host: str) -> None:
        """The kernel closes what a process that was killed had open; what it had not yet taken is gone."""
        for place in [place for place in self._listeners if place[0] == host]:
            del self._listeners[place]
        for transport in self.of(host):
            transport.vanish()

    def of(self, host: str, other: str | None = None) -> list["Transport"]:
        """The ends of connections that `host` has, or has with `other`."""
        return [
            each
            for each in self._transports
            if each.host == host and (other is None or (each.peer is not None and each.peer.host == other))
        ]

    def forget(self, transport: "Transport") -> None:
        self._transports.pop(transport, None)


class _Listener:
    """What `create_server` returns."""

    def __init__(self, network: Network, factory: Any, host: str, port: int, context: contextvars.Context) -> None:
        self.factory = factory
        self.place = host, port
        self.context = context
        self._network = network
        self.sockets = [self]

    def getsockname(self) -> tuple[str, int]:
        return self.place

    def close(self) -> None:
        self._network.unlisten(self)

    def is_serving(self) -> bool:
        return True

    async def wait_closed(self) -> None: ...


class Transport(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, network: Network, host: str, context: contextvars.Context, name: Any, peername: Any) -> None:
        super().__init__({"sockname": name, "peername": peername})
        self.host = host
        self.peer: Transport | None = None
        self.context = context
        self._network = network
        self._loop = network.loop
        self._protocol: Any = None
        self._buffer = bytearray()
        self._inbox = bytearray()
        self._under_way = 0
        self._tail: bytearray | None = None
        self._last_at = 0.0
        self._high, self._low = 64 * 1024, 16 * 1024
        self._full = self._paused = self._closing = self._lost = False
        self._eof_after = self._eof_here = False

    # -- asyncio.Transport

    def get_protocol(self) -> Any:
        return self._protocol

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 * 1024 if high is None else high
        self._low = self._high // 4 if low is None else low
        self._check_full()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def can_write_eof(self) -> bool:
        return True

    def write(self, data: Any) -> None:
        if self._closing or self._lost or not data:
            return
        self._buffer += data
        self._pump()
        self._check_full()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        self._eof_after = True
        self._pump()

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        if self._paused and not self._closing:
            self._paused = False
            self._loop.call_soon(self._deliver, context=self._network._context)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._eof_after = True
            self._pump()

    def abort(self) -> None:
        self._lose(None, tell=ConnectionResetError(104, "Connection reset by peer"))

    # -- the wire

    def begin(self, protocol: Any, *, direct: bool = False) -> None:
        """The connection stands at this end."""
        self._protocol = protocol
        if self._lost:
            lost = self.context if not direct else None
            self._loop.call_soon(protocol.connection_made, self, context=lost)
            self._loop.call_soon(protocol.connection_lost, ConnectionResetError(104, "reset"), context=lost)
            return
        if direct:
            protocol.connection_made(self)
        else:
            self.context.run(protocol.connection_made, self)
        self._loop.call_soon(self._deliver, context=self._network._context)

    def vanish(self) -> None:
        """Its process is gone."""
        if not self._lost:
            self._lost = self._closing = True
            self._network.forget(self)
            if self._inbox or self._network.chance.random() < 0.5:
                self._later(self._peer_reset)
            else:
                self._later(self._peer_eof)

    def reset(self) -> None:
        """Something between the two ends ends the connection for both."""
        self._later(self._peer_reset)
        self._lose(ConnectionResetError(104, "Connection reset by peer"))

    def _later(self, what: Callable[[], None]) -> None:
        """In order behind all that was sent."""
        assert self.peer is not None
        at = max(self._last_at, self._loop.now + self._network.latency(self.host, self.peer.host))
        self._last_at, self._tail = at, None
        self._loop.call_at(at, what, context=self._network._context)

    def _pump(self) -> None:
        peer = self.peer
        assert peer is not None
        room = WINDOW - self._under_way - len(peer._inbox)
        if room > 0 and self._buffer and not self._lost:
            chunk = self._buffer[:room]
            del self._buffer[:room]
            self._under_way += len(chunk)
            at = self._loop.now + self._network.latency(self.host, peer.host)
            if self._tail is not None and at <= self._last_at:
                self._tail += chunk
            else:
                self._last_at, self._tail = max(at, self._last_at), chunk
                self._loop.call_at(self._last_at, self._arrive, chunk, context=self._network._context)
        if self._eof_after and not self._buffer and not self._lost:
            self._eof_after = False
            self._later(self._peer_eof)
            if self._closing:
                self._lose(None)

    def _arrive(self, chunk: bytearray) -> None:
        if self._tail is chunk:
            self._tail = None
        self._under_way -= len(chunk)
        peer = self.peer
        assert peer is not None
        self._network.note(self.host, peer.host, bytes(chunk))
        if peer._lost:
            if peer.host not in self._loop.dead:
                peer._later(peer._peer_reset)  # as a kernel answers what nobody will read
            return
        peer._inbox += chunk
        peer._deliver()

    def _deliver(self) -> None:
        if self._protocol is None or self._paused or self._lost or self.host in self._loop.dead:
            return
        if self._inbox and not self._closing:
            data = bytes(self._inbox)
            self._inbox.clear()
            self._call(self._protocol.data_received, data)
            peer = self.peer
            assert peer is not None
            if peer._buffer:
                delay = self._network.latency(self.host, peer.host)
                self._loop.call_later(delay, peer._window_opened, context=self._network._context)
        if self._eof_here and not self._inbox and not self._closing:
            self._eof_here = False
            if not self._call(self._protocol.eof_received):
                self.close()

    def _window_opened(self) -> None:
        if self._lost or self.host in self._loop.dead:
            return
        self._pump()
        if self._full and len(self._buffer) <= self._low and not self._lost:
            self._full = False
            self._call(self._protocol.resume_writing)

    def _check_full(self) -> None:
        if not self._full and len(self._buffer) > self._high and self._protocol is not None:
            self._full = True
            self._network.counts["a full buffer"] += 1
            if self.peer is not None:
                self._network.filled[self.peer.host] = None
            self._protocol.pause_writing()

    def _peer_eof(self) -> None:
        peer = self.peer
        assert peer is not None
        if not peer._lost:
            peer._eof_here = True
            peer._deliver()

    def _peer_reset(self) -> None:
        peer = self.peer
        assert peer is not None
        if peer.host not in self._loop.dead:
            peer._lose(ConnectionResetError(104, "Connection reset by peer"))

    def _call(self, what: Callable[..., Any], *args: Any) -> Any:
        try:
            return self.context.run(what, *args)
        except Exception as error:
            self._loop.call_exception_handler({"message": "a protocol failed", "exception": error})
            self._lose(error)
            return True

    def _lose(self, error: Exception | None, *, tell: Exception | None = None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self._buffer.clear()
        self._network.forget(self)
        if tell is not None:
            self._later(self._peer_reset)
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, error, context=self.context)
