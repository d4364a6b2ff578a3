"""Pitch and loudness of a voice over time, as Praat measures them (Boersma, 1993, "Accurate short-term analysis of the fundamental
frequency and the harmonics-to-noise ratio of a sampled sound").

    pitch(wav, rate)        Hz every 10 ms, 0 where there is no voice       (1, W) -> (n,)
    loudness(wav, rate)     dB re 2e-5, with samples as pascals             (1, W) -> (n,)

A frame's pitch is a peak of its autocorrelation divided by that of its window, which undoes the fall that the window causes. A path
through the candidates of all frames, "no voice" among them, pays for octave jumps and for beginnings and ends of a voice.
"""

import math

import torch
from torch import Tensor

STEP = 0.01                 # seconds between frames
CANDIDATES = 15             # of a frame, "no voice" included
SILENT, VOICED = 0.03, 0.45             # thresholds of loudness (as a share of the peak) and of periodicity
OCTAVE, JUMP, SWITCH = 0.01, 0.35, 0.14         # costs: of low pitch, of an octave between frames, of a beginning or end of a voice


def frames(wav: Tensor, rate: int, seconds: float) -> Tensor:
    """Windows of `seconds`, STEP apart, centred in the sound.   (W,) -> (n, w); n = 0 for a sound that is shorter"""
    width, hop = 2 * round(seconds * rate / 2), STEP * rate
    count = int((len(wav) - width) / hop) + 1 if len(wav) >= width else 0
    first = (len(wav) - width - (count - 1) * hop) / 2
    return wav[(first + hop * torch.arange(count, dtype=torch.float64)).round().long()[:, None] + torch.arange(width)]


def loudness(wav: Tensor, rate: int, lowest: float = 100.0) -> Tensor:
    """Intensity under a Kaiser window of 6.4 periods of the `lowest` pitch."""
    part = frames(wav.detach().double().cpu().reshape(-1), rate, 6.4 / lowest)
    place = torch.linspace(-1, 1, part.shape[1] + 2, dtype=torch.float64)[1:-1]
    weight = torch.special.i0((2 * math.pi**2 + 0.5) * (1 - place**2).clamp(min=0).sqrt())
    centred = part - part.mean(1, keepdim=True)
    return 10 * ((centred.square() * weight).sum(1) / weight.sum() / 4e-10).clamp(min=1e-30).log10()


def pitch(wav: Tensor, rate: int, lowest: float = 50.0, highest: float = 600.0) -> Tensor:
    """The fundamental frequency of each frame, 0 where it has none."""
    sound = wav.detach().double().cpu().reshape(-1)
    part = frames(sound, rate, 3 / lowest)
    if not len(part) or not (loudest := float((sound - sound.mean()).abs().max())):
        return torch.zeros(len(part), dtype=torch.float64)
    hertz, strength = candidates(part, rate, lowest, highest, loudest)
    return best_path(hertz, strength, highest)


def candidates(part: Tensor, rate: int, lowest: float, highest: float, loudest: float) -> tuple[Tensor, Tensor]:
    """Frequencies (n, CANDIDATES), 0 for no voice and -1 for nothing, and their strengths."""
    n, width = part.shape
    window = torch.hann_window(width, dtype=torch.float64)
    size = 2 ** math.ceil(math.log2(1.5 * width))
    part = part - part.mean(1, keepdim=True)
    middle = part[:, width // 2 - round(rate / lowest / 2) : width // 2 + round(rate / lowest / 2)]
    loud = middle.abs().amax(1) / loudest
    power = torch.fft.irfft(torch.fft.rfft(part * window, size).abs() ** 2)[:, : size // 2]
    own = torch.fft.irfft(torch.fft.rfft(window, size).abs() ** 2)[: size // 2]
    first, last = max(2, int(rate / highest)), min(int(rate / lowest) + 2, width // 2)
    r = power[:, : last + 1] / power[:, :1].clamp(min=1e-300) / (own[: last + 1] / own[0])
    left, here, right = r[:, first - 1 : last - 1], r[:, first:last], r[:, first + 1 : last + 1]
    peak = (here > 0.5 * VOICED) & (here > left) & (here >= right)
    slope, curve = (right - left) / 2, 2 * here - left - right
    shift = torch.where(peak, slope / curve, 0.0)
    lag = (torch.arange(first, last) + shift) / rate
    height = torch.where(peak, here + 0.5 * slope * shift, 0.0)
    height = torch.where(height > 1, 1 / height.clamp(min=1e-9), height)
    frequency = 1 / lag
    kept = peak & (frequency >= lowest) & (frequency <= highest)
    strong = torch.where(kept, height - OCTAVE * torch.log2(lowest * lag), -math.inf)
    most = min(CANDIDATES - 1, strong.shape[1])
    strength, place = strong.topk(most, 1)
    hertz = torch.where(strength.isfinite(), frequency.gather(1, place), -1.0)
    none = VOICED + (2 - loud / (SILENT / (1 + VOICED))).clamp(min=0)
    return torch.cat([torch.zeros(n, 1, dtype=hertz.dtype), hertz], 1), torch.cat([none[:, None], strength], 1)


def best_path(hertz: Tensor, strength: Tensor, highest: float) -> Tensor:
    """Viterbi's path through the candidates.   (n, c), (n, c) -> (n,)"""
    score, back = strength[0], []
    voiced, octave = hertz > 0, torch.log2(hertz.clamp(min=1e-9))
    for t in range(1, len(hertz)):
        both, one = voiced[t - 1][:, None] & voiced[t][None], voiced[t - 1][:, None] != voiced[t][None]
        cost = torch.where(both, JUMP * (octave[t - 1][:, None] - octave[t][None]).abs(), SWITCH * one)
        reached, came = (score[:, None] - cost).max(0)
        score = reached + strength[t]
        back.append(came)
    at = int(score.argmax())
    path = [at]
    for came in reversed(back):
        at = int(came[at])
        path.append(at)
    return hertz.gather(1, torch.tensor(path[::-1])[:, None])[:, 0].clamp(min=0)


def voice(wav: Tensor, rate: int) -> dict[str, float]:
    """Mean and deviation of the pitch in Hz where there is a voice, and of the loudness in dB; {} for a sound that is too short."""
    hertz, level = pitch(wav, rate), loudness(wav, rate)
    found, hertz = {}, hertz[hertz > 0]
    for name, values in (("pitch", hertz), ("intensity", level)):
        if len(values):
            found |= {f"mean_{name}": float(values.mean()), f"std_{name}": float(values.std()) if len(values) > 1 else 0.0}
    return found
