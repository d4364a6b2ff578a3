"""Cross-entropy of rows whose logits are needed by nobody else: one buffer for logits, probabilities and gradient.

    nll_n = log sum_v exp(l_nv) - l_n,t        d nll_n / d l_nv = exp(l_nv) / sum_u exp(l_nu) - [v = t]

`row_nll_ref` is the definition. `row_nll` overwrites the logits it is given, so it takes them straight from a head, and
its backward overwrites them again: autograd refuses a second one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def row_nll_ref(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (..., V), targets (...) -> nll (...) and the likeliest class (...)"""
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    return nll, logits.detach().argmax(-1)


class RowNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach()
        largest, top = logits.max(-1, keepdim=True)
        chosen = logits.gather(-1, targets[..., None])
        powers = logits.sub_(largest).exp_()
        total = powers.sum(-1, keepdim=True)
        ctx.save_for_backward(powers, total, targets)
        ctx.mark_non_differentiable(top)
        return (total.log() + largest - chosen).squeeze(-1), top.squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        powers, total, targets = ctx.saved_tensors
        powers.mul_(grad[..., None] / total)
        return powers.scatter_add_(-1, targets[..., None], -grad[..., None]), None


def row_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`row_nll_ref`, in place where the logits are fp32 on their own: they hold nothing of use afterwards."""
    return RowNll.apply(logits, targets)
