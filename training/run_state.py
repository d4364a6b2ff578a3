"""The state of a run: everything that exact resume needs, written whole.

    out/NAME/ckpt/step_000500/state/      optimizer, schedule, scaler, loader, RNG of every rank
    out/NAME/ckpt/latest -> step_000500              best -> step_000400

A checkpoint (checkpoint.py) is written into a temporary folder together with this state and renamed: it is there whole or
not at all.
"""

import os
import shutil
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora
from checkpoint import Extras, averages, export, fill, load, naming_changed_options, read_about, refuse_broken, save, write_tensors
from families.family import consolidated_files
from families.tensor_files import LazyTensor, open_tensors, parts_of, read_tensors
from model import MultistreamLM
from options import read_object, to_json, write_json
from system.files import check_sums, sync, write_sums
from training.parallel import barrier, place


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


def fill_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor | LazyTensor], source: str) -> None:
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
        full = value.read().clone() if isinstance(value, LazyTensor) else value
        state.setdefault(p, {})[key] = place(full, p) if key != "step" else full.to(p.device) if fused else full
    for p, values in state.items():
        optimizer.state[p] = values


def save_run(out: Path, model: MultistreamLM, optimizer: torch.optim.Optimizer, run: RunState, config: Any, extras: Extras,
             ema: dict[str, Tensor] | None, rank: int, effects: Callable[[Path], Any] = lambda folder: None) -> Path:
    """Write out/ckpt/step_N; every rank calls it, rank 0 writes the model, each rank its RNG.

    `effects(folder)` is what else belongs to a checkpoint. `latest` moves last: after a kill in between, the run
    continues from the checkpoint before and does it all again.
    """
    refuse_broken(model, f"step {run.step} is not saved, older checkpoints stay")
    folder = out / "ckpt" / f"step_{run.step:06d}"
    temporary = out / "ckpt" / f".writing_{run.step:06d}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "state").mkdir(parents=True)
    barrier()
    try:
        rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
        write_tensors(temporary / "state" / f"rng_rank{rank}.safetensors", rng)
        save(model, temporary, extras, rank == 0)
        write_tensors(temporary / "state" / "optimizer.safetensors", optimizer_tensors(model, optimizer), rank == 0)
        if ema:
            write_tensors(temporary / "ema.safetensors", ema, rank == 0)
        if rank == 0:
            write_json(temporary / "state" / "run.json", {**to_json(run), "config": to_json(config)})
        barrier()
        if rank == 0:
            write_sums(temporary)
            aside = folder.with_name(f".old_{folder.name}")
            if folder.exists():                           # the same step again: never a moment without a whole copy
                shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed while it deleted this
                os.rename(folder, aside)
            os.rename(temporary, folder)
            sync(folder.parent)
            shutil.rmtree(aside, ignore_errors=True)
            effects(folder)
            point(out / "ckpt" / "latest", folder.name)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)      # a full disk: give the space back, older checkpoints stay
        raise
    barrier()
    return folder


def latest(out: Path) -> Path:
    """The newest checkpoint of a run; puts back the copy that a kill in the middle of replacing it left aside."""
    link = out / "ckpt" / "latest"
    for aside in link.parent.glob(".old_step_*"):
        if not aside.with_name(aside.name.removeprefix(".old_")).exists():
            os.rename(aside, aside.with_name(aside.name.removeprefix(".old_")))
    if link.is_symlink() and not link.exists():
        raise FileNotFoundError(f"{link} points to {os.readlink(link)}, which is gone; point it to another step or choose a new --out")
    return link


@torch.no_grad()
def swap(trained: dict[str, nn.Parameter], averages: dict[str, Tensor]) -> None:
    """Swap the trained weights with their averages, if there are any; a second call swaps back."""
    for name, average in averages.items():
        kept = trained[name].detach().clone()
        trained[name].copy_(average)
        average.copy_(kept)


def newest_whole(out: Path, tell: Callable[[str], Any] = print) -> Path:
    """`latest`, or where that is damaged the newest checkpoint before it that is whole, which is said; ValueError when none is."""
    link = latest(out)
    try:
        if link.exists():
            check_run(link)
        return link
    except (ValueError, FileNotFoundError) as error:
        for folder in sorted((f for f in link.parent.glob("step_*") if f.name != link.resolve().name), reverse=True):
            try:
                check_run(folder)
            except (ValueError, FileNotFoundError) as other:
                tell(f"{folder} cannot be used either: {other}")
                continue
            tell(f"warning: {error}")
            tell(f"warning: the run continues from {folder}, the newest checkpoint that is whole")
            return folder
        raise


def check_run(folder: Path) -> None:
    """ValueError or FileNotFoundError where a checkpoint cannot be resumed."""
    read_state(folder)
    check_sums(folder)
    for name in ("optimizer", "rng_rank0"):
        if not parts_of(folder / "state" / f"{name}.safetensors"):
            raise FileNotFoundError(f"{folder}/state/{name}.safetensors does not exist; the checkpoint is incomplete, use another one")


def load_run(folder: Path, model: MultistreamLM, optimizer: torch.optim.Optimizer, rank: int) -> tuple[RunState, dict[str, Tensor] | None]:
    """Fill model and optimizer from a checkpoint and set this rank's RNG; returns the run state and averaged weights."""
    about = read_state(folder)
    config = getattr(model, "lora", None)
    with naming_changed_options(model, read_about(folder), folder):
        if config is not None and parts_of(folder / "adapter.safetensors"):
            lora.load_state(model, config, read_tensors(folder / "adapter.safetensors"), str(folder), idle=lora.state(model, config))
        else:
            fill(model, open_tensors(folder / "model.safetensors"), str(folder))
    fill_optimizer(model, optimizer, open_tensors(folder / "state" / "optimizer.safetensors"), str(folder))
    rng = folder / "state" / f"rng_rank{rank}.safetensors"
    if rank == 0 or rng.is_file():                        # fewer ranks then than now: the new ones keep their seeds
        states = read_tensors(rng)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    return RunState(**about), averages(folder) or None


def read_state(folder: Path) -> dict[str, Any]:
    """The fields of the RunState in a checkpoint folder."""
    path = folder / "state" / "run.json"
    if not path.is_file():
        other = f"use another folder of out/NAME/ckpt, or --init={folder} with another --out"
        raise FileNotFoundError(f"{path} is missing: {folder} cannot be resumed; {other}")
    kinds = {"step": int, "best": float | int, "bad_evals": int, "skips": int, "skipped": int, "evaluated": int,
             "loader": dict | types.NoneType, "scaler": dict | types.NoneType, "config": dict}
    about = read_object(path, "use another checkpoint", **kinds)
    if about.keys() != kinds.keys():
        raise ValueError(f"{path} is damaged: it should hold {', '.join(sorted(kinds))}; use another checkpoint")
    return {key: about[key] for key in kinds if key != "config"}


def point(link: Path, target: str) -> None:
    """Make `link` point to `target` in one step."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)


def prune(out: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, the latest and the best, and what an interrupted save left behind."""
    folder = out / "ckpt"
    named = {(folder / link).resolve() for link in ("latest", "best")}
    old = sorted(folder.glob("step_*"))[: -keep or None]
    for path in [p for p in old if p.resolve() not in named] + [p for name in (".writing_*", ".old_*") for p in folder.glob(name)]:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)        # who moved a step to another disk keeps it
    for link in folder.glob(".*.new"):
        link.unlink()


def further_effects(out: Path, folder: Path, best: bool, keep: int, consolidated: str, dtype: torch.dtype) -> None:
    """What belongs to a checkpoint that was just written: the name of the best, and a copy in another trainer's layout."""
    if best:
        point(out / "ckpt" / "best", folder.name)
    if consolidated:
        with torch.random.fork_rng([]):                   # building a model draws; the run goes on with the numbers that it saved
            consolidate(out, folder, consolidated, keep, dtype)


def consolidate(out: Path, folder: Path, to: str, keep: int, dtype: torch.dtype) -> Path:
    """Write a checkpoint of ours once more as another trainer lays it out, for scripts that look there; keep the newest.

    out/checkpoints/checkpoint_000500/consolidated/config.json and the file that the family names (`consolidated`), in `dtype`.
    """
    target = out / "checkpoints" / folder.name.replace("step", "checkpoint")
    temporary = target.with_name(f".writing_{target.name}")
    for litter in target.parent.glob(".writing_*"):
        shutil.rmtree(litter)
    model = load(folder, dtype=dtype)
    written, expected = export(model, temporary / "consolidated", to), consolidated_files(model.config)[to]
    if not (written / expected).is_file():
        os.rename(next(written.glob("*.safetensors")), written / expected)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    sync(target.parent)
    for old in sorted(target.parent.glob("checkpoint_*"))[: -keep or None]:
        shutil.rmtree(old)
    return target / "consolidated"
