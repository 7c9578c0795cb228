"""The model of Redis behind a real port, so that the suites of real servers can be run on it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from tests.simulation.redis import RedisServer

__all__ = ["run_model"]


@contextmanager
def run_model() -> Iterator[str]:
    """Its URL, for as long as the block lasts."""
    loop = asyncio.new_event_loop()
    server = RedisServer(loop, Random(1), "127.0.0.1", 0)
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"redis://127.0.0.1:{server.ports()[0]}/0"
    finally:

        async def end() -> None:
            server.stop()
            await asyncio.sleep(0.05)

        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
