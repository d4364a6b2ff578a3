"""CSM-1B (Sesame): conversational speech in the voices of recordings, with LoRA; --lora=none trains all of it.

    torchrun --standalone --nproc_per_node=8 train.py configs/csm.py --data.sources=data/voice.jsonl
    python train.py configs/csm.py --smoke          a tiny twin on bundled speech: CPU, under a minute
    python sample.py --ckpt out/csm --text "..." --ref voice.wav --ref-text "what it says" --out x.wav
    python checkpoint.py export out/csm --to=hf --out=official

The loss is that of transformers: the mean of the first codebook plus the mean of the 31 others, which are trained on a
random sixteenth of the frames (`model.depth_share`). Needs 3.9 GiB (`--plan`), the released model and Mimi with 32 codebooks.
Expect first losses far below a random guess, ln 2051 = 7.6; half an hour to 5 hours of a voice, 1 to 5 epochs
(davidbrowne17/csm-streaming#9).
"""

from dataclasses import replace

from config import LossConfig, TrainConfig
from corpus.data_config import DataConfig
from families.csm import CSM_1B, stream_table
from families.family import with_tokenizer_ids
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from text.tokenizers import load_tokenizer

BASE = "sesame/csm-1b"
TINY = "assets/tiny_tokenizer.json"

config = TrainConfig(
    model=replace(CSM_1B, checkpoint=4), init=BASE, lora=LoraConfig(rank=16, alpha=32.0, targets=("temporal.*", "depth.layers.*")),
    loss=LossConfig(audio=2.0),                          # with 31 on the first codebook: its mean and that of the others, added up
    data=DataConfig(sources=("data/voice.jsonl",), codec="kyutai/mimi", tokenizer=BASE, reference=0.5, columns=2048,
                    stream_weights=(0.0, 31.0, *[1.0] * 31)),
    out="out/csm", steps=2000, batch_size=1, accum=4, lr=1e-4, schedule="cosine", warmup=50, warmup_offset=1, weight_decay=0.01,
    eval_every=200, eval_batches=16, save_every=200, prompts=("I will be there in a minute.",))

table = with_tokenizer_ids(stream_table(288, 258, 8, 0), load_tokenizer(TINY))
stack = StackConfig(dim=48, layers=2, heads=4, kv_heads=2, ffn=64, rope_theta=500000.0, rope_scaling=(32.0, 0.125, 0.5, 1024.0))
smoke = replace(
    config, model=ModelConfig(table, stack, depth=replace(stack, dim=32, kv_heads=1, steps=8, prefix=True, projection="linear",
                                                          rope_scaling=(32.0, 0.001953125, 0.0078125, 16.0)),
                              depth_tied=True, depth_share=0.25),
    init="", out="out/smoke_csm", steps=12, batch_size=2, accum=1, lr=2e-3, warmup=2, dtype="fp32", eval_every=6, save_every=6,
    eval_batches=2, log_every=1, lora=replace(config.lora, rank=4, train=("embed.*", "audio_head", "depth.head")),
    data=replace(config.data, sources=("assets/speech/manifest.jsonl",), codec="tiny", tokenizer=TINY, split="manifest", columns=512,
                 stream_weights=(0.0, 7.0, *[1.0] * 7)),
    prompts=("thank you",), listen=1)
