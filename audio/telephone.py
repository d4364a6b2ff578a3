"""Telephone speech: simulate a line, find the turns of a recorded call, and the hold music in it.

    line = telephone(wav, rate, law="a", snr=15, loss=0.05)     # as it arrives at the other end, at the same rate
    for channel, start, end, crosstalk in turns(call, rate):    # a stereo call, one speaker a channel
        ...

A line is 8 kHz, 300 to 3400 Hz, 8 bits a sample on a logarithmic scale (ITU-T G.711), 20 ms a packet, and some packets are lost.
Codecs of this repository take it after `resample`: frequencies above 3.4 kHz stay lost. Next: diarise.py.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.wav import resample

RATE = 8000
LOW, HIGH = 300, 3400       # Hz
TAPS = 401                  # of the band filter: 50 ms, its edges are 100 Hz wide
PACKET = 160                # samples, 20 ms
SPAN, PAUSE, SHORTEST = 0.03, 0.3, 0.12     # seconds: what loudness is measured over, the gap that ends speech, the least speech
FLOOR = -50.0               # dBFS; below is no speech


# ---- G.711 ----

@lru_cache(maxsize=2)
def decode_table(law: str) -> Tensor:
    """What each of the 256 codes stands for, int32 on the scale of 16-bit samples.  ITU-T G.711, tables 1 and 2.

    A code is a sign, a segment of 3 bits and a place of 4 bits in it; each segment is twice as wide as the one below.
    On the line mu-law codes are inverted as a whole, A-law codes in every other bit (and in the sign).
    """
    if law not in ("mu", "a"):
        raise ValueError(f"there is no {law!r} law of G.711; choose mu (America, Japan) or a (elsewhere)")
    code = torch.arange(256, dtype=torch.int32) ^ (0xFF if law == "mu" else 0xD5)
    segment, place = code >> 4 & 7, code & 15
    if law == "mu":                                                     # of 14 bits
        size = (((2 * place + 33) << segment) - 33) * 4
    else:                                                               # of 13 bits; the first two segments are equally wide
        size = torch.where(segment == 0, 2 * place + 1, (2 * place + 33) << (segment - 1).clamp(min=0)) * 8
    return torch.where(code >= 128, -size, size)


@lru_cache(maxsize=2)
def encode_table(law: str) -> Tensor:
    """The code of each 16-bit sample, uint8 (65536,), index sample + 32768.

    Negative samples are complemented bit by bit first, as in ITU-T's own program (G.191): one on the edge of two steps goes to 0.
    """
    sample = torch.arange(-32768, 32768, dtype=torch.int32)
    size = torch.where(sample < 0, ~sample, sample)
    size = (size >> 2).clamp(max=8158) + 33 if law == "mu" else size >> 2
    segment = (size[:, None] >= 64 << torch.arange(7)).sum(1)
    place = size >> (segment + 1 if law == "mu" else segment.clamp(min=1) + 1) & 15
    return ((segment << 4 | place | torch.where(sample < 0, 128, 0)) ^ (0xFF if law == "mu" else 0xD5)).to(torch.uint8)


def g711_encode(wav: Tensor, law: str = "mu") -> Tensor:
    """Samples (...) in [-1, 1] -> codes (...) uint8; louder ones are clipped."""
    if not torch.isfinite(wav).all():
        raise ValueError("the sound holds NaN or infinite samples; look upstream for the first of them")
    sample = (wav.double() * 32768).round().clamp(-32768, 32767).long()
    decode_table(law)                               # raises for another law
    return encode_table(law).to(wav.device)[sample + 32768]


def g711_decode(codes: Tensor, law: str = "mu") -> Tensor:
    """Codes (...) uint8 -> samples (...) in (-1, 1)."""
    if codes.dtype != torch.uint8:
        raise ValueError(f"G.711 codes are {codes.dtype}, expected uint8; use torch.frombuffer(bytes, dtype=torch.uint8)")
    return decode_table(law).to(codes.device)[codes.long()] / 32768


# ---- the line ----

def telephone(wav: Tensor, rate: int, law: str = "mu", snr: float | None = None, loss: float = 0.0, seed: int = 0) -> Tensor:
    """Send sound (..., W) through a line, and give it back (..., W) at its rate.

    snr: noise where the speaker stands, in dB below the speech; None for none.  loss: the share of packets that do not arrive.
    """
    if wav.shape[-1] == 0:
        return wav
    line = resample(wav, rate, RATE)
    if snr is not None:
        line = add_noise(line, snr, seed)
    line = lose_packets(g711_decode(g711_encode(band_pass(line), law), law), loss, seed)[0]
    return resample(line, RATE, rate)[..., : wav.shape[-1]].clamp(-1, 1)


def band_pass(wav: Tensor) -> Tensor:
    """Keep 300 to 3400 Hz of sound (..., W) at 8 kHz: half the amplitude at the edges, -50 dB 100 Hz further out; no delay."""
    t = torch.arange(TAPS, dtype=torch.float64) - TAPS // 2
    kernel = sum(sign * 2 * edge / RATE * torch.sinc(2 * edge / RATE * t) for sign, edge in ((1, HIGH), (-1, LOW)))
    kernel = (kernel * torch.hamming_window(TAPS, periodic=False, dtype=torch.float64)).to(wav)
    return F.conv1d(wav.reshape(-1, 1, wav.shape[-1]), kernel[None, None], padding=TAPS // 2).view(wav.shape)


def add_noise(wav: Tensor, snr: float, seed: int = 0) -> Tensor:
    """Add white noise `snr` dB below the mean power of each channel of (..., W)."""
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(seed)).to(wav)
    return wav + noise * (wav.square().mean(-1, keepdim=True) / 10 ** (snr / 10)).sqrt()


def lose_packets(wav: Tensor, loss: float, seed: int = 0, packet: int = PACKET) -> tuple[Tensor, Tensor]:
    """Lose a share of the packets of (..., W).  -> sound as the other end conceals it, and which packets were lost (..., n)

    The last packet that came is repeated, each time 6 dB softer; before the first one there is silence.
    """
    if not 0 <= loss <= 1:
        raise ValueError(f"loss is {loss}, expected a share of the packets from 0 to 1; 0.05 is a bad line")
    W = wav.shape[-1]
    packets = F.pad(wav, (0, -W % packet)).unflatten(-1, (-1, packet))                  # (..., n, packet)
    lost = (torch.rand(packets.shape[:-1], generator=torch.Generator().manual_seed(seed)) < loss).to(wav.device)
    place = torch.arange(packets.shape[-2], device=wav.device).expand(lost.shape)
    came = torch.where(lost, -1, place).cummax(-1).values                               # the last packet received, -1 for none
    audible = packets.gather(-2, came.clamp(min=0)[..., None].expand(packets.shape))
    return (audible * torch.where(came < 0, 0.0, 0.5 ** (place - came)).to(wav)[..., None]).flatten(-2)[..., :W], lost


# ---- calls ----

class Turn(NamedTuple):
    """Someone speaks.   channel 0 or 1, start and end in seconds, crosstalk: the other one speaks too in the meantime"""
    channel: int
    start: float
    end: float
    crosstalk: bool


def turns(wav: Tensor, rate: int, leak: float = 25) -> list[Turn]:
    """Take a stereo call (2, W) apart, one speaker a channel, by loudness: turns in the order in which they begin.

    What one speaker says until the other begins is one turn, whatever the pauses.
    """
    return turns_of(spoken(wav, rate, leak))


def turns_of(spans: Sequence[tuple[float, float, int]]) -> list[Turn]:
    """Join spans (start, end, channel) of one speaker until the other one begins."""
    found: list[Turn] = []
    for start, end, channel in sorted(spans):
        if found and found[-1].channel == channel:
            found[-1] = found[-1]._replace(end=max(end, found[-1].end))
        else:
            found.append(Turn(channel, start, end, False))
    return [t._replace(crosstalk=any(c != t.channel and s < t.end and e > t.start for s, e, c in spans)) for t in found]


def spoken(wav: Tensor, rate: int, leak: float = 25) -> list[tuple[float, float, int]]:
    """When each channel of (2, W) speaks: start and end in seconds, and the channel, in the order in which they begin.

    What is `leak` dB below the other channel is no speech: that is then audible through the wall.
    """
    if wav.dim() != 2 or wav.shape[0] != 2:
        raise ValueError(f"the call is {tuple(wav.shape)}, expected (2, W), a speaker a channel; read it with load_wav(path, channels=2)")
    step = round(SPAN * rate)
    if wav.shape[1] < step:
        return []
    level = frame_levels(wav, step)                                                     # (2, n)
    spans = sorted((*span, channel) for channel in (0, 1) for span in speech(level[channel], level[1 - channel] - leak))
    return [(start * step / rate, end * step / rate, channel) for start, end, channel in spans]


def frame_levels(wav: Tensor, step: int) -> Tensor:
    """Level of every `step` samples in dBFS, without what is constant in them.   (C, W) -> (C, W // step)"""
    frames = wav[:, : wav.shape[1] // step * step].unflatten(1, (-1, step))
    return 10 * frames.var(-1, unbiased=False).clamp(min=1e-10).log10()


def speech(level: Tensor, leaked: Tensor) -> list[tuple[int, int]]:
    """Spans of frames (start, end) in which a channel speaks.   level, leaked (n,) dBFS

    It begins 9 dB above the noise, the channel's quietest tenth, or 6 dB below its loudest twentieth where that is lower
    (someone who never pauses), and goes on 5 dB further down: loudness dips within words.
    """
    begin = max(FLOOR, min(float(level.quantile(0.1)) + 9, float(level.quantile(0.95)) - 6))
    audible = (level > leaked).tolist()
    spans: list[tuple[int, int]] = []
    speaking = False
    for n, loud in enumerate(level.tolist()):
        speaking = audible[n] and loud > (begin - 5 if speaking else begin)
        if speaking and spans and n - spans[-1][1] < round(PAUSE / SPAN):
            spans[-1] = (spans[-1][0], n + 1)
        elif speaking:
            spans.append((n, n + 1))
    return [(start, end) for start, end in spans if end - start >= round(SHORTEST / SPAN)]


HELD = 0.08                 # of the power of a spectrum is still there 0.2 s later: music reaches 0.2, speech 0.1


def held_sounds(wav: Tensor, rate: int, shortest: float = 5.0) -> list[tuple[float, float]]:
    """When a channel (1, W) holds tones as hold music does, and voices do not, for `shortest` seconds or more."""
    wav, n, hop, later = resample(wav, rate, RATE)[0], 1024, 256, 6
    if len(wav) <= n:
        return []
    kept, loud = [], []
    for at in range(0, len(wav) - n, 60 * RATE):                                # a minute at a time
        piece = F.pad(wav[at : at + 60 * RATE + later * hop], (n // 2, n // 2))
        power = torch.stft(piece, n, hop, window=torch.hann_window(n), center=False, return_complex=True)[20:440].abs().square()
        floor = power.quantile(0.2, 1)                                          # of noise; tones are narrow and stay out of the median
        floor = F.pad(floor[None], (15, 15), "replicate").unfold(1, 31, 1).median(-1).values[0]
        power = (power - 3 * floor[:, None]).clamp(min=0)
        now, then = power[:, :-later], power[:, later:]
        beside = then.roll(4, 0)                                                # what noise would keep by chance
        kept.append((torch.minimum(now, then) - torch.minimum(now, beside)).sum(0) / torch.maximum(now, then).sum(0).clamp(min=1e-12))
        loud.append(power.sum(0)[:-later])
    share, level = torch.cat(kept), torch.cat(loud)
    heard = (level > 0.15 * level.quantile(0.9)).float()
    width = round(4 * RATE / hop) | 1
    total = F.avg_pool1d(torch.stack([share * heard, heard])[:, None], width, 1, width // 2, count_include_pad=False)[:, 0]
    held = ((total[0] > HELD * total[1]) & (total[1] > 0.1)).tolist()
    spans: list[tuple[int, int]] = []
    for i, is_held in enumerate([*held, False]):
        if is_held and (i == 0 or not held[i - 1]):
            spans.append((i, len(held)))
        elif not is_held and i and held[i - 1]:
            spans[-1] = (spans[-1][0], i)
    blur = round(1.2 * RATE / hop)                                              # the mean reaches over the ends
    spans = [(a + blur * (a > 0), b - blur * (b < len(held))) for a, b in spans if (b - a) * hop / RATE >= shortest]
    return [(a * hop / RATE, b * hop / RATE) for a, b in spans]


def without(spans: Sequence[tuple[float, float, int]], held: Sequence[tuple[float, float]],
            shortest: float = 3.0) -> list[tuple[float, float, int]]:
    """Spans without what is held; a rest of one below `shortest` seconds goes with it. Where little of a short span is held, it stays."""
    found: list[tuple[float, float, int]] = []
    for start, end, who in spans:
        inside = [(max(a, start), min(b, end)) for a, b in held if a < end and b > start]
        inside = [] if end - start < 8 and sum(b - a for a, b in inside) < (end - start) / 2 else inside
        edges = [start, *(edge for pair in inside for edge in pair), end]
        found += [(a, b, who) for a, b in zip(edges[::2], edges[1::2], strict=True) if not inside or b - a >= shortest]
    return found
