"""HiFT, a vocoder (HiFTNet, arXiv:2309.09493): mel spectrum -> pitch -> a source of harmonics and noise -> sound at 24 kHz.

    mel -> pitch -> sines and noise -> STFT ----+---------+---------+
    mel -> convolution -> x 8 -> + -> x 5 -> + -> x 3 -> + -> magnitude and phase -> inverse STFT, 4 samples a step
    (B, 80, S)                                                                       (B, 480 S)

The network does not generate the fine structure of a voice, it only filters it (the neural source filter, arXiv:1904.12088).
As in CosyVoice 2 and MOSS-Speech; module names are the official ones.  The published source samples new noise each
time; here the noise is a fixed function of the frame number, so the same mel gives the same sound, whole or in pieces.
Next: moss.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio.higgs import snake

RATE, MELS = 24_000, 80
FRAME = 480                 # samples in a frame of mel: 20 ms
UPS, KERNELS = (8, 5, 3), (16, 11, 7)           # strides and kernels of the upsampling, times STEP
RES_KERNELS, SOURCE_KERNELS, DILATIONS = (3, 7, 11), (7, 7, 11), (1, 3, 5)
FFT, STEP = 16, 4           # of the STFT and its inverse
PITCH = 5                   # frames to each side that a frame's pitch depends on
BEFORE, BEHIND = 16, 20     # frames that its sound depends on: 15 through the source, and behind it also their pitch's 5
VOICED = 10                 # Hz; below is noise alone
SINE, BREATH, HISS = 0.1, 0.003, 0.1 / 3        # amplitudes: a harmonic, the noise beside it, and where there is no voice


@dataclass(frozen=True)
class HiftConfig:
    """Sizes of the vocoder, 20.8 M weights."""
    width: int = 512
    harmonics: int = 8          # above the fundamental
    pitch_width: int = 512


class Hift(nn.Module):
    """Harmonics of the pitch and noise, shaped by the mel: upsampled x 120, then magnitudes and phases of an inverse STFT."""

    def __init__(self, config: HiftConfig):
        super().__init__()
        widths = [config.width >> n for n in range(len(UPS) + 1)]
        self.f0_predictor = Pitch(config.pitch_width)
        self.m_source = nn.Module()
        self.m_source.l_linear = nn.Linear(config.harmonics + 1, 1)
        self.conv_pre = nn.Conv1d(MELS, widths[0], 7, padding=3)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(widths[n], widths[n + 1], k, u, (k - u) // 2)
                                 for n, (u, k) in enumerate(zip(UPS, KERNELS, strict=True)))
        strides = [math.prod(UPS[n + 1:]) for n in range(len(UPS))]                     # 15, 3, 1: the source comes down to each rate
        self.source_downs = nn.ModuleList(nn.Conv1d(FFT + 2, width, 2 * s if s > 1 else 1, s, s // 2)
                                          for s, width in zip(strides, widths[1:], strict=True))
        self.source_resblocks = nn.ModuleList(SnakeBlock(width, k) for width, k in zip(widths[1:], SOURCE_KERNELS, strict=True))
        self.resblocks = nn.ModuleList(SnakeBlock(width, k) for width in widths[1:] for k in RES_KERNELS)
        self.conv_post = nn.Conv1d(widths[-1], FFT + 2, 7, padding=3)

    def source(self, f0: Tensor, phase: Tensor, first: int) -> Tensor:
        """Pitch (B, S) in Hz of the frames from number `first` on, and the cycles (B, harmonics + 1) run before -> (B, 480 S).

        The phase runs straight from the middle of a frame to that of the next.  In double precision, since it adds up.
        """
        cycles = phase[:, :, None] + self.cycles(f0).cumsum(2)                          # (B, H, S)
        cycles = F.interpolate(cycles, scale_factor=FRAME, mode="linear")
        voiced = (f0 > VOICED).to(f0).repeat_interleave(FRAME, 1)[:, None]                  # (B, 1, 480 S)
        drawn = [torch.randn(phase.shape[1], FRAME, generator=torch.Generator().manual_seed(first + n)) for n in range(f0.shape[1])]
        hiss = torch.cat(drawn, 1).to(f0) * (voiced * BREATH + (1 - voiced) * HISS)
        sines = torch.sin(cycles % 1 * (2 * torch.pi)).to(f0) * SINE * voiced + hiss
        return torch.tanh(self.m_source.l_linear(sines.transpose(1, 2)))[:, :, 0]

    def cycles(self, f0: Tensor) -> Tensor:
        """What each harmonic's phase gains in a frame, (B, S) -> (B, harmonics + 1, S)."""
        return f0.double()[:, None] * torch.arange(1, self.m_source.l_linear.in_features + 1, device=f0.device)[:, None] * (FRAME / RATE)

    def forward(self, mel: Tensor, source: Tensor) -> Tensor:       # (B, 80, S), (B, 480 S) -> (B, 480 S)
        window = torch.hann_window(FFT, device=mel.device)
        spectrum = torch.view_as_real(torch.stft(source, FFT, STEP, window=window, return_complex=True))
        spectrum = torch.cat([spectrum[..., 0], spectrum[..., 1]], 1)                   # (B, 18, 120 S + 1)
        x = self.conv_pre(mel)
        for n, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            if n == len(UPS) - 1:
                x = F.pad(x, (1, 0), mode="reflect")                # as many steps as the STFT has
            x = x + self.source_resblocks[n](self.source_downs[n](spectrum))
            x = sum(block(x) for block in self.resblocks[len(RES_KERNELS) * n:][: len(RES_KERNELS)]) / len(RES_KERNELS)
        magnitude, phase = self.conv_post(F.leaky_relu(x)).chunk(2, 1)
        spectrum = torch.polar(magnitude.exp().clamp(max=100), phase.sin())
        return torch.istft(spectrum, FFT, STEP, window=window).clamp(-0.99, 0.99)


class HiftStream:
    """The vocoder piece by piece; `hold` frames wait for those behind them.  See BEFORE and BEHIND for why that is exact."""

    def __init__(self, hift: Hift, hold: int = BEHIND):
        self.hift, self.hold = hift, hold
        self.mel = self.f0 = self.phase = None      # (B, 80, m) from frame `first` on; the pitch that is certain; cycles before `first`
        self.first = self.done = 0                  # numbers of frames: of self.mel's first, and of the next to give

    def push(self, mel: Tensor, final: bool) -> Tensor:
        """Take mel (B, 80, n >= 0), give the samples (B, m >= 0) that are certain, all when final."""
        if self.mel is None:
            self.mel, self.f0 = mel[:, :, :0], mel[:, 0, :0]
            self.phase = mel.new_zeros(len(mel), self.hift.m_source.l_linear.in_features, dtype=torch.float64)
        self.mel = torch.cat([self.mel, mel], 2)
        end = self.first + self.mel.shape[2]
        until = end if final else max(end - self.hold, self.done)
        if until == self.done:
            return mel.new_zeros(len(mel), 0)
        f0 = torch.cat([self.f0, self.hift.f0_predictor(self.mel)[:, self.f0.shape[1]:]], 1)
        wav = self.hift(self.mel, self.hift.source(f0, self.phase, self.first))
        wav = wav[:, (self.done - self.first) * FRAME: (until - self.first) * FRAME]
        gone, certain = max(0, until - BEFORE) - self.first, end - PITCH - self.first       # frames not needed again, and of final pitch
        self.phase = (self.phase + self.hift.cycles(f0[:, :gone]).sum(2)) % 1
        self.mel, self.f0, self.first = self.mel[:, :, gone:], f0[:, gone: max(certain, gone)], self.first + gone
        self.done = until
        return wav


class Pitch(nn.Module):
    """Mel -> Hz.  Five convolutions see 5 frames to each side."""

    def __init__(self, width: int):
        super().__init__()
        convs = (nn.Conv1d(width if n else MELS, width, 3, padding=1) for n in range(PITCH))
        self.condnet = nn.Sequential(*(module for conv in convs for module in (conv, nn.ELU())))
        self.classifier = nn.Linear(width, 1)

    def forward(self, mel: Tensor) -> Tensor:       # (B, 80, S) -> (B, S)
        return self.classifier(self.condnet(mel).transpose(1, 2))[:, :, 0].abs()


class SnakeBlock(nn.Module):
    """Three times a dilated and a plain convolution, each behind x + sin^2(a x) / a (arXiv:2006.08195), added to what came in."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        side = kernel // 2
        self.convs1 = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding=side * d) for d in DILATIONS)
        self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding=side) for _ in DILATIONS)
        self.activations1, self.activations2 = (nn.ModuleList(Snake(width) for _ in DILATIONS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for snake1, conv1, snake2, conv2 in zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True):
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


class Snake(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:         # (B, D, W)
        return snake(x, self.alpha[:, None], self.alpha[:, None])
