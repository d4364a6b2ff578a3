"""Small data sets made of the bundled recordings: stereo dialogues, phone calls, and the digits of configs/tiny_duplex.py.

    python -m corpus.bundled out/cache/digits       composes what configs/tiny_duplex.py trains on: a minute, 500 MB
"""

import json
import random
import sys
import zlib
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

from audio.wav import load_wav, resample, save_wav
from options import edge, read_rows, write_rows, write_text
from text.word_times import MAIN, OTHER

RATE = 16_000
ASSETS = Path(__file__).resolve().parents[1] / "assets" / "speech"


def demo_dialogues(folder: str | Path, count: int = 24) -> str:
    """Make small stereo dialogues from the bundled clips, if they do not exist yet: left Allison asks, right a synthetic voice answers.

    Writes NNN.wav, NNN.json, dialogues.jsonl and words.json (ids 0..3 stay free for EPAD, <s>, </s>, PAD) into `folder`;
    returns the path of the manifest.
    """
    folder = Path(folder)
    if (folder / "dialogues.jsonl").is_file():
        return str(folder / "dialogues.jsonl")
    rows = [row for _, row in read_rows(ASSETS / "manifest.jsonl", "clip")]
    asks, answers = ([r for r in rows if r["speaker"] == who and 1 < len(r["words"]) < 7] for who in ("allison", "rms"))
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(count):
        turns = [asks[7 * n % len(asks)], answers[3 * n % len(answers)]]
        sides, words, at = [], [], 0.2
        for turn, who in zip(turns, (MAIN, OTHER), strict=True):
            wav, rate = load_wav(ASSETS / turn["audio"], 16_000)
            sides.append(torch.nn.functional.pad(wav, (round(at * rate), 0)))
            ends = [start for _, start in turn["words"][1:]] + [wav.shape[1] / rate]
            words += [[word, [round(at + start, 3), round(at + end, 3)], who]
                      for (word, start), end in zip(turn["words"], ends, strict=True)]
            at += wav.shape[1] / rate + 0.1
        length = max(side.shape[1] for side in sides)
        save_wav(folder / f"{n:03d}.wav", torch.cat([torch.nn.functional.pad(s, (0, length - s.shape[1])) for s in sides]), rate)
        write_text(folder / f"{n:03d}.json", json.dumps({"alignments": words}))
        lines.append(json.dumps({"path": f"{n:03d}.wav", "speaker": "allison", "duration": round(length / rate, 3)}) + "\n")
    known = ["<s>", "</s>", "<pad>", *json.loads((ASSETS / "words.json").read_text(encoding="utf-8")), "<system>"]
    for name, text in (("words.json", json.dumps(known)), ("dialogues.jsonl", "".join(lines))):      # the manifest last
        write_text(folder / name, text)
    return str(folder / "dialogues.jsonl")


def demo_calls(folder: str | Path, count: int = 40) -> str:
    """Make small calls from the bundled clips, if they do not exist yet: a synthetic caller reads a number, Allison repeats it.

    Turns are speech or text, in all four combinations; a fifth is held out. Returns the path of the manifest.
    """
    folder = Path(folder)
    if (folder / "calls.jsonl").is_file():
        return str(folder / "calls.jsonl")
    rows = {r["id"]: r for r in (row for _, row in read_rows(ASSETS / "manifest.jsonl", "clip"))}
    digits = {who: {r["text"]: r for r in rows.values() if (r["speaker"], r.get("group")) == (who, "digits")} for who in ("allison", "slt")}
    opening = next(r for r in rows.values() if r["speaker"] == "allison" and r["text"] == "the number i have is")
    names = sorted(digits["allison"].keys() & digits["slt"].keys())
    folder.mkdir(parents=True, exist_ok=True)
    calls = []
    for n in range(count):
        number = [names[(7 * n + 3 * k * (n // 10 + 1)) % len(names)] for k in range(2 + n % 2)]
        sides = {"user": [digits["slt"][name] for name in number], "assistant": [opening, *(digits["allison"][name] for name in number)]}
        messages = []
        for place, (role, clips) in enumerate(sides.items()):
            said = " ".join(clip["text"] for clip in clips)
            if n >> place & 1 and n % 8 > 3:                # half the calls are spoken on both sides
                messages.append({"role": role, "content": said})
                continue
            name = f"{n:03d}-{role}.wav"
            wavs = [load_wav(ASSETS / clip["audio"], 16_000) for clip in clips]
            save_wav(folder / name, torch.cat([wav for wav, _ in wavs], dim=1), 16_000)
            messages.append({"role": role, "content": [{"type": "audio", "audio_url": name, "text": said}]})
        calls.append({"id": f"call/{n}", "split": "test" if n % 5 == 4 else "train", "messages": messages})
    write_rows(folder / "calls.jsonl", calls)
    return str(folder / "calls.jsonl")


# ---- digits, said back ----

DIGITS = "zero one two three four five six seven eight nine".split()
HEARD = 0.08                # seconds behind the end of a user's word at which the agent writes down what it heard
REPLY = 0.16                # and behind the last one at which it answers: two frames later, and longer than users pause between words
LENGTH = 12.0               # seconds of a dialogue at most
Clips = dict[tuple[str, str], list[Tensor]]     # (speaker, digit) -> versions (W,) of several speeds


def digit_dialogues(folder: str | Path, count: int = 2000, held_out: int = 40, longest: int = 4) -> str:
    """Make stereo dialogues of the bundled digits, once: right, a synthetic voice says up to `longest` digits; left, Allison repeats them.

    The agent's words are those that it says, and "(four)" where it has heard one. The user's words stand beside them. An eighth of
    the strings of two and more digits, by hash, occurs in held-out dialogues alone. Writes NNNN.flac, NNNN.json, dialogues.jsonl
    and words.json into `folder`; returns the path of the manifest.
    """
    folder = Path(folder)
    if (folder / "dialogues.jsonl").is_file():
        return str(folder / "dialogues.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    clips, rows = digit_clips(), []
    for n in range(count + held_out):
        split, draw = "train" if n < count else "test", random.Random(f"digits/{n}")
        sides, words = compose_dialogue(clips, draw, split, longest)
        path = folder / f"{n:04d}.flac"
        soundfile.write(path, (sides.T * 32767).round().short().numpy(), RATE, subtype="PCM_16", format="FLAC")
        write_text(path.with_suffix(".json"), json.dumps({"alignments": words}))
        rows.append({"path": path.name, "duration": sides.shape[1] / RATE, "split": split})
    known = ["<s>", "</s>", "<pad>", *DIGITS, *(f"({word})" for word in DIGITS)]
    write_text(folder / "words.json", json.dumps(known))
    write_rows(folder / "dialogues.jsonl", rows)                                # the manifest last: all is there
    return str(folder / "dialogues.jsonl")


def digit_clips() -> Clips:
    """The bundled digits without the silence around them: the agent's at three speeds, the users' at eleven."""
    found: Clips = {}
    for _, row in read_rows(ASSETS / "manifest.jsonl", "clip"):
        if row["text"] in DIGITS and row["speaker"] in ("allison", "rms", "slt"):
            wav = load_wav(ASSETS / row["audio"], RATE)[0][0]
            loud = (wav.unfold(0, 160, 160).square().mean(1) > 1e-4 * wav.square().max()).nonzero()[:, 0]
            wav = wav[160 * int(loud[0]) : 160 * (int(loud[-1]) + 1)]
            percents = (98, 100, 102) if row["speaker"] == "allison" else range(90, 111, 2)
            found[row["speaker"], row["text"]] = [resample(wav / wav.abs().max(), percent, 100) for percent in percents]
    return found


def draw_digits(draw: random.Random, split: str, longest: int) -> list[str]:
    """A string of digits of one side of the split; a single digit belongs to both."""
    count = draw.choices(range(1, longest + 1), [4, 3, 3, 3, *[1] * longest][:longest])[0]
    while True:
        digits = draw.choices(DIGITS, k=count)
        if len(digits) == 1 or (zlib.crc32(" ".join(digits).encode()) % 8 == 0) == (split == "test"):
            return digits


def compose_dialogue(clips: Clips, draw: random.Random, split: str, longest: int) -> tuple[Tensor, list[list[Any]]]:
    """Turns until the time is up.   -> left agent, right user (2, W), and the words of both with their times"""
    sides, words, at, user = torch.zeros(2, round(LENGTH * RATE)), [], draw.uniform(0.1, 1.2), draw.choice(("rms", "slt"))
    gain, speed = 10 ** (draw.uniform(-6, 3) / 20), draw.randrange(11)
    while True:
        digits, turn, begun = draw_digits(draw, split, longest), [], at
        for digit in digits:
            turn.append(placed(sides[1], clips[user, digit][min(10, max(0, speed + draw.randint(-1, 1)))], at,
                               0.4 * gain * 10 ** (draw.uniform(-2, 2) / 20)))
            at = turn[-1][1] + draw.uniform(0.03, 0.08)
        at = turn[-1][1] + REPLY
        own = []
        for digit in digits:
            own.append(placed(sides[0], draw.choice(clips["allison", digit]), at, 0.5 * 10 ** (draw.uniform(-1, 1) / 20)))
            at = own[-1][1] + 0.05
        if at > LENGTH - 0.1:                                                     # the last turn does not fit: as if it had not been
            for side in sides:
                side[round(begun * RATE) :] = 0
            break
        words += [[word, [round(a, 3), round(b, 3)], OTHER] for word, (a, b) in zip(digits, turn, strict=True)]
        words += [[f"({word})", [round(b + HEARD, 3), round(b + HEARD + 0.04, 3)], MAIN] for word, (_, b) in zip(digits, turn, strict=True)]
        words += [[word, [round(a, 3), round(b, 3)], MAIN] for word, (a, b) in zip(digits, own, strict=True)]
        at += draw.uniform(0.3, 0.8) if draw.random() < 0.85 else draw.uniform(0.8, 3.0)
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    sides[1] += 10 ** (draw.uniform(-75, -48) / 20) * torch.randn(sides.shape[1], generator=generator)
    return sides.clamp(-1, 1), sorted(words, key=lambda word: word[1][0])


def placed(side: Tensor, wav: Tensor, at: float, gain: float) -> tuple[float, float]:
    """Add a clip to a side, as far as that goes; -> when it begins and ends."""
    first = round(at * RATE)
    part = wav[: max(0, len(side) - first)]
    side[first : first + len(part)] += gain * part
    return at, at + len(wav) / RATE


def recorded_users() -> dict[str, Tensor]:
    """A few strings of digits in the users' voices and a quiet room behind, to try a served model without a microphone.   name -> (1, W)"""
    clips, found = digit_clips(), {}
    said = (("rms", "seven"), ("slt", "four two"), ("rms", "one nine"), ("slt", "three eight five"), ("rms", "two zero six four"))
    for who, digits in said:
        side, at = torch.zeros(12 * RATE), 0.6
        for digit in digits.split():
            at = placed(side, clips[who, digit][5], at, 0.4)[1] + 0.05
        found[f"{digits} ({who})"] = side[None] + 1e-3 * torch.randn(1, len(side), generator=torch.Generator().manual_seed(0))
    return found


if __name__ == "__main__":
    edge(lambda: print(digit_dialogues(sys.argv[1] if sys.argv[1:] else "out/cache/digits")))
