"""The embedded default: word-aligned text to speech on real recordings, in minutes on a CPU.

    python train.py configs/tiny.py            `make demo` runs this and then samples
    python train.py configs/tiny.py --preset=voice --data.sources=FOLDER/transcribed.jsonl --data.tokenizer=FOLDER/transcribed.words.json
                                               a voice from a few minutes of it (data.py transcribe wrote these files): it is
                                               recognised, most of its words are not yet (BENCHMARKS.md); it says words it has heard

The model reads the current, next and previous word, the age of the word in frames, and the codes of the previous frame. It
predicts eight codebooks, and when to advance to the next word. It can only say words that occur in its training recordings.
"""

from dataclasses import replace

from config import TrainConfig
from corpus.data_config import DataConfig
from families.tiny import MAX_AGE
from layers.architecture import ModelConfig, StackConfig
from loss import LossConfig
from streams import Stream, StreamTable, codebooks

WORDS, LEAD = 1024, 2                                       # rows of the word embeddings; frames that text leads audio by
table = StreamTable(
    (*(Stream(name, "text", WORDS) for name in ("word", "next", "previous")), Stream("age", "text", MAX_AGE + 1),
     Stream("advance", "text", 2, 2), *codebooks(8, 258, 258, 256, 257, range(LEAD, LEAD + 8))),
    "words", aligned=True)

config = TrainConfig(
    model=ModelConfig(table, StackConfig(dim=256, layers=4, heads=4, ffn=1024, gated=False, activation="gelu"),
                      dropout=0.05, input_drop=0.5),
    data=DataConfig(sources=("assets/speech/demo.jsonl",), cache="out/cache", codec="tiny", tokenizer="assets/speech/words.json",
                    normaliser="english-v1", variants=8, split="manifest", columns=304,
                    stream_weights=(0.0, 0.0, 0.0, 0.0, 1.0, *(0.85**k for k in range(8)))),
    loss=LossConfig(text=0.3), out="out/demo",
    steps=600, batch_size=4, lr=1.5e-3, schedule="linear", warmup=20, warmup_offset=1, weight_decay=0.02, dtype="auto",
    eval_every=300, eval_batches=8, save_every=300, prompts=("four nine two seven", "one zero three", "thank you"))

voice = replace(config, data=replace(config.data, sources=("data/voice/transcribed.jsonl",), tokenizer="data/voice/transcribed.words.json",
                                     split="hash", held_out=0.1, doubtful="drop"), out="out/voice", prompts=(), listen=6,
                eval_every=100, save_every=100, recogniser="tiny.en", best="wer")

smoke = replace(config, out="out/smoke_tiny",
                model=replace(config.model, temporal=StackConfig(dim=48, layers=2, heads=2, ffn=96, gated=False, activation="gelu")),
                steps=20, batch_size=2, eval_every=10, save_every=10, eval_batches=2, prompts=("one two",))
