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
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from router.errors import Unavailable

__all__ = ["AWAY", "BATCH", "Scripts", "away", "end"]

AWAY = (RedisError, RedisClusterException, OSError, asyncio.TimeoutError, RuntimeError)
"""What redis-py raises when the server is away, or cannot do its work. RuntimeError is uvloop's word for writing to a
connection that was just cut; redis-py lets it through."""

PASSING = (ReadOnlyError, ClusterDownError, TryAgainError, MovedError, AskError, NoScriptError)
PASSING_CODES = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "BUSY", "UNBLOCKED")
"""Answers that may be others in a moment: there is a failover, or the server starts."""
EXPIRE = 0.25
"""Seconds between two looks at who has waited long enough, while an answer does not come."""
SILENT = 1.0
"""Seconds without an answer after which a server counts as away."""
BATCH = 256
"""Calls in one round trip."""
AT_ONCE = 32
"""Scripts that run by themselves at the same time: a cluster's pools fail at their limit instead of waiting."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between tries while the server is away, doubled each time."""


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel `tasks` until they are done: redis-py sends through `wait_for`, which before 3.12 may swallow one."""
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=0.1)


def lasting(error: BaseException) -> bool:
    """Whether the server has answered, and would answer the same again: wrong type, no permission, no memory."""
    answered = isinstance(error, ResponseError) and not isinstance(error, PASSING)
    return answered and not str(error).lstrip("-").startswith(PASSING_CODES)


def away(error: BaseException) -> Unavailable:
    """`error` of redis-py as ours. Its text may quote keys, so only its kind and the server's code are told.

    What its user may not do, and a wrong password, is told in full: it is for whoever made that user.
    """
    text = str(error) if isinstance(error, ResponseError | AuthenticationError) else ""
    if "permission" in text or isinstance(error, AuthenticationError):
        return Unavailable(f"the broker says: {text}", retry_after=1.0)
    code = text.partition(" ")[0]
    what = f"{type(error).__name__} {code}" if code.isupper() else type(error).__name__
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

    `call` puts all that is asked for in one turn of the event loop into one round trip. Calls of a lane are made in
    the order in which they were asked for, and one round trip ends before the next begins, so two publishes to one
    topic never change places. While the server is away they wait: at most `room` calls, each at most `patience`
    seconds. One server is one lane; a cluster has several, so that a master that is away holds up few others.

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
        lane_of: Callable[[str], int] = lambda _: 0,
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`refresh` is called after a failure: what a script is run on may have moved. `lane_of` a key.

        `confirm` is called before answers are believed, and raises when who answered had no business to.
        """
        self._redis = redis
        self._refresh = refresh
        self._lane_of = lane_of
        self._confirm = confirm
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._patience = patience
        self._room = room
        self._digests: dict[str, str] = {}
        self._waiting: dict[int, deque[_Call]] = {}
        self._flushing: dict[int, asyncio.Task[None]] = {}
        self._count = 0
        self._failing = False
        self._silent_from = float("inf")

    def __len__(self) -> int:
        """How many calls wait."""
        return self._count

    async def call(self, script: str, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> Any:
        """Run one script, in one round trip with others. Raises `Unavailable` when it could not be run in time.

        After `Unavailable` it may have run all the same: the answer can be what was lost.
        """
        return await self.ask(script, keys, arguments)

    def ask(self, script: str, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> asyncio.Future[Any]:
        """As `call`, for those who ask for several before they wait for any."""
        if self._count >= self._room and (self._failing or time.monotonic() > self._silent_from):
            raise Unavailable(
                f"the broker is away and {self._room:,} messages wait for it already: this one is not taken",
                retry_after=1.0,
            )
        loop = asyncio.get_running_loop()
        made = _Call(script, keys, arguments, time.monotonic() + self._patience, loop.create_future())
        lane = self._lane_of(keys[0])
        self._waiting.setdefault(lane, deque()).append(made)
        self._count += 1
        if lane not in self._flushing:
            self._flushing[lane] = loop.create_task(self._flush(lane))
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
            if time.monotonic() >= until or lasting(answer):
                raise away(answer) from None
            tried += 1
            await asyncio.sleep(uniform(pause / 2, pause))
            pause = min(LONGEST_PAUSE, pause * 2)
            await self.look_again()

    async def close(self) -> None:
        """Give up what waits."""
        await end(*self._flushing.values())
        for made in (made for waiting in self._waiting.values() for made in waiting):
            if not made.done.done():
                made.done.set_exception(Unavailable("the broker was closed"))
        self._waiting.clear()
        self._count = 0

    async def _flush(self, lane: int) -> None:
        try:
            await asyncio.sleep(0)  # whoever else asks in this turn comes along
            await self._empty(self._waiting[lane])
            del self._waiting[lane]
        finally:
            del self._flushing[lane]

    async def _empty(self, waiting: deque[_Call]) -> None:
        pause = FIRST_PAUSE
        while waiting:
            batch = [waiting[i] for i in range(min(BATCH, len(waiting)))]
            # Those who asked may have gone, or been told that it is not possible: then it need not happen either.
            sent = [made for made in batch if not made.done.done()]
            answers = await self._answers(sent, waiting)
            for _ in batch:
                waiting.popleft()
            again = self._settle(sent, answers)
            waiting.extendleft(reversed(again))
            self._count -= len(batch) - len(again)
            self._failing = bool(again)
            if again:
                await asyncio.sleep(uniform(pause / 2, pause))
                await self.look_again()
                pause = min(LONGEST_PAUSE, pause * 2)
            else:
                pause = FIRST_PAUSE

    async def _answers(self, sent: list[_Call], waiting: deque[_Call]) -> list[Any]:
        """One round trip for all of `sent`. Who has waited long enough meanwhile is told, whatever becomes of it."""
        calls = [(made.script, made.keys, (*made.arguments, int(made.tried > 0))) for made in sent]
        sending = asyncio.get_running_loop().create_task(self._send(calls))
        self._silent_from = time.monotonic() + SILENT
        try:
            while not sending.done():
                await asyncio.wait([sending], timeout=EXPIRE)
                if not sending.done():
                    _expire(waiting)
            return sending.result()
        except AWAY as error:
            return [error] * len(sent)
        except Exception as error:
            # A call that cannot even be sent. The others are not to blame; nor were they sent.
            return [error] if len(sent) == 1 else [(await self._answers([made], waiting))[0] for made in sent]
        finally:
            self._silent_from = float("inf")
            sending.cancel()

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
            elif now >= made.until or lasting(answer):
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
        if self._confirm is not None:
            await self._confirm()
        return answers


def _expire(waiting: deque[_Call]) -> None:
    now = time.monotonic()
    for made in waiting:
        if now >= made.until and not made.done.done():
            made.done.set_exception(away(TimeoutError()))
