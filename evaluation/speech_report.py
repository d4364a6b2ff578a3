"""`python evaluate.py speech`: texts spoken and measured, systems compared on the same texts, one page to look at and to listen to.

    python evaluate.py speech out/higgs_ar --set=seedtts/en/meta.lst                speak a list with a checkpoint, and measure it
    python evaluate.py speech out/higgs_ar --set=meta.lst --base=own                and with its base: what has training changed?
    python evaluate.py speech out/a out/b --set=meta.lst                            two checkpoints or more, each against the first
    python evaluate.py speech FOLDER OTHER --set=meta.lst                           recordings that are there, as ID.wav
    python evaluate.py speech out/demo                                              the recordings of a samples.jsonl, or of the last
                                                                                    evaluation of a run

    python evaluate.py duplex FOLDER                          a folder of Full-Duplex-Bench, v1 or v1.5: SAMPLE/{input.wav, output.wav, ...}
    python evaluate.py duplex FOLDER --ckpt=out/moshi_lora    a model answers first: output.wav and output.json, which its scripts read
    python evaluate.py duplex out/talks                       stereo conversations, written in that layout

`speech` writes into --out: NAME.jsonl (a recording a line, for `compare`), summary.json (means, intervals, paired tests), index.html.
`duplex` writes full_duplex.json, and output.json and latency_intervals.json into the samples. What the measures are:
speech_measures.py, duplex_measures.py. Next: html_page.py.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from audio.recogniser import choose_recogniser, load_whisper, missing_recogniser
from audio.recogniser import words as recognised_words
from audio.telephone import spoken
from audio.voice_activity import RATE, voice_activity
from audio.wav import load_wav, resample, save_wav
from checkpoint import load
from corpus.cache import encode
from corpus.data_config import DataConfig
from corpus.examples import prompt_example
from corpus.index import fitting_codec, open_cache
from evaluation import speech_measures
from evaluation.duplex_measures import USER_GAP, Word, alignment_words, event, measure_sample, merged, task_of, write_words
from evaluation.html_page import Page, show
from evaluation.metrics import Resample, paired_difference
from evaluation.report import compared, of_run
from evaluation.speech_measures import LESS_IS_BETTER, MEASURES, MORE_IS_BETTER, Row, means, read_list, samples, samples_file, shared, takes
from families.family import family_of
from generation.command_line import Job, check_device, check_names, load_for_sampling, usual_rules
from generation.decode_step import SampleConfig
from layers.conditioning import condition_column
from model import MultistreamLM
from options import check_types, read_json, visible, write_json, write_rows
from sample import reply, speak_examples
from streams import Example
from text.tokenizers import load_tokenizer
from text.word_times import timed_words
from training.evaluation_samples import Pace


@dataclass(frozen=True)
class SpeechConfig:
    """Options of `python evaluate.py speech RUN [OTHER ...]`."""

    set: str = ""                  # list of texts: meta.lst, JSON lines or a text a line; "" = the recordings that are there
    out: str = ""                  # folder of the results; "" = RUN/speech of the first
    base: str = ""                 # also speak with a base: a checkpoint, or "own" = adapters off or what the run started from; "" = none
    language: str = ""             # language of the texts for error rates, such as en, zh, ja; "" = by their letters
    recogniser: str = ""           # recogniser, module:function from a list of (wav, rate) to texts; "" = Whisper tiny.en, "none" = none
    limit: int = 0                 # largest number of texts; 0 = all
    batch: int = 1                 # texts spoken at once; above 1 neither real-time factor nor first audio is measured
    max_frames: int = 0            # largest number of codec frames of a text; 0 = as the model's own rules say
    rounds: int = 1000             # number of bootstrap and permutation rounds
    seed: int = 0                  # random seed of sampling, bootstrap and permutation
    device: str = "cpu"            # device of the models: cpu or cuda
    dtype: str = "fp32"            # dtype of the models: fp32, bf16 or fp16

    def __post_init__(self) -> None:
        check_types(self)
        check_names(self.device, self.dtype)
        assert self.limit >= 0 < min(self.batch, self.rounds) and self.rounds <= 10**6, "limit >= 0, batch > 0, rounds in 1 to 10^6"
        assert 0 <= self.max_frames <= 2**20, f"max_frames {self.max_frames} is not in 0 to 2^20"


@dataclass
class System:
    """A row of the tables: recordings by one model."""

    name: str
    rows: list[Row]
    missing: dict[str, str] = field(default_factory=dict)       # measure -> why it is not there


def speech(words: Sequence[str], job: SpeechConfig) -> Path:
    """Speak where there are no recordings, measure, compare; returns the page."""
    if not words:
        raise ValueError("speech takes a checkpoint or a folder of recordings; python evaluate.py speech --help shows the options")
    check_device(job.device, job.dtype)
    items = read_list(job.set)[: job.limit or None] if job.set else []
    first = Path(words[0])
    out = Path(job.out) if job.out else (first if first.is_dir() else first.parent) / "speech"
    why = "--recogniser=none" if job.recogniser == "none" else missing_recogniser(job.recogniser)
    hear = None if why else choose_recogniser(job.recogniser)
    systems = [system for word in words for system in systems_of(word, items, out, job)]
    for n, system in enumerate(systems):                                    # out/a and out/b/a would share a file
        if system.name in [other.name for other in systems[:n]]:
            system.name = f"{system.name}_{n + 1}"
    for system in systems:
        system.rows, system.missing = speech_measures.measure(system.rows[: job.limit or None], hear, job.language)
        if why:
            system.missing |= {name: why for name in system.missing if name in ("wer", "cer", "wer_figures", "repeats", "truncated")}
    return write_report(systems, out, job)


# ---- the recordings ----

def systems_of(word: str, items: Sequence[Row], out: Path, job: SpeechConfig) -> list[System]:
    """The recordings that a word of the command line means; with a list of which there are none, a checkpoint speaks them."""
    folder = Path(word)
    name = (folder.stem if folder.is_file() else folder.resolve().name) or "system"
    if not items:
        return [System(name, samples(samples_file(folder)))]
    there = [item | {"wav": str(folder / f"{item['id']}.wav")} for item in items if (folder / f"{item['id']}.wav").is_file()]
    if there:
        if len(there) < len(items):
            print(f"{word}: {len(items) - len(there)} of {len(items)} texts have no recording there and do not count")
        return [System(name, there)]
    model = load(word, job.device, job.dtype)
    data, started = of_run(folder, model)
    models = compared(model, {"": "none", "own": ""}.get(job.base, job.base), started, job.device, job.dtype)
    if job.base and "base" not in models:
        raise ValueError(f"--base=own: {word} has no adapters and names no weights that it started from; name a checkpoint with --base")
    found = []
    for kind, use in models.items():
        with use() as spoken:
            named = name if kind == "run" else f"{name}_base"
            found.append(System(named, speak_list(spoken, data, items, out / named, job)))
    return found


def speak_list(model: MultistreamLM, data: DataConfig, items: Sequence[Row], folder: Path, job: SpeechConfig) -> list[Row]:
    """Speak a list into wavs of `folder`, with its samples.jsonl; rows with times where one text is spoken at once."""
    table, family = model.table, family_of(model.table)
    if family.user_audio == "duplex" or not table.codes_out:
        raise ValueError(f"a {family.name} model does not speak texts; evaluate.py duplex measures conversations, report replies")
    tokenizer = load_tokenizer(data.tokenizer)
    codec = fitting_codec(data.codec, table, tokenizer)
    longest = {"max_frames": job.max_frames} if job.max_frames else {}
    rules = SampleConfig(**usual_rules(table, (), model.extras) | longest | {"seed": job.seed})
    clones = bool(family.references or family.template and family.template.clone_prompt)
    if not clones and any(item.get("reference") for item in items):
        print("this model has a voice of its own: the recordings of the list are compared with, not imitated")
    pace, rows = None if clones else data_pace(data, model), []            # a cloned voice has a pace of its own
    asked = list(prompts_of(items, clones, data, model, codec))
    for at in tqdm(range(0, len(asked), job.batch), unit="text", disable=None):
        part = asked[at : at + job.batch]
        timed, begun = [], time.perf_counter()
        prompts = [prompt for _, prompt in part]

        def hear(wav: Tensor, timed: list[tuple[float, int]] = timed) -> None:
            timed.append((time.perf_counter(), wav.shape[-1]))

        spoken = speak_examples(model, prompts, rules, codec, hear if job.batch == 1 else None)
        for (item, _), said in zip(part, spoken, strict=True):
            path = folder / f"{item['id']}.wav"
            save_wav(path, said.wav, codec.sample_rate)
            row = item | {"wav": str(path), "ended": said.ended}
            heard = [(when - begun, samples) for when, samples in timed if samples]
            if heard:
                row |= {"first_audio": heard[0][0], "real_time_factor": heard[-1][0] * codec.sample_rate / sum(n for _, n in heard)}
            rows.append(row | ({"expected_seconds": pace(item["text"])} if pace else {}))
    write_rows(folder / "samples.jsonl", [row | {"wav": Path(row["wav"]).name} for row in rows])
    return rows


def prompts_of(items: Sequence[Row], clones: bool, data: DataConfig, model: MultistreamLM, codec: Any) -> Iterator[tuple[Row, Example]]:
    """The texts that this model can be asked to say, and their prompts; the others are named. ValueError when there is none."""
    tokenizer, bad = load_tokenizer(data.tokenizer), []
    for item in items:
        voices = [(item["reference"], str(item.get("reference_text", "")))] if clones and item.get("reference") else []
        try:
            prompt = prompt_example(item["text"], data, tokenizer, codec, voices, model.table)
        except ValueError as error:
            bad.append(error)
            print(visible(f"left out: {item['id']}: {error}"), file=sys.stderr)
        else:
            yield item, prompt
    if bad:
        print(f"{len(bad)} of {len(items)} texts are left out and count nowhere")
    if len(bad) == len(items):
        raise ValueError(f"none of the {len(items)} texts can be said: {bad[0]}")


def data_pace(data: DataConfig, model: MultistreamLM) -> Pace | None:
    """The pace of a run's training data, where its cache is still there."""
    try:
        return Pace(open_cache(data, model.table)) if data.sources else None
    except (ValueError, OSError) as error:
        print(f"expected durations do not follow the training data: {error}")
        return None


# ---- the report ----

def write_report(systems: Sequence[System], out: Path, job: SpeechConfig) -> Path:
    page = Page("Speech: " + ", ".join(system.name for system in systems), out)
    found = {system.name: means(system.rows, job.rounds, job.seed) for system in systems}
    measures = [name for name in MEASURES if any(name in numbers for numbers in found.values())]
    counts = ", ".join(f"{system.name} {len(system.rows)}" for system in systems)
    page.heading("Means")
    page.table(["measure", *found], [[name.replace("_", " "), *(found[system].get(name, "-") for system in found)] for name in measures],
               f"Recordings: {counts}. Intervals hold 95 % of {job.rounds} bootstrap rounds over texts, seed {job.seed}. WER and CER are "
               + f"means over recordings, by {job.recogniser or 'Whisper tiny.en, which reads English only'}.")
    missing = {f"{system.name}: {name.replace('_', ' ')}": why for system in systems for name, why in system.missing.items()}
    for why in dict.fromkeys(missing.values()):
        page.note("Not measured: " + ", ".join(name for name, other in missing.items() if other == why) + f". {why}.")
        print("not measured: " + ", ".join(name for name, other in missing.items() if other == why) + f": {why}")
    differences = compare_systems(systems, page, job)
    for name, numbers in found.items():
        print(f"{name}: " + ", ".join(f"{measure.replace('_', ' ')} {show(value)}" for measure, value in numbers.items()))
    page.heading("Listen")
    page.listening(list(found), takes({system.name: system.rows for system in systems}))
    for system in systems:
        write_rows(out / f"{system.name}.jsonl", system.rows)
    write_json(out / "summary.json", {"measures": found, "not measured": missing, "compared": differences})
    page.write(out / "index.html")
    print(f"{out / 'index.html'}: written")
    return out / "index.html"


def compare_systems(systems: Sequence[System], page: Page, job: SpeechConfig) -> list[dict[str, Any]]:
    """Each system against the first on the texts that both have spoken."""
    found, first = [], systems[0]
    for other in systems[1:]:
        pairs, lines = list(shared([first.rows, other.rows])), []
        for name in MEASURES:
            gap = paired_difference(*([number(row, name) for row in side] for side in zip(*pairs, strict=True)),
                                    rounds=job.rounds, seed=job.seed) if pairs else {"items": 0}
            if gap["items"]:
                better = "-" if not gap["difference"] else other.name if (gap["difference"] < 0) == (name in LESS_IS_BETTER) else first.name
                lines.append([name.replace("_", " "), (gap["difference"], gap["low"], gap["high"]), gap["p"],
                              better if name in LESS_IS_BETTER or name in MORE_IS_BETTER else "-", gap["items"]])
                found.append({"systems": [first.name, other.name], "measure": name} | gap)
        if not lines:
            page.not_made(f"{other.name} against {first.name}", "they share no text; give both the same --set, or texts with the same id")
            continue
        page.heading(f"{other.name} against {first.name}")
        page.table(["measure", f"{other.name} - {first.name}", "p", "better", "texts"], lines,
                   f"Paired by text: mean difference, its bootstrap interval, and p of a sign-flip permutation test, {job.rounds} rounds.")
        for name, gap, p, *_ in lines[:4]:
            print(f"{other.name} - {first.name}: {name} {show(gap)}, p = {p:.4f}")
    return found


def number(row: Row, name: str) -> float:
    return float(row[name]) if isinstance(row.get(name), (bool, int, float)) else math.nan


# ---- Full-Duplex-Bench ----

@dataclass(frozen=True)
class DuplexConfig:
    """Options of `python evaluate.py duplex FOLDER`."""

    ckpt: str = ""                 # model that answers every input.wav without an output.wav; "" = none
    words: str = "recogniser"      # source of a missing output.json: "recogniser" (Whisper tiny.en), or "text", the model's text row
    human: str = ""                # when people give backchannels: the benchmark's icc_gt_distribution.json; "" = no divergence
    limit: int = 0                 # largest number of samples; 0 = all
    rounds: int = 1000             # number of bootstrap rounds
    seed: int = 0                  # random seed of sampling and bootstrap
    device: str = "cpu"            # device of the model: cpu or cuda
    dtype: str = "fp32"            # dtype of the model: fp32, bf16 or fp16

    def __post_init__(self) -> None:
        check_types(self)
        assert self.words in ("recogniser", "text"), f"words {self.words!r} is neither recogniser nor text"
        assert self.limit >= 0 < self.rounds <= 10**6, "limit >= 0, rounds in 1 to 10^6"
        check_names(self.device, self.dtype)


def duplex(folder: Path, job: DuplexConfig) -> dict[str, Any]:
    """Answer, transcribe and measure the samples of a folder; prints a table by task and writes full_duplex.json."""
    found = bench_samples(folder)[: job.limit or None]
    human = read_json(Path(job.human)) if job.human else {}
    if human and (unknown := [path.name for path in found if task_of(path) == "backchannel" and path.name not in human]):
        raise ValueError(f"{job.human} has no distribution for sample {unknown[0]!r}; name the file that belongs to these samples")
    if job.ckpt:
        answer_samples(found, job)
    elif job.words == "text":
        raise ValueError("--words=text takes the words from the text row of a model that answers here; add --ckpt")
    if silent := [path for path in found if not (path / "output.wav").is_file() and not (path / "output.json").is_file()]:
        raise ValueError(f"{len(silent)} samples, the first {silent[0]}, have no output.wav; let a model answer with --ckpt=RUN")
    rows = []
    for path in tqdm(found, unit="sample", disable=None):
        for name in ("output", "clean_output"):
            if (path / f"{name}.wav").is_file() and not (path / f"{name}.json").is_file():
                write_words(path / f"{name}.json", recognised(path, name))
        numbers = measure_sample(path, voice_activity, human.get(path.name, ()))
        rows.append({"sample": path.relative_to(folder).as_posix()} | numbers)
    tasks = {task: task_means([row for row in rows if row["task"] == task], job) for task in dict.fromkeys(row["task"] for row in rows)}
    for task, numbers in tasks.items():
        print(f"{task}: " + ", ".join(f"{name.replace('_', ' ')} {show(value)}" for name, value in numbers.items()))
    if "backchannel" in tasks and not human:
        print("backchannel: no divergence without --human=icc_gt_distribution.json, which the benchmark brings")
    write_json(folder / "full_duplex.json", {"tasks": tasks, "samples": rows})
    print(f"{folder / 'full_duplex.json'}: written")
    return tasks


def task_means(rows: Sequence[Row], job: DuplexConfig) -> dict[str, Any]:
    """Means of the samples of one task, with bootstrap intervals over samples."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("sample", "task"))
    known = {name: [row for row in rows if name in row] for name in names}
    draws = {name: Resample([[row[name], 1.0] for row in have], [row["sample"] for row in have], job.rounds, job.seed)
             for name, have in known.items()}
    return {"samples": len(rows)} | {name: draw() for name, draw in draws.items()}


def bench_samples(folder: Path) -> list[Path]:
    """The samples below a folder; stereo conversations in it are written as samples first."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; name a folder of Full-Duplex-Bench, or of stereo conversations")
    found = {path.parent for name in ("input.wav", "output.wav", "output.json") for path in folder.rglob(name)}
    found = sorted(found, key=lambda path: (path.parent, len(path.name) if path.name.isdigit() else 0, path.name))       # numbers in order
    if not found:
        talks = [path for path in sorted(folder.glob("*.wav")) if load_wav(path, None, None)[0].shape[0] == 2]
        found = [as_sample(path, folder / "full_duplex_bench" / path.stem) for path in talks]
    if not found:
        raise ValueError(f"{folder} holds no SAMPLE/input.wav and no stereo wav; name the folder whose folders are the samples")
    return found


def answer_samples(found: Sequence[Path], job: DuplexConfig) -> None:
    """Let a model answer the recordings that have no output.wav; it is written as the benchmark reads it, mono at 16 kHz."""
    model, data = load_for_sampling(Job(ckpt=job.ckpt, device=job.device, dtype=job.dtype))
    table, tokenizer = model.table, load_tokenizer(data.tokenizer)
    if family_of(table).user_audio != "duplex" or not table.audio_out:
        raise ValueError(f"--ckpt={job.ckpt} is a {family_of(table).name} model, which does not listen while it speaks")
    codec, rules = fitting_codec(data.codec, table, tokenizer), usual_rules(table, (), model.extras)
    condition = condition_column(table, rules.pop("condition", ""))
    rules = SampleConfig(**rules | {"seed": job.seed})
    for path in found:
        for before, after in (("input", "output"), ("clean_input", "clean_output")):
            if (path / f"{before}.wav").is_file() and not (path / f"{after}.wav").is_file():
                user, _ = load_wav(path / f"{before}.wav", codec.sample_rate)
                frames = reply(model, encode(codec, user)[None], rules, conditions=condition)[0]
                codes = frames[None, table.audio_out[: codec.num_codebooks]].clamp(min=0, max=codec.codebook_size - 1)
                wav = resample(codec.decode(codes)[0].cpu(), codec.sample_rate, RATE)
                save_wav(path / f"{after}.wav", wav, RATE)
                if job.words == "text":
                    said = timed_words(frames[0], tokenizer, codec.frame_rate, table.pad, table.epad)
                    write_words(path / f"{after}.json", [(w, s, e) for w, s, e, _ in said if not w.startswith("(")])


def recognised(path: Path, name: str) -> list[Word]:
    """The words of a sample's recording by Whisper tiny.en; behind an interruption only, as the benchmark transcribes."""
    wav, _ = load_wav(path / f"{name}.wav", RATE)
    begin = event(path, "user_interruption")[1] if task_of(path) == "user_interruption" else 0.0
    part = wav[0, int(begin * RATE) :]
    return [(word.strip(), begin + start, begin + end) for word, start, end in recognised_words(load_whisper(), part)] if len(part) else []


def as_sample(path: Path, folder: Path) -> Path:
    """A stereo conversation as a sample of smooth turn taking: the user's last turn is the one whose end counts."""
    wav, rate = load_wav(path, RATE, 2)
    folder.mkdir(parents=True, exist_ok=True)
    for name, side in (("output", wav[:1]), ("input", wav[1:])):
        save_wav(folder / f"{name}.wav", side, rate)
    about = read_json(path.with_suffix(".json")) if path.with_suffix(".json").is_file() else {}
    words = alignment_words(about.get("alignments")) if isinstance(about, dict) else None
    if words is not None:
        write_words(folder / "output.json", words)
    user = merged([(s, e) for s, e, who in spoken(wav, rate) if who == 1], USER_GAP)
    end = user[-1][1] if user else 0.0
    write_json(folder / "turn_taking.json", [{"text": "[TURN-TAKING]", "timestamp": [end, end]}])
    return folder
