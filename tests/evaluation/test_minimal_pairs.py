"""Likelihood probes, state geometry, loss landscapes and fixed alignments: values that can be worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, call

from checkpoint import Extras, save
from corpus.annotate import FixAlignmentsConfig, clamp_words
from corpus.data_config import DataConfig
from corpus.index import fitting_codec
from evaluation import representations
from evaluation.minimal_pairs import (
    BUNDLED,
    Clip,
    MinimalPairsConfig,
    Reader,
    choice_score,
    compare,
    items,
    log_probabilities,
    mcnemar,
    scores,
    shares_of,
)
from evaluation.representations import GeometryConfig, cka, cosine, direction, main_axes
from layers.architecture import ModelConfig, StackConfig
from model import MultistreamLM
from options import run_config
from streams import Stream, StreamTable, codebooks, delay
from text.tokenizers import load_tokenizer

TABLE = StreamTable((Stream("text", "text", 33, 32, start=32), *codebooks(8, 257, 256, 256, delays=(0, *[1] * 7)),
                     *codebooks(8, 257, 0, 256, delays=(0, *[1] * 7), name="user")), "duplex", aligned=True)


def tiny() -> MultistreamLM:
    torch.manual_seed(0)
    return MultistreamLM(ModelConfig(
        TABLE, StackConfig(dim=16, layers=2, heads=2, ffn=44, norm_eps=1e-8, rope_interleaved=True, packed=True),
        StackConfig(dim=8, layers=1, heads=1, ffn=22, norm_eps=1e-8, rope_theta=0.0, packed=True, steps=8))).eval()


@pytest.fixture
def run(tmp_path):
    """A random Moshi with a word list and the tiny codec, and four clips beside a set."""
    (tmp_path / "words.json").write_text(json.dumps(["<s>", "</s>", "<pad>", "four", "nine"]))
    save(tiny(), tmp_path / "run", Extras(data={"codec": "tiny", "tokenizer": str(tmp_path / "words.json"), "normaliser": "english-v1"}))
    for n in range(4):
        noise = np.random.default_rng(n).standard_normal(3200 + 640 * n) * 0.1
        soundfile.write(tmp_path / f"{n}.wav", noise, 16000)
    return tmp_path


def write_set(folder, rows) -> str:
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--set={folder}/set.jsonl"


# ---- likelihoods ----

def test_log_probabilities_are_those_of_the_next_token():
    model, g = tiny(), torch.Generator().manual_seed(1)
    frames = torch.randint(0, 32, (17, 5), generator=g)
    tokens = delay(frames, TABLE.delays, TABLE.column("start"))
    found = log_probabilities(model, tokens)
    with torch.no_grad():
        text, audio = model(tokens[None])
    for s in range(1, 6):
        assert float(found[0, s]) == pytest.approx(float(text[0, s - 1].double().log_softmax(-1)[tokens[0, s]]), abs=1e-9)
        third = audio[0, 2, s - 1].double().log_softmax(-1)
        assert float(found[3, s]) == pytest.approx(0.0 if s == 1 else float(third[tokens[3, s]]), abs=1e-9)
    assert not found[:, 0].any() and not found[9:].any()


class Oracle:
    """Knows the one clip that it was made for: probability 1 where that goes on as it should, a coin elsewhere."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.table, self.known = TABLE, tokens

    def __call__(self, tokens: torch.Tensor):
        wanted = torch.nn.functional.one_hot(self.known.clamp(min=0), 257).float() * 200
        return wanted[None, 0, 1:, :32], wanted[None, 1:9, 1:, :256]


def test_a_perfect_model_scores_zero_and_a_shift_by_one_frame_does_not():
    frames = torch.randint(0, 30, (17, 9), generator=torch.Generator().manual_seed(2))
    counts = ((torch.arange(9) >= 6).float() * (TABLE.column("classes") > 0)).float()
    tokens = delay(frames, TABLE.delays, TABLE.column("start"))
    clip = Clip(tokens, delay(counts, TABLE.delays, 0.0))
    assert scores(Oracle(tokens), clip, 100.0) == pytest.approx({"speech": 0, "semantic": 0, "plain": 0, "text": 0}, abs=1e-9)
    late = Clip(delay(torch.roll(frames, 1, -1), TABLE.delays, TABLE.column("start")), clip.counts)
    assert scores(Oracle(tokens), late, 100.0)["speech"] < -50


def test_scores_are_weighted_means():
    model = tiny()
    frames = torch.randint(0, 32, (17, 5), generator=torch.Generator().manual_seed(3))
    frames[0] = -1
    tokens = delay(frames, TABLE.delays, TABLE.column("start"))
    counts = delay(((frames >= 0) & (TABLE.column("classes") > 0)).float(), TABLE.delays, 0.0)
    logs, found = log_probabilities(model, tokens), scores(model, Clip(tokens, counts), 100.0)
    rest = (logs * counts)[2:9].sum()
    first, n = (logs * counts)[1].sum(), int(counts[2:9].sum())
    assert int(counts[1].sum()) == 5 and n == 7 * 4 and math.isnan(found["text"])
    assert found["semantic"] == pytest.approx(float(first) / 5) and found["plain"] == pytest.approx(float(first + rest) / (5 + n))
    assert found["speech"] == pytest.approx(float(100 * first + rest) / (500 + n))


def test_a_text_model_scores_every_token_behind_the_context():
    table = StreamTable((Stream("text", "text", 256, 256),), "qwen2")
    torch.manual_seed(1)
    model = MultistreamLM(ModelConfig(table, StackConfig(dim=16, layers=1, heads=2, ffn=44))).eval()
    reader = Reader(table, None, load_tokenizer("bytes"), DataConfig(normaliser="none"), Path())
    clip = reader.clip([{"text": "ab"}, {"text": "cde", "audio": "c.wav"}], 1, "item 1")
    logs = model(clip.tokens[None])[0][0].double().log_softmax(-1)
    wanted = [float(logs[n, code]) for n, code in ((1, 99), (2, 100), (3, 101))]
    assert clip.tokens.tolist() == [[97, 98, 99, 100, 101]]
    assert scores(model, clip, 100.0)["text"] == pytest.approx(sum(wanted) / 3) and math.isnan(scores(model, clip, 100.0)["speech"])
    assert reader.clip([{"text": "ab"}], 0, "item 1").counts.tolist() == [[0, 1]]           # the first token is free, not certain
    with pytest.raises(ValueError, match="item 1: this model reads text alone; add"):
        reader.clip([{"audio": "c.wav"}], 0, "item 1")


def test_a_choice_mixes_what_is_there():
    assert choice_score({"text": -1.0, "plain": -3.0}, 0.9) == pytest.approx(-1.2)
    assert choice_score({"text": math.nan, "plain": -3.0}, 0.9) == pytest.approx(-3.0)
    assert choice_score({"text": math.nan, "plain": -3.0}, 1.0) == pytest.approx(-3.0)


@pytest.mark.parametrize("name", ["tiny", "tiny_clone", "higgs_ar", "higgs_v3", "ivr_moss", "csm", "orpheus", "qwen_tts", "personaplex",
                                  "moshi_lora", "ivr_qwen"])
def test_every_family_scores_the_bundled_pairs_as_its_loss_does(name):
    """The mean log-likelihood is minus the mean loss of the same grid, and what is another recording or text is another score."""
    config = run_config(ROOT / f"configs/{name}.py", "smoke")
    table, tokenizer = config.model.table, load_tokenizer(config.data.tokenizer)
    torch.manual_seed(0)
    model = MultistreamLM(config.model).eval()
    reader = Reader(table, fitting_codec(config.data.codec, table, tokenizer), tokenizer, config.data, ROOT / "assets/speech")
    for item in items(ROOT / BUNDLED, {"right": dict, "wrong": dict}, 0)[::10]:
        context = item.get("context") or []
        right, wrong = (reader.clip([*context, item[side]], len(context), "x") for side in ("right", "wrong"))
        found = scores(model, right, 1.0)
        with torch.no_grad():
            sums = model(right.tokens[None], right.counts[None])
        for kind, rows in (("text", table.text_out), ("plain", table.audio_out)):
            if rows and sums.weight[rows].sum():
                assert found[kind] == pytest.approx(-float(sums.nll[rows].sum() / sums.weight[rows].sum()), rel=1e-4)
        assert torch.equal(right.tokens, wrong.tokens) == (name == "ivr_qwen" and item["task"] != "text")
        assert not right.counts[:, 0].any() and right.counts.any()


def test_ties_are_one_half_and_contexts_that_are_not_read_are_counted(run):
    rows = [{"scores": {side: dict.fromkeys(("speech", "semantic", "plain"), value) | {"text": math.nan} for side, value in pair.items()}}
            for pair in ({"right": -1.0, "wrong": -2.0}, {"right": -1.0, "wrong": -1.0}, {"right": -3.0, "wrong": -1.0})]
    found = shares_of(rows)
    assert found["speech"] == 0.5 and math.isnan(found["text"])
    rc, out, err = call("evaluate.py", "pairs", run / "run")                     # the bundled pairs: this tokenizer knows two words
    assert rc == 0 and "left out: 20 pairs do not suit this model" in out and "match: 10 pairs" in out, out + err
    assert {json.loads(line)["task"] for line in (run / "run/pairs.jsonl").read_text().splitlines()} == {"match"}


def test_pairs_and_choices_through_the_command(run):
    words = [["four", 0.0], ["nine", 0.1]]
    chosen = write_set(run, [{"id": "a", "right": {"audio": "0.wav"}, "wrong": {"audio": "1.wav"}},
                             {"id": "b", "right": {"audio": "1.wav", "words": words, "text": "four nine"}, "wrong": {"audio": "0.wav"}}])
    rc, out, err = call("evaluate.py", "pairs", run / "run", chosen)
    assert rc == 0, err
    rows = [json.loads(line) for line in (run / "run/pairs.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == ["a", "b"]
    a, b = (r["scores"] for r in rows)
    assert a["right"]["semantic"] == pytest.approx(b["wrong"]["semantic"], abs=1e-6) and a["right"] != a["wrong"]
    assert rows[0]["right"] == (a["right"]["speech"] > a["wrong"]["speech"]) and not math.isnan(b["right"]["text"])
    asked = {"id": "q", "context": [{"audio": "2.wav"}], "choices": [{"audio": "0.wav"}, {"audio": "1.wav"}], "answer": 1}
    chosen = write_set(run, [asked])
    rc, out, err = call("evaluate.py", "choices", run / "run", chosen)
    assert rc == 0, err
    row = json.loads((run / "run/choices.jsonl").read_text())
    assert row["right"] == (row["chosen"] == 1) and row["chosen"] == int(row["scores"][1] > row["scores"][0])
    same = [{"audio": "0.wav"}] * 2
    call("evaluate.py", "choices", run / "run", write_set(run, [{"id": "q", "choices": same, "answer": 0}]))
    row = json.loads((run / "run/choices.jsonl").read_text())
    assert row["scores"][0] == row["scores"][1] and row["right"]


@pytest.mark.parametrize("row, said", [
    ({"right": {"audio": "0.wav"}}, "has no 'wrong'"), ({"right": {}, "wrong": {"audio": "0.wav"}}, "a clip is"),
    ({"right": {"audio": "../x.wav"}, "wrong": {"audio": "0.wav"}}, "lies outside"),
    ({"right": {"text": "four"}, "wrong": {"text": "nine"}}, "scores speech"),
    ({"right": {"audio": "gone.wav"}, "wrong": {"audio": "0.wav"}}, "gone.wav"),
    ({"right": {"audio": "0.wav", "words": ["four"]}, "wrong": {"audio": "0.wav"}}, "start in seconds")])
def test_a_bad_item_is_one_line(run, row, said):
    rc, _, err = call("evaluate.py", "pairs", run / "run", write_set(run, [row]))
    assert rc == 2 and said in err and err.count("\n") == 1 and not (run / "run/pairs.jsonl").exists()


def test_other_bad_calls_are_one_line(run):
    for words, said in ((("choices", run / "run"), "add --set"), (("pairs", "--limit=1"), "pairs takes one run folder"),
                        (("compare", run / "words.json"), "two files"),
                        (("choices", run / "run", write_set(run, [{"choices": [{"audio": "0.wav"}], "answer": 3}])), "answer 3"),
                        (("pairs", run / "run", "--sett=x"), "nearest is --set"), (("representations", run / "run"), "config.json")):
        rc, _, err = call("evaluate.py", *words)
        assert rc == 2 and said in err and err.count("\n") == 1, err


def test_text_models_score_text(tmp_path):
    torch.manual_seed(1)
    table = StreamTable((Stream("text", "text", 256, 256),), "text")
    model = MultistreamLM(ModelConfig(table, StackConfig(dim=16, layers=1, heads=2, ffn=16)))
    save(model, tmp_path / "run", Extras(data={"codec": "", "tokenizer": "bytes", "normaliser": "none"}))
    chosen = write_set(tmp_path, [{"id": "s", "context": [{"text": "it is "}], "choices": [{"text": "so"}, {"text": "not"}], "answer": 0}])
    rc, _, err = call("evaluate.py", "choices", tmp_path / "run", chosen)
    assert rc == 0, err
    found = json.loads((tmp_path / "run/choices.jsonl").read_text())["scores"]
    logs = log_probabilities(model.eval(), torch.tensor([list(b"it is so")]))
    assert found[0] == pytest.approx(float(logs[0, 6:].mean()), abs=1e-5)


def test_two_evaluations_are_compared_item_by_item(tmp_path):
    for name, right in (("a", "1110100"), ("b", "1011011")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"id": str(n), "right": r == "1"}) + "\n" for n, r in enumerate(right)))
    found = compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert found == {"items": 7, "both": 2, "only": [["1", "4"], ["3", "5", "6"]], "p": 1.0}
    assert mcnemar(0, 5) == 0.0625 and mcnemar(1, 5) == pytest.approx(14 / 64) and mcnemar(0, 0) == 1.0
    assert mcnemar(2, 9) == pytest.approx(2 * (1 + 11 + 55) / 2048)
    for name, errors in (("c", (0.1, 0.5, 0.0)), ("d", (0.0, 0.2, 0.0))):
        rows = [{"id": str(n), "wer": x, "heard": "x"} for n, x in enumerate(errors)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare(tmp_path / "c.jsonl", tmp_path / "d.jsonl")                  # numbers: 4 of the 8 flips are as far from 0
    assert found.keys() == {"wer"} and found["wer"]["difference"] == pytest.approx(-0.4 / 3) and found["wer"]["p"] == 0.5


# ---- states ----

def test_cka_knows_rotations_and_is_not_fooled_by_width():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=g)
    q, _ = torch.linalg.qr(torch.randn(8, 8, generator=g))
    assert cka(x, 3 * x @ q + 5) == pytest.approx(1.0, abs=1e-9)
    apart = [cka(torch.randn(40, 30, generator=g), torch.randn(40, 30, generator=g)) for _ in range(20)]
    assert abs(sum(apart) / 20) < 0.03                                           # the biased one says 0.4 here
    y = x[:, :4]
    n, K, L = 7, *(t @ t.T for t in (centred(x[:7]), centred(y[:7])))
    K, L = K.fill_diagonal_(0), L.fill_diagonal_(0)

    def hsic(a, b):                                                              # Song et al. 2012, as written
        one = torch.ones(n, 1, dtype=torch.double)
        return float((torch.trace(a @ b) + (one.T @ a @ one * (one.T @ b @ one)) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one.T @ a @ b @ one)
                     / (n * (n - 3)))

    assert cka(x[:7], y[:7]) == pytest.approx(hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L)), abs=1e-9)


def centred(x):
    return x.double() - x.double().mean(0)


def test_main_axes_are_those_of_the_variance():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 4.0, 0.5, 2.0, 0.1]) + 7
    places, explained = main_axes(x)
    assert (np.corrcoef(places[:, 0], x[:, 1])[0, 1]) ** 2 > 0.98 and explained[0] > explained[1] > 0.1
    assert cosine(x, x) == pytest.approx(1.0) and cosine(x, -x) == pytest.approx(-1.0)


def test_directions_are_as_long_as_the_rows_they_move():
    model = tiny()
    parameters = dict(model.named_parameters())
    found = direction(parameters, 3)
    assert found.keys() == {n for n, p in parameters.items() if p.dim() > 1}
    for name, step in found.items():
        assert torch.allclose(step.norm(dim=-1), parameters[name].norm(dim=-1), rtol=1e-5)
    assert not torch.equal(found["text_head.weight"], direction(parameters, 4)["text_head.weight"])


def test_latent_and_landscape_of_a_run(tiny_run, tmp_path):
    import shutil
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, symlinks=True)
    shutil.copytree(tiny_run.parent / "clips", tmp_path / "clips")
    rc, out, err = call("evaluate.py", "representations", run, f"--other={tiny_run}", "--columns=50")
    assert rc == 0, err
    told = json.loads((run / "representations.json").read_text())
    at = {name: n for n, name in enumerate(told["names"])}
    assert told["columns"] == 50 and set(at) == {"layer 0", "state", "other layer 0", "other state"}
    assert (run / "representations.png").stat().st_size > 5000
    assert all(told["cka"][n][n] == 1 for n in range(4)) and told["cka"][at["state"]][at["other state"]] == pytest.approx(1, abs=1e-5)
    assert told["cosine"]["layer 0 -> other layer 0"] == pytest.approx(1, abs=1e-5)
    rc, out, err = call("evaluate.py", "landscape", run, "--points=3", "--batches=1")
    assert rc == 0 and (run / "landscape.png").is_file(), err
    loss = json.loads((run / "landscape.json").read_text())["loss"]
    model, config, rows = representations.of_run(run)
    batch = next(iter(rows))
    sums = model(batch.tokens, batch.weights, batch.positions, batch.segments)
    table = config.model.table
    both = [float(sums.nll[k].sum() / sums.weight[k].sum()) for k in (table.text_out, table.audio_out) if sums.weight[k].sum()]
    assert loss[1][1] == pytest.approx(sum(both), rel=1e-5) and len({round(x, 6) for row in loss for x in row}) == 9
    before = {n: p.clone() for n, p in model.named_parameters()}
    representations.plane(model, dict(model.named_parameters()), [batch], config, GeometryConfig(points=2))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    rc, _, err = call("evaluate.py", "landscape", run, "--pattern=nothing")
    assert rc == 2 and "part of no matrix's name" in err


# ---- alignments ----

def test_a_word_that_lasts_too_long_keeps_its_end(tmp_path):
    words = [("A", 0.0, 1.0, "SPEAKER_MAIN"), ("dog", 1.0, 2.5, "SPEAKER_MAIN"), ("a", 1.0, 1.9, "SPEAKER_OTHER")]
    assert clamp_words(words, FixAlignmentsConfig(longest=0.2, first=True, words=("a",)))[0] == [("A", 0.92, 1.0, "SPEAKER_MAIN"), words[1],
                                                                                      ("a", 1.82, 1.9, "SPEAKER_OTHER")]
    assert clamp_words(words, FixAlignmentsConfig(longest=1.2))[1] == ["dog at 2.42"]
    (tmp_path / "in").mkdir()
    before = json.dumps({"alignments": [[w, [s, e], who] for w, s, e, who in words]})
    (tmp_path / "in/x.json").write_text(before)
    rc, out, err = call("data.py", "fix-alignments", tmp_path / "in", "--longest=0.2", "--dry_run")
    assert rc == 0 and "3 words in 1 files would be shortened" in out, err
    rc, out, err = call("data.py", "fix-alignments", tmp_path / "in", f"--out={tmp_path}/fixed", "--longest=0.2", "--first")
    assert rc == 0, err
    assert json.loads((tmp_path / "fixed/x.json").read_text())["alignments"][0] == ["A", [0.92, 1.0], "SPEAKER_MAIN"]
    assert (tmp_path / "in/x.json").read_text() == before
    for options, said in ((("--longest=0.2",), "give --out"), ((f"--out={tmp_path}/in",), "originals"),
                          (("--keep=2",), "keep 2.0 is not in")):
        rc, _, err = call("data.py", "fix-alignments", tmp_path / "in", *options)
        assert rc == 2 and said in err and err.count("\n") == 1, err
    (tmp_path / "in/x.json").write_text("[[1]]")
    rc, _, err = call("data.py", "fix-alignments", tmp_path / "in", "--dry_run")
    assert rc == 2 and "x.json: entry 0" in err


def test_a_probe_checks_its_values():
    with pytest.raises(AssertionError, match="text_share"):
        MinimalPairsConfig(text_share=2.0)
    with pytest.raises(AssertionError, match="points"):
        GeometryConfig(points=1)
