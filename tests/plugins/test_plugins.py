"""The message types of the specification."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.cancel import Cancel, request
from plugins.chat import ChatMessage, say
from plugins.project import ProjectModified, modify, unite
from router import Refused
from router.catalog import Catalog, discover
from router.testing import RecordingContext, Sent

KINDS = st.sampled_from(["steps_added", "steps_removed", "dataflows_added", "dataflows_removed"])
CHANGES = st.dictionaries(KINDS, st.lists(st.sampled_from("abc"), unique=True), max_size=3)


def test_every_type_of_the_specification_is_there():
    found, problems = discover()
    assert not problems
    tags = {entry.plugin.tag for entry in Catalog(found)}
    assert tags >= {
        "step_started",
        "step_progress",
        "step_completed",
        "step_error",
        "chat_message",
        "chat_response_chunk",
        "project_modified",
        "notification",
    }


async def test_a_person_speaks_in_their_own_name():
    context = RecordingContext(user="ada")
    await say(ChatMessage(role="system", content="hi", timestamp="t", user_id="root"), context)
    assert context.published == [Sent(ChatMessage(role="user", content="hi", timestamp="t", user_id="ada"))]


async def test_a_person_changes_in_their_own_name():
    context = RecordingContext(user="ada")
    await modify(ProjectModified(user_id="root", changes={"steps_added": ["s"]}, timestamp="t"), context)
    assert context.published == [Sent(ProjectModified(user_id="ada", changes={"steps_added": ["s"]}, timestamp="t"))]


@pytest.mark.parametrize("event", [Cancel(), Cancel(step_id="s", stream_id="a")])
async def test_a_cancel_names_exactly_one_thing(event):
    context = RecordingContext()
    with pytest.raises(Refused, match="either"):
        await request(event, context)
    assert not context.published


def apply(state, changes):
    state = {thing: set(ids) for thing, ids in state.items()}
    for kind, ids in changes.items():
        thing, _, verb = kind.rpartition("_")
        here = state.setdefault(thing, set())
        here |= set(ids) if verb == "added" else set()
    for kind, ids in changes.items():
        thing, _, verb = kind.rpartition("_")
        if verb == "removed":
            state.setdefault(thing, set()).difference_update(ids)
    return {thing: ids for thing, ids in state.items() if ids}


def consistent(changes):
    return not any(
        set(changes.get(f"{thing}_added", [])) & set(changes.get(f"{thing}_removed", []))
        for thing in ("steps", "dataflows")
    )


@given(CHANGES.filter(consistent), CHANGES.filter(consistent), st.frozensets(st.sampled_from("abc")))
def test_two_changes_in_one_do_what_both_did(first, second, steps):
    old, new = ProjectModified(user_id="u", changes=first), ProjectModified(user_id="u", changes=second)
    before = {"steps": set(steps)}
    merged = unite(old, new)
    assert apply(before, merged.changes) == apply(apply(before, first), second)
    assert old.changes == first


class Watched(RecordingContext):
    """Remembers also what was done first."""

    def __init__(self):
        super().__init__(user="ada")
        self.done = []

    async def publish(self, event, *, to=None):
        self.done.append("publish")
        await super().publish(event, to=to)

    async def forward(self, event=None):
        self.done.append("forward")
        await super().forward(event)


@pytest.mark.parametrize(
    ("handle", "event"), [(say, ChatMessage(role="system", content="hi")), (request, Cancel(step_id="s"))]
)
async def test_backends_get_what_people_say_and_ask_for_as_all_see_it_and_before_all_do(handle, event):
    context = Watched()
    await handle(event, context)
    assert [sent.event for sent in context.published] == context.forwarded
    assert context.forwarded[0].user_id == "ada"
    assert context.done == ["forward", "publish"]
