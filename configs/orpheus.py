"""Orpheus 3B: speech of a named voice, with LoRA; --lora=none trains all of it.

    torchrun --standalone --nproc_per_node=8 train.py configs/orpheus.py --data.sources=data/voice.jsonl --data.scene=anna
    python train.py configs/orpheus.py --smoke          a tiny twin on bundled speech: CPU, under a minute
    python sample.py --ckpt out/orpheus --text "..." --out x.wav          the voice is the one of training; --scene=tara for another
    python checkpoint.py export out/orpheus --to=hf --out=official        for transformers, vLLM and llama.cpp

The recipe of the official finetune/: rank 32, alpha 64, rsLoRA on all linear layers, rate 5e-5, linear to 0, one pass; its authors
ask for 300 examples of a speaker. Theirs also trains copies of embedding and head, which a model with one table for both cannot merge.
Needs 8.0 GiB (`--plan`), the released model, and SNAC for 24 kHz. Expect a first loss far below a random guess, ln 156,940 = 12.0;
1 to 5 epochs for a voice (canopyai/Orpheus-TTS#266).
"""

from dataclasses import replace

from config import TrainConfig
from corpus.data_config import DataConfig
from families.family import with_tokenizer_ids
from families.orpheus import ORPHEUS_3B, SPECIAL, stream_table
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from loss import LossConfig
from text.tokenizers import load_tokenizer

BASE = "canopylabs/orpheus-3b-0.1-pretrained"
TINY = "assets/tiny_marks_tokenizer.json"

config = TrainConfig(
    model=replace(ORPHEUS_3B, checkpoint=4), init=BASE, lora=LoraConfig(rank=32, alpha=64.0, rslora=True, targets=("attn.*", "ffn.*")),
    loss=LossConfig(groups="all"),
    data=DataConfig(sources=("data/voice.jsonl",), codec="hubertsiuzdak/snac_24khz", tokenizer=BASE, columns=4096),
    out="out/orpheus", epochs=1, steps=2000, batch_size=1, accum=1, lr=5e-5, schedule="linear", warmup=0, betas=(0.9, 0.999), eps=1e-8,
    weight_decay=0.0, clip=1.0, eval_every=200, eval_batches=16, save_every=200, prompts=("I will be there in a minute.",))

words = load_tokenizer(TINY)
table = with_tokenizer_ids(stream_table(words.size - SPECIAL - 1, 8, 256, 0), words)     # the tiny codec: 8 codebooks of 256 codes
smoke = replace(
    config, model=ModelConfig(table, StackConfig(dim=48, layers=2, heads=4, kv_heads=2, ffn=96, rope_theta=500000.0,
                                                 rope_scaling=(32.0, 1.0, 4.0, 8192.0)), tied=True),
    init="", out="out/smoke_orpheus", epochs=0, steps=12, batch_size=2, lr=2e-3, warmup=2, dtype="fp32", eval_every=6, save_every=6,
    eval_batches=2, log_every=1, lora=replace(config.lora, rank=4, alpha=8.0, train=("embed.*",)),
    data=replace(config.data, sources=("assets/speech/manifest.jsonl",), codec="tiny", tokenizer=TINY, split="manifest", columns=1024),
    prompts=("thank you",), listen=1)
