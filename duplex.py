"""Full duplex: stereo dialogues with timed words -> the text row of a duplex grid; and the feed that listens.

    words     hello [0.3, 0.5]           there [0.55, 0.9]                     12.5 frames a second
    frame     0    1    2    3    4    5    6    7    8  ...
    text      PAD  PAD  EPAD a    b    EPAD c    d    e  PAD        a token a frame from where its word begins, EPAD
                                                                    in the frame before, PAD elsewhere

The left channel is the agent (SPEAKER_MAIN), the right one the user. A word list comes from a Moshi sidecar
{"alignments": [[word, [start, end], speaker]]} or a J-Moshi list [{"speaker", "word", "start", "end"}]. `interleave`
never loses a token: what a fast speaker leaves unsaid waits. After moshi-finetune (Kyutai) and J-Moshi's trainer.
Next: cache.py, which stores these rows; sample.py, which talks.
"""

import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio.wav import load_wav, resample, save_wav
from options import read_rows, write_text
from streams import StreamTable, delay
from text import Tokenizer

MAIN, OTHER = "SPEAKER_MAIN", "SPEAKER_OTHER"
EPAD, PAD = 0, 3            # Moshi's ids, which a stream table may change: <unk> stands before a word, <pad> where nothing is said
INTERLEAVERS = ("queue", "reference")
PAUSE = 1.0                 # seconds of silence that end a sentence
SLACK = 0.5                 # seconds that the last word may reach behind the end of its wav
ASSETS = Path(__file__).resolve().parent / "assets" / "speech"
Alignment = tuple[str, float, float, str]       # word, start and end in seconds, MAIN or OTHER
Timed = tuple[list[int], float]                 # ids, and the second at which they begin
Fault = tuple[str, str, str]                    # as in manifest.py


# ---- alignments ----

def parse_alignments(found: Any) -> list[Alignment]:
    """Read words and times from parsed json: Moshi's sidecar, its bare list, or J-Moshi's list, in which A is the agent.

    ValueError names the first entry that is none.
    """
    items = found.get("alignments") if isinstance(found, dict) else found
    if not isinstance(items, list):
        raise ValueError('there is no list of "alignments" [[word, [start, end], speaker]]')
    words = []
    for n, item in enumerate(items):
        try:
            if isinstance(item, dict):
                word, start, end, main = item["word"], item["start"], item["end"], item["speaker"] in ("A", MAIN)
            else:
                word, (start, end), main = item[0], item[1], item[2] == MAIN
            if not isinstance(word, str) or not (0 <= float(start) < 1e6 and 0 <= float(end) < 1e6):
                raise ValueError
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"entry {n} is {json.dumps(item, ensure_ascii=False)[:60]}, wanted [word, [start, end], speaker]") from None
        words.append((word.strip(), float(start), float(end), MAIN if main else OTHER))
    return words


def as_json(words: Sequence[Alignment]) -> list[list[Any]]:
    """Alignments as a manifest row and Moshi's sidecar hold them."""
    return [[word, [start, end], who] for word, start, end, who in words]


def tidy(words: Sequence[Alignment]) -> tuple[list[Alignment], Counter[str]]:
    """Sort words by time and drop those without letters or length; count what was wrong."""
    found: Counter[str] = Counter()
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
        return tidy(parse_alignments(row["alignments"]))[0]
    if not row.get("words"):
        raise ValueError("a stereo dialogue needs word times: add alignments [[word, [start, end], speaker]]")
    starts = [(word, float(start)) for word, start in row["words"]]
    ends = [start for _, start in starts[1:]] + [starts[-1][1] + PAUSE]
    return tidy([(word, start, end, MAIN) for (word, start), end in zip(starts, ends, strict=True)])[0]


# ---- words -> text row ----

def tokenise(words: Sequence[Alignment], tokenizer: Tokenizer, contextual: bool = False, spaces: bool = True) -> list[Timed]:
    """Ids of one speaker's words and when they begin: word by word (Moshi), or whole sentences at once (`contextual`).

    A sentence gives each token the time of its first letter; a language written without spaces is joined without.
    """
    if not contextual:
        return [(tokenizer.encode(word), start) for word, start, _, _ in words]
    return [token for sentence in sentences(words) for token in sentence_tokens(sentence, tokenizer, " " if spaces else "")]


def sentences(words: Sequence[Alignment]) -> Iterator[list[Alignment]]:
    """Cut words where a mark or a pause ends a sentence."""
    part: list[Alignment] = []
    for word in words:
        if part and (part[-1][0].endswith((".", "?", "!", "。", "？", "！")) or word[1] - part[-1][2] > PAUSE):
            yield part
            part = []
        part.append(word)
    if part:
        yield part


def sentence_tokens(words: Sequence[Alignment], tokenizer: Tokenizer, glue: str) -> list[Timed]:
    """Tokens of one sentence: the time of a word is shared by its letters, the glue before a word begins with it."""
    times: list[float] = []
    for word, start, end, _ in words:
        times += [start] * (len(glue) if times else 0) + [start + (end - start) * n / len(word) for n in range(len(word))]
    ids, tokens, at = tokenizer.encode(glue.join(word for word, *_ in words)), [], 0
    for n, token in enumerate(ids):
        at = max(at, min(len(tokenizer.decode(ids[:n])), len(times) - 1))      # letters before it; half a letter decodes to one
        tokens.append(([token], times[at]))
    return tokens


def interleave(tokens: Sequence[Timed], frames: int, frame_rate: float, interleaver: str = "queue", pad: int = PAD,
               epad: int = EPAD) -> Tensor:
    """Put each token into a frame of its own, from the one in which its word begins.   -> (frames,) ids, EPAD and PAD

    "queue": tokens that are left over wait behind those of the next word, and at the end padding gives way to them, so
    none is lost. "reference": they are dropped, as moshi-finetune does.
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
    """How much each id of a text row counts: padding less than words, -1 nothing.   (T,) -> (T,)"""
    weights = torch.where((text == pad) | (text == epad), padding, 1.0)
    return weights * (text >= 0)


def check_length(words: Sequence[Alignment], seconds: float) -> None:
    """ValueError when words lie behind the end of their recording: they would be lost."""
    end = max((w[2] for w in words), default=0.0)
    if end > seconds + SLACK or any(w[1] >= seconds for w in words):
        raise ValueError(f"wav shorter than its alignments: it lasts {seconds:.2f} s, the last word ends at {end:.2f} s")


# ---- what is wrong with a stereo recording ----

def stereo_faults(wav: Tensor, rate: int, row: dict[str, Any]) -> Iterator[Fault]:
    """Judge a dialogue (2, W): silent, equal, swapped or leaking channels, and alignments that had to be mended."""
    try:
        words = row_words(row) if "alignments" in row or row.get("words") else []
        check_length(words, wav.shape[1] / rate)
    except ValueError as error:
        yield "reject", "alignments do not fit", str(error)
        return
    if "alignments" in row and (found := tidy(parse_alignments(row["alignments"]))[1]):
        yield "warn", "alignments mended", ", ".join(f"{n} words {what}" for what, n in found.items())
    yield from channel_faults(wav, rate, words)


def channel_faults(wav: Tensor, rate: int, words: Sequence[Alignment]) -> Iterator[Fault]:
    n = max(1, rate // 40)                                                       # 25 ms
    power = torch.nn.functional.pad(wav, (0, -wav.shape[1] % n)).unfold(1, n, n).square().mean(-1)       # (2, J)
    silent = power.amax(1) < 10 ** (-50 / 10)
    if bool(silent[0]):
        yield "doubt", "silent channel", "the left channel is the agent and says nothing: check the recording or swap its channels"
    elif bool(silent[1]):
        yield "warn", "silent channel", "the right channel is the user and says nothing: the model would learn a monologue"
    elif float((wav[0] - wav[1]).square().mean()) < 1e-4 * float(wav.square().mean()):
        yield "doubt", "both channels are the same", "this is a mono recording: separate the speakers into left and right"
    elif swapped(power, words, rate / n):
        yield "doubt", "swapped channels", "the agent's words lie on the right: left must be SPEAKER_MAIN"
    elif (leak := crosstalk(wav, rate)) > 0.15:
        yield "warn", "crosstalk", f"the channels correlate by {leak:.2f}: one microphone hears both speakers"


def swapped(power: Tensor, words: Sequence[Alignment], windows: float) -> bool:
    """The agent's words are 6 dB louder on the right than on the left, or the user's on the left.   power (2, J)"""
    votes = []
    for who, own in ((MAIN, 0), (OTHER, 1)):
        said = torch.zeros(power.shape[1], dtype=torch.bool)
        for _, start, end, speaker in words:
            if speaker == who:
                said[int(start * windows) : math.ceil(end * windows)] = True
        if said.any():
            votes.append(float(power[1 - own, said].mean()) > 4 * float(power[own, said].mean()))
    return bool(votes) and all(votes)


def crosstalk(wav: Tensor, rate: int, seconds: float = 30.0, reach: float = 0.02) -> float:
    """Largest correlation of the two channels within 20 ms of delay, 0 to 1.   (2, W)"""
    x = resample(wav[:, : round(seconds * rate)], rate, 8000) if rate != 8000 else wav[:, : round(seconds * rate)]
    spectrum = torch.fft.rfft(x, 2 * x.shape[1])
    lags = torch.fft.irfft(spectrum[0] * spectrum[1].conj()).abs()
    reach = round(8000 * reach)
    return float(torch.cat([lags[: reach + 1], lags[-reach:]]).max() / (x.square().sum(1).prod().sqrt() + 1e-12))


# ---- listening ----

class UserFeed:
    """Fill the user's rows while sampling with his codes (B, Q, T), frame by frame; behind their end stands nothing.

    They are delayed by the function that lays out training grids. `exact_moshi`: as in moshi's LMGen the first frame is
    never heard, so that every other one comes a frame early.
    """

    def __init__(self, user: Tensor, table: StreamTable, exact_moshi: bool = False, column: int = 1) -> None:
        self.rows = [k for k in table.audio if k not in table.audio_out]
        if user.shape[1] != len(self.rows):
            raise ValueError(f"the codec gives {user.shape[1]} codebooks, the model hears {len(self.rows)}; use the codec it was made for")
        delays = [table.delays[k] for k in self.rows]
        self.columns = delay(user[..., int(exact_moshi) :], delays, table.column("start", self.rows), tail=-1)      # (B, Q, S)
        self.place = slice(self.rows[0], self.rows[-1] + 1)
        self.column = column                                                    # number of the column that comes next

    def ahead(self, n: int) -> Tensor:
        """What he says in the n-th column from now, the next being 0.   -> (B, Q)"""
        return self.columns[..., min(self.column + n, self.columns.shape[-1] - 1)]

    def __call__(self, column: Tensor) -> Tensor:
        column[:, self.place] = self.ahead(0).to(column)
        self.column += 1
        return column


def moshi_rules(codebooks: int) -> dict[str, tuple[float, ...]]:
    """How moshi draws by default: text at 0.7 of the best 25, codes at 0.8 of the best 250; a recogniser takes the likeliest text."""
    if not codebooks:
        return {"temperature": (0.0,)}
    return {"temperature": (0.7, *[0.8] * codebooks), "top_k": (25.0, *[250.0] * codebooks)}


def phrases(text: Tensor, frame_rate: float, pads: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The frames and ids that say something in a text row (T,), parted where a second of padding lies between them."""
    found: list[list[tuple[int, int]]] = []
    for t, token in enumerate(text.tolist()):
        if token in pads or token < 0:
            continue
        if not found or t - found[-1][-1][0] > PAUSE * frame_rate:
            found.append([])
        found[-1].append((t, token))
    return found


def transcript(text: Tensor, tokenizer: Tokenizer, frame_rate: float, pad: int = PAD, epad: int = EPAD) -> str:
    """What a text row (T,) says: a line a phrase, begun with its time; a second of padding ends a phrase."""
    return "".join(f"{phrase[0][0] / frame_rate:7.2f}  {tokenizer.decode([token for _, token in phrase]).strip()}\n"
                   for phrase in phrases(text, frame_rate, (pad, epad)))


def official_files(folder: Path) -> dict[str, str]:
    """The codec and the tokenizer that lie beside official weights, as DataConfig fields: Moshi's, or a tokenizer.json."""
    patterns = {"codec": ("tokenizer-*.safetensors", "mimi-*.safetensors"), "tokenizer": ("tokenizer.json", "*.model")}
    found = {name: [path for mark in marks for path in folder.glob(mark)] for name, marks in patterns.items()}
    return {name: str(paths[0]) for name, paths in found.items() if paths}


# ---- predicting both speakers ----

def expand_depth(config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Let a model that predicts the agent predict the user too, as J-Moshi's trainer does: its depth steps, copied.

    ModelConfig and tensors in, both out. The agent's last codebook, which a step reads now, gets the embedding of its
    first; the agent's logits stay as they are.
    """
    both, first = predict_user(config), config.table.streams[config.table.audio[0]]
    double = {name: torch.cat([t, t]) for name, t in weights.items() if depth_sets(name, t, config.depth.steps)}
    codes = weights["depth.audio.weight"]
    return both, weights | double | {"depth.audio.weight": torch.cat([codes, codes[: first.vocab], codes])}


def predict_user(config: Any) -> Any:
    """The ModelConfig of `expand_depth`: every audio row is predicted, each by a depth step of its own."""
    table, depth, Q = config.table, config.depth, len(config.table.audio_out)
    if depth is None or depth.schedule or depth.low_rank or len(table.audio) != 2 * Q:
        raise ValueError(f"{Q} of {len(table.audio)} audio rows are predicted; expand-depth wants a depth transformer and half of them")
    classes = table.streams[table.audio[0]].classes
    streams = [replace(s, classes=classes) if k in table.audio else s for k, s in enumerate(table.streams)]
    return replace(config, table=replace(table, streams=tuple(streams)), depth=replace(depth, steps=2 * Q))


def trim_depth(config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Undo `expand_depth`: predict the agent only, the first half of the rows, as moshi's server wants it."""
    table, depth, Q = config.table, config.depth, len(config.table.audio_out) // 2
    if depth is None or depth.schedule or depth.low_rank or len(table.audio) != 2 * Q:
        raise ValueError(f"{2 * Q} of {len(table.audio)} audio rows are predicted; trim-depth wants all of them, and a depth transformer")
    streams = [replace(s, classes=0) if k in table.audio[Q:] else s for k, s in enumerate(table.streams)]
    half = {name: t[:Q] for name, t in weights.items() if depth_sets(name, t, depth.steps)}
    read = sum(table.streams[k].vocab for k in table.audio[: Q - 1])
    config = replace(config, table=replace(table, streams=tuple(streams)), depth=replace(depth, steps=Q))
    return config, weights | half | {"depth.audio.weight": weights["depth.audio.weight"][:read]}


def depth_sets(name: str, tensor: Tensor, steps: int) -> bool:
    """A tensor of the depth transformer that holds one weight a step."""
    return name.startswith("depth.") and tensor.dim() == 3 and len(tensor) == steps


# ---- bundled dialogues ----

def demo_dialogues(folder: str | Path, count: int = 24) -> str:
    """Make small stereo dialogues of the bundled clips, once: left Allison asks, right a synthetic voice answers.

    Writes NNN.wav, NNN.json, dialogues.jsonl and words.json (ids 0..3 stay free for EPAD, <s>, </s>, PAD) into `folder`;
    returns the path of the manifest.
    """
    folder = Path(folder)
    if (folder / "dialogues.jsonl").is_file():
        return str(folder / "dialogues.jsonl")
    rows = [row for _, row in read_rows(ASSETS / "manifest.jsonl", "clip")]
    asks, answers = ([r for r in rows if r["speaker"] == who and 1 < len(r["words"]) < 7] for who in ("allison", "rms"))
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(count):
        turns = [asks[7 * n % len(asks)], answers[3 * n % len(answers)]]
        sides, words, at = [], [], 0.2
        for turn, who in zip(turns, (MAIN, OTHER), strict=True):
            wav, rate = load_wav(ASSETS / turn["audio"], 16_000)
            sides.append(torch.nn.functional.pad(wav, (round(at * rate), 0)))
            ends = [start for _, start in turn["words"][1:]] + [wav.shape[1] / rate]
            words += [[word, [round(at + start, 3), round(at + end, 3)], who]
                      for (word, start), end in zip(turn["words"], ends, strict=True)]
            at += wav.shape[1] / rate + 0.1
        save_pair(folder / f"{n:03d}", sides, rate, words)
        lines.append(json.dumps({"path": f"{n:03d}.wav", "duration": round(max(s.shape[1] for s in sides) / rate, 3)}) + "\n")
    known = ["<s>", "</s>", "<pad>", *json.loads((ASSETS / "words.json").read_text(encoding="utf-8"))]
    for name, text in (("words.json", json.dumps(known)), ("dialogues.jsonl", "".join(lines))):      # the manifest last: all is there
        write_text(folder / name, text)
    return str(folder / "dialogues.jsonl")


def save_pair(path: Path, sides: list[Tensor], rate: int, words: list[list[Any]]) -> None:
    length = max(side.shape[1] for side in sides)
    save_wav(path.with_suffix(".wav"), torch.cat([torch.nn.functional.pad(s, (0, length - s.shape[1])) for s in sides]), rate)
    write_text(path.with_suffix(".json"), json.dumps({"alignments": words}))
