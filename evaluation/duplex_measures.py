"""How a full-duplex conversation went, in numbers.

    user    =======             ====                      reply latency   from the end of what the user said to the agent's
    agent           =========      =======                                next beginning; below 0 the user was interrupted
            <------>  latency   <->                       overlap ratio   time with both / time with anybody
                                                          PAD ratio       frames of the text row in which no word is said
                                                          turns right     replies whose words are those of the recorded reply

`python evaluate.py FOLDER` measures every stereo wav of a folder: what sample.py wrote (the text row lies in the .json
beside it), or recordings. Speech is found by loudness (audio/telephone.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio.telephone import spoken
from audio.wav import load_wav
from options import read_json, write_json

LATE = 10.0                 # seconds after which what the agent says is no reply


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
    result |= {name: sum(row[name] for row in rows) for name in ("replies", "user_turns")}
    for name in sorted({key for row in rows for key in row if key.startswith("turns")} - {"turns_right"}):
        if not name.endswith("_right"):                                 # shares of the turns of all conversations
            right, total = (sum(row.get(key, 0.0) for row in rows) for key in (f"{name}_right", name))
            result |= {name: total, f"{name}_right": right / total}
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
        print(f"{row['wav']:<24} {row['replies']:3d} of {row['user_turns']} replies, {', '.join(cells)}")
    result = {"mean": mean(rows), "dialogues": rows}
    write_json(folder / "dialogues.json", result)
    return result
