"""Where somebody speaks: the voice activity detector silero with the weights of the package silero-vad, as benchmarks count.

    voice_activity(wav)                     spans in seconds of (1, W) at 16 kHz, with silero's own defaults
    voice_activity(wav, 0.06, 0.05)         shorter speech, shorter pauses

    32 ms -> the network of the package -> probability of a voice; speech begins at 0.5 and goes on down to 0.35

Only the network is read: pip install silero-vad (MIT). The detector behind audio/recogniser.py is of another version and finds
other ends.
"""

import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

RATE, CHUNK = 16_000, 512
BEGIN, END = 0.5, 0.35      # probabilities
MARGIN = 0.03               # seconds that a span is widened by at each side


def missing() -> str:
    """What to say where the weights are not installed, else nothing."""
    return "" if find_spec("silero_vad") else "finding speech as benchmarks do needs silero-vad; run: pip install -e \".[eval]\""


@lru_cache(maxsize=1)
def load_detector() -> torch.jit.ScriptModule:
    """Load it once; ValueError with the remedy where its weights are missing."""
    if missing():
        raise ValueError(missing())
    path = Path(str(find_spec("silero_vad").origin)).parent / "data/silero_vad.jit"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)                 # the package has no newer form of this network
        return torch.jit.load(str(path), map_location="cpu").eval()


@torch.no_grad()
def probabilities(wav: Tensor) -> list[float]:
    """The probability of a voice in each 512 samples of (W,)."""
    detector = load_detector()
    detector.reset_states()
    return [float(detector(chunk[None], RATE)) for chunk in F.pad(wav, (0, -len(wav) % CHUNK)).split(CHUNK)]


def voice_activity(wav: Tensor, shortest: float = 0.25, pause: float = 0.1) -> list[tuple[float, float]]:
    """Spans with a voice of more than `shortest` seconds; silence of `pause` seconds or more ends one."""
    sound = wav.detach().float().cpu().reshape(-1)
    if not len(sound):
        return []
    spans, start, quiet = list[list[int]](), -1, -1
    for n, p in enumerate(probabilities(sound)):
        if p >= BEGIN:
            start, quiet = (n * CHUNK if start < 0 else start), -1
        elif p < END and start >= 0:
            quiet = n * CHUNK if quiet < 0 else quiet
            if n * CHUNK - quiet >= pause * RATE:
                spans += [[start, quiet]] if quiet - start > shortest * RATE else []
                start, quiet = -1, -1
    if start >= 0 and len(sound) - start > shortest * RATE:
        spans.append([start, len(sound)])
    return [(start / RATE, end / RATE) for start, end in widened(spans, len(sound))]


def widened(spans: list[list[int]], length: int) -> list[list[int]]:
    """Spans of samples with a margin; neighbours that are too close for it share what is between them."""
    margin = int(MARGIN * RATE)
    for n, span in enumerate(spans):
        span[0] = max(0, span[0] - margin) if n == 0 else span[0]
        if n + 1 == len(spans):
            span[1] = min(length, span[1] + margin)
        else:
            after, gap = spans[n + 1], spans[n + 1][0] - span[1]
            share = gap // 2 if gap < 2 * margin else margin
            span[1], after[0] = min(length, span[1] + share), max(0, after[0] - share)
    return spans
