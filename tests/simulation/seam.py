"""Clocks and chance of the process, in the simulation's hands. To be installed before anything of the router is imported."""

import contextvars
import datetime
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["HOST", "adopt", "install", "offsets", "real_clock", "real_time", "reseed", "set_loop"]

HOST: contextvars.ContextVar[str] = contextvars.ContextVar("host", default="world")
"""On whose machine the running code is. Tasks and callbacks inherit it."""

BEGIN = 1_795_442_400.0
"""The wall clock when a world begins."""

offsets: dict[str, float] = {}
"""By how much a host's wall clock is wrong."""

real_time = time.time
real_clock = time.monotonic
_now: Callable[[], float] = lambda: 0.0
_chance = random.Random()
_real_datetime = datetime.datetime


def set_loop(now: Callable[[], float]) -> None:
    """Whose time it is from now on."""
    global _now
    _now = now


def reseed(seed: int) -> None:
    """Have all chance of the program follow from `seed`."""
    random.seed(f"program {seed}")
    _chance.seed(f"entropy {seed}")
    offsets.clear()


def _time() -> float:
    return BEGIN + _now() + (offsets.get(HOST.get(), 0.0) if offsets else 0.0)


def _monotonic() -> float:
    return _now()


def _urandom(size: int) -> bytes:
    return _chance.randbytes(size)


class _Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return _real_datetime.fromtimestamp(_time(), tz)


def install() -> None:
    """Put the virtual clocks and chance in the place of the real ones."""
    time.time = _time
    time.monotonic = _monotonic
    time.perf_counter = _monotonic
    os.urandom = _urandom
    random._urandom = _urandom  # what `secrets` draws from


def adopt(packages: Iterable[str]) -> None:
    """Give modules that imported `datetime`, whose clock is in C, one that tells virtual time."""
    names = tuple(packages)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in names and getattr(module, "datetime", None) is _real_datetime:
            module.datetime = _Datetime  # type: ignore[attr-defined]
