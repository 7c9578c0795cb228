"""The listening socket and uvicorn's settings. The running server is in tests/router/test_cli.py."""

import socket

import pytest

from router.errors import SetupError
from router.server.protocol import GatewayProtocol
from router.server.serve import SEND_BUFFER, config, listen


async def test_connections_have_a_bounded_send_buffer_and_do_not_grow_it():
    with listen("127.0.0.1", 0) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            # Linux tells twice what was asked for, to count its own bookkeeping.
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * SEND_BUFFER
            assert client.getpeername() == server.getsockname()


async def test_a_taken_port_is_told_with_what_to_do():
    with listen("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        with pytest.raises(SetupError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*ROUTER_PORT"):
            listen("127.0.0.1", port)


async def test_an_address_that_is_not_ours_is_told():
    with pytest.raises(SetupError, match=r"cannot listen on 192\.0\.2\.1:0: "):
        listen("192.0.2.1", 0)


async def test_uvicorn_carries_connections_with_our_protocol_and_keeps_its_own_timers_and_logs_to_itself():
    async def application(scope, receive, send):
        raise NotImplementedError

    made = config(application, max_message=1000, drain=3.0)
    made.load()
    assert made.ws_protocol_class is GatewayProtocol
    assert (made.ws_max_size, made.ws_per_message_deflate, made.ws_ping_interval) == (1000, False, None)
    assert (made.access_log, made.log_config) == (False, None)
    assert made.timeout_graceful_shutdown is not None
    assert made.timeout_graceful_shutdown > 3.0, "it waits for the whole drain"
