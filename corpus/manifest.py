"""Manifests: one list of rows, whatever layout speech comes in, and what a row must have.

A manifest is a jsonl file, one object a line, audio paths relative to its folder and never leaving it:

    {"id": "digits/4", "audio": "digits/4.opus", "text": "four", "speaker": "allison", "group": "digits", "words": [["four", 0.08]]}

Optional fields: language, synthetic, split ("train"; any other word is held out), offset and duration (seconds, a piece of a longer
file), cell ([row, column], where "audio" is a parquet or Arrow file), reference {"audio", "text"}, stereo (left = agent, right =
user), alignments (words of both, see below). Without "audio" a row is text only.
Two kinds of line are virtual: a join of clips (their codes one after the other), and a rule that generates such lines.
"manifest" names the file that lists the clips (default: this one).

    {"manifest": "manifest.jsonl", "id": "42", "parts": ["digits/4", "digits/2"], "text": "four two"}
    {"manifest": "manifest.jsonl", "compose": {"group": "digits", "count": [1, 6], "rows": 4000, "seed": 0, "held_out": 0.1}}

A dialogue has alignments [[word, [start, end], "SPEAKER_MAIN" (or --data.agent) or another], ...]; optional: text_conditions
{name: value} for a model that has conditions (Hibiki), text_prompt and voice_prompt (a recording) for one that takes a role and a
voice (PersonaPlex). Moshi's {"path", "duration"} takes them
from the .json beside the wav ({"alignments": ...}, or J-Moshi's [{"speaker", "word", "start", "end"}]); a folder of such
pairs needs no list.

Other layouts are recognised and converted: wav + txt folders, metadata.csv / LJSpeech, stereo dialogues (jsonl), conversations
(Higgs ChatML: a json list or jsonl of {"messages": [...]}, optional "speaker", "split", "group" and "start_index"; text alone,
or recordings as {"type": "audio", "audio_url" or base64 "raw_audio", "text": what it says}; a turn's "weight" 0 or "loss" false keeps
it from being trained; ms-swift: <audio> in the text, the files in "audios"; ShareGPT's "conversations"), parquet files and folders of
`datasets` with any of these (pip install pyarrow),
train-higgs-audio's metadata.json ({"samples": [{"audio_file", "transcript_file", "ref_audio_file", "ref_transcript", ...}]}), MOSS-TTSD
({"file_path", "full_transcript"}, or "reference_audio" and "reference_text" beside "audio" and "text").
A preference row has two sides (objective.py), replies to the same messages or whole recordings; TRL's "prompt" is "messages" too:

    {"id": "7", "messages": [...], "chosen": "Your order is on its way.", "rejected": [{"type": "audio", "audio_url": "curt.wav"}]}
    {"id": "8", "chosen": {"path": "good.wav"}, "rejected": {"path": "bad.wav"}}

A bad row is reported with its reason and its fix and left out. Next: layouts.py, which reads files.
"""

import base64
import binascii
import hashlib
import io
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import soundfile

from audio.wav import is_media
from families.family import special_tokens
from system.tables import cell_bytes
from text.chat_formats import start_of
from text.conversation import INLINE, checked, clips
from text.word_times import is_time

MAX_ROWS = 10_000_000       # rows that one compose line may ask for, and clips in one of them
MAX_PARTS = 1000
MAX_INLINE = 64 << 20       # characters of base64 that one recording may have
TRANSCRIBED = "transcribed.jsonl"      # what `data.py transcribe` writes
ALLOW = "or allow it: check --allow-outside, --data.allow_outside=True"
CACHE_FIELDS = {"file": "", "mark": "", "key": "", "shard": ""}     # filled in by cache.py, never read from a manifest
Row = dict[str, Any]


class Unusable(ValueError):
    """A row that must be left out; args are the reason and the fix."""


@dataclass(frozen=True)
class RejectedRow:
    """A row that is left out: its place in the source, the reason, and how to fix it."""

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
    clips: dict[str, Row] = field(default_factory=dict)     # by id: rows of this manifest and of those it names
    named: dict[str, dict[str, Row]] = field(default_factory=dict)      # clips of those manifests, by file
    virtual: list[Row] = field(default_factory=list)        # compose lines as they were written
    bad: list[RejectedRow] = field(default_factory=list)
    warned: list[RejectedRow] = field(default_factory=list) # kept, with a warning
    notes: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)   # fields that nothing is done with, and their rows
    base: Path | None = None                                # the folder, where the source is one: names of files begin there
    agent: str = ""                                         # DataConfig.agent: the label of the agent in alignments
    files: set[str] = field(default_factory=set)            # the recordings that its rows name
    split_by_name: bool = False                             # one of several lists is held out by its name
    assistant_text: str = "drop"                            # DataConfig.assistant_text: of one-turn clone requests

    @property
    def root(self) -> Path:
        return self.base or (self.path if self.path.is_dir() else self.path.parent)

    def reject(self, where: str, reason: str, fix: str) -> None:
        self.bad.append(RejectedRow(where, reason, fix))


def path_inside(m: Manifest, name: str) -> Path:
    """The path of a file that a manifest names; Unusable when it is outside the manifest's folder."""
    path, reason = m.root / name, ""
    if "\0" in name:
        reason = "malformed path"
    elif not m.allow_outside and ".." in Path(name).parts:
        reason = "path outside the folder"
    elif not m.allow_outside and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(m.root)):
        reason = "path outside the folder" + ("" if os.path.isabs(name) else " (symlink)")
    if reason:
        raise Unusable(reason, f"move {name} into {m.root}, {ALLOW}")
    return path


def audio_file(m: Manifest, part: Row) -> str:
    """The file of a row, "" for none: a path, a file: url, or a recording inside the row (base64, data: url)."""
    audio = part.get("audio")
    if isinstance(audio, dict):                         # of datasets
        audio = audio.get("path")
        if not isinstance(audio, str):
            raise Unusable("audio is an object", 'name the file: "audio": "clips/a.wav"')
    name = str(audio or "")
    if name.startswith("data:"):
        part |= {"audio": INLINE, "raw_audio": name}
    elif name.startswith("file:"):
        part["audio"] = re.sub("^file:(//localhost(?=/)|//)?", "", unquote(name))
    elif "://" in name:
        raise Unusable("a web address", f"download {name[:60]} and name the file")
    elif audio != part.get("audio"):
        part["audio"] = audio
    if part.get("audio") == INLINE:
        inline_bytes(part)
        return INLINE
    path = path_inside(m, str(part["audio"])) if name else None
    m.files |= {os.path.realpath(path)} if path else set()
    return str(path or "")


def accept(m: Manifest, where: str, row: Row) -> None:
    """Add a row with its defaults and its reference clip; Unusable before its audio is opened when a field is wrong."""
    beside = recordings_beside(row)
    for part in (row, *beside.values()):
        part |= CACHE_FIELDS | {"file": audio_file(m, part)}
    start = f"@{row['offset']}" if row.get("offset") else ""
    named = row.get("audio") and row["audio"] != INLINE
    name = os.path.splitext(str(row["audio"]))[0] + start if named else where         # rows that share a clip are numbered
    row["id"] = label(row.get("id")) or next(s for s in chain([name], (f"{name} ({n})" for n in count(2))) if s not in m.clips)
    row["speaker"] = label(row.get("speaker"))
    try:
        check_fields(m, row, list(beside.values()))
    except Unusable as error:
        m.reject(f"{where} {row['id']}", *error.args)
        return
    for suffix, part in beside.items():
        m.clips[row["id"] + suffix] = {"id": row["id"] + suffix, "speaker": row["speaker"]} | part
    m.clips[row["id"]] = row
    m.rows.append(row)


def label(value: Any) -> str:
    """A name as text: 0 is one; nothing, None and the NaN that tables write are none."""
    return "" if value is None or value != value else str(value)


def recordings_beside(row: Row) -> dict[str, Row]:
    """The other recordings of a row by the suffix of their id: its reference, and what else its messages hold."""
    if not all(isinstance(row.get(name) or "", str) for name in ("text_prompt", "voice_prompt")):
        raise Unusable("malformed field", "text_prompt is the text of a role, voice_prompt the file of a voice")
    if row.get("voice_prompt"):                 # of a dialogue: a voice needs no transcript
        row |= {"reference": {"audio": row["voice_prompt"], "text": ""}}
    reference, others = row.get("reference", {}), row.get("others", {})
    if not isinstance(reference, dict) or not isinstance(others, dict):
        raise Unusable("malformed field", 'a reference has "audio" and "text"')
    found = ({"#reference": reference} if reference else {}) | others
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in found.values()):
        raise Unusable("malformed field", 'a reference has "audio" and "text"')
    if "clips" not in row:
        row.pop("messages", None)               # written by another tool; this layout does not use them
    elif not isinstance(row["clips"], list) or not all(name in ("", *found) for name in row["clips"]):
        raise Unusable("malformed field", '"clips" names the recordings of "messages" by suffix')
    else:
        row |= unusable_on_error(start_of, row, unusable_on_error(checked, row.get("messages"), special_tokens()))
    return found


def unusable_on_error(read: Callable[..., Any], *given: Any) -> Any:
    """Call a function of text/conversation.py; its ValueError "reason; fix" becomes Unusable."""
    try:
        return read(*given)
    except ValueError as error:
        raise Unusable(*str(error).split("; ", 1)) from None


def inline_bytes(part: Row) -> bytes:
    """The sound file that a manifest holds as base64 in `raw_audio`; Unusable when it does not."""
    text, fix = part.get("raw_audio"), "give raw_audio as base64 of a sound file, or name the file in audio_url"
    if not isinstance(text, str) or not text or len(text) > MAX_INLINE:
        raise Unusable("inline audio", fix)
    try:
        found = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
        if not is_media(found):
            soundfile.info(io.BytesIO(found))
    except (binascii.Error, soundfile.LibsndfileError):
        raise Unusable("inline audio", f"it is no base64 of a sound file: {fix}") from None
    return found


@contextmanager
def open_audio(row: Row) -> Iterator[str]:
    """Yield a path to the audio of a row; what is inside the row or a table is written to a temporary file."""
    if row["file"] != INLINE and "cell" not in row:
        yield row["file"]
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(cell_bytes(Path(row["file"]), *row["cell"]) if "cell" in row else inline_bytes(row))
        file.flush()
        yield file.name


def check_fields(m: Manifest, row: Row, others: list[Row]) -> None:
    words = row.get("words", [])
    if isinstance(row.get("text"), (int, float)):
        raise Unusable("the text is a number", "write the transcript in quotes, in the words that are spoken")
    if not isinstance(row.get("text"), str) or not (row["text"].strip() or "alignments" in row or "clips" in row and any(
            clips(m["content"]) for m in row["messages"] if m["role"] == "user")):         # a recorded user turn is trained on its codes
        raise Unusable("empty text", "write the transcript, or remove the row")
    if "\ufffd" in row["text"]:
        raise Unusable("bad encoding", "the text contains U+FFFD: save it again as UTF-8 from its source")
    if row["id"] in m.clips:
        raise Unusable("duplicate id", "ids must be unique in a manifest: rename one")
    if "audio" in row and not row["file"]:
        raise Unusable("no audio", 'its "audio" is empty: name the recording, or remove the row')
    if any(not (isinstance(c := part["cell"], list) and [type(v) for v in c] == [int, str] and c[0] >= 0)
           for part in (row, *others) if "cell" in part):
        raise Unusable("malformed field", 'a cell is [row, column] of the table that "audio" names')
    if not all(is_time(part.get(k, 0)) for k in ("offset", "duration") for part in (row, *others)):
        raise Unusable("malformed field", "offset and duration are seconds")
    if any(not part["text"].strip() for part in others) and not {"clips", "voice_prompt"} & row.keys():
        raise Unusable("reference without transcript", 'write what it says: "reference": {"audio": ..., "text": ...}')
    if not isinstance(words, list) or not all(
            isinstance(w, list) and len(w) == 2 and isinstance(w[0], str) and is_time(w[1]) for w in words):
        raise Unusable("malformed field", 'words look like [["four", 0.08], ...]')


def hash_fraction(*words: object) -> float:
    """Hash words to a number in [0, 1): the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, words)).encode()).digest()[:7], "big") / (1 << 56)


def compose(rule: Row, clips: dict[str, Row]) -> list[Row]:
    """Write `rows` rows of random clips of a group, or of the clips that `ids` lists, one speaker each. The split follows
    from the text, so no string is on both sides; rows of one clip always train. Same rule, same clips: same rows."""
    group, (low, high), count, seed = rule["group"], rule["count"], int(rule["rows"]), rule.get("seed", 0)
    if not 0 < low <= high <= MAX_PARTS or not 0 <= count <= MAX_ROWS:
        raise ValueError(f"count is {rule['count']}, expected [low, high] in 1..{MAX_PARTS}; rows is {count}, expected 0..{MAX_ROWS}")
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
        held = len(parts) > 1 and hash_fraction(text) < rule.get("held_out", 0.0)
        rows.append({"id": f"{group}+{seed}/{i}", "parts": parts, "text": text, "group": group, "composed": True,
                     "split": "held-out" if held else "train"})
    return rows
