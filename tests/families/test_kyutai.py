"""Kyutai's delayed streams: words that are fed are spoken as moshi's TTSModel speaks them, what is heard is written with its times, and
a translation goes on until its text ends."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from conftest import ROOT, call, killed_and_resumed
from safetensors.torch import save_file
from test_parity import Golden, same_tensors
from test_sample import overfit, roomy
from torch import Tensor

from checkpoint import export, load
from corpus.bundled import demo_dialogues
from corpus.examples import build_example
from corpus.index import prepare
from families.family import family_of, lay_out
from families.kyutai import WordFeed, Words, fed_rows, spell, voice_features
from families.moshi import STT_1B, TTS_1_6B
from generation.decode_step import SampleConfig
from generation.dialogue import conversation_input, pauses, user_rows
from generation.sessions import SessionBatch
from model import MultistreamLM
from options import run_config
from sample import generate, reply, speak_examples
from streams import Example, StreamTable, Timing, delay
from text.word_times import bounded_words

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


# ---- Hibiki ----

def test_a_translation_goes_on_until_its_text_ends(tmp_path):
    """The user is over: a column of start ids, then silence; frames through the end equal run_inference's, guided against very_bad too."""
    case = Golden("hibiki_end")
    model, T = load(case.write(tmp_path)), 8
    assert model.table.layout == "hibiki"
    over = model.table.column("start", user_rows(model.table))[None]
    user = torch.cat([case["heard"][..., :T], over, case["heard"][..., T:]], -1)
    rules = SampleConfig(temperature=0, condition="description=very_good", cfg_condition="description=very_bad")
    for wanted, cfg in (("plain", 1.0), ("guided", 2.0)):
        frames = reply(model, user, replace(rules, cfg=cfg), ends=(T, 2))
        assert torch.equal(frames[:, [0, *model.table.audio_out]], case[wanted]) and frames[0, 0, -1] == 2
    assert family_of(model.table).rules(model.table)["cfg_condition"] == "description=very_bad"
    assert not torch.equal(case["plain"][..., :9], case["guided"][..., :9])


# ---- speech to text ----

def test_words_have_the_times_of_the_recording():
    """A mark in front of each word; the last lasts a second at most; two words without a mark between them share the time."""
    tokenizer = SimpleNamespace(encode=lambda word: [ord(letter) for letter in word],
                                decode=lambda ids: "".join(map(chr, ids)))
    row = torch.tensor([3, 0, *map(ord, "hi"), 3, 0, *map(ord, "a bc"), 3, 3, 0, *map(ord, "x"), *[3] * 20])
    found = bounded_words(row, tokenizer, 12.5, 3, 0, late=1.0)
    assert [w[0] for w in found] == ["hi", "a", "bc", "x"]
    assert [round(t * 12.5 + 1) for w in found for t in w[1:3]] == [2, 5, 6, 7, 7, 12, 13, 25]


def test_a_recording_is_heard_between_silences_and_pauses_are_told(tmp_path):
    """A prefix, whole frames, as much behind as words are late; the head's odds are those of the whole at once; live they are the same."""
    case = Golden("stt")
    case.config["stt_config"] = {"audio_delay_seconds": 0.5, "audio_silence_prefix_seconds": 0.2}
    model = load(case.write(tmp_path / "stt"))
    table = model.table
    assert table.layout == "kyutai_stt" and table.timing == Timing(-6.25, 3) and table.timing.around == (3, 7)
    soundfile.write(tmp_path / "x.wav", 0.1 * torch.ones(2000).numpy(), 8000)                  # 6.25 frames of 320 samples
    codec = SimpleNamespace(sample_rate=8000, frame_rate=25.0, encode=lambda wav: wav[..., ::320].repeat(1, 5, 1).gt(0).long())
    _, codes, wav = conversation_input(SimpleNamespace(user=str(tmp_path / "x.wav"), prompt="", seconds=1.0), codec, LETTERS, table, None)
    assert wav.shape[1] == 320 * (3 + 7 + 7) and codes[0, 0].tolist() == [0] * 3 + [1] * 7 + [0] * 7
    frames = reply(model, case["user"][:1], GREEDY)[0]
    grid = delay(frames, table.delays, table.column("start"))[None]
    with torch.inference_mode():
        odds = model.extra_odds(model.hidden(grid[..., :-1])[0])[0, 2, :, 0]
    assert pauses(model, frames, chunk=4) == pytest.approx(odds.tolist(), abs=1e-5)
    batch, live = SessionBatch(model, 2, GREEDY, columns=64), []
    batch.begin(0, table.column("start"))
    for column in case["user"][0].unbind(-1)[:-1]:
        batch.step({0: column})
        live.append(batch.pauses()[0])
    assert live == pytest.approx(odds.tolist()[1:], abs=1e-5)


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


def test_an_overfitted_clip_is_spoken_again_word_by_word(smoke):
    config = roomy(smoke[0].model)
    table, codes = config.table, torch.randint(0, 256, (8, 20), generator=torch.Generator().manual_seed(1))
    model = overfit(config, Example(fed_rows([([10, 11], 0.1), ([12], 0.3)], 20, 25.0, table), codes), 400)
    feed = WordFeed([torch.tensor([-1, 10, 11, -1, 12])], table)
    got = torch.stack(list(generate(model, table.column("start"), GREEDY, feed)), -1)[0, table.audio_out, table.timing.frames :]
    T = 20 - table.timing.frames - max(table.delays)                     # later columns are not in the grid
    assert got.shape[1] > T > 8 and torch.equal(got[:, :T], codes[:, :T])


@pytest.mark.parametrize("name", ["kyutai_stt", "hibiki"])
def test_an_overfitted_recording_is_heard_and_translated_again(name):
    config = run_config(ROOT / f"configs/{name}.py", "smoke").model
    table, draw = config.table, torch.Generator().manual_seed(1)
    Q, text = len(table.audio_out), torch.randint(4, 8, (16,), generator=draw)
    codes, user = torch.randint(0, 256, (2, 8, 16), generator=draw)
    example = Example(text, codes, user=user) if Q else Example(text, user)
    model = overfit(roomy(config) if Q else config, example, 400)
    got, late, T = reply(model, user[None], GREEDY)[0], max(0, -table.timing.frames), 16 - max(table.delays)
    assert T > 8 and torch.equal(got[table.audio_out, :T], codes[:Q, :T]) and torch.equal(got[0, late:T], text[: T - late])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kyutai_tts", "kyutai_stt", "hibiki"])
def test_smoke_trains_samples_exports_and_reads_back(name, smoke, tmp_path, monkeypatch):
    source = demo_dialogues(smoke[1] / "d", 3)
    out = tmp_path / "run"
    killed_and_resumed(name, out, f"--data.cache={smoke[1]}/c", "--data.held_out=0", "--eval_every=0", f"--data.sources={source}",
                       "--prompts=()", "--listen=0")
    wav, user = tmp_path / "x.wav", Path(source).parent / "001.wav"
    asked = ("--text=thank you", "--max_frames=60", "--stream") if name == "kyutai_tts" else (f"--user={user}", "--seconds=1")
    code, text, err = call("sample.py", f"--ckpt={out}", f"--out={wav}", *asked)
    assert code == 0, err
    if name == "kyutai_stt":
        row = json.loads(wav.with_suffix(".json").read_text())
        assert len(row["pauses"]) == len(row["text"]) == -(-round(soundfile.info(user).duration * 1e6) * 25 // 10**6) + 7
    else:
        assert wav.stat().st_size > 44
    monkeypatch.chdir(ROOT)
    again = load(export(load(out), tmp_path / "official", "moshi"))
    assert again.table.timing == load(out).table.timing and again.table.layout == load(out).table.layout
