"""Kyutai STT 1B (English and French, words half a second late) on transcribed recordings, with LoRA; --preset=large is the 2.6B model.

    torchrun --standalone --nproc_per_node=8 train.py configs/kyutai_stt.py --data.sources=data/speech.jsonl
    python train.py configs/kyutai_stt.py --smoke          a tiny twin on bundled speech: CPU, under a minute
    python sample.py --ckpt out/kyutai_stt --user in.wav --out out/in.wav        out/in.txt, and out/in.json with the time of each word
    python serve.py --ckpt out/kyutai_stt                   /api/chat writes while somebody speaks, with {"word"} and {"pause"}
    python checkpoint.py export out/kyutai_stt --to=moshi --out=official

Rows are recordings with word times ("words" or "alignments"; data.py transcribe and annotate write them). Words are laid out as late
as the model writes them, between the silences that it hears when sampling. The heads that tell pauses stay as they are.
Needs 2.4 GiB (`--plan`).  Expect a first loss far below a random guess, ln 8000 = 9.0.
"""

from dataclasses import replace
from pathlib import Path

from config import TrainConfig
from corpus.bundled import demo_dialogues
from corpus.data_config import DataConfig
from families.moshi import STT_1B, STT_2_6B
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from streams import Stream, StreamTable, Timing, codebooks

BASE = "kyutai/stt-1b-en_fr"

config = TrainConfig(
    model=replace(STT_1B, checkpoint=2), init=BASE, lora=LoraConfig(rank=64, alpha=128.0, targets=("temporal.*", "text_head")),
    data=DataConfig(sources=("data/speech.jsonl",), codec=BASE, tokenizer=BASE, max_seconds=4 * 3600.0, chunk_seconds=40.0, columns=560,
                    window=64),
    out="out/kyutai_stt", steps=2000, batch_size=16, lr=2e-5, schedule="cosine", warmup=100, betas=(0.9, 0.95), weight_decay=0.1,
    dtype="bf16", eval_every=200, eval_batches=16, save_every=200)
LARGE = "kyutai/stt-2.6b-en"
large = replace(config, model=replace(STT_2_6B, checkpoint=2), init=LARGE, out="out/kyutai_stt_large",
                data=replace(config.data, codec=LARGE, tokenizer=LARGE, chunk_seconds=25.0))


def smoke() -> TrainConfig:
    folder = Path(demo_dialogues("out/cache/roles")).parent         # of a stereo recording the left channel is heard
    table = StreamTable((Stream("text", "text", 1025, 1024, start=1024), *codebooks(8, 257, 0, 256, name="user")), "kyutai_stt",
                        aligned=True, timing=Timing(-5.0, silence=2))
    stack = StackConfig(dim=32, layers=2, heads=2, ffn=88, norm_eps=1e-8, rope_interleaved=True, window=200, packed=True)
    return replace(
        config, model=ModelConfig(table, stack, extra_heads=4), init="", out="out/smoke_kyutai_stt",
        lora=replace(config.lora, rank=4, alpha=8.0),
        data=replace(config.data, sources=(f"{folder}/dialogues.jsonl",), codec="tiny", tokenizer=f"{folder}/words.json",
                     normaliser="english-v1", held_out=0.2, columns=256, window=16),
        steps=12, batch_size=2, lr=2e-3, warmup=2, dtype="fp32", eval_every=6, eval_batches=2, save_every=6, log_every=1)


def smoke_large() -> TrainConfig:
    return replace(smoke(), out="out/smoke_kyutai_stt_large")
