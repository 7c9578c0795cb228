"""What is done for all connections every second. Clocks are moved by hand, ports are fakes."""

import asyncio
import json

import pytest

from router import CloseCode, Identity
from router.brokers.memory import MemoryBroker
from router.catalog import Catalog
from router.flow import Router
from router.session import Session, topics_of
from router.testing import Clock
from router.upkeep import WARN_BEFORE, WARN_SPREAD, Upkeep


class FakePort:
    framed = False

    def __init__(self):
        self.frames, self.ended = [], None

    def write(self, data):
        self.frames.append(json.loads(data))

    def backlog(self):
        return 0

    def close(self, code, reason):
        self.ended = (code, reason)

    def abort(self):
        self.ended = "aborted"


class Stage:
    """A node with one session and clocks that stand still."""

    def __init__(self, expires_in=float("inf"), *, plain=False):
        self.clock = Clock()
        self.router = Router(
            Catalog([]), MemoryBroker(clock=self.clock), self.authenticate, clock=self.clock, wall=self.clock
        )
        self.upkeep = Upkeep(self.router, clock=self.clock, wall=self.clock)
        self.heard_at = float("inf")
        self.port = FakePort()
        identity = Identity("ada", frozenset({"view"}), self.clock.now + expires_in)
        self.session = Session("s", identity, "p", plain=plain, topics=topics_of("p", "ada"))

    async def authenticate(self, _token, _project):
        return Identity("ada", frozenset({"view"}), self.clock.now + 600.0)

    async def open(self):
        await self.router.start()
        await self.router.open(self.session, self.port, None, 30.0)
        self.upkeep.add(self.session)
        self.port.heard = lambda: self.heard_at
        self.port.frames.clear()
        return self

    async def pass_time(self, seconds):
        for _ in range(int(seconds)):
            self.clock.move(1.0)
            await self.upkeep.tick()

    @property
    def types(self):
        return [frame["type"] for frame in self.port.frames]


async def test_every_connection_is_pinged_once_in_thirty_seconds():
    stage = await Stage(plain=True).open()
    await stage.pass_time(29)
    assert stage.types == []
    await stage.pass_time(1)
    assert stage.types == ["ping"]
    await stage.pass_time(30)
    assert stage.types == ["ping", "ping"]


async def test_a_connection_from_which_nothing_comes_is_cut():
    stage = await Stage().open()
    stage.heard_at = stage.clock.now
    await stage.pass_time(60)
    assert stage.port.ended is None
    await stage.pass_time(30)
    assert stage.port.ended == "aborted"


async def test_an_expiring_token_is_asked_for_anew_and_ends_the_connection_after_the_grace():
    stage = await Stage(expires_in=100.0).open()
    await stage.pass_time(100 - WARN_BEFORE - WARN_SPREAD - 1)
    assert "token_expiring" not in stage.types
    await stage.pass_time(WARN_SPREAD + 2)
    assert stage.types.count("token_expiring") == 1
    await stage.pass_time(WARN_BEFORE + 20)
    assert stage.port.ended is None
    await stage.pass_time(10)
    assert stage.port.ended == (CloseCode.UNAUTHENTICATED, "token expired")


async def test_a_refreshed_token_is_watched_like_the_first_one():
    stage = await Stage(expires_in=100.0).open()
    await stage.pass_time(80)
    for _ in range(3):
        await stage.router.receive(stage.session, '{"type":"auth_refresh","token":"t"}')
        assert stage.types[-1] == "token_refreshed"
        stage.port.frames.clear()
        await stage.pass_time(600 - WARN_BEFORE - WARN_SPREAD - 1)
        assert "token_expiring" not in stage.types
        await stage.pass_time(WARN_SPREAD + 2)
        assert stage.types.count("token_expiring") == 1
    assert stage.port.ended is None
    await stage.pass_time(WARN_BEFORE + 26)
    assert stage.port.ended == (CloseCode.UNAUTHENTICATED, "token expired")


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_slow_client_is_cut_at_the_deadline_unless_it_reads_again(comes_back):
    stage = await Stage().open()
    stage.router.slow(stage.session)
    await stage.pass_time(29)
    if comes_back:
        stage.router.resume(stage.session)
    await stage.pass_time(2)
    assert stage.port.ended == (None if comes_back else "aborted")


async def test_nobody_waits_for_a_broker_that_does_not_say_who_has_left():
    stage = await Stage().open()
    asked = []

    async def silent():
        asked.append(1)
        await asyncio.Event().wait()

    stage.router.presence.tick = silent
    await stage.pass_time(30)
    await asyncio.sleep(0)
    assert (stage.types, asked) == (["ping"], [1])
    running = asyncio.create_task(stage.upkeep.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert stage.upkeep._telling.cancelled()
