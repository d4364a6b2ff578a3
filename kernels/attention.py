"""Attention of queries over keys that know their positions.

    softmax(q k^T / sqrt(d) + mask) v      mask: 0 <= p_q - p_k < window, p_k >= 0, and the same segment

Positions, not places, decide who sees whom: the keys may lie in a ring, in packed rows, or behind padding.
"""

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
