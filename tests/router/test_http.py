"""Publishing, presence, health, metrics and the description of all messages, over HTTP to a real node."""

import json
import re
from collections.abc import AsyncIterator
from email.message import Message
from typing import Any

import httpx
import pytest
import pytest_asyncio
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.node import Client, Node, make_token, run_node

STARTED = {"type": "step_started", "step_id": "s", "timestamp": "t"}
CHAT = {"type": "chat_message", "role": "user", "content": "hello"}
SERVICE = ("publish",)
LIMIT = 256 * 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing() -> AsyncIterator[Node]:
    """A node that many tests use one after the other, each in a project of its own."""
    async with run_node() as running:
        yield running


def http(node: Node, token: str | None = make_token("backend", "*", SERVICE)) -> httpx.AsyncClient:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.AsyncClient(base_url=node.url, headers=headers)


def problem(response: httpx.Response) -> tuple[int, str, str]:
    """Status, code and detail of an RFC 9457 answer."""
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code
    assert set(body) == {"title", "status", "detail", "code"}
    return response.status_code, body["code"], body["detail"]


async def seen(client: Client, node: Node, project: str) -> list[dict[str, Any]]:
    """The steps that have reached `client`, up to an event that is published now."""
    await node.publish({**STARTED, "step_id": "now"}, project=project)
    got = await client.events(lambda event: event.get("step_id") == "now")
    return [event for event in got if event["type"].startswith("step_")][:-1]


# -- publishing


@pytest.mark.asyncio(loop_scope="module")
async def test_one_event_or_a_list_is_accepted_and_numbered(standing):
    async with http(standing) as backend, standing.client("h1") as client:
        one = await backend.post("/projects/h1/events", json=STARTED)
        assert (one.status_code, one.json()) == (202, {"seq": [1]})
        many = await backend.post("/projects/h1/events", json=[{**STARTED, "step_id": f"s{i}"} for i in range(3)])
        assert (many.status_code, many.json()) == (202, {"seq": [2, 3, 4]})
        assert [event["step_id"] for event in await seen(client, standing, "h1")] == ["s", "s0", "s1", "s2"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_publish_that_is_tried_again_with_its_idempotency_key_is_answered_as_before_and_delivered_once(
    standing,
):
    events = [{**STARTED, "step_id": "a"}, {**STARTED, "step_id": "b"}]
    async with http(standing) as backend, standing.client("h2") as client:
        answers = [
            (await backend.post("/projects/h2/events", json=events, headers={"Idempotency-Key": key})).json()
            for key in ("k1", "k1", "k2", "k1")
        ]
        assert answers == [{"seq": [1, 2]}, {"seq": [1, 2]}, {"seq": [3, 4]}, {"seq": [1, 2]}]
        assert [event["step_id"] for event in await seen(client, standing, "h2")] == ["a", "b", "a", "b"]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_same_key_in_another_project_is_another_publish(standing):
    async with http(standing) as backend:
        for project in ("h3a", "h3b"):
            response = await backend.post(
                f"/projects/{project}/events", json=STARTED, headers={"Idempotency-Key": "same"}
            )
            assert response.json() == {"seq": [1]}


@pytest.mark.parametrize(
    ("bad", "status", "code", "detail"),
    [
        ({**STARTED, "step_id": 5}, 400, "bad_message", "Expected `str`, got `int` - at `$.step_id`"),
        ({"type": "step_started"}, 400, "bad_message", "Object missing required field `step_id`"),
        ({"type": "nope"}, 400, "unknown_type", "there is no message type `nope` - at `$.type`"),
        ({"type": "welcome"}, 400, "unknown_type", "there is no message type `welcome` - at `$.type`"),
        (5, 400, "bad_message", "Expected `object`, got `int`"),
        (
            {**STARTED, "seq": 1},
            400,
            "bad_message",
            "the field `seq` is set by the router; use another name - at `$.seq`",
        ),
        (
            {**STARTED, "redelivered": None},
            400,
            "bad_message",
            "the field `redelivered` is set by the router; use another name - at `$.redelivered`",
        ),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_one_bad_event_in_a_list_is_named_by_its_index_and_none_is_published(standing, bad, status, code, detail):
    async with http(standing) as backend, standing.client("h4") as client:
        response = await backend.post("/projects/h4/events", json=[STARTED, STARTED, bad, STARTED])
        assert problem(response) == (status, code, f"event 2: {detail}")
        response = await backend.post("/projects/h4/events", json=bad)
        assert problem(response) == (status, code, detail)
        assert await seen(client, standing, "h4") == []


def of_size(size: int, **more: Any) -> dict[str, Any]:
    """An event of exactly `size` bytes of JSON."""
    event = {"type": "step_completed", "step_id": "s", "result": {"text": ""}, **more}
    event["result"]["text"] = "x" * (size - len(json.dumps(event)))
    assert len(json.dumps(event)) == size
    return event


@pytest.mark.asyncio(loop_scope="module")
async def test_an_event_over_256_kib_is_declined_with_what_to_do_instead(standing):
    async with http(standing) as backend, standing.client("h5") as client:
        body = json.dumps(of_size(LIMIT))
        assert (await backend.post("/projects/h5/events", content=body)).status_code == 202
        body = json.dumps([STARTED, of_size(LIMIT + 1)])
        status, code, detail = problem(await backend.post("/projects/h5/events", content=body))
        assert (status, code) == (413, "too_large")
        assert detail.endswith("may be 262144: store the data and send a reference to it")
        assert [event["type"] for event in await seen(client, standing, "h5")] == ["step_completed"]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_one_that_is_too_large_is_named_by_its_index(standing):
    async with http(standing) as backend:
        body = json.dumps([STARTED, of_size(LIMIT + 1)])
        assert problem(await backend.post("/projects/h6/events", content=body))[2].startswith("event 1: ")


@pytest.mark.asyncio(loop_scope="module")
async def test_none_is_published_either_when_one_becomes_too_large_by_the_id_it_is_given(standing):
    async with http(standing) as backend, standing.client("h7") as client:
        body = json.dumps([STARTED, of_size(LIMIT, requires_ack=True)])
        response = await backend.post("/projects/h7/events", content=body)
        published = await seen(client, standing, "h7")
        assert response.status_code == 202 or published == []


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "the body is not JSON: Input data was truncated"),
        (b"{", "the body is not JSON: Input data was truncated"),
        (b"hello", "the body is not JSON: "),
        (b'{"type":"step_started","step_id":"\xff"}', "not UTF-8"),
        (b'{"type":"step_started","step_id":"\\ud800"}', "the body is not JSON: "),
        (b'{"type":"step_started","step_id":"s"} {}', "the body is not JSON: "),
        (b"[" * 100_000, "the body is not JSON: "),
        (b'{"type":' + b"[" * 100_000, "the body is not JSON: "),
        (b"[]", "the body has 0 events; it may have 1 to 1000"),
        (
            b"[" + b",".join([json.dumps(STARTED).encode()] * 1001) + b"]",
            "the body has 1001 events; it may have 1 to 1000",
        ),
    ],
    ids=["empty", "half", "no JSON", "no UTF-8", "half a surrogate", "two", "deep", "deep in a field", "none", "1001"],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_body_that_is_no_event_is_declined(standing, body, detail):
    async with http(standing) as backend:
        status, code, said = problem(await backend.post("/projects/h8/events", content=body))
        assert (status, code) == (400, "bad_message")
        assert said.startswith(detail)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_body_over_16_mib_is_declined(standing):
    async with http(standing) as backend:
        assert (await backend.post("/projects/h8/events", content=b" " * (16 * 1024 * 1024 + 1))).status_code == 413


@pytest.mark.asyncio(loop_scope="module")
async def test_space_around_the_event_does_not_matter(standing):
    async with http(standing) as backend, standing.client("h9") as client:
        body = b" \n\t" + json.dumps(STARTED).encode() + b"\r\n "
        assert (await backend.post("/projects/h9/events", content=body)).status_code == 202
        assert await client.event("step_started") == {**STARTED, "seq": 1}


@pytest.mark.asyncio(loop_scope="module")
async def test_what_a_notification_refers_to_may_be_a_long_address(standing):
    event = {"type": "notification", "level": "info", "title": "Done", "ref": "https://app.example/" + "x" * 80}
    async with http(standing) as backend:
        assert (await backend.post("/projects/h10/events", json=event)).status_code == 202


# -- who may publish


@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (lambda: None, "token missing"),
        (lambda: "garbage", "token invalid: it is no JWT"),
        (lambda: make_token(exp=1), "token expired"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_without_a_valid_token_nothing_is_published(standing, make, detail):
    async with http(standing, make()) as backend:
        for path in ("/projects/p1/events", "/users/ada/events", "/events"):
            assert problem(await backend.post(path, json=STARTED)) == (401, "unauthorized", detail)
        for path in ("/projects/p1/presence", "/projects/p1/position"):
            assert problem(await backend.get(path)) == (401, "unauthorized", detail)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_token_in_the_query_or_in_basic_authorization_is_none(standing):
    async with http(standing, None) as backend:
        path = f"/projects/p1/events?token={make_token('backend', '*', SERVICE)}"
        assert (await backend.post(path, json=STARTED)).status_code == 401
        assert (await backend.post("/projects/p1/events", json=STARTED, auth=("a", "b"))).status_code == 401


@pytest.mark.asyncio(loop_scope="module")
async def test_publishing_needs_the_grant_on_that_project(standing):
    async with http(standing, make_token("backend", "mine", SERVICE)) as backend:
        assert (await backend.post("/projects/mine/events", json=STARTED)).status_code == 202
        denied = (403, "denied", "this needs the grant `publish` on this project")
        assert problem(await backend.post("/projects/other/events", json=STARTED)) == denied
    async with http(standing, make_token("ada", "mine", ("view", "chat", "edit"))) as person:
        assert problem(await person.post("/projects/mine/events", json=STARTED)) == denied


@pytest.mark.asyncio(loop_scope="module")
async def test_publishing_to_a_person_or_to_everybody_needs_the_grant_on_all_projects(standing):
    async with http(standing, make_token("backend", "mine", SERVICE)) as some, http(standing) as every:
        for path in ("/users/ada/events", "/events"):
            assert (await some.post(path, json=STARTED)).status_code == 403
            assert (await every.post(path, json=STARTED)).status_code == 202


@pytest.mark.asyncio(loop_scope="module")
async def test_an_impossible_project_is_404(standing):
    async with http(standing) as backend:
        for project in ("a%20b", "p" * 129, "%C3%A9"):
            status, code, _ = problem(await backend.post(f"/projects/{project}/events", json=STARTED))
            assert (status, code) == (404, "not_found")
            for what in ("presence", "position"):
                assert problem(await backend.get(f"/projects/{project}/{what}"))[0] == 404


# -- headers of tracing


@pytest.mark.asyncio(loop_scope="module")
async def test_a_trace_context_that_is_none_does_not_keep_an_event_from_being_published(standing):
    async with http(standing) as backend:
        for header in ("garbage", "00-" + "0" * 90):
            response = await backend.post("/projects/h11/events", json=STARTED, headers={"traceparent": header})
            assert response.status_code == 202


@pytest.mark.asyncio(loop_scope="module")
async def test_nor_does_a_very_long_one(standing):
    async with http(standing) as backend:
        response = await backend.post("/projects/h11/events", json=STARTED, headers={"traceparent": "0" * 200})
        assert response.status_code == 202


# -- presence


async def test_presence_tells_who_has_the_project_open_and_with_how_many_windows(node):
    async with http(node, make_token("ada", "p1", ("view",))) as person:
        assert (await person.get("/projects/p1/presence")).json() == {"users": []}
        async with node.client(), node.client(), node.client(token=make_token("grace")), node.client("p2"):
            assert (await person.get("/projects/p1/presence")).json() == {
                "users": [{"user_id": "ada", "connections": 2}, {"user_id": "grace", "connections": 1}]
            }
        assert problem(await person.get("/projects/p2/presence"))[:2] == (403, "denied")


# -- positions


async def test_a_position_is_told_to_who_may_see_or_publish_and_a_client_goes_on_from_it(node):
    before = await node.publish(STARTED)
    for grants in (("view",), SERVICE):
        async with http(node, make_token("ada", "p1", grants)) as asking:
            told = (await asking.get("/projects/p1/position")).json()
            assert told == {"epoch": told["epoch"], "pos": before[-1], "since": f"{told['epoch']}:{before[-1]}"}
            denied = (403, "denied", "this needs the grant `view` on this project")
            assert problem(await asking.get("/projects/p2/position")) == denied
    async with http(node, make_token("ada", "p1", ("chat",))) as other:
        assert problem(await other.get("/projects/p1/position")) == denied
    await node.publish({**STARTED, "step_id": "meanwhile"})
    async with node.client(since=told["since"]) as client, node.client(plain=True, since=told["since"]) as plain:
        assert client.welcome["recovered"] is True
        for each in (client, plain):
            assert (await each.event("step_started"))["step_id"] == "meanwhile"


async def test_the_position_of_a_project_where_nothing_happened_yet_is_one_to_go_on_from(node):
    async with http(node, make_token("ada", "*", ("view",))) as asking:
        told = (await asking.get("/projects/p1/position")).json()
    await node.publish(STARTED)
    async with node.client(since=told["since"]) as client:
        assert client.welcome["recovered"] is True
        assert (await client.event("step_started"))["seq"] == told["pos"] + 1 == 1


async def test_a_position_that_nobody_can_tell_is_unavailable(own_server):
    async with run_node(broker=own_server.url) as node, http(node) as backend:
        assert (await backend.get("/projects/p1/position")).status_code == 200
        own_server.kill()
        assert problem(await backend.get("/projects/p1/position"))[:2] == (503, "unavailable")


# -- what operators ask


async def test_a_node_lives_from_the_start_and_is_ready_while_its_broker_is(node):
    async with http(node, None) as operator:
        assert (await operator.get("/healthz")).text == "ok\n"
        async with node.client():
            ready = await operator.get("/readyz")
            assert (ready.status_code, ready.json()) == (200, {"ready": True, "connections": 1})
        await node.router.broker.stop()
        status, code, detail = problem(await operator.get("/readyz"))
        assert (status, code, detail) == (503, "unavailable", "the broker cannot be reached")
        assert (await operator.get("/healthz")).status_code == 200


class Figures:
    """What /metrics says."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        lines = re.findall(rf"^{name}(?:{{(.*?)}})? (\S+)$", self._text, re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for given, value in lines if all(each in given for each in wanted))


async def figures(operator: httpx.AsyncClient) -> Figures:
    return Figures((await operator.get("/metrics")).text)


async def test_the_five_figures_of_the_specification_are_counted(node):
    async with http(node, None) as operator:
        assert (await figures(operator))("router_connections") == 0
        async with node.client("p2") as first:
            since = f"{first.welcome['epoch']}:{first.welcome['pos']}"
        before = await figures(operator)
        async with node.client() as client, node.client("p2", since=since), node.client("p3", since="0"):
            await node.publish(STARTED)
            await client.event("step_started")
            await client.send(CHAT)
            await client.event("chat_message")
            await client.send({"type": "nope"})
            await client.event("error")
            during = await figures(operator)
            assert during("router_connections") == 3, "active connections"
            assert during("router_connects_total") - before("router_connects_total") == 3
            assert during("router_reconnects_total") == 1, "reconnection rate: those who name an earlier position"
            assert during("router_messages_total", leg="outbound", type="step_started", outcome="delivered") == 1
            assert during("router_messages_total", leg="inbound", type="chat_message", outcome="delivered") == 1
            assert during("router_errors_total", code="unknown_type") == 1, "error rate"
            assert during("router_publish_to_deliver_seconds_count") >= 2
            assert during("router_connection_duration_seconds_count") == 1
        while (after := await figures(operator))("router_connections"):
            pass
        assert after("router_connection_duration_seconds_count") == 4, "connection duration"


async def test_refusals_at_the_door_and_of_messages_are_counted_by_code(node):
    async with http(node, None) as operator, node.client(token=make_token(grants=("view",))) as client:
        for token in ("garbage", make_token(project="p2")):
            with pytest.raises(InvalidStatus):
                await connect(f"{node.url.replace('http', 'ws')}/ws/project/p1?token={token}")
        await client.send(CHAT)
        await client.event("error")
        now = await figures(operator)
        assert now("router_errors_total", code="4401") == 1
        assert now("router_errors_total", code="4403") == 1
        assert now("router_errors_total", code="denied") == 1
        assert now("router_messages_total", leg="inbound", type="chat_message", outcome="refused:denied") == 1


async def test_no_figure_is_by_project_or_person(node):
    async with http(node, None) as operator, node.client("a-project", token=make_token("a-person", "a-project")):
        text = (await operator.get("/metrics")).text
        assert "a-project" not in text
        assert "a-person" not in text


async def test_figures_are_in_prometheus_text_format(node):
    async with http(node, None) as operator:
        response = await operator.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4; charset=utf-8")
        assert "# TYPE router_connections gauge" in response.text
        assert "# TYPE router_messages_total counter" in response.text
        assert response.text.endswith("\n")


async def test_the_type_of_the_figures_names_its_charset_once(node):
    async with http(node, None) as operator:
        for path in ("/metrics", "/client/router.js"):
            kind = Message()
            kind["content-type"] = (await operator.get(path)).headers["content-type"]
            names = [name for name, _ in kind.get_params()]
            assert len(names) == len(set(names))


# -- what developers ask


async def test_every_message_is_described_with_all_its_fields(node):
    async with http(node, None) as developer:
        document = (await developer.get("/asyncapi.json")).json()
    assert document["asyncapi"] == "3.0.0"
    messages, schemas = document["components"]["messages"], document["components"]["schemas"]
    for found in node.router.catalog:
        message = messages[found.plugin.tag]
        assert message["name"] == found.plugin.tag
        fields = schemas[message["payload"]["$ref"].rpartition("/")[2]]["properties"]
        assert set(fields) == {"type", *found.plugin.event.__struct_fields__}
    assert {"step_started", "step_progress", "step_completed", "step_error"} <= set(messages)
    assert {"chat_message", "chat_response_chunk", "project_modified"} <= set(messages)
    assert {"welcome", "resync", "error", "goaway", "ping", "auth_refresh", "ack", "pong"} <= set(messages)
    sent = {each["$ref"].rpartition("/")[2] for each in document["operations"]["send"]["messages"]}
    assert "chat_message" in sent
    assert "step_completed" not in sent


async def test_the_frame_that_several_events_come_in_is_described(node):
    async with http(node, None) as developer:
        assert (await developer.get("/asyncapi.json")).json()["components"]["messages"]["batch"]


async def test_every_reference_in_the_description_leads_somewhere(node):
    async with http(node, None) as developer:
        text = (await developer.get("/asyncapi.json")).text
    document = json.loads(text)
    references = set(re.findall(r'"\$ref":"#/([^"]+)"', text))
    assert references
    for reference in references:
        place = document
        for step in reference.split("/"):
            place = place[step]


async def test_the_browser_client_is_served(node):
    async with http(node, None) as browser:
        response = await browser.get("/client/router.js")
        assert response.headers["content-type"].startswith("text/javascript")
        assert response.headers["cache-control"] == "no-cache"
        assert "export" in response.text
