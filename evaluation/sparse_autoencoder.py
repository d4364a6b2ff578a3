"""Sparse autoencoders on a model's hidden states: each state is a combination of k out of many learned directions.

    python evaluate.py sae configs/dsaa_ae.py --run=out/dsaa               trains; reports held-out cosine and dead units, RUN/sae/
    python evaluate.py sae configs/dsaa_ae.py --smoke                      on the tiny run of configs/dsaa.py --smoke

    e  = the k largest by magnitude of x / |x| W_e + b_e, the others 0                 encode
    x' = e W_d, rows of W_d of length 1                                                decode
    loss = (1 - cos(x, x'_k)) + (1 - cos(x, x'_4k)) / 8

The loss is the cosine distance, so only the direction of a state is learned. The rows of the decoder have length 1: the
radial part of their gradient is removed, and each step ends with a normalisation. States that are all zero encode to zero.
There is one autoencoder for each name in `states` (the names of representations.py); training resumes after the last
finished epoch. Method: CompresSAE (arXiv:2505.11388), which the DSAA reference trains on the same states.
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

from checkpoint import write_tensors
from config import onecycle
from evaluation.representations import enough, of_run, states
from families.tensor_files import read_tensors
from options import check_types, help_text, load_config, write_json


@dataclass(frozen=True)
class SaeConfig:
    """Options of `python evaluate.py sae`: the states, the autoencoder and its training."""

    run: str = "out/run"                        # run folder whose model and training rows are used
    states: tuple[str, ...] = ("state",)        # hidden states to train on, named as in representations.json
    columns: int = 200_000                      # largest number of columns whose states are used
    width: int = 2048                           # number of learned directions
    k: int = 16                                 # number of directions that one state may use
    epochs: int = 6                             # number of passes over the states
    batch: int = 1024                           # number of states in an optimizer step
    lr: float = 1e-3                            # peak learning rate of Adam with a one-cycle schedule
    held_out: float = 0.05                      # fraction of the states held out for validation
    seed: int = 0                               # random seed of initial weights and data order

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
            self.encoder.copy_(self.decoder.mT)        # start as the transpose of the decoder

    def encode(self, x: Tensor, k: int = 0) -> Tensor:
        """Keep the k largest by magnitude; an x of zeros gives zeros."""
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
        """Remove the radial part of the decoder's gradient, which only changes the length of its rows."""
        grad = self.decoder.grad
        grad -= (grad * self.decoder).sum(-1, keepdim=True) * self.decoder

    @torch.no_grad()
    def to_sphere(self) -> None:
        self.decoder.copy_(F.normalize(self.decoder, dim=-1))


@torch.no_grad()
def measure(sae: Sae, x: Tensor) -> dict[str, float]:
    """Mean cosine similarity of states (N, D) and their reconstructions, and the share of directions that no state uses."""
    e = sae.encode(x)
    return {"cosine": float(F.cosine_similarity(x, sae.decode(e), dim=-1).mean()), "dead": float((e == 0).all(0).float().mean())}


def gather(config: SaeConfig) -> dict[str, Tensor]:
    """Hidden states of a run's training rows: name -> (N, D)."""
    model, _, rows = of_run(Path(config.run), "train", passes=1)
    found = states(model, list(itertools.takewhile(enough(config.columns), rows)), config.columns)
    for name in config.states:
        if name not in found:
            raise ValueError(f"--states: {config.run} has no state {name!r}; there are {', '.join(found)}")
    return {name: found[name] for name in config.states}


def fit(x: Tensor, config: SaeConfig, path: Path) -> dict[str, float]:
    """Train one autoencoder on states (N, D); after each epoch `path` gets its weights and the optimizer state."""
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
    """Load weights and optimizer state from a file; returns the number of finished epochs."""
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
