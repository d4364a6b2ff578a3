"""Drawing tokens: temperature, top-k, top-p, min-p, then a Gumbel-max draw.

    argmax_v  l_v / T - log(-log u_v)      with l_v = -inf for what the rules drop, u_v uniform; T = 0 is plain argmax

Every row of logits has rules of its own. The uniform numbers are counted, not consumed, so a draw repeats exactly.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Uniform numbers that depend on seed, item, column and row alone: a batch draws what its items draw alone."""

    seed: int
    items: int
    column: int
    device: torch.device

    def __call__(self, rows: slice, V: int, again: bool = False) -> Tensor:
        """For rows `rows`, a second time where a draw is repeated   -> (B, R, V)"""
        words = [f"{self.seed + b} {self.column} {rows.start} {again}".encode() for b in range(self.items)]
        seeds = [int.from_bytes(hashlib.blake2b(word, digest_size=7).digest(), "big") for word in words]
        count = rows.stop - rows.start
        return torch.stack([torch.rand(count, V, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(self.device)


class Rules(NamedTuple):
    """How each of R rows is drawn, (R, 1) each; `plain`: nothing but temperatures."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    plain: bool = False


def sample(logits: Tensor, rules: Rules, noise: Noise, rows: slice, history: Tensor | None = None,
           repeats: int = 0) -> Tensor:
    """Draw one id for each row.   logits (B, R, V) fp32 -> (B, R)

    Repetition-aware (VALL-E 2): an id seen `repeats` times in its row's `history` (B, R, n) is drawn again, without rules.
    """
    shaped = logits / rules.temperature.clamp(min=1e-5) if rules.plain else shape_logits(logits, *rules[:4])
    chosen = pick(shaped, rules.temperature, noise(rows, logits.shape[-1]))
    if history is not None and history.shape[-1]:
        seen = (history == chosen[..., None]).sum(-1)
        again = pick(logits, torch.ones_like(rules.temperature), noise(rows, logits.shape[-1], again=True))
        chosen = torch.where(seen >= repeats, again, chosen)
    return chosen


def shape_logits(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Apply the rules, in this order; what is dropped becomes -inf.   (B, R, V), rules (R, 1) -> (B, R, V)"""
    logits = logits / temperature.clamp(min=1e-5)
    ordered, places = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    dropped = (top_k > 0) & (rank >= top_k)
    p = ordered.masked_fill(dropped, -torch.inf).softmax(-1)
    dropped = dropped | (p.cumsum(-1) - p > top_p) | (p < min_p * p[..., :1])
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, places, dropped), -torch.inf)


def pick(logits: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
    """Gumbel-max draw where the temperature is positive, argmax where it is 0.   (B, R, V) -> (B, R)"""
    gumbel = -(-noise.clamp(1e-20, 1 - 1e-7).log()).log()
    return torch.where(temperature > 0, logits + gumbel, logits).argmax(-1)
