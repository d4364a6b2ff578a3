"""Personal data is found in lines that the patterns were not written for, and nothing else is."""

import pytest
from conftest import ROOT, call

from text.personal import masked, measure, personal

LINES = "assets/ivr/personal.txt"


def labelled(split: str) -> list[str]:
    lines = (ROOT / LINES).read_text(encoding="utf-8").splitlines()
    return [line.split(": ", 1)[1] for line in lines if line.startswith(f"{split}: ")]


@pytest.mark.parametrize("split", ["held-out", "development"])
def test_recall_and_precision_on_labelled_lines(split: str) -> None:
    marked, found, masks, right, faults = measure(labelled(split))
    assert len(labelled(split)) == 100 and marked >= 70
    assert found / marked >= 0.97 and right / masks >= 0.95, faults


def test_no_line_is_on_both_sides() -> None:
    assert not set(labelled("held-out")) & set(labelled("development"))


@pytest.mark.parametrize("text, told", [
    ("my name is rory o'hara-smith, and it's broken", "my name is <name>, and it's broken"),
    ("oh double seven one nine double four please", "<number> please"),
    ("anna dot b at mail dot example dot org", "<email>"),
    ("I live at 12 Church Lane, born 4 May 1980", "I live at <address>, born <birth>"),
    ("رقم الـهاتف ٠٧٩١٢٣٤٥٦٧", "رقم الهاتف ##########"),
    ("it was 1250.00 euros at 9:30 on 3 June 2026", "it was 1250.00 euros at 9:30 on 3 June 2026")])
def test_masks_say_what_they_hide(text: str, told: str) -> None:
    assert masked(text, {}) == told


def test_a_part_counts_only_if_it_is_found_whole() -> None:
    assert measure(["my name is [name:maria costa]"])[:4] == (1, 1, 1, 1)
    assert measure(["my name is [name:maria costa and] so on"])[:4] == (1, 0, 1, 1)         # a word of it stays
    assert measure(["my name is [name:maria] costa"])[:4] == (1, 1, 1, 0)                   # a word too many goes
    assert measure(["it is maria [name:again]"])[:4] == (1, 0, 1, 0) and not personal("nothing here")


def test_the_command_prints_both_sides_and_refuses_other_files(tmp_path) -> None:
    rc, out, err = call("data.py", "personal", LINES)
    assert rc == 0 and "held-out: 100 lines, 75 marked parts, recall 0.9" in out and "development: 100 lines" in out, err
    (tmp_path / "x.txt").write_text("held-out: my [nom:x]\n")
    for words, told in (((tmp_path / "x.txt",), "is no labelled line"), (("nowhere.txt",), "does not exist"), (("a", "b"), "one file")):
        rc, _, err = call("data.py", "personal", *words)
        assert rc == 2 and told in err and err.count("\n") == 1
