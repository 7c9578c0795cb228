"""Journeys run on uvloop, because production does and its transports differ from asyncio's."""

import asyncio
import os
from collections.abc import Callable, Mapping

import pytest

from tests.journeys.chromium import find_chromium

try:
    import uvloop
except ImportError:  # not on Windows
    LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
else:
    LOOPS = {"uvloop": uvloop.new_event_loop}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return LOOPS


@pytest.fixture
def chromium() -> str:
    """Where Chromium is."""
    binary = find_chromium()
    if binary is None:
        missing = "there is no Chromium on this machine, so the browser journeys are NOT tested"
        if os.environ.get("ROUTER_TEST_NO_SKIP"):
            pytest.fail(missing)
        pytest.skip(missing)
    return binary
