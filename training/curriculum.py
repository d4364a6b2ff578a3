"""What a run reads when: the stages of a curriculum, each with sources and loss weights of its own, then the run's own.

    stages=(Stage(400, audio=0.0), Stage(600, sources=("easy.jsonl:3", "hard.jsonl")))     text only, then a mixture

A stage begins its data anew; the position inside it is part of a checkpoint. Used by train.py alone.
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
    """Number, data and loss of the stage that a step belongs to."""
    for n, part in enumerate(c.stages):
        if step < part.steps:
            return n, replace(c.data, sources=part.sources or c.data.sources), replace(c.loss, text=part.text, audio=part.audio)
        step -= part.steps
    return len(c.stages), c.data, c.loss


def prepare_all(config: TrainConfig, table: StreamTable) -> None:
    """Encode what any stage reads, and what the run itself does."""
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
        """Go to the stage of a step; a line of what it does when that is another one than before."""
        part, data, self.loss = stage(step, self.config)
        if part == self.part:
            return []
        c, self.part = self.config, part
        self.loader = Loader(data, self.table, "train", c.batch_size, self.rank, self.world, c.accum, c.epochs, c.dpo is not None)
        self.batches: Iterator[Batch] | None = None
        counts = f"text counts {self.loss.text:g}, audio {self.loss.audio:g}"
        return [f"step {step}: stage {part + 1} reads {', '.join(data.sources)}; {counts}"] if c.stages else []

    def restore(self, step: int, state: dict[str, Any] | None) -> list[str]:
        """Continue at a step; a stage that had just ended left its own position, which is of no use to the next."""
        lines = self.enter(step)
        if state and state.get("part", 0) == self.part:
            lines += self.loader.index.changes(state.get("data", ""))
            self.loader.restore(state)
        return lines

    def take(self, count: int) -> list[Batch]:
        """The next micro-batches; `position` is then what stands behind them."""
        self.batches = self.batches or iter(self.loader)
        taken = [next(self.batches) for _ in range(count)]
        self.position = taken[-1].state | {"part": self.part, "data": self.loader.index.content}
        return taken

    def spare(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """What a stage does not train keeps its weights: a gradient of zeros is dropped, so that nothing decays either."""
        if self.loss.text and self.loss.audio:
            return
        for p in parameters.values():
            p.grad = p.grad if p.grad is None or bool(whole(p.grad.any())) else None
