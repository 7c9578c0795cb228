"""The command `router`."""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from socket import socket
from typing import Any
from urllib.parse import quote

import click
import msgspec
from litestar import Litestar
from litestar.config.cors import CORSConfig
from rich.console import Console
from rich.table import Table

from router import app as application
from router import journal, settings
from router.catalog import discover
from router.dev import GRANTS, PROJECT, demo_routes, make_token, origins_of
from router.errors import RouterError, SetupError
from router.middleware.auth import Tokens, read_key
from router.publisher import Publisher, events_path
from router.server.serve import address, listen, serve, serve_workers
from router.supervisor import Node, run_redis, supervise

__all__ = ["main"]

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.group()
@click.version_option(package_name="event-router")
def cli() -> None:
    """Event Router: backends publish events about a project, everybody who has it open sees them at once."""


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command with settings has."""
    for option in (
        click.option(
            "--settings", "file", type=click.Path(path_type=Path), envvar="ROUTER_SETTINGS", help="A router.toml."
        ),
        click.option("--host", help="Address to listen on."),
        click.option("--port", type=int, help="Port to listen on; 0 takes a free one."),
        click.option("--plugins", multiple=True, help="A folder with plugin files; may be given several times."),
    ):
        command = option(command)
    return command


def _settings(file: Path | None, **arguments: Any) -> tuple[settings.Settings, list[settings.Shown]]:
    return settings.load(file, **{name: value for name, value in arguments.items() if value not in (None, ())})


@cli.command("serve")
@settings_options
@click.option("--workers", type=int, help="Processes; more than one needs a broker that they can share.")
def serve_command(file: Path | None, **arguments: Any) -> None:
    """Run the router."""
    chosen, _ = _settings(file, **arguments)
    journal.configure(chosen.log_level)
    app = application.create_app(chosen)
    asyncio.run(application.reach_broker(chosen))
    listener = listen(chosen.host, chosen.port)
    url = address(listener, chosen.host)
    if chosen.workers == 1:
        where = f"(clients: {url.replace('http', 'ws', 1)}/ws/project/<project>)"
        click.echo(f"Event Router is at {url}  {where}", err=True)
        _serve(chosen, app, listener)
        return
    click.echo(f"Event Router is at {url} with {chosen.workers} workers", err=True)
    make_app = partial(application.worker_app, chosen)
    with suppress(KeyboardInterrupt):
        serve_workers(make_app, chosen.workers, listener, max_message=chosen.limit_message, drain=chosen.drain)


def _serve(chosen: settings.Settings, app: Any, listener: socket) -> None:
    with suppress(KeyboardInterrupt):  # Ctrl-C is how one ends it, not an error
        serve(app, listener, max_message=chosen.limit_message, drain=chosen.drain)


@cli.command()
@settings_options
@click.option(
    "--nodes",
    "count",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="Processes, each at a port of its own, with a Redis or Valkey between them.",
)
def dev(file: Path | None, count: int, **arguments: Any) -> None:
    """Run the router with the demo page and a key made for this run. On this machine only."""
    chosen, shown = _settings(file, **arguments)
    if chosen.host not in LOOPBACK:
        raise SetupError(
            f"`router dev` hands tokens to everybody who asks, so it listens on 127.0.0.1, not {chosen.host}"
        )
    key = read_key(chosen.jwt_key) or token_hex(32)
    quiet: Any = "WARNING" if chosen.log_level == "INFO" else chosen.log_level
    chosen = msgspec.structs.replace(chosen, jwt_key=key, jwt_algorithms=("HS256",), drain=0.0, log_level=quiet)
    if count == 1:
        app = _dev_app(chosen, key)
        listener = listen(chosen.host, chosen.port)
        click.echo(_invitation([address(listener, chosen.host)], key))
        sys.stdout.flush()
        _serve(chosen, app, listener)
        return
    if chosen.port and chosen.port + count > 65536:
        raise SetupError(f"{count} nodes need {count} ports from {chosen.port} on, and the last there is is 65535")
    journal.configure(chosen.log_level)
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        ports = [chosen.port and chosen.port + index for index in range(count)]
        listeners = [stack.enter_context(listen(chosen.host, port)) for port in ports]
        nodes = [Node(chosen.host, listener) for listener in listeners]
        urls = [node.url for node in nodes]
        broker = next(row.value for row in shown if row.name == "broker")  # its password hidden
        if chosen.broker.startswith("memory:"):
            broker = stack.enter_context(run_redis())
            chosen = msgspec.structs.replace(chosen, broker=broker)

        def ready() -> None:
            click.echo(_invitation(urls, key, broker))
            sys.stdout.flush()

        supervise(nodes, partial(_dev_node, chosen, key, urls), ready)


def _dev_app(chosen: settings.Settings, key: str, nodes: Sequence[str] = ()) -> Litestar:
    """The application of one node of `router dev`; `nodes` are the URLs of all, when there are several."""
    logging.getLogger("router.plugin").setLevel(logging.DEBUG)  # tracebacks, for whoever writes one right now
    journal.configure(chosen.log_level)
    router = application.create_router(chosen, application.build_catalog(chosen))
    origins = origins_of(nodes)
    chosen = msgspec.structs.replace(chosen, allowed_origins=(*chosen.allowed_origins, *origins))
    cors = CORSConfig(allow_origins=origins) if origins else None
    return application.create_app(chosen, router=router, handlers=demo_routes(router, key, nodes), cors=cors)


def _dev_node(chosen: settings.Settings, key: str, nodes: Sequence[str], listener: socket) -> None:
    """All that a process does that is one node of several."""
    with _told():
        _serve(chosen, _dev_app(chosen, key, nodes), listener)


def _invitation(urls: Sequence[str], key: str, broker: str = "") -> str:
    """What `router dev` says: where it is and what to paste."""
    token = make_token(key, "backend", PROJECT)
    me = Path(sys.argv[0]).absolute()
    command = f"{me.parent.parent.name}/bin/router" if me.parent.parent.parent == Path.cwd() else "router"
    where = " and ".join(f"{url}/" for url in urls) + (broker and f", with {broker} between them")
    return (
        f"Event Router is at {where}\n\n"
        "Open it, and in another terminal publish to it:\n\n"
        f"  export ROUTER_URL={urls[0]} ROUTER_TOKEN={token}\n"
        f"  {command} publish {PROJECT} step_progress step_id=s1 progress=0.5\n"
        f"  {command} tail {PROJECT}\n\n"
        "Ctrl-C ends it."
    )


@cli.command("plugins")
@settings_options
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
def plugins_command(file: Path | None, as_json: bool, **arguments: Any) -> None:
    """List the message types: direction, grants, delivery, source."""
    chosen, _ = _settings(file, **arguments)
    catalog = application.build_catalog(msgspec.structs.replace(chosen, strict_plugins=False), quiet=True)
    rows = [
        {
            "type": found.plugin.tag,
            "direction": "both" if found.plugin.policy.send else "to clients",
            "send": found.plugin.policy.send or "-",
            "receive": found.plugin.policy.receive,
            "delivery": _delivery(found.plugin.policy.deliver),
            "source": found.source,
        }
        for found in catalog
    ]
    if as_json:
        click.echo(json.dumps({"plugins": rows, "problems": [str(problem) for problem in catalog.problems]}, indent=2))
    else:
        _table(["type", "direction", "send", "receive", "delivery", "source"], rows)
        for problem in catalog.problems:
            click.echo(f"broken: {problem}", err=True)
    if catalog.problems and chosen.strict_plugins:
        sys.exit(1)


def _delivery(deliver: Any) -> str:
    by = f" by {', '.join(deliver.by)}" if deliver.by else ""
    every = f" every {deliver.every:g} s" if deliver.every else ""
    return f"{type(deliver).__name__}{by}{every}"


@cli.command("settings")
@settings_options
def settings_command(file: Path | None, **arguments: Any) -> None:
    """Show the effective settings, secrets hidden, and where each came from."""
    _, shown = _settings(file, **arguments)
    _table(["name", "value", "source"], [msgspec.to_builtins(row) for row in shown])


def _table(columns: list[str], rows: list[dict[str, Any]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    # A pipe gets whole lines to grep in, not lines broken at 80 columns.
    Console(width=None if sys.stdout.isatty() else 200, soft_wrap=not sys.stdout.isatty()).print(table)


@cli.command()
@click.argument("user")
@click.argument("project")
@click.option("--grant", "grants", multiple=True, default=GRANTS, show_default=True, help="May be given several times.")
@click.option("--lifetime", default=3600.0, show_default=True, help="Seconds.")
@settings_options
def token(
    user: str, project: str, grants: tuple[str, ...], lifetime: float, file: Path | None, **arguments: Any
) -> None:
    """Make a token for development, signed with the secret in the settings. PROJECT `*` means all."""
    chosen, _ = _settings(file, **arguments)
    key = read_key(chosen.jwt_key)
    if not key or key.startswith("-----BEGIN") or "HS256" not in chosen.jwt_algorithms[:1]:
        raise SetupError(
            "`router token` signs with a secret: set ROUTER_JWT_KEY to the one that the router has (HS256)"
        )
    Tokens(key, chosen.jwt_algorithms, clock=time.time)  # tells what the router would say of the key
    click.echo(make_token(key, user, project, grants=grants, lifetime=lifetime))


def _checked_url(_context: Any, _option: Any, url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise SetupError(f"`{url}` is no address of a router; it begins with http:// or https://")
    return url.rstrip("/")


def _checked_token(_context: Any, _option: Any, token: str | None) -> str:
    if not token:
        raise click.UsageError("no token: give --token, or set ROUTER_TOKEN (`router token` makes one)")
    return token


def _detail(body: bytes | bytearray | None) -> str:
    """What a problem+json answer says to people."""
    try:
        return str(msgspec.json.decode(body or b"")["detail"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return ""


def connection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the router is and who asks."""
    for option in (
        click.option(
            "--url", envvar="ROUTER_URL", default="http://127.0.0.1:8000", show_default=True, callback=_checked_url
        ),
        click.option(
            "--token", envvar="ROUTER_TOKEN", help="A token, or the variable ROUTER_TOKEN.", callback=_checked_token
        ),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("words", nargs=-1, required=True, metavar="[PROJECT] TYPE [NAME=VALUE]...")
@click.option("--user", help="To all connections of one person, instead of a project.")
@click.option("--all", "everyone", is_flag=True, help="To everybody, instead of a project.")
@connection_options
def publish(words: tuple[str, ...], user: str | None, everyone: bool, url: str, token: str) -> None:
    """Publish one event: `router publish PROJECT step_progress step_id=s1 progress=0.5`.

    A VALUE that is JSON is taken as such, unless the field is a text; everything else is text. With --user or --all
    there is no PROJECT.
    """
    if everyone:
        path, rest = "/events", words
    elif user:
        path, rest = events_path("users", user), words
    else:
        path, rest = events_path("projects", words[0]), words[1:]
    if not rest or "=" in rest[0]:
        raise click.UsageError("name a PROJECT (or give --user or --all), then a TYPE, then the fields")
    kind, fields = rest[0], rest[1:]
    event: dict[str, Any] = {"type": kind}
    fields_known = _known_fields(kind)
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals:
            raise click.UsageError(f"`{field}` is not NAME=VALUE")
        given = _value(value)
        event[name] = value if fields_known.get(name) is str and not isinstance(given, str) else given
        if fields_known and name not in fields_known:
            click.echo(f"note: `{kind}` has no field `{name}`; it is sent all the same", err=True)

    async def send() -> list[int]:
        async with Publisher(url, token) as publisher:
            return await publisher.publish_json(path, msgspec.json.encode(event))

    click.echo(f"published, seq {asyncio.run(send())[0]}")


def _known_fields(kind: str) -> dict[str, Any]:
    """The fields of a type and what they are, where its plugin is installed here or in a folder of the settings."""
    try:
        folders = [Path(folder) for folder in settings.load()[0].plugins]
        found, _ = discover("plugins", folders)
    except SetupError:
        return {}
    for entry in found:
        if entry.plugin.tag == kind:
            fields = msgspec.structs.fields(entry.plugin.event)
            return {field.name: str if field.type in (str, str | None) else None for field in fields}
    return {}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@cli.command()
@click.argument("project")
@click.option("--since", help="`0` shows first what is remembered.")
@connection_options
def tail(project: str, since: str | None, url: str, token: str) -> None:
    """Show what everybody in PROJECT sees, one JSON object a line, until Ctrl-C."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.typing import Subprotocol

    query = f"?since={quote(since)}" if since else ""
    address = f"{url.replace('http', 'ws', 1)}/ws/project/{quote(project, safe='')}{query}"

    async def show() -> None:
        try:
            headers = {"Authorization": f"Bearer {token}"}
            async with connect(
                address, additional_headers=headers, subprotocols=[Subprotocol("router.v1")], compression=None
            ) as socket:
                async for text in socket:
                    message = json.loads(text)
                    for event in message["events"] if message["type"] == "batch" else [message]:
                        if event["type"] != "ping":
                            click.echo(json.dumps(event, ensure_ascii=False))
        except InvalidStatus as refused:
            raise SetupError(_detail(refused.response.body) or str(refused)) from None
        except ConnectionClosed as closed:
            raise SetupError(f"the router closed the connection: {closed}") from None
        except OSError as error:
            raise SetupError(f"the router at {url} cannot be reached: {error}") from None

    try:
        asyncio.run(show())
    except KeyboardInterrupt:
        return


@contextmanager
def _told() -> Iterator[None]:
    """What is the user's to correct is told in one sentence, and ends the process."""
    try:
        yield
    except RouterError as error:
        message = getattr(error, "message", None) or str(error)
        click.echo(f"router: {message}", err=True)
        sys.exit(2)


def main() -> None:
    """Run the command."""
    with _told():
        cli(standalone_mode=True)


if __name__ == "__main__":
    main()
