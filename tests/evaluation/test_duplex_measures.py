"""Measures of full-duplex conversations: those of Full-Duplex-Bench's own scripts on bundled recordings, others by hand."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, call
from make_evaluation_scores import HUMAN, RATE, SAMPLES, placed, samples
from test_minimal_pairs import tiny

from audio.pitch import loudness, pitch
from audio.voice_activity import missing, voice_activity
from audio.wav import save_wav
from checkpoint import Extras, save
from evaluation.duplex_measures import (
    backchannels,
    divergence,
    measure,
    measure_sample,
    merged,
    overlaps,
    read_words,
    response_gaps,
    split_time,
    turn_over,
    turn_taken,
    words_a_minute,
    write_words,
)
from options import read_json

GOLDEN = read_json(ROOT / "tests/golden/duplex_scores.json")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples(tmp_path_factory.mktemp("bench"))


def recorded(bench: Path, task: str, name: str) -> dict:
    """Measure a sample with the spans that silero found, call by call."""
    spans = iter(GOLDEN[task][name]["spans"] if task == "overlap" else [GOLDEN[task]["spans"][name]])
    return measure_sample(bench / task / name, lambda *_: [tuple(span) for span in next(spans)], HUMAN)


def detected(bench: Path, task: str, name: str) -> dict:
    """Measure a sample with our own use of silero."""
    if why := missing():
        pytest.skip(why)
    return measure_sample(bench / task / name, voice_activity, HUMAN)


BOTH = pytest.mark.parametrize("measured", [recorded, detected])


def average(rows: dict[str, dict], name: str) -> float:
    known = [row[name] for row in rows.values() if name in row]
    return sum(known) / len(known)


# ---- against the published scripts ----

@pytest.mark.parametrize("task", ["pause_handling", "smooth_turn_taking", "user_interruption"])
def test_turns_and_latencies_are_those_of_the_scripts(bench: Path, task: str) -> None:
    rows = {name: measure_sample(bench / task / name, None) for name in SAMPLES[task]}
    assert average(rows, "tor") == pytest.approx(GOLDEN[task]["average_take_turn"], abs=1e-12)
    if "average_latency" in GOLDEN[task]:
        assert average(rows, "latency") == pytest.approx(GOLDEN[task]["average_latency"], abs=1e-9)


@BOTH
def test_backchannels_are_those_of_the_script(bench: Path, measured: Callable) -> None:
    rows = {name: measured(bench, "backchannel", name) for name in SAMPLES["backchannel"]}
    for ours, theirs in (("tor", "tor"), ("frequency", "frequency"), ("divergence", "jsd")):
        assert average(rows, ours) == pytest.approx(GOLDEN["backchannel"][theirs], abs=6e-5)          # they print four decimals


@BOTH
@pytest.mark.parametrize("name", SAMPLES["overlap"])
def test_overlaps_and_what_is_around_them_are_those_of_the_scripts(bench: Path, name: str, measured: Callable) -> None:
    """Times and words are counted alike; pitch and intensity are ours, theirs are Praat's own."""
    row, wanted = measured(bench, "overlap", name), GOLDEN["overlap"][name]
    found = read_json(bench / "overlap" / name / "latency_intervals.json")
    assert found == {key: wanted[key] for key in ("latency_stop_list", "latency_resp_list")} and found["latency_stop_list"]
    for ours, theirs in (("stop_latency", "latency_stop_list"), ("response_latency", "latency_resp_list")):
        assert row[ours] == pytest.approx(sum(end - start for start, end in wanted[theirs]) / len(wanted[theirs]))
    for side in ("pre", "post"):
        theirs = wanted[side]
        assert row[f"{side}_wpm"] == pytest.approx(theirs["wpm"], abs=1e-6)
        assert row[f"{side}_mean_pitch"] == pytest.approx(theirs["mean_pitch"], rel=0.01)
        assert row[f"{side}_std_pitch"] == pytest.approx(theirs["std_pitch"], rel=0.05)
        assert row[f"{side}_mean_intensity"] == pytest.approx(theirs["mean_intensity"], abs=0.1)
        assert row[f"{side}_std_intensity"] == pytest.approx(theirs["std_intensity"], abs=0.2)


# ---- counted by hand ----

def test_a_turn_is_a_second_or_more_than_three_words() -> None:
    assert not turn_taken([]) and not turn_taken([("a", 0.0, 0.3), ("b", 0.4, 0.5), ("c", 0.6, 0.99)])
    assert turn_taken([("a", 0.0, 0.3), ("b", 0.4, 1.0)]) and turn_taken([(w, 0.1 * n, 0.1 * n + 0.1) for n, w in enumerate("abcd")])
    assert not turn_taken([("a", 0.0, 0.3), ("b", 0.9, None)]) and turn_taken([("a", 0.0, 0.3), ("b", 1.1, None)])


def test_spans_by_hand() -> None:
    assert merged([(2.4, 3), (0, 1), (1.5, 1.8)], 0.5) == [(0, 1.8), (2.4, 3)]
    assert overlaps([(0, 2), (3, 5)], [(1, 4), (4.5, 6)]) == [(1, 2), (3, 4), (4.5, 5)]
    assert response_gaps([(0, 2), (3, 5)], [(1, 4), (5.5, 6)]) == [(5, 5.5)] and response_gaps([(0, 2)], [(0, 1)]) == []
    words = [("a", 1.0, 2.0), ("b", 2.5, 3.0)]
    assert [split_time(words, end) for end in (0.5, 1.5, 2.2, 2.7, 9.0)] == [1.0, 1.0, 2.5, 2.5, 3.0] and split_time([], 4.0) == 4.0
    assert words_a_minute(words) == 60.0 and words_a_minute([]) == 0.0
    early = turn_over([(0, 2), (4, 6)], [("a", 1.5, 3.0), ("b", 3.5, 9.0)])         # it comes in before the end; it talks on regardless
    assert early == {"turns_taken": 1.0, "turns_offered": 2.0, "tor": 0.5, "latency": 0.0}
    found = turn_over([(0, 2), (4, 6), (9, 10)], [("a", 2.5, 3.8), ("b", 6.2, 6.4), ("c", 11.0, 12.5)])       # a reply, a yes, a reply
    assert found == {"turns_taken": 2.0, "turns_offered": 3.0, "tor": pytest.approx(2 / 3), "latency": pytest.approx(0.75)}


def test_the_distance_of_backchannels_is_between_0_and_the_root_of_log_2() -> None:
    assert divergence([(0.0, 3.0)], 3.0, [1.0] * 16) == pytest.approx(0.0, abs=1e-6)
    apart = divergence([(0.0, 0.1)], 3.0, [0.0] * 8 + [1.0] * 8)
    assert apart == pytest.approx(math.sqrt(math.log(2)), abs=1e-4)
    assert backchannels([], [], 10.0, HUMAN) == {"tor": 0.0, "frequency": 0.0, "divergence": 1.0}
    assert "divergence" not in backchannels([(1.0, 1.5)], [("yes", 1.0, 1.4)], 10.0)                     # nobody to compare with


def test_pitch_and_loudness_of_known_tones() -> None:
    time = torch.arange(RATE) / RATE
    for hertz in (80.0, 120.0, 310.0):
        tone = sum(0.2 / k * torch.sin(2 * math.pi * hertz * k * time) for k in range(1, 6))[None]
        found = pitch(tone, RATE)
        assert (found > 0).float().mean() > 0.95 and float(found[found > 0].median()) == pytest.approx(hertz, rel=2e-3)
    assert not (pitch(0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0)), RATE) > 0).float().mean() > 0.1
    assert not pitch(torch.zeros(1, RATE), RATE).any() and len(pitch(torch.zeros(1, 100), RATE)) == 0
    level = loudness(0.1 * torch.sin(2 * math.pi * 500 * time)[None], RATE)
    assert float(level.median()) == pytest.approx(10 * math.log10(0.005 / 4e-10), abs=0.05)             # mean square of a sine of 0.1


def test_without_an_overlap_the_whole_answer_counts(bench: Path, tmp_path: Path) -> None:
    shutil.copytree(bench / "overlap/1", tmp_path / "1")
    for kind in ("wav", "json"):
        shutil.copy(bench / f"overlap/2/output.{kind}", tmp_path / f"1/clean_output.{kind}")
    found = measure_sample(tmp_path / "1", lambda wav, *_: [(0.0, wav.shape[-1] / RATE)])
    clean = words_a_minute(read_words(bench / "overlap/2/output.json"))
    assert found["clean_wpm"] == pytest.approx(clean) and found["clean_mean_pitch"] > 100


def test_a_conversation_with_its_words_is_measured(tmp_path: Path) -> None:
    user, _ = placed([("slt/vm-undelete", 0.3)], 8.0)
    agent, words = placed([("transfer", 3.0)], 8.0)
    wav = torch.cat([agent, user])
    found, bare = measure(wav, RATE, words=words), measure(wav, RATE)
    assert found["tor"] == bare["tor"] == 1.0 and found["overlaps"] == 0 and "stop_latency" not in found
    assert found["latency"] == pytest.approx(bare["latency"], abs=0.2) and 100 < found["mean_pitch"] < 300
    assert found["words_a_minute"] == pytest.approx(words_a_minute(words), rel=0.15) and "words_a_minute" not in bare
    assert measure(torch.cat([torch.zeros_like(agent), user]), RATE)["tor"] == 0.0


def test_transcripts_are_read_as_they_are_written(tmp_path: Path) -> None:
    write_words(tmp_path / "output.json", [("yes", 0.5, 0.7), ("so", 1.0, None)])
    assert read_words(tmp_path / "output.json") == [("yes", 0.5, 0.7), ("so", 1.0, None)]
    assert json.loads((tmp_path / "output.json").read_text())["text"] == "yes so"
    (tmp_path / "output.json").write_text('{"chunks": [{"text": "a"}]}')
    with pytest.raises(ValueError, match="is no transcript"):
        read_words(tmp_path / "output.json")


# ---- the command ----

def test_a_model_answers_a_folder_and_stereo_conversations_become_one(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps(["<s>", "</s>", "<pad>", "four", "nine"]))
    save(tiny(), tmp_path / "run", Extras(data={"codec": "tiny", "tokenizer": str(tmp_path / "words.json"), "normaliser": "english-v1"}))
    for task, name in (("pause_handling", "1"), ("smooth_turn_taking", "1"), ("user_interruption", "2")):
        shutil.copytree(bench / task / name, tmp_path / "bench" / task / name)
        if task == "smooth_turn_taking":
            for file in ("output.wav", "output.json"):
                (tmp_path / "bench" / task / name / file).unlink()
    rc, out, err = call("evaluate.py", "duplex", tmp_path / "bench", f"--ckpt={tmp_path}/run", "--words=text", "--rounds=10")
    assert rc == 0, out + err
    found = read_json(tmp_path / "bench/full_duplex.json")
    assert {task: row["samples"] for task, row in found["tasks"].items()} == dict.fromkeys(
        ("pause_handling", "smooth_turn_taking", "user_interruption"), 1)
    assert found["tasks"]["pause_handling"]["tor"][0] == 0.0 and found["tasks"]["user_interruption"]["tor"][0] == 0.0
    answer = tmp_path / "bench/smooth_turn_taking/1"
    info = soundfile.info(answer / "output.wav")
    assert (info.samplerate, info.channels) == (RATE, 1) and abs(info.duration - 7.0) < 0.1 and (answer / "output.json").is_file()
    user, _ = placed([("slt/vm-undelete", 0.3)], 8.0)
    agent, words = placed([("transfer", 3.0)], 8.0)
    (tmp_path / "talks").mkdir()
    save_wav(tmp_path / "talks/a.wav", torch.cat([agent, user]), RATE)
    (tmp_path / "talks/a.json").write_text(json.dumps({"alignments": [[w, [s, e], "SPEAKER_MAIN"] for w, s, e in words]}))
    rc, out, err = call("evaluate.py", "duplex", tmp_path / "talks", "--rounds=10")
    assert rc == 0 and "smooth_turn_taking: samples 1, tor 1.000, latency 0." in out, out + err
    assert read_words(tmp_path / "talks/full_duplex_bench/a/output.json") == words
    for options, said in (((tmp_path / "nowhere",), "does not exist"), ((tmp_path / "run",), "holds no SAMPLE/input.wav"),
                          ((tmp_path / "bench", "--words=text"), "add --ckpt"), ((tmp_path / "bench", "--words=x"), "neither recogniser")):
        rc, _, err = call("evaluate.py", "duplex", *options)
        assert rc == 2 and said in err and err.count("\n") == 1, err
