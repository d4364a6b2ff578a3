"""Train any family on any number of processes.

    python train.py configs/tiny.py                               one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py configs/tiny_clone.py --lr=1e-4
    python train.py configs/tiny.py                               again: continues where it stopped
    python train.py configs/higgs_ar.py --plan=24GB               what it needs in memory, and what makes it fit

One step: fetch the micro-batches, count their targets over all ranks, forward and backward with one all-reduce (DDP or
FSDP2: training/parallel.py), clip, update. Checkpoints are written between steps, so a resumed run neither repeats nor
skips an example.
This is a script to read from top to bottom; tests run it through its command line.
"""

import system.setup_check  # noqa: F401, first: it says how to set up where torch is missing

import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from audio.wav import load_wav
from checkpoint import Extras, adapter_config, base_of, load, put_adapter, resolve, save
from config import TrainConfig, first_beta, learning_rate
from corpus.index import prompt_facts
from data import Batch, Loader
from families.other_trainers import with_other_trainer
from kernels.choice import slow_dtype
from layers.batch_plan import make_plan
from layers.fusion import remember
from model import Block, Linear, MultistreamLM
from options import difference, exit_on_error, from_json, load_config, read_json, write_json
from system.files import SUMS, lock, unlock
from training import evaluation_samples, monitor, parallel, plan, sweep
from training.curriculum import Curriculum, prepare_all
from training.objective import Contrast, Likelihood, Preference
from training.parallel import all_sum, barrier
from training.run_state import RunState, further_effects, latest, load_run, newest_whole, prune, save_run, swap

exit_on_error()                                  # a ValueError or OSError from here on is one line and exit code 2
if sys.argv[1:2] == ["sweep"]:                   # several runs, each by this script
    sweep.main(sys.argv[2:])
    raise SystemExit
USAGE = "python train.py configs/NAME.py [--key=value ...] [--smoke] [--from=FILE] [--plan[=24GB] [--ranks=8]]"
argv = with_other_trainer(sys.argv[1:])          # --from: the config of another trainer
if any(word.split("=")[0] == "--plan" for word in argv):
    plan.main(argv, USAGE)               # what it needs in memory; nothing is loaded
    raise SystemExit

# ---- 1. config ----
config: TrainConfig = load_config(argv, USAGE, kind="TrainConfig")
out, table = Path(config.out), config.model.table

# ---- 2. runtime: rank, device, precision, seed ----
rank, world, local = parallel.ranks()
device = parallel.start(config.device, local)
kind = device.type
dtype = plan.computed_type(config, kind)
autocast = torch.autocast(kind, dtype) if dtype != torch.float32 else nullcontext()
torch.manual_seed(config.seed)                   # equal initial weights on all ranks; section 5 seeds each rank differently


def log_line(*lines: object) -> None:
    """Print each argument as a line, on rank 0 only."""
    for line in lines if rank == 0 else ():
        tqdm.write(str(line), file=sys.stdout)
        sys.stdout.flush()


if slow := slow_dtype(dtype, kind):
    log_line(slow)

# ---- 3. data ----
if rank == 0:
    lock(out)
    latest(out)                                  # what a kill left in the middle is put right before anybody looks
    prepare_all(config, table)
barrier()
reader = Curriculum(config, table, rank, world)
if config.epochs:
    steps = reader.loader.steps()
    log_line(f"{config.epochs} epochs are {steps} steps" + (f"; --steps={config.steps} ends the run first" if config.steps < steps else ""))
    config = replace(config, steps=min(config.steps, steps))
held_out = Loader(config.data, table, "held-out", config.batch_size, rank, world, pairs=config.dpo is not None)
if config.eval_every and not any(held_out.sources):
    log_line("no validation data: validation loss and ckpt/best are off. Add --data.split=hash --data.held_out=0.05")
for path in config.prompts if table.monologue and table.timing.lead <= 0 else ():
    load_wav(path)                                          # a missing recording is an error now, not at the first evaluation
if rank == 0:
    log_line(*evaluation_samples.check_scorers(config))

# ---- 4. model: weights -> adapters -> precision ----
base = config.init or (base_of(config.init_adapter) if config.init_adapter else "")
if config.lora is not None and not base:         # adapters on random weights: keep those weights beside the run
    base = str(out / "base")
    if rank == 0 and not (out / "base" / ("config.json" if (out / "ckpt/latest").exists() else SUMS)).is_file():
        save(MultistreamLM(config.model), base)
    barrier()


def prepare(model: MultistreamLM) -> dict[str, torch.dtype]:
    """Choose dtypes: frozen weights in the compute dtype or int8, trained ones in fp32. With --shard each rank reads its rows only."""
    adapters = adapter_config(config.init_adapter, model) if config.init_adapter else config.lora
    types = plan.held_types(model, adapters, config.rates, config.quantize)
    if config.shard and base:                    # cut before it has weights, adapters included
        model = model if adapters is None else lora.inject(model, adapters)
        factors.update(lora.rate_factors(model, config.rates))           # what is frozen outside the blocks stays whole
        parallel.shard(model, Block, Linear, device, dtype, config.shard_size)
    return types


factors: dict[str, float] = {}
raw = load(base, device, dtype, config=config.model, prepare=prepare)
torch.manual_seed(config.seed)                   # equal initial adapters, whether the base was initialised now or loaded
if config.init_adapter:                          # its own ranks and targets replace those of config.lora
    put_adapter(raw, config.init_adapter)
    log_line(*(f"adapter {config.init_adapter}: lora.{line}" for line in difference(config.lora, raw.lora)))
elif config.lora is not None:
    lora.inject(raw, config.lora)
if not factors or getattr(raw, "lora", None):    # adapters are trained anew where they were put on again
    factors = lora.rate_factors(raw, config.rates)
if config.model.fusion and config.model.fusion.remember:
    raw.remembered = remember(raw, config.model.fusion.remember)
raw.train()
if config.compile:
    for block in raw.temporal.layers:
        block.compile()
if config.shard:
    parallel.shard(raw, Block, Linear, device, dtype, config.shard_size)
trained = {n: p for n, p in raw.named_parameters() if p.requires_grad}
ema = {n: p.detach().clone() for n, p in trained.items()} if config.ema else {}

# ---- 5. optimizer ----
groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}      # by (learning rate factor, is a matrix); vectors do not decay
for n, p in trained.items():
    groups.setdefault((factors[n], p.dim() >= 2), []).append(p)
optimizer = torch.optim.AdamW([{"params": ps, "factor": factor, "weight_decay": config.weight_decay * matrices}
                               for (factor, matrices), ps in groups.items()], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
torch.manual_seed(config.seed + 1 + rank)        # dropout differs between ranks

# ---- 6. resume ----
run = RunState()
previous = parallel.decided(lambda: newest_whole(out, log_line) if config.resume in ("auto", "never") else resolve(config.resume))
if previous.exists():
    if config.resume == "never":
        raise ValueError(f"{out} already holds a run; continue it with --resume=auto or choose another --out")
    run, averaged = load_run(previous, raw, optimizer, rank)
    ema = {n: parallel.place(t.read().clone(), trained[n]) for n, t in averaged.items()} if config.ema and averaged else ema
    log_line(*reader.restore(run.step, run.loader))
    if run.scaler:
        scaler.load_state_dict(run.scaler)
    before = from_json(TrainConfig, read_json(previous / "state" / "run.json")["config"])
    run.best = run.best if before.best == config.best else math.inf
    log_line(f"resuming {previous} at step {run.step}", *("  " + line for line in difference(before, config)))
if rank == 0:
    write_json(out / "config.json", config)
    prune(out, config.keep)
data_facts = prompt_facts(config.data, table)
origin = getattr(raw, "extras", Extras()).folder      # what stands around its weights goes along
extras = Extras(0, data_facts, "base" if base == str(out / "base") else base if config.lora is not None else "", origin)
net = parallel.wrap(raw, device)
goal = Preference(raw, config.dpo) if config.dpo else (Contrast if config.loss.contrastive else Likelihood)(table, config.loss)


def forward(module: torch.nn.Module, batch: Batch, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch (scaled, if `scale` is given), and its sums for the reported metrics."""
    tensors = (batch.tokens, batch.weights, batch.positions, batch.segments, batch.speakers)
    counts = make_plan(config.model, *tensors[:4]).to(device)              # computed on the CPU, which avoids device syncs
    with autocast:
        return goal.sums(module, [t.to(device, non_blocking=True) for t in tensors], counts, scale)


# ---- 7. evaluate, sample, save ----
@torch.no_grad()
def evaluate() -> dict[str, float]:
    """Validation metrics over all ranks, and on rank 0 those of generated samples (config.prompts, config.listen)."""
    raw.eval()
    swap(trained, ema)
    total, spoken = goal.zero(), {}
    with parallel.gathered(raw):
        for n, batch in enumerate(held_out):
            if config.eval_batches and n >= config.eval_batches:
                break
            total += forward(raw, batch)[1].cpu()
        if (config.prompts or config.listen) and rank == 0:
            with autocast:
                spoken = evaluation_samples.speak_samples(raw, config, held_out.index, out / "samples" / f"step_{run.step:06d}")
            log_line(f"step {run.step}: {evaluation_samples.summary_line(spoken)}")
    swap(trained, ema)
    raw.train()
    return (goal.report(all_sum(total, device)) if any(held_out.sources) else {}) | spoken


def checkpoint(best: bool = False) -> None:
    run.scaler, extras.step = scaler.state_dict(), run.step
    log.sync()
    save_run(out, raw, optimizer, run, config, extras, ema, rank,
             lambda folder: further_effects(out, folder, best, config.keep, config.consolidated, dtype))
    if rank == 0:
        prune(out, config.keep)
    saved["step"] = run.step


# ---- 8. when to stop ----
def over() -> bool:
    return run.step >= config.steps or 0 < config.patience <= run.bad_evals


# ---- 9. the loop ----
stop, saved = {"why": ""}, {"step": run.step if previous.exists() and config.resume == "auto" else -1}
for name in ("SIGTERM", "SIGINT"):
    signal.signal(getattr(signal, name), lambda *_, name=name: stop.update(why=name))
log = monitor.Log(out, config.trackers, run.step, run.evaluated) if rank == 0 else monitor.Log()
log_line(monitor.memory(raw))
began, began_at, meter = time.time(), run.step, monitor.Meter(table, reader.loader.index.info["frame_rate"], world, run.step)
bar = tqdm(total=config.steps, initial=run.step, unit="step", disable=rank > 0 or not sys.stderr.isatty())
while True:
    # (a) evaluate and save before a step; the last pass does only this. Step times do not include it
    paused = time.perf_counter()
    due = config.eval_every and run.step and run.step % config.eval_every == 0
    if run.skips and over() and not scaler.is_enabled():
        raise ValueError(f"the last {run.skips} steps had a non-finite gradient: nothing is saved, {out}/ckpt/latest stays; lower --lr")
    if (due or over()) and run.evaluated != run.step:
        numbers = evaluate()
        log(run.step, {f"val/{k}": v for k, v in numbers.items()})
        shown = [f"{k} {numbers[k]:.3f}" for k in ("loss", "text_loss", "audio_loss", "reward_margin", "reward_accuracy") if k in numbers]
        log_line(*([f"step {run.step}: held-out " + ", ".join(shown)] if shown else []))
        score = float(all_sum(torch.tensor([evaluation_samples.badness(numbers, config.best) if rank == 0 else 0.0],
                                           dtype=torch.float64), device))
        better, run.evaluated = score < run.best, run.step
        if not math.isfinite(numbers.get("loss", 0.0)):
            raise ValueError(f"step {run.step}: held-out loss {numbers['loss']}; nothing is saved, {out}/ckpt/latest stays; lower --lr")
        if math.isfinite(score):
            run.best, run.bad_evals = min(run.best, score), 0 if better else run.bad_evals + 1
        checkpoint(best=better)
    elif config.save_every and run.step and run.step % config.save_every == 0 and saved["step"] != run.step and not run.skips:
        checkpoint()
    if over():
        break
    meter.began += time.perf_counter() - paused

    # (b) the step's micro-batches and how many targets they hold on all ranks; a request to stop is summed with them
    log_line(*reader.enter(run.step))
    step_batches = reader.take(config.accum)
    late = config.max_minutes and time.time() - began > 60 * config.max_minutes
    wish = torch.tensor([float(bool(stop["why"] or late))], dtype=torch.float64)
    counts = all_sum(torch.cat([sum(goal.count(b.weights, b.segments, b.tokens, b.speakers) for b in step_batches), wish]), device)
    if counts[-1] > 0:
        if saved["step"] != run.step:
            checkpoint()                         # run.loader is still the position before these micro-batches
        log_line(f"stopped by {stop['why'] or '--max_minutes'} before step {run.step}; the same command continues")
        break
    run.loader = reader.position
    scale = scaler.scale(goal.scale(counts[:-1], reader.loss).float().to(device)) * world

    # (c) forward and backward; gradients are averaged over ranks, so x world makes it a sum
    total = goal.zero().to(device)
    for n, batch in enumerate(step_batches):
        parallel.last_of_step(net, n == config.accum - 1)
        loss, found = forward(net, batch, scale)
        loss.backward()
        total += found
        meter.add(batch.tokens)

    # (d) clip and update, or skip a step whose gradient is not finite
    reader.spare(trained)
    scaler.unscale_(optimizer)
    norm = float(parallel.whole(torch.nn.utils.clip_grad_norm_(trained.values(), config.clip or math.inf)))
    rate = learning_rate(run.step - run.skipped, config)
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = rate * group["factor"], (first_beta(run.step, config), config.betas[1])
    if math.isfinite(norm):
        scaler.step(optimizer)
        run.skips = 0
        for n, p in trained.items() if ema else ():
            ema[n].lerp_(p.detach(), 1 - config.ema)
    else:
        run.skips, run.skipped = run.skips + 1, run.skipped + 1
        scaled = f", loss scale {scaler.get_scale():g} halves" if scaler.is_enabled() else ""      # fp16 finds its scale this way
        read = [n for b in step_batches for row in b.names for n in row]
        log_line(f"step {run.step}: gradient is {norm}, step skipped{scaled}; it read {read}")
        if run.skips >= config.max_skips:
            raise ValueError(f"{run.skips} steps in a row had a non-finite gradient; lower --lr, use --dtype=fp32, or check these rows")
    scaler.update()
    optimizer.zero_grad(set_to_none=True)

    # (e) log
    if run.step % config.log_every == 0 or run.step == config.steps - 1:
        numbers = goal.report(all_sum(total, device))
        if run.step == 0 and config.init:
            log_line(*monitor.check_first_loss(numbers, table, config.init))
        speeds = meter.read(run.step)
        log(run.step, {f"train/{k}": v for k, v in numbers.items()} | {"grad_norm": norm, "lr": rate} | speeds)
        bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {monitor.pace(speeds)}")
        if bar.disable:
            log_line(f"step {run.step}: loss {numbers['loss']:.4f}, gradient norm {norm:.2f}, lr {rate:.2e}, {monitor.pace(speeds)}")
    run.step += 1
    bar.update()

# ---- 10. summary ----
bar.close()
peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if kind == "cuda" else ""
if began_at >= config.steps and not stop["why"]:
    log_line(f"{out} has already run its {run.step} steps; raise --steps to continue (checkpoint: {out}/ckpt/latest)")
else:
    log_line(f"finished in {time.time() - began:.0f} s{peak}; checkpoint: {out}/ckpt/latest, metrics: {out}/metrics.jsonl")
unlock(out)
parallel.end()
