"""SNAC: the codes and waves of the official package, from its files; streams; what is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from audio import load_codec
from audio.snac import SnacCodec, SnacConfig, noise_table

CASES = ("snac", "snac_wide")


class Golden:
    def __init__(self, name: str) -> None:
        with safe_open(ROOT / f"tests/golden/{name}.safetensors", "pt") as file:
            self.about = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}

    def write(self, folder: Path, **changes: object) -> Path:
        """An official folder: config.json and pytorch_model.bin."""
        weights = {k.removeprefix("weights/"): t for k, t in self.tensors.items() if k.startswith("weights/")}
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(self.about | changes))
        return folder

    def levels(self) -> list[torch.Tensor]:
        return [self.tensors[f"codes{n}"] for n in range(len(self.about["vq_strides"]))]


def depth_first(levels: list[torch.Tensor], strides: list[int]) -> torch.Tensor:
    """A frame as Orpheus writes it, spelled out: a code, then for each of its parts the same."""
    def visit(level: int, begin: int, end: int) -> list[torch.Tensor]:
        found = []
        for n in range(begin, end):
            found.append(levels[level][:, n])
            if level + 1 < len(strides):
                parts = strides[level] // strides[level + 1]
                found += visit(level + 1, n * parts, (n + 1) * parts)
        return found
    return torch.stack([torch.stack(visit(0, t, t + 1), 1) for t in range(levels[0].shape[1])], 2)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_waves_equal_the_official_ones(name, tmp_path):
    case = Golden(name)
    codec = load_codec(case.write(tmp_path))
    codes = codec.encode(case.tensors["wav"])
    assert isinstance(codec, SnacCodec) and torch.equal(codes, depth_first(case.levels(), case.about["vq_strides"]))
    assert codec.num_codebooks == codes.shape[1] and codec.frame_rate * codec.config.hop == codec.sample_rate
    assert (codec.decode(codes) - case.tensors["said"]).abs().max() <= 1e-5
    file = load_codec(tmp_path / "pytorch_model.bin")                                       # the file itself
    assert torch.equal(file.encode(case.tensors["wav"]), codes)


@pytest.mark.parametrize("name", CASES)
def test_pieces_joined_equal_the_whole(name, tmp_path):
    codec = SnacCodec.load(Golden(name).write(tmp_path))
    shape, draw = (1, codec.num_codebooks, 3 * codec.context + 4), torch.Generator().manual_seed(1)
    codes = torch.randint(0, codec.codebook_size, shape, generator=draw)
    whole, stream = codec.decode(codes), codec.stream()
    for size in (1, 4):                                                                     # flush() begins anew
        wav = torch.cat([*(stream.decode(piece) for piece in codes.split(size, 2)), stream.flush()], -1)
        assert wav.shape == whole.shape and (wav - whole).abs().max() <= 1e-5
    later = codes.clone()
    later[:, :, codec.context + 1 :] = 0                                                     # no frame hears further than `context`
    hop = codec.config.hop
    assert (codec.decode(later)[..., :hop] - whole[..., :hop]).abs().max() <= 1e-5
    assert (codec.decode(later)[..., hop * codec.context :] - whole[..., hop * codec.context :]).abs().max() > 1e-3


def test_noise_lies_at_its_place_and_is_noise(tmp_path):
    codec = SnacCodec.load(Golden("snac").write(tmp_path))
    codes = torch.zeros(1, 7, 12, dtype=torch.long)
    assert not torch.allclose(codec.decode(codes), codec.decode(codes, at=1), atol=1e-3)
    table = noise_table(0)
    assert abs(float(table.mean())) < 0.01 and abs(float(table.std()) - 1) < 0.01


def test_the_published_codec_for_speech():
    with torch.device("meta"):
        codec = SnacCodec()
    assert sum(p.numel() for p in codec.parameters()) == 19_823_577                          # published: 19.8 M
    assert (codec.num_codebooks, codec.codebook_size, codec.config.hop, codec.context) == (7, 4096, 2048, 3)
    assert [level for level, _ in codec.config.tree] == [0, 1, 2, 2, 1, 2, 2]                  # of Orpheus's decoder.py


@pytest.mark.parametrize(("changes", "said"), [
    ({"attn_window_size": 32}, "attn_window_size is 32"), ({"depthwise": False}, "depthwise is False"),
    ({"vq_strides": [4, 3, 1]}, "no tree"), ({"decoder_rates": [4, 3, 3]}, "different products"), ({"codebook_size": 20}, "shape|expected"),
    ({"encoder_dim": "6"}, "encoder_dim")])
def test_other_settings_are_refused_by_name(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        load_codec(Golden("snac").write(tmp_path, **changes))


def test_a_part_of_a_frame_is_refused():
    codec = SnacCodec(SnacConfig(24000, 4, (2, 2), 8, (2, 2), 5, 2, (2, 1)))
    with pytest.raises(ValueError, match="3 codes, these have 2"):
        codec.decode(torch.zeros(1, 2, 4, dtype=torch.long))
    assert codec.decode(torch.zeros(1, 3, 0, dtype=torch.long)).shape == (1, 1, 0)
