"""Metrics against cases counted by hand, and BLEU and ROUGE against the packages they come from."""

import math
import sys

import numpy as np
import pytest
import torch

from evaluation import metrics
from evaluation.metrics import LinearProbe, Resample, bleu, bleu_of, bleu_parts, cer, confusion, macro_f1, ratio, rouge, rouge_rows, wer

SAID = ["the order 48213 arrives on 3 June", "I am sorry , we will refund it .", "short", "a b c d e f"]
HEARD = ["the order 48213 comes on 3 June", "I am sorry, we refund it.", "", "a b c d e f"]


def test_figures_on_either_side_are_read_both_ways() -> None:
    assert wer("bus 12 leaves", "bus one two leaves") == wer("bus twelve leaves", "Bus 12 leaves.") == cer("bus 12", "bus twelve") == 0
    assert wer("bus 12 leaves", "bus three leaves") == pytest.approx(1 / 3)


# ---- likeness ----

def test_bleu_is_that_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    assert bleu(SAID, HEARD) == pytest.approx(sacrebleu.corpus_bleu(HEARD, [SAID]).score, abs=1e-9)
    assert bleu(SAID, SAID) == pytest.approx(100.0)
    one = bleu_parts(["a b c d e"], ["a b c x e"])[0]
    assert one.tolist() == [4, 2, 1, 0, 5, 4, 3, 2, 5, 5]                  # hits and n-grams of 1, 2, 3, 4 words, lengths
    by_hand = 100 * math.exp((math.log(4 / 5) + math.log(2 / 4) + math.log(1 / 3) + math.log(1 / (2 * 2))) / 4)     # exp smoothing: 1/2 hit
    assert bleu_of(one) == pytest.approx(by_hand)


def test_rouge_is_that_of_rouge_score_and_knows_arabic() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    for n, (r, h) in enumerate(zip(SAID, HEARD, strict=True)):
        theirs = [score.fmeasure for score in scorer.score(r, h).values()]
        assert rouge_rows(SAID, HEARD)[n].tolist() == pytest.approx(theirs, abs=1e-12)
    found = rouge(["one two three four"], ["one three two four"])
    assert found == pytest.approx({"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.75})
    assert rouge(["مرحبا بكم"], ["مرحبا بكم"])["rouge1"] == 1.0            # their tokenizer would see nothing


@pytest.mark.parametrize("package, call", [("sacrebleu.metrics", bleu), ("rouge_score.rouge_scorer", rouge)])
def test_a_missing_package_is_named_with_the_command(package: str, call: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, package.split(".")[0]):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[eval\]"'):
        call(["a"], ["a"])


# ---- classes ----

def test_macro_f1_counted_by_hand() -> None:
    table = confusion(["a", "a", "a", "b", "b", "c"], ["a", "a", "b", "b", "x", "a"], ["a", "b", "c", "x"])
    assert table.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    # a: 2 * 2 / (3 + 3); b: 2 * 1 / (2 + 2); c: 0 / (1 + 0); x is never true and does not count
    assert macro_f1(table) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert math.isnan(macro_f1(np.zeros((2, 2), dtype=int))) and macro_f1(np.eye(3, dtype=int)) == 1.0


def test_the_probe_is_at_the_optimum_of_its_loss_and_separates_what_is_apart() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(30, 5) + 4 * torch.eye(5)[n] for n in range(3)])
    labels = [name for name in "abc" for _ in range(30)]
    probe = LinearProbe(x, labels)
    assert sum(g == t for g, t in zip(probe(x), labels, strict=True)) >= 88
    z, target = (x.double() - probe.mean) / probe.scale, torch.tensor([ord(name) - ord("a") for name in labels])
    off = (torch.softmax(z @ probe.weight + probe.bias, 1) - torch.nn.functional.one_hot(target)).detach() / len(x)
    gradient = z.T @ off + 1e-2 * probe.weight.detach()
    assert float(gradient.abs().max()) < 1e-5 and float(off.sum(0).abs().max()) < 1e-5


# ---- bootstrap ----

def test_the_bootstrap_draws_groups_not_rows() -> None:
    parts = [[1, 1]] * 50 + [[0, 1]] * 50                       # one group all right, one all wrong
    value, low, high = Resample(parts, ["x"] * 50 + ["y"] * 50)()
    assert (value, low, high) == (0.5, 0.0, 1.0)                # as rows it would be 0.4 to 0.6
    value, low, high = Resample(parts, [str(n) for n in range(100)], rounds=2000)()
    assert value == 0.5 and low == pytest.approx(0.40, abs=0.02) and high == pytest.approx(0.60, abs=0.02)     # 1.96 sqrt(.25 / 100)


def test_the_bootstrap_is_seeded_and_says_when_it_cannot_tell() -> None:
    parts, groups = np.random.default_rng(0).random((20, 2)), [str(n % 7) for n in range(20)]
    assert Resample(parts, groups, seed=3)() == Resample(parts, groups, seed=3)() != Resample(parts, groups, seed=4)()
    value, low, high = Resample([[3, 4]], ["only"])()
    assert value == 0.75 and math.isnan(low) and math.isnan(high)
    assert math.isnan(ratio(np.zeros(2)))
    sums = Resample([[1, 2], [5, 2]], ["a", "b"])               # a ratio of sums, not a mean of ratios
    assert sums()[0] == 1.5 and sums(lambda s: math.exp(s[0] / s[1]))[0] == pytest.approx(math.exp(1.5))


def test_words_and_figures_are_spelled() -> None:
    assert [metrics.spell(n) for n in (0, 13, 21, 100, 742, 1_000_001)] == [
        "zero", "thirteen", "twenty one", "one hundred", "seven hundred forty two", "one million one"]
