"""Whose turn it is: where each item of a batch of generations stands between text and audio, column by column.

    text ... audio_start | start column, codes, end ids | audio_end, text ... stop

An audio segment closes when an end id was drawn. Codebook k trails the first by its delay, so what remains is settled
then; `closing` says how. K codebooks, codebook i drew its end id in column c:

    frame   codebook k holds it from column c + k - i on: the place where training put it
    boson   from column c + k - i + 1 on: boson-multimodal still draws the column before freely, and drops it in the end
    hf      from column c + k + 1 on, whichever i; over as soon as all rows of a column hold it (transformers)

A trained model draws those ids itself, and the three agree. Used by sample.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention import Cache
from streams import StreamTable, Undelay


@dataclass
class DecodeState:
    """Where each of B items stands. `count` is columns since its audio segment began, the start column being 0."""

    speaking: Tensor            # (B,) bool: the next column is an audio column
    count: Tensor               # (B,)
    closed: Tensor              # (B,) frame in which the audio ends, NEVER while it goes on
    done: Tensor                # (B,) bool
    owed: Tensor                # (B,) text id that must come next, -1 = none
    undelay: Undelay            # columns in, frames out; remembers the newest columns
    edges: Tensor               # (3, Q) start id, end id and delay of the predicted audio rows
    heard: Tensor               # (B, Q, n) the newest audio columns, those of the prompt included, for repetition-aware sampling
    closing: str                # how audio ends: "frame", "boson" or "hf"
    given: Tensor | None = None # (B, K) ids that the column being drawn must hold, FREE where it may hold any
    depth: Cache | None = None  # of the depth transformer, begun again in every column
    guide: Any = None           # guidance.Guidance: what the model reads twice
    given: Tensor | None = None # (B, K) what the next column must hold, FREE where the model draws


NEVER, FREE = 1 << 40, -2


def start_state(prompt: Tensor, table: StreamTable, window: int = 0, closing: str = "frame") -> DecodeState:
    """Read off the prompt (B, K, S) what comes next: text, the first audio column, or more of a segment."""
    B, _, S = prompt.shape
    audio = (prompt[:, table.audio] >= 0).any(1) if table.audio else torch.zeros(B, S, dtype=torch.bool, device=prompt.device)
    run = audio.flip(1).cumprod(1).sum(1)                                        # audio columns at the end of the prompt
    begins = (prompt[:, 0, -1] == table.audio_start) if table.audio_start >= 0 else torch.zeros_like(run, dtype=torch.bool)
    bare = bool(table.audio_out) and table.streams[table.audio_out[0]].start < 0  # no start column: frames begin at once
    count = torch.full_like(run, S) if table.aligned else run + int(bare)
    undelay = Undelay(table.delays, () if table.aligned else table.text)
    undelay.recent = [prompt[:, :, -1 - n] for n in range(min(S, undelay.kept))]
    edges = torch.cat([table.column(field, table.audio_out) for field in ("start", "end", "delay")], 1).T.to(prompt.device)
    none = torch.full((len(table.audio_out), window), -1, device=prompt.device)
    heard = [torch.cat([none, p[table.audio_out][:, a]], 1)[:, a.sum() :] for p, a in zip(prompt, audio, strict=True)]      # (Q, n) each
    state = DecodeState((run > 0) | begins | table.aligned, count, torch.full_like(run, NEVER), torch.zeros_like(begins),
                        torch.full_like(run, -1), undelay, edges, torch.stack(heard), closing)
    if table.audio_out:
        for b in range(B):                       # a prompt that ends inside a closing segment goes on closing
            for n in reversed(range(int(run[b]))):
                settle(state, prompt[:, :, S - 1 - n], count - 1 - n, table, torch.arange(B, device=run.device) == b)
    return state


def settle(state: DecodeState, column: Tensor, place: Tensor, table: StreamTable, where: Tensor) -> None:
    """Note an end id in an audio row: the lowest codebook that has one decides in which frame the audio ends.

    Under "hf" codebook k ends k + 1 columns later, whichever had it, or all in the first column where all have drawn it.
    """
    _, end, delay = state.edges
    codes = column[:, table.audio_out[0] : table.audio_out[-1] + 1]
    ends = where[:, None] & (end >= 0) & (codes == end) & (place[:, None] > delay)                              # (B, Q)
    found = place if state.closing == "hf" else place - 1 - delay[ends.int().argmax(1)]
    state.closed = torch.where((state.closed == NEVER) & ends.any(1), found, state.closed)
    if state.closing == "hf":
        state.closed = torch.where(ends.all(1), torch.minimum(state.closed, place - 1 - delay.max()), state.closed)


def forced(state: DecodeState, rows: Sequence[int]) -> Tensor:
    """What the predicted audio `rows` must hold: what is given, start ids before a row begins, end ids once the audio is closed.

    FREE elsewhere.   -> (B, Q)
    """
    start, end, delay = state.edges
    frame = state.count[:, None] - 1 - delay
    held = torch.where((frame < 0) & (start >= 0), start, FREE)
    closed = state.closed[:, None] + (state.closing == "boson")               # boson draws the end id of the other rows freely
    held = torch.where((frame >= closed) & (end >= 0), end, held)
    held = torch.where(state.speaking[:, None], held, -1)
    return held if state.given is None else torch.where(state.given[:, rows] == FREE, held, state.given[:, rows])


def finish(state: DecodeState, column: Tensor, table: StreamTable) -> None:
    """Move every item on: into audio after `audio_start`, out of it when all rows have ended, to the end after `stop`."""
    lag = max(table.delays)
    over = state.speaking & (state.count - 1 - lag >= state.closed)
    text = column[:, table.text_out[0]] if table.text_out else torch.full_like(state.count, -1)
    bare = bool(table.audio_out) and table.streams[table.audio_out[0]].start < 0
    state.owed = torch.where(over & (table.audio_end >= 0), table.audio_end, -1)
    state.count = state.count + 1
    if table.aligned:
        state.done = state.done | over
        return
    begins = ~state.speaking & (text == table.audio_start) & (table.audio_start >= 0)
    stops = torch.isin(text, torch.tensor(table.stop, dtype=text.dtype, device=text.device)) & ~state.speaking
    state.done = state.done | stops
    state.count = torch.where(begins, int(bare), state.count)
    state.closed = torch.where(begins, NEVER, state.closed)
    state.speaking = (state.speaking & ~over) | begins
