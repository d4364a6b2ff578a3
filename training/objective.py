"""The objective of a step: negative log-likelihood of the targets, or a preference between two replies (DPO).

    likelihood   loss.py: sum of w * nll over sum of w, by groups of streams
    preference   DPO (arXiv:2305.18290), over all pairs of a chosen reply y+ and a rejected one y-

        L = - mean log sigmoid(h)      h = r(y+) - r(y-)      r(y) = beta * sum over targets of w * (log p(t) - log p_ref(t))

Targets are all tokens with weight > 0, in the text row and in every codebook row, so r covers words and voice. The mean is
over the pairs of all micro-batches and ranks of a step. The reference is the same model with its adapters switched off, so
there is no second copy. With label smoothing e, a pair is taken to be swapped with probability e:
L = - (1 - e) log sigmoid(h) - e log sigmoid(-h). Rewards r are logged. data.stream_weights weighs the codebooks.

The two sides of a pair are neighbours in a packed row (data.py): segments 2n and 2n + 1. All objectives have the same five
methods, which train.py calls. Next: train.py.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from config import DpoConfig
from layers.batch_plan import Plan
from layers.contrastive import contrastive_pairs
from loss import LossConfig, Sums, loss_scale
from streams import StreamTable
from training.monitor import report

Net = Callable[..., Sums]       # a model, or DDP around it: tokens, weights, positions, segments; train.py gives the speakers behind them


class Likelihood:
    """Weighted cross-entropy."""

    def __init__(self, table: StreamTable, config: LossConfig) -> None:
        self.table, self.config = table, config

    def zero(self) -> Tensor:
        return torch.zeros(4, len(self.table) + 1, dtype=torch.float64)

    def count(self, weights: Tensor, segments: Tensor, *_: Tensor) -> Tensor:
        """What the loss of a batch is divided by: the target weights of each stream.   (B, K, S) -> (K,) float64"""
        return weights[..., 1:].sum((0, 2)).double()

    def sums(self, net: Net, tensors: Sequence[Tensor], plan: Plan | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss sums of a batch (K,), or with the factors of `scale` its part of the loss (), and its sums for the metrics.

        The latter have the shape of `zero`; `plan` is batch_plan.make_plan of the batch.
        """
        found = net(*tensors[:4], plan=plan, scale=scale, z_loss=self.config.z_loss)
        return found.nll if scale is None else found.total, found.stacked()

    def scale(self, counts: Tensor, config: LossConfig) -> Tensor:
        """The factor of each loss sum, from the counts of all micro-batches and ranks and the loss config of the stage."""
        return loss_scale(counts, self.table, config)

    def report(self, total: Tensor) -> dict[str, float]:
        return report(total, self.table, self.config)


class Contrast(Likelihood):
    """Weighted cross-entropy plus the contrastive loss of layers/contrastive.py."""

    warned = False

    def zero(self) -> Tensor:
        return torch.zeros(5, len(self.table) + 1, dtype=torch.float64)          # fifth row: contrastive loss, number of its samples

    def count(self, weights: Tensor, segments: Tensor, *rest: Tensor) -> Tensor:
        """-> (K + 1,); the last is the number of samples of the contrastive loss, which reads all columns except the last."""
        tokens, speakers = rest
        found = contrastive_pairs(tokens[..., :-1], weights[..., :-1], segments[:, :-1], speakers[:, :-1], self.table)
        return torch.cat([super().count(weights, segments), found.count[None]])

    def sums(self, net: Net, tensors: Sequence[Tensor], plan: Plan | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = net(*tensors[:4], speakers=tensors[4], plan=plan, scale=None if scale is None else scale[:-1], z_loss=self.config.z_loss)
        numbers = F.pad(found.stacked(), (0, 0, 0, 1))
        numbers[4, :2] = torch.stack([found.contrast.detach(), found.paired])
        if scale is None:
            return torch.cat([found.nll, found.contrast[None]]), numbers
        return found.total + scale[-1] * found.contrast, numbers

    def scale(self, counts: Tensor, config: LossConfig) -> Tensor:
        if not counts[-1] and not self.warned:
            self.warned = True
            print("contrastive loss 0: no micro-batch has two voices; give rows a speaker, raise data.reference or data.columns")
        return torch.cat([super().scale(counts[:-1], config), config.contrastive / counts[-1:].clamp(min=1)])

    def report(self, total: Tensor) -> dict[str, float]:
        return super().report(total[:4]) | {"contrastive_loss": float(total[4, 0] / total[4, 1].clamp(min=1))}


class Preference:
    """Direct preference optimisation (DPO) of a model with adapters."""

    def __init__(self, model: nn.Module, config: DpoConfig) -> None:
        self.model, self.config = model, config

    def zero(self) -> Tensor:
        return torch.zeros(5, dtype=torch.float64)

    def count(self, weights: Tensor, segments: Tensor, *_: Tensor) -> Tensor:
        """Pairs of a batch.   segments (B, S) -> (1,) float64"""
        return ((segments.amax(1) + 1) // 2).sum(0, keepdim=True).double()

    def sums(self, net: Net, tensors: Sequence[Tensor], plan: Plan | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss summed over pairs (1,), or scaled (), and the sums (5,): loss, pairs, correctly ordered pairs, rewards of y+, of y-."""
        with torch.no_grad(), lora.switched_off(self.model):
            reference = self.model(*tensors[:4], plan=plan).places
        rewards = self.rewards(net(*tensors[:4], plan=plan).places, reference, tensors[3])
        real = self.real(tensors[3])
        loss = torch.where(real, preference_loss(rewards[..., 0] - rewards[..., 1], self.config), 0.0).sum()
        better = ((rewards[..., 0] > rewards[..., 1]) & real).sum()
        numbers = torch.stack([loss.detach(), real.sum(), better, *rewards.detach().sum((0, 1))])
        return loss[None] if scale is None else (scale * loss).sum(), numbers.double()

    def real(self, segments: Tensor) -> Tensor:
        """Mask of the pairs that exist, among the P that a row could have.   (B, S) -> (B, P)"""
        return 2 * torch.arange(-(-segments.shape[1] // 2), device=segments.device) < segments.amax(1, keepdim=True)

    def rewards(self, policy: Tensor, reference: Tensor, segments: Tensor) -> Tensor:
        """Weighted nll of every position (B * (S-1),) under both models, segments (B, S) -> rewards (B, P, 2): chosen, rejected.

        The difference is taken position by position, before the sum, which keeps its precision.
        """
        B, S = segments.shape
        ratio = self.config.beta * (reference - policy).view(B, S - 1)
        owner = segments[:, 1:].clamp(min=0)                                      # padding is no target: it adds 0
        return ratio.new_zeros(B, S + S % 2).scatter_add(1, owner, ratio).unflatten(1, (-1, 2))

    def scale(self, counts: Tensor, config: LossConfig | None = None) -> Tensor:
        return 1 / counts.clamp(min=1)

    def report(self, total: Tensor) -> dict[str, float]:
        loss, pairs, better, chosen, rejected = total.tolist()
        n = max(1.0, pairs)
        return {"loss": loss / n, "reward_margin": (chosen - rejected) / n, "reward_accuracy": better / n,
                "reward_chosen": chosen / n, "reward_rejected": rejected / n}


def preference_loss(margin: Tensor, config: DpoConfig) -> Tensor:
    """The DPO loss of each pair, from the difference of its rewards."""
    e = config.label_smoothing
    return -(1 - e) * F.logsigmoid(margin) - (e * F.logsigmoid(-margin) if e else 0.0)
