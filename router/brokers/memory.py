"""The broker of one process: nothing to install, nothing to lose but the process."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import count
from secrets import token_hex
from time import monotonic

from msgspec.structs import replace

from router.brokers.base import (
    Arrive,
    Arrived,
    Broker,
    Hear,
    History,
    Limits,
    Lost,
    Moved,
    Notice,
    Person,
    Position,
    Published,
    Unread,
)
from router.brokers.queue import MemoryInbox
from router.envelope import Envelope

__all__ = ["MemoryBroker"]


REMEMBERED = 100_000
"""Names of topics that are remembered when their numbering is forgotten."""


class _Topic:
    """One topic's numbering and memory."""

    __slots__ = ("epoch", "history", "ids", "seq", "size", "touched", "whole")

    def __init__(self, now: float, *, whole: bool) -> None:
        self.epoch = token_hex(6)
        self.seq = 0
        self.history: deque[tuple[float, Envelope]] = deque()
        """Events, each with when it came."""
        self.ids: dict[str, int] = {}
        self.size = 0
        self.touched = now
        self.whole = whole
        """No numbering of this topic was forgotten before."""

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.seq)

    def remember(self, envelope: Envelope, max_events: int, max_bytes: int) -> None:
        self.history.append((self.touched, envelope))
        self.size += len(envelope.payload or b"")
        if envelope.message_id is not None:
            self.ids[envelope.message_id] = envelope.seq
        while len(self.history) > max_events or (self.size > max_bytes and len(self.history) > 1):
            self._forget_oldest()

    def expire(self, before: float) -> None:
        while self.history and self.history[0][0] < before:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, old = self.history.popleft()
        self.size -= len(old.payload or b"")
        if old.message_id is not None:
            self.ids.pop(old.message_id, None)


class _Roster:
    """Who has a project open. One who has gone stays, with no connections, until the grace (seconds) is over."""

    def __init__(self, clock: Callable[[], float], grace: float) -> None:
        self._clock = clock
        self._grace = grace
        self._here: dict[str, dict[str, Person]] = {}
        self._leaving: dict[tuple[str, str], float] = {}
        self._doubted: dict[tuple[str, str], tuple[str, bool]] = {}
        """Of whom viewers are to be told once more: a mark that changes with them, and whether anew."""
        self._marks = count(1)

    def people(self, project: str) -> list[Person]:
        return [person for _, person in sorted(self._here.get(project, {}).items())]

    def change(self, project: str, user: str, by: int) -> Person:
        """`by` connections more."""
        person = self._find(project, user)
        person = replace(person, connections=person.connections + by)
        self._here.setdefault(project, {})[user] = person
        if person.connections:
            self._leaving.pop((project, user), None)
        else:
            self._leaving[project, user] = self._clock() + self._grace
        self._touch(project, user)
        return person

    def describe(self, project: str, user: str, status: str) -> Person:
        person = self._find(project, user)
        if person.connections:
            person = self._here[project][user] = replace(person, status=status)
            self._touch(project, user)
        return person

    def knows(self, project: str, user: str) -> bool:
        return user in self._here.get(project, {})

    def untold(self) -> list[Notice]:
        now = self._clock()
        gone = [who for who, when in self._leaving.items() if when <= now]
        for project, user in gone:
            del self._leaving[project, user]
            del self._here[project][user]
            if not self._here[project]:
                del self._here[project]
            self._doubt(project, user, anew=True)
        return [
            Notice(project, self._find(project, user), here=self.knows(project, user), anew=anew, mark=mark)
            for (project, user), (mark, anew) in self._doubted.items()
        ]

    def told(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            who = notice.project, notice.person.user_id
            if notice.mark and self._doubted.get(who, ("", False))[0] == notice.mark:
                del self._doubted[who]
            elif notice.mark:
                self._doubt(*who, anew=not notice.here)

    def doubt(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            self._doubt(notice.project, notice.person.user_id, anew=notice.anew)

    def _doubt(self, project: str, user: str, *, anew: bool) -> None:
        _, before = self._doubted.get((project, user), ("", False))
        self._doubted[project, user] = str(next(self._marks)), anew or before

    def _touch(self, project: str, user: str) -> None:
        """What is being told of this person at the moment may be true no longer."""
        if (project, user) in self._doubted:
            self._doubt(project, user, anew=False)

    def _find(self, project: str, user: str) -> Person:
        return self._here.get(project, {}).get(user) or Person(user, 0)


class MemoryBroker(Broker):
    """Keeps everything in this process. More than one process cannot share it; `router serve --workers` says so.

    `max_events`, `max_age` (seconds) and `max_bytes` bound each topic's history. A topic that nobody listens to and
    nothing was published to for `forget` seconds is forgotten; its next event starts a new epoch. `grace`: seconds
    that somebody who has gone is still here.
    """

    def __init__(
        self,
        *,
        max_events: int = 1000,
        max_age: float = 300.0,
        max_bytes: int = 16 * 1024 * 1024,
        forget: float = 3600.0,
        grace: float = 15.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._max_events = max_events
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._forget = forget
        self._clock = clock
        self._topics: dict[str, _Topic] = {}
        self._forgotten: dict[str, None] = {}
        self._subscribed: Counter[str] = Counter()
        self._sweep_at = 1024
        self._expire_at = 0.0
        self._connections = 0
        self._users: Counter[str] = Counter()
        self._projects: Counter[str] = Counter()
        self._roster = _Roster(clock, grace)
        self._arrive: Arrive | None = None
        self.inbox = MemoryInbox(clock=clock)

    async def start(
        self,
        arrive: Arrive,
        lost: Lost,  # noqa: ARG002
        hear: Hear = lambda _: None,  # noqa: ARG002
        *,
        moved: Moved = lambda _topic, _position: None,  # noqa: ARG002
        unread: Unread = lambda _topic, _seq: None,  # noqa: ARG002
    ) -> None:
        self._arrive = arrive  # nothing is ever lost on the way, and there is nobody to hear from

    async def stop(self) -> None:
        self._arrive = None

    def tell(self, note: bytes, node: str | None = None) -> None:
        """There is nobody."""

    async def others(self) -> int:
        return 0

    async def ready(self) -> bool:
        return self._arrive is not None

    async def publish(self, envelope: Envelope) -> Published:
        topic = self._topic(envelope.topic)
        now = self._clock()
        topic.touched = now
        self._expire(now)
        topic.expire(now - self._max_age)
        if envelope.message_id is not None and (seq := topic.ids.get(envelope.message_id)) is not None:
            return Published(Position(topic.epoch, seq), duplicate=True)
        if envelope.policy.keep:
            topic.seq += 1
            envelope = replace(envelope, seq=topic.seq, first=topic.seq)
            topic.remember(envelope, self._max_events, self._max_bytes)
        if self._arrive is not None and self._subscribed[envelope.topic]:
            self._arrive(envelope)
        return Published(Position(topic.epoch, envelope.seq))

    async def subscribe(self, topic: str) -> Position:
        self._subscribed[topic] += 1
        return self._topic(topic).position

    async def unsubscribe(self, topic: str) -> None:
        self._subscribed[topic] -= 1
        if self._subscribed[topic] <= 0:
            del self._subscribed[topic]

    async def catch_up(self, topic: str) -> None:
        """All has arrived as soon as it is published."""

    async def history(self, topic: str, after: int) -> History:
        kept = self._topic(topic)
        now = self._clock()
        kept.expire(now - self._max_age)
        found = [(now - at, envelope) for at, envelope in kept.history if envelope.seq > after]
        complete = after <= kept.seq and len(found) == kept.seq - after
        envelopes = [envelope for _, envelope in found]
        return History(kept.position, envelopes, complete, ages=[age for age, _ in found], whole=kept.whole)

    async def position(self, topic: str) -> Position:
        return self._topic(topic).position

    async def claim(self, user: str, project: str, limits: Limits) -> str | None:
        if self._connections >= limits.system:
            return "system"
        if self._users[user] >= limits.user:
            return "user"
        if self._projects[project] >= limits.project:
            return "project"
        self._connections += 1
        self._users[user] += 1
        self._projects[project] += 1
        return None

    async def release(self, user: str, project: str) -> None:
        self._connections -= 1
        for counter, key in ((self._users, user), (self._projects, project)):
            counter[key] -= 1
            if counter[key] <= 0:
                del counter[key]

    async def enter(self, project: str, user: str) -> Arrived:
        joined = not self._roster.knows(project, user)
        return Arrived(self._roster.change(project, user, 1), joined=joined)

    async def leave(self, project: str, user: str) -> Person | None:
        return self._roster.change(project, user, -1)

    async def people(self, project: str) -> list[Person]:
        return self._roster.people(project)

    async def set_status(self, project: str, user: str, status: str) -> Person:
        return self._roster.describe(project, user, status)

    async def untold(self) -> list[Notice]:
        return self._roster.untold()

    async def told(self, notices: Sequence[Notice]) -> None:
        self._roster.told(notices)

    async def doubt(self, notices: Sequence[Notice]) -> None:
        self._roster.doubt(notices)

    async def spend(self, user: str, cost: float, rate: float, burst: float) -> float:  # noqa: ARG002
        return 0.0  # nobody is elsewhere

    def _topic(self, name: str) -> _Topic:
        topic = self._topics.get(name)
        if topic is None:
            if len(self._topics) >= self._sweep_at:
                self._sweep()
            topic = self._topics[name] = _Topic(self._clock(), whole=name not in self._forgotten)
        return topic

    def _expire(self, now: float) -> None:
        """Drop what is too old of all topics, also of those that nobody uses any more, now and then."""
        if now >= self._expire_at:
            self._expire_at = now + self._max_age / 2
            for topic in self._topics.values():
                topic.expire(now - self._max_age)

    def _sweep(self) -> None:
        """Drop topics that are no longer used. Done when their number has doubled, so it costs little per topic."""
        now = self._clock()
        for name, topic in list(self._topics.items()):
            if name not in self._subscribed and (topic.seq == 0 or topic.touched < now - self._forget):
                del self._topics[name]
                if topic.seq or not topic.whole:
                    self._forgotten[name] = None
        while len(self._forgotten) > REMEMBERED:
            del self._forgotten[next(iter(self._forgotten))]
        self._sweep_at = max(1024, 2 * len(self._topics))
