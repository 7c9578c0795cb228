"""The SDK for code that does not await: Django, Flask, Celery, scripts."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from router.backend import Backend
from router.brokers.base import Dead
from router.consumer import Message
from router.event import Event
from router.publisher import Acknowledged, Publisher
from router.tracing import current_traceparent

__all__ = ["SyncBackend", "SyncMessage", "SyncPublisher"]

T = TypeVar("T")
S = TypeVar("S", Backend, Publisher)


_abandoned: list[object] = []
"""What a fork brought along and the parent still uses. Were it collected here, its connections would be closed, and
with them their places in the epoll set that parent and child share: the parent would hear nothing any more."""


class _Loop:
    """An event loop in a thread of its own, for as long as it is not closed."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="event-router", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there and wait for what comes of it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C here: nobody waits there either
            raise

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


class _Sync(Generic[S]):
    """One asynchronous client, used from any thread. What several threads publish at once shares its round trips.

    It connects with its first use, and anew after a fork: a worker of gunicorn or Celery may use what was made
    before it was forked.
    """

    def __init__(self, make: Callable[[], S]) -> None:
        self._make: Callable[[], S] = make
        self._lock = threading.Lock()
        self._made: tuple[int, _Loop, S] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections. It can be used again; then it connects anew."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None and made[0] == os.getpid():
            _, loop, client = made
            loop.wait(client.close())
            loop.close()
        elif made is not None:
            _abandoned.append(made)

    async def _connect(self) -> S:
        """Made in the loop that it will live in."""
        return self._make()

    def _open(self) -> tuple[_Loop, S]:
        # A fork may have taken the lock along, held by a thread that is not there any more.
        if self._made is not None and self._made[0] != os.getpid():
            _abandoned.append(self._made)
            self._lock, self._made = threading.Lock(), None
        with self._lock:
            if self._made is None:
                loop = _Loop()
                self._made = (os.getpid(), loop, loop.wait(self._connect()))
            return self._made[1], self._made[2]


class SyncBackend(_Sync[Backend]):
    """`Backend` for code that does not await. Same arguments, same errors; safe to share between threads.

    with SyncBackend("redis://127.0.0.1:6379/0") as backend:
        backend.publish("proj_123", StepCompleted(step_id="step_123", result={"row_count": 1500}))
    """

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(lambda: Backend(url, **options))

    def publish(
        self, project: str, *events: Event, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """See `Backend.publish`."""
        loop, client = self._open()
        trace = traceparent or current_traceparent()
        return loop.wait(client.publish(project, *events, message_id=message_id, traceparent=trace))

    def publish_json(
        self, project: str, *events: bytes | str, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """See `Backend.publish_json`."""
        loop, client = self._open()
        trace = traceparent or current_traceparent()
        return loop.wait(client.publish_json(project, *events, message_id=message_id, traceparent=trace))

    def publish_to_user(
        self, user: str, *events: Event, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """See `Backend.publish_to_user`."""
        loop, client = self._open()
        trace = traceparent or current_traceparent()
        return loop.wait(client.publish_to_user(user, *events, message_id=message_id, traceparent=trace))

    def publish_to_all(
        self, *events: Event, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """See `Backend.publish_to_all`."""
        loop, client = self._open()
        trace = traceparent or current_traceparent()
        return loop.wait(client.publish_to_all(*events, message_id=message_id, traceparent=trace))

    def position(self, project: str) -> str:
        """See `Backend.position`."""
        loop, client = self._open()
        return loop.wait(client.position(project))

    def messages(self, *kinds: str, **options: Any) -> "Iterator[SyncMessage]":
        """See `Backend.messages`. While the loop's body runs, the message is held by the thread behind it."""
        loop, client = self._open()
        consumer = aiter(client.messages(*kinds, **options))

        async def following() -> Message | None:
            return await anext(consumer, None)

        try:
            while (message := loop.wait(following())) is not None:
                yield SyncMessage(message, loop)
        finally:
            loop.wait(consumer.aclose())

    def dead_letters(self, kind: str, count: int = 100) -> list[Dead]:
        """See `Backend.dead_letters`."""
        loop, client = self._open()
        return loop.wait(client.dead_letters(kind, count))

    def revive(self, *dead: Dead) -> None:
        """See `Backend.revive`."""
        loop, client = self._open()
        loop.wait(client.revive(*dead))


class SyncMessage:
    """`Message` for code that does not await: `with message:` acknowledges, or gives back where the block raises."""

    def __init__(self, message: Message, loop: _Loop) -> None:
        self._message = message
        self._loop = loop
        self.event: Any = message.event
        self.project = message.project
        self.user = message.user
        self.session = message.session
        self.at = message.at
        self.id = message.id
        self.tries = message.tries
        self.traceparent = message.traceparent

    def ack(self) -> None:
        """See `Message.ack`."""
        self._loop.wait(self._message.ack())

    def give_back(self) -> None:
        """See `Message.give_back`."""
        self._loop.wait(self._message.give_back())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.ack()
        else:
            self.give_back()


class SyncPublisher(_Sync[Publisher]):
    """`Publisher` (over HTTP) for code that does not await. Same arguments, same errors; safe between threads."""

    def __init__(self, url: str, token: str, **options: Any) -> None:
        super().__init__(lambda: Publisher(url, token, **options))

    def publish(
        self, project: str, *events: Event, message_id: str | None = None, traceparent: str | None = None
    ) -> list[int]:
        """See `Publisher.publish`."""
        loop, client = self._open()
        trace = traceparent or current_traceparent()
        return loop.wait(client.publish(project, *events, message_id=message_id, traceparent=trace))

    def publish_and_wait(
        self, project: str, *events: Event, acknowledged: float, message_id: str | None = None
    ) -> Acknowledged:
        """See `Publisher.publish`, with `acknowledged`."""
        loop, client = self._open()
        trace = current_traceparent()
        return loop.wait(
            client.publish(project, *events, message_id=message_id, acknowledged=acknowledged, traceparent=trace)
        )

    def publish_to_user(self, user: str, *events: Event, message_id: str | None = None) -> list[int]:
        """See `Publisher.publish_to_user`."""
        loop, client = self._open()
        trace = current_traceparent()
        return loop.wait(client.publish_to_user(user, *events, message_id=message_id, traceparent=trace))

    def publish_to_all(self, *events: Event, message_id: str | None = None) -> list[int]:
        """See `Publisher.publish_to_all`."""
        loop, client = self._open()
        trace = current_traceparent()
        return loop.wait(client.publish_to_all(*events, message_id=message_id, traceparent=trace))
