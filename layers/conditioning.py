"""Low-rank embeddings, conditions and voices, for the relatives of Moshi.

    narrow tables    y_n = P_n E_n[id]            TTS, Hibiki: the depth transformer's tables, `low_rank` wide
    one table        y_n = P_n E[id]              TTS: two text rows, the current word and one ahead (`demux`)
    wide text        y = P silu(Q E[id])          Qwen3-TTS: the text table of a larger model (`text_width`)
    condition        y = P E[id], or a learned u   Hibiki, TTS: one choice for the whole sequence, added to every column
    voice            every layer attends to P f   TTS: features f (n, F) of the speakers, in speaking order

-1 adds exactly zero, as in `Embedding` of model.py, whose `Linear` is passed in. A condition is a row of the grid
with its id in every column; the last id means no choice, and is what classifier-free guidance reads.
Sources: moshi 0.2.13 (ScaledEmbedding, LUTConditioner), arXiv:2502.03382 (Hibiki). `condition_ids` reads choices by name. Next: model.py.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.architecture import ModelConfig
from streams import StreamTable

Linear = Callable[..., nn.Module]


class ProjectedEmbedding(nn.Module):
    """Tables of width `rank`; each row of the grid has its own Linear to `dim`.   ids (B, n, S) -> (B, S, D)

    `shared`: all rows use the table of the first.
    """

    def __init__(self, vocabularies: Sequence[int], rank: int, dim: int, linear: Linear, shared: bool = False) -> None:
        super().__init__()
        tables = vocabularies[:1] if shared else vocabularies
        self.weight = nn.Parameter(torch.empty(sum(tables), rank))
        self.offsets = [0 if shared else sum(vocabularies[:n]) for n in range(len(vocabularies))]
        self.out = linear(rank, dim, sets=len(vocabularies))

    def row(self, n: int, ids: Tensor) -> Tensor:
        """Embed one row.   ids (...) -> (..., D)"""
        narrow = F.embedding(ids.clamp(min=0) + self.offsets[n], self.weight).flatten(0, -2)[None]      # -> (1, N, R)
        return self.out(narrow, slice(n, n + 1)).view(*ids.shape, -1) * (ids >= 0).unsqueeze(-1)

    def forward(self, ids: Tensor) -> Tensor:
        total = self.row(0, ids[:, 0])
        for n in range(1, len(self.offsets)):
            total = total + self.row(n, ids[:, n])
        return total


class TextEmbedding(nn.Module):
    """A text table of width `inner` behind two Linears with biases.   ids (B, 1, S) -> (B, S, D)"""

    def __init__(self, vocab: int, inner: int, dim: int, linear: Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, inner))
        self.up, self.down = linear(inner, inner, True), linear(inner, dim, True)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids[:, 0]
        return self.down(F.silu(self.up(F.embedding(ids.clamp(min=0), self.weight)))) * (ids >= 0).unsqueeze(-1)


def input_embeddings(c: ModelConfig, embedding: Callable[..., nn.Module], linear: Linear) -> nn.ModuleDict:
    """The embeddings of a model's rows: of text and audio, and one for each condition. A fused model has its text in the tower."""
    streams, D = c.table.streams, c.temporal.dim
    rows = {"text": [] if c.fusion else c.table.text, "audio": c.table.audio}
    vocabularies = {kind: [streams[i].vocab for i in found] for kind, found in rows.items() if found}
    embed = nn.ModuleDict({kind: embedding(sizes, D) for kind, sizes in vocabularies.items()})
    if c.demux:
        embed["text"] = ProjectedEmbedding(vocabularies["text"], D, D, linear, shared=True)
    if c.text_width:
        embed["text"] = TextEmbedding(vocabularies["text"][0], c.text_width, D, linear)
    for s in (streams[i] for i in c.table.conditions):
        embed[f"condition_{s.name}"] = ConditionEmbedding(s.vocab, s.rank, D, linear)
    return embed


class ConditionEmbedding(nn.Module):
    """A choice among `vocab - 1` values; the last id is no choice.   ids (B, S) -> (B, S, D)"""

    def __init__(self, vocab: int, rank: int, dim: int, linear: Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, rank))
        self.out = linear(rank, dim)
        self.none = nn.Parameter(torch.empty(1, dim))

    def forward(self, ids: Tensor) -> Tensor:
        chosen = self.out(F.embedding(ids.clamp(min=0), self.weight))
        return torch.where((ids == len(self.weight) - 1)[..., None], self.none, chosen) * (ids >= 0).unsqueeze(-1)


class VoiceConditioner(nn.Module):
    """Project voice features (B, n, F), plus positions if `scale`.   known (B, n) bool; unknown ones are a learned vector -> (B, n, D)"""

    def __init__(self, width: int, dim: int, linear: Linear, scale: float = 0.0) -> None:
        super().__init__()
        self.out, self.none, self.scale = linear(width, dim), nn.Parameter(torch.empty(1, dim)), scale

    def unknown_voice(self, batch: int) -> Tensor:
        """Features for items without a voice.   -> (B, 1, D)"""
        nothing = self.out.weight.new_zeros(batch, 1, self.out.weight.shape[1])
        return self(nothing, torch.zeros(batch, 1, dtype=torch.bool, device=nothing.device))

    def forward(self, features: Tensor, known: Tensor) -> Tensor:
        x = torch.where(known[..., None], self.out(features.to(self.none.dtype)), self.none)
        half = x.shape[2] // 2
        waves = 10000.0 ** -(torch.arange(half, device=x.device) / (half - 1))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * waves
        return x + self.scale * torch.cat([angles.cos(), angles.sin()], -1).to(x) if self.scale else x


class VoiceAttention(nn.Module):
    """Cross-attention of a block to the voice features.   x (B, S, D), voice (B, n, D) -> (B, S, D)

    Its Linears take no adapter, as in the package.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.o = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, voice: Tensor) -> Tensor:
        wq, wkv = self.qkv.weight.tensor_split([x.shape[-1]])
        q, k, v = F.linear(self.norm(x), wq), *F.linear(voice, wkv).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))         # -> (B, H, S or n, head)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def condition_id(stream: Any, value: str) -> int:
    """The id of a value: its index in the row's `values`, or a hash if the row has none. "" = no choice; ValueError if unknown."""
    if not value:
        return stream.vocab - 1
    if not stream.values:
        return int(hashlib.sha256(value.encode()).hexdigest(), 16) % (stream.vocab - 1)
    if value not in stream.values:
        raise ValueError(f"condition {stream.name} is {value!r}; choose one of {', '.join(stream.values)}, or leave it empty")
    return stream.values.index(value)


def chosen(text: str) -> dict[str, str]:
    """Names and values of "name=value,name=value"."""
    return dict(part.partition("=")[::2] for part in text.split(",") if part)


def condition_column(table: StreamTable, text: str) -> Tensor:
    """Ids of the condition rows from "name=value,name=value"; unnamed ones are not chosen.   -> (C, 1)"""
    return torch.tensor(condition_ids(table, chosen(text)), dtype=torch.long)[:, None]


def with_conditions(prompt: Tensor, table: StreamTable, text: str) -> Tensor:
    """A prompt (..., K, S) under the conditions of a text, if it names some."""
    if text and not table.ids:                      # of a table with names of ids the layout writes them into the prompt
        prompt, rows = prompt.clone(), table.conditions
        ids = condition_column(table, text).to(prompt.device)
        prompt[..., rows, :] = torch.where(prompt[..., rows, :] >= 0, ids, -1)
    return prompt


def condition_ids(table: StreamTable, pairs: dict[str, str]) -> list[int]:
    """Ids of the condition rows from names and values."""
    known = [table.streams[k] for k in table.conditions]
    for name in pairs.keys() - {s.name for s in known}:
        raise ValueError(f"condition {name!r} is unknown; this model has {', '.join(s.name for s in known) or 'none'}")
    return [condition_id(s, pairs.get(s.name) or "") for s in known]
