"""Generation on CUDA: one decode step is one CUDA graph, captured once and replayed for every column.

    known (B, K) -> [ sample the column -> does it begin or end audio or text? -> read it ] -> column (B, K), stalled

The required ids of a column (start ids, end ids, text or audio) are decided on the host by turns.py. They are known one
column ahead, unless a sampled id begins or ends something. So the host launches the next column before it has read this
one, and the device never idles. The graph itself detects such an id and sets `stalled`: launches then change no state until
the host has decided, has corrected the column and launches it again. States, cache position, seeds and counters are on the
device; one graph is captured for each kind of column.

Buffers and graphs stay with the model and are reused for the next prompt of the same size class: batches are padded to a
power of two with copies of their first item. Used by sample.py.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from generation.decode_step import ColumnKind, DecodeStep, EagerRunner, Feed, SampleConfig, column_kind
from generation.turns import FREE, DecodeState, predicted_state, required_ids, with_endings
from kernels.choice import device_constant, power_of_2
from model import MultistreamLM

ROOM, SLOTS = 256, 4        # columns are allocated in multiples of ROOM; launches whose results the host may still read


class Slot(NamedTuple):
    """Pinned memory of one launch: its input and its result."""

    known: Tensor               # (B, K)
    result: Tensor              # (B, K + 1): the column, and whether the device has stalled
    done: Any                   # torch.cuda.Event recorded after the copies; None on a CPU


class Launch(NamedTuple):
    slot: Slot
    known: Tensor               # (B, K) the required ids, on the host
    after: DecodeState          # the state after it, if it does not stall


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Capture the kernels of a step; calling the result replays them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class GraphRunner:
    """Runs a `DecodeStep` through CUDA graphs. Same interface as `EagerRunner`: one call for each column."""

    def __init__(self, decode_step: DecodeStep) -> None:
        self.decode_step, cache = decode_step, decode_step.cache
        (B, _), K, device = decode_step.position.shape, len(decode_step.table), decode_step.position.device
        if cache.rope is not None and decode_step.model.config.temporal.rope_theta:
            cache.rope.extend(decode_step.columns + SLOTS)
        self.known = torch.full((B, K), FREE, device=device)
        self.result = torch.zeros(B, K + 1, dtype=torch.int64, device=device)
        self.stalled = torch.zeros((), dtype=torch.bool, device=device)
        self.real = torch.ones(B, 1, dtype=torch.bool, device=device)         # False for items that only pad the batch
        self.kept = [t.clone() for t in self.fresh()]
        cuda = device.type == "cuda"
        self.slots = [Slot(torch.empty(B, K, dtype=torch.int64, pin_memory=cuda), torch.empty(B, K + 1, dtype=torch.int64, pin_memory=cuda),
                           torch.cuda.Event() if cuda else None) for _ in range(SLOTS)]
        self.graphs: dict[ColumnKind, Callable[[], None] | None] = {}
        self.count, self.ahead = 0, deque()

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a model captures graphs of its own."""

    def fresh(self) -> list[Tensor]:
        """The state of the decode step after the prefill: states, position, recent codes; columns and padding of the cache (2, B')."""
        decode_step = self.decode_step
        padding = decode_step.guide.twice(decode_step.padding)
        recent = [] if decode_step.recent is None else [decode_step.recent]
        return [*decode_step.h, decode_step.position, *recent, torch.stack([torch.full_like(padding, decode_step.cache.count), padding])]

    def begin(self, items: int, feed: Feed | None = None) -> "GraphRunner":
        """Start after a prefill; the first `items` of the batch are real, and `feed` supplies input that it knows ahead of time."""
        decode_step, self.items, self.feed, self.made = self.decode_step, items, feed, 0
        for kept, t in zip(self.kept, self.fresh(), strict=True):
            kept.copy_(t)
        *decode_step.h, decode_step.position = self.kept[:3]
        decode_step.recent = None if decode_step.recent is None else self.kept[3]
        decode_step.cache.counter, decode_step.cache.padding = self.kept[-1]
        self.stalled.fill_(False)
        self.real[:, 0] = torch.arange(len(self.real)) < items
        self.ahead.clear()
        return self

    # ---- the device's side ----

    def step(self, kind: ColumnKind) -> None:
        """Sample a column and read it; all states are updated in place."""
        decode_step, before = self.decode_step, [t.clone() for t in getattr(self.decode_step.feed, "state", ())]
        column = decode_step.draw(self.known, kind)
        self.stalled.logical_or_(self.turning(column))
        moves = ~self.stalled
        for t, old in zip(getattr(decode_step.feed, "state", ()), before, strict=True):
            t.copy_(torch.where(moves, t, old))
        self.result[:, :-1].copy_(column)
        self.result[:, -1].copy_(self.stalled.expand(len(column)))
        decode_step.read(column, kind, moves)
        decode_step.cache.counter.add_(moves)

    def turning(self, column: Tensor) -> Tensor:
        """Whether a sampled id begins or ends audio or the generation.   column (B, K) -> () bool"""
        decode_step, table = self.decode_step, self.decode_step.table
        special = column.new_zeros((), dtype=torch.bool)
        if table.audio_out and decode_step.end >= 0:
            ends = device_constant(tuple(table.streams[k].end for k in table.audio_out), column.device)
            drawn = (column[:, table.spoken] == ends) & (self.known[:, table.spoken] == FREE) & self.real
            special = special | (drawn.all(1) if table.joint_end else drawn).any()
        if table.text_out and not table.aligned:
            row, ids = table.text_out[0], tuple(id for id in (*table.stop, table.audio_start) if id >= 0)
            drawn = torch.where(self.known[:, row] == FREE, column[:, row], -1)
            special = special | ((drawn[:, None] == device_constant(ids, column.device)) & self.real).any()
        return special

    # ---- the host's side ----

    def __call__(self, state: DecodeState, given: Tensor | None) -> Tensor:
        """The next column (B, K), on the host."""
        if not self.ahead:
            self.launch(state, required_ids(state, given)[0], column_kind(state, given is not None))
        if given is None and len(self.ahead) < 2:
            behind = self.ahead[-1].after
            if not all(turn.done for turn in behind.turns):
                self.launch(behind, required_ids(behind)[0], column_kind(behind))
        this = self.ahead.popleft()
        column, stalled = self.wait(this.slot)
        column = with_endings(state, column, given)
        if stalled:
            self.decide(state, column, column_kind(state, given is not None))
        self.made += 1
        return column

    def launch(self, state: DecodeState, known: Tensor, kind: ColumnKind) -> None:
        """Queue a column on the device."""
        slot, recent = self.slots[self.count % SLOTS], self.feed and self.feed.ahead(self.made + len(self.ahead))
        self.count += 1
        if recent is not None:
            known = known.clone()
            known[:, self.feed.place] = torch.where(known[:, self.feed.place] == FREE, recent, known[:, self.feed.place])
        slot.known.copy_(self.filled(known))
        self.known.copy_(slot.known, non_blocking=True)
        if kind not in self.graphs:                  # the first column of a kind runs eagerly: libraries set up workspaces in it
            self.graphs[kind] = None
            self.step(kind)
        else:
            self.graphs[kind] = self.graphs[kind] or capture(lambda: self.step(kind))
            self.graphs[kind]()
        slot.result.copy_(self.result, non_blocking=True)
        if slot.done is not None:
            slot.done.record()
        self.ahead.append(Launch(slot, known, predicted_state(state, known)))

    def wait(self, slot: Slot) -> tuple[Tensor, bool]:
        """The column of a launch, and whether the device has stalled in it."""
        if slot.done is not None:
            slot.done.synchronize()
        result = slot.result[: self.items]
        return result[:, :-1].clone(), bool(result[0, -1])

    def decide(self, state: DecodeState, column: Tensor, kind: ColumnKind) -> None:
        """After a stall: launch the corrected column again."""
        self.ahead.clear()
        self.stalled.fill_(False)
        self.launch(state, column, kind)
        self.ahead.clear()                           # its ids are all given; the next column is known only after `finish`

    def filled(self, rows: Tensor) -> Tensor:
        """Rows of the real items, and copies of the first for the rest of the batch."""
        spare = len(self.known) - len(rows)
        return rows if not spare else torch.cat([rows, rows[:1].expand(spare, *rows.shape[1:])])


# ---- graphs or eager ----

def why_not(model: MultistreamLM, device: torch.device, feed: Feed | None) -> str:
    """Why CUDA graphs cannot be used; "" if they can."""
    if device.type != "cuda":
        return "the model is not on a CUDA device"
    if model.tower is not None:
        return "the model has a text tower, which runs outside the graph"
    if feed is not None and not hasattr(feed, "state") and not hasattr(feed, "ahead"):
        return "its input feed is neither on the device nor known ahead of time"
    if not model.temporal.has_fast_decode():
        return "the fast decode path does not support its blocks; merge the adapters (lora.merge) and keep all weights in one dtype"
    return ""


def start_runner(model: MultistreamLM, prompt: Tensor, config: SampleConfig, feed: Feed | None = None,
          voice: Tensor | None = None, inputs: Tensor | None = None) -> EagerRunner | GraphRunner:
    """What runs a generation behind a prompt (B, K, S): graphs, those of the last one where they fit, or an `EagerRunner`."""
    B, _, S = prompt.shape
    reason = why_not(model, prompt.device, feed) if config.graphs != "off" else "off"
    if config.graphs == "on" and reason:
        raise ValueError(f"graphs=on: {reason}; use graphs=auto to generate without them")
    if reason:
        return EagerRunner(DecodeStep(model, prompt, config, S + config.max_frames, feed, voice, inputs))
    ahead, feed = (feed, None) if hasattr(feed, "ahead") else (None, feed)       # fed column by column, or captured
    columns = -(-(S + config.max_frames) // ROOM) * ROOM
    plain = SampleConfig(**{f.name: getattr(config, f.name) for f in fields(SampleConfig)})
    batch = B if feed is not None else power_of_2(B)
    size = batch, columns, prompt.device, replace(plain, seed=0, max_frames=1, max_speech=0)
    filled = torch.cat([prompt, prompt[:1].expand(batch - B, -1, -1)])
    inputs = None if inputs is None else torch.cat([inputs, inputs[:1].expand(batch - B, -1, -1)])
    key, kept = (size, weights_of(model)), model.__dict__.pop("replay", None)
    if feed is None and kept is not None and kept.key == key:
        kept.decode_step.again(filled, config.seed, inputs)
        return kept.begin(B, ahead)
    kept = None                                      # its memory first
    made = GraphRunner(DecodeStep(model, filled, config, columns, feed, voice, inputs))
    made.key = size, weights_of(model)               # the decode_step joins weights in memory
    return made.begin(B, ahead)


def keep_graphs(model: MultistreamLM, runner: EagerRunner | GraphRunner) -> None:
    """Keep graphs for the next prompt."""
    if isinstance(runner, GraphRunner) and runner.decode_step.feed is None:
        model.__dict__["replay"] = runner


def weights_of(model: MultistreamLM) -> int:
    """A hash of the weights' addresses, which captured graphs contain."""
    return hash(tuple((t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers())))
