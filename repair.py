"""Repair word times that a recogniser got wrong: a short word that lasts too long, mostly the first of a file.

    python data.py fix-alignments data/calls --out=data/mended --first --longest=0.2      writes copies, changes nothing
    python data.py fix-alignments data/calls --dry_run                                     only tells what it would do

A word longer than `longest` seconds keeps its end and begins `keep` seconds before it. With `--words=a,i` only those.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from duplex import Alignment, as_json, parse_alignments
from options import apply, check_types, help_text, read_json, split_arguments, write_text


@dataclass(frozen=True)
class Repair:
    """What to mend, and where to."""

    out: str = ""                   # folder for the mended copies
    longest: float = 1.0            # seconds that a word may last
    keep: float = 0.08              # seconds that are left of one that lasts longer
    first: bool = False             # only the first word of each speaker
    words: tuple[str, ...] = ()     # only these, in lower case; () = all
    dry_run: bool = False           # write nothing

    def __post_init__(self) -> None:
        check_types(self)
        assert 0 < self.keep <= self.longest, f"keep {self.keep} is not in (0, longest {self.longest}]"


def clamp_words(words: list[Alignment], job: Repair) -> tuple[list[Alignment], list[str]]:
    """Words with plausible times, in the same order, and those that were changed."""
    seen: set[str] = set()
    mended, changed = [], []
    for word, start, end, who in words:
        meant = (not job.first or who not in seen) and (not job.words or word.lower() in job.words)
        seen.add(who)
        if meant and end - start > job.longest:
            start = round(end - job.keep, 3)
            changed.append(f"{word} at {start}")
        mended.append((word, start, end, who))
    return mended, changed


def main(argv: list[str]) -> None:
    words, pairs = split_arguments(argv, ("help", "first", "dry_run"))
    if "help" in pairs or len(words) != 1:
        print(__doc__, help_text(Repair(), "python data.py fix-alignments FOLDER [--key=value ...]"), sep="\n")
        raise SystemExit(0 if "help" in pairs else 2)
    job = apply(Repair(), {key: "true" if key in ("first", "dry_run") and not value else value for key, value in pairs.items()})
    folder = Path(words[0])
    files = sorted(folder.glob("*.json")) if folder.is_dir() else [folder]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{folder} holds no alignments (*.json); write them with python data.py annotate")
    if not job.out and not job.dry_run:
        raise ValueError("give --out=FOLDER for the mended copies, or --dry_run to look first")
    if job.out and Path(job.out).resolve() == (folder if folder.is_dir() else folder.parent).resolve():
        raise ValueError(f"--out={job.out} is where the originals lie; name another folder")
    total = 0
    for file in files:
        try:
            mended, changed = clamp_words(parse_alignments(read_json(file)), job)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        total += len(changed)
        if changed:
            print(f"{file.name}: {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}")
        if not job.dry_run:
            write_text(Path(job.out) / file.name, json.dumps({"alignments": as_json(mended)}, ensure_ascii=False))
    print(f"{total} words in {len(files)} files {'would be ' if job.dry_run else ''}shortened")
