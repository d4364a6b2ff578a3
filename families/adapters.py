"""Adapter files of other libraries: PEFT, for every family whose names it uses, and helpers for other formats.

Import takes the rank from the tensors and keeps it; export writes official names. Source: peft 0.21. Next: tiny.py.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lora
from audio.hub import torch_tensors
from families.family import all_families
from families.formats import About, AdapterFormat, Format, Tensors, config_differences, join, official_names, require
from families.tensor_files import read_tensors
from layers.architecture import ModelConfig
from lora import LoraConfig
from model import MultistreamLM
from options import read_json

PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
PREFIX = "base_model.model."


def theirs_of(model: MultistreamLM, layout: Format) -> dict[str, list[str]]:
    """Official names of every parameter, adapters aside; a tied head has its own."""
    shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False) if "lora_" not in n}
    return {n: official_names(n, shape, model.config, layout) for n, shape in shapes.items()}


def module_path(name: str) -> str:
    return name.rpartition(".")[0]


def peft_formats(config: ModelConfig) -> list[Format]:
    """The layouts whose names a PEFT adapter of this model may use."""
    return [form for family in all_families() for form in family.formats if form.peft and form.fits(config)]


def peft_layout(config: ModelConfig) -> Format:
    """The layout whose names we write: the first that can express the model."""
    head = {"text_lm_head.weight": torch.empty(0)} if config.table.text_out else {}
    for form in peft_formats(config):
        if not config_differences(config, form.read(form.write(config, "float32"), head)):
            return form
    raise ValueError("--to=peft needs official names, and this model fits no layout that PEFT supports; export --to=multistream")


def export_peft(model: MultistreamLM, base: str, dtype: str) -> tuple[About, Tensors]:
    """adapter_config.json and tensors of a PEFT adapter with official names."""
    layout, config = peft_layout(model.config), model.lora
    names = {n: theirs[0] for n, theirs in theirs_of(model, layout).items() if len(theirs) == 1 and "." in theirs[0]}
    official = {path: module_path(names[f"{path}.weight"]) for path in lora.linears(model) if f"{path}.weight" in names}
    trained = (*(f"{path}.weight" for path, *_ in lora.adapters(model)), *lora.trained_parameters(model, config))
    if lost := [name for name in trained if name not in names]:
        raise ValueError(f"{lost[0]} is several tensors in the layout {layout.name}, which PEFT cannot express; export --to={layout.to}")
    found = {official[path]: adapter for path, _, adapter in lora.adapters(model)}
    saved = sorted({module_path(names[n]) for n in lora.trained_parameters(model, config)})
    tensors = {}
    for name, p in model.named_parameters():
        path, _, part = name.partition(".adapter.")
        if part or module_path(names.get(name, "")) in saved:
            tensors[PREFIX + (f"{official[path]}.{PARTS[part]}" if part else names[name])] = turned(layout, names.get(name), p.detach())
    for name, copy in (*layout.shared, *([(names["embed.text.weight"], names["text_head.weight"])] if model.config.tied else [])):
        if module_path(name) in saved:                                      # PEFT would leave the other module as it was
            saved = sorted({*saved, module_path(copy)})
            tensors[PREFIX + copy] = tensors[PREFIX + name].clone()
    about = {
        "peft_type": "LORA", "task_type": layout.task_type,
        "base_model_name_or_path": base, "revision": None, "inference_mode": True, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "use_rslora": config.rslora, "use_dora": config.dora, "modules_to_save": saved or None,
        "target_modules": sorted(found) if layout.codec else suffixes(set(found), set(official.values())),      # whose names are alike
        "rank_pattern": {n: a.rank for n, a in found.items() if a.rank != config.rank},
        "alpha_pattern": {n: a.alpha for n, a in found.items() if a.alpha != config.alpha}}
    return about, tensors


def turned(layout: Format, name: str | None, t: torch.Tensor) -> torch.Tensor:
    """A tensor of an official name as the other side stores it."""
    return t.mT.contiguous() if name in layout.turned else t


def suffixes(chosen: set[str], everything: set[str]) -> list[str]:
    """The shortest endings, cut at dots, that select `chosen` and nothing else (PEFT's way of naming targets)."""
    found = set()
    for path in chosen:
        parts = path.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found.add(next(e for e in endings if {p for p in everything if p == e or p.endswith(f".{e}")} <= chosen))
    return sorted(found)


PEFT_FIXED = {"peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,),
              "trainable_token_indices": (None,), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None)}     # not PiSSA
PEFT_READ = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules exclude_modules
lora_alpha lora_dropout use_rslora modules_to_save layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core use_dora
qalora_group_size ensure_weight_tying""".split()                   # read, implied by the tensors, or without effect


def import_peft(model: MultistreamLM, about: About, tensors: Tensors, source: str) -> tuple[LoraConfig, Tensors]:
    """Read a PEFT adapter, in either official naming of this model's family."""
    # how EVA drew the first A leaves no trace in the result
    require(about, PEFT_FIXED | {key: (None, {}) for key in about if key.endswith("_config") and key != "eva_config"},
            f"{source}/adapter_config.json", "; merge it with the library that wrote it, or train it again without")
    strange = [key for key, value in about.items() if value and key not in PEFT_READ and key not in PEFT_FIXED and key != "eva_config"]
    if strange:
        raise ValueError(f"adapter {source} has {strange[0]} = {about[strange[0]]!r}, which is not supported; "
                         + "merge it with the library that wrote it, or train it again without")
    bare = {peft_name(n): t for n, t in tensors.items()}
    fitting = peft_formats(model.config)
    if not fitting:
        raise ValueError(f"{source}: PEFT has no names for this family; use the adapter format of the family")
    layout = max(fitting, key=lambda x: len(adapter_keys(model, x).keys() & bare.keys()))
    bare = without_codec(layout, bare, source)
    bare = separate(model, layout, {ours: theirs for ours, (theirs, *_) in theirs_of(model, layout).items()}, bare, source)
    ours, names = adapter_to_ours(model, layout, bare, source), theirs_of(model, layout)
    paths = {module_path(module_path(n)) for n in ours if n.endswith("lora_A")}
    official = {p: module_path(names[f"{p}.weight"][0]) for p in paths}
    patterns, default_alpha = about.get("alpha_pattern") or {}, float(about.get("lora_alpha", 8))
    alphas = {p: next((float(v) for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", official[p])), default_alpha) for p in paths}
    flags = (about.get("lora_dropout", 0.0), about.get("use_rslora", False), about.get("use_dora", False))
    return adapter_config(model, ours, alphas, *flags), ours


def without_codec(layout: Format, tensors: Tensors, source: str) -> Tensors:
    """An adapter without the pairs that PEFT put into a codec beside the model because its Linears have the same names."""
    own = {name: t for name, t in tensors.items() if not (layout.codec and name.startswith(layout.codec))}
    if changed := sorted(name for name in tensors.keys() - own.keys() if not name.endswith("lora_A.weight") and tensors[name].any()):
        raise ValueError(f"adapter {source} changes the codec ({changed[0]}), which stays as it is here; train it with target_modules "
                         + "that name the layers of the model only")
    return own


def separate(model: MultistreamLM, layout: Format, names: dict[str, str], tensors: Tensors, source: str) -> Tensors:
    """What PEFT makes of a head that is tied to the embedding: as soon as one of the two is adapted they are two.

    Equal copies of both are one again. Of an adapted head its own weight is written, too, which must be the model's. Of a table that
    two transformers share ours are one; ValueError where the adapter makes them two.
    """
    tensors = dict(tensors)
    for ours, official in names.items():
        copy = tensors.pop(f"{module_path(official)}.base_layer.weight", None)
        own = model.get_parameter(ours)
        if copy is not None and not own.is_meta and not torch.equal(copy.to(own.dtype), own.detach().cpu()):
            raise ValueError(f"adapter {source} brings a {official} that is not this model's; it was trained on another base")
    for name, copy in layout.shared:
        found = [tensors.get(n) for n in (name, copy)]
        if any(t is not None for t in found) and (any(t is None for t in found) or not torch.equal(*found)):
            raise ValueError(f"adapter {source} trains {module_path(name)} apart from {module_path(copy)}, which are one here; "
                             + "name both in modules_to_save, or neither")
        tensors.pop(copy, None)
    if not model.config.tied:
        return tensors
    embedding, head = names["embed.text.weight"], names["text_head.weight"]
    both = [tensors[name] for name in (embedding, head) if name in tensors]
    if len(both) == 2 and torch.equal(*both):
        del tensors[head]
    elif both or any(name.startswith(f"{module_path(head)}.lora_") for name in tensors):
        untie(model)
    return tensors


def untie(model: MultistreamLM) -> None:
    """Give the text head a weight of its own, equal to the embedding's."""
    own = model.embed["text"].weight
    model.text_head.weight = torch.nn.Parameter(own.detach().clone(), own.requires_grad)
    model.config = replace(model.config, tied=False)


def peft_name(name: str) -> str:
    """Without PEFT's prefix and adapter name; magnitudes are written with and without `.weight`."""
    name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name.removeprefix(PREFIX))
    return re.sub(r"\.lora_magnitude_vector(\.default)?(\.weight)?$", ".lora_magnitude_vector", name)


def adapter_keys(model: MultistreamLM, layout: Format) -> dict[str, tuple[str, int, int]]:
    """Official name -> (our name, number of the piece, how many pieces) of everything that an adapter may hold."""
    keys = {}
    linears = lora.linears(model)
    for name, theirs in theirs_of(model, layout).items():
        for k, official in enumerate(theirs):
            keys[official] = (name, k, len(theirs))
            if name.endswith(".weight") and module_path(name) in linears:
                keys |= {f"{module_path(official)}.{b}": (f"{module_path(name)}.adapter.{a}", k, len(theirs)) for a, b in PARTS.items()}
    return keys


def adapter_to_ours(model: MultistreamLM, layout: Format, tensors: Tensors, source: str) -> Tensors:
    """Rename and join the tensors of an adapter file, strictly."""
    keys, groups = adapter_keys(model, layout), {}
    unknown = sorted(tensors.keys() - keys.keys())
    if unknown:
        raise ValueError(f"adapter {source}: {len(unknown)} tensors have no place in this model {unknown[:3]}; "
                         + "use an adapter for this model, without embeddings and convolutions")
    for name, tensor in tensors.items():
        ours, k, count = keys[name]
        groups.setdefault(ours, [None] * count)[k] = turned(layout, name, tensor)
    broken = sorted(n for n, parts in groups.items() if any(p is None for p in parts))
    if broken:
        raise ValueError(f"adapter {source} lacks some depth steps of {broken[:3]}; use a complete adapter file")
    shapes = {n: p.shape for n, p in model.named_parameters()}
    sets = {path for path, linear in lora.linears(model).items() if linear.weight.dim() == 3}
    return {n: parts[0] if len(parts) == 1 and module_path(module_path(n)) not in sets else
            join(parts, shapes.get(n, torch.Size((len(parts), 0, 0)))) for n, parts in groups.items()}


def adapter_config(model: MultistreamLM, ours: Tensors, alphas: dict[str, float], dropout: float, rslora: bool, dora: bool) -> LoraConfig:
    """The LoraConfig under which `inject` builds exactly the adapters of a file."""
    ranks = {module_path(module_path(n)): t.shape[-2] for n, t in ours.items() if n.endswith("lora_A")}
    if not ranks:
        raise ValueError("the adapter file contains no lora_A; use another file")
    (rank, rank_patterns), (alpha, alpha_patterns) = most_common(ranks), most_common({p: alphas[p] for p in ranks})
    return LoraConfig(rank, alpha, globs(set(ranks), lora.linears(model)), dropout, rslora, dora,
                      tuple(n for n in ours if "lora_" not in n), rank_patterns, alpha_patterns)


def most_common(values: dict[str, Any]) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """The most common value, and the (path, value) pairs that differ from it."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, tuple((path, value) for path, value in sorted(values.items()) if value != common)


def globs(chosen: set[str], everything: Iterable[str]) -> tuple[str, ...]:
    """Patterns for lora.py that select `chosen` and nothing else, layer numbers folded where all layers are in."""
    found = set()
    for path in chosen:
        folded = re.sub(r"\.\d+\.", ".*.", path)
        found.add(folded if all(p in chosen for p in everything if lora.matches(p, folded)) else path)
    return tuple(sorted(found))


def find_adapter(path: Path) -> tuple[AdapterFormat, Path] | None:
    """The library whose adapter a folder holds, or a file is, and the file with its tensors; None when it is ours or nobody's."""
    folder = path.parent if path.is_file() else path
    for form in adapter_formats():
        names = [path.name] if path.is_file() else [form.weight_file, *form.other_files]
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        about = read_json(folder / form.config_file) if (folder / form.config_file).is_file() else None
        if file is None or not isinstance(about, dict) or not form.recognise(about):
            continue
        if path.is_file() and not any("lora_" in name for name in adapter_tensors(file)):
            continue                                    # a whole model, with its config.json beside it
        return form, file
    return None


def adapter_tensors(file: Path) -> Tensors:
    """The tensors of an adapter file; of PyTorch's own kind with weights_only, which runs nothing that stands in it."""
    return read_tensors(file) if file.suffix == ".safetensors" else torch_tensors(file)


PEFT = AdapterFormat("peft", "adapter_config.json", "adapter_model.safetensors", import_peft, export_peft, ("adapter_model.bin",))


def adapter_formats() -> tuple[AdapterFormat, ...]:
    """Adapters of other libraries that can be read and written."""
    return (PEFT, *(form for family in all_families() for form in family.adapters))
