"""Augment recorded dialogues: speed, noise, gain, pitch, echo; the agent's channel stays clean.

    channel   speed   noise   gain    pitch   echo
    agent     x
    user      x       x       x       x       of the agent's voice, as an open microphone records it

`draw` decides, by a seed, what happens to a version of a clip; `apply` does it. Speed stretches both channels by resampling,
so word times divide by it. `shift` moves the sound (+) or the words (-) against each other and touches no sample but silence.
Ranges by default: those of the DSAA reference. Pitch: a phase vocoder (Flanagan and Golden 1966) and resampling.
Next: hub.py.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from audio.wav import SOUNDS, load_wav, resample


@dataclass(frozen=True)
class AugmentConfig:
    """How often, and how much. All probabilities are 0 by default."""

    noise: float = 0.0                                    # probability of noise behind the user
    noise_dir: str = ""                                   # folder of recordings to take it from
    noise_snr: tuple[float, float] = (10.0, 50.0)         # dB below the user's voice
    gain: float = 0.0                                     # probability of another loudness of the user
    gain_db: tuple[float, float] = (-24.0, 15.0)          # dB added to it
    speed: float = 0.0                                    # probability of another speed of both
    speed_range: tuple[float, float] = (0.85, 1.15)       # factor on it, in steps of 2 %
    pitch: float = 0.0                                    # probability of another pitch of the user
    pitch_cents: tuple[float, float] = (-200.0, 200.0)    # hundredths of a semitone
    echo: float = 0.0                                     # probability that the user's microphone picks up the agent
    echo_ms: tuple[float, float] = (100.0, 500.0)         # how late, in milliseconds
    echo_factor: tuple[float, float] = (0.0, 0.2)         # how loud, as a factor
    shift: float = 0.0                                    # probability that sound and words move against each other
    shift_seconds: tuple[float, float] = (-0.56, 0.56)    # positive: the sound comes late; negative: the words

    def __post_init__(self) -> None:
        for name in ("noise", "gain", "speed", "pitch", "echo", "shift"):
            assert 0 <= getattr(self, name) <= 1, f"{name} is a probability, got {getattr(self, name)}"
        for name in ("noise_snr", "gain_db", "speed_range", "pitch_cents", "echo_ms", "echo_factor", "shift_seconds"):
            assert getattr(self, name)[0] <= getattr(self, name)[1], f"{name} runs from low to high, got {getattr(self, name)}"
        assert self.speed_range[0] > 0 and self.echo_ms[0] >= 0, "speed and echo are positive"
        assert not self.noise or self.noise_dir, "noise needs noise_dir, a folder of recordings"


@dataclass(frozen=True)
class Change:
    """What happens to one version of a clip; None = nothing of the kind."""

    noise: tuple[float, int] | None = None      # SNR in dB, number of the recording
    gain: float | None = None                   # dB
    speed: float = 1.0
    pitch: float | None = None                  # cents
    echo: tuple[float, float] | None = None     # seconds, factor
    shift: float = 0.0                          # seconds


def draw(c: AugmentConfig, key: str) -> Change:
    """What a key, a clip and the number of its version, stands for: always the same."""
    r = random.Random(key)
    chance = {name: r.random() < getattr(c, name) for name in ("noise", "gain", "speed", "pitch", "echo", "shift")}
    values = {"noise": (r.uniform(*c.noise_snr), r.randrange(2**31)), "gain": r.uniform(*c.gain_db),
              "speed": round(r.uniform(*c.speed_range) * 50) / 50, "pitch": r.uniform(*c.pitch_cents),       # 2 %: short resampling filters
              "echo": (r.uniform(*c.echo_ms) / 1000, r.uniform(*c.echo_factor)), "shift": r.uniform(*c.shift_seconds)}
    return Change(**{name: values[name] for name, wanted in chance.items() if wanted})


def apply(wav: Tensor, rate: int, change: Change, noises: list[Path]) -> Tensor:
    """A version of a dialogue (2, W): left the agent, right the user."""
    if change.speed != 1.0:
        wav = resample(wav, round(100 * change.speed), 100)
    agent, user = wav
    if change.pitch is not None:
        user = pitched(user, change.pitch)
    if change.echo is not None:
        user = user + echo(agent, round(change.echo[0] * rate), change.echo[1])
    if change.noise is not None:
        user = user + noise_like(user, rate, *change.noise, noises)
    if change.gain is not None:
        user = user * 10 ** (change.gain / 20)
    wav = torch.stack([agent, user])
    return torch.nn.functional.pad(wav, (round(max(0.0, change.shift) * rate), 0)).clamp(-1, 1)


def recordings(folder: str) -> list[Path]:
    """The sound files of a noise folder, in order; ValueError when there is none."""
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SOUNDS) if folder else []
    if folder and not found:
        raise ValueError(f"noise_dir {folder} holds no sound file ({', '.join(SOUNDS)})")
    return found


def noise_like(voice: Tensor, rate: int, snr: float, number: int, noises: list[Path]) -> Tensor:
    """A stretch of a noise recording, as long as the voice (W,) and `snr` dB weaker than it; zeros for a silent voice."""
    noise = load_wav(noises[number % len(noises)], rate)[0].mean(0)
    start = number % max(1, len(noise) - len(voice) + 1)
    noise = noise[start:].repeat(-(-len(voice) // len(noise[start:])))[: len(voice)]
    return noise * (voice.square().mean() / noise.square().mean().clamp(min=1e-20) / 10 ** (snr / 10)).sqrt()


def echo(voice: Tensor, samples: int, factor: float) -> Tensor:
    """An echo of a voice (W,), `samples` later and weaker, cut at W."""
    return factor * torch.nn.functional.pad(voice, (samples, 0))[: len(voice)]


def pitched(voice: Tensor, cents: float) -> Tensor:
    """A voice (W,) so many hundredths of a semitone higher, as long and as loud as before."""
    ratio = round(100 * 2 ** (cents / 1200)) / 100
    higher = resample(stretched(voice, ratio)[None], round(100 * ratio), 100)[0]
    higher = torch.nn.functional.pad(higher, (0, max(0, len(voice) - len(higher))))[: len(voice)]
    return higher * (voice.square().mean() / higher.square().mean().clamp(min=1e-20)).sqrt()      # phases that part cancel some of it


def stretched(voice: Tensor, factor: float, window: int = 1024, hop: int = 256) -> Tensor:
    """A voice (W,) that lasts `factor` times as long at the same pitch: phases go on at the speed at which they turned."""
    if factor == 1.0 or len(voice) < window:
        return voice
    hann = torch.hann_window(window)
    spectrum = torch.stft(voice, window, hop, window=hann, return_complex=True)              # (F, J)
    frames = torch.arange(0, spectrum.shape[1] - 1, 1 / factor)
    left, part = frames.long(), frames - frames.floor()
    size = torch.nn.functional.pad(spectrum.abs(), (0, 1))
    size = (1 - part) * size[:, left] + part * size[:, left + 1]
    usual = 2 * torch.pi * hop * torch.arange(spectrum.shape[0]) / window                    # how far a bin's centre turns in a hop
    turn = spectrum[:, left + 1].angle() - spectrum[:, left].angle() - usual[:, None]
    turn = turn - 2 * torch.pi * (turn / (2 * torch.pi)).round() + usual[:, None]
    phase = torch.cat([spectrum[:, :1].angle(), turn[:, :-1]], 1).cumsum(1)
    return torch.istft(torch.polar(size, phase), window, hop, window=hann, length=round(factor * len(voice)))
