"""The architecture of a model as dataclasses: transformer stacks, and the switches by which families differ.

model.py builds models from them; the published architectures are constants in families/. Next: model.py.
"""

from dataclasses import dataclass, field

from streams import StreamTable


@dataclass(frozen=True)
class StackConfig:
    """A stack of identical transformer blocks: the temporal transformer or the depth transformer."""

    dim: int = 256                    # model width: size of the hidden states
    layers: int = 4                   # number of transformer blocks
    heads: int = 4                    # number of query heads
    kv_heads: int = 0                 # number of key and value heads (grouped-query attention); 0 = as many as query heads
    head_dim: int = 0                 # width of one attention head; 0 = dim / heads
    ffn: int = 1024                   # inner width of the feed-forward network
    gated: bool = True                # feed-forward network: true = down(act(gate x) * up x), false = down(act(up x))
    activation: str = "silu"          # activation function: "silu" or "gelu" (exact, not the tanh approximation)
    norm_eps: float = 1e-5            # epsilon of RMSNorm
    rope_theta: float = 10000.0       # base of the rotary position embedding (RoPE); 0 = no position embedding
    rope_interleaved: bool = False    # RoPE rotates the pairs (2i, 2i+1) as in Moshi; false = (i, i + head_dim/2) as in Llama
    rope_scaling: tuple[float, ...] = ()   # Llama 3 RoPE scaling: factor, low and high frequency factor, original length; () = none
    window: int = 0                   # attention window: positions that a query sees, itself included; 0 = no limit
    qkv_bias: bool = False            # add a bias to the query, key and value projections (Qwen2)
    qk_norm: bool = False             # RMSNorm on queries and keys of each head before RoPE (Qwen3)
    packed: bool = False              # one Linear for query, key and value, and one for gate and up (Moshi)
    steps: int = 0                    # depth transformer: number of codebook steps, each with its own weights
    schedule: tuple[int, ...] = ()    # depth transformer: number of the weight set for each step; () = one set per step
    prefix: bool = False              # depth transformer: read [temporal state, codebook 0, 1, ...] as one sequence (layers/depth.py)
    projection: str = ""              # prefix depth transformer: map the temporal state to dim, "linear", "bias" (with bias) or "" (no map)
    low_rank: int = 0                 # depth transformer: width of its embedding tables before a projection to dim; 0 = dim

    def __post_init__(self) -> None:
        assert min(self.dim, self.layers, self.heads, self.ffn) > 0 <= self.kv_heads, "dim, layers, heads and ffn are at least 1"
        widths, counts = (self.dim, self.ffn, self.window, self.low_rank, self.head_dim), (self.layers, self.heads, self.steps)
        assert max(widths) <= 2**24 and max(counts) <= 2**13, (
            "dim, ffn, window, low_rank and head_dim are at most 2^24, layers, heads and steps 2^13")
        assert min(self.window, self.steps, self.head_dim, self.low_rank) >= 0 < self.norm_eps, "a size is negative, or norm_eps is 0"
        assert self.layers * self.dim * (self.dim + self.ffn) <= 2**45, f"{self.layers} layers of {self.dim} x {self.ffn} fit nowhere"
        assert self.activation in ("silu", "gelu"), f"activation {self.activation!r} is neither 'silu' nor 'gelu'"
        assert self.heads % self.kv == 0, f"{self.heads} heads do not divide among {self.kv} kv_heads"
        assert self.head_dim or self.dim % self.heads == 0, f"dim {self.dim} is not a multiple of {self.heads} heads"
        assert self.projection in ("", "linear", "bias"), f"projection {self.projection!r} is none of '', linear, bias"
        assert self.head % 2 == 0 or not self.rope_theta, f"head_dim {self.head} is odd; RoPE rotates pairs, so use an even one"
        assert self.rope_theta >= 0, f"rope_theta {self.rope_theta} is negative"
        assert len(self.rope_scaling) in (0, 4), "rope_scaling takes four numbers: factor, low, high, original length"
        assert not self.schedule or len(self.schedule) == self.steps, "schedule needs one weight set for each of the depth steps"
        assert set(self.schedule) == set(range(len(set(self.schedule)))), f"schedule {self.schedule} leaves weight sets out"

    @property
    def chunk(self) -> int:
        """Columns of a prompt read at once: a ring has room for 256 behind its window; without one, the fewer masks, the faster."""
        return 256 if self.window else 2048

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        return self.head_dim or self.dim // self.heads


@dataclass(frozen=True)
class FusionConfig:
    """DSAA: a frozen text model beside the temporal transformer, and the projectors that combine them (layers/fusion.py)."""

    tower: "ModelConfig"              # architecture of the text model
    source: str = ""                  # weights of the text model, a folder or hub id; checkpoints do not contain them
    revision: str = ""                # hash of the text model's weights, checked when they are loaded
    rate: str = "frame"               # when the text model runs: "frame" = once a column, "token" = only at word pieces
    text: str = "preserve"            # type of the projector before the text head: preserve, residual, mlp, gated, text_residual
    depth: str = "residual"           # type of the projector before each depth step, as for text
    hidden: int = 4096                # inner width of the projectors
    dropout: float = 0.1              # dropout probability in the projectors, in training
    split_norm: bool = False          # normalise the text state and the temporal state separately in the projectors
    remember: int = 0                 # MiB of memory for caching the states of frozen models between epochs; 0 = no cache
    feed_text: bool = False           # the temporal transformer also reads the text, through a projection initialised to zero

    def __post_init__(self) -> None:
        assert self.rate in ("frame", "token"), f"rate {self.rate!r} is neither 'frame' nor 'token'"
        assert not self.tower.table.codes and self.tower.fusion is None, "the tower is a plain text model"


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: its stream table, its transformers, and the switches by which families differ."""

    table: StreamTable                                   # the rows of the grid
    temporal: StackConfig = field(default_factory=StackConfig)   # the temporal transformer, which runs over columns
    depth: StackConfig | None = None                     # the depth transformer, which runs over codebooks; none = parallel audio heads
    dual_ffn: tuple[int, ...] = ()                       # layers with a second feed-forward network and norms for audio columns, e.g. 0,1
    fast_forward: bool = False                           # layers outside dual_ffn skip audio columns and mask them as keys (Higgs)
    tail: int = 0                                        # layers after the shared ones, one stack for text, one for audio (MOSS)
    tied: bool = False                                   # the text head shares its weights with the text embedding
    audio_tied: bool = False                             # the audio heads share their weights with the audio embedding (Higgs v3)
    text_width: int = 0                                  # width of the text embedding before two projections to dim (Qwen3-TTS); 0 = dim
    demux: bool = False                                  # text rows share one embedding table and have separate projections (Moshi's TTS)
    extra_heads: int = 0                                 # number of extra heads beside the text head (Moshi's STT: pause detection)
    extra_classes: int = 6                               # number of classes of each extra head
    voice: int = 0                                       # width of the voice features for cross-attention (Moshi's TTS); 0 = none
    voice_places: float = 0.0                            # scale of the sinusoidal position embedding added to the voice features
    fusion: FusionConfig | None = None                   # a frozen text model beside the temporal transformer (DSAA); none = off
    depth_tied: bool = False                             # the prefix depth transformer uses the audio embedding of the temporal transformer
    depth_share: float = 1.0                             # share of the frames on which a prefix depth transformer is trained, in (0, 1]
    dropout: float = 0.0                                 # dropout probability on attention and feed-forward outputs, in training
    text_drop: float = 0.0                               # largest fraction of columns without text input, in training (aligned layouts)
    input_drop: float = 0.0                              # largest fraction of columns without audio input, in training
    checkpoint: int | bool = 0                           # recomputed in backward: 0 nothing, 1 cheap outputs, 2 + depth, 3 + half, 4 all

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, bool):                  # older files store a bool: none, or all
            object.__setattr__(self, "checkpoint", 4 * self.checkpoint)
        assert 0 <= self.checkpoint <= 4, f"checkpoint is {self.checkpoint}; give 0 none, 1 cheap, 2 depth, 3 half or 4 all"
        assert 0 <= self.dropout < 1 and 0 <= self.input_drop <= 1, "dropout is in [0, 1), input_drop in [0, 1]"
        extras = (self.extra_heads, self.extra_classes, self.voice)
        assert 0 <= self.tail <= 2**13 and 0 <= min(extras) <= max(extras) <= 2**20, "tail, extra heads or voice are out of range"
        assert 0 <= self.text_drop <= self.table.aligned, "text_drop is in [0, 1], and for aligned rows only"
        assert len(self.table.text) == 1 or not self.tied, "tied needs a table with a single text row; set it to false"
        whole = all(0 < self.table.streams[k].classes == self.table.streams[k].vocab for k in self.table.audio)
        assert not self.audio_tied or self.depth is None and whole, (
            "audio_tied needs parallel heads that predict every id of every audio row; set it to false")
        assert 0 <= self.text_width <= 2**24 and not (self.text_width and (len(self.table.text) != 1 or self.tied)), (
            "text_width is 0..2^24, and for one text row with a table of its own")
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

    @property
    def tied_heads(self) -> tuple[str, ...]:
        """The heads that share their weights with an embedding, whose name they begin with."""
        return ("text_head",) * self.tied + ("audio_head",) * self.audio_tied
