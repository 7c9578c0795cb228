"""The contracts that every broker and its inbox keep. One suite each, in tests/contracts/, runs on all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

from msgspec import Struct

from router.envelope import Envelope
from router.errors import Unavailable

__all__ = [
    "NEVER_DONE",
    "Arrive",
    "Arrived",
    "Bounds",
    "Broker",
    "Dead",
    "Hear",
    "History",
    "Inbox",
    "Limits",
    "Lost",
    "Moved",
    "Notice",
    "Origin",
    "Person",
    "Position",
    "Published",
    "Taken",
    "Unread",
]

Arrive: TypeAlias = Callable[[Envelope], None]
"""Takes one envelope in. Called in the order of numbers within a topic; returns at once."""


Lost: TypeAlias = Callable[[str, "Position"], None]
"""Told that a topic's numbers do not join up with what arrived before: clients must reload, and go on from there."""


Moved: TypeAlias = Callable[[str, "Position"], None]
"""Told that a topic's numbers go on under another epoch, and that nothing is missing."""


Unread: TypeAlias = Callable[[str, int], None]
"""Told, in turn with what arrives, of a topic's event that this node cannot read, by its number."""


Hear: TypeAlias = Callable[[bytes], None]
"""Told what another node said, or this one itself to all."""


class Position(Struct, frozen=True):
    """A place in a topic's numbering. Numbers of different epochs say nothing about each other."""

    epoch: str
    seq: int

    @property
    def since(self) -> str:
        """As a client names it to go on from there."""
        return f"{self.epoch}:{self.seq}"


class Published(Struct, frozen=True):
    """What became of a publish."""

    position: Position
    duplicate: bool = False
    """The same `message_id` had been published before; this is its old position, and nobody got it twice."""


class History(Struct, frozen=True):
    """What a topic remembers after some number."""

    top: Position
    """The last number given."""
    envelopes: list[Envelope]
    complete: bool
    """Whether every number from the one asked for up to `top` is there. Never act on half a history as if it were."""
    ages: Sequence[float] = ()
    """Of each of `envelopes`, for how many seconds the broker has had it, by its own clock."""
    whole: bool = True
    """Whether number 1 is the first event there ever was, as far as the broker knows: no numbering went before."""
    joints: Sequence[int] = ()
    """Numbers after which another server, or another life of it, went on. It may have had less than was told of."""
    breaks: Sequence[int] = ()
    """Those of `joints` at which it is known, or likely, that events were lost."""
    unread: frozenset[int] = frozenset()
    """Numbers of which there are events, but none that this node can read. They count as there."""


class Limits(Struct, frozen=True):
    """How many connections there may be (specification, Connection Limits)."""

    user: int = 10
    project: int = 100
    system: int = 10_000


class Person(Struct, frozen=True, omit_defaults=True):
    """Somebody who has a project open, and with how many connections: 0 within the grace, when they may come back."""

    user_id: str
    connections: int
    status: str = ""
    """What they say of themselves, such as "editing step s1"."""


class Arrived(Struct, frozen=True):
    """What became of an `enter`."""

    person: Person
    joined: bool
    """They were nowhere before: this is the first of maybe several windows."""


class Notice(Struct, frozen=True):
    """One person of whom viewers are to be told how it is, for they may believe something else."""

    project: str
    person: Person
    here: bool = True
    """Else they have left."""
    anew: bool = False
    """They may have been told as gone, or were not told as joined."""
    mark: str = ""
    """Which handing-out this is. Empty: somebody joined, and viewers were told at once."""


class Broker(ABC):
    """Carries envelopes between nodes, numbers them and remembers the last of them.

    * Numbers of a topic are 1, 2, 3 ... within an epoch. An epoch ends when its numbering is lost.
    * Every subscribed node's `arrive` gets each envelope of a topic at most once and in the order of numbers.
    * An envelope whose policy says `keep=False` is carried without a number and not remembered.
    * History is bounded in number, bytes and age; what falls out makes older positions incomplete, never wrong. Its
      age is told by the broker's clock, never by a publisher's.
    * A number that was told of is never given to another event of its epoch, also where the broker lost some.
    """

    inbox: "Inbox"
    """The other direction: what people send, on its way to backends."""

    node: str = ""
    """The name of this node among the others."""

    @abstractmethod
    async def start(
        self,
        arrive: Arrive,
        lost: Lost,
        hear: Hear = lambda _: None,
        *,
        moved: Moved = lambda _topic, _position: None,
        unread: Unread = lambda _topic, _seq: None,
    ) -> None:
        """Connect. From now on `arrive` gets what is published to subscribed topics, and `lost` tells of breaks.

        `hear` gets what nodes `tell` each other, `moved` tells of numbers that go on under another epoch, and `unread`
        of events that this node cannot read.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Let go of everything. The broker cannot be used after it."""

    @abstractmethod
    async def publish(self, envelope: Envelope) -> Published:
        """Number, remember and carry `envelope`; the same `message_id` again changes nothing.

        Raises `Unavailable` when the broker is away; then nothing was published or the same id may be tried again.
        """

    @abstractmethod
    async def subscribe(self, topic: str) -> Position:
        """Have `topic` arrive here. Returns its position: all numbers after it will arrive. Nested calls count."""

    @abstractmethod
    async def unsubscribe(self, topic: str) -> None:
        """Undo one `subscribe`."""

    @abstractmethod
    async def catch_up(self, topic: str) -> None:
        """Return when all that was published to a subscribed `topic` before this call has arrived, or was told as lost.

        Raises `Unavailable`.
        """

    @abstractmethod
    async def history(self, topic: str, after: int) -> History:
        """What is remembered of `topic` after number `after`, oldest first."""

    @abstractmethod
    async def position(self, topic: str) -> Position:
        """Where `topic` stands, listened to or not: whoever has everything up to there may go on from it.

        Raises `Unavailable`.
        """

    @abstractmethod
    async def claim(self, user: str, project: str, limits: Limits) -> str | None:
        """Take a seat for one connection; returns which limit (`user`, `project`, `system`) stands against it.

        Raises `Unavailable`; then none was taken.
        """

    @abstractmethod
    async def release(self, user: str, project: str) -> None:
        """Give the seat back. Also when the broker is away: it is free again as soon as it can be."""

    @abstractmethod
    async def enter(self, project: str, user: str) -> Arrived:
        """One more connection of `user` is here. Call `leave` for it, unless this raised: `Unavailable`."""

    @abstractmethod
    async def leave(self, project: str, user: str) -> Person | None:
        """One connection of `user` less; with the last one, the grace begins.

        Returns who is left of them. None: the broker cannot tell now, and makes it good as soon as it can.
        """

    @abstractmethod
    async def people(self, project: str) -> list[Person]:
        """Who is here, by name, those within the grace included."""

    @abstractmethod
    async def set_status(self, project: str, user: str, status: str) -> Person:
        """What `user` says of themselves. It is forgotten when they have left, and not noted of one who has."""

    @abstractmethod
    async def untold(self) -> list[Notice]:
        """Some whose grace is over, and some of whom viewers may believe what is not so. Ask every second.

        Each is handed out to one node, which tells viewers and then says `told`; else they are handed out again. The
        broker notes by itself whom a node left untold that ended or was cut off, and of whom two nodes speak.
        """

    @abstractmethod
    async def told(self, notices: Sequence[Notice]) -> None:
        """Viewers were told so. Who has changed meanwhile is handed out once more.

        Call it also, with no `mark`, for whoever `enter` said has joined: until then that is told again, should this
        node die.
        """

    @abstractmethod
    async def doubt(self, notices: Sequence[Notice]) -> None:
        """Viewers may not have been told of these people, or too late: hand them out when all of it has arrived.

        Of a notice only `project`, `person.user_id` and `anew` count.
        """

    @abstractmethod
    async def spend(self, user: str, cost: float, rate: float, burst: float) -> float:
        """Take `cost` from what `user` may send on all nodes together: `burst` at once and `rate` a second.

        Returns the seconds to wait, 0.0 when it passes. Never raises: who cannot be told of does pass. Each node has
        to keep the same limit by itself as well, before it asks.
        """

    @abstractmethod
    def tell(self, note: bytes, node: str | None = None) -> None:
        """Say something to one node, or to all. At most once, in order with what is published, without an answer."""

    @abstractmethod
    async def others(self) -> int:
        """How many nodes there are besides this one. Raises `Unavailable`."""

    @abstractmethod
    async def ready(self) -> bool:
        """Whether a publish now would go through."""


class Origin(Struct, frozen=True, omit_defaults=True):
    """Who sent a message, from where, and when."""

    project: str = ""
    user: str = ""
    session: str = ""
    at: float = 0.0
    """Seconds since the epoch, by the clock of the node that took it."""
    id: str = ""
    """Stays the same however often, and to however many groups, the message is handed out."""
    traceparent: str | None = None


class Taken(Struct, frozen=True):
    """A message that was handed to a consumer: its own until it is done with it, or falls silent."""

    kind: str
    entry: str
    """Its place in the inbox."""
    origin: Origin
    payload: bytes
    group: str
    consumer: str
    tries: int
    """How often it was handed out, this time included."""


class Dead(Struct, frozen=True):
    """A dead letter: a message that one group could not deal with, and why."""

    kind: str
    entry: str
    origin: Origin
    payload: bytes
    group: str
    tries: int
    reason: str


class Bounds(Struct, frozen=True):
    """How much of one kind an inbox keeps."""

    backlog: int = 100_000
    """Messages that may wait for a group, and as many dead letters."""
    unread: int = 1_000
    """Messages kept while there is no group at all: perhaps nobody will ever want them."""
    unread_for: float = 24 * 3600.0
    """Seconds after the last of them until they are forgotten."""

    def full(self, kind: str) -> Unavailable:
        """What the sender of one more is told."""
        return Unavailable(
            f"the backend is behind: {self.backlog:,} of `{kind}` wait for it already, and this one is not taken",
            retry_after=5.0,
        )


NEVER_DONE = "handed out as often as is tried, and never done"
"""Why a message is a dead letter that no consumer said anything about."""


class Inbox(ABC):
    """Where messages of people wait for backends, each kind (the `type`) by itself.

    * Each group gets every message; within a group one consumer gets it. New ones come in the order of `put`.
    * A group begins with the oldest message that is there, and is made by its first `take`.
    * At least once: what was handed out and is neither done nor held is handed out again, until it is a dead letter.
    * Nothing that a group has not done is dropped. When its backlog is full, nothing more is taken in.

    `taken` of one call are all of the same consumer. All methods raise `Unavailable` when the broker is away; what
    was asked for may have happened all the same.
    """

    @abstractmethod
    async def put(self, kind: str, origin: Origin, payload: bytes) -> None:
        """Have `payload` (the event's JSON) wait for all groups. Raises `Unavailable` also when one is too far behind."""

    @abstractmethod
    async def take(self, kinds: Sequence[str], group: str, consumer: str, count: int, wait: float) -> list[Taken]:
        """At most `count` new messages of each kind. Where there are none, waits for one, at most `wait` seconds.

        It may return with nothing before that.
        """

    @abstractmethod
    async def done(self, *taken: Taken) -> None:
        """They are dealt with: nobody of the group gets them again. So it is even where another has taken them over."""

    @abstractmethod
    async def hold(self, *taken: Taken) -> list[Taken]:
        """Their consumer is alive and still at it. Returns those that are no longer its own, which stay as they are."""

    @abstractmethod
    async def give_back(self, *taken: Taken, idle: float) -> None:
        """Their consumer will not deal with them: they count as left alone for `idle` seconds already.

        Those that are no longer its own stay as they are.
        """

    @abstractmethod
    async def reclaim(
        self, kinds: Sequence[str], group: str, consumer: str, *, idle: float, tries: int, count: int
    ) -> list[Taken]:
        """Take over at most `count` messages of each kind that were left alone for `idle` seconds, oldest first.

        What was handed out `tries` times already becomes a dead letter instead.
        """

    @abstractmethod
    async def bury(self, taken: Taken, reason: str) -> None:
        """Make it a dead letter at once, unless another consumer has taken it over."""

    @abstractmethod
    async def dead(self, kind: str, count: int = 100) -> list[Dead]:
        """The oldest dead letters of a kind, of all groups."""

    @abstractmethod
    async def revive(self, *dead: Dead) -> None:
        """Put dead letters back, for the group they were of and for no other. Their tries are counted anew."""
