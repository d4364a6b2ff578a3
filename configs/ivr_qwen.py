"""Qwen2.5-1.5B on the phone: text replies of a call centre, learnt with LoRA.

    python train.py configs/ivr_qwen.py --data.sources=assets/ivr/dialogues.jsonl      one GPU; minutes
    python train.py configs/ivr_qwen.py --preset=seed                                  the recipe this one comes from, as it was
    python train.py configs/ivr_qwen.py --preset=second --data.sources=mine.jsonl      second stage, from the adapter of the first
    python train.py sweep configs/ivr_qwen.py                                          ranks 4 to 64, one table
    python evaluate.py report out/ivr_qwen                                             replies, intents, made-up figures, forgetting

    python train.py configs/ivr_qwen.py --preset=base      a tiny Qwen, trained here on general sentences in half a minute
    python train.py configs/ivr_qwen.py --smoke --init=out/smoke_ivr_base               and the recipe on top of it

Needs the released model with its tokenizer.json in models/ (huggingface-cli download Qwen/Qwen2.5-1.5B-Instruct --local-dir
models/Qwen2.5-1.5B-Instruct). Any size is a change of two lines: families/qwen.py has 0.5B to 8B. r = 8 on q, k, v, o trains
2,179,072 parameters; the seed recipe states 3,670,016, which assumes four square projections of width 2048.
The bundled dialogues (58 families of calls) only teach style. Needs 3.1 GiB (`--plan`). Expect a first loss far below ln 151,936 = 11.9.
"""

from dataclasses import replace

from config import TrainConfig
from corpus.data_config import DataConfig
from families.family import with_tokenizer_ids
from families.qwen import QWEN2_5_1_5B
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from loss import LossConfig
from streams import Stream, StreamTable
from text.tokenizers import load_tokenizer

BASE = "models/Qwen2.5-1.5B-Instruct"                       # seed: the plain 1.5B, which does not know how to end a turn
TINY = "assets/tiny_qwen_tokenizer.json"
ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")

config = TrainConfig(
    model=replace(QWEN2_5_1_5B, checkpoint=4), init=BASE,
    lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05, targets=ATTENTION),        # as the seed; dropout is on the input of A
    loss=LossConfig(groups="all"),                          # the mean over all target tokens of a step, whatever their row
    data=DataConfig(sources=("assets/ivr/dialogues.jsonl",), tokenizer=BASE, split="manifest", columns=1024),
    out="out/ivr_qwen", epochs=3, steps=500,                # seed: 500 steps of 16 calls, 110 passes over its 65 lines
    batch_size=1, accum=2,                                  # rows of 1024 columns hold about ten calls; seed: 16 rows padded to the longest
    lr=2e-4, schedule="linear", warmup=5, warmup_offset=1,  # seed: 2e-5, which is low for adapters, and a first update of rate 0
    betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=1.0,                    # seed says 0.01; what it runs has 0.0
    dtype="auto", seed=42,                                  # bf16 where there is, else fp32; seed: fp16, --dtype=fp16 scales its loss too
    eval_every=10, patience=3, save_every=10, keep=2, log_every=1)               # seed: none; the best by held-out loss is kept

seed = replace(config, out="out/ivr_seed", epochs=0, steps=500, batch_size=16, accum=1, data=replace(config.data, columns=512, window=16),
               lr=2e-5, warmup=50, warmup_offset=0, weight_decay=0.01, dtype="fp16", eval_every=50, patience=0, save_every=50, log_every=10)
# seed: 5 epochs and max_steps 200, of which the trainer obeys the second: 49 passes over 65 lines. Here what ends first.
second = replace(config, init_adapter="out/ivr_qwen", out="out/ivr_second", epochs=5, steps=200, lr=1e-4)

table = with_tokenizer_ids(StreamTable((Stream("text", "text", 544, 544),), "qwen2", stop=(0, 0)), load_tokenizer(TINY))
tiny = ModelConfig(
    table, StackConfig(dim=96, layers=2, heads=6, kv_heads=2, ffn=192, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True), tied=True)
smoke = replace(
    config, model=tiny, init="", out="out/smoke_ivr_qwen", epochs=0, steps=40, batch_size=2, accum=1, lr=5e-3, warmup=4,
    lora=replace(config.lora, rank=8, targets=(*ATTENTION, "ffn.*")), data=replace(config.data, tokenizer=TINY, columns=768),
    eval_every=20, patience=0, save_every=20, dtype="fp32")
# The transcripts of the bundled recordings are read as text.
base = replace(
    smoke, model=replace(tiny, dropout=0.1), lora=None, out="out/smoke_ivr_base", steps=50, batch_size=4, lr=3e-3, warmup=10,
    schedule="cosine", eval_every=25, save_every=0,
    data=replace(smoke.data, sources=("assets/ivr/generic.jsonl:1", "assets/speech/manifest.jsonl:2"), columns=256))

sweep = tuple({"lora.rank": rank, "lora.alpha": 2.0 * rank} for rank in (4, 8, 16, 32, 64))      # run by train.py sweep
