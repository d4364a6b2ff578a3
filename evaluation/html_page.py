"""One HTML page that needs nothing else: tables, curves drawn as SVG, and players with the sound inside.

    page = Page("out/ivr_qwen, step 40", Path("out/ivr_qwen/report"))
    page.heading("Held-out loss")
    page.table(["stream", "loss"], [["text", 4.53]], note="nats a target")
    page.not_made("Speech", "out/ivr_qwen has no samples.jsonl")              a section that is missing says why
    page.curves({"train/loss": [(0, 6.1), (1, 5.9)]}, "Loss")
    page.listening(["run", "base"], [Take("four nine two", {"run": Path("x.wav")}, ...)])
    page.write("index.html")

Every text is escaped: a transcript cannot add markup. A page made of the same numbers has the same bytes. It fits a telephone: tables
and confusion matrices scroll in themselves. The script of a page is there for listening alone: order, filter, blind A/B with votes.
The two functions in front of it are for pictures of their own, `curves.png` and those of representations.py.
"""

import base64
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from options import replace_file, write_text

Points = Sequence[tuple[float, float]]
STYLE = """*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:1.5em auto;padding:0 .8em;color:#222;
overflow-wrap:anywhere}h1{font-size:1.5em}.scroll{overflow-x:auto;margin:.6em 0}table{border-collapse:collapse}
td,th{padding:.15em .6em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top;overflow-wrap:normal}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th{background:#f4f4f4}.note{color:#666;max-width:60em}
td.hit{background:#dff0d8}td.miss{background:#f8d7da}audio{height:2em;max-width:100%;vertical-align:middle}
.plots{display:flex;flex-wrap:wrap;gap:1em}.plot{flex:1 1 18em;min-width:0;margin:0;display:grid;grid-template-columns:3.2em 1fr}
.plot figcaption,.plot .legend{grid-column:1/3;margin:0;font-size:.9em}.plot .legend b{margin-right:1em}.plot svg{width:100%;height:11em}
.plot .y{display:flex;flex-direction:column;justify-content:space-between;font-size:.75em;color:#555;text-align:right;padding-right:.4em}
.plot .x{grid-column:2;display:flex;justify-content:space-between;font-size:.75em;color:#555}
.controls{display:flex;flex-wrap:wrap;gap:.4em 1em;align-items:center;background:#f4f4f4;padding:.4em .6em}
.trial{border-bottom:1px solid #ddd;padding:.5em 0}.trial h3{font-size:1em;font-weight:600;margin:0}
.takes{display:flex;flex-wrap:wrap;gap:.3em 1.2em}.takes figure{margin:.2em 0;flex:0 1 21em;min-width:0}
.takes figcaption{font-size:.85em;color:#555}.vote{display:none}.blind .hint,.blind .takes .other{display:none}
.blind .vote{display:inline}.vote button{margin:.2em .4em .2em 0}.chosen{outline:2px solid #1f77b4}"""
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
MAX_SOUND = 4 << 20         # bytes of one recording that the page takes in, and of all of them; others are linked
ALL_SOUND = 96 << 20
TYPES = {".flac": "flac", ".ogg": "ogg", ".opus": "ogg", ".mp3": "mpeg"}
MOST_POINTS = 400           # of a curve as it is drawn; more are averaged


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


@dataclass
class Take:
    """One text that several systems have spoken: wavs, captions and numbers by the name of the system."""

    text: str
    wavs: dict[str, Path]
    captions: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)      # what takes are ordered by: {"run": {"wer": 0.2}}
    reference: Path | None = None           # the voice that it was to be spoken in


class Page:
    """Parts of a page in the order in which they are added; `folder` is where it will lie."""

    def __init__(self, title: str, folder: Path | None = None) -> None:
        self.title, self.folder, self.sound, self.script = title, folder, 0, ""
        self.parts, self.missing = [f"<h1>{escape(title)}</h1>"], dict[str, str]()

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def note(self, text: str) -> None:
        self.parts.append(f'<p class="note" dir="auto">{escape(text)}</p>')

    def not_made(self, section: str, why: str) -> None:
        """A section that cannot be made, with its reason and what to do."""
        self.missing[section] = why
        self.heading(section)
        self.note(f"Not made: {why}.")

    def table(self, names: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """A table; numbers stand right."""
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "\n".join("<tr>" + "".join(self.cell(value) for value in row) + "</tr>" for row in rows)
        self.parts.append(f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>')
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
        self.parts.append(f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>')

    def curves(self, curves: dict[str, Points], title: str = "") -> None:
        """Curves of (step, value) on one scale; points that are not finite are left out, "val/..." has its points marked."""
        drawn = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
        if drawn := {name: points for name, points in drawn.items() if points}:
            self.parts.append(plot(drawn, title))

    @contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Context in which plots stand beside each other where there is room."""
        self.parts.append('<div class="plots">')
        yield
        self.parts.append("</div>")

    def sound_source(self, wav: Path | str) -> str:
        """The sound itself, or a link to it where it is too large; relative to the page."""
        path = Path(wav)
        size = path.stat().st_size if path.is_file() else MAX_SOUND + 1
        if size <= MAX_SOUND and self.sound + size <= ALL_SOUND:
            self.sound += size
            return f"data:audio/{TYPES.get(path.suffix.lower(), 'wav')};base64,{base64.b64encode(path.read_bytes()).decode()}"
        return Path(os.path.relpath(path, self.folder) if self.folder else path).as_posix()

    def audio(self, wav: Path | str) -> str:
        return f'<audio controls preload="none" src="{escape(self.sound_source(wav))}"></audio>'

    def listening(self, systems: Sequence[str], takes: Sequence[Take]) -> None:
        """Players of the same texts side by side; order and filter by numbers, and with two systems or more a blind comparison."""
        kinds = {"wer": "worst WER first", "speaker_similarity": "least like the speaker first", "dnsmos": "worst DNSMOS first"}
        known = [kind for kind in kinds if any(kind in numbers for take in takes for numbers in take.numbers.values())]
        orders = "".join(f'<option value="{kind}">{kinds[kind]}</option>' for kind in known)
        blind = ('<button type="button" class="start">Blind A/B</button> <button type="button" class="save">Save votes</button> '
                 + '<output class="tally"></output>' if len(systems) > 1 else "")
        self.parts.append(f'<section class="listening" data-systems="{escape(chr(10).join(systems))}"><div class="controls">'
                          + f'<label>order <select class="order"><option value="">as in the list</option>{orders}</select></label>'
                          + '<label>show <select class="most"><option value="20">20 texts</option><option value="100">100 texts</option>'
                          + f'<option value="1000000">all</option></select></label>{blind}</div>')
        self.parts += [self.take(systems, take, known) for take in takes]
        self.parts.append("</section>")
        self.script = LISTENING

    def take(self, systems: Sequence[str], take: Take, known: Sequence[str]) -> str:
        def worst(kind: str) -> float:
            values = [take.numbers[s][kind] for s in systems if kind in take.numbers.get(s, {})]
            return (max if kind == "wer" else min)(values, default=-math.inf if kind == "wer" else math.inf)

        keys = "".join(f' data-{kind.replace("_", "-")}="{worst(kind):g}"' for kind in known if math.isfinite(worst(kind)))
        figures = "".join(f'<figure data-system="{n}">{self.audio(take.wavs[s])}<figcaption class="hint" dir="auto">'
                          + f'{escape(s)}{escape(": " + take.captions[s] if take.captions.get(s) else "")}</figcaption></figure>'
                          for n, s in enumerate(systems) if s in take.wavs)
        voice = f'<figure>{self.audio(take.reference)}<figcaption>the voice to imitate</figcaption></figure>' if take.reference else ""
        votes = "".join(f'<button type="button" value="{value}">{name}</button>'
                        for value, name in (("0", "first is better"), ("", "no difference"), ("1", "second is better")))
        return (f'<article class="trial"{keys}><h3 dir="auto">{escape(take.text)}</h3><div class="takes">{voice}{figures}</div>'
                + f'<p class="vote">{votes}</p></article>')

    def html(self) -> str:
        head = ('<head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
                + f'<link rel="icon" href="data:,"><title>{escape(self.title)}</title><style>{STYLE}</style></head>')
        script = f"<script>{self.script}</script>\n" if self.script else ""
        return f'<!doctype html>\n<html lang="en">{head}\n<body>\n' + "\n".join(self.parts) + f"\n{script}</body></html>\n"

    def write(self, path: Path) -> None:
        write_text(path, self.html())


# ---- curves ----

def smooth(points: Points, share: float = 0.04) -> list[tuple[float, float]]:
    """Exponential moving average over a share of the points, without the bias of its beginning; short curves stay as they are."""
    keep = 1 - min(1.0, 2 / (1 + share * len(points)))
    total = weight = 0.0
    found = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        found.append((x, total / weight))
    return found


def thin(points: Points) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, each the mean of its neighbours."""
    step = -(-len(points) // MOST_POINTS)
    parts = [points[n : n + step] for n in range(0, len(points), step)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def scale(curves: Sequence[Points]) -> tuple[float, float]:
    """The range of values that is shown: all but the highest and lowest hundredth of each curve, so that first steps do not flatten it."""
    low, high = [], []
    for points in curves:
        values = sorted(y for _, y in points)
        cut = len(values) // 50
        low.append(values[cut // 2])
        high.append(values[-1 - cut])
    bottom, top = min(low), max(high)
    room = 0.04 * (top - bottom) or max(0.01, abs(top) * 0.1)
    return bottom - room, top + room


def plot(curves: dict[str, Points], title: str = "") -> str:
    """Curves as one SVG of any width with labels as text around it: raw values of long curves pale, smoothed in front."""
    shown = {name: thin(smooth(points)) for name, points in curves.items()}
    (y0, y1), xs = scale(list(shown.values())), [x for points in shown.values() for x, _ in points]
    x0, x1 = min(xs), max(xs) + (min(xs) == max(xs))

    def place(points: Points) -> str:
        inside = ((100 * (x - x0) / (x1 - x0), 100 * (y1 - min(max(y, y0), y1)) / (y1 - y0)) for x, y in points)
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in inside)

    lines, legend = [], []
    for n, (name, points) in enumerate(shown.items()):
        colour, still = COLOURS[n % len(COLOURS)], 'fill="none" vector-effect="non-scaling-stroke"'
        if len(points) > 1 and points != list(curves[name]):
            lines.append(f'<polyline {still} stroke="{colour}" opacity=".25" points="{place(thin(curves[name]))}"/>')
        lines.append(f'<polyline {still} stroke="{colour}" stroke-width="1.8" points="{place(points)}"/>')
        if name.startswith("val/") or len(points) == 1:
            dots = "".join(f"M{at}h0" for at in place(points).split())
            lines.append(f'<path {still} stroke="{colour}" stroke-width="6" stroke-linecap="round" d="{dots}"/>')
        legend.append(f'<b style="color:{colour}">{escape(name)}</b>')
    ticks = "".join(f"<span>{y1 - (y1 - y0) * n / 4:.3g}</span>" for n in range(5))
    grid = "".join(f'<path d="M0 {25 * n}H100" stroke="#ddd" vector-effect="non-scaling-stroke"/>' for n in range(5))
    return (f'<figure class="plot"><figcaption>{escape(title)}</figcaption><div class="y">{ticks}</div>'
            + f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img">{grid}{"".join(lines)}</svg>'
            + f'<div class="x"><span>{x0:g}</span><span>step {max(xs):g}</span></div><p class="legend">{"".join(legend)}</p></figure>')


LISTENING = """
for (const room of document.querySelectorAll(".listening")) {
  const names = room.dataset.systems.split("\\n"), trials = [...room.querySelectorAll(".trial")];
  const order = room.querySelector(".order"), most = room.querySelector(".most"), start = room.querySelector(".start");
  const tally = room.querySelector(".tally"), votes = new Map();
  const show = () => {
    const kind = order.value, key = t => Number(t.getAttribute("data-" + kind.replace("_", "-")) ?? NaN);
    const known = kind ? trials.filter(t => !Number.isNaN(key(t))) : trials;
    const sorted = kind ? [...known].sort((a, b) => kind === "wer" ? key(b) - key(a) : key(a) - key(b)) : known;
    for (const t of trials) t.hidden = true;
    sorted.slice(0, Number(most.value)).forEach(t => { t.hidden = false; room.append(t); });
  };
  order.onchange = most.onchange = show;
  show();
  if (!start) continue;
  const chance = (a, b) => {                                   // exact two-sided sign test
    const n = a + b; let term = Math.pow(0.5, n), sum = 0;
    for (let k = 0; k <= Math.min(a, b); k++) { sum += term; term *= (n - k) / (k + 1); }
    return Math.min(1, 2 * sum);
  };
  const result = () => {
    const pairs = new Map();
    for (const v of votes.values()) {
      const [a, b] = [v.first, v.second].sort((x, y) => names.indexOf(x) - names.indexOf(y)), name = a + "\\n" + b;
      const at = pairs.get(name) ?? {a, b, wins: {[a]: 0, [b]: 0}, same: 0};
      if (v.better) at.wins[v.better]++; else at.same++;
      pairs.set(name, at);
    }
    return [...pairs.values()].map(p => `${p.a} ${p.wins[p.a]} : ${p.wins[p.b]} ${p.b}, no difference ${p.same}, ` +
      `p = ${chance(p.wins[p.a], p.wins[p.b]).toFixed(3)}`).join("; ");
  };
  const say = () => {
    const blind = room.classList.contains("blind");
    tally.value = blind ? `${votes.size} of ${trials.length} judged` : votes.size ? result() : "";
  };
  start.onclick = () => {
    const blind = room.classList.toggle("blind");
    start.textContent = blind ? "Show which is which" : "Blind A/B";
    for (const t of trials) {
      const takes = t.querySelector(".takes"), all = [...takes.querySelectorAll("figure[data-system]")];
      for (const f of all) f.classList.remove("other");
      if (!blind) { all.forEach(f => takes.append(f)); continue; }
      for (let n = all.length - 1; n > 0; n--) { const k = Math.floor(Math.random() * (n + 1)); [all[n], all[k]] = [all[k], all[n]]; }
      all.forEach((f, n) => { takes.append(f); f.classList.toggle("other", n > 1); });
      for (const b of t.querySelectorAll(".vote button")) {
        b.classList.remove("chosen");
        b.disabled = all.length < 2;
        b.onclick = () => {
          const [first, second] = all.slice(0, 2).map(f => names[Number(f.dataset.system)]);
          const better = b.value === "" ? "" : [first, second][Number(b.value)];
          votes.set(t, {text: t.querySelector("h3").textContent, first, second, better});
          for (const other of t.querySelectorAll(".vote button")) other.classList.toggle("chosen", other === b);
          say();
        };
      }
    }
    if (blind) votes.clear();
    say();
  };
  room.querySelector(".save").onclick = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify([...votes.values()], null, 1)], {type: "application/json"}));
    link.download = "votes.json";
    link.click();
    URL.revokeObjectURL(link.href);
  };
}
"""
