"""Types that the router's own do not cover: one that is not kept and has a window of its own, and one whose merging is not idempotent."""

from msgspec.structs import replace

from router import Event, Latest, Merge, Plugin, Policy


class SimCursor(Event, frozen=True, tag="sim_cursor"):
    """Where somebody points at the moment."""

    who: str
    text: str


class SimTally(Event, frozen=True, tag="sim_tally"):
    """Entries of a list that grows; merging puts them one after the other."""

    what: str
    entries: list[str]


def follow(pending: SimTally, new: SimTally) -> SimTally:
    """Both, in order. To merge something twice shows."""
    return replace(new, entries=[*pending.entries, *new.entries])


sim_cursor = Plugin(SimCursor, Policy(deliver=Latest(by=("who",), every=0.3), keep=False))
sim_tally = Plugin(SimTally, Policy(deliver=Merge(follow, by=("what",))))
