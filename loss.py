"""Grouped, weighted cross-entropy with a global normaliser.

    L = sum over groups g of  lambda_g * (sum of w * nll over the streams of g) / (sum of w over the streams of g)

Both sums run over all micro-batches and all ranks of an optimizer step, so world size and accumulation never change
the objective. Groups: `modality` (text | audio; Higgs, Moshi, DSAA) or `all` (MOSS-Speech). The model returns the
numerators per stream (`Sums`); the denominators follow from the weights of the grid, before the forward pass.

Logits are computed for one chunk of rows at a time (kernels/cross_entropy.py), so peak memory does not grow with the
batch or the vocabulary. Next: data.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.choice import device_constant
from kernels.cross_entropy import Head, multistream_ce, rows_of_a_chunk
from streams import StreamTable


@dataclass(frozen=True)
class LossConfig:
    """How the losses of the streams are weighted and added."""

    groups: str = "modality"     # "modality" = text and audio losses are averaged separately; "all" = one average over all targets
    text: float = 1.0            # factor of the text loss
    audio: float = 1.0           # factor of the audio loss
    audio_reduction: str = "mean"    # audio loss: "mean" over the codebooks, or "sum" of their means (transformers' Higgs)
    contrastive: float = 0.0     # factor of the contrastive loss between a sample's speech and its voice reference; 0 = off
    z_loss: float = 0.0          # factor of the z-loss, (log sum exp of the logits)^2, which keeps logits small; 0 = off

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
    quiet: Tensor | None = None     # (4,) the part of the sums that is padding in the text row, where it is counted separately
    places: Tensor | None = None    # (N,) weighted nll of each position, summed over its streams; carries the gradient unless `total` does
    contrast: Tensor | None = None  # the contrastive loss, summed over its samples
    paired: Tensor | None = None    # () number of those samples
    total: Tensor | None = None     # () the loss, if the scale of each stream was given; it then carries the gradient

    def add(self, rows: Sequence[int], part: "Sums", at: Tensor) -> "Sums":
        """Add the sums of some streams: per-stream sums at `rows`, per-position sums at the positions `at`."""
        row, places = device_constant(tuple(rows), self.nll.device), self.places.index_add(0, at, part.places.to(self.places))
        return Sums(*(getattr(self, f).index_add(0, row, getattr(part, f).to(self.nll)) for f in FIELDS), self.quiet, places,
                    total=part.total if self.total is None else self.total + part.total)

    def stacked(self) -> Tensor:
        """The four sums as one detached float64 tensor (4, K + 1) with `quiet` as last column, ready for an all-reduce."""
        sums = torch.stack([getattr(self, f).detach().double() for f in FIELDS])
        return torch.cat([sums, torch.zeros_like(sums[:, :1]) if self.quiet is None else self.quiet[:, None].double()], 1)


def cross_entropy_sums(h: Tensor, inputs: Tensor, head: Head, targets: Tensor, weights: Tensor, row_width: int, scale: Tensor | None = None,
                       z_loss: float = 0.0, parameters: Sequence[Tensor] = ()) -> Sums:
    """Loss sums over rows h (N, ...) with targets and weights (N, Q), one chunk of rows at a time; a row makes `row_width` logits.

    With the `scale` (Q,) of each stream, `total` carries the gradient, which is computed in the forward pass; `parameters`
    are those of the head.
    """
    part = multistream_ce(h, head, targets, weights, scale=scale, inputs=inputs, z_loss=z_loss, parameters=parameters,
                          rows=slice(None), chunk_rows=rows_of_a_chunk(row_width, h.is_cuda))
    return Sums(part.nll, part.weight, part.hits, part.count, None, part.places, total=part.total)


# ---- from the sums to the loss ----

def loss_scale(weight: Tensor, table: StreamTable, config: LossConfig) -> Tensor:
    """Factor of each stream's nll in the loss, from the step's global weight sums.   (K,) -> (K,)"""
    scale = torch.zeros_like(weight)
    for factor, rows in ((config.text, table.text_out), (config.audio, table.audio_out)):
        total = weight[rows].sum() if config.groups == "modality" else weight.sum()
        if config.audio_reduction == "sum" and rows is table.audio_out:
            total = weight[rows]
        scale[rows] = factor / total.clamp(min=torch.finfo(weight.dtype).tiny) * (total > 0)
    return scale
