"""One of two nodes ends like a power cut, with two hundred people connected and a backend that goes on publishing."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from plugins.step import StepStarted
from router.backend import Backend
from tests.node import KEY, make_token

PEOPLE = 200
LEASE = 2.0


@asynccontextmanager
async def node_process(url: str) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """`router serve` in a process of its own, and its address."""
    settings = {
        "ROUTER_BROKER": url,
        "ROUTER_JWT_KEY": KEY,
        "ROUTER_DRAIN": "0",
        "ROUTER_LOG_LEVEL": "WARNING",
        "ROUTER_LIMIT_PROJECT": "1000",
        "ROUTER_LEASE": str(LEASE),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ROUTER_")}
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-m", "router.cli", "serve", "--port", "0"],
        env={**inherited, **settings},
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stderr is not None
    try:
        line = (await asyncio.to_thread(process.stderr.readline)).decode()
        found = re.search(r"http://\S+", line)
        assert found is not None, line
        yield process, found[0].replace("http", "ws", 1)
    finally:
        process.kill()
        process.wait(10)
        process.stderr.close()


class Person:
    """A page that stays open: comes back wherever it can, with what it has."""

    def __init__(self, number: int, nodes: list[str]) -> None:
        self.nodes = nodes
        self.token = make_token(f"user{number}")
        self.at = number % 2
        self.epoch, self.pos = "", 0
        self.got: list[str] = []
        self.reloads = 0
        self.welcomes = 0
        self.ready = asyncio.Event()

    async def live(self) -> None:
        while True:
            since = f"?since={self.epoch}:{self.pos}" if self.epoch else ""
            try:
                async with connect(
                    f"{self.nodes[self.at]}/ws/project/p1{since}",
                    additional_headers={"Authorization": f"Bearer {self.token}"},
                    subprotocols=["router.v1"],
                    compression=None,
                    ping_interval=None,
                ) as socket:
                    async for text in socket:
                        self.take(json.loads(text))
            except (OSError, ConnectionClosed, InvalidStatus, EOFError):
                self.at = 1 - self.at
                await asyncio.sleep(0.05)

    def take(self, frame: dict) -> None:
        if frame["type"] == "welcome":
            self.epoch, self.pos = frame["epoch"], frame["pos"]
            self.welcomes += 1
            self.reloads += bool(self.got) and not frame["recovered"]
            self.ready.set()
        for event in frame["events"] if frame["type"] == "batch" else [frame]:
            if event["type"] == "step_started":
                self.got.append(event["step_id"])
                self.pos = event.get("pos", event["seq"])
            elif event["type"] == "resync" and "topic" not in event:
                self.reloads += 1


async def test_all_people_of_a_killed_node_resume_on_the_other_and_its_seats_are_free_within_a_lease(own_server):
    async with (
        node_process(own_server.url) as (victim, one),
        node_process(own_server.url) as (_, two),
        Backend(own_server.url) as backend,
    ):
        people = [Person(number, [one, two]) for number in range(PEOPLE)]
        living = []
        for start in range(0, PEOPLE, 20):
            living += [asyncio.create_task(person.live()) for person in people[start : start + 20]]
            await asyncio.gather(*(person.ready.wait() for person in people[start : start + 20]))
        greedy = make_token("greedy")
        published: list[str] = []

        going_on = True

        async def publish_on() -> None:
            while going_on:
                name = str(len(published))
                await backend.publish("p1", StepStarted(step_id=name))
                published.append(name)
                await asyncio.sleep(0.01)

        publishing = asyncio.create_task(publish_on())
        try:
            async with opened(one, greedy, 10):
                await asyncio.sleep(0.2)
                assert await refused(two, greedy), "ten connections are all that one may have, wherever they are"
                victim.send_signal(signal.SIGKILL)
                killed = time.monotonic()
                while await refused(two, greedy):
                    assert time.monotonic() < killed + 3 * LEASE, "the seats of a dead node are given back"
                    await asyncio.sleep(0.05)
                freed = time.monotonic() - killed
            while sum(person.welcomes for person in people) < PEOPLE + PEOPLE // 2:
                await asyncio.sleep(0.01)
            resumed = time.monotonic() - killed
            await asyncio.sleep(0.1)
        finally:
            going_on = False
            await publishing
        last = published[-1]
        async with asyncio.timeout(10):
            while not all(last in person.got for person in people):
                await asyncio.sleep(0.01)
        for task in living:
            task.cancel()
        await asyncio.gather(*living, return_exceptions=True)
    print(
        f"{len(published)} published; seats free after {freed:.2f} s of a lease of {LEASE:g}; all in by {resumed:.2f} s"
    )
    for person in people:
        assert person.reloads == 0
        begun = int(person.got[0])
        assert person.got == published[begun : begun + len(person.got)], "each once, in order, none left out"


@asynccontextmanager
async def opened(url: str, token: str, count: int) -> AsyncIterator[None]:
    """So many connections of one person, whatever becomes of them."""
    sockets = [
        await connect(
            f"{url}/ws/project/p1", additional_headers={"Authorization": f"Bearer {token}"}, ping_interval=None
        )
        for _ in range(count)
    ]
    try:
        yield
    finally:
        await asyncio.gather(*(socket.close() for socket in sockets), return_exceptions=True)


async def refused(url: str, token: str) -> bool:
    """Whether one more is refused because of a limit."""
    try:
        socket = await connect(f"{url}/ws/project/p1", additional_headers={"Authorization": f"Bearer {token}"})
    except InvalidStatus as error:
        return error.response.status_code == 429
    await socket.close()
    return False
