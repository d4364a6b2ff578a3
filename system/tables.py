"""Tables in parquet and Arrow files, as the Hub and `datasets` write them: rows as plain values, recordings left where they are.

    for number, row in rows(path): ...     # a recording is {"cell": [number, column], "path": its own name or None}
    cell_bytes(path, number, column)       # the bytes of one

Needs pyarrow, an optional package. A row group is read once for neighbouring rows; Arrow files are mapped.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

TABLE_FILES = (".parquet", ".arrow")
INSTALL = "pip install pyarrow"


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow to be read; run `{INSTALL}`, or save the set as jsonl and sound files") from None
    return pyarrow


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as a table ({str(error).splitlines()[0][:120]}); write or download it again")


@lru_cache(maxsize=4)
def _groups(path: Path, changed: int) -> tuple[Any, list[int]]:
    """An open parquet file or the batches of an Arrow file, and the number of the first row of each group."""
    arrow = _pyarrow(path)
    try:
        if path.suffix == ".parquet":
            found = arrow.parquet.ParquetFile(path, memory_map=True)
            sizes = [found.metadata.row_group(n).num_rows for n in range(found.num_row_groups)]
        else:
            source = arrow.memory_map(str(path))
            try:
                found = list(arrow.ipc.open_stream(source))                 # datasets
            except arrow.ArrowInvalid:
                reader = arrow.ipc.open_file(source)
                found = [reader.get_batch(n) for n in range(reader.num_record_batches)]
            sizes = [len(batch) for batch in found]
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    return found, [sum(sizes[:n]) for n in range(len(sizes))]


@lru_cache(maxsize=2)
def _group(path: Path, changed: int, number: int) -> Any:
    found, _ = _groups(path, changed)
    try:
        return found[number] if isinstance(found, list) else found.read_row_group(number)
    except (_pyarrow(path).ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with their numbers; values that a row does not have are left out."""
    changed = path.stat().st_mtime_ns
    for n, first in enumerate(_groups(path, changed)[1]):
        group = _group(path, changed, n)
        for at in range(0, len(group), 32):
            for k, row in enumerate(group.slice(at, 32).to_pylist(), first + at):
                yield k, {name: _plain(value, k, name) for name, value in row.items() if value is not None}


def _plain(value: Any, number: int, column: str) -> Any:
    """A value as json has it; bytes, alone or beside their path, as the place of a recording."""
    if isinstance(value, bytes):
        return {"cell": [number, column], "path": None}
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return {"cell": [number, column], "path": value.get("path")}
    if isinstance(value, dict):
        return {key: _plain(part, number, column) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part, number, column) for part in value]
    return value if isinstance(value, (str, bool, int, float)) or value is None else str(value)


def cell_bytes(path: Path, number: int, column: str) -> bytes:
    """The bytes of a recording in a table; ValueError where there are none."""
    changed = path.stat().st_mtime_ns
    starts = _groups(path, changed)[1]
    n = max((n for n, first in enumerate(starts) if first <= number), default=-1)
    group = _group(path, changed, n) if n >= 0 else []
    at = number - starts[n] if n >= 0 else 0
    if at >= len(group) or column not in group.schema.names:
        raise ValueError(f"{path} has no row {number} with a column {column}; write the list again")
    found = group.column(column)[at].as_py()
    found = found.get("bytes") if isinstance(found, dict) else found
    if not isinstance(found, bytes):
        raise ValueError(f"{path} holds no recording in row {number}, column {column}; write the list again")
    return found
