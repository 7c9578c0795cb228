"""Which message types there are: finds plugins, checks them, and reads messages by their tag."""

import importlib
import importlib.util
import inspect
import pkgutil
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import msgspec
from msgspec import Struct

from router.errors import BadMessage, SetupError
from router.event import RESERVED_FIELDS, Append, Delivery, Event, Latest, Merge, Now, Policy
from router.plugin import Plugin

__all__ = ["Catalog", "Found", "Problem", "discover"]

ENTRY_POINTS = "router.plugins"


class Found(Struct, frozen=True):
    """A plugin and the module that it was found in."""

    plugin: Plugin
    source: str


class Problem(Struct, frozen=True):
    """A plugin that could not be taken in, and why."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"plugin {self.source}: {self.reason}"


def discover(package: str | None = "plugins", folders: Sequence[Path] = ()) -> tuple[list[Found], list[Problem]]:
    """Every plugin of the package, of the entry-point group `router.plugins`, and of the folders, in that order.

    A module that cannot be imported is a problem with its reason; the others are found all the same.
    """
    found: list[Found] = []
    problems: list[Problem] = []
    known: set[int] = set()  # a value that another module merely imported is the same plugin
    for source, load in _modules(package, folders):
        try:
            loaded = load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin is foreign code: whatever it does, name it and go on
            problems.append(Problem(source, f"could not be imported: {type(error).__name__}: {error}"))
            continue
        plugins = (
            [loaded] if isinstance(loaded, Plugin) else [v for v in vars(loaded).values() if isinstance(v, Plugin)]
        )
        if not plugins and not source.endswith(".__init__"):
            problems.append(Problem(source, "has no Plugin value: write `name = Plugin(EventType, Policy(...))`"))
        for plugin in plugins:
            if id(plugin) not in known:
                known.add(id(plugin))
                found.append(Found(plugin, source))
    return found, problems


def _modules(package: str | None, folders: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    if package is not None:
        home = importlib.import_module(package)
        for info in sorted(pkgutil.iter_modules(home.__path__), key=lambda info: info.name):
            name = f"{package}.{info.name}"
            yield name, lambda name=name: importlib.import_module(name)
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        yield f"{point.value} (entry point {point.name})", point.load
    for folder in folders:
        if not folder.is_dir():
            what = "is a file: name its folder" if folder.exists() else "does not exist"
            raise SetupError(f"the plugins folder {folder} {what}; correct `plugins` (ROUTER_PLUGINS)")
        if folder.stat().st_mode & stat.S_IWOTH:
            raise SetupError(
                f"the plugins folder {folder} can be written by anybody, and its code runs here: chmod o-w"
            )
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("_"):
                if path.stat().st_mode & stat.S_IWOTH:
                    raise SetupError(f"the plugin {path} can be written by anybody, and its code runs here: chmod o-w")
                yield str(path), lambda path=path: _load_file(path)


def _load_file(path: Path) -> ModuleType:
    name = f"router_folder_plugins.{path.parent.name}_{abs(hash(path.resolve()))}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # msgspec resolves annotations through it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class Catalog:
    """The message types that this router knows, by tag.

    A broken plugin is left out and listed in `problems`. Two plugins with one tag are an error, because which of
    them wins would depend on the order of finding.
    """

    def __init__(
        self, found: Iterable[Found], problems: Iterable[Problem] = (), *, reserved: frozenset[str] = frozenset()
    ) -> None:
        self.problems = list(problems)
        self._found: dict[str, Found] = {}
        self._decoders: dict[str, msgspec.json.Decoder[Any]] = {}
        self._by_event: dict[type[Event], Plugin] = {}
        for entry in found:
            try:
                reason = _flaw(entry.plugin, reserved)
            except Exception as error:  # whatever a plugin puts into its policy, the others work
                reason = f"its policy cannot be understood: {type(error).__name__}: {error}"
            if reason is not None:
                self.problems.append(Problem(entry.source, reason))
                continue
            tag = entry.plugin.tag
            if tag in self._found:
                raise SetupError(
                    f"two plugins have the type `{tag}`: {self._found[tag].source} and {entry.source}; rename one of them"
                )
            self._found[tag] = entry
            self._decoders[tag] = msgspec.json.Decoder(entry.plugin.event)
            self._by_event[entry.plugin.event] = entry.plugin

    def __iter__(self) -> Iterator[Found]:
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, tag: object) -> bool:
        return tag in self._found

    def plugin(self, tag: str) -> Plugin:
        """The plugin of a type. Raises `BadMessage` for one that is not known."""
        try:
            return self._found[tag].plugin
        except KeyError:
            raise BadMessage(f"there is no message type `{tag[:64]}` - at `$.type`", code="unknown_type") from None

    def plugin_of(self, event: Event) -> Plugin:
        """The plugin that an event value belongs to. Raises `BadMessage` when its type is not in the catalog."""
        try:
            return self._by_event[type(event)]
        except KeyError:
            raise BadMessage(
                f"{type(event).__name__} is no type of a loaded plugin; `router plugins` lists those that are",
                code="unknown_type",
            ) from None

    def decoder(self, tag: str) -> "msgspec.json.Decoder[Any]":
        """Reads events of a known type."""
        return self._decoders[tag]


def _flaw(plugin: Plugin, reserved: frozenset[str]) -> str | None:
    """Why a plugin cannot be taken in; None when it can."""
    event = plugin.event
    if not isinstance(plugin.policy, Policy):
        return f"its policy is {type(plugin.policy).__name__}; write Plugin(EventType, Policy(...), handler)"
    if not (inspect.isclass(event) and issubclass(event, Event)):
        return "its event is no subclass of router.Event"
    tag = event.__struct_config__.tag
    # Without a tag msgspec takes the class's name, and a renamed class would be another message type.
    if not isinstance(tag, str) or not tag or tag == event.__name__:
        return f'{event.__name__} has no text tag: write `class {event.__name__}(Event, frozen=True, tag="...")`'
    if event.__struct_config__.tag_field != "type":
        return f"{event.__name__} has its tag in `{event.__struct_config__.tag_field}`; on the wire it is `type`"
    if tag in reserved:
        return f"the type `{tag}` belongs to the protocol; take another"
    try:
        msgspec.json.Decoder(event)
    except Exception as error:
        return f"{event.__name__} cannot be read from JSON: {error}"
    fields = set(event.__struct_fields__)
    if taken := sorted(fields & RESERVED_FIELDS):
        return f"{event.__name__} has the field `{taken[0]}`, which the router adds itself; rename it"
    return _policy_flaw(plugin, event.__name__, fields)


def _policy_flaw(plugin: Plugin, name: str, fields: set[str]) -> str | None:
    deliver: Delivery = plugin.policy.deliver
    if not isinstance(deliver, Now | Latest | Merge | Append):
        return f"`deliver` of {name} is {deliver!r}; it is one of Now(), Latest(), Merge(), Append()"
    wanted = set(deliver.by)
    if isinstance(deliver, Append):
        wanted |= {deliver.field, *filter(None, (deliver.ends, deliver.index))}
    if missing := sorted(wanted - fields):
        return f"`deliver` of {name} names the field `{missing[0]}`, which {name} does not have"
    if isinstance(deliver, Append):
        kind = next(f.type for f in msgspec.structs.fields(plugin.event) if f.name == deliver.field)
        if kind is not str and get_origin(kind) is not list:
            return f"`deliver` of {name} joins `{deliver.field}`, which is neither a text (str) nor a list"
    if deliver.every is not None and deliver.every <= 0:
        return f"`deliver.every` of {name} must be more than 0 seconds"
    if not isinstance(plugin.policy.cost, int | float) or plugin.policy.cost < 0:
        return f"`cost` of {name} must be a number, 0 or more"
    if not all(inspect.isclass(kind) and issubclass(kind, Event) for kind in plugin.policy.settles):
        return f"`settles` of {name} must be a tuple of Event types: (StepProgress,)"
    if plugin.handle is not None and plugin.policy.send is None:
        return f"{name} has a handler that never runs: `Policy(send=...)` must name the grant that lets clients send it"
    if plugin.handle is not None and not inspect.iscoroutinefunction(plugin.handle):
        return f"the handler of {name} must be `async def handle(event, context)`"
    if plugin.handle is not None:
        try:
            inspect.signature(plugin.handle).bind(None, None)
        except TypeError:
            return f"the handler of {name} must take two arguments: `async def handle(event, context)`"
    return None
