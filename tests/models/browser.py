"""A real Chromium, driven over the DevTools protocol: for tests of pages, and for their pictures.

    async with browser() as chromium, chromium.page(url) as page:
        await page.until("document.title === 'kvatlas'")
        page.errors  # what its console said

Source: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import aiohttp
import msgspec

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
START_S = 60.0
WAIT_S = 90.0
"""Far more than anything takes: a page that never gets there fails, a busy machine does not."""
MESSAGE_BYTES_MAX = 64 << 20
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowDown": 40}


def chromium_path() -> str | None:
    """Return where a Chromium is; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser process. Made by :func:`browser`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._reader = asyncio.create_task(self._read())

    async def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method; return its result. Raises RuntimeError with what the browser says."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        await self._socket.send_str(msgspec.json.encode(message).decode())
        return await asyncio.wait_for(answer, WAIT_S)

    @asynccontextmanager
    async def page(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> AsyncIterator[Page]:
        """Open a page in a context of its own (no cookies, no storage of others), for as long as the block lasts."""
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        target = (await self.call("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = self._pages[session] = Page(self, session)
        try:
            for domain in ("Runtime", "Log", "Page", "Accessibility"):
                await page.call(f"{domain}.enable")
            await page.resize(width, height)
            await page.prefer(dark=dark)
            await page.call("Page.navigate", url=url)
            await page.until("document.readyState === 'complete'")
            yield page
        finally:
            del self._pages[session]
            await self.call("Target.disposeBrowserContext", browserContextId=context)

    async def _read(self) -> None:
        async for received in self._socket:
            message = msgspec.json.decode(received.data)
            answer = self._answers.pop(message.get("id", 0), None)
            if answer is None:
                page = self._pages.get(message.get("sessionId", ""))
                if page is not None:
                    page.told(message["method"], message["params"])
            elif not answer.done():
                if "error" in message:
                    answer.set_exception(RuntimeError(str(message["error"])))
                else:
                    answer.set_result(message["result"])

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


class Page:
    """One page. ``errors``: what went wrong in it, as its console says."""

    def __init__(self, chromium: Browser, session: str) -> None:
        self._browser = chromium
        self._session = session
        self.errors: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self._browser.call(method, self._session, **parameters)

    def told(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(str([argument.get("value") for argument in parameters["args"]]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    async def run(self, script: str) -> Any:
        """Return what an expression comes to; promises are waited for. Raises RuntimeError where it throws."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression is true. Raises AssertionError with what the page shows."""
        deadline_s = asyncio.get_running_loop().time() + WAIT_S
        while not await self.run(f"Boolean({condition})"):
            if asyncio.get_running_loop().time() > deadline_s:
                shown = await self.run("document.body.innerText")
                raise AssertionError(f"never true: {condition}\nerrors: {self.errors}\nthe page shows:\n{shown}")
            await asyncio.sleep(0.05)

    async def press(self, key: str) -> None:
        """Press and release a key, as a person does."""
        texts = {"Enter": "\r", " ": " "}
        common = {
            "key": key,
            "code": "Space" if key == " " else key,
            "windowsVirtualKeyCode": KEYS[key],
        }
        written = {"text": texts[key]} if key in texts else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown" if written else "rawKeyDown", **common, **written)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def type(self, text: str) -> None:
        """Write where the focus is."""
        await self.call("Input.insertText", text=text)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def prefer(self, *, dark: bool) -> None:
        """Let the system prefer dark or light colors, and nothing that moves."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        features.append({"name": "prefers-reduced-motion", "value": "reduce"})
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def accessible(self) -> list[dict[str, Any]]:
        """Return what assistive technology sees, in order, without what it passes over."""
        return [node for node in (await self.call("Accessibility.getFullAXTree"))["nodes"] if not node.get("ignored")]

    async def picture(self, *, whole: bool = False) -> bytes:
        """Return what is shown, or the whole page, as PNG."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """Run a Chromium for as long as the block lasts. Raises RuntimeError where there is none, or it does not start."""
    path = chromium_path()
    if path is None:
        raise RuntimeError(f"no Chromium is installed ({', '.join(NAMES)}): apt-get install chromium, or set CHROMIUM")
    with tempfile.TemporaryDirectory(prefix="kvatlas-chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu"]
        options += ["--disable-dev-shm-usage", "--hide-scrollbars", "--disable-extensions", "--disable-background-networking"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # its sandbox refuses root, whom containers run as
        process = await asyncio.create_subprocess_exec(
            path, *options, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        assert process.stderr is not None
        try:
            address = await asyncio.wait_for(_address(process.stderr), START_S)
            drain = asyncio.create_task(_drain(process.stderr))
            async with (
                aiohttp.ClientSession() as http,
                http.ws_connect(address, max_msg_size=MESSAGE_BYTES_MAX, heartbeat=None) as socket,
            ):
                chromium = Browser(socket)
                try:
                    yield chromium
                finally:
                    await chromium.close()
                    drain.cancel()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _address(stderr: asyncio.StreamReader) -> str:
    said = []
    async for line in stderr:
        said.append(line.decode(errors="replace"))
        if found := re.search(r"DevTools listening on (ws://\S+)", said[-1]):
            return found[1]
    raise RuntimeError(f"Chromium ended at once: {''.join(said)[-2000:]}")


async def _drain(stderr: asyncio.StreamReader) -> None:
    async for _ in stderr:
        pass
