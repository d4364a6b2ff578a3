"""The embedded conversation: Moshi's shape, small enough to train on two CPU cores in minutes.

    python -m corpus.bundled out/cache/digits     composes the dialogues; make talk does all three
    python train.py configs/tiny_duplex.py
    python serve.py --ckpt out/talk               talk to it in a browser

The user says digits, the agent says them back in another voice. The text row holds what it hears, "(four)", and what it
says, "four": hearing, remembering and speaking are then three small steps. It knows two synthetic users and ten words.
"""

from dataclasses import replace
from pathlib import Path

from config import TrainConfig
from corpus.bundled import digit_dialogues
from corpus.data_config import DataConfig
from layers.architecture import ModelConfig, StackConfig
from loss import LossConfig
from streams import Stream, StreamTable, codebooks

WORDS = 24                                                  # <unk> (EPAD), <s>, </s>, <pad>, ten words said, ten heard
DELAYS = (1, 2, 2, 2, 3, 3, 3, 3)                           # text leads the agent's codes; few columns: it answers at once
table = StreamTable((Stream("text", "text", WORDS + 1, WORDS, start=WORDS), *codebooks(8, 257, 256, 256, delays=DELAYS),
                     *codebooks(8, 257, 0, 256, name="user")), "talk", aligned=True)


FOLDER = "out/cache/digits"                                 # made by corpus.bundled: 2,000 dialogues of 12 s, and 40 that are held out

config = TrainConfig(
    model=ModelConfig(table, StackConfig(dim=256, layers=4, heads=4, ffn=1024, gated=False, activation="gelu", window=300),
                      dropout=0.05, input_drop=0.3),
    data=DataConfig(sources=(f"{FOLDER}/dialogues.jsonl",), cache="out/cache", codec="tiny", tokenizer=f"{FOLDER}/words.json",
                    split="manifest", columns=304, window=64, text_padding_weight=0.1,
                    stream_weights=(1.0, *(0.85**k for k in range(8)), *[0.0] * 8)),
    out="out/talk",
    loss=LossConfig(text=2.0),
    steps=3000, batch_size=3, lr=1.5e-3, schedule="linear", warmup=30, warmup_offset=1, weight_decay=0.02, dtype="auto",
    eval_every=1500, eval_batches=8, save_every=500, prompts=tuple(f"{FOLDER}/{2000 + n}.flac" for n in range(40)))


def smoke() -> TrainConfig:
    folder = Path(digit_dialogues("out/cache/digits_smoke", 24, 4)).parent       # made of the bundled clips when it is not there
    return replace(config, out="out/smoke_talk",
                   model=replace(config.model, temporal=replace(config.model.temporal, dim=48, layers=2, heads=2, ffn=96)),
                   data=replace(config.data, sources=(f"{folder}/dialogues.jsonl",), tokenizer=f"{folder}/words.json"),
                   steps=12, batch_size=2, eval_every=6, save_every=6, eval_batches=2, prompts=(f"{folder}/0024.flac",))
