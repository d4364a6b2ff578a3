"""Compile every kernel for a GPU that need not be there:  python tests/compile_kernels.py [op ...]

The interpreter runs kernels as numpy programs and accepts what a compiler refuses. Here the ops are called on the cases of
test_kernels.py with launches replaced by compilation for compute capability 9.0, numbers that are 1 compiled in as a launch
does; one line for each variant.
"""

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["KERNELS"] = "triton"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "kernels"), str(HERE.parent)]

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kernels import PAIRS, choice  # noqa: E402

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8"}
seen = set()


def launch(self: JITFunction, *args: object, grid: tuple, warmup: bool, num_warps: int = 4, **named: object) -> None:
    values = dict(zip(self.arg_names, args, strict=False)) | named
    constants = {p.name: values[p.name] for p in self.params if p.is_constexpr or type(values[p.name]) is int and values[p.name] == 1}
    kinds = {name: "constexpr" if name in constants else TYPES[v.dtype] if isinstance(v, torch.Tensor) else
             "fp32" if isinstance(v, float) else "i32" for name, v in values.items()}
    key = (self.__module__, self.__name__, *kinds.items(), *constants.items(), num_warps)
    if key not in seen:
        made = compile(ASTSource(self, kinds, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        print(f"{self.__module__}.{self.__name__} {constants}: {made.metadata.shared} bytes shared", flush=True)
        seen.add(key)


JITFunction.run = launch
choice.INTERPRET = True                # the ops take CPU tensors; nothing is launched

import test_kernels  # noqa: E402

for name in sys.argv[1:] or PAIRS:
    if name == "sample":
        PAIRS[name][0](*test_kernels.sample_inputs(2048, 3))
    else:
        for made in test_kernels.CASES[name]:
            test_kernels.results(PAIRS[name][0], made(test_kernels.Made(0, torch.bfloat16, "cpu")), None)
print(f"{len(seen)} compiled")
