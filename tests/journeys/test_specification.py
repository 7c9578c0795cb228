"""Every message that the specification shows passes as it is printed, by every way in, to every kind of client."""

import json
from typing import Any

import httpx
import pytest
import redis.asyncio

from router.backend import Backend
from tests.node import Client, Node, make_token, run_node

PRINTED = {
    "step started": '{ "type": "step_started", "step_id": "step_123", "timestamp": "2024-10-21T10:00:00Z"}',
    "step progress": (
        '{ "type": "step_progress", "step_id": "step_123", "progress": 0.45, "message": "Processing chunk 45/100"}'
    ),
    "step completed": (
        '{ "type": "step_completed", "step_id": "step_123", "result": { "row_count": 1500, '
        '"columns": ["id", "name", "value"] }, "timestamp": "2024-10-21T10:01:23Z"}'
    ),
    "step error": (
        '{ "type": "step_error", "step_id": "step_123", "error": "Database connection failed", '
        '"timestamp": "2024-10-21T10:00:45Z"}'
    ),
    "chat message": (
        '{ "type": "chat_message", "role": "user", "content": "Show me top customers by revenue", '
        '"timestamp": "2024-10-21T10:00:00Z"}'
    ),
    "a piece of an answer": '{ "type": "chat_response_chunk", "content": "Here are ", "is_complete": false}',
    "its last piece": '{ "type": "chat_response_chunk", "content": "the top customers...", "is_complete": true}',
    "project modified": (
        '{ "type": "project_modified", "user_id": "user_456", "changes": { "steps_added": ["step_789"], '
        '"steps_removed": [], "dataflows_added": [] }, "timestamp": "2024-10-21T10:00:00Z"}'
    ),
    # as `publish_step_completed` writes it: `isoformat()` has no `Z`
    "what its backend publishes": (
        '{"type": "step_completed", "step_id": "step_123", "result": {}, "timestamp": "2024-10-21T10:01:23.123456"}'
    ),
    "a critical message": (
        '{ "type": "step_completed", "step_id": "step_123", "requires_ack": true, "message_id": "msg_789"}'
    ),
}
SENT = ("chat message", "project modified")
"""Those that people send."""
every_sample = pytest.mark.parametrize("printed", PRINTED.values(), ids=PRINTED.keys())


async def arrives_as_printed(printed: str, modern: Client, plain: Client) -> None:
    """Bytes for bytes for the one; with nothing but the router's own fields added for the other."""
    assert await plain.connection.recv() == printed
    found = await modern.event(json.loads(printed)["type"])
    added = {name: found.pop(name, None) for name in ("seq", "pos", "topic")}
    assert found == json.loads(printed)
    assert added["topic"] is None


async def over_http(node: Node, printed: str, modern: Client, plain: Client) -> None:
    headers = {"Authorization": f"Bearer {make_token('backend', '*', ('publish',))}"}
    async with httpx.AsyncClient(base_url=node.url, headers=headers) as http:
        answer = await http.post("/projects/p1/events", content=printed)
        assert answer.status_code == 202, answer.text
    await arrives_as_printed(printed, modern, plain)


@every_sample
async def test_over_http(node, printed):
    async with node.client() as modern, node.client(plain=True) as plain:
        await over_http(node, printed, modern, plain)


@every_sample
async def test_over_http_with_a_redis_between(redis_url, printed):
    async with run_node(broker=redis_url) as node, node.client() as modern, node.client(plain=True) as plain:
        await over_http(node, printed, modern, plain)


@every_sample
async def test_by_the_backends_own_library(redis_url, printed):
    async with (
        run_node(broker=redis_url) as node,
        node.client() as modern,
        node.client(plain=True) as plain,
        Backend(redis_url) as backend,
    ):
        await backend.publish_json("p1", printed)
        await arrives_as_printed(printed, modern, plain)


@every_sample
async def test_by_publish_alone(redis_url, printed):
    async with (
        run_node(broker=redis_url) as node,
        node.client() as modern,
        node.client(plain=True) as plain,
        redis.asyncio.Redis.from_url(redis_url) as backend,
    ):
        await backend.publish("project:p1", printed)
        await arrives_as_printed(printed, modern, plain)


@every_sample
async def test_all_of_them_come_again_from_history(node, printed):
    async with node.client() as modern, node.client(plain=True) as plain:
        await over_http(node, printed, modern, plain)
    async with node.client(since="0") as modern, node.client(plain=True, since="0") as plain:
        assert await plain.connection.recv() == printed
        found = await modern.event(json.loads(printed)["type"])
        assert {**json.loads(printed), **found} == found


@pytest.mark.parametrize("name", SENT)
@pytest.mark.parametrize("broker", ["memory", "redis"])
async def test_what_people_send_says_besides_who_they_are(request, broker, name):
    url = "memory://" if broker == "memory" else request.getfixturevalue("redis_url")
    sample: dict[str, Any] = json.loads(PRINTED[name])
    async with run_node(broker=url) as node, node.client() as modern, node.client(plain=True) as plain:
        for sender in (modern, plain):
            await sender.send(PRINTED[name])
            assert await plain.frame() == {**sample, "user_id": "ada"}
            found = await modern.event(sample["type"])
            assert {**found, **sample, "user_id": "ada"} == found


@pytest.mark.parametrize("name", sorted(set(PRINTED) - set(SENT)))
async def test_what_people_may_not_send_is_denied_not_called_wrong(node, name):
    async with node.client() as client:
        await client.send(PRINTED[name])
        assert (await client.event("error"))["code"] == "denied"
