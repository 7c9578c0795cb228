"""Spans that tell where a message went. One a message and station, never one a recipient."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from random import random
from re import compile as pattern
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags, Tracer, TracerProvider

__all__ = ["Span", "SpanKind", "Tracing", "current_traceparent", "valid_traceparent"]

_TRACEPARENT = pattern(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})\Z")
MESSAGING = {"messaging.system": "event_router"}
"""The semantic conventions for messaging are still in development; these are the names of version 1.45."""


def valid_traceparent(value: object) -> str | None:
    """`value` when it is a W3C traceparent, else None. OpenTelemetry's own parser raises TypeError for a number."""
    return value if isinstance(value, str) and _TRACEPARENT.match(value) else None


def current_traceparent() -> str | None:
    """The trace context that this code runs in, as it travels; None outside of a trace."""
    span = trace.get_current_span()
    return _traceparent(span) if span.get_span_context().is_valid else None


class Tracing:
    """Makes spans for the `ratio` of messages that are sampled; the others touch no OpenTelemetry at all.

    Even an unsampled span costs 2.4 to 4.6 microseconds (docs/decisions/0001), so the dice are thrown here. A
    message that comes with a trace context follows that context's decision.
    """

    def __init__(self, provider: TracerProvider | None = None, ratio: float = 1.0) -> None:
        self._tracer: Tracer | None = None if provider is None else provider.get_tracer("event-router")
        self._ratio = ratio

    def span(
        self, name: str, kind: SpanKind, parent: str | None = None, attributes: dict[str, Any] | None = None
    ) -> AbstractContextManager[tuple[Span | None, str | None]]:
        """Run a block in a span. Gives the span, or None when not sampled, and the trace context to hand on."""
        if self._tracer is None:
            return nullcontext((None, parent))
        return self._span(self._tracer, name, kind, parent, attributes)

    @contextmanager
    def _span(
        self, tracer: Tracer, name: str, kind: SpanKind, parent: str | None, attributes: dict[str, Any] | None
    ) -> Iterator[tuple[Span | None, str | None]]:
        context = _context(parent)
        sampled = context.trace_flags.sampled if context is not None else random() < self._ratio
        if not sampled:
            yield None, parent
            return
        within = None if context is None else trace.set_span_in_context(NonRecordingSpan(context))
        with tracer.start_as_current_span(
            name,
            context=within,
            kind=kind,
            attributes={**MESSAGING, **(attributes or {})},
            record_exception=False,  # an exception's text could quote what a message says
            set_status_on_exception=False,
        ) as span:
            yield span, _traceparent(span)


def _context(traceparent: str | None) -> SpanContext | None:
    found = None if traceparent is None else _TRACEPARENT.match(traceparent)
    if found is None:
        return None
    trace_id, span_id, flags = found.groups()
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))


def _traceparent(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
