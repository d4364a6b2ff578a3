"""The sum of one embedding per row of the grid; an id below zero adds exactly zero.

    x[m] = sum over rows k with ids[k, m] >= 0 of  W[offset_k + ids[k, m]]
    dW[v] = sum over the places (k, m) that hold v, in the order of (m, k), of dx[m]

The backward sorts the positions by id and sums each id's positions in that order: no atomics, bit-reproducible.
Next: route.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choice import device_constant, jit, power_of_2, tl, trains_on_cpu, use_triton

PLACES = 32      # places of one id that are added at a time


def embed_sum_ref(ids: Tensor, weight: Tensor, offsets: Sequence[int]) -> Tensor:
    """ids (B, K, S), weight (sum of vocabularies, D), offsets: where the K tables begin -> (B, S, D)

    Added from left to right in the type of the weight, as the published models do.
    """
    total = embed_row(ids[:, 0], weight, offsets[0])
    for k in range(1, len(offsets)):
        total = total + embed_row(ids[:, k], weight, offsets[k])
    return total


def embed_row(ids: Tensor, weight: Tensor, offset: int | Tensor) -> Tensor:
    """One row, or n rows with the offsets (n,) of their tables.   ids (...) or (..., n) -> as ids, with D behind"""
    vectors = F.embedding(ids.clamp(min=0) + offset, weight)
    return vectors * (ids >= 0).unsqueeze(-1).to(vectors.dtype)


@jit
def forward_kernel(ids, weight, x, K, D, V, BLOCK: tl.constexpr):
    """An out-of-range id gives NaN; nothing beyond the weight is read."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, K):
        v = tl.load(ids + m * K + k)
        part = tl.load(weight + v * D + d, mask=d < tl.where((v >= 0) & (v < V), D, 0), other=0.0).to(tl.float32)
        total += tl.where(v < V, part, float("nan"))
    tl.store(x + m * D + d, total.to(x.dtype.element_ty), mask=inside)


@jit
def backward_kernel(places, starts, dx, dw, K, D, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    v = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    end = tl.load(starts + v + 1)
    begin = tl.load(starts + v)
    n = tl.arange(0, PLACES)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(0, tl.cdiv(end - begin, PLACES)):
        at = begin + step * PLACES + n
        m = tl.load(places + at, mask=at < end, other=0) // K
        part = tl.load(dx + m[:, None] * D + d[None, :], mask=(at < end)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32), axis=0)
    tl.store(dw + v * D + d, total.to(dw.dtype.element_ty), mask=inside)


class EmbedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, offsets: Sequence[int]) -> Tensor:
        (B, K, S), D = ids.shape, weight.shape[1]
        ctx.offsets, ctx.like = () if use_triton(weight) else tuple(offsets), (weight.shape, weight.dtype)
        if ctx.offsets:
            ctx.save_for_backward(ids)
            return embed_sum_ref(ids, weight, offsets)
        shift = device_constant(tuple(offsets), ids.device)
        flat = ids.transpose(1, 2).reshape(-1, K)
        flat = torch.where(flat >= 0, flat + shift, -1).contiguous()                      # (M, K)
        x = torch.empty(B, S, D, dtype=weight.dtype, device=weight.device)
        block = power_of_2(D, most=1024)
        if B * S:
            forward_kernel[(B * S, -(-D // block))](flat, weight.detach().contiguous(), x, K, D, weight.shape[0], block)
        ctx.save_for_backward(flat)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx: Tensor) -> tuple[None, Tensor | None, None]:
        (flat,), ((V, D), dtype) = ctx.saved_tensors, ctx.like
        if ctx.offsets:                                            # on a CPU: each table by itself, not K times all of them
            dw = torch.zeros(V, D, dtype=dtype)
            for row, offset in zip(flat.unbind(1), ctx.offsets, strict=True):
                end = min((o for o in ctx.offsets if o > offset), default=V)
                dw[offset:end] += torch.ops.aten.embedding_dense_backward(dx, row.clamp(min=-1), end - offset, -1, False)
            return None, dw, None
        ids, places = flat.flatten().sort(stable=True)
        starts = torch.searchsorted(ids, torch.arange(V + 1, device=ids.device))           # ids of -1 lie before the first
        dw, block = torch.empty(V, D, dtype=dtype, device=dx.device), power_of_2(D, most=128)
        backward_kernel[(V, -(-D // block))](places, starts, dx.contiguous(), dw, flat.shape[1], D, PLACES, block)
        return None, dw, None


def embed_sum(ids: Tensor, weight: Tensor, offsets: Sequence[int]) -> Tensor:
    """`embed_sum_ref`, added in fp32"""
    return (EmbedSum.apply if use_triton(weight) or trains_on_cpu(weight) else embed_sum_ref)(ids, weight, offsets)
