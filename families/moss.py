"""MOSS-Speech 9B: Qwen3-8B whose last layers exist twice, for text and for speech; it is spoken to and speaks (arXiv:2510.00499).

    <|im_start|>user         <|object_ref_start|> codes<|im_end|>
    <|im_start|>assistant    <|object_ref_start|> codes<|im_end|>           trained; or text

One codebook at 12.5 Hz, no delay, no start column. `split_tails` makes a model of this shape out of a text model.
Sources: the released config, index and processor of MOSS-Speech. Next: qwen.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.family import Family
from families.formats import About, Conversion, Format, Tensors, by_model_type, drop_buffers, ids, llama, placeholder, stack, write_llama
from families.qwen import CHATML, QWEN2_TEMPLATE, SOSP
from layers.architecture import ModelConfig, StackConfig
from options import locate
from streams import Stream, StreamTable, chat_grid, codebooks
from text.conversation import token_ids
from text.tokenizers import load_tokenizer

# MOSS-Speech: Qwen3-8B whose last four layers exist twice, once for text and once for speech codes at 12.5 Hz.
MOSS_9B = ModelConfig(
    StreamTable((Stream("text", "text", 151680, 151680), *codebooks(1, 16512, 16512, -1, 16384)),
                "moss", audio_start=151646, stop=(151643, 151645)),
    StackConfig(dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=12288, norm_eps=1e-6, rope_theta=1e6, qk_norm=True),
    tail=4)
TEMPLATE = replace(
    QWEN2_TEMPLATE, family="MOSS-Speech", marks=(*CHATML, SOSP), audio_in=SOSP, audio_out=SOSP, joint_header=False,
    system=("You are a helpful assistant. Answer the user's questions with text.",
            "You are a helpful voice assistant. Answer the user's questions with spoken responses."))


# ---- the official layout ----

NAMES = (("embed.text.weight", "model.embed_tokens.weight"), ("embed.audio.weight", "model.audio_embed.weight"),
        *stack("temporal.layers", "model.shared_block.layers"), *stack("temporal.text_tail", "model.text_block.layers"),
        *stack("temporal.audio_tail", "model.audio_block.layers"), ("temporal.{x}_norm.weight", "model.{x}_norm.weight"),
        ("{x}_head.weight", "{x}_lm_head.weight"))


def read_moss(about: About, tensors: Tensors) -> ModelConfig:
    known, shared, tail = MOSS_9B.table, about["num_shared_layers"], about["num_modality_layers"]
    if shared + tail != about["num_hidden_layers"]:
        raise ValueError(f"config.json has {about['num_hidden_layers']} layers, but {shared} shared + {tail} of each modality; restore it")
    words, codes = about["vocab_size"], about["audio_vocab_size"]
    streams = (Stream("text", "text", words, words), *codebooks(1, codes, codes, -1, about["eosp_token_id"]))
    table = replace(known, streams=streams, audio_start=about["sosp_token_id"], stop=ids(about.get("eos_token_id")) or known.stop)
    return ModelConfig(table, llama(about, shared, 1e-6, qk_norm=True), tail=tail)


def write_moss(c: ModelConfig, dtype: str) -> About:
    shared, audio = c.temporal.layers, c.table.streams[1]
    return {"architectures": ["MossSpeechForCausalLM"], "model_type": "moss_speech", **write_llama(c, shared + c.tail, dtype),
            "num_shared_layers": shared, "num_modality_layers": c.tail, "audio_vocab_size": audio.vocab, "channels": 2,
            "sosp_token_id": c.table.audio_start, "eosp_token_id": audio.end, "eos_token_id": list(c.table.stop),
            "modality_pad_token_id": placeholder(151667, c.table.streams[0].vocab, 1), "max_position_embeddings": 40960}


def split_tails(config: ModelConfig, weights: dict[str, Tensor], tail: int, codes: int, audio_start: int,
                words: int = 0, seed: int = 0) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Turn a text model into one whose last `tail` layers exist for text and for audio, as MOSS-Speech was made from Qwen3-8B.

    ModelConfig and tensors in, both out. `codes` is the size of the codec's table, its end id comes behind; `words` keeps
    so many text ids (0 = all); a tied head becomes a copy. Audio embedding and head are N(0, 0.02); text logits are unchanged.
    """
    text, shared = config.table.streams[0], config.temporal.layers - tail
    words, rows = words or text.vocab, -(-(codes + 1) // 128) * 128
    if config.table.audio or config.depth or config.tail or len(config.table.streams) > 1:
        raise ValueError("only a text model can be split, this one has audio rows; give a Qwen2 or Qwen3 checkpoint")
    if tail < 1 or shared < 1:
        raise ValueError(f"--tail={tail} does not fit {config.temporal.layers} layers; give 1 to {config.temporal.layers - 1}")
    if not 0 <= audio_start < words <= text.vocab or codes < 1:
        raise ValueError(f"id {audio_start} that opens speech must lie below {words} kept text ids, of {text.vocab} in the model, "
                         + "and --codes above 0; give --tokenizer, or other --words")
    stop = tuple(i for i in config.table.stop if i < words)
    table = StreamTable((replace(text, vocab=words, classes=words), *codebooks(1, rows, rows, -1, codes)), "moss",
                        audio_start=audio_start, stop=stop)
    made = {"embed.text.weight": weights["embed.text.weight"][:words],
            "text_head.weight": weights["embed.text.weight" if config.tied else "text_head.weight"][:words]}
    for name, tensor in weights.items():
        if name.startswith("temporal.layers."):
            number, rest = name.removeprefix("temporal.layers.").split(".", 1)
            own = int(number) - shared
            made |= {name: tensor} if own < 0 else {f"temporal.{side}_tail.{own}.{rest}": tensor for side in ("text", "audio")}
    made |= {f"temporal.{side}_norm.weight": weights["temporal.norm.weight"] for side in ("text", "audio")}
    draw = torch.Generator().manual_seed(seed)
    for name in ("embed.audio.weight", "audio_head.weight"):
        made[name] = 0.02 * torch.randn(rows, config.temporal.dim, generator=draw)
    return replace(config, table=table, temporal=replace(config.temporal, layers=shared), tail=tail, tied=False), made


def split_from_qwen(model: Any, tail: int | str = 4, codes: int | str = 16384, words: int | str = 0, tokenizer: str = "",
                    seed: int = 0) -> tuple[ModelConfig, Tensors, dict[str, Any] | None]:
    """`checkpoint.py split-from-qwen`: `split_tails` of a loaded text model, the id that opens speech read off its tokenizer."""
    numbers = {"tail": tail, "codes": codes, "words": words}
    for name, value in numbers.items():
        if not str(value).isdecimal():
            raise ValueError(f"--{name}={value} is no whole number; give one")
    extras = model.extras
    beside = [(extras.data or {}).get("tokenizer", ""), Path(extras.folder) / "tokenizer.json"] if extras.folder else []
    tokenizer = tokenizer or next((path for path in beside if locate(path).is_file()), "")
    start = token_ids(load_tokenizer(tokenizer), (SOSP,), "Qwen")[SOSP] if tokenizer else MOSS_9B.table.audio_start
    config, tensors = split_tails(model.config, model.weights(), int(tail), int(codes), start, int(words), seed)
    return config, tensors, {"tokenizer": str(tokenizer)} if tokenizer else None


RULES = {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_frames": 10, "max_frames": 1000}      # of the official generation script
FAMILIES = (Family(
    "MOSS-Speech", "moss", "MOSS-Speech 9B: spoken conversations by turns", chat_grid, TEMPLATE, rules=lambda table: RULES,
    companions={"codec": "fnlp/MOSS-Speech-Codec"}, user_audio="turns",
    formats=(Format("moss", "hf", lambda c: NAMES, read_moss, write_moss, lambda c: c.tail > 0, by_model_type("moss_speech"), drop_buffers,
                    shards=True, peft=True),),
    conversions=(Conversion("split-from-qwen", """split-from-qwen CKPT --out=DIR    a model of MOSS-Speech's shape out of a text model:
    --tail=4 layers a side, --codes=16384 ids of the codec, --words=N keeps N text ids, --tokenizer=FILE""",
                            split_from_qwen, options=("tail", "codes", "words", "tokenizer")),)),)
