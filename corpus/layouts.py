"""The layouts of speech data sets: each is recognised, read and converted to rows of a manifest.

    stereo dialogues    {"path", "duration"} and a .json of alignments beside the wav (Moshi, J-Moshi, DailyTalkContiguous)
    conversations       {"messages": [...]}, a json list or jsonl (Higgs ChatML, ms-swift, TRL, ShareGPT)
    cloning samples     {"samples": [{"audio_file", "ref_audio_file", ...}]} (train-higgs-audio)
    tagged transcripts  {"file_path", "full_transcript"} with [S1], [S2] (MOSS-TTSD)
    metadata            LJSpeech, lists of `path|text` (VITS, XTTS, Piper), a csv, tsv or jsonl with a header (Common Voice, NeMo)
    parquet, Arrow      any of these as rows of tables, recordings inside (the Hub, `datasets` folders)
    Kaldi               wav.scp, text, and segments and utt2spk where they exist
    wav + txt, wav + json    folders of pairs; trees of LibriSpeech and LibriTTS

LAYOUTS maps the name of a layout to its reader and its converter. One file because a layout is a reader of ten lines and a line
of that table, and `detect` must know all of them. Next: checks.py.
"""

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from audio.wav import SOUNDS
from corpus.manifest import CACHE_FIELDS, TRANSCRIBED, Manifest, Row, Unusable, accept, compose, label, path_inside, unusable_on_error
from families.family import special_tokens
from options import locate, parse_row
from system.tables import TABLE_FILES, rows
from text.chat_formats import different, reply_pair, sample_row, unread_fields
from text.word_times import MAIN, Alignment, as_json, is_time, parse_alignments, tidy_words

MAX_MANIFEST = 1 << 30      # bytes; a larger file is refused
FIELDS = {"id", "audio", "text", "speaker", "group", "words", "language", "synthetic", "split", "offset", "duration", "reference", "stereo",
          "alignments", "text_conditions", "text_prompt", "voice_prompt", "parts", "compose", "manifest", "scene", "clips", "others",
          "messages", "start_index",
          "rejected", "raw_audio", "heard", "cell"}
COLUMNS = {"audio": ("file_name", "audio", "path", "wav", "filename", "audio_filepath", "audio_file", "audio_path", "wav_filename"),
           "text": ("text", "transcription", "sentence", "transcript", "normalized_text"),
           "speaker": ("speaker", "speaker_id", "source", "client_id", "speaker_name")}
TABLES = (".csv", ".tsv", ".txt", ".list", ".lst")
HELD_OUT = re.compile(r"(^|[^a-z])(valid|validation|val|dev|test|eval)([^a-z]|$)", re.I)      # in the name of a list


def read_manifest(path: str | Path, allow_outside: bool = False, assistant_text: str = "drop", agent: str = "",
                  nested: bool = False) -> Manifest:
    """Recognise a source and read its rows; rows that cannot be read are in `.bad`.

    Raises FileNotFoundError without the source, ValueError when its layout is unknown.
    """
    kind, *paths = detect(source := locate(path))
    m = Manifest(paths[0], kind, allow_outside, assistant_text=assistant_text, agent=agent, base=source if source.is_dir() else None)
    virtual: list[tuple[str, Row]] = []
    read, convert = LAYOUTS[kind]
    for where, row in read(m) if len(paths) == 1 else several(m, paths, read):
        try:
            check_unicode(row)
            pair = row.get("rejected") is not None or row.get("rejected_response") is not None
            row = preference_row(m, row, convert) if pair else convert(m, row)
            if "rejected" in row:
                accept_pair(m, where, row)
            elif {"parts", "compose", "manifest"} & row.keys():
                virtual.append((where, row))
            else:
                accept(m, where, row)
        except Unusable as error:
            m.reject(where, *error.args)
    for where, row in [] if nested else virtual:        # of a manifest named by another one only the clips are used
        try:
            add_virtual(m, where, row)
        except Unusable as error:
            m.reject(where, *error.args)
    if m.unread:
        named = ", ".join(f"{name} ({n} rows)" for name, n in m.unread.most_common(8))
        m.notes.append(f"fields that are not read: {named}{', ...' if len(m.unread) > 8 else ''}")
    if Path(source).is_dir() and not nested:
        note_unlisted(m)
    return m


def check_unicode(row: Row) -> None:
    """Unusable for half a surrogate pair, which no file can hold, anywhere in a row."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Unusable("bad encoding", "it has half a surrogate pair: save it again as UTF-8 from its source") from None


def note_unlisted(m: Manifest) -> None:
    """Note the recordings of a folder that no row names."""
    told = {bad.where for bad in m.bad}                 # by their names, where a folder is the list
    files = {p.relative_to(m.root).as_posix(): os.path.realpath(p) for p in sounds_below(m.root)}
    if found := [name for name, file in files.items() if file not in m.files and name not in told]:
        m.notes.append(f"{len(found)} recordings are in no row: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}")


def several(m: Manifest, paths: list[Path], read: Callable[[Manifest], Iterator[tuple[str, Row]]]) -> Iterator[tuple[str, Row]]:
    """Read all lists of a folder; the rows of one named valid, dev, test ... are held out unless they say otherwise."""
    names = {path: path.relative_to(m.root).as_posix() for path in paths}
    m.notes.append(f"{len(paths)} lists are read: {', '.join(names.values())}")
    for path, name in names.items():
        part = replace(m, path=path, bad=[])
        for where, row in read(part):
            if HELD_OUT.search(name.rpartition(".")[0]):
                row.setdefault("split", "held-out")
                m.split_by_name = True
            yield f"{name} {where}", row
        m.bad += [replace(bad, where=f"{name} {bad.where}") for bad in part.bad]
    m.path = m.root


def detect(path: Path) -> tuple[Any, ...]:
    """Name the layout of a file or folder, and the file or files that list its rows."""
    if path.is_dir():
        if (path / "wav.scp").is_file():
            return "Kaldi", path
        lists = lists_of(path)
        if not lists:
            paired = any(p.with_suffix(".json").is_file() for p in sounds_below(path))
            return ("wav + json" if paired else "wav + txt"), path
        kinds = {p: layout_of(p) for p in lists}
        if len(set(kinds.values())) > 1:
            named = ", ".join(f"{p.name} ({kind})" for p, kind in kinds.items())
            raise ValueError(f"{path} has several lists of different layouts: {named}; name the one to read")
        return kinds[lists[0]], *lists
    return layout_of(path), path


def lists_of(folder: Path) -> list[Path]:
    """The lists of a folder: the one of a known name, else all jsonl files, else all tables; never what `check` and `transcribe` wrote."""
    named = [folder / n for n in ("manifest.jsonl", "metadata.csv", "metadata.jsonl", "metadata.tsv", "metadata.json")]
    if found := [p for p in named if p.is_file()][:1]:
        return found
    for endings in ((".jsonl",), (".tsv", ".csv")):
        found = sorted(p for p in folder.iterdir() if p.suffix in endings and p.is_file()
                       and not p.name.endswith((".kept.jsonl", ".rejected.jsonl", TRANSCRIBED)) and ".clips" not in p.name)
        if {p.name for p in found} & {"validated.tsv", "train.tsv"}:                    # Common Voice: the others are parts or rejects
            parts = [p for p in found if p.name in ("train.tsv", "dev.tsv", "test.tsv")]
            return parts or [p for p in found if p.name == "validated.tsv"]
        if found:
            return found
    return sorted(p for p in folder.rglob("*") if p.suffix in TABLE_FILES and not p.name.startswith(("cache-", ".")))


def layout_of(path: Path) -> str:
    """Name the layout of a list by its first row."""
    if not path.is_file():
        raise FileNotFoundError(f"data source {path} does not exist; check the path")
    if path.suffix in TABLES:
        return "metadata"
    probe = Manifest(path)
    first = next((row for _, row in json_rows(probe)), {})
    keys = (first | first["chosen"] if isinstance(first.get("chosen"), dict) else first).keys()
    spoken = "metadata" if keys & set(COLUMNS["text"]) else "stereo dialogues"          # of {"path", ...}
    for kind, marks in (("manifest", ("audio", "parts", "compose", "manifest")), ("conversations", ("messages", "prompt", "conversations")),
                        ("cloning samples", ("samples", "audio_file")), ("tagged transcripts", ("full_transcript",)),
                        (spoken, ("path",)), ("metadata", ("file_name", "audio_filepath")), ("manifest", ("text",)),
                        ("conversations", ("chosen",))):
        if keys & set(marks):
            return kind
    why = "; ".join(f"{b.where}: {b.reason}, {b.fix}" for b in probe.bad[:1])
    raise ValueError(f"{path} has no known layout (first row: {', '.join(keys) or why or 'none'}); see `python data.py --help`")


def text_lines(m: Manifest, path: Path | None = None, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a UTF-8 or UTF-16 file, blank ones on request; undecodable ones are rejected."""
    path = path or m.path
    if path.stat().st_size > MAX_MANIFEST:
        raise ValueError(f"{path} has more than {MAX_MANIFEST} bytes; split it into several manifests")
    with path.open("rb") as file:
        wide = utf16(file.read(4096))
        file.seek(0)
        lines = (line.encode() for line in file.read().decode(wide, errors="replace").split("\n")) if wide else file
        for number, raw in enumerate(lines, 1):
            text = raw.decode("utf-8-sig", errors="replace").rstrip("\r\n")     # U+FFFD marks what is not UTF-8
            if "\ufffd" in text:
                m.reject(f"{path.name} line {number}", "bad encoding", "save the file as UTF-8")
            elif blank or text.strip():
                yield number, text


def utf16(head: bytes) -> str:
    """The UTF-16 encoding of a text that begins so, "" for none: its mark, or the zero bytes of its spaces and line ends."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    low, high = head[1::2].count(0), head[::2].count(0)
    return "" if not low + high else "utf-16-le" if low > high else "utf-16-be"


def json_rows(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a json list or of JSON lines, each with its place ("line 3", "item 2"); the content says which it is."""
    if m.path.suffix in TABLE_FILES:
        yield from packed_rows(m)
        return
    first = next((text.strip() for _, text in text_lines(Manifest(m.path))), "")
    if first.startswith("[") or (is_json(first) is False and (m.path.suffix == ".json" or first in ("{", "[")) and first):
        yield from json_list(m)
        return
    for number, text in text_lines(m):
        try:
            row = parse_row(text.rstrip().removesuffix(",") if text.rstrip().endswith("},") else text)
        except ValueError as error:
            said = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
            m.reject(f"line {number}", "malformed json", f"fix this line: {said}")
            continue
        yield f"line {number}", row


def packed_rows(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a parquet or Arrow file; a recording inside it is named by its row and column."""
    table = m.path.relative_to(m.root).as_posix()
    for number, row in rows(m.path):
        packed = next((name for name, value in row.items() if isinstance(value, dict) and "cell" in value), "")
        if packed:
            about = row.pop(packed)
            row = {"id": f"{table}/{number}"} | row | {"audio": table, "cell": about["cell"]}
        yield f"row {number}", row


def is_json(text: str) -> bool:
    try:
        json.loads(text.removesuffix(","))
    except (ValueError, RecursionError):
        return False
    return True


def json_list(m: Manifest) -> Iterator[tuple[str, Row]]:
    try:
        found = json.loads("\n".join(line for _, line in text_lines(m, blank=True)))
    except (ValueError, RecursionError) as error:
        place = f"line {getattr(error, 'lineno', 1)}"
        m.reject(place, "malformed json", f"fix the file, column {getattr(error, 'colno', 1)}: {getattr(error, 'msg', error)}")
        return
    for i, row in enumerate(found if isinstance(found, list) else [found]):
        if isinstance(row, dict):
            yield f"item {i}", row
        else:
            m.reject(f"item {i}", "malformed json", "each item must be an object {...}")


def metadata_rows(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Read a table: `path|text` lists without a header, or a csv / tsv / jsonl with one (datasets' AudioFolder, Common Voice, NeMo)."""
    if m.path.suffix not in TABLES:
        yield from ((where, rename_columns(row, m)) for where, row in json_rows(m))
        return
    lines = list(text_lines(m, blank=True))
    while lines and not lines[0][1].strip():
        lines.pop(0)
    first = lines[0][1] if lines else ""
    mark = next((c for c in "|\t" if c in first), max(",;", key=first.count))
    header = [name.strip().strip('"').lower() for name in first.split(mark)]
    headed = any(name in header for name in COLUMNS["audio"])
    sound = Path(first.split(mark)[0].strip().strip('"')).suffix.lower() in SOUNDS
    if not headed and mark != "|" and not sound:
        raise ValueError(f"{m.path} has no column of audio (found: {', '.join(header)}); name one {' or '.join(COLUMNS['audio'])}")
    table = list(table_rows(m, lines[headed:], mark))
    if not headed:
        yield from rows_without_header(m, table)
        return
    for where, cells in table:
        if len(cells) > len(header):
            m.reject(where, "cells do not fit the header",
                     f"{len(cells)} cells, the header has {len(header)}: put a text that contains {mark!r} in quotes")
        else:
            yield where, rename_columns(dict(zip(header, cells, strict=False)), m)


def table_rows(m: Manifest, lines: list[tuple[int, str]], mark: str) -> Iterator[tuple[str, list[str]]]:
    """The cells of each row and its place. In a csv a quoted cell may have several lines; in the others a quote is a character,
    unless it is around a whole cell of a tsv."""
    if mark in "|\t":
        for number, text in lines:
            if text.strip():
                yield f"row {number}", [unquoted(cell) if mark == "\t" else cell for cell in text.split(mark)]
        return
    n = 0
    while n < len(lines):
        last = n                                        # a row ends where its quotes are closed
        while last < len(lines) and sum(text.count('"') for _, text in lines[n : last + 1]) % 2:
            last += 1
        if last == len(lines):
            m.reject(f"row {lines[n][0]}", "malformed row", 'a quotation mark is not closed: write "" for one inside a quoted cell')
            last = n
        elif any(text.strip() for _, text in lines[n : last + 1]):
            try:
                found = list(csv.reader([f"{text}\n" for _, text in lines[n : last + 1]], delimiter=mark))
            except csv.Error as error:
                m.reject(f"row {lines[n][0]}", "malformed row", f"{error}: save the table again as csv in UTF-8")
                found = []
            yield from ((f"row {lines[n][0]}", cells) for cells in found)
        n = last + 1


def unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    whole = len(cell) > 1 and cell.startswith('"') and cell.endswith('"') and '"' not in inner
    return cell[1:-1].replace('""', '"') if whole else cell


def rows_without_header(m: Manifest, table: list[tuple[str, list[str]]]) -> Iterator[tuple[str, Row]]:
    """LJSpeech `id|text|normalised text`, Piper and VITS `path|speaker|text`, and `path|speaker|language|text`."""
    width = max((len(cells) for _, cells in table), default=0)
    second = [cells[1].strip() for _, cells in table if len(cells) > 2]
    names = second and all(name and not re.search(r"\s", name) for name in second) and all(cells[-1].strip() for _, cells in table)
    named = names and (all(name.isdecimal() for name in second) or len(set(second)) <= len(second) / 2)
    form = {3: ("audio", "speaker", "text") if named else (), 4: ("audio", "speaker", "language", "text") if names else ()}.get(width, ())
    m.notes.append("no header: read as " + ("|".join(form) if form else "LJSpeech id|text|normalised text"))
    for where, cells in table:
        if form and len(cells) != width or not form and len(cells) > 3:
            m.reject(where, "cells do not fit", f"{len(cells)} cells, expected {width if form else 'at most 3'}")
            continue
        name = cells[0].strip()
        suffixes = [""] if Path(name).suffix.lower() in SOUNDS else SOUNDS
        places = [f"{folder}{name}{suffix}" for suffix in suffixes for folder in ("wavs/", "wav/", "")]
        places = places[::-1] if suffixes == [""] else places
        row = {"audio": next((p for p in places if "\0" not in p and (m.root / p).is_file()), places[0])}
        row |= {"id": name} if suffixes != [""] else {}
        text = next(filter(str.strip, reversed(cells[1:])), "")
        yield where, row | (dict(zip(form[1:], cells[1:], strict=False)) if form else {"text": text})


def rename_columns(row: Row, m: Manifest) -> Row:
    """Rename the columns of a table to ours (audio, text, speaker) and note the mapping once."""
    found = {ours: next((n for n in names if n in row), "") for ours, names in COLUMNS.items()}
    note = "columns: " + ", ".join(f"{theirs} -> {ours}" for ours, theirs in found.items() if theirs)
    if note not in m.notes:
        m.notes.append(note)
    new = {ours: row[theirs] for ours, theirs in found.items() if theirs}
    name = str(new.get("audio") or "")
    if name and "\0" not in name and not (m.root / name).is_file() and (m.root / "clips" / name).is_file():
        new["audio"] = f"clips/{name}"                        # Common Voice
    if label(row.get("offset")) and label(row.get("duration")):      # NeMo: a piece of a longer recording
        new |= {key: seconds(row[key]) for key in ("offset", "duration")}
    kept = {k: row[k] for k in ("id", "language", "split") if label(row.get(k))} | new
    m.unread.update(name for name in row if name not in (*kept, *found.values()) and label(row[name]))
    return kept


def seconds(value: Any) -> Any:
    """A number that a table has as text; what is none is left as it is and refused later."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?", value) else value


def wav_text_pairs(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Read a folder of sound files that each have a .txt of the same name; a folder inside it is a speaker, and itself is one.

    LibriSpeech has its transcripts in X.trans.txt, LibriTTS in NAME.normalized.txt; their files begin with the speaker.
    """
    books = {name: text for path in sorted(m.path.rglob("*.trans.txt")) for _, line in text_lines(m, path)
             for name, _, text in [line.partition(" ")]}
    paths = sounds_below(m.path)
    for path in paths:
        name, before = path.relative_to(m.path), len(m.bad)
        transcript = next((p for p in (path.with_suffix(".txt"), path.with_suffix(".normalized.txt")) if p.is_file()), None)
        if transcript is None and path.stem not in books:
            m.reject(str(name), "no transcript", f"write it into {path.stem}.txt, or run data.py transcribe (dialogues: annotate)")
            continue
        text = books[path.stem] if transcript is None else "\n".join(line for _, line in text_lines(m, transcript))
        if len(m.bad) == before:
            speaker = m.path.resolve().name if name.parent == Path(".") else name.parts[0]
            if transcript is None or transcript.name.endswith(".normalized.txt"):
                speaker = re.split("[-_]", path.stem)[0]
            yield str(name), {"id": name.with_suffix("").as_posix(), "audio": name.as_posix(), "text": text, "speaker": speaker}
    known = {path.with_suffix("") for path in paths}
    for path in sorted(m.path.rglob("*.txt")) if paths else ():
        own = path.name.partition(".")[0] if path.name.endswith((".normalized.txt", ".original.txt")) else path.stem
        if path.with_name(own) not in known and not path.name.endswith(".trans.txt") and path.stem.lower() not in PAPERS:
            m.reject(str(path.relative_to(m.path)), "no recording", f"there is no sound file {own}.wav: add it, or remove the transcript")


PAPERS = ("readme", "license", "licence", "notice", "about", "speakers", "chapters", "books", "copying")


def kaldi_rows(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Read a Kaldi folder: an utterance is a recording of wav.scp, or a piece of one that `segments` names."""
    def table(name: str) -> dict[str, str]:
        path = m.path / name
        lines = text_lines(m, path) if path.is_file() else ()
        return {key: value.strip() for _, line in lines for key, _, value in [line.replace("\t", " ").strip().partition(" ")]}

    sounds, texts, speakers, segments = (table(name) for name in ("wav.scp", "text", "utt2spk", "segments"))
    for name in (segments or sounds):
        recording, *times = segments[name].split() if segments else [name]
        audio = sounds.get(recording, "")
        if audio.endswith("|"):
            m.reject(name, "a command, not a file", "wav.scp names a command: run it, and name the file that it writes")
        elif name not in texts:
            m.reject(name, "no transcript", "add a line for it to text")
        elif not audio or (segments and (len(times) != 2 or not all(isinstance(seconds(t), float) for t in times))):
            m.reject(name, "no recording", "segments needs `utterance recording start end`, wav.scp a line for the recording")
        else:
            row = {"id": name, "audio": audio, "text": texts[name], "speaker": speakers.get(name, "")}
            begin, end = map(float, times) if times else (0.0, 0.0)
            yield name, row | ({"offset": begin, "duration": end - begin} if times else {})
    for name in texts.keys() - (segments or sounds).keys():
        m.reject(name, "no recording", "add its recording to wav.scp, or remove its line in text")


def chat_row(m: Manifest, sample: Row) -> Row:
    """Conversations: the last assistant turn is the row, an earlier turn with audio its reference (`sample_row`)."""
    m.unread.update(set(unread_fields(sample)))
    return unusable_on_error(sample_row, sample, m.assistant_text, special_tokens())


def stereo_row(m: Manifest, item: Row) -> Row:
    """Moshi's {"path", "duration"}: words and their times come from the .json beside the stereo file."""
    name = str(item.get("path") or "(no path)")
    side = path_inside(m, name).with_suffix(".json")
    if not side.is_file():
        form = '{"alignments": [[word, [start, end], speaker]]}'
        raise Unusable("no alignment file", f"put {side.name} {form} beside {name}, or run data.py annotate")
    text = "\n".join(line for _, line in text_lines(m, side))
    fix = f"fix {side.name}: "
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable("malformed alignments", f"{fix}{error}") from None
    found, conditions = dialogue_words(m, given, fix), given.get("text_conditions") if isinstance(given, dict) else None
    if not (conditions is None or isinstance(conditions, dict) and all(v is None or isinstance(v, str) for v in conditions.values())):
        raise Unusable("malformed alignments", f"{fix}text_conditions is {str(conditions)[:60]}, expected an object whose values are texts")
    kept = {key: item[key] for key in ("id", "speaker", "split", "group", "language", "text_prompt", "voice_prompt") if key in item}
    kept |= {"text_conditions": conditions} if conditions else {}
    m.unread.update(item.keys() - kept.keys() - {"path", "duration", "offset"})
    if is_time(begin := item.get("offset") or 0) and begin:             # a piece: without an offset the duration is the file's
        end = begin + item["duration"] if is_time(item.get("duration", "")) else math.inf
        found = [(word, start - begin, min(stop, end) - begin, who) for word, start, stop, who in found if begin <= start < end]
        kept |= {key: item[key] for key in ("offset", "duration") if key in item}
    words = [[word, start] for word, start, _, who in tidy_words(found)[0] if who == MAIN]
    said = " ".join(word for word, _ in words)
    return kept | {"audio": name, "stereo": True, "text": said, "words": words, "alignments": as_json(found)}


def dialogue_words(m: Manifest, given: Any, fix: str = "") -> list[Alignment]:
    """The words of a dialogue; Unusable where they are malformed, or none is the agent's, who would learn to be silent."""
    try:
        found = parse_alignments(given, m.agent)
    except ValueError as error:
        raise Unusable("malformed alignments", f"{fix}{error}") from None
    if found and all(who != MAIN for *_, who in found):
        items = given.get("alignments") if isinstance(given, dict) else given
        labels = sorted({str(item["speaker"] if isinstance(item, dict) else item[2]) for item in items}, key=lambda who: (who != MAIN, who))
        raise Unusable("no words of the agent", f"its speakers are {', '.join(labels[:4])}: name the agent, --data.agent={labels[0]} "
                       + "(data.py check: --agent)")
    return found


def stereo_pairs(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Read a folder of sound files that each have a .json of alignments (DailyTalkContiguous without its list)."""
    paths = sounds_below(m.path)
    for path in paths:
        yield (name := path.relative_to(m.path).as_posix()), {"path": name}
    known = {path.with_suffix("") for path in paths}
    for path in sorted(m.path.rglob("*.json")):
        if path.with_suffix("") not in known:
            m.reject(str(path.relative_to(m.path)), "no recording", f"there is no sound file {path.stem}.wav: add it, or remove the list")


def sounds_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS)


def clone_samples(m: Manifest) -> Iterator[tuple[str, Row]]:
    """Read the list in train-higgs-audio's metadata.json, or lines of such samples."""
    for where, row in json_rows(m):
        items = row.get("samples", [row])
        for i, item in enumerate(items if isinstance(items, list) else [items]):
            name = f"sample {i}" if "samples" in row else where
            if isinstance(item, dict):
                yield name, item
            else:
                m.reject(name, "malformed json", "each sample must be an object {...}")


CLONE_FIELDS = ("audio_file", "transcript", "transcript_file", "speaker_id", "speaker_name", "speaker", "id", "audio_id", "language",
                "scene", "split", "offset", "duration", "ref_audio_file", "ref_transcript", "ref_transcript_file")


def clone_sample(m: Manifest, item: Row) -> Row:
    """train-higgs-audio: the transcripts of the recording and its reference are files, or fields of the sample."""
    row = {"audio": str(item.get("audio_file") or ""), "text": transcript_of(m, item, "transcript"),
           "speaker": label(item.get("speaker_id")) or label(item.get("speaker_name")) or label(item.get("speaker"))}
    name = label(item.get("id")) or label(item.get("audio_id"))
    row |= {key: item[key] for key in ("language", "scene", "split") if item.get(key)} | ({"id": name} if name else {})
    if label(item.get("offset")) and label(item.get("duration")):       # without an offset it is the length of the file
        row |= {key: seconds(item[key]) for key in ("offset", "duration")}
    m.unread.update(name for name in item if name not in CLONE_FIELDS)
    if item.get("ref_audio_file"):
        row["reference"] = {"audio": str(item["ref_audio_file"]), "text": transcript_of(m, item, "ref_transcript")}
    return row


def transcript_of(m: Manifest, item: Row, key: str) -> str:
    """The transcript: item[key], or the content of the file that item[key + "_file"] names; "" without either."""
    if isinstance(item.get(key), str) or not item.get(f"{key}_file"):
        return str(item.get(key) or "")
    path = path_inside(m, str(item[f"{key}_file"]))
    if not path.is_file():
        raise Unusable("no transcript", f"{path} does not exist: write the transcript into it")
    return "\n".join(line for _, line in text_lines(m, path))


def tagged_transcript_row(m: Manifest, item: Row) -> Row:
    """MOSS-TTSD: speakers are numbered from 1 and marked [S1], ours from 0 and [SPEAKER0]."""
    text = re.sub(r"\[S(\d+)\]", lambda mark: f"[SPEAKER{int(mark[1]) - 1}] ", str(item.get("full_transcript") or ""))
    return {k: v for k, v in item.items() if k not in ("file_path", "full_transcript")} | {"audio": item.get("file_path"), "text": text}


def manifest_row(m: Manifest, row: Row) -> Row:
    """A row of ours, or one that names its reference as MOSS-TTSD does."""
    if "reference_audio" in row and "reference" not in row:
        row["reference"] = {"audio": row.pop("reference_audio"), "text": row.pop("reference_text", "")}
    if speaker := next((name for name in COLUMNS["speaker"] if name in row), "") if "speaker" not in row else "":
        row["speaker"] = row.pop(speaker)
    theirs = next((name for name in COLUMNS["text"] if name in row), "text")
    if "alignments" in row:
        row["alignments"] = as_json(dialogue_words(m, row["alignments"]))
    if "text" not in row and "audio" in row and theirs != "text" and not {"clips", "alignments", "parts"} & row.keys():
        row["text"] = row.pop(theirs)
    m.unread.update(row.keys() - FIELDS)
    return row


def unchanged(m: Manifest, row: Row) -> Row:
    return row


LAYOUTS = {"manifest": (json_rows, manifest_row), "metadata": (metadata_rows, unchanged),
           "Kaldi": (kaldi_rows, unchanged), "wav + txt": (wav_text_pairs, unchanged),
           "conversations": (json_rows, chat_row), "stereo dialogues": (json_rows, stereo_row),
           "cloning samples": (clone_samples, clone_sample), "tagged transcripts": (json_rows, tagged_transcript_row),
           "wav + json": (stereo_pairs, stereo_row)}                                           # name: (reader, converter)


def preference_row(m: Manifest, row: Row, convert: Callable[[Manifest, Row], Row]) -> Row:
    """Convert a preference row: the row of its chosen side, with the row of the other side under "rejected"."""
    replies = "rejected_response" in row or ("chosen" in row and ({"messages", "prompt"} & row.keys() or isinstance(row["chosen"], list)))
    pair = unusable_on_error(reply_pair, row) if replies else None
    if pair is not None:
        before, *sides = unusable_on_error(different, pair)
        shared = {k: v for k, v in row.items() if k not in ("chosen", "rejected", "rejected_response", "prompt")}
        better, worse = rows = [convert(m, shared | {"messages": [*before, *side]}) for side in sides]
        for side, own in zip(rows, sides, strict=True):                 # the messages before the replies are shared
            side.setdefault("start_index", len(side["messages"]) - len(own))
    elif isinstance(row["rejected"], dict) and isinstance(row.get("chosen", {}), dict) and "parts" not in row:
        shared = {k: v for k, v in row.items() if k not in ("chosen", "rejected", "prompt")}
        if row.get("chosen") == row["rejected"]:
            raise Unusable("identical pair", "the chosen and the rejected side are the same: correct or remove the row")
        better = convert(m, shared | row.get("chosen", {}))
        worse = convert(m, (shared if "chosen" in row else {}) | row["rejected"])
    else:
        raise Unusable("malformed pair", 'give "messages" and a "chosen" and "rejected" reply, or two objects that each name their audio')
    return better | {"rejected": worse}


def accept_pair(m: Manifest, where: str, row: Row) -> None:
    """Add a preference row. The clips of its rejected side are kept, as those of a reference; it is not a row of its own."""
    row["id"] = label(row.get("id")) or where
    row["rejected"]["id"] = f"{row['id']}#rejected"
    accept(m, where, row["rejected"])
    if m.rows and m.rows[-1] is row["rejected"]:
        m.rows.pop()
        accept(m, where, row)


def add_virtual(m: Manifest, where: str, row: Row) -> None:
    """Resolve a "manifest" reference, then a "parts" row or a "compose" rule."""
    clips = m.clips
    if name := str(row.get("manifest") or ""):
        if name not in m.named:
            other = read_manifest(path_inside(m, name), m.allow_outside, nested=True)
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
        name = label(new.get("id")) or where
        missing = [p for p in new["parts"] if p not in clips or not clips[p]["file"]]
        if missing or not new["parts"] or name in m.clips:
            m.reject(f"{where} {name}", "missing part or duplicate id", f"unknown parts: {missing[:3]}")
            continue
        m.clips |= {p: clips[p] for p in new["parts"] if p not in m.clips}
        text = str(new.get("text") or " ".join(clips[p]["text"] for p in new["parts"]))
        m.clips[name] = new | CACHE_FIELDS | {"id": name, "text": text, "speaker": clips[new["parts"][0]]["speaker"]}
        m.rows.append(m.clips[name])
