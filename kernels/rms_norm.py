"""Root-mean-square norm (arXiv:1910.07467), with an optional residual and an optional second weight.

    h = x + r        y = h / sqrt(mean_d h^2 + eps) * w        w is `other` in the rows of `where`
    dh = (g - n mean_d(g n)) / rms + dh'      n = h / rms, g = dy * w      dw = sum over rows of dy * n

Statistics in fp32. Bytes an element of 2: the kernel moves 4 forward (6 with a residual) where separate operations move 40.
Next: swiglu.py.
"""

import torch
from torch import Tensor

from kernels.choice import at_least_fp32, jit, power_of_2, tl, trains_on_cpu, use_triton

ROWS = 512       # programs that share the rows in backward, a few on each processor of a GPU; their sums are added in a fixed order


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, other: Tensor | None = None,
                 where: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x, residual (..., D), weights (D,), where (...) bool -> y (..., D), and h when there is a residual"""
    h = x if residual is None else x + residual
    y = at_least_fp32(h)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    w = weight if other is None else torch.where(where[..., None], other, weight)
    y = (y * w).to(h.dtype)
    return y if residual is None else (y, h)


@jit
def forward_kernel(x, r, w, w2, where, h, y, rstd, N, D, eps, RESIDUAL: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    v = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        v = (v + tl.load(r + row * D + d, mask=inside, other=0.0).to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + row * D + d, v, mask=inside)
        v = v.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / D + eps)
    weight = tl.load(w + d, mask=inside, other=0.0).to(tl.float32)
    if TWO:
        second = tl.load(where + row) != 0
        weight = tl.where(second, tl.load(w2 + d, mask=inside, other=0.0).to(tl.float32), weight)
    tl.store(y + row * D + d, (v * scale * weight).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale)


@jit
def backward_kernel(h, w, w2, where, rstd, dy, dh, dx, dw, N, D, PASSED: tl.constexpr, TWO: tl.constexpr, WEIGHT: tl.constexpr,
                    BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    first = tl.load(w + d, mask=inside, other=0.0).to(tl.float32)
    sum1 = tl.zeros([BLOCK], tl.float32)
    sum2 = tl.zeros([BLOCK], tl.float32)
    for n in range(0, tl.cdiv(N - tl.program_id(0), programs)):
        row = program + n * programs
        scale = tl.load(rstd + row)
        normed = tl.load(h + row * D + d, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(dy + row * D + d, mask=inside, other=0.0).to(tl.float32)
        weight = first
        part = grad * normed
        if TWO:
            second = tl.load(where + row) != 0
            weight = tl.where(second, tl.load(w2 + d, mask=inside, other=0.0).to(tl.float32), first)
            sum2 += tl.where(second, part, 0.0)
            part = tl.where(second, 0.0, part)
        sum1 += part
        g = grad * weight
        out = (g - normed * (tl.sum(g * normed, axis=0) / D)) * scale
        if PASSED:
            out += tl.load(dh + row * D + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * D + d, out.to(dx.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(dw + program * D + d, sum1, mask=inside)
        if TWO:
            tl.store(dw + (programs + program) * D + d, sum2, mask=inside)


class RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, other: Tensor | None,
                where: Tensor | None) -> tuple[Tensor, Tensor]:
        D, dtype = x.shape[-1], x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        x, weight, other = x.contiguous(), weight.contiguous(), None if other is None else other.contiguous()
        N = x.numel() // D
        h = x if residual is None else torch.empty_like(x, dtype=dtype)
        y, rstd = torch.empty_like(h), torch.empty(N, dtype=torch.float32, device=x.device)
        two, block = other is not None, power_of_2(D)
        chosen = where.expand(x.shape[:-1]).contiguous().view(torch.uint8) if two else rstd
        if N:
            forward_kernel[(N,)](x, x if residual is None else residual.contiguous(), weight, other if two else weight, chosen, h, y, rstd,
                                 N, D, eps, residual is not None, two, block, num_warps=power_of_2(block // 512, 1, 16))
        ctx.save_for_backward(h, weight, rstd, *((other, chosen) if two else ()))
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, rstd, *rest = ctx.saved_tensors
        other, where = rest or (weight, rstd)
        D, N, passed, block = h.shape[-1], rstd.numel(), dh is not None, power_of_2(h.shape[-1])
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[4]
        dy = torch.zeros_like(h) if dy is None else dy.contiguous()
        programs = min(ROWS, N)
        dx, dw = torch.empty_like(h), rstd if not wanted else h.new_empty(2 if rest else 1, programs, D, dtype=torch.float32)
        if N:
            backward_kernel[(programs,)](h, weight, other, where, rstd, dy, dh.contiguous() if passed else dy, dx, dw, N, D, passed,
                                            bool(rest), wanted, block, num_warps=power_of_2(block // 512, 1, 16))
        first, *second = dw.sum(1).to(weight.dtype) if wanted else (None, None)
        x, residual = ctx.dtypes
        return dx.to(x), first, None, dx.to(residual) if residual else None, second[0] if rest else None, None


class RmsNormCpu(torch.autograd.Function):
    """In fp32 on a CPU: dh is that of a LayerNorm with mean 0, one operation of torch, plus the mean of g that a LayerNorm subtracts."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x if residual is None else x + residual
        rstd = h.square().mean(-1, keepdim=True).add_(eps).rsqrt_()            # the bits of `rms_norm_ref`: DPO compares both
        ctx.save_for_backward(h, weight, rstd)
        ctx.set_materialize_grads(False)
        return (h * rstd).mul_(weight), h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        (h, weight, rstd), needed = ctx.saved_tensors, ctx.needs_input_grad
        dy, *given = (torch.zeros_like(h) if dy is None else dy).contiguous(), h.contiguous(), h.shape[-1:], torch.zeros_like(rstd)
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(dy, *given, rstd, weight, None, [True, needed[1], False])
        dx.add_((torch.matmul(dy, weight).div_(h.shape[-1]).unsqueeze(-1)).mul_(rstd))
        dx = dx if dh is None else dx.add_(dh)
        return dx, dw if needed[1] else None, None, dx if needed[3] else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, other: Tensor | None = None,
             where: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm_ref`"""
    if use_triton(x):
        y, h = RmsNorm.apply(x, weight, eps, residual, other, where)
    elif trains_on_cpu(x, weight, residual) and other is None:
        y, h = RmsNormCpu.apply(x, weight, eps, residual)
    else:
        return rms_norm_ref(x, weight, eps, residual, other, where)
    return y if residual is None else (y, h)
