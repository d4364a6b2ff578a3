"""What a dialogue suffers in preparation: by how much, to which channel, and that words stay where they are said."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT

from audio.augment import AugmentConfig, Change, apply, draw, pitched, recordings, stretched
from corpus.cache import word_shift
from corpus.examples import build_example
from corpus.index import prepare
from model import MultistreamLM
from options import run_config

RATE = 16_000


def tone(hz: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * math.pi * hz * torch.arange(round(seconds * RATE)) / RATE)


def loudest(wav: torch.Tensor) -> float:
    """The frequency with the most energy, in Hz."""
    middle = wav[len(wav) // 4 : -len(wav) // 4]
    return float(torch.fft.rfft(middle * torch.hann_window(len(middle)), 1 << 18).abs().argmax()) * RATE / (1 << 18)


TALK = torch.stack([tone(300), tone(500)])


def test_nothing_changes_without_a_change():
    assert torch.equal(apply(TALK, RATE, Change(), []), TALK)
    assert draw(AugmentConfig(), "any") == Change()


def test_the_agent_is_left_alone():
    changed = apply(TALK, RATE, Change(gain=-6.0206, pitch=120.0, echo=(0.2, 0.1)), [])
    assert torch.equal(changed[0], TALK[0]) and changed.shape == TALK.shape
    assert float(changed[1].square().mean() / TALK[1].square().mean()) == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("cents", [-200.0, 100.0, 200.0])
def test_pitch_moves_by_cents_and_keeps_the_length(cents):
    moved_tone = pitched(tone(440), cents)
    assert len(moved_tone) == RATE and 1200 * math.log2(loudest(moved_tone) / 440) == pytest.approx(cents, abs=12)
    longer = stretched(tone(440), 1.25)
    assert len(longer) == round(1.25 * RATE) and loudest(longer) == pytest.approx(440, abs=1)


def test_echo_is_the_agent_later_and_weaker():
    click = torch.zeros(2, RATE)
    click[0, 1000] = 0.8
    heard = apply(click, RATE, Change(echo=(0.25, 0.2)), [])[1]
    assert int(heard.argmax()) == 1000 + RATE // 4 and float(heard.max()) == pytest.approx(0.16) and int((heard != 0).sum()) == 1


def test_noise_lies_so_many_decibels_below_the_voice(tmp_path):
    for n, length in enumerate((RATE // 3, 3 * RATE)):                             # shorter and longer than the voice; one in stereo
        soundfile.write(tmp_path / f"{n}.wav", np.random.default_rng(n).standard_normal((length, 1 + n)) * 0.2, RATE)
    for number in (0, 1, 12345):
        noisy = apply(TALK, RATE, Change(noise=(20.0, number)), recordings(str(tmp_path)))
        ratio = TALK[1].square().mean() / (noisy[1] - TALK[1]).square().mean()
        assert 10 * math.log10(float(ratio)) == pytest.approx(20.0, abs=0.01)
    with pytest.raises(ValueError, match="holds no sound file"):
        recordings(str(tmp_path / "none"))


def test_speed_takes_both_along_and_shift_is_silence():
    fast = apply(TALK, RATE, Change(speed=1.1), [])
    assert fast.shape[1] == pytest.approx(RATE / 1.1, abs=2) and loudest(fast[0]) == pytest.approx(330, abs=1)
    late = apply(TALK, RATE, Change(shift=0.5), [])
    assert late.shape[1] == 1.5 * RATE and not late[:, : RATE // 2].any() and torch.equal(late[:, RATE // 2 :], TALK)
    assert torch.equal(apply(TALK, RATE, Change(shift=-0.5), []), TALK)               # the words move instead


def test_draws_repeat_and_stay_in_range():
    always = AugmentConfig(noise=1, noise_dir="x", gain=1, speed=1, pitch=1, echo=1, shift=1)
    drawn = [draw(always, f"clip/{n}") for n in range(200)]
    assert drawn[7] == draw(always, "clip/7") and len(set(drawn)) == 200
    for name, low, high in (("gain", -24, 15), ("speed", 0.84, 1.16), ("pitch", -200, 200), ("shift", -0.56, 0.56)):
        values = [getattr(d, name) for d in drawn]
        assert low <= min(values) < max(values) <= high and max(values) - min(values) > 0.8 * (high - low)
    sometimes = [draw(replace(always, gain=0.3), f"clip/{n}").gain is not None for n in range(400)]
    assert 0.22 < sum(sometimes) / 400 < 0.38
    for wrong, said in (({"gain": 1.5}, "probability"), ({"gain_db": (5.0, 1.0)}, "low to high"), ({"noise": 0.5}, "noise_dir")):
        with pytest.raises(AssertionError, match=said):
            AugmentConfig(**wrong)


def test_words_follow_speed_and_shift():
    config = AugmentConfig(speed=1.0, shift=1.0)
    for n in range(1, 9):
        change = draw(config, f"key/{n}")
        assert word_shift("key", n, 12.5, config) == (max(0.0, -change.shift), change.speed)
    assert word_shift("key", 0, 12.5, config) == (0.0, 1.0) and word_shift("key", 1, 25.0, None)[0] <= 1 / 25


def test_prepared_dialogues_have_augmented_versions(tmp_path):
    smoke = run_config(ROOT / "configs/moshi_lora.py", "smoke")
    base = replace(smoke.data, cache=str(tmp_path), variants=3, sources=(str(ROOT / smoke.data.sources[0]),),
                   tokenizer=str(ROOT / smoke.data.tokenizer), chunk_seconds=60.0)
    config = replace(base, augment=AugmentConfig(gain=1.0, speed=1.0, echo=1.0))
    plain, index = prepare(base, smoke.model.table), prepare(config, smoke.model.table)
    assert plain.folder != index.folder and torch.equal(plain.codes(0, 0), index.codes(0, 0))
    one = index.codes(0, 1)
    speed = draw(config.augment, f"{index.entries[0].key}/1").speed
    assert one.shape[1] == pytest.approx(index.codes(0, 0).shape[1] / speed, abs=1.5)
    assert build_example(index, 0, smoke.model.table).codes.shape[0] == 8
    assert json.loads((index.folder / f"{index.content}.json").read_text().splitlines()[0])["duplex"]
    with pytest.raises(ValueError, match="data.variants above 1"):
        prepare(replace(config, variants=1), smoke.model.table)


def test_hidden_text_is_hidden_as_input_only():
    smoke = run_config(ROOT / "configs/moshi_lora.py", "smoke")
    torch.manual_seed(0)
    model = MultistreamLM(replace(smoke.model, text_drop=1.0)).train()
    tokens = torch.randint(4, 200, (2, 17, 9))
    seen: list[torch.Tensor] = []
    model.embed["text"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sums = model(tokens, torch.ones(tokens.shape) * (model.table.column("classes") > 0))
    hidden = (seen[0] == -1).float().mean()
    assert 0.1 < hidden < 0.95 and sums.count[0] == 16 and torch.equal(seen[0][seen[0] >= 0], tokens[:, :1, :-1][seen[0] >= 0])
    model.eval()
    model(tokens)
    assert torch.equal(seen[1], tokens[:, :1, :-1])
