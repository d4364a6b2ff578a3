"""Rotary position embedding (arXiv:2104.09864), both conventions, any positions.

    theta_i = base^(-2i/d)      (a, b) -> (a cos(p theta_i) - b sin(p theta_i), a sin(p theta_i) + b cos(p theta_i))

A pair (a, b) is (x[i], x[i + d/2]) in Llama ("halves") and (x[2i], x[2i + 1]) in Moshi ("interleaved"). Angles and
rotation are fp32 whatever x is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rope_tables(head: int, theta: float, scaling: Sequence[float], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines.   positions (B, S) -> two (B, 1, S, head/2) fp32

    `scaling` of Llama 3.1: factor, low and high frequency factor, original length; empty for none.
    """
    half = torch.arange(0, head, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (half / head)
    if scaling:
        frequencies = llama3_scaling(frequencies, *scaling)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def llama3_scaling(frequencies: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    """Slow the long waves by `factor`, keep the short ones, blend between (Llama 3.1)."""
    waves = 2 * math.pi / frequencies
    blend = ((original / waves - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Apply RoPE.   x (B, H, S, head) -> same"""
    cos, sin = tables
    if interleaved:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
