"""Kyutai's delayed streams: text to speech whose words are fed, speech to text, and Hibiki, which translates what it hears.

TTS      action   .     .     new   .     .     new ...     the text head: a word begins, or not; what follows is fed
         text     PAD   PAD   he    llo   PAD   there       one id a frame, from the frame in which the word begins
         ahead    -1    -1    NEW   two   -1    NEW         NEW there, then the word that comes two later
         cb 1..   -1    -1    ...                           the speech of a frame comes 16 frames behind its text
STT      text                 delayed against what is heard, silence in front and behind
Hibiki   what a user says, a column of start ids, silence until the text ends; how well it should sound is a condition

`WordFeed` writes the rows while sampling and in training, where words begin when they were spoken: `<break time="0.5s"/>` pauses,
[SPEAKER1] is the other speaker, as in a prompt of several voices. Sizes and files are families/moshi.py's. Sources: moshi 0.2.13
(models/tts.py, run_tts.py, run_inference.py), kyutai-labs/delayed-streams-modeling (2026-03). Next: moss.py.
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from families.family import Family
from families.moshi import RATE, duplex_grid
from families.moshi import rules as moshi_rules
from families.tensor_files import read_tensors
from streams import StreamTable

NONE, SPEAKERS = -1, (1, 2)                     # no id; the ids with which turns of the two speakers begin
MOST_PADDING, INITIAL_PADDING, FINAL_FRAMES, BETWEEN = 8, 2, 4, 1        # frames, as in moshi's run_tts.py
MOST_VOICES = 5
EVENT = re.compile(r"<break\s+time=\"([0-9]+(?:\.[0-9]*)?)s\"\s*/?>|\s+")


# ---- text to speech ----

def spell(text: str, tokenizer: Any, table: StreamTable) -> list[int]:
    """Ids of a text for `WordFeed`: each word is -1 - the frames of padding behind it, then its ids; a pause has none."""
    if not table.timing.lead:
        raise ValueError("the model does not say by how many frames speech comes after its text; restore tts_config in its config.json")
    pieces, spelled, last = re.split(r"\[SPEAKER(\d+)\]", text), [], -1
    for speaker, line in [(0, pieces[0]), *((int(n), said) for n, said in zip(pieces[1::2], pieces[2::2], strict=True))]:
        line, at = re.sub("[()]", "", line.replace("\u2019", "'").replace(":", " ")) + " ", 0
        for event in EVENT.finditer(line):
            if word := line[at : event.start()]:
                ids = tokenizer.encode(word)
                if table.timing.turns and last != speaker % 2:
                    ids, last = [SPEAKERS[speaker % 2], *ids], speaker % 2
                spelled += [-1 - (BETWEEN + len(ids) - 1), *ids]
            spelled += [-1 - round(float(event[1]) * RATE)] if event[1] else []
            at = event.end()
    return spelled


@dataclass
class Words:
    """Where an item of a batch is in its words, as moshi's state machine."""

    table: StreamTable
    left: deque[tuple[int, list[int]]]              # padding behind a word, and its ids
    most: int = MOST_PADDING                        # padding in a row after which a word begins in any case
    padding: int = INITIAL_PADDING                  # that may still follow
    forced: int = INITIAL_PADDING                   # that must
    ids: deque[int] = field(default_factory=deque)
    ahead: deque[int] = field(default_factory=deque)
    step: int = -1
    end: int | None = None                          # step in which the words were over

    @classmethod
    def spelled(cls, text: Tensor, table: StreamTable, **more: int) -> "Words":
        left: deque[tuple[int, list[int]]] = deque()
        for id in text.tolist():
            if id < 0:
                left.append((-1 - id, []))
            elif left:                              # a row without a session has an id and no word
                left[-1][1].append(id)
        return cls(table, left, **more)

    def begin_word(self) -> bool:
        """A word begins, if one is left; whether it has ids."""
        ahead, new = self.table.timing.ahead, False
        if self.left:
            self.forced, ids = self.left.popleft()
            if new := bool(ids):
                self.ids.extend(ids)
                coming = [word for _, word in self.left if word]
                self.ahead.extend(coming[ahead - 1] if 0 < ahead <= len(coming) else [])
                self.padding = self.most
        elif self.end is None:
            self.end, new = self.step, ahead > 0
        return new

    def next(self, action: int) -> tuple[int, int]:
        """What the model drew in a column -> what stands in its text row and in the row ahead."""
        self.step += 1
        pad, mark = self.table.pad, self.table.epad
        must_not, must = self.ids or self.forced > 0, self.padding <= 0
        if not must_not and (must or action == mark) and self.begin_word():
            if not self.table.timing.ahead:
                return mark, NONE
            return self.ids.popleft() if self.ids else pad, mark
        self.padding, self.forced = max(0, self.padding - 1), max(0, self.forced - 1)
        return self.ids.popleft() if self.ids else pad, self.ahead.popleft() if self.ahead else NONE


class WordFeed:
    """Write the text rows while sampling: a word begins when the model says so."""

    def __init__(self, texts: Sequence[Tensor], table: StreamTable) -> None:
        self.table, self.items = table, [Words.spelled(text, table) for text in texts]

    def place(self, row: int, other: "WordFeed") -> None:
        """Let an item go on as the only item of another feed does."""
        self.items[row] = other.items[0]

    def __call__(self, column: Tensor) -> Tensor:
        rows = [item.next(action) for item, action in zip(self.items, column[:, 0].tolist(), strict=True)]
        texts = len(self.table.text)
        column[:, :texts] = torch.tensor(rows, device=column.device)[:, :texts]
        return column

    def frames(self) -> list[int | None]:
        """How many frames each item has, None while it has words."""
        return [None if item.end is None else self.table.timing.frames + item.end + FINAL_FRAMES for item in self.items]


def fed_rows(words: Sequence[tuple[list[int], float]], frames: int, frame_rate: float, table: StreamTable) -> Tensor:
    """The text rows (n, T) of spoken words, ids and the second at which they begin; behind them the mark that they are over."""
    item = Words(table, deque((0, list(ids)) for ids, _ in words), most=frames, padding=frames, forced=0)
    starts, rows = deque(start for _, start in words), []
    if table.timing.turns and item.left:
        item.left[0] = (0, [SPEAKERS[0], *item.left[0][1]])
    for t in range(frames):
        begins = starts[0] * frame_rate < t + 1 if starts else t >= frames - FINAL_FRAMES and item.end is None
        before = len(item.left)
        rows.append(item.next(table.epad if begins else table.pad))
        for _ in range(before - len(item.left)):
            starts.popleft()
    if item.left:
        raise ValueError(f"{len(item.left)} words do not fit into {frames} frames; check the times of the words")
    return torch.tensor(rows).T[: len(table.text)]


def voice_features(files: Sequence[str]) -> Tensor:
    """Features (n, F) of voices, files of kyutai/tts-voices, in the order of speakers; NaN where there is no speaker."""
    found = []
    for file in files[:MOST_VOICES]:
        tensors = read_tensors(file)
        if tensors.keys() != {"speaker_wavs"} or tensors["speaker_wavs"].dim() != 3:
            raise ValueError(f"{file} is no voice: it holds {', '.join(tensors)}; take one of kyutai/tts-voices")
        found.append(tensors["speaker_wavs"][0].T.float())                                       # (1, F, t) -> (t, F)
    if len(files) > MOST_VOICES:
        raise ValueError(f"{len(files)} voices were given, the model tells {MOST_VOICES} apart; leave the others out")
    return torch.cat([*found, *[torch.full_like(found[0], torch.nan)] * (MOST_VOICES - len(found))])


def speech_condition(table: StreamTable) -> str:
    """Good recordings, and as if guided by 2: the model was trained on what guidance makes."""
    usual = {"control": "ok", "cfg": "2.0"}
    rows = [table.streams[k] for k in table.conditions]
    return ",".join(f"{s.name}={usual[s.name]}" for s in rows if usual.get(s.name) in s.values)


# ---- Hibiki ----

END = 2             # the text id that ends a translation


def condition(table: StreamTable) -> str:
    return "description=very_good" if any("very_good" in table.streams[k].values for k in table.conditions) else ""


@torch.no_grad()
def before_sampling(model: Any) -> None:
    """Hibiki writes its end too early at times: from then on it reads padding instead, as in moshi's loader."""
    if condition(model.table):
        weight = model.embed["text"].weight
        weight[END] = weight[model.table.pad]


FAMILIES = (
    Family("Kyutai TTS", "kyutai_tts", "Kyutai TTS: speech from fed words, in the voices of files", duplex_grid,
           rules=lambda table: moshi_rules(table) | {"temperature": 0.6, "max_frames": 3750},              # five minutes at most
           feed=WordFeed, spell=spell, text_rows=fed_rows, voice_features=voice_features, condition=speech_condition, text_to_speech=True,
           references=MOST_VOICES),
    Family("Kyutai STT", "kyutai_stt", "Kyutai STT: words and their times, and when a speaker pauses", duplex_grid, rules=moshi_rules,
           user_audio="duplex"),
    Family("Hibiki", "hibiki", "Hibiki: translation while somebody speaks", duplex_grid, condition=condition,
           rules=lambda table: moshi_rules(table) | ({"cfg_condition": "description=very_bad"} if condition(table) else {}),
           before_sampling=before_sampling, user_audio="duplex", ends=END))
