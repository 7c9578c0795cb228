"""The documents say what is so: generated pages are fresh, reference pages complete, links lead somewhere, code runs.

`python -m tests.test_docs` writes the generated pages anew.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import jwt
import msgspec
import pytest
from prometheus_client import Metric
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import router
from router import asyncapi, http, hub, pacing, port, recovery, standing, stretch, testing, upkeep, wire
from router import text as texts
from router.backend import Backend
from router.brokers import continuity, layout, subscriber
from router.brokers.base import Bounds
from router.brokers.memory import MemoryBroker
from router.brokers.post import FORGET
from router.brokers.redis import RedisBroker
from router.brokers.script import Scripts
from router.catalog import Catalog, Found
from router.cli import cli
from router.errors import CloseCode, Refused
from router.event import RESERVED_FIELDS
from router.flow import Pace
from router.metrics import Metrics
from router.middleware.audit import Record
from router.plugin import Plugin
from router.server import serve
from router.settings import Settings, load
from tests.docs.blocks import DOCUMENTS, ENVIRONMENT, Block, blocks, check_command, commands
from tests.docs.generate import PAGES, ROOT, plugins, regenerate
from tests.docs.javascript import find_node
from tests.servers import find_server, run_server
from tests.servers.server import CHANNELS, COMMANDS, KEYS

REFERENCE = ROOT / "docs" / "reference"
SYBIL = Sybil([PythonCodeBlockParser()])
KEY = "a-secret-for-the-documents-that-is-long-enough"

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])


def every(language: str) -> pytest.MarkDecorator:
    """Parametrize with all blocks of a language, on whatever page."""
    found = [block for path in DOCUMENTS for block in blocks(path, language)]
    return pytest.mark.parametrize("block", found, ids=map(str, found))


# -- generated pages


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_pages_are_what_the_code_says(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path](), "run `python -m tests.test_docs`"


# -- complete reference


def missing(names: object, page: str) -> list[str]:
    """Those of the names that a reference page does not have as code."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    marked = set(re.findall(r"`([^`\n]+)`", text))
    return sorted(str(name) for name in names if str(name) not in marked)  # type: ignore[attr-defined]


def test_every_plugin_is_described() -> None:
    assert not missing([found.plugin.tag for found in plugins()], "events.md")


def test_every_setting_is_described() -> None:
    assert not missing(Settings.__struct_fields__, "settings.md")


def test_every_close_code_is_described() -> None:
    assert not missing([int(code) for code in CloseCode], "protocol.md")


def test_every_error_code_is_described() -> None:
    assert not missing(error_codes(), "protocol.md")


def error_codes() -> set[str]:
    """What `code` of an `error` frame may be: those of the error classes, and those given where one is raised."""
    found = {kind.code for kind in [Refused, *Refused.__subclasses__()]}
    for source in (ROOT / "router").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                found.add(node.value.value)
    return found


def test_every_frame_of_the_protocol_is_described() -> None:
    assert not missing(wire.CONTROL_TAGS, "protocol.md")
    frames = [kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    tags = {kind.__struct_config__.tag: kind for kind in frames if kind.__struct_config__.tag in wire.CONTROL_TAGS}
    for tag, kind in tags.items():
        assert not missing(set(kind.__struct_fields__) - {"requires_ack"}, "protocol.md"), tag


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of a page, without its head."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    table = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, f"{page} has no table below `{heading}`"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_the_table_of_frames_is_that_of_the_code() -> None:
    table = {
        name.strip("`"): set(re.findall(r"`(\w+)`", fields))
        for name, fields, _ in rows("reference/protocol.md", "## From the server")
    }
    assert table.pop("any event") == RESERVED_FIELDS
    kinds = [kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, wire.Frame)]
    assert table == {
        str(kind.__struct_config__.tag): set(kind.__struct_fields__) for kind in kinds if kind is not wire.Frame
    }


def test_the_description_for_programs_has_every_frame() -> None:
    described = set(asyncapi.describe(Catalog(plugins()))["components"]["messages"])
    assert described >= wire.CONTROL_TAGS


def test_every_page_that_names_what_the_router_adds_to_events_names_all_of_it() -> None:
    *others, last = sorted(RESERVED_FIELDS, key=["seq", "pos", "topic", "redelivered", "torn"].index)
    named = f"{', '.join(f'`{name}`' for name in others)} and `{last}`"
    for page in ("reference/events.md", "how-to/write-a-plugin.md"):
        assert named in (ROOT / "docs" / page).read_text(encoding="utf-8"), page


def test_the_table_of_reasons_for_a_resync_is_that_of_the_code() -> None:
    named = {**vars(recovery), **vars(standing)}
    reasons = {value for name, value in named.items() if name.isupper() and isinstance(value, str)}
    assert {reason.strip("`") for reason, _ in rows("reference/protocol.md", "### Reasons for `resync`")} == reasons


def test_every_key_and_field_of_a_topic_in_redis_is_described() -> None:
    topic = layout.names_of("<topic>")
    assert not missing([topic.meta, topic.log, topic.loose, topic.channel], "redis.md")
    publish = lua("publish")
    kept = re.search(r"'HMGET', meta, (.+?)\)", publish)
    entry = re.search(r"'XADD', stream, 'MAXLEN', most, number .. '-0', (.+?)\)", publish)
    assert kept
    assert entry
    assert not missing([*re.findall(r"'(\w+)'", kept[1]), *re.findall(r"'(\w+)'", entry[1])], "redis.md")


def lua(name: str) -> str:
    return (ROOT / "router" / "brokers" / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def default(of: Callable[..., object], name: str) -> Any:
    """What an argument is where nobody says otherwise."""
    return inspect.signature(of).parameters[name].default


LIVES = {
    "history of a topic (`history_events`)": f"{Settings().history_events:,} events",
    "history of a topic (`history_seconds`)": f"{Settings().history_seconds:g} s",
    "history of a topic, bytes, on the memory broker": f"{default(MemoryBroker, 'max_bytes') // 1024**2} MiB",
    "events without a number that are kept for a topic, for `history_seconds`": f"{hub.LOOSE}",
    "numbers for which a position waits behind an event that the node cannot read": f"{standing.UNREAD_REACH}",
    "a numbering is remembered after its last event, on Redis": f"{FORGET / 86400:g} days",
    "a numbering is remembered after its last event, on the memory broker, at least": (
        f"{default(MemoryBroker, 'forget') / 3600:g} h"
    ),
    "a numbering without an event is remembered, on Redis (`history_seconds`)": f"{Settings().history_seconds:g} s",
    "texts of a topic under way of which a node knows who lacks the beginning": f"{texts.OPEN:,}",
    "characters of a text that are joined in one event": f"{pacing.MAX_JOINED:,}",
    "a publish waits for a Redis that is away": f"{default(Scripts, 'patience'):g} s",
    "a `Backend`'s publish waits for a Redis that is away": f"{default(Backend, 'patience'):g} s",
    "whoever connects waits for what is still on its way to the node, each time": f"{continuity.PATIENCE:g} s",
    "how often it is looked whether a topic has come to rest": f"{recovery.TRIES}",
    "a node looks again whether the broker is back, for a client that was put aside": f"{recovery.RETRY:g} s",
    "silence of Redis after which a node does not know what it missed, should the epoch be another": (
        f"{subscriber.SILENCE:g} s"
    ),
    "all topics are compared with Redis": f"every {default(RedisBroker, 'check_every'):g} s",
    "a node goes on listening to a topic that nobody wants": f"{default(RedisBroker, 'linger'):g} s",
}


def test_the_table_of_figures_of_delivery_is_that_of_the_code() -> None:
    assert dict(rows("explanation/delivery.md", "## Figures")) == LIVES


def test_what_the_scripts_keep_of_events_without_a_number_is_what_nodes_keep() -> None:
    assert f"keep and ARGV[4] or {hub.LOOSE}\n" in lua("publish")


def metric_names() -> Iterator[str]:
    family: Metric
    for family in Metrics().registry.collect():
        yield f"{family.name}_total" if family.type == "counter" else family.name


def test_every_metric_is_described() -> None:
    assert not missing(metric_names(), "metrics.md")


def test_every_field_of_an_audit_record_is_described() -> None:
    assert not missing(Record.__struct_fields__, "audit.md")


def test_every_command_and_option_is_described() -> None:
    assert not missing([f"router {name}" for name in cli.commands], "cli.md")
    for name, command in cli.commands.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert not missing(options, "cli.md"), name


def test_every_middleware_is_described() -> None:
    names = [info.name for info in iter_modules(import_module("router.middleware").__path__)]
    assert sorted(names) == sorted(Settings().middleware)
    assert not missing(names, "middleware.md")


def test_every_public_name_is_described() -> None:
    assert not missing(router.__all__, "python.md")
    assert not missing(testing.__all__, "python.md")


def test_every_field_of_a_policy_and_an_envelope_is_described() -> None:
    for noun in (router.Policy, router.Envelope, router.Audience, router.Identity):
        assert not missing(noun.__struct_fields__, "python.md"), noun.__name__


def test_every_module_stands_on_a_floor() -> None:
    text = (ROOT / "docs" / "explanation" / "the-flow.md").read_text(encoding="utf-8").partition("## Floors")[2]
    for info in iter_modules(router.__path__):
        assert f"`{info.name}{'/' if info.ispkg else ''}`" in text, info.name


FIGURES = [
    ("reference/protocol.md", f"{Pace().bad_messages_a_minute} bad messages in a minute"),
    ("reference/protocol.md", f"{upkeep.WARN_BEFORE:g} to {upkeep.WARN_BEFORE + upkeep.WARN_SPREAD:g} s before"),
    ("reference/protocol.md", f"a list of at most {http.MAX_EVENTS:,}"),
    ("reference/protocol.md", f"a text of at most {wire.MAX_REF} characters"),
    ("reference/protocol.md", f"more than {wire.MAX_DEPTH} levels"),
    ("reference/protocol.md", f"| events without a number that are kept for a topic | {hub.LOOSE}, "),
    ("reference/protocol.md", f"joins: up to {hub.LOOSE} of each topic"),
    ("reference/protocol.md", f"over {standing.UNREAD_REACH} numbers ago"),
    ("reference/redis.md", f"after {standing.UNREAD_REACH} more numbers"),
    ("reference/redis.md", f"the last {hub.LOOSE} events without a number"),
    ("reference/redis.md", f"            {int(FORGET * 1000):_},"),
    ("explanation/delivery.md", f"After {standing.UNREAD_REACH} numbers the node waits no longer"),
    ("explanation/delivery.md", f"keeps the last {hub.LOOSE}"),
    ("explanation/delivery.md", f"more than {pacing.MAX_JOINED:,} characters"),
    ("explanation/slow-clients.md", f"up to {hub.LOOSE} are kept for a topic"),
    ("how-to/run-several-nodes.md", f"nothing of Redis for over {subscriber.SILENCE:g} s"),
    ("how-to/consume-what-people-send.md", f"the newest {Bounds().unread:,} messages are kept"),
    ("how-to/consume-what-people-send.md", f"behind by {Bounds().backlog:,}"),
    ("how-to/write-a-plugin.md", f"takes over {pacing.SLOW_MERGE * 1000:g} ms"),
    ("explanation/slow-clients.md", f"after each {hub.SLICE}"),
    ("explanation/slow-clients.md", f"high-water mark, {port.HIGH_WATER // 1024} KiB"),
    ("explanation/slow-clients.md", f"send buffer is set to {serve.SEND_BUFFER // 1024} KiB"),
    ("explanation/slow-clients.md", f"{stretch.PART_BYTES // 1024} KiB are written"),
]


@pytest.mark.parametrize(("page", "text"), FIGURES)
def test_figures_that_are_no_settings_are_those_of_the_code(page: str, text: str) -> None:
    assert text in (ROOT / "docs" / page).read_text(encoding="utf-8")


# -- every page


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_document
def test_every_page_can_be_found_from_the_readme(path: Path) -> None:
    """From the README or the documents' own front page, so that nobody needs to look into folders."""
    front = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/README.md"))
    assert path.name == "README.md" or f"{path.parent.name}/{path.name})" in front


@every_document
def test_no_page_names_a_machine(path: Path) -> None:
    """Nothing that only its authors have: folders of their machine, hosts that packages came from."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"/(?:work|root|home)/\S*|\S*(?:pypi|npmjs|index-url|artifactory)\S*", text, re.IGNORECASE)
    assert not found


def test_every_decision_has_its_three_parts() -> None:
    found = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [path.name[:4] for path in found] == [f"{number:04}" for number in range(1, len(found) + 1)]
    for path in found:
        titles = re.findall(r"^## (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert titles == ["Context", "Decision", "Consequence"], path.name


def test_the_redis_user_on_the_page_is_the_one_that_the_tests_let_the_router_be() -> None:
    text = (REFERENCE / "redis.md").read_text(encoding="utf-8")
    rule = " ".join([*KEYS, "resetchannels", *CHANNELS, *(f"+{command}" for command in COMMANDS)])
    assert rule in text


def test_every_dependency_is_justified() -> None:
    text = (ROOT / "docs" / "decisions" / "0001-dependencies.md").read_text(encoding="utf-8")
    for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]")[0].splitlines():
        if found := re.match(r'\s+"([A-Za-z][\w-]+)[^"]*[<>=]', line):
            assert f"`{found[1]}`" in text, found[1]


# -- code on pages


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A router in a process of its own, and the environment of somebody who may do everything there."""
    said = tmp_path_factory.mktemp("served") / "stderr"
    binary = find_server()
    redis = ExitStack()
    broker = {} if binary is None else {"ROUTER_BROKER": redis.enter_context(run_server(binary)).url}
    settings = {"ROUTER_JWT_KEY": KEY, "ROUTER_LOG_LEVEL": "WARNING", "ROUTER_DRAIN": "0", **broker}
    command = [sys.executable, "-m", "router.cli", "serve", "--port", "0"]
    with said.open("w") as output:
        process = subprocess.Popen(command, stderr=output, env={**ENVIRONMENT, **settings}, cwd=ROOT)
    try:
        deadline = time.monotonic() + 20
        while not (found := re.search(r"http://\S+", said.read_text())):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, "the router did not start"
            time.sleep(0.02)
        grants = {"*": ["view", "chat", "edit", "publish"]}
        now = int(time.time())
        token = jwt.encode({"sub": "backend", "iat": now, "exp": now + 3600, "projects": grants}, KEY)
        yield {"ROUTER_URL": found[0], "ROUTER_TOKEN": token, "ROUTER_JWT_KEY": KEY, **broker}
    finally:
        process.terminate()
        process.wait(15)
        redis.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: dict[str, str]) -> Path:
    """An empty working directory, and the environment that pages suppose."""
    monkeypatch.chdir(tmp_path)
    for name, value in served.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@every_document
def test_python_on_a_page_runs_from_top_to_bottom(path: Path, here: Path) -> None:
    document = SYBIL.parse(path)
    if "ROUTER_BROKER" in path.read_text(encoding="utf-8") and "ROUTER_BROKER" not in os.environ:
        pytest.skip("there is no redis-server here: this page is NOT tried")
    document.namespace["__name__"] = "page"
    for example in document.examples():
        example.evaluate()
    shown = [value for value in document.namespace.values() if isinstance(value, Plugin)]
    catalog = Catalog(Found(plugin, path.name) for plugin in shown)
    assert not catalog.problems


@every("toml")
def test_toml_on_a_page_is_a_settings_file(block: Block, tmp_path: Path) -> None:
    if block.text.startswith("[project"):
        tomllib.loads(block.text)  # for a reader's own pyproject.toml
        return
    file = tmp_path / "router.toml"
    file.write_text(block.text, encoding="utf-8")
    load(file, {})


@every("js")
def test_javascript_on_a_page_has_no_syntax_error(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "page.mjs"
    file.write_text(block.text, encoding="utf-8")
    subprocess.run([find_node(), "--check", file], check=True, timeout=30)


@every("json")
def test_json_on_a_page_is_json_and_events_are_events(block: Block) -> None:
    catalog = Catalog(plugins())
    own = set(re.findall(r'tag="(\w+)"', block.path.read_text(encoding="utf-8")))
    for text in re.split(r"\n(?=[{\[])", block.text.strip()):
        found = json.loads(text)
        if isinstance(found, dict) and "leg" in found:
            msgspec.convert(found, Record)
            continue
        kind = found.get("type") if isinstance(found, dict) else None
        for event in found["events"] if kind == "batch" else [found]:
            if isinstance(event, dict) and event.get("type") in catalog:
                catalog.decoder(event["type"]).decode(json.dumps(event))
            elif kind is not None:
                assert kind in wire.CONTROL_TAGS | own, kind


@every("sh")
def test_commands_on_a_page_exist(block: Block) -> None:
    for words in commands(block):
        check_command(words)


def runs(block: Block) -> bool:
    """Whether a shell block does nothing but publish and ask, so that a test may run it."""
    words = [" ".join(line[:2]) for line in commands(block)]
    is_tutorial = block.path.parent.name == "tutorial"  # tests/docs/test_tutorial.py does all of it
    return (
        not is_tutorial
        and bool(words)
        and all(word.startswith(("curl ", "router publish", "router token")) for word in words)
    )


@every("sh")
def test_commands_that_publish_are_accepted(block: Block, here: Path) -> None:
    if not runs(block):
        return
    (here / ".curlrc").write_text("fail-with-body\nsilent\n")
    settings = {name: value for name, value in os.environ.items() if name.startswith("ROUTER_")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        env={**ENVIRONMENT, **settings, "CURL_HOME": str(here)},
        cwd=here,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    regenerate()
