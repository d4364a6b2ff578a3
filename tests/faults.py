"""The fault harness: commands that die, or whose calls fail, at their n-th file-system event, for every n; then they run again.

    python tests/faults.py --jobs=2               every n of every command, two tries at once (`make faults`; an hour on two cores)
    python tests/faults.py train_full --sample=5  five n of one command
    python tests/faults.py --modes=kill           kill: SIGKILL before event n, in the middle of it when it writes
                                                  fail: event n raises "No space left on device"
                                                  memory: the n-th tensor that is made raises "can't allocate memory"

A process is forked for each try, from one that has imported everything, and reports its events through an audit hook. What
the second, undisturbed start leaves must equal what a run leaves that nothing happened to, file by file and bit by bit;
of metrics.jsonl the speeds are left out. A start depends on the files that it finds and on nothing else: where two tries leave
the same files, the second start is made once for both (`starts` counts them). A failed call ends in exit code 2 without a trace, or
is got over. One line a command, and exit code 1 when anything differs.
"""

import builtins
import errno
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import soundfile  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402   (the first optimizer imports it, which takes a second)
from conftest import CONFIG, write_clips  # noqa: E402
from safetensors import numpy as safetensors_numpy  # noqa: E402
from safetensors import torch as safetensors_torch  # noqa: E402

from families.family import all_families  # noqa: E402
from system.files import LOCK  # noqa: E402

MODES = ("kill", "fail", "memory")
SECONDS, HUNG = 600, 99         # a command that takes longer hangs; its exit code
SPEEDS = ("step_seconds", "memory_gib")
LORA = ("--lora.rank=2", "--lora.targets=temporal.layers.0.attn.q*")
TEXT = ("configs/ivr_dpo.py", "--smoke", "--data.sources={W}/pairs.jsonl", "--data.cache={W}/cache", "--steps=2", "--save_every=1",
        "--eval_every=2", "--data.prefetch=0", "--log_every=1", "--device=cpu", "--data.window=4", *LORA)
TALK = ("configs/moshi_lora.py", "--smoke", "--data.cache={W}/out/cache", "--steps=2", "--save_every=1", "--eval_every=2", "--prompts=",
        "--data.prefetch=0", "--log_every=1", "--device=cpu", "--batch_size=1", "--keep=1", *LORA)
TINY = ("train.py", "{W}/tiny_run.py", "--out={W}/new", "--steps=2", "--save_every=1", "--eval_every=2")
CASES: dict[str, tuple[str, ...]] = {
    "train_lora_random": (*TINY, *LORA),
    "train_lora_base": (*TINY, *LORA, "--init={W}/run"),
    "train_full": (*TINY, "--eval_every=1", "--ema=0.9", "--accum=2", "--keep=1"),
    "train_2_ranks": TINY,
    "train_sharded": (*TINY, "--shard=true", "--ema=0.9", "--keep=1"),
    "train_dpo": ("train.py", *TEXT, "--out={W}/new"),
    "train_consolidated": ("train.py", *TALK, "--out={W}/new", "--consolidated=moshi-lora", "--model.dropout=0.1"),
    "prepare": ("data.py", "prepare", "{W}/tiny_run.py", "--data.cache={W}/fresh"),
    "sample_texts": ("sample.py", "--ckpt={W}/run", "--texts={W}/texts.txt", "--max_frames=4", "--out={W}/new"),
    "sample_stream": ("sample.py", "--ckpt={W}/run", "--text=one two", "--stream", "--max_frames=12", "--out={W}/new.wav"),
    "evaluate": ("evaluate.py", "{W}/run"),
    "report": ("evaluate.py", "report", "{W}/run", "--rounds=10"),
    "merge": ("checkpoint.py", "merge", "{W}/dpo", "--out={W}/new"),
    "export": ("checkpoint.py", "export", "{W}/dpo", "--to=peft", "--out={W}/new"),
}
RANKS = {"train_2_ranks": 2, "train_sharded": 2}


# ---- faults ----

@dataclass
class Faults:
    """Counts the file-system events of this process below a folder, or its tensors, and does what `mode` says at number n."""

    root: str
    mode: str = ""
    n: int = 0
    events: list[str] = field(default_factory=list)
    busy: bool = False

    def event(self, what: str, path: Any, half: Callable[[], Any] | None = None) -> None:
        path = os.path.join(os.getcwd(), os.fsdecode(path)) if not isinstance(path, int) else os.readlink(f"/proc/self/fd/{path}")
        if self.busy or not path.startswith(self.root):
            return
        self.events.append(f"{what} {path.removeprefix(self.root)}")
        if self.mode in ("kill", "fail") and len(self.events) == self.n:
            self.busy = True
            if half is not None:
                half()
            self.busy = False
            if self.mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def audit(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            self.event(name, args[0])
        elif name in ("os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"):
            self.event(name, self.within(args[0], args[-1] if name not in ("os.truncate",) else -1))
        elif name in ("os.rename", "os.symlink", "os.link"):
            self.event(name, args[1])

    def within(self, path: Any, folder: Any) -> Any:
        """A path that is relative to an open folder."""
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path)) if isinstance(folder, int) and folder > 2 else path

    def install(self) -> None:
        if self.mode == "memory":
            return self.install_memory()
        sys.addaudithook(self.audit)
        for name in ("fsync", "write", "pwrite", "sendfile"):
            setattr(os, name, partial(self.through, name, getattr(os, name)))
        for module in (safetensors_torch, safetensors_numpy):
            def serialize(tensors: Any, path: Any, metadata: Any = None, call: Any = module.serialize_file) -> None:
                def half() -> None:
                    call(tensors, path, metadata)
                    os.truncate(path, os.path.getsize(path) // 2)
                self.event("tensors", path, half)
                call(tensors, path, metadata)
            module.serialize_file = serialize
        write = soundfile.SoundFile.write

        def sound(file: Any, samples: Any) -> None:
            self.event("sound", file.name, lambda: (write(file, samples[: len(samples) // 2]), file.flush()))
            write(file, samples)
        soundfile.SoundFile.write = sound
        opened = io.open

        def open_file(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = opened(path, mode, *args, **options)
            return Written(file, self) if set(mode) & set("wax+") and not isinstance(path, int) else file
        builtins.open = io.open = open_file

    def install_memory(self) -> None:
        makers = ("empty", "zeros", "ones", "full", "cat", "stack", "tensor", "arange", "empty_like", "zeros_like")
        for owner, names in ((torch, makers), (torch.Tensor, ("clone", "contiguous", "float", "to"))):
            for name in names:
                setattr(owner, name, self.allocating(name, getattr(owner, name)))

    def through(self, name: str, call: Callable[..., Any], handle: int, *args: Any) -> Any:
        self.event(name, handle)
        return call(handle, *args)

    def allocating(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.events.append(name)
            if len(self.events) == self.n:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory: 4096 bytes")
            return call(*args, **options)
        return wrapped


class Written:
    """A file that reports what is written to it."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def write(self, content: Any) -> Any:
        self.faults.event("write", self.file.name, lambda: (self.file.write(content[: len(content) // 2]), self.file.flush()))
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def __iter__(self) -> Any:
        return iter(self.file)


# ---- runs ----

@dataclass
class Bench:
    """A folder with everything that the commands need, copied afresh for every try."""

    home: Path

    @property
    def work(self) -> Path:
        return self.home / "work"

    def build(self) -> None:
        write_clips(self.work / "clips")
        text = CONFIG.replace("ModelConfig(table, ", "ModelConfig(table, dropout=0.1, input_drop=0.5, temporal=")
        rows = [json.loads(line) for line in (self.work / "clips/manifest.jsonl").read_text().splitlines()]
        rows = [json.dumps(row | {"split": "train" if row["split"] == "train" else "held-out"}) for row in rows]
        (self.work / "clips/manifest.jsonl").write_text("\n".join(rows) + "\n")
        (self.work / "tiny_run.py").write_text(text)
        (self.work / "texts.txt").write_text("one two\nthree\n")
        lines = (ROOT / "assets/ivr/preferences.jsonl").read_text().splitlines(keepends=True)
        sides = [json.loads(line).get("split", "train") for line in lines]
        kept = [line for side in ("train", "held-out", "test") for line in [x for x, s in zip(lines, sides, strict=True) if s == side][:4]]
        (self.work / "pairs.jsonl").write_text("".join(kept))
        for words in (("train.py", "{W}/tiny_run.py"), ("train.py", *TEXT, "--out={W}/dpo"),
                      ("train.py", *TALK, "--out={W}/talk"), ("evaluate.py", "report", "{W}/run", "--rounds=10")):
            code, said = self.start(words)[:2]
            assert code == 0, (words, said)
        shutil.rmtree(self.work / "run/report")
        shutil.copytree(self.work, self.home / "start", symlinks=True)

    def renew(self, words: tuple[str, ...]) -> None:
        """The folder as it was, but for runs that a command does not name."""
        shutil.rmtree(self.work)
        unused = [name for name in ("run", "dpo", "talk") if not any(word.endswith("{W}/" + name) for word in words)]
        shutil.copytree(self.home / "start", self.work, symlinks=True, ignore=lambda folder, _: unused if folder.endswith("start") else [])

    def start(self, words: tuple[str, ...], ranks: int = 1, fault: tuple[str, int, int] = ("", 0, 0)) -> tuple[int, str, list[list[str]]]:
        """Run a command, the fault (mode, rank, n) in it: exit code, what it said, the events of each rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port, children, codes = free.getsockname()[1], {}, {}
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                self.child(words, rank, ranks, port, fault)
            children[child] = rank
        late: list[int] = []
        signal.signal(signal.SIGALRM, lambda *_: [late.append(other) or os.kill(other, signal.SIGKILL) for other in children])
        signal.alarm(SECONDS)
        while children:
            found, status = os.waitpid(-1, 0)
            codes[children.pop(found)] = os.waitstatus_to_exitcode(status)
            for other in children if any(codes.values()) else ():       # as torchrun does
                os.kill(other, signal.SIGKILL)
        signal.alarm(0)
        code = HUNG if late else codes[fault[1]] or max(codes.values(), key=abs)
        logs = [self.home / f"rank{rank}.json" for rank in range(ranks)]
        events = [json.loads(log.read_text()) if log.is_file() else [] for log in logs]
        return code, (self.home / "said.txt").read_text(), events

    def child(self, words: tuple[str, ...], rank: int, ranks: int, port: int, fault: tuple[str, int, int]) -> None:
        code = 1
        try:
            said = os.open(self.home / "said.txt", os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if rank == 0 else os.O_APPEND))
            os.dup2(said, 1)
            os.dup2(said, 2)
            log = self.home / f"rank{rank}.json"
            log.unlink(missing_ok=True)
            os.chdir(ROOT if "configs/moshi_lora.py" not in words else self.work)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": str(port)}
            argv = [word.replace("{W}", str(self.work)) for word in words]
            sys.argv = [argv[0], *(str(ROOT / word) if word.startswith("configs/") else word for word in argv[1:])]
            faults = Faults(str(self.work) + "/", fault[0], fault[2] if fault[1] == rank else 0)
            faults.install()
            try:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            faults.busy = True
            log.with_suffix(".part").write_text(json.dumps(faults.events))
            log.with_suffix(".part").replace(log)              # a rank whose neighbour failed is killed at any moment
        finally:
            os._exit(code)

    def tree(self) -> dict[str, Any]:
        """Everything below the folder: content of files, targets of links."""
        found: dict[str, Any] = {}
        for path in sorted(self.work.rglob("*")):
            name = str(path.relative_to(self.work))
            if path.is_symlink():
                found[name] = ("link", os.readlink(path))
            elif path.is_file():
                reader = {"metrics.jsonl": measured, "index.json": pointed}.get(path.name, Path.read_bytes)
                found[name] = reader(path)
            else:
                found[name] = "folder"
        return found


def measured(path: Path) -> list[Any]:
    """The rows of metrics.jsonl without speeds; a line that was cut off as it stands."""
    rows: list[Any] = []
    for line in path.read_text().splitlines():
        try:
            rows.append({k: v for k, v in json.loads(line).items() if k not in SPEEDS and not k.endswith("_per_second")})
        except ValueError:
            rows.append(line)
    return rows


def pointed(path: Path) -> Any:
    """What index.json of a cache says, without the times and places of the files that it was made of, which are copied anew for a try."""
    try:
        return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("inputs", "beyond")}
    except ValueError:
        return path.read_text()


def state(tree: dict[str, Any]) -> str:
    """A digest of all of a tree that a start can depend on: not the random part of temporary names, not who held a lock."""
    names = {re.sub(r"\.\w{8}\.part$", ".part", name): found for name, found in tree.items()}
    return hashlib.sha256(repr([(n, found if Path(n).name != LOCK else "") for n, found in sorted(names.items())]).encode()).hexdigest()


def different(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What of a tree is left over, missing or of another content; "" when nothing is."""
    sides = {"left over": found.keys() - wanted.keys(), "missing": wanted.keys() - found.keys(),
             "differs": {name for name in found.keys() & wanted.keys() if found[name] != wanted[name]}}
    return "; ".join(f"{what} {sorted(names)[:4]}" for what, names in sides.items() if names)


@cache
def built(folder: str, process: int) -> Bench:
    """The folder of this process, made at its first try."""
    for script in sorted({words[0] for words in CASES.values()}):               # what a try would import
        for name in re.findall(r"^from ([\w.]+) import", (ROOT / script).read_text(), re.M):
            importlib.import_module(name)
    all_families()
    bench = Bench(Path(folder) / str(process))
    bench.build()
    return bench


def try_case(folder: str, modes: tuple[str, ...], sample: int, jobs: int, name: str, job: int) -> dict[str, Any]:
    """Every `jobs`-th try of a command: counts, and a line for each that did not end as the undisturbed run."""
    bench, words, ranks = built(folder, os.getpid()), CASES[name], RANKS.get(name, 1)
    result: dict[str, Any] = {"name": name, "faults": []}
    bench.renew(words)
    code, said, events = bench.start(words, ranks, ("count", 0, 0))
    wanted = bench.tree()
    bench.renew(words)
    again = bench.start(words, ranks)[0]
    if code or again or different(bench.tree(), wanted):
        result["faults"].append(f"undisturbed: exit code {code}, {again}; {different(bench.tree(), wanted)}; {said[-300:]}")
        return result
    seen: dict[str, str] = {}
    for mode in modes:
        if mode == "memory":
            bench.renew(words)
            events = bench.start(words, ranks, ("memory", 0, 0))[2]
        points = [(rank, n) for rank, found in enumerate(events) for n in range(1, len(found) + 1)]
        chosen = sorted(random.Random(name + mode).sample(points, min(sample, len(points))) if sample else points)[job::jobs]
        before = len(seen)
        for rank, n in chosen:
            bench.renew(words)
            code, said, _ = bench.start(words, ranks, (mode, rank, n))
            left = bench.tree()
            if code == 0:                                  # a failure that was got over, or one that nobody saw
                wrong = different(left, wanted)
            elif code == HUNG or mode != "kill" and (code != 2 or ranks == 1 and "Traceback" in said):
                wrong = f"exit code {code}: {said[-300:]}"
            else:
                wrong = ""
            if (key := state(left)) not in seen and not wrong:
                code, said = bench.start(words, ranks)[:2]
                seen[key] = f"exit code {code}: {said[-300:]}" if code else different(bench.tree(), wanted)
            if wrong := wrong or seen[key]:
                result["faults"].append(f"{mode} {events[rank][n - 1]} (rank {rank}, {n}): {wrong}")
        result[mode] = [len(chosen), len(points), len(seen) - before]
    return result


def main(argv: list[str]) -> int:
    options = dict(word[2:].split("=", 1) for word in argv if word.startswith("--"))
    names = [word for word in argv if not word.startswith("--")] or list(CASES)
    modes, jobs, bad = tuple(options.get("modes", ",".join(MODES)).split(",")), int(options.get("jobs", 1)), 0
    with (tempfile.TemporaryDirectory(dir=options.get("dir")) as folder,
          ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool):
        tries = partial(try_case, folder, modes, int(options.get("sample", 0)), jobs)
        running = {name: [pool.submit(tries, name, job) for job in range(jobs)] for name in names}
        for name, parts in running.items():
            results = [part.result() for part in parts]
            total: dict[str, Any] = {"name": name, "faults": [line for result in results for line in result["faults"]]}
            for mode in modes:                             # tried, of all, second starts
                found = [result[mode] for result in results if mode in result]
                total[mode] = [sum(f[0] for f in found), max((f[1] for f in found), default=0), sum(f[2] for f in found)]
            print(json.dumps(total), flush=True)
            bad += len(total["faults"])
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
