"""Data: cached examples -> packed batches, and the commands that prepare and show them.

    python data.py check FOLDER [--write DIR]          report what a source holds, which rows cannot be used, and how to correct them
                         [--doubtful=drop]         leave out recordings that may be faulty (silence, clipping, noise, copies) as well
                         [--tokenizer=T]           also report how well a tokenizer covers its texts (text/coverage.py)
    python data.py prepare configs/X.py [--data.x=y]   encode the clips that are not in the cache yet; training never runs a codec
                         [--shard i/n]             encode one of n parts, i from 0 (jobs on n machines); behind them prepare alone
    python data.py show configs/X.py [--index 0]       print one example as the model sees it
    python data.py fix-alignments FOLDER --out=DIR     copy alignments without the words that last too long
    python data.py transcribe FOLDER                   words for recordings that have none, a check of those that have, by Whisper
    python data.py annotate FOLDER [--shard i/n]       transcribe stereo dialogues with word times, by Whisper; --help lists options
    python data.py calls FOLDER --out=DIR              cut phone calls into turns and conversations
    python data.py personal FILE                       recall and precision of the masks of personal data, on labelled lines

A source is a manifest (its fields are described in corpus/manifest.py) or any layout that corpus/ converts. `show` prints
an example, here two clips joined by a compose rule; `*` marks a target:

    digits+0/500  train  'eight five'
    word          -1    106    106    106    106    120 ...     the current word, repeated for as long as it lasts
    advance       -1      1      0*     0*     0*     1* ...    1 where a word begins
    cb1          256    256    256    195*   146*   189* ...    delayed by 2 frames against the text, cb2 by 3, ...

`Loader` samples examples, lays them out with streams.py and packs them into rows. All randomness derives from (seed, number
of the sample), so its whole state is a few counters, and all ranks read slices of one global sequence. Next: train.py.
"""

import system.setup_check  # noqa: F401, first: it says how to set up where torch is missing

import random
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corpus import annotate, manifest, phone_calls
from corpus.annotate import fix_alignments
from corpus.cache import SPLITS
from corpus.data_config import DataConfig, source_weight
from corpus.examples import build_example, show
from corpus.index import load_run, open_cache, prepare_command
from families.family import lay_out
from options import edge, help_text, unknown, visible
from streams import Grid, StreamTable
from system.prefetch import prefetch
from text import personal

# ---- packing ----

@dataclass
class Batch:
    """Packed rows, padded to the longest one rounded up to 8 columns."""

    tokens: Tensor              # (B, K, S) int64, -1 = nothing here
    weights: Tensor             # (B, K, S) float32, 0 = not a target
    positions: Tensor           # (B, S) int64, restarts at 0 in every example
    segments: Tensor            # (B, S) int64, number of the example in its row, -1 = padding
    names: list[list[str]]      # ids of the examples in each row
    state: dict[str, Any]       # `Loader.restore(state)` continues after this batch
    speakers: Tensor            # (B, S) int64, a number for each voice, -1 = unknown; only the contrastive loss reads it


def pack(lengths: Sequence[int], columns: int) -> list[list[int]]:
    """First-fit decreasing: rows of example numbers whose lengths sum to at most `columns`; longer examples are left out."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > columns:
            continue
        place = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(columns)
        rows[place].append(i)
        room[place] -= lengths[i]
    return rows


Packed = list[tuple[str, Grid, int]]     # one row: (id, grid, number of the speaker) of its examples


def collate(rows: Sequence[Packed], state: dict[str, Any]) -> Batch:
    """Collate packed rows into one padded batch."""
    B, K = len(rows), rows[0][0][1][0].shape[0]
    S = -(-max(1, *(sum(tokens.shape[1] for _, (tokens, _), _ in row) for row in rows)) // 8) * 8
    batch = Batch(torch.full((B, K, S), -1), torch.zeros(B, K, S), torch.zeros(B, S, dtype=torch.long),
                  torch.full((B, S), -1), [[name for name, *_ in row] for row in rows], state, torch.full((B, S), -1))
    for b, row in enumerate(rows):
        _, grids, speakers = zip(*row, strict=True)
        tokens, weights = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
        lengths = torch.tensor([grid.shape[1] for grid, _ in grids])
        number = torch.arange(len(row)).repeat_interleave(lengths)              # (used columns,) of the example in the row
        used = len(number)
        batch.tokens[b, :, :used], batch.weights[b, :, :used], batch.segments[b, :used] = tokens, weights, number
        batch.positions[b, :used] = torch.arange(used) - (lengths.cumsum(0) - lengths)[number]
        batch.speakers[b, :used] = torch.tensor(speakers)[number]
    return batch


# ---- loading ----

Drawn = tuple[int, random.Random | None, int]     # entry, its generator, entry of its reference


class Loader:
    """The batches of this rank. Training data is endless; held-out data is one pass, in order, and can be iterated again.

    The seed fixes one global sequence of packed rows. Each iteration takes the next `world * batch_size` rows, and this
    rank keeps its slice, so micro-batch i of rank r is number i * world + r: every split of a step into ranks and
    accumulation reads the same rows. Rows that are not full at the end of a window are emitted and not carried over, so the
    state is the start of the window and the number of its rows already read. With fewer held-out rows than ranks some
    ranks get no held-out batch. Held-out examples use the first variant of a clip and no randomly chosen reference.

    With `passes` > 0, a window never crosses the end of a pass, and training ends after that many passes; with a single
    source every example is read exactly once in each pass. The last step is filled up with empty rows; `steps` counts it.

    With `pairs`, an example is a chosen reply followed in the same row by the rejected one, built with the same random
    numbers. Without it, rows that have both are read as their chosen side.
    """

    def __init__(self, config: DataConfig, table: StreamTable, split: str = "train", batch_size: int = 1, rank: int = 0,
                 world: int = 1, accum: int = 1, passes: int = 0, pairs: bool = False) -> None:
        assert 0 <= rank < world and batch_size > 0 and accum > 0 and split in ("train", "held-out")
        if config.stream_weights and len(config.stream_weights) != len(table):
            raise ValueError(f"data.stream_weights has {len(config.stream_weights)} values, the grid {len(table)} rows; give one each")
        self.config, self.table, self.split = config, table, split
        self.batch_size, self.rank, self.world, self.accum, self.passes, self.pairs = batch_size, rank, world, accum, passes, pairs
        self.factors = torch.tensor(config.stream_weights or [1.0] * len(table))[:, None]
        self.index = open_cache(config, table)
        heads, mine = self.index.heads, self.index.heads["split"] == SPLITS.index(split)
        self.sources = [array("i", np.flatnonzero(mine & (heads["source"] == n)).tolist()) for n in range(len(config.sources))]
        self.speakers: dict[str, array] = {}                                    # entries with a clip of their own, by speaker
        for n in np.flatnonzero(mine & (heads["speaker"] > 0)).tolist():
            self.speakers.setdefault(self.index.speakers[heads["speaker"][n]], array("i")).append(n)
        lone = [self.index.entries[n].id for own in self.sources for n in own if pairs and self.index.entries[n].rejected < 0]
        if lone:
            raise ValueError(f'{len(lone)} examples have no rejected reply ({lone[0]}); give all "chosen" and "rejected", or no dpo')
        self.shares = [source_weight(s)[1] * bool(own) for s, own in zip(config.sources, self.sources, strict=True)]
        self.epoch = sum(len(own) for own, share in zip(self.sources, self.shares, strict=True) if share)      # draws of a pass
        self.orders: dict[int, tuple[int, Sequence[int]]] = {}
        self.left_out: set[str] = set()                                         # ids longer than `columns`
        self.state: dict[str, Any] = {"draw": 0, "counts": [0] * len(self.sources), "row": 0}
        if split == "train" and not sum(self.shares):
            raise ValueError(f"no training example in {', '.join(config.sources)}; lower data.held_out or add data")

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the batch that carried `state`; the states of all ranks at one step are equal."""
        if len(state["counts"]) != len(self.sources):
            found = f"the saved position has {len(state['counts'])} sources, data.sources has {len(self.sources)}"
            raise ValueError(f"{found}; resume with the same sources or start a new run")
        self.state = state

    def __iter__(self) -> Iterator[Batch]:
        batches = self.training() if self.split == "train" else self.held_out()
        for batch in prefetch(batches, self.config.prefetch) if self.config.prefetch else batches:
            self.state = batch.state
            yield batch

    def training(self) -> Iterator[Batch]:
        rows, state = self.rows(self.state), self.state
        for n in count():
            taken = list(islice(rows, self.world * self.batch_size))
            if not taken and n % self.accum == 0:
                return
            mine = taken[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            state = taken[-1][1] if taken else state
            yield collate([row for row, _ in mine] or [self.nothing()], state)

    def steps(self) -> int:
        """Number of optimizer steps in all passes. Packing depends on every length, so this lays out each example once a pass."""
        rows = sum(1 for _ in self.rows({"draw": 0, "counts": [0] * len(self.sources), "row": 0}))
        return -(-rows // (self.world * self.batch_size * self.accum))

    def nothing(self) -> Packed:
        """A row without examples."""
        return [("", (torch.empty(len(self.table), 0, dtype=torch.long), torch.empty(len(self.table), 0)), -1)]

    def held_out(self) -> Iterator[Batch]:
        entries = ((n, None, -1) for own in self.sources for n in own)
        rows: list[Packed] = []
        while window := list(islice(entries, self.config.window)):
            rows += self.packed(window)
        rows = rows[self.rank :: self.world]
        for i in range(0, len(rows), self.batch_size):
            yield collate(rows[i : i + self.batch_size], self.state)

    def rows(self, state: dict[str, Any]) -> Iterator[tuple[Packed, dict[str, Any]]]:
        """The global sequence of rows that follows `state`, each with the state after it; endless without `passes`."""
        barren = 0
        while not self.passes or state["draw"] < self.passes * self.epoch:
            window, after = self.window(state)
            rows = self.packed(window)
            random.Random(f"{self.config.seed}/rows/{state['draw']}").shuffle(rows)     # packing sorts by length
            barren = 0 if rows else barren + len(window)
            if barren > 4 * len(self.index.entries):
                raise ValueError(f"no example fits data.columns={self.config.columns}; raise it or cut the clips")
            for r in range(state["row"], len(rows)):
                yield rows[r], after if r + 1 == len(rows) else state | {"row": r + 1}
            state = after

    def window(self, state: dict[str, Any]) -> tuple[list[Drawn], dict[str, Any]]:
        """Sample the next examples; also returns the state after them."""
        counts, end = list(state["counts"]), state["draw"] + self.config.window
        if self.passes:
            end = min(end, (state["draw"] // self.epoch + 1) * self.epoch)
        drawn: list[Drawn] = []
        for n in range(state["draw"], end):
            draw = random.Random(f"{self.config.seed}/{n}")
            source = draw.choices(range(len(counts)), self.shares)[0]
            turn, place = divmod(counts[source], len(self.sources[source]))
            number = self.order(source, turn)[place]
            counts[source] += 1
            drawn.append((number, draw, self.reference(number, draw)))
        return drawn, {"draw": end, "counts": counts, "row": 0}

    def order(self, source: int, turn: int) -> Sequence[int]:
        """The shuffled entries of a source in its pass number `turn`; the newest order of each source is cached."""
        if self.orders.get(source, (-1, []))[0] != turn:
            order = self.sources[source][:]
            random.Random(f"{self.config.seed}/{source}/{turn}").shuffle(order)
            self.orders[source] = turn, order
        return self.orders[source][1]

    def reference(self, number: int, draw: random.Random) -> int:
        """With probability `data.reference`, another clip of the same speaker; never the example itself or a part of it. -1 = none."""
        entry = self.index.entries[number]
        others = self.speakers.get(entry.speaker, [])
        use_reference = draw.random() < self.config.reference and len(others) > 1 + len(entry.parts)
        for _ in range(8 if use_reference else 0):             # a long dialogue may hold most clips of its speaker
            other = draw.choice(others)
            if other != number and other not in entry.parts:
                return other
        return -1

    def packed(self, drawn: list[Drawn]) -> list[Packed]:
        """Lay out examples and pack them. The ids of examples longer than a row go to `left_out`; the first three are printed."""
        units = [self.unit(*one) for one in drawn]
        lengths = [sum(tokens.shape[1] for _, (tokens, _), _ in unit) for unit in units]
        for length, (name, *_) in zip(lengths, (unit[0] for unit in units), strict=True):
            if length > self.config.columns and name not in self.left_out:
                self.left_out.add(name)
                if len(self.left_out) <= 3:             # the others are only counted
                    print(f"left out: {visible(name)} has {length} columns; raise data.columns={self.config.columns}", file=sys.stderr)
        return [[grid for i in row for grid in units[i]] for row in pack(lengths, self.config.columns)]

    def unit(self, number: int, draw: random.Random | None, reference: int) -> Packed:
        """The grid of an example; for a pair the grids of both sides, which differ only in the reply."""
        entry, state = self.index.entries[number], draw.getstate() if draw and self.pairs else None
        grids: Packed = []
        for side in (number, entry.rejected) if self.pairs else (number,):
            if state:
                draw.setstate(state)
            tokens, weights = lay_out(build_example(self.index, side, self.table, draw, reference), self.table)
            grids.append((entry.id, (tokens, weights * self.factors), zlib.crc32(entry.speaker.encode()) if entry.speaker else -1))
        return grids


# ---- command line ----

def show_command(argv: list[str]) -> None:
    config, number = load_run(argv, "index")
    index, table = open_cache(config.data, config.model.table), config.model.table
    shown, number = [n for n, entry in enumerate(index.entries) if entry.split], number or "0"
    if not number.isdecimal() or int(number) >= len(shown):
        raise ValueError(f"--index {number} does not exist; the data has examples 0..{len(shown) - 1}")
    entry = index.entries[shown[int(number)]]
    print(*index.verdict, f"{visible(entry.id)}  {entry.split}  {entry.text!r}", sep="\n")
    print(show(*lay_out(build_example(index, shown[int(number)], table), table), table))


COMMANDS = {"annotate": annotate.main, "transcribe": annotate.transcribe_command, "fix-alignments": fix_alignments,
            "calls": phone_calls.main, "personal": personal.main, "prepare": prepare_command}


def main(argv: list[str] | None = None) -> None:
    command, *rest = argv if argv is not None else sys.argv[1:] or ["--help"]
    if command in ("--help", "-h", "help") or (command in ("check", "prepare", "show") and rest in ([], ["--help"])):
        print(__doc__, manifest.__doc__, sep="\n")
        print("Fields of DataConfig (--data.NAME=VALUE):\n", help_text(DataConfig(), ""), sep="")
    elif command == "check":
        annotate.check_command(rest)
    elif command == "show":
        show_command(rest)
    elif command in COMMANDS:
        COMMANDS[command](rest)
    else:
        raise ValueError(unknown(command, ["check", "show", *COMMANDS], "command") + " (python data.py --help)")


if __name__ == "__main__":
    edge(main)
