"""Changes to the project itself, by several people at once."""

from msgspec import field
from msgspec.structs import replace

from router import Context, Event, Merge, Plugin, Policy, timestamp


class ProjectModified(Event, frozen=True, tag="project_modified"):
    """What was added and removed, by kind: `steps_added`, `steps_removed`, `dataflows_added` and the like."""

    user_id: str
    changes: dict[str, list[str]]
    timestamp: str = field(default_factory=timestamp)


def unite(pending: ProjectModified, new: ProjectModified) -> ProjectModified:
    """Both sets of changes in one. What was added and then removed, or the other way, ends as the newer one says."""
    changes = {kind: list(ids) for kind, ids in pending.changes.items()}
    for kind, ids in new.changes.items():
        thing, _, verb = kind.rpartition("_")
        opposite = changes.get(f"{thing}_{'removed' if verb == 'added' else 'added'}", [])
        opposite[:] = [id_ for id_ in opposite if id_ not in ids]
        mine = changes.setdefault(kind, [])
        mine += [id_ for id_ in ids if id_ not in mine]
    return replace(new, changes=changes)


async def modify(event: ProjectModified, context: Context) -> None:
    """A person changed something: everybody sees who, whatever the browser claimed."""
    await context.publish(replace(event, user_id=context.sender.user))


project_modified = Plugin(ProjectModified, Policy(send="edit", deliver=Merge(unite, by=("user_id",))), modify)
