"""uvicorn's WebSocket protocol, with what ASGI lacks: pre-encoded frames, the buffer's state, abort, drain.

A subclass of uvicorn's own class, so it uses names that uvicorn may change; tests/router/server/test_protocol.py
tells when it did. Every fact is from docs/decisions/0003-uvicorn-protocol.md.
"""

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request
from websockets.protocol import State

from router.errors import CloseCode, clip_reason
from router.port import EXTENSION, HIGH_WATER

__all__ = ["GatewayProtocol"]


def _nothing(_: bool) -> None:
    """Stands in for a listener until there is one."""


class GatewayProtocol(WebSocketsSansIOProtocol):
    """One WebSocket connection. `framed` writes are legal because no extension is ever negotiated."""

    framed = True
    stalled = False
    """The buffer is over its high-water mark."""
    heard_at: float = 0.0
    """Loop time when bytes last came."""
    on_writable: Callable[[bool], None] = staticmethod(_nothing)
    """Told False when the buffer passes its high-water mark, True when it has drained."""
    on_shutdown: Callable[[], float] | None = None
    """Asked at shutdown: says goodbye to the client and returns in how many seconds to close."""

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.handshake_initiated and not self.close_sent:
            self.heard_at = self.loop.time()
            scope: Any = self.scope
            scope["extensions"][EXTENSION] = self  # the ASGI task has not started yet

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.loop.time()
        super().data_received(data)
        refused = getattr(self.conn, "handshake_exc", None)
        if refused is not None and not self.handshake_initiated and not self.transport.is_closing():
            # uvicorn leaves a request with a line over 8 KiB without an answer, and holds it for ever.
            self.transport.write(
                b"HTTP/1.1 414 URI Too Long\r\nContent-Type: application/problem+json\r\n"
                b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(_TOO_LONG), _TOO_LONG)
            )
            self.transport.close()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # else uvicorn logs an error for every refusal (Kludex/uvicorn#3138)

    def pause_writing(self) -> None:
        super().pause_writing()
        # Whoever does not read our answers is not read either, or what answers it would pile up here.
        self.stalled = True
        self.transport.pause_reading()
        self.on_writable(False)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stalled = False
        if not self.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()
        self.on_writable(True)

    async def receive(self) -> Any:
        message = await super().receive()
        if self.stalled and not self.transport.is_closing():
            self.transport.pause_reading()
        return message

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_writable = _nothing
        self.on_shutdown = None
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Called by uvicorn for all connections at once. With a listener they go one by one over the drain time."""
        if self.handshake_complete and self.conn.state is not State.OPEN:
            # It is closing already. uvicorn would send a second close frame, which raises, and tell nobody after it.
            self.transport.close()
            return
        if self.on_shutdown is None or self.close_sent or not self.handshake_complete:
            super().shutdown()
            return
        delay = self.on_shutdown()
        if delay <= 0:
            super().shutdown()
        else:
            self.loop.call_later(delay, self.end, CloseCode.RESTART, "restarting")

    # -- what the gateway uses

    def start(self) -> Callable[[bytes], None]:
        """The connection is open: bound its buffer, and return the quickest way to write frames."""
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        # Nobody looks at them any more, and they are four of a connection's kilobytes.
        del self.request, self.response
        return self.transport.write

    def backlog(self) -> int:
        """Bytes that wait in the transport."""
        return self.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Cut the connection without waiting for the buffer."""
        self.transport.abort()

    def end(self, code: CloseCode, reason: str) -> None:
        """Send a close frame, tell the application, and close for good after the timeout for the answer."""
        if self.close_sent or self.disconnected or self.transport.is_closing() or self.conn.state is not State.OPEN:
            return
        reason = clip_reason(reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": int(code), "reason": reason})
        self.conn.send_close(int(code), reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        # `close` would wait for a buffer that a stuck client never takes.
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.abort)


_TOO_LONG = (
    b'{"title":"URI Too Long","status":414,"detail":"a request line or header is over 8 KiB; '
    b'send the token by Sec-WebSocket-Protocol or shorten it"}'
)
