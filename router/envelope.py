"""One message on its way."""

from typing import Any, Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from router.audience import Audience, Identity
from router.event import Event, Policy

__all__ = ["Envelope", "Leg"]

Leg: TypeAlias = Literal["inbound", "outbound"]


class Envelope(Struct, frozen=True, kw_only=True):
    """One message on its way: what it says, who said it, who shall get it, and where it stands in its topic.

    Frozen: a step that changes something makes a new one, so whoever held on to the old one sees what it saw.
    """

    event: Event
    policy: Policy
    audience: Audience
    leg: Leg = "outbound"
    sender: Identity | None = None
    """Who sent it; None for a backend."""
    session: str | None = None
    """Id of the session that sent it."""
    ref: str | None = None
    """The client's own mark on an inbound message, echoed when it is refused."""
    payload: bytes | None = None
    """The event's JSON as the publisher wrote it, kept so that it arrives unchanged. Gone once the event changes."""
    message_id: str | None = None
    """Same id, same message: it is published once however often it is tried."""
    seq: int = 0
    """Its number in its topic, given by the broker. 0: not numbered, not kept."""
    first: int = 0
    """The lowest number that went into it, where several events became one; else `seq`."""
    pos: int | None = None
    """With it, a client has everything up to this number. None: up to `seq`."""
    replay: bool = False
    """Sent to one session that catches up, not to its room."""
    published_at: float = 0.0
    """Seconds since the epoch when it was published, by the publisher's clock: for people to read, to decide nothing."""
    traceparent: str | None = None
    """W3C trace context of the message."""

    @property
    def topic(self) -> str:
        return self.audience.topic

    @property
    def type(self) -> str:
        tag = type(self.event).__struct_config__.tag
        return tag if isinstance(tag, str) else type(self.event).__name__

    @property
    def ack_id(self) -> str | None:
        """What a client acknowledges it by: the id that is in the event, whatever id it was published under."""
        return self.event.message_id

    @property
    def requires_ack(self) -> bool:
        return self.event.requires_ack or self.policy.ack

    def saying(self, event: Event) -> "Envelope":
        """The same message with another text."""
        return replace(self, event=event, payload=None)

    def narrowed(self, **tests: Any) -> "Envelope":
        """The same message to a part of its audience; see `Audience.narrowed`."""
        return replace(self, audience=self.audience.narrowed(**tests))
