"""An event loop with virtual time: it jumps to the next timer, and all that it does follows from a seed."""

import asyncio
import heapq
import socket
from collections.abc import Callable
from random import Random
from typing import Any

from tests.simulation import seam
from tests.simulation.network import Network

__all__ = ["Loop", "Stuck"]

TURN = 20e-6
"""Longest time that a turn of the loop takes; drawn, so that timers of different hosts do not meet by plan."""


class Stuck(Exception):
    """Nothing is going to happen any more, or too much happens."""


class Loop(asyncio.BaseEventLoop):
    """Runs callbacks in the order in which asyncio promises to run them; time passes only between turns.

    What a killed host had still to run never runs: every callback knows by its context whose it is.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.now = 1000.0
        self.turns = 0
        self.most_turns = 3_000_000
        self.dead: set[str] = set()
        self.chance = Random(f"loop {seed}")
        self.network = Network(self, Random(f"network {seed}"))
        self._graves: list[Any] = []
        self.complaints: list[str] = []
        self.set_exception_handler(self._complain)
        seam.set_loop(self.time)

    def time(self) -> float:
        return self.now

    def kill(self, host: str) -> None:
        """End all that runs on `host`, at once and without a word: no `finally`, no `except`."""
        self._graves.append(list(asyncio.all_tasks(self)))  # or collecting them would run their `finally`
        self.dead.add(host)
        self.network.kill(host)

    def _complain(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "was destroyed" in str(context.get("message")):
            return  # of a host that was killed, at the end of the world
        self.complaints.append(f"{self.now:.3f} {seam.HOST.get()}: {context.get('message')} {error!r}")

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        self.turns += 1
        if self.turns > self.most_turns:
            raise Stuck(f"{self.turns:,} turns of the loop, and no end")
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready and not self._stopping:
            if not scheduled:
                raise Stuck("nobody waits for anything but each other")
            self.now = max(self.now, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self.now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                ready.append(handle)
        dead = self.dead
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            if dead and handle._context.get(seam.HOST) in dead:
                continue
            handle._run()
        self.now += self.chance.random() * TURN

    # -- what asyncio's own loop does with threads and sockets

    def _process_events(self, event_list: Any) -> None: ...

    def _write_to_self(self) -> None: ...

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        done = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except BaseException as error:
                if not done.done():
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(result)

        self.call_later(self.chance.expovariate(1 / 0.001), work)
        return done

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:
        return self.network.listen(protocol_factory, host, port)

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:
        return await self.network.connect(protocol_factory, host, port)
