"""Speech samples at each evaluation, with metrics that need no speech recogniser.

    out/NAME/samples/step_000100/*.wav  samples.jsonl       the samples, and the metrics of each
    metrics.jsonl   "val/quality_duration_ratio"            seconds generated / seconds expected; 1 is right, 0 silence, 2 runaway
                    "val/quality_silence_ratio"             share of 25 ms frames below -50 dBFS
                    "val/quality_ended"                     share of the samples that the model ended itself
                    "val/quality_similarity_hubert"         cosine similarity of mean HuBERT states, sample and voice reference;
                                                            "_spectrum": of mean log-mel spectra, if the codec has no HuBERT
                    "val/quality_wer"                       word error rate by a recogniser (TrainConfig.recogniser)
                    "val/quality_speaker_similarity"        cosine of speaker vectors, sample and voice reference, or the recording
                                                            of the text where there is none (audio/speaker.py)

    val/tor, latency, stop_latency, words_a_minute ...      a full-duplex model answers the recordings in `prompts`: evaluation/
                                                            duplex_measures.py; "turns_right" where the right replies are known, by the
                                                            words of its text row, "heard_right" by the recogniser

The texts are the same at every evaluation: TrainConfig.prompts, whose expected duration is what their words last on average in
the training data (`Pace`), and the texts of the first `listen` held-out recordings, each in the voice of another clip of its
speaker, with the duration of the recording. The similarity of HuBERT and of spectra shows trends within one run; it does not
identify speakers.
Used by train.py.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from audio import speaker
from audio.recogniser import choose_recogniser, load_whisper, transcribe
from audio.wav import levels, load_wav, resample, save_wav
from audio.whisper import RATE, log_mel
from config import TrainConfig
from corpus.cache import encode
from corpus.data_config import DataConfig
from corpus.examples import prompt_example, spoken_prompt
from corpus.index import Index, fitting_codec
from evaluation.duplex_measures import mean, measure_file
from evaluation.metrics import units, wer
from families.family import family_of
from generation.decode_step import SampleConfig
from generation.dialogue import make_persona, write_reply
from model import MultistreamLM
from options import read_json, write_rows
from sample import Speech, reply, speak_examples
from streams import Example
from text.tokenizers import load_tokenizer
from text.word_times import Alignment, parse_alignments, reply_spans, reply_words, timed_words, turns_right

SILENCE = -50.0             # dBFS
MOST_FRAMES = 2048          # largest number of frames of one sample


@dataclass
class Trial:
    """One text to speak: its prompt, its expected seconds and its voice reference."""

    name: str
    text: str
    prompt: Example
    seconds: float
    voice: Tensor | None = None         # (Q, T) codes
    recording: Tensor | None = None     # (Q, T) codes of somebody saying the text


def speak_samples(model: MultistreamLM, config: TrainConfig, index: Index, folder: Path) -> dict[str, float]:
    """Generate the samples of a run into `folder`; returns the means of their metrics, {"quality_...": value}.

    A full-duplex model answers the recordings in `prompts` instead, and the conversations are measured.
    """
    codec = fitting_codec(config.data.codec, config.model.table, load_tokenizer(config.data.tokenizer))
    if config.model.table.monologue and config.model.table.timing.lead <= 0:
        return answer(model, config.prompts, config.data, codec, folder, config.recogniser)
    tried = list(trials(config, index, codec))
    cap = config.model.table.columns_per_frame * min(MOST_FRAMES, 50 + round(2 * codec.frame_rate * max(trial.seconds for trial in tried)))
    rules = SampleConfig(**family_of(config.model.table).rules(config.model.table) | {"max_frames": cap})
    spoken = speak_examples(model, [trial.prompt for trial in tried], rules, codec)
    rows = []
    for trial, speech in zip(tried, spoken, strict=True):
        name = "".join(c if c.isalnum() else "_" for c in trial.name[:60]) + ".wav"
        save_wav(folder / name, speech.wav, codec.sample_rate)
        rows.append({"text": trial.text, "wav": name} | measure(speech, trial, codec))
    if config.recogniser:
        score(rows, spoken, tried, codec, config.recogniser)
    write_rows(folder / "samples.jsonl", rows)
    return means(rows)


def answer(model: MultistreamLM, recordings: Sequence[str], data: DataConfig, codec: object, folder: Path,
           recogniser: str = "") -> dict[str, float]:
    """Answer recordings (the right channel, if stereo) into wavs of `folder`; returns the means of evaluation/duplex_measures.py."""
    tokenizer, table, rows = load_tokenizer(data.tokenizer), model.table, []
    users = [load_wav(path, codec.sample_rate, None)[0][-1:] for path in recordings]
    codes = [encode(codec, user) for user in users]
    family = family_of(table)
    rules, persona = SampleConfig(**family.rules(table)), make_persona(data.system if family.persona else "", (), codec, tokenizer, table)
    if len({c.shape for c in codes}) == 1:                                           # equally long: one batch
        replies = list(reply(model, torch.stack(codes), rules, persona=persona))
    else:
        replies = [reply(model, c[None], rules, persona=persona)[0] for c in codes]
    for path, user, frames in zip(recordings, users, replies, strict=True):
        wav, beside = folder / f"{Path(path).stem}.wav", Path(path).with_suffix(".json")
        write_reply(wav, frames, user, codec, tokenizer, table)
        right = {}
        if beside.is_file():
            words = timed_words(frames[0], tokenizer, codec.frame_rate, table.pad, table.epad)
            reference = parse_alignments(read_json(beside))
            right = turns_right(reference, words)
            if recogniser and right:
                right["heard_right"] = replies_heard(reference, wav, choose_recogniser(recogniser))
        rows.append(measure_file(wav) | right)
    return mean(rows)


def replies_heard(reference: Sequence[Alignment], path: Path, hear: Callable[[list[tuple[Tensor, int]]], list[str]]) -> float:
    """How many of the user's turns get the recorded reply, as a recogniser hears the agent's channel; figures are read both ways."""
    wav, rate = load_wav(path, None, 2)
    spans = [(begin, min(end, wav.shape[1] / rate)) for begin, end in reply_spans(reference)]
    clips = [(wav[:1, round(begin * rate) : round(end * rate)], rate) for begin, end in spans]
    heard = hear([clip for clip in clips if clip[0].shape[1]])
    said = iter(heard)
    found = [next(said) if clip.shape[1] else "" for clip, _ in clips]
    expected = [" ".join(reply_words(reference, begin, end)) for begin, end in reply_spans(reference)]
    return float(sum(wer(right, text) == 0 if right else not text.strip() for right, text in zip(expected, found, strict=True)))


def trials(config: TrainConfig, index: Index, codec: Any) -> list[Trial]:
    """The texts of a run: its prompts, then held-out recordings in order."""
    data, table, entries = config.data, config.model.table, index.entries
    tokenizer = load_tokenizer(data.tokenizer)
    pace = Pace(index)
    found = [Trial(text, text, prompt_example(text, data, tokenizer, codec, table=table), pace(text)) for text in config.prompts]
    held = (n for n, e in enumerate(entries) if e.split == "held-out" and e.key and e.text.strip())
    for n in islice(held, config.listen):
        other = voice_of(index, n) if data.reference or entries[n].reference >= 0 else -1
        voice = index.codes(other, 0) if other >= 0 else None
        prompt = spoken_prompt(index, n, other, data, table)
        found.append(Trial(entries[n].id, entries[n].text, prompt, entries[n].frames[0] / codec.frame_rate, voice, index.codes(n, 0)))
    return found


class Pace:
    """How long a text should last in the manner of the training data: each word as long as it lasts there, others by their letters.

    Single words with a pause behind them and sentences have paces of their own, so an average over all letters is right for neither.
    """

    def __init__(self, index: Index) -> None:
        entries, self.words, self.letter = index.entries, dict[str, list[float]](), 0.0
        used = Counter(n for at, e in enumerate(entries) if e.split == "train" for n in (e.parts or [at]) if entries[n].key)
        clips = used or Counter(n for n, e in enumerate(entries) if e.key)
        letters = 0
        for n, times in clips.items():
            words, seconds = units(entries[n].text), times * entries[n].frames[0] / index.info["frame_rate"]
            total = sum(map(len, words))
            self.letter, letters = self.letter + seconds, letters + times * total
            for word in words:
                sums = self.words.setdefault(word, [0.0, 0.0])
                sums[0], sums[1] = sums[0] + seconds * len(word) / total, sums[1] + times
        self.letter /= max(1, letters)

    def __call__(self, text: str) -> float:
        """Expected seconds."""
        sums = [self.words.get(word, [len(word) * self.letter, 1.0]) for word in units(text)]
        return max(0.04, sum(seconds / times for seconds, times in sums))           # a text of signs alone lasts something, too


def voice_of(index: Index, number: int) -> int:
    """The entry that is the voice reference of another: its own reference, or another clip of its speaker; -1 = none."""
    entry = index.entries[number]
    if entry.reference >= 0:
        return entry.reference
    others = (n for n, e in enumerate(index.entries) if e.key and entry.speaker and e.speaker == entry.speaker and e.key != entry.key)
    return next((n for n in others if index.entries[n].text.strip()), -1)


def measure(speech: Speech, trial: Trial, codec: Any) -> dict[str, float]:
    """The metrics of one sample."""
    seconds = speech.frames / codec.frame_rate
    found = {"seconds": seconds, "duration_ratio": seconds / trial.seconds, "ended": float(speech.ended),
             "silence_ratio": silence(speech.wav, codec.sample_rate)}
    if trial.voice is not None:
        kind = "hubert" if hasattr(codec, "semantic_states") else "spectrum"
        found[f"similarity_{kind}"] = similarity(speech.codes, trial.voice, codec) if speech.frames else 0.0
    return found


def score(rows: list[dict[str, Any]], spoken: Sequence[Speech], tried: Sequence[Trial], codec: Any, recogniser: str) -> None:
    """Add to the row of each sample what a recogniser hears, its word error rate, and how much it sounds like the speaker."""
    heard = choose_recogniser(recogniser)([(speech.wav, codec.sample_rate) for speech in spoken])
    for row, text, speech, trial in zip(rows, heard, spoken, tried, strict=True):
        row |= {"heard": text, "wer": wer(trial.text, text)}
        like = trial.recording if trial.voice is None else trial.voice
        if like is not None and not speaker.missing():
            row["speaker_similarity"] = speaker.similarity((speech.wav, codec.sample_rate), (codec.decode(like[None]), codec.sample_rate))


def check_scorers(config: TrainConfig) -> list[str]:
    """Load what scores the samples, before a run begins; ValueError names what to install. Returns lines to print."""
    if not config.recogniser:
        return []
    if choose_recogniser(config.recogniser) is transcribe:
        load_whisper()
    if (lacks := speaker.missing()) and config.best == "speaker_similarity":
        raise ValueError(lacks)
    return [f"speaker similarity is not measured: {lacks}"] if lacks and config.listen else []


def badness(numbers: dict[str, float], best: str) -> float:
    """What ckpt/best goes by, lower is better; infinite where it was not measured."""
    name, sign = {"loss": ("loss", 1), "wer": ("quality_wer", 1), "speaker_similarity": ("quality_speaker_similarity", -1)}[best]
    return sign * numbers[name] if name in numbers else float("inf")


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of every metric over the rows that have it."""
    names = dict.fromkeys(key for row in rows for key in row if key not in ("text", "wav", "seconds", "heard"))
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {f"quality_{name}": sum(values) / len(values) for name, values in found.items()}


def silence(wav: Tensor, rate: int) -> float:
    """Share of silent 25 ms frames in (1, W); 1 for an empty wav."""
    level = levels(wav, rate)
    return float((level < SILENCE).float().mean()) if level.numel() else 1.0


def similarity(codes: Tensor, voice: Tensor, codec: Any) -> float:
    """Cosine between the voices of two recordings, (Q, T) codes each."""
    return float(F.cosine_similarity(*(voice_vector(c, codec) for c in (codes, voice)), dim=0))


@torch.no_grad()
def voice_vector(codes: Tensor, codec: Any) -> Tensor:
    """A vector of the voice: the mean over time of HuBERT's states, or of a log-mel spectrum without its level."""
    wav = codec.decode(codes[None])[:, 0]                                            # (1, W)
    if hasattr(codec, "semantic_states"):
        return codec.semantic_states(wav)[0].mean(1)                                 # (1, D, T) -> (D,)
    mel = log_mel(resample(wav, codec.sample_rate, RATE), 80, None)[0].mean(1)       # (1, 80, T) -> (80,)
    return mel - mel.mean()


def summary_line(numbers: dict[str, float]) -> str:
    """The metrics in one line, for the log."""
    return "samples: " + ", ".join(f"{name.removeprefix('quality_').replace('_', ' ')} {value:.2f}" for name, value in numbers.items())
