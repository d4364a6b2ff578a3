"""Hibiki 1B (Kyutai) on translated speech, with LoRA: right what somebody says, left its translation; --preset=large is the 2B model.

    torchrun --standalone --nproc_per_node=8 train.py configs/hibiki.py --data.sources=data/pairs.jsonl
    python train.py configs/hibiki.py --smoke               a tiny twin on bundled speech: CPU, under a minute
    python sample.py --ckpt out/hibiki --user french.wav --cfg=3 --out english.wav      goes on until its text ends
    python checkpoint.py export out/hibiki --to=moshi --out=official

Data as for moshi_lora.py; the alignments are those of the translation, which begins where the words that it needs were heard. A row's
"text_conditions": {"description": "good"} says how well it sounds; without it that is "very_good", as when sampling, and --cfg guides
against "very_bad". The mark that the user is over, and the end of the text behind it, are those of the released model: no row teaches
them anew.
Needs 6.8 GiB (`--plan`).  Expect first losses far below a random guess: ln 48,000 = 10.8 for text, ln 2048 = 7.6 for codes.
"""

from dataclasses import replace
from pathlib import Path

from config import TrainConfig
from corpus.bundled import demo_dialogues
from families.moshi import HIBIKI_1B, HIBIKI_2B
from options import run_config
from streams import StreamTable

BASE = "kyutai/hibiki-1b-pytorch-bf16"
LARGE = "kyutai/hibiki-2b-pytorch-bf16"

beside = Path(__file__).with_name("moshi_lora.py")
moshi = run_config(beside)


def weights(Q: int) -> tuple[float, ...]:
    return (1.0, 0.0, 100.0, *[1.0] * (Q - 1), *[0.0] * Q)          # text, condition, semantic and acoustic codebooks, the user


config = replace(moshi, model=replace(HIBIKI_1B, checkpoint=2), init=BASE, out="out/hibiki",
                 data=replace(moshi.data, codec=BASE, tokenizer=BASE, stream_weights=weights(8)))
large = replace(config, model=replace(HIBIKI_2B, checkpoint=2), init=LARGE, out="out/hibiki_large",
                data=replace(config.data, codec=LARGE, tokenizer=LARGE, stream_weights=weights(16)))


def smoke() -> TrainConfig:
    folder, tiny = Path(demo_dialogues("out/cache/roles")).parent, run_config(beside, "smoke")
    description = replace(HIBIKI_1B.table.streams[1], vocab=8, start=7, rank=4)
    text, *codes = tiny.model.table.streams
    table = StreamTable((text, description, *(replace(s, delay=2 * s.delay) for s in codes)), "hibiki", aligned=True)
    return replace(
        tiny, model=replace(tiny.model, table=table, temporal=replace(tiny.model.temporal, dim=32, ffn=88),
                            depth=replace(tiny.model.depth, dim=16, ffn=44)),
        out="out/smoke_hibiki", prompts=(f"{folder}/001.wav",),
        data=replace(tiny.data, sources=(f"{folder}/dialogues.jsonl",), tokenizer=f"{folder}/words.json", stream_weights=weights(8)))


def smoke_large() -> TrainConfig:
    return replace(smoke(), out="out/smoke_hibiki_large")
