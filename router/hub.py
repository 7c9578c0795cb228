"""Which sessions are here, and the only loop over them."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

from router import wire
from router.envelope import Envelope
from router.room import Cohort, Port, Room, Views, Write, admitted, cut, view
from router.session import Bookmark, Session

__all__ = ["Hub"]

LOOSE = 500
"""Events without a number that are kept of one topic for those who are away from it."""

SLICE = 100
"""Recipients served before other rooms get a turn: a third of a millisecond of sending (3 to 5 us each)."""
TURNS = 3
"""Turns of the event loop between slices: as many as a message of another room needs from its socket to its people."""


class _Absence:
    """The last events without a number of one topic, while somebody is away from it who must get them on return.

    They are in no history. `left_at` tells of each session how many had been written when it left.
    """

    __slots__ = ("count", "envelopes", "left_at")

    def __init__(self) -> None:
        self.count = 0
        self.envelopes: deque[Envelope] = deque(maxlen=LOOSE)
        self.left_at: dict[Session, int] = {}

    def note(self, envelopes: Iterable[Envelope]) -> None:
        for envelope in envelopes:
            if not envelope.seq:
                self.envelopes.append(envelope)
                self.count += 1

    def missed(self, session: Session) -> list[Envelope] | None:
        """What `session` was not there for; None when that is more than is kept."""
        count = self.count - self.left_at.pop(session)
        return None if count > len(self.envelopes) else list(self.envelopes)[len(self.envelopes) - count :]


class Hub:
    """Sessions by topic. Delivers by writing the same bytes to every session of a cohort; never awaits a client.

    A session whose transport is over its high-water mark leaves the rooms (`pause`) with a bookmark of what it has;
    whoever brings it back writes what it missed first. So memory for one client is bounded by its transport's
    buffer and nobody waits for it.
    """

    def __init__(self, *, acknowledged_within: float = 10.0, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ack_after = acknowledged_within
        self._ports: dict[Session, Port] = {}
        self._by_id: dict[str, Session] = {}
        self._rooms: dict[str, Room] = {}
        self._absences: dict[str, _Absence] = {}
        self._given_up: list[tuple[Session, Envelope]] = []
        self.slow: dict[Session, float] = {}
        """Sessions that do not read fast enough, and since when."""
        self.suspended: set[Session] = set()
        """Sessions whose token has expired: they get nothing until they bring a fresh one."""
        self.awaiting: set[Session] = set()
        """Sessions that have something unacknowledged."""
        self.floors: dict[str, int] = {}
        """By topic, the position that no frame may pass, because what follows could not be sent to anybody here."""

    def __len__(self) -> int:
        return len(self._ports)

    def __iter__(self) -> "Iterable[Session]":
        return iter(list(self._ports))

    # -- who is here

    def add(self, session: Session, port: Port) -> None:
        """Know `session` and the way to it. It gets nothing until it joins topics."""
        self._ports[session] = port
        self._by_id[session.id] = session

    def remove(self, session: Session) -> None:
        """Forget `session`. Doing it twice is harmless."""
        for topic in session.topics:
            self.leave(session, topic)
            self.missed(session, topic)
        self._ports.pop(session, None)
        self._by_id.pop(session.id, None)
        self.slow.pop(session, None)
        self.suspended.discard(session)
        self.awaiting.discard(session)

    def port(self, session: Session) -> Port | None:
        """The way to `session`; None once it is gone."""
        return self._ports.get(session)

    def session(self, id_: str) -> Session | None:
        return self._by_id.get(id_)

    def listening(self, topic: str) -> int:
        """How many sessions are in the fast set of `topic`."""
        room = self._rooms.get(topic)
        return 0 if room is None else sum(len(members) for members in room.cohorts.values())

    def users(self, topic: str, grant: str) -> set[str]:
        """Who shall get an event of `topic` that needs `grant`: those in the room, and those catching up."""
        return {s.user for s in self._ports if topic in s.topics and grant in s.grants}

    def join(self, session: Session, topic: str, bookmark: Bookmark) -> None:
        """Put `session`, which has everything that the room has, into the fast set. `bookmark`: what that is."""
        port = self._ports.get(session)
        if port is None:
            return
        room = self._rooms.get(topic)
        if room is None:
            room = self._rooms[topic] = Room()
            room.pos, room.known = bookmark.pos, set(bookmark.known)
        room.cohorts.setdefault(self._cohort(session, port, topic), {})[session] = port.write

    def leave(self, session: Session, topic: str) -> None:
        """Take `session` out of the fast set of `topic`, with a bookmark of what it has."""
        room = self._rooms.get(topic)
        port = self._ports.get(session)
        if room is None or port is None:
            return
        cohort = self._cohort(session, port, topic)
        members = room.cohorts.get(cohort)
        if members is None or members.pop(session, None) is None:
            return
        session.bookmarks[topic] = room.bookmark
        if not members:
            del room.cohorts[cohort]
            if not room.cohorts and not room.queue:
                del self._rooms[topic]

    def refile(self, session: Session, change: Callable[[], None]) -> None:
        """Make a `change` to `session` that may move it to other cohorts: its grants, what it has acknowledged."""
        port = self._ports.get(session)
        if port is None:
            change()
            return
        present = []
        for topic in session.topics:
            room = self._rooms.get(topic)
            cohort = self._cohort(session, port, topic)
            if room is not None and session in room.cohorts.get(cohort, ()):
                present.append((topic, room))
                del room.cohorts[cohort][session]
                if not room.cohorts[cohort]:
                    del room.cohorts[cohort]
        change()
        for topic, room in present:
            room.cohorts.setdefault(self._cohort(session, port, topic), {})[session] = port.write

    def restart(self, topic: str, bookmark: Bookmark) -> list[Session]:
        """Everybody who listens to `topic` has what `bookmark` says from now on. Returns who that is."""
        room = self._rooms.get(topic)
        if room is not None:
            room.pos, room.known = bookmark.pos, set(bookmark.known)
        everybody = [session for session in self._ports if topic in session.topics]
        for session in everybody:
            session.bookmarks[topic] = bookmark
            if session.unacknowledged:
                self.refile(session, partial(session.forget_numbers, topic))
        return everybody

    def say_to_all(self, topic: str, payload: bytes) -> None:
        """Write one frame that is not an event to everybody who listens to `topic` and speaks our protocol."""
        for session in self._ports:
            if topic in session.topics and not session.plain:
                self.say(session, payload)

    def away(self, session: Session, topic: str) -> None:
        """`session` is not in the room of `topic`, and must not miss what has no number: see `missed`."""
        absence = self._absences.setdefault(topic, _Absence())
        absence.left_at.setdefault(session, absence.count)

    def missed(self, session: Session, topic: str) -> list[Envelope] | None:
        """The events without a number that were written since `away`; None when there were too many to keep."""
        absence = self._absences.get(topic)
        if absence is None or session not in absence.left_at:
            return []
        missed = absence.missed(session)
        if not absence.left_at:
            del self._absences[topic]
        return missed

    def pause(self, session: Session) -> None:
        """`session` reads too slowly: out of the fast set until it has caught up."""
        if session in self._ports:
            for topic in session.topics:
                self.away(session, topic)
                self.leave(session, topic)
            self.slow.setdefault(session, self._clock())

    def suspend(self, session: Session) -> None:
        """`session` may not hear more for now: out of the fast set until it may again."""
        if session in self._ports:
            for topic in session.topics:
                self.away(session, topic)
                self.leave(session, topic)
            self.suspended.add(session)

    @staticmethod
    def _cohort(session: Session, port: Port, topic: str) -> Cohort:
        return Cohort(session.plain, port.framed, session.grants, None if session.plain else session.floor(topic))

    # -- delivery

    async def deliver(self, envelope: Envelope) -> None:
        """Take one envelope that came through the pipeline. It is written at the next `flush` of its topic."""
        only = envelope.audience.only
        if only is None:
            room = self._rooms.get(envelope.topic)
            if room is not None:
                room.queue.append(envelope)
            elif not envelope.seq and envelope.topic in self._absences:
                self._absences[envelope.topic].note([envelope])
        else:
            for id_ in only:
                session = self._by_id.get(id_)
                if session is not None:
                    self.send(session, [envelope])

    async def flush(self, topic: str) -> int:
        """Write what was delivered to `topic` since the last flush. Returns to how many it went.

        Called in turn with the topic's messages, so nobody joins in the middle. A session that leaves meanwhile
        still gets this flush, which its bookmark says it has.
        """
        room = self._rooms.get(topic)
        if room is None or not room.queue:
            return 0
        count = 0
        while room.queue:
            envelopes, room.queue = cut(room.queue)
            floor = self.floors.get(topic)
            room.advance(envelopes, floor)
            if topic in self._absences:
                self._absences[topic].note(envelopes)
            count += await self._write(room, envelopes, floor)
        if not room.cohorts and self._rooms.get(topic) is room:
            del self._rooms[topic]
        return count

    async def _write(self, room: Room, envelopes: Sequence[Envelope], floor: int | None) -> int:
        views: Views = {}
        critical = any(envelope.requires_ack for envelope in envelopes)
        picky = any(envelope.audience.without for envelope in envelopes)
        count = turn = 0
        # Taken down before the first pause: whoever moves or leaves meanwhile gets this flush, and gets it once.
        everybody = [
            (cohort, list(members.values()), list(members) if picky or critical else [])
            for cohort, members in room.cohorts.items()
        ]
        for cohort, writes, sessions in everybody:
            chosen = admitted(envelopes, cohort)
            if not chosen:
                continue
            for start in range(0, len(writes), SLICE):
                part = writes[start : start + SLICE]
                if turn and turn + len(part) > SLICE:
                    for _ in range(TURNS):
                        await asyncio.sleep(0)
                    turn = 0
                turn += len(part)
                count += len(part)
                if picky:
                    for session, write in zip(sessions[start : start + SLICE], part, strict=True):
                        theirs = [i for i in chosen if session.id not in envelopes[i].audience.without]
                        for data in view(views, cohort, envelopes, theirs, floor):
                            _put(write, data)
                else:
                    for data in view(views, cohort, envelopes, chosen, floor):
                        for write in part:
                            try:
                                write(data)
                            except RuntimeError:  # uvloop's word for a connection that was just cut
                                continue
                if critical:
                    for session in sessions[start : start + SLICE]:
                        self._expect_acks(session, [envelopes[i] for i in chosen])
        return count

    def send(
        self, session: Session, envelopes: Sequence[Envelope], floor: int | None = None, views: Views | None = None
    ) -> None:
        """Write to one session what of `envelopes` it may see: a reply, or what it missed.

        `floor`: see `wire.numbered`. `views`: shared with others who are sent the same envelopes.
        """
        port = self._ports.get(session)
        if port is None or not envelopes:
            return
        floors = [f for f in (floor, session.floor(envelopes[0].topic)) if f is not None]
        cohort = Cohort(session.plain, port.framed, session.grants, min(floors, default=None))
        which = [i for i in admitted(envelopes, cohort) if envelopes[i].audience.includes(session.id, session.grants)]
        for data in view({} if views is None else views, cohort, envelopes, which):
            _put(port.write, data)
        self._expect_acks(session, [envelopes[i] for i in which])

    def say(self, session: Session, *payloads: bytes) -> None:
        """Write frames that are no events, in one write. A plain client is told only what it knows: nobody else asks."""
        told = [payload for payload in payloads if not session.plain or wire.is_plain(payload)]
        if told:
            self._tell(session, *told)

    def _tell(self, session: Session, *payloads: bytes) -> None:
        port = self._ports.get(session)
        if port is None:
            return
        for data in [b"".join(map(wire.text_frame, payloads))] if port.framed else payloads:
            _put(port.write, data)

    def ping(self, session: Session) -> None:
        """Have the client's WebSocket layer answer, where we write frames ourselves."""
        port = self._ports.get(session)
        if port is not None and port.framed:
            _put(port.write, wire.PING_FRAME)

    def present(self, session: Session, topic: str) -> bool:
        """Whether `session` is in the fast set of `topic`."""
        room, port = self._rooms.get(topic), self._ports.get(session)
        return (
            room is not None
            and port is not None
            and session in room.cohorts.get(self._cohort(session, port, topic), ())
        )

    # -- acknowledgement

    def _expect_acks(self, session: Session, envelopes: Sequence[Envelope]) -> None:
        waiting = [
            e for e in envelopes if e.requires_ack and e.ack_id and e.audience.includes(session.id, session.grants)
        ]
        if not waiting or session not in self._ports:
            return
        due = self._clock() + self._ack_after
        self.awaiting.add(session)

        def remember() -> None:
            for envelope in waiting:
                crowded_out = session.expect_ack(envelope, due)
                if crowded_out is not None:
                    self._given_up.append((session, crowded_out.envelope))

        self.refile(session, remember)

    def acknowledge(self, session: Session, *, message_id: str | None, pos: int | None) -> list[Envelope]:
        """Take an acknowledgement. Returns what was waiting for it."""
        done: list[Envelope] = []
        if session.unacknowledged:
            self.refile(session, lambda: done.extend(session.acknowledge(message_id=message_id, pos=pos)))
            if not session.unacknowledged:
                self.awaiting.discard(session)
        return done

    def _again(self, envelope: Envelope, session: Session) -> bytes:
        floors = (session.floor(envelope.topic), self.floors.get(envelope.topic))
        floor = min((f for f in floors if f is not None), default=None)
        return wire.numbered(envelope, floor=floor, redelivered=True)

    async def redeliver(self, now: float, tries: int) -> list[tuple[Session, Envelope]]:
        """Send again what is due. Returns what is given up: sent `tries` times in vain, or crowded out.

        Gives others a turn now and then: after an outage everybody in a large room may be due at once.
        """
        given_up, self._given_up = self._given_up, []
        for count, session in enumerate(list(self.awaiting), 1):
            if count % SLICE == 0:
                await asyncio.sleep(0)
            for id_, waiting in list((session.unacknowledged or {}).items()):
                if waiting.due > now or session in self.slow or session in self.suspended:
                    continue
                if waiting.tries >= tries:
                    self.acknowledge(session, message_id=id_, pos=None)
                    given_up.append((session, waiting.envelope))
                    continue
                waiting.tries += 1
                waiting.due = now + self._ack_after
                again = waiting.envelope
                if not again.audience.includes(session.id, session.grants):
                    self.acknowledge(session, message_id=id_, pos=None)  # no longer meant for this person
                    continue
                if not session.plain:
                    self._tell(session, self._again(again, session))
                elif session.acknowledges:  # one that never does cannot tell a repeat from another event
                    self._tell(session, wire.body(again))
        return given_up


def _put(write: Write, data: bytes) -> None:
    """Write to one connection, which may have been cut in this very turn of the loop."""
    with suppress(RuntimeError):
        write(data)
