"""Higgs Audio v2 3B, all weights.

    torchrun --standalone --nproc_per_node=8 train.py configs/higgs_full.py --data.sources=data/speech.jsonl
    python train.py configs/higgs_full.py --smoke

Needs 101.8 GiB on each rank (`--plan`): fp32 weights, gradients and both AdamW moments of 5.77 billion parameters; --shard=true shares
them out. Expect first losses as in higgs_ar.py.
"""

from dataclasses import replace
from pathlib import Path

from options import run_config

ar, tiny = (run_config(Path(__file__).with_name("higgs_ar.py"), name) for name in ("config", "smoke"))

# A tenth of the adapters' rate: every weight moves. More data before the held-out loss turns, so a longer run.
config = replace(ar, lora=None, lr=2e-5, warmup=500, steps=20000, out="out/higgs_full", accum=4, keep=2)
smoke = replace(tiny, lora=None, lr=1e-3, out="out/smoke_higgs_full")
