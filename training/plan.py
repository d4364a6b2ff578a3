"""What a run needs in memory, before anything is loaded: `train.py configs/X.py --plan`, `--plan=24GB`, `--plan --ranks=8`.

    weights       what is frozen in the compute type or in 8 bits, what is trained in fp32, shared out among the ranks of --shard
    gradients     4 bytes a trained parameter, AdamW 8, averaged weights 4
    activations   counted: one step of the real code runs on tensors without memory (FakeTensorMode), on a batch without padding

How it is counted, and what is not in it: generation/plan.py, whose parts this uses.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import DTYPES
from generation.plan import Need, Tally, build, gib, held, lines, parse_size, shapes_only, typical_batch
from kernels.choice import has_bf16
from layers.batch_plan import make_plan
from layers.int8_base import quantizable
from lora import LoraConfig, trained_parameters, within
from model import Block, MultistreamLM
from options import load_config


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
        small, option = replace(now, lora=LoraConfig(targets=("temporal.*",)), shard=False), "--lora.rank=16 --lora.targets=temporal.*"
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
    for more in (2, 4, 8, 16, 32, 64) if config.lora is None else ():
        total = need_of_training(replace(config, shard=True), dtype, device, more * ranks).total
        if total <= room:
            return [*report, f"fits with --shard=true on {more * ranks} ranks: {gib(total)} on each"]
    return [*report, "no change that this code knows makes it fit; lower --data.columns or take a smaller model"]


def computed_type(config: Any, kind: str) -> torch.dtype:
    """The compute type of a run on a kind of device."""
    return DTYPES[config.dtype if config.dtype != "auto" else "bf16" if has_bf16(kind) else "fp32"]


def main(words: list[str], usage: str) -> None:
    """`train.py configs/X.py --plan[=CARD] [--ranks=N]`; for a card "auto" means bf16."""
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in ("--plan", "--ranks")}
    config = load_config([word for word in words if word.partition("=")[0] not in own], usage, kind="TrainConfig")
    kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not own.get("--ranks", "1").isdecimal() or own.get("--ranks") == "0":
        raise ValueError(f"--ranks={own['--ranks']} is no number of processes; write --ranks=8")
    dtype = torch.bfloat16 if own["--plan"] and config.dtype == "auto" else computed_type(config, kind)
    print(*plan_training(config, dtype, kind, int(own.get("--ranks", 1)), own["--plan"]), sep="\n")
