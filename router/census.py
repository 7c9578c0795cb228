"""Receipts over all nodes: who shall get a critical event elsewhere, and who acknowledged it there."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count

import msgspec
from msgspec import Struct

from router.brokers.base import Broker
from router.receipt import Receipts

__all__ = ["Census"]

ANSWER_WITHIN = 2.0
"""Seconds that the other nodes have to say who is there; then who said nothing is left out."""

Present = Callable[[str, str], Awaitable[set[str]]]
"""`(topic, grant)`: the users here who shall get such an event, asked in the topic's turn."""


class Watch(Struct, frozen=True, tag="watch"):
    """From now on tell `node` who acknowledges this event with you."""

    node: str
    topic: str
    message_id: str


class Question(Struct, frozen=True, tag="question"):
    """Tell `node` who shall get this event with you, and who has acknowledged it already."""

    node: str
    number: int
    topic: str
    message_id: str
    grant: str


class Answer(Struct, frozen=True, tag="answer"):
    number: int
    expected: list[str]
    acknowledged: list[str]


class Acknowledged(Struct, frozen=True, tag="acknowledged"):
    topic: str
    message_id: str
    user: str


_decode = msgspec.json.Decoder(Watch | Question | Answer | Acknowledged).decode
_encode = msgspec.json.Encoder().encode


class Census:
    """Asks all other nodes, and answers when they ask. With one node there is nobody to ask."""

    def __init__(self, broker: Broker, receipts: Receipts, present: Present) -> None:
        self._broker = broker
        self._receipts = receipts
        self._present = present
        self._numbers = count(1)
        self._asked: dict[int, tuple[int, set[str], asyncio.Event]] = {}
        self._answering: set[asyncio.Task[None]] = set()

    def watch(self, topic: str, message_id: str) -> None:
        """Have all nodes tell us who acknowledges an event; to be said before it is published."""
        self._broker.tell(_encode(Watch(self._broker.node, topic, message_id)))

    async def expected(self, topic: str, message_id: str, grant: str, within: float) -> set[str]:
        """Who shall get an event on the other nodes. Waits for them at most `within` seconds. Raises `Unavailable`."""
        others = await self._broker.others()
        if not others:
            return set()
        number = next(self._numbers)
        users: set[str] = set()
        complete = asyncio.Event()
        self._asked[number] = (others, users, complete)
        try:
            self._broker.tell(_encode(Question(self._broker.node, number, topic, message_id, grant)))
            async with asyncio.timeout(min(within, ANSWER_WITHIN)):
                await complete.wait()
        except TimeoutError:
            pass  # a node that has just died says nothing
        finally:
            del self._asked[number]
        return users

    def hear(self, note: bytes) -> None:
        """What another node said."""
        match _decode(note):
            case Watch(node, topic, message_id):
                if node != self._broker.node:
                    self._receipts.watch(topic, message_id, lambda user: self._tell_done(node, topic, message_id, user))
            case Question() as question:
                if question.node != self._broker.node:
                    task = asyncio.get_running_loop().create_task(self._answer(question))
                    self._answering.add(task)
                    task.add_done_callback(self._answering.discard)
            case Answer(number, expected, acknowledged):
                self._answered(number, set(expected) | set(acknowledged))
            case Acknowledged(topic, message_id, user):
                self._receipts.acknowledged(topic, message_id, user)

    def _tell_done(self, node: str, topic: str, message_id: str, user: str) -> None:
        self._broker.tell(_encode(Acknowledged(topic, message_id, user)), node)

    async def _answer(self, question: Question) -> None:
        expected = await self._present(question.topic, question.grant)
        done = self._receipts.known(question.topic, question.message_id)
        for user in sorted(done):
            self._tell_done(question.node, question.topic, question.message_id, user)
        self._broker.tell(_encode(Answer(question.number, sorted(expected), sorted(done))), question.node)

    def _answered(self, number: int, users: set[str]) -> None:
        asked = self._asked.get(number)
        if asked is not None:
            others, found, complete = asked
            found |= users
            others -= 1
            self._asked[number] = (others, found, complete)
            if others <= 0:
                complete.set()
