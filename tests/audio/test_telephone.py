"""audio/telephone.py: G.711 to the bit, a line with the band, packets and noise it says, and turns out of a stereo call."""

import hashlib
import math
from bisect import bisect_left, bisect_right
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from audio.telephone import (
    RATE,
    Turn,
    add_noise,
    band_pass,
    decode_table,
    encode_table,
    g711_decode,
    g711_encode,
    lose_packets,
    telephone,
    turns,
)


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE, level: float = 0.5) -> Tensor:
    return level * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate), dtype=torch.float64) / rate).float()


def db(x: Tensor) -> float:
    return 10 * math.log10(float(x.double().square().mean()) + 1e-12)


# ---- G.711 ----

def decisions(law: str) -> list[int]:
    """The 129 decision values of positive signals, written down from ITU-T G.711: table 1a (A-law, of 4096), 2a (mu-law, of 8159)."""
    if law == "a":
        steps = [2] * 32 + [4] * 16 + [8] * 16 + [16] * 16 + [32] * 16 + [64] * 16 + [128] * 16
    else:
        steps = [1] + [2] * 15 + [4] * 16 + [8] * 16 + [16] * 16 + [32] * 16 + [64] * 16 + [128] * 16 + [256] * 16
    return [0, *accumulate(steps)]


def signal(law: str, n: int, negative: bool) -> int:
    """The character of the n-th interval, as sent: the sign bit is 1 for positive; A-law inverts even bits, mu-law all but the sign."""
    code = n ^ (0x55 if law == "a" else 0x7F)
    return code | (0 if negative else 0x80)


@pytest.mark.parametrize(("law", "unit", "top"), [("mu", 4, 8159), ("a", 8, 4096)])
def test_all_256_codes_stand_for_the_middle_of_their_interval(law, unit, top):
    edges = decisions(law)
    assert len(edges) == 129 and edges[-1] == top
    for n in range(128):
        middle = 0 if law == "mu" and n == 0 else (edges[n] + edges[n + 1]) // 2
        assert decode_table(law)[signal(law, n, False)] == unit * middle
        assert decode_table(law)[signal(law, n, True)] == -unit * middle


@pytest.mark.parametrize(("law", "unit"), [("mu", 4), ("a", 8)])
def test_all_65536_samples_fall_into_their_interval(law, unit):
    """On an edge a sample goes up in value from it when positive, and, as in G.191, towards zero when negative."""
    edges, table = [unit * edge for edge in decisions(law)], encode_table(law).tolist()
    for sample in range(-32768, 32768):
        n = bisect_right(edges, sample) - 1 if sample >= 0 else bisect_left(edges, -sample) - 1
        assert table[sample + 32768] == signal(law, min(n, 127), sample < 0), sample


def test_tables_are_those_of_others():
    """Python's audioop (gone since 3.13): all it decodes, all it encodes by A-law, and by mu-law what is not negative."""
    for law, theirs in AUDIOOP.items():
        ours = decode_table(law), encode_table(law)[32768:], encode_table(law)[:32768]
        assert tuple(digest(table) for table in ours)[: len(theirs)] == theirs


def digest(table: Tensor) -> str:
    return hashlib.sha256(" ".join(map(str, table.tolist())).encode()).hexdigest()[:16]


AUDIOOP = {"mu": ("d34190e6f9fd36a6", "d3250e4bb9826afc"), "a": ("6c937f5c4e2e7a7c", "950bfbc2315e76df", "428232daf0ca2cab")}


@pytest.mark.parametrize("law", ["mu", "a"])
def test_a_code_survives_decoding_and_encoding(law):
    codes = torch.arange(256, dtype=torch.uint8)
    back = g711_encode(g711_decode(codes, law), law)
    negative_zero = {127: 255} if law == "mu" else {}               # a sample of 0 has no sign
    assert back.tolist() == [negative_zero.get(code, code) for code in range(256)]
    loud = g711_decode(g711_encode(torch.tensor([1.5, -1.5, 0.0]), law), law)
    assert loud.tolist() == ([32124 / 32768, -32124 / 32768, 0] if law == "mu" else [32256 / 32768, -32256 / 32768, 8 / 32768])


@pytest.mark.parametrize("law", ["mu", "a"])
def test_speech_loses_38_db_at_any_loudness(law):
    for level in (0.9, 0.1, 0.03):
        x = tone(440, level=level)
        snr = db(x) - db(x - g711_decode(g711_encode(x, law), law))
        assert 33 < snr < 42, snr
    assert g711_encode(torch.zeros(2, 3, 5)).shape == (2, 3, 5)


def test_what_g711_refuses():
    for act, message in ((lambda: g711_encode(torch.tensor([float("nan")])), "NaN or infinite"),
            (lambda: g711_encode(torch.zeros(1), "b"), "no 'b' law"),
                         (lambda: g711_decode(torch.zeros(3, dtype=torch.int64)), "torch.int64, expected uint8"),
                         (lambda: telephone(tone(440), RATE, law="u"), "choose mu .* or a")):
        with pytest.raises(ValueError, match=message):
            act()


# ---- the line ----

@pytest.mark.parametrize(("hertz", "gain"), [(400, 0), (1000, 0), (2000, 0), (3300, 0), (300, -6), (3400, -6)])
def test_the_band_passes(hertz, gain):
    x = tone(hertz)
    assert abs(db(band_pass(x)[1000:-1000]) - db(x) - gain) < 0.1


@pytest.mark.parametrize("hertz", [0.001, 50, 150, 200, 3500, 3700, 3999])
def test_the_band_stops(hertz):
    assert db(band_pass(tone(hertz) + 0.1)[1000:-1000]) - db(tone(1000)) < -50       # a constant goes too


def test_the_band_delays_nothing_and_keeps_shapes():
    x = tone(1000).view(2, 2, 2000)
    y = band_pass(x)
    assert y.shape == x.shape and (y - x)[..., 500:1500].abs().max() < 0.003
    assert torch.allclose(band_pass(x[1, 1]), y[1, 1], atol=1e-6) and band_pass(torch.zeros(3)).shape == (3,)


def test_noise_has_the_level_it_says():
    x = torch.stack([tone(500), tone(500, level=0.01)])
    for snr in (5, 20, 40):
        noisy = add_noise(x, snr, seed=3)
        for clean, heard in zip(x, noisy, strict=True):
            assert abs(db(clean) - db(heard - clean) - snr) < 0.3
        assert torch.equal(noisy, add_noise(x, snr, seed=3)) and not torch.equal(noisy, add_noise(x, snr, seed=4))
    assert torch.equal(add_noise(torch.zeros(9), 5), torch.zeros(9))


def test_packets_are_lost_at_the_rate_and_the_same_ones_again():
    x = torch.randn(3, 160 * 4000 + 7, generator=torch.Generator().manual_seed(0))
    heard, lost = lose_packets(x, 0.1, seed=5)
    assert heard.shape == x.shape and lost.shape == (3, 4001) and abs(float(lost.float().mean()) - 0.1) < 0.01
    again, same = lose_packets(x, 0.1, seed=5)
    assert torch.equal(again, heard) and torch.equal(same, lost) and not torch.equal(lose_packets(x, 0.1, seed=6)[1], lost)
    kept = ~lost.repeat_interleave(160, 1)[:, : x.shape[1]]
    assert torch.equal(heard[kept], x[kept])
    assert torch.equal(lose_packets(x, 0.0)[0], x) and lose_packets(x, 1.0)[0].abs().max() == 0
    for loss in (-0.1, 1.1):
        with pytest.raises(ValueError, match="expected a share of the packets"):
            lose_packets(x, loss)


def test_a_lost_packet_is_the_last_one_again_and_softer():
    x = torch.arange(1.0, 33.0)
    for seed in range(30):
        heard, lost = lose_packets(x, 0.5, seed, packet=4)
        for n, gone in enumerate(lost.tolist()):
            before = heard[4 * n - 4: 4 * n] if n else torch.zeros(4)
            assert torch.equal(heard[4 * n: 4 * n + 4], 0.5 * before if gone else x[4 * n: 4 * n + 4])


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100])
def test_a_line_at_any_rate(rate):
    x = (tone(1000, rate=rate) + tone(150, rate=rate, level=0.4))[: rate - 3]
    clean = tone(1000, rate=rate)[: rate - 3]
    y = telephone(x[None, None], rate, law="a")
    assert y.shape == (1, 1, rate - 3)
    middle = slice(rate // 5, -rate // 5)
    assert db((y[0, 0] - clean)[middle]) - db(clean) < -32
    if rate > 8000:
        assert db(telephone(tone(5000, rate=rate), rate)[middle]) < -50
    worse = telephone(x, rate, snr=10, loss=0.1, seed=2)
    assert torch.equal(worse, telephone(x, rate, snr=10, loss=0.1, seed=2)) and db((worse - clean)[middle]) - db(clean) > -20
    assert telephone(x[:0], rate).shape == (0,)


# ---- calls ----

def call(*spans: tuple[int, float, float], seconds: float = 10, rate: int = RATE, noise: float = 1e-3) -> Tensor:
    """A stereo call: (channel, start, end) of noise that flutters as syllables do, over a quiet line."""
    wav = noise * torch.randn(2, round(seconds * rate), generator=torch.Generator().manual_seed(0))
    for channel, start, end in spans:
        a, b = round(start * rate), round(end * rate)
        syllables = 0.6 + 0.4 * torch.cos(2 * math.pi * 4 * torch.arange(b - a) / rate)
        wav[channel, a:b] += 0.2 * syllables * torch.randn(b - a, generator=torch.Generator().manual_seed(1))
    return wav


def same(found: list[Turn], *wanted: tuple[int, float, float, bool]) -> None:
    assert [(t.channel, t.crosstalk) for t in found] == [(c, x) for c, _, _, x in wanted], found
    for turn, (_, start, end, _) in zip(found, wanted, strict=True):
        assert abs(turn.start - start) <= 0.07 and abs(turn.end - end) <= 0.07, (turn, start, end)


@pytest.mark.parametrize("rate", [8000, 16000, 24000])
def test_speakers_take_turns(rate):
    wav = call((0, 0.5, 2), (1, 2.5, 4), (0, 4.2, 6), (1, 6.3, 6.8), (0, 7, 9), rate=rate)
    same(turns(wav, rate), (0, 0.5, 2, False), (1, 2.5, 4, False), (0, 4.2, 6, False), (1, 6.3, 6.8, False), (0, 7, 9, False))
    mirrored = [turn._replace(channel=1 - turn.channel) for turn in turns(wav.flip(0), rate)]
    assert mirrored == turns(wav, rate)


def test_crosstalk_is_flagged_on_both_sides():
    same(turns(call((0, 1, 4), (1, 3.5, 6)), RATE), (0, 1, 4, True), (1, 3.5, 6, True))
    same(turns(call((0, 1, 6), (1, 3, 3.4), (1, 7, 8)), RATE), (0, 1, 6, True), (1, 3, 8, True))         # "mhm", then an answer
    same(turns(call((0, 1, 3), (1, 3.3, 6), (0, 6.2, 8)), RATE), (0, 1, 3, False), (1, 3.3, 6, False), (0, 6.2, 8, False))


def test_pauses_and_clicks_are_no_turns():
    """A pause belongs to the turn, short or long, while the other one is silent; a click does not."""
    same(turns(call((0, 1, 2), (0, 2.2, 3), (0, 5, 6), (1, 7, 8), (1, 3.5, 3.56)), RATE), (0, 1, 6, False), (1, 7, 8, False))


def test_levels_do_not_matter_but_silence_does():
    wav = call((0, 0.5, 2), (1, 2.5, 4))
    wanted = (0, 0.5, 2, False), (1, 2.5, 4, False)
    for gain in (3, 0.1):
        same(turns(wav * gain, RATE), *wanted)
    same(turns(wav * torch.tensor([[1.0], [0.1]]), RATE), *wanted)
    same(turns(call((0, 0.5, 2), (1, 2.5, 4), noise=0.02), RATE), *wanted)                 # 17 dB above the noise
    assert turns(torch.zeros(2, RATE), RATE) == [] == turns(torch.zeros(2, 0), RATE)
    assert turns(1e-3 * torch.randn(2, RATE, generator=torch.Generator().manual_seed(0)), RATE) == []


def test_a_voice_through_the_wall_is_no_turn():
    wav = call((0, 1, 3), (1, 5, 7))
    same(turns(wav + 0.04 * wav.flip(0), RATE), (0, 1, 3, False), (1, 5, 7, False))
    assert any(turn.crosstalk for turn in turns(wav + 0.04 * wav.flip(0), RATE, leak=100))


def test_someone_who_never_pauses_is_heard():
    same(turns(call((0, 0, 10), noise=0), RATE), (0, 0, 10, False))


def test_turns_survive_the_line():
    wav = call((0, 0.5, 2), (1, 2.5, 4), (0, 4.2, 6), rate=16000)
    heard = telephone(wav, 16000, snr=20, loss=0.03)
    same(turns(heard, 16000), (0, 0.5, 2, False), (1, 2.5, 4, False), (0, 4.2, 6, False))


@pytest.mark.parametrize("shape", [(RATE,), (1, RATE), (3, RATE), (1, 2, RATE)])
def test_a_call_has_two_channels(shape):
    with pytest.raises(ValueError, match=r"expected \(2, W\), a speaker a channel"):
        turns(torch.zeros(shape), RATE)
