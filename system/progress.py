"""How far a long command is: a bar in a terminal, elsewhere a line now and then, both with the time left."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from tqdm import tqdm

EVERY = 15.0                # seconds between lines


def workers(wanted: int = 0) -> int:
    """How many threads work on clips: so many, or one for each core that this process may use, at most 8."""
    return wanted or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextmanager
def torch_threads(count: int = 0) -> Iterator[None]:
    """Within, torch uses `count` threads for an operation (0 = as before); behind it as many as before, whatever a library set."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


class Progress(AbstractContextManager):
    """`with Progress("encoding", 634, "clips") as progress: progress.add()`; what ends within EVERY seconds prints no line."""

    def __init__(self, what: str, total: float, unit: str) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0.0
        self.began = self.printed = time.monotonic()
        shown = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}]"
        self.bar = tqdm(desc=what, total=total, unit=unit, bar_format=shown, disable=not (total and sys.stderr.isatty()))

    def add(self, amount: float = 1) -> None:
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        if self.bar.disable and now - self.printed >= EVERY:
            self.printed, left = now, round((now - self.began) * max(0.0, self.total / self.done - 1)) if self.done else 0
            print(f"{self.what}: {self.done:.0f} of {self.total:.0f} {self.unit}, {left // 60}:{left % 60:02d} left",
                  file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        self.bar.close()
