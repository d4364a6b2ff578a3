"""What older code stored still means the same: tests/golden/runs/NAME.json holds config.json and state/run.json of a checkpoint
of each config's smoke twin, written when all modules lay at the top level."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import load_file
from tables import random_ids

import lora
from checkpoint import Extras, load, save
from config import TrainConfig
from corpus.data_config import source_weight
from corpus.layouts import read_manifest
from families.family import family_of
from layers.architecture import ModelConfig
from lora import LoraConfig
from model import MultistreamLM
from options import from_json, run_config, to_json
from text.tokenizers import load_tokenizer
from training.run_state import point

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
    (folder / "checksums.json").unlink()             # older runs have none
    again = load(tmp_path / "run/ckpt/step")
    assert again.extras.step == about["step"] and again.state_dict().keys() == model.state_dict().keys()
    tokens = torch.stack([random_ids(s.classes or s.vocab, (6,), k) for k, s in enumerate(model.table.streams)])[None]
    for one, other in zip(model.eval()(tokens), again(tokens), strict=True):
        assert one is None if other is None else torch.equal(one, other)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_what_a_stored_run_reads_of_this_repository_is_found_from_another_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = from_json(TrainConfig, stored(path)["run"]["config"]).data
    names = [source_weight(name)[0] for name in data.sources if name.startswith("assets/")]
    assert all(read_manifest(name).rows for name in names)
    if data.tokenizer.startswith("assets/"):
        assert load_tokenizer(data.tokenizer).content == (ROOT / data.tokenizer).read_bytes()
    assert names or all(name.startswith("out/cache/") for name in data.sources), "made of the bundled recordings where the run is started"


def test_a_run_begun_beside_the_code_goes_on_elsewhere_with_the_same_bits(tmp_path):
    """README: commands work from any folder. One is stopped at half its steps, carried elsewhere, resumed, sampled and shown."""
    data = ("--data.sources=assets/speech/manifest.jsonl", "--data.variants=1", f"--data.cache={tmp_path}/cache")
    smoke = ("configs/tiny.py", "--smoke", *data)
    run = ("train.py", *smoke, "--dtype=fp32", "--steps=4", "--save_every=2", "--keep=4", "--eval_every=0", "--prompts=()")
    rc, _, err = call(*run, f"--out={tmp_path}/whole", cwd=ROOT)
    assert rc == 0, err
    here = tmp_path / "elsewhere"
    half = here / "out/smoke_tiny"
    shutil.copytree(tmp_path / "whole", half, symlinks=True)
    point(half / "ckpt/latest", "step_000002")
    rc, said, err = call(*run, cwd=here)
    assert rc == 0 and "at step 2" in said + err, said + err
    for name in ("model.safetensors", "state/optimizer.safetensors"):
        both = [load_file(out / "ckpt/latest" / name) for out in (tmp_path / "whole", half)]
        assert (half / "ckpt/latest").resolve().name == "step_000004" and both[0].keys() == both[1].keys()
        assert all(torch.equal(tensor, both[1][key]) for key, tensor in both[0].items()), name
    rc, said, err = call("sample.py", "--ckpt", "out/smoke_tiny", "--texts", "assets/demo.txt", "--max_frames=4", "--out", "said", cwd=here)
    assert rc == 0 and len(list((here / "said").glob("*.wav"))) == 19, err
    rc, said, err = call("data.py", "show", *smoke, cwd=here)
    assert rc == 0 and "advance" in said, err
    assert sorted(path.name for path in here.iterdir()) == ["out", "said"], "what a run writes lies where its user stands"
