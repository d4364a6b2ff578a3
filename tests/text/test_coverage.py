"""The tokenizer report: what is known, what falls back to bytes, what is lost, by script and by character."""

import json

import pytest
from conftest import ROOT, call
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from text.coverage import Script, measure_coverage, script
from text.tokenizers import load_tokenizer

TINY = ROOT / "assets" / "tiny_tokenizer.json"


def test_bytes_of_arabic_are_no_characters():
    found = measure_coverage(["سلام hi", "hi 42"], load_tokenizer("bytes"))
    assert list(found.scripts) == ["LATIN", "ARABIC", "OTHER"]
    assert found.scripts["ARABIC"] == Script(words=1, letters=4, tokens=8, bytes=8)
    assert found.scripts["LATIN"] == Script(words=2, letters=4, tokens=4) and found.scripts["OTHER"] == Script(words=1, letters=2, tokens=2)
    assert found.bytes == dict.fromkeys("سلام", 1) and not found.unknown
    shown = "\n".join(found.lines())
    assert "ARABIC" in shown and "8.00" in shown and "as bytes: U+0633 ARABIC LETTER SEEN 1 times" in shown


def test_the_normaliser_of_training_comes_first():
    raw, folded = (measure_coverage(["ســلام ٣"], load_tokenizer("bytes"), n) for n in ("none", "arabic-v1"))
    assert raw.scripts["ARABIC"].letters == 6 and folded.scripts["ARABIC"].letters == 4
    assert "OTHER" in folded.scripts and folded.scripts["OTHER"].bytes == 0


def test_unknown_words_and_pieces_are_counted(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps(["four", "two"]))
    found = measure_coverage(["four five two"], load_tokenizer(tmp_path / "words.json"))
    assert found.scripts["LATIN"] == Script(words=3, letters=11, tokens=3, unknown=1, changed=1)
    pieces = Fast(models.BPE({"a": 0, "b": 1, "ab": 2, "<unk>": 3}, [("a", "b")], unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.save(str(tmp_path / "tokenizer.json"))
    found = measure_coverage(["ab ba é", "é"], load_tokenizer(tmp_path))
    assert found.scripts["LATIN"] == Script(words=4, letters=6, tokens=5, unknown=2, changed=2 + 1)
    assert found.unknown == {"é": 2} and "unknown: U+00E9 LATIN SMALL LETTER E WITH ACUTE 2 times" in found.lines()[-1]


@pytest.mark.parametrize(("word", "wanted"), [("سلام", "ARABIC"), ("abcس", "LATIN"), ("42", "OTHER"), ("你好", "CJK"), ("", "OTHER")])
def test_scripts(word, wanted):
    assert script(word) == wanted


def test_check_prints_the_report():
    rc, out, err = call("data.py", "check", "assets/speech/chat.jsonl", f"--tokenizer={TINY}", "--normaliser=arabic-v1+higgs-v1")
    assert rc == 0, err
    row = next(line.split() for line in out.splitlines() if line.startswith("ARABIC"))
    assert int(row[1]) > 3 and float(row[4]) == pytest.approx(int(row[3]) / int(row[1]), abs=0.01)
    for options, message in ((("--tokenizer=nowhere.json",), "nowhere.json does not exist"), (("--normaliser=x",), "--tokenizer")):
        rc, _, err = call("data.py", "check", "assets/speech/chat.jsonl", *options)
        assert rc == 2 and message in err and err.count("\n") == 1
