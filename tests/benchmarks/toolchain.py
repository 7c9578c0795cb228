"""Finds out whether this machine can run the benchmarks, and compiles the two C programs they need."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from msgspec import Struct

__all__ = ["LOAD", "YARDSTICK", "Cores", "Unfit", "prepare"]

HERE = Path(__file__).parent
LOAD = HERE / "bin" / "wsload"
YARDSTICK = HERE / "bin" / "climit"


class Unfit(Exception):
    """Raised where the machine lacks something; the text says what."""


class Cores(Struct, frozen=True):
    """Which core the server under test has, and which one the load."""

    server: int
    load: int


def prepare() -> Cores:
    """Compile what is missing or older than its source; raise `Unfit` where nothing could be measured here."""
    if not sys.platform.startswith("linux"):
        raise Unfit("Linux is needed: the C programs use epoll.")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Unfit("two cores are needed: on one, the load would take its time from the server it measures.")
    compiler = shutil.which("gcc")
    if compiler is None:
        raise Unfit(
            "gcc is needed to compile the load client and the yardstick (on Debian: apt install gcc libc6-dev)."
        )
    for program in (LOAD, YARDSTICK):
        compile_c(compiler, HERE / f"{program.name}.c", program)
    raise_file_limit()
    return Cores(server=cores[0], load=cores[1])


def compile_c(compiler: str, source: Path, program: Path) -> None:
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return
    program.parent.mkdir(exist_ok=True)
    # Beside its place first: a compiler that is interrupted must not leave half a program that looks up to date.
    fresh = program.with_suffix(".new")
    command = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise Unfit(f"gcc cannot compile {source.name}:\n{done.stderr}")
    fresh.replace(program)


def raise_file_limit() -> None:
    """A connection is an open file on both sides; the servers inherit this limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
