"""A publisher whose wall clock is wrong: takes events as lines of JSON, and answers each with what became of it.

`python -m tests.ordeal.remote <url> <seconds slow> <patience> <history_events>`
"""

import asyncio
import ctypes
import json
import signal
import sys
import time
from typing import Any

from tests.servers.process import PR_SET_PDEATHSIG

LIFE = 120
"""Seconds after which it ends in any case."""


def set_clock(slow: float) -> None:
    """Have everybody in this process read a wrong time."""
    right, right_ns = time.time, time.time_ns
    time.time = lambda: right() - slow
    time.time_ns = lambda: right_ns() - int(slow * 1e9)


async def main(url: str, patience: float, history_events: int) -> None:
    """Publish what is told, until there is no more."""
    from router.backend import Backend

    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    going = set()
    async with Backend(url, patience=patience, room=10_000, history_events=history_events) as backend:

        async def publish(number: int, place: str, event: dict[str, Any]) -> None:
            seq, error = None, None
            try:
                seq = await send(backend, place, event)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            print(json.dumps([number, seq, error]), flush=True)

        while line := await lines.readline():
            task = asyncio.create_task(publish(*json.loads(line)))
            going.add(task)
            task.add_done_callback(going.discard)


async def send(backend: Any, place: str, event: dict[str, Any]) -> list[int]:
    """Publish one event that is JSON already to a project, to one person, or to all."""
    kind, _, name = place.partition(":")
    if place == "all" or kind == "user":
        from plugins.notification import Notification

        made = Notification(**{field: value for field, value in event.items() if field != "type"})
        return await (backend.publish_to_all(made) if place == "all" else backend.publish_to_user(name, made))
    return await backend.publish_json(place, json.dumps(event))


if __name__ == "__main__":
    signal.alarm(LIFE)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    set_clock(float(sys.argv[2]))
    asyncio.run(main(sys.argv[1], float(sys.argv[3]), int(sys.argv[4])))
