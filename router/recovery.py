"""Brings a session to where its topics stand: when it connects, when it comes back, when it fell behind."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from router import wire
from router.brokers.base import Broker, Position
from router.envelope import Envelope
from router.errors import Disconnect, Refused, Unavailable
from router.hub import Hub
from router.lane import Lanes
from router.lapse import Lapses
from router.pacing import Fault, conflate
from router.room import Port, Views
from router.session import Bookmark, Session

__all__ = ["Holding", "Recovery", "Since"]

Since: TypeAlias = Mapping[str, tuple[str, Bookmark]]
"""For each topic that a client resumes: the epoch it knows and what it has. Epoch "" asks for all there is."""

CATCH_UP_BYTES = 256 * 1024
"""What is written to a client that catches up before looking whether it reads."""


RETRY = 1.0
"""Seconds after which it is looked again whether the broker is back."""
KEPT_STRETCHES = 8
"""Stretches kept for others who missed the same: a room's clients come back together after a restart."""


class Holding(Protocol):
    """Whoever holds outbound events back, and can say which."""

    def holds(self, envelope: Envelope) -> bool: ...
    def held_since(self, topic: str) -> int | None: ...
    def forget(self, topic: str) -> None: ...


class Recovery:
    """Catching up is the same code for everybody: the missed stretch of history, merged, through the same pipeline.

    A session joins a room in the topic's own turn, so nothing is delivered in between: what is numbered up to `seen`
    is history, what comes after arrives live, what is held back comes with the room's next flush.
    """

    def __init__(
        self,
        hub: Hub,
        broker: Broker,
        lanes: Lanes,
        holding: Holding,
        outbound: Callable[[Envelope], Awaitable[None]],
        fault: Fault,
        lapses: Lapses,
    ) -> None:
        self._lapses = lapses
        self._hub = hub
        self._broker = broker
        self._lanes = lanes
        self._holding = holding
        self._outbound = outbound
        self._fault = fault
        self._seen: dict[str, int] = {}
        self._listeners: dict[str, int] = {}
        self._stretches: dict[tuple[str, Bookmark, int, int | None], _Stretch] = {}

    def passed(self, envelope: Envelope) -> None:
        """`envelope` went through the outbound leg: it is history for whoever joins from now on."""
        if envelope.seq and envelope.topic in self._seen:
            self._seen[envelope.topic] = envelope.seq
            self._stretches.clear()  # the next one to come missed more

    async def open(self, session: Session, since: Since | None, ping_every: float, expires_in: float | None) -> bool:
        """See `Router.open`."""
        places: list[wire.Place] = []
        lost: list[tuple[str, wire.Place, str]] = []
        recovered = False
        for topic in session.topics:
            position = await self._listen(topic)
            asked = None if since is None else since.get(topic)
            session.bookmarks[topic] = Bookmark(position.seq)  # `close` undoes what this says was begun
            session.bookmarks[topic], reason = await self._bookmark(topic, position, asked)
            places.append(_place(position.epoch, session.bookmarks[topic]))
            if reason is not None:
                lost.append((topic, places[-1], reason))
            elif asked is not None and topic == session.topics[0]:
                recovered = True
        if not session.plain:
            self._hub.say(
                session,
                wire.encode(
                    wire.Welcome(
                        session_id=session.id,
                        epoch=places[0].epoch,
                        pos=places[0].pos,
                        known=places[0].known,
                        user=places[1],
                        all=places[2],
                        recovered=recovered,
                        expires_in=expires_in,
                        ping_every=ping_every,
                    )
                ),
            )
            for topic, place, reason in lost:
                self._resync(session, topic, place, reason)
        for topic in session.topics:
            await self._lanes.run(topic, partial(self._enter, session, topic))
        return recovered

    async def close(self, session: Session) -> None:
        """Undo what `open` began."""
        for topic in session.bookmarks:
            self._listeners[topic] -= 1
            if not self._listeners[topic]:
                del self._listeners[topic], self._seen[topic]
                # Nobody is here to be sent it; whoever comes finds it in history.
                self._holding.forget(topic)
                self._lapses.forget(topic)
            await self._broker.unsubscribe(topic)

    def resume(self, session: Session) -> None:
        """A slow `session` reads again: bring it up to date and back into its rooms."""
        if self._hub.slow.pop(session, None) is not None:
            for topic in session.topics:
                self._lanes.put(topic, partial(self._enter_again, session, topic))

    def readmit(self, session: Session) -> None:
        """`session` was suspended and may hear again: bring it up to date and back into its rooms."""
        if session in self._hub.suspended:
            self._hub.suspended.discard(session)
            for topic in session.topics:
                self._lanes.put(topic, partial(self._enter_again, session, topic))

    async def _enter_again(self, session: Session, topic: str) -> None:
        """`_enter`, as often as it takes: while the broker is away nobody knows what was missed."""
        try:
            await self._enter(session, topic)
        except Unavailable:
            again = partial(self._lanes.put, topic, partial(self._enter_again, session, topic))
            asyncio.get_running_loop().call_later(RETRY, again)

    async def restart(self, topic: str, position: Position) -> None:
        """The numbering of `topic` goes on from `position`, without what was between: tell everybody to reload."""
        await self._hub.flush(topic)
        self._holding.forget(topic)
        self._stretches.clear()
        if topic in self._seen:
            self._seen[topic] = position.seq
        bookmark = Bookmark(position.seq)
        for session in self._hub.restart(topic, bookmark):
            if not session.plain:
                self._resync(session, topic, _place(position.epoch, bookmark), "continuity was lost on the way here")

    def _resync(self, session: Session, topic: str, place: wire.Place, reason: str) -> None:
        if session.plain:
            return  # it knows neither positions nor what to do about them
        label = wire.topic_label(topic)
        frame = wire.Resync(epoch=place.epoch, pos=place.pos, known=place.known, reason=reason, topic=label)
        self._hub.say(session, wire.encode(frame))

    async def _listen(self, topic: str) -> Position:
        position = await self._broker.subscribe(topic)
        self._listeners[topic] = self._listeners.get(topic, 0) + 1
        if topic not in self._seen:
            self._seen[topic] = position.seq
            with suppress(Unavailable):  # then the next to come is no worse off than without a watch
                for envelope in (await self._broker.history(topic, 0)).envelopes:
                    self._lapses.note(envelope)  # what began while nobody was here
        return position

    async def _bookmark(
        self, topic: str, position: Position, asked: tuple[str, Bookmark] | None
    ) -> tuple[Bookmark, str | None]:
        """From where a session goes on, and why that is not from where it asked to, if it is not."""
        here = await self._present(topic, position.seq)
        if asked is None:
            return here, None
        epoch, bookmark = asked
        if not epoch:
            history = await self._broker.history(topic, 0)
            first = history.envelopes[0].first - 1 if history.envelopes else position.seq
            return Bookmark(first), None
        if epoch != position.epoch:
            return here, "the numbering has started anew"
        if bookmark.pos > position.seq:
            return here, "the position is ahead of the topic"
        if not (await self._broker.history(topic, bookmark.pos)).complete:
            return here, "history does not reach back that far"
        return bookmark, None

    async def _present(self, topic: str, seq: int) -> Bookmark:
        """What somebody has who wants only what is new: all but what is held back at the moment."""
        held_since = self._holding.held_since(topic)
        if held_since is None or held_since > seq:
            return Bookmark(seq)
        recent = (await self._broker.history(topic, held_since - 1)).envelopes
        sent = (e.seq for e in recent if e.seq <= seq and not self._holding.holds(e))
        return Bookmark(held_since - 1, frozenset(sent))

    async def _enter(self, session: Session, topic: str) -> None:
        """Write what `session` missed of `topic`, then put it into the room. Runs in the topic's turn, so that
        nothing is delivered in between: what is numbered up to `seen` is history, what comes after arrives live.
        """
        await self._hub.flush(topic)
        port = self._hub.port(session)
        if port is None or self._kept_out(session) or self._hub.present(session, topic):
            return
        bookmark, seen = session.bookmarks[topic], self._seen[topic]
        held_since = self._holding.held_since(topic)
        arrived = Bookmark(seen)
        if bookmark.pos < seen:
            stretch = await self._stretch(topic, bookmark, seen, held_since)
            arrived = stretch.arrived
            if self._kept_out(session):
                return
            if not stretch.complete:
                here = _place(stretch.epoch, arrived)
                self._resync(session, topic, here, "history does not reach back that far")
            elif not await self._catch_up(session, port, topic, stretch):
                return
        elif held_since is not None:
            arrived = await self._present(topic, seen)
        if not self._kept_out(session):  # also not by what was just written to it
            self._hub.join(session, topic, arrived)

    def _kept_out(self, session: Session) -> bool:
        return session in self._hub.slow or session in self._hub.suspended

    async def _catch_up(self, session: Session, port: Port, topic: str, stretch: "_Stretch") -> bool:
        """Write what was missed, part by part. Returns False when the client stopped reading on the way."""
        bookmark = session.bookmarks[topic]
        known = set(bookmark.known)
        for part in stretch.parts:
            self._hub.send(session, part.envelopes, stretch.arrived.pos, part.views)
            known.update(envelope.seq for envelope in part.envelopes)
            pos = max(bookmark.pos, wire.position(part.envelopes[-1], stretch.arrived.pos))
            bookmark = Bookmark(pos, frozenset(seq for seq in known if seq > pos))
            session.bookmarks[topic] = bookmark
            if part is not stretch.parts[-1] and port.backlog() > CATCH_UP_BYTES:
                await asyncio.sleep(0)  # let the transport send before judging the client by its backlog
                if port.backlog() > CATCH_UP_BYTES // 2:
                    self._hub.pause(session)
                    return False
        return True

    async def _stretch(self, topic: str, bookmark: Bookmark, seen: int, held_since: int | None) -> "_Stretch":
        """What somebody with `bookmark` missed, merged and through the pipeline: once for all who missed the same."""
        key = (topic, bookmark, seen, held_since)
        found = self._stretches.get(key)
        if found is not None:
            return found
        history = await self._broker.history(topic, bookmark.pos)
        missed = [e for e in history.envelopes if e.seq <= seen and not self._holding.holds(e)]
        arrived = Bookmark(seen)
        if held_since is not None:
            arrived = Bookmark(held_since - 1, frozenset(e.seq for e in missed if e.seq >= held_since))
        found = _Stretch(history.top.epoch, history.complete, arrived, [])
        if history.complete:
            merged = conflate(missed, bookmark.known, repeat_critical=bookmark.claimed, fault=self._fault)
            found.parts.extend(_parts(await self._replay(topic, merged)))
        while len(self._stretches) >= KEPT_STRETCHES:
            del self._stretches[next(iter(self._stretches))]
        self._stretches[key] = found
        return found

    async def _replay(self, topic: str, merged: Sequence[Envelope]) -> list[Envelope]:
        """Send `merged` through the outbound leg; what comes out at its end."""
        through = self._hub.collect(topic)
        try:
            for envelope in merged:
                try:
                    await self._outbound(replace(envelope, replay=True))
                except (Refused, Disconnect):
                    continue  # reported by the pipeline
        finally:
            self._hub.collected(topic)
        return through


class _Part(Struct, frozen=True):
    """Some events that are written at once, and what that looks like for each kind of client."""

    envelopes: list[Envelope]
    views: Views


class _Stretch(Struct, frozen=True):
    """What one was not there for. `arrived` is what somebody has who was told all of it."""

    epoch: str
    complete: bool
    arrived: Bookmark
    parts: list[_Part]


def _parts(envelopes: Sequence[Envelope]) -> list[_Part]:
    """`envelopes` in parts of bounded size."""
    parts: list[_Part] = []
    size = 0
    for envelope in envelopes:
        size += len(wire.body(envelope))
        if not parts or size > CATCH_UP_BYTES:
            parts.append(_Part([], {}))
            size = len(wire.body(envelope))
        parts[-1].envelopes.append(envelope)
    return parts


def _place(epoch: str, bookmark: Bookmark) -> wire.Place:
    return wire.Place(epoch, bookmark.pos, tuple(sorted(bookmark.known)))
