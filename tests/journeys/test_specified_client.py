"""The specification's own JavaScript class, in a real browser, against the router."""

import json
import os
from pathlib import Path

import pytest

from tests.journeys.chromium import Browser, find_chromium
from tests.journeys.test_publish import SPECIFIED
from tests.node import make_token, run_node

pytestmark = pytest.mark.browser
CLIENT = Path(__file__).with_name("specified_client.js").read_text()


async def test_the_specified_client_receives_every_message_type_unchanged_and_nothing_it_does_not_know():
    binary = find_chromium()
    if binary is None:
        missing = "there is no Chromium on this machine, so the specification's own client is NOT tested"
        if os.environ.get("ROUTER_TEST_NO_SKIP"):
            pytest.fail(missing)
        pytest.skip(missing)
    async with (
        run_node(ping_every=1.0) as node,
        Browser(binary) as browser,
        browser.page(f"{node.url}/healthz") as page,
    ):
        origin, token = node.url.replace("http", "ws"), make_token()
        start = (
            f"window.client = new SpecifiedClient({json.dumps(origin)}, 'p1', {json.dumps(token)}); client.connect()"
        )
        await page.evaluate(f"{CLIENT}; window.SpecifiedClient = SpecifiedClient; {start}; true")
        await page.until("client.opened === 1")
        await node.settled()
        for number, event in enumerate(SPECIFIED, 1):
            await node.publish(event)
            await page.until(f"client.seen.length === {number}")
        seen = await page.evaluate("client.seen")
        assert seen == SPECIFIED, "what was published arrives unchanged"
        await page.evaluate("client.send({type: 'chat_message', role: 'user', content: 'hello'}); true")
        await page.until(f"client.seen.length === {len(SPECIFIED) + 1}")
        said = await page.evaluate("client.seen.at(-1)")
        assert (said["type"], said["content"], said["user_id"]) == ("chat_message", "hello", "ada")
        assert await page.evaluate("client.unknown") == []
        page.problems[:] = [problem for problem in page.problems if "favicon.ico" not in problem]  # no page of ours
