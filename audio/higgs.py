"""The Higgs Audio v2 tokenizer: 24 kHz speech as 25 frames a second of 8 codes of 10 bits (2 kbit/s).

             +-> 16 kHz -> HuBERT, mean of its 13 states, every 2nd -> convolutions ---+
    wav -----+                                                                         +-> fc -> RVQ -> codes
             +-> DAC encoder, strides 8 5 4 2 3 = 960 ---------------------------------+         (B, 8, T)
    codes -> sum of codebook entries ->            fc2 -> DAC decoder -> wav                    (B, 1, 960 T)

The codes thus contain both the content (HuBERT) and the sound (DAC); a linear map selects what the DAC decoder needs.
After X-Codec (arXiv:2408.17175), with DAC (arXiv:2306.06546) and HuBERT (hubert.py).

    codec = HiggsCodec.load("higgs-audio-v2-tokenizer/")    # boson's model.pth or transformers' model.safetensors; v3's folder

Module names are those of the transformers layout; `official_names` maps boson's onto them.  Decoding streams, sample
for sample; encoding does not, since HuBERT normalises and attends over the whole clip. Next: snac.py.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from audio.hub import torch_tensors
from audio.hubert import Hubert, HubertConfig, check_sizes, hubert_names, load_strict
from audio.rvq import check_codes, nearest

RATE, SEMANTIC_RATE = 24_000, 16_000
DILATIONS = (1, 3, 9)       # of the three residual units in a DAC block
PADS = ("mult960", "boson", "hf")
MODEL, INSIDE = "higgs_multimodal_qwen3", "tied.embedding.modality_embeddings.0.model."     # Higgs Audio v3, whose file holds the codec
UNUSED = "|".join((                                     # official tensors of training only
    r"decoder_semantic\..*", r"fc1\..*", r"fc_post1\..*",                     # they rebuild HuBERT's states
    r".*codebook\.(embed_avg|cluster_size|inited)",                           # the codebooks' moving averages
    r"semantic_model\.masked_spec_embed"))


@dataclass(frozen=True)
class HiggsCodecConfig:
    """The published tokenizer, 183.0 M weights for encoding and decoding."""
    ratios: tuple[int, ...] = (8, 5, 4, 2, 3)       # strides of the DAC encoder, and of its decoder in the same order
    encoder_width: int = 64                         # channels before the first stride; each one doubles them
    decoder_width: int = 1024                       # channels before the first stride; each one halves them
    acoustic_dim: int = 256
    num_codebooks: int = 8
    codebook_size: int = 1024
    codebook_dim: int = 64
    hubert: HubertConfig = field(default_factory=HubertConfig)

    def __post_init__(self) -> None:
        check_sizes(self, "the Higgs tokenizer's")
        if self.hop * SEMANTIC_RATE % (RATE * self.hubert.hop):
            unit = self.hubert.hop * RATE / SEMANTIC_RATE
            raise ValueError(f"ratios {self.ratios} give {self.hop} samples a frame; HuBERT's hop needs a multiple of {unit:g} at 24 kHz")

    @property
    def hop(self) -> int:
        """Samples at 24 kHz in a frame: 960."""
        return math.prod(self.ratios)

    @property
    def semantic_stride(self) -> int:
        """HuBERT frames in a frame: 2."""
        return self.hop * SEMANTIC_RATE // (RATE * self.hubert.hop)

    @property
    def dim(self) -> int:
        """Width of what is quantised: acoustic 256 + semantic 768."""
        return self.acoustic_dim + self.hubert.dim


class HiggsCodec(nn.Module):
    """Encode and decode speech; `HiggsCodec.load(path)` gives one with weights.

    pad says how the two branches come to the same number of frames when W is no multiple of 960:
    "mult960" fills the last frame with silence first: both official codecs then give the same codes;
    "boson" and "hf" run the acoustic encoder again on sound with 320 or 480 more samples of silence on each side,
    which is what those two do, and why some 5 % of their codes differ for W % 960 in about 240..640.
    """
    name = "higgs"
    sample_rate = RATE

    def __init__(self, config: HiggsCodecConfig | None = None, pad: str = "mult960"):
        super().__init__()
        if pad not in PADS:
            raise ValueError(f"the Higgs tokenizer has no pad mode {pad!r}; choose one of: {', '.join(PADS)}")
        self.config = config = config or HiggsCodecConfig()
        self.pad = pad
        self.frame_rate = RATE / config.hop
        self.num_codebooks, self.codebook_size = config.num_codebooks, config.codebook_size
        self.acoustic_encoder = acoustic_encoder(config.encoder_width, config.ratios, config.acoustic_dim)
        self.acoustic_decoder = acoustic_decoder(config.decoder_width, config.ratios, config.acoustic_dim)
        self.semantic_model = Hubert(config.hubert)
        self.encoder_semantic = semantic_encoder(config.hubert.dim)
        self.fc = nn.Linear(config.dim, config.dim)
        self.fc2 = nn.Linear(config.dim, config.acoustic_dim)
        self.quantizer = ProjectedRVQ(config)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """(B, 1, W) at 24 kHz -> codes (B, 8, T) int64, T = ceil(W / 960) unless `pad` says otherwise."""
        hop, W = self.config.hop, check_wav(wav)
        wav = wav.to(self.fc.weight.dtype)
        if self.pad == "mult960":
            wav = F.pad(wav, (0, -W % hop))
        elif W < hop:
            raise ValueError(f"{W} samples are less than one frame of {hop}; load the codec with pad='mult960'")
        semantic = self.encoder_semantic(self.semantic_states(wav[:, 0]))                   # (B, 768, T)
        acoustic = self.acoustic_encoder(wav)                                               # (B, 256, T or T - 1)
        if acoustic.shape[2] != semantic.shape[2]:
            side = hop // 2 if self.pad == "hf" else 160 * self.config.semantic_stride
            acoustic = self.acoustic_encoder(F.pad(wav, (side, side)))
        T = min(acoustic.shape[2], semantic.shape[2])
        return self.quantizer.encode(self.fc(torch.cat([acoustic[..., :T], semantic[..., :T]], 1).transpose(1, 2)))     # of (B, 1024, T)

    def semantic_states(self, wav: Tensor) -> Tensor:
        """(B, W) at 24 kHz -> the mean of HuBERT's states at the codec's frame rate, (B, D, T)."""
        states = self.semantic_model(F.pad(resample_24_to_16(wav), (160, 160)))
        return torch.stack(states).mean(0)[:, :: self.config.semantic_stride].transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, 1..8, T) in 0..1023 -> (B, 1, 960 T), near [-1, 1]; fewer codebooks give a coarser sound."""
        check_codes(codes, self.num_codebooks, self.codebook_size)
        if codes.shape[2] == 0:
            return torch.zeros(len(codes), 1, 0, device=codes.device)
        return self.acoustic_decoder(self.fc2(self.quantizer.decode(codes.long())).transpose(1, 2))       # of (B, T, 256)

    def stream(self) -> "HiggsStream":
        """A fresh stateful decoder over this codec."""
        return HiggsStream(self)

    @property
    def context(self) -> int:
        """Frames before and behind one that its samples depend on, rounded up: 11 for the published ratios."""
        return math.ceil(reach(self.config.ratios))

    @classmethod
    def load(cls, path: str | Path, config: HiggsCodecConfig | None = None, pad: str = "mult960", device: str = "cpu") -> "HiggsCodec":
        """Read a folder (config.json and model.safetensors or model.pth) or one such file; strict.

        config: None takes the config.json in the folder or beside the file, or else the published values.
        """
        path = Path(path)
        file = weights_file(path)
        inside = INSIDE if (_json(file.parent / "config.json") or {}).get("model_type") == MODEL else ""
        config = config or (None if inside else read_config(file.parent / "config.json")) or HiggsCodecConfig()
        with torch.device("meta"):                  # no time spent on weights that are overwritten
            codec = cls(config, pad)
        found = {name.removeprefix(inside): tensor for name, tensor in read_tensors(file, begin=inside).items()}
        load_strict(codec, found, official_names(config), UNUSED, str(file))
        return codec.to(device).eval().requires_grad_(False)


def reach(ratios: Sequence[int]) -> float:
    """Inputs before and behind one that the samples of a decoder depend on, which makes them longer by these ratios."""
    inputs, rate = 3.0, 1                           # the first convolution; samples an input so far
    for ratio in ratios:
        inputs += 1 / rate                          # what a transposed convolution joins
        rate *= ratio
        inputs += 3 * sum(DILATIONS) / rate
    return inputs + 3 / rate


class HiggsStream:
    """Decode piece by piece: the pieces joined equal the whole.

    A frame's samples are certain once 11 more frames are there (0.44 s) or flush() says that none will come; as many
    behind it are kept as context, so each piece costs its own length and 22 frames.
    """

    def __init__(self, codec: HiggsCodec):
        self.codec, self.context = codec, codec.context
        self.codes = None           # (B, 8, n) from the context of the next frame on
        self.first = 0              # number of the first frame in self.codes
        self.done = 0               # frames of self.codes already decoded; the rest of the past is context

    def decode(self, codes: Tensor) -> Tensor:
        """Take codes (B, 8, n >= 0), give the samples (B, 1, m >= 0) that are certain."""
        check_codes(codes, self.codec.num_codebooks, self.codec.codebook_size)
        self.codes = codes if self.codes is None else torch.cat([self.codes, codes], 2)
        return self._decode(max(self.codes.shape[2] - self.context, self.done))

    def flush(self) -> Tensor:
        """End the codes: the samples (B, 1, m) that were held back."""
        assert self.codes is not None, "flush() before decode()"
        wav = self._decode(self.codes.shape[2])
        self.codes, self.first, self.done = None, 0, 0
        return wav

    def _decode(self, until: int) -> Tensor:
        if until == self.done:
            return torch.zeros(len(self.codes), 1, 0, device=self.codes.device)
        hop = self.codec.config.hop
        wav = self.window(self.codes[:, :, : until + self.context])[:, :, self.done * hop: until * hop]
        past = max(0, until - self.context)
        self.codes, self.first, self.done = self.codes[:, :, past:], self.first + past, until - past
        return wav

    def window(self, codes: Tensor) -> Tensor:
        """The samples of the frames that are kept."""
        return self.codec.decode(codes)


def check_wav(wav: Tensor) -> int:
    """W of sound (B, 1, W); ValueError when it is anything else, or empty, or not finite."""
    if wav.dim() != 3 or wav.shape[1] != 1 or not wav.is_floating_point():
        raise ValueError(f"sound is {wav.dtype} {tuple(wav.shape)}, expected float (B, 1, W) at 24 kHz; mix it down, pass wav[:, None]")
    if wav.shape[0] == 0 or wav.shape[2] == 0:
        raise ValueError(f"sound is empty, {tuple(wav.shape)}; leave empty clips out")
    if not torch.isfinite(wav).all():
        raise ValueError("the sound holds NaN or infinite samples; look upstream for the first of them")
    return wav.shape[2]


def resample_24_to_16(wav: Tensor) -> Tensor:
    """(B, W) -> (B, ceil(2 W / 3)), sample for sample as the official codecs do it (torchaudio's default).

    Not wav.resample: the codes of a clip depend on this filter, a short one with its cut-off right below 8 kHz.
    """
    kernel = _resampling_filters().to(wav)
    x = F.conv1d(F.pad(wav[:, None], (10, 13)), kernel, stride=3)       # (B, W) -> (B, 2, W // 3 + 1), a channel is a phase
    return x.transpose(1, 2).flatten(1)[:, : -(-2 * wav.shape[1] // 3)]


@lru_cache(maxsize=1)
def _resampling_filters() -> Tensor:
    """(2, 1, 23): 6 zero crossings of a sinc on each side, cut off at 0.99 of 8 kHz, under a squared cosine."""
    cutoff, zeros = 0.99 * 2, 6                                         # in half the common rate of 8 kHz
    taps = torch.arange(-10, 13, dtype=torch.float64) / 3
    phases = torch.arange(2, dtype=torch.float64) / 2
    t = ((taps - phases[:, None]) * cutoff).clamp(-zeros, zeros)
    return (torch.sinc(t) * torch.cos(math.pi * t / zeros / 2) ** 2 * cutoff / 3).float()[:, None]


# ---- modules ----

class ProjectedRVQ(nn.Module):
    """Residual VQ whose codebooks each look at the residual through a projection of their own: 1024 -> 64 -> 1024."""

    def __init__(self, config: HiggsCodecConfig):
        super().__init__()
        self.quantizers = nn.ModuleList(ProjectedVQ(config) for _ in range(config.num_codebooks))

    def encode(self, x: Tensor) -> Tensor:
        """(B, T, D) -> codes (B, Q, T)."""
        codes = []
        for quantizer in self.quantizers:
            code = quantizer.encode(x)
            x = x - quantizer.decode(code)
            codes.append(code)
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, q <= Q, T) -> (B, T, D)."""
        return sum(quantizer.decode(code) for quantizer, code in zip(self.quantizers, codes.unbind(1), strict=False))


class ProjectedVQ(nn.Module):
    def __init__(self, config: HiggsCodecConfig):
        super().__init__()
        self.project_in = nn.Linear(config.dim, config.codebook_dim)
        self.project_out = nn.Linear(config.codebook_dim, config.dim)
        self.codebook = nn.Module()                 # a module of its own, for the official name codebook.embed
        self.codebook.register_buffer("embed", torch.zeros(config.codebook_size, config.codebook_dim))

    def encode(self, x: Tensor) -> Tensor:          # (B, T, D) -> (B, T)
        return nearest(self.project_in(x).flatten(0, 1), self.codebook.embed).view(x.shape[:2])

    def decode(self, code: Tensor) -> Tensor:       # (B, T) -> (B, T, D)
        return self.project_out(F.embedding(code, self.codebook.embed))


def snake(x: Tensor, rate: Tensor, height: Tensor) -> Tensor:
    """x + sin^2(rate x) / height (arXiv:2006.08195), with memory taken once: to get it costs more than to compute."""
    return (rate * x).sin_().square_().div_(height + 1e-9).add_(x)


class Snake(nn.Module):
    """With one rate for each channel, which is its height too: periodic where a voice is, yet never flat."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1))

    def forward(self, x: Tensor) -> Tensor:         # (B, D, W)
        return snake(x, self.alpha, self.alpha)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).add_(x)


def chain(kind: type[nn.Sequential] = nn.Sequential, **modules: nn.Module) -> nn.Sequential:
    """Modules one behind the other, under the names that their tensors have in official files."""
    return kind(OrderedDict(modules))


def semantic_encoder(dim: int) -> nn.Sequential:
    """HuBERT's states (B, D, T) -> the same shape: a convolution, then twice two residual units and a convolution."""
    def unit() -> nn.Sequential:
        return chain(Residual, elu1=nn.ELU(), conv1=nn.Conv1d(dim, dim, 3, padding=1, bias=False),
                     elu2=nn.ELU(), conv2=nn.Conv1d(dim, dim, 1, bias=False))

    def block() -> nn.Sequential:
        return chain(res_units=nn.Sequential(unit(), unit()), conv=nn.Conv1d(dim, dim, 3, padding=1))
    return chain(conv=nn.Conv1d(dim, dim, 3, padding=1, bias=False), conv_blocks=nn.Sequential(block(), block()))


def acoustic_encoder(width: int, ratios: Sequence[int], dim: int) -> nn.Sequential:
    """DAC's: sound (B, 1, W) -> (B, D, about W / 960).  A block has `stride` times fewer samples, twice the channels."""
    widths = [width << n for n in range(len(ratios) + 1)]
    blocks = [chain(**acoustic_units(width), snake1=Snake(width),
                    conv1=Falling(width, 2 * width, 2 * stride, stride, padding=math.ceil(stride / 2)))
              for width, stride in zip(widths, ratios, strict=False)]
    return chain(conv1=nn.Conv1d(1, width, 7, padding=3), block=nn.Sequential(*blocks),
                 snake1=Snake(widths[-1]), conv2=nn.Conv1d(widths[-1], dim, 3, padding=1))


def acoustic_decoder(width: int, ratios: Sequence[int], dim: int) -> nn.Sequential:
    """DAC's the other way: (B, D, T) -> sound (B, 1, 960 T); of exactly that length, and without DAC's tanh at the end."""
    widths = [width >> n for n in range(len(ratios) + 1)]
    blocks = [chain(snake1=Snake(width),
                    conv_t1=Rising(width, width // 2, 2 * stride, stride, math.ceil(stride / 2), stride % 2),
                    **acoustic_units(width // 2)) for width, stride in zip(widths, ratios, strict=False)]
    return chain(conv1=nn.Conv1d(dim, width, 7, padding=3), block=nn.Sequential(*blocks),
                 snake1=Snake(widths[-1]), conv2=nn.Conv1d(widths[-1], 1, 7, padding=3))


class Falling(nn.Conv1d):
    """A convolution; a large one with strides is one product on a CPU, where torch would put its weights into another order each time."""

    def forward(self, x: Tensor) -> Tensor:         # (B, D, stride t) -> (B, D', about t)
        if x.is_cuda or self.stride == (1,) or self.groups > 1 or self.dilation != (1,) or self.weight.numel() < 1 << 22:
            return super().forward(x)
        parts = F.pad(x, 2 * self.padding).unfold(2, *self.kernel_size, *self.stride).transpose(1, 2).flatten(2)       # (B, t, D k)
        return F.linear(parts, self.weight.flatten(1), self.bias).mT


class Rising(nn.ConvTranspose1d):
    """A transposed convolution whose kernel is two strides, so each output is the sum of two: one product where torch's is slow."""

    def forward(self, x: Tensor) -> Tensor:         # (B, D, t) -> (B, D', about stride t)
        if x.is_cuda or self.groups > 1 or self.kernel_size[0] != 2 * self.stride[0]:
            return super().forward(x)
        (r,), (p,), (more,) = self.stride, self.padding, self.output_padding
        now, later = (self.weight.flatten(1).mT @ x).view(len(x), -1, 2, r, x.shape[2]).mT.unbind(2)        # two of (B, D', t, r)
        y = F.pad(now, (0, 0, 0, 1))
        y[:, :, 1:] += later
        return y.flatten(2)[..., p : y.shape[2] * r - p + more] + self.bias[:, None]


def acoustic_units(dim: int) -> dict[str, nn.Module]:
    """The three residual units of a DAC block; one sees 3 x dilation samples to each side."""
    return {f"res_unit{n}": chain(Residual, snake1=Snake(dim), conv1=nn.Conv1d(dim, dim, 7, dilation=d, padding=3 * d),
                                  snake2=Snake(dim), conv2=nn.Conv1d(dim, dim, 1)) for n, d in enumerate(DILATIONS, 1)}


# ---- official files ----

def official_names(config: HiggsCodecConfig) -> dict[str, str]:
    """Official module names -> ours, where they differ: all of boson's, and HuBERT's in both layouts.

    Boson's encoder and decoder are numbered lists: the ends stand before and behind the blocks, and a block holds its
    snake and strided convolution behind (encoder) or before (decoder) its residual units.
    """
    names = {f"semantic_model.{official}": f"semantic_model.{ours}" for official, ours in hubert_names(config.hubert).items()}
    names |= {"fc_prior": "fc", "fc_post2": "fc2", "encoder_semantic.conv.conv": "encoder_semantic.conv"}
    for n in range(config.num_codebooks):
        layer, ours = f"quantizer.vq.layers.{n}", f"quantizer.quantizers.{n}"
        names |= {f"{layer}.{theirs}": f"{ours}.{theirs.lstrip('_')}" for theirs in ("project_in", "project_out", "_codebook")}
    for block in (f"encoder_semantic.conv_blocks.{n}" for n in range(2)):
        names |= {f"{module}.conv": module for module in (f"{block}.conv", f"{block}.res_units.0.conv1", f"{block}.res_units.1.conv1")}
    ends = dict(zip((0, len(config.ratios) + 1, len(config.ratios) + 2), ("conv1", "snake1", "conv2"), strict=True))
    for theirs, ours, units, inner in (("encoder.block", "acoustic_encoder", 0, {3: "snake1", 4: "conv1"}),
                                       ("decoder_2.model", "acoustic_decoder", 2, {0: "snake1", 1: "conv_t1"})):
        names |= {f"{theirs}.{n}": f"{ours}.{end}" for n, end in ends.items()}
        for b in range(len(config.ratios)):
            block, mine = f"{theirs}.{b + 1}.block", f"{ours}.block.{b}"
            names |= {f"{block}.{n}": f"{mine}.{part}" for n, part in inner.items()}
            names |= {f"{block}.{units + u}.block.{n}": f"{mine}.res_unit{u + 1}.{part}"
                      for u in range(len(DILATIONS)) for n, part in enumerate(("snake1", "conv1", "snake2", "conv2"))}
    return names


def is_higgs(path: Path) -> bool:
    """A folder whose config.json is a Higgs tokenizer's, or one file with its tensors."""
    if path.is_dir():
        about = _json(path / "config.json") or {}
        return about.get("model_type") in ("higgs_audio_v2_tokenizer", MODEL) or "semantic_techer" in about
    try:
        names = tensor_names(path)
    except (ValueError, SafetensorError):
        return False
    return {"fc2.bias", "acoustic_encoder.conv1.bias"} <= names or {"fc_post2.bias", "encoder.block.0.bias"} <= names


def tensor_names(path: Path) -> set[str]:
    """The names of a file's tensors; none when it is no file of tensors by its name."""
    if path.suffix == ".safetensors" and path.is_file():
        with safe_open(path, "pt") as file:
            return set(file.keys())
    return set(read_tensors(path)) if path.suffix in (".pth", ".pt", ".bin") and path.is_file() else set()


def weights_file(path: Path) -> Path:
    """The file with the weights: `path`, or the one in that folder."""
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "model.pth", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither model.safetensors nor model.pth; fetch the tokenizer's repository whole")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"no Higgs tokenizer at {path}; name its folder or its model.pth")
    return path


def read_tensors(path: Path, unread: Sequence[str] = (), begin: str = "") -> Mapping[str, Tensor]:
    """All tensors of a .safetensors file or of a state dict saved by torch, read without unpickling anything else.

    unread: names of what else such a dict may hold, left out. begin: how the names of a part of a safetensors file begin.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(begin)}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    return torch_tensors(path, unread)


def read_config(path: Path) -> HiggsCodecConfig | None:
    """A config.json of either layout; None where there is none.  ValueError for settings that this codec does not know."""
    about = _json(path)
    if about is None:
        return None
    for name, wanted in FIXED.items():
        if about.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name} is {about[name]}, this codec supports {wanted}; name the Higgs Audio v2 tokenizer")
    try:
        if "semantic_techer" not in about:
            return _transformers_config(about)
        if about["semantic_techer"] not in ("hubert_base", "hubert_base_general"):
            raise ValueError(f"{path}: the semantic model is {about['semantic_techer']}, this codec supports hubert_base_general")
        return HiggsCodecConfig(tuple(about["ratios"]), acoustic_dim=about["D"], num_codebooks=about["n_q"],
                                codebook_size=about["bins"], codebook_dim=about["codebook_dim"])   # boson's code has the rest
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; fetch it again from the tokenizer's repository") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a Higgs tokenizer's config ({error}); fetch it again") from error


def _transformers_config(about: dict) -> HiggsCodecConfig:
    """What is missing has the default that transformers gives it; the number of codebooks follows from the bit rate."""
    dac, hubert = about["acoustic_model_config"], about["semantic_model_config"]
    ratios = tuple(dac["downsampling_ratios"])
    if tuple(dac.get("upsampling_ratios", ratios)) != ratios:
        raise ValueError(f"decoder ratios {dac['upsampling_ratios']} are not the encoder's {list(ratios)}; name the published tokenizer")
    if hubert.get("do_stable_layer_norm") or hubert.get("feat_extract_norm", "group") != "group" or hubert.get("conv_bias"):
        raise ValueError("the semantic model is not of HuBERT-base's kind; name a tokenizer made with hubert-base")
    size = about.get("codebook_size", 1024)
    rate = math.ceil(RATE / math.prod(ratios)) * math.ceil(math.log2(size))                     # bit/s of one codebook
    given = {ours: hubert[theirs] for ours, theirs in HUBERT_FIELDS.items() if theirs in hubert}
    return HiggsCodecConfig(
        ratios, dac.get("encoder_hidden_size", 64), dac.get("decoder_hidden_size", 1024), dac.get("hidden_size", 256),
        int(1000 * about.get("target_bandwidths", [4])[-1] // rate), size, about.get("codebook_dim", 64),
        HubertConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}))


FIXED = {                       # what both layouts could choose, and never did
    "sample_rate": RATE, "semantic_sample_rate": SEMANTIC_RATE, "downsample_factor": 320, "downsample_mode": "step_down", "vq_scale": 1,
    "kernel_size": 3, "unit_kernel_size": 3, "channel_ratios": [1, 1], "strides": [1, 1], "block_dilations": [1, 1]}
HUBERT_FIELDS = {               # ours: transformers'
    "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "ffn": "intermediate_size",
    "conv_dims": "conv_dim", "conv_kernels": "conv_kernel", "conv_strides": "conv_stride", "eps": "layer_norm_eps",
    "position_kernel": "num_conv_pos_embeddings", "position_groups": "num_conv_pos_embedding_groups"}


def _json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    return about if isinstance(about, dict) else {}
