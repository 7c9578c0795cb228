"""This node's lease: what it holds counts, on all nodes, until the lease ends. One beat prolongs all of it."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from secrets import token_hex
from typing import Any

from router.brokers.layout import PREFIX
from router.brokers.script import Scripts
from router.errors import Unavailable, place

__all__ = ["ANEW", "DOUBTED", "LEAVING", "NODES", "SETTLE", "Lease", "key"]

log = logging.getLogger("router")

CHUNK = 200
"""Entries that one script writes down, or clears away: about a millisecond of the server."""
TRIES = 3
"""How often something is asked for anew, each time under another lease."""
GIVE_UP = 2.0
"""Seconds that the end of a lease may take. After that it ends by itself."""
BEATS = 3
"""Beats in the length of a lease: one that is lost does no harm."""
SETTLE = 1000
"""Milliseconds after which what was under way when somebody's count changed has arrived, or its node says so."""


def key(name: str) -> str:
    """Where something is kept that scripts of several nodes count together. The braces: in one slot of a cluster."""
    return f"{PREFIX}{{limits}}:{name}"


NODES, LEAVING, EPOCH, ALL = key("nodes"), key("leaving"), key("epoch"), key("all")
DOUBTED, ANEW = key("doubted"), key("anew")
"""Of whom viewers are told once more, and who of them may be taken for gone. Nodes of older versions know neither."""


class Lease:
    """What this node holds (seats, people), written down on the server under an id that ends unless it is prolonged.

    Whenever it is uncertain what the server has (an answer was lost, a script may have run twice, the lease ended,
    the server forgot), there is one way back: everything that is held is written down anew under a new id. In the
    moment in which that begins to count the old id ends, and with it whatever was wrong about it. Scripts refuse an
    id that has ended, so that what reaches the server late changes nothing.

    The server's clock decides. What an ended lease left behind is cleared away by whichever node beats next.
    """

    def __init__(self, scripts: Scripts, node: str, length: float, grace: float) -> None:
        """`length`, and `grace` for people who are nowhere else when a lease ends: seconds."""
        self._scripts = scripts
        self._node = node
        self._length = length
        self._ms = int(length * 1000)
        self.grace_ms = max(SETTLE, int(grace * 1000))
        """Not less than what is told of somebody's last connection may need: else that would come after `left`."""
        self.id = f"{node}.0"
        self.held: Counter[str] = Counter()
        """Entries with their counts: `all`, `user:<user>` and `project:<project>` are seats, `here:<project> <user>`
        is a person."""
        self.returned: set[str] = set()
        """People who are here and may have been told otherwise: the server had forgotten them, or an answer was lost."""
        self.changed: set[str] = set()
        """People who are here, and whose connections counted otherwise for a while, or not at all."""
        self._unsure: set[str] = set()
        """What was asked for without an answer since the last lease."""
        self._number = 0
        self._epoch = ""
        self.forgotten = False
        """The server has forgotten everything; until somebody has taken note of it."""
        self._doubtful = False
        self._renewal: asyncio.Task[None] | None = None
        self._left_behind = asyncio.Event()
        """A lease was given up: what it had is to be cleared away soon."""
        self._under_way = 0
        self._done = 0

    # -- taking and giving back

    async def take(
        self, script: str, entries: Sequence[str], keys: tuple[str, ...], arguments: tuple[Any, ...]
    ) -> list[Any]:
        """Run a script that adds one to `entries`; its first word is empty when it did. Returns its answer.

        Raises `Unavailable`; then nothing is held. Waits while everything is written down anew.
        """
        uncertain = False
        for _ in range(TRIES):
            while self._renewal is not None:
                await asyncio.shield(self._renewal)
            id_ = self.id
            try:
                answer = await self._call(script, keys, arguments)
            except BaseException:
                self._unsure.update(entries)
                raise
            if not answer[0] and self.id == id_ and self._renewal is None:
                self.held.update(entries)
                if uncertain:  # also where the new lease was on its way already, and took no notice of it
                    self.returned.update(entries)
                return answer
            if answer[0] == b"again" or not answer[0]:
                self._unsure.update(entries)
                uncertain = True
            elif answer[0] != b"lease":
                return answer
            if self.id == id_:
                await self.renew()
        raise Unavailable("the broker cannot tell what this node holds", retry_after=1.0)

    async def give(
        self, script: str, entries: Sequence[str], keys: tuple[str, ...], arguments: tuple[Any, ...]
    ) -> list[Any] | None:
        """Run a script that takes one off `entries`. Returns its answer; None when that is made good later."""
        for entry in entries:
            self.held[entry] -= 1
            if self.held[entry] <= 0:
                del self.held[entry]
        if self._renewal is not None:  # which may have written it down already
            self._doubtful = True
            return None
        try:
            answer = await self._call(script, keys, arguments)
        except Unavailable:
            return None
        if answer[0]:
            self._doubtful = True
            return None
        return answer

    async def _call(self, script: str, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> list[Any]:
        self._under_way += 1
        try:
            answer: list[Any] = await self._scripts.call(
                script, (NODES, _entries(self.id), *keys), (self.id, *arguments)
            )
            return answer
        except BaseException:  # also when whoever asked has gone: the server may have done it all the same
            self._doubtful = True
            raise
        finally:
            self._under_way -= 1
            self._done += 1

    async def others(self) -> int:
        """How many other nodes have a lease that has not ended. Raises `Unavailable`."""
        leases = await self._scripts.call("alive", (NODES,), ())
        return len({lease.decode().rpartition(".")[0] for lease in leases} - {self._node})

    # -- holding

    async def keep(self) -> None:
        """Prolong the lease for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._length / BEATS):
                    await self._left_behind.wait()
            self._left_behind.clear()
            try:
                await self.beat()
            except Unavailable:
                pass  # told by whoever needs the broker for more than this
            except Exception as error:  # a beat that fails must not be the last one
                what = f"{type(error).__name__} at {place(error)}"
                log.error("the lease could not be kept: %s", what, extra={"event": "lease_failed"})

    async def beat(self) -> None:
        """Prolong the lease, or take a new one if there is any doubt; clear away what others left behind.

        Raises `Unavailable`. What the server counts is compared with what is held here.
        """
        before = (self._under_way, self._done)
        alive, *counted = await self._scripts.call("beat", (NODES, ALL, _entries(self.id)), (self.id, self._ms))
        still = before == (0, self._done) and not self._under_way
        if not alive or self._doubtful or (still and counted != [self.held["all"], len(self.held)]):
            await self.renew()
        await self._reap()

    async def renew(self) -> None:
        """Write down everything that is held under a new id, and let go of the old one. Raises `Unavailable`."""
        if self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_task(self._write_anew())
            self._renewal.add_done_callback(_forget_failure)
        await asyncio.shield(self._renewal)

    async def end(self) -> None:
        """Give up the lease, and with it all that is held."""
        tasks = [] if self._renewal is None else [self._renewal]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.held.clear()
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(GIVE_UP):
                await self.renew()
                await self._reap()

    async def _write_anew(self) -> None:
        self._doubtful = False  # what is given back from here on brings a new doubt
        unsure, self._unsure = self._unsure, set()
        try:
            await self._change_lease()
            self.returned |= unsure
        except BaseException:
            self._doubtful = True
            self._unsure |= unsure
            raise
        finally:
            self._renewal = None

    async def _change_lease(self) -> None:
        self._number += 1
        id_ = f"{self._node}.{self._number}"
        entries = list(self.held.items())
        epoch, unknown, changed = "", set[str](), set[str]()
        for start in range(0, max(1, len(entries)), CHUNK):
            flat = [part for entry in entries[start : start + CHUNK] for part in entry]
            answer = await self._scripts.call(
                "register", (NODES, _entries(id_), LEAVING, EPOCH, ANEW), (id_, self._ms, token_hex(8), *flat)
            )
            if not answer:
                raise Unavailable("the lease ended while it was written down", retry_after=1.0)
            epoch = answer[0].decode()
            unknown.update(entry.decode() for entry in answer[1])
            changed.update(entry.decode() for entry in answer[2])
        begun = await self._scripts.call("begin", (NODES,), (id_, self._ms))
        if not begun:
            raise Unavailable("the lease ended while it was written down", retry_after=1.0)
        # Also where the server has forgotten everybody: who has asked it meanwhile believes that they are not here.
        self.returned |= unknown
        self.changed |= changed if begun == 1 else {entry for entry, _ in entries if entry.startswith("here:")}
        if self._epoch and entries:
            text = "what the broker knows of this node was in doubt: %d entries were written down anew"
            log.warning(text, len(entries), extra={"event": "lease_renewed"})
        self.forgotten = self.forgotten or self._epoch not in ("", epoch)
        self.id, self._epoch = id_, epoch
        self._left_behind.set()

    async def _reap(self) -> None:
        while await self._scripts.call("reap", (NODES, LEAVING, DOUBTED), (CHUNK, self.grace_ms, SETTLE)):
            pass


def _entries(id_: str) -> str:
    """Where it stands what a lease holds, for those who clear it away."""
    return key(f"held:{id_}")


def _forget_failure(task: "asyncio.Task[None]") -> None:
    """Those who waited were told; there may have been none."""
    if not task.cancelled():
        task.exception()
