"""`evaluate.py verify`: it passes what runs leave behind, and names each of the faults that are planted here."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import load_file, save_file

from audio import TINY
from checkpoint import load, save
from evaluation import consistency
from evaluation.verify import CHECKS, DIFFERS, OK, VerifyConfig, is_run, verify
from families import family
from kernels.attention import KVCache
from model import MultistreamLM
from options import run_config
from system.files import write_sums

SCENE = "A quiet room."


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of the Higgs smoke twin on a codec of its own; the adapter is made large enough to matter."""
    here = tmp_path_factory.mktemp("verify")
    shutil.copy(TINY, here / "codec.safetensors")
    options = (f"--out={here}/run", f"--data.cache={here}/cache", f"--data.codec={here}/codec.safetensors", f"--data.scene={SCENE}",
               "--steps=4", "--eval_every=4", "--listen=0", "--lr=0.02", "--dtype=fp32")
    rc, said, err = call("train.py", "configs/higgs_ar.py", "--smoke", *options)
    assert rc == 0, said + err
    return here


def copy(lora_run: Path, tmp_path: Path) -> Path:
    """A copy to damage; its codec and cache are those of the original."""
    shutil.copytree(lora_run / "run", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def differing(run: Path, **options: object) -> dict[str, str]:
    """The rows of the table that differ."""
    return {row.name: row.found for row in verify(str(run), VerifyConfig(rows=1, export="off", **options)) if row.state == DIFFERS}


def edited(folder: Path, edit) -> None:
    """Change the config.json of a checkpoint as somebody would who also makes its checksums anew."""
    about = json.loads((folder / "config.json").read_text())
    edit(about)
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "checksums.json").unlink()
    write_sums(folder)


def retensored(file: Path, change) -> None:
    tensors = {name: change(name, t) for name, t in load_file(file).items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    (file.parent / "checksums.json").unlink()
    write_sums(file.parent)


def test_a_run_is_what_it_says(lora_run):
    found = verify(str(lora_run / "run"), VerifyConfig())
    assert [row for row in found if row.state == DIFFERS] == []
    fine = {row.name for row in found if row.state == OK}
    assert fine >= {"weights", "adapter", "data", "prompt", "decoding", "held-out loss", "export", "sound"}
    assert is_run(lora_run / "run") and not is_run(lora_run / "run/ckpt/latest")


def test_a_checkpoint_folder_alone_is_verified_against_its_run(lora_run):
    found = [row for row in verify(str(lora_run / "run/ckpt/latest"), VerifyConfig(rows=1, export="off")) if row.name == "held-out loss"]
    assert found[0].state == OK and "recorded" in found[0].found


def test_another_codec_under_the_same_name(lora_run, tmp_path):
    run, own = copy(lora_run, tmp_path), (lora_run / "codec.safetensors").read_bytes()
    other = load_file(lora_run / "codec.safetensors")
    name = next(n for n, t in other.items() if t.shape[-2:-1] == (256,) or 256 in t.shape)
    other[name] = other[name].flip(other[name].shape.index(256))
    save_file(other, lora_run / "codec.safetensors", {"codec": "tiny"})
    try:
        assert differing(run).keys() & {"data", "held-out loss"}
    finally:
        (lora_run / "codec.safetensors").write_bytes(own)


def test_a_swapped_tokenizer(lora_run, tmp_path):
    run = copy(lora_run, tmp_path)
    folder = (run / "ckpt/latest").resolve()
    file = folder / "tiny_tokenizer.json"
    words = json.loads(file.read_text())
    vocab = words["model"]["vocab"]
    a, b = [piece for piece in vocab if piece.isascii() and piece.isalpha() and len(piece) == 1][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(words))
    assert "weights" in differing(run)                       # the checksum
    edited(folder, lambda about: None)
    assert "tokenizer" in differing(run)["data"]


@pytest.mark.parametrize("fault", ["base", "scale", "rope"])
def test_weights_that_are_not_those_of_the_recorded_loss(lora_run, tmp_path, fault):
    run = copy(lora_run, tmp_path)
    folder = (run / "ckpt/latest").resolve()
    if fault == "base":
        torch.manual_seed(99)
        shutil.rmtree(run / "base")
        save(MultistreamLM(run_config(ROOT / "configs/higgs_ar.py", "smoke").model), run / "base")
    elif fault == "scale":
        edited(folder, lambda about: about["lora"].update(alpha=4 * about["lora"]["alpha"]))
    else:
        edited(run / "base", lambda about: about["model"]["temporal"].update(rope_theta=10.0))
    found = differing(run)
    assert "recorded" in found["held-out loss"] and (fault != "rope" or "rope_theta" in found["config"])


def test_an_adapter_whose_b_is_zero(lora_run, tmp_path):
    run = copy(lora_run, tmp_path)
    retensored((run / "ckpt/latest").resolve() / "adapter.safetensors", lambda name, t: torch.zeros_like(t) if "lora_B" in name else t)
    assert differing(run).keys() & {"adapter", "weights"}


def test_a_weight_that_is_nan(lora_run, tmp_path):
    run = copy(lora_run, tmp_path)
    file = (run / "ckpt/latest").resolve() / "adapter.safetensors"
    retensored(file, lambda name, t: t.fill_(torch.nan) if name.endswith("q.adapter.lora_A") else t)
    assert "NaN" in differing(run)["weights"]


def test_labels_that_the_layout_shifts(lora_run, monkeypatch):
    def shifted(example, table):
        tokens, weights = family.family_of(table).lay_out(example, table)
        return tokens, weights.roll(1, dims=1)

    monkeypatch.setattr("evaluation.verify.lay_out", shifted)
    assert "never predicts" in differing(lora_run / "run")["prompt"]


def test_a_dropped_scene(lora_run, tmp_path):
    run = copy(lora_run, tmp_path)
    edited((run / "ckpt/latest").resolve(), lambda about: about["data"].update(scene=""))
    found = differing(run)
    assert "scene" in found["data"] and "in training" in found["prompt"]


@pytest.mark.parametrize("everywhere", [False, True])
def test_other_delays(lora_run, tmp_path, everywhere):
    run = copy(lora_run, tmp_path)

    def edit(about: dict) -> None:
        for n, stream in enumerate(about["model"]["table"]["streams"]):
            stream["delay"] = n if stream["kind"] == "audio" and stream["delay"] else stream["delay"]

    edited((run / "ckpt/latest").resolve(), edit)
    if everywhere:
        edited(run / "base", edit)
    assert differing(run).keys() & ({"config"} if everywhere else {"weights"})


def test_a_stale_cache(lora_run, monkeypatch):
    update = KVCache.update

    def stale(self, layer, k, v):
        return update(self, layer, k if k.shape[2] > 1 else torch.zeros_like(k), v)

    monkeypatch.setattr(KVCache, "update", stale)
    monkeypatch.setattr(KVCache, "takes_fast_path", lambda self, columns: False)
    assert "logits differ" in differing(lora_run / "run")["decoding"]


def test_activations_that_overflow_in_fp16(tiny_run, tmp_path):
    model = load(tiny_run)
    for block in model.temporal.layers:
        block.ffn.up.weight.data.mul_(1e3)
        block.ffn.down.weight.data.mul_(1e3)
    config = replace(model.extras, data=None, step=0, folder="", base="")
    save(model, tmp_path / "large", config)
    found = differing(tmp_path / "large", dtype="fp16")
    assert "overflow" in str(verify(str(tmp_path / "large"), VerifyConfig(dtype="fp16", export="off"))) and found


def test_the_command_ends_with_1_where_something_differs(lora_run, tmp_path):
    run = copy(lora_run, tmp_path)
    edited((run / "ckpt/latest").resolve(), lambda about: about["data"].update(scene=""))
    rc, said, err = call("evaluate.py", "verify", run, "--export=off", "--rows=1")
    assert rc == 1 and "differs in data, prompt" in said and "-> " in said, said + err
    rc, _, err = call("evaluate.py", "verify", run, "--export=maybe")
    assert rc == 2 and "none of on, off, auto" in err


def test_grids_of_random_ids_stand_for_data(lora_run):
    model = load(lora_run / "run")
    error, largest = consistency.decoding_error(model, consistency.random_grids(model.table))
    assert error < 1e-3 * largest and "decoding" in CHECKS


# ---- with its base ----

def test_a_run_speaks_beside_its_base(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("one two\n")
    rc, out, err = call("evaluate.py", "speech", lora_run / "run", f"--set={tmp_path}/list.txt", f"--out={tmp_path}/out", "--base=own",
                        "--recogniser=none", "--max_frames=30", "--rounds=10")
    assert rc == 0, out + err
    sounds = [(tmp_path / "out" / name / "000.wav").read_bytes() for name in ("run", "run_base")]
    assert sounds[0] != sounds[1] and "run_base against run" in (tmp_path / "out/index.html").read_text()
