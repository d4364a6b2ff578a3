"""Faults of recordings (level, length, channels, speaking rate) and the report of `data.py check`.

A fault is ("reject" | "doubt" | "warn", reason, fix). Next: cache.py.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

from audio.wav import levels, load_wav, resample
from corpus.layouts import read_manifest
from corpus.manifest import CACHE_FIELDS, INLINE, Manifest, Row, Unusable, open_audio
from options import visible, write_rows
from text.word_times import MAIN, OTHER, Alignment, check_length, parse_alignments, row_words, tidy_words

PACE, SILENCE = "text does not fit the length", "silence"
Fault = tuple[str, str, str]    # "reject" | "doubt" (check leaves it out, prepare keeps it) | "warn", reason, fix
UNREADABLE = {"is empty": "empty audio", "NaN": "NaN samples", "channel(s)": "not stereo", "channels, expected": "too many channels"}


def read_clip(row: Row, limits: tuple[float, float] = (0.0, 4 * 3600)) -> tuple[Tensor, int]:
    """Read the audio of a row, (C, W) and its rate, C = 2 for stereo rows; Unusable when it cannot.

    A file that is longer than the limits (seconds) is not read, unless the row takes a piece of it.
    """
    begin, piece = row.get("offset", 0.0), "duration" in row and "offset" in row
    try:
        with open_audio(row) as path:
            wav, rate = load_wav(path, None, 2 if row.get("stereo") else 1, 4 * 3600 if piece else begin + limits[1])
    except FileNotFoundError:
        raise Unusable("missing file", f"{row['file']} does not exist: check the path") from None
    except (ValueError, OSError, RuntimeError) as error:
        found, _, fix = str(error).partition("; ")
        known = UNREADABLE | {"lasts": f"duration outside {limits[0]:g}..{limits[1]:g} s"}
        reason = next((reason for mark, reason in known.items() if mark in found), "unreadable audio")
        raise Unusable(reason, f"{found.replace(str(row['file']), 'it')}: {fix}") from None
    first = round(begin * rate)
    return wav[:, first : first + round(row["duration"] * rate) if piece else None], rate


NARROW: Fault = ("warn", "sample rate below 16 kHz", "this is telephone bandwidth: use 16 kHz or more if you have it")
STEREO: Fault = ("warn", "stereo", "both channels are mixed to mono: save the channel with the voice if they differ")


def header_faults(row: Row) -> list[Fault]:
    """Warnings from the header of a recording; `read_clip` reports a file that cannot be read."""
    try:
        with open_audio(row) as path:
            about = soundfile.info(path)
    except (OSError, Unusable, soundfile.LibsndfileError):
        return []
    mixed = about.channels == 2 and not row.get("stereo")
    return [STEREO] * mixed + [NARROW] * (8000 <= about.samplerate < 16000)


def usable_clip(row: Row, limits: tuple[float, float]) -> tuple[Tensor, int]:
    """`read_clip`, and Unusable for a fault that rules the clip out."""
    wav, rate = read_clip(row, limits)
    for kind, reason, fix in faults(wav, rate, row["text"], limits):
        if kind == "reject":
            raise Unusable(reason, fix)
    return wav, rate


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
    with open_audio(row) as path, open(path, "rb") as file:
        hashed = hashlib.file_digest(file, "sha256")
    hashed.update(json.dumps([row.get("offset", 0), row.get("duration"), bool(row.get("stereo"))]).encode())
    return hashed.hexdigest()


def check_clip(row: Row, limits: tuple[float, float], seen: dict[str, str]) -> list[Fault]:
    """Open the audio of a row and list its faults; `seen` maps digests to ids and finds copies.

    A dialogue is cut into chunks, so it may be long; its agent may listen for most of it.
    """
    dialogue = "alignments" in row
    limits = (limits[0], 4 * 3600.0) if dialogue else limits
    try:
        wav, rate = read_clip(row, limits)
    except Unusable as error:
        return [("reject", *error.args)]
    first = seen.setdefault(audio_digest(row), row["id"])
    copy = [("doubt", "duplicate audio", f"the same audio as {first}: remove one")] if first != row["id"] else []
    stereo = stereo_faults(wav, rate, row) if row.get("stereo") else ()
    found = [f for f in faults(wav, rate, row["text"], limits) if not (dialogue and f[1] in (PACE, SILENCE))]
    return [*found, *copy, *stereo, *(f for f in header_faults(row) if f not in found)]


def stereo_faults(wav: Tensor, rate: int, row: dict[str, Any]) -> Iterator[Fault]:
    """Judge a dialogue (2, W): silent, equal, swapped or leaking channels, and alignments that had to be corrected."""
    try:
        words = row_words(row) if "alignments" in row or row.get("words") else []
        check_length(words, wav.shape[1] / rate)
    except ValueError as error:
        yield "reject", "alignments do not fit", str(error)
        return
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
    elif float((wav[0] - wav[1]).square().mean()) < 1e-4 * float(wav.square().mean()):
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


def check_source(path: str, write: str = "", allow_outside: bool = False, limits: tuple[float, float] = (0.2, 30.0)) -> list[Row]:
    """Print the layout of a source and the faults of its rows; returns the usable rows, ValueError when there is none.

    `write` names a folder for NAME.kept.jsonl and NAME.rejected.jsonl.
    """
    m = read_manifest(path, allow_outside)
    print(f"detected: {m.kind} ({m.path})", *m.notes, sep="\n  ")
    seen: dict[str, str] = {}
    dropped: set[str] = set()
    own = {r["id"] for r in m.rows}
    for row in [r for r in m.clips.values() if r["file"]]:
        serves = row["id"].rpartition("#")[0] in own                # one recording may be the reference of many rows
        for kind, reason, fix in check_clip(row, limits, {} if serves else seen):
            if kind == "warn":
                print(visible(f"  warning: {row['id']}: {reason}; {fix}"))
            else:
                m.reject(row["id"], reason, fix)
                dropped.add(row["id"])
    used = {r["id"]: [r["id"], *r.get("parts", []), *(r["id"] + suffix for suffix in ("#reference", "#rejected", *r.get("others", ())))]
            for r in m.rows}
    kept = [r for r in m.rows if not dropped.intersection(used[r["id"]])]
    report(m, len(kept))
    if write:
        write_lists(m, kept, Path(write))
    if not kept:
        if not m.bad:
            raise ValueError(f"{path} has no usable row: read as {m.kind}, nothing found; see `python data.py --help` for the layouts")
        raise ValueError(f"{path} has no usable row; fix the rejected rows listed above")
    return kept


def report(m: Manifest, kept: int) -> None:
    """Print the table of reasons and the counts."""
    for reason, count in Counter(b.reason for b in m.bad).most_common():
        found = [b for b in m.bad if b.reason == reason]
        print(visible(f"  {count:>6}  {reason:<28} {', '.join(b.where for b in found[:3])}{' ...' if count > 3 else ''}"))
        print(visible(f"  {'':>6}  {'':<28} fix: {found[0].fix}"))
    print(f"kept {kept} rows, rejected {len({b.where for b in m.bad})}")


def write_lists(m: Manifest, kept: list[Row], folder: Path) -> None:
    """Write the kept rows as a manifest into `folder`, and the rejected ones as a second file."""
    rows = [with_relative_paths(r, folder) for r in kept if not r.get("composed")]      # the compose line is written instead
    for suffix, items in (("kept", rows + m.virtual), ("rejected", [vars(b) for b in m.bad])):
        path = folder / f"{m.path.stem}.{suffix}.jsonl"
        write_rows(path, items)
        print(f"wrote {path}")


def with_relative_paths(row: Row, folder: Path) -> Row:
    """A row whose audio paths are relative to `folder`."""
    new = {k: v for k, v in row.items() if k not in CACHE_FIELDS}
    if row["file"] and row["file"] != INLINE:
        new["audio"] = os.path.relpath(row["file"], folder)
    for side in ("reference", "rejected"):
        if row.get(side):
            new[side] = with_relative_paths(row[side], folder)
    if row.get("others"):
        new["others"] = {suffix: with_relative_paths(part, folder) for suffix, part in row["others"].items()}
    return new
