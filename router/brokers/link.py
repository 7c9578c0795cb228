"""The way to the server, or servers, that a URL names: one, a pair under Sentinel, or a cluster."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit, urlunsplit

import hiredis
from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from router.errors import SetupError

__all__ = ["Link", "link_to"]

SCHEMES = "redis://, rediss:// (TLS), unix:// (a socket), redis+sentinel://, rediss+sentinel://, redis+cluster://, rediss+cluster://"
SOCKET_TIMEOUT = 5.0
"""Seconds that one answer may take."""
SLOTS, LANES = 16_384, 16
"""A cluster's slots, and in how many parts of them scripts wait for each other."""
SENTINEL_TIMEOUT = 1.0
"""Seconds that a sentinel's answer may take; there are others."""
CONFIRM = 0.2
"""Seconds for which a master counts as the master, once Sentinel has said so."""
REFRESH = 1.0
"""Least seconds between two looks at a cluster's layout."""


class Link(Protocol):
    """Clients for one broker URL. redis-py's own retries are off: they run a script twice without our knowing."""

    redis: Any
    """Runs commands."""
    verb: str
    """How a script publishes to a topic's channel: `PUBLISH` or `SPUBLISH`."""

    def lane_of(self, key: str) -> int:
        """Which keys' scripts have to wait for each other."""
        ...

    def line_of(self, channel: str) -> str:
        """Which server's connection a sharded channel is read from; one name, where it is the same for all."""
        ...

    async def reader(self, line: str) -> Redis:
        """A client for reading from that server; to be given back to `leave`."""
        ...

    async def leave(self, reader: Redis) -> None:
        """Done with a reader."""
        ...

    async def refresh(self) -> None:
        """Something failed: look again where things are."""
        ...

    async def confirm(self) -> None:
        """Raise redis-py's `ConnectionError` when what has just answered is no longer the master, so that its answer is worth nothing."""
        ...

    async def close(self) -> None: ...


def link_to(url: str, *, connections: int = 100) -> Link:
    """The link for `url`; at most `connections` to one server. Raises `SetupError` for a URL that is none of ours.

    `redis+sentinel://[user:password@]host:port,host:port/master[/db]`: the servers are the sentinels;
    `sentinel_username` and `sentinel_password` in the query are for them. `redis+cluster://host:port,host:port`:
    some of the masters; `sharded=yes` has topics published on the master that owns them only. All else in the query
    goes to redis-py, as in `rediss://host:6380/0?ssl_ca_certs=ca.pem`.
    """
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    try:
        if scheme in ("redis", "rediss", "unix") and not kind:
            return _Single(_pooled(_options(url), connections))
        if scheme in ("redis", "rediss") and kind == "sentinel":
            return _under_sentinel(parts, scheme, connections)
        if scheme in ("redis", "rediss") and kind == "cluster":
            return _cluster(parts, scheme, connections)
    except TypeError as error:  # an option in the query that redis-py does not have
        raise SetupError(f"`broker` (ROUTER_BROKER) cannot be understood: {error}") from None
    except ValueError:  # whose text may quote a password
        raise SetupError(
            "`broker` (ROUTER_BROKER) cannot be understood: is all that is not a letter or digit in user and password "
            "written as %XX?"
        ) from None
    raise SetupError(f"`broker` (ROUTER_BROKER) is {parts.scheme}://; it is one of {SCHEMES}")


class _Single:
    """One server, or the master that Sentinel tells."""

    verb = "PUBLISH"

    def __init__(self, redis: Redis, sentinel: Sentinel | None = None, master: str = "") -> None:
        self.redis = redis
        self._sentinel = sentinel
        self._master = master
        self._confirmed_at = 0.0

    def lane_of(self, key: str) -> int:  # noqa: ARG002
        return 0

    def line_of(self, channel: str) -> str:  # noqa: ARG002
        return ""

    async def reader(self, line: str) -> Redis:  # noqa: ARG002
        return self.redis

    async def leave(self, reader: Redis) -> None:
        """It is the client of all."""

    async def refresh(self) -> None:
        """Nothing to look at: a new connection asks Sentinel by itself."""

    async def confirm(self) -> None:
        """A master that stood still while another took its place goes on as if nothing had been, until it is told."""
        if self._sentinel is None or time.monotonic() - self._confirmed_at < CONFIRM:
            return
        asked = [self._named_by(sentinel) for sentinel in self._sentinel.sentinels]
        # The sentinel that replaced a master knows of it up to two seconds before the others; the highest epoch is its.
        named = max((told for told in await asyncio.gather(*asked) if told is not None), default=None)
        pool: Any = self.redis.connection_pool
        if named is not None and pool.master_address is not None and named[1:] != _address(pool.master_address):
            await pool.disconnect(inuse_connections=True)  # also the one that is read from
            raise RedisConnectionError("another master has taken its place")
        self._confirmed_at = time.monotonic()

    async def _named_by(self, sentinel: Any) -> tuple[int, str, int] | None:
        """Which master a sentinel names, with the epoch of its word; None when it does not answer."""
        # Its own socket timeout bounds it: to cancel redis-py in the middle of connecting leaves sockets behind.
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            state = await sentinel.sentinel_master(self._master)
            return (int(state["config-epoch"]), *_address((state["ip"], state["port"])))
        return None

    async def close(self) -> None:
        await self.redis.aclose(close_connection_pool=True)
        for sentinel in () if self._sentinel is None else self._sentinel.sentinels:
            await sentinel.aclose()


class _Cluster:
    """Several masters, each with a part of the topics."""

    def __init__(self, redis: RedisCluster, options: dict[str, Any], *, sharded: bool) -> None:
        self.redis = redis
        self.verb = "SPUBLISH" if sharded else "PUBLISH"
        self._options = options
        self._sharded = sharded
        self._looked_at = 0.0

    def lane_of(self, key: str) -> int:
        # By slots, not by masters: a topic whose slot moves must not overtake itself.
        return int(self.redis.keyslot(key)) * LANES // SLOTS

    def line_of(self, channel: str) -> str:
        if not self._sharded:
            return ""
        node = self.redis.get_node_from_key(channel)
        return "" if node is None else str(node.name)

    async def reader(self, line: str) -> Redis:
        await self.redis.initialize()
        node = self.redis.get_node(node_name=line) if line else self.redis.get_random_primary_node()
        if node is None:
            raise ConnectionError(f"{line} is no longer in the cluster")
        return _pooled({**self._options, "host": node.host, "port": node.port}, 2)

    async def leave(self, reader: Redis) -> None:
        await reader.aclose(close_connection_pool=True)

    async def confirm(self) -> None:
        """Masters of a cluster that are cut off from the others stop by themselves."""

    async def refresh(self) -> None:
        if time.monotonic() - self._looked_at >= REFRESH:
            self._looked_at = time.monotonic()
            await self.redis.initialize()
            await self.redis.nodes_manager.initialize()

    async def close(self) -> None:
        await self.redis.aclose()


class _Packed:
    """Commands are packed by hiredis: 1 us for a publish, where redis-py's own loop takes 20 (measured, 14 arguments)."""

    def pack_command(self, *args: Any) -> list[bytes]:
        name = args[0] if isinstance(args[0], bytes) else args[0].encode()
        whole: Any = (*name.split(), *args[1:])
        return [hiredis.pack_command(whole)]


class _Plain(_Packed, Connection):
    pass


class _Secure(_Packed, SSLConnection):
    pass


class _Socket(_Packed, UnixDomainSocketConnection):
    pass


class _Managed(_Packed, SentinelManagedConnection):
    pass


class _ManagedSecure(_Packed, SentinelManagedSSLConnection):
    pass


_PACKED: dict[type, type] = {Connection: _Plain, SSLConnection: _Secure, UnixDomainSocketConnection: _Socket}


class _SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Asks Sentinel for the master, and waits for a free connection instead of failing at once."""


def _options(url: str) -> dict[str, Any]:
    """What redis-py's connections are made with."""
    return {
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 3,
        **parse_url(url),
    }


def _pooled(options: dict[str, Any], connections: int) -> Redis:
    kind = _PACKED[options.get("connection_class", Connection)]
    made = {**options, "connection_class": kind}
    pool = BlockingConnectionPool(max_connections=connections, timeout=SOCKET_TIMEOUT, **made)
    pool.connection_class(**pool.connection_kwargs)  # tells now of an option that there is not
    return Redis(connection_pool=pool)


def _under_sentinel(parts: SplitResult, scheme: str, connections: int) -> Link:
    master, _, db = parts.path.strip("/").partition("/")
    if not master:
        raise SetupError(
            "`broker` (ROUTER_BROKER) names sentinels but not what they watch: redis+sentinel://host:26379/mymaster"
        )
    options = _options(_first(parts, scheme, f"/{db}"))
    for name in ("host", "port"):
        options.pop(name, None)
    # Written by the sentinels, whose names are theirs.
    known = {name: options.pop(name) for name in ("sentinel_username", "sentinel_password") if name in options}
    shared = {name: value for name, value in options.items() if name.startswith(("socket_", "ssl_")) or name == "retry"}
    shared["socket_timeout"] = shared["socket_connect_timeout"] = SENTINEL_TIMEOUT
    secure = options.pop("connection_class", None) is SSLConnection
    if secure:
        shared["ssl"] = True
    asking = {**shared, "username": known.get("sentinel_username"), "password": known.get("sentinel_password")}
    sentinel = Sentinel(_hosts(parts, 26379), sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    redis = sentinel.master_for(
        master,
        connection_pool_class=_SentinelPool,
        connection_class=_ManagedSecure if secure else _Managed,
        max_connections=connections,
        timeout=SOCKET_TIMEOUT,
        **options,
    )
    return _Single(redis, sentinel, master)


def _cluster(parts: SplitResult, scheme: str, connections: int) -> Link:
    options = _options(_first(parts, scheme, ""))
    sharded = str(options.pop("sharded", "no")).lower() in ("yes", "true", "1")
    for name in ("host", "port", "db"):
        options.pop(name, None)
    ours = {name: value for name, value in options.items() if name != "connection_class"}
    secure = options.get("connection_class") is SSLConnection
    redis = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in _hosts(parts, 6379)],
        max_connections=connections,
        ssl=secure,
        **ours,
    )
    return _Cluster(redis, options, sharded=sharded)


def _address(pair: Any) -> tuple[str, int]:
    host, port = pair
    return host.decode() if isinstance(host, bytes) else str(host), int(port)


def _first(parts: SplitResult, scheme: str, path: str) -> str:
    """The URL as it would be for the first server alone."""
    userinfo, at, hosts = parts.netloc.rpartition("@")
    return urlunsplit((scheme, f"{userinfo}{at}{hosts.split(',')[0]}", path, parts.query, ""))


def _hosts(parts: SplitResult, port: int) -> Sequence[tuple[str, int]]:
    found = []
    for each in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{each}")
        if not one.hostname:
            raise SetupError(f"`broker` (ROUTER_BROKER) names a server without a name: `{each}`")
        found.append((one.hostname, one.port or port))
    return found
