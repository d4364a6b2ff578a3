"""Scripts answer a newcomer: no argument prints the help, a missing torch is one line, and messages are plain English."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, call

SCRIPTS = ("train.py", "sample.py", "data.py", "evaluate.py", "bench.py", "checkpoint.py")
COMMANDS = (*[(script,) for script in SCRIPTS], ("data.py", "annotate"), ("data.py", "calls"), ("data.py", "fix-alignments"),
            ("data.py", "check"), ("data.py", "prepare"), ("data.py", "show"), ("train.py", "sweep"), ("evaluate.py", "sae"),
            ("evaluate.py", "pairs"), ("evaluate.py", "choices"), ("evaluate.py", "compare"), ("evaluate.py", "representations"),
            ("evaluate.py", "landscape"), ("evaluate.py", "report"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_without_arguments_prints_its_help(command, tmp_path):
    bare = call(*command, cwd=tmp_path)
    assert bare == call(*command, "--help", cwd=tmp_path) and bare[0] == 0 and bare[2] == ""
    assert f"python {command[0]}" in bare[1]


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
