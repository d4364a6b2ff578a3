"""Higgs Audio v3 4B: speech in the voice of a recording, with LoRA; --lora=none trains all of it.

    torchrun --standalone --nproc_per_node=8 train.py configs/higgs_v3.py --data.sources=data/voice.jsonl
    python train.py configs/higgs_v3.py --smoke         a tiny twin on bundled speech: CPU, under a minute
    python sample.py --ckpt out/higgs_v3 --text "..." --ref voice.wav --ref-text "what it says" --out x.wav
    python checkpoint.py export out/higgs_v3 --to=hf --out=official      for sglang-omni and vllm-omni

Nobody has published a trainer: the loss is that of v2 (configs/higgs_ar.py), every codebook alike. Half of the examples have a
reference of the same speaker before them. Needs the released model (its licence forbids commercial use) and the tokenizer of v2;
--data.codec=THE MODEL'S FOLDER takes the copy of it that lies in the model's own file.
Needs 8.6 GiB (`--plan`). Expect a first audio loss far below a random guess, ln 1026 = 6.9.
"""

from dataclasses import replace

from config import TrainConfig
from corpus.data_config import DataConfig
from families.family import with_tokenizer_ids
from families.higgs_v3 import CODEC, HIGGS_V3_4B, stream_table
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from text.tokenizers import load_tokenizer

BASE = "bosonai/higgs-audio-v3-tts-4b"
TINY = "assets/tiny_marks_tokenizer.json"

config = TrainConfig(
    model=replace(HIGGS_V3_4B, checkpoint=4), init=BASE, lora=LoraConfig(rank=16, alpha=32.0, targets=("attn.*", "ffn.*")),
    data=DataConfig(sources=("data/voice.jsonl",), codec=CODEC, tokenizer=BASE, reference=0.5, columns=2048),
    out="out/higgs_v3", steps=2000, batch_size=1, accum=4, lr=1e-4, schedule="cosine", warmup=50, warmup_offset=1, weight_decay=0.01,
    eval_every=200, eval_batches=16, save_every=200, prompts=("I will be there in a minute.",))

table = with_tokenizer_ids(stream_table(288, 8, 258, 0), load_tokenizer(TINY))              # the tiny codec: 8 codebooks of 256 codes
smoke = replace(
    config, model=ModelConfig(table, StackConfig(dim=48, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96, norm_eps=1e-6, rope_theta=1e6,
                                                 qk_norm=True), audio_tied=True),
    init="", out="out/smoke_higgs_v3", steps=12, batch_size=2, accum=1, lr=2e-3, warmup=2, dtype="fp32", eval_every=6, save_every=6,
    eval_batches=2, log_every=1, lora=replace(config.lora, rank=4, alpha=8.0, train=("embed.*",)),
    data=replace(config.data, sources=("assets/speech/manifest.jsonl",), codec="tiny", tokenizer=TINY, split="manifest", columns=512),
    prompts=("thank you",), listen=1)
