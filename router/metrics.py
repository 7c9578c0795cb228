"""What operators count. Five figures are the specification's; the others tell where time and messages go."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from router.envelope import Envelope

__all__ = ["Metrics"]

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DURATION = (1, 10, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600)


class Metrics:
    """Counters of one node. Labels are few and bounded: type, leg, outcome; never a project or a user."""

    content_type = "text/plain; version=0.0.4"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at = self.registry
        self.connections = Gauge("router_connections", "Active connections", registry=at)
        self.duration = Histogram(
            "router_connection_duration_seconds", "How long connections lasted", buckets=DURATION, registry=at
        )
        self.connected = Counter("router_connects", "Connections that were opened", registry=at)
        self.reconnected = Counter("router_reconnects", "Connections that resumed an earlier one", registry=at)
        self._messages = Counter(
            "router_messages", "Messages by type and what became of them", ["leg", "type", "outcome"], registry=at
        )
        self._errors = Counter("router_errors", "Everything that went wrong, by code", ["code"], registry=at)
        self.forwarded = Counter(
            "router_forwarded", "Messages of people handed to backends, by type", ["type"], registry=at
        )
        self.deliveries = Counter("router_deliveries", "Messages written to clients", registry=at)
        self.latency = Histogram(
            "router_publish_to_deliver_seconds", "From publish until written to clients", buckets=LATENCY, registry=at
        )
        self.unacknowledged = Counter(
            "router_unacknowledged", "Critical messages given up after all repeats", registry=at
        )
        self.slow = Counter("router_slow_clients", "Clients that fell behind", registry=at)
        self._children: dict[tuple[str, str, str], Counter] = {}

    def opened(self, *, recovering: bool) -> None:
        """Count a connection that was let in, and whether it says that it had been here before."""
        self.connections.inc()
        self.connected.inc()
        if recovering:
            self.reconnected.inc()

    def closed(self, seconds: float) -> None:
        """Count a connection's end and how long it was open."""
        self.connections.dec()
        self.duration.observe(seconds)

    def message(self, envelope: Envelope, outcome: str) -> None:
        """Count one message's outcome. A bound child costs a twentieth of an OpenTelemetry counter."""
        key = (envelope.leg, envelope.type, outcome)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._messages.labels(*key)
        child.inc()
        if outcome.startswith("refused:"):
            self.error(outcome.removeprefix("refused:"))
        elif outcome == "failed":
            self.error("failed")

    def error(self, code: str) -> None:
        """Count one error."""
        self._errors.labels(code).inc()

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
