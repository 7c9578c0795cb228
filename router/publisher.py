"""What backends import: publishes typed events to a router. Needs no Litestar."""

import asyncio
from collections.abc import Mapping, Sequence
from random import uniform
from types import TracebackType
from typing import Any, Self, overload
from urllib.parse import quote
from uuid import uuid4

import httpx
import msgspec
from msgspec import Struct

from router.errors import BadMessage, Denied, RateLimited, Refused, TooLarge, Unavailable
from router.event import Event
from router.tracing import current_traceparent

__all__ = ["Acknowledged", "Publisher", "events_path"]

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
"""Seconds between tries, doubled each time and drawn at random below that: together enough for a restart."""

_REFUSALS: Mapping[str, type[Refused]] = {
    "bad_message": BadMessage,
    "unknown_type": BadMessage,
    "too_large": TooLarge,
    "rate_limited": RateLimited,
    "unavailable": Unavailable,
}


class Acknowledged(Struct, frozen=True):
    """What became of events that had to be acknowledged: their numbers, and which users did and did not."""

    seq: list[int]
    acknowledged: list[str]
    missing: list[str]


class Publisher:
    """Publishes events over HTTP, with a service token that holds the grant `publish`.

    Every publish has an id, so a retry after a lost answer publishes nothing twice. Use it as an async context
    manager, one for the whole process: it keeps its connections.

        async with Publisher("http://127.0.0.1:8000", token) as publisher:
            await publisher.publish("proj_123", StepCompleted(step_id="step_123", result={"row_count": 1500}))
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout: float = 10.0,
        tries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout`: seconds for one try; `tries`: how often a publish is tried while the router is away."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"Publisher needs the router's address as http:// or https://, not {url!r}")
        if not token:
            raise ValueError("Publisher needs a token with the grant `publish`; this one is empty")
        self._tries = max(1, tries)
        self._timeout = timeout
        self._client = httpx.AsyncClient(
            base_url=url, timeout=timeout, transport=transport, headers={"Authorization": f"Bearer {token}"}
        )
        self._encoder = msgspec.json.Encoder()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    @overload
    async def publish(
        self,
        project: str,
        *events: Event,
        message_id: str | None = None,
        acknowledged: None = None,
        traceparent: str | None = None,
    ) -> list[int]: ...
    @overload
    async def publish(
        self,
        project: str,
        *events: Event,
        message_id: str | None = None,
        acknowledged: float,
        traceparent: str | None = None,
    ) -> Acknowledged: ...
    async def publish(
        self,
        project: str,
        *events: Event,
        message_id: str | None = None,
        acknowledged: float | None = None,
        traceparent: str | None = None,
    ) -> "list[int] | Acknowledged":
        """Publish to everybody who has `project` open. Returns the numbers that the events got.

        `acknowledged`: wait at most so many seconds (60 at the most) until everybody has acknowledged, and return
        who did and who did not. `traceparent`: the trace that the events belong to; without it, the one that this
        code runs in. Raises `BadMessage`, `TooLarge`, `Denied`, or `Unavailable` when the router cannot
        be reached.
        """
        path = events_path("projects", project)
        body = self._body(events)
        if acknowledged is None:
            return await self.publish_json(path, body, message_id, traceparent)
        path = f"{path}?acknowledged={acknowledged:g}"
        answer = await self._post(path, body, message_id, traceparent, extra=acknowledged)
        return msgspec.convert(answer, Acknowledged)

    async def publish_to_user(
        self, user: str, *events: Event, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """Publish to all connections of one person, whatever project they have open."""
        path = events_path("users", user)
        return await self.publish_json(path, self._body(events), message_id, traceparent)

    async def publish_to_all(
        self, *events: Event, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """Publish to everybody who is connected."""
        return await self.publish_json("/events", self._body(events), message_id, traceparent)

    async def publish_json(
        self, path: str, body: bytes, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """Publish events that are JSON already to `path` of the HTTP interface."""
        numbers: list[int] = (await self._post(path, body, message_id, traceparent))["seq"]
        return numbers

    def _body(self, events: Sequence[Event]) -> bytes:
        try:
            return self._encoder.encode(events)
        except UnicodeError:
            raise BadMessage("a text has half of a surrogate pair: that is not JSON everywhere") from None

    async def _post(
        self, path: str, body: bytes, message_id: str | None, traceparent: str | None, *, extra: float = 0.0
    ) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Idempotency-Key": message_id or uuid4().hex}
        trace = traceparent or current_traceparent()
        if trace is not None:
            headers["traceparent"] = trace
        away: Exception | None = None
        for attempt in range(self._tries):
            if attempt:
                await asyncio.sleep(uniform(0, min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)))
            try:
                response = await self._client.post(path, content=body, headers=headers, timeout=self._timeout + extra)
            except httpx.TransportError as error:
                away = error
                continue
            if response.status_code == httpx.codes.ACCEPTED:
                answer: dict[str, Any] = response.json()
                return answer
            raise _refusal(response)
        raise Unavailable(f"the router at {self._client.base_url} cannot be reached: {type(away).__name__}")


def events_path(kind: str, name: str) -> str:
    """Where events for one of the `projects` or `users` are published. Raises `BadMessage` for a name without a path.

    An address of `..` would be folded into another one, and a message for one person go to everybody.
    """
    if not name or "/" in name or name in (".", ".."):
        raise BadMessage(f"{name!r} cannot be published to: it has a `/`, or is empty, `.` or `..`")
    return f"/{kind}/{quote(name, safe='')}/events"


def _refusal(response: httpx.Response) -> Refused:
    """The router's answer as the error it stands for."""
    try:
        problem: dict[str, Any] = response.json()
    except ValueError:
        problem = {}
    detail = str(problem.get("detail") or f"the router answered {response.status_code}")
    if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        refusal: Refused = Denied("publish")
        refusal.message = detail
        refusal.args = (detail,)
        return refusal
    return _REFUSALS.get(str(problem.get("code")), Refused)(detail)
