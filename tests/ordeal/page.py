"""One window of a browser in a random ordeal: a real connection that comes, goes, sleeps and reads as its turns say."""

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.checker import Client, Ledger
from tests.node import make_token
from tests.ordeal.schedule import Person, Turn
from tests.ordeal.site import Site, project_of

__all__ = ["Page"]


class Page:
    """Feeds what a connection brings to the checker's client, and sends what that answers.

    It comes back whenever it loses its connection, on either node, until it is stopped.
    """

    def __init__(self, person: Person, site: Site, ledger: Ledger, clock: Callable[[], float], seed: int) -> None:
        self.person = person
        self.project = project_of(person.project)
        self.client = Client(
            f"{person.number}{'-plain' if person.plain else ''}",
            user=person.user,
            project=self.project,
            plain=person.plain,
        )
        self.refusals: list[tuple[float, int]] = []
        """Handshakes that were declined: when, and with which HTTP status."""
        self._site = site
        self._ledger = ledger
        self._clock = clock
        self._random = Random(f"{seed}:{person.number}")
        self._at = person.node
        self._token = make_token(person.user, self.project)
        self._connection: ClientConnection | None = None
        self._awake = asyncio.Event()
        self._awake.set()
        self._reading = asyncio.Event()
        self._reading.set()
        self._pause = 0.0
        self._connections = self._asked = 0
        self._asking: set[asyncio.Task[None]] = set()
        self._is_slow = any(turn.kind == "slow" for turn in person.turns)

    @property
    def is_open(self) -> bool:
        """Whether its connection stands and has been welcomed."""
        return self._connection is not None and self.client.welcomed

    async def live(self) -> None:
        """Connect again and again."""
        await asyncio.sleep(max(0.0, self.person.at - self._clock()))
        while True:
            await self._awake.wait()
            await asyncio.sleep(self._pause)
            self._pause = self._random.uniform(0.05, 0.3)
            try:
                await self._connect()
            except (OSError, ConnectionClosed, InvalidHandshake, EOFError, TimeoutError) as error:
                response = getattr(error, "response", None)
                if response is not None:
                    self.refusals.append((self._clock(), response.status_code))
                self._at = 1 - self._at

    async def act(self) -> None:
        """Take all turns, each at its time."""
        for turn in self.person.turns:
            await asyncio.sleep(max(0.0, turn.at - self._clock()))
            await self._take(turn)

    async def chat(self) -> None:
        """Say something, at each time."""
        for at in self.person.chats:
            await asyncio.sleep(max(0.0, at - self._clock()))
            if self._connection is None or not self.client.welcomed:
                continue
            topic = f"project:{self.project}"
            # What one says on two connections goes two ways, and either may be the faster.
            key = f"chat{self.person.number}-{self._connections}"
            said = self._ledger.ask(topic, "chat_message", "now", key=key, at=self._clock())
            with suppress(ConnectionClosed):
                await self._connection.send(
                    json.dumps({"type": "chat_message", "role": "user", "content": said.mark, "ref": said.mark})
                )

    # -- inside

    async def _connect(self) -> None:
        since = self.client.since()
        if since is None and self.person.since:
            since = "0"
        query = "" if since is None else f"?since={since}"
        node = self._site.nodes[self._at]
        narrow = await self._narrow(node.port)
        connection = await connect(
            f"ws://127.0.0.1:{node.port}/ws/project/{self.project}{query}",
            additional_headers={"Authorization": f"Bearer {self._token}"},
            subprotocols=None if self.person.plain else ["router.v1"],  # type: ignore[list-item]
            compression=None,
            ping_interval=None,
            open_timeout=6,
            close_timeout=1,
            max_queue=4,
            proxy=None,
            **({} if narrow is None else {"sock": narrow}),
        )
        self._connection = connection
        self._connections += 1
        self.client.opened(self._clock(), since, prompt=not self._is_slow)
        try:
            while True:
                await self._reading.wait()
                frame = json.loads(await connection.recv())
                self._note(frame)
                for answer in self.client.take(frame, self._clock()):
                    await connection.send(json.dumps(answer))
                # "Ask again after each welcome", and whoever is told that continuity is lost loads all anew.
                if frame["type"] == "welcome" or (frame["type"] == "resync" and "topic" not in frame):
                    task = asyncio.create_task(self._ask_people(node.url))
                    self._asking.add(task)
                    task.add_done_callback(self._asking.discard)
        finally:
            self._connection = None
            self.client.closed(self._clock())
            await connection.close()

    async def _narrow(self, port: int) -> socket.socket | None:
        """For one who will read slowly: a connection that holds little, so that it is noticed."""
        if not self._is_slow:
            return None
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
        except BaseException:
            made.close()
            raise
        return made

    def _note(self, frame: dict[str, Any]) -> None:
        """What became of something that was said."""
        if frame["type"] == "error" and "ref" in frame:
            for said in self._ledger.publications:
                if said.mark == frame["ref"] and said.outcome == "unknown":
                    # `unavailable` leaves open whether it was published.
                    outcome = "unknown" if frame["code"] in ("unavailable", "plugin_failed") else "refused"
                    said.told(self._clock(), outcome)

    async def _ask_people(self, url: str) -> None:
        """As the protocol has it: ask after each welcome."""
        self.client.ask_people()
        self._asked += 1
        number = self._asked
        headers = {"Authorization": f"Bearer {self._token}"}
        life = self._connection
        async with httpx.AsyncClient(trust_env=False) as http:
            while life is not None and life is self._connection and number == self._asked:
                with suppress(httpx.HTTPError):
                    answer = await http.get(f"{url}/projects/{self.project}/presence", headers=headers, timeout=5)
                    if answer.status_code == httpx.codes.OK:
                        if life is self._connection and number == self._asked:  # an older answer knows less
                            self.client.know_people(answer.json()["users"])
                        return
                await asyncio.sleep(0.5)

    async def _take(self, turn: Turn) -> None:
        connection = self._connection
        match turn.kind:
            case "move":
                self._at, self._pause = 1 - self._at, turn.lasts
                if connection is not None:
                    await connection.close()
            case "drop":
                self._at, self._pause = self._random.randrange(2), turn.lasts
                if connection is not None:
                    connection.transport.abort()
            case "sleep":
                self._awake.clear()
                self._pause = 0.0
                if connection is not None:
                    await connection.close()
                await asyncio.sleep(turn.lasts)
                self._awake.set()
            case "slow":
                self._reading.clear()
                await asyncio.sleep(turn.lasts)
                self._reading.set()
