"""A master and its replica under three sentinels of our own, and a master that dies or holds still."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.servers.process import Process, drop_connections, free_ports, wait_until
from tests.servers.server import Server

__all__ = ["Sentinel", "run_sentinel"]

NAME = "mymaster"
SENTINELS = 3
CONFIGURATION = """
bind 127.0.0.1
port {port}
dir "{folder}"
sentinel myid {id}
sentinel monitor {name} 127.0.0.1 {master} 2
sentinel down-after-milliseconds {name} 500
sentinel failover-timeout {name} 2000
sentinel known-replica {name} 127.0.0.1 {replica}
"""


class Sentinel:
    """Two servers and three sentinels, two of which must agree that the master is gone.

    `servers` begin as master and replica; `url` names the sentinels.
    """

    def __init__(self, program: str, folder: Path) -> None:
        folders = [folder / str(i) for i in range(2 + SENTINELS)]
        for each in folders:
            each.mkdir()
        master, replica, *ports = free_ports(len(folders))
        following = ("--replicaof", "127.0.0.1", str(master))
        quick = ("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
        self.servers = [
            Server(program, folders[0], *quick, port=master),
            Server(program, folders[1], *quick, *following, port=replica),
        ]
        self.url = f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/{NAME}"
        self._ports = ports
        self._before = master
        self._frozen: Server | None = None
        self._sentinels: list[Process] = []
        ids = [token_hex(20) for _ in ports]
        for port, own, id_ in zip(ports, folders[2:], ids, strict=True):
            text = CONFIGURATION.format(port=port, folder=own, id=id_, name=NAME, master=master, replica=replica)
            # What they would find out by themselves, in some seconds.
            known = [
                f"sentinel known-sentinel {NAME} 127.0.0.1 {other} {its_id}\n"
                for other, its_id in zip(ports, ids, strict=True)
                if other != port
            ]
            (own / "sentinel.conf").write_text(text + "".join(known), encoding="ascii")
            self._sentinels.append(Process([program, str(own / "sentinel.conf"), "--sentinel"], own))

    def start(self) -> None:
        """Start all and wait until the sentinels could replace the master."""
        for server in self.servers:
            server.start()
        with self.servers[1].client() as replica:
            wait_until(lambda: replica.info("replication")["master_link_status"] == "up", "the replica follows")
        for process in self._sentinels:
            process.start()
        wait_until(lambda: all(map(self._is_ready, range(SENTINELS))), "the sentinels know each other and the replica")

    def stop(self) -> None:
        """End all."""
        for process in (*self._sentinels, *self.servers):
            process.kill()

    def master_port(self) -> int:
        """Where the master is, as the first sentinel knows it."""
        return self._master_port(0)

    def master(self) -> Server:
        """The server that is the master."""
        port = self.master_port()
        return next(server for server in self.servers if server.port == port)

    def kill_master(self) -> None:
        """End the master at once."""
        self._before = self.master_port()
        self.master().kill()

    def freeze_master(self) -> None:
        """Have the master hold still: connections stay open and nothing answers."""
        self._before = self.master_port()
        self._frozen = self.master()
        self._frozen.freeze()

    def thaw_master(self) -> None:
        """Let the one go on that was frozen. Where another is master by now it still takes itself for one, for
        some ten seconds: then the sentinels tell it.
        """
        assert self._frozen is not None, "nothing was frozen"
        self._frozen.thaw()

    async def wait_for_failover(self) -> None:
        """Wait until all sentinels name another master than before the last kill or freeze, and it is one."""
        await asyncio.to_thread(wait_until, self._has_failed_over, "the master is replaced", within=20)

    def _has_failed_over(self) -> bool:
        named = {self._master_port(i) for i in range(SENTINELS)}
        if len(named) > 1 or self._before in named:
            return False
        with self.master().client() as client:
            return client.info("replication")["role"] == "master"

    def _master_port(self, i: int) -> int:
        with self._client(i) as client:
            return client.sentinel_get_master_addr_by_name(NAME)[1]

    def _is_ready(self, i: int) -> bool:
        self._sentinels[i].check()
        with self._client(i) as client:
            assert client.info("server")["process_id"] == self._sentinels[i].pid
            client.sentinel_ckquorum(NAME)
            (replica,) = client.sentinel_slaves(NAME)
            return replica["master-link-status"] == "ok" and client.sentinel_master(NAME)["num-other-sentinels"] == 2

    def _client(self, i: int) -> Redis:
        return Redis(
            host="127.0.0.1",
            port=self._ports[i],
            decode_responses=True,
            socket_timeout=5,
            retry=Retry(NoBackoff(), 0),
        )


@contextmanager
def run_sentinel(program: str) -> Iterator[Sentinel]:
    """A master under Sentinel for as long as the block runs."""
    with TemporaryDirectory(prefix="router-") as folder:
        sentinel = Sentinel(program, Path(folder))
        try:
            sentinel.start()
            yield sentinel
        finally:
            sentinel.stop()
            drop_connections()
