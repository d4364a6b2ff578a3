"""Small tables, configs and examples that the tests share."""

from dataclasses import replace

import torch

from families.family import lay_out
from layers.architecture import ModelConfig, StackConfig
from streams import Example, Stream, StreamTable, codebooks

CODES, START, END = 16, 16, 17                # codes 0..15, then the start and end ids
STACK = StackConfig(dim=24, layers=3, heads=3, kv_heads=1, head_dim=6, ffn=40)
DEPTH = StackConfig(dim=16, layers=2, heads=2, ffn=20, rope_theta=0.0, steps=3)


def clone_table(Q: int) -> StreamTable:
    return StreamTable((Stream("text", "text", 40, 40), *codebooks(Q, 18, 18, START, END, range(Q))), "clone",
                       audio_start=30, audio_end=31, stop=(31,))


def aligned_table(Q: int) -> StreamTable:
    return StreamTable((*(Stream(n, "text", 40) for n in ("word", "next", "previous")), Stream("age", "text", 64),
                        Stream("advance", "text", 2, 2), *codebooks(Q, 18, 18, START, END, range(2, 2 + Q))), "words", aligned=True)


def duplex_table() -> StreamTable:
    """Moshi in small: one text row, three codebooks of the agent, two of the user that are only read."""
    return StreamTable((Stream("text", "text", 41, 40, start=40), *codebooks(3, 17, 16, 16, delays=(0, 1, 1)),
                        *codebooks(2, 17, 0, 16, delays=(0, 1), name="user")), "duplex", aligned=True)


CONFIGS = {
    "clone": ModelConfig(clone_table(3), STACK),
    "mha": ModelConfig(clone_table(3), replace(STACK, kv_heads=0, gated=False, activation="gelu", rope_interleaved=True)),
    "qwen": ModelConfig(clone_table(3), replace(STACK, qkv_bias=True, qk_norm=True, rope_theta=1e6)),
    "window": ModelConfig(clone_table(3), replace(STACK, window=5)),
    "llama3": ModelConfig(clone_table(3), replace(STACK, rope_scaling=(8.0, 1.0, 4.0, 16.0))),
    "dual": ModelConfig(clone_table(3), STACK, dual_ffn=(0, 1, 2)),
    "dual_list": ModelConfig(clone_table(3), STACK, dual_ffn=(1,)),
    "fast_forward": ModelConfig(clone_table(3), STACK, dual_ffn=(0, 2), fast_forward=True),
    "tails": ModelConfig(clone_table(3), STACK, tail=2),
    "depth": ModelConfig(clone_table(3), replace(STACK, packed=True), depth=replace(DEPTH, packed=True)),
    "depth_schedule": ModelConfig(clone_table(3), STACK, depth=replace(DEPTH, schedule=(0, 1, 1))),
    "duplex": ModelConfig(duplex_table(), replace(STACK, rope_interleaved=True, window=6), depth=DEPTH),
    "words": ModelConfig(aligned_table(3), STACK),
    "text": ModelConfig(StreamTable((Stream("text", "text", 40, 40),), "text", stop=(0,)), STACK, tied=True),
}


def random_ids(high: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def sequential_example(table: StreamTable, seed: int) -> Example:
    Q, n = len(table.audio), 3 + seed % 4
    reference = Example(random_ids(30, (4,), seed + 1), random_ids(CODES, (Q, 2 + seed % 3), seed + 2))
    return Example(random_ids(30, (n,), seed + 3), random_ids(CODES, (Q, 3 + seed % 5), seed + 4), reference=reference)


def example(table: StreamTable, seed: int) -> Example:
    """An example for any table of this file."""
    if table.layout == "clone":
        return sequential_example(table, seed)
    n, T = 1 + seed % 4, 9 + seed % 6
    if table.layout == "text":
        return Example(random_ids(39, (T,), seed) + 1)
    later = torch.randperm(T - 1, generator=torch.Generator().manual_seed(seed))[: n - 1] + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.long), later])
    return Example(random_ids(38, (n,), seed + 1) + 1, random_ids(CODES, (len(table.audio), T), seed + 2), starts.sort().values)


def grid(config: ModelConfig, seed: int = 0, columns: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weights (1, K, S) for any config of this file; the duplex grid is random."""
    table = config.table
    if table.audio_out and not all(s.classes for s in table.streams if s.kind == "audio"):
        S = columns or 14
        tokens = torch.stack([random_ids(s.classes or s.vocab, (S,), seed + k) for k, s in enumerate(table.streams)])
        weights = torch.stack([torch.full((S,), float(s.classes > 0)) for s in table.streams])
        weights[:, 0] = 0
        return tokens[None], weights[None]
    tokens, weights = lay_out(example(table, seed), table)
    return tokens[None], weights[None]
