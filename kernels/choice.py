"""How an op is computed: KERNELS=auto|ref|triton, read once.

    auto     Triton for CUDA tensors, otherwise the reference; under torch.compile the reference, which the compiler fuses
    ref      the reference everywhere
    triton   Triton everywhere; on a CPU only where TRITON_INTERPRET=1 had Triton interpreted before its import

What is asked for and missing is an error. Kernels keep sums in fp32 whatever the tensors are. Two rules hold in all of
them: row numbers are int64 before they are multiplied, and matrix products go through `dot`.
"""

import os
import warnings
from contextlib import nullcontext
from functools import cache, lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:                     # everything still runs, by the references
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

MODE = os.environ.get("KERNELS", "auto")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
IN_NUMPY = tl.constexpr(INTERPRET)
HALVES = (torch.bfloat16, torch.float16)


class Kernel(object if triton is None else triton.JITFunction):
    """A kernel that runs where its first tensor is; Triton by itself would take the device that happens to be the current one."""

    def run(self, *args, **named):
        with torch.cuda.device_of(args[0]) if args[0].is_cuda else nullcontext():
            return super().run(*args, **named)


def jit(function):
    """`triton.jit`, or the function as it is where Triton is missing: it is never called then."""
    return function if triton is None else triton.jit(function) if INTERPRET else Kernel(function)


@jit
def dot(a, b):
    """a @ b in the type of a, summed in fp32. The interpreter would calculate with the bit patterns of bf16: fp32 there."""
    if IN_NUMPY:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        out = tl.dot(a, b.to(a.dtype), input_precision="ieee")
    return out


def fused(x: Tensor) -> bool:
    """Whether the op that reads x runs its Triton kernel. ValueError where KERNELS wants what is not there."""
    if MODE == "auto" and not x.is_cuda or MODE == "ref":
        return False
    if MODE not in ("auto", "triton"):
        raise ValueError(f"KERNELS={MODE} is none of auto, ref, triton; unset it or choose one of them")
    if x.is_cuda and INTERPRET:
        raise ValueError("TRITON_INTERPRET=1 with tensors on CUDA: the interpreter computes on the CPU; unset it, or use --device=cpu")
    if MODE == "auto":
        return x.dtype != torch.float64 and not torch.compiler.is_compiling() and installed()
    if triton is None:
        raise ValueError("KERNELS=triton: Triton is not installed; pip install triton, or use KERNELS=auto")
    if not x.is_cuda and not INTERPRET:
        raise ValueError("KERNELS=triton: tensors are on the CPU; use a CUDA device, KERNELS=auto, or TRITON_INTERPRET=1 to interpret")
    return True


@lru_cache(maxsize=1)
def installed() -> bool:
    if triton is None:
        warnings.warn("Triton is not installed: CUDA tensors go through the slower references; pip install triton", stacklevel=2)
    return triton is not None


@cache         # a captured graph reads them where they lie
@torch.inference_mode(False)
def numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A few numbers of the host as a tensor, sent once: sending waits for the device."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def full(x: Tensor) -> Tensor:
    """Half precision becomes fp32, what is wider stays."""
    return x.float() if x.dtype in HALVES else x


def power(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two that holds n, between `least` and `most`."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))
