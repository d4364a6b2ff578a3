"""A conversation from outside: recordings that a model hears, files of what was said, and how the talk went.

    user    =======             ====                      reply latency   from the end of what the user said to the agent's
    agent           =========      =======                                next beginning; below 0 he was interrupted
            <------>  latency   <->                       overlap ratio   time with both / time with anybody
                                                          PAD ratio       frames of the text row in which no word is said

Left is the agent, right the user, as in duplex.py. `python evaluate.py FOLDER` measures every stereo wav of a folder: what
sample.py wrote (the text row lies in the .json beside it), or recordings. Speech is told by loudness (audio/telephone.py).
Next: sample.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio.telephone import spoken
from audio.wav import load_wav, save_wav
from duplex import MAIN, Alignment, as_json, check_length, interleave, parse_alignments, phrases, tidy, tokenise, transcript
from options import read_json, write_json, write_text
from streams import StreamTable
from text import Tokenizer, normalise

BEHIND = 3.5                # seconds of silence after a recording whose words are written: they come up to 2.5 s late
LATE = 10.0                 # seconds after which what the agent says is no reply


# ---- in and out ----

def opening(path: str | Path, codec: Any, tokenizer: Tokenizer, table: StreamTable, data: Any) -> Tensor:
    """Frames (K, T) of a recorded dialogue to go on with, left the agent; his words are those of the .json beside it, if there."""
    wav, rate = load_wav(path, codec.sample_rate, 2)
    with torch.inference_mode():
        sides = codec.encode(wav[:, None]).clone().cpu()                          # (2, Q, T)
    beside, words = Path(path).with_suffix(".json"), list[Alignment]()
    if beside.is_file():
        try:
            words = tidy(parse_alignments(read_json(beside)))[0]
            check_length(words, wav.shape[1] / rate)
        except ValueError as error:
            raise ValueError(str(error) if str(beside) in str(error) else f"{beside}: {error}; mend it or move it away") from None
    own = [(said, *rest) for word, *rest in words if rest[-1] == MAIN and (said := normalise(word, data.normaliser).strip())]
    tokens = tokenise(own, tokenizer, data.contextual, data.spaces)
    text = interleave(tokens, sides.shape[-1], codec.frame_rate, data.interleaver, table.pad, table.epad)
    held = table.column("start")[1 : table.lead].expand(-1, len(text))
    frames = torch.cat([text[None], held, *sides])
    if len(frames) != len(table):
        raise ValueError(f"two sides of {sides.shape[1]} codebooks are {2 * sides.shape[1]} rows, the model has {len(table.audio)}; "
                         + "only a model that hears one side and speaks the other can go on with a dialogue")
    return frames


def recorded(job: Any, codec: Any, tokenizer: Tokenizer, table: StreamTable, data: Any) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """What a conversation starts from: frames (1, K, t) of the dialogue job.prompt or None, the user's codes (1, Q, T) from its
    beginning on, None where the model speaks for both, and his wav (1, W): job.user, or silence for job.seconds."""
    wav = load_wav(job.user, codec.sample_rate)[0] if job.user else torch.zeros(1, round(job.seconds * codec.sample_rate))
    if not table.audio_out:
        wav = torch.nn.functional.pad(wav, (0, round(BEHIND * codec.sample_rate)))
    before = opening(job.prompt, codec, tokenizer, table, data)[None] if job.prompt else None
    heard = [k for k in table.audio if k not in table.audio_out]
    if not heard:
        if job.user:
            raise ValueError("this model speaks for both sides and hears nobody; leave --user out, or trim it (checkpoint.py trim-depth)")
        return before, None, wav
    with torch.inference_mode():
        codes = codec.encode(wav[None]).clone().cpu()
    return before, codes if before is None else torch.cat([before[:, heard], codes], -1), wav


def timed_words(text: Tensor, tokenizer: Tokenizer, frame_rate: float, pad: int, epad: int) -> list[Alignment]:
    """The words of a text row (T,) with their times, as alignments: a word lasts from its first token to behind its last one."""
    words: list[Alignment] = []
    for phrase in phrases(text, frame_rate, (pad, epad)):
        before = len(words)
        for n, (t, _) in enumerate(phrase):
            said = tokenizer.decode([token for _, token in phrase[: n + 1]]).split()
            if len(said) > len(words) - before:
                words.append((said[-1], t / frame_rate, (t + 1) / frame_rate, MAIN))
            elif said:
                words[-1] = (said[-1], words[-1][1], (t + 1) / frame_rate, MAIN)
    return words


def write_reply(out: str | Path, frames: Tensor, user: Tensor | None, codec: Any, tokenizer: Tokenizer, table: StreamTable) -> str:
    """Write a conversation, frames (K, T): a stereo wav, left the agent, right `user` (1, W) or what his rows say. Returns what was
    written: beside the wav lie its words as .txt, and the text row with them as alignments, Moshi's sidecar, as .json."""
    rows, text, rate, pads = table.audio, frames[0], codec.frame_rate, (table.pad, table.epad)
    sides = [table.audio_out[: codec.num_codebooks], [] if user is not None else rows[len(rows) // 2 :]]
    wavs = [codec.decode(frames[None, side].clamp(max=codec.codebook_size - 1))[0].cpu() for side in sides if side]
    wavs += [user] if user is not None else []
    length = max(wav.shape[1] for wav in wavs)
    wavs = [torch.nn.functional.pad(wav, (0, length - wav.shape[1])) for wav in wavs]
    if len(wavs) == 2:                                                           # a recogniser only writes
        save_wav(out, torch.cat(wavs), codec.sample_rate)
    row = {"alignments": as_json(timed_words(text, tokenizer, rate, *pads)), "frame_rate": rate, "text": text.tolist(), "pads": list(pads)}
    for suffix, written in ((".txt", transcript(text, tokenizer, rate, *pads)), (".json", json.dumps(row, ensure_ascii=False))):
        write_text(Path(out).with_suffix(suffix), written)
    seconds, txt = frames.shape[1] / rate, Path(out).with_suffix(".txt")
    return f"{out}: {seconds:.1f} s, left the model; its words are in {txt.name} beside it" if len(wavs) == 2 else f"{txt}: {seconds:.1f} s"


# ---- how it went ----

def measure(wav: Tensor, rate: int, text: Sequence[int] = (), pads: Sequence[int] = ()) -> dict[str, float]:
    """Numbers of one conversation: wav (2, W), and the ids of its text row, `pads` those that say nothing."""
    spans = spoken(wav, rate)
    seconds = wav.shape[1] / rate
    waits, asked = latencies(spans)
    own, other = (active(spans, channel, seconds) for channel in (0, 1))
    numbers = {"seconds": seconds, "user_turns": asked, "replies": len(waits), "agent_share": float(own.float().mean()),
               "overlap_ratio": float((own & other).sum() / (own | other).sum().clamp(min=1))}
    if waits:
        numbers |= {"reply_latency": sum(waits) / len(waits), "reply_latency_median": float(torch.tensor(waits).median())}
    said = [token for token in text if token >= 0]
    if said:
        numbers["pad_ratio"] = sum(token in pads for token in said) / len(said)
    return numbers


def latencies(spans: Sequence[tuple[float, float, int]]) -> tuple[list[float], int]:
    """Seconds from the end of each thing the user said to the agent's reply, and how often the user spoke.

    What the user says until the agent begins is one thing. Without a beginning within LATE seconds there is no reply.
    """
    waits, asked, until = [], 0, None
    for start, end, channel in spans:
        if channel == 1:
            asked += until is None
            until = end if until is None else max(until, end)
        elif until is not None:
            waits += [start - until] if start - until <= LATE else []
            until = None
    return waits, asked


def active(spans: Sequence[tuple[float, float, int]], channel: int, seconds: float, step: float = 0.01) -> Tensor:
    """Which hundredths of a second a channel speaks in.   -> (n,) bool"""
    on = torch.zeros(max(1, round(seconds / step)), dtype=torch.bool)
    for start, end, who in spans:
        if who == channel:
            on[round(start / step) : round(end / step)] = True
    return on


def measure_file(path: Path) -> dict[str, float] | None:
    """Measure a stereo wav, with the text row of the .json beside it where there is one; None when it is not stereo."""
    wav, rate = load_wav(path, None, None)
    if wav.shape[0] != 2:
        return None
    row = read_json(path.with_suffix(".json")) if path.with_suffix(".json").is_file() else None
    text, pads = (row.get("text"), row.get("pads")) if isinstance(row, dict) else (None, None)
    known = all(isinstance(ids, list) and all(isinstance(n, int) for n in ids) for ids in (text, pads))
    return measure(wav, rate, text, pads) if known else measure(wav, rate)


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over conversations; a latency counts as often as there were replies. Medians are of the conversations' medians."""
    result = {}
    for name in ("reply_latency", "reply_latency_median", "overlap_ratio", "pad_ratio", "agent_share"):
        known = [row for row in rows if name in row]
        weights = [row["replies"] if name == "reply_latency" else 1 for row in known]
        if known:
            result[name] = sum(row[name] * w for row, w in zip(known, weights, strict=True)) / sum(weights)
    return result | {name: sum(row[name] for row in rows) for name in ("replies", "user_turns")}


def report(folder: Path) -> dict[str, Any] | None:
    """Measure the stereo wavs of a folder, print a table and write dialogues.json; None when there are none."""
    found = {path.relative_to(folder).as_posix(): measure_file(path) for path in sorted(folder.glob("**/*.wav"))}
    rows = [{"wav": name} | numbers for name, numbers in found.items() if numbers is not None]
    if not rows:
        return None
    for row in [*rows, {"wav": "mean"} | mean(rows)]:
        told = [f"latency {row['reply_latency']:+.2f} s" if "reply_latency" in row else "no reply", f"overlap {row['overlap_ratio']:.2f}",
                f"PAD {row['pad_ratio']:.2f}" if "pad_ratio" in row else "no text row"]
        print(f"{row['wav']:<24} {row['replies']:3d} of {row['user_turns']} replies, {', '.join(told)}")
    result = {"mean": mean(rows), "dialogues": rows}
    write_json(folder / "dialogues.json", result)
    return result
