"""Moshi 7B, every weight: moshi-finetune with full_finetuning. Fields as in moshi_lora.py.

    torchrun --standalone --nproc_per_node=8 train.py configs/moshi_full.py --data.sources=data/dailytalk.jsonl
    python train.py configs/moshi_full.py --smoke      a tiny twin on bundled speech: CPU, a minute
    python checkpoint.py export out/moshi_full --to=moshi --out=merged
    python -m moshi.server --moshi-weight merged/model.safetensors --config-path merged/config.json

To predict the user's codebooks as well, and use both speakers as the agent, as J-Moshi does:

    python checkpoint.py expand-depth kyutai/moshiko-pytorch-bf16 --out=models/moshiko-both
    torchrun --standalone --nproc_per_node=8 train.py configs/moshi_full.py --preset=both
    python checkpoint.py trim-depth out/moshi_both --out=models/trained       what moshi.server can play

Needs 114.6 GiB in all with a row a step, 20.7 on each of 8 ranks with its 16 (`--plan`).  Expect first losses as in moshi_lora.py;
another language took 69,000 hours, then 344 of dialogue (J-Moshi).
"""

from dataclasses import replace
from pathlib import Path

from config import TrainConfig
from families.moshi import predict_user
from options import run_config

beside = Path(__file__).with_name("moshi_lora.py")
config = replace(run_config(beside), lora=None, shard=True, out="out/moshi_full")
WEIGHTS = (1.0, *2 * (100.0, *[1.0] * 7))                   # text, the semantic and the acoustic codebooks of both


def of_both(one: TrainConfig, init: str, out: str) -> TrainConfig:
    return replace(one, model=predict_user(one.model), init=init, out=out, prompts=(),
                   data=replace(one.data, both_speakers=True, stream_weights=WEIGHTS))


both = of_both(config, "models/moshiko-both", "out/moshi_both")


def smoke() -> TrainConfig:
    return replace(run_config(beside, "smoke"), lora=None, shard=True, out="out/smoke_moshi_full")


def smoke_both() -> TrainConfig:
    return of_both(smoke(), "", "out/smoke_moshi_both")
