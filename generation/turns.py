"""Turn state: whether each item of a batch generates text or audio, and when its audio ends, column by column.

    text ... audio_start | start column, codes, end ids | audio_end, text ... stop

An audio segment ends when an end id is sampled. Codebook k is delayed against the first one, so its remaining columns are
filled by rule, a `Closing` of families/family.py. If codebook i samples its end id in column c, codebook k is forced to it

    frame     from column c + k - i on: where the training data has it
    grace 1   from column c + k - i + 1 on: the column before is still sampled freely
    by row    from column c + k + 1 on, for every i; the segment is over as soon as all rows of a column have it

A trained model samples those ids itself, and the three rules agree. Used by sample.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from families.family import FRAME, Closing
from streams import StreamTable, is_audio

NEVER, FREE = 1 << 40, -2


class Undelay:
    """Streaming `undelay`: push a column (B, K), get the newest frame (B, K) that is complete in every row.

    Rows in `at_once` are returned without delay. The first complete frame comes `lag` columns after the start column; what
    `push` returns before that (start ids, or copies of the oldest column) is to be ignored by the caller.
    """

    def __init__(self, delays: Sequence[int], at_once: Sequence[int] = ()) -> None:
        self.lag, self.room = max(delays), 256
        self.kept = self.lag + 1
        places = [self.lag if k in at_once else d for k, d in enumerate(delays)]             # of row k among the newest `kept`
        self.place, self.columns, self.next = torch.tensor(places)[None, None], None, 0      # columns (kept + room, B, K), oldest first

    def remember(self, column: Tensor) -> None:
        if self.columns is None:
            self.columns = column.new_empty(self.kept + self.room, *column.shape)
            self.columns[: self.lag], self.next = column, self.lag
            self.place = self.place.to(column.device).expand(1, *column.shape)
        if self.next == len(self.columns):
            self.columns[: self.lag], self.next = self.columns[self.next - self.lag :].clone(), self.lag
        self.columns[self.next] = column
        self.next += 1

    def push(self, column: Tensor) -> Tensor:
        self.remember(column)
        return self.columns[self.next - self.kept : self.next].gather(0, self.place)[0]

    def newest(self) -> Tensor:
        return self.columns[self.next - 1]


@dataclass
class ItemState:
    """The turn state of one item, in Python numbers: a few comparisons a column are cheaper here than as tensors."""

    speaking: bool              # the next column is an audio column
    count: int                  # columns since its audio segment began; the start column is 0
    closed: int = NEVER         # frame in which the audio ends, NEVER = no end id was sampled yet
    done: bool = False
    owed: int = -1              # text id required in the next column, -1 = none
    part: tuple[int, ...] = ()  # flat table: the codes of a frame that is not complete


@dataclass
class DecodeState:
    """The state of a generation between columns, on the host."""

    table: StreamTable
    turns: list[ItemState]
    undelay: Undelay                                # from columns to frames; keeps the newest columns
    conditions: list[list[int]]                     # ids of the condition rows, for each item
    closing: Closing                                # the rule by which audio ends
    limit: int = 0                                  # frames after which a speech segment is closed, 0 = only when the model ends it
    edges: list[tuple[int, int, int]] = field(init=False)      # start id, end id and delay of the predicted audio rows
    ends: bool = field(init=False)                  # whether audio can end at all
    last: tuple[Any, Any] = (None, None)            # cache of `required_ids`: its last inputs and its last result

    def __post_init__(self) -> None:
        self.edges = [(s.start, s.end, s.delay) for s in (self.table.streams[k] for k in self.table.audio_out)]
        self.ends = any(end >= 0 for _, end, _ in self.edges)
        self.bare = bool(self.edges) and (self.table.bare or self.edges[0][0] < 0)      # no start column: frames begin at once
        self.shift = max(0, self.table.timing.frames)                               # frames of text before the first of speech
        self.begun = 1 + max((delay for _, _, delay in self.edges), default=0) + self.shift     # count from which every row is drawn


def start_state(prompt: Tensor, table: StreamTable, closing: Closing = FRAME, limit: int = 0) -> DecodeState:
    """The state after a prompt (B, K, S): each item continues with text, with a first audio column, or inside an audio segment."""
    prompt = prompt.cpu()
    B, _, S = prompt.shape
    audio = is_audio(prompt, table)
    run = audio.flip(1).cumprod(1).sum(1).tolist()                               # audio columns at the end of the prompt
    begins = [id == table.audio_start >= 0 for id in prompt[:, 0, -1].tolist()]
    undelay = Undelay(table.delays, () if table.aligned else table.text)
    for n in reversed(range(min(S, undelay.kept))):
        undelay.remember(prompt[:, :, -1 - n])
    state = DecodeState(table, [], undelay, prompt[:, table.conditions, -1].tolist(), closing, limit)
    for codes, n, begin in zip(prompt[:, table.audio_out].transpose(1, 2).tolist(), run, begins, strict=True):
        turn = ItemState(n > 0 or begin or table.aligned, S if table.aligned else n + state.bare)
        state.turns.append(turn)
        for column in range(S - n, S) if state.ends else ():      # the prompt may already contain end ids
            note_ending(state, turn, codes[column], turn.count - S + column)
    return state


def recent_codes(prompt: Tensor, table: StreamTable, window: int) -> Tensor:
    """The newest audio columns of a prompt (B, K, S), -1 before the first.   -> (B, Q, window)"""
    audio, rows = is_audio(prompt, table), prompt[:, table.audio_out]
    none = torch.full((rows.shape[1], window), -1, device=prompt.device)
    return torch.stack([torch.cat([none, codes[:, spoken]], 1)[:, spoken.sum() :] for codes, spoken in zip(rows, audio, strict=True)])


def note_ending(state: DecodeState, turn: ItemState, codes: Sequence[int], place: int) -> bool:
    """Record an end id in the audio rows of a column: the lowest codebook that has one decides in which frame the audio ends.

    When closing by row, codebook k ends k + 1 columns later, or all end in the first column in which all have their end id.
    -> whether the state changed
    """
    before = turn.closed
    heard = codes[:1] if state.closing.first else codes
    ended = [delay for code, (_, end, delay) in zip(heard, state.edges, strict=False) if code == end >= 0 and place > delay]
    if state.table.joint_end and len(ended) < len(state.edges):
        return False
    if ended and turn.closed == NEVER:
        turn.closed = place if state.closing.by_row else place - 1 - ended[0]
    if len(ended) == len(state.edges) and state.closing.by_row:
        turn.closed = min(turn.closed, place - state.begun)
    return turn.closed != before


def note_endings(state: DecodeState, codes: Tensor) -> bool:
    """`note_ending` for every item that generates audio.   codes (B, Q)"""
    return any([turn.speaking and note_ending(state, turn, row, turn.count) for turn, row in zip(state.turns, codes.tolist(), strict=True)])


def with_endings(state: DecodeState, column: Tensor, given: Tensor | None = None) -> Tensor:
    """Record end ids in a sampled column (B, K) -> the corrected column: codebooks whose audio ended get their end id, too."""
    if not state.ends or not note_endings(state, column[:, state.table.spoken]):
        return column
    known, _ = required_ids(state, given)
    return torch.where(known == FREE, column, known)


def forced_ids(state: DecodeState, turn: ItemState) -> list[int] | None:
    """The required ids of an item's audio rows: start ids before a row begins, end ids after the audio has ended.

    FREE where any id may be sampled; None = in all rows.
    """
    if turn.closed == NEVER and turn.count >= state.begun:
        return None
    frame, closed = turn.count - 1, turn.closed + state.closing.grace
    return [end if frame - delay >= closed and end >= 0 else start if frame < delay and start >= 0
            else -1 if state.shift and frame < delay + state.shift else FREE for start, end, delay in state.edges]


def close_fed(state: DecodeState, feed: Any) -> None:
    """End the speech of items whose fed words are over, where the feed says how many frames they have."""
    for turn, frames in zip(state.turns, feed.frames(), strict=True) if hasattr(feed, "frames") else ():
        turn.closed = turn.closed if frames is None else frames


def required_ids(state: DecodeState, given: Tensor | None = None) -> tuple[Tensor, bool]:
    """The ids of the next column (B, K), FREE where they are sampled or fed, and whether every sampled id is free.

    `given` (B, K) has priority over the rules; an item that is done gets -1 everywhere. Do not write to the result.
    """
    table = state.table
    facts = [(turn.done, turn.speaking, turn.owed, forced_ids(state, turn) if turn.speaking else None) for turn in state.turns]
    if state.last[0] != facts:
        rows = []
        for (done, speaking, owed, held), conditions in zip(facts, state.conditions, strict=True):
            ids = [FREE] * len(table)
            for k, id in zip(table.conditions, conditions, strict=True):
                ids[k] = id
            for k, fill in ((k, table.streams[k].fill) for k in table.text):
                ids[k] = FREE if fill < 0 else -1 if done else fill
            for k in table.text_out:
                ids[k] = -1 if done or speaking and not table.aligned else owed if owed >= 0 else FREE
            for n, k in enumerate(table.audio_out):
                ids[k] = -1 if done or not speaking else held[n] if held else FREE
            rows.append(ids)
        free = next_is_audio(state) is not None and not any(done or held or owed >= 0 for done, _, owed, held in facts)
        state.last = facts, (torch.tensor(rows), free)
    columns, free = state.last[1]
    return (columns, free) if given is None else (torch.where(given == FREE, columns, given), False)


def next_is_audio(state: DecodeState) -> bool | None:
    """Whether the next column is an audio column for all unfinished items; None if they differ."""
    speaking = {turn.speaking for turn in state.turns if not turn.done}
    return None if len(speaking) > 1 else True in speaking


def predicted_state(state: DecodeState, column: Tensor) -> DecodeState:
    """The state after a column (B, K) of `required_ids`, if no id sampled in it begins or ends audio or the generation."""
    after = replace(state, turns=[replace(turn) for turn in state.turns])
    if state.ends:
        note_endings(after, column[:, state.table.spoken])
    advance(after, column)
    return after


def advance(state: DecodeState, column: Tensor) -> None:
    """Advance every item by one column: into audio after `audio_start`, back to text when all rows have ended, done after `stop`."""
    table, lag = state.table, state.undelay.lag
    text = [-1] * len(state.turns)
    if table.text_out and not table.aligned and next_is_audio(state) is not True:
        text = column[:, table.text_out[0]].tolist()
    for turn, id in zip(state.turns, text, strict=True):
        over = turn.speaking and turn.count - 1 - lag >= turn.closed
        turn.owed = table.audio_end if over else -1
        turn.count += 1
        if table.aligned:
            turn.done = turn.done or over
            continue
        begins = not turn.speaking and id == table.audio_start >= 0
        turn.done = turn.done or (not turn.speaking and id in table.stop) or (over and not table.text_out)
        if begins:
            turn.count, turn.closed = int(state.bare), NEVER
        turn.speaking = turn.speaking and not over or begins
        if state.ends and turn.speaking and turn.count > state.limit > 0:         # the next frame would be one too many
            turn.closed = min(turn.closed, state.limit)


def flat_frames(state: DecodeState, column: Tensor) -> Tensor:
    """The frames (B, Q) that a column (B, 1) of a flat table completes, -1 where it completes none. An id out of turn drops its frame."""
    first, Q, V = state.table.flat
    for turn, id in zip(state.turns, column[:, 0].tolist(), strict=True):
        place, code = divmod(id - first, V)
        begun = turn.part if len(turn.part) < Q else ()
        turn.part = (*begun, code) if place == len(begun) else (code,) if place == 0 else ()
    return torch.tensor([turn.part if len(turn.part) == Q else (-1,) * Q for turn in state.turns])
