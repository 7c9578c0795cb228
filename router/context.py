"""What a handler may do about the message that it was given: the real thing behind `plugin.Context`."""

from collections.abc import Awaitable, Callable
from typing import NoReturn

from router.audience import Audience
from router.envelope import Envelope
from router.errors import Refused
from router.event import Event

__all__ = ["HandlerContext"]


class HandlerContext:
    """One message's context; see `plugin.Context` for what each of its parts is for."""

    def __init__(
        self,
        envelope: Envelope,
        publish: Callable[..., Awaitable[object]],
        reply: Callable[[Envelope, Event], None],
        forward: Callable[[Envelope, Event], Awaitable[None]],
    ) -> None:
        assert envelope.sender is not None
        assert envelope.session is not None
        self._envelope = envelope
        self._publish = publish
        self._reply = reply
        self._forward = forward
        self.sender = envelope.sender
        self.session = envelope.session
        self.project = envelope.topic.removeprefix("project:")

    async def reply(self, event: Event) -> None:
        self._reply(self._envelope, event)

    async def publish(self, event: Event, *, to: Audience | None = None) -> None:
        trace = self._envelope.traceparent
        await self._publish(to or Audience(self._envelope.topic), event, traceparent=trace, sender=self.sender)

    async def forward(self, event: Event | None = None) -> None:
        await self._forward(self._envelope, self._envelope.event if event is None else event)

    def refuse(self, message: str, *, code: str = "refused", retry_after: float | None = None) -> NoReturn:
        raise Refused(message, code=code, retry_after=retry_after, temporary=retry_after is not None)
