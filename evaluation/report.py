"""Held-out evaluation of a run: metrics with confidence intervals, and an HTML page with tables, curves and audio players.

    python evaluate.py report out/ivr_qwen                                            on the run's own held-out rows
    python evaluate.py report out/ivr_qwen --sources=assets/ivr/test.jsonl            on rows that no run has seen

For every family: loss, perplexity and accuracy of each predicted stream, the adapter against its base (the same weights with
the adapters switched off), the curves of the run, and its audio samples with word and character error rates. For text
conversations also: replies to every held-out turn with BLEU, ROUGE, the shares of made-up figures and of answers without support,
intent classification (by key words, and by a linear probe on hidden states), all by slice, and the loss on general texts.

Intervals are a seeded bootstrap over groups of rows (the wordings of one call are one group). The output is in RUN/report:
rows.jsonl (every row, every reply), summary.json, index.html. Next: html_page.py.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lora
from checkpoint import base_of, load
from config import TrainConfig
from corpus.data_config import DataConfig, source_weight
from corpus.examples import build_example
from corpus.index import Entry, Index, open_cache, prepare
from corpus.layouts import json_rows
from corpus.manifest import Manifest, label
from corpus.phone_calls import CATEGORIES, UNKNOWN, intent, ungrounded
from corpus.phone_calls import entities as named
from evaluation import speech_measures
from evaluation.html_page import Page, show
from evaluation.metrics import ROUGE, LinearProbe, Resample, bleu_of, bleu_parts, confusion, macro_f1, ratio, rouge_rows
from evaluation.speech_measures import Recogniser
from families.family import family_of, lay_out, other_grid
from generation.command_line import check_device, check_names
from generation.decode_step import SampleConfig
from model import MultistreamLM
from options import from_json, locate, read_json, write_json, write_rows
from sample import generate, pad_left
from streams import Example
from text.conversation import clips
from text.passages import UNSUPPORTED, adding_passages, support_parts
from text.tokenizers import load_tokenizer
from training.monitor import read_metrics

Row = dict[str, Any]
GENERIC, OUT_OF_SCOPE = "assets/ivr/generic.jsonl", "assets/ivr/out_of_scope.txt"


@dataclass(frozen=True)
class Evaluation:
    """Options of `python evaluate.py report RUN`."""

    sources: tuple[str, ...] = ()  # manifests to evaluate on, without rows of split "train"; () = the held-out rows of the run
    out: str = ""                  # output folder; "" = RUN/report
    base: str = ""                 # checkpoint to compare with; "" = the model without adapters, or the run's --init; "none" = none
    generic: str = GENERIC         # JSONL file of general texts, on which forgetting is measured; "" = off
    out_of_scope: str = OUT_OF_SCOPE   # text file of callers' sentences that belong to no category, one a line; "" = off
    documents: str = ""            # folder of documents whose passages each question gets, as with --chat.documents; "" = none
    replies: int = 0               # number of conversations for which replies are generated; 0 = all
    max_tokens: int = 96           # largest number of tokens in a reply
    temperature: float = 0.0       # sampling temperature of replies; 0 = greedy
    batch: int = 16                # number of replies generated at once
    rounds: int = 1000             # number of bootstrap rounds for the intervals
    seed: int = 0                  # random seed of the bootstrap and of replies
    recogniser: str = ""           # speech recogniser, module:function from a list of (wav, rate) to a list of texts; "" = Whisper tiny.en
    device: str = "cpu"            # device of the models: cpu or cuda
    dtype: str = "fp32"            # dtype of the models: fp32, bf16 or fp16

    def __post_init__(self) -> None:
        assert self.rounds <= 10**6, f"rounds {self.rounds} are more than 10^6"
        assert min(self.batch, self.max_tokens, self.rounds) > 0 <= self.replies, "batch, max_tokens and rounds are at least 1, replies 0"
        check_names(self.device, self.dtype)


@dataclass
class Held:
    """The evaluated data: held-out entries of an index, and their rows in the manifests."""

    index: Index
    numbers: list[int]
    rows: list[Row]

    @property
    def groups(self) -> list[str]:
        return [(label(row.get("group")) or str(row["id"])) for row in self.rows]


@dataclass
class Case:
    """One assistant turn to generate: the messages before it, the reference reply, and the reply of each model."""

    row: Row
    before: list[Row]
    reference: str
    replies: dict[str, str] = field(default_factory=dict)
    ended: dict[str, bool] = field(default_factory=dict)


def report(run: Path, job: Evaluation, hear: Recogniser | None) -> Path:
    """Evaluate a run folder or a checkpoint; returns the page."""
    check_device(job.device, job.dtype)
    model = load(run, job.device, job.dtype)
    own, started = of_run(run, model)
    data = replace(own, sources=job.sources, split="manifest") if job.sources else own
    if not data.sources:
        raise ValueError(f"{run} has no data sources in its config; name held-out rows with --sources=FILE")
    held = read_held(data, model)
    out = Path(job.out) if job.out else run / "report"
    models = compared(model, job.base, started, job.device, job.dtype)
    summary: dict[str, Any] = {"run": str(run), "step": model.extras.step, "models": list(models), "rows": len(held.rows)}
    page = Page(f"{run}: step {model.extras.step}", out)
    page.note(f"{len(held.rows)} held-out rows in {len(set(held.groups))} groups, from {', '.join(data.sources)}. "
              + f"Intervals hold 95 % of {job.rounds} bootstrap rounds over groups, seed {job.seed}.")
    rows = [{"id": row["id"], "group": group} for row, group in zip(held.rows, held.groups, strict=True)]
    if len(models) == 1:
        page.not_made("Base", "the run has no adapters and names no weights that it started from, or --base=none; name one with --base")
    losses = report_losses(models, held, job, summary, page, rows)
    if family_of(model.table).template and not model.table.codes:
        rows += report_calls(models, held, own, losses, job, summary, page)
        report_forgetting(models, data, job, summary, page)
    else:
        page.not_made("Replies, slices, intents, forgetting", "they are measured of models that converse in text, and this one has audio")
    report_speech(run, hear, job, summary, page)
    report_curves(run, page)
    summary["not made"] = page.missing
    write_rows(out / "rows.jsonl", rows)
    write_json(out / "summary.json", summary)
    page.write(out / "index.html")
    return out / "index.html"


# ---- data and models ----

def of_run(run: Path, model: MultistreamLM) -> tuple[DataConfig, str]:
    """The data config of a run with the tokenizer of its checkpoint, and the weights that the run started from."""
    facts = model.extras.data or {}
    if (run / "config.json").is_file() and "steps" in (about := read_json(run / "config.json")):
        config = from_json(TrainConfig, about, f"{run}/config.json")
        return replace(config.data, **{k: v for k, v in facts.items() if k == "tokenizer"}), config.init
    return from_json(DataConfig, facts | {"split": "manifest"}, f"{run}: data"), ""


def read_held(data: DataConfig, model: MultistreamLM) -> Held:
    """Prepare and open the held-out rows; ValueError when there is none."""
    prepare(data, model.table)
    index = open_cache(data, model.table)
    numbers = [n for n, entry in enumerate(index.entries) if entry.split == "held-out"]
    if not numbers:
        raise ValueError(f"{', '.join(data.sources)} has no held-out row; give rows a \"split\" other than train, or name --sources=FILE")
    rows = raw_rows(data)
    return Held(index, numbers, [row_of(index.entries[n], rows) for n in numbers])


def raw_rows(data: DataConfig) -> dict[str, Row]:
    """The rows of JSONL sources by id, with all their fields (category, language, slots)."""
    found: dict[str, Row] = {}
    for source in (locate(source_weight(s)[0]) for s in data.sources):
        if source.suffix == ".jsonl":                       # prepare has named the lines that cannot be read
            found |= {str(row["id"]): row for _, row in json_rows(Manifest(source)) if "id" in row}
    return found


def row_of(entry: Entry, rows: dict[str, Row]) -> Row:
    row = rows.get(entry.id, {})
    return row | {"id": entry.id, "group": label(row.get("group")) or entry.group, "messages": entry.messages, "text": entry.text}


Models = dict[str, Callable[[], Any]]           # name -> context manager that yields the model


def compared(model: MultistreamLM, name: str, started: str, device: str, dtype: str) -> Models:
    """The run's model and, where there is one, its base: `name`, else adapters switched off, or the weights that the run started from."""
    models: Models = {"run": lambda: same(model)}
    if not name and getattr(model, "lora", None) is not None:
        if not model.lora.train:
            return models | {"base": lambda: lora.switched_off(model)}
        name = base_of(model.extras.folder)
    name = name or started
    if name and name != "none":
        base = load(name, device, dtype)
        if gone := other_grid(base.table, model.table):
            raise ValueError(f"{name} has another stream table than the run ({gone[0]}); compare with a checkpoint of the same family")
        models["base"] = lambda: same(base)
    return models


@contextmanager
def same(model: MultistreamLM) -> Iterator[MultistreamLM]:
    yield model


# ---- losses ----

def sums_of(model: MultistreamLM, index: Index, numbers: Sequence[int]) -> np.ndarray:
    """Sums of every row on its own.   (N, K + 1, 4): weighted nll, weight, hits, count; the last is padding in a dialogue's text row"""
    found, device = [], model.temporal.layers[0].attn.o.weight.device
    with torch.inference_mode():
        for n in numbers:
            tokens, weights = lay_out(build_example(index, n, model.table), model.table)
            sums = model(tokens[None].to(device), weights[None].to(device))
            found.append(sums.stacked().cpu().T)
    return torch.stack(found).numpy()


def perplexity(parts: np.ndarray) -> float:
    return math.exp(min(ratio(parts), 700.0)) if parts[1] else math.nan


def report_losses(models: Models, held: Held, job: Evaluation, summary: Row, page: Page, rows: list[Row]) -> dict[str, np.ndarray]:
    """Loss, perplexity and accuracy of every predicted stream; -> per model the text or only group's (N, 2): nll, weight."""
    found = {}
    for name, use in models.items():
        with use() as model:
            found[name], table = sums_of(model, held.index, held.numbers), model.table
    for sums in found.values():
        if sums[:, -1, 1].any():                                            # words apart from padding, as training reports them
            sums[:, -1] = sums[:, table.text_out].sum(1) - sums[:, -1]
    streams = {"text": table.text_out, "words": [-1], "audio": table.audio_out}
    streams |= {table.streams[k].name: [k] for k in [*table.text_out, *table.audio_out]}
    shown, summary["losses"] = [], []
    for stream, ks in streams.items():
        for name, sums in found.items():
            part = sums[:, ks].sum(1)                                        # (N, K, 4) -> (N, 4)
            if not part[:, 1].sum():
                continue
            draw = Resample(part, held.groups, job.rounds, job.seed)
            loss, ppl, hits = draw(), draw(perplexity), draw(lambda s: ratio(s[2:]))
            shown.append([stream, name, loss, ppl, hits, int(part[:, 3].sum())])
            summary["losses"].append({"stream": stream, "model": name, "loss": loss, "perplexity": ppl, "accuracy": hits})
            for row, value in zip(rows, part, strict=True):
                row[f"{name}/{stream}_loss"] = ratio(value)
    page.heading("Held-out loss")
    page.table(["stream", "model", "loss", "perplexity", "accuracy", "targets"], shown, "Loss in nats a target.")
    for stream, name, loss, ppl, *_ in shown:
        print(f"{stream} {name}: loss {show(loss)}, perplexity {show(ppl)}")
    return {name: sums[:, table.text_out or table.audio_out].sum(1)[:, :2] for name, sums in found.items()}


# ---- conversations ----

def cases_of(held: Held, limit: int, add: Callable[[list[Row]], list[Row]]) -> list[Case]:
    """Every assistant turn of the first `limit` conversations, with the messages before it and what `add` adds to them."""
    rows = [row for row in held.rows if row["messages"] and not any(clips(m["content"]) for m in row["messages"])]
    return [Case(row, add(row["messages"][:n]), str(m["content"])) for row in rows[: limit or None]
            for n, m in enumerate(row["messages"]) if m["role"] == "assistant" and n and row["messages"][n - 1]["role"] != "assistant"]


def reply_all(model: MultistreamLM, name: str, cases: list[Case], held: Held, data: DataConfig, job: Evaluation) -> None:
    """Let a model reply to every case, a batch at a time."""
    tokenizer, chat, table = load_tokenizer(data.tokenizer), held.index.chat, model.table
    config = SampleConfig(temperature=job.temperature, max_frames=job.max_tokens, seed=job.seed)
    for at in range(0, len(cases), job.batch):
        part = cases[at : at + job.batch]
        segments = [chat.segments(case.before, [], reply="text") for case in part]
        prompt = pad_left([lay_out(Example(torch.zeros(0, dtype=torch.long), segments=s), table)[0] for s in segments])
        drawn = torch.stack([frame[:, 0].cpu() for frame in generate(model, prompt, config)], -1)        # (B, n)
        for case, ids in zip(part, drawn.tolist(), strict=True):
            said = [i for i in ids if i >= 0]
            case.ended[name] = any(i in table.stop for i in said)
            case.replies[name] = tokenizer.decode([i for i in said if i not in table.stop]).strip()


def made_up(cases: list[Case], replies: Sequence[str]) -> np.ndarray:
    """(N, 2): number of entities in each reply that do not occur in the messages before it, and number of all its entities."""
    before = ["\n".join(str(m["content"]) for m in case.before) for case in cases]
    return np.array([[len(ungrounded(r, b)), len(named(r))] for r, b in zip(replies, before, strict=True)], dtype=float)


def slices_of(row: Row) -> list[str]:
    """The names of the slices that a conversation belongs to."""
    asked = sum(m["role"] == "assistant" for m in row["messages"])
    looked = any(m["role"] == "system" and str(m["content"]).startswith("lookup:") for m in row["messages"])
    known = [f"{key}: {row[key]}" for key in ("category", "language") if row.get(key)]
    return ["all", *known, "one exchange" if asked == 1 else "several exchanges", "with a lookup" if looked else "without a lookup"]


def report_calls(models: Models, held: Held, data: DataConfig, losses: dict[str, np.ndarray], job: Evaluation, summary: Row,
               page: Page) -> list[Row]:
    """Replies, slices and intents; -> a row for every reply."""
    cases = cases_of(held, job.replies, adding_passages(job.documents))
    if not cases:
        page.not_made("Replies, slices, intents", "no held-out row has an assistant turn behind somebody else's, in text")
        return []
    bleu_parts([], []), rouge_rows([], [])                  # report missing packages before the long computation
    for name, use in models.items():
        with use() as model:
            reply_all(model, name, cases, held, data, job)
    report_replies(list(models), cases, job, summary, page)
    report_slices(list(models), cases, held, losses, job, summary, page)
    report_intents(models, held, data, job, summary, page)       # the probe is fitted on the run's training rows
    page.heading("Some replies")
    page.table(["call", "caller", "should be", *models], [
        [case.row["id"], str(case.before[-1]["content"]), case.reference, *case.replies.values()] for case in cases[:40]])
    return [{"id": case.row["id"], "turn": len(case.before), "reference": case.reference, "replies": case.replies, "ended": case.ended}
            for case in cases]


def groups_of(cases: list[Case]) -> list[str]:
    return [(label(case.row.get("group")) or str(case.row["id"])) for case in cases]


def likeness(cases: list[Case], replies: Sequence[str], job: Evaluation) -> dict[str, tuple[float, float, float]]:
    """BLEU-4 in percent, ROUGE F-measures, and the shares of made-up entities, each with its interval."""
    references, groups, one = [case.reference for case in cases], groups_of(cases), np.ones((len(cases), 1))
    found = {"BLEU-4": Resample(bleu_parts(references, replies), groups, job.rounds, job.seed)(bleu_of)}
    rouge = rouge_rows(references, replies)
    found |= {name: Resample(np.hstack([rouge[:, [n]], one]), groups, job.rounds, job.seed)() for n, name in enumerate(ROUGE)}
    wrong = made_up(cases, replies)
    found["made-up entities"] = Resample(wrong, groups, job.rounds, job.seed)()
    found["replies with one"] = Resample(np.hstack([wrong[:, :1] > 0, one]), groups, job.rounds, job.seed)()
    parts = [support_parts(reply, case.before) for reply, case in zip(replies, cases, strict=True)]
    return found | ({UNSUPPORTED: Resample(parts, groups, job.rounds, job.seed)()} if any(judged for _, judged in parts) else {})


def report_replies(names: list[str], cases: list[Case], job: Evaluation, summary: Row, page: Page) -> None:
    said = {name: [case.replies[name] for case in cases] for name in names} | {"reference": [case.reference for case in cases]}
    found = {name: likeness(cases, replies, job) for name, replies in said.items()}
    summary["replies"] = found | {"ended": {name: sum(case.ended[name] for case in cases) / len(cases) for name in names}}
    page.heading("Replies")
    page.table(["measure", *found], [[measure, *(found[name][measure] for name in found)] for measure in found["reference"]]
               + [["ended by itself", *(summary["replies"]["ended"][name] for name in names), "-"]],
               f"{len(cases)} replies. BLEU by sacrebleu (13a, exponential smoothing), ROUGE by rouge-score (words of any script, no "
               + "stemming). Made up: figures, codes and names of a reply that neither the call nor a lookup held before.")
    for name in names:
        print(f"replies of {name}: " + ", ".join(f"{measure} {show(value)}" for measure, value in found[name].items()))


def report_slices(names: list[str], cases: list[Case], held: Held, losses: dict[str, np.ndarray], job: Evaluation, summary: Row,
                page: Page) -> None:
    """Loss and reply metrics of every slice, sorted by the run's loss, worst first."""
    table = []
    for name in dict.fromkeys(s for row in held.rows for s in slices_of(row)):
        rows = [n for n, row in enumerate(held.rows) if name in slices_of(row)]
        inside = [case for case in cases if name in slices_of(case.row)]
        groups = [held.groups[n] for n in rows]
        cells: Row = {"slice": name, "calls": len(rows)}
        cells |= {f"{m} loss": Resample(losses[m][rows], groups, job.rounds, job.seed)() for m in names}
        for m in names if inside else ():
            replies = [case.replies[m] for case in inside]
            parts = bleu_parts([case.reference for case in inside], replies)
            cells[f"{m} BLEU-4"] = Resample(parts, groups_of(inside), job.rounds, job.seed)(bleu_of)
            cells[f"{m} made up"] = ratio(made_up(inside, replies).sum(0))
        table.append(cells)
    table.sort(key=lambda cells: (cells["slice"] != "all", -cells[f"{names[0]} loss"][0]))
    summary["slices"] = table
    page.heading("Slices, the worst first")
    heads = list(max(table, key=len))
    page.table(heads, [[cells.get(head, "") for head in heads] for cells in table],
               "A slice that is one group of paraphrases has no interval: its wordings are not independent.")


# ---- intents ----

def first_words(row: Row) -> str:
    return next((str(m["content"]) for m in row["messages"] if m["role"] == "user"), "")


def features(model: MultistreamLM, index: Index, texts: Sequence[str]) -> Tensor:
    """Mean last hidden state of a caller's first message.   N texts -> (N, D)"""
    found, device = [], model.temporal.layers[0].attn.o.weight.device
    with torch.inference_mode():
        for text in texts:
            segments = index.chat.segments([{"role": "user", "content": text}], [], reply="text")
            tokens, _ = lay_out(Example(torch.zeros(0, dtype=torch.long), segments=segments), model.table)
            found.append(model.hidden(tokens[None].to(device))[0].float().mean(1)[0].cpu())
    return torch.stack(found)


def report_intents(models: Models, held: Held, data: DataConfig, job: Evaluation, summary: Row, page: Page) -> None:
    """Intent classification by the caller's first message: key words, and a linear probe on hidden states of the training rows."""
    asked = [(first_words(row), str(row["category"]), group)
             for row, group in zip(held.rows, held.groups, strict=True) if row.get("category")]
    if not asked:
        return page.not_made("What callers want", 'no held-out row has a "category"')
    texts, truth, groups = zip(*asked, strict=True)
    names = [*(c for c in CATEGORIES if c in truth), *sorted(set(truth) - set(CATEGORIES)), UNKNOWN]
    guesses = {"key words": [intent(text) for text in texts]}
    with models["run"]() as model:
        learnt = training_rows(data, model)
    if len({str(row["category"]) for row in learnt}) < 2:
        page.not_made("Intents by a probe", "the run's training rows are gone, or have less than two categories")
    for name, use in models.items() if len({str(row["category"]) for row in learnt}) > 1 else ():
        with use() as model:
            probe = LinearProbe(features(model, held.index, [first_words(row) for row in learnt]), [str(row["category"]) for row in learnt])
            guesses[f"probe on {name}"] = probe(features(model, held.index, texts))
    names += sorted({g for found in guesses.values() for g in found} - set(names))
    tables = {name: confusion(truth, found, names) for name, found in guesses.items()}
    scores = {}
    for name, found in guesses.items():
        cells = np.stack([confusion([t], [g], names).ravel() for t, g in zip(truth, found, strict=True)])
        scores[name] = Resample(cells, groups, job.rounds, job.seed)(lambda s: macro_f1(s.reshape(len(names), -1)))
    others = bundled(job.out_of_scope).read_text(encoding="utf-8").splitlines() if job.out_of_scope else []
    refused = sum(intent(text) == UNKNOWN for text in others) / len(others) if others else math.nan
    summary["intents"] = {"macro F1": scores, "names": names, "confusion": {name: t.tolist() for name, t in tables.items()},
                       "out of scope refused by key words": refused, "training rows": len(learnt)}
    page.heading("What callers want")
    page.table(["by", "macro F1"], [[name, score] for name, score in scores.items()],
               f"By the first words of {len(texts)} calls. The probe is fitted on {len(learnt)} training rows. "
               + f"Of {len(others)} questions that belong nowhere, key words refuse {show(refused)}.")
    for name, table in tables.items():
        page.note(name)
        page.confusion(names, table.tolist())
        print(f"intents by {name}: macro F1 {show(scores[name])}")


def training_rows(data: DataConfig, model: MultistreamLM) -> list[Row]:
    """The training rows of a run that have a category; empty if its files do not exist any more."""
    if not data.sources or not all(locate(source_weight(s)[0]).exists() for s in data.sources):
        return []
    prepare(data, model.table)
    rows = raw_rows(data)
    return [row_of(entry, rows) for entry in open_cache(data, model.table).entries
            if entry.split == "train" and entry.messages and rows.get(entry.id, {}).get("category")]


# ---- forgetting ----

def bundled(name: str) -> Path:
    """The file of texts that an option names."""
    path = locate(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name} does not exist; check the path, or leave it empty")
    return path


def report_forgetting(models: Models, data: DataConfig, job: Evaluation, summary: Row, page: Page) -> None:
    """Loss on general texts that have nothing to do with calls."""
    if not job.generic:
        return page.not_made("Forgetting", "--generic is empty; name a file of general texts")
    found = {}
    for name, use in models.items():
        with use() as model:
            held = read_held(replace(data, sources=(str(bundled(job.generic)),), split="manifest"), model)
            found[name] = sums_of(model, held.index, held.numbers)[:, model.table.text_out].sum(1)[:, :2]
    draws = {name: Resample(parts, held.groups, job.rounds, job.seed) for name, parts in found.items()}
    summary["forgetting"] = {name: {"loss": draw(), "perplexity": draw(perplexity)} for name, draw in draws.items()}
    page.heading("Forgetting")
    rows = [[name, numbers["loss"], numbers["perplexity"]] for name, numbers in summary["forgetting"].items()]
    if "base" in found:
        both = np.hstack([found["run"], found["base"]])
        lost = Resample(both, held.groups, job.rounds, job.seed)(lambda s: ratio(s[:2]) - ratio(s[2:]))
        summary["forgetting"]["lost"] = lost
        rows.append(["run - base", lost, ""])
    page.table(["model", "loss", "perplexity"], rows, f"{len(held.rows)} general texts of {job.generic}; above 0 the run has lost some.")
    print("general text: " + ", ".join(f"{name} {show(loss)}" for name, loss, _ in rows))


# ---- speech and curves ----

def report_speech(run: Path, hear: Recogniser | None, job: Evaluation, summary: Row, page: Page) -> None:
    """The recordings in samples.jsonl measured, with audio players."""
    try:
        path = speech_measures.samples_file(run)
    except FileNotFoundError as error:
        return page.not_made("Speech", str(error))
    found, missing = speech_measures.measure(speech_measures.samples(path), hear)
    summary["speech"] = found
    numbers = summary["speech means"] = speech_measures.means(found, job.rounds, job.seed)
    summary |= {name: numbers[name] for name in ("wer", "cer") if name in numbers}
    page.heading("Speech")
    page.table(["measure", "mean"], [[name.replace("_", " "), value] for name, value in numbers.items()],
               f"{len(found)} recordings of {path}; WER and CER in the way of Seed-TTS.")
    for why in dict.fromkeys(missing.values()):
        page.note("Not measured: " + ", ".join(name.replace("_", " ") for name, other in missing.items() if other == why) + f". {why}.")
    page.listening([run.name], speech_measures.takes({run.name: found}))


CURVES = (("Loss of text", "text_loss"), ("Loss of words, without padding", "text_real_loss"), ("Loss of audio", "audio_loss"),
          ("Loss", "loss"))


def report_curves(run: Path, page: Page) -> None:
    """Losses of text and of audio on scales of their own, training smoothed beside validation; then what evaluations have measured."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return page.not_made("Curves", f"{path} does not exist; a run writes it")
    curves = read_metrics(path)
    page.heading("Curves")
    page.note("Training is smoothed (raw values pale), without the extreme hundredths; both are in nats a target.")
    has = [(title, loss) for title, loss in CURVES if {f"train/{loss}", f"val/{loss}"} & curves.keys()]
    with page.side_by_side():
        for title, loss in has if len(has) > 2 else has[-1:]:               # one kind of tokens: its loss is the loss
            page.curves({name: curves[name] for name in (f"train/{loss}", f"val/{loss}") if name in curves}, title)
        for name in sorted(curves):
            if name.startswith("val/") and not re.search("loss$|accuracy$", name):
                page.curves({name: curves[name]}, name.removeprefix("val/").removeprefix("quality_").replace("_", " "))
