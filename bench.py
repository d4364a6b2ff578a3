"""Side-by-side measurements: us and what people use now, in one process, on equal weights and equal tokens.

    python bench.py train --model=higgs --peer      a LoRA training step against transformers + PEFT (moshi: against moshi)
    python bench.py decode --model=moshi --peer     greedy frames against LMGen (higgs, qwen: against transformers generate)
    python bench.py loss                            chunked cross-entropy against full logits: time and peak memory
    python bench.py loader                          columns a second and packing of data.Loader on the bundled speech

Before anything is timed both sides compute: the losses of three updates, or all greedy tokens, must be equal. Then they
alternate, and the median of the pairwise ratios counts: a busy machine slows both halves of a pair. A peer that is not
installed reads "not measured". `make bench` runs everything; BENCHMARKS.md holds the results and the machine.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora
import peers
from checkpoint import export
from data import Loader, prepare
from lora import LoraConfig
from loss import LossConfig, loss_scale
from model import MultistreamLM
from options import apply, edge, help_text, run_config, split_arguments
from peers import Side
from sample import SampleConfig, generate
from streams import delay

LORA = {"higgs": ("attn.*", "audio_ffn.*"), "qwen": ("attn.*", "ffn.*"), "moshi": ("*",), "tiny": ("attn.*", "ffn.*")}
TARGETS = {"train higgs": 0.8, "train moshi": 0.7, "decode higgs": 0.5, "decode moshi": 0.5, "decode qwen": 0.5}     # ours / peer
TOLERANCE = 1e-4           # of losses, relative; tokens must be the same


@dataclass(frozen=True)
class Job:
    """What is measured, and how long."""

    model: str = "tiny"        # tiny, higgs, moshi or qwen
    preset: str = "tiny"       # tiny: small shapes, fp32; full: the published shape with random weights, bf16
    peer: bool = False         # also run the peer, alternately
    width: int = 256           # of the tiny preset, a multiple of 32; at 128 more is overhead and less is memory traffic
    pairs: int = 9             # timed repetitions of each side
    threads: int = 1           # threads of an operator
    json: bool = False         # print the JSON lines only

    def __post_init__(self) -> None:
        assert self.model in LORA, f"model {self.model!r} is none of {', '.join(LORA)}"
        assert self.preset in ("tiny", "full"), f"preset {self.preset!r} is neither tiny nor full"
        assert self.pairs > 0 and self.threads > 0 and self.width % 32 == 0 < self.width, "pairs and threads are at least 1, width is 32 n"


# ---- measuring ----

def alternate(ours: Side, peer: Side | None, pairs: int, warmup: int = 2) -> tuple[list[float], list[float]]:
    """Seconds of both sides, one after the other, `pairs` times each."""
    seconds: tuple[list[float], list[float]] = [], []
    for n in range(-warmup, pairs):
        for side, kept in zip((ours, peer), seconds, strict=True):
            if side is not None:
                began = time.perf_counter()
                side()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if n >= 0:
                    kept.append(time.perf_counter() - began)
    return seconds


def spread(values: list[float], factor: float = 1.0) -> dict[str, float]:
    """Median, first and last decile, to four digits."""
    at = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)) * factor
    return {name: float(f"{value:.4g}") for name, value in zip(("median", "p10", "p90"), at.tolist(), strict=True)}


def compare(ours: list[float], peer: list[float], units: int) -> dict[str, Any]:
    """Milliseconds and units a second of both sides, and the ratios of the pairs (ours / peer, below 1 = we are faster)."""
    sides = {name: {"ms": spread(times, 1e3), "per_second": float(f"{units / spread(times)['median']:.4g}")}
             for name, times in (("ours", ours), ("peer", peer)) if times}
    return sides | {"ratio": spread([a / b for a, b in zip(ours, peer, strict=True)]) if peer else None}


def check(ours: Tensor, peer: Tensor, what: str) -> str:
    """Both sides computed the same, or nothing is measured."""
    error = float((ours - peer).abs().max() / peer.abs().max().clamp(min=1e-9)) if ours.shape == peer.shape else float("inf")
    if not error <= (TOLERANCE if ours.is_floating_point() else 0):
        raise ValueError(f"{what} differ from the peer's ({error:.1e}); a fast wrong answer is not measured, mend that first")
    return f"{what} equal ({error:.0e})"


def write(job: Job, folder: Path) -> tuple[MultistreamLM, str]:
    """The model, written in the peer's layout when that is to be measured; and why it is not."""
    model, why = peers.build(job.model, job.width if job.preset == "tiny" else 0), peers.missing(job.model)
    why = why or ("" if job.peer else "not measured: add --peer")
    if not why:
        export(model, folder, "moshi" if job.model == "moshi" else "hf")
    return model, why


# ---- one training step ----

def train_case(job: Job, folder: Path) -> tuple[Side, Side | None, int, str]:
    model, why = write(job, folder)
    lora.inject(model, LoraConfig(rank=16, alpha=32.0, targets=LORA[job.model])).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)                     # not zero: every adapter has a gradient from the start
    tokens, weights = (t.to(peers.like(model).device) for t in peers.training_batch(model, 2 if job.model == "moshi" else 4))
    # transformers adds up the means of eight codebooks, the others take one mean over all of them
    config = LossConfig(audio=float(len(model.table.audio_out)) if job.model == "higgs" else 1.0)
    scale, peer = loss_scale(weights[..., 1:].sum((0, 2)), model.table, config), None
    if not why:
        export(model, folder / "adapter", "moshi-lora" if job.model == "moshi" else "peft")
        training = peers.moshi_training if job.model == "moshi" else peers.transformers_training
        peer = peers.training_side(*training(folder, model, tokens, weights))
    ours = peers.training_side(model, lambda: (scale * model(tokens, weights).nll).sum())
    return ours, peer, tokens.shape[0] * tokens.shape[2], why or "losses of three updates"


# ---- decoding ----

def decode_case(job: Job, folder: Path, columns: int = 64) -> tuple[Side, Side | None, int, str]:
    """Greedy: a prompt of 32 columns (aligned: the start column) and 64 more."""
    model, why = write(job, folder)
    table, given, peer = model.table, peers.frames(model, 1, 96).to(peers.like(model).device), None
    read, start = [k for k in table.audio if k not in table.audio_out], table.column("start").to(given.device)
    prompt = start[None] if table.aligned else torch.full_like(given[..., :32], -1)
    if not table.aligned:
        prompt[:, 0] = given[:, 0, :32]
        prompt[:, 0, -1] = table.audio_start if table.audio else prompt[:, 0, -1]
    heard = delay(given[..., 1:], table.delays, start)       # LMGen drops what it is given first
    rows = [*table.text_out, *table.audio_out] if table.aligned else table.audio or table.text

    def ours() -> Tensor:
        places = iter(range(1, columns + 1))

        def feed(column: Tensor) -> Tensor:
            column[:, read] = heard[:, read, next(places)]
            return column

        config = SampleConfig(temperature=0, max_frames=columns)
        made = torch.stack(list(generate(model, prompt, config, feed if read else None)), -1)[:, rows]
        return made[..., (made >= 0).any(1)[0]]

    if not why and job.model == "moshi":
        peer = peers.moshi_decoding(folder, model, given[:, read], columns)
    elif not why:
        peer = peers.transformers_decoding(folder, model, prompt, columns)
    return ours, peer, columns, why or "greedy tokens"


def bench_pair(job: Job, what: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        ours, peer, units, told = (train_case if what == "train" else decode_case)(job, Path(folder))
        if peer is not None:
            one, other = (torch.stack([side().cpu() for _ in range(3 if what == "train" else 1)]) for side in (ours, peer))
            both = min(one.shape[-1], other.shape[-1])       # a generator may hold back its last frame
            told = check(one[..., :both], other[..., :both], told)
        row = {"what": f"{what} {job.model}", **compare(*alternate(ours, peer, job.pairs), units), "checked": told}
        return [row | {"target": TARGETS.get(row["what"])}]


# ---- the loss ----

def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most since the last reset."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) / 1024


def peak(which: str, vocab: int, streams: int) -> None:
    """Print the MiB that a second forward and backward add at most: what libraries keep for themselves is there by then.

    Not ru_maxrss: that cannot be reset, and begins at the size of the process that started this one.
    """
    torch.set_num_threads(1)
    side = peers.loss_side(vocab, streams, which == "naive")
    side()
    Path("/proc/self/clear_refs").write_text("5")            # VmHWM = VmRSS
    before = resident("VmRSS")
    side()
    print(resident("VmHWM") - before)


def run_peak(which: str, vocab: int, streams: int) -> float:
    """`peak` in a process of its own, which gives freed memory back at once."""
    command = [sys.executable, __file__, "peak", which, str(vocab), str(streams)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": "0"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def bench_loss(job: Job) -> list[dict[str, Any]]:
    rows = []
    for vocab, streams, limit in ((32000, 1, 0.15), (1026, 8, 0.2)):
        ours, naive = (run_peak(which, vocab, streams) for which in ("ours", "naive"))
        rows.append({"what": f"loss memory {streams}x{vocab}", "ours": {"MiB": spread([ours])}, "peer": {"MiB": spread([naive])},
                     "ratio": spread([ours / naive]), "checked": "", "target": limit})
        sides = [peers.loss_side(vocab, streams, which) for which in (False, True)]
        told = check(*(side() for side in sides), "loss and gradient")
        times = compare(*alternate(*sides, job.pairs), 4096)
        rows.append({"what": f"loss time {streams}x{vocab}", **times, "checked": told, "target": 1.0})
    return rows


# ---- the loader ----

def bench_loader(job: Job) -> list[dict[str, Any]]:
    config = run_config(peers.TINY)
    data = replace(config.data, prefetch=0)
    prepare(data, config.model.table)
    batches, sizes = iter(Loader(data, config.model.table, "train", config.batch_size)), []

    def side() -> None:
        sizes.extend((int((batch.segments >= 0).sum()), batch.segments.numel()) for batch in islice(batches, 100))

    times = alternate(side, None, job.pairs)[0]
    real, whole = (sum(column) for column in zip(*sizes, strict=True))
    row = {"what": "loader", **compare(times, [], real // (job.pairs + 2)), "packing": real / whole}
    return [row | {"checked": f"packing {row['packing']:.1%}", "target": None}]


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    sides = [row[side] for side in ("ours", "peer") if side in row]
    cells = [f"{side[unit]['median']:9.1f} {unit}" for side in sides for unit in ("MiB", "ms") if unit in side]
    rate = f"{row['ours']['per_second']:>9,.0f}/s " if "per_second" in row["ours"] else " " * 12
    if row["ratio"] is None:
        return f"{row['what']:<20} {rate} ours {cells[0]}  {row['checked']}"
    goal = f", target {row['target']}" if row["target"] else ""
    ratio = "{median:.2f} ({p10:.2f} .. {p90:.2f})".format(**row["ratio"])
    return f"{row['what']:<20} {rate} ours {cells[0]}  peer {cells[1]}  ratio {ratio}{goal}"


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help", "peer", "json"))
    if "help" in pairs:
        return print(help_text(Job(), "python bench.py train|decode|loss|loader [--model=higgs --peer]"))
    if words[:1] == ["peak"]:
        return peak(words[1], int(words[2]), int(words[3]))
    job = apply(Job(), {key: value or "true" for key, value in pairs.items()})
    if len(words) != 1 or words[0] not in ("train", "decode", "loss", "loader"):
        raise ValueError(f"unexpected {' '.join(words) or 'nothing'}; say what to measure: train, decode, loss or loader")
    torch.set_num_threads(job.threads)
    versions = {name: importlib.metadata.version(name) for name in ("torch", *peers.NEEDS.get(job.model, ())) if not peers.absent(name)}
    rows = {"loss": bench_loss, "loader": bench_loader}.get(words[0], lambda job: bench_pair(job, words[0]))(job)
    setting = {"preset": job.preset, "width": job.width, "threads": job.threads, "pairs": job.pairs, "versions": versions}
    for row in rows:
        print(json.dumps(row | setting))
        if not job.json:
            print(show(row))


if __name__ == "__main__":
    edge(main)
