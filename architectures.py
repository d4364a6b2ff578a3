"""What the models are: a stream table and a few switches, and the published architectures as constants.

Numbers only; model.py builds them. A family is a value here and a layout in streams.py, never a subclass.
Sources: the papers named in model.py and the configuration files of the released checkpoints. Next: model.py.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from streams import Stream, StreamTable


@dataclass(frozen=True)
class StackConfig:
    """A stack of equal transformer blocks: the temporal or the depth transformer."""

    dim: int = 256                    # width D
    layers: int = 4                   # blocks
    heads: int = 4                    # query heads
    kv_heads: int = 0                 # key and value heads, 0 = as many as query heads
    head_dim: int = 0                 # width of a head, 0 = dim / heads
    ffn: int = 1024                   # inner width of the feed-forward network
    gated: bool = True                # down(act(gate x) * up x), otherwise down(act(up x))
    activation: str = "silu"          # "silu" or "gelu" (exact)
    norm_eps: float = 1e-5            # RMSNorm epsilon
    rope_theta: float = 10000.0       # RoPE base, 0 = no position embedding
    rope_interleaved: bool = False    # pairs (2i, 2i+1) as in Moshi, otherwise halves (i, i + d/2) as in Llama
    rope_scaling: tuple[float, ...] = ()   # llama3: factor, low and high frequency factor, original length
    window: int = 0                   # a query sees this many positions, itself included; 0 = all
    qkv_bias: bool = False            # Qwen2
    qk_norm: bool = False             # Qwen3: RMSNorm over each head before RoPE
    packed: bool = False              # qkv, and gate with up, are one Linear each (Moshi)
    steps: int = 0                    # depth transformer: codebook steps, each with weights of its own
    schedule: tuple[int, ...] = ()    # depth transformer: weight set of each step, () = its own
    low_rank: int = 0                 # depth transformer: width of its embedding tables, each widened by a Linear; 0 = dim

    def __post_init__(self) -> None:
        assert min(self.dim, self.layers, self.heads, self.ffn) > 0 <= self.kv_heads, "dim, layers, heads and ffn are at least 1"
        assert self.activation in ("silu", "gelu"), f"activation {self.activation!r} is neither 'silu' nor 'gelu'"
        assert self.heads % self.kv == 0, f"{self.heads} heads do not divide among {self.kv} kv_heads"
        assert self.head_dim or self.dim % self.heads == 0, f"dim {self.dim} is no multiple of {self.heads} heads"
        assert self.head % 2 == 0 or not self.rope_theta, f"RoPE turns pairs: a head of {self.head} is odd"
        assert len(self.rope_scaling) in (0, 4), "rope_scaling is factor, low, high, original length"
        assert not self.schedule or len(self.schedule) == self.steps, "schedule names one weight set a step"
        assert set(self.schedule) == set(range(len(set(self.schedule)))), f"schedule {self.schedule} leaves weight sets out"

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        return self.head_dim or self.dim // self.heads


@dataclass(frozen=True)
class FusionConfig:
    """DSAA: a frozen text model beside the temporal transformer, and the projectors that join them (dsaa.py)."""

    tower: "ModelConfig"              # the text model
    source: str = ""                  # where its weights are: folder or hub id; checkpoints leave them out
    revision: str = ""                # fingerprint of those weights
    rate: str = "frame"               # the tower steps once a column ("frame"), or only at word pieces ("token")
    text: str = "preserve"            # projector before the text head: preserve, residual, mlp, gated, text_residual
    depth: str = "residual"           # projector before each depth step
    hidden: int = 4096                # inner width of the projectors
    dropout: float = 0.1              # in the projectors, in training
    split_norm: bool = False          # each part of their input has a norm of its own
    remember: int = 0                 # MiB for states of frozen towers from one epoch to the next; 0 = compute them anew
    feed_text: bool = False           # the temporal transformer hears the text too, through a map that starts at zero

    def __post_init__(self) -> None:
        assert self.rate in ("frame", "token"), f"rate {self.rate!r} is neither 'frame' nor 'token'"
        assert not self.tower.table.audio and self.tower.fusion is None, "the tower is a plain text model"


@dataclass(frozen=True)
class ModelConfig:
    """A family: its stream table and its switches."""

    table: StreamTable                                   # the rows of the grid
    temporal: StackConfig = field(default_factory=StackConfig)   # transformer over columns
    depth: StackConfig | None = None                     # transformer over codebooks; None = parallel heads
    dual_ffn: tuple[int, ...] = ()                       # layers with a feed-forward network and norms for audio columns
    fast_forward: bool = False                           # other layers pass audio columns by and hide them (needs dual_ffn)
    tail: int = 0                                        # layers after the shared ones, once for text and once for audio
    tied: bool = False                                   # the text head is the text embedding
    demux: bool = False                                  # text rows share one table, each behind a Linear (Moshi's TTS)
    extra_heads: int = 0                                 # small heads beside the text head (Moshi's STT: is the user pausing?)
    extra_classes: int = 6                               # classes of each
    voice: int = 0                                       # width F of the voice features that every layer attends to (Moshi's TTS), 0 = none
    voice_places: float = 0.0                            # scale of the sine places added to them
    fusion: FusionConfig | None = None                   # a text model beside the temporal transformer (DSAA)
    dropout: float = 0.0                                 # on both residual branches, in training
    text_drop: float = 0.0                               # up to this share of columns has no text as input, in training (aligned)
    input_drop: float = 0.0                              # up to this share of audio columns is hidden as input, in training
    checkpoint: int | bool = 0                           # made again in backward: 1 cheap outputs, 2 and depth, 3 and half the rest, 4 all

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, bool):                  # older files: none, or all
            object.__setattr__(self, "checkpoint", 4 * self.checkpoint)
        assert 0 <= self.checkpoint <= 4, f"checkpoint {self.checkpoint} is none of 0 none, 1 cheap, 2 depth, 3 half, 4 all"
        assert 0 <= self.dropout < 1 and 0 <= self.input_drop <= 1, "dropout is in [0, 1), input_drop in [0, 1]"
        assert 0 <= self.text_drop <= self.table.aligned, "text_drop is in [0, 1], and for aligned rows only"
        assert len(self.table.text) == 1 or not self.tied, "a tied head needs a single text row"
        assert all(0 <= n < self.temporal.layers for n in self.dual_ffn), "dual_ffn names layers of the temporal stack"
        assert self.fusion is None or self.depth, "fusion joins two towers in front of a depth transformer"
        assert self.depth is None or self.depth.steps == len(self.table.audio_out), "depth.steps is one per predicted codebook"


# ---- published ----

def codebooks(count: int, vocab: int, classes: int, start: int, end: int = -1, delays: range | tuple[int, ...] | None = None,
              name: str = "cb") -> tuple[Stream, ...]:
    """A run of audio streams of one speaker; classes 0 = read, never predicted."""
    delays = delays if delays is not None else (0,) * count
    return tuple(Stream(f"{name}{k + 1}", "audio", vocab, classes, delays[k], start, end) for k in range(count))


# Higgs Audio v2 3B: Llama-3.2-3B with a second FFN for audio columns; text ids from its tokenizer.json.
HIGGS_V2_3B = ModelConfig(
    StreamTable((Stream("text", "text", 128256, 128256), *codebooks(8, 1026, 1026, 1024, 1025, range(8))),
                "chatml", audio_start=128013, audio_end=128012, stop=(128001, 128009)),
    StackConfig(dim=3072, layers=28, heads=24, kv_heads=8, head_dim=128, ffn=8192, rope_theta=500000.0,
                rope_scaling=(32.0, 1.0, 4.0, 8192.0)),
    dual_ffn=tuple(range(28)))

# Moshi 7B: 17 rows at 12.5 Hz; the user's rows are read and never predicted.
MOSHI_DELAYS = (0, 1, 1, 1, 1, 1, 1, 1)
MOSHI_7B = ModelConfig(
    StreamTable((Stream("text", "text", 32001, 32000, start=32000),
                 *codebooks(8, 2049, 2048, 2048, delays=MOSHI_DELAYS),
                 *codebooks(8, 2049, 0, 2048, delays=MOSHI_DELAYS, name="user")), "duplex", aligned=True),
    StackConfig(dim=4096, layers=32, heads=32, ffn=11264, norm_eps=1e-8, rope_interleaved=True, window=3000, packed=True),
    depth=StackConfig(dim=1024, layers=6, heads=16, ffn=2816, norm_eps=1e-8, rope_theta=0.0, packed=True, steps=8))



def kyutai(dim: int, layers: int, heads: int, window: int, rope: float, **more: Any) -> StackConfig:
    """A temporal transformer of the Moshi family: the feed-forward network is two thirds of 4.125 D wide."""
    return StackConfig(dim=dim, layers=layers, heads=heads, ffn=2 * int(4.125 * dim) // 3, norm_eps=1e-8, rope_theta=rope,
                       rope_interleaved=True, window=window, packed=True, **more)


def hibiki(Q: int, temporal: StackConfig) -> ModelConfig:
    """Hibiki translates what the user says; how well it should sound is a condition. Q codebooks of each side."""
    delays = (0, *[2] * (Q - 1))
    return ModelConfig(
        StreamTable((Stream("text", "text", 48001, 48000, start=48000),
                     Stream("description", "condition", 32, start=31, rank=16, values=("very_bad", "bad", "neutral", "good", "very_good")),
                     *codebooks(Q, 2049, 2048, 2048, delays=delays), *codebooks(Q, 2049, 0, 2048, delays=delays, name="user")),
                    "duplex", aligned=True),
        temporal, depth=replace(MOSHI_7B.depth, steps=Q))


HIBIKI_2B = hibiki(16, kyutai(2560, 24, 20, 3000, 1e5))
HIBIKI_1B = hibiki(8, kyutai(2048, 16, 16, 3000, 1e5))


def recogniser(words: int, temporal: StackConfig, extra_heads: int = 0) -> ModelConfig:
    """Kyutai's speech to text: 32 codebooks are heard, the text comes a while later; extra heads tell pauses."""
    return ModelConfig(StreamTable((Stream("text", "text", words + 1, words, start=words), *codebooks(32, 2049, 0, 2048, name="user")),
                                   "duplex", aligned=True), temporal, extra_heads=extra_heads)


STT_1B = recogniser(8000, kyutai(2048, 16, 16, 750, 1e5), extra_heads=4)        # en, fr; 0.5 s late
STT_2_6B = recogniser(4000, kyutai(2048, 48, 32, 375, 1e5))                     # en; 2.5 s late

# Kyutai's text to speech: the words to say and those two ahead are given, 32 codebooks drawn, up to five voices heard.
TTS_1_6B = ModelConfig(
    StreamTable((Stream("text", "text", 8001, 8000, start=8000), Stream("ahead", "text", 8001),
                 Stream("control", "condition", 2, start=1, rank=2048, values=("ok",)),
                 Stream("cfg", "condition", 8, start=7, rank=16, values=("1.0", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0")),
                 *codebooks(32, 2049, 2048, 2048, delays=(0, *[2] * 31))), "duplex", aligned=True),
    kyutai(2048, 16, 16, 500, 1e4), demux=True, voice=512,
    depth=StackConfig(dim=1024, layers=4, heads=16, ffn=2048, norm_eps=1e-8, rope_theta=0.0, packed=True, steps=32, low_rank=128,
                      schedule=(*range(8), *[8] * 8, *[9] * 8, *[10] * 8)))

# MOSS-Speech: Qwen3-8B whose last four layers exist twice, once for text and once for speech codes at 12.5 Hz.
MOSS_9B = ModelConfig(
    StreamTable((Stream("text", "text", 151680, 151680), *codebooks(1, 16512, 16512, -1, 16384)),
                "moss", audio_start=151646, stop=(151643, 151645)),
    StackConfig(dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=12288, norm_eps=1e-6, rope_theta=1e6, qk_norm=True),
    tail=4)


def qwen(layers: int, dim: int, ffn: int, heads: int, kv_heads: int, generation: int, head: int = 128, vocab: int = 151936,
         tied: bool = True) -> ModelConfig:
    """A text model of the second generation (biases on q, k, v) or of the third (norms on q and k)."""
    second = generation == 2
    return ModelConfig(
        StreamTable((Stream("text", "text", vocab, vocab),), f"qwen{generation}", stop=(151643, 151645)),
        StackConfig(dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head if head * heads != dim else 0, ffn=ffn,
                    norm_eps=1e-6, rope_theta=1e6, qkv_bias=second, qk_norm=not second), tied=tied)


QWEN2_5_0_5B = qwen(24, 896, 4864, 14, 2, generation=2, head=64)
QWEN2_5_1_5B = qwen(28, 1536, 8960, 12, 2, generation=2)
QWEN2_5_3B = qwen(36, 2048, 11008, 16, 2, generation=2)
QWEN2_5_7B = qwen(28, 3584, 18944, 28, 4, generation=2, vocab=152064, tied=False)
QWEN3_0_6B = qwen(28, 1024, 3072, 16, 8, generation=3)
QWEN3_1_7B = qwen(28, 2048, 6144, 16, 8, generation=3)
QWEN3_4B = qwen(36, 2560, 9728, 32, 8, generation=3)
QWEN3_8B = qwen(36, 4096, 12288, 32, 8, generation=3, tied=False)
