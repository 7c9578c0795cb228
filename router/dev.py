"""The demo: a page with two viewers, tokens for it, and a make-believe backend. For this machine only."""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import Sequence
from importlib.resources import files
from random import Random
from typing import Annotated, Any
from urllib.parse import urlsplit

import jwt
import msgspec
from litestar import Request, Response, get, post
from litestar.exceptions import NotFoundException, PermissionDeniedException
from litestar.params import FromPath, QueryParameter

from router.audience import Audience, project_topic
from router.flow import Router

__all__ = ["PROJECT", "demo_routes", "make_token", "origins_of"]

PROJECT = "demo"
GRANTS = ("view", "chat", "edit", "publish")
_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}


def make_token(key: str, user: str, project: str, *, grants: tuple[str, ...] = GRANTS, lifetime: float = 3600.0) -> str:
    """A token for development, signed with the secret that the router verifies with."""
    now = int(time.time())
    return jwt.encode({"sub": user, "iat": now, "exp": now + int(lifetime), "projects": {project: list(grants)}}, key)


def origins_of(nodes: Sequence[str]) -> list[str]:
    """The origins that the page has when it comes from one of `nodes`: their URLs, and those by the name localhost."""
    return [*nodes, *(f"http://localhost:{urlsplit(node).port}" for node in nodes)]


def demo_routes(router: Router, key: str, nodes: Sequence[str] = ()) -> list[Any]:
    """The page and what it talks to. `nodes`: the URLs of all nodes, this one among them, when there are several."""
    running: set[asyncio.Task[None]] = set()

    @get("/", include_in_schema=False)
    async def page() -> Response[bytes]:
        return _file("index.html")

    @get("/demo/{name:str}", include_in_schema=False)
    async def asset(name: FromPath[str]) -> Response[bytes]:
        return _file(name)

    @get("/demo/nodes", include_in_schema=False)
    async def others() -> dict[str, Sequence[str]]:
        return {"nodes": nodes}

    @get("/demo/token", include_in_schema=False)
    async def token(user: Annotated[str, QueryParameter(name="user", pattern="[a-z]{1,20}")] = "ada") -> dict[str, Any]:
        lifetime = 3600
        made = make_token(key, user, PROJECT, lifetime=lifetime)
        return {"token": made, "user": user, "project": PROJECT, "expires_in": lifetime}

    @post("/demo/run", status_code=202, include_in_schema=False)
    async def run(name: Annotated[str, QueryParameter(name="name", pattern="[0-9a-f-]{1,36}")]) -> dict[str, bool]:
        if not running:
            task = asyncio.create_task(_Backend(router, name).run())
            running.add(task)
            task.add_done_callback(running.discard)
        return {"running": True}

    @post("/demo/stop", status_code=202, include_in_schema=False)
    async def stop(request: Request[Any, Any, Any]) -> dict[str, bool]:
        """End this node as `kill -9` does, once it has answered."""
        # Pages of any origin may post; that the browser keeps the answer from them would be too late.
        if request.headers.get("origin") not in origins_of(nodes):
            raise PermissionDeniedException("only the demo page may stop a node, and only one of several")
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGKILL)
        return {"stopping": True}

    return [page, asset, others, token, run, stop]


def _file(name: str) -> Response[bytes]:
    kind = _KINDS.get(name.rpartition(".")[2])
    source = files("router").joinpath("web/demo", name)
    if kind is None or "/" in name or not source.is_file():
        raise NotFoundException
    return Response(source.read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})


class _Backend:
    """What an application's backend would do while it runs a project, with sleeps where it would work.

    A run on several nodes at once is one run: all of them say the same, and each event has an id by which it is
    published once. So it goes on as long as one of them does.
    """

    def __init__(self, router: Router, name: str) -> None:
        self._router = router
        self._name = name

    async def run(self) -> None:
        """Three steps side by side, an answer that streams, a change, a notification."""
        unlucky = Random(self._name).random() < 0.3
        await self._say(type="chat_message", role="assistant", content="Running the project: load, clean, summarise.")
        await self._say(type="project_modified", user_id="ada", changes={"steps_added": ["s1", "s2", "s3"]})
        await asyncio.gather(self._step("s1", 2.0), self._step("s2", 3.0), self._step("s3", 4.0, fails=unlucky))
        await self._answer()
        await self._say(
            type="notification", level="success", title="Run finished", message="The answer is in the chat."
        )

    async def _step(self, step: str, seconds: float, *, fails: bool = False) -> None:
        await self._say(type="step_started", step_id=step)
        parts = 40
        for part in range(1, parts + 1):
            await asyncio.sleep(seconds / parts)
            if fails and part == parts // 2:
                await self._say(type="step_error", step_id=step, error="The source did not answer")
                return
            progress = {"progress": part / parts, "message": f"Processing chunk {part}/{parts}"}
            await self._say(type="step_progress", step_id=step, **progress)
        await self._say(type="step_completed", step_id=step, result={"row_count": 1500, "columns": ["id", "name"]})

    async def _answer(self) -> None:
        words = [
            "Here",
            "are",
            "the",
            "top",
            "customers",
            "by",
            "revenue:",
            "Analytical",
            "Engines,",
            "Bletchley",
            "Goods,",
            "and",
            "Compilers",
            "&",
            "Co.",
        ]
        for index, word in enumerate(words):
            await asyncio.sleep(0.06)
            last = index == len(words) - 1
            text = word if last else word + " "
            await self._say(
                type="chat_response_chunk", content=text, is_complete=last, stream_id=self._name, index=index
            )

    async def _say(self, **event: Any) -> None:
        parsed, payload = self._router.dispatch.read_foreign(msgspec.json.encode(event))
        id_ = f"{self._name}-{hashlib.sha256(payload).hexdigest()[:16]}"
        await self._router.publish(Audience(project_topic(PROJECT)), parsed, payload=payload, message_id=id_)
