"""What all layers share about the columns of a batch: attention mask, RoPE positions, routing, and which rows have targets.

    Plan       counts made once per batch from CPU tensors, so that no layer and no loss synchronises with the device
    Context    a plan with the tensors that every layer shares in one pass

Packed rows are consecutive causal runs (kernels/attention.py); a mask over all pairs of columns is built only when they
are not. Next: model.py.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention import KVCache, PackedRows, attention_mask
from kernels.rope import rope_tables
from layers.architecture import ModelConfig
from streams import is_audio


@dataclass
class Plan:
    """The counts of a batch."""

    texts: int = 0                             # dual FFN: number of text columns ...
    order: Tensor | None = None                # ... and the permutation that puts them first; None = one kind only
    back: Tensor | None = None                 # the inverse of order
    runs: PackedRows | None = None                   # packed rows as causal runs; None = not packed, or not contiguous
    text_rows: list[Tensor] = field(default_factory=list)      # flat columns with a text target; duplex: words, then padding
    audio_rows: Tensor | None = None           # flat columns with an audio target

    def to(self, device: torch.device) -> "Plan":
        """Copy to the device, asynchronously."""
        def move(t: Tensor | None) -> Tensor | None:
            return t if t is None else t.to(device, non_blocking=True)

        return Plan(self.texts, move(self.order), move(self.back), self.runs and self.runs.to(device), [move(t) for t in self.text_rows],
                    move(self.audio_rows))


def make_plan(c: ModelConfig, tokens: Tensor, weights: Tensor | None = None, positions: Tensor | None = None,
              segments: Tensor | None = None) -> Plan:
    """Plan of a batch that is trained on: tokens and weights (B, K, S), positions and segments (B, S) or None."""
    cut = [None if t is None else t[:, :-1] for t in (positions, segments)]
    plan = input_plan(c, is_audio(tokens[..., :-1], c.table), *cut)
    if weights is not None:
        wanted = weights[..., 1:] != 0
        text, audio = (wanted[:, rows].any(1).flatten() if rows else None for rows in (c.table.text_out, c.table.audio_out))
        parts = [] if text is None else [text]
        if parts and c.table.monologue:                                  # padding separately, for its own metrics
            target = tokens[:, c.table.text_out[0], 1:].flatten()
            quiet = (target == c.table.pad) | (target == c.table.epad)
            parts = [text & ~quiet, text & quiet]
        plan.text_rows = [part.nonzero().squeeze(1) for part in parts]
        plan.audio_rows = None if audio is None else audio.nonzero().squeeze(1)
    return plan


def input_plan(c: ModelConfig, audio: Tensor, positions: Tensor | None = None, segments: Tensor | None = None) -> Plan:
    """The part of a plan that does not depend on targets.   audio (B, S) bool"""
    plan = Plan(runs=None if positions is None or segments is None else PackedRows.from_segments(positions, segments, c.temporal.window))
    if c.dual_ffn:
        flat = audio.flatten()
        plan.texts = flat.numel() - int(flat.sum())
        if 0 < plan.texts < flat.numel():
            plan.order = flat.to(torch.uint8).argsort(stable=True)
            plan.back = plan.order.argsort()
    return plan


@dataclass
class Context:
    """Everything the blocks of a stack share in one pass: computed once, read by every layer."""

    rope: tuple[Tensor, Tensor] | None = None    # (B, 1, S, head/2) twice
    turn: Tensor | None = None                   # the same for one column on the fast path
    fast: bool = False                           # a single column goes through kernels/decode.py
    mask: Tensor | PackedRows | None = None            # (B, 1, S, S_keys) bool, or runs, None = plain causal
    hidden: Tensor | PackedRows | None = None          # mask of fast-forward layers: audio keys hidden too
    audio: Tensor | None = None                  # (B, S) bool
    plan: Plan | None = None
    cache: KVCache | None = None
    step: slice | None = None                    # depth transformer: which codebook steps x holds
    voice: Tensor | None = None                  # (B, n, D) voice features for cross-attention


def temporal_context(c: ModelConfig, audio: Tensor, positions: Tensor | None, segments: Tensor | None, cache: KVCache | None,
                     plan: Plan | None = None) -> Context:
    """Build the context of a temporal pass.   audio (B, S) bool, or None for a column on the fast path"""
    B, S = (positions if audio is None else audio).shape
    stack, plain = c.temporal, positions is None and segments is None and cache is None
    fast = cache is not None and cache.takes_fast_path(S)
    if plan is None and not fast:
        plan = input_plan(c, audio, *((positions, segments) if cache is None else ()))
    if positions is None:
        positions = torch.arange(S, device=audio.device).expand(B, S)
    context = Context(audio=audio, cache=cache, fast=fast, plan=plan)
    if stack.rope_theta and not fast:
        context.rope = rope_tables(stack.head, stack.rope_theta, stack.rope_scaling, positions.clamp(min=0))
    if cache is not None:
        cache.reserve(positions, audio)
        at = positions[:, 0] if cache.plain else positions[:, 0].clamp(min=0)
        context.turn = cache.rope(at, cache.count) if fast and stack.rope_theta else None
        in_order = cache.plain and S in (1, cache.live) and cache.count <= (stack.window or cache.capacity)
        if not in_order or c.fast_forward:
            context.mask = attention_mask(positions, cache.positions[:, : cache.live], stack.window, None, None)
            own = positions[:, :, None] == cache.positions[:, None, : cache.live]
    elif plan.runs is not None:
        context.mask, context.hidden = plan.runs, plan.runs.with_hidden_keys(audio) if c.fast_forward else None
        return context
    elif not plain or 0 < stack.window < S or c.fast_forward:
        own = torch.eye(S, dtype=torch.bool, device=audio.device)
        context.mask = attention_mask(positions, positions, stack.window, segments, segments)
    if context.mask is not None:
        context.mask = context.mask | own.unsqueeze(-3)              # padding attends to itself, so no softmax row is empty
    if c.fast_forward:
        keys = audio if cache is None else cache.audio[:, : cache.live]
        context.hidden = context.mask & ~keys[:, None, None, :] | own.unsqueeze(-3)
    return context


def graph_context(c: ModelConfig, positions: Tensor, cache: KVCache) -> Context:
    """`temporal_context` for a column whose position is a device tensor, for CUDA graphs.   positions (B, 1)"""
    turn = cache.rope.table.index_select(0, positions[:, 0].clamp(min=0)) if c.temporal.rope_theta else None
    return Context(turn=turn, fast=True, cache=cache)
