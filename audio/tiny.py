"""The embedded codec: 16 kHz speech as 25 frames a second of 8 codes of 8 bits (1.6 kbit/s), in one small file.

    wav -> 80 log-mels at 100 Hz -> stack 4 -> minus mean, PCA to 64 -> residual VQ 8 x 256   (B, 1, W) -> (B, 8, T)
    codes -> the quantised mel -> vocoder (ConvNeXt, inverse STFT) or Griffin-Lim           (B, 8, T) -> (B, 1, 640 T)

Nothing but the vocoder is trained: the tables are fitted in seconds by PCA and k-means.  A frame depends on its
own 40 ms and 27 ms on each side, so the codes of two clips can be joined without encoding again: that is how the
demo composes digit strings.  Griffin-Lim needs no weights: it is the fallback, and the tests' oracle.
The vocoder is after Vocos (arXiv:2306.00814), trained by assets/build.py; Griffin-Lim after Perraudin et al., 2013.
Next: mimi.py.
"""

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from audio.rvq import ResidualVQ
from system.files import replace_file

RATE = 16_000
HOP = 160                   # 10 ms: one mel frame
STACK = 4                   # mel frames in a codec frame
FRAME = HOP * STACK         # 640 samples, 40 ms
WINDOW = 1024               # analysis window
MELS = 80
FLOOR = 1e-3                # smallest mel magnitude; below it is silence
DIM = 64                    # PCA width
EDGE = WINDOW // 2 - HOP // 2   # 432 samples of context on each side of the first and last hop
SYNTHESIS = 640             # the vocoder's inverse STFT window
LOOKBACK, LOOKAHEAD = 10, 3     # codec frames that the vocoder sees around one: see Vocoder
VERSION = "1"


class TinyCodec(nn.Module):
    """Encode and decode speech; `TinyCodec.load(path)` gives a fitted one.  decoder: "vocoder" or "griffin_lim"."""
    name = "tiny"
    sample_rate, frame_rate = RATE, RATE / FRAME
    num_codebooks, codebook_size = 8, 256

    def __init__(self, decoder: str = "vocoder"):
        super().__init__()
        if decoder not in ("vocoder", "griffin_lim"):
            raise ValueError(f"the tiny codec has no decoder {decoder!r}; choose vocoder or griffin_lim")
        self.decoder = decoder
        self.register_buffer("mean", torch.zeros(STACK * MELS))
        self.register_buffer("basis", torch.zeros(DIM, STACK * MELS))
        self.rvq = ResidualVQ(self.num_codebooks, self.codebook_size, DIM)
        self.vocoder = Vocoder() if decoder == "vocoder" else None

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """(B, 1, W) at 16 kHz -> codes (B, 8, T) int64, T = ceil(W / 640).

        In float64 where the device has it, so that no near tie is decided otherwise when sound comes in chunks.
        """
        B, C, W = wav.shape
        assert C == 1, wav.shape
        if W == 0:
            return torch.zeros(B, self.num_codebooks, 0, dtype=torch.int64, device=wav.device)
        return self.encode_padded(F.pad(wav[:, 0], (EDGE, EDGE + -W % FRAME)))

    def encode_padded(self, wav: Tensor) -> Tensor:
        """(B, 640 T + 864) with 432 samples of context on each side -> codes (B, 8, T)."""
        x = log_mel(wav.to(torch.float32 if wav.device.type == "mps" else torch.float64))   # (B, 4 T, 80)
        x = x.reshape(len(x), -1, STACK * MELS) - self.mean.to(x.dtype)                     # -> (B, T, 320)
        return self.rvq.encode((x @ self.basis.T.to(x.dtype)).transpose(1, 2), self.num_codebooks)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, 8, T) in 0..255 -> (B, 1, 640 T) in [-1, 1].  ValueError for -1 or other ids outside."""
        if codes.dim() == 3 and codes.shape[1] != self.num_codebooks:
            Q = self.num_codebooks
            found = f"got {codes.shape[1]} of shape {tuple(codes.shape)}"
            raise ValueError(f"the {self.name} codec decodes {Q} codebooks, {found}; pass (B, {Q}, T)")
        if codes.shape[-1] == 0:
            return torch.zeros(len(codes), 1, 0, device=codes.device)
        mel = self.mel(codes)
        wav = griffin_lim(mel) if self.vocoder is None else self.vocoder(mel)
        return wav.clamp(-1, 1)[:, None]

    def mel(self, codes: Tensor) -> Tensor:
        """The quantised log-mel (B, 4 T, 80) that codes (B, 1..8, T) stand for."""
        x = self.rvq.decode(codes).transpose(1, 2) @ self.basis + self.mean     # (B, T, 64) -> (B, T, 320)
        return x.reshape(len(x), -1, MELS)

    def stream(self) -> "TinyStream":
        """A fresh stateful encoder and decoder over this codec."""
        return TinyStream(self)

    def save(self, path) -> None:
        """Write one safetensors file, tables and weights in fp16, whole or not at all."""
        metadata = {"format": "pt", "codec": "tiny", "version": VERSION, "decoder": self.decoder}
        tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in self.state_dict().items()}
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path, decoder: str | None = None, device: str = "cpu") -> "TinyCodec":
        """Read a saved codec, checking names, shapes and values; decoder=None takes the best one in the file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no codec at {path}; restore it or run python assets/build.py codec")
        try:
            with safe_open(path, "pt") as file:
                codec = cls._from_open(path, file, decoder)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
        return codec.to(device).eval()

    @classmethod
    def load_coarse(cls, path, device: str = "cpu", codebooks: int = 1) -> "TinyCodec":
        """The same with its first codebooks alone, for models of fewer streams; one is intelligible speech, but no more."""
        codec = cls.load(path, device=device)
        codec.num_codebooks, codec.name = codebooks, f"tiny:{codebooks}"
        return codec

    @classmethod
    def _from_open(cls, path: Path, file, decoder: str | None) -> "TinyCodec":
        metadata = file.metadata() or {}
        if (metadata.get("codec"), metadata.get("version")) != ("tiny", VERSION):
            raise ValueError(f"{path} is no tiny codec of version {VERSION} (metadata {metadata}); name another file or rebuild it")
        codec = cls(decoder or metadata.get("decoder", ""))
        unused = "vocoder." if decoder == "griffin_lim" else "-"            # left unread on purpose
        found = {name: file.get_slice(name).get_shape() for name in file.keys() if not name.startswith(unused)}
        wanted = {name: list(tensor.shape) for name, tensor in codec.state_dict().items()}
        if found != wanted:                                                 # before any tensor is read
            wrong = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
            raise ValueError(f"{path}: {wrong[0]} is {found.get(wrong[0])}, expected {wanted.get(wrong[0])}; name another file or decoder")
        for name, tensor in codec.state_dict().items():
            tensor.copy_(file.get_tensor(name))                             # state_dict shares memory with the module
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: {name} holds NaN or infinity; rebuild it with assets/build.py")
        return codec


class TinyStream:
    """Encode and decode piece by piece: the pieces joined equal the whole.

    encode() holds back up to 1,071 samples until more sound or flush_encode() comes; decode() holds back LOOKAHEAD
    frames (120 ms) until flush().  Griffin-Lim looks at the whole utterance, so with it all sound waits for flush().
    """
    ROWS = True                     # every tensor of the state has the items in front: together.py

    def __init__(self, codec: TinyCodec):
        self.codec = codec
        self.wav = None             # (B, n) from 432 samples before the next frame
        self.codes = None           # (B, 8, n) from `start` on
        self.done = 0               # frames of self.codes already decoded; the rest of the past is context
        self.vocoder = None         # what the vocoder's convolutions remember: each frame is computed once

    def encode(self, wav: Tensor) -> Tensor:
        """Take (B, 1, n >= 0) samples, give the codes (B, 8, t >= 0) that are certain."""
        self.wav = F.pad(wav[:, 0], (EDGE, 0)) if self.wav is None else torch.cat([self.wav, wav[:, 0]], 1)
        return self._encode(max(0, self.wav.shape[1] - 2 * EDGE) // FRAME)

    def flush_encode(self) -> Tensor:
        """End the sound: the codes (B, 8, t) of what was held back."""
        assert self.wav is not None, "flush_encode() before encode()"
        frames = -(-(self.wav.shape[1] - EDGE) // FRAME)
        self.wav = F.pad(self.wav, (0, 2 * EDGE + frames * FRAME - self.wav.shape[1]))
        codes, self.wav = self._encode(frames), None
        return codes

    @torch.no_grad()
    def _encode(self, frames: int) -> Tensor:
        if not frames:
            return torch.zeros(len(self.wav), self.codec.num_codebooks, 0, dtype=torch.int64, device=self.wav.device)
        codes = self.codec.encode_padded(self.wav[:, : frames * FRAME + 2 * EDGE])
        self.wav = self.wav[:, frames * FRAME:]
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Take codes (B, 8, n >= 0), give the samples (B, 1, m >= 0) that are certain."""
        self.codes = codes if self.codes is None else torch.cat([self.codes, codes], 2)
        if self.codec.vocoder is None:
            return self._decode(self.done)
        self.vocoder = self.vocoder or VocoderStream(self.codec.vocoder, len(codes))
        until = max(self.done, self.codes.shape[2] - LOOKAHEAD)
        with torch.no_grad():
            wav = self.vocoder.push(self.codec.mel(codes), (until - self.done) * FRAME).clamp(-1, 1)[:, None]
        past = max(0, until - LOOKBACK)
        self.codes, self.done = self.codes[:, :, past:], until - past
        return wav

    def flush(self) -> Tensor:
        """End the codes: the samples (B, 1, m) that were held back."""
        assert self.codes is not None, "flush() before decode()"
        wav = self._decode(self.codes.shape[2])
        self.codes, self.done, self.vocoder = None, 0, None
        return wav

    def _decode(self, until: int) -> Tensor:
        if until == self.done:
            return torch.zeros(len(self.codes), 1, 0, device=self.codes.device)
        wav = self.codec.decode(self.codes[:, :, : until + LOOKAHEAD])
        wav = wav[:, :, self.done * FRAME: until * FRAME]
        past = max(0, until - LOOKBACK)
        self.codes, self.done = self.codes[:, :, past:], until - past
        return wav


# ---- mel spectrogram ----

def log_mel(wav: Tensor) -> Tensor:
    """(B, 160 J + 864) -> log of the mel magnitudes (B, J, 80); frame j is centred on sample 160 j + 512."""
    frames = wav.unfold(1, WINDOW, HOP) * torch.hann_window(WINDOW, dtype=wav.dtype, device=wav.device)
    magnitude = torch.fft.rfft(frames).abs()                                    # (B, J, 513)
    return (magnitude @ mel_filters().to(magnitude).T).clamp(min=FLOOR).log()


@cache
@torch.inference_mode(False)
def mel_filters() -> Tensor:
    """Triangular filters (80, 513) with peaks of 1, evenly spaced on the HTK mel scale from 0 to 8 kHz."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, MELS + 2, dtype=torch.float64) / 2595) - 1)    # Hz
    bins = torch.arange(WINDOW // 2 + 1, dtype=torch.float64) * RATE / WINDOW
    up = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    return torch.minimum(up, (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]).clamp(min=0)


def overlap_add(frames: Tensor) -> Tensor:
    """Frames (B, J, n) -> (B, 160 J): the least-squares inverse of windowed framing, frames centred on hops."""
    B, J, n = frames.shape
    window = torch.hann_window(n, dtype=frames.dtype, device=frames.device)
    stacked = torch.cat([frames * window, window.square().expand(1, J, n)])     # the last row is the weight
    total = F.fold(stacked.transpose(1, 2), (1, (J - 1) * HOP + n), (1, n), stride=(1, HOP))[:, 0, 0]
    edge = (n - HOP) // 2
    return (total[:-1] / total[-1:].clamp(min=1e-6))[:, edge: edge + J * HOP]


# ---- decoders ----

class Vocoder(nn.Module):
    """Log-mel (B, J, 80) -> (B, 160 J).  1.58 M weights; every convolution sees 5 frames back and 1 ahead.

    Seven of them reach 35 mel frames back and 7 ahead, overlapping windows 2 more: hence LOOKBACK, LOOKAHEAD.
    """

    def __init__(self, width: int = 192, blocks: int = 6):
        super().__init__()
        self.embed = nn.Conv1d(MELS, width, 7)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * (SYNTHESIS // 2 + 1))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.norm(self.embed(F.pad(mel.transpose(1, 2), (5, 1))).transpose(1, 2))   # (B, J, D)
        for block in self.blocks:
            x = block(x)
        return overlap_add(self.synthesis(x))

    def synthesis(self, x: Tensor) -> Tensor:
        """States (B, J, D) -> windows of sound (B, J, 640)."""
        log_magnitude, phase = self.head(self.final_norm(x)).float().chunk(2, -1)       # (B, J, 321) each
        return torch.fft.irfft(torch.polar(log_magnitude.clamp(max=6).exp(), phase), SYNTHESIS)


class VocoderStream:
    """The vocoder piece by piece: each convolution remembers its last 6 inputs and lags one behind; sound lags two more."""

    def __init__(self, vocoder: Vocoder, items: int):
        self.vocoder, like = vocoder, vocoder.final_norm.weight
        widths = [MELS, *[len(like)] * len(vocoder.blocks)]
        self.kept = [like.new_zeros(items, width, 5) for width in widths]       # in front of the first is silence
        self.frames = like.new_zeros(items, 0, SYNTHESIS)                       # the last ones, which later ones overlap
        self.first, self.wav = True, like.new_zeros(items, 0)

    def convolve(self, n: int, conv: nn.Conv1d, x: Tensor) -> tuple[Tensor, Tensor]:
        """The next inputs (B, C, j) of convolution n -> its outputs, and the inputs that stand in their place."""
        x = torch.cat([self.kept[n], x], 2)
        self.kept[n] = x[..., -6:]
        if x.shape[2] <= 6:
            y = x.new_zeros(len(x), conv.out_channels, 0)
        elif conv.groups > 1:                               # of a few columns, a product is faster than a grouped convolution
            y = (x.unfold(2, 7, 1) * conv.weight[:, 0, None]).sum(-1) + conv.bias[:, None]
        else:
            y = conv(x)
        return y, x[..., 5 : 5 + y.shape[2]]

    def push(self, mel: Tensor, samples: int) -> Tensor:
        """Take (B, j, 80), give the next `samples` (B, samples)."""
        v = self.vocoder
        x = v.norm(self.convolve(0, v.embed, mel.transpose(1, 2))[0].transpose(1, 2))
        for n, block in enumerate(v.blocks, 1):
            h, own = self.convolve(n, block.conv, x.transpose(1, 2))
            x = own.transpose(1, 2) + block.scale * block.down(F.gelu(block.up(block.norm(h.transpose(1, 2)))))
        if x.shape[1]:
            self.frames = torch.cat([self.frames, v.synthesis(x)], 1)
        J, begin = self.frames.shape[1], 0 if self.first else 2
        if J >= begin + 3:                                                      # a hop needs the two frames behind it
            hops = overlap_add(self.frames)[:, begin * HOP : (J - 2) * HOP]
            self.wav, self.frames, self.first = torch.cat([self.wav, hops], 1), self.frames[:, -4:], False
        out, self.wav = self.wav[:, :samples], self.wav[:, samples:]
        assert out.shape[1] == samples, (out.shape, samples)
        return out


class Block(nn.Module):
    """ConvNeXt: a depthwise convolution over time, then two layers per frame; starts near the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 7, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:         # (B, J, D)
        h = self.conv(F.pad(x.transpose(1, 2), (5, 1))).transpose(1, 2)
        return x + self.scale * self.down(F.gelu(self.up(self.norm(h))))


def griffin_lim(mel: Tensor, iterations: int = 32, momentum: float = 0.99) -> Tensor:
    """Log-mel (B, J, 80) -> (B, 160 J) with no weights: find a phase that agrees with the magnitudes."""
    filters = mel_filters().to(mel)
    target = mel.exp() * (mel > math.log(1.5 * FLOOR))                          # at the floor: silence
    magnitude = (target @ torch.linalg.pinv(filters).T).clamp(min=1e-5)         # (B, J, 513)
    for _ in range(10):                                                         # non-negative least squares
        magnitude = magnitude * (target @ filters) / (magnitude @ filters.T @ filters).clamp(min=1e-8)
    generator = torch.Generator().manual_seed(0)
    phase = torch.rand(magnitude.shape[1:], generator=generator).to(mel) * 2 * math.pi
    angles = torch.polar(torch.ones_like(magnitude), phase.expand_as(magnitude))
    window = torch.hann_window(WINDOW).to(mel)
    before = torch.zeros_like(angles)
    for _ in range(iterations):
        wav = overlap_add(torch.fft.irfft(magnitude * angles, WINDOW))
        after = torch.fft.rfft(F.pad(wav, (EDGE, EDGE)).unfold(1, WINDOW, HOP) * window)
        angles = after - momentum / (1 + momentum) * before
        angles = angles / angles.abs().clamp(min=1e-9)
        before = after
    return overlap_add(torch.fft.irfft(magnitude * angles, WINDOW))
