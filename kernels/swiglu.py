"""The gate of a feed-forward network, recomputed in backward (SwiGLU, arXiv:2002.05202).

    y = act(g) u        dg = dy u act'(g)        du = dy act(g)
    silu   act(g) = g s(g),  act'(g) = s(g) (1 + g (1 - s(g)))             s the logistic function
    gelu   act(g) = g P(g),  act'(g) = P(g) + g p(g)                       P and p of the normal distribution

Only g and u are saved, not the activation and the product. Packed g and u are halves of one tensor, and so is their
gradient. Next: rope.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choice import jit, power_of_2, tl, use_triton

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


def swiglu_ref(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """gate, up (..., F) -> (..., F); without `up`, gate (..., 2F) holds both"""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


@jit
def activated(g, GELU: tl.constexpr):
    """act(g) and act'(g)"""
    if GELU:
        p = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = p + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        p = 1.0 / (1.0 + tl.exp(-g))
        slope = p * (1.0 + g * (1.0 - p))
    return g * p, slope


@jit
def forward_kernel(gate, up, y, stride_g, stride_u, D, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    g = tl.load(gate + row * stride_g + d, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_u + d, mask=inside, other=0.0).to(tl.float32)
    act, _ = activated(g, GELU)
    tl.store(y + row * D + d, (act * u).to(y.dtype.element_ty), mask=inside)


@jit
def backward_kernel(gate, up, dy, dgate, dup, stride_g, stride_u, stride_dg, stride_du, D, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    g = tl.load(gate + row * stride_g + d, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_u + d, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * D + d, mask=inside, other=0.0).to(tl.float32)
    act, slope = activated(g, GELU)
    tl.store(dgate + row * stride_dg + d, (grad * u * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * stride_du + d, (grad * act).to(dup.dtype.element_ty), mask=inside)


def rows(x: Tensor) -> Tensor:
    """Flat rows, each contiguous; a half of a packed tensor stays where it is."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, *(() if up is None else (up,)))
        ctx.gelu = activation == "gelu"
        g, u = rows(gate).chunk(2, -1) if up is None else (rows(gate), rows(up))
        y = torch.empty(g.shape, dtype=torch.promote_types(g.dtype, u.dtype), device=g.device)
        N, D = g.shape
        block = power_of_2(D, most=1024)
        if N:
            forward_kernel[(N, math.ceil(D / block))](g, u, y, g.stride(0), u.stride(0), D, ctx.gelu, block)
        return y.view(*gate.shape[:-1], D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate, *rest = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = None if not rest else torch.empty(gate.shape, dtype=rest[0].dtype, device=gate.device)
        g, u = (rows(gate), rows(rest[0])) if rest else rows(gate).chunk(2, -1)
        dg, du = (rows(dgate), rows(dup)) if rest else rows(dgate).chunk(2, -1)
        N, D = g.shape
        block = power_of_2(D, most=1024)
        if N:
            strides = (x.stride(0) for x in (g, u, dg, du))
            backward_kernel[(N, math.ceil(D / block))](g, u, dy.contiguous(), dg, du, *strides, D, ctx.gelu, block)
        return dgate, dup, None


def swiglu(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """`swiglu_ref`"""
    assert activation in ACTIVATIONS, activation
    if up is not None and up.dtype == gate.dtype and not torch.is_grad_enabled() and not use_triton(gate):
        return ACTIVATIONS[activation](gate).mul_(up)                # memory is taken once
    return SwiGlu.apply(gate, up, activation) if use_triton(gate) else swiglu_ref(gate, up, activation)
