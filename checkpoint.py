"""Checkpoints: our own run state, whole and exact, and the door to official formats.

    out/NAME/config.json  metrics.jsonl  samples/step_N/*.wav  base/ (LoRA on random weights)
    out/NAME/ckpt/step_000500/config.json            model, adapter, tokenizer, codec: all that sampling needs
                              model.safetensors      or adapter.safetensors beside the name of its base
                              ema.safetensors        averaged weights, when the run keeps them
                              state/                 optimizer, schedule, scaler, loader, RNG of every rank
    out/NAME/ckpt/latest -> step_000500              best -> step_000400

A checkpoint is written into a temporary folder and renamed: it is there whole or not at all. Only safetensors and
JSON, never pickle; weights are read and written a tensor at a time (families/tensor_files.py). Official layouts are read
and written through families/, each in the file of its family. What a run needs to resume is written by
training/run_state.py. One file because what is saved and what is loaded is one contract.
"""

import system.setup_check  # noqa: F401, first: it says how to set up where torch is missing

import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora
from audio import hub
from corpus.swap_tokenizer import swap_tokenizer
from families.adapters import adapter_formats, adapter_tensors, find_adapter, untie
from families.family import all_families, choose_format, export_model, family_of, on_base, other_grid, recognise_format
from families.folder_files import carry, generation_config, one_end, remember
from families.formats import (
    AdapterFormat,
    Conversion,
    Format,
    config_differences,
    config_file,
    named_file,
    official_files,
    read_config,
    to_ours,
    weight_files,
)
from families.tensor_files import (
    KEPT,
    OWN,
    LazyTensor,
    computed,
    give_back,
    open_tensors,
    parts_of,
    refuse_not_finite,
    value,
    write_shards,
    write_tensors,
)
from kernels.int8 import quantize_rows
from layers.architecture import ModelConfig
from layers.fusion import as_stored, fingerprint
from layers.int8_base import check_mergeable
from lora import LoraConfig
from model import MultistreamLM
from options import difference, edge, expect, from_json, locate, read_json, read_object, split_arguments, to_json, unknown, write_json
from streams import StreamTable
from system.files import check_sums, copy_file, write_sums
from system.progress import workers
from text.tokenizers import load_tokenizer, tokenizer_file
from training.parallel import is_cut, is_sharded, joined, own_rows, part, ranks, whole

FORMAT, VERSION = "multistream", 1
ADAPTER_FIELDS = {f"{name}?": kind for kind, names in ((str | None, ("peft_type", "base_model_name_or_path")), (int, ("r",)),
                  (int | float, ("lora_alpha", "lora_dropout")), (bool, ("use_rslora", "use_dora")),
                  (dict | None, ("alpha_pattern", "rank_pattern"))) for name in names}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD = 5 * 10**9                      # bytes of a file of an official layout whose readers know an index
STORED = "stored"                      # a dtype of `load`: each tensor as its file has it
Tensors = Mapping[str, Tensor | LazyTensor]
Prepare = Callable[[MultistreamLM], dict[str, torch.dtype]]


# ---- models ----

@dataclass
class Extras:
    """What a checkpoint says besides weights; sample.py reads it."""

    step: int = 0
    data: dict[str, Any] | None = None      # codec, tokenizer, normaliser, as DataConfig fields
    base: str = ""                          # where the weights under an adapter come from
    folder: str = ""                        # where it was loaded from
    source: str = ""                        # what was asked for: a folder, a file or a hub id


def save(model: nn.Module, dir: str | Path, extras: Extras | None = None, write: bool = True) -> Path:
    """Write a model, adapters included, as a folder that `load` reads. With `extras.base` only the adapter is written.

    Of a sharded model every rank calls it, and one with `write`.
    """
    folder, extras = Path(dir), extras or getattr(model, "extras", None) or Extras()
    config: LoraConfig | None = getattr(model, "lora", None)
    if config is None or not extras.base:
        return write_checkpoint(folder, "model", model.config, model.weights(), extras, config, write=write)
    tensors = lora.state(model, config)
    idle = lora.idle_adapters(tensors)
    idle = idle if len(idle) < len(list(lora.adapters(model))) else []         # one that was never trained stays refused
    return write_checkpoint(folder, "adapter", model.config, tensors, extras, config, idle, write)


def write_checkpoint(folder: Path, kind: str, model: ModelConfig, tensors: Tensors, extras: Extras, config: LoraConfig | None = None,
                     idle: Sequence[str] = (), write: bool = True) -> Path:
    """Write the tensors of a "model" or an "adapter" and the config.json beside them."""
    write_tensors(folder / f"{kind}.safetensors", tensors, write)
    if not write:
        return folder
    data = dict(extras.data or {})
    if data and (tokenizer := tokenizer_file(data["tokenizer"], local=True)).is_file():      # a checkpoint carries its tokenizer
        copy_file(tokenizer, folder / tokenizer.name)
        data["tokenizer"] = tokenizer.name
    if kind == "model" and (source := official_folder(extras)):              # and what stood around the weights it began with
        remember(source, folder / "official")
    write_json(folder / "config.json", {
        "format": FORMAT, "version": VERSION, "model": to_json(model), "lora": to_json(config) if config else None,
        "step": extras.step, "data": data, "base": extras.base if config is not None else "",
        "idle": list(idle), "versions": {"torch": torch.__version__, "python": sys.version.split()[0]}})
    own = [*sorted(path.name for path in folder.glob(f"{kind}*.safetensors*")), "config.json", str(data.get("tokenizer"))]
    write_sums(folder, [name for name in own if (folder / name).is_file()])
    return folder


def official_folder(extras: Extras) -> Path | None:
    """Where the files lie that stood around the official weights that a model began with; None when there were none."""
    folder = Path(extras.folder) if extras.folder else None
    if folder is not None and (folder / "official").is_dir():
        return folder / "official"
    if folder is not None and config_file(folder).is_file() and recognise(folder) is not None and not lone_adapter(folder):
        return folder
    if not extras.base:
        return None
    base = resolve(resolve_base(extras.base, folder or Path(".")))
    return official_folder(Extras(folder=str(base), base="" if recognise(base) else read_about(base)["base"]))


def carry_files(model: MultistreamLM, out: Path, about: dict[str, Any] | None = None, form: Format | None = None) -> None:
    """Write beside an export what stood around the weights that its model began with."""
    extras = getattr(model, "extras", None) or Extras()
    if (source := official_folder(extras)) is None:
        return
    known = tokenizer_file(extras.data["tokenizer"], local=True) if extras.data else None
    same = form is not None and recognise(source) is form
    carry(source, out, about if same else None, model.table.stop, known if known is not None and known.is_file() else None)


def load(path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None,
         adapter: str | Path | None = None, config: ModelConfig | None = None, prepare: Prepare | None = None) -> MultistreamLM:
    """Load a model: a run folder, a checkpoint folder, an official one, a file with its config beside it, or a hub id.

    dtype "fp32", "bf16", "fp16" or a torch dtype, "stored" as in the files, None keeps fp32. `adapter` is a folder whose adapter
    is put on top: a checkpoint of ours, or an adapter of PEFT or moshi. `config` replaces the stored one, for switches such as
    dropout that hold no weights; with an empty path it is the model, and its weights are random. Strict: every tensor of the
    file is consumed and every parameter filled. The result carries `extras` and `lora`.

    Weights are read one at a time into their place; on a CPU those that are stored in `dtype` are the mapped file itself.
    `prepare` is given the model before it has weights: it names the parameters of another type than `dtype`, which get memory
    of their own (training); int8 is a weight of 8 bits, rounded to `dtype` first. It may add adapters and cut the model into
    shards: each rank then reads its own rows only.
    """
    torch.set_num_threads(torch.get_num_threads())         # a forked process makes torch's pool anew, which two threads may not do at once
    dtype = (DTYPES | {STORED: STORED})[dtype] if isinstance(dtype, str) else dtype or torch.float32
    if not path and config is not None:
        model = load_text_tower(MultistreamLM(config), Path("."), device, dtype)
        return cast(model, device, dtype, prepare(model) if prepare else {})
    if prepare and (lone_adapter(local(path)) or recognise(resolve(path)) is None and read_about(resolve(path)).get("lora")):
        raise ValueError(f"{path} has an adapter; go on with it (--init_adapter={path}), or merge it first (python checkpoint.py merge)")
    if lone_adapter(local(path)):
        if adapter is not None:
            raise ValueError(f"{path} and {adapter} are both adapters; give the model that they belong to")
        return load(base_of(path), device, dtype, path, config)
    folder = resolve(path)
    layout = recognise(folder)
    about, mapped, seen = read_about(folder) if layout is None else None, frozenset(), set()
    if about is not None and about["base"]:
        refuse_circle(folder)
        model = load(resolve_base(about["base"], folder), device, dtype, config=config)
        seen = set(model.parameters())
        fill_adapter(model, folder, about)
        model.extras = extras_of(about, folder, path)
    else:
        model, tensors = open_model(path, config)
        mapped = frozenset().union(*(t.files for t in tensors.values() if isinstance(t, LazyTensor)))
        names = list(model.weights())                      # without adapters that are added
        types = prepare(model) if prepare else {}
        with naming_changed_options(model, about, folder):
            fill(model, tensors, str(folder), device, dtype, types, names)
        load_text_tower(model, folder, device, dtype)
    if layout is not None and adapter is None and (own := layout.adapter(read_json(config_file(folder)))):
        if is_sharded(model):
            raise ValueError(f"{folder}/config.json names an adapter, which --shard cannot merge; use python checkpoint.py merge first")
        put_adapter(model, named_file(folder, own, f"the adapter in {folder}/config.json", "name another with --adapter=FILE"))
        model = lora.strip(model) if config is not None else model           # a run puts its own adapters on top
    if ranks()[2] == 0:                                    # after reading, by one rank of a node: these are the pages that the model uses
        check_sums(folder, False, {f.path: f.file_sum for f in mapped})
    model = put_adapter(model, adapter).eval()
    model = model if prepare else cast(model, device, dtype, {})
    return refuse_broken(model, folder, lambda t: t in seen or any(f.finite(part(t)) for f in mapped))


def refuse_broken(model: MultistreamLM, source: object, known: Callable[[Tensor], bool] = lambda t: False) -> MultistreamLM:
    """The model itself; ValueError names a weight of it, or a scale of 8 bits, that holds NaN or infinite values. One pass over memory,
    on all free cores, but for what is `known` to be finite."""
    rest = [(n, part(t)) for n, t in (*model.named_parameters(), *model.named_buffers()) if not known(t)]
    with ThreadPoolExecutor(max(1, workers() // torch.get_num_threads())) as pool:
        list(pool.map(lambda named: refuse_not_finite(*named, source), rest))
    return model


def refuse_circle(folder: Path) -> None:
    """ValueError where an adapter lies, over others or at once, on itself."""
    passed = [folder]
    while base := read_about(folder)["base"] if recognise(folder) is None else "":
        folder = resolve(resolve_base(base, folder))
        if folder in passed:
            raise ValueError(f"{passed[0]}/config.json names {base!r} as its base, which leads back to itself; name the model with --init")
        passed.append(folder)


def open_model(path: str | Path, config: ModelConfig | None = None) -> tuple[MultistreamLM, Tensors]:
    """A model without memory, on the meta device, and its weights, not yet read. Not of an adapter beside its base."""
    folder = resolve(path)
    layout = recognise(folder)
    if layout is not None:
        return open_official(layout, folder, config, Path(path))
    about = read_about(folder)
    model, tensors = build(about, folder, config)
    model.extras = extras_of(about, folder, path)
    return model, tensors


def extras_of(about: dict[str, Any], folder: Path, path: str | Path) -> Extras:
    data = dict(about["data"])
    if data and ((folder / data["tokenizer"]).is_file() or
                 (Path(data["tokenizer"]).suffix and not locate(data["tokenizer"]).exists() and not hub.is_id(data["tokenizer"]))):
        data["tokenizer"] = str(folder / data["tokenizer"])
    return Extras(about["step"], data, about["base"], str(folder), str(path))


def cast(model: MultistreamLM, device: str | torch.device, dtype: torch.dtype | str, types: dict[str, torch.dtype]) -> MultistreamLM:
    """Move a model, a parameter at a time, in `dtype` but for those that `types` names; numbers of 8 bits stay."""
    for name, p in model.named_parameters():
        expected = types.get(name, dtype)
        p.data = p.data.to(device, expected if isinstance(expected, torch.dtype) and p.is_floating_point() else None)
    return model.to(device)


def put_adapter(model: MultistreamLM, adapter: str | Path | None) -> MultistreamLM:
    """Put the adapter of a folder onto a loaded model: ours or another library's. None leaves the model as it is."""
    if adapter is None:
        return model
    extras, folder, step = model.extras, local(adapter), 0
    if found := find_adapter(folder):
        config, tensors = read_adapter(*found, model)
        lora.inject(model, config)
        lora.load_state(model, config, tensors, str(folder), idle=tensors)      # these libraries write every pair, trained or not
    else:
        folder = resolve(adapter)
        about = read_about(folder)
        fill_adapter(model, folder, about)
        step = about["step"]
    model.extras = Extras(step, extras.data, extras.folder, str(folder), extras.source)
    return model


def adapter_config(adapter: str | Path, model: MultistreamLM) -> LoraConfig:
    """How the adapter of a folder adapts a model, of which nothing but names and shapes is read."""
    folder = local(adapter)
    if found := find_adapter(folder):
        return read_adapter(*found, model)[0]
    folder = resolve(adapter)
    return from_json(LoraConfig, read_about(folder).get("lora") or {}, f"{folder}/config.json lora")


def read_adapter(form: AdapterFormat, file: Path, model: MultistreamLM) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter of another library, `file` its tensors, as one of ours for this model."""
    about, tensors = read_object(file.parent / form.config_file, "fetch the adapter again", **ADAPTER_FIELDS), adapter_tensors(file)
    try:
        return form.read(model, about, tensors, str(file.parent))
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, AssertionError, re.error) as error:
        raise ValueError(f"{file.parent}/{form.config_file} is damaged ({error}); fetch the adapter again") from None


def local(name: str | Path) -> Path:
    """A file or folder here, or the folder of a hub id."""
    return Path(name) if Path(name).exists() or not hub.is_id(name) else from_hub(str(name))


def lone_adapter(path: Path) -> bool:
    """Whether a path is an adapter of another library, without the model that it belongs to."""
    found = find_adapter(path)
    return found is not None and (path.is_file() or not weight_files(path))


def read_about(folder: Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint of ours; ValueError when it is another's, of another version, or damaged."""
    about = read_json(folder / "config.json")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        kind = about.get("model_type") if isinstance(about, dict) else type(about).__name__
        raise ValueError(f"{folder}/config.json is no multistream checkpoint (model_type {kind!r}); "
                         + "official layouts that can be read are listed by `python checkpoint.py import --help`")
    if about.get("version") != VERSION:
        raise ValueError(f"{folder} has checkpoint version {about.get('version')}, this code reads {VERSION}; update the code")
    fields = {"model": dict, "data": {"tokenizer": str, "codec?": str, "normaliser?": str} if about.get("data") else dict, "step": int,
              "base": str, "lora?": dict | types.NoneType, "idle?": [str]}
    try:
        expect(about, fields)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is damaged ({error}); use another checkpoint") from None
    return about


def build(about: dict[str, Any], folder: Path, config: ModelConfig | None = None) -> tuple[MultistreamLM, Tensors]:
    """The model of a config.json on the meta device, and its weights: model.safetensors, and ema.safetensors where there is one."""
    stored = from_json(ModelConfig, about["model"], f"{folder}/config.json model")
    config = config and fitted(config, stored, folder)
    with torch.device("meta"):
        model = MultistreamLM(config or stored)
    if about.get("lora"):
        lora.inject(model, from_json(LoraConfig, about["lora"], f"{folder}/config.json lora"))
    return model, open_tensors(folder / "model.safetensors") | averages(folder)


def fitted(config: ModelConfig, stored: ModelConfig, folder: Path) -> ModelConfig:
    """A run's config on weights that were stored with another; ValueError where the two have another grid."""
    if gone := other_grid(stored.table, config.table):
        raise ValueError(f"{folder} has another stream table than the config's model: {'; '.join(gone[:3])}; "
                         + "use weights of the same family")
    return replace(config, table=on_base(config.table, stored.table))


def averages(folder: Path) -> Tensors:
    """The averaged weights of a checkpoint, if the run keeps them."""
    return open_tensors(folder / "ema.safetensors") if parts_of(folder / "ema.safetensors") else {}


@contextmanager
def naming_changed_options(model: nn.Module, about: dict[str, Any] | None, folder: Path) -> Iterator[None]:
    """Within, a ValueError names the options in which the config.json `about` of a checkpoint of ours differs from `model`, if any do."""
    try:
        yield
    except ValueError:
        changes = [f"--model.{line}" for line in difference(from_json(ModelConfig, about["model"]), model.config)] if about else []
        if about and about.get("lora") and getattr(model, "lora", None):
            changes += [f"--lora.{line}" for line in difference(from_json(LoraConfig, about["lora"]), model.lora)]
        if not changes:
            raise
        listed = ", ".join(line.replace(": ", "=", 1).replace(" -> ", " (this run asks for ") + ")" for line in changes[:3])
        raise ValueError(f"{folder} was made with {listed}; drop the option, or use another --out or --init") from None


def check_fit(expected: Tensors, tensors: Tensors, source: str) -> None:
    """ValueError lists what is missing, unexpected or of another shape."""
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"{source} does not fit this model: {len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected "
                         + f"{unexpected[:3]}; check that weights and config.json belong together")
    for name, target in expected.items():
        if target.shape != tensors[name].shape:
            raise ValueError(f"{source}: {name} is {tuple(tensors[name].shape)}, the config needs {tuple(target.shape)}; "
                             + "check that weights and config.json belong together")


@torch.no_grad()
def fill(model: nn.Module, tensors: Tensors, source: str, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.float32,
         types: dict[str, torch.dtype] | None = None, names: Sequence[str] | None = None) -> None:
    """Give a model its weights (those of `names`, or all), strictly and one at a time: copied into its memory, or, on the meta
    device, as `load` says. Of one that is cut each rank reads its own rows."""
    weights, types = model.weights(), types or {}
    check_fit({name: weights[name] for name in names or weights}, tensors, source)
    for name in names or weights:
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        target = getattr(module, leaf)
        rows = value(own_rows(tensors[name], target))
        if not target.is_meta:
            part(target).copy_(rows)
        elif types.get(name) == torch.int8:
            q, scale = quantize_rows(rows.to(device, None if dtype == STORED else dtype))
            module.row_scale = whole(joined(scale, target))
            module.weight = nn.Parameter(joined(q, target), requires_grad=False)
        else:
            kind = types.get(name, rows.dtype if dtype == STORED else dtype)
            held = rows.to(device, kind)
            own = name in types or is_cut(target) or rows.nbytes < OWN or not rows.is_contiguous()      # of a cut one, pages hold more
            if (own or not isinstance(tensors[name], LazyTensor)) and held.data_ptr() == rows.data_ptr():
                held = rows.clone(memory_format=torch.contiguous_format)
            held = joined(held, target)
            setattr(module, leaf, nn.Parameter(held, target.requires_grad) if leaf in module._parameters else held)
        give_back([tensors[name]], 0 if is_cut(target) else KEPT)
        del target, rows
    model.tie()                 # filling gives each head a weight of its own


def base_of(adapter: str) -> str:
    """Where the weights under an adapter are; ValueError where it does not say."""
    folder = local(adapter)
    if found := find_adapter(folder):
        about = read_object(found[1].parent / found[0].config_file, "fetch the adapter again", **ADAPTER_FIELDS)
        base = about.get("base_model_name_or_path") or ""
    else:
        folder = resolve(adapter)
        base = read_about(folder)["base"] if recognise(folder) is None else ""
    place = resolve_base(base, folder) if base else ""
    if not place or not (Path(place).exists() or hub.is_id(place)):
        what = f"was made for {base}, which is not here" if base else "does not say which model it belongs to"
        raise ValueError(f"adapter {adapter} {what}; name both: --ckpt=MODEL --adapter={adapter}, "
                         + "or to train on, --init=MODEL --init_adapter=ADAPTER")
    return place


def recognise(folder: Path) -> Format | None:
    """The official layout of a folder, None when it is ours or of no known layout."""
    about = read_json(config_file(folder))
    return recognise_format(about) if isinstance(about, dict) and about.get("format") != FORMAT else None


def open_official(form: Format, folder: Path, config: ModelConfig | None = None,
                  file: Path | None = None) -> tuple[MultistreamLM, Tensors]:
    """The model of an official config.json on the meta device, and its weights by our names, of one file or of shards."""
    about = read_json(config_file(folder))
    tensors = official_tensors(form, folder, about, file)
    ends = generation_config(folder).get("eos_token_id")          # it knows all ids that end a text, config.json often one
    about |= {} if ends is None else {"eos_token_id": ends}
    about = form.complete(about, tensors, str(folder), lambda name: open_model(name)[0])
    stored = read_config(form, about, tensors, str(folder))
    changed = config_differences(stored, replace(config, table=stored.table)) if config is not None else []
    if changed:
        raise ValueError(f"{folder} has another architecture than the config's model: {'; '.join(changed[:3])}")
    config = config and fitted(config, stored, folder)
    with torch.device("meta"):
        model = MultistreamLM(config or stored)
    model.extras = Extras(folder=str(folder), source=str(file or folder))
    return model, to_ours(form, model.weights(), stored, tensors, str(folder))


def official_tensors(form: Format, folder: Path, about: dict[str, Any], file: Path | None = None) -> dict[str, LazyTensor]:
    """All tensors of an official folder, not yet read: of `file`, or of what its config.json names, or of its usual files."""
    named, usual = form.named(about), folder / form.weight_file(about)
    if not named and (named := str(about.get("transformers_weights") or "")) and Path(named).name != named:
        raise ValueError(f"{folder}/config.json: transformers_weights {named!r} is outside its folder; fetch it again")
    own, tuned = file if file is not None and file.is_file() and file.name != "config.json" else None, folder / "consolidated.safetensors"
    if named and own is None and (not tuned.is_file() or (folder / named).is_file()):                # moshi-finetune keeps the base's names
        usual = named_file(folder, named, f"the weights in {folder}/config.json", "give the file itself")
    return open_official_files(folder, own or (tuned if named and not usual.is_file() else usual))


def load_text_tower(model: MultistreamLM, folder: Path, device: str | torch.device = "cpu",
                    dtype: torch.dtype | str = torch.float32) -> MultistreamLM:
    """Give a model that has a text tower that tower's weights, from where its config says (DSAA)."""
    fusion = model.config.fusion
    if fusion is None:
        return model
    try:
        body = load(resolve_base(fusion.source, folder), device, STORED)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"the text model beside {folder} cannot be read: {error}; name its place with --model.fusion.source") from None
    found = fingerprint(body.weights())
    if config_differences(body.config, as_stored(fusion.tower, body.config)) or fusion.revision not in ("", found):
        raise ValueError(f"{fusion.source} is not the text model that {folder} was made with (fingerprint {found}, not {fusion.revision}); "
                         + "name that one with --model.fusion.source")
    body.config = fusion.tower
    kind = model.text_head.weight.dtype if dtype == STORED else dtype                      # of the files beside it: it computes with those
    model.tower.body = cast(body, device, kind, {}).requires_grad_(False).eval()
    return model


def open_official_files(folder: Path, file: Path) -> dict[str, LazyTensor]:
    """All tensors of an official folder: those of `file`, a file of weights or an index, the shards of its index, or its only weights."""
    indexes = [*sorted(folder.glob("*.safetensors.index.json")), *sorted(folder.glob("pytorch_model*.bin.index.json"))]
    indexes, found = [file] if file.name.endswith(".index.json") else indexes, weight_files(folder)
    if file.is_file() and file not in indexes:
        folder, names = file.parent, [file.name]
    elif indexes:
        index = read_object(indexes[0], "fetch it again", weight_map=dict)
        names = sorted({str(name) for name in index["weight_map"].values()})
    else:
        names = found
        if len(names) != 1:
            raise ValueError(f"{folder} holds {len(names)} weight files {names[:3]} and no index; give the one to read")
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{indexes[0]} names files outside its folder; fetch it again")
    tensors: dict[str, LazyTensor] = {}
    for name in names:
        tensors |= open_tensors(folder / name) if name.endswith(".safetensors") else hub.torch_tensors(folder / name)
    return tensors


def fill_adapter(model: MultistreamLM, folder: Path, about: dict[str, Any]) -> None:
    """Put the adapter of a checkpoint folder onto a model that has none."""
    if not about.get("lora"):
        raise ValueError(f"{folder} holds no adapter; give a checkpoint of a LoRA run")
    table = from_json(StreamTable, about["model"].get("table"), f"{folder}/config.json table")
    if gone := other_grid(model.config.table, table):
        raise ValueError(f"adapter {folder} was made for another stream table than this model's ({'; '.join(gone[:3])}); "
                         + f"use its own base {about['base']!r}")
    model.config = replace(model.config, table=on_base(table, model.config.table))
    model.table = model.config.table
    if model.config.tied and not about["model"].get("tied", True):             # adapted apart, by PEFT
        untie(model)
    lora.inject(model, from_json(LoraConfig, about["lora"], f"{folder}/config.json lora"))
    tensors = open_tensors(folder / "adapter.safetensors") | averages(folder)
    lora.load_state(model, model.lora, {name: t.read() for name, t in tensors.items()}, str(folder), about.get("idle") or ())


def resolve(path: str | Path) -> Path:
    """Find the checkpoint folder that a user means: the folder itself, a run's latest one, a file's, or a hub snapshot."""
    path = Path(path)
    if path.is_file():
        path = path.parent
    for folder in (path / "ckpt" / "latest", path):
        if config_file(folder).is_file() and (folder.name == "latest" or has_weights(folder)):
            return folder.resolve()
    if path.exists() and has_weights(path):
        raise FileNotFoundError(f"{path} holds no checkpoint, but weights without a config.json; "
                                + "fetch that of their repository, or check the path")
    if path.exists():
        inside = [p.parent for mark in ("*/adapter_config.json", "consolidated/config.json", "*/consolidated/config.json",
                                        "checkpoints/*/consolidated/config.json") for p in sorted(path.glob(mark))]
        raise FileNotFoundError(f"{path} holds no checkpoint (config.json with model or adapter weights, .safetensors); "
                                + (f"give {inside[-1]}" if inside else "train first or check the path"))
    return from_hub(str(path))


def has_weights(folder: Path) -> bool:
    return any(any(folder.glob(mark)) for mark in ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"))


def resolve_base(base: str, folder: Path) -> str:
    """A base is named relative to the run folder (two above the checkpoint), absolutely, or by hub id."""
    local = folder.parent.parent / base
    return str(local) if local.exists() else base


def from_hub(name: str) -> Path:
    """Fetch a hub id, or find it in the local hub cache; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured."""
    if not hub.is_id(name):
        raise FileNotFoundError(f"{name} does not exist; give a run folder such as out/demo, a checkpoint folder, or a hub id")
    folder = hub.snapshot(name, ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"])
    return folder if any(folder.glob("*.safetensors")) else hub.snapshot(name, ["*.json", "*.bin", "*.model", "*.txt", "*.jinja", "*.py"])


# ---- import, export, merge ----

def export(model_or_dir: MultistreamLM | str | Path, dir: str | Path, to: str = "multistream",
           tell: Callable[[str], Any] = lambda line: None) -> Path:
    """Write a model in another layout, adapters merged in fp32; only `peft` and `moshi-lora` write the adapter alone.

    to: "multistream" (a plain checkpoint of ours), "hf" (for transformers), "peft" (an adapter with the names of "hf"), or
    another official layout of the model's family (python -m families). Weights keep the model's type. What was
    merged is compared with the adapted model; `tell` gets a line about it, too large a difference is a ValueError.
    """
    model, tensors = opened(model_or_dir)
    if to in {form.to for form in adapter_formats()}:
        return export_adapter(model, Path(dir), to)
    if any(path in model.config.tied_heads for path, *_ in lora.adapters(model)):
        raise ValueError("an adapter on a tied head cannot be merged: it would change the embedding too; export --to=peft")
    tensors = merged_weights(model) if tensors is None else tensors
    dtype = min((t.dtype for t in tensors.values() if t.dtype.is_floating_point), key=lambda t: t.itemsize)
    if count := len(list(lora.adapters(model))):
        difference, largest = merge_error(model)
        about = f"{count} adapters merged in fp32: logits differ by at most {difference:.2g}, the largest is {largest:.2g}"
        if not difference <= (1e-3 if dtype == torch.float32 else 0.1) * max(1.0, largest):
            raise ValueError(f"{about}; the merged model is another one, keep the adapter apart or load with dtype fp32")
        tell(f"{about} (on 3 fixed grids, {str(dtype).removeprefix('torch.')})")
    if to != FORMAT:
        about, theirs = export_model(model.config, tensors, to, str(dtype).removeprefix("torch."))
        form = choose_format(model.config, to)
        theirs |= codec_beside(model, form, tell)
        write_shards(Path(dir), form.weight_file(about), theirs, SHARD if form.shards else sys.maxsize)
        about = one_end(about, Path(dir))
        write_json(Path(dir) / "config.json", about)
        carry_files(model, Path(dir), about, form)
        return Path(dir)
    extras = getattr(model, "extras", None) or Extras()
    if extras.data is None and extras.folder:                               # import: what the official folder says of codec and tokenizer
        facts = family_of(model.table).companions | official_files(Path(extras.folder))
        extras = replace(extras, data=facts) if "tokenizer" in facts and ("codec" in facts or not model.table.codes) else extras
    origin = official_folder(extras) or extras.folder
    return write_checkpoint(Path(dir), "model", model.config, tensors, replace(extras, base="", folder=str(origin)))


def codec_beside(model: MultistreamLM, form: Format, tell: Callable[[str], Any]) -> Tensors:
    """The codec that lies in the same file as the weights in an official layout: that of the folder that a model began with."""
    if not form.codec:
        return {}
    source = official_folder(getattr(model, "extras", None) or Extras())
    there = source is not None and weight_files(source) and recognise(source) is form
    found = official_tensors(form, source, read_json(config_file(source))) if there else {}
    found = {name: t for name, t in found.items() if name.startswith(form.codec)}
    if not found:
        tell(f"without the codec or encoder {form.codec}*, which does not lie beside what this was made from; the released weights have it")
    return found


def opened(model_or_dir: MultistreamLM | str | Path) -> tuple[MultistreamLM, Tensors | None]:
    """What is to be written: without an adapter nothing but the open files, which are read a tensor at a time; else a model."""
    if isinstance(model_or_dir, nn.Module):
        return model_or_dir, None
    if lone_adapter(local(model_or_dir)):
        return load(model_or_dir, dtype=STORED), None
    folder = resolve(model_or_dir)
    layout = recognise(folder)
    if layout.adapter(read_json(config_file(folder))) if layout is not None else read_about(folder).get("lora"):
        return load(model_or_dir, dtype=STORED), None
    check_sums(folder, below=False)
    return open_model(model_or_dir)


def merged_weights(model: MultistreamLM) -> Tensors:
    """The weights of a model, what is adapted merged in fp32 and cast once, when it is read."""
    tensors: Tensors = {name: t for name, t in model.weights().items() if ".adapter." not in name}
    for path, module, adapter in lora.adapters(model):
        check_mergeable(path, module)
        if adapter.base is None:
            tensors[f"{path}.weight"] = computed(module.weight, lambda m=module, a=adapter: a.merged(m.weight).to(m.weight.dtype))
    return tensors


@torch.no_grad()
def merge_error(model: MultistreamLM, merged: MultistreamLM | None = None) -> tuple[float, float]:
    """The largest difference of a logit between a model with adapters and its merged self on 3 fixed grids, and the largest logit.

    The merged one is the same model, each weight merged as it is used: there is no second one in memory. Or it is given.
    """
    table, columns, training = model.table, 16, model.training
    draw = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randint(0, s.classes or s.vocab, (3, columns), generator=draw) for s in table.streams], 1)
    if table.audio and not table.aligned:                  # they take turns: text, speech, text
        tokens[:, table.audio, :5] = tokens[:, table.audio, 12:] = -1
        tokens[:, table.text, 5:12] = -1
    tokens = tokens.to(next(model.parameters()).device)
    kinds = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and ".adapter." not in name}
    with torch.autocast(tokens.device.type, min(kinds, key=lambda t: t.itemsize), enabled=len(kinds) > 1):        # stored so, a part each
        ours = model.eval()(tokens)
        with lora.merging(model) if merged is None else nullcontext():
            theirs = (merged or model).eval().to(tokens.device)(tokens)
    model.train(training)
    pairs = [(a[b != -torch.inf].float(), b[b != -torch.inf].float()) for a, b in zip(ours, theirs, strict=True)       # ids without a head
             if a is not None]
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a, _ in pairs)


def export_adapter(model: MultistreamLM, folder: Path, to: str) -> Path:
    """Write the adapter of a model in the layout of another library."""
    if getattr(model, "lora", None) is None:
        raise ValueError(f"--to={to} writes an adapter, this model has none; give a checkpoint of a LoRA run")
    extras = getattr(model, "extras", None) or Extras()
    form = next(form for form in adapter_formats() if form.to == to)
    base = resolve_base(extras.base, Path(extras.folder)) if extras.base and extras.folder else extras.base or extras.folder
    about, tensors = form.write(model, base, str(next(model.parameters()).dtype))
    write_tensors(folder / form.weight_file, tensors)
    write_json(folder / form.config_file, about)
    carry_files(model, folder)
    return folder


def write_made(folder: str | Path, config: ModelConfig, tensors: Tensors, extras: Extras) -> Path:
    """Write a model that was made of others, strictly."""
    with torch.device("meta"):
        expected = MultistreamLM(config).weights()
    check_fit(expected, tensors, "what was made")
    return write_checkpoint(Path(folder), "model", config, tensors, extras)


def swap_command(path: str, pairs: dict[str, str]) -> str:
    """`checkpoint.py swap-tokenizer`: the same model for other text ids, the new tokenizer beside it."""
    if "tokenizer" not in pairs or "out" not in pairs:
        raise ValueError("swap-tokenizer needs --tokenizer=FILE, the new one, and --out=DIR, the folder to write")
    model, new = load(path, dtype=STORED), load_tokenizer(pairs["tokenizer"])
    if getattr(model, "lora", None) is not None:
        raise ValueError(f"{path} has an adapter; merge it first (python checkpoint.py merge)")
    data = official_files(Path(model.extras.folder)) | dict(model.extras.data or {})
    if "from" not in pairs and "tokenizer" not in data:
        raise ValueError(f"{path} does not say which tokenizer it was trained with; name it with --from=FILE")
    config, tensors, kept = swap_tokenizer(model.config, model.weights(), load_tokenizer(pairs.get("from", data.get("tokenizer"))), new)
    known = "codec" in data or not config.table.codes                 # of official weights the codec may lie elsewhere
    extras = Extras(model.extras.step, data | {"tokenizer": pairs["tokenizer"]} if known else None)    # the old files fit no more
    folder = write_made(pairs["out"], config, tensors, extras)
    new.save(folder)
    return f"wrote {folder}: {kept} of {new.size} pieces kept their rows"


def make(name: str, sources: Sequence[str | Path | MultistreamLM], options: dict[str, Any]) -> tuple[ModelConfig, Tensors, Extras]:
    """What a family's conversion makes of checkpoints or models; `options` are those of its command."""
    found = next(c for family in all_families() for c in family.conversions if c.name == name)
    models = [source if isinstance(source, nn.Module) else load(str(source)) for source in sources]
    for model, source in zip(models, sources, strict=True):
        if getattr(model, "lora", None) is not None:
            raise ValueError(f"{'the model' if model is source else source} has an adapter; merge it first (python checkpoint.py merge)")
        model.extras = getattr(model, "extras", None) or Extras()
    config, tensors, data = found.make(*models, **options)
    return config, tensors, Extras(data=data)


def converted(name: str, *sources: str | Path | MultistreamLM, **options: Any) -> MultistreamLM:
    """The model that a family's conversion makes of checkpoints or models."""
    config, tensors, extras = make(name, sources, options)
    with torch.device("meta"):
        model = MultistreamLM(config)
    fill(model, tensors, "what was made", dtype=STORED)
    model.extras = extras
    return model.eval()


def convert(name: str, dir: str | Path, *sources: str | Path | MultistreamLM, **options: Any) -> Path:
    """Run a family's conversion (`python -m families` lists them): checkpoints, or models, in; a folder out."""
    return write_made(dir, *make(name, sources, options))


def convert_command(found: Conversion, words: list[str], pairs: dict[str, str]) -> str:
    """A conversion from the command line."""
    unknown_options(pairs, ("out", *found.sources, *found.options))
    for name in found.sources:
        if not pairs.get(name):
            raise ValueError(f"{found.name} needs --{name.replace('_', '-')}, a checkpoint or hub id")
    if not pairs.get("out"):
        raise ValueError(f"{found.name} needs --out, a folder to write")
    if len(words) != (not found.sources):
        raise ValueError(f"{found.name} takes {'no word but its options' if found.sources else 'one checkpoint'}, got {words}")
    sources = [pairs[name] for name in found.sources] or words
    return f"wrote {convert(found.name, pairs['out'], *sources, **{k: v for k, v in pairs.items() if k in found.options})}"


COMMANDS = ("import", "export", "merge", "show")
USAGE = """python checkpoint.py COMMAND

import OFFICIAL --out=DIR         read an official folder, file or hub id and write ours
export CKPT --to=LAYOUT --out=DIR    multistream, hf, peft or another layout of its family (python -m families); adapters merged in fp32
merge CKPT --out=DIR              export --to=multistream: the adapter becomes part of the model
swap-tokenizer CKPT --tokenizer=FILE --out=DIR    another language: shared pieces keep their rows; --from=FILE names the old one
show CKPT                         what a checkpoint holds
"""


def unknown_options(pairs: dict[str, str], known: tuple[str, ...]) -> None:
    for name in pairs.keys() - set(known):
        raise ValueError(unknown(f"--{name}", [f"--{k}" for k in known]))


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help",))
    pairs = {key.replace("-", "_"): value for key, value in pairs.items()}
    if "help" in pairs or not words:
        print(USAGE + "\n".join(c.usage for family in all_families() for c in family.conversions))
        return
    command, *words = words
    if any((Path(pairs.get("out", "-")) / name).is_dir() for name in ("ckpt", "state")):
        raise ValueError(f"{pairs['out']} holds a run, whose files would be replaced; choose another --out")
    conversions = {c.name: c for family in all_families() for c in family.conversions}
    if command in conversions:
        return print(convert_command(conversions[command], words, pairs))
    if command not in (*COMMANDS, "swap-tokenizer"):
        known = [*COMMANDS, "swap-tokenizer", *conversions]
        raise ValueError(f"{unknown(command, known, 'command')}; the commands are {', '.join(known)}")
    if len(words) != 1:
        raise ValueError(f"{command} takes one checkpoint, got {' '.join(words) or 'none'}; python checkpoint.py --help shows the commands")
    path = words[0]
    if command == "swap-tokenizer":
        unknown_options(pairs, ("tokenizer", "from", "out"))
        return print(swap_command(path, pairs))
    unknown_options(pairs, ("out", "to"))
    if command != "show" and "out" not in pairs:
        raise ValueError(f"{command} needs --out=DIR, the folder to write")
    if command in ("import", "export", "merge"):
        print(f"wrote {export(path, pairs['out'], pairs.get('to', FORMAT), print)}")
    else:
        model = load(path)
        found = lora.norms(model)
        print(json.dumps({"folder": model.extras.folder, "step": model.extras.step, "parameters": model.count_parameters(),
                          "data": model.extras.data, "adapters": len(found),
                          "largest |BA|/|W|": max(found.values(), default=0.0)}, indent=1))


if __name__ == "__main__":
    edge(main)
