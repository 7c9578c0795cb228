"""What is done for all connections every second, by one task for the whole node."""

import asyncio
import heapq
import logging
import time
from collections.abc import Awaitable, Callable
from random import uniform

from router import wire
from router.errors import CloseCode, Unavailable, place
from router.flow import Router
from router.lapse import Closing
from router.session import Session

__all__ = ["Upkeep"]

log = logging.getLogger("router")

WARN_BEFORE = 30.0
"""Seconds before its expiry that a token is asked for anew."""
WARN_SPREAD = 5.0
"""Seconds over which these warnings are spread, so that a morning's logins do not all come back at once."""


class Upkeep:
    """Pings, expiring tokens, silent and slow clients, acknowledgements, lapses, presence, the audit log.

    Connections are spread over as many slots as seconds lie between pings, and each second looks at one slot: the
    work is even and no connection needs a timer.
    """

    def __init__(
        self,
        router: Router,
        *,
        ping_every: float = 30.0,
        silence: float = 75.0,
        slow_deadline: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._router = router
        self.ping_every = ping_every
        self._silence = silence
        self._slow_deadline = slow_deadline
        self._clock, self._wall = clock, wall
        self._slots: list[set[Session]] = [set() for _ in range(max(1, round(ping_every)))]
        self._slot_of: dict[Session, int] = {}
        self._closings: list[Closing] = []
        self._now = 0
        self._expiring: list[tuple[float, int, Session, bool, float]] = []
        self._count = 0
        self._telling: asyncio.Task[None] | None = None
        router.on_refresh = self.expect_expiry

    def add(self, session: Session) -> None:
        """Look after `session`."""
        slot = self._now % len(self._slots)
        self._slots[slot].add(session)
        self._slot_of[session] = slot
        self.expect_expiry(session)

    def remove(self, session: Session) -> None:
        """`session` is gone."""
        slot = self._slot_of.pop(session, None)
        if slot is not None:
            self._slots[slot].discard(session)

    def expect_expiry(self, session: Session) -> None:
        """Warn before, and close after, the expiry of the identity that `session` has now."""
        at = session.identity.expires_at
        if at != float("inf"):
            self._push(at - WARN_BEFORE - uniform(0, WARN_SPREAD), session, last=False)
            self._push(at + self._router.auth.grace, session, last=True)

    def _push(self, at: float, session: Session, *, last: bool) -> None:
        self._count += 1
        if len(self._expiring) > 4 * len(self._slot_of) + 64:  # most of it is about sessions that are gone
            self._expiring = [
                entry
                for entry in self._expiring
                if entry[2] in self._slot_of and entry[4] == entry[2].identity.expires_at
            ]
            heapq.heapify(self._expiring)
        heapq.heappush(self._expiring, (at, self._count, session, last, session.identity.expires_at))

    async def run(self) -> None:
        """Tick every second until cancelled."""
        try:
            while True:
                await asyncio.sleep(1)
                await self.tick()
        finally:
            if self._telling is not None:
                self._telling.cancel()
                await asyncio.gather(self._telling, return_exceptions=True)

    async def tick(self) -> None:
        """One second's work. A part that fails is logged, and the others are done all the same."""
        self._now += 1
        for part in (self._ping, self._expire, self._end_slow, self._router.audit.flush):
            try:
                part()
            except Exception as error:
                _failed(error)
        if self._telling is None or self._telling.done():
            # By itself: it asks the broker, and pings do not wait for one that is away.
            self._telling = asyncio.create_task(_attempt(self._router.presence.tick))
        for work in (self._redeliver, self._close_lapsed):
            await _attempt(work)

    def _ping(self) -> None:
        now = self._clock()
        for session in list(self._slots[self._now % len(self._slots)]):
            port = self._router.hub.port(session)
            if port is None:
                continue
            heard = port.heard()
            if heard is not None and now - heard > self._silence:
                port.abort()
                continue
            if session not in self._router.hub.slow:
                self._router.hub.say(session, _PING)
                self._router.hub.ping(session)  # a plain client does not answer `ping`; its browser answers this one

    def _expire(self) -> None:
        now = self._wall()
        while self._expiring and self._expiring[0][0] <= now:
            _, _, session, last, expected = heapq.heappop(self._expiring)
            port = self._router.hub.port(session)
            expires_at = session.identity.expires_at
            if port is None or expires_at != expected:
                continue
            if last:
                port.close(CloseCode.UNAUTHENTICATED, "token expired")
            else:
                left = max(0.0, round(expires_at - now, 3))
                self._router.hub.say(session, wire.encode(wire.TokenExpiring(expires_in=left)))

    def _end_slow(self) -> None:
        late = self._clock() - self._slow_deadline
        for session, since in list(self._router.hub.slow.items()):
            port = self._router.hub.port(session)
            if since <= late and port is not None:
                # A close frame would only join the queue that does not move; the client sees the cut and resumes.
                self._router.metrics.error(str(int(CloseCode.TOO_SLOW)))
                port.abort()

    async def _close_lapsed(self) -> None:
        self._closings += self._router.lapses.due()
        while self._closings:
            closing = self._closings[0]
            try:
                await self._router.publish(closing.audience, closing.event, message_id=closing.message_id)
            except Unavailable:
                return  # with the broker back, it is tried again
            except Exception as error:  # the plugin's own event cannot be published: no use to try again
                _failed(error)
            self._closings.pop(0)
            log.warning("closed after silence", extra={"event": "lapsed", "message_id": closing.message_id})

    async def _redeliver(self) -> None:
        router = self._router
        for session, envelope in await router.hub.redeliver(self._clock(), router.pace.ack_tries):
            router.metrics.unacknowledged.inc()
            router.audit.unacknowledged(envelope, session.user, session.id)


async def _attempt(work: Callable[[], Awaitable[None]]) -> None:
    try:
        await work()
    except Exception as error:
        _failed(error)


def _failed(error: Exception) -> None:
    what = f"{type(error).__name__} at {place(error)}"
    log.error("upkeep failed: %s", what, extra={"event": "upkeep_failed"})


_PING = wire.encode(wire.Ping())
