"""The Router: joins catalog, pipeline, broker and hub. Messages come in, go round, and go out here."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import FileIO
from typing import Any, BinaryIO
from uuid import uuid4

from msgspec import Struct
from msgspec.structs import replace

from router import wire
from router.audience import Audience, Identity, project_topic
from router.brokers.base import Broker, Origin, Position, Published
from router.catalog import Catalog, Found
from router.census import Census
from router.context import HandlerContext
from router.dispatch import MAX_EVENT, Dispatch
from router.envelope import Envelope
from router.errors import BadMessage, CloseCode, Disconnect, PluginFailed, Refused, place
from router.event import Event, Policy
from router.hub import Hub
from router.lane import Lanes
from router.lapse import Lapses
from router.metrics import Metrics
from router.middleware.audit import Audit
from router.middleware.auth import Auth, Authenticator
from router.middleware.coalesce import Coalesce
from router.middleware.permission import check_permission
from router.middleware.rate import RateLimit
from router.pacing import TokenBucket
from router.pipeline import DELIVERED, Forward, Middleware, Pipeline
from router.presence import Presence, PresenceUpdate
from router.receipt import Receipt, Receipts
from router.recovery import Recovery, Since, Start
from router.room import Port
from router.session import Session
from router.tracing import SpanKind, Tracing, valid_traceparent

__all__ = ["Pace", "Router"]

log = logging.getLogger("router")
plugin_log = logging.getLogger("router.plugin")


REFUSALS = (20.0, 200.0)
"""Declined messages a second, and at once, that one connection may have answered before it is closed."""


class Pace(Struct, frozen=True):
    """The figures that decide how fast and how patient the router is. Times in seconds."""

    broadcast_every: float = 1.0
    rate: float = 10.0
    burst: float = 10.0
    bad_messages_a_minute: int = 10
    handler_timeout: float = 5.0
    ack_after: float = 10.0
    ack_tries: int = 3
    max_event: int = MAX_EVENT
    token_grace: float = 25.0


class Router:
    """One node. `receive` takes what a client sent, `publish` what a backend says; `open` and `close` frame a session.

    The order of the middleware is the user's and stands once, in `middleware`; both legs run the same list.
    """

    def __init__(
        self,
        catalog: Catalog,
        broker: Broker,
        authenticate: Authenticator,
        *,
        pace: Pace = Pace(),
        audit: "BinaryIO | FileIO | None" = None,
        tracing: Tracing | None = None,
        arrange: Callable[[dict[str, Middleware]], Sequence[Middleware]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        call_later: Callable[..., object] | None = None,
    ) -> None:
        self.catalog = catalog
        self.broker = broker
        self.authenticate = authenticate
        self.pace = pace
        self.metrics = Metrics()
        self.tracing = tracing or Tracing()
        self.dispatch = Dispatch(catalog, self.tracing, max_event=pace.max_event, wall=wall)
        self.hub = Hub(acknowledged_within=pace.ack_after, clock=clock)
        self.presence = Presence(broker, self._announce)
        self.lapses = Lapses(clock)
        self.receipts = Receipts()
        self.census = Census(broker, self.receipts, self._expected)
        self.auth = Auth(authenticate, wall, self._suspend, grace=pace.token_grace)
        self.audit = Audit(audit, wall)
        self._coalesce = Coalesce(
            clock, self._later, every=pace.broadcast_every, report=self._report, fault=self._merge_failed
        )
        rate = RateLimit(clock, rate=pace.rate, burst=pace.burst, spend=broker.spend)
        order: dict[str, Middleware] = {
            "auth": self.auth,
            "permission": check_permission,
            "rate": rate,
            "coalesce": self._coalesce,
            "audit": self.audit,
        }
        self.middleware: Sequence[Middleware] = tuple(order.values()) if arrange is None else arrange(order)
        self._inbound = Pipeline(self.middleware, self._handle, self._report)
        self._outbound = Pipeline(self.middleware, self._to_hub, self._report)
        self._lanes = Lanes(self._flush, self._job_failed)
        self._clock, self._wall = clock, wall
        self._call_later = call_later
        self._recovery = Recovery(
            self.hub, broker, self._lanes, self._coalesce, self._replay, self._merge_failed, self.lapses
        )
        self._standings = self._recovery.standings
        self._bad: dict[str, TokenBucket] = {}
        self._refusals: dict[str, TokenBucket] = {}
        self.on_refresh: Callable[[Session], None] = lambda _: None
        """Told of each session whose identity was refreshed."""

    async def start(self) -> None:
        """Connect the broker."""
        await self.broker.start(
            self.arrive, self._lost, self.census.hear, moved=self._epoch_moved, unread=self._unreadable
        )

    async def stop(self) -> None:
        """Let what is under way finish, then let go of broker and audit log."""
        await self._lanes.idle()
        await self.broker.stop()
        self.audit.close()

    # -- backend to people

    async def publish(
        self,
        audience: Audience,
        event: Event,
        *,
        payload: bytes | None = None,
        message_id: str | None = None,
        traceparent: str | None = None,
        sender: Identity | None = None,
    ) -> Published:
        """Publish `event`. `payload`: its JSON, when it came as JSON and shall arrive as it came.

        Raises `BadMessage` for a type no plugin has, `TooLarge`, and `Unavailable` when the broker is away.
        """
        with self.dispatch.sending(
            audience, event, payload=payload, message_id=message_id, traceparent=traceparent, sender=sender
        ) as (span, envelope):
            published = await self.broker.publish(envelope)
            if span is not None:
                span.set_attribute("messaging.message.id", str(published.position.seq))
        return published

    async def publish_and_wait(
        self,
        audience: Audience,
        event: Event,
        within: float,
        *,
        payload: bytes | None = None,
        message_id: str | None = None,
        traceparent: str | None = None,
    ) -> tuple[Published, Receipt]:
        """Publish `event` as a critical one and wait, at most `within` seconds, until everybody has acknowledged it."""
        event, payload = wire.critical(event, payload, message_id or uuid4().hex)
        assert event.message_id is not None
        topic, id_ = audience.topic, event.message_id
        grant = self.catalog.plugin_of(event).policy.receive
        self.receipts.open(topic, id_)
        try:
            self.census.watch(topic, id_)
            published = await self.publish(
                audience, event, payload=payload, message_id=message_id, traceparent=traceparent
            )
            expected = await self._expected(topic, grant) | await self.census.expected(topic, id_, grant, within)
        except BaseException:
            self.receipts.drop(topic, id_)
            raise
        return published, await self.receipts.wait(topic, id_, expected, within)

    async def _expected(self, topic: str, grant: str) -> set[str]:
        """Who here shall get an event of `topic` that was published before."""
        await self._lanes.run(topic, partial(self._flush, topic))
        return self.hub.users(topic, grant)

    def arrive(self, envelope: Envelope) -> None:
        """What the broker carries here: through the outbound leg, in its topic's turn."""
        self._lanes.put(envelope.topic, partial(self._deliver, envelope))

    def _lost(self, topic: str, position: Position) -> None:
        """The broker lost the thread of `topic`: whoever listens here must reload."""
        self._lanes.put(topic, partial(self._restart, topic, position))

    async def _restart(self, topic: str, position: Position) -> None:
        self.lapses.restart(topic)
        await self._standings.restart(topic, position)

    def _epoch_moved(self, topic: str, position: Position) -> None:
        """The numbers of `topic` go on under another epoch."""
        self._lanes.put(topic, partial(self._standings.move, topic, position))

    def _unreadable(self, topic: str, seq: int) -> None:
        """There is an event that this node cannot read."""
        self._lanes.put(topic, partial(self._standings.unread, topic, seq))

    async def _deliver(self, envelope: Envelope) -> None:
        try:
            self._standings.note(envelope)
            attributes = {"messaging.operation.type": "process", "messaging.message.id": str(envelope.seq)}
            with self.tracing.span(f"deliver {envelope.type}", SpanKind.CONSUMER, envelope.traceparent, attributes):
                await self._outbound(envelope)
        except (Refused, Disconnect):
            pass  # reported by the pipeline; a backend's message has no sender here to tell
        finally:
            self._standings.passed(envelope)

    def _written(self, envelope: Envelope) -> Envelope:
        """With its JSON, also where a merge or a middleware made it anew. Raises `PluginFailed` where there is none.

        In the hub it would hold up the whole room, each time that this is to be written.
        """
        if envelope.payload is not None:
            return envelope
        try:
            return replace(envelope, payload=wire.write(envelope.event))
        except Exception as error:
            self._plugin_failed(envelope, "made what cannot be written as JSON", error)
            raise PluginFailed(f"a merge of `{envelope.type}` cannot be written as JSON") from None

    async def _replay(self, envelope: Envelope, to: Forward) -> None:
        """Run `envelope`, which somebody missed, through the outbound leg to them alone."""

        async def end(envelope: Envelope) -> None:
            await to(self._written(envelope))

        await self._outbound(envelope, end)

    async def _to_hub(self, envelope: Envelope) -> None:
        envelope = self._written(envelope)
        if envelope.published_at:
            self.metrics.latency.observe(max(0.0, self._wall() - envelope.published_at))
        self.lapses.note(envelope)
        await self.hub.deliver(await self._standings.spare(envelope))
        if not self._lanes.busy(envelope.topic):  # a middleware forwards it later, out of turn
            self._lanes.put(envelope.topic, _nothing)

    async def _flush(self, topic: str) -> None:
        self.metrics.deliveries.inc(await self.hub.flush(topic))

    # -- people to backend

    async def receive(self, session: Session, data: str | bytes) -> None:
        """Take one message of a client. A bad one is answered with an `error` frame.

        Raises `Disconnect` when the connection must end.
        """
        ref = None
        try:
            head = wire.read_head(data)
            ref = wire.mark_of(head)
            event = self._read_inbound(session, head, data)
        except Refused as refusal:
            self.metrics.error(refusal.code)
            self.audit.unread(session.topics[0], session.user, session.id, f"refused:{refusal.code}")
            self.refuse(session, refusal, ref, bad=True)
            return
        if event is not None:
            await self._process(session, event, ref, valid_traceparent(head.traceparent))

    async def _process(self, session: Session, event: Event, ref: str | None, trace: str | None) -> None:
        policy = _REFRESH_POLICY if isinstance(event, wire.AuthRefresh) else self.catalog.plugin_of(event).policy
        envelope = Envelope(
            event=event,
            policy=policy,
            audience=Audience(session.topics[0]),
            leg="inbound",
            sender=session.identity,
            session=session.id,
            ref=ref,
            published_at=self._wall(),
        )
        attributes = {"messaging.operation.type": "process"}
        try:
            with self.tracing.span(f"process {envelope.type}", SpanKind.CONSUMER, trace, attributes) as (_, context):
                await self._inbound(replace(envelope, traceparent=context))
        except Refused as refusal:
            self.refuse(session, refusal, ref)

    def _read_inbound(self, session: Session, head: wire.Head, data: str | bytes) -> Event | None:
        """The event that a client sent; None for what only the router itself is told."""
        if head.type not in wire.CONTROL_TAGS:
            self.catalog.plugin(head.type)
            event: Event = wire.read(self.catalog.decoder(head.type), data)
            # Whether a message must be acknowledged, and under which id, is not for another person to say.
            return (
                replace(event, requires_ack=False, message_id=None) if event.requires_ack or event.message_id else event
            )
        message = wire.read_control(head, data)
        if isinstance(message, wire.AuthRefresh):
            return message
        if isinstance(message, wire.Ack):
            if message.message_id is None and message.pos is None:
                raise BadMessage("`ack` needs `message_id` or `pos`")
            session.acknowledges = True
            for envelope in self.hub.acknowledge(session, message_id=message.message_id, pos=message.pos):
                self.receipts.acknowledged(envelope.topic, envelope.ack_id, session.user)
        return None

    def refuse(self, session: Session, refusal: Refused, ref: str | None = None, *, bad: bool = False) -> None:
        """Answer with an `error` frame. Raises `Disconnect` after too many `bad` messages in a minute."""
        self.hub.say(session, wire.error(refusal, ref))
        flood = self._refusals.setdefault(session.id, TokenBucket(*REFUSALS))
        if flood.take(self._clock()):
            raise Disconnect(CloseCode.BAD_MESSAGES, "too many messages that were declined")
        if bad:
            allowed = self.pace.bad_messages_a_minute
            bucket = self._bad.setdefault(session.id, TokenBucket(allowed / 60, allowed))
            if bucket.take(self._clock()):
                raise Disconnect(CloseCode.BAD_MESSAGES, f"more than {allowed} bad messages in a minute")

    async def _handle(self, envelope: Envelope) -> None:
        """The end of the inbound leg."""
        if isinstance(envelope.event, wire.AuthRefresh):
            self._refreshed(envelope)
            return
        if isinstance(envelope.event, PresenceUpdate):
            assert envelope.sender is not None
            project = envelope.topic.removeprefix("project:")
            await self.presence.update(project, envelope.sender.user, envelope.event.status)
            return
        plugin = self.catalog.plugin_of(envelope.event)
        context = HandlerContext(envelope, self.publish, self._reply, self._forward)
        if plugin.handle is None:
            await context.publish(envelope.event)
            return
        try:
            async with asyncio.timeout(self.pace.handler_timeout):
                await plugin.handle(envelope.event, context)
        except (Refused, Disconnect):
            raise
        except TimeoutError:
            reason = f"took longer than {self.pace.handler_timeout:g} s"
            self._plugin_failed(envelope, reason)
            raise PluginFailed(f"the handler of `{plugin.tag}` {reason}", temporary=True) from None
        except Exception as error:
            # The exception's text may quote the message, so only its type is told and logged.
            self._plugin_failed(envelope, f"raised {type(error).__name__}", error)
            raise PluginFailed(f"the handler of `{plugin.tag}` failed") from None

    def _reply(self, envelope: Envelope, event: Event) -> None:
        """Send `event` to the session that sent `envelope`, in turn with its project's messages."""
        policy = self.catalog.plugin_of(event).policy
        audience = Audience(envelope.topic, only=frozenset({envelope.session or ""}))
        payload = wire.write(event)
        self.arrive(
            Envelope(event=event, policy=policy, audience=audience, payload=payload, traceparent=envelope.traceparent)
        )

    async def _forward(self, envelope: Envelope, event: Event) -> None:
        """Have `event`, which `envelope` brought, wait for the backends that want its type."""
        tag = self.catalog.plugin_of(event).tag
        payload = wire.write(event)
        self.dispatch.fits(payload)
        assert envelope.sender is not None
        attributes = {"messaging.operation.type": "send", "messaging.message.id": (id_ := uuid4().hex)}
        with self.tracing.span(f"forward {tag}", SpanKind.PRODUCER, envelope.traceparent, attributes) as (_, trace):
            origin = Origin(
                project=envelope.topic.removeprefix("project:"),
                user=envelope.sender.user,
                session=envelope.session or "",
                at=envelope.published_at,
                id=id_,
                traceparent=trace,
            )
            await self.broker.inbox.put(tag, origin, payload)
        self.metrics.forwarded.labels(tag).inc()

    def _refreshed(self, envelope: Envelope) -> None:
        session = self.hub.session(envelope.session or "")
        fresh = envelope.sender
        if session is None or fresh is None:
            return

        def change() -> None:
            session.identity = fresh

        self.hub.refile(session, change)
        self.auth.watch(session.id, fresh.expires_at)
        self.on_refresh(session)
        self._recovery.readmit(session)
        self.hub.say(session, wire.encode(wire.TokenRefreshed(expires_in=self._remaining(fresh))))

    # -- sessions

    async def open(self, session: Session, port: Port, since: Since | None, ping_every: float) -> bool:
        """`prepare` and `enter` in one."""
        return await self.enter(session, port, await self.prepare(session, since), since, ping_every)

    async def prepare(self, session: Session, since: Since | None) -> dict[str, Start]:
        """Listen for `session` to its topics, before it is accepted. Call `close` in any case.

        `since`: what it has, by topic. Raises `Unavailable`.
        """
        return await self._recovery.prepare(session, since)

    async def enter(
        self, session: Session, port: Port, starts: dict[str, Start], since: Since | None, ping_every: float
    ) -> bool:
        """Let `session` in: tell it where it stands, bring it up to date, and have it hear what comes.

        `starts`: what `prepare` returned. Returns whether it was recovered.
        """
        self.auth.watch(session.id, session.identity.expires_at)
        left = self._remaining(session.identity)
        return await self._recovery.enter(session, port, starts, since, ping_every, left)

    async def close(self, session: Session) -> None:
        """`session` is gone."""
        self.hub.remove(session)
        self.auth.forget(session.id)
        self._bad.pop(session.id, None)
        self._refusals.pop(session.id, None)
        await self._recovery.close(session)

    def _suspend(self, session: str) -> None:
        found = self.hub.session(session)
        if found is not None:
            self.hub.suspend(found)

    def slow(self, session: Session) -> None:
        """`session` does not read fast enough: out of its rooms until it does."""
        self.metrics.slow.inc()
        self.hub.pause(session)

    def resume(self, session: Session) -> None:
        """A slow `session` reads again: bring it up to date and back into its rooms."""
        self._recovery.resume(session)

    # -- small things

    def _remaining(self, identity: Identity) -> float | None:
        left = identity.expires_at - self._wall()
        return None if left == float("inf") else round(max(0.0, left), 3)

    def _later(self, when: float, topic: str, job: Callable[[], Any]) -> None:
        call_later = self._call_later or asyncio.get_running_loop().call_later
        call_later(max(0.0, when - self._clock()), self._lanes.put, topic, job)

    def _report(self, envelope: Envelope, outcome: str) -> None:
        self.metrics.message(envelope, outcome)
        if outcome != DELIVERED:  # what is delivered passes the audit itself, last in the list
            self.audit.report(envelope, outcome)

    async def _announce(self, project: str, event: Event) -> None:
        await self.publish(Audience(project_topic(project)), event)

    def _merge_failed(self, envelope: Envelope, what: str) -> None:
        self._plugin_failed(envelope, what)

    def _plugin_failed(self, envelope: Envelope, what: str, error: Exception | None = None) -> None:
        self.metrics.error("plugin_failed")
        at = None if error is None else place(error)
        # An exception's text may quote the message: `router dev` shows it, a server does not.
        shown = error if plugin_log.isEnabledFor(logging.DEBUG) else None
        plugin_log.error(
            "plugin %s %s", self._source(envelope), what, extra={"event": "plugin_failed", "place": at}, exc_info=shown
        )

    def _source(self, envelope: Envelope) -> str:
        found: Found | None = next((f for f in self.catalog if f.plugin.tag == envelope.type), None)
        return envelope.type if found is None else f"{found.source} ({envelope.type})"

    def _job_failed(self, _topic: str, error: Exception) -> None:
        if not isinstance(error, Refused | Disconnect):
            self.metrics.error("internal")
            log.error(
                "delivery failed: %s", type(error).__name__, extra={"event": "delivery_failed", "place": place(error)}
            )


async def _nothing() -> None:
    """A job that only has its topic settled."""


_REFRESH_POLICY = Policy(send="view", cost=0.0)
