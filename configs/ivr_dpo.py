"""Preference tuning (DPO) of a phone model: professional replies are preferred to curt ones and to made-up figures.

    python checkpoint.py merge out/ivr_qwen --out=models/ivr_qwen      the initial model: out/ivr_qwen with its adapter merged
    python train.py configs/ivr_dpo.py                                 one GPU; minutes
    python train.py configs/ivr_dpo.py --data.sources=pairs.jsonl      {"messages": [...], "chosen": ..., "rejected": ...} a line
    python train.py configs/higgs_ar.py --dpo.beta=0.1 --data.sources=spoken_pairs.jsonl      any family that has adapters

    python train.py configs/ivr_qwen.py --preset=base      trains a tiny Qwen
    python train.py configs/ivr_dpo.py --smoke --init=out/smoke_ivr_base               trains it on preferences

The reference model is the same model with its adapters switched off, so --init must be a checkpoint without adapters. The
equation is in training/objective.py. metrics.jsonl has loss, reward margin and accuracy of training and held-out pairs. A side of
a pair can be text or a recording (corpus/manifest.py). For Moshi set the first codebook's weight to 1 (--data.stream_weights):
the margin sums over all streams.
"""

from dataclasses import replace
from pathlib import Path

from config import DpoConfig, TrainConfig
from corpus.data_config import DataConfig
from families.qwen import QWEN2_5_1_5B
from lora import LoraConfig
from options import run_config

BASE = "models/ivr_qwen"
ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")

config = TrainConfig(
    model=replace(QWEN2_5_1_5B, checkpoint=4), init=BASE,
    lora=LoraConfig(rank=8, alpha=16.0, targets=ATTENTION), dpo=DpoConfig(beta=0.1),      # no dropout: both models answer alike at first
    data=DataConfig(sources=("assets/ivr/preferences.jsonl",), tokenizer=BASE, split="manifest", columns=1024),
    out="out/ivr_dpo", epochs=1, steps=500, batch_size=1, accum=2,
    lr=5e-5, schedule="linear", warmup=5, warmup_offset=1, betas=(0.9, 0.999), weight_decay=0.0, clip=1.0,
    dtype="auto", seed=42, eval_every=10, patience=3, save_every=10, keep=2, log_every=1)

before = run_config(Path(__file__).with_name("ivr_qwen.py"), "smoke")       # the same tiny model
smoke = replace(
    config, model=before.model, init="", out="out/smoke_ivr_dpo", epochs=0, steps=20, batch_size=2, accum=1, lr=3e-3, warmup=2,
    lora=replace(config.lora, targets=(*ATTENTION, "ffn.*")), data=replace(config.data, tokenizer=before.data.tokenizer, columns=768),
    eval_every=10, patience=0, save_every=10, dtype="fp32")
