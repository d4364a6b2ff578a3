"""The front door: small recordings and lists as other tools write them, each with the one right verdict of all commands."""

import base64
import importlib.util
import io
import json
import os
import shutil
import sys
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
    """Write the files of a case: Wav, text, bytes, a number (a voice with that seed), or a function that makes the file."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            content = Wav(voice(seed=content))
        if callable(content):
            content(path)
        elif isinstance(content, Wav):
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
    said: str = ""              # a part of what check and prepare print beside the verdict
    needs: str = ""             # an optional package
    hidden: str = ""            # an optional package that is not there


def one(**fields: Any) -> str:
    return rows({"id": "x", "audio": "x.wav", "text": TEXT} | fields, {"id": "good", "audio": "g.wav", "text": "good"})


def clip(samples: Any, out: str = "", warned: str = "", rate: int = RATE, **how: Any) -> Case:
    """A good clip and another one with a fault."""
    return Case({"g.wav": 7, "x.wav": Wav(samples, rate, how), "manifest.jsonl": one()}, ("good",) if out else (TEXT, "good"),
                (out,) if out else (), (warned,) if warned else ())


def sound(form: str = "WAV", seed: int = 1, **how: Any) -> bytes:
    """The bytes of a sound file of one voice."""
    file = io.BytesIO()
    soundfile.write(file, voice(1.0, seed), RATE, format=form, **how)
    return file.getvalue()


def media(name: str, codec: str, rate: int = 16000) -> Any:
    """A function that writes a voice as a phone does."""
    def write(path: Path) -> None:
        import av

        with av.open(str(path), "w", format=name) as container:
            track = container.add_stream(codec, rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.repeat(voice(1.0), 2 * rate // (2 * RATE))[None], format="fltp", layout="mono")
            frame.rate = rate
            for packet in (*track.encode(frame), *track.encode(None)):
                container.mux(packet)
    return write


def swap(wav: bytes, at: int, to: bytes) -> bytes:
    return wav[:at] + to + wav[at + len(to) :]


def chat(**part: Any) -> str:
    said = {TEXT: part, "good": {"audio_url": "g.wav"}}
    return rows(*({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": {"type": "audio"} | about}]}
                  for text, about in said.items()))


def broken(name: str, content: Any, reason: str, **about: Any) -> Case:
    """A good clip and a file of this name that cannot be used."""
    return Case({"g.wav": 7, name: content, "manifest.jsonl": one(audio=name)}, ("good",), (reason,), **about)


def fine(name: str, content: Any, warned: tuple[str, ...] = (), **about: Any) -> Case:
    return Case({"g.wav": 7, name: content, "manifest.jsonl": one(audio=name)}, (TEXT, "good"), (), warned, **about)


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
    "a zero-byte file": broken("x.wav", b"", "empty file"),
    "text named wav": Case({"g.wav": 7, "x.wav": "no sound" * 40, "manifest.jsonl": one()}, ("good",), ("unreadable audio",)),
    "a missing reference": Case({"g.wav": 7, "x.wav": 1, "manifest.jsonl": one(reference={"audio": "r.wav", "text": "ref"})}, ("good",),
                                ("missing file",)),
    "a silent reference": Case({"g.wav": 7, "x.wav": 1, "r.wav": Wav(np.zeros(RATE)),
                                "manifest.jsonl": one(reference={"audio": "r.wav", "text": "ref"})}, ("good",), ("all-zero audio",)),
    "a part that is left out": Case({"g.wav": 7, "x.wav": Wav(np.zeros(RATE)),
                                     "manifest.jsonl": one() + rows({"id": "p", "parts": ["good", "x"]})}, ("good",),
                                    ("all-zero audio", "its part x was left out")),
    # B1, B2: folders, names, copies
    "a flat folder is one speaker": Case({"a.wav": 1, "a.txt": "one", "b.wav": 2, "b.txt": "two"}, ("one", "two"), speakers=("data",)),
    "folders are speakers": Case({"amal/a.wav": 1, "amal/a.txt": "one", "bo/x/b.wav": 2, "bo/x/b.txt": "two"}, ("one", "two"),
                                 speakers=("amal", "bo")),
    "each without its partner": Case({"a.wav": 1, "a.txt": "one", "b.wav": 2, "c.txt": "two", "README.txt": "x"}, ("one",),
                                     ("no transcript", "no recording")),
    "a kept list in a folder": Case({"a.wav": 1, "a.txt": "one", "data.kept.jsonl": "{}", "data.rejected.jsonl": ""}, ("one",)),
    "speaker 0": Case({"a.wav": 1, "manifest.jsonl": rows({"id": 0, "audio": "a.wav", "text": TEXT, "speaker": 0})}, speakers=("0",)),
    "speaker null": Case({"a.wav": 1, "manifest.jsonl": rows({"id": None, "audio": "a.wav", "text": TEXT, "speaker": None})},
                         speakers=("",)),
    "speaker 0 of a cloning sample": Case({"a.wav": 1, "s.jsonl": rows({"audio_file": "a.wav", "transcript": TEXT, "speaker_id": 0,
                                                                       "id": 0})}, speakers=("0",)),
    "rows without ids that share a clip": Case({"a.wav": 1, "manifest.jsonl": rows(*({"audio": "a.wav", "text": t} for t in "xyz"))},
                                               ("x", "y", "z"), (), ("duplicate audio",)),
    "ids that are given twice": Case({"a.wav": 1, "b.wav": 2, "manifest.jsonl": rows(
        *({"id": "a", "audio": f"{n}.wav", "text": n} for n in "ab"))}, ("a",), ("duplicate id",)),
    "shards": Case({"a.wav": 1, "b.wav": 2, **{f"part-{n}.jsonl": rows({"audio": f"{n}.wav", "text": n}) for n in "ab"}}, ("a", "b")),
    "train and valid": Case({"a.wav": 1, "b.wav": 2, "train.jsonl": rows({"audio": "a.wav", "text": "a"}),
                             "valid.jsonl": rows({"audio": "b.wav", "text": "b"}) + "{"}, ("a", "b"), ("malformed json",)),
    "lists of different layouts": Case({"a.jsonl": rows({"audio": "a.wav", "text": "a"}), "b.jsonl": rows({"path": "a.wav"})},
                                       refused=r"a.jsonl \(manifest\), b.jsonl \(stereo dialogues\); name the one"),
    "path and text": Case({"a.wav": 1, "x.jsonl": rows({"path": "a.wav", "text": TEXT})}),
    "audio and sentence": Case({"a.wav": 1, "x.jsonl": rows({"audio": "a.wav", "sentence": TEXT})}),
    # B3: tables and trees
    "more cells than the header": Case({"a.wav": 1, "metadata.csv": f"file_name,text\na.wav,{TEXT}\na.wav,one, two\n"}, (TEXT,),
                                       ("cells do not fit the header",)),
    "a newline in a quoted cell": Case({"a.wav": 1, "metadata.csv": 'file_name,text\na.wav,"hello\n\nthere"\n'}, ("hello\n\nthere",)),
    "a quote that is not closed": Case({"a.wav": 1, "b.wav": 2, "metadata.csv": f'file_name,text\na.wav,"x\nb.wav,{TEXT}\n'}, (TEXT,),
                                       ("malformed row",)),
    "semicolons": Case({"a.wav": 1, "metadata.csv": f"file_name;text\na.wav;{TEXT}\n"}),
    "tabs": Case({"a.wav": 1, "metadata.tsv": f"file_name\ttext\na.wav\t{TEXT}\n"}),
    "tabs and quotes": Case({"a.wav": 1, "b.wav": 2, "metadata.tsv": 'path\tsentence\na.wav\t"""yes"" she"\nb.wav\t"no" he\n'},
                            ('"yes" she', '"no" he')),
    "tabs without a header": Case({"a.wav": 1, "list.tsv": f"a.wav\t{TEXT}\n"}),
    "commas without a header": Case({"a.wav": 1, "list.csv": f"a.wav,{TEXT}\n"}),
    "VITS": Case({"wavs/a.wav": 1, "train.txt": f"wavs/a.wav|{TEXT}\n"}, source="train.txt"),
    "VITS with speakers": Case({"a.wav": 1, "b.wav": 2, "train.txt": "a.wav|0|one\nb.wav|12|two\n"}, ("one", "two"), source="train.txt",
                               speakers=("0", "12")),
    "path, speaker, language, text": Case({"a.wav": 1, "esd.list": f"a.wav|amal|EN|{TEXT}\n"}, source="esd.list", speakers=("amal",)),
    "XTTS": Case({"wavs/a.wav": 1, "metadata_train.csv": f"audio_file|text|speaker_name\nwavs/a.wav|{TEXT}|amal\n"}, speakers=("amal",)),
    "Piper": Case({"wav/a.wav": 1, "metadata.csv": f"a|{TEXT}\n"}),
    "LJSpeech of flac": Case({"wavs/L-1.flac": 1, "metadata.csv": f"L-1|Hello|{TEXT}\n"}),
    "a list whose cells do not fit": Case({"a.wav": 1, "b.wav": 2, "l.txt": "a.wav|0|one\nb.wav|1|two\na.wav|three\n"}, ("one", "two"),
                                          ("cells do not fit",), source="l.txt"),
    "NeMo": Case({"a.wav": Wav(voice(2)), "m.json": rows({"audio_filepath": "a.wav", "text": "x", "duration": 1.0, "offset": 0.0},
                                                         {"audio_filepath": "a.wav", "text": "y", "duration": 1.0, "offset": 1.0})},
                 ("x", "y"), source="m.json"),
    "Kaldi": Case({"a.wav": 1, "wav.scp": "u1 a.wav\nu2 gone.wav\nu3 sox x |\n", "text": f"u1 {TEXT}\nu2 b\nu3 c\nu4 d\n",
                   "utt2spk": "u1 amal\n"}, (TEXT,), ("missing file", "a command, not a file", "no recording"), speakers=("amal",)),
    "Kaldi with segments": Case({"r.wav": Wav(voice(2)), "wav.scp": "r r.wav\n", "text": "u1 one\nu2 two\n",
                                 "segments": "u1 r 0 1\nu2 r 1.0 2.0\nu3 r 0 1\n"}, ("one", "two"), ("no transcript",)),
    "Common Voice": Case({"clips/a.wav": 1, "clips/b.wav": 2, "train.tsv": f"client_id\tpath\tsentence\nc0\ta.wav\t{TEXT}\n",
                          "dev.tsv": "client_id\tpath\tsentence\nc1\tb.wav\tdev\n", "invalidated.tsv": "client_id\tpath\tsentence\n",
                          "reported.tsv": "x\ty\n"}, (TEXT, "dev"), speakers=("c0", "c1")),
    "LibriSpeech": Case({"84/1/84-1-0000.flac": 1, "84/1/84-1.trans.txt": f"84-1-0000 {TEXT}\n84-1-0001 gone\n"}, speakers=("84",)),
    "LibriTTS": Case({"train/19/1/19_1_0.wav": 1, "train/19/1/19_1_0.normalized.txt": TEXT, "train/19/1/19_1_0.original.txt": "x"},
                     speakers=("19",)),
    # B4: files that people have
    "m4a": fine("x.m4a", media("mp4", "aac"), needs="av"),
    "aac": fine("x.aac", media("adts", "aac"), needs="av"),
    "mp4": fine("x.mp4", media("mp4", "aac"), needs="av"),
    "webm": fine("x.webm", media("webm", "libopus", 48000), needs="av"),
    "m4a named wav": fine("x.wav", media("mp4", "aac"), needs="av"),
    "m4a without PyAV": broken("x.m4a", b"\0\0\0\x18ftypM4A " + bytes(400), "needs PyAV", hidden="av", said="pip install av"),
    "webm without PyAV": broken("x.webm", b"\x1aE\xdf\xa3" + bytes(400), "needs PyAV", hidden="av"),
    "a damaged m4a": broken("x.m4a", b"\0\0\0\x18ftypM4A " + bytes(400), "unreadable audio", needs="av"),
    "m4a in a folder, without PyAV": Case({"a.m4a": b"\0\0\0\x18ftypM4A " + bytes(400), "a.txt": TEXT, "g.wav": 7, "g.txt": "good"},
                                          ("good",), ("needs PyAV",), hidden="av"),
    "GSM": fine("x.wav", sound(subtype="GSM610")),
    "u-law": fine("x.wav", sound(subtype="ULAW")),
    "ADPCM": fine("x.wav", sound(subtype="IMA_ADPCM")),
    "aiff": fine("x.aiff", sound("AIFF")),
    "a suffix in capitals": fine("x.WAV", 1),
    "a truncated wav": broken("x.wav", sound()[:9000], "truncated file"),
    "a truncated flac": broken("x.flac", sound("FLAC")[:9000], "truncated file"),
    "a truncated mp3": broken("x.mp3", sound("MP3")[:2500], "truncated file"),
    "a truncated ogg": broken("x.ogg", sound("OGG")[:5000], "truncated file"),
    "a truncated aiff": broken("x.aiff", sound("AIFF")[:9000], "truncated file"),
    "a wav that was never closed": fine("x.wav", swap(swap(sound(), 4, b"\xff" * 4), 40, b"\xff" * 4)),
    "a Git-LFS pointer": broken("x.wav", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "Git-LFS pointer",
                                said="git lfs pull"),
    "a web page": broken("x.mp3", "<!DOCTYPE html><html>not found", "a web page, not a sound"),
    "a pipe": broken("x.wav", os.mkfifo, "not a file"),
    "a device": broken("x.wav", lambda path: path.symlink_to("/dev/zero"), "path outside the folder (symlink)"),
    "a data url": Case({"g.wav": 7, "manifest.jsonl": one(audio=f"data:audio/wav;base64,{base64.b64encode(sound()).decode()}")},
                       (TEXT, "good")),
    "a data url without a sound": Case({"g.wav": 7, "manifest.jsonl": one(audio="data:audio/wav;base64,AAAA")}, ("good",),
                                       ("inline audio",)),
    "a web address": Case({"g.wav": 7, "manifest.jsonl": one(audio="https://a.org/x.wav")}, ("good",), ("a web address",)),
    "a file url": Case({"g.wav": 7, "x y.wav": 1, "manifest.jsonl": one(audio="file://x%20y.wav")}, (TEXT, "good")),
    "a file url outside": Case({"g.wav": 7, "manifest.jsonl": one(audio="file:///etc/x.wav")}, ("good",), ("path outside the folder",)),
    "an object of datasets": Case({"g.wav": 7, "x.wav": 1, "manifest.jsonl": one(audio={"path": "x.wav", "bytes": None})}, (TEXT, "good")),
    "samples as a list": Case({"g.wav": 7, "manifest.jsonl": one(audio={"array": [0.1], "sampling_rate": 8000})}, ("good",),
                              ("audio is an object",)),
    "a placeholder and base64": Case({"g.wav": 7, "x.jsonl": chat(audio_url="placeholder", raw_audio=base64.b64encode(sound()).decode())},
                                     (TEXT, "good")),
    "a placeholder alone": Case({"g.wav": 7, "x.jsonl": chat(audio_url="placeholder")}, ("good",), ("inline audio",)),
    "pieces": Case({"r.flac": Wav(voice(3)), "manifest.jsonl": rows(*({"audio": "r.flac", "text": t, "offset": n, "duration": 1.0}
                                                                      for n, t in enumerate("xyz")))}, ("x", "y", "z")),
    "pieces of GSM": Case({"r.wav": sound(subtype="GSM610"), "manifest.jsonl": rows({"audio": "r.wav", "text": "x", "offset": 0.25,
                                                                                    "duration": 0.5})}, ("x",)),
    "a piece of an m4a": Case({"r.m4a": media("mp4", "aac"), "manifest.jsonl": rows({"audio": "r.m4a", "text": "x", "offset": 0.25,
                                                                                   "duration": 0.5})}, ("x",), needs="av"),
    "pieces outside the recording": Case({"r.wav": Wav(voice(2)), "g.wav": 7, "manifest.jsonl": one(audio="r.wav", offset=1.0,
                                                                                                 duration=2.0)},
                                         ("good",), ("piece outside the recording",)),
    "a piece that begins after the end": Case({"r.wav": Wav(voice(2)), "g.wav": 7, "manifest.jsonl": one(audio="r.wav", offset=5.0,
                                                                                                      duration=1.0)},
                                              ("good",), ("piece outside the recording",)),
    "a piece that is too long": Case({"r.wav": Wav(voice(40)), "g.wav": 7, "manifest.jsonl": one(audio="r.wav", offset=1.0,
                                                                                               duration=35.0)},
                                     ("good",), ("duration outside 0.2..30 s",)),
    "opposite phase": clip(np.stack([voice(), -voice()], 1), warned="channels in opposite phase"),
    "the same voice on both channels": clip(np.stack([voice(), voice()], 1)),
    "a voice on one channel": clip(np.stack([voice(), 0 * voice()], 1), warned="stereo"),
    "recordings that no row names": Case({"g.wav": 7, "x.wav": 1, "y.wav": 2, "z/z.mp3": sound("MP3"), "manifest.jsonl": one()},
                                         (TEXT, "good"), said="2 recordings are in no row: y.wav, z/z.mp3"),
    # B7, B8: encodings and JSON
    "UTF-16 without a mark": Case({"a.wav": 1, "metadata.csv": f"file_name,text\r\na.wav,{TEXT}\r\n".encode("utf-16-le")}),
    "UTF-16 of the other order": Case({"a.wav": 1, "a.txt": "مرحبا بك\n".encode("utf-16-be")}, ("مرحبا بك",)),
    "three columns without a header": Case({"wavs/a.wav": 1, "l.txt": f"a|Hello|{TEXT}\n"}, source="l.txt", said="no header: read as"),
    "half a surrogate pair": Case({"g.wav": 7, "x.wav": 1, "manifest.jsonl": one(text="\ud800")}, ("good",), ("bad encoding",)),
    "half a surrogate pair in a path": Case({"g.wav": 7, "manifest.jsonl": one(audio="\ud800.wav")}, ("good",), ("bad encoding",)),
    "half a surrogate pair in a message": Case({"g.wav": 7, "x.jsonl": rows(
        *({"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": {"type": "audio", "audio_url": "g.wav"}}]}
          for t in (TEXT, "\udfff")))}, (TEXT,), ("bad encoding",)),
    "a byte order mark": Case({"a.wav": 1, "metadata.csv": f"\ufefffile_name,text\na.wav,{TEXT}\n"}),
    "a byte order mark in a manifest": Case({"g.wav": 7, "x.wav": 1, "manifest.jsonl": "\ufeff" + one()}, (TEXT, "good")),
    "U+2028": Case({"g.wav": 7, "x.wav": 1, "manifest.jsonl": rows(json.dumps({"audio": "x.wav", "text": "a\u2028b"}, ensure_ascii=False))},
                   ("a\u2028b",)),
    "UTF-16": Case({"a.wav": 1, "metadata.csv": f"file_name,text\r\na.wav,{TEXT}\r\n".encode("utf-16")}),
    "UTF-16 transcript": Case({"a.wav": 1, "a.txt": "مرحبا\n".encode("utf-16")}, ("مرحبا",)),
    "a Latin-1 line": Case({"a.wav": 1, "b.wav": 2, "metadata.csv": b"file_name,text\na.wav,caf\xe9\nb.wav,hello there\n"}, (TEXT,),
                           ("bad encoding",)),
    "a Latin-1 transcript": Case({"a.wav": 1, "a.txt": b"caf\xe9", "b.wav": 2, "b.txt": TEXT}, (TEXT,), ("bad encoding",)),
    "a transcript that is a number": Case({"g.wav": 7, "x.wav": 1, "manifest.jsonl": one(text=42)}, ("good",), ("the text is a number",)),
    "a number in a table": Case({"a.wav": 1, "metadata.csv": "file_name,text\na.wav,42\n"}, ("42",)),
    "malformed json": Case({"g.wav": 7, "manifest.jsonl": '{"id": "x", "audio" 1}\n' + one()}, ("good",),
                           ("malformed json", "missing file")),
    "jsonl named .json": Case({"g.wav": 7, "x.wav": 1, "list.json": one()}, (TEXT, "good"), source="list.json"),
    "a list named .jsonl": Case({"a.wav": 1, "list.jsonl": json.dumps([{"audio": "a.wav", "text": TEXT}], indent=1)}),
    "lines that end with commas": Case({"g.wav": 7, "x.wav": 1, "list.jsonl": one().replace("}\n", "},\n")}, (TEXT, "good")),
    "one object over several lines": Case({"a.wav": 1, "list.jsonl": json.dumps({"audio": "a.wav", "text": TEXT}, indent=1)}),
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
def test_all_commands_say_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs}")
    if case.hidden:
        monkeypatch.setitem(sys.modules, case.hidden, None)
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
        out, err = capsys.readouterr()
        assert case.said in out + err, (command, out, err)
        lines = out.splitlines()
        said[command] = [line for line in lines if line.startswith(("kept ", "left out ", "recordings that"))]
    assert said["check"] == said["prepare"] and said["check"][0].startswith(f"kept {len(case.kept)} rows"), said
    if case.kept:
        index = open_cache(config, BYTES)
        assert index.verdict == said["check"] and sorted(e.text for e in index.entries if e.split) == expected(case)[0]


def test_malformed_json_keeps_its_line_and_column(tmp_path: Path) -> None:
    m = read_manifest(lay(tmp_path / "a", {"x.jsonl": rows({"audio": "a.wav", "text": "x"}, '{"audio" 1}')}))
    assert m.bad[0].where == "line 2" and "column 10" in m.bad[0].fix
    (tmp_path / "x.json").write_text('[\n{"audio": "a.wav",\n\n"text" "x"}]')
    with pytest.raises(ValueError, match="line 4: malformed json, fix the file, column 8"):
        read_manifest(tmp_path / "x.json")


def test_a_reference_without_a_pair_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for speakers in ("ab", "aa"):
        lines = rows(*({"audio": f"{n}.wav", "text": TEXT, "speaker": s} for n, s in enumerate(speakers)))
        source = lay(tmp_path / speakers, {"0.wav": 0, "1.wav": 1, "manifest.jsonl": lines})
        prepare(DataConfig(sources=(str(source),), cache=str(tmp_path / "cache"), held_out=0.0, reference=0.5), BYTES)
        assert ("data.reference=0.5 finds no pair" in capsys.readouterr().err) == (speakers == "ab")


def test_lists_that_are_held_out_by_name_say_how(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = lay(tmp_path / "data", CASES["train and valid"].files)
    assert {row["text"]: row.get("split") for row in read_manifest(source).rows} == {"a": None, "b": "held-out"}
    config = DataConfig(sources=(str(source),), cache=str(tmp_path / "cache"), held_out=0.0)
    prepare(config, BYTES)
    assert "use --data.split=manifest" in capsys.readouterr().err
    check_source(str(source))
    assert "--data.split=manifest" in capsys.readouterr().out.splitlines()[-1]


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
