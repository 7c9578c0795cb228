"""One Redis or Valkey of our own, which tests may stop, freeze and start again on the same port."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.servers.certificate import make_certificate
from tests.servers.process import Process, drop_connections, free_ports, wait_until

__all__ = ["COMMANDS", "Access", "Server", "run_server"]

Access: TypeAlias = Literal["open", "password", "user"]
"""Who may do what: everybody everything, whoever has the password everything, or the router's user what it needs."""

COMMANDS = (
    *("ping", "time", "info", "script|load", "evalsha"),
    *("publish", "subscribe", "unsubscribe", "spublish", "ssubscribe", "sunsubscribe"),
    *("get", "set", "del", "exists", "persist", "pexpire"),
    *("hget", "hmget", "hgetall", "hset", "hincrby", "hdel", "hexists", "hlen"),
    *("zadd", "zrange", "zrangebyscore", "zscore", "zrem"),
    *("sadd", "scard", "spop", "srem"),
    *("xadd", "xlen", "xrange", "xrevrange", "xtrim", "xdel"),
    *("xreadgroup", "xgroup", "xinfo", "xack", "xclaim", "xpending"),
)
"""Everything that the router's user may run, itself or in a script. Whoever has it run another adds that."""
KEYS = ("~router:*",)
CHANNELS = ("&router:*", "&project:*")


class Server:
    """A server on a loopback port of its own. Nothing is kept on disk, and a start begins with nothing.

    `url` is for the router, and `admin_url` for whoever may do everything; they differ where `access` is "user".
    """

    def __init__(
        self,
        program: str,
        folder: Path,
        *options: str,
        port: int | None = None,
        access: Access = "open",
        tls: bool = False,
    ) -> None:
        """`folder`: where it may write; one to each. `options` are the program's own, as `--maxmemory 1mb`."""
        self.port = free_ports(1)[0] if port is None else port
        self._access = access
        own = ["--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"]
        place, query = f"127.0.0.1:{self.port}/0", ""
        if tls:
            made = make_certificate(folder)
            own += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            own += ["--tls-cert-file", str(made.certificate), "--tls-key-file", str(made.key)]
            own += ["--tls-ca-cert-file", str(made.authority)]
            query = f"?ssl_ca_certs={made.authority}"
        else:
            own += ["--port", str(self.port)]
        if access != "open":
            own += ["--requirepass", "for-tests"]
        scheme = "rediss" if tls else "redis"
        self.admin_url = f"{scheme}://{'' if access == 'open' else ':for-tests@'}{place}{query}"
        self.url = self.admin_url if access != "user" else f"{scheme}://router:of-the-router@{place}{query}"
        self._process = Process([program, *own, *options], folder)

    def start(self) -> None:
        """Start it and wait until it answers. To be called from the main thread: it ends with the one that does."""
        self._process.start()
        with self.client() as client:
            wait_until(lambda: self._answers(client), "the server answers")
            if self._access == "user":
                self._admit(client)

    def kill(self) -> None:
        """End it at once; everything that it knew is gone."""
        self._process.kill()

    def freeze(self) -> None:
        """Have it hold still: connections stay open and nothing answers."""
        self._process.freeze()

    def thaw(self) -> None:
        """Let it go on."""
        self._process.thaw()

    def client(self) -> Redis:
        """For whoever may do everything. It neither waits long nor tries again."""
        return Redis.from_url(
            self.admin_url, decode_responses=True, socket_timeout=5, retry=Retry(NoBackoff(), 0), protocol=3
        )

    def _answers(self, client: Redis) -> bool:
        self._process.check()
        return client.info("server")["process_id"] == self._process.pid  # and not one that was faster to the port

    def _admit(self, client: Redis) -> None:
        known = client.command()
        allowed = [f"+{command}" for command in COMMANDS if command.partition("|")[0] in known]
        client.execute_command(
            "ACL", "SETUSER", "router", "reset", "on", ">of-the-router", *KEYS, "resetchannels", *CHANNELS, *allowed
        )


@contextmanager
def run_server(program: str, *options: str, access: Access = "open", tls: bool = False) -> Iterator[Server]:
    """A server for as long as the block runs."""
    with TemporaryDirectory(prefix="router-") as folder:
        server = Server(program, Path(folder), *options, access=access, tls=tls)
        try:
            server.start()
            yield server
        finally:
            server.kill()
            drop_connections()
