"""Sound files in and out, and the resampler.  Everything else in audio/ uses float32 tensors in [-1, 1].

    wav, rate = load_wav("prompt.flac", rate=16_000)     # (1, W): mixed down, resampled
    save_wav("out.wav", wav, rate)                       # 16-bit PCM, written atomically

soundfile reads wav, flac, mp3, ogg and opus; PyAV, an optional package, what phones make (m4a, aac, webm, mp4).  The header is
checked before any sample is read, so a ten-hour recording is refused at once, and a piece of one is found by seeking.
Next: rvq.py, then tiny.py.
"""

import math
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from system.files import replace_file

MEDIA = (".m4a", ".aac", ".mp4", ".webm", ".mov", ".mkv", ".mka", ".wma", ".amr", ".3gp", ".gsm")       # read by PyAV
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".oga", ".aif", ".aiff", ".au", ".caf", ".w64", *MEDIA)
MEDIA_MARKS = ((b"ftyp", 4), (b"\x1aE\xdf\xa3", 0), (b"\xff\xf1", 0), (b"\xff\xf9", 0), (b"0&\xb2u", 0), (b"#!AMR", 0))   # and where
INSTALL = "pip install av"
RESAMPLER = "kaiser-v1"     # part of the token cache's key: change it when a resampled sample would change
MAX_RATE = 384_000
LOUDEST = 4.0               # times full scale; lossy decoders overshoot by less, samples of another scale by far more
MOST = 8 << 30              # bytes of the samples of one file
SWELL = 20_000              # so many times its size a file may grow when it is decoded; silence in FLAC reaches 9,362
HOLLOW = 500                # so many times its size only silence grows
OVER = 0.5                  # seconds that a piece may end after its recording: lists round
ZEROS = 64                  # sinc zero crossings on each side, counted at the lower of the two rates
BETA = 7.86                 # Kaiser shape for 80 dB of stop band
ROLLOFF = 0.96              # cut-off / Nyquist: flat to 0.92 of Nyquist, silent above it


def load_wav(path, rate: int | None = None, channels: int | None = 1, max_seconds: float = 4 * 3600,
             begin: float = 0.0, seconds: float | None = None) -> tuple[Tensor, int]:
    """Read a sound file as ((C, W) float32 in [-1, 1], rate in Hz), resampled when `rate` is given.

    channels: 1 mixes stereo down, 2 demands a stereo file, None keeps what is there. `begin` and `seconds` name a piece.
    Raises FileNotFoundError or ValueError, one line with the remedy, for a file that cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no sound file at {path}; check the path (those in a manifest start at the manifest's folder)")
    try:
        with soundfile.SoundFile(path) as file:
            found, (first, count) = file.samplerate, _check_header(path, file, channels, max_seconds, begin, seconds)
            wav = torch.from_numpy(_read_frames(path, file, first, count).T.copy())         # (C, W)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip(" .")
        wav, found = _read_media(path, reason, channels, max_seconds, begin, seconds)
    if wav.shape[1] == 0:
        raise ValueError(f"{path} is empty (0 samples); record it again or leave it out")
    if not torch.isfinite(wav).all():
        raise ValueError(f"{path} holds NaN or infinite samples; export it again as 16-bit PCM")
    if float(peak := wav.abs().max()) > LOUDEST:
        raise ValueError(f"{path} has samples up to {float(peak):,.0f}, far above 1; export it as 16-bit PCM, or divide it by its peak")
    wav = wav.clamp(-1, 1)                          # lossy decoders overshoot full scale a little
    if channels == 1:
        wav = mix(wav)
    if rate is None or rate == found:
        return wav, found
    return resample(wav, found, rate).clamp(-1, 1), rate


def mix(wav: Tensor) -> Tensor:
    """Mix channels down; of two that cancel each other the left one is taken.   (C, W) -> (1, W)"""
    return wav[:1] if opposite(wav) else wav.mean(0, keepdim=True)


def opposite(wav: Tensor) -> bool:
    """Whether two channels (2, W) are in opposite phase, so that nothing is left of their sum."""
    return len(wav) == 2 and float(wav.sum(0).square().mean()) < 0.01 * float(wav.square().sum(0).mean())


def _check_header(path: Path, file: soundfile.SoundFile, channels: int | None, max_seconds: float, begin: float,
                  seconds: float | None) -> tuple[int, int]:
    """Check what a file says of itself; returns the first frame of the piece and the number of its frames."""
    bytes_ = path.stat().st_size
    if _cut_short(path, bytes_):
        raise ValueError(f"{path} is truncated; its end is missing: copy or download it again")
    if file.frames == 0:
        raise ValueError(f"{path} is empty (0 samples); record it again or leave it out")
    first, count = _piece(path, file.frames, file.samplerate, max_seconds, begin, seconds)
    if file.samplerate > MAX_RATE or count * file.channels * 4 > min(MOST, max(SWELL * bytes_, 64 << 20)):
        raise ValueError(f"{path} of {bytes_:,} bytes claims {file.frames:,} x {file.channels} samples at {file.samplerate:,} Hz; "
                         + "it is damaged, or cut it into shorter files")
    _check_channels(path, file.channels, channels)
    if count * file.channels * 4 > max(HOLLOW * bytes_, 64 << 20) and file.seekable() and _no_sound(file):
        raise ValueError(f"{path} has no sound at all; export it again from its source")
    return first, count


def _piece(path: Path, frames: int, rate: int, max_seconds: float, begin: float, seconds: float | None) -> tuple[int, int]:
    """The first frame of a piece and the number of its frames."""
    first, end = round(begin * rate), frames if seconds is None else round((begin + seconds) * rate)
    if first >= frames > 0 or end > frames + OVER * rate:
        raise ValueError(f"{path} lasts {frames / rate:,.2f} s, the piece is at {begin:,.2f} to {end / rate:,.2f} s, outside of it; "
                         + "correct its offset and duration")
    count = min(end, frames) - first
    if count > max_seconds * rate:
        raise ValueError(f"{path} lasts {count / rate:,.0f} s, the limit is {max_seconds:,.0f} s; cut it into shorter files")
    return first, count


def _check_channels(path: Path, found: int, wanted: int | None) -> None:
    if wanted == 1 and found > 2:
        raise ValueError(f"{path} has {found} channels, expected 1 or 2; mix it down, or choose the one with the voice")
    if wanted == 2 and found != 2:
        raise ValueError(f"{path} has {found} channel(s), expected stereo; join the two speakers as left and right")


def _read_frames(path: Path, file: soundfile.SoundFile, first: int, count: int) -> np.ndarray:
    """Frames of an open file (W, C), found by seeking where its format can."""
    try:
        skip = 0 if file.seekable() else first
        if first and not skip:
            file.seek(first)
        found = file.read(skip + count, dtype="float32", always_2d=True)[skip:]
    except soundfile.LibsndfileError:
        found = np.empty((0, 1), np.float32)
    if len(found) < count - max(0.1 * file.samplerate, 0.01 * count):
        raise ValueError(f"{path} is truncated; {len(found):,} of {count:,} samples can be read: copy or download it again")
    return found


def _cut_short(path: Path, size: int) -> bool:
    """Whether the end of a RIFF, AIFF or Ogg file is missing. A stream that was not closed has 2^31 or more for its length."""
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(max(0, size - (1 << 17)))
        tail = file.read() if head[:4] == b"OggS" else b""
    if head[:4] in (b"RIFF", b"FORM"):
        claimed = int.from_bytes(head[4:], "little" if head[:4] == b"RIFF" else "big") + 8
        return 1.01 * size + 16 < claimed < 1 << 31
    page = tail[tail.rfind(b"OggS"):] if b"OggS" in tail else b""              # 27 bytes, the sizes of its segments, the segments
    return len(page) > 26 and not (page[5] & 4 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]]))


def _no_sound(file: soundfile.SoundFile) -> bool:
    """Whether a second at each of 16 places is exactly zero: of a file that is far too small for its length."""
    for n in range(16):
        file.seek(file.frames * n // 16)
        if file.read(file.samplerate, dtype="float32").any():
            return False
    return True


def is_media(head: bytes) -> bool:
    """Whether a file begins as those do that PyAV reads."""
    return any(head[at:].startswith(mark) for mark, at in MEDIA_MARKS)


def _read_media(path: Path, reason: str, channels: int | None, max_seconds: float, begin: float,
                seconds: float | None) -> tuple[Tensor, int]:
    """Read the sound track of a file that libsndfile refused for `reason`: (C, W) and its rate."""
    with path.open("rb") as file:
        head = file.read(200)
    if not head:
        raise ValueError(f"{path} has 0 bytes and cannot be read as sound; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git-LFS pointer, not the file; run `git lfs pull` in its folder")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page, not a sound; download the file itself")
    if not (path.suffix.lower() in MEDIA or is_media(head)):
        raise ValueError(f"{path} cannot be read as sound ({reason}); convert it to wav, flac, mp3, ogg or opus")
    try:
        import av
    except ImportError:
        raise ValueError(f"{path} needs PyAV to be read; run `{INSTALL}`, or convert it to wav or flac") from None
    try:
        with av.open(str(path)) as container:
            return _decode_track(path, container, channels, max_seconds, begin, seconds)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as sound ({str(error).strip(' .')}); convert it to wav or flac") from None


def _decode_track(path: Path, container: Any, channels: int | None, max_seconds: float, begin: float,
                  seconds: float | None) -> tuple[Tensor, int]:
    """Decode the first sound track of an open PyAV container, from a second before the piece on."""
    import av

    track = container.streams.audio[0]
    rate = track.codec_context.sample_rate
    _check_channels(path, track.codec_context.channels, channels)
    if begin > 1:
        container.seek(round((begin - 1) / track.time_base), stream=track)
    to_float = av.AudioResampler("fltp", track.codec_context.layout, rate)
    parts, start, got, end = [], None, 0, begin + (max_seconds if seconds is None else seconds)
    for frame in container.decode(track):
        start = float(frame.time or 0) if start is None else start
        parts += [torch.from_numpy(f.to_ndarray()) for f in to_float.resample(frame)]
        got += frame.samples
        if start + got / frame.sample_rate > end + 1:
            break
    whole = torch.cat([*parts, *(torch.from_numpy(f.to_ndarray()) for f in to_float.resample(None))], 1) if parts else torch.zeros(1, 0)
    before = round((start or 0) * rate)
    first, count = _piece(path, before + whole.shape[1], rate, max_seconds, begin, seconds)
    return whole[:, max(0, first - before) : first - before + count], rate


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


class WavWriter(AbstractContextManager):
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
    t = torch.arange(width, dtype=torch.float64) + (start - half) - (phases * down / up)[:, None]
    inside = (1 - (t / half) ** 2).clamp(min=0).sqrt()          # of a Kaiser window that is zero outside |t| <= half
    window = torch.i0(BETA * inside) / torch.i0(torch.tensor(BETA, dtype=t.dtype))
    return start, (cutoff * torch.sinc(cutoff * t) * window * (t.abs() <= half)).float()[:, None]
