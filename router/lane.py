"""One thing at a time in each topic, all topics side by side."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

__all__ = ["Lanes"]

Job: TypeAlias = Callable[[], Awaitable[None]]
R = TypeVar("R")

TURN = 32
"""Jobs that one topic may do before the others get a turn of the event loop."""


class Lanes:
    """Runs jobs of one topic in the order in which they were put, one after the other; `settle` when none is left.

    So messages cannot overtake each other in middleware that awaits, a timer's flush comes in turn with messages,
    and nobody joins in the middle of a delivery. A topic without work has neither task nor entry here.
    """

    def __init__(self, settle: Callable[[str], Awaitable[None]], fault: Callable[[str, Exception], None]) -> None:
        self._settle = settle
        self._fault = fault
        self._waiting: dict[str, deque[Job]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, topic: str, job: Job) -> None:
        """Have `job` run in its turn."""
        waiting = self._waiting.get(topic)
        if waiting is None:
            self._waiting[topic] = deque([job])
            self._start(topic)
        else:
            waiting.append(job)

    async def run(self, topic: str, job: Callable[[], Awaitable[R]]) -> R:
        """Run `job` in its turn and return what it returned. In an idle topic that is here and now."""
        if topic in self._waiting:
            return await self.ask(topic, job)
        self._waiting[topic] = deque()
        try:
            return await job()
        finally:
            if self._waiting[topic]:
                self._start(topic)
            else:
                del self._waiting[topic]

    def ask(self, topic: str, job: Callable[[], Awaitable[R]]) -> "asyncio.Future[R]":
        """As `run`, but the turn is taken at once: what is put after this call comes after `job`."""
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()

        async def in_turn() -> None:
            if done.cancelled():
                return
            try:
                result = await job()
            except asyncio.CancelledError:
                done.cancel()
                raise
            except Exception as error:
                if not done.cancelled():
                    done.set_exception(error)
            else:
                if not done.cancelled():
                    done.set_result(result)

        self.put(topic, in_turn)
        return done

    def busy(self, topic: str) -> bool:
        """Whether `topic` has work, so that it will be settled after it."""
        return topic in self._waiting

    async def idle(self) -> None:
        """Wait until all work that was put is done."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    def _start(self, topic: str) -> None:
        task = asyncio.get_running_loop().create_task(self._drain(topic))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self, topic: str) -> None:
        waiting = self._waiting[topic]
        turn = 0
        while True:
            while waiting:
                await self._attempt(topic, waiting.popleft())
                turn += 1
                if turn % TURN == 0:
                    await self._attempt(topic, lambda: self._settle(topic))
                    await asyncio.sleep(0)
            await self._attempt(topic, lambda: self._settle(topic))
            if not waiting:
                del self._waiting[topic]
                return

    async def _attempt(self, topic: str, job: Job) -> None:
        try:
            await job()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._fault(topic, RuntimeError(f"cancelled itself: {error}"))  # not we were cancelled, but the job
        except Exception as error:  # one message's failure must not stop those behind it
            self._fault(topic, error)
