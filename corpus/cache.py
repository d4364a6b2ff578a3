"""The token cache: recordings -> codes on disk. Nothing is encoded twice and training never runs a codec.

    CACHE/codes/<hash>.safetensors      uint16 codes of ~64 clips, keyed by a hash of audio, codec and options; a key's
                                        metadata are the frames of each variant and the checksum of its codes

A clip is stored in `variants` versions, concatenated, that differ slightly in time, gain and speed: with a single code
sequence per clip a model could memorise the codes and ignore the text. Next: index.py.
"""

import hashlib
import json
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from audio import augment
from audio.augment import AugmentConfig
from audio.wav import RESAMPLER, resample
from corpus.checks import Verdicts, judge, read_clip
from corpus.data_config import DataConfig, source_weight
from corpus.layouts import read_manifest
from corpus.manifest import Manifest, RejectedRow, Row
from options import FULL, out_of_memory
from system.files import checksum, replace_file
from system.progress import Progress, torch_threads, workers

SUM = "sum:"                # stands before a checksum
SHARD = 64                  # clips per shard; an interrupted `prepare` encodes at most this many again
CACHE_VERSION = "1"         # part of every key: change it when the same input would be encoded or split differently


def encode_sources(config: DataConfig, codec: Any, duplex: bool, shard: tuple[int, int] = (0, 1)) -> tuple[list[Manifest], int]:
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
    return manifests, store_codes(manifests, codec, duplex, config)


def store_codes(manifests: list[Manifest], codec: Any, duplex: bool, config: DataConfig) -> int:
    """Encode every clip that is not in a shard yet, of manifests that were judged (checks.py). Clips get key, shard and frames;
    returns how many were encoded."""
    folder, version = Path(config.cache) / "codes", codec_version(codec)
    stored, jobs = stored_clips(folder), {}
    clips = [(m, clip) for m in manifests for clip in m.clips.values() if clip["file"]]
    for _, clip in clips:
        clip["key"] = hash_of(CACHE_VERSION, clip["mark"], version, RESAMPLER, config.variants, duplex,
                          *([config.augment] if config.augment else []))
        if clip["key"] not in stored:
            jobs[clip["key"]] = clip
    bad = encode_missing(jobs, folder, codec, duplex, config)
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


def encode_missing(jobs: dict[str, Row], folder: Path, codec: Any, duplex: bool, config: DataConfig) -> dict[str, RejectedRow]:
    """Encode clips into shards, each written atomically, so a killed run repeats the last one only. Returns the unusable clips by key."""
    bad: dict[str, RejectedRow] = {}
    left, progress = iter(jobs), Progress("encoding", len(jobs), "clips")
    with progress, torch_threads(1), ThreadPoolExecutor(workers(config.workers)) as pool:
        while keys := list(islice(left, SHARD)):
            frames, arrays = {}, {}
            found = pool.map(lambda key: encode_or_reject(key, jobs[key], codec, duplex, config), keys)
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


def encode_or_reject(key: str, row: Row, codec: Any, duplex: bool, config: DataConfig) -> list[np.ndarray] | RejectedRow:
    """Encode a clip; whatever goes wrong with it is its reason to be left out, and the others go on."""
    try:
        return encode_clip(key, row, codec, duplex, config)
    except Exception as error:
        if out_of_memory(error):                        # that is no fault of the clip
            raise
        return RejectedRow(row["id"], "encoding failed", f"{type(error).__name__}: {error}; check the recording, or leave the row out")


def encode_clip(key: str, row: Row, codec: Any, duplex: bool, config: DataConfig) -> list[np.ndarray] | RejectedRow:
    """Encode all variants of a clip, each (C * Q, T) uint16, or say why it cannot be used."""
    try:
        wav, rate = read_clip(row, (config.min_seconds, config.max_seconds))
    except ValueError as error:
        return RejectedRow(row["id"], *error.args)
    wav = resample(wav if duplex else wav[:1], rate, codec.sample_rate)
    hop = codec.sample_rate / codec.frame_rate
    versions = (make_variant(wav, key, v, hop, config.augment, codec.sample_rate) for v in range(config.variants))
    return [encode(codec, version).numpy().astype(np.uint16) for version in versions]


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
    """An open file of arrays; `said` holds what was written beside each: its frames and its checksum."""

    path: Path
    file: Any
    said: dict[str, str]

    def read(self, key: str) -> np.ndarray:
        """One array, compared with its checksum where it has one; ValueError names the file."""
        try:
            found = np.ascontiguousarray(self.file.get_tensor(key))
        except SafetensorError as error:
            raise ValueError(damaged_message(self.path, error)) from None
        _, known, wanted = self.said.get(key, "").partition(SUM)
        if known and checksum(found.data.cast("B")) != wanted:
            raise ValueError(damaged_message(self.path, f"the checksum of {key} differs"))
        return found


def open_shard(path: Path) -> Shard:
    try:
        file = safe_open(str(path), framework="numpy")
        found = file.metadata() or {}
        said = json.loads(found["arrays"]) if "arrays" in found else {k: v for k, v in found.items() if k != "format"}
        if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
            raise ValueError("its header says nothing of its arrays")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; run `python data.py prepare CONFIG.py` again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(damaged_message(path, error)) from None
    return Shard(path, file, said)


def damaged_message(path: Path, what: object) -> str:
    return f"{path} is damaged ({what}); delete it and run `python data.py prepare CONFIG.py` again"


def write_tensors(path: Path, arrays: dict[str, np.ndarray], said: dict[str, str]) -> None:
    """Write arrays and what is said of each; as one text, so that the same arrays are the same bytes (safetensors shuffles keys)."""
    about = {"arrays": json.dumps(said)}
    try:
        replace_file(path, lambda temporary: save_file(arrays, temporary, about))
    except SafetensorError as error:                    # a full disk, for one
        raise OSError(f"{path} cannot be written ({error}); {FULL}") from None
