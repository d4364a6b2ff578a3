"""Drawing a token of every row in one kernel: temperature, top-k, top-p, min-p, Gumbel noise, argmax.

    kept v:   #{u: l_u > l_v} < k   and   sum of p_u over kept-so-far u with l_u > l_v  <= top_p   and   p_v >= min_p max p
    id = argmax over kept v of  l_v / T - log(-log u_v)        T = 0: the likeliest        p = softmax(l / T)

Equal logits share their fate, so no sort is needed: both thresholds are found by bisection over the 32 bits of a
float's order. Noise is counted, not consumed: u_v depends on (seed, step, row, v) alone, and seed and step lie on the
device, so a captured graph draws anew at every replay and a run repeats exactly.
"""

import torch
from torch import Tensor

from kernels.choice import fused, jit, power, tl

GOLDEN, MIX1, MIX2 = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35      # odd constants of the finaliser of MurmurHash3


def mixed(x: Tensor) -> Tensor:
    """32 bits, well mixed.   int64 in [0, 2^32) -> the same range"""
    for shift, factor in ((16, MIX1), (13, MIX2)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def counted_noise(seed: Tensor, step: Tensor, R: int, V: int) -> Tensor:
    """Uniform numbers in (0, 1), 24 bits each.   seed (R,) and step () int64 -> (R, V) fp32"""
    word = mixed(mixed(mixed(seed & 0xFFFFFFFF) ^ ((seed >> 32) & 0xFFFFFFFF)) ^ (step & 0xFFFFFFFF))
    v = (torch.arange(V, device=seed.device) * GOLDEN) & 0xFFFFFFFF
    bits = mixed(mixed(word)[:, None] ^ v)
    return ((bits >> 8).float() + 0.5) * 2.0**-24


def kept(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """What the rules leave of logits / T.   (R, V), rules (R, 1) -> (R, V) bool"""
    ordered = logits.sort(-1, descending=True).values
    k = torch.where(top_k > 0, top_k, logits.shape[-1]).clamp(max=logits.shape[-1])
    left = logits >= ordered.gather(-1, k - 1)
    p = ordered.masked_fill(ordered < ordered.gather(-1, k - 1), -torch.inf).softmax(-1)
    before = p.cumsum(-1) - p
    first = torch.searchsorted(-ordered, -ordered)                    # where the run of an equal logit begins
    last = ((before.gather(-1, first) <= top_p) | (top_p >= 1)).sum(-1, keepdim=True).clamp(min=1)
    left &= logits >= ordered.gather(-1, last - 1)
    return left & ((logits - ordered[:, :1]).exp() >= min_p)


def draw_ref(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """logits (R, V), rules and seed (R,), step () -> (R,) int64; top_k 0, top_p 1 and min_p 0 drop nothing"""
    R, V = logits.shape
    warm = logits.float() / temperature[:, None].clamp(min=1e-5)
    left = kept(warm, top_k[:, None], top_p[:, None], min_p[:, None])
    noise = -(-counted_noise(seed, step, R, V).log()).log()
    noisy = torch.where(temperature[:, None] > 0, warm + noise, warm)
    return noisy.masked_fill(~left, -torch.inf).argmax(-1)


@jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit
def order(x):
    """Unsigned numbers that sort as floats do."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@jit
def draw_kernel(logits, temperature, top_k, top_p, min_p, seed, step, out, V, stride, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    t, k, share, least = tl.load(temperature + r), tl.load(top_k + r), tl.load(top_p + r), tl.load(min_p + r)
    v = tl.arange(0, BLOCK)
    x = tl.load(logits + r * stride + v, mask=v < V, other=-float("inf")).to(tl.float32) / tl.maximum(t, 1e-5)
    key = tl.where(v < V, order(x), 0)                                  # 0 lies below every float
    floor = tl.full([], 1, tl.uint32)
    if (k > 0) & (k < V):                                              # the largest key that k or more reach
        floor = tl.full([], 0, tl.uint32)
        probe = tl.full([], 0x80000000, tl.uint32)
        for _ in range(0, 32):
            higher = floor | probe
            probe = probe >> 1
            floor = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= k, higher, floor)
    high = tl.max(x, axis=0)
    e = tl.where(key >= floor, tl.exp(x - high), 0.0)
    if share < 1:                                                      # the largest key with more than top_p above it
        limit = share * tl.sum(e, axis=0)
        below = tl.full([], 0, tl.uint32)
        probe = tl.full([], 0x80000000, tl.uint32)
        for _ in range(0, 32):
            higher = below | probe
            probe = probe >> 1
            below = tl.where(tl.sum(tl.where(key > higher, e, 0.0), axis=0) > limit, higher, below)
        floor = tl.maximum(floor, below + 1)
    left = (key >= floor) & (tl.exp(x - high) >= least) & (v < V)
    number = tl.load(seed + r)
    now = tl.load(step)
    word = mix(mix((number & 0xFFFFFFFF).to(tl.uint32)) ^ ((number >> 32) & 0xFFFFFFFF).to(tl.uint32))
    word = mix(mix(word ^ (now & 0xFFFFFFFF).to(tl.uint32)))
    u = ((mix(word ^ (v.to(tl.uint32) * 0x9E3779B9)) >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    x = tl.where(t > 0, x - tl.log(-tl.log(u)), x)
    tl.store(out + r, tl.argmax(tl.where(left, x, -float("inf")), axis=0).to(tl.int64))


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """`draw_ref`; nothing is read on the host"""
    if not fused(logits):
        return draw_ref(logits, temperature, top_k, top_p, min_p, seed, step)
    (R, V), logits = logits.shape, logits if logits.stride(-1) == 1 else logits.contiguous()
    out, block = torch.empty(R, dtype=torch.int64, device=logits.device), power(V)
    if R:
        draw_kernel[(R,)](logits, temperature, top_k, top_p, min_p, seed, step, out, V, logits.stride(0), block,
                          num_warps=power(block // 512, 1, 16))
    return out
