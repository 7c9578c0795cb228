"""Whatever a client sends, it gets an answer that helps, and nobody else notices."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from router.audience import Audience, project_topic
from router.testing import Clock
from tests.node import Client, Node, make_token, run_node
from tests.router.server.raw import PING, Raw, dial, frame, upgrade

EVENT = {"type": "step_started", "step_id": "after"}
CHAT = {"type": "chat_message", "role": "user", "content": "hello"}


@asynccontextmanager
async def unharmed(node: Node, *also: Client) -> AsyncIterator[None]:
    """Somebody else has the project open all the while, and still gets an event afterwards; so does `also`."""
    async with node.client(token=make_token("grace")) as bystander:
        yield
        await node.publish(EVENT)
        for client in (bystander, *also):
            await client.events(lambda event: event.get("step_id") == "after")


@asynccontextmanager
async def raw_client(node: Node, query: str = "", *headers: str, **claims: Any) -> AsyncIterator[Raw]:
    """An accepted connection that speaks router.v1 and has read its `welcome`."""
    token = f"Authorization: Bearer {make_token(**claims)}"
    request = upgrade(f"/ws/project/p1{query}", token, "Sec-WebSocket-Protocol: router.v1", *headers)
    async with dial(node.port, request) as raw:
        assert json.loads((await raw.frame())[1])["type"] == "welcome"
        yield raw


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing() -> AsyncIterator[Node]:
    """A node that many tests use one after the other, as they leave nothing behind in it."""
    async with run_node() as running:
        yield running


# -- messages that are answered with `error`

BAD = {
    "unknown type": ({"type": "nope"}, "unknown_type", "there is no message type `nope` - at `$.type`"),
    "no type": ({"content": "x"}, "bad_message", "Object missing required field `type`"),
    "type is no text": ({"type": 5}, "bad_message", "Expected `str`, got `int` - at `$.type`"),
    "field of the wrong type": (
        {**CHAT, "content": 123456789},
        "bad_message",
        "Expected `str`, got `int` - at `$.content`",
    ),
    "field too long": (
        {**CHAT, "content": "x" * 32_001},
        "bad_message",
        "Expected `str` of length <= 32000 - at `$.content`",
    ),
    "nested field of the wrong type": (
        {"type": "project_modified", "user_id": "", "changes": {"steps_added": ["a", 5]}},
        "bad_message",
        "Expected `str`, got `int` - at `$.changes[...][1]`",
    ),
    "missing field": (
        {"type": "chat_message", "role": "user"},
        "bad_message",
        "Object missing required field `content`",
    ),
    "not JSON": ("hello", "bad_message", "not JSON: "),
    "half of JSON": ('{"type":"chat_message"', "bad_message", "not JSON: "),
    "two objects": ('{"type":"pong"}{"type":"pong"}', "bad_message", "not JSON: "),
    "empty": ("", "bad_message", "not JSON: "),
    "null": ("null", "bad_message", "Expected `object`, got `null`"),
    "a list": ('["chat_message"]', "bad_message", "Expected `object`, got `array`"),
    "a number": ("5", "bad_message", "Expected `object`, got `int`"),
    "half of a surrogate pair": (
        '{"type":"chat_message","role":"user","content":"\\ud800"}',
        "bad_message",
        "not JSON: ",
    ),
    "not a number": ('{"type":"chat_message","role":"user","content":NaN}', "bad_message", "not JSON: "),
    "type given twice": ('{"type":"chat_message","type":"pong"}', "bad_message", "Invalid value"),
    "ref is no text": ({"type": "pong", "ref": 5}, "bad_message", "Expected `str | null`, got `int` - at `$.ref`"),
    "ref of 65 characters": (
        {"type": "pong", "ref": "x" * 65},
        "bad_message",
        "`ref` is longer than 64 characters - at `$.ref`",
    ),
    "binary": (json.dumps(CHAT).encode(), "bad_message", "messages are JSON in text frames, not binary"),
    "ack of nothing": ({"type": "ack"}, "bad_message", "`ack` needs `message_id` or `pos`"),
    "ack of a text position": (
        {"type": "ack", "pos": "1"},
        "bad_message",
        "Expected `int | null`, got `str` - at `$.pos`",
    ),
    "refresh without token": ({"type": "auth_refresh"}, "bad_message", "Object missing required field `token`"),
    **{
        f"{kind} from a client": (
            {"type": kind},
            "bad_message",
            f"`{kind}` is a frame that only the router sends - at `$.type`",
        )
        for kind in ("welcome", "batch", "resync", "token_expiring", "token_refreshed", "error", "goaway", "ping")
    },
    "event that clients cannot send": (
        {"type": "step_completed", "step_id": "s", "result": {}},
        "denied",
        "`step_completed` is published by backends; clients cannot send it",
    ),
    "presence is the router's to tell": (
        {"type": "presence_joined", "user_id": "eve"},
        "denied",
        "`presence_joined` is published by backends; clients cannot send it",
    ),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("message", "code", "text"), BAD.values(), ids=BAD.keys())
async def test_a_message_that_is_not_right_is_answered_with_what_is_wrong_and_the_connection_stays(
    standing, message, code, text
):
    async with standing.client() as client, unharmed(standing, client):
        await client.send(message)
        error = await client.event("error")
        assert error["message"].startswith(text)
        assert {**error, "message": ...} == {"type": "error", "code": code, "message": ..., "temporary": False}


async def test_nesting_of_100_000_levels_is_declined():
    async with run_node(limit_message=1 << 20) as node, node.client() as client, unharmed(node, client):
        for level in ("[", '{"a":'):
            for field in ("type", "ref", "traceparent", "unknown"):
                await client.send(f'{{"{field}":' + level * 100_000)
                assert (await client.event("error"))["code"] == "bad_message"
            await client.send('{"type":"pong","unknown":' + level * 100_000)
            assert (await client.event("error"))["message"] == "nested too deep"


async def test_the_missing_grant_is_named(node):
    async with node.client(token=make_token(grants=("view",))) as client, unharmed(node, client):
        await client.send({**CHAT, "ref": "r1"})
        error = await client.event("error")
        assert (error["code"], error["ref"]) == ("denied", "r1")
        assert error["message"] == "this needs the grant `chat` on this project"


async def test_a_ref_comes_back_with_the_error_the_last_one_where_there_are_two(node):
    async with node.client() as client, unharmed(node, client):
        for message, ref in (
            ({"type": "nope", "ref": "a" * 64}, "a" * 64),
            ({"type": "nope", "ref": "é✓"}, "é✓"),
            ({"type": "nope", "ref": None}, None),
            ('{"type":"nope","ref":"first","ref":"second"}', "second"),
            ({**CHAT, "content": 5, "ref": "r"}, "r"),
        ):
            await client.send(message)
            assert (await client.event("error")).get("ref") == ref


async def test_what_was_sent_is_not_sent_back(node):
    secret = "a-password-typed-into-the-wrong-box"
    async with node.client() as client, unharmed(node, client):
        for message in (
            {**CHAT, "content": [secret]},
            {**CHAT, "role": [secret]},
            {"type": "project_modified", "user_id": "", "changes": secret},
            {"type": "ack", "pos": secret},
            f'{{"type":"chat_message","content":"{secret}"',
        ):
            await client.send(message)
            assert secret not in json.dumps(await client.event("error"))


async def test_what_was_sent_is_not_sent_back_where_only_some_values_are_allowed(node):
    async with node.client() as client, unharmed(node, client):
        await client.send({**CHAT, "role": "a-password-typed-into-the-wrong-box"})
        assert "password" not in json.dumps(await client.event("error"))


async def test_an_unknown_type_is_named_but_not_at_any_length(node):
    async with node.client() as client, unharmed(node, client):
        await client.send({"type": "x" * 10_000})
        assert (await client.event("error"))["message"] == f"there is no message type `{'x' * 64}` - at `$.type`"


async def test_plain_clients_are_told_as_well(node):
    async with node.client(plain=True) as client:
        await client.send("hello")
        assert (await client.frame())["code"] == "bad_message"
        await client.send({**CHAT, "ref": "not asked for"})
        assert (await client.frame())["content"] == "hello"


async def test_signs_of_life_and_idle_acknowledgements_are_not_answered(node):
    async with node.client() as client, unharmed(node, client):
        for message in ({"type": "pong"}, {"type": "ack", "message_id": "never sent"}, {"type": "ack", "pos": 10**30}):
            await client.send(message)
        await client.send(CHAT)
        assert await client.events(lambda event: event["type"] in ("error", "chat_message")) != []
        assert client.connection.close_code is None


async def test_an_acknowledgement_of_nothing_acknowledges_nothing(node):
    async with node.client() as client, unharmed(node, client):
        await node.publish({**EVENT, "step_id": "critical", "requires_ack": True, "message_id": "m1"})
        await client.event("step_started")
        for message in ({"type": "ack", "message_id": "m2"}, {"type": "ack", "pos": 0}, {"type": "ack", "pos": -1}):
            await client.send(message)
        await client.send(CHAT)
        assert (await client.event("chat_message"))["pos"] == 0, "the critical event still holds the position back"


# -- messages that end the connection


async def test_a_frame_over_64_kib_ends_the_connection_with_1009(node):
    async with node.client() as client, unharmed(node):
        padding = 64 * 1024 - len(json.dumps({**CHAT, "padding": ""}))
        await client.send({**CHAT, "padding": "x" * padding})
        assert (await client.event("chat_message"))["content"] == "hello"
        await client.send({**CHAT, "padding": "x" * (padding + 1)})
        assert (await client.closed())[0] == 1009


async def test_text_that_is_not_utf_8_ends_the_connection_with_1007(node):
    async with node.client() as client, unharmed(node):
        await client.connection.send(b'{"type":"chat_message","content":"\xff"}', text=True)
        assert (await client.closed())[0] == 1007


async def test_more_than_10_bad_messages_in_a_minute_end_the_connection_with_4400(node):
    async with node.client() as client, unharmed(node):
        for _ in range(10):
            await client.send("bad")
            await client.event("error")
        await client.send(CHAT)
        await client.event("chat_message")
        await client.send("bad")
        assert (await client.event("error"))["code"] == "bad_message"
        assert await client.closed() == (4400, "more than 10 bad messages in a minute")


async def test_bad_messages_are_counted_by_connection_and_a_minute_later_forgotten(node):
    node.router._clock = clock = Clock()
    async with node.client() as client, unharmed(node, client):
        for _ in range(10):
            await client.send(b"bad")
            await client.event("error")
        async with node.client() as another:
            await another.send("bad")
            await another.event("error")
            await another.send({"type": "pong"})
        clock.move(60)
        for _ in range(10):
            await client.send(b"bad")
            await client.event("error")


async def test_what_is_declined_but_well_formed_does_not_count_as_bad(node):
    async with node.client(token=make_token(grants=("view",))) as client, unharmed(node, client):
        for _ in range(20):
            await client.send(CHAT)
            assert (await client.event("error"))["code"] == "denied"


# -- too much


async def test_the_eleventh_message_within_a_second_is_declined_with_the_time_to_wait(node):
    clock = Clock()
    rate = node.router.middleware[2]
    rate._clock = clock
    async with node.client() as client, node.client() as other_window, unharmed(node, client):
        for number in range(10):
            await (client if number % 2 else other_window).send({**CHAT, "content": str(number)})
        for _ in range(10):
            await client.event("chat_message")
        await client.send({**CHAT, "ref": "eleventh"})
        error = await client.event("error")
        assert (error["code"], error["temporary"], error["ref"]) == ("rate_limited", True, "eleventh")
        assert error["retry_after"] == 0.1
        assert error["message"] == "more than 10 messages a second"
        clock.move(error["retry_after"])
        await client.send({**CHAT, "content": "in time"})
        assert (await client.event("chat_message"))["content"] == "in time"


async def test_one_persons_rate_leaves_the_others_theirs(node):
    node.router.middleware[2]._clock = Clock()
    async with node.client() as ada, node.client(token=make_token("grace")) as grace:
        for _ in range(11):
            await ada.send(CHAT)
        assert (await ada.event("error"))["code"] == "rate_limited"
        await grace.send({**CHAT, "content": "still here"})
        said = await ada.events(lambda event: event.get("content") == "still here")
        assert said[-1]["user_id"] == "grace"


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(frame(json.dumps(CHAT).encode()), id="messages that are declined"),
        pytest.param(frame(b"x" * 125, PING), id="pings"),
    ],
)
async def test_a_client_that_sends_and_never_reads_cannot_fill_the_memory(node, flood):
    loop = asyncio.get_running_loop()
    token = f"Authorization: Bearer {make_token('eve', grants=('view',))}"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", node.port))
        await loop.sock_sendall(client, upgrade("/ws/project/p1", token, "Sec-WebSocket-Protocol: router.v1"))
        async with asyncio.timeout(10):
            while not len(node.router.hub):
                await asyncio.sleep(0)
        port = node.router.hub.port(next(iter(node.router.hub)))
        sent = stalled = 0
        while stalled < 1000:  # until the server has stopped reading from it for good
            try:
                sent += client.send(flood * 100)
                stalled = 0
            except BlockingIOError:
                stalled += 1
            except ConnectionError:
                break  # closed for its declined messages, which is as good
            await asyncio.sleep(0)
            assert port.backlog() < 1024 * 1024
    assert sent > 0


async def test_a_client_that_reads_a_little_now_and_then_cannot_fill_the_memory_either(node):
    loop, hub = asyncio.get_running_loop(), node.router.hub
    token = f"Authorization: Bearer {make_token()}"

    async def publish(count: int) -> None:
        for _ in range(count):
            event, payload = node.router.dispatch.read_foreign(json.dumps({**EVENT, "padding": "x" * 16_000}).encode())
            await node.router.publish(Audience(project_topic("p1")), event, payload=payload)
            await asyncio.sleep(0)

    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", node.port))
        await loop.sock_sendall(client, upgrade("/ws/project/p1", token, "Sec-WebSocket-Protocol: router.v1"))
        async with asyncio.timeout(30):
            while not hub.listening("project:p1"):
                await asyncio.sleep(0)
            [session] = hub
            port = hub.port(session)
            while not hub.slow:
                await publish(1)
            slow_since = hub.slow[session]
            await publish(30)  # what it is told once it has read the rest: more than its buffer takes
            while hub.slow.get(session) == slow_since:
                await loop.sock_recv(client, 8192)
            for _ in range(100):
                await publish(1)
                assert port.backlog() < 1024 * 1024


# -- handlers that misbehave

HANDLERS = """
import asyncio
from router import Event, Plugin, Policy

class Fails(Event, frozen=True, tag="fails"):
    text: str = ""

class Hangs(Event, frozen=True, tag="hangs"):
    text: str = ""

class Declines(Event, frozen=True, tag="declines"):
    text: str = ""

class Waits(Event, frozen=True, tag="waits"):
    text: str = ""

class Strays(Event, frozen=True, tag="strays"):
    text: str = ""

class Unlisted(Event, frozen=True, tag="unlisted"):
    text: str = ""

async def fail(event, context):
    raise ValueError(f"could not make sense of {event.text}")

async def hang(event, context):
    await asyncio.Event().wait()

async def decline(event, context):
    context.refuse("not on a Sunday", code="closed_today")

async def wait(event, context):
    context.refuse("the queue is full", code="queue_full", retry_after=2.5)

async def stray(event, context):
    await context.publish(Unlisted(text=event.text))

SENDABLE = Policy(send="view")
fails = Plugin(Fails, SENDABLE, fail)
hangs = Plugin(Hangs, SENDABLE, hang)
declines = Plugin(Declines, SENDABLE, decline)
waits = Plugin(Waits, SENDABLE, wait)
strays = Plugin(Strays, SENDABLE, stray)
"""


@pytest.fixture
async def misbehaving(tmp_path: Path) -> AsyncIterator[Node]:
    (tmp_path / "misbehaving.py").write_text(HANDLERS)
    async with run_node(plugins=(str(tmp_path),), handler_timeout=0.02) as node:
        yield node


async def test_a_handler_that_raises_is_told_of_without_what_it_said_and_logged_with_its_place(misbehaving, caplog):
    async with misbehaving.client() as client, unharmed(misbehaving, client):
        await client.send({"type": "fails", "text": "a-secret", "ref": "r1"})
        assert await client.event("error") == {
            "type": "error",
            "code": "plugin_failed",
            "message": "the handler of `fails` failed",
            "temporary": False,
            "ref": "r1",
        }
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "misbehaving.py (fails) raised ValueError" in record.getMessage()
    assert record.place.endswith("misbehaving.py:24")
    assert "a-secret" not in caplog.text


async def test_a_handler_that_takes_too_long_is_given_up(misbehaving):
    async with misbehaving.client() as client, unharmed(misbehaving, client):
        await client.send({"type": "hangs"})
        error = await client.event("error")
        assert (error["code"], error["temporary"]) == ("plugin_failed", True)
        assert error["message"] == "the handler of `hangs` took longer than 0.02 s"


async def test_a_handlers_refusal_reaches_its_sender_alone(misbehaving):
    async with misbehaving.client() as client, unharmed(misbehaving, client):
        await client.send({"type": "declines", "ref": "r1"})
        assert await client.event("error") == {
            "type": "error",
            "code": "closed_today",
            "message": "not on a Sunday",
            "temporary": False,
            "ref": "r1",
        }
        await client.send({"type": "waits"})
        error = await client.event("error")
        assert (error["code"], error["temporary"], error["retry_after"]) == ("queue_full", True, 2.5)


async def test_a_handler_that_publishes_what_no_plugin_has_is_answered(misbehaving):
    async with misbehaving.client() as client, unharmed(misbehaving, client):
        await client.send({"type": "strays"})
        assert (await client.event("error"))["code"] == "unknown_type"


# -- what a person may not do to others


async def test_a_person_cannot_make_a_backends_event_look_published_already(node):
    async with node.client() as client, unharmed(node, client):
        await client.send({**CHAT, "message_id": "job-7-done"})
        await client.event("chat_message")
        await node.publish({**EVENT, "step_id": "s", "message_id": "job-7-done"})
        await node.publish({**EVENT, "step_id": "next"})
        assert (await client.event("step_started"))["step_id"] == "s"


async def test_a_person_cannot_demand_acknowledgement_or_set_what_the_router_sets(node):
    async with node.client() as client, unharmed(node, client):
        await client.send({**CHAT, "requires_ack": True, "message_id": "m1", "seq": 99, "pos": 99, "topic": "all"})
        got = await client.event("chat_message")
        assert (got["seq"], got.get("topic"), got.get("requires_ack"), got.get("pos")) == (1, None, None, None)


# -- requests


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "header"),
    [
        pytest.param("/ws/project/" + "p" * 9000, "X-A: 1", id="path"),
        pytest.param("/ws/project/p1?token=" + "x" * 9000, "X-A: 1", id="query"),
        pytest.param("/ws/project/p1", "Authorization: Bearer " + "x" * 9000, id="header"),
        pytest.param("/ws/project/p1", "Sec-WebSocket-Protocol: router.v1, bearer." + "x" * 9000, id="subprotocol"),
    ],
)
async def test_a_request_that_is_too_long_is_answered(standing, path, header):
    async with unharmed(standing), dial(standing.port) as raw:
        raw.write(upgrade(path, header))
        assert int((await raw.answer()).split()[1]) in (414, 431)
        assert b"x" * 100 not in await raw.rest()


async def test_a_since_that_makes_no_sense_is_answered_with_resync(node):
    for since in ("", "x" * 4000, "%00", "%ff%fe", "1", "-1:-1", "user:", "user:a:b", ",,,,,", "a:1:2.2.2,user:?"):
        async with node.client(since=since) as client, unharmed(node):
            assert client.welcome["recovered"] is False
            if since:
                assert (await client.frame())["type"] == "resync"


async def test_a_query_with_very_many_fields_is_not_taken_for_our_own_error(node, caplog):
    async with unharmed(node), dial(node.port) as raw:
        query = "&".join(f"a{i}=1" for i in range(30))
        raw.write(upgrade(f"/ws/project/p1?{query}", f"Authorization: Bearer {make_token()}"))
        assert int((await raw.answer()).split()[1]) < 500
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_frames_in_one_piece_with_the_close_are_all_taken(node):
    async with unharmed(node), raw_client(node) as raw, node.client(token=make_token("bob")) as listening:
        raw.write(frame(json.dumps(CHAT).encode()), frame((1000).to_bytes(2, "big"), 8))
        assert (await listening.event("chat_message"))["content"] == "hello"
        assert (await raw.closed())[0] == 1000
