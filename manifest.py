"""Manifests: whatever layout speech comes in -> one list of rows, and what is wrong with each row.

A manifest is a jsonl file, one object a line, audio paths relative to its folder and never leaving it:

    {"id": "digits/4", "audio": "digits/4.opus", "text": "four", "speaker": "allison", "group": "digits", "words": [["four", 0.08]]}

Also understood: language, synthetic, split ("train"; any other word is held out), offset and duration (seconds, a piece of a longer
file), reference {"audio", "text"}, stereo (left = agent, right = user), alignments (words of both, see below). Without "audio" a row
is text only.
Two kinds of line are virtual: codes of clips joined, and a rule that writes such lines. "manifest" says in which other
file the clips live (default: this one).

    {"manifest": "manifest.jsonl", "id": "42", "parts": ["digits/4", "digits/2"], "text": "four two"}
    {"manifest": "manifest.jsonl", "compose": {"group": "digits", "count": [1, 6], "rows": 4000, "seed": 0, "held_out": 0.1}}

A dialogue has alignments [[word, [start, end], "SPEAKER_MAIN" or another], ...]; beside them may stand text_conditions
{name: value} for a model that has some (Hibiki). Moshi's {"path", "duration"} takes them
from the .json beside the wav ({"alignments": ...}, or J-Moshi's [{"speaker", "word", "start", "end"}]); a folder of such
pairs needs no list.

Other layouts are recognised and converted: wav + txt folders, metadata.csv / LJSpeech, Moshi stereo, conversations (Higgs ChatML: a
json list or jsonl of {"messages": [...]}, optional "speaker", "split", "group" and "start_index"; text alone, or recordings as
{"type": "audio", "audio_url" or base64 "raw_audio", "text": what it says}; ms-swift: <audio> in the text, the files in "audios"),
train-higgs-audio's metadata.json ({"samples": [{"audio_file", "transcript_file", "ref_audio_file", "ref_transcript", ...}]}), MOSS-TTSD
({"file_path", "full_transcript"}, or "reference_audio" and "reference_text" beside "audio" and "text").
A preference row has two sides (objective.py), replies to the same messages or whole recordings; TRL's "prompt" is "messages" too:

    {"id": "7", "messages": [...], "chosen": "Your order is on its way.", "rejected": [{"type": "audio", "audio_url": "curt.wav"}]}
    {"id": "8", "chosen": {"path": "good.wav"}, "rejected": {"path": "bad.wav"}}

A bad row is named with its reason and its fix and left out. Used by cache.py; needs only audio/, chatml.py and duplex.py.
"""

import base64
import binascii
import csv
import hashlib
import io
import json
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

import duplex
from audio.wav import levels, load_wav
from chatml import checked, clips, sample_row, untagged
from options import parse_row, write_rows

SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
MAX_MANIFEST = 1 << 30      # bytes; what is larger is not a manifest
MAX_ROWS = 10_000_000       # rows that one compose line may ask for, and clips in one of them
MAX_PARTS = 1000
MAX_INLINE = 64 << 20       # characters of base64 that one recording may have
INLINE = "(inline)"         # file name of a recording that stands in the manifest itself
PACE, SILENCE = "text does not fit the length", "silence"
ALLOW = "or allow it: check --allow-outside, --data.allow_outside=True"
COLUMNS = {"audio": ("file_name", "audio", "path", "wav", "filename"),
           "text": ("text", "transcription", "sentence", "transcript", "normalized_text"),
           "speaker": ("speaker", "speaker_id", "source", "client_id")}
OURS = {"file": "", "mark": "", "key": "", "shard": ""}     # what cache.py fills in: nothing that a manifest could say
Row = dict[str, Any]
Fault = tuple[str, str, str]    # "reject" | "doubt" (check leaves it out, prepare keeps it) | "warn", reason, fix


class Unusable(ValueError):
    """A row that must be left out; args are the reason and the fix."""


@dataclass(frozen=True)
class Bad:
    """A row that is left out: where it stands, why, and what would mend it."""

    where: str
    reason: str
    fix: str


@dataclass
class Manifest:
    """The rows of one source. Every row has id, text, and `file` (its audio on this machine, "" for none)."""

    path: Path
    kind: str = "manifest"
    allow_outside: bool = False
    rows: list[Row] = field(default_factory=list)
    clips: dict[str, Row] = field(default_factory=dict)     # by id: own rows and those of the manifests it names
    named: dict[str, dict[str, Row]] = field(default_factory=dict)      # clips of those manifests, by file
    virtual: list[Row] = field(default_factory=list)        # compose lines as they were written
    bad: list[Bad] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    assistant_text: str = "drop"                            # of the one-turn clone requests that chatml.py rewrites

    @property
    def root(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def reject(self, where: str, reason: str, fix: str) -> None:
        self.bad.append(Bad(where, reason, fix))


def read_manifest(path: str | Path, allow_outside: bool = False, nested: bool = False, assistant_text: str = "drop") -> Manifest:
    """Recognise a source and read its rows; rows that cannot be read are in `.bad`.

    Raises FileNotFoundError without the source, ValueError when its layout is unknown.
    """
    kind, path = detect(Path(path))
    m, virtual = Manifest(path, kind, allow_outside, assistant_text=assistant_text), []
    read, convert = LAYOUTS[kind]
    for where, row in read(m):
        try:
            row = pair(m, row, convert) if "rejected" in row else convert(m, row)
            if "rejected" in row:
                accept_pair(m, where, row)
            elif {"parts", "compose", "manifest"} & row.keys():
                virtual.append((where, row))
            else:
                accept(m, where, row)
        except Unusable as error:
            m.reject(where, *error.args)
    for where, row in [] if nested else virtual:        # a manifest that another one names lends its clips only
        try:
            add_virtual(m, where, row)
        except Unusable as error:
            m.reject(where, *error.args)
    return m


def detect(path: Path) -> tuple[str, Path]:
    """Name the layout of a file or folder, and the file that lists its rows."""
    if path.is_dir():
        named = [path / n for n in ("manifest.jsonl", "metadata.csv", "metadata.jsonl", "metadata.tsv", "metadata.json")]
        lists = [p for p in named if p.is_file()] or sorted(path.glob("*.jsonl"))
        if not lists:
            paired = any(p.with_suffix(".json").is_file() for p in path.rglob("*") if p.suffix.lower() in SOUNDS)
            return ("wav + json" if paired else "wav + txt"), path
        path = lists[0]
    if not path.is_file():
        raise FileNotFoundError(f"data source {path} does not exist; check the path")
    if path.suffix in (".csv", ".tsv", ".txt"):
        return "metadata", path
    first = next((row for _, row in json_rows(Manifest(path))), {})
    keys = (first | first["chosen"] if isinstance(first.get("chosen"), dict) else first).keys()
    for kind, marks in (("manifest", ("audio", "parts", "compose", "manifest")), ("conversations", ("messages", "prompt")),
                        ("train-higgs-audio", ("samples", "audio_file")), ("MOSS-TTSD", ("full_transcript",)),
                        ("Moshi stereo", ("path",)), ("metadata", ("file_name",)), ("manifest", ("text",))):
        if keys & set(marks):
            return kind, path
    raise ValueError(f"{path} has no known layout (first row: {', '.join(keys) or 'none'}); see `python data.py --help`")


# ---- reading rows ----

def text_lines(m: Manifest, path: Path | None = None) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a UTF-8 file that are not blank; undecodable ones are rejected."""
    path = path or m.path
    if path.stat().st_size > MAX_MANIFEST:
        raise ValueError(f"{path} has more than {MAX_MANIFEST} bytes; split it into several manifests")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = raw.decode("utf-8-sig", errors="replace").rstrip("\r\n")     # U+FFFD marks what is not UTF-8
            if "\ufffd" in text:
                m.reject(f"{path.name} line {number}", "bad encoding", "save the file as UTF-8")
            elif text.strip():
                yield number, text


def json_rows(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a jsonl file, or of a json list, with the place where each stands."""
    if m.path.suffix == ".json":
        yield from json_list(m)
        return
    for number, text in text_lines(m):
        try:
            row = parse_row(text)
        except ValueError as error:
            m.reject(f"line {number}", "malformed json", f"mend it: {error}")
            continue
        yield f"line {number}", row


def json_list(m: Manifest) -> Iterator[tuple[str, Row]]:
    try:
        found = json.loads("\n".join(line for _, line in text_lines(m)))
    except (ValueError, RecursionError) as error:
        m.reject(f"line {getattr(error, 'lineno', 1)}", "malformed json", f"mend it: {error}")
        return
    for i, row in enumerate(found if isinstance(found, list) else [found]):
        if isinstance(row, dict):
            yield f"item {i}", row
        else:
            m.reject(f"item {i}", "malformed json", "each item must be an object {...}")


def metadata(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Read LJSpeech `id|text|normalised`, or a csv / tsv / jsonl with a header (datasets' AudioFolder, Common Voice)."""
    if m.path.suffix == ".jsonl":
        yield from ((where, renamed(row, m)) for where, row in json_rows(m))
        return
    lines = [text for _, text in text_lines(m)]
    mark = next((c for c in "|\t" if lines and c in lines[0]), ",")
    try:
        table = list(csv.reader(lines, delimiter=mark, quoting=csv.QUOTE_NONE if mark == "|" else csv.QUOTE_MINIMAL))
    except csv.Error as error:
        raise ValueError(f"{m.path} is not a readable table ({error}); save it again as csv in UTF-8") from None
    header = [name.strip().lower() for name in table[0]] if table else []
    headed = any(name in header for name in COLUMNS["audio"])
    if not headed and mark != "|":
        raise ValueError(f"{m.path} has no column of audio (found: {', '.join(header)}); name one {' or '.join(COLUMNS['audio'])}")
    if not headed:
        m.notes.append("no header: read as LJSpeech id|text|normalised text")
    for number, cells in enumerate(table[headed:], 1 + headed):
        if headed:
            yield f"row {number}", renamed(dict(zip(header, cells, strict=False)), m)
        else:
            places = [f"wavs/{cells[0]}.wav", f"wav/{cells[0]}.wav", f"{cells[0]}.wav"]
            audio = next((p for p in places if (m.root / p).is_file()), places[0])
            yield f"row {number}", {"id": cells[0], "audio": audio, "text": next(filter(None, reversed(cells[1:])), "")}


def renamed(row: Row, m: Manifest) -> Row:
    """Give the columns of other people's tables our names; say once which."""
    found = {ours: next((n for n in names if n in row), "") for ours, names in COLUMNS.items()}
    note = "columns: " + ", ".join(f"{theirs} -> {ours}" for ours, theirs in found.items() if theirs)
    if note not in m.notes:
        m.notes.append(note)
    new = {ours: row[theirs] for ours, theirs in found.items() if theirs}
    if "audio" in new and not (m.root / str(new["audio"])).is_file() and (m.root / "clips" / str(new["audio"])).is_file():
        new["audio"] = f"clips/{new['audio']}"                # Common Voice
    return {k: row[k] for k in ("id", "language", "split") if k in row} | new


def pairs(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Read a folder of sound files that each have a .txt of the same name; a folder inside it is a speaker."""
    for path in sorted(p for p in m.path.rglob("*") if p.suffix.lower() in SOUNDS):
        name, transcript, before = path.relative_to(m.path), path.with_suffix(".txt"), len(m.bad)
        if not transcript.is_file():
            m.reject(str(name), "no transcript", f"write what is said into {transcript.name}, or run data.py annotate for dialogues")
            continue
        text = "\n".join(line for _, line in text_lines(m, transcript))
        if len(m.bad) == before:
            speaker = {} if name.parent == Path(".") else {"speaker": name.parts[0]}
            yield str(name), {"id": name.with_suffix("").as_posix(), "audio": name.as_posix(), "text": text} | speaker


def chatml(m: Manifest, sample: Row) -> Row:
    """Conversations: the last assistant turn is the row, an earlier turn with audio its reference (chatml.py)."""
    return readable(sample_row, readable(untagged, sample) if "audios" in sample else sample, m.assistant_text)


def readable(read: Callable[..., Any], *given: Any) -> Any:
    """Call a reader of chatml.py; its ValueError "reason; fix" becomes Unusable."""
    try:
        return read(*given)
    except ValueError as error:
        raise Unusable(*str(error).split("; ", 1)) from None


def moshi(m: Manifest, item: Row) -> Row:
    """Moshi's {"path", "duration"}: words and their times come from the .json beside the stereo file."""
    name = str(item.get("path") or "(no path)")
    side = inside(m, name).with_suffix(".json")
    if not side.is_file():
        form = '{"alignments": [[word, [start, end], speaker]]}'
        raise Unusable("no alignment file", f"put {side.name} {form} beside {name}, or run data.py annotate")
    text = "\n".join(line for _, line in text_lines(m, side))
    try:
        given = json.loads(text)
        found, told = duplex.parse_alignments(given), given.get("text_conditions") if isinstance(given, dict) else None
        if not (told is None or isinstance(told, dict) and all(v is None or isinstance(v, str) for v in told.values())):
            raise ValueError(f"text_conditions is {str(told)[:60]}, wanted names with one word each")
    except (ValueError, RecursionError) as error:
        raise Unusable("malformed alignments", f"mend {side.name}: {error}") from None
    words = [[word, start] for word, start, _, who in duplex.tidy(found)[0] if who == duplex.MAIN]
    said = " ".join(word for word, _ in words)
    kept = {key: item[key] for key in ("id", "speaker", "split") if key in item} | ({"text_conditions": told} if told else {})
    return kept | {"audio": name, "stereo": True, "text": said, "words": words, "alignments": duplex.as_json(found)}


def stereo_pairs(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Read a folder of sound files that each have a .json of alignments (DailyTalkContiguous without its list)."""
    for path in sorted(p for p in m.path.rglob("*") if p.suffix.lower() in SOUNDS and p.with_suffix(".json").is_file()):
        yield (name := path.relative_to(m.path).as_posix()), {"path": name}


def samples(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Read the list in train-higgs-audio's metadata.json, or lines of such samples."""
    for where, row in json_rows(m):
        items = row.get("samples", [row])
        for i, item in enumerate(items if isinstance(items, list) else [items]):
            name = f"sample {i}" if "samples" in row else where
            if isinstance(item, dict):
                yield name, item
            else:
                m.reject(name, "malformed json", "each sample must be an object {...}")


def clone_sample(m: Manifest, item: Row) -> Row:
    """train-higgs-audio: the words of a recording and of its reference stand in files, or beside them in the sample."""
    row = {"audio": str(item.get("audio_file") or ""), "text": transcript_of(m, item, "transcript"),
           "speaker": str(item.get("speaker_id") or item.get("speaker_name") or "")}
    name = str(item.get("id") or item.get("audio_id") or "")
    row |= {key: item[key] for key in ("language", "scene", "split", "offset") if item.get(key)} | ({"id": name} if name else {})
    if item.get("ref_audio_file"):
        row["reference"] = {"audio": str(item["ref_audio_file"]), "text": transcript_of(m, item, "ref_transcript")}
    return row


def transcript_of(m: Manifest, item: Row, key: str) -> str:
    """What is said, from item[key] or from the file that item[key + "_file"] names; "" when there is neither."""
    if isinstance(item.get(key), str) or not item.get(f"{key}_file"):
        return str(item.get(key) or "")
    path = inside(m, str(item[f"{key}_file"]))
    if not path.is_file():
        raise Unusable("no transcript", f"{path} does not exist: write into it what is said")
    return "\n".join(line for _, line in text_lines(m, path))


def ttsd(m: Manifest, item: Row) -> Row:
    """MOSS-TTSD: speakers are numbered from 1 and marked [S1], ours from 0 and [SPEAKER0]."""
    text = re.sub(r"\[S(\d+)\]", lambda mark: f"[SPEAKER{int(mark[1]) - 1}] ", str(item.get("full_transcript") or ""))
    return {k: v for k, v in item.items() if k not in ("file_path", "full_transcript")} | {"audio": item.get("file_path"), "text": text}


def own_row(m: Manifest, row: Row) -> Row:
    """A row of ours, or one that names its reference as MOSS-TTSD does."""
    if "reference_audio" in row and "reference" not in row:
        row["reference"] = {"audio": row.pop("reference_audio"), "text": row.pop("reference_text", "")}
    return row


def as_it_is(m: Manifest, row: Row) -> Row:
    return row


LAYOUTS = {"manifest": (json_rows, own_row), "metadata": (metadata, as_it_is), "wav + txt": (pairs, as_it_is),
           "conversations": (json_rows, chatml), "Moshi stereo": (json_rows, moshi),
           "train-higgs-audio": (samples, clone_sample), "MOSS-TTSD": (json_rows, ttsd),
           "wav + json": (stereo_pairs, moshi)}                                           # how rows are read, and made ours


# ---- pairs of replies ----

def pair(m: Manifest, row: Row, convert: Callable[[Manifest, Row], Row]) -> Row:
    """A preference row as the row of its better side, that of the other one under "rejected"."""
    shared = {k: v for k, v in row.items() if k not in ("chosen", "rejected", "prompt")}
    if "prompt" in row:
        shared["messages"] = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    before = shared.get("messages") if "chosen" in row else None
    if before is not None:
        if not isinstance(before, list):
            raise Unusable("malformed pair", '"messages" is the list of what was said before both replies')
        asked = [[*before, *answer(row[name])] for name in ("chosen", "rejected")]
        better, worse = (convert(m, shared | {"messages": messages}) for messages in asked)
    elif isinstance(row["rejected"], dict) and isinstance(row.get("chosen", {}), dict) and "parts" not in row:
        better = convert(m, shared | row.get("chosen", {}))
        worse = convert(m, (shared if "chosen" in row else {}) | row["rejected"])
    else:
        raise Unusable("malformed pair", 'give "messages" and a "chosen" and "rejected" reply, or two objects that each name their audio')
    for side in (better, worse) if "clips" in better and "clips" in worse else ():
        side.setdefault("start_index", len(side["messages"]) - 1)       # all before the reply is the same on both sides
    return better | {"rejected": worse}


def answer(reply: Any) -> list[Row]:
    """The turn of a reply: its content, or TRL's list of one message."""
    if isinstance(reply, list) and reply and all(isinstance(part, dict) and "role" in part for part in reply):
        return reply
    return [{"role": "assistant", "content": reply}]


def accept_pair(m: Manifest, where: str, row: Row) -> None:
    """Add a preference row. Its rejected side lends what it holds, as a reference does; it is no row of its own."""
    row["id"] = str(row.get("id") or where)
    row["rejected"]["id"] = f"{row['id']}#rejected"
    accept(m, where, row["rejected"])
    if m.rows and m.rows[-1] is row["rejected"]:
        m.rows.pop()
        accept(m, where, row)


# ---- what a row must have ----

def inside(m: Manifest, name: str) -> Path:
    """The file that a manifest names; Unusable when it is not in the manifest's folder."""
    path, reason = m.root / name, ""
    if "\0" in name:
        reason = "malformed path"
    elif not m.allow_outside and (os.path.isabs(name) or ".." in Path(name).parts):
        reason = "path outside the folder"
    elif not m.allow_outside and not path.resolve().is_relative_to(m.root.resolve()):
        reason = "path outside the folder (symlink)"
    if reason:
        raise Unusable(reason, f"move {name} into {m.root}, {ALLOW}")
    return path


def is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1e6         # neither NaN nor infinite


def accept(m: Manifest, where: str, row: Row) -> None:
    """Add a row with its defaults and its reference clip; Unusable before its audio is opened when a field is wrong."""
    beside = recordings_beside(row)
    for part in (row, *beside.values()):
        name = str(part.get("audio") or "")
        if name == INLINE:
            inline_bytes(part)
        part |= OURS | {"file": name if name == INLINE else str(inside(m, name)) if name else ""}
    start = f"@{row['offset']}" if row.get("offset") else ""
    named = row.get("audio") and row["audio"] != INLINE
    row["id"] = str(row.get("id") or (os.path.splitext(str(row["audio"]))[0] + start if named else where))
    row["speaker"] = str(row.get("speaker") or "")
    try:
        check_fields(m, row, list(beside.values()))
    except Unusable as error:
        return m.reject(f"{where} {row['id']}", *error.args)
    for suffix, part in beside.items():
        m.clips[row["id"] + suffix] = {"id": row["id"] + suffix, "speaker": row["speaker"]} | part
    m.clips[row["id"]] = row
    m.rows.append(row)
    return None


def recordings_beside(row: Row) -> dict[str, Row]:
    """The other recordings of a row by the suffix of their id: its reference, and what else its messages hold."""
    reference, others = row.get("reference", {}), row.get("others", {})
    if not isinstance(reference, dict) or not isinstance(others, dict):
        raise Unusable("malformed field", 'a reference has "audio" and "text"')
    found = ({"#reference": reference} if reference else {}) | others
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in found.values()):
        raise Unusable("malformed field", 'a reference has "audio" and "text"')
    if "clips" not in row:
        row.pop("messages", None)               # they belong to another tool: the row speaks for itself
    elif not isinstance(row["clips"], list) or not all(name in ("", *found) for name in row["clips"]):
        raise Unusable("malformed field", '"clips" names the recordings of "messages" by suffix')
    else:
        readable(checked, row.get("messages"))
    return found


def inline_bytes(part: Row) -> bytes:
    """The sound file that a manifest holds as base64 in `raw_audio`; Unusable when it does not."""
    text, fix = part.get("raw_audio"), "give raw_audio as base64 of a sound file, or name the file in audio_url"
    if not isinstance(text, str) or not text or len(text) > MAX_INLINE:
        raise Unusable("inline audio", fix)
    try:
        found = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
        soundfile.info(io.BytesIO(found))
    except (binascii.Error, soundfile.LibsndfileError):
        raise Unusable("inline audio", f"it is no base64 of a sound file: {fix}") from None
    return found


def check_fields(m: Manifest, row: Row, others: list[Row]) -> None:
    words = row.get("words", [])
    if not isinstance(row.get("text"), str) or not (row["text"].strip() or "alignments" in row or answers(row)):
        raise Unusable("empty text", "write what is said, or remove the row")
    if "\ufffd" in row["text"]:
        raise Unusable("bad encoding", "the text holds U+FFFD: save it again as UTF-8 from its origin")
    if row["id"] in m.clips:
        raise Unusable("duplicate id", "ids must be unique in a manifest: rename one")
    if not all(is_time(part.get(k, 0)) for k in ("offset", "duration") for part in (row, *others)):
        raise Unusable("malformed field", "offset and duration are seconds")
    if not isinstance(words, list) or not all(
            isinstance(w, list) and len(w) == 2 and isinstance(w[0], str) and is_time(w[1]) for w in words):
        raise Unusable("malformed field", 'words look like [["four", 0.08], ...]')


def answers(row: Row) -> bool:
    """A row that needs no transcript: the agent of a dialogue may only listen, and a spoken reply to speech speaks for itself."""
    return "clips" in row and any(clips(m["content"]) for m in row["messages"] if m["role"] == "user")


# ---- virtual rows ----

def fraction(*words: object) -> float:
    """Hash words to a number in [0, 1): the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, words)).encode()).digest()[:7], "big") / (1 << 56)


def add_virtual(m: Manifest, where: str, row: Row) -> None:
    """Resolve a "manifest" reference, then a "parts" row or a "compose" rule."""
    clips = m.clips
    if name := str(row.get("manifest") or ""):
        if name not in m.named:
            other = read_manifest(inside(m, name), m.allow_outside, nested=True)
            m.named[name], m.bad = other.clips, m.bad + other.bad
        clips = m.named[name]
    if "compose" in row:
        try:
            rows = compose(row["compose"], clips)
        except (KeyError, TypeError, ValueError) as error:
            raise Unusable("malformed compose", f"{error}; see `python data.py --help`") from None
        m.virtual.append(row)
    elif isinstance(row.get("parts"), list) and all(isinstance(p, str) for p in row["parts"]):
        rows = [row]
    else:
        raise Unusable("malformed parts", 'a virtual line has "parts": ["id", ...] or "compose": {...}')
    for new in rows:
        name = str(new.get("id") or where)
        missing = [p for p in new["parts"] if p not in clips or not clips[p]["file"]]
        if missing or not new["parts"] or name in m.clips:
            m.reject(f"{where} {name}", "missing part or duplicate id", f"unknown parts: {missing[:3]}")
            continue
        m.clips |= {p: clips[p] for p in new["parts"] if p not in m.clips}
        text = str(new.get("text") or " ".join(clips[p]["text"] for p in new["parts"]))
        m.clips[name] = new | OURS | {"id": name, "text": text, "speaker": clips[new["parts"][0]]["speaker"]}
        m.rows.append(m.clips[name])


def compose(rule: Row, clips: dict[str, Row]) -> list[Row]:
    """Write `rows` rows of random clips of a group, or of the clips that `ids` lists, one speaker each. The split follows
    from the text, so no string is on both sides; rows of one clip always train. Same rule, same clips: same rows."""
    group, (low, high), count, seed = rule["group"], rule["count"], int(rule["rows"]), rule.get("seed", 0)
    if not 0 < low <= high <= MAX_PARTS or not 0 <= count <= MAX_ROWS:
        raise ValueError(f"count {rule['count']} or rows {count} make no sense")
    voices: dict[str, list[str]] = {}
    for name, clip in sorted(clips.items()):
        wanted = name in rule["ids"] if "ids" in rule else clip.get("group") == group
        wanted = wanted and clip.get("speaker", "") == rule.get("speaker", clip.get("speaker", ""))
        if wanted and clip["file"] and clip.get("split", "train") == "train":
            voices.setdefault(clip["speaker"], []).append(name)
    if not voices:
        raise ValueError(f"no clip has group {group!r}")
    rows = []
    for i in range(count):
        draw = random.Random(f"{group}/{seed}/{i}")
        names = voices[draw.choice(sorted(voices))]
        parts = [draw.choice(names) for _ in range(draw.randint(low, high))]
        text = " ".join(clips[p]["text"] for p in parts)
        held = len(parts) > 1 and fraction(text) < rule.get("held_out", 0.0)
        rows.append({"id": f"{group}+{seed}/{i}", "parts": parts, "text": text, "group": group, "composed": True,
                     "split": "held-out" if held else "train"})
    return rows


# ---- what is wrong with the audio ----

UNREADABLE = {"is empty": "empty audio", "NaN": "NaN samples", "channel(s)": "not stereo", "channels, wanted": "too many channels"}


def read_clip(row: Row, limits: tuple[float, float] = (0.0, 4 * 3600)) -> tuple[Tensor, int]:
    """Read the audio of a row, (C, W) and its rate, C = 2 for stereo rows; Unusable when it cannot.

    A file that is longer than the limits (seconds) is not read, unless the row takes a piece of it.
    """
    begin, piece = row.get("offset", 0.0), "duration" in row and "offset" in row
    try:
        with opened(row) as path:
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


NARROW: Fault = ("warn", "sample rate below 16 kHz", "telephone band: wideband speech trains better")
STEREO: Fault = ("warn", "stereo", "its two channels are mixed into one: give the one with the voice if they differ")


def header_faults(row: Row) -> list[Fault]:
    """What the header of a recording warns of; a file that cannot be read is left to `read_clip`."""
    try:
        with opened(row) as path:
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
    """Judge a clip (C, W), worst first. Levels in dBFS, limits in seconds."""
    seconds = wav.shape[-1] / rate
    if not wav.numel():
        yield "reject", "empty audio", "record it again or remove the row"
        return
    if not bool(torch.isfinite(wav).all()):
        yield "reject", "NaN samples", "write the file again from its source"
        return
    if rate < 8000:
        yield "reject", "sample rate below 8 kHz", "find the recording in a higher rate"
    elif rate < 16000:
        yield NARROW
    if not limits[0] <= seconds <= limits[1]:
        yield "reject", f"duration outside {limits[0]:g}..{limits[1]:g} s", "cut the clip, or set data.min_seconds / max_seconds"
    yield from quality_faults(wav, rate, len(text.strip()) / seconds)


def quality_faults(wav: Tensor, rate: int, pace: float) -> Iterator[Fault]:
    """Doubts about a readable clip; `pace` is characters per second."""
    seconds = wav.shape[-1] / rate
    peak = wav.abs().max()
    level = levels(wav, rate)
    if (wav.abs() >= 0.999).float().mean() > 0.01:
        yield "doubt", "clipping", "more than 1 % of samples at full scale: lower the gain and record again"
    if peak < 10 ** (-50 / 20) or (level < -50).float().mean() > 0.6:
        yield "doubt", SILENCE, "peak below -50 dBFS, or 60 % silent: trim it or remove the row"
    elif seconds >= 1 and level.quantile(0.9) - level.quantile(0.1) < 10:        # a short word has no pause to measure
        yield "doubt", "low SNR", "speech is within 10 dB of the noise: denoise or remove the row"
    if pace > 35 or (0 < pace < 2 and seconds > 2):                              # one letter may take half a second
        yield "doubt", PACE, "2..35 characters a second are usual: check the transcript"


@contextmanager
def opened(row: Row) -> Iterator[str]:
    """A path at which the audio of a row can be read; one that stands in the manifest lies there for a moment."""
    if row["file"] != INLINE:
        yield row["file"]
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(inline_bytes(row))
        file.flush()
        yield file.name


def digest(row: Row) -> str:
    """sha256 of the audio bytes of a row and of the piece it takes of them."""
    with opened(row) as path, open(path, "rb") as file:
        hashed = hashlib.file_digest(file, "sha256")
    hashed.update(json.dumps([row.get("offset", 0), row.get("duration"), bool(row.get("stereo"))]).encode())
    return hashed.hexdigest()


def inspect(row: Row, limits: tuple[float, float], seen: dict[str, str]) -> list[Fault]:
    """Open the audio of a row and list its faults; `seen` maps digests to ids and finds copies.

    A dialogue is cut into chunks, so it may be long; its agent may listen for most of it.
    """
    dialogue = "alignments" in row
    limits = (limits[0], 4 * 3600.0) if dialogue else limits
    try:
        wav, rate = read_clip(row, limits)
    except Unusable as error:
        return [("reject", *error.args)]
    first = seen.setdefault(digest(row), row["id"])
    copy = [("doubt", "duplicate audio", f"the same audio as {first}: remove one")] if first != row["id"] else []
    stereo = duplex.stereo_faults(wav, rate, row) if row.get("stereo") else ()
    found = [f for f in faults(wav, rate, row["text"], limits) if not (dialogue and f[1] in (PACE, SILENCE))]
    return [*found, *copy, *stereo, *(f for f in header_faults(row) if f not in found)]


def check(path: str, write: str = "", allow_outside: bool = False, limits: tuple[float, float] = (0.2, 30.0)) -> list[Row]:
    """Print what a source holds and what is wrong with it; -> the rows that are left, ValueError when none is.

    `write` names a folder for NAME.kept.jsonl and NAME.rejected.jsonl.
    """
    m = read_manifest(path, allow_outside)
    print(f"detected: {m.kind} ({m.path})", *m.notes, sep="\n  ")
    seen: dict[str, str] = {}
    dropped: set[str] = set()
    own = {r["id"] for r in m.rows}
    for row in [r for r in m.clips.values() if r["file"]]:
        serves = row["id"].rpartition("#")[0] in own                # one recording may be the reference of many rows
        for kind, reason, fix in inspect(row, limits, {} if serves else seen):
            if kind == "warn":
                print(f"  warning: {row['id']}: {reason}; {fix}")
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
        raise ValueError(f"{path} has no usable row; mend the reasons above")
    return kept


def report(m: Manifest, kept: int) -> None:
    """Print the table of reasons and the counts."""
    for reason, count in Counter(b.reason for b in m.bad).most_common():
        found = [b for b in m.bad if b.reason == reason]
        print(f"  {count:>6}  {reason:<28} {', '.join(b.where for b in found[:3])}{' ...' if count > 3 else ''}")
        print(f"  {'':>6}  {'':<28} fix: {found[0].fix}")
    print(f"kept {kept} rows, rejected {len({b.where for b in m.bad})}")


def write_lists(m: Manifest, kept: list[Row], folder: Path) -> None:
    """Write what is kept as a manifest in `folder`, and what is not beside it."""
    rows = [moved(r, folder) for r in kept if not r.get("composed")]      # their rule is written
    for suffix, items in (("kept", rows + m.virtual), ("rejected", [vars(b) for b in m.bad])):
        path = folder / f"{m.path.stem}.{suffix}.jsonl"
        write_rows(path, items)
        print(f"wrote {path}")


def moved(row: Row, folder: Path) -> Row:
    """A row whose audio paths are relative to `folder`."""
    new = {k: v for k, v in row.items() if k not in OURS}
    if row["file"] and row["file"] != INLINE:
        new["audio"] = os.path.relpath(row["file"], folder)
    for side in ("reference", "rejected"):
        if row.get(side):
            new[side] = moved(row[side], folder)
    if row.get("others"):
        new["others"] = {suffix: moved(part, folder) for suffix, part in row["others"].items()}
    return new
