"""A step on 8, 64 and 512 GPUs, and a corpus of 100,000 hours, from measured pieces: `python bench.py scale`.

    compute      products of a step (counted on the real model) / (FLOP/s x MFU)
    DDP          a ring sends 2 (N - 1) / N of the fp32 gradients through the slowest link
    FSDP         gathers the bf16 weights twice and scatters the gradients once, over all N ranks
    HSDP         the same inside a node, and the gradients of its shards once over the nodes
    straggler    the slowest of N ranks, whose steps differ by `jitter`; everybody waits for it
    loader       what reading ahead cannot hide: frames a second of a GPU against those of its `cores`

What backward hides of the traffic is `overlap` of the compute. Speeds are options: put in what `bench.py gpu` and `loader` measured.
It is a calculation, not a measurement. Next: ../BENCHMARKS.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import lora
from benchmarks import peers
from benchmarks.workloads import LORA, Comparison, useful_flops
from corpus.cache import SHARD, SHARDS
from lora import LoraConfig
from model import MultistreamLM


@dataclass(frozen=True)
class ScaleJob:
    """The pieces of `bench.py scale`; defaults are those of BENCHMARKS.md, calculated where no GPU was at hand."""

    flops: float = 790e12        # bf16 operations a second of a product, an H200
    mfu: float = 0.45            # share of it that a step reaches
    memory: float = 141e9        # bytes of a GPU
    node: int = 8                # GPUs in a node
    nvlink: float = 400e9        # bytes a second of a GPU inside a node
    network: float = 45e9        # bytes a second of a GPU between nodes
    frames: int = 20000          # frames in a step of a GPU
    columns: int = 1250          # frames of a sequence
    overlap: float = 0.5         # share of the compute behind which traffic hides
    jitter: float = 0.02         # standard deviation of the compute of a rank, relative: unequal packs, other jobs
    loader: float = 100e3        # frames a second of one core that loads (bench.py loader)
    cores: int = 4               # cores that load, for each GPU
    hours: float = 100e3         # the corpus
    clip: float = 5.0            # seconds of a clip
    encode: float = 150.0        # times faster than the sound that a core or a GPU encodes
    encoders: int = 64           # how many of them (data.py prepare --shard)
    row: float = 100.0           # bytes of an open index a row

    def __post_init__(self) -> None:
        assert min(getattr(self, name) for name in self.__dataclass_fields__) > 0, "every piece is positive"


RUNS = (("moshi", 128), ("moshi", 16), ("moshi", 0), ("higgs", 16), ("higgs", 0))       # model, LoRA rank, 0 = all weights


def pieces(name: str, rank: int, job: ScaleJob) -> tuple[float, int, int]:
    """Operations of a step of a GPU, all parameters, trained parameters; of the published size, without memory."""
    with torch.device("meta"):
        model = MultistreamLM(peers.architecture(name, 0))
    if rank:
        lora.inject(model, LoraConfig(rank=rank, targets=LORA[name]))
    table, audio = model.table, max(2, job.columns // 4)
    tokens, weights = torch.zeros(1, len(table), job.columns + 1, dtype=torch.long), torch.ones(1, len(table), job.columns + 1)
    if not table.aligned:
        tokens[:, table.text, audio:], tokens[:, table.audio, :audio] = -1, -1
    flops = useful_flops(Comparison(None, None, "", model, tokens, weights, [job.columns])) * job.frames / job.columns
    sizes = [p.numel() for p in model.parameters()], [p.numel() for p in model.parameters() if p.requires_grad]
    return flops, sum(sizes[0]), sum(sizes[1])


def traffic(method: str, world: int, every: int, trained: int, job: ScaleJob) -> tuple[float, float]:
    """Bytes that a GPU sends in a step, and the seconds."""
    ring, nodes = (world - 1) / world, -(-world // job.node)
    link = job.nvlink if nodes == 1 else job.network
    if method == "DDP":
        return 2 * ring * 4 * trained, 2 * ring * 4 * trained / link
    if method == "FSDP" or nodes == 1:
        return ring * (4 * every + 4 * trained), ring * (4 * every + 4 * trained) / link
    inside, across = (job.node - 1) / job.node * (4 * every + 4 * trained), 2 * (nodes - 1) / nodes * 4 * trained / job.node
    return inside + across, inside / job.nvlink + across / job.network


def held(method: str, world: int, every: int, trained: int, job: ScaleJob) -> float:
    """Bytes of weights, gradients and AdamW on a GPU, without activations."""
    shared = {"DDP": 1, "FSDP": world, "HSDP": min(world, job.node)}[method]
    whole = 0 if method == "DDP" else 4 * every / 32         # two blocks, of some 32
    return (2 * (every - trained) + 16 * trained) / shared + whole


def slowest(world: int, jitter: float, steps: int = 400) -> float:
    """By how much the slowest of `world` ranks takes longer than the mean, over simulated steps."""
    return float(jitter * np.random.default_rng(0).standard_normal((steps, world)).max(1).mean())


def step_rows(job: ScaleJob) -> Iterator[str]:
    yield "| a step of a GPU | GPUs | | compute | sent | transfer | not hidden | straggler | loader | step | useful | held | first limit |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for name, rank in RUNS:
        flops, every, trained = pieces(name, rank, job)
        compute = flops / (job.flops * job.mfu)
        for world in (8, 64, 512):
            for method in ("DDP", "FSDP", *["HSDP"] * (world > job.node)):
                sent, transfer = traffic(method, world, every, trained, job)
                size = held(method, world, every, trained, job)
                waits = {"traffic": max(0.0, transfer - job.overlap * compute), "straggler": compute * slowest(world, job.jitter),
                         "loader": max(0.0, job.frames / (job.loader * job.cores) - compute)}
                step = compute + sum(waits.values())
                worst = max(waits, key=waits.get) if size < job.memory else "memory"
                spent = [f"{1e3 * seconds:,.0f} ms" for seconds in (compute, transfer, *waits.values(), step)]
                yield (f"| {name} {f'LoRA r={rank}' if rank else 'in full'} | {world} | {method} | {spent[0]} | {sent / 1e9:.2f} GB | "
                       + f"{' | '.join(spent[1:])} | {compute / step:.0%} | {size / 1e9:.0f} GB | {worst} |")


def corpus_rows(job: ScaleJob) -> Iterator[str]:
    """A corpus of `hours`: its cache, index, preparation, shuffling."""
    clips = job.hours * 3600 / job.clip
    yield f"| {job.hours:,.0f} hours in clips of {job.clip:g} s | |"
    yield "|---|---|"
    for name, streams, rate in (("Moshi, two speakers", 16, 12.5), ("Higgs", 8, 25.0), ("MOSS", 1, 12.5)):
        yield f"| codes of {name} | {job.hours * 3600 * rate * streams * 2 / 1e9:,.0f} GB |"
    yield f"| rows, shards of codes to map | {clips / 1e6:,.0f} million, {math.ceil(clips / max(SHARD, clips // SHARDS)):,} |"
    yield f"| index in memory, of each process that loads | {clips * job.row / 1e9:,.1f} GB |"
    days = job.hours / job.encode / job.encoders / 24
    yield f"| encoding, {job.encoders} encoders of {job.encode:g} x real time | {days:,.1f} days |"
    yield f"| a shuffled order: a permutation of all rows, drawn anew in each pass | {4 * clips / 1e9:.2f} GB |"
    window, speakers = 256, 10_000
    unlike = speakers * (1 - (1 - 1 / speakers) ** window)
    yield f"| different speakers in a window of {window} rows, of {speakers:,} in the corpus | {unlike:.0f} |"
    yield f"| random reads a second of a GPU at 11,000 frames a second | {11_000 / (job.clip * 12.5):,.0f} |"


def lines(job: ScaleJob) -> Iterator[str]:
    yield from step_rows(job)
    yield ""
    yield from corpus_rows(job)
