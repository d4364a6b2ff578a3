"""Linear with an int8 weight: half the bytes of bf16, and small batches are limited by memory bandwidth.

    y[o] = scale[o] sum_i x[i] q[o, i]        scale[o] = max_i |w[o, i]| / 127,  q = round(w / scale)        dx = (dy scale) q

Weights are dequantised in registers, tile by tile. q has no gradient: it is for frozen bases under adapters, and for
decoding. Next: cross_entropy.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choice import dot, jit, power_of_2, tl, use_triton


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., out, in) -> q (..., out, in) int8, scale (..., out) fp32"""
    w = weight.detach().float()
    scale = w.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (w / scale[..., None]).round().to(torch.int8), scale


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """-> weight (..., out, in) fp32"""
    return q.float() * scale[..., None]


def int8_linear_ref(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (..., in), q (out, in), scale (out,) -> (..., out); or x (T, N, in) with one q a step, (T, out, in)"""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and q.dim() == 2 and x.shape[-1] % 64 == 0:   # no copy; odd widths crash it
        return torch._weight_int8pack_mm(x.flatten(0, -2).contiguous(), q.contiguous(), scale.to(x.dtype)).unflatten(0, x.shape[:-1])
    w = q.to(x.dtype)
    y = F.linear(x, w) if q.dim() == 2 else torch.bmm(x, w.mT)
    return y * (scale if q.dim() == 2 else scale[:, None]).to(y.dtype)


@jit
def product_kernel(a, q, scale, y, M, N, K, at, am, qt, qn, qk, st, BACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   INNER: tl.constexpr):
    """y = (a q^T) scale, or with BACK y = (a scale) q where the strides of q are swapped."""
    t = tl.program_id(2).to(tl.int64)
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, INNER):
        k = (start + tl.arange(0, INNER)).to(tl.int64)
        left = tl.load(a + t * at + m[:, None] * am + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        if BACK:
            left = (left.to(tl.float32) * tl.load(scale + t * st + k, mask=k < K, other=0.0)[None, :]).to(left.dtype)
        right = tl.load(q + t * qt + n[None, :] * qn + k[:, None] * qk, mask=(n < N)[None, :] & (k < K)[:, None], other=0)
        total += dot(left, right)
    if not BACK:
        total = total * tl.load(scale + t * st + n, mask=n < N, other=0.0)[None, :]
    tl.store(y + (t * M + m[:, None]) * N + n[None, :], total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def product(a: Tensor, q: Tensor, scale: Tensor, back: bool) -> Tensor:
    steps = q.dim() == 3
    a = a.contiguous()
    rows, (qn, qk) = a if steps else a.view(1, -1, a.shape[-1]), q.stride()[-2:]
    (T, M, K), N = rows.shape, q.shape[-1] if back else q.shape[-2]
    y = torch.empty(T, M, N, dtype=a.dtype, device=a.device)
    tile = power_of_2(M, least=16, most=64)
    columns, inner = (16, 256) if M <= 16 else (64, 64)              # few rows are memory-bound: many programs
    if M:
        product_kernel[(-(-M // tile), -(-N // columns), T)](
            rows, q, scale, y, M, N, K, M * K, K, q.stride(0) if steps else 0, *((qk, qn) if back else (qn, qk)),
            scale.stride(0) if steps else 0, back, tile, columns, inner)
    return y.view(*a.shape[:-1], N)


class Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        return product(x, q, scale, back=False) if use_triton(x) else int8_linear_ref(x, q, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return int8_back(dy, *ctx.saved_tensors), None, None


def int8_back(dy: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """dx = (dy scale) q.   dy (..., out) -> (..., in)"""
    if use_triton(dy):
        return product(dy, q, scale, back=True)
    return torch.matmul(dy * (scale if q.dim() == 2 else scale[:, None]).to(dy.dtype), q.to(dy.dtype))


def int8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`int8_linear_ref`; only q is kept for the backward, no copy in the type of x"""
    return Int8Linear.apply(x, q, scale)
