"""What older code stored still means the same: tests/golden/runs/NAME.json holds config.json and state/run.json of a checkpoint
of each config's smoke twin, written when all modules lay at the top level."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tables import random_ids

import lora
from checkpoint import Extras, load, save
from config import TrainConfig
from families.family import family_of
from layers.architecture import ModelConfig
from lora import LoraConfig
from model import MultistreamLM
from options import from_json, run_config, to_json

RUNS = sorted((ROOT / "tests/golden/runs").glob("*.json"))


def stored(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def differing(then: object, now: object, name: str = "config") -> list[str]:
    """The fields that no longer hold what was stored; fields that came later do not count."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [line for key in then for line in differing(then[key], now.get(key), f"{name}.{key}")]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [line for n, (a, b) in enumerate(zip(then, now, strict=True)) for line in differing(a, b, f"{name}[{n}]")]
    return [] if then == now else [f"{name}: {then} -> {now}"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_stored_config_is_read_whole_and_written_again_as_it_was(path):
    about = stored(path)
    config = from_json(TrainConfig, about["run"]["config"])
    lost = differing(about["run"]["config"], to_json(config))
    assert not lost and family_of(config.model.table).lay_out is not None, lost
    assert from_json(ModelConfig, about["checkpoint"]["model"]) == config.model


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_stored_config_is_that_of_its_recipe(path, monkeypatch):
    """A recipe builds the model that it built: a run of it can go on."""
    monkeypatch.chdir(ROOT)
    if path.stem == "dsaa":
        pytest.skip("its smoke twin makes two towers first; tests/families/test_dsaa.py runs it")
    now, then = run_config(ROOT / f"configs/{path.stem}.py", "smoke"), from_json(TrainConfig, stored(path)["run"]["config"])
    assert (now.model, now.lora, now.loss) == (then.model, then.lora, then.loss)
    assert now.data.stream_weights == then.data.stream_weights


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_checkpoint_with_a_stored_config_loads_with_its_adapter(path, tmp_path):
    """The names of tensors are the paths of modules: they have not moved."""
    about = stored(path)["checkpoint"]
    config = from_json(ModelConfig, about["model"])
    torch.manual_seed(0)
    if config.fusion is not None:                    # the frozen tower is named, not stored
        save(MultistreamLM(config.fusion.tower), tmp_path / "llm")
        config = replace(config, fusion=replace(config.fusion, source=str(tmp_path / "llm"), revision=""))
    folder, model = tmp_path / "run/ckpt/step", MultistreamLM(config)
    if config.fusion is not None:
        model.tower.body = load(tmp_path / "llm")
    if about["base"]:
        save(model, tmp_path / "run/base")
    if about["lora"]:
        lora.inject(model, from_json(LoraConfig, about["lora"]))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    save(model, folder, Extras(base="base" if about["base"] else ""))
    written = about | {"model": to_json(config), "base": "base" if about["base"] else "", "idle": []}
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    again = load(tmp_path / "run/ckpt/step")
    assert again.extras.step == about["step"] and again.state_dict().keys() == model.state_dict().keys()
    tokens = torch.stack([random_ids(s.classes or s.vocab, (6,), k) for k, s in enumerate(model.table.streams)])[None]
    for one, other in zip(model.eval()(tokens), again(tokens), strict=True):
        assert one is None if other is None else torch.equal(one, other)
