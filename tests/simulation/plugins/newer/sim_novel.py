"""A type that only the newer version knows."""

from router import Event, Plugin


class SimNovel(Event, frozen=True, tag="sim_novel"):
    """Something new."""

    text: str


sim_novel = Plugin(SimNovel)
