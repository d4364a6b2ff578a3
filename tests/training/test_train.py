"""train.py through its command line: resume is exact, ranks and accumulation change nothing, every ending is clean."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, ROOT, call, cli, write_clips
from safetensors.torch import load_file

import lora
from checkpoint import load
from families.tensor_files import read_tensors
from options import read_json
from training.run_state import point

NO_NOISE = ("--model.dropout=0", "--model.input_drop=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file with twelve clips beside it, prepared once."""
    folder = tmp_path_factory.mktemp("train")
    write_clips(folder / "clips", 24)
    (folder / "config.py").write_text(CONFIG.replace("ModelConfig(table, ", "ModelConfig(table, dropout=0.1, input_drop=0.5, temporal="))
    rows = [json.loads(line) for line in (folder / "clips" / "manifest.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"split": "train" if row["split"] == "train" else "held-out"}) + "\n" for row in rows)
    (folder / "clips" / "manifest.jsonl").write_text(text)
    return folder


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "train.py", str(folder / "config.py"), *options]


def train(folder: Path, *options: str, ranks: int = 0, torchrun: bool = False, expect: int = 0) -> str:
    """Run train.py to its end, with ranks as processes of their own; returns what it printed."""
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        done = subprocess.run([*start, *command(folder, *options)[1:]], cwd=ROOT, capture_output=True, text=True, timeout=240)
        rc, out, err = done.returncode, done.stdout, done.stderr
    elif ranks:                                                # what torchrun starts, without the seconds that it takes itself
        here = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randint(20000, 30000))}
        started = [subprocess.Popen(command(folder, *options), cwd=ROOT, env={**os.environ, **here, "RANK": str(n), "LOCAL_RANK": str(n)},
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for n in range(ranks)]
        said = [process.communicate(timeout=240)[0] for process in started]
        rc, out, err = max(abs(process.returncode) for process in started), "".join(said), ""
    else:
        rc, out, err = call("train.py", folder / "config.py", *options)
    assert rc == expect, out + err
    return out + err


def start(folder: Path, *options: str) -> str:
    """The same in a process of its own."""
    rc, out, err = cli("train.py", folder / "config.py", *options)
    assert rc == 0, out + err
    return out


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows(out) if "train/loss" in row]


def final(out: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return read_tensors(out / "ckpt" / "latest" / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all((a[n] - b[n]).abs().max() <= tolerance for n in a)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that nobody interrupted: twelve steps, with dropout and hidden inputs."""
    train(folder, f"--out={folder}/whole", "--steps=12", "--save_every=3", "--ema=0.9", "--eval_every=6")
    return folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_and_resumed_equals_never_killed(folder: Path, whole: Path, seed: int) -> None:
    out, draw = folder / f"killed{seed}", random.Random(seed)
    options = (f"--out={out}", "--steps=12", "--save_every=3", "--ema=0.9", "--eval_every=6")
    for moment in sorted(draw.sample(range(1, 12), 2)):
        process = subprocess.Popen(command(folder, *options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not ((out / "metrics.jsonl").exists() and len(losses_if_any(out)) > moment):
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.wait()
    start(folder, *options)
    assert losses(out) == losses(whole)                        # bit-equal: the numbers are printed in full
    for name in ("model.safetensors", "ema.safetensors", "state/optimizer.safetensors"):
        assert same(final(out, name), final(whole, name))
    assert not list((out / "ckpt").glob(".writing*"))


def losses_if_any(out: Path) -> list[str]:
    return [line for line in (out / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]


def test_training_learns(whole: Path) -> None:
    numbers = [value for _, value in losses(whole)]
    assert len(numbers) == 12 and numbers[-1] < numbers[0] and abs(numbers[0] - math.log(258) - math.log(2)) < 1.0


@pytest.mark.slow
def test_ranks_and_accumulation_change_nothing(folder: Path) -> None:
    common = ("--steps=4", *NO_NOISE, "--schedule=constant")
    train(folder, f"--out={folder}/r1", "--accum=4", *common)
    train(folder, f"--out={folder}/r2", "--accum=2", *common, ranks=2, torchrun=True)
    train(folder, f"--out={folder}/r4", "--accum=1", "--shard=true", "--shard_size=2", *common, ranks=4)     # two copies, two parts
    for out in ("r2", "r4"):
        for (step, one), (_, other) in zip(losses(folder / "r1"), losses(folder / out), strict=True):
            assert abs(one - other) < 1e-6, (step, out)
        assert same(final(folder / "r1"), final(folder / out), 1e-6)


@pytest.mark.slow
def test_a_rank_run_resumes_exactly(folder: Path) -> None:
    common = ("--steps=6", "--save_every=3")
    train(folder, f"--out={folder}/d_parts", "--steps=3", "--save_every=3", "--schedule=constant", ranks=2)
    assert (folder / "d_parts/ckpt/latest/state/rng_rank1.safetensors").is_file()
    train(folder, f"--out={folder}/d_again", *common, "--schedule=constant", ranks=2)
    train(folder, f"--out={folder}/d_parts", *common, "--schedule=constant", ranks=2)
    assert losses(folder / "d_parts") == losses(folder / "d_again") and same(final(folder / "d_parts"), final(folder / "d_again"))


@pytest.mark.slow
def test_shards_train_save_and_resume_as_one_process_does(folder: Path, whole: Path) -> None:
    """Adapters on a base of 8 bits, of which each rank reads its rows. The test of ranks and accumulation shards all weights."""
    common = ("--steps=4", "--save_every=2", "--eval_every=3", "--ema=0.9", "--clip=0.1", "--eps=1e-4", "--keep=4", *NO_NOISE,
              f"--init={whole}", "--quantize=int8", "--lora.rank=4", "--lora.targets=attn.*,ffn.*", "--lora.dora=true",
              "--lora.train=audio_head")
    shards = (*common, "--accum=1", "--shard=true")
    train(folder, f"--out={folder}/s_one", "--accum=2", *common)
    train(folder, f"--out={folder}/s_two", *shards, ranks=2)
    one, two = (losses(folder / name) for name in ("s_one", "s_two"))
    assert len(one) == 4 and max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-6
    for name in ("adapter.safetensors", "ema.safetensors", "state/optimizer.safetensors"):
        assert same(final(folder / "s_one", name), final(folder / "s_two", name), 1e-6)
    evaluated = [[row["val/loss"] for row in rows(folder / name) if "val/loss" in row] for name in ("s_one", "s_two")]
    assert len(evaluated[0]) == 2 and max(abs(a - b) for a, b in zip(*evaluated, strict=True)) < 1e-6
    shutil.copytree(folder / "s_two", folder / "s_again", symlinks=True)
    point(folder / "s_again/ckpt/latest", "step_000002")
    train(folder, f"--out={folder}/s_again", *shards, ranks=2)
    for name in ("adapter.safetensors", "ema.safetensors", "state/optimizer.safetensors"):
        assert same(final(folder / "s_again", name), final(folder / "s_two", name))


def test_terminated_runs_save_and_continue(folder: Path) -> None:
    out = folder / "term"
    options = (f"--out={out}", "--steps=2000", "--log_every=1")
    process = subprocess.Popen(command(folder, *options), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not ((out / "metrics.jsonl").exists() and len(losses_if_any(out)) > 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM before step" in said
    step = read_json(out / "ckpt/latest/state/run.json")["step"]
    said = train(folder, f"--out={out}", f"--steps={step + 2}", "--log_every=1")
    assert f"at step {step}" in said and f"steps: 2000 -> {step + 2}" in said
    assert [s for s, _ in losses(out)] == list(range(step + 2))


def test_a_kill_between_the_two_renames_of_a_replaced_checkpoint_loses_nothing(folder: Path) -> None:
    out = folder / "renamed"
    train(folder, f"--out={out}", "--steps=2")
    (out / "ckpt/step_000002").rename(out / "ckpt/.old_step_000002")
    said = train(folder, f"--out={out}", "--steps=3")
    assert "at step 2" in said and (out / "ckpt/latest").resolve().name == "step_000003"


def test_time_limit_stops_and_saves(folder: Path) -> None:
    said = train(folder, f"--out={folder}/late", "--max_minutes=0.0000001")
    assert "stopped by --max_minutes before step 0" in said and (folder / "late/ckpt/step_000000/model.safetensors").is_file()


def test_a_finished_run_that_is_started_again_does_nothing(folder: Path, whole: Path) -> None:
    before = final(whole)
    stamp = (whole / "ckpt/latest/model.safetensors").stat().st_mtime_ns
    train(folder, f"--out={whole}", "--steps=12", "--save_every=3", "--ema=0.9", "--eval_every=6")
    assert same(before, final(whole)) and (whole / "ckpt/latest/model.safetensors").stat().st_mtime_ns == stamp


def test_old_checkpoints_go_and_the_best_and_the_latest_stay(whole: Path) -> None:
    kept = sorted(p.name for p in (whole / "ckpt").glob("step_*"))
    best, latest = ((whole / "ckpt" / name).resolve().name for name in ("best", "latest"))
    assert latest == "step_000012" and {best, latest} <= set(kept) and len(kept) <= 3


def test_resume_never_refuses_an_existing_run(folder: Path, whole: Path) -> None:
    assert "choose another --out" in train(folder, f"--out={whole}", "--resume=never", expect=2)


def test_sampling_uses_the_averaged_weights(whole: Path) -> None:
    averaged, raw = final(whole, "ema.safetensors"), final(whole)
    model = load(whole)
    assert all(torch.equal(p, averaged[n]) for n, p in model.named_parameters()) and not same(averaged, raw)


@pytest.mark.slow
def test_a_lora_run_saves_its_base_once_and_small_adapters(folder: Path) -> None:
    out = folder / "lora"
    options = (f"--out={out}", "--lora.rank=4", "--lora.targets=attn.*,ffn.*", "--lora.train=text_head", "--save_every=2")
    said = train(folder, *options, "--steps=4")
    assert "trained" in said and (out / "base/model.safetensors").is_file() and not list((out / "ckpt").glob("*/model.safetensors"))
    model = load(out)
    assert len(lora.norms(model)) == 4 + 3 and min(lora.norms(model).values()) > 0
    assert same(load_file(out / "base/model.safetensors"), {n: p for n, p in model.state_dict().items() if "lora_" not in n}
                | {"text_head.weight": load_file(out / "base/model.safetensors")["text_head.weight"]})
    train(folder, *options, "--steps=6", f"--init_adapter={out}", f"--out={folder}/second")
    first, second = load(out), load(folder / "second")
    assert torch.equal(first.embed["audio"].weight, second.embed["audio"].weight)


def test_fine_tuning_starts_where_the_other_run_ended(folder: Path, whole: Path) -> None:
    train(folder, f"--out={folder}/tuned", f"--init={whole}", "--steps=1", "--lr=1e-9", *NO_NOISE)
    assert same(final(folder / "tuned"), final(whole, "ema.safetensors"), 1e-6)


def test_parts_have_rates_of_their_own_and_0_freezes(folder: Path, whole: Path) -> None:
    """The first update of AdamW moves every weight that has a gradient by the rate."""
    rates = "(('attn.q',1),('temporal.*',0),('audio_head',0.5))"
    said = train(folder, f"--out={folder}/rates", f"--init={whole}", f"--rates={rates}", "--steps=1", "--lr=1e-3", "--weight_decay=0",
                 "--eps=1e-20", *NO_NOISE)
    before, after = load(whole).state_dict(), final(folder / "rates")
    moved = {n: float((after[n] - before[n]).abs().max()) for n in after}
    for name, distance in moved.items():
        wanted = {"audio_head.weight": 5e-4, "text_head.weight": 0.0}.get(name, 1e-3 if "temporal" not in name or ".q." in name else 0.0)
        assert abs(distance - wanted) < 1e-6, name                      # the clips are single words: no text target
    assert f"{sum(t.numel() for n, t in after.items() if 'temporal' not in n or '.q.' in n):,} trained" in said
    assert "'depth' matches nothing" in train(folder, f"--out={folder}/x", "--rates=(('depth',0.5),)", expect=2)


def test_a_pretrained_model_that_only_guesses_raises_the_alarm(folder: Path) -> None:
    train(folder, f"--out={folder}/fresh", "--steps=1", "--lr=1e-9")
    assert "a random guess has" in train(folder, f"--out={folder}/alarm", f"--init={folder}/fresh", "--steps=1")


def test_a_non_finite_gradient_is_skipped_named_and_ends_the_run_after_a_while(folder: Path) -> None:
    said = train(folder, f"--out={folder}/nan", "--steps=9", "--loss.audio=1e39", "--max_skips=3", expect=2)
    assert said.count("step skipped; it read") == 3 and "3 steps in a row" in said and "Traceback" not in said
    assert any(name in said for name in ("'0'", "'1'", "'2'"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_trains(folder: Path, whole: Path, dtype: str) -> None:
    train(folder, f"--out={folder}/{dtype}", "--steps=3", f"--dtype={dtype}", *NO_NOISE)
    numbers = losses(folder / dtype)
    assert abs(numbers[0][1] - losses(whole)[0][1]) < 0.1
    assert all(t.dtype == torch.float32 for t in final(folder / dtype).values())               # fp32 masters


def test_bf16_is_used_where_the_cpu_has_it_and_warned_of_where_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    said = {dtype: start(folder, f"--out={folder}/a_{dtype}", "--steps=1", f"--dtype={dtype}") for dtype in ("auto", "fp32", "bf16")}
    assert [dtype for dtype in said if "--dtype=bf16, but this CPU has neither AVX-512 BF16 nor AMX" in said[dtype]] == ["bf16"]
    assert losses(folder / "a_auto") == losses(folder / "a_fp32") != losses(folder / "a_bf16")
    rc, _, err = cli("sample.py", f"--ckpt={folder}/a_auto", "--text=one", f"--out={folder}/a.wav", "--max_frames=2", "--dtype=bf16")
    assert rc == 0 and err.count("--dtype=bf16, but") == 1


def test_early_stopping(folder: Path) -> None:
    said = train(folder, f"--out={folder}/early", "--steps=40", "--eval_every=2", "--patience=2", "--lr=0")
    assert read_json(folder / "early/ckpt/latest/state/run.json")["step"] < 40 and "held-out loss" in said
    assert (folder / "early/ckpt/best").resolve().name == "step_000002"


def test_without_held_out_rows_no_held_out_loss_is_told(folder: Path) -> None:
    out = folder / "all"
    said = train(folder, f"--out={out}", "--steps=4", "--eval_every=2", "--patience=1", "--data.split=hash", "--data.held_out=0")
    assert "no validation data" in said and "held-out loss" not in said
    assert not any(name.startswith("val/") and name.endswith("loss") for row in rows(out) for name in row)
    assert (out / "ckpt/latest").resolve().name == "step_000004" and not (out / "ckpt/best").exists()


def test_checkpoints_hold_all_that_sampling_needs(whole: Path) -> None:
    about = read_json(whole / "ckpt/latest/config.json")
    assert about["data"] == {"codec": "tiny", "tokenizer": "words.json", "normaliser": "none", "system": "", "scene": "",
                             "contextual": False, "interleaver": "queue", "reference_in": "assistant", "thought": "", "spaces": True}
    assert load(whole).extras.data["tokenizer"] == str((whole / "ckpt/latest").resolve() / "words.json")


def test_nothing_but_safetensors_and_json_is_written(whole: Path) -> None:
    assert {p.suffix for p in (whole / "ckpt").rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_metrics_name_every_predicted_stream(whole: Path) -> None:
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    wanted = {"step", "train/loss", "train/cb1_loss", "train/cb8_accuracy", "grad_norm", "lr", "step_seconds", "columns_per_second",
              "tokens_per_second", "audio_seconds_per_second", "memory_gib"}
    assert wanted <= row.keys()
