"""Attention of queries over keys that know their positions.

    softmax(q k^T / sqrt(d) + mask) v      mask: 0 <= p_q - p_k < window, p_k >= 0, and the same segment

Positions, not places, decide who sees whom: the keys may lie in a ring, in packed rows, or behind padding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mask(q: Tensor, k: Tensor, window: int, q_segments: Tensor | None, k_segments: Tensor | None) -> Tensor:
    """Which key each query sees.   positions (B, S), (B, L) -> (B, 1, S, L) bool; negative key positions are never seen"""
    distance = q[:, :, None] - k[:, None, :]
    mask = (distance >= 0) & (k >= 0)[:, None, :]
    if window:
        mask &= distance < window
    if q_segments is not None:
        mask &= q_segments[:, :, None] == k_segments[:, None, :]
    return mask[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention.   q (B, H, S, d), k and v (B, H_kv, L, d) -> (B, H, S, d)

    Without a mask, S = L queries are causal and a single query sees everything.
    """
    causal = mask is None and q.shape[2] == k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


class Cache:
    """Keys and values of one stack in a ring of `capacity` slots, allocated once; a slot knows its position."""

    def __init__(self, layers: int, batch: int, heads: int, capacity: int, head: int, like: Tensor) -> None:
        self.store = like.new_zeros(layers, 2, batch, heads, capacity, head)
        self.keys, self.values = self.store.unbind(1)
        self.positions = torch.full((batch, capacity), -1, device=like.device)      # -1 = empty, or padding
        self.audio = torch.zeros(batch, capacity, dtype=torch.bool, device=like.device)
        self.capacity, self.count, self.live = capacity, 0, 0
        self.plain = True               # slots hold columns in order, none of them padding
        self.fast: Any = None           # kernels/decode.py: how a single column goes through the stack, its angles, its places
        self.turns: Any = None
        self.places: Any = None
        self.tables: Any = None
        self.voice: Tensor | None = None   # what the blocks listen to
        self.side: bool | None = None   # what the caller knows of the next columns: all are audio, all are text, or not known

    def single(self, S: int) -> bool:
        """Whether S columns go the fast way: one does, unless both of its dual networks may be needed."""
        return S == 1 and self.fast is not None and not torch.is_grad_enabled() and not (self.side is None and self.fast[0].dual)

    def reserve(self, positions: Tensor, audio: Tensor | None) -> None:
        """Take slots for the next columns.   positions (B, n), audio (B, n) or None where nobody will ask"""
        n = positions.shape[1]
        assert n <= self.capacity, (n, self.capacity)
        at = self.count % self.capacity
        wraps = at + n > self.capacity
        self.slots = torch.arange(at, at + n, device=positions.device) % self.capacity if wraps else slice(at, at + n)
        if n > 1:                       # a single column behind them is never padding
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
