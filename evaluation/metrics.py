"""Numbers that say how good something is, from texts, counts and features: pure functions, nothing is loaded or written.

    wer("four nine", "49") 0.0            bleu([...], [...]) 31.2         rouge([...], [...]) {"rouge1": 0.61, ...}
    macro_f1(confusion(truth, guess, names))                            LinearProbe(features, labels)(others)
    Resample(parts, groups)(ratio)        (value, low, high): bootstrap over groups, since paraphrases are no independent rows
    seed_tts_wer("It's 5.", "it's five") 0.5                  as papers on text to speech count it
    paired_difference([0.1, 0.0], [0.2, 0.1])                 two systems on the same items: difference, interval, p

WER and CER read figures both ways: a recogniser writes numbers in its own way ("492" for "four nine two"), so each side
is read as a number and digit by digit, and the closer reading counts. Errors are capped at the reference's length:
nonsense scores 1. BLEU and ROUGE are those of the packages sacrebleu and rouge-score. Next: report.py.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen""".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
SIGNS = {"%": "percent", "#": "pound", "&": "and", "$": "dollars", "@": "at", "*": "star", "+": "plus"}


# ---- text ----

def spell(number: int) -> str:
    """Spell a whole number below 10^12 in words: 742 -> 'seven hundred forty two'."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return (TENS[number // 10] + " " + (ONES[number % 10] if number % 10 else "")).strip()
    for size, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            return f"{spell(number // size)} {name}" + (f" {spell(rest)}" if rest else "")
    raise AssertionError(number)


def spell_ordinal(number: int) -> str:
    """21 -> 'twenty first'."""
    *head, last = spell(number).split()
    if last not in ORDINALS:
        last = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return " ".join([*head, ORDINALS.get(last, last)])


def normalise(text: str, digit_by_digit: bool = False) -> str:
    """Lower-case words only: signs and ordinals spelled out, numbers read whole or digit by digit."""
    text = text.lower().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)                             # 1,234 -> 1234
    text = re.sub(r"(\d+)(?:st|nd|rd|th)\b", lambda m: f" {spell_ordinal(int(m[1][-12:]))} ", text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, f" {word} ")
    text = re.sub(r"\d+", lambda m: f" {_read(m[0], digit_by_digit)} ", text)
    text = re.sub(r"(?<=\w)'(?=\w)", "", text)                                  # i'm -> im, on both sides
    text = re.sub(r"\b(re|de|un|non)-(?=[a-z])", r"\1", text)                   # re-enter -> reenter
    return " ".join(re.findall(r"[^\W_]+", text))


def _read(digits: str, digit_by_digit: bool) -> str:
    by_digit = digit_by_digit or len(digits) > 12 or (len(digits) > 1 and digits[0] == "0")
    return " ".join(ONES[int(d)] for d in digits) if by_digit else spell(int(digits))


def edit_distance(a, b) -> int:
    """Fewest insertions, deletions and substitutions that turn sequence a into sequence b."""
    return edit_distances(a, b)[-1]


def edit_distances(a, b) -> list[int]:
    """Edit distances of sequence a to every beginning of sequence b, the empty one first."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row


def wer(reference: str, hypothesis: str) -> float:
    """Word error rate in [0, 1], the better of the two readings of numbers on either side."""
    return _error_rate(reference, hypothesis, str.split)


def cer(reference: str, hypothesis: str) -> float:
    """Character error rate in [0, 1]; spaces do not count."""
    return _error_rate(reference, hypothesis, lambda text: text.replace(" ", ""))


def _error_rate(reference: str, hypothesis: str, units) -> float:
    rates = []
    for ref in {normalise(reference, by_digit) for by_digit in (False, True)}:
        for hyp in {normalise(hypothesis, by_digit) for by_digit in (False, True)}:
            right, found = units(ref), units(hyp)
            rates.append(min(edit_distance(right, found), len(right)) / max(len(right), 1))
    return min(rates)


# ---- error rates of text to speech, as papers count them ----

# Signs that Seed-TTS's script removes: those of Chinese text, and ASCII's but for the apostrophe (of which "it’s" loses the curly one)
REMOVED = dict.fromkeys(map(ord, "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】"
                               + "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏﹑﹔·．！？｡。"
                               + string.punctuation.replace("'", "")))
BY_CHARACTER = ("zh", "yue", "ja", "th", "lo", "my", "km")      # languages that are written without spaces between words,
SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "MYANMAR", "KHMER")        # and how the names of their letters begin


def units(text: str, language: str = "") -> list[str]:
    """What an error rate counts, by Seed-TTS's normalisation: lower-case words, or characters where words are not written apart.

    `language` is a code such as en or zh-cn; "" decides by the script of the text. Characters keep their case, as in the script.
    """
    text = text.translate(REMOVED)
    return [c for c in text if not c.isspace()] if by_character(text, language) else text.lower().split()


def by_character(text: str, language: str = "") -> bool:
    if language:
        return language.lower().split("-")[0].split("_")[0] in BY_CHARACTER
    letters = [unicodedata.name(c, "").startswith(SCRIPTS) for c in text if c.isalnum()]
    return 2 * sum(letters) > len(letters)


def seed_tts_wer(reference: str, hypothesis: str, language: str = "") -> float:
    """Word error rate (of characters in Chinese and the like) as seed-tts-eval counts it: not capped; NaN without a word to say.

    Papers give the mean over utterances, not errors over all words.
    """
    language = language or ("zh" if by_character(reference) else "en")
    return _seed_rate(units(reference, language), units(hypothesis, language))


def seed_tts_cer(reference: str, hypothesis: str) -> float:
    """Character error rate after the same normalisation, without spaces, in lower case."""
    return _seed_rate(*("".join(units(text.lower(), "zh")) for text in (reference, hypothesis)))


def _seed_rate(right: Sequence[str], found: Sequence[str]) -> float:
    return edit_distance(right, found) / len(right) if right else math.nan


def repetition(reference: Sequence[str], found: Sequence[str], n: int = 2) -> float:
    """Share of the n-grams of what was recognised that come again, more often than in the text: loops and stutters."""
    said, expected = (Counter(tuple(part[i : i + n]) for i in range(len(part) - n + 1)) for part in (found, reference))
    return sum(max(0, count - max(1, expected[gram])) for gram, count in said.items()) / max(1, said.total())


def truncation(reference: Sequence[str], found: Sequence[str]) -> float:
    """Share of the text that is missing at its end: what the best alignment deletes behind the last word that was recognised."""
    row = edit_distances(found, reference)
    kept = next(k for k in range(len(row)) if row[k] + len(reference) - k == row[-1])
    return 1 - kept / len(reference) if reference else 0.0


# ---- likeness of texts ----

def needs(package: str, what: str) -> ValueError:
    return ValueError(f'{what} needs {package}, which is not installed; run: pip install -e ".[eval]"')


def bleu_parts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """What BLEU adds up, a row for each pair: 4 hits, 4 n-grams, length of the hypothesis and of the reference.   (N, 10)"""
    try:
        from sacrebleu.metrics import BLEU
    except ModuleNotFoundError as error:
        raise needs(str(error.name), "BLEU") from None
    scores = [BLEU(effective_order=True).sentence_score(h, [r]) for r, h in zip(references, hypotheses, strict=True)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=np.float64).reshape(-1, 10)


def bleu_of(parts: np.ndarray) -> float:
    """Corpus BLEU-4 in percent (tokens 13a, exponential smoothing) from summed parts (10,)."""
    from sacrebleu.metrics import BLEU
    counts = [int(n) for n in parts]
    return float(BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score)


def bleu(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    return bleu_of(bleu_parts(references, hypotheses).sum(0))


class Words:
    """Lower-case words of any script for rouge-score, whose own tokenizer drops whatever is not a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge_rows(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """F-measures of each pair, without stemming.   (N, 3): ROUGE-1, ROUGE-2, ROUGE-L"""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise needs("rouge-score" if error.name == "rouge_score" else str(error.name), "ROUGE") from None
    scorer = RougeScorer(list(ROUGE), tokenizer=Words())
    scores = [scorer.score(r, h) for r, h in zip(references, hypotheses, strict=True)]
    return np.array([[s[name].fmeasure for name in ROUGE] for s in scores]).reshape(-1, 3)


def rouge(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Mean F-measures over all pairs."""
    return dict(zip(ROUGE, rouge_rows(references, hypotheses).mean(0).tolist(), strict=True))


# ---- classes ----

def confusion(truth: Sequence[str], guess: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """How often each class (row) was taken for each (column).   (C, C)"""
    place = {name: n for n, name in enumerate(names)}
    table = np.zeros((len(names), len(names)), dtype=np.int64)
    for t, g in zip(truth, guess, strict=True):
        table[place[t], place[g]] += 1
    return table


def macro_f1(table: np.ndarray) -> float:
    """Mean F1 of the classes that occur in truth: 2 hits / (times true + times guessed)."""
    true, guessed, hits = table.sum(1), table.sum(0), table.diagonal()
    there = true > 0
    return float((2 * hits[there] / (true + guessed)[there]).mean()) if there.any() else math.nan


class LinearProbe:
    """Logistic regression on standardised features (N, D) with an L2 penalty, to its optimum (L-BFGS in float64)."""

    def __init__(self, features: Tensor, labels: Sequence[str], penalty: float = 1e-2) -> None:
        self.names = sorted(set(labels))
        x = features.double()
        self.mean, self.scale = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
        target = torch.tensor([self.names.index(label) for label in labels])
        self.weight = torch.zeros(x.shape[1], len(self.names), dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(len(self.names), dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([self.weight, self.bias], max_iter=200, line_search_fn="strong_wolfe")

        def step() -> Tensor:
            solver.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.scores(x), target) + penalty / 2 * self.weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(step)

    def scores(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias

    def __call__(self, features: Tensor) -> list[str]:
        """The class of each row.   (N, D) -> N names"""
        with torch.no_grad():
            return [self.names[i] for i in self.scores(features).argmax(1).tolist()]


# ---- how sure ----

def ratio(parts: np.ndarray) -> float:
    """(2,) numerator and denominator -> their ratio, NaN over nothing."""
    return float(parts[0] / parts[1]) if parts[1] else math.nan


class Resample:
    """Bootstrap of a figure made of summed parts (N, P): whole groups are drawn with replacement, seeded.

    One group, or none, gives no interval: (value, nan, nan).
    """

    def __init__(self, parts: Any, groups: Sequence[str], rounds: int = 1000, seed: int = 0, level: float = 0.95) -> None:
        parts = np.asarray(parts, dtype=np.float64)
        names = sorted(set(groups))
        sums = np.zeros((len(names), parts.shape[1]))
        np.add.at(sums, [names.index(g) for g in groups], parts)
        self.total, self.level = sums.sum(0), level
        drawn = np.random.default_rng(seed).integers(0, len(names), (rounds, len(names))) if len(names) > 1 else None
        self.rounds = sums[drawn].sum(1) if drawn is not None else np.empty((0, parts.shape[1]))        # (rounds, P)

    def __call__(self, figure: Callable[[np.ndarray], float] = ratio) -> tuple[float, float, float]:
        """-> (value of all, lower, upper end of its interval)"""
        values = [value for value in map(figure, self.rounds) if math.isfinite(value)]
        if not values:
            return figure(self.total), math.nan, math.nan
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return figure(self.total), float(low), float(high)


def paired_difference(one: Sequence[float], other: Sequence[float], rounds: int = 1000, seed: int = 0,
                      level: float = 0.95) -> dict[str, float]:
    """Two systems on the same items: mean of other - one, its bootstrap interval over items, and p of a sign-flip permutation test.

    p is two-sided: how often the mean difference would be as large if which system gave which number were chance. All flips are
    counted where they are at most `rounds`, else `rounds` are drawn (seeded). Items without a number on either side do not count.
    """
    gap = np.asarray(other, dtype=np.float64) - np.asarray(one, dtype=np.float64)
    gap = gap[np.isfinite(gap)]
    if not len(gap):
        return {"items": 0, "difference": math.nan, "low": math.nan, "high": math.nan, "p": math.nan}
    draw = np.random.default_rng(seed)
    all_flips = 2 ** len(gap) <= rounds
    signs = np.array(list(product((-1, 1), repeat=len(gap)))) if all_flips else draw.choice((-1, 1), (rounds, len(gap)))
    as_large = np.abs((signs * gap).mean(1)) >= abs(gap.mean()) - 1e-12
    means = gap[draw.integers(0, len(gap), (rounds, len(gap)))].mean(1) if len(gap) > 1 else np.full(1, math.nan)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"items": len(gap), "difference": float(gap.mean()), "low": float(low), "high": float(high),
            "p": float(as_large.mean() if all_flips else (1 + as_large.sum()) / (1 + rounds))}
