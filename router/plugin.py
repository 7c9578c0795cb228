"""One message type: what it says, how it is treated, and what happens when a person sends it."""

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, Protocol, TypeAlias

from msgspec import Struct

from router.audience import Audience, Identity
from router.event import Event, Policy

__all__ = ["Context", "Handler", "Plugin"]


class Context(Protocol):
    """What a handler may do about the message that it was given."""

    @property
    def sender(self) -> Identity:
        """Who sent it, and what they may do in this project."""
        ...

    @property
    def project(self) -> str:
        """The project that the sender has open."""
        ...

    @property
    def session(self) -> str:
        """The connection that it came from."""
        ...

    async def reply(self, event: Event) -> None:
        """Send `event` to this connection only. It is not numbered or kept."""
        ...

    async def publish(self, event: Event, *, to: Audience | None = None) -> None:
        """Publish `event` to the project, or to another audience."""
        ...

    async def forward(self, event: Event | None = None) -> None:
        """Hand the message, or `event` in its place, to the backends that consume its type.

        They get it at least once, also those that are away now. Raises `Unavailable` when it cannot be kept for them.
        """
        ...

    def refuse(self, message: str, *, code: str = "refused", retry_after: float | None = None) -> NoReturn:
        """Decline the message: its sender gets an `error` frame with this text. Raises `Refused`."""
        ...


Handler: TypeAlias = Callable[[Any, Context], Awaitable[None]]


class Plugin(Struct, frozen=True):
    """Event type + Policy + optional handler. A value in a module: importing it changes nothing.

    Without a handler, what a client sends is published to its project as it is.
    """

    event: type[Event]
    policy: Policy = Policy()
    handle: Handler | None = None

    @property
    def tag(self) -> str:
        """The `type` on the wire."""
        return str(self.event.__struct_config__.tag)
