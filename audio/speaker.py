"""Whose voice it is: the GE2E speaker encoder (Wan et al., 2018, arXiv:1710.10467) with the weights of the package resemblyzer.

    similarity(a, b)        cosine of two voices, 0 to 1: one voice reaches 0.7 to 0.95 in our short clips, two voices 0.4 to 0.6
    embed(wav, rate)        a voice as a vector of length 1     (1, W) -> (256,)

    16 kHz -> loud enough, without pauses -> mel power at 100 Hz -> windows of 1.6 s -> 3 LSTM layers -> linear, ReLU -> mean

Only the weights are read: pip install --no-deps resemblyzer brings them (17 MB, Apache-2.0), without its other packages. Papers
measure with WavLM; these numbers compare voices within a run and are not theirs.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio.hub import torch_file
from audio.hubert import load_strict
from audio.wav import levels, resample
from audio.whisper import HOP, RATE, WINDOW, mel_filters

FRAMES, STEP = 160, 77      # mel frames in a window, and between two
LOUDNESS = -30.0            # dBFS that a quieter recording is raised to
QUIET = 35.0                # dB below the loudest 25 ms: a pause


class SpeakerEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mel: Tensor) -> Tensor:           # (B, 160, 40) -> (B, 256)
        return F.normalize(F.relu(self.linear(self.lstm(mel)[1][0][-1])), dim=1)


def missing() -> str:
    """What to say where the weights are not installed, else nothing."""
    return "" if find_spec("resemblyzer") else "speaker similarity needs the weights in resemblyzer; run: pip install --no-deps resemblyzer"


@lru_cache(maxsize=1)
def load_speaker_encoder() -> SpeakerEncoder:
    """Load it once; ValueError with the remedy where its weights are missing."""
    if missing():
        raise ValueError(missing())
    path = Path(str(find_spec("resemblyzer").origin)).with_name("pretrained.pt")
    encoder, found = SpeakerEncoder(), torch_file(path)
    if not isinstance(found, dict) or not isinstance(found.get("model_state"), dict):
        raise ValueError(f"{path} holds no model_state; install resemblyzer again")
    load_strict(encoder, found["model_state"], {}, "similarity_.*", str(path))
    return encoder.eval()


def without_pauses(wav: Tensor) -> Tensor:
    """(W,) without the stretches of 25 ms in which nobody speaks."""
    level, n = levels(wav[None], RATE), RATE // 40
    return (wav[: len(level) * n].reshape(-1, n)[level > level.max() - QUIET] if len(wav) >= n else wav).reshape(-1)


def mel_power(wav: Tensor) -> Tensor:
    """(W,) -> (W // 160 + 1, 40)"""
    spectrum = torch.stft(wav, WINDOW, HOP, window=torch.hann_window(WINDOW), pad_mode="constant", return_complex=True)
    return (mel_filters(40) @ spectrum.abs() ** 2).T


def embed(wav: Tensor, rate: int) -> Tensor:
    """The voice of a recording (1, W), the mean over windows.   -> (256,), zeros where it is silent"""
    wav = resample(wav.detach().float().cpu().reshape(-1), rate, RATE)
    if not len(wav) or not wav.abs().max():
        return torch.zeros(256)
    wav = wav * max(1.0, float(10 ** (LOUDNESS / 20) / wav.square().mean().sqrt()))
    return embed_voiced(without_pauses(wav))


@torch.no_grad()
def embed_voiced(wav: Tensor) -> Tensor:
    """The mean over the windows of a recording (W,) at 16 kHz without pauses.   -> (256,)"""
    starts = list(range(0, max(1, len(wav) // HOP + 1 - FRAMES + STEP + 1), STEP))
    if len(starts) > 1 and len(wav) - starts[-1] * HOP < 0.75 * FRAMES * HOP:           # too little of the last window is sound
        starts.pop()
    mel = mel_power(F.pad(wav, (0, max(0, (starts[-1] + FRAMES) * HOP - len(wav)))))
    return F.normalize(load_speaker_encoder()(torch.stack([mel[s : s + FRAMES] for s in starts])).mean(0), dim=0)


def similarity(a: tuple[Tensor, int], b: tuple[Tensor, int]) -> float:
    """Cosine of the voices of two recordings (wav, rate)."""
    return float(embed(*a) @ embed(*b))
