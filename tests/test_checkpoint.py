"""Checkpoints: what is saved is what is loaded, whole, strict, and never half."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tables import CONFIGS, grid

import checkpoint
import lora
from checkpoint import Extras, export, load, resolve, save
from generation.decode_step import SampleConfig
from lora import LoraConfig, inject
from model import MultistreamLM
from options import read_json, write_json
from sample import generate
from training.run_state import RunState, latest, load_run, point, prune, save_run

CONFIG = LoraConfig(rank=2, alpha=3.0, targets=("attn.*",), dora=True)


def make(name: str = "dual", adapted: bool = False) -> MultistreamLM:
    torch.manual_seed(2)
    model = MultistreamLM(CONFIGS[name]).eval()
    if adapted:
        inject(model, CONFIG)
        for _, _, adapter in lora.adapters(model):
            torch.nn.init.normal_(adapter.lora_B, std=0.1)
    return model


def out(model: MultistreamLM) -> torch.Tensor:
    with torch.no_grad():
        text, audio = model(grid(model.config)[0])
        return (text if audio is None else audio).float()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_save_then_load_is_the_identity(name: str, tmp_path: Path) -> None:
    model = make(name)
    again = load(save(model, tmp_path / "m"))
    assert again.config == model.config and not again.training
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(out(model), out(again))


def test_a_tied_head_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    save(make("text"), tmp_path)
    assert "text_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load(tmp_path)
    assert again.text_head.weight is again.embed["text"].weight


def test_adapters_are_saved_with_their_model(tmp_path: Path) -> None:
    model = make(adapted=True)
    again = load(save(model, tmp_path))
    assert again.lora == CONFIG and torch.equal(out(model), out(again))


@pytest.mark.parametrize(("dtype", "want"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (torch.float64, torch.float64),
                                             (None, torch.float32)])
def test_load_casts_on_request(dtype: object, want: torch.dtype, tmp_path: Path) -> None:
    save(make(), tmp_path)
    assert {p.dtype for p in load(tmp_path, dtype=dtype).parameters()} == {want}


def test_a_folder_a_file_and_a_run_are_all_found(tmp_path: Path) -> None:
    save(make(), tmp_path / "run/ckpt/step_000003")
    point(tmp_path / "run/ckpt/latest", "step_000003")
    for path in ("run", "run/ckpt/step_000003", "run/ckpt/latest", "run/ckpt/step_000003/model.safetensors"):
        assert resolve(tmp_path / path) == (tmp_path / "run/ckpt/step_000003").resolve()


def test_an_adapter_is_put_on_another_models_top(tmp_path: Path) -> None:
    base, adapted = make(), make(adapted=True)
    save(base, tmp_path / "base")
    adapted.extras = Extras(step=7, base=str(tmp_path / "base"))
    save(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    by_itself, on_top = load(tmp_path / "adapter"), load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert torch.equal(out(by_itself), out(adapted)) and torch.equal(out(on_top), out(adapted)) and on_top.extras.step == 7


def test_an_adapter_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    save(make(), tmp_path / "base")
    model = inject(make(), CONFIG)
    model.extras = Extras(base=str(tmp_path / "base"))
    save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="all zero"):
        load(tmp_path / "adapter")


def test_an_adapter_whose_part_never_had_a_gradient_loads_but_one_zeroed_later_does_not(tmp_path: Path) -> None:
    save(make(), tmp_path / "base")
    model = make(adapted=True)
    model.temporal.layers[2].attn.q.adapter.lora_B.data.zero_()
    model.extras = Extras(base=str(tmp_path / "base"))
    save(model, tmp_path / "adapter")
    assert torch.equal(out(load(tmp_path / "adapter")), out(model))
    tensors = load_file(tmp_path / "adapter/adapter.safetensors")
    tensors["temporal.layers.1.attn.v.adapter.lora_B"].zero_()
    save_file(tensors, tmp_path / "adapter/adapter.safetensors")
    with pytest.raises(ValueError, match=r"1 lora_B are all zero \(temporal\.layers\.1\.attn\.v"):
        load(tmp_path / "adapter")


def test_merged_export_is_plain_and_equal(tmp_path: Path) -> None:
    model = make(adapted=True)
    before = out(model)
    plain = load(export(model, tmp_path / "plain", to="multistream"))
    assert (out(plain) - before).abs().max() < 1e-5 and not lora.norms(plain)
    assert torch.equal(out(model), before) and len(lora.norms(model)) > 0          # the caller's model is untouched


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_is_merged_is_compared_with_the_adapted_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lines = make(name, adapted=True), []
    export(model, tmp_path / "plain", tell=lines.append)
    error, largest = checkpoint.merge_error(model, load(tmp_path / "plain"))
    assert len(lines) == 1 and f"logits differ by at most {error:.2g}, the largest is {largest:.2g} (on 3 fixed grids, float32)" in lines[0]
    assert error < 1e-5 < 0.1 < checkpoint.merge_error(model, make(name))[0]            # without its adapter it is another model
    export(make(name), tmp_path / "bare", tell=lines.append)
    assert len(lines) == 1                                                              # nothing was merged
    monkeypatch.setattr(lora.Adapter, "merged", lambda self, weight, pick=None: weight.float())
    with pytest.raises(ValueError, match="the merged model is another one"):
        export(model, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_export_of_an_unknown_layout_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="onnx.*multistream"):
        export(make(), tmp_path, to="onnx")


@pytest.mark.parametrize("keep", [0, 1, 100, 1000])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    save(make(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors.*damaged"):
        load(tmp_path)


@pytest.mark.parametrize(("harm", "message"), [
    (lambda t: t.pop("audio_head.weight"), "1 tensors missing.*audio_head"),
    (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected.*extra"),
    (lambda t: t.update({"audio_head.weight": torch.zeros(2, 2)}), r"audio_head\.weight is \(2, 2\)")])
def test_loading_is_strict(harm: object, message: str, tmp_path: Path) -> None:
    save(make(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    harm(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_files_say_their_format(tmp_path: Path) -> None:
    save(make(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    about = read_json(tmp_path / "config.json")
    assert (about["format"], about["version"]) == ("multistream", 1) and about["versions"]["torch"] == torch.__version__


def test_a_loaded_model_samples_what_the_saved_one_did(tmp_path: Path) -> None:
    model = make("clone")
    start = grid(model.config)[0][0, :, :9]
    config = SampleConfig(temperature=1.0, max_frames=8)
    frames = [torch.stack(list(generate(m, start, config))) for m in (model, load(save(model, tmp_path)))]
    assert torch.equal(*frames)


# ---- run state ----

def trained(steps: int, model: MultistreamLM | None = None) -> tuple[MultistreamLM, torch.optim.Optimizer]:
    model = model or make("words")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    advance(model, optimizer, range(steps))
    return model, optimizer


def advance(model: MultistreamLM, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(*grid(model.config, step)).nll.sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def write_run(path: Path, step: int, model: MultistreamLM, optimizer: torch.optim.Optimizer, ema: dict | None = None) -> Path:
    return save_run(path, model, optimizer, RunState(step=step, best=1.5, loader={"draw": 3}), {"lr": 1}, Extras(), ema, 0)


def test_model_optimizer_and_generators_continue_exactly(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    folder = write_run(tmp_path, 3, model, optimizer, {"x": torch.ones(2)})
    expected_random = torch.rand(4)
    advance(model, optimizer, range(3, 6))
    again, fresh = trained(0)
    run, ema = load_run(folder, again, fresh, 0)
    assert torch.equal(torch.rand(4), expected_random) and run.step == 3 and run.loader == {"draw": 3} and ema["x"].tolist() == [1, 1]
    advance(again, fresh, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_save_that_fails_leaves_the_older_checkpoint_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(1)
    write_run(tmp_path, 1, model, optimizer)
    original = checkpoint.write_tensors

    def full(path: Path, tensors: dict, write: bool = True) -> None:
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        original(path, tensors, write)

    monkeypatch.setattr("training.run_state.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        write_run(tmp_path, 2, model, optimizer)
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["latest", "step_000001"] and load(tmp_path).extras.step == 0


def test_prune_keeps_the_last_the_best_and_clears_litter(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        (tmp_path / "ckpt" / f"step_{step:06d}").mkdir(parents=True)
    (tmp_path / "ckpt/.writing_000006").mkdir()
    point(tmp_path / "ckpt/best", "step_000002")
    point(tmp_path / "ckpt/latest", "step_000005")
    prune(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["best", "latest", "step_000002", "step_000004", "step_000005"]


def test_latest_recovers_the_copy_put_aside(tmp_path: Path) -> None:
    (tmp_path / "ckpt/.old_step_000004").mkdir(parents=True)
    point(tmp_path / "ckpt/latest", "step_000004")
    assert latest(tmp_path).is_dir()
    (tmp_path / "ckpt/step_000004").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="step_000004, which is gone"):
        latest(tmp_path)


def test_optimizer_state_of_another_model_is_named(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    folder = write_run(tmp_path, 1, model, optimizer)
    state = load_file(folder / "state/optimizer.safetensors")
    save_file({name.replace("audio_head", "old_head"): t for name, t in state.items()}, folder / "state/optimizer.safetensors")
    with pytest.raises(ValueError, match="old_head"):
        load_run(folder, *trained(0), 0)


def test_switches_of_a_run_replace_those_of_its_start(tmp_path: Path) -> None:
    save(make(), tmp_path)
    model = load(tmp_path, config=replace(CONFIGS["dual"], dropout=0.25))
    assert model.temporal.layers[0].dropout == 0.25
    with pytest.raises(ValueError, match="another stream table"):
        load(tmp_path, config=CONFIGS["words"])


def test_another_version_is_refused(tmp_path: Path) -> None:
    save(make(), tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"version": 9})
    with pytest.raises(ValueError, match="version 9"):
        load(tmp_path)
