"""Seats for connections, counted over all nodes, that a killed node cannot keep."""

from router.brokers.base import Limits
from router.brokers.layout import PREFIX
from router.brokers.lease import Lease, key
from router.brokers.rate import Rates

__all__ = ["Seats", "node_channel"]


def node_channel(node: str) -> str:
    """A node's own channel: its probes, and what other nodes tell it."""
    return f"{PREFIX}node:{node}"


class Seats:
    """This node's seats, held under its lease: they count as long as it lasts.

    Whoever takes one learns whether its user has seats on other nodes, and those nodes are told (`tell`): from then
    on they share the user's rate.
    """

    def __init__(self, lease: Lease, rates: Rates) -> None:
        self._lease = lease
        self._rates = rates

    async def claim(self, user: str, project: str, limits: Limits) -> str | None:
        """See `Broker.claim`."""
        entries = _entries(user, project)
        arguments = (limits.system, limits.user, limits.project, user, node_channel(""))
        full, elsewhere = await self._lease.take("claim", entries, tuple(map(key, entries)), arguments)
        if full:
            return str(full.decode())
        if elsewhere:
            self._rates.share(user)
        return None

    async def release(self, user: str, project: str) -> None:
        """See `Broker.release`."""
        entries = _entries(user, project)
        await self._lease.give("release", entries, tuple(map(key, entries)), ())
        if not self._has_seat(user):
            self._rates.unshare(user)

    def tell(self, data: bytes) -> None:
        """What another node said on our channel: `elsewhere <user>`, who has a seat there from now on."""
        word, _, user = data.partition(b" ")
        if word == b"elsewhere":
            self._rates.share(user.decode())

    def missed(self) -> None:
        """What other nodes said may have been lost: any user may have a seat there."""
        for entry in self._lease.held:
            kind, _, user = entry.partition(":")
            if kind == "user":
                self._rates.share(user)

    def sweep(self) -> None:
        """Forget users whose news came when their last seat here had just been given back."""
        for user in self._rates.shared():
            if not self._has_seat(user):
                self._rates.unshare(user)

    def _has_seat(self, user: str) -> bool:
        return f"user:{user}" in self._lease.held


def _entries(user: str, project: str) -> tuple[str, str, str]:
    return "all", f"user:{user}", f"project:{project}"
