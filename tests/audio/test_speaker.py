"""The speaker encoder gives the vectors of resemblyzer, and voices of one speaker are closer than those of two."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from audio.hub import torch_file
from audio.speaker import embed, embed_voiced, load_speaker_encoder, missing, similarity, without_pauses
from audio.wav import load_wav

SPEECH = ROOT / "assets/speech"
needs_weights = pytest.mark.skipif(bool(missing()), reason="resemblyzer is not installed")


def test_pauses_are_left_out():
    loud = torch.sin(torch.arange(16000) / 5)
    assert len(without_pauses(torch.cat([loud, 1e-4 * loud, loud]))) == 32000 and len(without_pauses(loud[:100])) == 100


@needs_weights
def test_vectors_are_those_of_resemblyzer():
    """resemblyzer 0.1.4: VoiceEncoder().embed_utterance(wav), without its voice detector."""
    wav = load_wav(SPEECH / "allison/followme/call-from.opus", 16_000)[0][0]
    assert embed_voiced(wav)[:6].tolist() == pytest.approx([0.12359694, 0, 0.17941839, 0, 0, 0], abs=1e-4)


@needs_weights
@pytest.mark.parametrize(("damage", "message"), [
    (lambda path, state: path.write_bytes(path.read_bytes()[:9000]), "cannot be read as weights"),
    (lambda path, state: torch.save(state["model_state"], path), "holds no model_state"),
    (lambda path, state: torch.save({"model_state": state["model_state"] | {"linear.bias": torch.zeros(2)}}, path), "linear.bias is"),
    (lambda path, state: torch.save({"model_state": {"linear.bias": torch.zeros(256)}}, path), "lacks linear.weight")])
def test_a_damaged_file_is_named_in_one_line(damage, message, tmp_path, monkeypatch):
    path = tmp_path / "pretrained.pt"
    shutil.copyfile(Path(find_spec("resemblyzer").origin).with_name("pretrained.pt"), path)
    damage(path, torch_file(path))
    monkeypatch.setattr("audio.speaker.find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(ValueError, match=message) as caught:
        load_speaker_encoder.__wrapped__()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@needs_weights
def test_one_voice_is_closer_than_two():
    allison, rms = ([load_wav(SPEECH / who / f"{name}.opus") for name in names] for who, names in (
        ("allison", ("followme/call-from", "followme/pls-hold-while-try")), ("synthetic/rms", ("vm-login", "vm-tomakecall"))))
    assert min(similarity(*allison), similarity(*rms)) > 0.7 > 0.6 > max(similarity(a, b) for a in allison for b in rms)
    assert similarity(allison[0], (torch.zeros(1, 8000), 16_000)) == 0.0 and float(embed(*rms[0]).norm()) == pytest.approx(1)
