"""Moshi 7B and its relatives by Kyutai: Hibiki, speech to text, text to speech. Two speakers at once, a text id in every frame.

    text     EPAD hello  PAD there  PAD        the agent's words (inner monologue); EPAD before a word, PAD elsewhere
    cb 1..8                                    the agent's codebooks, predicted by the depth transformer
    user 1..8                                  the user's, read and never predicted

Sizes, layout, rules, and three official layouts: `moshi` (flat keyword list; attention fused in one tensor, or one
tensor a step), `moshi_hf` (transformers; q and k turned the other way, the codec in it is left to audio/), and the
adapters of moshi.server. Conditions and voices are layers/conditioning.py. Sources: arXiv:2410.00037, moshi 0.2.13,
transformers 5.23, moshi-finetune, the released config.json files. One file because a family is one file.
Next: moss.py.
"""

import math
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lora
from families.adapters import adapter_config, adapter_to_ours, module_path, theirs_of
from families.family import Family, other_grid
from families.formats import (
    FIXED,
    About,
    AdapterFormat,
    Conversion,
    Format,
    Tensors,
    by_model_type,
    config_differences,
    llama,
    require,
    stack,
    to_theirs,
)
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from model import MultistreamLM
from streams import Example, Grid, Stream, StreamTable, Timing, codebooks, delay

# Moshi 7B: 17 rows at 12.5 Hz; the user's rows are read and never predicted.
MOSHI_DELAYS, RATE = (0, 1, 1, 1, 1, 1, 1, 1), 12.5             # frames of Mimi a second
MOSHI_7B = ModelConfig(
    StreamTable((Stream("text", "text", 32001, 32000, start=32000),
                 *codebooks(8, 2049, 2048, 2048, delays=MOSHI_DELAYS),
                 *codebooks(8, 2049, 0, 2048, delays=MOSHI_DELAYS, name="user")), "duplex", aligned=True),
    StackConfig(dim=4096, layers=32, heads=32, ffn=11264, norm_eps=1e-8, rope_interleaved=True, window=3000, packed=True),
    depth=StackConfig(dim=1024, layers=6, heads=16, ffn=2816, norm_eps=1e-8, rope_theta=0.0, packed=True, steps=8))


def kyutai(dim: int, layers: int, heads: int, window: int, rope: float, **more: Any) -> StackConfig:
    """A temporal transformer of the Moshi family: the feed-forward network is two thirds of 4.125 D wide."""
    return StackConfig(dim=dim, layers=layers, heads=heads, ffn=2 * int(4.125 * dim) // 3, norm_eps=1e-8, rope_theta=rope,
                       rope_interleaved=True, window=window, packed=True, **more)


def hibiki(Q: int, temporal: StackConfig) -> ModelConfig:
    """Hibiki translates what the user says; how well it should sound is a condition. Q codebooks of each side."""
    delays = (0, *[2] * (Q - 1))
    return ModelConfig(
        StreamTable((Stream("text", "text", 48001, 48000, start=48000),
                     Stream("description", "condition", 32, start=31, rank=16, values=("very_bad", "bad", "neutral", "good", "very_good")),
                     *codebooks(Q, 2049, 2048, 2048, delays=delays), *codebooks(Q, 2049, 0, 2048, delays=delays, name="user")),
                    "hibiki", aligned=True),
        temporal, depth=replace(MOSHI_7B.depth, steps=Q))


HIBIKI_2B = hibiki(16, kyutai(2560, 24, 20, 3000, 1e5))
HIBIKI_1B = hibiki(8, kyutai(2048, 16, 16, 3000, 1e5))


def recogniser(words: int, temporal: StackConfig, timing: Timing, extra_heads: int = 0) -> ModelConfig:
    """Kyutai's speech to text: 32 input codebooks, the text is delayed; extra heads predict pauses."""
    return ModelConfig(StreamTable((Stream("text", "text", words + 1, words, start=words), *codebooks(32, 2049, 0, 2048, name="user")),
                                   "kyutai_stt", aligned=True, timing=timing), temporal, extra_heads=extra_heads)


STT_1B = recogniser(8000, kyutai(2048, 16, 16, 750, 1e5), Timing(-0.5 * RATE), extra_heads=4)          # en, fr; 0.5 s late
STT_2_6B = recogniser(4000, kyutai(2048, 48, 32, 375, 1e5), Timing(-2.5 * RATE, silence=13))            # en; 2.5 s late
# Kyutai's text to speech: input is the current word and the one two ahead, output 32 codebooks; up to five voices.
TTS_1_6B = ModelConfig(
    StreamTable((Stream("text", "text", 8001, 8000, start=8000), Stream("ahead", "text", 8001),
                 Stream("control", "condition", 2, start=1, rank=2048, values=("ok",)),
                 Stream("cfg", "condition", 8, start=7, rank=16, values=("1.0", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0")),
                 *codebooks(32, 2049, 2048, 2048, delays=(0, *[2] * 31))), "kyutai_tts", aligned=True,
                timing=Timing(16.0, ahead=2, turns=True)),
    kyutai(2048, 16, 16, 500, 1e4), demux=True, voice=512,
    depth=StackConfig(dim=1024, layers=4, heads=16, ffn=2048, norm_eps=1e-8, rope_theta=0.0, packed=True, steps=32, low_rank=128,
                      schedule=(*range(8), *[8] * 8, *[9] * 8, *[10] * 8)))


def duplex_grid(example: Example, table: StreamTable) -> Grid:
    """Two speakers at once (Moshi, DSAA): in a frame one text id, the agent's codes and the user's, delayed and cut at T.

    example.text is (T,) or, of two text rows, (2, T), .weights (T,). Rows that are only read never count. Without `codes` the grid
    is the prompt: the start column; a chunk from the middle of a dialogue starts with a column of what was before instead.
    `prompt` (K, P) are frames of all rows in front of it, never trained.
    """
    start = table.column("start")
    if example.conditions is not None:
        start[table.conditions] = example.conditions[:, None]
    if example.codes is None and example.prompt is None:
        return start, torch.zeros(start.shape)
    if example.codes is None:
        return (columns := delay(example.prompt, table.delays, start)), torch.zeros(columns.shape)
    lead, text = table.timing.frames, example.text.view(-1, example.text.shape[-1])
    held = start[len(text) : table.lead].expand(-1, example.codes.shape[-1])     # conditions hold one id throughout
    parts = [text if lead >= 0 else later(text, -lead, table.pad), held, later(example.codes, max(lead, 0), -1), example.user]
    frames = torch.cat([part for part in parts if part is not None])                                                        # (K, T)
    counts = ((frames >= 0) & (table.column("classes") > 0)).float()
    if example.weights is not None:
        counts[0] *= example.weights if lead >= 0 else later(example.weights, -lead, 0.0)
    if example.prompt is not None:
        frames, counts = torch.cat([example.prompt, frames], 1), torch.cat([torch.zeros(example.prompt.shape), counts], 1)
    tokens, weights = delay(frames, table.delays, start), delay(counts, table.delays, 0.0)
    weights[:, example.before] = 0
    return tokens[:, example.before :], weights[:, example.before :]


def later(rows: Tensor, frames: int, fill: float) -> Tensor:
    """Rows (..., T) that come so many frames later, cut at T."""
    return torch.nn.functional.pad(rows, (frames, 0), value=fill)[..., : rows.shape[-1]] if frames else rows


def rules(table: StreamTable) -> dict[str, tuple[float, ...]]:
    """Moshi's sampling defaults: text T = 0.7, top-k 25; codes T = 0.8, top-k 250; greedy text for a recogniser."""
    Q = len(table.audio_out)
    return {"temperature": (0.7, *[0.8] * Q), "top_k": (25.0, *[250.0] * Q)} if Q else {"temperature": (0.0,)}


def expand_depth(config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Let a model that predicts the agent predict the user too, as J-Moshi's trainer does: its depth steps, copied.

    ModelConfig and tensors in, both out. The agent's last codebook, which a step reads now, gets the embedding of its
    first; the agent's logits stay as they are.
    """
    both, first = predict_user(config), config.table.streams[config.table.audio[0]]
    double = {name: torch.cat([t, t]) for name, t in weights.items() if depth_sets(name, t, config.depth.steps)}
    codes = weights["depth.audio.weight"]
    return both, weights | double | {"depth.audio.weight": torch.cat([codes, codes[: first.vocab], codes])}


def predict_user(config: Any) -> Any:
    """The ModelConfig of `expand_depth`: every audio row is predicted, each by a depth step of its own."""
    table, depth, Q = config.table, config.depth, len(config.table.audio_out)
    if depth is None or depth.schedule or depth.low_rank or len(table.audio) != 2 * Q:
        raise ValueError(f"{Q} of {len(table.audio)} audio rows are predicted; expand-depth needs half of them, and a depth transformer")
    classes = table.streams[table.audio[0]].classes
    streams = [replace(s, classes=classes) if k in table.audio else s for k, s in enumerate(table.streams)]
    return replace(config, table=replace(table, streams=tuple(streams)), depth=replace(depth, steps=2 * Q))


PERSONAPLEX_7B = predict_user(replace(MOSHI_7B, table=replace(MOSHI_7B.table, layout="personaplex")))      # families/personaplex.py


def trim_depth(config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Undo `expand_depth`: predict the agent only, the first half of the rows, as moshi's server expects."""
    table, depth, Q = config.table, config.depth, len(config.table.audio_out) // 2
    if depth is None or depth.schedule or depth.low_rank or len(table.audio) != 2 * Q:
        raise ValueError(f"{2 * Q} of {len(table.audio)} audio rows are predicted; trim-depth needs all of them, and a depth transformer")
    streams = [replace(s, classes=0) if k in table.audio[Q:] else s for k, s in enumerate(table.streams)]
    half = {name: t[:Q] for name, t in weights.items() if depth_sets(name, t, depth.steps)}
    read = sum(table.streams[k].vocab for k in table.audio[: Q - 1])
    config = replace(config, table=replace(table, streams=tuple(streams)), depth=replace(depth, steps=Q))
    return config, weights | half | {"depth.audio.weight": weights["depth.audio.weight"][:read]}


def depth_sets(name: str, tensor: Tensor, steps: int) -> bool:
    """A tensor of the depth transformer that holds one weight a step."""
    return name.startswith("depth.") and tensor.dim() == 3 and len(tensor) == steps


CONDITION, VOICES = "condition_provider.conditioners", "speaker_wavs"
NAMES = (("embed.text.weight", "text_emb.weight"), ("embed.audio.weight", "emb.{k}.weight"),
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
HF_NAMES = (("embed.text.weight", "decoder.model.embed_tokens.weight"), ("embed.audio.weight", "embed_tokens.{k}.weight"),
            *(rule for ours, theirs in (("temporal.layers", "decoder.model.layers"), ("depth.layers", "depth_decoder.layers"))
              for rule in stack(ours, theirs, (
                  ("attn_norm.weight", "input_layernorm.weight"), ("ffn_norm.weight", "post_attention_layernorm.weight"),
                  ("attn.qkv.weight", "self_attn.qkv_proj.linear.weight"), ("attn.o.weight", "self_attn.o_proj.linear.weight"),
                  ("ffn.gate_up.weight", "mlp.fc1.weight"), ("ffn.down.weight", "mlp.fc2.weight")))),
            ("temporal.norm.weight", "decoder.model.norm.weight"), ("text_head.weight", "decoder.lm_head.weight"),
            ("depth.text.weight", "depth_decoder.text_embed_tokens.weight"),
            ("depth.audio.weight", "depth_decoder.embed_tokens.{k}.weight"),
            ("depth.input.weight", "depth_decoder.input_projections.weight"), ("depth.head.weight", "depth_decoder.lm_heads.weight"))
ALL_STEPS = "depth_decoder."
DEMUX = (("embed.text.out.weight", "text_emb.out{K}.weight"), ("depth.text.out.weight", "depformer_text_emb.out{K}.weight"))
UNREAD = "depformer_text_emb.low_rank.weight"      # moshi makes it beside out1 and out2 and never uses it


def tidy_moshi(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Split attention that is fused over the depth steps: (steps * 3D, D) -> one tensor a step. What moshi never uses is left out."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if config.demux and name.startswith(UNREAD.removesuffix("weight")):
            continue
        if tensor.dim() == 3 and tensor.shape[:2] == (1, 1) and name.endswith((".alpha", ".learnt_padding")):
            tensor = tensor[0, 0] if name.endswith(".alpha") else tensor[0]           # (1, 1, D): norms are (D,) here, conditions (1, D)
        name = re.sub(r"\.linear_(in|out)_weight$", r".linear_\1.weight", name).replace(".frozen_W.weight", ".weight")
        match = re.fullmatch(r"(.+\.(?:in|out)_proj)(?:[._]weight|(\.lora_[AB]\.weight))", name)
        if match is None:
            result[name] = tensor
            continue
        sets = len(set(config.depth.schedule)) or config.depth.steps if name.startswith("depformer.") and config.depth else 1
        result |= {f"{match[1]}s.{k}{match[2] or '.weight'}": part for k, part in enumerate(tensor.chunk(sets))}
    return result


def fuse_moshi(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Write attention as the released files do: fused over the depth steps. Tensors that moshi requires and never uses are zero."""
    if config.demux and config.depth and config.depth.low_rank and "depformer_text_emb.weight" in tensors:
        tensors = tensors | {UNREAD: tensors["depformer_text_emb.weight"].new_zeros(config.depth.dim, config.depth.low_rank)}
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in unflat(tensors).items():
        fused = re.sub(r"in_projs\.\d+\.weight$", "in_proj_weight", name)
        groups.setdefault(re.sub(r"out_projs\.\d+\.weight$", "out_proj.weight", fused), []).append(tensor)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in groups.items()}


def unflat(tensors: Tensors) -> Tensors:
    """Norms and learnt paddings with the axes that moshi gives them."""
    return {n: t.view(1, 1, -1) if t.dim() and n.endswith((".alpha", ".learnt_padding")) else t for n, t in tensors.items()}


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


NORMS = {"rms_norm_f32": 1e-8, "rms_norm": 1e-5}       # the first computes in fp32 whatever the model's type, as ours does
MOSHI_FIXED = {
    "layer_scale": (None,), "kv_repeat": (1,), "causal": (True,), "norm_emb": (False,), "bias_proj": (False,),
    "quantize": (False,), "depformer_norm": (None,), "depformer_layer_scale": (None,), "mimi_config_name": (None,),
    "positional_scale": (1.0,), "skip_self_attn": (False,)}


MOSHI_READ = set("""moshi_name mimi_name tokenizer_name lora_name lora lora_rank lora_scaling model_type model_id lm_gen_config tts_config
stt_config n_q dep_q card text_card text_card_out delays existing_text_padding_id existing_text_end_padding_id demux_second_stream
demux_second_text_stream dim num_heads num_layers hidden_scale gating norm context max_period positional_embedding conditioners fuser
cross_attention extra_heads_num_heads extra_heads_dim depformer_dim depformer_dim_feedforward depformer_num_heads depformer_num_layers
depformer_multi_linear depformer_weights_per_step depformer_weights_per_step_schedule depformer_low_rank_embeddings depformer_gating
depformer_pos_emb depformer_context depformer_max_period depformer_causal gradient_checkpointing version""".split()) | MOSHI_FIXED.keys()
# depformer_context and depformer_max_period are without effect: the depth transformer sees all its steps and has no positions


# model_type of a config.json -> layout
LAYOUTS = {"moshi": "duplex", "personaplex": "personaplex", "hibiki": "hibiki", "stt": "kyutai_stt", "tts": "kyutai_tts"}


def layout_of(about: About) -> str:
    """The layout of a config.json: as it says, else by its shape."""
    if (kind := about.get("model_type")) not in LAYOUTS:
        spoken = about.get("demux_second_stream") or about.get("cross_attention")
        alike = about["dep_q"] == about["n_q"] == 2 * len(MOSHI_DELAYS)             # both speakers are predicted
        kind = "stt" if not about["dep_q"] else "tts" if spoken else "hibiki" if about.get("conditioners") else (
            "personaplex" if alike else "moshi")
    return LAYOUTS[kind]


def timing_of(about: About) -> Timing:
    """What tts_config and stt_config say, in frames."""
    tts, stt = about.get("tts_config") or {}, about.get("stt_config") or {}
    require(tts, {"multistream": (False,)})
    if tts:
        voices = bool((about.get("fuser") or {}).get("cross"))
        return Timing(int(tts["audio_delay"] * RATE + 1e-6), ahead=tts.get("second_stream_ahead", 0), turns=voices)
    silence = math.ceil(stt.get("audio_silence_prefix_seconds", 0.0) * RATE - 1e-6)
    return Timing(0.0 - stt.get("audio_delay_seconds", 0.0) * RATE, silence)


def write_timing(timing: Timing) -> About:
    if timing.lead > 0:
        return {"tts_config": {"audio_delay": timing.lead / RATE, "second_stream_ahead": timing.ahead}}
    stt = {"audio_delay_seconds": -timing.lead / RATE, "audio_silence_prefix_seconds": timing.silence / RATE}
    return {"stt_config": stt} if timing.lead else {}


def known_only(about: About, known: Collection[str]) -> None:
    """ValueError for a field that we do not know: moshi would hand it to its model, where it may mean anything."""
    strange = [key for key in about if key not in known]
    if strange:
        raise ValueError(f"config.json has {strange[0]} = {about[strange[0]]!r}, which this code does not know; "
                         + "take it out if the weights do without, or convert them with the package that wrote it")


def read_moshi(about: About, tensors: Tensors, more: Collection[str] = ()) -> ModelConfig:
    known_only(about, MOSHI_READ | set(more))
    require(about, MOSHI_FIXED)
    # these are read, but what the class does without them is not what we compute
    require({"gating": "none", "norm": "layer_norm", "positional_embedding": "sin", **about},
           {"gating": ("silu",), "norm": tuple(NORMS), "positional_embedding": ("rope", "none")})
    steps, count, card, text, delays = about["dep_q"], about["n_q"], about["card"], about["text_card"], about["delays"]
    if len(delays) != count + 1:
        raise ValueError(f"config.json has {len(delays)} delays for {count + 1} streams; restore it")
    if min(delays) < 0:
        raise ValueError(f"config.json has a delay of {min(delays)}; a row can come late, not early: restore it")
    demux = bool(about.get("demux_second_stream", about.get("demux_second_text_stream", False)))
    table = replace(MOSHI_7B.table, streams=(
        Stream("text", "text", text + 1, about.get("text_card_out") or text, delays[0], text),
        *([Stream("ahead", "text", text + 1, delay=delays[0])] if demux else []), *moshi_conditions(about),
        *codebooks(steps, card + 1, card, card, delays=tuple(delays[1 : 1 + steps])),
        *codebooks(count - steps, card + 1, 0, card, delays=tuple(delays[1 + steps :]), name="user")),
        layout=layout_of(about), timing=timing_of(about),
        pad=about.get("existing_text_padding_id", 3), epad=about.get("existing_text_end_padding_id", 0))
    return ModelConfig(table, moshi_stack(about), depth=moshi_depth(about) if steps else None, demux=demux,
                       extra_heads=about.get("extra_heads_num_heads", 0), extra_classes=about.get("extra_heads_dim", 6),
                       **moshi_voice(about))


def moshi_voice(about: About) -> dict[str, Any]:
    """Cross-attention to the features of voices: the `tensor` conditioner that the fuser calls cross."""
    fuser, found = about.get("fuser") or {}, about.get("conditioners") or {}
    cross = fuser.get("cross") or []
    require(fuser, {"cross": ([], [VOICES], None)})
    if bool(about.get("cross_attention")) != bool(cross):
        raise ValueError(f"config.json has cross_attention = {about.get('cross_attention')!r} and cross = {cross!r}; restore it")
    if not cross:
        return {}
    require(found[VOICES], {"type": ("tensor",)})
    require(found[VOICES]["tensor"], {"force_linear": (True,), "learn_padding": (True,), "output_bias": (False,)})
    places = float(fuser.get("cross_attention_pos_emb_scale", 1.0)) if fuser.get("cross_attention_pos_emb") else 0.0
    return {"voice": found[VOICES]["tensor"]["dim"], "voice_places": places}


def moshi_conditions(about: About) -> list[Stream]:
    """A row for each conditioner: lookup tables whose sum is added to every column."""
    found, fuser = about.get("conditioners") or {}, about.get("fuser") or {}
    require(fuser, {"prepend": ([], None)})
    used = sorted([*fuser.get("sum", []), *(fuser.get("cross") or [])])
    if used != sorted(found):
        raise ValueError(f"config.json has conditioners {sorted(found)}, of which {used} are fused; wanted all")
    rows = []
    for name in fuser.get("sum", []):
        require(found[name], {"type": ("lut",)})
        lut = found[name]["lut"]
        require(lut, {"tokenizer": ("noop",), "force_linear": (True,), "learn_padding": (True,), "output_bias": (False,)})
        bins = lut["n_bins"]
        rows.append(Stream(name, "condition", bins + 1, start=bins, rank=lut["dim"], values=tuple(lut.get("possible_values") or ())))
    return rows


def moshi_stack(about: About) -> StackConfig:
    dim, rope = about["dim"], about["positional_embedding"] == "rope"
    return StackConfig(dim=dim, layers=about["num_layers"], heads=about["num_heads"], norm_eps=NORMS[about["norm"]],
                       ffn=moshi_width(int(about["hidden_scale"] * dim), dim), window=about.get("context") or 0, packed=True,
                       rope_theta=float(about.get("max_period", 10000)) if rope else 0.0, rope_interleaved=True)


def moshi_depth(about: About) -> StackConfig:
    require({"depformer_multi_linear": False, "depformer_weights_per_step": False, "depformer_pos_emb": "sin", **about},
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
        "model_type": next((name for name, layout in LAYOUTS.items() if layout == c.table.layout != "duplex"), "stt" if d is None
                           else "tts" if c.demux or c.voice else "hibiki" if c.table.conditions else "moshi")}
    about |= write_timing(c.table.timing)
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


def read_moshi_hf(about: About, tensors: Tensors) -> ModelConfig:
    """transformers has Moshi as published: equal codebooks of both speakers, the acoustic ones a frame late."""
    require(about, FIXED | {"num_key_value_heads": (about["num_attention_heads"], None)})
    deep, words, Q = about["depth_decoder_config"], about["vocab_size"], about["num_codebooks"]
    require(deep, {"num_key_value_heads": (deep["num_attention_heads"], None), "num_codebooks": (Q,), "hidden_act": ("silu",)})
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


def export_moshi_lora(model: MultistreamLM, base: str, dtype: str) -> tuple[About, Tensors]:
    """moshi's own adapter file: a pair for every Linear (zero where there is none), one rank and one factor for all."""
    if not is_moshi(model.config):
        raise ValueError("--to=moshi-lora is for Moshi and its relatives, this model is of another family; export --to=peft")
    found = {path: a for path, _, a in lora.adapters(model)}
    if any(a.lora_magnitude is not None for a in found.values()):
        raise ValueError("moshi has no DoRA; merge the adapter and export --to=moshi")
    if model.config.voice:
        raise ValueError("moshi has no adapters for models that listen to voices; merge the adapter and export --to=moshi")
    rank, scales = max(a.rank for a in found.values()), {a.scale for a in found.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0            # several factors: each goes into its B
    names, result = theirs_of(model, FORMAT), {}
    for path, linear in lora.linears(model).items():
        a, b = padded(linear, found.get(path), rank, scale)
        for n, (one, other) in zip(names[f"{path}.weight"], zip(a, b, strict=True), strict=True):
            result |= {f"{module_path(n)}.lora_A.weight": one, f"{module_path(n)}.lora_B.weight": other}
    depth = model.config.depth
    if model.config.demux and depth and depth.low_rank:
        stem = module_path(UNREAD)
        result |= {f"{stem}.lora_A.weight": torch.zeros(rank, depth.low_rank), f"{stem}.lora_B.weight": torch.zeros(depth.dim, rank)}
    trained = lora.trained_parameters(model, model.lora)
    for name, tensor in to_theirs(FORMAT, {n: p.detach() for n, p in trained.items()}, model.config).items():
        linear = f"{module_path(name)}.lora_A.weight" in result          # moshi keeps the weight of an adapted Linear one name deeper
        result[f"{module_path(name)}.frozen_W.weight" if linear else name] = tensor
    return {**write_moshi(model.config, dtype), "lora": True, "lora_rank": rank, "lora_scaling": scale}, result


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
    require(about, {"lora": (True,)})
    made = read_moshi(about, tensors) if about.keys() >= KEYS else model.config
    if gone := other_grid(made.table, model.table) or config_differences(made, replace(model.config, table=made.table)):
        raise ValueError(f"adapter {source} was made for another model than this one ({'; '.join(gone[:3])}); use its own base")
    ours = adapter_to_ours(model, FORMAT, tidy_moshi(tensors, model.config), source)
    scale = about.get("lora_scaling", 2.0)                  # moshi multiplies by it as it is, whatever the rank
    for path in {module_path(module_path(n)) for n in ours if n.endswith("lora_A")}:
        if f"{path}.weight" in ours:                        # a narrow table's map, trained beside its pair: one weight here
            a, b = (ours.pop(f"{path}.adapter.lora_{x}").float() for x in "AB")
            ours[f"{path}.weight"] = ours[f"{path}.weight"].float() + scale * (b @ a)
    empty = [module_path(n) for n, t in ours.items() if n.endswith("lora_B") and not t.any()]
    ours = {n: t.float() for n, t in ours.items() if module_path(n) not in empty}
    ranks = {module_path(module_path(n)): t.shape[-2] for n, t in ours.items() if n.endswith("lora_A")}
    if strange := {rank for rank in ranks.values() if about.get("lora_rank") not in (None, rank)}:
        raise ValueError(f"adapter {source}: lora_rank is {about['lora_rank']} in its config.json and {strange.pop()} in its tensors; "
                         + "mend one of them")
    return adapter_config(model, ours, {path: scale * rank for path, rank in ranks.items()}, 0.0, False, False), ours


# ---- what the rest of the code asks ----

def weight_name(about: About) -> str:
    return about.get("moshi_name") or "model.safetensors"


def named_weights(about: About) -> str:
    return about.get("moshi_name") or ""


def named_adapter(about: About) -> str:
    """The adapter that belongs to a folder's weights. Weights that were merged say `lora` too (moshi-finetune), and name none."""
    if about.get("lora_name") and not about.get("lora"):
        raise ValueError(f"config.json names an adapter, lora_name {about['lora_name']}, and says lora = {about.get('lora')}; one is wrong")
    return about.get("lora_name") or ""


def is_moshi(c: ModelConfig) -> bool:
    return c.table.aligned and c.temporal.packed and not c.fusion


def completed(about: About, tensors: Tensors, source: str, opened: Any) -> About:
    """A config.json with the sizes that it does not say: PersonaPlex's names the model and its version only.

    ValueError for weights of a model with a text model beside it, whose config.json does not name that one.
    """
    if not about.keys() >= KEYS:
        return write_moshi(PERSONAPLEX_7B, "bfloat16") | about
    if "text_projector.alpha" in tensors:
        raise ValueError(f"{source}/config.json names no text model; add \"text_llm\": {{\"hf_repo_id\": the one it was made with}}")
    return about


def change(function: Any) -> Any:
    """A conversion that keeps what goes with the model: codec, tokenizer."""
    return lambda model: (*function(model.config, model.weights()), model.extras.data)


KEYS = {"n_q", "dep_q", "text_card"}
FORMAT = Format("moshi", "moshi", lambda c: (*DEMUX, *NAMES) if c.demux else NAMES, read_moshi, write_moshi, is_moshi,
                lambda about: (about.keys() >= KEYS or by_model_type("personaplex")(about)) and not isinstance(about.get("text_llm"), dict),
                tidy_moshi, fuse_moshi, weight_file=weight_name, named=named_weights, adapter=named_adapter, complete=completed)
HF = Format("moshi_hf", "hf", lambda c: HF_NAMES, read_moshi_hf, write_moshi_hf, is_moshi, by_model_type("moshi"), tidy_moshi_hf,
            split_moshi_hf, stacked=True, shards=True)
FAMILIES = (Family(
    "Moshi", "duplex", "Moshi 7B, Hibiki, Kyutai's STT and TTS: both speakers at once", duplex_grid,
    rules=rules, user_audio="duplex",
    formats=(FORMAT, HF), adapters=(AdapterFormat("moshi-lora", "config.json", "lora.safetensors", import_moshi_lora, export_moshi_lora,
                            recognise=lambda about: bool(about.get("lora"))),),
    conversions=(
        Conversion("expand-depth", "expand-depth CKPT --out=DIR       predict the user too: the agent's depth steps, copied",
                   change(expand_depth)),
        Conversion("trim-depth", "trim-depth CKPT --out=DIR         undo expand-depth", change(trim_depth))),
    consolidated={"moshi": "consolidated.safetensors", "moshi-lora": "lora.safetensors"}),)
