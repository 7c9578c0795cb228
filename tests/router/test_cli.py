"""The command `router`: what it prints, what it refuses and what it says about it."""

import asyncio
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from router import cli
from router.middleware.auth import Tokens
from router.server.serve import listen
from tests.node import KEY, make_token

PLUGIN = """
from router import Event, Latest, Plugin, Policy

class Cursor(Event, frozen=True, tag="cursor"):
    x: float

cursor = Plugin(Cursor, Policy(send="view", receive="chat", deliver=Latest(by=("x",), every=0.25)))
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs the command in this process, with no other settings than those given."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    for name in [name for name in os.environ if name.startswith("ROUTER_")]:
        monkeypatch.delenv(name)
    root = logging.getLogger()
    names = ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx")
    loggers = [root, *map(logging.getLogger, names)]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]

    def command(*arguments: str, **settings: str) -> Ran:
        for name, value in settings.items():
            monkeypatch.setenv(f"ROUTER_{name.upper()}", value)
        monkeypatch.setattr(sys, "argv", ["router", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ran(ended.value.code or 0, *capsys.readouterr())

    yield command
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


def refused(ran: Ran) -> str:
    """What was said in one sentence, without a traceback."""
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("router: ")
    assert ran.err.count("\n") == 1
    return ran.err.removeprefix("router: ").rstrip("\n")


# -- plugins


def test_plugins_are_listed_with_direction_grants_delivery_and_source(run, tmp_path):
    (tmp_path / "cursor.py").write_text(PLUGIN)
    ran = run("plugins", "--plugins", str(tmp_path))
    assert (ran.code, ran.err) == (0, "")
    lines = [re.split(r"\s{2,}", line.strip()) for line in ran.out.splitlines()]
    assert lines[0] == ["type", "direction", "send", "receive", "delivery", "source"]
    assert ["cursor", "both", "view", "chat", "Latest by x every 0.25 s", f"{tmp_path}/cursor.py"] in lines
    assert ["step_progress", "to clients", "-", "view", "Latest by step_id", "plugins.step"] in lines
    assert ["chat_message", "both", "chat", "view", "Now", "plugins.chat"] in lines


def test_plugins_are_listed_for_programs(run, tmp_path):
    (tmp_path / "cursor.py").write_text(PLUGIN)
    (tmp_path / "broken.py").write_text("1 / 0")
    ran = run("plugins", "--json", plugins=str(tmp_path))
    listed = json.loads(ran.out)
    assert {
        "type": "cursor",
        "direction": "both",
        "send": "view",
        "receive": "chat",
        "delivery": "Latest by x every 0.25 s",
        "source": f"{tmp_path}/cursor.py",
    } in listed["plugins"]
    assert listed["problems"] == [
        f"plugin {tmp_path}/broken.py: could not be imported: ZeroDivisionError: division by zero"
    ]


def test_a_broken_plugin_is_told_by_name_and_the_others_are_listed(run, tmp_path):
    (tmp_path / "cursor.py").write_text(PLUGIN)
    (tmp_path / "broken.py").write_text("1 / 0")
    for strict, code in (("false", 0), ("true", 1)):
        ran = run("plugins", plugins=str(tmp_path), strict_plugins=strict)
        assert ran.code == code
        assert "cursor" in ran.out
        assert "step_started" in ran.out
        assert f"broken: plugin {tmp_path}/broken.py: could not be imported: ZeroDivisionError" in ran.err


def test_a_type_that_two_plugins_have_is_told_with_both_files(run, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(PLUGIN)
    said = refused(run("plugins", "--plugins", str(tmp_path)))
    assert said == f"two plugins have the type `cursor`: {tmp_path}/one.py and {tmp_path}/two.py; rename one of them"


def test_a_plugin_folder_that_anybody_can_write_to_is_refused(run, tmp_path):
    tmp_path.chmod(0o777)
    said = refused(run("plugins", "--plugins", str(tmp_path)))
    assert said == f"the plugins folder {tmp_path} can be written by anybody, and its code runs here: chmod o-w"


# -- settings and tokens


def test_settings_are_shown_with_their_source_and_secrets_hidden(run, tmp_path):
    Path("router.toml").write_text(f'jwt_key = "{KEY}"\nlimit_user = 3\n')
    ran = run("settings", "--port", "9000", host="::1")
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["jwt_key", "(hidden)", "router.toml"] in lines
    assert ["limit_user", "3", "router.toml"] in lines
    assert ["host", "::1", "ROUTER_HOST"] in lines
    assert ["port", "9000", "argument"] in lines
    assert ["limit_project", "100", "default"] in lines
    assert KEY not in ran.out


def test_a_wrong_setting_is_told_in_one_sentence(run):
    assert refused(run("settings", prot="1")).startswith("unknown setting `prot` in ROUTER_PROT; ")


def test_another_settings_file_may_be_named(run):
    Path("other.toml").write_text("port = 7000")
    for ran in (run("settings", "--settings", "other.toml"), run("settings", settings="other.toml")):
        assert "7000" in ran.out
    assert refused(run("settings", "--settings", "nowhere.toml")) == "the settings file nowhere.toml does not exist"


def test_a_token_is_made_that_the_router_takes(run):
    ran = run("token", "ada", "p1", "--grant", "view", "--grant", "chat", "--lifetime", "120", jwt_key=KEY)
    claims = Tokens(KEY, clock=time.time).read(ran.out.strip())
    assert (claims.user, claims.grants("p1"), claims.grants("p2")) == ("ada", {"view", "chat"}, frozenset())
    assert 110 < claims.expires_at - time.time() <= 120
    everywhere = Tokens(KEY, clock=time.time).read(run("token", "ada", "*").out.strip())
    assert everywhere.grants("p2") == {"view", "chat", "edit", "publish"}


def test_without_a_secret_no_token_is_made(run):
    said = "`router token` signs with a secret: set ROUTER_JWT_KEY to the one that the router has (HS256)"
    assert refused(run("token", "ada", "p1")) == said
    assert refused(run("token", "ada", "p1", jwt_key="-----BEGIN PUBLIC KEY-----")) == said
    assert refused(run("token", "ada", "p1", jwt_key=KEY, jwt_algorithms="RS256")) == said


def test_a_token_is_signed_with_the_secret_in_the_file_that_the_router_reads_it_from(run):
    Path("key").write_text(f"{KEY}\n")
    ran = run("token", "ada", "p1", jwt_key="@key")
    assert Tokens("@key", clock=time.time).read(ran.out.strip()).user == "ada"


def test_a_token_without_any_algorithm_is_refused_in_one_sentence(run):
    refused(run("token", "ada", "p1", jwt_key=KEY, jwt_algorithms=","))


# -- what keeps the router from starting


def test_serve_without_a_key_says_how_to_make_one(run):
    said = refused(run("serve", "--port", "0"))
    assert said.startswith("no key to verify tokens with: set ROUTER_JWT_KEY")
    assert "openssl rand -hex 32" in said
    assert "router dev" in said


@pytest.mark.parametrize(
    ("arguments", "settings", "text"),
    [
        (("--workers", "2"), {}, "2 workers cannot share"),
        ((), {"broker": "kafka://host"}, "`broker` (ROUTER_BROKER) is kafka://"),
        ((), {"jwt_key": "short"}, "`jwt_key` (ROUTER_JWT_KEY) is shorter than 32 bytes"),
        ((), {"jwt_algorithms": "none"}, "`jwt_algorithms` (ROUTER_JWT_ALGORITHMS) names `none`"),
        ((), {"middleware": "auth,rate"}, "`middleware` leaves out `permission`: everybody could"),
        ((), {"middleware": "auth,permission,typo"}, "`middleware` names `typo`; it is one of auth, permission, rate"),
        ((), {"middleware": "auth,permission,nowhere:x"}, "`middleware` names `nowhere:x`, which cannot be imported"),
        ((), {"permissions": "json:nothing"}, "`permissions` names `json:nothing`, which cannot be imported"),
        ((), {"permissions": "sys:path"}, "`permissions` names `sys:path`, which cannot be called"),
        ((), {"audit": "/nonexistent/audit"}, "`audit` (ROUTER_AUDIT) is a file that cannot be written: "),
        ((), {"traces": "paper"}, "`traces` (ROUTER_TRACES) is `paper`; it is `otlp`, `console` or empty"),
        (("--plugins", "nowhere"), {}, "the plugins folder nowhere does not exist"),
        (("--port", "70000"), {}, "setting `port` in argument: Expected `int` <= 65535"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_serve_refuses_to_start_with_what_cannot_work(run, arguments, settings, text):
    assert text in refused(run("serve", "--port", "0", *arguments, **{"jwt_key": KEY, **settings}))


def test_serve_tells_of_a_port_that_is_taken(run):
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        said = refused(run("serve", "--port", str(port), jwt_key=KEY))
    assert said.startswith(f"cannot listen on 127.0.0.1:{port}: ")


def test_in_strict_mode_a_broken_plugin_stops_the_start(run, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    said = refused(run("serve", "--port", "0", jwt_key=KEY, plugins=str(tmp_path), strict_plugins="true"))
    assert said == f"plugin {tmp_path}/broken.py: could not be imported: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_dev_refuses_to_be_reached_from_elsewhere(run, host):
    said = refused(run("dev", "--port", "0", "--host", host))
    assert said == f"`router dev` hands tokens to everybody who asks, so it listens on 127.0.0.1, not {host}"
    assert refused(run("dev", "--port", "0", host=host)) == said


def test_dev_tells_when_there_are_not_enough_ports_for_its_nodes(run):
    said = refused(run("dev", "--port", "65535", "--nodes", "2"))
    assert said == "2 nodes need 2 ports from 65535 on, and the last there is is 65535"


def test_dev_tells_of_a_port_that_one_of_its_nodes_would_need(run):
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        said = refused(run("dev", "--port", str(port - 1), "--nodes", "2"))
    assert "cannot listen on 127.0.0.1:" in said


async def test_what_keeps_all_nodes_from_starting_is_told_once():
    async with process(
        "dev", "--nodes", "2", "--port", "0", broker="redis://127.0.0.1:1", permissions="sys:path"
    ) as dev:
        out, err = await dev.communicate()
    why, which = err.decode().splitlines()
    assert (dev.returncode, out) == (2, b"")
    assert why == "router: `permissions` names `sys:path`, which cannot be called"
    assert re.fullmatch(r"router: the node at http://127\.0\.0\.1:\d+ did not start", which)


def test_a_log_level_that_is_none_is_told(run):
    assert "log_level" in refused(run("serve", "--port", "0", jwt_key=KEY, log_level="loud"))


# -- publish and tail


def test_publish_tells_what_is_missing(run):
    token = ("--token", "x")
    assert "no token: give --token" in run("publish", "p1", "step_started").err
    assert "then a TYPE" in run("publish", "step_started", *token).err
    assert "`step_id` is not NAME=VALUE" in run("publish", "p1", "step_started", "step_id", *token).err


def test_a_type_without_fields_can_be_published_to_everybody(run):
    assert "Missing argument" not in run("publish", "--all", "bare", "--token", "x", "--url", "http://127.0.0.1:1").err


@pytest.mark.parametrize("command", [("publish", "p1", "step_started"), ("tail", "p1")])
def test_a_router_that_is_not_there_is_told(run, monkeypatch, command):
    monkeypatch.setattr("router.publisher.FIRST_PAUSE", 0.0)
    with listen("127.0.0.1", 0) as closing:
        port = closing.getsockname()[1]
    said = refused(run(*command, "--token", "x", "--url", f"http://127.0.0.1:{port}"))
    assert said.startswith(f"the router at http://127.0.0.1:{port} cannot be reached: ")


@pytest.mark.parametrize("command", [("publish", "p1", "step_started"), ("tail", "p1")])
def test_an_address_that_is_not_http_is_told(run, command):
    refused(run(*command, "--token", "x", "--url", "ftp://127.0.0.1"))


@asynccontextmanager
async def process(*arguments: str, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command in a process of its own, which is ended if it has not ended by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROUTER_")}
    environment |= {f"ROUTER_{name.upper()}": value for name, value in settings.items()}
    environment["PYTHONPATH"] = str(Path(cli.__file__).parents[1])  # from a folder without a router.toml
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router.cli", *arguments, env=environment, stdout=-1, stderr=-1, cwd=Path(__file__).parent
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def test_what_is_published_is_seen_by_tail(node, run):
    backend = {"url": node.url, "token": make_token("backend", "*", ("publish",))}
    async with process("tail", "p1", url=node.url, token=make_token()) as tail:
        lines: Any = tail.stdout
        assert json.loads(await lines.readline())["type"] == "welcome"
        event = ("p1", "step_progress", "step_id=1", "progress=0.5", "message=5 = five")
        assert await asyncio.to_thread(run, "publish", *event, **backend) == (0, "published, seq 1\n", "")
        while (got := json.loads(await lines.readline()))["type"] != "step_progress":
            pass
        assert got == {"type": "step_progress", "step_id": "1", "progress": 0.5, "message": "5 = five", "seq": 1}
        tail.send_signal(signal.SIGINT)
        _, err = await tail.communicate()
        assert (tail.returncode, err) == (0, b"")


async def test_publish_reaches_one_person_or_everybody_and_says_why_it_could_not(node, run):
    backend = {"url": node.url, "token": make_token("backend", "*", ("publish",))}
    note = ("notification", "level=info")
    async with node.client() as client:
        for whom, title in ((("--user", "ada"), "yours"), (("--all",), "all"), (("p1",), "here")):
            ran = await asyncio.to_thread(run, "publish", *whom, *note, f"title={title}", **backend)
            assert ran == (0, "published, seq 1\n", "")
            assert (await client.event("notification"))["title"] == title
        ran = await asyncio.to_thread(run, "publish", "p1", "nope", **backend)
        assert refused(ran) == "there is no message type `nope` - at `$.type`"
        ran = await asyncio.to_thread(run, "publish", "p1", *note, "title=no", token=make_token())
        assert refused(ran) == "this needs the grant `publish` on this project"
        ran = await asyncio.to_thread(run, "tail", "p1", token="garbage")
        assert "token invalid: it is no JWT" in refused(ran)


async def test_tail_can_begin_with_what_is_remembered(node):
    await node.publish({"type": "step_started", "step_id": "s", "timestamp": "t"})
    async with process("tail", "p1", "--since", "0", url=node.url, token=make_token()) as tail:
        lines: Any = tail.stdout
        assert json.loads(await lines.readline())["recovered"] is True
        assert json.loads(await lines.readline()) == {
            "type": "step_started",
            "step_id": "s",
            "timestamp": "t",
            "seq": 1,
        }


# -- serve, for real


async def until_closed(client: ClientConnection) -> AsyncIterator[str | bytes]:
    """Every message, however the connection is closed in the end."""
    with suppress(ConnectionClosed):
        while True:
            yield await client.recv()


async def test_serve_serves_logs_json_without_tokens_and_on_sigterm_sends_everybody_away_politely():
    token = make_token()
    async with process("serve", "--port", "0", jwt_key=KEY, drain="0.05") as server:
        lines: Any = server.stderr
        first = (await lines.readline()).decode()
        found = re.fullmatch(
            r"Event Router is at (http://127\.0\.0\.1:\d+)  \(clients: ws://.*/ws/project/<project>\)\n", first
        )
        assert found is not None
        async with httpx.AsyncClient(base_url=found[1]) as http:
            assert (await http.get("/healthz")).text == "ok\n"
            assert (await http.get("/readyz")).json()["ready"] is True
        url = f"{found[1].replace('http', 'ws')}/ws/project/p1?token={token}"
        protocols: Any = ["router.v1"]
        async with connect(url, subprotocols=protocols) as client:
            assert json.loads(await client.recv())["type"] == "welcome"
            server.terminate()
            seen = [json.loads(message)["type"] async for message in until_closed(client)]
            assert seen[-1] == "goaway"
            assert (client.close_code, client.close_reason) == (1012, "restarting")
        _, rest = await server.communicate()
        logged = [json.loads(line) for line in rest.decode().splitlines()]
    events = [entry["event"] for entry in logged]
    assert events.index("websocket_connected") < events.index("websocket_disconnected")
    assert logged[events.index("websocket_disconnected")]["code"] == 1012
    assert token not in rest.decode()
    assert server.returncode in (0, -signal.SIGTERM), "uvicorn passes the signal on once it is done"


async def test_dev_hands_out_a_token_that_works_as_its_text_says(dev_server):
    async with httpx.AsyncClient(base_url=dev_server) as browser:
        given = (await browser.get("/demo/token")).json()
    url = f"{dev_server.replace('http', 'ws')}/ws/project/{given['project']}?token={given['token']}"
    protocols: Any = ["router.v1"]
    async with connect(url, subprotocols=protocols, origin=dev_server) as client:
        assert json.loads(await client.recv())["type"] == "welcome"


def test_a_redis_that_is_not_there_is_told_in_one_sentence(run):
    said = refused(run("serve", "--port", "0", jwt_key=KEY, broker="redis://:secret@127.0.0.1:1"))
    assert said.startswith("`broker` (ROUTER_BROKER): the broker cannot be reached")
    assert "secret" not in said
