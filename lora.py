"""Low-rank adapters by hand: LoRA (arXiv:2106.09685), rsLoRA (2312.03732), DoRA (2402.09353).

    y = W x + s B A x          s = alpha / rank, or alpha / sqrt(rank) with rslora;  A (R, in) random, B (out, R) zero
    y = m * (W + s B A) x / ||W + s B A||                with dora, m (out,) starts as the row norms of W

`inject` adds an `Adapter` to every Linear whose dotted path matches a target pattern and freezes all other parameters
except the modules named in `train`. A pattern that matches nothing is an error. It works on any module with a `weight`
(..., out, in) and an `adapter` attribute; a weight with a leading axis (one set per depth step) gets one update per set.
This file does not depend on model.py.
"""

import fnmatch
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.lora_linear import linear, lora_linear
from layers.int8_base import check_mergeable, dequantized, linears
from training.parallel import joined, own_rows, part, place, whole

# Named target sets of the Higgs recipes; none of them adapts the text head.
SETS = {"attention_only": ("attn.*",), "audio_focused": ("audio_ffn.*", "audio_head"),
        "comprehensive": ("attn.*", "ffn.*", "audio_ffn.*", "audio_head")}


@dataclass(frozen=True)
class LoraConfig:
    """Which Linear layers get a LoRA adapter, and its hyperparameters."""

    rank: int = 16                        # LoRA rank: inner width of the low-rank update
    alpha: float = 32.0                   # LoRA alpha: the update is scaled by alpha / rank
    targets: tuple[str, ...] = ("attn.*", "ffn.*", "audio_ffn.*")   # adapted layers: globs for module paths, or a name from lora.SETS
    dropout: float = 0.0                  # dropout probability on the adapter's input, in training
    rslora: bool = False                  # true = scale the update by alpha / sqrt(rank) (rsLoRA) instead of alpha / rank
    dora: bool = False                    # true = DoRA: train a magnitude for each output row beside the low-rank update
    train: tuple[str, ...] = ()           # globs of modules or parameters that are trained in full, without an adapter
    ranks: tuple[tuple[str, int], ...] = ()      # (pattern, rank) pairs that override rank; the first match applies
    alphas: tuple[tuple[str, float], ...] = ()   # (pattern, alpha) pairs that override alpha; the first match applies

    def __post_init__(self) -> None:
        assert all(0 < r <= 2**20 for r in (self.rank, *dict(self.ranks).values())) and 0 <= self.dropout < 1, (
            f"rank {self.rank}, ranks {self.ranks} or dropout {self.dropout} is out of range")


class Adapter(nn.Module):
    """The low-rank update of one Linear, or of each of its depth steps."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, config: LoraConfig, row_scale: Tensor | None = None) -> None:
        super().__init__()
        *sets, outputs, inputs = weight.shape
        like = {"device": weight.device, "dtype": torch.float32}
        self.lora_A, self.lora_B = (nn.Parameter(torch.empty(*sets, *shape, **like)) for shape in ((rank, inputs), (outputs, rank)))
        self.lora_magnitude = nn.Parameter(torch.empty(*sets, outputs, **like)) if config.dora else None
        self.scale = alpha / (math.sqrt(rank) if config.rslora else rank)
        self.rank, self.alpha, self.dropout = rank, alpha, config.dropout
        self.enabled, self.merging = True, False
        self.base: Tensor | None = None           # the original weight while the adapter is merged
        if not weight.is_meta:
            self.reset(weight, row_scale)

    @torch.no_grad()
    def reset(self, weight: Tensor, row_scale: Tensor | None = None) -> None:
        """Give the parameters their first values, also those that were cut before they had any. A is drawn on the CPU: equal everywhere."""
        start = {"lora_A": torch.empty(self.lora_A.shape).uniform_(-1, 1) / math.sqrt(weight.shape[-1])}
        start["lora_B"] = torch.zeros(self.lora_B.shape)
        if self.lora_magnitude is not None:
            start["lora_magnitude"] = dequantized(whole(weight), row_scale).norm(dim=-1)
        for name, full in start.items():
            like = getattr(self, name)
            setattr(self, name, nn.Parameter(joined(own_rows(full, like).clone().to(part(weight).device), like)))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, pick: Callable[[Tensor], Tensor] = lambda p: p,
                row_scale: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out); `pick` selects the weight sets of depth steps, `row_scale` belongs to a weight of 8 bits"""
        if not self.enabled or self.base is not None:
            return linear(x, weight, bias, row_scale)
        if self.merging:
            return linear(x, self.merged(weight, pick).to(weight.dtype), bias)
        a, b = pick(self.lora_A), pick(self.lora_B)
        if self.lora_magnitude is None and not (self.dropout and self.training):
            return lora_linear(x, weight, a, b, self.scale, bias, row_scale)
        y, low = linear(x, weight, None, row_scale), F.dropout(x, self.dropout, self.training)
        low = low if torch.is_autocast_enabled(x.device.type) else low.to(a.dtype)
        y = y + (torch.matmul(torch.matmul(low, a.mT), b.mT) * self.scale).to(y.dtype)
        if self.lora_magnitude is not None:
            full = dequantized(weight, row_scale)
            ratio = pick(self.lora_magnitude) / (full + self.scale * (b @ a).detach()).norm(dim=-1)
            y = ((ratio if ratio.dim() == 1 else ratio.unsqueeze(-2)) * y).to(y.dtype)           # (steps, out) -> (steps, 1, out)
        return y if bias is None else y + bias

    def merged(self, weight: Tensor, pick: Callable[[Tensor], Tensor] = lambda p: p) -> Tensor:
        """The adapted weight in fp32.   (..., out, in)"""
        full = weight.detach().float() + self.scale * (pick(self.lora_B) @ pick(self.lora_A)).detach().float()
        if self.lora_magnitude is None:
            return full
        return full * (pick(self.lora_magnitude) / full.norm(dim=-1)).unsqueeze(-1).detach()


def matches(path: str, pattern: str) -> bool:
    """Whether a glob matches a dotted path or the end of it, from any dot on."""
    return fnmatch.fnmatchcase(f".{path}", f"*.{pattern}")


def within(path: str, pattern: str) -> bool:
    """Whether a glob matches a parameter or a module that contains it."""
    return matches(path, pattern) or matches(path, f"{pattern}.*")


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """(path, Linear, Adapter) of every adapted Linear."""
    for path, module in linears(model).items():
        if module.adapter is not None:
            yield path, module, module.adapter


def inject(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze the model, add adapters to the targets and keep `train` trainable; returns the model.

    A Linear that is trained in full gets no adapter. ValueError when a pattern matches nothing; it lists the existing paths.
    """
    found = linears(model)
    targets = [pattern for name in config.targets for pattern in SETS.get(name, (name,))]
    for pattern in [*targets, *(p for p, _ in (*config.ranks, *config.alphas))]:
        if not any(matches(path, pattern) for path in found):
            raise ValueError(f"adapter pattern {pattern!r} matches no Linear; choose from {outline(found)}")
    trained = trained_parameters(model, config)
    model.requires_grad_(False)
    for path, module in found.items():
        if f"{path}.weight" not in trained and any(matches(path, pattern) for pattern in targets):
            rank = next((r for p, r in config.ranks if matches(path, p)), config.rank)
            alpha = next((a for p, a in config.alphas if matches(path, p)), config.alpha)
            if module.adapter is not None and module.adapter.lora_A.is_meta:           # cut with its weight, before both had values
                module.adapter.reset(module.weight, module.row_scale)
            else:
                module.adapter = Adapter(module.weight, rank, alpha, config, module.row_scale).train(module.training)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    model.lora = config                            # checkpoint.py saves and loads it
    return model


def trained_parameters(model: nn.Module, config: LoraConfig) -> dict[str, nn.Parameter]:
    """The parameters that `train` names, by module or parameter path."""
    chosen: dict[str, nn.Parameter] = {}
    for pattern in config.train:
        hits = {name: p for name, p in model.named_parameters() if "lora_" not in name and within(name, pattern)}
        if not hits:
            raise ValueError(f"train pattern {pattern!r} matches no parameter; choose from {outline(dict(model.named_parameters()))}")
        chosen |= hits
    return chosen


def rate_factors(model: nn.Module, rates: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Learning rate factor of each trainable parameter: that of the first pattern that matches; 0 freezes the parameter.

    ValueError when a pattern matches no trainable parameter, or when all factors are 0.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = dict.fromkeys(trained, 1.0)
    for pattern, factor in reversed(rates):
        hits = [name for name in trained if within(name, pattern)]
        if not hits:
            raise ValueError(f"rates pattern {pattern!r} matches nothing that is trained; choose from {outline(trained)}")
        factors |= dict.fromkeys(hits, factor)
    if not any(factors.values()):
        raise ValueError("all rates are 0, so nothing is trained; give at least one pattern a factor above 0")
    for name, p in trained.items():
        p.requires_grad_(factors[name] > 0)
    return factors


def outline(names: dict[str, object]) -> str:
    """Paths with layer numbers replaced by N, without duplicates."""
    folded = dict.fromkeys(".".join("N" if part.isdigit() else part for part in name.split(".")) for name in names)
    return ", ".join(folded)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which the model runs without adapters and without dropout; its outputs are bit-equal to those of the base."""
    training, on = model.training, [adapter for _, _, adapter in adapters(model) if adapter.enabled]
    model.eval()
    for adapter in on:
        adapter.enabled = False
    try:
        yield model
    finally:
        model.train(training)
        for adapter in on:
            adapter.enabled = True


@contextmanager
def merging(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which the model computes as if its adapters were merged; each weight is merged when it is used, none is changed."""
    on = [adapter for _, _, adapter in adapters(model)]
    for adapter in on:
        adapter.merging = True
    try:
        yield model
    finally:
        for adapter in on:
            adapter.merging = False


# ---- merging ----

@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Merge every adapter into its weight: computed in fp32, cast once. The original weight is kept for `unmerge`."""
    for path, module, adapter in adapters(model):
        check_mergeable(path, module)
        if adapter.base is None:
            adapter.base = module.weight.detach().clone()
            module.weight.copy_(adapter.merged(module.weight))
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, bit for bit."""
    for _, module, adapter in adapters(model):
        if adapter.base is not None:
            module.weight.copy_(adapter.base)
            adapter.base = None
    return model


def strip(model: nn.Module) -> nn.Module:
    """Merge the adapters and remove them; returns a plain model."""
    merge(model)
    for _, module, _ in list(adapters(model)):
        module.adapter = None
    return model


@torch.no_grad()
def norms(model: nn.Module) -> dict[str, float]:
    """||s B A|| / ||W|| of every adapted Linear; 0 = the adapter changes nothing."""
    plain = {path: (a, dequantized(m.weight, m.row_scale) if a.base is None else a.base.float()) for path, m, a in adapters(model)}
    return {path: float((a.merged(w) - w).norm() / w.norm()) for path, (a, w) in plain.items()}


# ---- adapter state ----

def state(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """The tensors of an adapter file: lora_A, lora_B, magnitudes, and the parameters trained in full."""
    names = set(trained_parameters(model, config))
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name or name in names}


def idle_adapters(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the lora_B tensors that are all zero: these adapters change nothing."""
    return [name for name, t in tensors.items() if name.endswith("lora_B") and not whole(t).any()]


@torch.no_grad()
def load_state(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], source: str, idle: Collection[str] = ()) -> None:
    """Load adapter tensors into an injected model, strictly.

    ValueError names `source` and the tensors that are missing, unexpected, of another shape, or a lora_B that is all zero (an
    adapter that was never trained or never saved). `idle` names the lora_B that may be zero: no target ever trained them.
    """
    expected = state(model, config)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        counts = f"{len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        raise ValueError(f"adapter {source} does not fit: {counts}; it was made with other targets or for another model")
    for name, target in expected.items():
        if target.shape != tensors[name].shape:
            shapes = f"{name} is {tuple(tensors[name].shape)}, the model needs {tuple(target.shape)}"
            raise ValueError(f"adapter {source}: {shapes}; rank or base model differ")
    zero = [name for name in idle_adapters(tensors) if name not in idle]
    if zero:
        raise ValueError(f"adapter {source}: {len(zero)} lora_B are all zero ({zero[0]}); it would change nothing there, train it first")
    for name, target in expected.items():
        target.copy_(place(tensors[name], target))
