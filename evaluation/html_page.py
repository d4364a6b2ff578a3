"""One HTML page that needs nothing else: tables, curves drawn as SVG, and players with the sound inside.

    page = Page("out/ivr_qwen, step 40")
    page.heading("Held-out loss")
    page.table(["stream", "loss"], [["text", 4.53]], note="nats a target")
    page.curves({"train/loss": [(0, 6.1), (1, 5.9)]})
    page.player("x.wav", "four nine two")
    page.write(Path("index.html"))

Every text is escaped: a transcript cannot add markup. A page made of the same numbers has the same bytes.
The two functions in front of it are for pictures of their own, `curves.png` and those of representations.py.
"""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from options import replace_file, write_text

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.15em .7em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th{background:#f4f4f4}.note{color:#666;max-width:60em}
td.hit{background:#dff0d8}td.miss{background:#f8d7da}svg{max-width:100%}audio{height:2em;vertical-align:middle}"""
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
MAX_SOUND = 4 << 20         # bytes of one recording that the page takes in; a larger one is linked


def show(value: Any) -> str:
    """A cell: floats with three decimals, (value, low, high) as "0.12 (0.08 to 0.17)", NaN as a dash."""
    if isinstance(value, tuple) and len(value) == 3:
        middle, low, high = value
        return show(middle) + ("" if math.isnan(low) else f" ({show(low)} to {show(high)})")
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return str(value)


def blank_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, in inches, that needs no screen."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("curves need matplotlib; run: pip install -e '.[log]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(path: Path, figure: Any) -> None:
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


class Page:
    """Parts of a page in the order in which they are added."""

    def __init__(self, title: str) -> None:
        self.title, self.parts = title, [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def note(self, text: str) -> None:
        self.parts.append(f'<p class="note" dir="auto">{escape(text)}</p>')

    def table(self, names: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """A table; numbers stand right."""
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "\n".join("<tr>" + "".join(self.cell(value) for value in row) + "</tr>" for row in rows)
        self.parts.append(f"<table><tr>{head}</tr>\n{body}</table>")
        if note:
            self.note(note)

    def cell(self, value: Any) -> str:
        kind = ' class="n"' if isinstance(value, (int, float, tuple)) else ' dir="auto"'
        return f"<td{kind}>{escape(show(value))}</td>"

    def confusion(self, names: Sequence[str], table: Sequence[Sequence[int]]) -> None:
        """Rows are what was true, columns what was taken for it; what is right is green."""
        head = "".join(f"<th>{escape(name)}</th>" for name in ["true \\ taken for", *names])
        body = "\n".join(f"<tr><th>{escape(name)}</th>" + "".join(
            f'<td class="n{" hit" if r == c and n else " miss" if n else ""}">{n or ""}</td>' for c, n in enumerate(row)) + "</tr>"
            for r, (name, row) in enumerate(zip(names, table, strict=True)))
        self.parts.append(f"<table><tr>{head}</tr>\n{body}</table>")

    def curves(self, curves: dict[str, Sequence[tuple[float, float]]], width: int = 720, height: int = 260) -> None:
        """Curves of (step, value) in one drawing; points that are not finite are left out."""
        drawn = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
        drawn = {name: points for name, points in drawn.items() if points}
        if not drawn:
            return
        xs, ys = ([point[axis] for points in drawn.values() for point in points] for axis in (0, 1))
        self.parts.append(svg(drawn, (min(xs), max(xs)), (min(ys), max(ys)), width, height))

    def player(self, wav: Path | str, text: str) -> None:
        """A recording with what it should say."""
        path = Path(wav)
        small = path.is_file() and path.stat().st_size <= MAX_SOUND
        source = "data:audio/wav;base64," + base64.b64encode(path.read_bytes()).decode() if small else path.as_posix()
        self.parts.append(f'<p dir="auto"><audio controls preload="none" src="{escape(source)}"></audio> {escape(text)}</p>')

    def html(self) -> str:
        head = f'<head><meta charset="utf-8"><title>{escape(self.title)}</title><style>{STYLE}</style></head>'
        return f'<!doctype html>\n<html lang="en">{head}\n<body>\n' + "\n".join(self.parts) + "\n</body></html>\n"

    def write(self, path: Path) -> None:
        write_text(path, self.html())


def svg(curves: dict[str, Sequence[tuple[float, float]]], across: tuple[float, float], up: tuple[float, float], width: int,
        height: int) -> str:
    """Curves as one SVG with the ends of both axes written beside them."""
    left, right, top, bottom = 60, width - 10, 10, height - 24
    (x0, x1), (y0, y1) = across, up
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)                       # one point, or a flat line, is drawn too
    lines, names = [], []
    for n, (name, points) in enumerate(curves.items()):
        places = " ".join(f"{left + (x - x0) / (x1 - x0) * (right - left):.1f},{bottom - (y - y0) / (y1 - y0) * (bottom - top):.1f}"
                          for x, y in points)
        colour = COLOURS[n % len(COLOURS)]
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{places}"/>')
        names.append(f'<text x="{right - 150}" y="{top + 14 + 15 * n}" font-size="12" fill="{colour}">{escape(name)}</text>')
    marks = [f'<text x="4" y="{y}" font-size="12" fill="#666">{value:.3g}</text>' for y, value in ((top + 10, y1), (bottom, y0))]
    marks += [f'<text x="{x}" y="{height - 6}" font-size="12" fill="#666">{value:g}</text>' for x, value in ((left, x0), (right - 40, x1))]
    frame = f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#999"/>'
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{frame}{"".join(lines + names + marks)}</svg>'
