"""What the tests share: OMP_NUM_THREADS threads or one, Triton interpreted where there is no GPU, a command line to call, a run to see."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

os.environ.setdefault("OMP_NUM_THREADS", "1")           # here, and in the processes that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before any import of ours: kernels are compiled when first seen
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path += [str(path) for path in sorted((ROOT / "tests").iterdir()) if path.is_dir()]      # some tests lend others their grids

WORDS = "one two three four".split()
CONFIG = '''"""The smallest run: one layer, twelve clips of noise."""
from pathlib import Path

from config import DataConfig, TrainConfig
from families.tiny import MAX_AGE
from model import ModelConfig, StackConfig
from streams import Stream, StreamTable, codebooks

here = Path(__file__).parent
table = StreamTable((*(Stream(name, "text", 8) for name in ("word", "next", "previous")), Stream("age", "text", MAX_AGE + 1),
                     Stream("advance", "text", 2, 2), *codebooks(8, 258, 258, 256, 257, range(2, 10))), "words", aligned=True)
config = TrainConfig(
    model=ModelConfig(table, StackConfig(dim=16, layers=1, heads=2, ffn=16)),
    data=DataConfig(sources=(str(here / "clips"),), cache=str(here / "cache"), tokenizer=str(here / "clips/words.json"),
                    split="manifest", columns=128, window=8, prefetch=0),
    out=str(here / "run"), steps=4, lr=1e-3, dtype="fp32", device="cpu", save_every=2, log_every=1)
smoke = config
'''


def write_clips(folder: Path, clips: int = 12) -> Path:
    """A folder of short clips of noise with a manifest; the last quarter is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(clips):
        n = 6400 + 640 * i
        level = 0.2 * np.abs(np.sin(np.arange(n) / 900))
        soundfile.write(folder / f"{i}.wav", (np.random.default_rng(i).standard_normal(n) * level).clip(-1, 1), 16000)
        rows.append({"id": str(i), "audio": f"{i}.wav", "text": WORDS[i % 4], "words": [[WORDS[i % 4], 0.0]], "speaker": f"s{i % 2}",
                     "split": "train" if 4 * i < 3 * clips else "test"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.json").write_text(json.dumps(WORDS))
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a finished run of 4 steps; its config file, clips and cache lie beside it. Look, do not touch."""
    here = tmp_path_factory.mktemp("tiny")
    write_clips(here / "clips")
    (here / "tiny_run.py").write_text(CONFIG)
    rc, _, err = cli("train.py", here / "tiny_run.py")
    assert rc == 0, err
    return here / "run"


def arithmetic() -> tuple:
    """What in this process decides how numbers round."""
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled)


@pytest.fixture(autouse=True)
def arithmetic_stays():
    """A test that changes it for those that follow in its process fails, and not they, by the order of the files."""
    before = arithmetic()
    yield
    after = arithmetic()
    torch.set_num_threads(before[0])
    assert after == before


def cli(*args, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 600) -> tuple[int, str, str]:
    """Run a command of the repository as a process of its own: (exit code, stdout, stderr)."""
    command = [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    done = subprocess.run(command, env=variables, cwd=cwd or ROOT, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def call(*args, cwd: Path | None = None) -> tuple[int, str, str]:
    """Run a command in this process, as `cli` would, without the seconds that a new interpreter costs.

    A ValueError or OSError ends as the hook of `exit_on_error` would end it; any other error is a fault and raised.
    """
    script, argv = str(args[0]), [str(arg) for arg in args]
    kept = sys.argv, sys.excepthook, Path.cwd(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    out, err, rc = io.StringIO(), io.StringIO(), 0
    try:
        sys.argv = argv
        os.chdir(cwd or ROOT)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as end:
                rc = end.code if isinstance(end.code, int) else int(end.code is not None)
            except (ValueError, OSError) as error:
                from options import error_line
                print(error_line(error), file=err)
                rc = 2
    finally:
        sys.argv, sys.excepthook = kept[:2]
        os.chdir(kept[2])
        for number, handler in kept[3].items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)                    # bench.py sets its own; other counts round differently
    return rc, out.getvalue(), err.getvalue()


KILLED = """import os, runpy, signal, sys
import torch

last, sys.argv, clip = int(sys.argv[1]), sys.argv[2:], torch.nn.utils.clip_grad_norm_


def clip_or_die(*args, left=iter(range(last))):
    return os.kill(os.getpid(), signal.SIGKILL) if next(left, None) is None else clip(*args)


torch.nn.utils.clip_grad_norm_ = clip_or_die
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed_and_resumed(name: str, out: Path, *options, whole: bool = False) -> None:
    """Train a smoke run of four steps, SIGKILL its process inside step 3, whose gradients are made and whose weights are not changed
    yet, behind the checkpoint of step 2; then the same command again. `whole`: its weights are those of a run that nobody killed."""
    command = ["train.py", f"configs/{name}.py", "--smoke", *options, "--save_every=2", "--steps=4"]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    killed = [sys.executable, "-c", KILLED, "3", *command, f"--out={out}"]
    done = subprocess.run(killed, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    rc, text, err = call(*command, f"--out={out}")
    assert rc == 0 and "at step 2" in text, err
    if whole:
        assert call(*command, f"--out={out}_whole")[0] == 0
        folders = (Path(folder) / "ckpt" / "latest" for folder in (out, f"{out}_whole"))
        one, other = ({path.name: load_file(path) for path in folder.glob("*.safetensors")} for folder in folders)
        assert one and one.keys() == other.keys()
        assert all(one[f].keys() == other[f].keys() and all(torch.equal(t, other[f][n]) for n, t in one[f].items()) for f in one)
