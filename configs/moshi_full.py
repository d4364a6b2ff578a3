"""Moshi 7B, every weight: moshi-finetune with full_finetuning. Fields as in moshi_lora.py.

    torchrun --standalone --nproc_per_node=8 train.py configs/moshi_full.py --data.sources=data/dailytalk.jsonl
    python train.py configs/moshi_full.py --smoke      a tiny twin on bundled speech: CPU, a minute
    python checkpoint.py export out/moshi_full --to=moshi --out=merged
    python -m moshi.server --moshi-weight merged/model.safetensors --config-path merged/config.json

Needs: not yet measured; weights, gradients and AdamW in fp32 are 123 GB before activations, shared out over the ranks
(FSDP2).  Expect: not yet measured.
"""

from dataclasses import replace
from pathlib import Path

from config import TrainConfig
from options import run_config

beside = Path(__file__).with_name("moshi_lora.py")
config = replace(run_config(beside), lora=None, shard=True, out="out/moshi_full")


def smoke() -> TrainConfig:
    return replace(run_config(beside, "smoke"), lora=None, shard=True, out="out/smoke_moshi_full")
