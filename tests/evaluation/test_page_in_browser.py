"""The page of reports in a real browser at two widths: it fits, its console is empty, and a listener's votes are counted."""

import base64
import math
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("aiohttp")
pytest.importorskip("sphn")

from test_page import CHROMIUM, FITS, Browser, browse

from audio.wav import save_wav
from evaluation.html_page import Page, Take

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not driven")


def page(folder: Path) -> Path:
    """Everything that a report can hold, wide tables and long words among it."""
    made = Page("out/" + "a_long_name" * 12, folder)
    made.heading("Means")
    made.table(["measure", *(f"system {n}" for n in range(9))], [["wer", *[(0.1, 0.05, 0.2)] * 9]], "A note " + "x" * 300)
    made.confusion([f"category {n}" for n in range(14)], [[int(r == c) for c in range(14)] for r in range(14)])
    made.not_made("Forgetting", "--generic is empty; name a file of general texts")
    with made.side_by_side():
        for title in ("Loss of text", "Loss of audio", "Loss"):
            train = [(n, 3 + 2 / (1 + n) + 0.3 * math.sin(n)) for n in range(1200)]
            made.curves({"train/loss": train, "val/loss": [(n, 3.1) for n in range(0, 1200, 200)]}, title)
    save_wav(folder / "tone.wav", 0.2 * torch.sin(torch.arange(4000) * 0.2)[None], 16_000)
    takes = [Take(f"text {n} " + "word" * 30, dict.fromkeys(("one", "two"), folder / "tone.wav"), {"one": "heard 'a'", "two": "heard 'b'"},
                  {"one": {"wer": n % 7 / 7}, "two": {"wer": n % 5 / 50, "speaker_similarity": n / 30}}, folder / "tone.wav")
             for n in range(30)]
    made.heading("Listen")
    made.listening(["one", "two"], takes)
    made.write(folder / "index.html")
    return folder / "index.html"


SHOWN = "[...document.querySelectorAll('.trial')].filter(t => !t.hidden && t.offsetHeight)"
CHOOSE = "(s, v) => { const e = document.querySelector(s); e.value = v; e.dispatchEvent(new Event('change')); }"
SMALLEST = """Math.min(...[...document.querySelectorAll('body *')].filter(e => e.textContent.trim() &&
  !['SCRIPT', 'STYLE'].includes(e.tagName)).map(e => parseFloat(getComputedStyle(e).fontSize)))"""
HINTS = "[...document.querySelectorAll('.hint')].some(h => h.offsetHeight)"


@pytest.mark.slow
def test_the_page_fits_and_votes_are_counted(tmp_path: Path) -> None:
    path = page(tmp_path)

    async def visit(browser: Browser) -> None:
        await browser.until(f"document.readyState == 'complete' && {SHOWN}.length == 20")
        for width in (360, 1200):
            await browser.size(width, 900, "light")
            assert await browser.js(FITS), width
            small = await browser.js(SMALLEST)
            assert small >= 11, small                                                            # every label can be read at both widths
            assert await browser.js("[...document.querySelectorAll('.plot svg')].every(s => s.getBoundingClientRect().width > 200)")
            if os.environ.get("SCREENSHOTS"):
                shot = await browser.command("Page.captureScreenshot", captureBeyondViewport=True)
                Path(os.environ["SCREENSHOTS"], f"page_{width}.png").write_bytes(base64.b64decode(shot["data"]))
        await browser.js(f"({CHOOSE})('.most', '1000000')")
        assert await browser.js(f"{SHOWN}.length") == 30
        await browser.js(f"({CHOOSE})('.order', 'wer')")
        assert (await browser.js(f"{SHOWN}[0].querySelector('h3').textContent")).startswith("text 6 ")      # 6/7, the worst of either
        await browser.js(f"({CHOOSE})('.order', 'speaker_similarity')")
        assert (await browser.js(f"{SHOWN}[0].querySelector('h3').textContent")).startswith("text 0 ")
        assert await browser.js(HINTS) and not await browser.js("document.querySelector('.vote').offsetHeight")
        await browser.js("document.querySelector('.start').click()")
        assert not await browser.js(HINTS) and await browser.js("document.querySelector('.vote').offsetHeight > 0")
        # whichever stands first: the listener prefers "two" five times, hears no difference once, and changes their mind once
        vote = """(n, best) => { const t = document.querySelectorAll('.trial')[n];
          const first = t.querySelector('figure[data-system]').dataset.system;
          t.querySelector(best === '' ? '.vote button[value=""]' : `.vote button[value="${Number(first !== best)}"]`).click(); }"""
        for n, best in ((0, "0"), (0, "1"), (1, "1"), (2, "1"), (3, "1"), (4, "1"), (5, "")):
            await browser.js(f"({vote})({n}, '{best}')")
        assert await browser.js("document.querySelector('.tally').value") == "6 of 30 judged"
        await browser.js("document.querySelector('.start').click()")
        assert await browser.js("document.querySelector('.tally').value") == "one 0 : 5 two, no difference 1, p = 0.063"
        assert await browser.js(HINTS) and await browser.js(FITS)

    browse(path.as_uri(), tmp_path, tmp_path / "tone.wav", visit)
