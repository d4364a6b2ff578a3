"""The workloads of bench.py: a training step, a generation, and the minimum work of each.

    Job -> a small model with random weights, or one as published -> our side, and that of a peer (peers.py)

Next: bench.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import lora
from benchmarks import peers
from benchmarks.measure import CLOCKS, Side
from checkpoint import DTYPES, export
from generation.decode_step import SampleConfig, prefill
from generation.dialogue import UserFeed
from generation.guidance import Guidance
from layers.batch_plan import make_plan
from layers.int8_base import quantize
from lora import LoraConfig
from loss import LossConfig, loss_scale
from model import MultistreamLM
from sample import generate
from streams import delay, is_audio

LORA = {"higgs": ("attn.*", "audio_ffn.*"), "moshi": ("*",), "csm": ("temporal.*", "depth.layers.*"),
        **dict.fromkeys(("qwen", "tiny", "moss"), ("attn.*", "ffn.*"))}


@dataclass(frozen=True)
class Job:
    """Options of a measurement."""

    model: str = "tiny"        # tiny, higgs, moshi, moss, qwen or csm
    preset: str = "tiny"       # tiny: small shapes, fp32; full: the published shape with random weights, bf16
    peer: bool = False         # also run the peer, alternately
    width: int = 128           # of the tiny preset, a multiple of 32; from 256 on both sides are limited by memory bandwidth
    layers: int = 4            # of the tiny preset
    dtype: str = ""            # fp32 or bf16, where not the preset's
    batch: int = 0             # batch size, 0 = 1 for decode; for train 2 for moshi, 4 for others
    columns: int = 256         # train: columns of a sequence
    packed: bool = False       # train: log_normal_lengths sequences of that length on average, ours packed into one row, the peer's padded
    codec: bool = False        # train: moshi encodes its recordings in every step, as moshi-finetune does
    rank: int = 16             # train: rank of the adapters
    share: float = 0.0         # train csm: share of the frames that train the depth transformer, 0 = 1/16 as the recipe; transformers: 1
    checkpoint: int = 0        # train: model.checkpoint, 0 to 4; above 0 the peer recomputes everything
    compile: bool = False      # train: torch.compile our blocks
    context: int = 0           # decode, prefill: columns of the prompt, 0 = 32, of a prefill 2000; aligned families: 1
    frames: int = 0            # decode: frames timed one by one, after 10 % warm-up; 0 = 50, on CUDA 500
    quantize: str = ""         # decode: "int8" holds every Linear in 8 bits
    pairs: int = 9             # timed repetitions of each side
    threads: int = 1           # threads of an operator
    clock: str = "wall"        # of most: "wall", or "cpu": CPU time of this process, for a machine that is busy with others
    rows: int = 100000         # corpus: rows of the manifest
    keep: str = ""             # JSON file in which the last row of each name and command stays
    apart: bool = True         # memory, loss: measure the memory of each side in a process of its own
    json: bool = False         # print the JSON lines only

    def __post_init__(self) -> None:
        assert self.model in LORA, f"model {self.model!r} is none of {', '.join(LORA)}"
        assert self.preset in ("tiny", "full"), f"preset {self.preset!r} is neither tiny nor full"
        assert self.dtype in ("", "fp32", "bf16"), f"dtype {self.dtype!r} is neither fp32 nor bf16"
        assert self.quantize in ("", "int8"), f"quantize {self.quantize!r} is neither empty nor int8"
        assert not self.packed or self.model not in ("moshi", "tiny"), "packed is for families whose text and audio take turns"
        assert not self.codec or self.model == "moshi", "codec is for moshi"
        assert 0 <= self.share <= 1 and (self.model == "csm" or not self.share), "share is for csm, at most 1"
        assert self.clock in CLOCKS, f"clock {self.clock!r} is neither wall nor cpu"
        assert self.rows > 0, "rows is at least 1"
        assert self.pairs > 0 and self.threads > 0 and self.width % 32 == 0 < self.width, "pairs and threads are at least 1, width is 32 n"
        assert min(self.batch, self.context, self.frames) >= 0 < min(self.columns - 1, self.rank, self.layers), "columns are at least 2"

    @property
    def half(self) -> bool:
        return (self.dtype or {"tiny": "fp32", "full": "bf16"}[self.preset]) == "bf16"


class Comparison(NamedTuple):
    """Our side and the peer's, with the batch they run on."""

    ours: Side
    peer: Side | None
    checked: str               # what was compared, or why there is no peer
    model: MultistreamLM
    tokens: Tensor             # (B, K, S) of ours
    weights: Tensor
    lengths: Sequence[int]     # columns of its sequences


def build_and_export(job: Job, folder: Path) -> tuple[MultistreamLM, str]:
    """Build the model and export it in the peer's layout; returns it and the reason why there is no peer, "" if there is one."""
    dtype, why = DTYPES["bf16" if job.half else "fp32"], peers.missing(job.model)
    model = peers.build(job.model, job.width if job.preset == "tiny" else 0, dtype, job.checkpoint, job.layers)
    if job.share:
        model.config = replace(model.config, depth_share=job.share)
    why = why or ("" if job.peer else "not measured: add --peer")
    if not why:
        export(model, folder, "moshi" if job.model == "moshi" else "hf")
    return model, why


# ---- one training step ----

def log_normal_lengths(count: int, columns: int) -> list[int]:
    """Lengths of a log-normal distribution, `columns` on average."""
    share = (0.6 * torch.randn(count, generator=torch.Generator().manual_seed(3))).exp()
    lengths = (share / share.sum() * count * columns).int().clamp(min=4)
    lengths[lengths.argmax()] += count * columns - lengths.sum()
    return lengths.tolist()


def pack(tokens: Tensor, weights: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All sequences in one row. First columns are not targets.   -> tokens, weights (1, K, S), positions, segments (1, S)"""
    tokens, weights = (torch.cat([row[:, :n] for row, n in zip(grid, lengths, strict=True)], 1)[None] for grid in (tokens, weights))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return tokens, weights.masked_fill(positions[:, None] == 0, 0.0), positions, segments


def train_workload(job: Job, folder: Path) -> Comparison:
    model, why = build_and_export(job, folder)
    lora.inject(model, LoraConfig(rank=job.rank, alpha=2.0 * job.rank, targets=LORA[job.model])).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)                     # not zero, so that every adapter has a gradient
    device, batch = peers.like(model).device, job.batch or (2 if job.model == "moshi" else 4)
    lengths = log_normal_lengths(batch, job.columns) if job.packed else [job.columns] * batch
    padded = peers.training_batch(model, lengths)
    grid = pack(*padded, lengths) if job.packed else padded
    plan, weights = make_plan(model.config, *grid).to(device), grid[1]     # on the host, as train.py does
    # transformers adds up the means of Higgs' eight codebooks, and of CSM's first and its others; the rest take one mean over all
    config = LossConfig(audio={"higgs": 8.0, "csm": 2.0}.get(job.model, 1.0))
    scale, peer = loss_scale(weights[..., 1:].sum((0, 2)), model.table, config).to(device), None
    padded, grid = ([t.to(device) for t in tensors] for tensors in (padded, grid))
    if not why:
        export(model, folder / "adapter", "moshi-lora" if job.model == "moshi" else "peft")
        training = partial(peers.moshi_training, codec=job.codec) if job.model == "moshi" else peers.transformers_training
        peer = peers.training_side(*training(folder, model, *padded))
    for block in model.temporal.layers if job.compile else ():
        block.compile()

    def loss() -> Tensor:
        with peers.autocast(model):
            return model(*grid, scale=scale, plan=plan).total

    return Comparison(peers.training_side(model, loss), peer, why or "losses of three updates", model, *grid[:2], lengths)


def useful_flops(comparison: Comparison) -> float:
    """FLOPs of the matrix products of a step: 2 per weight and column forward, 2 for the input gradient, 2 more for a trained weight;
    causal attention. Recomputation in the backward does not count."""
    c, table, wanted = comparison.model.config, comparison.model.table, comparison.weights[..., 1:] != 0
    audio = is_audio(comparison.tokens[..., :-1], table)                         # (B, S)
    both, spoken = audio.numel(), int(audio.sum())
    texts, sounds = (int(wanted[:, rows].any(1).sum()) if rows else 0 for rows in (table.text_out, table.audio_out))
    trained, steps = sounds * c.depth_share, c.depth.steps if c.depth is not None and c.depth.prefix else 1
    special = {"embed": texts if c.tied else 0, "text_head": texts, "audio_head": sounds, "depth.head": trained, "depth": trained * steps}

    def columns(name: str) -> float:
        """How many columns are multiplied with a parameter."""
        if name.startswith(("depth.text.", "depth.audio.")):               # embeddings are looked up
            return 0
        dual = {".ffn.": both - spoken, ".audio_ffn.": spoken} if c.dual_ffn else {}
        return next((n for part, n in (special | dual).items() if part in name), both)

    products = sum((6 if p.requires_grad else 4) * p.numel() * columns(name)
                   for name, p in comparison.model.named_parameters() if p.dim() > 1)
    return products + 6 * sum(n * n for n in comparison.lengths) * c.temporal.heads * c.temporal.head * (c.temporal.layers + 2 * c.tail)


# ---- decoding ----

def decode_models(job: Job, folder: Path) -> tuple[MultistreamLM, nn.Module | None, str]:
    """Our model, the peer's or None, and the reason for None. 8 bits are ours alone: the peer keeps its weights."""
    model, why = build_and_export(job, folder)
    net = None if why else (peers.moshi_model if job.model == "moshi" else peers.transformers_model)(folder, model).eval()
    if job.quantize:
        quantize(model.requires_grad_(False))
    return model, net, why


def decode_sides(model: MultistreamLM, net: nn.Module | None, batch: int, context: int, longest: int,
                 top_k: int, graphs: str = "auto") -> tuple[Side, Side | None]:
    """Both sides after a prompt of `context` columns (LMGen makes its own), up to `longest` columns; greedy if top_k is 0."""
    table, device = model.table, peers.like(model).device
    given = peers.frames(model, batch, context + longest)
    read = [k for k in table.audio if k not in table.audio_out]
    prompt = delay(given, table.delays, table.column("start"))[..., :context]
    if not table.aligned:
        prompt = torch.full_like(prompt, -1)
        prompt[:, 0] = given[:, 0, :context]
        prompt[:, 0, -1] = table.audio_start if table.audio else prompt[:, 0, -1]
    rows = [*table.text_out, *table.audio_out] if table.aligned else table.audio or table.text

    def ours(columns: int, tick: Callable[[], None] | None = None) -> Tensor:
        config = SampleConfig(temperature=peers.WARM if top_k else 0.0, top_k=top_k, max_frames=columns, graphs=graphs,
                              min_frames=columns if top_k else 0)
        feed = UserFeed(given[:, read], table, True, context) if read else None            # as LMGen, which drops the first frame
        made = []
        for frame in generate(model, prompt, config, feed):
            made.append(frame)
            if tick:
                tick()
        kept = torch.stack(made, -1)[:, rows]
        return kept[..., (kept >= 0).any(1)[0]]

    if net is None:
        return ours, None
    if table.aligned:
        return ours, peers.moshi_decoding(net, given[:, read].to(device), top_k)
    return ours, peers.transformers_decoding(net, model, prompt.to(device), top_k)


def floor_bytes(model: MultistreamLM, batch: int, positions: float) -> float:
    """Minimum bytes read for an audio column: each used weight once, keys and values of `positions` for each item of the batch."""
    c, stack = model.config, model.config.temporal
    passed = ["depth.text.", "depth.audio."] + ["embed."] * (not c.tied) + [".ffn."] * bool(c.dual_ffn)
    passed += ["text_head", "text_tail"] if model.table.audio and not model.table.aligned else []
    weights = sum(p.nbytes for name, p in model.named_parameters() if not any(part in name for part in passed))
    width = model.temporal.layers[0].attn_norm.weight.element_size()      # of what the cache holds
    return weights + batch * min(positions, stack.window or positions) * 2 * (stack.layers + c.tail) * stack.kv * stack.head * width


def prefill_side(model: MultistreamLM, batch: int, context: int) -> Side:
    tokens = peers.frames(model, batch, context).to(peers.like(model).device)
    padding, guide = tokens.new_zeros(batch), Guidance(SampleConfig(), model.table)

    @torch.inference_mode()
    def side() -> Tensor:
        return prefill(model, tokens, padding, model.cache(batch, context), guide)[1]

    return side
