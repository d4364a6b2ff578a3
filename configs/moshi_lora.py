"""Moshi 7B with LoRA on stereo dialogues: what kyutai's moshi-finetune does.

    torchrun --standalone --nproc_per_node=8 train.py configs/moshi_lora.py --data.sources=data/dailytalk.jsonl
    python train.py configs/moshi_lora.py --smoke      a tiny twin on bundled speech: CPU, a minute
    python sample.py --ckpt out/moshi_lora --user in.wav --out reply.wav
    python checkpoint.py export out/moshi_lora --to=moshi-lora --out=lora
    python -m moshi.server --lora-weight lora/lora.safetensors --config-path lora/config.json

Needs 20.4 GiB with a row a step (13.6 with --quantize=int8; `--plan` counts what you ask for).  Expect first losses far below a random
guess: ln 32,000 = 10.4 for text, ln 2048 = 7.6 for codes.  About 20 hours teach a style in a language that it speaks, half an hour to
5 hours a voice; another language took J-Moshi 69,000 hours, then 344 of dialogue.  The agent is the left channel, the user the right one.

    python train.py configs/moshi_lora.py --from=moshi_7B.yaml      or all of this from moshi-finetune's own YAML

    moshi-finetune                                          here
    data.train_data, eval_data                              `data.sources`, `data.held_out` (by file)
    data.shuffle                                            always; `data.seed`
    run_dir, overwrite_run_dir                              `out`, `resume`
    moshi_paths.hf_repo_id, moshi_path, config_path         `init`
    moshi_paths.mimi_path, tokenizer_path                   `data.codec`, `data.tokenizer`
    duration_sec                                            `data.chunk_seconds`, `data.columns`
    first_codebook_weight_multiplier                        `data.stream_weights`
    text_padding_weight                                     `data.text_padding_weight`
    optim.lr, weight_decay                                  `lr`, `weight_decay`
    optim.pct_start                                         `warmup` = pct_start * `steps`
    seed, num_microbatches, batch_size                      `seed`, `accum`, `batch_size`
    max_norm, max_steps                                     `clip`, `steps`
    log_freq, ckpt_freq, num_ckpt_keep                      `log_every`, `save_every`, `keep`
    eval_freq, do_eval                                      `eval_every`, `eval_batches`
    do_ckpt, save_adapters                                  always; `consolidated` = moshi-lora or moshi
    gradient_checkpointing, param_dtype                     `model.checkpoint`, `dtype`
    lora.enable, rank, scaling                              `lora.rank`, `lora.alpha` = scaling * rank
    lora.ft_embed                                           `lora.train` = embed.*, depth.text, depth.audio
    full_finetuning                                         configs/moshi_full.py; `shard` (FSDP2)
    wandb.project, offline, key, run_name                   `trackers`, and wandb's own variables

Their faults are options: cycle_momentum swings beta1, data.interleaver = reference loses words. Parts have rates of their own, in
moshi_full --rates="(('depth',0.3),('embed',0))", and 0 freezes. `sample.py --prompt two.wav --seconds 20` goes on with a stereo
dialogue (both sides after `checkpoint.py expand-depth`), --condition=description=good --cfg=3 steers Hibiki, and `evaluate.py FOLDER`
tells reply latency, overlap and PAD ratio of what was spoken.
"""

from dataclasses import replace
from pathlib import Path

from config import TrainConfig
from corpus.bundled import demo_dialogues
from corpus.data_config import DataConfig
from families.moshi import MOSHI_7B
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from streams import Stream, StreamTable, codebooks

BASE = "kyutai/moshiko-pytorch-bf16"                        # weights, Mimi and tokenizer: one folder or hub id
WEIGHTS = (1.0, 100.0, *[1.0] * 7, *[0.0] * 8)              # text, semantic codebook, acoustic ones; the user is only read

config = TrainConfig(
    model=replace(MOSHI_7B, checkpoint=4), init=BASE,
    lora=LoraConfig(rank=128, alpha=256.0, targets=("temporal.*", "text_head", "depth.*")),
    data=DataConfig(sources=("data/dailytalk.jsonl",), codec=BASE, tokenizer=BASE, max_seconds=4 * 3600.0, chunk_seconds=100.0,
                    columns=1251, window=64, stream_weights=WEIGHTS),
    out="out/moshi_lora", steps=2000, batch_size=16, lr=2e-6, schedule="onecycle", warmup=100, betas=(0.9, 0.95), weight_decay=0.1,
    clip=1.0, dtype="bf16", log_every=1, save_every=100, eval_every=100, eval_batches=40, keep=3)

DELAYS = (0, *[1] * 7)
table = StreamTable((Stream("text", "text", 1025, 1024, start=1024), *codebooks(8, 257, 256, 256, delays=DELAYS),
                     *codebooks(8, 257, 0, 256, delays=DELAYS, name="user")), "duplex", aligned=True)


def smoke() -> TrainConfig:
    folder = Path(demo_dialogues("out/cache/dialogues")).parent     # made of the bundled clips when it is not there
    return replace(
        config, init="", out="out/smoke_moshi_lora",
        model=ModelConfig(
            table, StackConfig(dim=64, layers=2, heads=4, ffn=176, norm_eps=1e-8, rope_interleaved=True, window=200, packed=True),
            depth=StackConfig(dim=32, layers=2, heads=4, ffn=88, norm_eps=1e-8, rope_theta=0.0, packed=True, steps=8)),
        lora=replace(config.lora, rank=8, alpha=16.0),
        data=replace(config.data, sources=(f"{folder}/dialogues.jsonl",), cache="out/cache", codec="tiny", tokenizer=f"{folder}/words.json",
                     normaliser="english-v1", chunk_seconds=3.0, columns=128, held_out=0.2, window=8),
        steps=12, batch_size=2, lr=2e-3, warmup=2, dtype="fp32", save_every=6, eval_every=6, eval_batches=2,
        prompts=(f"{folder}/001.wav",))
