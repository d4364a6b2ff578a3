"""Preferences between replies: the loss by hand, its gradient, its reference, its pairs in a batch; its smoke run."""

import copy
import io
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import ROOT, call
from fake_corpus import fake_data
from safetensors.torch import load_file
from tables import CONFIGS, grid

from checkpoint import load
from config import DpoConfig
from corpus.bundled import demo_dialogues
from corpus.data_config import DataConfig
from corpus.index import prepare
from corpus.layouts import read_manifest
from corpus.phone_calls import ungrounded
from data import Batch, Loader, collate
from lora import LoraConfig, inject, switched_off
from model import MultistreamLM
from options import run_config
from streams import Stream, StreamTable
from training.objective import Preference, preference_loss

IVR = ROOT / "assets/ivr/preferences.jsonl"
SHAPES = ["qwen", "text", "dual", "depth", "duplex", "tails"]       # Qwen, Higgs, a depth transformer, Moshi, MOSS-Speech


# ---- the equation ----

def test_the_loss_of_a_case_computed_by_hand() -> None:
    goal = Preference(torch.nn.Linear(1, 1), DpoConfig(beta=0.5, label_smoothing=0.1))
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 3, -1], [0, 1, 1, 1, 1, -1, -1, -1]])
    reference = torch.tensor([1.0, 2.0, 0.0, 4.0, 1.0, 0.5, 0.0, 0.0, 3.0, 0.0, 2.0, 0.0, 0.0, 0.0])
    policy = torch.tensor([0.5, 1.0, 0.0, 5.0, 1.0, 2.5, 0.0, 0.0, 3.0, 0.0, 4.0, 0.0, 0.0, 0.0])
    rewards = goal.rewards(policy, reference, segments)
    # row 0: 0.5 * ((1 - .5) + (2 - 1)) = 0.75 against 0.5 * (4 - 5) = -0.5; 0 against 0.5 * (0.5 - 2.5) = -1; row 1: 0 against -1
    assert rewards[0, :2].tolist() == [[0.75, -0.5], [0.0, -1.0]] and rewards[1, 0].tolist() == [0.0, -1.0]
    assert goal.real(segments).tolist() == [[True, True, False, False], [True, False, False, False]]
    assert goal.count(torch.zeros(2, 1, 8), segments).tolist() == [3.0]
    for margin, wanted in ((1.25, 0.9 * math.log(1 + math.exp(-1.25)) + 0.1 * math.log(1 + math.exp(1.25))),
                           (0.0, math.log(2)), (-3.0, 0.9 * math.log(1 + math.exp(3)) + 0.1 * math.log(1 + math.exp(-3)))):
        assert float(preference_loss(torch.tensor(margin), goal.config)) == pytest.approx(wanted, rel=1e-6)
    assert float(preference_loss(torch.tensor(1.25), DpoConfig())) == pytest.approx(0.2519, abs=1e-4)


def adapted(name: str) -> tuple[MultistreamLM, MultistreamLM]:
    """A model, and itself with adapters that do something."""
    torch.manual_seed(3)
    plain = MultistreamLM(CONFIGS[name]).eval()
    model = inject(copy.deepcopy(plain), LoraConfig(rank=2, targets=("attn.*",)))
    torch.manual_seed(4)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return plain, model


def pairs_of(name: str, count: int) -> list[list[tuple[str, tuple[torch.Tensor, torch.Tensor], int]]]:
    """`count` pairs of grids; weights of their own for every target."""
    units = []
    for n in range(count):
        sides = [grid(CONFIGS[name], 10 * n + side, columns=11 + side + n) for side in range(2)]
        draw = torch.Generator().manual_seed(n)
        units.append([(str(n), (tokens[0], w[0] * (0.5 + torch.rand(w[0].shape, generator=draw))), -1) for tokens, w in sides])
    return units


def tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.tokens, batch.weights, batch.positions, batch.segments


def log_probability(model: MultistreamLM, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over targets of w * log p, written out.   (K, S) twice"""
    text, audio = model(tokens[None])
    total, table = torch.zeros((), dtype=torch.float64), model.table
    for rows, logits in ((table.text_out, None if text is None else text[:, None]), (table.audio_out, audio)):
        for place, k in enumerate(rows):
            for s in range(1, tokens.shape[1]):
                if weights[k, s] > 0 and tokens[k, s] >= 0:
                    total = total + weights[k, s] * F.log_softmax(logits[0, place, s - 1], -1)[tokens[k, s]]
    return total


@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradient_equal_a_naive_implementation(name: str) -> None:
    plain, model = adapted(name)
    config, units, exact = DpoConfig(beta=0.3, label_smoothing=0.05), pairs_of(name, 3), copy.deepcopy(model).double()
    plain, naive, rewards = plain.double(), torch.zeros(()), []
    for (_, better, _), (_, worse, _) in units:
        with torch.no_grad():
            base = [log_probability(plain, *side) for side in (better, worse)]
        sides = [config.beta * (log_probability(exact, *side) - b) for side, b in zip((better, worse), base, strict=True)]
        h = sides[0] - sides[1]
        naive = naive - 0.95 * torch.log(torch.sigmoid(h)) / 3 - 0.05 * torch.log(torch.sigmoid(-h)) / 3
        rewards.append([side.item() for side in sides])
    naive.backward()
    wanted = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}

    goal = Preference(model, config)
    for rows in ([[units[0] + units[1], units[2]]], [[unit] for unit in units]):     # one batch, and micro-batches of one row
        batches = [collate(row, {}) for row in rows]
        model.zero_grad()
        scale = goal.scale(sum(goal.count(b.weights, b.segments) for b in batches))
        total = goal.zero()
        for batch in batches:
            loss, found = goal.sums(model, tensors(batch))
            (scale.float() * loss).sum().backward()
            total += found
        numbers = goal.report(total)
        assert numbers["loss"] == pytest.approx(naive.item(), rel=1e-4)
        assert numbers["reward_chosen"] == pytest.approx(sum(r[0] for r in rewards) / 3, rel=1e-3, abs=1e-4)
        assert numbers["reward_margin"] == pytest.approx(sum(a - b for a, b in rewards) / 3, rel=1e-3, abs=1e-4)
        assert numbers["reward_accuracy"] == pytest.approx(sum(a > b for a, b in rewards) / 3)
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert got.keys() == wanted.keys() and all("lora_" in n for n in got) and any(g.abs().max() > 1e-3 for g in got.values())
        for n in wanted:
            assert (got[n] - wanted[n]).abs().max() <= 1e-4 * max(g.abs().max() for g in wanted.values()), n


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_the_base_bit_for_bit(name: str) -> None:
    plain, model = adapted(name)
    model.train()
    batch = collate([pairs_of(name, 1)[0]], {})
    with torch.no_grad():
        changed = model(*tensors(batch)).places
        with switched_off(model):
            assert not model.training and torch.equal(model(*tensors(batch)).places, plain(*tensors(batch)).places)
        assert model.training and torch.equal(model(*tensors(batch)).places, changed)
        assert not torch.equal(changed, plain(*tensors(batch)).places)


def test_an_untouched_adapter_prefers_nothing() -> None:
    torch.manual_seed(0)
    model = inject(MultistreamLM(CONFIGS["dual"]), LoraConfig(rank=2, targets=("attn.*",)))
    goal = Preference(model, DpoConfig())
    loss, found = goal.sums(model, tensors(collate(pairs_of("dual", 4), {})))
    numbers = goal.report(found)
    assert numbers["loss"] == pytest.approx(math.log(2)) and numbers["reward_margin"] == 0 and numbers["reward_accuracy"] == 0
    loss.sum().backward()                                # and still it learns
    assert any(p.grad is not None and p.grad.abs().max() > 1e-4 for p in model.parameters())


@pytest.mark.parametrize("option, said", [
    ("--dpo.beta=0", "beta 0.0 is not positive"), ("--dpo.label_smoothing=0.5", "outside"), ("--lora=none", "add --lora.rank=8"),
    ("--lora.train=text_head", "checkpoint.py merge"), ("--init_adapter=out/x", "checkpoint.py merge")])
def test_what_does_not_fit_is_one_line(option: str, said: str) -> None:
    rc, _, err = call("train.py", "configs/ivr_dpo.py", "--smoke", option)
    assert rc == 2 and said in err and err.count("\n") == 1, err


# ---- pairs ----

def config(folder: Path, **changes: object) -> tuple[DataConfig, StreamTable]:
    smoke = run_config(ROOT / "configs/ivr_dpo.py", "smoke")
    changes |= {"sources": (str(folder / "pairs.jsonl"),), "cache": str(folder / "cache"), "prefetch": 0}
    return replace(smoke.data, **changes), smoke.model.table


def write(folder: Path, *lines: object) -> Path:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


ASK = [{"role": "user", "content": "Where is it?"}]
PAIR = {"id": "a", "messages": ASK, "chosen": "On its way.", "rejected": "No."}
TRL = {"id": "b", "prompt": ASK, "chosen": [{"role": "assistant", "content": "Here."}],
       "rejected": [{"role": "assistant", "content": "Go."}]}


def test_both_sides_lie_side_by_side_and_differ_in_the_reply_alone(tmp_path: Path) -> None:
    third = {"id": "c", "prompt": "Hello?", "chosen": "Good day.", "rejected": "What."}
    data, table = config(write(tmp_path, PAIR, TRL, third), columns=200)
    prepare(data, table)
    loader = Loader(data, table, passes=1, pairs=True)
    seen = []
    for batch in loader:
        tokens, weights, segments = batch.tokens[0, 0], batch.weights[0, 0], batch.segments[0]
        assert segments.max() % 2 == 1 and len(batch.names[0]) == segments.max() + 1
        for n in range(0, int(segments.max()), 2):
            (a, x), (b, y) = ((tokens[segments == n + side], weights[segments == n + side]) for side in range(2))
            first, other = int(x.nonzero()[0]), int(y.nonzero()[0])
            assert first == other and torch.equal(a[:first], b[:first]) and not torch.equal(a, b)        # the same until a reply begins
            assert batch.names[0][n] == batch.names[0][n + 1]
            seen.append(batch.names[0][n])
    assert sorted(seen) == ["a", "b", "c"]
    chosen = list(Loader(data, table, passes=1))                                    # without pairs: fine-tuning on what is chosen
    assert sorted(n for batch in chosen for n in batch.names[0]) == ["a", "b", "c"] and all(b.segments.max() <= 2 for b in chosen)


def test_a_row_without_its_other_side_and_a_pair_that_is_too_long_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plain = {"id": "p", "messages": [*ASK, {"role": "assistant", "content": "Yes."}]}
    data, table = config(write(tmp_path, PAIR, plain))
    prepare(data, table)
    with pytest.raises(ValueError, match='1 examples have no rejected reply \\(p\\); give all "chosen" and "rejected"'):
        Loader(data, table, pairs=True)
    data, table = config(write(tmp_path, PAIR, PAIR | {"id": "long", "rejected": "no " * 200}), columns=400)
    prepare(data, table)
    assert [n for batch in Loader(data, table, passes=1, pairs=True) for n in batch.names[0]] == ["a", "a"]
    assert "left out: long has" in capsys.readouterr().err


@pytest.mark.parametrize("row, reason", [
    ({"messages": ASK, "chosen": "Yes.", "rejected": 3}, "malformed messages"),
    ({"messages": "hello", "chosen": "Yes.", "rejected": "No."}, "malformed pair"),
    ({"chosen": "Yes.", "rejected": "No."}, "malformed pair"),
    ({"messages": ASK, "chosen": "Yes.", "rejected": "<think>No."}, "reasoning in a turn")])
def test_a_malformed_pair_is_left_out_with_its_reason(row: dict, reason: str, tmp_path: Path) -> None:
    m = read_manifest(write(tmp_path, PAIR, {"id": "x"} | row) / "pairs.jsonl")
    assert [r["id"] for r in m.rows] == ["a"] and [b.reason for b in m.bad] == [reason]


def test_check_writes_pairs_that_read_back_alike(tmp_path: Path) -> None:
    write(tmp_path, PAIR, TRL)
    rc, out, err = call("data.py", "check", tmp_path / "pairs.jsonl", f"--write={tmp_path}/kept")
    assert rc == 0 and "kept 2 rows" in out, out + err
    first, second = read_manifest(tmp_path / "pairs.jsonl"), read_manifest(tmp_path / "kept/pairs.kept.jsonl")
    for a, b in zip(first.rows, second.rows, strict=True):
        assert (a["messages"], a["rejected"]["messages"], a["start_index"]) == (b["messages"], b["rejected"]["messages"], b["start_index"])


TALK = StreamTable((Stream("text", "text", 260, 256, start=259), *(Stream(f"a{i}", "audio", 66, 64, i, 64) for i in range(2)),
                    *(Stream(f"u{i}", "audio", 66, 0, i, 64) for i in range(2))), "duplex", aligned=True)


def test_recordings_are_the_sides_of_a_duplex_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talks = tmp_path / "talks"
    talks.mkdir()
    for n, name in enumerate(("good", "bad", "alone")):
        noise = 0.1 * np.random.default_rng(n).standard_normal((16000 * (1 + n), 2))
        soundfile.write(talks / f"{name}.wav", noise, 16000)
        (talks / f"{name}.json").write_text(json.dumps({"alignments": [[name, [0.1, 0.4], "SPEAKER_MAIN"], ["hm", [0.5, 0.7], "x"]]}))
    write(talks, {"id": "d", "chosen": {"path": "good.wav"}, "rejected": {"path": "bad.wav"}},
          {"id": "e", "chosen": {"path": "good.wav"}, "rejected": {"path": "missing.wav"}})
    m = read_manifest(talks / "pairs.jsonl")
    assert m.kind == "stereo dialogues" and [r["id"] for r in m.rows] == ["d"] and [b.reason for b in m.bad] == ["no alignment file"]
    data = replace(fake_data(tmp_path, monkeypatch), sources=(str(talks / "pairs.jsonl"),), held_out=0.0, both_speakers=True)
    index = prepare(data, TALK)
    assert [(e.id, e.split, e.rejected) for e in index.entries] == [("d#rejected", "", -1), ("d", "train", 0)]
    batch = next(iter(Loader(data, TALK, pairs=True, passes=1)))
    lengths = [int((batch.segments == n).sum()) for n in range(2)]
    assert lengths[1] - lengths[0] == 25 and batch.names == [["d", "d"]]          # a second of frames
    assert all(batch.weights[:, k][batch.segments >= 0].any() == (k < 3) for k in range(5))
    with pytest.raises(ValueError, match="no usable row"):
        prepare(replace(data, chunk_seconds=1.5), TALK)              # the rejected side would be cut in two


def ivr_rows() -> Iterator[dict]:
    yield from map(json.loads, IVR.read_text(encoding="utf-8").splitlines())


def test_bundled_pairs_are_what_they_say_and_no_call_is_on_both_sides(tmp_path: Path) -> None:
    sides: dict[str, set[str]] = {}
    kinds = dict.fromkeys(("made up", "curt"), 0)
    for row in ivr_rows():
        context = "\n".join(m["content"] for m in row["messages"])
        assert row["messages"][-1]["role"] != "assistant" and row["chosen"] != row["rejected"]
        assert not ungrounded(row["chosen"], context)
        if row["kind"] == "made up":
            assert ungrounded(row["rejected"], context), row["id"]
        else:
            assert len(row["rejected"].split()) <= 4 and not ungrounded(row["rejected"], context)
        sides.setdefault(row["group"], set()).add(row["split"])
        kinds[row["kind"]] += 1
    assert all(len(found) == 1 for found in sides.values()) and {"train", "held-out"} == set.union(*sides.values())
    assert min(kinds.values()) > 100
    rc, _, err = call("assets/build_preferences.py", f"--out={tmp_path}")
    assert rc == 0 and (tmp_path / "preferences.jsonl").read_bytes() == IVR.read_bytes(), err


# ---- running it ----

def few_pairs(folder: Path) -> tuple[str, ...]:
    rows = list(ivr_rows())
    few = [row for split, count in (("train", 24), ("held-out", 8)) for row in [r for r in rows if r["split"] == split][::3][:count]]
    return (f"--data.sources={write(folder, *few)}/pairs.jsonl", f"--data.cache={folder}/cache", "--data.prefetch=0", "--data.columns=400",
            "--eval_batches=0", "--schedule=constant", "--warmup=0", "--batch_size=1")


def run(folder: Path, name: str, *options: str) -> Path:
    rc, out, err = call("train.py", "configs/ivr_dpo.py", "--smoke", f"--out={folder}/{name}", *few_pairs(folder), *options)
    assert rc == 0, out + err
    return folder / name


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "ckpt/latest/adapter.safetensors")


def test_resume_is_bitwise_and_accumulation_changes_nothing(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", "--steps=4", "--accum=2", "--eval_every=2", "--seed=1")
    half = run(tmp_path, "half", "--steps=2", "--accum=2", "--eval_every=2", "--seed=1")
    run(tmp_path, "half", "--steps=4", "--accum=2", "--eval_every=2", "--seed=1")
    one = run(tmp_path, "one", "--steps=4", "--batch_size=2", "--eval_every=2", "--seed=1")
    a, b, c = map(weights_of, (whole, half, one))
    assert all(torch.equal(a[n], b[n]) for n in a) and a.keys() == b.keys()
    assert all(torch.allclose(a[n], c[n], atol=2e-4) for n in a)                    # AdamW's first steps magnify rounding
    numbers = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, half, one)]
    for x, y, z in zip(*numbers, strict=True):
        timeless = [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in (x, y)]
        assert timeless[0] == timeless[1]
        for key in ("train/loss", "train/reward_margin"):
            assert (key in z) == (key in x) and z.get(key, 0.0) == pytest.approx(x.get(key, 0.0), rel=1e-3, abs=1e-3)
    first, *later = [row for row in numbers[0] if "train/loss" in row]              # each step reads pairs that were not learnt yet
    assert first["train/loss"] == pytest.approx(math.log(2), rel=1e-6) and first["train/reward_margin"] == 0
    assert sum(row["train/loss"] for row in later) / 3 < math.log(2) and all(row["train/reward_margin"] > 0 for row in later)
    assert [row["val/reward_accuracy"] >= 0.5 for row in numbers[0] if "val/loss" in row] == [True, True]


@pytest.mark.slow
def test_two_ranks_learn_as_one(tmp_path: Path) -> None:
    one = run(tmp_path, "one", "--steps=3", "--accum=2")
    port = f"--master_port={random.randint(20000, 50000)}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", port, "train.py", "configs/ivr_dpo.py",
               "--smoke", f"--out={tmp_path}/two", *few_pairs(tmp_path), "--steps=3", "--accum=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = weights_of(one), weights_of(tmp_path / "two")
    assert all(torch.allclose(first[n], second[n], atol=2e-4) for n in first)
    a, b = ([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, tmp_path / "two"))
    for x, y in zip(a, b, strict=True):
        for key in ("train/loss", "train/reward_margin", "val/loss", "val/reward_accuracy"):
            assert (key in x) == (key in y) and x.get(key, 0.0) == pytest.approx(y.get(key, 0.0), rel=1e-3, abs=1e-3)


def spoken_pairs(folder: Path) -> Path:
    """Numbers that Allison says, rather than a synthetic voice."""
    rows = [json.loads(line) for line in (ROOT / "assets/speech/manifest.jsonl").read_text().splitlines()]
    digits = {who: {r["text"]: r for r in rows if (r["speaker"], r.get("group")) == (who, "digits")} for who in ("allison", "slt")}
    lines = []
    for n, text in enumerate(sorted(digits["allison"].keys() & digits["slt"].keys())):
        sides = [[{"type": "audio", "audio_url": str(ROOT / "assets/speech" / digits[who][text]["audio"])}] for who in ("allison", "slt")]
        lines.append({"id": str(n), "split": "test" if n % 4 == 3 else "train", "messages": [{"role": "user", "content": text}],
                      "chosen": sides[0], "rejected": sides[1]})
    return write(folder, *lines)


def talked_pairs(folder: Path) -> Path:
    """Dialogues, rather than the next one."""
    demo_dialogues(folder)
    return write(folder, *({"id": str(n), "split": "test" if n % 8 == 6 else "train", "chosen": {"path": f"{n:03d}.wav"},
                            "rejected": {"path": f"{n + 1:03d}.wav"}} for n in range(0, 24, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("name, pairs, options", [
    ("higgs_ar", spoken_pairs, ("--data.allow_outside=true", "--data.reference=0", "--data.normaliser=none")),
    ("moshi_lora", talked_pairs, ("--data.stream_weights=()", "--data.tokenizer={folder}/words.json", "--data.chunk_seconds=20"))])
def test_recordings_are_preferred_in_every_stream(name: str, pairs: Callable, options: tuple[str, ...], tmp_path: Path) -> None:
    folder = pairs(tmp_path)
    given = [option.format(folder=folder) for option in options]
    rc, out, err = call(
        "train.py", f"configs/{name}.py", "--smoke", "--dpo.beta=0.05", f"--data.sources={folder}/pairs.jsonl", "--data.split=manifest",
        f"--data.cache={tmp_path}/cache", f"--out={tmp_path}/run", "--steps=10", "--lr=3e-3", "--schedule=constant", "--warmup=0",
        "--lora.dropout=0", "--data.columns=900", "--listen=0", "--prompts=()", "--eval_every=0", "--save_every=0", *given)
    assert rc == 0, out + err
    numbers = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert numbers[0]["train/loss"] == pytest.approx(math.log(2), rel=1e-5) and numbers[0]["train/reward_margin"] == 0
    assert numbers[-2]["train/loss"] < 0.5 and numbers[-2]["train/reward_accuracy"] > 0.9 and numbers[-1]["val/loss"] > 0
    print(name, {key: round(value, 3) for key, value in numbers[-1].items()})


@pytest.mark.slow
def test_smoke_learns_preferences_resumes_is_evaluated_converses_and_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def do(*args: object) -> str:
        rc, out, err = call(*args)
        assert rc == 0, out + err
        return out + err

    common = ("configs/ivr_dpo.py", "--smoke", f"--data.cache={tmp_path}/cache", f"--out={tmp_path}/run")
    do("train.py", *common, "--steps=10", "--schedule=constant")
    assert "resuming" in do("train.py", *common)
    held = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "val/loss" in line]
    assert [row["step"] for row in held] == [10, 20] and held[-1]["val/loss"] < 0.6 and held[-1]["val/reward_accuracy"] > 0.6
    print(held[-1])
    do("evaluate.py", "report", tmp_path / "run", "--rounds=50", "--replies=2", "--max_tokens=12", "--generic=", "--out_of_scope=")
    told = json.loads((tmp_path / "run/report/summary.json").read_text())
    assert {line["model"] for line in told["losses"]} == {"run", "base"}
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where is my order?\nrepeat\nquit\n"))
    assert "Goodbye." in do("sample.py", "--ckpt", tmp_path / "run", "--chat", f"--out={tmp_path}/x.wav", "--max_frames=12")
    talked = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in talked] == ["reply", "repeat", "quit"] and talked[0]["frames"] > 0
    do("checkpoint.py", "export", tmp_path / "run", "--to=peft", f"--out={tmp_path}/peft")
    tokens = torch.randint(0, 500, (1, 1, 9))
    with torch.inference_mode():
        again = load(tmp_path / "run/base", adapter=tmp_path / "peft")(tokens)[0]
        assert torch.equal(again, load(tmp_path / "run")(tokens)[0])
