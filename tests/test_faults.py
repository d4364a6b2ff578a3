"""A sample of what `make faults` does in full, and ten seconds of the fuzzer: nothing that dies or fails leaves another result."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

NAMES, SAMPLE = ("prepare", "sample_texts", "merge", "train_sharded", "train_lora_random"), 2


def run(*words: object) -> tuple[int, list[str], str]:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ})
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    code, lines, err = run("tests/faults.py", *NAMES, f"--sample={SAMPLE}", f"--dir={tmp_path_factory.mktemp('faults')}")
    assert len(lines) == len(NAMES), (code, lines, err)
    return {result["name"]: result for result in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the harness reads /proc")
@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_dies_or_fails_at_any_event_ends_the_same_when_it_runs_again(name, results):
    assert results[name]["faults"] == []
    assert [results[name][mode][0] for mode in ("kill", "fail", "memory")] == [SAMPLE] * 3


@pytest.mark.slow
def test_damaged_files_end_in_one_line_or_load_as_what_they_were(tmp_path):
    code, lines, err = run("tests/fuzz.py", "--seconds=10", f"--dir={tmp_path}")
    result = json.loads(lines[-1])
    assert code == 0 and result["faults"] == 0 and result["cases"] > 50, (lines, err)
    assert sum(kind["refused"] for kind in result["kinds"].values()) > sum(kind["loaded"] for kind in result["kinds"].values()) / 2
