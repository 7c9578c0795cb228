"""Puts a node together from its settings."""

import asyncio
import importlib
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path
from typing import Any, cast

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig

from router import journal, presence, wire
from router.brokers.base import Broker, Limits
from router.brokers.memory import MemoryBroker
from router.catalog import Catalog, Found, discover
from router.dispatch import Dispatch
from router.errors import Disconnect, Refused, SetupError
from router.flow import Pace, Router
from router.gateway import Door, Gateway
from router.http import litestar_response, refused_response, routes
from router.middleware.auth import Authenticator, Permissions, Tokens
from router.pipeline import Middleware
from router.settings import Settings
from router.tracing import Tracing
from router.upkeep import Upkeep

__all__ = ["build_catalog", "create_app", "create_router", "reach_broker", "worker_app"]

log = logging.getLogger("router")


def build_catalog(settings: Settings, *, quiet: bool = False) -> Catalog:
    """All plugins: the router's own, the package `plugins`, entry points, folders.

    Broken ones are logged (unless `quiet`) and left out; with `strict_plugins` they raise `SetupError`.
    """
    found, problems = discover("plugins", [Path(folder) for folder in settings.plugins])
    own = [Found(plugin, "router.presence") for plugin in presence.PLUGINS]
    catalog = Catalog([*own, *found], problems, reserved=wire.CONTROL_TAGS)
    if catalog.problems and settings.strict_plugins:
        raise SetupError("\n".join(map(str, catalog.problems)))
    for problem in () if quiet else catalog.problems:
        log.error("%s", problem, extra={"event": "plugin_broken"})
    return catalog


def create_router(settings: Settings, catalog: Catalog, *, tracing: Tracing | None = None) -> Router:
    """The node's router. Raises `SetupError` for settings that cannot work together."""
    import time

    if not settings.jwt_key:
        raise SetupError(
            "no key to verify tokens with: set ROUTER_JWT_KEY (or `jwt_key` in router.toml), "
            "for example to the output of `openssl rand -hex 32`; `router dev` makes one for this machine only"
        )
    for found in catalog:
        if found.plugin.policy.cost > settings.limit_burst:
            raise SetupError(
                f"`{found.plugin.tag}` of {found.source} costs {found.plugin.policy.cost:g}, more than a user may ever "
                f"send at once (`limit_burst` = {settings.limit_burst}): it could never pass"
            )
    tokens = Tokens(
        settings.jwt_key,
        settings.jwt_algorithms,
        issuer=settings.jwt_issuer or None,
        audience=settings.jwt_audience or None,
        max_lifetime=settings.jwt_max_lifetime,
        clock=time.time,
    )
    permissions = cast("Permissions", _named(settings.permissions, "permissions")) if settings.permissions else None
    pace = Pace(
        broadcast_every=settings.broadcast_every,
        rate=settings.limit_rate,
        burst=settings.limit_burst,
        handler_timeout=settings.handler_timeout,
        ack_after=settings.ack_after,
        ack_tries=settings.ack_tries,
        max_event=settings.limit_event,
        token_grace=settings.token_grace,
    )
    return Router(
        catalog,
        _broker(settings, catalog),
        Authenticator(tokens, permissions),
        pace=pace,
        audit=_audit_file(settings.audit),
        tracing=tracing or _tracing(settings),
        arrange=lambda order: _arrange(order, settings.middleware),
    )


def worker_app(settings: Settings) -> Litestar:
    """The application of one worker process."""
    journal.configure(settings.log_level)
    return create_app(settings)


def create_app(
    settings: Settings, *, router: Router | None = None, handlers: Sequence[Any] = (), cors: CORSConfig | None = None
) -> Litestar:
    """The whole node as an ASGI application.

    `handlers`: Litestar routes of your own beside ours. `cors`: which pages of other origins may ask over HTTP.
    """
    router = router or create_router(settings, build_catalog(settings))
    upkeep = Upkeep(
        router, ping_every=settings.ping_every, silence=settings.silence, slow_deadline=settings.slow_deadline
    )
    door = Door(
        limits=Limits(settings.limit_user, settings.limit_project, settings.limit_system),
        allowed_origins=settings.allowed_origins,
        query_token=settings.query_token,
        drain=settings.drain,
    )

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        await router.start()
        tick = asyncio.create_task(upkeep.run())
        try:
            yield
        finally:
            tick.cancel()
            await asyncio.gather(tick, return_exceptions=True)
            await router.stop()

    return Litestar(
        [Gateway(router, upkeep, door).handler(), *routes(router), *handlers],
        lifespan=[lifespan],
        exception_handlers={
            Refused: refused_response,
            Disconnect: refused_response,
            HTTPException: litestar_response,
        },
        cors_config=cors,
        openapi_config=OpenAPIConfig(title="Event Router", version="1"),
        request_max_body_size=16 * 1024 * 1024,
        logging_config=None,
    )


def _broker(settings: Settings, catalog: Catalog) -> Broker:
    scheme = settings.broker.partition("://")[0]
    if scheme.partition("+")[0] in ("redis", "rediss", "unix"):
        return _redis_broker(settings, catalog)
    if scheme != "memory":
        raise SetupError(
            f"`broker` (ROUTER_BROKER) is {scheme}://; it is memory://, or a Redis URL such as redis://host:6379/0"
        )
    if settings.workers > 1:
        raise SetupError(
            f"{settings.workers} workers cannot share the memory broker: people on different workers would not see each "
            "other's events; run one worker (`workers = 1`), or give them a Redis or Valkey (`broker = redis://...`)"
        )
    return MemoryBroker(
        max_events=settings.history_events, max_age=settings.history_seconds, grace=settings.presence_grace
    )


def _redis_broker(settings: Settings, catalog: Catalog) -> Broker:
    try:
        from router.brokers.redis import RedisBroker
    except ImportError:
        raise SetupError(
            "`broker` names a Redis, which needs the extra `redis`: pip install 'event-router[redis]', or '.[redis]' in a clone"
        ) from None

    return RedisBroker(
        settings.broker,
        Dispatch(catalog).read,
        max_events=settings.history_events,
        max_age=settings.history_seconds,
        lease=settings.lease,
        grace=settings.presence_grace,
    )


async def reach_broker(settings: Settings) -> None:
    """Raise `SetupError`, in a sentence, when there is no Redis where the settings say. A node would say it at length."""
    if settings.broker.partition("://")[0] != "memory":
        broker = _redis_broker(settings, Catalog([]))
        try:
            await broker.start(lambda _: None, lambda _topic, _position: None)
        finally:
            await broker.stop()


def _audit_file(name: str) -> "FileIO | None":
    if not name:
        return None
    try:
        return Path(name).open("ab", buffering=0)
    except OSError as error:
        raise SetupError(f"`audit` (ROUTER_AUDIT) is a file that cannot be written: {name}: {error.strerror}") from None


def _tracing(settings: Settings) -> Tracing:
    if not settings.traces:
        return Tracing()
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

    exporter: SpanExporter
    if settings.traces == "console":
        exporter = ConsoleSpanExporter()
    elif settings.traces == "otlp":
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise SetupError("`traces = otlp` needs the extra: pip install 'event-router[otlp]'") from None
        exporter = OTLPSpanExporter()
    else:
        raise SetupError(f"`traces` (ROUTER_TRACES) is `{settings.traces}`; it is `otlp`, `console` or empty")
    provider = TracerProvider(resource=Resource.create({"service.name": "event-router"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, settings.trace_ratio)


def _arrange(order: dict[str, Middleware], names: Sequence[str]) -> list[Middleware]:
    """The pipeline as it is set: the router's own by name, others by `module:name`."""
    arranged = []
    for name in names:
        if name in order:
            arranged.append(order[name])
        elif ":" in name:
            found = _named(name, "middleware")
            if not (inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__)):
                raise SetupError(f"`middleware` names `{name}`, which is no `async def middleware(envelope, forward)`")
            arranged.append(cast("Middleware", found))
        else:
            raise SetupError(f"`middleware` names `{name}`; it is one of {', '.join(order)} or `module:name`")
    missing = [name for name in ("auth", "permission") if name not in names]
    if missing:
        raise SetupError(f"`middleware` leaves out `{missing[0]}`: everybody could send and see everything")
    return arranged


def _named(path: str, setting: str) -> Callable[..., object]:
    """The callable that a setting names as `module:name`."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SetupError(f"`{setting}` names `{path}`, which cannot be imported: {error}") from None
    if not callable(found):
        raise SetupError(f"`{setting}` names `{path}`, which cannot be called")
    return cast("Callable[..., object]", found)
