"""Parts of nodes on a real server."""

import pytest

from router.brokers import script
from tests.router.brokers.nodes import Part, Table, connect


@pytest.fixture
def quick(monkeypatch):
    """No pauses between tries."""
    monkeypatch.setattr(script, "FIRST_PAUSE", 0.001)


@pytest.fixture
async def client(redis_url):
    async with connect(redis_url) as client:
        yield client


@pytest.fixture
def table(client):
    return Table(client)


@pytest.fixture
async def make(client, quick):
    async def make(**options):
        part = Part(client, **options)
        await part.lease.beat()
        return part

    return make


@pytest.fixture
async def one(make):
    return await make()


@pytest.fixture
async def two(make):
    return await make()
