"""Full size, without anybody's weights: random checkpoints in the official sharded layout, and everything that is done with them.

    python tests/big.py                                               Qwen2.5-1.5B and Higgs v2 3B in out/big: `make big`
    python tests/big.py --models=higgs --steps=lora8 --dtype=fp32     a training step in fp32 on a base of 8 bits
    python tests/big.py --models=qwen --steps=shards                  two ranks of --shard, what each holds
    python tests/big.py --models=higgs --layers=7 --steps=time        a quarter of the layers: load against transformers

Each step is a process of its own, and says its peak of memory beside the bytes of the weights: load, a training step of LoRA (on
the base as it is, then on one of 8 bits), 20 columns sampled, merge, export. On a CPU without bf16 in hardware, where such a step
takes hours, training computes in fp32, on the base as it is only where that fits the memory. `shards`: that step by two processes
(gloo), each with half of the base, beside what its libraries take, and the most that a rank should need: weights / 2 + the
largest tensor + what is trained. `time`: load a model, here and by transformers, alternating with warm files, with one thread and
with two, until every weight has been read: our load does so itself (it looks for NaN), theirs maps the file, so that each of its
weights is summed up; and once more, both sides summed up. Where transformers is not installed it says so. The folder of a model
stays in --folder, remove it when done. Linux only: it tells how much a process had.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import DTYPES, SHARD, STORED, Extras, export, load, save
from families.family import choose_format, export_model
from families.higgs import HIGGS_V2_3B
from families.qwen import QWEN2_5_1_5B, qwen
from families.tensor_files import computed, write_shards
from generation.decode_step import SampleConfig
from generation.plan import typical_batch
from kernels.choice import has_bf16
from layers.architecture import ModelConfig
from layers.int8_base import quantize
from lora import LoraConfig, inject
from model import Block, Linear, MultistreamLM
from options import apply, edge, split_arguments, write_json
from sample import generate
from streams import is_audio
from training import parallel
from training.plan import held_types

MODELS = {"qwen": replace(QWEN2_5_1_5B, checkpoint=4), "higgs": replace(HIGGS_V2_3B, checkpoint=4)}
STEPS = ("load", "time", "lora", "lora8", "shards", "sample", "sample8", "merge", "export")
CLASSES = {"qwen": "Qwen2ForCausalLM", "higgs": "HiggsAudioV2ForConditionalGeneration"}       # of transformers; Auto classes import late
TRIES = 5                          # of each side of `time`
ROOT = Path(__file__).parents[1]
SMALL = qwen(1, 64, 64, 1, 1, generation=2, vocab=8000)            # with it the libraries of a rank wake up before its memory counts


@dataclass(frozen=True)
class Job:
    """What is made and measured."""

    models: tuple[str, ...] = ("qwen", "higgs")
    steps: tuple[str, ...] = STEPS
    folder: str = "out/big"    # needs about three times the weights
    columns: int = 256         # of the training step
    layers: int = 0            # of the transformer, 0 = all
    dtype: str = "bf16" if has_bf16("cpu") else "fp32"      # that lora, lora8 and shards compute in

    def __post_init__(self) -> None:
        assert set(self.models) <= MODELS.keys(), f"models are {', '.join(MODELS)}"
        assert set(self.steps) <= set(STEPS), f"steps are {', '.join(STEPS)}"

    def model(self, name: str) -> ModelConfig:
        config = MODELS[name]
        layers = self.layers or config.temporal.layers
        return replace(config, temporal=replace(config.temporal, layers=layers), dual_ffn=tuple(n for n in config.dual_ffn if n < layers))

    def folder_of(self, name: str) -> Path:
        return Path(self.folder) / (f"{name}-{self.layers}" if self.layers else name)


def make(config: ModelConfig, folder: Path) -> None:
    """Random weights in bf16 in the layout of transformers, a tensor at a time."""
    with torch.device("meta"):
        weights = MultistreamLM(config).weights()

    def drawn(name: str, shape: torch.Size) -> Tensor:
        if len(shape) < 2:
            return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
        draw = torch.Generator().manual_seed(hash(name) % 2**31)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, shape[-1] ** -0.5, generator=draw)

    tensors = {n: computed(t.to(torch.bfloat16), lambda n=n, t=t: drawn(n, t.shape)) for n, t in weights.items()}
    about, theirs = export_model(config, tensors, "hf", "bfloat16")
    write_shards(folder, choose_format(config, "hf").weight_file(about), theirs, SHARD)
    write_json(folder / "config.json", about)


def peak() -> int:
    """Bytes that this process had at most."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def adapted(config: ModelConfig, base: Path, eight: str, cut: bool = False, dtype: str = "bf16") -> MultistreamLM:
    """A model with adapters on attention, its base as training holds it; `cut` among ranks as train.py --shard does it."""
    lora = LoraConfig(rank=8, alpha=16.0, targets=("attn.*",))

    def prepare(model: MultistreamLM) -> dict[str, torch.dtype]:
        types = held_types(model, lora, (), eight)
        if cut:
            parallel.shard(inject(model, lora), Block, Linear, torch.device("cpu"), DTYPES[dtype])
        return types

    return inject(load(base, dtype=dtype, config=config, prepare=prepare), lora).train()


def train_step(model: MultistreamLM, columns: int, dtype: str = "bf16") -> None:
    table = model.config.table
    tokens, weights = typical_batch(table, 1, columns)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    for _ in range(2):                                     # B starts at zero: A has no gradient before the second step
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            sums = model(tokens, weights, scale=torch.ones(len(table)) / columns)
        sums.total.backward()
        optimizer.step()
        optimizer.zero_grad()


def in_shards(config: ModelConfig, base: Path, columns: int, dtype: str) -> None:
    """What each rank has when a model is loaded in shards, and what after two training steps; rank 0 prints it."""
    parallel.start("cpu", 0)
    train_step(adapted(SMALL, base.with_name("small"), "", cut=True, dtype=dtype), 4, dtype)
    before = peak()
    model = adapted(config, base, "", cut=True, dtype=dtype)
    loaded = peak() - before
    train_step(model, columns, dtype)
    had = [(0, 0)] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(had, (loaded, peak() - before))
    trained = sum(3 * p.nbytes for p in model.parameters() if p.requires_grad)             # AdamW's moments, too
    frozen = [p.nbytes for p in model.parameters() if not p.requires_grad]
    if parallel.ranks()[0] == 0:
        print(*(f"rank {n} had {a / 1e9:.2f} GB when loaded, {b / 1e9:.2f} GB after a step;" for n, (a, b) in enumerate(had)),
              f"weights / {len(had)} + largest tensor + what is trained: {(sum(frozen) / len(had) + max(frozen) + trained) / 1e9:.2f} GB")
    parallel.end()


LOAD = """
import sys, time
kind, folder, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
if kind:
    import transformers
    read = lambda: getattr(transformers, kind).from_pretrained(folder, dtype=torch.bfloat16)
    transformers.logging.set_verbosity_error()
    getattr(transformers, kind)                            # imports what it needs
else:
    from checkpoint import load
    from families.family import all_families
    all_families()
    read = lambda: load(folder, dtype="bf16")
began = time.perf_counter()
model = read()
loaded = time.perf_counter()
for p in model.parameters():
    p.data.sum()
print(loaded - began, time.perf_counter() - began)
"""


def against(kind: str, base: Path) -> list[str]:
    """Seconds to load a folder and touch every tensor: here, and by the class `kind` of transformers."""
    if not importlib.util.find_spec("transformers"):
        return ["transformers is not installed: not compared"]
    lines = []
    for threads in (1, 2):
        found: dict[str, list[list[float]]] = {"": [], kind: []}
        for who in (*found, *TRIES * tuple(found)):        # the first of each warms the files up
            done = subprocess.run([sys.executable, "-c", LOAD, who, base, str(threads)], capture_output=True, text=True, cwd=ROOT,
                                  env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)})
            if done.returncode:
                raise ValueError(f"loading {base} {'by ' + who if who else 'here'} ended with {done.returncode}: {done.stderr[-2000:]}")
            found[who].append([float(word) for word in done.stdout.split()])
        for what, at in (("every weight read once", 0), ("our weights read twice", 1)):
            pairs = [(ours[at], theirs[1]) for ours, theirs in zip(found[""][1:], found[kind][1:], strict=True)]
            ours, theirs, ratio = (statistics.median(side) for side in (*zip(*pairs, strict=True), [a / b for a, b in pairs]))
            lines.append(f"\n  {threads} threads, {what}: {ours:.2f} s, transformers {theirs:.2f} s, ratio of pairs {ratio:.2f}")
    return lines


@torch.no_grad()
def run(step: str, config: ModelConfig, folder: Path, columns: int, dtype: str) -> None:
    base = folder / "official"
    if step == "load":
        for p in load(base, dtype=STORED).parameters():
            p.sum()
    elif step == "shards":
        with torch.enable_grad():
            in_shards(config, base.resolve(), columns, dtype)
    elif step in ("lora", "lora8"):
        model = adapted(config, base, "int8" if step == "lora8" else "", dtype=dtype)
        with torch.enable_grad():
            train_step(model, columns, dtype)
        model.extras = Extras(base=str(base))
        save(model, folder / "adapter")
    elif step in ("sample", "sample8"):
        model = load(base, dtype="bf16")
        if step == "sample8":
            quantize(model.requires_grad_(False))
        prompt = typical_batch(config.table, 1, 16)[0]
        frames = list(generate(model, prompt[..., : int(is_audio(prompt, config.table)[0].nonzero()[0]) + 1 if config.table.audio else 16],
                               SampleConfig(max_frames=20, temperature=1.0)))
        assert frames
    elif step == "merge":
        export(folder / "adapter", folder / "merged", tell=print)
    else:
        export(folder / "merged", folder / "back", to="hf")


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help",))
    if len(words) == 3:                                    # one step, in a process of its own
        name, step, folder = words
        before, began = peak(), time.perf_counter()
        job = apply(Job(), pairs)
        run(step, job.model(name), Path(folder), job.columns, job.dtype)
        return print(f"peak {peak() - before} {time.perf_counter() - began:.1f}") if parallel.ranks()[0] == 0 else None
    if "help" in pairs:
        return print(__doc__)
    job = apply(Job(), pairs)
    for name in job.models:
        folder, began = job.folder_of(name), time.perf_counter()
        if not (folder / "official" / "config.json").is_file():
            make(job.model(name), folder / "official")
        files = list((folder / "official").glob("*.safetensors"))
        weights = sum(file.stat().st_size for file in files)
        print(f"{name}: {weights / 1e9:.2f} GB of weights in {len(files)} files, made in {time.perf_counter() - began:.0f} s", flush=True)
        for step in job.steps:
            if step == "time":
                print(f"{name} time:", *against(CLASSES[name], (folder / "official").resolve()), flush=True)
                continue
            if step == "lora" and job.dtype == "fp32" and 2 * weights > 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
                print(f"{name} lora: not run, {2 * weights / 1e9:.0f} GB of weights in fp32 do not fit; this CPU has no bf16", flush=True)
                continue
            if step == "shards" and not (folder / "small").is_dir():
                make(SMALL, folder / "small")
            ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2") if step == "shards" else ()
            options = (f"--columns={job.columns}", f"--layers={job.layers}", f"--dtype={job.dtype}")
            done = subprocess.run([sys.executable, *ranks, __file__, name, step, str(folder), *options], capture_output=True, text=True,
                                  cwd=ROOT if folder.is_absolute() else None, env={**os.environ, "PYTHONPATH": str(ROOT)})
            if done.returncode:
                raise ValueError(f"{name} {step} ended with {done.returncode}: {done.stderr[-2000:]}")
            *told, last = done.stdout.strip().splitlines()
            _, most, seconds = last.split()
            print(f"{name} {step}: peak {int(most) / 1e9:.2f} GB above an idle process, {int(most) / weights:.2f} x the weights,",
                  f"{seconds} s", *told, flush=True)


if __name__ == "__main__":
    edge(main)
