"""The curriculum: stages with their own sources and loss weights, then the settings of the run itself.

    stages=(Stage(400, audio=0.0), Stage(600, sources=("easy.jsonl:3", "hard.jsonl")))     text only, then a mixture

Each stage starts its data from the beginning; checkpoints contain the position in the current stage. Used by train.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from config import TrainConfig
from corpus.data_config import DataConfig
from corpus.index import prepare
from data import Batch, Loader
from loss import LossConfig
from streams import StreamTable
from training.parallel import whole


def stage(step: int, c: TrainConfig) -> tuple[int, DataConfig, LossConfig]:
    """Number, data config and loss config of the stage of a step."""
    for n, part in enumerate(c.stages):
        if step < part.steps:
            return n, replace(c.data, sources=part.sources or c.data.sources), replace(c.loss, text=part.text, audio=part.audio)
        step -= part.steps
    return len(c.stages), c.data, c.loss


def prepare_all(config: TrainConfig, table: StreamTable) -> None:
    """Encode the sources of all stages and of the run itself."""
    for sources in {part.sources: None for part in config.stages if part.sources}:
        prepare(replace(config.data, sources=sources), table)
    prepare(config.data, table)


class Curriculum:
    """The training batches of this rank, from the loader of the stage that the step is in."""

    def __init__(self, config: TrainConfig, table: StreamTable, rank: int, world: int) -> None:
        self.config, self.table, self.rank, self.world = config, table, rank, world
        self.part = -1
        self.enter(0)

    def enter(self, step: int) -> list[str]:
        """Switch to the stage of a step; returns a log line if the stage changed."""
        part, data, self.loss = stage(step, self.config)
        if part == self.part:
            return []
        c, self.part = self.config, part
        self.loader = Loader(data, self.table, "train", c.batch_size, self.rank, self.world, c.accum, c.epochs, c.dpo is not None)
        self.batches: Iterator[Batch] | None = None
        counts = f"loss weights: text {self.loss.text:g}, audio {self.loss.audio:g}"
        return [f"step {step}: stage {part + 1} reads {', '.join(data.sources)}; {counts}"] if c.stages else []

    def restore(self, step: int, state: dict[str, Any] | None) -> list[str]:
        """Continue at a step. A saved position of an earlier stage, which had just ended, is ignored."""
        lines = self.enter(step)
        if state and state.get("part", 0) == self.part:
            lines += self.loader.index.changes(state.get("data", ""))
            self.loader.restore(state)
        return lines

    def take(self, count: int) -> list[Batch]:
        """The next micro-batches; `position` is then the state after them."""
        self.batches = self.batches or iter(self.loader)
        taken = [next(self.batches) for _ in range(count)]
        self.position = taken[-1].state | {"part": self.part, "data": self.loader.index.content}
        return taken

    def spare(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Drop all-zero gradients: parameters that the stage does not train then have no weight decay and keep their values."""
        if self.loss.text and self.loss.audio:
            return
        for p in parameters.values():
            p.grad = p.grad if p.grad is None or bool(whole(p.grad.any())) else None
