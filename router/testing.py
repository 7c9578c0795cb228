"""For plugin authors: run a handler or a middleware without a server and look at what it did."""

from typing import NoReturn

from msgspec import Struct

from router.audience import Audience, Identity, project_topic
from router.envelope import Envelope, Leg
from router.errors import Refused
from router.event import Event
from router.plugin import Plugin

__all__ = ["Clock", "RecordingContext", "Sent", "envelope"]


class Clock:
    """A clock that stands still until it is told to move."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


class Sent(Struct, frozen=True):
    """Something a handler published, and to whom; `to` None is the project."""

    event: Event
    to: Audience | None = None


class RecordingContext:
    """Stands in for the context of a handler and records what it does.

    context = RecordingContext(user="ada", grants={"view", "chat"})
    await say(ChatMessage(role="user", content="hello"), context)
    assert context.published == [...]
    """

    def __init__(
        self, user: str = "ada", project: str = "p1", grants: frozenset[str] | set[str] = frozenset({"view"})
    ) -> None:
        self.sender = Identity(user, frozenset(grants))
        self.project = project
        self.session = "session-1"
        self.replies: list[Event] = []
        self.published: list[Sent] = []
        self.forwarded: list[Event | None] = []
        """What was handed to backends; None is the message as it came."""

    async def reply(self, event: Event) -> None:
        self.replies.append(event)

    async def publish(self, event: Event, *, to: Audience | None = None) -> None:
        self.published.append(Sent(event, to))

    async def forward(self, event: Event | None = None) -> None:
        self.forwarded.append(event)

    def refuse(self, message: str, *, code: str = "refused", retry_after: float | None = None) -> NoReturn:
        raise Refused(message, code=code, retry_after=retry_after, temporary=retry_after is not None)


def envelope(
    plugin: Plugin,
    event: Event,
    *,
    project: str = "p1",
    leg: Leg = "outbound",
    sender: Identity | None = None,
    seq: int = 0,
) -> Envelope:
    """An envelope as the router would make it for `event`."""
    return Envelope(
        event=event,
        policy=plugin.policy,
        audience=Audience(project_topic(project)),
        leg=leg,
        sender=sender,
        session=None if sender is None else "session-1",
        seq=seq,
        first=seq,
    )
