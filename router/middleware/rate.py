"""How fast one user may send."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from router.envelope import Envelope
from router.errors import RateLimited
from router.pacing import TokenBucket
from router.pipeline import Forward

__all__ = ["RateLimit", "Spend"]

Spend: TypeAlias = Callable[[str, float, float, float], Awaitable[float]]
"""`(user, cost, rate, burst)`: take from the budget that all nodes share. Returns the seconds to wait, 0.0 to pass."""


class RateLimit:
    """Inbound: `rate` messages a second a user over all of the user's connections, `burst` at once. Outbound: free.

    What passes here is then taken from the budget that all nodes share. What that one declines stays taken here, so
    that nobody can have us ask for more than `rate` a second. The specification: "User messages: 10/second; System events: Unlimited". It refuses and never sleeps: a message
    that waited here would hold up the connection's pongs.
    """

    def __init__(
        self, clock: Callable[[], float], *, rate: float = 10.0, burst: float = 10.0, spend: Spend | None = None
    ) -> None:
        self._clock = clock
        self._rate = rate
        self._burst = burst
        self._spend = spend
        self._buckets: dict[str, TokenBucket] = {}
        self._sweep_at = 1024

    async def __call__(self, envelope: Envelope, forward: Forward) -> None:
        if envelope.leg == "inbound" and envelope.sender is not None:
            user, cost = envelope.sender.user, envelope.policy.cost
            wait = self._bucket(user).take(self._clock(), cost)
            if not wait and self._spend is not None:
                wait = await self._spend(user, cost, self._rate, self._burst)
            if wait:
                raise RateLimited(f"more than {self._rate:g} messages a second", retry_after=wait)
        await forward(envelope)

    def _bucket(self, user: str) -> TokenBucket:
        bucket = self._buckets.get(user)
        if bucket is None:
            if len(self._buckets) >= self._sweep_at:
                now = self._clock()
                self._buckets = {name: kept for name, kept in self._buckets.items() if not kept.full(now)}
                self._sweep_at = max(1024, 2 * len(self._buckets))
            bucket = self._buckets[user] = TokenBucket(self._rate, self._burst)
        return bucket
