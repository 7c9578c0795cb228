"""Everything here runs on asyncio's own loop and on uvloop, which production uses: their transports differ."""

import asyncio
from collections.abc import Callable, Mapping

import pytest

try:
    import uvloop
except ImportError:  # Windows has none
    uvloop = None


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop} | ({} if uvloop is None else {"uvloop": uvloop.new_event_loop})
