"""Kyutai's delayed streams: words that are fed are spoken as moshi's TTSModel speaks them, what is heard is written with its times, and
a translation goes on until its text ends."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import save_file
from test_parity import Golden, same_tensors
from torch import Tensor

from checkpoint import export, load
from corpus.bundled import demo_dialogues
from corpus.examples import build_example
from corpus.index import prepare
from families.family import lay_out
from families.kyutai import WordFeed, Words, fed_rows, spell, voice_features
from families.moshi import STT_1B, TTS_1_6B
from generation.decode_step import SampleConfig
from generation.sessions import SessionBatch
from model import MultistreamLM
from options import run_config
from sample import generate, speak_examples
from streams import Example, StreamTable, Timing

GREEDY = SampleConfig(temperature=0, max_frames=130)
LETTERS = SimpleNamespace(encode=lambda word: [4 + ord(letter) % 20 for letter in word[:3]])
TEXTS = {"kyutai_tts": ['Hi there: my (big) friend <break time="0.4s"/> so go [SPEAKER1] ok then', "one two three four five"]}
TEXTS["kyutai_plain"] = TEXTS["kyutai_tts"]
CONDITION = {"kyutai_tts": "control=ok,cfg=2.0", "kyutai_plain": "control=ok"}


def examples(table: StreamTable, texts: list[str]) -> list[Example]:
    return [Example(torch.tensor(spell(text, LETTERS, table))) for text in texts]


def rows(frames: Tensor, table: StreamTable) -> Tensor:
    """moshi's frames (B, 1 + Q, T), both texts in one row, as ours (B, K, T) without conditions."""
    text, size = frames[:, :1], table.streams[0].vocab
    texts = [text % size, torch.div(text, size, rounding_mode="floor") - 1] if len(table.text) == 2 else [text]
    return torch.cat([*texts, frames[:, 1:]], 1)


@pytest.fixture(params=["kyutai_tts", "kyutai_plain"])
def speaker(request, tmp_path) -> tuple[Golden, MultistreamLM, Tensor | None]:
    case = Golden(request.param)
    files = [str(tmp_path / f"{n}.safetensors") for n in range(2)]
    for file, features in zip(files, case["features"], strict=True):
        save_file({"speaker_wavs": features.contiguous()}, file)
    model = load(case.write(tmp_path / "model"))
    return case, model, voice_features(files).expand(2, -1, -1) if model.voice is not None else None


def test_fed_words_are_spoken_as_the_official_state_machine_has_them(speaker):
    """Look-ahead, padding between words, pauses, turns; greedy frames through the end, and where each text ends."""
    case, model, voice = speaker
    table, config = model.table, replace(GREEDY, condition=CONDITION[case.name])
    assert table.layout == "kyutai_tts" and table.timing.frames == {"kyutai_tts": 6, "kyutai_plain": 3}[case.name]
    feed = WordFeed([e.text for e in examples(table, TEXTS[case.name])], table)
    prompt = table.column("start").repeat(2, 1, 1)
    frames = torch.stack(list(generate(model, prompt, config, feed, voice=voice)), -1)
    wanted, kept = rows(case["frames"], table), [*table.text, *table.audio_out]
    for n, end in enumerate(case["ends"].tolist()):
        length = min(table.timing.frames + end + 4, wanted.shape[-1])
        assert torch.equal(frames[n, kept, :length], wanted[n, :, :length])
        assert bool((frames[n, table.audio_out, table.timing.frames + end + 4 :] == -1).all())        # four frames behind the last word
    assert feed.frames() == [table.timing.frames + end + 4 for end in case["ends"].tolist()]


def test_speech_is_what_comes_after_the_lead_and_ends_by_itself(speaker):
    case, model, voice = speaker
    heard, codec = [], SimpleNamespace(codebook_size=10**6, decode=lambda codes: codes[:, :1].float(), stream=lambda: SimpleNamespace(
        decode=lambda codes: codes[:, :1].float(), flush=lambda: torch.zeros(1, 1, 0)))
    config = replace(GREEDY, condition=CONDITION[case.name])
    spoken = speak_examples(model, examples(model.table, TEXTS[case.name]), config, codec, heard.append, voice=voice)
    assert [s.frames for s in spoken] == [end + 4 for end in case["ends"].tolist()] and all(s.ended for s in spoken)
    assert torch.equal(torch.cat(heard, -1), spoken[0].wav)                                     # streamed as it comes


def test_a_live_generation_is_that_of_a_file(tmp_path):
    case = Golden("kyutai_plain")
    model = load(case.write(tmp_path))
    table, config = model.table, replace(GREEDY, condition=CONDITION[case.name])
    text = torch.tensor(spell("one two", LETTERS, table))
    wanted = [f[0] for f in generate(model, table.column("start"), config, WordFeed([text], table))]
    batch = SessionBatch(model, 2, config, columns=200)
    first = batch.begin(1, table.column("start"), feed=WordFeed([text], table))
    frames = [] if first is None else [first]
    while not batch.done(1):
        frames += [f for f in [batch.step().get(1)] if f is not None]
    assert torch.equal(torch.stack(frames), torch.stack(wanted[: len(frames)])) and len(frames) > 10


def test_official_files_say_the_timing_and_get_it_back(speaker, tmp_path):
    case, model, _ = speaker
    again = load(export(model, tmp_path / "back", to="moshi"))
    assert same_tensors(again, model) and again.table == model.table
    assert json.loads((tmp_path / "back/config.json").read_text())["tts_config"]["audio_delay"] == case.config["tts_config"]["audio_delay"]


def test_words_need_a_model_that_says_when_they_are_spoken():
    assert spell("a b", LETTERS, TTS_1_6B.table)[:3] == [-1 - 2, 1, 4 + ord("a") % 20]                # padding, the first speaker, a letter
    with pytest.raises(ValueError, match="restore tts_config"):
        spell("a", LETTERS, replace(TTS_1_6B.table, timing=Timing()))
    assert STT_1B.table.timing.frames == -7


# ---- training ----

def test_training_writes_the_rows_that_the_feed_writes():
    """Words at their times; what the feed makes of the same actions is the same two rows."""
    table = TTS_1_6B.table
    words = [([10, 11], 0.1), ([12], 0.5), ([13, 14, 15], 0.55), ([16], 2.0)]
    got = fed_rows(words, 40, 12.5, table)
    actions = torch.where(got[1] == 0, 0, 3).tolist()
    left = Words.spelled(torch.tensor([-1, 1, 10, 11, -1, 12, -1, 13, 14, 15, -1, 16]), table).left
    item = Words(table, left, most=40, padding=40, forced=0)
    assert torch.equal(torch.tensor([item.next(a) for a in actions]).T, got)
    begun = [t for t, id in enumerate(got[1].tolist()) if id == 0]
    assert begun == [1, 6, 7, 25, 36] and got[0, 1:4].tolist() == [1, 10, 11] and got[1, 2:5].tolist() == [13, 14, 15]
    with pytest.raises(ValueError, match="do not fit into 3 frames"):
        fed_rows(words, 3, 12.5, table)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run_config(ROOT / "configs/kyutai_tts.py", "smoke"), tmp_path_factory.mktemp("kyutai")


def test_every_code_of_a_recording_is_trained_behind_its_text(smoke, monkeypatch):
    config, folder = smoke
    monkeypatch.chdir(ROOT)
    source = demo_dialogues(folder / "d", 3)
    data, table = replace(config.data, sources=(source,), cache=str(folder / "c"), held_out=0.0), config.model.table
    index = prepare(data, table)
    number = next(n for n, e in enumerate(index.entries) if e.chunk)
    tokens, weights = lay_out(build_example(index, number, table), table)
    codes, lead = index.codes(number, 0), table.timing.frames
    T = codes.shape[1]
    assert tokens.shape[1] == 1 + T + lead
    for k, row in enumerate(table.audio_out):
        late = 1 + lead + table.delays[row]
        whole = codes[k, : tokens.shape[1] - late]
        assert torch.equal(tokens[row, late : late + T], whole) and weights[row, late : late + T].all() and not weights[row, :late].any()
    assert set(weights[0, 1:].tolist()) == {0.5, 1.0} and not weights[1].any()
    torch.manual_seed(0)
    model = MultistreamLM(config.model)
    sums = model(tokens[None], weights[None])
    text = model(tokens[None])[0][0]
    nll = torch.nn.functional.cross_entropy(text, torch.where(tokens[1, 1:] == 0, 0, 3), reduction="none")
    assert torch.allclose(sums.nll[0], (nll * weights[0, 1:]).sum(), atol=1e-3)


@pytest.mark.slow
def test_smoke_trains_speaks_exports_and_reads_back(smoke, tmp_path, monkeypatch):
    out, base = tmp_path / "run", ("--smoke", f"--out={tmp_path}/run", f"--data.cache={smoke[1]}/c", "--data.held_out=0", "--eval_every=0",
                                   f"--data.sources={demo_dialogues(smoke[1] / 'd', 3)}", "--prompts=()", "--listen=0", "--save_every=2",
                                   "--schedule=constant")
    assert call("train.py", "configs/kyutai_tts.py", *base, "--steps=2")[0] == 0
    code, text, err = call("train.py", "configs/kyutai_tts.py", *base, "--steps=4")
    assert code == 0 and "at step 2" in text, err
    wav = tmp_path / "x.wav"
    code, text, err = call("sample.py", f"--ckpt={out}", "--text=thank you", "--max_frames=60", f"--out={wav}", "--stream")
    assert code == 0 and Path(wav).stat().st_size > 44, err
    monkeypatch.chdir(ROOT)
    again = load(export(load(out), tmp_path / "official", "moshi"))
    assert again.table.timing == load(out).table.timing and again.table.layout == "kyutai_tts"
