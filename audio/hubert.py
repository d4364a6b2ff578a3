"""HuBERT: self-supervised speech features (Hsu et al., 2021, arXiv:2106.07447), forward only.

    16 kHz wav -> 7 convolutions, one frame in 20 ms -> project -> + positional convolution -> 12 post-norm layers
    (B, W)        (B, 512, S)                           (B, S, 768)                            13 x (B, S, 768)

The Higgs tokenizer averages all 13 states into its semantic branch.  Two things differ from what one expects: the first
convolution alone is normalised, each channel over the whole clip (so one sample changes every frame, and nothing here
streams), and the wav is taken as it is, neither centred nor scaled.  This file also holds the strict loader of the
codecs beside it.  Next: higgs.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 2**20         # of all sizes that a codec's config names


@dataclass(frozen=True)
class HubertConfig:
    """HuBERT-base, 94.4 M weights; `ffn` is the inner width, `position_*` belong to the positional convolution."""
    dim: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    conv_dims: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    position_kernel: int = 128
    position_groups: int = 16
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_sizes(self, "HuBERT's")
        if not len(self.conv_dims) == len(self.conv_kernels) == len(self.conv_strides):
            raise ValueError(f"HuBERT has {len(self.conv_dims)} conv_dims, {len(self.conv_kernels)} conv_kernels and "
                             + f"{len(self.conv_strides)} conv_strides, expected as many of each; fix its config.json")

    def frames(self, samples: int) -> int:
        """How many frames come of so many samples at 16 kHz: W // 320 less one or none, and 0 below 400 samples."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            samples = max(0, (samples - kernel) // stride + 1)
        return samples

    @property
    def hop(self) -> int:
        """Samples from frame to frame."""
        return math.prod(self.conv_strides)


class Hubert(nn.Module):
    """The network; `load_strict` gives it weights, `hubert_names` has their names."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        self.config = config
        inputs = (1, *config.conv_dims[:-1])
        shapes = zip(inputs, config.conv_dims, config.conv_kernels, config.conv_strides, strict=True)
        self.convs = nn.ModuleList(nn.Conv1d(*shape, bias=False) for shape in shapes)
        self.group_norm = nn.GroupNorm(config.conv_dims[0], config.conv_dims[0])        # a group is one channel
        self.feature_norm = nn.LayerNorm(config.conv_dims[-1], config.eps)
        self.projection = nn.Linear(config.conv_dims[-1], config.dim)
        self.position = nn.Conv1d(config.dim, config.dim, config.position_kernel,
                                  padding=config.position_kernel // 2, groups=config.position_groups)
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, wav: Tensor) -> list[Tensor]:
        """(B, W >= 400) at 16 kHz -> layers + 1 states (B, S, D): what enters the first layer, and what leaves each."""
        B, W = wav.shape
        x = F.gelu(self.group_norm(self.convs[0](wav[:, None])))        # (B, W) -> (B, D, W / 5)
        for conv in self.convs[1:]:
            x = F.gelu(conv(x))
        x = self.projection(self.feature_norm(x.transpose(1, 2)))       # -> (B, S, D)
        S = x.shape[1]
        position = self.position(x.transpose(1, 2))[..., :S]            # an even kernel gives one frame too many
        states = [self.norm(x + F.gelu(position).transpose(1, 2))]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class Layer(nn.Module):
    """Attention over the whole clip, then two linear maps; each is normalised after its sum, as in the first Transformer."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.attn_norm = nn.LayerNorm(config.dim, config.eps)
        self.up, self.down = nn.Linear(config.dim, config.ffn), nn.Linear(config.ffn, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim, config.eps)

    def forward(self, x: Tensor) -> Tensor:         # (B, S, D)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, H, S, D / H)
        x = self.attn_norm(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.ffn_norm(x + self.down(F.gelu(self.up(x))))


# ---- weights ----

NAMES = (       # ours, transformers', fairseq's; {} is a layer's number
    ("convs.{}", "feature_extractor.conv_layers.{}.conv", "feature_extractor.conv_layers.{}.0"),
    ("group_norm", "feature_extractor.conv_layers.0.layer_norm", "feature_extractor.conv_layers.0.2"),
    ("feature_norm", "feature_projection.layer_norm", "layer_norm"),
    ("projection", "feature_projection.projection", "post_extract_proj"),
    ("position", "encoder.pos_conv_embed.conv", "encoder.pos_conv.0"),
    ("norm", "encoder.layer_norm", "encoder.layer_norm"),
    ("layers.{}.q", "encoder.layers.{}.attention.q_proj", "encoder.layers.{}.self_attn.q_proj"),
    ("layers.{}.k", "encoder.layers.{}.attention.k_proj", "encoder.layers.{}.self_attn.k_proj"),
    ("layers.{}.v", "encoder.layers.{}.attention.v_proj", "encoder.layers.{}.self_attn.v_proj"),
    ("layers.{}.out", "encoder.layers.{}.attention.out_proj", "encoder.layers.{}.self_attn.out_proj"),
    ("layers.{}.attn_norm", "encoder.layers.{}.layer_norm", "encoder.layers.{}.self_attn_layer_norm"),
    ("layers.{}.up", "encoder.layers.{}.feed_forward.intermediate_dense", "encoder.layers.{}.fc1"),
    ("layers.{}.down", "encoder.layers.{}.feed_forward.output_dense", "encoder.layers.{}.fc2"),
    ("layers.{}.ffn_norm", "encoder.layers.{}.final_layer_norm", "encoder.layers.{}.final_layer_norm"),
)


def hubert_names(config: HubertConfig) -> dict[str, str]:
    """Official module names, of both kinds -> ours."""
    names = {}
    for ours, *official in NAMES:
        count = len(config.conv_dims) if ours.startswith("convs") else config.layers
        names |= {name.format(n): ours.format(n) for name in official for n in range(count)}
    return names


def check_sizes(config: Any, what: str) -> None:
    """ValueError where a field of a codec's config has another type than its default, or a size that no codec has."""
    for field in fields(config):
        value, usual = getattr(config, field.name), field.default
        numbers = value if isinstance(value, tuple) and isinstance(usual, tuple) else (value,)
        if isinstance(usual, bool):
            fits = type(value) is bool
        elif isinstance(usual, float):
            fits = type(value) in (int, float) and 0 < value < math.inf
        else:
            fits = not isinstance(usual, (int, tuple)) or all(type(n) is int and 0 < n <= LARGEST for n in numbers)
        if not fits:
            kind = {bool: "true or false", float: "a number"}.get(type(usual), f"integers from 1 to {LARGEST}")
            raise ValueError(f"{what} {field.name} is {value!r}, expected {kind}; fix its config.json")


def load_strict(model: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str], unused: str, source: str) -> None:
    """Give a module its official tensors in float32; ValueError names what is missing, left over, misshapen or not finite.

    `names`: official module -> ours, where they differ.  `unused`: a pattern of official tensors that nothing here needs.
    """
    found = {}
    for name, tensor in fold_weight_norm(state).items():
        module, _, leaf = name.rpartition(".")
        ours = f"{names[module]}.{leaf}" if module in names else name
        if not re.fullmatch(unused, name):
            found[name if ours in found else ours] = tensor         # a second copy is reported as unknown
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        problems = [f"{word} {listed(some)}" for word, some in (("lacks", missing), ("holds the unknown", unknown)) if some]
        raise ValueError(f"{source} {' and '.join(problems)}; name the right file, or the config it was made with")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
            raise ValueError(f"{source}: {name} is {shapes}; pass the config it was made with")
        if not torch.isfinite(found[name]).all():
            raise ValueError(f"{source}: {name} holds NaN or infinity; fetch the file again")
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in found.items()}      # files are mapped, and may change
    model.load_state_dict(copies, strict=True, assign=True)


def listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each pair of weight norm, in the old or the new spelling, by the weight g v / |v| that it stands for.

    |v| runs over the axes along which g has one entry: (1, 2) for convolutions, transposed ones too, and (0, 1) for
    HuBERT's positional one, whose g has an entry for each tap.
    """
    folded = dict(state)
    for g_name, v_name in (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")):
        for name in [name for name in state if name.endswith(f".{g_name}")]:
            stem = name.removesuffix(g_name)
            if stem + v_name in state:              # a half alone stays, and is reported as unknown
                g, v = folded.pop(name).float(), folded.pop(stem + v_name).float()
                axes = [axis for axis, size in enumerate(g.shape) if size == 1]
                folded[f"{stem}weight"] = v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True))
    return folded
