"""Words by Whisper: transcripts of single recordings, and the words of stereo dialogues with their times.

    python data.py transcribe data/voice                                 a folder of recordings, some with transcripts, some without
    python data.py transcribe data/voice --model=large-v3 --language=ar  the model in the package (tiny.en) only knows English

    data/voice/transcribed.jsonl        every recording with its words: yours, or the recognised ones; train from this list
    data/voice/transcribed.words.json   the words of the demo model and of all texts, for models that speak whole words
    data/voice/transcribed.cache        what was recognised: an interrupted command goes on, a second one recognises what is new

A recording longer than `longest` seconds is cut at pauses. Your own transcripts stay as they are and are compared: what was
recognised instead stands beside them as "heard", and `check` names those that differ. Needs pip install -e ".[eval]".

    python data.py annotate data/dialogues.jsonl --language=en          rows {"path": "a.wav"}, or a folder of sound files
    python data.py annotate data/calls --model=large-v3 --shard 3/8     the share of machine 3 of 0..7

    a.wav -> a.json    {"alignments": [["hello", [0.31, 0.52], "SPEAKER_MAIN"], ["yes", [0.9, 1.1], "SPEAKER_OTHER"]]}

Each channel is recognised on its own: left is SPEAKER_MAIN, the agent, right is SPEAKER_OTHER, the user. Existing files are
kept and new ones are written atomically, so the same command continues an interrupted run. Needs
faster-whisper: pip install -e ".[annotate]".

    python data.py fix-alignments data/calls --out=data/fixed --first --longest=0.2      writes copies, changes nothing
    python data.py fix-alignments data/calls --dry_run                                     only prints what it would do

A recogniser often makes a short word too long, mostly the first of a file: a word longer than `longest` seconds keeps its end
and now begins `keep` seconds before it. `--words=a,i` limits this to those words. Next: text/word_times.py.
"""

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
from torch import Tensor

from audio import recogniser
from audio.recogniser import RATE, TimedWords
from audio.wav import SOUNDS, load_wav
from corpus.checks import check_source, differs
from corpus.data_config import DataConfig
from corpus.layouts import json_rows, read_manifest
from corpus.manifest import CACHE_FIELDS, TRANSCRIBED, Manifest, Row, Unusable, path_inside
from evaluation.metrics import wer
from options import (
    apply,
    check_types,
    help_text,
    locate,
    parse_shard,
    read_json,
    read_lines,
    split_arguments,
    unknown,
    visible,
    write_json,
    write_rows,
    write_text,
)
from system.files import lock, unlock
from system.progress import Progress
from text.coverage import measure_coverage
from text.normalisers import DIGITS, normalise
from text.tokenizers import load_tokenizer
from text.word_times import MAIN, OTHER, Alignment, as_json, parse_alignments, tidy_words

Recogniser = Callable[[Tensor], TimedWords]                # of one channel (W,) at RATE


@dataclass(frozen=True)
class AnnotateConfig:
    """Options of `data.py annotate`."""

    model: str = "medium"           # Whisper for faster-whisper: a size, a folder, or a hub id; tiny.en (English) needs no network
    language: str = "en"            # spoken language, such as ar or ja; "auto" detects it for each channel
    shard: str = "0/1"              # i/n: every n-th file, starting with the i-th (from 0); for n machines
    beam: int = 5                   # beam size
    device: str = "auto"            # cpu, cuda, or auto
    allow_outside: bool = False     # the list may name files outside its folder

    def __post_init__(self) -> None:
        check_types(self)
        parse_shard(self.shard)
        assert self.beam > 0, "beam is at least 1"


def whisper_recogniser(config: AnnotateConfig) -> Recogniser:
    """Load Whisper as a function of one channel; ValueError when the package or the model is missing."""
    model = recogniser.load_whisper(config.model, config.device, "annotate", "annotate")
    return lambda channel: recogniser.words(model, channel, config.language, config.beam)


def sound_files(source: Path, allow_outside: bool) -> tuple[list[Path], list[str]]:
    """The sound files of a folder or a jsonl, each once, in order; and the faults of lines that name none."""
    if source.is_dir():
        return sorted(p for p in source.rglob("*") if p.suffix.lower() in SOUNDS), []
    if not source.is_file():
        raise FileNotFoundError(f'{source} does not exist; name a folder of stereo files, or a jsonl with a {{"path": ...}} a line')
    m, found = Manifest(source, allow_outside=allow_outside), dict[Path, None]()
    for where, row in json_rows(m):
        try:
            found[path_inside(m, str(row.get("path") or row.get("audio") or "(no path)"))] = None
        except Unusable as error:
            m.reject(where, *error.args)
    return list(found), [f"{bad.where}: {bad.reason}; {bad.fix}" for bad in m.bad]


def annotate_file(path: Path, recognise: Recogniser) -> None:
    """Write the words of a stereo file beside it."""
    wav, _ = load_wav(path, RATE, 2)
    end = wav.shape[1] / RATE
    words = [(word.strip(), round(start, 3), round(min(stop, end), 3), who) for channel, who in zip(wav, (MAIN, OTHER), strict=True)
             for word, start, stop in recognise(channel)]
    write_text(path.with_suffix(".json"), json.dumps({"alignments": as_json(tidy_words(words)[0])}, ensure_ascii=False) + "\n")


def annotate(source: str | Path, config: AnnotateConfig, recognise: Recogniser | None = None) -> dict[str, Any]:
    """Annotate the files without a .json; returns how many were written and kept, and the faults of the others.

    ValueError when no file could be annotated.
    """
    files, faults = sound_files(Path(source), config.allow_outside)
    first, count = parse_shard(config.shard)
    mine = files[first::count]
    left = [path for path in mine if not path.with_suffix(".json").is_file()]
    recognise = recognise or (whisper_recogniser(config) if left else None)
    with Progress("annotating", len(left), "files") as progress:
        for path in left:
            try:
                annotate_file(path, recognise)
            except (FileNotFoundError, ValueError) as error:
                faults.append(str(error))
            progress.add()
    written = sum(path.with_suffix(".json").is_file() for path in left)
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    if not files or (left and not written and len(left) == len(mine)):
        raise ValueError(f"{source}: none of {len(files)} sound files could be annotated; "
                         + ("fix the faults listed above" if faults else "name a folder with stereo recordings"))
    print(f"annotated {written} files, {len(mine) - len(left)} existed already, {len(faults)} left out")
    return {"written": written, "kept": len(mine) - len(left), "faults": faults}


def on_a_source(name: str, options: type, work: Callable[[str, Any], object]) -> Callable[[Sequence[str]], None]:
    """A command that takes one folder or list, and the fields of a dataclass as options."""
    def run(argv: Sequence[str]) -> None:
        words, pairs = split_arguments(list(argv), ("help", "allow_outside"))
        pairs = {key: text or "true" for key, text in pairs.items()}
        if pairs.pop("help", "") or not argv:
            return print(help_text(options(), f"python data.py {name} FOLDER|LIST.jsonl [--key=value ...]"))
        if len(words) != 1:
            raise ValueError(f"{name} takes one folder or one list, got {words}; python data.py {name} --help shows the options")
        work(words[0], apply(options(), pairs))
    return run


main = on_a_source("annotate", AnnotateConfig, annotate)


@dataclass(frozen=True)
class FixAlignmentsConfig:
    """Options of `data.py fix-alignments`."""

    out: str = ""                   # folder for the corrected copies
    longest: float = 1.0            # longest plausible word, seconds
    keep: float = 0.08              # seconds that remain of a longer word
    first: bool = False             # only the first word of each speaker
    words: tuple[str, ...] = ()     # only these, in lower case; () = all
    dry_run: bool = False           # write nothing

    def __post_init__(self) -> None:
        check_types(self)
        assert 0 < self.keep <= self.longest, f"keep {self.keep} is not in (0, longest {self.longest}]"


def clamp_words(words: list[Alignment], job: FixAlignmentsConfig) -> tuple[list[Alignment], list[str]]:
    """Shorten implausibly long words; returns all words in the same order, and a description of each change."""
    seen: set[str] = set()
    fixed, changed = [], []
    for word, start, end, who in words:
        meant = (not job.first or who not in seen) and (not job.words or word.lower() in job.words)
        seen.add(who)
        if meant and end - start > job.longest:
            start = round(end - job.keep, 3)
            changed.append(f"{word} at {start}")
        fixed.append((word, start, end, who))
    return fixed, changed


def check_command(argv: list[str]) -> None:
    """data.py check: what a source holds, and which of its rows cannot be used."""
    words, options = split_arguments(argv, ("allow_outside",))
    known = ("write", "allow_outside", "min_seconds", "max_seconds", "doubtful", "agent", "tokenizer", "normaliser")
    for name in options.keys() - set(known):
        raise ValueError(unknown(f"--{name}", [f"--{k}" for k in known]))
    if len(words) != 1:
        raise ValueError(f"check takes one folder or manifest, got {' '.join(words) or 'none'}; python data.py --help shows its options")
    if "normaliser" in options and "tokenizer" not in options:
        raise ValueError("--normaliser is only used with --tokenizer; add --tokenizer=T, or drop it")
    tokenizer = load_tokenizer(options["tokenizer"]) if "tokenizer" in options else None
    chosen = {key: text for key, text in options.items() if key in ("min_seconds", "max_seconds", "doubtful", "agent")}
    config = apply(DataConfig(), chosen)
    kept = check_source(words[0], options.get("write", ""), "allow_outside" in options, (config.min_seconds, config.max_seconds),
                        config.doubtful, [f"--data.{key}={text}" for key, text in chosen.items()], config.agent)
    if tokenizer is not None:
        print(*measure_coverage((row["text"] for row in kept), tokenizer, options.get("normaliser", "none")).lines(), sep="\n")


def fix_alignments(argv: list[str]) -> None:
    words, pairs = split_arguments(argv, ("help", "first", "dry_run"))
    if "help" in pairs or not argv:
        return print(__doc__, help_text(FixAlignmentsConfig(), "python data.py fix-alignments FOLDER [--key=value ...]"), sep="\n")
    if len(words) != 1:
        raise ValueError(f"fix-alignments takes one folder, got {words}; python data.py fix-alignments --help shows the options")
    given = {key: value or "true" if key in ("first", "dry_run") else value for key, value in pairs.items()}
    job = apply(FixAlignmentsConfig(), given)
    folder = Path(words[0])
    files = sorted(folder.glob("*.json")) if folder.is_dir() else [folder]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{folder} holds no alignments (*.json); write them with python data.py annotate")
    if not job.out and not job.dry_run:
        raise ValueError("give --out=FOLDER for the corrected copies, or --dry_run to see the changes first")
    if job.out and Path(job.out).resolve() == (folder if folder.is_dir() else folder.parent).resolve():
        raise ValueError(f"--out={job.out} is the folder of the originals; name another one")
    total = 0
    for file in files:
        try:
            fixed, changed = clamp_words(parse_alignments(read_json(file)), job)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        total += len(changed)
        if changed:
            print(f"{file.name}: {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}")
        if not job.dry_run:
            write_text(Path(job.out) / file.name, json.dumps({"alignments": as_json(fixed)}, ensure_ascii=False))
    print(f"{total} words in {len(files)} files {'would be ' if job.dry_run else ''}shortened")


# ---- transcripts of single recordings ----

@dataclass(frozen=True)
class TranscribeConfig:
    """Options of `data.py transcribe`."""

    model: str = ""                 # Whisper for faster-whisper: a size, a folder, or a hub id; "" = tiny.en, which comes in a package
    language: str = "en"            # spoken language, such as ar or ja; "auto" detects it for each recording
    longest: float = 12.0           # longer recordings are cut at pauses, into pieces of about so many seconds at most
    pause: float = 0.3              # shortest pause at which they are cut, in seconds
    speaker: str = ""               # who speaks where no list says so; "" = the name of the folder
    beam: int = 5                   # beam size
    device: str = "auto"            # cpu, cuda, or auto
    allow_outside: bool = False     # a list may name files outside its folder

    def __post_init__(self) -> None:
        check_types(self)
        assert self.beam > 0 and self.pause > 0 and self.longest >= 1, "beam is at least 1, longest at least 1 s, pause above 0"
        assert self.model or self.language == "en", (
            f"the model in the package only knows English, not {self.language!r}; name another one, such as --model=small")


KNOWN = "assets/speech/words.json"      # the words of the demo model
OWN = 30.0                  # seconds: a recording with a transcript is only cut if it is longer
SAVE_EVERY = 20.0           # seconds between two writes of what was recognised


class Recognised:
    """The words of every piece that was recognised, by a hash of its audio and of the options; kept in a file that is written whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.saved, self.known = path, time.monotonic(), dict[str, TimedWords]()
        for number, line in enumerate(read_lines(path) if path.is_file() else [], 1):
            try:
                key, words = json.loads(line)
                self.known[key] = [(str(word), float(start), float(end)) for word, start, end in words]
            except (TypeError, ValueError):
                raise ValueError(f"{path} is damaged in line {number}; delete it, its recordings are recognised again") from None

    def words(self, key: str, recognise: Callable[[], TimedWords]) -> TimedWords:
        if key not in self.known:
            self.known[key] = [(word, round(start, 3), round(end, 3)) for word, start, end in recognise()]
            if time.monotonic() - self.saved > SAVE_EVERY:
                self.save()
        return self.known[key]

    def save(self) -> None:
        write_rows(self.path, self.known.items())
        self.saved = time.monotonic()


def cut_at_pauses(spans: Sequence[tuple[float, float]], seconds: float, longest: float) -> list[tuple[float, float]]:
    """Join spans of speech to pieces of at most `longest` seconds, each with up to 0.2 s of silence around it. A pause of 1 s divides."""
    pieces: list[list[float]] = []
    for start, end in spans:
        if pieces and end - pieces[-1][0] <= longest and start - pieces[-1][1] < 1.0:
            pieces[-1][1] = end
        else:
            pieces.append([start, end])
    before = [0.0, *(end for _, end in pieces[:-1])]
    after = [*(start for start, _ in pieces[1:]), seconds]
    return [(round(start - min(0.2, max(0.0, start - b) / 2), 2), round(end + min(0.2, max(0.0, a - end) / 2), 2))
            for (start, end), b, a in zip(pieces, before, after, strict=True)]


def recordings(source: str | Path, config: TranscribeConfig) -> tuple[Manifest, list[Row]]:
    """The rows of a source, and one without text for every sound file of a folder that has none."""
    m = read_manifest(source, config.allow_outside)
    if dialogue := next((row for row in m.rows if row.get("stereo") or "alignments" in row or "clips" in row), None):
        raise ValueError(f"{source} holds dialogues or conversations ({dialogue['id']}), transcribe takes recordings of one voice; "
                         + "python data.py annotate gives stereo dialogues their words")
    rows = [row for row in m.rows if row["file"] and "parts" not in row]
    named, folder = {os.path.realpath(row["file"]) for row in rows}, Path(source)
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS) if folder.is_dir() else ():
        if os.path.realpath(path) not in named:
            name = path.relative_to(folder)
            speaker = config.speaker or (name.parts[0] if len(name.parts) > 1 else folder.resolve().name)
            rows.append({"id": name.with_suffix("").as_posix(), "audio": name.as_posix(), "file": str(path), "text": "",
                         "speaker": speaker})
    return m, rows


def length(row: Row) -> float:
    """The seconds of a recording by its header, 0 where it has none that we can read; for the progress."""
    try:
        return row.get("duration") or soundfile.info(row["file"]).duration
    except (OSError, soundfile.LibsndfileError):
        return 0.0


def transcribe_row(row: Row, config: TranscribeConfig, memory: Recognised, recognise: Recogniser,
                   voice: Callable[..., Any]) -> Iterator[Row]:
    """The rows of a recording: itself with what was heard, or one for each piece between pauses. ValueError: it cannot be read."""
    wav, first = load_wav(row["file"], RATE)[0][0], row.get("offset", 0.0)
    wav = wav[round(first * RATE) :][: round(row["duration"] * RATE) if row.get("duration") else None]
    mark = hashlib.sha256(wav.numpy().tobytes()).hexdigest()
    seconds, own = len(wav) / RATE, bool(row["text"].strip())

    def heard(begin: float, end: float) -> TimedWords:
        key = hashlib.sha256(json.dumps([mark, begin, end, config.model, config.language, config.beam]).encode()).hexdigest()[:32]
        piece = wav[round(begin * RATE) : round(end * RATE)]
        return memory.words(key, lambda: recognise(piece) if voice(piece) else [])      # Whisper hears words in noise

    if seconds <= (max(config.longest, OWN) if own else config.longest):
        said = heard(0.0, seconds)
        yield row | ({"heard": text_of(said)} | times_of(said, row) if own else {"text": text_of(said)} | times_of(said))
        return
    for begin, end in cut_at_pauses(voice(wav, config.pause, config.longest), seconds, config.longest):
        if said := heard(begin, end):
            yield row | {"id": f"{row['id']}@{begin:.2f}", "offset": round(first + begin, 2), "duration": round(end - begin, 2),
                         "text": text_of(said)} | times_of(said)


def text_of(words: TimedWords) -> str:
    return " ".join("".join(word for word, *_ in words).split())


def times_of(words: TimedWords, own: Row | None = None) -> Row:
    """The field "words"; of a row with a transcript only if its words are those that were heard and it has no times."""
    found = [[word.strip(), start] for word, start, _ in words if word.strip()]
    if own is None:
        return {"words": found}
    said = own["text"].split()
    if "words" in own or len(said) != len(found) or wer(own["text"], text_of(words)):
        return {}
    return {"words": [[word, start] for word, (_, start) in zip(said, found, strict=True)]}


def as_spoken(found: TimedWords, spelled: TimedWords) -> TimedWords:
    """What was recognised, with numbers as they are spoken: `spelled`, a second hearing without figures, if it says the same.

    Else figures are read one by one, for without them Whisper sometimes ends too early.
    """
    if wer(text_of(found), text_of(spelled)) <= 0.2:
        return spelled
    return [(re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]}", word), start, end) for word, start, end in found]


def load_recogniser(config: TranscribeConfig) -> Recogniser:
    model = recogniser.load_whisper(config.model, config.device, "transcribe")

    def recognise(wav: Tensor) -> TimedWords:
        padded = recogniser.prepare(wav, RATE)
        found = recogniser.words(model, padded, config.language, config.beam, vad=False)
        if any(c.isdigit() for c in text_of(found)):
            found = as_spoken(found, recogniser.words(model, padded, config.language, config.beam, vad=False, spelled=True))
        return [(word, max(0.0, start - recogniser.BEFORE), max(0.0, end - recogniser.BEFORE)) for word, start, end in found]

    return recognise


def transcribe(source: str | Path, config: TranscribeConfig, recognise: Recogniser | None = None,
               voice: Callable[..., Any] = recogniser.speech) -> list[Row]:
    """Write transcribed.jsonl of a source; returns its rows, ValueError when there is none."""
    m, rows = recordings(source, config)
    if not rows:
        raise ValueError(f"{source} names no recording; give a folder of sound files ({', '.join(SOUNDS)}) or a list of recordings")
    recognise = recognise or load_recogniser(config)
    target = m.root / TRANSCRIBED
    lock(m.root)
    memory, found, faults = Recognised(target.with_suffix(".cache")), list[Row](), list[str]()
    try:
        with Progress("transcribing", sum(map(length, rows)), "s of sound") as progress:
            for row in rows:
                try:
                    found += transcribe_row(row, config, memory, recognise, voice)
                except (FileNotFoundError, ValueError) as error:
                    faults.append(str(error))
                progress.add(length(row))
    finally:
        memory.save()
        unlock(m.root)
    write_rows(target, ({key: value for key, value in row.items() if key not in CACHE_FIELDS} for row in found))
    known = read_json(locate(KNOWN))                        # their ids stay, so that a model that knows them can be the start
    said = {word for row in found for word in normalise(row["text"], "english-v1").split()}
    write_json(target.with_suffix(".words.json"), known + sorted(said.difference(known)))
    print(*summary(rows, found, m, faults), sep="\n")
    if not found:
        raise ValueError(f"{source}: no recording could be read; fix the faults listed above")
    print(f"wrote {target}", f"next: {shlex.join(['python', 'data.py', 'check', str(target)])}", sep="\n")
    return found


def summary(rows: Sequence[Row], found: Sequence[Row], m: Manifest, faults: Sequence[str]) -> Iterator[str]:
    """What was recognised, which transcripts differ from it, and what was left out."""
    own = [row for row in found if "heard" in row]
    silent = [row for row in found if not row["text"].strip()]
    minutes = sum(map(length, rows)) / 60
    yield f"{len(rows)} recordings, {minutes:.1f} minutes: {len(own)} with a transcript, {len(found) - len(own)} rows with recognised words"
    if own:
        unlike = [row for row in own if differs(row)]
        rate = sum(wer(row["text"], row["heard"]) for row in own) / len(own)
        yield f"transcripts and what is heard: word error rate {rate:.3f}; {len(unlike)} do not fit{':' if unlike else ''}"
        yield from (visible(f"  {row['id']}: {row['text']!r}, heard {row['heard']!r}") for row in unlike[:10])
    cut = [row for row in rows if row["text"].strip() and length(row) > OWN]
    for what, some in ((f"longer than {OWN:g} s and cut, with recognised words in place of their transcripts", cut), ("no voice", silent)):
        if some:
            yield visible(f"{what}: {', '.join(row['id'] for row in some[:5])}{f' and {len(some) - 5} more' if len(some) > 5 else ''}")
    yield from (visible(f"left out: {fault}") for fault in faults)
    unused = [bad for bad in m.bad if bad.reason not in ("no transcript", "empty text")]
    yield from (visible(f"not used: {bad.where}: {bad.reason}; {bad.fix}") for bad in unused)


transcribe_command = on_a_source("transcribe", TranscribeConfig, transcribe)
