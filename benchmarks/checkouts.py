"""Two checkouts of this code against each other: `python bench.py compare OLD NEW train --model=tiny`.

They run the same command of bench.py in turns, each in a process of its own, so that a busy machine slows both of a pair. For every
number there is the ratio NEW / OLD, its median over the pairs and the interval that covers the true median with 90 % or more (order
statistics). What is slower, larger or more in the whole interval is named, and the exit code is 1.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USUAL = (["tiny", "--pairs=3"], ["train", "--model=higgs", "--pairs=3"], ["decode", "--model=moshi", "--pairs=3"], ["loader", "--pairs=3"])


@dataclass(frozen=True)
class CompareJob:
    """Options of `bench.py compare OLD NEW [COMMAND ...]`; what bench.py does not know of them goes to the command."""

    rounds: int = 7              # pairs of runs
    least: float = 0.02          # a change below this share is none

    def __post_init__(self) -> None:
        assert self.rounds >= 5 and self.least >= 0, "rounds is at least 5, the fewest pairs that have an interval of 90 %"


def measured(checkout: Path, command: Sequence[str]) -> dict[str, float]:
    """The numbers of our side that a command of a checkout's bench.py prints: name and unit -> median."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(checkout / "bench.py"), *command, "--json"], env=env, capture_output=True, text=True)
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        raise ValueError(f"{checkout}: bench.py {' '.join(command)} failed: {last}")
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    sides = [(row["what"], row.get("ours", {})) for row in rows]
    return {f"{what}, {unit}": side[unit]["median"] for what, side in sides for unit in ("ms", "MiB", "ops") if unit in side}


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Two of the ratios between which the median lies with 90 % or more, the nearest pair of that kind."""
    ordered, n = sorted(ratios), len(ratios)
    cut = 0
    while 2 * sum(math.comb(n, k) for k in range(cut + 2)) / 2**n <= 0.1:
        cut += 1
    return ordered[cut], ordered[n - 1 - cut]


def compare(old: Path, new: Path, command: Sequence[str], job: CompareJob) -> bool:
    """Print the ratios; True when nothing got worse."""
    for checkout in (old, new):
        if not (checkout / "bench.py").is_file():
            raise FileNotFoundError(f"{checkout} holds no bench.py; name two checkouts of this repository")
    ratios: dict[str, list[float]] = {}
    for _ in range(job.rounds):
        for words in [command] if command else USUAL:
            before, after = measured(old, words), measured(new, words)
            for name in before.keys() & after.keys():
                ratios.setdefault(name, []).append(after[name] / max(before[name], 1e-9))
    worse = []
    for name, found in sorted(ratios.items()):
        low, high = interval(found)
        verdict = "worse" if low > 1 + job.least else "better" if high < 1 - job.least else "no difference"
        worse += [name] * (verdict == "worse")
        print(f"{name:<32} {statistics.median(found):6.3f} ({low:.3f} .. {high:.3f})  {verdict}", flush=True)
    print(f"{len(worse)} of {len(ratios)} got worse" + (f": {'; '.join(worse)}" if worse else ""))
    return not worse
