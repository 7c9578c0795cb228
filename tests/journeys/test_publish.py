"""The main job: a published event reaches everyone who has the project open."""

import asyncio
import time
from functools import partial

import pytest

from plugins.step import StepCompleted
from router import BadMessage, Publisher
from tests.node import make_token, run_node

SPECIFIED = [
    {"type": "step_started", "step_id": "step_123", "timestamp": "2024-10-21T10:00:00Z"},
    {"type": "step_progress", "step_id": "step_123", "progress": 0.45, "message": "Processing chunk 45/100"},
    {
        "type": "step_completed",
        "step_id": "step_123",
        "result": {"row_count": 1500, "columns": ["id", "name", "value"]},
        "timestamp": "2024-10-21T10:01:23Z",
    },
    {
        "type": "step_error",
        "step_id": "step_124",
        "error": "Database connection failed",
        "timestamp": "2024-10-21T10:00:45Z",
    },
    {
        "type": "chat_message",
        "role": "user",
        "content": "Show me top customers by revenue",
        "timestamp": "2024-10-21T10:00:00Z",
    },
    {"type": "chat_response_chunk", "content": "Here are ", "is_complete": False},
    {"type": "chat_response_chunk", "content": "the top customers...", "is_complete": True},
    {
        "type": "project_modified",
        "user_id": "user_456",
        "changes": {"steps_added": ["step_789"], "steps_removed": [], "dataflows_added": []},
        "timestamp": "2024-10-21T10:00:00Z",
    },
]


async def test_every_message_of_the_specification_reaches_plain_clients_exactly_as_it_was_published(node):
    async with node.client(plain=True) as one, node.client(plain=True) as two:
        for event in SPECIFIED:
            await node.publish(event)
            assert await one.frame() == event
            assert await two.frame() == event


async def test_router_v1_clients_get_the_same_with_a_number_added(node):
    async with node.client() as client:
        for number, event in enumerate(SPECIFIED, 1):
            await node.publish(event)
            got = await client.event(event["type"])
            assert got.pop("seq") == number
            got.pop("pos", None)
            assert got == event


async def test_fields_that_no_plugin_knows_arrive_too(node):
    event = {"type": "step_started", "step_id": "s", "timestamp": "t", "from_a_newer_backend": [1, {"a": None}]}
    async with node.client(plain=True) as client:
        await node.publish(event)
        assert await client.frame() == event


async def test_what_a_person_says_reaches_everybody_with_the_name_that_the_token_gives(node):
    async with node.client() as ada, node.client() as grace:
        await ada.send({"type": "chat_message", "role": "assistant", "content": "hello", "user_id": "somebody else"})
        for client in (ada, grace):
            got = await client.event("chat_message")
            assert (got["role"], got["content"], got["user_id"]) == ("user", "hello", "ada")


async def test_another_project_hears_nothing(node):
    async with node.client("p1") as here, node.client("p2") as there:
        await node.publish({"type": "step_started", "step_id": "a"}, project="p1")
        await node.publish({"type": "step_started", "step_id": "b"}, project="p2")
        assert (await here.event("step_started"))["step_id"] == "a"
        assert (await there.event("step_started"))["step_id"] == "b"


async def test_a_notification_goes_to_one_user_one_project_or_everybody(node):
    grace_token = make_token("grace")
    async with node.client() as ada, node.client(token=grace_token) as grace:
        await node.publish({"type": "notification", "level": "info", "title": "yours"}, path="/users/ada/events")
        await node.publish({"type": "notification", "level": "info", "title": "all"}, path="/events")
        await node.publish({"type": "notification", "level": "info", "title": "here"})
        seen_by_ada = [await ada.event("notification") for _ in range(3)]
        seen_by_grace = [await grace.event("notification") for _ in range(2)]
        assert {(e["title"], e.get("topic"), e["seq"]) for e in seen_by_ada} == {
            ("yours", "user", 1),
            ("all", "all", 1),
            ("here", None, 1),
        }
        assert {e["title"] for e in seen_by_grace} == {"all", "here"}


async def test_a_burst_of_progress_ends_with_its_newest_value_and_completed_settles_it(node):
    async with node.client() as client:
        for done in range(1, 10):
            await node.publish({"type": "step_progress", "step_id": "s", "progress": done / 10})
        await node.publish({"type": "step_completed", "step_id": "s", "result": {}})
        seen = await client.events(lambda event: event["type"] == "step_completed")
        progress = [event["progress"] for event in seen if event["type"] == "step_progress"]
        assert progress == [0.1]
        assert seen[-1]["seq"] == 10


async def test_a_client_that_comes_back_gets_what_it_missed_merged(node):
    async with node.client() as client:
        await node.publish({"type": "step_started", "step_id": "s"})
        last = await client.event("step_started")
        epoch = client.welcome["epoch"]
    for done in range(1, 6):
        await node.publish({"type": "step_progress", "step_id": "s", "progress": done / 10})
    for word in ("Here ", "are ", "some"):
        await node.publish({"type": "chat_response_chunk", "content": word, "is_complete": False})
    await node.publish({"type": "chat_message", "role": "user", "content": "?"})
    async with node.client(since=f"{epoch}:{last['seq']}") as again:
        assert again.welcome["recovered"] is True
        assert again.welcome["pos"] == 1
        batch = await again.frame()
        told = [(e["type"], e.get("progress"), e.get("content")) for e in batch["events"]]
        assert told == [
            ("chat_message", None, "?"),
            ("step_progress", 0.5, None),
            ("chat_response_chunk", None, "Here are some"),
        ]
        assert batch["pos"] == 10


async def test_a_position_that_cannot_be_gone_back_to_is_answered_with_resync(node):
    for since in ("garbage", "wrongepoch:5", "::", "0:0:0", "é", "a:99999999999999999999"):
        async with node.client(since=since) as client:
            assert client.welcome["recovered"] is False
            assert (await client.frame())["type"] == "resync"


async def test_a_page_just_loaded_asks_for_everything_and_sees_the_text_so_far(node):
    for word in ("The ", "answer ", "is"):
        await node.publish({"type": "chat_response_chunk", "content": word, "is_complete": False, "stream_id": "a"})
    async with node.client(since="0") as client:
        assert (await client.event("chat_response_chunk"))["content"] == "The answer is"
        await node.publish({"type": "chat_response_chunk", "content": " 42", "is_complete": True, "stream_id": "a"})
        assert (await client.event("chat_response_chunk"))["content"] == " 42"


async def test_a_critical_event_is_sent_again_until_it_is_acknowledged():
    async with run_node(ack_after=0.05) as node, node.client() as client:
        await node.publish(
            {"type": "step_completed", "step_id": "s", "result": {}, "requires_ack": True, "message_id": "m7"}
        )
        first = await client.event("step_completed")
        assert (first["message_id"], first["requires_ack"], first["pos"]) == ("m7", True, 0)
        again = await client.event("step_completed")
        assert again["redelivered"] is True
        await client.send({"type": "ack", "message_id": "m7"})
        await node.publish({"type": "step_started", "step_id": "next"})
        assert "pos" not in (await client.events(lambda event: event["type"] == "step_started"))[-1]


async def test_a_text_that_is_none_is_told_before_anything_is_sent(node):
    async with Publisher(node.url, make_token("backend", "*", ("publish",))) as publisher:
        for publish in (partial(publisher.publish, "p1"), partial(publisher.publish_to_user, "ada")):
            with pytest.raises(BadMessage):
                await publish(StepCompleted(step_id="\ud800"))


async def test_the_same_idempotency_key_publishes_once(node):
    async with node.client() as client:
        event = {"type": "step_started", "step_id": "s"}
        first = await node.publish(event, **{"Idempotency-Key": "k1"})
        assert await node.publish(event, **{"Idempotency-Key": "k1"}) == first
        await node.publish({"type": "step_started", "step_id": "other"})
        seen = await client.events(lambda event: event.get("step_id") == "other")
        assert [e["step_id"] for e in seen if e["type"] == "step_started"] == ["s", "other"]


async def test_people_who_come_and_go_are_told_of(node):
    async with node.client() as ada:
        async with node.client(token=make_token("grace")):
            joined = await ada.events(lambda e: e["type"] == "presence_joined" and e["user_id"] == "grace")
            assert "seq" not in joined[-1]
        assert (await ada.event("presence_left"))["user_id"] == "grace"


async def test_two_answers_at_once_never_mix(node):
    async with node.client() as client:
        words = {"a": ["A1 ", "A2 ", "A3"], "b": ["B1 ", "B2 ", "B3"]}
        for part in range(3):
            for stream in "ab":
                await node.publish(
                    {
                        "type": "chat_response_chunk",
                        "stream_id": stream,
                        "content": words[stream][part],
                        "is_complete": part == 2,
                    }
                )
        text = {"a": "", "b": ""}
        done = 0
        while done < 2:
            chunk = await client.event("chat_response_chunk")
            text[chunk["stream_id"]] += chunk["content"]
            done += chunk["is_complete"]
        assert text == {"a": "A1 A2 A3", "b": "B1 B2 B3"}


async def test_many_publishers_at_once_keep_the_order_of_numbers(node):
    async with node.client() as client:
        await asyncio.gather(*(node.publish({"type": "step_started", "step_id": str(i)}) for i in range(50)))
        seen = []
        while len(seen) < 50:
            seen.append((await client.event("step_started"))["seq"])
        assert seen == sorted(seen)


async def test_the_publisher_is_told_who_acknowledged_and_who_did_not(node):
    async with (
        node.client() as ada,
        node.client(token=make_token("grace")) as grace,
        Publisher(node.url, make_token("backend", "*", ("publish",))) as publisher,
    ):
        event = StepCompleted(step_id="s", result={})
        asked = asyncio.create_task(publisher.publish("p1", event, acknowledged=0.3))
        got = await ada.event("step_completed")
        await ada.send({"type": "ack", "message_id": got["message_id"]})
        assert (await grace.event("step_completed"))["requires_ack"] is True
        answer = await asked
        assert (answer.seq, answer.acknowledged, answer.missing) == ([1], ["ada"], ["grace"])


async def test_an_acknowledgement_by_position_covers_everything_up_to_it(node):
    async with node.client() as ada, Publisher(node.url, make_token("backend", "*", ("publish",))) as publisher:
        events = [StepCompleted(step_id=str(i), result={}) for i in range(3)]
        asked = asyncio.create_task(publisher.publish("p1", *events, acknowledged=10.0))
        last = (await ada.events(lambda event: event.get("step_id") == "2"))[-1]
        await ada.send({"type": "ack", "pos": last["seq"]})
        answer = await asked
        assert (answer.acknowledged, answer.missing) == (["ada"], [])


async def test_somebody_asks_for_a_step_to_be_stopped_and_everybody_sees_who(node):
    async with node.client() as ada, node.client() as other:
        await ada.send({"type": "cancel", "step_id": "s1", "ref": "c"})
        got = await other.event("cancel")
        assert (got["step_id"], got["user_id"]) == ("s1", "ada")
        await ada.send({"type": "cancel", "ref": "c2"})
        refused = await ada.event("error")
        assert (refused["code"], refused["ref"]) == ("bad_message", "c2")


LAPSING = """
from router import Event, Lapse, Now, Plugin, Policy

class Opened(Event, frozen=True, tag="opened"):
    door: str

class Closed(Event, frozen=True, tag="closed"):
    door: str
    why: str

opened = Plugin(Opened, Policy(deliver=Now(by=("door",)), lapse=Lapse(0.1, lambda e: Closed(door=e.door, why="lost"))))
closed = Plugin(Closed, Policy(deliver=Now(by=("door",))))
"""


async def test_what_was_opened_and_is_not_heard_of_any_more_is_closed_for_everybody(tmp_path):
    (tmp_path / "doors.py").write_text(LAPSING)
    async with run_node(plugins=(str(tmp_path),)) as node, node.client() as one, node.client(plain=True) as two:
        await node.publish({"type": "opened", "door": "front"}, {"type": "opened", "door": "back"})
        await node.publish({"type": "closed", "door": "back", "why": "wind"})
        for client in (one, two):
            closed = [await client.event("closed") for _ in range(2)]
            assert [(event["door"], event["why"]) for event in closed] == [("back", "wind"), ("front", "lost")]


async def test_a_disconnect_cancels_nothing_and_an_unacknowledged_event_comes_again_on_resume(node):
    async with node.client() as client:
        await node.publish({"type": "step_started", "step_id": "s", "requires_ack": True, "message_id": "m1"})
        got = await client.event("step_started")
        assert got["pos"] == 0
        epoch = client.welcome["epoch"]
    async with node.client(since=f"{epoch}:0:1") as again:
        repeated = await again.event("step_started")
        assert (repeated["redelivered"], repeated["message_id"]) == (True, "m1")
        await again.send({"type": "ack", "message_id": "m1"})
        await node.publish({"type": "step_started", "step_id": "t"})
        assert (await again.event("step_started")).get("pos", 2) == 2


async def test_an_event_with_an_id_of_its_own_is_acknowledged_by_it_whatever_key_it_was_published_under(node):
    async with node.client() as ada, Publisher(node.url, make_token("backend", "*", ("publish",))) as publisher:
        event = StepCompleted(step_id="s", result={}, message_id="mine")
        asked = asyncio.create_task(publisher.publish("p1", event, acknowledged=10.0))
        assert (await ada.event("step_completed"))["message_id"] == "mine"
        await ada.send({"type": "ack", "message_id": "mine"})
        assert (await asked).missing == []


async def test_what_comes_between_expiry_and_a_late_refresh_is_caught_up_on(node):
    soon = make_token(exp=int(time.time()) + 1)
    async with node.client(token=soon) as client:
        await node.publish({"type": "step_started", "step_id": "before"})
        (session,) = node.router.hub
        node.router.auth.watch(session.id, time.time() - 1)
        await node.publish({"type": "step_started", "step_id": "between"})
        assert session in node.router.hub.suspended
        await client.send({"type": "auth_refresh", "token": make_token()})
        await client.event("token_refreshed")
        await node.publish({"type": "step_started", "step_id": "after"})
        seen = await client.events(lambda event: event.get("step_id") == "after")
        assert [event["step_id"] for event in seen if "step_id" in event][-2:] == ["between", "after"]


LATE = """
import asyncio

from router import Envelope, Forward

waiting = set()

async def later(envelope: Envelope, forward: Forward) -> None:
    if envelope.leg == "outbound" and envelope.type == "step_started" and not envelope.replay:
        task = asyncio.get_running_loop().create_task(forward(envelope))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    else:
        await forward(envelope)
"""


async def test_a_middleware_may_forward_later(tmp_path, monkeypatch):
    (tmp_path / "late_middleware.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    order = ("auth", "permission", "late_middleware:later", "rate", "coalesce", "audit")
    async with run_node(middleware=order) as node, node.client() as client:
        await node.publish({"type": "step_started", "step_id": "s"})
        assert (await client.event("step_started"))["step_id"] == "s"


async def test_nobody_can_be_addressed_by_a_name_that_leads_elsewhere(node):
    async with node.client() as client, Publisher(node.url, make_token("backend", "*", ("publish",))) as publisher:
        for name in ("..", ".", "", "a/b"):
            with pytest.raises(BadMessage):
                await publisher.publish_to_user(name, StepCompleted(step_id="secret", result={}))
            with pytest.raises(BadMessage):
                await publisher.publish(name, StepCompleted(step_id="secret", result={}))
        await node.publish({"type": "step_started", "step_id": "s"})
        seen = await client.events(lambda event: event["type"] == "step_started")
        assert not [event for event in seen if event["type"] == "step_completed"]


async def test_an_answer_goes_on_streaming_while_nobody_looks_and_is_not_declared_lost(node):
    chunk = {"type": "chat_response_chunk", "stream_id": "a", "is_complete": False}
    async with node.client():
        await node.publish({**chunk, "content": "one "})
    assert len(node.router.lapses) == 0
    await node.publish({**chunk, "content": "two "})
    async with node.client(since="0") as client:
        assert (await client.event("chat_response_chunk"))["content"] == "one two "
        assert len(node.router.lapses) == 1
        await node.publish({**chunk, "content": "three", "is_complete": True})
        assert (await client.event("chat_response_chunk"))["content"] == "three"
        assert len(node.router.lapses) == 0
