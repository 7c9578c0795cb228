"""What backends import that reach the same Redis as the router: publishes, and takes what people send."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakSet

from opentelemetry import trace

from router import presence, wire
from router.audience import EVERYONE, Audience, user_topic
from router.brokers.base import Dead
from router.brokers.link import link_to
from router.brokers.post import Post, published
from router.brokers.script import BATCH, Scripts
from router.brokers.stream import RedisInbox
from router.catalog import Catalog, Found, discover
from router.consumer import Consumer
from router.dispatch import MAX_EVENT, Dispatch
from router.errors import BadMessage, Disconnect, SetupError
from router.event import Event
from router.plugin import Plugin
from router.session import topics_of
from router.tracing import Tracing, current_traceparent

__all__ = ["Backend"]


class Backend:
    """Publishes typed events through Redis or Valkey, many in one round trip, and takes what people send.

    Use it as an async context manager, one for the whole process. Events of one topic keep the order in which they
    were published. While Redis is away, publishes wait in order: at most `room` of them, each at most `patience`
    seconds; one more is refused at once, so memory is bounded and nobody waits without knowing.

        async with Backend("redis://127.0.0.1:6379/0") as backend:
            await backend.publish("proj_123", StepCompleted(step_id="step_123", result={"row_count": 1500}))
    """

    def __init__(
        self,
        url: str,
        *,
        plugins: Iterable[Plugin | Path | str] = (),
        patience: float = 30.0,
        room: int = 1000,
        max_event: int = MAX_EVENT,
        history_events: int = 1000,
        history_seconds: float = 300.0,
    ) -> None:
        """`url`: what the router has as `broker`. `plugins`: as `ROUTER_PLUGINS`, folders, or plugins themselves.

        The history is bounded by whoever publishes, so `history_*` should be what the router has. Raises
        `SetupError` for a URL or a plugin that cannot be used.
        """
        if url.startswith("memory:"):
            raise SetupError("Backend needs a Redis: a router on memory:// is reached over HTTP, with `Publisher`")
        self._tracing = _tracing()
        self._dispatch = Dispatch(_catalog(plugins), self._tracing, max_event=max_event)
        self._link = link_to(url)
        self._scripts = Scripts(
            self._link.redis,
            patience=patience,
            room=room,
            refresh=self._link.refresh,
            lane_of=self._link.lane_of,
            confirm=self._link.confirm,
        )
        self._post = Post(self._scripts, self._link.verb, max_events=history_events, max_age=history_seconds)
        self._inbox = RedisInbox(self._link.redis, self._scripts)
        self._consumers: WeakSet[Consumer] = WeakSet()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give back what is not acknowledged, and let go of the connections.

        What still waits for Redis raises `Unavailable`.
        """
        await asyncio.gather(*(consumer.aclose() for consumer in list(self._consumers)))
        await self._scripts.close()
        await self._link.close()

    # -- backend to people

    async def publish(
        self, project: str, *events: Event, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """Publish to everybody who has `project` open. Returns the numbers that the events got.

        Many events share a round trip. With a `message_id` the same call can be made again after `Unavailable`, for
        as long as history lasts: what was published already keeps its number and reaches nobody twice.
        `traceparent`: the trace that they belong to; without it, the one that this code runs in.

        Raises `BadMessage` and `TooLarge` before anything is published, `Unavailable` when Redis is away for longer
        than `patience`, or when `room` publishes wait for it already.
        """
        return await self._publish(_project(project), [(event, None) for event in events], message_id, traceparent)

    async def publish_json(
        self, project: str, *events: bytes | str, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """As `publish`, for events that are JSON objects already. They are checked, and arrive as they are."""
        read = [self._dispatch.read_foreign(each.encode() if isinstance(each, str) else each) for each in events]
        return await self._publish(_project(project), read, message_id, traceparent)

    async def publish_to_user(
        self, user: str, *events: Event, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """Publish to all connections of one person, whatever project they have open. Else as `publish`."""
        return await self._publish(user_topic(user), [(event, None) for event in events], message_id, traceparent)

    async def publish_to_all(
        self, *events: Event, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """Publish to everybody who is connected. Else as `publish`."""
        return await self._publish(EVERYONE, [(event, None) for event in events], message_id, traceparent)

    async def position(self, project: str) -> str:
        """Where `project` stands, for a client's `since`.

        Ask for it before you load a state that a page is to begin with: what is published meanwhile then comes to
        the page, at worst once more. Raises `Unavailable`.
        """
        return (await self._post.position(_project(project))).since

    # -- people to backend

    def messages(
        self,
        *kinds: str,
        group: str = "backend",
        name: str | None = None,
        idle: float = 60.0,
        tries: int = 5,
        ahead: int = 1,
    ) -> Consumer:
        """What people send of the types `kinds`, as their plugins forward it: `async for message in ...`.

        Every `group` gets each message; within a group one of its consumers does. What a consumer that died had in
        hand goes to another after `idle` seconds; what was handed out `tries` times without an acknowledgement is a
        dead letter. A group that asks for the first time gets what is still there. `ahead`: see `Consumer`. While
        Redis is away the iteration waits. Raises `BadMessage` for a type that no plugin has.
        """
        for kind in kinds:
            self._dispatch.catalog.plugin(kind)
        consumer = Consumer(
            self._inbox,
            lambda payload: self._dispatch.read(payload)[0],
            kinds,
            group,
            name=name,
            idle=idle,
            tries=tries,
            ahead=ahead,
            tracing=self._tracing,
        )
        self._consumers.add(consumer)
        return consumer

    async def dead_letters(self, kind: str, count: int = 100) -> list[Dead]:
        """The oldest messages of a type that no consumer could deal with, and why."""
        return await self._inbox.dead(kind, count)

    async def revive(self, *dead: Dead) -> None:
        """Hand dead letters out again, to the group that could not deal with them."""
        await self._inbox.revive(*dead)

    async def _publish(
        self,
        topic: str,
        events: Sequence[tuple[Event, bytes | None]],
        message_id: str | None,
        traceparent: str | None,
    ) -> list[int]:
        traceparent = traceparent or current_traceparent()
        written: list[tuple[Event, bytes]] = []
        for event, payload in events:
            self._dispatch.refuse_internal(event)
            written.append((event, wire.write(event) if payload is None else payload))
            self._dispatch.fits(written[-1][1])
        numbers: list[int] = []
        for start in range(0, len(written), BATCH):
            asked = []
            for index, (event, payload) in enumerate(written[start : start + BATCH], start):
                id_ = None if message_id is None else f"{message_id}:{index}"
                with self._dispatch.sending(
                    Audience(topic), event, payload=payload, message_id=id_, traceparent=traceparent
                ) as (_, envelope):
                    asked.append(self._post.ask(envelope))
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
                numbers.append(published(answer).position.seq)
        return numbers


def _project(project: str) -> str:
    try:
        return topics_of(project, "")[0]
    except Disconnect as error:
        raise BadMessage(error.reason) from None


def _catalog(plugins: Iterable[Plugin | Path | str]) -> Catalog:
    given = list(plugins)
    folders = [Path(each) for each in given if not isinstance(each, Plugin)]
    own = [Found(plugin, "router.presence") for plugin in presence.PLUGINS]
    values = [Found(plugin, "Backend(plugins=...)") for plugin in given if isinstance(plugin, Plugin)]
    found, problems = discover("plugins", folders)
    known = {id(entry.plugin) for entry in found}
    catalog = Catalog(
        [*own, *found, *(entry for entry in values if id(entry.plugin) not in known)],
        problems,
        reserved=wire.CONTROL_TAGS,
    )
    if catalog.problems:
        raise SetupError("\n".join(map(str, catalog.problems)))
    return catalog


def _tracing() -> Tracing:
    """The application's own tracing, where it has set up OpenTelemetry."""
    provider = trace.get_tracer_provider()
    return (
        Tracing() if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider) else Tracing(provider)
    )
