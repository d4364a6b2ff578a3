"""Rotary position embedding (arXiv:2104.09864), both conventions, any positions.

    theta_i = base^(-2i/d)      (a, b) -> (a cos(p theta_i) - b sin(p theta_i), a sin(p theta_i) + b cos(p theta_i))

A pair (a, b) is (x[i], x[i + d/2]) in Llama ("halves") and (x[2i], x[2i + 1]) in Moshi ("interleaved"). Angles and
rotation are fp32 whatever x is. Next: embed_sum.py.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kernels.choice import at_least_fp32, jit, power_of_2, tl, trains_on_cpu, use_triton


def rope_tables(head: int, theta: float, scaling: Sequence[float], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines.   positions (B, S) -> two (B, 1, S, head/2) fp32

    `scaling` of Llama 3.1: factor, low and high frequency factor, original length; empty for none.
    """
    angles = positions[:, None, :, None].float() * rope_frequencies(head, theta, tuple(scaling), positions.device)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rope_frequencies(head: int, theta: float, scaling: tuple[float, ...], device: torch.device) -> Tensor:
    """Angular frequency of each pair, computed once.   -> (head/2,)"""
    frequencies = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32, device=device) / head)
    return llama3_scaling(frequencies, *scaling) if scaling else frequencies


def llama3_scaling(frequencies: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, interpolate between (Llama 3.1)."""
    waves = 2 * math.pi / frequencies
    blend = ((original / waves - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def rope_ref(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Apply RoPE.   x (B, H, S, head), tables two (B or 1, 1, S, head/2) -> as x"""
    return turned(x, rotation(tables, interleaved))


Rotation = tuple[Tensor, Tensor, int]


def rotation(tables: tuple[Tensor, Tensor], interleaved: bool) -> Rotation:
    """Tables in the form that `turned` takes: cosines, (-sine, sine), and the axis of a pair.   Shapes end in (head/2, 2) or (2, head/2)"""
    axis, (cos, sin) = -1 if interleaved else -2, tables
    return cos.unsqueeze(axis), torch.stack([-sin, sin], axis), axis


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """x (B, H, S, head) -> same; or without S, as the tables are"""
    cos, sin, axis = rotation
    half = x.shape[-1] // 2
    pairs = at_least_fp32(x).reshape(*x.shape[:-1], *((half, 2) if axis == -1 else (2, half)))       # (a, b) along `axis`
    return torch.addcmul(pairs * cos, pairs.flip(axis), sin).view(x.shape).to(x.dtype)


@jit
def turn_kernel(x, y, cos, sin, S, H, xb, xh, xs, yb, yh, ys, tb, HALF, SIGN, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
                BLOCK: tl.constexpr):
    """One column: a tile (heads, pairs). SIGN = -1 turns back."""
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (h < H) & (i < HALF)
    c = tl.load(cos + b * tb + s * HALF + i, mask=i < HALF, other=0.0)
    n = tl.load(sin + b * tb + s * HALF + i, mask=i < HALF, other=0.0) * SIGN
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + HALF
    source = x + b * xb + h * xh + s * xs
    target = y + b * yb + h * yh + s * ys
    one = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + first, (one * c - two * n).to(y.dtype.element_ty), mask=inside)
    tl.store(target + second, (one * n + two * c).to(y.dtype.element_ty), mask=inside)


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return turn(x, cos, sin, interleaved, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return turn(dy, *ctx.saved_tensors, ctx.interleaved, -1.0), None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: float) -> Tensor:
    if not use_triton(x):
        return rope_ref(x, (cos, sin if sign > 0 else -sin), interleaved)
    B, H, S, d = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(B, S, H, d, dtype=x.dtype, device=x.device).transpose(1, 2)             # the heads of a column together
    heads, block = power_of_2(H, most=32), power_of_2(d // 2)
    if y.numel():
        turn_kernel[(B * S, -(-H // heads))](x, y, cos.contiguous(), sin.contiguous(), S, H, *x.stride()[:3], *y.stride()[:3],
                                             S * d // 2 if cos.shape[0] > 1 else 0, d // 2, sign, interleaved, heads, block)
    return y


def rope(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """`rope_ref`"""
    return Rope.apply(x, *tables, interleaved) if use_triton(x) or trains_on_cpu(x) else rope_ref(x, tables, interleaved)
