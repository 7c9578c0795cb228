"""A Redis Cluster of our own, with what may befall one: masters that die or hold still, slots that move."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import Any

from tests.servers.process import BUS, drop_connections, free_ports, wait_until
from tests.servers.server import Server

__all__ = ["Cluster", "run_cluster"]

MASTERS = 3
SLOTS = ((0, 5460), (5461, 10922), (10923, 16383))
"""First and last slot of each master."""


class Cluster:
    """Three masters that share all slots; with `replicas` a fourth to sixth server, in the same order, each its replica.

    `url` names the masters as they were at the beginning. Nodes are numbered from 0.
    """

    def __init__(self, program: str, folder: Path, *, replicas: bool = False) -> None:
        self.nodes: list[Server] = []
        self._ports = free_ports(2 * MASTERS)
        self._ids = [token_hex(20) for _ in self._ports]
        self._away: set[int] = set()
        self.url = f"redis+cluster://{','.join(f'127.0.0.1:{port}' for port in self._ports[:MASTERS])}"
        # Without replicas nobody could take a dead master's place: the others go on without asking for long.
        patience = 1000 if replicas else 5000
        options = (
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
            *("--cluster-node-timeout", str(patience), "--cluster-replica-validity-factor", "0"),
            *("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"),
        )
        for i in range(2 * MASTERS if replicas else MASTERS):
            own = folder / str(i)
            own.mkdir()
            (own / "nodes.conf").write_text(self._map(i), encoding="ascii")
            self.nodes.append(Server(program, own, *options, port=self._ports[i]))

    def start(self) -> None:
        """Start it and wait until every node says that all is well.

        A master is not let in before it has run for two seconds (CLUSTER_WRITABLE_DELAY in the server's source), a
        replica at once, and one that takes over stays in. So those who are to be masters begin as replicas of the
        others, who exist by name only where no replicas are wanted, and are forgotten then.
        """
        every = range(len(self.nodes))
        for node in self.nodes:
            node.start()
        for i in range(MASTERS):
            wait_until(partial(self._is_well, i), f"node {i} is let in")
            self._ask(i, "CLUSTER", "FAILOVER", "TAKEOVER")
        for i in every:
            wait_until(partial(self._knows_masters, i), f"node {i} knows the masters")
        if len(self.nodes) == MASTERS:
            for i in every:
                for id_ in self._ids[MASTERS:]:
                    self._ask(i, "CLUSTER", "FORGET", id_)
        for i in every:
            wait_until(partial(self._is_well, i), f"node {i} says that all is well")
        for node in self.nodes[MASTERS:]:
            with node.client() as client:
                wait_until(lambda: client.info("replication")["master_link_status"] == "up", "a replica follows")

    def stop(self) -> None:
        """End all nodes."""
        for node in self.nodes:
            node.kill()

    def kill(self, i: int) -> None:
        """End a node at once."""
        self._away.add(i)
        self.nodes[i].kill()

    def restart(self, i: int) -> None:
        """Start a node that was killed. It knows its cluster and none of its data; a master is let in 2 s later."""
        self.nodes[i].start()
        self._away.discard(i)

    def freeze(self, i: int) -> None:
        """Have a node hold still: connections stay open and nothing answers."""
        self._away.add(i)
        self.nodes[i].freeze()

    def thaw(self, i: int) -> None:
        """Let it go on."""
        self.nodes[i].thaw()
        self._away.discard(i)

    def flush(self) -> None:
        """Forget all data."""
        for i in set(self._owners().values()):
            self._ask(i, "FLUSHALL")

    def owner(self, key: str) -> int:
        """The node that is master of a key's slot."""
        return self._owners()[self._slot(key)]

    def move(self, key: str, to: int) -> None:
        """Give a key's slot, with all that is in it, to another master."""
        with self.moving(key, to):
            pass

    @contextmanager
    def moving(self, key: str, to: int) -> Iterator[None]:
        """A key's slot is on its way to another master while the block runs: keys are where they were, and new ones
        go where they are going. When it ends, all has moved.
        """
        slot, owners = self._slot(key), self._owners()
        source, masters = owners[slot], set(owners.values())
        assert to in masters - {source}, f"slot {slot} cannot move from {source} to {to}; masters are {masters}"
        self._ask(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", self._ids[source])
        self._ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self._ids[to])
        try:
            yield
        finally:
            while keys := self._ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
                self._ask(source, "MIGRATE", "127.0.0.1", self._ports[to], "", 0, 5000, "KEYS", *keys)
            for i in (to, source, *(masters - {to, source})):  # the new owner first: else none is, for a moment
                self._ask(i, "CLUSTER", "SETSLOT", slot, "NODE", self._ids[to])

    async def wait_for_failover(self, i: int) -> None:
        """Wait until all who are here see others in the place of a master that was killed or frozen."""
        others = [other for other in range(len(self.nodes)) if other not in self._away]

        def is_over() -> bool:
            return all(self._is_well(j) and i not in self._owners(j).values() for j in others)

        await asyncio.to_thread(wait_until, is_over, f"node {i} is replaced", within=20)

    def _map(self, i: int) -> str:
        """What node `i` knows of all when it starts, in the form in which nodes write it down themselves."""
        lines = []
        for j, id_ in enumerate(self._ids):
            mine = "myself," if i == j else ""
            shard = self._ids[j % MASTERS]  # the same of a master and its replica; not read before Redis 7.2
            place = f"{id_} 127.0.0.1:{self._ports[j]}@{self._ports[j] + BUS},,shard-id={shard} {mine}"
            if j < MASTERS:
                # Epoch 0: the takeover makes it a new one, which beats its master's.
                lines.append(f"{place}slave {self._ids[j + MASTERS]} 0 0 0 connected")
            else:
                first, last = SLOTS[j - MASTERS]
                lines.append(f"{place}master - 0 0 {j} connected {first}-{last}")
        return "\n".join([*lines, f"vars currentEpoch {2 * MASTERS} lastVoteEpoch 0", ""])

    def _slot(self, key: str) -> int:
        return self._ask(self._here(), "CLUSTER", "KEYSLOT", key)

    def _owners(self, told_by: int | None = None) -> dict[int, int]:
        """Every slot's master, as one of the nodes knows it."""
        told = self._ask(self._here() if told_by is None else told_by, "CLUSTER", "SLOTS")
        by_id = {id_: i for i, id_ in enumerate(self._ids)}
        return {slot: by_id[master[2]] for first, last, master, *_ in told for slot in range(first, last + 1)}

    def _here(self) -> int:
        return next(i for i in count() if i not in self._away)

    def _is_well(self, i: int) -> bool:
        return "cluster_state:ok" in self._ask(i, "CLUSTER", "INFO")

    def _knows_masters(self, i: int) -> bool:
        return set(self._owners(i).values()) == set(range(MASTERS))

    def _ask(self, i: int, *command: Any) -> Any:
        with self.nodes[i].client() as client:
            return client.execute_command(*command)


@contextmanager
def run_cluster(program: str, *, replicas: bool = False) -> Iterator[Cluster]:
    """A cluster for as long as the block runs."""
    with TemporaryDirectory(prefix="router-") as folder:
        cluster = Cluster(program, Path(folder), replicas=replicas)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
            drop_connections()
