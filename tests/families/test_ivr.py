"""The phone recipe: its schedule, epochs, second stage and fp16; its smoke twin's whole life; what it makes of bad input."""

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import load_file, save_file

from checkpoint import export, load
from config import learning_rate
from corpus.index import prepare
from data import Loader
from families.qwen import QWEN2_5_1_5B
from lora import LoraConfig, inject
from options import load_config, run_config

CONFIG = ROOT / "configs/ivr_qwen.py"
SMOKE = ("configs/ivr_qwen.py", "--smoke")


# ---- the recipe ----

def test_the_seeds_schedule_is_exact_at_the_six_updates() -> None:
    seed = run_config(CONFIG, "seed")
    assert (seed.lr, seed.warmup, seed.steps, seed.schedule, seed.warmup_offset) == (2e-5, 50, 500, "linear", 0)
    wanted = {1: 0.0, 2: 4e-7, 25: 9.6e-6, 50: 1.96e-5, 51: 2e-5, 500: 2e-5 / 450}
    for update, rate in wanted.items():
        assert learning_rate(update - 1, seed) == pytest.approx(rate, rel=1e-12, abs=0), update
    assert learning_rate(500, seed) == 0.0
    assert learning_rate(0, replace(seed, warmup_offset=1)) == pytest.approx(2e-5 / 50)


def test_the_recipe_adapts_the_four_projections_of_attention() -> None:
    config = run_config(CONFIG)
    assert config.model.temporal == QWEN2_5_1_5B.temporal and (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16.0, 0.05)
    assert config.lora.targets == ("attn.q", "attn.k", "attn.v", "attn.o")       # 2,179,072 parameters: test_lora.py counts them


def test_presets_are_values_of_the_file_and_an_unknown_one_names_the_others() -> None:
    assert load_config(["configs/ivr_qwen.py", "--preset=seed", "--lr=1e-5"]).dtype == "fp16"
    assert load_config(["configs/ivr_qwen.py", "--preset=smoke"]) == load_config([*SMOKE])
    second = load_config(["configs/ivr_qwen.py", "--preset=second"])
    assert second.init_adapter == "out/ivr_qwen" and (second.epochs, second.steps) == (5, 200)
    with pytest.raises(ValueError, match=r"defines no `sed` \(it has .*seed.*\)"):
        load_config(["configs/ivr_qwen.py", "--preset=sed"])


def test_an_adapter_to_start_from_needs_adapters() -> None:
    rc, _, err = call("train.py", "configs/tiny.py", "--smoke", "--init_adapter=out/x")
    assert rc == 2 and "add --lora.rank=8" in err and err.count("\n") == 1


# ---- running it ----

def train(folder: Path, *options: str, expect: int = 0) -> str:
    rc, out, err = call("train.py", *SMOKE, f"--data.cache={folder}/cache", *options)
    assert rc == expect, out + err
    return out + err


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two calls to learn and one held out, and an adapter trained on them for two steps."""
    folder = tmp_path_factory.mktemp("ivr")
    system = {"role": "system", "content": "Be brief."}
    calls = [{"id": str(n), "split": "train" if n < 5 else "test", "messages": [
        system, {"role": "user", "content": f"Where is {n}?"}, {"role": "assistant", "content": f"Order {n} is here."}]} for n in range(6)]
    (folder / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in calls))
    train(folder, *small_run(folder), "--steps=2", f"--out={folder}/first")
    return folder


def small_run(folder: Path) -> tuple[str, ...]:
    return (f"--data.sources={folder}/calls.jsonl", "--data.columns=64", "--batch_size=1", "--eval_every=0", "--save_every=0",
            "--lora.dropout=0")


def test_epochs_end_the_run_behind_the_last_example(small: Path) -> None:
    said = train(small, *small_run(small), "--epochs=3", "--accum=2", "--steps=100", "--lora.rank=4", f"--out={small}/epochs")
    told = int(said.split("3 epochs are ")[1].split()[0])
    found = rows(small / "epochs")
    assert [row["step"] for row in found if "train/loss" in row] == list(range(told)) and found[-1]["step"] == told
    assert found[-2]["lr"] == pytest.approx(5e-3 * 1 / (told - 4))                      # the decay ends with them
    said = train(small, *small_run(small), "--epochs=3", "--steps=2", f"--out={small}/fewer")
    assert "--steps=2 ends the run first" in said and rows(small / "fewer")[-1]["step"] == 2


def test_a_second_stage_starts_from_the_adapter_on_the_same_base(small: Path) -> None:
    said = train(small, *small_run(small), "--steps=1", "--lr=0", "--warmup=0", f"--init_adapter={small}/first", f"--out={small}/second")
    assert "resuming" not in said
    first, second = (load_file(small / name / "ckpt/latest/adapter.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)       # nothing learnt, nothing lost
    assert any(t.any() for n, t in first.items() if n.endswith("lora_B"))
    tokens = torch.randint(0, 500, (1, 1, 9))
    with torch.inference_mode():
        assert torch.equal(load(small / "first")(tokens)[0], load(small / "second")(tokens)[0])         # so the base is the same too
    said = train(small, *small_run(small), "--steps=2", "--lora.rank=2", f"--init_adapter={small}/first", f"--out={small}/third")
    assert "lora.rank: 2 -> 8" in said                                                                   # it says whose rank holds
    third = load_file(small / "third/ckpt/latest/adapter.safetensors")
    assert any(not torch.equal(first[n], third[n]) for n in first)


def test_fp16_halves_its_loss_scale_and_the_schedule_waits(small: Path) -> None:
    said = train(small, *small_run(small), "--dtype=fp16", "--steps=14", "--loss.text=400", f"--out={small}/fp16", "--max_skips=12")
    skipped = said.count("step skipped, loss scale")
    assert skipped >= 1 and "loss scale 65536 halves" in said
    state = json.loads((small / "fp16/ckpt/latest/state/run.json").read_text())
    assert state["skipped"] == skipped and state["scaler"]["scale"] == 65536 / 2**skipped
    found = [row for row in rows(small / "fp16") if "train/loss" in row]
    assert [row["lr"] for row in found[: skipped + 1]] == [found[0]["lr"]] * (skipped + 1)      # no update, no step of the schedule
    assert found[-1]["lr"] == pytest.approx(learning_rate(13 - skipped, replace(run_config(CONFIG, "smoke"), steps=14)))
    adapter = load_file(small / "fp16/ckpt/latest/adapter.safetensors")
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in adapter.values())
    assert any(t.any() for n, t in adapter.items() if n.endswith("lora_B"))


# ---- bad input ----

@pytest.fixture(scope="module")
def peft(small: Path) -> Path:
    rc, out, err = call("checkpoint.py", "export", small / "first", "--to=peft", f"--out={small}/peft")
    assert rc == 0, err
    return small / "peft"


def test_an_adapter_names_its_base_or_the_command_asks_for_it(small: Path, peft: Path, tmp_path: Path) -> None:
    said = train(small, *small_run(small), "--steps=1", "--lr=0", "--warmup=0", f"--init_adapter={peft}", f"--out={tmp_path}/again")
    assert "resuming" not in said
    tokens = torch.randint(0, 500, (1, 1, 9))
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "again")(tokens)[0], load(small / "first")(tokens)[0])
    shutil.copytree(peft, tmp_path / "nameless")
    about = json.loads((peft / "adapter_config.json").read_text())
    (tmp_path / "nameless/adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": None}))
    rc, _, err = call("train.py", *SMOKE, f"--data.cache={small}/cache", *small_run(small), f"--init_adapter={tmp_path}/nameless",
                      f"--out={tmp_path}/x")
    assert rc == 2 and "does not say which model it belongs to; name both:" in err and "--init=MODEL --init_adapter=ADAPTER" in err


@pytest.mark.parametrize("field, value", [("use_qalora", True), ("corda_config", {"rho": 2}), ("lora_bias", True), ("mystery", 3)])
def test_an_adapter_with_a_field_that_changes_its_meaning_is_refused(peft: Path, tmp_path: Path, field: str, value: object) -> None:
    for file in peft.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    about = json.loads((peft / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(about | {field: value}))
    base = load(peft.parent / "first/base", adapter=peft)
    assert base.lora.rank == 8
    with pytest.raises(ValueError, match=field) as error:
        load(peft.parent / "first/base", adapter=tmp_path)
    assert "\n" not in str(error.value)


def test_a_dora_adapter_is_applied_and_one_without_its_magnitudes_refused(peft: Path, tmp_path: Path) -> None:
    base = load(peft.parent / "first/base")
    inject(base, LoraConfig(rank=2, targets=("attn.q",), dora=True))
    for module in base.modules():
        if getattr(module, "adapter", None) is not None:
            torch.nn.init.normal_(module.adapter.lora_B)
            module.adapter.lora_magnitude.data.mul_(1.5)
    export(base, tmp_path / "dora", to="peft")
    tokens = torch.randint(0, 500, (1, 1, 9))
    with torch.inference_mode():
        assert torch.equal(load(peft.parent / "first/base", adapter=tmp_path / "dora")(tokens)[0], base.eval()(tokens)[0])
    tensors = load_file(tmp_path / "dora/adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "magnitude" not in n}, tmp_path / "dora/adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing") as error:
        load(peft.parent / "first/base", adapter=tmp_path / "dora")
    assert "\n" not in str(error.value)


# ---- its whole life ----

def run(*args: object) -> str:
    rc, out, err = call(*args)
    assert rc == 0, out + err
    return out + err


@pytest.mark.slow
def test_smoke_learns_calls_resumes_is_evaluated_converses_and_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny Qwen is trained on general sentences, then the recipe on top of it: held-out perplexity falls below the base's."""
    cache = f"--data.cache={tmp_path}/cache"
    run("train.py", "configs/ivr_qwen.py", "--preset=base", cache, f"--out={tmp_path}/base")
    common = (*SMOKE, cache, f"--init={tmp_path}/base", f"--out={tmp_path}/run")
    run("train.py", *common, "--steps=20", "--schedule=constant")
    assert "resuming" in run("train.py", *common)
    assert [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row] == list(range(40))
    print(run("evaluate.py", "report", tmp_path / "run", "--sources=assets/ivr/test.jsonl", "--rounds=100", "--replies=6",
              "--max_tokens=24"))
    told = json.loads((tmp_path / "run/report/summary.json").read_text())
    found = {line["model"]: line["perplexity"] for line in told["losses"] if line["stream"] == "text"}
    assert found["run"][0] < 0.4 * found["base"][0] and found["run"][2] < found["base"][1], found        # their intervals are apart
    assert found["base"][0] == pytest.approx(alone(tmp_path / "base", tmp_path / "cache"), rel=1e-4)     # adapters off is that base
    assert told["replies"]["reference"]["made-up entities"][0] == 0 and (tmp_path / "run/report/index.html").is_file()
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is my order?\nquit\n"))
    said = run("sample.py", "--ckpt", tmp_path / "run", "--chat", f"--out={tmp_path}/talk.wav", "--max_frames=12")
    assert "adapter applied" in said and "2 turns of session" in said
    model, tokens = load(tmp_path / "run"), torch.randint(0, 500, (2, 1, 11))
    for layout in ("hf", "peft"):
        run("checkpoint.py", "export", tmp_path / "run", f"--to={layout}", f"--out={tmp_path}/{layout}")
    run("checkpoint.py", "import", tmp_path / "hf", f"--out={tmp_path}/back")
    with torch.inference_mode():
        wanted = model(tokens)[0]
        assert float((load(tmp_path / "back")(tokens)[0] - wanted).abs().max()) < 1e-4
        assert torch.equal(load(tmp_path / "base", adapter=tmp_path / "peft")(tokens)[0], wanted)


def alone(folder: Path, cache: Path) -> float:
    """Perplexity of a model on the test calls, by the loader."""
    model, nll, weight = load(folder), 0.0, 0.0
    data = replace(run_config(CONFIG, "smoke").data, cache=str(cache), sources=("assets/ivr/test.jsonl",),
                   tokenizer=model.extras.data["tokenizer"])
    prepare(data, model.table)
    with torch.inference_mode():
        for batch in Loader(data, model.table, "held-out", 2):
            sums = model(batch.tokens, batch.weights, batch.positions, batch.segments)
            nll, weight = nll + float(sums.nll.sum()), weight + float(sums.weight.sum())
    return math.exp(nll / weight)
