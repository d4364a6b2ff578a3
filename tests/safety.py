"""What checksums, syncing and locks cost, beside the load and the training steps that they protect.

    python tests/safety.py                              134 MiB of weights, 15 pairs, a few minutes on an idle machine
    python tests/safety.py --dim=1024 --folder=/data/tmp

Both sides run in alternation, one of them without checksums, without the search for NaN, without fsync and without the lock; a row
has the medians of the plain side and of the pairwise differences, in real time and in CPU time of all threads. Loads of files in the
page cache are as fast as they get; cold ones come from the disk, or from what lies below it. A load without checks reads nothing: what
it is compared with reads every weight once, or is a first forward pass. At the end sample.py speaks one frame, in processes of its own.
"""

import gc
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import Extras, load, save
from generation.plan import typical_batch
from model import MultistreamLM
from options import CONFIGS, apply, edge, run_config, split_arguments
from system.files import lock, unlock
from training.run_state import RunState, save_run

ROOT, CORES = Path(__file__).resolve().parent.parent, sorted(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Job:
    """What this measures."""

    dim: int = 512             # width of the model
    layers: int = 10
    columns: int = 512         # of a training step
    every: int = 100           # steps between two checkpoints
    pairs: int = 15
    runs: int = 3              # pairs of whole runs of sample.py
    folder: str = ""           # where the files lie; "" = the folder for temporary files


@contextmanager
def unprotected() -> Iterator[None]:
    """Everything that is measured here, switched off."""
    with ExitStack() as off:
        for name in ("checkpoint.check_sums", "checkpoint.write_sums", "training.run_state.write_sums", "training.run_state.sync",
                     "system.files.sync", "training.run_state.refuse_broken", "families.tensor_files.refuse_not_finite"):
            off.enter_context(patch(name, lambda *_, **__: None))
        off.enter_context(patch("checkpoint.refuse_broken", lambda model, *_: model))
        yield


Clocks = tuple[float, float]           # real time, and CPU time of all threads, in seconds
SPEAK = """
import contextlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
from safety import unprotected
from sample import main
with {guard}:
    main()
"""


def clocks() -> Clocks:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime


def costs(plain: Callable[[], object], call: Callable[[], object], pairs: int, before: Callable[[], object] = gc.collect) -> list[Clocks]:
    """Median seconds of `plain` without protection, and of what `call` with protection takes longer, each by both clocks."""
    rows: list[list[tuple[float, float]]] = [[], []]
    for n in range(-1, pairs):
        before()
        began = clocks()
        with unprotected():
            plain()
        middle = clocks()
        before()
        again = clocks()
        call()
        ended = clocks()
        if n >= 0:
            for row, a, b, c, d in zip(rows, began, middle, again, ended, strict=True):
                row.append((b - a, d - c - b + a))
    return [(median(first for first, _ in row), median(second for _, second in row)) for row in rows]


def drop(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    gc.collect()                           # what is mapped stays
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tell(what: str, found: list[Clocks], of: float = 0.0, whole: bool = False) -> None:
    parts = []
    for (plain, added), clock in zip(found, ("real", "CPU"), strict=True):
        added = plain + added if whole else added                       # all of it is protection
        parts.append(f"{1e3 * plain:.1f} ms {clock}, {1e3 * added:+.1f} ms ({added / (of or plain):+.2%})")
    print(f"{what}: {'; '.join(parts)}", flush=True)


def threads(count: int) -> None:
    """Let this process and those that it starts use so many cores."""
    os.sched_setaffinity(0, CORES[:count])
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def speak(folder: Path, protected: bool) -> None:
    guard = "contextlib.nullcontext()" if protected else "unprotected()"
    code = SPEAK.format(root=str(ROOT), tests=str(ROOT / "tests"), guard=guard)
    command = [sys.executable, "-c", code, f"--ckpt={folder}", "--text=one", "--max_frames=1", f"--out={folder}/x.wav"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help",))
    if words or "help" in pairs:
        return print(__doc__)
    job = apply(Job(), pairs)
    config = run_config(CONFIGS / "tiny.py")
    stack = replace(config.model.temporal, dim=job.dim, layers=job.layers, heads=8, ffn=4 * job.dim)
    model = MultistreamLM(replace(config.model, temporal=stack))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, weights = typical_batch(model.config.table, 1, job.columns)
    facts = {name: getattr(config.data, name) for name in ("tokenizer", "codec", "normaliser")}

    def step() -> None:
        sum(s.sum() for s in model(tokens, weights).nll).backward()
        optimizer.step()
        optimizer.zero_grad()

    def write() -> None:
        save_run(folder / "run", model, optimizer, RunState(step=1), {}, Extras(), None, 0)

    def locked() -> None:
        lock(folder / "lock")
        unlock(folder / "lock")

    def touch() -> None:
        for p in load(path).parameters():
            p.sum()

    @torch.no_grad()
    def forward() -> None:
        load(path)(tokens)

    with tempfile.TemporaryDirectory(dir=job.folder or None) as name:
        folder = Path(name)
        path = save(model, folder / "model", Extras(data=facts))
        print(f"{sum(p.nbytes for p in model.parameters()) / 2**20:.0f} MiB of weights, {os.getloadavg()[0]:.1f} processes run here")
        for count in sorted({1, min(2, len(CORES))}):
            threads(count)
            tell(f"{count} threads, load, against a load and every weight read once", costs(touch, lambda: load(path), job.pairs))
            tell(f"{count} threads, load and every weight read once, both", costs(touch, touch, job.pairs))
            tell(f"{count} threads, the same of cold files", costs(touch, touch, job.pairs, lambda: drop(path)))
            tell(f"{count} threads, load and a first forward pass", costs(forward, forward, job.pairs))
            tell(f"{count} threads, sample.py", costs(lambda: speak(path, False), lambda: speak(path, True), job.runs))
        threads(1)
        step()
        began = time.perf_counter()
        step()
        steps = job.every * (time.perf_counter() - began)
        print(f"{job.every} training steps take {steps:.1f} s; shares of that:")
        tell("save a checkpoint with its optimizer", costs(write, write, job.pairs), steps)
        tell("lock and unlock, once a run", costs(locked, locked, job.pairs), steps, whole=True)


if __name__ == "__main__":
    edge(main)
