"""A frozen Linear with a low-rank update (LoRA, arXiv:2106.09685), as one operation.

    y = x W^T + b + s (x A^T) B^T
    dx = dy W + s (dy B) A      dA = s (dy B)^T x      dB = s dy^T (x A^T)      dW only where W is trained

x is saved once and both updates are accumulated in place: 6 bytes per output element instead of 14. W may be int8 with
one scale per row (int8.py). One pair (A, B) and W (out, in), or one a step of x
(T, N, in): W (T, out, in), A (T, R, in), B (T, out, R). Next: int8.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import choice
from kernels.int8 import int8_back, int8_linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    """x W^T + b of a Linear without an update, in any of the forms of this file."""
    if row_scale is not None:
        y = int8_linear(x, weight, row_scale)
    elif weight.dim() == 2:
        return F.linear(x, weight, bias)
    else:
        y = torch.bmm(x, weight.to(x.dtype).mT)
    return y if bias is None else y + bias


def lora_linear_ref(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None,
                    row_scale: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out); the update is computed in the type of A"""
    y = linear(x, weight, None, row_scale)
    y = y + (scale * torch.matmul(torch.matmul(x.to(a.dtype), a.mT), b.mT)).to(y.dtype)
    return y if bias is None else y + bias


def add_product(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """y += scale * left right, in place.   (..., n), (..., k), (k, n); or with a leading axis of steps in all"""
    if right.dim() == 3:
        return y.baddbmm_(left, right, alpha=scale)
    y.view(-1, y.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right, alpha=scale)
    return y


def outer(left: Tensor, right: Tensor, steps: bool, scale: float = 1.0) -> Tensor:
    """scale left^T right over all rows, rounded once."""
    if not steps:
        left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    made = left.new_empty(*left.shape[:-2], left.shape[-1], right.shape[-1])
    return (made.baddbmm_ if steps else made.addmm_)(left.mT, right, beta=0, alpha=scale)


class LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None,
                row_scale: Tensor | None) -> Tensor:
        low = torch.matmul(x, a.mT)
        ctx.save_for_backward(x, weight, a, b, low, row_scale)
        ctx.scale = scale
        return add_product(linear(x, weight, bias, row_scale), low, b.mT, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low, row_scale = ctx.saved_tensors
        steps, (need_x, need_w, need_a, need_b, _, need_bias, _) = weight.dim() == 3, ctx.needs_input_grad
        dlow = torch.matmul(dy, b)                                   # yet without the scale: every product below applies it as it rounds
        da = outer(dlow, x, steps, ctx.scale) if need_a else None
        db = outer(dy, low, steps, ctx.scale) if need_b else None
        dw = outer(dy, x, steps) if need_w else None
        dx = None
        if need_x:
            dx = add_product(torch.matmul(dy, weight) if row_scale is None else int8_back(dy, weight, row_scale), dlow, a, ctx.scale)
        return dx, dw, da, db, None, dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None, None


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None,
                row_scale: Tensor | None = None) -> Tensor:
    """`lora_linear_ref`; under autocast in its type"""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, a, b, bias = (None if t is None else t.to(dtype) for t in (x, a, b, bias))
        weight = weight if row_scale is not None else weight.to(dtype)
    mixed = x.dtype != a.dtype or (row_scale is None and x.dtype != weight.dtype)
    if choice.MODE == "ref" or mixed or torch.compiler.is_compiling():
        return lora_linear_ref(x, weight, a, b, scale, bias, row_scale)
    return LoraLinear.apply(x, weight, a, b, scale, bias, row_scale)
