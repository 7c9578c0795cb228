"""Finding plugins, checking them, and living with broken ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router import presence, wire
from router.app import build_catalog
from router.catalog import Catalog, Found, discover
from router.errors import BadMessage, SetupError
from router.event import Append, Event, Latest, Now, Policy
from router.plugin import Plugin
from router.settings import Settings

GOOD = """
from router import Event, Latest, Plugin, Policy

class Cursor(Event, frozen=True, tag="cursor"):
    x: float

cursor = Plugin(Cursor, Policy(send="view", deliver=Latest()))
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes plugin files by name and returns their folder."""

    def files(**texts: str) -> Path:
        tmp_path.chmod(0o755)
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        return tmp_path

    return files


def found_in(folder: Path) -> tuple[list[str], list[str]]:
    """The types that are found in a folder, and what is said about those that are broken."""
    found, problems = discover(None, [folder])
    catalog = Catalog(found, problems, reserved=wire.CONTROL_TAGS)
    return [each.plugin.tag for each in catalog if each.source.startswith(str(folder))], list(
        map(str, catalog.problems)
    )


# -- finding


def test_the_plugins_of_the_specification_are_found_in_their_package():
    found, problems = discover("plugins")
    assert problems == []
    sources = {each.plugin.tag: each.source for each in found}
    assert sources["step_progress"] == "plugins.step"
    assert sources["chat_response_chunk"] == "plugins.chat"
    assert sources["project_modified"] == "plugins.project"
    assert sources["notification"] == "plugins.notification"


def test_a_file_in_a_folder_is_a_plugin_and_one_with_an_underscore_is_not(write):
    folder = write(cursor=GOOD, _draft=GOOD, note="text = 1")
    types, problems = found_in(folder)
    assert types == ["cursor"]
    assert problems == [f"plugin {folder}/note.py: has no Plugin value: write `name = Plugin(EventType, Policy(...))`"]


def test_files_of_the_same_name_in_two_folders_do_not_get_in_each_others_way(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir(mode=0o755)
        (tmp_path / name / "same.py").write_text(GOOD.replace("cursor", name).replace("Cursor", name.upper()))
    found, problems = discover(None, [tmp_path / "a", tmp_path / "b"])
    assert problems == []
    assert {each.plugin.tag for each in found} >= {"a", "b"}
    events = {each.plugin.tag: each.plugin.event for each in found}
    assert (events["a"].__name__, events["b"].__name__) == ("A", "B")


def test_annotations_that_are_text_are_understood(write):
    text = "from __future__ import annotations\n" + GOOD.replace("x: float", "x: float\n    others: list[Cursor] = []")
    assert found_in(write(cursor=text)) == (["cursor"], [])


def test_an_entry_point_may_name_a_module_or_a_plugin(monkeypatch):
    class Point:
        value = "somewhere.else"

        def __init__(self, name: str, load: Callable[[], Any]) -> None:
            self.name, self.load = name, load

    class Cursor(Event, frozen=True, tag="cursor"):
        x: float

    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'somewhere'")

    points = [Point("b", missing), Point("a", lambda: Plugin(Cursor))]
    monkeypatch.setattr("router.catalog.entry_points", lambda *, group: points if group == "router.plugins" else [])
    found, problems = discover(None)
    assert [(each.plugin.tag, each.source) for each in found] == [("cursor", "somewhere.else (entry point a)")]
    assert [str(problem) for problem in problems] == [
        "plugin somewhere.else (entry point b): could not be imported: ModuleNotFoundError: No module named 'somewhere'"
    ]


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SetupError, match=r"nowhere does not exist; correct `plugins` \(ROUTER_PLUGINS\)"):
        discover(None, [tmp_path / "nowhere"])


def test_a_folder_that_anybody_can_write_to_is_refused_before_its_code_runs(write):
    folder = write(evil="raise SystemExit('ran')")
    folder.chmod(0o777)
    with pytest.raises(SetupError, match=rf"{folder} can be written by anybody, and its code runs here: chmod o-w"):
        discover(None, [folder])
    folder.chmod(0o775)
    assert len(discover(None, [folder])[1]) == 1


# -- broken ones

EVENT = 'from router import *\nclass A(Event, frozen=True, tag="a"):\n    x: str = ""\n'

BROKEN = {
    "syntax error": ("x = (", "could not be imported: SyntaxError: '(' was never closed"),
    "raises": ("1 / 0", "could not be imported: ZeroDivisionError: division by zero"),
    "exits": ("raise SystemExit(3)", "could not be imported: SystemExit: 3"),
    "imports what is not there": ("import nowhere_to_be_found", "could not be imported: ModuleNotFoundError: "),
    "no event": ("from router import *\np = Plugin(int)", "its event is no subclass of router.Event"),
    "an instance": (f"{EVENT}p = Plugin(A())", "its event is no subclass of router.Event"),
    "a number as tag": (
        "from router import *\nclass A(Event, tag=5):\n    pass\np = Plugin(A)",
        'A has no text tag: write `class A(Event, frozen=True, tag="...")`',
    ),
    "a type of the protocol": (
        'from router import *\nclass A(Event, tag="ack"):\n    pass\np = Plugin(A)',
        "the type `ack` belongs to the protocol; take another",
    ),
    "a field of the router": (
        'from router import *\nclass A(Event, tag="a"):\n    seq: int = 0\np = Plugin(A)',
        "A has the field `seq`, which the router adds itself; rename it",
    ),
    "a field of an unknown type": (
        'from router import *\nclass A(Event, tag="a"):\n    x: "Nope"\np = Plugin(A)',
        "A cannot be read from JSON: name 'Nope' is not defined",
    ),
    "keyed by a field that is not there": (
        f"{EVENT}p = Plugin(A, Policy(deliver=Latest(by=('step',))))",
        "`deliver` of A names the field `step`, which A does not have",
    ),
    "appended to a field that is not there": (
        f"{EVENT}p = Plugin(A, Policy(deliver=Append(by=('x',), field='content')))",
        "`deliver` of A names the field `content`, which A does not have",
    ),
    "delivered every 0 seconds": (
        f"{EVENT}p = Plugin(A, Policy(deliver=Latest(every=0)))",
        "`deliver.every` of A must be more than 0 seconds",
    ),
    "delivered somehow": (
        f"{EVENT}p = Plugin(A, Policy(deliver='now'))",
        "`deliver` of A is 'now'; it is one of Now(), Latest(), Merge(), Append()",
    ),
    "a handler that never runs": (
        f"{EVENT}async def handle(event, context): ...\np = Plugin(A, Policy(), handle)",
        "A has a handler that never runs: `Policy(send=...)` must name the grant",
    ),
    "a handler that is not async": (
        f"{EVENT}def handle(event, context): ...\np = Plugin(A, Policy(send='view'), handle)",
        "the handler of A must be `async def handle(event, context)`",
    ),
}


@pytest.mark.parametrize(("text", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_plugin_is_told_with_its_file_and_the_others_live(write, text, reason):
    folder = write(broken=text, cursor=GOOD)
    types, problems = found_in(folder)
    assert types == ["cursor"]
    [problem] = problems
    assert problem.startswith(f"plugin {folder}/broken.py: {reason}")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"{EVENT}p = Plugin(A, Policy(deliver=Append(by=('x',), field='x', ends='done')))", id="ends"),
        pytest.param(
            'from router import *\nclass A(Event, frozen=True, tag="a"):\n    x: str = ""\n    n: dict = {}\n'
            "p = Plugin(A, Policy(deliver=Append(by=('x',), field='n')))",
            id="what cannot be joined",
        ),
        pytest.param(
            'from router import *\nclass A(Event, tag="a", tag_field="kind"):\n    pass\np = Plugin(A)', id="tag"
        ),
    ],
)
def test_these_broken_plugins_are_told_too(write, text):
    assert len(found_in(write(broken=text))[1]) == 1


def test_a_plugin_whose_policy_is_none_is_told_too(write):
    assert len(found_in(write(broken=f"{EVENT}p = Plugin(A, None)"))[1]) == 1


def test_by_default_broken_plugins_are_logged_and_left_out_and_in_strict_mode_they_stop_the_start(write, caplog):
    folder = write(broken="1 / 0", worse="x = (", cursor=GOOD)
    catalog = build_catalog(Settings(plugins=(str(folder),)))
    assert "cursor" in catalog
    assert "step_started" in catalog
    logged = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [line.split(":")[0] for line in logged] == [f"plugin {folder}/broken.py", f"plugin {folder}/worse.py"]
    with pytest.raises(SetupError) as found:
        build_catalog(Settings(plugins=(str(folder),), strict_plugins=True))
    assert "broken.py" in str(found.value)
    assert "worse.py" in str(found.value)


def test_two_plugins_of_one_type_stop_the_start_with_both_names(write):
    folder = write(one=GOOD, two=GOOD)
    with pytest.raises(SetupError) as found:
        build_catalog(Settings(plugins=(str(folder),)))
    assert str(found.value) == (
        f"two plugins have the type `cursor`: {folder}/one.py and {folder}/two.py; rename one of them"
    )
    (folder / "two.py").write_text(GOOD.replace('"cursor"', '"chat_message"'))
    with pytest.raises(SetupError, match=rf"`chat_message`: plugins\.chat and {folder}/two\.py; rename one of them"):
        build_catalog(Settings(plugins=(str(folder),)))


def test_nobody_can_take_the_place_of_the_routers_own_types(write):
    folder = write(joined=GOOD.replace('"cursor"', '"presence_joined"'))
    with pytest.raises(SetupError, match=r"`presence_joined`: router\.presence and "):
        build_catalog(Settings(plugins=(str(folder),)))


@pytest.mark.parametrize("more", ["again = cursor", "from plugins.chat import chat_message"])
def test_a_plugin_value_that_is_merely_imported_or_named_twice_is_one_plugin(write, more):
    catalog = build_catalog(Settings(plugins=(str(write(cursor=f"{GOOD}\n{more}\n")),)))
    assert "cursor" in catalog


# -- asking the catalog


class Said(Event, frozen=True, tag="said"):
    text: str


class Unheard(Event, frozen=True, tag="unheard"):
    text: str


@pytest.fixture
def catalog() -> Catalog:
    return Catalog([Found(Plugin(Said, Policy(deliver=Now())), "here")])


def test_a_type_is_found_by_its_tag_and_by_its_events(catalog):
    assert catalog.plugin("said").event is Said
    assert catalog.plugin_of(Said(text="x")).tag == "said"
    assert catalog.decoder("said").decode('{"type":"said","text":"x","more":1}') == Said(text="x")
    assert ("said" in catalog, "unheard" in catalog, len(catalog)) == (True, False, 1)
    assert [found.source for found in catalog] == ["here"]


def test_a_type_that_is_not_there_is_a_bad_message(catalog):
    with pytest.raises(BadMessage) as found:
        catalog.plugin("x" * 100)
    assert (found.value.code, found.value.message) == (
        "unknown_type",
        f"there is no message type `{'x' * 64}` - at `$.type`",
    )
    with pytest.raises(BadMessage, match="Unheard is no type of a loaded plugin; `router plugins` lists those"):
        catalog.plugin_of(Unheard(text="x"))


def test_the_routers_own_plugins_pass_their_own_checks():
    catalog = Catalog([Found(plugin, "router.presence") for plugin in presence.PLUGINS], reserved=wire.CONTROL_TAGS)
    assert (len(catalog), catalog.problems) == (4, [])


@pytest.mark.parametrize("deliver", [Latest(by=("text",)), Append(by=("text",), field="text", every=None)])
def test_a_policy_that_fits_its_event_passes(deliver):
    assert Catalog([Found(Plugin(Said, Policy(deliver=deliver)), "here")]).problems == []
