"""The two message types that the load sends: one that everybody gets, one that ends here."""

from collections import Counter
from typing import Any

from router import Context, Event, Latest, Now, Plugin, Policy


class BenchTick(Event, frozen=True, tag="bench_tick"):
    """Published to the project as it is."""

    data: dict[str, Any]


class BenchSink(Event, frozen=True, tag="bench_sink"):
    """Taken in; each hundredth of a connection is answered, as the C yardstick does."""

    data: dict[str, Any]


class BenchProgress(Event, frozen=True, tag="bench_progress"):
    """Like a step's progress: throttled, the newest of each step survives."""

    step: str
    n: int
    message: str = ""


class BenchNow(Event, frozen=True, tag="bench_now"):
    """The same, sent at once."""

    step: str
    n: int
    message: str = ""


ANSWER = BenchSink(data={"t": 0})
received: Counter[str] = Counter()


async def count(_: BenchSink, context: Context) -> None:
    """Answer each hundredth."""
    received[context.session] += 1
    if received[context.session] % 100 == 0:
        await context.reply(ANSWER)


bench_tick = Plugin(BenchTick, Policy(send="chat", receive="view", deliver=Now()))
bench_sink = Plugin(BenchSink, Policy(send="chat", receive="view", deliver=Now()), count)
bench_progress = Plugin(BenchProgress, Policy(send="chat", deliver=Latest(by=("step",))))
bench_now = Plugin(BenchNow, Policy(send="chat", deliver=Now()))
