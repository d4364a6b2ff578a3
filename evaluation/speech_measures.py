"""Recordings of known texts in numbers: what papers on text to speech quote, per recording and as means with intervals.

    wer, cer              errors of a recogniser in Seed-TTS's way: its normalisation, by character in Chinese and the like, not capped;
                          the mean is over recordings. wer_figures reads figures both ways ("492" is "four nine two") and is capped
    speaker_similarity    cosine of speaker vectors, to the voice that the text was to be spoken in (audio/speaker.py)
    dnsmos                opinions of a network about overall quality, signal and background, 1 to 5 (audio/dnsmos.py)
    duration_ratio        seconds / expected seconds: those of a recording of the text, else its words at the pace of the voice
    repeats, truncated    1 where more than a tenth of what was recognised are loops, where a quarter of the text is missing at its end
    silence_ratio         share of 25 ms below -50 dBFS
    real_time_factor, first_audio     seconds of computing for a second of speech, and until the first sound; where it was spoken here

Lists of texts are Seed-TTS's meta.lst as it is, JSON lines {"text", "id", "reference", "reference_text", "recording", "language"}, or
one text a line. Papers use larger recognisers (Whisper-large-v3, Paraformer) and WavLM: name yours with --recogniser, and compare
with the numbers of others only where both are the same. A measure that cannot be made is named with its reason, never left out in silence.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

from audio import dnsmos, speaker
from audio.wav import load_wav
from evaluation.html_page import Take
from evaluation.metrics import Resample, repetition, seed_tts_cer, seed_tts_wer, truncation, units, wer
from options import locate, read_lines, read_rows
from training.evaluation_samples import silence

Row = dict[str, Any]
Recogniser = Callable[[list[tuple[Tensor, int]]], list[str]]
LOOPS, CUT = 0.1, 0.25      # shares above which a recording counts as one that repeats itself, that is truncated
TOGETHER = 16               # recordings that are in memory at once
LESS_IS_BETTER = ("wer", "cer", "wer_figures", "repeats", "truncated", "silence_ratio", "real_time_factor", "first_audio")
MORE_IS_BETTER = ("speaker_similarity", "dnsmos", "dnsmos_signal", "dnsmos_background", "ended")
MEASURES = ("wer", "cer", "wer_figures", "speaker_similarity", "dnsmos", "dnsmos_signal", "dnsmos_background", "duration_ratio", "repeats",
            "truncated", "silence_ratio", "ended", "real_time_factor", "first_audio")


# ---- lists of texts ----

def read_list(name: str) -> list[Row]:
    """The items of a list: id, text, and where the list names them reference, reference_text, recording (paths), language."""
    path = locate(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name} does not exist; name a list of texts with --set: meta.lst, JSON lines, or a text a line")
    if path.suffix == ".jsonl":
        items = [row | {k: str((path.parent / row[k]).resolve()) for k in ("reference", "recording") if row.get(k)}
                 for _, row in read_rows(path, "text to speak", text=str)]
    else:
        items = [meta_item(path, n, line) if "|" in line else {"text": line} for n, line in enumerate(read_lines(path), 1)]
    for n, item in enumerate(items):
        item["id"] = str(item.get("id", f"{n:03d}"))
    known: set[str] = set()
    for item in items:
        if item["id"] in known or Path(item["id"]).name != item["id"]:
            why = "stands there twice" if item["id"] in known else "is a path, and names a file"
            raise ValueError(f"{name}: id {item['id']!r} {why}; give every text an id of its own, without folders")
        known.add(item["id"])
    if not items:
        raise ValueError(f"{name} holds no text; write one a line")
    return items


def meta_item(path: Path, number: int, line: str) -> Row:
    """A line of Seed-TTS's lists: id|prompt text|prompt wav|text[|recording of the text], id|text|prompt wav, or id|text."""
    parts = [part.strip() for part in line.split("|")]
    if not 2 <= len(parts) <= 5 or not all(parts[:4]):
        expected = "id|prompt text|prompt wav|text[|recording], id|text|prompt wav or id|text"
        raise ValueError(f"{path} line {number} is {line[:60]!r}, expected {expected}")
    if len(parts) < 4:
        found = dict(zip(("id", "text", "reference"), parts, strict=False)) | {"id": parts[0].removesuffix(".wav")}
    else:
        found = dict(zip(("id", "reference_text", "reference", "text", "recording"), parts, strict=False))
    return found | {key: str((path.parent / found[key]).resolve()) for key in ("reference", "recording") if found.get(key)}


def samples(path: Path) -> list[Row]:
    """The rows of a samples.jsonl with whole paths; one without an id has its text, numbered where it comes again."""
    rows, seen = [], dict[str, int]()
    for _, row in read_rows(path, "row of text and wav", text=str, wav=str):
        seen[row["text"]] = seen.get(row["text"], 0) + 1
        named = row["text"] + (f" ({seen[row['text']]})" if seen[row["text"]] > 1 else "")
        paths = {key: str(path.parent / row[key]) for key in ("wav", "reference", "recording") if row.get(key)}
        rows.append(row | {"id": str(row.get("id", named))} | paths)
    if not rows:
        raise ValueError(f"{path} holds no rows; write samples first with sample.py")
    return rows


def samples_file(folder: Path) -> Path:
    """samples.jsonl of a folder, or of the last evaluation of a run."""
    if folder.is_file():
        return folder
    later = sorted(folder.glob("samples/step_*/samples.jsonl"))
    found = folder / "samples.jsonl" if (folder / "samples.jsonl").is_file() else later[-1] if later else None
    if found is None:
        raise FileNotFoundError(f"{folder} has no samples.jsonl; name texts with --set=LIST, or write samples with sample.py --texts first")
    return found


# ---- one recording ----

def measure(rows: Sequence[Row], hear: Recogniser | None, language: str = "") -> tuple[list[Row], dict[str, str]]:
    """Measure recordings.  -> the rows with `heard` and their numbers, and for each measure that no row has the reason"""
    found = []
    for at in range(0, len(rows), TOGETHER):
        part = rows[at : at + TOGETHER]
        wavs = [recording(row["wav"]) for row in part]
        heard = recognised(wavs, hear) if hear else [None] * len(part)
        found += [row | measure_one(row, wav, rate, text, language) for row, (wav, rate), text in zip(part, wavs, heard, strict=True)]
    return found, {name: why for name, why in reasons(rows, hear).items() if not any(name in row for row in found)}


def recording(path: str | Path) -> tuple[Tensor, int]:
    """A recording (1, W) and its rate; W is 0 where a model said nothing at all, which is a result and no fault of the file."""
    if Path(path).is_file() and Path(path).stat().st_size < 1000 and (info := soundfile.info(path)).frames == 0:
        return torch.zeros(1, 0), info.samplerate
    return load_wav(path)


def recognised(wavs: Sequence[tuple[Tensor, int]], hear: Recogniser) -> list[str]:
    """What is heard in each recording, nothing in an empty one."""
    sounding = [(wav, rate) for wav, rate in wavs if wav.shape[1]]
    heard = iter(hear(sounding) if sounding else [])
    return [next(heard) if wav.shape[1] else "" for wav, _ in wavs]


def measure_one(row: Row, wav: Tensor, rate: int, heard: str | None, language: str = "") -> Row:
    """The numbers of one recording, and `heard` where it was recognised."""
    seconds = wav.shape[-1] / rate
    found: Row = {"seconds": seconds, "silence_ratio": silence(wav, rate)}
    if (expected := expected_seconds(row)) > 0:
        found["duration_ratio"] = seconds / expected
    if heard is not None:
        code = str(row.get("language") or language)
        right, said = units(row["text"], code), units(heard, code)
        found |= {"heard": heard, "wer_figures": wer(row["text"], heard)}
        if right:
            found |= {"wer": seed_tts_wer(row["text"], heard, code), "cer": seed_tts_cer(row["text"], heard),
                      "repeats": float(repetition(right, said) > LOOPS), "truncated": float(truncation(right, said) >= CUT)}
    if row.get("reference") and not speaker.missing():
        found["speaker_similarity"] = speaker.similarity((wav, rate), load_wav(row["reference"]))
    return found | ({} if dnsmos.missing() else dnsmos.dnsmos(wav, rate))


def expected_seconds(row: Row) -> float:
    """How long a text should last: as a recording of it, in the manner of a run's data, or of its voice reference; 0 = not known."""
    if row.get("recording") and Path(row["recording"]).is_file():
        wav, rate = load_wav(row["recording"])
        return wav.shape[1] / rate
    if row.get("expected_seconds"):
        return float(row["expected_seconds"])
    if row.get("reference") and (letters := len("".join(units(str(row.get("reference_text", "")), "zh")))):
        wav, rate = load_wav(row["reference"])
        return wav.shape[1] / rate / letters * len("".join(units(row["text"], "zh")))
    if row.get("duration_ratio") and row.get("seconds"):                    # of an evaluation of a run
        return row["seconds"] / row["duration_ratio"]
    return 0.0


def reasons(rows: Sequence[Row], hear: Recogniser | None) -> dict[str, str]:
    """Why a measure is missing, should it be."""
    voice = speaker.missing() or "no row names the voice that it was to be spoken in (\"reference\")"
    deaf = "no text has a word to compare" if hear else "no recogniser: pip install -e \".[eval]\", or name one with --recogniser"
    here = "the recordings were not spoken by this command, one at a time"
    return {**dict.fromkeys(("wer", "cer", "wer_figures", "repeats", "truncated"), deaf), "speaker_similarity": voice,
            **dict.fromkeys(("dnsmos", "dnsmos_signal", "dnsmos_background"), dnsmos.missing() or "the recordings are empty"),
            "duration_ratio": "no row names a recording of its text, or a voice reference and its transcript",
            "ended": "the recordings do not say whether the model ended them itself",
            **dict.fromkeys(("real_time_factor", "first_audio"), here)}


# ---- all recordings ----

def means(rows: Sequence[Row], rounds: int = 1000, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Mean and bootstrap interval of every measure over the rows that have it; rows of one id are drawn together."""
    result = {}
    for name in MEASURES:
        known = [row for row in rows if isinstance(row.get(name), (bool, int, float)) and math.isfinite(row[name])]
        if known:
            result[name] = Resample([[float(row[name]), 1.0] for row in known], [row["id"] for row in known], rounds, seed)()
    return result


def shared(systems: Sequence[Sequence[Row]]) -> Iterator[tuple[Row, ...]]:
    """The rows of several systems about the same item, in the order of the first."""
    places = [{row["id"]: row for row in rows} for rows in systems]
    for name in places[0]:
        if all(name in rows for rows in places):
            yield tuple(rows[name] for rows in places)


def takes(systems: dict[str, list[Row]]) -> list[Take]:
    """The recordings of all systems by text, for listening, in the order of the first system that has it."""
    found: dict[str, Take] = {}
    for name, rows in systems.items():
        for row in rows:
            take = found.setdefault(row["id"], Take(row["text"], {}))
            take.wavs[name] = Path(row["wav"])
            take.numbers[name] = {key: row[key] for key in ("wer", "speaker_similarity", "dnsmos", "duration_ratio") if key in row}
            said = [f"heard {row['heard']!r}"] if "heard" in row else []
            take.captions[name] = ", ".join([*said, *(f"{key.replace('_', ' ')} {x:.2f}" for key, x in take.numbers[name].items())])
            take.reference = Path(row["reference"]) if row.get("reference") else take.reference
    return list(found.values())
