"""The flow decoder of CosyVoice 2 (arXiv:2412.10117) as MOSS-Speech has it: codes at 12.5 Hz -> mel spectrum at 50 Hz.

    codes -> embeddings -> look 3 ahead -> conformer -> x 4 -> conformer -> mu                (B, T) -> (B, 80, 4 T)
    noise = x(0) -> 10 Euler steps along dx/dt = field(x, t; mu, speaker, the voice's own mel) -> x(1) = mel

The field, a causal U-Net with attention, learned to carry noise straight to speech (flow matching, arXiv:2210.02747, by
way of Matcha-TTS, arXiv:2309.03199).  It is evaluated twice in each step, with and without conditions (classifier-free
guidance).  The voice's codes come first and their mel is given, so the output continues the voice.
With a chunk size, attention sees whole chunks and the past: mel in whole chunks is final.
Module names are the official ones.  Next: hift.py.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio.hift import MELS

RATIO = 4                   # frames of mel in a code
AHEAD = 3                   # codes that the conformer looks ahead
STEPS, GUIDANCE = 10, 0.7   # of the Euler solver
MOST = 15_000               # frames (300 s), the voice's among them, for which there is noise
HEAD = 64                   # width of a head in the field


@dataclass(frozen=True)
class FlowConfig:
    """Sizes of the flow decoder, 120.7 M weights; all can be read off its tensors."""
    vocab: int = 20_480
    dim: int = 512
    heads: int = 8
    ffn: int = 2048
    blocks: int = 6             # of the conformer, before and behind the upsampling
    up_blocks: int = 4
    speaker: int = 192
    width: int = 256            # of the estimator
    unet_heads: int = 8
    depth: int = 4              # transformer blocks in each of its stages
    mid: int = 12               # stages between the first and the last


class Known(Protocol):
    """The start of the speech: codes (1, n), their mel (1, 4 n, 80), and who speaks (1, 192)."""
    codes: Tensor
    mel: Tensor
    speaker: Tensor


class Flow(nn.Module):
    """A path from noise to mel: dx/dt = the estimator's field, which knows the codes, the speaker and the voice's mel."""

    def __init__(self, config: FlowConfig, chunk: int):
        super().__init__()
        self.chunk = chunk
        self.input_embedding = nn.Embedding(config.vocab, config.dim)
        self.spk_embed_affine_layer = nn.Linear(config.speaker, MELS)
        self.encoder = Conformer(config)
        self.encoder_proj = nn.Linear(config.dim, MELS)
        self.decoder = nn.Module()                  # a module of its own, for the official name decoder.estimator
        self.decoder.estimator = Estimator(config)

    def forward(self, codes: Tensor, voice: Known, count: int) -> Tensor:
        """Codes (B, count + 0..3), those behind `count` being looked at only -> mel (B, 80, 4 count)."""
        voiced, B = voice.codes.shape[1], len(codes)
        x = self.input_embedding(torch.cat([voice.codes.to(codes.device).expand(B, -1), codes], 1))
        mu = self.encoder_proj(self.encoder(x, voiced + count, self.chunk)).transpose(1, 2)         # -> (B, 80, S)
        S = mu.shape[2]
        speaker = self.spk_embed_affine_layer(F.normalize(voice.speaker.to(mu), dim=1)).expand(B, -1)
        known = F.pad(voice.mel.to(mu).transpose(1, 2), (0, RATIO * count)).expand(B, -1, -1)       # the voice's mel, then nothing
        mask = chunk_mask(S, RATIO * self.chunk, mu.device)
        x = noise(mu.device)[:, :, :S].to(mu).expand(B, -1, -1)
        given = torch.cat([mu, speaker[:, :, None].expand(-1, -1, S), known], 1)                    # (B, 240, S)
        given = torch.cat([given, torch.zeros_like(given)])         # the second half is unconditional: classifier-free guidance
        times = 1 - torch.cos(torch.linspace(0, 1, STEPS + 1, device=mu.device) * 0.5 * torch.pi)
        for t, dt in zip(times, times.diff(), strict=False):
            informed, blind = self.decoder.estimator(torch.cat([x.repeat(2, 1, 1), given], 1), t, mask).chunk(2)
            x = x + dt * ((1 + GUIDANCE) * informed - GUIDANCE * blind)
        return x[:, :, RATIO * voiced:]


@lru_cache(maxsize=2)
def noise(device: torch.device) -> Tensor:
    """(1, 80, 15000), always the same: what the published decoder draws after seeding with 0."""
    return torch.randn(1, MELS, MOST, generator=torch.Generator().manual_seed(0)).to(device)


def chunk_mask(S: int, chunk: int, device: torch.device) -> Tensor | None:
    """(S, S), True where a query (row) sees a key: its own chunk and those before; None when all do."""
    if not chunk:
        return None
    number = torch.arange(S, device=device) // chunk
    return number[:, None] >= number


class Conformer(nn.Module):
    """Codes' embeddings at 12.5 Hz -> states at 50 Hz: a look ahead, blocks, each state four times, blocks."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        dim = config.dim
        self.embed, self.up_embed = Embed(dim), Embed(dim)
        self.pre_lookahead_layer = nn.Module()
        self.pre_lookahead_layer.conv1, self.pre_lookahead_layer.conv2 = nn.Conv1d(dim, dim, AHEAD + 1), nn.Conv1d(dim, dim, 3)
        self.encoders = nn.ModuleList(ConformerBlock(config) for _ in range(config.blocks))
        self.up_layer = nn.Module()
        self.up_layer.conv = nn.Conv1d(dim, dim, 2 * RATIO + 1)
        self.up_encoders = nn.ModuleList(ConformerBlock(config) for _ in range(config.up_blocks))
        self.after_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, count: int, chunk: int) -> Tensor:         # (B, count + 0..3, D) -> (B, 4 count, D)
        x = self.embed(x)
        ahead = F.pad(x.transpose(1, 2), (0, AHEAD - (x.shape[1] - count)))
        h = F.leaky_relu(self.pre_lookahead_layer.conv1(ahead))
        x = x[:, :count] + self.pre_lookahead_layer.conv2(F.pad(h, (2, 0))).transpose(1, 2)
        x = run(self.encoders, x, chunk)
        x = F.pad(x.transpose(1, 2).repeat_interleave(RATIO, 2), (2 * RATIO, 0))
        x = self.up_embed(self.up_layer.conv(x).transpose(1, 2))
        return self.after_norm(run(self.up_encoders, x, RATIO * chunk))


def run(blocks: nn.ModuleList, x: Tensor, chunk: int) -> Tensor:
    mask, distances = chunk_mask(x.shape[1], chunk, x.device), sinusoids(x.shape[1], x.shape[2]).to(x)
    for block in blocks:
        x = block(x, distances, mask)
    return x


def sinusoids(S: int, dim: int) -> Tensor:
    """Sines and cosines in turn for the distances S - 1 down to -(S - 1) of a query from a key, (2 S - 1, D)."""
    angles = torch.arange(S - 1, -S, -1)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000) / dim))
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


class Embed(nn.Module):
    """A linear map, a norm, and the factor that Transformers give their embeddings."""

    def __init__(self, dim: int):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * math.sqrt(x.shape[-1])


class ConformerBlock(nn.Module):
    """Pre-norm attention and two linear maps; this conformer has no convolutions inside."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.self_attn = RelativeAttention(config.dim, config.heads)
        self.feed_forward = nn.Module()
        self.feed_forward.w_1, self.feed_forward.w_2 = nn.Linear(config.dim, config.ffn), nn.Linear(config.ffn, config.dim)
        self.norm_mha, self.norm_ff = nn.LayerNorm(config.dim, 1e-12), nn.LayerNorm(config.dim, 1e-12)

    def forward(self, x: Tensor, distances: Tensor, mask: Tensor | None) -> Tensor:         # (B, S, D)
        x = x + self.self_attn(self.norm_mha(x), distances, mask)
        return x + self.feed_forward.w_2(F.silu(self.feed_forward.w_1(self.norm_ff(x))))


class RelativeAttention(nn.Module):
    """Transformer-XL's (arXiv:1901.02860): (q + u) k + (q + v) p, p being what the distance of query and key stands for."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(dim, dim) for _ in range(4))
        self.linear_pos = nn.Linear(dim, dim, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.zeros(heads, dim // heads)) for _ in range(2))

    def forward(self, x: Tensor, distances: Tensor, mask: Tensor | None) -> Tensor:         # (B, S, D)
        S = x.shape[1]
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.linear_q, self.linear_k, self.linear_v))
        p = self.linear_pos(distances).unflatten(-1, (self.heads, -1)).transpose(0, 1)      # (H, 2 S - 1, D / H)
        scores = (q + self.pos_bias_v[:, None]) @ p.transpose(1, 2)                         # (B, H, S, 2 S - 1)
        column = torch.arange(S, device=x.device)
        bias = scores.gather(3, (S - 1 - column[:, None] + column).expand(*scores.shape[:2], S, S)) / math.sqrt(q.shape[-1])
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf)
        y = F.scaled_dot_product_attention(q + self.pos_bias_u[:, None], k, v, bias)
        return self.linear_out(y.transpose(1, 2).flatten(2))


class Estimator(nn.Module):
    """The field: (x, mu, speaker, known mel) and the time -> dx/dt.  A U-Net of one resolution, causal but for its chunks."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        width, inputs = config.width, 4 * MELS
        self.time_mlp = nn.Module()
        self.time_mlp.linear_1, self.time_mlp.linear_2 = nn.Linear(inputs, 4 * width), nn.Linear(4 * width, 4 * width)
        self.down_blocks = nn.ModuleList([stage(inputs, config, last=CausalConv(width, width))])
        self.mid_blocks = nn.ModuleList(stage(width, config) for _ in range(config.mid))
        self.up_blocks = nn.ModuleList([stage(2 * width, config, last=CausalConv(width, width))])
        self.final_block = ConvBlock(width, width)
        self.final_proj = nn.Conv1d(width, MELS, 1)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:             # (B, 320, S) -> (B, 80, S)
        half = x.shape[1] // 2
        angles = 1000 * t * torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000) / (half - 1)))
        time = torch.cat([angles.sin(), angles.cos()]).to(x)
        time = self.time_mlp.linear_2(F.silu(self.time_mlp.linear_1(time)))             # (4 D,)
        down, up = self.down_blocks[0], self.up_blocks[0]
        skip = through(down, x, time, mask)
        x = down[2](skip)
        for block in self.mid_blocks:
            x = through(block, x, time, mask)
        x = up[2](through(up, torch.cat([x, skip], 1), time, mask))
        return self.final_proj(self.final_block(x))


def stage(inputs: int, config: FlowConfig, last: nn.Module | None = None) -> nn.ModuleList:
    """A residual block and transformer blocks; the first and last stage end with a convolution."""
    blocks = nn.ModuleList(EstimatorBlock(config.width, config.unet_heads) for _ in range(config.depth))
    return nn.ModuleList([ResidualBlock(inputs, config.width), blocks, *([last] if last else [])])


def through(stage: nn.ModuleList, x: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
    x = stage[0](x, time).transpose(1, 2)           # (B, D, S) -> (B, S, D)
    for block in stage[1]:
        x = block(x, mask)
    return x.transpose(1, 2)


class CausalConv(nn.Conv1d):
    def __init__(self, inner: int, outer: int):
        super().__init__(inner, outer, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))


class ConvBlock(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.block = nn.ModuleDict({"0": CausalConv(inner, outer), "2": nn.LayerNorm(outer)})       # numbered as officially

    def forward(self, x: Tensor) -> Tensor:         # (B, D, S)
        return F.mish(self.block["2"](self.block["0"](x).transpose(1, 2)).transpose(1, 2))


class ResidualBlock(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.block1, self.block2 = ConvBlock(inner, outer), ConvBlock(outer, outer)
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(4 * outer, outer))
        self.res_conv = nn.Conv1d(inner, outer, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.block2(self.block1(x) + self.mlp(time)[:, None]) + self.res_conv(x)


class EstimatorBlock(nn.Module):
    """Pre-norm attention, then two linear maps."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1 = nn.Module()
        self.attn1.to_q, self.attn1.to_k, self.attn1.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.attn1.to_out = nn.ModuleList([nn.Linear(inner, dim)])
        self.ff = nn.Module()
        self.ff.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": nn.Linear(dim, 4 * dim)}), "2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:        # (B, S, D)
        h, attn, net = self.norm1(x), self.attn1, self.ff.net
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        x = x + attn.to_out[0](F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + net["2"](F.gelu(net["0"]["proj"](self.norm3(x))))
