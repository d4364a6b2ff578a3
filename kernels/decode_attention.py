"""Attention of one new column over a static cache; it reads only the visible keys.

    y = softmax(q . k[p] / sqrt(d)) v[p]      p = the last min(count, capacity, window) positions from `first` on, each in slot p % capacity

`count` is a tensor on the device, the column being written included, so a captured graph replays at any length. The
cache is linear while count <= capacity and a ring afterwards. The live range is split into SPLITS parts that run in
parallel (flash decoding); a second kernel joins them. Forward only: a cache is never trained through. Next: sample.py.
"""

import torch
from torch import Tensor

from kernels.choice import at_least_fp32, dot, jit, power_of_2, tl, use_triton

SPLITS, KEYS = 16, 64        # parts of the live range, and keys of one tile


def decode_attention_ref(q: Tensor, keys: Tensor, values: Tensor, count: Tensor, window: int = 0, first: Tensor | None = None) -> Tensor:
    """q (B, H, d), keys and values (B, H_kv, C, d), count (B,) of columns written -> (B, H, d); where nothing is seen, 0

    `first` (B,) is the position that an item begins at: what lies before is padding.
    """
    (B, H, d), (_, G, C, _) = q.shape, keys.shape
    last = count[:, None] - 1
    position = last - (last - torch.arange(C, device=q.device)) % C                      # the newest position in each slot
    seen = (position >= (0 if first is None else first[:, None].clamp(min=0))) & (position > last - (window or C))
    s = torch.einsum("bghd,bgcd->bghc", at_least_fp32(q).view(B, G, H // G, d), at_least_fp32(keys)) * d**-0.5
    p = s.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bghc,bgcd->bghd", p, at_least_fp32(values)).reshape(B, H, d).to(q.dtype)


@jit
def part_kernel(q, keys, values, count, first, parts, sums, H, G, C, D, W, kb, kg, kc, vb, vg, vc, scale,
                PADDED: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    b, g, part = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64), tl.program_id(1)
    group = H // G
    h, d = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    query = tl.load(q + (b * H + g * group + h)[:, None] * D + d[None, :], mask=(h < group)[:, None] & (d < D)[None, :], other=0.0)
    end = tl.load(count + b)
    begin = tl.maximum(end - W, 0)
    if PADDED:
        begin = tl.maximum(begin, tl.load(first + b))
    share = tl.cdiv(tl.cdiv(end - begin, SPLITS), KEYS) * KEYS
    start, stop = begin + part * share, tl.minimum(end, begin + (part + 1) * share)
    largest = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out = tl.zeros([HEADS, BLOCK], tl.float32)
    for step in range(0, tl.cdiv(tl.maximum(stop - start, 0), KEYS)):
        p = start + step * KEYS + tl.arange(0, KEYS)
        slot = (p % C).to(tl.int64)
        inside = (p < stop)[:, None] & (d < D)[None, :]
        k = tl.load(keys + b * kb + g * kg + slot[:, None] * kc + d[None, :], mask=inside, other=0.0)
        v = tl.load(values + b * vb + g * vg + slot[:, None] * vc + d[None, :], mask=inside, other=0.0)
        s = tl.where((p < stop)[None, :], dot(query, tl.trans(k)) * scale, -1e30)
        new = tl.maximum(largest, tl.max(s, axis=1))
        e = tl.exp(s - new[:, None])
        fade = tl.exp(largest - new)
        total = total * fade + tl.sum(e, axis=1)
        out = out * fade[:, None] + dot(e.to(v.dtype), v)
        largest = new
    at = ((b * G + g) * SPLITS + part) * HEADS + h
    tl.store(parts + at[:, None] * BLOCK + d[None, :], out)
    tl.store(sums + at * 2, largest)
    tl.store(sums + at * 2 + 1, total)


@jit
def join_kernel(parts, sums, y, H, G, D, SPLITS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    group = H // G
    part, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
    at = ((b * G + h // group) * SPLITS + part) * HEADS + h % group
    largest = tl.load(sums + at * 2)
    fade = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(tl.load(sums + at * 2 + 1) * fade, axis=0)
    out = tl.sum(tl.load(parts + at[:, None] * BLOCK + d[None, :]) * fade[:, None], axis=0)
    tl.store(y + (b * H + h) * D + d, (out / tl.where(total > 0, total, 1.0)).to(y.dtype.element_ty), mask=d < D)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, count: Tensor, window: int = 0, first: Tensor | None = None) -> Tensor:
    """`decode_attention_ref`; no length is read on the host"""
    if not use_triton(q):
        return decode_attention_ref(q, keys, values, count, window, first)
    (B, H, d), (_, G, C, _) = q.shape, keys.shape
    heads, block = power_of_2(H // G, least=16), power_of_2(d, least=16)
    parts, sums = (torch.empty(B * G * SPLITS * heads, n, dtype=torch.float32, device=q.device) for n in (block, 2))
    y = torch.empty_like(q.contiguous())
    live, count = min(window or C, C), count.contiguous()
    begins = count if first is None else first.contiguous()                      # count is not read there
    part_kernel[(B * G, SPLITS)](q.contiguous(), keys, values, count, begins, parts, sums, H, G, C, d, live, *keys.stride()[:3],
                                 *values.stride()[:3], d**-0.5, first is not None, SPLITS, KEYS, heads, block)
    join_kernel[(B * H,)](parts, sums, y, H, G, d, SPLITS, heads, block)
    return y
