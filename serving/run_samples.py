"""What a training run has spoken, for the page's second view: steps, recordings, curves. Names only, never paths.

    GET /run/index    {"steps": [{"name": "step_000250", "files": [{"name": "a.wav", "text": "..."}]}],
                       "curves": {"val/loss": [[250, 1.8]]}}
    GET /run/step_000250/a.wav
"""

import re
from pathlib import Path
from typing import Any

from aiohttp import web

from options import read_rows
from serving.limits import Gate
from training.monitor import read_metrics

MOST = 2000                 # points of a curve that a page is given


class RunSamples:
    """The handlers of one run folder."""

    def __init__(self, folder: Path, gate: Gate) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"--run={folder}: there is no such folder; name a run, for example out/demo")
        self.folder, self.gate = folder, gate

    async def index(self, request: web.Request) -> web.Response:
        self.gate.check(request)
        steps = sorted((self.folder / "samples").glob("step_*")) if (self.folder / "samples").is_dir() else []
        metrics = self.folder / "metrics.jsonl"
        curves = read_metrics(metrics) if metrics.is_file() else {}
        kinds = r"loss$|quality_|^lr$|grad_norm|^val/(tor|(stop_)?latency)$"
        shown = {name: points[-MOST:] for name, points in curves.items() if re.search(kinds, name)}
        return web.json_response({"run": self.folder.name, "steps": [self.step(step) for step in steps], "curves": shown})

    def step(self, folder: Path) -> dict[str, Any]:
        rows = [row for _, row in read_rows(folder / "samples.jsonl", "sample")] if (folder / "samples.jsonl").is_file() else []
        texts = {Path(str(row.get("wav", ""))).name: str(row.get("text", "")) for row in rows}
        files = [{"name": path.name, "text": texts.get(path.name, said(path))} for path in sorted(folder.glob("*.wav"))]
        return {"name": folder.name, "files": files}

    async def file(self, request: web.Request) -> web.StreamResponse:
        self.gate.check(request)
        step, name = request.match_info["step"], request.match_info["name"]
        listed = {folder.name: {path.name for path in folder.glob("*.wav")} for folder in (self.folder / "samples").glob("step_*")}
        if name not in listed.get(step, ()):
            raise web.HTTPNotFound(text="there is no such recording\n")
        return web.FileResponse(self.folder / "samples" / step / name)


def said(path: Path) -> str:
    """What lies beside a recording as text."""
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8")[:2000] if text.is_file() else ""
