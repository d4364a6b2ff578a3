"""The token cache: manifest rows -> codes and ids on disk. Nothing is encoded twice and training never runs a codec.

    CACHE/codes/<hash>.safetensors      uint16 codes of ~64 clips, keyed by a hash of everything that made them
    CACHE/<hash>/index.json             the examples of one DataConfig, each an `Entry`
    CACHE/<hash>/text.safetensors       beside it: their int32 ids and, where text is aligned, its first frames

`prepare` writes, `open_cache` opens. A clip is stored in `variants` versions, one behind the other, that differ a
little in time, gain and speed: with a single code sequence per clip a model could ignore the text. Another split,
tokenizer or normaliser is another index over the same codes. `build_example` makes of an entry what a layout needs,
`prompt_example` of a text; conversations are written by chatml.py. Next: data.py.
"""

import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

import duplex
from audio import augment, load_codec
from audio.augment import AugmentConfig
from audio.wav import RESAMPLER, resample
from chatml import HIGGS, TEMPLATES, Chat, Segment, written
from guidance import choose
from manifest import Bad, Manifest, Row, digest, fraction, header_faults, read_manifest, usable_clip
from options import FULL, check_types, read_json, replace_file, write_json
from streams import Example, StreamTable
from text import Tokenizer, aligned_ids, check_normaliser, frame_starts, load_tokenizer, normalise

SHARD = 64                  # clips per shard: what an interrupted `prepare` can lose
CACHE_VERSION = "1"         # part of every key: change it when the same input would be encoded or split differently
MAX_INDEX = 4 << 30         # bytes


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become rows of a batch."""

    sources: tuple[str, ...] = ()           # manifests or folders, each "path" or "path:weight"
    cache: str = "out/cache"                # where prepared tokens live
    codec: str = "tiny"                     # name, file or hub id of the codec
    tokenizer: str = "bytes"                # "bytes", a word list (.json), a SentencePiece .model, or a tokenizer.json
    normaliser: str = "none"                # "none", "english-v1", "arabic-v1", "higgs-v1", joined by +; stored in the checkpoint
    variants: int = 1                       # encoded versions of a clip: shift < 1 frame, 3 dB, 6 % speed, noise; first as it is
    augment: AugmentConfig | None = None    # dialogues: what the variants behind the first suffer instead
    split: str = "hash"                     # "hash", "speaker" or "manifest" (the rows' own "split")
    held_out: float = 0.05                  # fraction for validation under hash and speaker
    columns: int = 1200                     # columns of one packed row
    window: int = 256                       # examples that packing may choose from
    max_seconds: float = 30.0               # longer clips are left out
    min_seconds: float = 0.2                # shorter clips are left out
    max_text: int = 0                       # rows whose text has more ids are left out, 0 = no limit
    reference: float = 0.0                  # probability that another clip of the same speaker goes before an example
    reference_in: str = "assistant"         # conversations: where it stands, in an "assistant" turn or in the "system" message
    scene: str = ""                         # conversations: scene description of rows that bring none
    system: str = ""                        # conversations: system message of rows that bring none, "" = the family's own
    assistant_text: str = "drop"            # one-turn clone requests: "drop" or "keep" the text before the answer's speech
    chunk_seconds: float = 100.0            # dialogues: longer ones are cut evenly into chunks of at most this
    interleaver: str = "queue"              # dialogues: "queue" keeps every token, "reference" drops what a word leaves unsaid
    contextual: bool = False                # dialogues: whole sentences become ids at once, not word by word
    spaces: bool = True                     # dialogues: words of a sentence are joined by spaces
    both_speakers: bool = False             # dialogues: the user's side is also learnt as the agent's, channels swapped
    text_padding_weight: float = 0.5        # dialogues: how much padding counts in the text row
    stream_weights: tuple[float, ...] = ()  # factor on the target weights of each row of the grid; () = ones
    seed: int = 0                           # of drawing, shuffling, variants and references
    workers: int = 0                        # clips that prepare encodes at once, a core each; 0 = one
    prefetch: int = 4                       # batches built ahead by a thread; 0 = none
    allow_outside: bool = False             # manifests may name files outside their folder

    def __post_init__(self) -> None:
        check_types(self)
        try:
            check_normaliser(self.normaliser)
        except ValueError as error:
            raise AssertionError(error) from None
        assert min(self.variants, self.columns, self.window) > 0, "variants, columns and window are at least 1"
        assert min(self.workers, self.prefetch) >= 0, "workers and prefetch are not negative"
        assert 0 <= self.held_out < 1 and 0 <= self.reference <= 1, "held_out is in [0, 1), reference in [0, 1]"
        assert self.reference_in in ("assistant", "system"), f"reference_in {self.reference_in!r} is neither assistant nor system"
        assert self.assistant_text in ("drop", "keep"), f"assistant_text {self.assistant_text!r} is neither drop nor keep"
        assert 0 <= self.min_seconds <= self.max_seconds, "min_seconds is at most max_seconds"
        assert self.interleaver in duplex.INTERLEAVERS, f"interleaver {self.interleaver!r} is none of {', '.join(duplex.INTERLEAVERS)}"
        assert self.chunk_seconds > 0 <= self.text_padding_weight, "chunk_seconds is positive, text_padding_weight not negative"


@dataclass
class Entry:
    """One line of the index: a clip, clips joined, or a text."""

    id: str
    text: str
    source: int = 0                                     # which of DataConfig.sources
    split: str = "train"                                # "train", "held-out", or "" for clips that only serve others
    speaker: str = ""
    group: str = ""
    shard: str = ""                                     # file of its codes
    key: str = ""
    frames: list[int] = field(default_factory=list)     # of each variant
    parts: list[int] = field(default_factory=list)      # entries that are joined
    reference: int = -1                                 # entry of its own reference clip
    rejected: int = -1                                  # entry of the reply that is liked less than this one
    messages: list[dict[str, Any]] = field(default_factory=list)    # a conversation as it was written
    clips: list[int] = field(default_factory=list)      # entries of its recordings, in reading order
    start: int | None = None                            # its first message that is trained, None = the default
    scene: str = ""                                     # its scene description
    chunk: list[int] = field(default_factory=list)      # of a dialogue: its number, and how many there are
    swapped: bool = False                               # of a dialogue: the right channel is the agent
    conditions: list[int] = field(default_factory=list) # of a dialogue: ids of the condition rows


@dataclass
class Index:
    """A prepared data set. Files open on first use and stay mapped."""

    folder: Path
    info: dict[str, Any]                                # version, frame_rate, duplex
    entries: list[Entry]
    files: dict[str, Any] = field(default_factory=dict)
    chat: Chat | None = None                            # how conversations are written, for tables that want them
    padding: tuple[float, int, int] = (0.5, 3, 0)       # weight of padding in the text row of a dialogue, and its ids

    def text(self, number: int) -> Tensor:
        """Ids of an entry and, where text is aligned, the first frame of each under every variant.   (1 or 1 + V, n)"""
        return torch.from_numpy(self.read("", str(number)).astype(np.int64))

    def codes(self, number: int, version: int) -> Tensor:
        """Codes of one variant of a clip, of two channels one below the other.   (C * Q, T)"""
        entry = self.entries[number]
        found = self.read(entry.shard, entry.key)
        if found.ndim != 2 or found.shape[1] != sum(entry.frames):
            raise ValueError(damaged(self.path(entry.shard), f"{entry.id}: {found.shape} codes"))
        begin = sum(entry.frames[:version])
        return torch.from_numpy(found[:, begin : begin + entry.frames[version]].astype(np.int64))

    def path(self, shard: str) -> Path:
        return self.folder.parent / "codes" / shard if shard else self.folder / "text.safetensors"

    def read(self, shard: str, key: str) -> np.ndarray:
        if shard not in self.files:
            self.files[shard] = open_shard(self.path(shard))
        try:
            return self.files[shard].get_tensor(key)
        except SafetensorError as error:
            raise ValueError(damaged(self.path(shard), error)) from None


def prepare(config: DataConfig, table: StreamTable) -> Index:
    """Encode whatever is not cached yet and write the index; running it again encodes nothing.

    Rows that cannot be used are named and left out; ValueError when none is left.
    """
    if config.split not in ("hash", "speaker", "manifest") or not config.sources:
        raise ValueError(f"data.split={config.split!r}, data.sources={config.sources}; give hash, speaker or manifest, and a source")
    tokenizer, codec = load_tokenizer(config.tokenizer), load_codec(config.codec) if table.audio else None
    duplex = fit(table, tokenizer, codec)
    if config.augment and not (duplex and config.variants > 1):
        raise ValueError("data.augment changes the user's side of dialogues; it needs one, and data.variants above 1")
    chat = new_chat(config, tokenizer, table)
    manifests = [read_manifest(source_weight(s)[0], config.allow_outside, assistant_text=config.assistant_text) for s in config.sources]
    encoded = store_codes(manifests, codec, duplex, config) if codec else 0
    info = {"version": CACHE_VERSION, "frame_rate": codec.frame_rate if codec else 0.0, "duplex": duplex}
    index = Index(index_folder(config, table), info, [], chat=chat, padding=(config.text_padding_weight, table.pad, table.epad))
    indexer = Indexer(index, config, table, tokenizer, joined_audio(manifests))
    for source, m in enumerate(manifests):
        indexer.add(m, source)
    bad = name_left_out(manifests, table)
    index = indexer.index
    count = sum(e.split != "" for e in index.entries)
    if not count:
        raise ValueError(f"no usable row in {', '.join(config.sources)}; `python data.py check` lists the reasons")
    (index.folder / "index.json").unlink(missing_ok=True)       # a kill between the two files must not leave a mixture
    write_tensors(index.path(""), indexer.texts, {})
    write_json(index.folder / "index.json", index.info | {"entries": [vars(e) for e in index.entries]})
    did = f"{encoded} clips encoded" if encoded else "everything was cached, nothing encoded"
    print(f"prepared {count} examples in {index.folder}: {did}, {bad} rows left out")
    return index


def new_chat(config: DataConfig, tokenizer: Tokenizer, table: StreamTable | None) -> Chat | None:
    """How conversations are written for a table; None for one that has none."""
    template = TEMPLATES.get(table.layout) if table is not None else None
    if template is None:
        return None
    return Chat(tokenizer, config.normaliser, config.scene, config.reference_in == "system", template, config.system).fit(table)


def fit(table: StreamTable, tokenizer: Tokenizer, codec: Any) -> bool:
    """Check that tokenizer and codec fit the rows of the grid; True when the model also listens (duplex)."""
    vocab = table.streams[0].vocab
    if tokenizer.size > vocab:
        raise ValueError(f"tokenizer {tokenizer.name} has {tokenizer.size} ids, the text row {vocab}; raise its vocab")
    if codec is None:
        return False
    Q, rows = codec.num_codebooks, len(table.audio)
    if rows not in (Q, 2 * Q) or codec.codebook_size > min(table.streams[i].vocab for i in table.audio):
        found = f"codec {codec.name} has {Q} codebooks of {codec.codebook_size} codes"
        raise ValueError(f"{found}, the model {rows} audio rows of {table.streams[table.audio[0]].vocab}; choose the codec it was made for")
    return rows == 2 * Q


def source_weight(source: str) -> tuple[str, float]:
    """Split "path:weight"; without a number behind the last colon the weight is 1."""
    path, _, number = source.rpartition(":")
    return (path, float(number)) if path and re.fullmatch(r"\d+(\.\d*)?|\.\d+", number) else (source, 1.0)


def name_left_out(manifests: list[Manifest], table: StreamTable) -> int:
    """Print the rows that are left out, with reason and fix; returns their number."""
    bad = [b for m in manifests for b in m.bad]
    for b in bad[:10]:
        print(f"left out: {b.where}: {b.reason}; {b.fix}", file=sys.stderr)
    if len(bad) > 10:
        print(f"left out: {len(bad) - 10} more rows; `python data.py check` lists them", file=sys.stderr)
    untimed = sum("words" not in row and "parts" not in row for m in manifests for row in m.rows) if table.layout == "words" else 0
    if untimed:
        print(f"{untimed} rows have no word times: their words share the clip in proportion to their letters", file=sys.stderr)
    return len(bad)


# ---- audio -> codes ----

def store_codes(manifests: list[Manifest], codec: Any, duplex: bool, config: DataConfig) -> int:
    """Encode every clip that no shard holds. A usable clip gets its key, shard and frames; returns how many were encoded."""
    folder, version = Path(config.cache) / "codes", codec_version(codec)
    stored, jobs = scan(folder), {}
    clips = [(m, clip) for m in manifests for clip in m.clips.values() if clip["file"]]
    for m, clip in clips:
        clip["stereo"] = duplex or bool(clip.get("stereo"))
        try:
            clip["mark"] = digest(clip)
        except OSError as error:
            m.reject(clip["id"], "missing file", f"{clip['file']}: {error.strerror}")
            continue
        clip["key"] = sha(CACHE_VERSION, clip["mark"], version, RESAMPLER, config.variants, duplex,
                          *([config.augment] if config.augment else []))
        if clip["key"] not in stored:
            jobs[clip["key"]] = clip
    name_warnings(jobs.values())
    bad = encode_missing(jobs, folder, codec, duplex, config)
    stored = scan(folder) if jobs else stored
    for m, clip in clips:
        if clip["key"] in bad:
            m.reject(clip["id"], bad[clip["key"]].reason, bad[clip["key"]].fix)
        elif clip["key"]:
            clip["shard"], clip["frames"] = stored[clip["key"]]
    return len(jobs) - len(bad)


def name_warnings(clips: Iterable[Row]) -> None:
    """Print what the headers of recordings warn of, a line a reason; the clips are used."""
    named: dict[tuple[str, str], list[str]] = {}
    for clip in clips:
        for _, reason, fix in header_faults(clip):
            named.setdefault((reason, fix), []).append(clip["id"])
    for (reason, fix), ids in named.items():
        shown = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        print(f"warning: {shown}: {reason}; {fix}", file=sys.stderr)


def sha(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def codec_version(codec: Any) -> str:
    """Hash of a codec's name and weights: other weights, other codes."""
    hashed = hashlib.sha256(codec.name.encode())
    for name, value in sorted(codec.state_dict().items() if hasattr(codec, "state_dict") else {}):
        hashed.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def encode_missing(jobs: dict[str, Row], folder: Path, codec: Any, duplex: bool, config: DataConfig) -> dict[str, Bad]:
    """Encode clips into shards, each written whole: a killed run loses the last one only. Returns the unusable clips by key."""
    bad: dict[str, Bad] = {}
    left, bar = iter(jobs), tqdm(desc="encoding", total=len(jobs), disable=None if jobs else True, unit="clip")
    with bar, one_thread_each(), ThreadPoolExecutor(max(1, config.workers)) as pool:
        while keys := list(islice(left, SHARD)):
            frames, arrays = {}, {}
            found = pool.map(lambda key: encode_clip(key, jobs[key], codec, duplex, config), keys)
            for key, codes in zip(keys, found, strict=True):
                bar.update()
                if isinstance(codes, Bad):
                    bad[key] = codes
                else:
                    frames[key] = " ".join(str(c.shape[1]) for c in codes)
                    arrays[key] = np.concatenate(codes, axis=1)
            if arrays:                                  # the name says what is in it, so two runs at once do not collide
                write_tensors(folder / f"{sha(*arrays)[:16]}.safetensors", arrays, frames)
    return bad


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread for an operation: clips are short, and threads that wait for one another cost six times that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encode_clip(key: str, row: Row, codec: Any, duplex: bool, config: DataConfig) -> list[np.ndarray] | Bad:
    """Encode all variants of a clip, each (C * Q, T) uint16, or say why it cannot be used."""
    try:
        wav, rate = usable_clip(row, (config.min_seconds, config.max_seconds))
    except ValueError as error:
        return Bad(row["id"], *error.args)
    wav = resample(wav if duplex else wav[:1], rate, codec.sample_rate)
    hop = codec.sample_rate / codec.frame_rate
    versions = (vary(wav, key, v, hop, config.augment, codec.sample_rate) for v in range(config.variants))
    return [encode(codec, version).numpy().astype(np.uint16) for version in versions]


def encode(codec: Any, wav: Tensor) -> Tensor:
    """Codes of a clip: (C, W) -> (C * Q, T), the channels one below the other."""
    with torch.inference_mode():
        codes = codec.encode(wav[:, None])              # (C, 1, W) -> (C, Q, T)
    return codes.flatten(0, 1).clone()


def variant(key: str, number: int) -> tuple[float, float, float]:
    """How a version of a clip differs: shift in frames, gain in dB, speed. Number 0 is the clip as it is."""
    if number == 0:
        return 0.0, 0.0, 1.0
    draw = random.Random(f"{key}/{number}")
    return draw.random(), draw.uniform(-3, 3), draw.randint(-3, 3) / 50 + 1      # steps of 2 %: short resampling filters


def moved(key: str, number: int, rate: float, config: AugmentConfig | None) -> tuple[float, float]:
    """By how many seconds the words of a version come later, and at which speed; `rate` is the codec's."""
    if config is None or number == 0:
        shift, _, speed = variant(key, number)
        return shift / rate, speed
    change = augment.draw(config, f"{key}/{number}")
    return max(0.0, -change.shift), change.speed


def vary(wav: Tensor, key: str, number: int, hop: float, config: AugmentConfig | None = None, rate: int = 0) -> Tensor:
    """Version `number` of a clip (C, W)."""
    if number == 0:
        return wav
    if config is not None:
        return augment.apply(wav, rate, augment.draw(config, f"{key}/{number}"), augment.recordings(config.noise_dir))
    shift, gain, speed = variant(key, number)
    wav = resample(wav, round(100 * speed), 100) * 10 ** (gain / 20)
    wav = torch.nn.functional.pad(wav, (round(shift * hop), 0))
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(int(key[:12], 16) + number))
    return (wav + 1e-3 * noise).clamp(-1, 1)            # -60 dBFS


# ---- shards ----

def scan(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """What the shards of a cache hold, read from their headers: key -> shard, frames of each variant."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, frames in (open_shard(path).metadata() or {}).items():
            if key != "format":
                found[key] = path.name, [int(n) for n in frames.split()]
    return found


def open_shard(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; run `python data.py prepare CONFIG.py` again") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(damaged(path, error)) from None


def damaged(path: Path, what: object) -> str:
    return f"{path} is damaged ({what}); delete it and run `python data.py prepare CONFIG.py` again"


def write_tensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    try:
        replace_file(path, lambda temporary: save_file(arrays, temporary, {"format": "pt"} | metadata))
    except SafetensorError as error:                    # a full disk, for one
        raise OSError(f"{path} cannot be written ({error}); {FULL}") from None


# ---- rows -> index ----

def index_folder(config: DataConfig, table: StreamTable) -> Path:
    """Where the index of this config lives: whatever would change an entry is part of the name."""
    sources = [source_weight(s)[0] for s in config.sources]
    return Path(config.cache) / sha(CACHE_VERSION, sources, config.codec, config.tokenizer, config.normaliser, config.variants,
                                    config.split, config.held_out, config.min_seconds, config.max_seconds,
                                    config.allow_outside, table.aligned, len(table.audio), config.max_text,
                                    *([config.assistant_text, table.layout] if table.layout in TEMPLATES else []),
                                    *([config.chunk_seconds, config.interleaver, config.contextual, config.spaces,
                                       config.both_speakers, table.layout, table.pad, table.epad,
                                       *([config.augment] if config.augment else []),
                                       *(repr(table.streams[k]) for k in table.conditions)] if table.layout == "duplex" else []))[:12]


def open_cache(config: DataConfig, table: StreamTable) -> Index:
    """Open what `prepare` wrote for this config; raises FileNotFoundError when it has not run."""
    folder = index_folder(config, table)
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(f"no prepared data in {folder} for this config; run `python data.py prepare CONFIG.py`")
    found = read_json(folder / "index.json", MAX_INDEX)
    chat = new_chat(config, load_tokenizer(config.tokenizer), table) if table.layout in TEMPLATES else None
    try:
        return Index(folder, found, [Entry(**entry) for entry in found.pop("entries")], chat=chat,
                     padding=(config.text_padding_weight, table.pad, table.epad))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(damaged(folder / "index.json", error)) from None


def joined_audio(manifests: list[Manifest]) -> set[str]:
    """Hashes of the audio that composed training rows use: never held out on its own."""
    return {m.clips[p]["mark"] for m in manifests for row in m.rows if row.get("split", "train") == "train"
            for p in row.get("parts", [])} - {""}


def split_of(row: Row, mark: str, config: DataConfig) -> str:
    """Put a row on one side. `mark` is the hash of its audio, or its text: never its place in a file."""
    if config.split == "manifest" or ("parts" in row and "split" in row):
        return "train" if row.get("split", "train") == "train" else "held-out"
    if len(row.get("parts", [])) == 1:
        return "train"
    if config.split == "speaker" and row.get("speaker"):
        mark = row["speaker"]
    return "held-out" if fraction(mark) < config.held_out else "train"


@dataclass
class Indexer:
    """Turns manifest rows into the entries of an index and the arrays of its text file."""

    index: Index
    config: DataConfig
    table: StreamTable
    tokenizer: Tokenizer
    joined: set[str]
    drawn: set[str] = field(default_factory=set)        # ids of the manifest's rows; its other clips serve them
    texts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, m: Manifest, source: int) -> None:
        """Append the usable rows of a manifest and reject the others."""
        self.drawn, numbers = {row["id"] for row in m.rows}, {}
        for row in m.clips.values():                    # parts and references stand before the rows that use them
            entry = Entry(row["id"], row["text"], source, "", str(row.get("speaker") or ""), str(row.get("group") or ""))
            try:
                if self.table.audio or self.index.chat is not None:
                    self.locate(entry, row, numbers)
                entries = self.dialogue(entry, row) if self.table.layout == "duplex" else [(entry, self.text(entry, row))]
            except LookupError:                         # its audio was rejected before
                continue
            except ValueError as error:
                m.reject(row["id"], str(error), "mend or remove the row")
                continue
            numbers[row["id"]] = len(self.index.entries)
            for entry, text in entries:                 # all chunks of a dialogue fall on the same side
                if row["id"] in self.drawn:
                    entry.split = "train" if row["mark"] in self.joined else split_of(row, row["mark"] or row["text"], self.config)
                if text is not None:
                    self.texts[str(len(self.index.entries))] = text
                self.index.entries.append(entry)

    def locate(self, entry: Entry, row: Row, numbers: dict[str, int]) -> None:
        """Fill in where the codes of an entry are; LookupError for audio that was rejected, ValueError for a new reason."""
        entry.reference = numbers.get(f"{row['id']}#reference", -1)
        if "rejected" in row:
            if f"{row['id']}#rejected" not in numbers:
                raise ValueError("its rejected reply was left out")
            entry.rejected = numbers[f"{row['id']}#rejected"]
        if self.index.chat is not None:
            self.converse(entry, row, numbers)
            if not self.table.audio or (entry.messages and not row["file"]):
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
            raise LookupError(row["id"])
        entry.shard, entry.key, entry.frames = row["shard"], row["key"], row["frames"]
        low, high = self.config.min_seconds, self.config.max_seconds
        if not low <= entry.frames[0] / self.index.info["frame_rate"] <= high + 1:      # the codec pads the last frame
            raise ValueError(f"duration outside {low:g}..{high:g} s")

    def converse(self, entry: Entry, row: Row, numbers: dict[str, int]) -> None:
        """Keep the messages of a row and the entries of their recordings."""
        entry.scene = str(row.get("scene") or "")
        chat = self.index.chat
        if "clips" not in row and chat.template is not HIGGS:
            if self.table.audio and row["id"] in self.drawn:
                raise ValueError(f'{chat.template.family} learns from conversations; write the row as {{"messages": [...]}}')
            chat.plain(row["text"])
            return
        if "clips" not in row:
            if entry.reference >= 0 and not self.index.entries[entry.reference].text.strip():
                raise ValueError("its reference has no transcript")
            chat.prompt(row["text"])                        # a text that would bring marks of turns is refused here
            return
        lost = [name for name in row["clips"] if name and row["id"] + name not in numbers]
        if lost and self.table.audio:
            raise ValueError(f"a recording of its messages was left out ({lost[0]})")
        entry.messages = row["messages"] if self.table.audio else written(row["messages"])
        if self.table.audio:
            entry.clips = [numbers[row["id"] + name] if name else len(self.index.entries) for name in row["clips"]]
        start = row.get("start_index")
        entry.start = start if isinstance(start, int) and not isinstance(start, bool) else None
        nothing = [torch.zeros(len(self.table.audio), 0, dtype=torch.long)] * len(entry.clips)
        if not any(weight for _, weight in chat.segments(entry.messages, nothing, entry.start)):
            raise ValueError(f"start_index {entry.start} leaves nothing to learn")

    def dialogue(self, entry: Entry, row: Row) -> list[tuple[Entry, np.ndarray | None]]:
        """The chunks of a dialogue, once or for each speaker as the agent; the first of a run has the text row of all
        variants, one behind the other (1, T)."""
        if entry.parts:
            raise ValueError("a dialogue cannot be joined from parts")
        rate, c, words, found = self.index.info["frame_rate"], self.config, duplex.row_words(row), []
        entry.conditions = choose(self.table, row.get("text_conditions") or {})
        duplex.check_length(words, entry.frames[0] / rate)
        chunks = math.ceil(entry.frames[0] / max(1, round(c.chunk_seconds * rate)))
        one_of_two = "rejected" in row or entry.id.endswith("#rejected")
        if one_of_two and chunks > 1:
            raise ValueError(f"a side of a pair lasts over data.chunk_seconds={c.chunk_seconds:g}")
        for swapped, who in enumerate((duplex.MAIN, duplex.OTHER)[: 1 + c.both_speakers]):
            own = [(word, *rest) for said, *rest in words if rest[-1] == who and (word := normalise(said, c.normaliser).strip())]
            if swapped and (one_of_two or not own):     # nobody wrote down what the user says
                continue
            tokens, rows = duplex.tokenise(own, self.tokenizer, c.contextual, c.spaces), []
            for version, frames in enumerate(entry.frames):
                later, speed = moved(entry.key, version, rate, c.augment)
                timed = [(ids, start / speed + later) for ids, start in tokens]
                rows.append(duplex.interleave(timed, frames, rate, c.interleaver, self.table.pad, self.table.epad))
            for n in range(chunks):
                name = entry.id + ("~" if swapped else "") + (f"@{n + 1}of{chunks}" if chunks > 1 else "")
                part = replace(entry, id=name, text=" ".join(w[0] for w in own), chunk=[n, chunks], swapped=bool(swapped))
                found.append((part, None if n else torch.cat(rows)[None].numpy().astype(np.int32)))
        return found

    def text(self, entry: Entry, row: Row) -> np.ndarray | None:
        """Ids of a row (1, n) and, in aligned layouts, the first frame of each under every variant (1 + V, n)."""
        if self.index.chat is not None and not row["text"].strip():
            return None                                 # a voice in a message that does not say what it says
        rate, normaliser, starts = self.index.info["frame_rate"], self.config.normaliser, []
        if not self.table.aligned:
            ids = self.tokenizer.encode(normalise(row["text"], normaliser))
        elif entry.parts:
            return None                                 # joined from the parts when an example is built
        else:
            ids, times = aligned_ids(row, entry.frames[0] / rate, self.tokenizer, normaliser)
            for version, frames in enumerate(entry.frames):
                shift, _, speed = variant(entry.key, version)
                starts.append(frame_starts(times, rate, speed, shift, frames))
        if not ids:
            raise ValueError(f"no text is left after {normaliser}")
        if 0 < self.config.max_text < len(ids):
            raise ValueError(f"{len(ids)} text ids, data.max_text is {self.config.max_text}")
        return np.array([ids, *starts], dtype=np.int32)


# ---- examples ----

def clip_example(index: Index, number: int, version: int, aligned: bool) -> Example:
    """One variant of a clip, or a text without audio."""
    entry, text = index.entries[number], index.text(number)
    if not entry.key:
        return Example(text[0], name=entry.id)
    return Example(text[0], index.codes(number, version), text[1 + version] if aligned else None, name=entry.id)


def joined_example(index: Index, number: int, versions: Sequence[int], aligned: bool) -> Example:
    """Clips joined: codes one behind the other (frames of the codec are local), words with the frames before them added."""
    entry = index.entries[number]
    clips = [clip_example(index, part, version, aligned) for part, version in zip(entry.parts, versions, strict=True)]
    codes = torch.cat([clip.codes for clip in clips], dim=1)                    # (Q, T1) ... -> (Q, T)
    if not aligned:
        return Example(index.text(number)[0], codes, name=entry.id)
    before = accumulate((clip.codes.shape[1] for clip in clips), initial=0)     # frames
    starts = torch.cat([clip.starts + frames for clip, frames in zip(clips, before, strict=False)])
    return Example(torch.cat([clip.text for clip in clips]), codes, starts, name=entry.id)


def build_example(index: Index, number: int, table: StreamTable, draw: random.Random | None = None, reference: int = -1) -> Example:
    """Example of an entry: variants drawn with `draw`, or the clips as they are. Its own reference goes before a drawn one."""
    entry = index.entries[number]
    if index.chat is not None:
        return chat_example(index, number, draw, reference)
    if entry.chunk:
        return dialogue_example(index, number, draw_version(index, number, draw), max(table.delays) + 1)
    versions = [draw_version(index, n, draw) for n in entry.parts or [number]]
    example = (joined_example(index, number, versions, table.aligned) if entry.parts
               else clip_example(index, number, versions[0], table.aligned))
    if index.info["duplex"] and example.codes is not None:
        example.codes, example.user = example.codes.chunk(2)                    # left is the agent, right the user
    reference = entry.reference if entry.reference >= 0 else reference
    if reference >= 0:
        example.reference = build_example(index, reference, table, draw)
    return example


def draw_version(index: Index, number: int, draw: random.Random | None) -> int:
    return draw.randrange(max(1, len(index.entries[number].frames))) if draw else 0


def dialogue_example(index: Index, number: int, version: int, context: int) -> Example:
    """A chunk of a dialogue, with `context` frames of what was before where there is something: left agent, right user."""
    entry = index.entries[number]
    n, chunks = entry.chunk
    T, at = entry.frames[version], sum(entry.frames[:version])
    begin, end = T * n // chunks, T * (n + 1) // chunks
    first = max(0, begin - context)
    agent, user = index.codes(number, version)[:, first:end].chunk(2)
    text = index.text(number - n)[0, at + first : at + end]             # all chunks share the row of the first
    codes = {"codes": user, "user": agent} if entry.swapped else {"codes": agent, "user": user}
    told = torch.tensor(entry.conditions, dtype=torch.long) if entry.conditions else None
    weights = duplex.text_weights(text, *index.padding)
    return Example(text, **codes, weights=weights, conditions=told, before=begin - first, name=entry.id)


def chat_example(index: Index, number: int, draw: random.Random | None, reference: int) -> Example:
    """An entry as a conversation: its own messages, or the official clone prompt around its transcript and recording."""
    def codes(n: int) -> Tensor:
        return torch.cat([index.codes(part, draw_version(index, part, draw)) for part in index.entries[n].parts or [n]], dim=1)

    entry = index.entries[number]
    if entry.messages:
        return chat_of(index.chat.segments(entry.messages, [codes(n) for n in entry.clips], entry.start), entry.id)
    if index.chat.template is not HIGGS:
        return chat_of(index.chat.plain(entry.text), entry.id)
    own, reference = codes(number), entry.reference if entry.reference >= 0 else reference
    references = [(index.entries[reference].text, codes(reference))] if reference >= 0 else []
    return chat_of(index.chat.spoken(entry.text, own, references, entry.scene), entry.id)


def chat_of(segments: list[Segment], name: str) -> Example:
    return Example(torch.zeros(0, dtype=torch.long), segments=segments, name=name)


def prompt_example(text: str, config: DataConfig, tokenizer: Tokenizer, codec: Any = None, voices: Sequence[tuple[str, str]] = (),
                   table: StreamTable | None = None, before: Sequence[tuple[str, Tensor]] = (), reply: str = "") -> Example:
    """Build what sampling starts from: a text and, for cloning, `voices`: (wav file, its transcript), or ("", "profile:...").

    `table` tells aligned rows and conversations from plain sequences; a conversation goes on behind `before`, pairs of
    text and codes that were spoken already. `reply` asks for "text" or "speech" where a model has both.
    """
    aligned, chat = table is not None and table.aligned, new_chat(config, tokenizer, table)

    def ids(text: str) -> Tensor:
        words = normalise(text, config.normaliser)
        if not words.strip():
            raise ValueError(f"text {text!r} is empty under normaliser {config.normaliser}; give it some words")
        return torch.tensor([i for part in (words.split() if aligned else [words]) for i in tokenizer.encode(part)])

    example = Example(ids(text), name="prompt")
    nothing = torch.zeros(0, 0, dtype=torch.long)
    found = [(said, reference_codes(name, said, config, codec) if name else nothing) for name, said in voices]
    if chat is not None:
        return chat_of(chat.prompt(text, found, before=before, reply=reply), "prompt")
    if voices and (len(voices) > 1 or not voices[0][0] or (table is not None and table.layout != "clone")):
        raise ValueError("this model does not clone voices like that; only one of layout clone takes a --ref, one of layout chatml several")
    for said, codes in found:
        example.reference = Example(ids(said), codes, name=voices[0][0])
    return example


def spoken_prompt(index: Index, number: int, voice: int, config: DataConfig, table: StreamTable) -> Example:
    """The prompt that asks for what an entry says, in the voice of another entry (-1 = none)."""
    entry = index.entries[number]
    if index.chat is not None:
        voices = [(index.entries[voice].text, index.codes(voice, 0))] if voice >= 0 else []
        return chat_of(index.chat.prompt(entry.text, voices, entry.scene), entry.id)
    example = prompt_example(entry.text, config, load_tokenizer(config.tokenizer), table=table)
    example.reference = clip_example(index, voice, 0, table.aligned) if voice >= 0 else None
    return example


def reply_example(messages: list[dict[str, Any]], codes: Sequence[Tensor], config: DataConfig, tokenizer: Tokenizer, table: StreamTable,
                  reply: str = "") -> Example:
    """Build what a reply to messages starts from; `codes` (Q, T) of their recordings, `reply` "text" or "speech" ("" = if it can)."""
    chat = new_chat(config, tokenizer, table)
    if chat is None:
        raise ValueError(f"a model of layout {table.layout!r} knows no conversation; give it --text")
    return chat_of(chat.segments(messages, codes, reply=reply or ("speech" if chat.template.speak else "text")), "prompt")


def reference_codes(name: str, said: str, config: DataConfig, codec: Any) -> Tensor:
    """Codes (Q, T) of a reference recording; ValueError when it cannot serve as one."""
    name_warnings([{"id": name, "file": name}])
    try:
        wav, rate = usable_clip({"file": name, "text": said}, (config.min_seconds, config.max_seconds))
    except ValueError as error:
        raise ValueError(f"reference {name}: {'; '.join(error.args)}") from None
    return encode(codec, resample(wav, rate, codec.sample_rate).clamp(-1, 1))
