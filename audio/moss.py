"""The codec of MOSS-Speech: speech as 12.5 codes a second out of one codebook of 16,384 (175 bit/s).

    wav -> 16 kHz -> log-mel -> 16 causal Whisper layers, 50 Hz -> mean of 4 -> nearest entry              (B, 1, W) -> (B, 1, T)
    codes -> conformer -> x 4 -> conformer = mu;  noise -> 10 Euler steps along the estimator's field = mel
    mel -> pitch -> harmonics and noise -> HiFT, shaping them into a spectrum -> inverse STFT              (B, 1, T) -> (B, 1, 1920 T)

The codes contain the content and little of the voice, which comes from a `Voice` made from a recording of a few seconds.
Whisper-VQ as in GLM-4-Voice (arXiv:2412.02612), flow matching as in CosyVoice 2 (arXiv:2412.10117, Matcha-TTS,
arXiv:2309.03199), HiFT after HiFTNet (arXiv:2309.09493).  Module names are the official ones.

    codec = MossCodec.load("MOSS-Speech-Codec/")        # model.safetensors, config.json, flow/{flow-chunk-5.pt, hift.pt, campplus.onnx}
    codec.make_voice(wav).save("MOSS-Speech-Codec/voice.safetensors")       # read by the next load; onnxruntime is needed here alone

The published weights come without a licence: ask their makers before you pass them on.
Sound is 24 kHz on both sides; encode() takes 16 kHz as well.  Noise is a fixed function of the position, so one set of
codes gives one sound.  With flow-chunk-N.pt attention sees whole chunks of N codes and what came before: the stream then
equals decode().  (The published stream computes its last piece with full attention, and fades where pieces meet.)
Next: telephone.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audio.flow import AHEAD, HEAD, MOST, RATIO, Flow, FlowConfig
from audio.hift import BEHIND, FRAME, MELS, RATE, Hift, HiftConfig, HiftStream
from audio.higgs import _json, check_wav, read_tensors, resample_24_to_16
from audio.hubert import LARGEST, listed, load_strict
from audio.rvq import check_codes, nearest
from audio.whisper import HOP, WINDOW, WhisperConfig, WhisperEncoder, floored, log_mel, log_power, mel_filters
from audio.whisper import RATE as WHISPER_RATE
from system.files import replace_file

CODE = 1920                 # samples in a code: 80 ms
PIECE = 375                 # codes (30 s) that the encoder sees at once; then it starts afresh


@dataclass(frozen=True)
class MossCodecConfig:
    """The published codec.  chunk: codes that see one another in the flow decoder; 0 means all do, and nothing streams."""
    encoder: WhisperConfig = WhisperConfig(layers=16, pool=4, causal=True, final_norm=False)
    codebook_size: int = 16_384
    flow: FlowConfig = field(default_factory=FlowConfig)
    hift: HiftConfig = field(default_factory=HiftConfig)
    chunk: int = 5


class MossCodec(nn.Module):
    """Encode and decode speech; `MossCodec.load(path)` gives one with weights.  voice: the default voice of decode()."""
    name, sample_rate, frame_rate, num_codebooks = "moss", RATE, RATE / CODE, 1

    def __init__(self, config: MossCodecConfig | None = None):
        super().__init__()
        self.config = config = config or MossCodecConfig()
        self.codebook_size, self.folder = config.codebook_size, None
        self.encoder = WhisperVQ(config.encoder, config.codebook_size)
        self.flow, self.hift = Flow(config.flow, config.chunk), Hift(config.hift)
        self.voice = Voice.neutral(config.flow.speaker)

    @torch.no_grad()
    def encode(self, wav: Tensor, rate: int = RATE) -> Tensor:
        """(B, 1, W) at 24 kHz -> codes (B, 1, T) int64, T = ceil(W / 1920); at 16 kHz with rate=16_000, then T = ceil(W / 1280).

        Each 30 s are encoded on their own, the last code filled up with silence.
        """
        wav = to_16k(wav, rate).float()
        hop = CODE * WHISPER_RATE // RATE
        pieces = wav.split(PIECE * hop, 1)
        unit = hop if len(pieces) == 1 else PIECE * hop                 # the official batch pads all of them to the longest
        codes = []
        for piece in pieces:
            W = piece.shape[1]
            mel = log_mel(F.pad(piece, (0, -W % unit)), self.config.encoder.mels, seconds=None)
            codes.append(self.encoder.encode(mel)[:, : -(-W // hop)])
        return torch.cat(codes, 1)[:, None]

    @torch.no_grad()
    def decode(self, codes: Tensor, voice: "Voice | None" = None) -> Tensor:
        """Codes (B, 1, T) in 0..16383 -> (B, 1, 1920 T), within 0.99."""
        stream = self.stream(voice)
        stream.take(codes)
        return stream.flush()

    def stream(self, voice: "Voice | None" = None, hold: int = BEHIND) -> "MossStream":
        """A fresh stateful encoder and decoder; see MossStream for `hold`."""
        return MossStream(self, voice or self.voice, hold)

    @torch.no_grad()
    def make_voice(self, wav: Tensor) -> "Voice":
        """The voice of a recording (1, 1, W) at 24 kHz, best of 3 to 10 s, one speaker and little noise."""
        codes, mel = self.encode(wav)[:, 0], voice_mel(wav[:, 0])
        n = min(mel.shape[1] // RATIO, codes.shape[1])
        if len(wav) != 1 or n == 0:
            raise ValueError(f"sound is {tuple(wav.shape)}, a voice needs one recording of at least 0.1 s; give another")
        return Voice(codes[:, :n], mel[:, : RATIO * n], self.speaker_embedding(to_16k(wav, RATE)))

    def speaker_embedding(self, wav: Tensor) -> Tensor:
        """(1, W) at 16 kHz -> (1, 192), by CAM++ (arXiv:2303.00332) in flow/campplus.onnx."""
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError("making a voice needs onnxruntime; pip install 'multistream[voice]', or use a saved voice file") from error
        file = Path(self.folder or ".") / "flow" / "campplus.onnx"
        _missing(file)
        features = fbank(wav)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: (features - features.mean(1, keepdim=True)).cpu().numpy()}
        return torch.from_numpy(session.run(None, inputs)[0].copy()).reshape(1, -1).to(wav)

    @classmethod
    def load(cls, path: str | Path, chunk: int | None = None, device: str = "cpu") -> "MossCodec":
        """Read the official folder; strict, but for the recogniser that the encoder was trained with, which is no part of the codec.

        chunk: 5, 25 or 0 choose flow-chunk-5.pt, flow-chunk-25.pt or flow.pt; None takes the first of them that is there.
        """
        path = Path(path)
        config, flow = read_config(path / "config.json"), flow_file(path, chunk)
        files = {"encoder": path / "model.safetensors", "flow": flow, "hift": path / "flow" / "hift.pt"}
        _missing(*files.values())
        states = {name: read_tensors(file, ("epoch", "step")) for name, file in files.items()}      # training left its counters there
        states["encoder"] = {name.removeprefix("encoder."): t for name, t in states["encoder"].items() if name.startswith("encoder.")}
        states["hift"] = {name.removeprefix("generator."): t for name, t in states["hift"].items()}
        config = replace(config, chunk=CHUNKS[flow.name], flow=flow_config(states["flow"], flow))
        hift = [_shape(states["hift"], name, axes, files["hift"])[-1] for name, axes in (
            ("conv_pre.bias", 1), ("m_source.l_linear.weight", 2), ("f0_predictor.classifier.weight", 2))]
        config = replace(config, hift=HiftConfig(hift[0], hift[1] - 1, hift[2]))
        with torch.device("meta"):                  # no time spent on weights that are overwritten
            codec = cls(config)
        for name, state in states.items():
            load_strict(getattr(codec, name), state, {}, unused(config.encoder.layers) if name == "encoder" else "-", str(files[name]))
        codec.folder, voice = path, path / "voice.safetensors"
        codec.voice = Voice.load(voice, codec) if voice.is_file() else Voice.neutral(config.flow.speaker)
        return codec.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Voice:
    """How the codes shall sound: codes (1, n) and mel (1, 4 n, 80) of the same recording, and its speaker (1, 192)."""
    codes: Tensor
    mel: Tensor
    speaker: Tensor

    @classmethod
    def neutral(cls, speaker: int = 192) -> "Voice":
        """No recording and no speaker: what the published decoder takes when given none."""
        return cls(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, MELS), torch.zeros(1, speaker))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in vars(self).items()}
        replace_file(path, lambda temporary: save_file(tensors, temporary, {"voice": "moss"}))

    @classmethod
    def load(cls, path: str | Path, codec: MossCodec) -> "Voice":
        """Read a saved voice and check it against the codec; ValueError when it does not fit."""
        try:
            found = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); make the voice again with make_voice") from error
        codes = found.get("codes", torch.zeros(0))
        n, shapes = codes.shape[-1] if codes.dim() else 0, {name: tuple(tensor.shape) for name, tensor in found.items()}
        wanted = {"codes": (1, n), "mel": (1, RATIO * n, MELS), "speaker": (1, codec.config.flow.speaker)}
        if shapes != wanted or codes.dtype != torch.int64 or not all(tensor.isfinite().all() for tensor in found.values()):
            raise ValueError(f"{path} is no voice of this codec ({shapes}, expected finite {wanted}); make it again with make_voice")
        if n and not 0 <= int(codes.min()) <= int(codes.max()) < codec.codebook_size:
            raise ValueError(f"{path} has codes outside 0..{codec.codebook_size - 1}; make it again with make_voice and this codec")
        return cls(**found)


class MossStream:
    """Encode and decode piece by piece.

    decode() gives what decode() of the whole would give, sample for sample: a chunk's mel is certain when its last code
    and 3 more are there, a frame's sound when `hold` = 20 more frames are (0.4 s: HiFT sees so far, its pitch included).
    The first sound comes with code 9 to 13, as the voice's codes leave a chunk open.  hold=8, as published, gives it with
    code 8 to 12; each piece is then what HiFT makes of the mel so far, and pieces meet less smoothly.  The flow decoder
    computes the past again for each piece, as published: keys and values of its 10 steps would take 230 MB a second.

    encode() gives a code with its last sample.  It knows only the loudest moment so far of each 30 s, which sets the
    floor (80 dB below it) of Whisper's features: codes differ from encode() of the whole where the floor cuts something off.
    """

    def __init__(self, codec: MossCodec, voice: Voice, hold: int = BEHIND):
        if not 0 <= hold <= BEHIND:
            raise ValueError(f"hold is {hold}, expected 0..{BEHIND} frames of 20 ms; {BEHIND} is exact")
        self.codec, self.voice, self.hold = codec, voice, hold
        self.wav, self.encoded = None, 0          # (B, n) at 24 kHz that is still needed; codes of all the sound before it
        self.past, self.peak = {}, None         # the encoder's; log10 of the loudest bin of this piece (B, 1, 1)
        self.codes, self.mels = None, 0         # (B, T) all of them; how many have become mel
        self.sound = HiftStream(codec.hift, hold)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """Take (B, 1, n >= 0) samples at 24 kHz, give the codes (B, 1, t >= 0) that are certain."""
        if wav.dim() != 3 or wav.shape[2]:
            check_wav(wav)
        self.wav = wav[:, 0] if self.wav is None else torch.cat([self.wav, wav[:, 0]], 1)
        codes = [torch.zeros(len(wav), 0, dtype=torch.int64, device=wav.device)]
        while n := min((self.wav.shape[1] - self._margin()) // CODE, PIECE - self.encoded % PIECE):
            codes.append(self._encode(n))
        return torch.cat(codes, 1)[:, None]

    @torch.no_grad()
    def flush_encode(self) -> Tensor:
        """End the sound: the code (B, 1, 0..1) of what was held back, filled up with silence."""
        assert self.wav is not None, "flush_encode() before encode()"
        rest = self.wav.shape[1] - self._margin()
        codes = self._encode(1) if rest else torch.zeros(len(self.wav), 0, dtype=torch.int64, device=self.wav.device)
        self.wav, self.encoded, self.past, self.peak = None, 0, {}, None
        return codes[:, None]

    def _margin(self) -> int:
        """Samples in self.wav before the next code: the resampler and the first frame's window see so many."""
        return 552 if self.encoded else 0

    def _encode(self, n: int) -> Tensor:
        """The next n codes, of one piece: 8 frames each, from the last before it to the last but one, since no state needs that."""
        margin, first = self._margin(), self.encoded % PIECE == 0
        start, hop = margin * 2 // 3, CODE * WHISPER_RATE // RATE
        wav = resample_24_to_16(self.wav[:, : margin + n * CODE].float())
        wav = F.pad(wav, (0, start + n * hop - wav.shape[1]))[:, : start + n * hop - HOP + WINDOW // 2 - HOP]
        if first:
            wav = F.pad(wav[:, start:], (WINDOW // 2, 0), mode="reflect")
            self.past, self.peak = {}, None
        else:
            wav = wav[:, start - HOP - WINDOW // 2:]
        mel = log_power(wav, self.codec.config.encoder.mels)
        codes = []
        for frames in mel.split([7 if first else 8] + [8] * (n - 1), 2):
            peak = frames.amax((1, 2), keepdim=True)
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
            codes.append(self.codec.encoder.encode(floored(frames, self.peak), self.past))
        self.encoded += n
        self.wav = self.wav[:, margin + n * CODE - self._margin():].clone()
        return torch.cat(codes, 1)

    def take(self, codes: Tensor) -> None:
        """Add codes (B, 1, n >= 0) to those that wait."""
        check_codes(codes, 1, self.codec.codebook_size)
        self.codes = codes[:, 0].long() if self.codes is None else torch.cat([self.codes, codes[:, 0].long()], 1)
        if RATIO * (self.codes.shape[1] + self.voice.codes.shape[1]) > MOST:
            found = f"{self.codes.shape[1]} codes and the voice's {self.voice.codes.shape[1]}"
            raise ValueError(f"{found} are more than {MOST // RATIO} (300 s); decode the sound in parts, each with a stream of its own")

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Take codes (B, 1, n >= 0), give the samples (B, 1, m >= 0) that are certain."""
        self.take(codes)
        chunk, voiced = self.codec.config.chunk, self.voice.codes.shape[1]
        whole = (voiced + self.codes.shape[1] - AHEAD) // chunk * chunk - voiced if chunk else 0      # codes in whole chunks
        return self._decode(whole, final=False) if whole > self.mels else self.codes.new_zeros(len(codes), 1, 0, dtype=torch.float32)

    @torch.no_grad()
    def flush(self) -> Tensor:
        """End the codes: the samples (B, 1, m) that were held back."""
        assert self.codes is not None, "flush() before decode()"
        T = self.codes.shape[1]
        wav = self._decode(T, final=True) if T else self.codes.new_zeros(len(self.codes), 1, 0, dtype=torch.float32)
        self.codes, self.mels, self.sound = None, 0, HiftStream(self.codec.hift, self.hold)
        return wav

    def _decode(self, until: int, final: bool) -> Tensor:
        mel = self.codec.flow(self.codes[:, : until + AHEAD], self.voice, until)[:, :, RATIO * self.mels:]
        self.mels = until
        return self.sound.push(mel, final)[:, None]


# ---- encoder ----

class WhisperVQ(WhisperEncoder):
    """Whisper's encoder and the codebook that its pooled states are looked up in."""

    def __init__(self, config: WhisperConfig, size: int):
        super().__init__(config)
        self.codebook = nn.Embedding(size, config.dim)

    def encode(self, mel: Tensor, past: dict | None = None) -> Tensor:
        """(B, 128, 8 T) -> (B, T)."""
        x = self(mel.to(self.codebook.weight), past=past)
        return nearest(x.flatten(0, 1), self.codebook.weight).view(x.shape[:2])


def to_16k(wav: Tensor, rate: int) -> Tensor:
    """(B, 1, W) at 16 or 24 kHz -> (B, W) at 16 kHz."""
    check_wav(wav)
    if rate not in (WHISPER_RATE, RATE):
        raise ValueError(f"the sound is {rate} Hz, this codec takes {RATE} or {WHISPER_RATE}; run it through wav.resample first")
    return wav[:, 0] if rate == WHISPER_RATE else resample_24_to_16(wav[:, 0])


# ---- a voice's features ----

def voice_mel(wav: Tensor) -> Tensor:
    """(B, W > 720) at 24 kHz -> log of the mel magnitudes (B, W // 480, 80), from windows of 1920."""
    side, window = (CODE - FRAME) // 2, torch.hann_window(CODE, device=wav.device)
    if wav.shape[1] <= side:
        raise ValueError(f"{wav.shape[1]} samples are no voice, {side} are half a window; record some seconds")
    wav = F.pad(wav[:, None], (side, side), mode="reflect")[:, 0]
    spectrum = torch.stft(wav, CODE, FRAME, window=window, center=False, return_complex=True)
    magnitude = (spectrum.abs().square() + 1e-9).sqrt()
    return (mel_filters(MELS, CODE, RATE).to(magnitude) @ magnitude).clamp(min=1e-5).log().transpose(1, 2)


def fbank(wav: Tensor) -> Tensor:
    """(B, W >= 400) at 16 kHz -> Kaldi's log-mel features (B, S, 80), without dither, for speaker encoders."""
    frames = wav.unfold(1, WINDOW, HOP)                                                 # (B, S, 400); no padding at the ends
    frames = frames - frames.mean(2, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], 2)
    frames = frames * torch.hann_window(WINDOW, periodic=False, device=wav.device) ** 0.85
    power = torch.fft.rfft(frames, 512).abs().square()[..., :-1]
    edges = torch.linspace(kaldi_mel(20.0), kaldi_mel(WHISPER_RATE / 2), MELS + 2, dtype=torch.float64)
    bins = torch.tensor([kaldi_mel(n * WHISPER_RATE / 512) for n in range(256)], dtype=torch.float64)
    up, down = (bins - edges[:-2, None]) / (edges[1] - edges[0]), (edges[2:, None] - bins) / (edges[1] - edges[0])
    return (power @ torch.minimum(up, down).clamp(min=0).to(power).T).clamp(min=torch.finfo(torch.float32).eps).log()     # straight on mel


def kaldi_mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


# ---- official files ----

CHUNKS = {"flow-chunk-5.pt": 5, "flow-chunk-25.pt": 25, "flow.pt": 0}       # file -> codes in a chunk of its attention
FIXED = {                       # what config.json could choose, and the published codec did
    "pooling_type": "avg", "encoder_causal_attention": True, "encoder_causal_convolution": True, "activation_function": "gelu"}
FIELDS = {                      # ours: theirs
    "mels": "num_mel_bins", "dim": "d_model", "layers": "quantize_position", "heads": "encoder_attention_heads",
    "ffn": "encoder_ffn_dim", "positions": "max_source_positions", "pool": "pooling_kernel_size"}


def is_moss(path: Path) -> bool:
    """A folder whose config.json is a Whisper-VQ encoder's, with a decoder in flow/."""
    return path.is_dir() and (path / "flow").is_dir() and "quantize_vocab_size" in (_json(path / "config.json") or {})


def read_config(path: Path) -> MossCodecConfig:
    """The encoder's sizes; ValueError for settings not known here."""
    _missing(path)
    about = _json(path)
    try:
        encoder = WhisperConfig(**{ours: about[theirs] for ours, theirs in FIELDS.items()}, causal=True, final_norm=False)
        size = about["quantize_vocab_size"]
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; fetch it again from the codec's repository") from error
    for name, wanted in (FIXED | {"pooling_position": encoder.layers}).items():
        if about.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name} is {about[name]!r}, this codec supports {wanted!r}; name the MOSS-Speech codec")
    if (type(size), encoder.pool) != (int, 4) or not 0 < size <= LARGEST or encoder.positions < 4 * PIECE or encoder.dim % encoder.heads:
        raise ValueError(f"{path} asks for {encoder} and {size} codes, which is no codec of 12.5 Hz; fetch it again")
    return MossCodecConfig(encoder, size)


def flow_file(path: Path, chunk: int | None) -> Path:
    """The flow decoder's file for that chunk size."""
    if chunk not in (None, *CHUNKS.values()):
        raise ValueError(f"chunk is {chunk}, there are weights for 5 and 25 codes and for 0 (full attention, no stream); choose among them")
    files = [path / "flow" / name for name, size in CHUNKS.items() if chunk in (None, size)]
    return next((file for file in files if file.is_file()), files[0])


def flow_config(state: Mapping[str, Tensor], source: Path) -> FlowConfig:
    """Sizes of the flow decoder, from its tensors."""
    vocab, dim = _shape(state, "input_embedding.weight", 2, source)
    stage = "decoder.estimator.down_blocks.0"
    return FlowConfig(
        vocab, dim, _shape(state, "encoder.encoders.0.self_attn.pos_bias_u", 2, source)[0],
        _shape(state, "encoder.encoders.0.feed_forward.w_1.weight", 2, source)[0],
        _count(state, r"encoder\.encoders"), _count(state, r"encoder\.up_encoders"),
        _shape(state, "spk_embed_affine_layer.weight", 2, source)[1],
        _shape(state, "decoder.estimator.final_proj.weight", 3, source)[1],
        _shape(state, f"{stage}.1.0.attn1.to_q.weight", 2, source)[0] // HEAD, _count(state, re.escape(f"{stage}.1")),
        _count(state, r"decoder\.estimator\.mid_blocks"))


def _shape(state: Mapping[str, Tensor], name: str, axes: int, source: Path) -> torch.Size:
    if name not in state or state[name].dim() != axes:
        found = f"{tuple(state[name].shape)}" if name in state else f"missing among {listed(sorted(state), 3)}"
        raise ValueError(f"{source}: {name} is {found}; fetch the codec's repository whole")
    return state[name].shape


def _count(state: Mapping[str, Tensor], stem: str) -> int:
    return len({match[1] for name in state if (match := re.match(stem + r"\.(\d+)\.", name))})


def unused(layers: int) -> str:
    """A pattern of the encoder's tensors that serve training alone, or stand behind the codebook: its layers from `layers` on."""
    return rf"embed_positions2\..*|layer_norm\..*|ema_(count|weight)|layers\.({'|'.join(str(n) for n in range(layers, 100))})\..*"


def _missing(*files: Path) -> None:
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no {file}; fetch the codec's repository whole")
