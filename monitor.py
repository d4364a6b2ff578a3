"""What a run tells of itself: numbers to files and trackers, what it holds in memory, and a warning that it fits nothing.

    out/demo/metrics.jsonl      {"step": 40, "train/loss": 3.1, ..., "grad_norm": 0.8, "lr": 0.001, "columns_per_second": 5400.0}

Held-out numbers stand beside them as "val/...". Next: evaluate.py, which draws them.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from loss import LossConfig, loss_scale
from options import replace_file
from parallel import part
from streams import StreamTable

Write = Callable[[dict[str, float], int], object]


class Log:
    """Writes numbers under a step to metrics.jsonl and to trackers; without a folder (ranks above 0) to nothing."""

    def __init__(self, out: Path | None = None, trackers: Sequence[str] = (), step: int = 0) -> None:
        self.writes = [] if out is None else [to_file(out, step), *(tracker(name, out) for name in trackers)]

    def __call__(self, step: int, numbers: dict[str, float]) -> None:
        for write in self.writes:
            write(numbers, step)


def to_file(out: Path, step: int) -> Write:
    """Append to metrics.jsonl, behind what a resumed run still stands for."""
    file = rewind(out / "metrics.jsonl", step).open("a")
    return lambda numbers, step: print(json.dumps({"step": step, **numbers}), file=file, flush=True)


def rewind(metrics: Path, step: int) -> Path:
    """Drop the lines of a metrics.jsonl that a killed run wrote behind its last checkpoint: they come again."""
    try:
        lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
        rows = [(line, json.loads(line)) for line in lines if line.endswith("}\n")]
        kept = "".join(line for line, row in rows if row["step"] < step + ("val/loss" in row))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{metrics} has a line that is no row of numbers ({error}); mend it or move the file away") from None
    replace_file(metrics, lambda temporary: Path(temporary).write_text(kept))
    return metrics


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
        wanted = "-e '.[log]'" if name == "tensorboard" else name
        raise ValueError(f"tracker {name} is not installed; run pip install {wanted} or drop it from --trackers") from None


def report(sums: Tensor, table: StreamTable, config: LossConfig) -> dict[str, float]:
    """Name the numbers of (4, K + 1) sums: the loss, and loss and accuracy of every class and every predicted stream."""
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
    """The predicted rows of each class: text, audio, each on its own; in a duplex grid also what kind and whose they are."""
    out = table.audio_out
    found = {"text": table.text_out, "audio": out}
    if table.layout == "duplex":
        name = {k: table.streams[k].name for k in out}
        found |= {"semantic": [k for k in out if name[k] in ("cb1", "user1")], "own": [k for k in out if name[k].startswith("cb")]}
        found |= {"acoustic": [k for k in out if k not in found["semantic"]], "user": [k for k in out if k not in found["own"]]}
    return found | {table.streams[k].name: [k] for k in [*table.text_out, *out]}


def memory(model: nn.Module) -> str:
    """What this rank holds before activations."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, ours = (sum(part(p).numel() * p.element_size() for p in ps) / 2**20 for ps in (model.parameters(), trained))
    counts = f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(p.numel() for p in trained):,} trained"
    return f"{counts}; memory: weights {weights:.0f} MiB, gradients {ours:.0f} MiB, AdamW {2 * ours:.0f} MiB, and activations"


def alarm(numbers: dict[str, float], table: StreamTable, source: str) -> list[str]:
    """A pretrained model that starts near the loss of a guess does not fit its data, its layout or its code."""
    told = []
    for name, rows in (("text_loss", table.text_out), ("audio_loss", table.audio_out)):
        guess = math.log(table.streams[rows[0]].classes) if rows else math.inf
        if numbers.get(name, 0.0) > 0.9 * guess:
            told.append(f"warning: {source} starts with {name} {numbers[name]:.2f}, a guess has {guess:.2f}; check codec and tokenizer")
    return told
