"""Speakers of one channel are told apart by voice: twenty composed calls, one voice refused; RTTM files; the measure by hand."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from audio.diarise import diarisation_error, diarise, read_rttm
from audio.speaker import missing
from audio.telephone import add_noise, held_sounds, telephone
from audio.wav import load_wav

RATE = 8000
VOICES = ("allison", "synthetic/rms", "synthetic/slt", "synthetic/ar")
PAIRS = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
needs_weights = pytest.mark.skipif(bool(missing()), reason="resemblyzer is not installed")


@cache
def prompts(voice: str) -> list[Tensor]:
    """16 recordings of a second and more, over the telephone; digits and letters are not what people say in calls.   (1, W) each"""
    paths = sorted(p for p in (ROOT / "assets/speech" / voice).rglob("*.opus") if p.stat().st_size > 2500
                   and not {"digits", "letters", "phonetic"} & set(p.parts))
    return [telephone(load_wav(path, RATE)[0], RATE) for path in paths[:: len(paths) // 16][:16]]


def composed(number: int, voices: tuple[int, int]) -> tuple[Tensor, list[tuple[float, float, str]]]:
    """A mono call at 25 dB above the noise: two voices take 6 turns, with pauses of 0.1 to 0.5 s.   -> (1, W), who speaks when"""
    draw, parts, truth, at = random.Random(number), [torch.zeros(1, RATE // 4)], [], 0.25
    for turn in range(6):
        voice = VOICES[voices[(turn + number) % 2]]
        for _ in range(draw.choice((1, 1, 2))):
            wav = draw.choice(prompts(voice))
            pause = torch.zeros(1, round(draw.uniform(0.1, 0.5) * RATE))
            truth.append((at, at + wav.shape[1] / RATE, voice))
            parts += [0.1 * wav / wav.square().mean().sqrt(), pause]
            at += (wav.shape[1] + pause.shape[1]) / RATE
    return add_noise(torch.cat(parts, 1), 25, number), truth


@needs_weights
def test_speakers_of_twenty_calls_are_told_apart() -> None:
    errors, strict = [], []
    for number in range(20):
        wav, truth = composed(number, PAIRS[number % len(PAIRS)])
        found = diarise(wav, RATE)
        assert found[0].speaker == 0 and all(0.3 < voice.confidence <= 1 for voice in found)
        spans = [(v.start, v.end, v.speaker) for v in found]
        errors.append(diarisation_error(truth, spans, collar=0.25))
        strict.append(diarisation_error(truth, spans))                      # clips begin and end with up to 0.1 s of silence
    assert max(errors) <= 0.05, errors
    assert max(strict) <= 0.12 and sum(strict) / len(strict) <= 0.10, strict


@needs_weights
def test_one_voice_and_silence_are_refused() -> None:
    with pytest.raises(ValueError, match="only one voice"):
        diarise(composed(1, (1, 1))[0], RATE)
    with pytest.raises(ValueError, match="nobody speaks"):
        diarise(torch.zeros(1, RATE), RATE)


def test_hold_music_is_held_and_speech_is_not() -> None:
    time = torch.arange(RATE // 2) / RATE
    notes = ((262, 330, 392), (294, 349, 440), (247, 311, 370)) * 8
    chords = torch.cat([sum(torch.sin(6.2832 * f * time) for f in chord) for chord in notes])
    music = telephone(0.1 * chords[None], RATE, snr=30)                     # 12 s
    speech = torch.cat(prompts("allison"), 1)
    assert held_sounds(telephone(speech, RATE, snr=15), RATE) == [] and held_sounds(speech[:, :100], RATE) == []
    (start, end), = held_sounds(torch.cat([speech[:, : 10 * RATE], music, speech[:, : 10 * RATE]], 1), RATE)
    assert abs(start - 10) < 1.5 and abs(end - 22) < 1.5


def test_the_measure_is_what_it_says() -> None:
    truth = [(0, 4, "a"), (4, 8, "b")]
    assert diarisation_error(truth, [(0, 4, 1), (4, 8, 0)]) == 0
    assert diarisation_error(truth, [(0, 5, 1), (5, 8, 0)]) == pytest.approx(1 / 8)                 # confused
    assert diarisation_error(truth, [(0, 3, 1), (4, 8, 0)]) == pytest.approx(1 / 8)                 # missed
    assert diarisation_error(truth, [(0, 4, 1), (4, 10, 0)]) == pytest.approx(2 / 8)                # invented
    assert diarisation_error(truth, [(0, 8, 1)]) == pytest.approx(4 / 8) and diarisation_error(truth, []) == 1
    assert diarisation_error(truth, [(0, 4.2, 1), (4.2, 8, 0)], collar=0.25) == 0
    assert diarisation_error([*truth, (3, 4, "b")], [(0, 4, 1), (4, 8, 0)]) == pytest.approx(1 / 9)   # both speak, one was found


def test_rttm_is_read_and_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.rttm"
    path.write_text("SPEAKER a 1 1.5 2.0 <NA> <NA> S1 <NA> <NA>\n;; note\nSPEAKER a 1 0.0 1.0 <NA> <NA> S0 <NA> <NA>\n"
                    + "SPKR-INFO a 1 <NA> <NA> <NA> unknown S1 <NA> <NA>\nSPEAKER b 1 0 1 <NA> <NA> S0 <NA>\n")
    assert read_rttm(path) == {"a": [(0.0, 1.0, "S0"), (1.5, 3.5, "S1")], "b": [(0.0, 1.0, "S0")]}
    for line in ("SPEAKER a 1 x 2 <NA> <NA> S", "SPEAKER a 1 0 -1 <NA> <NA> S", "SPEAKER a 1", "SPEAKER a 1 0 nan <NA> <NA> S"):
        path.write_text(line)
        with pytest.raises(ValueError, match="line 1 is no turn"):
            read_rttm(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="names no speaker"):
        read_rttm(path)
