"""The conversation about a project: what people say, and answers that stream."""

from typing import Annotated, Literal

from msgspec import Meta, field
from msgspec.structs import replace

from router import Append, Context, Event, Lapse, Plugin, Policy, timestamp


class ChatMessage(Event, frozen=True, tag="chat_message"):
    """A whole message. `user_id` is who wrote it; for what people send, the router fills it in."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[str, Meta(max_length=32_000)]
    timestamp: str = field(default_factory=timestamp)
    user_id: str | None = None


class ChatResponseChunk(Event, frozen=True, tag="chat_response_chunk"):
    """A piece of an answer that streams. Pieces may arrive joined; add each to what is there.

    `stream_id` tells which answer; without it there is one at a time. `index` counts pieces, from 0; a joined piece
    has that of its last part. `reason` tells why an answer ended that its author did not end: `lost`.
    """

    content: str
    is_complete: bool
    stream_id: str | None = None
    index: int | None = None
    reason: str | None = None


async def say(message: ChatMessage, context: Context) -> None:
    """A person writes: everybody sees who, whatever the browser claimed, and backends that answer get it."""
    said = replace(message, role="user", user_id=context.sender.user)
    # Backends first. Should the second fail, the sender is told so and says it again: a backend that hears something
    # twice can live with that. The other way round all would have read what no backend ever gets.
    await context.forward(said)
    await context.publish(said)


def lost(last: ChatResponseChunk) -> ChatResponseChunk:
    """What ends an answer whose author is not heard of any more."""
    return ChatResponseChunk(content="", is_complete=True, stream_id=last.stream_id, reason="lost")


chat_message = Plugin(ChatMessage, Policy(send="chat"), say)
chat_response_chunk = Plugin(
    ChatResponseChunk,
    Policy(
        deliver=Append(by=("stream_id",), field="content", ends="is_complete", index="index"),
        lapse=Lapse(after=60.0, close=lost),
    ),
)
