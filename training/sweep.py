"""Train a config with several values of its options and print one table.

    python train.py sweep configs/ivr_qwen.py                                     the list `sweep` in the file: ranks 4, 8, 16, 32, 64
    python train.py sweep configs/ivr_qwen.py --sweep.lora.rank=4,16 --smoke      every combination of the given values
    python train.py sweep configs/ivr_qwen.py --sweep.lr=1e-4,2e-4 --dtype=bf16   other options apply to all runs

Each run is train.py with its own folder OUT/NAME, so a sweep that was stopped continues when it is started again: finished
runs are not trained again. The table, sorted by held-out loss, is also written to OUT/sweep.json.
"""

import runpy
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from config import TrainConfig
from families.tensor_files import open_tensors, parts_of
from options import load_config, locate, split_arguments, write_json
from training.monitor import read_metrics

PREFIX = "sweep."


def runs_of(path: str, pairs: dict[str, str]) -> list[dict[str, str]]:
    """The overrides of each run: all combinations of `--sweep.x=a,b`, or the config file's own list."""
    given = {key.removeprefix(PREFIX): text.split(",") for key, text in pairs.items() if key.startswith(PREFIX)}
    if given:
        return [dict(zip(given, values, strict=True)) for values in product(*given.values())]
    found = runpy.run_path(str(locate(path))).get("sweep")
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(run, dict) for run in found):
        raise ValueError(f"{path} has no list `sweep` of overrides; name values with --sweep.lora.rank=4,8,16")
    return [{key: str(value) for key, value in run.items()} for run in found]


def name_of(run: dict[str, str]) -> str:
    """A folder name: rank4_alpha8.0"""
    return "_".join(key.split(".")[-1] + "".join(c if c.isalnum() or c in ".-" else "-" for c in text) for key, text in run.items())


def train(argv: list[str], log: Path) -> None:
    """Run train.py with its output in a file; ValueError with the last line of it when the run fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).resolve().parents[1] / "train.py"
    with log.open("w") as file:
        code = subprocess.run([sys.executable, str(script), *argv], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
        raise ValueError(f"a run ended with code {code}: {last} (all of it in {log}); correct it and run the sweep again, which continues")


def outcome(out: Path) -> dict[str, Any]:
    """Held-out loss of a finished run, best and last, the step of the best, and the number of trained parameters."""
    held = [(loss, step) for step, loss in read_metrics(out / "metrics.jsonl").get("val/loss", [])]
    if not held:
        raise ValueError(f"{out}/metrics.jsonl has no held-out loss; give the data held-out rows")
    folder = out / "ckpt" / "latest"
    file = next(file for name in ("adapter", "model") if parts_of(file := folder / f"{name}.safetensors"))
    trained = sum(tensor.shape.numel() for tensor in open_tensors(file).values())
    (best, step), last = min(held), held[-1][0]
    return {"trained": trained, "best held-out loss": best, "at step": step, "last": last}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns as wide as their longest cell."""
    texts = [[f"{v:.4f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
    cells = [list(rows[0]), *texts]
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def main(argv: Sequence[str]) -> None:
    words, pairs = split_arguments(list(argv), ("help", "smoke"))
    if "help" in pairs or not argv:
        return print(__doc__)
    if len(words) != 1:
        raise ValueError(f"sweep takes one config file, got {' '.join(words) or 'none'}; python train.py sweep --help shows examples")
    common = [word for key, text in pairs.items() if not key.startswith(PREFIX) and key != "out"
              for word in ([f"--{key}={text}"] if text else [f"--{key}"])]
    config: TrainConfig = load_config([*words, *common], kind="TrainConfig")
    out, runs = Path(pairs.get("out") or f"{config.out}_sweep"), runs_of(words[0], pairs)
    for run in runs:                                        # report a misspelt option now, not after an hour
        load_config([*words, *common, *(f"--{key}={text}" for key, text in run.items())])
    rows = []
    for run in runs:
        folder = out / name_of(run)
        train([*words, *common, *(f"--{key}={text}" for key, text in run.items()), f"--out={folder}"], out / f"{name_of(run)}.log")
        rows.append(run | outcome(folder))
        print(f"{name_of(run)}: held-out loss {rows[-1]['best held-out loss']:.4f}", flush=True)
    rows.sort(key=lambda row: row["best held-out loss"])
    write_json(out / "sweep.json", rows)
    print_table(rows)
