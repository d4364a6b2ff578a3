"""A run whose last checkpoint is damaged goes on from the newest whole one; one that diverges spoils nothing; Ctrl-C is one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import load_file, save_file

from checkpoint import export, load


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run", symlinks=True))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "state/optimizer.safetensors", "state/rng_rank0.safetensors"])
def test_one_flipped_bit_is_named_and_the_run_goes_on_from_the_newest_whole_checkpoint(name: str, run_copy: Path, tiny_run: Path) -> None:
    """And ends as the run that nothing happened to."""
    config = tiny_run.parent / "tiny_run.py"
    flip(run_copy / "ckpt/step_000004" / name)
    if name in ("model.safetensors", "config.json"):
        with pytest.raises(ValueError, match=rf"{name} is "):
            load(run_copy)
    rc, out, err = call("train.py", config, f"--out={run_copy}")
    assert rc == 0 and f"{name} is " in out and f"the run continues from {run_copy}/ckpt/step_000002" in out, (out, err)
    for file in ("model.safetensors", "state/optimizer.safetensors"):
        assert (run_copy / "ckpt/latest" / file).read_bytes() == (tiny_run / "ckpt/latest" / file).read_bytes()


def test_a_checkpoint_that_was_moved_to_another_disk_stays_there(run_copy: Path, tiny_run: Path, tmp_path: Path) -> None:
    shutil.move(run_copy / "ckpt/step_000002", tmp_path / "moved")
    (run_copy / "ckpt/step_000002").symlink_to(tmp_path / "moved")
    rc, out, err = call("train.py", tiny_run.parent / "tiny_run.py", f"--out={run_copy}", "--steps=5", "--keep=1")
    assert rc == 0 and (tmp_path / "moved/model.safetensors").is_file(), (out, err)
    assert [path.name for path in sorted((run_copy / "ckpt").glob("step_*"))] == ["step_000005"]


def test_a_run_is_no_place_to_write_a_model_into(run_copy: Path) -> None:
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    for command in (("merge",), ("export", "--to=multistream"), ("import",)):
        for out in (run_copy, run_copy / "ckpt/latest"):
            rc, _, err = call("checkpoint.py", command[0], run_copy, *command[1:], f"--out={out}")
            assert rc == 2 and "holds a run" in err
    assert before == {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}


def spoil(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors")
    (folder / "checksums.json").unlink()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_everything_that_reads_them(value: float, run_copy: Path, tmp_path: Path) -> None:
    spoil(run_copy / "ckpt/step_000004", value)
    for command in (("sample.py", f"--ckpt={run_copy}", "--text=one"), ("checkpoint.py", "merge", run_copy, f"--out={tmp_path}/m"),
                    ("checkpoint.py", "export", run_copy, "--to=multistream", f"--out={tmp_path}/e")):
        rc, _, err = call(*command)
        assert rc == 2 and "NaN or infinite values" in err and "Traceback" not in err, (command, err)
    with pytest.raises(ValueError, match="NaN or infinite"):
        export(run_copy, tmp_path / "x")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load(run_copy)


@pytest.mark.parametrize("skips", [2, 100])
def test_a_run_that_diverges_ends_with_code_2_and_leaves_its_checkpoints(skips: int, run_copy: Path, tiny_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run_copy / "ckpt").rglob("*") if path.is_file()}
    rc, out, err = call("train.py", tiny_run.parent / "tiny_run.py", f"--out={run_copy}", "--steps=8", "--lr=1e38", "--clip=0",
                        "--schedule=constant", f"--max_skips={skips}", "--weight_decay=0")
    assert rc == 2 and err.splitlines()[-1].startswith("error: "), (out, err)
    assert {path: path.stat().st_mtime_ns for path in (run_copy / "ckpt").rglob("*") if path.is_file()} == before
    assert all(torch.isfinite(p).all() for p in load(run_copy).parameters())


def test_a_second_training_with_the_same_out_is_refused_by_name(run_copy: Path, tiny_run: Path) -> None:
    code = "import sys, time; from system.files import lock; lock(sys.argv[1]); print('ready', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(run_copy)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    rc, _, err = call("train.py", tiny_run.parent / "tiny_run.py", f"--out={run_copy}", "--steps=6")
    other.kill()
    other.wait()
    assert rc == 2 and f"{run_copy} is being written by process {other.pid} on" in err
    assert json.loads((run_copy / "config.json").read_text())["steps"] == 4


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the test reads /proc")
@pytest.mark.parametrize("moment", ["torch is imported", "the folder is locked"])
def test_ctrl_c_before_the_first_step_is_one_line(moment: str, tiny_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), str(tiny_run.parent / "tiny_run.py"), f"--out={tmp_path}/run", "--steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ})
    maps, lock, until = Path(f"/proc/{process.pid}/maps"), tmp_path / "run/lock", time.monotonic() + 100
    while not (lock.exists() if "locked" in moment else "libtorch" in maps.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err and process.returncode in (130, 0, -2), err
    assert not (tmp_path / "run/lock").exists()


def test_a_wav_written_to_a_full_device_leaves_the_device(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    rc, _, err = call("sample.py", "--ckpt", tiny_run, "--text=one", "--max_frames=2", f"--out={tmp_path}/full")
    assert rc == 2 and "No space left on device" in err and (tmp_path / "full").is_symlink() and Path("/dev/full").is_char_device()
