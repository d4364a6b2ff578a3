"""What checksums, syncing and locks cost, beside the load and the training steps that they protect.

    python tests/safety.py                              127 MiB of weights, 15 pairs, seconds on an idle machine
    python tests/safety.py --dim=1024 --folder=/data/tmp

Both sides run in alternation, one of them without checksums, without the search for NaN, without fsync and without the lock; a row
has the median of the pairwise differences and what share of the load, or of 100 training steps, that is. Loads are counted in CPU
time, of files in the page cache, which makes them as fast as they get; saves in real time, since to sync is to wait.
"""

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

from checkpoint import Extras, load
from generation.plan import typical_batch
from model import MultistreamLM
from options import CONFIGS, apply, edge, run_config, split_arguments
from system.files import lock, unlock
from training.run_state import RunState, save_run


@dataclass(frozen=True)
class Job:
    """What this measures."""

    dim: int = 512             # width of the model
    layers: int = 10
    columns: int = 512         # of a training step
    every: int = 100           # steps between two checkpoints
    pairs: int = 15
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


def costs(call: Callable[[], object], pairs: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Median seconds of a call without protection, and of what protection adds to the call after it."""
    plain, added = [], []
    for n in range(-2, pairs):
        began = clock()
        with unprotected():
            call()
        middle = clock()
        call()
        if n >= 0:
            plain.append(middle - began)
            added.append(clock() - 2 * middle + began)
    return median(plain), median(added)


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help",))
    if words or "help" in pairs:
        return print(__doc__)
    job = apply(Job(), pairs)
    config = run_config(CONFIGS / "tiny.py").model
    model = MultistreamLM(replace(config, temporal=replace(config.temporal, dim=job.dim, layers=job.layers, heads=8, ffn=4 * job.dim)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, weights = typical_batch(model.config.table, 1, job.columns)

    def step() -> None:
        sum(s.sum() for s in model(tokens, weights).nll).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory(dir=job.folder or None) as name:
        folder = Path(name)
        size = sum(p.nbytes for p in model.parameters())
        step()
        began = time.perf_counter()
        for _ in range(3):
            step()
        steps = job.every * (time.perf_counter() - began) / 3
        print(f"{size / 2**20:.0f} MiB of weights, {torch.get_num_threads()} threads; {job.every} training steps take {steps:.1f} s")

        def save() -> Path:
            return save_run(folder, model, optimizer, RunState(step=1), {}, Extras(), None, 0)

        def locked() -> None:
            lock(folder / "run")
            unlock(folder / "run")

        def forward() -> None:
            with torch.no_grad():
                load(path)(tokens)

        def touch() -> None:
            for p in load(path).parameters():
                p.sum()

        path = save()
        rows = [("load, every weight read once", touch, None), ("load and a first forward pass", forward, None),
                ("save a checkpoint with its optimizer", save, steps), ("lock and unlock, once a run", locked, steps)]
        for what, call, of in rows:
            plain, added = costs(call, job.pairs, time.perf_counter if of else time.process_time)
            added = plain + added if call is locked else added              # all of it is protection
            share = f"of {job.every} steps" if of else "of the load"
            print(f"{what}: {1e3 * plain:.1f} ms, protection adds {1e3 * added:.1f} ms, {added / (of or plain):.2%} {share}", flush=True)


if __name__ == "__main__":
    edge(main)
