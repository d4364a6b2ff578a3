"""The page in a real browser: Chromium, headless, driven over its DevTools protocol, with a wav as its microphone."""

import asyncio
import itertools
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

aiohttp = pytest.importorskip("aiohttp")
sphn = pytest.importorskip("sphn")

from test_serve import job, serving, speech, talk  # noqa: E402, F401

import serve  # noqa: E402

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not driven")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
         "--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0")


class Browser:
    """One tab; `errors` are what its console complained of."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.numbers, self.errors = socket, itertools.count(1), list[str]()

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == number:
                return message.get("result", message)
            if message.get("method") == "Runtime.exceptionThrown" or message.get("params", {}).get("entry", {}).get("level") == "error":
                self.errors.append(json.dumps(message["params"])[:500])

    async def js(self, code: str) -> Any:
        found = await self.command("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        return None if "exceptionDetails" in found else found["result"].get("value")      # the page may still be on its way

    async def size(self, width: int, height: int, scheme: str) -> None:
        await self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        await self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def until(self, code: str, seconds: float = 40) -> Any:
        for _ in range(round(5 * seconds)):
            if found := await self.js(code):
                return found
            await asyncio.sleep(0.2)
        raise AssertionError(f"never true: {code}")


def browse(url: str, folder: Path, microphone: Path, act: Callable[[Browser], Awaitable[None]]) -> None:
    async def run() -> None:
        flags = (*FLAGS, f"--user-data-dir={folder}/profile", f"--use-file-for-fake-audio-capture={microphone}")
        process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            address = ""
            while "DevTools listening on" not in address:
                address = await asyncio.to_thread(process.stderr.readline)
                assert address, "Chromium ended"
            port = address.split("127.0.0.1:")[1].split("/")[0]
            async with aiohttp.ClientSession() as http:
                async with http.get(f"http://127.0.0.1:{port}/json") as response:
                    tab = next(tab for tab in await response.json() if tab["type"] == "page")
                async with http.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    browser = Browser(socket)
                    for domain in ("Runtime", "Log", "Page"):
                        await browser.command(f"{domain}.enable")
                    await browser.command("Page.navigate", url=url)
                    await act(browser)
                    assert not browser.errors, browser.errors
        finally:
            process.terminate()
            process.wait(10)

    asyncio.run(asyncio.wait_for(run(), 150))


FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
LOUD = """fetch(document.getElementById('download').href).then(r => r.arrayBuffer()).then(b => {
  const v = new DataView(b); let left = 0, right = 0;
  const loud = (at) => Math.abs(v.getInt16(at, true)) > 300;
  for (let n = 44; n + 3 < b.byteLength; n += 4) { left += loud(n); right += loud(n + 2); }
  return [left, right]; })"""
COUNT = """import('/web/sound.js').then(({ Tape }) => {
  const add = Tape.prototype.add;
  window.loud = [0, 0];
  Tape.prototype.add = function (channel, at, samples) {
    samples.forEach((x) => { window.loud[channel] += Math.abs(x) > 0.01; });
    add.call(this, channel, at, samples);
  }; })"""


@pytest.fixture
def microphone(tmp_path) -> Path:
    soundfile.write(tmp_path / "microphone.wav", np.tile(speech(2.0, 16_000), 10), 16_000)
    return tmp_path / "microphone.wav"


@pytest.mark.slow
def test_a_visitor_talks_reads_and_downloads_the_recording(talk, tmp_path, microphone):     # noqa: F811
    async def visit(browser: Browser) -> None:
        await browser.until("document.getElementById('model').textContent.includes('sessions')")
        assert await browser.js("document.querySelectorAll('#option-list input').length") == 4
        await browser.js(COUNT)
        await browser.js("document.getElementById('talk').focus(); document.activeElement.click()")
        await browser.until("document.getElementById('transcript').textContent.length > 5")
        await browser.until("document.getElementById('level-agent').value > 0")
        await browser.until("document.getElementById('level-user').value > 0")
        for width, scheme in ((1000, "light"), (340, "dark")):
            await browser.size(width, 740, scheme)
            assert await browser.js(FITS), width
        await browser.until("window.loud.every((samples) => samples > 2000)", 90)
        await browser.js("document.getElementById('talk').click()")
        await browser.until("!document.getElementById('download').hidden")
        left, right = await browser.js(LOUD)
        assert left > 1000 and right > 1000 and await browser.js("document.getElementById('problem').hidden")

    with serving(job(talk, slots=1)) as (server, url):
        browse(url, tmp_path, microphone, visit)
        assert server.scheduler.metrics.counts["errors"] == 0


@pytest.mark.slow
def test_the_views_of_speech_and_of_a_run(tiny_run, tmp_path, microphone):
    folder = tiny_run / "samples" / "step_000004"
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "a.wav", speech(0.5, 16_000), 16_000)

    async def visit(browser: Browser) -> None:
        await browser.until("!document.getElementById('speech').hidden")
        await browser.js("document.getElementById('text').value = 'one two'; document.querySelector('#speech button').click()")
        await browser.until("!document.getElementById('player').hidden")
        assert "first sound" in await browser.js("document.getElementById('speech-state').textContent")
        await browser.size(340, 740, "dark")
        assert await browser.js(FITS)
        await browser.js("document.getElementById('tab-run').click()")
        assert await browser.until("document.querySelectorAll('#steps audio').length") == 1
        assert await browser.js("document.querySelectorAll('#plot polyline').length") == 1 and await browser.js(FITS)
        await browser.js("document.getElementById('tab-live').click(); document.getElementById('text').value = 'xylophone'")
        await browser.js("document.querySelector('#speech button').click()")
        await browser.until("document.getElementById('problem').textContent.includes('xylophone')")
        browser.errors = [error for error in browser.errors if "400" not in error]            # the refusal itself

    with serving(serve.Serve(ckpt=str(tiny_run), port=0, slots=2, drain=0.0, run=str(tiny_run), max_frames=40)) as (_, url):
        browse(url, tmp_path, microphone, visit)
