"""Attention with masks by position, packed rows, and the KV cache.

    softmax(q k^T / sqrt(d) + mask) v      mask: 0 <= p_q - p_k < window, p_k >= 0, and the same segment

The mask depends on positions, not on the order in memory: keys may be in a ring buffer, in packed rows, or after padding.
Next: decode.py, which runs one column over the cache.
"""

import inspect
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 64       # padding attends to itself in runs of this length: cheap, and no softmax row is empty


def attention_mask(q: Tensor, k: Tensor, window: int, q_segments: Tensor | None, k_segments: Tensor | None) -> Tensor:
    """Which key each query sees.   positions (B, S), (B, L) -> (B, 1, S, L) bool; negative key positions are never seen"""
    distance = q[:, :, None] - k[:, None, :]
    mask = (distance >= 0) & (k >= 0)[:, None, :]
    if window:
        mask &= distance < window
    if q_segments is not None:
        mask &= q_segments[:, :, None] == k_segments[:, None, :]
    return mask[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | PackedRows | None") -> Tensor:
    """Grouped-query attention.   q (B, H, S, d), k and v (B, H_kv, L, d) -> (B, H, S, d)

    Without a mask, S = L queries are causal and a single query sees everything.
    """
    if isinstance(mask, PackedRows):        # outside torch.compile: the runs differ between batches, so it would be recompiled every time
        run = torch.compiler.disable(packed_attention) if torch.compiler.is_compiling() else packed_attention
        return run(q, k, v, mask)
    causal = mask is None and q.shape[2] == k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


# ---- packed rows ----

@dataclass
class PackedRows:
    """Packed rows as consecutive causal runs: attention stays inside a run, so no mask over all pairs of columns is needed."""

    lengths: list[list[int]]                   # of the runs of each row
    window: int                                # attention window in columns, 0 = all
    cu_seqlens: Tensor                             # (runs + 1,) int32: where each run of all rows begins, and the end
    masks: dict[int, Tensor] | list[Tensor] = field(default_factory=dict)      # by length for windowed runs; or a list with one per run

    @classmethod
    def from_segments(cls, positions: Tensor, segments: Tensor, window: int) -> "PackedRows | None":
        """positions, segments (B, S); None when an example is not contiguous with positions increasing by one."""
        (B, S), (p, s) = positions.shape, (positions.cpu(), segments.cpu())
        first = torch.ones(B, S, dtype=torch.bool)
        first[:, 1:] = s[:, 1:] != s[:, :-1]
        at = first.flatten().nonzero().squeeze(1)
        ids = torch.stack([at // max(S, 1), s.flatten()[at]])
        counts = first[:, 1:] | (s[:, 1:] < 0) | (p[:, 1:] - p[:, :-1] == 1)
        real = ids[:, ids[1] >= 0]
        if not counts.all() or (p < 0)[s >= 0].any() or real.unique(dim=1).shape[1] != real.shape[1]:
            return None
        lengths: list[list[int]] = [[] for _ in range(B)]
        ends = [*at[1:].tolist(), B * S]
        for b, identity, begin, end in zip(*ids.tolist(), at.tolist(), ends, strict=True):
            longest = end - begin if identity >= 0 else PADDING
            lengths[b] += [min(longest, end - n) for n in range(begin, end, longest)]
        flat = [n for row in lengths for n in row]
        return cls(lengths, window, torch.tensor([0, *flat]).cumsum(0).int().to(positions.device))

    def to(self, device: torch.device) -> "PackedRows":
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=True))

    def with_hidden_keys(self, keys: Tensor) -> "PackedRows":
        """The same runs with `keys` (B, S) bool hidden from every query but themselves."""
        lengths = [n for row in self.lengths for n in row]
        return replace(self, masks=[self.causal_mask(n, keys.device) & ~part | torch.eye(n, dtype=torch.bool, device=keys.device)
                                    for n, part in zip(lengths, keys.flatten().split(lengths), strict=True)])

    def causal_mask(self, n: int, device: torch.device) -> Tensor:
        """Causal mask of a run of n columns.   -> (n, n) bool"""
        seen = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        return seen.triu(1 - self.window) if 0 < self.window < n else seen

    def mask(self, number: int, n: int, device: torch.device) -> Tensor | None:
        """Mask of a run, None = plain causal."""
        if isinstance(self.masks, list):
            return self.masks[number]
        if 0 < self.window < n and n not in self.masks:
            self.masks[n] = self.causal_mask(n, device)
        return self.masks.get(n)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, runs: PackedRows) -> Tensor:
    """`attend` within each run.   q (B, H, S, d), k and v (B, H_kv, S, d) -> (B, H, S, d)"""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and isinstance(runs.masks, dict) and varlen_attention():
        return flash_packed_attention(q, k, v, runs)
    rows, number, grouped = [], 0, q.shape[1] != k.shape[1]
    for lengths, *row in zip(runs.lengths, q.split(1), k.split(1), v.split(1), strict=True):
        parts = []
        for a, b, c in zip(*(t.split(lengths, 2) for t in row), strict=True):
            mask = runs.mask(number, a.shape[2], q.device)
            parts.append(F.scaled_dot_product_attention(a, b, c, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped))
            number += 1
        rows.append(torch.cat(parts, 2) if len(parts) > 1 else parts[0])
    return torch.cat(rows) if len(rows) > 1 else rows[0]


@lru_cache(maxsize=1)
def varlen_attention() -> Any:
    """torch's varlen_attn (flash, CUDA), or None when this version has none with a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


def flash_packed_attention(q: Tensor, k: Tensor, v: Tensor, runs: PackedRows) -> Tensor:
    """All runs of all rows in one kernel."""
    B, H, S, _ = q.shape
    k, v = (t.repeat_interleave(H // t.shape[1], 1) if t.shape[1] != H else t for t in (k, v))
    flat = (t.transpose(1, 2).flatten(0, 1).contiguous() for t in (q, k, v))                      # -> (B S, H, d)
    longest = max(n for row in runs.lengths for n in row)
    window = (runs.window - 1 if runs.window else -1, 0)
    y = varlen_attention()(*flat, runs.cu_seqlens, runs.cu_seqlens, longest, longest, window_size=window)
    return y.unflatten(0, (B, S)).transpose(1, 2)


class KVCache:
    """KV cache of one stack: a ring buffer of `capacity` slots, allocated once, with the position of every slot."""

    def __init__(self, layers: int, batch: int, heads: int, capacity: int, head: int, like: Tensor) -> None:
        self.store = like.new_zeros(layers, 2, batch, heads, capacity, head)
        self.keys, self.values = self.store.unbind(1)
        self.positions = torch.full((batch, capacity), -1, device=like.device)      # -1 = empty, or padding
        self.audio = torch.zeros(batch, capacity, dtype=torch.bool, device=like.device)
        self.capacity, self.count, self.live = capacity, 0, 0
        self.plain = True               # all slots are in order and none is padding
        self.fast: Any = None           # kernels/decode.py: the fast path of a single column, its RoPE table, its slots
        self.rope: Any = None
        self.step_slots: Any = None
        self.tables: Any = None
        self.voice: Tensor | None = None   # (B, n, D) voice features for cross-attention
        self.side: bool | None = None   # set by the caller: the next columns are all audio, all text, or None = mixed
        self.counter: Tensor | None = None      # columns written and padding columns (B,), if the device counts them:
        self.padding: Tensor | None = None      # kernels/decode.py, Ring

    def takes_fast_path(self, S: int) -> bool:
        """Whether S columns take the fast path of kernels/decode.py: a single one does, without gradients."""
        return S == 1 and self.fast is not None and not torch.is_grad_enabled()

    def clear(self) -> None:
        """Empty the cache and keep its memory."""
        self.positions.fill_(-1)
        self.count, self.live, self.plain, self.side, self.counter = 0, 0, True, None, None

    def reserve(self, positions: Tensor, audio: Tensor | None) -> None:
        """Take slots for the next columns.   positions (B, n), audio (B, n) bool, or None if it is not needed"""
        n = positions.shape[1]
        assert n <= self.capacity, (n, self.capacity)
        at = self.count % self.capacity
        wraps = at + n > self.capacity
        self.slots = torch.arange(at, at + n, device=positions.device) % self.capacity if wraps else slice(at, at + n)
        if n > 1 or not self.count:     # a later single column is never padding
            self.plain = self.plain and bool((positions[:, 0] >= 0).all() and (positions.diff(dim=1) == 1).all())
        self.positions[:, self.slots] = positions
        if audio is not None:
            self.audio[:, self.slots] = audio
        self.count += n
        self.live = min(self.count, self.capacity)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, n, head) and return all live ones."""
        self.keys[layer][:, :, self.slots] = k.to(self.keys.dtype)
        self.values[layer][:, :, self.slots] = v.to(self.values.dtype)
        return self.keys[layer][:, :, : self.live].to(k.dtype), self.values[layer][:, :, : self.live].to(v.dtype)
