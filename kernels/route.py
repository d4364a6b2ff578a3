"""Permute rows, and back: text columns first, then audio columns.

    y[i] = x[order[i]]      dx[j] = dy[back[j]]      back is the inverse of order

The order is made once a batch; two networks then read two slices. The backward of a plain gather uses atomics; for a
permutation it is a gather as well. Next: recompute.py.
"""

import torch
from torch import Tensor


class Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.index_select(0, ctx.saved_tensors[0]), None, None


def route_ref(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x (N, D), order and its inverse (N,) -> (N, D)"""
    return x[order]


def route(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """`route_ref`"""
    return Route.apply(x, order, back)
