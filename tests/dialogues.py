"""How well a full-duplex model answers held-out dialogues, live: turns right in its text and in its sound, and the delay.

    python tests/dialogues.py --ckpt=out/talk --dialogues=out/cache/digits       configs/tiny_duplex.py, after make talk

The users of a manifest's held-out dialogues talk to sessions that are stepped as fast as the machine can. A reply is right when all its
words are those of the recorded one; in the sound, when a recogniser hears them so. `latency` is from the end of the user's
word to the first loud sample that a client plays; the time to compute and the network come on top.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audio import load_codec
from audio.recogniser import transcribe
from audio.wav import load_wav
from checkpoint import load
from evaluation.metrics import wer
from families.family import family_of
from generation.decode_step import SampleConfig
from options import apply, edge, help_text, read_json, read_rows, split_arguments
from serving.scheduler import Conversation, Scheduler
from text.tokenizers import load_tokenizer
from text.word_times import parse_alignments, reply_words, timed_words, turns_right, user_turns

LOUD = 0.02                 # of full scale: what a listener notices
LATE = 1.5                  # seconds after which a sound is no answer


@dataclass(frozen=True)
class Job:
    """What is measured."""

    ckpt: str = "out/talk"                 # run folder, checkpoint folder, file or hub id
    dialogues: str = "out/cache/digits"    # folder of dialogues.jsonl, stereo recordings and their words
    sound: bool = True                     # also transcribe what the model says (pip install -e ".[eval]")
    batch: int = 8                         # sessions at once


class Talk:
    """What one session was given: text ids, samples, and how much it had been sent when the first of them came."""

    def __init__(self) -> None:
        self.text, self.sound, self.sent, self.first = list[int](), list[np.ndarray](), 0, 0

    def __call__(self, kind: str, value: Any) -> None:
        if kind == "text":
            self.text.append(value)
        elif kind == "audio":
            self.first = self.first if self.sound else self.sent
            self.sound.append(value)


def converse(scheduler: Scheduler, rules: SampleConfig, users: list[Tensor]) -> list[Talk]:
    """Talk with users (W,), all at once."""
    talks = [Talk() for _ in users]
    sessions = [Conversation(scheduler, rules, talk) for talk in talks]
    for session in sessions:
        scheduler.enter(session)
    scheduler.admit()
    hop = sessions[0].hop
    for at in range(0, max(map(len, users)) - hop + 1, hop):
        for talk, session, user in zip(talks, sessions, users, strict=True):
            talk.sent = at + hop
            session.hear(torch.nn.functional.pad(user[at : at + hop], (0, max(0, at + hop - max(at, len(user))))).numpy())
        while any(session.has_frame for session in sessions):
            if scheduler.wait():
                scheduler.step()
    for session in sessions:
        scheduler.leave(session)
    scheduler.wait()                                        # closes them
    return talks


def delay_of(talk: Talk, end: float, until: float, rate: int) -> float | None:
    """Seconds from `end` of the user's words to the agent's first loud sample before `until`; None without one."""
    wav, begin = np.concatenate(talk.sound), round(end * rate) - talk.first
    loud = np.flatnonzero(np.abs(wav[max(0, begin) : round(min(until, end + LATE) * rate)]) > LOUD)
    return None if not len(loud) else float(loud[0] + max(0, -begin)) / rate


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help", "sound"))
    if "help" in pairs or words:
        return print(__doc__, help_text(Job(), "python tests/dialogues.py --ckpt=out/talk"), sep="\n")
    job = apply(Job(), pairs)
    model = load(job.ckpt)
    table, facts, family = model.table, model.extras.data, family_of(model.table)
    if family.user_audio != "duplex":
        raise ValueError(f"{job.ckpt} is a {family.name} model; only full-duplex models hear while they speak")
    codec, tokenizer = load_codec(facts["codec"]), load_tokenizer(facts["tokenizer"])
    rules = replace(SampleConfig(max_frames=10**6), **family.rules(table))
    scheduler, folder = Scheduler(model, codec, job.batch, rules), Path(job.dialogues)
    rows = [row for _, row in read_rows(folder / "dialogues.jsonl", "dialogue") if row.get("split") == "test"]
    found, delays, clips = defaultdict[str, float](float), list[float](), list[tuple[str, str, Tensor]]()
    for at in range(0, len(rows), job.batch):
        part = rows[at : at + job.batch]
        users = [load_wav(folder / row["path"], codec.sample_rate, 2)[0][1] for row in part]
        for row, talk in zip(part, converse(scheduler, rules, users), strict=True):
            reference = parse_alignments(read_json((folder / row["path"]).with_suffix(".json")))
            said = timed_words(torch.tensor(talk.text), tokenizer, codec.frame_rate, table.pad, table.epad)
            for name, count in turns_right(reference, said).items():
                found[name] += count
            turns, wav = user_turns(reference), torch.from_numpy(np.concatenate(talk.sound))
            for turn, after in zip(turns, [*turns[1:], None], strict=True):
                end, until = turn[-1][2], after[0][1] if after else float("inf")
                waited = delay_of(talk, end, until, codec.sample_rate)
                delays += [] if waited is None else [waited]
                span = slice(round(end * codec.sample_rate), None if after is None else round(until * codec.sample_rate))
                clips.append((f"turns_of_{len(turn)}", " ".join(reply_words(reference, end, until)), wav[span]))
    heard = transcribe([(wav, codec.sample_rate) for _, _, wav in clips]) if job.sound else []
    spoken = defaultdict[str, int](int)
    for (name, wanted, _), text in zip(clips, heard, strict=False):
        spoken[name] += wer(wanted, text) == 0
    for name in sorted({name for name, _, _ in clips}):
        sound = f", {spoken[name]:3d} in the sound" if job.sound else ""
        right = f"{found[name]:4.0f} turns, right {found[f'{name}_right']:4.0f} in the text{sound}"
        print(f"{name.removeprefix('turns_of_'):>3} words: {right}")
    at = torch.tensor(delays or [float("nan")]).quantile(torch.tensor([0.5, 0.9, 1.0])).tolist()
    print(f"latency of {len(delays)} replies: median {at[0]:.2f} s, p90 {at[1]:.2f} s, longest {at[2]:.2f} s")


if __name__ == "__main__":
    edge(main)
