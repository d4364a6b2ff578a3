"""Qwen3-TTS 0.6B: text to speech in one voice, with LoRA; --preset=full trains all weights, --preset=large is 1.7B.

    python checkpoint.py add-voice Qwen/Qwen3-TTS-12Hz-0.6B-Base --wav=me.wav --out=mine      the voice to begin with
    torchrun --standalone --nproc_per_node=8 train.py configs/qwen_tts.py --init=mine --data.sources=data/voice.jsonl
    python train.py configs/qwen_tts.py --smoke          a tiny twin on bundled speech: CPU, under a minute
    python sample.py --ckpt out/qwen_tts --text "..." --condition language=english --out x.wav
    python checkpoint.py export out/qwen_tts --to=hf --out=official

The loss is the one that the official script means: the mean of the first codebook plus 0.3 times the mean of the others, each
against the state in front of its frame (families/qwen_tts.py). `--model.table.choice` says what stands in every prompt, a language
and a speaker; by default it is what add-voice was told. With --data.reference=0.5 half of the examples stand behind a recording of
the same speaker, as in cloning. The codec lies in the folder speech_tokenizer of the released model.
Needs 2.3 GiB (`--plan`). Expect first losses far below a random guess: ln 3072 = 8.0, ln 2048 = 7.6 behind the first codebook.
"""

from dataclasses import replace

from config import LossConfig, TrainConfig
from corpus.data_config import DataConfig
from families.qwen_tts import QWEN3_TTS_0_6B, QWEN3_TTS_1_7B, RELEASED, stream_table
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from text.tokenizers import load_tokenizer

BASE = "Qwen/Qwen3-TTS-12Hz-0.6B-Base"
TINY = "assets/tiny_qwen_tokenizer.json"

config = TrainConfig(
    model=replace(QWEN3_TTS_0_6B, checkpoint=4), init=BASE, lora=LoraConfig(rank=16, alpha=32.0, targets=("temporal.*", "depth.layers.*")),
    loss=LossConfig(audio=1.3),                          # with 50 = 15 / 0.3 on the first codebook: its mean and 0.3 of the others' mean
    data=DataConfig(sources=("data/voice.jsonl",), codec=BASE, tokenizer="Qwen/Qwen3-0.6B", columns=2048,        # the same pieces
                    stream_weights=(0.0, 50.0, *[1.0] * 15)),
    out="out/qwen_tts", steps=2000, batch_size=2, accum=4, lr=1e-4, schedule="cosine", warmup=50, warmup_offset=1, weight_decay=0.01,
    eval_every=200, eval_batches=16, save_every=200, prompts=("I will be there in a minute.",))
full = replace(config, lora=None, lr=2e-5, out="out/qwen_tts_full")
large = replace(config, model=replace(QWEN3_TTS_1_7B, checkpoint=4), init="Qwen/Qwen3-TTS-12Hz-1.7B-Base", out="out/qwen_tts_1_7b")

words = load_tokenizer(TINY)
turn, turn_end = (words.encode(mark)[0] for mark in ("<|im_start|>", "<|im_end|>"))
ids = {name: 256 + n for n, name in enumerate(RELEASED)} | {"turn": turn, "turn_end": turn_end, "speaker.me": 256 + 13}
ids |= {name: words.size + n for n, name in enumerate(("text_pad", "text_bos", "text_eos"))}
table = stream_table(words.size + 3, 256 + 16, 256, 8, 256 + 14, 256 + 15, ids)
stack = StackConfig(dim=48, layers=2, heads=4, kv_heads=2, ffn=64, rope_theta=1e6, norm_eps=1e-6, qk_norm=True)
smoke = replace(
    config, model=ModelConfig(replace(table, choice="speaker=me"), stack, text_width=40, depth_tied=True,
                              depth=replace(stack, dim=32, kv_heads=1, steps=8, prefix=True, projection="bias")),
    init="", out="out/smoke_qwen_tts", steps=12, batch_size=2, accum=1, lr=2e-3, warmup=2, dtype="fp32", eval_every=6, save_every=6,
    eval_batches=2, log_every=1, lora=replace(config.lora, rank=4, train=("embed.*", "audio_head", "depth.head")),
    data=replace(config.data, sources=("assets/speech/manifest.jsonl",), codec="tiny", tokenizer=TINY, split="manifest", columns=512,
                 stream_weights=(0.0, 50 * 7 / 15, *[1.0] * 7)),
    prompts=("thank you",), listen=1)
smoke_full = replace(smoke, lora=None, out="out/smoke_qwen_tts_full")
