"""Official layouts: the engine that turns their names and configs into ours, and ours into theirs.

A rule is (our name, their name). {n} {x} {p} match the same text on both sides; {k} on their side numbers the tensors that
we keep as one, concatenated or, in a depth transformer, stacked by step. Import joins the official tensors of each of our
parameters, export splits the parameter again, and anything left over on either side is an error. A config that an
official layout cannot express is an error that names the field. The tables are in the file of each family.
Sources: transformers 5.23, boson-multimodal 0.1.1, moshi 0.2.13, peft 0.21. Next: adapters.py.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio import hub
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from model import MultistreamLM
from options import difference, from_json, read_json, to_json

Rules = tuple[tuple[str, str], ...]
Tensors = dict[str, Tensor]             # or LazyTensor (tensor_files.py): rules and tables use shapes and types, and move nothing
About = dict[str, Any]                  # the content of a config.json
BLOCK = (("attn_norm.weight", "input_layernorm.weight"), ("ffn_norm.weight", "post_attention_layernorm.weight"),
         ("audio_attn_norm.weight", "audio_input_layernorm.weight"), ("audio_ffn_norm.weight", "audio_post_attention_layernorm.weight"),
         ("attn.{x}.{p}", "self_attn.{x}_proj.{p}"), ("attn.{x}_norm.weight", "self_attn.{x}_norm.weight"),
         ("ffn.{x}.weight", "mlp.{x}_proj.weight"), ("audio_ffn.{x}.weight", "audio_mlp.{x}_proj.weight"))


def stack(ours: str, theirs: str, block: Rules = BLOCK) -> Rules:
    return tuple((f"{ours}.{{n}}.{a}", f"{theirs}.{{n}}.{b}") for a, b in block)


WILD = {"{n}": r"(?P<n>\d+)", "{x}": "(?P<x>[a-z]+)", "{c}": r"(?P<c>\w+)", "{p}": "(?P<p>weight|bias)"}


# ---- the official files of a family ----

@dataclass(frozen=True)
class Format:
    """An official file layout: its names and its config.json."""

    name: str                                                   # name in messages
    to: str                                                     # value of `export --to=`
    rules: Callable[[ModelConfig], Rules]                       # (our name, their name); the first match is used
    read: Callable[[About, Tensors], ModelConfig]               # their config.json -> ours
    write: Callable[[ModelConfig, str], About]                  # our config and the type of the weights -> theirs
    fits: Callable[[ModelConfig], bool]                         # could a model be of this family?
    recognise: Callable[[About], bool]                          # is this config.json of this layout?
    tidy: Callable[[Tensors, ModelConfig], Tensors]             # accepted variants of names -> those of the rules
    finish: Callable[[Tensors, ModelConfig], Tensors] = lambda tensors, config: tensors
    stacked: bool = False                                       # weights of all depth steps are one tensor, as ours are
    shards: bool = False                                        # its readers know an index: a large model is several files
    peft: bool = False                                          # PEFT adapters use these names
    task_type: str | None = None                                # task_type of PEFT
    weight_file: Callable[[About], str] = lambda about: "model.safetensors"
    turned: tuple[str, ...] = ()                                # tensors that are stored with their last two axes swapped
    shared: tuple[tuple[str, str], ...] = ()                    # names of one tensor that two modules share
    codec: str = ""                                             # how names of a codec or encoder begin whose weights lie in the same file
    named: Callable[[About], str] = lambda about: ""            # the file of weights that a config.json names, "" = it names none
    adapter: Callable[[About], str] = lambda about: ""          # the adapter that it names
    complete: Callable[[About, Tensors, str, Callable[[str], Any]], About] = lambda about, tensors, source, opened: about


@dataclass(frozen=True)
class AdapterFormat:
    """An adapter as another library stores it: two files in a folder."""

    to: str                                                     # value of `export --to=`
    config_file: str
    weight_file: str
    read: Callable[[MultistreamLM, About, Tensors, str], tuple[LoraConfig, Tensors]]
    write: Callable[[MultistreamLM, str, str], tuple[About, Tensors]]       # model, name of its base, type of the weights
    other_files: tuple[str, ...] = ()                           # what else the tensors may be called
    recognise: Callable[[About], bool] = lambda about: True     # is this config file of this library?


@dataclass(frozen=True)
class Conversion:
    """A command of checkpoint.py that builds a model from others: `make` gets the loaded models, and its options as text or values."""

    name: str
    usage: str                                                  # its lines of `checkpoint.py --help`
    make: Callable[..., tuple[ModelConfig, Tensors, dict[str, Any] | None]]     # -> config, weights, DataConfig fields
    sources: tuple[str, ...] = ()                               # options that name a checkpoint each; () = the argument of the command
    options: tuple[str, ...] = ()                               # its other options


# ---- the engine: one table of names, used in both directions ----

@cache
def pattern(ours: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\(\{\w)\\\}", lambda mark: WILD.get(mark[1] + "}", mark[0]), re.escape(ours)))


def official_names(name: str, shape: torch.Size, config: ModelConfig, form: Format) -> list[str]:
    """The official names of the tensors that form one of our parameters, in order."""
    for ours, theirs in form.rules(config):
        if match := pattern(ours).fullmatch(name):
            named = theirs.format(**match.groupdict(), k="{k}", K="{K}")
            codes = config.table.streams[config.table.audio[0]].vocab if config.table.audio else 1
            whole = len(shape) == 3 and form.stacked
            count = 1 if whole else shape[0] if len(shape) == 3 else shape[0] // codes if "{k}" in named else 1
            return [named.format(k=k, K=k + 1) for k in range(count)]
    raise ValueError(f"{name} has no name in the layout {form.name}; export the model with the layout of its own family")


def split(tensor: Tensor, names: list[str], form: Format) -> list[Tensor]:
    """Cut one of our parameters into their tensors."""
    return list(tensor) if tensor.dim() == 3 and not form.stacked else list(tensor.chunk(len(names))) if tensor.dim() else [tensor]


def join(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Undo `split`."""
    if parts[0].dim() < len(shape):
        return torch.stack(parts)
    return torch.cat(parts).view(shape) if len(parts) > 1 else parts[0]        # one part is the tensor: nothing is copied


def to_ours(form: Format, wanted: Tensors, config: ModelConfig, tensors: Tensors, source: str) -> Tensors:
    """Rename and join official tensors into our parameters, strictly: ValueError lists what is missing, left over or misshapen."""
    narrow = [n for n, t in tensors.items() if t.dtype.itemsize < 2 and t.dtype != torch.bool]
    if narrow:
        raise ValueError(f"{source}: {narrow[0]} is {tensors[narrow[0]].dtype} and means nothing without its scales; "
                         + "fetch the repository whose weights are bf16 or fp32")
    left, result, missing = form.tidy(tensors, config), {}, []
    for name, target in wanted.items():
        names = official_names(name, target.shape, config, form)
        missing += [n for n in names if n not in left]
        parts = [left.pop(n) for n in names if n in left]
        for official, part, like in zip(names, parts, split(target, names, form), strict=len(parts) == len(names)):
            if part.shape != like.shape:
                raise ValueError(f"{source}: {official} is {tuple(part.shape)}, its config expects {tuple(like.shape)}; "
                                 + "check that weights and config.json belong together")
        if len(parts) == len(names):
            result[name] = join(parts, target.shape)
    if missing or left:
        raise ValueError(f"{source} does not fit its config.json ({form.name}): {len(missing)} tensors missing {sorted(missing)[:3]}, "
                         + f"{len(left)} unexpected {sorted(left)[:3]}; download all its files again")
    return result


def to_theirs(form: Format, tensors: Tensors, config: ModelConfig) -> Tensors:
    """Cut our parameters into official tensors."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        names = official_names(name, tensor.shape, config, form)
        result |= dict(zip(names, split(tensor, names, form), strict=True))
    return form.finish(result, config)


def by_model_type(*names: str) -> Callable[[About], bool]:
    """Recognise a config.json by its "model_type"."""
    return lambda about: about.get("model_type") in names


# ---- what several layouts share ----

def drop_buffers(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Drop buffers that transformers computes, and the head when it is tied to the embedding."""
    kept = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tied:
        drop_duplicate(kept, "model.embed_tokens.weight", "lm_head.weight")
    return kept


def drop_duplicate(tensors: Tensors, name: str, copy: str) -> None:
    """Drop a tensor that is stored twice; ValueError when the copies differ."""
    if copy in tensors and name in tensors:
        if not torch.equal(tensors[name], tensors[copy]):
            raise ValueError(f"{copy} differs from {name}, but config.json ties them; download the files again")
        del tensors[copy]


def require(about: About, allowed: dict[str, tuple[Any, ...]], file: str = "config.json", fix: str = "") -> None:
    """ValueError when a field has an unsupported value; the first allowed value is the default of an absent field."""
    for key, values in allowed.items():
        if about.get(key, values[0]) not in values:
            raise ValueError(f"{file} has {key} = {about[key]!r}, supported is only {' or '.join(map(repr, values))}{fix}")


SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")      # of rope_type llama3
FIXED = {"attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False, None), "quantization_config": (None,)}


def llama(about: About, layers: int, eps: float, **more: Any) -> StackConfig:
    """Read the Llama-like stack of a transformers config, with old or new RoPE fields; absent fields have their class defaults."""
    require(about, FIXED)
    new, old = about.get("rope_parameters") or {}, about.get("rope_scaling") or {}
    old = {"rope_type": old.get("type", "default"), **{key: value for key, value in old.items() if key != "type"}} if old else {}
    if any(new.get(key, value) != value for key, value in old.items()):
        raise ValueError(f"config.json has rope_parameters {new} and another rope_scaling {old}; keep one of them")
    rope = {"rope_type": new.get("type", "default")} | new | old
    require(rope, {"rope_type": ("default", "llama3")})
    heads, dim = about["num_attention_heads"], about["hidden_size"]
    kv, head = about.get("num_key_value_heads") or heads, about.get("head_dim") or 0
    return StackConfig(
        dim=dim, layers=layers, heads=heads, kv_heads=kv if kv != heads else 0, head_dim=head if head * heads != dim else 0,
        ffn=about["intermediate_size"], activation=about.get("hidden_act", "silu"), norm_eps=about.get("rms_norm_eps", eps),
        rope_theta=float(rope.get("rope_theta", about.get("rope_theta", 10000.0))),
        rope_scaling=tuple(float(rope[key]) for key in SCALING) if "factor" in rope else (), **more)


def write_llama(c: ModelConfig, layers: int, dtype: str) -> About:
    """The fields that every transformers config of a Llama-like stack has, in the way that old and new versions read."""
    s = c.temporal
    factors = zip(SCALING, (*s.rope_scaling[:3], *map(int, s.rope_scaling[3:])), strict=False)
    scaling = {"rope_type": "llama3", **dict(factors)} if s.rope_scaling else None
    return {"hidden_size": s.dim, "intermediate_size": s.ffn, "num_hidden_layers": layers, "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv, "head_dim": s.head, "hidden_act": s.activation, "rms_norm_eps": s.norm_eps,
            "rope_theta": s.rope_theta, "rope_scaling": scaling, "tie_word_embeddings": c.tied, "vocab_size": c.table.streams[0].vocab,
            "attention_bias": False, "attention_dropout": 0.0, "use_cache": True, "torch_dtype": dtype}


def ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def placeholder(official: int, vocab: int, place: int) -> int:
    """A text id that our grid does not use: the official one, or one from the end of a small vocabulary."""
    return official if official < vocab else vocab - place


def read_config(form: Format, about: About, tensors: Tensors, source: str) -> ModelConfig:
    """Translate a config.json; ValueError names `source` and the field that is missing or unsupported."""
    try:
        return from_json(ModelConfig, to_json(form.read(about, tensors)), "model")      # every field of its type
    except KeyError as error:
        raise ValueError(f"{source}/config.json lacks {error}; download the official file again") from None
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{source}: {error}") from None
    except (TypeError, AttributeError, IndexError, ArithmeticError) as error:       # a field of another type than the official one
        raise ValueError(f"{source}/config.json is damaged ({error}); download the official file again") from None


def config_differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """What differs between two architectures, one line each."""
    return difference(comparable_config(config), comparable_config(other))


def comparable_config(config: ModelConfig) -> ModelConfig:
    """A config without what official layouts do not store: row names, training options, implied defaults."""
    s = config.temporal
    fusion = config.fusion and replace(config.fusion, remember=0)
    return replace(config, fusion=fusion, dropout=0.0, input_drop=0.0, text_drop=0.0, depth_share=1.0, checkpoint=0,
                   temporal=replace(s, kv_heads=s.kv, head_dim=s.head),
                   table=replace(config.table, layout="", choice="", ids=tuple(sorted(config.table.ids)),
                                 stop=tuple(sorted(set(config.table.stop))),
                                 streams=tuple(replace(x, name="") for x in config.table.streams)))


def config_file(folder: Path) -> Path:
    """Where a folder says what its weights are: config.json, or as J-Moshi calls it."""
    other = folder / "moshi_lm_kwargs.json"
    return other if other.is_file() and not (folder / "config.json").is_file() else folder / "config.json"


CODECS = ("tokenizer-*.safetensors", "mimi-*.safetensors", "speech_tokenizer")
ADAPTERS = ("adapter*.safetensors", "lora*.safetensors", "ema.safetensors")


def weight_files(folder: Path) -> list[str]:
    """The files of a folder that may be a model's weights: no codec and no adapter."""
    others = {path.name for mark in (*CODECS, *ADAPTERS) for path in folder.glob(mark)}
    return sorted(path.name for mark in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(mark) if path.name not in others)


def official_files(folder: Path, given: Collection[str] = ()) -> dict[str, str]:
    """The codec and the tokenizer that lie beside official weights, as DataConfig fields: those that its config.json names (Moshi's
    mimi_name and tokenizer_name), else the one file that looks like it. ValueError for a named file that is not there and for a choice
    of several; `given` are fields that the user chose, which are not looked for."""
    about = read_json(config_file(folder)) if config_file(folder).is_file() else {}
    found = {}
    for name, (key, *marks) in NAMED.items():
        paths = sorted(path for mark in marks for path in folder.glob(mark))
        if name in given:
            continue
        if name == "tokenizer" and isinstance(about, dict) and about.get("text_llm"):      # tokenizer_name: of the Moshi that it began with
            key, paths = "", [path for path in paths if path.name == "tokenizer.json"]
        if isinstance(about, dict) and about.get(key):
            found[name] = str(named_file(folder, str(about[key]), f"{key} in {folder}/config.json", f"name it with --{name}=FILE"))
        elif len(paths) > 1 and paths[0].name != "tokenizer.json":
            raise ValueError(f"{folder} holds {', '.join(path.name for path in paths[:3])}: name the {name} with --{name}=FILE")
        elif paths:
            found[name] = str(paths[0])
    return found


NAMED = {"codec": ("mimi_name", *CODECS), "tokenizer": ("tokenizer_name", "tokenizer.json", "*.model")}


def named_file(folder: Path, name: str, what: str, fix: str) -> Path:
    """A file as moshi's configs name it: in their folder, file://PATH, or hf://OWNER/NAME/FILE of the hub; ValueError if there is none."""
    if name.startswith("hf://"):
        owner, repository, file = name.removeprefix("hf://").split("/", 2)
        return hub.snapshot(f"{owner}/{repository}", [file]) / file
    path = Path(name.removeprefix("file://")) if name.startswith("file://") else folder / name
    if not path.is_file():
        raise ValueError(f"{what} is {name}, which is not there; fetch it, or {fix}")
    return path
