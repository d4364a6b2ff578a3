"""Malformed input: a command ends with exit code 2 and one line that names the culprit and a remedy; a bad row of data is
counted, named and left out. A full disk or a kill leaves what was there before. Cases are (what, how it is made, what the line says).
"""

import errno
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import CONFIG, ROOT, call, cli, write_clips
from safetensors.torch import load_file, save_file

from system.files import checksum

SPEAK = ("--text=one two", "--max_frames=2")


def fails(result, *fragments):
    """Exit code 2, one line `error: ...` at the end, no trace, every fragment in it."""
    rc, _, err = result
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert rc == 2 and "Traceback" not in err and len(errors) == 1 and err.splitlines()[-1] == errors[0], (rc, err)
    for fragment in fragments:
        assert fragment in errors[0], f"{fragment!r} is not in {errors[0]!r}"


def no_leftovers(folder: Path):
    """No temporary file or folder: all of ours begin with a dot."""
    assert [p for p in folder.rglob("*") if p.name.startswith(".")] == []


# ---- sound files ----

def wav_header(seconds: float, rate: int = 16000, size: int | None = None) -> bytes:
    """A 16-bit mono header that promises `seconds`."""
    n = int(seconds * rate) * 2 if size is None else size
    shape = struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    return b"RIFF" + struct.pack("<I", 36 + n) + b"WAVEfmt " + shape + b"data" + struct.pack("<I", n)


def three_hours(path):
    """Three hours of silence that take no room: a header and a hole."""
    path.write_bytes(wav_header(3 * 3600))
    os.truncate(path, 44 + 3 * 3600 * 32000)


def not_a_number(path):
    wav = np.full(8000, 0.1, np.float32)
    wav[100] = np.nan
    soundfile.write(path, wav, 16000, subtype="FLOAT")


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
SOUNDS = {      # name: (how the file is made, what sample.py says, the reason in a manifest, the remedy)
    "missing": (lambda path: None, "does not exist", "missing file", "check the path"),
    "a folder": (lambda path: path.mkdir(), "does not exist", "missing file", ""),
    "empty file": (lambda path: path.write_bytes(b""), "cannot be read as sound", "empty file", "copy or download it again"),
    "text named wav": (lambda path: path.write_text("not a sound " * 50), "cannot be read as sound", "unreadable audio", "convert it"),
    "header cut at 20 bytes": (lambda path: path.write_bytes(wav_header(1)[:20]), "cannot be read as sound", "unreadable audio",
                               "convert it"),
    "no samples": (lambda path: path.write_bytes(wav_header(0)), "is empty (0 samples)", "empty audio", "record it again"),
    "NaN samples": (not_a_number, "NaN or infinite samples", "NaN samples", "export it again"),
    "three hours": (three_hours, "the limit is 30 s", "duration outside 0.2..30 s", "cut it"),
    "six channels": (lambda path: soundfile.write(path, np.stack([NOISE] * 6, 1), 16000), "has 6 channels", "too many channels",
                     "mix it down"),
    "2 kHz": (lambda path: soundfile.write(path, NOISE, 2000), "sample rate below 8 kHz", "sample rate below 8 kHz", "use the original"),
    "30 ms": (lambda path: soundfile.write(path, NOISE[:480], 16000), "duration outside 0.2..30 s", "duration outside 0.2..30 s",
              "cut the clip"),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_a_bad_reference_recording_is_named(name, tiny_run, tmp_path):
    make, said, _, remedy = SOUNDS[name]
    make(tmp_path / "voice.wav")
    fails(call("sample.py", "--ckpt", tiny_run, *SPEAK, f"--ref={tmp_path}/voice.wav", "--ref_text=one", f"--out={tmp_path}/o.wav"),
          "voice.wav", said, remedy)
    assert not (tmp_path / "o.wav").exists()


@pytest.mark.parametrize("name", SOUNDS)
def test_a_bad_sound_is_left_out_and_fails_the_command_only_when_nothing_else_is_there(name, tmp_path):
    make, _, reason, _ = SOUNDS[name]
    folder = write_clips(tmp_path / "clips", 2)
    make(folder / "bad.wav")
    bad = json.dumps({"id": "bad", "audio": "bad.wav", "text": "one"}) + "\n"
    (folder / "manifest.jsonl").write_text((folder / "manifest.jsonl").read_text() + bad)
    rc, out, err = call("data.py", "check", folder)
    assert rc == 0 and f"{reason:<28} bad" in out and "kept 2 rows, " in out and "left out 1 rows" in out, (out, err)
    (folder / "manifest.jsonl").write_text(bad)
    fails(call("data.py", "check", folder), "clips has no usable row", "fix the rejected rows listed above")


def test_prepare_names_every_bad_sound_and_keeps_the_rest(tmp_path):
    folder = write_clips(tmp_path / "clips")
    rows = [{"id": f"bad-{i}", "audio": f"bad-{i}.wav", "text": "one"} for i in range(len(SOUNDS))]
    for i, (make, *_) in enumerate(SOUNDS.values()):
        make(folder / f"bad-{i}.wav")
    good = (folder / "manifest.jsonl").read_text()
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + good)
    (tmp_path / "tiny_run.py").write_text(CONFIG)
    rc, out, err = cli("data.py", "prepare", tmp_path / "tiny_run.py")
    assert rc == 0 and f"prepared 12 examples in {tmp_path}/cache" in out and f"{len(SOUNDS)} rows left out" in out, (out, err)
    assert "left out: bad-0: missing file" in err and err.count("left out:") == 11      # ten by name, then how many more
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails(call("data.py", "prepare", tmp_path / "tiny_run.py"), "no usable row in", "`python data.py check` lists the reasons")


# ---- manifests ----

def line(**fields) -> str:
    return json.dumps({"id": "bad", "audio": "0.wav", "text": "one"} | fields)


LINES = {       # name: (a line of manifest.jsonl, the reason, a part of the fix)
    "truncated json": ('{"id": "bad", "audio": "0.w', "malformed json", "fix this line"),
    "not UTF-8": (b'{"id": "bad", "audio": "0.wav", "text": "caf\xe9"}', "bad encoding", "save the file as UTF-8"),
    "a bare number": ("7", "malformed json", "must be an object"),
    "nested 100,000 deep": ("[" * 100_000, "malformed json", "fix this line"),
    "no text": ('{"id": "bad", "audio": "0.wav"}', "empty text", "write the transcript"),
    "text is a number": (line(text=5), "the text is a number", "write the transcript in quotes"),
    "text is blank": (line(text="  "), "empty text", "write the transcript"),
    "text is null": (line(text=None), "empty text", "write the transcript"),
    "offset is a word": (line(offset="soon"), "malformed field", "offset and duration are seconds"),
    "duration is negative": (line(offset=0, duration=-1), "malformed field", "offset and duration are seconds"),
    "duration is NaN": ('{"id": "bad", "audio": "0.wav", "text": "one", "duration": NaN}', "malformed field", "are seconds"),
    "words are a dict": (line(words={"one": 0}), "malformed field", "words look like"),
    "words without times": (line(words=["one"]), "malformed field", "words look like"),
    "reference is a word": (line(reference="1.wav"), "malformed field", "a reference has"),
    "reference without text": (line(reference={"audio": "1.wav"}), "malformed field", "a reference has"),
    "duplicate id": (line(id="1"), "duplicate id", "rename one"),
    "path above the folder": (line(audio="../x.wav"), "path outside the folder", "--allow-outside"),
    "absolute path": (line(audio="/etc/passwd"), "path outside the folder", "--allow-outside"),
    "link out of the folder": (line(audio="link.wav"), "path outside the folder (symlink)", "--allow-outside"),
    "link to itself": (line(audio="loop.wav"), "missing file", "check the path"),
    "zero byte in a path": (line(audio="a\0b.wav"), "malformed path", ""),
    "mono where stereo is claimed": (line(stereo=True), "not stereo", "left and right"),
    "parts is a number": (line(parts=5), "malformed parts", "compose"),
    "parts of lists": (line(parts=[["0"]]), "malformed parts", "compose"),
    "no parts": (line(parts=[]), "missing part or duplicate id", "unknown parts"),
    "unknown part": (line(parts=["0", "nobody"]), "missing part or duplicate id", "nobody"),
    "manifest without parts": (line(manifest="manifest.jsonl"), "malformed parts", "compose"),
    "compose is a number": ('{"compose": 3}', "malformed compose", "--help"),
    "compose without a group": ('{"compose": {"count": [1, 2], "rows": 3}}', "malformed compose", "group"),
    "compose of an unknown group": ('{"compose": {"group": "x", "count": [1, 2], "rows": 3}}', "malformed compose",
                                    "no clip has group 'x'"),
    "compose of ten billion rows": ('{"compose": {"group": "x", "count": [1, 2], "rows": 1e10}}', "malformed compose",
                                    "expected 0..10000000"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_of_a_manifest_is_left_out_by_name(name, tmp_path):
    text, reason, fix = LINES[name]
    folder = write_clips(tmp_path / "clips", 2)
    (tmp_path / "elsewhere.wav").write_bytes((folder / "0.wav").read_bytes())
    (folder / "link.wav").symlink_to(tmp_path / "elsewhere.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    path = folder / "manifest.jsonl"
    path.write_bytes(path.read_bytes() + (text if isinstance(text, bytes) else text.encode()) + b"\n")
    rc, out, err = call("data.py", "check", folder)
    assert rc == 0 and reason in out and ("line 3" in out or f"{reason:<28} bad\n" in out), (out, err)       # by its place or its id
    assert fix in out and "kept 2 rows, " in out and "left out 1 rows" in out, (out, err)


SOURCES = {     # name: ({file: content}, what `data.py check` says)
    "no such source": ({}, ("nowhere", "check the path")),
    "empty manifest": ({"manifest.jsonl": ""}, ("manifest.jsonl", "no known layout", "--help")),
    "a manifest of one broken line": ({"manifest.jsonl": "{"}, ("manifest.jsonl", "no known layout", "--help")),
    "unknown keys": ({"manifest.jsonl": '{"foo": 1}'}, ("manifest.jsonl", "foo", "--help")),
    "metadata.csv without known columns": ({"metadata.csv": "foo,bar\n1,2\n"}, ("metadata.csv", "foo, bar", "file_name")),
    "metadata.csv that is binary": ({"metadata.csv": bytes(range(256)) * 4}, ("metadata.csv", "")),
    "an empty folder": ({"readme.md": "hello"}, ("has no usable row", "read as wav + txt, nothing found", "--help")),
    "a sound without transcript": ({"a.wav": wav_header(0)}, ("has no usable row", "rows listed above")),
    "a transcript that is not UTF-8": ({"a.wav": wav_header(0), "a.txt": b"caf\xe9"}, ("has no usable row", "rows listed above")),
    "ChatML without an assistant": ({"manifest.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}'},
            ("no usable row", "rows listed above")),
    "ChatML with an unknown part": ({"manifest.jsonl": '{"messages": [{"role": "assistant", "content": [{"type": "video"}]}]}'},
                                    ("no usable row", "rows listed above")),
    "ChatML whose messages are a number": ({"manifest.jsonl": '{"messages": 3}'}, ("no usable row", "rows listed above")),
    "ChatML with inline audio": ({"manifest.jsonl": json.dumps({"messages": [{"role": "assistant", "content": {"type": "audio"}}]})},
                                 ("no usable row", "rows listed above")),
    "Moshi without alignments": ({"manifest.jsonl": '{"path": "a.wav", "duration": 1}', "a.wav": wav_header(1)},
            ("no usable row", "rows listed above")),
    "Moshi with a null path": ({"manifest.jsonl": '{"path": null}'}, ("no usable row", "rows listed above")),
    "Moshi alignments without times": ({"manifest.jsonl": '{"path": "a.wav"}', "a.json": '{"alignments": [["hi"]]}'},
                                       ("no usable row", "rows listed above")),
    "Moshi alignments that are a list": ({"manifest.jsonl": '{"path": "a.wav"}', "a.json": "[]"}, ("no usable row", "rows listed above")),
    "Moshi alignments of nobody": ({"manifest.jsonl": '{"path": "a.wav"}', "a.json": '{"alignments": []}'},
            ("no usable row", "rows listed above")),
    "a manifest that names a missing one": ({"manifest.jsonl": '{"manifest": "x.jsonl", "parts": ["0"]}'}, ("x.jsonl", "check the path")),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_without_a_usable_row_is_refused(name, tmp_path):
    files, said = SOURCES[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(call("data.py", "check", tmp_path if files else tmp_path / "nowhere"), *said)


# ---- configs and overrides ----

CONFIGS = {     # name: (content of the file, what the line says)
    "syntax error": ("config = (", ("bad.py", "SyntaxError", "line 1", "correct it")),
    "not text": (b"\xff\xfe\x00", ("bad.py", "does not build", "correct it")),
    "no config": ("x = 1", ("bad.py", "defines no `config`", "add `config = TrainConfig(...)`")),
    "config is a number": ("config = 3", ("bad.py", "defines no `config`", "add `config = TrainConfig(...)`")),
    "misspelt field": (CONFIG.replace("lr=1e-3", "lrr=1e-3"), ("bad.py", "line 12", "lrr", "correct it")),
    "missing field": ("from config import TrainConfig\nconfig = TrainConfig()", ("bad.py", "line 2", "model", "correct it")),
    "lr is a word": (CONFIG.replace("lr=1e-3", "lr='1e-3'"), ("bad.py", "line 12", "lr must be float, got '1e-3'", "--help")),
    "steps is a fraction": (CONFIG.replace("steps=4", "steps=4.5"), ("bad.py", "line 12", "steps must be int, got 4.5", "--help")),
    "sources is a word": (CONFIG.replace('sources=(str(here / "clips"),)', 'sources="clips"'),
                          ("bad.py", "line 14", "sources must be tuple", "--help")),
    "impossible width": (CONFIG.replace("heads=2", "heads=3"), ("bad.py", "dim 16 is not a multiple of 3 heads", "correct it")),
    "divides by zero": ("x = 1 / 0", ("bad.py", "line 1", "ZeroDivisionError", "correct it")),
    "needs a missing package": ("import nonesuch", ("bad.py", "nonesuch", "correct it")),
    "reads a missing file": ("open('nonesuch.txt')", ("bad.py", "nonesuch.txt", "correct it")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config_file_is_named_with_its_line_or_field(name, tmp_path):
    content, said = CONFIGS[name]
    (tmp_path / "bad.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(call("train.py", tmp_path / "bad.py"), *said)


def test_a_missing_config_file_names_the_nearest_one():
    fails(cli("train.py", "configs/tinny.py"), "configs/tinny.py does not exist", "nearest is configs/tiny.py")
    fails(call("train.py", "--steps=3"), "no config file given", "configs/NAME.py")
    fails(call("train.py", "configs"), "config file configs does not exist", "nearest is configs/")


OVERRIDES = {   # an argument: what the line says
    "--stesp=3": ("--stesp", "nearest is --steps"),
    "--model.temporal.dmi=3": ("--model.temporal.dmi", "nearest is --model.temporal.dim"),
    "--lora.rnk=3": ("--lora.rnk", "nearest is --lora.rank"),
    "--steps=many": ("--steps must be int, got 'many'", "--help"),
    "--model.temporal.dim=wide": ("--model.temporal.dim must be int, got 'wide'", "--help"),
    "--compile=perhaps": ("--compile must be bool, got 'perhaps'", "--help"),
    "--lr=true": ("--lr must be float, got True", "--help"),
    "--lr": ("--lr has no value", "--lr=VALUE"),
    "--lr.x=3": ("--lr.x", "nearest is --lr"),
    "--betas=0.9": ("--betas needs 2 values, got 1",),
    "--betas=0.9,high": ("--betas[1] must be float, got 'high'", "--help"),
    "--schedule=cosin": ("--schedule=cosin is not valid", "'cosine'", "--help"),
    "--dtype=fp8": ("--dtype=fp8 is not valid", "fp32, bf16, fp16", "--help"),
    "--device=gpu": ("--device=gpu is not valid", "auto, cpu, cuda", "--help"),
    "--steps=0": ("--steps=0 is not valid", "at least 1", "--help"),
    "--log_every=0": ("--log_every=0 is not valid", "at least 1", "--help"),
    "--lr=-1": ("--lr=-1 is not valid", "negative", "--help"),
    "--warmup=-1": ("--warmup=-1 is not valid", "negative", "--help"),
    "--lr=1e400": ("--lr ", "finite", "--help"),
    "--eps=0": ("--eps=0 is not valid", "eps is positive", "--help"),
    "--max_minutes=-1": ("--max_minutes=-1 is not valid", "negative", "--help"),
    "--batch_size=10000000000": ("--batch_size=10000000000 is not valid", "at most 2^20", "--help"),
    "--model.temporal.layers=1000000000": ("--model.temporal.layers=1000000000 is not valid", "2^13", "--help"),
    "--model.temporal.ffn=1000000000000": ("--model.temporal.ffn=1000000000000 is not valid", "2^24", "--help"),
    "--data.columns=1000000000000": ("--data.columns=1000000000000 is not valid", "2^24", "--help"),
    "--seed=" + "-" * 9999 + "1": ("--seed ", "int"),
    "--seed=" + "(" * 20000: ("--seed ", "int"),
    "--ema=1": ("--ema=1 is not valid", "[0, 1)", "--help"),
    "--model.temporal.heads=3": ("--model.temporal.heads=3 is not valid", "dim 16 is not a multiple of 3 heads", "--help"),
    "--model.temporal.heads=0": ("--model.temporal.heads=0 is not valid", "at least 1", "--help"),
    "--model.temporal.ffn=-3": ("--model.temporal.ffn=-3 is not valid", "at least 1", "--help"),
    "--model.temporal.head_dim=3": ("--model.temporal.head_dim=3 is not valid", "head_dim 3 is odd", "--help"),
    "--model.table.layout=rows": ("--model.table.layout=rows is not valid", "clone", "--help"),
    "--model.dropout=1": ("--model.dropout=1 is not valid", "[0, 1)", "--help"),
    "--betas=0.9,2": ("--betas=0.9,2 is not valid", "[0, 1)", "--help"),
    "--seed=-1": ("--seed=-1 is not valid", "not negative", "--help"),
    "--model.dual_ffn=4": ("--model.dual_ffn=4 is not valid", "layer numbers", "--help"),
    "--trackers=wand": ("--trackers=wand is not valid", "wandb", "--help"),
    "--lora.targets=nowhere.*": ("nowhere.*", "choose from", "temporal.layers.N.attn.q"),
    "--init=nobody": ("nobody does not exist", "give a run folder"),
    "--resume=nobody": ("nobody does not exist", "give a run folder"),
    "--data.sources=nowhere": ("nowhere does not exist", "check the path"),
    "--data.split=random": ("data.split='random'", "set split to hash, speaker or manifest"),
    "--data.codec=opus": ("opus", "name one of: tiny"),
    "--data.tokenizer=gpt": ("tokenizer gpt does not exist", "bytes"),
    "--data.normaliser=klingon-v1": ("klingon-v1", "choose one of none, english-v1"),
    "--data.columns=4": ("data.columns=4", "raise it"),
    "--data.stream_weights=1,2": ("data.stream_weights has 2 values", "give one each"),
    "--data.held_out=-1": ("held_out", "--help"),
    "--data.variants=0": ("variants", "--help"),
    "--data.columns=0": ("columns", "--help"),
    "word": ("unexpected word 'word'", "--key=value"),
}


@pytest.mark.parametrize("argument", OVERRIDES)
def test_a_bad_override_is_named_with_what_would_fit(argument, tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent / "clips", tmp_path / "clips")
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    shutil.copy(tiny_run.parent / "tiny_run.py", tmp_path)
    fails(call("train.py", tmp_path / "tiny_run.py", argument), *OVERRIDES[argument])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_refused(tiny_run, tmp_path):
    fails(call("train.py", tiny_run.parent / "tiny_run.py", "--device=cuda", f"--out={tmp_path}"), "--device=cuda", "use --device=cpu")
    fails(call("sample.py", "--ckpt", tiny_run, *SPEAK, "--device=cuda"), "--device=cuda", "use --device=cpu")


# ---- checkpoints ----

@pytest.fixture
def checkpoint(tiny_run, tmp_path):
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(tiny_run / "ckpt" / "latest", tmp_path / "step"))


def edit_json(path: Path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(path: Path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(path: Path, share: float):
    os.truncate(path, int(share * path.stat().st_size))


def grow(tensors):
    tensors["audio_head.weight"] = tensors["audio_head.weight"].repeat(1, 2)


CHECKPOINTS = {     # name: (how the folder is spoilt, what the line says)
    "no weights": (lambda c: (c / "model.safetensors").unlink(), ("step", "holds no checkpoint", "check the path")),
    "weights of 0 bytes": (lambda c: cut(c / "model.safetensors", 0), ("model.safetensors is damaged", "use another checkpoint")),
    "weights cut in the header": (lambda c: os.truncate(c / "model.safetensors", 200),
                                  ("model.safetensors is damaged", "use another checkpoint")),
    "weights cut at half": (lambda c: cut(c / "model.safetensors", 0.5), ("model.safetensors is damaged", "use another checkpoint")),
    "weights cut by a byte": (lambda c: os.truncate(c / "model.safetensors", (c / "model.safetensors").stat().st_size - 1),
                              ("model.safetensors is damaged", "use another checkpoint")),
    "weights that claim a huge header": (lambda c: (c / "model.safetensors").write_bytes(b"\xff" * 64),
                                         ("model.safetensors is damaged", "another")),
    "a tensor of another shape": (lambda c: edit_tensors(c / "model.safetensors", grow),
                                  ("audio_head.weight is (2064, 32)", "belong together")),
    "a missing tensor": (lambda c: edit_tensors(c / "model.safetensors", lambda t: t.pop("text_head.weight")),
                         ("1 tensors missing ['text_head.weight']", "belong together")),
    "an extra tensor": (lambda c: edit_tensors(c / "model.safetensors", lambda t: t.update(x=torch.ones(1))),
                        ("1 unexpected ['x']", "belong together")),
    "no config.json": (lambda c: (c / "config.json").unlink(), ("step", "holds no checkpoint", "check the path")),
    "config.json cut": (lambda c: cut(c / "config.json", 0.5), ("config.json is not valid JSON", "restore it")),
    "config.json not UTF-8": (lambda c: (c / "config.json").write_bytes(b"\xff\xfe"), ("config.json is not valid JSON", "restore it")),
    "config.json nested too deep": (lambda c: (c / "config.json").write_text("[" * 100_000),
                                    ("config.json is not valid JSON", "restore it")),
    "config.json is a list": (lambda c: (c / "config.json").write_text("[]"),
                              ("config.json", "no multistream checkpoint", "import --help")),
    "config.json of another project": (lambda c: (c / "config.json").write_text('{"model_type": "llama3"}'), ("llama3", "import --help")),
    "another version": (lambda c: edit_json(c / "config.json", version=99), ("version 99", "update the code")),
    "no model in config.json": (lambda c: edit_json(c / "config.json", model=None),
                                ("config.json is damaged (model", "use another checkpoint")),
    "data is a list": (lambda c: edit_json(c / "config.json", data=[1]), ("config.json is damaged (data", "use another checkpoint")),
    "step is a word": (lambda c: edit_json(c / "config.json", step="x"), ("config.json is damaged (step", "use another checkpoint")),
    "an unknown field in the model": (lambda c: edit_json(c / "config.json", model={"depht": 1}),
                                      ("model.depht", "nearest is", "model.depth")),
    "a model without a table": (lambda c: edit_json(c / "config.json", model={}), ("config.json model is incomplete", "table")),
    "no tokenizer": (lambda c: (c / "words.json").unlink(), ("step/words.json does not exist", "use another one")),
    "a tokenizer that is cut": (lambda c: cut(c / "words.json", 0.5), ("step/words.json is damaged", "use another checkpoint")),
    "a tokenizer of numbers": (lambda c: (c / "words.json").write_text("3"), ("step/words.json is damaged", "use another checkpoint")),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_spoilt_checkpoint_is_named(name, checkpoint, tmp_path):
    spoil, said = CHECKPOINTS[name]
    spoil(checkpoint)
    fails(call("sample.py", "--ckpt", checkpoint, *SPEAK, f"--out={tmp_path}/o.wav"), *said)
    assert not (tmp_path / "o.wav").exists()


# ---- adapters ----

@pytest.fixture(scope="module")
def adapter_run(tiny_run, tmp_path_factory):
    """An adapter of two steps on the tiny run."""
    out = tmp_path_factory.mktemp("lora") / "run"
    rc, _, err = call("train.py", tiny_run.parent / "tiny_run.py", f"--init={tiny_run}", "--lora.rank=2", "--lora.targets=attn.*",
                      "--steps=2", "--save_every=0", f"--out={out}")
    assert rc == 0, err
    return out


@pytest.fixture
def adapter(adapter_run, tmp_path):
    return Path(shutil.copytree(adapter_run / "ckpt" / "latest", tmp_path / "adapter"))


def zero(tensors):
    for name in tensors:
        if name.endswith("lora_B"):
            tensors[name].zero_()


Q = "temporal.layers.0.attn.q.adapter"
ADAPTERS = {
    "all-zero B": (lambda a: edit_tensors(a / "adapter.safetensors", zero), ("4 lora_B are all zero", "train it first")),
    "missing tensor": (lambda a: edit_tensors(a / "adapter.safetensors", lambda t: t.pop(f"{Q}.lora_A")),
                       (f"1 tensors missing ['{Q}.lora_A']", "other targets")),
    "unexpected tensor": (lambda a: edit_tensors(a / "adapter.safetensors", lambda t: t.update(x=torch.ones(1))),
                          ("unexpected ['x']", "other targets")),
    "another rank": (lambda a: edit_tensors(a / "adapter.safetensors", lambda t: t.update({f"{Q}.lora_A": torch.ones(4, 16)})),
                     (f"{Q}.lora_A is (4, 16)", "rank or base model differ")),
    "another base": (lambda a: edit_json(a / "config.json", model={"table": {"streams": [], "layout": ""}}),
                     ("another stream table", "use its own base")),
    "no adapter in it": (lambda a: edit_json(a / "config.json", lora=None),
                         ("adapter holds no adapter", "give a checkpoint of a LoRA run")),
    "an unknown field": (lambda a: edit_json(a / "config.json", lora={"rnk": 1}), ("lora.rnk", "nearest is")),
    "rank 0": (lambda a: edit_json(a / "config.json", lora={"rank": 0, "targets": ["attn.*"]}), ("config.json lora", "rank 0", "")),
    "cut file": (lambda a: cut(a / "adapter.safetensors", 0.7), ("adapter.safetensors is damaged", "use another checkpoint")),
    "no file": (lambda a: (a / "adapter.safetensors").unlink(), ("adapter holds no checkpoint", "check the path")),
    "no folder": (shutil.rmtree, ("adapter does not exist", "give a run folder")),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_spoilt_adapter_is_never_applied(name, adapter, tiny_run, tmp_path):
    spoil, said = ADAPTERS[name]
    spoil(adapter)
    fails(call("sample.py", "--ckpt", tiny_run, "--adapter", adapter, *SPEAK, f"--out={tmp_path}/o.wav"), *said)


def test_the_unspoilt_adapter_is_applied_and_said(adapter, tiny_run, tmp_path):
    rc, out, err = call("sample.py", "--ckpt", tiny_run, "--adapter", adapter, *SPEAK, f"--out={tmp_path}/o.wav")
    assert rc == 0 and "8 tensors" in out and (tmp_path / "o.wav").is_file(), err


def test_an_adapter_whose_base_is_gone_names_it(adapter, tmp_path):
    edit_json(adapter / "config.json", base=str(tmp_path / "gone"))
    fails(call("sample.py", "--ckpt", adapter, *SPEAK), "gone does not exist", "give a run folder")


# ---- token cache ----

def each(folder: Path, pattern: str, spoil: Callable[[Path], object]) -> None:
    """Of every match: what a report prepares for the tokenizer of a checkpoint lies beside what the run reads."""
    found = list(folder.glob(pattern))
    assert found, pattern
    for path in found:
        spoil(path)


def shorten(tensors):
    for name, codes in tensors.items():
        tensors[name] = codes[:, :3].clone()


def content_of(index: Path) -> Path:
    """The file of entries that an index.json of the cache names."""
    return index.with_name(json.loads(index.read_text())["content"] + ".json")


def edit_index(index: Path, *entries: object):
    """Put other entries in place of all, and let the checksum follow."""
    path = content_of(index)
    path.write_text("".join(f"{line}\n" for line in (path.read_text().splitlines()[0], *map(json.dumps, entries))))
    edit_json(index, checksum=checksum(content_of(index).read_bytes()))


def flip(path: Path):
    """Turn over a bit of every second byte: of JSON in its last part, of tensors everywhere behind the header."""
    content = bytearray(path.read_bytes())
    for at in range(len(content) * 19 // 20 if path.suffix == ".json" else 8 + int.from_bytes(content[:8], "little"), len(content), 2):
        content[at] ^= 4
    path.write_bytes(content)


CACHES = {      # name: (command, how the cache is spoilt, what the line says)
    "shard of 0 bytes": ("train.py", lambda c: each(c, "codes/*.safetensors", lambda f: cut(f, 0)),
                         ("is damaged", "delete it and run `python data.py prepare")),
    "shard cut at half": ("train.py", lambda c: each(c, "codes/*.safetensors", lambda f: cut(f, 0.5)),
                          ("is damaged", "delete it and run `python data.py prepare")),
    "shard gone": ("show", lambda c: each(c, "codes/*.safetensors", Path.unlink), ("is missing", "run `python data.py prepare")),
    "text cut": ("show", lambda c: each(c, "*/index.json", lambda f: cut(next(f.parent.glob("*.safetensors")), 0.5)),
                 (".safetensors is damaged", "delete it and run")),
    "one bit of the index": ("show", lambda c: each(c, "*/index.json", lambda f: flip(content_of(f))),
                             ("checksum differs", "delete it and run")),
    "one bit of the ids": ("show", lambda c: each(c, "*/index.json", lambda f: flip(content_of(f).with_suffix(".safetensors"))),
                           (".safetensors is damaged (the checksum of", "delete it and run")),
    "one bit of the codes": ("show", lambda c: each(c, "codes/*.safetensors", flip), ("is damaged (the checksum of", "delete it and run")),
    "no sum beside the codes": ("show", lambda c: each(c, "codes/*.safetensors", lambda f: f.write_bytes(
        f.read_bytes().replace(b"sum:", b"sun:"))), ("is damaged", "delete it and run")),
    "index cut": ("show", lambda c: each(c, "*/index.json", lambda f: cut(f, 0.5)), ("index.json is not valid JSON", "remove it")),
    "index of garbage": ("show", lambda c: each(c, "*/index.json", lambda f: f.write_bytes(b"\x00\xff" * 99)),
                         ("index.json is not valid JSON", "remove it")),
    "index is a list": ("show", lambda c: each(c, "*/index.json", lambda f: f.write_text("[]")),
                        ("index.json is damaged", "delete it and run")),
    "index without entries": ("show", lambda c: each(c, "*/index.json", lambda f: f.write_text("{}")),
                              ("index.json is damaged", "delete it and run")),
    "entry of other fields": ("show", lambda c: each(c, "*/index.json", lambda f: edit_index(f, {"x": 1})),
                              ("is damaged", "delete it and run")),
    "codes of another length": ("show", lambda c: each(c, "codes/*.safetensors", lambda f: edit_tensors(f, shorten)),
                                ("is damaged", "delete it and run")),
    "never prepared": ("show", shutil.rmtree, ("no prepared data in", "run `python data.py prepare")),
    "not a folder": ("train.py", lambda c: (shutil.rmtree(c), c.write_text("x")), ("cache", "check the path")),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_spoilt_token_cache_is_named_with_the_command_that_mends_it(name, tiny_run, tmp_path):
    command, spoil, said = CACHES[name]
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    spoil(tmp_path / "cache")
    words = ["train.py"] if command == "train.py" else ["data.py", "show"]
    fails(call(*words, tiny_run.parent / "tiny_run.py", f"--data.cache={tmp_path}/cache", f"--out={tmp_path}/run"), *said)


def test_codes_of_a_foreign_codec_do_not_fit_the_model(tiny_run, tmp_path):
    fails(call("train.py", tiny_run.parent / "tiny_run.py", f"--data.codec={ROOT}/LICENSE", f"--out={tmp_path}"), "LICENSE",
          "contains no known codec")
    eight, four = (f"codebooks({n}, 258, 258, 256, 257, range(2, {n + 2}))" for n in (8, 4))
    (tmp_path / "half.py").write_text(CONFIG.replace(eight, four))
    write_clips(tmp_path / "clips")
    fails(call("train.py", tmp_path / "half.py"), "codec tiny has 8 codebooks of 256 codes", "choose the codec it was made for")


# ---- sample.py ----

SAMPLES = {     # name: (arguments, {RUN} is the run's folder, {HERE} a scratch folder; what the line says)
    "no checkpoint": (("--text=one",), ("no checkpoint given", "add --ckpt")),
    "unknown folder": (("--ckpt=out/none/such", "--text=one"), ("out/none/such does not exist", "give a run folder")),
    "unknown folder in a known one": (("--ckpt={RUN}/none", "--text=one"), ("none does not exist", "give a run folder")),
    "hub id offline": (("--ckpt=nobody/nothing", "--text=one"), ("nobody/nothing", "hf download nobody/nothing")),
    "a folder without a checkpoint": (("--ckpt={RUN}/samples-none/..", "--text=one"), ("does not exist",)),
    "unknown word": (("--ckpt={RUN}", "--text=one tow"), ("word 'tow' is not in words.json", "nearest known word is 'two'")),
    "empty text": (("--ckpt={RUN}", "--text="), ("nothing to say", "add --text")),
    "blank text": (("--ckpt={RUN}", "--text=  "), ("nothing to say", "add --text")),
    "no text": (("--ckpt={RUN}",), ("nothing to say", "add --text")),
    "reference without its text": (("--ckpt={RUN}", "--text=one", "--ref={RUN}/x.wav"), ("a reference needs both", "--ref_text")),
    "reference text without its wav": (("--ckpt={RUN}", "--text=one", "--ref_text=one"), ("a reference needs both", "--ref=")),
    "bad dtype": (("--ckpt={RUN}", "--text=one", "--dtype=int4"), ("--dtype=int4 is not valid", "fp32, bf16, fp16")),
    "bad device": (("--ckpt={RUN}", "--text=one", "--device=tpu"), ("--device=tpu is not valid", "cpu nor cuda")),
    "negative temperature": (("--ckpt={RUN}", "--text=one", "--temperature=-1"), ("--temperature=-1 is not valid", "--help")),
    "too few temperatures": (("--ckpt={RUN}", "--text=one", "--temperature=1,1"), ("has 2 values", "give one value or one for each")),
    "temperature is a word": (("--ckpt={RUN}", "--text=one", "--temperature=hot"), ("--temperature must be", "'hot'", "--help")),
    "no frames": (("--ckpt={RUN}", "--text=one", "--max_frames=0"), ("--max_frames=0 is not valid", "--help")),
    "batch of none": (("--ckpt={RUN}", "--text=one", "--batch=0"), ("--batch=0 is not valid", "--help")),
    "unknown option": (("--ckpt={RUN}", "--txet=one"), ("--txet", "nearest is --text")),
    "loose word": (("--ckpt={RUN}", "one", "two"), ("unexpected word 'one'", '--text="..."')),
    "missing list of texts": (("--ckpt={RUN}", "--texts={HERE}/none.txt"), ("none.txt does not exist", "one text a line")),
    "list of texts not UTF-8": (("--ckpt={RUN}", "--texts={HERE}/latin.txt"), ("latin.txt is not UTF-8", "save it again")),
    "empty list of texts": (("--ckpt={RUN}", "--texts={HERE}/empty.txt"), ("nothing to say", "add --text")),
    "output is a folder": (("--ckpt={RUN}", "--text=one", "--max_frames=2", "--out={HERE}"), ("", "")),
    "stream into a folder": (("--ckpt={RUN}", "--text=one", "--max_frames=2", "--stream", "--out={HERE}"),
                             ("cannot be written", "another path")),
    "output below a file": (("--ckpt={RUN}", "--text=one", "--max_frames=2", "--out={HERE}/empty.txt/o.wav"), ("empty.txt", "path")),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_what_sample_cannot_do_is_said_in_one_line(name, tiny_run, tmp_path, monkeypatch):
    arguments, said = SAMPLES[name]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    run = cli if name == "hub id offline" else call
    fails(run("sample.py", *(a.format(RUN=tiny_run, HERE=tmp_path) for a in arguments)), *said)
    no_leftovers(tmp_path)


def test_a_text_that_cannot_be_said_is_named_and_the_others_are_spoken(tiny_run, tmp_path):
    (tmp_path / "texts.txt").write_bytes("\ufeffone two\r\nfive hundred\r\n\r\nthree\u2028four\r\n".encode())
    rc, out, err = call("sample.py", "--ckpt", tiny_run, f"--texts={tmp_path}/texts.txt", "--max_frames=2", f"--out={tmp_path}/said")
    assert rc == 0 and "left out: text 1: word 'five'" in err and "2 recordings" in out, (out, err)
    assert sorted(p.name for p in (tmp_path / "said").iterdir()) == ["000.wav", "002.wav", "samples.jsonl"]
    (tmp_path / "texts.txt").write_text("five\nsix\n")
    fails(call("sample.py", "--ckpt", tiny_run, f"--texts={tmp_path}/texts.txt", f"--out={tmp_path}/no"), "none of the 2 texts can be said")


def test_other_commands_refuse_what_they_do_not_know(tiny_run, tmp_path):
    config = tiny_run.parent / "tiny_run.py"
    fails(call("data.py", "chek", "x"), "unknown command 'chek'", "nearest is check")
    fails(call("data.py", "check", "x", "y"), "check takes one folder or manifest")
    fails(call("data.py", "check", tiny_run.parent / "clips", "--min_seconds=short"), "--min_seconds must be float, got 'short'", "--help")
    fails(call("data.py", "show", config, "--index=99"), "--index 99 does not exist", "examples 0..11")
    fails(call("data.py", "show", config, "--index=first"), "--index first does not exist", "examples 0..11")
    fails(call("checkpoint.py", "mrege", "x"), "unknown command 'mrege'", "import, export, merge")
    fails(call("checkpoint.py", "merge", tiny_run), "merge needs --out=DIR")
    fails(call("checkpoint.py", "merge", tiny_run, f"--out={tmp_path}/m", "--too=x"), "--too", "nearest is --to")
    assert not (tmp_path / "m").exists()
    fails(call("evaluate.py", tmp_path / "none.jsonl"), "none.jsonl does not exist", "name a run folder")


# ---- resume ----

OPTIMIZER = "state/optimizer.safetensors"
RESUMES = {     # name: (how the last checkpoint is spoilt, what the line says)
    "no run.json": (lambda c: (c / "state/run.json").unlink(), ("run.json is missing", "--init=", "another --out")),
    "no state": (lambda c: shutil.rmtree(c / "state"), ("run.json is missing", "--init=", "another --out")),
    "no optimizer": (lambda c: (c / "state/optimizer.safetensors").unlink(), ("optimizer.safetensors does not exist", "use another one")),
    "no RNG": (lambda c: (c / "state/rng_rank0.safetensors").unlink(), ("rng_rank0.safetensors does not exist", "use another one")),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), ("model.safetensors does not exist", "use another one")),
    "optimizer cut": (lambda c: cut(c / "state/optimizer.safetensors", 0.6),
                      ("optimizer.safetensors is damaged", "use another checkpoint")),
    "optimizer of another model": (lambda c: edit_tensors(c / OPTIMIZER, lambda t: t.update({"exp_avg:x": torch.ones(1)})),
                                   ("unknown parameter x", "new --out")),
    "optimizer of another shape": (lambda c: edit_tensors(c / OPTIMIZER, lambda t: t.update({"exp_avg:text_head.weight": torch.ones(1)})),
                                   ("text_head.weight is (1,)", "use another checkpoint")),
    "run.json cut": (lambda c: cut(c / "state/run.json", 0.5), ("run.json is not valid JSON", "restore it")),
    "run.json is a list": (lambda c: (c / "state/run.json").write_text("[]"), ("run.json is damaged", "use another checkpoint")),
    "run.json of other fields": (lambda c: edit_json(c / "state/run.json", stepp=3), ("run.json is damaged", "use another checkpoint")),
    "other sources": (lambda c: edit_json(c / "state/run.json", loader={"draw": 8, "counts": [4, 4], "row": 0}),
                      ("has 2 sources", "same sources")),
    "checkpoint gone": (lambda c: shutil.rmtree(c), ("latest points to step_000004, which is gone", "choose a new --out")),
}


@pytest.fixture
def run_copy(tiny_run, tmp_path):
    return Path(shutil.copytree(tiny_run, tmp_path / "run", symlinks=True))


@pytest.mark.parametrize("name", RESUMES)
def test_a_run_whose_state_is_spoilt_neither_resumes_nor_starts_anew(name, run_copy, tiny_run):
    spoil, said = RESUMES[name]
    shutil.rmtree(run_copy / "ckpt/step_000002")                # otherwise the run goes on from there
    newest = (run_copy / "ckpt" / "latest").resolve()
    if "other" in name:
        (newest / "checksums.json").unlink()                    # as a folder of an older version, or edited by hand
    spoil(newest)
    before = sorted(p.name for p in (run_copy / "ckpt").iterdir())
    fails(call("train.py", tiny_run.parent / "tiny_run.py", f"--out={run_copy}", "--steps=6"), *said)
    assert sorted(p.name for p in (run_copy / "ckpt").iterdir()) == before


def test_resume_never_refuses_an_existing_run(run_copy, tiny_run, tmp_path):
    config = tiny_run.parent / "tiny_run.py"
    fails(cli("train.py", config, f"--out={run_copy}", "--resume=never"), "already holds a run", "--resume=auto", "--out")
    fails(call("train.py", config, f"--out={tmp_path}/new", f"--resume={tmp_path}/nowhere"), "nowhere does not exist", "give a run folder")


def test_a_run_of_another_shape_does_not_resume(run_copy, tiny_run):
    config = tiny_run.parent / "tiny_run.py"
    fails(call("train.py", config, f"--out={run_copy}", "--steps=6", "--model.temporal.dim=32"),
          "was made with --model.temporal.dim=16 (this run asks for 32)", "use another --out")
    fails(call("train.py", config, f"--out={run_copy.parent}/new", f"--init={run_copy}", "--model.temporal.layers=2"),
          "was made with --model.temporal.layers=1 (this run asks for 2)", "drop the option")


def test_a_run_that_is_finished_says_how_to_continue(run_copy, tiny_run):
    rc, out, _ = call("train.py", tiny_run.parent / "tiny_run.py", f"--out={run_copy}")
    assert rc == 0 and out.splitlines()[-1] == f"{run_copy} has already run its 4 steps; raise --steps to continue " + (
        f"(checkpoint: {run_copy}/ckpt/latest)")


@pytest.mark.parametrize("text", [b"garbage}\n", b'{"x": 1}\n', b'["step"]}\n', b"\xff}\n"])
def test_a_spoilt_metrics_file_is_named_and_kept(text, run_copy, tiny_run):
    path = run_copy / "metrics.jsonl"
    before = path.read_bytes() + text
    path.write_bytes(before)
    fails(call("train.py", tiny_run.parent / "tiny_run.py", f"--out={run_copy}", "--steps=5"), "metrics.jsonl has a line",
          "correct it or move")
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", [b"garbage\n", b"{}\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_spoilt_list_of_samples_is_named_by_its_line(text, tmp_path):
    (tmp_path / "s.jsonl").write_bytes(text)
    fails(call("evaluate.py", tmp_path / "s.jsonl"), "s.jsonl line 1 is not a row of text and wav", "correct or remove it")


# ---- a full disk ----

def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("fault", ["rename", "tensors", "json"])
def test_a_disk_that_fills_up_in_a_save_leaves_the_last_checkpoint(fault, run_copy, tiny_run, monkeypatch):
    before = content(run_copy / "ckpt")
    if fault == "rename":
        monkeypatch.setattr("training.run_state.os.rename", full)
    elif fault == "tensors":
        monkeypatch.setattr("families.tensor_files.save_tensors", full)
    else:
        monkeypatch.setattr("training.run_state.write_json", full)
    fails(call("train.py", tiny_run.parent / "tiny_run.py", f"--out={run_copy}", "--steps=5"), "No space left on device", "free some space")
    assert content(run_copy / "ckpt") == before
    no_leftovers(run_copy)
    monkeypatch.undo()
    rc, out, err = call("train.py", tiny_run.parent / "tiny_run.py", f"--out={run_copy}", "--steps=5")
    assert rc == 0 and "at step 4" in out and (run_copy / "ckpt/step_000005").is_dir(), err


LIMIT = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = sys.argv[2:]
sys.path.insert(0, {root!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def limited(tmp_path):
    """Run a command whose files may not grow beyond `size` bytes: the kernel refuses the write, as a full disk does."""
    script = tmp_path / "limit.py"
    script.write_text(LIMIT.format(root=str(ROOT)))

    def run(size, command, *args):
        import subprocess
        done = subprocess.run([sys.executable, script, str(size), str(ROOT / command), *map(str, args)], cwd=ROOT, capture_output=True,
                              text=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        return done.returncode, done.stdout, done.stderr
    return run


def test_a_checkpoint_that_cannot_grow_leaves_the_last_one(limited, run_copy, tiny_run):
    before = content(run_copy / "ckpt")
    fails(limited(100_000, "train.py", tiny_run.parent / "tiny_run.py", f"--out={run_copy}", "--steps=5"), "safetensors cannot be written",
          "free some space")
    assert content(run_copy / "ckpt") == before
    no_leftovers(run_copy)


def test_a_cache_that_cannot_grow_keeps_its_shards(limited, tiny_run, tmp_path):
    write_clips(tmp_path / "clips", 40)
    (tmp_path / "tiny_run.py").write_text(CONFIG)
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    before = content(tmp_path / "cache")
    fails(limited(2000, "data.py", "prepare", tmp_path / "tiny_run.py"), "cannot be written", "free some space")
    after = content(tmp_path / "cache")
    assert {name: after.get(name) for name in before} == before
    no_leftovers(tmp_path / "cache")


def test_a_wav_that_cannot_grow_leaves_the_old_one(limited, tiny_run, tmp_path):
    soundfile.write(tmp_path / "o.wav", NOISE, 16000)
    before = (tmp_path / "o.wav").read_bytes()
    fails(limited(3000, "sample.py", "--ckpt", tiny_run, "--text=one", "--max_frames=30", f"--out={tmp_path}/o.wav"),
          "o.wav cannot be written", "free some space")
    assert (tmp_path / "o.wav").read_bytes() == before
    no_leftovers(tmp_path)


# ---- the edge itself ----

def test_our_own_faults_keep_their_trace_and_a_closed_pipe_is_silent(tmp_path):
    script = tmp_path / "fault.py"
    for error, said in (("KeyError('x')", "Traceback"), ("BrokenPipeError()", ""), ("ValueError('two\\nlines')", "error: two lines\n")):
        script.write_text(f"from options import edge\ndef main():\n    raise {error}\nedge(main)\n")
        rc, _, err = cli(script)
        assert rc == (1 if "Key" in error else 2) and (said in err if "Key" in error else err == said), err
    rc, _, err = cli(script, env={"MULTISTREAM_TRACE": "1"})
    assert "Traceback" in err
