"""Rotary position embedding (arXiv:2104.09864), both conventions, any positions.

    theta_i = base^(-2i/d)      (a, b) -> (a cos(p theta_i) - b sin(p theta_i), a sin(p theta_i) + b cos(p theta_i))

A pair (a, b) is (x[i], x[i + d/2]) in Llama ("halves") and (x[2i], x[2i + 1]) in Moshi ("interleaved"). Angles and
rotation are fp32 whatever x is.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def rope_tables(head: int, theta: float, scaling: Sequence[float], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines.   positions (B, S) -> two (B, 1, S, head/2) fp32

    `scaling` of Llama 3.1: factor, low and high frequency factor, original length; empty for none.
    """
    angles = positions[:, None, :, None].float() * rope_frequencies(head, theta, tuple(scaling), positions.device)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rope_frequencies(head: int, theta: float, scaling: tuple[float, ...], device: torch.device) -> Tensor:
    """How fast each pair turns, made once.   -> (head/2,)"""
    frequencies = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32, device=device) / head)
    return llama3_scaling(frequencies, *scaling) if scaling else frequencies


def llama3_scaling(frequencies: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    """Slow the long waves by `factor`, keep the short ones, blend between (Llama 3.1)."""
    waves = 2 * math.pi / frequencies
    blend = ((original / waves - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Apply RoPE.   x (B, H, S, head) -> same"""
    return turned(x, rotation(tables, interleaved))


Rotation = tuple[Tensor, Tensor, int]


def rotation(tables: tuple[Tensor, Tensor], interleaved: bool) -> Rotation:
    """Tables as `turned` wants them: cosines, (-sine, sine), and the axis of a pair.   Shapes end in (head/2, 2) or (2, head/2)"""
    axis, (cos, sin) = -1 if interleaved else -2, tables
    return cos.unsqueeze(axis), torch.stack([-sin, sin], axis), axis


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """x (B, H, S, head) -> same; or without S, as the tables are"""
    cos, sin, axis = rotation
    half = x.shape[-1] // 2
    pairs = x.float().reshape(*x.shape[:-1], *((half, 2) if axis == -1 else (2, half)))       # (a, b) along `axis`
    return torch.addcmul(pairs * cos, pairs.flip(axis), sin).view(x.shape).to(x.dtype)
