"""What a run needs in memory, before anything is loaded: `train.py --plan`, `--plan=24GB`, and the same of sample.py.

    weights       what is frozen in the compute type or in 8 bits, what is trained in fp32, shared out among the ranks of --shard
    gradients     4 bytes a trained parameter, AdamW 8, averaged weights 4
    activations   counted: one step of the real code runs on tensors without memory (FakeTensorMode), on a batch without padding
    cache         of a conversation, likewise

Nothing is estimated from formulas of the architecture: what the code would allocate is added up while it lives. What libraries
keep for themselves (a CUDA context, half a GiB) is not in it. tests/training/test_plan.py compares it with measured peaks.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from layers.architecture import ModelConfig
from layers.batch_plan import make_plan
from layers.int8_base import quantizable
from lora import LoraConfig, trained_parameters, within
from model import Block, MultistreamLM
from streams import StreamTable

GIB = 2**30


def held_types(model: nn.Module, config: LoraConfig | None, rates: Sequence[tuple[str, float]], quantize: str) -> dict[str, torch.dtype]:
    """How training holds the parameters that are not of its compute type: what is trained in fp32, frozen Linears in int8."""
    chosen = trained_parameters(model, config) if config else {n: p for n, p in model.named_parameters() if p.requires_grad}
    trained = [name for name in chosen if next((factor for pattern, factor in rates if within(name, pattern)), 1.0)]
    eight = {f"{path}.weight": torch.int8 for path in quantizable(model, trained)} if quantize else {}
    return dict.fromkeys(trained, torch.float32) | eight


def typical_batch(table: StreamTable, batch: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows without padding: text for a quarter and speech behind it where they take turns.   -> tokens, weights (B, K, S)"""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randint(0, s.classes or s.vocab, (batch, columns), generator=draw) for s in table.streams], 1)
    if table.audio and not table.aligned:
        tokens[:, table.audio, : columns // 4] = -1
        tokens[:, table.text, columns // 4 :] = -1
    return tokens, ((tokens >= 0) & (table.column("classes") > 0)).float()


class Tally(TorchDispatchMode):
    """Adds up the bytes of what operations make, as long as it lives. A question about values is answered with 1."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}

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


def build(config: ModelConfig, adapters: LoraConfig | None, types: dict[str, torch.dtype], dtype: torch.dtype,
          device: str) -> MultistreamLM:
    """A model of tensors without memory, as training or sampling holds it. Within a FakeTensorMode."""
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
    if config.tied:
        model.text_head.weight = model.embed["text"].weight
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

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations + self.cache


def held(model: nn.Module) -> int:
    tower = [] if getattr(model, "tower", None) is None else [model.tower.body]
    found = {id(t): t.nbytes for m in (model, *tower) for t in (*m.parameters(), *m.buffers())}
    return sum(found.values())


def need_of_training(config: Any, dtype: torch.dtype, device: str, ranks: int = 1) -> Need:
    """What a rank of a TrainConfig holds at the peak of a step."""
    with torch.device("meta"):
        types = held_types(MultistreamLM(config.model), config.lora, config.rates, config.quantize)
    tokens, weights = typical_batch(config.model.table, config.batch_size, config.data.columns)
    places = torch.arange(tokens.shape[2]).expand(len(tokens), -1)
    batch = (tokens, weights, places, torch.zeros_like(places))
    plan = make_plan(config.model, *batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        def shadow(t: Tensor | None) -> Tensor | None:
            return t if t is None else torch.empty(t.shape, dtype=t.dtype, device=device)

        model = build(config.model, config.lora, types, dtype, device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        count, every, weights_held = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters()), held(model)
        plan = replace(plan, order=shadow(plan.order), back=shadow(plan.back), text_rows=[shadow(t) for t in plan.text_rows],
                       audio_rows=shadow(plan.audio_rows), runs=plan.runs and plan.runs.to(device))
        inputs, scale = [shadow(t) for t in batch], torch.ones(len(config.model.table), device=device)
        autocast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()
        with Tally() as tally:
            for _ in range(min(config.accum, 2)):
                with autocast:
                    sums = model(*inputs, plan=plan, scale=scale, z_loss=config.loss.z_loss)
                sums.total.backward()
                del sums
        del fake
    step = max(0, tally.most - 4 * count)                  # the gradients are counted on their own
    if config.dpo is not None:
        step *= 2                                          # both replies of a pair
    shared = ranks if config.shard else 1
    gathered = 0
    if shared > 1:                                         # two blocks are whole at a time, and what is in no block
        blocks = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block)]
        gathered = (every - sum(blocks) + 2 * max(blocks)) * dtype.itemsize
    return Need(every, count, weights_held // shared + gathered, 4 * count // shared, 8 * count // shared,
                4 * count // shared if config.ema else 0, step)


def need_of_sampling(config: ModelConfig, dtype: torch.dtype, device: str, columns: int, batch: int = 1, quantize: str = "") -> Need:
    """What generation holds: weights, the cache of `batch` conversations of `columns` columns, and reading a chunk of a prompt."""
    with torch.device("meta"):
        bare = MultistreamLM(config)
        eight = {f"{path}.weight": torch.int8 for path in quantizable(bare.requires_grad_(False), ())} if quantize else {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = build(config, None, eight, dtype, device).requires_grad_(False).eval()
        every, weights = sum(p.numel() for p in model.parameters()), held(model)
        with Tally() as tally:
            cache = model.cache(batch, columns)
            room = tally.now
            tokens = torch.empty(batch, len(config.table), min(columns, 256), dtype=torch.long, device=device)
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


def changes(config: Any) -> list[tuple[str, Any]]:
    """What makes a run smaller, the cheapest first, one on top of the other."""
    found, now = [], config
    for level in range(int(config.model.checkpoint) + 1, 5):
        now = replace(now, model=replace(now.model, checkpoint=level))
        found.append((f"--model.checkpoint={level}", now))
    if now.lora is not None and not now.quantize:
        now = replace(now, quantize="int8")
        found.append(("--quantize=int8", now))
    batch = now.batch_size
    while batch > 1:
        batch //= 2
        now = replace(now, batch_size=batch, accum=now.accum * 2)
        found.append((f"--batch_size={batch} --accum={now.accum}", now))
    if now.lora is None:
        small = replace(now, lora=LoraConfig(), shard=False)
        found.append(("--lora.rank=16 (adapters instead of all weights)", small))
        found.append(("--lora.rank=16 --quantize=int8", replace(small, quantize="int8")))
    return found


def plan_training(config: Any, dtype: torch.dtype, device: str, ranks: int, card: str) -> list[str]:
    """The lines of `train.py --plan`; with a card also the nearest changes that make it fit."""
    need, room = need_of_training(config, dtype, device, ranks), parse_size(card)
    told = lines(need, ranks, f"{config.batch_size} x {config.data.columns} columns, {str(dtype).removeprefix('torch.')}, "
                              + f"model.checkpoint={int(config.model.checkpoint)}")
    if not room:
        return told
    if need.total <= room:
        return [*told, f"fits {card}: {gib(room - need.total)} are left"]
    told.append(f"does not fit {card}: {gib(need.total - room)} too much")
    done: list[str] = []
    for option, changed in changes(config):
        done = [*(word for word in done if word.split("=")[0] != option.split("=")[0]), option]
        total = need_of_training(changed, dtype, device, ranks).total
        if total <= room:
            return [*told, f"fits with {' '.join(done)}: {gib(total)}"]
    for more in (2, 4, 8, 16, 32, 64) if config.lora is None else ():
        total = need_of_training(replace(config, shard=True), dtype, device, more * ranks).total
        if total <= room:
            return [*told, f"fits with --shard=true on {more * ranks} ranks: {gib(total)} on each"]
    return [*told, "no change that this code knows makes it fit; lower --data.columns or take a smaller model"]


def plan_sampling(config: ModelConfig, dtype: torch.dtype, device: str, columns: int, batch: int, quantize: str, card: str) -> list[str]:
    """The lines of `sample.py --plan`."""
    need, one = (need_of_sampling(config, dtype, device, columns, n, quantize) for n in (batch, 1))
    room = parse_size(card)
    told = lines(need, 1, f"{batch} conversations of {columns} columns, {gib(one.cache)} of cache each")
    if not room:
        return told
    if need.total <= room:
        return [*told, f"fits {card}: {gib(room - need.total)} are left"]
    tries = [("--dtype=bf16", torch.bfloat16, batch, quantize), ("--dtype=bf16 --quantize=int8", torch.bfloat16, batch, "int8"),
             ("--dtype=bf16 --quantize=int8 --batch=1", torch.bfloat16, 1, "int8")]
    for option, kind, n, eight in tries:
        total = need_of_sampling(config, kind, device, columns, n, eight).total
        if total <= room:
            return [*told, f"does not fit {card}; fits with {option}: {gib(total)}"]
    return [*told, f"does not fit {card}, nor does the smallest way: {gib(total)}"]
