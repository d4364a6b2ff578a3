"""SNAC, 24 kHz: codes on a tree of time scales; a frame of 2048 samples (11.7 a second) is 7 codes of 12 bits (1 kbit/s).

    level 0   c0                                    one code for 4 latents
    level 1   c1a           c1b                     one for 2
    level 2   c2a    c2b    c2c    c2d              one each; a latent is 512 samples: strides 2 4 8 8

As K rows of one length, which everything here wants, a frame is the tree in depth-first order: c0 c1a c2a c2b c1b c2c c2d.
That is the order in which Orpheus writes it. Each level quantises what the levels above left over (arXiv:2410.14411).

    codec = SnacCodec.load("snac_24khz/")           # config.json with pytorch_model.bin or model.safetensors

Encoder and decoder are DAC's with depthwise convolutions. The decoder adds noise, scaled by what it decodes; the official one
draws it anew at each call, here it is a function of the place, so that pieces joined equal the whole.
Sources: snac 1.2.1; the config.json of hubertsiuzdak/snac_24khz, 19.8 M weights. Next: whisper.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio.higgs import DILATIONS, Falling, HiggsStream, Snake, _json, check_wav, reach, read_tensors, weights_file
from audio.hubert import check_sizes, load_strict
from audio.rvq import check_codes, nearest

NOISE = 1 << 19             # values after which the noise of a layer repeats: 22 s at 24 kHz


@dataclass(frozen=True)
class SnacConfig:
    """The published codec for speech; the fields have their names in config.json."""
    sampling_rate: int = 24_000
    encoder_dim: int = 48                           # channels before the first stride; each one doubles them
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    decoder_dim: int = 1024                         # channels before the first stride; each one halves them
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    codebook_size: int = 4096
    codebook_dim: int = 8
    vq_strides: tuple[int, ...] = (4, 2, 1)         # latents of a code, level by level

    def __post_init__(self) -> None:
        check_sizes(self, "SNAC's")
        if math.prod(self.encoder_rates) != math.prod(self.decoder_rates):
            raise ValueError(f"SNAC's encoder_rates {self.encoder_rates} and decoder_rates {self.decoder_rates} have different products")
        if self.vq_strides[-1] != 1 or any(a % b for a, b in zip(self.vq_strides, self.vq_strides[1:], strict=False)):
            raise ValueError(f"SNAC's vq_strides {self.vq_strides} are no tree: each must divide the one before it, the last is 1")

    @property
    def dim(self) -> int:
        """Width of what is quantised: 768."""
        return self.encoder_dim << len(self.encoder_rates)

    @property
    def hop(self) -> int:
        """Samples in a frame: 2048."""
        return math.prod(self.encoder_rates) * self.vq_strides[0]

    @property
    def tree(self) -> tuple[tuple[int, int], ...]:
        """Level and place of each code of a frame, depth first."""
        def below(level: int, place: int) -> Iterator[tuple[int, int]]:
            yield level, place
            if level + 1 < len(self.vq_strides):
                count = self.vq_strides[level] // self.vq_strides[level + 1]
                for n in range(count):
                    yield from below(level + 1, place * count + n)
        return tuple(below(0, 0))


class SnacCodec(nn.Module):
    """Encode and decode speech; `SnacCodec.load(path)` gives one with weights. Module names are the official ones."""
    name = "snac"

    def __init__(self, config: SnacConfig | None = None):
        super().__init__()
        self.config = c = config or SnacConfig()
        self.sample_rate, self.frame_rate = c.sampling_rate, c.sampling_rate / c.hop
        self.num_codebooks, self.codebook_size = len(c.tree), c.codebook_size
        self.encoder, self.decoder, self.quantizer = Encoder(c), Decoder(c), nn.Module()
        self.quantizer.quantizers = nn.ModuleList(Level(c, stride) for stride in c.vq_strides)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """(B, 1, W) -> codes (B, 7, T) int64, T = ceil(W / 2048): the last frame is filled with silence."""
        x = wav.to(self.encoder.block[0].weight.dtype)
        residual, levels = self.encoder(F.pad(x, (0, -check_wav(wav) % self.config.hop))), []
        for level in self.quantizer.quantizers:
            codes = level.encode(residual)
            residual = residual - level.decode(codes)
            levels.append(codes.unflatten(1, (-1, self.config.vq_strides[0] // level.stride)))         # -> (B, T, codes a frame)
        return torch.stack([levels[level][..., place] for level, place in self.config.tree], 1)

    @torch.no_grad()
    def decode(self, codes: Tensor, at: int = 0) -> Tensor:
        """Codes (B, 7, T) -> (B, 1, 2048 T) in [-1, 1]; the first of them is frame `at` of its recording."""
        check_codes(codes, self.num_codebooks, self.codebook_size)
        if codes.shape[1] != self.num_codebooks:
            raise ValueError(f"a frame of SNAC is {self.num_codebooks} codes, these have {codes.shape[1]}; pass all of them")
        if codes.shape[2] == 0:
            return torch.zeros(len(codes), 1, 0, device=codes.device)
        x: Tensor | float = 0.0
        for n, level in enumerate(self.quantizer.quantizers):
            rows = [k for k, (depth, _) in enumerate(self.config.tree) if depth == n]
            x = x + level.decode(codes[:, rows].transpose(1, 2).flatten(1))
        return self.decoder(x, at * self.config.vq_strides[0])

    def stream(self) -> "SnacStream":
        """A fresh stateful decoder over this codec."""
        return SnacStream(self)

    @property
    def context(self) -> int:
        """Frames before and behind one that its samples depend on, rounded up: 3 for the published rates."""
        return math.ceil(reach(self.config.decoder_rates) / self.config.vq_strides[0])

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "SnacCodec":
        """Read a folder (config.json and its weights) or a file of weights with config.json beside it; strict."""
        file = weights_file(Path(path))
        with torch.device("meta"):
            codec = cls(read_config(file.parent / "config.json"))
        load_strict(codec, read_tensors(file), {}, "", str(file))
        return codec.to(device).eval().requires_grad_(False)


class SnacStream(HiggsStream):
    """Decode piece by piece: the pieces joined equal the whole. A frame is certain when 3 more are there (0.26 s), or at flush()."""

    def window(self, codes: Tensor) -> Tensor:
        return self.codec.decode(codes, self.first)


# ---- modules ----

def conv(inside: int, outside: int, kernel: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv1d:
    """A convolution that keeps the length."""
    return nn.Conv1d(inside, outside, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2, groups=groups)


class Encoder(nn.Module):
    """Sound (B, 1, W) -> latents (B, D, W / 512)."""

    def __init__(self, c: SnacConfig):
        super().__init__()
        widths = [c.encoder_dim << n for n in range(len(c.encoder_rates) + 1)]
        blocks = []
        for width, stride in zip(widths, c.encoder_rates, strict=False):
            down = Falling(width, 2 * width, 2 * stride, stride, padding=math.ceil(stride / 2))
            blocks.append(Block(*units(width), Snake(width), down))
        last = widths[-1]
        self.block = nn.Sequential(conv(1, widths[0], 7), *blocks, conv(last, last, 7, groups=last))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Decoder(nn.Module):
    """Latents (B, D, T) -> sound (B, 1, 512 T)."""

    def __init__(self, c: SnacConfig):
        super().__init__()
        widths = [c.decoder_dim >> n for n in range(len(c.decoder_rates) + 1)]
        blocks = []
        for n, (width, stride) in enumerate(zip(widths, c.decoder_rates, strict=False)):
            up = nn.ConvTranspose1d(width, width // 2, 2 * stride, stride, math.ceil(stride / 2), stride % 2)
            noise = Noise(width // 2, n, math.prod(c.decoder_rates[: n + 1]))
            blocks.append(Block(Snake(width), up, noise, *units(width // 2)))
        opening, last = (conv(c.dim, c.dim, 7, groups=c.dim), conv(c.dim, widths[0])), conv(widths[-1], 1, 7)
        self.model = nn.Sequential(*opening, *blocks, Snake(widths[-1]), last, nn.Tanh())

    def forward(self, x: Tensor, at: int) -> Tensor:
        """`at`: number of the first latent in its recording, on which the noise depends."""
        return run(self.model, x, at)


def run(modules: nn.Sequential, x: Tensor, at: int) -> Tensor:
    for module in modules:
        x = module(x, at) if isinstance(module, (Block, Noise)) else module(x)
    return x


class Block(nn.Module):
    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.block = nn.Sequential(*modules)

    def forward(self, x: Tensor, at: int = 0) -> Tensor:
        return run(self.block, x, at)


class Unit(Block):
    def forward(self, x: Tensor, at: int = 0) -> Tensor:
        return x + self.block(x)


def units(dim: int) -> list[Unit]:
    """The three residual units of a block."""
    return [Unit(Snake(dim), conv(dim, dim, 7, d, dim), Snake(dim), conv(dim, dim)) for d in DILATIONS]


class Noise(nn.Module):
    """Adds noise in proportion to a projection of its input; all channels, and all items, get the same."""

    def __init__(self, dim: int, number: int, rate: int):
        super().__init__()
        self.linear = nn.Conv1d(dim, dim, 1, bias=False)
        self.number, self.rate = number, rate       # of its block; values for a latent

    def forward(self, x: Tensor, at: int) -> Tensor:
        return x + noise(self.number, at * self.rate, x.shape[2]).to(x) * self.linear(x)


def noise(number: int, start: int, count: int) -> Tensor:
    """Normal noise of layer `number` from a place on.   -> (count,)"""
    return noise_table(number)[(start + torch.arange(count)) % NOISE]


@lru_cache
@torch.inference_mode(False)
def noise_table(number: int) -> Tensor:
    return torch.randn(NOISE, generator=torch.Generator().manual_seed(number))


class Level(nn.Module):
    """A codebook that sees the mean of `stride` latents through a projection, and compares directions, not lengths."""

    def __init__(self, c: SnacConfig, stride: int):
        super().__init__()
        self.stride = stride
        self.in_proj, self.out_proj = conv(c.dim, c.codebook_dim), conv(c.codebook_dim, c.dim)
        self.codebook = nn.Embedding(c.codebook_size, c.codebook_dim)

    def encode(self, x: Tensor) -> Tensor:          # (B, D, T) -> (B, T / stride)
        x = self.in_proj(F.avg_pool1d(x, self.stride, self.stride)).transpose(1, 2)
        return nearest(F.normalize(x.flatten(0, 1)), F.normalize(self.codebook.weight)).view(x.shape[:2])

    def decode(self, codes: Tensor) -> Tensor:      # (B, T / stride) -> (B, D, T)
        return self.out_proj(self.codebook(codes).transpose(1, 2)).repeat_interleave(self.stride, -1)


# ---- official files ----

def read_config(path: Path) -> SnacConfig:
    """Its config.json; ValueError for settings that this codec does not know."""
    about = {"attn_window_size": 32} | (_json(path) or {})          # of the official class, where the file says nothing
    if missing := sorted({f.name for f in fields(SnacConfig)} - about.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing)}; fetch it from the repository of the codec")
    for name, wanted in {"attn_window_size": None, "latent_dim": None, "noise": True, "depthwise": True}.items():
        if about.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name} is {about[name]}, only {wanted} is supported; name SNAC's model for speech, snac_24khz")
    given = {f.name: about[f.name] for f in fields(SnacConfig)}
    return SnacConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def is_snac(path: Path) -> bool:
    """A folder, or a file of weights, whose config.json is SNAC's."""
    about = _json((path if path.is_dir() else path.parent) / "config.json") or {}
    weights = path.is_dir() or path.suffix in (".safetensors", ".bin", ".pt", ".pth")
    return weights and {"vq_strides", "encoder_rates", "decoder_rates"} <= about.keys()
