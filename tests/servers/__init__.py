"""Real Redis for tests, of every kind that the router runs on, each for as long as a block lasts."""

from tests.servers.black_hole import BlackHole, black_hole
from tests.servers.cluster import Cluster, run_cluster
from tests.servers.program import find_server, find_servers, has_tls
from tests.servers.sentinel import Sentinel, run_sentinel
from tests.servers.server import COMMANDS, Server, run_server

__all__ = [
    "COMMANDS",
    "BlackHole",
    "Cluster",
    "Sentinel",
    "Server",
    "black_hole",
    "find_server",
    "find_servers",
    "has_tls",
    "run_cluster",
    "run_sentinel",
    "run_server",
]
