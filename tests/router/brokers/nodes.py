"""Parts of several nodes on a real server, without pub/sub and sockets, and with a network that loses what it is told to."""

from secrets import token_hex

import redis.asyncio

from router.brokers.lease import ALL, NODES, Lease, key
from router.brokers.rate import Rates
from router.brokers.roster import Roster
from router.brokers.script import Scripts
from router.brokers.seat import Seats


class LossyScripts(Scripts):
    """Loses, as often as it is told, a request on its way there (`asked`) or its answer on its way back (`answer`)."""

    def __init__(self, client, **options):
        super().__init__(client, **options)
        self.lose = []

    async def _send(self, calls):
        lost = self.lose.pop(0) if self.lose else None
        if lost == "asked":
            raise ConnectionError
        answers = await super()._send(calls)
        if lost == "answer":
            raise ConnectionError
        return answers


class Part:
    """Lease, seats and roster of one node. It beats when it is told to.

    Unless it shall, it does not `compare` the server's counts with its own: that would make good every other mistake.
    """

    def __init__(self, client, *, grace=0.0, length=60.0, patience=1.0, compare=False):
        self.name = token_hex(4)
        self.scripts = LossyScripts(client, patience=patience)
        self.lease = Lease(self.scripts, self.name, length, grace)
        self.lease.grace_ms = int(grace * 1000)  # also one that is shorter than a node's would be
        self.lease._under_way = 0 if compare else 1
        self.rates = Rates(self.scripts)
        self.seats = Seats(self.lease, self.rates)
        self.roster = Roster(client, self.scripts, self.lease, self.name)


class Table:
    """What the server has, seen from outside."""

    def __init__(self, client):
        self.client = client

    async def seats(self, name):
        """How many seats leases that have not ended hold of `all`, `user:<user>` or `project:<project>`."""
        seconds, _ = await self.client.time()
        alive = set(await self.client.zrangebyscore(NODES, seconds * 1000, "+inf"))
        return sum(int(count) for lease, count in (await self.client.hgetall(key(name))).items() if lease in alive)

    async def total(self):
        return await self.seats(ALL.rpartition(":")[2])

    async def lapse(self, part):
        """As if `part` had not beaten for too long."""
        await self.client.zadd(NODES, {part.lease.id: 1}, xx=True)

    async def keys(self):
        """All keys that count something."""
        prefix = key("")
        return {found.decode().removeprefix(prefix) async for found in self.client.scan_iter(f"{prefix}*")} - {
            "nodes",
            "epoch",
        }


def connect(url):
    return redis.asyncio.Redis.from_url(url, retry=None)
