"""One connected client, as far as it can be known without its socket."""

import re

from msgspec import Struct
from msgspec.structs import replace

from router.audience import EVERYONE, Identity, project_topic, user_topic
from router.envelope import Envelope
from router.errors import CloseCode, Disconnect

__all__ = ["Bookmark", "Session", "Unacknowledged", "topics_of"]


class Unacknowledged(Struct):
    """A critical event on its way to one client, until that says `ack`."""

    envelope: Envelope
    due: float
    """When to send it again."""
    tries: int = 0


class Bookmark(Struct, frozen=True):
    """Up to where a client has everything of a topic, and which later numbers it has besides."""

    pos: int
    known: frozenset[int] = frozenset()
    claimed: bool = False
    """It is the client's own word, from an earlier connection whose acknowledgements may have been lost."""

    @property
    def last(self) -> int:
        """The highest number that it names."""
        return max(self.pos, *self.known) if self.known else self.pos

    def has(self, seq: int) -> bool:
        """Whether the client has this number."""
        return seq <= self.pos or seq in self.known


class Session:
    """One connected client: identity, grants, position. Holds no socket and reads no clock.

    `bookmarks` tells for each topic what was written to it. It is looked at only while the session is not in its
    rooms' fast set (joining, or too slow); in the fast set the room's own bookmark holds for all.
    """

    __slots__ = (
        "acknowledges",
        "bookmarks",
        "id",
        "identity",
        "plain",
        "project",
        "topics",
        "unacknowledged",
        "whole",
    )

    MAX_UNACKNOWLEDGED = 100
    """Critical events kept for one client. One that never acknowledges cannot fill the memory."""

    def __init__(self, id_: str, identity: Identity, project: str, *, plain: bool, topics: tuple[str, ...]) -> None:
        self.id = id_
        self.identity = identity
        self.project = project
        self.plain = plain
        self.topics = topics
        self.acknowledges = False  # it has said `ack`, so it knows what that is
        self.bookmarks: dict[str, Bookmark] = {}
        self.unacknowledged: dict[str, Unacknowledged] | None = None  # most sessions never need it
        self.whole: frozenset[str] = frozenset()
        """Topics of which it asked for all that there is, and has been given nothing yet."""

    @property
    def user(self) -> str:
        return self.identity.user

    @property
    def grants(self) -> frozenset[str]:
        return self.identity.grants

    def expect_ack(self, envelope: Envelope, due: float) -> Unacknowledged | None:
        """Remember a critical event that was just sent. Returns the oldest one when it had to be given up for it."""
        assert envelope.ack_id is not None
        if self.unacknowledged is None:
            self.unacknowledged = {}
        given_up = None
        if len(self.unacknowledged) >= self.MAX_UNACKNOWLEDGED and envelope.ack_id not in self.unacknowledged:
            given_up = self.unacknowledged.pop(next(iter(self.unacknowledged)))
        self.unacknowledged.setdefault(envelope.ack_id, Unacknowledged(envelope, due))
        return given_up

    def acknowledge(self, *, message_id: str | None = None, pos: int | None = None) -> list[Envelope]:
        """What is acknowledged now that was not before: one event by id, or the project's up to a position."""
        if not self.unacknowledged:
            return []
        if message_id is not None:
            found = self.unacknowledged.pop(message_id, None)
            return [] if found is None else [found.envelope]
        project = self.topics[0]
        done = [
            key
            for key, waiting in self.unacknowledged.items()
            if waiting.envelope.topic == project and pos is not None and waiting.envelope.seq <= pos
        ]
        return [self.unacknowledged.pop(key).envelope for key in done]

    def forget_numbers(self, topic: str) -> None:
        """The numbering of `topic` has begun anew: what waits for acknowledgement holds no position back any more."""
        for waiting in (self.unacknowledged or {}).values():
            if waiting.envelope.topic == topic:
                waiting.envelope = replace(waiting.envelope, seq=0, first=0, pos=None)

    def floor(self, topic: str) -> int | None:
        """The position that frames of `topic` may not pass because something before it is unacknowledged."""
        if not self.unacknowledged:
            return None
        firsts = [
            w.envelope.first - 1 for w in self.unacknowledged.values() if w.envelope.topic == topic and w.envelope.first
        ]
        return min(firsts, default=None)


_PROJECT = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~-]{1,128}\Z")


def topics_of(project: str, user: str) -> tuple[str, str, str]:
    """What a session listens to: its project, its user, everyone. Raises `Disconnect` 4404 for an impossible id."""
    if not _PROJECT.match(project):
        raise Disconnect(CloseCode.NO_SUCH_PROJECT, "a project id is 1 to 128 letters, digits, `.`, `_`, `~`, `-`")
    return project_topic(project), user_topic(user), EVERYONE
