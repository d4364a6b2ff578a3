"""The codec of Qwen3-TTS at 12.5 Hz: 24 kHz speech as 16 codebooks of 2048 codes. Its encoder is a Mimi, its decoder one of its own.

    wav -> Mimi's encoder, transformer and stride, 16 of its 32 codebooks                                    (B, 1, W) -> (B, 16, T)
    codes -> split RVQ -> conv -> transformer -> 2 x (stride 2, ConvNeXt) -> 8, 5, 4, 3, each with 3 residual units  -> (B, 1, 1920 T)

Transformers 4.57.3, which the package pins, lets a position of the encoder see all before it, whatever sliding_window in its
config.json says (250: it matters behind 10 s), and fills the last frame layer by layer instead of with silence; so do we. All of it
is causal, so it streams as Mimi does: the state is a `Past`, and pieces joined equal the whole. The official decoder computes 300
frames at a time, each behind 25 frames before it; up to 300 frames (24 s) both give the same sound, and behind that its pieces have
forgotten what we still know. Source: qwen-tts 0.1.1 (tokenizer_12hz).

    codec = QwenCodec.load("Qwen3-TTS-12Hz-0.6B-Base/")       # the folder of a model, or its speech_tokenizer
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio.higgs import _json, check_wav, read_tensors, snake
from audio.hubert import check_sizes, load_strict
from audio.mimi import FIELDS, RATE, Conv, ConvTranspose, MimiCodec, MimiConfig, MimiStream, Past, ProjectedRVQ, official_names, our_tensors
from audio.mimi import FIXED as MIMI_FIXED

KIND = "qwen3_tts_tokenizer_12hz"
WINDOW = 2**20              # positions that one of the encoder sees: all of 11 hours


@dataclass(frozen=True)
class QwenCodecConfig:
    """The published codec: 170.6 M numbers, 114.3 M of them in the decoder."""
    mimi: MimiConfig = field(default_factory=lambda: MimiConfig(window=WINDOW))
    num_codebooks: int = 16
    codebook_size: int = 2048
    codebook_dim: int = 512                     # of the sum of the codebooks, whose tables are half as wide
    latent: int = 1024                          # channels at 12.5, 25 and 50 Hz
    dim: int = 512                              # of the transformer
    layers: int = 8
    heads: int = 16
    head_dim: int = 64
    ffn: int = 1024
    window: int = 72                            # frames that one sees, itself among them
    theta: float = 10000.0
    norm_eps: float = 1e-5
    ratios: tuple[int, ...] = (2, 2)
    rates: tuple[int, ...] = (8, 5, 4, 3)
    width: int = 1536                           # channels at 50 Hz; each of the rates halves them

    def __post_init__(self) -> None:
        check_sizes(self, "the Qwen codec's")
        if self.hop != self.mimi.hop or self.codebook_size != self.mimi.codebook_size or self.num_codebooks > self.mimi.num_codebooks:
            both = [f"{c.num_codebooks} codebooks of {c.codebook_size} and {c.hop} samples a frame" for c in (self, self.mimi)]
            raise ValueError(f"the decoder has {both[0]}, the encoder {both[1]}; fetch its config.json")
        if self.head_dim % 2 or self.codebook_dim % 2 or self.num_codebooks < 2 or self.width % 2 ** len(self.rates):
            raise ValueError("the Qwen codec's head_dim or codebook_dim is odd, it has one codebook, or width is no multiple of 2^rates")

    @property
    def hop(self) -> int:
        """Samples in a frame: 1920."""
        return math.prod((*self.ratios, *self.rates))


class QwenCodec(nn.Module):
    """Encode and decode speech; `QwenCodec.load(path)` gives one with weights."""
    name, sample_rate = "qwen", RATE

    def __init__(self, config: QwenCodecConfig | None = None):
        super().__init__()
        self.config = c = config or QwenCodecConfig()
        self.frame_rate, self.num_codebooks, self.codebook_size = RATE / c.hop, c.num_codebooks, c.codebook_size
        self.encoder = MimiCodec(c.mimi, c.num_codebooks)
        for unused in ("decoder", "decoder_transformer", "upsample"):
            delattr(self.encoder, unused)
        books = MimiConfig(dim=c.codebook_dim, heads=1, codebook_size=c.codebook_size, codebook_dim=c.codebook_dim // 2)
        self.semantic, self.acoustic = ProjectedRVQ(books, 1), ProjectedRVQ(books, c.num_codebooks - 1)
        self.pre_conv, self.transformer = Conv(c.codebook_dim, c.latent, 3), Transformer(c)
        self.upsample = nn.ModuleList(m for r in c.ratios for m in (ConvTranspose(c.latent, c.latent, r, r), ConvNeXt(c.latent)))
        widths = [c.width >> n for n in range(len(c.rates) + 1)]
        self.blocks = nn.ModuleList(Upsampling(*sizes) for sizes in zip(widths, widths[1:], c.rates, strict=False))
        self.first, self.snake, self.last = Conv(c.latent, c.width, 7), SnakeBeta(widths[-1]), Conv(widths[-1], 1, 7)

    def encode(self, wav: Tensor) -> Tensor:
        """(B, 1, W) at 24 kHz -> codes (B, 16, T) int64, T = ceil(W / 1920)."""
        check_wav(wav)
        return self.encode_frames(wav, Past())

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, 1..16, T) in 0..2047 -> (B, 1, 1920 T) in [-1, 1]; fewer codebooks give a coarser sound."""
        return self.decode_frames(codes, Past())

    def filled(self, wav: Tensor) -> Tensor:
        """The end of a sound, which its convolutions fill."""
        return wav

    def encode_frames(self, wav: Tensor, past: Past) -> Tensor:
        """The next whole frames of a sound, or its end, (B, 1, 1920 t) -> codes (B, 16, t); `past` is brought up to date."""
        return self.encoder.encode_frames(wav, past)

    decode_frames = MimiCodec.decode_frames

    def synthesise(self, x: Tensor, past: Past) -> Tensor:
        """Decoded codes (B, 512, t) -> (B, 1, 1920 t)"""
        x = self.transformer(self.pre_conv(x, past), past)                              # -> (B, 1024, t)
        for module in (*self.upsample, self.first, *self.blocks):
            x = module(x, past)
        return self.last(self.snake(x), past).clamp(-1, 1)

    def stream(self) -> MimiStream:
        """A fresh stateful encoder and decoder."""
        return MimiStream(self)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "QwenCodec":
        """Read the codec's folder or that of a model with it; strict."""
        folder = codec_folder(Path(path))
        if folder is None:
            raise FileNotFoundError(f"no codec of Qwen3-TTS at {path}; name the folder of the model, or its speech_tokenizer")
        with torch.device("meta"):
            codec = cls(read_config(folder / "config.json"))
        file, mimi, c = folder / "model.safetensors", codec.encoder, codec.config
        official = read_tensors(file)
        first = {name.removeprefix("encoder."): t for name, t in official.items() if name.startswith("encoder.")}
        theirs = our_tensors(first, official_names(mimi), c.mimi)
        state = {f"encoder.{name}": tensor for name, tensor in theirs.items()} | decoder_tensors(official)
        spare = {f"acoustic.codebooks.{n}.table" for n in range(c.num_codebooks - 1, c.mimi.num_codebooks - 1)}
        unread = "|".join([r".*codebook\.(_?initialized|inited)", *(re.escape(f"encoder.{name}") for name in spare)])
        load_strict(codec, state, {}, unread, str(file))
        return codec.to(device).eval().requires_grad_(False)


# ---- modules ----

class SnakeBeta(nn.Module):
    """`snake` of rate e^alpha and height e^beta for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:                         # (B, D, t)
        return snake(x, self.alpha.exp()[:, None], self.beta.exp()[:, None])


class ConvNeXt(nn.Module):
    """A depthwise convolution over time, then two linear maps of each position."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise, self.norm = Conv(dim, dim, 7, groups=dim), nn.LayerNorm(dim, 1e-6)
        self.up, self.down, self.scale = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, past: Past) -> Tensor:             # (B, D, t)
        y = self.down(F.gelu(self.up(self.norm(self.depthwise(x, past).transpose(1, 2)))))
        return x + (self.scale * y).transpose(1, 2)


class Unit(nn.Module):
    def __init__(self, dim: int, dilation: int):
        super().__init__()
        self.snake1, self.conv1 = SnakeBeta(dim), Conv(dim, dim, 7, dilation=dilation)
        self.snake2, self.conv2 = SnakeBeta(dim), Conv(dim, dim, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x), past)), past)


class Upsampling(nn.Module):
    """(B, D, t) -> (B, D / 2, rate * t)"""

    def __init__(self, inner: int, outer: int, rate: int):
        super().__init__()
        self.snake, self.conv = SnakeBeta(inner), ConvTranspose(inner, outer, 2 * rate, rate)
        self.units = nn.ModuleList(Unit(outer, dilation) for dilation in (1, 3, 9))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv(self.snake(x), past)
        for unit in self.units:
            x = unit(x, past)
        return x


class Transformer(nn.Module):
    """Llama's blocks with a window and a scale for each channel of what they add.   (B, latent, t) -> same"""

    def __init__(self, c: QwenCodecConfig):
        super().__init__()
        self.input, self.output, self.norm = nn.Linear(c.latent, c.dim), nn.Linear(c.dim, c.latent), nn.RMSNorm(c.dim, c.norm_eps)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.input(x.transpose(1, 2))
        for layer in self.layers:
            x = layer(x, past)
        return self.output(self.norm(x)).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, c: QwenCodecConfig):
        super().__init__()
        self.c, inner = c, c.heads * c.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)
        self.q, self.k, self.v = (nn.Linear(c.dim, inner, bias=False) for _ in range(3))
        self.o, self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in (
            (inner, c.dim), (c.dim, c.ffn), (c.dim, c.ffn), (c.ffn, c.dim)))
        self.scale1, self.scale2 = nn.Parameter(torch.ones(c.dim)), nn.Parameter(torch.ones(c.dim))

    def forward(self, x: Tensor, past: Past) -> Tensor:             # (B, S, D)
        x = x + self.scale1 * self.attend(self.norm1(x), past)
        h = self.norm2(x)
        return x + self.scale2 * self.down(F.silu(self.gate(h)) * self.up(h))

    def attend(self, x: Tensor, past: Past) -> Tensor:
        S, keep = x.shape[1], self.c.window - 1
        start, keys, values = past.kept.get(self, (0, [], []))
        q, k, v = (w(x).unflatten(-1, (self.c.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))     # -> (B, H, S, head)
        q, k = rotate_halves(torch.stack([q, k]), start, self.c.theta)
        k, v = torch.cat([*keys, k], 2), torch.cat([*values, v], 2)
        L = k.shape[2]
        distance = torch.arange(L - S, L, device=x.device)[:, None] - torch.arange(L, device=x.device)
        y = F.scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance <= keep))
        past.kept[self] = (start + S, [k[:, :, L - min(L, keep) :].clone()], [v[:, :, L - min(L, keep) :].clone()])
        return self.o(y.transpose(1, 2).flatten(2))


def rotate_halves(x: Tensor, start: int, theta: float) -> Tensor:
    """Rotary embedding of the pairs (i, i + head / 2), positions from `start` on.   (..., S, head) -> same"""
    S, head = x.shape[-2:]
    frequencies = theta ** -(torch.arange(0, head, 2, device=x.device).float() / head)
    angles = torch.arange(start, start + S, device=x.device).float()[:, None] * frequencies                    # (S, head / 2)
    (a, b), cos, sin = x.float().chunk(2, -1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# ---- official files ----

NAMES = (       # a pattern of official names behind "decoder." -> ours
    (r"^quantizer\.rvq_first\.", "semantic."), (r"^quantizer\.rvq_rest\.", "acoustic."),
    (r"^(semantic|acoustic)\.(in|out)put_proj\.", r"\1.project_\2."),
    (r"\.vq\.layers\.(\d+)\._codebook\.", r".codebooks.\1."), (r"^pre_transformer\.", "transformer."),
    (r"^transformer\.(in|out)put_proj\.", r"transformer.\1put."), (r"\.self_attn\.(.)_proj\.", r".\1."), (r"\.mlp\.(\w+)_proj\.", r".\1."),
    (r"\.input_layernorm\.", ".norm1."), (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.self_attn_layer_scale\.scale$", ".scale1"), (r"\.mlp_layer_scale\.scale$", ".scale2"),
    (r"\.dwconv\.", ".depthwise."), (r"\.pwconv1\.", ".up."), (r"\.pwconv2\.", ".down."), (r"\.gamma$", ".scale"),
    (r"\.act(\d)\.", r".snake\1."))


def decoder_tensors(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors of a file under our names; what has none keeps its own, and the strict loader reports it."""
    names = [name for name in official if not name.startswith("encoder.")]
    numbers = [int(m[1]) for name in names if (m := re.match(r"decoder\.decoder\.(\d+)\.", name))]
    last, state = max(numbers, default=0), {}
    for name in names:
        short = re.sub(r"^decoder\.", "", name)
        for pattern, new in NAMES:
            short = re.sub(pattern, new, short)
        short = re.sub(r"^upsample\.(\d+)\.(\d+)\.", lambda m: f"upsample.{2 * int(m[1]) + int(m[2])}.", short)
        if m := re.match(r"decoder\.(\d+)\.(?:block\.(\d+)\.)?(.+)", short):
            n, part, rest = int(m[1]), m[2], m[3]
            alone = {0: "first", last - 1: "snake", last: "last"}.get(n, name)
            where = {None: alone, "0": f"blocks.{n - 1}.snake", "1": f"blocks.{n - 1}.conv"}
            short = f"{where[part] if part in where else f'blocks.{n - 1}.units.{int(part) - 2}'}.{rest}"
        state[name if short in state else short] = official[name]
    for name in [name for name in state if re.fullmatch(r"upsample\.\d+\.conv\..+|blocks\.\d+\.conv\.conv\..+", name)]:
        state[re.sub(r"conv\.(weight|bias)$", r"convtr.\1", name)] = state.pop(name)
    for name in [name for name in state if name.endswith(".embedding_sum")]:
        stem = name.removesuffix("embedding_sum")
        if f"{stem}cluster_usage" in state:
            state[f"{stem}table"] = state.pop(name).float() / state.pop(f"{stem}cluster_usage").float().clamp(min=1e-5)[:, None]
    return state


def codec_folder(path: Path) -> Path | None:
    """The folder of the codec: `path`, or what a model's folder holds."""
    for folder in (path, path / "speech_tokenizer"):
        if (folder / "model.safetensors").is_file() and (_json(folder / "config.json") or {}).get("model_type") == KIND:
            return folder
    return None


def is_qwen(path: Path) -> bool:
    return codec_folder(path) is not None


FIXED = {"input_sample_rate": RATE, "output_sample_rate": RATE}
DECODER_FIXED = {"hidden_act": "silu", "attention_bias": False, "num_semantic_quantizers": 1}
DECODER = {"codebook_dim": "codebook_dim", "latent": "latent_dim", "dim": "hidden_size", "layers": "num_hidden_layers",
           "ffn": "intermediate_size", "heads": "num_attention_heads", "head_dim": "head_dim", "window": "sliding_window",
           "theta": "rope_theta", "norm_eps": "rms_norm_eps", "ratios": "upsampling_ratios", "rates": "upsample_rates",
           "width": "decoder_dim", "codebook_size": "codebook_size", "num_codebooks": "num_quantizers"}


def read_config(path: Path) -> QwenCodecConfig:
    """The config.json of a codec; ValueError for settings not known here. Absent ones are the class's, but head_dim is hidden / heads."""
    about = _json(path) or {}
    deep, first = about.get("decoder_config") or {}, about.get("encoder_config") or {}
    heads = deep.get("num_attention_heads", 16)
    given = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": deep.get("hidden_size", 1024) // max(1, heads)} | deep
    for said, fixed in ((about, FIXED), (first, MIMI_FIXED), (deep, DECODER_FIXED | {"num_key_value_heads": heads})):
        for name, wanted in fixed.items():
            if said.get(name, wanted) != wanted:
                raise ValueError(f"{path}: {name} is {said[name]}, this codec supports {wanted}")

    def tuples(fields: dict[str, str], said: dict[str, Any]) -> dict[str, Any]:
        values = {ours: said[theirs] for ours, theirs in fields.items() if said.get(theirs) is not None}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    config = QwenCodecConfig(MimiConfig(**tuples(FIELDS, first) | {"window": WINDOW}), **tuples(DECODER, given))
    if about.get("encoder_valid_num_quantizers", config.num_codebooks) != config.num_codebooks:
        raise ValueError(f"{path}: encoder_valid_num_quantizers differs from the decoder's num_quantizers; fetch it again")
    return config
