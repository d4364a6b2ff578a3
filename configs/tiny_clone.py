"""Voice cloning in small: the shape of Higgs Audio v2 on the bundled voices.

    python train.py configs/tiny_clone.py      about half an hour on two cores; the shape only: what it says is not intelligible

Sequential grid: reference transcript, reference speech, transcript (bytes), speech; eight delayed codebooks; audio
columns have their own feed-forward network (dual FFN).
"""

from dataclasses import replace

from config import TrainConfig
from corpus.data_config import DataConfig
from layers.architecture import ModelConfig, StackConfig
from streams import Stream, StreamTable, codebooks

AUDIO_START, AUDIO_END = 256, 257                           # text ids behind the 256 bytes
table = StreamTable((Stream("text", "text", 258, 258), *codebooks(8, 258, 258, 256, 257, range(8))),
                    "clone", audio_start=AUDIO_START, audio_end=AUDIO_END, stop=(AUDIO_END,))

config = TrainConfig(
    model=ModelConfig(table, StackConfig(dim=256, layers=4, heads=4, ffn=704), dual_ffn=(0, 1, 2, 3), dropout=0.05, input_drop=0.3),
    data=DataConfig(sources=("assets/speech/manifest.jsonl",), cache="out/cache", codec="tiny", tokenizer="bytes",
                    variants=8, split="manifest", columns=512, reference=0.8,
                    stream_weights=(1.0, *(0.85**k for k in range(8)))),
    out="out/clone", steps=4000, batch_size=4, lr=1e-3, schedule="cosine", warmup=100, weight_decay=0.02,
    eval_every=500, eval_batches=8, save_every=500, prompts=("thank you",))

smoke = replace(config, model=replace(config.model, temporal=StackConfig(dim=48, layers=2, heads=4, kv_heads=2, ffn=64), dual_ffn=(0, 1)),
                data=replace(config.data, variants=2), out="out/smoke_clone", steps=12,
                batch_size=2, eval_every=6, save_every=6, eval_batches=2)
