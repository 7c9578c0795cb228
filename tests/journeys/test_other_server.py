"""Under an ASGI server that is not ours everything works through plain `send`."""

import asyncio
import socket

import pytest
from websockets.exceptions import InvalidStatus

from tests.journeys.test_publish import SPECIFIED
from tests.node import make_token, run_node


async def test_events_replies_errors_and_resuming_work_through_plain_send():
    async with run_node(protocol="websockets-sansio") as node:
        async with node.client() as modern, node.client(plain=True) as plain:
            for event in SPECIFIED:
                await node.publish(event)
                assert await plain.frame() == event
            epoch = modern.welcome["epoch"]
            last = (await modern.events(lambda event: event["type"] == "project_modified"))[-1]
            await modern.send({"type": "nope", "ref": "r"})
            refused = await modern.event("error")
            assert (refused["code"], refused["ref"]) == ("unknown_type", "r")
            await modern.send({"type": "chat_message", "role": "user", "content": "hi"})
            assert (await plain.frame())["content"] == "hi"
        async with node.client(since=f"{epoch}:{last['seq']}") as again:
            assert again.welcome["recovered"] is True
            assert (await again.event("chat_message"))["content"] == "hi"


async def test_a_client_that_stops_reading_is_cut_there_too():
    async with run_node(protocol="websockets-sansio", slow_deadline=0.2) as node, node.client() as quick:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", node.port))
        async with node.client(sock=made, max_queue=1, token=make_token("grace")):
            for start in range(0, 400, 10):
                part = range(start, start + 10)
                await node.publish(*({"type": "step_started", "step_id": str(i), "from": "x" * 16_000} for i in part))
                await quick.events(lambda event, last=str(part[-1]): event.get("step_id") == last)
            async with asyncio.timeout(20):
                while len(node.router.hub) > 1:
                    await asyncio.sleep(0.01)


async def test_a_refused_handshake_ends_there_too():
    async with run_node(protocol="websockets-sansio") as node:
        with pytest.raises(InvalidStatus, match="401"):
            async with node.client(token="nonsense"):
                pass
