"""Data: manifest -> token cache -> packed batches.

    python data.py check FOLDER [--write DIR]          what a source holds, what is wrong with it, and how to mend it
    python data.py prepare configs/X.py [--data.x=y]   encode once what is not cached yet; training never runs a codec
    python data.py show configs/X.py [--index 0]       one example as the model sees it

A source is a manifest (manifest.py says what may stand in it) or anything that it converts. `prepare` writes

    CACHE/codes/<hash>.safetensors   uint16 codes of ~64 clips, keyed by a hash of everything that made them
    CACHE/<hash>/index.json          the examples of one DataConfig; text.safetensors beside it has their int32 ids

and `show` prints an example, here two clips joined by a compose rule (a `*` is a target):

    digits+0/500  train  'eight five'
    word          -1    106    106    106    106    120 ...     the word that is spoken, held for its whole length
    advance       -1      1      0*     0*     0*     1* ...    a word begins
    cb1          256    256    256    195*   146*   189* ...    trails the text by 2 frames, cb2 by 3, ...

`Loader` draws, lays out with streams.py and packs examples into rows. All randomness derives from (seed, number of
the draw), so its whole state is a few counters, and any number of ranks reads one global sequence. Next: train.py.
"""

import functools
import hashlib
import json
import multiprocessing
import queue
import random
import re
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
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
from audio.wav import RESAMPLER, load_wav, resample
from manifest import Bad, Manifest, Row, check, digest, faults, fraction, read_clip, read_manifest
from options import FULL, apply, check_types, edge, help_text, load_config, read_json, replace_file, split_arguments, write_json
from streams import Example, Grid, StreamTable, lay_out, show

SHARD = 64                  # clips per shard: what an interrupted `prepare` can lose
CACHE_VERSION = "1"         # part of every key: change it when the same input would be encoded or split differently
MAX_INDEX = 4 << 30         # bytes
MAX_TOKENIZER = 256 << 20   # bytes


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
    workers: int = 0                        # processes for prepare; 0 = this one
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
class Batch:
    """Packed rows, padded to the longest one rounded up to 8 columns."""

    tokens: Tensor              # (B, K, S) int64, -1 = nothing here
    weights: Tensor             # (B, K, S) float32, 0 = not a target
    positions: Tensor           # (B, S) int64, restarts at 0 in every example
    segments: Tensor            # (B, S) int64, number of the example in its row, -1 = padding
    names: list[list[str]]      # ids of the examples of each row
    state: dict[str, Any]       # `Loader.restore(state)` continues behind this batch


@dataclass
class Entry:
    """One line of the index: a clip, or clips joined."""

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
    codes: Path
    info: dict[str, Any]
    entries: list[Entry]
    files: dict[Path, Any] = field(default_factory=dict)

    def tensor(self, path: Path, key: str) -> Tensor:
        if path not in self.files:
            self.files[path] = open_shard(path)
        try:
            return torch.from_numpy(self.files[path].get_tensor(key).astype(np.int64))
        except SafetensorError as error:
            raise ValueError(damaged(path, error)) from None


# ---- text ----

DIGITS = "zero one two three four five six seven eight nine".split()
ARABIC = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹،؛؟٪٫٬۔«»", "01234567890123456789,;?%.,.\"\"", "\u0640")


def english(text: str) -> str:
    """Lower-case words without punctuation, apostrophes inside words kept, digits spelled one by one."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = re.sub(r"\d", lambda d: f" {DIGITS[int(d[0])]} ", text)
    return re.sub(r"[^\w\s']|_|(?<!\w)'|'(?!\w)", " ", text)


def arabic(text: str) -> str:
    """Fold presentation forms, drop tatweel and bidi or zero-width marks, map digits and punctuation. Letters and
    diacritics stay as they are written."""
    text = re.sub("[\ufb50-\ufdff\ufe70-\ufefc]+", lambda form: unicodedata.normalize("NFKC", form[0]), text)
    text = re.sub("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]", "", text)
    return unicodedata.normalize("NFC", text).translate(ARABIC)


NORMALISERS: dict[str, Callable[[str], str]] = {"none": str, "english-v1": english, "arabic-v1": arabic}


def normalise(text: str, name: str) -> str:
    """Apply a versioned normaliser and fold white space; what a name means never changes."""
    if name not in NORMALISERS:
        raise ValueError(f"normaliser {name!r} is unknown; choose one of {', '.join(NORMALISERS)}")
    return " ".join(NORMALISERS[name](text).split()) if name != "none" else text


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> ids 0..size-1. `content` is the file it was read from."""

    name: str
    size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    content: bytes = b""

    def save(self, folder: str | Path) -> str:
        """Write its file into a folder; returns what load_tokenizer wants, relative to that folder."""
        if self.content:
            replace_file(Path(folder) / self.name, lambda temporary: Path(temporary).write_bytes(self.content))
        return self.name


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load "bytes", a word list (.json), a SentencePiece .model or a tokenizer.json (or a folder with one)."""
    path = Path(spec)
    if str(spec) == "bytes":
        return Tokenizer("bytes", 256, lambda text: list(text.encode()),
                         lambda ids: bytes(i for i in ids if 0 <= i < 256).decode(errors="replace"))
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {spec} does not exist; give \"bytes\", a word list .json, a .model or a tokenizer.json")
    if path.stat().st_size > MAX_TOKENIZER:
        raise ValueError(f"tokenizer {path} has more than {MAX_TOKENIZER} bytes; check that it is one")
    content = path.read_bytes()
    try:
        if path.suffix == ".model":
            from sentencepiece import SentencePieceProcessor
            pieces = SentencePieceProcessor(model_proto=content)
            return Tokenizer(path.name, pieces.vocab_size(), pieces.encode, lambda ids: pieces.decode(list(ids)), content)
        found = json.loads(content)
        if isinstance(found, list):
            return word_list(path, [str(word) for word in found], content)
        from tokenizers import Tokenizer as Fast
        fast = Fast.from_str(content.decode())
    except ImportError as error:
        raise ValueError(f"{path} needs the package {error.name}; pip install {error.name}") from None
    except Exception as error:      # the libraries raise bare Exception and RuntimeError on a broken file
        raise ValueError(f"tokenizer {path} cannot be read ({error}); restore the file") from None
    return Tokenizer(path.name, fast.get_vocab_size(), lambda text: fast.encode(text, add_special_tokens=False).ids,
                     lambda ids: fast.decode(list(ids)), content)


def word_list(path: Path, words: list[str], content: bytes) -> Tokenizer:
    """Whole words as ids 1..n; 0 stays free for "no word"."""
    ids = {word: i for i, word in enumerate(words, 1)}

    def encode(text: str) -> list[int]:
        for word in text.split():
            if word not in ids:
                near = get_close_matches(word, words, 1, 0.0)
                raise ValueError(f"word {word!r} is not in {path.name}; the nearest known word is {(near or ['none'])[0]!r}")
        return [ids[word] for word in text.split()]

    return Tokenizer(path.name, len(words) + 1, encode, lambda i: " ".join(words[n - 1] for n in i if 0 < n <= len(words)),
                     content)


def spread(words: Sequence[str], start: float, end: float) -> list[tuple[str, float]]:
    """Share a span of seconds among words in proportion to their letters."""
    total, place, out = sum(map(len, words)), 0, []
    for word in words:
        out.append((word, start + (end - start) * place / total))
        place += len(word)
    return out


def aligned_ids(row: Row, seconds: float, tokenizer: Tokenizer, normaliser: str) -> tuple[list[int], list[float]]:
    """Ids of a row word by word, and the second at which each word begins; rows without word times share by letters."""
    given = row.get("words") or spread(row["text"].split(), 0.0, seconds)
    ends = [start for _, start in given[1:]] + [seconds]
    words = [pair for (word, start), end in zip(given, ends, strict=True)
             for pair in spread(normalise(word, normaliser).split(), start, end)]
    pairs = [(i, start) for word, start in words for i in tokenizer.encode(word)]
    return [i for i, _ in pairs], [start for _, start in pairs]


def frame_starts(times: Sequence[float], frame_rate: float, speed: float, shift: float, frames: int) -> list[int]:
    """Seconds -> first frame of each token: the first at 0, strictly increasing, the last before `frames`."""
    if len(times) > frames:
        raise ValueError(f"{len(times)} text tokens in {frames} frames")
    starts = [round(t * frame_rate / speed + shift) if i else 0 for i, t in enumerate(times)]
    for i in range(1, len(starts)):
        starts[i] = max(starts[i], starts[i - 1] + 1)
    return [min(s, frames - len(starts) + i) for i, s in enumerate(starts)]


def prompt_example(text: str, config: DataConfig, tokenizer: Tokenizer, codec: Any = None, reference: tuple[str, str] | None = None,
                   aligned: bool = False) -> Example:
    """Build what sampling starts from: a text and, for cloning, `reference` = (wav file of the voice, its transcript)."""
    def ids(text: str) -> Tensor:
        words = normalise(text, config.normaliser)
        if not words.strip():
            raise ValueError(f"text {text!r} is empty under normaliser {config.normaliser}; give it some words")
        return torch.tensor([i for part in (words.split() if aligned else [words]) for i in tokenizer.encode(part)])

    example = Example(ids(text), name="prompt")
    if reference:
        wav, rate = load_wav(reference[0], max_seconds=config.max_seconds)
        for kind, reason, fix in faults(wav, rate, reference[1], (config.min_seconds, config.max_seconds)):
            if kind == "reject":
                raise ValueError(f"reference {reference[0]}: {reason}; {fix}")
        wav = resample(wav, rate, codec.sample_rate).clamp(-1, 1)
        example.reference = Example(ids(reference[1]), encode(codec, wav), name=reference[0])
    return example


# ---- prepare: audio -> cached codes ----

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
    """Version `number` of a clip (C, W); a fixed code sequence per clip would let the model ignore the text."""
    if number == 0:
        return wav
    shift, gain, speed = variant(key, number)
    wav = resample(wav, round(100 * speed), 100) * 10 ** (gain / 20)
    wav = torch.nn.functional.pad(wav, (round(shift * hop), 0))
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(int(key[:12], 16) + number))
    return (wav + 1e-3 * noise).clamp(-1, 1)            # -60 dBFS


Encoded = tuple[list[int], np.ndarray]                  # frames of each variant, codes (C * Q, sum of them) uint16


def encode_clip(job: tuple[str, Row, bool], codec: Any, config: DataConfig) -> Encoded | Bad:
    """Encode all variants of a clip, or say why it cannot be used."""
    key, row, duplex = job
    try:
        wav, rate = read_clip(row, (config.min_seconds, config.max_seconds))
    except ValueError as error:
        return Bad(row["id"], *error.args[:2])
    for kind, reason, fix in faults(wav, rate, row["text"], (config.min_seconds, config.max_seconds)):
        if kind == "reject":
            return Bad(row["id"], reason, fix)
    wav = resample(wav if duplex else wav[:1], rate, codec.sample_rate)
    hop = codec.sample_rate / codec.frame_rate
    codes = [encode(codec, vary(wav, key, v, hop)) for v in range(config.variants)]
    return [c.shape[1] for c in codes], torch.cat(codes, 1).numpy().astype(np.uint16)


@functools.cache
def worker_codec(spec: str) -> Any:
    torch.set_num_threads(1)
    return load_codec(spec)


def encode_in_worker(config: DataConfig, job: tuple[str, Row, bool]) -> Encoded | Bad:
    return encode_clip(job, worker_codec(config.codec), config)


def encode_all(jobs: list[tuple[str, Row, bool]], codec: Any, config: DataConfig) -> Iterator[Encoded | Bad]:
    """Encode the jobs in order, here or in `workers` processes."""
    if not config.workers:
        yield from (encode_clip(job, codec, config) for job in jobs)
        return
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(functools.partial(encode_in_worker, config), jobs, chunksize=4)


def damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged ({error}); delete it and run `python data.py prepare CONFIG.py` again"


def open_shard(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; run `python data.py prepare CONFIG.py` again") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(damaged(path, error)) from None


Stored = dict[str, tuple[str, list[int]]]               # key -> shard, frames of each variant


def scan(folder: Path) -> Stored:
    """What the shards of a cache hold, read from their headers."""
    found: Stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, frames in (open_shard(path).metadata() or {}).items():
            if key != "format":
                found[key] = (path.name, [int(n) for n in frames.split()])
    return found


def encode_missing(jobs: dict[str, tuple[str, Row, bool]], folder: Path, codec: Any, config: DataConfig) -> dict[str, Bad]:
    """Encode jobs into shards; each shard is written whole, so a killed run loses the last one only."""
    bad: dict[str, Bad] = {}
    results = tqdm(zip(jobs, encode_all(list(jobs.values()), codec, config), strict=True), "encoding", len(jobs),
                   disable=None, unit="clip")
    while chunk := list(islice(results, SHARD)):
        bad |= {key: found for key, found in chunk if isinstance(found, Bad)}
        good = {key: found for key, found in chunk if not isinstance(found, Bad)}
        if good:
            frames = {key: " ".join(map(str, n)) for key, (n, _) in good.items()}
            arrays = {key: codes for key, (_, codes) in good.items()}
            write_tensors(folder / f"{sha(*good)[:16]}.safetensors", arrays, frames)     # two runs at once do not collide
    return bad


def write_tensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    try:
        replace_file(path, lambda temporary: save_file(arrays, temporary, {"format": "pt"} | metadata))
    except SafetensorError as error:                    # a full disk, for one
        raise OSError(f"{path} cannot be written ({error}); {FULL}") from None


# ---- prepare: rows -> index ----

def source_weight(source: str) -> tuple[str, float]:
    """Split "path:weight"; without a number behind the last colon the weight is 1."""
    path, colon, number = source.rpartition(":")
    if colon and re.fullmatch(r"\d+(\.\d*)?|\.\d+", number):
        return path, float(number)
    return source, 1.0


def sha(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def index_folder(config: DataConfig, table: StreamTable) -> Path:
    """Where the index of this config lives: whatever would change an entry is part of the name."""
    sources = [source_weight(s)[0] for s in config.sources]
    return Path(config.cache) / sha(CACHE_VERSION, sources, config.codec, config.tokenizer, config.normaliser, config.variants,
                                    config.split, config.held_out, config.min_seconds, config.max_seconds,
                                    config.allow_outside, table.aligned, len(table.audio))[:12]


def codec_version(codec: Any) -> str:
    """Hash of a codec's name and weights: other weights, other codes."""
    hashed = hashlib.sha256(codec.name.encode())
    for name, value in sorted(codec.state_dict().items() if hasattr(codec, "state_dict") else {}):
        hashed.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


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


def split_of(row: Row, mark: str, config: DataConfig) -> str:
    """Put a row on one side. `mark` is the hash of its audio, or its text: never its place in a file."""
    given = row.get("split", "train") if config.split == "manifest" or "parts" in row and "split" in row else None
    if given is not None:
        return "train" if given == "train" else "held-out"
    if "parts" in row and len(row["parts"]) == 1:
        return "train"
    if config.split == "speaker" and row.get("speaker"):
        mark = row["speaker"]
    return "held-out" if fraction(mark) < config.held_out else "train"


def prepare(config: DataConfig, table: StreamTable) -> Index:
    """Encode whatever is not cached yet and write the index; running it again encodes nothing.

    Rows that cannot be used are named and left out; ValueError when none is left.
    """
    if config.split not in ("hash", "speaker", "manifest") or not config.sources:
        raise ValueError(f"data.split={config.split!r}, data.sources={config.sources}; give hash, speaker or manifest, and a source")
    tokenizer, codec = load_tokenizer(config.tokenizer), load_codec(config.codec) if table.audio else None
    duplex = fit(table, tokenizer, codec)
    manifests = [read_manifest(source_weight(s)[0], config.allow_outside) for s in config.sources]
    stored, encoded = store_codes(manifests, codec, duplex, config) if codec is not None else ({}, 0)
    index = Index(index_folder(config, table), Path(config.cache) / "codes",
                  {"version": CACHE_VERSION, "frame_rate": codec.frame_rate if codec else 0.0, "duplex": duplex}, [])
    joined = {m.clips[p].get("mark") for m in manifests for row in m.rows if row.get("split", "train") == "train"
              for p in row.get("parts", [])} - {None}
    work = Work(index, table, config, tokenizer, stored, joined)
    for source, m in enumerate(manifests):
        add_entries(work, m, source)
    bad = name_left_out(manifests, table)
    count = sum(e.split != "" for e in index.entries)
    if not count:
        raise ValueError(f"no usable row in {', '.join(config.sources)}; `python data.py check` lists the reasons")
    (index.folder / "index.json").unlink(missing_ok=True)       # a kill between the two files must not leave a mixture
    write_tensors(index.folder / "text.safetensors", work.arrays, {})
    write_json(index.folder / "index.json", index.info | {"entries": [asdict(e) for e in index.entries]})
    did = f"{encoded} clips encoded" if encoded else "everything was cached, nothing encoded"
    print(f"prepared {count} examples in {index.folder}: {did}, {bad} rows left out")
    return index


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


def store_codes(manifests: list[Manifest], codec: Any, duplex: bool, config: DataConfig) -> tuple[Stored, int]:
    """Give every clip its key and encode those that no shard holds; returns the shards' content and the number encoded."""
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
            jobs[clip["key"]] = (clip["key"], clip, duplex)
    bad = encode_missing(jobs, folder, codec, config) if jobs else {}
    for m, clip in clips:
        if clip.get("key") in bad:
            m.reject(clip["id"], bad[clip["key"]].reason, bad[clip["key"]].fix)
    return scan(folder), len(jobs) - len(bad)


@dataclass
class Work:
    """What turns rows into entries."""

    index: Index
    table: StreamTable
    config: DataConfig
    tokenizer: Tokenizer
    stored: Stored
    joined: set[str]                                    # hashes of the audio that a composed training row uses: never held out
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def add_entries(work: Work, m: Manifest, source: int) -> None:
    """Append the usable rows of a manifest to the index and reject the others."""
    drawn, numbers = {row["id"] for row in m.rows}, {}
    for row in m.clips.values():                        # parts and references stand before the rows that use them
        entry = Entry(row["id"], row["text"], source, "", str(row.get("speaker") or ""), str(row.get("group") or ""))
        try:
            if work.table.audio:
                locate(work, entry, row, numbers)
            found = text_tensor(work, entry, row)
        except LookupError:                             # its audio was rejected before
            continue
        except ValueError as error:
            m.reject(row["id"], str(error), "mend or remove the row")
            continue
        if row["id"] in drawn:
            entry.split = "train" if row.get("mark") in work.joined else split_of(row, row.get("mark") or row["text"], work.config)
        numbers[row["id"]] = len(work.index.entries)
        if found is not None:
            work.arrays[str(len(work.index.entries))] = found
        work.index.entries.append(entry)


def locate(work: Work, entry: Entry, row: Row, numbers: dict[str, int]) -> None:
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
    entry.key = row.get("key", "")
    entry.shard, entry.frames = work.stored[entry.key]
    low, high = work.config.min_seconds, work.config.max_seconds
    if not low <= entry.frames[0] / work.index.info["frame_rate"] <= high + 1:      # the codec pads the last frame
        raise ValueError(f"duration outside {low:g}..{high:g} s")


def text_tensor(work: Work, entry: Entry, row: Row) -> np.ndarray | None:
    """Ids of a row (1, n) and, in aligned layouts, the first frame of each under every variant (1 + V, n)."""
    rate, normaliser, starts = work.index.info["frame_rate"], work.config.normaliser, []
    if not work.table.aligned:
        ids = work.tokenizer.encode(normalise(row["text"], normaliser))
    elif entry.parts:
        return None                                     # joined from the parts when an example is built
    else:
        ids, times = aligned_ids(row, entry.frames[0] / rate, work.tokenizer, normaliser)
        for version, frames in enumerate(entry.frames):
            shift, _, speed = variant(entry.key, version)
            starts.append(frame_starts(times, rate, speed, shift, frames))
    if not ids:
        raise ValueError(f"no text is left after {normaliser}")
    return np.array([ids, *starts], dtype=np.int32)


def open_cache(config: DataConfig, table: StreamTable) -> Index:
    """Open what `prepare` wrote for this config; raises FileNotFoundError when it has not run."""
    folder = index_folder(config, table)
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(f"no prepared data in {folder} for this config; run `python data.py prepare CONFIG.py`")
    found = read_json(folder / "index.json", MAX_INDEX)
    try:
        entries = [Entry(**entry) for entry in found.pop("entries")]
    except (KeyError, TypeError) as error:
        raise ValueError(damaged(folder / "index.json", error)) from None
    return Index(folder, Path(config.cache) / "codes", found, entries)


# ---- examples ----

def clip_example(index: Index, number: int, version: int, aligned: bool) -> Example:
    """One variant of a clip, or a text without audio."""
    entry = index.entries[number]
    text = index.tensor(index.folder / "text.safetensors", str(number))         # (1 or 1 + V, n)
    if not entry.key:
        return Example(text[0], name=entry.id)
    begin, frames = sum(entry.frames[:version]), entry.frames[version]
    codes = index.tensor(index.codes / entry.shard, entry.key)
    if codes.ndim != 2 or codes.shape[1] != sum(entry.frames):
        raise ValueError(damaged(index.codes / entry.shard, ValueError(f"{entry.id}: {tuple(codes.shape)} codes")))
    return Example(text[0], codes[:, begin : begin + frames], text[1 + version] if aligned else None, name=entry.id)


def joined_example(index: Index, number: int, versions: Sequence[int], aligned: bool) -> Example:
    """Clips joined: codes one behind the other (frames of the codec are local), words with the frames before them added."""
    entry = index.entries[number]
    clips = [clip_example(index, part, version, aligned) for part, version in zip(entry.parts, versions, strict=True)]
    codes = torch.cat([clip.codes for clip in clips], dim=1)                    # (Q, T1) ... -> (Q, T)
    if not aligned:
        return Example(index.tensor(index.folder / "text.safetensors", str(number))[0], codes, name=entry.id)
    offsets = np.cumsum([0] + [clip.codes.shape[1] for clip in clips[:-1]])
    starts = torch.cat([clip.starts + int(offset) for clip, offset in zip(clips, offsets, strict=True)])
    return Example(torch.cat([clip.text for clip in clips]), codes, starts, name=entry.id)


def build_example(index: Index, number: int, table: StreamTable, draw: random.Random | None = None,
                  reference: int = -1) -> Example:
    """Example of an entry: variants drawn with `draw`, or the clips as they are; another entry as its reference."""
    entry, aligned = index.entries[number], table.aligned
    versions = [draw.randrange(max(1, len(index.entries[n].frames))) if draw else 0 for n in entry.parts or [number]]
    example = (joined_example(index, number, versions, aligned) if entry.parts
               else clip_example(index, number, versions[0], aligned))
    if index.info["duplex"] and example.codes is not None:
        example.codes, example.user = example.codes.chunk(2)                    # left is the agent, right the user
    if reference >= 0:
        example.reference = build_example(index, reference, table, draw)
    return example


# ---- packing ----

def pack(lengths: Sequence[int], columns: int) -> list[list[int]]:
    """First fit, longest first: rows of example numbers whose lengths sum to at most `columns`; too long ones left out."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > columns:
            continue
        place = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(columns)
        rows[place].append(i)
        room[place] -= lengths[i]
    return rows


Packed = list[tuple[str, Grid]]     # one row: (id, grid) of its examples


def collate(rows: Sequence[Packed], state: dict[str, Any]) -> Batch:
    """Lay packed rows into one padded batch."""
    K = rows[0][0][1][0].shape[0]
    S = max(sum(tokens.shape[1] for _, (tokens, _) in row) for row in rows)
    B, S = len(rows), -(-S // 8) * 8
    batch = Batch(torch.full((B, K, S), -1), torch.zeros(B, K, S), torch.zeros(B, S, dtype=torch.long),
                  torch.full((B, S), -1), [[name for name, _ in row] for row in rows], state)
    for b, row in enumerate(rows):
        at = 0
        for n, (_, (tokens, weights)) in enumerate(row):
            span = slice(at, at + tokens.shape[1])
            batch.tokens[b, :, span], batch.weights[b, :, span] = tokens, weights
            batch.positions[b, span] = torch.arange(tokens.shape[1])
            batch.segments[b, span] = n
            at = span.stop
    return batch


Drawn = tuple[int, random.Random | None, int]     # entry, its generator, entry of its reference


class Loader:
    """Batches of this rank. Training goes on forever; held-out data is one pass, in order, and can be iterated again.

    The global sequence of packed rows is fixed by the seed. One iteration takes `world * batch_size` of them and this
    rank keeps its slice, so micro-batch i of rank r is number i * world + r: any split of a step into ranks and
    accumulation reads the same rows. What a window leaves half full is emitted, not carried, so the state is where the
    window began and how many of its rows are gone. A rank may get no held-out batch when there are fewer rows than ranks.
    Held-out clips are read as they are (first variant, no drawn reference).
    """

    def __init__(self, config: DataConfig, table: StreamTable, split: str = "train", batch_size: int = 1, rank: int = 0,
                 world: int = 1, accum: int = 1) -> None:
        assert 0 <= rank < world and batch_size > 0 and accum > 0 and split in ("train", "held-out")
        if config.stream_weights and len(config.stream_weights) != len(table):
            raise ValueError(f"data.stream_weights has {len(config.stream_weights)} values, the grid {len(table)} rows; give one each")
        self.config, self.table, self.split = config, table, split
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.index = open_cache(config, table)
        self.sources: list[list[int]] = [[] for _ in config.sources]            # entries of this split, by source
        self.speakers: dict[str, list[int]] = {}                                # own clips of a voice in this split
        for n, entry in enumerate(self.index.entries):
            if entry.split == split:
                self.sources[entry.source].append(n)
                if entry.key and entry.speaker:
                    self.speakers.setdefault(entry.speaker, []).append(n)
        self.shares = [source_weight(s)[1] * bool(own) for s, own in zip(config.sources, self.sources, strict=True)]
        self.orders: dict[int, tuple[int, list[int]]] = {}
        self.left_out: set[str] = set()                                         # ids longer than `columns`
        self.state: dict[str, Any] = {"draw": 0, "counts": [0] * len(self.sources), "row": 0}
        if split == "train" and not sum(self.shares):
            raise ValueError(f"no training example in {', '.join(config.sources)}; lower data.held_out or add data")

    def restore(self, state: dict[str, Any]) -> None:
        """Continue behind the batch that carried `state`; any rank's state of the same step will do."""
        if len(state["counts"]) != len(self.sources):
            found = f"the saved position knows {len(state['counts'])} sources, data.sources has {len(self.sources)}"
            raise ValueError(f"{found}; resume with the same sources or start a new run")
        self.state = state

    def __iter__(self) -> Iterator[Batch]:
        batches = self.training() if self.split == "train" else self.held_out()
        for batch in prefetch(batches, self.config.prefetch) if self.config.prefetch else batches:
            self.state = batch.state
            yield batch

    def training(self) -> Iterator[Batch]:
        rows = self.rows(self.state)
        while True:
            taken = list(islice(rows, self.world * self.batch_size))
            mine = taken[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            yield collate([row for row, _ in mine], taken[-1][1])

    def held_out(self) -> Iterator[Batch]:
        entries = [n for own in self.sources for n in own]
        rows: list[Packed] = []
        for i in range(0, len(entries), self.config.window):
            rows += self.packed([(n, None, -1) for n in entries[i : i + self.config.window]])
        rows = rows[self.rank :: self.world]
        for i in range(0, len(rows), self.batch_size):
            yield collate(rows[i : i + self.batch_size], self.state)

    def rows(self, state: dict[str, Any]) -> Iterator[tuple[Packed, dict[str, Any]]]:
        """The endless global sequence of rows behind `state`, each with the state behind it."""
        barren = 0
        while True:
            window, after = self.window(state)
            rows = self.packed(window)
            random.Random(f"{self.config.seed}/rows/{state['draw']}").shuffle(rows)     # packing sorts by length
            barren = 0 if rows else barren + len(window)
            if barren > 4 * len(self.index.entries):
                raise ValueError(f"no example fits data.columns={self.config.columns}; raise it or cut the clips")
            for r in range(state["row"], len(rows)):
                yield rows[r], after if r + 1 == len(rows) else state | {"row": r + 1}
            state = after

    def window(self, state: dict[str, Any]) -> tuple[list[Drawn], dict[str, Any]]:
        """Draw the next examples, and the state behind them."""
        counts, begin = list(state["counts"]), state["draw"]
        drawn: list[Drawn] = []
        for n in range(begin, begin + self.config.window):
            draw = random.Random(f"{self.config.seed}/{n}")
            source = draw.choices(range(len(counts)), self.shares)[0]
            own = self.sources[source]
            number = self.order(source, counts[source] // len(own))[counts[source] % len(own)]
            counts[source] += 1
            drawn.append((number, draw, self.reference(number, draw)))
        return drawn, {"draw": begin + self.config.window, "counts": counts, "row": 0}

    def order(self, source: int, turn: int) -> list[int]:
        """The shuffled entries of a source in its pass number `turn`; the last one is kept."""
        if self.orders.get(source, (-1, []))[0] != turn:
            order = list(self.sources[source])
            random.Random(f"{self.config.seed}/{source}/{turn}").shuffle(order)
            self.orders[source] = turn, order
        return self.orders[source][1]

    def reference(self, number: int, draw: random.Random) -> int:
        """Another clip of the speaker, with the configured probability; never the example itself or a part of it."""
        entry = self.index.entries[number]
        others = self.speakers.get(entry.speaker, [])
        wanted = draw.random() < self.config.reference and len(others) > 1 + len(entry.parts)
        for _ in range(8 if wanted else 0):             # a long dialogue may hold most clips of its speaker
            other = draw.choice(others)
            if other != number and other not in entry.parts:
                return other
        return -1

    def packed(self, drawn: list[Drawn]) -> list[Packed]:
        """Lay out examples and pack them; one longer than a row is named and counted in `left_out`."""
        factors = torch.tensor(self.config.stream_weights or [1.0] * len(self.table))[:, None]
        grids: Packed = []
        for number, draw, reference in drawn:
            entry = self.index.entries[number]
            own = entry.reference if entry.reference >= 0 else reference
            tokens, weights = lay_out(build_example(self.index, number, self.table, draw, own), self.table)
            weights = weights * factors
            weights[:, 0] = 0                           # nothing before it predicts it
            grids.append((entry.id, (tokens, weights)))
            if tokens.shape[1] > self.config.columns and entry.id not in self.left_out:
                self.left_out.add(entry.id)
                if len(self.left_out) <= 3:             # the rest is only counted
                    print(f"left out: {entry.id} has {tokens.shape[1]} columns; raise data.columns={self.config.columns}",
                          file=sys.stderr)
        return [[grids[i] for i in row] for row in pack([tokens.shape[1] for _, (tokens, _) in grids], self.config.columns)]


def prefetch(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """Run an iterator `depth` items ahead in a thread. Its error is raised here; dropping this iterator ends the thread."""
    ahead: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    dropped = threading.Event()
    thread = threading.Thread(target=fill, args=(items, ahead, dropped), daemon=True, name="data prefetch")
    thread.start()
    try:
        while True:
            kind, value = ahead.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        dropped.set()
        thread.join()


def fill(items: Iterator[Any], ahead: queue.Queue, dropped: threading.Event) -> None:
    """Thread of `prefetch`: put items, then "end" or the error, until the reader is gone."""
    def kinds() -> Iterator[tuple[str, Any]]:
        try:
            yield from (("item", item) for item in items)
            yield "end", None
        except Exception as error:                      # raised where the batch would have been used
            yield "error", error

    for pair in kinds():
        while not dropped.is_set():
            try:
                ahead.put(pair, timeout=0.1)
                break
            except queue.Full:
                continue                                # look again whether anybody still reads
        if dropped.is_set():
            return


# ---- command line ----

def check_command(argv: list[str]) -> None:
    words, options = split_arguments(argv, ("allow-outside",))
    unknown = options.keys() - {"write", "allow-outside", "min_seconds", "max_seconds"}
    if len(words) != 1 or unknown:
        raise ValueError(f"check takes one path, --write DIR, --allow-outside, --min_seconds, --max_seconds; got {argv}")
    limits = apply(DataConfig(), {k: v for k, v in options.items() if k.endswith("_seconds")})
    check(words[0], options.get("write", ""), "allow-outside" in options, (limits.min_seconds, limits.max_seconds))


def show_command(argv: list[str]) -> None:
    words, options = split_arguments(argv, ("smoke", "help"))
    number = options.pop("index", "0")
    config = load_config(words + [f"--{key}={value}" for key, value in options.items()])
    index = open_cache(config.data, config.model.table)
    shown = [n for n, entry in enumerate(index.entries) if entry.split]
    if not number.isdecimal() or int(number) >= len(shown):
        raise ValueError(f"--index {number} does not exist; the data has examples 0..{len(shown) - 1}")
    number = int(number)
    entry = index.entries[shown[number]]
    print(f"{entry.id}  {entry.split}  {entry.text!r}")
    print(show(*lay_out(build_example(index, shown[number], config.model.table, None, entry.reference), config.model.table),
               config.model.table))


def main(argv: list[str] | None = None) -> None:
    command, *rest = argv if argv is not None else sys.argv[1:] or ["--help"]
    if command in ("--help", "-h", "help"):
        print(__doc__, sys.modules["manifest"].__doc__, sep="\n")
        print("Fields of DataConfig (--data.NAME=VALUE):\n", help_text(DataConfig(), ""), sep="")
    elif command == "check":
        check_command(rest)
    elif command == "prepare":
        config = load_config(rest)
        prepare(config.data, config.model.table)
    elif command == "show":
        show_command(rest)
    else:
        raise ValueError(f"unknown command {command!r}; give check, prepare or show (python data.py --help)")


if __name__ == "__main__":
    edge(main)
