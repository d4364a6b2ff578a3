"""Side-by-side benchmarks of this code and its peers, in one process, on equal weights and equal tokens.

    python bench.py higgs                           train, decode and ops with the peer; also moshi, qwen, csm, moss, tiny
    python bench.py train --model=higgs --peer      a LoRA training step against transformers + PEFT (moshi: against moshi)
    python bench.py decode --model=moshi --peer     greedy frames against LMGen (higgs, qwen: against transformers generate), then
                                                    single sampled frames after a prompt of --context columns, --batch at once
    python bench.py prefill --model=higgs --peer    reading a prompt of --context columns
    python bench.py ops --model=moshi --peer        number of operations in a frame (CUDA: kernels, graphs, syncs)
    python bench.py loss                            chunked cross-entropy against full logits: time and peak memory
    python bench.py memory --model=higgs --peer     peak memory of the loss and of a training step
    python bench.py kernels                         every op of kernels/ against torch.compile of its reference (CUDA)
    python bench.py loader                          columns a second and packing of data.Loader on the bundled speech
    python bench.py scaling                         a training step on 1, 2 and 4 gloo processes of one thread each
    python bench.py graphs                          each family: the frames of CUDA graphs against those without (CUDA)
    python bench.py plan --model=higgs              measured peaks against those that --plan says (CUDA)
    python bench.py start                           CPU time until a script has imported, and of --help, against `import torch`
    python bench.py corpus --rows=100000            prepare, cold and again, and the index in memory, of that many synthetic rows
    python bench.py compare OLD NEW [train ...]     two checkouts in turns: what got slower, and by how much
    python bench.py scale                           8, 64, 512 GPUs and 100,000 hours, calculated from measured pieces
    python bench.py gpu                             all that needs a GPU, in nine minutes: benchmarks/gpu.py (make gpu)

Before the timing, both sides must compute the same losses of three updates, or the same greedy tokens. Then they run
alternately, and the result is the median of the pairwise ratios, because a busy machine slows both runs of a pair. A peer that
is not installed is shown as "not measured". `make bench` runs everything; BENCHMARKS.md has the results and the machine.
"""

import system.setup_check  # noqa: F401, first: it says how to set up where torch is missing

import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import nn

from benchmarks import checkouts, gpu, peers, scale
from benchmarks.measure import (
    CLOCKS,
    GIB,
    ON_GPU,
    Side,
    alternate,
    check,
    children,
    compare,
    extra_memory,
    frame_times,
    origin,
    per_frame,
    resident,
    show,
    spread,
    syncs,
)
from benchmarks.workloads import LORA, Job, decode_models, decode_sides, floor_bytes, prefill_side, train_workload, useful_flops
from checkpoint import DTYPES
from config import DataConfig, LoraConfig, TrainConfig
from corpus.index import prepare
from data import Loader
from generation.cuda_graphs import why_not
from generation.plan import need_of_sampling
from kernels import PAIRS, shapes
from model import MultistreamLM
from options import apply, edge, help_text, read_json, run_config, split_arguments, write_json, write_rows
from training import parallel
from training.plan import need_of_training

BYTES, FLOPS = 4.3e12, 790e12      # an H200: bytes a second of a copy, bf16 operations a second of a product, both measured
RATES = {"higgs": 25.0, "moshi": 12.5, "moss": 12.5, "csm": 12.5, "tiny": 25.0}           # frames of a second of speech
TARGETS = {"train higgs": 0.8, "train moshi": 0.7, "train csm": 0.6, "decode csm": 0.4,                           # ours / peer
           **dict.fromkeys(("decode higgs", "decode moshi", "decode qwen"), 0.5), **dict.fromkeys(("prefill higgs", "prefill qwen"), 0.9)}
PAGE = 4096 / 2**20                # MiB: less cannot be measured on a CPU
LIMITS = {"moshi": 600, "higgs": 80, "qwen": 80}             # operations a frame, at the tiny preset


# ---- one training step ----

def bench_train(job: Job) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        pair = train_workload(job, Path(folder))
        ours, peer, checked, *_ = pair
        if peer is not None:
            checked = check(*(torch.stack([side().cpu() for _ in range(3)]) for side in (ours, peer)), checked, job.half)
        row = {"what": f"train {job.model}", **compare(*alternate(ours, peer, job.pairs, clock=CLOCKS[job.clock]), sum(pair.lengths))}
        rate = useful_flops(pair) / row["ours"]["ms"]["median"] * 1e3
        row |= {"checked": checked, "target": TARGETS.get(row["what"]), "TFLOP/s": rate / 1e12}
        return [row | ({"MFU": rate / FLOPS, "syncs": syncs(ours)} if ON_GPU else {})]


# ---- decoding ----

def frame_row(job: Job, model: MultistreamLM, net: nn.Module | None, why: str) -> dict[str, Any]:
    """Times of single frames, sampled with top-k 250 after a prompt, and their ratio to the time of the necessary memory reads."""
    table, batch, frames = model.table, job.batch or 1, job.frames or (500 if ON_GPU else 50)
    context, deciles = job.context or (1 if table.aligned else 32), (10, 90, 99)
    columns = max(frames // 10, 1) + frames + max(table.delays) + 1
    ours, peer = decode_sides(model, net, batch, context, columns, 250)
    before = torch.cuda.memory_allocated() if ON_GPU else 0
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    sides = ((ours, columns), (peer, columns + context * table.aligned))
    turns = [[frame_times(side, count, frames, CLOCKS[job.clock]) for side, count in sides if side]
             for _ in range(1 if ON_GPU else min(job.pairs, 3))]
    row = compare([t for own, *_ in turns for t in own], [], batch, deciles)
    seconds, at = row["ours"]["ms"]["median"] / 1e3, [context + columns - frames, context + columns]
    if ON_GPU:
        row["peak_GiB"] = (torch.cuda.max_memory_allocated() - before + sum(p.nbytes for p in model.parameters())) / GIB
        row["times_floor"] = seconds * BYTES / floor_bytes(model, batch, sum(at) / 2)
    if peer is not None:
        row["peer"] = compare([t for _, other in turns for t in other], [], batch, deciles)["ours"]
        row["ratio"] = spread([statistics.median(own) / statistics.median(other) for own, other in turns])
    if job.model in RATES:
        row["RTF"] = seconds * RATES[job.model]
    prefill = alternate(prefill_side(model, batch, context), None, 5)[0]
    return row | {"what": f"frame {job.model}", "target": None, "checked": why, "p99_ms": row["ours"]["ms"]["p99"], "positions": at,
                  "GB/s": floor_bytes(model, batch, sum(at) / 2) / seconds / 1e9, "prefill_ms": spread(prefill, 1e3)["median"]}


def bench_decode(job: Job) -> list[dict[str, Any]]:
    """Greedy columns after a prompt of 32 columns (aligned: of the start column), then single frames."""
    with tempfile.TemporaryDirectory() as folder:
        model, net, why = decode_models(job, Path(folder))
        greedy = greedy_row(job, model, net, why, "decode", 1 if model.table.aligned else 32, 64)
        return [greedy, frame_row(job, model, net, why or "drawn, nothing to compare")]


def bench_prefill(job: Job) -> list[dict[str, Any]]:
    """A prompt of --context columns, read as a generation reads it, and the few columns that complete a first frame."""
    with tempfile.TemporaryDirectory() as folder:
        model, net, why = decode_models(job, Path(folder))
        if net is not None and model.table.aligned:
            net, why = None, "not measured: LMGen reads a prompt frame by frame"
        return [greedy_row(job, model, net, why, "prefill", job.context or 2000, max(model.table.delays) + 2)]


def greedy_row(job: Job, model: MultistreamLM, net: nn.Module | None, checked: str, what: str, context: int, columns: int) -> dict:
    ours, peer = decode_sides(model, net, job.batch or 1, context, columns, 0)
    if peer is not None:
        one, other = (side(columns).cpu() for side in (ours, peer))
        both = min(one.shape[-1], other.shape[-1])           # a generator may keep back its last frame
        checked = check(one[..., :both], other[..., :both], "greedy tokens", job.half or bool(job.quantize))
    times = alternate(*(side and partial(side, columns) for side in (ours, peer)), job.pairs, clock=CLOCKS[job.clock])
    units, name = (job.batch or 1) * (columns if what == "decode" else context), f"{what} {job.model}"
    return {"what": name, **compare(*times, units), "checked": checked, "target": TARGETS.get(name)}


def bench_ops(job: Job) -> list[dict[str, Any]]:
    """Number of operations that the host launches for one frame, with greedy decoding as in the published figures of the peers."""
    with tempfile.TemporaryDirectory() as folder:
        model, net, checked = decode_models(job, Path(folder))
        lag, frames = max(model.table.delays) + 1, job.frames or 8
        ours, peer = decode_sides(model, net, 1, 1 if model.table.aligned else 32, lag + 2 * frames, 0)
        found, other = per_frame(ours, frames, lag), per_frame(peer, frames, lag) if peer else None
    row = {"what": f"ops {job.model}", "ours": {"ops": spread([found.pop("ops")])}, "checked": checked, "ratio": None, **found}
    if other:
        row |= {"peer": {"ops": spread([other["ops"]])}, "ratio": spread([row["ours"]["ops"]["median"] / other["ops"]])}
    return [row | {"limit": None if ON_GPU else LIMITS.get(job.model)}]


def bench_model(job: Job) -> list[dict[str, Any]]:
    """A family's training step, decoding, and operations of a frame, each against its peer."""
    return [row for measure in (bench_train, bench_decode, bench_ops) for row in measure(replace(job, peer=True))]


# ---- the loss, memory ----

def peak(job: Job, which: str, *shape: int) -> float:
    """The extra memory of one side in MiB, for the loss at `shape` or for a training step."""
    if shape:
        return extra_memory(peers.loss_side(*shape, which, **loss_shape(job)))
    with tempfile.TemporaryDirectory() as folder:
        pair = train_workload(replace(job, peer=which == "peer"), Path(folder))
        side = pair.ours if which == "ours" else pair.peer
        del pair
        gc.collect()                                         # free the other side's memory on the device
        return extra_memory(side, whole=True)


def run_peak(job: Job, which: str, *shape: int) -> float:
    """Run `peak` in a separate process, with malloc set to return freed memory at once."""
    if not job.apart:
        return peak(job, which, *shape)
    options = [f"--{name}={value}" for name, value in asdict(job).items() if value != getattr(Job(), name)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "peak", which, *map(str, shape), *options]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout.split()[-1])


def memory_row(what: str, checked: str, limit: float | None, sizes: dict[str, float]) -> dict[str, Any]:
    row = {"what": what, **{name: {"MiB": spread([size])} for name, size in sizes.items()}, "checked": checked, "target": limit}
    return row | {"ratio": spread([sizes["ours"] / max(sizes["peer"], PAGE)]) if sizes.keys() >= {"ours", "peer"} else None}


def loss_shape(job: Job) -> dict[str, Any]:
    """Number of rows, width and dtype of the loss benchmarks."""
    rows, width = (16384, 4096) if job.preset == "full" else (16 * job.columns, 2 * job.width)
    return {"rows": rows, "width": width, "dtype": DTYPES["bf16" if job.half else "fp32"]}


def bench_loss_memory(job: Job) -> list[dict[str, Any]]:
    rows = []
    for vocab, streams, limit in ((32000, 1, 0.15), (1026, 8, 0.2)):
        ours, full = (run_peak(job, who, vocab, streams) for who in ("ours", "full"))
        rows.append(memory_row(f"loss memory {streams}x{vocab}", "", limit, {"ours": ours, "peer": full}))
    return rows


def bench_memory(job: Job) -> list[dict[str, Any]]:
    """Memory of the loss against full logits, then of a training step of --model against its peer."""
    why = peers.missing(job.model) or ("" if job.peer else "not measured: add --peer")
    sizes = {which: run_peak(job, which) for which in (("ours",) if why else ("ours", "peer"))}
    return [*bench_loss_memory(job), memory_row(f"train memory {job.model}", why, None, sizes)]


def bench_loss(job: Job) -> list[dict[str, Any]]:
    """The loss against full logits; then one stream without weights against torch and Liger."""
    rows, given = bench_loss_memory(job), loss_shape(job)
    for vocab, streams in ((32000, 1), (1026, 8)):
        sides = [peers.loss_side(vocab, streams, who, **given) for who in ("ours", "full")]
        checked = check(*(side() for side in sides), "loss and gradient", job.half)
        times = compare(*alternate(*sides, job.pairs), given["rows"])
        rows.append({"what": f"loss time {streams}x{vocab}", **times, "checked": checked, "target": 0.7 if ON_GPU else 1.0})
    for who, target in (("torch", None), ("liger", 1.1)):
        row = {"what": f"loss time {who}", "against": who, "target": target, "ratio": None}
        row["checked"] = peers.missing_loss(who) or ("" if job.peer else "not measured: add --peer")
        if not row["checked"]:
            sides = [peers.loss_side(32000, 1, name, **given, weighted=False) for name in ("ours", who)]
            row["checked"] = check(*(side() for side in sides), "loss and gradient", job.half)
            row |= compare(*alternate(*sides, job.pairs), given["rows"])
        rows.append(row)
    return rows


# ---- kernels, graphs, plans: what only a GPU can show ----

def bench_kernels(job: Job) -> Iterator[dict[str, Any]]:
    """Each op, forward and backward: its error against fp64, then its time against torch.compile of its reference, and its share of
    the memory bandwidth. One whose result is wrong is not timed."""
    width, count, device = (4096, 16384, "cuda") if ON_GPU else (max(64, job.width), 64, "cpu")
    for name, (op, ref) in PAIRS.items():
        row, errors = {"what": f"kernel {name}", "target": 1.0 if ON_GPU else None, "ratio": None}, {}
        for kind in ("fp32", "bf16") if ON_GPU else ("fp32",):
            given = shapes.cases(torch.device(device), DTYPES[kind], count, width)[name]
            errors[kind] = shapes.error_share(op, ref, given)
        row["checked"] = "error, of what rounding allows: " + ", ".join(f"{kind} {share:.2f}" for kind, share in errors.items())
        if max(errors.values()) > 1:
            yield row | {"checked": f"WRONG: {row['checked']}"}
            continue
        ours, peer = shapes.op_side(op, given), shapes.op_side(torch.compile(ref), given) if ON_GPU else None
        times = compare(*alternate(ours, peer, job.pairs), 1)
        moved, seconds = shapes.moved(given, ours()), times["ours"]["ms"]["median"] / 1e3
        floor = {"GB/s": moved / seconds / 1e9, "of_byte_floor": moved / BYTES / seconds} if ON_GPU else {}
        row["checked"] += "" if ON_GPU else "; its Triton kernel: not measured, no CUDA device"
        yield row | times | floor | {"against": "compile"}


def bench_graphs(job: Job) -> Iterator[dict[str, Any]]:
    """Every kind of model at a small size: its frames by CUDA graphs are those without, greedy and drawn."""
    for name in LORA:
        model = peers.build(name, job.width).eval()
        row = {"what": f"graphs {name}", "ratio": None, "checked": why_not(model, peers.like(model).device, None), "target": None}
        if row["checked"]:
            yield row | {"checked": f"not measured: {row['checked']}"}
            continue
        columns = job.frames or 40
        for rule, top_k in (("greedy", 0), ("drawn", 250)):
            plain, graphs = (decode_sides(model, None, 2, 9, columns, top_k, graphs)[0] for graphs in ("off", "on"))
            frames = plain(columns)
            row["checked"] += f"{rule}: " + check(graphs(columns).double(), frames.double(), f"{frames.shape[-1]} frames") + "; "
        yield row | compare(*(frame_times(side, columns, columns // 2) for side in (graphs, plain)), 1) | {"against": "eager"}


def bench_plan(job: Job) -> Iterator[dict[str, Any]]:
    """Measured peaks of a training step and of a generation on the device, and what --plan says of them."""
    dtype, device = DTYPES["bf16" if job.half else "fp32"], "cuda" if ON_GPU else "cpu"
    why = "" if ON_GPU else "not measured: no CUDA device, only the plan was made"
    model = peers.architecture(job.model, 0 if job.preset == "full" else job.width)
    config = TrainConfig(replace(model, checkpoint=job.checkpoint), DataConfig(columns=job.columns), batch_size=job.batch or 4,
                         lora=LoraConfig(rank=job.rank, alpha=2.0 * job.rank, targets=LORA[job.model]))
    context, frames = job.context or 512, job.frames or 64
    needs = {"train": need_of_training(config, dtype, device), "sample": need_of_sampling(model, dtype, device, context + frames)}
    for what, need in needs.items():
        sizes = {"peer": need.total / 2**20}
        if not why and what == "train":
            sizes = {"ours": run_peak(job, "ours")} | sizes
        elif not why:
            ours = decode_sides(peers.build(job.model, job.width if job.preset == "tiny" else 0, dtype), None, 1, context, frames, 250)[0]
            sizes = {"ours": extra_memory(partial(ours, frames), whole=True)} | sizes
        yield memory_row(f"plan {what} {job.model}", why, 1.15, sizes) | {"against": "plan"}


# ---- several processes ----

def rank_side(job: Job) -> None:
    """One of several processes: a LoRA step whose gradients DDP averages. Rank 0 prints seconds and gradient bytes."""
    torch.set_num_threads(1)
    parallel.start("cpu", 0)
    with tempfile.TemporaryDirectory() as folder:
        model = train_workload(replace(job, peer=False), Path(folder)).model
        tokens, weights = peers.training_batch(model, [256] * 2)
        for p in model.parameters():
            p.grad = None
        net = parallel.wrap(model, torch.device("cpu"))
        side = peers.training_side(model, lambda: net(tokens, weights).nll.sum())
        times = alternate(side, None, job.pairs)[0]
    if parallel.ranks()[0] == 0:
        print(json.dumps([times, sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)]))
    parallel.end()


def bench_scaling(job: Job, worlds: tuple[int, ...] = (1, 2, 4)) -> list[dict[str, Any]]:
    """The same work in each of 1, 2 and 4 processes: the cost of gloo and of sharing cores. Traffic is that of a ring all-reduce."""
    rows, alone = [], None
    for world in worlds:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "rank", f"--model={job.model}", f"--width={job.width}", f"--pairs={job.pairs}"]
        running = [subprocess.Popen(command, env=env | {"RANK": str(n)}, stdout=subprocess.PIPE, text=True) for n in range(world)]
        outputs = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            raise ValueError(f"one of {world} processes failed; its message is above")
        times, size = json.loads(outputs[0])
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


# ---- what users wait for ----

ROOT = Path(__file__).resolve().parent
SCRIPTS = ("train", "sample", "data", "checkpoint", "evaluate", "bench", "serve")
LOADS = {"codec tiny": "from audio import load_codec; load_codec('tiny')",
         "tokenizer, words": "from text.tokenizers import load_tokenizer; load_tokenizer('assets/speech/words.json')"}


def bench_start(job: Job) -> Iterator[dict[str, Any]]:
    """CPU time of whole processes: a script until it refuses an option, its help, and what it loads, against `import torch`."""
    def process(*words: str) -> Side:
        def side() -> Any:
            subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return side

    commands = {f"start {name}.py": (f"{name}.py", "--nothing=1") for name in SCRIPTS}
    commands |= {f"help {name}.py": (f"{name}.py", "--help") for name in SCRIPTS}
    commands |= {f"load {name}": ("-c", f"import torch; {code}") for name, code in LOADS.items()}
    for what, words in commands.items():
        times = alternate(process(*words), process("-c", "import torch"), job.pairs, 1, clock=children)
        yield {"what": what, **compare(*times, 1), "against": "import torch", "checked": "", "target": None if "load" in what else 1.2}


def bench_corpus(job: Job) -> Iterator[dict[str, Any]]:
    """`prepare` of synthetic clips of 0.2 s, the first time and again; then what an open loader keeps in memory a row."""
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder) / "clips", job.rows)
        config, checked = run_config(ROOT / "configs" / "tiny_clone.py"), f"{job.rows:,} rows, CPU time"
        data = replace(config.data, sources=(f"{folder}/clips",), cache=f"{folder}/cache", split="hash", min_seconds=0.1, variants=1)
        for what in ("cold", "warm"):
            with redirect_stdout(sys.stderr):
                times = alternate(partial(prepare, data, config.model.table), None, 1, 0, clock=time.process_time)[0]
            yield {"what": f"corpus {what}", **compare(times, [], job.rows), "checked": checked, "target": None}
        before = resident("RssAnon")
        loader: list[Loader] = []
        times = alternate(lambda: loader.append(Loader(data, config.model.table)), None, 1, 0, clock=time.process_time)[0]
        size = resident("RssAnon") - before
        yield {"what": "corpus open", **compare(times, [], job.rows), "checked": checked, "target": None,
               "bytes_a_row": size * 2**20 / len(loader[0].index.entries)}


def write_clips(folder: Path, count: int) -> None:
    """Clips of noise, no two alike, and their manifest."""
    draw, rows = np.random.default_rng(0), []
    for n in range(count):
        path = folder / f"{n // 1000:03d}" / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, draw.uniform(-0.5, 0.5, 3200), 16000, subtype="PCM_U8")
        rows.append({"id": f"clip/{n}", "audio": str(path.relative_to(folder)), "text": f"clip {n}", "speaker": f"speaker {n % 9}"})
    write_rows(folder / "manifest.jsonl", rows)


WHAT = {"train": bench_train, "decode": bench_decode, "prefill": bench_prefill, "ops": bench_ops, "loss": bench_loss,
        "memory": bench_memory, "kernels": bench_kernels, "graphs": bench_graphs, "plan": bench_plan, "loader": bench_loader,
        "scaling": bench_scaling, "start": bench_start, "corpus": bench_corpus, **dict.fromkeys(LORA, bench_model)}


def parse(argv: list[str]) -> tuple[list[str], Job]:
    words, pairs = split_arguments(argv, ("peer", "packed", "codec", "compile", "json"))
    if words and words[0] in LORA:
        pairs["model"] = words[0]
    return words, apply(Job(), {key: value or "true" for key, value in pairs.items()})


def rows_of(argv: list[str]) -> Iterator[dict[str, Any]]:
    """Measure what a command line names; a row is there as soon as it is measured."""
    words, job = parse(argv)
    if len(words) != 1 or words[0] not in WHAT:
        raise ValueError(f"name one thing to measure, got {' '.join(words) or 'none'}; there are gpu, compare, scale, {', '.join(WHAT)}")
    torch.set_num_threads(job.threads)
    for row in WHAT[words[0]](job):
        yield row | {"options": asdict(job)} | origin(peers.NEEDS.get(job.model, ()))


def compare_command(words: list[str]) -> None:
    """compare OLD NEW [--rounds=7] [COMMAND of bench.py and its options]"""
    own = {word.partition("=")[0][2:]: word.partition("=")[2] for word in words if word.startswith(("--rounds=", "--least="))}
    rest = [word for word in words if word.partition("=")[0][2:] not in own]
    if len(rest) < 2:
        raise ValueError(f"compare takes two checkouts, got {' '.join(rest) or 'none'}; python bench.py compare OLD NEW train --model=tiny")
    if not checkouts.compare(Path(rest[0]), Path(rest[1]), rest[2:], apply(checkouts.CompareJob(), own)):
        raise SystemExit(1)


def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    if "--help" in sys.argv[1:] or command == "--help":
        return print(__doc__, help_text(Job(), f"python bench.py {'|'.join(WHAT)} [--model=higgs --peer]"),
                     help_text(gpu.GpuJob(), "python bench.py gpu [--only=kernels]"),
                     help_text(checkouts.CompareJob(), "python bench.py compare OLD NEW [COMMAND]"),
                     help_text(scale.ScaleJob(), "python bench.py scale"), sep="\n")
    if command == "scale":
        return print(*scale.lines(apply(scale.ScaleJob(), split_arguments(rest)[1])), sep="\n")
    if command == "compare":
        return compare_command(rest)
    if command == "gpu":
        return gpu.run_all(apply(gpu.GpuJob(), split_arguments(rest)[1]), rows_of)
    if command == "peak":                                    # one side of a memory measurement, by run_peak
        (which, *shape), job = parse(rest)
        torch.set_num_threads(job.threads)
        return print(peak(job, which, *map(int, shape)))
    if command == "rank":                                    # one process of bench_scaling
        return rank_side(parse(rest)[1])
    job = parse(sys.argv[1:])[1]
    for row in rows_of(sys.argv[1:]):
        print(json.dumps(row), *([] if job.json else [show(row)]), sep="\n", flush=True)
        if job.keep:
            name = " ".join([row["what"], *(word for word in rest if not word.startswith(("--keep", "--json")))])
            kept = read_json(job.keep) if Path(job.keep).exists() else {}
            write_json(job.keep, kept | {name: row})


if __name__ == "__main__":
    edge(main)
