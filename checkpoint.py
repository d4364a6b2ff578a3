"""Checkpoints: our own run state, whole and exact, and the door to official formats.

    out/NAME/config.json  metrics.jsonl  samples/step_N/*.wav  base/ (LoRA on random weights)
    out/NAME/ckpt/step_000500/config.json            model, adapter, tokenizer, codec: all that sampling needs
                              model.safetensors      or adapter.safetensors beside the name of its base
                              ema.safetensors        averaged weights, when the run keeps them
                              state/                 optimizer, schedule, scaler, loader, RNG of every rank
    out/NAME/ckpt/latest -> step_000500              best -> step_000400

A checkpoint is written into a temporary folder and renamed: it is there whole or not at all. Only safetensors and
JSON, never pickle. Official layouts are read and written through official.py, which holds their tables of names;
nobody else imports it.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import chatml
import dsaa
import lora
import official
from audio import hub
from duplex import expand_depth, official_files, trim_depth
from lora import LoraConfig
from model import MOSS_9B, QWEN2_5_1_5B, FusionConfig, ModelConfig, MultistreamLM
from options import FULL, apply, edge, from_json, read_json, replace_file, split_arguments, to_json, unknown, write_json
from parallel import barrier, place, whole
from replies import split_tails
from streams import StreamTable
from text import load_tokenizer, tokenizer_file
from vocabulary import swap_tokenizer

FORMAT, VERSION = "multistream", 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- files of tensors ----

def write_tensors(path: Path, tensors: dict[str, Tensor], write: bool = True) -> None:
    """Write a safetensors file whole; a tensor with two names is stored once by the caller's choice of names.

    Of a sharded model every rank calls it, and one with `write`.
    """
    plain: dict[str, Tensor] = {}
    for name, t in tensors.items():
        t = whole(t.detach())
        if write:
            plain[name] = t.cpu().contiguous()
    if not write:
        return
    try:
        replace_file(path, lambda temporary: save_file(plain, temporary, metadata={"format": "pt"}))
    except SafetensorError as error:                       # a full disk, for one
        raise OSError(f"{path} cannot be written ({error}); {FULL}") from None


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file; ValueError names it when it is broken."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; the checkpoint is incomplete, use another one")
    try:
        with safe_open(str(path), "pt", device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); use another checkpoint, or fetch the file again") from None


# ---- models ----

@dataclass
class Extras:
    """What a checkpoint says besides weights; sample.py reads it."""

    step: int = 0
    data: dict[str, Any] | None = None      # codec, tokenizer, normaliser, as DataConfig fields
    base: str = ""                          # where the weights under an adapter come from
    folder: str = ""                        # where it was loaded from


def save(model: nn.Module, dir: str | Path, extras: Extras | None = None, write: bool = True) -> Path:
    """Write a model, adapters included, as a folder that `load` reads. With `extras.base` only the adapter is written.

    Of a sharded model every rank calls it, and one with `write`.
    """
    folder, extras = Path(dir), extras or getattr(model, "extras", None) or Extras()
    config: LoraConfig | None = getattr(model, "lora", None)
    idle: list[str] = []
    if config is not None and extras.base:
        tensors = lora.state(model, config)
        idle = lora.idle_adapters(tensors)
        idle = idle if len(idle) < len(list(lora.adapters(model))) else []     # one that was never trained stays refused
        write_tensors(folder / "adapter.safetensors", tensors, write)
    else:
        write_tensors(folder / "model.safetensors", weights(model), write)
    if not write:
        return folder
    data = dict(extras.data or {})
    if data and (tokenizer := tokenizer_file(data["tokenizer"], local=True)).is_file():      # a checkpoint carries its tokenizer
        data["tokenizer"] = copy_file(tokenizer, folder)
    write_json(folder / "config.json", {
        "format": FORMAT, "version": VERSION, "model": to_json(model.config), "lora": to_json(config) if config else None,
        "step": extras.step, "data": data, "base": extras.base if config is not None else "",
        "idle": idle, "versions": {"torch": torch.__version__, "python": sys.version.split()[0]}})
    return folder


def copy_file(source: Path, folder: Path) -> str:
    replace_file(folder / source.name, lambda temporary: shutil.copyfile(source, temporary))
    return source.name


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each shared tensor once."""
    tensors = model.state_dict()
    if model.config.tied:
        tensors.pop("text_head.weight")
    return tensors


def load(path: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None, adapter: str | Path | None = None,
         config: ModelConfig | None = None) -> MultistreamLM:
    """Load a model: a run folder, a checkpoint folder, an official one, a file with its config beside it, or a hub id.

    dtype "fp32", "bf16", "fp16" or a torch dtype, None keeps fp32. `adapter` is a folder whose adapter is put on top: a
    checkpoint of ours, or an adapter of PEFT or moshi. `config` replaces the stored one, for switches such as dropout that
    hold no weights; with an empty path it is the model, and its weights are random. Strict: every tensor of the file is
    consumed and every parameter filled. The result carries `extras` and `lora`.
    """
    if not path and config is not None:
        return furnish(MultistreamLM(config)).to(device, DTYPES.get(dtype, dtype))
    folder = resolve(path)
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    layout = recognise(folder)
    if layout is not None:
        model = build_official(layout, folder, config, dtype, Path(path))
        return put_adapter(model, adapter).to(device).eval()
    about = read_about(folder)
    data = dict(about["data"])
    if data and ((folder / data["tokenizer"]).is_file() or 
                 (Path(data["tokenizer"]).suffix and not Path(data["tokenizer"]).exists() and not hub.is_id(data["tokenizer"]))):
        data["tokenizer"] = str(folder / data["tokenizer"])
    extras = Extras(about["step"], data, about["base"], str(folder))
    if about["base"]:
        model = load(resolve_base(about["base"], folder), config=config)
        fill_adapter(model, folder, about)
    else:
        model = build(about, folder, config)
        furnish(model, folder)
    model.extras = extras
    return put_adapter(model, adapter).to(device, dtype).eval()


def put_adapter(model: MultistreamLM, adapter: str | Path | None) -> MultistreamLM:
    """Put the adapter of a folder onto a loaded model: ours, PEFT's or moshi's. None leaves the model as it is."""
    if adapter is None:
        return model
    extras, folder = model.extras, Path(adapter)
    if (folder / "adapter_config.json").is_file():
        fill_official_adapter(model, folder, "adapter_config.json", "adapter_model.safetensors", official.import_peft)
        step = 0
    elif (folder / "lora.safetensors").is_file():
        fill_official_adapter(model, folder, "config.json", "lora.safetensors", official.import_moshi_lora)
        step = 0
    else:
        folder = resolve(adapter)
        about = read_about(folder)
        fill_adapter(model, folder, about)
        step = about["step"]
    model.extras = Extras(step, extras.data, extras.folder, str(folder))
    return model


def read_about(folder: Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint of ours; ValueError when it is another's, of another version, or damaged."""
    about = read_json(folder / "config.json")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        kind = about.get("model_type") if isinstance(about, dict) else type(about).__name__
        raise ValueError(f"{folder}/config.json is no multistream checkpoint (model_type {kind!r}); "
                         + "official layouts that can be read are listed by `python checkpoint.py import --help`")
    if about.get("version") != VERSION:
        raise ValueError(f"{folder} has checkpoint version {about.get('version')}, this code reads {VERSION}; update the code")
    wanted = {"model": dict, "data": dict, "step": int, "base": str}
    broken = [key for key, kind in wanted.items() if not isinstance(about.get(key), kind)]
    if not broken and about["data"] and not isinstance(about["data"].get("tokenizer"), str):
        broken = ["data.tokenizer"]
    if broken:
        raise ValueError(f"{folder}/config.json is damaged: {', '.join(broken)} missing or of a wrong type; use another checkpoint")
    return about


def build(about: dict[str, Any], folder: Path, config: ModelConfig | None = None) -> MultistreamLM:
    """Make the model of a config.json and fill it from model.safetensors, and from ema.safetensors where there is one."""
    stored = from_json(ModelConfig, about["model"], f"{folder}/config.json model")
    if config is not None and config.table != stored.table:
        raise ValueError(f"{folder} has another stream table than the config's model; use weights of the same family")
    with torch.device("meta"):
        model = MultistreamLM(config or stored)
    model.to_empty(device="cpu")
    tie(model)
    if about.get("lora"):
        lora.inject(model, from_json(LoraConfig, about["lora"], f"{folder}/config.json lora"))
    tensors = read_tensors(folder / "model.safetensors")
    if (folder / "ema.safetensors").is_file():
        tensors |= read_tensors(folder / "ema.safetensors")
    fill(model, tensors, str(folder))
    return model


@torch.no_grad()
def fill(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a model, strictly: ValueError lists what is missing, unexpected or of another shape."""
    wanted = weights(model)
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(f"{source} does not fit this model: {len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected "
                         + f"{unexpected[:3]}; check that weights and config.json belong together")
    for name, target in wanted.items():
        if target.shape != tensors[name].shape:
            raise ValueError(f"{source}: {name} is {tuple(tensors[name].shape)}, the config wants {tuple(target.shape)}; "
                             + "check that weights and config.json belong together")
        target.copy_(place(tensors[name], target))


def base_of(adapter: str) -> str:
    """Where the weights under an adapter are; ValueError where it does not say."""
    folder = Path(adapter)
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    else:
        folder = resolve(adapter)
        base = read_about(folder)["base"] if recognise(folder) is None else ""
    if not base:
        raise ValueError(f"adapter {adapter} does not say which model it belongs to; name it with --init=MODEL")
    return resolve_base(base, folder)


def recognise(folder: Path) -> official.Layout | None:
    """The official layout of a folder, None when it is ours or nobody's."""
    about = read_json(folder / "config.json")
    return official.recognise(about) if isinstance(about, dict) and about.get("format") != FORMAT else None


def build_official(layout: official.Layout, folder: Path, config: ModelConfig | None = None, dtype: torch.dtype | None = None,
                   file: Path | None = None) -> MultistreamLM:
    """Make the model of an official config.json and fill it from its weights, one file or sharded."""
    about = read_json(folder / "config.json")
    tensors = read_official(folder, file if file is not None and file.is_file() else folder / about.get("moshi_name", "model.safetensors"))
    if (folder / "generation_config.json").is_file():             # it knows all ids that end a text, config.json often one
        about |= {k: v for k, v in read_json(folder / "generation_config.json").items() if k == "eos_token_id" and v is not None}
    if layout.name == "moshi" and "text_projector.alpha" in tensors:
        raise ValueError(f"{folder}/config.json names no text model; add \"text_llm\": {{\"hf_repo_id\": the one it was made with}}")
    if layout.name == "dsaa" and "model" not in about["text_llm"]:
        about["text_llm"]["model"] = to_json(load(about["text_llm"].get("hf_repo_id", "")).config)
    stored = official.read_config(layout, about, tensors, str(folder))
    changed = official.lost(stored, replace(config, table=stored.table)) if config is not None else []
    if changed:
        raise ValueError(f"{folder} has another architecture than the config's model: {'; '.join(changed[:3])}")
    with torch.device("meta"):
        model = MultistreamLM(config or stored).to(dtype)
    model.to_empty(device="cpu")
    tie(model)
    fill(model, official.to_ours(layout, weights(model), stored, tensors, str(folder)), str(folder))
    model.extras = Extras(folder=str(folder))
    return furnish(model, folder)


def furnish(model: MultistreamLM, folder: Path = Path(".")) -> MultistreamLM:
    """Give a model that has a text tower that tower's weights, from where its config says (DSAA)."""
    fusion = model.config.fusion
    if fusion is None:
        return model
    try:
        body = load(resolve_base(fusion.source, folder))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"the text model beside {folder} cannot be read: {error}; name its place with --model.fusion.source") from None
    found = dsaa.fingerprint(weights(body))
    if official.lost(body.config, dsaa.as_stored(fusion.tower, body.config)) or fusion.revision not in ("", found):
        raise ValueError(f"{fusion.source} is not the text model that {folder} was made with (fingerprint {found}, not {fusion.revision}); "
                         + "name that one with --model.fusion.source")
    body.config = fusion.tower
    model.tower.body = body.requires_grad_(False).eval()
    return model


def setup_dsaa(moshi: str | Path, text_llm: str | Path, out: str | Path, padding: str = "own", **choices: Any) -> Path:
    """New weights from plain Moshi and any text model, begun where both were; `choices` are fields of FusionConfig."""
    ears, body = load(moshi), load(text_llm)
    if body.config.table.audio or body.config.fusion:
        raise ValueError(f"{text_llm} is no plain text model: it has audio rows; give a Qwen checkpoint")
    source = str(Path(text_llm).resolve()) if Path(text_llm).exists() else str(text_llm)
    files = official_files(Path(body.extras.folder)) | dict(body.extras.data or {})
    tokenizer = load_tokenizer(files["tokenizer"]) if "tokenizer" in files else None
    ids = dsaa.special_ids(body.config, tokenizer, padding)
    fusion = FusionConfig(body.config, source, dsaa.fingerprint(weights(body)), **choices)
    model = MultistreamLM(dsaa.design(ears.config, fusion, *ids))
    model.tower.body = body
    dsaa.warm_start(model, weights(ears))
    data = {**(ears.extras.data or official_files(Path(ears.extras.folder))), **({"tokenizer": files["tokenizer"]} if tokenizer else {})}
    return save(model, out, Extras(data=data if "tokenizer" in data else None))


def tie(model: MultistreamLM) -> None:
    """Share the text embedding with the head again: leaving the meta device gives each a memory of its own."""
    if model.config.tied:
        model.text_head.weight = model.embed["text"].weight


def read_official(folder: Path, file: Path) -> dict[str, Tensor]:
    """Read all tensors of an official folder: the shards of its index, `file`, or its only weights."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if file.name in found:
        names = [file.name]
    elif indexes:
        index = read_json(indexes[0])
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{indexes[0]} has no weight_map; fetch it again")
        names = sorted({str(name) for name in index["weight_map"].values()})
    else:
        names = found
        if len(names) != 1:
            raise ValueError(f"{folder} holds {len(names)} weight files {names[:3]} and no index; give the one to read")
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{indexes[0]} names files outside its folder; fetch it again")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_tensors(folder / name)
    return tensors


def fill_official_adapter(model: MultistreamLM, folder: Path, config: str, file: str, read: Any) -> None:
    """Put an adapter of another library onto a model that has none."""
    adapter, tensors = read(model, read_json(folder / config), read_tensors(folder / file), str(folder))
    lora.inject(model, adapter)
    lora.load_state(model, adapter, tensors, str(folder), idle=tensors)      # these libraries write every pair, trained or not


def fill_adapter(model: MultistreamLM, folder: Path, about: dict[str, Any]) -> None:
    """Put the adapter of a checkpoint folder onto a model that has none."""
    if not about.get("lora"):
        raise ValueError(f"{folder} holds no adapter; give a checkpoint of a LoRA run")
    if model.config.table != from_json(StreamTable, about["model"].get("table"), f"{folder}/config.json table"):
        raise ValueError(f"adapter {folder} was made for another stream table than this model's; use its own base {about['base']!r}")
    lora.inject(model, from_json(LoraConfig, about["lora"], f"{folder}/config.json lora"))
    tensors = read_tensors(folder / "adapter.safetensors")
    if (folder / "ema.safetensors").is_file():
        tensors |= read_tensors(folder / "ema.safetensors")
    lora.load_state(model, model.lora, tensors, str(folder), about.get("idle") or ())


def resolve(path: str | Path) -> Path:
    """Find the checkpoint folder that a user means: the folder itself, a run's latest one, a file's, or a hub snapshot."""
    path = Path(path)
    if path.is_file():
        path = path.parent
    for folder in (path / "ckpt" / "latest", path):
        if (folder / "config.json").is_file() and (folder.name == "latest" or has_weights(folder)):
            return folder.resolve()
    if path.exists():
        raise FileNotFoundError(f"{path} holds no checkpoint (config.json with model or adapter weights); train first or check the path")
    return from_hub(str(path))


def has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))


def resolve_base(base: str, folder: Path) -> str:
    """A base is named relative to the run folder (two above the checkpoint), absolutely, or by hub id."""
    local = folder.parent.parent / base
    return str(local) if local.exists() else base


def from_hub(name: str) -> Path:
    """Fetch a hub id, or find it in the local hub cache; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured."""
    if not hub.is_id(name):
        raise FileNotFoundError(f"{name} does not exist; give a run folder such as out/demo, a checkpoint folder, or a hub id")
    return hub.snapshot(name, ["*.json", "*.safetensors", "*.model"])


# ---- run state: everything that exact resume needs ----

@dataclass
class RunState:
    """The mutable facts of a run, as they stand before update `step`."""

    step: int = 0
    best: float = float("inf")
    bad_evals: int = 0
    skips: int = 0                      # in a row
    skipped: int = 0                    # in all; the learning rate waits for them
    evaluated: int = -1                 # the step that was evaluated last
    loader: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments under the parameters' names."""
    return {f"{key}:{name}": torch.as_tensor(value) for name, p in model.named_parameters() if p in optimizer.state
            for key, value in optimizer.state[p].items()}


def fill_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: str) -> None:
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        key, _, path = name.partition(":")
        if path not in parameters:
            raise ValueError(f"{source}: optimizer state of unknown parameter {path}; the model has changed, "
                             + "start with --resume=never in a new --out")
        p = parameters[path]
        if key != "step" and value.shape != p.shape:
            found = f"optimizer state of {path} is {tuple(value.shape)}, the model has {tuple(p.shape)}"
            raise ValueError(f"{source}: {found}; use another checkpoint")
        fused = optimizer.defaults.get("fused")
        state.setdefault(p, {})[key] = place(value, p) if key != "step" else value.to(p.device) if fused else value
    for p, values in state.items():
        optimizer.state[p] = values


def save_run(out: Path, model: MultistreamLM, optimizer: torch.optim.Optimizer, run: RunState, config: Any, extras: Extras,
             ema: dict[str, Tensor] | None, rank: int) -> Path:
    """Write out/ckpt/step_N; every rank calls it, rank 0 writes the model, each rank its RNG."""
    folder = out / "ckpt" / f"step_{run.step:06d}"
    temporary = out / "ckpt" / f".writing_{run.step:06d}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "state").mkdir(parents=True)
    barrier()
    try:
        write_tensors(temporary / "state" / f"rng_rank{rank}.safetensors", rng_state())
        save(model, temporary, extras, rank == 0)
        write_tensors(temporary / "state" / "optimizer.safetensors", optimizer_tensors(model, optimizer), rank == 0)
        if ema:
            write_tensors(temporary / "ema.safetensors", ema, rank == 0)
        if rank == 0:
            write_json(temporary / "state" / "run.json", {**to_json(run), "config": to_json(config)})
        barrier()
        if rank == 0:
            aside = folder.with_name(f".old_{folder.name}")
            if folder.exists():                           # the same step again: never a moment without a whole copy
                os.rename(folder, aside)
            os.rename(temporary, folder)
            shutil.rmtree(aside, ignore_errors=True)
            point(out / "ckpt" / "latest", folder.name)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)      # a full disk: give the space back, older checkpoints stay
        raise
    barrier()
    return folder


def latest(out: Path) -> Path:
    """The newest checkpoint of a run; puts back the copy that a kill in the middle of replacing it left aside."""
    link = out / "ckpt" / "latest"
    if link.is_symlink() and not link.exists():
        aside = link.with_name(f".old_{os.readlink(link)}")
        if not aside.is_dir():
            raise FileNotFoundError(f"{link} points to {os.readlink(link)}, which is gone; point it to another step or choose a new --out")
        os.rename(aside, link.with_name(os.readlink(link)))
    return link


def rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def load_run(folder: Path, model: MultistreamLM, optimizer: torch.optim.Optimizer, rank: int) -> tuple[RunState, dict[str, Tensor] | None]:
    """Fill model and optimizer from a checkpoint and set this rank's RNG; returns the run state and averaged weights."""
    about = read_state(folder)
    config = getattr(model, "lora", None)
    if config is not None and (folder / "adapter.safetensors").is_file():
        lora.load_state(model, config, read_tensors(folder / "adapter.safetensors"), str(folder), idle=lora.state(model, config))
    else:
        fill(model, read_tensors(folder / "model.safetensors"), str(folder))
    fill_optimizer(model, optimizer, read_tensors(folder / "state" / "optimizer.safetensors"), str(folder))
    rng = folder / "state" / f"rng_rank{rank}.safetensors"
    if rank == 0 or rng.is_file():                        # fewer ranks then than now: the new ones keep their seeds
        states = read_tensors(rng)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    ema = folder / "ema.safetensors"
    return RunState(**about), read_tensors(ema) if ema.is_file() else None


def read_state(folder: Path) -> dict[str, Any]:
    """The fields of the RunState in a checkpoint folder."""
    path = folder / "state" / "run.json"
    if not path.is_file():
        other = f"use another folder of out/NAME/ckpt, or --init={folder} with another --out"
        raise FileNotFoundError(f"{path} is missing: {folder} cannot be resumed; {other}")
    about = read_json(path)
    fields = to_json(RunState()).keys() | {"config"}
    if not isinstance(about, dict) or about.keys() != fields or not isinstance(about["step"], int):
        raise ValueError(f"{path} is damaged: it should hold {', '.join(sorted(fields))}; use another checkpoint")
    return {key: about[key] for key in fields - {"config"}}


def point(link: Path, target: str) -> None:
    """Make `link` point to `target` in one step."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def prune(out: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, the latest and the best, and what an interrupted save left behind."""
    folder = out / "ckpt"
    named = {(folder / link).resolve() for link in ("latest", "best")}
    old = sorted(folder.glob("step_*"))[: -keep or None]
    for path in [p for p in old if p.resolve() not in named] + list(folder.glob(".writing_*")):
        shutil.rmtree(path)


def settle(out: Path, folder: Path, best: bool, keep: int, consolidated: str, dtype: torch.dtype) -> None:
    """After a checkpoint was written: name it the best if it is, delete old ones, and write it in moshi's layout if asked to."""
    if best:
        point(out / "ckpt" / "best", folder.name)
    prune(out, keep)
    if consolidated:
        consolidate(out, folder, consolidated, keep, dtype)


# ---- import, export, merge ----

def export(model_or_dir: MultistreamLM | str | Path, dir: str | Path, to: str = "multistream",
           tell: Callable[[str], Any] = lambda line: None) -> Path:
    """Write a model in another layout, adapters merged in fp32; only `peft` and `moshi-lora` write the adapter alone.

    to: "multistream" (a plain checkpoint of ours), "hf" (Qwen, Higgs, Moshi, MOSS-Speech for transformers), "boson" (Higgs,
    first release), "moshi", "peft" (adapter with the names of "hf"), "moshi-lora". Weights keep the model's type. What was
    merged is compared with the adapted model; `tell` gets a line about it, too large a difference is a ValueError.
    """
    model = model_or_dir if isinstance(model_or_dir, nn.Module) else load(model_or_dir)
    if to in ("peft", "moshi-lora"):
        return export_adapter(model, Path(dir), to)
    if model.config.tied and any(path == "text_head" for path, *_ in lora.adapters(model)):
        raise ValueError("an adapter on a tied text head cannot be merged: it would change the embedding too; export --to=peft")
    merged = load_copy(model)
    lora.strip(merged)
    merged.lora = None
    dtype = next(model.parameters()).dtype
    merged.to(dtype)
    if count := len(list(lora.adapters(model))):
        difference, largest = merge_error(model, merged)
        about = f"{count} adapters merged in fp32: logits differ by at most {difference:.2g}, the largest is {largest:.2g}"
        if not difference <= (1e-3 if dtype == torch.float32 else 0.1) * max(1.0, largest):
            raise ValueError(f"{about}; the merged model is another one, keep the adapter apart or load with dtype fp32")
        tell(f"{about} (on 3 fixed grids, {str(dtype).removeprefix('torch.')})")
    if to != FORMAT:
        about, tensors = official.export_model(merged.config, weights(merged), to, str(dtype).removeprefix("torch."))
        write_tensors(Path(dir) / about.get("moshi_name", "model.safetensors"), tensors)
        write_json(Path(dir) / "config.json", about)
        return Path(dir)
    extras = getattr(model, "extras", None) or Extras()
    return save(merged, dir, replace(extras, base=""))


@torch.no_grad()
def merge_error(model: MultistreamLM, merged: MultistreamLM) -> tuple[float, float]:
    """The largest difference of a logit between a model with adapters and its merged copy on 3 fixed grids, and the largest logit."""
    table, columns, training = model.table, 16, model.training
    draw = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randint(0, s.classes or s.vocab, (3, columns), generator=draw) for s in table.streams], 1)
    if table.audio and not table.aligned:                  # they take turns: text, speech, text
        tokens[:, table.audio, :5] = tokens[:, table.audio, 12:] = -1
        tokens[:, table.text, 5:12] = -1
    tokens = tokens.to(next(model.parameters()).device)
    ours, theirs = (m.eval()(tokens) for m in (model, merged.to(tokens.device)))
    model.train(training)
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True) if a is not None]
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a, _ in pairs)


def export_adapter(model: MultistreamLM, folder: Path, to: str) -> Path:
    """Write the adapter of a model in the layout of another library."""
    if getattr(model, "lora", None) is None:
        raise ValueError(f"--to={to} writes an adapter, this model has none; give a checkpoint of a LoRA run")
    extras = getattr(model, "extras", None) or Extras()
    if to == "peft":
        base = resolve_base(extras.base, Path(extras.folder)) if extras.base and extras.folder else extras.base or extras.folder
        about, tensors = official.export_peft(model, base)
        write_tensors(folder / "adapter_model.safetensors", tensors)
        write_json(folder / "adapter_config.json", about)
    else:
        about, tensors = official.export_moshi_lora(model, str(next(model.parameters()).dtype))
        write_tensors(folder / "lora.safetensors", tensors)
        write_json(folder / "config.json", about)
    return folder


def consolidate(out: Path, folder: Path, to: str, keep: int, dtype: torch.dtype) -> Path:
    """Write a checkpoint of ours once more as moshi-finetune lays it out, for scripts that look there; keep the newest.

    out/checkpoints/checkpoint_000500/consolidated/config.json and lora.safetensors (to="moshi-lora") or
    consolidated.safetensors (to="moshi", adapters merged), in `dtype`.
    """
    target = out / "checkpoints" / folder.name.replace("step", "checkpoint")
    temporary = target.with_name(f".writing_{target.name}")
    for litter in target.parent.glob(".writing_*"):
        shutil.rmtree(litter)
    written = export(load(folder, dtype=dtype), temporary / "consolidated", to)
    if to == "moshi":
        os.rename(written / "model.safetensors", written / "consolidated.safetensors")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    for old in sorted(target.parent.glob("checkpoint_*"))[: -keep or None]:
        shutil.rmtree(old)
    return target / "consolidated"


def load_copy(model: MultistreamLM) -> MultistreamLM:
    """A deep copy, so that exporting leaves the caller's model as it is."""
    copy = MultistreamLM(model.config)
    copy.tower = model.tower
    if getattr(model, "lora", None) is not None:
        lora.inject(copy, model.lora)
    fill(copy, weights(model), "the model in memory")
    return copy


def rebuild(path: str, dir: str | Path, change: Any) -> Path:
    """Load a model, `change` its config and tensors, and write what comes of it."""
    model = plain_model(path)
    return save(changed(model, *change(model.config, weights(model))), dir, model.extras)


def plain_model(path: str) -> MultistreamLM:
    """A model without an adapter; ValueError says what to do with one that has it."""
    model = load(path)
    if getattr(model, "lora", None) is not None:
        raise ValueError(f"{path} has an adapter; merge it first (python checkpoint.py merge)")
    return model


def changed(model: MultistreamLM, config: ModelConfig, tensors: dict[str, Tensor]) -> MultistreamLM:
    """A model of another config in the type of `model`, filled with `tensors`."""
    other = MultistreamLM(config).to(next(model.parameters()).dtype)
    fill(other, tensors, "the model in memory")
    return other


def swap_command(path: str, pairs: dict[str, str]) -> str:
    """`checkpoint.py swap-tokenizer`: the same model for other text ids, the new tokenizer beside it."""
    if "tokenizer" not in pairs or "out" not in pairs:
        raise ValueError("swap-tokenizer needs --tokenizer=FILE, the new one, and --out=DIR, the folder to write")
    model, new = plain_model(path), load_tokenizer(pairs["tokenizer"])
    data = official_files(Path(model.extras.folder)) | dict(model.extras.data or {})
    if "from" not in pairs and "tokenizer" not in data:
        raise ValueError(f"{path} does not say which tokenizer it was trained with; name it with --from=FILE")
    config, tensors, kept = swap_tokenizer(model.config, weights(model), load_tokenizer(pairs.get("from", data.get("tokenizer"))), new)
    known = "codec" in data or not config.table.audio                 # of official weights the codec may lie elsewhere
    extras = replace(model.extras, data=data | {"tokenizer": pairs["tokenizer"]} if known else None)
    folder = save(changed(model, config, tensors), pairs["out"], extras)
    new.save(folder)
    return f"wrote {folder}: {kept} of {new.size} pieces kept their rows"


def setup_command(pairs: dict[str, str]) -> None:
    """`checkpoint.py setup-dsaa`: two models and an output folder, the rest are choices."""
    pairs = {key.replace("-", "_"): value for key, value in pairs.items()}
    for name in ("moshi", "text_llm", "out"):
        if not pairs.get(name):
            wanted = "a folder to write" if name == "out" else "a checkpoint or hub id"
            raise ValueError(f"setup-dsaa needs --{name.replace('_', '-')}, {wanted}")
    given = {key: value for key, value in pairs.items() if key not in ("moshi", "text_llm", "out", "padding")}
    typed = apply(FusionConfig(QWEN2_5_1_5B), given)
    choices = {key: getattr(typed, key) for key in given}
    print(f"wrote {setup_dsaa(pairs['moshi'], pairs['text_llm'], pairs['out'], pairs.get('padding', 'own'), **choices)}")


def split_from_qwen(model_or_ckpt: MultistreamLM | str | Path, tail: int = 4, codes: int = 16384, words: int = 0,
                    tokenizer: str | Path = "", seed: int = 0) -> MultistreamLM:
    """Make a speech model of the shape of MOSS-Speech out of any Qwen text model; its text logits stay what they were.

    The last `tail` layers are doubled, `codes` is the size of the codec's table, `words` keeps so many text ids (0 = all).
    The id that opens speech is read off `tokenizer`, by default the one that lies with the checkpoint, else as Qwen has it.
    """
    model = model_or_ckpt if isinstance(model_or_ckpt, nn.Module) else load(model_or_ckpt)
    if getattr(model, "lora", None) is not None:
        raise ValueError("the model has an adapter; merge it first (python checkpoint.py merge)")
    extras = getattr(model, "extras", None) or Extras()
    beside = [(extras.data or {}).get("tokenizer", ""), Path(extras.folder) / "tokenizer.json"] if extras.folder else []
    tokenizer = tokenizer or next((path for path in beside if Path(path).is_file()), "")
    start = chatml.resolve(load_tokenizer(tokenizer), (chatml.SOSP,), "Qwen")[chatml.SOSP] if tokenizer else MOSS_9B.table.audio_start
    config, tensors = split_tails(model.config, weights(model), tail, codes, start, words, seed)
    made = MultistreamLM(config)
    fill(made, tensors, "the split model")
    made.extras = Extras(data={"tokenizer": str(tokenizer)} if tokenizer else None)
    return made.eval()


def whole_number(pairs: dict[str, str], name: str, default: int) -> int:
    if not pairs.get(name, "0").isdecimal():
        raise ValueError(f"--{name}={pairs[name]} is no whole number; give one")
    return int(pairs.get(name, default))


COMMANDS = ("import", "export", "merge", "expand-depth", "trim-depth", "swap-tokenizer", "split-from-qwen", "show")
USAGE = """python checkpoint.py import OFFICIAL --out=DIR                   read an official folder, file or hub id and write ours; knows
                                                                 Qwen2, Qwen3, Higgs Audio v2 (both layouts), Moshi, MOSS-Speech
python checkpoint.py export CKPT --to=LAYOUT --out=DIR           multistream, hf, boson, moshi (adapters merged in fp32), peft, moshi-lora
python checkpoint.py merge CKPT --out=DIR                        export --to=multistream
python checkpoint.py expand-depth CKPT --out=DIR                 Moshi: predict the user's codebooks too; trim-depth undoes it
python checkpoint.py swap-tokenizer CKPT --tokenizer=F --out=DIR   another language: shared pieces keep their rows; --from=F, the old one
python checkpoint.py setup-dsaa --moshi=M --text-llm=L --out=DIR   new DSAA weights; --rate, --padding=own|space and fields of FusionConfig
python checkpoint.py split-from-qwen CKPT --out=DIR              a speech model of MOSS-Speech's shape; --tail=4 layers each, --codes=16384,
                                                                 --words=N keeps the first text ids, --tokenizer=FILE
python checkpoint.py show CKPT                                   what a checkpoint holds"""


def unknown_options(pairs: dict[str, str], known: tuple[str, ...]) -> None:
    for name in pairs.keys() - set(known):
        raise ValueError(unknown(f"--{name}", [f"--{k}" for k in known]))


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help",))
    if words[:1] == ["swap-tokenizer"] and len(words) == 2 and "help" not in pairs:
        unknown_options(pairs, ("tokenizer", "from", "out"))
        print(swap_command(words[1], pairs))
        return None
    if words == ["setup-dsaa"] and "help" not in pairs:
        return setup_command(pairs)
    if "help" in pairs or len(words) != 2:
        print(USAGE)
        raise SystemExit(0 if "help" in pairs else 2)
    command, path = words
    unknown_options(pairs, ("out", "tail", "codes", "words", "tokenizer") if command == "split-from-qwen" else ("out", "to"))
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; it is one of {', '.join(COMMANDS)}")
    if command != "show" and "out" not in pairs:
        raise ValueError(f"{command} needs --out=DIR, the folder to write")
    if command in ("import", "export", "merge"):
        print(f"wrote {export(path, pairs['out'], pairs.get('to', FORMAT), print)}")
    elif command in ("expand-depth", "trim-depth"):
        print(f"wrote {rebuild(path, pairs['out'], expand_depth if command == 'expand-depth' else trim_depth)}")
    elif command == "split-from-qwen":
        tail, codes, kept = (whole_number(pairs, *named) for named in (("tail", 4), ("codes", 16384), ("words", 0)))
        print(f"wrote {save(split_from_qwen(path, tail, codes, kept, pairs.get('tokenizer', '')), pairs['out'])}")
    else:
        model = load(path)
        found = lora.norms(model)
        print(json.dumps({"folder": model.extras.folder, "step": model.extras.step, "parameters": model.count_parameters(),
                          "data": model.extras.data, "adapters": len(found),
                          "largest |BA|/|W|": max(found.values(), default=0.0)}, indent=1))


if __name__ == "__main__":
    edge(main)
