"""Depth transformers, which write the codebooks of a column one after the other: Moshi's, and one that reads a prefix.

Moshi's (RQ-Transformer) adds the temporal state to every step and has weights for each. The prefix depth transformer (CSM,
Qwen3-TTS) reads the codebooks of a frame as a short sequence behind the state:

    position   0       1        2        ...  Q-1
    reads      state   code 0   code 1   ...  code Q-2         each through one projection to the depth width
    predicts   -       code 1   code 2   ...  code Q-1         one head each; code 0 comes from a head of the temporal transformer

All positions share one Llama-like stack with RoPE over the positions and a final norm. Blocks, Linear and Embedding are
those of model.py, which hands them over. Sources: arXiv:2410.00037, moshi 0.2.13, transformers 5.23 (csm). Next: model.py.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import KVCache
from kernels.choice import device_constant
from kernels.decode import RopeTable, column_step, per_step
from kernels.embed_sum import embed_row
from kernels.rope import rope_tables
from layers.architecture import FusionConfig, ModelConfig, StackConfig
from layers.batch_plan import Context
from layers.conditioning import ProjectedEmbedding
from layers.fusion import Affine, Projector
from streams import StreamTable


class Parts(NamedTuple):
    """What both are built of: classes of model.py, and how it runs one block after another."""

    block: Callable[..., nn.Module]
    linear: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    embedding: Callable[..., nn.Module]
    run: Callable[..., Tensor]


def depth_transformer(parts: Parts, c: ModelConfig) -> nn.Module:
    """The depth transformer of a model that has one."""
    if c.depth.prefix:
        return PrefixDepth(parts, c.depth, c.table, c.temporal.dim, c.depth_tied)
    return Depth(parts, c.depth, c.table, c.temporal.dim, c.demux, c.fusion)


class Depth(nn.Module):
    """The transformer over the codebooks of one column (Moshi's depformer; RQ-Transformer).

    Step k reads the temporal state and the token of the row before (step 0: the text row) and predicts codebook k.
    Every step has weights of its own, held step-major, so all steps of all columns are batched products.
    """

    def __init__(self, parts: Parts, c: StackConfig, table: StreamTable, width: int, demux: bool = False,
                 fusion: FusionConfig | None = None) -> None:
        super().__init__()
        block, linear, _, embedding, self.run = parts
        self.plain_tables = not (demux or c.low_rank or fusion)
        self.c, self.texts, self.text_map = c, len(table.text) if demux else 1, None      # text rows that step 0 reads
        text, audio = ([table.streams[i].vocab for i in rows] for rows in (table.text[: self.texts], table.audio_out[:-1]))
        narrow = {"rank": c.low_rank or c.dim, "dim": c.dim, "linear": linear}
        sets = {"sets": len(set(c.schedule)) or c.steps, "schedule": c.schedule}
        if fusion is None:
            self.input = linear(width, c.dim, **sets)
            self.text = ProjectedEmbedding(text, **narrow, shared=demux) if demux or c.low_rank else embedding(text, c.dim)
        else:
            widths = (fusion.tower.temporal.dim, width, c.dim)
            self.input = Projector(fusion.depth, widths, fusion.hidden, c.dim, fusion.dropout, fusion.split_norm, c.steps)
            self.text, self.text_map = embedding(text, widths[0]), Affine(widths[0], c.dim)      # the text model's width -> ours
        self.audio = None if not audio else ProjectedEmbedding(audio, **narrow) if c.low_rank else embedding(audio, c.dim)
        self.layers = nn.ModuleList(block(c) for _ in range(c.layers))
        self.head = linear(c.dim, table.streams[table.audio_out[0]].classes, sets=c.steps)

    def embed(self, k: int, token: Tensor) -> Tensor:
        """What step k reads: text ids (N, texts) in step 0, then the codebook before, (N,).   -> (N, d)"""
        if k:
            return self.audio.row(k - 1, token)
        text = self.text(token[..., None])[:, 0]
        return text if self.text_map is None else self.text_map(text)

    def join(self, h: Tensor, embedded: Tensor, step: slice) -> Tensor:
        """What the steps read: Moshi adds, DSAA projects.   h (N, D), embedded (n, N, d) -> (n, N, d)"""
        h = h.expand(len(embedded), *h.shape)
        return self.input(h, step) + embedded if self.text_map is None else self.input(torch.cat([h, embedded], -1), step)

    def forward(self, h: Tensor, tokens: Tensor, tables: nn.Module | None = None, level: int = 0) -> Tensor:
        """All steps at once, with the true tokens.   h (N, D), tokens (N, Q): text, then codebooks 0..Q-2 -> (Q, N, d)"""
        step, read = slice(0, self.c.steps), [tokens[:, : self.texts], *tokens[:, self.texts :].unbind(1)]
        x = self.join(h, torch.stack([self.embed(k, token) for k, token in enumerate(read)]), step)
        return self.run(self.layers, x, Context(step=step), level=level)

    def step(self, k: int, h: Tensor, token: Tensor, cache: KVCache, known: bool = False) -> Tensor:
        """One step of sampling: logits of codebook k.   h (B, D), token as in `embed`, `known`: none is -1 -> (B, V)"""
        step, cache.slots, cache.live = slice(k, k + 1), slice(k, k + 1), k + 1      # step 0 overwrites the column before
        if k == 0 and self.text_map is None:
            cache.inputs = self.inputs(h)
        if known and cache.tables and not torch.is_grad_enabled():
            x = torch.add(cache.inputs[k], F.embedding(token.flatten(), cache.tables[k]), out=cache.fast.x)
        else:
            x = cache.inputs[k] + self.embed(k, token) if self.text_map is None else self.join(h, self.embed(k, token)[None], step)[0]
        if cache.fast is None or torch.is_grad_enabled():
            return self.head(self.run(self.layers, x[None], Context(step=step, cache=cache)), step)[0]
        x = cache.fast(x, cache.step_slots[k], None, None, step=k)
        return self.head(x[None], step)[0] if self.head.adapter else cache.heads[k](x)

    def inputs(self, h: Tensor) -> Tensor:
        """What the temporal state gives to every step, as one product.   h (B, D) -> (steps, B, d)"""
        every = slice(0, self.c.steps)
        if self.input.adapter is not None or self.input.row_scale is not None:
            return self.input(h.expand(self.c.steps, *h.shape), every)
        sets = F.linear(h, self.input.weight.flatten(0, 1)).unflatten(-1, (-1, self.c.dim))
        return self.input.pick(sets.transpose(0, 1), every)

    def cache(self, batch: int) -> KVCache:
        weight = self.layers[0].attn_norm.weight
        cache = KVCache(self.c.layers, batch, self.c.kv, self.c.steps, self.c.head, weight)
        cache.fast = None if self.c.rope_theta else column_step(self.layers, self.c, cache)
        if cache.fast is not None:
            cache.step_slots = [cache.fast.places(k, k + 1) for k in range(self.c.steps)]
            cache.heads = per_step(self.head)
            if self.plain_tables:
                tables = [self.text.weight.detach()]             # of each step: one row of ids, none of them -1, is one operation
                cache.tables = tables + ([] if self.audio is None else [self.audio.weight.detach()[at:] for at in self.audio.offsets])
        return cache


class PrefixDepth(nn.Module):
    """Predicts codebooks 1..Q-1 of a column from its temporal state and the codebooks before each.

    `tables` (sum of vocab, D) is the audio embedding of the model where it is shared, None where the codebooks have tables here.
    """

    texts = 0                                            # text rows that it reads

    def __init__(self, parts: Parts, c: StackConfig, table: StreamTable, width: int, tied: bool) -> None:
        super().__init__()
        block, linear, norm, embedding, self.run = parts
        self.c, codes = replace(c, steps=0, prefix=False, projection=""), [table.streams[k].vocab for k in table.audio_out]
        self.steps, self.tied = c.steps, tied
        self.audio = None if tied else embedding(codes[:-1], width)
        self.input = linear(width, c.dim, c.projection == "bias") if c.projection else None
        self.layers = nn.ModuleList(block(self.c) for _ in range(c.layers))
        self.norm = norm(c.dim, c.norm_eps)
        self.head = linear(c.dim, table.streams[table.audio_out[-1]].classes, sets=c.steps - 1)

    def project(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., d)"""
        return x if self.input is None else self.input(x)

    def forward(self, h: Tensor, codes: Tensor, tables: nn.Module | None = None, level: int = 0) -> Tensor:
        """All positions at once, with the true codes.   h (N, D), codes (N, Q - 1): codebooks 0..Q-2 -> (Q - 1, N, d)"""
        N, audio = len(h), tables if self.tied else self.audio
        embedded = embed_row(codes, audio.weight, device_constant(audio.offsets[: self.steps - 1], h.device))
        x = self.project(torch.cat([h[:, None], embedded], 1))                               # -> (N, Q, d)
        positions = torch.arange(self.steps, device=h.device).expand(N, -1)
        context = Context(rope=rope_tables(self.c.head, self.c.rope_theta, self.c.rope_scaling, positions))
        return self.norm(self.run(self.layers, x, context, level=level)[:, 1:]).transpose(0, 1)

    # ---- sampling, one codebook at a time ----

    def step(self, k: int, x: Tensor, token: Tensor, cache: KVCache, tables: nn.Module | None = None) -> Tensor:
        """Read what stands at position k: the state x (B, D) for k = 0, codebook k - 1 as token (B,) behind it.

        -> logits (B, V) of codebook k; for k = 0 nothing but a place in the cache: (B, 0)
        """
        x = self.project(x if k == 0 else (tables if self.tied else self.audio).row(k - 1, token))
        cache.slots, cache.live = slice(k, k + 1), k + 1
        if cache.fast is None or torch.is_grad_enabled():
            positions = torch.full((len(x), 1), k, device=x.device)
            context = Context(rope=rope_tables(self.c.head, self.c.rope_theta, self.c.rope_scaling, positions), cache=cache)
            y = self.norm(self.run(self.layers, x[:, None], context)[:, 0])
        else:
            y = cache.fast(x, cache.step_slots[k], cache.rope.table[k : k + 1], None)
        if k == 0:
            return y[:, :0]
        return self.head(y[None], slice(k - 1, k))[0] if self.head.adapter or cache.heads is None else cache.heads[k - 1](y)

    def cache(self, batch: int) -> Any:
        weight = self.layers[0].attn_norm.weight
        cache = KVCache(self.c.layers, batch, self.c.kv, self.steps, self.c.head, weight)
        cache.fast, cache.rope, cache.heads = column_step(self.layers, self.c, cache, 0, self.norm), RopeTable(self.c, weight), None
        if cache.fast is not None:
            cache.rope.extend(self.steps)
            cache.step_slots = [cache.fast.places(k, k + 1) for k in range(self.steps)]
            cache.heads = per_step(self.head)
        return cache
