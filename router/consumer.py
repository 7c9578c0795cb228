"""Takes what people send out of the inbox, and looks after it until the program has dealt with it."""

import asyncio
import heapq
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, suppress
from random import uniform
from secrets import token_hex
from types import TracebackType
from typing import Any, Self, TypeAlias
from weakref import WeakKeyDictionary

from router.brokers.base import Inbox, Taken
from router.errors import Refused, Unavailable, place
from router.event import Event
from router.tracing import SpanKind, Tracing

__all__ = ["Consumer", "Message"]

log = logging.getLogger("router")

WAIT = 2.0
"""Seconds that one look into the inbox waits for something to come."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between tries while the broker is away, doubled each time."""
CLOSING = 2.0
"""Seconds that closing waits for the broker. Without it others get the messages later, when they count as left alone."""
LATE = 0.01
"""Seconds that a clock here and the server's may be apart over a pause."""

Read: TypeAlias = Callable[[bytes], Event]
"""An event that was written as JSON. Raises `BadMessage` for one that this program cannot read."""
Settle: TypeAlias = Callable[["Message", Taken, bool], Awaitable[None]]


class Message:
    """What a person sent, in the hands of this program until it is acknowledged, given back or forgotten.

    `async with message:` acknowledges it at the end of the block, or gives it back where the block raises. As long as
    the program keeps it, nobody else of the group gets it. It may have come before: `id` stays the same.
    """

    __slots__ = (
        "__weakref__",
        "_settle",
        "_settled",
        "_span",
        "_taken",
        "at",
        "event",
        "id",
        "project",
        "session",
        "traceparent",
        "tries",
        "user",
    )

    def __init__(
        self, taken: Taken, event: Event, settle: Settle, span: AbstractContextManager[tuple[Any, str | None]]
    ) -> None:
        origin = taken.origin
        self.event: Any = event
        """A value of the plugin's Event class."""
        self.project = origin.project
        self.user = origin.user
        self.session = origin.session
        self.at = origin.at
        """When the router took it: seconds since the epoch."""
        self.id = origin.id
        """The same each time that it is handed out, in every group."""
        self.tries = taken.tries
        """How often the group was handed it, this time included."""
        self.traceparent = origin.traceparent
        """W3C trace context: of the router, and within `async with` of the work on it."""
        self._taken = taken
        self._settle = settle
        self._span = span
        self._settled = False

    async def ack(self) -> None:
        """It is dealt with: the group does not get it again.

        While the broker is away this is remembered and told later, so it raises nothing.
        """
        await self._end(done=True)

    async def give_back(self) -> None:
        """It is not dealt with: the group gets it again after a pause that grows with each try."""
        await self._end(done=False)

    async def __aenter__(self) -> Self:
        _, self.traceparent = self._span.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._end(done=kind is None)
        finally:
            self._span.__exit__(kind, error, trace)

    async def _end(self, *, done: bool) -> None:
        if not self._settled:
            self._settled = True
            await self._settle(self, self._taken, done)


class Consumer:
    """One consumer of a group, to be iterated once: `async for message in consumer`.

    What the program was given and still keeps is held by one beat for all of it, so however long the work takes, no
    other consumer gets it; a program that dies, or forgets a message, stops holding it. While the broker is away the
    iteration waits. It ends with `aclose`, which gives back what is not acknowledged; so does leaving the loop.
    """

    def __init__(
        self,
        inbox: Inbox,
        read: Read,
        kinds: Sequence[str],
        group: str,
        *,
        name: str | None = None,
        idle: float = 60.0,
        tries: int = 5,
        pause: float = 1.0,
        ahead: int = 1,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Times in seconds. The consumers of a group must have the same `idle` and `tries`.

        `idle`: what nobody has held for so long is handed to another. `tries`: how often, before it is a dead letter.
        `pause`: how long after it was given back for the first time; doubled each time. `ahead`: messages of a kind
        that are taken at once; more cost fewer round trips, and wait here while another consumer may have nothing.
        """
        if not kinds:
            raise ValueError("a Consumer needs the types of the messages that it shall take")
        self._inbox = inbox
        self._read = read
        self._kinds = tuple(dict.fromkeys(kinds))
        self._group = group
        self._name = name or token_hex(8)
        self._idle = idle
        self._tries = tries
        self._pause = pause
        self._ahead = ahead
        self._tracing = tracing or Tracing()
        self._clock = clock
        self._ready: deque[Message] = deque()
        self._held: WeakKeyDictionary[Message, Taken] = WeakKeyDictionary()
        self._late: list[Taken] = []
        """Acknowledged, and the broker does not know yet."""
        self._again: list[float] = []
        """When those that were given back are to be handed out again."""
        self._reclaim_at = clock()
        self._away = False
        self._beat: asyncio.Task[None] | None = None
        self._closed = False
        self._closing = asyncio.Lock()

    async def __aiter__(self) -> AsyncGenerator[Message, None]:
        if self._beat is not None or self._closed:
            raise RuntimeError("a Consumer is iterated once; make another")
        self._beat = asyncio.get_running_loop().create_task(self._keep_holding())
        try:
            while not self._closed:
                if self._ready:
                    yield self._ready.popleft()
                else:
                    await self._fetch()
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End the iteration, and give back what is not acknowledged: others of the group get it at once."""
        self._closed = True
        async with self._closing:  # whoever else closes it waits until that is done
            beat, self._beat = self._beat, None
            if beat is not None:
                beat.cancel()
                await asyncio.gather(beat, return_exceptions=True)
            back = list(self._held.values())
            self._held.clear()
            self._ready.clear()
            with suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(CLOSING):
                    await self._tell_late()
                    await self._inbox.give_back(*back, idle=self._idle)

    # -- taking

    async def _fetch(self) -> None:
        """Have something ready, or look once and find nothing. While the broker is away, wait for it."""
        pause = FIRST_PAUSE
        while not self._closed:
            try:
                for taken in await self._look():
                    await self._prepare(taken)
            except Unavailable as error:
                self._lost_broker(error)
                await asyncio.sleep(uniform(pause / 2, pause))
                pause = min(LONGEST_PAUSE, pause * 2)
            else:
                self._found_broker()
                return

    async def _look(self) -> list[Taken]:
        """What others left alone, when it is time to look for that; else what is new."""
        now = self._clock()
        if self._away or self._late or now >= self._reclaim_at:
            await self._hold()  # before we look, or we would take over what is in hand here
        if self._away or now < self._reclaim_at:
            wait = min(WAIT, max(0.0, self._reclaim_at - now))
            return await self._inbox.take(self._kinds, self._group, self._name, self._ahead, wait)
        taken = await self._inbox.reclaim(
            self._kinds, self._group, self._name, idle=self._idle, tries=self._tries, count=self._ahead
        )
        while self._again and self._again[0] <= now:
            heapq.heappop(self._again)
        if not taken:  # else there may be more of them
            self._reclaim_at = min([now + self._idle / 2, *self._again[:1]])
        return taken

    async def _prepare(self, taken: Taken) -> None:
        """Have the program be given a message next; bury one that it could not read, or it would go round for ever."""
        try:
            event = self._read(taken.payload)
        except Refused as refusal:
            await self._bury(taken, refusal.message)
        except Exception as error:  # its text may quote the message
            await self._bury(taken, f"{type(error).__name__} while it was read")
        else:
            attributes = {
                "messaging.operation.type": "process",
                "messaging.message.id": taken.origin.id,
                "messaging.consumer.group.name": self._group,
            }
            span = self._tracing.span(f"consume {taken.kind}", SpanKind.CONSUMER, taken.origin.traceparent, attributes)
            message = Message(taken, event, self._settle, span)
            self._held[message] = taken
            self._ready.append(message)

    async def _bury(self, taken: Taken, reason: str) -> None:
        log.error("a `%s` is a dead letter: it cannot be read: %s", taken.kind, reason, extra={"event": "dead_letter"})
        with suppress(Unavailable):  # then it comes again, and is buried then
            await self._inbox.bury(taken, f"it cannot be read: {reason}")

    # -- keeping and letting go

    async def _keep_holding(self) -> None:
        """The beat: often enough that two of them may fail before others take over."""
        while True:
            await asyncio.sleep(min(self._idle / 3, 1.0) if self._away else self._idle / 3)
            try:
                await self._hold()
            except Unavailable as error:
                self._lost_broker(error)
            except Exception as error:  # without a beat others would take over what is in hand here
                what = f"{type(error).__name__} at {place(error)}"
                log.error("messages cannot be held: %s", what, extra={"event": "holding_failed"})
            else:
                self._found_broker()

    async def _hold(self) -> None:
        """Tell the broker what is done and what is still in hand here."""
        await self._tell_late()
        held = dict(self._held)
        for taken in await self._inbox.hold(*held.values()):
            for message in [message for message, own in held.items() if own is taken and message in self._held]:
                del self._held[message]
                log.warning(
                    "another consumer took over a `%s`: this one was not heard of for %g s",
                    taken.kind,
                    self._idle,
                    extra={"event": "taken_over", "message_id": taken.origin.id},
                )

    async def _tell_late(self) -> None:
        late, self._late = self._late, []
        try:
            await self._inbox.done(*late)
        except BaseException:
            self._late = late + self._late
            raise

    async def _settle(self, message: Message, taken: Taken, done: bool) -> None:
        held = self._held.pop(message, None) is not None
        try:
            if done:  # also when another took it over: one of the two may be spared the work
                self._late.append(taken)
                await self._tell_late()
            elif held:
                await self._give_back(taken)
        except Unavailable as error:  # told later; given back or not, it counts as left alone from now on
            self._lost_broker(error)

    async def _give_back(self, taken: Taken) -> None:
        pause = min(self._pause * 2 ** (taken.tries - 1), self._idle)
        await self._inbox.give_back(taken, idle=self._idle - pause)
        again = self._clock() + pause + LATE
        heapq.heappush(self._again, again)
        self._reclaim_at = min(self._reclaim_at, again)

    def _lost_broker(self, error: Unavailable) -> None:
        if not (self._away or self._closed):
            log.error("no messages are taken: %s", error.message, extra={"event": "inbox_away"})
        self._away = True

    def _found_broker(self) -> None:
        if self._away:
            self._away = False
            # All consumers were silent that long. They get the time of a beat to tell that they are alive.
            self._reclaim_at = max(self._reclaim_at, self._clock() + self._idle / 2)
            log.info("messages are taken again", extra={"event": "inbox_found"})
