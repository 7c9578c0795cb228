"""Does what the tutorial says, with the files and commands that are written there."""

import asyncio
import json
import re
import shlex
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from tests.docs.blocks import ENVIRONMENT, blocks
from tests.docs.generate import ROOT
from tests.docs.javascript import run_script

TUTORIAL = ROOT / "docs" / "tutorial" / "first-plugin.md"
FIRST, WITH_HANDLER = (block.text for block in blocks(TUTORIAL, "python"))
AS_LINUS, NO_SUCH_REACTION = (block.text for block in blocks(TUTORIAL, "js"))
SHELL = [block.text.strip() for block in blocks(TUTORIAL, "sh")]


class Terminal:
    """A terminal in the reader's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = ENVIRONMENT

    @asynccontextmanager
    async def start(self, command: str, *more: str) -> AsyncIterator[asyncio.StreamReader]:
        """What a command says that runs until it is ended."""
        process = await asyncio.create_subprocess_exec(
            *shlex.split(command), *more, cwd=self.folder, env=self.environment, stdout=-1, stderr=-2
        )
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.communicate()

    async def run(self, command: str) -> str:
        """What a command says that ends by itself."""
        async with self.start(command) as said:
            return (await asyncio.wait_for(said.read(), 20)).decode()


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[tuple[Terminal, str]]:
    """`router dev` of the tutorial on a free port; a terminal with what it says to paste, and its address."""
    terminal = Terminal(folder)
    [command] = [text for text in SHELL if text.startswith("router dev")]
    async with terminal.start(command, "--port", "0") as said:
        while "export " not in (line := (await asyncio.wait_for(said.readline(), 20)).decode()):
            assert line, "router dev ended"
        pasted = dict(re.findall(r"(ROUTER_\w+)=(\S+)", line))
        terminal.environment = {**terminal.environment, **pasted}
        yield terminal, pasted["ROUTER_URL"]


async def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "my_plugins").mkdir()
    (tmp_path / "my_plugins" / "reaction.py").write_text(FIRST)
    [listing] = [text for text in SHELL if text.startswith("router plugins")]
    [tail] = [text for text in SHELL if text.startswith("router tail")]
    good, bad = [text for text in SHELL if text.startswith("router publish")]
    assert (await Terminal(tmp_path).run(listing)).splitlines()[-1].split()[0] == "reaction"

    async with started(tmp_path) as (terminal, url), AsyncExitStack() as tails:
        windows = [await tails.enter_async_context(terminal.start(tail)) for _ in range(2)]
        for window in windows:
            await shown(window, "welcome")
        assert "published, seq 1" in await terminal.run(good)
        [promised] = blocks(TUTORIAL, "json")
        for window in windows:
            assert await shown(window, "reaction") == json.loads(promised.text)
        assert "`emoji`" in await terminal.run(bad)
        async with run_script(AS_LINUS, url, tmp_path, {}) as page:
            await page.until("🎉 from grace")

    (tmp_path / "my_plugins" / "reaction.py").write_text(WITH_HANDLER)
    async with started(tmp_path) as (_, url), run_script(AS_LINUS + NO_SUCH_REACTION, url, tmp_path, {}) as page:
        await page.until("🎉 from linus")
        await page.until("no_such_reaction there is no such reaction")


async def shown(window: asyncio.StreamReader, kind: str) -> dict[str, object]:
    """The next event of a type that `router tail` shows."""
    while True:
        line = await asyncio.wait_for(window.readline(), 20)
        assert line.startswith(b"{"), line
        event = json.loads(line)
        if event["type"] == kind:
            return event
