"""Brings a session to where its topics stand: when it connects, when it comes back, when it fell behind."""

import asyncio
from collections import OrderedDict
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
from router.event import Append, Event
from router.hub import Hub
from router.lane import Lanes
from router.lapse import Lapses
from router.pacing import Fault, Subject, conflate, subject_of
from router.pipeline import Forward
from router.room import Port, Views
from router.session import Bookmark, Session

__all__ = ["Holding", "Recovery", "Since", "Start"]

Since: TypeAlias = Mapping[str, tuple[str, Bookmark]]
"""For each topic that a client resumes: the epoch it knows and what it has. Epoch "" asks for all there is."""

CATCH_UP_BYTES = 256 * 1024
"""What is written to a client that catches up before looking whether it reads."""

RETRY = 1.0
"""Seconds after which it is looked again whether the broker is back."""
TRIES = 5
"""How often a topic is looked at that changes whenever it is looked at."""
KEPT_STRETCHES, KEPT_BYTES = 256, 16 * 1024 * 1024
"""Stretches kept for others who missed the same: the clients of many rooms come back together after a restart."""
UNREAD_REACH = 500
"""Numbers that may pass while a client's position waits behind an event that this node cannot read."""

NOT_WHOLE = "history does not reach back to the first event"
TOO_OLD = "history does not reach back that far"
OTHER_EPOCH = "the numbering has started anew"
AHEAD = "the position is ahead of the topic"
BROKEN = "continuity was lost on the way here"
TOO_MUCH = "more without a number went by than is kept"
UNKNOWN_TYPES = "events of a type that this node does not know were passed over"
OPEN = 1_000
"""Texts of one topic that go on at once, as far as it is known: the newest of them."""


class Holding(Protocol):
    """Whoever holds outbound events back, and can say which."""

    def held(self, topic: str) -> frozenset[int]: ...
    async def release(self, topic: str, has: Callable[[int], bool]) -> None: ...
    def forget(self, topic: str) -> None: ...


class Standing(Struct):
    """Where this node stands in a topic that somebody here listens to. Changed in the topic's turn only."""

    epoch: str
    seen: int
    """Everything up to here went through the outbound leg, or was passed over as unreadable."""
    listeners: int = 0
    version: int = 0
    """Goes up when what was told of a position before no longer holds."""
    unread: set[int] = set()
    """Numbers of which nobody here could be sent the event. They count as not delivered."""
    open: dict[tuple[type[Event], Subject], set[str]] = {}
    """Texts that go on, each with the sessions that were not given its beginning."""


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

    A session joins a room in the topic's own turn, so nothing is delivered in between: what is numbered up to `seen`
    is history, what comes after arrives live, what is held back comes with the room's next flush. What a session was
    told of its position holds when it joins, or it is told another before.
    """

    def __init__(
        self,
        hub: Hub,
        broker: Broker,
        lanes: Lanes,
        holding: Holding,
        outbound: Callable[[Envelope, Forward], Awaitable[None]],
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
        self._standings: dict[str, Standing] = {}
        self._stretches = _Stretches()

    # -- what happens to a topic, in its turn

    def passed(self, envelope: Envelope) -> None:
        """`envelope` went through the outbound leg: it is history for whoever joins from now on."""
        standing = self._standings.get(envelope.topic)
        if envelope.seq and standing is not None:
            standing.seen = max(standing.seen, envelope.seq)
            if standing.unread:
                self._bound_unread(envelope.topic, standing)

    async def unread(self, topic: str, seq: int) -> None:
        """There is an event that this node cannot read: no position told here passes it."""
        standing = self._standings.get(topic)
        if standing is not None and seq > standing.seen:
            await self._hub.flush(topic)  # what came before may still be told of without it
            standing.seen = seq
            self._pass_over(topic, standing, {seq})

    async def restart(self, topic: str, position: Position) -> None:
        """The numbering of `topic` goes on from `position`, without what was between: tell everybody to reload."""
        await self._hub.flush(topic)
        self._holding.forget(topic)
        standing = self._standings.get(topic)
        if standing is not None:
            standing.epoch, standing.seen = position.epoch, position.seq
            self._begin_anew(topic, standing, BROKEN)

    async def move(self, topic: str, position: Position) -> None:
        """The numbers of `topic` go on under another epoch: whoever comes back is to name that one."""
        standing = self._standings.get(topic)
        if standing is not None:
            await self._hub.flush(topic)
            standing.epoch = position.epoch
            standing.version += 1
            self._hub.say_to_all(topic, wire.encode(wire.Epoch(position.epoch, wire.topic_label(topic))))

    def _begin_anew(self, topic: str, standing: Standing, reason: str) -> None:
        """Tell everybody who listens to `topic` to reload and to go on from where it stands."""
        standing.version += 1
        standing.unread.clear()
        self._hub.floors.pop(topic, None)
        bookmark = self._present(topic, standing)
        for session in self._hub.restart(topic, bookmark):
            self._resync(session, topic, standing.epoch, bookmark, reason)

    def _pass_over(self, topic: str, standing: Standing, numbers: set[int]) -> None:
        standing.unread |= numbers
        self._hub.floors[topic] = min(standing.unread) - 1
        self._bound_unread(topic, standing)

    def _bound_unread(self, topic: str, standing: Standing) -> None:
        if standing.seen - min(standing.unread) > UNREAD_REACH:
            self._begin_anew(topic, standing, UNKNOWN_TYPES)

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
        while stale := [t for t in session.topics if starts[t].version != self._standings[t].version]:
            for topic in stale:
                starts[topic] = await self._start(topic, (since or {}).get(topic))
        self._hub.add(session, port)
        for topic in session.topics:
            session.bookmarks[topic] = starts[topic].bookmark
            if starts[topic].whole:
                session.whole |= {topic}
        project, user, everyone = (starts[topic] for topic in session.topics)
        recovered = project.reason is None and since is not None and session.topics[0] in since
        frames: list[wire.Frame] = [
            wire.Welcome(
                session_id=session.id,
                epoch=project.epoch,
                pos=project.bookmark.pos,
                known=tuple(sorted(project.bookmark.known)),
                user=_place(user.epoch, user.bookmark),
                all=_place(everyone.epoch, everyone.bookmark),
                recovered=recovered,
                expires_in=expires_in,
                ping_every=ping_every,
            )
        ]
        for topic in session.topics:
            start = starts[topic]
            if start.reason is not None:
                frames.append(_resync(topic, start.epoch, start.bookmark, start.reason))
                if not start.whole:
                    self._lacks_beginnings(session, topic)
        # In one write: a client that got the positions and not the word to reload would come back with them.
        self._hub.say(session, *map(wire.encode, frames))
        late = [t for t in session.topics if self._lanes.busy(t) or not self._join_at_once(session, t)]
        for topic in late:
            self._hub.away(session, topic)
        # All are asked for before any is waited for: what arrives meanwhile comes after them.
        entering = [self._lanes.ask(topic, partial(self._enter, session, topic)) for topic in late]
        for topic, entered in zip(late, await asyncio.gather(*entering), strict=True):
            if not entered:
                await self._enter_soon(session, topic)
        return recovered

    async def close(self, session: Session) -> None:
        """Undo what `prepare` began."""
        for topic in list(session.bookmarks):
            del session.bookmarks[topic]
            standing = self._standings[topic]
            standing.listeners -= 1
            for lacking in standing.open.values():
                lacking.discard(session.id)
            if not standing.listeners:
                self._forget(topic)
                if self._lanes.busy(topic):  # what is on its way through the pipeline may leave something behind
                    self._lanes.put(topic, partial(self._forget_later, topic))
            await self._broker.unsubscribe(topic)

    def _forget(self, topic: str) -> None:
        """Nobody is here to be sent anything; whoever comes finds it in history."""
        del self._standings[topic]
        self._holding.forget(topic)
        self._lapses.forget(topic)
        self._hub.floors.pop(topic, None)
        self._stretches.forget(topic)

    async def _forget_later(self, topic: str) -> None:
        if topic not in self._standings:
            self._holding.forget(topic)

    async def _listen(self, session: Session, topic: str) -> None:
        position = await self._broker.subscribe(topic)
        standing = self._standings.get(topic)
        fresh = standing is None
        if standing is None:
            standing = self._standings[topic] = Standing(position.epoch, position.seq)
        standing.listeners += 1
        session.bookmarks[topic] = Bookmark(position.seq)  # `close` undoes what this says was begun
        if fresh:
            with suppress(Unavailable):  # then the next to come is no worse off than without a watch
                history = await self._broker.history(topic, 0)
                for envelope, age in zip(history.envelopes, history.ages, strict=True):
                    self._lapses.note(envelope, age)  # what began while nobody was here
                    _follow(standing, envelope)

    async def _start(self, topic: str, asked: tuple[str, Bookmark] | None) -> Start:
        """From where somebody goes on who `asked` for this; in the topic's turn, so that all of it is of one moment."""
        if asked is None:
            standing = self._standings[topic]
            return Start(standing.version, standing.epoch, self._present(topic, standing))
        for _ in range(TRIES):
            found = await self._lanes.run(topic, partial(self._look, topic, asked))
            if found is not None:
                return found
            await self._broker.catch_up(topic)
        raise Unavailable("the topic does not come to rest", retry_after=RETRY)

    async def _look(self, topic: str, asked: tuple[str, Bookmark]) -> Start | None:
        """See `_start`. None: something that the broker knows is still on its way here."""
        standing = self._standings[topic]
        epoch, bookmark = asked
        whole = not epoch
        stretch = await self._stretch(topic, standing, bookmark, whole=whole)
        if stretch is None:
            return None
        here = partial(Start, standing.version, standing.epoch)
        if whole:
            return here(Bookmark(stretch.after), None if stretch.complete else NOT_WHOLE, whole=True)
        if epoch != standing.epoch:
            # Also where the broker says that the present epoch goes on from that one: it may have lost what it gave out
            # while this client was away, and nobody is left who knows.
            return here(self._present(topic, standing), OTHER_EPOCH)
        if bookmark.last > stretch.top:
            return here(self._present(topic, standing), AHEAD)
        if not stretch.complete:
            return here(self._present(topic, standing), TOO_OLD)
        # What another node has shown may still be on its way here.
        return here(bookmark) if bookmark.last <= standing.seen else None

    def _present(self, topic: str, standing: Standing) -> Bookmark:
        """What somebody has who wants only what is new: all but what is held back at the moment."""
        return _all_but(self._holding.held(topic), standing.seen)

    def _join_at_once(self, session: Session, topic: str) -> bool:
        """Join, where the topic is idle and nothing was missed; False where there is more to do."""
        standing, bookmark = self._standings[topic], session.bookmarks[topic]
        if bookmark.pos != standing.seen or bookmark.known or self._holding.held(topic) or self._kept_out(session):
            return False
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
        port, standing = self._hub.port(session), self._standings.get(topic)
        if port is None or standing is None or self._kept_out(session) or self._hub.present(session, topic):
            return True
        bookmark, whole = session.bookmarks[topic], topic in session.whole
        if bookmark.last > standing.seen:
            return False
        await self._holding.release(topic, bookmark.has)
        await self._hub.flush(topic)
        arrived = _all_but(self._holding.held(topic) | standing.unread, standing.seen)
        if bookmark.pos < standing.seen or whole:
            stretch = await self._stretch(topic, standing, bookmark, whole=whole)
            if stretch is None:
                return False
            arrived = stretch.arrived
            if self._hub.port(session) is None or self._kept_out(session):
                return True
            if stretch.after > bookmark.pos or not (stretch.complete or whole):
                # Told before it was cut further, or while it reached back that far.
                bookmark = Bookmark(stretch.after) if whole else arrived
                session.bookmarks[topic] = bookmark
                reason = NOT_WHOLE if whole else TOO_OLD
                self._resync(session, topic, standing.epoch, bookmark, reason, replayed=whole)
            if stretch.complete or whole:
                for stream in stretch.torn:
                    standing.open.setdefault(stream, set()).add(session.id)
                if not await self._catch_up(session, port, topic, stretch):
                    return True
        if not self._kept_out(session):  # also not by what was just written to it
            session.whole -= {topic}
            loose = self._hub.missed(session, topic)
            if loose is None:
                self._resync(session, topic, standing.epoch, arrived, TOO_MUCH)
            self._hub.join(session, topic, arrived)
            self._hub.send(session, loose or [])
        return True

    def _kept_out(self, session: Session) -> bool:
        return session in self._hub.slow or session in self._hub.suspended

    async def _catch_up(self, session: Session, port: Port, topic: str, stretch: "_Stretch") -> bool:
        """Write what was missed, part by part. Returns False when the client stopped reading on the way."""
        bookmark = session.bookmarks[topic]
        known = set(bookmark.known)
        for part in stretch.parts:
            envelopes = self._marked(session, topic, part.envelopes)
            views = part.views if envelopes is part.envelopes else None
            self._hub.send(session, envelopes, stretch.arrived.pos, views)
            known.update(envelope.seq for envelope in part.envelopes)
            pos = max(bookmark.pos, wire.position(part.envelopes[-1], stretch.arrived.pos))
            bookmark = Bookmark(pos, frozenset(seq for seq in known if seq > pos))
            session.bookmarks[topic] = bookmark
            session.whole -= {topic}  # what is missing now is only the rest
            if part is not stretch.parts[-1] and port.backlog() > CATCH_UP_BYTES:
                await asyncio.sleep(0)  # let the transport send before judging the client by its backlog
                if port.backlog() > CATCH_UP_BYTES // 2:
                    self._hub.pause(session)
                    return False
        return True

    async def _stretch(
        self, topic: str, standing: Standing, bookmark: Bookmark, *, whole: bool = False
    ) -> "_Stretch | None":
        """What somebody with `bookmark` missed, merged and through the pipeline: once for all who missed the same.

        None when history is of another epoch than what has arrived here: news of that is on its way.
        """
        if whole:
            bookmark = Bookmark(0)
        held = self._holding.held(topic)
        # Everything that the stretch depends on: a key that left something out gave somebody another's history.
        key = (
            topic,
            standing.epoch,
            standing.version,
            standing.seen,
            bookmark,
            whole,
            held,
            frozenset(standing.unread),
        )
        found = self._stretches.get(key)
        if found is not None:
            return found
        history = await self._broker.history(topic, bookmark.pos)
        if history.top.epoch != standing.epoch:
            return None
        seen = standing.seen
        unread = {seq for seq in history.unread if seq <= seen and not bookmark.has(seq)}
        near = {seq for seq in unread if seen - seq <= UNREAD_REACH}
        if near:
            self._pass_over(topic, standing, near)
        missed = [e for e in history.envelopes if e.seq <= seen and e.seq not in held]
        # A position cannot wait behind what is further back: then it is as if history did not have it.
        complete = history.complete and near == unread and (history.whole or not whole)
        after, torn = bookmark.pos, frozenset[Stream]()
        if whole and not complete:
            after = min((e.seq for e in history.envelopes), default=seen + 1) - 1
            after = min(after, min(history.unread, default=after + 1) - 1, seen)
            missed, torn = _without_torn(missed)
        parts: list[_Part] = []
        if complete or whole:
            merged = conflate(missed, bookmark.known, repeat_critical=bookmark.claimed, fault=self._fault)
            parts = _parts(await self._replay(merged))
        arrived = _all_but(held | standing.unread, seen)
        found = _Stretch(history.top.seq, complete, after, arrived, parts, torn)
        self._stretches.add(key, found)
        return found

    async def _replay(self, merged: Sequence[Envelope]) -> list[Envelope]:
        """Send `merged` through the outbound leg; what comes out at its end."""
        through: list[Envelope] = []

        async def keep(envelope: Envelope) -> None:
            through.append(envelope)

        for envelope in merged:
            with suppress(Refused, Disconnect):  # reported by the pipeline
                await self._outbound(replace(envelope, replay=True), keep)
        return list(through)  # what a middleware forwards later comes too late

    def _resync(
        self, session: Session, topic: str, epoch: str, bookmark: Bookmark, reason: str, *, replayed: bool = False
    ) -> None:
        """Tell `session` to reload and go on from `bookmark`. `replayed`: what history has of it follows."""
        if not replayed:
            self._lacks_beginnings(session, topic)
        self._hub.say(session, wire.encode(_resync(topic, epoch, bookmark, reason)))

    def _lacks_beginnings(self, session: Session, topic: str) -> None:
        """`session` is told to reload: unless it loads the texts so far, they have no beginning for it."""
        standing = self._standings.get(topic)
        if standing is not None and not session.plain:  # a plain client is not told
            for lacking in standing.open.values():
                lacking.add(session.id)

    # -- texts without their beginning

    async def spare(self, envelope: Envelope) -> Envelope:
        """`envelope` without those who were not given the beginning of the text that it is a piece of.

        They are sent it here, marked: it is for whoever has loaded the text so far, and nothing to be shown by itself.
        Plain clients, which load nothing, get none of it.
        """
        standing = self._standings.get(envelope.topic)
        if standing is None or not isinstance(envelope.policy.deliver, Append):
            return envelope
        lacking = _follow(standing, envelope)
        if not lacking:
            return envelope
        await self._hub.flush(envelope.topic)  # what came before it goes out before it
        marked = [_torn(envelope)]
        for session in (self._hub.session(id_) for id_ in lacking):
            if session is not None and not session.plain and self._hub.present(session, envelope.topic):
                self._hub.send(session, marked, self._hub.floors.get(envelope.topic))
        return envelope.narrowed(without=frozenset(lacking))

    def _marked(self, session: Session, topic: str, envelopes: list[Envelope]) -> list[Envelope]:
        """What of a missed stretch is sent to `session`, which was not given the beginning of some texts."""
        lacking = {stream for stream, ids in self._standings[topic].open.items() if session.id in ids}
        if not lacking:
            return envelopes
        hidden = frozenset({session.id})
        return [
            e if _stream(e) not in lacking else e.narrowed(without=hidden) if session.plain else _torn(e)
            for e in envelopes
        ]


Stream: TypeAlias = tuple[type[Event], Subject]
"""A text that comes in pieces: its type and the values of its `by` fields."""


def _stream(envelope: Envelope) -> Stream:
    return type(envelope.event), subject_of(envelope.event, envelope.policy.deliver.by)


def _ends(envelope: Envelope) -> bool:
    deliver = envelope.policy.deliver
    return isinstance(deliver, Append) and deliver.ends is not None and bool(getattr(envelope.event, deliver.ends))


def _torn(envelope: Envelope) -> Envelope:
    """A piece for one who was not given the beginning of its text."""
    return replace(envelope, payload=wire.body(envelope)[:-1] + b',"torn":true}')


def _follow(standing: Standing, envelope: Envelope) -> set[str] | None:
    """Note a piece of a text. Returns the sessions that were not given the beginning of it."""
    if not isinstance(envelope.policy.deliver, Append):
        return None
    stream = _stream(envelope)
    if _ends(envelope):
        return standing.open.pop(stream, None)
    if stream not in standing.open and len(standing.open) >= OPEN:
        del standing.open[next(iter(standing.open))]
    return standing.open.setdefault(stream, set())


def _begins(envelope: Envelope) -> bool:
    deliver = envelope.policy.deliver
    return isinstance(deliver, Append) and deliver.index is not None and getattr(envelope.event, deliver.index) == 0


def _without_torn(missed: Sequence[Envelope]) -> tuple[list[Envelope], frozenset[Stream]]:
    """A stretch whose beginning is cut off, without pieces of texts that may have begun before; and which of these
    texts go on.
    """
    begun: set[Stream] = set()
    torn: set[Stream] = set()
    whole = []
    for envelope in missed:
        if not isinstance(envelope.policy.deliver, Append):
            whole.append(envelope)
            continue
        stream = _stream(envelope)
        if stream not in begun and not _begins(envelope):
            torn.add(stream)
            if _ends(envelope):  # the next piece is another text's first
                torn.discard(stream)
                begun.add(stream)
            continue
        torn.discard(stream)
        begun.add(stream)
        whole.append(envelope)
    return whole, frozenset(torn)


def _all_but(held: frozenset[int] | set[int], seen: int) -> Bookmark:
    """What somebody has who has everything up to `seen` but what is held."""
    low = min((seq for seq in held if seq <= seen), default=0)
    if not low:
        return Bookmark(seen)
    return Bookmark(low - 1, frozenset(range(low, seen + 1)) - held)


class _Part(Struct, frozen=True):
    """Some events that are written at once, and what that looks like for each kind of client."""

    envelopes: list[Envelope]
    views: Views


class _Stretch(Struct, frozen=True):
    """What one was not there for. `arrived` is what somebody has who was told all of it."""

    top: int
    """The last number that there was."""
    complete: bool
    after: int
    """The number after which it begins."""
    arrived: Bookmark
    parts: list[_Part]
    torn: frozenset[Stream]
    """Texts that are left out of it, because their beginning is not there, and that go on."""

    @property
    def size(self) -> int:
        return sum(len(wire.body(envelope)) for part in self.parts for envelope in part.envelopes)


class _Stretches:
    """The stretches that were made last, bounded in number and bytes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], _Stretch] = OrderedDict()
        self._sizes: dict[tuple[object, ...], int] = {}
        self._size = 0

    def get(self, key: tuple[object, ...]) -> _Stretch | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def add(self, key: tuple[object, ...], stretch: _Stretch) -> None:
        self._kept[key] = stretch
        self._sizes[key] = stretch.size
        self._size += self._sizes[key]
        while len(self._kept) > KEPT_STRETCHES or self._size > KEPT_BYTES:
            self._drop(next(iter(self._kept)))

    def forget(self, topic: str) -> None:
        """Nobody listens to `topic` any more."""
        for key in [key for key in self._kept if key[0] == topic]:
            self._drop(key)

    def _drop(self, key: tuple[object, ...]) -> None:
        del self._kept[key]
        self._size -= self._sizes.pop(key)


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


def _resync(topic: str, epoch: str, bookmark: Bookmark, reason: str) -> wire.Resync:
    place = _place(epoch, bookmark)
    return wire.Resync(epoch=epoch, pos=place.pos, known=place.known, reason=reason, topic=wire.topic_label(topic))


def _place(epoch: str, bookmark: Bookmark) -> wire.Place:
    return wire.Place(epoch, bookmark.pos, tuple(sorted(bookmark.known)))
