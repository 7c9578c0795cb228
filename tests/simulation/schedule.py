"""What a seed stands for: a world and the steps that befall it. Plain values, so that a failing one can be shortened."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

__all__ = ["Plan", "Step", "draw"]

FAULTS = ("flaky", "outage", "regress", "flush", "pubsub", "cut", "refuse", "kill", "drain", "hole", "clock")
"""Of a world on Redis. Each seed draws which of them there are."""
MEMORY_FAULTS = ("hole", "clock")


@dataclass(slots=True)
class Step:
    """At `at` seconds `what` is done, with `more`."""

    at: float
    what: str
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.at:8.3f}  {self.what} " + " ".join(f"{name}={value!r}" for name, value in self.more.items())


@dataclass(slots=True)
class Plan:
    """A world: which broker and nodes, who has a page open, what happens."""

    seed: int
    broker: str
    length: float
    settings: dict[str, Any]
    nodes: list[dict[str, Any]]
    viewers: list[dict[str, Any]]
    steps: list[Step]
    pace: float
    window: int

    def __str__(self) -> str:
        lines = [f"seed {self.seed} on {self.broker}: {len(self.nodes)} nodes, {self.settings}, pace {self.pace:.2f}"]
        lines += [f"          {viewer}" for viewer in self.viewers]
        return "\n".join([*lines, *map(str, self.steps)])


def draw(seed: int, broker: str) -> Plan:
    """The plan of a seed."""
    chance = Random(f"plan {seed} {broker}")
    return _Drawing(chance, seed, broker).plan()


class _Drawing:
    def __init__(self, chance: Random, seed: int, broker: str) -> None:
        self.chance = chance
        self.seed = seed
        self.broker = broker
        self.redis = broker == "redis"
        self.length = chance.uniform(2.0, 6.0)
        self.steps: list[Step] = []
        self.names = 0
        count = chance.choice((2, 2, 3)) if self.redis else 1
        mixed = self.redis and chance.random() < 0.2
        self.nodes = [
            {"host": f"n{i}", "newer": not (mixed and i == 1), "ours": chance.random() < 0.8} for i in range(count)
        ]
        users = ["ada", "bob", "cy"]
        self.viewers = [
            {
                "host": f"v{i}",
                "user": chance.choice(users),
                "plain": i > 1 and chance.random() < 0.12,
                "project": "p2" if i > 2 and chance.random() < 0.2 else "p1",
                "since": "0" if chance.random() < 0.3 else None,
                "acks": chance.random() < 0.9,
            }
            for i in range(chance.randint(3, 8))
        ]
        self.novel = mixed

    def add(self, at: float, what: str, **more: Any) -> None:
        self.steps.append(Step(round(at, 4), what, more))

    def name(self, what: str) -> str:
        self.names += 1
        return f"{what}{self.names}"

    def when(self) -> float:
        return self.chance.uniform(0.3, self.length)

    def way(self) -> str:
        return "backend" if self.redis and self.chance.random() < 0.4 else "http"

    def viewer(self) -> str:
        return str(self.chance.choice(self.viewers)["host"])

    def other_node(self) -> str:
        return str(self.chance.choice(self.nodes)["host"])

    def plan(self) -> Plan:
        chance = self.chance
        faults = FAULTS if self.redis else MEMORY_FAULTS
        on = [fault for fault in faults if chance.random() < 0.3] if chance.random() < 0.75 else []
        for viewer in self.viewers:
            self.add(0.0 if chance.random() < 0.6 else self.when() * 0.7, "open", viewer=viewer["host"])
        for _ in range(chance.randint(3, 7)):
            self.activity(self.when() * 0.8)
        for _ in range(chance.randint(1, 5)):
            self.behaviour(self.when())
        for _ in range(chance.randint(1, 3)):
            scene = chance.choice((self.two_pages, self.move_in_a_window, self.late_page, self.slow_reader))
            scene(self.when() * 0.8)
        for fault in on:
            getattr(self, f"fault_{fault}")(self.when())
        if self.redis and chance.random() < 0.12:
            self.idle_regress(self.when() * 0.5)
        settings = {
            "history_events": chance.choice((25, 40, 1000, 1000, 1000)),
            "presence_grace": 2.0,
            "lease": 4.0,
            "ack_after": chance.choice((1.0, 3.0)),
            "ping_every": 5.0,
            "silence": 15.0,
        }
        if chance.random() < 0.03:
            self.add(self.when() * 0.5, "stream", name=self.name("long"), way="http", pieces=1100, gap=0.0, each=20)
        if chance.random() < 0.3:  # in quiet, for whatever else is said ends what it looks for
            self.two_pages(self.length + 0.6)
            self.length += 1.6
        self.more()
        self.steps.sort(key=lambda step: step.at)
        pace = chance.choice((0.3, 1.0, 1.0, 2.0))
        window = chance.choice((4 * 1024, 128 * 1024, 128 * 1024))
        return Plan(self.seed, self.broker, self.length, settings, self.nodes, self.viewers, self.steps, pace, window)

    def more(self) -> None:
        """Scenes that mutations have taught, with a chance of their own: what was drawn before stays as it was."""
        chance = self.chance = Random(f"more {self.seed} {self.broker}")
        if self.redis and chance.random() < 0.25:
            self.windows_apart(self.when() * 0.5)
        if chance.random() < 0.12:
            self.many_keys(self.when() * 0.6)
        if chance.random() < 0.2:
            self.again(self.when() * 0.8)
        if chance.random() < 0.12:
            self.last_words(self.length + 2.0)
        if self.novel and chance.random() < 0.7:
            self.read_by_another(self.when() * 0.6)
        if self.redis and chance.random() < 0.2:
            self.overtaken(chance.uniform(0.4, 1.0))
        if self.redis and chance.random() < 0.1:
            self.cut_off(self.length + 2.0)

    # -- what publishers do

    def activity(self, at: float) -> None:
        chance = self.chance
        kinds = ["stream", "stream", "progress", "changes", "tally", "chat", "cursor", "critical", "notice"]
        if self.novel:
            kinds.append("novel")
        what = chance.choice(kinds)
        more: dict[str, Any] = {"name": self.name(what), "way": self.way()}
        if what == "stream":
            more |= {"pieces": chance.choice((3, 10, 30, 60)), "gap": chance.choice((0.005, 0.012, 0.02, 0.05))}
            more["ends"] = chance.random() < 0.7
        elif what == "notice":
            more["to"] = chance.choice(("user:ada", "user:bob", "all"))
            more["count"] = chance.randint(1, 5)
        else:
            more |= {"count": chance.randint(2, 12), "gap": chance.choice((0.005, 0.02, 0.1, 0.3))}
        if chance.random() < 0.15 and what != "notice":
            more["project"] = "p2"
        self.add(at, what, **more)

    # -- what people do

    def behaviour(self, at: float) -> None:
        chance, viewer = self.chance, self.viewer()
        what = chance.choice(("move", "move", "drop", "sleep", "reload", "say", "status", "status", "slow"))
        if what == "move":
            self.add(at, "move", viewer=viewer, to=self.other_node(), politely=chance.random() < 0.5)
        elif what == "drop":
            self.add(at, "drop", viewer=viewer)
        elif what == "sleep":
            self.add(at, "sleep", viewer=viewer, seconds=chance.choice((0.3, 1.5, 4.0)), politely=chance.random() < 0.5)
        elif what == "reload":
            self.add(at, "reload", viewer=viewer, since=chance.choice((None, "0", "0")))
        elif what == "slow":
            self.add(at, "slow", viewer=viewer, seconds=chance.choice((0.5, 2.0)))
        else:
            self.add(at, what, viewer=viewer, name=self.name(what))

    # -- scenes: what belongs together

    def two_pages(self, at: float) -> None:
        """Two pages open with `since=0`, 20 to 100 ms apart, while something older is held and a stream has paused."""
        chance = self.chance
        one, two = chance.sample(self.viewers, 2)
        way = self.way()
        self.add(at, "progress", name=self.name("progress"), way=way, count=chance.randint(2, 4), gap=0.002, ends=False)
        self.add(
            at + chance.uniform(0.01, 0.05),
            "stream",
            name=self.name("stream"),
            way=way,
            pieces=chance.choice((4, 6)),
            gap=0.001,
            pause_after=chance.choice((2, 3)),
            pause=chance.uniform(0.3, 0.6),
            ends=True,
        )
        first = at + chance.uniform(0.02, 0.15)
        to = self.other_node()
        self.add(first, "reload", viewer=one["host"], since="0", to=to)
        self.add(first + chance.uniform(0.02, 0.1), "reload", viewer=two["host"], since="0", to=to)

    def move_in_a_window(self, at: float) -> None:
        """Somebody goes to another node, and maybe on, while an answer streams or changes wait."""
        chance = self.chance
        if chance.random() < 0.6:
            gap = chance.choice((0.006, 0.012, 0.02))
            self.add(at, "stream", name=self.name("stream"), way=self.way(), pieces=60, gap=gap, ends=True)
            span = 60 * gap
        else:
            self.add(
                at, chance.choice(("tally", "changes")), name=self.name("tally"), way=self.way(), count=12, gap=0.1
            )
            span = 1.4
        for _ in range(chance.randint(1, 4)):
            self.add(
                at + chance.uniform(0.0, span * 1.2),
                "move",
                viewer=self.viewer(),
                to=self.other_node(),
                politely=chance.random() < 0.5,
            )

    def late_page(self, at: float) -> None:
        """A page that is opened when a lot has been said already."""
        self.add(at, "stream", name=self.name("stream"), way=self.way(), pieces=60, gap=0.004, ends=False)
        self.add(at + self.chance.uniform(0.2, 0.6), "reload", viewer=self.viewer(), since="0")

    def slow_reader(self, at: float) -> None:
        """Somebody stops reading while much is said, and reads again."""
        self.add(at, "slow", viewer=self.viewer(), seconds=self.chance.choice((1.0, 2.5)))
        self.add(at, "chat", name=self.name("long"), way=self.way(), count=40, gap=0.004, size=8000)

    def windows_apart(self, at: float) -> None:
        """Two nodes hear the same and let it go at different times: the second had nobody there when it began.

        Who goes from the one to the other in between has a part of what is held there.
        """
        chance = self.chance
        first, second = chance.sample([node["host"] for node in self.nodes], 2)
        viewers = [viewer["host"] for viewer in self.viewers]
        for viewer in viewers:
            self.add(at, "move", viewer=viewer, to=first, politely=True)
        at += 0.4
        if chance.random() < 0.6:
            self.add(at, "stream", name=self.name("stream"), way=self.way(), pieces=60, gap=0.03, ends=True)
        else:
            self.add(at, "tally", name=self.name("tally"), way=self.way(), count=40, gap=0.04)
        pioneer, *others = chance.sample(viewers, len(viewers))
        self.add(at + chance.uniform(0.2, 0.8), "move", viewer=pioneer, to=second, politely=True)
        for viewer in others:
            self.add(at + chance.uniform(1.0, 2.2), "move", viewer=viewer, to=second, politely=chance.random() < 0.5)

    def many_keys(self, at: float) -> None:
        """More is let go at once than fits into a frame, and people are cut off between two frames of it."""
        self.add(at, "burst", name=self.name("burst"), way=self.way(), keys=100, gap=0.05, size=700)
        for viewer in self.viewers:
            self.add(at + self.chance.uniform(1.0, 1.2), "drop", viewer=viewer["host"])

    def again(self, at: float) -> None:
        """A step is started anew while what was said of it is still held."""
        pause = self.chance.uniform(0.05, 0.6)
        self.add(at, "progress", name=self.name("progress"), way=self.way(), count=3, gap=0.002, starts=2, pause=pause)

    def overtaken(self, at: float) -> None:
        """All come back at the moment at which a new numbering begins, and soon has more than they had of the old."""
        self.add(at, "flush")
        self.add(at + 0.002, "burst", name=self.name("burst"), way="backend", keys=60, gap=0.0, size=0)
        for viewer in self.viewers:
            when = at + self.chance.uniform(-0.08, 0.03)
            self.add(when, "move", viewer=viewer["host"], to=self.other_node(), politely=True)

    def cut_off(self, at: float) -> None:
        """In quiet, no node hears anything of Redis for long, and Redis comes back without what a backend said meanwhile."""
        self.add(at, "snapshot")
        for node in self.nodes:
            self.add(at + 0.01, "hole", one=node["host"], other="redis", seconds=13.0)
        self.add(at + 1.0, "chat", name=self.name("chat"), way="backend", count=4, gap=0.05)
        self.add(at + 3.0, "outage", back="snapshot", seconds=0.3)
        self.length = max(self.length, at + 14.5)

    def last_words(self, at: float) -> None:
        """Two windows of different length wait, the shorter one first, and after that nothing is said any more."""
        self.add(at, "cursor", name=self.name("cursor"), way="http", count=2, gap=0.002)
        self.add(at + 0.08, "tally", name=self.name("tally"), way="http", count=3, gap=0.002)
        self.length = at + 1.5

    def read_by_another(self, at: float) -> None:
        """On a node of the older version, where an event cannot be read, people hear what comes after, and leave it."""
        new, old = self.nodes[0]["host"], self.nodes[1]["host"]
        for viewer in self.viewers:
            self.add(at, "move", viewer=viewer["host"], to=old, politely=True)
        self.add(at + 0.4, "novel", name=self.name("novel"), way="backend", count=2, gap=0.05)
        self.add(at + 0.6, "tally", name=self.name("tally"), way="backend", count=3, gap=0.1)
        for viewer in self.viewers:
            later = at + self.chance.uniform(0.6, 3.0)
            self.add(later, "move", viewer=viewer["host"], to=new, politely=self.chance.random() < 0.5)

    def idle_regress(self, at: float) -> None:
        """Redis comes back with less while nobody listens to a project; more is said there; its viewer comes back."""
        viewer = {
            "host": f"v{len(self.viewers)}",
            "user": "dee",
            "plain": False,
            "project": "p3",
            "since": None,
            "acks": True,
        }
        self.viewers.append(viewer)
        host = viewer["host"]
        self.add(0.0, "open", viewer=host)
        self.add(at, "chat", name=self.name("early"), way="http", project="p3", count=6, gap=0.02)
        self.add(at + 0.15, "snapshot")
        self.add(at + 0.2, "chat", name=self.name("early"), way="http", project="p3", count=8, gap=0.02)
        self.add(at + 1.0, "sleep", viewer=host, seconds=4.0, politely=True)
        self.add(at + 1.5, "renew")
        self.add(at + 1.6, "outage", back="snapshot", seconds=0.3)
        self.add(at + 3.0, "chat", name=self.name("again"), way="backend", project="p3", count=20, gap=0.01)
        self.length = max(self.length, at + 5.5)

    # -- faults

    def fault_flaky(self, at: float) -> None:
        kinds = self.chance.sample(("before", "after", "late", "never"), self.chance.randint(1, 3))
        self.add(at, "flaky", kinds={kind: self.chance.choice((0.01, 0.04, 0.15)) for kind in kinds}, seconds=2.0)

    def fault_outage(self, at: float) -> None:
        back = self.chance.choice(("nothing", "nothing", "everything"))
        self.add(at, "outage", back=back, seconds=self.chance.choice((0.05, 0.2, 1.0)))
        if self.chance.random() < 0.6:
            self.crowd(at)

    def fault_regress(self, at: float) -> None:
        self.add(max(0.1, at - self.chance.uniform(0.05, 1.5)), "snapshot")
        self.add(at, "outage", back="snapshot", seconds=self.chance.choice((0.05, 0.2, 1.0)))
        if self.chance.random() < 0.5:
            self.crowd(at)

    def crowd(self, at: float) -> None:
        """All come back at about the time at which Redis does."""
        for viewer in self.viewers:
            self.add(at + self.chance.uniform(0.0, 0.6), "drop", viewer=viewer["host"])

    def fault_flush(self, at: float) -> None:
        self.add(at, "flush")
        if self.chance.random() < 0.5:
            self.crowd(at)

    def fault_pubsub(self, at: float) -> None:
        for _ in range(self.chance.randint(1, 3)):
            self.add(at + self.chance.uniform(0, 0.5), "pubsub")
        self.add(at - 0.05, "chat", name=self.name("chat"), way=self.way(), count=20, gap=0.01)

    def fault_cut(self, at: float) -> None:
        self.add(at, "cut", share=self.chance.choice((0.3, 1.0)))

    def fault_refuse(self, at: float) -> None:
        self.add(at, "refuse", how=self.chance.choice(("READONLY", "OOM")), seconds=self.chance.choice((0.3, 1.5)))

    def fault_kill(self, at: float) -> None:
        self.add(at, "kill", node=self.other_node(), seconds=self.chance.choice((0.1, 1.0, 5.0)))

    def fault_drain(self, at: float) -> None:
        self.add(at, "drain", node=self.other_node(), seconds=0.3)

    def fault_hole(self, at: float) -> None:
        chance = self.chance
        ends: tuple[str, str | None] = (
            (self.other_node(), "redis") if self.redis and chance.random() < 0.6 else (self.viewer(), None)
        )
        self.add(at, "hole", one=ends[0], other=ends[1], seconds=chance.choice((0.2, 1.0, 4.0)))

    def fault_clock(self, at: float) -> None:
        host = self.chance.choice(("backend", "redis", self.other_node()))
        self.add(0.0, "clock", host=host, seconds=self.chance.choice((-400.0, -70.0, -5.0, 5.0, 400.0)))
