"""Runs the JavaScript of the README and of the how-to against a real node, as a page of that node would."""

import asyncio
from pathlib import Path

import pytest

from tests.docs.blocks import blocks
from tests.docs.generate import ROOT
from tests.docs.javascript import run_script
from tests.node import Node, make_token, run_node

pytestmark = pytest.mark.node

README = ROOT / "README.md"
HOW_TO = ROOT / "docs" / "how-to" / "connect-from-a-browser.md"

PROGRESS = {"type": "step_progress", "step_id": "s1", "progress": 0.45}
CHUNK = {"type": "chat_response_chunk", "content": "Here are ", "is_complete": False}


def code(path: Path, which: str) -> str:
    """The one block that says `which`."""
    [found] = [block.text for block in blocks(path, "js") if which in block.text]
    return found


def constants(node: Node) -> dict[str, str]:
    """What the pages' code takes as given."""
    token = make_token()
    return {
        "origin": f'"{node.url}"',
        "project": '"p1"',
        "token": f'"{token}"',
        "fetchToken": f'async () => "{token}"',
        "loadEverythingAgain": '(reason) => console.log("resync", reason)',
    }


async def test_the_client_of_the_readme_shows_progress(node: Node, tmp_path: Path) -> None:
    await node.publish(PROGRESS)  # before the page is there: `since: 0` brings it
    async with run_script(code(README, "new RouterClient"), node.url, tmp_path, constants(node)) as page:
        await page.until("s1 0.45")


async def test_the_plain_client_of_the_readme_shows_every_event(node: Node, tmp_path: Path) -> None:
    source = code(README, "new WebSocket").replace("ws://127.0.0.1:8000", node.url.replace("http", "ws"))
    async with run_script(source, node.url, tmp_path, constants(node)) as page:
        while not node.router.hub.listening("project:p1"):
            await asyncio.sleep(0.01)
        await node.publish(PROGRESS)
        await page.until("progress: 0.45")


async def test_the_client_of_the_how_to_sends_receives_and_keeps_a_store(node: Node, tmp_path: Path) -> None:
    source = code(HOW_TO, "since: 0") + code(HOW_TO, "store(client)")
    async with run_script(source, node.url, tmp_path, constants(node)) as page, node.client() as ada:
        said = await ada.event("chat_message")
        assert (said["content"], said["user_id"]) == ("Show me top customers by revenue", "ada")
        await page.until("connection open")
        await node.publish(PROGRESS)
        await node.publish(CHUNK)
        await page.until("s1 0.45")
        await page.until("Here are ")
        await page.until("open 1 2")


async def test_the_store_of_the_how_to_adds_the_rest_of_an_answer_to_what_was_loaded_and_shows_no_other(
    tmp_path: Path,
) -> None:
    def piece(stream: str, content: str, *, last: bool = False) -> dict[str, object]:
        return {**CHUNK, "stream_id": stream, "content": content, "is_complete": last}

    loading = {
        "loadState": """async () => ({
          messages: [{ role: "assistant", stream_id: "kept", content: "All that went before, ", streaming: true }],
        })""",
        "texts": """({ messages }) => {
          const answers = messages.filter(({ role }) => role === "assistant");
          console.log("texts", answers.map(({ content }) => content).join("|"));
        }""",
    }
    source = code(HOW_TO, "since: 0") + code(HOW_TO, "store(client)") + code(HOW_TO, "live.set")
    async with run_node(history_events=20) as node:
        await node.publish(*(piece(stream, "word ") for _ in range(20) for stream in ("kept", "forgotten")))
        given = {**constants(node), **loading}
        async with run_script(source + "live.subscribe(texts);", node.url, tmp_path, given) as page:
            await page.until("texts All that went before, ")
            await node.publish(piece("forgotten", "torn "), piece("kept", "and the rest", last=True))
            await page.until("texts All that went before, and the rest")
            await node.publish(piece("forgotten", "torn", last=True), piece("forgotten", "the next", last=True))
            await page.until("texts All that went before, and the rest|the next")
            assert "word" not in page.said
            assert "torn" not in page.said


async def test_the_page_with_a_state_of_its_own_misses_nothing_that_happens_while_it_loads(
    node: Node, tmp_path: Path
) -> None:
    step = {"type": "step_completed", "step_id": "before"}
    await node.publish(step)
    loading = {
        "show": '(state) => console.log("loaded", state)',
        # The state is loaded when somebody has published what is not in it.
        "loadState": """async (project) => {
          console.log("loading");
          while (!globalThis.more) {
            const { pos } = await (await fetch(`/projects/${project}/position`, { headers })).json();
            globalThis.more = pos > 1;
          }
          return "the state";
        }""",
    }
    source = 'import { RouterClient } from "/client/router.js";\n' + code(HOW_TO, "/position")
    async with run_script(source, node.url, tmp_path, {**constants(node), **loading}) as page:
        await page.until("loading")
        await node.publish({**step, "step_id": "meanwhile"})
        await page.until("loaded the state")
        await page.until("completed meanwhile")
        assert "completed before" not in page.said


async def test_the_plain_client_of_the_how_to_sends_and_receives(node: Node, tmp_path: Path) -> None:
    source = code(HOW_TO, "new WebSocket")
    async with node.client() as ada, run_script(source, node.url, tmp_path, constants(node)) as page:
        assert (await ada.event("chat_message"))["content"] == "hello"
        await node.publish(PROGRESS)
        await page.until("plain s1 0.45")
