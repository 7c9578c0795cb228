"""Many light clients in one process: raw sockets that count events, note when stamped ones came, and may stop reading."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from tests.benchmarks.server import Server

__all__ = ["Viewer", "enter", "leave"]

HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Protocol: router.v1\r\n\r\n"
)
STAMP = b'"t":'
WELCOME = b'"welcome"'


class Viewer(asyncio.Protocol):
    """One connection. `latencies` gets the seconds that each stamped event took; `mark` is looked for in all data."""

    def __init__(self, path: str, port: int, mark: bytes = b"") -> None:
        self._hello = HANDSHAKE.format(path=path, port=port).encode()
        self._mark = mark
        self._tail = b""
        self.welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.marked_at: float | None = None
        self.latencies: list[float] = []
        self.epoch = ""
        self.events = 0
        self.lost = False
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.write(self._hello)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if not self.welcomed.done():
            self.welcomed.set_exception(ConnectionError("refused"))

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self.events += data.count(b'"type":"bench_')
        data = self._tail + data
        if not self.welcomed.done() and WELCOME in data:
            self.epoch = data.partition(b'"epoch":"')[2].partition(b'"')[0].decode()
            self.welcomed.set_result(None)
        if self._mark and self._mark in data:
            self.marked_at = now
        at = data.find(STAMP)
        while at >= 0:
            end = data.find(b",", at)
            if end < 0:
                break
            self.latencies.append(now - int(data[at + len(STAMP) : end]) / 1e9)
            at = data.find(STAMP, end)
        # A stamp or a mark that is cut in two is put together again.
        self._tail = data[-40:] if at < 0 else data[at:]
        if at < 0 and STAMP in self._tail:
            self._tail = b""

    def send(self, text: str) -> None:
        """One masked text frame, with a mask of zeros."""
        payload = text.encode()
        size = len(payload)
        head = bytes((0x81, 0x80 | size)) if size < 126 else b"\x81\xfe" + size.to_bytes(2, "big")
        self.transport.write(head + b"\0\0\0\0" + payload)


async def enter(
    server: Server, count: int, *, path: Callable[[int], str] | None = None, mark: bytes = b"", atime: int = 64
) -> list[Viewer]:
    """`count` viewers, all welcomed; `path` gives each its own address."""
    loop = asyncio.get_running_loop()
    gate = asyncio.Semaphore(atime)

    async def one(number: int) -> Viewer:
        async with gate:
            # Many loopback addresses, because one has only so many ports.
            local = (f"127.0.0.{2 + number % 8}", 0)
            address = server.path if path is None else path(number)
            _, viewer = await loop.create_connection(
                lambda: Viewer(address, server.port, mark), "127.0.0.1", server.port, local_addr=local
            )
            await asyncio.wait_for(viewer.welcomed, 60)
            return viewer

    return list(await asyncio.gather(*(one(number) for number in range(count))))


def leave(viewers: list[Viewer]) -> None:
    """Close all of them."""
    for viewer in viewers:
        viewer.transport.abort()
