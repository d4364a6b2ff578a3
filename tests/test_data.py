"""The loader: nothing depends on history, ranks, or luck, and a prompt is a training example without its speech."""

import json
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from fake_corpus import ALIGNED, BYTES, DUPLEX, FakeCodec, composed, fake_data

import data
from corpus.data_config import source_weight
from corpus.examples import build_example, clip_example, prompt_example
from corpus.index import prepare
from data import Loader, pack
from families.family import lay_out
from layers.architecture import ModelConfig, StackConfig
from model import MultistreamLM
from streams import Stream, StreamTable, is_audio
from system.prefetch import prefetch
from text.tokenizers import load_tokenizer


@pytest.fixture
def config(tmp_path, monkeypatch):
    return fake_data(tmp_path, monkeypatch)


def same(a, b):
    return (a.names == b.names and a.state == b.state and torch.equal(a.tokens, b.tokens) and torch.equal(a.weights, b.weights)
            and torch.equal(a.positions, b.positions) and torch.equal(a.segments, b.segments))


def take(loader, n):
    return [batch for batch, _ in zip(loader, range(n), strict=False)]


# ---- examples ----

def test_composed_rows_join_codes_and_words(tmp_path, config):
    config, index = composed(tmp_path, config, variants=3)
    clips = {(e.source, e.id): n for n, e in enumerate(index.entries)}
    for n, entry in [(n, e) for n, e in enumerate(index.entries) if e.parts][:50]:
        example = build_example(index, n, ALIGNED)
        parts = [clip_example(index, clips[1, index.entries[p].id], 0, True) for p in entry.parts]
        assert torch.equal(example.codes, torch.cat([p.codes for p in parts], 1))
        lengths = [p.codes.shape[1] for p in parts]
        assert example.starts.tolist() == [sum(lengths[:i]) for i in range(len(parts))]
        assert load_tokenizer(config.tokenizer).decode(example.text.tolist()) == entry.text


# ---- loader ----

def test_batches_obey_the_grid(config):
    prepare(config, BYTES)
    for batch in take(Loader(config, BYTES, batch_size=2), 20):
        B, K, S = batch.tokens.shape
        assert (B, K) == (2, 3) and S % 8 == 0 and S <= 200
        pad = batch.segments < 0
        assert (batch.tokens.masked_select(pad[:, None]) == -1).all() and not batch.weights.masked_select(pad[:, None]).any()
        assert (batch.weights.masked_select(((batch.positions == 0) & ~pad)[:, None]) == 0).all()
        for b in range(B):
            for n, name in enumerate(batch.names[b]):
                inside = batch.segments[b] == n
                assert torch.equal(batch.positions[b, inside], torch.arange(int(inside.sum())))
                codes = batch.tokens[b, 1, inside][is_audio(batch.tokens[b][:, inside], BYTES)]
                assert abs(int(codes[codes < 64].float().median()) - int(name) - 1) <= 1      # it is that clip


def test_resume_anywhere_gives_the_same_batches(config):
    prepare(config, BYTES)
    for prefetched in (0, 3):
        config = replace(config, prefetch=prefetched)
        batches = take(Loader(config, BYTES, batch_size=2), 30)
        for i in (0, 1, 4, 7, 18):
            loader = Loader(config, BYTES, batch_size=2)
            loader.restore(json.loads(json.dumps(batches[i].state)))
            assert all(same(a, b) for a, b in zip(batches[i + 1 : i + 9], loader, strict=False))
    loader = Loader(config, BYTES, batch_size=2)
    take(loader, 5)
    assert loader.state == batches[5].state or loader.state == batches[4].state


def test_ranks_and_accumulation_read_the_same_rows(config):
    prepare(config, BYTES)

    def step_rows(world, accum, steps=5):
        loaders = [iter(Loader(config, BYTES, "train", 2, rank, world, accum)) for rank in range(world)]
        rows, states = [], []
        for _ in range(steps):
            batches = [[next(loader) for loader in loaders] for _ in range(accum)]
            rows.append([names for slot in batches for batch in slot for names in batch.names])
            assert len({json.dumps(b.state) for b in batches[-1]}) == 1
            states.append(batches[-1][0].state)
        return rows, states

    assert step_rows(1, 4) == step_rows(2, 2) == step_rows(4, 1)


def test_every_example_comes_once_a_pass(config):
    index = prepare(config, BYTES)
    train = sorted(e.id for e in index.entries if e.split == "train")
    config = replace(config, window=len(train))
    loader = Loader(config, BYTES)
    state = loader.state
    for _ in range(3):
        rows, after = loader.window(state)
        assert sorted(index.entries[n].id for n, _, _ in rows) == train
        state = after


def test_held_out_is_one_pass_shared_by_ranks(config):
    index = prepare(config, BYTES)
    held = sorted(e.id for e in index.entries if e.split == "held-out")
    for world in (1, 2, 3):
        loaders = [Loader(config, BYTES, "held-out", 2, rank, world) for rank in range(world)]
        for _ in range(2):
            batches = [batch for loader in loaders for batch in loader]
            assert sorted(name for b in batches for row in b.names for name in row) == held
            assert all(len(b.names) for b in batches)


def test_sources_are_drawn_by_weight(tmp_path, config):
    config, index = composed(tmp_path, config, window=4000)
    drawn, state = Loader(config, ALIGNED).window({"draw": 0, "counts": [0, 0], "row": 0})
    assert 0.72 < sum(index.entries[n].source for n, _, _ in drawn) / 4000 < 0.78 and sum(state["counts"]) == 4000
    assert source_weight("a/b.jsonl:2.5") == ("a/b.jsonl", 2.5) and source_weight("C:/x") == ("C:/x", 1.0)


def test_reference_is_another_clip_of_the_voice(config):
    index = prepare(config, BYTES)
    loader = Loader(replace(config, reference=0.5, window=400), BYTES)
    drawn, _ = loader.window(loader.state)
    used = [(index.entries[n], index.entries[r]) for n, _, r in drawn if r >= 0]
    assert 150 < len(used) < 250
    assert all(a.id != b.id and a.speaker == b.speaker and b.split == "train" for a, b in used)
    longer = sum(b.tokens.ge(0).sum() for b in take(loader, 4)) > 0
    assert longer


def test_stream_weights_scale_rows_and_first_columns_stay_zero(config):
    prepare(config, BYTES)
    plain = take(Loader(config, BYTES), 1)[0]
    scaled = take(Loader(replace(config, stream_weights=(0.5, 100.0, 1.0)), BYTES), 1)[0]
    assert torch.equal(scaled.weights, plain.weights * torch.tensor([0.5, 100.0, 1.0])[:, None])
    with pytest.raises(ValueError, match="give one each"):
        Loader(replace(config, stream_weights=(1.0,)), BYTES)


def test_too_long_examples_are_counted(config, capsys):
    prepare(config, BYTES)
    loader = Loader(replace(config, columns=40), BYTES)
    batches = take(loader, 10)
    assert loader.left_out and not loader.left_out & {n for b in batches for row in b.names for n in row}
    assert "raise data.columns=40" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no example fits"):
        take(Loader(replace(config, columns=4), BYTES), 1)


def test_packing_wastes_little():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(30, 150) for _ in range(256)]
        rows = pack(lengths, 1200)
        assert sorted(i for row in rows for i in row) == list(range(256)) and all(sum(lengths[i] for i in row) <= 1200 for row in rows)
        assert sum(lengths) / (1200 * len(rows)) >= 0.93
    lengths = [[draw.randint(30, 150) for _ in range(256)] for _ in range(50)]
    assert sum(map(sum, lengths)) / (1200 * sum(len(pack(n, 1200)) for n in lengths)) >= 0.95     # the last row of a window included


def test_duplex_rows_keep_left_as_agent_and_right_as_user(tmp_path, config):
    folder = tmp_path / "calls"
    folder.mkdir()
    soundfile.write(folder / "a.wav", np.stack([np.full(8000, 0.25), np.full(8000, 0.5)], 1), 8000)
    (folder / "manifest.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "one", "stereo": True, "split": "train"}) + "\n")
    stereo = replace(config, sources=(str(folder),), split="manifest")
    example = build_example(prepare(stereo, DUPLEX), 0, DUPLEX)
    assert example.codes.shape == example.user.shape == (2, 25)
    assert (example.codes[0, 5].item(), example.user[0, 5].item()) == (16, 32)
    assert build_example(prepare(stereo, BYTES), 0, BYTES).codes[0, 5].item() == 16          # a listening-free model hears the left


def test_explicit_reference_and_text_only_rows(tmp_path, config):
    rows = [{"id": "a", "audio": "0.wav", "text": "one", "reference": {"audio": "1.wav", "text": "two"}}, {"id": "t", "text": "only text"}]
    (tmp_path / "clips/own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = replace(config, sources=(str(tmp_path / "clips/own.jsonl"),), held_out=0.0)
    index = prepare(own, BYTES)
    entry = next(e for e in index.entries if e.id == "a")
    assert index.entries[entry.reference].text == "two" and [e.id for e in index.entries if e.split] == ["a"]
    text = StreamTable((Stream("text", "text", 300, 300),), "text")
    prepare(own, text)
    names = {name for b in take(Loader(own, text), 3) for row in b.names for name in row}
    assert names == {"a", "t"}


def test_prefetch_passes_errors_on_and_stops_when_dropped():
    def items():
        yield 1
        raise ValueError("broken shard")

    running = set(threading.enumerate())                   # other tests may still hold a loader
    seen = prefetch(items(), 2)
    assert next(seen) == 1
    with pytest.raises(ValueError, match="broken shard"):
        next(seen)
    endless = prefetch(iter(int, 1), 2)
    next(endless)
    endless.close()
    time.sleep(0.05)
    assert not [t for t in set(threading.enumerate()) - running if t.name.startswith("data prefetch")]
    assert list(prefetch(iter(range(5)), 1)) == [0, 1, 2, 3, 4]


def test_the_prompt_is_the_training_grid_without_speech(tmp_path, config):
    index = prepare(config, BYTES)
    codec = FakeCodec()
    soundfile.write(tmp_path / "ref.wav", np.full(8000, 0.25), 8000)
    prompt = prompt_example("three", config, load_tokenizer("bytes"), codec, [(str(tmp_path / "ref.wav"), "one")])
    assert prompt.codes is None and prompt.reference.codes.shape == (2, 25) and bytes(prompt.text.tolist()) == b"three"
    tokens, _ = lay_out(prompt_example("one", config, load_tokenizer("bytes")), BYTES)
    trained, _ = lay_out(build_example(index, 0, BYTES), BYTES)
    assert torch.equal(trained[:, : tokens.shape[1]], tokens)
    with pytest.raises(ValueError, match="is empty"):
        prompt_example("?!", replace(config, normaliser="english-v1"), load_tokenizer("bytes"))


# ---- command line ----

def test_a_config_that_names_no_data_is_told() -> None:
    for command in ("prepare", "show"):
        with pytest.raises(ValueError, match="dsaa_ae.py is a SaeConfig and has no data section"):
            data.main([command, str(ROOT / "configs/dsaa_ae.py")])


def test_command_line(tmp_path, config, capsys):
    (tmp_path / "c.py").write_text(f"""
from dataclasses import dataclass
from data import DataConfig
from fake_corpus import BYTES
@dataclass(frozen=True)
class Model:
    layers: int = 1
    table = BYTES
@dataclass(frozen=True)
class Config:
    data: DataConfig
    model: Model = Model()
config = Config(DataConfig(sources={config.sources!r}, cache={config.cache!r}))
""")
    data.main(["prepare", str(tmp_path / "c.py"), "--data.held_out=0.5"])
    data.main(["show", str(tmp_path / "c.py"), "--data.held_out=0.5", "--index", "3"])
    out = capsys.readouterr().out
    assert "prepared 40 examples" in out and "3  " in out and "'four'" in out and "256" in out
    data.main(["check", config.sources[0], "--write", str(tmp_path)])
    data.main(["--help"])
    assert "encoded versions of a clip" in capsys.readouterr().out
    for argv in (["show", str(tmp_path / "c.py"), "--index=99", "--data.held_out=0.5"], ["chekc"], ["check", "a", "b"]):
        with pytest.raises(ValueError):
            data.main(argv)


# ---- epochs ----

@pytest.mark.parametrize("world, batch_size, accum", [(1, 1, 1), (1, 2, 3), (2, 2, 2), (3, 1, 4)])
def test_passes_read_every_example_exactly_so_often_and_steps_counts_them(config, world, batch_size, accum):
    prepare(config, BYTES)
    config = replace(config, window=7)                               # divides nothing
    loaders = [Loader(config, BYTES, "train", batch_size, rank, world, accum, passes=3) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert {len(found) for found in batches} == {loaders[0].steps() * accum}            # every rank, and whole steps
    names = [name for found in batches for batch in found for row in batch.names for name in row if name]
    own = [e.id for e in loaders[0].index.entries if e.split == "train"]
    assert sorted(names) == sorted(own * 3)
    last = [batch for found in batches for batch in found[-accum:]]
    assert all(batch.tokens.shape[0] <= batch_size and batch.tokens.shape[2] >= 8 for batch in last)
    one = [list(Loader(config, BYTES, "train", 1, passes=3))]
    assert sum(bool(row) for batch in one[0] for row in batch.names) == len(one[0])      # nothing is filled up where nothing is missing


def test_a_pass_resumes_anywhere_and_ends_at_the_same_place(config):
    prepare(config, BYTES)
    batches = list(Loader(config, BYTES, batch_size=2, accum=2, passes=2))
    for i in (1, 3, len(batches) - 3):                               # between two steps
        loader = Loader(config, BYTES, batch_size=2, accum=2, passes=2)
        loader.restore(json.loads(json.dumps(batches[i].state)))
        rest = list(loader)
        assert len(rest) == len(batches) - i - 1 and all(same(a, b) for a, b in zip(rest, batches[i + 1 :], strict=True))


def test_an_empty_row_adds_nothing_to_the_loss(config):
    prepare(config, BYTES)
    loader = Loader(config, BYTES)
    batch = data.collate([loader.nothing()], loader.state)
    model = MultistreamLM(ModelConfig(BYTES, StackConfig(dim=16, layers=1, heads=2, ffn=16)))
    sums = model(batch.tokens, batch.weights, batch.positions, batch.segments)
    sums.nll.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert float(sums.nll.detach().sum()) == 0 and gradients and all(torch.isfinite(g).all() and not g.any() for g in gradients)
