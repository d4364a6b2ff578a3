"""Conversations: going on with a recorded one, what is written of them, and the numbers of how they went."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, call
from tables import CONFIGS, random_ids

from audio import load_codec
from checkpoint import export, save
from corpus.bundled import demo_dialogues
from corpus.data_config import DataConfig
from corpus.examples import build_example
from corpus.index import prepare
from evaluation.duplex_measures import latencies, mean, measure
from families.family import lay_out
from families.moshi import expand_depth
from generation.decode_step import SampleConfig
from generation.dialogue import dialogue_prompt
from model import MultistreamLM
from options import run_config
from sample import reply
from streams import Stream, delay
from text.tokenizers import load_tokenizer
from text.word_times import EPAD, MAIN, OTHER, PAD, interleave, timed_transcript, timed_words, tokenise, turns_right

GREEDY = SampleConfig(temperature=0)
RATE = 8000


def both_sided() -> MultistreamLM:
    """A model that predicts the user too."""
    table = CONFIGS["duplex"].table
    streams = tuple(replace(s, classes=16) if s.kind == "audio" else s for s in table.streams)
    return MultistreamLM(replace(CONFIGS["duplex"], table=replace(table, streams=streams), depth=replace(CONFIGS["duplex"].depth, steps=5)))


# ---- going on ----

def test_a_dialogue_goes_on_as_it_would_have():
    """The head of a reply, given back with what the user says from the beginning on, ends as the whole."""
    torch.manual_seed(0)
    model = MultistreamLM(CONFIGS["duplex"])
    user = random_ids(16, (2, 2, 12), 7)
    whole = reply(model, user, GREEDY)
    for length in (1, 5, 11):
        assert reply(model, user, GREEDY, before=whole[..., :length]).equal(whole)


def test_a_model_that_speaks_for_both_goes_on_with_both():
    torch.manual_seed(1)
    model = both_sided().eval()
    before = torch.cat([random_ids(40, (1, 1, 6), 1), random_ids(16, (1, 5, 6), 2)], 1)
    frames = reply(model, None, replace(GREEDY, max_frames=9), before=before)
    assert frames.shape == (1, 6, 6 + 9) and (frames >= 0).all() and frames[..., :5].equal(before[..., :5])
    with torch.inference_mode():
        text, audio = model(delay(frames, model.table.delays, model.table.column("start")))
    assert text.argmax(-1)[:, 6:].equal(frames[:, 0, 6:])
    for k, row in enumerate(model.table.audio_out):
        lag = model.table.delays[row]
        assert audio[:, k].argmax(-1)[:, 6 + lag : 15].equal(frames[:, row, 6 : 15 - lag])


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    """A small random model of the smoke config's shape that speaks for the agent, one that speaks for both, and dialogues."""
    folder = tmp_path_factory.mktemp("talks")
    torch.manual_seed(2)
    smoke = run_config(ROOT / "configs/moshi_full.py", "smoke")
    model = MultistreamLM(smoke.model)
    demo_dialogues(folder / "d", 2)
    export(model, folder / "one")
    config, tensors = expand_depth(model.config, model.state_dict())
    both = MultistreamLM(config)
    both.load_state_dict(tensors)
    save(both, folder / "two")
    return folder


def options(folder: Path, model: str, **more: object) -> list[str]:
    found = {"ckpt": folder / model, "codec": "tiny", "tokenizer": folder / "d/words.json", "normaliser": "english-v1", **more}
    return [f"--{key}={value}" for key, value in found.items()]


@pytest.mark.parametrize("model", ["one", "two"])
def test_the_command_goes_on_with_a_stereo_prompt(model, talks, tmp_path):
    prompt, out = talks / "d/000.wav", tmp_path / "on.wav"
    rc, told, err = call("sample.py", *options(talks, model, prompt=prompt, seconds=1.0, out=out))
    assert rc == 0 and "left the model" in told, err
    wav, rate = soundfile.read(out)
    assert wav.shape[1] == 2 and abs(len(wav) / rate - soundfile.info(prompt).duration - 1.0) < 0.1 and np.abs(wav).max() > 0
    row = json.loads(out.with_suffix(".json").read_text())
    data = replace(DataConfig(), codec="tiny", normaliser="english-v1")
    codec, tokenizer = load_codec("tiny"), load_tokenizer(str(talks / "d/words.json"))
    table = run_config(ROOT / "configs/moshi_full.py", "smoke").model.table
    frames = dialogue_prompt(prompt, codec, tokenizer, table, data)
    assert row["text"][: frames.shape[1]] == frames[0].tolist() and row["pads"] == [PAD, EPAD]
    assert len(row["text"]) == frames.shape[1] + round(codec.frame_rate)
    words = [w[0] for w in json.loads(prompt.with_suffix(".json").read_text())["alignments"] if w[2] == MAIN]
    assert [w[0] for w in row["alignments"]][: len(words)] == words and out.with_suffix(".txt").read_text()


def test_the_user_of_a_prompt_may_go_on_too(talks, tmp_path):
    prompt, user = talks / "d/000.wav", talks / "d/001.wav"
    rc, _, err = call("sample.py", *options(talks, "one", prompt=prompt, user=user, out=tmp_path / "on.wav", temperature=0))
    assert rc == 0, err
    lengths = [soundfile.info(p).duration for p in (prompt, user, tmp_path / "on.wav")]
    assert abs(lengths[0] + lengths[1] - lengths[2]) < 0.1
    rc, _, err = call("sample.py", *options(talks, "two", prompt=prompt, user=user, out=tmp_path / "two.wav"))
    assert rc == 0 and abs(soundfile.info(tmp_path / "two.wav").duration - lengths[2]) < 0.1, err      # heard, though it predicts both
    rc, _, err = call("sample.py", *options(talks, "one", user=user, system="You are kind.", out=tmp_path / "x.wav"))
    assert rc == 2 and "takes no role and no voice" in err and err.count("\n") == 1


def sound(path: Path, channels: int, seconds: float = 1.0) -> Path:
    noise = 0.1 * torch.randn(round(seconds * RATE), channels, generator=torch.Generator().manual_seed(0))
    soundfile.write(path, noise.numpy(), RATE)
    return path


@pytest.mark.parametrize(("channels", "beside", "words"), [
    (1, None, "has 1 channel"), (6, None, "has 6 channel"), (2, "{", "prompt.json is not valid JSON"),
    (2, '{"alignments": [["hi", 3]]}', "prompt.json: entry 0 is"), (2, '{"words": []}', 'prompt.json: there is no list of "alignments"'),
    (2, '{"alignments": [["hi", [4, 5], "SPEAKER_MAIN"]]}', "prompt.json: wav shorter than its alignments")])
def test_a_prompt_that_cannot_be_used_is_one_line(channels, beside, words, talks, tmp_path):
    prompt = sound(tmp_path / "prompt.wav", channels)
    if beside is not None:
        prompt.with_suffix(".json").write_text(beside)
    rc, _, err = call("sample.py", *options(talks, "one", prompt=prompt, out=tmp_path / "x.wav"))
    assert rc == 2 and words in err and err.count("\n") == 1, err


def test_recordings_to_answer_are_looked_at_before_training(tmp_path):
    rc, _, err = call("train.py", "configs/moshi_full.py", "--smoke", f"--out={tmp_path}/x", "--prompts=nobody.wav", cwd=ROOT)
    assert rc == 2 and "no sound file at nobody.wav" in err and err.count("\n") == 1, err


# ---- conditions in the data ----

def test_conditions_of_a_dialogue_stand_in_every_column_of_its_rows(tmp_path, capsys):
    """Moshi's sidecar names them; a name or a value that the model does not know leaves the dialogue out, in one line."""
    source = demo_dialogues(tmp_path / "d", 4)
    for n, told in enumerate(({"description": "good"}, {"description": None}, {"description": "fine"}, {"voice": "x"})):
        beside = tmp_path / f"d/00{n}.json"
        beside.write_text(json.dumps(json.loads(beside.read_text()) | {"text_conditions": told}))
    smoke = run_config(ROOT / "configs/moshi_full.py", "smoke")
    told = Stream("description", "condition", 8, start=7, rank=4, values=("bad", "neutral", "good"))
    table = replace(smoke.model.table, streams=(smoke.model.table.streams[0], told, *smoke.model.table.streams[1:]))
    data = replace(smoke.data, sources=(source,), cache=str(tmp_path / "c"), tokenizer=str(tmp_path / "d/words.json"), held_out=0.0)
    index = prepare(data, table)
    rows = {e.id.split("@")[0]: lay_out(build_example(index, n, table), table) for n, e in enumerate(index.entries)}
    assert sorted(rows) == ["000", "001"] and all((rows[name][0][1] == wanted).all() for name, wanted in (("000", 2), ("001", 7)))
    assert all(not weights[1].any() for _, weights in rows.values())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert len(said) == 2 and "is 'fine'; choose one of bad, neutral, good" in said[0] and "condition 'voice' is unknown" in said[1], said
    model = MultistreamLM(replace(smoke.model, table=table))
    sums = model(*(part[None] for part in rows["000"]))
    sums.nll.sum().backward()
    assert model.embed["condition_description"].weight.grad[2].any() and not model.embed["condition_description"].weight.grad[1].any()


# ---- what is written ----

def test_words_come_back_out_of_a_text_row():
    tokenizer = load_tokenizer("bytes")
    words = [("so", 0.3, 0.6, MAIN), ("yes", 1.0, 1.4, MAIN), ("no", 6.0, 6.2, MAIN)]
    row = interleave(tokenise(words, tokenizer), 100, 12.5)
    found = timed_words(row, tokenizer, 12.5, PAD, EPAD)
    assert "".join(w[0] for w in found) == "soyesno" and found[-1] == ("no", 6.0, 6.16, MAIN)
    assert timed_transcript(row, tokenizer, 12.5) == "   0.24  soyes\n   6.00  no\n"


# ---- how it went ----

def bursts(*spans: tuple[float, float, int], seconds: float = 8.0) -> torch.Tensor:
    """Noise where a channel speaks, next to nothing elsewhere.   -> (2, W)"""
    wav = 1e-4 * torch.randn(2, round(seconds * RATE), generator=torch.Generator().manual_seed(1))
    for start, end, channel in spans:
        wav[channel, round(start * RATE) : round(end * RATE)] *= 2000
    return wav


def test_latency_overlap_and_padding_of_a_conversation():
    """User 1 to 2 s, answered at 2.5; user 4 to 5 s, interrupted at 4.8; together 0.2 of 3.5 s of speech."""
    wav = bursts((1, 2, 1), (2.5, 3.5, 0), (4, 5, 1), (4.8, 5.5, 0))
    found = measure(wav, RATE, [PAD] * 6 + [EPAD, 9, 12, -1], (PAD, EPAD))
    assert (found["user_turns"], found["replies"]) == (2, 2)
    assert found["reply_latency"] == pytest.approx((0.5 - 0.2) / 2, abs=0.05)
    assert found["overlap_ratio"] == pytest.approx(0.2 / 3.5, abs=0.02) and found["agent_share"] == pytest.approx(1.7 / 8, abs=0.02)
    assert found["pad_ratio"] == pytest.approx(7 / 9)
    silent = measure(bursts((1, 2, 1)), RATE)
    assert (silent["user_turns"], silent["replies"], silent["overlap_ratio"]) == (1, 0, 0) and "reply_latency" not in silent


def test_what_counts_as_a_reply():
    """Pieces of what the user says belong together until the agent begins; who speaks first replies to nobody; late is no reply."""
    assert latencies([(0, 1, 0), (2, 3, 1), (3.5, 4, 1), (4.5, 6, 0)]) == ([0.5], 1)
    assert latencies([(2, 3, 1), (14, 15, 0)]) == ([], 1)
    assert latencies([(0, 5, 0), (1, 2, 1), (6, 7, 0)]) == ([4.0], 1)


def test_a_folder_of_conversations_is_evaluated(tmp_path):
    soundfile.write(tmp_path / "a.wav", bursts((1, 2, 1), (2.5, 3.5, 0)).T.numpy(), RATE)
    soundfile.write(tmp_path / "b.wav", bursts((1, 2, 1), (3.5, 4.5, 0)).T.numpy(), RATE)
    (tmp_path / "a.json").write_text(json.dumps({"text": [3, 3, 0, 7], "pads": [3, 0]}))
    rc, told, err = call("evaluate.py", tmp_path)
    assert rc == 0 and "1 of 1 replies, latency +0.48 s, overlap 0.00, PAD 0.75" in told and "dialogues.json: written" in told, told + err
    result = json.loads((tmp_path / "dialogues.json").read_text())["mean"]
    assert result["reply_latency"] == pytest.approx(1.0, abs=0.05) and result["pad_ratio"] == 0.75 and result["replies"] == 2
    (tmp_path / "none").mkdir()
    rc, _, err = call("evaluate.py", tmp_path / "none")
    assert rc == 2 and "or stereo wav" in err


def test_a_turn_is_right_when_its_reply_is_the_recorded_one():
    def words(*given: tuple[str, float, str]) -> list[tuple[str, float, float, str]]:
        return [(word, at, at + 0.3, who) for word, at, who in given]

    reference = words(("two", 0.0, OTHER), ("(two)", 0.4, MAIN), ("four", 0.5, OTHER), ("(four)", 0.9, MAIN), ("two", 1.1, MAIN),
                      ("four", 1.5, MAIN), ("six", 3.0, OTHER), ("(six)", 3.4, MAIN), ("six", 3.6, MAIN))
    own = [w for w in reference if w[3] == MAIN]
    assert turns_right(reference, own) == {"turns": 2, "turns_right": 2, "turns_of_2": 1, "turns_of_2_right": 1, "turns_of_1": 1,
                                           "turns_of_1_right": 1}
    swapped = [("four", *w[1:]) if w[0] == "two" else w for w in own]
    rows = [turns_right(reference, said) | {"replies": 2, "user_turns": 2} for said in (own, swapped, [*own, ("six", 4.2, 4.4, MAIN)], [])]
    found = mean(rows)
    assert found["turns"] == 8 and found["turns_right"] == 4 / 8
    assert found["turns_of_2_right"] == found["turns_of_1_right"] == 2 / 4
    assert turns_right([w for w in reference if w[3] == MAIN], own) == {}
