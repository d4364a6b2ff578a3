"""A frozen base of 8 bits: the Linears of a model that can be held so, and their weights again in fp32.

A Linear here is a module with a `weight` (..., out, in), a `row_scale` (..., out) or None, and an `adapter` slot. Formats: kernels/int8.py.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from kernels.int8 import dequantize_rows, quantize_rows


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that can carry an adapter, by path."""
    return {path: m for path, m in model.named_modules() if hasattr(m, "adapter") and hasattr(m, "weight")}


@torch.no_grad()
def quantize(model: nn.Module) -> nn.Module:
    """Hold the frozen Linears in int8 and a scale a row; returns the model. Adapters on them train as before.

    A weight that something else reads too (a tied embedding) stays. ValueError when nothing is frozen.
    """
    for module in quantizable(model, {n for n, p in model.named_parameters() if p.requires_grad}).values():
        q, module.row_scale = quantize_rows(module.weight)
        module.weight = nn.Parameter(q, requires_grad=False)
    return model


def quantizable(model: nn.Module, trained: Collection[str]) -> dict[str, nn.Module]:
    """The Linears that 8 bits can hold, by path: frozen, and nothing else reads their weight. ValueError when there is none."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    frozen = {path: m for path, m in linears(model).items()
              if f"{path}.weight" not in trained and m.weight.is_floating_point() and owners[id(m.weight)] == 1}
    if not frozen:
        raise ValueError("8 bits are for Linears that are frozen, and here none is; add adapters (--lora.rank=16) or drop --quantize")
    return frozen


def dequantized(weight: Tensor, row_scale: Tensor | None) -> Tensor:
    """A weight in fp32."""
    return weight.detach().float() if row_scale is None else dequantize_rows(weight, row_scale)


def check_mergeable(path: str, module: nn.Module) -> None:
    if module.weight.dtype == torch.int8:
        raise ValueError(f"{path} holds 8 bits: nothing can be merged into them; load the model without --quantize and merge that")
