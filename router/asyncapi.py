"""The description of every message as an AsyncAPI 3.0 document, made from the plugins themselves."""

from inspect import getdoc
from typing import Any

import msgspec

from router import wire
from router.catalog import Catalog

__all__ = ["describe"]

_SERVER_FRAMES = (
    wire.Welcome, wire.Batch, wire.Resync, wire.Epoch, wire.TokenExpiring, wire.TokenRefreshed, wire.Error,
    wire.GoAway, wire.Ping,
)  # fmt: skip
_ADDED = (
    "To `router.v1` clients the router adds to events: `seq`, the number in the topic; `pos`, up to where the client "
    "then has everything, where that differs from `seq`; `topic` (`user` or `all`), absent for the project; "
    "`redelivered` on a critical event that was sent before; `torn` on a piece of a text whose beginning the client was "
    "not given."
)
_CLIENT_FRAMES = (wire.Ack, wire.Pong, wire.AuthRefresh)


def describe(catalog: Catalog) -> dict[str, Any]:
    """The document: one channel, what clients receive on it, and what they may send."""
    kinds: list[Any] = [*(found.plugin.event for found in catalog), *_SERVER_FRAMES, *_CLIENT_FRAMES]
    found_refs, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    messages: dict[str, Any] = {}
    for kind, ref in zip(kinds, found_refs, strict=True):
        tag = str(kind.__struct_config__.tag)
        messages[tag] = {"name": tag, "summary": (getdoc(kind) or tag).partition("\n")[0], "payload": ref}
    receive = [found.plugin.tag for found in catalog] + [str(f.__struct_config__.tag) for f in _SERVER_FRAMES]
    send = [found.plugin.tag for found in catalog if found.plugin.policy.send is not None]
    send += [str(f.__struct_config__.tag) for f in _CLIENT_FRAMES]
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Event Router", "version": "1", "description": _ADDED},
        "channels": {
            "project": {
                "address": "/ws/project/{project_uuid}",
                "parameters": {"project_uuid": {"description": "The project that is open."}},
                "messages": {tag: {"$ref": f"#/components/messages/{tag}"} for tag in messages},
            }
        },
        "operations": {
            "receive": _operation("send", receive),
            "send": _operation("receive", send),
        },
        "components": {"messages": messages, "schemas": components},
    }


def _operation(action: str, tags: list[str]) -> dict[str, Any]:
    """An operation as AsyncAPI sees it: from the server's side."""
    return {
        "action": action,
        "channel": {"$ref": "#/channels/project"},
        "messages": [{"$ref": f"#/channels/project/messages/{tag}"} for tag in tags],
    }
