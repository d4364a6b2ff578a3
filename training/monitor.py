"""What a run reports: metrics to files and trackers, its memory, and a warning when the first loss is that of random guessing.

    out/demo/metrics.jsonl      {"step": 40, "train/loss": 3.1, ..., "grad_norm": 0.8, "lr": 0.001, "step_seconds": 0.4,
                                 "columns_per_second": 5400.0, "tokens_per_second": 43000.0, "audio_seconds_per_second": 190.0,
                                 "memory_gib": 0.9}

Columns, tokens and seconds of speech are summed over all ranks, without padding; memory is the peak of this process so
far, on the GPU if there is one. Validation metrics have the prefix "val/". Next: evaluate.py, which plots them.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from loss import LossConfig, loss_scale
from options import read_rows, write_text
from streams import StreamTable
from training.parallel import part

try:
    import resource
except ImportError:         # Windows has no such module
    resource = None

Write = Callable[[dict[str, float], int], object]


class Log:
    """Writes numbers under a step to metrics.jsonl and to trackers; without a folder (ranks above 0) to nothing."""

    def __init__(self, out: Path | None = None, trackers: Sequence[str] = (), step: int = 0, evaluated: int = -1) -> None:
        self.file = rewind(out / "metrics.jsonl", step, evaluated).open("a") if out is not None else None
        self.writes = [self.write, *(tracker(name, out) for name in trackers)] if out is not None else []

    def __call__(self, step: int, numbers: dict[str, float]) -> None:
        for write in self.writes:
            write(numbers, step)

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Append to metrics.jsonl, behind what a resumed run still stands for."""
        print(json.dumps({"step": step, **numbers}), file=self.file, flush=True)

    def sync(self) -> None:
        """Make what was written so far survive a power cut, as the checkpoint does that stands behind it."""
        if self.file is not None:
            os.fsync(self.file.fileno())


def rewind(metrics: Path, step: int, evaluated: int = -1) -> Path:
    """Drop the lines of a metrics.jsonl that a killed run wrote behind its last checkpoint: they come again.

    A checkpoint before update `step` holds what was evaluated up to `evaluated`.
    """
    try:
        lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
        rows = [(line, json.loads(line)) for line in lines if line.endswith("}\n")]
        kept = "".join(line for line, row in rows if row["step"] < step or (
            row["step"] <= evaluated and any(name.startswith("val/") for name in row)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{metrics} has a line that is not a row of numbers ({error}); correct it or move the file away") from None
    write_text(metrics, kept)
    return metrics


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves of a metrics.jsonl: name -> (step, value) pairs."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for number, row in read_rows(path, "row of metrics", step=int):
        for name, value in row.items():
            if not isinstance(value, (int, float)):
                raise ValueError(f"{path} line {number} is not a row of metrics ({name} is {value!r}); correct or remove it")
            if name != "step":
                curves.setdefault(name, []).append((row["step"], float(value)))
    return curves


def tracker(name: str, out: Path) -> Write:
    """A function `write(numbers, step)` for TensorBoard, wandb or trackio."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(str(out / "tb"))
            return lambda numbers, step: [board.add_scalar(k, v, step) for k, v in numbers.items()]
        session = __import__(name).init(project=os.environ.get(f"{name.upper()}_PROJECT", "multistream"), name=out.name)
        return lambda numbers, step: session.log({"step": step, **numbers})
    except ImportError:
        package = "-e '.[log]'" if name == "tensorboard" else name
        raise ValueError(f"tracker {name} is not installed; run pip install {package} or drop it from --trackers") from None


def report(sums: Tensor, table: StreamTable, config: LossConfig) -> dict[str, float]:
    """The metrics of (4, K + 1) sums: the loss, and loss and accuracy of every class and every predicted stream."""
    sums, quiet = sums[:, :-1], sums[:, -1]
    numbers = {"loss": float((sums[0] * loss_scale(sums[1], table, config)).sum())}
    found = {name: sums[:, rows].sum(1) for name, rows in classes(table).items()}
    if quiet[1] > 0:
        found |= {"text_pad": quiet, "text_real": found["text"] - quiet}
    for name, (nll, weight, hits, count) in found.items():
        if weight > 0:
            numbers |= {f"{name}_loss": float(nll / weight), f"{name}_accuracy": float(hits / count)}
    return numbers


def classes(table: StreamTable) -> dict[str, list[int]]:
    """The predicted rows of each class: text, audio, every single row; in dialogues also semantic, acoustic, own and user rows."""
    out = table.audio_out
    found = {"text": table.text_out, "audio": out}
    if table.monologue:
        name = {k: table.streams[k].name for k in out}
        found |= {"semantic": [k for k in out if name[k] in ("cb1", "user1")], "own": [k for k in out if name[k].startswith("cb")]}
        found |= {"acoustic": [k for k in out if k not in found["semantic"]], "user": [k for k in out if k not in found["own"]]}
    return found | {table.streams[k].name: [k] for k in [*table.text_out, *out]}


class Meter:
    """Counts the columns, tokens and frames of the steps since the last `read`."""

    def __init__(self, table: StreamTable, frame_rate: float, world: int = 1, step: int = 0) -> None:
        first = [table.streams[k] for k in table.audio_out[:1]]
        self.row, self.edges = table.audio_out[:1], [edge for s in first for edge in (s.start, s.end)]
        self.frame_rate, self.world, self.step, self.flat = frame_rate, world, step, table.flat
        self.began, self.counts = time.perf_counter(), torch.zeros(3, dtype=torch.long)

    def add(self, tokens: Tensor) -> None:
        """Count columns, tokens, and frames of the agent's speech in a grid (B, K, S)."""
        codes = tokens[:, self.row]
        frames = ((codes >= 0) & (codes != self.edges[0]) & (codes != self.edges[1]) if self.row else codes.bool()).sum()
        if self.flat:
            first, Q, V = self.flat
            frames = ((tokens >= first) & (tokens < first + Q * V)).sum() // Q
        self.counts += torch.stack([(tokens >= 0).any(1).sum(), (tokens >= 0).sum(), frames])

    def read(self, step: int) -> dict[str, float]:
        """Speeds since the last call, which was before step `self.step`; resets the counts."""
        now, steps = time.perf_counter(), step + 1 - self.step
        seconds, (columns, tokens, frames) = now - self.began, (self.counts * self.world).tolist()
        self.began, self.step = now, step + 1
        self.counts.zero_()
        found = {"step_seconds": seconds / steps, "columns_per_second": columns / seconds, "tokens_per_second": tokens / seconds}
        if self.frame_rate:
            found["audio_seconds_per_second"] = frames / self.frame_rate / seconds
        return found | {"memory_gib": peak_memory()}


def peak_memory() -> float:
    """Peak memory of this process in GiB, of the GPU if it uses one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return most / (2**30 if sys.platform == "darwin" else 2**20)            # macOS counts bytes, Linux KiB


def pace(speeds: dict[str, float]) -> str:
    """The speeds in one line, for the log."""
    shown = f"{speeds['step_seconds']:.2f} s a step, " + ", ".join(f"{speeds[f'{x}_per_second']:.0f} {x}/s" for x in ("columns", "tokens"))
    if "audio_seconds_per_second" in speeds:
        shown += f", {speeds['audio_seconds_per_second']:.0f} s of speech a second"
    return shown + f", {speeds['memory_gib']:.1f} GiB"


def memory(model: nn.Module) -> str:
    """The memory of this rank without activations, as a line for the log."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, ours = (sum(part(p).numel() * p.element_size() for p in ps) / 2**20 for ps in (model.parameters(), trained))
    counts = f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(p.numel() for p in trained):,} trained"
    return f"{counts}; memory: weights {weights:.0f} MiB, gradients {ours:.0f} MiB, AdamW {2 * ours:.0f} MiB, and activations"


def check_first_loss(numbers: dict[str, float], table: StreamTable, source: str) -> list[str]:
    """Warn if a pretrained model starts near the loss of random guessing: its codec, tokenizer or layout does not match the data."""
    warnings = []
    for name, rows in (("text_loss", table.text_out), ("audio_loss", table.audio_out)):
        guess = math.log(table.streams[rows[0]].classes) if rows else math.inf
        if numbers.get(name, 0.0) > 0.9 * guess:
            found = f"{source} starts with {name} {numbers[name]:.2f}, a random guess has {guess:.2f}"
            warnings.append(f"warning: {found}; check codec and tokenizer")
    return warnings
