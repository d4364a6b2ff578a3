"""Mimi, Kyutai's codec: 24 kHz speech as 12.5 frames a second of 8 to 32 codes of 11 bits (1.1 to 4.4 kbit/s).

    wav -> SEANet encoder, strides 4 5 6 8 = 960 -> transformer -> stride 2 -> split RVQ          (B, 1, W) -> (B, Q, T)
    codes -> sum of codebook entries -> stride 2      -> transformer -> SEANet decoder, 8 6 5 4   (B, Q, T) -> (B, 1, 1920 T)

Codebook 0 is semantic (distilled from WavLM), the others are acoustic; both quantise the same latent, each through a
projection of its own, and their outputs are summed.  Everything is causal, so audio streams in
and out in steps of 80 ms.  The streaming state is a `Past`: the last inputs of each convolution and attention; offline is
one long piece with an empty past.  After Moshi (arXiv:2410.00037), SEANet as in SoundStream (arXiv:2107.03312).

    codec = MimiCodec.load("moshiko/")      # Kyutai's tokenizer-e351c8d8-checkpoint125.safetensors, its newer name, or transformers'

Next: hubert.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from audio.higgs import Falling, Rising, _json, check_wav, read_tensors, tensor_names
from audio.hubert import check_sizes, load_strict
from audio.rvq import check_codes

RATE = 24_000
PIECE = 256                 # frames (20 s) computed at once: the cost of long sound is linear, its memory bounded
THETA = 10_000              # of the rotary embedding
EPS = 1e-5                  # of the norms, and the least usage of a codebook's entry


@dataclass(frozen=True)
class MimiConfig:
    """The published codec: 79.3 M weights and 32 codebooks."""
    ratios: tuple[int, ...] = (8, 6, 5, 4)      # strides of the decoder; the encoder has them in the opposite order
    width: int = 64                             # channels at 24 kHz; each stride doubles them
    dim: int = 512
    layers: int = 8                             # of each of the two transformers
    heads: int = 8
    ffn: int = 2048
    window: int = 250                           # positions that one sees, itself among them: 10 s at 25 Hz
    num_codebooks: int = 32                     # in the file; a codec keeps the first few
    codebook_size: int = 2048
    codebook_dim: int = 256

    def __post_init__(self) -> None:
        check_sizes(self, "Mimi's")
        for name in ("window", "num_codebooks"):
            if getattr(self, name) < 2:
                raise ValueError(f"Mimi's {name} is {getattr(self, name)}, expected at least 2; fix its config.json")
        if self.dim % (2 * self.heads):
            raise ValueError(f"Mimi's dim {self.dim} is not a multiple of 2 x {self.heads} heads; fix its config.json")

    @property
    def hop(self) -> int:
        """Samples in a frame: 1920."""
        return 2 * math.prod(self.ratios)


@dataclass
class Past:
    """What a stream remembers: for each module with a memory its last inputs.  ring: forget as moshi does, see Attention."""
    ring: bool = False
    kept: dict[nn.Module, tuple] = field(default_factory=dict)


class MimiCodec(nn.Module):
    """Encode and decode speech; `MimiCodec.load(path)` gives one with weights."""
    name, sample_rate = "mimi", RATE

    def __init__(self, config: MimiConfig | None = None, num_codebooks: int = 8):
        super().__init__()
        self.config = config = config or MimiConfig()
        if not 1 <= num_codebooks <= config.num_codebooks:
            raise ValueError(f"num_codebooks is {num_codebooks}, this Mimi has 1..{config.num_codebooks}; choose among them")
        self.frame_rate, self.num_codebooks, self.codebook_size = RATE / config.hop, num_codebooks, config.codebook_size
        self.encoder, self.decoder = seanet_encoder(config), seanet_decoder(config)
        self.encoder_transformer, self.decoder_transformer = (Chain(*(Layer(config) for _ in range(config.layers))) for _ in range(2))
        self.downsample = Conv(config.dim, config.dim, 4, 2, bias=False, replicate=True)
        self.upsample = ConvTranspose(config.dim, config.dim, 4, 2, groups=config.dim, bias=False)
        self.semantic, self.acoustic = ProjectedRVQ(config, 1), ProjectedRVQ(config, num_codebooks - 1)

    def encode(self, wav: Tensor) -> Tensor:
        """(B, 1, W) at 24 kHz -> codes (B, Q, T) int64, T = ceil(W / 1920): the last frame is filled with silence."""
        check_wav(wav)
        return self.encode_frames(self.filled(wav), Past())

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, 1..Q, T) in 0..2047 -> (B, 1, 1920 T), near [-1, 1]; fewer codebooks give a coarser sound."""
        return self.decode_frames(codes, Past())

    def filled(self, wav: Tensor) -> Tensor:
        """The end of a sound, filled with silence to whole frames."""
        return F.pad(wav, (0, -wav.shape[2] % self.config.hop))

    @torch.no_grad()
    def encode_frames(self, wav: Tensor, past: Past) -> Tensor:
        """The next whole frames of a sound, (B, 1, 1920 t) -> codes (B, Q, t); `past` is brought up to date."""
        codes = [torch.zeros(len(wav), self.num_codebooks, 0, dtype=torch.int64, device=wav.device)]
        for piece in wav.to(self.downsample.conv.weight.dtype).split(self.config.hop * (1 if past.ring else PIECE), 2):
            if piece.shape[2]:
                x = self.encoder_transformer(self.encoder(piece, past), past)           # -> (B, D, 2 t)
                x = self.downsample(x, past)                                            # -> (B, D, t)
                codes.append(torch.cat([self.semantic.encode(x), self.acoustic.encode(x)], 1))
        return torch.cat(codes, 2)

    @torch.no_grad()
    def decode_frames(self, codes: Tensor, past: Past) -> Tensor:
        """The next frames of a stream of codes, (B, q, t) -> (B, 1, 1920 t); `past` is brought up to date. Also that of Qwen's codec."""
        check_codes(codes, self.num_codebooks, self.codebook_size)
        wavs = [torch.zeros(len(codes), 1, 0, dtype=next(self.parameters()).dtype, device=codes.device)]
        for piece in codes.split(1 if past.ring else PIECE, 2):
            if piece.shape[2]:
                x = self.semantic.decode(piece[:, :1])                                  # -> (B, D, t)
                if piece.shape[1] > 1:
                    x = x + self.acoustic.decode(piece[:, 1:])
                wavs.append(self.synthesise(x, past))
        return torch.cat(wavs, 2)

    def synthesise(self, x: Tensor, past: Past) -> Tensor:          # decoded codes (B, D, t) -> (B, 1, 1920 t)
        return self.decoder(self.decoder_transformer(self.upsample(x, past), past), past)

    def stream(self, exact_moshi: bool = False) -> "MimiStream":
        """A fresh stateful encoder and decoder.  exact_moshi: what moshi computes live, from 10 s on not quite what it does offline."""
        return MimiStream(self, exact_moshi)

    @classmethod
    def load(cls, path, num_codebooks: int | None = None, config: MimiConfig | None = None, device: str = "cpu") -> "MimiCodec":
        """Read a folder with a Mimi in it, or one file; strict.  config: None takes a config.json beside it, or the published values.

        num_codebooks: how many of the first are kept; None = 8, as Moshi does, or all where there are fewer.
        """
        file = find_file(Path(path))
        if file is None:
            raise FileNotFoundError(f"no Mimi at {path}; name a folder with {FILES[0]} or with transformers' files, or one file")
        config = config or read_config(file.parent / "config.json")
        with torch.device("meta"):                  # no time spent on weights that are overwritten
            codec = cls(config, min(8, config.num_codebooks) if num_codebooks is None else num_codebooks)
        names = official_names(codec)
        unused = "|".join([r".*codebook\.(_?initialized|inited)", *(set(names.values()) - codec.state_dict().keys())])
        load_strict(codec, our_tensors(read_tensors(file), names, codec.config), {}, unused, str(file))
        return codec.to(device).eval().requires_grad_(False)


class MimiStream:
    """Encode and decode piece by piece: the pieces joined equal the whole.  Only encode() holds back, up to 1,919 samples."""

    def __init__(self, codec: MimiCodec, exact_moshi: bool = False):
        self.codec, self.exact_moshi = codec, exact_moshi
        self.wav = self.codes = None        # (B, 1, n) not yet encoded; the last codes, for their batch size
        self.encoder_past, self.decoder_past = Past(exact_moshi), Past(exact_moshi)

    def encode(self, wav: Tensor) -> Tensor:
        """Take (B, 1, n >= 0) samples, give the codes (B, Q, t >= 0) of the frames that are whole."""
        if wav.dim() != 3 or wav.shape[2]:
            check_wav(wav)
        self.wav = wav if self.wav is None else torch.cat([self.wav, wav], 2)
        whole = self.wav.shape[2] // self.codec.config.hop * self.codec.config.hop
        frames, self.wav = self.wav[:, :, :whole], self.wav[:, :, whole:].clone()
        return self.codec.encode_frames(frames, self.encoder_past)

    def flush_encode(self) -> Tensor:
        """End the sound: the codes (B, Q, 0..1) of what was held back, filled up with silence."""
        assert self.wav is not None, "flush_encode() before encode()"
        codes = self.codec.encode_frames(self.codec.filled(self.wav), self.encoder_past)
        self.wav, self.encoder_past = None, Past(self.exact_moshi)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Take codes (B, q, n >= 0), give their samples (B, 1, 1920 n)."""
        wav, self.codes = self.codec.decode_frames(codes, self.decoder_past), codes[:, :1, :0]
        return wav

    def flush(self) -> Tensor:
        """End the codes: (B, 1, 0), since nothing was held back."""
        assert self.codes is not None, "flush() before decode()"
        wav, self.codes, self.decoder_past = self.codec.decode_frames(self.codes, self.decoder_past), None, Past(self.exact_moshi)
        return wav


# ---- modules ----

class Conv(nn.Module):
    """A convolution that sees only what came before; what came before the start is silence, or the first value again."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int = 1, bias: bool = True, replicate: bool = False, dilation: int = 1,
                 groups: int = 1):
        super().__init__()
        self.conv = Falling(inner, outer, kernel, stride, bias=bias, dilation=dilation, groups=groups)
        self.overlap, self.replicate, self.stride = (kernel - 1) * dilation + 1 - stride, replicate, stride

    def forward(self, x: Tensor, past: Past) -> Tensor:             # (B, D, stride * t) -> (B, D', t)
        if self not in past.kept:
            start = x[..., :1] if self.replicate else x.new_zeros(*x.shape[:2], 1)
            past.kept[self] = (start.expand(-1, -1, self.overlap),)
        if short := -x.shape[2] % self.stride:                      # the end of a sound that transformers fills here
            x = F.pad(x, (0, short), "replicate" if self.replicate else "constant")
        x = torch.cat([*past.kept[self], x], 2)
        past.kept[self] = (x[..., x.shape[2] - self.overlap:].clone(),)     # a view would keep all of x alive
        return self.conv(x)


class ConvTranspose(nn.Module):
    """A transposed convolution that gives what is certain; what later inputs will add to is kept, without the bias."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, groups: int = 1, bias: bool = True):
        super().__init__()
        self.convtr = Rising(inner, outer, kernel, stride, groups=groups, bias=bias)
        self.overlap = kernel - stride

    def forward(self, x: Tensor, past: Past) -> Tensor:             # (B, D, t) -> (B, D', stride * t)
        y = self.convtr(x)
        if self in past.kept:
            y[..., : self.overlap] += past.kept[self][0]
        tail = y[..., y.shape[2] - self.overlap:]
        past.kept[self] = (tail.clone() if self.convtr.bias is None else tail - self.convtr.bias[:, None],)
        return y[..., : y.shape[2] - self.overlap]


class Chain(nn.Sequential):
    """Sequential modules, each with its streaming state."""

    def forward(self, x: Tensor, past: Past) -> Tensor:
        for module in self:
            x = module(x) if isinstance(module, nn.ELU) else module(x, past)
        return x


class Residual(Chain):
    def forward(self, x: Tensor, past: Past) -> Tensor:
        return super().forward(x, past).add_(x)


def seanet_encoder(config: MimiConfig) -> Chain:
    """Sound (B, 1, 960 t) -> (B, D, t).  A stride of r has a kernel of 2 r, and twice the channels behind it."""
    modules, width = [Conv(1, config.width, 7)], config.width
    for ratio in reversed(config.ratios):
        modules += [Residual(nn.ELU(), Conv(width, width // 2, 3), nn.ELU(), Conv(width // 2, width, 1)),
                    nn.ELU(), Conv(width, 2 * width, 2 * ratio, ratio)]
        width *= 2
    return Chain(*modules, nn.ELU(), Conv(width, config.dim, 3))


def seanet_decoder(config: MimiConfig) -> Chain:
    """The other way: (B, D, t) -> sound (B, 1, 960 t)."""
    width = config.width << len(config.ratios)
    modules = [Conv(config.dim, width, 7)]
    for ratio in config.ratios:
        modules += [nn.ELU(), ConvTranspose(width, width // 2, 2 * ratio, ratio),
                    Residual(nn.ELU(), Conv(width // 2, width // 4, 3), nn.ELU(), Conv(width // 4, width // 2, 1))]
        width //= 2
    return Chain(*modules, nn.ELU(), Conv(width, 1, 3))


class Layer(nn.Module):
    """Pre-norm attention, then two linear maps; LayerScale (arXiv:2103.17239) weighs each channel of what they add."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.attn = Attention(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.dim, EPS), nn.LayerNorm(config.dim, EPS)
        self.up, self.down = nn.Linear(config.dim, config.ffn, bias=False), nn.Linear(config.ffn, config.dim, bias=False)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((config.dim,), 0.01)) for _ in range(2))

    def forward(self, x: Tensor, past: Past) -> Tensor:             # (B, D, S)
        x = x.transpose(1, 2)                                       # -> (B, S, D)
        x = x + self.scale1 * self.attn(self.norm1(x), past)
        return (x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x))))).transpose(1, 2)


class Attention(nn.Module):
    """Each position sees itself and the 249 before it.  So many keys are kept and S more come in, 2 in a frame: 251 in all.

    moshi's ring has room for 250, and drops the oldest before the queries look: the first of the two misses one.
    """

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.heads, self.window = config.heads, config.window
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, past: Past) -> Tensor:             # (B, S, D)
        S = x.shape[1]
        start, keys, values = past.kept.get(self, (0, [], []))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # three of (B, H, S, D / H)
        q, k = rotate(torch.stack([q, k]), start)
        k, v = torch.cat([*keys, k], 2), torch.cat([*values, v], 2)                         # (B, H, L, D / H)
        if past.ring:
            k, v = k[:, :, -self.window:], v[:, :, -self.window:]
        L = k.shape[2]
        distance = torch.arange(L - S, L, device=x.device)[:, None] - torch.arange(L, device=x.device)
        y = F.scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance < self.window))
        past.kept[self] = (start + S, [k[:, :, -(self.window - 1):]], [v[:, :, -(self.window - 1):]])
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor, start: int) -> Tensor:
    """Rotary embedding of neighbouring pairs, positions from `start` on, in fp32 and by moshi's formula.   (..., S, head) -> same"""
    S, head = x.shape[-2:]
    frequencies = torch.exp(torch.arange(head // 2, device=x.device).float() * (-math.log(THETA) * 2 / head))
    angles = torch.arange(start, start + S, device=x.device).float()[:, None] * frequencies         # (S, head / 2)
    (a, b), cos, sin = x.float().unflatten(-1, (-1, 2)).unbind(-1), angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class ProjectedRVQ(nn.Module):
    """Residual VQ behind a projection, 512 -> 256 -> 512."""

    def __init__(self, config: MimiConfig, levels: int):
        super().__init__()
        self.project_in = nn.Conv1d(config.dim, config.codebook_dim, 1, bias=False)
        self.project_out = nn.Conv1d(config.codebook_dim, config.dim, 1, bias=False)
        self.codebooks = nn.ModuleList(nn.Module() for _ in range(levels))
        for codebook in self.codebooks:
            codebook.register_buffer("table", torch.zeros(config.codebook_size, config.codebook_dim))

    def encode(self, x: Tensor) -> Tensor:
        """(B, D, T) -> codes (B, Q, T).  Distances by torch.cdist as in both packages, so that near ties fall alike."""
        codes = torch.zeros(len(x), len(self.codebooks), x.shape[2], dtype=torch.int64, device=x.device)
        x = self.project_in(x).transpose(1, 2).reshape(-1, self.project_in.out_channels)        # -> (B T, D')
        for n, codebook in enumerate(self.codebooks):
            code = torch.cdist(x[None], codebook.table[None])[0].argmin(1)
            x = x - codebook.table[code]
            codes[:, n] = code.view(len(codes), -1)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, q <= Q, T) -> (B, D, T)."""
        x = sum(F.embedding(code.long(), book.table) for code, book in zip(codes.unbind(1), self.codebooks, strict=False))
        return self.project_out(x.transpose(1, 2))


# ---- official files ----

FILES = ("tokenizer-e351c8d8-checkpoint125.safetensors", "mimi-pytorch-e351c8d8@125.safetensors")     # in Kyutai's repositories
NAMES = (       # a pattern of our names -> Kyutai's, transformers'; all rows, one after the other
    (r"^(en|de)coder\.(\d+)\.(\d+)\.", r"\1coder.\2.block.\3.", r"\1coder.\2.block.\3."),
    (r"^(en|de)coder\.", r"\1coder.model.", r"\1coder.layers."),
    (r"^(\w+_transformer)\.", r"\1.transformer.layers.", r"\1.layers."),
    (r"^downsample\.", "downsample.conv.", "downsample."),
    (r"^upsample\.", "upsample.convtr.", "upsample."),
    (r"\.conv\.(weight|bias)$", r".conv.conv.\1", r".conv.\1"),
    (r"\.convtr\.(weight|bias)$", r".convtr.convtr.\1", r".conv.\1"),
    (r"\.norm1\.", ".norm1.", ".input_layernorm."),
    (r"\.norm2\.", ".norm2.", ".post_attention_layernorm."),
    (r"\.attn\.qkv\.", ".self_attn.in_projs.0.", ".self_attn.qkv_proj."),               # transformers: three matrices, see join_heads
    (r"\.attn\.out\.", ".self_attn.out_projs.0.", ".self_attn.o_proj."),
    (r"\.up\.", ".linear1.", ".mlp.fc1."),
    (r"\.down\.", ".linear2.", ".mlp.fc2."),
    (r"\.scale1$", ".layer_scale_1.scale", ".self_attn_layer_scale.scale"),
    (r"\.scale2$", ".layer_scale_2.scale", ".mlp_layer_scale.scale"),
    (r"^semantic\.", "quantizer.rvq_first.", "quantizer.semantic_residual_vector_quantizer."),
    (r"^acoustic\.", "quantizer.rvq_rest.", "quantizer.acoustic_residual_vector_quantizer."),
    (r"\.project_(in|out)\.", r".\1put_proj.", r".\1put_proj."),
    (r"\.codebooks\.(\d+)\.table$", r".vq.layers.\1._codebook.embedding", r".layers.\1.codebook.embedding"),        # see our_tensors
)
ALIASES = (     # other spellings -> those above: older files', and one for both layouts
    (r"\.(in|out)_proj(_|\.)weight$", r".\1_projs.0.weight"),
    (r"codebook\.(embed_avg|embed_sum)$", "codebook.embedding_sum"),
    (r"codebook\.cluster_size$", "codebook.cluster_usage"),
)


def official_names(codec: MimiCodec) -> dict[str, str]:
    """Names in both layouts -> ours, those of codebooks that this codec leaves unread among them."""
    ours = {*codec.state_dict(), *(f"acoustic.codebooks.{n}.table" for n in range(codec.config.num_codebooks - 1))}
    layouts = [(pattern, kyutai) for pattern, kyutai, _ in NAMES], [(pattern, hf) for pattern, _, hf in NAMES]
    return {replaced(name, rows): name for rows in layouts for name in ours}


def replaced(name: str, rows: Iterable[tuple[str, str]]) -> str:
    for pattern, new in rows:
        name = re.sub(pattern, new, name)
    return name


def our_tensors(official: Mapping[str, Tensor], names: Mapping[str, str], config: MimiConfig) -> dict[str, Tensor]:
    """A file's tensors under our names; what has none here keeps its own, and the strict loader reports it."""
    state = {}
    for name, tensor in official.items():
        spelt = replaced(name, ALIASES)
        state[f"{name} (twice)" if spelt in state else spelt] = tensor
    join_heads(state, config)
    for name in [name for name in state if name.endswith("codebook.embedding_sum")]:        # of what an entry won, as a moving average
        usage = name.replace("embedding_sum", "cluster_usage")                              # how often it won
        if usage in state and state[usage].shape == state[name].shape[:1]:
            state[name.removesuffix("_sum")] = state.pop(name).float() / state.pop(usage).float().clamp(min=EPS)[:, None]
    return {names.get(name, name): tensor for name, tensor in state.items()}


def join_heads(state: dict[str, Tensor], config: MimiConfig) -> None:
    """Make one matrix of transformers' q, k and v.  It rotates rows i and i + head / 2 of a head, we neighbours, as Kyutai does."""
    for stem in [name.removesuffix("q_proj.weight") for name in state if name.endswith(".q_proj.weight")]:
        parts = [f"{stem}{letter}_proj.weight" for letter in "qkv"]
        if all(part in state and state[part].shape == (config.dim, config.dim) for part in parts):
            q, k, v = (state.pop(part) for part in parts)
            q, k = (w.view(config.heads, 2, -1, config.dim).transpose(1, 2).reshape(config.dim, config.dim) for w in (q, k))
            state[f"{stem}qkv_proj.weight"] = torch.cat([q, k, v])


def is_mimi(path: Path) -> bool:
    """A folder with a Mimi of either layout in it, or one file with its tensors."""
    try:
        names = tensor_names(find_file(path) or path)
    except (ValueError, SafetensorError):
        return False
    return any(re.match(r"quantizer\.(rvq_first|semantic_residual_vector_quantizer)\.", name) for name in names)


def find_file(path: Path) -> Path | None:
    """The file with the weights: `path`, or in that folder the one that config.json names, a known one, or transformers'."""
    if not path.is_dir():
        return path if path.is_file() else None
    about = _json(path / "config.json") or {}
    named = Path(str(about.get("mimi_name") or "")).name
    if named and not (path / named).is_file():
        raise ValueError(f"mimi_name in {path}/config.json is {about['mimi_name']}, which is not there; fetch it, or name another file")
    names = [named] * bool(named) + [*FILES] + ["model.safetensors"] * (about.get("model_type") == "mimi")
    return next((path / name for name in names if (path / name).is_file()), None)


FIXED = {                       # what transformers could choose, Mimi never did, and no shape shows
    "sampling_rate": RATE, "use_causal_conv": True, "pad_mode": "constant", "trim_right_ratio": 1.0, "hidden_act": "gelu",
    "norm_eps": EPS, "rope_theta": THETA, "rope_type": "default"}
FIELDS = {                      # ours: transformers'
    "ratios": "upsampling_ratios", "width": "num_filters", "dim": "hidden_size", "layers": "num_hidden_layers", "ffn": "intermediate_size",
    "heads": "num_attention_heads", "window": "sliding_window", "num_codebooks": "num_quantizers",
    "codebook_size": "codebook_size", "codebook_dim": "codebook_dim"}


def read_config(path: Path) -> MimiConfig:
    """transformers' config.json; what is missing, all when it is no Mimi's, is as published.  ValueError for settings not known here."""
    about = _json(path) or {}
    if about.get("model_type") != "mimi":
        return MimiConfig()
    rope = about.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters is {rope!r}, expected an object; fetch it again")
    about = rope | {name: value for name, value in about.items() if value is not None}
    for name, wanted in FIXED.items():
        if about.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name} is {about[name]}, this codec supports {wanted}; name Kyutai's Mimi")
    given = {ours: about[theirs] for ours, theirs in FIELDS.items() if theirs in about}
    return MimiConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
