"""Simulated people: WebSocket bytes over the virtual network, around the checker's model of a client."""

import asyncio
import json
import logging
import re
from collections.abc import Callable
from random import Random
from typing import Any

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from tests.checker import Client
from tests.simulation.http import Caller
from tests.simulation.node import make_token, on_host

__all__ = ["Viewer"]

_quiet = logging.getLogger("simulated client")
_quiet.disabled = True


class _Socket(asyncio.Protocol):
    """One connection's bytes."""

    def __init__(self, viewer: "Viewer", host: str, since: str | None) -> None:
        self.viewer = viewer
        self.turn = viewer._turn
        self.since = since
        self.refused: int | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        query = "" if since is None else f"?since={since}"
        uri = parse_uri(f"ws://{host}/ws/project/{viewer.project}{query}")
        protocols: Any = None if viewer.model.plain else ["router.v1"]
        self.protocol = ClientProtocol(uri, subprotocols=protocols, max_size=2**22, logger=_quiet)
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(2**24)
        request = self.protocol.connect()
        request.headers["Authorization"] = f"Bearer {self.viewer.token}"
        self.protocol.send_request(request)
        self.flush()

    def flush(self) -> None:
        for data in self.protocol.data_to_send():
            if data:
                self.transport.write(data)
            else:
                self.transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self.protocol.receive_data(data)
        for event in self.protocol.events_received():
            if isinstance(event, Response):
                if self.protocol.handshake_exc is not None:
                    exception = self.protocol.handshake_exc
                    self.refused = exception.response.status_code if isinstance(exception, InvalidStatus) else -1
                    self.transport.close()
                else:
                    self.viewer.opened(self)
            elif event.opcode is Opcode.TEXT:
                self.viewer.heard(self, json.loads(event.data))
            elif event.opcode is Opcode.CLOSE:
                self.viewer.lost(self)
        if self.transport is not None and not self.transport.is_closing():
            self.flush()

    def eof_received(self) -> None:
        self.protocol.receive_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self.viewer.lost(self)
        if not self.over.done():
            self.over.set_result(None)

    def send(self, message: dict[str, Any]) -> None:
        if self.protocol.state is State.OPEN and not self.transport.is_closing():
            self.protocol.send_text(json.dumps(message).encode())
            self.flush()

    def leave(self, *, politely: bool) -> None:
        if self.transport is None:
            return
        if politely and self.protocol.state is State.OPEN and not self.transport.is_closing():
            self.protocol.send_close(1000)
            self.flush()
            self.transport.close()
        else:
            self.transport.abort()


class Viewer:
    """One person's page, which is open all the time and comes back by itself."""

    def __init__(
        self,
        loop: Any,
        chance: Random,
        host: str,
        *,
        user: str,
        project: str,
        plain: bool,
        nodes: Callable[[], list[str]],
        tell: Callable[[str], None],
    ) -> None:
        self.model = Client(host, user=user, project=project, plain=plain)
        self.host = host
        self.project = project
        self.token = make_token(user, project)
        self.wanted = ""
        """The node that it goes to; any, when empty."""
        self.first_since: str | None = None
        self.prompt = True
        self.socket: _Socket | None = None
        self.refused: list[int] = []
        self.moved_at = -1e9
        self.moves_in_a_window = 0
        self.redelivered = 0
        self.acknowledges = True
        self._loop = loop
        self._chance = chance
        self._nodes = nodes
        self._tell = tell
        self._task: Any = None
        self._awake = asyncio.Event()
        self._hurry = False
        self._turn = 0
        self._caller = Caller(self.token)

    def check(self) -> None:
        """Raise what ended it, if it has ended."""
        if self._task is not None and self._task.done():
            self._task.result()

    @property
    def there(self) -> bool:
        return self.model.connected and self.model.welcomed

    def start(self) -> None:
        self._awake.set()
        self._task = on_host(self.host, self._live)

    async def _live(self) -> None:
        failures = 0
        while True:
            await self._awake.wait()
            nodes = self._nodes()
            host = self.wanted if self.wanted in nodes else self._chance.choice(nodes) if nodes else ""
            if not host:  # no node is up
                await asyncio.sleep(self._chance.uniform(0.1, 0.5))
                continue
            since = self.model.since() or self.first_since
            socket = _Socket(self, host, since)
            try:
                async with asyncio.timeout(10):
                    await self._loop.create_connection(lambda s=socket: s, host, 80)
                self.socket = socket
                async with asyncio.timeout(None) as deadline:
                    deadline.reschedule(self._loop.time() + 10)
                    while not socket.over.done() and not self.model.connected and socket.refused is None:
                        await asyncio.sleep(0.02)
                    deadline.reschedule(None)
                    if self.model.connected:
                        failures = 0
                    await socket.over
            except (OSError, TimeoutError):
                socket.leave(politely=False)
            if socket.refused is not None:
                self.refused.append(socket.refused)
            self.lost(socket)
            failures += 1
            if self._hurry:
                self._hurry = False
                await asyncio.sleep(self._chance.uniform(0.0, 0.06))
            else:
                await asyncio.sleep(self._chance.uniform(0.01, min(2.0, 0.2 * 2**failures)))

    # -- told by the socket

    def opened(self, socket: _Socket) -> None:
        if socket.turn != self._turn:  # meanwhile it wants something else
            socket.leave(politely=True)
            return
        self.socket = socket
        self.model.opened(self._loop.time(), socket.since, prompt=self.prompt)
        self._tell(f"{self.host} is open with since={socket.since}")

    def heard(self, socket: _Socket, frame: dict[str, Any]) -> None:
        if socket is not self.socket or not self.model.connected:
            return
        now = self._loop.time()
        self._tell(f"{self.host} hears {_short(frame)}")
        answers = self.model.take(frame, now)
        if frame["type"] == "welcome" and now - self.moved_at < 1.0:
            self.moves_in_a_window += 1
        if frame["type"] == "welcome" or (frame["type"] == "resync" and "topic" not in frame):
            self.model.ask_people()
            on_host(self.host, lambda: self._ask_people(socket))
        self.redelivered += bool(frame.get("redelivered"))
        for answer in answers:
            if answer["type"] != "ack" or self.acknowledges:
                socket.send(answer)

    def lost(self, socket: _Socket) -> None:
        if self.socket is socket:
            if self.model.connected:
                self._tell(f"{self.host} is cut off")
            self.model.closed(self._loop.time())

    async def _ask_people(self, socket: _Socket) -> None:
        """Who is here, for a page that has just been told that it is welcome. It asks again until it knows."""
        while self.socket is socket and self.model.connected:
            host = socket.protocol.uri.host
            try:
                status, answer = await self._caller.ask(host, "GET", f"/projects/{self.project}/presence")
                if status == 200 and self.socket is socket:
                    self.model.know_people(answer["users"])
                    return
            except (OSError, TimeoutError):
                pass
            await asyncio.sleep(0.5)
            self.model.ask_people()

    # -- told by the schedule

    def move(self, to: str, *, politely: bool) -> None:
        """To another node, at once."""
        self.wanted = to
        self._hurry = True
        self._turn += 1
        self.moved_at = self._loop.time()
        if self.socket is not None:
            socket = self.socket
            self.lost(socket)
            socket.leave(politely=politely)

    def reload(self, since: str | None) -> None:
        """The person loads the page anew."""
        self.first_since = since
        self._turn += 1
        socket = self.socket
        if socket is not None:
            self.lost(socket)
        self.model.forget()
        self._hurry = True
        if socket is not None:
            socket.leave(politely=True)

    def sleep(self, *, politely: bool) -> None:
        self._awake.clear()
        self._turn += 1
        if self.socket is not None:
            socket = self.socket
            self.lost(socket)
            socket.leave(politely=politely)

    def wake(self) -> None:
        self._awake.set()

    def read(self, reads: bool) -> None:
        """Whether it takes what comes."""
        socket = self.socket
        self.prompt = reads
        if not reads and self.model.connected:
            for note in reversed(self.model.record):
                if hasattr(note, "prompt"):
                    note.prompt = False
                    break
        if socket is not None and socket.transport is not None:
            (socket.transport.resume_reading if reads else socket.transport.pause_reading)()

    def say(self, message: dict[str, Any]) -> None:
        if self.socket is not None and self.there:
            self.socket.send(message)


def _short(frame: dict[str, Any]) -> str:
    return re.sub("xx+", "x", json.dumps(frame))[:600]
