"""What is published in a random ordeal: stories whose every piece is marked, so that a repeat is seen anywhere."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from tests.ordeal.schedule import Story

__all__ = ["events", "tell"]

Publish = Callable[[str, dict[str, Any]], Awaitable[bool]]
"""`(place, event)`: whether it was published."""


def events(number: int, story: Story) -> Iterator[dict[str, Any]]:
    """The events of a story, in their order. No two stories have a word in common."""
    name = f"s{number}"
    match story.kind:
        case "answer":
            for index in range(story.count):
                last = index == story.count - 1
                yield {
                    "type": "chat_response_chunk",
                    "content": f"{name}w{index} ",
                    "is_complete": last,
                    "stream_id": name,
                    "index": index,
                }
        case "step":
            yield {"type": "step_started", "step_id": name}
            for index in range(1, story.count):
                yield {
                    "type": "step_progress",
                    "step_id": name,
                    "progress": index / story.count,
                    "message": f"{name}m{index}",
                }
            yield {"type": "step_completed", "step_id": name, "result": {"mark": name}}
        case "change":
            for index in range(story.count):
                changes = {"steps_added": [f"{name}c{index}"]}
                yield {"type": "project_modified", "user_id": f"author{number % 3}", "changes": changes}
        case "note":
            yield {"type": "notification", "level": "info", "title": f"{name}n"}
        case "critical":
            yield {
                "type": "notification",
                "level": "alert",
                "title": f"{name}n",
                "requires_ack": True,
                "message_id": f"{name}id",
            }


async def tell(number: int, story: Story, place: str, publish: Publish, *, eager: bool) -> None:
    """Publish a story. It ends where a piece is refused: nobody tells a story with a hole."""
    going: list[asyncio.Task[bool]] = []
    for event in events(number, story):
        if eager:
            going.append(asyncio.ensure_future(publish(place, event)))
            if any(task.done() and not task.result() for task in going):
                break
        elif not await publish(place, event):
            break
        await asyncio.sleep(story.every)
    await asyncio.gather(*going)
