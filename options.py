"""Options: frozen dataclasses <-> Python config files, command line and JSON; and how an error becomes one line.

A config file is plain Python that builds a dataclass and calls it `config` (and its tiny twin `smoke`). Any field can
be overridden with a dotted name, `--model.temporal.dim=512` or `--model.temporal.dim 512`, checked against its type.
The comment behind a field is its help text. This module does not know what the fields mean.
"""

import ast
import atexit
import dataclasses
import difflib
import errno
import functools
import gc
import inspect
import json
import math
import os
import re
import runpy
import signal
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from system.files import checksum, replace_file, unlock_all

# ---- JSON <-> dataclass ----


def to_json(value: Any) -> Any:
    """Turn a dataclass into plain dicts, lists and numbers."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    return value


def from_json(kind: Any, value: Any, name: str = "config") -> Any:
    """Build a value of type `kind` out of JSON or command-line data; ValueError names the field that is wrong."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        if value is None and len(kinds) < len(typing.get_args(kind)):
            return None
        return _first_match(kinds, value, name)
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_json(kind, value, name)
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        item, *rest = typing.get_args(kind)
        kinds = [item] * len(value) if rest == [Ellipsis] else [item, *rest]
        if len(kinds) != len(value):
            raise ValueError(f"{name} needs {len(kinds)} values, got {len(value)}: {value!r}")
        return tuple(from_json(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if kind is float and isinstance(value, (int, float)) and not abs(value) < math.inf:      # 1e400 is infinite, too
        raise ValueError(f"{name} wants a finite float, got {value!r}; see --help for its default")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be {_kind_name(kind)}, got {value!r}; --help shows its default")


def _first_match(kinds: list[Any], value: Any, name: str) -> Any:
    for kind in kinds[:-1]:
        try:
            return from_json(kind, value, name)
        except ValueError:
            continue                               # the next alternative of the union may fit
    return from_json(kinds[-1], value, name)


def _dataclass_from_json(kind: type, value: Any, name: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object with the fields of {kind.__name__}, got {value!r}")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise ValueError(unknown(f"{name}.{key}", [f"{name}.{h}" for h in hints]))
    try:
        return kind(**{key: from_json(hints[key], item, f"{name}.{key}") for key, item in value.items()})
    except TypeError as error:
        raise ValueError(f"{name} is incomplete: {error}") from None
    except AssertionError as error:                # a dataclass that checks itself
        raise ValueError(f"{name} is not valid: {error}; correct it") from None


def check_types(config: Any) -> None:
    """Check every field of a dataclass against its annotation; ValueError names the first that is wrong."""
    for name, kind in typing.get_type_hints(type(config)).items():
        from_json(kind, getattr(config, name), name)


def short(value: Any, most: int = 200) -> str:
    """A value of unknown size as it is shown in a message."""
    text = value[: most + 1] if isinstance(value, (str, bytes)) else value
    try:
        text = repr(text)
    except (RecursionError, ValueError):           # nested too deeply, or a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else text[:most] + "..."


def _kind_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


CONFIGS = Path(__file__).with_name("configs")
RENAMED = {"exact_moshi": "skip_first_frame", "latent": "representations"}       # old name of an option or command -> its name today


def unknown(name: str, known: Sequence[str], what: str = "option") -> str:
    """The message for a name that does not exist: what it is called now, or its nearest neighbour."""
    if (bare := name.removeprefix("--")) in RENAMED:
        return f"{what} {name} is now called {name.replace(bare, RENAMED[bare])}"
    near, shown = difflib.get_close_matches(name, known, 1, 0.0), name if what == "option" else repr(name)
    return f"unknown {what} {shown}; nearest is {near[0]}" if near else f"unknown {what} {shown}"


# ---- overrides ----

def apply(config: Any, pairs: dict[str, str], prefix: str = "--") -> Any:
    """Replace the fields at the dotted keys of `pairs`, each text read as its field's type; returns a new config.

    A part is rebuilt once, from all its changes: values that are only valid together may come in any order.
    """
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    parts: dict[str, dict[str, str]] = {}
    for key, text in pairs.items():
        head, dot, rest = key.partition(".")
        if head not in hints or (dot and _part(config, head, hints[head]) is None):
            raise ValueError(unknown(prefix + key, [prefix + name for name, *_ in flatten(config, with_off=True)]))
        if dot:
            parts.setdefault(head, {})[rest] = text
        else:
            changes[head] = _parse(hints[head], text, prefix + key)
    for head, inner in parts.items():
        changes[head] = apply(_part(config, head, hints[head]), inner, f"{prefix}{head}.")
    try:
        return dataclasses.replace(config, **changes)
    except AssertionError as error:                # a dataclass that checks itself
        given = " ".join(f"{prefix}{key}={text}" for key, text in pairs.items())
        raise ValueError(f"{given} is not valid: {error}; see --help") from None


def _part(config: Any, name: str, kind: Any) -> Any:
    """The dataclass in a field; an optional one is switched on by naming one of its fields. None = the field holds no dataclass."""
    kinds = [k for k in typing.get_args(kind) if dataclasses.is_dataclass(k) and not _required(k)]
    current = kinds[0]() if getattr(config, name) is None and kinds else getattr(config, name)
    return current if dataclasses.is_dataclass(current) else None


def _required(kind: Any) -> list[str]:
    """Fields of a dataclass without a default: it cannot be switched on by naming one of the others."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]


def _parse(kind: Any, text: str, name: str) -> Any:
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if str in kinds and not (type(None) in kinds and text.lower() == "none"):
        return text
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return from_json(kind, words[text.lower()], name)
    tuples = [typing.get_origin(k) is tuple for k in kinds if k is not type(None)]
    if any(tuples) and (all(tuples) or "," in text) and not text.startswith(("(", "[")):
        text = "(" + "".join(f"{_literal(item)!r}," for item in text.split(",") if item) + ")"
    return from_json(kind, _literal(text), name)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text) if len(text) < 10_000 else text
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):      # the last three: thousands of signs or brackets
        return text                                # a bare word is a string; the type check follows


def flatten(config: Any, prefix: str = "", with_off: bool = False) -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted name, value, help line) of every field; `with_off`, also of optional parts that are switched off."""
    comments = {key: text for kind in type(config).__mro__[::-1] for key, text in field_comments(kind).items()}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value):
            yield prefix + field.name, value, comments.get(field.name, "")
        part = _part(config, field.name, hints[field.name]) if with_off else value
        if dataclasses.is_dataclass(part):
            yield from flatten(part, f"{prefix}{field.name}.", with_off)


@functools.cache
def field_comments(kind: type) -> dict[str, str]:
    """Read the comment behind each field from the source of a dataclass."""
    try:
        lines = inspect.getsource(kind).splitlines()
    except (OSError, TypeError):                   # built-in, or made in an interactive session: no source, no comments
        return {}
    found = (re.match(r"\s{4}(\w+)\s*:.*?#\s*(.+)$", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def help_text(config: Any, usage: str) -> str:
    rows = [(f"--{name}", repr(value) if not dataclasses.is_dataclass(value) else "", text)
            for name, value, text in flatten(config, with_off=True)]
    width = min(44, max(len(name) for name, *_ in rows))
    return "\n".join([usage, "", *(f"  {name:<{width}} {value[:60]:<24} {text}".rstrip() for name, value, text in rows)])


def split_arguments(argv: list[str], flags: tuple[str, ...] = (), many: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    """Sort a command line into plain words and `--key value` / `--key=value` pairs, `--ref-text` being `--ref_text`.

    A repeated key keeps its last value; a key in `many` keeps all of them, as the text of a tuple.
    """
    words: list[str] = []
    pairs: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals and key not in flags:
            if not rest:
                raise ValueError(f"{word} has no value; write {word}=VALUE")
            value = rest.pop(0)
        if key in many:
            lists.setdefault(key, []).append(value)
        pairs[key] = value
    return words, pairs | {key: repr(tuple(values)) for key, values in lists.items()}


def parse_shard(text: str) -> tuple[int, int]:
    """The part of a work that is done in n parts: "3/8" is (3, 8)."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--shard={text} is not i/n with i from 0 to n - 1; write --shard=0/8 for the first of 8 parts")
    return int(number), int(count)


def load_config(argv: list[str], usage: str = "", kind: str = "") -> Any:
    """Run a config file and apply the overrides behind it: `configs/tiny.py --lr=1e-3 --smoke`; ValueError when it makes no `kind`.

    `--preset=NAME` takes another value that the file defines; `--smoke` is `--preset=smoke`. `--help`, or no argument at
    all, prints the options with the values of the config, or of configs/tiny.py where none is named, and exits with 0.
    """
    words, pairs = split_arguments(argv, ("help", "smoke"))
    if not words and ("help" in pairs or not pairs):
        words, pairs["help"] = [str(CONFIGS / "tiny.py")], ""
    if not words:
        raise ValueError(f"no config file given; usage: {usage}")
    path = locate(words[0])
    if path.suffix != ".py" or not path.is_file():
        near = difflib.get_close_matches(str(path), sorted(f"configs/{p.name}" for p in CONFIGS.glob("*.py")), 1, 0.0)
        raise FileNotFoundError(f"config file {path} does not exist" + (f"; nearest is {near[0]}" if near else ""))
    if words[1:]:
        raise ValueError(f"unexpected word {words[1]!r} after {path}; overrides look like --key=value")
    preset = pairs.pop("preset", "config")
    config = run_config(path, "smoke" if pairs.pop("smoke", "false") != "false" else preset)
    if kind and type(config).__name__ != kind:                  # by name: a class that is imported twice is two classes
        raise ValueError(f"{path} defines a {type(config).__name__}, this command needs a {kind}; the file itself shows its command")
    if "help" in pairs:
        print(help_text(config, f"{usage}\n\nOptions, with their values in {path}:"))
        raise SystemExit(0)
    return apply(config, pairs)


def run_config(path: Path, name: str = "config") -> Any:
    """Execute a config file and return its `config` (or `smoke`, which may be a function), every field checked against its type."""
    try:
        found = runpy.run_path(str(path))
        if inspect.isfunction(found.get(name)):        # a function may first make the small files that it needs
            found[name] = found[name]()
    except Exception as error:                     # whatever it is, the author of the file can correct it
        line = next((f" line {f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)), "")
        reason = f"does not build: {type(error).__name__}: {error}"
        raise ValueError(f"config file {path}{line} {reason}; correct it, configs/tiny.py is an example") from error
    if not dataclasses.is_dataclass(found.get(name)):
        others = ", ".join(key for key, value in found.items() if dataclasses.is_dataclass(value) and not isinstance(value, type)
                           and hasattr(value, "steps"))
        raise ValueError(f"config file {path} defines no `{name}`" + (f" (it has {others})" if others else "")
                         + f"; add `{name} = TrainConfig(...)`")
    try:
        return from_json(type(found[name]), to_json(found[name]), name)
    except ValueError as error:
        raise ValueError(f"config file {path}: {error}") from None


def difference(old: Any, new: Any) -> list[str]:
    """List the fields in which two configs differ, one line each."""
    before, after = ({name: value for name, value, _ in flatten(c)} for c in (old, new))
    names = [*before, *(n for n in after if n not in before)]
    return [f"{n}: {before.get(n, 'absent')} -> {after.get(n, 'absent')}" for n in names
            if before.get(n, "absent") != after.get(n, "absent")]


# ---- files and errors ----

HERE = Path(__file__).resolve().parent            # the repository
OURS = ("assets", "configs")                         # folders of the repository that configs, checkpoints and commands name


def locate(path: str | Path) -> Path:
    """Find a file as the user means it: where they stand, else, for "assets/..." and "configs/...", beside this code.

    Configs and checkpoints store such names as they are, so that a run goes on from any folder and on any machine.
    """
    path = Path(path)
    return HERE / path if path.parts[:1] and path.parts[0] in OURS and not path.exists() and (HERE / path).exists() else path


def write_text(path: str | Path, text: str) -> None:
    replace_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(to_json(value), indent=1, ensure_ascii=False) + "\n")


def write_rows(path: str | Path, rows: Iterable[Any]) -> None:
    """Write JSON lines, whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: str | Path, limit: int = 64 << 20, expected_sum: str = "") -> Any:
    """Read a JSON file of at most `limit` bytes, of the checksum `expected_sum`; ValueError names the file and the line that is broken."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    if path.stat().st_size > limit:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {limit} expected of such a file")
    content = path.read_bytes()
    if expected_sum and checksum(content) != expected_sum:
        raise ValueError(f"{path} is damaged (its checksum differs); delete it and run what makes it again")
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError) as error:      # broken, not UTF-8, a number of thousands of digits, nested too deeply
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or remove it") from None
    return found


def read_object(path: str | Path, remedy: str, limit: int = 64 << 20, expected_sum: str = "", **fields: Any) -> dict[str, Any]:
    """Read the object of a JSON file whose `fields` are of these types (`expect` has them); ValueError names the field and the remedy."""
    found = read_json(path, limit, expected_sum)
    try:
        expect(found, fields)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from None
    return found


def expect(value: Any, kind: Any, place: str = "") -> None:
    """ValueError with its place, where a JSON value is not of a kind: a type, several of them, a list of one ([int]), or an object
    with these fields at least ({"a": int}), where a field ending in ? may be absent."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{place or 'it'} is {short(value, 60)}, not an object")
        for name, inner in kind.items():
            key = name.removesuffix("?")
            if key in value:
                expect(value[key], inner, f"{place}.{key}" if place else key)
            elif key == name:
                raise ValueError(f"{place}.{key} is missing" if place else f"{key} is missing")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise ValueError(f"{place or 'it'} is {short(value, 60)}, not a list")
        for n, item in enumerate(value):
            expect(item, kind[0], f"{place}[{n}]")
    elif not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        raise ValueError(f"{place or 'it'} is {short(value, 60)}, not {' or '.join(k.__name__ for k in kinds)}")


def parse_row(text: str, /, **fields: type) -> dict[str, Any]:
    """The object of one JSON line, with `fields` of these types; ValueError says what is wrong with it."""
    try:
        row = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("each row must be an object {...}")
    lacking = next((name for name, kind in fields.items() if not isinstance(row.get(name), kind)), None)
    if lacking is not None:
        raise ValueError(f"it has no {lacking!r} ({fields[lacking].__name__})")
    return row


def read_rows(path: str | Path, what: str, /, **fields: type) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file of JSON lines and their line numbers; ValueError names the line that is not a `what`, and why."""
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):     # of bytes: U+2028 inside a text ends no line
        if line.strip():
            try:
                row = parse_row(line.decode("utf-8-sig"), **fields)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not a {what} ({error}); correct or remove it") from None
            yield number, row


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, stripped."""
    path = locate(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a file with one text a line")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; save it again as UTF-8") from None


FULL = "free some space on the disk and run the command again; files written earlier are intact"
PATH = "check the path"
REMEDIES = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EFBIG: FULL, errno.ENOENT: PATH, errno.ENOTDIR: PATH, errno.EISDIR: PATH,
            errno.EEXIST: "choose another path", errno.EROFS: "choose another path", errno.EACCES: "check its permissions"}


LONGEST = 480               # letters of a message


def visible(text: object, keep: str = "") -> str:
    """Text from data as it may be shown at a terminal: control characters, which move the cursor or set colours, are escaped."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def error_line(error: BaseException) -> str:
    """The one line that a user reads about an error; an error of the operating system also gets its remedy."""
    remedy = REMEDIES.get(error.errno, "") if isinstance(error, OSError) else ""
    text = visible(" ".join(str(error).split()))
    text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return f"error: {text}" + (f"; {remedy}" if remedy else "")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, CUDA's, or that of torch on a CPU, which is a RuntimeError."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def exit_on_error() -> None:
    """From here on a ValueError or OSError, which a user can act on, ends in one line and exit code 2.

    MULTISTREAM_TRACE=1 shows the trace. Any other error is a bug in this code and keeps its trace.
    """
    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
            unlock_all()
            os._exit(130)
        if not os.environ.get("MULTISTREAM_TRACE") and out_of_memory(error):
            kind, error = OSError, OSError(f"memory ran out ({error}); make the batch, the model or the file smaller")
        if os.environ.get("MULTISTREAM_TRACE") or not issubclass(kind, (ValueError, OSError)):
            unlock_all()
            sys.__excepthook__(kind, error, trace)
            return
        if not issubclass(kind, BrokenPipeError):  # the reader of our output has closed the pipe (`| head`)
            print(error_line(error), file=sys.stderr, flush=True)
        unlock_all()
        os._exit(2)                                # at once, without waiting for other threads or a process group

    sys.excepthook = hook
    if not gc.isenabled():                         # setup_check.py: the imports are done, and stay
        gc.freeze()                                # the collector need not look at them again before the end
        atexit.register(gc.unfreeze)
        gc.enable()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def edge(main: Callable[[], Any]) -> None:
    """Run a command under `exit_on_error`."""
    exit_on_error()
    main()
