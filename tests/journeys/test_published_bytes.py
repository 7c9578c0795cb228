"""No bytes that a browser cannot read go out, whichever way they came in, and whoever sent them is told."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from secrets import token_hex
from typing import Any

import httpx
import pytest
import redis.asyncio

from plugins.step import StepCompleted, StepStarted
from router import BadMessage
from router.backend import Backend
from router.wire import MAX_DEPTH
from tests.docs.javascript import find_node
from tests.node import Client, Node, make_token, run_node

PARTS = {
    "Latin-1": b'"K\xf6ln"',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "an overlong slash": b'"\xc0\xaf"',
    "half of a character": b'"\xe2\x82"',
    "beyond Unicode": b'"\xf4\x90\x80\x80"',
    "a name in Latin-1": b'{"K\xf6ln":1}',
    "deep inside": b'[{"a":[{"b":"\xff"}]}]',
    "a line feed": b'"a\nb"',
    "a tabulator": b'"a\tb"',
    "a zero": b'"\x00"',
    "an unknown escape": b'"\\x41"',
    "half an escape": b'"\\u12"',
    "half of a surrogate pair": b'"\\ud800"',
    "a number with a zero before it": b"01",
    "an exponent without digits": b"1e",
    "a fraction without digits": b"1.",
    "a plus": b"+1",
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "a number beyond all": b"1e400",
    "a whole number beyond all": b"1" * 5000,
    "half a literal": b"tru",
    "a literal and more": b"nullx",
    "single quotes": b"'a'",
    "a comment": b"1/**/",
    "a form feed": b"1\x0c",
    "a comma at the end": b"[1,]",
    "no end": b'[1,{"a":2}',
    "a name without quotes": b"{a:1}",
    "deeper than readers go": b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
    "deeper, in a value that another one replaces": b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH + b',"place":1',
}
WHOLE = {
    "a byte order mark": b'\xef\xbb\xbf{"type":"step_started","step_id":"bad"}',
    "UTF-16": '{"type":"step_started","step_id":"bad"}'.encode("utf-16"),
    "two objects": b'{"type":"step_started","step_id":"bad"}{}',
    "a zero behind it": b'{"type":"step_started","step_id":"bad"}\x00',
    "a position, in other letters": b'{"type":"step_started","step_id":"bad","\\u0070os":9}',
    "two ids": b'{"type":"step_started","step_id":"bad","message_id":"a","message_id":"b"}',
    "two ids, one in other letters": b'{"type":"step_started","step_id":"bad","message_id":"a","message_i\\u0064":null}',
    "marked and not marked": b'{"type":"step_started","step_id":"bad","requires_ack":true,"requires_ack":false}',
    "two types": b'{"type":"chat_message","type":"step_started","step_id":"bad"}',
}
BAD = {name: b'{"type":"step_started","step_id":"bad","place":%b}' % part for name, part in PARTS.items()} | WHOLE
every_bad_event = pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())

GOOD = [
    '{"type":"step_started","step_id":"good","place":"Köln \U0001f600 \u2028 \x7f"}',
    '{"type":"step_started","step_id":"good","place":"K\\u00f6ln \\ud83d\\ude00 \\/ \\b"}',
    '{"type":"step_started","step_id":"good","place":[-0, 0e1, 1E+2, 1e-400, 12345678901234567890123]}',
    '{"type":"step_started","step_id":"good","place":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}",
    '{"type":"step_started","step_id":"good","place":"' + "[" * 200 + '\\"{"}',
    '{"type":"step_started","step_id":"good","\\\\":"\\\\\\"' + "[" * 200 + '\\\\","place":"' + '{\\\\\\"' * 99 + '"}',
    '{"type":"step_started","step_id":"good","place":{"type":1,"message_id":2,"requires_ack":3}}',
    ' \t\r\n{"type" : "step_started" ,\n"step_id":"good"}\r\n ',
]
AFTER = {"type": "step_started", "step_id": "after"}


def is_after(event: dict[str, Any]) -> bool:
    return event.get("step_id") == "after"


@asynccontextmanager
async def nobody_notices(node: Node) -> AsyncIterator[tuple[Client, Client]]:
    """Two viewers who see what is published afterwards and nothing bad before, nor does who comes later."""
    async with node.client() as viewer, node.client(plain=True) as plain:
        yield viewer, plain
        await node.publish(AFTER)
        async with node.client(since="0") as late, node.client(plain=True, since="0") as late_and_plain:
            for client in (viewer, plain, late, late_and_plain):
                seen = await client.events(is_after)
                assert "bad" not in [event.get("step_id") for event in seen]


def backend(node: Node) -> httpx.AsyncClient:
    token = make_token("backend", "*", ("publish",))
    return httpx.AsyncClient(base_url=node.url, headers={"Authorization": f"Bearer {token}"})


@every_bad_event
async def test_over_http_it_is_refused_alone_and_in_a_list_and_nothing_is_published(node, bad):
    async with nobody_notices(node), backend(node) as http:
        for path in ("/projects/p1/events", "/users/ada/events", "/events"):
            for wait in ("", "?acknowledged=0.01"):
                for body in (bad, b"[%b]" % bad, b'[{"type":"step_started","step_id":"bad"},%b]' % bad):
                    answer = await http.post(path + wait, content=body)
                    assert (answer.status_code, answer.json()["code"]) == (400, "bad_message"), body[:80]


TEXTS = {name: text for name, text in BAD.items() if text.isascii() and b"\\u0070os" not in text}
"""What gets as far as us: the WebSocket itself ends what is no text, and of people's messages a handler drops names."""


@pytest.mark.parametrize("bad", TEXTS.values(), ids=TEXTS.keys())
async def test_what_people_send_is_refused_as_well(node, bad):
    text = bad.decode().replace("chat_message", "cancel").replace("step_started", "chat_message")
    text = text.replace("step_id", "content")
    async with nobody_notices(node), node.client() as client:
        await client.send(f'{{"role":"user",{text[1:]}')
        assert (await client.event("error"))["code"] == "bad_message"


async def publish_foreign(client: Any, event: bytes) -> None:
    """As a backend in another language publishes, with number and history."""
    script = client.register_script(files("router.brokers").joinpath("lua", "publish.lua").read_text())
    base = "router:{project:p1}"
    keys = [f"{base}:meta", f"{base}:log", f"{base}:meta"]
    await script(keys=keys, args=[b"{}\n" + event, token_hex(8), "PUBLISH", 1000, 300_000, 86_400_000, 1, 0])


@every_bad_event
async def test_through_redis_it_is_refused_by_us_and_of_others_it_reaches_nobody(redis_url, caplog, bad):
    async with (
        run_node(broker=redis_url) as node,
        Backend(redis_url) as ours,
        redis.asyncio.Redis.from_url(redis_url) as theirs,
        nobody_notices(node),
    ):
        with pytest.raises(BadMessage):
            await ours.publish_json("p1", b'{"type":"step_started","step_id":"bad"}', bad)
        await theirs.publish("project:p1", bad)
        await publish_foreign(theirs, bad)
    assert len([each for each in caplog.records if getattr(each, "event", "") == "unreadable"]) >= 2
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


async def test_what_a_backend_makes_in_python_is_held_to_the_same(redis_url):
    deep: Any = []
    for _ in range(MAX_DEPTH):
        deep = [deep]
    async with run_node(broker=redis_url) as node, Backend(redis_url) as ours, nobody_notices(node):
        for bad in (
            StepStarted(step_id="\ud800"),
            StepCompleted(step_id="bad", result={"deep": deep}),
            StepCompleted(step_id="bad", result={"\udfff": 1}),
        ):
            with pytest.raises(BadMessage):
                await ours.publish("p1", StepStarted(step_id="bad"), bad)


HALF = """
from router import Context, Event, Plugin, Policy

class Half(Event, frozen=True, tag="half"):
    way: str

async def cut(event: Half, context: Context) -> None:
    await getattr(context, event.way)(Half(way="bad \\ud800"))

half = Plugin(Half, Policy(send="view"), cut)
"""


@pytest.mark.parametrize("way", ["reply", "publish", "forward"])
async def test_what_a_handler_makes_is_held_to_the_same(tmp_path, way):
    (tmp_path / "half.py").write_text(HALF)
    async with run_node(plugins=(str(tmp_path),)) as node, nobody_notices(node), node.client() as client:
        await client.send({"type": "half", "way": way})
        assert (await client.event("error"))["code"] == "bad_message"


MERGING = """
from router import Event, Merge, Plugin, Policy

class Change(Event, frozen=True, tag="change"):
    what: object

def half(pending: Change, new: Change) -> Change:
    return Change(what="bad \\ud800" if new.what == "half" else object())

change = Plugin(Change, Policy(deliver=Merge(half, every=0.02)))
"""


@pytest.mark.parametrize("what", ["half", "nothing"])
async def test_a_merge_that_makes_what_cannot_be_written_costs_its_own_event_alone(tmp_path, caplog, what):
    (tmp_path / "merging.py").write_text(MERGING)
    change = {"type": "change", "what": what}
    async with run_node(plugins=(str(tmp_path),)) as node, node.client() as viewer, node.client(plain=True) as plain:
        await node.publish(change, change, change)
        for client in (viewer, plain):
            assert (await client.event("change"))["what"] == what  # the first goes at once
        async with httpx.AsyncClient(base_url=node.url) as http, asyncio.timeout(10):
            while 'router_errors_total{code="plugin_failed"} 1.0' not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.01)
        await node.publish(AFTER)
        for client in (viewer, plain):
            await client.events(is_after)
    assert [each.getMessage() for each in caplog.records if getattr(each, "event", "") == "plugin_failed"]


@pytest.mark.parametrize("good", GOOD, ids=range(len(GOOD)))
async def test_what_is_right_arrives_as_it_was_written_by_each_way(redis_url, good):
    written = good.strip()
    async with (
        run_node(broker=redis_url) as node,
        Backend(redis_url) as ours,
        redis.asyncio.Redis.from_url(redis_url) as theirs,
        backend(node) as http,
        node.client() as viewer,
        node.client(plain=True) as plain,
    ):
        assert (await http.post("/projects/p1/events", content=good.encode())).status_code == 202
        await ours.publish_json("p1", good)
        await theirs.publish("project:p1", good)
        await publish_foreign(theirs, good.encode())
        for _ in range(4):
            assert await plain.connection.recv() == written
            assert (await viewer.event("step_started"))["step_id"] == "good"


async def test_a_header_that_cannot_be_read_is_logged_and_the_next_event_arrives(redis_url, caplog):
    async with (
        run_node(broker=redis_url) as node,
        redis.asyncio.Redis.from_url(redis_url) as theirs,
        nobody_notices(node),
    ):
        script = theirs.register_script(files("router.brokers").joinpath("lua", "publish.lua").read_text())
        base = "router:{project:p1}"
        for header in (b'{"id":"K\xf6ln"}', b'{"x":' + b"[" * 100_000, b'{"holding":["\xff"]}'):
            text = header + b'\n{"type":"step_started","step_id":"bad"}'
            args = [text, token_hex(8), "PUBLISH", 1000, 300_000, 86_400_000, 1, 0]
            await script(keys=[f"{base}:meta", f"{base}:log", f"{base}:meta"], args=args)
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_javascript_reads_all_that_is_taken_here():
    """The good ones, by the JSON.parse that browsers have."""
    script = "for (const text of JSON.parse(require('fs').readFileSync(0))) JSON.parse(text);"
    subprocess.run([find_node(), "-e", script], input=json.dumps(GOOD).encode(), check=True, timeout=30)
