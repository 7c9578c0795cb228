"""Where a random ordeal takes place: Redis of one kind, two nodes, and what can be done to them."""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tests.ordeal.process import NodeProcess
from tests.ordeal.schedule import RESTARTS, SEATS, Fault, Schedule
from tests.servers import BlackHole, Cluster, Sentinel, Server, black_hole, run_cluster, run_sentinel

__all__ = ["Site", "run_site"]

TORN = 2_000
"""At most so many bytes are missing at the end of a log that was being written when the power failed."""


class Site:
    """The servers of one ordeal. Whatever is done to them is over when `befall` returns."""

    def __init__(self, schedule: Schedule, folder: Path) -> None:
        self.schedule = schedule
        self.folder = folder
        self.nodes: list[NodeProcess] = []
        self.url = ""
        """The way of the backends."""
        self.holes: list[BlackHole] = []
        self.single: Server | None = None
        self.sentinel: Sentinel | None = None
        self.cluster: Cluster | None = None
        self._turn = asyncio.Lock()
        """Held while a server is away or a slot moves: nobody can move one from a server that is not there."""
        self._random = random.Random(f"site:{schedule.seed}")
        self._done: dict[str, Callable[[Fault], Any]] = {
            "kill_node": self._kill_node,
            "stop_node": self._stop_node,
            "freeze_node": self._freeze_node,
            "deafen": lambda _: self._each("CLIENT", "KILL", "TYPE", "pubsub"),
            "reset": self._reset,
            "flush": lambda _: self._each("FLUSHALL"),
            "read_only": self._read_only,
            "full": self._full,
            "swallow": self._swallow,
            "freeze_redis": self._freeze_redis,
            "remember": self._restart,
            "forget": self._restart,
            "age": self._restart,
            "tear": self._restart,
            "fail_over": self._fail_over,
            "fail_over_frozen": self._fail_over,
            "move_slot": self._move_slot,
        }

    async def befall(self, fault: Fault) -> None:
        """Do it, and return when it is over."""
        async with self._turn if fault.kind in RESTARTS else nullcontext():
            await self._done[fault.kind](fault)

    # -- to nodes

    async def _kill_node(self, fault: Fault) -> None:
        node = self.nodes[fault.which]
        node.kill()
        await asyncio.sleep(fault.lasts)
        node.start()  # when it is ready is its own affair

    async def _stop_node(self, fault: Fault) -> None:
        node = self.nodes[fault.which]
        await node.terminate()
        await asyncio.sleep(fault.lasts)
        node.start()

    async def _freeze_node(self, fault: Fault) -> None:
        node = self.nodes[fault.which]
        node.freeze()
        await asyncio.sleep(fault.lasts)
        node.thaw()

    # -- to every kind of Redis

    def servers(self) -> list[Server]:
        """All that may hold data."""
        if self.sentinel is not None:
            return self.sentinel.servers
        if self.cluster is not None:
            return self.cluster.nodes
        assert self.single is not None
        return [self.single]

    async def _each(self, *command: Any) -> None:
        """Say something to every server; one that is away or a replica need not hear it."""
        await asyncio.gather(*(asyncio.to_thread(self._say, server, *command) for server in self.servers()))

    def _say(self, server: Server, *command: Any) -> None:
        # Not through `client`, which waits long for one that is frozen.
        retry = Retry(NoBackoff(), 0)
        with suppress(RedisError, OSError), Redis(port=server.port, socket_timeout=1, retry=retry) as client:
            client.execute_command(*command)

    async def _reset(self, fault: Fault) -> None:
        if self.holes:
            self.holes[fault.which].cut()
        else:
            await self._each("CLIENT", "KILL", "TYPE", "normal")
            await self._each("CLIENT", "KILL", "TYPE", "pubsub")

    async def _read_only(self, fault: Fault) -> None:
        if self.single is not None and fault.which:
            await self._each("REPLICAOF", "127.0.0.1", "1")
            await asyncio.sleep(fault.lasts)
            await self._each("REPLICAOF", "NO", "ONE")
        else:
            await self._each("CONFIG", "SET", "min-replicas-to-write", "3")
            await asyncio.sleep(fault.lasts)
            await self._each("CONFIG", "SET", "min-replicas-to-write", "0")

    async def _full(self, fault: Fault) -> None:
        await self._each("CONFIG", "SET", "maxmemory", "1")
        await asyncio.sleep(fault.lasts)
        await self._each("CONFIG", "SET", "maxmemory", "0")

    # -- to one Redis

    async def _swallow(self, fault: Fault) -> None:
        hole = self.holes[fault.which]
        hole.swallow()
        await asyncio.sleep(fault.lasts)
        hole.restore()
        hole.cut()  # what was swallowed is missing in every stream: such connections cannot go on

    async def _freeze_redis(self, fault: Fault) -> None:
        assert self.single is not None
        self.single.freeze()
        await asyncio.sleep(fault.lasts)
        self.single.thaw()

    async def _restart(self, fault: Fault) -> None:
        """Killed, and back with all, nothing, an older state, or without the last moments of its log."""
        assert self.single is not None
        data, old = self.folder / "redis", self.folder / "old"
        kept = [data / "appendonlydir"] if self.schedule.log else [data / "dump.rdb"]
        if fault.kind == "age" or (fault.kind == "tear" and not self.schedule.log):
            await asyncio.to_thread(self._say, self.single, "SAVE")
            _copy(kept, old)
            await asyncio.sleep(fault.lead if fault.kind == "age" else 0.05)
        elif fault.kind == "remember" and not self.schedule.log:
            await asyncio.to_thread(self._say, self.single, "SHUTDOWN", "SAVE")  # nothing comes between the two
        self.single.kill()
        await asyncio.sleep(fault.lasts)
        if fault.kind == "forget":
            _remove(kept)
        elif fault.kind == "age":
            _remove(kept)
            _copy([old / each.name for each in kept], data)
        elif fault.kind == "tear" and self.schedule.log:
            for log in (data / "appendonlydir").glob("*.incr.aof"):
                size = log.stat().st_size
                with log.open("r+b") as file:
                    file.truncate(max(0, size - self._random.randrange(1, TORN)))
        await asyncio.to_thread(self.single.start)

    # -- to several

    async def _fail_over(self, fault: Fault) -> None:
        if self.sentinel is not None:
            before = self.sentinel.master()
            if fault.kind == "fail_over_frozen":
                self.sentinel.freeze_master()
                await self.sentinel.wait_for_failover()
                await asyncio.sleep(fault.lasts)
                self.sentinel.thaw_master()
            else:
                self.sentinel.kill_master()
                await self.sentinel.wait_for_failover()
                await asyncio.sleep(fault.lasts)
                await asyncio.to_thread(before.start)
            return
        assert self.cluster is not None
        owner = await asyncio.to_thread(self.cluster.owner, self._key(0))
        self.cluster.kill(owner)
        await self.cluster.wait_for_failover(owner)
        await asyncio.sleep(fault.lasts)
        await asyncio.to_thread(self.cluster.restart, owner)

    async def _move_slot(self, fault: Fault) -> None:
        assert self.cluster is not None
        key = self._key(fault.which)

        def move() -> None:
            assert self.cluster is not None
            owner = self.cluster.owner(key)
            other = next(each for each in sorted(set(self.cluster._owners().values())) if each != owner)
            self.cluster.move(key, other)

        await asyncio.to_thread(move)

    def _key(self, project: int) -> str:
        return f"router:{{project:{project_of(project)}}}:meta"


def project_of(number: int) -> str:
    """Its name."""
    return f"p{number}"


def _copy(paths: list[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in paths:
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
            shutil.copytree(path, folder / path.name)
        elif path.exists():
            shutil.copy(path, folder / path.name)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@asynccontextmanager
async def run_site(program: str, schedule: Schedule) -> AsyncIterator[Site]:
    """All servers and both nodes, ready, for as long as the block runs."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="router-", ignore_cleanup_errors=True)))
        site = Site(schedule, folder)
        ways = []
        if schedule.on == "sentinel":
            site.sentinel = stack.enter_context(run_sentinel(program))
            site.url = site.sentinel.url
        elif schedule.on == "cluster":
            failing = any(fault.kind == "fail_over" for fault in schedule.faults)
            site.cluster = stack.enter_context(run_cluster(program, replicas=failing))
            site.url = site.cluster.url + ("?sharded=yes" if schedule.sharded else "")
        else:
            options = ("--appendonly", "yes", "--appendfsync", "always") if schedule.log else ()
            data = folder / "redis"
            data.mkdir()
            site.single = Server(program, data, *options)
            stack.callback(site.single.kill)
            site.single.start()
            site.url = site.single.url
            if {"swallow", "reset"} & set(schedule.allowed):
                site.holes = [await stack.enter_async_context(black_hole(site.single)) for _ in range(2)]
                ways = [hole.url for hole in site.holes]
        for number, way in enumerate(ways or [site.url] * 2):
            node = NodeProcess(folder / f"node{number}", way, **SEATS, **schedule.settings)
            stack.push_async_callback(node.stop)
            site.nodes.append(node)
            node.start()
        await asyncio.gather(*(node.wait() for node in site.nodes))
        yield site
