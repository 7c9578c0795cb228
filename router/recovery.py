"""Brings a session to where its topics stand: when it connects, when it comes back, when it fell behind."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TypeAlias

from msgspec import Struct

from router import wire
from router.brokers.base import Broker
from router.envelope import Envelope
from router.errors import Disconnect, Refused, Unavailable
from router.hub import Hub
from router.lane import Lanes
from router.lapse import Lapses
from router.pacing import Fault
from router.room import Port
from router.session import Bookmark, Session
from router.standing import Holding, Standings, place_of, resync
from router.stretch import PART_BYTES, Replay, Stretch, Stretches
from router.text import ends, marked, text_of

__all__ = ["Recovery", "Since", "Start"]

Since: TypeAlias = Mapping[str, tuple[str, Bookmark]]
"""For each topic that a client resumes: the epoch it knows and what it has. Epoch "" asks for all there is."""

RETRY = 1.0
"""Seconds after which it is looked again whether the broker is back."""
TRIES = 5
"""How often a topic is looked at that changes whenever it is looked at."""

NOT_WHOLE = "history does not reach back to the first event"
TOO_OLD = "history does not reach back that far"
OTHER_EPOCH = "the numbering has started anew"
AHEAD = "the position is ahead of the topic"
TOO_MUCH = "more without a number went by than is kept"


class Start(Struct, frozen=True):
    """From where a session goes on in a topic. True as long as the standing has this version."""

    version: int
    epoch: str
    bookmark: Bookmark
    reason: str | None = None
    """Why that is not from where it asked to, if it is not."""
    whole: bool = False
    """It asked for all that there is."""


class Recovery:
    """Catching up is the same code for everybody: the missed stretch of history, merged, through the same pipeline.

    A session joins a room in the topic's own turn, so nothing is delivered in between: what is numbered up to where
    the node stands is history, what comes after arrives live, what is held back comes with the room's next flush. What
    a session was told of its position holds when it joins, or it is told another before.
    """

    def __init__(
        self, hub: Hub, broker: Broker, lanes: Lanes, holding: Holding, replay: Replay, fault: Fault, lapses: Lapses
    ) -> None:
        self.standings = Standings(hub, holding)
        self._stretches = Stretches(broker, holding, self.standings, replay, fault)
        self._hub = hub
        self._broker = broker
        self._lanes = lanes
        self._holding = holding
        self._lapses = lapses

    # -- coming

    async def prepare(self, session: Session, since: Since | None) -> dict[str, Start]:
        """Listen for `session`, and find out from where it goes on. `close` undoes it, however far it came.

        It is told nothing yet. Raises `Unavailable`.
        """
        for topic in session.topics:
            await self._listen(session, topic)
        return {topic: await self._start(topic, (since or {}).get(topic)) for topic in session.topics}

    async def enter(
        self,
        session: Session,
        port: Port,
        starts: dict[str, Start],
        since: Since | None,
        ping_every: float,
        expires_in: float | None,
    ) -> bool:
        """Tell `session` where it stands and have it hear what comes. Returns whether it was recovered.

        Without anything to catch up on it hears all that arrives after this call, whatever that is: from the call to
        the joining nothing is awaited.
        """
        while stale := [t for t in session.topics if starts[t].version != self.standings[t].version]:
            for topic in stale:
                starts[topic] = await self._start(topic, (since or {}).get(topic))
        self._hub.add(session, port)
        for topic in session.topics:
            session.bookmarks[topic] = starts[topic].bookmark
            if starts[topic].whole:
                session.whole |= {topic}
        recovered = since is not None and session.topics[0] in since and starts[session.topics[0]].reason is None
        self._welcome(session, starts, ping_every, expires_in, recovered=recovered)
        late = [t for t in session.topics if self._lanes.busy(t) or not self._join_at_once(session, t)]
        for topic in late:
            self._hub.away(session, topic)
        # All are asked for before any is waited for: what arrives meanwhile comes after them.
        entering = [self._lanes.ask(topic, partial(self._enter, session, topic)) for topic in late]
        for topic, entered in zip(late, await asyncio.gather(*entering), strict=True):
            if not entered:
                await self._enter_soon(session, topic)
        return recovered

    def _welcome(
        self,
        session: Session,
        starts: dict[str, Start],
        ping_every: float,
        expires_in: float | None,
        *,
        recovered: bool,
    ) -> None:
        project, user, everyone = (starts[topic] for topic in session.topics)
        frames: list[wire.Frame] = [
            wire.Welcome(
                session_id=session.id,
                epoch=project.epoch,
                pos=project.bookmark.pos,
                known=tuple(sorted(project.bookmark.known)),
                user=place_of(user.epoch, user.bookmark),
                all=place_of(everyone.epoch, everyone.bookmark),
                recovered=recovered,
                expires_in=expires_in,
                ping_every=ping_every,
            )
        ]
        for topic, start in starts.items():
            if start.reason is not None:
                frames.append(resync(topic, start.epoch, start.bookmark, start.reason))
                if not start.whole:
                    self.standings.tear(session, topic)
        # In one write: a client that got the positions and not the word to reload would come back with them.
        self._hub.say(session, *map(wire.encode, frames))

    async def close(self, session: Session) -> None:
        """Undo what `prepare` began."""
        for topic in list(session.bookmarks):
            del session.bookmarks[topic]
            if self.standings.leave(topic, session):
                # Nobody is here to be sent anything; whoever comes finds it in history.
                self._holding.forget(topic)
                self._lapses.forget(topic)
                self._stretches.forget(topic)
                if self._lanes.busy(topic):  # what is on its way through the pipeline may leave something behind
                    self._lanes.put(topic, partial(self._forget_later, topic))
            await self._broker.unsubscribe(topic)

    async def _forget_later(self, topic: str) -> None:
        if topic not in self.standings:
            self._holding.forget(topic)

    async def _listen(self, session: Session, topic: str) -> None:
        position = await self._broker.subscribe(topic)
        session.bookmarks[topic] = Bookmark(position.seq)  # `close` undoes what this says was begun
        if self.standings.listen(topic, position):
            with suppress(Unavailable):  # then the next to come is no worse off than without a watch
                await self._lanes.run(topic, partial(self._follow, topic, position.seq))

    async def _follow(self, topic: str, upto: int) -> None:
        """Take notice of what began while nobody was here. What is numbered above `upto` arrives by itself."""
        history = await self._broker.history(topic, 0)
        standing = self.standings.get(topic)
        for envelope, age in zip(history.envelopes, history.ages, strict=True):
            if standing is not None and envelope.seq <= upto:
                self._lapses.note(envelope, age)
                standing.texts.follow(envelope)

    async def _start(self, topic: str, asked: tuple[str, Bookmark] | None) -> Start:
        """From where somebody goes on who `asked` for this; in the topic's turn, so that all of it is of one moment."""
        if asked is None:
            standing = self.standings[topic]
            return Start(standing.version, standing.epoch, self.standings.present(topic))
        for _ in range(TRIES):
            found = await self._lanes.run(topic, partial(self._look, topic, asked))
            if found is not None:
                return found
            await self._broker.catch_up(topic)
        raise Unavailable("the topic does not come to rest", retry_after=RETRY)

    async def _look(self, topic: str, asked: tuple[str, Bookmark]) -> Start | None:
        """See `_start`. None: something that the broker knows is still on its way here."""
        epoch, bookmark = asked
        whole = not epoch
        if not whole and epoch != self.standings[topic].epoch:
            if (await self._broker.position(topic)).epoch != self.standings[topic].epoch:
                return None
            # Also where the broker says that the present epoch goes on from that one: it may have lost what it gave out
            # while this client was away, and nobody is left who knows.
            standing = self.standings[topic]
            return Start(standing.version, standing.epoch, self.standings.present(topic), OTHER_EPOCH)
        stretch = await self._stretches.missed(topic, bookmark, whole=whole)
        if stretch is None:
            return None
        standing = self.standings[topic]
        here = partial(Start, standing.version, standing.epoch)
        if whole:
            return here(Bookmark(stretch.after), None if stretch.complete else NOT_WHOLE, whole=True)
        if bookmark.last > stretch.top:
            return here(self.standings.present(topic), AHEAD)
        if not stretch.complete:
            return here(self.standings.present(topic), TOO_OLD)
        # What another node has shown may still be on its way here.
        return here(bookmark) if bookmark.last <= standing.seen else None

    def _join_at_once(self, session: Session, topic: str) -> bool:
        """Join, where the topic is idle and nothing was missed; False where there is more to do."""
        bookmark = session.bookmarks[topic]
        if bookmark.pos != self.standings[topic].seen or bookmark.known or self._holding.held(topic):
            return False
        if topic in session.whole:
            if bookmark.pos:  # it asked for all, and of what there was history has nothing: nor of texts that go on
                self.standings[topic].texts.tear(session.id)
            session.whole -= {topic}
        self._hub.join(session, topic, bookmark)
        return True

    # -- coming back

    def resume(self, session: Session) -> None:
        """A slow `session` reads again: bring it up to date and back into its rooms."""
        if self._hub.slow.pop(session, None) is not None:
            self._bring_back(session)

    def readmit(self, session: Session) -> None:
        """`session` was suspended and may hear again: bring it up to date and back into its rooms."""
        if session in self._hub.suspended:
            self._hub.suspended.discard(session)
            self._bring_back(session)

    def _bring_back(self, session: Session) -> None:
        for topic in session.topics:
            self._lanes.put(topic, partial(self._enter_again, session, topic))

    async def _enter_again(self, session: Session, topic: str) -> None:
        """`_enter`, as often as it takes: while the broker is away nobody knows what was missed."""
        try:
            entered = await self._enter(session, topic)
        except Unavailable:
            entered = False
        if not entered:
            again = partial(self._lanes.put, topic, partial(self._enter_again, session, topic))
            asyncio.get_running_loop().call_later(RETRY, again)

    async def _enter_soon(self, session: Session, topic: str) -> None:
        """`_enter`, once what the broker knows has arrived. Raises `Unavailable`."""
        for _ in range(TRIES):
            await self._broker.catch_up(topic)
            if await self._lanes.run(topic, partial(self._enter, session, topic)):
                return
        raise Unavailable("the topic does not come to rest", retry_after=RETRY)

    # -- catching up

    async def _enter(self, session: Session, topic: str) -> bool:
        """Write what `session` missed of `topic`, then put it into the room. Runs in the topic's turn, so that
        nothing is delivered in between: what is numbered up to `seen` is history, what comes after arrives live.

        Returns False when that is not possible yet, because something is still on its way here.
        """
        await self._hub.flush(topic)
        port, standing = self._hub.port(session), self.standings.get(topic)
        if port is None or standing is None or self._kept_out(session) or self._hub.present(session, topic):
            return True
        bookmark, whole = session.bookmarks[topic], topic in session.whole
        if bookmark.last > standing.seen:
            return False
        with suppress(Refused, Disconnect):  # reported by the pipeline; whoever joins has no part in it
            await self._holding.release(topic, bookmark.has)
        await self._hub.flush(topic)
        if self._hub.port(session) is None:  # gone meanwhile, perhaps as the last that listened
            return True
        arrived = self.standings.delivered(topic)
        if bookmark.pos < standing.seen or whole:
            stretch = await self._stretches.missed(topic, bookmark, whole=whole)
            if self._hub.port(session) is None or self._kept_out(session):
                return True
            if stretch is None:
                return False
            arrived = stretch.arrived
            if stretch.after > bookmark.pos or not (stretch.complete or whole):
                # Told before it was cut further, or while it reached back that far.
                session.bookmarks[topic] = Bookmark(stretch.after) if whole else arrived
                reason = NOT_WHOLE if whole else TOO_OLD
                self.standings.tell_resync(session, topic, session.bookmarks[topic], reason, replayed=whole)
            if stretch.complete or whole:
                if whole and not stretch.complete:
                    standing.texts.tear(session.id, but=stretch.given)
                if not await self._catch_up(session, port, topic, stretch):
                    return True
                if not stretch.complete and session.bookmarks[topic].pos < arrived.pos and not session.plain:
                    # What was left out last has no frame: it would be sent after all to whoever comes back.
                    position = wire.Batch(events=[], pos=arrived.pos, topic=wire.topic_label(topic))
                    self._hub.say(session, wire.encode(position))
        if not self._kept_out(session):  # also not by what was just written to it
            session.whole -= {topic}
            loose = self._hub.missed(session, topic)
            if loose is None:
                self.standings.tell_resync(session, topic, arrived, TOO_MUCH)
                session.bookmarks[topic] = arrived
                if self._kept_out(session):
                    return True
            self._hub.join(session, topic, arrived)
            self._hub.send(session, loose or [])
        return True

    def _kept_out(self, session: Session) -> bool:
        return session in self._hub.slow or session in self._hub.suspended

    async def _catch_up(self, session: Session, port: Port, topic: str, stretch: Stretch) -> bool:
        """Write what was missed, part by part. Returns False when the client stopped reading on the way."""
        bookmark = session.bookmarks[topic]
        known = set(bookmark.known)
        for part in stretch.parts:
            envelopes = self._fit(session, topic, part.envelopes)
            views = part.views if envelopes is part.envelopes else None
            self._hub.send(session, envelopes, stretch.arrived.pos, views)
            known.update(envelope.seq for envelope in part.envelopes)
            pos = max(bookmark.pos, wire.position(part.envelopes[-1], stretch.arrived.pos))
            bookmark = Bookmark(pos, frozenset(seq for seq in known if seq > pos))
            session.bookmarks[topic] = bookmark
            session.whole -= {topic}  # what is missing now is only the rest
            if part is not stretch.parts[-1] and port.backlog() > PART_BYTES:
                await asyncio.sleep(0)  # let the transport send before judging the client by its backlog
                if port.backlog() > PART_BYTES // 2:
                    self._hub.pause(session)
                    return False
        return True

    def _fit(self, session: Session, topic: str, envelopes: list[Envelope]) -> list[Envelope]:
        """What of a missed stretch is sent to `session`, which was not given the beginning of some texts."""
        texts = self.standings[topic].texts
        torn = texts.torn(session.id)
        if not torn:
            return envelopes
        hidden = frozenset({session.id})
        fit = []
        for envelope in envelopes:
            text = text_of(envelope)
            if text in torn:
                fit.append(envelope.narrowed(without=hidden) if session.plain else marked(envelope))
                if ends(envelope):  # what follows is another text
                    torn.discard(text)
                    texts.mend(session.id, text)
            else:
                fit.append(envelope)
        return fit
