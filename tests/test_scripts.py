"""Scripts answer a newcomer: no argument prints the help, a missing torch is one line, and messages are plain English."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, call, cli

from config import Stage, TrainConfig
from options import field_comments, load_config

SCRIPTS = ("train.py", "sample.py", "data.py", "evaluate.py", "bench.py", "checkpoint.py")
SERVE = ("serve.py",) if find_spec("aiohttp") and find_spec("sphn") else ()
COMMANDS = (*[(script,) for script in SCRIPTS], ("data.py", "annotate"), ("data.py", "calls"), ("data.py", "fix-alignments"),
            ("data.py", "transcribe"), ("data.py", "check"),
            ("data.py", "prepare"), ("data.py", "show"), ("train.py", "sweep"), ("evaluate.py", "sae"),
            ("evaluate.py", "pairs"), ("evaluate.py", "choices"), ("evaluate.py", "compare"), ("evaluate.py", "representations"),
            ("evaluate.py", "landscape"), ("evaluate.py", "report"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_without_arguments_prints_its_help(command, tmp_path):
    bare = call(*command, cwd=tmp_path)
    assert bare == call(*command, "--help", cwd=tmp_path) and bare[0] == 0 and bare[2] == ""
    assert f"python {command[0]}" in bare[1]


def in_scripts(code: str, cwd: Path) -> str:
    """What Python prints where `ROOT` and `run(script, ...)` are known, as a script of the repository sees it when it starts."""
    head = ("import contextlib, io, json, runpy, sys\nfrom pathlib import Path\nROOT = Path(sys.argv[1])\n"
            + "def run(*command):\n    sys.argv, out = [str(ROOT / command[0]), *command[1:]], io.StringIO()\n"
            + "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
            + "        runpy.run_path(sys.argv[0], run_name='__main__')\n    return out.getvalue()\n"
            + "sys.path.insert(0, str(ROOT))\n")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", head + code, str(ROOT)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_needs_no_torch_and_reads_the_same(tmp_path):
    configs = [("train.py", f"configs/{path.name}") for path in sorted(ROOT.glob("configs/*.py")) if path.stem != "dsaa_ae"]
    commands = [[*words, "--help"] for words in (*COMMANDS, *configs, *((script,) for script in SERVE))]
    printed = json.loads(in_scripts(f"texts = [run(*words) for words in {commands}]\n"
                                    + "print(json.dumps([texts, 'torch._C' in sys.modules]))", ROOT))
    assert printed[1] is False
    for words, text in zip(commands, printed[0], strict=True):
        assert text == call(*words)[1], words


def test_help_that_is_computed_with_torch_starts_again_with_torch(tmp_path):
    source = (ROOT / "configs/tiny.py").read_text(encoding="utf-8").replace("steps=600", "steps=int(torch.arange(601).max())")
    (tmp_path / "own.py").write_text(source.replace("from config import", "import torch\n\nfrom config import"), encoding="utf-8")
    rc, out, err = cli("train.py", tmp_path / "own.py", "--help")
    assert (rc, err) == (0, "") and re.search(r"^  --steps +600 ", out, re.M)


def test_no_script_imports_what_it_does_not_use(tmp_path):
    slow = ("torch.distributed.fsdp", "torch.distributed.tensor", "triton", "sympy", "transformers", "tokenizers", "sentencepiece",
            "matplotlib", "pyarrow", "huggingface_hub", "torch._dynamo")
    names = [script.removesuffix(".py") for script in (*SCRIPTS, *SERVE) if script != "train.py"]
    found = in_scripts(f"import torch\nbefore = set(sys.modules)\nfor name in {names}:\n    __import__(name)\n"
                       + "run('train.py', 'sweep')\nprint(json.dumps(sorted(set(sys.modules) - before)))", tmp_path)
    assert not set(json.loads(found)) & set(slow)


def test_the_help_of_train_lists_the_options_of_an_example(tmp_path):
    _, out, _ = call("train.py", cwd=tmp_path)
    assert "configs/tiny.py:" in out and "\n  --data.columns " in out and "\n  --lora.rank " in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_torch_a_script_says_how_to_set_up(script, tmp_path):
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    blind = "import sys, importlib.util as u; sys.path.insert(0, sys.argv[1]); found = u.find_spec\n" + (
        "u.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest); sys.modules['torch'] = None\n"
        + "import runpy; runpy.run_path(sys.argv[1] + '/' + sys.argv[2], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", blind, str(ROOT), script], env=bare, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: torch not installed in ")
    assert "make demo" in done.stderr and "pip install -e ." in done.stderr and done.stderr.count("\n") == 1


def test_without_torch_the_list_of_families_says_how_to_set_up(tmp_path):
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    blind = "import sys, importlib.util as u; sys.path.insert(0, sys.argv[1]); found = u.find_spec\n" + (
        "u.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest); sys.modules['torch'] = None\n"
        + "import runpy; runpy.run_module('families', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", blind, str(ROOT)], env=bare, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: torch not installed in "), done.stderr
    assert done.stderr.count("\n") == 1


# ---- plain English ----

BANNED = ("dear", "hitherto", "foresee", "only training losses are told", "first frames, this many", "mend the reasons", "nobody hears",
          "names layers of the temporal stack", "knows no turns", "hears nobody", "does the first", "nothing is left to train",
          "it said nothing", "where it stands", "what was forgotten", "how dear", "folded in")
ROOMS = (".", "generation", "training", "evaluation", "configs")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))
NAMES = {"told", "foresee", "wanted", "settle", "settled", "heard_before", "Writer", "Direct", "hold", "talk"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_messages_and_names_are_plain_english(path: Path):
    text = path.read_text(encoding="utf-8")
    assert [word for word in BANNED if re.search(rf"\b{word}\b", text)] == []
    assert re.findall(r"\bmend\w*|\bis told\b|\bare told\b", text) == []
    whole = ast.parse(text)
    names = {name for node in ast.walk(whole)
             for field in ("id", "attr", "name", "arg") if isinstance(name := getattr(node, field, None), str)}
    assert not names & NAMES


def test_a_stage_can_be_written_as_the_help_shows():
    line = field_comments(TrainConfig)["stages"]
    value = re.search(r"--stages='(.+)'", line)[1]
    config = load_config([str(ROOT / "configs/tiny.py"), f"--stages={value}"])
    assert config.stages == (Stage(400, audio=0.0),)
