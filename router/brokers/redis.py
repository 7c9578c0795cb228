"""The broker of many nodes, on Redis or Valkey: numbers, history and fan-out in one script a publish."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Any, TypeAlias

from msgspec import MsgspecError
from msgspec.json import encode
from msgspec.structs import replace

from router.audience import Audience, Identity
from router.brokers.base import (
    Arrive,
    Arrived,
    Broker,
    Hear,
    History,
    Limits,
    Lost,
    Moved,
    Notice,
    Person,
    Position,
    Published,
    Unread,
)
from router.brokers.continuity import Continuity, Ended, Entry, Place, Remembered, Topic
from router.brokers.layout import Header, decode_header, names_of, plain_channels, topic_of
from router.brokers.lease import Lease
from router.brokers.link import link_to
from router.brokers.post import FORGET, Post
from router.brokers.rate import Rates
from router.brokers.roster import Roster
from router.brokers.script import AWAY, Scripts, away, end
from router.brokers.seat import Seats, node_channel
from router.brokers.stream import RedisInbox
from router.brokers.subscriber import Subscriber
from router.envelope import Envelope
from router.errors import Refused, SetupError, Unavailable
from router.event import Event, Policy

__all__ = ["RedisBroker"]

log = logging.getLogger("router")

EPOCHS = 20_000
"""Topics of which a node remembers the epoch, also when nobody listens to them any more."""

NODES = node_channel("all")
"""The channel of all nodes."""

Read: TypeAlias = Callable[[bytes], tuple[Event, Policy]]
"""An event that was published as JSON, and its type's policy. Raises `BadMessage` for a type this node lacks."""


class RedisBroker(Broker):
    """Carries envelopes between nodes through Redis (6.2 or newer) or Valkey: one server, Sentinel, or a cluster.

    Joins the parts: `Post` publishes, `Subscriber` reads, `Continuity` sees that nothing is missing; `Seats`,
    `Roster` and `Rates` know who is here.
    Pub/sub may lose messages without a word, so every number is checked: a gap is filled from history, a
    connection that was lost has all its topics compared, and so does a clock.
    """

    def __init__(
        self,
        url: str,
        read: Read,
        *,
        max_events: int = 1000,
        max_age: float = 300.0,
        forget: float = FORGET,
        lease: float = 15.0,
        grace: float = 15.0,
        linger: float = 30.0,
        check_every: float = 30.0,
        watch_every: float = 5.0,
        connections: int = 100,
    ) -> None:
        """Times in seconds. `linger`: how long a topic that nobody here wants any more is still listened to.

        `lease`: how long what a killed node held still counts. `grace`: how long somebody who has gone is still here.
        """
        self._read = read
        self._max_age = max_age
        self._linger = linger
        self._check_every = check_every
        self._watch_every = watch_every
        self.node = token_hex(8)
        self._link = link_to(url, connections=connections)
        self._redis = self._link.redis
        self._scripts = Scripts(
            self._redis, refresh=self._link.refresh, lane_of=self._link.lane_of, confirm=self._link.confirm
        )
        self._post = Post(self._scripts, self._link.verb, max_events=max_events, max_age=max_age, forget=forget)
        self._subscriber = Subscriber(self._link, self._own_channel, self._take, self._missed)
        self._continuity = Continuity(
            self._remembered, self._renumber, self._deliver, self._tell_lost, self._tell_moved, self._note_lacking
        )
        self._lease = Lease(self._scripts, self.node, lease, grace)
        self._rates = Rates(self._scripts)
        self._seats = Seats(self._lease, self._rates)
        self._roster = Roster(self._redis, self._scripts, self._lease, self.node)
        self.inbox = RedisInbox(self._redis, self._scripts)
        self._epochs: dict[str, str] = {}
        """Under which epoch each topic was seen last, those first that were not for the longest."""
        self._tasks: list[asyncio.Task[None]] = []
        self._arrive: Arrive = lambda _: None
        self._lost: Lost = lambda _topic, _position: None
        self._hear: Hear = lambda _: None
        self._moved: Moved = lambda _topic, _position: None
        self._unread: Unread = lambda _topic, _seq: None

    # -- life

    async def start(
        self,
        arrive: Arrive,
        lost: Lost,
        hear: Hear = lambda _: None,
        *,
        moved: Moved = lambda _topic, _position: None,
        unread: Unread = lambda _topic, _seq: None,
    ) -> None:
        self._arrive, self._lost, self._hear = arrive, lost, hear
        self._moved, self._unread = moved, unread
        try:
            await self._redis.ping()
            await self._subscriber.start()
            await self._subscriber.subscribe([NODES])
            await self._lease.beat()
        except (Unavailable, *AWAY) as error:
            await self.stop()
            why = error if isinstance(error, Unavailable) else away(error)
            hint = "" if "says" in why.message else "; is it running, and is this its address?"
            raise SetupError(f"`broker` (ROUTER_BROKER): {why.message}{hint}") from None
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(work()) for work in (self._lease.keep, self._keep_checking)]

    async def stop(self) -> None:
        await end(*self._tasks)
        await self._continuity.stop()
        await self._lease.end()
        await self._scripts.close()
        await self._subscriber.stop()
        with contextlib.suppress(*AWAY):
            await self._link.close()

    def tell(self, note: bytes, node: str | None = None) -> None:
        channel = NODES if node is None else node_channel(node)
        with contextlib.suppress(Unavailable):
            said = self._scripts.ask("tell", (channel,), (b"note " + note,))
            said.add_done_callback(lambda done: done.cancelled() or done.exception())  # who hears it was to answer

    async def others(self) -> int:
        return await self._lease.others()

    async def ready(self) -> bool:
        try:
            async with asyncio.timeout(1):
                return self._subscriber.up and bool(await self._redis.ping())
        except AWAY:
            return False

    # -- publishing

    async def publish(self, envelope: Envelope) -> Published:
        return await self._post.publish(envelope)

    # -- history

    async def history(self, topic: str, after: int) -> History:
        found = await self._remembered(topic, after)
        top = found.position
        envelopes, ages, unread = [], [], set()
        complete = after <= top.seq and len(found.entries) == top.seq - after
        for seq, rest, age in found.entries:
            if age > self._max_age:
                complete = False
                continue
            envelope = self._envelope(topic, seq, rest)
            if envelope is None:
                unread.add(seq)
            else:
                envelopes.append(envelope)
                ages.append(age)
        return History(
            top,
            envelopes,
            complete,
            ages=ages,
            whole=not found.past,
            joints=[ended.seq for ended in found.past.values()],
            breaks=[ended.seq for ended in found.past.values() if ended.doubtful],
            unread=frozenset(unread),
        )

    async def catch_up(self, topic: str) -> None:
        await self._continuity.filled(topic)

    async def position(self, topic: str) -> Position:
        return await self._post.position(topic)

    async def _remembered(self, topic: str, after: int | None) -> Remembered:
        names = names_of(topic)
        arguments = ("" if after is None else after, token_hex(8), self._post.quiet_ms)
        answer = await self._scripts.run("history", (names.meta, names.log, names.loose), arguments)
        try:
            found = _read_memory(answer)
        except (ValueError, TypeError, AttributeError):  # whoever may write there may write anything
            what = "what the broker remembers of %s is not readable"
            log.error(what, topic, extra={"event": "unreadable"})
            raise Unavailable(what % topic, retry_after=1.0) from None
        return await self._succeeding(topic, found)

    async def _succeeding(self, topic: str, found: Remembered) -> Remembered:
        """`found`, with the epoch that this node remembers of `topic` where the server has forgotten it.

        A server that was emptied numbers from 1 again, and does not know that these are not a topic's first events.
        """
        before, epoch = self._epochs.get(topic), found.place.epoch
        if before is not None and before != epoch and before not in found.past:
            await self._note_lacking(topic, epoch, before, None)
            found = replace(found, past={before: Ended(0, 0, doubtful=True), **found.past})
        self._epochs.pop(topic, None)  # not before that is written down, and now as the last
        self._epochs[topic] = epoch
        if len(self._epochs) > EPOCHS:
            del self._epochs[next(iter(self._epochs))]
        return found

    async def _note_lacking(self, topic: str, epoch: str, before: str, seen: int | None) -> None:
        """Have all nodes know that `epoch` lacks something of the one `before` it, of which `seen` was the last here."""
        arguments = (epoch, before, "" if seen is None else seen, token_hex(8), self._link.verb)
        await self._scripts.run("lacking", (names_of(topic).meta,), arguments)

    async def _renumber(self, topic: str, epoch: str) -> None:
        log.error("the broker lost events that it had told of: %s starts anew", topic, extra={"event": "epoch_ended"})
        await self._scripts.run("renumber", (names_of(topic).meta,), (epoch, token_hex(8)))

    # -- arriving

    async def subscribe(self, topic: str) -> Position:
        topics = self._continuity.topics
        known = topics.get(topic)
        if known is None:
            known = topics[topic] = Topic()
            known.count = 1
            try:
                await self._subscriber.subscribe(plain_channels(topic), sharded=[names_of(topic).channel])
                await self._continuity.begin(topic, known)
            except BaseException:
                # Those who wait for the same topic are told as well, and the next one begins anew.
                topics.pop(topic, None)
                known.failed = True
                known.ready.set()
                await self._subscriber.unsubscribe([*plain_channels(topic), names_of(topic).channel])
                raise
            known.ready.set()
        else:
            known.count += 1
            await known.ready.wait()
            if known.failed:
                raise Unavailable("the broker cannot be reached", retry_after=1.0)
        return Position(known.epoch, known.seq)

    async def unsubscribe(self, topic: str) -> None:
        known = self._continuity.topics.get(topic)
        if known is not None:
            known.count -= 1
            known.idle_since = time.monotonic()

    async def _sweep(self) -> None:
        """Stop listening to what nobody here has wanted for a while."""
        while idle := self._continuity.idle(self._linger):  # asked each time: somebody may come meanwhile
            topic = idle[0]
            del self._continuity.topics[topic]
            await self._subscriber.unsubscribe([*plain_channels(topic), names_of(topic).channel])

    def _take(self, channel: str, data: bytes) -> None:
        """One message of the connection, in the order of its arrival."""
        topic = topic_of(channel)
        if topic is not None:
            epoch, number, rest = data.split(b" ", 2)
            self._continuity.take(topic, epoch.decode(), int(number), rest)
        elif channel in (self._own_channel, NODES):
            word, _, note = data.partition(b" ")
            if word == b"note":
                self._hear(note)
            else:
                self._seats.tell(data)
        else:
            self._take_plain(channel, data)

    def _missed(self, channel: str, doubtful: bool) -> None:
        topic = topic_of(channel)
        if topic is not None:
            self._continuity.fill(topic, doubtful=doubtful)
        elif channel == self._own_channel:
            self._seats.missed()

    def _deliver(self, topic: str, seq: int, rest: bytes) -> None:
        envelope = self._envelope(topic, seq, rest)
        if envelope is not None:
            self._arrive(envelope)
        elif seq:
            self._unread(topic, seq)

    def _tell_moved(self, topic: str, position: Position) -> None:
        self._moved(topic, position)

    def _tell_lost(self, topic: str, position: Position) -> None:
        self._lost(topic, position)

    def _take_plain(self, channel: str, data: bytes) -> None:
        """What a backend published that knows nothing of us: `PUBLISH project:<id> <json>`. It has no number."""
        known = self._continuity.topics.get(channel)
        if known is not None and known.count:
            envelope = self._envelope(channel, 0, encode(Header(at=time.time())) + b"\n" + bytes(data).strip())
            if envelope is not None:
                self._arrive(envelope)

    def _envelope(self, topic: str, seq: int, rest: bytes) -> Envelope | None:
        """A message as an envelope; None for one that this node cannot read, which is logged without its text."""
        head, _, payload = rest.partition(b"\n")
        payload = payload.strip()  # what is added to an event is added before its last byte
        try:
            header = decode_header(head)
            event, policy = self._read(payload)
        except (Refused, MsgspecError, UnicodeError, RecursionError) as error:
            why = error.code if isinstance(error, Refused) else "its header"
            log.warning("an event on %s is not readable here: %s", topic, why, extra={"event": "unreadable"})
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
            published_at=header.at or time.time(),  # publishers in other languages may leave it out
            traceparent=header.trace,
        )

    # -- upkeep

    async def _keep_checking(self) -> None:
        """Notice what makes no noise: a dead connection, a lost message that no other followed."""
        checked_at = time.monotonic()
        while True:
            await asyncio.sleep(self._watch_every)
            try:
                await self._subscriber.watch(2 * self._watch_every)
                await self._sweep()
                self._seats.sweep()
                if time.monotonic() - checked_at >= self._check_every:
                    checked_at = time.monotonic()
                    await self.check()
            except Exception as error:  # the next round looks again, whatever it was
                log.error("a check failed: %s", type(error).__name__, extra={"event": "check_failed"})

    async def check(self) -> None:
        """Compare all topics' numbers with the server's, and fetch what is missing."""
        await self._continuity.check(self._places)

    async def _places(self, topics: list[str]) -> list[Place | None]:
        """Where `topics` stand, in one round trip. What is listened to is also kept from being forgotten."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for topic in topics:
                pipeline.hmget(names_of(topic).meta, "epoch", "seq", "loose")
            answers = await pipeline.execute()
            for topic, (_, seq, _) in zip(topics, answers, strict=True):
                pipeline.pexpire(names_of(topic).meta, self._post.meta_ms if int(seq or 0) else self._post.quiet_ms)
            await pipeline.execute()
        return [
            None if epoch is None else Place(epoch.decode(), int(seq), int(loose or 0)) for epoch, seq, loose in answers
        ]

    # -- who is here, and how many

    async def claim(self, user: str, project: str, limits: Limits) -> str | None:
        return await self._seats.claim(user, project, limits)

    async def release(self, user: str, project: str) -> None:
        await self._seats.release(user, project)

    async def enter(self, project: str, user: str) -> Arrived:
        return await self._roster.enter(project, user)

    async def leave(self, project: str, user: str) -> Person | None:
        return await self._roster.leave(project, user)

    async def people(self, project: str) -> list[Person]:
        return await self._roster.people(project)

    async def set_status(self, project: str, user: str, status: str) -> Person:
        return await self._roster.set_status(project, user, status)

    async def untold(self) -> list[Notice]:
        return await self._roster.untold()

    async def told(self, notices: Sequence[Notice]) -> None:
        await self._roster.told(notices)

    async def doubt(self, notices: Sequence[Notice]) -> None:
        await self._roster.doubt(notices)

    async def spend(self, user: str, cost: float, rate: float, burst: float) -> float:
        return await self._rates.spend(user, cost, rate, burst)

    @property
    def _own_channel(self) -> str:
        return node_channel(self.node)


def _read_memory(answer: list[Any]) -> Remembered:
    """What the script `history` answered."""
    epoch, seq, loose, past, now, entries, loose_entries = answer
    words = iter(past.decode().split())
    return Remembered(
        Place(epoch.decode(), seq, loose),
        [_entry(each, now) for each in entries],
        [_entry(each, now) for each in loose_entries],
        {
            name: Ended(int(last), int(count), doubtful != "0")
            for name, last, count, doubtful in zip(words, words, words, words, strict=True)
        },
    )


def _entry(entry: tuple[bytes, list[bytes]], now: int) -> Entry:
    """Number, header and event, and age of an entry; of one that somebody else wrote there may be only the number."""
    id_, flat = entry
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    at = fields.get(b"t", b"")
    age = max(0.0, (now - int(at)) / 1000) if at.isdigit() else 0.0
    return int(id_.partition(b"-")[0]), fields.get(b"e", b""), age


def _only(header: Header) -> frozenset[str] | None:
    return None if header.only is None else frozenset(header.only)
