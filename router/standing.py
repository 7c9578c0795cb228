"""Where this node stands in its topics, and what those who listen are told when that breaks off."""

from collections.abc import Callable, Iterator
from typing import Protocol

from msgspec import Struct, field

from router import wire
from router.brokers.base import Position
from router.envelope import Envelope
from router.event import Append
from router.hub import Hub
from router.room import Views
from router.session import Bookmark, Session
from router.text import Texts, ends, marked, text_of

__all__ = ["Holding", "Standing", "Standings", "place_of", "resync"]

UNREAD_REACH = 500
"""Numbers that may pass while a client's position waits behind an event that this node cannot read."""

BROKEN = "continuity was lost on the way here"
UNKNOWN_TYPES = "events of a type that this node does not know were passed over"


class Holding(Protocol):
    """Whoever holds outbound events back, and can say which."""

    def held(self, topic: str) -> frozenset[int]: ...
    async def release(self, topic: str, has: Callable[[int], bool]) -> None: ...
    def forget(self, topic: str) -> None: ...


class Standing(Struct):
    """Where this node stands in one topic that somebody here listens to. Changed in the topic's turn only."""

    epoch: str
    seen: int
    """Everything up to here went through the outbound leg, or was passed over as unreadable."""
    listeners: int = 0
    version: int = 0
    """Goes up when what was told of a position before no longer holds."""
    unread: set[int] = set()
    """Numbers of which nobody here could be sent the event. They count as not delivered."""
    texts: Texts = field(default_factory=Texts)


class Standings:
    """The topics that somebody here listens to.

    No position that is told here passes an event that is held back, or that this node cannot read.
    """

    def __init__(self, hub: Hub, holding: Holding) -> None:
        self._hub = hub
        self._holding = holding
        self._by_topic: dict[str, Standing] = {}

    def __getitem__(self, topic: str) -> Standing:
        return self._by_topic[topic]

    def __contains__(self, topic: str) -> bool:
        return topic in self._by_topic

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_topic)

    def get(self, topic: str) -> Standing | None:
        return self._by_topic.get(topic)

    # -- who listens

    def listen(self, topic: str, position: Position) -> bool:
        """One more listens to `topic`, which stands at `position`. Returns whether nobody did before."""
        fresh = topic not in self._by_topic
        if fresh:
            self._by_topic[topic] = Standing(position.epoch, position.seq)
        self._by_topic[topic].listeners += 1
        return fresh

    def leave(self, topic: str, session: Session) -> bool:
        """One less. Returns whether it was the last: then nothing more is known of the topic here."""
        standing = self._by_topic[topic]
        standing.listeners -= 1
        standing.texts.forget(session.id)
        if standing.listeners:
            return False
        del self._by_topic[topic]
        self._hub.floors.pop(topic, None)
        return True

    # -- what happens to a topic, in its turn

    def note(self, envelope: Envelope) -> None:
        """`envelope` has arrived, and goes into the outbound leg now."""
        standing = self._by_topic.get(envelope.topic)
        if standing is not None:
            standing.texts.note(envelope)

    def passed(self, envelope: Envelope) -> None:
        """`envelope` went through the outbound leg: it is history for whoever joins from now on."""
        standing = self._by_topic.get(envelope.topic)
        if envelope.seq and standing is not None:
            standing.seen = max(standing.seen, envelope.seq)
            if standing.unread:
                self._bound_unread(envelope.topic, standing)

    async def unread(self, topic: str, seq: int) -> None:
        """There is an event that this node cannot read: no position told here passes it."""
        standing = self._by_topic.get(topic)
        if standing is not None and seq > standing.seen:
            await self._hub.flush(topic)  # what came before may still be told of without it
            standing.seen = seq
            self.pass_over(topic, {seq})

    async def restart(self, topic: str, position: Position) -> None:
        """The numbering of `topic` goes on from `position`, without what was between: tell everybody to reload."""
        await self._hub.flush(topic)
        self._holding.forget(topic)
        standing = self._by_topic.get(topic)
        if standing is not None:
            standing.epoch, standing.seen = position.epoch, position.seq
            self._begin_anew(topic, standing, BROKEN)

    async def move(self, topic: str, position: Position) -> None:
        """The numbers of `topic` go on under another epoch: whoever comes back is to name that one."""
        standing = self._by_topic.get(topic)
        if standing is not None:
            await self._hub.flush(topic)
            standing.epoch = position.epoch
            standing.version += 1
            self._hub.say_to_all(topic, wire.encode(wire.Epoch(position.epoch, wire.topic_label(topic))))

    def pass_over(self, topic: str, numbers: set[int]) -> None:
        """Hold positions back before `numbers`, whose events nobody here can be sent."""
        standing = self._by_topic[topic]
        standing.unread |= numbers
        self._hub.floors[topic] = min(standing.unread) - 1
        self._bound_unread(topic, standing)

    def _bound_unread(self, topic: str, standing: Standing) -> None:
        if standing.seen - min(standing.unread) > UNREAD_REACH:
            self._begin_anew(topic, standing, UNKNOWN_TYPES)

    def _begin_anew(self, topic: str, standing: Standing, reason: str) -> None:
        """Tell everybody who listens to `topic` to reload and to go on from where it stands."""
        standing.version += 1
        standing.unread.clear()
        self._hub.floors.pop(topic, None)
        bookmark = self.present(topic)
        for session in self._hub.restart(topic, bookmark):
            self.tell_resync(session, topic, bookmark, reason)

    # -- what somebody has

    def present(self, topic: str) -> Bookmark:
        """What somebody has who wants only what is new: all but what is held back at the moment."""
        return all_but(self._holding.held(topic), self._by_topic[topic].seen)

    def delivered(self, topic: str) -> Bookmark:
        """What somebody has who was told all that could be told here: also without what cannot be read."""
        standing = self._by_topic[topic]
        return all_but(self._holding.held(topic) | standing.unread, standing.seen)

    def tell_resync(
        self, session: Session, topic: str, bookmark: Bookmark, reason: str, *, replayed: bool = False
    ) -> None:
        """Tell `session` to reload and go on from `bookmark`. `replayed`: what history has of it follows."""
        standing = self._by_topic[topic]
        if not replayed:
            self.tear(session, topic)
        self._hub.say(session, wire.encode(resync(topic, standing.epoch, bookmark, reason)))

    def tear(self, session: Session, topic: str) -> None:
        """`session` is told to reload: unless it loads the texts so far, they have no beginning for it."""
        if not session.plain:  # a plain client is not told
            self._by_topic[topic].texts.tear(session.id)

    # -- texts without their beginning

    async def spare(self, envelope: Envelope) -> Envelope:
        """`envelope` without those who were not given the beginning of the text that it is a piece of.

        They are sent it here, marked. Plain clients, which load nothing, get none of it.
        """
        standing = self._by_topic.get(envelope.topic)
        if standing is None or not isinstance(envelope.policy.deliver, Append):
            return envelope
        lacking = standing.texts.follow(envelope)
        if not lacking:
            return envelope
        await self._hub.flush(envelope.topic)  # what came before it goes out before it
        piece = [marked(envelope)]
        views: Views = {}
        for session in (self._hub.session(id_) for id_ in lacking):
            if session is not None and not session.plain and self._hub.present(session, envelope.topic):
                self._hub.send(session, piece, self._hub.floors.get(envelope.topic), views)
                if envelope.seq and not self._hub.present(session, envelope.topic):  # that filled its buffer
                    before = session.bookmarks[envelope.topic]
                    session.bookmarks[envelope.topic] = Bookmark(before.pos, before.known | {envelope.seq})
        if ends(envelope):
            sessions = [found for id_ in lacking if (found := self._hub.session(id_)) is not None]
            away = {session.id for session in sessions if not self._hub.present(session, envelope.topic)}
            standing.texts.keep(text_of(envelope), away)
        return envelope.narrowed(without=lacking)


def all_but(held: frozenset[int] | set[int], seen: int) -> Bookmark:
    """What somebody has who has everything up to `seen` but what is `held`."""
    low = min((seq for seq in held if seq <= seen), default=0)
    if not low:
        return Bookmark(seen)
    return Bookmark(low - 1, frozenset(range(low, seen + 1)) - held)


def place_of(epoch: str, bookmark: Bookmark) -> wire.Place:
    """A position as it is told."""
    return wire.Place(epoch, bookmark.pos, tuple(sorted(bookmark.known)))


def resync(topic: str, epoch: str, bookmark: Bookmark, reason: str) -> wire.Resync:
    """The word to reload and to go on from `bookmark`."""
    place = place_of(epoch, bookmark)
    return wire.Resync(epoch=epoch, pos=place.pos, known=place.known, reason=reason, topic=wire.topic_label(topic))
