"""One op a file: its equation, `op_ref` in PyTorch, which is the definition, Triton forward and backward, and `op`.

Model code calls `op`; KERNELS=auto|ref|triton selects the implementation (choice.py). `PAIRS` lists every op with its
reference. Read it when you measure or port an op; choice.py and attention.py come first.
"""

from kernels import cross_entropy, decode_attention, depth_attention, embed_sum, int8, lora_linear, rms_norm, rope, route, sample, swiglu
from kernels.choice import INTERPRET, MODE

__all__ = ["INTERPRET", "MODE", "PAIRS"]

FILES = {"multistream_ce": cross_entropy, "lora_linear": lora_linear, "rms_norm": rms_norm, "rope": rope, "swiglu": swiglu,
         "embed_sum": embed_sum, "depth_attention": depth_attention, "decode_attention": decode_attention, "sample": sample,
         "int8_linear": int8, "route": route}                                           # by op
PAIRS = {op: (getattr(file, op), getattr(file, f"{op}_ref")) for op, file in FILES.items()}
