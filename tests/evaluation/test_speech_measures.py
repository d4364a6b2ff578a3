"""Speech measures against the published scripts and cases counted by hand; lists as they are; systems compared on one page."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call

from audio import dnsmos, speaker
from audio.wav import load_wav, save_wav
from evaluation.metrics import paired_difference, repetition, seed_tts_cer, seed_tts_wer, truncation, units
from evaluation.speech_measures import expected_seconds, means, measure, read_list, samples
from options import read_json

GOLDEN = read_json(ROOT / "tests/golden/speech_scores.json")
ALLISON = ROOT / "assets/speech/allison"


# ---- numbers ----

@pytest.mark.parametrize("case", GOLDEN["seed_tts_wer"], ids=lambda case: case["text"][:20])
def test_error_rates_are_those_of_the_published_script(case: dict) -> None:
    assert seed_tts_wer(case["text"], case["heard"], case["language"]) == pytest.approx(case["wer"], abs=1e-12)
    assert seed_tts_wer(case["text"], case["heard"]) == pytest.approx(case["wer"], abs=1e-12)          # its letters say the language, too


def test_units_are_words_or_characters() -> None:
    assert units("It's  5 o’clock!") == ["it's", "5", "oclock"] and units("你好，世界 A") == ["你", "好", "世", "界", "A"]
    assert units("สวัสดี") == list("สวัสดี") and units("안녕 하세요") == ["안녕", "하세요"] and units("ab c", "zh-CN") == ["a", "b", "c"]
    assert seed_tts_cer("It's so.", "its so") == pytest.approx(1 / 6) and math.isnan(seed_tts_wer("...", "x"))
    assert seed_tts_wer("one", "one two three") == 2.0                             # not capped


def test_loops_and_missing_ends() -> None:
    text = "a b c d".split()
    assert [truncation(text, said.split()) for said in ("a b c d", "a b x", "a b", "", "b c d", "a x c d")] == [0, 0.25, 0.5, 1, 0, 0]
    assert repetition(text, text) == 0 and repetition(text, "a b a b a b".split()) == pytest.approx(3 / 5)      # a b, a b, b a come again
    assert repetition("go go go".split(), "go go go".split()) == 0 and repetition(text, ["a"]) == 0


def test_a_paired_difference_of_known_values() -> None:
    found = paired_difference([1, 2, 3, math.nan], [2, 3, 4, 5])
    assert found["items"] == 3 and found["difference"] == 1.0 and found["p"] == 2 / 8 and (found["low"], found["high"]) == (1, 1)
    assert paired_difference([0.0] * 4, [1, -1, 1, -1])["p"] == 1.0
    one, other = [0.1 * n for n in range(30)], [0.1 * n + (0.2 if n % 3 else -0.1) for n in range(30)]
    found = paired_difference(one, other, rounds=4000, seed=1)
    # flipped signs have a deviation of sqrt(0.03 / 30): z is 3.16, p 0.0016 by the normal curve; the interval has 0.1414 / sqrt(30)
    assert found["difference"] == pytest.approx(0.1) and found["p"] == pytest.approx(0.0016, abs=0.0012)
    assert found["low"] == pytest.approx(0.1 - 1.96 * 0.1414 / 30**0.5, abs=0.01) and found == paired_difference(one, other, 4000, 1)
    assert paired_difference([], [])["items"] == 0


def test_dnsmos_is_that_of_the_package() -> None:
    if dnsmos.missing():
        pytest.skip(dnsmos.missing())
    for name, wanted in [*GOLDEN["dnsmos"].items()][1:]:
        assert dnsmos.dnsmos(*load_wav(ROOT / name)) == pytest.approx(wanted, abs=2e-3)
    assert dnsmos.dnsmos(torch.zeros(1, 0), 16_000) == {}


# ---- lists and rows ----

def test_lists_are_read_as_they_are(tmp_path: Path) -> None:
    lines = ("a-1|said before|prompts/a.wav|Say this.|wavs/a-1.wav", "b|said|p/b.wav|你好", "c|alone", "d.wav|text|v.wav")
    (tmp_path / "meta.lst").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = read_list(str(tmp_path / "meta.lst"))
    assert [(item["id"], item["text"]) for item in found] == [("a-1", "Say this."), ("b", "你好"), ("c", "alone"), ("d", "text")]
    assert found[0]["reference"] == str(tmp_path / "prompts/a.wav") and found[0]["recording"] == str(tmp_path / "wavs/a-1.wav")
    assert found[0]["reference_text"] == "said before" and "reference" not in found[2] and found[3]["reference"] == str(tmp_path / "v.wav")
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    assert [(item["id"], item["text"]) for item in read_list(str(tmp_path / "x.txt"))] == [("000", "one"), ("001", "two")]
    for wrong, said in (("a|b|c|d|e|f\n", "line 1"), ("a|x\na|y\n", "stands there twice"), ("../a|x\n", "is a path"), ("", "no text")):
        (tmp_path / "bad.lst").write_text(wrong)
        with pytest.raises(ValueError, match=said):
            read_list(str(tmp_path / "bad.lst"))


def tone(path: Path, seconds: float, rate: int = 16_000) -> Path:
    save_wav(path, 0.3 * torch.sin(torch.arange(round(seconds * rate)) * 0.3)[None], rate)
    return path


def test_durations_follow_a_recording_of_the_text_or_the_pace_of_the_voice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsmos, "missing", lambda: "DNSMOS needs speechmos")
    voice, recording = tone(tmp_path / "voice.wav", 2.0), tone(tmp_path / "said.wav", 3.0)
    cloned = {"text": "ab cd ef", "reference": str(voice), "reference_text": "abcd!"}                # 4 letters in 2 s, 6 to say
    assert expected_seconds(cloned) == pytest.approx(3.0) and expected_seconds(cloned | {"recording": str(recording)}) == pytest.approx(3.0)
    assert expected_seconds({"text": "x", "expected_seconds": 1.5}) == 1.5 and expected_seconds({"text": "x"}) == 0
    rows = [cloned | {"id": "1", "wav": str(tone(tmp_path / "1.wav", 6.0))}]
    (found,), missing = measure(rows, lambda wavs: ["ab cd"])
    assert found["duration_ratio"] == pytest.approx(2.0) and found["wer"] == pytest.approx(1 / 3) and found["truncated"] == 1.0
    assert found["silence_ratio"] == 0 and ("speaker_similarity" in found) == (not speaker.missing())
    assert "real_time_factor" in missing and missing["dnsmos"] == "DNSMOS needs speechmos"
    assert measure(rows, None)[1]["wer"].startswith("no recogniser")


def test_a_model_that_says_nothing_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsmos, "missing", lambda: "DNSMOS needs speechmos")
    save_wav(tmp_path / "silent.wav", torch.zeros(1, 0), 16_000)
    rows = [{"id": str(n), "text": "one two", "wav": str(wav), "expected_seconds": 1.0}
            for n, wav in enumerate((tmp_path / "silent.wav", tone(tmp_path / "said.wav", 1.0)))]
    (silent, said), _ = measure(rows, lambda wavs: ["one two"] * len(wavs))
    assert (silent["heard"], silent["wer"], silent["truncated"], silent["duration_ratio"], silent["silence_ratio"]) == ("", 1, 1, 0, 1)
    assert (said["wer"], said["duration_ratio"]) == (0, 1)


def test_means_have_intervals_and_leave_out_what_is_not_there() -> None:
    rows = [{"id": str(n), "wer": n / 10, **({"ended": n > 4} if n < 8 else {})} for n in range(10)]
    found = means(rows, rounds=200)
    assert found["wer"][0] == pytest.approx(0.45) and found["wer"][1] < 0.45 < found["wer"][2] and found["ended"][0] == 3 / 8
    assert "dnsmos" not in found


# ---- the command ----

EARS = '''def hear(wavs):
    return ["one two", "nothing"][: len(wavs)]
'''


def test_a_checkpoint_and_recordings_are_compared_on_one_page(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ears_of_speech.py").write_text(EARS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(dnsmos, "missing", lambda: "DNSMOS needs speechmos")            # it takes seconds
    tone(tmp_path / "voice.wav", 1.0)
    (tmp_path / "meta.lst").write_text("a|one two|voice.wav|one two\nb|one|voice.wav|three four\nc|one|voice.wav|xylophone\n")
    (tmp_path / "theirs").mkdir()
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        tone(tmp_path / f"theirs/{name}.wav", seconds)
    rc, out, err = call("evaluate.py", "speech", tiny_run, tmp_path / "theirs", f"--set={tmp_path}/meta.lst", f"--out={tmp_path}/out",
                        "--recogniser=ears_of_speech:hear", "--rounds=50")
    assert rc == 0 and "left out: c: " in err and "1 of 3 texts are left out" in out, out + err
    found = read_json(tmp_path / "out/summary.json")
    assert found["measures"]["run"]["wer"][0] == found["measures"]["theirs"]["wer"][0] == 0.5            # right, and wholly wrong
    assert found["measures"]["run"]["real_time_factor"][0] > 0 and found["measures"]["run"]["first_audio"][0] > 0
    assert "theirs: real time factor" in found["not measured"] and "a voice of its own" in out
    rows = [json.loads(line) for line in (tmp_path / "out/theirs.jsonl").read_text().splitlines()]
    assert [row["duration_ratio"] for row in rows] == [pytest.approx(1 / (6 / 6)), pytest.approx(2 / (9 / 3))]     # letters a second: 6, 3
    assert any(line["measure"] == "wer" and line["difference"] == 0 for line in found["compared"])
    html = (tmp_path / "out/index.html").read_text()
    assert html.count("<article") == 2 and html.count("<audio") == 6 and "Blind A/B" in html and "theirs against run" in html
    assert [row["id"] for row in samples(tmp_path / "out/run/samples.jsonl")] == ["a", "b"]              # what was spoken is measured again
    rc, out, err = call("evaluate.py", "speech", tmp_path / "out/run", f"--out={tmp_path}/again", "--recogniser=none")
    assert rc == 0 and "wer" not in read_json(tmp_path / "again/summary.json")["measures"]["run"], err
    assert "Not measured: run: wer" in (tmp_path / "again/index.html").read_text()


@pytest.mark.parametrize("words, said", [
    ((), "takes a checkpoint or a folder"), (("nowhere",), "has no samples.jsonl"), (("nowhere", "--set=no.lst"), "no.lst does not exist"),
    (("nowhere", "--sett=x"), "nearest is --set")])
def test_wishes_that_cannot_be_met_are_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    rc, _, err = call("evaluate.py", "speech", *words, f"--out={tmp_path}/out")
    assert rc == 2 and said in err and err.count("\n") == 1, err
