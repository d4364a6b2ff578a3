"""Higgs Audio v2 3B: text to speech in the voice of a recording. Sizes, prompts, rules, both official file layouts.

    system     Generate audio following instruction.  <|scene_desc_start|> A quiet room. <|scene_desc_end|>
    user       transcript of the reference recording
    assistant  <|audio_out_bos|> its codes <|audio_eos|>                    read: weight 0
    user       text to synthesise
    assistant  <|audio_out_bos|> codes <|audio_eos|> <|eot_id|>             trained; a prompt ends after <|audio_out_bos|>

Llama-3.2-3B with a second feed-forward network for audio columns; 8 codebooks, each delayed by one column more than the one before.
Sources: boson-multimodal 0.1.1 (prepare_chatml_sample, its collator) and the generation example of its repository; the
chat template that transformers has differs (it trims text and has a role `scene`) and is not followed. Layouts: `higgs`
(transformers 5.23, higgs_audio_v2) and `boson` (first release; split frozen | trainable tensors, heads written twice).
Next: higgs_v3.py.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from families.family import Closing, Family
from families.formats import (
    About,
    Format,
    Tensors,
    by_model_type,
    drop_buffers,
    drop_duplicate,
    ids,
    llama,
    placeholder,
    require,
    stack,
    write_llama,
)
from layers.architecture import ModelConfig, StackConfig
from streams import Stream, StreamTable, chat_grid, codebooks
from text.conversation import Message, Template, audio_turn

# Higgs Audio v2 3B: Llama-3.2-3B with a second FFN for audio columns; text ids from its tokenizer.json.
HIGGS_V2_3B = ModelConfig(
    StreamTable((Stream("text", "text", 128256, 128256), *codebooks(8, 1026, 1026, 1024, 1025, range(8))),
                "chatml", audio_start=128013, audio_end=128012, stop=(128001, 128009)),
    StackConfig(dim=3072, layers=28, heads=24, kv_heads=8, head_dim=128, ffn=8192, rope_theta=500000.0,
                rope_scaling=(32.0, 1.0, 4.0, 8192.0)),
    dual_ffn=tuple(range(28)))

# ---- how turns are written ----

BEGIN, END, EOT, EOM = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
AUDIO_OUT, AUDIO_IN, AUDIO_END = "<|audio_out_bos|>", "<|audio_bos|>", "<|audio_eos|>"    # around generated codes, and around a recording
HEADER, HEADER_END, RECIPIENT = "<|start_header_id|>", "<|end_header_id|>", "<|recipient|>"
SCENE, SCENE_END = "<|scene_desc_start|>", "<|scene_desc_end|>"
PLACEHOLDERS = ("<|AUDIO|>", "<|AUDIO_OUT|>")       # one id a clip in the official files; never in our grid
SPECIALS = (BEGIN, END, HEADER, HEADER_END, EOM, EOT, AUDIO_IN, AUDIO_END, AUDIO_OUT, RECIPIENT, SCENE, SCENE_END)
TEMPLATE = Template(
    "Higgs Audio v2", HEADER + "{role}" + HEADER_END + "\n\n", EOT, END, SPECIALS,
    (BEGIN, END, HEADER, HEADER_END, EOM, EOT, AUDIO_IN, AUDIO_END, AUDIO_OUT, RECIPIENT, *PLACEHOLDERS), close_continued=EOM, begin=BEGIN,
    recipient=RECIPIENT, audio_in=AUDIO_IN, audio_out=AUDIO_OUT, audio_end=AUDIO_END, predicts_audio_start=True, targets="clone",
    clone_prompt=lambda *given: clone_messages(*given))
INSTRUCTION = "Generate audio following instruction."
SPEAKERS = """You are an AI assistant designed to convert text into speech.
If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following text, \
using the specified voice.
If no speaker tag is present, select a suitable voice on your own."""


def system_turn(text: str, references: Sequence[str | None], scene: str, in_system: bool) -> Message | None:
    """The system message of a clone prompt; `references` holds a transcript or, for a voice in words, "profile:...".

    Without references it is always there; with them only where it has something to say.
    """
    profiles = [str(r).removeprefix("profile:") if str(r).startswith("profile:") else None for r in references]
    if references and (in_system or any(profiles)):
        content: list[Any] = [f"{INSTRUCTION}\n\n{SCENE}\n" + (f"{scene}\n\n" if scene else "")]
        for n, profile in enumerate(profiles):
            content[-1] += f"SPEAKER{n}: " + ("" if profile is None else f"{profile}\n")
            content += [{"type": "audio"}, "\n"] if profile is None else []
        content[-1] += SCENE_END
        return {"role": "system", "content": content}
    tags = sorted(set(re.findall(r"\[(SPEAKER\d+)\]", text)))
    if not references and len(tags) > 1:
        voices = "\n".join(f"{tag}: {('feminine', 'masculine')[n % 2]}" for n, tag in enumerate(tags))
        return {"role": "system", "content": f"{SPEAKERS}\n\n{SCENE}\n" + "\n\n".join(filter(None, (scene, voices))) + f"\n{SCENE_END}"}
    if references and not scene:
        return None
    return {"role": "system", "content": INSTRUCTION + (f"\n\n{SCENE}\n{scene}\n{SCENE_END}" if scene else "")}


def clone_messages(text: str, references: Sequence[str] = (), scene: str = "", in_system: bool = False) -> list[Message]:
    """The official prompt for speaking `text` in the voices of `references`, transcripts whose codes come in the same order."""
    system = system_turn(text, references, scene, in_system)
    in_system = in_system or any(r.startswith("profile:") for r in references)
    messages = [system] if system else []
    for n, transcript in enumerate(() if in_system else references):
        tag = f"[SPEAKER{n}] " if len(references) > 1 else ""
        messages += [{"role": "user", "content": tag + transcript}, audio_turn()]
    return [*messages, {"role": "user", "content": text}]


# ---- official layouts ----

HF_NAMES = (("embed.text.weight", "model.embed_tokens.weight"), *stack("temporal.layers", "model.layers"),
         ("temporal.norm.weight", "model.norm.weight"), ("text_head.weight", "text_lm_head.weight"),
         ("embed.audio.weight", "model.embed_audio_tokens.embed_audio_tokens.weight"), ("audio_head.weight", "audio_lm_head.weight"))
BOSON_NAMES = (("embed.text.weight", "embed_tokens.weight"), *stack("temporal.layers", "layers"),
         ("temporal.norm.weight", "norm.weight"), ("text_head.weight", "audio_decoder_proj.text_lm_head.weight"),
         ("embed.audio.weight", "audio_codebook_embeddings.weight"), ("audio_head.weight", "audio_decoder_proj.audio_lm_head.weight"))


def tidy_boson(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Join what partial training split in two (frozen rows first) and give each tensor its one name."""
    kept = {n: t for n, t in tensors.items() if not n.endswith(("rotary_emb.inv_freq", "audio_codebook_weights"))}
    for name in [n for n in kept if re.search(r"\.(embedding|linear)_frozen\.weight$", n)]:
        rest = name.replace("_frozen.", "_trainable.")
        if rest in kept:
            kept[re.sub(r"(embedding|linear)_frozen\.", "", name)] = torch.cat([kept.pop(name), kept.pop(rest)])
    for head in ("audio_lm_head.weight", "text_lm_head.weight"):
        drop_duplicate(kept, f"audio_decoder_proj.{head}", head)
        if head in kept:
            kept[f"audio_decoder_proj.{head}"] = kept.pop(head)
    return kept


def higgs_table(about: About, vocab: int, count: int, size: int, start: int, stop: tuple[int, ...], head: bool) -> StreamTable:
    """One text row and `count` codebooks, each one column behind the one before; without a text head the text is only read."""
    known = HIGGS_V2_3B.table
    end = about.get("audio_eos_token_id", known.audio_end if known.audio_end < vocab else None)      # transformers has no field for it
    rows = codebooks(count, size, size, about["audio_stream_bos_id"], about["audio_stream_eos_id"], range(count))
    stop = tuple(dict.fromkeys((*stop, *(i for i in known.stop if i < vocab))))        # files name one, the official script both
    return replace(known, streams=(Stream("text", "text", vocab, vocab if head else 0), *rows), audio_start=start,
                   audio_end=-1 if end is None else end, stop=stop)


HF_ROPE = {"factor": 32.0, "rope_theta": 500000.0, "high_freq_factor": 0.5, "low_freq_factor": 0.125,
           "original_max_position_embeddings": 1024, "rope_type": "llama3"}        # of transformers' class, where the file says nothing


def read_higgs(about: About, tensors: Tensors) -> ModelConfig:
    table = higgs_table(about, about["vocab_size"], about["num_codebooks"], about["codebook_size"], about["audio_bos_token_id"],
                        ids(about.get("eos_token_id")), "text_lm_head.weight" in tensors)
    layers = about["num_hidden_layers"]
    about = about if about.keys() & {"rope_parameters", "rope_scaling", "rope_theta"} else about | {"rope_parameters": HF_ROPE}
    require(about, {"tie_word_embeddings": (False,)})
    return ModelConfig(table, llama(about, layers, 1e-5), dual_ffn=tuple(range(layers)))


def write_higgs(c: ModelConfig, dtype: str) -> About:
    """transformers loads the text head only with from_pretrained(dir, use_text_head=True)."""
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
    require(about, {"use_delay_pattern": (True,), "audio_embed_avg": (False,), "use_audio_out_embed_projector": (False,),
                   "use_audio_out_self_attention": (False, 0, None), "use_rq_transformer": (False,), "skip_audio_tower": (True,),
                   "audio_decoder_proj_num_layers": (0,), "audio_adapter_type": ("dual_ffn", "dual_ffn_fast_forward", "stack")})
    text, kind = about["text_config"], about["audio_adapter_type"]
    table = higgs_table(about, text["vocab_size"], about["audio_num_codebooks"], about["audio_codebook_size"] + 2,
                        about["audio_out_bos_token_id"], (*ids(about.get("eos_token_id")), *ids(text.get("eos_token_id"))), True)
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


def is_higgs(c: ModelConfig) -> bool:
    return bool(c.table.audio) and not c.table.aligned and not c.table.bare and not c.tail and c.depth is None


# How the official generation example draws; RAS looks back 7 columns and redraws what was there twice.
RULES = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "ras_window": 7, "ras_repeats": 2, "max_frames": 2048}
FORMATS = (
    Format("higgs", "hf", lambda c: HF_NAMES, read_higgs, write_higgs, is_higgs, by_model_type("higgs_audio_v2"), drop_buffers,
           shards=True, peft=True, task_type="CAUSAL_LM"),
    Format("boson", "boson", lambda c: BOSON_NAMES, read_boson, write_boson, is_higgs, by_model_type("higgs_audio"), tidy_boson,
           shards=True, peft=True))
FAMILIES = (Family(
    "Higgs Audio v2", "chatml", "Higgs Audio v2 3B: text to speech, cloned voices, several speakers", chat_grid, TEMPLATE,
    rules=lambda table: RULES, companions={"codec": "bosonai/higgs-audio-v2-tokenizer", "normaliser": "higgs-v1"},
    text_to_speech=True, references=99, formats=FORMATS,
    # boson-multimodal still draws one column freely and drops it in the end; transformers closes row k after k + 1 columns
    closings={"boson": Closing(grace=1), "hf": Closing(by_row=True)}),)
