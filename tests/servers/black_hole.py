"""A network between a server and its clients, in the test's own event loop, that can fail without a word."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.servers.server import Server

__all__ = ["BlackHole", "black_hole"]


class BlackHole:
    """Passes everything on, both ways, until it is told to swallow it.

    What is swallowed never arrives, the end of a connection neither; connections made meanwhile are accepted.
    """

    def __init__(self, server: Server) -> None:
        self.port = 0
        self.url = ""
        self._server = server
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Accept connections."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        self.url = self._server.url.replace(f":{self._server.port}", f":{self.port}")

    async def stop(self) -> None:
        """End all of it."""
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()
        await self._listener.wait_closed()

    def swallow(self) -> None:
        """From now on nothing arrives anywhere."""
        self._open.clear()

    def restore(self) -> None:
        """From now on all arrives again; what was swallowed does not."""
        self._open.set()

    def cut(self) -> None:
        """Reset all connections; new ones are accepted."""
        while self._writers:
            writer = self._writers.pop()
            with suppress(OSError, AttributeError, RuntimeError):  # it has just been closed, in uvloop's words or ours
                # Not lingering at all sends RST instead of FIN.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        with suppress(asyncio.CancelledError):  # only `stop` cancels, and asyncio cannot stand a cancelled handler
            try:
                from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server.port)
            except OSError:  # the server is away
                await self._close(writer)
                return
            self._writers.add(to_server)
            await asyncio.gather(self._pass(reader, to_server), self._pass(from_server, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, RuntimeError):
            while data := await reader.read(65536):
                if self._open.is_set():
                    writer.write(data)
                    await writer.drain()
        await self._close(writer)

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()  # nobody hears of an end either
        writer.close()
        self._writers.discard(writer)


@asynccontextmanager
async def black_hole(server: Server) -> AsyncIterator[BlackHole]:
    """A black hole before `server` for as long as the block runs; `url` is the way through it."""
    hole = BlackHole(server)
    await hole.start()
    try:
        yield hole
    finally:
        await hole.stop()
