"""A client that speaks no `router.v1` gets events, `ping` and `error`, and a critical event once unless it acknowledges."""

import asyncio
import time

import httpx
import pytest

from plugins.step import StepCompleted
from router import Publisher, wire
from router.brokers.base import Position
from tests.node import Client, Node, make_token, run_node

CRITICAL = {"type": "step_completed", "step_id": "step_123", "requires_ack": True, "message_id": "msg_789"}
AFTER = {"type": "step_started", "step_id": "after"}
SERVERS = pytest.mark.parametrize("protocol", [None, "websockets-sansio"], ids=["ours", "another"])


async def repeated(client: Client, times: int) -> None:
    """A client that never acknowledges either, but speaks router.v1, has been sent it again so often."""
    await client.events(lambda event: event["type"] == "step_completed" and "redelivered" not in event)
    for _ in range(times):
        assert (await client.event("step_completed"))["redelivered"] is True


async def until_after(client: Client) -> list[dict[str, object]]:
    return (await client.events(lambda event: event.get("step_id") == "after"))[:-1]


@SERVERS
async def test_who_has_never_acknowledged_anything_is_not_sent_a_critical_event_again(protocol):
    async with (
        run_node(protocol=protocol, ack_after=0.05) as node,
        node.client(token=make_token("grace")) as modern,
        node.client(plain=True) as plain,
    ):
        await node.publish(CRITICAL)
        await repeated(modern, 3)
        await node.publish(AFTER)
        assert await until_after(plain) == [CRITICAL]


async def test_who_acknowledges_takes_part():
    async with run_node(ack_after=0.05) as node, node.client(plain=True) as plain:
        await node.publish(CRITICAL)
        assert await plain.frame() == CRITICAL
        await plain.send({"type": "ack", "message_id": "msg_789"})
        second = {**CRITICAL, "message_id": "msg_790"}
        await node.publish(second)
        for _ in range(3):
            assert await plain.frame() == second
        await plain.send({"type": "ack", "message_id": "msg_790"})
        await node.publish(AFTER)
        assert {each["message_id"] for each in await until_after(plain)} <= {"msg_790"}


async def test_what_a_plain_client_leaves_unacknowledged_is_given_up_counted_and_audited(tmp_path):
    audit = tmp_path / "audit.jsonl"
    async with run_node(ack_after=0.01, audit=str(audit)) as node, node.client(plain=True) as plain:
        await node.publish(CRITICAL)
        assert await plain.frame() == CRITICAL
        async with httpx.AsyncClient(base_url=node.url) as http, asyncio.timeout(20):
            while "router_unacknowledged_total 1.0" not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.05)
        await node.publish(AFTER)
        assert await until_after(plain) == []
    assert "unacknowledged" in audit.read_text()


async def test_a_receipt_counts_a_plain_client_that_acknowledges(node):
    async with (
        node.client(plain=True) as plain,
        node.client(plain=True, token=make_token("grace")),
        Publisher(node.url, make_token("backend", "*", ("publish",))) as publisher,
    ):
        asked = asyncio.create_task(publisher.publish("p1", StepCompleted(step_id="s"), acknowledged=0.5))
        await plain.send({"type": "ack", "message_id": (await plain.frame())["message_id"]})
        told = await asked
        assert (told.acknowledged, told.missing) == (["ada"], ["grace"])


def frames() -> dict[str, wire.Frame]:
    """One of each frame that there is."""
    return {
        "welcome": wire.Welcome(
            session_id="s",
            epoch="e",
            pos=0,
            user=wire.Place("e", 0),
            all=wire.Place("e", 0),
            recovered=False,
            expires_in=None,
            ping_every=30.0,
        ),
        "batch": wire.Batch(events=[]),
        "resync": wire.Resync(epoch="e", pos=0, reason="because"),
        "epoch": wire.Epoch("e"),
        "token_expiring": wire.TokenExpiring(30.0),
        "token_refreshed": wire.TokenRefreshed(600.0),
        "error": wire.Error("code", "message", temporary=False),
        "goaway": wire.GoAway(1.0, "restarting"),
        "ping": wire.Ping(),
    }


def test_each_frame_that_there_is_is_among_those_that_are_tried():
    assert set(frames()) == {kind.__struct_config__.tag for kind in wire.Frame.__subclasses__()}


@SERVERS
async def test_no_frame_reaches_a_plain_client_but_events_pings_and_errors(protocol):
    async with run_node(protocol=protocol) as node, node.client(plain=True) as plain:
        [session] = node.router.hub
        for frame in frames().values():
            node.router.hub.say(session, wire.encode(frame))
        await node.publish(AFTER)
        assert [each["type"] for each in await until_after(plain)] == ["error", "ping"]


@SERVERS
async def test_in_a_whole_life_a_plain_client_is_told_nothing_else(protocol):
    soon = int(time.time()) + 20  # so soon that a new token is asked for at once
    async with (
        run_node(protocol=protocol, ping_every=1.0, drain=0.01) as node,
        node.client(token=make_token("grace", exp=soon)) as modern,
        node.client(plain=True, token=make_token(exp=soon), since="0") as plain,
    ):
        await modern.event("token_expiring")
        for client, user in ((modern, "grace"), (plain, "ada")):
            await client.send({"type": "auth_refresh", "token": make_token(user)})
            await client.send({"type": "nope"})
        await modern.event("token_refreshed")
        await lose_numbering(node)
        await modern.event("resync")
        await modern.event("ping")
        for session in list(node.router.hub):
            await node.publish({"type": "step_started", "step_id": session.id}, {**AFTER, "step_id": "batched"})
        if protocol is None:  # another server does not tell of its shutdown
            for session in list(node.router.hub):
                node.router.hub.port(session)._transport.on_shutdown()
            await modern.event("goaway")
        await node.publish(AFTER)
        assert {event["type"] for event in await until_after(plain)} <= {"step_started", "ping", "error"}


async def lose_numbering(node: Node) -> None:
    """As a broker that lost the thread says it."""
    node.router._lost("project:p1", Position("another", 0))
