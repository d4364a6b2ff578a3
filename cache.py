"""The token cache: manifest rows -> codes and ids on disk. Nothing is encoded twice and training never runs a codec.

    CACHE/codes/<hash>.safetensors      uint16 codes of ~64 clips, keyed by a hash of everything that made them
    CACHE/<hash>/index.json             the examples of one DataConfig, each an `Entry`
    CACHE/<hash>/text.safetensors       beside it: their int32 ids and, where text is aligned, its first frames

`prepare` writes, `open_cache` opens. A clip is stored in `variants` versions, one behind the other, that differ a
little in time, gain and speed: with a single code sequence per clip a model could ignore the text. Another split,
tokenizer or normaliser is another index over the same codes. Next: data.py.
"""

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from audio import load_codec
from audio.wav import RESAMPLER, resample
from manifest import Bad, Manifest, Row, digest, fraction, read_manifest, usable_clip
from options import FULL, check_types, read_json, replace_file, write_json
from streams import StreamTable
from text import NORMALISERS, Tokenizer, aligned_ids, frame_starts, load_tokenizer, normalise

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
    normaliser: str = "none"                # "none", "english-v1" or "arabic-v1"; stored in the checkpoint
    variants: int = 1                       # encoded versions of a clip: shift < 1 frame, 3 dB, 6 % speed, noise; first as it is
    split: str = "hash"                     # "hash", "speaker" or "manifest" (the rows' own "split")
    held_out: float = 0.05                  # fraction for validation under hash and speaker
    columns: int = 1200                     # columns of one packed row
    window: int = 256                       # examples that packing may choose from
    max_seconds: float = 30.0               # longer clips are left out
    min_seconds: float = 0.2                # shorter clips are left out
    reference: float = 0.0                  # probability that another clip of the same speaker goes before an example
    stream_weights: tuple[float, ...] = ()  # factor on the target weights of each row of the grid; () = ones
    seed: int = 0                           # of drawing, shuffling, variants and references
    workers: int = 0                        # clips that prepare encodes at once, a core each; 0 = one
    prefetch: int = 4                       # batches built ahead by a thread; 0 = none
    allow_outside: bool = False             # manifests may name files outside their folder

    def __post_init__(self) -> None:
        check_types(self)
        assert self.normaliser in NORMALISERS, f"normaliser {self.normaliser!r} is unknown; choose one of {', '.join(NORMALISERS)}"
        assert min(self.variants, self.columns, self.window) > 0, "variants, columns and window are at least 1"
        assert min(self.workers, self.prefetch) >= 0, "workers and prefetch are not negative"
        assert 0 <= self.held_out < 1 and 0 <= self.reference <= 1, "held_out is in [0, 1), reference in [0, 1]"
        assert 0 <= self.min_seconds <= self.max_seconds, "min_seconds is at most max_seconds"


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


@dataclass
class Index:
    """A prepared data set. Files open on first use and stay mapped."""

    folder: Path
    info: dict[str, Any]                                # version, frame_rate, duplex
    entries: list[Entry]
    files: dict[str, Any] = field(default_factory=dict)

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
    manifests = [read_manifest(source_weight(s)[0], config.allow_outside) for s in config.sources]
    encoded = store_codes(manifests, codec, duplex, config) if codec else 0
    info = {"version": CACHE_VERSION, "frame_rate": codec.frame_rate if codec else 0.0, "duplex": duplex}
    indexer = Indexer(Index(index_folder(config, table), info, []), config, table, tokenizer, joined_audio(manifests))
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
    untimed = sum("words" not in row and "parts" not in row for m in manifests for row in m.rows) if table.aligned else 0
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
        clip["key"] = sha(CACHE_VERSION, clip["mark"], version, RESAMPLER, config.variants, duplex)
        if clip["key"] not in stored:
            jobs[clip["key"]] = clip
    bad = encode_missing(jobs, folder, codec, duplex, config)
    stored = scan(folder) if jobs else stored
    for m, clip in clips:
        if clip["key"] in bad:
            m.reject(clip["id"], bad[clip["key"]].reason, bad[clip["key"]].fix)
        elif clip["key"]:
            clip["shard"], clip["frames"] = stored[clip["key"]]
    return len(jobs) - len(bad)


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
    return [encode(codec, vary(wav, key, v, hop)).numpy().astype(np.uint16) for v in range(config.variants)]


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


def vary(wav: Tensor, key: str, number: int, hop: float) -> Tensor:
    """Version `number` of a clip (C, W)."""
    if number == 0:
        return wav
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
                                    config.allow_outside, table.aligned, len(table.audio))[:12]


def open_cache(config: DataConfig, table: StreamTable) -> Index:
    """Open what `prepare` wrote for this config; raises FileNotFoundError when it has not run."""
    folder = index_folder(config, table)
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(f"no prepared data in {folder} for this config; run `python data.py prepare CONFIG.py`")
    found = read_json(folder / "index.json", MAX_INDEX)
    try:
        return Index(folder, found, [Entry(**entry) for entry in found.pop("entries")])
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
    texts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, m: Manifest, source: int) -> None:
        """Append the usable rows of a manifest and reject the others."""
        drawn, numbers = {row["id"] for row in m.rows}, {}
        for row in m.clips.values():                    # parts and references stand before the rows that use them
            entry = Entry(row["id"], row["text"], source, "", str(row.get("speaker") or ""), str(row.get("group") or ""))
            try:
                if self.table.audio:
                    self.locate(entry, row, numbers)
                text = self.text(entry, row)
            except LookupError:                         # its audio was rejected before
                continue
            except ValueError as error:
                m.reject(row["id"], str(error), "mend or remove the row")
                continue
            if row["id"] in drawn:
                entry.split = "train" if row["mark"] in self.joined else split_of(row, row["mark"] or row["text"], self.config)
            numbers[row["id"]] = len(self.index.entries)
            if text is not None:
                self.texts[str(len(self.index.entries))] = text
            self.index.entries.append(entry)

    def locate(self, entry: Entry, row: Row, numbers: dict[str, int]) -> None:
        """Fill in where the codes of an entry are; LookupError for audio that was rejected, ValueError for a new reason."""
        entry.reference = numbers.get(f"{row['id']}#reference", -1)
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

    def text(self, entry: Entry, row: Row) -> np.ndarray | None:
        """Ids of a row (1, n) and, in aligned layouts, the first frame of each under every variant (1 + V, n)."""
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
        return np.array([ids, *starts], dtype=np.int32)
