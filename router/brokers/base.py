"""The contract that every broker keeps. One suite, tests/contracts/test_broker.py, runs on all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from msgspec import Struct

from router.envelope import Envelope

__all__ = ["Arrive", "Arrived", "Broker", "History", "Limits", "Lost", "Person", "Position", "Published"]

Arrive: TypeAlias = Callable[[Envelope], None]
"""Takes one envelope in. Called in the order of numbers within a topic; returns at once."""


Lost: TypeAlias = Callable[[str, "Position"], None]
"""Told that a topic's numbers do not join up with what arrived before: clients must reload, and go on from there."""


class Position(Struct, frozen=True):
    """A place in a topic's numbering. Numbers of different epochs say nothing about each other."""

    epoch: str
    seq: int


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


class Broker(ABC):
    """Carries envelopes between nodes, numbers them and remembers the last of them.

    * Numbers of a topic are 1, 2, 3 ... within an epoch. An epoch ends when its numbering is lost.
    * Every subscribed node's `arrive` gets each envelope of a topic at most once and in the order of numbers.
    * An envelope whose policy says `keep=False` is carried without a number and not remembered.
    * History is bounded in number, bytes and age; what falls out makes older positions incomplete, never wrong.
    """

    @abstractmethod
    async def start(self, arrive: Arrive, lost: Lost) -> None:
        """Connect. From now on `arrive` gets what is published to subscribed topics, and `lost` tells of breaks."""

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
    async def history(self, topic: str, after: int) -> History:
        """What is remembered of `topic` after number `after`, oldest first."""

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
        """What `user` says of themselves. It is forgotten when they have left."""

    @abstractmethod
    async def departed(self) -> list[tuple[str, str]]:
        """Project and user of some whose grace is over. Each is told to one node, which is to ask every second."""

    @abstractmethod
    async def returned(self) -> list[tuple[str, str]]:
        """Project and user of some who are here, but may have been told as departed or not at all.

        That is so when this node was cut off for long, or an answer was lost. Each is told once, to this node.
        """

    @abstractmethod
    async def spend(self, user: str, cost: float, rate: float, burst: float) -> float:
        """Take `cost` from what `user` may send on all nodes together: `burst` at once and `rate` a second.

        Returns the seconds to wait, 0.0 when it passes. Never raises: who cannot be told of does pass. Each node has
        to keep the same limit by itself as well, before it asks.
        """

    @abstractmethod
    async def ready(self) -> bool:
        """Whether a publish now would go through."""
