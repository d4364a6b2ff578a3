"""Text: normalisers are fixed, tokenizers invert, words begin where they should."""

import json
import random

import pytest

from text.normalisers import normalise
from text.tokenizers import load_tokenizer
from text.word_times import aligned_ids, frame_starts

WORDS = "one two three four five".split()


def write_words(folder):
    (folder / "words.json").write_text(json.dumps(WORDS))
    return str(folder / "words.json")


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
