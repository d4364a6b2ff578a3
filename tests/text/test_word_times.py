"""word_times.py: timed words become text rows without losing one; alignments and stereo recordings are judged in plain words."""

import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import call
from fake_corpus import fake_data
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from corpus.bundled import demo_dialogues
from corpus.examples import build_example
from corpus.index import prepare
from corpus.layouts import read_manifest
from data import Loader
from families.family import lay_out
from streams import Stream, StreamTable
from text.tokenizers import Tokenizer, load_tokenizer
from text.word_times import (
    EPAD,
    INTERLEAVERS,
    MAIN,
    OTHER,
    PAD,
    as_json,
    interleave,
    parse_alignments,
    row_words,
    text_weights,
    tidy_words,
    timed_transcript,
    tokenise,
)

TABLE = StreamTable((Stream("text", "text", 260, 256, start=259), *(Stream(f"a{i}", "audio", 66, 64, i, 64) for i in range(2)),
                     *(Stream(f"u{i}", "audio", 66, 0, i, 64) for i in range(2))), "duplex", aligned=True)
RATE = 12.5


# ---- the interleaver ----

EXAMPLE = [([11, 12], 0.3), ([13, 14, 15], 0.55), ([16], 2.0)]          # "a b", "c d e", "f"


@pytest.mark.parametrize("interleaver", INTERLEAVERS)
def test_the_worked_example_of_the_package(interleaver):
    row = interleave(EXAMPLE, 40, RATE, interleaver).tolist()
    assert row == [3, 3, 0, 11, 12, 0, 13, 14, 15, *[3] * 15, 0, 16, *[3] * 14]


def test_tokens_that_are_left_over_wait_and_the_reference_drops_them():
    words = [([11, 12, 13], 0.10), ([14], 0.16), ([15, 16], 0.9)]       # the second begins while the first is said
    assert interleave(words, 16, RATE).tolist() == [0, 11, 12, 13, 14, 3, 3, 3, 3, 3, 0, 15, 16, 3, 3, 3]
    assert interleave(words, 16, RATE, "reference").tolist() == [0, 11, 14, 3, 3, 3, 3, 3, 3, 3, 0, 15, 16, 3, 3, 3]


def test_words_that_share_a_frame_keep_their_order():
    words = [([11], 0.41), ([12], 0.42), ([13], 0.47)]                  # all in frame 5
    assert interleave(words, 9, RATE).tolist() == [3, 3, 3, 3, 0, 11, 12, 13, 3]
    assert interleave(words, 9, RATE, "reference").tolist() == [3, 3, 3, 3, 0, 13, 3, 3, 3]


def test_a_word_at_the_end_pushes_padding_out():
    assert interleave([([11, 12, 13], 0.30)], 5, RATE).tolist() == [3, 0, 11, 12, 13]
    assert interleave([([11, 12, 13], 0.0)], 3, RATE).tolist() == [11, 12, 13]
    with pytest.raises(ValueError, match="more text tokens than the 2 frames"):
        interleave([([11, 12, 13], 0.0)], 2, RATE)


def reference_loop(words, frames):
    """moshi-finetune's Interleaver as the spec tells it."""
    row, queue, n = [PAD] * frames, [], 0
    for t in range(frames):
        while n < len(words) and words[n][1] * RATE < t + 1:
            queue, n = list(words[n][0]), n + 1
        if queue:
            if t > 0 and row[t - 1] == PAD:
                row[t - 1] = EPAD
            row[t] = queue.pop(0)
    return row


@pytest.mark.parametrize("seed", range(20))
def test_no_token_is_lost_and_the_reference_is_the_reference(seed):
    draw = random.Random(seed)
    frames, starts = 200, sorted(draw.uniform(0, 15) for _ in range(draw.randint(0, 50)))
    words = [([draw.randint(4, 99) for _ in range(draw.randint(1, 3))], start) for start in starts]
    assert interleave(words, frames, RATE, "reference").tolist() == reference_loop(words, frames)
    row = interleave(words, frames, RATE).tolist()
    assert [t for t in row if t > 3] == [t for ids, _ in words for t in ids] and len(row) == frames
    assert all(row[t + 1] > 3 for t in range(frames) if row[t] == EPAD)


def test_padding_ids_are_those_of_the_table():
    row = interleave([([41, 42], 0.3), ([43], 0.9)], 14, RATE, pad=7, epad=8)
    usual = interleave([([41, 42], 0.3), ([43], 0.9)], 14, RATE)
    assert row.tolist() == [{PAD: 7, EPAD: 8}.get(token, token) for token in usual.tolist()]
    assert text_weights(row, 0.5, 7, 8).tolist() == text_weights(usual, 0.5).tolist()
    assert (interleave([([41], 0.3)], 6, RATE, pad=7, epad=7) == 7).sum() == 5


def test_padding_counts_less_and_nothing_counts_nothing():
    assert text_weights(torch.tensor([3, 0, 7, -1, 3]), 0.5).tolist() == [0.5, 0.5, 1.0, 0.0, 0.5]


# ---- alignments ----

MOSHI = {"alignments": [["hi", [0.3, 0.5], MAIN], ["yes", [0.4, 0.6], OTHER], ["you", [0.55, 0.9], MAIN]]}


def test_all_published_forms_say_the_same():
    dialogue = [{"speaker": "A", "word": "hi", "start": 0.3, "end": 0.5}, {"speaker": "B", "word": "yes", "start": 0.4, "end": 0.6},
                {"speaker": "A", "word": "you", "start": 0.55, "end": 0.9}]
    words = parse_alignments(MOSHI)
    assert words == [("hi", 0.3, 0.5, MAIN), ("yes", 0.4, 0.6, OTHER), ("you", 0.55, 0.9, MAIN)]
    assert parse_alignments(dialogue) == parse_alignments(MOSHI["alignments"]) == words
    assert parse_alignments({"alignments": as_json(words)}) == words


def test_unsorted_overlapping_and_empty_words_are_mended_and_counted():
    words = parse_alignments([["b", [1.0, 1.4], MAIN], ["a", [0.2, 1.1], MAIN], ["", [0, 1], MAIN], ["x", [2.0, 2.0], MAIN],
                              ["u", [0.3, 3], OTHER]])
    kept, found = tidy_words(words)
    assert [w[0] for w in kept] == ["a", "u", "b"] and found == {"without length": 2, "out of order": 1, "overlapping": 1}
    assert row_words({"alignments": []}) == []
    assert [w[:3] for w in row_words({"words": [["a", 0.1], ["b", 0.5]]})] == [("a", 0.1, 0.5), ("b", 0.5, 1.5)]
    with pytest.raises(ValueError, match="needs word times"):
        row_words({"text": "a b"})


@pytest.mark.parametrize("found", [7, {}, {"alignments": 3}, [7], [["a"]], [["a", 0.3, MAIN]], [["a", [0.1], MAIN]],
                                   [["a", ["x", 1], MAIN]], [["a", [0.1, float("nan")], MAIN]],
                                   [["a", [-1, 1], MAIN]], [[3, [0, 1], MAIN]], [{"word": "a"}]])
def test_what_is_no_alignment_is_named_in_one_line(found):
    with pytest.raises(ValueError) as caught:
        parse_alignments(found)
    assert "\n" not in str(caught.value) and "[word, [start, end], speaker]" in str(caught.value)


# ---- tokens ----

@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """A SentencePiece model of the ids that Moshi's has: 0 <unk>, 1 <s>, 2 </s>, 3 <pad>."""
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(["hello there my old friend", "who is there", "the old man says hello"] * 9),
                               model_writer=model, vocab_size=45, unk_id=0, bos_id=1, eos_id=2, pad_id=3, hard_vocab_limit=False,
                               minloglevel=2)
    sp = SentencePieceProcessor(model_proto=model.getvalue())
    return Tokenizer("x.model", sp.vocab_size(), sp.encode, lambda ids: sp.decode(list(ids)))


def test_words_alone_and_sentences_whole(pieces):
    words = [("hello", 0.0, 0.5, MAIN), ("old", 0.6, 0.8, MAIN), ("friend.", 0.9, 1.5, MAIN),
             ("who", 4.0, 4.2, MAIN), ("is", 4.3, 4.5, MAIN)]
    alone = tokenise(words, pieces)
    assert alone == [(pieces.encode(w[0]), w[1]) for w in words]
    whole = tokenise(words, pieces, contextual=True)
    assert [i for ids, _ in whole for i in ids] == pieces.encode("hello old friend.") + pieces.encode("who is")
    times = [start for _, start in whole]
    assert times == sorted(times) and times[0] == 0.0 and {0.6, 0.9, 4.0, 4.3} <= set(times)
    joined = tokenise(words[3:], pieces, contextual=True, spaces=False)
    assert [i for ids, _ in joined for i in ids] == pieces.encode("whois")


def test_letters_of_several_bytes_share_the_time_of_their_word():
    tokens = tokenise([("né", 1.0, 2.0, MAIN), ("à", 3.0, 3.5, MAIN)], load_tokenizer("bytes"), contextual=True)
    assert [ids[0] for ids, _ in tokens] == list("né à".encode())
    assert [start for _, start in tokens][:2] == [1.0, 1.5] and tokens[-1][1] >= 3.0


def test_a_transcript_has_a_line_for_each_phrase():
    row = interleave([(list(b"ab"), 0.5), (list(b"cd"), 0.7), (list(b"e"), 4.0)], 60, RATE)
    assert timed_transcript(row, load_tokenizer("bytes"), RATE) == "   0.48  abcd\n   4.00  e\n"
    assert timed_transcript(torch.full((5,), PAD), load_tokenizer("bytes"), RATE) == ""


# ---- through the cache ----

def voice(seconds: float, spans: list[tuple[float, float]], seed: int, rate: int = 16000) -> np.ndarray:
    """Noise in the spans, silence elsewhere."""
    wav, noise = np.zeros(round(seconds * rate)), np.random.default_rng(seed).standard_normal(round(seconds * rate))
    for start, end in spans:
        wav[round(start * rate) : round(end * rate)] = 0.1 * noise[round(start * rate) : round(end * rate)]
    return wav


SIDES = {MAIN: [(0.3, 0.9), (2.0, 2.4)], OTHER: [(1.0, 1.8)]}
WORDS = [["ab", [0.3, 0.6], MAIN], ["cde", [0.62, 0.9], MAIN], ["u", [1.0, 1.8], OTHER], ["fghijk", [2.0, 2.4], MAIN]]


def stereo(folder, name="d", words=WORDS, channels=None, seconds=4.0, text=None):
    """A dialogue in Moshi's layout; returns the list's path."""
    folder.mkdir(parents=True, exist_ok=True)
    channels = channels or [voice(seconds, SIDES[MAIN], 1), voice(seconds, SIDES[OTHER], 2)]
    soundfile.write(folder / f"{name}.wav", np.stack(channels, 1), 16000)
    (folder / f"{name}.json").write_text(json.dumps({"alignments": words}) if text is None else text)
    with (folder / "list.jsonl").open("a") as file:
        file.write(json.dumps({"path": f"{name}.wav", "duration": seconds}) + "\n")
    return folder / "list.jsonl"


@pytest.fixture
def config(tmp_path, monkeypatch):
    return replace(fake_data(tmp_path, monkeypatch), sources=(str(stereo(tmp_path / "talks")),), held_out=0.0)


def test_a_dialogue_becomes_rows_of_both_sides(config):
    index = prepare(config, TABLE)
    example = build_example(index, 0, TABLE)
    assert example.text.tolist() == interleave([(list(b"ab"), 0.3), (list(b"cde"), 0.62), (list(b"fghijk"), 2.0)], 100, 25).tolist()
    assert example.codes.shape == example.user.shape == (2, 100) and set(example.weights.tolist()) == {0.5, 1.0}
    batch = next(iter(Loader(config, TABLE)))
    assert batch.tokens[0, :, :101].equal(lay_out(example, TABLE)[0])


def test_chunks_together_are_the_whole(config):
    """No word is lost at a border; later chunks begin with what was before, and every target stands in one of them."""
    whole_index = prepare(config, TABLE)
    whole, index = build_example(whole_index, 0, TABLE), prepare(replace(config, chunk_seconds=1.5, variants=2), TABLE)
    parts = [build_example(index, n, TABLE) for n in range(len(index.entries))]
    assert [e.chunk for e in index.entries] == [[0, 3], [1, 3], [2, 3]] and {e.split for e in index.entries} == {"train"}
    assert [p.before for p in parts] == [0, 2, 2] and [p.name for p in parts] == ["d@1of3", "d@2of3", "d@3of3"]
    for name in ("text", "weights", "codes", "user"):
        assert torch.cat([getattr(p, name)[..., p.before :] for p in parts], -1).equal(getattr(whole, name)), name
    tokens, weights = lay_out(whole, TABLE)
    at = 0
    for part in parts:
        grid, counts = lay_out(part, TABLE)
        span = slice(at, at + grid.shape[1])
        assert grid.equal(tokens[:, span]) and counts[:, 1:].equal(weights[:, span][:, 1:]) and not counts[:, 0].any()
        at = span.stop - 1                                              # the last column of a chunk is the next one's first
    assert at == 100
    late = build_example(index, 1, TABLE, random.Random(3))            # a variant of another speed
    assert late.text.shape[0] == late.codes.shape[1] and late.text.max() > 3


def test_both_speakers_take_the_part_of_the_agent(config):
    index = prepare(replace(config, both_speakers=True), TABLE)
    one, other = (build_example(index, n, TABLE) for n in (0, 1))
    assert [e.id for e in index.entries] == ["d", "d~"] and other.codes.equal(one.user) and other.user.equal(one.codes)
    assert [t for t in other.text.tolist() if t > 3] == list(b"u")


def test_options_of_the_text_row_make_another_index(config, tmp_path):
    fast = [["abcdefgh", [0.3, 0.4], MAIN], ["i", [0.5, 0.6], MAIN]]
    config = replace(config, sources=(str(stereo(tmp_path / "fast", words=fast)),))
    rows = [build_example(prepare(replace(config, interleaver=name), TABLE), 0, TABLE).text for name in INTERLEAVERS]
    assert [[t for t in row.tolist() if t > 3] for row in rows] == [list(b"abcdefghi"), list(b"abcdei")]
    silent = replace(config, sources=(str(stereo(tmp_path / "silent", words=[])),))
    assert build_example(prepare(silent, TABLE), 0, TABLE).text.tolist() == [PAD] * 100


def test_lists_and_folders_are_recognised(tmp_path):
    stereo(tmp_path / "data/data_stereo")
    (tmp_path / "data/data_stereo/list.jsonl").unlink()
    assert (m := read_manifest(tmp_path / "data")).kind == "wav + json" and [r["id"] for r in m.rows] == ["data_stereo/d"]
    (tmp_path / "data/dailytalk.jsonl").write_text(json.dumps({"path": "data_stereo/d.wav", "duration": 4.0}) + "\n")
    assert (m := read_manifest(tmp_path / "data")).kind == "stereo dialogues" and m.rows[0]["text"] == "ab cde fghijk"


# ---- bad recordings ----

BAD = {     # name: (arguments of `stereo`, what check says, is the row left out?)
    "malformed json": ({"text": '{"alignments": ['}, ("malformed alignments", "d.json"), True),
    "no list": ({"text": '{"words": []}'}, ("malformed alignments", '"alignments"'), True),
    "short wav": ({"words": [["late", [7.0, 7.5], MAIN]]},
                  ("alignments do not fit", "it lasts 4.00 s, the last word ends at 7.50 s"), True),
    "mono": ({"channels": [voice(4, SIDES[MAIN], 1)]}, ("not stereo", "1 channel(s)", "left and right"), True),
    "six channels": ({"channels": [voice(4, SIDES[MAIN], n) for n in range(6)]}, ("not stereo", "6 channel(s)"), True),
    "mono copied": ({"channels": [voice(4, SIDES[MAIN], 1)] * 2}, ("both channels are the same", "separate the speakers"), True),
    "swapped": ({"channels": [voice(4, SIDES[OTHER], 1), voice(4, SIDES[MAIN], 2)]}, ("swapped channels", "left must be"), True),
    "silent agent": ({"channels": [np.zeros(64000), voice(4, SIDES[MAIN], 1)]}, ("silent channel", "left"), True),
    "silent user": ({"channels": [voice(4, SIDES[MAIN], 1), np.zeros(64000)]}, ("warning: d: silent channel", "monologue"), False),
    "crosstalk": ({"channels": [voice(4, SIDES[MAIN], 1), voice(4, SIDES[OTHER], 2) + 0.3 * np.roll(voice(4, SIDES[MAIN], 1), 16)]},
                  ("warning: d: crosstalk", "one microphone"), False),
    "unsorted": ({"words": WORDS[::-1]}, ("warning: d: alignments corrected", "3 words out of order"), False),
    "overlapping": ({"words": [["a", [0.3, 0.9], MAIN], ["b", [0.5, 0.8], MAIN]]}, ("1 words overlapping",), False),
    "clean": ({}, ("kept 2 rows, 0 of them with a warning", "left out 0 rows",), False)}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recording_is_one_clear_line(name, tmp_path):
    given, words, left_out = BAD[name]
    stereo(tmp_path / "x", "good", channels=[voice(4, SIDES[MAIN], 8), voice(4, SIDES[OTHER], 9)])
    path = stereo(tmp_path / "x", **given)
    rc, out, err = call("data.py", "check", path, "--doubtful=drop")
    assert rc == 0 and not err and all(word in out for word in words), out
    assert (("kept 1 rows" in out and "left out 1 rows" in out) if left_out else "kept 2 rows" in out), out
    if name == "clean":
        assert "warning:" not in out


@pytest.mark.parametrize("name", ["malformed json", "short wav", "mono", "six channels"])
def test_prepare_leaves_a_bad_recording_out_by_name(name, config, tmp_path, capsys):
    stereo(tmp_path / "x", "good")
    prepare(replace(config, sources=(str(stereo(tmp_path / "x", **BAD[name][0])),)), TABLE)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert len(told) == 1 and (" d: " in told[0] or "line 2" in told[0]), told


def test_the_bundled_dialogues_are_made_once(tmp_path):
    path = demo_dialogues(tmp_path / "d", 3)
    before = (tmp_path / "d/000.wav").stat().st_mtime_ns
    assert demo_dialogues(tmp_path / "d", 3) == path and (tmp_path / "d/000.wav").stat().st_mtime_ns == before
    rc, out, err = call("data.py", "check", path)
    assert rc == 0 and "kept 3 rows, 0 of them with a warning" in out and "left out 0 rows" in out, out
    assert load_tokenizer(tmp_path / "d/words.json").encode("a")[0] > PAD
