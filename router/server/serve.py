"""Runs a node under uvicorn with our protocol class."""

import gc
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from router.errors import SetupError

__all__ = ["address", "listen", "serve", "serve_workers"]

SEND_BUFFER = 256 * 1024
"""Kernel bytes for one client. Left to itself Linux grows it to megabytes for a client that stops reading."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections have a bounded send buffer. Raises `SetupError` when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    try:
        server.bind((host, port))
    except OSError as error:
        server.close()
        raise SetupError(
            f"cannot listen on {host}:{port}: {error.strerror}; set another `port` (ROUTER_PORT)"
        ) from None
    server.listen(4096)
    server.set_inheritable(True)
    return server


def address(listener: socket.socket, host: str) -> str:
    """The URL of what `listen` made for `host`."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def config(app: Any, *, max_message: int, drain: float) -> uvicorn.Config:
    """Uvicorn's settings for a node: our protocol, no compression, no timers of its own for each connection."""
    return uvicorn.Config(
        app,
        ws="router.server.protocol:GatewayProtocol",
        loop="auto" if sys.platform == "win32" else "uvloop",
        ws_max_size=max_message,
        ws_per_message_deflate=False,  # three times the memory and twice the time, and no shared frames
        ws_ping_interval=None,  # one shared heartbeat, in `upkeep`
        timeout_graceful_shutdown=int(drain) + 10,
        log_config=None,
        log_level=None,  # `journal` has set it
        access_log=False,
        lifespan="on",
    )


def serve_workers(
    make_app: Callable[[], Any], count: int, listener: socket.socket, *, max_message: int, drain: float
) -> None:
    """Serve with `count` processes on one listening socket, until SIGINT or SIGTERM. One that dies is started anew.

    `make_app` is called in each of them and must be picklable.
    """
    made = config(make_app, max_message=max_message, drain=drain)
    made.factory = True
    made.workers = count
    Multiprocess(made, [listener]).run()


def serve(app: Any, listener: socket.socket, *, max_message: int, drain: float) -> None:
    """Serve until SIGINT or SIGTERM."""
    # What is alive now lives as long as the process. Not walking it in every collection doubled the accept rate at
    # 5,000 connections (5,300 instead of 2,700 handshakes a second, measured on two cores).
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 1000)
    server = uvicorn.Server(config(app, max_message=max_message, drain=drain))
    server.run(sockets=[listener])
