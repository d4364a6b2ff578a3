"""A frozen text language model next to the temporal transformer, fused after the last layer of both (DSAA).

    text row ---> text tower (Qwen) ---> h_t (B, S, Dt) --+
                                                          +-- h = [h_t; h_a] --text projector--> (B, S, Dt) --> text_head
    audio rows -> temporal (Moshi) ----> h_a (B, S, Da) --+         |
                                                                    +-- [h; e_k] --projector k--> depth transformer, step k

The tower is a separate model that is never trained; checkpoints name it and leave its weights out. It steps once per
column ("frame") or only at text tokens ("token": the last state is held until the next one). Only the projectors combine
the two: the user's speech never reaches the text model. Formulas: the reference slavivo/dsaa, whose
projectors these are; a norm for each part and the token rate are ours. Set-up: families/dsaa.py. Next: contrastive.py.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.architecture import ModelConfig


class Affine(nn.Module):
    """y = W x + b; with `sets`, one W and b for each depth step: x (n, N, in) holds the steps of `step`."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, sets: int = 0, start: float = 1.0) -> None:
        super().__init__()
        lead = [sets] if sets else []
        self.weight = nn.Parameter(torch.empty(*lead, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(*lead, *([1] if sets else []), outputs)) if bias else None
        if not self.weight.is_meta:
            bound = start * math.sqrt(6 / (inputs + outputs))                           # Xavier; start 0 = zeros
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, step: slice | None = None) -> Tensor:
        if step is None:
            return F.linear(x, self.weight, self.bias)
        y = torch.bmm(x, self.weight[step].to(x.dtype).mT)
        return y if self.bias is None else y + self.bias[step].to(y.dtype)


class PartNorm(nn.Module):
    """LayerNorm over the whole input, or over each of its `parts` when split: their scales differ widely."""

    def __init__(self, parts: Sequence[int], split: bool, sets: int = 0) -> None:
        super().__init__()
        lead, self.parts = [sets, 1] if sets else [], list(parts) if split else [sum(parts)]
        self.weight, self.bias = nn.Parameter(torch.ones(*lead, sum(parts))), nn.Parameter(torch.zeros(*lead, sum(parts)))

    def forward(self, x: Tensor, step: slice | None = None) -> Tensor:
        y = torch.cat([F.layer_norm(part.float(), part.shape[-1:]) for part in x.split(self.parts, -1)], -1)
        weight, bias = (p if step is None else p[step] for p in (self.weight, self.bias))
        return (y * weight + bias).to(x.dtype)


class Projector(nn.Module):
    """From the joined states of both towers to what a head or a depth step reads.   (..., sum(parts)) -> (..., outputs)

        mlp            y = down(drop(gelu(up(norm x))))
        residual       y = skip x + mlp(x)
        gated          y = mlp(x) * sigmoid(gate(gate_norm x))
        preserve       y = x[first part] + scale * mlp(x)        down starts near zero: the text model's logits stay
        text_residual  the same with the weights of mlp
    """

    def __init__(self, kind: str, parts: Sequence[int], hidden: int, outputs: int, dropout: float = 0.0, split: bool = False,
                 sets: int = 0) -> None:
        super().__init__()
        assert kind in KINDS, f"projector {kind!r} is none of {', '.join(KINDS)}"
        assert kind not in ("preserve", "text_residual") or outputs == parts[0], f"{kind} keeps the first part: {parts[0]} -> {outputs}"
        self.kind, self.first, self.dropout, inputs = kind, parts[0], dropout, sum(parts)
        self.norm, self.up, self.down = PartNorm(parts, split, sets), Affine(inputs, hidden, sets=sets), Affine(hidden, outputs, sets=sets)
        if kind == "residual":
            self.skip = Affine(inputs, outputs, bias=False, sets=sets)
        if kind == "gated":
            self.gate_norm, self.gate = PartNorm(parts, split, sets), Affine(inputs, outputs, sets=sets)
        if kind in ("preserve", "text_residual"):
            self.scale = nn.Parameter(torch.tensor(0.1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming (relu) for up, Xavier for the others; `preserve`: up as nn.Linear starts, down of deviation 0.01."""
        up, down = self.up.weight, self.down.weight
        if not up.is_meta and self.kind == "preserve":
            bound = math.sqrt(1 / up.shape[-1])
            for p in (up, self.up.bias):
                p.uniform_(-bound, bound)
            down.normal_(0.0, 0.01)
        elif not up.is_meta:
            up.normal_(0.0, math.sqrt(2 / up.shape[-1]))

    def forward(self, x: Tensor, step: slice | None = None) -> Tensor:
        y = self.down(F.dropout(F.gelu(self.up(self.norm(x, step), step)), self.dropout, self.training), step)
        if self.kind == "residual":
            return self.skip(x, step) + y
        if self.kind == "gated":
            return y * torch.sigmoid(self.gate(self.gate_norm(x, step), step))
        return y if self.kind == "mlp" else x[..., : self.first] + self.scale * y


KINDS = ("preserve", "residual", "mlp", "gated", "text_residual")


class TextTower:
    """A frozen text model that reads the text row.   `body` is its MultistreamLM, `padding` the ids of padding

    Not an nn.Module, so its owner does not save, train or adapt it.
    """

    def __init__(self, body: nn.Module, rate: str, padding: Sequence[int]) -> None:
        self.body, self.rate, self.padding = body.requires_grad_(False).eval(), rate, tuple(padding)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, S) -> (B, S, Dt), -1 -> zero"""
        return self.body.embed["text"].row(0, ids)

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor | None, segments: Tensor | None, cache: Any) -> Tensor:
        """States after the last norm.   ids (B, S), positions and segments (B, S) or None -> (B, S, Dt)"""
        if self.rate == "frame":
            return self.body.hidden(ids[:, None], positions, segments, cache)[0]
        said = ids >= 0
        for pad in self.padding:
            said &= ids != pad
        return self.packed(ids, said, segments) if cache is None else self.step(ids, said, cache)

    def packed(self, ids: Tensor, said: Tensor, segments: Tensor | None) -> Tensor:
        """Token rate: drop the padding, read each row once, and repeat every state until the next token."""
        B, S = ids.shape
        n = max(1, int(said.sum(1).max()))
        order = (~said).sort(dim=1, stable=True).indices[:, :n]                        # -> (B, n) columns of the tokens
        real = said.gather(1, order)
        places = torch.arange(n, device=ids.device)
        kept = None if segments is None else segments.gather(1, order)
        h = self.body.hidden(torch.where(real, ids.gather(1, order), -1)[:, None], torch.where(real, places, -1), kept)[0]
        last = said.cumsum(1) - 1                                                      # (B, S), -1 before the first token
        started = last >= 0
        if segments is not None:
            started &= kept.gather(1, last.clamp(min=0)) == segments
        states = h.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, h.shape[-1]))
        return torch.where(started[..., None], states, 0.0)

    def step(self, ids: Tensor, said: Tensor, cache: Any) -> Tensor:
        """The same for the next columns (B, n) of a generation; the cache counts tokens and keeps the last state."""
        counts = cache.counts[:, None] + said.cumsum(1)
        h = self.body.hidden(torch.where(said, ids, -1)[:, None], torch.where(said, counts - 1, -1), None, cache)[0]
        columns = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(said, columns, -1).cummax(1).values                         # (B, n), -1 = still the state before
        fresh = h.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, h.shape[-1]))
        h = torch.where((last >= 0)[..., None], fresh, cache.held[:, None])
        cache.counts, cache.held = counts[:, -1], h[:, -1]
        return h

    def cache(self, batch: int, columns: int) -> Any:
        cache = self.body.cache(batch, columns)
        cache.plain = self.rate == "frame"             # otherwise columns without a token count as padding
        weight = self.body.embed["text"].weight
        cache.counts = torch.zeros(batch, dtype=torch.long, device=weight.device)
        cache.held = weight.new_zeros(batch, weight.shape[1])
        return cache


class Remembered:
    """LRU cache of the states of frozen towers, computed once per example and kept in memory as fp16.

    Each example is computed alone and always rounded to fp16, so that a resumed run reads the same values.
    """

    def __init__(self, megabytes: int) -> None:
        self.room, self.kept = megabytes * 2**20, OrderedDict[bytes, Tensor]()
        self.used = self.hits = 0

    def __call__(self, tokens: Tensor, segments: Tensor | None, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """States (B, S, D) of tokens (B, K, S); `compute` makes those of one example (1, K, n)."""
        parts = []
        for b in range(len(tokens)):
            row = [self.example(tokens[b : b + 1, :, i:j], compute) for i, j in runs(tokens[b], None if segments is None else segments[b])]
            length = sum(map(len, row))
            parts.append(F.pad(torch.cat(row), (0, 0, 0, tokens.shape[2] - length)))
        return torch.stack(parts)

    def example(self, tokens: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        key = hashlib.blake2b(tokens.cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
        if key in self.kept:
            self.hits += 1
            self.kept.move_to_end(key)
            return self.kept[key].to(tokens.device).float()
        h = compute(tokens)[0].detach().half()
        self.kept[key], self.used = h.cpu(), self.used + 2 * h.numel()
        while self.used > self.room:
            _, oldest = self.kept.popitem(last=False)
            self.used -= 2 * oldest.numel()
        return h.float()


def remember(model: nn.Module, megabytes: int) -> Remembered:
    """The state cache of a model with frozen towers; ValueError names what is trained there."""
    parts = ("temporal.", "embed.", "feed_text.")
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(parts)]
    if trained or model.config.dropout or model.config.input_drop or model.config.text_drop:
        found = f"{trained[0]} is trained" if trained else "the model drops inputs or states"
        raise ValueError(f"model.fusion.remember caches the states of frozen towers, but {found}; "
                         + "freeze it with --rates, or set model.fusion.remember=0")
    return Remembered(megabytes)


def runs(tokens: Tensor, segments: Tensor | None) -> list[tuple[int, int]]:
    """Where each example of a row begins and ends, padding left out.   tokens (K, S), segments (S,) or None"""
    if segments is None or bool((segments < 0).all()):
        return [(0, tokens.shape[1])]
    edges = [0, *(segments.diff() != 0).nonzero().flatten().add(1).tolist(), len(segments)]
    return [(i, j) for i, j in zip(edges, edges[1:], strict=False) if int(segments[i]) >= 0]


def fingerprint(weights: dict[str, Tensor]) -> str:
    """16 hex digits, a hash of a sample of every tensor as bf16, so independent of the stored dtype."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().flatten()
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(flat[:: max(1, len(flat) // 256)].to("cpu", torch.bfloat16).float().numpy().tobytes())
    return found.hexdigest()


def as_stored(tower: ModelConfig, stored: ModelConfig) -> ModelConfig:
    """A tower's config with the attention window of the stored model, to compare them: the window is our choice."""
    return replace(tower, temporal=replace(tower.temporal, window=stored.temporal.window))
