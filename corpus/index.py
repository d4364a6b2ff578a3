"""The index of a data set: manifest rows -> entries with text ids and the location of their codes.

`prepare` writes it, `open_cache` opens it; how it lies on disk is in cache.py. Where no file has changed since the last time,
`prepare` reads none (system/unchanged.py). Another split, tokenizer or normaliser is another index over the same codes. A run that
reads an index keeps it: other rows make another <content>, no file is ever changed. A job array encodes a large corpus in
shards: each leaves CACHE/<hash>/shard-3-of-8.json when it ends, and `prepare` behind them joins what they encoded. Next: examples.py.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audio import codec_path, load_codec
from corpus.cache import CACHE_VERSION, Entry, Index, current, encode_sources, hash_of, open_entries, variant_parameters, word_shift
from corpus.checks import advice, verdict_lines, warning_lines, with_fitting_split
from corpus.data_config import PROMPT_FIELDS, DataConfig, source_weight
from corpus.manifest import Manifest, Row, hash_fraction, label
from families.family import family_of, lay_out
from layers.conditioning import chosen, condition_ids
from options import load_config, locate, parse_shard, read_object, split_arguments, to_json, visible, write_json
from streams import Example, StreamTable
from system.files import lock, unlock
from system.unchanged import fingerprint
from text.conversation import Chat, clips, text_of, with_transcripts
from text.normalisers import normalise
from text.tokenizers import Tokenizer, load_tokenizer, tokenizer_file
from text.word_times import MAIN, OTHER, aligned_ids, check_length, frame_starts, interleave, row_words, tokenise

BESIDE = ("chat_template.jinja", "tokenizer_config.json")      # what is read beside a tokenizer
REPOSITORY = Path(__file__).resolve().parents[1]


def prepare(config: DataConfig, table: StreamTable, wait: Callable[[str], Any] | None = print) -> Index:
    """Encode whatever is not cached yet and write the index; running it again encodes nothing.

    Rows that cannot be used are named and left out; ValueError when none is left. One process at a time writes into a cache:
    with `wait`, which is told so, another one waits, without it that is a ValueError.
    """
    lock(config.cache, wait)
    try:
        with torch.random.fork_rng(devices=[]):         # to load a codec draws numbers, and need not be done each time
            return unchanged(config, table) or write_index(config, table)
    finally:
        unlock(config.cache)


def inputs(config: DataConfig, table: StreamTable) -> str:
    """A fingerprint of all that `prepare` reads, or may read, except what lies outside the folders of the sources; "" where unknown."""
    sources = [locate(source_weight(s)[0]) for s in config.sources]
    paths = [path if path.is_dir() else path.parent for path in sources] + [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*/*.py")]
    try:
        if config.tokenizer != "bytes":
            file = tokenizer_file(config.tokenizer, local=True)
            paths += [file, *(file.parent / name for name in BESIDE)]
        if table.codes:
            paths.append(codec_path(config.codec))
    except FileNotFoundError:                           # not fetched yet
        return ""
    paths += [Path(config.augment.noise_dir)] if config.augment and config.augment.noise_dir else []
    about = [to_json(replace(config, cache="", workers=0, prefetch=0)), to_json(table), CACHE_VERSION]
    return fingerprint(paths, json.dumps(about), skip=Path(config.cache))


def unchanged(config: DataConfig, table: StreamTable) -> Index | None:
    """The index of the last time, when no file that it was made of has changed since; what was printed then is printed again."""
    try:
        now = current(folder := index_folder(config, table))
        if not now or not now["inputs"] or now["inputs"] != inputs(config, table) or any(folder.glob("shard-*-of-*.json")):
            return None
        if now["outside"] and now["beyond"] != fingerprint(map(Path, now["outside"])):
            return None
        index = open_cache(config, table)
    except (FileNotFoundError, ValueError, KeyError):   # whatever it is, making it again finds out
        return None
    print_report(now["remarks"], index.verdict, now["count"], index.folder, 0, now["bad"])
    return index


def print_report(remarks: list[str], verdict: list[str], count: int, folder: Path, encoded: int, bad: int) -> None:
    print(*(f"{line}\n" for line in remarks), sep="", end="", file=sys.stderr)
    did = f"{encoded} clips encoded" if encoded else "everything was cached, nothing encoded"
    print(*verdict, f"prepared {count} examples in {folder}: {did}, {bad} rows left out", sep="\n")


def outside(manifests: list[Manifest]) -> list[str]:
    """The folders of recordings and lists that do not lie below the folder of their source."""
    found = set()
    for m in manifests:
        root = os.path.realpath(m.root)
        clips = {os.path.realpath(clip["file"]) for clip in m.clips.values() if clip["file"]}
        files = clips | m.files | {os.path.realpath(m.root / name) for name in m.named}
        found |= {os.path.dirname(file) for file in files if not file.startswith(root + os.sep)}
    return sorted(found)


def prepare_shard(config: DataConfig, table: StreamTable, shard: tuple[int, int]) -> None:
    """Encode the clips of one job of an array, (its number from 0, how many): jobs run at once, each again after a kill.

    No job writes an index. `prepare` behind the last one does, and encodes what a job has left.
    """
    _, codec, duplex = fitting_parts(config, table)
    if codec is None:
        raise ValueError("--shard: this model has no audio rows, nothing is encoded; run python data.py prepare without it")
    (number, count), (manifests, encoded) = shard, encode_sources(config, codec, duplex, shard, table.timing.around)
    clips = sum(bool(clip["shard"]) for m in manifests for clip in m.clips.values())
    write_json(index_folder(config, table) / f"shard-{number}-of-{count}.json", {"clips": clips, "encoded": encoded})
    print(f"shard {number}/{count}: {encoded} clips encoded, {clips} are in the cache; behind the last shard, "
          + "python data.py prepare without --shard writes the index and names what was left out")


def load_run(argv: list[str], own: str) -> tuple[Any, str]:
    """Load a config that has a data section, with options; returns the value of the command's `own` option apart."""
    words, options = split_arguments(argv, ("smoke", "help"))
    found = options.pop(own, "")
    config = load_config(words + [f"--{key}={value}" for key, value in options.items()])
    if not hasattr(config, "data"):
        raise ValueError(f"{argv[0]} is a {type(config).__name__} and has no data section; use the config of a run, as configs/tiny.py")
    return config, found


def prepare_command(argv: list[str]) -> None:
    config, shard = load_run(argv, "shard")
    if shard:
        prepare_shard(config.data, config.model.table, parse_shard(shard))
    else:
        prepare(config.data, config.model.table, wait=None)


def missing_shards(folder: Path) -> list[str]:
    """The shards of an array that have not ended since the index was written; none where there was no array, or a whole one."""
    ended: dict[int, set[int]] = {}
    for path in folder.glob("shard-*-of-*.json"):
        _, number, _, count = path.stem.split("-")
        ended.setdefault(int(count), set()).add(int(number))
    return min(([f"{n}/{count}" for n in range(count) if n not in numbers] for count, numbers in ended.items()), key=len, default=[])


def fitting_parts(config: DataConfig, table: StreamTable) -> tuple[Tokenizer, Any, bool]:
    """The tokenizer and the codec of a config, and whether the model also listens; ValueError where options do not go together."""
    if config.split not in ("hash", "speaker", "manifest") or not config.sources:
        raise ValueError(f"data.split={config.split!r}, sources={config.sources}; set split to hash, speaker or manifest and name a source")
    tokenizer = load_tokenizer(config.tokenizer)
    codec = fitting_codec(config.codec, table, tokenizer)
    duplex = check_fit(table, tokenizer, codec)
    if config.augment and not (duplex and config.variants > 1):
        raise ValueError(f"data.augment needs a duplex model and data.variants above 1 (now {config.variants}); or drop data.augment")
    return tokenizer, codec, duplex


def write_index(config: DataConfig, table: StreamTable) -> Index:
    seen = inputs(config, table)                        # before anything is read
    tokenizer, codec, duplex = fitting_parts(config, table)
    chat, folder = new_chat(config, tokenizer, table), index_folder(config, table)
    if left := missing_shards(folder):
        print(f"not ended: shard {', '.join(left)}; what is missing is encoded here", file=sys.stderr)
    manifests, encoded = encode_sources(config, codec, duplex, silence=table.timing.around)
    info = {"version": CACHE_VERSION, "frame_rate": codec.frame_rate if codec else 0.0, "duplex": duplex}
    index = Index(folder, info, [], chat=chat, padding=(config.text_padding_weight, table.pad, table.epad))
    composed = {m.clips[p]["mark"] for m in manifests for r in m.rows if r.get("split", "train") == "train" for p in r.get("parts", [])}
    indexer = Indexer(index, with_fitting_split(config, manifests), table, tokenizer, composed - {""})      # never held out on their own
    for source, m in enumerate(manifests):
        indexer.add(m, source)
    index.verdict = verdict_lines(manifests, config.doubtful)
    said = {"remarks": [*remarks(manifests, table), *advice(manifests, index.entries, config)],
            "bad": sum(len(m.bad) for m in manifests), "count": sum(e.split != "" for e in index.entries)}
    if not said["count"]:
        print(*said["remarks"], sep="\n", file=sys.stderr)
        print(*index.verdict, sep="\n")
        raise ValueError(f"no usable row in {', '.join(config.sources)}; `python data.py check` lists the reasons")
    elsewhere = outside(manifests)
    beyond = fingerprint(map(Path, elsewhere)) if elsewhere else ""
    index.write(indexer.texts, said | {"inputs": seen if beyond or not elsewhere else "", "outside": elsewhere, "beyond": beyond})
    for path in folder.glob("shard-*-of-*.json"):
        path.unlink()
    print_report(said["remarks"], index.verdict, said["count"], index.folder, encoded, said["bad"])
    return index


def new_chat(config: DataConfig, tokenizer: Tokenizer, table: StreamTable | None) -> Chat | None:
    """The chat template of a table's family with its options; None for a family without conversations."""
    template = family_of(table).template if table is not None else None
    if template is None:
        return None
    if template.empty_thinking and thought_of(config) == "none":
        template = replace(template, empty_thinking="", targets="all")                  # no reply differs from another
    return Chat(tokenizer, template, config.normaliser, config.scene, config.reference_in == "system", config.system).check_tokenizer(table)


def thought_of(config: DataConfig) -> str:
    """Whether an empty thought opens a reply where a family has such: as config says, else the chat template beside the tokenizer.

    Qwen3's template can switch thinking off, which leaves an empty thought; that of the 2507 models cannot and leaves nothing.
    """
    folder = tokenizer_file(config.tokenizer, local=True).parent
    if config.thought or config.tokenizer == "bytes":
        return config.thought
    beside, about = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template = read_object(about, "fetch it again").get("chat_template") if about.is_file() else ""
    template = beside.read_text(encoding="utf-8") if beside.is_file() else template
    return "none" if template and "enable_thinking" not in str(template) else ""


def prompt_facts(config: DataConfig, table: StreamTable) -> dict[str, Any]:
    """The fields that shape a prompt, for a checkpoint to remember."""
    template = family_of(table).template
    facts = {name: getattr(config, name) for name in PROMPT_FIELDS}
    return facts | ({"thought": thought_of(config)} if template and template.empty_thinking else {})


def codebooks_of(table: StreamTable) -> int:
    """How many codebooks a table has of each speaker."""
    heard, both = len(table.audio) - len(table.audio_out), len(table.audio) // 2
    if heard:
        return max(heard, len(table.audio_out))
    delays = [table.delays[k] for k in table.audio]
    two = table.monologue and both and delays[:both] == delays[both:]           # both speakers are predicted
    return both if two else len(table.codes)


def fitting_codec(spec: str, table: StreamTable, tokenizer: Tokenizer) -> Any:
    """Load the codec of a model, with as many codebooks as it has rows; None where nothing is heard or spoken.

    ValueError where codec, tokenizer and rows do not belong together.
    """
    codec = load_codec(spec, codebooks=codebooks_of(table)) if table.codes else None
    check_fit(table, tokenizer, codec)
    return codec


def check_fit(table: StreamTable, tokenizer: Tokenizer, codec: Any) -> bool:
    """Check that tokenizer and codec fit the rows of the grid; True when the model also listens (duplex)."""
    vocab = table.streams[0].vocab
    if tokenizer.size > vocab:
        raise ValueError(f"tokenizer {tokenizer.name} has {tokenizer.size} ids, the model's text row {vocab}; "
                         + "use the tokenizer of the model, or raise the vocab of that row")
    for what, token in (("padding", table.pad), ("padding before a word", table.epad)) if table.monologue else ():
        if piece := tokenizer.letters(token):
            raise ValueError(f"id {token} is {what} in the text row and {piece!r} in tokenizer {tokenizer.name}: words would lose letters; "
                             + "use the model's own tokenizer, or one that keeps these ids for marks")
    if codec is None:
        return False
    Q, rows, size = codec.num_codebooks, len(table.codes), table.flat[2] if table.flat else min(table.streams[i].vocab for i in table.audio)
    if rows not in (Q, 2 * Q) or codec.codebook_size > size or table.flat and rows != Q:
        found = f"codec {codec.name} has {Q} codebooks of {codec.codebook_size} codes"
        raise ValueError(f"{found}, the model {rows} audio rows of {size}; choose the codec it was made for with --data.codec")
    return rows == 2 * Q


def remarks(manifests: list[Manifest], table: StreamTable) -> list[str]:
    """Warnings, and the rejected rows with reason and fix, as lines to print."""
    bad = [b for m in manifests for b in m.bad]
    lines = [line for m in manifests for line in warning_lines(m)]
    lines += [visible(f"left out: {b.where}: {b.reason}; {b.fix}") for b in bad[:10]]
    lines += [f"left out: {len(bad) - 10} more rows; `python data.py check` lists them"] if len(bad) > 10 else []
    untimed = sum("words" not in row and "parts" not in row for m in manifests for row in m.rows)
    untimed = untimed if table.timed and not table.monologue else 0
    return lines + [f"{untimed} rows have no word times: the clip is divided among the words by their length in letters"] * bool(untimed)


def index_folder(config: DataConfig, table: StreamTable) -> Path:
    """The folder of the index for this config; its name hashes every option that would change an entry."""
    sources = [source_weight(s)[0] for s in config.sources]
    return Path(config.cache) / hash_of(CACHE_VERSION, sources, config.codec, config.tokenizer, config.normaliser, config.variants,
                                    config.split, config.held_out, config.min_seconds, config.max_seconds,
                                    config.allow_outside, table.timed, len(table.codes), config.max_text,
                                    *([config.doubtful] if config.doubtful != "keep" else []), *([config.agent] if config.agent else []),
                                    *([config.assistant_text, table.layout] if family_of(table).template else []),
                                    *([config.chunk_seconds, config.interleaver, config.contextual, config.spaces,
                                       config.both_speakers, table.layout, table.pad, table.epad,
                                       *([config.augment] if config.augment else []),
                                       *([config.system] if family_of(table).persona else []),
                                       *([table.timing] if table.timing.lead else []),
                                       *(repr(table.streams[k]) for k in table.conditions)] if table.monologue else []))[:12]


def open_cache(config: DataConfig, table: StreamTable) -> Index:
    """Open what `prepare` wrote for this config; raises FileNotFoundError when it has not run."""
    folder = index_folder(config, table)
    now = current(folder)
    if now is None:
        raise FileNotFoundError(f"no prepared data in {folder} for this config; run `python data.py prepare CONFIG.py`")
    chat = new_chat(config, load_tokenizer(config.tokenizer), table) if family_of(table).template else None
    info, entries = open_entries(folder / f"{now['content']}.json", now["checksum"])
    return Index(folder, info, entries, chat=chat, content=now["content"], verdict=now.get("verdict", []),
                 padding=(config.text_padding_weight, table.pad, table.epad)).open()


def split_of(row: Row, mark: str, config: DataConfig) -> str:
    """Assign a row to "train" or "held-out". `mark` is the hash of its audio or its text, never its position in a file."""
    if config.split == "manifest" or ("parts" in row and "split" in row):
        return "train" if row.get("split", "train") == "train" else "held-out"
    if len(row.get("parts", [])) == 1:
        return "train"
    if config.split == "speaker" and row.get("speaker"):
        mark = row["speaker"]
    return "held-out" if hash_fraction(mark) < config.held_out else "train"


class NoAudio(Exception):
    """The audio of a row was rejected, with its reason."""


@dataclass
class Indexer:
    """Turns manifest rows into the entries of an index and the arrays of its text file."""

    index: Index
    config: DataConfig
    table: StreamTable
    tokenizer: Tokenizer
    joined: set[str]
    drawn: set[str] = field(default_factory=set)        # ids of the manifest's rows; other clips are used by them
    texts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, m: Manifest, source: int) -> None:
        """Append the usable rows of a manifest and reject the others."""
        self.drawn, numbers = {row["id"] for row in m.rows}, {}
        for row in m.clips.values():                    # parts and references come before the rows that use them
            entry = Entry(row["id"], row["text"], source, "", label(row.get("speaker")), label(row.get("group")))
            try:
                if self.table.codes or self.index.chat is not None:
                    self.locate(entry, row, numbers)
                voice = self.table.monologue and row["id"].endswith("#reference")       # it has codes and says nothing
                entries = [(entry, None)] if voice else (
                    self.dialogue(entry, row) if self.table.monologue else [(entry, self.text(entry, row))])
            except NoAudio:                             # it was rejected before
                continue
            except ValueError as error:
                m.reject(row["id"], str(error), "fix or remove the row")
                continue
            numbers[row["id"]] = len(self.index.entries)
            for entry, text in entries:                 # all chunks of a dialogue fall on the same side
                if row["id"] in self.drawn:
                    entry.split = "train" if row["mark"] in self.joined else split_of(row, row["mark"] or row["text"], self.config)
                if text is not None:
                    self.texts[str(len(self.index.entries))] = text
                self.index.entries.append(entry)

    def locate(self, entry: Entry, row: Row, numbers: dict[str, int]) -> None:
        """Fill in where the codes of an entry are; NoAudio for audio that was rejected, ValueError for a new reason."""
        self.locate_sides(entry, row, numbers)
        if self.index.chat is not None:
            self.add_messages(entry, row, numbers)
            if not self.table.codes or (entry.messages and not row["file"]):
                return                                  # a turn of text
        if "parts" in row:
            missing = [p for p in row["parts"] if p not in numbers]
            if missing:
                raise ValueError(f"its part {missing[0]} was left out")
            entry.parts = [numbers[p] for p in row["parts"]]
            return
        if not row["file"]:
            raise ValueError("no audio")
        if not row["shard"]:
            raise NoAudio(row["id"])
        entry.shard, entry.key, entry.frames = row["shard"], row["key"], row["frames"]
        low, high = self.config.min_seconds, self.config.max_seconds
        if not low <= entry.frames[0] / self.index.info["frame_rate"] <= high + 1:      # the codec pads the last frame
            raise ValueError(f"duration outside {low:g}..{high:g} s")

    def locate_sides(self, entry: Entry, row: Row, numbers: dict[str, int]) -> None:
        """Fill in the entries of a row's reference and of its rejected reply; ValueError when one was left out."""
        entry.reference, entry.rejected = (numbers.get(f"{row['id']}#{side}", -1) for side in ("reference", "rejected"))
        if row.get("reference") and entry.reference < 0 and self.table.codes:
            raise ValueError("its reference was left out")
        if "rejected" in row and entry.rejected < 0:
            raise ValueError("its rejected reply was left out")

    def add_messages(self, entry: Entry, row: Row, numbers: dict[str, int]) -> None:
        """Store the messages of a row and the entries of their recordings; ValueError when they cannot be trained."""
        entry.scene = str(row.get("scene") or "")
        chat = self.index.chat
        if "clips" not in row and chat.template.clone_prompt is None:
            if self.table.codes and row["id"] in self.drawn:
                raise ValueError(f'{chat.template.family} learns from conversations; write the row as {{"messages": [...]}}')
            chat.plain(row["text"])
            return
        whole = all(clips(m["content"]) and text_of(m["content"]) for m in row.get("messages") or ())
        if "clips" not in row or chat.template.one_turn and row["file"] and not whole:      # turns are texts with their speech: a recording
            if entry.reference >= 0 and not self.index.entries[entry.reference].text.strip():
                raise ValueError("its reference has no transcript")
            chat.prompt(row["text"])                        # raises when the text contains special tokens
            return
        missing = [name for name in row["clips"] if name and row["id"] + name not in numbers]
        if missing and self.table.codes:
            raise ValueError(f"a recording of its messages was left out ({missing[0]})")
        entry.messages = row["messages"] if self.table.codes else with_transcripts(row["messages"])
        if self.table.codes:
            entry.clips = [numbers[row["id"] + name] if name else len(self.index.entries) for name in row["clips"]]
        entry.start = start if type(start := row.get("start_index")) is int else None
        nothing = [torch.zeros(len(self.table.codes), 0, dtype=torch.long)] * len(entry.clips)
        segments = chat.segments(entry.messages, nothing, entry.start)
        if not any(weight for _, weight in segments):
            raise ValueError(f"start_index {entry.start} leaves no target")
        lay_out(Example(torch.zeros(0, dtype=torch.long), segments=segments), self.table)       # what it refuses is left out

    def dialogue(self, entry: Entry, row: Row) -> list[tuple[Entry, np.ndarray | None]]:
        """The chunks of a dialogue, once or for each speaker as the agent; the first of a run has the text row of all
        variants, one behind the other (1, T)."""
        if entry.parts:
            raise ValueError("a dialogue cannot be joined from parts")
        rate, c, words, found = self.index.info["frame_rate"], self.config, row_words(row), []
        family, role = family_of(self.table), row.get("text_prompt") or c.system
        entry.conditions = condition_ids(self.table, row.get("text_conditions") or chosen(family.condition(self.table)))
        entry.role = self.tokenizer.encode(family.role(role)) if family.persona and role else []
        check_length(words, entry.frames[0] / rate)
        chunks = math.ceil(entry.frames[0] / max(1, round(c.chunk_seconds * rate)))
        one_of_two = "rejected" in row or entry.id.endswith("#rejected")
        if one_of_two and chunks > 1:
            raise ValueError(f"a side of a pair lasts over data.chunk_seconds={c.chunk_seconds:g}")
        for swapped, who in enumerate((MAIN, OTHER)[: 1 + c.both_speakers]):
            own = [(word, *rest) for said, *rest in words if rest[-1] == who and (word := normalise(said, c.normaliser).strip())]
            if swapped and (one_of_two or not own):     # the user has no transcript
                continue
            tokens, rows = tokenise(own, self.tokenizer, c.contextual, c.spaces), []
            for version, frames in enumerate(entry.frames):
                later, speed = word_shift(entry.key, version, rate, c.augment)
                timed = [(ids, start / speed + later + self.table.timing.silence / rate) for ids, start in tokens]
                rows.append(family.text_rows(timed, frames, rate, self.table) if family.text_rows else
                            interleave(timed, frames, rate, c.interleaver, self.table.pad, self.table.epad)[None])
            for n in range(chunks):
                name = entry.id + ("~" if swapped else "") + (f"@{n + 1}of{chunks}" if chunks > 1 else "")
                part = replace(entry, id=name, text=" ".join(w[0] for w in own), chunk=[n, chunks], swapped=bool(swapped))
                found.append((part, None if n else torch.cat(rows, 1).numpy().astype(np.int32)))
        return found

    def text(self, entry: Entry, row: Row) -> np.ndarray | None:
        """Ids of a row (1, n) and, in aligned layouts, the first frame of each under every variant (1 + V, n)."""
        if self.index.chat is not None and not row["text"].strip():
            return None                                 # a recording in a message, without transcript
        rate, normaliser, starts = self.index.info["frame_rate"], self.config.normaliser, []
        if not self.table.timed:
            ids = self.tokenizer.encode(normalise(row["text"], normaliser))
        elif entry.parts:
            return None                                 # joined from the parts when an example is built
        else:
            ids, times = aligned_ids(row, entry.frames[0] / rate, self.tokenizer, normaliser)
            for version, frames in enumerate(entry.frames):
                shift, _, speed = variant_parameters(entry.key, version)
                starts.append(frame_starts(times, rate, speed, shift, frames))
        if not ids:
            raise ValueError(f"no text is left after {normaliser}")
        if 0 < self.config.max_text < len(ids):
            raise ValueError(f"{len(ids)} text ids, data.max_text is {self.config.max_text}")
        return np.array([ids, *starts], dtype=np.int32)
