"""TrainConfig: learning rates have the values that their formulas say, and values that make no sense are refused."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from config import SCHEDULES, first_beta, learning_rate
from options import run_config

TINY = replace(run_config(ROOT / "configs" / "tiny.py"), steps=500, warmup=50, warmup_offset=0, lr=1.0, min_lr=0.0)


def rates(**fields):
    config = replace(TINY, **fields)
    return [learning_rate(n, config) for n in range(config.steps)]


def test_linear_rises_over_the_warmup_and_falls_to_zero():
    found = rates(schedule="linear")
    assert found[:50] == pytest.approx([n / 50 for n in range(50)], abs=1e-15)
    assert found[50:] == pytest.approx([(500 - n) / 450 for n in range(50, 500)], abs=1e-15)
    assert found[0] == 0.0 and found[50] == 1.0 and learning_rate(500, replace(TINY, schedule="linear")) == 0.0


def test_warmup_offset_shifts_the_rise_by_a_step():
    assert rates(schedule="linear", warmup_offset=1)[:50] == pytest.approx([(n + 1) / 50 for n in range(50)], abs=1e-15)


def test_linear_is_transformers_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: n / 50 if n < 50 else max(0.0, (500 - n) / 450))
    for rate in rates(schedule="linear"):
        assert rate == pytest.approx(schedule.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("steps, warmup, lr", [(500, 50, 2e-4), (1000, 300, 1.0), (20, 7, 3e-3), (100, 2, 0.5)])
def test_onecycle_equals_torch_to_1e_12(steps, warmup, lr):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    wanted = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=warmup / steps, cycle_momentum=False)
    for n, rate in enumerate(rates(schedule="onecycle", steps=steps, warmup=warmup, lr=lr)):
        assert rate == pytest.approx(wanted.get_last_lr()[0], rel=1e-12, abs=1e-12), n
        if n + 1 < steps:
            optimizer.step()
            wanted.step()


@pytest.mark.parametrize("steps, warmup", [(500, 50), (20, 7), (100, 2)])
def test_cycled_momentum_equals_torch(steps, warmup):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.9, 0.95))
    wanted = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, pct_start=warmup / steps)
    config = replace(TINY, schedule="onecycle", steps=steps, warmup=warmup, cycle_momentum=True)
    for n in range(steps):
        assert first_beta(n, config) == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-12), n
        optimizer.step()
        if n + 1 < steps:
            wanted.step()
    assert first_beta(3, replace(config, cycle_momentum=False)) == config.betas[0]


def test_cosine_ends_where_it_should():
    found, config = rates(schedule="cosine", min_lr=0.1), replace(TINY, schedule="cosine", min_lr=0.1)
    assert found[50] == 1.0 and found[275] == pytest.approx(0.55, abs=1e-15) and learning_rate(500, config) == pytest.approx(0.1)
    assert found[50 + 90] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 5)) / 2, abs=1e-15)
    assert found[50:] == sorted(found[50:], reverse=True)


def test_wsd_holds_then_falls_over_its_last_share():
    found = rates(schedule="wsd", decay=0.2)
    assert found[50:410] == [1.0] * 360 and found[455] == pytest.approx(0.5, abs=1e-12)
    assert learning_rate(500, replace(TINY, schedule="wsd")) == pytest.approx(0.0, abs=1e-12)
    assert rates(schedule="wsd", decay=0.0)[50:] == [1.0] * 450


def test_constant_stays_after_the_warmup():
    assert rates(schedule="constant")[49:] == [49 / 50] + [1.0] * 450


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 500, 600])
def test_every_schedule_stays_between_zero_and_the_peak(schedule, warmup):
    found = rates(schedule=schedule, warmup=warmup)
    assert all(0.0 <= rate <= 1.0 for rate in found) and len(found) == 500


@pytest.mark.parametrize("field, value", [
    ("schedule", "step"), ("dtype", "fp8"), ("device", "tpu"), ("steps", 0), ("batch_size", 0), ("accum", -1), ("log_every", 0),
    ("lr", -1e-3), ("warmup", -1), ("clip", -1.0), ("keep", -1), ("ema", 1.0), ("decay", 1.5), ("trackers", ("mlflow",)),
])
def test_values_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(AssertionError, match=field):
        replace(TINY, **{field: value})


@pytest.mark.parametrize("field, value", [("lr", "2e-6"), ("steps", 1.5), ("betas", (0.9,)), ("prompts", "hello"), ("compile", 1)])
def test_values_of_another_type_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        replace(TINY, **{field: value})
