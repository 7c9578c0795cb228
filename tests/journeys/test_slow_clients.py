"""No client delays another, and whoever comes back has lost nothing."""

import asyncio
import socket

from tests.node import make_token, run_node

PART = {"type": "step_started", "from": "x" * 16_000}
COUNT = 400


async def publish_much(node):
    """Six megabytes: more than every buffer on the way together."""
    for start in range(0, COUNT, 20):
        await node.publish(*({**PART, "step_id": str(i)} for i in range(start, start + 20)))


def small_buffers():
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    return made


async def steps(client):
    seen = []
    while not seen or seen[-1] != str(COUNT - 1):
        seen.append((await client.event("step_started"))["step_id"])
    return seen


async def slow_socket(node):
    sock = small_buffers()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", node.port))
    return sock


async def test_a_client_that_stops_reading_delays_nobody_and_gets_everything_when_it_reads_again(node):
    expected = [str(i) for i in range(COUNT)]
    for plain in (False, True):
        async with (
            node.client(f"p{plain}") as quick,
            node.client(f"p{plain}", plain=plain, sock=await slow_socket(node), max_queue=1) as stuck,
        ):
            reading = asyncio.create_task(steps(quick))
            for start in range(0, COUNT, 20):
                events = ({**PART, "step_id": str(i)} for i in range(start, start + 20))
                await node.publish(*events, project=f"p{plain}")
            assert await reading == expected
            assert len(node.router.hub.slow) == 1
            backlog = max(node.router.hub.port(s).backlog() for s in node.router.hub)
            assert backlog < 1_000_000, "what waits for one client is bounded"
            assert await steps(stuck) == expected
            await node.publish({**PART, "step_id": "live"}, project=f"p{plain}")
            assert (await stuck.event("step_started"))["step_id"] == "live"


async def test_a_client_that_never_reads_again_is_cut_at_the_deadline_and_can_resume():
    async with run_node(slow_deadline=0.5) as node, node.client() as quick:
        async with node.client(sock=await slow_socket(node), max_queue=1, token=make_token("grace")) as stuck:
            await publish_much(node)
            await steps(quick)
            while len(node.router.hub) > 1:
                await asyncio.sleep(0.01)
            epoch = stuck.welcome["epoch"]
        async with node.client(since=f"{epoch}:0", token=make_token("grace")) as back:
            assert back.welcome["recovered"] is True
            assert await steps(back) == [str(i) for i in range(COUNT)]


async def test_one_that_reads_little_by_little_is_cut_too_while_others_see_everything():
    async with run_node(slow_deadline=0.5) as node, node.client() as quick:
        reader, writer = await asyncio.open_connection(sock=await slow_socket(node), limit=1024)
        writer.write(
            b"GET /ws/project/p1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Authorization: Bearer %b\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"Sec-WebSocket-Version: 13\r\n\r\n" % make_token().encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        while len(node.router.hub) < 2:
            await asyncio.sleep(0)
        reading = asyncio.create_task(steps(quick))
        await publish_much(node)
        assert await reading == [str(i) for i in range(COUNT)]
        while len(node.router.hub) > 1:
            try:
                await reader.read(1)
            except ConnectionResetError:
                break
            await asyncio.sleep(0.01)
        writer.close()
