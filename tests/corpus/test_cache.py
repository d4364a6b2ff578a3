"""The token cache: nothing is encoded twice, nothing bad is kept, and no audio is on both sides of a split."""

import gc
import json
import os
import shutil
import tracemalloc
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import call
from fake_corpus import BYTES, FakeCodec, composed, fake_data, write_clips

import corpus.cache
from audio import load_codec
from corpus.cache import SUM, Entry, Index, variant_parameters, write_tensors
from corpus.data_config import DataConfig
from corpus.index import index_folder, open_cache, prepare, prepare_shard
from data import Loader
from streams import Stream, StreamTable
from system.files import checksum


@pytest.fixture
def config(tmp_path, monkeypatch):
    return fake_data(tmp_path, monkeypatch)


# ---- prepare ----

def test_preparing_twice_encodes_once(config, capsys):
    prepare(config, BYTES)
    assert FakeCodec.calls == 40 and "40 clips encoded" in capsys.readouterr().out
    before = open_cache(config, BYTES).entries
    assert prepare(config, BYTES).entries == before and FakeCodec.calls == 40
    assert "nothing encoded" in capsys.readouterr().out
    prepare(replace(config, split="speaker"), BYTES)
    assert FakeCodec.calls == 40                        # another split, the same codes


def test_shards_encode_each_clip_once_and_prepare_joins_them(config, capsys):
    alone = prepare(replace(config, cache=f"{config.cache}_alone"), BYTES)
    FakeCodec.calls, folder = 0, index_folder(config, BYTES)
    for number in (0, 2, 2):                            # the second job died, the third was run twice
        prepare_shard(config, BYTES, (number, 3))
        with pytest.raises(FileNotFoundError, match="data.py prepare"):
            open_cache(config, BYTES)
    done = [int(line.split()[2]) for line in capsys.readouterr().out.splitlines() if line.startswith("shard")]
    assert 0 < done[0] < 40 and 0 < done[1] and done[2] == 0 and sum(done) == FakeCodec.calls < 40
    together, (out, err) = prepare(config, BYTES), capsys.readouterr()
    assert f"{40 - sum(done)} clips encoded" in out and "not ended: shard 1/3" in err and FakeCodec.calls == 40
    assert [replace(e, shard="") for e in together.entries] == [replace(e, shard="") for e in alone.entries]
    assert all(torch.equal(together.codes(n, 0), alone.codes(n, 0)) for n in range(40))
    for number in range(3):
        prepare_shard(config, BYTES, (number, 3))
    prepare(config, BYTES)
    assert "not ended" not in capsys.readouterr().err and not list(folder.glob("shard-*")) and FakeCodec.calls == 40


def test_a_shard_is_a_part_of_a_whole_and_has_recordings(config):
    text = StreamTable(BYTES.streams[:1], "text")
    with pytest.raises(ValueError, match="no audio rows.*without it"):
        prepare_shard(config, text, (0, 2))
    rc, _, err = call("data.py", "prepare", "configs/tiny.py", "--smoke", "--shard", "8/8")
    assert rc == 2 and "--shard=8/8 is not i/n with i from 0 to n - 1" in err, err


def test_a_killed_prepare_resumes_behind_the_last_shard(config, monkeypatch):
    monkeypatch.setattr("corpus.cache.SHARD", 8)
    encode = FakeCodec.encode

    def killed(self, wav):
        if FakeCodec.calls == 20:
            raise KeyboardInterrupt
        return encode(self, wav)

    monkeypatch.setattr(FakeCodec, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, BYTES)
    with pytest.raises(FileNotFoundError, match="data.py prepare"):
        open_cache(config, BYTES)
    monkeypatch.setattr(FakeCodec, "encode", encode)
    FakeCodec.calls = 0
    assert len(prepare(config, BYTES).entries) == 40 and FakeCodec.calls == 40 - 16
    assert [p.suffix for p in (Path(config.cache) / "codes").iterdir()] == [".safetensors"] * 5      # no temporary file stays


def test_a_truncated_shard_is_named(config):
    prepare(config, BYTES)
    shard, = (Path(config.cache) / "codes").iterdir()
    shard.write_bytes(shard.read_bytes()[:-10])
    for use in (lambda: prepare(config, BYTES), lambda: next(iter(Loader(config, BYTES)))):
        with pytest.raises(ValueError, match=f"{shard.name} is damaged.*delete it"):
            use()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        next(iter(Loader(config, BYTES)))
    prepare(config, BYTES)
    assert next(iter(Loader(config, BYTES)))


def test_bad_rows_are_named_and_left_out(config, capsys):
    folder = Path(config.sources[0])
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan), 8000, subtype="FLOAT")
    with (folder / "manifest.jsonl").open("a") as file:
        for row in ({"id": "nan", "audio": "nan.wav", "text": "x"}, {"id": "gone", "audio": "gone.wav", "text": "x"},
                    {"id": "mute", "text": "x"},
                    {"id": "pair", "parts": ["0", "nan"]}, {"id": "?", "audio": "0.wav", "text": "?!"}):
            file.write(json.dumps(row) + "\n")
    index = prepare(replace(config, normaliser="english-v1"), BYTES)
    assert len(index.entries) == 40
    err = capsys.readouterr().err
    for line in ("nan: NaN samples", "gone: missing file", "mute: no audio", "pair: its part nan was left out", "?: no text is left"):
        assert line in err, (line, err)


def test_no_usable_row_fails(config):
    with pytest.raises(ValueError, match="no usable row"):
        prepare(replace(config, min_seconds=20.0), BYTES)
    with pytest.raises(ValueError, match="set split to hash, speaker or manifest"):
        prepare(replace(config, split="luck"), BYTES)


def test_tokenizer_and_codec_must_fit_the_grid(config):
    small = StreamTable((Stream("text", "text", 100, 100), *BYTES.streams[1:]), "clone", audio_start=98, audio_end=99)
    with pytest.raises(ValueError, match="256 ids, the model's text row 100"):
        prepare(config, small)
    with pytest.raises(ValueError, match="1 audio rows"):
        prepare(config, StreamTable(BYTES.streams[:2], "clone"))


def test_variants_differ_but_the_first_is_the_clip(config, tmp_path):
    config = replace(config, sources=(write_clips(tmp_path / "few", clips=6),))
    plain, many = prepare(config, BYTES), prepare(replace(config, variants=4), BYTES)
    for n, entry in enumerate(many.entries):
        assert torch.equal(many.codes(n, 0), plain.codes(n, 0))
        for v in range(4):
            shift, gain, speed = variant_parameters(entry.key, v)
            assert 0 <= shift < 1 and abs(gain) <= 3 and 0.94 <= speed <= 1.06
            assert abs(entry.frames[v] - (entry.frames[0] / speed + shift)) <= 1.6
    assert len({tuple(variant_parameters("ab", v)) for v in range(8)}) == 8


def test_workers_write_the_same_cache(config, tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.index.load_codec", load_codec)
    real = replace(config, sources=(write_clips(tmp_path / "few", clips=6),), variants=2)
    rows = (Stream(f"c{i}", "audio", 258, 258, i, 256, 257) for i in range(8))
    table = StreamTable((BYTES.streams[0], *rows), "clone", audio_start=256, audio_end=257)
    a, b = (prepare(replace(real, workers=w, cache=str(tmp_path / f"w{w}")), table) for w in (0, 3))
    for n, v in product(range(6), range(2)):
        assert torch.equal(a.codes(n, v), b.codes(n, v))


def test_encoding_takes_one_torch_thread_a_clip_and_gives_the_others_back(config, monkeypatch):
    seen, encode = set(), FakeCodec.encode
    monkeypatch.setattr(FakeCodec, "encode", lambda self, wav: seen.add(torch.get_num_threads()) or encode(self, wav))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        prepare(replace(config, workers=2), BYTES)
        assert seen == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# ---- splits ----

def test_splits_are_stable_and_disjoint(config, tmp_path, capsys):
    index = prepare(config, BYTES)
    held = {e.id for e in index.entries if e.split == "held-out"}
    assert 1 <= len(held) <= 20
    lines = (tmp_path / "clips/manifest.jsonl").read_text().splitlines()
    (tmp_path / "clips/manifest.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert {e.id for e in prepare(config, BYTES).entries if e.split == "held-out"} == held      # not by file order
    by_speaker = prepare(replace(config, split="speaker", held_out=0.5), BYTES).entries
    path = Path(config.sources[0]) / "manifest.jsonl"
    rows = [json.loads(line) | {"speaker": "only"} for line in path.read_text().splitlines()]
    (path.parent / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = prepare(replace(config, sources=(str(path.parent / "one.jsonl"),), split="speaker", held_out=0.5), BYTES).entries
    assert {e.split for e in one} == {"train", "held-out"} and "of one speaker" in capsys.readouterr().out      # else all or nothing
    assert not {e.speaker for e in by_speaker if e.split == "train"} & {e.speaker for e in by_speaker if e.split == "held-out"}
    assert {e.split for e in prepare(replace(config, split="manifest"), BYTES).entries} == {"train"}


def test_no_string_and_no_composed_clip_is_on_both_sides(tmp_path, config):
    config, index = composed(tmp_path, config)
    rows = [e for e in index.entries if e.parts]
    assert not {e.text for e in rows if e.split == "train"} & {e.text for e in rows if e.split == "held-out"}
    trained = {index.entries[p].key for e in rows if e.split == "train" for p in e.parts}
    assert trained and not trained & {e.key for e in index.entries if e.split == "held-out"}


# ---- one writer, and readers that are not disturbed ----

def test_rows_that_change_make_another_index_and_leave_the_open_one(config):
    prepare(config, BYTES)
    open_one = open_cache(config, BYTES)
    before = [(entry.id, entry.text, open_one.text(n).tolist()) for n, entry in enumerate(open_one.entries)]
    folder = Path(config.sources[0])
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows[1]["text"] += " again"
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]) + json.dumps(rows[0] | {"id": "new"}) + "\n")
    prepare(config, BYTES)
    assert [(entry.id, entry.text, open_one.text(n).tolist()) for n, entry in enumerate(open_one.entries)] == before
    now = open_cache(config, BYTES)
    assert now.content != open_one.content and now.changes(now.content) == now.changes("") == []
    said, = now.changes(open_one.content)
    for part in ("1 added (new)", f"1 gone ({rows[0]['id']})", f"1 edited ({rows[1]['id']})", "the run goes on with the rows as they"):
        assert part in said, said
    prepare(replace(config, sources=config.sources), BYTES)
    assert "which rows is not known any more" in now.changes("0" * 16)[0]


def test_preparing_again_writes_nothing(config):
    prepare(config, BYTES)
    before = {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("*") if path.is_file()}
    prepare(config, BYTES)
    assert {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("*") if path.is_file()} == before


def test_the_same_rows_make_the_same_bytes(config, tmp_path):
    trees = []
    for name in ("a", "b"):
        prepare(replace(config, cache=str(tmp_path / name)), BYTES)
        trees.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()})
    assert trees[0] == trees[1]


def test_a_second_prepare_is_refused_by_name_while_one_runs(config):
    import subprocess
    import sys

    from conftest import ROOT
    code = "import sys, time; from system.files import lock; lock(sys.argv[1]); print('ready', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, config.cache], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    with pytest.raises(ValueError, match=f"is being written by process {other.pid} on"):
        prepare(config, BYTES, wait=None)
    other.kill()
    other.wait()
    assert prepare(config, BYTES, wait=None).entries


def test_a_clip_on_which_the_codec_fails_is_named_and_the_others_go_on(config, capsys, monkeypatch):
    encode = FakeCodec.encode

    def fails_once(self, wav):
        if FakeCodec.calls == 3:
            FakeCodec.calls += 1
            raise RuntimeError("no such frame \x1b[31m")
        return encode(self, wav)

    monkeypatch.setattr(FakeCodec, "encode", fails_once)
    index = prepare(config, BYTES)
    err = capsys.readouterr().err
    assert len(index.entries) == 39 and "encoding failed; RuntimeError: no such frame \\x1b[31m; check the recording" in err


# ---- nothing has changed ----

def test_where_nothing_has_changed_nothing_is_read_and_the_same_is_said(config, monkeypatch, capsys):
    with (Path(config.sources[0]) / "manifest.jsonl").open("a") as file:
        file.write('{"id": "gone", "audio": "gone.wav", "text": "x"}\n')
    monkeypatch.setattr("corpus.index.load_codec", lambda *_, **__: torch.rand(3) is not None and FakeCodec())
    state = torch.get_rng_state()
    prepare(config, BYTES)
    said = capsys.readouterr()
    with monkeypatch.context() as patch:
        for name in ("cache.read_manifest", "index.load_codec", "cache.judge"):
            patch.setattr(f"corpus.{name}", lambda *_, **__: pytest.fail("something was read"))
        again = prepare(config, BYTES)
        assert torch.equal(torch.get_rng_state(), state)
        assert len(again.entries) == 40 and again.codes(3, 0).shape[0] == 2
    now = capsys.readouterr()
    assert now.err == said.err and "gone.wav does not exist" in said.err
    assert now.out == said.out.replace("40 clips encoded", "everything was cached, nothing encoded")


def replaced(folder: Path) -> None:
    """Another recording of the same size, set back to the time of the old one."""
    path = folder / "3.wav"
    about, content = path.stat(), bytearray(path.read_bytes())
    content[-400:] = bytes(400)
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


CHANGED = {"a text": lambda f: (f / "manifest.jsonl").write_text((f / "manifest.jsonl").read_text().replace('"one"', '"won"', 1)),
           "a recording": replaced, "one more file": lambda f: (f / "new.txt").write_text("hello"),
           "one file less": lambda f: (f / "5.wav").unlink(),
           "a shard": lambda f: next((f.parent / "cache" / "codes").iterdir()).unlink(),
           "the index": lambda f: next((f.parent / "cache").glob("*/[!i]*.json")).unlink()}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_whatever_has_changed_is_read_again(config, change, monkeypatch):
    folder, read = Path(config.sources[0]), []
    config = replace(config, cache=str(folder.parent / "cache"))
    prepare(config, BYTES)
    change(folder)
    monkeypatch.setattr("corpus.cache.read_manifest", lambda *given, real=corpus.cache.read_manifest: read.append(1) or real(*given))
    prepare(config, BYTES)
    assert read == [1]
    prepare(config, BYTES)
    assert read == [1]


def test_recordings_elsewhere_are_watched_too(config, tmp_path, monkeypatch):
    far, near = tmp_path / "far", tmp_path / "near"
    shutil.copytree(config.sources[0], far)
    near.mkdir()
    rows = [json.loads(line) for line in (far / "manifest.jsonl").read_text().splitlines()]
    (near / "list.jsonl").write_text("".join(json.dumps(row | {"audio": str(far / row["audio"])}) + "\n" for row in rows))
    config = replace(config, sources=(str(near / "list.jsonl"),), allow_outside=True, cache=str(tmp_path / "cache"))
    prepare(config, BYTES)
    with monkeypatch.context() as patch:
        patch.setattr("corpus.cache.read_manifest", lambda *_: pytest.fail("something was read"))
        prepare(config, BYTES)
    before = open_cache(config, BYTES).content
    replaced(far)
    prepare(config, BYTES)
    assert open_cache(config, BYTES).content != before


def test_an_open_index_takes_less_than_100_bytes_a_row(tmp_path):
    def opened(count: int) -> int:
        config = DataConfig(sources=("x",), cache=str(tmp_path / str(count)))
        entries, keys = [], [f"{n:032x}" for n in range(count)]
        for at in range(0, count, 64):
            said = {key: f"9 {SUM}{checksum(np.zeros((8, 9), np.uint16))}" for key in keys[at : at + 64]}
            write_tensors(tmp_path / str(count) / "codes" / f"{at}.safetensors", {key: np.zeros((8, 9), np.uint16) for key in said}, said)
            entries += [Entry(f"row {n}", "a text of some length", speaker=f"s{n % 9}", shard=f"{at}.safetensors", key=keys[n], frames=[9])
                        for n in range(at, min(at + 64, count))]
        index = Index(index_folder(config, BYTES), {"frame_rate": 25.0, "duplex": False}, entries)
        index.write({str(n): np.arange(21, dtype=np.int32)[None] for n in range(count)}, {"inputs": ""})
        tracemalloc.start()
        loader = Loader(config, BYTES)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(loader.index.entries) == count and loader.index.entries[count - 1] == entries[-1]
        assert loader.index.codes(count - 1, 0).shape == (8, 9) and loader.index.text(count // 2).tolist() == [list(range(21))]
        return size

    few, many = [opened(count) for count in (64, 512, 2560)][1:]     # the first also makes what stays
    assert (many - few) / 2048 < 100
