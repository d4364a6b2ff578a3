"""Recompute cheap outputs in the backward instead of keeping them.

    with Recompute():
        y = recomputed(swiglu, gate, up)       # its inputs are kept anyway; y and what swiglu would keep are not
        z = down(y)                            # the backward of `down` recomputes y

A checkpoint (torch.utils.checkpoint) drops what a function saves inside, but not its output, which the next Linear saves.
Here that saved tensor is recognised by its address and replaced by the function that recomputes it. Next: lora_linear.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCOPES: list["Recompute"] = []


class Recompute(torch.autograd.graph.saved_tensors_hooks):
    """While active, the results of `recomputed` are saved as recipes, not tensors; inactive it changes nothing."""

    def __init__(self, active: bool = True) -> None:
        super().__init__(self.pack, self.unpack)
        self.active, self.recipes = active, {}

    def __enter__(self) -> None:
        if self.active:
            SCOPES.append(self)
            super().__enter__()

    def __exit__(self, *error: object) -> None:
        if self.active:
            super().__exit__(*error)
            SCOPES.pop().recipes.clear()                     # outputs live until here: no other tensor takes their place

    def pack(self, t: Tensor) -> Any:
        recipe = self.recipes.get(t.data_ptr())
        same = recipe is not None and 0 < t.numel() == recipe[0].numel() and t.is_contiguous()       # empty tensors share an address
        return (*recipe[1:], t.shape) if same else t

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        function, args, shape = kept
        with torch.no_grad():
            return function(*args).view(shape)


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), contiguous and in the type that the Linear behind it computes in; within `Recompute` it is made twice."""
    if not SCOPES or not torch.is_grad_enabled() or torch.compiler.is_compiling():      # a compiler decides by itself
        return function(*args)
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def make(*args: Any) -> Tensor:
        y = function(*args)
        return (y if dtype is None else y.to(dtype)).contiguous()

    y = checkpoint(make, *args, use_reentrant=False)
    SCOPES[-1].recipes[y.data_ptr()] = (y, make, [a.detach() if isinstance(a, Tensor) else a for a in args])
    return y
