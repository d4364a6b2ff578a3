"""Which recordings are used: one verdict for `check`, `prepare`, training and `--ref`, and the report of `data.py check`.

A fault (level, length, channels, speaking rate) is (kind, reason, fix). "reject": the row is left out. "warn": it is kept and named.
"doubt": DataConfig.doubtful says which of the two. Next: cache.py.
"""

import hashlib
import json
import math
import os
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio.wav import levels, load_wav, mix, opposite, resample
from corpus.data_config import DataConfig
from corpus.layouts import read_manifest
from corpus.manifest import CACHE_FIELDS, INLINE, Manifest, RejectedRow, Row, Unusable, label, open_audio
from evaluation.metrics import cer, wer
from families.family import RECIPES
from options import FULL, visible, write_rows
from system.files import copy_file
from system.progress import Progress, torch_threads, workers
from text.word_times import MAIN, OTHER, Alignment, check_length, parse_alignments, row_words, tidy_words

PACE, SILENCE = "text does not fit the length", "silence"
Fault = tuple[str, str, str]    # "reject" | "doubt" | "warn", reason, fix
UNREADABLE = {"is empty": "empty audio", "NaN": "NaN samples", "channel(s)": "not stereo", "far above 1": "samples far above 1",
              "is truncated": "truncated file", "0 bytes": "empty file", "Git-LFS": "Git-LFS pointer",
              "web page": "a web page, not a sound",
              "needs PyAV": "needs PyAV", "outside of it": "piece outside the recording", "no sound at all": "all-zero audio"}
TALK = 4 * 3600.0               # seconds that a dialogue may last where no config says otherwise
VERDICTS = "3"                  # part of the key of a stored verdict: change it when a recording would be judged differently


def read_clip(row: Row, limits: tuple[float, float] = (0.0, 4 * 3600)) -> tuple[Tensor, int]:
    """Read the audio of a row, (C, W) and its rate, C = 2 for stereo rows, else mixed to 1; Unusable when it cannot.

    A file that is longer than the limits (seconds) is not read, unless the row takes a piece of it.
    """
    wav, rate = read_channels(row, limits)
    return wav if row.get("stereo") else mix(wav), rate


def read_channels(row: Row, limits: tuple[float, float]) -> tuple[Tensor, int]:
    """The channels that the audio of a row has, one or two."""
    piece = row["duration"] if "duration" in row and "offset" in row else None
    try:
        with open_audio(row) as path:
            wav, rate = load_wav(path, None, 2 if row.get("stereo") else None, limits[1], row.get("offset", 0.0), piece)
    except FileNotFoundError:
        raise Unusable("missing file", f"{row['file']} does not exist: check the path") from None
    except (ValueError, OSError, RuntimeError) as error:
        found, _, fix = str(error).partition("; ")
        known = UNREADABLE | {"the limit is": f"duration outside {limits[0]:g}..{limits[1]:g} s"}
        reason = next((reason for mark, reason in known.items() if mark in found), "unreadable audio")
        raise Unusable(reason, f"{found.replace(str(row['file']), 'it')}: {fix}") from None
    if len(wav) > 2:
        raise Unusable("too many channels", f"it has {len(wav)} channels, expected 1 or 2: mix it down, or choose the one with the voice")
    return wav, rate


NARROW: Fault = ("warn", "sample rate below 16 kHz", "this is telephone bandwidth: use 16 kHz or more if you have it")
STEREO: Fault = ("warn", "stereo", "both channels are mixed to mono: save the channel with the voice if they differ")
OPPOSITE: Fault = ("warn", "channels in opposite phase", "they cancel each other: the left one is used, save it as mono")
HEARD: Fault = ("doubt", "text differs from what is heard", "listen to it and correct the transcript, or remove the row")


def differs(row: Row) -> bool:
    """Whether a recogniser understood something else (data.py transcribe): half of the letters and of the words."""
    return "heard" in row and wer(row["text"], str(row["heard"])) > 0.5 < cer(row["text"], str(row["heard"]))


def same_channels(wav: Tensor) -> bool:
    return float((wav[0] - wav[1]).square().mean()) < 1e-4 * float(wav.square().mean())


def faults(wav: Tensor, rate: int, text: str, limits: tuple[float, float]) -> Iterator[Fault]:
    """Yield the faults of a clip (C, W), worst first. Levels in dBFS, limits in seconds."""
    seconds = wav.shape[-1] / rate
    if not wav.numel():
        yield "reject", "empty audio", "record it again or remove the row"
        return
    if not bool(torch.isfinite(wav).all()):
        yield "reject", "NaN samples", "export the file again from its source"
        return
    if rate < 8000:
        yield "reject", "sample rate below 8 kHz", "use the original recording at 8 kHz or more"
    elif rate < 16000:
        yield NARROW
    if not limits[0] <= seconds <= limits[1]:
        yield "reject", f"duration outside {limits[0]:g}..{limits[1]:g} s", "cut the clip, or set data.min_seconds / max_seconds"
    yield from quality_faults(wav, rate, len(text.strip()) / seconds)


def quality_faults(wav: Tensor, rate: int, pace: float) -> Iterator[Fault]:
    """Quality faults of a readable clip (C, W); `pace` is characters per second."""
    seconds = wav.shape[-1] / rate
    peak = wav.abs().max()
    if not peak:
        yield "reject", "all-zero audio", "the recording has no sound at all: export it again from its source"
        return
    level = levels(wav, rate)
    if (wav.abs() >= 0.999).float().mean() > 0.01:
        yield "doubt", "clipping", "more than 1 % of samples at full scale: lower the gain and record again"
    if peak < 10 ** (-50 / 20) or (level < -50).float().mean() > 0.6:
        yield "doubt", SILENCE, "peak below -50 dBFS, or 60 % silent: trim it or remove the row"
    elif seconds >= 1 and level.quantile(0.9) - level.quantile(0.1) < 10:        # a short word has no pause to measure
        yield "doubt", "low SNR", "speech is less than 10 dB above the noise: denoise it or remove the row"
    if pace > 35 or (0 < pace < 2 and seconds > 2):                              # one letter may take half a second
        yield "doubt", PACE, "2..35 characters per second are usual: check the transcript"


def audio_digest(row: Row) -> str:
    """sha256 of the audio bytes of a row and of its offset, duration and stereo flag."""
    with open_audio(row) as path:
        about = os.stat(path)
        hashed = file_hash(str(path), about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns).copy()
    hashed.update(json.dumps([row.get("offset", 0), row.get("duration"), bool(row.get("stereo"))]).encode())
    return hashed.hexdigest()


@lru_cache(maxsize=256)     # the pieces of one recording stand together in most lists
def file_hash(path: str, *about: int) -> Any:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256")


@dataclass(frozen=True)
class Verdict:
    """What was found in one recording; seconds and rate are 0 when it cannot be read."""

    faults: list[Fault]
    seconds: float = 0.0
    rate: int = 0


def judge_clip(row: Row, limits: tuple[float, float]) -> Verdict:
    """Open the audio of a row and list its faults. Limits in seconds. The agent of a dialogue may listen for most of it."""
    if row["file"] != INLINE and (path := Path(row["file"])).exists() and not (path.is_file() or path.is_dir()):
        return Verdict([("reject", "not a file", "it is a pipe, a socket or a device: name a sound file")])
    try:
        wav, rate = read_channels(row, limits)
    except Unusable as error:
        return Verdict([("reject", *error.args)])
    dialogue = "alignments" in row
    about = list(stereo_faults(wav, rate, row)) if row.get("stereo") else (          # else two channels are mixed to one
        [] if len(wav) == 1 or same_channels(wav) else [OPPOSITE if opposite(wav) else STEREO])
    found = faults(wav if row.get("stereo") else mix(wav), rate, row["text"], limits)
    about += [HEARD] * differs(row)
    return Verdict([*(f for f in found if not (dialogue and f[1] in (PACE, SILENCE))), *about], wav.shape[-1] / rate, rate)


class Verdicts:
    """Verdicts by a hash of everything that was judged. With a folder (CACHE/verdicts) they outlive the command, which adds a file
    of its own: a recording is judged once."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.known, self.new = folder, {}, []
        for path in sorted(folder.glob("*.jsonl")) if folder else []:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                try:
                    key, found, seconds, rate = json.loads(line)
                    self.known[key] = Verdict([(kind, reason, fix) for kind, reason, fix in found], seconds, rate)
                except (TypeError, ValueError):
                    raise ValueError(f"{path} is damaged in line {number}; delete it, its recordings are judged again") from None

    def of(self, row: Row, limits: tuple[float, float]) -> Verdict:
        """The verdict on a row that has its `mark`, the digest of its audio."""
        said = [row[name] for name in ("text", "words", "alignments", "heard") if name in row] if row["mark"] else [row["file"]]
        key = hashlib.sha256(json.dumps([VERDICTS, row["mark"], *said, limits]).encode()).hexdigest()[:32]
        if key not in self.known or not row["mark"]:
            self.known[key] = verdict = judge_clip(row, limits)
            if row["mark"]:
                self.new.append([key, verdict.faults, verdict.seconds, verdict.rate])
        return self.known[key]

    def save(self) -> None:
        if self.folder is None or not self.new:
            return
        self.new = sorted({one[0]: one for one in self.new}.values(), key=lambda one: one[0])      # threads end in any order
        path = self.folder / f"{hashlib.sha256(json.dumps(self.new).encode()).hexdigest()[:16]}.jsonl"
        try:
            write_rows(path, self.new)
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error.strerror}); {FULL}") from None
        self.new = []


def digest_or_nothing(row: Row) -> str:
    """`audio_digest`, "" for a file that cannot be read."""
    if row["file"] != INLINE and not Path(row["file"]).is_file():
        return ""
    try:
        return audio_digest(row)
    except (OSError, ValueError):
        return ""


def judge(m: Manifest, limits: tuple[float, float], doubtful: str = "keep", talk: float = TALK, verdicts: Verdicts | None = None,
          duplex: bool = False, threads: int = 0) -> dict[str, Verdict]:
    """Leave out the rows of a manifest whose audio cannot be used, and name those that are kept with a warning.

    Limits are the least and most seconds of a clip, `talk` the most of a dialogue. With `duplex` every clip must be stereo.
    Returns the verdicts on the recordings that are kept, by id.
    """
    own, seen, verdicts = {r["id"] for r in m.rows}, {}, verdicts or Verdicts()
    silent = {r["id"] for r in m.rows if not r["file"] and not {"parts", "clips"} & r.keys()}
    if len(silent) < len(own):                          # a list of texts alone is for a model without speech
        m.bad += [RejectedRow(name, "no audio", "name its recording, or keep texts in a list of their own") for name in sorted(silent)]
        drop_users(m, silent)
    clips = [clip for clip in m.clips.values() if clip["file"]]
    for clip in clips:
        if duplex:
            clip["stereo"] = not clip["id"].endswith("#reference")      # a voice is one channel
        clip["mark"] = digest_or_nothing(clip)
    # clips are short: to synchronise threads within an operation would make this six times slower
    with Progress("checking", len(clips), "clips") as progress, torch_threads(1), ThreadPoolExecutor(workers(threads)) as pool:
        judged = pool.map(lambda clip: verdicts.of(clip, (limits[0], talk if "alignments" in clip else limits[1])), clips)
        found = [progress.add() or verdict for verdict in judged]
    verdicts.save()
    kept: dict[str, Verdict] = {}
    for clip, verdict in zip(clips, found, strict=True):
        name, faults = clip["id"], list(verdict.faults)
        first = seen.setdefault(clip["mark"], name) if name in own and clip["mark"] else name
        if first != name:
            faults.append(("doubt", "duplicate audio", f"the same audio as {first}: remove one"))
        out = [fault for fault in faults if fault[0] == "reject" or (fault[0] == "doubt" and doubtful == "drop")]
        if not out:
            kept[name] = verdict
        for _, reason, fix in out[:1]:                  # the worst is the reason
            m.reject(name, reason, fix)
        for _, reason, fix in [] if out else faults:
            m.warned.append(RejectedRow(name, reason, fix))
    drop_users(m, {clip["id"] for clip in clips} - kept.keys())
    return kept


def drop_users(m: Manifest, dropped: set[str]) -> None:
    """Remove the clips `dropped` from a manifest, and the rows that need one of them."""
    rows = []
    for row in m.rows:
        sides = [row, *([row["rejected"]] if "rejected" in row else [])]
        beside = [side["id"] + suffix for side in sides for suffix in ("#reference", "#rejected", *side.get("others", ()))]
        part = next((name for name in row.get("parts", ()) if name in dropped), None)
        if part is not None:
            m.reject(row["id"], f"its part {part} was left out", "correct or remove that clip")
        if part is not None or row["id"] in dropped or not dropped.isdisjoint(beside):
            m.clips.pop(row["id"], None)
        else:
            rows.append(row)
    m.rows[:] = rows
    for name in dropped:
        m.clips.pop(name, None)


def verdict_lines(manifests: Sequence[Manifest], doubtful: str) -> list[str]:
    """How many rows are kept, kept with a warning and left out, with the reasons: the same lines in every command."""
    rows = [row["id"] for m in manifests for row in m.rows if row["id"] not in {b.where for b in m.bad}]
    lost = Counter(b.reason for m in manifests for b in m.bad)
    warned = Counter(w.reason for m in manifests for w in m.warned)
    count = len({(n, w.where.partition("#")[0]) for n, m in enumerate(manifests) for w in m.warned})
    out = len({(n, b.where.partition("#")[0] or b.where) for n, m in enumerate(manifests) for b in m.bad})
    listed = [", ".join(f"{n} {reason}" for reason, n in found.most_common(8)) for found in (warned, lost)]
    lines = [f"kept {len(rows)} rows, {count} of them with a warning" + (f": {listed[0]}" if count else ""),
             f"left out {out} rows" + (f": {listed[1]}" if out else "")]
    if warned or lost:
        does, other = {"keep": ("kept", "drop"), "drop": ("left out", "keep")}[doubtful]
        lines.append(f"recordings that may be faulty are {does} (--data.doubtful={doubtful}, the other choice is {other})")
    return lines


def warning_lines(m: Manifest) -> Iterator[str]:
    """How a source was read, and one line for each reason of a warning."""
    yield from (visible(f"note: {note}") for note in m.notes)
    named: dict[tuple[str, str], list[str]] = {}
    for found in m.warned:
        named.setdefault((found.reason, found.fix), []).append(found.where)
    for (reason, fix), names in named.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield visible(f"warning: {shown}: {reason}; {fix}")


def advice(manifests: Sequence[Manifest], entries: Sequence[Any], config: DataConfig) -> Iterator[str]:
    """Lines about options that do nothing with this data: references without a pair, lists that are held out by their name."""
    voices = Counter(entry.speaker for entry in entries if entry.speaker and entry.key and entry.split == "train")
    if config.reference and not any(n > 1 for n in voices.values()) and not any(entry.reference >= 0 for entry in entries):
        yield (f"data.reference={config.reference:g} finds no pair: no speaker has two training recordings, so no voice is cloned; "
               + 'give rows a "speaker", or put the recordings of each into a folder of their own')
    if config.split != "manifest" and any(m.split_by_name for m in manifests):
        yield f"lists named valid, dev or test are mixed with the others (data.split={config.split}): use --data.split=manifest"


def with_fitting_split(config: DataConfig, manifests: Sequence[Manifest]) -> DataConfig:
    """The config; of one speaker, who would be on one side as a whole, rows are held out one by one, and that is printed."""
    voices = {label(row.get("speaker")) for m in manifests for row in m.rows}
    if config.split != "speaker" or len(voices) != 1 or "" in voices:
        return config
    print("all rows are of one speaker: they are held out one by one, as with --data.split=hash")
    return replace(config, split="hash")


def checked_reference(name: str, said: str, limits: tuple[float, float], doubtful: str) -> tuple[Tensor, int]:
    """Read a recording that is given as a voice; ValueError names its fault. Warnings are printed."""
    row = {"id": name, "file": name, "text": said, "mark": ""}
    for kind, reason, fix in judge_clip(row, limits).faults:
        if kind == "reject" or (kind == "doubt" and doubtful == "drop"):
            raise ValueError(f"reference {name}: {reason}; {fix}")
        print(visible(f"warning: {name}: {reason}; {fix}"), file=sys.stderr)
    return read_clip(row, limits)


def stereo_faults(wav: Tensor, rate: int, row: dict[str, Any]) -> Iterator[Fault]:
    """Judge a dialogue (2, W): silent, equal, swapped or leaking channels, and alignments that had to be corrected."""
    try:
        words = row_words(row) if "alignments" in row or row.get("words") else []
        check_length(words, wav.shape[1] / rate)
    except ValueError as error:
        yield "reject", "alignments do not fit", str(error)
        return
    if "alignments" in row and not words:
        yield "doubt", "no words", "its alignments are empty: the agent would learn to be silent; run data.py annotate"
    if "alignments" in row and (found := tidy_words(parse_alignments(row["alignments"]))[1]):
        yield "warn", "alignments corrected", ", ".join(f"{n} words {what}" for what, n in found.items())
    yield from channel_faults(wav, rate, words)


def channel_faults(wav: Tensor, rate: int, words: Sequence[Alignment]) -> Iterator[Fault]:
    n = max(1, rate // 40)                                                       # 25 ms
    power = torch.nn.functional.pad(wav, (0, -wav.shape[1] % n)).unfold(1, n, n).square().mean(-1)       # (2, J)
    silent = power.amax(1) < 10 ** (-50 / 10)
    if bool(silent[0]):
        yield "doubt", "silent channel", "the left channel (the agent) is silent: check the recording or swap its channels"
    elif bool(silent[1]):
        yield "warn", "silent channel", "the right channel (the user) is silent: the model would learn a monologue"
    elif same_channels(wav):
        yield "doubt", "both channels are the same", "this is a mono recording: separate the speakers into left and right"
    elif channels_swapped(power, words, rate / n):
        yield "doubt", "swapped channels", "the agent's words are on the right channel: left must be SPEAKER_MAIN"
    elif (leak := crosstalk(wav, rate)) > 0.15:
        yield "warn", "crosstalk", f"the channels correlate by {leak:.2f}: one microphone picks up both speakers"


def channels_swapped(power: Tensor, words: Sequence[Alignment], windows: float) -> bool:
    """The agent's words are 6 dB louder on the right than on the left, or the user's on the left.   power (2, J)"""
    votes = []
    for who, own in ((MAIN, 0), (OTHER, 1)):
        said = torch.zeros(power.shape[1], dtype=torch.bool)
        for _, start, end, speaker in words:
            if speaker == who:
                said[int(start * windows) : math.ceil(end * windows)] = True
        if said.any():
            votes.append(float(power[1 - own, said].mean()) > 4 * float(power[own, said].mean()))
    return bool(votes) and all(votes)


def crosstalk(wav: Tensor, rate: int, seconds: float = 30.0, reach: float = 0.02) -> float:
    """Largest correlation of the two channels within 20 ms of delay, 0 to 1.   (2, W)"""
    x = resample(wav[:, : round(seconds * rate)], rate, 8000) if rate != 8000 else wav[:, : round(seconds * rate)]
    spectrum = torch.fft.rfft(x, 2 * x.shape[1])
    lags = torch.fft.irfft(spectrum[0] * spectrum[1].conj()).abs()
    reach = round(8000 * reach)
    return float(torch.cat([lags[: reach + 1], lags[-reach:]]).max() / (x.square().sum(1).prod().sqrt() + 1e-12))


def check_source(path: str, write: str = "", allow_outside: bool = False, limits: tuple[float, float] = (0.2, 30.0),
                 doubtful: str = "keep", given: Sequence[str] = (), agent: str = "") -> list[Row]:
    """Print the layout of a source and the verdict on its rows; returns the usable rows, ValueError when there is none.

    `write` names a folder for NAME.kept.jsonl and NAME.rejected.jsonl; `given` are options for the command to run next.
    """
    m = read_manifest(path, allow_outside, agent=agent)
    print(f"detected: {m.kind} ({m.path})")
    verdicts = judge(m, limits, doubtful)
    print(*(f"  {line}" for line in warning_lines(m)), sep="\n", end="\n" if m.warned or m.notes else "")
    report(m)
    if m.rows:
        print(*describe(m.rows, verdicts), sep="\n")
    print(*verdict_lines([m], doubtful), sep="\n")
    if write:
        path = str(write_lists(m, Path(write)))
    if not m.rows:
        if not m.bad:
            raise ValueError(f"{path} has no usable row: read as {m.kind}, nothing found; see `python data.py --help` for the layouts")
        raise ValueError(f"{path} has no usable row; fix the rejected rows listed above")
    outside = ["--data.allow_outside=True"] if allow_outside and not write else []
    outside += ["--data.split=manifest"] if m.split_by_name else []
    print("next:", shlex.join(["python", "train.py", recipe_for(m), f"--data.sources={path}", *outside, *given]))
    return m.rows


def report(m: Manifest) -> None:
    """Print the table of the reasons why rows are left out."""
    for reason, count in Counter(b.reason for b in m.bad).most_common():
        found = [b for b in m.bad if b.reason == reason]
        print(visible(f"  {count:>6}  {reason:<28} {', '.join(b.where for b in found[:3])}{' ...' if count > 3 else ''}"))
        for fix in list(dict.fromkeys(b.fix for b in found))[:3]:
            print(visible(f"  {'':>6}  {'':<28} fix: {fix}"))


def describe(rows: Sequence[Row], verdicts: dict[str, Verdict]) -> Iterator[str]:
    """Minutes, voices, sample rates, scripts and pace of the usable rows, a line each."""
    spoken = {row["id"]: verdicts[row["id"]] for row in rows if row["id"] in verdicts}
    yield f"{sum(v.seconds for v in spoken.values()) / 60:.1f} minutes in {len(spoken)} recordings, {len(rows)} rows"
    minutes: Counter[str] = Counter()
    for row in rows:
        minutes[row["speaker"]] += spoken[row["id"]].seconds / 60 if row["id"] in spoken else 0
    named = [f"{name or '(no name)'} {m:.1f}" for name, m in minutes.most_common(8)]
    yield visible(f"voices (minutes): {', '.join(named)}{f' and {len(minutes) - 8} more' if len(minutes) > 8 else ''}")
    rates = Counter(v.rate for v in spoken.values())
    yield f"sample rates: {', '.join(f'{rate} Hz ({n})' for rate, n in rates.most_common())}" if rates else "no recordings, texts only"
    scripts = Counter(script for row in rows for script in {              # by the first word of the Unicode names of its letters
        unicodedata.name(letter, "unknown").split()[0].capitalize() for letter in set(row["text"]) if letter.isalpha()})
    yield f"scripts of the texts: {', '.join(f'{script} ({n} rows)' for script, n in scripts.most_common(6)) or 'none'}"
    pace = sorted(len(row["text"].strip()) / spoken[row["id"]].seconds for row in rows if row["id"] in spoken)
    if pace:
        yield f"characters a second: {pace[len(pace) // 2]:.1f} in the middle, {pace[0]:.1f} to {pace[-1]:.1f}"


def recipe_for(m: Manifest) -> str:
    """The config to begin with for data of this kind."""
    if any("alignments" in row for row in m.rows):
        return RECIPES["dialogues"]
    return RECIPES["speech" if any(row["file"] or "parts" in row for row in m.rows) else "text"]


def write_lists(m: Manifest, folder: Path) -> Path:
    """Write the kept rows as a manifest into `folder`, and the rejected ones as a second file; returns the first.

    Recordings that do not lie below `folder` are linked into it, or copied where a link is not possible: the manifest can be used as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = m.path.resolve().name if m.path.is_dir() else m.path.stem
    virtual = {id(line) for line in m.virtual}
    rows = [with_own_paths(r, m, folder) for r in m.rows if not r.get("composed") and id(r) not in virtual]
    names = {name: f"{stem}.clips{n or ''}.jsonl" for n, name in enumerate(m.named)}
    if folder.resolve() == m.root.resolve():
        names = {}
    for name, file in names.items():
        used = [clip for clip in m.named[name].values() if "parts" not in clip and "#" not in clip["id"]]
        write_rows(folder / file, (with_own_paths(clip, m, folder) for clip in used if Path(clip["file"]).is_file() or not clip["file"]))
    lines = [line | ({"manifest": names[line["manifest"]]} if line.get("manifest") in names else {}) for line in (*rows, *m.virtual)]
    for suffix, items in (("rejected", [vars(b) for b in m.bad]), ("kept", lines)):
        path = folder / f"{stem}.{suffix}.jsonl"
        write_rows(path, items)
        print(f"wrote {path}")
    return path


def with_own_paths(row: Row, m: Manifest, folder: Path) -> Row:
    """A row whose audio paths are relative to `folder` and stay inside it."""
    new = {k: v for k, v in row.items() if k not in CACHE_FIELDS}
    if row["file"] and row["file"] != INLINE:
        new["audio"] = place_inside(Path(row["file"]), m.root, folder)
    for side in ("reference", "rejected"):
        if row.get(side):
            new[side] = with_own_paths(row[side], m, folder)
    if row.get("others"):
        new["others"] = {suffix: with_own_paths(part, m, folder) for suffix, part in row["others"].items()}
    return new


def place_inside(file: Path, root: Path, folder: Path) -> str:
    """The path of a recording relative to `folder`; one from elsewhere is linked into folder/audio first."""
    real, home = file.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return real.relative_to(home).as_posix()
    inside = real.is_relative_to(root.resolve())
    name = real.relative_to(root.resolve()) if inside else Path(hashlib.sha256(str(real).encode()).hexdigest()[:8]) / real.name
    target = home / "audio" / name
    if not (target.is_file() and target.samefile(real)):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(real, target)
        except OSError:                                 # another disk, or one without links
            copy_file(real, target)
    return target.relative_to(home).as_posix()
