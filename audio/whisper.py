"""Whisper's features and encoder (Radford et al., 2022, arXiv:2212.04356), as large-v3 has them.

    16 kHz wav -> log-mel at 100 Hz -> 2 convolutions -> + positions -> 32 pre-norm layers -> [mean of pairs] -> norm
    (B, W)        (B, 128, 3000)       (B, 1500, 1280)                                        (B, 750, 1280)

Higgs Audio has such a tower as an option (`pool=2`, 25 states a second; its released 3B has none), named
`audio_tower.*`.  The encoder of the MOSS-Speech codec is the same layer with a causal mask and causal convolutions
(`causal=True, layers=16, final_norm=False`).  Parameter names are the official ones. Next: flow.py.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio.hubert import check_sizes

RATE = 16_000
WINDOW = 400                # 25 ms
HOP = 160                   # 10 ms
SECONDS = 30                # what the encoder was trained on, always


@dataclass(frozen=True)
class WhisperConfig:
    """The encoder of whisper-large-v3.  pool: so many neighbouring states are averaged before the last norm."""
    mels: int = 128
    dim: int = 1280
    layers: int = 32
    heads: int = 20
    ffn: int = 5120
    positions: int = 1500
    pool: int = 1
    causal: bool = False
    final_norm: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, "the Whisper encoder's")


class WhisperEncoder(nn.Module):
    """Log-mel -> states; `load_whisper` gives one with weights."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.mels, config.dim, 3)
        self.conv2 = nn.Conv1d(config.dim, config.dim, 3, stride=2)
        self.embed_positions = nn.Embedding(config.positions, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.dim) if config.final_norm else None

    def forward(self, mel: Tensor, lengths: Tensor | None = None, past: dict | None = None) -> Tensor:
        """(B, F, S) -> (B, ceil(S / 2) // pool, D).  lengths (B,): mel frames of each clip; what lies behind is not attended to.

        Of a clip of m frames the first (m + 1) // 2 // pool states are its own.  past: what a causal encoder remembers of
        the frames before, brought up to date; {} at the start of a clip.  A piece must then end where a pool does.
        """
        B, F_, S = mel.shape
        past = {} if past is None else past
        start, most = past.get("positions", 0), self.config.positions
        T = start + (S + 1) // 2
        if F_ != self.config.mels or S < 1 or T > most:
            raise ValueError(f"mel is {tuple(mel.shape)}, expected (B, {self.config.mels}, 1..{2 * (most - start)}); make it with log_mel")
        x = F.gelu(self._conv(self.conv1, mel, past))
        x = F.gelu(self._conv(self.conv2, x, past)).transpose(1, 2)     # (B, D, S) -> (B, T, D), every second one
        past["positions"] = T
        x = x + self.embed_positions.weight[start: T]
        mask = self._mask(T, lengths, x.device)
        mask = mask[..., start:, :] if start else mask
        for layer in self.layers:
            x = layer(x, mask, past if self.config.causal else None)
        if self.config.pool > 1:
            x = F.avg_pool1d(x.transpose(1, 2), self.config.pool).transpose(1, 2)       # -> (B, T // pool, D)
        return x if self.layer_norm is None else self.layer_norm(x)

    def _conv(self, conv: nn.Conv1d, x: Tensor, past: dict) -> Tensor:
        """Padded with silence on both sides; on the left alone in a causal encoder, or with the inputs that the last piece left over."""
        if not self.config.causal:
            return conv(F.pad(x, (1, 1)))
        x = torch.cat([past[conv], x], 2) if conv in past else F.pad(x, (2, 0))
        y = conv(x)
        past[conv] = x[..., y.shape[2] * conv.stride[0]:].clone()
        return y

    def _mask(self, T: int, lengths: Tensor | None, device: torch.device) -> Tensor | None:
        """True where a query (row) may look at a key: (T, T), (B, 1, 1, T) or both joined; None where it always may."""
        mask = torch.ones(T, T, dtype=torch.bool, device=device).tril() if self.config.causal else None
        if lengths is None:
            return mask
        if int(lengths.min()) < 1:
            raise ValueError(f"a clip has {int(lengths.min())} mel frames, expected 1 or more; leave empty clips out")
        seen = torch.arange(T, device=device) < ((lengths.to(device) + 1) // 2)[:, None]        # (B, T)
        return seen[:, None, None] if mask is None else mask & seen[:, None, None]


class Layer(nn.Module):
    """Pre-norm attention, then two linear maps; the key alone has no bias."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.self_attn = Attention(config.dim, config.heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.fc1, self.fc2 = nn.Linear(config.dim, config.ffn), nn.Linear(config.ffn, config.dim)
        self.final_layer_norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: dict | None = None) -> Tensor:       # (B, T, D)
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask, past)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.k_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: dict | None = None) -> Tensor:       # (B, T, D)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        if past is not None:
            if self in past:
                k, v = torch.cat([past[self][0], k], 2), torch.cat([past[self][1], v], 2)
            past[self] = k, v
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


# ---- log-mel features ----

def log_mel(wav: Tensor, mels: int = 128, seconds: float | None = SECONDS) -> Tensor:
    """(B, W) at 16 kHz -> (B, mels, 3000): filled up with silence or cut to `seconds`; None keeps W // 160 frames.

    log10 of the mel power, no lower than 8 below the clip's loudest bin, moved near [-1, 1].  That maximum is over the
    whole clip: one loud bin raises the floor everywhere.
    """
    if wav.dim() != 2 or wav.shape[1] == 0 or not wav.is_floating_point():
        raise ValueError(f"sound is {wav.dtype} {tuple(wav.shape)}, expected float (B, W > 0) at 16 kHz; mix it down, pass wav[:, 0]")
    if not torch.isfinite(wav).all():
        raise ValueError("the sound holds NaN or infinite samples; look upstream for the first of them")
    W = wav.shape[1] if seconds is None else round(seconds * RATE)
    wav = F.pad(wav[:, :W].float(), (0, max(0, W - wav.shape[1])))
    if W <= WINDOW // 2:
        raise ValueError(f"{W} samples are shorter than half a window of {WINDOW}; pass seconds={SECONDS} to fill up with silence")
    mel = log_power(F.pad(wav, (WINDOW // 2, WINDOW // 2), mode="reflect"), mels)[..., :-1]      # the last frame is half outside
    return floored(mel, mel.amax((1, 2), keepdim=True))


def log_power(wav: Tensor, mels: int) -> Tensor:
    """(B, 160 (S - 1) + 400) -> log10 of the mel power, (B, mels, S); a frame lies wholly inside."""
    spectrum = torch.stft(wav, WINDOW, HOP, window=torch.hann_window(WINDOW, device=wav.device), center=False, return_complex=True)
    return (mel_filters(mels).to(wav) @ spectrum.abs() ** 2).clamp(min=1e-10).log10()


def floored(mel: Tensor, peak: Tensor) -> Tensor:
    """No lower than 8 below the peak (80 dB), moved near [-1, 1]."""
    return (torch.maximum(mel, peak - 8) + 4) / 4


@lru_cache(maxsize=4)
def mel_filters(mels: int, window: int = WINDOW, rate: int = RATE, highest: float = 8000.0) -> Tensor:
    """Triangles (mels, 201) of equal area, evenly spaced on Slaney's mel scale (straight to 1 kHz, then logarithmic) to `highest` Hz."""
    straight, step, corner = 200 / 3, math.log(6.4) / 27, 15.0          # Hz a mel, log-Hz a mel, the mel of 1 kHz
    top = corner + math.log(highest / 1000) / step
    mel = torch.linspace(0, top, mels + 2, dtype=torch.float64)
    edges = torch.where(mel < corner, mel * straight, 1000 * ((mel - corner) * step).exp())     # Hz
    bins = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    left, peak, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = torch.minimum((bins - left) / (peak - left), (right - bins) / (right - peak)).clamp(min=0)
    return (triangles * 2 / (right - left)).float()
