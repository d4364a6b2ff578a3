"""Sparse autoencoders of a model's states: each column as a combination of k out of many learned directions.

    python evaluate.py sae configs/dsaa_ae.py --run=out/dsaa               cosine on held-out columns and dead units, RUN/sae/*.safetensors
    python evaluate.py sae configs/dsaa_ae.py --smoke                      on the tiny run of configs/dsaa.py --smoke

    e  = the k largest of |x / |x| W_e + b_e|, with their signs, the others 0          encode
    x' = e W_d, rows of W_d of length 1                                                decode
    loss = (1 - cos(x, x'_k)) + (1 - cos(x, x'_4k)) / 8

Only the direction of a state is learned: both sides are compared by cosine. The rows of the decoder stay on the unit sphere:
their gradient loses what points outwards, and a step ends with a projection. States that are all zero encode to zero. One
autoencoder for each name in `states`, as representations.py calls them; an epoch that is done is never done again. After CompresSAE
(arXiv:2505.11388), which the DSAA reference trains on the same states.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load, write_tensors
from config import TrainConfig, onecycle
from data import Loader
from evaluation.representations import enough, states
from families.tensor_files import read_tensors
from options import check_types, from_json, help_text, load_config, read_json, write_json


@dataclass(frozen=True)
class SaeConfig:
    """Which states, and how they are coded."""

    run: str = "out/run"                       # run folder
    states: tuple[str, ...] = ("state",)        # names as in representations.json
    columns: int = 200_000                      # columns of the training rows that are read
    width: int = 2048                           # learned directions
    k: int = 16                                 # of them a state may use
    epochs: int = 6                             # passes over the columns
    batch: int = 1024                           # columns a step
    lr: float = 1e-3                            # peak of a one-cycle schedule, Adam
    held_out: float = 0.05                      # share of the columns that is only measured
    seed: int = 0                               # of weights and order

    def __post_init__(self) -> None:
        check_types(self)
        assert 0 < self.k <= self.width and min(self.columns, self.epochs, self.batch) > 0, "k is in 1..width, the others positive"
        assert 0 < self.held_out < 1 and self.states, "held_out is in (0, 1), and states names some"


class Sae(nn.Module):
    """x (..., D) -> e (..., width) sparse -> (..., D)"""

    def __init__(self, dim: int, width: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.encoder, self.bias = nn.Parameter(torch.empty(dim, width)), nn.Parameter(torch.zeros(width))
        self.decoder = nn.Parameter(F.normalize(torch.randn(width, dim), dim=-1))
        with torch.no_grad():
            self.encoder.copy_(self.decoder.mT)        # reads what it writes

    def encode(self, x: Tensor, k: int = 0) -> Tensor:
        """The k largest by size, signs kept; an x of zeros gives zeros."""
        full = F.normalize(x, dim=-1) @ self.encoder + self.bias
        full = full * (x != 0).any(-1, keepdim=True)
        kept = full.abs().topk(min(k or self.k, full.shape[-1]), dim=-1).indices
        return torch.zeros_like(full).scatter(-1, kept, full.gather(-1, kept))

    def decode(self, e: Tensor) -> Tensor:
        return e @ self.decoder

    def loss(self, x: Tensor) -> Tensor:
        near, far = (1 - F.cosine_similarity(x, self.decode(self.encode(x, k)), dim=-1).mean() for k in (self.k, 4 * self.k))
        return near + far / 8

    @torch.no_grad()
    def tangent(self) -> None:
        """Take from the decoder's gradient what would only change the length of its rows."""
        grad = self.decoder.grad
        grad -= (grad * self.decoder).sum(-1, keepdim=True) * self.decoder

    @torch.no_grad()
    def to_sphere(self) -> None:
        self.decoder.copy_(F.normalize(self.decoder, dim=-1))


@torch.no_grad()
def measure(sae: Sae, x: Tensor) -> dict[str, float]:
    """Mean cosine of states (N, D) with what comes back, and the share of directions that none of them uses."""
    e = sae.encode(x)
    return {"cosine": float(F.cosine_similarity(x, sae.decode(e), dim=-1).mean()), "dead": float((e == 0).all(0).float().mean())}


def gather(config: SaeConfig) -> dict[str, Tensor]:
    """The states of a run's training rows, as they come: name -> (N, D)."""
    run = Path(config.run)
    model, about = load(run), from_json(TrainConfig, read_json(run / "config.json"), f"{run}/config.json")
    rows = Loader(about.data, about.model.table, "train", about.batch_size, passes=1)
    found = states(model, list(itertools.takewhile(enough(config.columns), rows)), config.columns)
    for name in config.states:
        if name not in found:
            raise ValueError(f"--states: {config.run} has no state {name!r}; there are {', '.join(found)}")
    return {name: found[name] for name in config.states}


def fit(x: Tensor, config: SaeConfig, path: Path) -> dict[str, float]:
    """Train one autoencoder on states (N, D), an epoch at a time; `path` holds it and what the next epoch needs."""
    torch.manual_seed(config.seed)
    order = torch.randperm(len(x))
    held = max(1, round(config.held_out * len(x)))
    kept, x = x[order[:held]], x[order[held:]]
    if not len(x):
        raise ValueError(f"{held} columns are too few to train on; raise --columns or add data")
    sae = Sae(x.shape[1], config.width, config.k)
    optimizer = torch.optim.Adam(sae.parameters(), config.lr)
    steps = -(-len(x) // config.batch)
    cycle = SimpleNamespace(lr=config.lr, warmup=round(0.3 * steps * config.epochs), steps=steps * config.epochs)
    done = restore(path, sae, optimizer) if path.is_file() else 0
    for epoch in range(done, config.epochs):
        shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed + 1 + epoch))
        for n, rows in enumerate(tqdm(shuffled.split(config.batch), desc=f"{path.stem} {epoch + 1}", unit="step", disable=None)):
            optimizer.param_groups[0]["lr"] = onecycle(epoch * steps + n, cycle)
            loss = sae.loss(x[rows])
            optimizer.zero_grad()
            loss.backward()
            sae.tangent()
            optimizer.step()
            sae.to_sphere()
        moments = {f"{key}:{n}": torch.as_tensor(value) for n, p in enumerate(sae.parameters())
                   for key, value in optimizer.state[p].items()}
        write_tensors(path, dict(sae.state_dict()) | moments | {"epochs": torch.tensor(epoch + 1)})
    return measure(sae, kept)


def restore(path: Path, sae: Sae, optimizer: torch.optim.Optimizer) -> int:
    """Continue behind the epochs that a file holds; returns how many."""
    found = read_tensors(path)
    names = sae.state_dict()
    if any(n not in found or found[n].shape != t.shape for n, t in names.items()):
        raise ValueError(f"{path} was trained with another width or on other states; remove it, or choose another run")
    sae.load_state_dict({n: found[n] for n in names})
    for n, p in enumerate(sae.parameters()):
        optimizer.state[p] = {key: found[f"{key}:{n}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return int(found["epochs"])


USAGE = "python evaluate.py sae configs/NAME.py [--key=value ...] [--smoke]"


def main(argv: Sequence[str]) -> None:
    if list(argv) in ([], ["--help"]):
        return print(help_text(SaeConfig(), USAGE))
    config: SaeConfig = load_config(list(argv), USAGE, kind="SaeConfig")
    folder, results = Path(config.run) / "sae", {}
    for name, x in gather(config).items():
        results[name] = fit(x, config, folder / f"{name.replace(' ', '_')}.safetensors")
        guess = math.sqrt(config.k / x.shape[1])
        print(f"{name}: {len(x)} columns of {x.shape[1]}, held-out cosine {results[name]['cosine']:.3f} (k coordinates of a random state "
              + f"{guess:.3f}), {results[name]['dead']:.0%} of {config.width} directions unused")
    write_json(folder / "sae.json", results)
