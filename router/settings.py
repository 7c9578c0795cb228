"""What can be set, from where it came, and what is wrong with it: `router.toml`, then `ROUTER_*`, then arguments."""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from router.errors import SetupError

__all__ = ["Settings", "Shown", "load"]

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
SECRET = frozenset({"jwt_key", "broker"})
PREFIX = "ROUTER_"
OTHER_VARIABLES = frozenset({"ROUTER_SETTINGS", "ROUTER_TOKEN", "ROUTER_URL"})
"""Variables that the command line reads for other purposes."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting with its default. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    workers: Positive = 1
    """Processes. More than one needs a broker that they can share: Redis or Valkey."""
    broker: str = "memory://"
    """Where events are numbered and remembered: `memory://` for one process, or a Redis or Valkey URL for several."""
    jwt_key: str = ""
    """Secret (HS256) or public key in PEM form; `@path` reads it from a file."""
    jwt_algorithms: tuple[str, ...] = ("HS256",)
    """Signature algorithms that are accepted."""
    jwt_issuer: str = ""
    """The `iss` that tokens must have. Empty: any."""
    jwt_audience: str = ""
    """The `aud` that tokens must have. Empty: tokens need none."""
    jwt_max_lifetime: Seconds = 24 * 3600.0
    """A token that says it lives longer is taken to live this long."""
    token_grace: Annotated[float, Meta(ge=0)] = 25.0
    """How long after its token's expiry a connection may still refresh it."""
    query_token: bool = True
    """Whether `?token=` is accepted, as the specification has it."""
    permissions: str = ""
    """`module:function` that is asked `(user, project)`; see the how-to on permissions."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of pages that may connect, besides our own host's. `*` allows all."""
    plugins: tuple[str, ...] = ()
    """Folders with plugin files."""
    strict_plugins: bool = False
    """Whether a broken plugin stops the start."""
    middleware: tuple[str, ...] = ("auth", "permission", "rate", "coalesce", "audit")
    """The pipeline, in order; `module:name` puts one of your own in."""
    audit: str = ""
    """File that gets one JSON line for each message. Empty: none."""
    traces: str = ""
    """`otlp` (with the OTEL_EXPORTER_OTLP_* variables), `console`, or empty for none."""
    trace_ratio: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Share of messages that are traced."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level that is logged."""
    limit_user: Positive = 10
    """Connections of one user."""
    limit_project: Positive = 100
    """Viewers of one project."""
    limit_system: Positive = 10_000
    """Connections in all."""
    limit_rate: Seconds = 10.0
    """Messages a second of one user."""
    limit_burst: Positive = 10
    """Messages of one user at once."""
    limit_message: Positive = 64 * 1024
    """Bytes of one message from a client."""
    limit_event: Positive = 256 * 1024
    """Bytes of one event to clients."""
    broadcast_every: Seconds = 1.0
    """Least time between two flushes of throttled events to one project."""
    history_events: Positive = 1000
    """Events remembered of one project."""
    history_seconds: Seconds = 300.0
    """How long they are remembered."""
    ping_every: Seconds = 30.0
    """Time between pings."""
    silence: Seconds = 75.0
    """A connection from which nothing came for so long is cut."""
    slow_deadline: Seconds = 30.0
    """A client that does not take what is sent to it for so long is cut."""
    ack_after: Seconds = 10.0
    """A critical event that is not acknowledged within this time is sent again."""
    ack_tries: Positive = 3
    """How often."""
    handler_timeout: Seconds = 5.0
    """How long a plugin's handler may take."""
    presence_grace: Annotated[float, Meta(ge=0)] = 15.0
    """How long somebody is still here after the last connection closed."""
    lease: Annotated[float, Meta(ge=0.1)] = 15.0
    """How long the connections and people of a node that was killed still count on the others."""
    drain: Annotated[float, Meta(ge=0)] = 5.0
    """Over how long connections are closed at shutdown."""


class Shown(Struct, frozen=True):
    """One effective setting, fit to be shown."""

    name: str
    value: str
    source: str


def load(
    file: Path | None = None, environ: Mapping[str, str] = os.environ, **arguments: Any
) -> tuple[Settings, list[Shown]]:
    """The effective settings, and each with where it came from. Later sources win: file, environment, arguments.

    `file` None means `router.toml` here, if there is one. Raises `SetupError` that names an unknown or ill-typed one.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    kinds = {field.name: field for field in msgspec.structs.fields(Settings)}
    for source, read in (_from_file(file), _from_environment(environ, kinds), ("argument", dict(arguments))):
        for name, value in read.items():
            where = f"{PREFIX}{name.upper()}" if source == "environment" else source
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, n=1)
                hint = f"did you mean `{near[0]}`?" if near else "docs/reference/settings.md lists those that there are"
                raise SetupError(f"unknown setting `{name}` in {where}; {hint}")
            try:
                values[name] = msgspec.convert(value, kinds[name].type, strict=source != "environment")
            except msgspec.ValidationError as error:
                raise SetupError(f"setting `{name}` in {where}: {_why(name, error)}") from None
            sources[name] = where
    settings = Settings(**values)
    shown = [Shown(name, _shown(name, getattr(settings, name)), sources.get(name, "default")) for name in kinds]
    return settings, shown


def _why(name: str, error: Exception) -> str:
    return "not of the right type" if name in SECRET else str(error)


def _from_file(file: Path | None) -> tuple[str, dict[str, Any]]:
    path = file or Path("router.toml")
    if not path.exists():
        if file is not None:
            raise SetupError(f"the settings file {file} does not exist")
        return "file", {}
    try:
        return str(path), tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}") from None


def _from_environment(environ: Mapping[str, str], kinds: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        if variable.startswith(PREFIX) and not _belongs_to_others(variable, text):
            name = variable.removeprefix(PREFIX).lower()
            is_list = name in kinds and kinds[name].type == tuple[str, ...]
            found[name] = tuple(part.strip() for part in text.split(",") if part.strip()) if is_list else text
    return "environment", found


def _belongs_to_others(variable: str, text: str) -> bool:
    """Whether it is no setting: the command line's own, the tests', or what Kubernetes sets for a service `router`."""
    by_kubernetes = variable.startswith(("ROUTER_SERVICE_", "ROUTER_PORT_")) or text.startswith("tcp://")
    return variable in OTHER_VARIABLES or variable.startswith("ROUTER_TEST_") or by_kubernetes


def _shown(name: str, value: Any) -> str:
    if name == "jwt_key":
        return "(hidden)" if value and not value.startswith("@") else value
    if name == "broker":
        scheme, _, rest = value.partition("://")
        rest, query, _ = rest.partition("?")
        return f"{scheme}://{'(hidden)@' if '@' in rest else ''}{rest.rpartition('@')[2]}{query and '?(hidden)'}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
