"""Throttles broadcasts to one flush a second a project, and debounces what clients send."""

from collections.abc import Callable
from typing import TypeAlias

from router.envelope import Envelope
from router.event import Latest
from router.pacing import Fault, Window
from router.pipeline import MERGED, Forward, Report

__all__ = ["Coalesce", "Later"]

Later: TypeAlias = Callable[[float, str, Callable[[], "object"]], None]
"""`(when, topic, job)`: run the coroutine function `job` at clock time `when`, in turn with the topic's messages."""


class Coalesce:
    """Outbound: one `Window` for each topic. Inbound: one for each session whose message's policy says `debounce`.

    A timer exists only while something is held, so idle rooms cost nothing. The thinking is in `pacing`.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        later: Later,
        *,
        every: float = 1.0,
        report: Report | None = None,
        fault: Fault | None = None,
    ) -> None:
        self._clock = clock
        self._later = later
        self._every = every
        self._report = report
        self._fault = fault
        self._windows: dict[str, Window] = {}
        self._forward: dict[str, Forward] = {}
        self._timers: dict[str, float] = {}
        self._sweep_at = 1024

    async def __call__(self, envelope: Envelope, forward: Forward) -> None:
        if envelope.replay:
            await forward(envelope)  # merged already, by the same rules
        elif envelope.leg == "outbound":
            await self._offer(envelope.topic, envelope, forward, None)
        elif envelope.policy.debounce > 0 and envelope.session is not None:
            by = envelope.policy.deliver.by
            wait = Latest(by=by, every=envelope.policy.debounce)
            await self._offer(f"{envelope.session} {envelope.type}", envelope, forward, wait)
        else:
            await forward(envelope)

    def held(self, topic: str) -> frozenset[int]:
        """The numbers of `topic` that are held back at the moment."""
        window = self._windows.get(topic)
        return frozenset() if window is None else window.held()

    async def release(self, topic: str, has: Callable[[int], bool]) -> None:
        """Send on, before its time, what somebody who `has` some of it must not get again, merged with more."""
        window = self._windows.get(topic)
        if window is not None and (released := window.release(has, self._clock())):
            await _forward_each(released, self._forward[topic])

    def forget(self, topic: str) -> None:
        """Drop what is held of `topic`: its numbering has ended, or nobody is here to be sent it."""
        self._windows.pop(topic, None)
        self._forward.pop(topic, None)
        self._timers.pop(topic, None)

    async def _offer(self, key: str, envelope: Envelope, forward: Forward, deliver: Latest | None) -> None:
        window = self._windows.get(key)
        if window is None:
            self._sweep()
            window = self._windows[key] = Window(self._every, fault=self._fault)
        self._forward[key] = forward
        released, merged = window.offer(envelope, self._clock(), deliver)
        if self._report is not None:
            for absorbed in merged:
                self._report(absorbed, MERGED)
        self._arm(key, window, forward)
        await _forward_each(released, forward)

    def _arm(self, key: str, window: Window, forward: Forward) -> None:
        """See to it that what is held is flushed when it is due, by a timer for what is due first."""
        due = window.due()
        if due is None or self._timers.get(key, float("inf")) <= due:
            return
        self._timers[key] = due

        async def flush() -> None:
            if self._windows.get(key) is not window:
                return  # forgotten meanwhile, with all that it held; a new window has timers of its own
            if self._timers.get(key) == due:
                del self._timers[key]
            released = window.flush(self._clock())
            self._arm(key, window, forward)
            await _forward_each(released, forward)

        # In turn with the topic's messages; what a client sends has a turn of its own, and holds up nobody.
        self._later(due, key, flush)

    def _sweep(self) -> None:
        """Forget idle windows. Done when their number has doubled, so it costs little per window."""
        if len(self._windows) >= self._sweep_at:
            now = self._clock()
            self._windows = {key: window for key, window in self._windows.items() if not window.idle(now)}
            self._forward = {key: forward for key, forward in self._forward.items() if key in self._windows}
            self._sweep_at = max(1024, 2 * len(self._windows))


async def _forward_each(released: list[Envelope], forward: Forward) -> None:
    """Forward all of them; one that is refused further on takes none of the others with it."""
    failed: Exception | None = None
    for ready in released:
        try:
            await forward(ready)
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed
