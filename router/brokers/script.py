"""Runs Lua scripts on the server: many in one round trip, tried again when the server is away."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from random import uniform
from typing import Any

from msgspec import Struct
from redis.exceptions import NoScriptError, RedisError, ResponseError

from router.errors import Unavailable

__all__ = ["AWAY", "BATCH", "Scripts", "away"]

AWAY = (RedisError, OSError, asyncio.TimeoutError, RuntimeError)
"""What redis-py raises when the server is away, or cannot do its work. RuntimeError is uvloop's word for writing to a
connection that was just cut; redis-py lets it through."""

BATCH = 256
"""Calls in one round trip."""
AT_ONCE = 32
"""Scripts that run by themselves at the same time: a cluster's pools fail at their limit instead of waiting."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between tries while the server is away, doubled each time."""


def away(error: BaseException) -> Unavailable:
    """`error` of redis-py as ours. Its text may quote keys, so only its kind and the server's code are told.

    What its user may not do is told in full: it is for whoever made that user.
    """
    text = str(error) if isinstance(error, ResponseError) else ""
    code = text.partition(" ")[0]
    what = f"{type(error).__name__} {code}" if code.isupper() else type(error).__name__
    if "permission" in text:
        what = text
    return Unavailable(f"the broker cannot be reached: {what}", retry_after=1.0)


class _Call(Struct):
    """A script call on its way to the server."""

    script: str
    keys: tuple[str, ...]
    arguments: tuple[Any, ...]
    until: float
    done: asyncio.Future[Any]
    tried: int = 0


class Scripts:
    """The scripts in `lua/`, by name. One that the server does not know (any more) is loaded.

    `call` puts all that is asked for in one turn of the event loop into one round trip. Calls are made in the order
    in which they were asked for, and one round trip ends before the next begins, so two publishes to one topic never
    change places. While the server is away they wait: at most `room` calls, each at most `patience` seconds.

    redis-py's own retries must be off: an answer that was lost would make it run a script twice without our knowing.
    Here a repeated try says so: every script's last argument is `1` when it may have run before, else `0`.
    """

    def __init__(
        self,
        redis: Any,
        *,
        patience: float = 1.0,
        room: int = 10_000,
        refresh: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`refresh` is called after a failure: what a script is run on may have moved."""
        self._redis = redis
        self._refresh = refresh
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._patience = patience
        self._room = room
        self._digests: dict[str, str] = {}
        self._waiting: deque[_Call] = deque()
        self._flushing: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many calls wait."""
        return len(self._waiting)

    async def call(self, script: str, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> Any:
        """Run one script, in one round trip with others. Raises `Unavailable` when it could not be run in time.

        After `Unavailable` it may have run all the same: the answer can be what was lost.
        """
        return await self.ask(script, keys, arguments)

    def ask(self, script: str, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> asyncio.Future[Any]:
        """As `call`, for those who ask for several before they wait for any."""
        if len(self._waiting) >= self._room:
            raise Unavailable(
                f"the broker is away and {self._room:,} messages wait for it already: this one is not taken",
                retry_after=1.0,
            )
        loop = asyncio.get_running_loop()
        made = _Call(script, keys, arguments, time.monotonic() + self._patience, loop.create_future())
        self._waiting.append(made)
        if self._flushing is None or self._flushing.done():
            self._flushing = loop.create_task(self._flush())
        return made.done

    async def run(self, script: str, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> Any:
        """Run one script at once and by itself: one whose answer is large would hold up the others.

        It may run twice, so it must be one that does no harm then. Raises `Unavailable` as `call` does.
        """
        until, pause, tried = time.monotonic() + self._patience, FIRST_PAUSE, 0
        while True:
            try:
                async with self._gate:
                    (answer,) = await self._send([(script, keys, (*arguments, int(tried > 0)))])
            except AWAY as error:
                answer = error
            if not isinstance(answer, Exception):
                return answer
            if not isinstance(answer, AWAY):
                raise answer
            if time.monotonic() >= until:
                raise away(answer) from None
            tried += 1
            await asyncio.sleep(uniform(pause / 2, pause))
            pause = min(LONGEST_PAUSE, pause * 2)
            await self.look_again()

    async def close(self) -> None:
        """Give up what waits."""
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        while self._waiting:
            made = self._waiting.popleft()
            if not made.done.done():
                made.done.set_exception(Unavailable("the broker was closed"))

    async def _flush(self) -> None:
        await asyncio.sleep(0)  # whoever else asks in this turn comes along
        pause = FIRST_PAUSE
        while self._waiting:
            batch = [self._waiting[i] for i in range(min(BATCH, len(self._waiting)))]
            # Those who asked may have gone: what was never sent need not be.
            sent = [made for made in batch if not made.done.cancelled() or made.tried]
            try:
                answers = await self._send(
                    [(made.script, made.keys, (*made.arguments, int(made.tried > 0))) for made in sent]
                )
            except Exception as error:  # whoever waits must be told, whatever it is
                answers = [error] * len(sent)
            for _ in batch:
                self._waiting.popleft()
            again = self._settle(sent, answers)
            self._waiting.extendleft(reversed(again))
            if again:
                await asyncio.sleep(uniform(pause / 2, pause))
                await self.look_again()
                pause = min(LONGEST_PAUSE, pause * 2)
            else:
                pause = FIRST_PAUSE

    async def look_again(self) -> None:
        """Something failed: what scripts are run on may have moved."""
        if self._refresh is not None:
            with contextlib.suppress(*AWAY):
                await self._refresh()

    @staticmethod
    def _settle(sent: Sequence[_Call], answers: Sequence[Any]) -> list[_Call]:
        """Hand out the answers. Returns the calls that are to be made again."""
        again = []
        now = time.monotonic()
        for made, answer in zip(sent, answers, strict=True):
            made.tried += 1
            if made.done.done():
                continue
            if not isinstance(answer, Exception):
                made.done.set_result(answer)
            elif not isinstance(answer, AWAY):
                made.done.set_exception(answer)
            elif now >= made.until:
                made.done.set_exception(away(answer))
            else:
                again.append(made)
        return again

    async def _send(self, calls: Sequence[tuple[str, tuple[str, ...], tuple[Any, ...]]]) -> list[Any]:
        """One round trip; two when the server has to be told a script. What went wrong for one call is in its place."""
        answers: list[Any] = [None] * len(calls)
        todo = list(range(len(calls)))
        for _ in range(2):
            for script in {calls[i][0] for i in todo} - self._digests.keys():
                source = files("router.brokers").joinpath("lua", f"{script}.lua").read_text(encoding="utf-8")
                self._digests[script] = await self._redis.script_load(source)
            async with self._redis.pipeline(transaction=False) as pipeline:
                for i in todo:
                    script, keys, arguments = calls[i]
                    # `evalsha` of a pipeline asks first whether the script exists: one round trip more.
                    pipeline.execute_command("EVALSHA", self._digests[script], len(keys), *keys, *arguments)
                for i, answer in zip(todo, await pipeline.execute(raise_on_error=False), strict=True):
                    answers[i] = answer
            # A restarted server has forgotten its scripts; then it has run none of these.
            todo = [i for i in todo if isinstance(answers[i], NoScriptError)]
            if not todo:
                break
            for i in todo:
                self._digests.pop(calls[i][0], None)
        return answers
