"""Who acknowledged a critical event, and who did not, for the publisher that wants to know."""

import asyncio
from collections.abc import Iterable

from msgspec import Struct

__all__ = ["Receipt", "Receipts"]


REMEMBERED = 1000
"""Receipts remembered after they were given, for a publisher that asks again because it never got the answer."""


class Receipt(Struct, frozen=True):
    """How a critical event fared, by user: a person with two windows has acknowledged it in either."""

    acknowledged: list[str]
    missing: list[str]


class _Open:
    """A receipt that somebody waits for."""

    def __init__(self) -> None:
        self.expected: set[str] = set()
        self.done: set[str] = set()
        self.complete = asyncio.Event()

    def look(self) -> None:
        if self.expected <= self.done:
            self.complete.set()


class Receipts:
    """The receipts that publishers wait for, by topic and message id. Nothing is kept of events that nobody asks about."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], _Open] = {}
        self._recent: dict[tuple[str, str], set[str]] = {}

    def open(self, topic: str, message_id: str) -> None:
        """From now on note who acknowledges `message_id`."""
        receipt = self._open.setdefault((topic, message_id), _Open())
        receipt.done |= self._recent.get((topic, message_id), set())

    def drop(self, topic: str, message_id: str) -> None:
        """It was never published."""
        self._open.pop((topic, message_id), None)

    def acknowledged(self, topic: str, message_id: str | None, user: str) -> None:
        """`user` acknowledged `message_id`."""
        key = (topic, message_id or "")
        if key in self._recent:
            self._recent[key].add(user)
        receipt = self._open.get(key)
        if receipt is not None:
            receipt.done.add(user)
            receipt.look()

    async def wait(self, topic: str, message_id: str, expected: Iterable[str], within: float) -> Receipt:
        """Wait until all `expected` users have acknowledged, at most `within` seconds, and close the receipt."""
        receipt = self._open[topic, message_id]
        receipt.expected.update(expected)
        receipt.complete.clear()
        receipt.look()
        try:
            async with asyncio.timeout(within):
                await receipt.complete.wait()
        except TimeoutError:
            pass  # the answer tells who is missing
        finally:
            self._open.pop((topic, message_id), None)
            self._recent[topic, message_id] = receipt.done
            if len(self._recent) > REMEMBERED:
                del self._recent[next(iter(self._recent))]
        return Receipt(sorted(receipt.done), sorted(receipt.expected - receipt.done))
