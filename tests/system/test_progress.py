"""A long command says how far it is, also where stderr is a file; a short one says nothing."""

import re

import pytest

from system import progress


@pytest.mark.parametrize(("every", "lines"), [(0.0, 4), (1000.0, 0)])
def test_without_a_terminal_lines_say_how_much_is_done_and_left(every, lines, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", every)
    with progress.Progress("encoding", 4, "clips") as bar:
        for _ in range(4):
            bar.add()
    found = capsys.readouterr().err.splitlines()
    assert len(found) == lines and all(re.fullmatch(r"encoding: [1-4] of 4 clips, \d+:\d\d left", line) for line in found), found
    assert not found or found[-1] == "encoding: 4 of 4 clips, 0:00 left"


def test_as_many_threads_as_asked_for_or_as_cores(monkeypatch):
    monkeypatch.setattr(progress.os, "sched_getaffinity", lambda _: set(range(20)), raising=False)
    assert progress.workers(3) == 3 and progress.workers() == 8
