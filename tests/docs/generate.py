"""Writes the reference pages that are made from the code: events.md and settings.md."""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from msgspec import inspect as shape

from router import presence, settings
from router.catalog import Found, discover
from router.event import Append, Delivery, Event, Latest, Merge
from router.plugin import Plugin

__all__ = ["PAGES", "ROOT", "attribute_docs", "plugins", "regenerate"]

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
REMAKE = "<!-- Made from the code by `python -m tests.test_docs`; edit the docstrings there, not this page. -->"


def plugins() -> list[Found]:
    """The plugins that come with the router; none that happen to be installed beside it."""
    found, problems = discover("plugins")
    assert not problems
    own = [Found(plugin, "router.presence") for plugin in presence.PLUGINS]
    return [*(entry for entry in found if entry.source.startswith("plugins.")), *own]


# -- events


EVENTS = """\
# Events

{remake}

Every message type that comes with the router. `router plugins` lists those of a running configuration, yours included; \
`GET /asyncapi.json` describes them for programs.

Two optional fields belong to every event: `message_id` (text) and `requires_ack` (true or false); see \
[protocol](protocol.md#acknowledgement). To what it delivers, the router adds `seq`, `pos`, `topic`, `redelivered` and \
`torn`; no event may have a field of one of these names.

What a backend publishes as JSON arrives as it was written: fields that no plugin knows are kept, and defaults are not \
filled in. They are filled in where an event is made in Python: by a `Publisher` or by a handler. Of what people send, \
only fields that the plugin knows go on.

What the delivery kinds mean is told in [delivery](../explanation/delivery.md).
"""


def events() -> str:
    """The page of all message types."""
    overview = table(["type", "who may send it", "delivery", "module"], map(_overview, plugins()))
    parts = [EVENTS.format(remake=REMAKE).strip(), overview]
    for entry in plugins():
        parts += _event(entry.plugin)
    return "\n\n".join(parts) + "\n"


def _overview(entry: Found) -> list[str]:
    plugin = entry.plugin
    return [f"[`{plugin.tag}`](#{plugin.tag})", _sender(plugin), _kind_of(plugin.policy.deliver), f"`{entry.source}`"]


def _sender(plugin: Plugin) -> str:
    if plugin.policy.internal:
        return "the router itself" if plugin.policy.send is None else f"people with `{plugin.policy.send}`"
    return "backends" if plugin.policy.send is None else f"backends; people with `{plugin.policy.send}`"


def _event(plugin: Plugin) -> Iterator[str]:
    yield f"## `{plugin.tag}`"
    yield inspect.getdoc(plugin.event) or ""
    fields = [field for field in shape.type_info(plugin.event).fields if field.name not in Event.__struct_fields__]
    yield table(["field", "type", "default"], ([f"`{f.name}`", _type(f.type), _default(f)] for f in fields))
    policy = plugin.policy
    told = [
        f"Sent by: {_sender(plugin)}{'' if plugin.handle is None else ', through a handler'}.",
        f"Received by: holders of `{policy.receive}`{'' if policy.plain else ' that speak `router.v1`'}.",
        f"Delivery: {_delivery(policy.deliver)}",
    ]
    if policy.settles:
        told.append(
            f"Settles: {', '.join(f'`{kind.__struct_config__.tag}`' for kind in policy.settles)} of the same key."
        )
    told.append("History: numbered and kept." if policy.keep else "History: neither numbered nor kept.")
    if policy.lapse is not None:
        closing = get_type_hints(policy.lapse.close)["return"].__struct_config__.tag
        told.append(f"Lapse: {policy.lapse.after:g} s without another event of the same key, `{closing}` is published.")
    if policy.ack:
        told.append("Acknowledgement: always required.")
    if policy.send is not None and policy.cost != 1:
        told.append(f"Cost: {policy.cost:g} of the sender's messages a second.")
    if policy.debounce:
        told.append(f"Debounce: of what one client sends within {policy.debounce:g} s only the newest goes on.")
    yield "\n".join(f"- {line}" for line in told)


def _kind_of(deliver: Delivery) -> str:
    return type(deliver).__name__ + (f" by {', '.join(f'`{name}`' for name in deliver.by)}" if deliver.by else "")


def _delivery(deliver: Delivery) -> str:
    window = "the room's window" if deliver.every is None else f"{deliver.every:g} s"
    what = {
        Latest: f"only the newest of each key within {window}.",
        Merge: f"those of a key within {window} become one.",
        Append: f"pieces of a key within {window} are joined in `{getattr(deliver, 'field', '')}`"
        + (f"; the piece with `{deliver.ends}` goes at once" if isinstance(deliver, Append) and deliver.ends else "")
        + (f"; `{deliver.index}` 0 is a beginning." if isinstance(deliver, Append) and deliver.index else "."),
    }
    return f"{_kind_of(deliver)}: {what.get(type(deliver), 'at once, never merged.')}"


def _type(kind: Any) -> str:
    """A msgspec type in the words of JSON."""
    match kind:
        case shape.StrType():
            limit = "" if kind.max_length is None else f", at most {kind.max_length:,} characters"
            return f"text{limit}"
        case shape.IntType() | shape.FloatType():
            name = "whole number" if isinstance(kind, shape.IntType) else "number"
            if kind.ge is not None and kind.le is not None:
                return f"{name}, {kind.ge:g} to {kind.le:g}"
            low = f", at least {kind.ge:g}" if kind.ge is not None else ""
            return name + (f", more than {kind.gt:g}" if kind.gt is not None else low)
        case shape.BoolType():
            return "true or false"
        case shape.LiteralType():
            return " or ".join(f"`{value}`" for value in kind.values)
        case shape.NoneType():
            return "null"
        case shape.ListType() | shape.VarTupleType():
            return f"list of {_type(kind.item_type)}"
        case shape.DictType():
            return f"object, its values: {_type(kind.value_type)}"
        case shape.UnionType():
            return " or ".join(_type(part) for part in kind.types if not isinstance(part, shape.NoneType))
        case shape.AnyType():
            return "anything"
    raise NotImplementedError(f"say in {__file__} how {kind} is written for people")


def _default(field: Any) -> str:
    if field.required:
        return "required"
    if field.default_factory is not msgspec.NODEFAULT:
        return "now" if field.default_factory.__name__ == "timestamp" else "empty"
    return {None: "none", "": "empty"}.get(field.default, f"`{_value(field.default)}`")


# -- settings


def setting_rows() -> Iterator[list[str]]:
    docs = attribute_docs(settings.Settings)
    for field in shape.type_info(settings.Settings).fields:
        default = "" if field.default in ("", ()) else f"`{_value(field.default)}`"
        yield [f"`{field.name}`", f"`ROUTER_{field.name.upper()}`", _type(field.type), default, docs[field.name]]


SETTINGS = """\
# Settings

{remake}

Three sources, later ones win: a TOML file (`router.toml` in the working directory, or the one that `--settings` or \
`ROUTER_SETTINGS` names), the environment, and the options of the command. In the environment a list is written with \
commas. Times are seconds, sizes are bytes. An unknown name, in the file or as a `ROUTER_` variable, stops the start.

`router settings` shows the effective values, secrets hidden, and where each came from.

```toml
# router.toml
jwt_key = "@/run/secrets/router-key"
allowed_origins = ["https://app.example.com"]
audit = "/var/log/router/audit.jsonl"
```

{table}

Three more variables are read by the command line only: `ROUTER_SETTINGS` (the file), `ROUTER_URL` and `ROUTER_TOKEN` \
(for `router publish` and `router tail`).
"""


def setting_page() -> str:
    """The page of all settings."""
    head = ["name", "variable", "type", "default", "meaning"]
    return SETTINGS.format(remake=REMAKE, table=table(head, setting_rows()))


def attribute_docs(kind: type) -> dict[str, str]:
    """The strings under the fields of a class, which Python itself forgets."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_doc = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            assert is_doc, f"{kind.__name__}.{field.target.id} has no string under it that tells what it is"
            found[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[union-attr]
    return found


# -- both


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(head: list[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES: dict[Path, Callable[[], str]] = {
    REFERENCE / "events.md": events,
    REFERENCE / "settings.md": setting_page,
}


def regenerate() -> None:
    """Write the pages anew."""
    for path, make in PAGES.items():
        path.write_text(make(), encoding="utf-8")
