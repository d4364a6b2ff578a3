"""Kyutai TTS 1.6B on recordings of a voice, with LoRA; --lora=none --shard=true trains all of it. Nobody else has a recipe for it.

    torchrun --standalone --nproc_per_node=8 train.py configs/kyutai_tts.py --data.sources=data/voice.jsonl
    python train.py configs/kyutai_tts.py --smoke          a tiny twin on bundled speech: CPU, under a minute
    python sample.py --ckpt out/kyutai_tts --text "Hi there. <break time=\"0.5s\"/> How are you?" --out x.wav --stream
    python sample.py --ckpt kyutai/tts-1.6b-en_fr --text "..." --ref voice.safetensors --out x.wav      a voice of kyutai/tts-voices
    python checkpoint.py export out/kyutai_tts --to=moshi --out=official

Rows are recordings with word times ("words" or "alignments"; data.py transcribe and annotate write them). What is trained: when a
word begins, and the codes, 16 frames behind the words. Kyutai keeps what turns a recording into the features of a voice, so a
tuned voice is spoken without --ref. Rows without text_conditions count as what is asked for when sampling.
Needs 7.8 GiB (`--plan`).  Expect first losses far below a random guess: ln 2048 = 7.6 for codes. Half an hour to 5 hours of a voice.
"""

from dataclasses import replace
from pathlib import Path

from config import TrainConfig
from corpus.bundled import demo_dialogues
from corpus.data_config import DataConfig
from families.moshi import TTS_1_6B
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from streams import Stream, StreamTable, Timing, codebooks

BASE = "kyutai/tts-1.6b-en_fr"
WEIGHTS = (1.0, 0.0, 0.0, 0.0, 10.0, *[1.0] * 31)       # when a word begins; words ahead and conditions are read; the semantic codebook

config = TrainConfig(
    model=replace(TTS_1_6B, checkpoint=2), init=BASE,
    lora=LoraConfig(rank=64, alpha=128.0, targets=("temporal.*attn.*", "temporal.*ffn.*", "depth.layers.*")),
    data=DataConfig(sources=("data/voice.jsonl",), codec=BASE, tokenizer=BASE, max_seconds=40.0, chunk_seconds=40.0, columns=560, window=64,
                    stream_weights=WEIGHTS),
    out="out/kyutai_tts", steps=2000, batch_size=8, lr=1e-5, schedule="cosine", warmup=100, betas=(0.9, 0.95), weight_decay=0.1,
    dtype="bf16",
    eval_every=200, eval_batches=16, save_every=200, listen=4, prompts=("I will be there in a minute.",))

table = StreamTable((Stream("text", "text", 1025, 5, start=1024), Stream("ahead", "text", 1025),
                     Stream("control", "condition", 2, start=1, rank=8, values=("ok",)),
                     *codebooks(8, 257, 256, 256, delays=(0, *[2] * 7))), "kyutai_tts", aligned=True, timing=Timing(8.0, ahead=2))


def smoke() -> TrainConfig:
    folder = Path(demo_dialogues("out/cache/roles")).parent         # of a stereo recording the left channel is the voice
    stack = StackConfig(dim=32, layers=2, heads=2, ffn=88, norm_eps=1e-8, rope_interleaved=True, window=200, packed=True)
    depth = replace(stack, dim=16, ffn=44, rope_theta=0.0, rope_interleaved=False, window=0, steps=8, low_rank=8, schedule=(0, 1, *[2] * 6))
    return replace(
        config, model=ModelConfig(table, stack, depth=depth, demux=True), init="", out="out/smoke_kyutai_tts",
        lora=replace(config.lora, rank=4, alpha=8.0),
        data=replace(config.data, sources=(f"{folder}/dialogues.jsonl",), codec="tiny", tokenizer=f"{folder}/words.json",
                     normaliser="english-v1", held_out=0.2, max_seconds=8.0, columns=256, window=16,
                     stream_weights=(1.0, 0.0, 0.0, 10.0, *[1.0] * 7)),
        steps=12, batch_size=2, lr=2e-3, warmup=2, dtype="fp32", eval_every=6, eval_batches=2, save_every=6, log_every=1, listen=1,
        prompts=("thank you",))
