"""DSAA: a frozen Qwen text model beside a frozen Moshi; the projectors between them are trained, first on text, then on both.

    python checkpoint.py setup-dsaa --moshi=kyutai/moshiko-pytorch-bf16 --text-llm=Qwen/Qwen2.5-3B-Instruct --out=models/dsaa
    torchrun --standalone --nproc_per_node=8 train.py configs/dsaa.py --data.sources=data/dailytalk.jsonl
    python train.py configs/dsaa.py --smoke        both towers tiny and random, on bundled speech: CPU, a minute
    python sample.py --ckpt out/dsaa --user in.wav --out reply.wav
    python checkpoint.py export out/dsaa --to=dsaa --out=official

Needs 55.2 GiB with a row a step, 25.9 on each of 8 GPUs with --shard=true, which leaves the text model whole (`--plan`).
Expect a first text loss far below ln 151,936 = 11.9.

    reference (slavivo/dsaa)            here, and why it differs
    optim.proj_lr 1e-4, finetune_lr 5e-6   lr, and factors of it in rates. There a missing comma left the depth layers and the
                                        text map out of both groups; here a pattern that matches nothing is an error
    proj_wd .05, finetune_wd .01        weight_decay .05, on matrices only (there on norms, biases and the mixing factor too)
    only_text, max_steps [..]           stages: how long, which sources, which losses count
    every 4th step text only            no: the two losses train separate parameters, so this only changes the gradient clipping
    PAD = EPAD = the id of a space      ids of their own (setup-dsaa --padding=space for theirs); start <|im_start|>
    words one by one, no space before   data.contextual: whole sentences, as in the text model's training data
    random depth projectors             initialised to pass on Moshi's depth inputs (warm start), with separate norms
    data.aug.*                          data.variants and data.augment, when the data is prepared; masks hide inputs only, not
                                        targets: model.input_drop (audio), model.text_drop

The text model never reads the user's audio: the two models are only connected by the projectors after their last layers.
"""

from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import convert, load, save
from config import Stage, TrainConfig
from corpus.bundled import demo_dialogues
from corpus.data_config import DataConfig
from families.dsaa import design
from families.moshi import MOSHI_7B
from families.qwen import QWEN2_5_3B
from layers.architecture import FusionConfig, ModelConfig, StackConfig
from model import MultistreamLM
from streams import Stream, StreamTable, codebooks

WEIGHTS = (1.0, 100.0, *[1.0] * 7, *[0.0] * 8)              # text, semantic codebook, acoustic ones; the user is only read
RATES = (("temporal.*", 0.0), ("embed.*", 0.0), ("text_projector", 1.0), ("depth.input", 1.0), ("text_head", 0.05), ("depth.*", 0.05))

config = TrainConfig(
    model=design(MOSHI_7B, FusionConfig(QWEN2_5_3B, "Qwen/Qwen2.5-3B-Instruct", split_norm=True), 151644, 151934, 151935),
    init="models/dsaa",
    data=DataConfig(sources=("data/dailytalk.jsonl",), codec="kyutai/moshiko-pytorch-bf16",
                    tokenizer="models/dsaa/tokenizer.json", max_seconds=4 * 3600.0, chunk_seconds=180.0, columns=2251, window=64,
                    stream_weights=WEIGHTS, contextual=True),
    rates=RATES, stages=(Stage(400, audio=0.0),), out="out/dsaa", steps=1200, batch_size=8, lr=2e-4, schedule="onecycle", warmup=60,
    betas=(0.9, 0.95), weight_decay=0.05, clip=1.0, dtype="bf16", log_every=1, save_every=100, eval_every=100, eval_batches=50, keep=3)


def smoke() -> TrainConfig:
    """Random tiny models under out/cache/dsaa, combined by setup-dsaa; trained on text only, then on both."""
    folder, parts = demo_dialogues("out/cache/dialogues"), Path("out/cache/dsaa")
    if not (parts / "new" / "config.json").is_file():
        delays = (0, *[1] * 7)
        table = StreamTable((Stream("text", "text", 1025, 1024, start=1024), *codebooks(8, 257, 256, 256, delays=delays),
                             *codebooks(8, 257, 0, 256, delays=delays, name="user")), "duplex", aligned=True)
        ear = StackConfig(dim=48, layers=2, heads=4, ffn=132, norm_eps=1e-8, rope_interleaved=True, window=200, packed=True)
        moshi = ModelConfig(table, ear, StackConfig(dim=24, layers=2, heads=2, ffn=66, norm_eps=1e-8, rope_theta=0.0, packed=True, steps=8))
        text = ModelConfig(StreamTable((Stream("text", "text", 1026, 1026),), "text", stop=(1,)),
                           StackConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn=64, norm_eps=1e-6, qkv_bias=True), tied=True)
        torch.manual_seed(0)
        save(MultistreamLM(moshi), parts / "moshi")
        save(MultistreamLM(text), parts / "llm")
        convert("setup-dsaa", parts / "new", parts / "moshi", parts / "llm", hidden=48, split_norm=True)
    model, words = load(parts / "new").config, folder.replace("dialogues.jsonl", "words.json")
    return replace(
        config, init=str(parts / "new"), model=replace(model, fusion=replace(model.fusion, remember=64)), out="out/smoke_dsaa",
        data=replace(config.data, sources=(folder,), cache="out/cache", codec="tiny", tokenizer=words,
                     normaliser="english-v1", chunk_seconds=3.0, columns=128, held_out=0.2, window=8, contextual=False),
        stages=(Stage(4, audio=0.0),), steps=12, batch_size=2, lr=2e-3, warmup=2, dtype="fp32", save_every=6, eval_every=6, eval_batches=2)
