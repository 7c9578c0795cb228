"""A real node on a free loopback port, real clients and real tokens, for tests."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jwt
import uvicorn
from websockets.asyncio.client import ClientConnection, connect

from router.app import build_catalog, create_app, create_router
from router.flow import Router
from router.server.serve import config, listen
from router.settings import Settings

KEY = "a-secret-for-tests-that-is-long-enough"


def make_token(
    user: str = "ada", project: str = "p1", grants: tuple[str, ...] = ("view", "chat", "edit"), **claims: Any
) -> str:
    now = int(time.time())
    payload = {"sub": user, "iat": now, "exp": now + 600, "projects": {project: list(grants)}, **claims}
    return jwt.encode({name: value for name, value in payload.items() if value is not None}, KEY)


class Client:
    """A client over a real socket that reads frames as JSON."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.welcome: dict[str, Any] = {}
        self._opened: list[dict[str, Any]] = []

    async def send(self, message: Any) -> None:
        await self.connection.send(message if isinstance(message, str | bytes) else json.dumps(message))

    async def frame(self, timeout: float = 10) -> dict[str, Any]:
        return json.loads(await asyncio.wait_for(self.connection.recv(), timeout))

    async def events(self, until: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Every event, batches opened, until one for which `until` holds; that one is the last."""
        seen = []
        while True:
            if not self._opened:
                frame = await self.frame()
                self._opened = frame["events"] if frame["type"] == "batch" else [frame]
            seen.append(self._opened.pop(0))
            if until(seen[-1]):
                return seen

    async def event(self, kind: str) -> dict[str, Any]:
        """The next event of a type."""
        return (await self.events(lambda event: event["type"] == kind))[-1]

    async def closed(self) -> tuple[int, str]:
        """The close code and reason, once it closes."""
        await asyncio.wait_for(self.connection.wait_closed(), 10)
        return self.connection.close_code or 0, self.connection.close_reason or ""


class Node:
    """A running node and ways to it."""

    def __init__(self, router: Router, port: int) -> None:
        self.router = router
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    @asynccontextmanager
    async def client(
        self,
        project: str = "p1",
        *,
        plain: bool = False,
        token: str | None = None,
        since: str | None = None,
        **options: Any,
    ) -> AsyncIterator[Client]:
        """A connected client; one that speaks router.v1 has read its `welcome`, which is `client.welcome`."""
        query = "" if since is None else f"?since={since}"
        headers = {"Authorization": f"Bearer {token or make_token(project=project)}"}
        protocols: Any = None if plain else ["router.v1"]
        url = f"ws://127.0.0.1:{self.port}/ws/project/{project}{query}"
        async with connect(
            url, additional_headers=headers, subprotocols=protocols, compression=None, **options
        ) as found:
            client = Client(found)
            if not plain:
                client.welcome = await client.frame()
            else:
                await self.settled()
            yield client

    async def settled(self) -> None:
        """Wait until every connection that was accepted has joined its room."""
        for _ in range(1000):
            sessions = list(self.router.hub)
            if sessions and all(self.router.hub.listening(s.topics[0]) for s in sessions):
                return
            await asyncio.sleep(0)

    async def publish(
        self, *events: dict[str, Any], project: str = "p1", path: str | None = None, **headers: str
    ) -> list[int]:
        """Publish over HTTP as a backend does."""
        token = make_token("backend", "*", ("publish",))
        async with httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {token}", **headers}
        ) as http:
            body = json.dumps(events[0] if len(events) == 1 else list(events))
            response = await http.post(path or f"/projects/{project}/events", content=body)
            assert response.status_code == 202, response.text
            return response.json()["seq"]


@asynccontextmanager
async def run_node(*, protocol: str | None = None, **settings: Any) -> AsyncIterator[Node]:
    """A node in this event loop, on a free port, with the real server protocol."""
    chosen = Settings(**{"jwt_key": KEY, "drain": 0.0, "presence_grace": 0.0, **settings})
    router = create_router(chosen, build_catalog(chosen))
    listener = listen("127.0.0.1", 0)
    made = config(create_app(chosen, router=router), max_message=chosen.limit_message, drain=chosen.drain)
    if protocol is not None:  # as under a server that is not ours
        made.ws = protocol
    server = uvicorn.Server(made)
    made.load()
    server.lifespan = made.lifespan_class(made)
    await server.startup(sockets=[listener])
    state = server.server_state
    try:
        yield Node(router, listener.getsockname()[1])
    finally:  # as uvicorn's own shutdown, without its pauses
        for each in server.servers:
            each.close()
        for connection in list(state.connections):
            connection.shutdown()
        async with asyncio.timeout(15):
            while state.connections or state.tasks:
                await asyncio.sleep(0)
        await server.lifespan.shutdown()
        listener.close()
