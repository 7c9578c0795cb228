"""What is published in a random ordeal: stories whose every piece is marked, so that a repeat is seen anywhere."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from msgspec import Struct

from tests.checker import Ledger, Publication
from tests.ordeal.schedule import Story

__all__ = ["Piece", "pieces", "tell"]

WORDY = 1
"""The project whose answers are long enough that one who reads slowly falls behind."""
Publish = Callable[[str, Publication, dict[str, Any]], Awaitable[None]]
"""`(place, what the ledger calls it, event)`: publishes it, and has the ledger know what became of it."""


class Piece(Struct, frozen=True):
    """One event of a story: how the ledger knows it, and what it is once it has its mark."""

    kind: str
    way: str
    key: str
    event: Callable[[str], dict[str, Any]]
    settles: str | None = None


def pieces(number: int, story: Story) -> Iterator[Piece]:
    """The events of a story, in their order. No two stories have a key in common."""
    match story.kind:
        case "answer":
            name = f"a{number}"
            for index in range(story.count):
                fields = {"is_complete": index == story.count - 1, "stream_id": name, "index": index}
                yield Piece("chat_response_chunk", "append", name, partial(_worded, fields, story.project == WORDY))
        case "step":
            name = f"s{number}"
            fields = {"step_id": name}
            yield Piece("step_started", "now", f"{name}-begin", partial(_filled, "timestamp", fields))
            for index in range(1, story.count):
                fields = {"step_id": name, "progress": index / story.count}
                yield Piece("step_progress", "latest", name, partial(_filled, "message", fields))
            yield Piece(
                "step_completed",
                "now",
                f"{name}-end",
                lambda mark: {"type": "step_completed", "step_id": name, "result": {"mark": mark}},
                settles=name,
            )
        case "change":
            name = f"c{number}"
            for _ in range(story.count):
                yield Piece(
                    "project_modified",
                    "merge",
                    name,
                    lambda mark: {"type": "project_modified", "user_id": name, "changes": {"steps_added": [mark]}},
                )
        case "note":
            yield Piece("notification", "now", f"n{number}", partial(_filled, "title", {"level": "info"}))
        case "critical":
            fields = {"level": "alert", "requires_ack": True, "message_id": f"id{number}"}
            yield Piece("notification", "now", f"n{number}", partial(_filled, "title", fields))


async def tell(
    number: int,
    story: Story,
    topic: str,
    ledger: Ledger,
    publish: Publish,
    clock: Callable[[], float],
    *,
    eager: bool,
    until: float,
) -> None:
    """Publish a story. A piece that is refused leaves a hole, which is its publisher's; it ends at `until` at the latest.

    `eager`: without waiting to hear what became of the piece before.
    """
    going: list[asyncio.Future[None]] = []
    for piece in pieces(number, story):
        said = ledger.ask(
            topic, piece.kind, piece.way, key=piece.key, at=clock(), line=f"story{number}", settles=piece.settles
        )
        publishing = asyncio.ensure_future(publish(topic, said, {"type": piece.kind, **piece.event(said.mark)}))
        going.append(publishing)
        if not eager:
            await publishing
        await asyncio.sleep(story.every)
        if clock() > until:
            break
    await asyncio.gather(*going)


def _worded(fields: dict[str, Any], wordy: bool, mark: str) -> dict[str, Any]:
    return {**fields, "content": mark + ("." * 1500 if wordy else " ")}


def _filled(field: str, fields: dict[str, Any], mark: str) -> dict[str, Any]:
    return {**fields, field: mark}
