"""What a page shows of an answer that began before it was opened, in a real Chromium."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.journeys.chromium import Browser, Page

pytestmark = pytest.mark.browser

OPEN = "document.querySelectorAll('[data-state=open]').length === 2"

ROUNDS = 3

GATE = """{
    const fetched = window.fetch;
    const opened = new Promise((go) => { window.go = go; });
    window.waiting = 0;
    window.fetch = async (path, options) => {
        const answer = await fetched(path, options);
        if (String(path).includes("/demo/token")) {
            window.waiting += 1;
            await opened;
        }
        return answer;
    };
}"""
"""Has the demo page connect when `go()` is called: how long Chromium takes to load a page is not known to 100 ms."""

TAPPED = """{
    window.sockets = [];
    const Real = window.WebSocket;
    window.WebSocket = function (...given) {
        const socket = new Real(...given);
        window.sockets.push(socket);
        return socket;
    };
}"""
"""Keeps the page's sockets, so that a test can say something in the server's place."""

LOADER = """(async () => {
    const { RouterClient, store } = await import("/client/router.js");
    const fetchToken = async () => (await (await fetch("/demo/token?user=ada")).json()).token;
    const client = new RouterClient({ project: "demo", token: fetchToken, since: 0 });
    const live = store(client);
    const loaded = Object.assign(document.createElement("p"), { id: "loaded" });
    document.body.append(loaded);
    live.subscribe(({ messages }) => { loaded.textContent = messages.map(({ content }) => content).join("|"); });
    client.on("resync", async () => {
        const content = await Promise.resolve(Array.from({ length: 2500 }, (_, n) => `${n} `).join(""));
        live.set({ messages: [{ role: "assistant", content, stream_id: "s", streaming: true }] });
    });
    client.connect();
})()"""
"""A client of the demo page's own project whose text so far is kept somewhere."""


def piece(text: str, *, last: bool = False) -> dict[str, object]:
    return {"type": "chat_response_chunk", "stream_id": "s", "content": text, "is_complete": last}


def progress(done: float) -> dict[str, object]:
    return {"type": "step_progress", "step_id": "s1", "progress": done}


class Publisher:
    """A backend of the demo."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def publish(self, *events: dict[str, object]) -> None:
        response = await self._http.post("/projects/demo/events", json=events)
        assert response.status_code == 202, response.text


@pytest.fixture
async def backend(dev_server: str) -> AsyncIterator[Publisher]:
    async with httpx.AsyncClient(base_url=dev_server) as http:
        token = (await http.get("/demo/token", params={"user": "ada"})).json()["token"]
        http.headers["Authorization"] = f"Bearer {token}"
        yield Publisher(http)


async def answers(page: Page) -> list[list[str]]:
    """The answers that each of the two people on a page is shown."""
    return await page.evaluate(
        "['ada', 'grace'].map(person =>"
        " [...document.querySelectorAll(`[data-viewer=${person}] [data-answer]`)].map(found => found.textContent))"
    )


async def complete(page: Page, count: int) -> None:
    """Wait until both people on a page are shown `count` answers up to their end."""
    await page.until(
        "['ada', 'grace'].every(person =>"
        f" document.querySelectorAll(`[data-viewer=${{person}}] [data-answer=complete]`).length === {count})"
    )


@asynccontextmanager
async def gated(browser: Browser, url: str) -> AsyncIterator[Page]:
    """The demo page, about to connect: `go()` has it do so."""
    async with browser.page("data:text/html,") as page:
        await page.call("Page.addScriptToEvaluateOnNewDocument", source=GATE)
        await page.call("Page.navigate", url=url)
        await page.until("window.waiting === 2")
        yield page


async def test_two_pages_that_are_opened_100_ms_apart_in_the_middle_of_an_answer_show_the_same(
    chromium: str, dev_server: str, backend: Publisher
) -> None:
    """D1: the second page missed the words that went out between the two, while progress was held back."""
    async with Browser(chromium) as browser, browser.page(dev_server) as watcher:
        await watcher.until(OPEN)
        for number in range(1, ROUNDS + 1):
            async with gated(browser, dev_server) as first, gated(browser, dev_server) as second:
                await backend.publish(progress(0.1), progress(0.2), piece(f"answer {number}: "), piece("one "))
                await first.evaluate("go()")
                await asyncio.sleep(0.1)
                await second.evaluate("go()")
                for page in (first, second):
                    await page.until(OPEN)
                await backend.publish(piece("two "), piece("three", last=True))
                whole = [f"answer {each}: one two three" for each in range(1, number + 1)]
                for page in (watcher, first, second):
                    await complete(page, number)
                    assert await answers(page) == [whole, whole]
            await backend.publish({"type": "step_completed", "step_id": "s1"})


async def test_a_page_that_is_opened_after_2500_pieces_is_told_and_shows_no_text_without_its_beginning(
    chromium: str, dev_server: str, backend: Publisher
) -> None:
    """D25: it was shown the last thousand pieces, as if the answer began there."""
    for start in range(0, 2500, 500):
        await backend.publish(*(piece(f"{number} ") for number in range(start, start + 500)))
    so_far = "".join(f"{number} " for number in range(2500))
    async with Browser(chromium) as browser, browser.page(dev_server) as page:
        await page.until(OPEN)
        # A step is shown only when all that came before it has been.
        await backend.publish({"type": "step_started", "step_id": "now"})
        await page.until("document.querySelectorAll('[data-step=now]').length === 2")
        assert await answers(page) == [[], []]
        assert await page.evaluate("document.querySelectorAll('[data-toast=info]').length") == 2
        await page.evaluate(LOADER)
        await page.until("loaded.textContent.endsWith('2499 ')")

        await backend.publish(piece("2500 "), piece("2501 "))
        await backend.publish(piece("the end", last=True))
        await page.until("loaded.textContent.includes('the end')")
        assert await page.evaluate("loaded.textContent") == f"{so_far}2500 2501 the end"

        await backend.publish(piece("The next "), piece("answer", last=True))
        await complete(page, 1)
        assert await answers(page) == [["The next answer"], ["The next answer"]]
        assert not await page.evaluate("document.querySelector('[data-toast=warning], [data-toast=alert]') !== null")


async def test_a_page_that_is_told_to_begin_anew_still_shows_everybody_who_is_here(
    chromium: str, dev_server: str
) -> None:
    """Who is here is in no history, so nothing that follows says it again."""
    async with Browser(chromium) as browser, browser.page("data:text/html,") as page:
        await page.call("Page.addScriptToEvaluateOnNewDocument", source=TAPPED)
        await page.call("Page.navigate", url=dev_server)
        here = "document.querySelectorAll('[data-viewer=ada] [data-person]').length === 2"
        await page.until(f"window.sockets.length === 2 && {OPEN} && {here}")
        told = {"type": "resync", "epoch": "another", "pos": 0, "reason": "the numbering has started anew"}
        before = await page.evaluate(
            f"window.sockets.forEach(each => each.onmessage({{ data: JSON.stringify({json.dumps(told)}) }})), {here}"
        )
        assert not before
        await page.until(here)
