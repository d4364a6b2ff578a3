"""One op a file: its equation, `op_ref` in PyTorch, which is the definition, Triton forward and backward, and `op`.

Model code calls `op`; KERNELS=auto|ref|triton selects the implementation (choice.py). `PAIRS` lists every op with its
reference. Read it when you measure or port an op; choice.py and attention.py come first.
"""

from kernels import cross_entropy, decode_attention, depth_attention, embed_sum, int8, lora_linear, rms_norm, rope, route, sample, swiglu
from kernels.choice import INTERPRET, MODE

__all__ = ["INTERPRET", "MODE", "PAIRS"]

PAIRS = {
    "multistream_ce": (cross_entropy.multistream_ce, cross_entropy.multistream_ce_ref),
    "lora_linear": (lora_linear.lora_linear, lora_linear.lora_linear_ref),
    "rms_norm": (rms_norm.rms_norm, rms_norm.rms_norm_ref),
    "rope": (rope.rope, rope.rope_ref),
    "swiglu": (swiglu.swiglu, swiglu.swiglu_ref),
    "embed_sum": (embed_sum.embed_sum, embed_sum.embed_sum_ref),
    "depth_attention": (depth_attention.depth_attention, depth_attention.depth_attention_ref),
    "decode_attention": (decode_attention.decode_attention, decode_attention.decode_attention_ref),
    "sample": (sample.sample, sample.sample_ref),
    "int8_linear": (int8.int8_linear, int8.int8_linear_ref),
    "route": (route.route, route.route_ref),
}
