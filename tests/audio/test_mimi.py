"""audio/mimi.py computes what the moshi package and transformers compute (golden/make_mimi.py), whole and piece by piece."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import audio.mimi as mimi
from audio import load_codec
from audio.mimi import FILES, MimiCodec, MimiConfig, is_mimi, official_names, read_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "mimi.safetensors"
GATE = 1e-5
LENGTHS = (1, 960, 1919, 1920, 1921, 5000, 9600)
WORST: dict[str, float] = {}
TINY = MimiConfig(width=2, dim=24, layers=2, heads=3, ffn=28, window=5, num_codebooks=9, codebook_size=23, codebook_dim=10)


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\nmax error " + ", ".join(f"{name} {error:.1e}" for name, error in WORST.items()))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t.long() for name, t in load_file(GOLDEN).items()}


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safe_open(GOLDEN, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, Tensor]:
    """In the moshi package's names."""
    return {name.removeprefix("weights/"): tensor for name, tensor in golden.items() if name.startswith("weights/")}


@pytest.fixture(scope="module")
def codec(weights, tmp_path_factory) -> MimiCodec:
    return MimiCodec.load(write(tmp_path_factory.mktemp("mimi"), weights), config=TINY)


@pytest.fixture(scope="module")
def wav() -> Tensor:
    return torch.cat([sound(9600, 3), sound(9600, 4)])


@pytest.fixture(scope="module")
def long() -> Tensor:
    return sound(24 * 1920, 7)


def sound(n: int, seed: int) -> Tensor:
    """(1, 1, n), by the formula of golden/make_mimi.py."""
    k = torch.arange(n, dtype=torch.float64)
    noise = ((k * 12.9898 + seed).sin() * 43758.5453).frac() * 0.6
    return (noise * (k / 3000).sin()).float()[None, None]


def write(folder: Path, tensors: dict[str, Tensor], name: str = FILES[0]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder


def check(name: str, ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    error = float((ours - theirs).abs().max())
    WORST[name] = max(error, WORST.get(name, 0.0))
    assert error <= GATE, f"{name}: {error:.2e}"


def draw(*shape: int, seed: int = 0, high: int = 23) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def transformers_state(codec: MimiCodec, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as transformers writes them: q, k and v apart, rows of q and k as halves of a head."""
    theirs = {ours: name for name, ours in official_names(codec).items() if "rvq" not in name and ".model." not in name
              and ".transformer." not in name and "convtr" not in name and ".conv.conv." not in name}
    kyutai = {name: ours for name, ours in official_names(codec).items() if theirs[ours] != name or ".norm" in name}
    state, dim, heads = {}, TINY.dim, TINY.heads
    for name, tensor in weights.items():
        if "_codebook." in name:
            stem = theirs[kyutai[name.rpartition(".")[0] + ".embedding"]].removesuffix("embedding")
            state[stem + {"_initialized": "initialized", "embedding_sum": "embed_sum"}.get(name.split(".")[-1], "cluster_usage")] = tensor
        elif "in_projs" in name:
            stem = theirs[kyutai[name]].removesuffix("qkv_proj.weight")
            q, k, v = tensor.chunk(3)
            q, k = (w.view(heads, -1, 2, dim).transpose(1, 2).reshape(dim, dim) for w in (q, k))
            state |= {f"{stem}q_proj.weight": q, f"{stem}k_proj.weight": k, f"{stem}v_proj.weight": v}
        else:
            state[theirs[kyutai[name]]] = tensor
    return state


@pytest.fixture(scope="module")
def hf_folder(codec, weights, metadata, tmp_path_factory) -> Path:
    """A folder as transformers saves it; its codebooks are the golden ones, without the entries that fill them up to 32."""
    folder = write(tmp_path_factory.mktemp("hf"), transformers_state(codec, weights), "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads(metadata["hf_config"]) | {"codebook_size": TINY.codebook_size}))
    return folder


# ---- against the official implementations ----

@pytest.mark.parametrize("length", LENGTHS)
def test_codes_equal_moshi(golden, codec, wav, length):
    codes = codec.encode(wav[..., :length])
    assert torch.equal(codes, golden[f"codes/{length}"])
    assert codes.dtype == torch.int64 and codes.shape == (2, 8, -(-length // 1920))


def test_waves_equal_moshi_and_transformers(golden, codec):
    wave = codec.decode(golden["codes"])
    assert wave.shape == (2, 1, 5760)
    check("wave, moshi", wave[..., ::2], golden["decoded"])
    check("wave, transformers", wave[..., ::5], golden["decoded_hf"])
    check("wave of one codebook", codec.decode(golden["codes"][:1, :1])[..., ::5], golden["decoded_1"])


def test_all_codebooks_equal_moshi(golden, weights, wav, tmp_path):
    whole = MimiCodec.load(write(tmp_path, weights), num_codebooks=9, config=TINY)
    codes = whole.encode(wav)
    assert torch.equal(codes, golden["codes_all"])
    check("wave, moshi", whole.decode(codes[:1])[..., ::5], golden["decoded_all"])


def test_offline_far_past_the_window_equals_moshi(golden, codec, long):
    assert torch.equal(codec.encode(long), golden["long_offline"])
    check("wave, moshi", codec.decode(golden["long_live"])[..., ::17], golden["said_offline"])


def test_exact_moshi_equals_its_streams(golden, codec, long):
    """Also in pieces that moshi would refuse; and the artefact is there to be seen."""
    for pieces in ([1920] * 24, [5000, 1, 41079]):
        stream = codec.stream(exact_moshi=True)
        codes = torch.cat([stream.encode(piece) for piece in long.split(pieces, 2)], 2)
        assert torch.equal(codes, golden["long_live"])
        said = torch.cat([stream.decode(piece) for piece in codes.split([3, 0, 20, 1], 2)], 2)
        check("live wave, moshi", said[..., ::17], golden["said_live"])
    assert (golden["long_live"] != golden["long_offline"]).any()
    assert (golden["said_live"] - golden["said_offline"]).abs().max() > 0.1


def test_the_layout_of_transformers_gives_the_same(golden, metadata, codec, hf_folder, wav):
    assert sorted(load_file(hf_folder / "model.safetensors")) == json.loads(metadata["hf_names"])
    theirs = load_codec(hf_folder)
    assert theirs.config == TINY
    pairs = zip(theirs.state_dict().values(), codec.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    for length in LENGTHS:
        codes, whole = golden[f"codes_hf/{length}"], length // 1920
        if length % 1920 in (0, 1919):              # transformers fills up each layer, not the sound: the last frame may differ
            whole = codes.shape[2]
        assert torch.equal(theirs.encode(wav[..., :length])[..., :whole], codes[..., :whole])


# ---- what holds for any codec here ----

def test_it_says_what_it_is(codec):
    assert (codec.name, codec.sample_rate, codec.frame_rate, codec.num_codebooks, codec.codebook_size) == ("mimi", 24000, 12.5, 8, 23)
    assert codec.config == TINY and not codec.training and not any(p.requires_grad for p in codec.parameters())
    assert MimiConfig().hop == 1920


def test_parameters_of_the_full_size_are_the_published_ones():
    with torch.device("meta"):
        full, eight = MimiCodec(num_codebooks=32), MimiCodec()
    assert sum(p.numel() for p in full.parameters()) == sum(p.numel() for p in eight.parameters()) == 79_308_609
    assert sum(b.numel() for b in full.buffers()) == 32 * 2048 * 256
    assert full.frame_rate == 12.5 and eight.num_codebooks == 8 and eight.codebook_size == 2048
    kyutai = [name for name in official_names(eight) if "rvq" in name or ".model." in name or ".transformer." in name or "convtr" in name]
    assert len(kyutai) + len(["downsample"]) == 318 - 2 * 32         # a codebook is one here, three tensors there


@pytest.mark.parametrize("pieces", [[1920] * 24, [1] * 3 + [46077], [700, 0, 1220, 9999, 34161], [46080], [100]])
def test_streamed_encoding_equals_offline(codec, long, pieces):
    wav, stream = long[..., : sum(pieces)], codec.stream()
    for _ in range(2):                              # a flushed stream starts afresh
        codes = [stream.encode(piece) for piece in wav.split(pieces, 2)]
        assert sum(piece.shape[2] for piece in codes) == sum(pieces) // 1920
        assert torch.equal(torch.cat([*codes, stream.flush_encode()], 2), codec.encode(wav))


@pytest.mark.parametrize("pieces", [[1] * 24, [5, 0, 2, 17], [24]])
def test_streamed_decoding_equals_offline(codec, pieces):
    codes, stream = draw(2, 8, sum(pieces), seed=1), codec.stream()
    for _ in range(2):
        waves = [stream.decode(piece) for piece in codes.split(pieces, 2)]
        assert [wave.shape[2] for wave in waves] == [1920 * n for n in pieces]
        check("stream", torch.cat([*waves, stream.flush()], 2), codec.decode(codes))


def test_long_sound_in_pieces_equals_the_whole(codec, long, monkeypatch):
    codes, wave = codec.encode(long), codec.decode(draw(1, 8, 24))
    monkeypatch.setattr(mimi, "PIECE", 5)
    assert torch.equal(codec.encode(long), codes)
    check("pieces", codec.decode(draw(1, 8, 24)), wave)


def test_the_future_changes_nothing(codec, long):
    changed = long.clone()
    changed[..., 10 * 1920:] += 0.1
    assert torch.equal(codec.encode(changed)[..., :10], codec.encode(long)[..., :10])
    codes = draw(1, 8, 24)
    other = codes.clone()
    other[..., 10:] = (other[..., 10:] + 1) % 23
    check("causality", codec.decode(other)[..., : 10 * 1920], codec.decode(codes)[..., : 10 * 1920])


def test_a_batch_equals_its_items(codec, wav):
    assert torch.equal(codec.encode(wav), torch.cat([codec.encode(x[None]) for x in wav]))
    codes, stream = draw(3, 8, 4), codec.stream()
    check("batch", codec.decode(codes), torch.cat([codec.decode(x[None]) for x in codes]))
    check("batch", stream.decode(codes), codec.decode(codes))


def test_fewer_codebooks_are_a_prefix(golden, weights, wav, tmp_path):
    folder = write(tmp_path, weights)
    for n in (1, 3, 8):
        codec = MimiCodec.load(folder, num_codebooks=n, config=TINY)
        assert codec.num_codebooks == n and torch.equal(codec.encode(wav), golden["codes_all"][:, :n])
    for n in (0, 10):
        with pytest.raises(ValueError, match=f"num_codebooks is {n}, this Mimi has 1..9"):
            MimiCodec.load(folder, num_codebooks=n, config=TINY)


# ---- files ----

def spelt_anew(weights: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = tensor
    return found


def test_every_spelling_is_read(codec, weights, tmp_path):
    """The published file has fused attention; older ones other codebook names; the newer repository another file name."""
    fused = ("in_projs.0.weight", "in_proj_weight"), ("out_projs.0", "out_proj")
    old = ("_codebook._initialized", "_codebook.inited"), ("cluster_usage", "cluster_size")
    for n, pairs in enumerate((fused, (*old, ("embedding_sum", "embed_avg")), (*fused, *old, ("embedding_sum", "embed_sum")))):
        state = spelt_anew(weights, *pairs)
        assert state.keys() != weights.keys()
        again = load_state(tmp_path / str(n), state)
        assert all(torch.equal(one, other) for one, other in zip(again.values(), codec.state_dict().values(), strict=True))


def load_state(folder: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return MimiCodec.load(write(folder, state, FILES[1]), config=TINY).state_dict()


def test_load_codec_knows_them_by_content(codec, weights, hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mimi, "MimiConfig", lambda **told: replace(TINY, **told))           # what no config.json tells is as published
    kyutai = write(tmp_path / "repo", weights)
    save_file({"text_emb.weight": torch.zeros(2)}, kyutai / "model.safetensors")        # the language model beside it
    (kyutai / "config.json").write_text(json.dumps({"model_type": "moshi", "dim": 4096}))
    named = write(tmp_path / "named", weights, "mine.safetensors")
    (named / "config.json").write_text(json.dumps({"mimi_name": "mine.safetensors"}))
    for path in (kyutai, kyutai / FILES[0], named, write(tmp_path / "new", weights, FILES[1]), hf_folder, hf_folder / "model.safetensors"):
        assert is_mimi(path)
        assert isinstance(load_codec(path), MimiCodec)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((kyutai / FILES[0]).read_bytes()[:2000])
    for path in (tmp_path, kyutai / "model.safetensors", cut, GOLDEN.with_name("higgs_codec.safetensors")):
        assert not is_mimi(path)
    with pytest.raises(ValueError, match="contains no known codec.*Mimi's file or folder"):
        load_codec(kyutai / "model.safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        MimiCodec.load(cut)
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="no Mimi at .*; name a folder with tokenizer-e351c8d8"):
            MimiCodec.load(path)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("upsample.convtr.convtr.convtr.weight", None, "lacks upsample.convtr.weight;"),
    ("encoder.model.15.conv.conv.weight", torch.zeros(3), "holds the unknown encoder.model.15.conv.conv.weight;"),
    ("encoder.model.0.conv.conv.bias", torch.zeros(3), r"encoder.0.conv.bias is \(3,\), expected \(2,\)"),
    ("decoder.model.14.conv.conv.bias", torch.full((1,), torch.inf), "decoder.14.conv.bias holds NaN or infinity"),
    ("quantizer.rvq_rest.vq.layers.2._codebook.cluster_usage", None, "lacks acoustic.codebooks.2.table and holds .*2._codebook"),
    ("quantizer.rvq_rest.vq.layers.2._codebook.cluster_usage", torch.full((23,), torch.nan), "acoustic.codebooks.2.table holds NaN"),
    ("quantizer.rvq_rest.vq.layers.8._codebook.embedding_sum", torch.zeros(23, 10), "unknown quantizer.rvq_rest.vq.layers.8._codebook"),
    ("encoder_transformer.transformer.layers.0.self_attn.in_proj_weight", torch.zeros(72, 24), r"unknown .*in_proj.*\(twice\);"),
])
def test_a_wrong_file_is_named_with_its_tensor(weights, tmp_path, name, change, message):
    state = {key: tensor for key, tensor in (weights | {name: change}).items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_state(tmp_path, state)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_size_asks_for_its_config(weights, tmp_path):
    with pytest.raises(ValueError, match="lacks acoustic.codebooks.*name the right file, or the config it was made with"):
        MimiCodec.load(write(tmp_path, {name: t for name, t in weights.items() if "rvq_rest.vq.layers.5" not in name}), config=TINY)
    with pytest.raises(ValueError, match="lacks .*decoder_transformer.2"):
        MimiCodec.load(tmp_path, config=replace(TINY, layers=3))


def test_configs_of_transformers(metadata, tmp_path):
    path = tmp_path / "config.json"

    def told(**changes: object) -> MimiConfig:
        path.write_text(json.dumps(json.loads(metadata["hf_config"]) | changes))
        return read_config(path)

    assert told() == replace(TINY, codebook_size=32) and told(codebook_size=2048, num_quantizers=32).num_codebooks == 32
    path.write_text('{"model_type": "mimi", "rope_theta": 10000.0, "frame_rate": 12.5}')        # as in the published repository
    assert read_config(path) == MimiConfig() == read_config(tmp_path / "none.json")
    assert told(model_type="moshi") == MimiConfig()
    for changes, message in (({"sampling_rate": 16000}, "sampling_rate is 16000, this codec supports 24000"),
                             ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 1000000.0"),
                             ({"hidden_size": 26}, "not a multiple of 2 x 3"), ({"use_causal_conv": False}, "use_causal_conv is False"),
                             ({"sliding_window": 1}, "window is 1, expected"),
                             ({"upsampling_ratios": [8, 0]}, r"ratios is \(8, 0\), expected"), ({"num_filters": "x"}, "width is 'x'")):
        with pytest.raises(ValueError, match=message):
            told(**changes)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(path)


# ---- what cannot be encoded or decoded ----

@pytest.mark.parametrize(("wav", "message"), [
    (torch.zeros(1, 1, 0), "sound is empty"),
    (torch.zeros(0, 1, 960), "sound is empty"),
    (torch.zeros(1, 960), r"expected float \(B, 1, W\)"),
    (torch.zeros(1, 2, 960), r"expected float \(B, 1, W\)"),
    (torch.zeros(1, 1, 960, dtype=torch.int16), "torch.int16"),
    (torch.full((1, 1, 960), float("nan")), "NaN or infinite"),
])
def test_sound_that_cannot_be_encoded(codec, wav, message):
    for encode in (codec.encode, codec.stream().encode):
        if wav.dim() == 3 and wav.shape[2] == 0 and encode != codec.encode:
            assert encode(wav).shape == (1, 8, 0)   # a stream may have nothing to hear
            continue
        with pytest.raises(ValueError, match=message) as caught:
            encode(wav)
        assert "\n" not in str(caught.value)


def test_codes_that_cannot_be_decoded(codec):
    stream = codec.stream()
    for codes, message in ((draw(1, 9, 3), "expected integers"), (draw(8, 3), "expected integers"),
                           (draw(1, 8, 3).float(), "expected integers"),
                           (draw(1, 8, 3) - 40, "run from -40"), (torch.full((1, 8, 3), 23), "the codec has 0..22")):
        for decode in (codec.decode, stream.decode):
            with pytest.raises(ValueError, match=message):
                decode(codes)
    assert codec.decode(draw(1, 8, 0)).shape == (1, 1, 0)
    assert torch.equal(codec.decode(draw(1, 8, 3).to(torch.uint8)), codec.decode(draw(1, 8, 3)))


def test_a_stream_is_flushed_after_it_began(codec):
    for flush in (codec.stream().flush, codec.stream().flush_encode):
        with pytest.raises(AssertionError, match="before"):
            flush()
