"""Side-by-side measurements: us and what people use now, in one process, on equal weights and equal tokens.

    python bench.py higgs                           both of these with the peer; also moshi, qwen, moss, tiny
    python bench.py train --model=higgs --peer      a LoRA training step against transformers + PEFT (moshi: against moshi)
    python bench.py decode --model=moshi --peer     greedy frames against LMGen (higgs, qwen: against transformers generate)
    python bench.py loss                            chunked cross-entropy against full logits: time and peak memory
    python bench.py memory --model=higgs --peer     peak extra memory of the loss and of a training step
    python bench.py kernels                         every op of kernels/ against torch.compile of its reference (CUDA)
    python bench.py loader                          columns a second and packing of data.Loader on the bundled speech
    python bench.py scaling                         a training step on 1, 2 and 4 gloo processes of one thread each

Before anything is timed both sides compute: the losses of three updates, or all greedy tokens, must be equal. Then they
alternate, and the median of the pairwise ratios counts: a busy machine slows both halves of a pair. A peer that is not
installed reads "not measured". `make bench` runs everything; BENCHMARKS.md holds the results and the machine.
"""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lora
import parallel
import peers
from checkpoint import export
from data import Loader, prepare
from kernels import PAIRS, shapes
from lora import LoraConfig
from loss import LossConfig, loss_scale
from model import MultistreamLM
from options import apply, edge, help_text, run_config, split_arguments
from peers import Side
from sample import SampleConfig, generate
from streams import delay

LORA = {"higgs": ("attn.*", "audio_ffn.*"), "moshi": ("*",), **dict.fromkeys(("qwen", "tiny", "moss"), ("attn.*", "ffn.*"))}
BYTES, FLOPS = 4.3e12, 790e12      # an H200: bytes a second of a copy, bf16 operations a second of a product, both measured
TARGETS = {"train higgs": 0.8, "train moshi": 0.7, "decode higgs": 0.5, "decode moshi": 0.5, "decode qwen": 0.5}     # ours / peer
TOLERANCE = 1e-4           # of losses, relative; tokens must be the same


@dataclass(frozen=True)
class Job:
    """What is measured, and how long."""

    model: str = "tiny"        # tiny, higgs, moshi, moss or qwen
    preset: str = "tiny"       # tiny: small shapes, fp32; full: the published shape with random weights, bf16
    peer: bool = False         # also run the peer, alternately
    width: int = 128           # of the tiny preset, a multiple of 32; at 256 more is memory traffic, which both sides share
    pairs: int = 9             # timed repetitions of each side
    threads: int = 1           # threads of an operator
    json: bool = False         # print the JSON lines only

    def __post_init__(self) -> None:
        assert self.model in LORA, f"model {self.model!r} is none of {', '.join(LORA)}"
        assert self.preset in ("tiny", "full"), f"preset {self.preset!r} is neither tiny nor full"
        assert self.pairs > 0 and self.threads > 0 and self.width % 32 == 0 < self.width, "pairs and threads are at least 1, width is 32 n"


class Pair(NamedTuple):
    """What is compared: two sides, or ours alone, and what of them is equal or why there is no peer."""

    ours: Side
    peer: Side | None
    units: int                 # columns, frames or tokens that a side works off
    told: str
    model: MultistreamLM


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

def train_case(job: Job, folder: Path) -> Pair:
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
    return Pair(ours, peer, tokens.shape[0] * tokens.shape[2], why or "losses of three updates", model)


# ---- decoding ----

def decode_case(job: Job, folder: Path, columns: int = 64) -> Pair:
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
    return Pair(ours, peer, columns, why or "greedy tokens", model)


def near_hardware(what: str, pair: Pair, seconds: float) -> dict[str, Any]:
    """On CUDA: operations against what an H200 multiplies, bytes against what it reads, and the memory that was needed."""
    if not torch.cuda.is_available():
        return {}
    row: dict[str, Any] = {"device": torch.cuda.get_device_name(), "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    if what == "train":
        with FlopCounterMode(display=False) as counter:
            pair.ours()
        return row | {"TFLOP/s": counter.get_total_flops() / seconds / 1e12, "of_790_TFLOP/s": counter.get_total_flops() / seconds / FLOPS}
    skipped = ("embed.", "depth.text.", "depth.audio.") + ((".ffn.",) if pair.model.config.dual_ffn else ())     # not read whole
    read = sum(p.numel() * p.element_size() for n, p in pair.model.named_parameters() if not any(s in n for s in skipped))
    return row | {"GB/s": read * pair.units / seconds / 1e9, "of_byte_floor": read * pair.units / BYTES / seconds}


def bench_pair(job: Job, what: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        pair = (train_case if what == "train" else decode_case)(job, Path(folder))
        ours, peer, units, told, _ = pair
        if peer is not None:
            one, other = (torch.stack([side().cpu() for _ in range(3 if what == "train" else 1)]) for side in (ours, peer))
            both = min(one.shape[-1], other.shape[-1])       # a generator may hold back its last frame
            told = check(one[..., :both], other[..., :both], told)
        row = {"what": f"{what} {job.model}", **compare(*alternate(ours, peer, job.pairs), units), "checked": told}
        return [row | {"target": TARGETS.get(row["what"])} | near_hardware(what, pair, row["ours"]["ms"]["median"] / 1e3)]


def bench_model(job: Job) -> list[dict[str, Any]]:
    """A family's training step and its generation, each beside its peer."""
    return [row for what in ("train", "decode") for row in bench_pair(replace(job, peer=True), what)]


# ---- the loss ----

def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most since the last reset."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) / 1024


def extra_memory(side: Side) -> float:
    """The MiB that a second run adds at most: what libraries keep for themselves is there by then.

    Not ru_maxrss: that cannot be reset, and begins at the size of the process that started this one.
    """
    side()
    Path("/proc/self/clear_refs").write_text("5")            # VmHWM = VmRSS
    before = resident("VmRSS")
    side()
    return resident("VmHWM") - before


def peak(which: str, model: str, vocab: int, streams: int) -> None:
    """Print the extra memory of one side: of the loss, or of a training step of `model` at width `vocab`."""
    torch.set_num_threads(1)
    if not model:
        return print(extra_memory(peers.loss_side(vocab, streams, which == "peer")))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, *_ = train_case(Job(model=model, width=vocab, peer=which == "peer"), Path(folder))
        print(extra_memory(ours if which == "ours" else theirs))


def run_peak(which: str, vocab: int, streams: int = 1, model: str = "") -> float:
    """`peak` in a process of its own, which gives freed memory back at once."""
    command = [sys.executable, __file__, "peak", which, model, str(vocab), str(streams)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": "0"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def memory_row(what: str, told: str, limit: float | None, sizes: dict[str, float]) -> dict[str, Any]:
    row = {"what": what, **{name: {"MiB": spread([size])} for name, size in sizes.items()}, "checked": told, "target": limit}
    return row | {"ratio": spread([sizes["ours"] / sizes["peer"]]) if "peer" in sizes else None}


def bench_memory(job: Job) -> list[dict[str, Any]]:
    """Of the loss against full logits, then of a training step of --model against its peer."""
    rows = [memory_row(f"loss memory {n}x{vocab}", "", limit, {which: run_peak(which, vocab, n) for which in ("ours", "peer")})
            for vocab, n, limit in ((32000, 1, 0.15), (1026, 8, 0.2))]
    why = peers.missing(job.model) or ("" if job.peer else "not measured: add --peer")
    sizes = {which: run_peak(which, job.width, model=job.model) for which in (("ours",) if why else ("ours", "peer"))}
    return [*rows, memory_row(f"train memory {job.model}", why, None, sizes)]


def bench_loss(job: Job) -> list[dict[str, Any]]:
    rows = bench_memory(job)[:2]
    for vocab, streams in ((32000, 1), (1026, 8)):
        sides = [peers.loss_side(vocab, streams, which) for which in (False, True)]
        told = check(*(side() for side in sides), "loss and gradient")
        times = compare(*alternate(*sides, job.pairs), 4096)
        rows.append({"what": f"loss time {streams}x{vocab}", **times, "checked": told, "target": 1.0})
    return rows


# ---- kernels ----

def bench_kernels(job: Job) -> list[dict[str, Any]]:
    """Each op, forward and backward, against torch.compile of its reference, with the share of the byte floor it reaches."""
    cuda = torch.cuda.is_available()
    width, count, dtype = (4096, 16384, torch.bfloat16) if cuda else (job.width, 64, torch.float32)
    given, rows = shapes.cases(torch.device("cuda" if cuda else "cpu"), dtype, count, width), []
    for name, (op, ref) in PAIRS.items():
        ours, peer = shapes.op_side(op, given[name]), shapes.op_side(torch.compile(ref), given[name]) if cuda else None
        times = compare(*alternate(ours, peer, job.pairs), 1)
        moved, seconds = shapes.moved(given[name], ours()), times["ours"]["ms"]["median"] / 1e3
        floor = {"GB/s": moved / seconds / 1e9, "of_byte_floor": moved / BYTES / seconds} if cuda else {}
        told = "" if cuda else "the reference; its Triton kernel: not measured, no CUDA device"
        rows.append({"what": f"kernel {name}", **times, "checked": told, "target": 1.0 if cuda else None, **floor})
    return rows


# ---- several processes ----

def rank_side(job: Job) -> None:
    """One of several processes: its share of a LoRA step, gradients averaged by DDP. The first one prints seconds and bytes."""
    torch.set_num_threads(1)
    parallel.start("cpu")
    with tempfile.TemporaryDirectory() as folder:
        model = train_case(replace(job, peer=False), Path(folder)).model
        tokens, weights = peers.training_batch(model, 2)
        for p in model.parameters():
            p.grad = None
        net = parallel.wrap(model, torch.device("cpu"))
        side = peers.training_side(model, lambda: net(tokens, weights).nll.sum())
        times = alternate(side, None, job.pairs)[0]
    if parallel.ranks()[0] == 0:
        print(json.dumps([times, sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)]))
    parallel.end()


def bench_scaling(job: Job, worlds: tuple[int, ...] = (1, 2, 4)) -> list[dict[str, Any]]:
    """The same work for every process on 1, 2 and 4 of them: what gloo and the shared cores cost. Traffic is that of a ring."""
    rows, alone = [], None
    for world in worlds:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "rank", f"--model={job.model}", f"--width={job.width}", f"--pairs={job.pairs}"]
        running = [subprocess.Popen(command, env=env | {"RANK": str(n)}, stdout=subprocess.PIPE, text=True) for n in range(world)]
        said = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            raise ValueError(f"a process of {world} failed; its message stands above")
        times, size = json.loads(said[0])
        alone = alone or times
        row = {"what": f"{world} process{'es' * (world > 1)} {job.model}", **compare(times, alone, world), "target": None}
        sent = 2 * (world - 1) / world * size / 2**20
        rows.append(row | {"against": "alone", "sent_MiB": sent, "checked": f"each sends {sent:.1f} MiB a step; {os.cpu_count()} cores"})
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
    near = "".join(f", {name} {row[name]:.2f}" for name in ("of_790_TFLOP/s", "of_byte_floor", "peak_GiB") if name in row)
    if row["ratio"] is None:
        return f"{row['what']:<20} {rate} ours {cells[0]}  {row['checked']}{near}"
    goal = f", target {row['target']}" if row["target"] else ""
    ratio = "{median:.2f} ({p10:.2f} .. {p90:.2f})".format(**row["ratio"])
    return f"{row['what']:<20} {rate} ours {cells[0]}  {row.get('against', 'peer')} {cells[1]}  ratio {ratio}{goal}{near}"


WHAT = {"loss": bench_loss, "memory": bench_memory, "kernels": bench_kernels, "loader": bench_loader, "scaling": bench_scaling}


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help", "peer", "json"))
    known = ("train", "decode", *WHAT, *LORA)
    if "help" in pairs:
        return print(help_text(Job(), f"python bench.py {'|'.join(known)} [--model=higgs --peer]"))
    if words[:1] == ["peak"]:
        return peak(words[1], words[2], int(words[3]), int(words[4]))
    if words and words[0] in LORA:
        pairs["model"] = words[0]
    job = apply(Job(), {key: value or "true" for key, value in pairs.items()})
    if words == ["rank"]:
        return rank_side(job)
    if len(words) != 1 or words[0] not in known:
        raise ValueError(f"unexpected {' '.join(words) or 'nothing'}; say what to measure: {', '.join(known)}")
    torch.set_num_threads(job.threads)
    versions = {name: importlib.metadata.version(name) for name in ("torch", *peers.NEEDS.get(job.model, ())) if not peers.absent(name)}
    rows = bench_model(job) if words[0] in LORA else WHAT[words[0]](job) if words[0] in WHAT else bench_pair(job, words[0])
    setting = {"preset": job.preset, "width": job.width, "threads": job.threads, "pairs": job.pairs, "versions": versions}
    for row in rows:
        print(json.dumps(row | setting))
        if not job.json:
            print(show(row))


if __name__ == "__main__":
    edge(main)
