"""A small driver for headless Chromium over the DevTools protocol: what the browser journeys need and no more."""

import asyncio
import base64
import itertools
import json
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect

__all__ = ["Browser", "BrowserError", "Page", "find_chromium"]

START = 20.0
"""Seconds that Chromium may take to start."""
PATIENCE = 10.0
"""Seconds to wait for something to become true on a page."""
LOOK_EVERY = 0.05


class BrowserError(AssertionError):
    """The page, or Chromium itself, did not do what it was told."""


def find_chromium() -> str | None:
    """Where Chromium is, by whichever of its names."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


class Browser:
    """One headless Chromium with a profile of its own, gone when the `async with` ends."""

    def __init__(self, binary: str) -> None:
        self._binary = binary
        self._profile = tempfile.TemporaryDirectory(prefix="router-chromium-", ignore_cleanup_errors=True)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._pages: dict[str, Page] = {}
        self._process: asyncio.subprocess.Process
        self._connection: ClientConnection
        self._reader: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            self._binary,
            "--headless=new",
            "--no-sandbox",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._profile.name}",
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-proxy-server",
            "about:blank",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            self._connection = await connect(await self._address(), max_size=None, compression=None, proxy=None)
        except BaseException:
            await self._end()
            raise
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(BrowserError, TimeoutError):
            await self.call("Browser.close")
        await self._connection.close()
        await self._reader
        await self._end()

    async def _address(self) -> str:
        """Where DevTools listen. Chromium writes it down once it is ready."""
        written = Path(self._profile.name, "DevToolsActivePort")
        deadline = asyncio.get_running_loop().time() + START
        while not (written.exists() and written.read_text().count("\n")):
            if self._process.returncode is not None:
                raise BrowserError(f"Chromium ended with {self._process.returncode} instead of starting")
            if asyncio.get_running_loop().time() > deadline:
                raise BrowserError(f"Chromium was not ready within {START:g} s")
            await asyncio.sleep(LOOK_EVERY)
        port, path = written.read_text().split()
        return f"ws://127.0.0.1:{port}{path}"

    async def _end(self) -> None:
        """End the process that was started here, with its profile."""
        for sign in (None, signal.SIGTERM, signal.SIGKILL):
            if self._process.returncode is None and sign is not None:
                self._process.send_signal(sign)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), 5)
                break
        self._profile.cleanup()

    async def _read(self) -> None:
        async for text in self._connection:
            message = json.loads(text)
            waiting = self._answers.pop(message.get("id"), None)
            page = self._pages.get(message.get("sessionId", ""))
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
            elif page is not None:
                page._note(message)
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(BrowserError("the connection to Chromium broke"))

    async def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        id_ = next(self._ids)
        answer = self._answers[id_] = asyncio.get_running_loop().create_future()
        command = {"id": id_, "method": method, "params": params}
        await self._connection.send(json.dumps(command if session is None else {**command, "sessionId": session}))
        message = await asyncio.wait_for(answer, START)
        if "error" in message:
            raise BrowserError(f"{method}: {message['error']['message']}")
        return message["result"]

    @asynccontextmanager
    async def page(
        self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False
    ) -> "AsyncIterator[Page]":
        """A tab with `url`, closed at the end. A script error on it that nobody looked at is an error of the test."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = self._pages[attached["sessionId"]] = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            await page.call(f"{domain}.enable")
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await page.call("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await page.call("Emulation.setEmulatedMedia", features=[scheme])
        await page.call("Page.navigate", url=url)
        await page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        yield page
        await self.call("Target.closeTarget", targetId=target["targetId"])
        assert not page.problems, page.problems


class Page:
    """One tab. `problems` are the script errors and failed requests that it had."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.problems: list[str] = []

    def _note(self, message: dict[str, Any]) -> None:
        params = message["params"]
        if message["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command to this tab."""
        return await self._browser.call(method, self._session, **params)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page; a promise is waited for."""
        result = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    async def until(self, expression: str, within: float = PATIENCE) -> Any:
        """Wait until an expression is truthy. Returns its value."""
        deadline = asyncio.get_running_loop().time() + within
        while not (value := await self.evaluate(expression)):
            if asyncio.get_running_loop().time() > deadline:
                raise BrowserError(f"still not true after {within:g} s: {expression}")
            await asyncio.sleep(LOOK_EVERY)
        return value

    async def click(self, selector: str) -> None:
        """Click what `selector` finds, once it is there."""
        found = f"document.querySelector({json.dumps(selector)})"
        await self.until(f"{found} !== null && !{found}.disabled")
        await self.evaluate(f"{found}.click()")

    async def type(self, selector: str, text: str) -> None:
        """Put `text` into a field, as typing would."""
        await self.evaluate(
            f"(field => {{ field.value = {json.dumps(text)};"
            "field.dispatchEvent(new Event('input', {bubbles: true}));"
            "field.dispatchEvent(new Event('change', {bubbles: true})) })"
            f"(document.querySelector({json.dumps(selector)}))"
        )

    async def screenshot(self, path: Path | str) -> None:
        """What the page looks like, as PNG, all of it."""
        metrics = await self.call("Page.getLayoutMetrics")
        size = metrics["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(shot["data"]))
