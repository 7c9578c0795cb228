"""Where things are kept in Redis, and what travels beside an event."""

import msgspec
from msgspec import Struct

from router.envelope import Envelope

__all__ = ["PREFIX", "Header", "Names", "decode_header", "encode_header", "names_of", "plain_channels", "topic_of"]

PREFIX = "router:"


class Header(Struct, frozen=True, omit_defaults=True):
    """What travels beside an event."""

    at: float = 0.0
    id: str | None = None
    trace: str | None = None
    sender: str | None = None
    holding: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None


class Names(Struct, frozen=True):
    """The keys of one topic. The braces keep them on one node of a cluster."""

    base: str
    meta: str
    log: str
    loose: str
    channel: str


def names_of(topic: str) -> Names:
    base = f"{PREFIX}{{{topic}}}"
    return Names(base, f"{base}:meta", f"{base}:log", f"{base}:loose", f"{base}:live")


def plain_channels(topic: str) -> tuple[str, ...]:
    """Where backends publish to a topic that know nothing of us: for a project, the specification's channel."""
    return (topic,) if topic.startswith("project:") else ()


def topic_of(channel: str) -> str | None:
    """The topic that our own channel belongs to; None for any other channel."""
    if channel.startswith(_BEFORE) and channel.endswith(_AFTER):
        return channel[len(_BEFORE) : -len(_AFTER)]
    return None


_BEFORE, _AFTER = f"{PREFIX}{{", "}:live"


def encode_header(envelope: Envelope) -> bytes:
    audience = envelope.audience
    return _encoder.encode(
        Header(
            at=envelope.published_at,
            id=envelope.message_id,
            trace=envelope.traceparent,
            sender=None if envelope.sender is None else envelope.sender.user,
            holding=tuple(audience.holding),
            lacking=tuple(audience.lacking),
            without=tuple(audience.without),
            only=None if audience.only is None else tuple(audience.only),
        )
    )


_encoder = msgspec.json.Encoder()
decode_header = msgspec.json.Decoder(Header).decode
