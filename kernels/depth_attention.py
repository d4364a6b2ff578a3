"""Causal attention over the few codebook steps of a column, step-major.

    y[t] = sum over s <= t of  softmax_s(q[t] . k[s] / sqrt(d)) v[s]        t, s = 0 .. T-1, T <= 16

    dp[t, s] = dy[t] . v[s]      ds = p (dp - sum_s p dp) / sqrt(d)      dq = ds k      dk = ds^T q      dv = p^T dy

Tiles of 64 or 128 queries, as flash attention has them, would be nearly empty: here one program computes all steps of
one column and head with its T x T scores in registers; the backward recomputes them. Next: attention.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choice import jit, power_of_2, tl, use_triton


def depth_attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (T, N, H, d), k and v (T, N, H_kv, d) -> (T, N, H, d)"""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))                                 # -> (N, H, T, d)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.permute(2, 0, 1, 3)


@jit
def scores(q, k, v, n, h, g, T, D, qt, qn, qh, kt, kn, kh, vt, vn, vh, scale, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles of one column and head, q k v (STEPS, BLOCK), and its probabilities (STEPS, STEPS)."""
    t, d = tl.arange(0, STEPS).to(tl.int64)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (t < T) & (d < D)
    a = tl.load(q + t * qt + n * qn + h * qh + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(k + t * kt + n * kn + g * kh + d, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(v + t * vt + n * vn + g * vh + d, mask=inside, other=0.0).to(tl.float32)
    s = tl.sum(a[:, None, :] * b[None, :, :], axis=2) * scale
    rows, columns = tl.arange(0, STEPS)[:, None], tl.arange(0, STEPS)[None, :]
    s = tl.where((columns <= rows) & (columns < T), s, -1e30)
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    return a, b, c, p / tl.sum(p, axis=1)[:, None]


@jit
def forward_kernel(q, k, v, y, T, N, H, D, GROUP, qt, qn, qh, kt, kn, kh, vt, vn, vh, scale, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    _, _, c, p = scores(q, k, v, n, h, h // GROUP, T, D, qt, qn, qh, kt, kn, kh, vt, vn, vh, scale, STEPS, BLOCK)
    out = tl.sum(p[:, :, None] * c[None, :, :], axis=1)
    t, d = tl.arange(0, STEPS).to(tl.int64)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(y + ((t * N + n) * H + h) * D + d, out.to(y.dtype.element_ty), mask=(t < T) & (d < D))


@jit
def backward_kernel(q, k, v, dy, dq, dk, dv, T, N, H, D, GROUP, qt, qn, qh, kt, kn, kh, vt, vn, vh, gt, gn, gh, scale,
                    STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """dk and dv of a key head add up its GROUP query heads here, so each is written once."""
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t, d = tl.arange(0, STEPS).to(tl.int64)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (t < T) & (d < D)
    sum_k, sum_v = tl.zeros([STEPS, BLOCK], tl.float32), tl.zeros([STEPS, BLOCK], tl.float32)
    for i in range(0, GROUP):
        h = g * GROUP + i
        a, b, c, p = scores(q, k, v, n, h, g, T, D, qt, qn, qh, kt, kn, kh, vt, vn, vh, scale, STEPS, BLOCK)
        grad = tl.load(dy + t * gt + n * gn + h * gh + d, mask=inside, other=0.0).to(tl.float32)
        dp = tl.sum(grad[:, None, :] * c[None, :, :], axis=2)
        ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale
        sum_v += tl.sum(p[:, :, None] * grad[:, None, :], axis=0)
        sum_k += tl.sum(ds[:, :, None] * a[:, None, :], axis=0)
        out = tl.sum(ds[:, :, None] * b[None, :, :], axis=1)
        tl.store(dq + ((t * N + n) * H + h) * D + d, out.to(dq.dtype.element_ty), mask=inside)
    at = ((t * N + n) * (H // GROUP) + g) * D + d
    tl.store(dk + at, sum_k.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, sum_v.to(dv.dtype.element_ty), mask=inside)


def warps(T: int, d: int) -> int:
    """As many as hold a product (T, T, d) in registers; more take too much shared memory."""
    return power_of_2(power_of_2(T) ** 2 * power_of_2(d) // 4096, 1, 4)


def rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class DepthAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = rows(q), rows(k), rows(v)
        ctx.save_for_backward(q, k, v)
        T, N, H, d = q.shape
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if N:
            forward_kernel[(N, H)](q, k, v, y, T, N, H, d, H // k.shape[2], *(s for x in (q, k, v) for s in x.stride()[:3]), d**-0.5,
                                   power_of_2(T), power_of_2(d), num_warps=warps(T, d))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        dy, (T, N, H, d) = rows(dy), q.shape
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if N:
            backward_kernel[(N, k.shape[2])](q, k, v, dy, dq, dk, dv, T, N, H, d, H // k.shape[2],
                                             *(s for x in (q, k, v, dy) for s in x.stride()[:3]), d**-0.5, power_of_2(T), power_of_2(d),
                                             num_warps=warps(T, d))
        return dq, dk, dv


def depth_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`depth_attention_ref`, for up to 16 steps"""
    return DepthAttention.apply(q, k, v) if use_triton(q) and q.shape[0] <= 16 else depth_attention_ref(q, k, v)
