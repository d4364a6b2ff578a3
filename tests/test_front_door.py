"""The front door: small recordings and lists as other tools write them, each with the one right verdict of check and prepare."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import call
from fake_corpus import BYTES, FakeCodec

from corpus.checks import check_source, judge
from corpus.data_config import DataConfig
from corpus.examples import prompt_example
from corpus.index import open_cache, prepare
from corpus.layouts import read_manifest
from text.tokenizers import load_tokenizer

RATE, TEXT = 8000, "hello there"


def voice(seconds: float = 0.6, seed: int = 0, level: float = 0.3) -> np.ndarray:
    """Bursts of noise over a quiet floor, different for each seed."""
    n = round(seconds * RATE)
    wav = np.random.default_rng(seed).standard_normal(n) * level * 0.3
    wav[(np.arange(n) * 8 // RATE) % 2 == 1] *= 1e-2
    return wav.clip(-1, 1).astype(np.float32)


@dataclass(frozen=True)
class Wav:
    """A recording of a case: written as it is, any format that the name of the file says."""

    samples: Any = None
    rate: int = RATE
    how: dict[str, Any] = field(default_factory=dict)


def lay(folder: Path, files: dict[str, Any]) -> Path:
    """Write the files of a case: Wav, text, bytes, or a number (a voice with that seed)."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            content = Wav(voice(seed=content))
        if isinstance(content, Wav):
            soundfile.write(path, content.samples, content.rate, **content.how)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def rows(*lines: Any) -> str:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)


@dataclass(frozen=True)
class Case:
    """Files, the source among them, and the verdict: texts kept, reasons of warnings and of rows left out."""

    files: dict[str, Any]
    kept: tuple[str, ...] = (TEXT,)
    out: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()
    source: str = ""
    speakers: tuple[str, ...] | None = None
    refused: str = ""           # a part of the message that refuses the whole source


def one(**fields: Any) -> str:
    return rows({"id": "x", "audio": "x.wav", "text": TEXT} | fields, {"id": "good", "audio": "g.wav", "text": "good"})


def clip(samples: Any, out: str = "", warned: str = "", rate: int = RATE, **how: Any) -> Case:
    """A good clip and another one with a fault."""
    return Case({"g.wav": 7, "x.wav": Wav(samples, rate, how), "manifest.jsonl": one()}, ("good",) if out else (TEXT, "good"),
                (out,) if out else (), (warned,) if warned else ())


NOISE = np.random.default_rng(3).standard_normal(RATE * 2).astype(np.float32) * 0.1
CASES: dict[str, Case] = {
    # A: recordings
    "a good clip": clip(voice()),
    "all zeros": clip(np.zeros(RATE), "all-zero audio"),
    "samples of another scale": clip(voice() * 32768, "samples far above 1", subtype="FLOAT"),
    "a little above full scale": clip(voice() * 3, subtype="FLOAT"),
    "no samples": clip(np.zeros(0), "empty audio"),
    "NaN": clip(np.full(RATE, np.nan), "NaN samples", subtype="FLOAT"),
    "too short": clip(voice(0.1), "duration outside 0.2..30 s"),
    "below 8 kHz": clip(voice(), "sample rate below 8 kHz", rate=4000),
    "clipped": clip((voice() * 50).clip(-1, 1), warned="clipping"),
    "nearly silent": clip(voice(level=1e-3), warned="silence"),
    "noise": clip(NOISE, warned="low SNR"),
    "stereo": clip(np.stack([voice(), voice(seed=1)], 1), warned="stereo"),
    "a copy": Case({"g.wav": 7, "x.wav": 7, "manifest.jsonl": one()}, (TEXT, "good"), (), ("duplicate audio",)),
    "too much text": Case({"g.wav": 7, "x.wav": 1, "manifest.jsonl": one(text="many words " * 9)}, (("many words " * 9), "good"), (),
                          ("text does not fit the length",)),
    "missing file": Case({"g.wav": 7, "manifest.jsonl": one()}, ("good",), ("missing file",)),
    "a zero-byte file": Case({"g.wav": 7, "x.wav": b"", "manifest.jsonl": one()}, ("good",), ("unreadable audio",)),
    "text named wav": Case({"g.wav": 7, "x.wav": "no sound" * 40, "manifest.jsonl": one()}, ("good",), ("unreadable audio",)),
    "a missing reference": Case({"g.wav": 7, "x.wav": 1, "manifest.jsonl": one(reference={"audio": "r.wav", "text": "ref"})}, ("good",),
                                ("missing file",)),
    "a silent reference": Case({"g.wav": 7, "x.wav": 1, "r.wav": Wav(np.zeros(RATE)),
                                "manifest.jsonl": one(reference={"audio": "r.wav", "text": "ref"})}, ("good",), ("all-zero audio",)),
    "a part that is left out": Case({"g.wav": 7, "x.wav": Wav(np.zeros(RATE)),
                                     "manifest.jsonl": one() + rows({"id": "p", "parts": ["good", "x"]})}, ("good",),
                                    ("all-zero audio", "its part x was left out")),
}


@pytest.fixture(autouse=True)
def fake_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.index.load_codec", lambda spec, **options: FakeCodec())


def expected(case: Case) -> tuple[list[str], list[str], list[str]]:
    return sorted(case.kept), sorted(case.out), sorted(set(case.warned))


def verdict_of(m: Any) -> tuple[list[str], list[str], list[str]]:
    usual = {"sample rate below 16 kHz"}                # all recordings here: 10 kB each
    return (sorted(row["text"] for row in m.rows), sorted(b.reason for b in m.bad), sorted({w.reason for w in m.warned} - usual))


@pytest.mark.parametrize("name", CASES)
def test_check_and_prepare_say_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    case = CASES[name]
    source = lay(tmp_path / "data", case.files) / case.source
    config = DataConfig(sources=(str(source),), cache=str(tmp_path / "cache"), held_out=0.0, prefetch=0)
    if case.refused:
        for command in (lambda: check_source(str(source)), lambda: prepare(config, BYTES)):
            with pytest.raises((ValueError, FileNotFoundError), match=case.refused):
                command()
        return
    m = read_manifest(source)
    judge(m, (config.min_seconds, config.max_seconds))
    assert verdict_of(m) == expected(case), m.bad
    if case.speakers is not None:
        assert tuple(sorted({row["speaker"] for row in m.rows})) == case.speakers
    said = {}
    for command, run in (("check", lambda: check_source(str(source))), ("prepare", lambda: prepare(config, BYTES))):
        capsys.readouterr()
        if case.kept:
            run()
        else:
            with pytest.raises(ValueError, match="no usable row"):
                run()
        lines = capsys.readouterr().out.splitlines()
        said[command] = [line for line in lines if line.startswith(("kept ", "left out ", "recordings that"))]
    assert said["check"] == said["prepare"] and said["check"][0].startswith(f"kept {len(case.kept)} rows"), said
    if case.kept:
        index = open_cache(config, BYTES)
        assert index.verdict == said["check"] and sorted(e.text for e in index.entries if e.split) == expected(case)[0]


def test_doubtful_recordings_are_dropped_on_request_by_all_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = lay(tmp_path / "data", clip((voice() * 50).clip(-1, 1)).files)
    config = DataConfig(sources=(str(source),), cache=str(tmp_path / "cache"), held_out=0.0, prefetch=0)
    assert len(prepare(config, BYTES).entries) == 2
    dropping = DataConfig(sources=config.sources, cache=config.cache, held_out=0.0, prefetch=0, doubtful="drop")
    assert [e.id for e in prepare(dropping, BYTES).entries] == ["good"]         # though the codes of both are in the cache
    assert [row["id"] for row in check_source(str(source), doubtful="drop")] == ["good"]
    said = capsys.readouterr().out
    assert said.count("left out 1 rows: 1 clipping") == 2 and said.count("recordings that may be faulty are left out") == 2
    voices = [(str(source / "x.wav"), TEXT)]
    prompt_example("x", config, load_tokenizer("bytes"), FakeCodec(), voices)
    assert "clipping" in capsys.readouterr().err
    with pytest.raises(ValueError, match="reference .*x.wav: clipping"):
        prompt_example("x", dropping, load_tokenizer("bytes"), FakeCodec(), voices)


def test_a_second_prepare_reads_no_recording_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lay(tmp_path / "data", clip(np.zeros(RATE)).files)
    config = DataConfig(sources=(str(source),), cache=str(tmp_path / "cache"), held_out=0.0, prefetch=0)
    first = prepare(config, BYTES)
    monkeypatch.setattr("corpus.checks.read_clip", None)
    assert prepare(config, BYTES).verdict == first.verdict


def test_check_tells_minutes_voices_rates_scripts_and_the_next_command(tmp_path: Path) -> None:
    lines = rows({"audio": "a.wav", "text": "hello", "speaker": "amal"}, {"audio": "b.wav", "text": "مرحبا", "speaker": "bo"})
    source = lay(tmp_path / "data", {"a.wav": Wav(voice(3)), "b.wav": Wav(voice(3, 1)), "manifest.jsonl": lines})
    rc, out, err = call("data.py", "check", source)
    assert rc == 0 and not err
    for line in ("0.1 minutes in 2 recordings, 2 rows", "voices (minutes): amal 0.1, bo 0.1", "sample rates: 8000 Hz (2)",
                 "scripts of the texts: ", "Arabic (1 rows)", "Latin (1 rows)", "characters a second: 1.7",
                 f"next: python train.py configs/higgs_ar.py --data.sources={source}"):
        assert line in out, (line, out)


@pytest.mark.parametrize("where", ["inside", "above", "elsewhere"])
def test_what_check_writes_trains_without_further_options(where: str, tmp_path: Path) -> None:
    lines = one(reference={"audio": "sub/r.wav", "text": "ref"}) + rows({"id": "p", "parts": ["x", "good"]}, {
        "manifest": "more.jsonl", "id": "q", "parts": ["m"]})
    source = lay(tmp_path / "a/data", {"x.wav": 1, "g.wav": 2, "sub/r.wav": 3, "m.wav": 4, "manifest.jsonl": lines,
                                       "more.jsonl": rows({"id": "m", "audio": "m.wav", "text": "more"})})
    folder = {"inside": source, "above": tmp_path / "a", "elsewhere": tmp_path / "b"}[where]
    check_source(str(source), write=str(folder))
    shutil.move(source / "more.jsonl", source / "gone") if where == "elsewhere" else None
    config = DataConfig(sources=(str(folder / "manifest.kept.jsonl"),), cache=str(tmp_path / "cache"), held_out=0.0, prefetch=0)
    index = prepare(config, BYTES)
    assert sorted(e.text for e in index.entries if e.split) == sorted([TEXT, "good", f"{TEXT} good", "more"])
    assert torch.equal(index.codes(0, 0), index.codes(index.entries[1].reference, 0)) and index.entries[0].id == "x#reference"
