"""The speaker encoder of Qwen3-TTS: a recording as the vector that stands in a prompt for its voice (ECAPA-TDNN, arXiv:2005.07143).

    24 kHz wav -> log-mel at 93.75 Hz -> TDNN -> SE-Res2Net blocks -> all of them, joined -> attentive statistics -> linear
    (B, W)        (B, 128, T)                                          (B, 1536, T)         mean and std             (B, D)

    encoder = SpeakerEncoder.load("Qwen3-TTS-12Hz-0.6B-Base/")         # only a Base model has one
    vector = encoder.embed(wav)                                        # (1, W) at 24 kHz -> (D,)

Its weights are part of model.safetensors. Source: qwen-tts 0.1.1 (modeling_qwen3_tts, enc_* of speaker_encoder_config).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from audio import hub
from audio.higgs import _json, check_wav
from audio.hubert import check_sizes, load_strict
from audio.whisper import mel_filters

RATE, WINDOW, HOP, PREFIX = 24_000, 1024, 256, "speaker_encoder."


@dataclass(frozen=True)
class SpeakerConfig:
    """The published encoder: 8.9 M weights at D = 1024, 12.0 M at 2048."""
    mel_dim: int = 128
    enc_dim: int = 1024
    enc_channels: tuple[int, ...] = (512, 512, 512, 512, 1536)
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 128
    enc_res2net_scale: int = 8
    enc_se_channels: int = 128
    sample_rate: int = RATE

    def __post_init__(self) -> None:
        check_sizes(self, "the speaker encoder's")
        lengths = {len(self.enc_channels), len(self.enc_kernel_sizes), len(self.enc_dilations)}
        if len(lengths) > 1 or sum(self.enc_channels[1:-1]) != self.enc_channels[-1] or self.sample_rate != RATE:
            raise ValueError("the speaker encoder's channels, kernels and dilations do not belong together, or it is not made for 24 kHz; "
                             + "fetch config.json again")


class SpeakerEncoder(nn.Module):
    """Modules are called as in the official file."""

    def __init__(self, config: SpeakerConfig | None = None):
        super().__init__()
        self.config = c = config or SpeakerConfig()
        sizes = list(zip(c.enc_channels, c.enc_channels[1:], c.enc_kernel_sizes[1:], c.enc_dilations[1:], strict=False))
        self.blocks = nn.ModuleList([Tdnn(c.mel_dim, c.enc_channels[0], c.enc_kernel_sizes[0], c.enc_dilations[0]),
                                     *(Block(c, *size) for size in sizes[:-1])])
        last = c.enc_channels[-1]
        self.mfa, self.asp, self.fc = Tdnn(last, last, *sizes[-1][2:]), Pooling(last, c.enc_attention_channels), conv(2 * last, c.enc_dim)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, 128, T) -> (B, D)"""
        found = [mel]
        for block in self.blocks:
            found.append(block(found[-1]))
        return self.fc(self.asp(self.mfa(torch.cat(found[2:], 1)))[..., None])[..., 0]

    @torch.no_grad()
    def embed(self, wav: Tensor) -> Tensor:
        """The voice of a recording, (1, W) at 24 kHz -> (D,)"""
        check_wav(wav[None])
        least = 2 * WINDOW                                          # reflected borders need more than they add, of the sound and of the mel
        return self(log_mel(F.pad(wav.float(), (0, max(0, least - wav.shape[-1])))))[0]

    @classmethod
    def load(cls, folder: str | Path) -> "SpeakerEncoder":
        """Read the encoder out of a model's folder or hub id; strict. ValueError where the model has none."""
        folder = hub.snapshot(str(folder), ["config.json", "model.safetensors"]) if hub.is_id(folder) else Path(folder)
        file, about = folder / "model.safetensors", _json(folder / "config.json") or {}
        state = {}
        if file.is_file():
            with safe_open(file, "pt") as tensors:
                state = {name.removeprefix(PREFIX): tensors.get_tensor(name) for name in tensors.keys() if name.startswith(PREFIX)}
        if not state:
            raise ValueError(f"{folder} has no speaker encoder; name the folder of a Base model, for example Qwen3-TTS-12Hz-0.6B-Base")
        known = SpeakerConfig.__dataclass_fields__.keys()
        about = about.get("speaker_encoder_config") or {}
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in about.items() if name in known}
        with torch.device("meta"):
            encoder = cls(SpeakerConfig(**given))
        load_strict(encoder, state, {}, "", str(file))
        return encoder.eval().requires_grad_(False)


def conv(inner: int, outer: int, kernel: int = 1, dilation: int = 1) -> nn.Conv1d:
    return nn.Conv1d(inner, outer, kernel, dilation=dilation, padding="same", padding_mode="reflect")


class Tdnn(nn.Module):
    def __init__(self, inner: int, outer: int, kernel: int = 1, dilation: int = 1):
        super().__init__()
        self.conv = conv(inner, outer, kernel, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Res2Net(nn.Module):
    """Channels in groups: each but the first is convolved together with what the one before gave."""

    def __init__(self, width: int, scale: int, kernel: int, dilation: int):
        super().__init__()
        self.scale, part = scale, width // scale
        self.blocks = nn.ModuleList(Tdnn(part, part, kernel, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = x.chunk(self.scale, 1)
        out = [first]
        for n, (part, block) in enumerate(zip(rest, self.blocks, strict=True)):
            out.append(block(part + out[-1] if n else part))
        return torch.cat(out, 1)


class SqueezeExcitation(nn.Module):
    """Each channel weighed by what all of them are on average."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.conv1, self.conv2 = conv(width, inner), conv(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv2(F.relu(self.conv1(x.mean(2, keepdim=True)))))


class Block(nn.Module):
    def __init__(self, c: SpeakerConfig, inner: int, outer: int, kernel: int, dilation: int):
        super().__init__()
        self.tdnn1, self.tdnn2 = Tdnn(inner, outer), Tdnn(outer, outer)
        self.res2net_block = Res2Net(outer, c.enc_res2net_scale, kernel, dilation)
        self.se_block = SqueezeExcitation(outer, c.enc_se_channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))))


class Pooling(nn.Module):
    """Mean and standard deviation over time, weighed by attention that knows both over all of it.   (B, C, T) -> (B, 2 C)"""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.tdnn, self.conv = Tdnn(3 * width, inner), conv(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        evenly = torch.cat([x, *(s[..., None].expand_as(x) for s in statistics(x, torch.full_like(x[:, :1], 1 / x.shape[2])))], 1)
        return torch.cat(statistics(x, self.conv(torch.tanh(self.tdnn(evenly))).softmax(2)), 1)


def statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, T), weights that add up to 1 -> mean and standard deviation (B, C)"""
    mean = (weight * x).sum(2)
    return mean, (weight * (x - mean[..., None]).square()).sum(2).clamp(min=1e-12).sqrt()


def log_mel(wav: Tensor) -> Tensor:
    """(B, W) at 24 kHz -> (B, 128, T), T = W // 256"""
    border = (WINDOW - HOP) // 2
    wav = F.pad(wav[:, None], (border, border), "reflect")[:, 0]
    spectrum = torch.stft(wav, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return (mel_filters(128, WINDOW, RATE, RATE / 2) @ (power + 1e-9).sqrt()).clamp(min=1e-5).log()
