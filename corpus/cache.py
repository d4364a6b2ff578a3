"""The token cache: recordings -> codes on disk. Nothing is encoded twice and training never runs a codec.

    CACHE/codes/<hash>.safetensors          uint16 codes of 64 clips or more, keyed by a hash of audio, codec and options; a key's
                                            metadata are the frames of each variant and the checksum of its codes
    CACHE/<hash>/<content>.json             the index of one DataConfig: a line about it, then a line for each example, an `Entry`
    CACHE/<hash>/<content>.safetensors      beside it: their int32 ids and, where text is aligned, its first frames
    CACHE/<hash>/index.json                 the <content> that holds now, and the one before

What is open is mapped and read by ranges: in memory an index takes less than 100 bytes a row, wherever the rows lie.

A clip is stored in `variants` versions, concatenated, that differ slightly in time, gain and speed: with a single code
sequence per clip a model could memorise the codes and ignore the text. Next: index.py.
"""

import hashlib
import json
import mmap
import random
import re
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from audio import augment
from audio.augment import AugmentConfig
from audio.wav import RESAMPLER, resample
from corpus.checks import Verdicts, judge, read_clip
from corpus.data_config import DataConfig, source_weight
from corpus.layouts import read_manifest
from corpus.manifest import Manifest, RejectedRow, Row
from options import FULL, out_of_memory, read_json, write_json
from system.files import checksum, replace_file
from system.progress import Progress, torch_threads, workers
from text.conversation import Chat

SUM = "sum:"                # stands before a checksum
SHARD, SHARDS = 64, 4096    # clips per shard, which an interrupted `prepare` encodes again; more than 64 where shards would be too many
CACHE_VERSION = "1"         # part of every key: change it when the same input would be encoded or split differently
LAYOUT = 2                  # of index.json and what it names; one of an older layout is written anew
SPLITS = ("", "train", "held-out")
KEPT = 4096                 # entries that stay in memory once they were read
NUMBERS = ("shard", "parts", "reference", "rejected", "clips")      # fields of an entry that say where others are


def encode_sources(config: DataConfig, codec: Any, duplex: bool, shard: tuple[int, int] = (0, 1),
                   silence: tuple[int, int] = (0, 0)) -> tuple[list[Manifest], int]:
    """Read the sources of a config, judge their recordings and encode what is not cached; `codec` None for texts alone.

    Of a shard, (its number, how many), only its clips: which these are follows from their ids. Returns the manifests and how many
    clips were encoded.
    """
    manifests = [read_manifest(source_weight(s)[0], config.allow_outside, config.assistant_text, config.agent) for s in config.sources]
    if codec is None:
        return manifests, 0
    verdicts = Verdicts(Path(config.cache) / "verdicts")
    for m in manifests:
        m.clips = {name: clip for name, clip in m.clips.items() if zlib.crc32(name.encode()) % shard[1] == shard[0]}
        judge(m, (config.min_seconds, config.max_seconds), config.doubtful, config.max_seconds, verdicts, duplex, config.workers)
    return manifests, store_codes(manifests, codec, duplex, config, silence)


def store_codes(manifests: list[Manifest], codec: Any, duplex: bool, config: DataConfig, silence: tuple[int, int] = (0, 0)) -> int:
    """Encode every clip that is not in a shard yet, of manifests that were judged (checks.py), with so many frames of `silence`
    in front and behind. Clips get key, shard and frames; returns how many were encoded."""
    folder, version = Path(config.cache) / "codes", codec_version(codec)
    stored, jobs = stored_clips(folder), {}
    clips = [(m, clip) for m in manifests for clip in m.clips.values() if clip["file"]]
    for _, clip in clips:
        clip["key"] = hash_of(CACHE_VERSION, clip["mark"], version, RESAMPLER, config.variants, duplex,
                          *([config.augment] if config.augment else []), *([silence] if any(silence) else []))
        if clip["key"] not in stored:
            jobs[clip["key"]] = clip
    bad = encode_missing(jobs, folder, codec, duplex, config, silence)
    stored = stored_clips(folder) if jobs else stored
    for m, clip in clips:
        if clip["key"] in bad:
            m.reject(clip["id"], bad[clip["key"]].reason, bad[clip["key"]].fix)
        elif clip["key"]:
            clip["shard"], clip["frames"] = stored[clip["key"]]
    return len(jobs) - len(bad)


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def codec_version(codec: Any) -> str:
    """Hash of a codec's name and weights: a codec with other weights gets another cache key."""
    hashed = hashlib.sha256(codec.name.encode())
    for name, value in sorted(codec.state_dict().items() if hasattr(codec, "state_dict") else {}):
        hashed.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def encode_missing(jobs: dict[str, Row], folder: Path, codec: Any, duplex: bool, config: DataConfig,
                   silence: tuple[int, int]) -> dict[str, RejectedRow]:
    """Encode clips into shards, each written atomically, so a killed run repeats the last one only. Returns the unusable clips by key."""
    bad: dict[str, RejectedRow] = {}
    left, progress = iter(jobs), Progress("encoding", len(jobs), "clips")
    with progress, torch_threads(1), ThreadPoolExecutor(workers(config.workers)) as pool:
        while keys := list(islice(left, max(SHARD, len(jobs) // SHARDS))):
            frames, arrays = {}, {}
            found = pool.map(lambda key: encode_or_reject(key, jobs[key], codec, duplex, config, silence), keys)
            for key, codes in zip(keys, found, strict=True):
                progress.add()
                if isinstance(codes, RejectedRow):
                    bad[key] = codes
                else:
                    arrays[key] = np.concatenate(codes, axis=1)
                    frames[key] = " ".join([*(str(c.shape[1]) for c in codes), SUM + checksum(arrays[key])])
            if arrays:                                  # named after its content
                write_tensors(folder / f"{hash_of(*arrays)[:16]}.safetensors", arrays, frames)
    return bad


def encode_or_reject(key: str, row: Row, codec: Any, duplex: bool, config: DataConfig,
                     silence: tuple[int, int]) -> list[np.ndarray] | RejectedRow:
    """Encode a clip; whatever goes wrong with it is its reason to be left out, and the others go on."""
    try:
        return encode_clip(key, row, codec, duplex, config, silence)
    except Exception as error:
        if out_of_memory(error):                        # that is no fault of the clip
            raise
        return RejectedRow(row["id"], "encoding failed", f"{type(error).__name__}: {error}; check the recording, or leave the row out")


def encode_clip(key: str, row: Row, codec: Any, duplex: bool, config: DataConfig,
                silence: tuple[int, int]) -> list[np.ndarray] | RejectedRow:
    """Encode all variants of a clip, each (C * Q, T) uint16, or say why it cannot be used. `silence`: frames before and behind it."""
    try:
        wav, rate = read_clip(row, (config.min_seconds, config.max_seconds))
    except ValueError as error:
        return RejectedRow(row["id"], *error.args)
    wav = resample(wav if duplex else wav[:1], rate, codec.sample_rate)
    hop = codec.sample_rate / codec.frame_rate
    versions = (make_variant(wav, key, v, hop, config.augment, codec.sample_rate) for v in range(config.variants))
    still = tuple(round(frames * hop) for frames in silence)
    return [encode(codec, torch.nn.functional.pad(version, still)).numpy().astype(np.uint16) for version in versions]


def encode(codec: Any, wav: Tensor) -> Tensor:
    """Codes of a clip: (C, W) -> (C * Q, T), channels stacked."""
    with torch.inference_mode():
        codes = codec.encode(wav[:, None])              # (C, 1, W) -> (C, Q, T)
    return codes.flatten(0, 1).clone()


def variant_parameters(key: str, number: int) -> tuple[float, float, float]:
    """Shift in frames, gain in dB and speed of a variant. Number 0 is the unchanged clip."""
    if number == 0:
        return 0.0, 0.0, 1.0
    draw = random.Random(f"{key}/{number}")
    return draw.random(), draw.uniform(-3, 3), draw.randint(-3, 3) / 50 + 1      # steps of 2 %: short resampling filters


def word_shift(key: str, number: int, rate: float, config: AugmentConfig | None) -> tuple[float, float]:
    """The delay in seconds and the speed of the words in a variant; `rate` is the codec's frame rate in Hz."""
    if config is None or number == 0:
        shift, _, speed = variant_parameters(key, number)
        return shift / rate, speed
    change = augment.draw(config, f"{key}/{number}")
    return max(0.0, -change.shift), change.speed


def make_variant(wav: Tensor, key: str, number: int, hop: float, config: AugmentConfig | None = None, rate: int = 0) -> Tensor:
    """Variant `number` of a clip.   wav (C, W) -> (C, W')"""
    if number == 0:
        return wav
    if config is not None:
        return augment.apply(wav, rate, augment.draw(config, f"{key}/{number}"), augment.recordings(config.noise_dir))
    shift, gain, speed = variant_parameters(key, number)
    wav = resample(wav, round(100 * speed), 100) * 10 ** (gain / 20)
    wav = torch.nn.functional.pad(wav, (round(shift * hop), 0))
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(int(key[:12], 16) + number))
    return (wav + 1e-3 * noise).clamp(-1, 1)            # -60 dBFS


def stored_clips(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """The clips in the shards of a cache, read from their headers: key -> shard, frames of each variant."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, said in open_shard(path).said.items():
            try:
                found[key] = path.name, [int(n) for n in said.split(SUM)[0].split()]
            except ValueError as error:
                raise ValueError(damaged_message(path, error)) from None
    return found


@dataclass
class Shard:
    """An open file of arrays (safetensors), mapped; `said` holds what was written beside each: its frames and its checksum."""

    path: Path
    data: mmap.mmap
    arrays: dict[str, tuple[int, list[int]]]            # where each begins, and its shape
    said: dict[str, str]

    def place(self, key: str) -> tuple[int, int, int, int]:
        """Where an array begins, its rows and columns, and its checksum or -1."""
        frames, known, found = self.said.get(key, "").partition(SUM)
        begin, shape = self.arrays.get(key, (0, []))
        if len(shape) != 2 or re.fullmatch(r"[\d ]*", frames) is None or known and re.fullmatch("[0-9a-f]{1,8}", found) is None:
            raise ValueError(damaged_message(self.path, f"{key} has the shape {shape}" if key in self.arrays else f"it has no {key}"))
        return begin, *shape, int(found, 16) if known else -1


def mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def open_shard(path: Path) -> Shard:
    try:
        data = mapped(path)
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        about = header.pop("__metadata__", {})
        said = json.loads(about["arrays"]) if "arrays" in about else {k: v for k, v in about.items() if k != "format"}
        if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
            raise ValueError("its header says nothing of its arrays")
        found = {key: (begin + one["data_offsets"][0], one["shape"]) for key, one in header.items()}
        end = max((one["data_offsets"][1] for one in header.values()), default=0)
        if begin + end != len(data) or any(one["dtype"] not in ("U16", "I32") for one in header.values()):
            raise ValueError(f"it has {len(data)} bytes, its header says {begin + end}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; run `python data.py prepare CONFIG.py` again") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(damaged_message(path, error)) from None
    return Shard(path, data, found, said)


def damaged_message(path: Path, what: object) -> str:
    return f"{path} is damaged ({what}); delete it and run `python data.py prepare CONFIG.py` again"


def write_tensors(path: Path, arrays: dict[str, np.ndarray], said: dict[str, str]) -> None:
    """Write arrays and what is said of each; as one text, so that the same arrays are the same bytes (safetensors shuffles keys)."""
    about = {"arrays": json.dumps(said)}
    try:
        replace_file(path, lambda temporary: save_file(arrays, temporary, about))
    except SafetensorError as error:                    # a full disk, for one
        raise OSError(f"{path} cannot be written ({error}); {FULL}") from None


# ---- the index ----

@dataclass
class Entry:
    """One line of the index: a clip, clips joined, or a text."""

    id: str
    text: str
    source: int = 0                                     # which of DataConfig.sources
    split: str = "train"                                # "train", "held-out", or "" for clips that other entries use
    speaker: str = ""
    group: str = ""
    shard: str = ""                                     # file of its codes
    key: str = ""
    frames: list[int] = field(default_factory=list)     # of each variant
    parts: list[int] = field(default_factory=list)      # entries that are joined
    reference: int = -1                                 # entry of its own reference clip
    rejected: int = -1                                  # entry of the rejected reply of a preference pair
    messages: list[dict[str, Any]] = field(default_factory=list)    # a conversation as it was with_transcripts
    clips: list[int] = field(default_factory=list)      # entries of its recordings, in reading order
    start: int | None = None                            # its first message that is trained, None = the default
    scene: str = ""                                     # its scene description
    chunk: list[int] = field(default_factory=list)      # of a dialogue: its number, and how many there are
    swapped: bool = False                               # of a dialogue: the right channel is the agent
    conditions: list[int] = field(default_factory=list) # of a dialogue: ids of the condition rows
    role: list[int] = field(default_factory=list)       # of a dialogue: ids of the role that stands in front of it


class Entries(Sequence[Entry]):
    """The entries of an index file, each read from its line when it is asked for: in memory are the places of the lines."""

    def __init__(self, lines: mmap.mmap, path: Path) -> None:
        self.lines, self.path = lines, path
        self.at = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1          # the first line is no entry
        self.known: OrderedDict[int, Entry] = OrderedDict()

    def __len__(self) -> int:
        return max(0, len(self.at) - 1)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        if number not in self.known:
            self.known[number] = self.read(number)
            if len(self.known) > KEPT:
                self.known.popitem(last=False)
        return self.known[number]

    def __iter__(self) -> Iterator[Entry]:
        return map(self.read, range(len(self)))                                 # a look at all of them keeps none

    def read(self, number: int) -> Entry:
        try:
            return Entry(**json.loads(self.lines[self.at[number] : self.at[number + 1]]))
        except (TypeError, ValueError) as error:
            raise ValueError(damaged_message(self.path, error)) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class Places:
    """Where the arrays of the entries lie: the file, the place in it, shape and checksum, 30 bytes each; no file's header is kept."""

    def __init__(self, count: int) -> None:
        self.table = np.zeros(count, [("file", "i4"), ("begin", "i8"), ("rows", "u4"), ("columns", "u4"), ("sum", "i8")])
        self.table["file"] = -1

    def put(self, number: int, file: int, shard: Shard, key: str) -> None:
        self.table[number] = (file, *shard.place(key))

    def read(self, number: int, files: Sequence[tuple[Path, mmap.mmap]], kind: type) -> np.ndarray:
        """One array, compared with its checksum where it has one; ValueError names the file."""
        file, begin, rows, columns, known = self.table[number].tolist()
        path, data = files[max(file, 0)]
        if file < 0:
            raise ValueError(damaged_message(path, f"it has no array {number}"))
        found = np.frombuffer(data, kind, rows * columns, begin)
        if known >= 0 and int(checksum(found), 16) != known:
            raise ValueError(damaged_message(path, f"the checksum of array {number} differs"))
        return found.reshape(rows, columns)


@dataclass
class Index:
    """A prepared data set. Its files open together and stay mapped."""

    folder: Path
    info: dict[str, Any]                                # version, frame_rate, duplex
    entries: Sequence[Entry]
    chat: Chat | None = None                            # chat template and tokenizer, for families with conversations
    padding: tuple[float, int, int] = (0.5, 3, 0)       # weight of padding in the text row of a dialogue, and its ids
    content: str = ""                                   # the name of its files
    verdict: list[str] = field(default_factory=list)    # how many rows are kept and left out, as lines to print
    files: list[tuple[Path, mmap.mmap]] | None = None   # its text file, and the shards of its codes
    texts: Places | None = None
    recordings: Places | None = None
    heads: np.ndarray | None = None                     # of each entry its source, its split and the speaker of its own clip, as numbers
    speakers: list[str] = field(default_factory=list)   # their names; the number of no speaker is 0

    def text(self, number: int) -> Tensor:
        """Ids of an entry and, where text is aligned, the first frame of each under every variant.   (1 or 1 + V, n)"""
        return torch.from_numpy(self.open().texts.read(number, self.files, np.int32).astype(np.int64))

    def codes(self, number: int, version: int) -> Tensor:
        """Codes of one variant of a clip, two channels stacked.   (C * Q, T)"""
        entry = self.entries[number]
        found = self.open().recordings.read(number, self.files, np.uint16)
        if found.shape[1] != sum(entry.frames):
            raise ValueError(damaged_message(self.path(entry.shard), f"{entry.id}: {found.shape} codes"))
        begin = sum(entry.frames[:version])
        return torch.from_numpy(found[:, begin : begin + entry.frames[version]].astype(np.int64))

    def path(self, shard: str) -> Path:
        return self.folder.parent / "codes" / shard if shard else self.folder / f"{self.content}.safetensors"

    def open(self) -> "Index":
        """Map all files: what happens to their names from now on does not matter. Of their headers only places are kept."""
        if self.files is not None:
            return self
        count, own = len(self.entries), open_shard(self.path(""))
        texts, recordings = Places(count), Places(count)
        for key in own.arrays:
            if not key.isdecimal() or int(key) >= count:
                raise ValueError(damaged_message(own.path, f"array {key[:40]} belongs to no entry"))
            texts.put(int(key), 0, own, key)
        files = [(own.path, own.data)]
        del own                                                                  # its header is long: first it goes, then the next comes
        heads = np.zeros(count, [("source", "i2"), ("split", "i1"), ("speaker", "i4")])
        keys, shard_of, shards, speakers = np.zeros(count, "S32"), np.zeros(count, np.int32), {"": 0}, {"": 0}
        for n, entry in enumerate(self.entries):
            speaker = speakers.setdefault(entry.speaker if entry.key else "", len(speakers))
            heads[n] = entry.source, SPLITS.index(entry.split), speaker
            keys[n], shard_of[n] = entry.key, shards.setdefault(entry.shard, len(shards))
        order, bounds = np.argsort(shard_of, kind="stable"), np.cumsum(np.bincount(shard_of, minlength=len(shards)))
        for name, first, last in zip([*shards][1:], bounds[:-1], bounds[1:], strict=True):
            shard = open_shard(self.path(name))
            for n in order[first:last].tolist():
                recordings.put(n, len(files), shard, keys[n].decode())
            files.append((shard.path, shard.data))
        self.texts, self.recordings, self.heads, self.speakers, self.files = texts, recordings, heads, list(speakers), files
        return self

    def write(self, texts: dict[str, np.ndarray], said: dict[str, Any]) -> None:
        """Write the index; files of the same content stay as they are, those of the content before too."""
        lines = [self.info, *(vars(entry) for entry in self.entries)]
        about = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        sums = {key: SUM + checksum(array.data.cast("B")) for key, array in texts.items()}
        self.content = hashlib.sha256(about + json.dumps(sums).encode()).hexdigest()[:16]
        now = {"layout": LAYOUT, "content": self.content, "checksum": checksum(about), "before": "", "verdict": self.verdict} | said
        try:
            before = current(self.folder)
        except ValueError as error:
            print(f"{error}: written anew", file=sys.stderr)
            before = None
        same = before and before["content"] == self.content and self.path("").is_file() and (self.folder / f"{self.content}.json").is_file()
        if same and before == now | {"before": before["before"]}:
            return
        write_tensors(self.path(""), texts, sums)
        replace_file(self.folder / f"{self.content}.json", lambda temporary: Path(temporary).write_bytes(about))
        if before:
            now["before"] = before["before"] if before["content"] == self.content else before["content"]
        write_json(self.folder / "index.json", now)
        for path in self.folder.iterdir():
            if path.stem not in ("index", self.content, now["before"]) and path.suffix in (".json", ".safetensors"):
                path.unlink()

    def changes(self, before: str) -> list[str]:
        """What differs between this index and the one that a run was saved with, as lines to print."""
        if before in ("", self.content):
            return []
        old = self.folder / f"{before}.json"
        found = list(map(vars, open_entries(old)[1])) if old.is_file() else None
        says = "the data has changed since the checkpoint was written"
        then = "the run goes on with the rows as they are now, at the same number of draws: a pass may repeat or miss some"
        if found is None:
            return [f"{says} (which rows is not known any more); {then}"]
        rows = [{row["id"]: [v for k, v in row.items() if k not in NUMBERS] for row in side} for side in (found, map(vars, self.entries))]
        both = rows[0].keys() & rows[1].keys()
        sides = {"added": rows[1].keys() - both, "gone": rows[0].keys() - both, "edited": {n for n in both if rows[0][n] != rows[1][n]}}
        named = [f"{len(ids)} {what} ({', '.join(sorted(ids)[:3])}{', ...' if len(ids) > 3 else ''})" for what, ids in sides.items() if ids]
        return [f"{says}: {', '.join(named) or 'the same rows in another order'}; {then}"]


def open_entries(path: Path, expected_sum: str = "") -> tuple[dict[str, Any], Entries]:
    """The first line of an index file and its entries; ValueError where it is damaged."""
    try:
        lines = mapped(path)
        if expected_sum and checksum(lines) != expected_sum:
            raise ValueError("its checksum differs")
        found = Entries(lines, path)
        info = json.loads(lines[: found.at[0]])
        if not isinstance(info, dict):
            raise ValueError("its first line is no object")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; run `python data.py prepare CONFIG.py` again") from None
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise ValueError(damaged_message(path, error)) from None
    return info, found


def current(folder: Path) -> dict[str, Any] | None:
    """What index.json of a folder of the cache says; None where there is none, or one of an older layout."""
    if not (folder / "index.json").is_file():
        return None
    found = read_json(folder / "index.json")
    if isinstance(found, dict) and ("entries" in found or "content" in found and found.get("layout") != LAYOUT):
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("content", "checksum", "before")):
        raise ValueError(damaged_message(folder / "index.json", "it does not say which index holds"))
    return found
