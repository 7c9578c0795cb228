"""Who acknowledged a critical event, and who did not, for the publisher that wants to know."""

import asyncio
from collections.abc import Iterable

from msgspec import Struct

__all__ = ["Receipt", "Receipts"]


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

    def open(self, topic: str, message_id: str) -> None:
        """From now on note who acknowledges `message_id`."""
        self._open.setdefault((topic, message_id), _Open())

    def drop(self, topic: str, message_id: str) -> None:
        """It was never published."""
        self._open.pop((topic, message_id), None)

    def acknowledged(self, topic: str, message_id: str | None, user: str) -> None:
        """`user` acknowledged `message_id`."""
        receipt = self._open.get((topic, message_id or ""))
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
        return Receipt(sorted(receipt.done), sorted(receipt.expected - receipt.done))
