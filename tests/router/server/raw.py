"""A WebSocket client that can misbehave: it writes whatever bytes it is told to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

MASK = b"\x01\x02\x03\x04"
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(payload: bytes = b"", opcode: int = TEXT, *, fin: bool = True, rsv: int = 0) -> bytes:
    """`payload` as a frame that a client may send: masked (RFC 6455 section 5.3)."""
    masked = bytes(byte ^ MASK[i % 4] for i, byte in enumerate(payload))
    return head(len(payload), opcode, fin=fin, rsv=rsv) + MASK + masked


def head(size: int, opcode: int = TEXT, *, fin: bool = True, rsv: int = 0, masked: bool = True) -> bytes:
    """The first bytes of a frame that says it has `size` bytes."""
    first, bit = fin << 7 | rsv << 4 | opcode, masked << 7
    if size < 126:
        return bytes([first, bit | size])
    if size < 65536:
        return bytes([first, bit | 126]) + size.to_bytes(2, "big")
    return bytes([first, bit | 127]) + size.to_bytes(8, "big")


def upgrade(path: str = "/", *more: str) -> bytes:
    """The request that opens a WebSocket; `more` are header lines."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: test",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Raw:
    """One TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def answer(self) -> str:
        """The head of an HTTP answer."""
        async with asyncio.timeout(10):
            return (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")

    async def frame(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload."""
        async with asyncio.timeout(10):
            first, size = await self.reader.readexactly(2)
            assert first & 0x80, "servers here never fragment"
            if size == 126:
                size = int.from_bytes(await self.reader.readexactly(2), "big")
            elif size == 127:
                size = int.from_bytes(await self.reader.readexactly(8), "big")
            return first & 0x0F, await self.reader.readexactly(size)

    async def closed(self) -> tuple[int, str]:
        """Code and reason of the close frame, once it comes."""
        while True:
            opcode, payload = await self.frame()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big"), payload[2:].decode()

    async def rest(self) -> bytes:
        """What comes until the server hangs up."""
        async with asyncio.timeout(10):
            with suppress(ConnectionResetError):
                return await self.reader.read()
        return b""


@asynccontextmanager
async def dial(port: int, request: bytes | None = None) -> AsyncIterator[Raw]:
    """A connection to a local port. With `request` the answer to it has been read and was 101."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = Raw(reader, writer)
    try:
        if request is not None:
            raw.write(request)
            assert (await raw.answer()).startswith("HTTP/1.1 101 ")
        yield raw
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def until(condition: Callable[[], object]) -> None:
    """Let everything else go on until `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)
