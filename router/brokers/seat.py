"""Seats for connections, counted over all nodes, that a killed node cannot keep."""

import asyncio
import contextlib
from collections import Counter

from redis.asyncio import Redis

from router.brokers.base import Limits
from router.brokers.layout import PREFIX
from router.brokers.script import AWAY, Scripts
from router.errors import Unavailable

__all__ = ["Seats"]

BASE = f"{PREFIX}{{limits}}"
NODES = f"{BASE}:nodes"
FORGET = 3600_000
"""Milliseconds after which a node that is gone is not even remembered as gone."""


class Seats:
    """This node's seats, held under a lease (seconds) that `keep` prolongs: one beat for all connections together.

    When the lease runs out, other nodes stop counting this one's seats at once. A node that comes back after that
    writes them anew.
    """

    def __init__(self, redis: Redis, scripts: Scripts, node: str, lease: float) -> None:
        self._redis = redis
        self._scripts = scripts
        self._node = node
        self._lease = lease
        self._held: Counter[str] = Counter()

    async def claim(self, user: str, project: str, limits: Limits) -> str | None:
        """See `Broker.claim`."""
        keys = _keys(user, project)
        arguments = (self._node, limits.system, limits.user, limits.project)
        answer = await self._scripts.call("claim", (NODES, *keys), arguments)
        if answer == b"lease":
            await self.beat()
            answer = await self._scripts.call("claim", (NODES, *keys), arguments)
        if answer:
            return str(answer.decode())
        self._held.update(keys)
        return None

    async def release(self, user: str, project: str) -> None:
        """See `Broker.release`. While the server is away the lease does it."""
        keys = _keys(user, project)
        for key in keys:
            self._held[key] -= 1
            if self._held[key] <= 0:
                del self._held[key]
        with contextlib.suppress(Unavailable):
            await self._scripts.call("release", keys, (self._node,))

    async def keep(self) -> None:
        """Prolong the lease for ever."""
        while True:
            await asyncio.sleep(self._lease / 3)
            with contextlib.suppress(*AWAY):
                await self.beat()

    async def beat(self) -> None:
        """Prolong the lease once. The server's clock decides, whatever the nodes' clocks say."""
        seconds, micros = await self._redis.time()
        now = seconds * 1000 + micros // 1000
        ends = await self._redis.zscore(NODES, self._node)
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.zadd(NODES, {self._node: now + int(self._lease * 1000)})
            pipeline.zremrangebyscore(NODES, "-inf", now - FORGET)
            if ends is None or ends < now:
                for key, count in self._held.items():
                    pipeline.hset(key, self._node, str(count))
            await pipeline.execute()

    async def leave(self) -> None:
        """Give up the lease, and with it all seats."""
        with contextlib.suppress(*AWAY):
            await self._redis.zrem(NODES, self._node)


def _keys(user: str, project: str) -> tuple[str, str, str]:
    return f"{BASE}:all", f"{BASE}:user:{user}", f"{BASE}:project:{project}"
