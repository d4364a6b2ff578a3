"""Everything that needs a GPU in one command of at most nine minutes: `python bench.py gpu`, or make gpu.

    section   seconds   what
    kernels        80   every op against the truth (value and gradients, fp32 and bf16), then against torch.compile of its reference
    graphs         40   each family: the frames of CUDA graphs are those without
    decode        190   G1 to G10
    train         190   T1 to T7
    memory         40   the peaks of a step and of a generation against --plan

Nothing has to be prepared: weights are random, and a peer that is not installed is left out. Each measurement is a command of
bench.py and a process of its own: a kernel that fails takes the device away from its own process only. It has the time that is left until
its section has to end, and is cut then. Every row is appended to --out when it comes, so nothing is lost by a cut; the same command
again goes on with what is missing. At the end it prints the table of BENCHMARKS.md. Without a GPU it is a rehearsal: all of it runs, in one
process at the smallest size, without peers and torch.compile, and the table reads "not measured". Next: workloads.py.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ON_GPU, origin, show

SECTIONS = {"kernels": 80, "graphs": 40, "decode": 190, "train": 190, "memory": 40}
SCRIPT = Path(__file__).resolve().parents[1] / "bench.py"
REHEARSAL = "--preset=tiny --width=32 --pairs=1 --frames=2 --columns=16 --batch=2 --rank=2 --context=8 --apart=false".split()
LEAST = 5                  # seconds: less time is none
Rows = Callable[[list[str]], Iterable[dict[str, Any]]]      # what bench.py measures for a command


@dataclass(frozen=True)
class GpuJob:
    """Options of `bench.py gpu`."""

    only: str = ""                      # names of the table (G1,T4) or sections (kernels) to measure, "" = all
    out: str = "out/gpu.jsonl"          # file that rows are appended to
    seconds: int = sum(SECTIONS.values())       # time for all of it; sections share it as they share 540


@dataclass(frozen=True)
class Figure:
    """A number of the table: where it stands in a row of bench.py, and its target."""

    name: str
    row: str                            # "what" of the row
    path: str                           # keys of the number, with dots between
    limit: float | None = None          # None: reported, without a target
    unit: str = ""
    least: bool = False                 # the target is the least, not the most
    over: str = ""                      # command of which the same number divides this one

    def target(self) -> str:
        return "-" if self.limit is None else f"{'at least' if self.least else 'at most'} {self.limit:g}{self.unit}"


@dataclass(frozen=True)
class Measurement:
    section: str
    command: str
    figures: tuple[Figure, ...] = ()


T1 = "train --model=moshi --peer --rank=128 --batch=16 --columns=1250 --checkpoint=2 --pairs=3"
T4 = "train --model=higgs --peer --packed --batch=8 --columns=2048 --pairs=5"
FRAME, SHARE, NEAR = "ours.ms.median", "ratio.median", "decode --model=moshi --context=100 --pairs=1"


def frame(name: str, model: str, *rest: Any, **more: Any) -> Figure:
    return Figure(name, f"frame {model}", *rest, **more)


def step(name: str, model: str, *rest: Any, **more: Any) -> Figure:
    return Figure(name, f"train {model}", *rest, **more)


def host(model: str) -> tuple[Figure, Figure]:
    return Figure("G8", f"ops {model}", "syncs", 0, " syncs"), Figure("G8", f"ops {model}", "graphs", 1, " graphs")


PLAN = (
    Measurement("kernels", "kernels --pairs=7"),
    Measurement("graphs", "graphs --frames=40"),
    Measurement("decode", "decode --model=moshi --context=750 --pairs=3",
                (frame("G1", "moshi", FRAME, 7.0, " ms"), frame("G1", "moshi", "times_floor", 2.0, " x the floor"))),
    Measurement("decode", "decode --model=higgs --context=1000 --pairs=3",
                (frame("G4", "higgs", FRAME, 2.7, " ms"), frame("G4", "higgs", "RTF", 0.07, " RTF"),
                 frame("G10", "higgs", "prefill_ms", 25, " ms"))),
    Measurement("decode", "decode --model=moss --pairs=3", (frame("G7", "moss", FRAME, 6.0, " ms"),)),
    Measurement("decode", "decode --model=moshi --context=750 --quantize=int8 --pairs=3",
                (frame("G3", "moshi", FRAME, 4.8, " ms"),)),
    Measurement("decode", "decode --model=higgs --context=1000 --batch=64 --pairs=1 --frames=200",
                (frame("G6", "higgs", "ours.per_second", 6000, " frames/s", least=True),)),
    Measurement("decode", "ops --model=moshi", host("moshi")),
    Measurement("decode", "ops --model=higgs", host("higgs")),
    Measurement("decode", NEAR),
    Measurement("decode", "decode --model=moshi --context=3000 --pairs=1",
                (frame("G9", "moshi", FRAME, 1.2, " x that behind 100", over=NEAR),)),
    Measurement("decode", "decode --model=higgs --peer --pairs=3", (frame("G5", "higgs", SHARE, 0.17, " of generate's"),)),
    Measurement("decode", "decode --model=moshi --peer --pairs=3", (frame("G2", "moshi", SHARE, 0.67, " of LMGen's time"),)),
    Measurement("train", T4,
                (step("T4", "higgs", SHARE, 0.56, " of transformers + PEFT"), step("T5", "higgs", "MFU", 0.35, " MFU", least=True))),
    Measurement("train", "loss --peer --pairs=5",
                (Figure("T6", "loss memory 1x32000", SHARE, 0.15, " of full logits' memory"),
                 Figure("T6", "loss time 1x32000", SHARE, 0.7, " of their time"),
                 Figure("T6", "loss time liger", SHARE, 1.1, " of Liger's"))),
    Measurement("train", T1,
                (step("T1", "moshi", SHARE, 0.5, " of moshi-finetune"), step("T5", "moshi", "MFU", 0.35, " MFU", least=True))),
    Measurement("train", T4.replace("--peer", "--compile"), (step("T7", "higgs", FRAME, None, " x eager", over=T4),)),
    Measurement("train", T1.replace("--peer", "--compile"), (step("T7", "moshi", FRAME, None, " x eager", over=T1),)),
    Measurement("train", f"{T1} --codec", (step("T2", "moshi", SHARE, 0.25, " of it as shipped"),)),
    Measurement("memory", "plan --model=higgs --batch=8 --columns=2048",
                (Figure("M1", "plan train higgs", SHARE, 1.15, " of the plan"),
                 Figure("M2", "plan sample higgs", SHARE, 1.15, " of the plan"))),
    Measurement("memory", T1.replace("train", "memory").replace("checkpoint=2 --pairs=3", "checkpoint=4"),
                (Figure("T3", "train memory moshi", SHARE, 0.75, " of its peak"),)),
)


# ---- running ----

def run_all(job: GpuJob, rows_of: Rows) -> None:
    """Measure what is not in --out yet, section by section, and print the table."""
    out = Path(job.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    known, wanted, about = read_results(out) if ON_GPU else [], set(job.only.split(",")) - {""}, origin()
    chosen = [m for m in PLAN if not wanted or wanted & {m.section, *(f.name for f in m.figures)}]
    if not chosen:
        raise ValueError(f"--only={job.only} names nothing; there are {', '.join(SECTIONS)} and the names of the table, such as G1")
    if not ON_GPU:
        print("no CUDA device: a rehearsal at the smallest size, its numbers say nothing about a GPU")
    began, end, rehearsed = time.monotonic(), 0.0, set()
    with open(out, "ab") as file:                            # a line that a kill left half written goes
        file.truncate(out.read_bytes().rfind(b"\n") + 1 if ON_GPU else 0)
    with open(out, "a", encoding="utf-8") as file:
        for section, share in SECTIONS.items():
            end += share * job.seconds / sum(SECTIONS.values())
            own = [m for m in chosen if m.section == section]
            for m in own:
                if any(line["command"] == m.command and line.get("ended") == "done" for line in known):
                    continue
                seconds = end - (time.monotonic() - began)
                lines = apart(m.command, seconds) if ON_GPU else here(m.command, rows_of, rehearsed)
                for line in lines:
                    file.write(json.dumps({"section": section, "command": m.command} | about | line) + "\n")
                    file.flush()
                    print(show(line) if "what" in line else f"{m.command}: {line['ended']}", flush=True)
            if own:
                print(f"{section}: {time.monotonic() - began:.0f} s of {end:.0f} s", flush=True)
    print("", *table(read_results(out) if ON_GPU else []), sep="\n")


def here(command: str, rows_of: Rows, rehearsed: set[str]) -> Iterator[dict[str, Any]]:
    """The rehearsal of a command, in this process; `rehearsed` are the commands that were run already."""
    sizes = {word.partition("=")[0] for word in REHEARSAL} | {"--peer", "--compile"}
    words = [word for word in command.split() if word.partition("=")[0] not in sizes] + REHEARSAL
    if str(words) not in rehearsed:
        rehearsed.add(str(words))
        yield from rows_of(words)
    yield {"ended": "rehearsed"}


def apart(command: str, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a command in a process of its own, as they come, and how it ended; it is killed after `seconds`."""
    if seconds < LEAST:
        yield {"ended": "not begun, no time was left"}
        return
    cut = threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, str(SCRIPT), *command.split(), "--preset=full", "--json"], stdout=subprocess.PIPE,
                                   stderr=errors, text=True, start_new_session=True)

        def stop() -> None:
            cut.set()
            os.killpg(process.pid, signal.SIGKILL)           # with the processes that measure memory

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                stop()
        errors.seek(0)
        last = ([line.strip() for line in errors if line.strip()] or ["no message"])[-1]
    yield {"ended": f"cut after {seconds:.0f} s" if cut.is_set() else "done" if code == 0 else f"failed with exit code {code}: {last}"}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of this commit and device; a last line that a kill left half written is not one."""
    if not path.is_file():
        return []
    text, now = path.read_text(encoding="utf-8"), origin()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if (line["commit"], line["device"]) == (now["commit"], now["device"])]


# ---- the table ----

def number(row: dict[str, Any], path: str) -> float | None:
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def value_of(figure: Figure, command: str, results: list[dict[str, Any]]) -> float | str:
    """The number, or why there is none."""
    def last(command: str) -> float | str:
        rows = [line for line in results if line["command"] == command and line.get("what") == figure.row]
        ends = [line["ended"] for line in results if line["command"] == command and "ended" in line]
        found = number(rows[-1], figure.path) if rows else None
        why = rows[-1]["checked"] if rows and str(rows[-1].get("checked")).startswith("not measured") else ""
        if found is None:
            return why or "not measured" + (f": {ends[-1]}" if ends and ends[-1] != "done" else "")
        return float(found)

    own, other = last(command), last(figure.over) if figure.over else 1.0
    return next((x for x in (own, other) if isinstance(x, str)), None) or own / other


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The rows of BENCHMARKS.md, a line each: name, command, target, result."""
    yield "| | `python bench.py ...`, with `--preset=full` | target | result |"
    yield "|---|---|---|---|"
    rows: dict[tuple[str, str], list[Figure]] = {}
    for m in PLAN:
        for figure in m.figures:
            rows.setdefault((figure.name, m.command), []).append(figure)
    for (name, command), figures in sorted(rows.items(), key=lambda item: ("TGM".index(item[0][0][0]), int(item[0][0][1:]))):
        found = [value_of(f, command, results) for f in figures]
        shown = [x if isinstance(x, str) else f"{x:.3g}{f.unit}{missed(f, x)}" for f, x in zip(figures, found, strict=True)]
        yield f"| {name} | `{command}` | {', '.join(f.target() for f in figures)} | {', '.join(dict.fromkeys(shown))} |"


def missed(figure: Figure, value: float) -> str:
    return "" if figure.limit is None or (value >= figure.limit if figure.least else value <= figure.limit) else " (missed)"
