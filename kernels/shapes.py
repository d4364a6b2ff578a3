"""Inputs of every op of kernels/ at the shapes that Moshi and Higgs give it, and a function that runs one.

    python bench.py kernels      on CUDA each op against torch.compile of its reference; elsewhere only what runs there

`rows` scales everything that counts columns, so that a CPU finishes in seconds. Next: bench.py.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.int8 import quantize_rows

Case = tuple[tuple, dict[str, Any]]


def cases(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> dict[str, Case]:
    """Arguments and keywords of each op in PAIRS.   `width` D of the temporal transformer; depth: D / 4, 8 steps of 2,048 codes"""
    g = torch.Generator(device).manual_seed(0)
    D, d, head, heads, ffn, low = width, width // 4, 64, width // 64, 11 * width // 4, 16

    def made(*shape: int, grad: bool = True, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g, device=device)).to(dtype).requires_grad_(grad)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g, device=device)

    weight, heads_weight = made(ffn, D, grad=False, scale=D**-0.5), made(8, 2048, D, grad=False, scale=D**-0.5)
    offsets, angles = [2048 * k for k in range(17)], torch.rand(1, 1, rows, head // 2, device=device)
    store, order = made(2, 1, heads, 3000, head, grad=False), torch.randperm(rows, generator=g, device=device)
    rules = [torch.full((9,), value, device=device) for value in (0.8, 250, 0.95, 0.0)]
    packed = made(8, rows, 3 * d).split(d, -1)
    return {
        "multistream_ce": ((made(rows, D), heads_weight, ids(2048, rows, 8), torch.rand(rows, 8, device=device)), {}),
        "lora_linear": ((made(rows, D), weight, made(low, D), made(ffn, low), 2.0), {}),
        "rms_norm": ((made(rows, D), made(D), 1e-5), {"residual": made(rows, D)}),
        "rope": ((made(1, rows, heads, head).transpose(1, 2), (angles.cos(), angles.sin()), True), {}),
        "swiglu": ((made(rows, 2 * ffn),), {"activation": "silu"}),
        "embed_sum": ((ids(2048, 1, 17, rows), made(17 * 2048, D), offsets), {}),
        "depth_attention": (tuple(x.unflatten(-1, (-1, 16)) for x in packed), {}),
        "decode_attention": ((made(1, heads, head, grad=False), *store, torch.tensor([750], device=device)), {"window": 3000}),
        "sample": ((made(9, 2048, grad=False).float(), *rules, ids(1 << 30, 9), torch.zeros((), dtype=torch.long, device=device)), {}),
        "int8_linear": ((made(1, D, grad=False), *quantize_rows(weight)), {}),
        "route": ((made(rows, D), order, order.argsort()), {}),
    }


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def results(op: Callable[..., Any], case: Case) -> list[Tensor]:
    """The outputs of an op, of several the first, and its gradients if an input requires one."""
    args, named = case
    leaves = [t for t in tensors([*args, *named.values()]) if t.requires_grad]
    out = op(*args, **named)
    wanted = [t for t in tensors(out) if t.requires_grad]
    total = out.total if getattr(out, "total", None) is not None else sum(t.float().sum() for t in wanted) if wanted else None
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if total is not None else ()
    return [t.detach() for t in (*tensors(out)[:1], *grads) if t is not None]


def op_side(op: Callable[..., Any], case: Case) -> Callable[[], Tensor]:
    """Forward, and backward if an input requires a gradient. Returns outputs and gradients as one vector."""
    return lambda: torch.cat([t.flatten().float() for t in results(op, case)])


def exact(value: Any) -> Any:
    """Inputs in fp64, as leaves of their own where they require a gradient."""
    if isinstance(value, (list, tuple, dict)):
        return {k: exact(v) for k, v in value.items()} if isinstance(value, dict) else type(value)(exact(v) for v in value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def error_share(op: Callable[..., Any], ref: Callable[..., Any], case: Case) -> float:
    """The largest error of an op's outputs and gradients against its reference in fp64, as a share of what is allowed: twice the error
    of the reference in the type of the inputs, and a rounding. Ids must be those of the reference: 0, else infinite."""
    share, kind = 0.0, next(t.dtype for t in tensors([*case[0], *case[1].values()]) if t.is_floating_point())
    for ours, same, truth in zip(results(op, case), results(ref, case), results(ref, exact(case)), strict=True):
        if not ours.is_floating_point():
            share = max(share, 0.0 if torch.equal(ours, same) else math.inf)
            continue
        found, allowed = (float((t.double() - truth).abs().max()) for t in (ours, same))
        share = max(share, found / (2 * allowed + 4 * torch.finfo(kind).eps * float(truth.abs().max()) + 1e-7))
    return share


def moved(case: Case, result: Tensor) -> int:
    """Minimum bytes of memory traffic: every input read once, every result written once in the same dtype."""
    inputs = tensors([*case[0], *case[1].values()])
    size = next(t.element_size() for t in inputs if t.is_floating_point())
    return sum(t.numel() * t.element_size() for t in inputs) + result.numel() * size
