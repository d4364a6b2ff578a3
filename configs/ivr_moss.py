"""MOSS-Speech on the phone: speech-to-speech calls, learnt with LoRA.

    python data.py calls recordings/ --out=data/calls                                  stereo calls -> turns and conversations
    python train.py configs/ivr_moss.py --data.sources=data/calls/calls.jsonl
    python sample.py --ckpt out/ivr_moss --user question.wav --out answer.wav          or --reply=text
    python evaluate.py report out/ivr_moss
    python checkpoint.py export out/ivr_moss --to=peft --out=adapter                   for PEFT; --to=hf merges

    python train.py configs/ivr_moss.py --smoke            a tiny twin on bundled clips: CPU, under a minute

Needs the released model and its codec in models/ (huggingface-cli download ID --local-dir models/NAME). Rows are
conversations (`python data.py --help`). The targets are the agent's turns: speech codes or text, and <|im_end|>; one call may
have both. r = 8 on q, k, v, o trains 8,519,680 parameters; --lora.targets="temporal.audio_tail.*attn.*" only 851,968 of them.
For another backbone run `python checkpoint.py split-from-qwen models/Qwen3-0.6B --out=models/split`, train with
--init=models/split, and copy the table and sizes of its config.json into this file.
Needs 19.4 GiB (11.9 with --quantize=int8; `--plan`). Expect first losses far below a random guess: 11.9 for text, 9.7 for codes.

The smoke twin has random weights and the first codebook of the tiny codec ("tiny:1", 25 codes a second): its output sounds like
speech without intelligible words. Its calls are bundled digits, read by a synthetic caller and repeated by the voice Allison.
"""

from dataclasses import replace

from config import TrainConfig
from corpus.bundled import demo_calls
from corpus.data_config import DataConfig
from families.family import with_tokenizer_ids
from families.moss import MOSS_9B
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from loss import LossConfig
from streams import Stream, StreamTable, codebooks
from text.tokenizers import load_tokenizer

BASE, CODEC = "models/MOSS-Speech", "models/MOSS-Speech-Codec"
TINY = "assets/tiny_qwen_tokenizer.json"

config = TrainConfig(
    model=replace(MOSS_9B, checkpoint=4), init=BASE,
    lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05, targets=("attn.*",)),
    loss=LossConfig(groups="all"),                          # one mean over text and speech targets: they are of one kind here
    data=DataConfig(sources=("data/calls/calls.jsonl",), codec=CODEC, tokenizer=BASE, max_seconds=120.0,
                    columns=4096),                          # five minutes of speech at 12.5 codes a second; the release saw 10240
    out="out/ivr_moss", epochs=3, steps=2000, batch_size=1, accum=4, lr=1e-4, schedule="linear", warmup=20, warmup_offset=1,
    betas=(0.9, 0.95), weight_decay=0.0, clip=1.0, eval_every=50, eval_batches=16, patience=3, save_every=50, keep=2, log_every=1)

table = with_tokenizer_ids(StreamTable((Stream("text", "text", 544, 544), *codebooks(1, 384, 384, -1, 256)), "moss"), load_tokenizer(TINY))

def smoke() -> TrainConfig:
    calls = demo_calls("out/cache/calls")                   # made of the bundled clips when they are not there
    stack = StackConfig(dim=96, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=192, norm_eps=1e-6, rope_theta=1e6, qk_norm=True)
    return replace(
        config, init="", out="out/smoke_ivr_moss", model=ModelConfig(table, stack, tail=1),
        lora=replace(config.lora, train=("embed.*", "text_head", "audio_head")),         # random weights: they have to learn ids too
        data=replace(config.data, sources=(calls,), cache="out/cache", codec="tiny:1", tokenizer=TINY, split="manifest", columns=640,
                     window=16),
        epochs=0, steps=40, batch_size=2, accum=1, lr=3e-3, warmup=4, dtype="fp32", eval_every=20, patience=0, save_every=20,
        eval_batches=0, prompts=("four two",))
