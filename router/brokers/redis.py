"""The broker of many nodes, on Redis or Valkey: numbers, history and fan-out in one script a publish."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from random import uniform
from secrets import token_hex
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from router.audience import Audience, Identity
from router.brokers.base import Arrive, Broker, History, Limits, Lost, Position, Published
from router.brokers.layout import PREFIX, Header, channels_of, decode_header, encode_header, names_of
from router.brokers.script import AWAY, BATCH, Scripts, away
from router.brokers.seat import Seats
from router.envelope import Envelope
from router.errors import Refused, Unavailable
from router.event import Event, Policy

__all__ = ["RedisBroker"]

log = logging.getLogger("router")

Read = Callable[[bytes], tuple[Event, Policy]]
"""An event that was published as JSON, and its type's policy. Raises `BadMessage` for a type this node lacks."""


class _Topic:
    """A topic that somebody here listens to: where this node stands in it, and what came too early."""

    __slots__ = ("ahead", "catching_up", "count", "epoch", "failed", "ready", "seq")

    def __init__(self) -> None:
        self.count = 0
        self.epoch = ""
        self.seq = 0
        self.ahead: list[tuple[str, int, bytes]] = []
        self.failed = False
        self.ready = asyncio.Event()
        """Its position is known."""
        self.catching_up = True
        """The position is being read; what arrives meanwhile waits in `ahead`."""


class RedisBroker(Broker):
    """Carries envelopes between nodes through Redis (6.2 or newer) or Valkey.

    redis-py's own retries are off: they would run the publish script twice when an answer is lost. A publish is
    tried again here, with a mark by which the script knows it. Pub/sub may lose messages without a word, so every
    number is checked: a gap is filled from history, a reconnect checks all topics, and so does a clock.
    """

    def __init__(
        self,
        url: str,
        read: Read,
        *,
        max_events: int = 1000,
        max_age: float = 300.0,
        forget: float = 24 * 3600.0,
        lease: float = 15.0,
        check_every: float = 30.0,
        watch_every: float = 5.0,
        connections: int = 100,
    ) -> None:
        self._read = read
        self._max_events = max_events
        self._log_ms = int(max_age * 1000)
        self._meta_ms = int(max(forget, 2 * max_age) * 1000)
        self._check_every = check_every
        self._watch_every = watch_every
        self._node = token_hex(8)
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=5,
            socket_timeout=5,
            socket_connect_timeout=5,
            retry=Retry(NoBackoff(), 0),
            protocol=3,
        )
        self._redis: Redis = Redis(connection_pool=pool)
        self._scripts = Scripts(self._redis)
        self._topics: dict[str, _Topic] = {}
        self._pubsub: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._filling: dict[str, asyncio.Task[None]] = {}
        self._heard_at = 0.0
        self._up = False
        self._arrive: Arrive = lambda _: None
        self._lost: Lost = lambda _topic, _position: None
        self._seats = Seats(self._redis, self._scripts, self._node, lease)

    # -- life

    async def start(self, arrive: Arrive, lost: Lost) -> None:
        self._arrive, self._lost = arrive, lost
        await self._redis.ping()
        await self._connect()
        await self._seats.beat()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(work()) for work in (self._listen, self._seats.keep, self._keep_checking)]

    async def stop(self) -> None:
        for task in (*self._tasks, *self._filling.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._filling.values(), return_exceptions=True)
        await self._scripts.close()
        await self._seats.leave()
        if self._pubsub is not None:
            with contextlib.suppress(*AWAY):
                await self._pubsub.aclose()
        await self._redis.aclose(close_connection_pool=True)

    async def ready(self) -> bool:
        try:
            return self._up and bool(await self._redis.ping())
        except AWAY:
            return False

    # -- publishing

    async def publish(self, envelope: Envelope) -> Published:
        names = names_of(envelope.topic)
        id_key = names.meta if envelope.message_id is None else f"{names.base}:id:{envelope.message_id}"
        keys = (names.meta, names.log, id_key)
        arguments = (
            names.channel,
            encode_header(envelope),
            envelope.payload,
            "PUBLISH",
            self._max_events,
            self._log_ms,
            self._meta_ms,
            token_hex(6),
            int(envelope.policy.keep),
            token_hex(8),
        )
        epoch, seq, duplicate = await self._scripts.call("publish", keys, arguments)
        return Published(Position(epoch.decode(), seq), duplicate=bool(duplicate))

    # -- history

    async def history(self, topic: str, after: int) -> History:
        position, entries = await self._remembered(topic, after)
        oldest = time.time() - self._log_ms / 1000
        envelopes = []
        complete = after <= position.seq and len(entries) == position.seq - after
        for id_, fields in entries:
            header = decode_header(fields[b"h"])
            if header.at < oldest:
                complete = False
                continue
            envelope = self._envelope(topic, int(id_.split(b"-")[0]), header, fields[b"d"])
            if envelope is not None:
                envelopes.append(envelope)
        return History(position, envelopes, complete)

    async def _remembered(
        self, topic: str, after: int | None
    ) -> tuple[Position, list[tuple[bytes, dict[bytes, bytes]]]]:
        names = names_of(topic)
        arguments = ("" if after is None else after, token_hex(6), self._meta_ms)
        epoch, seq, entries = await self._scripts.run("history", (names.meta, names.log), arguments)
        pairs = [(id_, dict(zip(flat[::2], flat[1::2], strict=True))) for id_, flat in entries]
        return Position(epoch.decode(), seq), pairs

    # -- arriving

    async def subscribe(self, topic: str) -> Position:
        known = self._topics.get(topic)
        if known is None:
            known = self._topics[topic] = _Topic()
            known.count = 1
            try:
                await self._subscription().subscribe(*channels_of(topic))
                position, _ = await self._remembered(topic, None)
            except BaseException as error:
                # Those who wait for the same topic are told as well, and the next one begins anew.
                self._topics.pop(topic, None)
                known.failed = True
                known.ready.set()
                if isinstance(error, AWAY):
                    raise away(error) from None
                raise
            known.epoch, known.seq = position.epoch, position.seq
            known.ready.set()
            if not self._caught_up(topic, known):
                self._fill(topic)
        else:
            known.count += 1
            await known.ready.wait()
            if known.failed:
                raise Unavailable("the broker cannot be reached", retry_after=1.0)
        return Position(known.epoch, known.seq)

    async def unsubscribe(self, topic: str) -> None:
        known = self._topics.get(topic)
        if known is None:
            return
        known.count -= 1
        if not known.count:
            del self._topics[topic]
            with contextlib.suppress(Unavailable, *AWAY):
                await self._subscription().unsubscribe(*channels_of(topic))

    async def _listen(self) -> None:
        """Read what arrives, for ever; connect anew when the connection ends, and look what was missed."""
        pause = 0.0
        while True:
            try:
                if self._pubsub is None:
                    await self._connect()
                    for topic in self._topics:
                        self._fill(topic)
                assert self._pubsub is not None
                message = await self._pubsub.get_message(ignore_subscribe_messages=False, timeout=None)
                pause = 0.0
                self._heard_at = time.monotonic()
                if message is not None and message["type"] == "message":
                    self._take(message["channel"].decode(), message["data"])
            except AWAY as error:
                if self._up:
                    log.error("the broker is away: %s", type(error).__name__, extra={"event": "broker_away"})
                self._up = False
                await self._drop()
                pause = min(2.0, pause * 2 or 0.05)
                await asyncio.sleep(uniform(pause / 2, pause))

    async def _connect(self) -> None:
        """One connection for all that is listened to; the node's own channel keeps it subscribed when nothing else is."""
        pubsub = self._redis.pubsub()
        channels = [self._own_channel, *(channel for topic in self._topics for channel in channels_of(topic))]
        for start in range(0, len(channels), BATCH):
            await pubsub.subscribe(*channels[start : start + BATCH])
        self._pubsub = pubsub
        self._heard_at = time.monotonic()
        if not self._up:
            log.info("the broker is there", extra={"event": "broker_connected"})
        self._up = True

    async def _drop(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            with contextlib.suppress(*AWAY):
                await pubsub.aclose()

    def _take(self, channel: str, data: bytes) -> None:
        """One message of the connection, in the order of its arrival."""
        if channel == self._own_channel:
            return
        if not channel.startswith(PREFIX):
            self._take_plain(channel, data)
            return
        topic = channel[len(PREFIX) + 1 : -len("}:live")]
        known = self._topics.get(topic)
        if known is None:
            return
        head, _, rest = data.partition(b" ")
        number, _, rest = rest.partition(b" ")
        arrived = (head.decode(), int(number), rest)
        if known.catching_up:
            known.ahead.append(arrived)
        elif not self._accept(topic, known, arrived):
            known.ahead.append(arrived)
            self._fill(topic)

    def _accept(self, topic: str, known: _Topic, arrived: tuple[str, int, bytes]) -> bool:
        """Let one message through, or drop it because it was seen; False when something before it is missing."""
        epoch, seq, rest = arrived
        if seq and (epoch != known.epoch or seq > known.seq + 1):
            return False
        if seq and seq <= known.seq:
            return True
        header, _, payload = rest.partition(b"\n")
        if seq:
            known.seq = seq
        envelope = self._envelope(topic, seq, decode_header(header), payload)
        if envelope is not None:
            self._arrive(envelope)
        return True

    def _take_plain(self, channel: str, data: bytes) -> None:
        """What a backend published that knows nothing of us: `PUBLISH project:<id> <json>`. It has no number."""
        if channel not in self._topics:
            return
        envelope = self._envelope(channel, 0, Header(at=time.time()), bytes(data).strip())
        if envelope is not None:
            self._arrive(envelope)

    def _envelope(self, topic: str, seq: int, header: Header, payload: bytes) -> Envelope | None:
        """A message as an envelope; None for one that this node cannot read, which is logged without its text."""
        try:
            event, policy = self._read(payload)
        except Refused as refusal:
            log.warning("an event on %s is not readable here: %s", topic, refusal.code, extra={"event": "unreadable"})
            return None
        audience = Audience(
            topic, frozenset(header.holding), frozenset(header.lacking), frozenset(header.without), _only(header)
        )
        return Envelope(
            event=event,
            policy=policy,
            audience=audience,
            sender=None if header.sender is None else Identity(header.sender),
            payload=payload,
            message_id=header.id,
            seq=seq,
            first=seq,
            published_at=header.at,
            traceparent=header.trace,
        )

    # -- gaps

    def _fill(self, topic: str) -> None:
        """Have `topic` compared with what the server remembers, and what is missing brought."""
        known = self._topics.get(topic)
        if known is None or topic in self._filling:
            return
        known.catching_up = True
        task = asyncio.get_running_loop().create_task(self._fill_until_done(topic, known))
        self._filling[topic] = task
        task.add_done_callback(lambda _: self._filling.pop(topic, None))

    async def _fill_until_done(self, topic: str, known: _Topic) -> None:
        pause = 0.05
        while self._topics.get(topic) is known:
            try:
                await self._bring(topic, known)
            except (Unavailable, *AWAY):
                await asyncio.sleep(uniform(pause / 2, pause))
                pause = min(2.0, pause * 2)
            else:
                if self._caught_up(topic, known):
                    return

    async def _bring(self, topic: str, known: _Topic) -> None:
        """Let through what `topic` remembers beyond what was seen; tell when that does not join up."""
        position, entries = await self._remembered(topic, known.seq)
        joins = position.epoch == known.epoch and position.seq >= known.seq
        if not joins or len(entries) != position.seq - known.seq:
            known.epoch, known.seq = position.epoch, position.seq
            self._lost(topic, position)
            return
        for id_, fields in entries:
            self._accept(topic, known, (known.epoch, int(id_.split(b"-")[0]), fields[b"h"] + b"\n" + fields[b"d"]))

    def _caught_up(self, topic: str, known: _Topic) -> bool:
        """Let through what arrived meanwhile; False when there is a gap again."""
        waiting, known.ahead = known.ahead, []
        for position, arrived in enumerate(waiting):
            if not self._accept(topic, known, arrived):
                known.ahead = waiting[position:]
                return False
        known.catching_up = False
        return True

    async def _keep_checking(self) -> None:
        """Notice what makes no noise: a dead link by a probe to ourselves, a lost message by the topics' numbers."""
        checked_at = time.monotonic()
        while True:
            await asyncio.sleep(self._watch_every)
            now = time.monotonic()
            if self._pubsub is not None and now - self._heard_at > 2 * self._watch_every:
                log.error("the broker's subscription is silent: connecting anew", extra={"event": "broker_silent"})
                connection = self._pubsub.connection
                if connection is not None:
                    await connection.disconnect(nowait=True)
            with contextlib.suppress(*AWAY):
                await self._redis.publish(self._own_channel, b"probe")
                if now - checked_at >= self._check_every:
                    checked_at = now
                    await self._check_positions()

    async def _check_positions(self) -> None:
        """Compare all topics' numbers with the server's in one round trip."""
        topics = [topic for topic, known in self._topics.items() if not known.catching_up]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for topic in topics:
                pipeline.hmget(names_of(topic).meta, "epoch", "seq")
            places = await pipeline.execute()
        for topic, (epoch, seq) in zip(topics, places, strict=True):
            known = self._topics.get(topic)
            # A number that is ahead of ours may be on its way; one gap check costs no more than one read.
            if known is not None and ((epoch or b"").decode(), int(seq or 0)) != (known.epoch, known.seq):
                self._fill(topic)

    # -- seats

    async def claim(self, user: str, project: str, limits: Limits) -> str | None:
        return await self._seats.claim(user, project, limits)

    async def release(self, user: str, project: str) -> None:
        await self._seats.release(user, project)

    def _subscription(self) -> Any:
        if self._pubsub is None:
            raise Unavailable("the broker is being connected to", retry_after=1.0)
        return self._pubsub

    @property
    def _own_channel(self) -> str:
        return f"{PREFIX}node:{self._node}"


def _only(header: Header) -> frozenset[str] | None:
    return None if header.only is None else frozenset(header.only)
