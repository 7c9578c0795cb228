"""What befalls whom, and when, in a random ordeal: everything that the seed decides, as a value."""

from random import Random
from typing import Literal, TypeAlias

from msgspec import Struct

__all__ = [
    "CALM_AT",
    "END_AT",
    "OF_PROJECT",
    "OF_USER",
    "PAIRS",
    "PEOPLE",
    "PROJECTS",
    "RESTARTS",
    "SEATS",
    "USERS",
    "Fault",
    "Kind",
    "Person",
    "Schedule",
    "Story",
    "Turn",
    "draw",
]

Kind: TypeAlias = Literal["single", "sentinel", "cluster"]

CALM_AT, END_AT = 11.0, 15.0
"""Seconds: when the last fault is over, and when the last event is published."""
PROJECTS = 3
PEOPLE = 30
USERS = PEOPLE - 4
"""Some have two windows, in two projects."""
SIDE, QUIET = 20, 27
"""From which number on people have the second and the third project open. All of the third sleep at the same time:
then no node listens to it, and there is no one but the next who comes to see what became of its numbers."""
PAIRS = ((4, 5), (6, 7))
"""Two windows that open a moment apart and ask for everything."""
OF_USER, OF_PROJECT = 4, 40
SEATS = {"limit_user": OF_USER, "limit_project": OF_PROJECT, "limit_system": OF_PROJECT * PROJECTS}
"""The limits of the nodes: everybody's windows and some more can fill every one of them exactly."""
PLAIN = frozenset({8, 18, 24})
CLOCKS = (65.0, 310.0, -360.0)
"""Seconds that a wrong clock is slow (or, below 0, fast): more than a stream may be silent, than history lasts."""

ANYWHERE = ("kill_node", "stop_node", "freeze_node", "deafen", "reset", "flush", "read_only", "full", "clock")
"""Faults that there are on every kind of Redis."""
FAULTS: dict[Kind, tuple[str, ...]] = {
    "single": (*ANYWHERE, "swallow", "freeze_redis", "remember", "forget", "age", "tear"),
    "sentinel": (*ANYWHERE, "fail_over", "fail_over_frozen"),
    "cluster": (*ANYWHERE, "move_slot", "fail_over"),
}
RESTARTS = ("remember", "forget", "age", "tear", "freeze_redis", "fail_over", "fail_over_frozen", "move_slot")
"""Of these one at a time, and only one failover in all: what was replaced is no replica soon."""
INSTANT = frozenset({"deafen", "reset", "flush"})


class Fault(Struct, frozen=True):
    """Something that is done to a server. `which` is one of several that there may be."""

    at: float
    kind: str
    lasts: float = 0.0
    which: int = 0
    lead: float = 0.0
    """`age`: how long before it the snapshot is taken to which Redis goes back."""


class Turn(Struct, frozen=True):
    """Something that a person does, or that befalls their network."""

    at: float
    kind: Literal["move", "drop", "sleep", "slow"]
    lasts: float = 0.0


class Person(Struct, frozen=True):
    """One window of somebody's browser."""

    number: int
    user: str
    project: int
    plain: bool
    node: int
    at: float
    """When it opens."""
    since: bool
    """Whether it asks for all that history has, or begins with now."""
    chats: tuple[float, ...]
    """When they say something."""
    turns: tuple[Turn, ...]


class Story(Struct, frozen=True):
    """Several events that belong together, one after the other."""

    at: float
    lane: int
    kind: Literal["answer", "step", "change", "note", "critical"]
    project: int
    count: int
    every: float
    target: str = ""
    """Of a note: `user:<name>`, `all`, or empty for the project."""


class Schedule(Struct, frozen=True):
    """All of one ordeal."""

    seed: int
    on: Kind
    sharded: bool
    log: bool
    """Whether Redis writes an AOF, or snapshots only."""
    settings: dict[str, float]
    allowed: tuple[str, ...]
    faults: tuple[Fault, ...]
    people: tuple[Person, ...]
    stories: tuple[Story, ...]
    publishers: tuple[str, ...]
    """Of each lane: `redis`, `http`, or `slow:<seconds>`."""
    eager: tuple[bool, ...]
    """Of each lane: whether it publishes the next before it knows what became of the last."""

    def told(self) -> str:
        """The faults in a few words."""
        return " ".join(f"{fault.kind}@{fault.at:.1f}" for fault in self.faults) or "none"


def draw(seed: int, on: Kind) -> Schedule:
    """The same for the same seed, always."""
    random = Random(f"{on}:{seed}")
    possible = FAULTS[on]
    allowed = tuple(sorted(random.sample(possible, random.randint(1, min(5, len(possible))))))
    slow = random.choice(CLOCKS)
    log = random.random() < 0.5
    own = [kind for kind in possible if kind not in ANYWHERE] if on != "single" else []  # what this kind is there for
    faults = _faults(random, [kind for kind in allowed if kind != "clock"], own)
    publishers = ("redis", random.choice(("http", "redis")), f"slow:{slow}" if "clock" in allowed else "http")
    return Schedule(
        seed=seed,
        on=on,
        sharded=on == "cluster" and random.random() < 0.5,
        log=log,
        settings={
            "broadcast_every": random.choice((0.3, 1.0)),
            "history_events": random.choice((1000, 1000, 150)),
        },
        allowed=allowed,
        faults=faults,
        people=_people(random),
        stories=_stories(random, len(publishers)),
        publishers=publishers,
        eager=tuple(random.random() < 0.5 and publisher != "http" for publisher in publishers),
    )


def _faults(random: Random, kinds: list[str], own: list[str]) -> tuple[Fault, ...]:
    drawn: list[Fault] = []
    if not kinds and not own:
        return ()
    for number in range(random.randint(2, 6)):
        kind = random.choice(kinds if number and kinds else own or kinds)
        longest = {"freeze_redis": 6.0, "swallow": 6.0, "freeze_node": 4.0}.get(kind, 2.5)
        lasts = 0.0 if kind in INSTANT else random.choice((random.uniform(0.1, 0.6), random.uniform(0.5, longest)))
        at = random.uniform(1.5, CALM_AT - lasts - 0.5)
        fault = Fault(at, kind, lasts, random.randrange(2), random.uniform(0.3, min(3.0, at - 0.5)))
        if not any(_collide(fault, other) for other in drawn):
            drawn.append(fault)
    return tuple(sorted(drawn, key=lambda fault: fault.at))


def _collide(one: Fault, other: Fault) -> bool:
    """Whether the two are done to the same server at the same time, or cannot both be."""
    if one.kind.startswith("fail_over") and other.kind.startswith("fail_over"):
        return True
    if (one.kind in RESTARTS) != (other.kind in RESTARTS):  # whatever else may happen during a restart
        return False
    if one.kind in RESTARTS:
        # A server needs a moment to come back, and a snapshot is taken before.
        first, second = sorted((one, other), key=lambda fault: fault.at)
        pause = 4.0 if first.kind.startswith("fail_over") else 0.5
        return second.at - second.lead < first.at + first.lasts + pause
    node = ("kill_node", "stop_node", "freeze_node")
    if (one.kind in node) != (other.kind in node) or (one.kind in node and one.which != other.which):
        return False
    pause = 2.5 if one.kind in node else 0.1
    return one.at < other.at + other.lasts + pause and other.at < one.at + one.lasts + pause


def _people(random: Random) -> tuple[Person, ...]:
    calm = random.random() < 0.2
    nap = random.uniform(2.0, 5.0)
    length = random.uniform(2.0, 5.5)
    openings: dict[int, float] = {}
    for first, second in PAIRS:
        openings[first] = random.uniform(1.5, 9.0)
        openings[second] = openings[first] + random.uniform(0.05, 0.1)
    people = []
    for number in range(PEOPLE):
        project = 0 if number < SIDE else 1 if number < QUIET else 2
        opens = openings.get(number, random.uniform(0.0, 0.8))
        turns: list[Turn] = []
        at = opens
        while not calm and project != PROJECTS - 1:
            at += random.uniform(0.5, 6.0)
            slow = 2 if project == 1 and number % 2 else 0
            kind = random.choices(("move", "drop", "sleep", "slow"), (4, 3, 2, slow))[0]
            lasts = random.uniform(0.0, 0.3) if kind in ("move", "drop") else random.uniform(0.5, 3.0)
            if at + lasts > END_AT - 2.0:
                break
            turns.append(Turn(at, kind, lasts))
            at += lasts
        if project == PROJECTS - 1:
            turns.append(Turn(nap, "sleep", length + random.uniform(0.0, 0.2)))
        talks = random.random() < 0.3 and number not in PLAIN
        chats = tuple(sorted(random.uniform(opens + 0.5, END_AT) for _ in range(random.randint(1, 8)))) if talks else ()
        people.append(
            Person(
                number=number,
                user=f"u{number % USERS}",
                project=project,
                plain=number in PLAIN,
                node=random.randrange(2),
                at=opens,
                since=number in (each for pair in PAIRS for each in pair) or random.random() < 0.5,
                chats=chats,
                turns=tuple(turns),
            )
        )
    return tuple(people)


def _stories(random: Random, lanes: int) -> tuple[Story, ...]:
    stories = []
    for project, tracks in enumerate((3, 1, 1)):
        for track in range(tracks):
            at = random.uniform(0.2, 1.0)
            while at < END_AT - 0.5:
                kind = random.choices(("answer", "step", "change"), (4, 2, 3))[0]
                every = random.choice((0.02, 0.05, 0.11))
                count = min(random.randint(5, 120), int((END_AT - at) / every))
                lane = (track + project) % lanes
                stories.append(Story(at, lane, kind, project, max(1, count), every))
                at += count * every + random.uniform(0.05, 0.5)
    at = 0.5
    while at < END_AT:
        target = random.choice(("", f"user:u{random.randrange(USERS)}", "all"))
        kind = random.choice(("note", "critical"))
        stories.append(Story(at, random.randrange(lanes), kind, random.randrange(PROJECTS), 1, 0.0, target))
        at += random.uniform(0.2, 1.2)
    return tuple(sorted(stories, key=lambda story: story.at))
