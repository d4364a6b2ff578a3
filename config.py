"""TrainConfig: everything a run needs, composed of the parts that live beside the code that reads them.

A file in configs/ builds one and calls it `config`, and its tiny twin `smoke`. Parsing, overrides and JSON are in
options.py. Next: train.py.
"""

import math
from dataclasses import dataclass, field

from corpus.data_config import DataConfig
from families.family import consolidated_files, family_of
from layers.architecture import ModelConfig
from lora import LoraConfig
from loss import LossConfig
from options import check_types

__all__ = ["DataConfig", "DpoConfig", "LoraConfig", "LossConfig", "ModelConfig", "Stage", "TrainConfig", "first_beta", "learning_rate"]

SCHEDULES = ("constant", "linear", "cosine", "wsd", "onecycle")


@dataclass(frozen=True)
class DpoConfig:
    """How a preference is learnt."""

    beta: float = 0.1                # how dear it is to leave the reference: large stays near it
    label_smoothing: float = 0.0     # share of pairs that may be the wrong way round

    def __post_init__(self) -> None:
        assert self.beta > 0, f"beta {self.beta} is not positive"
        assert 0 <= self.label_smoothing < 0.5, f"label_smoothing {self.label_smoothing} is outside [0, 0.5)"


@dataclass(frozen=True)
class Stage:
    """A first part of a run, with data and weights of its own. Behind the last one the run's own hold."""

    steps: int                       # how long it lasts
    sources: tuple[str, ...] = ()    # what it reads; () = data.sources
    text: float = 1.0                # lambda of the text group; 0 leaves what only text trains as it is
    audio: float = 1.0               # lambda of the audio group, likewise


@dataclass(frozen=True)
class TrainConfig:
    """A run: what is trained on what, and how."""

    model: ModelConfig                     # the family
    data: DataConfig                       # where the tokens come from
    loss: LossConfig = field(default_factory=LossConfig)   # how streams add up
    lora: LoraConfig | None = None         # adapters; None trains everything
    quantize: str = ""                     # "int8": what is frozen in 8 bits, a quarter of fp32; adapters on it train as ever
    dpo: DpoConfig | None = None           # learn from pairs of replies what is preferred, not what is likely (objective.py)
    init: str = ""                         # weights to start from: folder, file or hub id; empty = random
    init_adapter: str = ""                 # adapter to start from (second stage)
    out: str = "out/run"                   # run folder
    resume: str = "auto"                   # "auto" continues what is in `out`, "never" refuses to, or a checkpoint folder

    steps: int = 1000                      # optimizer steps
    epochs: int = 0                        # passes over the training data, the last one whole; 0 = by steps; both: what ends first
    stages: tuple[Stage, ...] = ()         # a curriculum: what the first steps read and train
    batch_size: int = 1                    # packed rows of a micro-batch, on one rank
    accum: int = 1                         # micro-batches of a step, on one rank
    lr: float = 1e-3                       # peak learning rate
    rates: tuple[tuple[str, float], ...] = ()   # (pattern, factor) on the rate of parts, the first match holds; 0 freezes
    schedule: str = "linear"               # constant, linear, cosine, wsd or onecycle
    warmup: int = 0                        # steps of linear warm-up (onecycle: of the rise)
    warmup_offset: int = 0                 # 0: the first update has rate 0 when there is a warm-up; 1 avoids it
    cycle_momentum: bool = False           # onecycle: also swing beta1, 0.95 down to 0.85 at the peak, as moshi-finetune does
    decay: float = 0.2                     # share of the steps over which wsd falls
    min_lr: float = 0.0                    # the schedule ends here
    betas: tuple[float, float] = (0.9, 0.95)   # AdamW
    eps: float = 1e-8                      # AdamW
    weight_decay: float = 0.1              # on matrices; vectors have none
    clip: float = 1.0                      # largest gradient norm, 0 = no limit
    ema: float = 0.0                       # decay of the averaged weights that evaluation and sampling use, 0 = none
    dtype: str = "auto"                    # fp32, bf16 or fp16 compute; auto = bf16 where the device has it
    device: str = "auto"                   # cpu, cuda, or auto
    compile: bool = False                  # torch.compile each block
    shard: bool = False                    # FSDP2: a rank holds its part of weights, gradients and AdamW; full fine-tuning
    seed: int = 0                          # of weights, data order, dropout

    eval_every: int = 0                    # steps between evaluations, 0 = only at the end
    eval_batches: int = 0                  # held-out batches a rank, 0 = all
    patience: int = 0                      # evaluations without a better loss before stopping, 0 = never
    prompts: tuple[str, ...] = ()          # texts to speak and measure at every evaluation (evaluation_samples.py); Moshi: recordings
    listen: int = 0                        # held-out recordings said again and measured as well
    save_every: int = 0                    # steps between checkpoints, 0 = only at the end
    keep: int = 2                          # checkpoints kept beside the best
    consolidated: str = ""                 # each also as checkpoints/checkpoint_N/consolidated, for another trainer's scripts
    max_minutes: float = 0.0               # stop and save after this long, 0 = no limit
    max_skips: int = 10                    # consecutive steps with a non-finite gradient before giving up
    log_every: int = 10                    # steps between lines of metrics.jsonl
    trackers: tuple[str, ...] = ()         # also report to: tensorboard, wandb, trackio

    def __post_init__(self) -> None:
        check_types(self)
        assert self.schedule in SCHEDULES, f"schedule {self.schedule!r} is none of {SCHEDULES}"
        assert self.dtype in ("auto", "fp32", "bf16", "fp16"), f"dtype {self.dtype!r} is none of auto, fp32, bf16, fp16"
        assert not self.shard or self.lora is None, "shard is for full fine-tuning; adapters are small, leave it off"
        assert self.device in ("auto", "cpu", "cuda"), f"device {self.device!r} is none of auto, cpu, cuda"
        assert min(self.steps, self.batch_size, self.accum, self.log_every) > 0, "steps, batch_size, accum and log_every are at least 1"
        assert self.quantize in ("", "int8"), f"quantize {self.quantize!r} is neither empty nor int8"
        assert not self.quantize or self.lora is not None, "quantize holds a frozen base in 8 bits; add adapters, --lora.rank=16"
        assert not self.init_adapter or self.lora is not None, "init_adapter needs adapters to fill; add --lora.rank=8"
        if self.dpo is not None:
            assert self.lora is not None, "dpo takes the model without its adapters as reference; add --lora.rank=8"
            assert not self.lora.train and not self.init_adapter, (
                "dpo's reference is what the adapters leave: lora.train would change it too, and it lacks init_adapter; "
                + "fold that in first (python checkpoint.py merge RUN --out=DIR, then --init=DIR)")
        counts = ("epochs", "warmup", "eval_every", "eval_batches", "patience", "save_every", "keep", "lr", "min_lr", "eps", "clip",
                  "weight_decay", "listen")
        assert all(getattr(self, name) >= 0 for name in counts), f"none of {', '.join(counts)} may be negative"
        assert all(0 <= beta < 1 for beta in self.betas) and 0 <= self.seed < 2**63, "betas are in [0, 1), seed is not negative"
        assert 0 <= self.ema < 1 and 0 <= self.decay <= 1, f"ema {self.ema} is outside [0, 1), or decay {self.decay} outside [0, 1]"
        assert not (self.stages and self.epochs), "stages count steps; leave epochs at 0"
        assert all(s.steps > 0 and min(s.text, s.audio) >= 0 < s.text + s.audio for s in self.stages), "a stage lasts and trains something"
        assert all(factor >= 0 for _, factor in self.rates), f"rates {self.rates} has a negative factor"
        try:
            family_of(self.model.table)
        except ValueError as error:
            raise AssertionError(error) from None
        assert not self.listen or family_of(self.model.table).reads_aloud, (
            f"listen speaks texts again, layout {self.model.table.layout!r} is no text to speech; leave it at 0")
        known = [name for name in consolidated_files(self.model) if self.lora or not name.endswith("-lora")]
        assert self.consolidated in ("", *known), f"consolidated {self.consolidated!r} is none of {known}"
        unknown = set(self.trackers) - {"tensorboard", "wandb", "trackio"}
        assert not unknown, f"trackers {sorted(unknown)} are none of tensorboard, wandb, trackio"


ONECYCLE_START, ONECYCLE_END = 25.0, 250_000.0     # torch's OneCycleLR: peak / 25 at first, peak / 250,000 at last


def learning_rate(step: int, c: TrainConfig) -> float:
    """Learning rate of update `step`, counted from 0."""
    if c.schedule == "onecycle":
        return onecycle(step, c)
    if step < c.warmup:
        return c.lr * (step + c.warmup_offset) / c.warmup
    done = min(1.0, (step - c.warmup) / max(1, c.steps - c.warmup))          # 0 after the warm-up, 1 at the end
    if c.schedule == "cosine":
        return c.min_lr + (c.lr - c.min_lr) * (1 + math.cos(math.pi * done)) / 2
    if c.schedule == "linear":
        return c.lr + (c.min_lr - c.lr) * done
    if c.schedule == "wsd":
        fall = max(0.0, (done - (1 - c.decay)) / c.decay) if c.decay else 0.0
        return c.lr + (c.min_lr - c.lr) * fall
    return c.lr


def first_beta(step: int, c: TrainConfig) -> float:
    """AdamW's beta1 in update `step`: fixed, or swung against the learning rate (what OneCycleLR does unless told not to)."""
    if c.schedule != "onecycle" or not c.cycle_momentum:
        return c.betas[0]
    rise = c.warmup - 1
    near = step / max(1, rise) if step <= rise else 1 - (step - rise) / max(1, c.steps - 1 - rise)     # 1 at the peak
    return 0.95 - 0.1 * (1 - math.cos(math.pi * max(0.0, near))) / 2


def onecycle(step: int, c: TrainConfig) -> float:
    """Cosine from lr / 25 up to lr over `warmup` steps and down to lr / 250,000 (torch's OneCycleLR, momentum untouched)."""
    rise = c.warmup - 1
    if step <= rise:
        low, high, done = c.lr / ONECYCLE_START, c.lr, step / max(1, rise)
    else:
        low, high, done = c.lr, c.lr / ONECYCLE_END, (step - rise) / max(1, c.steps - 1 - rise)
    return high + (low - high) * (1 + math.cos(math.pi * min(1.0, done))) / 2
