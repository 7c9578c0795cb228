"""Where things are kept in Redis, and what travels beside an event."""

import msgspec
from msgspec import Struct

from router.envelope import Envelope

__all__ = ["PREFIX", "Header", "Names", "channels_of", "decode_header", "encode_header", "names_of"]

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
    channel: str


def names_of(topic: str) -> Names:
    base = f"{PREFIX}{{{topic}}}"
    return Names(base, f"{base}:meta", f"{base}:log", f"{base}:live")


def channels_of(topic: str) -> tuple[str, ...]:
    """Where a topic's messages arrive: our own channel, and for a project the specification's."""
    own = names_of(topic).channel
    return (own, topic) if topic.startswith("project:") else (own,)


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
