"""A contrastive term for voice cloning: the speech of a sample is closer to its own reference than to those of others.

    r, y    mean final hidden state over the columns of a sample's reference speech, and of its trained speech; unit length
    L = - mean over samples i of log( exp(y_i r_i / t) / sum over j of exp(y_i r_j / t) )

j runs over i and the samples of other speakers in the same micro-batch: two clips of one voice are never pushed apart.
InfoNCE (arXiv:1807.03748) with t = 0.07. Off unless LossConfig.contrastive is set: the released models were trained
without it, and unlike the other terms it depends on which samples share a micro-batch. Samples without a reference, or
without another speaker in the batch, are left out. `contrastive_pairs` finds the others; `info_nce` is the sum.
Next: loss.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from streams import StreamTable, is_audio

TEMPERATURE = 0.07


@dataclass
class Pairs:
    """The columns that form the vectors of the n samples of a batch, and the negatives of each."""

    reference: Tensor       # (B, S) number of the sample whose reference speech a column is, -1 = none
    target: Tensor          # (B, S) the same for its trained speech
    against: Tensor         # (n, n) bool, row i: the references that sample i is compared with, its own included; empty = no part

    @property
    def count(self) -> Tensor:
        """How many samples take part: the normaliser."""
        return self.against.any(1).sum()


def contrastive_pairs(tokens: Tensor, weights: Tensor, segments: Tensor, speakers: Tensor, table: StreamTable) -> Pairs:
    """Find the samples of packed rows that have a reference and at least one negative.

    tokens and weights (B, K, S); segments (B, S), -1 = padding; speakers (B, S), a number for each voice, -1 = unknown
    """
    B, _, S = tokens.shape
    audio = is_audio(tokens, table) & (segments >= 0)
    before = F.pad(audio, (1, -1)) & (segments == F.pad(segments, (1, -1), value=-1))
    run = (audio & ~before).flatten().cumsum(0).view(B, S)                       # number of each stretch of speech, from 1
    counted = (weights[:, table.audio].sum(1) * audio).flatten()
    has_target = torch.zeros(B * S + 1, device=tokens.device).index_add(0, run.flatten(), counted) > 0
    trained = audio & has_target[run]
    n = B * max(1, int(segments.max()) + 1)
    sample = torch.where(segments >= 0, segments + torch.arange(B, device=tokens.device)[:, None] * (n // B), 0)
    reference, target = (torch.where(of, sample, -1) for of in (audio & ~trained, trained))
    both = present(reference, n) & present(target, n)
    speaker = torch.where(segments >= 0, speakers, -1).flatten()
    voice = torch.full((n,), -1, device=tokens.device).scatter_reduce(0, sample.flatten(), speaker, "amax")
    other = (voice[:, None] != voice) | (voice < 0)
    others = both[:, None] & both & other & ~torch.eye(n, dtype=torch.bool, device=tokens.device)
    return Pairs(reference, target, others | torch.diag(others.any(1)))


def present(owner: Tensor, n: int) -> Tensor:
    """Which of the numbers 0..n-1 occur.   -> (n,) bool"""
    return torch.bincount(owner[owner >= 0].flatten(), minlength=n) > 0


def info_nce(h: Tensor, found: Pairs) -> Tensor:
    """The sum over samples that take part.   h (B, S, D) -> scalar, which is 0 and still depends on h when there is none"""
    y, r = (F.normalize(pooled(h.float(), owner, len(found.against)), dim=-1) for owner in (found.target, found.reference))
    kept = found.against.any(1)
    scores = (y @ r.T / TEMPERATURE).masked_fill(~found.against, -torch.inf)[kept]
    return (scores.logsumexp(1) - (y * r).sum(1)[kept] / TEMPERATURE).sum() + 0.0 * h.float().sum()


def pooled(h: Tensor, owner: Tensor, n: int) -> Tensor:
    """Mean of the columns of each sample.   h (B, S, D), owner (B, S) -> (n, D)"""
    rows, of = h.flatten(0, 1), owner.flatten()
    kept = of >= 0
    total = torch.zeros(n, h.shape[-1], device=h.device).index_add(0, of[kept], rows[kept])
    return total / torch.bincount(of[kept], minlength=n).clamp(min=1)[:, None]
