"""Word times: words with their times -> the text row of an aligned grid.

    words     hello [0.3, 0.5]           there [0.55, 0.9]                     12.5 frames a second
    frame     0    1    2    3    4    5    6    7    8  ...
    text      PAD  PAD  EPAD a    b    EPAD c    d    e  PAD        one token per frame from the start of its word,
                                                                    EPAD in the frame before, PAD elsewhere

    aligned_ids(row, seconds, tokenizer, "english-v1")   ids, and the second at which each begins (one speaker)
    interleave(tokens, frames, 12.5)                     the text row of a dialogue (inner monologue)

The words of a dialogue come from a sidecar {"alignments": [[word, [start, end], speaker]]} or a list of {"speaker",
"word", "start", "end"}; the agent is SPEAKER_MAIN. `interleave` never drops a token: with a fast speaker they
queue. After moshi-finetune (Kyutai) and J-Moshi's trainer. Next: conversation.py.
"""

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from text.normalisers import normalise
from text.tokenizers import Tokenizer


def is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1e6         # neither NaN nor infinite


def spread(words: Sequence[str], start: float, end: float) -> list[tuple[str, float]]:
    """Divide a span of seconds among words in proportion to their letters; returns (word, start)."""
    before = list(accumulate(map(len, words), initial=0))                       # letters in front of each word, and in all
    return [(word, start + (end - start) * place / before[-1]) for word, place in zip(words, before, strict=False)]


def aligned_ids(row: dict[str, Any], seconds: float, tokenizer: Tokenizer, normaliser: str) -> tuple[list[int], list[float]]:
    """Ids of a row word by word, and the second at which each word begins; without word times the clip is divided by letters."""
    given = row.get("words") or spread(row["text"].split(), 0.0, seconds)
    ends = [start for _, start in given[1:]] + [seconds]
    words = [pair for (word, start), end in zip(given, ends, strict=True)
             for pair in spread(normalise(word, normaliser).split(), start, end)]
    pairs = [(i, start) for word, start in words for i in tokenizer.encode(word)]
    return [i for i, _ in pairs], [start for _, start in pairs]


def frame_starts(times: Sequence[float], frame_rate: float, speed: float, shift: float, frames: int) -> list[int]:
    """Seconds -> first frame of each token: the first at 0, strictly increasing, the last before `frames`."""
    if len(times) > frames:
        raise ValueError(f"{len(times)} text tokens in {frames} frames")
    starts = [round(t * frame_rate / speed + shift) if i else 0 for i, t in enumerate(times)]
    for i in range(1, len(starts)):
        starts[i] = max(starts[i], starts[i - 1] + 1)
    return [min(s, frames - len(starts) + i) for i, s in enumerate(starts)]


MAIN, OTHER = "SPEAKER_MAIN", "SPEAKER_OTHER"
EPAD, PAD = 0, 3            # Moshi's ids, which a stream table may change: <unk> before a word, <pad> in silence
INTERLEAVERS = ("queue", "reference")
PAUSE = 1.0                 # seconds of silence that end a sentence
EARLY = 0.5                 # seconds that a word may begin before its wav: recognisers round
SLACK = 0.5                 # seconds that the last word may end after its wav
Alignment = tuple[str, float, float, str]       # word, start and end in seconds, MAIN or OTHER
Timed = tuple[list[int], float]                 # ids, and the second at which they begin


def parse_alignments(found: Any, agent: str = "") -> list[Alignment]:
    """Read words and times from parsed json: Moshi's sidecar, its bare list, or J-Moshi's list, in which A is the agent.

    `agent` is another label of the agent. ValueError names the first malformed entry.
    """
    items = found.get("alignments") if isinstance(found, dict) else found
    if not isinstance(items, list):
        raise ValueError('there is no list of "alignments" [[word, [start, end], speaker]]')
    words = []
    for n, item in enumerate(items):
        try:
            if isinstance(item, dict):
                word, start, end, who, usual = item["word"], item["start"], item["end"], item["speaker"], ("A", MAIN)
            else:
                word, (start, end), who, usual = item[0], item[1], item[2], (MAIN,)
            if not isinstance(word, str) or not (-EARLY <= float(start) < 1e6 and -EARLY <= float(end) < 1e6):
                raise ValueError
            main = str(who) == agent if agent else who in usual
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"entry {n} is {json.dumps(item, ensure_ascii=False)[:60]}, expected [word, [start, end], speaker]") from None
        words.append((word.strip(), float(start), float(end), MAIN if main else OTHER))
    return words


def as_json(words: Sequence[Alignment]) -> list[list[Any]]:
    """Alignments in the form of a manifest row and of Moshi's sidecar."""
    return [[word, [start, end], who] for word, start, end, who in words]


def tidy_words(words: Sequence[Alignment]) -> tuple[list[Alignment], Counter[str]]:
    """Sort words by time and drop those without letters or length; count the corrections."""
    found: Counter[str] = Counter()
    found["before the recording"] = sum(w[1] < 0 for w in words)
    words = [(word, max(0.0, start), end, who) for word, start, end, who in words]
    kept = [w for w in words if w[0] and w[1] < w[2]]
    found["without length"] = len(words) - len(kept)
    found["out of order"] = sum(a[1] > b[1] for a, b in zip(kept, kept[1:], strict=False))
    kept = sorted(kept, key=lambda w: w[1])
    for who in (MAIN, OTHER):
        own = [w for w in kept if w[3] == who]
        found["overlapping"] += sum(a[2] > b[1] + 0.01 for a, b in zip(own, own[1:], strict=False))
    return kept, +found


def row_words(row: dict[str, Any]) -> list[Alignment]:
    """The words of a manifest row, in order: its alignments, or the agent's word starts; ValueError without either."""
    if "alignments" in row:
        return tidy_words(parse_alignments(row["alignments"]))[0]
    if not row.get("words"):
        raise ValueError("a stereo dialogue needs word times: add alignments [[word, [start, end], speaker]]")
    starts = [(word, float(start)) for word, start in row["words"]]
    ends = [start for _, start in starts[1:]] + [starts[-1][1] + PAUSE]
    return tidy_words([(word, start, end, MAIN) for (word, start), end in zip(starts, ends, strict=True)])[0]


def tokenise(words: Sequence[Alignment], tokenizer: Tokenizer, contextual: bool = False, spaces: bool = True) -> list[Timed]:
    """Ids of one speaker's words and when they begin: word by word (Moshi), or whole sentences at once (`contextual`).

    A sentence gives each token the time of its first letter; a language written without spaces is joined without.
    """
    if not contextual:
        return [(tokenizer.encode(word), start) for word, start, _, _ in words]
    return [token for sentence in sentences(words) for token in sentence_tokens(sentence, tokenizer, " " if spaces else "")]


def sentences(words: Sequence[Alignment]) -> Iterator[list[Alignment]]:
    """Split words into sentences at end marks and pauses."""
    part: list[Alignment] = []
    for word in words:
        if part and (part[-1][0].endswith((".", "?", "!", "。", "？", "！")) or word[1] - part[-1][2] > PAUSE):
            yield part
            part = []
        part.append(word)
    if part:
        yield part


def sentence_tokens(words: Sequence[Alignment], tokenizer: Tokenizer, glue: str) -> list[Timed]:
    """Tokens of one sentence: a word's time is divided among its letters; the glue before a word starts with it."""
    times: list[float] = []
    for word, start, end, _ in words:
        times += [start] * (len(glue) if times else 0) + [start + (end - start) * n / len(word) for n in range(len(word))]
    ids, tokens, at = tokenizer.encode(glue.join(word for word, *_ in words)), [], 0
    for n, token in enumerate(ids):
        at = max(at, min(len(tokenizer.decode(ids[:n])), len(times) - 1))      # letters before it; an incomplete letter decodes to one
        tokens.append(([token], times[at]))
    return tokens


def interleave(tokens: Sequence[Timed], frames: int, frame_rate: float, interleaver: str = "queue", pad: int = PAD,
               epad: int = EPAD) -> Tensor:
    """Put each token into a frame of its own, from the one in which its word begins.   -> (frames,) ids, EPAD and PAD

    "queue": remaining tokens of a word come before those of the next one, and at the end they replace padding, so that none
    is dropped. "reference": they are dropped, as in moshi-finetune.
    """
    row: list[int] = []
    waiting: deque[int] = deque()
    left = deque(tokens)
    for t in range(frames):
        while left and left[0][1] * frame_rate < t + 1:
            if interleaver == "reference":
                waiting.clear()
            waiting.extend(left.popleft()[0])
        if waiting and row and row[-1] == pad:
            row[-1] = epad
        row.append(waiting.popleft() if waiting else pad)
    for token in waiting if interleaver == "queue" else ():
        free = next((n for kind in (pad, epad) for n in reversed(range(frames)) if row[n] == kind), None)
        if free is None:
            raise ValueError(f"more text tokens than the {frames} frames can hold; check the times of the words")
        del row[free]
        row.append(token)
    return torch.tensor(row, dtype=torch.long)


def text_weights(text: Tensor, padding: float, pad: int = PAD, epad: int = EPAD) -> Tensor:
    """Target weights of a text row: `padding` for PAD and EPAD, 1 for words, 0 for -1.   (T,) -> (T,)"""
    return torch.where((text == pad) | (text == epad), padding, 1.0) * (text >= 0)


def check_length(words: Sequence[Alignment], seconds: float) -> None:
    """ValueError when words begin or end after their recording, where they would be dropped."""
    end = max((w[2] for w in words), default=0.0)
    if end > seconds + SLACK or any(w[1] >= seconds for w in words):
        raise ValueError(f"wav shorter than its alignments: it lasts {seconds:.2f} s, the last word ends at {end:.2f} s")


def phrases(text: Tensor, frame_rate: float, pads: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The (frame, id) pairs of the words in a text row (T,), split where more than a second of padding lies between them."""
    found: list[list[tuple[int, int]]] = []
    for t, token in enumerate(text.tolist()):
        if token in pads or token < 0:
            continue
        if not found or t - found[-1][-1][0] > PAUSE * frame_rate:
            found.append([])
        found[-1].append((t, token))
    return found


def timed_transcript(text: Tensor, tokenizer: Tokenizer, frame_rate: float, pad: int = PAD, epad: int = EPAD, late: float = 0.0) -> str:
    """Transcript of a text row (T,), `late` frames behind its speech: one line per phrase with its start in seconds; a second of
    padding ends a phrase."""
    return "".join(f"{max(0.0, phrase[0][0] - late) / frame_rate:7.2f}  {tokenizer.decode([token for _, token in phrase]).strip()}\n"
                   for phrase in phrases(text, frame_rate, (pad, epad)))


def timed_words(text: Tensor, tokenizer: Tokenizer, frame_rate: float, pad: int, epad: int) -> list[Alignment]:
    """The words of a text row (T,) with their times, as alignments: a word lasts from its first token to the end of its last."""
    words: list[Alignment] = []
    for phrase in phrases(text, frame_rate, (pad, epad)):
        before = len(words)
        for n, (t, _) in enumerate(phrase):
            said = tokenizer.decode([token for _, token in phrase[: n + 1]]).split()
            if len(said) > len(words) - before:
                words.append((said[-1], t / frame_rate, (t + 1) / frame_rate, MAIN))
            elif said:
                words[-1] = (said[-1], words[-1][1], (t + 1) / frame_rate, MAIN)
    return words


def bounded_words(text: Tensor, tokenizer: Tokenizer, frame_rate: float, pad: int, epad: int, late: float = 0.0) -> list[Alignment]:
    """The words that a recogniser writes into a text row (T,), `late` frames behind what it hears: `epad` stands in front of a word and
    ends the one before. Words without it between them take a frame for each of their ids; the last one lasts a second at most."""
    words, marks = list[Alignment](), (text == epad).nonzero()[:, 0].tolist()
    ends = [*marks[1:], min(len(text), marks[-1] + 1 + round(frame_rate))] if marks else []

    def time(frame: float) -> float:
        return max(0.0, (frame - late) / frame_rate)

    for begin, end in zip([mark + 1 for mark in marks], ends, strict=True):
        ids = [i for i in text[begin:end].tolist() if i > max(pad, epad)]
        *others, last = tokenizer.decode(ids).split() or [""]
        for word in others:
            length = len(tokenizer.encode(word))
            words.append((word, time(begin), time(begin + length), MAIN))
            begin += length
        words += [(last, time(begin), time(end), MAIN)] if last else []
    return words


def user_turns(reference: Sequence[Alignment]) -> list[list[Alignment]]:
    """What the user says until the agent speaks, each time."""
    turns: list[list[Alignment]] = []
    spoken_since = True
    for word in sorted(reference, key=lambda w: w[1]):
        if word[3] == OTHER and spoken_since:
            turns.append([])
        if word[3] == OTHER:
            turns[-1].append(word)
        spoken_since = word[3] == MAIN and not word[0].startswith("(") or spoken_since and word[3] != OTHER
    return turns


def turns_right(reference: Sequence[Alignment], words: Sequence[Alignment]) -> dict[str, float]:
    """How many of the user's turns get the reply that was recorded, word for word, in `words` that a model wrote.

    A turn is what the user says until the agent speaks; its reply is what the agent says from its end to the user's next turn. A
    word in parentheses is what the agent has heard. {} where the reference says nothing of the user's words.
    """
    turns = user_turns(reference)
    if not turns:
        return {}
    found = {"turns": float(len(turns)), "turns_right": 0.0}
    for turn, span in zip(turns, reply_spans(reference), strict=True):
        wanted, said = (reply_words(side, *span) for side in (reference, words))
        name = f"turns_of_{len(turn)}"
        found[name] = found.get(name, 0.0) + 1
        found[f"{name}_right"] = found.get(f"{name}_right", 0.0) + (wanted == said)
        found["turns_right"] += wanted == said
    return found


def reply_spans(reference: Sequence[Alignment]) -> list[tuple[float, float]]:
    """When the agent replies: from the end of each of the user's turns to the next one."""
    turns = user_turns(reference)
    return [(turn[-1][2], after[0][1] if after else float("inf")) for turn, after in zip(turns, [*turns[1:], None], strict=True)]


def reply_words(words: Sequence[Alignment], begin: float, end: float) -> list[str]:
    """What the agent says, not what it has heard, in a span of time."""
    return [w[0] for w in sorted(words, key=lambda w: w[1]) if w[3] == MAIN and begin <= w[1] < end and not w[0].startswith("(")]
