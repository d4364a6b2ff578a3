"""audio/higgs.py, hubert.py and whisper.py compute what transformers and boson-multimodal compute (golden/make_higgs_codec.py)."""

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from audio import load_codec
from audio.higgs import UNUSED, Falling, HiggsCodec, HiggsCodecConfig, is_higgs, official_names, read_config, resample_24_to_16, snake
from audio.hubert import NAMES, Hubert, HubertConfig, fold_weight_norm, hubert_names, load_strict
from audio.whisper import WhisperConfig, WhisperEncoder, log_mel

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
GATE = 1e-5
LENGTHS = (960, 1201, 1500, 1711, 2880)
WORST: dict[str, float] = {}
TINY = HiggsCodecConfig(encoder_width=1, decoder_width=32, acoustic_dim=10, codebook_size=32, codebook_dim=6,
                        hubert=HubertConfig(dim=18, layers=2, heads=3, ffn=26, conv_dims=(6,) * 7, position_kernel=16, position_groups=3))


class Golden:
    """One golden file: metadata, tensors by name, and the official weights in float32."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.metadata = file.metadata()
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
        self.config = json.loads(self.metadata["config"])
        self.weights = {key.removeprefix("weights/"): t.float() for key, t in self.tensors.items() if key.startswith("weights/")}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor.float() if tensor.is_floating_point() else tensor.long()

    def write(self, folder: Path) -> Path:
        """The layout of transformers."""
        folder.mkdir(exist_ok=True)
        save_file(self.weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\nmax error " + ", ".join(f"{name} {error:.1e}" for name, error in WORST.items()))


@pytest.fixture(scope="module")
def case() -> Golden:
    return Golden("higgs_codec")


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory) -> Path:
    return case.write(tmp_path_factory.mktemp("higgs"))


@pytest.fixture(scope="module")
def codec(folder) -> HiggsCodec:
    return load_codec(folder)


def check(name: str, ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    error = float((ours.detach() - theirs).abs().max())
    WORST[name] = max(error, WORST.get(name, 0.0))
    assert error <= GATE, f"{name}: {error:.2e}"


def draw(*shape: int, seed: int = 0, high: int = 32) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# ---- the tokenizer against its official implementations ----

@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pad", ["mult960", "hf", "boson"])
def test_codes_equal_the_official_ones(case, codec, folder, pad, length):
    codes = HiggsCodec.load(folder, pad=pad).encode(case["wav"][..., :length])
    assert torch.equal(codes, case[f"codes_{pad}/{length}"])
    assert torch.equal(codec.encode(case["wav"][..., :length].double()), case[f"codes_mult960/{length}"])
    assert codes.dtype == torch.int64 and (pad != "mult960" or codes.shape == (2, 8, math.ceil(length / 960)))


def test_padding_to_whole_frames_makes_the_two_official_codecs_agree(case, folder):
    for n in (960, 2880):
        whole = case[f"codes_mult960/{n}"]
        assert torch.equal(case[f"codes_hf/{n}"], whole) and torch.equal(case[f"codes_boson/{n}"], whole)
    apart = case["codes_hf/1500"] != case["codes_boson/1500"]
    assert apart.any()                              # 540 samples into a frame each has a padding of its own


def test_waves_equal_the_official_ones(case, codec):
    check("wave, transformers", codec.decode(case["codes"]), case["decoded"])
    check("wave, boson", codec.decode(case["codes"][:1]), case["decoded_boson"])
    check("wave, transformers", codec.decode(case["codes"][:1, :3, :1]), case["decoded_3"])


@pytest.mark.parametrize("length", LENGTHS)
def test_semantic_states_equal_transformers(case, codec, length):
    with torch.no_grad():
        states = codec.semantic_states(case["wav"][:, 0, :length])
    check("semantic states", states.transpose(1, 2), case[f"states/{length}"])


def test_the_resampler_is_the_formula(case):
    """Output 2 i + j is the sum over taps m of x[3 i + m - 10] * sinc(t) cos^2(pi t / 12) 0.66, t = 1.98 ((m - 10) / 3 - j / 2) in +-6."""
    x = case["wav"][0, 0, :61].double()
    wanted = torch.zeros(math.ceil(2 * 61 / 3), dtype=torch.float64)
    for n in range(len(wanted)):
        i, j = divmod(n, 2)
        for m in range(23):
            t = max(-6.0, min(6.0, ((m - 10) / 3 - j / 2) * 1.98))
            sinc = math.sin(math.pi * t) / (math.pi * t) if t else 1.0
            if 0 <= 3 * i + m - 10 < 61:
                wanted[n] += x[3 * i + m - 10] * sinc * math.cos(math.pi * t / 12) ** 2 * 1.98 / 3
    check("resampler", resample_24_to_16(x[None].float())[0], wanted.float())


# ---- what holds for any codec here ----

def test_it_says_what_it_is(codec):
    assert (codec.name, codec.sample_rate, codec.frame_rate, codec.num_codebooks, codec.codebook_size) == ("higgs", 24000, 25.0, 8, 32)
    assert codec.config == TINY and not codec.training and not any(p.requires_grad for p in codec.parameters())
    full = HiggsCodecConfig()
    assert (full.hop, full.semantic_stride, full.dim, full.num_codebooks, full.codebook_size) == (960, 2, 1024, 8, 1024)


def test_a_batch_equals_its_items(case, codec):
    wav, codes = case["wav"], draw(3, 8, 4)
    assert torch.equal(codec.encode(wav), torch.cat([codec.encode(x[None]) for x in wav]))
    check("batch", codec.decode(codes), torch.cat([codec.decode(x[None]) for x in codes]))


@pytest.mark.parametrize("pieces", [[1] * 40, [7, 0, 25, 8], [40], [30, 10], [3]])
def test_streamed_decoding_equals_offline(codec, pieces):
    codes, stream = draw(2, 8, sum(pieces), seed=1), codec.stream()
    for _ in range(2):                              # a flushed stream starts afresh
        waves = [stream.decode(piece) for piece in codes.split(pieces, 2)]
        assert sum(wav.shape[2] for wav in waves) == 960 * max(0, sum(pieces) - 11)
        check("stream", torch.cat([*waves, stream.flush()], 2), codec.decode(codes))


def test_samples_depend_on_no_frame_beyond_the_context(codec):
    """A stream's context is enough: a changed frame moves no sample further away; and it is not too much by more than one."""
    assert codec.context == 11
    codes = draw(1, 8, 40, seed=2)
    changed = codes.clone()
    changed[..., 20] = (changed[..., 20] + 1) % 32
    far = (codec.decode(codes) != codec.decode(changed))[0, 0].view(40, 960).any(1).nonzero()[:, 0] - 20
    assert (int(far.min()), int(far.max())) == (-10, 10)


def test_parameters_of_the_full_size_are_the_published_ones():
    with torch.device("meta"):
        full = HiggsCodec()
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in full.named_children()}
    assert counts == {"acoustic_encoder": 51_314_496, "acoustic_decoder": 20_238_113, "encoder_semantic": 14_747_136,
                      "semantic_model": 94_370_944 - 128,           # weight norm has a length for each of 128 taps; folded here
                      "fc": 1_049_600, "fc2": 262_400, "quantizer": 1_057_280}
    assert sum(counts.values()) == 200_343_777 - 16_516_608 - 787_200 - 128       # less decoder_semantic and fc1
    assert sum(b.numel() for b in full.buffers()) == 8 * 1024 * 64


# ---- files ----

def boson_state(codec: HiggsCodec) -> tuple[dict[str, Tensor], list[str]]:
    """A model.pth, acoustic convolutions under weight norm in its old spelling; and each boson name with transformers'."""
    fairseq = {f"semantic_model.{theirs.format(n)}" for ours, hf, theirs in NAMES if theirs != hf for n in range(7)}
    theirs = {ours: official for official, ours in official_names(codec.config).items() if official not in fairseq}
    state, pairs = {}, {}
    for name, tensor in codec.state_dict().items():
        module, _, leaf = name.rpartition(".")
        name, before = f"{theirs.get(module, module)}.{leaf}", set(state)
        hf = name if module.startswith("semantic_model") else f"{module}.{leaf}"
        positional = name == "semantic_model.encoder.pos_conv_embed.conv.weight"
        if leaf == "weight" and (positional or (module.startswith("acoustic") and tensor.dim() == 3)):
            g = tensor.norm(dim=(0, 1) if positional else (1, 2), keepdim=True)
            forms = ("parametrizations.weight.original0", "parametrizations.weight.original1") if positional else ("weight_g", "weight_v")
            state |= {name.replace("weight", forms[0]): g, name.replace("weight", forms[1]): 3 * tensor}        # v's length is no matter
            hf = hf if not positional else None
        else:
            state[name] = tensor
        pairs |= {new: hf or new for new in state.keys() - before}
    return state, sorted(f"{new} {hf}" for new, hf in pairs.items())


def test_boson_files_come_back_as_they_were(case, codec, tmp_path):
    """The names are those with which the official package gave equal codes; the weights survive being split and folded."""
    state, pairs = boson_state(codec)
    assert hashlib.sha256("\n".join(pairs).encode()).hexdigest() == case.metadata["boson_names_sha256"]
    extra = {"decoder_semantic.conv1.conv.weight", "fc_post1.bias", "quantizer.vq.layers.3._codebook.embed_avg",
             "quantizer.vq.layers.3._codebook.inited", "semantic_model.masked_spec_embed"}
    torch.save(state | {name: torch.zeros(2) for name in extra}, tmp_path / "model.pth")
    back = HiggsCodec.load(tmp_path, TINY)
    check("folded weights", torch.cat([t.flatten() for t in back.state_dict().values()]),
          torch.cat([t.flatten() for t in codec.state_dict().values()]))
    assert torch.equal(back.encode(case["wav"]), codec.encode(case["wav"]))
    check("wave of folded weights", back.decode(case["codes"]), codec.decode(case["codes"]))


def test_transformers_files_come_back_as_they_were(case, codec, folder, tmp_path):
    again = HiggsCodec.load(folder / "model.safetensors")                  # one file, config.json beside it
    pairs = zip(again.state_dict().values(), codec.state_dict().values(), strict=True)
    assert again.config == TINY and all(torch.equal(ours, theirs) for ours, theirs in pairs)
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes((folder / "model.safetensors").read_bytes())
    assert torch.equal(HiggsCodec.load(alone, TINY).encode(case["wav"]), codec.encode(case["wav"]))
    with pytest.raises(ValueError, match="lacks .* and \\d+ more"):        # without a config it is taken for the published one
        HiggsCodec.load(alone)


def test_the_codec_in_the_file_of_higgs_audio_v3_is_found(case, codec, folder, tmp_path):
    inside = {f"tied.embedding.modality_embeddings.0.model.{name}": t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(inside | {"body.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "higgs_multimodal_qwen3", "text_config": {}}))
    assert is_higgs(tmp_path) and torch.equal(HiggsCodec.load(tmp_path, TINY).encode(case["wav"]), codec.encode(case["wav"]))
    with pytest.raises(ValueError, match="lacks"):               # its config.json says nothing of the codec: the published sizes hold
        load_codec(tmp_path)


def test_load_codec_knows_them_by_content(case, codec, folder, tmp_path):
    assert is_higgs(folder) and is_higgs(folder / "model.safetensors")
    torch.save(boson_state(codec)[0], tmp_path / "any.pth")
    assert is_higgs(tmp_path / "any.pth") and not is_higgs(tmp_path) and not is_higgs(GOLDEN / "qwen2.safetensors")
    (tmp_path / "config.json").write_text(case.metadata["boson_config"])
    (tmp_path / "any.pth").rename(tmp_path / "model.pth")
    assert is_higgs(tmp_path)
    with pytest.raises(ValueError, match=r"acoustic_encoder.* is \(1,\), expected|lacks"):         # boson's widths stand in its code
        load_codec(tmp_path)
    for name, data in (("cut.pth", (tmp_path / "model.pth").read_bytes()[:3000]), ("cut.safetensors", b"\0" * 9), ("x.wav", b"RIFF")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="contains no known codec; name one of"):
            load_codec(tmp_path / name)


def test_configs_of_both_layouts(case, tmp_path):
    path = tmp_path / "config.json"

    def told(**changes: object) -> HiggsCodecConfig:
        path.write_text(json.dumps({key: value for key, value in ({**official} | changes).items() if value is not None}))
        return read_config(path)

    official = {"n_filters": 32, "D": 256, "codebook_dim": 64, "target_bandwidths": [0.5, 1, 1.5, 2, 4], "ratios": [8, 5, 4, 2, 3],
                "sample_rate": 24000, "bins": 1024, "n_q": 8, "semantic_techer": "hubert_base_general"}
    assert told() == HiggsCodecConfig()
    for changes, message in (({"sample_rate": 16000}, "sample_rate is 16000"), ({"semantic_techer": "wavlm_base_plus"}, "wavlm_base_plus"),
                             ({"n_q": None}, "lacks 'n_q'"), ({"ratios": [8, 5, 4]}, "multiple of 480"),
                             ({"n_q": 0}, "num_codebooks is 0"), ({"ratios": 960}, "not a Higgs tokenizer's config"),
                             ({"downsample_mode": "avg"}, "downsample_mode is avg, this codec supports step_down")):
        with pytest.raises(ValueError, match=message):
            told(**changes)
    official = case.config
    with pytest.raises(ValueError, match=r"strides is \[2, 1\]"):
        told(strides=[2, 1])
    assert told() == TINY and told(target_bandwidths=[0.5]) == replace(TINY, num_codebooks=4)
    dac = official["acoustic_model_config"]
    with pytest.raises(ValueError, match="decoder ratios"):
        told(acoustic_model_config=dac | {"upsampling_ratios": [3, 2, 4, 5, 8]})
    with pytest.raises(ValueError, match="lacks 'semantic_model_config'"):
        told(semantic_model_config=None)
    assert read_config(tmp_path / "none.json") is None
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(path)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("fc2.bias", None, "lacks fc2.bias;"),
    ("fc3.bias", torch.zeros(3), "holds the unknown fc3.bias;"),
    ("acoustic_encoder.conv1.weight_g", torch.ones(1, 1, 1), "holds the unknown acoustic_encoder.conv1.weight_g;"),
    ("fc_prior.bias", torch.zeros(28), "holds the unknown fc_prior.bias|unknown fc.bias"),
    ("fc.bias", torch.zeros(3), r"fc.bias is \(3,\), expected \(28,\)"),
    ("quantizer.quantizers.7.codebook.embed", torch.full((32, 6), float("nan")), "7.codebook.embed holds NaN"),
])
def test_a_wrong_file_is_named_with_its_tensor(case, tmp_path, name, change, message):
    weights = {key: tensor for key, tensor in (case.weights | {name: change}).items() if tensor is not None}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        HiggsCodec.load(tmp_path, TINY)
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_tensors(case, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.pth"):
        HiggsCodec.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no Higgs tokenizer at"):
        HiggsCodec.load(tmp_path / "x.pth")
    path = tmp_path / "model.pth"
    for value, message in (({"state_dict": {}}, "more than a dict of tensors"), ({"x": Path("/")}, "cannot be read as weights")):
        torch.save(value, path)
        with pytest.raises(ValueError, match=message):
            HiggsCodec.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        HiggsCodec.load(path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        HiggsCodec.load(path)


@pytest.mark.parametrize(("wav", "message"), [
    (torch.zeros(1, 1, 0), "sound is empty"),
    (torch.zeros(0, 1, 960), "sound is empty"),
    (torch.zeros(1, 960), r"expected float \(B, 1, W\)"),
    (torch.zeros(1, 2, 960), r"expected float \(B, 1, W\)"),
    (torch.zeros(1, 1, 960, dtype=torch.int16), "torch.int16"),
    (torch.full((1, 1, 960), float("nan")), "NaN or infinite"),
])
def test_sound_that_cannot_be_encoded(codec, wav, message):
    with pytest.raises(ValueError, match=message) as caught:
        codec.encode(wav)
    assert "\n" not in str(caught.value)


def test_codes_that_cannot_be_decoded(codec):
    stream = codec.stream()
    for codes, message in ((draw(1, 9, 3), "expected integers"), (draw(8, 3), "expected integers"),
                           (draw(1, 8, 3).float(), "expected integers"),
                           (draw(1, 8, 3) - 40, "run from -40"), (torch.full((1, 8, 3), 32), "the codec has 0..31")):
        for decode in (codec.decode, stream.decode):
            with pytest.raises(ValueError, match=message):
                decode(codes)
    assert codec.decode(draw(1, 8, 0)).shape == (1, 1, 0)
    assert torch.equal(codec.decode(draw(1, 8, 3).to(torch.uint8)), codec.decode(draw(1, 8, 3)))


def test_pad_modes_are_checked(folder):
    with pytest.raises(ValueError, match="no pad mode 'zero'; choose one of: mult960, boson, hf"):
        HiggsCodec.load(folder, pad="zero")
    for pad in ("hf", "boson"):
        with pytest.raises(ValueError, match="959 samples are less than one frame of 960"):
            HiggsCodec.load(folder, pad=pad).encode(torch.zeros(1, 1, 959))
    assert HiggsCodec.load(folder).encode(torch.zeros(1, 1, 1)).shape == (1, 8, 1)


# ---- HuBERT ----

HUBERT = HubertConfig(dim=24, layers=3, heads=3, ffn=26, conv_dims=(6,) * 7, position_kernel=13, position_groups=3)
OTHERS = r"masked_spec_embed|mask_emb|final_proj\..*|label_embs_concat|lm_head\..*"           # training and other heads


def load_hubert(state: dict[str, Tensor], config: HubertConfig) -> Hubert:
    """A HuBERT with official tensors: transformers' names, bare or under `hubert.`, or fairseq's."""
    model = Hubert(config)
    load_strict(model, {name.removeprefix("hubert."): t for name, t in state.items()}, hubert_names(config), OTHERS, "HuBERT")
    return model.eval()


def test_hubert_states_equal_transformers():
    golden = Golden("hubert")
    model = load_hubert(golden.weights, HUBERT)
    with torch.no_grad():
        states = model(golden["wav"])
    assert len(states) == 4 and states[0].shape[1] == HUBERT.frames(2113) == 6
    for n, state in enumerate(states):
        check("HuBERT", state, golden[f"states/{n}"])


def test_hubert_reads_every_spelling():
    """Weight norm old, new and folded; names bare, under hubert., and fairseq's as transformers' own converter maps them."""
    golden = Golden("hubert")
    model, conv = load_hubert(golden.weights, HUBERT), "encoder.pos_conv_embed.conv"
    check("folded weights", model.position.weight, golden["positional"])
    old = {name.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): t
           for name, t in golden.weights.items()}
    assert f"{conv}.weight_g" in old and f"{conv}.weight" in fold_weight_norm(old)
    mapping = json.loads(golden.metadata["mapping"])
    back = {hf.replace("encoder.layers.*.", ""): theirs.removeprefix("w2v_model.") for theirs, hf in mapping.items()}

    def fairseq(name: str) -> str:
        name = re.sub(r"(conv_layers\.\d+)\.conv\b", r"\1.0", name).replace("conv_layers.0.layer_norm", "conv_layers.0.2")
        found = re.fullmatch(r"(encoder\.layers\.\d+\.)?(.+?)(\.weight\w*|\.bias)?", name)
        return f"{found[1] or ''}{back.get(found[2], found[2])}{found[3] or ''}"

    named = {fairseq(name): tensor for name, tensor in old.items()}
    assert {"post_extract_proj.bias", "layer_norm.weight", "encoder.pos_conv.0.weight_g", "encoder.layers.2.fc2.bias",
            "encoder.layers.0.self_attn_layer_norm.bias", "feature_extractor.conv_layers.0.2.weight"} <= named.keys()
    under = {f"hubert.{name}": tensor for name, tensor in old.items()} | {"lm_head.weight": torch.ones(1)}
    named |= {name: torch.ones(1) for name in ("final_proj.weight", "label_embs_concat", "mask_emb")}
    for state in (old, fold_weight_norm(old), under, named):
        other = load_hubert(state, HUBERT).state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="HuBERT lacks norm.bias and holds the unknown extra"):
        load_hubert({name: t for name, t in golden.weights.items() if name != "encoder.layer_norm.bias"} | {"extra": torch.ones(1)}, HUBERT)


def test_hubert_frame_count():
    model = Hubert(HUBERT)
    for n in (400, 719, 720, 960, 1601):
        assert model(torch.zeros(1, n))[0].shape[1] == HUBERT.frames(n)
    assert HUBERT.frames(399) == 0 and HUBERT.hop == 320


# ---- Whisper ----

WHISPER = WhisperConfig(mels=12, dim=18, layers=2, heads=3, ffn=28, positions=23)


def load_whisper(state: dict[str, Tensor], config: WhisperConfig) -> WhisperEncoder:
    """An encoder with official tensors, which are bare or stand under one of these names, among others."""
    for prefix in ("audio_tower.", "model.encoder."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    model = WhisperEncoder(config)
    load_strict(model, state, {}, "-", "the Whisper encoder")
    return model.eval()


def test_log_mels_equal_transformers():
    golden = Golden("whisper")
    for n, step in ((4001, 1), (16000, 7)):
        mel = log_mel(golden[f"wav/{n}"][None])[0]
        assert mel.shape == (128, 3000)
        check("log-mel", mel[:, ::step][:, :30], golden[f"mel/{n}"])
        assert (mel[:, 102:] - golden[f"floor/{n}"]).abs().max() <= GATE
    both = torch.nn.functional.pad(golden["wav/4001"], (0, 11999))
    pair = log_mel(torch.stack([both, golden["wav/16000"]]), seconds=None)           # each clip has a maximum of its own
    assert pair.shape == (2, 128, 100)
    quiet = torch.stack([both / 1000, golden["wav/16000"]])
    for n in (0, 1):                                    # sums of up to 201 positive terms, in another order: 1e-6 of values near 1
        assert (log_mel(quiet)[n] - log_mel(quiet[n : n + 1])[0]).abs().max() <= 1e-6
    check("log-mel", pair[1, :, ::7], golden["mel/16000"][:, :15])


def test_long_sound_is_cut_at_30_seconds():
    wav = torch.randn(1, 31 * 16000, generator=torch.Generator().manual_seed(9))
    assert torch.equal(log_mel(wav), log_mel(wav[:, : 30 * 16000])) and log_mel(wav).shape == (1, 128, 3000)
    infinite = torch.full((1, 9), math.inf)
    for bad, message in ((torch.zeros(5), "expected float"), (torch.zeros(1, 0), "expected float"), (infinite, "NaN or inf")):
        with pytest.raises(ValueError, match=message):
            log_mel(bad)
    with pytest.raises(ValueError, match="shorter than half a window"):
        log_mel(torch.zeros(1, 200), seconds=None)


def test_whisper_states_equal_the_official_ones():
    """Plain as in transformers; pooled and masked as in boson's tower; causal as in the codec of MOSS-Speech."""
    golden = Golden("whisper")
    tower = {f"audio_tower.{name}": tensor for name, tensor in golden.weights.items()} | {"embed_tokens.weight": torch.ones(1)}
    features, lengths = golden["features"], golden["lengths"]
    pooled = load_whisper(tower, replace(WHISPER, pool=2))
    bare = {name: tensor for name, tensor in golden.weights.items() if not name.startswith("layer_norm.")}
    causal = load_whisper(bare, replace(WHISPER, causal=True, final_norm=False))
    with torch.no_grad():
        check("Whisper", load_whisper({f"model.encoder.{k}": t for k, t in golden.weights.items()}, WHISPER)(features), golden["states"])
        check("Whisper, pooled", pooled(features), golden["states_pooled"])
        masked = pooled(features, lengths)
        check("Whisper, causal", causal(features), golden["states_causal"])
        check("Whisper, causal", causal(features[:, :, :30]), golden["states_causal"][:, :15])       # nothing comes from behind
        check("Whisper, causal", causal(features, torch.tensor([46, 30]))[1, :15], golden["states_causal"][1, :15])
    counts = [(int(n) + 1) // 2 // 2 for n in lengths]
    assert counts == golden["counts"].tolist()
    for b, count in enumerate(counts):
        check("Whisper, masked", masked[b, :count], golden["states_masked"][b, :count])
    assert (masked[1, :counts[1]] - pooled(features)[1, :counts[1]]).abs().max() > 1e-3


def test_whisper_is_strict():
    weights = Golden("whisper").weights
    with pytest.raises(ValueError, match="the Whisper encoder lacks conv1.bias and holds the unknown conv3.bias"):
        load_whisper({name.replace("conv1.bias", "conv3.bias"): tensor for name, tensor in weights.items()}, WHISPER)
    model = load_whisper(weights, WHISPER)
    for mel in (torch.zeros(1, 12, 48), torch.zeros(1, 11, 46), torch.zeros(1, 12, 0)):
        with pytest.raises(ValueError, match=r"expected \(B, 12, 1..46\)"):
            model(mel)
    with pytest.raises(ValueError, match="has 0 mel frames"):
        model(torch.zeros(1, 12, 46), torch.tensor([0]))


def test_the_full_tower_has_the_published_size():
    with torch.device("meta"):
        full = WhisperEncoder(WhisperConfig())
    assert sum(p.numel() for p in full.parameters()) == 636_968_960
    assert sum(p.numel() for p in full.layers[0].parameters()) == 19_676_160        # 19.68 M


def test_ignored_tensors_are_of_training_only():
    for name in ("fc2.bias", "fc_post2.bias", "quantizer.quantizers.0.codebook.embed", "quantizer.vq.layers.0._codebook.embed"):
        assert not re.fullmatch(UNUSED, name)


@torch.no_grad()
@pytest.mark.parametrize("kernel, stride, padding", [(6, 3, 2), (5, 2, 0), (16, 8, 4)])
def test_a_large_strided_convolution_as_one_product_is_that_of_torch(kernel, stride, padding):
    conv = Falling(256, 1 << 15, kernel, stride, padding=padding) if kernel < 6 else Falling(512, 2048, kernel, stride, padding=padding)
    assert conv.weight.numel() >= 1 << 22                            # else it is torch's own
    for length in (kernel, 41):
        x = torch.randn(2, conv.in_channels, length)
        want, got = torch.nn.functional.conv1d(x, conv.weight, conv.bias, stride, padding), conv(x)
        assert got.shape == want.shape and torch.allclose(got, want, atol=GATE)


def test_the_snake_leaves_what_it_is_given_and_has_a_gradient():
    x, rate = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True), torch.tensor([[0.3], [1.0], [4.0]], dtype=torch.float64)
    kept = x.detach().clone()
    assert torch.allclose(snake(x, rate, 2 * rate), x + (rate * x).sin() ** 2 / (2 * rate), atol=1e-8) and torch.equal(x, kept)
    assert torch.autograd.gradcheck(lambda x: snake(x, rate, rate), x)
