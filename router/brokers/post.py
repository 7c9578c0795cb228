"""Publishes to topics: one script a message, many messages in one round trip."""

import asyncio
from secrets import token_hex
from typing import TypeAlias

from router.brokers.base import Position, Published
from router.brokers.layout import encode_header, names_of
from router.brokers.script import Scripts
from router.envelope import Envelope

__all__ = ["FORGET", "Post", "published"]

FORGET = 7 * 24 * 3600.0
"""Seconds after a topic's last event in which its numbers are not given again, and `since=0` is told that some are gone."""

QUIET_MS = 300_000
"""Least life of a numbering without an event: several of the looks by which those who listen prolong it."""

Answer: TypeAlias = tuple[bytes, int, int]


class Post:
    """Numbers an envelope, remembers it and carries it to all nodes. Needs no subscription, so backends use it too.

    `message_id` makes a publish safe to repeat for as long as history lasts; one without it gets a mark by which the
    script knows its own repeated try.
    """

    def __init__(
        self,
        scripts: Scripts,
        verb: str,
        *,
        max_events: int = 1000,
        max_age: float = 300.0,
        forget: float = FORGET,
    ) -> None:
        """`max_age`, `forget`: seconds that events, and a topic's numbering, are remembered after the last of them."""
        self._scripts = scripts
        self._verb = verb
        self._max_events = max_events
        self.log_ms = int(max_age * 1000)
        self.quiet_ms = max(self.log_ms, QUIET_MS)
        self.meta_ms = int(max(forget, 2 * max_age) * 1000)

    async def publish(self, envelope: Envelope) -> Published:
        """See `Broker.publish`."""
        return published(await self.ask(envelope))

    def ask(self, envelope: Envelope) -> "asyncio.Future[Answer]":
        """As `publish`, for those who have several; `published` reads what comes of it."""
        names = names_of(envelope.topic)
        id_key = names.meta if envelope.message_id is None else f"{names.base}:id:{envelope.message_id}"
        assert envelope.payload is not None
        arguments = (
            b"%b\n%b" % (encode_header(envelope), envelope.payload),
            token_hex(8),
            self._verb,
            self._max_events,
            self.log_ms,
            self.meta_ms,
            int(envelope.policy.keep),
        )
        stream = names.log if envelope.policy.keep else names.loose
        return self._scripts.ask("publish", (names.meta, stream, id_key), arguments)

    async def position(self, topic: str) -> Position:
        """See `Broker.position`."""
        names = names_of(topic)
        arguments = ("", token_hex(8), self.quiet_ms)
        epoch, seq, *_ = await self._scripts.run("history", (names.meta, names.log, names.loose), arguments)
        return Position(epoch.decode(), seq)


def published(answer: Answer) -> Published:
    """What the script answered."""
    epoch, seq, duplicate = answer
    return Published(Position(epoch.decode(), seq), duplicate=bool(duplicate))
