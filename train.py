"""Train any family on any number of processes.

    python train.py configs/tiny.py                               one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py configs/higgs_ar.py --lr=1e-5
    python train.py configs/tiny.py                               again: continues where it stopped

One step: fetch the micro-batches, count their targets over all ranks, forward and backward with one all-reduce,
clip, update. Checkpoints are written before a step, so a run that is killed anywhere repeats nothing and skips nothing.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import lora
from audio import load_codec
from audio.wav import save_wav
from checkpoint import DTYPES, Extras, RunState, fill_adapter, load, load_run, point, prune, resolve, save, save_run
from config import TrainConfig, learning_rate
from data import Loader, prepare
from loss import loss_scale, report
from model import MultistreamLM
from options import difference, exit_on_error, from_json, load_config, read_json, write_json
from sample import SampleConfig, speak

exit_on_error()                                                # from here a ValueError or OSError is one line and exit code 2

# ---- 1. config ----
config: TrainConfig = load_config(sys.argv[1:], "python train.py configs/NAME.py [--key=value ...] [--smoke]")
out = Path(config.out)

# ---- 2. runtime: rank, device, precision, seed ----
distributed = "RANK" in os.environ
rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
if kind == "cuda" and not torch.cuda.is_available():
    raise ValueError("--device=cuda: this machine shows no CUDA device; use --device=cpu, or check its driver and CUDA_VISIBLE_DEVICES")
device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
if kind == "cuda":
    torch.cuda.set_device(device)
if distributed:
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=30))
dtype = DTYPES["bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"] if config.dtype == "auto" else DTYPES[config.dtype]
autocast = torch.autocast(kind, dtype) if dtype != torch.float32 else nullcontext()
torch.manual_seed(config.seed)                                 # equal weights everywhere; the ranks part ways in section 5


def barrier() -> None:
    if distributed:
        dist.barrier()


def all_sum(x: torch.Tensor) -> torch.Tensor:
    x = x.to(device)                                           # NCCL reduces what lies on the GPU
    if distributed:
        dist.all_reduce(x)
    return x.cpu()


def say(*words: object) -> None:
    if rank == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


# ---- 3. data ----
table = config.model.table
if rank == 0:
    prepare(config.data, table)
barrier()
loader = Loader(config.data, table, "train", config.batch_size, rank, world, config.accum)
held_out = Loader(config.data, table, "held-out", config.batch_size, rank, world)

# ---- 4. model: weights -> adapters -> precision ----
model = load(config.init, config=config.model).train() if config.init else MultistreamLM(config.model)
base = config.init
if config.lora is not None:
    if not base:                                               # adapters on random weights: keep the weights beside the run
        base = "base"
        if rank == 0 and not (out / base / "config.json").is_file():
            save(model, out / base)
        barrier()
        model = load(out / base, config=config.model)
    lora.inject(model, config.lora)
    if config.init_adapter:
        folder = resolve(config.init_adapter)
        fill_adapter(model, folder, read_json(folder / "config.json"))
model.to(device)
for p in model.parameters():                                   # what is trained has fp32 masters, what is frozen has none
    p.data = p.data.float() if p.requires_grad else p.data.to(dtype)
if config.compile:
    for block in model.temporal.layers:
        block.compile()
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
ema = {n: p.detach().clone() for n, p in trained.items()} if config.ema else None

# ---- 5. optimizer ----
matrices = [p for p in trained.values() if p.dim() >= 2]
vectors = [p for p in trained.values() if p.dim() < 2]
optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                              lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
torch.manual_seed(config.seed + 1 + rank)                      # dropout differs between ranks

# ---- 6. resume ----
run = RunState()
previous = out / "ckpt" / "latest" if config.resume in ("auto", "never") else resolve(config.resume)
if os.path.lexists(previous):
    if config.resume == "never":
        raise ValueError(f"{out} already holds a run; continue it with --resume=auto or choose another --out")
    run, averaged = load_run(previous, model, optimizer, rank)
    if ema is not None and averaged is not None:
        ema = {n: t.to(device) for n, t in averaged.items()}
    if run.loader:
        loader.restore(run.loader)
    if run.scaler:
        scaler.load_state_dict(run.scaler)
    before = read_json(previous / "state" / "run.json")["config"]
    say(f"resuming {previous} at step {run.step}", *difference(from_json(TrainConfig, before), config))
if rank == 0:
    write_json(out / "config.json", config)
extras = Extras(0, {k: getattr(config.data, k) for k in ("codec", "tokenizer", "normaliser")}, base if config.lora is not None else "")
raw = model
model = DDP(raw, device_ids=[local] if kind == "cuda" else None, gradient_as_bucket_view=True) if distributed else raw


# ---- 7. evaluate, sample, save ----
def swapped(on: bool) -> None:
    """Trade the trained weights for their averages, and back."""
    for n, p in trained.items() if ema is not None else ():
        p.data, ema[n] = ema[n], p.data


@torch.no_grad()
def evaluate() -> dict[str, float]:
    """Held-out numbers, weighted by targets over all ranks."""
    raw.eval()
    swapped(True)
    total = torch.zeros(4, len(table), dtype=torch.float64)
    for n, batch in enumerate(held_out):
        if config.eval_batches and n >= config.eval_batches:
            break
        with autocast:
            total += forward(raw, batch).stacked().cpu()
    if config.prompts and rank == 0 and table.audio_out:
        listen()
    swapped(False)
    raw.train()
    return report(all_sum(total), table, config.loss)


def listen() -> None:
    """Speak the prompts into out/samples/step_N."""
    codec = load_codec(config.data.codec)
    for text, speech in zip(config.prompts, speak(raw, config.prompts, config.data, SampleConfig(max_frames=250), codec), strict=True):
        save_wav(out / "samples" / f"step_{run.step:06d}" / f"{text.replace(' ', '_')[:60]}.wav", speech.wav, codec.sample_rate)


def forward(net: torch.nn.Module, batch: object) -> object:
    return net(*(t.to(device, non_blocking=True) for t in (batch.tokens, batch.weights, batch.positions, batch.segments)))


def checkpoint(best: bool = False) -> None:
    run.scaler, extras.step = scaler.state_dict(), run.step
    folder = save_run(out, raw, optimizer, run, config, extras, ema, rank, barrier)
    if rank == 0:
        if best:
            point(out / "ckpt" / "best", folder.name)
        prune(out, config.keep)


# ---- 8. log ----
def start_trackers() -> list:
    """One `write(numbers, step)` function a tracker; metrics.jsonl is always there."""
    if rank:
        return []
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < run.step]     # what a killed run wrote after
    path.write_text("".join(line + "\n" for line in kept))                                            # its last checkpoint is repeated
    file = path.open("a")
    writers = [lambda numbers, step: print(json.dumps({"step": step, **numbers}), file=file, flush=True)]
    for tracker in config.trackers:
        try:
            if tracker == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                board = SummaryWriter(str(out / "tb"))
                writers.append(lambda numbers, step, board=board: [board.add_scalar(k, v, step) for k, v in numbers.items()])
            else:
                module = __import__(tracker)
                session = module.init(project=os.environ.get(f"{tracker.upper()}_PROJECT", "multistream"), name=out.name)
                writers.append(lambda numbers, step, session=session: session.log({**numbers, "step": step}))
        except ImportError:
            raise ValueError(f"tracker {tracker} is not installed; run pip install -e '.[log]' (wandb and trackio: pip install {tracker})") from None
    return writers


def log(step: int, numbers: dict[str, float]) -> None:
    for write in trackers:
        write(numbers, step)


def memory() -> str:
    """What the run will hold before activations."""
    size = {n: sum(p.numel() * p.element_size() for p in ps) / 2**20 for n, ps in (("weights", raw.parameters()), ("trained", trained.values()))}
    return (f"{sum(p.numel() for p in raw.parameters()):,} parameters, {sum(p.numel() for p in trained.values()):,} trained; "
            f"memory: weights {size['weights']:.0f} MiB, gradients {size['trained']:.0f} MiB, AdamW {2 * size['trained']:.0f} MiB")


def alarm(numbers: dict[str, float]) -> None:
    """A pretrained model that starts near the loss of a guess does not fit its data, its layout or its code."""
    for kind, rows in (("text", table.text_out), ("audio", table.audio_out)):
        guess = math.log(table.streams[rows[0]].classes) if rows else math.inf
        if numbers.get(f"{kind}_loss", 0.0) > 0.9 * guess:
            say(f"warning: {config.init} starts with {kind} loss {numbers[f'{kind}_loss']:.2f}, a guess has {guess:.2f}; check codec, tokenizer and layout")


# ---- 9. the loop ----
stop = {"why": ""}
for name in ("SIGTERM", "SIGINT"):
    signal.signal(getattr(signal, name), lambda *_, name=name: stop.update(why=name))
trackers = start_trackers()
say(memory())
raw.train()
batches = iter(loader)
began, ticked, frames = time.time(), time.time(), 0
bar = tqdm(total=config.steps, initial=run.step, unit="step", disable=rank > 0 or not sys.stderr.isatty())
while True:
    # (a) evaluate and save before a step; the last pass does only this
    last = run.step >= config.steps or run.finished
    if (last and not run.finished) or (config.eval_every and run.step % config.eval_every == 0 and run.step > 0 and not last):
        numbers = evaluate()
        log(run.step, {f"val/{k}": v for k, v in numbers.items()})
        say(f"step {run.step}: " + ", ".join(f"held-out {k} {v:.3f}" for k, v in numbers.items() if k in ("loss", "text_loss", "audio_loss")))
        better = numbers["loss"] < run.best
        run.best, run.bad_evals = min(run.best, numbers["loss"]), 0 if better else run.bad_evals + 1
        run.finished = last or bool(config.patience and run.bad_evals >= config.patience)
        checkpoint(best=better)
        last = run.finished
    elif config.save_every and run.step % config.save_every == 0 and run.step > 0 and not last:
        checkpoint()
    if last:
        break

    # (b) the step's micro-batches and how many targets they hold, over all ranks; who wants to stop rides along
    step_batches = [next(batches) for _ in range(config.accum)]
    late = bool(config.max_minutes and time.time() - began > 60 * config.max_minutes)
    counts = torch.stack([b.weights[..., 1:].sum((0, 2)).double() for b in step_batches]).sum(0)
    counts = all_sum(torch.cat([counts, torch.tensor([float(bool(stop["why"]) or late)], dtype=torch.float64)]))
    if counts[-1] > 0:
        checkpoint()                                           # run.loader still stands before these micro-batches
        say(f"stopped by {stop['why'] or '--max_minutes'} before step {run.step}; the same command continues")
        break
    run.loader = step_batches[-1].state
    scale = loss_scale(counts[:-1], table, config.loss).float().to(device)

    # (c) forward and backward; DDP averages over ranks, so x world makes it a sum
    total = torch.zeros(4, len(table), dtype=torch.float64)
    for n, batch in enumerate(step_batches):
        if distributed:
            model.require_backward_grad_sync = n == config.accum - 1
        with autocast:
            sums = forward(model, batch)
        scaler.scale((scale * sums.nll).sum() * world).backward()
        total += sums.stacked().cpu()
        frames += int((batch.segments >= 0).sum())

    # (d) clip and update, or skip a step whose gradient is not finite
    scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(trained.values(), config.clip or math.inf))
    rate = learning_rate(run.step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    if math.isfinite(norm):
        scaler.step(optimizer)
        run.skips = 0
        for n, p in trained.items() if ema is not None else ():
            ema[n].lerp_(p.detach(), 1 - config.ema)
    else:
        run.skips += 1
        say(f"step {run.step}: gradient is {norm}, step skipped; it read", [name for b in step_batches for row in b.names for name in row])
        if run.skips >= config.max_skips:
            raise ValueError(f"{run.skips} steps in a row had a non-finite gradient; lower --lr, use --dtype=fp32, or remove the rows named above")
    scaler.update()
    optimizer.zero_grad(set_to_none=True)

    # (e) log
    if run.step % config.log_every == 0 or run.step == config.steps - 1:
        numbers = report(all_sum(total), table, config.loss)
        if run.step == 0 and config.init:
            alarm(numbers)
        seconds, ticked = time.time() - ticked, time.time()
        log(run.step, {**{f"train/{k}": v for k, v in numbers.items()}, "grad_norm": norm, "lr": rate, "columns_per_second": frames * world / seconds})
        frames = 0
        bar.set_postfix_str(f"loss {numbers['loss']:.3f} lr {rate:.1e} norm {norm:.2f}")
        if bar.disable:
            say(f"step {run.step}: loss {numbers['loss']:.4f}, gradient norm {norm:.2f}, lr {rate:.2e}")
    run.step += 1
    bar.update()

# ---- 10. last words ----
bar.close()
peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if kind == "cuda" else ""
say(f"{time.time() - began:.0f} s{peak}; checkpoint {out}/ckpt/latest, numbers {out}/metrics.jsonl")
if distributed:
    dist.destroy_process_group()
