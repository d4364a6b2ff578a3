"""Whether what a command read is still as it was, from the names, sizes and times of files alone: nothing is opened.

    seen = fingerprint([Path("data"), Path("tokenizer.json")], skip=Path("out/cache"))      before reading
    fingerprint(...) == seen                                                                the next time: all of it is unchanged

Besides the time of the last write a file has one of its last change (ctime), which no program can set: a file that another one
replaced, or that was written and set back to its old time, is seen. All files below a folder count, also those that nobody reads:
a file too many costs time, one too few would be a wrong answer.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

MOST = 2_000_000           # files; whoever has more is not looked through


def fingerprint(paths: Iterable[Path], about: str = "", skip: Path | None = None) -> str:
    """A hash of all files at and below `paths` and of `about`; "" when there are too many, or one vanishes meanwhile."""
    found: list[str] = []
    left, passed = [os.path.realpath(path) for path in paths], {os.path.realpath(skip)} if skip else set()
    try:
        while left and len(found) <= MOST:
            path = left.pop()
            if path in passed:
                continue
            passed.add(path)
            if not os.path.isdir(path):
                found.append(f"{path} {state(os.stat(path)) if os.path.exists(path) else 'absent'}")
                continue
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir():                                  # a link to a folder is followed once
                        left.append(os.path.realpath(entry.path))
                    elif entry.is_file():
                        found.append(f"{entry.path} {state(entry.stat())}")
                    else:
                        found.append(entry.path)                        # a link to nothing, a pipe
    except FileNotFoundError:
        return ""
    return hashlib.sha256("\n".join([about, *sorted(found)]).encode(errors="surrogateescape")).hexdigest() if len(found) <= MOST else ""


def state(found: os.stat_result) -> str:
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
