"""What a stack knows of the columns it reads: who sees whom, where each stands, which network it takes, what it is wanted for.

    Plan       what only the host can count, made once a batch from tensors of the CPU: no layer and no loss waits for the device
    Context    a plan with the tensors that every layer shares in one pass

Packed rows are plain causal runs, one behind the other (kernels/attention.py): a mask over all pairs of columns is made only
where the runs are not plain. Next: model.py.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention import Cache, Runs, attention_mask
from kernels.rope import rope_tables
from layers.architecture import ModelConfig
from streams import is_audio


@dataclass
class Plan:
    """The counts of a batch."""

    texts: int = 0                             # dual networks: how many columns are text ...
    order: Tensor | None = None                # ... and the flat columns, text ones first; None = one kind only
    back: Tensor | None = None                 # the inverse of order
    runs: Runs | None = None                   # packed rows as causal runs; None = not packed, or not plain
    text_rows: list[Tensor] = field(default_factory=list)      # flat columns with a text target; in duplex, and with padding for one
    audio_rows: Tensor | None = None           # flat columns with an audio target

    def to(self, device: torch.device) -> "Plan":
        """Copies to the device that nobody waits for."""
        def move(t: Tensor | None) -> Tensor | None:
            return t if t is None else t.to(device, non_blocking=True)

        return Plan(self.texts, move(self.order), move(self.back), self.runs and self.runs.to(device), [move(t) for t in self.text_rows],
                    move(self.audio_rows))


def make_plan(c: ModelConfig, tokens: Tensor, weights: Tensor | None = None, positions: Tensor | None = None,
              segments: Tensor | None = None) -> Plan:
    """Plan of a batch that is trained on: tokens and weights (B, K, S), positions and segments (B, S) or None."""
    cut = [None if t is None else t[:, :-1] for t in (positions, segments)]
    plan = read_plan(c, is_audio(tokens[..., :-1], c.table), *cut)
    if weights is not None:
        wanted = weights[..., 1:] != 0
        text, audio = (wanted[:, rows].any(1).flatten() if rows else None for rows in (c.table.text_out, c.table.audio_out))
        parts = [] if text is None else [text]
        if parts and c.table.monologue:                                  # padding goes apart, to be told apart
            target = tokens[:, c.table.text_out[0], 1:].flatten()
            quiet = (target == c.table.pad) | (target == c.table.epad)
            parts = [text & ~quiet, text & quiet]
        plan.text_rows = [part.nonzero().squeeze(1) for part in parts]
        plan.audio_rows = None if audio is None else audio.nonzero().squeeze(1)
    return plan


def read_plan(c: ModelConfig, audio: Tensor, positions: Tensor | None = None, segments: Tensor | None = None) -> Plan:
    """The part of a plan that reading needs.   audio (B, S) bool"""
    plan = Plan(runs=None if positions is None or segments is None else Runs.of(positions, segments, c.temporal.window))
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
    turn: Tensor | None = None                   # the same for one column that goes the fast way
    fast: bool = False                           # a single column goes through kernels/decode.py
    mask: Tensor | Runs | None = None            # (B, 1, S, S_keys) bool, or runs, None = plain causal
    hidden: Tensor | Runs | None = None          # mask of fast-forward layers: audio keys hidden too
    audio: Tensor | None = None                  # (B, S) bool
    plan: Plan | None = None
    cache: Cache | None = None
    step: slice | None = None                    # depth transformer: which codebook steps x holds
    voice: Tensor | None = None                  # (B, n, D) what every block listens to


def temporal_context(c: ModelConfig, audio: Tensor, positions: Tensor | None, segments: Tensor | None, cache: Cache | None,
                     plan: Plan | None = None) -> Context:
    """Build the shared facts of a temporal pass.   audio (B, S) bool, or None for a column that goes the fast way"""
    B, S = (positions if audio is None else audio).shape
    stack, plain = c.temporal, positions is None and segments is None and cache is None
    fast = cache is not None and cache.single(S)
    if plan is None and not fast:
        plan = read_plan(c, audio, *((positions, segments) if cache is None else ()))
    if positions is None:
        positions = torch.arange(S, device=audio.device).expand(B, S)
    context = Context(audio=audio, cache=cache, fast=fast, plan=plan)
    if stack.rope_theta and not fast:
        context.rope = rope_tables(stack.head, stack.rope_theta, stack.rope_scaling, positions.clamp(min=0))
    if cache is not None:
        cache.reserve(positions, audio)
        context.turn = cache.turns(positions[:, 0].clamp(min=0), cache.count) if fast and stack.rope_theta else None
        in_order = cache.plain and S in (1, cache.live) and cache.count <= (stack.window or cache.capacity)
        if not in_order or c.fast_forward:
            context.mask = attention_mask(positions, cache.positions[:, : cache.live], stack.window, None, None)
            own = positions[:, :, None] == cache.positions[:, None, : cache.live]
    elif plan.runs is not None:
        context.mask, context.hidden = plan.runs, plan.runs.hiding(audio) if c.fast_forward else None
        return context
    elif not plain or 0 < stack.window < S or c.fast_forward:
        own = torch.eye(S, dtype=torch.bool, device=audio.device)
        context.mask = attention_mask(positions, positions, stack.window, segments, segments)
    if context.mask is not None:
        context.mask = context.mask | own.unsqueeze(-3)              # padding sees itself: no row of a softmax is empty
    if c.fast_forward:
        keys = audio if cache is None else cache.audio[:, : cache.live]
        context.hidden = context.mask & ~keys[:, None, None, :] | own.unsqueeze(-3)
    return context


def counted_context(c: ModelConfig, positions: Tensor, cache: Cache) -> Context:
    """`temporal_context` of a column whose place the device counts: nothing here depends on numbers of the host.   positions (B, 1)"""
    turn = cache.turns.table.index_select(0, positions[:, 0].clamp(min=0)) if c.temporal.rope_theta else None
    return Context(turn=turn, fast=True, cache=cache)
