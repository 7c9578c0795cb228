"""The HTTP side: publish, presence, positions, health, metrics, the description of all messages, and the browser client."""

import asyncio
from http import HTTPStatus
from importlib.resources import files
from typing import Annotated, Any

import msgspec
from litestar import MediaType, Request, Response, get, post
from litestar.exceptions import HTTPException
from litestar.params import FromPath, HeaderParameter, QueryParameter
from msgspec import Raw

from router.asyncapi import describe
from router.audience import EVERYONE, Audience, user_topic
from router.errors import BadMessage, CloseCode, Denied, Disconnect, Refused, TooLarge, Unavailable
from router.flow import Router
from router.session import topics_of
from router.tracing import valid_traceparent

__all__ = ["litestar_response", "problem", "refused_response", "routes"]

MAX_EVENTS = 1000
MARKS = 300
"""Bytes that a critical event may be given: an id, and the mark that it must be acknowledged."""
IdempotencyKey = Annotated[str | None, HeaderParameter(name="Idempotency-Key", max_length=200)]
TraceParent = Annotated[str | None, HeaderParameter(name="traceparent")]
Wait = Annotated[float | None, QueryParameter(gt=0, le=60)]

_STATUS: dict[type[Refused], tuple[int, str]] = {
    BadMessage: (400, "Bad Request"),
    TooLarge: (413, "Content Too Large"),
    Denied: (403, "Forbidden"),
    Unavailable: (503, "Service Unavailable"),
}
_ENDED = {
    CloseCode.UNAUTHENTICATED: (401, "Unauthorized"),
    CloseCode.FORBIDDEN: (403, "Forbidden"),
    CloseCode.NO_SUCH_PROJECT: (404, "Not Found"),
}


def problem(status: int, title: str, detail: str, code: str) -> Response[bytes]:
    """An RFC 9457 answer."""
    body = msgspec.json.encode({"title": title, "status": status, "detail": detail, "code": code})
    return Response(body, status_code=status, media_type="application/problem+json")


def refused_response(_: Any, error: Exception) -> Response[bytes]:
    """How a refusal looks over HTTP."""
    if isinstance(error, Refused):
        status, title = _STATUS.get(type(error), (400, "Bad Request"))
        return problem(status, title, error.message, error.code)
    assert isinstance(error, Disconnect)
    status, title = _ENDED.get(error.code, (403, "Forbidden"))
    return problem(status, title, error.reason, title.lower().replace(" ", "_"))


def litestar_response(_: Any, error: Exception) -> Response[bytes]:
    """What Litestar itself refuses (a body that is too big, a header that does not fit), in the same form."""
    assert isinstance(error, HTTPException)
    title = HTTPStatus(error.status_code).phrase
    return problem(error.status_code, title, error.detail or title, title.lower().replace(" ", "_"))


async def _need(router: Router, request: Request[Any, Any, Any], project: str, grant: str, *others: str) -> None:
    """Raise unless the request's token gives `grant` or one of `others`.

    In a project, `permissions` is asked as for a connection.
    """
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    token = value.strip() if scheme.lower() == "bearer" else None
    if project == "*":
        if router.authenticate.tokens.read(token).grants("*").isdisjoint((grant, *others)):
            raise Denied(grant, "all projects (`*`)")
    elif (await router.authenticate.identify(token, project)).grants.isdisjoint((grant, *others)):
        raise Denied(grant)


async def _publish(
    router: Router,
    request: Request[Any, Any, Any],
    audience: Audience,
    key: str | None,
    trace: str | None,
    wait: float | None = None,
) -> dict[str, Any]:
    """Publish the body's event or events: all of them, or none when one is not right.

    `wait`: seconds to wait for acknowledgements; the answer then tells who acknowledged all of them and who not.
    """
    body = await request.body()
    try:
        raw = msgspec.json.decode(body, type=list[Raw] if body.lstrip()[:1] == b"[" else Raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise BadMessage(f"the body is not JSON: {error}") from None
    items = raw if isinstance(raw, list) else [raw]
    if not 0 < len(items) <= MAX_EVENTS:
        raise BadMessage(f"the body has {len(items)} events; it may have 1 to {MAX_EVENTS}")
    events = [_read(router, bytes(item), i if len(items) > 1 else None) for i, item in enumerate(items)]
    more: list[dict[str, Any]] = [
        {
            "payload": payload,
            "message_id": None if key is None else f"{key}:{i}",
            "traceparent": valid_traceparent(trace),
        }
        for i, (_, payload) in enumerate(events)
    ]
    if wait is None:
        return {
            "seq": [
                (await router.publish(audience, e, **m)).position.seq for (e, _), m in zip(events, more, strict=True)
            ]
        }
    results = await asyncio.gather(
        *(router.publish_and_wait(audience, e, wait, **m) for (e, _), m in zip(events, more, strict=True))
    )
    missing = {user for _, receipt in results for user in receipt.missing}
    acknowledged = {user for _, receipt in results for user in receipt.acknowledged} - missing
    seq = [published.position.seq for published, _ in results]
    return {"seq": seq, "acknowledged": sorted(acknowledged), "missing": sorted(missing)}


def _read(router: Router, item: bytes, index: int | None) -> tuple[Any, bytes]:
    try:
        event, payload = router.dispatch.read_foreign(item)
        critical = event.requires_ack or router.catalog.plugin_of(event).policy.ack
        router.dispatch.fits(payload, spare=MARKS if critical else 0)
    except Refused as refusal:
        if index is not None:
            refusal.message = f"event {index}: {refusal.message}"
        raise
    return event, payload


def routes(router: Router) -> list[Any]:
    """All HTTP handlers of a node."""

    @post("/projects/{project:str}/events", status_code=202, summary="Publish to everybody who has a project open")
    async def publish_to_project(
        request: Request[Any, Any, Any],
        project: FromPath[str],
        key: IdempotencyKey = None,
        trace: TraceParent = None,
        acknowledged: Wait = None,
    ) -> dict[str, Any]:
        topic = topics_of(project, "")[0]
        await _need(router, request, project, "publish")
        return await _publish(router, request, Audience(topic), key, trace, acknowledged)

    @post("/users/{user:str}/events", status_code=202, summary="Publish to all connections of one person")
    async def publish_to_user(
        request: Request[Any, Any, Any],
        user: FromPath[str],
        key: IdempotencyKey = None,
        trace: TraceParent = None,
        acknowledged: Wait = None,
    ) -> dict[str, Any]:
        await _need(router, request, "*", "publish")
        return await _publish(router, request, Audience(user_topic(user)), key, trace, acknowledged)

    @post("/events", status_code=202, summary="Publish to everybody who is connected")
    async def publish_to_all(
        request: Request[Any, Any, Any],
        key: IdempotencyKey = None,
        trace: TraceParent = None,
        acknowledged: Wait = None,
    ) -> dict[str, Any]:
        await _need(router, request, "*", "publish")
        return await _publish(router, request, Audience(EVERYONE), key, trace, acknowledged)

    @get("/projects/{project:str}/presence", summary="Who has a project open")
    async def presence(request: Request[Any, Any, Any], project: FromPath[str]) -> dict[str, list[Any]]:
        topics_of(project, "")
        await _need(router, request, project, "view")
        return {"users": list(await router.presence.people(project))}

    @get("/projects/{project:str}/position", summary="Where a project stands, to go on from with `since`")
    async def position(request: Request[Any, Any, Any], project: FromPath[str]) -> dict[str, Any]:
        topic = topics_of(project, "")[0]
        await _need(router, request, project, "view", "publish")
        found = await router.broker.position(topic)
        return {"epoch": found.epoch, "pos": found.seq, "since": found.since}

    @get("/healthz", media_type=MediaType.TEXT, summary="Whether the process lives")
    async def healthz() -> str:
        return "ok\n"

    @get("/readyz", summary="Whether it can do its work")
    async def readyz() -> Response[Any]:
        if await router.broker.ready():
            return Response({"ready": True, "connections": len(router.hub)})
        return problem(503, "Service Unavailable", "the broker cannot be reached", "unavailable")

    @get("/metrics", summary="Figures in Prometheus' text format")
    async def metrics() -> Response[bytes]:
        return Response(router.metrics.render(), media_type=router.metrics.content_type)

    @get("/asyncapi.json", summary="All messages, as an AsyncAPI 3.0 document")
    async def asyncapi() -> Response[bytes]:
        return Response(msgspec.json.encode(describe(router.catalog)), media_type="application/json")

    @get("/client/router.js", summary="The browser client that fits this server")
    async def client() -> Response[bytes]:
        source = files("router").joinpath("web/client/router.js").read_bytes()
        return Response(source, media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    return [
        publish_to_project,
        publish_to_user,
        publish_to_all,
        presence,
        position,
        healthz,
        readyz,
        metrics,
        asyncapi,
        client,
    ]
