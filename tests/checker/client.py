"""A client as docs/reference/protocol.md describes it, without sockets and clocks: frames in, answers out, all noted."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Client", "Closed", "Dropped", "Opened", "Place", "Resync", "Shown", "Told", "Welcome"]

CONTROL = frozenset(
    {"welcome", "resync", "epoch", "token_expiring", "token_refreshed", "error", "goaway", "ping", "batch", "accepted"}
)


@dataclass(slots=True)
class Place:
    """What a client has of one topic: all up to `pos`, and the numbers beyond."""

    epoch: str = ""
    pos: int = 0
    beyond: set[int] = field(default_factory=set)

    def has(self, seq: int) -> bool:
        return seq <= self.pos or seq in self.beyond

    def advance(self, pos: int) -> None:
        """All up to `pos` is here. A position never goes back."""
        if pos > self.pos:
            self.pos = pos
            self.beyond = {seq for seq in self.beyond if seq > pos}

    def __str__(self) -> str:
        beyond = ".".join(map(str, sorted(self.beyond)))
        return f"{self.epoch}:{self.pos}" + (f":{beyond}" if beyond else "")


# What a client notes, in order. `topic` is the full name: `project:<id>`, `user:<id>`, `all`.


@dataclass(slots=True)
class Opened:
    """A connection stands. `prompt`: the client reads all the time, so that it is never left behind."""

    at: float
    since: str | None
    prompt: bool = True


@dataclass(slots=True)
class Welcome:
    at: float
    recovered: bool


@dataclass(slots=True)
class Resync:
    at: float
    topic: str
    reason: str


@dataclass(slots=True)
class Shown:
    """An event reached the person."""

    at: float
    topic: str
    event: dict[str, Any]


@dataclass(slots=True)
class Dropped:
    """An event came that the client takes for seen."""

    at: float
    topic: str
    event: dict[str, Any]
    why: str


@dataclass(slots=True)
class Told:
    """Any other frame: `error`, `goaway`, `token_expiring` ..."""

    at: float
    frame: dict[str, Any]


@dataclass(slots=True)
class Closed:
    at: float


class Client:
    """One person's page over all its connections.

    `resync` is modelled as the page that reloads its state: whatever was published before counts as covered, and it
    goes on from the position that it was told.
    """

    def __init__(self, name: str, *, user: str = "ada", project: str = "p1", plain: bool = False) -> None:
        self.name = name
        self.user = user
        self.plain = plain
        self.names = {"": f"project:{project}", "user": f"user:{user}", "all": "all"}
        self.places: dict[str, Place] = {topic: Place() for topic in self.names.values()}
        self.record: list[Opened | Welcome | Resync | Shown | Dropped | Told | Closed] = []
        self.connected = False
        self.welcomed = False
        self.people: dict[str, dict[str, Any]] = {}
        """Who is here, as far as presence events and `know_people` told."""
        self._since: str | None = None
        self._message_ids: set[str] = set()
        self._presence: list[dict[str, Any]] = []

    # -- connections

    def since(self) -> str | None:
        """What it asks for when it comes back; None, where it knows no position."""
        if self.plain or not self.places[self.names[""]].epoch:
            return None
        labels = {"": "", "user": "user:", "all": "all:"}
        return ",".join(
            f"{labels[label]}{self.places[topic]}" for label, topic in self.names.items() if self.places[topic].epoch
        )

    def opened(self, at: float, since: str | None, *, prompt: bool = True) -> None:
        """A connection stands that was asked for with `since`."""
        self.connected, self.welcomed, self._since = True, self.plain, since
        self.record.append(Opened(at, since, prompt))
        if self.plain:
            self.record.append(Welcome(at, since is not None))

    def closed(self, at: float) -> None:
        if self.connected:
            self.connected = self.welcomed = False
            self.record.append(Closed(at))

    def forget(self) -> None:
        """The page is loaded anew by its person: it knows nothing, and will ask for what it likes."""
        self.places = {topic: Place() for topic in self.names.values()}
        self._message_ids.clear()

    # -- frames

    def take(self, frame: dict[str, Any], at: float) -> list[dict[str, Any]]:
        """Take one frame. Returns what the client answers."""
        kind = frame["type"]
        if self.plain:
            if kind == "ping":
                return []
            if kind == "error":
                self.record.append(Told(at, frame))
                return []
            self._show(frame, self.names[""], at)
            return []
        if kind == "ping":
            return [{"type": "pong"}]
        if kind == "welcome":
            self._welcome(frame, at)
        elif kind == "resync":
            self._resync(frame, at)
        elif kind == "epoch":
            place = self.places[self._topic(frame)]
            place.epoch = frame["epoch"]
        elif kind == "batch":
            topic, place = self._topic(frame), self.places[self._topic(frame)]
            answers = [answer for event in frame["events"] for answer in self._event(event, topic, at)]
            numbers = [event["seq"] for event in frame["events"] if "seq" in event]
            place.advance(frame.get("pos", max(numbers, default=0)))
            return answers
        elif kind in CONTROL:
            self.record.append(Told(at, frame))
        else:
            topic = self._topic(frame)
            answers = self._event(frame, topic, at)
            if "pos" in frame or "seq" in frame:
                self.places[topic].advance(frame.get("pos", frame.get("seq", 0)))
            return answers
        return []

    def _topic(self, frame: dict[str, Any]) -> str:
        return self.names[frame.get("topic") or ""]

    def _welcome(self, frame: dict[str, Any], at: float) -> None:
        self.welcomed = True
        told = {"": frame, "user": frame.get("user"), "all": frame.get("all")}
        for label, where in told.items():
            if where is not None:
                self.places[self.names[label]] = Place(where["epoch"], where["pos"], set(where.get("known", ())))
        self.record.append(Welcome(at, bool(frame.get("recovered"))))
        self.people.clear()

    def _resync(self, frame: dict[str, Any], at: float) -> None:
        topic = self._topic(frame)
        self.places[topic] = Place(frame["epoch"], frame["pos"], set(frame.get("known", ())))
        self.record.append(Resync(at, topic, frame.get("reason", "")))

    def _event(self, event: dict[str, Any], topic: str, at: float) -> list[dict[str, Any]]:
        place, seq, id_ = self.places[topic], event.get("seq"), event.get("message_id")
        answers = [{"type": "ack", "message_id": id_}] if id_ is not None and event.get("requires_ack") else []
        if seq is not None and place.has(seq) and not event.get("redelivered"):
            self.record.append(Dropped(at, topic, event, f"number {seq} counts as seen at {place}"))
            return answers
        if seq is not None and seq > place.pos:
            place.beyond.add(seq)
        if id_ is not None:
            if id_ in self._message_ids:
                self.record.append(Dropped(at, topic, event, f"message_id {id_} counts as seen"))
                return answers
            self._message_ids.add(id_)
        self._show(event, topic, at)
        return answers

    def _show(self, event: dict[str, Any], topic: str, at: float) -> None:
        self.record.append(Shown(at, topic, event))
        if event["type"].startswith("presence_"):
            self._presence.append(event)
            self._believe(event)

    # -- presence

    def ask_people(self) -> None:
        """The page asks who is here; what comes until `know_people` is newer than the answer, or in it."""
        self._presence.clear()

    def know_people(self, users: list[dict[str, Any]]) -> None:
        """The answer of `GET presence`."""
        self.people = {user["user_id"]: dict(user) for user in users}
        for event in self._presence:
            self._believe(event)

    def _believe(self, event: dict[str, Any]) -> None:
        user = event["user_id"]
        if event["type"] == "presence_left":
            self.people.pop(user, None)
        elif event["type"] == "presence_joined":
            self.people.setdefault(user, {"user_id": user, "connections": 1})
        else:
            self.people[user] = {"user_id": user, "connections": event["connections"]}
            if event.get("status"):
                self.people[user]["status"] = event["status"]
