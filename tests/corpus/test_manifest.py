"""Manifests: each layout is recognised and converted, each bad row is named with its reason and fix."""

import json
import os

import numpy as np
import pytest
import soundfile
import torch

from corpus.checks import check_source, faults, judge, quality_faults, read_clip, warning_lines
from corpus.layouts import read_manifest
from corpus.manifest import compose, hash_fraction

RATE = 16000


def tone(seconds=1.0, rate=RATE, level=0.3, seed=0):
    """Speech-like: noise bursts over a quiet floor, different for each seed."""
    draw = np.random.default_rng(seed)
    n = round(seconds * rate)
    wav = draw.standard_normal(n) * level * 0.3
    wav[(np.arange(n) * 8 // rate) % 2 == 1] *= 1e-2
    return wav.clip(-1, 1).astype(np.float32)


def write(path, wav=None, rate=RATE, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone() if wav is None else wav, rate, **how)


def write_lines(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def reasons(m):
    return [b.reason for b in m.bad]


def test_manifest_rows_get_ids_and_files(tmp_path):
    write(tmp_path / "a.wav")
    path = write_lines(tmp_path / "manifest.jsonl", [{"audio": "a.wav", "text": "one"}, {"id": "t", "text": "text only"}])
    m = read_manifest(tmp_path)
    assert (m.kind, m.path, [r["id"] for r in m.rows]) == ("manifest", path, ["a", "t"])
    assert [r["file"] for r in m.rows] == [str(tmp_path / "a.wav"), ""]


def test_wav_and_txt_folder(tmp_path):
    write(tmp_path / "amal/a.wav")
    write(tmp_path / "amal/b.wav")
    (tmp_path / "amal/a.txt").write_text("hello there\n")
    m = read_manifest(tmp_path)
    assert m.kind == "wav + txt" and reasons(m) == ["no transcript"]
    assert [(r["id"], r["speaker"], r["text"]) for r in m.rows] == [("amal/a", "amal", "hello there")]


def test_ljspeech(tmp_path):
    (tmp_path / "metadata.csv").write_text('L-1|Dr. "X" said|Doctor X said\nL-2|two|\n')
    m = read_manifest(tmp_path)
    assert [(r["id"], r["audio"], r["text"]) for r in m.rows] == [("L-1", "wavs/L-1.wav", "Doctor X said"), ("L-2", "wavs/L-2.wav", "two")]


@pytest.mark.parametrize("name, lines", [
    ("metadata.csv", ["file_name,transcription,speaker_id", 'a.wav,"hi, you",s1']),
    ("metadata.tsv", ["client_id\tpath\tsentence", "s1\ta.wav\thi, you"]),
    ("metadata.jsonl", [{"file_name": "a.wav", "sentence": "hi, you", "source": "s1"}]),
])
def test_tables_with_a_header(tmp_path, name, lines):
    m = read_manifest(write_lines(tmp_path / name, lines))
    assert [(r["audio"], r["text"], r["speaker"]) for r in m.rows] == [("a.wav", "hi, you", "s1")]
    assert m.kind == "metadata" and "-> speaker" in m.notes[0]


CHATML = {"messages": [
    {"role": "system", "content": "Generate audio."},
    {"role": "user", "content": "the reference"},
    {"role": "assistant", "content": {"type": "audio", "audio_url": "ref.wav"}},
    {"role": "user", "content": [{"type": "text", "text": "say"}, {"type": "text", "text": "this"}]},
    {"role": "assistant", "content": [{"type": "audio", "audio_url": "a.wav", "offset": 0.5, "duration": 0.25}]}], "speaker": "s"}


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_higgs_chatml(tmp_path, name):
    write(tmp_path / "a.wav")
    path = tmp_path / name
    path.write_text(json.dumps([CHATML]) if name == "x.json" else json.dumps(CHATML))
    row, = read_manifest(path).rows
    assert (row["audio"], row["text"], row["speaker"], row["id"]) == ("a.wav", "say this", "s", "a@0.5")
    assert (row["reference"]["audio"], row["reference"]["text"]) == ("ref.wav", "the reference")
    assert row["messages"] == CHATML["messages"] and read_clip(row)[0].shape == (1, RATE // 4)


def test_chatml_problems_are_named(tmp_path):
    inline = {"role": "assistant", "content": {"type": "audio", "raw_audio": "UklG"}}
    m = read_manifest(write_lines(tmp_path / "x.jsonl", [
        {"messages": [{"role": "user", "content": "hi"}]}, {"messages": [{"content": 3}]},
        {"messages": [{"role": "user", "content": "hi"}, inline]}]))
    assert reasons(m) == ["no assistant turn", "malformed messages", "inline audio"] and not m.rows


def test_moshi_stereo(tmp_path):
    write(tmp_path / "d/a.wav", np.stack([tone(), tone(seed=1)], 1))
    times = [["hello", [0.1, 0.3], "SPEAKER_MAIN"], ["yes", [0.2, 0.3], "SPEAKER_1"], [" you ", [0.4, 0.5], "SPEAKER_MAIN"]]
    (tmp_path / "d/a.json").write_text(json.dumps({"alignments": times}))
    m = read_manifest(write_lines(tmp_path / "x.jsonl", [{"path": "d/a.wav", "duration": 1.0}, {"path": "d/b.wav", "duration": 1.0}]))
    row, = m.rows
    assert (row["text"], row["words"], row["stereo"]) == ("hello you", [["hello", 0.1], ["you", 0.4]], True)
    assert read_clip(row)[0].shape == (2, RATE) and reasons(m) == ["no alignment file"]


def test_unknown_layout_and_missing_source_say_so(tmp_path):
    with pytest.raises(ValueError, match="no known layout"):
        read_manifest(write_lines(tmp_path / "x.jsonl", [{"foo": 1}]))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_manifest(tmp_path / "nothing.jsonl")


def test_rows_that_cannot_be_read_are_named_with_their_line(tmp_path):
    path = tmp_path / "manifest.jsonl"
    good = {"id": "g", "audio": "a.wav", "text": "one"}
    lines = [json.dumps(good), "{broken", "[1]", json.dumps(good), json.dumps({"audio": "a.wav", "text": " "}),
             json.dumps({"audio": "a.wav", "text": "x", "words": [["x"]]}), json.dumps({"audio": "a.wav", "text": "x", "offset": "1"})]
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    m = read_manifest(path)
    assert [r["id"] for r in m.rows] == ["g"]
    assert reasons(m) == [*["malformed json"] * 2, "duplicate id", "empty text", *["malformed field"] * 2, "bad encoding"]
    assert m.bad[0].where == "line 2" and m.bad[-1].where.endswith("line 8") and all(b.fix for b in m.bad)


@pytest.mark.parametrize("row", [{"reference": 3}, {"reference": {"audio": "b.wav"}}, {"words": [["x", float("nan")]]},
                                 {"words": [["x", float("inf")]]}, {"words": "x"}, {"duration": -1}, {"audio": ".", "text": 7}])
def test_hostile_rows_are_rejected_not_fatal(tmp_path, row):
    m = read_manifest(write_lines(tmp_path / "manifest.jsonl", [{"audio": "a.wav", "text": "x"} | row]))
    assert not m.rows and len(m.bad) == 1


def test_paths_stay_inside_the_folder_unless_allowed(tmp_path):
    write(tmp_path / "out.wav")
    home = tmp_path / "home"
    home.mkdir()
    os.symlink(tmp_path / "out.wav", home / "link.wav")
    rows = [{"audio": name, "text": "x"} for name in ("../out.wav", str(tmp_path / "out.wav"), "link.wav")]
    path = write_lines(home / "manifest.jsonl", rows + [{"manifest": "../x.jsonl", "parts": ["a"]}])
    m = read_manifest(path)
    assert not m.rows and all("outside" in r for r in reasons(m)) and len(m.bad) == 4
    rows = [dict(row, id=str(i)) for i, row in enumerate(rows)]
    assert len(read_manifest(write_lines(path, rows), allow_outside=True).rows) == 3


# ---- virtual rows ----

def digits(tmp_path, rows):
    write(tmp_path / "a.wav")
    clips = [{"id": w, "audio": "a.wav", "text": w, "group": "digits", "speaker": s}
             for w, s in zip("one two six ten".split(), "aabb", strict=True)]
    write_lines(tmp_path / "manifest.jsonl", clips)
    return read_manifest(write_lines(tmp_path / "more.jsonl", [{"manifest": "manifest.jsonl"} | row for row in rows]))


def test_parts_join_clips_of_another_manifest(tmp_path):
    m = digits(tmp_path, [{"id": "12", "parts": ["one", "two"]}, {"id": "x", "parts": ["seven"]}, {"id": "12", "parts": ["one"]}])
    assert [(r["id"], r["text"], r["speaker"]) for r in m.rows] == [("12", "one two", "a")]
    assert list(m.clips) == ["one", "two", "12"] and len(m.bad) == 2 and "seven" in m.bad[0].fix


def test_compose_is_deterministic_and_keeps_strings_on_one_side(tmp_path):
    rule = {"compose": {"group": "digits", "count": [1, 4], "rows": 500, "seed": 3, "held_out": 0.2}}
    rows = digits(tmp_path, [rule]).rows
    assert rows == digits(tmp_path, [rule]).rows and len({r["id"] for r in rows}) == 500
    held, train = ({r["text"] for r in rows if r["split"] == side} for side in ("held-out", "train"))
    assert not held & train and 0.05 < sum(r["split"] == "held-out" for r in rows) / 500 < 0.4
    assert all(r["split"] == "train" for r in rows if len(r["parts"]) == 1)
    assert {r["speaker"] for r in rows} == {"a", "b"}
    assert not any(set(r["parts"]) & {"one", "two"} and set(r["parts"]) & {"six", "ten"} for r in rows)


def test_compose_without_its_group_is_rejected(tmp_path):
    m = digits(tmp_path, [{"compose": {"group": "none", "count": [1, 2], "rows": 3}}, {"compose": {"group": "digits"}},
                          {"compose": {"group": "digits", "count": [2, 1], "rows": 1}}])
    assert reasons(m) == ["malformed compose"] * 3


def test_fraction_is_uniform_and_fixed():
    values = [hash_fraction("x", i) for i in range(2000)]
    assert abs(np.mean(values) - 0.5) < 0.03 and hash_fraction("four two") == hash_fraction("four two") < 1


def test_compose_never_uses_held_out_clips():
    clips = {n: {"id": n, "text": n, "file": "x", "speaker": "", "group": "g", "split": s} for n, s in (("a", "train"), ("b", "held-out"))}
    assert {p for r in compose({"group": "g", "count": [1, 3], "rows": 50}, clips) for p in r["parts"]} == {"a"}


# ---- audio ----

def kinds(wav, rate=RATE, text="a few words", limits=(0.2, 30.0)):
    return [reason for _, reason, _ in faults(torch.as_tensor(wav)[None], rate, text, limits)]


def test_a_good_clip_has_no_fault():
    assert kinds(tone()) == []


@pytest.mark.parametrize("wav, rate, text, reason", [
    (np.zeros(0, np.float32), RATE, "words", "empty audio"),
    (np.full(RATE, np.nan, np.float32), RATE, "words", "NaN samples"),
    (tone(rate=6000), 6000, "words", "sample rate below 8 kHz"),
    (tone(rate=8000), 8000, "words", "sample rate below 16 kHz"),
    (tone(0.1), RATE, "oh", "duration outside 0.2..30 s"),
    (tone(31), RATE, "word " * 40, "duration outside 0.2..30 s"),
    ((tone() * 50).clip(-1, 1), RATE, "words", "clipping"),
    (tone(level=1e-4), RATE, "words", "silence"),
    (np.concatenate([tone(0.5), np.zeros(RATE, np.float32)]), RATE, "words", "silence"),
    (np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32) * 0.1, RATE, "words", "low SNR"),
    (tone(), RATE, "word " * 10, "text does not fit the length"),
    (tone(4), RATE, "a", "text does not fit the length"),
])
def test_each_audio_fault_is_found(wav, rate, text, reason):
    assert reason in kinds(wav, rate, text)


def test_one_spoken_letter_is_not_an_outlier():
    assert list(quality_faults(torch.as_tensor(tone(0.6))[None], RATE, 1 / 0.6)) == []


def test_check_prints_reasons_and_writes_lists(tmp_path, capsys):
    write(tmp_path / "good.wav")
    write(tmp_path / "copy.wav")
    write(tmp_path / "quiet.wav", tone(level=1e-4, seed=5))
    write(tmp_path / "empty.wav", np.zeros(0))
    write(tmp_path / "nan.wav", np.full(RATE, np.nan, np.float32), subtype="FLOAT")
    (tmp_path / "broken.wav").write_bytes(b"RIFF but not really")
    names = "good copy quiet empty nan broken missing".split()
    rows = [{"id": n, "audio": f"{n}.wav", "text": "some words"} for n in names]
    path = write_lines(tmp_path / "manifest.jsonl", rows + [{"id": "v", "parts": ["good", "good"]}, {"id": "w", "parts": ["quiet"]}])
    check_source(str(path), write=str(tmp_path), doubtful="drop")
    out = capsys.readouterr().out
    for word in ("detected: manifest", "duplicate audio", "silence", "empty audio", "NaN samples", "unreadable audio", "missing file",
                 "its part quiet was left out", "kept 2 rows, 0 of them with a warning", "left out 7 rows"):
        assert word in out, word
    again = read_manifest(tmp_path / "manifest.kept.jsonl")
    assert [r["id"] for r in again.rows] == ["good", "v"] and not again.bad
    assert len((tmp_path / "manifest.rejected.jsonl").read_text().splitlines()) == 7


def test_check_keeps_compose_lines_and_fails_when_nothing_is_left(tmp_path, capsys):
    write(tmp_path / "a.wav")
    rule = {"compose": {"group": "g", "count": [1, 2], "rows": 5}}
    path = write_lines(tmp_path / "manifest.jsonl", [{"id": "a", "audio": "a.wav", "text": "word", "group": "g"}, rule])
    check_source(str(path), write=str(tmp_path))
    kept = [json.loads(line) for line in (tmp_path / "manifest.kept.jsonl").read_text().splitlines()]
    assert [row.get("compose") for row in kept] == [None, rule["compose"]]
    with pytest.raises(ValueError, match="no usable row"):
        check_source(str(write_lines(tmp_path / "none.jsonl", [{"audio": "b.wav", "text": "x"}])))


# ---- layouts of other trainers ----

def test_ms_swift_rows_become_conversations(tmp_path):
    for name in ("ref", "out"):
        write(tmp_path / f"{name}.wav")
    rows = [{"messages": [{"role": "user", "content": "the voice"}, {"role": "assistant", "content": "<audio>"},
                          {"role": "user", "content": "say it"}, {"role": "assistant", "content": "well: <audio>"}],
             "audios": ["ref.wav", "out.wav"], "speaker": "amal"},
            *({"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "<audio>"}], "audios": files}
              for files in (["ref.wav", "out.wav"], []))]
    m = read_manifest(write_lines(tmp_path / "swift.jsonl", rows))
    assert (m.kind, [b.where for b in m.bad], set(reasons(m))) == ("conversations", ["line 2", "line 3"], {"wrong placeholder count"})
    [row] = m.rows
    assert (row["audio"], row["reference"]["audio"], row["reference"]["text"]) == ("out.wav", "ref.wav", "the voice")
    assert row["speaker"] == "amal" and row["clips"] == ["#reference", ""]
    assert row["messages"][3]["content"] == ["well: ", {"type": "audio", "audio_url": "out.wav"}]


def test_metadata_json_of_train_higgs_audio(tmp_path):
    for name in ("a", "ref"):
        write(tmp_path / f"{name}.wav")
    (tmp_path / "a.txt").write_text("مرحبا\n", encoding="utf-8")
    samples = [{"audio_file": "a.wav", "transcript_file": "a.txt", "audio_id": "first", "speaker_id": "amal", "scene": "A quiet room.",
                "ref_audio_file": "ref.wav", "ref_transcript": "the voice"},
               {"audio_file": "a.wav", "transcript_file": "gone.txt"}, {"audio_file": "a.wav"}, "nonsense"]
    (tmp_path / "metadata.json").write_text(json.dumps({"dataset_info": {"total_samples": 4}, "samples": samples}))
    m = read_manifest(tmp_path)
    assert m.kind == "cloning samples" and reasons(m) == ["no transcript", "empty text", "malformed json"]
    [row] = m.rows
    assert (row["id"], row["text"], row["speaker"], row["scene"]) == ("first", "مرحبا", "amal", "A quiet room.")
    assert row["reference"]["text"] == "the voice" and row["reference"]["file"] == str(tmp_path / "ref.wav")
    only = read_manifest(write_lines(tmp_path / "lines.jsonl", samples[:1]))
    assert (only.kind, only.rows[0]["text"]) == ("cloning samples", "مرحبا")


def test_moss_ttsd_rows(tmp_path):
    write(tmp_path / "a.wav")
    talk = read_manifest(write_lines(tmp_path / "talk.jsonl", [{"file_path": "a.wav", "full_transcript": "[S1]hello [S2]yes"}]))
    assert talk.kind == "tagged transcripts" and talk.rows[0]["text"] == "[SPEAKER0] hello [SPEAKER1] yes"
    clone = {"reference_audio": "a.wav", "reference_text": "the voice", "audio": "a.wav", "text": "said"}
    clone = read_manifest(write_lines(tmp_path / "clone.jsonl", [clone]))
    assert clone.rows[0]["reference"]["text"] == "the voice" and clone.rows[0]["text"] == "said"


# ---- what is used, but not without a word ----

def test_two_channels_and_telephone_rates_are_told_by_check_prepare_and_cloning(tmp_path, capsys):
    from corpus.data_config import DataConfig
    from corpus.examples import prompt_example
    from text.tokenizers import load_tokenizer
    write(tmp_path / "two.wav", np.stack([tone(), tone(seed=1)], 1))
    write(tmp_path / "phone.wav", tone(rate=8000, seed=2), 8000)
    rows = [{"audio": name, "text": "hello there friend"} for name in ("two.wav", "phone.wav")]
    check_source(str(write_lines(tmp_path / "m.jsonl", rows)))
    out = capsys.readouterr().out
    assert "warning: two: stereo; both channels are mixed to mono" in out and "kept 2 rows" in out
    assert out.count("phone: sample rate below 16 kHz") == 1 and "2 of them with a warning: 1 stereo, 1 sample rate" in out
    many = [{"id": str(n), "audio": "two.wav", "text": "hello there friend"} for n in range(6)]
    m = read_manifest(write_lines(tmp_path / "many.jsonl", many))
    judge(m, (0.2, 30.0))
    assert list(warning_lines(m))[0].startswith("warning: 0, 1, 2 and 3 more: stereo; both channels")

    class Codec:
        sample_rate = 16000

        def encode(self, wav):
            return torch.zeros(1, 2, 5, dtype=torch.long)

    prompt_example("x", DataConfig(), load_tokenizer("bytes"), Codec(), [(str(tmp_path / "two.wav"), "hello there friend")])
    assert "two.wav: stereo; both channels are mixed to mono" in capsys.readouterr().err
