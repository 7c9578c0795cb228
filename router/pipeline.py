"""The one ordered list that every message passes, in both directions."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from router.envelope import Envelope
from router.errors import Disconnect, Refused

__all__ = ["DELIVERED", "FAILED", "HELD", "MERGED", "Forward", "Middleware", "Pipeline", "Report"]

Forward: TypeAlias = Callable[[Envelope], Awaitable[None]]
Middleware: TypeAlias = Callable[[Envelope, Forward], Awaitable[None]]
"""`(envelope, forward)`. No `forward`: stopped or held; once: passed; twice: split; later: delayed; raise: declined."""

Report: TypeAlias = Callable[[Envelope, str], None]
"""Told every outcome of a message: one of the words below or `refused:<code>`. Must not raise."""

DELIVERED, MERGED, HELD, FAILED = "delivered", "merged", "held", "failed"


class Pipeline:
    """Runs envelopes through `middleware` to `end`, the first listed first, and reports how each run ended.

    One that went all the way is reported as delivered, also when that happens later than its run; one that was
    kept back as held, one that was declined or broke with its reason. So whoever listens to `report` hears of
    every message, wherever in the list it ended.
    """

    def __init__(self, middleware: Sequence[Middleware], end: Forward, report: Report) -> None:
        self._layers = tuple(reversed(middleware))
        self._end = end
        self._report = report

    async def __call__(self, envelope: Envelope, to: Forward | None = None) -> None:
        """Run `envelope` through, to the end or `to` another. Raises what was raised on the way, after reporting it."""
        arrived: list[Envelope] = []
        reach = to or self._end

        async def end(envelope: Envelope) -> None:
            arrived.append(envelope)
            await reach(envelope)
            self._report(envelope, DELIVERED)

        forward: Forward = end
        for layer in self._layers:
            forward = _around(layer, forward)
        try:
            await forward(envelope)
        except Refused as refusal:
            self._report(envelope, f"refused:{refusal.code}")
            raise
        except Disconnect as disconnect:
            self._report(envelope, f"refused:{int(disconnect.code)}")
            raise
        except Exception:
            self._report(envelope, FAILED)
            raise
        if not arrived:
            self._report(envelope, HELD)


def _around(layer: Middleware, forward: Forward) -> Forward:
    def run(envelope: Envelope) -> Awaitable[None]:
        return layer(envelope, forward)

    return run
