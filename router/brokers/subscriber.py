"""Reads channels: keeps their subscriptions through lost, moved and silently dead connections."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from random import uniform
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from router.brokers.link import Link
from router.brokers.script import AWAY, BATCH, away, end
from router.errors import Unavailable

__all__ = ["Subscriber"]

log = logging.getLogger("router")

Take = Callable[[str, bytes], None]
Gap = Callable[[str, bool], None]
"""Told of a channel, and whether nothing was heard of it for so long that the server may have been another meanwhile."""

CONFIRMED_WITHIN = 5.0
"""Seconds that a server may take to confirm a subscription."""
LONGEST_PAUSE = 2.0
SILENCE = 10.0
"""Seconds without a probe's coming back after which nobody knows when the connection died."""


class Subscriber:
    """All channels that this node listens to: over one connection, with sharded pub/sub over one to each master.

    `take` gets every message, in the order of its arrival. `gap` is told of each channel that was subscribed anew
    without having been asked for: messages may have been missed. Pub/sub itself never tells.
    """

    def __init__(self, link: Link, own: str, take: Take, gap: Gap) -> None:
        """`own`: a channel of this node only, which keeps the connection subscribed and carries its probes."""
        self._link = link
        self._own = own
        self._take = take
        self._gap = gap
        self._lines: dict[str, _Line] = {}

    @property
    def up(self) -> bool:
        """Whether all that is wanted is being read."""
        return bool(self._lines) and all(line.up for line in self._lines.values())

    async def start(self) -> None:
        """Connect. Raises what redis-py raises when that is not possible."""
        line = self._line("")
        await line.connect()
        line.read()

    async def stop(self) -> None:
        for line in list(self._lines.values()):
            await line.stop()
        self._lines.clear()

    async def subscribe(self, channels: Iterable[str], *, sharded: Iterable[str] = ()) -> None:
        """Listen to `channels` too. Returns when the server has confirmed. Raises `Unavailable`.

        `sharded`: those that are published with SPUBLISH where the link does so.
        """
        wanted: dict[str, list[str]] = {"": list(channels)}
        for channel in sharded:
            wanted.setdefault(self._place(channel), []).append(channel)
        waiting = [self._line(name).subscribe(them) for name, them in wanted.items() if them]
        try:
            async with asyncio.timeout(CONFIRMED_WITHIN):
                await asyncio.gather(*waiting)
        except AWAY as error:
            await self.unsubscribe([*channels, *sharded])
            raise away(error) from None

    async def unsubscribe(self, channels: Iterable[str]) -> None:
        """Listen to `channels` no more."""
        leaving = []
        for line in self._lines.values():  # at once, so that whoever wants one of them again comes after this
            mine = [channel for channel in channels if line.wanted.pop(channel, "") is None]
            if mine:
                leaving.append((line, mine))
        for line, mine in leaving:
            await line.unsubscribe(mine)

    async def watch(self, patience: float) -> None:
        """Notice a connection that is dead without a word: one on which nothing came for `patience` seconds.

        To be called more often than that; it has something come. Health checks of redis-py do not do it: they send
        a PING and never look for the answer.
        """
        for line in list(self._lines.values()):
            if line.up and time.monotonic() - line.heard_at > patience:
                log.error("the broker's subscription is silent: connecting anew", extra={"event": "broker_silent"})
                await line.cut()
            elif line.name:
                await line.ping()
        with contextlib.suppress(*AWAY):
            await self._link.redis.publish(self._own, b"probe")

    def _place(self, channel: str) -> str:
        try:
            return self._link.line_of(channel)
        except AWAY as error:
            raise away(error) from None

    def _line(self, name: str) -> "_Line":
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = _Line(name, self._link, self._take, self._gap, self._replace)
            if not name:
                line.wanted[self._own] = None
        return line

    async def _replace(self) -> None:
        """Channels may have moved to other masters: read each from the one that it is on now."""
        with contextlib.suppress(*AWAY):
            await self._link.refresh()
        for line in [line for name, line in self._lines.items() if name]:
            for channel in list(line.wanted):
                with contextlib.suppress(Unavailable):
                    place = self._place(channel)
                    if place != line.name:
                        del line.wanted[channel]
                        self._line(place).want(channel)
            if not line.wanted:
                self._lines.pop(line.name)
                line.end()


async def _stay_down(*_: Any, **__: Any) -> None:
    """What failed is raised, and the reader takes another connection."""


class _Line:
    """One connection that is read for ever. When it ends, another one takes its place."""

    def __init__(self, name: str, link: Link, take: Take, gap: Gap, moved: Callable[[], Any]) -> None:
        self.name = name
        self.wanted: dict[str, None] = {}
        self.up = False
        self.heard_at = 0.0
        self._link = link
        self._take = take
        self._gap = gap
        self._moved = moved
        self._redis: Redis | None = None
        self._pubsub: Any = None
        self._confirming: dict[str, asyncio.Future[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._late: set[asyncio.Task[None]] = set()
        self._told_away = False
        self._doubtful = False
        self._ended = False

    def read(self) -> None:
        """Begin to read, once there is something to be read."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._read())

    def end(self) -> None:
        """Stop reading, without waiting for the end: it may be the reader itself that asks."""
        self._ended = True
        connection = None if self._pubsub is None else self._pubsub.connection
        if connection is not None:
            self._late.add(task := asyncio.get_running_loop().create_task(connection.disconnect(nowait=True)))
            task.add_done_callback(self._late.discard)

    async def stop(self) -> None:
        self._ended = True
        if self._task is not None:
            await end(self._task)
        await self._drop()

    async def connect(self) -> Any:
        """Open the connection and ask for all that is wanted. Returns redis-py's PubSub."""
        self._redis = await self._link.reader(self.name)
        pubsub: Any = self._redis.pubsub()
        # redis-py connects anew by itself before it raises. Two tasks that meet the same dead connection would do it side
        # by side, and the socket of one is never closed.
        pubsub._reconnect = _stay_down  # noqa: SLF001
        asked: set[str] = set()
        try:
            while missing := [channel for channel in self.wanted if channel not in asked]:  # more may come meanwhile
                await self._subscribe(pubsub, missing)
                asked.update(missing)
        except BaseException:
            with contextlib.suppress(*AWAY):
                await pubsub.aclose()  # gives its connection back
            raise
        self._pubsub = pubsub
        self.heard_at = time.monotonic()
        if not self.up:
            log.info("the broker is there", extra={"event": "broker_connected"})
        self.up, self._told_away = True, False
        return pubsub

    async def subscribe(self, channels: list[str]) -> None:
        """Want `channels`, and wait until the server says that it has them."""
        loop = asyncio.get_running_loop()
        waiting = [self._confirming.setdefault(channel, loop.create_future()) for channel in channels]
        self.wanted.update(dict.fromkeys(channels))
        self.read()
        try:
            if self._pubsub is not None:
                try:
                    await self._subscribe_more(self._pubsub, channels)
                except AWAY:
                    await self.cut()  # the reader connects anew, and asks for all that is wanted
            await asyncio.gather(*waiting)
        finally:
            for channel in channels:
                self._confirming.pop(channel, None)

    def want(self, channel: str) -> None:
        """Want a channel that was read elsewhere until now."""
        self.wanted[channel] = None
        self.read()
        if self._pubsub is not None:
            task = asyncio.get_running_loop().create_task(self._subscribe_late(channel))
            self._late.add(task)
            task.add_done_callback(self._late.discard)

    async def _subscribe_late(self, channel: str) -> None:
        try:
            if self._pubsub is not None and channel in self.wanted:
                await self._subscribe_more(self._pubsub, [channel])
        except AWAY:
            await self.cut()  # then all is asked for anew

    async def unsubscribe(self, channels: list[str]) -> None:
        """Tell the server of `channels` that are no longer wanted, and have not become so again."""
        if self._pubsub is None:
            return
        with contextlib.suppress(*AWAY):
            for channel in channels:
                if channel not in self.wanted:
                    await (self._pubsub.sunsubscribe if self.name else self._pubsub.unsubscribe)(channel)

    async def ping(self) -> None:
        if self._pubsub is not None:
            with contextlib.suppress(*AWAY):
                await self._pubsub.ping()

    async def cut(self) -> None:
        """Have the reader connect anew."""
        connection = None if self._pubsub is None else self._pubsub.connection
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _subscribe(self, pubsub: Any, channels: list[str]) -> None:
        # Shard channels of several slots cannot be named in one command.
        size = 1 if self.name else BATCH
        try:
            for start in range(0, len(channels), size):
                await (pubsub.ssubscribe if self.name else pubsub.subscribe)(*channels[start : start + size])
        except AttributeError:  # redis-py's word for a connection that another task has just given up
            raise RedisConnectionError("cut while subscribing") from None

    async def _subscribe_more(self, pubsub: Any, channels: list[str]) -> None:
        """As `_subscribe`, on the connection that is being read: the reader may give it up meanwhile."""
        try:
            await self._subscribe(pubsub, channels)
        finally:
            if pubsub is not self._pubsub:  # then redis-py has opened another one for it, which nobody would close
                with contextlib.suppress(Exception):
                    await pubsub.aclose()

    async def _read(self) -> None:
        pause = 0.0
        while not self._ended:
            try:
                pubsub = self._pubsub or await self.connect()
                message = await pubsub.get_message(ignore_subscribe_messages=False, timeout=None)
                pause = 0.0
                self.heard_at = time.monotonic()
                if message is not None:
                    await self._heard(message)
            except Exception as error:  # mostly one of AWAY, but a reader that ends would make the node deaf
                # A server that died has closed what it had sent before; one that fell silent may have gone on.
                if self.up:
                    self._doubtful = time.monotonic() - self.heard_at > SILENCE
                self._doubtful |= isinstance(error, RedisTimeoutError | TimeoutError)
                if not self._told_away:
                    log.error("the broker is away: %s", type(error).__name__, extra={"event": "broker_away"})
                self.up, self._told_away = False, True
                await self._drop()
                await self._moved()
                pause = min(LONGEST_PAUSE, pause * 2 or 0.05)
                await asyncio.sleep(uniform(pause / 2, pause))
        await self._drop()

    async def _heard(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind in ("message", "smessage"):
            try:
                self._take(message["channel"].decode(), message["data"])
            except Exception as error:  # whoever may publish here may publish anything: the node goes on
                log.warning(
                    "what was published is not readable: %s", type(error).__name__, extra={"event": "unreadable"}
                )
            return
        channel = (message["channel"] or b"").decode()
        if kind in ("subscribe", "ssubscribe"):
            waiting = self._confirming.get(channel)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
            elif channel in self.wanted:
                self._gap(channel, self._doubtful)
        elif kind == "sunsubscribe" and channel in self.wanted:  # its slot has gone to another master
            await self._moved()

    async def _drop(self) -> None:
        self.up = False
        pubsub, self._pubsub = self._pubsub, None
        redis, self._redis = self._redis, None
        with contextlib.suppress(Exception):
            if pubsub is not None:
                await pubsub.aclose()
            if redis is not None:
                await self._link.leave(redis)
