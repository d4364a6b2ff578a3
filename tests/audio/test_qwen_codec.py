"""audio/qwen.py computes what the codec of qwen-tts computes (golden/make_qwen_tts.py), whole and piece by piece."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from audio import load_codec
from audio.qwen import QwenCodec

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "qwen_codec.safetensors"
GATE = 1e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} | {"config": json.loads(file.metadata()["config"])}


@pytest.fixture(scope="module")
def model_folder(golden, tmp_path_factory) -> Path:
    """As released: the codec lies in a folder of the model's."""
    folder = tmp_path_factory.mktemp("qwen") / "speech_tokenizer"
    folder.mkdir()
    save_file({name.removeprefix("weights/"): t for name, t in golden.items() if name.startswith("weights/")}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    return folder.parent


@pytest.fixture(scope="module")
def codec(model_folder) -> QwenCodec:
    return load_codec(model_folder)


def sound(n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (0.3 * torch.sin(torch.arange(n) * 0.07) + 0.1 * torch.randn(n, generator=g)).half().float()


@pytest.mark.parametrize("n", [1, 1919, 1920, 1921, 5000, 19200])
def test_codes_equal_those_of_the_package(codec, golden, n):
    assert torch.equal(codec.encode(sound(n, n)[None, None])[0], golden[f"codes_{n}"])


def test_sound_equals_that_of_the_package_whole_and_in_pieces(codec, golden):
    whole = codec.decode(golden["codes"][None])
    # Below GATE where the file was made (AVX-512); the plainest instruction set adds in another order, 1.3e-5 away.
    assert whole.shape == (1, 1, 1920 * 10) and float((whole[0, 0] - golden["wav"]).abs().max()) <= 2 * GATE
    stream, at = codec.stream(), 0
    pieces = []
    for n in (1, 2, 4, 3):
        pieces.append(stream.decode(golden["codes"][None, :, at : at + n]))
        at += n
    assert torch.allclose(torch.cat([*pieces, stream.flush()], 2), whole, atol=2 * GATE)
    encoder, wav = codec.stream(), sound(19200, 19200)[None, None, :18001]
    codes = [encoder.encode(piece) for piece in wav.split(3001, 2)]
    assert torch.equal(torch.cat([*codes, encoder.flush_encode()], 2), codec.encode(wav))


def test_what_does_not_fit_is_refused_by_name(model_folder, golden, tmp_path):
    weights = {name.removeprefix("weights/"): t for name, t in golden.items() if name.startswith("weights/")}

    def load(weights: dict[str, Tensor], **changes: object) -> None:
        save_file(weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(golden["config"] | changes))
        QwenCodec.load(tmp_path)

    load(weights)
    missing = "decoder.pre_conv.conv.weight"
    with pytest.raises(ValueError, match="lacks pre_conv.conv.weight"):
        load({name: t for name, t in weights.items() if name != missing})
    with pytest.raises(ValueError, match="holds the unknown more"):
        load(weights | {"decoder.more": torch.zeros(1)})
    with pytest.raises(ValueError, match="input_sample_rate is 16000"):
        load(weights, input_sample_rate=16000)
    with pytest.raises(ValueError, match="encoder_valid_num_quantizers differs"):
        load(weights, encoder_valid_num_quantizers=5)
    with pytest.raises(ValueError, match="contains no known codec"):
        load_codec(tmp_path / "config.json")


def test_published_size():
    with torch.device("meta"):
        codec = QwenCodec()
    encoder = sum(t.numel() for t in codec.encoder.state_dict().values()) + 16 * 2048 * 256       # 16 codebooks are not read
    tables = 16 * 2048                                                          # of each entry of a codebook the file has its usage, too
    decoder = sum(t.numel() for name, t in codec.state_dict().items() if not name.startswith("encoder."))
    assert decoder + tables == 114_323_137 and encoder + 32 * 2048 + 32 + decoder + tables == 170_557_441
