"""The WebSocket edge: handshake, admission, and the life of one connection. Litestar carries it."""

import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from random import uniform
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import msgspec
from litestar import WebSocket
from litestar.exceptions import WebSocketDisconnect
from litestar.handlers import WebsocketListenerRouteHandler, websocket_listener
from litestar.params import FromPath
from msgspec import Struct

from router import wire
from router.brokers.base import Limits
from router.errors import BadMessage, CloseCode, Disconnect, Unavailable, clip_reason, place
from router.flow import Router
from router.port import AsgiPort, DirectPort, port_for
from router.recovery import Since, Start
from router.session import Bookmark, Session, topics_of
from router.tracing import SpanKind, valid_traceparent
from router.upkeep import Upkeep

__all__ = ["Door", "Gateway", "GatewaySocket", "parse_since"]

log = logging.getLogger("router")


class Door(Struct, frozen=True):
    """Whom to let in. Times in seconds."""

    limits: Limits = Limits()
    allowed_origins: tuple[str, ...] = ()
    """Origins of pages that may connect, besides those of our own host. `*` allows all."""
    query_token: bool = True
    """Whether `?token=` is accepted, as the specification has it."""
    retry_after: float = 5.0
    drain: float = 5.0
    """Over how long connections are closed at shutdown, so that they do not all come back at once."""


class GatewaySocket(WebSocket[Any, Any, Any]):
    """Litestar's WebSocket, except that a binary frame is answered instead of read as an empty text."""

    participant: Session
    router: Router
    port: DirectPort | AsgiPort | None = None
    began = 0.0
    over = False
    """It was refused: nothing is read from it."""
    present = False
    """Whether its person counts as here."""
    code = 1006
    """The close code, once it is closed."""

    async def receive_data(self, mode: Any = "text") -> Any:  # noqa: ARG002  # Litestar's signature
        """The next text frame."""
        if self.over:
            raise WebSocketDisconnect(detail="refused", code=self.code)
        while True:
            message: Any = await self.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(detail=message.get("reason") or "", code=message.get("code") or 1005)
            text = message.get("text")
            if text is not None:
                return text
            self.router.metrics.error("bad_message")
            self.router.refuse(self.participant, BadMessage("messages are JSON in text frames, not binary"), bad=True)


class Gateway:
    """Lets clients in and runs their connections. One for the whole application; keeps no state of one connection."""

    def __init__(self, router: Router, upkeep: Upkeep, door: Door = Door()) -> None:
        self._router = router
        self._upkeep = upkeep
        self._door = door

    def handler(self) -> WebsocketListenerRouteHandler:
        """The Litestar route `/ws/project/{project_uuid}`."""

        @asynccontextmanager
        async def lifespan(socket: WebSocket[Any, Any, Any], project_uuid: FromPath[str]) -> AsyncIterator[None]:
            assert isinstance(socket, GatewaySocket)
            async with self._connection(socket, project_uuid):
                yield

        @websocket_listener(
            "/ws/project/{project_uuid:str}", connection_lifespan=lifespan, websocket_class=GatewaySocket
        )
        async def project_socket(data: str, socket: WebSocket[Any, Any, Any]) -> None:
            assert isinstance(socket, GatewaySocket)
            await self._router.receive(socket.participant, data)

        return project_socket

    @asynccontextmanager
    async def _connection(self, socket: GatewaySocket, project: str) -> AsyncIterator[None]:
        """One connection from handshake to goodbye."""
        try:
            session, since = await self._admit_safely(socket, project)
        except Disconnect as refused:
            self._router.metrics.error(str(int(refused.code)))
            log.info(
                "refused",
                extra={"event": "websocket_refused", "project_uuid": project[:128], "code": int(refused.code)},
            )
            await _refuse(socket, refused)
            socket.over = True
            with suppress(WebSocketDisconnect):
                yield  # the listener reads the disconnect and unwinds
            return
        socket.participant, socket.router = session, self._router
        entered = accepted = False
        try:
            # It listens before it is accepted: a client that has no other mark than `open` hears all from there on.
            starts = await self._router.prepare(session, since)
            await socket.accept(subprotocols=None if session.plain else wire.SUBPROTOCOL)
            accepted = True
            await self._enter(socket, session, starts, since)
            entered = True
            yield
        except WebSocketDisconnect as gone:
            socket.code = gone.code
        except Disconnect as ended:
            socket.code = int(ended.code)
            self._router.metrics.error(str(socket.code))
            await _close(socket, ended)
        except Unavailable as away:
            overload = Disconnect(CloseCode.OVERLOAD, away.message, retry_after=self._door.retry_after)
            socket.code = int(overload.code)
            self._router.metrics.error(str(socket.code))
            if accepted:
                await _close(socket, overload)
            else:
                await _refuse(socket, overload)
                socket.over = True
        except OSError:
            log.debug("gone in the middle of the handshake")  # uvicorn's ClientDisconnected
        except Exception as error:  # our own bug: tell neither client nor log what was in the message
            socket.code = int(CloseCode.INTERNAL_ERROR)
            self._router.metrics.error("internal")
            what = f"{type(error).__name__} at {place(error)}"
            log.error("connection failed: %s", what, extra={"event": "connection_failed"})
            await _close(socket, Disconnect(CloseCode.INTERNAL_ERROR, "internal error"))
        finally:
            await self._leave(socket, session)
        if not entered:
            with suppress(WebSocketDisconnect):
                yield

    async def _admit_safely(self, socket: GatewaySocket, project: str) -> tuple[Session, Any]:
        """`_admit`, with whatever else goes wrong in it (an application's `permissions`) as a refusal."""
        try:
            return await self._admit(socket, project)
        except Disconnect:
            raise
        except Unavailable as away:
            raise Disconnect(CloseCode.OVERLOAD, away.message, retry_after=self._door.retry_after) from None
        except Exception as error:
            what = f"{type(error).__name__} at {place(error)}"
            log.error("handshake failed: %s", what, extra={"event": "handshake_failed", "project_uuid": project[:128]})
            raise Disconnect(CloseCode.INTERNAL_ERROR, "internal error", retry_after=self._door.retry_after) from None

    async def _admit(self, socket: GatewaySocket, project: str) -> tuple[Session, Any]:
        """Who it is, whether they may, and whether there is room. Raises `Disconnect` if not. Takes a seat."""
        self._check_origin(socket)
        attributes = {"http.route": "/ws/project/{project_uuid}"}
        parent = valid_traceparent(socket.headers.get("traceparent"))
        with self._router.tracing.span("handshake", SpanKind.SERVER, parent, attributes):
            query = parse_qs(socket.scope["query_string"].decode("latin-1"))
            offered = socket.scope["subprotocols"]
            identity = await self._router.authenticate(self._token(socket, offered, query), project)
            topics = topics_of(project, identity.user)
            full = await self._router.broker.claim(identity.user, project, self._door.limits)
            if full is not None:
                raise Disconnect(CloseCode.LIMIT, _FULL[full], retry_after=self._door.retry_after)
        plain = wire.SUBPROTOCOL not in offered
        session = Session(uuid4().hex, identity, project, plain=plain, topics=topics)
        return session, parse_since(query.get("since", [None])[0], topics)

    async def _enter(
        self, socket: GatewaySocket, session: Session, starts: dict[str, Start], since: Since | None
    ) -> None:
        """Let an accepted connection take part. Nothing is awaited before the router has it."""
        router = self._router
        socket.began = time.monotonic()
        socket.port = port = port_for(socket.scope, socket.send)
        _forget_handshake(socket)

        def writable(can_write: bool) -> None:
            if can_write:
                router.resume(session)
            else:
                router.slow(session)

        port.listen(writable, lambda: self._goodbye(session))
        router.metrics.opened(recovering=any(epoch for epoch, _ in (since or {}).values()))
        self._upkeep.add(session)
        recovered = await router.enter(session, port, starts, since, self._upkeep.ping_every)
        await router.presence.enter(session.project, session.user)
        socket.present = True
        _log_connection("websocket_connected", session, recovered=recovered)

    async def _leave(self, socket: GatewaySocket, session: Session) -> None:
        """Undo what was begun of `_admit` and `_enter`, however far they came.

        Written out rather than left to an AsyncExitStack, which costs 4 KB for each connection.
        """
        router = self._router
        self._upkeep.remove(session)
        try:
            await router.close(session)
        finally:
            try:
                if socket.port is not None:
                    seconds = time.monotonic() - socket.began
                    router.metrics.closed(seconds)
                    _log_connection("websocket_disconnected", session, code=socket.code, seconds=round(seconds, 3))
                    await socket.port.finish()
            finally:
                await self._give_back(socket, session)

    async def _give_back(self, socket: GatewaySocket, session: Session) -> None:
        """What it took of what all nodes share."""
        try:
            if socket.present:
                await self._router.presence.leave(session.project, session.user)
        finally:
            await self._router.broker.release(session.user, session.project)

    def _goodbye(self, session: Session) -> float:
        """At shutdown: tell `session` when to come back; returns in how many seconds to close it."""
        delay = uniform(0, self._door.drain)
        self._router.hub.say(session, wire.encode(wire.GoAway(retry_after=round(delay, 3), reason="restarting")))
        return delay

    def _check_origin(self, socket: GatewaySocket) -> None:
        origin = socket.headers.get("origin")
        allowed = self._door.allowed_origins
        if origin is None or "*" in allowed or origin in allowed:
            return
        if _host_of(origin) != socket.headers.get("host"):
            # Raised as a refusal that even a browser gets as HTTP 403: the page is not to learn more.
            raise _ForeignOrigin

    def _token(self, socket: GatewaySocket, offered: Sequence[str], query: dict[str, list[str]]) -> str | None:
        """The token, from where it is least likely to be logged."""
        for name in offered:
            if name.startswith("bearer."):
                return name.removeprefix("bearer.")
        scheme, _, value = socket.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return value.strip()
        return query.get("token", [None])[0] if self._door.query_token else None


class _ForeignOrigin(Disconnect):  # a kind of Disconnect
    def __init__(self) -> None:
        super().__init__(CloseCode.FORBIDDEN, "this origin is not on the list `allowed_origins`")


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


_FULL = {
    "user": "too many connections of this user",
    "project": "too many viewers of this project",
    "system": "too many connections",
}

_HTTP = {
    CloseCode.UNAUTHENTICATED: (401, "Unauthorized"),
    CloseCode.FORBIDDEN: (403, "Forbidden"),
    CloseCode.NO_SUCH_PROJECT: (404, "Not Found"),
    CloseCode.LIMIT: (429, "Too Many Requests"),
}


def _forget_handshake(socket: GatewaySocket) -> None:
    """Drop what was only for the handshake: a kilobyte for each connection, and the token with it."""
    socket.scope["query_string"] = b""
    socket.scope["headers"] = []
    socket.scope["subprotocols"] = []


async def _refuse(socket: GatewaySocket, refused: Disconnect) -> None:
    """Tell a client that it may not connect, in the way that it can understand.

    Browsers see 1006 without a reason for every HTTP refusal, so they are let in
    and closed with a code; all others get the HTTP status.
    """
    foreign = isinstance(refused, _ForeignOrigin)
    if "origin" in socket.headers and not foreign:
        offered = wire.SUBPROTOCOL in socket.scope["subprotocols"]
        await socket.accept(subprotocols=wire.SUBPROTOCOL if offered else None)
        await _close(socket, refused)
        return
    status, title = _HTTP.get(refused.code, (503, "Service Unavailable"))
    if refused.reason == _FULL["system"]:
        status, title = 503, "Service Unavailable"
    problem = {
        "title": title,
        "status": status,
        "detail": refused.reason,
        "code": title.lower().replace(" ", "_"),
        "close_code": int(refused.code),
    }
    headers = [(b"content-type", b"application/problem+json")]
    if refused.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, round(refused.retry_after))))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await socket.receive()
    if "websocket.http.response" not in (socket.scope.get("extensions") or {}):
        await socket.close(int(refused.code), clip_reason(refused.reason))
        return
    start: Any = {"type": "websocket.http.response.start", "status": status, "headers": headers}
    body: Any = {"type": "websocket.http.response.body", "body": msgspec.json.encode(problem)}
    await socket.send(start)
    await socket.send(body)


async def _close(socket: GatewaySocket, ended: Disconnect) -> None:
    reason = ended.reason
    if ended.retry_after is not None:
        reason = f"{reason}; retry after {ended.retry_after:g} s"
    try:
        await socket.close(int(ended.code), clip_reason(reason))
    except Exception:
        log.debug("the client was gone before it could be told")


def _log_connection(event: str, session: Session, **more: object) -> None:
    fields = {"event": event, "project_uuid": session.project, "user_id": session.user, "session_id": session.id}
    log.info(event, extra={**fields, **more})


_PLACE = re.compile(r"([A-Za-z0-9_-]{1,64}):(\d{1,18})(?::(\d{1,18}(?:\.\d{1,18})*))?\Z")


def parse_since(value: str | None, topics: Sequence[str]) -> dict[str, tuple[str, Bookmark]] | None:
    """`?since=`: what a client has of its topics. What cannot be read is an epoch that never was, so it resyncs.

    `<epoch>:<pos>[:<seq>.<seq>...]` for the project, then `,user:...` and `,all:...`; `0` asks for all there is. The
    numbers after the second colon are those beyond `pos` that the client has already.
    """
    if value is None:
        return None
    if value == "0":
        return dict.fromkeys(topics, ("", Bookmark(0)))
    since = {}
    for part in value.split(",")[:3]:
        label, _, rest = part.partition(":")
        topic = {"user": topics[1], "all": topics[2]}.get(label, topics[0])
        found = _PLACE.match(part if topic == topics[0] else rest)
        if found is None:
            since[topic] = ("?", Bookmark(0))
            continue
        epoch, pos, known = found.groups()
        beyond = frozenset(map(int, known.split("."))) if known else frozenset()
        since[topic] = (epoch, Bookmark(int(pos), beyond, claimed=True))
    return since
