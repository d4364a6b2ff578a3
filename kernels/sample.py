"""Sample a token for every row in one kernel: temperature, top-k, top-p, min-p, Gumbel noise, argmax.

    kept v:   #{u: l_u > l_v} < k   and   sum of p_u over kept-so-far u with l_u > l_v  <= top_p   and   p_v >= min_p max p
    id = argmax over kept v of  l_v / T - log(-log u_v)        T = 0: the likeliest        p = softmax(l / T)

Equal logits are kept or dropped together, so no sort is needed: both thresholds are found by bisection over the 32 bits of a
float's order. The noise is counter-based: u_v depends on (seed, step, v) only, and each row has its own seed.
Seed and step are device tensors: a captured graph samples new tokens at every replay, and a run is reproducible.
Next: shapes.py.
"""

from functools import cache

import torch
from torch import Tensor

from kernels.choice import jit, power_of_2, tl, use_triton

GOLDEN, MIX1, MIX2 = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35      # odd constants of the finaliser of MurmurHash3
COLD, WIDEST = 1e-5, 1 << 15     # least temperature to divide by; vocabularies above go through the reference: a program holds a whole row
Rule = Tensor | float | int | None


def signed(word: int) -> int:
    """32 bits as the int32 that holds them."""
    return word - (1 << 32) if word >> 31 else word


def mixed(x: Tensor) -> Tensor:
    """32 bits, well mixed.   int32 -> int32, whose products wrap and whose shifts drag the sign along"""
    x = (x ^ ((x >> 16) & 0xFFFF)).mul_(signed(MIX1))
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(signed(MIX2))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


@cache
@torch.inference_mode(False)
def scattered(V: int, device: torch.device) -> Tensor:
    """A 32-bit hash of each of V vocabulary indices, computed once."""
    return (torch.arange(V, device=device) * GOLDEN).to(torch.int32)


def counted_noise(seed: Tensor, step: Tensor, V: int) -> Tensor:
    """Uniform numbers in (0, 1), 24 bits each.   seed (R,) and step () int64 -> (R, V) fp32"""
    word = (seed ^ (seed >> 32) * MIX1 ^ step * MIX2).to(torch.int32)
    bits = mixed(word[:, None] ^ scattered(V, seed.device))
    return (bits >> 8).bitwise_and_(0xFFFFFF).float().add_(0.5).mul_(2.0**-24)


def gumbel(seed: Tensor, step: Tensor, V: int) -> Tensor:
    """What the reference takes off the logits: log(-log u).   -> (R, V) fp32"""
    return counted_noise(seed, step, V).log_().neg_().log_()


def kept(logits: Tensor, top_k: Rule = None, top_p: Rule = None, min_p: Rule = None) -> Tensor:
    """Which tokens top-k, top-p and min-p keep, from logits / T.   (R, V), rules as in `sample`, those of rows (R, 1) -> (R, V) bool"""
    V = logits.shape[-1]
    if isinstance(top_k, int) and top_p is None:                      # no need to sort what is dropped
        least = logits.topk(min(top_k or V, V), sorted=False).values.amin(-1, keepdim=True)
    elif top_k is not None or top_p is not None:
        ordered = logits.sort(-1, descending=True).values
        k = torch.as_tensor(V if top_k is None else top_k, device=logits.device).expand(len(logits), 1)
        least = ordered.gather(-1, torch.where(k > 0, k, V).clamp(max=V) - 1)
        if top_p is not None:
            p = ordered.masked_fill(ordered < least, -torch.inf).softmax(-1)
            before, first = p.cumsum(-1) - p, torch.searchsorted(-ordered, -ordered)  # where the run of an equal logit begins
            allowed = torch.as_tensor(top_p, device=logits.device)
            last = ((before.gather(-1, first) <= allowed) | (allowed >= 1)).sum(-1, keepdim=True).clamp(min=1)
            least = torch.maximum(least, ordered.gather(-1, last - 1))
    else:
        least = -torch.inf
    left = logits >= least
    return left if min_p is None else left & ((logits - logits.amax(-1, keepdim=True)).exp() >= min_p)


def sample_ref(logits: Tensor, temperature: Rule, top_k: Rule, top_p: Rule, min_p: Rule, seed: Tensor, step: Tensor,
               noise: Tensor | None = None) -> Tensor:
    """logits (R, V), seed (R,), step () -> (R,) int64

    A rule is a number, or one for each row (R,); top_k 0, top_p 1 and min_p 0 drop nothing, and neither does None. `noise`
    is `gumbel` of these seeds if it was computed before.
    """
    t, *rules = (rule[:, None] if isinstance(rule, Tensor) else rule for rule in (temperature, top_k, top_p, min_p))
    noise = gumbel(seed, step, logits.shape[1]) if noise is None else noise
    if isinstance(t, Tensor):
        warm = logits.float() / t.clamp(min=COLD)
        noisy = torch.where(t > 0, warm - noise, warm)
    else:
        warm = logits.float() / max(t, COLD)
        noisy = warm - noise if t > 0 else warm
    if any(rule is not None for rule in rules):
        noisy.masked_fill_(~kept(warm, *rules), -torch.inf)
    return noisy.argmax(-1)


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
def unorder(key):
    """The float that `order` made a number of."""
    return tl.where(key >= 0x80000000, key & 0x7FFFFFFF, ~key).to(tl.float32, bitcast=True)


@jit
def sample_kernel(logits, temperature, top_k, top_p, min_p, seed, step, out, V, stride, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
                  MIN_P: tl.constexpr, BLOCK: tl.constexpr):
    """One row. Only the keys are kept from step to step: a row of 32,768 then fits the registers of 32 warps."""
    r = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + r)
    v = tl.arange(0, BLOCK)
    x = tl.load(logits + r * stride + v, mask=v < V, other=-float("inf")).to(tl.float32) / tl.maximum(t, 1e-5)
    high = tl.max(x, axis=0)
    key = tl.where(v < V, order(x), 0)                                  # 0 sorts below every float
    floor = tl.full([], 1, tl.uint32)
    if TOP_K:
        k = tl.load(top_k + r)
        if (k > 0) & (k < V):                                          # the largest key that k or more reach
            floor = tl.full([], 0, tl.uint32)
            probe = tl.full([], 0x80000000, tl.uint32)
            for _ in range(0, 32):
                higher = floor | probe
                probe = probe >> 1
                floor = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= k, higher, floor)
    if TOP_P:
        share = tl.load(top_p + r)
        if share < 1:                                                  # the largest key with more than top_p above it
            limit = share * tl.sum(tl.where(key >= floor, tl.exp(unorder(key) - high), 0.0), axis=0)
            below = tl.full([], 0, tl.uint32)
            probe = tl.full([], 0x80000000, tl.uint32)
            for _ in range(0, 32):
                higher = below | probe
                probe = probe >> 1
                above = tl.sum(tl.where((key > higher) & (key >= floor), tl.exp(unorder(key) - high), 0.0), axis=0)
                below = tl.where(above > limit, higher, below)
            floor = tl.maximum(floor, below + 1)
    x = tl.where(v < V, unorder(key), -float("inf"))
    left = (key >= floor) & (v < V)
    if MIN_P:
        left &= tl.exp(x - high) >= tl.load(min_p + r)
    number = tl.load(seed + r)
    now = tl.load(step)
    word = ((number ^ (number >> 32) * 0x85EBCA6B ^ now * 0xC2B2AE35) & 0xFFFFFFFF).to(tl.uint32)
    u = ((mix(word ^ (v.to(tl.uint32) * 0x9E3779B9)) >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    x = tl.where(t > 0, x - tl.log(-tl.log(u)), x)
    tl.store(out + r, tl.argmax(tl.where(left, x, -float("inf")), axis=0).to(tl.int64))


@cache
@torch.inference_mode(False)
def spread(rule: float, R: int, device: torch.device) -> Tensor:
    """A scalar rule as a tensor for R rows, created once."""
    return torch.full((R,), rule, device=device)


def sample(logits: Tensor, temperature: Rule, top_k: Rule, top_p: Rule, min_p: Rule, seed: Tensor, step: Tensor,
           noise: Tensor | None = None) -> Tensor:
    """`sample_ref`; nothing is read on the host, and the kernel makes its own noise"""
    (R, V), logits = logits.shape, logits if logits.stride(-1) == 1 else logits.contiguous()
    if not use_triton(logits) or V > WIDEST:
        return sample_ref(logits, temperature, top_k, top_p, min_p, seed, step, noise)
    out, block = torch.empty(R, dtype=torch.int64, device=logits.device), power_of_2(V)
    given = [rule is not None for rule in (top_k, top_p, min_p)]
    rules = [rule if isinstance(rule, Tensor) else spread(rule or 0.0, R, logits.device) for rule in (temperature, top_k, top_p, min_p)]
    if R:
        sample_kernel[(R,)](logits, *rules, seed, step, out, V, logits.stride(0), *given, block, num_warps=power_of_2(block // 512, 1, 32))
    return out
