"""Options: a config file, its overrides and its JSON are the same thing in three spellings; files are written whole or not at all."""

import dataclasses
import errno
import json
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, call, cli
from hypothesis import given, settings
from hypothesis import strategies as st

from config import TrainConfig
from lora import LoraConfig
from options import (
    FULL,
    apply,
    check_types,
    difference,
    error_line,
    field_comments,
    flatten,
    from_json,
    help_text,
    load_config,
    locate,
    read_json,
    read_rows,
    replace_file,
    run_config,
    split_arguments,
    to_json,
    unknown,
    write_json,
    write_rows,
)

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
TINY = run_config(ROOT / "configs" / "tiny.py")


@dataclass(frozen=True)
class Inner:
    width: int = 4                # of the inside
    height: int = 2               # a divisor of the width

    def __post_init__(self) -> None:
        assert self.width % self.height == 0, f"{self.height} does not divide {self.width}"


@dataclass(frozen=True)
class Outer:
    """One field of every kind."""

    inner: Inner = Inner()        # a part
    maybe: Inner | None = None    # a part that may be off
    name: str = "x"               # any text
    rate: float = 1.0             # a number
    many: tuple[int, ...] = ()    # any number of them
    pair: tuple[float, float] = (0.0, 1.0)   # exactly two
    rule: float | tuple[float, ...] = 0.5    # one or several
    on: bool = False              # a switch
    limit: int | None = None      # a number or nothing


@dataclass(frozen=True)
class Child(Inner):
    depth: int = 1                # of the child


@pytest.mark.parametrize("key, text, wanted", [
    ("rate", "1e-3", 1e-3), ("rate", "3", 3.0), ("name", "3", "3"), ("name", "none", "none"), ("name", "a, b", "a, b"), ("name", "", ""),
    ("many", "1,2,3", (1, 2, 3)), ("many", "(1, 2)", (1, 2)), ("many", "[7]", (7,)), ("many", "7", (7,)), ("many", "", ()),
    ("pair", "0.9,0.95", (0.9, 0.95)), ("rule", "0.3", 0.3), ("rule", "0", 0.0), ("rule", "0.3,1", (0.3, 1.0)),
    ("on", "true", True), ("on", "False", False), ("limit", "4", 4), ("limit", "none", None), ("inner.width", "8", 8),
])
def test_an_override_takes_the_type_of_its_field(key, text, wanted):
    value = apply(Outer(), {key: text})
    for name in key.split("."):
        value = getattr(value, name)
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize("key, text", [
    ("rate", "fast"), ("rate", "true"), ("many", "1,x"), ("many", "1.5"), ("pair", "1"), ("pair", "1,2,3"), ("on", "1"), ("on", "yes"),
    ("limit", "1.5"), ("inner", "4"), ("inner.width", "none"), ("inner.width", "3"), ("name.x", "1"), ("rule", "hot"),
])
def test_a_value_of_another_type_is_refused_by_its_full_name(key, text):
    with pytest.raises(ValueError, match=f"--{key}"):
        apply(Outer(), {key: text})


def test_an_optional_part_is_switched_on_by_one_of_its_fields_and_off_by_none():
    on = apply(Outer(), {"maybe.width": "6"})
    assert on.maybe == Inner(6, 2) and apply(on, {"maybe": "none"}).maybe is None
    assert TINY.lora is None and apply(TINY, {"lora.rank": "4"}).lora == LoraConfig(rank=4)


@pytest.mark.parametrize("pairs", [{"inner.width": "9", "inner.height": "3"}, {"inner.height": "3", "inner.width": "9"}])
def test_values_that_only_fit_together_may_come_in_any_order(pairs):
    assert apply(Outer(), pairs).inner == Inner(9, 3)


def test_apply_leaves_the_config_it_was_given_alone():
    config = Outer()
    assert apply(config, {"inner.width": "8"}) != config == Outer() and apply(config, {}) == config


def test_the_command_line_splits_at_the_first_equals_sign():
    assert split_arguments(["--a=b=c", "--x", "y=z", "word"]) == (["word"], {"a": "b=c", "x": "y=z"})
    assert split_arguments(["--text", "--loud"]) == ([], {"text": "--loud"})
    assert split_arguments(["--ref-text", "a-b", "--allow-outside"], ("allow_outside",)) == ([], {"ref_text": "a-b", "allow_outside": ""})
    assert split_arguments(["--ref=a,b", "--ref", "c"], many=("ref",)) == ([], {"ref": "('a,b', 'c')"})
    assert split_arguments(["c.py", "--smoke", "--lr=1"], ("smoke",)) == (["c.py"], {"smoke": "", "lr": "1"})


def test_the_last_of_a_key_wins():
    assert split_arguments(["--lr=1", "--lr", "2"]) == ([], {"lr": "2"})
    assert load_config([str(ROOT / "configs/tiny.py"), "--lr=1", "--steps=3", "--lr=2"]).lr == 2.0


@pytest.mark.parametrize("wrong, right", [
    ("--lrr", "--lr"), ("--model.temporal.dims", "--model.temporal.dim"), ("--data.colums", "--data.columns"),
    ("--modle.dropout", "--model.dropout"),
])
def test_an_unknown_key_names_its_nearest_neighbour(wrong, right):
    with pytest.raises(ValueError, match=rf"unknown option {wrong}; nearest is {right}$"):
        apply(TINY, {wrong[2:]: "1"})


def test_an_unknown_key_ends_with_exit_code_2():
    rc, out, err = cli("train.py", "configs/tiny.py", "--stpes=3")
    assert (rc, out, err) == (2, "", "error: unknown option --stpes; nearest is --steps\n")


def test_unknown_without_neighbours_still_says_what_is_unknown():
    assert unknown("--x", []) == "unknown option --x"


def test_help_lists_every_key_with_its_default_and_a_line():
    rc, out, _ = call("train.py", "configs/tiny.py", "--help")
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  --")}
    assert rc == 0 and lines.keys() == {f"--{name}" for name, *_ in flatten(TINY, with_off=True)} and "--model.temporal.layers" in lines
    every = flatten(TINY, with_off=True)
    assert all(repr(value)[:60] in lines[f"--{name}"] and lines[f"--{name}"].endswith(text) for name, value, text in every)
    assert lines["--lr"].split(maxsplit=2) == ["--lr", "0.0015", "peak learning rate"]


def parts(kind, seen=()):
    """A dataclass and those in its fields."""
    if dataclasses.is_dataclass(kind) and kind not in seen:
        seen = (*seen, kind)
        for hint in typing.get_type_hints(kind).values():
            for inner in (hint, *typing.get_args(hint)):
                seen = parts(inner, seen)
    return seen


@pytest.mark.parametrize("kind", parts(TrainConfig), ids=lambda kind: kind.__name__)
def test_every_field_has_a_line_of_help(kind):
    missing = {f.name for f in dataclasses.fields(kind)} - field_comments(kind).keys()
    assert not missing, f"{kind.__name__}: write a comment behind {sorted(missing)}"


def test_the_parts_of_a_config_are_all_found():
    assert {kind.__name__ for kind in parts(TrainConfig)} >= {"TrainConfig", "ModelConfig", "StackConfig", "StreamTable", "Stream",
                                                              "DataConfig", "LossConfig", "LoraConfig"}


def test_inherited_fields_keep_their_help():
    assert [text for *_, text in flatten(Child())] == ["of the inside", "a divisor of the width", "of the child"]
    assert "of the inside" in help_text(Child(), "usage")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["config", "smoke"])
def test_a_config_survives_json_bit_for_bit(path, name):
    config = run_config(path, name)
    text = json.dumps(to_json(config))
    again = from_json(type(config), json.loads(text))
    assert again == config and json.dumps(to_json(again)) == text and difference(config, again) == []


VALUES = st.one_of(
    st.tuples(st.just("rate"), st.floats(allow_nan=False, allow_infinity=False)), st.tuples(st.just("on"), st.booleans()),
    st.tuples(st.just("many"), st.lists(st.integers()).map(tuple)), st.tuples(st.just("limit"), st.none() | st.integers()),
    st.tuples(st.just("name"), st.text()), st.tuples(st.just("inner.width"), st.integers().map(lambda n: 2 * n)))


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_any_value_survives_the_command_line_and_json(pair):
    key, value = pair
    config = apply(Outer(), {key: str(value)})
    assert dict((name, v) for name, v, _ in flatten(config))[key] == value
    assert from_json(Outer, json.loads(json.dumps(to_json(config)))) == config


def test_difference_names_what_changed_and_what_came_or_went():
    new = apply(TINY, {"lr": "0.5", "model.temporal.dim": "64"})
    assert difference(TINY, new) == ["model.temporal.dim: 256 -> 64", "lr: 0.0015 -> 0.5"]
    assert "maybe.width: absent -> 6" in difference(Outer(), apply(Outer(), {"maybe.width": "6"}))


def test_smoke_takes_the_tiny_twin_and_overrides_apply_to_it():
    words = [str(ROOT / "configs/tiny.py"), "--steps=7"]
    assert load_config([*words, "--smoke"]).model.temporal.dim == 48 and load_config([*words, "--smoke"]).steps == 7
    assert load_config(words).model.temporal.dim == 256 == load_config([*words, "--smoke=false"]).model.temporal.dim


def test_an_integer_in_a_config_file_becomes_the_float_that_the_field_wants(tmp_path):
    (tmp_path / "c.py").write_text("from test_options import Outer\nconfig = Outer(rate=3, many=[1, 2])\n")
    config = run_config(tmp_path / "c.py")
    assert (config.rate, type(config.rate), config.many) == (3.0, float, (1, 2))


def test_check_types_holds_every_field_against_its_annotation():
    check_types(Outer())
    with pytest.raises(ValueError, match="rate must be float, got '2e-6'"):
        check_types(Outer(rate="2e-6"))


# ---- files and the edge ----

def test_replace_file_leaves_the_old_file_and_nothing_else_when_writing_fails(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    replace_file(path, lambda temporary: Path(temporary).write_text("old"))

    def half(temporary):
        Path(temporary).write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, half)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_files_keep_every_letter_and_are_bounded(tmp_path):
    write_json(tmp_path / "a.json", {"text": "سلام ü", "config": to_json(Inner())})
    assert "سلام ü" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"text": "سلام ü", "config": {"width": 4, "height": 2}}
    with pytest.raises(ValueError, match="more than the 3 expected"):
        read_json(tmp_path / "a.json", limit=3)


def test_a_config_of_another_command_is_named():
    path = str(ROOT / "configs/dsaa_ae.py")
    with pytest.raises(ValueError, match="dsaa_ae.py defines a SaeConfig, this command needs a TrainConfig; .* shows its command"):
        load_config([path], kind="TrainConfig")
    with pytest.raises(ValueError, match="tiny.py defines a TrainConfig, this command needs a SaeConfig"):
        load_config([str(ROOT / "configs/tiny.py")], kind="SaeConfig")


def test_rows_come_back_as_written_and_a_bad_one_is_named(tmp_path):
    rows = [{"id": "سلام", "text": "one\u2028two\x85"}, {"id": "b", "text": ""}]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))         # as an editor leaves it
    assert list(read_rows(path, "clip", id=str, text=str)) == [(1, rows[0]), (3, rows[1])]
    for line, why in (("{", "Expecting property"), ("[" * 100_000, "nested too deeply"), ("3", "must be an object"),
                      ('{"id": 7, "text": ""}', r"it has no 'id' \(str\)"), ("\udcff", "can't decode")):
        path.write_bytes(b'{"id": "a", "text": ""}\n' + line.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=rf"rows.jsonl line 2 is not a clip \(.*{why}.*\); correct or remove it"):
            list(read_rows(path, "clip", id=str, text=str))


def test_an_error_is_one_line_and_what_the_system_says_gets_its_remedy():
    assert error_line(ValueError("two\n  lines")) == "error: two lines"
    assert error_line(OSError(errno.ENOSPC, "Disk full")) == f"error: [Errno 28] Disk full; {FULL}" and "free some space" in FULL
    assert error_line(FileNotFoundError(errno.ENOENT, "No such file", "x.wav")) == "error: [Errno 2] No such file: 'x.wav'; check the path"
    assert error_line(FileNotFoundError("x is gone; fetch it")) == "error: x is gone; fetch it"


def test_what_belongs_to_the_repository_is_found_from_any_folder_and_what_is_the_users_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("assets/demo.txt") == ROOT / "assets/demo.txt" and locate("configs/tiny.py") == ROOT / "configs/tiny.py"
    for name in ("out/demo", "README.md", "assets/none.txt", "../assets", "", str(ROOT / "assets/demo.txt")):
        assert locate(name) == Path(name), name
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/demo.txt").write_text("mine")
    assert locate("assets/demo.txt") == Path("assets/demo.txt")             # where they stand comes first
    assert locate("assets/speech/words.json") == ROOT / "assets/speech/words.json"
    assert load_config(["configs/tiny.py", "--smoke"]) == run_config(ROOT / "configs/tiny.py", "smoke")
    with pytest.raises(FileNotFoundError, match="nearest is configs/tiny.py"):
        load_config(["configs/tinny.py"])


def test_a_command_called_in_this_process_leaves_its_threads_as_they_were(tmp_path):
    """bench.py sets a count of its own; tests that compare bits with another process run in the same worker."""
    import torch
    from conftest import call
    before = torch.get_num_threads()
    (tmp_path / "command.py").write_text(f"import torch\ntorch.set_num_threads({before + 1})\nprint(torch.get_num_threads())\n")
    assert call(tmp_path / "command.py") == (0, f"{before + 1}\n", "")
    assert torch.get_num_threads() == before
