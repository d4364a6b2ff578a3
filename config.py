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
    """Direct preference optimisation."""

    beta: float = 0.1                # DPO temperature; larger values keep the policy closer to the reference model
    label_smoothing: float = 0.0     # share of pairs assumed to be labelled the wrong way round, 0 to 0.5

    def __post_init__(self) -> None:
        assert self.beta > 0, f"beta {self.beta} is not positive"
        assert 0 <= self.label_smoothing < 0.5, f"label_smoothing {self.label_smoothing} is outside [0, 0.5)"


@dataclass(frozen=True)
class Stage:
    """A first part of a run, with its own data and loss weights. After the last stage the run's own settings apply."""

    steps: int                       # optimizer steps that this stage lasts
    sources: tuple[str, ...] = ()    # its training data; () = data.sources
    text: float = 1.0                # weight of the text loss; 0 leaves parameters that only text trains unchanged
    audio: float = 1.0               # weight of the audio loss; 0 leaves parameters that only audio trains unchanged


@dataclass(frozen=True)
class TrainConfig:
    """A run: what is trained on what, and how."""

    model: ModelConfig                     # the family
    data: DataConfig                       # the training and held-out data
    loss: LossConfig = field(default_factory=LossConfig)   # weights of the losses
    lora: LoraConfig | None = None         # LoRA adapters; None = train all weights
    quantize: str = ""                     # "int8": keep frozen weights in 8 bits, a quarter of fp32; needs adapters
    dpo: DpoConfig | None = None           # train on pairs of a chosen and a rejected reply (DPO) instead of likelihood
    init: str = ""                         # weights to start from: folder, file or hub id; empty = random weights
    init_adapter: str = ""                 # adapter folder to start from; empty = new adapters
    out: str = "out/run"                   # run folder: checkpoints, metrics.jsonl and samples are written here
    resume: str = "auto"                   # "auto" = continue the run in `out`, "never" = refuse if there is one, or a checkpoint folder

    steps: int = 1000                      # optimizer steps
    epochs: int = 0                        # passes over the training data, 0 = stop after `steps`; the run stops at whichever comes first
    stages: tuple[Stage, ...] = ()         # first stages of a run; 400 steps on text alone: --stages='[{"steps":400,"audio":0.0}]'
    batch_size: int = 1                    # packed rows in a micro-batch, per rank
    accum: int = 1                         # micro-batches in an optimizer step, per rank
    lr: float = 1e-3                       # peak learning rate
    rates: tuple[tuple[str, float], ...] = ()   # learning rate factor by parameter name, 0 freezes: --rates="(('depth',0.3),)"
    schedule: str = "linear"               # learning rate schedule: constant, linear, cosine, wsd or onecycle
    warmup: int = 0                        # steps of linear warm-up (onecycle: steps until the peak)
    warmup_offset: int = 0                 # with a warm-up: 0 starts at learning rate 0, 1 starts one step higher
    cycle_momentum: bool = False           # onecycle: move beta1 from 0.95 to 0.85 at the peak and back, as moshi-finetune does
    decay: float = 0.2                     # wsd: share of the steps over which the learning rate falls, 0 to 1
    min_lr: float = 0.0                    # learning rate at the end of linear, cosine and wsd
    betas: tuple[float, float] = (0.9, 0.95)   # AdamW: decay of the first and the second moment
    eps: float = 1e-8                      # AdamW: added to the denominator
    weight_decay: float = 0.1              # AdamW: decay of weight matrices; biases and norms have none
    clip: float = 1.0                      # clip the gradient norm to this value, 0 = no clipping
    ema: float = 0.0                       # decay of averaged weights (EMA) for evaluation and sampling, 0 = off
    dtype: str = "auto"                    # compute type: fp32, bf16, fp16, or auto = bf16 where the device supports it, else fp32
    device: str = "auto"                   # cpu, cuda, or auto = cuda where there is one
    compile: bool = False                  # run torch.compile on each block
    shard: bool = False                    # FSDP2: split weights, gradients and AdamW state over the ranks
    shard_size: int = 0                    # ranks that share one copy of the weights, such as those of a node (HSDP); 0 = all
    seed: int = 0                          # random seed of initial weights, data order and dropout

    eval_every: int = 0                    # steps between evaluations, 0 = only at the end
    eval_batches: int = 0                  # held-out batches read at an evaluation, per rank, 0 = all
    patience: int = 0                      # stop after this many evaluations without a better held-out loss, 0 = never
    prompts: tuple[str, ...] = ()          # texts to speak and measure at every evaluation (evaluation_samples.py); Moshi: recordings
    listen: int = 0                        # held-out recordings whose text is spoken and measured at every evaluation
    recogniser: str = ""                   # also score what is spoken: "tiny.en" (English; needs .[eval]) or module:function; empty = no
    best: str = "loss"                     # what ckpt/best and patience go by: loss, or of what is spoken wer or speaker_similarity
    save_every: int = 0                    # steps between checkpoints, 0 = only at the end
    keep: int = 2                          # number of newest checkpoints kept, beside the best one
    consolidated: str = ""                 # official format in which each checkpoint is written too, empty = none
    max_minutes: float = 0.0               # save and stop after this many minutes, 0 = no limit
    max_skips: int = 10                    # stop with an error after this many consecutive steps with a non-finite gradient
    log_every: int = 10                    # steps between log lines and rows of metrics.jsonl
    trackers: tuple[str, ...] = ()         # other loggers: tensorboard, wandb, trackio; () = metrics.jsonl only

    def __post_init__(self) -> None:
        check_types(self)
        assert self.schedule in SCHEDULES, f"schedule {self.schedule!r} is none of {SCHEDULES}"
        assert self.dtype in ("auto", "fp32", "bf16", "fp16"), f"dtype {self.dtype!r} is none of auto, fp32, bf16, fp16"
        assert self.out, "out is empty; name the folder of the run, --out=out/NAME"
        assert not self.shard_size or self.shard, "shard_size is for --shard=true; leave it at 0"
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
        counts = ("epochs", "warmup", "eval_every", "eval_batches", "patience", "save_every", "keep", "lr", "min_lr", "clip",
                  "weight_decay", "shard_size", "listen", "max_minutes", "warmup_offset", "max_skips")
        assert all(getattr(self, name) >= 0 for name in counts), f"none of {', '.join(counts)} may be negative"
        assert self.eps > 0 and max(self.batch_size, self.accum) <= 2**20, "eps is positive, batch_size and accum are at most 2^20"
        assert all(0 <= beta < 1 for beta in self.betas) and 0 <= self.seed < 2**63, "betas are in [0, 1), seed is not negative"
        assert 0 <= self.ema < 1 and 0 <= self.decay <= 1, f"ema {self.ema} is outside [0, 1), or decay {self.decay} outside [0, 1]"
        assert not (self.stages and self.epochs), "stages count steps; leave epochs at 0"
        assert all(s.steps > 0 and min(s.text, s.audio) >= 0 < s.text + s.audio for s in self.stages), (
            "each stage needs steps and one loss weight above 0")
        assert all(factor >= 0 for _, factor in self.rates), f"rates {self.rates} has a negative factor"
        try:
            family_of(self.model.table)
        except ValueError as error:
            raise AssertionError(error) from None
        assert self.best in ("loss", "wer", "speaker_similarity"), f"best {self.best!r} is none of loss, wer, speaker_similarity"
        assert self.best == "loss" or (self.recogniser and (self.listen or (self.prompts and self.best == "wer"))), (
            f"best={self.best} is measured on what is spoken; add --recogniser=tiny.en and --listen=4")
        assert not self.recogniser or family_of(self.model.table).text_to_speech, "recogniser needs a text-to-speech model; leave it empty"
        assert not self.listen or family_of(self.model.table).text_to_speech, (
            f"listen needs a text-to-speech model, layout {self.model.table.layout!r} is none; leave it at 0")
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
    """AdamW's beta1 in update `step`: fixed, or swung against the learning rate (the default of OneCycleLR)."""
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
