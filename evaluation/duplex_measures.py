"""How a full-duplex conversation went, in numbers; those of Full-Duplex-Bench (arXiv:2503.04721, v1.5 2507.23159) as its scripts count.

    user    =======             ====                      reply latency   from the end of what the user said to the agent's
    agent           =========      =======                                next beginning; below 0 the user was interrupted
            <------>  latency   <->                       overlap ratio   time with both / time with anybody
                                                          PAD ratio       frames of the text row in which no word is said
                                                          turns right     replies whose words are those of the recorded reply

    tor               turn-over rate: share of the user's turns behind which the agent takes the turn: it says something that is not below
                      1 s with 3 words or less. Low is good where the user only pauses, high is good where the turn ends
    latency           seconds from the end of the user's turn to the agent's first word, at least 0, where the turn was taken
    stop_latency      seconds that both speak, each time: how long the agent goes on when the user comes in
    response_latency  seconds from the end of what the user said to the agent's next beginning, pauses joined
    backchannel       events a second, and the distance (Jensen-Shannon) of their times from those of people
    words_a_minute, mean_pitch, mean_intensity    of the agent; in v1.5 before and behind the moment of an overlap

`python evaluate.py FOLDER` measures every stereo wav of a folder: what sample.py wrote (words and text row lie in the .json beside
it), or recordings. Speech is found by loudness there (audio/telephone.py). `python evaluate.py duplex FOLDER` measures a folder of
Full-Duplex-Bench with its voice activity detector (evaluation/speech_report.py has the command).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio.pitch import voice
from audio.telephone import spoken
from audio.wav import load_wav
from options import read_json, write_json

LATE = 10.0                 # seconds after which what the agent says is no reply
SHORT, FEW = 1.0, 3         # seconds and words of what is no turn yet
USER_GAP, AGENT_GAP = 0.6, 0.5          # seconds of silence that do not end what somebody says
LONG = 3.0                  # seconds from which speech is a turn and no backchannel
BIN = 0.2                   # seconds in a bin of backchannel times
Word = tuple[str, float | None, float | None]           # text, start and end in seconds
Span = tuple[float, float]


# ---- Full-Duplex-Bench, on words and spans ----

def turn_taken(words: Sequence[Word]) -> bool:
    """Whether what was said is a turn: 1 s or longer, or more than 3 words."""
    if not words:
        return False
    first, last = words[0][1] or 0.0, words[-1][1] if words[-1][2] is None else words[-1][2]
    return (last or 0.0) - first >= SHORT or len(words) > FEW


def latency_of(words: Sequence[Word], end: float) -> float | None:
    """Seconds from the end of the user's turn to the first word, None where the turn is not taken."""
    return max(0.0, (words[0][1] or 0.0) - end) if turn_taken(words) else None


def merged(spans: Sequence[Span], gap: float) -> list[Span]:
    """Join spans that are at most `gap` seconds apart."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def overlaps(user: Sequence[Span], agent: Sequence[Span]) -> list[Span]:
    """When both speak, by their ends; of several that end within a millisecond the shortest."""
    found: dict[int, Span] = {}
    for u, a in ((u, a) for u in user for a in agent):
        start, end = max(u[0], a[0]), min(u[1], a[1])
        if end > start and start >= found.get(round(1000 * end), (start, end))[0]:
            found[round(1000 * end)] = (start, end)
    return [(round(start, 3), round(end, 3)) for start, end in sorted(found.values(), key=lambda span: span[1])]


def response_gaps(user: Sequence[Span], agent: Sequence[Span]) -> list[Span]:
    """From each end of the user's speech to the agent's next beginning; of several before one beginning the last."""
    found: dict[int, Span] = {}
    for _, end in user:
        start = next((start for start, _ in agent if start > end), None)
        if start is not None and round(end, 3) >= found.get(round(1000 * start), (round(end, 3),))[0]:
            found[round(1000 * start)] = (round(end, 3), round(start, 3))
    return sorted(found.values(), key=lambda span: span[1])


def backchannels(spans: Sequence[Span], words: Sequence[Word], seconds: float, human: Sequence[float] = ()) -> dict[str, float]:
    """v1: tor, events a second, and the distance of their times from `human` (a distribution over the recording), 1 without an event.

    Speech of more than 3 s ends the count; below it, the last event decides about the turn, as in the published script.
    """
    taken, events = False, list[Span]()
    for start, end in spans:
        if end - start > LONG:
            taken = True
            break
        said = [w for w in words if w[1] is not None and not (w[2] is None and w[1] < end) and within(w, start, end)]
        taken = len(said) > FEW or end - start >= 1 or len(said) > 2
        events.append((start, end))
    found = {"tor": float(taken), "frequency": len(events) / seconds}
    return found | ({"divergence": divergence(events, seconds, human) if events else 1.0} if len(human) or not events else {})


def within(word: Word, start: float, end: float) -> bool:
    first, last = word[1], word[1] if word[2] is None else word[2]
    return first <= end and (last > start or first >= start)


def divergence(events: Sequence[Span], seconds: float, human: Sequence[float]) -> float:
    """Jensen-Shannon distance between the times of events and those of people, stretched to the same length."""
    counts = np.full(int(seconds / BIN) + 1, 1e-10)
    for start, end in events:
        counts[int(start / BIN) : int(end / BIN) + 1] += 1
    stretched = np.interp(np.linspace(0, 1, len(counts)), np.linspace(0, 1, len(human)), human)
    p, q = counts / counts.sum(), stretched / stretched.sum()
    return float(np.sqrt(max(0.0, relative_entropy(p, (p + q) / 2) + relative_entropy(q, (p + q) / 2)) / 2))


def relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


def split_time(words: Sequence[Word], end: float) -> float:
    """Where v1.5 splits a recording: the beginning of the word at or behind the end of an overlap, else the end of the last word."""
    timed = sorted((w[1], w[2]) for w in words if w[1] is not None and w[2] is not None)
    return next((start for start, stop in timed if end < stop), timed[-1][1]) if timed else end


def words_a_minute(words: Sequence[Word]) -> float:
    """From the beginning of the first word to the end of the last; 0 without words."""
    seconds = (words[-1][2] or 0.0) - (words[0][1] or 0.0) if words else 0.0
    return 60 * len(words) / seconds if seconds > 0 else 0.0


def before_and_after(wav: Tensor, rate: int, words: Sequence[Word], end: float, speech: Any) -> dict[str, Any]:
    """v1.5: words a minute, pitch and intensity of the speech before and behind an overlap.   `speech(wav)` finds spans of (1, W)"""
    at = min(max(0.0, split_time(words, end)), wav.shape[-1] / rate)
    timed = [w for w in words if w[1] is not None and w[2] is not None]
    sides = {"pre": (wav[..., : round(at * rate)], [w for w in timed if w[2] <= at]),
             "post": (wav[..., round(at * rate) :], [w for w in timed if w[2] > at])}
    return {"split_t": at} | {name: manner(sound, rate, said, speech) for name, (sound, said) in sides.items() if sound.shape[-1]}


def manner(wav: Tensor, rate: int, words: Sequence[Word], speech: Any) -> dict[str, float]:
    """Words a minute, pitch and intensity of what is said in (1, W), without its pauses."""
    parts = [wav[..., round(s * rate) : round(e * rate)] for s, e in speech(wav)] or [wav]
    return {"wpm": words_a_minute(words)} | voice(torch.cat(parts, -1), rate)


# ---- a conversation ----

def measure(wav: Tensor, rate: int, text: Sequence[int] = (), pads: Sequence[int] = (),
            words: Sequence[Word] | None = None) -> dict[str, float]:
    """Numbers of one conversation: wav (2, W), the ids of its text row, `pads` those that say nothing, and the agent's words.

    Without words a turn is taken by speech of 1 s or more.
    """
    spans = spoken(wav, rate)
    seconds = wav.shape[1] / rate
    waits, asked = latencies(spans)
    own, other = (active(spans, channel, seconds) for channel in (0, 1))
    numbers = {"seconds": seconds, "user_turns": asked, "replies": len(waits), "agent_share": float(own.float().mean()),
               "overlap_ratio": float((own & other).sum() / (own | other).sum().clamp(min=1))}
    if waits:
        numbers |= {"reply_latency": sum(waits) / len(waits), "reply_latency_median": float(torch.tensor(waits).median())}
    agent, user = ([(s, e) for s, e, who in spans if who == channel] for channel in (0, 1))
    said = words if words is not None else [("", s, e) for s, e in merged(agent, AGENT_GAP)]
    numbers |= turn_over(merged(user, USER_GAP), said)
    both = overlaps(merged(user, USER_GAP), merged(agent, AGENT_GAP))
    numbers |= {"overlaps": len(both)} | ({"stop_latency": sum(e - s for s, e in both) / len(both)} if both else {})
    if words:
        numbers["words_a_minute"] = 60 * len(words) / max(0.01, sum(e - s for s, e in merged(agent, AGENT_GAP)))
    if agent:
        sound = torch.cat([wav[0, round(s * rate) : round(e * rate)] for s, e in agent])
        numbers |= {name: x for name, x in voice(sound, rate).items() if name.startswith("mean")}
    said = [token for token in text if token >= 0]
    if said:
        numbers["pad_ratio"] = sum(token in pads for token in said) / len(said)
    return numbers


def turn_over(user: Sequence[Span], words: Sequence[Word]) -> dict[str, float]:
    """Of each turn of the user: whether the agent takes over before the next one begins, and how soon."""
    waits = []
    for (begin, end), after in zip(user, [*(start for start, _ in user[1:]), float("inf")], strict=True):
        reply = [w for w in words if begin <= (w[1] or 0.0) < after and (w[1] if w[2] is None else w[2]) > end]
        waits += [wait] if (wait := latency_of(reply, end)) is not None and wait <= LATE else []
    found = {"turns_taken": float(len(waits)), "turns_offered": float(len(user)), "tor": len(waits) / len(user)} if user else {}
    return found | ({"latency": sum(waits) / len(waits)} if waits else {})


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
    """Measure a stereo wav, with the words and the text row of the .json beside it where there is one; None when it is not stereo."""
    wav, rate = load_wav(path, None, None)
    if wav.shape[0] != 2:
        return None
    row = read_json(path.with_suffix(".json")) if path.with_suffix(".json").is_file() else None
    text, pads = (row.get("text"), row.get("pads")) if isinstance(row, dict) else (None, None)
    if not all(isinstance(ids, list) and all(isinstance(n, int) for n in ids) for ids in (text, pads)):
        return measure(wav, rate)
    return measure(wav, rate, text, pads, alignment_words(row.get("alignments")))


def alignment_words(found: Any) -> list[Word] | None:
    """What the agent says, of alignments as generation/dialogue.py writes them (words in parentheses are what it hears); None without."""
    try:
        return [(str(word), float(start), float(end)) for word, (start, end), *_ in found if not str(word).startswith("(")]
    except (TypeError, ValueError):
        return None


WEIGHTS = {"reply_latency": "replies", "latency": "turns_taken", "tor": "turns_offered", "stop_latency": "overlaps"}     # of a mean
MEANS = ("reply_latency", "reply_latency_median", "latency", "tor", "stop_latency", "overlap_ratio", "pad_ratio", "agent_share",
         "words_a_minute", "mean_pitch", "mean_intensity")


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over conversations; a latency counts as often as there were replies. Medians are of the conversations' medians."""
    result = {}
    for name in MEANS:
        known = [row for row in rows if name in row]
        weights = [row[WEIGHTS[name]] if name in WEIGHTS else 1 for row in known]
        if known:
            result[name] = sum(row[name] * w for row, w in zip(known, weights, strict=True)) / sum(weights)
    result |= {name: sum(row[name] for row in rows) for name in ("replies", "user_turns")}
    known = {key for row in rows for key in row}
    for name in sorted(key for key in known if f"{key}_right" in known):                # shares of the turns of all conversations
        right, total = (sum(row.get(key, 0.0) for row in rows) for key in (f"{name}_right", name))
        result |= {name: total, f"{name}_right": right / total}
    if "heard_right" in known:
        result["heard_right"] = sum(row.get("heard_right", 0.0) for row in rows) / max(1.0, result["turns"])
    return result


def report(folder: Path) -> dict[str, Any] | None:
    """Measure the stereo wavs of a folder, print a table and write dialogues.json; None when there are none."""
    found = {path.relative_to(folder).as_posix(): measure_file(path) for path in sorted(folder.glob("**/*.wav"))}
    rows = [{"wav": name} | numbers for name, numbers in found.items() if numbers is not None]
    if not rows:
        return None
    for row in [*rows, {"wav": "mean"} | mean(rows)]:
        cells = [f"latency {row['reply_latency']:+.2f} s" if "reply_latency" in row else "no reply", f"overlap {row['overlap_ratio']:.2f}",
                f"PAD {row['pad_ratio']:.2f}" if "pad_ratio" in row else "no text row"]
        cells += [f"turns taken {row['tor']:.2f}"] if "tor" in row else []
        print(f"{row['wav']:<24} {row['replies']:3d} of {row['user_turns']} replies, {', '.join(cells)}")
    result = {"mean": mean(rows), "dialogues": rows}
    write_json(folder / "dialogues.json", result)
    return result


# ---- a folder of Full-Duplex-Bench ----

TASKS = {"turn_taking.json": "smooth_turn_taking", "pause.json": "pause_handling", "interrupt.json": "user_interruption",
         "metadata.json": "overlap"}                        # the file of a sample that names its task; without one: backchannel


def task_of(folder: Path) -> str:
    return next((task for name, task in TASKS.items() if (folder / name).is_file()), "backchannel")


def read_words(path: Path) -> list[Word]:
    """The words of an output.json of Full-Duplex-Bench: {"text", "chunks": [{"text", "timestamp": [start, end]}]}."""
    found = read_json(path)
    try:
        return [(str(c["text"]).strip(), *(None if t is None else float(t) for t in c["timestamp"])) for c in found["chunks"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'{path} is no transcript; expected {{"text": ..., "chunks": [{{"text", "timestamp": [start, end]}}]}}') from None


def write_words(path: Path, words: Sequence[Word]) -> None:
    chunks = [{"text": word, "timestamp": [start, end]} for word, start, end in words]
    write_json(path, {"text": " ".join(word for word, *_ in words), "chunks": chunks})


def event(folder: Path, task: str) -> tuple[float, float]:
    """Start and end of what a sample's own file names: the user's turn, the interruption, the overlap."""
    name = next(name for name, other in TASKS.items() if other == task)
    found = read_json(folder / name)
    try:
        start, end = found["timestamps"] if task == "overlap" else found[0]["timestamp"]
        return float(start), float(end)
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"{folder / name} has no timestamp [start, end] in seconds; restore it from the benchmark") from None


def measure_sample(folder: Path, speech: Any, human: Sequence[float] = ()) -> dict[str, Any]:
    """The numbers of a sample folder by its task. `speech(wav (1, W) at 16 kHz, shortest, pause)` finds spans with a voice."""
    task, words = task_of(folder), read_words(folder / "output.json")
    if task in ("pause_handling", "smooth_turn_taking", "user_interruption"):
        found: dict[str, Any] = {"tor": float(turn_taken(words))}
        if task != "pause_handling":
            end = event(folder, task)[task == "user_interruption"]            # of a turn the script takes the beginning of its mark
            found |= {"latency": wait} if (wait := latency_of(words, end)) is not None else {}
        return {"task": task} | found
    wav, rate = load_wav(folder / "output.wav", 16_000)
    if task == "backchannel":                                                 # the script rounds to tenths of a second
        spans = [(round(s, 1), round(e, 1)) for s, e in speech(wav)]
        return {"task": task} | backchannels(spans, words, wav.shape[1] / rate, human)
    user, _ = load_wav(folder / "input.wav", 16_000)
    heard, said = merged(speech(user), USER_GAP), merged(speech(wav), AGENT_GAP)
    stops, waits = overlaps(heard, said), response_gaps(heard, said)
    write_json(folder / "latency_intervals.json", {"latency_stop_list": stops, "latency_resp_list": waits})
    named = (("stop_latency", stops), ("response_latency", waits))
    found = {name: sum(e - s for s, e in spans) / len(spans) for name, spans in named if spans}
    def trimmed(part: Tensor) -> list[Span]:
        return speech(part, 0.06, 0.05)

    sides = before_and_after(wav, rate, words, event(folder, task)[1], trimmed)
    if (folder / "clean_output.wav").is_file() and (folder / "clean_output.json").is_file():            # without the overlap
        sides["clean"] = manner(*load_wav(folder / "clean_output.wav", 16_000), read_words(folder / "clean_output.json"), trimmed)
    return {"task": task} | found | {"overlaps": len(stops)} | {f"{side}_{key}": value for side in ("pre", "post", "clean")
                                                              for key, value in sides.get(side, {}).items()}
