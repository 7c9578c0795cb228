"""Alerts and messages of the system: to one user, one project, or everyone."""

from typing import Annotated, Literal

from msgspec import Meta

from router import Event, Plugin


class Notification(Event, frozen=True, tag="notification"):
    """Something to be told to people. To whom is decided by the topic that it is published to.

    `ref` points to what it is about. An alert that must be seen is sent with `requires_ack`.
    """

    level: Literal["info", "success", "warning", "alert"]
    title: Annotated[str, Meta(max_length=200)]
    message: str = ""
    ref: str | None = None


notification = Plugin(Notification)
