"""The grid: every model here reads and writes K rows of integer tokens that share one time axis of columns.

    sequential (Higgs, MOSS, tiny_clone): text and audio take turns     aligned (Moshi, DSAA, tiny): one column is one frame
    text     12   40    7   -1   -1   -1   -1   -1    9                 text     T0  PAD   w1   w2  PAD  PAD
    cb 1     -1   -1   -1  BOS   a0   a1  EOS  EOS   -1                 cb 1     A0   a0   a1   a2   a3   a4      delay 0
    cb 2     -1   -1   -1  BOS  BOS   b0   b1  EOS   -1                 cb 2     A0   A0   b0   b1   b2   b3      delay 1

`tokens (K, S)` holds ids; -1 marks an empty cell, which embeds to exactly zero and is never a target.
`weights (K, S)` is the loss weight of the token in the same cell; a token with weight 0 is no target. There are no separate
labels: the model reads columns 0..S-2 and predicts columns 1..S-1. No other code shifts tokens against targets.

A family is a `StreamTable` (its rows) and a layout function (from an example to a grid), both in its file in families/
and made of the functions below. The same function builds the training grid and the prompt. Next: model.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """One row of the grid. It holds ids 0..vocab-1; ids 0..classes-1 are predicted (classes 0 = the row is only read)."""

    name: str            # name in messages and metrics
    kind: str            # "text", "condition" (one id for the whole sequence) or "audio"
    vocab: int           # rows of its embedding
    classes: int = 0     # rows of its head
    delay: int = 0       # columns by which its tokens come later than their frames
    start: int = -1      # start id, which fills the row before its first token (BOS)
    end: int = -1        # end id, which closes the row (EOS)
    rank: int = 0        # condition: width of its embedding table, which is then projected to the model's width
    values: tuple[str, ...] = ()   # condition: names of its first ids; the last id means "not given"
    fill: int = -1       # text row that is only read: the id in every generated column that nobody feeds
    code_count: int = 0  # audio: ids 0..code_count-1 are codes; of the others only the end id is ever drawn; 0 = all are codes


@dataclass(frozen=True)
class Timing:
    """How an inner monologue lies to the sound in its columns."""

    lead: float = 0.0    # frames by which speech comes after its text; below 0 the text comes after the speech (recognition)
    silence: int = 0     # recognition: frames of silence in front of a recording
    ahead: int = 0       # words by which the second text row is ahead. Its words are fed: the text head says when one begins, no more
    turns: bool = False  # fed words: a turn begins with the id of its speaker

    @property
    def frames(self) -> int:
        return int(self.lead) if self.lead > 0 else -math.ceil(-self.lead)

    @property
    def around(self) -> tuple[int, int]:
        """Frames of silence that recognition hears in front of a recording and behind it."""
        return self.silence, max(0, -self.frames)


@dataclass(frozen=True)
class StreamTable:
    """The rows of a family's grid, and the special text ids that begin and end audio or the generation."""

    streams: tuple[Stream, ...]  # text rows, conditions, then the agent's codebooks, then the user's
    layout: str                  # name of the layout, by which families/family.py finds the family; "" = none yet
    aligned: bool = False        # text and audio share columns; otherwise they take turns
    audio_start: int = -1        # sequential: the text id after which audio columns begin
    audio_end: int = -1          # sequential: the text id that follows the last audio column, -1 = it is sampled
    stop: tuple[int, ...] = ()   # text ids that end generation
    pad: int = 3                 # inner monologue: the text id of a frame without a word piece (Moshi's <pad>)
    epad: int = 0                # inner monologue: the text id of the frame before a word (Moshi's <unk>)
    timing: Timing = Timing()    # inner monologue: text and speech that are not side by side
    joint_end: bool = False      # sequential: audio ends only when all rows of one frame hold their end id, which is also a usable code
    bare: bool = False           # sequential: audio begins with its first frame, no column of start ids stands before it
    flat: tuple[int, ...] = ()   # codes are ids of the text row, a frame one of each codebook in turn: first id, codebooks, codes in each
    ids: tuple[tuple[str, int], ...] = ()    # further ids that the layout writes, by name (Qwen3-TTS: its marks, languages, speakers)
    choice: str = ""             # what prompts choose among them: language=english,speaker=vivian

    def __post_init__(self) -> None:
        kinds = [s.kind for s in self.streams]
        assert all(0 <= n <= 2**24 for s in self.streams for n in (s.vocab, s.classes, s.rank, s.delay)), "a size or delay is out of range"
        assert kinds == sorted(kinds, reverse=True), f"text rows come first, then conditions: {kinds}"
        sizes = [s.classes for s in self.streams if s.kind == "audio" and s.classes]
        assert len(set(sizes[1:])) <= 1, f"the codebooks behind the first have one head shape: {sizes}"
        assert sum(s.classes > 0 for s in self.streams if s.kind == "text") <= 1, "at most one text row is predicted"
        first, Q, V = self.flat or (0, 0, 0)
        assert not self.flat or kinds == ["text"] and min(self.flat) > 0 and first + Q * V <= self.streams[0].vocab, (
            f"flat {self.flat} needs a single text row that has {Q} x {V} ids from {first} on")

    def __len__(self) -> int:
        return len(self.streams)

    # Row numbers by role; names in `_out` are the predicted rows.
    @cached_property
    def text(self) -> list[int]:
        return [i for i, s in enumerate(self.streams) if s.kind == "text"]

    @cached_property
    def audio(self) -> list[int]:
        return [i for i, s in enumerate(self.streams) if s.kind == "audio"]

    @cached_property
    def conditions(self) -> list[int]:
        return [i for i, s in enumerate(self.streams) if s.kind == "condition"]

    @cached_property
    def lead(self) -> int:
        """Rows before the audio rows."""
        return len(self) - len(self.audio)

    @cached_property
    def text_out(self) -> list[int]:
        return [i for i in self.text if self.streams[i].classes]

    @cached_property
    def audio_out(self) -> list[int]:
        return [i for i in self.audio if self.streams[i].classes]

    @cached_property
    def codes(self) -> list[int]:
        """The rows of a frame that hold codes: the audio rows; a flat table has none, its frames get them behind its own row."""
        return self.audio or [len(self) + k for k in range(self.flat[1] if self.flat else 0)]

    @cached_property
    def codes_out(self) -> list[int]:
        return self.audio_out or ([] if self.audio else self.codes)

    @cached_property
    def columns_per_frame(self) -> int:
        return self.flat[1] if self.flat else 1

    @cached_property
    def monologue(self) -> bool:
        """Whether row 0 is an inner monologue: the model predicts a text id for every frame, a word piece or padding."""
        return self.aligned and self.text_out == [0]

    @cached_property
    def timed(self) -> bool:
        return self.aligned and bool(self.text_out)         # the layout needs to know when each text id is spoken

    @cached_property
    def spoken(self) -> slice:
        """The predicted audio rows, which are adjacent."""
        return slice(self.audio_out[0], self.audio_out[-1] + 1) if self.audio_out else slice(0, 0)

    @cached_property
    def delays(self) -> list[int]:
        return [s.delay for s in self.streams]

    @cached_property
    def edges(self) -> Tensor:
        """The ids around the codes: those of the rows before the audio rows, start ids, end ids; do not write to it.   (K + Q,)"""
        held, audio = ([s.start if self.aligned else -1 for s in self.streams[: self.lead]], self.streams[self.lead :])
        return torch.tensor([*held, *(s.start for s in audio), *(s.end for s in audio)])

    def column(self, field: str, rows: Sequence[int] | None = None) -> Tensor:
        """One field of the streams as a (K, 1) tensor."""
        rows = range(len(self)) if rows is None else rows
        return torch.tensor([getattr(self.streams[i], field) for i in rows], dtype=torch.long)[:, None]


def codebooks(count: int, vocab: int, classes: int, start: int, end: int = -1, delays: range | tuple[int, ...] | None = None,
              name: str = "cb") -> tuple[Stream, ...]:
    """The audio streams of one speaker, a stream for each codebook; classes 0 = read, never predicted."""
    delays = delays if delays is not None else (0,) * count
    return tuple(Stream(f"{name}{k + 1}", "audio", vocab, classes, delays[k], start, end) for k in range(count))


def is_audio(tokens: Tensor, table: StreamTable) -> Tensor:
    """Which columns are audio columns: any audio row is >= 0.   (..., K, S) -> (..., S) bool"""
    return (tokens[..., table.lead :, :] >= 0).any(-2)


def delay(frames: Tensor, delays: Sequence[int], start: Tensor | int, tail: Tensor | int | None = None) -> Tensor:
    """Put one column of start ids in front and shift row k right by delays[k].   (..., K, T) -> (..., K, S)

    Without `tail` the last frames of delayed rows are cut off and S = T + 1 (Moshi). With `tail`, a value or (K, 1), every
    row keeps all its frames, the rest is filled with `tail`, and S = T + 1 + max(delays) (Higgs).
    """
    T = frames.shape[-1]
    assert len(delays) == frames.shape[-2] and min(delays) >= 0, (list(delays), tuple(frames.shape))
    S = T + 1 + (0 if tail is None else max(delays))
    first, last = (torch.as_tensor(-1 if edge is None else edge).to(frames).expand(*frames.shape[:-1], 1) for edge in (start, tail))
    framed = torch.cat([first, frames, last], dim=-1)                                        # -> (..., K, T + 2)
    place = torch.arange(S, device=frames.device) - torch.tensor(delays, device=frames.device)[:, None]
    return framed.gather(-1, place.clamp(0, T + 1).expand(*frames.shape[:-1], S))            # -> (..., K, S)


def undelay(columns: Tensor, delays: Sequence[int]) -> Tensor:
    """Invert `delay`, keeping the frames that are complete in every row.   (..., K, S) -> (..., K, S - 1 - max(delays))"""
    T = max(0, columns.shape[-1] - 1 - max(delays))
    return torch.stack([columns[..., k, 1 + d : 1 + d + T] for k, d in enumerate(delays)], dim=-2)


@dataclass
class Example:
    """One utterance or dialogue, the input of a layout function. Without `codes` the grid is a prompt and ends where generation begins."""

    text: Tensor                        # (n,) token ids of the transcript
    codes: Tensor | None = None         # (Q, T) the agent's codes
    starts: Tensor | None = None        # (n,) first frame of each text token (aligned layouts)
    reference: "Example | None" = None  # another clip of the same voice
    user: Tensor | None = None          # (Q, T) the other speaker's codes
    weights: Tensor | None = None       # (T,) loss weight of each id of a text row that has one id a frame
    conditions: Tensor | None = None    # (C,) ids of the condition rows, None = not given
    prompt: Tensor | None = None        # (K, P) frames of all rows in front of a dialogue: a voice and a role; never targets
    before: int = 0                     # leading frames that are context only, no targets: the overlap of chunks of a long dialogue
    segments: "list[tuple[Tensor, float]]" = field(default_factory=list)    # a conversation: ids (n,) or codes (Q, T), weight
    name: str = ""                      # for messages


Grid = tuple[Tensor, Tensor]            # tokens (K, S) int64, weights (K, S) float32


def text_block(ids: Tensor, weight: float, table: StreamTable) -> Grid:
    """Text columns of a sequential grid: ids (n,) in row 0, -1 in the other rows."""
    tokens = torch.full((len(table), len(ids)), -1)
    tokens[0] = ids
    weights = torch.zeros(tokens.shape)
    weights[0] = weight
    return tokens, weights


def audio_block(codes: Tensor, weight: float, table: StreamTable) -> Grid:
    """Audio columns of a sequential grid: codes (Q, T), one EOS a row, delayed.

    Targets are the codes and one EOS in each row; start ids and the fill after EOS are no targets. A table whose audio
    rows have no start id, or that is bare, gets no start column. In a flat table codes are text.
    """
    if table.flat:
        first, Q, V = table.flat
        return text_block((codes + first + V * torch.arange(Q)[:, None]).T.flatten(), weight, table)
    tokens, weights = audio_columns(codes, weight, table)
    first = int(table.bare or table.streams[table.lead].start < 0)
    return tokens[:, first:], weights[:, first:]


def audio_columns(codes: Tensor, weight: float, table: StreamTable) -> Grid:
    """A start column, codes (Q, T) and EOS, delayed; the rows before the audio rows keep their start id."""
    place, counts = audio_plan(table.lead, tuple(table.delays[table.lead :]), codes.shape[1])
    return torch.cat([codes.flatten(), table.edges]).take(place), weight * counts


@lru_cache(maxsize=256)         # short clips come in few lengths; a long one pays for itself
def audio_plan(lead: int, delays: tuple[int, ...], T: int) -> Grid:
    """The index of each cell of `audio_columns` in [codes, edges], and 1 for each target. Cached and shared: do not write to it."""
    Q = len(delays)
    codes, held, start, end = (n[:, None] for n in torch.arange(Q * T + lead + 2 * Q).split([Q * T, lead, Q, Q]))
    framed = torch.cat([codes.view(Q, T), end], dim=1)                          # (Q, T) -> (Q, T + 1)
    columns = delay(framed, delays, start, tail=end)                            # -> (Q, T + 2 + max delay)
    counts = delay(torch.ones(framed.shape), delays, 0.0, tail=0.0)
    held = held.expand(-1, columns.shape[1])
    return torch.cat([held, columns]), torch.cat([torch.zeros(held.shape), counts])


def join(blocks: Sequence[Grid]) -> Grid:
    """Concatenate blocks; the first column gets weight 0, because no column predicts it."""
    tokens, weights = (torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
    weights[:, 0] = 0
    return tokens, weights


def text_grid(example: Example, table: StreamTable) -> Grid:
    """Plain language modelling: every token except the first is a target."""
    return join([text_block(example.text, 1.0, table)])


def chat_grid(example: Example, table: StreamTable) -> Grid:
    """A conversation from text/conversation.py: segments of text and of speech, each with its loss weight."""
    return join([(text_block if part.dim() == 1 else audio_block)(part, weight, table) for part, weight in example.segments])
