"""audio/ecapa.py computes the vector of a voice that qwen-tts computes (golden/make_qwen_tts.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from audio.ecapa import SpeakerConfig, SpeakerEncoder

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "qwen_speaker.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} | {"config": json.loads(file.metadata()["config"])}


def write(folder: Path, golden: dict[str, Tensor], **more: Tensor) -> Path:
    weights = {name.removeprefix("weights/"): t for name, t in golden.items() if name.startswith("weights/")}
    save_file(weights | {"talker.codec_head.weight": torch.zeros(2)} | more, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    return folder


def test_vector_equals_that_of_the_package(golden, tmp_path):
    encoder, wav = SpeakerEncoder.load(write(tmp_path, golden)), golden["wav"].float()[None]
    vector = encoder.embed(wav)
    assert vector.shape == (24,) and float((vector - golden["vector"]).abs().max()) <= 1e-5
    assert bool(encoder.embed(wav[:, :100]).isfinite().all())                # shorter than what its borders reflect
    with pytest.raises(ValueError, match="empty"):
        encoder.embed(wav[:, :0])


def test_what_does_not_fit_is_refused_by_name(golden, tmp_path):
    with pytest.raises(ValueError, match="holds the unknown more"):
        SpeakerEncoder.load(write(tmp_path, golden, **{"speaker_encoder.more": torch.zeros(1)}))
    save_file({"talker.codec_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no speaker encoder; name the folder of a Base model"):
        SpeakerEncoder.load(tmp_path)
    with pytest.raises(ValueError, match="do not belong together"):
        SpeakerConfig(enc_channels=(8, 8, 8))


@pytest.mark.parametrize("width, count", [(1024, 8_854_336), (2048, 12_001_088)])
def test_published_sizes(width, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in SpeakerEncoder(SpeakerConfig(enc_dim=width)).parameters()) == count     # Base minus CustomVoice
