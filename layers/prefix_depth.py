"""The prefix depth transformer: the codebooks of a frame as a short sequence behind the temporal state (CSM, Qwen3-TTS).

    position   0       1        2        ...  Q-1
    reads      state   code 0   code 1   ...  code Q-2         each through one projection to the depth width
    predicts   -       code 1   code 2   ...  code Q-1         one head each; code 0 comes from a head of the temporal transformer

Moshi's depth transformer adds the state to every step and has weights for each; here all positions share one Llama-like
stack with RoPE over the positions and a final norm. Blocks, Linear and Embedding are those of model.py, which gives them.
Source: transformers 5.23 (csm). Next: model.py.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention import Cache
from kernels.decode import Turns, column_step, per_step
from kernels.rope import rope_tables
from layers.architecture import StackConfig
from layers.batch_plan import Context
from streams import StreamTable


class PrefixDepth(nn.Module):
    """Predicts codebooks 1..Q-1 of a column from its temporal state and the codebooks before each.

    `tables` (sum of vocab, D) is the audio embedding of the model where it is shared, None where the codebooks have tables here.
    """

    texts = 0                                            # text rows that it reads

    def __init__(self, c: StackConfig, table: StreamTable, width: int, tied: bool, block: Callable[..., nn.Module],
                 linear: Callable[..., nn.Module], norm: Callable[..., nn.Module], embedding: Callable[..., nn.Module],
                 run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.c, self.run, codes = replace(c, steps=0, prefix=False, projection=""), run, [table.streams[k].vocab for k in table.audio_out]
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
        embedded = [audio.row(k, codes[:, k]) for k in range(self.steps - 1)]
        x = self.project(torch.stack([h, *embedded], 1))                                     # -> (N, Q, d)
        positions = torch.arange(self.steps, device=h.device).expand(N, -1)
        context = Context(rope=rope_tables(self.c.head, self.c.rope_theta, self.c.rope_scaling, positions))
        return self.norm(self.run(self.layers, x, context, level=level)[:, 1:]).transpose(0, 1)

    # ---- sampling, one codebook at a time ----

    def step(self, k: int, x: Tensor, token: Tensor, cache: Cache, tables: nn.Module | None = None) -> Tensor:
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
            y = cache.fast(x, cache.places[k], cache.turns.table[k : k + 1], None)
        if k == 0:
            return y[:, :0]
        return self.head(y[None], slice(k - 1, k))[0] if self.head.adapter or cache.heads is None else cache.heads[k - 1](y)

    def cache(self, batch: int) -> Any:
        weight = self.layers[0].attn_norm.weight
        cache = Cache(self.c.layers, batch, self.c.kv, self.steps, self.c.head, weight)
        cache.fast, cache.turns, cache.heads = column_step(self.layers, self.c, cache, 0, self.norm), Turns(self.c, weight), None
        if cache.fast is not None:
            cache.turns.reach(self.steps)
            cache.places = [cache.fast.places(k, k + 1) for k in range(self.steps)]
            cache.heads = per_step(self.head)
        return cache
