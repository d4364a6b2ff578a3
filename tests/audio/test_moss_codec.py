"""audio/moss.py, flow.py and hift.py compute what the published code computes (golden/make_moss_codec.py), and stream."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from audio import load_codec
from audio.flow import noise
from audio.hift import BEHIND, FRAME, HiftStream
from audio.higgs import resample_24_to_16
from audio.moss import MossCodec, Voice, fbank, read_config, voice_mel
from audio.whisper import floored, log_mel, log_power

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
GATE = 1e-5
LENGTHS = (1920, 1921, 5000, 14403)
WORST: dict[str, float] = {}


class Golden:
    """One golden file: metadata, and tensors by name, in float32 or int64."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"moss_{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: t.float() if (t := file.get_tensor(key)).is_floating_point() else t.long() for key in file.keys()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def weights(self, prefix: str = "weights/") -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}


ENCODER, FLOW, HIFT = Golden("encoder"), Golden("flow"), Golden("hift")
VOICE = Voice(*(FLOW[f"voice/{name}"] for name in ("codes", "mel", "speaker")))


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\nmax error " + ", ".join(f"{name} {error:.1e}" for name, error in WORST.items()))


def write(folder: Path, **changes) -> Path:
    """The official layout in a folder; a change to a file is a function of its tensors, or of config.json's content."""
    def same(x):
        return x
    (folder / "flow").mkdir(parents=True)
    encoder = {f"encoder.{name}": tensor for name, tensor in ENCODER.weights().items()} | {"decoder.embed_tokens.weight": torch.ones(3)}
    save_file(changes.get("encoder", same)(encoder), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(changes.get("config", same)(dict(ENCODER.config))))
    flow = FLOW.weights("weights/flow.")
    torch.save(changes.get("flow", same)(flow | {"epoch": 3, "step": 120_000}), folder / "flow" / "flow-chunk-5.pt")
    torch.save(flow, folder / "flow" / "flow.pt")
    torch.save(changes.get("hift", same)(HIFT.weights("weights/hift.")), folder / "flow" / "hift.pt")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("moss") / "codec")


@pytest.fixture(scope="module")
def codec(folder) -> MossCodec:
    return load_codec(folder)


@pytest.fixture(scope="module")
def exact(folder) -> MossCodec:
    """In double precision, so that pieces and the whole may differ by 1e-9 and no more."""
    return load_codec(folder).double()


def check(name: str, ours: Tensor, theirs: Tensor, gate: float = GATE) -> None:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    error = float((ours - theirs).abs().max())
    WORST[name] = max(error, WORST.get(name, 0.0))
    assert error <= gate, f"{name}: {error:.2e}"


def draw(*shape: int, seed: int = 0, high: int = 37) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def sound(*shape: int, seed: int) -> Tensor:
    """As in the golden script: noise whose loudness swells and falls, in half precision."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return (x * (torch.arange(shape[-1]) / 300).sin()).half().float()


def in_pieces(take, flush, x: Tensor, sizes) -> list[Tensor]:
    return [take(piece) for piece in x.split(sizes, 2)] + [flush()]


# ---- the encoder ----

def test_codes_equal_the_official_ones(codec):
    wav = ENCODER["wav"][:, None]
    for n in LENGTHS:
        assert torch.equal(codec.encode(wav[..., :n])[:, 0], ENCODER[f"codes/{n}"]), n
        assert torch.equal(codec.encode(wav[1:, :, :n])[:, 0], ENCODER[f"codes/{n}"][1:])
    with torch.no_grad():
        mel = torch.cat([F.pad(resample_24_to_16(row), (0, 638)) for row in wav])
        assert mel.shape[1] == 8 * 1280
        check("Whisper-VQ states", codec.encoder(log_mel(mel, 9, None)), ENCODER["pooled"])


def test_long_sound_is_encoded_by_30_seconds(codec):
    """Of these 388 codes three have two entries equally near, as far as single precision can tell, and either is right."""
    long = sound(1, 31 * 16000, seed=4)[:, None]
    codes, wanted, book = codec.encode(long, rate=16_000), ENCODER["codes/long"][0], codec.encoder.codebook.weight.double()
    with torch.no_grad():
        states = codec.encoder(log_mel(F.pad(long[:, 0], (0, 29 * 16000)).view(2, -1), 9, None)).flatten(0, 1)[:388].double()
    away, sizes = (states[:, None] - book).square().sum(2), states.square().sum(1) + book.square().sum(1).max()
    rounding = 2 * torch.finfo(torch.float32).eps * sizes                          # of |x|^2 + |c|^2 - 2 x c, which is looked for
    tied = away.topk(2, largest=False)[0].diff()[:, 0] <= rounding
    assert tied.sum() <= 4 and torch.equal(codes[0, 0][~tied], wanted[~tied])
    ours, theirs = (away.gather(1, code[:, None])[:, 0] for code in (codes[0, 0], wanted))
    assert ((ours - theirs).abs() <= rounding).all()
    assert codes.shape == (1, 1, 388) and codes.unique().numel() > 30
    assert torch.equal(codec.encode(long[..., : 30 * 16000], 16_000), codes[..., :375])


def loud_first(W: int, seed: int) -> Tensor:
    wav = sound(2, 1, W, seed=seed) * 0.1
    wav[..., 200::720_000] = 5                                          # in each 30 s, the first code holds the loudest moment
    return wav


@pytest.mark.parametrize("size", [1, 1000, 1920, 13_453])
def test_encoding_in_pieces_equals_the_whole(codec, size):
    wav = loud_first(4 * 1920 + 5 if size == 1 else 9 * 1920 + 77, seed=size)
    stream, whole = codec.stream(), codec.encode(wav)
    pieces = in_pieces(stream.encode, stream.flush_encode, wav, size)
    assert torch.equal(torch.cat(pieces, 2), whole)
    if size == 1920:
        assert [p.shape[2] for p in pieces] == [1] * 9 + [0, 1]         # a code comes with its last sample
    again = in_pieces(stream.encode, stream.flush_encode, wav[..., :1920], 1920)        # flushed, a stream starts afresh
    assert torch.equal(torch.cat(again, 2), codec.encode(wav[..., :1920]))


def test_encoding_in_pieces_equals_the_whole_beyond_30_seconds(codec):
    wav = loud_first(720_000 + 3 * 1920 + 9, seed=5)
    stream = codec.stream()
    assert torch.equal(torch.cat(in_pieces(stream.encode, stream.flush_encode, wav, 100_001), 2), codec.encode(wav))


def test_a_stream_knows_the_loudest_moment_so_far(folder):
    """Its floor lies below the running maximum: with the states of either floor as codebook, the codes say which one it was."""
    codec, wav = load_codec(folder), sound(1, 1, 6 * 1920, seed=8) * 1e-3
    wav[..., 5 * 1920:] *= 3000
    mel = log_power(F.pad(resample_24_to_16(wav[:, 0]), (200, 200), mode="reflect"), 9)[..., :47]
    peaks = [mel[..., : 8 * c + 7].amax((1, 2), keepdim=True).expand(-1, -1, 8 if c else 7) for c in range(6)]
    with torch.no_grad():
        states = [codec.encoder(floored(mel, peak))[0] for peak in (torch.cat(peaks, 2), peaks[-1][..., :1])]
    codec.encoder.codebook = torch.nn.Embedding.from_pretrained(torch.cat(states))
    stream = codec.stream()
    streamed = torch.cat(in_pieces(stream.encode, stream.flush_encode, wav, 700), 2)
    assert streamed.flatten().tolist() == [0, 1, 2, 3, 4, 5] and codec.encode(wav).flatten().tolist() == [6, 7, 8, 9, 10, 11]


def test_a_code_depends_on_nothing_behind_it(codec):
    wav = loud_first(8 * 1920, seed=9)
    other = wav.clone()
    other[..., 5 * 1920:] = sound(2, 1, 3 * 1920, seed=10) * 0.1
    before, after = codec.encode(wav), codec.encode(other)
    assert torch.equal(before[..., :5], after[..., :5]) and not torch.equal(before, after)


# ---- the flow decoder ----

def test_mels_equal_the_official_ones(folder, codec):
    codes, full = FLOW["codes"], MossCodec.load(folder, chunk=0)
    with torch.no_grad():
        check("mel, full attention", full.flow(codes, VOICE, 16)[:, ::7], FLOW["mel_full"])
        check("mel, chunks", codec.flow(codes, VOICE, 16)[:, ::7], FLOW["mel_chunks"])
        check("mel, chunks", codec.flow(codes[:, :15], VOICE, 12)[:, ::7], FLOW["mel_prefix"])
    assert (FLOW["mel_full"] - FLOW["mel_chunks"]).abs().max() > 0.01
    assert full.config.chunk == 0 and codec.config.chunk == 5


def test_mel_of_whole_chunks_is_final(exact):
    """3 codes of voice and 7 more are two chunks; of what follows they see 3 codes."""
    codes = draw(2, 20, seed=2)
    other = codes.clone()
    other[:, 10:] = draw(2, 10, seed=3)
    with torch.no_grad():
        whole, changed, part = exact.flow(codes, VOICE, 20), exact.flow(other, VOICE, 20), exact.flow(codes[:, :10], VOICE, 7)
        alone = exact.flow(codes[1:], VOICE, 20)
    check("mel, prefix", part, whole[..., :28], 1e-9)
    check("mel, other future", changed[..., :28], whole[..., :28], 1e-9)
    check("mel, batched", whole[1:], alone, 1e-9)
    assert (changed[..., 28:] - whole[..., 28:]).abs().max() > 0.01


def test_noise_is_the_published_one_and_leaves_the_generator_alone(codec):
    torch.manual_seed(0)
    published = torch.randn([1, 80, 50 * 300])
    torch.manual_seed(7)
    state = torch.get_rng_state()
    noise.cache_clear()
    assert torch.equal(noise(torch.device("cpu")), published)
    first, again = codec.decode(draw(1, 1, 3)), codec.decode(draw(1, 1, 3))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)


# ---- the vocoder ----

def test_sound_equals_the_official_one(codec, exact):
    mel, hift = HIFT["hift/mel"], codec.hift
    with torch.no_grad():
        check("pitch, of 300 Hz", hift.f0_predictor(mel) / 300, HIFT["hift/f0"] / 300)
        source = hift.source(HIFT["hift/f0"], torch.zeros(1, 9, dtype=torch.float64), 0)
        check("source", source, HIFT["hift/source"], 2e-4)              # the published phase adds up in single precision
        check("sound of the same source", hift(mel, HIFT["hift/source"]), HIFT["hift/wav"])
        sound = HiftStream(exact.hift).push(mel.double(), final=True)
        check("sound", sound, HIFT["hift/wav"], 1e-4)
        # a pitch that is 2e-4 Hz off turns the ninth harmonic by 2e-3 within 0.2 s, and how far it is off is the processor's
        check("sound, single precision", HiftStream(hift).push(mel, final=True), sound, 5e-4)


def test_source_is_a_sum_of_sines_and_noise(exact):
    """The formula in plain loops: the phase runs straight from the middle of a frame to that of the next."""
    f0, first = torch.tensor([[220.0, 5.0, 340.0, 90.0]], dtype=torch.float64), 3
    phase = torch.rand(1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = exact.hift.source(f0, phase, first)[0]
    linear = exact.hift.m_source.l_linear
    drawn = [torch.randn(9, FRAME, generator=torch.Generator().manual_seed(first + n)) for n in range(4)]
    for n in (0, 100, 239, 240, 400, 700, 961, 1300, 1500, 1919):
        frame, at = n // FRAME, n % FRAME
        total = float(linear.bias)
        for h in range(1, 10):
            middles = [float(phase[0, h - 1]) + sum(h * float(f) * FRAME / 24000 for f in f0[0, : i + 1]) for i in range(4)]
            x = min(max((n + 0.5) / FRAME - 0.5, 0), 3)
            cycles = middles[int(x)] + (x - int(x)) * (middles[min(int(x) + 1, 3)] - middles[int(x)])
            voiced = float(f0[0, frame]) > 10
            sample = 0.1 * math.sin(2 * math.pi * cycles) if voiced else 0.0
            sample += (0.003 if voiced else 0.1 / 3) * float(drawn[frame][h - 1, at])
            total += float(linear.weight[0, h - 1]) * sample
        assert abs(float(ours[n]) - math.tanh(total)) < 1e-9, n


def test_a_frame_sees_20_frames_behind_it(exact):
    """By its gradient: what is exactly zero has no way in."""
    mel = torch.randn(1, 80, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    wav = HiftStream(exact.hift).push(mel, final=True)
    wav[:, 25 * FRAME: 26 * FRAME].abs().sum().backward()
    seen = mel.grad[0].abs().amax(0).nonzero()[:, 0]
    assert seen.max() == 25 + BEHIND and seen.min() == 0                # the phase remembers everything


# ---- the stream ----

@pytest.mark.parametrize("sizes", [1, 7, [2, 0, 20, 1], 23])
def test_decoding_in_pieces_equals_the_whole(exact, sizes):
    codes = draw(2, 1, 23, seed=4)
    whole, stream = exact.decode(codes, VOICE), exact.stream(VOICE)
    pieces = in_pieces(stream.decode, stream.flush, codes, sizes)
    assert whole.shape == (2, 1, 23 * 1920) and 0.05 < whole.abs().max() <= 0.99
    check("stream", torch.cat(pieces, 2), whole, 1e-9)
    if sizes == 1:                                                      # 3 of voice + 7 = 2 chunks, 3 ahead: 28 frames less 20
        assert [n for n, piece in enumerate(pieces, 1) if piece.shape[2]] == [10, 15, 20, 24]
        assert [piece.shape[2] // FRAME for piece in pieces if piece.shape[2]] == [8, 20, 20, 44]
    check("stream, used again", torch.cat([stream.decode(codes[:1]), stream.flush()], 2), whole[:1], 1e-9)


def test_in_single_precision_a_stream_rounds_otherwise(codec):
    codes, stream = draw(1, 1, 21, seed=5), codec.stream(VOICE)
    check("stream, single precision", torch.cat(in_pieces(stream.decode, stream.flush, codes, 4), 2), codec.decode(codes, VOICE), 5e-3)


def test_a_shorter_hold_gives_what_the_vocoder_makes_of_the_mel_so_far(exact):
    codes, stream, done = draw(1, 1, 24, seed=6), exact.stream(VOICE, hold=8), 0
    for n, piece in enumerate([stream.decode(code) for code in codes.split(1, 2)] + [stream.flush()], 1):
        until = (n // 5 * 5 - 3) * 4 - 8 if n < 25 else 96              # codes in whole chunks, without the voice's
        if n % 5 or n == 5:
            assert piece.shape[2] == 0
            continue
        with torch.no_grad():
            count = 24 if n == 25 else n // 5 * 5 - 3
            mel = exact.flow(codes[:, 0, : count + 3], VOICE, count)
            sofar = HiftStream(exact.hift).push(mel, final=True)[:, None]
        check("stream, hold 8", piece, sofar[..., done * FRAME: until * FRAME], 1e-9)
        done = until
    assert done == 96


def test_full_attention_waits_for_the_end(folder):
    codec = MossCodec.load(folder, chunk=0).double()
    codes, stream = draw(1, 1, 19, seed=7), codec.stream(VOICE)
    pieces = in_pieces(stream.decode, stream.flush, codes, 5)
    assert [piece.shape[2] for piece in pieces] == [0, 0, 0, 0, 19 * 1920] and torch.equal(pieces[-1], codec.decode(codes, VOICE))


def test_batch_and_empty_codes(exact):
    codes = draw(3, 1, 6, seed=8)
    whole = exact.decode(codes)                                         # no voice: neither speaker nor a start
    check("batch", whole[1:2], exact.decode(codes[1:2]), 1e-9)
    assert exact.decode(codes[..., :0]).shape == (3, 1, 0)
    assert (whole - exact.decode(codes, VOICE)).abs().max() > 1e-3
    other = replace(VOICE, speaker=-VOICE.speaker)
    assert (exact.decode(codes, other) - exact.decode(codes, VOICE)).abs().max() > 1e-3


# ---- voices ----

def test_voice_features_equal_the_official_ones():
    clip = HIFT["voice_clip"]
    check("voice mel", voice_mel(clip)[0, ::5], HIFT["voice_mel"])
    truth = fbank(clip[:, :8000].double())[0, ::5]             # quiet bins of loud frames: single precision is 2e-5 off, theirs and ours
    check("Kaldi features", truth, HIFT["fbank"], 3e-5)
    check("Kaldi features, single precision", fbank(clip[:, :8000])[0, ::5], truth, 5e-5)


def field(number: int, value) -> bytes:
    """One field of a protocol buffer: an integer, or bytes with their length."""
    def varint(n: int) -> bytes:
        return bytes([n & 127 | (128 if n > 127 else 0)]) + (varint(n >> 7) if n > 127 else b"")
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3) + varint(value) if isinstance(value, int) else varint(number << 3 | 2) + varint(len(value)) + value


def onnx_maximum() -> bytes:
    """An ONNX model (1, S, 80) -> (1, 80): the largest over time.  What a speaker encoder looks like from outside."""
    def tensor(name: str, *dims: int | str) -> bytes:
        shape = b"".join(field(1, field(1 if isinstance(d, int) else 2, d)) for d in dims)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))
    axes = field(1, "axes") + field(8, 1) + field(20, 7)
    flat = field(1, "keepdims") + field(3, 0) + field(20, 2)
    node = field(1, "feats") + field(2, "speaker") + field(4, "ReduceMax") + field(5, axes) + field(5, flat)
    graph = field(1, node) + field(2, "g") + field(11, tensor("feats", 1, "S", 80)) + field(12, tensor("speaker", 1, 80))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))


def test_a_voice_is_made_of_a_recording_and_kept_in_a_file(tmp_path):
    pytest.importorskip("onnxruntime")
    folder = write(tmp_path / "codec")
    codec, clip = load_codec(folder), sound(1, 1, 20_000, seed=11)
    with pytest.raises(FileNotFoundError, match=r"no .*campplus\.onnx; fetch"):
        codec.make_voice(clip)
    (folder / "flow" / "campplus.onnx").write_bytes(onnx_maximum())
    voice = codec.make_voice(clip)
    features = fbank(resample_24_to_16(clip[:, 0]))
    assert torch.equal(voice.codes, codec.encode(clip)[:, 0, :10])      # 41 frames are 10 codes and a bit
    check("voice", voice.mel, voice_mel(clip[:, 0])[:, :40])
    check("speaker", voice.speaker, (features - features.mean(1, keepdim=True)).amax(1))
    codes = draw(1, 1, 4, seed=1)
    plain = codec.decode(codes)
    voice.save(folder / "voice.safetensors")
    again = load_codec(folder)
    assert all(torch.equal(a, b) for a, b in zip(vars(again.voice).values(), vars(voice).values(), strict=True))
    assert torch.equal(again.decode(codes), codec.decode(codes, voice)) and not torch.equal(again.decode(codes), plain)
    with pytest.raises(ValueError, match="a voice needs one recording"):
        codec.make_voice(torch.cat([clip, clip]))
    with pytest.raises(ValueError, match="100 samples are no voice"):
        codec.make_voice(clip[..., :100])


def test_bad_voices_are_named(codec, tmp_path, monkeypatch):
    path = tmp_path / "voice.safetensors"
    for change, message in (
            ({"mel": VOICE.mel[:, 1:]}, "is no voice of this codec"), ({"speaker": VOICE.speaker / 0}, "expected finite"),
            ({"codes": VOICE.codes + 37}, r"codes outside 0\.\.36"), ({"codes": VOICE.codes.float()}, "is no voice of this codec")):
        replace(VOICE, **change).save(path)
        with pytest.raises(ValueError, match=message):
            Voice.load(path, codec)
    save_file({"mel": VOICE.mel}, path)
    with pytest.raises(ValueError, match="is no voice of this codec"):
        Voice.load(path, codec)
    path.write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Voice.load(path, codec)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs onnxruntime; pip install 'multistream\[voice\]'"):
        codec.make_voice(sound(1, 1, 4000, seed=1))


# ---- files ----

def test_the_codec_is_recognised_and_says_what_it_is(folder, codec):
    assert isinstance(codec, MossCodec) and codec.name == "moss"
    assert (codec.sample_rate, codec.frame_rate, codec.num_codebooks) == (24_000, 12.5, 1)
    assert codec.codebook_size == 37 and codec.config.flow.mid == 1 and codec.config.flow.depth == 2 and codec.config.hift.width == 16
    with torch.device("meta"):
        full = MossCodec()
    sizes = {name: sum(p.numel() for p in getattr(full, name).parameters()) for name in ("encoder", "flow", "hift")}
    assert sizes == {"encoder": 343_119_360, "flow": 120_724_464, "hift": 20_806_557} and full.codebook_size == 16_384
    only = [name for name in ("flow.pt", "flow-chunk-5.pt") if MossCodec.load(folder, {"flow.pt": 0, "flow-chunk-5.pt": 5}[name])]
    assert len(only) == 2
    with pytest.raises(FileNotFoundError, match=r"no .*flow-chunk-25\.pt"):
        MossCodec.load(folder, chunk=25)


def test_both_spellings_of_weight_norm_and_a_prefix_are_read(codec, tmp_path):
    def older(state: dict) -> dict:
        spelt = {name.replace("parametrizations.weight.original0", "weight_g"): tensor for name, tensor in state.items()}
        return {"generator." + name.replace("parametrizations.weight.original1", "weight_v"): tensor for name, tensor in spelt.items()}
    other = load_codec(write(tmp_path / "old", hift=older))
    codes = draw(1, 1, 3)
    assert torch.equal(other.decode(codes, VOICE), codec.decode(codes, VOICE))


def without(name: str):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def with_(name: str, tensor):
    return lambda state: state | {name: tensor}


@pytest.mark.parametrize(("file", "change", "message"), [
    ("encoder", without("encoder.layers.1.fc1.bias"), r"model\.safetensors lacks layers\.1\.fc1\.bias;"),
    ("encoder", with_("encoder.layers.1.fc9.bias", torch.ones(2)), r"holds the unknown layers\.1\.fc9\.bias"),
    ("encoder", with_("encoder.codebook.weight", torch.ones(36, 16)), r"codebook\.weight is \(36, 16\), expected \(37, 16\)"),
    ("encoder", with_("encoder.conv1.bias", torch.full((16,), math.nan)), r"conv1\.bias holds NaN"),
    ("flow", without("encoder.up_encoders.3.norm_ff.bias"), r"flow-chunk-5\.pt lacks encoder\.up_encoders\.3\.norm_ff\.bias;"),
    ("flow", with_("decoder.estimator.mid_blocks.0.3.weight", torch.ones(2)), r"holds the unknown decoder\.estimator\.mid_blocks\.0\.3"),
    ("flow", without("input_embedding.weight"), r"input_embedding\.weight is missing"),
    ("flow", with_("optimizer", [1, 2]), "holds more than a dict of tensors"),
    ("flow", with_("encoder.pre_lookahead_layer.conv1.weight", torch.ones(12, 12, 3)), r"is \(12, 12, 3\), expected \(12, 12, 4\)"),
    ("hift", without("ups.1.bias"), r"hift\.pt lacks ups\.1\.bias;"),
    ("hift", without("conv_post.parametrizations.weight.original0"), r"lacks conv_post\.weight and holds the unknown conv_post\.par"),
    ("hift", with_("resblocks.9.convs1.0.bias", torch.ones(2)), r"holds the unknown resblocks\.9\.convs1\.0\.bias"),
    ("config", without("quantize_position"), r"config\.json lacks 'quantize_position'"),
    ("config", with_("encoder_causal_attention", False), "encoder_causal_attention is False, this codec supports True"),
    ("config", with_("pooling_position", 3), "pooling_position is 3, this codec supports 2"),
    ("config", with_("pooling_kernel_size", 2), r"no codec of 12\.5 Hz"),
    ("config", with_("d_model", "16"), r"dim is '16', expected integers from 1 to"),
    ("config", with_("encoder_attention_heads", 0), "heads is 0, expected integers from 1"),
    ("config", with_("encoder_ffn_dim", 10**30), f"ffn is {10**30}, expected integers from 1"),
    ("config", with_("quantize_vocab_size", 10**30), r"no codec of 12\.5 Hz"),
])
def test_files_are_read_strictly(tmp_path, file, change, message):
    with pytest.raises(ValueError, match=message):
        load_codec(write(tmp_path / "codec", **{file: change}))


def test_tensors_of_training_are_known_and_left_out(codec, tmp_path):
    more = {"encoder.layers.2.fc1.bias": torch.ones(2), "encoder.layers.31.x": torch.ones(1), "encoder.layer_norm.weight": torch.ones(2),
            "encoder.embed_positions2.weight": torch.ones(2), "encoder.ema_count": torch.ones(2)}
    other = load_codec(write(tmp_path / "codec", encoder=lambda state: state | more))
    wav = ENCODER["wav"][:, None]
    assert torch.equal(other.encode(wav), codec.encode(wav))


def test_missing_and_broken_files_are_named(tmp_path):
    folder = write(tmp_path / "codec")
    (folder / "flow" / "hift.pt").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"hift\.pt cannot be read as weights"):
        load_codec(folder)
    (folder / "flow" / "hift.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*hift\.pt; fetch the codec's repository whole"):
        load_codec(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="the folder of a Higgs, SNAC, Qwen or MOSS codec"):
        load_codec(folder)
    with pytest.raises(FileNotFoundError, match=r"no .*config\.json"):
        read_config(folder / "config.json")


# ---- bad input ----

def test_bad_input_is_named(codec):
    stream, wav = codec.stream(), torch.zeros(1, 1, 4000)
    for call in (codec.decode, stream.decode):
        for codes, message in (
                (torch.full((1, 1, 3), 37), r"run from 37 to 37, the codec has 0\.\.36"), (torch.full((1, 1, 3), -1), "run from -1"),
                (draw(1, 2, 3), "expected integers"), (draw(1, 3), "expected integers"), (draw(1, 1, 3).float(), "expected integers")):
            with pytest.raises(ValueError, match=message):
                call(codes)
    for call in (codec.encode, stream.encode):
        for bad, message in ((wav[0], "expected float"), (wav.expand(-1, 2, -1), "expected float"), (wav.long(), "expected float"),
                             (wav / 0, "NaN or infinite")):
            with pytest.raises(ValueError, match=message):
                call(bad)
    with pytest.raises(ValueError, match="sound is empty"):
        codec.encode(wav[..., :0])
    with pytest.raises(ValueError, match="the sound is 44100 Hz, this codec takes 24000 or 16000"):
        codec.encode(wav, rate=44_100)
    with pytest.raises(ValueError, match=r"3751 codes and the voice's 0 are more than 3750 \(300 s\)"):
        codec.decode(torch.zeros(1, 1, 3751, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"hold is 21, expected 0\.\.20"):
        codec.stream(hold=21)
    with pytest.raises(ValueError, match="chunk is 7, there are weights for 5 and 25"):
        MossCodec.load("nowhere" if codec.folder is None else codec.folder, chunk=7)
