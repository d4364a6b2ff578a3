"""How bench.py measures: two sides in alternation, time per frame, memory, operations, and the format of a result row.

A side is a function that does the work once and returns its result. A generating side takes the number of columns and
calls `tick` after every frame. On CUDA, times come from events or end with a synchronization. Next: bench.py.
"""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Side = Callable[..., Tensor]
TOLERANCE = {True: 2e-2, False: 1e-4}      # of losses, relative: with half precision or without
ON_GPU = torch.cuda.is_available()
GIB, MIB = 2**30, 2**20
CPUS = Path("/proc/cpuinfo")


# ---- time ----

def children() -> float:
    """CPU seconds of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}      # cpu: for a busy machine


def alternate(ours: Side, peer: Side | None, pairs: int, warmup: int = 2,
              clock: Callable[[], float] = time.perf_counter) -> tuple[list[float], list[float]]:
    """Seconds of both sides, one after the other, `pairs` times each."""
    seconds: tuple[list[float], list[float]] = [], []
    for n in range(-warmup, pairs):
        for side, kept in zip((ours, peer), seconds, strict=True):
            if side is not None:
                began = clock()
                side()
                if ON_GPU:
                    torch.cuda.synchronize()
                if n >= 0:
                    kept.append(clock() - began)
    return seconds


def frame_times(side: Side, columns: int, frames: int, clock: Callable[[], float] | None = None) -> list[float]:
    """Seconds between the last `frames` ticks of a generation of `columns` columns; what comes before warms up."""
    marks: list[Any] = []

    def tick() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if ON_GPU else (clock or time.perf_counter)())
        if ON_GPU:
            marks[-1].record()

    side(columns, tick)
    if len(marks) <= frames:
        raise ValueError(f"{columns} columns gave {len(marks)} frames, too few to time {frames}; lower --frames")
    if ON_GPU:
        torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 if ON_GPU else b - a for a, b in pairwise(marks[-frames - 1 :])]


def spread(values: Sequence[float], factor: float = 1.0, places: tuple[int, ...] = (10, 90)) -> dict[str, float]:
    """The median and the percentiles at `places`, to four digits."""
    at = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([50, *places], dtype=torch.float64) / 100) * factor
    names = ("median", *(f"p{place}" for place in places))
    return {name: float(f"{value:.4g}") for name, value in zip(names, at.tolist(), strict=True)}


def compare(ours: Sequence[float], peer: Sequence[float], units: int, places: tuple[int, ...] = (10, 90)) -> dict[str, Any]:
    """Milliseconds and units a second of both sides, and the ratios of the pairs (ours / peer, below 1 = we are faster)."""
    sides = {name: {"ms": spread(times, 1e3, places), "per_second": float(f"{units / statistics.median(times):.4g}")}
             for name, times in (("ours", ours), ("peer", peer)) if times}
    return sides | {"ratio": spread([a / b for a, b in zip(ours, peer, strict=True)]) if peer else None}


# ---- equal answers ----

def check(ours: Tensor, peer: Tensor, what: str, half: bool = False, limit: float = 0.0) -> str:
    """Check that both sides agree; ValueError otherwise. In half precision greedy tokens may differ, and are counted."""
    same = ours.shape == peer.shape
    error = float((ours - peer).abs().max() / peer.abs().max().clamp(min=1e-9)) if same else float("inf")
    if same and half and not ours.is_floating_point():
        return f"{float((ours == peer).double().mean()):.0%} of {what} equal, as rounded here; all of them in fp32 (--dtype=fp32)"
    if not error <= ((limit or TOLERANCE[half]) if ours.is_floating_point() else 0):
        raise ValueError(f"{what} differ from the peer's ({error:.1e}); wrong results are not timed; fix that first")
    return f"{what} equal ({error:.0e})"


# ---- memory ----

def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most since the last reset."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) / 1024


def extra_memory(side: Side, whole: bool = False) -> float:
    """Peak MiB that a second run adds, after libraries have allocated their own. `whole`, on CUDA: the total peak.

    Not ru_maxrss, which cannot be reset and starts at the size of the parent process.
    """
    side()
    if ON_GPU:
        before = 0 if whole else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")            # VmHWM = VmRSS
    before = resident("VmRSS")
    side()
    return resident("VmHWM") - before


# ---- operations ----

class Operations(TorchDispatchMode):
    """Counts the operations that torch runs, composite ones by their parts, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        with self:                                           # inference mode shows composed operations as they were called
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> dict[str, float]:
    with Operations() as mode:
        run()
    return {"ops": mode.count}


def syncs(run: Callable[[], Any]) -> int:
    """How often the host waits for the CUDA device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in recorded)


def launches(run: Callable[[], Any]) -> dict[str, float]:
    """Kernels and graphs that the host launches on the CUDA device, and its synchronizations."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        run()
        torch.cuda.synchronize()
    called = {event.key: event.count for event in profile.key_averages()}
    kernels = sum(count for name, count in called.items() if name.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    return {"ops": kernels, "graphs": called.get("cudaGraphLaunch", 0), "syncs": syncs(run)}


def per_frame(side: Side, frames: int, lag: int = 0) -> dict[str, float]:
    """Operations per frame (on CUDA kernels, graphs, syncs): the difference that `frames` more columns make, divided by them."""
    side(lag + frames)                                       # the first frame comes after `lag` columns
    once, twice = ((launches if ON_GPU else operations)(lambda n=n: side(lag + n * frames)) for n in (1, 2))
    return {name: (twice[name] - once[name]) / frames for name in once}


# ---- where it was measured, and how a row reads ----

def version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


def origin(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Commit, versions, device and threads."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    lines = CPUS.read_text().splitlines() if CPUS.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    device = torch.cuda.get_device_name() if ON_GPU else f"{os.cpu_count()} cores, {names[0]}"
    others = {name: version(name) for name in packages if version(name)}
    return {"commit": commit or "not a checkout", "torch": torch.__version__, "triton": version("triton"),
            "device": device, "threads": torch.get_num_threads(), "versions": others}


UNITS = {"MiB": "MiB", "ms": "ms", "ops": "kernels" if ON_GPU else "ops"}
EXTRAS = ("p99_ms", "prefill_ms", "RTF", "GB/s", "times_floor", "of_byte_floor", "MFU", "peak_GiB", "graphs", "syncs", "bytes_a_row")


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    sides = [row[side] for side in ("ours", "peer") if side in row]
    cells = [f"{side[unit]['median']:9.1f} {word}" for side in sides for unit, word in UNITS.items() if unit in side]
    rate = f"{row['ours']['per_second']:>9,.0f}/s " if "per_second" in row.get("ours", {}) else " " * 12
    near = "".join(f", {name} {row[name]:.2f}" for name in EXTRAS if name in row)
    near += f", positions {row['positions'][0]} to {row['positions'][1]}" if "positions" in row else ""
    goal = f", target {row['target']}" if row.get("target") else ""
    goal += f", at most {row['limit']} {UNITS['ops']}" if row.get("limit") else ""
    if row["ratio"] is None:
        return f"{row['what']:<20} {rate} {f'ours {cells[0]}  ' if cells else ''}{row['checked']}{goal}{near}"
    ratio = "{median:.2f} ({p10:.2f} .. {p90:.2f})".format(**row["ratio"])
    return f"{row['what']:<20} {rate} ours {cells[0]}  {row.get('against', 'peer')} {cells[1]}  ratio {ratio}{goal}{near}"
