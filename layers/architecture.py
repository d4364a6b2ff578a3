"""What a model is, in numbers: stacks of transformer blocks, and the switches of a family. model.py builds them.

The published architectures are constants in families/. Next: model.py.
"""

from dataclasses import dataclass, field

from streams import StreamTable


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
    window: int = 0                   # attention window in positions, the query included; 0 = all
    qkv_bias: bool = False            # Qwen2
    qk_norm: bool = False             # Qwen3: RMSNorm over each head before RoPE
    packed: bool = False              # qkv is one Linear, and so are gate and up (Moshi)
    steps: int = 0                    # depth transformer: codebook steps, each with its own weights
    schedule: tuple[int, ...] = ()    # depth transformer: index of each step's weight set, () = one set per step
    prefix: bool = False              # depth transformer: reads [state, codebook 0, 1, ...] as a sequence (layers/depth.py)
    projection: str = ""              # prefix depth transformer: temporal width -> dim, "linear", "bias" (one with bias) or ""
    low_rank: int = 0                 # depth transformer: width of its embedding tables, projected to dim; 0 = dim

    def __post_init__(self) -> None:
        assert min(self.dim, self.layers, self.heads, self.ffn) > 0 <= self.kv_heads, "dim, layers, heads and ffn are at least 1"
        assert max(self.dim, self.ffn, self.window, self.low_rank) <= 2**24 and max(self.layers, self.heads, self.steps) <= 2**13, (
            "dim, ffn, window and low_rank are at most 2^24, layers, heads and steps 2^13")
        assert min(self.window, self.steps, self.head_dim, self.low_rank) >= 0 < self.norm_eps, "a size is negative, or norm_eps is 0"
        assert self.layers * self.dim * (self.dim + self.ffn) <= 2**45, f"{self.layers} layers of {self.dim} x {self.ffn} fit nowhere"
        assert self.activation in ("silu", "gelu"), f"activation {self.activation!r} is neither 'silu' nor 'gelu'"
        assert self.heads % self.kv == 0, f"{self.heads} heads do not divide among {self.kv} kv_heads"
        assert self.head_dim or self.dim % self.heads == 0, f"dim {self.dim} is not a multiple of {self.heads} heads"
        assert self.projection in ("", "linear", "bias"), f"projection {self.projection!r} is none of '', linear, bias"
        assert self.head % 2 == 0 or not self.rope_theta, f"head_dim {self.head} is odd; RoPE rotates pairs, so use an even one"
        assert len(self.rope_scaling) in (0, 4), "rope_scaling takes four numbers: factor, low, high, original length"
        assert not self.schedule or len(self.schedule) == self.steps, "schedule needs one weight set for each of the depth steps"
        assert set(self.schedule) == set(range(len(set(self.schedule)))), f"schedule {self.schedule} leaves weight sets out"

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        return self.head_dim or self.dim // self.heads


@dataclass(frozen=True)
class FusionConfig:
    """DSAA: a frozen text model beside the temporal transformer, and the projectors that join them (layers/fusion.py)."""

    tower: "ModelConfig"              # the text model
    source: str = ""                  # where its weights are: folder or hub id; checkpoints leave them out
    revision: str = ""                # hash of those weights
    rate: str = "frame"               # the tower steps once a column ("frame"), or only at word pieces ("token")
    text: str = "preserve"            # projector before the text head: preserve, residual, mlp, gated, text_residual
    depth: str = "residual"           # projector before each depth step
    hidden: int = 4096                # inner width of the projectors
    dropout: float = 0.1              # in the projectors, in training
    split_norm: bool = False          # one norm for each part of their input
    remember: int = 0                 # MiB to cache states of frozen towers between epochs; 0 = off
    feed_text: bool = False           # the temporal transformer also reads the text, through a projection that starts at zero

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
    fast_forward: bool = False                           # other layers skip audio columns and hide them as keys (needs dual_ffn)
    tail: int = 0                                        # layers after the shared ones, one stack for text and one for audio
    tied: bool = False                                   # the text head is the text embedding
    demux: bool = False                                  # text rows share one table, each behind a Linear (Moshi's TTS)
    extra_heads: int = 0                                 # additional heads next to the text head (Moshi's STT: does the user pause?)
    extra_classes: int = 6                               # classes of each
    voice: int = 0                                       # width F of the voice features that every layer attends to (Moshi's TTS), 0 = none
    voice_places: float = 0.0                            # scale of the sinusoidal positions added to them
    fusion: FusionConfig | None = None                   # a text model beside the temporal transformer (DSAA)
    depth_tied: bool = False                             # a prefix depth transformer embeds codebooks by the model's own tables
    depth_share: float = 1.0                             # share of the frames that a prefix depth transformer is trained on
    dropout: float = 0.0                                 # on both residual branches, in training
    text_drop: float = 0.0                               # up to this fraction of columns has no text as input, in training (aligned)
    input_drop: float = 0.0                              # up to this fraction of audio columns is hidden as input, in training
    checkpoint: int | bool = 0                           # recompute in backward: 1 cheap outputs, 2 and depth, 3 and half the layers, 4 all

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, bool):                  # older files store a bool: none, or all
            object.__setattr__(self, "checkpoint", 4 * self.checkpoint)
        assert 0 <= self.checkpoint <= 4, f"checkpoint is {self.checkpoint}; give 0 none, 1 cheap, 2 depth, 3 half or 4 all"
        assert 0 <= self.dropout < 1 and 0 <= self.input_drop <= 1, "dropout is in [0, 1), input_drop in [0, 1]"
        assert 0 <= self.tail <= 2**13 and max(self.extra_heads, self.extra_classes, self.voice) <= 2**20, "tail, heads or voice too large"
        assert 0 <= self.text_drop <= self.table.aligned, "text_drop is in [0, 1], and for aligned rows only"
        assert len(self.table.text) == 1 or not self.tied, "tied needs a table with a single text row; set it to false"
        assert all(0 <= n < self.temporal.layers for n in self.dual_ffn), (
            f"dual_ffn {self.dual_ffn} must be layer numbers from 0 to {self.temporal.layers - 1}, for example --model.dual_ffn=0,1")
        assert self.fusion is None or self.depth, "fusion joins two towers in front of a depth transformer"
        prefix = self.depth is not None and self.depth.prefix
        assert 0 < self.depth_share <= 1 and (prefix or self.depth_share == 1 and not self.depth_tied), (
            "depth_share is in (0, 1]; it and depth_tied need a prefix depth transformer")
        sizes = {self.table.streams[k].classes for k in self.table.audio_out}
        assert prefix or len(sizes) <= 1, f"only a prefix depth transformer has heads of different sizes: {sorted(sizes)}"
        assert not prefix or self.depth.projection or self.depth.dim == self.temporal.dim, (
            f"a depth transformer of width {self.depth.dim} behind states of {self.temporal.dim} needs depth.projection")
        assert self.depth is None or self.depth.steps == len(self.table.audio_out), "depth.steps is one per predicted codebook"
