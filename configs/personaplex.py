"""PersonaPlex 7B (NVIDIA) with LoRA on stereo dialogues, each behind a role and a voice; --preset=full trains every weight.

    torchrun --standalone --nproc_per_node=8 train.py configs/personaplex.py --data.sources=data/calls.jsonl
    python train.py configs/personaplex.py --smoke      a tiny twin on bundled speech: CPU, a minute
    python sample.py --ckpt out/personaplex --user in.wav --system "You work for ..." --ref voice.wav --out reply.wav
    python serve.py --ckpt out/personaplex --voices voices      the page, and /api/chat with text_prompt and voice_prompt
    python checkpoint.py export out/personaplex --to=moshi --out=official

Data as for moshi_lora.py; a row may say "text_prompt", the role (others get data.system), and "voice_prompt", a recording of the
agent's voice (others get ten seconds of another dialogue of their speaker, with probability data.reference). Neither is
trained. Both speakers are: the user's codebooks are targets too.

--preset=community has the weights of those who fine-tuned it first: with Moshi's own (100 on the semantic codebook, half on padding)
the audio loss is 40 to 100 times that of the text, an adapter spends its rank on sound, and learns badly when to stop writing padding:
replies come late. So: 10 on the semantic codebook, padding in full, 20 on the text, nothing on the user.

Needs 24.3 GiB with a row a step (17.0 with --quantize=int8; `--plan`).  Expect first losses as in moshi_lora.py.
"""

from dataclasses import replace
from pathlib import Path

from config import LossConfig, TrainConfig
from corpus.bundled import demo_dialogues
from families.moshi import PERSONAPLEX_7B, predict_user
from options import run_config

BASE = "nvidia/personaplex-7b-v1"                           # weights, Mimi, tokenizer and voices.tgz (accept its licence first)
BOTH = (1.0, *2 * (100.0, *[1.0] * 7))                      # text, the semantic and the acoustic codebooks of both speakers
AGENT = (1.0, 10.0, *[1.0] * 7, *[0.0] * 8)

beside = Path(__file__).with_name("moshi_lora.py")
moshi = run_config(beside)
config = replace(
    moshi, model=replace(PERSONAPLEX_7B, checkpoint=4), init=BASE, out="out/personaplex",
    data=replace(moshi.data, codec=BASE, tokenizer=BASE, columns=2048, chunk_seconds=140.0, reference=0.5, stream_weights=BOTH,
                 system="You enjoy having a good conversation."))
full = replace(config, lora=None, shard=True, out="out/personaplex_full")


def weighted(one: TrainConfig, out: str) -> TrainConfig:
    return replace(one, loss=LossConfig(text=20.0), out=out, data=replace(one.data, text_padding_weight=1.0, stream_weights=AGENT))


community = weighted(config, "out/personaplex_community")


def smoke() -> TrainConfig:
    folder = Path(demo_dialogues("out/cache/roles")).parent
    tiny = run_config(beside, "smoke")
    codes = tuple(replace(s, vocab=2049, classes=s.classes and 2048, start=2048) if s.kind == "audio" else s
                  for s in tiny.model.table.streams)
    table = replace(tiny.model.table, streams=codes, layout="personaplex")          # of Mimi's codes; the tiny codec uses 256 of them
    return replace(
        tiny, model=predict_user(replace(tiny.model, table=table, temporal=replace(tiny.model.temporal, dim=32, ffn=88),
                                         depth=replace(tiny.model.depth, dim=16, ffn=44))),
        out="out/smoke_personaplex", prompts=(f"{folder}/001.wav",),
        data=replace(tiny.data, sources=(f"{folder}/dialogues.jsonl",), tokenizer=f"{folder}/words.json", columns=192, reference=0.5,
                     system="thank you", stream_weights=BOTH))


def smoke_full() -> TrainConfig:
    return replace(smoke(), lora=None, shard=True, out="out/smoke_personaplex_full")


def smoke_community() -> TrainConfig:
    return weighted(smoke(), "out/smoke_personaplex_community")
