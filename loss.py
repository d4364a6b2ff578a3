"""Grouped, weighted cross-entropy with a global normaliser.

    L = sum over groups g of  lambda_g * (sum of w * nll over the streams of g) / (sum of w over the streams of g)

Both sums run over all micro-batches and all ranks of an optimizer step, so world size and accumulation never change
the objective. Groups: `modality` (text | audio; Higgs, Moshi, DSAA) or `all` (MOSS-Speech). The model returns the
numerators per stream (`Sums`); the denominators are known from the grid before anything is computed.

Logits exist for `CHUNK_BYTES` worth of rows at a time and are recomputed in backward: peak memory does not grow with
the batch or the vocabulary. `cross_entropy_sums_ref` is the definition. Next: data.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import row_nll
from streams import StreamTable

CHUNK_BYTES = 32 << 20      # fp32 logits of one chunk; small enough to stay near the caches, large enough for the matmul
MIN_ROWS = 64


@dataclass(frozen=True)
class LossConfig:
    """How the streams add up."""

    groups: str = "modality"     # "modality": text and audio each have a normaliser; "all": one for everything
    text: float = 1.0            # lambda of the text group
    audio: float = 1.0           # lambda of the audio group
    audio_reduction: str = "mean"    # over the codebooks: "mean", one normaliser for all; "sum", one each (transformers' Higgs)
    contrastive: float = 0.0     # lambda of the contrastive term between a sample's speech and its reference (contrast.py)

    def __post_init__(self) -> None:
        assert self.groups in ("modality", "all"), f"groups {self.groups!r} is neither 'modality' nor 'all'"
        assert self.audio_reduction in ("mean", "sum"), f"audio_reduction {self.audio_reduction!r} is neither 'mean' nor 'sum'"
        assert self.groups == "modality" or self.audio_reduction == "mean", "audio_reduction 'sum' needs groups 'modality'"
        assert self.contrastive >= 0, f"contrastive {self.contrastive} is negative"


FIELDS = ("nll", "weight", "hits", "count")


@dataclass
class Sums:
    """Per-stream sums over targets, each (K,): weighted nll (carries the gradient), weight, hits, count."""

    nll: Tensor
    weight: Tensor
    hits: Tensor
    count: Tensor
    quiet: Tensor | None = None     # (4,) what of them is padding in the text row, where that is told apart
    places: Tensor | None = None    # (N,) weighted nll of each position, over its streams; carries the gradient too
    contrast: Tensor | None = None  # the contrastive term, summed over its samples

    def add(self, rows: Sequence[int], part: "Sums", at: Tensor) -> "Sums":
        """Add the sums of a few streams at their rows, those of positions at theirs."""
        row = torch.tensor(list(rows), device=self.nll.device)
        places = self.places.index_add(0, at, part.places)
        return Sums(*(getattr(self, f).index_add(0, row, getattr(part, f)) for f in FIELDS), self.quiet, places)

    def stacked(self) -> Tensor:
        """All four as one detached float64 tensor (4, K + 1), `quiet` last, ready to be reduced over ranks."""
        sums = torch.stack([getattr(self, f).detach().double() for f in FIELDS])
        return torch.cat([sums, torch.zeros_like(sums[:, :1]) if self.quiet is None else self.quiet[:, None].double()], 1)


Head = Callable[[Tensor, Tensor], Tensor]      # h (N, D), inputs (N, ...) -> logits (Q, N, V)


def chunk_sums(h: Tensor, inputs: Tensor, targets: Tensor, weights: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Sums of one chunk of rows.   h (N, D), targets and weights (N, Q) -> (4, Q): nll, weight, hits, count; (N,): nll"""
    logits = head(h, inputs).float()                                              # (Q, N, V)
    t, w = targets.T, weights.T.float()
    wanted = (w != 0) & (t >= 0)
    safe = torch.where(wanted, t, 0)
    nll, likeliest, _ = row_nll(logits, safe) if logits.shape[1] else (logits.sum(-1), t, None)
    w = torch.where(wanted, w, 0.0)
    hits = ((likeliest == t) & wanted).float()
    nll = w * nll                                                                 # (Q, N)
    return torch.stack([nll.sum(1), w.sum(1), hits.sum(1), wanted.float().sum(1)]), nll.sum(0)


def cross_entropy_sums_ref(h: Tensor, inputs: Tensor, head: Head, targets: Tensor, weights: Tensor) -> Sums:
    """The definition: all logits at once."""
    sums, places = chunk_sums(h, inputs, targets, weights, head)
    return Sums(*sums, places=places)


def cross_entropy_sums(h: Tensor, inputs: Tensor, head: Head, targets: Tensor, weights: Tensor, logits: int) -> Sums:
    """Sums over rows h (N, D) with targets and weights (N, Q), a chunk of logits at a time; `logits` numbers a row.

    With no rows one empty chunk still runs: on every rank every parameter takes part in backward.
    """
    rows = max(MIN_ROWS, CHUNK_BYTES // (4 * logits))
    if h.shape[0] <= rows:
        return cross_entropy_sums_ref(h, inputs, head, targets, weights)
    parts = zip(*(x.split(rows) for x in (h, inputs, targets, weights)), strict=True)
    sums, places = zip(*(checkpoint(chunk_sums, *part, head, use_reentrant=False) if torch.is_grad_enabled()
                         else chunk_sums(*part, head) for part in parts), strict=True)
    return Sums(*sum(sums), places=torch.cat(places))


# ---- what the sums add up to ----

def loss_scale(weight: Tensor, table: StreamTable, config: LossConfig) -> Tensor:
    """Factor of each stream's nll in the loss, from the step's global weight sums.   (K,) -> (K,)"""
    scale = torch.zeros_like(weight)
    for factor, rows in ((config.text, table.text_out), (config.audio, table.audio_out)):
        total = weight[rows].sum() if config.groups == "modality" else weight.sum()
        if config.audio_reduction == "sum" and rows is table.audio_out:
            total = weight[rows]
        scale[rows] = factor / total.clamp(min=torch.finfo(weight.dtype).tiny) * (total > 0)
    return scale
