"""The wire: what frames look like as bytes. Nothing here knows sockets or sessions. See docs/reference/protocol.md."""

import json
import re
from collections.abc import Sequence
from struct import pack
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.structs import replace

from router.audience import EVERYONE
from router.envelope import Envelope
from router.errors import BadMessage, Refused
from router.event import RESERVED_FIELDS, Event

__all__ = [
    "CONTROL_TAGS",
    "Ack",
    "AuthRefresh",
    "Head",
    "Pong",
    "check",
    "encode",
    "numbered",
    "read_head",
    "text_frame",
]

SUBPROTOCOL = "router.v1"
MAX_REF = 64
MAX_DEPTH = 60
"""Levels of objects and lists in one message. Some readers stop at 64 (.NET), and a `batch` puts two around it."""
T = TypeVar("T")
E = TypeVar("E", bound=Event)

# -- what clients say to the router itself


class AuthRefresh(Event, frozen=True, tag="auth_refresh"):
    """A fresh token for the same user, sent before the old one expires."""

    token: str


class Ack(Struct, frozen=True, tag="ack", tag_field="type"):
    """Everything up to `pos`, or the one critical event `message_id`, has been dealt with."""

    message_id: str | None = None
    pos: int | None = None


class Pong(Struct, frozen=True, tag="pong", tag_field="type"):
    """The answer to `ping`. Any frame is a sign of life; this is the one that says no more."""


# -- what the router itself says to clients


class Frame(Struct, frozen=True, tag_field="type", omit_defaults=True, kw_only=True):
    """A frame that is not an event."""


class Place(Struct, frozen=True, omit_defaults=True):
    """A position in a topic's numbering. `known`: numbers beyond it that count as received, while one before them
    is held back.
    """

    epoch: str
    pos: int
    known: tuple[int, ...] = ()


class Welcome(Frame, frozen=True, kw_only=True, tag="welcome"):
    """The first frame: who you are here, and from where events follow."""

    session_id: str
    epoch: str
    pos: int
    known: tuple[int, ...] = ()
    user: Place
    all: Place
    recovered: bool
    expires_in: float | None
    ping_every: float


class Batch(Frame, frozen=True, kw_only=True, tag="batch"):
    """Several events of one topic. Each has its own `type`, `seq` and, where it differs, `pos`."""

    events: list[dict[str, Any]]
    pos: int | None = None
    topic: str | None = None


class Resync(Frame, frozen=True, kw_only=True, tag="resync"):
    """Continuity is lost: reload the state, then go on from `pos`."""

    epoch: str
    pos: int
    known: tuple[int, ...] = ()
    reason: str
    topic: str | None = None


class Epoch(Frame, frozen=True, tag="epoch"):
    """The numbers of a topic go on under another epoch. Nothing is missing: only what is told in `since` changes."""

    epoch: str
    topic: str | None = None


class TokenExpiring(Frame, frozen=True, tag="token_expiring"):
    expires_in: float


class TokenRefreshed(Frame, frozen=True, tag="token_refreshed"):
    expires_in: float | None


class Error(Frame, frozen=True, tag="error"):
    """One message was declined; the connection stays."""

    code: str
    message: str
    temporary: bool
    retry_after: float | None = None
    ref: str | None = None


class GoAway(Frame, frozen=True, tag="goaway"):
    retry_after: float
    reason: str


class Ping(Frame, frozen=True, tag="ping"):
    pass


CONTROL_TAGS = frozenset(
    {"welcome", "batch", "resync", "epoch", "token_expiring", "token_refreshed", "error", "goaway", "ping"}
    | {"pong", "ack", "auth_refresh"}
)
"""Types that belong to the protocol. No plugin may have one of these tags."""

_PLAIN = (b'{"type":"ping"', b'{"type":"error"')


def is_plain(frame: bytes) -> bool:
    """Whether a client that does not speak `router.v1` is told this frame, which is no event. It knows no other."""
    return frame.startswith(_PLAIN)


# -- reading


class Head(Struct, frozen=True):
    """What is common to every message: enough to route it. `reserved` names would collide with the router's own."""

    type: str
    ref: Any = None
    message_id: str | None = None
    requires_ack: bool = False
    traceparent: Any = None
    seq: Any | UnsetType = UNSET
    pos: Any | UnsetType = UNSET
    topic: Any | UnsetType = UNSET
    redelivered: Any | UnsetType = UNSET
    torn: Any | UnsetType = UNSET


_QUOTED = re.compile(r"Invalid enum value .*(?= - at `)|Invalid enum value .*", re.DOTALL)
_head = msgspec.json.Decoder(Head)
_control: dict[str, msgspec.json.Decoder[Any]] = {
    "ack": msgspec.json.Decoder(Ack),
    "pong": msgspec.json.Decoder(Pong),
    "auth_refresh": msgspec.json.Decoder(AuthRefresh),
}
_encoder = msgspec.json.Encoder()
_whole = msgspec.json.Decoder()
_fields = msgspec.json.Decoder(dict[str, Raw])
_pairs = json.JSONDecoder(object_pairs_hook=lambda pairs: [name for name, _ in pairs])
_ONCE = ("message_id", "requires_ack")  # of two types, the one that is not the event's own is refused as its tag
_BRACES = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(each for each in range(256) if each not in b"[]{}")


def read(decoder: "msgspec.json.Decoder[T]", data: bytes | str) -> T:
    """Decode, or raise `BadMessage` with msgspec's reason and path. Never echoes values."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        # Of a Literal or an enum msgspec quotes the value, which may be anything.
        raise BadMessage(_QUOTED.sub("Value is not one of those allowed", str(error))) from None
    except msgspec.DecodeError as error:
        raise BadMessage(f"not JSON: {error}") from None
    except UnicodeError:
        raise BadMessage("not UTF-8") from None
    except RecursionError:
        # msgspec raises it from about a thousand levels on.
        raise BadMessage("nested too deep") from None


def read_head(data: bytes | str) -> Head:
    """The head of one message, all of which any reader of JSON can read. Raises `BadMessage`."""
    check(data)
    return read(_head, data)


def check(data: bytes | str) -> None:
    """Raise `BadMessage` unless whatever reads JSON, a browser above all, can read all of `data`, and reads the same.

    Reading a type leaves out what the type does not have, and of that msgspec looks neither at the encoding nor at
    the size of numbers. One such byte ends the connection of everybody who is sent it. Making values of all of it
    (0.2 us for 120 bytes) is the cheapest way to have it looked at.
    """
    found = read(_whole, data)
    if isinstance(data, str):
        data = data.encode()
    # Each level has two ends, so most messages are too short to be deep.
    if len(data) > 2 * MAX_DEPTH and data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _refuse_deep(data)
    if type(found) is dict and ("message_id" in found or "requires_ack" in found):
        _refuse_twice(data)


def _refuse_deep(data: bytes) -> None:
    """Raise `BadMessage` for too many levels. Also those count that a second field of the same name replaces."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quote begins or ends a text
    brackets = b"".join(data.split(b'"')[::2]).translate(_BRACES, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")  # the innermost level of each branch
    if brackets:
        raise BadMessage("nested too deep")


def _refuse_twice(data: bytes) -> None:
    """Raise `BadMessage` for what is said twice of which we act on one and a reader may take the other."""
    names = _pairs.decode(data.decode())
    for name in _ONCE:
        if names.count(name) > 1:
            raise BadMessage(f"the field `{name}` is there twice - at `$.{name}`")


def mark_of(head: Head) -> str | None:
    """The mark that a client put on its message, `ref`. Raises `BadMessage`. Of backends' events it is just a field."""
    if head.ref is None:
        return None
    if not isinstance(head.ref, str):
        raise BadMessage(f"Expected `str | null`, got `{type(head.ref).__name__}` - at `$.ref`")
    if len(head.ref) > MAX_REF:
        raise BadMessage(f"`ref` is longer than {MAX_REF} characters - at `$.ref`")
    return head.ref


def read_control(head: Head, data: bytes | str) -> Ack | Pong | AuthRefresh:
    """One of the messages that clients send to the router itself. Raises `BadMessage`."""
    decoder = _control.get(head.type)
    if decoder is None:
        raise BadMessage(f"`{head.type}` is a frame that only the router sends - at `$.type`")
    message: Ack | Pong | AuthRefresh = read(decoder, data)
    return message


def refuse_reserved(head: Head) -> None:
    """Raise `BadMessage` when a publisher's event has a field that the router adds itself."""
    for name in sorted(RESERVED_FIELDS):
        if getattr(head, name) is not UNSET:
            raise BadMessage(f"the field `{name}` is set by the router; use another name - at `$.{name}`")


# -- writing


def encode(message: Any) -> bytes:
    """`message` as JSON."""
    return _encoder.encode(message)


def write(event: Event) -> bytes:
    """An event that was made here as JSON that everybody can read. Raises `BadMessage` where there is none."""
    try:
        payload = encode(event)
    except UnicodeError:
        raise BadMessage(f"{type(event).__name__} has a text with half of a surrogate pair") from None
    except (OverflowError, RecursionError) as error:
        raise BadMessage(f"{type(event).__name__} cannot be written as JSON: {error}") from None
    check(payload)
    return payload


def error(refusal: Refused, ref: str | None = None) -> bytes:
    """The `error` frame that tells a client of `refusal`."""
    return encode(
        Error(
            code=refusal.code,
            message=refusal.message,
            temporary=refusal.temporary,
            retry_after=None if refusal.retry_after is None else round(refusal.retry_after, 3),
            ref=ref,
        )
    )


def body(envelope: Envelope) -> bytes:
    """The event as JSON: the publisher's own bytes where there are any."""
    return envelope.payload or encode(envelope.event)


def topic_label(topic: str) -> str | None:
    """How frames name a topic: nothing for the project, `user`, or `all`."""
    if topic == EVERYONE:
        return EVERYONE
    return "user" if topic.startswith("user:") else None


def numbered(envelope: Envelope, *, floor: int | None = None, redelivered: bool = False) -> bytes:
    """The event for a `router.v1` client: the publisher's bytes with `seq`, `pos` and `topic` added at the end.

    `floor`: the client's own position does not pass it (a critical event is unacknowledged). Splicing
    costs a fraction of encoding again, and leaves every byte of the publisher's alone.
    """
    event = body(envelope)
    label = topic_label(envelope.topic)
    added = b""
    if envelope.seq:
        pos = position(envelope, floor)
        added = b',"seq":%d' % envelope.seq if pos == envelope.seq else b',"seq":%d,"pos":%d' % (envelope.seq, pos)
    if label is not None:
        added += b',"topic":"%b"' % label.encode()
    if redelivered or (envelope.replay and envelope.requires_ack):
        added += b',"redelivered":true'
    return event[:-1] + added + b"}" if added else event


def position(envelope: Envelope, floor: int | None = None) -> int:
    """Up to where a client has everything once it has this event."""
    pos = envelope.seq if envelope.pos is None else envelope.pos
    return pos if floor is None else min(pos, floor)


def batch(envelopes: Sequence[Envelope], floor: int | None = None) -> bytes:
    """Several events of one topic as one frame. Its `pos` is that of the last that has one."""
    pos = next((position(envelope, floor) for envelope in reversed(envelopes) if envelope.seq), None)
    label = topic_label(envelopes[-1].topic)
    events = b",".join(numbered(envelope, floor=floor) for envelope in envelopes)
    added = b"" if pos is None else b',"pos":%d' % pos
    if label is not None:
        added += b',"topic":"%b"' % label.encode()
    return b'{"type":"batch","events":[%b]%b}' % (events, added)


def text_frame(payload: bytes) -> bytes:
    """`payload` as one unmasked, unfragmented WebSocket text frame (RFC 6455 section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return b"\x81\x7e%b%b" % (pack("!H", size), payload)
    return b"\x81\x7f%b%b" % (pack("!Q", size), payload)


PING_FRAME = b"\x89\x00"
"""A WebSocket ping without payload. Every browser answers it by itself, also under a page that knows no `ping`."""


def critical(event: E, payload: bytes | None, message_id: str) -> tuple[E, bytes | None]:
    """The event, and its JSON if there is any, with the mark and the id that it is acknowledged by."""
    added = b"" if event.message_id else b',"message_id":' + encode(message_id)
    added += b"" if event.requires_ack else b',"requires_ack":true'
    if payload is not None and added and (b'"message_id"' in payload or b'"requires_ack"' in payload):
        # It names them without meaning it (null, false): set them in place, where adding would name them twice.
        # All other values stay the bytes that they are: not all can be made again (1e400, very long numbers).
        payload = encode(
            {**_fields.decode(payload), "message_id": event.message_id or message_id, "requires_ack": True}
        )
    elif payload is not None:
        payload = payload[:-1] + added + b"}"
    return replace(event, message_id=event.message_id or message_id, requires_ack=True), payload
