"""Sound files in and out, and the resampler.  Everything else in audio/ uses float32 tensors in [-1, 1].

    wav, rate = load_wav("prompt.flac", rate=16_000)     # (1, W): mixed down, resampled
    save_wav("out.wav", wav, rate)                       # 16-bit PCM, written atomically

soundfile reads wav, flac, mp3, ogg and opus.  The header is checked before any sample is read, so a
ten-hour recording is refused at once.  Next: rvq.py, then tiny.py.
"""

import math
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from system.files import replace_file

RESAMPLER = "kaiser-v1"     # part of the token cache's key: change it when a resampled sample would change
MAX_RATE = 384_000
LOUDEST = 4.0               # times full scale; lossy decoders overshoot by less, samples of another scale by far more
MOST = 8 << 30              # bytes of the samples of one file
SWELL = 20_000              # so many times its size a file may grow when it is decoded; silence in FLAC reaches 9,362
ZEROS = 64                  # sinc zero crossings on each side, counted at the lower of the two rates
BETA = 7.86                 # Kaiser shape for 80 dB of stop band
ROLLOFF = 0.96              # cut-off / Nyquist: flat to 0.92 of Nyquist, silent above it


def load_wav(path, rate: int | None = None, channels: int | None = 1,
             max_seconds: float = 4 * 3600) -> tuple[Tensor, int]:
    """Read a sound file as ((C, W) float32 in [-1, 1], rate in Hz), resampled when `rate` is given.

    channels: 1 mixes stereo down, 2 demands a stereo file, None keeps what is there.
    Raises FileNotFoundError or ValueError, one line with the remedy, for a file that cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no sound file at {path}; check the path (those in a manifest start at the manifest's folder)")
    try:
        with soundfile.SoundFile(path) as file:
            _check_header(path, file, channels, max_seconds)
            found = file.samplerate
            wav = torch.from_numpy(file.read(dtype="float32", always_2d=True).T.copy())     # (C, W)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip(" .")
        raise ValueError(f"{path} cannot be read as sound ({reason}); convert it to wav, flac, mp3, ogg or opus") from error
    if wav.shape[1] == 0:
        raise ValueError(f"{path} is empty (0 samples); record it again or leave it out")
    if not torch.isfinite(wav).all():
        raise ValueError(f"{path} holds NaN or infinite samples; export it again as 16-bit PCM")
    if float(peak := wav.abs().max()) > LOUDEST:
        raise ValueError(f"{path} has samples up to {float(peak):,.0f}, far above 1; export it as 16-bit PCM, or divide it by its peak")
    wav = wav.clamp(-1, 1)                          # lossy decoders overshoot full scale a little
    if channels == 1:
        wav = wav.mean(0, keepdim=True)             # (C, W) -> (1, W)
    if rate is None or rate == found:
        return wav, found
    return resample(wav, found, rate).clamp(-1, 1), rate


def _check_header(path: Path, file: soundfile.SoundFile, channels: int | None, max_seconds: float) -> None:
    seconds = file.frames / file.samplerate
    if file.frames == 0:
        raise ValueError(f"{path} is empty (0 samples); record it again or leave it out")
    size, bytes_ = file.frames * file.channels * 4, path.stat().st_size
    if file.samplerate > MAX_RATE or size > min(MOST, max(SWELL * bytes_, 64 << 20)):
        raise ValueError(f"{path} of {bytes_:,} bytes claims {file.frames:,} x {file.channels} samples at {file.samplerate:,} Hz; "
                         + "it is damaged, or cut it into shorter files")
    if seconds > max_seconds:
        raise ValueError(f"{path} lasts {seconds:,.0f} s, the limit is {max_seconds:,.0f} s; cut it into shorter files")
    if channels == 1 and file.channels > 2:
        raise ValueError(f"{path} has {file.channels} channels, expected 1 or 2; mix it down, or choose the one with the voice")
    if channels == 2 and file.channels != 2:
        raise ValueError(f"{path} has {file.channels} channel(s), expected stereo; join the two speakers as left and right")


def levels(wav: Tensor, rate: int) -> Tensor:
    """Level of every 25 ms in dBFS, of the louder channel.   (C, W) -> (W / n,)"""
    n = min(max(1, rate // 40), wav.shape[-1])
    if n == 0:
        return torch.zeros(0)
    return 10 * torch.log10(wav.unfold(-1, n, n).square().mean(-1).amax(0) + 1e-12)


def save_wav(path, wav: Tensor, rate: int) -> None:
    """Write (W,) or (C, W) samples as 16-bit PCM, written atomically, and make the folder."""
    def write(temporary: str) -> None:
        with _writing(path):
            soundfile.write(temporary, _pcm16(wav), rate, subtype="PCM_16", format="WAV")

    replace_file(path, write)


@contextmanager
def _writing(path):
    """Raise soundfile's failure to write all samples (an AssertionError) as an OSError."""
    try:
        yield
    except (soundfile.LibsndfileError, AssertionError) as error:
        reason = getattr(error, "error_string", "the disk is full").strip(" .")
        raise OSError(f"{path} cannot be written ({reason}); free some space or choose another path") from None


def _pcm16(wav: Tensor) -> np.ndarray:
    """(W,) or (C, W) float -> (W, C) int16, scaled by 32,768 as reading does, so a second trip is exact."""
    wav = torch.atleast_2d(wav.detach().float().cpu())
    if not torch.isfinite(wav).all():
        raise ValueError("the sound to save holds NaN or infinite samples; look upstream for the first of them")
    return (wav * 32768).round().clamp(-32768, 32767).to(torch.int16).T.contiguous().numpy()


class WavWriter:
    """A wav file that grows by `append`, for streaming.  Its header is right once it is closed."""

    def __init__(self, path, rate: int, channels: int = 1):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with _writing(path):
            self.file = soundfile.SoundFile(path, "w", rate, channels, subtype="PCM_16", format="WAV")

    def append(self, wav: Tensor) -> None:
        """Add (W,) or (C, W) samples."""
        with _writing(self.path):
            self.file.write(_pcm16(wav))

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "WavWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def resample(wav: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample (..., W) to (..., ceil(W * to / from)) with a Kaiser-windowed sinc, 80 dB of stop band.

    Output n stands at input time n * down / up.  Outputs n, n + up, n + 2 up, ... share one phase, hence one
    filter: they are one strided convolution. Neighbouring phases, few enough for a short filter, go together.
    """
    for rate in (from_rate, to_rate):
        if not (isinstance(rate, int) and 0 < rate <= MAX_RATE):
            raise ValueError(f"cannot resample {from_rate} Hz to {to_rate} Hz; rates are whole numbers from 1 to {MAX_RATE}")
    if from_rate == to_rate or wav.shape[-1] == 0:
        return wav
    common = math.gcd(from_rate, to_rate)
    up, down = to_rate // common, from_rate // common
    half = math.ceil(ZEROS * max(1.0, down / up))               # taps on each side
    length = -(-wav.shape[-1] * up // down)
    blocks = -(-length // up)                                   # outputs of one phase
    x = wav.reshape(-1, 1, wav.shape[-1]).float()               # (..., W) -> (N, 1, W)
    x = F.pad(x, (half, half + (blocks + 1) * down - x.shape[-1]))
    out = x.new_empty(x.shape[0], up, blocks)
    group = max(1, 2 * half * up // down)                       # so many at most double the filter
    for first in range(0, up, group):
        start, kernel = _filters(first, min(first + group, up), up, down, half)         # (phases, 1, width)
        view = x[..., start: start + kernel.shape[-1] + (blocks - 1) * down]
        out[:, first: first + len(kernel)] = F.conv1d(view, kernel.to(x), stride=down)
    return out.transpose(1, 2).reshape(*wav.shape[:-1], up * blocks)[..., :length]


@lru_cache(maxsize=16)       # a corpus has few rates and speeds
def _filters(first: int, end: int, up: int, down: int, half: int) -> tuple[int, Tensor]:
    """The filters (phases, 1, width) of phases first..end-1, and the padded input sample at which they begin."""
    cutoff = ROLLOFF * min(1.0, up / down)                      # in units of the input's Nyquist
    phases = torch.arange(first, end, dtype=torch.float64)
    start = first * down // up
    width = 2 * half + 1 + (int(phases[-1]) * down // up - start)
    taps = torch.arange(width, dtype=torch.float64) + (start - half)
    return start, _windowed_sinc(taps - (phases * down / up)[:, None], cutoff, half).float()[:, None]


def _windowed_sinc(t: Tensor, cutoff: float, half: int) -> Tensor:
    """cutoff * sinc(cutoff t) under a Kaiser window that reaches zero weight outside |t| <= half."""
    inside = (1 - (t / half) ** 2).clamp(min=0).sqrt()
    window = torch.i0(BETA * inside) / torch.i0(torch.tensor(BETA, dtype=t.dtype))
    return cutoff * torch.sinc(cutoff * t) * window * (t.abs() <= half)
