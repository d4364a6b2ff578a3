"""Which implementation an op runs: KERNELS=auto|ref|triton, read once.

    auto     Triton for CUDA tensors, otherwise the reference; under torch.compile the reference, which the compiler fuses
    ref      the reference everywhere
    triton   Triton everywhere; on a CPU only where TRITON_INTERPRET=1 had Triton interpreted before its import

A requested implementation that is missing is an error. Kernels accumulate in fp32 for every dtype. Two rules hold in all of
them: row numbers are int64 before they are multiplied, and matrix products go through `dot`. Next: rms_norm.py, a short op.
"""

import os
import warnings
from contextlib import nullcontext, suppress
from functools import cache, lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

MODE = os.environ.get("KERNELS", "auto")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
triton, tl = None, SimpleNamespace(constexpr=lambda value: value)
if torch.backends.cuda.is_built() or MODE == "triton" or INTERPRET:        # elsewhere no kernel runs, and the import takes long
    with suppress(ImportError):         # everything still runs, with the references
        import triton
        import triton.language as tl

INTERPRETED = tl.constexpr(INTERPRET)
HALF_DTYPES = (torch.bfloat16, torch.float16)


class Kernel(object if triton is None else triton.JITFunction):
    """A kernel that runs on the device of its first tensor; plain Triton uses the current device."""

    def run(self, *args, **named):
        with torch.cuda.device_of(args[0]) if args[0].is_cuda else nullcontext():
            return super().run(*args, **named)


def jit(function):
    """`triton.jit`; without Triton the function unchanged, which is then never called."""
    return function if triton is None else triton.jit(function) if INTERPRET else Kernel(function)


@jit
def dot(a, b):
    """a @ b in the type of a, accumulated in fp32. In the interpreter both are fp32, because it misreads bf16."""
    if INTERPRETED:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        out = tl.dot(a, b.to(a.dtype), input_precision="ieee")
    return out


def use_triton(x: Tensor) -> bool:
    """Whether an op with input x runs its Triton kernel. ValueError when KERNELS asks for one that cannot run."""
    if MODE == "auto" and not x.is_cuda or MODE == "ref":
        return False
    if MODE not in ("auto", "triton"):
        raise ValueError(f"KERNELS={MODE} is unknown; set auto, ref or triton, or unset it")
    if x.is_cuda and INTERPRET:
        raise ValueError("TRITON_INTERPRET=1 with tensors on CUDA: the interpreter computes on the CPU; unset it, or use --device=cpu")
    if MODE == "auto":
        return x.dtype != torch.float64 and not torch.compiler.is_compiling() and installed()
    if triton is None:
        raise ValueError("KERNELS=triton: Triton is not installed; pip install triton, or use KERNELS=auto")
    if not x.is_cuda and not INTERPRET:
        raise ValueError("KERNELS=triton: tensors are on the CPU; use a CUDA device, KERNELS=auto, or TRITON_INTERPRET=1 to interpret")
    return True


def trains_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether an op takes its way of fewer operations of torch: in fp32 on a CPU, with a gradient."""
    given, usual = [t for t in tensors if t is not None], MODE == "auto" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return usual and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given) and any(t.requires_grad for t in given)


def has_bf16(device: str) -> bool:
    """Whether a "cpu" or "cuda" device multiplies in bf16. A CPU that ATEN_CPU_CAPABILITY restricts has what that leaves."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16")) and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def slow_dtype(dtype: torch.dtype, device: str) -> str:
    """What to say of a type that the device does not compute in; empty where it does."""
    if dtype != torch.bfloat16 or has_bf16(device):
        return ""
    where = "this CPU has neither AVX-512 BF16 nor AMX" if device == "cpu" else "this GPU has no bf16"
    return f"warning: --dtype=bf16, but {where}: bf16 is emulated and can be ten times slower than fp32; use --dtype=fp32"


@lru_cache(maxsize=1)
def installed() -> bool:
    if triton is None:
        warnings.warn("Triton is not installed: CUDA tensors use the slower PyTorch references; pip install triton", stacklevel=2)
    return triton is not None


@cache         # a captured CUDA graph keeps reading the same memory
@torch.inference_mode(False)
def device_constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers of the host as an int64 tensor on a device, copied once: a copy waits for the device.   -> (n,)"""
    return torch.tensor(values, dtype=torch.int64, device=device)


def at_least_fp32(x: Tensor) -> Tensor:
    """x as fp32 if it is fp16 or bf16; wider dtypes are unchanged."""
    return x.float() if x.dtype in HALF_DTYPES else x


def power_of_2(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two >= n, clamped to `least`..`most`: block sizes and warp counts."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))
