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

from tests.node import Node, run_node


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
