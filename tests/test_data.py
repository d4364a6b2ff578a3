"""The token cache and the loader: nothing is encoded twice, nothing depends on history, ranks, or luck."""

import json
import random
import threading
import time

import numpy as np
import pytest
import soundfile
import torch

import data
from data import (
    DataConfig,
    Loader,
    aligned_ids,
    frame_starts,
    load_tokenizer,
    normalise,
    open_cache,
    pack,
    prefetch,
    prepare,
    prompt_example,
    source_weight,
    variant,
)
from streams import Stream, StreamTable, is_audio

WORDS = "one two three four five".split()
BYTES = StreamTable((Stream("text", "text", 300, 300), Stream("a", "audio", 66, 66, 0, 64, 65), Stream("b", "audio", 66, 66, 1, 64, 65)),
                    "clone", audio_start=256, audio_end=257)
ALIGNED = StreamTable((*(Stream(n, "text", 64) for n in ("word", "next", "previous", "age")), Stream("advance", "text", 2, 2),
                       Stream("a", "audio", 66, 66, 2, 64, 65), Stream("b", "audio", 66, 66, 3, 64, 65)), "words", aligned=True)
DUPLEX = StreamTable((Stream("text", "text", 300, 300), *(Stream(f"a{i}", "audio", 66, 66, 0, 64, 65) for i in range(2)),
                      *(Stream(f"u{i}", "audio", 66, 0, 0, 64, 65) for i in range(2))), "clone", audio_start=256, audio_end=257)


LOAD_CODEC = data.load_codec
torch.set_num_threads(1)


class FakeCodec:
    """Codes are the rounded mean level of a frame, and its index: enough to see what was encoded."""

    name, sample_rate, frame_rate, num_codebooks, codebook_size = "fake", 1600, 25, 2, 64
    calls = 0

    def encode(self, wav):
        FakeCodec.calls += 1
        hop = 64
        wav = torch.nn.functional.pad(wav[:, 0], (0, -wav.shape[-1] % hop)).unfold(-1, hop, hop)    # (B, T, hop)
        return torch.stack([(wav.mean(-1).clamp(0, 1) * 63).round().long(), torch.arange(wav.shape[1]).expand(wav.shape[:2]) % 64], 1)


@pytest.fixture(autouse=True)
def fake_codec(monkeypatch):
    monkeypatch.setattr(data, "load_codec", lambda spec: FakeCodec())
    FakeCodec.calls = 0


def corpus(folder, clips=40, seconds=(0.4, 2.0), **fields):
    """Clips whose level, hence whose first code, says which they are."""
    draw = random.Random(0)
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(clips):
        n = round(draw.uniform(*seconds) * 8000)
        wav = np.full(n, (i + 1) / 64) + np.random.default_rng(i).standard_normal(n) * 1e-3
        soundfile.write(folder / f"{i}.wav", wav.astype(np.float32), 8000)
        rows.append({"id": str(i), "audio": f"{i}.wav", "text": WORDS[i % 5], "speaker": f"s{i % 3}", "group": "digits"} | fields)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


@pytest.fixture
def config(tmp_path):
    return DataConfig(sources=(corpus(tmp_path / "clips"),), cache=str(tmp_path / "cache"), columns=200, window=16,
                      held_out=0.2, prefetch=0)


def change(config, **fields):
    return DataConfig(**{f: getattr(config, f) for f in config.__dataclass_fields__} | fields)


def same(a, b):
    return (a.names == b.names and a.state == b.state and torch.equal(a.tokens, b.tokens) and torch.equal(a.weights, b.weights)
            and torch.equal(a.positions, b.positions) and torch.equal(a.segments, b.segments))


def take(loader, n):
    return [batch for batch, _ in zip(loader, range(n), strict=False)]


def write_words(folder):
    (folder / "words.json").write_text(json.dumps(WORDS))
    return str(folder / "words.json")


# ---- text ----

@pytest.mark.parametrize("name, text, wanted", [
    ("none", " As  it is. ", " As  it is. "),
    ("english-v1", "Dial 4927, it\u2019s 'John's' touch-tone!", "dial four nine two seven it's john's touch tone"),
    ("arabic-v1", "\ufeb3\ufefc\u0645\u0640\u0640 \u200f\u0663\u06f4\u060c \u061f", "\u0633\u0644\u0627\u0645 34, ?"),
    ("arabic-v1", "\u0645\u064f\u062f\u064e\u0651\u0629 \u0623\u0649", "\u0645\u064f\u062f\u064e\u0651\u0629 \u0623\u0649"),
])
def test_normalisers(name, text, wanted):
    assert normalise(text, name) == wanted
    assert normalise(wanted, name) == wanted


def test_an_unknown_normaliser_names_the_known_ones():
    with pytest.raises(ValueError, match="english-v1"):
        normalise("x", "english-v9")


def test_tokenizers_round_trip_and_save(tmp_path):
    spec = write_words(tmp_path)
    for tokenizer, text in ((load_tokenizer("bytes"), "na\u00efve \u0633"), (load_tokenizer(spec), "two five one")):
        assert tokenizer.decode(tokenizer.encode(text)) == text and max(tokenizer.encode(text)) < tokenizer.size
        name = tokenizer.save(tmp_path / "run")
        again = load_tokenizer(name if name == "bytes" else tmp_path / "run" / name)
        assert again.encode(text) == tokenizer.encode(text)
    with pytest.raises(ValueError, match="'fife'.*'five'"):
        load_tokenizer(spec).encode("one fife")


def test_library_tokenizers(tmp_path):
    import sentencepiece
    import tokenizers
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("two one") == [1, 0] and load_tokenizer(tmp_path).size == 3
    (tmp_path / "text").write_text("one two three four five\n" * 20)
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sp"), vocab_size=24,
                                             model_type="char", minloglevel=9)
    pieces = load_tokenizer(tmp_path / "sp.model")
    assert pieces.decode(pieces.encode("two five")) == "two five"
    assert load_tokenizer(tmp_path / "run" / pieces.save(tmp_path / "run")).encode("two") == pieces.encode("two")


@pytest.mark.parametrize("name, content", [("x.json", b"{"), ("tokenizer.json", b'{"a": 1}'), ("x.model", b"junk")])
def test_broken_tokenizer_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        load_tokenizer(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_tokenizer(tmp_path / "nothing.json")


def test_frame_starts_increase_and_fit():
    draw = random.Random(0)
    for _ in range(300):
        n = draw.randint(1, 12)
        times = sorted(draw.uniform(0, 2) for _ in range(n))
        frames = draw.randint(n, 50)
        starts = frame_starts(times, 25, draw.uniform(0.9, 1.1), draw.random(), frames)
        assert starts[0] == 0 and starts[-1] < frames and all(a < b for a, b in zip(starts, starts[1:], strict=False))
    assert frame_starts([0.3, 1.0, 1.01], 25, 1.0, 0.4, 100) == [0, 25, 26]
    assert frame_starts([0.0, 1.0], 25, 1.25, 0.0, 100) == [0, 20]


def test_words_share_their_time_when_normalised_or_untimed(tmp_path):
    tokenizer = load_tokenizer(write_words(tmp_path))
    assert aligned_ids({"text": "x", "words": [["12", 0.5], ["five", 1.5]]}, 2.0, tokenizer, "english-v1") == ([1, 2, 5], [0.5, 1.0, 1.5])
    assert aligned_ids({"text": "one three"}, 0.8, tokenizer, "none") == ([1, 3], [0.0, pytest.approx(0.3)])


# ---- prepare ----

def test_preparing_twice_encodes_once(config, capsys):
    prepare(config, BYTES)
    assert FakeCodec.calls == 40 and "40 clips encoded" in capsys.readouterr().out
    before = open_cache(config, BYTES).entries
    assert prepare(config, BYTES).entries == before and FakeCodec.calls == 40
    assert "nothing encoded" in capsys.readouterr().out
    prepare(change(config, split="speaker"), BYTES)
    assert FakeCodec.calls == 40                        # another split, the same codes


def test_a_killed_prepare_resumes_behind_the_last_shard(config, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 8)
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
    assert [p.suffix for p in (data.Path(config.cache) / "codes").iterdir()] == [".safetensors"] * 5      # no temporary file stays


def test_a_truncated_shard_is_named(config):
    prepare(config, BYTES)
    shard, = (data.Path(config.cache) / "codes").iterdir()
    shard.write_bytes(shard.read_bytes()[:-10])
    for use in (lambda: prepare(config, BYTES), lambda: take(Loader(config, BYTES), 1)):
        with pytest.raises(ValueError, match=f"{shard.name} is damaged.*delete it"):
            use()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        take(Loader(config, BYTES), 1)
    prepare(config, BYTES)
    assert take(Loader(config, BYTES), 1)


def test_bad_rows_are_named_and_left_out(config, capsys):
    folder = data.Path(config.sources[0])
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan), 8000, subtype="FLOAT")
    with (folder / "manifest.jsonl").open("a") as file:
        for row in ({"id": "nan", "audio": "nan.wav", "text": "x"}, {"id": "gone", "audio": "gone.wav", "text": "x"},
                    {"id": "mute", "text": "x"},
                    {"id": "pair", "parts": ["0", "nan"]}, {"id": "?", "audio": "0.wav", "text": "?!"}):
            file.write(json.dumps(row) + "\n")
    index = prepare(change(config, normaliser="english-v1"), BYTES)
    assert len(index.entries) == 40
    err = capsys.readouterr().err
    for line in ("nan: NaN samples", "gone: missing file", "mute: no audio", "pair: its part nan was left out", "?: no text is left"):
        assert line in err, (line, err)


def test_no_usable_row_fails(config):
    with pytest.raises(ValueError, match="no usable row"):
        prepare(change(config, min_seconds=20.0), BYTES)
    with pytest.raises(ValueError, match="give hash, speaker or manifest"):
        prepare(change(config, split="luck"), BYTES)


def test_tokenizer_and_codec_must_fit_the_grid(config):
    small = StreamTable((Stream("text", "text", 100, 100), *BYTES.streams[1:]), "clone", audio_start=98, audio_end=99)
    with pytest.raises(ValueError, match="256 ids, the text row 100"):
        prepare(config, small)
    with pytest.raises(ValueError, match="1 audio rows"):
        prepare(config, StreamTable(BYTES.streams[:2], "clone"))


def test_variants_differ_but_the_first_is_the_clip(config, tmp_path):
    config = change(config, sources=(corpus(tmp_path / "few", clips=6),))
    plain, many = prepare(config, BYTES), prepare(change(config, variants=4), BYTES)
    for n, entry in enumerate(many.entries):
        assert torch.equal(data.clip_example(many, n, 0, False).codes, data.clip_example(plain, n, 0, False).codes)
        for v in range(4):
            shift, gain, speed = variant(entry.key, v)
            assert 0 <= shift < 1 and abs(gain) <= 3 and 0.94 <= speed <= 1.06
            assert abs(entry.frames[v] - (entry.frames[0] / speed + shift)) <= 1.6
    assert len({tuple(variant("ab", v)) for v in range(8)}) == 8


def test_workers_write_the_same_cache(config, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_codec", LOAD_CODEC)           # a worker is another process: the fake stays here
    real = change(config, sources=(corpus(tmp_path / "few", clips=6),), variants=2)
    rows = (Stream(f"c{i}", "audio", 258, 258, i, 256, 257) for i in range(8))
    table = StreamTable((BYTES.streams[0], *rows), "clone", audio_start=256, audio_end=257)
    a, b = (prepare(change(real, workers=w, cache=str(tmp_path / f"w{w}")), table) for w in (0, 1))
    for n in range(6):
        assert torch.equal(data.clip_example(a, n, 1, False).codes, data.clip_example(b, n, 1, False).codes)


# ---- splits ----

def test_splits_are_stable_and_disjoint(config, tmp_path):
    index = prepare(config, BYTES)
    held = {e.id for e in index.entries if e.split == "held-out"}
    assert 1 <= len(held) <= 20
    lines = (tmp_path / "clips/manifest.jsonl").read_text().splitlines()
    (tmp_path / "clips/manifest.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert {e.id for e in prepare(config, BYTES).entries if e.split == "held-out"} == held      # not by file order
    by_speaker = prepare(change(config, split="speaker", held_out=0.5), BYTES).entries
    assert not {e.speaker for e in by_speaker if e.split == "train"} & {e.speaker for e in by_speaker if e.split == "held-out"}
    assert {e.split for e in prepare(change(config, split="manifest"), BYTES).entries} == {"train"}


def composed(tmp_path, config, table=ALIGNED, **fields):
    rule = {"manifest": "manifest.jsonl", "compose": {"group": "digits", "count": [1, 4], "rows": 200, "seed": 0, "held_out": 0.2}}
    (tmp_path / "clips/compose.jsonl").write_text(json.dumps(rule) + "\n")
    config = change(config, sources=(config.sources[0] + ":1", str(tmp_path / "clips/compose.jsonl") + ":3"),
                    tokenizer=write_words(tmp_path), **fields)
    return config, prepare(config, table)


def test_composed_rows_join_codes_and_words(tmp_path, config):
    config, index = composed(tmp_path, config, variants=3)
    clips = {(e.source, e.id): n for n, e in enumerate(index.entries)}
    for n, entry in [(n, e) for n, e in enumerate(index.entries) if e.parts][:50]:
        example = data.build_example(index, n, ALIGNED)
        parts = [data.clip_example(index, clips[1, index.entries[p].id], 0, True) for p in entry.parts]
        assert torch.equal(example.codes, torch.cat([p.codes for p in parts], 1))
        lengths = [p.codes.shape[1] for p in parts]
        assert example.starts.tolist() == [sum(lengths[:i]) for i in range(len(parts))]
        assert load_tokenizer(config.tokenizer).decode(example.text.tolist()) == entry.text


def test_no_string_and_no_composed_clip_is_on_both_sides(tmp_path, config):
    config, index = composed(tmp_path, config)
    rows = [e for e in index.entries if e.parts]
    assert not {e.text for e in rows if e.split == "train"} & {e.text for e in rows if e.split == "held-out"}
    trained = {index.entries[p].key for e in rows if e.split == "train" for p in e.parts}
    assert trained and not trained & {e.key for e in index.entries if e.split == "held-out"}


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
        config = change(config, prefetch=prefetched)
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
    config = change(config, window=len(train))
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
    loader = Loader(change(config, reference=0.5, window=400), BYTES)
    drawn, _ = loader.window(loader.state)
    used = [(index.entries[n], index.entries[r]) for n, _, r in drawn if r >= 0]
    assert 150 < len(used) < 250
    assert all(a.id != b.id and a.speaker == b.speaker and b.split == "train" for a, b in used)
    longer = sum(b.tokens.ge(0).sum() for b in take(loader, 4)) > 0
    assert longer


def test_stream_weights_scale_rows_and_first_columns_stay_zero(config):
    prepare(config, BYTES)
    plain = take(Loader(config, BYTES), 1)[0]
    scaled = take(Loader(change(config, stream_weights=(0.5, 100.0, 1.0)), BYTES), 1)[0]
    assert torch.equal(scaled.weights, plain.weights * torch.tensor([0.5, 100.0, 1.0])[:, None])
    with pytest.raises(ValueError, match="give one each"):
        Loader(change(config, stream_weights=(1.0,)), BYTES)


def test_too_long_examples_are_counted(config, capsys):
    prepare(config, BYTES)
    loader = Loader(change(config, columns=40), BYTES)
    batches = take(loader, 10)
    assert loader.left_out and not loader.left_out & {n for b in batches for row in b.names for n in row}
    assert "raise data.columns=40" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no example fits"):
        take(Loader(change(config, columns=4), BYTES), 1)


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
    stereo = change(config, sources=(str(folder),), split="manifest")
    example = data.build_example(prepare(stereo, DUPLEX), 0, DUPLEX)
    assert example.codes.shape == example.user.shape == (2, 25)
    assert (example.codes[0, 5].item(), example.user[0, 5].item()) == (16, 32)
    assert data.build_example(prepare(stereo, BYTES), 0, BYTES).codes[0, 5].item() == 16          # a listening-free model hears the left


def test_explicit_reference_and_text_only_rows(tmp_path, config):
    rows = [{"id": "a", "audio": "0.wav", "text": "one", "reference": {"audio": "1.wav", "text": "two"}}, {"id": "t", "text": "only text"}]
    (tmp_path / "clips/own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = change(config, sources=(str(tmp_path / "clips/own.jsonl"),), held_out=0.0)
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

    seen = prefetch(items(), 2)
    assert next(seen) == 1
    with pytest.raises(ValueError, match="broken shard"):
        next(seen)
    endless = prefetch(iter(int, 1), 2)
    next(endless)
    endless.close()
    time.sleep(0.05)
    assert not [t for t in threading.enumerate() if t.name == "data prefetch"]
    assert list(prefetch(iter(range(5)), 1)) == [0, 1, 2, 3, 4]


def test_the_prompt_is_the_training_grid_without_speech(tmp_path, config):
    index = prepare(config, BYTES)
    codec = FakeCodec()
    soundfile.write(tmp_path / "ref.wav", np.full(8000, 0.25), 8000)
    prompt = prompt_example("three", config, load_tokenizer("bytes"), codec, (str(tmp_path / "ref.wav"), "one"))
    assert prompt.codes is None and prompt.reference.codes.shape == (2, 25) and bytes(prompt.text.tolist()) == b"three"
    tokens, _ = data.lay_out(prompt_example("one", config, load_tokenizer("bytes")), BYTES)
    trained, _ = data.lay_out(data.build_example(index, 0, BYTES), BYTES)
    assert torch.equal(trained[:, : tokens.shape[1]], tokens)
    with pytest.raises(ValueError, match="is empty"):
        prompt_example("?!", change(config, normaliser="english-v1"), load_tokenizer("bytes"))


# ---- command line ----

def test_command_line(tmp_path, config, capsys):
    (tmp_path / "c.py").write_text(f"""
from dataclasses import dataclass
from data import DataConfig
from test_data import BYTES
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
    for argv in (["show", str(tmp_path / "c.py"), "--index=99", "--data.held_out=0.5"], ["chekc"], ["check"]):
        with pytest.raises(ValueError):
            data.main(argv)
