"""Likelihood tests: minimal pairs, spoken multiple choice, and a paired comparison of two such evaluations.

    python evaluate.py pairs out/smoke_dsaa                    the bundled pairs, assets/speech/pairs.jsonl
    python evaluate.py pairs out/dsaa --set=swuggy.jsonl       one line an item: {"id": "7", "right": CLIP, "wrong": CLIP}
    python evaluate.py choices out/dsaa --set=mmlu.jsonl       {"id": "7", "context": [CLIP, ...], "choices": [CLIP, ...], "answer": 2}
    python evaluate.py compare a/pairs.jsonl b/pairs.jsonl     items that only one run gets right, and McNemar's test of the difference

A CLIP is {"audio": "a.wav"}, {"text": "four nine"}, or both. In dialogues (Moshi, DSAA) "words" [["four", 0.31], ...] align
the text with the frames; without them the text row is empty. Models that speak texts score a recording given its text (clips of
"context" are voice references), those that take turns a recording or a text as the reply to the context, or to the clip's own text
where there is none, text models the text.

Pairs can be sWUGGY and sBLIMP (a word, a sentence), StoryCloze ("context": [CLIP], then two ends) and SALMon (two recordings);
choices any spoken multiple choice. An item may name its "task"; shares are given for each, ties count one half. The bundled pairs:

    text      a recording with its text, and the same recording with its words in another order
    match     the recording of a text, and that of another text by the same speaker, as if it said it
    speaker   behind a recording of one speaker: a text by the same speaker, and the same text by another one (SALMon's consistency)

Each item is one line of the result, with its own scores, so that two runs are compared item by item and not by their averages.
`compare` also takes two results of `evaluate.py speech`: numbers are compared by a permutation test.

    score of a clip    sum of w log p over its targets / sum of w         w = 100 on the semantic codebook as in training, else 1
    score of a choice  text_share * text + (1 - text_share) * speech      over the choice only, given the context

Every token is scored by the logits that predict it: the grid and the weights are delayed by one function.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from audio.wav import load_wav
from corpus.cache import encode
from corpus.data_config import DataConfig
from corpus.index import codebooks_of, fitting_codec, new_chat
from evaluation.metrics import paired_difference
from families.family import family_of, lay_out
from generation.command_line import Job, load_for_sampling
from model import MultistreamLM
from options import check_types, locate, read_rows, write_rows
from streams import Example, StreamTable, delay
from text.conversation import Chat
from text.normalisers import normalise
from text.tokenizers import Tokenizer, load_tokenizer
from text.word_times import MAIN, aligned_ids, frame_starts, interleave, tokenise

Row = dict[str, Any]
BUNDLED = "assets/speech/pairs.jsonl"


@dataclass(frozen=True)
class MinimalPairsConfig:
    """Options of `python evaluate.py pairs|choices RUN`."""

    set: str = ""                  # JSONL file of items; recordings are in the folder of the file or below; "" = the bundled pairs
    out: str = ""                  # JSONL file of results; "" = RUN/pairs.jsonl or RUN/choices.jsonl
    text_share: float = 0.9        # choices: weight of the text score, 0 to 1; the speech score has the rest
    semantic: float = 100.0        # weight of the first (semantic) codebook in a score; the other codebooks have 1
    limit: int = 0                 # largest number of items to score; 0 = all

    def __post_init__(self) -> None:
        check_types(self)
        assert 0 <= self.text_share <= 1 and self.semantic > 0 and self.limit >= 0, "text_share is in [0, 1], semantic positive, limit >= 0"


# ---- likelihoods ----

@torch.inference_mode()
def log_probabilities(model: MultistreamLM, tokens: Tensor) -> Tensor:
    """log p of each token given the columns before it, 0 where none is predicted.   tokens (K, S) -> (K, S)"""
    text, audio = model(tokens[None])
    table, found = model.table, torch.zeros(tokens.shape, dtype=torch.float64)
    rows = [(k, text[0]) for k in table.text_out] + [(k, audio[0, n]) for n, k in enumerate(table.audio_out)]
    for k, logits in rows:
        target = tokens[k, 1:]
        known = (target >= 0) & (target < logits.shape[-1])
        chosen = logits.double().log_softmax(-1).gather(-1, target.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        found[k, 1:] = torch.where(known, chosen, 0.0)
    return found


@dataclass
class Clip:
    """One clip, or several in a row, as a grid: tokens (K, S), and a mask (K, S) of the tokens that are scored."""

    tokens: Tensor
    counts: Tensor


def scores(model: MultistreamLM, clip: Clip, semantic: float) -> dict[str, float]:
    """Mean log p: `speech` weighted as in training, `semantic` codebook only, `plain` mean of all codes, `text`; NaN = no token."""
    logs, counts, table = log_probabilities(model, clip.tokens), clip.counts.double(), model.table
    first, audio = table.audio_out[:1], table.audio_out
    heavy = counts.clone()
    heavy[first] *= semantic

    def mean(weights: Tensor, rows: Sequence[int]) -> float:
        total = float(weights[rows].sum()) if rows else 0.0
        return float((weights[rows] * logs[rows]).sum()) / total if total else math.nan

    spoken = {"speech": mean(heavy, audio), "semantic": mean(counts, first), "plain": mean(counts, audio)}
    return spoken | {"text": mean(counts, table.text_out)}


# ---- clips -> grids ----

@dataclass
class Reader:
    """Turns the clips of a set into grids of a model."""

    table: StreamTable
    codec: Any
    tokenizer: Tokenizer
    data: DataConfig
    folder: Path
    unread: int = 0             # clips of contexts that the model does not read

    def clip(self, parts: Sequence[Row], scored: int, where: str) -> Clip:
        """Concatenate clips; those from number `scored` on are scored. ValueError names `where`."""
        for part in parts:
            if not isinstance(part, dict) or not (part.get("audio") or part.get("text")):
                raise ValueError(f"{where}: a clip is {{\"audio\": ...}} or {{\"text\": ...}}, got {json.dumps(part)[:60]}")
        if self.table.monologue:
            return self.dialogue(parts, scored, where)
        if self.table.codes:
            return self.reply(parts[:scored], parts[scored:], where) if self.turns else self.spoken(parts[:scored], parts[scored:], where)
        ids = [torch.tensor(self.tokenizer.encode(self.said(part)), dtype=torch.int64) for part in parts]
        if empty := [part for part, found in zip(parts, ids, strict=True) if not len(found)]:
            raise ValueError(f"{where}: this model reads text alone; add \"text\" to {json.dumps(empty[0])[:60]}")
        tokens = torch.full((len(self.table), sum(map(len, ids))), -1)
        tokens[0] = torch.cat(ids)
        first = max(1, sum(map(len, ids[:scored])))                   # nothing predicts the first column
        counts = torch.zeros(tokens.shape)
        counts[0, first:] = 1
        return Clip(tokens, counts)

    def said(self, part: Row) -> str:
        return normalise(str(part.get("text", "")), self.data.normaliser)

    @cached_property
    def chat(self) -> Chat | None:
        return new_chat(self.data, self.tokenizer, self.table)

    @property
    def turns(self) -> bool:
        """Whether the model takes turns, rather than speaking a text in the voice of a recording."""
        return self.chat is not None and self.chat.template.clone_prompt is None

    def spoken(self, context: Sequence[Row], own: Sequence[Row], where: str) -> Clip:
        """The grid of a text and its recording, as in training; recordings of the context are voice references."""
        most, (part,) = family_of(self.table).references, own
        if lacking := [p for p in (*context, part) if not (p.get("audio") and p.get("text"))]:
            raise ValueError(f"{where}: this model speaks texts; add \"audio\" and \"text\" to {json.dumps(lacking[0])[:60]}")
        self.unread += max(0, len(context) - most)
        context = context[len(context) - min(most, len(context)) :]
        if self.chat is not None:
            voices = [(self.said(p), self.side(p, where)) for p in context]
            example = Example(torch.zeros(0, dtype=torch.long), segments=self.chat.spoken(part["text"], self.side(part, where), voices))
        else:
            example = self.utterance(part, where)
            example.reference = self.utterance(context[0], where) if context else None
        return self.targets(example)

    def reply(self, context: Sequence[Row], own: Sequence[Row], where: str) -> Clip:
        """The grid of a conversation: the user's turn is the context, or else the clip's text; the reply is its recording, or its text."""
        def content(part: Row) -> dict[str, str]:
            return {"type": "audio", "audio_url": part["audio"]} if part.get("audio") else {"type": "text", "text": str(part["text"])}

        if not context:
            context = [{"text": p["text"]} for p in own if p.get("audio") and p.get("text")]
        turns = [{"role": role, "content": [content(p) for p in parts]} for role, parts in (("user", context), ("assistant", own)) if parts]
        codes = [self.side(p, where) for p in (*context, *own) if p.get("audio")]
        return self.targets(Example(torch.zeros(0, dtype=torch.long), segments=self.chat.segments(turns, codes)))

    def targets(self, example: Example) -> Clip:
        tokens, weights = lay_out(example, self.table)
        return Clip(tokens, (weights > 0).float())

    def utterance(self, part: Row, where: str) -> Example:
        """A text and its recording; aligned layouts need to know when each word begins: "words", or spread over the recording."""
        codes, rate = self.side(part, where), self.codec.frame_rate
        if not self.table.aligned:
            return Example(torch.tensor(self.tokenizer.encode(self.said(part)), dtype=torch.long), codes)
        try:
            ids, times = aligned_ids(part, codes.shape[1] / rate, self.tokenizer, self.data.normaliser)
            starts = frame_starts(times, rate, 1.0, 0.0, codes.shape[1])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return Example(torch.tensor(ids, dtype=torch.long), codes, torch.tensor(starts, dtype=torch.long))

    def side(self, part: Row, where: str) -> Tensor:
        """Codes of the left or only channel, (Q, T)."""
        return self.codes(part["audio"], where)[0][: len(self.table.codes_out)]

    def dialogue(self, parts: Sequence[Row], scored: int, where: str) -> Clip:
        """Frames of a dialogue: the clip is the agent's side; the user's side is silence or the right channel of a stereo file."""
        agent, user, texts, context = [], [], [], 0
        for n, part in enumerate(parts):
            if not part.get("audio"):
                raise ValueError(f"{where}: a dialogue model scores speech; add \"audio\" to {json.dumps(part)[:60]}")
            codes = self.codes(part["audio"], where)
            agent.append(codes[0])
            user.append(codes[1])
            texts.append(self.text_row(part, codes.shape[-1], where))
            context += codes.shape[-1] * (n < scored)
        Q, table = min(len(self.table.audio_out), codebooks_of(self.table)), self.table         # also of a model that predicts both sides
        other = torch.cat(user if Q else agent, -1)[: len(table.audio) - Q]                     # speech to text hears the clip
        held = table.column("start")[1 : table.lead].expand(-1, other.shape[1])
        frames = torch.cat([torch.cat(texts)[None], held, torch.cat(agent, -1)[:Q], other])
        counts = ((frames >= 0) & (self.table.column("classes") > 0) & (torch.arange(frames.shape[1]) >= context)).float()
        counts[1 : table.lead], counts[table.lead + Q :] = 0, 0
        return Clip(delay(frames, self.table.delays, self.table.column("start")), delay(counts, self.table.delays, 0.0))

    def codes(self, name: str, where: str) -> Tensor:
        """Codes of both channels, (2, Q, T)."""
        path = Path(os.path.realpath(self.folder / name))          # unlike resolve, also of a link to itself
        if not path.is_relative_to(os.path.realpath(self.folder)):
            raise ValueError(f"{where}: {name} lies outside {self.folder}; put the recordings beside the set")
        wav, _ = load_wav(path, self.codec.sample_rate)
        sides = wav[:2] if len(wav) == 2 else torch.cat([wav[:1], torch.zeros_like(wav[:1])])
        return encode(self.codec, sides).unflatten(0, (2, -1))

    def text_row(self, part: Row, frames: int, where: str) -> Tensor:
        if "words" not in part:
            return torch.full((frames,), -1)
        try:
            words = [(normalise(str(word), self.data.normaliser), float(at), float(at), MAIN) for word, at in part["words"]]
        except (TypeError, ValueError):
            raise ValueError(f"{where}: \"words\" is [[word, start in seconds], ...], got {json.dumps(part['words'])[:60]}") from None
        timed = tokenise([w for w in words if w[0]], self.tokenizer)
        return interleave(timed, frames, self.codec.frame_rate, pad=self.table.pad, epad=self.table.epad)


# ---- commands ----

def items(path: Path, fields: dict[str, type], limit: int) -> list[Row]:
    """Rows of a set, numbered by their line where they have no id."""
    rows = [row | {"id": str(row.get("id", n))} for n, row in read_rows(path, "item of a set", **fields)]
    if not rows:
        raise ValueError(f"{path} holds no item; add lines of JSON")
    return rows[:limit] if limit else rows


def pairs(run: str, job: MinimalPairsConfig) -> dict[str, float]:
    """Score the pairs of a set; writes an item a line, returns accuracies by speech, semantic codebook, plain mean and text."""
    bundled, job = not job.set, job if job.set else replace(job, set=str(locate(BUNDLED)))
    model, reader, target = begin(run, job, "pairs")
    results, unfit = [], list[str]()
    for item in tqdm(items(Path(job.set), {"right": dict, "wrong": dict}, job.limit), unit="pair", disable=None):
        where, context = f"{job.set} item {item['id']}", item.get("context") or []
        try:
            sides = [reader.clip([*context, item[side]], len(context), where) for side in ("right", "wrong")]
            if bundled and torch.equal(sides[0].tokens, sides[1].tokens):
                raise ValueError(f"{where}: this model reads the same on both sides")
        except ValueError as error:
            if not bundled:
                raise
            unfit.append(str(error))
            continue
        right, wrong = (scores(model, clip, job.semantic) for clip in sides)
        results.append({"id": item["id"], "right": verdict(right, wrong), "scores": {"right": right, "wrong": wrong}}
                       | {key: item[key] for key in ("task",) if key in item})
    if unfit:                               # of the bundled pairs; those of a user are all meant
        print(f"left out: {len(unfit)} pairs do not suit this model, such as {unfit[0]}")
    if not results:
        raise ValueError(f"no pair is left: {unfit[0]}; write pairs for this model and name them with --set")
    write_rows(target, results)
    say_unread(reader)
    shares = shares_of(results)
    print(f"{target}: {len(results)} pairs; right by " + shown(shares))
    for task in dict.fromkeys(r["task"] for r in results if "task" in r):
        inside = [r for r in results if r.get("task") == task]
        print(f"  {task}: {len(inside)} pairs; right by " + shown(shares_of(inside)))
    return shares


def shares_of(results: Sequence[Row]) -> dict[str, float]:
    """The share of pairs in which each score prefers the right one; a tie is one half."""
    gaps = {name: [r["scores"]["right"][name] - r["scores"]["wrong"][name] for r in results]
            for name in ("speech", "semantic", "plain", "text")}
    return {name: share([0.5 * (gap >= 0) + 0.5 * (gap > 0) for gap in found if not math.isnan(gap)]) for name, found in gaps.items()}


def say_unread(reader: Reader) -> None:
    if reader.unread:
        most = family_of(reader.table).references
        print(f"{reader.unread} clips of contexts were not read: this model takes {most} voice references, and reads the last ones")


def shown(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in shares.items() if not math.isnan(value))


def verdict(right: dict[str, float], wrong: dict[str, float]) -> bool:
    """Whether the right one is more likely: by its speech, or by its text if there is no speech."""
    name = "speech" if not math.isnan(right["speech"]) else "text"
    return right[name] > wrong[name]


def choices(run: str, job: MinimalPairsConfig) -> float:
    """Score spoken multiple choice; returns the accuracy."""
    model, reader, target = begin(run, job, "choices")
    results = []
    for item in tqdm(items(Path(job.set), {"choices": list, "answer": int}, job.limit), unit="question", disable=None):
        where, context = f"{job.set} item {item['id']}", item.get("context") or []
        if not 0 <= item["answer"] < len(item["choices"]):
            raise ValueError(f"{where}: answer {item['answer']} is none of {len(item['choices'])} choices, counted from 0")
        found = [choice_score(scores(model, reader.clip([*context, choice], len(context), where), job.semantic), job.text_share)
                 for choice in item["choices"]]
        best = max(range(len(found)), key=found.__getitem__)
        results.append({"id": item["id"], "right": best == item["answer"], "chosen": best, "scores": found})
    write_rows(target, results)
    say_unread(reader)
    accuracy = share([r["right"] for r in results])
    print(f"{target}: {len(results)} questions, {accuracy:.3f} right")
    return accuracy


def choice_score(found: dict[str, float], text_share: float) -> float:
    """Text score and speech score of a choice in one number; a missing one is left out."""
    parts = [(text_share, found["text"]), (1 - text_share, found["plain"])]
    known = [(w, x) for w, x in parts if not math.isnan(x)]
    total = sum(w for w, _ in known)
    return sum(w * x for w, x in known) / total if total else sum(x for _, x in known) / max(1, len(known))


def begin(run: str, job: MinimalPairsConfig, kind: str) -> tuple[MultistreamLM, Reader, Path]:
    if not job.set:
        raise ValueError(f"nothing to score; add --set=FILE.jsonl of {kind}")
    model, data = load_for_sampling(Job(ckpt=run))
    tokenizer = load_tokenizer(data.tokenizer)
    codec = fitting_codec(data.codec, model.table, tokenizer)
    target = Path(job.out) if job.out else Path(run) / f"{kind}.jsonl"
    return model, Reader(model.table, codec, tokenizer, data, Path(job.set).parent), target


def share(right: Sequence[float]) -> float:
    return sum(right) / len(right) if right else math.nan


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Which items only one of two evaluations got right, and the exact two-sided p of McNemar's test that both are equal.

    Results of `evaluate.py speech` have numbers instead: their paired differences.
    """
    rows = [items(path, {}, 0) for path in (one, other)]
    if not any("right" in row for row in (*rows[0], *rows[1])):
        return compare_numbers(rows, (one, other))
    verdicts = [{row["id"]: bool(row["right"]) for row in items(path, {"right": bool}, 0)} for path in (one, other)]
    shared = verdicts[0].keys() & verdicts[1].keys()
    if not shared:
        raise ValueError(f"{one} and {other} share no item id; compare two evaluations of the same set")
    only = [sorted(i for i in shared if a[i] and not b[i]) for a, b in (verdicts, verdicts[::-1])]
    found = {"items": len(shared), "both": sum(verdicts[0][i] and verdicts[1][i] for i in shared), "only": only,
             "p": mcnemar(len(only[0]), len(only[1]))}
    print(f"{len(shared)} items: both right {found['both']}; only {one} {len(only[0])}: {', '.join(only[0][:8])}; "
          + f"only {other} {len(only[1])}: {', '.join(only[1][:8])}; p = {found['p']:.4f}")
    return found


def compare_numbers(rows: Sequence[Sequence[Row]], paths: tuple[Path, Path]) -> dict[str, Any]:
    """The paired difference of every number that both results have, and p of a permutation test."""
    second = {row["id"]: row for row in rows[1]}
    pairs = [(row, second[row["id"]]) for row in rows[0] if row["id"] in second]
    names = [key for key in (pairs[0][0] if pairs else {}) if all(isinstance(r.get(key), (int, float)) for pair in pairs for r in pair)]
    if not names:
        raise ValueError(f"{paths[0]} and {paths[1]} share no item with numbers; compare two evaluations of the same set")
    found = {name: paired_difference([a[name] for a, _ in pairs], [b[name] for _, b in pairs]) for name in names}
    for name, gap in found.items():
        print(f"{name}: {paths[1]} - {paths[0]} = {gap['difference']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f}), "
              + f"p = {gap['p']:.4f}, {gap['items']} items")
    return found


def mcnemar(a: int, b: int) -> float:
    """Exact two-sided p of McNemar's test with a and b discordant items (binomial with probability 1/2)."""
    n, k = a + b, min(a, b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
