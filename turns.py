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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.attention import Cache
from streams import StreamTable, Undelay

NEVER, FREE = 1 << 40, -2


@dataclass
class Turn:
    """Where one item of the batch stands, in plain numbers: a few comparisons a column cost less here than as tensors."""

    speaking: bool              # the next column is an audio column
    count: int                  # columns since its audio segment began, the start column being 0
    closed: int = NEVER         # frame in which the audio ends, NEVER while it goes on
    done: bool = False
    owed: int = -1              # text id that must come next, -1 = none


@dataclass
class DecodeState:
    """What generation remembers from column to column."""

    table: StreamTable
    turns: list[Turn]
    undelay: Undelay                                # columns in, frames out; remembers the newest columns
    heard: Tensor                                   # (B, Q, n) the newest audio columns, for repetition-aware sampling
    closing: str                                    # how audio ends: "frame", "boson" or "hf"
    depth: Cache | None = None                      # of the depth transformer, begun again in every column
    guide: Any = None                               # guidance.Guidance: what the model reads twice
    limit: int = 0                                  # frames of speech that are closed then, 0 = when the model closes them
    given: Tensor | None = None                     # (B, K) ids that the column being drawn must hold, FREE where it may hold any
    edges: list[tuple[int, int, int]] = field(init=False)      # start id, end id and delay of the predicted audio rows
    ends: bool = field(init=False)                  # whether audio can end at all

    def __post_init__(self) -> None:
        self.edges = [(s.start, s.end, s.delay) for s in (self.table.streams[k] for k in self.table.audio_out)]
        self.ends = any(end >= 0 for _, end, _ in self.edges)
        self.bare = bool(self.edges) and self.edges[0][0] < 0          # no start column: frames begin at once
        self.begun = 1 + max((delay for _, _, delay in self.edges), default=0)      # count from which no start id is held


def start_state(prompt: Tensor, table: StreamTable, window: int = 0, closing: str = "frame") -> DecodeState:
    """Read off the prompt (B, K, S) what comes next: text, the first audio column, or more of a segment."""
    B, _, S = prompt.shape
    audio = (prompt[:, table.audio] >= 0).any(1) if table.audio else torch.zeros(B, S, dtype=torch.bool, device=prompt.device)
    run = audio.flip(1).cumprod(1).sum(1).tolist()                               # audio columns at the end of the prompt
    begins = [id == table.audio_start >= 0 for id in prompt[:, 0, -1].tolist()]
    undelay = Undelay(table.delays, () if table.aligned else table.text)
    for n in reversed(range(min(S, undelay.kept))):
        undelay.remember(prompt[:, :, -1 - n])
    none = torch.full((len(table.audio_out), window), -1, device=prompt.device)
    heard = [torch.cat([none, p[table.audio_out][:, a]], 1)[:, a.sum() :] for p, a in zip(prompt, audio, strict=True)]      # (Q, n) each
    state = DecodeState(table, [], undelay, torch.stack(heard), closing)
    for codes, n, begin in zip(prompt[:, table.audio_out].transpose(1, 2).tolist(), run, begins, strict=True):
        turn = Turn(n > 0 or begin or table.aligned, S if table.aligned else n + state.bare)
        state.turns.append(turn)
        for column in range(S - n, S) if state.ends else ():      # a prompt that ends inside a closing segment goes on closing
            settle_one(state, turn, codes[column], turn.count - S + column)
    return state


def settle_one(state: DecodeState, turn: Turn, codes: Sequence[int], place: int) -> bool:
    """Note an end id among the audio rows of a column: the lowest codebook that has one decides in which frame the audio ends.

    Under "hf" codebook k ends k + 1 columns later, whichever had it, or all in the first column where all have drawn it.
    -> whether that changed anything
    """
    before = turn.closed
    ended = [delay for code, (_, end, delay) in zip(codes, state.edges, strict=True) if code == end >= 0 and place > delay]
    if ended and turn.closed == NEVER:
        turn.closed = place if state.closing == "hf" else place - 1 - ended[0]
    if len(ended) == len(state.edges) and state.closing == "hf":
        turn.closed = min(turn.closed, place - state.begun)
    return turn.closed != before


def settle(state: DecodeState, codes: Tensor) -> bool:
    """`settle_one` of every item that speaks.   codes (B, Q)"""
    return any([turn.speaking and settle_one(state, turn, row, turn.count)
                for turn, row in zip(state.turns, codes.tolist(), strict=True)])


def held_rows(state: DecodeState, turn: Turn) -> list[int] | None:
    """What the predicted audio rows of one item must hold, FREE where they may hold any; None = all may."""
    if not turn.speaking:
        return [-1] * len(state.edges)
    if turn.closed == NEVER and turn.count >= state.begun:
        return None
    frame, closed = turn.count - 1, turn.closed + (state.closing == "boson")     # boson draws the end id of the other rows freely
    return [end if frame - delay >= closed and end >= 0 else start if frame < delay and start >= 0 else FREE
            for start, end, delay in state.edges]


def forced(state: DecodeState, rows: Sequence[int], device: torch.device) -> Tensor | None:
    """What the predicted audio `rows` must hold: what is given, start ids before a row begins, end ids once the audio is closed.

    FREE elsewhere; None when everything is free.   -> (B, Q)
    """
    held, free = [held_rows(state, turn) for turn in state.turns], [FREE] * len(rows)
    if state.given is None and not any(held):
        return None
    forced = torch.tensor([row or free for row in held], device=device)
    return forced if state.given is None else torch.where(state.given[:, rows] == FREE, forced, state.given[:, rows])


def finish(state: DecodeState, column: Tensor) -> None:
    """Move every item on: into audio after `audio_start`, out of it when all rows have ended, to the end after `stop`."""
    table, lag = state.table, state.undelay.lag
    text = [-1] * len(state.turns)
    if table.text_out and not table.aligned and not all(turn.speaking for turn in state.turns):
        text = column[:, table.text_out[0]].tolist()
    for turn, id in zip(state.turns, text, strict=True):
        over = turn.speaking and turn.count - 1 - lag >= turn.closed
        turn.owed = table.audio_end if over else -1
        turn.count += 1
        if table.aligned:
            turn.done = turn.done or over
            continue
        begins = not turn.speaking and id == table.audio_start >= 0
        turn.done = turn.done or (not turn.speaking and id in table.stop)
        if begins:
            turn.count, turn.closed = int(state.bare), NEVER
        turn.speaking = turn.speaking and not over or begins
        if state.ends and turn.speaking and turn.count > state.limit > 0:         # the next frame would be one too many
            turn.closed = min(turn.closed, state.limit)
