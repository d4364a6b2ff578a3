"""Who speaks when in a recording with one channel: by voice, or as an RTTM file of another tool says.

    for turn in diarise(wav, rate):              # (1, W) -> Turn(speaker 0 or 1, start, end), speaker 0 begins; with its confidence
    read_rttm("calls.rttm")["7"]                 # of recording 7: [(start, end, "SPEAKER_00"), ...]
    diarisation_error(truth, found)              # share of the speech that is missed, invented or given to the wrong speaker

Speech is found by loudness (telephone.py) and cut at pauses; each piece is heard in windows by the speaker encoder (speaker.py).
Two centres of voices are found by k-means, then in turns: the likeliest path through the frames, where a change of speaker is
dear within a word and cheap in a pause, and the mean voice of each side of it. A turn's confidence is the mean probability of
its speaker. Two people who speak at once are taken for one of them. Next: augment.py.
"""

import math
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.speaker import LOUDNESS, load_speaker_encoder, mel_power
from audio.telephone import SPAN, frame_levels, speech, without
from audio.wav import resample
from audio.whisper import HOP, RATE

WINDOW, STEP = 120, 40      # mel frames of 10 ms that are heard at once, and between two
SHARP = 12.0                # log-odds of a speaker for a difference of 1 in cosine
CHANGE, IN_PAUSE = 18.0, 3.0        # log-odds against a change of speaker, in the middle of speech and in a pause
EDGE = 0.08                 # seconds around a span that belong to it: words begin and end softly
ONE_VOICE = 0.89            # cosine of two centres that are one voice


class Voice(NamedTuple):
    """A stretch of one speaker."""
    speaker: int
    start: float
    end: float
    confidence: float


def diarise(wav: Tensor, rate: int, speakers: int = 2, held: Sequence[tuple[float, float]] = ()) -> list[Voice]:
    """The stretches of `speakers` people in (1, W), in order; number 0 speaks first. ValueError where only one voice is heard.

    `held`: spans in seconds that are no speech, such as hold music.
    """
    wav = resample(wav.detach().float().cpu().reshape(1, -1), rate, RATE)
    wav = wav - wav.mean()
    wav = wav * max(1.0, float(10 ** (LOUDNESS / 20) / wav.square().mean().sqrt().clamp(min=1e-6)))
    level = frame_levels(wav, round(SPAN * RATE))[0]
    spans = speech(level, torch.full_like(level, -math.inf)) if len(level) else []
    seconds = without([(a * SPAN, b * SPAN, 0) for a, b in spans], held)
    spans = [(round(a / SPAN), round(b / SPAN)) for a, b, _ in seconds]
    if not spans:
        raise ValueError("nobody speaks in it")
    loud = level > level[torch.cat([torch.arange(*span) for span in spans])].quantile(0.5) - 18
    vectors, weights = heard(wav[0], spans, loud)                       # (n, 256) of the frames of the spans
    centres = voices(F.normalize(vectors[weights > 0], dim=1), speakers)
    for _ in range(8):
        logits = SHARP * (F.normalize(vectors, dim=1) @ centres.T)      # (n, speakers)
        path = likeliest(logits * (weights > 0)[:, None], changes(spans, loud))
        found = [vectors[(path == k) & (weights > 0)] for k in range(speakers)]
        if any(not len(f) for f in found):
            raise ValueError("only one voice is heard in it")
        renewed = F.normalize(torch.stack([F.normalize(f, dim=1).mean(0) for f in found]), dim=1)
        if torch.allclose(renewed, centres, atol=1e-4):
            break
        centres = renewed
    close = float((centres @ centres.T).fill_diagonal_(-1).max())
    if close > ONE_VOICE:
        raise ValueError(f"only one voice is heard in it (the nearest two have a cosine of {close:.2f})")
    return stretches(spans, path, logits.softmax(1))


def heard(wav: Tensor, spans: Sequence[tuple[int, int]], loud: Tensor) -> tuple[Tensor, Tensor]:
    """The voice around every frame of the spans: the mean of the windows over it.   -> (n, 256), (n,) number of windows

    Windows do not reach over pauses of 0.2 s; what is shorter than one is repeated until it fills it.
    """
    pieces, places, begin = [], [], 0
    step = round(SPAN * RATE) // HOP                           # mel frames in a frame
    for first, last in spans:
        mel = mel_power(wav[first * step * HOP : last * step * HOP])
        for start, end in islands(loud[first:last].tolist(), round(0.2 / SPAN)):
            a, b = start * step, end * step
            count = max(1, round((b - a - WINDOW) / STEP) + 1)
            for n in range(count):
                at = a + round(n * max(0, b - a - WINDOW) / max(1, count - 1))
                pieces.append(mel[at + torch.arange(WINDOW) % min(WINDOW, b - a)])
                places.append((begin + at // step, begin + min(at + WINDOW, b) // step))
        begin += last - first
    vectors, weights = torch.zeros(begin, 256), torch.zeros(begin)
    with torch.no_grad():
        found = torch.cat([load_speaker_encoder()(torch.stack(pieces[i : i + 64])) for i in range(0, len(pieces), 64)])
    for vector, (start, end) in zip(found, places, strict=True):
        bell = torch.hann_window(end - start + 2, periodic=False)[1:-1]         # the middle of a window counts most
        vectors[start:end] += bell[:, None] * vector
        weights[start:end] += bell
    return vectors, weights


def islands(loud: Sequence[bool], pause: int) -> list[tuple[int, int]]:
    """Runs of loud frames, at least 0.1 s long, with gaps shorter than `pause` filled."""
    found: list[tuple[int, int]] = []
    for n, is_loud in enumerate(loud):
        if is_loud and found and n - found[-1][1] < pause:
            found[-1] = (found[-1][0], n + 1)
        elif is_loud:
            found.append((n, n + 1))
    return [(start, end) for start, end in found if end - start >= 0.1 / SPAN]


def voices(vectors: Tensor, speakers: int, rounds: int = 40) -> Tensor:
    """Centres of k-means by cosine, the best of many seeded starts: the farthest voice is often a cough.   (n, 256) -> (speakers, 256)"""
    vectors = vectors[:: -(-len(vectors) // 1000)]
    best, score, draw = vectors[:speakers], -math.inf, torch.Generator().manual_seed(0)
    for _ in range(rounds if len(vectors) >= speakers else 0):
        centres = vectors[torch.randperm(len(vectors), generator=draw)[:speakers]]
        for _ in range(12):
            near = F.one_hot((vectors @ centres.T).argmax(1), speakers).float()
            centres = F.normalize(near.T @ vectors + 1e-6 * centres, dim=1)
        if (total := float((vectors @ centres.T).amax(1).sum())) > score:
            best, score = centres, total
    return best


def changes(spans: Sequence[tuple[int, int]], loud: Tensor) -> Tensor:
    """What a change of speaker before each frame costs.   -> (n,)"""
    cost = torch.where(torch.cat([loud[a:b] for a, b in spans]), CHANGE, IN_PAUSE)
    begins = torch.tensor([0, *(b - a for a, b in spans[:-1])]).cumsum(0)
    cost[begins] = IN_PAUSE
    return cost


def likeliest(logits: Tensor, cost: Tensor) -> Tensor:
    """The path of the greatest sum (Viterbi).   (n, speakers), (n,) -> (n,)"""
    best, back = logits[0].tolist(), []
    for row, dear in zip(logits[1:].tolist(), cost[1:].tolist(), strict=True):
        top = max(range(len(best)), key=best.__getitem__)
        back.append([k if best[k] >= best[top] - dear else top for k in range(len(best))])
        best = [max(best[k], best[top] - dear) + row[k] for k in range(len(best))]
    path = [max(range(len(best)), key=best.__getitem__)]
    for row in reversed(back):
        path.append(row[path[-1]])
    return torch.tensor(path[::-1])


def stretches(spans: Sequence[tuple[int, int]], path: Tensor, probability: Tensor) -> list[Voice]:
    """Spans of frames, cut where the speaker changes; speakers numbered in the order in which they begin."""
    numbers: dict[int, int] = {}
    found, at = list[Voice](), 0
    for (first, last), before, after in zip(spans, [(0, 0), *spans], [*spans[1:], (10**9, 0)], strict=False):
        begin, end = at, at + last - first
        edges = min(EDGE, (first - before[1]) * SPAN / 2), min(EDGE, (after[0] - last) * SPAN / 2)
        for n in range(at + 1, end + 1):
            if n == end or path[n] != path[begin]:
                who, sure = int(path[begin]), round(float(probability[begin:n, int(path[begin])].mean()), 3)
                start = (first + begin - at) * SPAN - edges[0] * (begin == at)
                stop = (first + n - at) * SPAN + edges[1] * (n == end)
                found.append(Voice(numbers.setdefault(who, len(numbers)), round(start, 3), round(stop, 3), sure))
                begin = n
        at = end
    return found


# ---- files of other tools, and the measure ----

def read_rttm(path: str | Path) -> dict[str, list[tuple[float, float, str]]]:
    """The stretches (start, end, speaker) of each recording that an RTTM file names; ValueError names a line that is none."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith((";", "#")) or words[0] != "SPEAKER":
            continue
        try:
            start, seconds = float(words[3]), float(words[4])
            valid = start >= 0 < seconds < math.inf and math.isfinite(start) and len(words) > 7
        except (IndexError, ValueError):
            valid = False
        if not valid:
            raise ValueError(f"{path} line {number} is no turn; RTTM has SPEAKER file 1 start seconds <NA> <NA> speaker <NA> <NA>")
        found.setdefault(words[1], []).append((start, start + seconds, words[7]))
    if not found:
        raise ValueError(f"{path} names no speaker; each line begins with SPEAKER")
    return {name: sorted(spans) for name, spans in found.items()}


def diarisation_error(truth: Sequence[tuple[float, float, object]], found: Sequence[tuple[float, float, object]], collar: float = 0.0,
                      step: float = 0.01) -> float:
    """Missed + invented + confused seconds over the seconds of speech of the truth, with the best mapping of speakers.

    `collar`: seconds around each boundary of the truth that do not count.
    """
    names, guesses = sorted({str(s[2]) for s in truth}), sorted({str(s[2]) for s in found})
    n = math.ceil(max([s[1] for s in (*truth, *found)], default=0.0) / step) + 1
    grids = []
    for spans, who in ((truth, names), (found, guesses)):
        grid = torch.zeros(len(who), n, dtype=torch.bool)
        for start, end, name in spans:
            grid[who.index(str(name)), round(start / step) : round(end / step)] = True
        grids.append(grid)
    counted = torch.ones(n, dtype=torch.bool)
    for start, end, _ in truth if collar else ():
        for edge in (start, end):
            counted[max(0, round((edge - collar) / step)) : round((edge + collar) / step)] = False
    right, guess = grids[0][:, counted].long(), grids[1][:, counted].long()
    width = max(len(names), len(guesses))
    shared = F.pad(right, (0, 0, 0, width - len(names))) @ F.pad(guess, (0, 0, 0, width - len(guesses))).T      # (width, width)
    hits = max(sum(int(shared[i, j]) for i, j in enumerate(order)) for order in permutations(range(width)))
    return (int(torch.maximum(right.sum(0), guess.sum(0)).sum()) - hits) / max(1, int(right.sum()))
