"""Held-out evaluation: its numbers are those of the model, its page needs nothing else, a repeat gives the same; and the sweep."""

import json
import math
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call

from audio.wav import save_wav
from checkpoint import load
from data import Loader
from evaluation import report
from evaluation.html_page import Page, show, smooth
from evaluation.metrics import bleu, rouge
from evaluation.report import Case, Evaluation, made_up, perplexity, slices_of
from lora import switched_off
from options import apply, load_config, read_json
from text.passages import UNSUPPORTED
from training import sweep

OPTIONS = ("--data.columns=160", "--batch_size=2", "--eval_every=0", "--save_every=0", "--steps=25", "--lr=1e-2", "--lora.dropout=0")
ASKED = {"billing": ["What is the bill?", "How much is it?"], "shipping": ["When is it here?", "How fast is it?"]}
GIVEN = {"billing": "It is {} euros.", "shipping": "It comes on {} June."}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 25 steps on eight calls; three more are held out, one of them with two exchanges and a lookup."""
    here = tmp_path_factory.mktemp("report")
    rows = []
    for n in range(10):
        kind = ("billing", "shipping")[n % 2]
        said = [{"role": "user", "content": ASKED[kind][n // 2 % 2] + f" {n + 10}"},
                {"role": "assistant", "content": GIVEN[kind].format(n + 10)}]
        rows.append({"id": str(n), "group": f"{kind}/{n // 4}", "category": kind, "split": "train" if n < 8 else "test", "messages": said})
    more = [{"role": "system", "content": "lookup: order=77"}, {"role": "user", "content": "And <b>77</b>?"},
            {"role": "assistant", "content": "Order 77 is here, Anna."}]
    rows.append({"id": "10", "group": "billing/x", "category": "billing", "split": "test", "messages": [*rows[8]["messages"], *more]})
    (here / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rc, out, err = call("train.py", "configs/ivr_qwen.py", "--smoke", f"--data.sources={here}/calls.jsonl", f"--data.cache={here}/cache",
                        f"--out={here}/run", *OPTIONS)
    assert rc == 0, out + err
    return here / "run"


def evaluated(run: Path, name: str, *options: str) -> tuple[Path, str]:
    rc, out, err = call("evaluate.py", "report", run, f"--out={run.parent}/{name}", "--rounds=40", "--max_tokens=12", *options)
    assert rc == 0, out + err
    return run.parent / name, out


@pytest.fixture(scope="module")
def told(run: Path) -> Path:
    return evaluated(run, "first")[0]


def summary(folder: Path) -> dict:
    return read_json(folder / "summary.json")


# ---- the numbers ----

def test_losses_are_those_of_the_model_and_the_base_has_its_adapters_off(run: Path, told: Path) -> None:
    config = load_config(["configs/ivr_qwen.py", "--smoke", f"--data.sources={run.parent}/calls.jsonl", f"--data.cache={run.parent}/cache",
                          *OPTIONS])
    found = {line["model"]: line for line in summary(told)["losses"] if line["stream"] == "text"}
    for name, folder in (("run", run), ("base", run / "base")):
        model, nll, weight, hits, count = load(folder), 0.0, 0.0, 0.0, 0.0
        with torch.inference_mode():
            for batch in Loader(config.data, model.table, "held-out", 2):
                sums = model(batch.tokens, batch.weights, batch.positions, batch.segments)
                nll, weight = nll + float(sums.nll.sum()), weight + float(sums.weight.sum())
                hits, count = hits + float(sums.hits.sum()), count + float(sums.count.sum())
        assert found[name]["loss"][0] == pytest.approx(nll / weight, rel=1e-5)
        assert found[name]["perplexity"][0] == pytest.approx(math.exp(nll / weight), rel=1e-4)
        assert found[name]["accuracy"][0] == pytest.approx(hits / count)
        low, high = found[name]["loss"][1:]
        assert low <= found[name]["loss"][0] <= high
    assert found["run"]["loss"][0] < found["base"]["loss"][0] - 0.5                      # it has learnt something


def test_adapters_come_back_on_even_after_an_error(run: Path) -> None:
    model, tokens = load(run), torch.randint(0, 500, (1, 1, 7))
    with torch.inference_mode():
        on, base = model(tokens)[0], load(run / "base")(tokens)[0]
        with pytest.raises(RuntimeError), switched_off(model) as bare:
            assert torch.equal(bare(tokens)[0], base) and not torch.equal(on, base)
            raise RuntimeError
        assert torch.equal(model(tokens)[0], on)


def test_replies_are_scored_by_the_packages_and_every_one_is_written(told: Path) -> None:
    rows = [json.loads(line) for line in (told / "rows.jsonl").read_text().splitlines()]
    replies = [row for row in rows if "replies" in row]
    assert [(row["id"], row["turn"]) for row in replies] == [("8", 1), ("9", 1), ("10", 1), ("10", 4)]
    said, should = [row["replies"]["run"] for row in replies], [row["reference"] for row in replies]
    found = summary(told)["replies"]
    assert found["run"]["BLEU-4"][0] == pytest.approx(bleu(should, said)) and found["reference"]["BLEU-4"][0] == pytest.approx(100)
    assert {name: found["run"][name][0] for name in ("rouge1", "rouge2", "rougeL")} == pytest.approx(rouge(should, said))
    # the references: 18, 19 and june, 18 hang on the caller's figure; june and anna come from nowhere, 77 from the lookup
    assert found["reference"]["made-up entities"][0] == pytest.approx(2 / 6) and found["reference"]["replies with one"][0] == 0.5
    losses = [row for row in rows if "run/text_loss" in row]
    assert [row["id"] for row in losses] == ["8", "9", "10"] and all(row["base/text_loss"] > row["run/text_loss"] for row in losses)


def test_made_up_counts_against_everything_before() -> None:
    before = [{"role": "user", "content": "Order 5 for Maria Costa"}, {"role": "assistant", "content": "It costs 20 euros."}]
    case = Case({"id": "x"}, before, "")
    assert made_up([case] * 3, ["Order 5, Maria, 20 euros.", "Order 6, Anna.", ""]).tolist() == [[0, 3], [2, 2], [0, 0]]


def test_slices_have_their_rows_and_the_worst_comes_first(told: Path) -> None:
    slices = summary(told)["slices"]
    assert slices[0]["slice"] == "all" and slices[0]["calls"] == 3
    counts = {row["slice"]: row["calls"] for row in slices}
    assert counts == {"all": 3, "category: billing": 2, "category: shipping": 1, "one exchange": 2, "several exchanges": 1,
                      "without a lookup": 2, "with a lookup": 1}
    losses = [row["run loss"][0] for row in slices[1:]]
    assert losses == sorted(losses, reverse=True)
    alone = next(row for row in slices if row["slice"] == "category: shipping")["run loss"]
    assert all(math.isnan(x) for x in alone[1:])                                         # one group has no interval
    assert slices_of({"messages": [], "category": "billing", "language": "ar"})[:3] == ["all", "category: billing", "language: ar"]


def test_intents_have_a_confusion_matrix_for_each_way(told: Path) -> None:
    found = summary(told)["intents"]
    assert found["training rows"] == 8 and set(found["macro F1"]) == {"key words", "probe on run", "probe on base"}
    for table in found["confusion"].values():
        assert np.array(table).sum() == 3 and np.array(table).shape == (len(found["names"]),) * 2
    assert found["names"][:2] == ["billing", "shipping"] and 0.8 <= found["out of scope refused by key words"] <= 1


def test_forgetting_is_the_difference_on_general_texts(told: Path) -> None:
    found = summary(told)["forgetting"]
    assert found["lost"][0] == pytest.approx(found["run"]["loss"][0] - found["base"]["loss"][0])
    assert found["lost"][1] <= found["lost"][0] <= found["lost"][2] and perplexity(np.array([2.0, 1.0])) == pytest.approx(math.exp(2))


# ---- the page, and a repeat ----

def test_the_page_needs_nothing_else_and_escapes_what_is_said(told: Path) -> None:
    html = (told / "index.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|<script|@import", html)        # a script comes with recordings alone
    assert "And &lt;b&gt;77&lt;/b&gt;?" in html and "<b>77" not in html
    assert all(f"<h2>{name}</h2>" in html for name in ("Held-out loss", "Replies", "Slices, the worst first", "What callers want",
                                                        "Forgetting", "Some replies", "Curves"))
    assert html.count("<polyline") == 2 and html.startswith("<!doctype html>")


def test_a_repeat_gives_the_same_numbers_and_other_rows_can_be_named(run: Path, told: Path) -> None:
    again, _ = evaluated(run, "again")
    assert (again / "summary.json").read_text() == (told / "summary.json").read_text()
    assert (again / "index.html").read_text() == (told / "index.html").read_text()
    lines = (run.parent / "calls.jsonl").read_text().splitlines()
    (run.parent / "other.jsonl").write_text(lines[-1] + "\n")
    (run.parent / "docs").mkdir()
    (run.parent / "docs/a.md").write_text("What is a bill? When is it here? Nobody knows.")
    documents = [f"--documents={run.parent}/docs"] if find_spec("bm25s") else []
    other, out = evaluated(run, "other", f"--sources={run.parent}/other.jsonl", "--generic=", "--out_of_scope=", *documents)
    found = summary(other)
    assert found["rows"] == 1 and "forgetting" not in found and math.isnan(found["replies"]["run"]["BLEU-4"][1])
    assert len(found["intents"]["macro F1"]) == 3 and found["intents"]["training rows"] == 8        # those of the run itself
    assert "replies of run" in out
    if documents:                                                                   # both references are about other things
        assert found["replies"]["reference"][UNSUPPORTED][0] == 1 and UNSUPPORTED in (other / "index.html").read_text()
    assert UNSUPPORTED not in summary(told)["replies"]["run"]


def test_cells_and_curves() -> None:
    assert show((0.5, 0.25, 0.75)) == "0.500 (0.250 to 0.750)" and show((0.5, math.nan, math.nan)) == "0.500" and show(math.nan) == "-"
    page = Page("a <title>")
    page.curves({"one": [(3, 2.0)], "none": [(0, math.nan)]})
    page.table(["x"], [[1.5], ["<i>"]])
    page.curves({"train/loss": [(n, 50.0 if n < 2 else 2 + math.sin(n)) for n in range(900)], "val/loss": [(400, 2.0), (899, 2.0)]}, "Loss")
    ticks = [float(t) for t in re.findall(r"<span>([-\d.e+]+)</span>", page.parts.pop())]
    assert 1 < ticks[4] and ticks[0] < 6, ticks                                          # the first steps do not flatten the rest
    smoothed = [y for _, y in smooth([(n, float(n % 2)) for n in range(500)])]
    assert smoothed[0] == 0 and all(abs(y - 0.5) < 0.06 for y in smoothed[100:]) and smooth([(0, 1.0), (1, 2.0)]) == [(0, 1.0), (1, 2.0)]
    html = page.html()
    assert html.count("<polyline") == 1 and "NaN" not in html and "nan" not in html and "&lt;i&gt;" in html and "a &lt;title&gt;" in html


# ---- speech ----

def test_another_recogniser_takes_whispers_place_and_the_page_plays(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    save_wav(tmp_path / "run/0.wav", torch.zeros(1, 160), 16_000)
    (tmp_path / "run/samples.jsonl").write_text('{"text": "four nine", "wav": "0.wav"}\n{"text": "two", "wav": "0.wav"}\n')
    (tmp_path / "my_ears.py").write_text("def hear(wavs):\n    return ['49', 'to'][: len(wavs)]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rc, out, err = call("evaluate.py", tmp_path / "run/samples.jsonl", "--recogniser=my_ears:hear")
    assert rc == 0 and "mean WER 0.500 over 2 recordings, by my_ears:hear" in out
    scored = json.loads((tmp_path / "run/wer.json").read_text())
    assert scored["wer"] == 0.5 and scored["cer"] == pytest.approx((0 + 1 / 3) / 2, abs=1e-4)
    rc, out, err = call("evaluate.py", "report", tmp_path / "run", "--recogniser=my_ears:hear", "--replies=1", "--rounds=5",
                        "--max_tokens=4", "--generic=")
    assert rc == 0, err
    html = (tmp_path / "run/report/index.html").read_text()
    found = summary(tmp_path / "run/report")
    assert html.count('src="data:audio/wav;base64,UklGR') == 2 and [row["wer_figures"] for row in found["speech"]] == [0.0, 1.0]
    assert found["wer"][0] == 1.0 and "Forgetting" in found["not made"]              # "49" is no word of "four nine" in Seed-TTS's way
    rc, _, err = call("evaluate.py", tmp_path / "run/samples.jsonl", "--recogniser=my_ears:nose")
    assert rc == 2 and "give module:function" in err and err.count("\n") == 1


# ---- bad input ----

@pytest.mark.parametrize("options, message", [
    (("--rounds=0",), "rounds are at least 1"), (("--sources=nowhere.jsonl",), "nowhere.jsonl does not exist"),
    (("--generic=nowhere.jsonl",), "nowhere.jsonl does not exist"), (("--rouns=3",), "nearest is --rounds"),
    (("--base=nowhere",), "nowhere")])
def test_wishes_that_cannot_be_met_end_in_one_line(run: Path, options: tuple[str, ...], message: str) -> None:
    rc, _, err = call("evaluate.py", "report", run, f"--out={run.parent}/bad", "--max_tokens=2", "--replies=1", "--rounds=5", *options)
    assert rc == 2 and message in err and len([line for line in err.splitlines() if line.startswith("error")]) == 1, err


def test_rows_of_training_only_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text((run.parent / "calls.jsonl").read_text().splitlines()[0] + "\n")
    rc, _, err = call("evaluate.py", "report", run, f"--sources={tmp_path}/train.jsonl")
    assert rc == 2 and 'give rows a "split" other than train' in err


def test_a_run_of_another_family_gets_losses_and_curves(tiny_run: Path) -> None:
    rc, out, err = call("evaluate.py", "report", tiny_run, f"--out={tiny_run.parent}/report", "--rounds=20")
    assert rc == 0, err
    found = summary(tiny_run.parent / "report")
    assert {line["stream"] for line in found["losses"]} >= {"audio", "cb1", "cb8"} and found["models"] == ["run"]
    html = (tiny_run.parent / "report/index.html").read_text()
    assert "replies" not in found and "<h2>Curves</h2>" in html
    assert set(found["not made"]) == {"Base", "Speech", "Replies, slices, intents, forgetting"} and html.count("Not made: ") == 3
    assert re.findall("<figcaption>([^<]*)", html) == ["Loss"]                            # one kind of tokens is trained: one scale


def test_text_and_audio_have_scales_of_their_own(tmp_path: Path) -> None:
    rows = [{"step": n, f"{side}/loss": 7.0, f"{side}/text_loss": 0.5, f"{side}/audio_loss": 6.5, "val/tor": 0.5, "lr": 1e-3}
            for n in range(3) for side in ("train", "val")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page("x")
    report.report_curves(tmp_path, page)
    assert re.findall("<figcaption>([^<]*)", page.html()) == ["Loss of text", "Loss of audio", "Loss", "tor"]
    assert page.html().count("<polyline") == 7


# ---- sweep ----

def test_a_sweep_trains_each_value_once_and_prints_one_table(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    started: list[list[str]] = []

    def train(argv: list[str], log: Path) -> None:
        started.append(argv)
        rc, out, err = call("train.py", *argv)
        assert rc == 0, err
        steps = len((Path(argv[-1].removeprefix("--out=")) / "metrics.jsonl").read_text().splitlines())
        assert steps == 3                                                          # two steps and one evaluation, also the second time

    monkeypatch.setattr(sweep, "train", train)
    argv = ["configs/ivr_qwen.py", "--smoke", f"--data.sources={run.parent}/calls.jsonl", f"--data.cache={run.parent}/cache",
            *OPTIONS, "--steps=2", "--sweep.lora.rank=2,4", f"--out={tmp_path}"]
    monkeypatch.chdir(ROOT)
    for _ in range(2):                                                             # the second time every run is finished
        sweep.main(argv)
    table = read_json(tmp_path / "sweep.json")
    assert {row["lora.rank"]: row["trained"] for row in table} == {"2": 6016, "4": 12032} and len(started) == 4
    assert [row["best held-out loss"] for row in table] == sorted(row["best held-out loss"] for row in table)
    assert "best held-out loss" in capsys.readouterr().out
    assert [run["lora.rank"] for run in sweep.runs_of("configs/ivr_qwen.py", {})] == ["4", "8", "16", "32", "64"]
    assert sweep.runs_of("", {"sweep.lr": "1,2", "sweep.seed": "3,4"}) == [
        {"lr": a, "seed": b} for a in "12" for b in "34"]
    with pytest.raises(ValueError, match="has no list `sweep`"):
        sweep.runs_of("configs/tiny.py", {})


def test_a_sweep_says_which_run_failed_and_where_all_of_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"code 2: config file nothing.py does not exist.*x\.log"):
        sweep.train(["nothing.py"], tmp_path / "x.log")


def test_options_of_the_report_have_help() -> None:
    rc, out, _ = call("evaluate.py", "--help")
    assert rc == 0 and all(name in out for name in ("--sources", "--rounds", "--recogniser"))
    assert apply(Evaluation(), {"sources": "a.jsonl,b.jsonl"}).sources == ("a.jsonl", "b.jsonl")
    assert report.bundled(report.GENERIC).is_file()


@pytest.mark.parametrize("command", ["report", "verify", "speech", "duplex"])
def test_devices_and_dtypes_that_do_not_exist_are_named_in_one_line(command: str, tmp_path: Path) -> None:
    for option, said in (("--dtype=fp8", "dtype 'fp8' is none of fp32, bf16, fp16"),
                         ("--device=tpu", "device 'tpu' is neither cpu nor cuda")):
        rc, _, err = call("evaluate.py", command, tmp_path, option)
        assert rc == 2 and said in err and err.count("\n") == 1, err
