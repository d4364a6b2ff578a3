"""The front door: small recordings and lists as other tools write them, each with the one right verdict of all commands."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import CONFIG, ROOT, call
from fake_corpus import BYTES, FakeCodec

import data
from audio.wav import load_wav
from corpus.checks import check_source, judge, judge_clip
from corpus.data_config import DataConfig
from corpus.examples import prompt_example
from corpus.index import open_cache, prepare
from corpus.layouts import read_manifest
from generation.dialogue import user_side
from options import run_config
from streams import StreamTable
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
    file: str = ""              # a recording to give as a reference too
    chat: bool = False          # conversations of texts: for a model without speech
    duplex: bool = False        # dialogues
    agent: str = ""             # DataConfig.agent
    needs: str = ""             # an optional package
    hidden: str = ""            # an optional package that is not there


def one(**fields: Any) -> str:
    return rows({"id": "x", "audio": "x.wav", "text": TEXT} | fields, {"id": "good", "audio": "g.wav", "text": "good"})


def clip(samples: Any, out: str = "", warned: str = "", rate: int = RATE, **how: Any) -> Case:
    """A good clip and another one with a fault."""
    return Case({"g.wav": 7, "x.wav": Wav(samples, rate, how), "manifest.jsonl": one()}, ("good",) if out else (TEXT, "good"),
                (out,) if out else (), (warned,) if warned else (), file="x.wav")


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


def table(**columns: Any) -> Any:
    """A function that writes a parquet file, or an Arrow file as `datasets` does."""
    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        found = pyarrow.table(columns)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(found, path, row_group_size=2)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, found.schema) as stream:
                stream.write_table(found)
    return write


def inside(*seeds: int) -> list[dict[str, Any]]:
    return [{"bytes": sound("FLAC", n), "path": f"{n}.flac"} for n in seeds]


def talk(*turns: str, **fields: Any) -> dict[str, Any]:
    """A conversation of texts, user first."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]} | fields


def texts(*lines: Any, kept: tuple[str, ...] = (), out: str = "", **about: Any) -> Case:
    """Conversations of texts."""
    return Case({"x.jsonl": rows(*lines)}, kept, (out,) if out else (), chat=True, **about)


def dialogue(words: Any, out: str = "", warned: tuple[str, ...] = (), text: str = "this", item: Any = None, **about: Any) -> Case:
    """A stereo dialogue with its alignments beside it."""
    wav = Wav(np.stack([voice(1.5), voice(1.5, 1)], 1))
    files = {"d.wav": wav, "d.json": json.dumps(words), "x.jsonl": rows({"path": "d.wav", "duration": 1.5} | (item or {}))}
    return Case(files, () if out else (text,), (out,) if out else (), warned, duplex=True, **about)


MAIN = [["this", [0.1, 0.3], "SPEAKER_MAIN"], ["is", [0.5, 0.7], "SPEAKER_1"]]


def labelled(agent: Any, user: Any) -> dict[str, Any]:
    return {"alignments": [["this", [0.1, 0.3], agent], ["is", [0.5, 0.7], user]]}


def broken(name: str, content: Any, reason: str, **about: Any) -> Case:
    """A good clip and a file of this name that cannot be used."""
    return Case({"g.wav": 7, name: content, "manifest.jsonl": one(audio=name)}, ("good",), (reason,),
                file="" if reason.startswith("path") else name, **about)


def broken_list(lines: str, reason: str) -> Case:
    return Case({"g.wav": 7, "manifest.jsonl": lines}, ("good",), (reason,))


def fine(name: str, content: Any, warned: tuple[str, ...] = (), **about: Any) -> Case:
    return Case({"g.wav": 7, name: content, "manifest.jsonl": one(audio=name)}, (TEXT, "good"), (), warned, file=name, **about)


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
    "an empty name": broken_list(one(audio=""), "no audio"),
    "null for a name": broken_list(one(audio=None), "no audio"),
    "a text among recordings": broken_list(rows({"text": TEXT}) + one(audio="g.wav").splitlines()[1], "no audio"),
    "an empty cell": Case({"a.wav": 1, "metadata.csv": f"file_name,text\na.wav,{TEXT}\n,nobody\n"}, (TEXT,), ("no audio",)),
    "recordings that no row names": Case({"g.wav": 7, "x.wav": 1, "y.wav": 2, "z/z.mp3": sound("MP3"), "manifest.jsonl": one()},
                                         (TEXT, "good"), said="2 recordings are in no row: y.wav, z/z.mp3"),
    "a parquet file": Case({"x.parquet": table(audio=inside(1, 2, 3), text=["one", "two", "three"])}, ("one", "two", "three"),
                           needs="pyarrow"),
    "a data set of the Hub": Case({"README.md": "x", "data/train-00000-of-00001.parquet": table(audio=inside(1), sentence=["one"],
                                                                                               client_id=["c"], up_votes=[2]),
                                   "data/test-00000-of-00001.parquet": table(audio=inside(2), sentence=["two"], client_id=["d"],
                                                                             up_votes=[0])},
                                  ("one", "two"), speakers=("c", "d"), said="up_votes (2 rows)", needs="pyarrow"),
    "a datasets folder": Case({"dataset_info.json": "{}", "state.json": "{}", "data-00000-of-00001.arrow": table(
        audio=inside(1, 2), text=["one", "two"]), "cache-1.arrow": table(text=["x"])}, ("one", "two"),
                               needs="pyarrow"),
    "a datasets dict": Case({"dataset_dict.json": "{}", "train/data-00000-of-00001.arrow": table(audio=inside(1), text=["one"]),
                             "validation/data-00000-of-00001.arrow": table(audio=inside(2), text=["two"])}, ("one", "two"),
                            needs="pyarrow"),
    "a table of paths": Case({"a.wav": 1, "x.parquet": table(audio=["a.wav", "b.wav"], text=[TEXT, "gone"])}, (TEXT,), ("missing file",),
                             needs="pyarrow"),
    "a recording that is missing in a table": Case({"x.parquet": table(audio=[*inside(1), None], text=[TEXT, "gone"])}, (TEXT,),
                                                   ("no audio",), needs="pyarrow"),
    "a table with a broken sound": Case({"x.parquet": table(audio=[*inside(1), {"bytes": b"x", "path": None}], text=[TEXT, "x"])}, (TEXT,),
                                        ("unreadable audio",), needs="pyarrow"),
    "a table of conversations": Case({"x.parquet": table(messages=[[{"role": "user", "content": "hi"}, {"role": "assistant",
                                                                                                      "content": "yes"}]])},
                                     ("yes",), chat=True, needs="pyarrow"),
    "a damaged parquet file": Case({"x.parquet": b"PAR1" + bytes(40)}, refused="cannot be read as a table", needs="pyarrow"),
    "a parquet file without pyarrow": Case({"x.parquet": b"PAR1" + bytes(40)}, refused="pip install pyarrow", hidden="pyarrow"),
    # B5: conversations
    "a turn with weight 0": texts({"messages": [{"role": "assistant", "content": "no", "weight": 0}, {"role": "assistant", "content": "yes",
                                                                                                   "weight": 1}]}, kept=("yes",)),
    "loss false": texts({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "loss": False}]},
                        talk("hi", "good"), kept=("good",), out="no target"),
    "a weight that is none": texts({"messages": [{"role": "assistant", "content": "yes", "weight": "high"}]}, talk("hi", "good"),
                                   kept=("good",), out="malformed messages"),
    "a system message beside": texts(talk("hi", "yes", system="Be kind."), kept=("yes",)),
    "two system messages": texts({"system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "assistant", "content": "x"}]},
                                 talk("hi", "good"), kept=("good",), out="two system messages"),
    "tools": texts(talk("hi", "yes", tools=[{"name": "f"}]), talk("hi", "good", tools=[]), kept=("good",),
                   out='unsupported "tools"'),
    "a tool's turn": texts({"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "3"},
                                         {"role": "assistant", "content": "x"}]}, talk("hi", "good"), kept=("good",),
                           out="unsupported role"),
    "a developer": texts({"messages": [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hi"},
                                       {"role": "assistant", "content": "yes"}]}, kept=("yes",)),
    "an unknown role": texts({"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "x"}]},
                             talk("hi", "good"), kept=("good",), out="malformed messages"),
    "unknown fields": texts(talk("hi", "yes", ref_speakers=["a"], score=3), talk("hi", "good", score=1), kept=("yes", "good"),
                            said="score (2 rows), ref_speakers (1 rows)"),
    "a field of a turn": texts({"messages": [{"role": "assistant", "content": "yes", "mood": "glad"}]}, kept=("yes",),
                               said="messages.mood (1 rows)"),
    "start_index as a text": texts(talk("hi", "no", "hm", "yes", start_index="3"), kept=("yes",)),
    "start_index behind the end": texts(talk("hi", "no", start_index=4), talk("hi", "good"), kept=("good",), out="no target"),
    "start_index that is none": texts(talk("hi", "no", start_index="end"), talk("hi", "good"), kept=("good",), out="malformed field"),
    "an empty reply": texts(talk("hi", " "), talk("hi", "good"), kept=("good",), out="empty reply"),
    "ShareGPT": texts({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, kept=("yes",)),
    "prompt and completion": texts({"prompt": "hi", "completion": "yes"}, kept=("yes",)),
    "images": texts(talk("hi", "yes", images=["a.png"]), talk("hi", "good"), kept=("good",), out='unsupported "images"'),
    "a pair": texts({"prompt": "hi", "chosen": "yes", "rejected": "no"}, kept=("yes",)),
    "a pair with a list as the prompt": texts({"prompt": [{"role": "user", "content": "hi"}],
                                               "chosen": [{"role": "assistant", "content": "yes"}],
                                               "rejected": [{"role": "assistant", "content": "no"}]}, kept=("yes",)),
    "a pair of whole conversations": texts({"prompt": "hi", "chosen": talk("hi", "yes")["messages"],
                                            "rejected": talk("hi", "no")["messages"]}, kept=("yes",)),
    "a pair without a prompt": texts({"chosen": talk("hi", "yes")["messages"], "rejected": talk("hi", "no")["messages"]}, kept=("yes",)),
    "a pair of two questions": texts({"chosen": talk("hi", "yes")["messages"], "rejected": talk("ho", "no")["messages"]},
                                     {"prompt": "hi", "chosen": "good", "rejected": "no"}, kept=("good",), out="malformed pair"),
    "a pair of equal sides": texts({"prompt": "hi", "chosen": "yes", "rejected": "yes"},
                                   {"prompt": "hi", "chosen": "good", "rejected": "no"}, kept=("good",), out="identical pair"),
    "a pair with an empty side": texts({"prompt": "hi", "chosen": "yes", "rejected": ""},
                                       {"prompt": "hi", "chosen": "good", "rejected": "no"}, kept=("good",), out="empty reply"),
    "ms-swift's pair": texts(talk("hi", "yes", rejected_response="no"), kept=("yes",)),
    "ms-swift's audio and text": Case({"a.wav": 1, "b.wav": 2, "x.jsonl": rows(talk("<audio>Say it.", "<audio>", audios=[
        "a.wav", "b.wav"]))}, ("Say it.",)),
    "ms-swift's audio by name": Case({"b.wav": 2, "x.jsonl": rows(talk("Say it.", "<audio>b.wav</audio>"))}, ("Say it.",)),
    "<audio> without a file": Case({"g.wav": 7, "x.jsonl": chat(audio_url="g.wav") + rows(talk("hi", "<audio>"))}, (TEXT, "good"),
                                   ("wrong placeholder count",), ("duplicate audio",)),
    "start and end of a recording": Case({"r.wav": Wav(voice(3)), "g.wav": 7, "x.jsonl": chat(audio_url="r.wav", start=0.5, end=1.5)},
                                         (TEXT, "good")),
    "an end before its start": Case({"r.wav": Wav(voice(3)), "g.wav": 7, "x.jsonl": chat(audio_url="r.wav", start=2, end=1)}, ("good",),
                                    ("malformed field",)),
    "a cloning sample without the words of its reference": Case({"a.wav": 1, "r.wav": 2, "b.wav": 3, "x.jsonl": rows(
        {"audio_file": "a.wav", "transcript": "x", "ref_audio_file": "r.wav"}, {"audio_file": "b.wav", "transcript": TEXT})}, (TEXT,),
        ("reference without transcript",)),
    "pieces of a cloning sample": Case({"r.wav": Wav(voice(3)), "x.jsonl": rows(
        *({"audio_file": "r.wav", "transcript": t, "offset": float(n), "duration": 1.0, "scene": "A room.", "emotion": "calm"}
          for n, t in enumerate("xyz")))}, ("x", "y", "z"), said="emotion (3 rows)"),
    # B6: dialogues
    "a dialogue": dialogue({"alignments": MAIN}),
    "a bare list of words": dialogue(MAIN),
    "objects": dialogue([{"word": word, "start": n / 2, "end": n / 2 + 0.2, "speaker": "AB"[n]} for n, word in enumerate(("this", "is"))]),
    "diarised labels": dialogue(labelled("SPEAKER_00", "SPEAKER_01"), "no words of the agent", said="--data.agent=SPEAKER_00"),
    "diarised labels with the option": dialogue(labelled("SPEAKER_00", "SPEAKER_01"), agent="SPEAKER_00"),
    "left and right": dialogue(labelled("L", "R"), "no words of the agent", said="its speakers are L, R"),
    "left and right with the option": dialogue(labelled("L", "R"), agent="L"),
    "labels of null": dialogue(labelled(None, None), "no words of the agent", said="its speakers are None"),
    "labels in lower case": dialogue(labelled("speaker_main", "x"), "no words of the agent", said="speaker_main"),
    "an option that fits no label": dialogue({"alignments": MAIN}, "no words of the agent", agent="L", said="SPEAKER_MAIN"),
    "no words": dialogue({"alignments": []}, warned=("no words",), text=""),
    "words of the user only": dialogue({"alignments": MAIN[1:]}, "no words of the agent"),
    "a word just before the beginning": dialogue({"alignments": [["this", [-0.02, 0.3], "SPEAKER_MAIN"]]},
                                                 warned=("alignments corrected",)),
    "a word long before the beginning": dialogue({"alignments": [["this", [-3, 0.3], "SPEAKER_MAIN"]]}, "malformed alignments"),
    "a word behind the end": dialogue({"alignments": [["this", [4.0, 4.3], "SPEAKER_MAIN"]]}, "alignments do not fit"),
    "a piece of a dialogue": dialogue({"alignments": [*MAIN, ["it", [0.9, 1.1], "SPEAKER_MAIN"]]}, text="it",
                                      item={"offset": 0.5, "duration": 1.0}),
    "a field of a dialogue": dialogue({"alignments": MAIN}, item={"topic": "cats"}, said="topic (1 rows)"),
    "a dialogue without alignments": Case({"d.wav": Wav(np.stack([voice(), voice(seed=1)], 1)), "x.jsonl": rows({"path": "d.wav"})}, (),
                                          ("no alignment file",), duplex=True),
    "dialogues and partners that are missing": Case(
        {"d.wav": Wav(np.stack([voice(), voice(seed=1)], 1)), "d.json": json.dumps(MAIN[:1]), "e.json": "[]",
         "f.wav": Wav(np.stack([voice(seed=2), voice(seed=3)], 1))}, ("this",),
        ("no alignment file", "no recording"), duplex=True),
    "a mono dialogue": Case({"d.wav": 1, "d.json": json.dumps(MAIN[:1]), "x.jsonl": rows({"path": "d.wav"})}, (), ("not stereo",),
                            duplex=True),
    "alignments in a manifest": Case({"d.wav": Wav(np.stack([voice(), voice(seed=1)], 1)), "manifest.jsonl": rows(
        {"audio": "d.wav", "stereo": True, "text": "this", "alignments": labelled("L", "R")["alignments"]})}, ("this",),
        duplex=True, agent="L"),
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


class Wide(FakeCodec):
    """The fake codec with as many codebooks as a model has."""

    def __init__(self, codebooks: int = 2) -> None:
        self.num_codebooks = codebooks

    def encode(self, wav: torch.Tensor) -> torch.Tensor:
        return super().encode(wav)[:, [n % 2 for n in range(self.num_codebooks)]]


@pytest.fixture(autouse=True)
def fake_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.index.load_codec", lambda spec, codebooks=2: Wide(codebooks))


def expected(case: Case) -> tuple[list[str], list[str], list[str]]:
    return sorted(case.kept), sorted(case.out), sorted(set(case.warned))


USUAL = {"sample rate below 16 kHz"}                    # all recordings here: 10 kB each


def verdict_of(m: Any) -> tuple[list[str], list[str], list[str]]:
    return (sorted(row["text"] for row in m.rows), sorted(b.reason for b in m.bad), sorted({w.reason for w in m.warned} - USUAL))


@cache
def model_for(chat: bool, duplex: bool) -> tuple[StreamTable, str]:
    """The grid and the tokenizer that a case is prepared for."""
    if not chat and not duplex:
        return BYTES, "bytes"
    config = run_config(ROOT / f"configs/{'ivr_qwen' if chat else 'moshi_lora'}.py", "smoke")
    return config.model.table, config.data.tokenizer


@pytest.mark.parametrize("name", CASES)
def test_all_commands_say_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs}")
    if case.hidden:
        monkeypatch.setitem(sys.modules, case.hidden, None)
    table, tokenizer = model_for(case.chat, case.duplex)
    source = lay(tmp_path / "data", case.files) / case.source
    config = DataConfig(sources=(str(source),), cache=str(tmp_path / "cache"), held_out=0.0, prefetch=0, tokenizer=tokenizer,
                        agent=case.agent)
    commands = {"check": lambda: check_source(str(source), agent=case.agent), "prepare": lambda: prepare(config, table)}
    if case.refused:
        for run in commands.values():
            with pytest.raises((ValueError, FileNotFoundError), match=case.refused):
                run()
        return
    m = read_manifest(source, agent=case.agent)
    judge(m, (config.min_seconds, config.max_seconds), duplex=case.duplex)
    assert verdict_of(m) == expected(case), m.bad
    if case.speakers is not None:
        assert tuple(sorted({row["speaker"] for row in m.rows})) == case.speakers
    said = {}
    for command, run in commands.items():
        capsys.readouterr()
        if case.kept:
            run()
        else:
            with pytest.raises(ValueError, match="no usable row"):
                run()
        out, err = capsys.readouterr()
        assert case.said in out + err, (command, out, err)
        said[command] = verdict_lines_of(out)
    assert said["check"] == said["prepare"] and said["check"][0].startswith(f"kept {len(case.kept)} rows"), said
    if case.kept:
        shown_and_trained(config, table, said["check"], expected(case)[0], capsys, monkeypatch)
    if case.file:
        as_a_reference(source / case.file, case, config, capsys)


def verdict_lines_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(("kept ", "left out ", "recordings that"))]


def shown_and_trained(config: DataConfig, table: StreamTable, verdict: list[str], kept: list[str], capsys: pytest.CaptureFixture,
                      monkeypatch: pytest.MonkeyPatch) -> None:
    """`show` prints the verdict of the others, and a pass of training reads the rows that they keep."""
    monkeypatch.setattr("data.load_run", lambda *_: (SimpleNamespace(data=config, model=SimpleNamespace(table=table)), ""))
    data.show_command(["config.py"])
    assert verdict_lines_of(capsys.readouterr().out) == verdict
    index = open_cache(config, table)
    assert sorted(e.text for e in index.entries if e.split) == kept
    read = {name for batch in data.Loader(config, table, passes=1) for row in batch.names for name in row}
    assert read == {e.id for e in index.entries if e.split}


def as_a_reference(path: Path, case: Case, config: DataConfig, capsys: pytest.CaptureFixture) -> None:
    """A recording that is given as a voice is judged as one of a list."""
    voices = [(str(path), TEXT)]
    capsys.readouterr()
    if case.out:
        with pytest.raises(ValueError, match=re.escape(case.out[0])):
            prompt_example("x", config, load_tokenizer("bytes"), Wide(), voices)
    else:
        prompt_example("x", config, load_tokenizer("bytes"), Wide(), voices)
        warned = re.findall(rf"{path.name}: (.*?); ", capsys.readouterr().err)
        assert sorted(set(warned) - USUAL) == expected(case)[2]


def test_the_commands_themselves_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder with the recordings of many cases: check, prepare, show and train print one verdict, and --ref agrees."""
    monkeypatch.undo()
    cases = [(name, case) for name, case in CASES.items() if case.file == "x.wav" and not case.needs]
    files = {f"{n}.wav": case.files["x.wav"] for n, (_, case) in enumerate(cases)}
    lines = rows(*({"id": name, "audio": f"{n}.wav", "text": TEXT} for n, (name, _) in enumerate(cases)))
    source = lay(tmp_path / "clips", files | {"manifest.jsonl": lines, "words.json": json.dumps(TEXT.split())})
    (tmp_path / "run.py").write_text(CONFIG.replace('split="manifest"', "held_out=0.0").replace("steps=4", "steps=1"))
    said = {}
    for command in (("data.py", "check", source), ("data.py", "prepare", tmp_path / "run.py"), ("data.py", "show", tmp_path / "run.py"),
                    ("train.py", tmp_path / "run.py")):
        rc, out, err = call(*command)
        assert rc == 0, err
        said[command[1]] = verdict_lines_of(out)
    first, *others = said.values()
    assert len(cases) > 20 and len(first) == 3 and all(other == first for other in others), said
    assert first[0].startswith(f"kept {sum(not case.out for _, case in cases)} rows")
    assert first[1].startswith(f"left out {sum(bool(case.out) for _, case in cases)} rows")


@pytest.mark.parametrize("name", ["r.flac", "r.wav", "r.ogg", "r.mp3", "gsm.wav"])
def test_a_piece_is_the_same_samples_and_reads_no_more(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, {name: Wav(voice(20), how={"subtype": "GSM610"} if name == "gsm.wav" else {})})
    whole, _ = load_wav(tmp_path / name)
    asked, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, frames=-1, **how: asked.append(frames) or read(self, frames, **how))
    piece, _ = load_wav(tmp_path / name, begin=12.0, seconds=1.5)
    assert piece.shape == (1, 1.5 * RATE) and torch.allclose(piece, whole[:, 12 * RATE : round(13.5 * RATE)], atol=1e-5)
    assert sum(asked) <= (1.5 if name != "gsm.wav" else 13.5) * RATE        # libsndfile cannot seek in GSM


def test_which_side_of_a_stereo_recording_is_the_user_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lay(tmp_path, {"two.wav": Wav(np.stack([voice(), voice(seed=1)], 1)), "one.wav": 1})
    left, right = load_wav(tmp_path / "two.wav", None, None)[0]
    assert torch.equal(user_side(str(tmp_path / "two.wav"), RATE)[0], right) and "its right channel is heard" in capsys.readouterr().out
    mixed = user_side(str(tmp_path / "two.wav"), RATE, dialogue=False)[0]
    assert torch.allclose(mixed, (left + right) / 2) and "both channels, mixed, are heard" in capsys.readouterr().out
    assert torch.equal(user_side(str(tmp_path / "one.wav"), RATE)[0], right) and not capsys.readouterr().out


@pytest.mark.parametrize("name", ["x.parquet", "data/train.parquet"])
def test_what_check_writes_of_a_table_trains(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    source = lay(tmp_path / "data", {name: table(audio=inside(1, 2), text=["one", "two"])})
    check_source(str(source), write=str(tmp_path / "kept"))
    [kept] = (tmp_path / "kept").glob("*.kept.jsonl")
    config = DataConfig(sources=(str(kept),), cache=str(tmp_path / "cache"), held_out=0.0, prefetch=0)
    index = prepare(config, BYTES)
    assert [e.text for e in index.entries] == ["one", "two"] and index.entries[0].key != index.entries[1].key


def test_hours_of_silence_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with soundfile.SoundFile(tmp_path / "r.flac", "w", RATE, 1) as file:
        for _ in range(40):
            file.write(np.zeros(60 * RATE, np.float32))
    read, asked = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, frames=-1, **how: asked.append(frames) or read(self, frames, **how))
    row = {"id": "r", "file": str(tmp_path / "r.flac"), "text": "", "stereo": False, "alignments": []}
    assert [fault[:2] for fault in judge_clip(row, (0.2, 4 * 3600)).faults] == [("reject", "all-zero audio")]
    assert sum(asked) <= 16 * RATE


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
