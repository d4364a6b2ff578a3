"""Full size, without anybody's weights: random checkpoints in the official sharded layout, and everything that is done with them.

    python tests/big.py                       Qwen2.5-1.5B and Higgs v2 3B in out/big: `make big`
    python tests/big.py --models=qwen --dtype=bf16

Each step is a process of its own, and says its peak of memory beside the bytes of the weights: load, a training step of LoRA
(bf16, then on a base of 8 bits), 20 columns sampled, merge, export. Linux only: it tells how much a process had.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import SHARD, STORED, Extras, export, load, save
from families.family import choose_format, export_model
from families.higgs import HIGGS_V2_3B
from families.qwen import QWEN2_5_1_5B
from families.tensor_files import computed, write_shards
from generation.decode_step import SampleConfig
from generation.plan import typical_batch
from layers.architecture import ModelConfig
from layers.int8_base import quantize
from lora import LoraConfig, inject
from model import MultistreamLM
from options import apply, edge, split_arguments, write_json
from sample import generate
from streams import is_audio
from training.plan import held_types

MODELS = {"qwen": replace(QWEN2_5_1_5B, checkpoint=4), "higgs": replace(HIGGS_V2_3B, checkpoint=4)}
STEPS = ("load", "lora", "lora8", "sample", "sample8", "merge", "export")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """What is made and measured."""

    models: tuple[str, ...] = ("qwen", "higgs")
    steps: tuple[str, ...] = STEPS
    folder: str = "out/big"    # needs about three times the weights
    columns: int = 256         # of the training step

    def __post_init__(self) -> None:
        assert set(self.models) <= MODELS.keys(), f"models are {', '.join(MODELS)}"
        assert set(self.steps) <= set(STEPS), f"steps are {', '.join(STEPS)}"


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


def adapted(config: ModelConfig, base: Path, eight: str) -> MultistreamLM:
    """A model with adapters on attention, its base as training holds it."""
    lora = LoraConfig(rank=8, alpha=16.0, targets=("attn.*",))
    model = load(base, dtype="bf16", config=config, prepare=lambda model: held_types(model, lora, (), eight))
    return inject(model, lora)


def train_step(config: ModelConfig, base: Path, folder: Path, columns: int, eight: str) -> None:
    model = adapted(config, base, eight).train()
    tokens, weights = typical_batch(config.table, 1, columns)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    for _ in range(2):                                     # B starts at zero: A has no gradient before the second step
        with torch.autocast("cpu", torch.bfloat16):
            sums = model(tokens, weights, scale=torch.ones(len(config.table)) / columns)
        sums.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.extras = Extras(base=str(base))
    save(model, folder / "adapter")


@torch.no_grad()
def run(step: str, config: ModelConfig, folder: Path, columns: int) -> None:
    base = folder / "official"
    if step == "load":
        for p in load(base, dtype=STORED).parameters():
            p.sum()
    elif step in ("lora", "lora8"):
        with torch.enable_grad():
            train_step(config, base, folder, columns, "int8" if step == "lora8" else "")
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
        run(step, MODELS[name], Path(folder), int(pairs["columns"]))
        return print(f"peak {peak() - before} {time.perf_counter() - began:.1f}")
    if "help" in pairs:
        return print(__doc__)
    job = apply(Job(), pairs)
    for name in job.models:
        folder, began = Path(job.folder) / name, time.perf_counter()
        if not (folder / "official" / "config.json").is_file():
            make(MODELS[name], folder / "official")
        files = list((folder / "official").glob("*.safetensors"))
        weights = sum(file.stat().st_size for file in files)
        print(f"{name}: {weights / 1e9:.2f} GB of weights in {len(files)} files, made in {time.perf_counter() - began:.0f} s", flush=True)
        for step in job.steps:
            done = subprocess.run([sys.executable, __file__, name, step, str(folder), f"--columns={job.columns}"],
                                  capture_output=True, text=True, cwd=ROOT if folder.is_absolute() else None,
                                  env={**os.environ, "PYTHONPATH": str(ROOT)})
            if done.returncode:
                raise ValueError(f"{name} {step} ended with {done.returncode}: {done.stderr[-2000:]}")
            *told, last = done.stdout.strip().splitlines()
            _, most, seconds = last.split()
            print(f"{name} {step}: peak {int(most) / 1e9:.2f} GB above an idle process, {int(most) / weights:.2f} x the weights,",
                  f"{seconds} s", *told, flush=True)


if __name__ == "__main__":
    edge(main)
