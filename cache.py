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
from options import FULL, read_json, replace_file, write_json
from streams import StreamTable
from text import Tokenizer, aligned_ids, frame_starts, load_tokenizer, normalise

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
    index = Index(index_folder(config, table), {"version": CACHE_VERSION, "frame_rate": codec.frame_rate if codec else 0.0, "duplex": duplex}, [])
    texts: dict[str, np.ndarray] = {}
    joined = joined_marks(manifests)
    for source, m in enumerate(manifests):
        add_entries(index, texts, m, source, table, config, tokenizer, joined)
    bad = name_left_out(manifests, table)
    count = sum(e.split != "" for e in index.entries)
    if not count:
        raise ValueError(f"no usable row in {', '.join(config.sources)}; `python data.py check` lists the reasons")
    (index.folder / "index.json").unlink(missing_ok=True)       # a kill between the two files must not leave a mixture
    write_tensors(index.path(""), texts, {})
    write_json(index.folder / "index.json", index.info | {"entries": [vars(e) for e in index.entries]})
    did = f"{encoded} clips encoded" if encoded else "everything was cached, nothing encoded"
    print(f"prepared {count} examples in {index.folder}: {did}, {bad} rows left out")
    return index
