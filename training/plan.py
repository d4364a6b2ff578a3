"""What a run needs in memory, before anything is loaded: `train.py configs/X.py --plan`, `--plan=24GB`, `--plan --ranks=8`; and
what of all recipes runs on which card: `train.py --plan=table`, whose output is in BENCHMARKS.md.

    weights       what is frozen in the compute type or in 8 bits, what is trained in fp32, shared out among the ranks of --shard
    gradients     4 bytes a trained parameter, AdamW 8, averaged weights 4
    activations   counted: one step of the real code runs on tensors without memory (FakeTensorMode), on a batch without padding

How it is counted, and what is not in it: generation/plan.py, whose parts this uses.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import DTYPES
from generation.plan import GIB, Need, Tally, build, gib, held, lines, parse_size, shapes_only, typical_batch
from kernels.choice import has_bf16
from layers.batch_plan import make_plan
from layers.int8_base import quantizable
from lora import LoraConfig, rate_factors, trained_parameters, within
from model import Block, MultistreamLM
from options import CONFIGS, load_config, run_config

CARDS = (16, 24, 48, 80)        # GB
RANKS = (1, 2, 4, 8, 16, 32, 64)


def held_types(model: nn.Module, config: LoraConfig | None, rates: Sequence[tuple[str, float]], quantize: str) -> dict[str, torch.dtype]:
    """How training holds the parameters that are not of its compute type: what is trained in fp32, frozen Linears in int8."""
    chosen = trained_parameters(model, config) if config else {n: p for n, p in model.named_parameters() if p.requires_grad}
    trained = [name for name in chosen if next((factor for pattern, factor in rates if within(name, pattern)), 1.0)]
    eight = {f"{path}.weight": torch.int8 for path in quantizable(model, trained)} if quantize else {}
    return dict.fromkeys(trained, torch.float32) | eight


def need_of_training(config: Any, dtype: torch.dtype, device: str, ranks: int = 1) -> Need:
    """What a rank of a TrainConfig holds at the peak of a step."""
    config = deepcopy(config)                              # stream tables remember tensors
    with torch.device("meta"):
        types = held_types(MultistreamLM(config.model), config.lora, config.rates, config.quantize)
    tokens, weights = typical_batch(config.model.table, config.batch_size, config.data.columns)
    places = torch.arange(tokens.shape[2]).expand(len(tokens), -1)
    segments = None if config.model.fusion else torch.zeros_like(places)       # a text tower finds its words in the values of a batch
    batch = (tokens, weights, places, segments)
    plan = make_plan(config.model, *batch)
    with shapes_only():
        def shadow(t: Tensor | None) -> Tensor | None:
            return t if t is None else torch.empty(t.shape, dtype=t.dtype, device=device)

        model = build(config.model, config.lora, types, dtype, device).train()
        rate_factors(model, config.rates)                  # freezes those whose rate is 0
        trained = [p for p in model.parameters() if p.requires_grad]
        count, every, weights_held = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters()), held(model)
        plan = replace(plan, order=shadow(plan.order), back=shadow(plan.back), text_rows=[shadow(t) for t in plan.text_rows],
                       audio_rows=shadow(plan.audio_rows), runs=plan.runs and plan.runs.to(device))
        inputs, scale = [shadow(t) for t in batch], torch.ones(len(config.model.table), device=device)
        autocast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()
        with Tally(model) as tally:
            for _ in range(min(config.accum, 2)):
                with autocast:
                    sums = model(*inputs, plan=plan, scale=scale, z_loss=config.loss.z_loss)
                sums.total.backward()
                del sums
    step = max(0, tally.most - 4 * count)                  # the gradients are counted on their own
    if config.dpo is not None:
        step *= 2                                          # both replies of a pair
    # of shards, two blocks are whole at a time, and what is in no block: gathered where it trains, never cut where it is frozen (a tower)
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    inside = {p for m in blocks for p in m.parameters()}
    copied = sum(p.numel() for p in trained if p not in inside) * dtype.itemsize
    block = max(sum(p.numel() * min(p.itemsize, dtype.itemsize) for p in m.parameters()) for m in blocks)
    need = Need(every, count, weights_held, 4 * count, 8 * count, 4 * count if config.ema else 0, step,
                uncut=weights_held - sum(p.nbytes for p in inside.union(trained)), gathered=copied + 2 * block, copied=copied)
    return need.shared(ranks if config.shard else 1)


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
        small = replace(now, lora=LoraConfig(targets=("temporal.*",)), shard=False, rates=())
        option = "--lora.rank=16 --lora.targets=temporal.*" + " --rates=()" * bool(now.rates)
        found += [(f"{option} (adapters instead of all weights)", small), (f"{option} --quantize=int8", replace(small, quantize="int8"))]
    return found


def plan_training(config: Any, dtype: torch.dtype, device: str, ranks: int, card: str) -> list[str]:
    """The lines of `train.py --plan`; with a card also the nearest changes that make it fit."""
    need, room = need_of_training(config, dtype, device, ranks), parse_size(card)
    report = lines(need, ranks, f"{config.batch_size} x {config.data.columns} columns, {str(dtype).removeprefix('torch.')}, "
                              + f"model.checkpoint={int(config.model.checkpoint)}")
    if not room:
        return report
    if need.total <= room:
        return [*report, f"fits {card}: {gib(room - need.total)} are left"]
    report.append(f"does not fit {card}: {gib(need.total - room)} too much")
    done: list[str] = []
    for option, changed in changes(config):
        done = [*(word for word in done if word.split("=")[0] != option.split("=")[0]), option]
        total = need_of_training(changed, dtype, device, ranks).total
        if total <= room:
            return [*report, f"fits with {' '.join(done)}: {gib(total)}"]
    whole = need_of_training(replace(config, shard=False), dtype, device) if config.lora is None else None
    for more in (2, 4, 8, 16, 32, 64) if whole else ():
        total = whole.shared(more * ranks).total
        if total <= room:
            return [*report, f"fits with --shard=true on {more * ranks} ranks: {gib(total)} on each"]
    return [*report, "no change that this code knows makes it fit; lower --data.columns or take a smaller model"]


# ---- the table of all recipes: train.py --plan=table ----

def recipes() -> list[Path]:
    """A config for each released model that configs/ trains: the one with adapters, or else its own."""
    found = [(path, run_config(path)) for path in sorted(CONFIGS.glob("*.py"))]
    found = [(path, c) for path, c in found if getattr(c, "init", "") and not c.dpo]
    found.sort(key=lambda one: one[1].lora is None)
    return [path for n, (path, c) in enumerate(found) if all(c.model != other.model for _, other in found[:n])]


def table_row(path: Path) -> str:
    """What one recipe needs with a row a step and everything recomputed, and what of it runs on each card."""
    config = run_config(path)
    config = replace(config, model=replace(config.model, checkpoint=4), batch_size=1, accum=1, shard=False)
    name, small = ("LoRA", replace(config, quantize="int8")) if config.lora else ("the recipe", config)
    ways = config, small, replace(small, lora=None, quantize="", rates=())
    own, eight, every = (need_of_training(way, torch.bfloat16, "cpu") for way in ways)

    def on_ranks(need: Need, card: int) -> str:
        ranks = next((n for n in RANKS if need.shared(n).total <= card * 10**9), 0)
        return "" if ranks == 1 else f" on {ranks} cards" if ranks else " on more cards"

    def runs(card: int) -> str:
        first = f"{name}, int8 base" if eight.total <= card * 10**9 < own.total else name + on_ranks(own, card)
        return f"{first}; full{on_ranks(every, card)}"

    sizes = " | ".join(f"{need.total / GIB:.1f}" for need in (own, eight, every))
    return f"| {path.stem}, {config.data.columns} columns | {every.parameters / 1e9:.2f} | {sizes} | {' | '.join(map(runs, CARDS))} |"


def table(paths: Sequence[Path]) -> list[str]:
    """What runs on which card, as a table in Markdown."""
    head = ["configs/", "10^9 parameters", "LoRA or recipe, GiB", "int8 base, GiB", "full, GiB", *(f"{card} GB" for card in CARDS)]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(table_row, paths)]


def computed_type(config: Any, kind: str) -> torch.dtype:
    """The compute type of a run on a kind of device."""
    return DTYPES[config.dtype if config.dtype != "auto" else "bf16" if has_bf16(kind) else "fp32"]


def main(words: list[str], usage: str) -> None:
    """`train.py configs/X.py --plan[=CARD] [--ranks=N]`, for a card "auto" means bf16; `train.py --plan=table` for all recipes."""
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in ("--plan", "--ranks")}
    if own["--plan"] == "table":
        if words != ["--plan=table"]:
            raise ValueError(f"--plan=table is a table of all recipes and takes no other word, not {' '.join(words)}; see --plan=24GB")
        return print(*table(recipes()), sep="\n")
    config = load_config([word for word in words if word.partition("=")[0] not in own], usage, kind="TrainConfig")
    kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not own.get("--ranks", "1").isdecimal() or own.get("--ranks") == "0":
        raise ValueError(f"--ranks={own['--ranks']} is no number of processes; write --ranks=8")
    dtype = torch.bfloat16 if own["--plan"] and config.dtype == "auto" else computed_type(config, kind)
    print(*plan_training(config, dtype, kind, int(own.get("--ranks", 1)), own["--plan"]), sep="\n")
