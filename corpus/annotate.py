"""Transcribe stereo dialogues with word times: Whisper writes a .json of alignments beside each file, as Moshi's training reads.

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

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from audio.wav import load_wav
from corpus.layouts import json_rows
from corpus.manifest import SOUNDS, Manifest, Unusable, path_inside
from options import apply, check_types, help_text, read_json, split_arguments, write_text
from text.word_times import MAIN, OTHER, Alignment, as_json, parse_alignments, tidy_words

RATE = 16_000                                   # Hz, the input rate of Whisper
TimedWords = list[tuple[str, float, float]]          # words with start and end in seconds
Recogniser = Callable[[Tensor], TimedWords]                # of one channel (W,) at RATE


@dataclass(frozen=True)
class AnnotateConfig:
    """Options of `data.py annotate`."""

    model: str = "medium"           # Whisper for faster-whisper: a size, a folder, or a hub id
    language: str = "en"            # spoken language, such as ar or ja; "auto" detects it for each channel
    shard: str = "0/1"              # i/n: every n-th file, starting with the i-th (from 0); for n machines
    beam: int = 5                   # beam size
    device: str = "auto"            # cpu, cuda, or auto
    allow_outside: bool = False     # the list may name files outside its folder

    def __post_init__(self) -> None:
        check_types(self)
        first, _, count = self.shard.partition("/")
        known = first.isdecimal() and count.isdecimal() and int(first) < int(count)
        assert known, f"shard {self.shard!r} is not i/n with i from 0 to n - 1"
        assert self.beam > 0, "beam is at least 1"


def whisper_recogniser(config: AnnotateConfig) -> Recogniser:
    """Load Whisper as a function of one channel; ValueError when the package or the model is missing."""
    try:
        from faster_whisper import WhisperModel
    except ModuleNotFoundError as error:
        raise ValueError(f'annotate needs {error.name}; run: pip install -e ".[annotate]"') from None
    try:
        model = WhisperModel(config.model, device=config.device, compute_type="auto")
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"Whisper model {config.model!r} cannot be loaded ({reason}); name a folder or another size by --model") from None

    def recognise(channel: Tensor) -> TimedWords:
        segments, _ = model.transcribe(channel.numpy(), language=None if config.language == "auto" else config.language, vad_filter=True,
                                       beam_size=config.beam, word_timestamps=True, condition_on_previous_text=False)
        return [(word.word.strip(), word.start, word.end) for segment in segments for word in segment.words or ()]

    return recognise


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
    words = [(word, round(start, 3), round(min(stop, end), 3), who) for channel, who in zip(wav, (MAIN, OTHER), strict=True)
             for word, start, stop in recognise(channel)]
    write_text(path.with_suffix(".json"), json.dumps({"alignments": as_json(tidy_words(words)[0])}, ensure_ascii=False) + "\n")


def annotate(source: str | Path, config: AnnotateConfig, recognise: Recogniser | None = None) -> dict[str, Any]:
    """Annotate the files without a .json; returns how many were written and kept, and the faults of the others.

    ValueError when no file could be annotated.
    """
    files, faults = sound_files(Path(source), config.allow_outside)
    first, count = map(int, config.shard.split("/"))
    mine = files[first::count]
    left = [path for path in mine if not path.with_suffix(".json").is_file()]
    recognise = recognise or (whisper_recogniser(config) if left else None)
    for path in tqdm(left, "annotate", unit="file", disable=not sys.stderr.isatty()):
        try:
            annotate_file(path, recognise)
        except (FileNotFoundError, ValueError) as error:
            faults.append(str(error))
    written = sum(path.with_suffix(".json").is_file() for path in left)
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    if not files or (left and not written and len(left) == len(mine)):
        raise ValueError(f"{source}: none of {len(files)} sound files could be annotated; "
                         + ("fix the faults listed above" if faults else "name a folder with stereo recordings"))
    print(f"annotated {written} files, {len(mine) - len(left)} existed already, {len(faults)} left out")
    return {"written": written, "kept": len(mine) - len(left), "faults": faults}


def main(argv: Sequence[str]) -> None:
    words, pairs = split_arguments(list(argv), ("help", "allow_outside"))
    pairs = {key: text or "true" for key, text in pairs.items()}
    if pairs.pop("help", "") or not argv:
        return print(help_text(AnnotateConfig(), "python data.py annotate FOLDER|LIST.jsonl [--key=value ...]"))
    if len(words) != 1:
        raise ValueError(f"annotate takes one folder or one list, got {words}; python data.py annotate --help shows the options")
    annotate(words[0], apply(AnnotateConfig(), pairs))


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
