"""Official layouts: one table of names and one pair of config translations for each, used in both directions.

    format  model_type (or mark) of config.json    what else is read
    qwen    qwen2, qwen3                           tied or untied heads
    higgs   higgs_audio_v2 (transformers)          with or without the text head
    boson   higgs_audio (first release)            split frozen | trainable tensors, heads written twice
    moss    moss_speech
    moshi   n_q and dep_q (flat keyword list)      attention fused in one tensor, or one tensor a step
    moshi_hf  moshi (transformers)                 q and k turned the other way; the codec in it is left to audio/
    dsaa    the same, and text_llm                 the text model's weights stay where text_llm says

A rule is (our name, their name). {n} {x} {p} stand for the same text on both sides; {k} on their side counts tensors
that we keep in one, rows above each other or, in a depth transformer, stacked by step. Our parameters drive both ways:
import looks up the names that a parameter is made of, export cuts the parameter into them, and what is left over on
either side is an error. A config that its official layout cannot express is refused by name. Only checkpoint.py
imports this file; the two are all that has heard official names. Sources: transformers 5.23 (qwen2, qwen3,
higgs_audio_v2), boson-multimodal 0.1.1, moshi 0.2.13, the released config and index of MOSS-Speech, peft 0.21.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import lora
from lora import LoraConfig
from model import HIGGS_V2_3B, MOSHI_7B, MOSS_9B, FusionConfig, ModelConfig, MultistreamLM, StackConfig, codebooks
from options import difference, from_json, to_json
from streams import Stream, StreamTable

Rules = tuple[tuple[str, str], ...]
Tensors = dict[str, Tensor]
About = dict[str, Any]                  # what a config.json says


# ---- names ----

BLOCK = (("attn_norm.weight", "input_layernorm.weight"), ("ffn_norm.weight", "post_attention_layernorm.weight"),
         ("audio_attn_norm.weight", "audio_input_layernorm.weight"), ("audio_ffn_norm.weight", "audio_post_attention_layernorm.weight"),
         ("attn.{x}.{p}", "self_attn.{x}_proj.{p}"), ("attn.{x}_norm.weight", "self_attn.{x}_norm.weight"),
         ("ffn.{x}.weight", "mlp.{x}_proj.weight"), ("audio_ffn.{x}.weight", "audio_mlp.{x}_proj.weight"))


def stack(ours: str, theirs: str, block: Rules = BLOCK) -> Rules:
    return tuple((f"{ours}.{{n}}.{a}", f"{theirs}.{{n}}.{b}") for a, b in block)


QWEN = (("embed.text.weight", "model.embed_tokens.weight"), *stack("temporal.layers", "model.layers"),
        ("temporal.norm.weight", "model.norm.weight"), ("text_head.weight", "lm_head.weight"))
HIGGS = (("embed.text.weight", "model.embed_tokens.weight"), *stack("temporal.layers", "model.layers"),
         ("temporal.norm.weight", "model.norm.weight"), ("text_head.weight", "text_lm_head.weight"),
         ("embed.audio.weight", "model.embed_audio_tokens.embed_audio_tokens.weight"), ("audio_head.weight", "audio_lm_head.weight"))
BOSON = (("embed.text.weight", "embed_tokens.weight"), *stack("temporal.layers", "layers"),
         ("temporal.norm.weight", "norm.weight"), ("text_head.weight", "audio_decoder_proj.text_lm_head.weight"),
         ("embed.audio.weight", "audio_codebook_embeddings.weight"), ("audio_head.weight", "audio_decoder_proj.audio_lm_head.weight"))
MOSS = (("embed.text.weight", "model.embed_tokens.weight"), ("embed.audio.weight", "model.audio_embed.weight"),
        *stack("temporal.layers", "model.shared_block.layers"), *stack("temporal.text_tail", "model.text_block.layers"),
        *stack("temporal.audio_tail", "model.audio_block.layers"), ("temporal.{x}_norm.weight", "model.{x}_norm.weight"),
        ("{x}_head.weight", "{x}_lm_head.weight"))
CONDITION, VOICES = "condition_provider.conditioners", "speaker_wavs"
MOSHI = (("embed.text.weight", "text_emb.weight"), ("embed.audio.weight", "emb.{k}.weight"),
         *stack("temporal.layers", "transformer.layers", (
             ("attn_norm.weight", "norm1.alpha"), ("ffn_norm.weight", "norm2.alpha"),
             ("attn.qkv.weight", "self_attn.in_projs.0.weight"), ("attn.o.weight", "self_attn.out_projs.0.weight"),
             ("ffn.gate_up.weight", "gating.linear_in.weight"), ("ffn.down.weight", "gating.linear_out.weight"))),
         *stack("depth.layers", "depformer.layers", (
             ("attn_norm.weight", "norm1.alpha"), ("ffn_norm.weight", "norm2.alpha"),
             ("attn.qkv.weight", "self_attn.in_projs.{k}.weight"), ("attn.o.weight", "self_attn.out_projs.{k}.weight"),
             ("ffn.gate_up.weight", "gating.{k}.linear_in.weight"), ("ffn.down.weight", "gating.{k}.linear_out.weight"))),
         ("temporal.norm.weight", "out_norm.alpha"), ("text_head.weight", "text_linear.weight"),
         ("depth.text.weight", "depformer_text_emb.weight"), ("depth.audio.weight", "depformer_emb.{k}.weight"),
         ("depth.input.weight", "depformer_in.{k}.weight"), ("depth.head.weight", "linears.{k}.weight"),
         ("extra_head.weight", "extra_heads.{k}.weight"), ("voice.out.weight", f"{CONDITION}.{VOICES}.output_proj.weight"),
         ("voice.none", f"{CONDITION}.{VOICES}.learnt_padding"),
         *stack("temporal.layers", "transformer.layers", (("listen.norm.{p}", "norm_cross.{p}"),
             ("listen.qkv.weight", "cross_attention.in_projs.0.weight"), ("listen.o.weight", "cross_attention.out_projs.0.weight"))),
         ("depth.audio.out.weight", "depformer_emb.{k}.low_rank.weight"), ("depth.text.out.weight", "depformer_text_emb.low_rank.weight"),
         ("embed.condition_{c}.weight", f"{CONDITION}.{{c}}.embed.weight"),
         ("embed.condition_{c}.none", f"{CONDITION}.{{c}}.learnt_padding"),
         ("embed.condition_{c}.out.weight", f"{CONDITION}.{{c}}.output_proj.weight"))
MOSHI_HF = (("embed.text.weight", "decoder.model.embed_tokens.weight"), ("embed.audio.weight", "embed_tokens.{k}.weight"),
            *(rule for ours, theirs in (("temporal.layers", "decoder.model.layers"), ("depth.layers", "depth_decoder.layers"))
              for rule in stack(ours, theirs, (
                  ("attn_norm.weight", "input_layernorm.weight"), ("ffn_norm.weight", "post_attention_layernorm.weight"),
                  ("attn.qkv.weight", "self_attn.qkv_proj.linear.weight"), ("attn.o.weight", "self_attn.o_proj.linear.weight"),
                  ("ffn.gate_up.weight", "mlp.fc1.weight"), ("ffn.down.weight", "mlp.fc2.weight")))),
            ("temporal.norm.weight", "decoder.model.norm.weight"), ("text_head.weight", "decoder.lm_head.weight"),
            ("depth.text.weight", "depth_decoder.text_embed_tokens.weight"),
            ("depth.audio.weight", "depth_decoder.embed_tokens.{k}.weight"),
            ("depth.input.weight", "depth_decoder.input_projections.weight"), ("depth.head.weight", "depth_decoder.lm_heads.weight"))
ALL_STEPS = "depth_decoder."                       # transformers keeps all depth steps in one tensor, as we do
DEMUX = (("embed.text.out.weight", "text_emb.out{K}.weight"), ("depth.text.out.weight", "depformer_text_emb.out{K}.weight"))
UNREAD = "depformer_text_emb.low_rank.weight"      # moshi makes it beside out1 and out2 and never uses it
PROJECTED = (("norm", "norm"), ("up", "fc1"), ("down", "fc2"), ("skip", "skip"))
DSAA = (*(rule for rule in MOSHI if rule[0] not in ("embed.text.weight", "depth.text.weight", "depth.input.weight", "text_head.weight")),
        ("text_head.weight", "text_head.weight"), ("text_projector.scale", "text_projector.alpha"),
        *((f"text_projector.{ours}.{{p}}", f"text_projector.fusion.{n}.{{p}}") for ours, n in (("norm", 0), ("up", 1), ("down", 4))),
        ("depth.text.weight", "depformer_text_emb.emb.weight"), ("depth.text_map.{p}", "depformer_text_proj.{p}"),
        *((f"depth.input.{ours}.{{p}}", f"depformer_projectors.{{k}}.{theirs}.{{p}}") for ours, theirs in PROJECTED))
WILD = {"{n}": r"(?P<n>\d+)", "{x}": "(?P<x>[a-z]+)", "{c}": r"(?P<c>\w+)", "{p}": "(?P<p>weight|bias)"}


def pieces(name: str, shape: torch.Size, config: ModelConfig, rules: Rules) -> list[str]:
    """Their names of what one of our parameters is made of, in order."""
    for ours, theirs in (*(DEMUX if config.demux else ()), *rules):
        pattern = re.escape(ours).replace(r"\{", "{").replace(r"\}", "}")
        for mark, group in WILD.items():
            pattern = pattern.replace(mark, group)
        if match := re.fullmatch(pattern, name):
            named = theirs.format(**match.groupdict(), k="{k}", K="{K}")
            codes = config.table.streams[config.table.audio[0]].vocab if config.table.audio else 1
            whole = len(shape) == 3 and named.startswith(ALL_STEPS)
            count = 1 if whole else shape[0] if len(shape) == 3 else shape[0] // codes if "{k}" in named else 1
            return [named.format(k=k, K=k + 1) for k in range(count)]
    raise ValueError(f"{name} has no counterpart in this layout; the model is of another family")


def cut(tensor: Tensor, names: list[str]) -> list[Tensor]:
    """Cut one of our parameters into their tensors."""
    if names[0].endswith((".alpha", ".learnt_padding")):
        return [tensor.view(1, 1, -1) if tensor.dim() else tensor]
    return list(tensor) if tensor.dim() == 3 and not names[0].startswith(ALL_STEPS) else list(tensor.chunk(len(names)))


def glue(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Undo `cut`."""
    return torch.stack(parts) if parts[0].dim() < len(shape) else torch.cat(parts).view(shape) if shape else parts[0]


# ---- tensors ----

def to_ours(layout: "Layout", wanted: Tensors, config: ModelConfig, tensors: Tensors, source: str) -> Tensors:
    """Rename and join official tensors into our parameters, strictly: ValueError lists what is missing, left over or misshapen."""
    left, result, missing = layout.tidy(tensors, config), {}, []
    for name, target in wanted.items():
        names = pieces(name, target.shape, config, layout.rules)
        missing += [n for n in names if n not in left]
        parts = [left.pop(n) for n in names if n in left]
        for official, part, like in zip(names, parts, cut(target, names), strict=len(parts) == len(names)):
            if part.shape != like.shape:
                raise ValueError(f"{source}: {official} is {tuple(part.shape)}, its config wants {tuple(like.shape)}; "
                                 + "check that weights and config.json belong together")
        if len(parts) == len(names):
            result[name] = glue(parts, target.shape)
    if missing or left:
        raise ValueError(f"{source} does not fit its config.json ({layout.name}): {len(missing)} tensors missing {sorted(missing)[:3]}, "
                         + f"{len(left)} unexpected {sorted(left)[:3]}; fetch all its files again")
    return result


def to_theirs(layout: "Layout", tensors: Tensors, config: ModelConfig) -> Tensors:
    """Cut our parameters into official tensors."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        names = pieces(name, tensor.shape, config, layout.rules)
        result |= dict(zip(names, cut(tensor, names), strict=True))
    return layout.finish(result, config)


def same(tensors: Tensors, name: str, copy: str) -> None:
    """Forget a tensor that is written twice."""
    if copy in tensors and name in tensors:
        if not torch.equal(tensors[name], tensors[copy]):
            raise ValueError(f"{copy} differs from {name}, its config says that they are one; fetch the files again")
        del tensors[copy]


def tidy_qwen(tensors: Tensors, config: ModelConfig) -> Tensors:
    kept = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tied:
        same(kept, "model.embed_tokens.weight", "lm_head.weight")
    return kept


def tidy_boson(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Join what partial training split in two (frozen rows first) and give each tensor its one name."""
    kept = {n: t for n, t in tensors.items() if not n.endswith(("rotary_emb.inv_freq", "audio_codebook_weights"))}
    for name in [n for n in kept if re.search(r"\.(embedding|linear)_frozen\.weight$", n)]:
        rest = name.replace("_frozen.", "_trainable.")
        if rest in kept:
            kept[re.sub(r"(embedding|linear)_frozen\.", "", name)] = torch.cat([kept.pop(name), kept.pop(rest)])
    for head in ("audio_lm_head.weight", "text_lm_head.weight"):
        same(kept, f"audio_decoder_proj.{head}", head)
        if head in kept:
            kept[f"audio_decoder_proj.{head}"] = kept.pop(head)
    return kept


def tidy_moshi(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Split attention that is fused over the depth steps: (steps * 3D, D) -> one tensor a step. What moshi never uses is left out."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if config.demux and name.startswith(UNREAD.removesuffix("weight")):
            continue
        match = re.fullmatch(r"(.+\.(?:in|out)_proj)(?:[._]weight|(\.lora_[AB]\.weight))", name)
        if match is None:
            result[name] = tensor
            continue
        sets = weight_sets(config.depth) if name.startswith("depformer.") and config.depth else 1
        result |= {f"{match[1]}s.{k}{match[2] or '.weight'}": part for k, part in enumerate(tensor.chunk(sets))}
    return result


def fuse_moshi(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Write attention as the released files do: fused over the depth steps. What moshi wants and never uses is zero."""
    if config.demux and config.depth and config.depth.low_rank and "depformer_text_emb.weight" in tensors:
        tensors = tensors | {UNREAD: tensors["depformer_text_emb.weight"].new_zeros(config.depth.dim, config.depth.low_rank)}
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        fused = re.sub(r"in_projs\.\d+\.weight$", "in_proj_weight", name)
        groups.setdefault(re.sub(r"out_projs\.\d+\.weight$", "out_proj.weight", fused), []).append(tensor)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in groups.items()}


def tidy_dsaa(tensors: Tensors, config: ModelConfig) -> Tensors:
    """As Moshi; norms and biases of the projectors get the axis that theirs are stacked along."""
    return {n: t[None] if t.dim() == 1 and n.startswith("depformer_projectors.") else t for n, t in tidy_moshi(tensors, config).items()}


def split_dsaa(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Undo `tidy_dsaa`; the reference keeps attention one tensor a step."""
    return {n: t[0] if len(t.shape) == 2 and n.startswith("depformer_projectors.") and (n.endswith("bias") or ".norm." in n) else t
            for n, t in tensors.items()}


def tidy_moshi_hf(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Join q, k and v, whose pairs of RoPE lie in halves here and side by side there; the codec is loaded on its own."""
    left, result = {n: t for n, t in tensors.items() if not n.startswith("audio_encoder.")}, {}
    for name in [n for n in left if ".q_proj." in n]:
        q, k, v = (left.get(name.replace("q_proj", f"{x}_proj")) for x in "qkv")
        if k is None or v is None:
            continue                                       # q is left over, and named
        if not name.startswith(ALL_STEPS):
            q, k = (t.unflatten(0, (-1, 2, config.temporal.head // 2)).transpose(1, 2).flatten(0, 2) for t in (q, k))
        result[name.replace("q_proj", "qkv_proj")] = torch.cat([q, k, v], -2)
        for x in "qkv":
            del left[name.replace("q_proj", f"{x}_proj")]
    return left | result


def split_moshi_hf(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Undo `tidy_moshi_hf`."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if ".qkv_proj." not in name:
            result[name] = tensor
            continue
        q, k, v = tensor.chunk(3, -2)
        if not name.startswith(ALL_STEPS):
            q, k = (t.unflatten(0, (-1, config.temporal.head // 2, 2)).transpose(1, 2).flatten(0, 2) for t in (q, k))
        result |= {name.replace("qkv_proj", f"{x}_proj"): t for x, t in zip("qkv", (q, k, v), strict=True)}
    return result


def weight_sets(c: StackConfig) -> int:
    return len(set(c.schedule)) or c.steps


# ---- config.json ----

def refuse(about: About, allowed: dict[str, tuple[Any, ...]]) -> None:
    """ValueError when a field has a value that we cannot compute; the first allowed value stands for an absent field."""
    for key, values in allowed.items():
        if about.get(key, values[0]) not in values:
            raise ValueError(f"config.json has {key} = {about[key]!r}, this code reads {' or '.join(map(repr, values))} only")


PLAIN = {"attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False, None), "quantization_config": (None,)}


def llama(about: About, layers: int, eps: float, **more: Any) -> StackConfig:
    """Read the Llama-like stack of a transformers config, old or new way of writing RoPE; absent fields have their class defaults."""
    refuse(about, PLAIN)
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}
    refuse({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, {"rope_type": ("default", "llama3")})
    scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    heads, dim = about["num_attention_heads"], about["hidden_size"]
    kv, head = about.get("num_key_value_heads") or heads, about.get("head_dim") or 0
    return StackConfig(
        dim=dim, layers=layers, heads=heads, kv_heads=kv if kv != heads else 0, head_dim=head if head * heads != dim else 0,
        ffn=about["intermediate_size"], activation=about.get("hidden_act", "silu"), norm_eps=about.get("rms_norm_eps", eps),
        rope_theta=float(rope.get("rope_theta", about.get("rope_theta", 10000.0))),
        rope_scaling=tuple(float(rope[key]) for key in scaling) if "factor" in rope else (), **more)


def write_llama(c: ModelConfig, layers: int, dtype: str) -> About:
    """The fields that every transformers config of a Llama-like stack has, in the way that old and new versions read."""
    s = c.temporal
    names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = dict(zip(names, ("llama3", *s.rope_scaling[:3], int(s.rope_scaling[3])), strict=True)) if s.rope_scaling else None
    return {"hidden_size": s.dim, "intermediate_size": s.ffn, "num_hidden_layers": layers, "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv, "head_dim": s.head, "hidden_act": s.activation, "rms_norm_eps": s.norm_eps,
            "rope_theta": s.rope_theta, "rope_scaling": scaling, "tie_word_embeddings": c.tied, "vocab_size": c.table.streams[0].vocab,
            "attention_bias": False, "attention_dropout": 0.0, "use_cache": True, "torch_dtype": dtype}


def ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def read_qwen(about: About, tensors: Tensors) -> ModelConfig:
    kind, words = about["model_type"], about["vocab_size"]
    second = kind == "qwen2"
    table = StreamTable((Stream("text", "text", words, words),), kind, stop=ids(about.get("eos_token_id")))
    return ModelConfig(table, llama(about, about["num_hidden_layers"], 1e-6, qkv_bias=second, qk_norm=not second),
                       tied=about.get("tie_word_embeddings", False))


def write_qwen(c: ModelConfig, dtype: str) -> About:
    kind = "qwen2" if c.temporal.qkv_bias else "qwen3"
    return {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, **write_llama(c, c.temporal.layers, dtype),
            "eos_token_id": list(c.table.stop) or None, "max_position_embeddings": 32768, "use_sliding_window": False}


def higgs_table(about: About, vocab: int, count: int, size: int, start: int, stop: tuple[int, ...], head: bool) -> StreamTable:
    """One text row and `count` codebooks, each one column behind the one before; without a text head the text is only read."""
    known = HIGGS_V2_3B.table
    end = about.get("audio_eos_token_id", known.audio_end if known.audio_end < vocab else None)      # transformers has no field for it
    rows = codebooks(count, size, size, about["audio_stream_bos_id"], about["audio_stream_eos_id"], range(count))
    return replace(known, streams=(Stream("text", "text", vocab, vocab if head else 0), *rows), audio_start=start,
                   audio_end=-1 if end is None else end, stop=stop)


def read_higgs(about: About, tensors: Tensors) -> ModelConfig:
    table = higgs_table(about, about["vocab_size"], about["num_codebooks"], about["codebook_size"], about["audio_bos_token_id"],
                        ids(about.get("eos_token_id")), "text_lm_head.weight" in tensors)
    layers = about["num_hidden_layers"]
    refuse(about, {"tie_word_embeddings": (False,)})
    return ModelConfig(table, llama(about, layers, 1e-5), dual_ffn=tuple(range(layers)))


def placeholder(official: int, vocab: int, place: int) -> int:
    """A text id that never reaches our grid: the official one, or one from the end of a small vocabulary."""
    return official if official < vocab else vocab - place


def write_higgs(c: ModelConfig, dtype: str) -> About:
    """transformers wants the text head by hand: from_pretrained(dir, use_text_head=True)."""
    first, vocab, rope = c.table.streams[1], c.table.streams[0].vocab, write_llama(c, c.temporal.layers, dtype)
    parameters = {**(rope.pop("rope_scaling") or {"rope_type": "default"}), "rope_theta": rope.pop("rope_theta")}
    return {"architectures": ["HiggsAudioV2ForConditionalGeneration"], "model_type": "higgs_audio_v2", **rope,
            "rope_parameters": parameters, "num_codebooks": len(c.table.audio), "codebook_size": first.vocab,
            "audio_stream_bos_id": first.start, "audio_stream_eos_id": first.end,
            "audio_bos_token_id": c.table.audio_start, "audio_eos_token_id": c.table.audio_end if c.table.audio_end >= 0 else None,
            "audio_token_id": placeholder(128016, vocab, 1), "audio_delay_token_id": placeholder(128014, vocab, 2), "mlp_bias": False,
            "eos_token_id": list(c.table.stop) or None, "bos_token_id": 1, "pad_token_id": placeholder(128001, vocab, 3),
            "max_position_embeddings": 131072}


def read_boson(about: About, tensors: Tensors) -> ModelConfig:
    refuse(about, {"use_delay_pattern": (True,), "audio_embed_avg": (False,), "use_audio_out_embed_projector": (False,),
                   "use_audio_out_self_attention": (False, 0, None), "use_rq_transformer": (False,), "skip_audio_tower": (True,),
                   "audio_decoder_proj_num_layers": (0,), "audio_adapter_type": ("dual_ffn", "dual_ffn_fast_forward", "stack")})
    text, kind = about["text_config"], about["audio_adapter_type"]
    table = higgs_table(about, text["vocab_size"], about["audio_num_codebooks"], about["audio_codebook_size"] + 2,
                        about["audio_out_bos_token_id"], ids(text.get("eos_token_id")) or HIGGS_V2_3B.table.stop, True)
    dual = tuple(sorted(about.get("audio_dual_ffn_layers") or ())) if kind != "stack" else ()
    fast = kind == "dual_ffn_fast_forward" and len(dual) < text["num_hidden_layers"]
    return ModelConfig(table, llama(text, text["num_hidden_layers"], 1e-6), dual_ffn=dual, fast_forward=fast)


def write_boson(c: ModelConfig, dtype: str) -> About:
    first, vocab = c.table.streams[1], c.table.streams[0].vocab
    text = {**write_llama(c, c.temporal.layers, dtype), "model_type": "llama", "mlp_bias": False,
            "eos_token_id": list(c.table.stop) or None, "max_position_embeddings": 131072}
    kind = "stack" if not c.dual_ffn else "dual_ffn_fast_forward" if c.fast_forward or len(c.dual_ffn) == c.temporal.layers else "dual_ffn"
    return {"architectures": ["HiggsAudioModel"], "model_type": "higgs_audio", "text_config": text, "audio_adapter_type": kind,
            "audio_dual_ffn_layers": list(c.dual_ffn), "audio_num_codebooks": len(c.table.audio), "audio_codebook_size": first.vocab - 2,
            "audio_ffn_hidden_size": c.temporal.dim, "audio_ffn_intermediate_size": c.temporal.ffn, "audio_embed_avg": False,
            "audio_stream_bos_id": first.start, "audio_stream_eos_id": first.end, "audio_decoder_proj_num_layers": 0,
            "audio_in_token_idx": placeholder(128015, vocab, 1), "audio_out_token_idx": placeholder(128016, vocab, 2),
            "audio_out_bos_token_id": c.table.audio_start, "audio_eos_token_id": c.table.audio_end if c.table.audio_end >= 0 else None,
            "pad_token_id": placeholder(128001, vocab, 3), "use_delay_pattern": True, "skip_audio_tower": True,
            "encode_whisper_embed": False, "encode_audio_in_tokens": True,
            "use_audio_out_embed_projector": False, "use_rq_transformer": False,
            "hidden_size": c.temporal.dim, "torch_dtype": dtype}


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


NORMS = {"rms_norm_f32": 1e-8, "rms_norm": 1e-5}       # the first computes in fp32 whatever the model's type, as ours does
MOSHI_PLAIN = {
    "layer_scale": (None,), "kv_repeat": (1,), "causal": (True,), "norm_emb": (False,), "bias_proj": (False,),
    "quantize": (False,), "depformer_norm": (None,), "depformer_layer_scale": (None,)}


def read_moshi(about: About, tensors: Tensors) -> ModelConfig:
    refuse(about, MOSHI_PLAIN)
    # these are read, but what the class does without them is not what we compute
    refuse({"gating": "none", "norm": "layer_norm", "positional_embedding": "sin", **about},
           {"gating": ("silu",), "norm": tuple(NORMS), "positional_embedding": ("rope", "none")})
    steps, count, card, text, delays = about["dep_q"], about["n_q"], about["card"], about["text_card"], about["delays"]
    if len(delays) != count + 1:
        raise ValueError(f"config.json has {len(delays)} delays for {count + 1} streams; restore it")
    demux = bool(about.get("demux_second_stream", about.get("demux_second_text_stream", False)))
    table = replace(MOSHI_7B.table, streams=(
        Stream("text", "text", text + 1, about.get("text_card_out") or text, delays[0], text),
        *([Stream("ahead", "text", text + 1, delay=delays[0])] if demux else []), *moshi_conditions(about),
        *codebooks(steps, card + 1, card, card, delays=tuple(delays[1 : 1 + steps])),
        *codebooks(count - steps, card + 1, 0, card, delays=tuple(delays[1 + steps :]), name="user")),
        pad=about.get("existing_text_padding_id", 3), epad=about.get("existing_text_end_padding_id", 0))
    return ModelConfig(table, moshi_stack(about), depth=moshi_depth(about) if steps else None, demux=demux,
                       extra_heads=about.get("extra_heads_num_heads", 0), extra_classes=about.get("extra_heads_dim", 6),
                       **moshi_voice(about))


def moshi_voice(about: About) -> dict[str, Any]:
    """Cross-attention to the features of voices: the `tensor` conditioner that the fuser calls cross."""
    fuser, found = about.get("fuser") or {}, about.get("conditioners") or {}
    cross = fuser.get("cross") or []
    refuse(fuser, {"cross": ([], [VOICES], None)})
    if bool(about.get("cross_attention")) != bool(cross):
        raise ValueError(f"config.json has cross_attention = {about.get('cross_attention')!r} and cross = {cross!r}; restore it")
    if not cross:
        return {}
    refuse(found[VOICES], {"type": ("tensor",)})
    refuse(found[VOICES]["tensor"], {"force_linear": (True,), "learn_padding": (True,), "output_bias": (False,)})
    places = float(fuser.get("cross_attention_pos_emb_scale", 1.0)) if fuser.get("cross_attention_pos_emb") else 0.0
    return {"voice": found[VOICES]["tensor"]["dim"], "voice_places": places}


def moshi_conditions(about: About) -> list[Stream]:
    """A row for each conditioner: lookup tables whose sum is added to every column."""
    found, fuser = about.get("conditioners") or {}, about.get("fuser") or {}
    refuse(fuser, {"prepend": ([], None)})
    used = sorted([*fuser.get("sum", []), *(fuser.get("cross") or [])])
    if used != sorted(found):
        raise ValueError(f"config.json has conditioners {sorted(found)}, of which {used} are fused; wanted all")
    rows = []
    for name in fuser.get("sum", []):
        refuse(found[name], {"type": ("lut",)})
        lut = found[name]["lut"]
        refuse(lut, {"tokenizer": ("noop",), "force_linear": (True,), "learn_padding": (True,), "output_bias": (False,)})
        bins = lut["n_bins"]
        rows.append(Stream(name, "condition", bins + 1, start=bins, rank=lut["dim"], values=tuple(lut.get("possible_values") or ())))
    return rows


def moshi_stack(about: About) -> StackConfig:
    dim, rope = about["dim"], about["positional_embedding"] == "rope"
    return StackConfig(dim=dim, layers=about["num_layers"], heads=about["num_heads"], norm_eps=NORMS[about["norm"]],
                       ffn=moshi_width(int(about["hidden_scale"] * dim), dim), window=about.get("context") or 0, packed=True,
                       rope_theta=float(about.get("max_period", 10000)) if rope else 0.0, rope_interleaved=True)


def moshi_depth(about: About) -> StackConfig:
    refuse({"depformer_multi_linear": False, "depformer_weights_per_step": False, "depformer_pos_emb": "sin", **about},
           {"depformer_multi_linear": (True,), "depformer_weights_per_step": (True,), "depformer_gating": ("silu",),
            "depformer_pos_emb": ("none",)})
    dim = about["depformer_dim"]
    inner = about.get("depformer_dim_feedforward") or int(about["hidden_scale"] * dim)
    if isinstance(inner, list) and len(set(inner)) == 1:
        inner = inner[0]
    if not isinstance(inner, int):
        raise ValueError("config.json has a depformer_dim_feedforward for each step, this code reads one width only")
    return StackConfig(dim=dim, layers=about["depformer_num_layers"], heads=about["depformer_num_heads"], ffn=moshi_width(inner, dim),
                       norm_eps=NORMS[about["norm"]], rope_theta=0.0, packed=True, steps=about["dep_q"],
                       schedule=tuple(about.get("depformer_weights_per_step_schedule") or ()),
                       low_rank=about.get("depformer_low_rank_embeddings") or 0)


def moshi_width(outer: int, dim: int) -> int:
    """Inner width of moshi's gated network: two thirds of what its config says, with an exception at exactly 4 D."""
    return 21 * dim // 8 if outer == 4 * dim else 2 * outer // 3


def moshi_outer(inner: int, dim: int) -> int:
    """Undo `moshi_width`; ValueError for a width that moshi cannot have."""
    found = [outer for outer in ((3 * inner + 1) // 2, (3 * inner + 1) // 2 + 1, 4 * dim) if moshi_width(outer, dim) == inner]
    if not found:
        raise ValueError(f"moshi has no feed-forward network of inner width {inner} at width {dim}; use another ffn")
    return found[0]


def write_moshi(c: ModelConfig, dtype: str) -> About:
    s, d, streams = c.temporal, c.depth, c.table.streams
    outer = moshi_outer(s.ffn, s.dim)
    scale = next(x for x in (outer / s.dim, (outer + 0.5) / s.dim) if int(x * s.dim) == outer)
    about = {
        "dim": s.dim, "num_layers": s.layers, "num_heads": s.heads, "hidden_scale": scale, "gating": "silu", "causal": True,
        "norm": next((n for n, eps in NORMS.items() if eps == s.norm_eps), "rms_norm_f32"), "layer_scale": None,
        "context": s.window or None, "positional_embedding": "rope" if s.rope_theta else "none", "max_period": s.rope_theta or 10000.0,
        "n_q": len(c.table.audio), "dep_q": len(c.table.audio_out), "card": streams[-1].vocab - 1, "text_card": streams[0].vocab - 1,
        "existing_text_padding_id": c.table.pad, "existing_text_end_padding_id": c.table.epad,
        "delays": [streams[0].delay, *(streams[k].delay for k in c.table.audio)], "lora": False,
        "depformer_multi_linear": True,       # without a depth transformer too: false makes one input map that nothing reads
        "model_type": "stt" if d is None else "tts" if c.demux or c.voice else "hibiki" if c.table.conditions else "moshi"}
    if streams[0].classes != streams[0].vocab - 1:
        about["text_card_out"] = streams[0].classes
    if c.demux:
        about["demux_second_stream"] = True
    if c.extra_heads:
        about |= {"extra_heads_num_heads": c.extra_heads, "extra_heads_dim": c.extra_classes}
    if rows := [streams[k] for k in c.table.conditions]:
        about["conditioners"] = {x.name: {"type": "lut", "lut": {
            "n_bins": x.vocab - 1, "dim": x.rank, "tokenizer": "noop", "possible_values": list(x.values) or None}} for x in rows}
    if c.voice:
        about["cross_attention"] = True
        about["conditioners"] = {VOICES: {"type": "tensor", "tensor": {"dim": c.voice}}} | about.get("conditioners", {})
    if "conditioners" in about:
        about["fuser"] = {"sum": [x.name for x in rows], "prepend": [], "cross": [VOICES] if c.voice else [],
                          "cross_attention_pos_emb": c.voice_places > 0, "cross_attention_pos_emb_scale": c.voice_places or 1}
    if d is not None:
        about |= {
            "depformer_dim": d.dim, "depformer_dim_feedforward": moshi_outer(d.ffn, d.dim), "depformer_num_heads": d.heads,
            "depformer_num_layers": d.layers, "depformer_layer_scale": None, "depformer_gating": "silu",
            "depformer_pos_emb": "none", "depformer_weights_per_step": True,
            "depformer_weights_per_step_schedule": list(d.schedule) or None}
        if d.low_rank:
            about["depformer_low_rank_embeddings"] = d.low_rank
    return about


def read_dsaa(about: About, tensors: Tensors) -> ModelConfig:
    """As Moshi, with the text model's vocabulary; text_llm says which model that is, and how it is fused."""
    llm, steps = about["text_llm"], about["dep_q"]
    tower, V = from_json(ModelConfig, llm["model"], "text_llm.model"), tensors["text_head.weight"].shape[0]
    base = read_moshi(about, tensors)
    start, pad = about.get("existing_bos_id"), about["existing_text_padding_id"]
    first = replace(base.table.streams[0], vocab=V, classes=V, start=V if start is None else start)
    fusion = FusionConfig(tower, str(llm.get("hf_repo_id") or ""), str(llm.get("revision") or ""),
                          hidden=tensors["text_projector.fusion.1.weight"].shape[0],
                          **{k: llm[k] for k in ("rate", "dropout", "split_norm") if k in llm})
    if fusion.tower.table.streams[0].vocab != V or steps != len(base.table.audio_out):
        raise ValueError(f"text_llm has {fusion.tower.table.streams[0].vocab} ids, text_head {V}; name the text model it was made with")
    table = replace(base.table, streams=(first, *base.table.streams[1:]), pad=pad, epad=about.get("existing_text_end_padding_id", pad))
    return replace(base, table=table, fusion=fusion)


def write_dsaa(c: ModelConfig, dtype: str) -> About:
    fusion, text = c.fusion, c.table.streams[0]
    llm = {"hf_repo_id": fusion.source, "revision": fusion.revision, "model": to_json(fusion.tower), "rate": fusion.rate,
           "dropout": fusion.dropout, "split_norm": fusion.split_norm}
    return write_moshi(replace(c, fusion=None), dtype) | {
        "text_card": text.classes, "existing_bos_id": text.start, "existing_text_padding_id": c.table.pad,
        "existing_text_end_padding_id": c.table.epad, "moshi_name": "dsaa.safetensors", "text_llm": llm}


def read_moshi_hf(about: About, tensors: Tensors) -> ModelConfig:
    """transformers has Moshi as published: equal codebooks of both speakers, the acoustic ones a frame late."""
    refuse(about, PLAIN | {"num_key_value_heads": (about["num_attention_heads"], None)})
    deep, words, Q = about["depth_decoder_config"], about["vocab_size"], about["num_codebooks"]
    refuse(deep, {"num_key_value_heads": (deep["num_attention_heads"], None), "num_codebooks": (Q,), "hidden_act": ("silu",)})
    codes = about.get("audio_vocab_size") or about["audio_encoder_config"]["codebook_size"]
    delays = (0, *[1] * (Q - 1))
    table = replace(MOSHI_7B.table, streams=(
        Stream("text", "text", words + 1, words, start=words), *codebooks(Q, codes + 1, codes, codes, delays=delays),
        *codebooks(Q, codes + 1, 0, codes, delays=delays, name="user")))
    temporal = llama({**about, "intermediate_size": about["ffn_dim"] // 2}, about["num_hidden_layers"], 1e-8)
    heads, dim, head = deep["num_attention_heads"], deep["hidden_size"], deep.get("head_dim") or 0
    return ModelConfig(
        table, replace(temporal, rope_interleaved=True, packed=True, window=about["sliding_window"]),
        depth=StackConfig(dim=dim, layers=deep["num_hidden_layers"], heads=heads, head_dim=head if head * heads != dim else 0,
                          ffn=deep["ffn_dim"] // 2, norm_eps=deep.get("rms_norm_eps", 1e-8), rope_theta=0.0, packed=True, steps=Q))


def write_moshi_hf(c: ModelConfig, dtype: str) -> About:
    """Without the codec: give from_pretrained the whole audio_encoder_config and its weights, or use the decoders alone."""
    s, d, Q, card = c.temporal, c.depth, len(c.table.audio_out), c.table.streams[-1].vocab - 1
    if d is None:
        raise ValueError("transformers has no Moshi without a depth transformer; export --to=moshi")
    shared = {"hidden_act": "silu", "audio_vocab_size": card, "vocab_size": c.table.streams[0].classes, "num_codebooks": Q,
              "tie_word_embeddings": False}
    deep = {"model_type": "moshi_depth", "hidden_size": d.dim, "input_size": s.dim, "num_hidden_layers": d.layers, "head_dim": d.head,
            "num_attention_heads": d.heads, "num_key_value_heads": d.kv, "ffn_dim": 2 * d.ffn, "rms_norm_eps": d.norm_eps,
            "sliding_window": Q, "max_position_embeddings": Q + 1, **shared}
    return {"architectures": ["MoshiForConditionalGeneration"], "model_type": "moshi", "hidden_size": s.dim, "head_dim": s.head,
            "num_hidden_layers": s.layers, "num_attention_heads": s.heads, "num_key_value_heads": s.kv, "ffn_dim": 2 * s.ffn,
            "rms_norm_eps": s.norm_eps, "rope_parameters": {"rope_type": "default", "rope_theta": s.rope_theta},
            "sliding_window": s.window, "max_position_embeddings": s.window, "torch_dtype": dtype, **shared,
            "depth_decoder_config": deep, "audio_encoder_config": {"model_type": "mimi"}}


# ---- layouts ----

@dataclass(frozen=True)
class Layout:
    """An official file layout: its names and its config.json."""

    name: str
    to: str                                                     # what `export --to=` calls it
    rules: Rules
    read: Callable[[About, Tensors], ModelConfig]
    write: Callable[[ModelConfig, str], About]
    fits: Callable[[ModelConfig], bool]                         # could a model be of this family?
    tidy: Callable[[Tensors, ModelConfig], Tensors]             # every accepted spelling -> the one of the rules
    finish: Callable[[Tensors, ModelConfig], Tensors] = lambda tensors, config: tensors


def is_higgs(c: ModelConfig) -> bool:
    return bool(c.table.audio) and not c.table.aligned and not c.tail


LAYOUTS = {layout.name: layout for layout in (
    Layout("qwen", "hf", QWEN, read_qwen, write_qwen, lambda c: not c.table.audio, tidy_qwen),
    Layout("higgs", "hf", HIGGS, read_higgs, write_higgs, is_higgs, tidy_qwen),
    Layout("boson", "boson", BOSON, read_boson, write_boson, is_higgs, tidy_boson),
    Layout("moss", "hf", MOSS, read_moss, write_moss, lambda c: c.tail > 0, tidy_qwen),
    Layout("moshi", "moshi", MOSHI, read_moshi, write_moshi, lambda c: c.table.aligned and c.temporal.packed and not c.fusion, tidy_moshi,
           fuse_moshi),
    Layout("moshi_hf", "hf", MOSHI_HF, read_moshi_hf, write_moshi_hf,
           lambda c: c.table.aligned and c.temporal.packed and not c.fusion, tidy_moshi_hf, split_moshi_hf),
    Layout("dsaa", "dsaa", DSAA, read_dsaa, write_dsaa, lambda c: c.fusion is not None, tidy_dsaa, split_dsaa))}
MODEL_TYPES = {"qwen2": "qwen", "qwen3": "qwen", "higgs_audio_v2": "higgs", "higgs_audio": "boson", "moss_speech": "moss",
               "moshi": "moshi_hf"}


def recognise(about: About) -> Layout | None:
    """Tell a layout by the content of its config.json; None when it is no known one."""
    moshi = "dsaa" if isinstance(about.get("text_llm"), dict) else "moshi"
    name = moshi if {"n_q", "dep_q", "text_card"} <= about.keys() else MODEL_TYPES.get(about.get("model_type", ""))
    return LAYOUTS.get(name or "")


def read_config(layout: Layout, about: About, tensors: Tensors, source: str) -> ModelConfig:
    """Translate a config.json; ValueError names `source` and the field that is missing or cannot be computed."""
    try:
        return layout.read(about, tensors)
    except KeyError as error:
        raise ValueError(f"{source}/config.json lacks {error}; restore the official one") from None
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{source}: {error}") from None
    except (TypeError, AttributeError, IndexError, ArithmeticError) as error:       # a field of another type than the official one
        raise ValueError(f"{source}/config.json is damaged ({error}); restore the official one") from None


def choose(config: ModelConfig, to: str) -> Layout:
    """The layout that `--to` means for a model of this family."""
    fitting = [layout for layout in LAYOUTS.values() if layout.fits(config)]
    for layout in fitting:
        if layout.to == to:
            return layout
    raise ValueError(f"--to={to} is no layout of this model's family; there is {', '.join(['multistream', *(x.to for x in fitting)])}")


def export_model(config: ModelConfig, tensors: Tensors, to: str, dtype: str) -> tuple[About, Tensors]:
    """Official config.json and tensors of a plain model; ValueError names the field that the layout cannot express."""
    layout = choose(config, to)
    about = layout.write(config, dtype)
    result = to_theirs(layout, tensors, config)
    gone = lost(config, read_config(layout, about, result, to))
    if gone:
        raise ValueError(f"the {layout.name} layout cannot express this model: {'; '.join(gone[:3])}")
    return about, result


def lost(config: ModelConfig, other: ModelConfig) -> list[str]:
    """What differs between two architectures, one line each."""
    return difference(plain(config), plain(other))


def plain(config: ModelConfig) -> ModelConfig:
    """A config without what no layout stores: names of rows, training switches, and numbers left to their default."""
    s = config.temporal
    fusion = config.fusion and replace(config.fusion, remember=0)
    return replace(config, fusion=fusion, dropout=0.0, input_drop=0.0, text_drop=0.0, checkpoint=0,
                   temporal=replace(s, kv_heads=s.kv, head_dim=s.head),
                   table=replace(config.table, layout="", streams=tuple(replace(x, name="") for x in config.table.streams)))


# ---- adapters ----

PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
PREFIX = "base_model.model."


def theirs_of(model: MultistreamLM, layout: Layout) -> dict[str, list[str]]:
    """Official names of every parameter, adapters aside; a tied head has its own."""
    shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False) if "lora_" not in n}
    return {n: pieces(n, shape, model.config, layout.rules) for n, shape in shapes.items()}


def module(name: str) -> str:
    return name.rpartition(".")[0]


def peft_layout(config: ModelConfig) -> Layout:
    """The layout whose names a PEFT adapter uses: that of transformers, or of the first Higgs release where only it has the model."""
    head = {"text_lm_head.weight": torch.empty(0)} if config.table.text_out else {}
    for layout in (x for x in LAYOUTS.values() if not x.name.startswith("moshi")):
        if layout.fits(config) and not lost(config, layout.read(layout.write(config, "float32"), head)):
            return layout
    raise ValueError("--to=peft needs official names, and no layout of Qwen, Higgs or MOSS-Speech has this model; export --to=multistream")


def export_peft(model: MultistreamLM, base: str) -> tuple[About, Tensors]:
    """adapter_config.json and tensors of a PEFT adapter with official names."""
    layout, config = peft_layout(model.config), model.lora
    names = {n: theirs for n, (theirs,) in theirs_of(model, layout).items()}
    official = {path: module(names[f"{path}.weight"]) for path in lora.linears(model)}
    found = {official[path]: adapter for path, _, adapter in lora.adapters(model)}
    saved = sorted({module(names[n]) for n in lora.trained_parameters(model, config)})
    tensors = {}
    for name, parameter in model.named_parameters():
        path, _, part = name.partition(".adapter.")
        if part or module(names[name]) in saved:
            tensors[PREFIX + (f"{official[path]}.{PARTS[part]}" if part else names[name])] = parameter.detach()
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if layout.to == "hf" and layout.name != "moss" else None,
        "base_model_name_or_path": base, "revision": None, "inference_mode": True, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "use_rslora": config.rslora, "use_dora": config.dora, "modules_to_save": saved or None,
        "target_modules": suffixes(set(found), set(official.values())),
        "rank_pattern": {n: a.rank for n, a in found.items() if a.rank != config.rank},
        "alpha_pattern": {n: a.alpha for n, a in found.items() if a.alpha != config.alpha}}
    return about, tensors


def suffixes(chosen: set[str], everything: set[str]) -> list[str]:
    """The shortest endings, cut at dots, that select `chosen` and nothing else (PEFT's way of naming targets)."""
    found = set()
    for path in chosen:
        parts = path.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found.add(next(e for e in endings if {p for p in everything if p == e or p.endswith(f".{e}")} <= chosen))
    return sorted(found)


PEFT_PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,),
              "trainable_token_indices": (None,), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None)}     # not PiSSA
PEFT_READ = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules exclude_modules
lora_alpha lora_dropout use_rslora modules_to_save layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core use_dora
qalora_group_size ensure_weight_tying""".split()                   # read, told by the tensors, or without effect on the outcome


def import_peft(model: MultistreamLM, about: About, tensors: Tensors, source: str) -> tuple[LoraConfig, Tensors]:
    """Read a PEFT adapter, in either official naming of this model's family."""
    refuse(about, PEFT_PLAIN | {key: (None, {}) for key in about if key.endswith("_config")})
    strange = [key for key, value in about.items() if value and key not in PEFT_READ and key not in PEFT_PLAIN]
    if strange:
        raise ValueError(f"adapter {source} has {strange[0]} = {about[strange[0]]!r}, which this code does not know; "
                         + "merge it with the library that wrote it, or train it again without")
    bare = {peft_name(n): t for n, t in tensors.items()}
    fitting = [layout for layout in LAYOUTS.values() if layout.fits(model.config)]
    if not fitting:
        raise ValueError(f"{source}: PEFT adapters are for Qwen, Higgs and MOSS models, this model is of another family")
    layout = max(fitting, key=lambda x: len(adapter_keys(model, x).keys() & bare.keys()))
    ours, names = take(model, layout, bare, source), theirs_of(model, layout)
    paths = {module(module(n)) for n in ours if n.endswith("lora_A")}
    official = {p: module(names[f"{p}.weight"][0]) for p in paths}
    patterns, usually = about.get("alpha_pattern") or {}, float(about.get("lora_alpha", 8))
    alphas = {p: next((float(v) for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", official[p])), usually) for p in paths}
    flags = (about.get("lora_dropout", 0.0), about.get("use_rslora", False), about.get("use_dora", False))
    return adapter_config(model, ours, alphas, *flags), ours


def peft_name(name: str) -> str:
    """Without PEFT's prefix and adapter name; magnitudes are written with and without `.weight`."""
    name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name.removeprefix(PREFIX))
    return re.sub(r"\.lora_magnitude_vector(\.default)?(\.weight)?$", ".lora_magnitude_vector", name)


def adapter_keys(model: MultistreamLM, layout: Layout) -> dict[str, tuple[str, int, int]]:
    """Official name -> (our name, number of the piece, how many pieces) of everything that an adapter may hold."""
    keys = {}
    linears = lora.linears(model)
    for name, theirs in theirs_of(model, layout).items():
        for k, official in enumerate(theirs):
            keys[official] = (name, k, len(theirs))
            if name.endswith(".weight") and module(name) in linears:
                keys |= {f"{module(official)}.{b}": (f"{module(name)}.adapter.{a}", k, len(theirs)) for a, b in PARTS.items()}
    return keys


def take(model: MultistreamLM, layout: Layout, tensors: Tensors, source: str) -> Tensors:
    """Rename and join the tensors of an adapter file, strictly."""
    keys, groups = adapter_keys(model, layout), {}
    unknown = sorted(tensors.keys() - keys.keys())
    if unknown:
        raise ValueError(f"adapter {source}: {len(unknown)} tensors have no place in this model {unknown[:3]}; "
                         + "it was made for another one, or adapts an embedding or a convolution")
    for name, tensor in tensors.items():
        ours, k, count = keys[name]
        groups.setdefault(ours, [None] * count)[k] = tensor
    broken = sorted(n for n, parts in groups.items() if any(p is None for p in parts))
    if broken:
        raise ValueError(f"adapter {source} lacks some steps of {broken[:3]}; it needs all of them")
    shapes = {n: p.shape for n, p in model.named_parameters()}
    sets = {path for path, linear in lora.linears(model).items() if linear.weight.dim() == 3}
    return {n: (parts[0].view(shapes[n]) if n in shapes else parts[0]) if len(parts) == 1 and module(module(n)) not in sets else
            glue(parts, shapes.get(n, torch.Size((len(parts), 0, 0)))) for n, parts in groups.items()}


def adapter_config(model: MultistreamLM, ours: Tensors, alphas: dict[str, float], dropout: float, rslora: bool, dora: bool) -> LoraConfig:
    """The LoraConfig under which `inject` builds exactly the adapters of a file."""
    ranks = {module(module(n)): t.shape[-2] for n, t in ours.items() if n.endswith("lora_A")}
    if not ranks:
        raise ValueError("the adapter file holds no lora_A; it adapts nothing")
    (rank, rank_patterns), (alpha, alpha_patterns) = usual(ranks), usual({p: alphas[p] for p in ranks})
    return LoraConfig(rank, alpha, globs(set(ranks), lora.linears(model)), dropout, rslora, dora,
                      tuple(n for n in ours if "lora_" not in n), rank_patterns, alpha_patterns)


def usual(values: dict[str, Any]) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """The commonest value, and those that differ from it."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, tuple((path, value) for path, value in sorted(values.items()) if value != common)


def globs(chosen: set[str], everything: Iterable[str]) -> tuple[str, ...]:
    """Patterns for lora.py that select `chosen` and nothing else, layer numbers folded where all layers are in."""
    found = set()
    for path in chosen:
        folded = re.sub(r"\.\d+\.", ".*.", path)
        found.add(folded if all(p in chosen for p in everything if lora.matches(p, folded)) else path)
    return tuple(sorted(found))


def export_moshi_lora(model: MultistreamLM, dtype: str) -> tuple[About, Tensors]:
    """moshi's own adapter file: a pair for every Linear (zero where there is none), one rank and one factor for all."""
    layout, found = choose(model.config, "moshi"), {path: a for path, _, a in lora.adapters(model)}
    if any(a.lora_magnitude is not None for a in found.values()):
        raise ValueError("moshi has no DoRA; merge the adapter and export --to=moshi")
    if model.config.voice:
        raise ValueError("moshi has no adapters for models that listen to voices; merge the adapter and export --to=moshi")
    rank, scales = max(a.rank for a in found.values()), {a.scale for a in found.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0            # several factors: each goes into its B
    names, result = theirs_of(model, layout), {}
    for path, linear in lora.linears(model).items():
        a, b = padded(linear, found.get(path), rank, scale)
        for n, (one, other) in zip(names[f"{path}.weight"], zip(a, b, strict=True), strict=True):
            result |= {f"{module(n)}.lora_A.weight": one, f"{module(n)}.lora_B.weight": other}
    depth = model.config.depth
    if model.config.demux and depth and depth.low_rank:
        stem = module(UNREAD)
        result |= {f"{stem}.lora_A.weight": torch.zeros(rank, depth.low_rank), f"{stem}.lora_B.weight": torch.zeros(depth.dim, rank)}
    trained = lora.trained_parameters(model, model.lora)
    result |= to_theirs(layout, {n: p.detach() for n, p in trained.items()}, model.config)
    return {**layout.write(model.config, dtype), "lora": True, "lora_rank": rank, "lora_scaling": scale}, result


def padded(linear: nn.Module, adapter: lora.Adapter | None, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B of every step, zero where there is no adapter or a smaller rank.   -> (steps, R, in), (steps, out, R)"""
    *sets, outputs, inputs = linear.weight.shape
    a, b = torch.zeros(*(sets or [1]), rank, inputs), torch.zeros(*(sets or [1]), outputs, rank)
    if adapter is not None:
        factor = 1.0 if adapter.scale == scale else adapter.scale / scale
        a[:, : adapter.rank], b[..., : adapter.rank] = adapter.lora_A.detach(), adapter.lora_B.detach() * factor
    return a, b


def import_moshi_lora(model: MultistreamLM, about: About, tensors: Tensors, source: str) -> tuple[LoraConfig, Tensors]:
    """Read moshi's own adapter file; pairs that are all zero are left out."""
    refuse(about, {"lora": (True,)})
    ours = take(model, LAYOUTS["moshi"], tidy_moshi(tensors, model.config), source)
    empty = [module(n) for n, t in ours.items() if n.endswith("lora_B") and not t.any()]
    ours = {n: t.float() for n, t in ours.items() if module(n) not in empty}
    rank, scale = about.get("lora_rank", 128), about.get("lora_scaling", 2.0)
    alphas = {module(module(n)): scale * rank for n in ours if n.endswith("lora_A")}
    return adapter_config(model, ours, alphas, 0.0, False, False), ours
