"""The stages of a run: which step reads what, where a stage begins anew, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, ROOT, write_clips

from config import Stage, TrainConfig
from loss import LossConfig
from options import run_config
from training.curriculum import Curriculum, prepare_all, stage


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    for n, name in enumerate(("clips", "more")):
        write_clips(tmp_path / name, 12 + 4 * n)
    (tmp_path / "run.py").write_text(CONFIG)
    whole = run_config(tmp_path / "run.py")
    return replace(whole, steps=9, stages=(Stage(2, audio=0.0), Stage(3, sources=(str(tmp_path / "more"),), text=2.0)))


def test_a_step_belongs_to_its_stage(config):
    numbers = [stage(step, config)[0] for step in range(9)]
    assert numbers == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [stage(step, config)[2] for step in (0, 4, 8)] == [LossConfig(audio=0.0), LossConfig(text=2.0), config.loss]
    assert stage(1, config)[1] == config.data and stage(2, config)[1].sources == config.stages[1].sources


def names(batches: list) -> list[str]:
    return [name for batch in batches for row in batch.names for name in row]


def test_restored_at_any_step_it_reads_what_it_would_have_read(config):
    prepare_all(config, config.model.table)
    whole = Curriculum(config, config.model.table, 0, 1)
    read, positions, told = [], [None], []
    for step in range(9):
        told += whole.enter(step)
        read.append(names(whole.take(1)))
        positions.append(whole.position)
    assert len(told) == 2 and "stage 2" in told[0] and "text 2, audio 1" in told[0]
    assert whole.loader.config.sources == config.data.sources != config.stages[1].sources
    for step in range(9):
        again = Curriculum(config, config.model.table, 0, 1)
        again.restore(step, positions[step])
        again.enter(step)
        assert names(again.take(1)) == read[step], step


def test_a_stage_drops_gradients_of_zeros_only(config):
    prepare_all(config, config.model.table)
    reader = Curriculum(config, config.model.table, 0, 1)
    p, q, r = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    p.grad, q.grad = torch.zeros(2), torch.tensor([0.0, 1e-30])
    reader.spare({"p": p, "q": q, "r": r})
    assert p.grad is None and q.grad is not None and r.grad is None
    reader.enter(8)
    p.grad = torch.zeros(2)
    reader.spare({"p": p})
    assert p.grad is not None


def test_stages_that_cannot_be():
    tiny = run_config(ROOT / "configs/tiny.py")
    for wrong in (Stage(0), Stage(3, text=0.0, audio=0.0), Stage(3, audio=-1.0)):
        with pytest.raises(AssertionError, match="each stage needs steps and one loss weight above 0"):
            replace(tiny, stages=(wrong,))
    with pytest.raises(AssertionError, match="stages count steps"):
        replace(tiny, stages=(Stage(1),), epochs=1)
