"""Who acknowledged a critical event, and who did not, for the publisher that wants to know."""

import asyncio
from collections.abc import Callable, Iterable

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
        self._watchers: dict[tuple[str, str], Callable[[str], None]] = {}

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
        if key in self._watchers:
            self._watchers[key](user)
        receipt = self._open.get(key)
        if receipt is not None:
            receipt.done.add(user)
            receipt.look()

    def watch(self, topic: str, message_id: str, tell: Callable[[str], None]) -> None:
        """Somebody on another node waits for `message_id`: `tell` of everybody who acknowledges it here."""
        self._watchers[topic, message_id] = tell
        self._remember(topic, message_id, set())

    def known(self, topic: str, message_id: str) -> set[str]:
        """Who has acknowledged `message_id` here, as far as it was watched."""
        return set(self._recent.get((topic, message_id), ()))

    def _remember(self, topic: str, message_id: str, users: set[str]) -> None:
        self._recent.setdefault((topic, message_id), set()).update(users)
        if len(self._recent) > REMEMBERED:
            oldest = next(iter(self._recent))
            del self._recent[oldest]
            self._watchers.pop(oldest, None)

    async def wait(self, topic: str, message_id: str, expected: Iterable[str], within: float) -> Receipt:
        """Wait until all `expected` users have acknowledged, at most `within` seconds, and close the receipt."""
        receipt = self._open.setdefault((topic, message_id), _Open())  # another who asked may have closed it
        receipt.done |= self.known(topic, message_id)
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
            self._remember(topic, message_id, receipt.done)
        return Receipt(sorted(receipt.done), sorted(receipt.expected - receipt.done))
