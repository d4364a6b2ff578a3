"""A codec and clips for the tests of the cache and the loader: codes say which clip they came from."""

import json
import random
from dataclasses import replace

import numpy as np
import soundfile
import torch

from corpus.data_config import DataConfig
from corpus.index import prepare
from streams import Stream, StreamTable

WORDS = "one two three four five".split()
BYTES = StreamTable((Stream("text", "text", 300, 300), Stream("a", "audio", 66, 66, 0, 64, 65), Stream("b", "audio", 66, 66, 1, 64, 65)),
                    "clone", audio_start=256, audio_end=257)
ALIGNED = StreamTable((*(Stream(n, "text", 64) for n in ("word", "next", "previous", "age")), Stream("advance", "text", 2, 2),
                       Stream("a", "audio", 66, 66, 2, 64, 65), Stream("b", "audio", 66, 66, 3, 64, 65)), "words", aligned=True)
DUPLEX = StreamTable((Stream("text", "text", 300, 300), *(Stream(f"a{i}", "audio", 66, 66, 0, 64, 65) for i in range(2)),
                      *(Stream(f"u{i}", "audio", 66, 0, 0, 64, 65) for i in range(2))), "clone", audio_start=256, audio_end=257)


class FakeCodec:
    """Codes are the rounded mean level of a frame, and its index: enough to see what was encoded."""

    name, sample_rate, frame_rate, num_codebooks, codebook_size = "fake", 1600, 25, 2, 64
    calls = 0

    def encode(self, wav):
        FakeCodec.calls += 1
        hop = 64
        wav = torch.nn.functional.pad(wav[:, 0], (0, -wav.shape[-1] % hop)).unfold(-1, hop, hop)    # (B, T, hop)
        return torch.stack([(wav.mean(-1).clamp(0, 1) * 63).round().long(), torch.arange(wav.shape[1]).expand(wav.shape[:2]) % 64], 1)


def write_clips(folder, clips=40, seconds=(0.4, 2.0)):
    """Clips whose level, hence whose first code, says which they are."""
    draw = random.Random(0)
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(clips):
        n = round(draw.uniform(*seconds) * 8000)
        wav = np.full(n, (i + 1) / 64) + np.random.default_rng(i).standard_normal(n) * 1e-3
        soundfile.write(folder / f"{i}.wav", wav.astype(np.float32), 8000)
        rows.append({"id": str(i), "audio": f"{i}.wav", "text": WORDS[i % 5], "speaker": f"s{i % 3}", "group": "digits"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


def write_words(folder):
    (folder / "words.json").write_text(json.dumps(WORDS))
    return str(folder / "words.json")


def fake_data(tmp_path, monkeypatch):
    """The config of 40 clips in tmp_path/clips, encoded by the fake codec."""
    monkeypatch.setattr("corpus.index.load_codec", lambda spec, **options: FakeCodec())
    FakeCodec.calls = 0
    return DataConfig(sources=(write_clips(tmp_path / "clips"),), cache=str(tmp_path / "cache"), columns=200, window=16,
                      held_out=0.2, prefetch=0)


def composed(tmp_path, config, table=ALIGNED, **fields):
    """The clips and 200 rows composed of them, three times as often."""
    rule = {"manifest": "manifest.jsonl", "compose": {"group": "digits", "count": [1, 4], "rows": 200, "seed": 0, "held_out": 0.2}}
    (tmp_path / "clips/compose.jsonl").write_text(json.dumps(rule) + "\n")
    config = replace(config, sources=(config.sources[0] + ":1", str(tmp_path / "clips/compose.jsonl") + ":3"),
                     tokenizer=write_words(tmp_path), **fields)
    return config, prepare(config, table)
