"""One budget of messages for a user who is connected to several nodes."""

import asyncio
import time

from router.brokers.lease import key
from router.brokers.script import Scripts
from router.errors import Unavailable

__all__ = ["Rates"]

PATIENCE = 0.25
"""Seconds for the answer. The connection's pings wait with the message; see `router.middleware.rate`."""
PAUSE = 1.0
"""Seconds in which nothing is asked after an answer that did not come in time."""


class Rates:
    """The budgets of those who may be elsewhere too; nobody else's are asked for.

    An answer that is late or does not come counts as a pass: each node has a budget of its own before this one.
    """

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self._told: dict[str, int] = {}
        self._news = 0
        self._ask_from = 0.0

    def share(self, user: str) -> None:
        """`user` may have a connection on another node."""
        self._news += 1
        self._told[user] = self._news

    def unshare(self, user: str) -> None:
        """`user` has none here, or none elsewhere."""
        self._told.pop(user, None)

    def shared(self) -> list[str]:
        """Whose budgets are asked for."""
        return list(self._told)

    async def spend(self, user: str, cost: float, rate: float, burst: float) -> float:
        """See `Broker.spend`."""
        told = self._told.get(user)
        if told is None or not cost or time.monotonic() < self._ask_from:
            return 0.0
        keys = (key(f"rate:{user}"), key(f"user:{user}"))
        try:
            async with asyncio.timeout(PATIENCE):
                wait, leases = await self._scripts.call("rate", keys, (cost, rate, burst))
        except (Unavailable, TimeoutError):
            self._ask_from = time.monotonic() + PAUSE
            return 0.0
        if leases <= 1 and self._told.get(user) == told:  # and nobody said otherwise meanwhile
            self.unshare(user)
        return float(wait)
