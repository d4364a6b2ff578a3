"""What is spoken at an evaluation is measured right: durations, silence, ends, voices; and the speeds of the log."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, call, write_clips
from test_conversation import TINY, WORDS, config, folder, written  # noqa: F401

from audio import load_codec
from audio.wav import save_wav
from config import TrainConfig
from corpus.data_config import DataConfig
from corpus.index import Entry, Index, prepare
from layers.architecture import ModelConfig, StackConfig
from model import MultistreamLM
from sample import Speech
from streams import Example
from text.word_times import MAIN, OTHER
from training import evaluation_samples, monitor
from training.evaluation_samples import Pace, Trial, means, measure, silence, similarity, speak_samples, trials


class Ears:
    """A codec whose HuBERT hears one number a frame in one of two directions."""

    frame_rate, sample_rate = 25, 1000

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes[:, :1].repeat_interleave(40, 2).float()

    def semantic_states(self, wav: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(wav[:, ::40].long(), 2).transpose(1, 2).float()      # (B, W) -> (B, 2, T)


def speech(codes: list[int], ended: bool = True, loud: float = 0.5) -> Speech:
    return Speech(torch.full((1, 40 * len(codes)), loud), ended, len(codes), torch.tensor([codes]))


def test_silence_is_the_share_of_quiet_pieces():
    wav = torch.cat([torch.full((1, 3000), 0.1), torch.full((1, 1000), 1e-3)], 1)                   # -20 and -60 dBFS
    assert silence(wav, 1000) == 0.25 and silence(torch.zeros(1, 0), 1000) == 1.0


def test_the_voice_is_the_mean_state_of_hubert():
    a, b, both = (torch.tensor([codes]) for codes in ([0, 0], [1, 1, 1], [0, 1]))
    assert similarity(a, a, Ears()) == pytest.approx(1) and similarity(a, b, Ears()) == pytest.approx(0)
    assert similarity(a, both, Ears()) == pytest.approx(0.5**0.5)


def test_without_hubert_the_voice_is_the_mean_spectrum():
    codec = load_codec("tiny")
    high, low = (torch.sin(torch.arange(16000) * f)[None, None] * 0.5 for f in (2.0, 0.2))
    noisy = [codec.encode(wav + 0.01 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(0)))[0] for wav in (high, low)]
    assert similarity(noisy[0], noisy[0], codec) == pytest.approx(1)
    assert similarity(noisy[0], noisy[0][:, :12], codec) > 0.9 > 0.5 > similarity(noisy[0], noisy[1], codec)


def test_a_text_is_measured_against_what_it_should_take():
    voiced = Trial("a", "text", Example(torch.zeros(0)), 4.0, torch.tensor([[1, 1]]))
    found = measure(speech([0] * 50 + [1] * 50, ended=False), voiced, Ears())
    half = pytest.approx(0.5**0.5)
    assert found == {"seconds": 4.0, "duration_ratio": 1.0, "ended": 0.0, "silence_ratio": 0.0, "similarity_hubert": half}
    nothing = measure(speech([]), voiced, Ears())
    assert (nothing["duration_ratio"], nothing["silence_ratio"], nothing["similarity_hubert"]) == (0.0, 1.0, 0.0)
    plain = measure(speech([0] * 25, loud=0.0), Trial("b", "text", Example(torch.zeros(0)), 2.0), Ears())
    assert plain == {"seconds": 1.0, "duration_ratio": 0.5, "ended": 1.0, "silence_ratio": 1.0}
    assert means([found, plain]) == {"quality_duration_ratio": 0.75, "quality_ended": 0.5, "quality_silence_ratio": 0.5,
                                     "quality_similarity_hubert": pytest.approx(0.5**0.5)}


@pytest.fixture
def run(folder: Path) -> TrainConfig:  # noqa: F811
    rows = [json.loads(line) | {"split": "held-out"} for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows[3]["speaker"] = ""
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ModelConfig(TINY, StackConfig(dim=16, layers=1, heads=2, ffn=16))
    return TrainConfig(model, config(folder, "held.jsonl", reference=1.0), prompts=("four",), listen=4)


def test_words_take_as_long_as_they_do_in_the_data():
    """A digit of 0.8 s, a sentence at 0.12 s a letter; "two" is half of "two three", by letters three eighths."""
    texts = (("One!", 20, "train"), ("two three", 40, "train"), ("so far", 15, "train"), ("three", 30, ""), ("six", 99, "held-out"))
    entries = [Entry(text, text, split=split, key=text, frames=[frames]) for text, frames, split in texts]
    entries.append(Entry("three", "three", parts=[3]))
    pace = Pace(Index(Path(), {"frame_rate": 25.0}, entries))
    assert pace("one") == pytest.approx(0.8) and pace("One, far") == pytest.approx(0.8 + 0.36)
    assert pace("two three") == pytest.approx(1.6 * 3 / 8 + (1.6 * 5 / 8 + 1.2) / 2)
    assert pace("nine") == pytest.approx(4 * (0.8 + 1.6 + 0.6 + 1.2) / (3 + 8 + 5 + 5)) and pace("?") > 0


def test_held_out_clips_are_said_again_in_the_voice_of_another_clip(run: TrainConfig):
    codec, index = load_codec("tiny"), prepare(run.data, TINY)
    found = trials(run, index, codec)
    frames = [e.frames[0] for e in index.entries]
    assert [t.name for t in found] == ["four", "p0", "p1", "p2", "p3"] and [t.seconds for t in found[1:]] == [n / 25 for n in frames]
    assert found[0].seconds == pytest.approx(4 * sum(frames) / 25 / (4 * len("text0"))) and found[0].voice is None
    assert torch.equal(found[1].voice, index.codes(1, 0)) and torch.equal(found[2].voice, index.codes(0, 0)) and found[4].voice is None
    said = written(found[1].prompt.segments)
    assert "text 1" in said and f"({frames[1]})" in said
    assert said.endswith("text 0<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>")
    assert all(weight == 0 for _, weight in found[1].prompt.segments)


def test_listening_writes_what_it_hears(run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr("training.evaluation_samples.MOST_FRAMES", 40)
    numbers = speak_samples(MultistreamLM(run.model), run, prepare(run.data, TINY), tmp_path / "step")
    rows = [json.loads(line) for line in (tmp_path / "step/samples.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["four", "text 0", "text 1", "text 2", "text 3"]
    assert all((tmp_path / "step" / row["wav"]).stat().st_size == 44 + 2 * round(16000 * row["seconds"]) for row in rows)
    assert numbers["quality_duration_ratio"] == pytest.approx(sum(row["duration_ratio"] for row in rows) / 5)
    assert ["similarity_spectrum" in row for row in rows] == [False, True, True, True, False]
    assert set(numbers) == {f"quality_{n}" for n in ("duration_ratio", "ended", "silence_ratio", "similarity_spectrum")}
    assert evaluation_samples.summary_line(numbers).startswith("samples: duration ratio ")


def test_only_text_to_speech_listens():
    with pytest.raises(AssertionError, match="needs a text-to-speech model"):
        TrainConfig(ModelConfig(replace(TINY, layout="duplex"), StackConfig(dim=16, layers=1, heads=2, ffn=16)), DataConfig(), listen=1)


def test_speeds_of_the_log(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 12.0, 16.0])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(clock))
    meter = monitor.Meter(TINY, 25.0, world=2, step=4)
    tokens = torch.full((1, 9, 7), -1)
    tokens[:, 0, :2], tokens[:, 1:, 2:6], tokens[:, 1, 2], tokens[:, 1, 5] = 1, 5, 256, 257          # 2 of text, 4 of speech, 2 real frames
    meter.add(tokens)
    found = meter.read(5)                                                                           # steps 4 and 5
    memory = found.pop("memory_gib")
    assert found == {"step_seconds": 1.0, "columns_per_second": 6.0, "tokens_per_second": 34.0, "audio_seconds_per_second": 2 * 2 / 25 / 2}
    assert 0.01 < memory < 100
    assert meter.read(6)["columns_per_second"] == 0 and meter.step == 7
    assert monitor.pace(found | {"memory_gib": 1.25}) == "1.00 s a step, 6 columns/s, 34 tokens/s, 0 s of speech a second, 1.2 GiB"


# ---- a recogniser and a speaker encoder ----

HEARD = '''"""Hears the text at the first evaluation, and nothing at all later."""
calls = 0


def hear(wavs):
    global calls
    calls += 1
    return ["one two" if calls == 1 else "zero" for _ in wavs]
'''


def test_the_best_checkpoint_can_be_the_one_that_is_understood(tmp_path, monkeypatch):
    write_clips(tmp_path / "clips")
    (tmp_path / "run.py").write_text(CONFIG)
    (tmp_path / "ears_of_a_test.py").write_text(HEARD)
    scored = "--recogniser=ears_of_a_test:hear", "--prompts=('one two',)", "--eval_every=2", "--steps=4"
    monkeypatch.syspath_prepend(tmp_path)
    rc, out, err = call("train.py", tmp_path / "run.py", *scored, "--best=wer")
    assert rc == 0 and "wer 0.00" in out and "wer 1.00" in out, err
    assert (tmp_path / "run/ckpt/best").resolve().name == "step_000002"
    rows = [json.loads(line) for line in (tmp_path / "run/samples/step_000004/samples.jsonl").read_text().splitlines()]
    assert [(row["heard"], row["wer"]) for row in rows] == [("zero", 1.0)]
    numbers = [row["val/quality_wer"] for row in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
               if "val/quality_wer" in row]
    assert numbers == [0.0, 1.0]


@pytest.mark.parametrize(("options", "words"), [
    (("--recogniser=nobody:hear",), "--recogniser=nobody:hear cannot be used"), (("--best=wer",), "add --recogniser=tiny.en"),
    (("--best=luck",), "none of loss, wer, speaker_similarity")])
def test_scorers_that_cannot_be_used_are_named_before_the_run(tmp_path, options, words):
    write_clips(tmp_path / "clips")
    (tmp_path / "run.py").write_text(CONFIG)
    rc, _, err = call("train.py", tmp_path / "run.py", *options)
    assert rc == 2 and words in err and not (tmp_path / "run/ckpt").exists(), err


def test_without_speaker_weights_the_rest_is_measured_and_that_is_said(run: TrainConfig, monkeypatch):
    monkeypatch.setattr("audio.speaker.find_spec", lambda name: None)
    asked = replace(run, recogniser="json:loads")
    line, = evaluation_samples.check_scorers(asked)
    assert "is not measured" in line and "pip install --no-deps resemblyzer" in line
    with pytest.raises(ValueError, match="resemblyzer"):
        evaluation_samples.check_scorers(replace(asked, best="speaker_similarity"))


def test_the_best_of_each_measure_is_the_lowest_badness():
    numbers = {"loss": 3.0, "quality_wer": 0.25, "quality_speaker_similarity": 0.8}
    assert [evaluation_samples.badness(numbers, name) for name in ("loss", "wer", "speaker_similarity")] == [3.0, 0.25, -0.8]
    assert evaluation_samples.badness({}, "wer") == float("inf")


def test_replies_are_heard_by_a_recogniser_turn_by_turn(tmp_path):
    """Of two turns one gets its reply; figures may be written as figures."""
    reference = [("two", 0.0, 1.0, OTHER), ("(two)", 1.0, 1.2, MAIN), ("forty", 1.5, 2.0, MAIN), ("two", 2.0, 2.5, MAIN),
                 ("six", 4.0, 5.0, OTHER), ("six", 5.5, 6.0, MAIN)]
    save_wav(tmp_path / "x.wav", 0.1 * torch.randn(2, 8000 * 7, generator=torch.Generator().manual_seed(0)), 8000)
    lengths = []

    def hear(clips):
        lengths.extend(wav.shape[1] / rate for wav, rate in clips)
        return ["42", "seven"]

    assert evaluation_samples.replies_heard(reference, tmp_path / "x.wav", hear) == 1.0 and lengths == [3.0, 2.0]
