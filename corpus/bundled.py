"""Small data sets from the bundled recordings, for --smoke: stereo dialogues and phone calls. Next: annotate.py."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio.wav import load_wav, save_wav
from options import read_rows, write_rows, write_text
from text.word_times import MAIN, OTHER

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
        save_pair(folder / f"{n:03d}", sides, rate, words)
        lines.append(json.dumps({"path": f"{n:03d}.wav", "duration": round(max(s.shape[1] for s in sides) / rate, 3)}) + "\n")
    known = ["<s>", "</s>", "<pad>", *json.loads((ASSETS / "words.json").read_text(encoding="utf-8"))]
    for name, text in (("words.json", json.dumps(known)), ("dialogues.jsonl", "".join(lines))):      # the manifest last
        write_text(folder / name, text)
    return str(folder / "dialogues.jsonl")


def save_pair(path: Path, sides: list[Tensor], rate: int, words: list[list[Any]]) -> None:
    length = max(side.shape[1] for side in sides)
    save_wav(path.with_suffix(".wav"), torch.cat([torch.nn.functional.pad(s, (0, length - s.shape[1])) for s in sides]), rate)
    write_text(path.with_suffix(".json"), json.dumps({"alignments": words}))


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
