"""What bench.py says of checkouts, clusters, starts and corpora."""

import json
from itertools import count
from pathlib import Path

import pytest
from conftest import call

import bench
from benchmarks import checkouts, scale
from benchmarks.workloads import Job


def fake_checkout(folder: Path, **times: list[float]) -> Path:
    """A bench.py that prints the next time of each name whenever it is called."""
    folder.mkdir()
    (folder / "times.json").write_text(json.dumps(times))
    (folder / "bench.py").write_text("import json, pathlib, sys\nassert sys.argv[1:] == ['train', '--model=tiny', '--json']\n"
                                     + "path = pathlib.Path(__file__).with_name('times.json')\nleft = json.loads(path.read_text())\n"
                                     + "for what, times in left.items():\n"
                                     + "    print(json.dumps({'what': what, 'ours': {'ms': {'median': times.pop(0)}}}))\n"
                                     + "path.write_text(json.dumps(left))\n")
    return folder


def test_what_got_slower_is_named_with_its_interval(tmp_path):
    old = fake_checkout(tmp_path / "old", same=[1.0, 2.0, 1.0, 2.0, 1.0], slow=[1.0, 1.0, 2.0, 1.0, 1.0], fast=[2.0] * 5)
    new = fake_checkout(tmp_path / "new", same=[1.1, 2.0, 0.9, 2.1, 1.0], slow=[1.2, 1.3, 2.2, 1.1, 1.5], fast=[1.0] * 5)
    rc, out, err = call("bench.py", "compare", old, new, "train", "--model=tiny", "--rounds=5")
    lines = {line.split(",")[0]: line for line in out.splitlines()}
    assert (rc, err) == (1, "") and out.splitlines()[-1] == "1 of 3 got worse: slow, ms"
    assert lines["slow"].split()[2:] == ["1.200", "(1.100", "..", "1.500)", "worse"]
    assert lines["same"].endswith("no difference") and lines["fast"].endswith("better")
    assert "takes two checkouts" in call("bench.py", "compare", old)[2]
    rc, _, err = call("bench.py", "compare", old, tmp_path, "train")
    assert rc == 2 and f"{tmp_path} holds no bench.py" in err


def test_the_interval_covers_the_median_in_nine_of_ten():
    assert checkouts.interval([5, 1, 2, 3, 4]) == (1, 5)                    # 1 - 2 / 32
    assert checkouts.interval(list(range(8))) == (1, 6)                     # 1 - 2 (1 + 8) / 256
    with pytest.raises(AssertionError, match="fewest pairs"):
        checkouts.CompareJob(rounds=4)


def test_a_cluster_is_calculated_from_its_pieces():
    job = scale.ScaleJob()
    assert scale.traffic("DDP", 64, 7_000, 1_000, job)[0] == pytest.approx(2 * 63 / 64 * 4_000)
    inside, flat = scale.traffic("HSDP", 64, 7_000, 1_000, job), scale.traffic("FSDP", 64, 7_000, 1_000, job)
    assert inside[1] < flat[1] / 5 and scale.traffic("HSDP", 8, 7_000, 1_000, job) == scale.traffic("FSDP", 8, 7_000, 1_000, job)
    assert scale.held("DDP", 8, 100, 100, job) == 1600 and scale.held("FSDP", 8, 0, 0, job) == 0
    assert 0 < scale.slowest(8, 0.02) < scale.slowest(512, 0.02) < 0.1 and scale.slowest(8, 0.02) == scale.slowest(8, 0.02)
    flops, every, trained = scale.pieces("moshi", 128, job)
    assert flops == pytest.approx(20_000 * 32.8e9, rel=0.02) and 7.6e9 < every < 8.2e9 and trained == pytest.approx(387.9e6, rel=1e-3)
    rc, out, _ = call("bench.py", "scale", "--hours=10", "--jitter=0.1")
    assert rc == 0 and out.count("| straggler |") > 10 and "10 hours in clips of 5 s" in out


def test_starts_are_measured_in_cpu_time_of_whole_processes(monkeypatch):
    clock, ran = count(1.0), []
    monkeypatch.setattr(bench, "children", lambda: float(next(clock)))
    monkeypatch.setattr(bench.subprocess, "run", lambda words, **_: ran.append(words[1:]))
    rows = {row["what"]: row for row in bench.bench_start(Job(pairs=1))}
    assert ran[:2] == [["train.py", "--nothing=1"], ["-c", "import torch"]] and ["serve.py", "--help"] in ran
    assert {"start train.py", "help serve.py", "load codec tiny"} <= rows.keys()
    assert all(row["against"] == "import torch" and row["ours"]["ms"]["median"] > 0 for row in rows.values())


def test_a_corpus_is_prepared_again_in_less_time_and_kept_rows_replace_older_ones(tmp_path, capsys):
    cold, warm, opened = bench.bench_corpus(Job(rows=40))
    assert [row["what"] for row in (cold, warm, opened)] == ["corpus cold", "corpus warm", "corpus open"]
    assert warm["ours"]["ms"]["median"] < cold["ours"]["ms"]["median"] and "40 rows" in warm["checked"]
    assert "everything was cached" in capsys.readouterr().err
    kept = tmp_path / "kept.json"
    for _ in range(2):
        assert call("bench.py", "ops", "--model=tiny", "--frames=2", f"--keep={kept}", "--json")[0] == 0
    assert list(json.loads(kept.read_text())) == ["ops tiny --model=tiny --frames=2"]
