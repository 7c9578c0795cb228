"""What people see: the demo page of `router dev` in a real Chromium."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.journeys.chromium import Browser, Page

pytestmark = pytest.mark.browser

ADA = "[data-viewer=ada]"
GRACE = "[data-viewer=grace]"
BOTH = (ADA, GRACE)

RUN = 30.0
"""Seconds that the scripted run may take."""


@pytest.fixture
async def page(chromium: str, dev_server: str) -> AsyncIterator[Page]:
    """The demo page, with both viewers connected."""
    async with Browser(chromium) as browser, browser.page(dev_server) as page:
        await page.until(both("[data-state=open]"))
        yield page


def exists(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)}) !== null"


def both(selector: str) -> str:
    """That both viewers show what `selector` finds, at the same moment."""
    return " && ".join(exists(f"{viewer} {selector}") for viewer in BOTH)


def texts(selector: str) -> str:
    return f"[...document.querySelectorAll({json.dumps(selector)})].map(found => found.textContent)"


async def publish(page: Page, event: dict[str, object]) -> str:
    """Publish through the page's form. Returns what it shows as the answer."""
    await page.evaluate("document.querySelector('[data-publish-answer]').textContent = ''")
    await page.type("[data-publish-event]", json.dumps(event))
    await page.click("[data-publish-button]")
    answer = await page.until("document.querySelector('[data-publish-answer]').textContent")
    assert isinstance(answer, str)
    return answer


async def test_two_people_see_a_run_at_once_and_each_other(page: Page) -> None:
    await page.click("[data-run]")
    await page.until(both("[data-step=s1][data-status=running]"))
    await page.until(both("[data-step=s1][data-status=completed]"), RUN)
    await page.until(both("[data-answer=streaming]"), RUN)
    await page.until(both("[data-answer=complete]"), RUN)
    await page.until(both("[data-toast=success]"), RUN)
    for person in ("ada", "grace"):
        await page.until(both(f"[data-person={person}]"))
    for part in ("[data-answer]", "[data-step] b", "[data-step] .note"):
        ada, grace = [await page.evaluate(texts(f"{viewer} {part}")) for viewer in BOTH]
        assert ada == grace != [], part


async def test_what_one_says_the_other_reads_with_the_name(page: Page) -> None:
    await page.type(f"{GRACE} [data-say] input", "Which step failed?")
    await page.click(f"{GRACE} [data-say] button")
    await page.until(both("[data-message=grace]"))
    for viewer in BOTH:
        assert await page.evaluate(texts(f"{viewer} [data-message]")) == ["Which step failed?"]


async def test_what_is_published_through_the_form_arrives_and_what_is_wrong_is_said(page: Page) -> None:
    answer = await publish(page, {"type": "step_progress", "step_id": "by-hand", "progress": 0.45})
    assert answer.startswith("202 · seq ")
    await page.until(both("[data-step=by-hand][data-status=running]"))
    for viewer in BOTH:
        assert await page.evaluate(texts(f"{viewer} [data-step=by-hand] .percent")) == ["45 %"]
    answer = await publish(page, {"type": "step_progress", "step_id": "by-hand", "progress": 45})
    assert answer.startswith("400 ")
    assert "$.progress" in answer
    # Chromium lists a 400 among the page's errors; this one was meant.
    page.problems[:] = [problem for problem in page.problems if "400" not in problem]


async def test_markup_in_data_stays_text(page: Page) -> None:
    evil = "<img src=x onerror='document.title = \"owned\"'>"
    await publish(page, {"type": "chat_message", "role": "user", "content": evil, "user_id": evil})
    await publish(page, {"type": "step_error", "step_id": "s9", "error": evil})
    await publish(page, {"type": "notification", "level": "info", "title": evil, "message": evil})
    await page.until(both("[data-toast=info]"))
    assert evil in await page.evaluate(texts(f"{ADA} [data-message]"))
    assert await page.evaluate("document.images.length") == 0
    assert "owned" not in await page.evaluate("document.title")


async def test_a_dropped_viewer_comes_back_and_has_missed_nothing(page: Page) -> None:
    await page.click("[data-run]")
    await page.until(exists(f"{GRACE} [data-step=s1][data-status=running]"))
    await page.click(f"{GRACE} [data-drop]")
    await page.until(exists(f"{GRACE} [data-state=waiting]"))
    await page.type(f"{GRACE} [data-say] input", "said while away")
    await page.click(f"{GRACE} [data-say] button")
    await publish(page, {"type": "chat_message", "role": "user", "content": "missed", "user_id": "ada"})
    await page.until(exists(f"{ADA} [data-message=ada]"))
    await page.until(exists(f"{ADA} [data-step=s1][data-status=completed]"), RUN)
    assert not await page.evaluate(exists(f"{GRACE} [data-message]"))
    await page.click(f"{GRACE} [data-drop]")
    await page.until(exists(f"{GRACE} [data-state=open]"))
    # Dropped again in the middle of the answer: no piece of it may be lost or come twice.
    await page.until(exists(f"{GRACE} [data-answer=streaming]"), RUN)
    await page.click(f"{GRACE} [data-drop]")
    await page.until(exists(f"{ADA} [data-toast=success]"), RUN)
    await page.click(f"{GRACE} [data-drop]")
    await page.until(exists(f"{GRACE} [data-toast=success]"))
    for part in ("[data-answer]", "[data-message]", "[data-step] b", "[data-step] .note"):
        ada, grace = [await page.evaluate(texts(f"{viewer} {part}")) for viewer in BOTH]
        assert ada == grace != [], part
    assert "missed" in await page.evaluate(texts(f"{GRACE} [data-message]"))
    assert "said while away" in await page.evaluate(texts(f"{ADA} [data-message=grace]"))
    assert not await page.evaluate(exists("[data-toast=warning], [data-toast=alert]"))


ANSWER_WHILE_A_STEP_RUNS = """(async () => {
    const { token } = await (await fetch("/demo/token?user=ada")).json();
    const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
    for (let n = 0; n < 100; n++) {
        const body = JSON.stringify([
            { type: "step_progress", step_id: "s1", progress: n / 100 },
            { type: "chat_response_chunk", content: `${n} `, is_complete: n === 99 },
        ]);
        await fetch("/projects/demo/events", { method: "POST", headers, body });
        await new Promise((done) => setTimeout(done, 30));
    }
})()"""


async def test_an_answer_is_whole_after_many_drops_while_positions_lag_behind(page: Page) -> None:
    """Progress that waits for its second holds positions back, so each return is asked what it has beyond."""
    publishing = asyncio.create_task(page.evaluate(ANSWER_WHILE_A_STEP_RUNS))
    await page.until(exists(f"{GRACE} [data-answer=streaming]"))
    for _ in range(5):
        await page.click(f"{GRACE} [data-drop]")
        await page.until(exists(f"{GRACE} [data-state=waiting]"))
        await page.click(f"{GRACE} [data-drop]")
        await page.until(exists(f"{GRACE} [data-state=open]"))
        await asyncio.sleep(0.2)
    assert not publishing.done(), "the drops were to happen while the answer streamed"
    await publishing
    await page.until(both("[data-answer=complete]"))
    whole = [" ".join(map(str, range(100))) + " "]
    for viewer in BOTH:
        assert await page.evaluate(texts(f"{viewer} [data-answer]")) == whole


async def test_a_page_that_is_loaded_later_shows_what_went_before(page: Page) -> None:
    await page.click("[data-run]")
    await page.until(exists(f"{ADA} [data-toast=success]"), RUN)
    before = [await page.evaluate(texts(f"{ADA} {part}")) for part in ("[data-answer]", "[data-step] .note")]
    await page.call("Page.reload")
    await page.until(exists(f"{ADA} [data-answer=complete]"))
    after = [await page.evaluate(texts(f"{ADA} {part}")) for part in ("[data-answer]", "[data-step] .note")]
    assert after == before


async def test_it_can_be_read_on_a_phone(page: Page) -> None:
    await page.click("[data-run]")
    await page.until(exists(f"{ADA} [data-answer=streaming]"), RUN)
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    await page.call("Emulation.setDeviceMetricsOverride", **screen)
    await page.until("innerWidth === 360")
    assert await page.evaluate("document.documentElement.scrollWidth") <= 360


async def test_a_page_reloaded_in_the_middle_of_an_answer_shows_the_text_so_far_and_the_rest(page: Page) -> None:
    words = [f"word{number} " for number in range(12)]
    ask = "[...document.querySelectorAll('[data-viewer=ada] [data-answer]')].map(found => found.textContent).join('|')"
    for index, word in enumerate(words):
        last = index == len(words) - 1
        chunk = {"type": "chat_response_chunk", "stream_id": "r", "content": word, "is_complete": last, "index": index}
        await publish(page, chunk)
        if index == 5:
            await page.until(f"({ask}).includes('word5')")
            before = await page.evaluate(ask)
            await page.call("Page.reload")
            await page.until(both("[data-state=open]"))
            await page.until(f"({ask}).includes('word5')")
            assert await page.evaluate(ask) == before
    await page.until(both("[data-answer=complete]"))
    text = await page.evaluate(ask)
    assert "".join(words).strip() in text
    assert text.count("word3 ") == 1
