"""What every publish goes through, in the router and in a backend: checked, sized, marked, traced, handed on."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

from router import wire
from router.audience import Audience, Identity
from router.catalog import Catalog
from router.envelope import Envelope
from router.errors import BadMessage, TooLarge
from router.event import Event, Policy
from router.tracing import Span, SpanKind, Tracing

__all__ = ["MAX_EVENT", "Dispatch"]

MAX_EVENT = 256 * 1024
"""Bytes of one event to clients, unless it is set."""


class Dispatch:
    """Makes envelopes of events. Whatever it gives out fits on the wire, has a known type, and an id where it needs one."""

    def __init__(
        self,
        catalog: Catalog,
        tracing: Tracing | None = None,
        *,
        max_event: int = MAX_EVENT,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`max_event` in bytes; `wall` tells the seconds since the epoch."""
        self.catalog = catalog
        self._tracing = tracing or Tracing()
        self._max_event = max_event
        self._wall = wall

    @contextmanager
    def sending(
        self,
        audience: Audience,
        event: Event,
        *,
        payload: bytes | None = None,
        message_id: str | None = None,
        traceparent: str | None = None,
        sender: Identity | None = None,
    ) -> "Iterator[tuple[Span | None, Envelope]]":
        """A block in which `event` is sent: gives its span, where it is traced, and the envelope for the broker.

        `payload`: its JSON, when it came as JSON and shall arrive as it came. Raises `BadMessage` for a type that no
        plugin has and for what is not JSON everywhere, and `TooLarge`.
        """
        plugin = self.catalog.plugin_of(event)
        if event.requires_ack or plugin.policy.ack:
            event, payload = wire.critical(event, payload, message_id or uuid4().hex)
        if payload is None:
            payload = wire.write(event)
        self.fits(payload)
        attributes = {"messaging.operation.type": "send"}
        with self._tracing.span(f"send {plugin.tag}", SpanKind.PRODUCER, traceparent, attributes) as (span, trace):
            envelope = Envelope(
                event=event,
                policy=plugin.policy,
                audience=audience,
                sender=sender,
                payload=payload,
                message_id=message_id or event.message_id,
                published_at=self._wall(),
                traceparent=trace,
            )
            yield span, envelope

    def fits(self, payload: bytes, *, spare: int = 0) -> None:
        """Raise `TooLarge` when an event, with `spare` bytes that it will be given, is bigger than may go out."""
        if len(payload) + spare > self._max_event:
            raise TooLarge(
                f"the event is {len(payload)} bytes and may be {self._max_event}: "
                "store the data and send a reference to it"
            )

    def read(self, data: bytes) -> tuple[Event, Policy]:
        """An event that was published as JSON, and its type's policy. Raises `BadMessage`."""
        head = wire.read_head(data)
        wire.refuse_reserved(head)
        plugin = self.catalog.plugin(head.type)
        event: Event = wire.read(self.catalog.decoder(head.type), data)
        return event, plugin.policy

    def read_foreign(self, data: bytes) -> tuple[Event, bytes]:
        """An event that a backend wrote as JSON, and its bytes ready to be published. Raises `BadMessage`."""
        event, _ = self.read(data)
        self.refuse_internal(event)
        return event, bytes(data).strip()

    def refuse_internal(self, event: Event) -> None:
        """Raise `BadMessage` for an event of a type that only the router itself publishes."""
        plugin = self.catalog.plugin_of(event)
        if plugin.policy.internal:
            raise BadMessage(f"`{plugin.tag}` is published by the router itself - at `$.type`")
