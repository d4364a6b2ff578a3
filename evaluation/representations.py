"""Representations and loss landscape of a model: similarity of its hidden states, and its loss around the trained weights.

    python evaluate.py representations out/dsaa [--other=out/moshi]    representations.json and .png: CKA, cosine similarity, PCA
    python evaluate.py landscape out/dsaa --points=11                  landscape.json and .png: the loss along two random directions

Hidden states are taken at `columns` columns of the run's held-out rows. CKA is linear and debiased (Nguyen et al. 2021): 1 for
states that are rotations of each other, 0 for unrelated states, for any number of columns. Directions are filter-normalised
(Li et al. 2018, arXiv:1712.09913): each row of a matrix moves along a random vector of the row's length; vectors do not move.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load
from config import TrainConfig
from data import Batch, Loader
from evaluation.html_page import blank_figure, save_figure
from loss import loss_scale
from model import MultistreamLM
from options import check_types, from_json, read_json, write_json


@dataclass(frozen=True)
class GeometryConfig:
    """Options of `python evaluate.py representations|landscape RUN`."""

    other: str = ""                # representations: run or checkpoint to compare with, of the same stream table; "" = none
    columns: int = 2000            # representations: largest number of columns whose states are compared
    points: int = 9                # landscape: number of points along each direction
    reach: float = 0.5             # landscape: largest distance along a direction, as a factor of the weights' norm
    pattern: str = ""              # landscape: only move parameters whose name contains this text; "" = all
    batches: int = 2               # landscape: number of held-out batches evaluated at each point
    seed: int = 0                  # landscape: random seed of the directions

    def __post_init__(self) -> None:
        check_types(self)
        assert self.points > 1 and self.columns > 3, "points is above 1, columns above 3"
        assert self.batches > 0 and self.reach > 0, "batches and reach are positive"


def of_run(run: Path, split: str = "held-out", passes: int = 0) -> tuple[MultistreamLM, TrainConfig, Loader]:
    """Model, config and rows of a run."""
    model, config = load(run), from_json(TrainConfig, read_json(run / "config.json"), f"{run}/config.json")
    return model, config, Loader(config.data, config.model.table, split, config.batch_size, passes=passes)


# ---- states ----

@torch.inference_mode()
def states(model: MultistreamLM, batches: Sequence[Batch], columns: int) -> dict[str, Tensor]:
    """Hidden states of the layers at all columns that are not padding: name -> (N, D), N <= columns."""
    kept: dict[str, list[Tensor]] = {}
    watched = {f"layer {n}": m for n, m in enumerate(model.temporal.layers)}
    if model.tower is not None:
        watched |= {f"text layer {n}": m for n, m in enumerate(model.tower.body.temporal.layers)}
        watched["projected text"] = model.text_projector

    def watch(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _, __, out: kept.setdefault(name, []).append(out.float()))

    hooks = [watch(name, module) for name, module in watched.items()]
    try:
        for batch in batches:
            inputs = batch.tokens[..., :-1]
            real = (batch.segments[:, :-1] >= 0).flatten()
            h_text, h_audio = model.hidden(inputs, batch.positions[:, :-1], batch.segments[:, :-1])
            for name, h in (("state", h_audio), ("text state", h_text)):
                kept.setdefault(name, []).append(h.float())
            for parts in kept.values():
                parts[-1] = parts[-1].flatten(0, 1)[real]
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: torch.cat(parts)[:columns] for name, parts in kept.items()}
    if torch.equal(found["state"], found["text state"]):
        del found["text state"]                        # one state serves both heads
    return found


def cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of states (N, D) and (N, E), N > 3: 1 = the same up to rotation and scale."""
    def inner(a: Tensor, b: Tensor) -> float:
        n = len(a)
        k, m = (t @ t.mT for t in (a, b))
        k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
        both, sums = (k * m).sum(), k.sum() * m.sum() / ((n - 1) * (n - 2))
        return float((both + sums - 2 * (k.sum(0) * m.sum(0)).sum() / (n - 2)) / (n * (n - 3)))
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    return inner(x, y) / math.sqrt(max(inner(x, x) * inner(y, y), 1e-300))


def cosine(x: Tensor, y: Tensor) -> float:
    """Mean cosine of the rows of two (N, D)."""
    return float(nn.functional.cosine_similarity(x.double(), y.double()).mean())


def main_axes(x: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """Principal components of states: coordinates (N, count), and the share of the variance that each component explains."""
    centred = x.double() - x.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return (u * s)[:, :count], s.square()[:count] / s.square().sum()


def compare_representations(run: Path, job: GeometryConfig) -> dict[str, Any]:
    """Compare the states of a model with each other and with another's; writes representations.json and representations.png."""
    model, config, rows = of_run(run)
    batches = list(itertools.takewhile(enough(job.columns), rows))
    if not batches:
        raise ValueError(f"{run} has no held-out rows to read; set data.held_out and prepare again")
    found = states(model, batches, job.columns)
    if job.other:
        other = load(job.other)
        if [s.kind for s in other.table.streams] != [s.kind for s in model.table.streams]:
            raise ValueError(f"{job.other} reads other rows than {run}; compare models of one stream table")
        found |= {f"other {name}": x for name, x in states(other, batches, job.columns).items()}
    names = list(found)
    result = {"columns": len(found["state"]), "names": names, "cka": [[round(cka(found[a], found[b]), 6) for b in names] for a in names],
            "cosine": {f"{a} -> {b}": round(cosine(found[a], found[b]), 6) for a, b in neighbours(names)},
            "explained": {name: [round(float(s), 6) for s in main_axes(x)[1]] for name, x in found.items()}}
    write_json(run / "representations.json", result)
    draw_representations(run / "representations.png", found, result, spoken(batches, model, job.columns))
    print(f"{run}/representations.json and .png: {len(names)} states at {result['columns']} columns")
    return result


def enough(columns: int) -> Any:
    """A predicate on batches, true until `columns` columns were read."""
    read = 0

    def more(batch: Batch) -> bool:
        nonlocal read
        before, read = read, read + int((batch.segments >= 0).sum())
        return before < columns

    return more


def neighbours(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of consecutive layers, and of the same layer in two models."""
    for name in names:
        stem, _, number = name.rpartition(" ")
        if number.isdigit() and f"{stem} {int(number) + 1}" in names:
            yield name, f"{stem} {int(number) + 1}"
        if f"other {name}" in names:
            yield name, f"other {name}"


def spoken(batches: Sequence[Batch], model: MultistreamLM, columns: int) -> Tensor:
    """Mask (N,) of the columns whose text row has a word piece, in the order of `states`."""
    table = model.table
    said = torch.cat([b.tokens[:, 0, :-1].flatten()[(b.segments[:, :-1] >= 0).flatten()] for b in batches])[:columns]
    return (said >= 0) & (said != table.pad) & (said != table.epad)


def draw_representations(path: Path, found: dict[str, Tensor], result: dict[str, Any], said: Tensor) -> None:
    figure = blank_figure(14, 6)
    left, right = figure.subplots(1, 2)
    image = left.imshow(result["cka"], vmin=0, vmax=1, cmap="viridis")
    left.set_xticks(range(len(result["names"])), result["names"], rotation=90)
    left.set_yticks(range(len(result["names"])), result["names"])
    left.set_title("linear CKA")
    figure.colorbar(image, ax=left)
    places, explained = main_axes(found["state"])
    for name, where in (("padding", ~said), ("words", said)):
        right.scatter(*places[where].T.tolist(), s=6, label=name)
    right.set_xlabel(f"axis 1, {explained[0]:.0%} of the variance")
    right.set_ylabel(f"axis 2, {explained[1]:.0%}")
    right.legend()
    save_figure(path, figure)


# ---- loss landscape ----

def direction(parameters: dict[str, nn.Parameter], seed: int) -> dict[str, Tensor]:
    """A random filter-normalised direction: each row of a matrix has the length of that row of the weights; vectors do not move."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, p in sorted(parameters.items()):
        if p.dim() > 1:
            noise = torch.randn(p.shape, generator=generator)
            found[name] = (noise * p.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True).clamp(min=1e-12)).detach()
    return found


@torch.no_grad()
def plane(model: MultistreamLM, parameters: dict[str, nn.Parameter], batches: Sequence[Batch], config: TrainConfig,
          job: GeometryConfig) -> Tensor:
    """The loss on a grid along two directions, (points, points); the weights are restored bit for bit."""
    one, two = (direction(parameters, 2 * job.seed + n) for n in (0, 1))
    kept = {name: parameters[name].detach().clone() for name in one}
    steps = torch.linspace(-job.reach, job.reach, job.points)
    found = torch.zeros(job.points, job.points, dtype=torch.float64)
    try:
        for i, j in tqdm(list(itertools.product(range(job.points), repeat=2)), unit="point", disable=None):
            for name, p in kept.items():
                parameters[name].copy_(p + steps[i] * one[name] + steps[j] * two[name])
            sums = sum(model(b.tokens, b.weights, b.positions, b.segments).stacked() for b in batches)[:, : len(model.table)]
            found[i, j] = float((sums[0] * loss_scale(sums[1], model.table, config.loss)).sum())
    finally:
        for name, p in kept.items():
            parameters[name].copy_(p)
    return found


def landscape(run: Path, job: GeometryConfig) -> dict[str, Any]:
    """The held-out loss around a run's weights; writes landscape.json and landscape.png."""
    model, config, rows = of_run(run)
    parameters = {name: p for name, p in model.named_parameters() if job.pattern in name}
    if not any(p.dim() > 1 for p in parameters.values()):
        there = ", ".join(list(dict(model.named_parameters()))[:6])
        raise ValueError(f"--pattern={job.pattern} is part of no matrix's name; there are {there} and more")
    batches = list(itertools.islice(rows, job.batches))
    if not batches:
        raise ValueError(f"{run} has no held-out rows to read; set data.held_out and prepare again")
    loss = plane(model, parameters, batches, config, job)
    steps = torch.linspace(-job.reach, job.reach, job.points).tolist()
    result = {"steps": steps, "loss": loss.tolist(), "matrices": sum(p.dim() > 1 for p in parameters.values()), "seed": job.seed}
    write_json(run / "landscape.json", result)
    figure = blank_figure(7, 6)
    axes = figure.subplots()
    figure.colorbar(axes.contourf(steps, steps, loss.T, levels=20), ax=axes, label="held-out loss")
    axes.plot(0, 0, "rx")
    axes.set_xlabel("direction 1, lengths of the weights")
    axes.set_ylabel("direction 2")
    save_figure(run / "landscape.png", figure)
    middle = loss[job.points // 2, job.points // 2] if job.points % 2 else float("nan")
    print(f"{run}/landscape.json, landscape.png: loss {loss.min():.3f} to {loss.max():.3f}, {middle:.3f} at the weights")
    return result
