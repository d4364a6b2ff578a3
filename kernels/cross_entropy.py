"""Weighted cross-entropy of many streams, a chunk of rows at a time, without keeping the logits.

    nll_s = sum_m w_ms (lse_ms - l_ms,t)      lse = log sum_v exp(l_v)      total = sum_s scale_s (nll_s + z sum_m w_ms lse_ms^2)
    d total / d l_v = scale w (p_v (1 + 2 z lse) - [v = t])                 p_v = exp(l_v - lse)

`multistream_ce_ref` is the definition, `multistream_ce` what trains: rows without a target skip the head, and
logits exist for `chunk_rows` rows at a time. With `scale` known the gradients of the hidden states and of the head are made
in the forward, chunk by chunk, where the logits were: two products with a frozen head. Without it each chunk is computed
again in the backward: three products. Nothing here synchronises with the device; row counts are host integers.
Next: depth_attention.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, increment_version
from torch.utils.checkpoint import checkpoint

from kernels.choice import at_least_fp32, jit, power_of_2, tl, use_triton

CHUNK_BYTES = 32 << 20      # fp32 logits of one chunk; small enough to stay near the caches, large enough for the matmul
MIN_ROWS = 64

Head = Callable[[Tensor, Tensor], Tensor]      # h (n, ...), inputs (n, ...) -> logits (S, n, V), overwritten: it must not keep them itself


class StreamSums(NamedTuple):
    """Per-stream sums over targets, each (S,) fp32: weighted nll, weight, hits, count, weighted lse^2; and what else there is."""

    nll: Tensor
    weight: Tensor
    hits: Tensor
    count: Tensor
    square: Tensor
    places: Tensor                  # (M,) weighted nll of each row, over its streams
    total: Tensor | None = None     # () where a scale is given


# ---- one row of logits ----

def row_nll_ref(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (..., V), targets (...) -> nll (...), the likeliest class (...) and the log-sum-exp (...)"""
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    return nll, logits.detach().argmax(-1), logits.logsumexp(-1)


@jit
def stats_kernel(logits, targets, nll, top, lse, N, V, stride_s, stride_n, BLOCK: tl.constexpr):
    """Log-sum-exp, nll and likeliest class of a row; a row whose target is below zero is not read."""
    n, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = tl.load(targets + s * N + n)
    largest, total, best, chosen = -3e38, 0.0, 0, 0.0                # finite: a whole block may be -inf
    if t >= 0:
        row = logits + s * stride_s + n * stride_n
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
            high = tl.max(x, axis=0)
            best = tl.where(high > largest, start + tl.argmax(x, axis=0), best)
            new = tl.maximum(largest, high)
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), axis=0)
            largest = new
        chosen = tl.load(row + t, mask=t < V, other=float("nan")).to(tl.float32)      # an out-of-range target makes the loss NaN
        total = tl.log(total) + largest
    tl.store(nll + s * N + n, total - chosen)
    tl.store(top + s * N + n, best)
    tl.store(lse + s * N + n, total)


@jit
def slope_kernel(logits, targets, lse, down, out, N, V, stride_s, stride_n, BLOCK: tl.constexpr):
    """Overwrite logits with out * p - down * [v = t]; a row whose target is below zero becomes 0."""
    n, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = tl.load(targets + s * N + n)
    row = logits + s * stride_s + n * stride_n
    norm, a, b = tl.load(lse + s * N + n), tl.load(out + s * N + n), tl.load(down + s * N + n)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < tl.where(t >= 0, V, 0), other=0.0).to(tl.float32)
        grad = a * tl.exp(x - norm) - tl.where(v == t, b, 0.0)
        tl.store(row + v, tl.where(t >= 0, grad, 0.0).to(logits.dtype.element_ty), mask=v < V)


def stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, likeliest class, log-sum-exp (S, N), and what `slope` needs in place of the logits (S, N, V): they are spent."""
    if use_triton(logits):
        (S, N, V), targets = logits.shape, targets.contiguous()
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        nll, lse = torch.empty(2, S, N, dtype=torch.float32, device=logits.device)
        top = torch.empty(S, N, dtype=torch.int64, device=logits.device)
        block = power_of_2(V, most=4096)
        if nll.numel():
            stats_kernel[(N, S)](logits, targets, nll, top, lse, N, V, *logits.stride()[:2], block,
                                 num_warps=power_of_2(block // 256, 1, 8))
        return nll, top, lse, logits
    largest, top = logits.max(-1, keepdim=True) if logits.numel() else (logits.sum(-1, keepdim=True), targets[..., None])
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])
    powers = logits.sub_(largest).exp_()
    lse = powers.sum(-1, keepdim=True).log() + largest
    nll, top, lse, largest = (x.squeeze(-1) for x in (lse - chosen, top, lse, largest))
    return nll, top, lse, (powers, largest)


def slope(spent: Tensor | tuple[Tensor, Tensor], targets: Tensor, lse: Tensor, out: Tensor, down: Tensor) -> Tensor:
    """out * p - down * [v = t], in place.   lse, out and down (S, N) -> (S, N, V)"""
    if isinstance(spent, Tensor):
        (S, N, V), block = spent.shape, power_of_2(spent.shape[2], most=4096)
        targets, lse, out, down = (x.contiguous() for x in (targets, lse, out, down))
        if lse.numel():
            slope_kernel[(N, S)](spent, targets, lse, down, out, N, V, *spent.stride()[:2], block, num_warps=power_of_2(block // 256, 1, 8))
        increment_version(spent)                                     # so that autograd raises if the logits are used again
        return spent
    powers, largest = spent
    powers.mul_((out * (largest - lse).exp())[..., None])
    return powers.scatter_add_(-1, targets.clamp(min=0)[..., None], -down[..., None])


class RowNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nll, top, lse, spent = stats(logits.detach(), targets)
        ctx.save_for_backward(targets, lse, *([spent] if isinstance(spent, Tensor) else spent))
        ctx.mark_non_differentiable(top)
        return nll, top, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor, grad_lse: Tensor) -> tuple[Tensor, None]:
        targets, lse, *spent = ctx.saved_tensors
        return slope(spent[0] if len(spent) == 1 else tuple(spent), targets, lse, grad + grad_lse, grad), None


def row_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`row_nll_ref` of logits (S, N, V) that are not used elsewhere: they are overwritten, here and again in the backward."""
    return RowNll.apply(logits, targets)


# ---- all rows of all streams ----

def as_head(w: Tensor | Head) -> Head:
    """A weight (S, V, D) as a head: h (n, D) is shared by the streams, h (n, S, D) holds one state for each."""
    if not isinstance(w, Tensor):
        return w
    S, V, _ = w.shape

    def head(h: Tensor, _: Tensor) -> Tensor:
        if h.dim() == 3:
            return torch.bmm(h.transpose(0, 1), w.mT)
        return F.linear(h, w.flatten(0, 1)).unflatten(-1, (S, V)).transpose(0, 1)

    return head


def wanted_targets(targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets (S, n), below zero where they do not count, and their weights, zero there."""
    t, w = targets.long().T, (torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.float()).T
    wanted = (w != 0) & (t >= 0)
    return torch.where(wanted, t, -1), torch.where(wanted, w, 0.0)


def multistream_ce_ref(h: Tensor, w: Tensor | Sequence[Tensor] | Head, targets: Tensor, weights: Tensor | None = None, *,
                       scale: Tensor | None = None, inputs: Tensor | None = None, z_loss: float = 0.0) -> StreamSums:
    """The definition: all logits at once.

    h (M, D) shared by the streams or (M, S, D); w (S, V, D), or S of (V_s, D), or a Head that also reads inputs (M, ...);
    targets (M, S), below zero = none; weights (M, S) or None for 1; scale (S,) of the total or None
    """
    if isinstance(w, (list, tuple)):
        parts = [multistream_ce_ref(h if h.dim() == 2 else h[:, s : s + 1], one[None], *columns(s, targets, weights), z_loss=z_loss)
                 for s, one in enumerate(w)]
        *five, places, _ = zip(*parts, strict=True)
        sums = StreamSums(*map(torch.cat, five), sum(places))
    else:
        sums = chunk_sums(h, inputs if inputs is not None else targets, targets, weights, as_head(w), row_nll_ref)
    return finish(sums, scale, z_loss)


def columns(s: int, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[:, s : s + 1] for t in tensors]


def finish(sums: StreamSums, scale: Tensor | None, z_loss: float) -> StreamSums:
    return sums if scale is None else sums._replace(total=(scale * (sums.nll + z_loss * sums.square)).sum())


def chunk_sums(h: Tensor, inputs: Tensor, targets: Tensor, weights: Tensor | None, head: Head, row: Callable = row_nll) -> StreamSums:
    """Sums of one chunk of rows, differentiable."""
    logits = head(h, inputs)                                                             # (S, n, V)
    logits = logits if row is row_nll and use_triton(logits) else logits.float() if logits.dtype != torch.float64 else logits
    t, w = wanted_targets(targets, weights)
    nll, top, lse = row(logits, t if row is row_nll else t.clamp(min=0)) if t.numel() else (logits.sum(-1), t, logits.sum(-1))
    hits, count = ((top == t) & (t >= 0)).float(), (t >= 0).float()
    nll = torch.where(t >= 0, w * nll, 0.0)                                 # without a target nll may be infinite
    return StreamSums(nll.sum(1), w.sum(1), hits.sum(1), count.sum(1), (w * lse.square()).sum(1), nll.sum(0))


class ScaledCE(torch.autograd.Function):
    """Forward and backward of every chunk at once: the scale of each stream is known."""

    @staticmethod
    def forward(ctx, h: Tensor, inputs: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor, head: Head, rows: int, z: float,
                *parameters: Tensor) -> tuple[Tensor, ...]:
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[8:]]
        dh = torch.empty_like(h) if needed[0] else None
        grads: list[Tensor | None] = [None for _ in parameters]
        sums: Tensor | float = 0.0
        places = []
        for at in range(0, max(1, len(h)), rows):
            if len(places) > 2 and type(h).__name__ == "FakeTensor":       # a plan counts what three chunks need, all are alike
                places.append(places[-1][: len(h) - at])
                continue
            part = slice(at, at + rows)
            x, t_w = h[part].detach().requires_grad_(needed[0]), columns_of(part, targets, weights)
            with torch.enable_grad():
                logits = head(x, inputs[part])
            edge = get_gradient_edge(logits) if logits.requires_grad else None       # overwritten, a view gets a new history: two copies
            gradient, values, row = chunk_gradient(logits, *t_w, scale, z)
            sums = sums + values
            places.append(row)
            leaves = [leaf for leaf, need in zip([x, *parameters], needed, strict=True) if need]
            made = iter(torch.autograd.grad([edge], leaves, gradient, allow_unused=True) if leaves else ())
            if needed[0]:
                dh[part] = next(made)
            for n, need in enumerate(needed[1:]):
                grad = next(made) if need else None
                if grad is not None and len(h) > rows:                     # chunks add up in fp32
                    grads[n] = at_least_fp32(grad) if grads[n] is None else grads[n].add_(grad)
                elif grad is not None:
                    grads[n] = grad
        ctx.save_for_backward(dh, *(None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)))
        nll, weight, hits, count, square = sums
        total = (scale * (nll + z * square)).sum()
        rest = nll, weight, hits, count, square, torch.cat(places)
        ctx.mark_non_differentiable(*rest)
        return *rest, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream[-1]
        dh, *grads = (None if g is None else g.mul_(factor.to(g.dtype)) for g in ctx.saved_tensors)      # in place: once only
        return dh, *[None] * 7, *grads


def columns_of(part: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[part] for t in tensors]


def chunk_gradient(logits: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the total with respect to logits (S, n, V), where they were, the five sums (5, S), the nll of rows (n,)."""
    spent = logits.detach()
    if not use_triton(spent):
        spent = spent.float() if spent.dtype != torch.float64 else spent
    t, w = wanted_targets(targets, weights)
    nll, top, lse, spent = stats(spent, t)
    hits, count = (top == t) & (t >= 0), t >= 0
    nll = torch.where(t >= 0, w * nll, 0.0)                                 # without a target nll may be infinite
    sums = torch.stack([nll.sum(1), w.sum(1), hits.sum(1), count.sum(1), (w * lse.square()).sum(1)])
    down = scale[:, None] * w
    return slope(spent, t, lse, down * (1 + 2 * z * lse), down).to(logits.dtype), sums, nll.sum(0)


def multistream_ce(h: Tensor, w: Tensor | Sequence[Tensor] | Head, targets: Tensor, weights: Tensor | None = None, *,
                   scale: Tensor | None = None, inputs: Tensor | None = None, z_loss: float = 0.0, rows: Tensor | slice | None = None,
                   chunk_rows: int = 0, parameters: Sequence[Tensor] = ()) -> StreamSums:
    """`multistream_ce_ref` in chunks; without a scale `nll` and `square` carry gradients, with it `total` alone does.

    rows (n,): indices of the rows with a target in some stream, from the batch plan, or a slice; None counts
    them here where that costs no wait, on the CPU. `parameters` are those of a Head that has some. Of no rows one empty chunk runs: on
    every rank every parameter takes part in the backward.
    """
    if isinstance(w, (list, tuple)):
        parts = [multistream_ce(h if h.dim() == 2 else h[:, s : s + 1], one[None], *columns(s, targets, weights), rows=rows, z_loss=z_loss,
                                scale=None if scale is None else scale[s : s + 1], chunk_rows=chunk_rows) for s, one in enumerate(w)]
        *five, places, totals = zip(*parts, strict=True)
        return StreamSums(*map(torch.cat, five), sum(places), None if scale is None else sum(totals))
    inputs, M = targets if inputs is None else inputs, len(h)
    if rows is None and weights is not None and not weights.is_cuda:
        wanted = (weights != 0).any(1)
        rows = None if wanted.all() else wanted.nonzero().squeeze(1)
    if isinstance(rows, slice) and rows != slice(None):
        rows = torch.arange(M, device=h.device)[rows]
    if rows is not None:
        h, inputs, targets, weights = (None if x is None else x[rows] for x in (h, inputs, targets, weights))
    assert chunk_rows or isinstance(w, Tensor), "a Head does not say how many logits a row has: give chunk_rows"
    chunk_rows = chunk_rows or rows_of_a_chunk(math.prod(w.shape[:2]), h.is_cuda)
    if scale is not None and torch.is_grad_enabled():
        parameters = [w] if isinstance(w, Tensor) else parameters
        sums = StreamSums(*ScaledCE.apply(h, inputs, targets, weights, scale, as_head(w), chunk_rows, z_loss, *parameters))
    else:
        sums = finish(unscaled(h, inputs, targets, weights, as_head(w), chunk_rows), scale, z_loss)
    return sums._replace(places=sums.places.new_zeros(M).index_copy(0, rows, sums.places)) if isinstance(rows, Tensor) else sums


def rows_of_a_chunk(logits: int, cuda: bool = False) -> int:
    """How many rows of `logits` values fit into CHUNK_BYTES; more on a GPU, to keep it busy."""
    return max(512 if cuda else MIN_ROWS, CHUNK_BYTES // (4 * logits))


def unscaled(h: Tensor, inputs: Tensor, targets: Tensor, weights: Tensor | None, head: Head, rows: int) -> StreamSums:
    if len(h) <= rows:
        return chunk_sums(h, inputs, targets, weights, head)
    chunks = []
    for at in range(0, len(h), rows):
        part = (*columns_of(slice(at, at + rows), h, inputs, targets, weights), head)
        chunks.append(checkpoint(chunk_sums, *part, use_reentrant=False) if torch.is_grad_enabled() else chunk_sums(*part))
    *five, places, _ = zip(*chunks, strict=True)
    return StreamSums(*map(sum, five), torch.cat(places))
