"""Event Router: a real-time gateway. This is the public API: the eight nouns and the errors."""

from router.audience import Audience, Identity
from router.brokers.base import Broker
from router.envelope import Envelope
from router.errors import (
    BadMessage,
    CloseCode,
    Denied,
    Disconnect,
    PluginFailed,
    RateLimited,
    Refused,
    RouterError,
    SetupError,
    TooLarge,
    Unavailable,
)
from router.event import Append, Event, Lapse, Latest, Merge, Now, Policy, timestamp
from router.pipeline import Forward, Middleware
from router.plugin import Context, Plugin
from router.publisher import Publisher
from router.session import Session

__all__ = [
    "Append",
    "Audience",
    "BadMessage",
    "Broker",
    "CloseCode",
    "Context",
    "Denied",
    "Disconnect",
    "Envelope",
    "Event",
    "Forward",
    "Identity",
    "Lapse",
    "Latest",
    "Merge",
    "Middleware",
    "Now",
    "Plugin",
    "PluginFailed",
    "Policy",
    "Publisher",
    "RateLimited",
    "Refused",
    "RouterError",
    "Session",
    "SetupError",
    "TooLarge",
    "Unavailable",
    "timestamp",
]
