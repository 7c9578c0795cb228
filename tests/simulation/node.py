"""The one file that knows the router: starts a node, ends it, and makes what backends import."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any

import jwt
import uvicorn

from router.app import create_app
from router.backend import Backend
from router.errors import Refused, Unavailable
from router.server.serve import config
from router.settings import Settings
from tests.simulation import seam

__all__ = ["Node", "Refused", "Unavailable", "make_backend", "make_token", "on_host"]

seam.adopt(("router", "jwt"))
logging.disable(logging.CRITICAL)

KEY = "a-secret-for-simulated-tests-that-is-long-enough"
PLUGINS = Path(__file__).parent / "plugins"
_tokens: dict[tuple[str, str, tuple[str, ...]], str] = {}


def make_token(user: str, project: str, grants: tuple[str, ...] = ("view", "chat", "edit")) -> str:
    """A token that outlives every world; the same words for the same person."""
    found = _tokens.get((user, project, grants))
    if found is None:
        claims = {"sub": user, "iat": seam.BEGIN - 60, "exp": seam.BEGIN + 50_000, "projects": {project: list(grants)}}
        found = _tokens[user, project, grants] = jwt.encode(claims, KEY)
    return found


def folders(*, newer: bool) -> tuple[str, ...]:
    """The plugins of a version."""
    return (str(PLUGINS / "common"), *([str(PLUGINS / "newer")] if newer else []))


def make_backend(url: str, **options: Any) -> Any:
    """A `Backend`, to be used as a context manager."""
    return Backend(url, plugins=folders(newer=True), **options)


class Node:
    """One node: its host's name, and what its settings are.

    `ours`: on the router's own server protocol; else on uvicorn's, where it has no more than ASGI.
    """

    def __init__(self, host: str, *, newer: bool = True, ours: bool = True, **settings: Any) -> None:
        self.host = host
        self.newer = newer
        self.ours = ours
        self.up = False
        self._settings = {"jwt_key": KEY, "drain": 0.0, "plugins": folders(newer=newer), **settings}
        self._server: Any = None

    async def start(self) -> None:
        """Raises `RuntimeError` when it cannot start; then it has left nothing behind."""
        chosen = Settings(**self._settings)
        made = config(create_app(chosen), max_message=chosen.limit_message, drain=chosen.drain)
        made.host, made.port = self.host, 80
        if not self.ours:
            made.ws = "websockets-sansio"
        server = self._server = uvicorn.Server(made)
        made.load()
        server.lifespan = made.lifespan_class(made)
        try:
            await server.startup()
        except SystemExit:
            raise RuntimeError(f"{self.host} did not start") from None
        self.up = True

    async def stop(self) -> None:
        """As SIGTERM; uvicorn waits for a time, and then ends what is left."""
        self.up = False
        state = self._server.server_state
        for each in self._server.servers:
            each.close()
        for connection in sorted(state.connections, key=_place):  # uvicorn's set is in the order of addresses
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                while state.connections or state.tasks:
                    await asyncio.sleep(0.01)
        for task in list(state.tasks):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await self._server.lifespan.shutdown()


def _place(connection: Any) -> Any:
    """The same in each run: the other end of a connection."""
    return connection.transport.get_extra_info("peername")


def on_host(host: str, work: Callable[[], Any]) -> Any:
    """A task that runs on `host`, and ends with it."""
    context = copy_context()
    context.run(seam.HOST.set, host)
    return asyncio.get_running_loop().create_task(work(), context=context)
