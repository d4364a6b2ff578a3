"""Higgs Audio v2 3B, voice cloning with LoRA, Arabic first.

    torchrun --standalone --nproc_per_node=8 train.py configs/higgs_ar.py --data.sources=data/ar.jsonl
    python train.py configs/higgs_ar.py --smoke                 the same in small, on the bundled speech, about a minute

The released model, its tokenizer.json and its codec come from the hub or its local cache (hf download ID); a folder does as well.
Needs 12.0 GiB with a row a step (7.4 with --quantize=int8; `--plan` counts what you ask for). Expect a first audio loss far below a random
guess, ln 1026 = 6.9; under 0.3 it would be told what it should say, and speak silence (boson-ai/higgs-audio#94). Half an hour to 5 hours
of a voice; people settle at rates of 1e-5 to 5e-5 (the same thread), and more training made it worse (#30 there).
"""

from dataclasses import replace

from config import TrainConfig
from corpus.data_config import DataConfig
from families.family import with_tokenizer_ids
from families.higgs import HIGGS_V2_3B
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from loss import LossConfig
from streams import Stream, StreamTable, codebooks
from text.tokenizers import load_tokenizer

BASE, CODEC = "bosonai/higgs-audio-v2-generation-3B-base", "bosonai/higgs-audio-v2-tokenizer"
TINY = "assets/tiny_tokenizer.json"

config = TrainConfig(
    model=replace(HIGGS_V2_3B, checkpoint=4), init=BASE,
    # or attention_only, or audio_focused (lora.SETS); --lora.train=audio_head trains that head in full instead of its adapter
    lora=LoraConfig(rank=16, alpha=32.0, dropout=0.05, targets=("comprehensive",)),
    # seeds (the recipes this one comes from): audio 1 or 2 beside text 1, both unshifted; one weight a modality, shifted, is
    # what the base was trained with.
    # transformers sums its eight codebooks instead of averaging them: that would be audio_reduction="sum".
    # The seed's contrastive 0.1 had no gradient; --loss.contrastive=0.1 is InfoNCE between speech and reference, off here.
    loss=LossConfig(text=1.0, audio=1.0),
    data=DataConfig(sources=("data/ar.jsonl",), codec=CODEC, tokenizer=BASE, normaliser="arabic-v1+higgs-v1",
                    scene="Audio is recorded from a quiet room.",
                    split="speaker",                        # seeds: the last 5 % of the file; a voice must not be on both sides
                    held_out=0.05, max_seconds=30.0, max_text=512, columns=2048,
                    reference=0.9),                         # one example in ten has no reference voice
    # seeds: 2 clips x 8 GPUs x 4 or 8; here rows of 2048 columns packed with about three clips and references each
    out="out/higgs_ar", steps=4000, batch_size=1, accum=2,
    lr=2e-4, schedule="cosine", warmup=100,                 # seeds: 500 warm-up steps, a tenth of many of their runs
    betas=(0.9, 0.95), weight_decay=0.01, clip=1.0,
    eval_every=100, eval_batches=32, save_every=1000, keep=3, log_every=10,
    prompts=("مرحبا بكم، كيف يمكنني مساعدتكم؟",), listen=4)

steer = with_tokenizer_ids(StreamTable((Stream("text", "text", 288, 288), *codebooks(8, 258, 258, 256, 257, range(8))), "chatml"),
                load_tokenizer(TINY))
smoke = replace(
    config, model=ModelConfig(steer, StackConfig(dim=48, layers=2, heads=4, kv_heads=2, ffn=64, rope_theta=500000.0,
                                                 rope_scaling=(32.0, 1.0, 4.0, 8192.0)), dual_ffn=(0, 1)),
    init="", out="out/smoke_higgs_ar", steps=12, batch_size=2, accum=1, warmup=2, eval_every=6, save_every=6, eval_batches=2, log_every=1,
    data=replace(config.data, sources=("assets/speech/arabic.jsonl", "assets/speech/chat.jsonl"), codec="tiny", tokenizer=TINY,
                 split="manifest", columns=768),
    prompts=("مرحبا",), listen=2)
