"""The contract that every broker keeps. One suite, tests/contracts/test_broker.py, runs on all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from msgspec import Struct

from router.envelope import Envelope

__all__ = ["Arrive", "Broker", "History", "Limits", "Lost", "Position", "Published"]

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
        """Take a seat for one connection; returns which limit (`user`, `project`, `system`) stands against it."""

    @abstractmethod
    async def release(self, user: str, project: str) -> None:
        """Give the seat back."""

    @abstractmethod
    async def ready(self) -> bool:
        """Whether a publish now would go through."""
