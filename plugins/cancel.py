"""Stopping what runs. A message of its own: a closed page or a lost connection never cancels anything."""

from msgspec import field
from msgspec.structs import replace

from router import Context, Event, Plugin, Policy, timestamp


class Cancel(Event, frozen=True, tag="cancel"):
    """Somebody wants a step or an answer stopped. Backends act on it; everybody sees who asked.

    Exactly one of `step_id` and `stream_id` names it. That it has stopped is told by `step_error`, or by a chunk
    with `is_complete`, from whoever produces it.
    """

    step_id: str | None = None
    stream_id: str | None = None
    user_id: str | None = None
    timestamp: str = field(default_factory=timestamp)


async def request(event: Cancel, context: Context) -> None:
    """A person asks: backends stop it, and everybody sees who asked, whatever the browser claimed."""
    if (event.step_id is None) == (event.stream_id is None):
        context.refuse("`cancel` names either `step_id` or `stream_id`", code="bad_message")
    asked = replace(event, user_id=context.sender.user)
    # Backends first: to stop something twice does no harm, and what all see asked for must not be asked of nobody.
    await context.forward(asked)
    await context.publish(asked)


cancel = Plugin(Cancel, Policy(send="chat"), request)
