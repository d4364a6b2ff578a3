"""`bench.py gpu`: the rehearsal runs all of it, and on a GPU nothing that was measured is lost or measured twice."""

import json
import re

import pytest
import torch
from conftest import ROOT, call

import bench
from benchmarks import gpu
from kernels import PAIRS, shapes
from options import apply


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it measures")
def test_the_rehearsal_runs_everything_and_its_table_is_the_one_of_the_benchmarks(tmp_path):
    rc, out, err = call("bench.py", "gpu", f"--out={tmp_path / 'gpu.jsonl'}")
    assert (rc, err) == (0, "") and out.startswith("no CUDA device: a rehearsal")
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["command"] for line in lines if line.get("ended") == "rehearsed"] == [m.command for m in gpu.PLAN]
    figures = {figure.row for m in gpu.PLAN for figure in m.figures}
    assert {line["what"] for line in lines if "what" in line} >= figures | {f"kernel {name}" for name in PAIRS}
    table = "\n".join(gpu.table([]))
    assert out.endswith(table + "\n") and table in (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert all(line.endswith("| not measured |") for line in table.splitlines()[2:])


def test_the_time_of_the_sections_is_nine_minutes_and_every_section_has_work():
    assert sum(gpu.SECTIONS.values()) == 540 == gpu.GpuJob().seconds and {m.section for m in gpu.PLAN} == gpu.SECTIONS.keys()
    assert {name: int(seconds) for name, seconds in re.findall(r"^    (\w+) +(\d+)   ", gpu.__doc__, re.M)} == gpu.SECTIONS
    names = {figure.name for m in gpu.PLAN for figure in m.figures}
    assert names >= {f"T{n}" for n in range(1, 8)} | {f"G{n}" for n in range(1, 11)}
    for m in gpu.PLAN:
        words, job = bench.parse(m.command.split())
        assert words[0] in bench.WHAT and len(words) == 1 and job.pairs > 0


class Timer:
    """Cuts when the test says so."""

    def __init__(self, seconds, stop):
        Timer.stop = staticmethod(stop)

    def start(self):
        Timer.running = True

    def cancel(self):
        Timer.running = False


def test_a_process_that_is_cut_or_fails_keeps_the_rows_that_came(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import sys, time\nprint('{\"what\": \"a\"}', flush=True)\n"
                      + "time.sleep(600) if sys.argv[1] == 'sleep' else sys.exit('boom') if sys.argv[1] == 'fail' else None\n")
    monkeypatch.setattr(gpu, "SCRIPT", script)
    monkeypatch.setattr(gpu.threading, "Timer", Timer)
    found = []
    for line in gpu.apart("sleep", 30):
        found.append(line)
        if "what" in line:
            Timer.stop()
    assert found == [{"what": "a"}, {"ended": "cut after 30 s"}] and not Timer.running
    assert list(gpu.apart("fail", 30)) == [{"what": "a"}, {"ended": "failed with exit code 1: boom"}]
    assert list(gpu.apart("end", 30)) == [{"what": "a"}, {"ended": "done"}]
    assert list(gpu.apart("end", 3)) == [{"ended": "not begun, no time was left"}]


def test_the_same_command_again_measures_what_is_missing(tmp_path, monkeypatch, capsys):
    ran = []

    def apart(command, seconds):
        ran.append(command)
        yield {"what": "frame moshi", "checked": "", "ratio": None, "ours": {"ms": {"median": 9.0 if "3000" in command else 6.25}},
               "times_floor": 2.5}
        yield {"ended": "cut after 9 s" if command == gpu.NEAR and ran.count(command) == 1 else "done"}

    monkeypatch.setattr(gpu, "ON_GPU", True)
    monkeypatch.setattr(gpu, "apart", apart)
    job = apply(gpu.GpuJob(), {"only": "G1,decode", "out": str(tmp_path / "gpu.jsonl")})
    gpu.run_all(job, bench.rows_of)
    assert ran == [m.command for m in gpu.PLAN if m.section == "decode"]
    with open(job.out, "a") as file:
        file.write('{"section": "decode", "comm')                         # a kill in the middle of a line
    del ran[:]
    assert len(gpu.read_results(tmp_path / "gpu.jsonl")) == 2 * sum(m.section == "decode" for m in gpu.PLAN)
    gpu.run_all(job, bench.rows_of)
    assert ran == [gpu.NEAR]
    table = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in gpu.table(gpu.read_results(tmp_path / "gpu.jsonl"))}
    assert table["G1"] == "6.25 ms, 2.5 x the floor (missed)" and table["G9"] == "1.44 x that behind 100 (missed)"
    assert table["T1"] == "not measured" and table["G3"] == "6.25 ms (missed)"
    monkeypatch.setattr(gpu, "origin", lambda: {"commit": "another", "device": "another"})
    assert gpu.read_results(tmp_path / "gpu.jsonl") == []
    with pytest.raises(ValueError, match="--only=X1 names nothing"):
        gpu.run_all(apply(gpu.GpuJob(), {"only": "X1"}), bench.rows_of)


def test_an_op_that_is_wrong_is_not_timed(monkeypatch):
    route = PAIRS["route"][1]
    monkeypatch.setattr(bench, "PAIRS", {"route": (lambda *given: 1.001 * route(*given), route), "rope": PAIRS["rope"]})
    rows = {row["what"]: row for row in bench.bench_kernels(bench.Job(pairs=1))}
    assert rows["kernel route"]["checked"].startswith("WRONG: ") and "ours" not in rows["kernel route"]
    assert rows["kernel rope"]["ours"]["per_second"] > 0
    given = shapes.cases(torch.device("cpu"), torch.bfloat16, 8, 64)["rms_norm"]
    ref = PAIRS["rms_norm"][1]
    assert shapes.error_share(ref, ref, given) < 1
    assert shapes.error_share(lambda x, w, *rest, **more: ref(x, w * 1.1, *rest, **more), ref, given) > 1
