"""What sampling needs in memory, before anything is loaded: `sample.py --plan`, `--plan=24GB`; and what train.py's plan shares with it.

    weights       in the type they are sampled in, or in 8 bits
    cache         of each conversation, for all columns that it may have
    activations   counted: the real code reads a chunk of a prompt with tensors without memory (FakeTensorMode)

Nothing is estimated from formulas of the architecture: what the code would allocate is added up while it lives. What libraries
keep for themselves is not in it: a CUDA context (half a GiB), freed blocks that glibc keeps on a CPU (up to a fifth of a small
model; MALLOC_MMAP_THRESHOLD_=131072 gives them back). tests/training/test_plan.py compares it with measured peaks.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from checkpoint import DTYPES, open_model, read_about, recognise, resolve
from kernels.choice import device_constant
from kernels.rope import rope_frequencies
from kernels.sample import scattered, spread
from layers.architecture import ModelConfig
from layers.fusion import TextTower
from layers.int8_base import quantizable
from lora import LoraConfig
from model import MultistreamLM
from options import from_json
from streams import StreamTable

GIB = 2**30


def typical_batch(table: StreamTable, batch: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows without padding: text for a quarter and speech behind it where they take turns.   -> tokens, weights (B, K, S)"""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randint(0, s.classes or s.vocab, (batch, columns), generator=draw) for s in table.streams], 1)
    if table.audio and not table.aligned:
        tokens[:, table.audio, : columns // 4] = -1
        tokens[:, table.text, columns // 4 :] = -1
    return tokens, ((tokens >= 0) & (table.column("classes") > 0)).float()


class Tally(TorchDispatchMode):
    """Adds up the bytes of what operations make, as long as it lives; views of what a model holds are nothing new. A question about
    values is answered with 1."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {t.untyped_storage()._cdata: None for t in (held_tensors(model) if model is not None else ())}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), options: dict | None = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1
        result = function(*args, **(options or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.add(t.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors made within have no memory. Constants that were cached are forgotten: real models need real ones."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        for kept in (device_constant, rope_frequencies, scattered, spread):
            kept.cache_clear()


def build(config: ModelConfig, adapters: LoraConfig | None, types: dict[str, torch.dtype], dtype: torch.dtype,
          device: str) -> MultistreamLM:
    """A model of tensors without memory, as training or sampling holds it. Within `shapes_only`."""
    with torch.device("meta"):
        model = MultistreamLM(config)
    for name in model.weights():
        path, _, leaf = name.rpartition(".")
        module, old = model.get_submodule(path), model.get_parameter(name)
        kind = types.get(name, dtype)
        made = torch.empty(old.shape, dtype=kind, device=device)
        setattr(module, leaf, nn.Parameter(made, old.requires_grad and kind.is_floating_point))
        if kind == torch.int8:
            module.row_scale = torch.empty(old.shape[:-1], device=device)
    model.tie()
    if config.fusion is not None:                      # the tower finds words in the values of a batch: here each frame is one
        model.tower = TextTower(build(config.fusion.tower, None, {}, dtype, device), "frame", ())
    return lora.inject(model, adapters) if adapters is not None else model


@dataclass
class Need:
    """Bytes of one rank."""

    parameters: int                 # how many, all
    trained: int                    # how many
    weights: int
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    activations: int = 0            # what a step, or reading a prompt, adds at its peak
    cache: int = 0                  # of one conversation
    uncut: int = 0                  # of the weights, what every rank of --shard has whole: the frozen ones outside the blocks
    gathered: int = 0               # what a rank of --shard gathers of the others at a time
    copied: int = 0                 # of that, what FSDP2 has twice while it gathers: the trained weights outside the blocks

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations + self.cache

    def shared(self, ranks: int) -> "Need":
        """The same where weights, and what belongs to them, are cut among ranks. Nothing is copied when activations are at their peak."""
        if ranks == 1:
            return self
        return replace(self, weights=(self.weights - self.uncut) // ranks + self.uncut + self.gathered, gradients=self.gradients // ranks,
                       optimizer=self.optimizer // ranks, averages=self.averages // ranks, activations=max(self.activations, self.copied))


def held_tensors(model: nn.Module) -> list[Tensor]:
    """The weights and buffers of a model, those of its text tower too; each once."""
    tower = [] if getattr(model, "tower", None) is None else [model.tower.body]
    return list({id(t): t for m in (model, *tower) for t in (*m.parameters(), *m.buffers())}.values())


def held(model: nn.Module) -> int:
    return sum(t.nbytes for t in held_tensors(model))


def need_of_sampling(config: ModelConfig, dtype: torch.dtype, device: str, columns: int, batch: int = 1, quantize: str = "") -> Need:
    """What generation holds: weights, the cache of `batch` conversations of `columns` columns, and reading a chunk of a prompt."""
    with torch.device("meta"):
        bare = MultistreamLM(config)
        eight = {f"{path}.weight": torch.int8 for path in quantizable(bare.requires_grad_(False), ())} if quantize else {}
    with shapes_only(), torch.no_grad():
        model = build(config, None, eight, dtype, device).requires_grad_(False).eval()
        every, weights = sum(p.numel() for p in model.parameters()), held(model)
        with Tally(model) as tally:
            cache = model.cache(batch, columns)
            room = tally.now
            tokens = torch.empty(batch, len(config.table), min(columns, config.temporal.chunk), dtype=torch.long, device=device)
            places = torch.arange(tokens.shape[2], device=device).expand(batch, -1)
            model.hidden(tokens, places, cache=cache)
    return Need(every, 0, weights, cache=room, activations=tally.most - room)


# ---- what is printed ----

def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def lines(need: Need, ranks: int, what: str) -> list[str]:
    """The plan of a run, a line each."""
    parts = [("weights", need.weights), ("gradients", need.gradients), ("AdamW", need.optimizer), ("averages", need.averages),
             ("activations", need.activations), ("cache of the conversations", need.cache)]
    of = f" on each of {ranks} ranks" if ranks > 1 else ""
    return [f"{what}: {need.parameters:,} parameters, {need.trained:,} trained; peak {gib(need.total)}{of}, without what libraries keep",
            *(f"  {gib(size):>12}  {name}" for name, size in parts if size)]


def parse_size(text: str) -> int:
    """24GB, 24GiB or 24 (GB) in bytes; "" is 0."""
    number = text.strip().upper().removesuffix("GIB").removesuffix("GB").strip() if text not in ("", "true") else "0"
    try:
        return int(float(number) * (GIB if text.upper().endswith("GIB") else 10**9))
    except ValueError:
        raise ValueError(f"--plan={text} is no size; write --plan=24GB") from None


def config_of(path: str) -> ModelConfig:
    """The architecture of a checkpoint, of which no weight is read."""
    folder = resolve(path)
    if recognise(folder) is None:
        return from_json(ModelConfig, read_about(folder)["model"], f"{folder}/config.json model")
    return open_model(path)[0].config


def plan_sampling(job: Any, card: str) -> list[str]:
    """The lines of `sample.py --plan`: a conversation has a prompt of up to 512 columns; with a card also what makes it fit."""
    if not job.ckpt:
        raise ValueError("no checkpoint given; add --ckpt out/demo, or any run folder, file or hub id")
    config, dtype, device, quantize = config_of(job.ckpt), DTYPES[job.dtype], job.device, job.quantize
    columns, batch = 512 + job.max_frames, job.batch if job.texts else 1
    need, one = (need_of_sampling(config, dtype, device, columns, n, quantize) for n in (batch, 1))
    room = parse_size(card)
    report = lines(need, 1, f"{batch} conversations of {columns} columns, {gib(one.cache)} of cache each")
    if not room:
        return report
    if need.total <= room:
        return [*report, f"fits {card}: {gib(room - need.total)} are left"]
    tries = [("--dtype=bf16", torch.bfloat16, batch, quantize), ("--dtype=bf16 --quantize=int8", torch.bfloat16, batch, "int8"),
             ("--dtype=bf16 --quantize=int8 --batch=1", torch.bfloat16, 1, "int8")]
    for option, kind, n, eight in tries:
        total = need_of_sampling(config, kind, device, columns, n, eight).total
        if total <= room:
            return [*report, f"does not fit {card}; fits with {option}: {gib(total)}"]
    return [*report, f"does not fit {card}, nor does the smallest way: {gib(total)}"]
