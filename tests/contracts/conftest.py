"""What brokers run on, for suites that each of them must pass."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from tests.servers import Server, find_server, find_servers, run_server
from tests.simulation.redis_port import run_model

PROGRAMS = find_servers()
KINDS = (
    "memory",
    *(["named"] if "ROUTER_TEST_REDIS_URL" in os.environ else []),
    *(PROGRAMS or ["redis"]),
    "restricted",
    "cluster",
    "sharded",
    "model",
)


@pytest.fixture(scope="session")
def server_of() -> Iterator[Callable[..., Server]]:
    """A server of a program, with options, that is started when it is first asked for."""
    with ExitStack() as servers:
        yield cache(lambda program, **options: servers.enter_context(run_server(program, **options)))


@pytest.fixture
def model_url() -> Iterator[str]:
    """The simulation's model of Redis behind a real port."""
    with run_model() as url:
        yield url


@pytest.fixture(params=KINDS)
def broker_url(request: pytest.FixtureRequest, server_of: Callable[..., Server]) -> str:
    """An empty broker of each kind: memory, every program that is here, a server where the router is a user that may do
    no more than it must, a cluster, and one with sharded pub/sub. `named`: what ROUTER_TEST_REDIS_URL names. `model`:
    what the simulation has in the place of a server.
    """
    if request.param == "memory":
        return "memory://"
    if request.param == "model":
        return request.getfixturevalue("model_url")
    if request.param == "cluster":
        return request.getfixturevalue("cluster_url")
    if request.param == "sharded":
        return f"{request.getfixturevalue('cluster_url')}?sharded=yes"
    if request.param == "named" or not PROGRAMS:
        return request.getfixturevalue("redis_url")
    if request.param == "restricted":
        server = server_of(find_server(), access="user")
    else:
        server = server_of(PROGRAMS[request.param])
    with server.client() as client:
        client.flushall()
    return server.url
