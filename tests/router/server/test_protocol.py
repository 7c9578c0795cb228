"""What the gateway relies on in uvicorn's protocol class, and what ours adds. When uvicorn changes, this tells."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from plugins.step import StepStarted, step_started
from router.errors import CloseCode
from router.port import EXTENSION
from router.server.serve import config, listen
from router.testing import envelope
from router.wire import text_frame
from tests.node import make_token, run_node
from tests.router.server.raw import BINARY, CLOSE, PING, PONG, TEXT, dial, frame, head, until, upgrade

Application = Callable[[Any, Any, Any], Any]
SIZES = (0, 1, 125, 126, 127, 65535, 65536, 300_000)


@asynccontextmanager
async def serving(application: Application, **settings: Any) -> AsyncIterator[SimpleNamespace]:
    """A server as `router serve` configures it, in this loop, with `application` behind its WebSockets."""

    async def whole(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await application(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
            await send({"type": "http.response.body", "body": b"here"})
        else:
            for _ in range(2):
                await send({"type": (await receive())["type"] + ".complete"})

    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(config(whole, **{"max_message": 64 * 1024, "drain": 0.0, **settings}))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup(sockets=[listener])
    port, state = listener.getsockname()[1], server.server_state
    try:
        yield SimpleNamespace(
            port=port, url=f"ws://127.0.0.1:{port}/", connections=state.connections, tasks=state.tasks
        )
    finally:
        # As uvicorn does it, without its pauses of a tenth of a second.
        for task in state.tasks:
            task.cancel()
        for connection in list(state.connections):
            connection.transport.abort()
        await until(lambda: not state.connections and not state.tasks)
        await server.lifespan.shutdown()
        for each in server.servers:
            each.close()
            await each.wait_closed()
        listener.close()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


class Held:
    """An application that accepts one connection, shows its protocol object, and keeps what it receives."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.opened = asyncio.Event()
        self.gone = asyncio.Event()
        self.protocol: Any = None
        self.send: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.protocol, self.send = scope["extensions"][EXTENSION], send
        await send({"type": "websocket.accept"})
        self.opened.set()
        while not self.gone.is_set():
            self.received.append(await receive())
            if self.received[-1]["type"] == "websocket.disconnect":
                self.gone.set()


@pytest.fixture
def held() -> Held:
    return Held()


# -- messages


async def test_messages_of_every_frame_size_come_and_go_whole():
    async with serving(echo, max_message=1 << 20) as here, connect(here.url, compression=None) as client:
        for size in SIZES:
            for message in ("é" * (size // 2) + "x" * (size % 2), b"b" * size):
                await client.send(message)
                assert await client.recv() == message


async def test_frames_written_past_asgi_arrive_as_messages_in_order_with_those_sent_through_it(held):
    async with serving(held) as here, connect(here.url, compression=None, max_size=None) as client:
        await held.opened.wait()
        write = held.protocol.start()
        for size in SIZES:
            write(text_frame(b"w" * size))
            await held.send({"type": "websocket.send", "text": f"after {size}"})
            assert await client.recv() == "w" * size
            assert await client.recv() == f"after {size}"


async def test_a_fragmented_message_arrives_as_one_and_a_ping_between_its_parts_is_answered(held):
    async with serving(held) as here, dial(here.port, upgrade()) as raw:
        raw.write(frame(b"to", fin=False), frame(b"now", PING), frame(b"get", 0, fin=False), frame(b"her", 0))
        assert await raw.frame() == (PONG, b"now")
        await until(lambda: held.received)
        assert held.received == [{"type": "websocket.receive", "text": "together"}]


async def test_messages_keep_their_order():
    async with serving(echo) as here, connect(here.url, compression=None) as client:
        for number in range(300):
            await client.send(str(number))
        assert [await client.recv() for _ in range(300)] == [str(number) for number in range(300)]


async def test_a_message_that_comes_byte_by_byte_arrives_whole(held):
    async with serving(held) as here, dial(here.port, upgrade()):
        await held.opened.wait()
        for byte in frame(b"hello"):
            held.protocol.data_received(bytes([byte]))
        await until(lambda: held.received)
        assert held.received == [{"type": "websocket.receive", "text": "hello"}]


async def test_a_connection_that_served_http_can_still_become_a_websocket():
    async with serving(echo) as here, dial(here.port) as raw:
        raw.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert (await raw.answer()).startswith("HTTP/1.1 200 ")
        assert await raw.reader.readexactly(4) == b"here"
        raw.write(upgrade())
        assert (await raw.answer()).startswith("HTTP/1.1 101 ")
        raw.write(frame(b"hello"))
        assert await raw.frame() == (TEXT, b"hello")


async def test_no_extension_is_agreed_on_even_when_offered_so_that_frames_can_be_shared():
    async with serving(echo) as here, connect(here.url, compression="deflate") as client:
        assert "Sec-WebSocket-Extensions" in client.request.headers
        assert "Sec-WebSocket-Extensions" not in client.response.headers


async def test_bytes_from_the_client_are_noted_as_a_sign_of_life(held):
    async with serving(held) as here, dial(here.port, upgrade()) as raw:
        await held.opened.wait()
        assert held.protocol.heard_at > 0
        held.protocol.heard_at = 0.0
        raw.write(frame(b"", PONG))
        await until(lambda: held.protocol.heard_at)
        assert held.protocol.heard_at <= asyncio.get_running_loop().time()


# -- handshake


async def test_subprotocol_and_headers_of_the_application_reach_the_client():
    async def application(scope: Any, receive: Any, send: Any) -> None:
        assert scope["subprotocols"] == ["router.v1", "bearer.x"]
        await send({"type": "websocket.accept", "subprotocol": "router.v1", "headers": [(b"x-a", b"1")]})
        await receive()

    async with serving(application) as here:
        offered: Any = ["router.v1", "bearer.x"]
        async with connect(here.url, compression=None, subprotocols=offered) as client:
            assert client.subprotocol == "router.v1"
            assert client.response.headers["x-a"] == "1"


async def test_a_close_before_accept_is_http_403():
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.close", "code": 4401})

    async with serving(application) as here:
        with pytest.raises(InvalidStatus) as refused:
            await connect(here.url)
        assert refused.value.response.status_code == 403


async def test_a_refusal_arrives_with_status_headers_and_body_and_is_no_error_in_the_log(caplog):
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.http.response.start", "status": 429, "headers": [(b"retry-after", b"3")]})
        await send({"type": "websocket.http.response.body", "body": b"slow ", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"down"})

    async with serving(application) as here:
        with pytest.raises(InvalidStatus) as refused:
            await connect(here.url)
        await until(lambda: not here.tasks)
        response = refused.value.response
        assert (response.status_code, response.headers["retry-after"], response.body) == (429, "3", b"slow down")
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_an_application_that_breaks_is_http_500_before_and_a_lost_connection_after_the_handshake(caplog):
    caplog.set_level(logging.CRITICAL)

    async def before(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    async def after(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        raise ZeroDivisionError

    async with serving(before) as here:
        with pytest.raises(InvalidStatus) as refused:
            await connect(here.url)
        assert refused.value.response.status_code == 500
    async with serving(after) as here, connect(here.url) as client:
        with pytest.raises(ConnectionClosed) as lost:
            await client.recv()
        assert lost.value.rcvd is None
        assert (await client.wait_closed()) is None
        await until(lambda: not here.connections)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(upgrade("/" + "x" * 9000), 414, id="path"),
        pytest.param(upgrade("/?token=" + "x" * 9000), 414, id="query"),
        pytest.param(upgrade("/", "X-Long: " + "x" * 9000), None, id="header"),
        pytest.param(upgrade("/", *(f"X-{i}: 1" for i in range(200))), None, id="200 headers"),
    ],
)
async def test_a_request_that_is_too_long_is_answered_and_let_go(request_, status):
    async with serving(echo) as here, dial(here.port) as raw:
        raw.write(request_)
        answer = await raw.answer()
        assert int(answer.split()[1]) in ((status,) if status else (414, 431))
        size = next(int(line.split(":")[1]) for line in answer.lower().split("\r\n") if "content-length" in line)
        assert len(await raw.rest()) == size
        await until(lambda: not here.connections)


async def test_a_request_of_just_under_8_kib_is_served():
    async with serving(echo) as here, connect(f"{here.url}?{'x' * 8000}", compression=None) as client:
        await client.send("hello")
        assert await client.recv() == "hello"


async def test_a_request_that_is_no_websocket_handshake_is_refused():
    async with serving(echo) as here, dial(here.port) as raw:
        raw.write(upgrade().replace(b"dGhlIHNhbXBsZSBub25jZQ==", b"short"))
        assert (await raw.answer()).startswith("HTTP/1.1 400 ")
        await raw.rest()
        await until(lambda: not here.connections)


# -- the end of a connection


async def test_the_clients_close_reaches_the_application_and_is_answered(held):
    async with serving(held) as here, connect(here.url) as client:
        await client.close(4002, "done")
        assert client.close_code == 4002
        await held.gone.wait()
        assert held.received == [{"type": "websocket.disconnect", "code": 4002, "reason": "done"}]


async def test_the_applications_close_reaches_the_client_and_the_application(held):
    async with serving(held) as here, connect(here.url) as client:
        await held.opened.wait()
        await held.send({"type": "websocket.close", "code": 4001, "reason": "bye"})
        await client.wait_closed()
        assert (client.close_code, client.close_reason) == (4001, "bye")
        await held.gone.wait()


async def test_a_client_that_vanishes_is_a_disconnect_for_the_application(held):
    async with serving(held) as here, connect(here.url) as client:
        await held.opened.wait()
        client.transport.abort()
        await held.gone.wait()
        await until(lambda: not here.connections)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(frame(b"\xc3\x28"), 1007, id="not UTF-8"),
        pytest.param(frame(b"\xed\xa0\x80"), 1007, id="a surrogate in UTF-8"),
        pytest.param(frame(b"ok \xf0\x9f", fin=False) + frame(b"\x28\x82", 0), 1007, id="not UTF-8 in the second part"),
        pytest.param(head(5, masked=False) + b"hello", 1002, id="unmasked"),
        pytest.param(frame(b"a", rsv=4), 1002, id="reserved bit"),
        pytest.param(frame(b"a", 3), 1002, id="reserved opcode"),
        pytest.param(frame(b"a", 0), 1002, id="continuation of nothing"),
        pytest.param(frame(b"a", fin=False) + frame(b"b"), 1002, id="message within a message"),
        pytest.param(frame(b"a" * 126, PING), 1002, id="long ping"),
        pytest.param(frame(b"a", PING, fin=False), 1002, id="fragmented ping"),
        pytest.param(frame(b"\x03", CLOSE), 1002, id="half a close code"),
        pytest.param(frame((1005).to_bytes(2, "big"), CLOSE), 1002, id="close code that may not be sent"),
        pytest.param(head(2**63 - 1), 1009, id="says it is enormous"),
        pytest.param(frame(b"a" * 40_000, fin=False) + frame(b"a" * 40_000, 0), 1009, id="too big in parts"),
        pytest.param(frame(b"a" * 65_537, BINARY), 1009, id="one byte too big"),
    ],
)
async def test_a_frame_that_breaks_the_rules_ends_its_connection_with_the_right_code_and_no_other(
    held, caplog, data, code
):
    caplog.set_level(logging.CRITICAL)
    async with serving(held) as here, dial(here.port, upgrade()) as raw:
        raw.write(data)
        assert (await raw.closed())[0] == code
        await held.gone.wait()
        assert held.received[-1]["code"] == code
        async with connect(here.url):
            pass


async def test_end_says_why_once_and_tells_the_application(held):
    async with serving(held) as here, connect(here.url) as client:
        await held.opened.wait()
        held.protocol.end(CloseCode.ENDED_ELSEWHERE, "é" * 200)
        held.protocol.end(CloseCode.INTERNAL_ERROR, "again")
        await client.wait_closed()
        assert (client.close_code, client.close_reason) == (4409, "é" * 61)
        await held.gone.wait()
        assert held.received == [{"type": "websocket.disconnect", "code": 4409, "reason": "é" * 61}]


async def test_end_lets_go_of_a_client_that_does_not_answer_it(held):
    async with serving(held) as here, dial(here.port, upgrade()) as raw:
        await held.opened.wait()
        held.protocol.close_timeout = 0.01
        held.protocol.end(CloseCode.TOO_SLOW, "too slow")
        assert await raw.closed() == (4408, "too slow")
        await until(lambda: not here.connections)


async def test_end_takes_the_answer_of_a_client_whose_messages_nobody_reads():
    opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        opened.set_result(scope["extensions"][EXTENSION])
        await asyncio.Event().wait()

    async with serving(application) as here, connect(here.url, compression=None, close_timeout=None) as client:
        protocol = await opened
        protocol.close_timeout = 3600
        await client.send("unread")
        await until(lambda: protocol.read_paused)
        protocol.end(CloseCode.UNAUTHENTICATED, "token expired")
        async with asyncio.timeout(10):
            await client.wait_closed()
        assert client.close_code == 4401
        await until(lambda: not here.connections)


# -- slow clients


@asynccontextmanager
async def stuck(port: int) -> AsyncIterator[socket.socket]:
    """A client with a small receive buffer that does not read."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, upgrade())
        yield client


def fill(write: Callable[[bytes], None], full: Callable[[], object]) -> int:
    """Write until it is `full`; how many bytes that took."""
    total = 0
    block = text_frame(b"x" * 32_768)
    while not full():
        write(block)
        total += len(block)
        assert total < 64 * 1024 * 1024, "nobody said that the buffer is full"
    return total


async def test_a_client_that_does_not_read_is_told_of_at_a_bounded_backlog_and_again_when_it_reads(held):
    writable: list[bool] = []
    async with serving(held) as here, stuck(here.port) as client:
        await held.opened.wait()
        write = held.protocol.start()
        held.protocol.on_writable = writable.append
        total = fill(write, lambda: writable)
        assert writable == [False]
        assert 64 * 1024 < held.protocol.backlog() < 64 * 1024 + 2 * 32_768
        assert total < 2 * 1024 * 1024, "the kernel's buffer is bounded too"
        sending = asyncio.create_task(held.send({"type": "websocket.send", "text": "late"}))
        await asyncio.sleep(0)
        assert not sending.done()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            while not sending.done():
                await loop.sock_recv(client, 65536)
        assert writable == [False, True]


async def test_abort_cuts_at_once_however_much_is_unsent(held):
    async with serving(held) as here, stuck(here.port):
        await held.opened.wait()
        full: list[bool] = []
        held.protocol.on_writable = full.append
        fill(held.protocol.start(), lambda: full)
        held.protocol.abort()
        await held.gone.wait()
        assert held.protocol.backlog() == 0
        await until(lambda: not here.connections)


async def test_end_lets_go_of_a_client_whose_buffer_is_full(held):
    async with serving(held) as here, stuck(here.port):
        await held.opened.wait()
        full: list[bool] = []
        held.protocol.on_writable = full.append
        fill(held.protocol.start(), lambda: full)
        held.protocol.close_timeout = 0.01
        held.protocol.end(CloseCode.TOO_SLOW, "too slow")
        await until(lambda: not here.connections)


async def test_one_who_vanished_a_moment_ago_keeps_nobody_else_from_getting_an_event():
    async with run_node() as node, node.client() as first, node.client(token=make_token("grace")) as second:
        await first.events(lambda e: e["type"] == "presence_joined" and e["user_id"] == "grace")
        session = next(session for session in node.router.hub if session.user == "ada")
        protocol = node.router.hub.port(session)._transport
        protocol.abort()
        await until(lambda: protocol.disconnected)
        assert node.router.hub.port(session) is not None, "it is still in its rooms"
        await node.router.hub.deliver(envelope(step_started, StepStarted(step_id="s"), seq=1))
        await node.router.hub.flush(session.topics[0])
        assert (await second.event("step_started"))["step_id"] == "s"


# -- shutdown


async def test_without_a_listener_shutdown_closes_with_1012(held):
    async with serving(held) as here, connect(here.url) as client:
        await held.opened.wait()
        held.protocol.shutdown()
        await client.wait_closed()
        assert client.close_code == 1012
        await held.gone.wait()


async def test_with_a_listener_each_connection_says_goodbye_and_closes_after_its_own_delay(held):
    async with serving(held) as here, connect(here.url) as client:
        await held.opened.wait()

        def goodbye() -> float:
            held.protocol.transport.write(text_frame(b"goodbye"))
            return 0.01

        held.protocol.on_shutdown = goodbye
        held.protocol.shutdown()
        assert await client.recv() == "goodbye"
        await client.wait_closed()
        assert (client.close_code, client.close_reason) == (1012, "restarting")
        await held.gone.wait()


async def test_shutdown_answers_a_handshake_that_is_still_under_way():
    waiting = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        waiting.set()
        await receive()

    async with serving(application) as here, dial(here.port) as raw:
        raw.write(upgrade())
        await waiting.wait()
        for connection in list(here.connections):
            connection.shutdown()
        assert (await raw.answer()).startswith("HTTP/1.1 500 ")


async def test_clients_of_a_draining_node_are_told_when_to_come_back():
    async with (
        run_node(drain=0.05) as node,
        node.client() as modern,
        node.client(plain=True, token=make_token("grace")) as plain,
    ):
        await modern.events(lambda e: e["type"] == "presence_joined" and e["user_id"] == "grace")
        for session in node.router.hub:
            node.router.hub.port(session)._transport.shutdown()
        goaway = await modern.frame()
        assert goaway["type"] == "goaway"
        assert goaway["reason"] == "restarting"
        assert 0 <= goaway["retry_after"] <= 0.05
        assert await modern.closed() == (1012, "restarting")
        assert await plain.closed() == (1012, "restarting")


# -- HTTP beside it


async def test_http_is_served_on_the_same_port():
    async with serving(echo) as here, httpx.AsyncClient() as http:
        assert (await http.get(here.url.replace("ws", "http", 1))).text == "here"
