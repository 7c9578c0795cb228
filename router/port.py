"""The way out to one client: straight to the transport under our own server, through ASGI `send` elsewhere."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from router.errors import CloseCode, clip_reason

__all__ = ["AsgiPort", "DirectPort", "Transport", "port_for"]

EXTENSION = "router.transport"
"""The key in `scope["extensions"]` under which our server's protocol class offers itself."""

HIGH_WATER = 64 * 1024


class Transport(Protocol):
    """What our server's protocol class offers beyond ASGI; see `server.protocol`."""

    heard_at: float
    on_writable: Callable[[bool], None]
    on_shutdown: Callable[[], float] | None

    def start(self) -> Callable[[bytes], None]: ...
    def backlog(self) -> int: ...
    def abort(self) -> None: ...
    def end(self, code: CloseCode, reason: str) -> None: ...


class DirectPort:
    """Writes whole frames to the transport. One Python call a recipient; the rest is the kernel's."""

    __slots__ = ("_transport", "_write")
    framed = True

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._write = transport.start()

    @property
    def write(self) -> Callable[[bytes], None]:
        """The transport's own bound method: nothing of ours runs for each recipient."""
        return self._write

    def backlog(self) -> int:
        return self._transport.backlog()

    def close(self, code: CloseCode, reason: str) -> None:
        self._transport.end(code, reason)

    def abort(self) -> None:
        self._transport.abort()

    def heard(self) -> float | None:
        """When bytes last came, in loop time."""
        return self._transport.heard_at

    def listen(self, on_writable: Callable[[bool], None], on_shutdown: Callable[[], float]) -> None:
        """Have the gateway told when the client reads too slowly, and when the server shuts down."""
        self._transport.on_writable = on_writable
        self._transport.on_shutdown = on_shutdown

    async def finish(self) -> None:
        """Nothing is left to do: the transport sends by itself."""


class AsgiPort:
    """Sends texts through ASGI `send` with a task of its own: for servers that are not ours, and for test clients.

    Works everywhere, at the cost of a queue and a task for each connection; the queue is bounded like the transport's.
    """

    framed = False

    def __init__(self, send: Callable[[Any], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._more = asyncio.Event()
        self._on_writable: Callable[[bool], None] = lambda _: None
        self._paused = False
        self._closing: tuple[CloseCode, str] | None = None
        self._owner = asyncio.current_task()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def write(self, data: bytes) -> None:
        self._waiting.append(data)
        self._size += len(data)
        self._more.set()
        if self._size > HIGH_WATER and not self._paused:
            self._paused = True
            self._on_writable(False)

    def backlog(self) -> int:
        return self._size

    def close(self, code: CloseCode, reason: str) -> None:
        self._closing = (code, clip_reason(reason))
        self._more.set()

    def abort(self) -> None:
        # The task hangs in a `send` that never ends, and so would a close frame: end the connection's own task.
        self._task.cancel()
        if self._owner is not None:
            self._owner.cancel()

    def heard(self) -> float | None:
        """Not to be known through ASGI; such servers ping by themselves."""
        return None

    def listen(self, on_writable: Callable[[bool], None], _on_shutdown: Callable[[], float]) -> None:
        """Have the gateway told when the client reads too slowly. Other servers do not tell of their shutdown."""
        self._on_writable = on_writable

    async def finish(self) -> None:
        """The connection is over: stop the task."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            while self._waiting:
                data = self._waiting.popleft()
                await self._send({"type": "websocket.send", "text": data.decode()})
                self._size -= len(data)
                if self._paused and self._size < HIGH_WATER // 4:
                    self._paused = False
                    self._on_writable(True)
            self._more.clear()
            if self._closing is not None:
                code, reason = self._closing
                await self._send({"type": "websocket.close", "code": int(code), "reason": reason})
                return


def port_for(scope: Mapping[str, Any], send: Callable[[Any], Awaitable[None]]) -> DirectPort | AsgiPort:
    """The best way out that this connection's server offers."""
    transport = (scope.get("extensions") or {}).get(EXTENSION)
    return AsgiPort(send) if transport is None else DirectPort(transport)
