"""Files: written whole, one writer at a time, and seen when they are damaged.

    replace_file(path, write)       a temporary neighbour is written, synced and renamed over `path`: old or new, never half
    copy_file(source, target)       the same for a copy
    lock(folder)                    this process alone writes into `folder` until it ends; the error names the other process
    unlock(folder)
    checksum(data)                  of bytes, at the speed of memory; it changes with every bit and every block out of place
    write_sums(folder)              sizes and checksums of the files in a folder, as checksums.json; check_sums compares

A kill or a power cut at any moment leaves the old file or the new one. What a killed process left half written is removed
by the next one that writes into that folder: a temporary file is locked for as long as its writer lives. Another machine's lock
may be invisible here (Lustre, BeeGFS, some NFS): its files are removed a day after the last write. Where a file system knows no
locks at all nothing is removed. Knows nothing of what the files hold. Next: options.py.
"""

import errno
import json
import os
import re
import shlex
import shutil
import socket
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:         # Windows: no locks of this kind
    fcntl = None

PART = ".part"              # how the name of a temporary file ends
SUMS = "checksums.json"
LOCK = "lock"               # name of the file that a locked folder holds
HOST = re.sub(r"[^\w-]", "-", socket.gethostname())[:60]        # part of the names of temporary files
DAY = 86_400                # seconds
swept: set[str] = set()     # folders whose leftovers this process has removed
held: dict[str, int] = {}   # locked folders of this process, and their descriptors


# ---- whole files ----

def replace_file(path: str | Path, write: Callable[[str], Any]) -> None:
    """Write a file whole: `write` fills a temporary neighbour, which is synced and then renamed over `path`.

    A link is followed, a device or a pipe is written into; what is neither these nor a file is refused.
    """
    path = Path(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not path.is_file():
        return write_into(path, write)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    handle, temporary = make_temporary(path)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)                 # mkstemp makes private files; what we write is meant to be shared
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        os.close(handle)
        if os.path.exists(temporary):
            os.unlink(temporary)


def make_temporary(path: Path) -> tuple[int, str]:
    """A fresh file beside `path`, locked until its descriptor is closed."""
    stem = os.fsencode(path.name)[:100].decode(errors="ignore")
    while True:
        handle, name = tempfile.mkstemp(PART, f".{stem}.{HOST}.", path.parent)
        if grab(handle) and os.path.exists(name):  # else another process took it for a leftover, before it was locked
            return handle, name
        os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole."""
    replace_file(target, lambda temporary: shutil.copyfile(source, temporary))


def sync(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):       # a file system that cannot sync folders
            raise
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder; once a process."""
    if str(folder) in swept or fcntl is None:
        return
    swept.add(str(folder))
    for name in [entry.name for entry in os.scandir(folder) if entry.name.startswith(".") and entry.name.endswith(PART)]:
        try:
            handle = os.open(folder / name, os.O_RDWR)
        except FileNotFoundError:                  # its writer has just renamed it
            continue
        try:
            ours = f".{HOST}." in name or time.time() - os.fstat(handle).st_mtime > DAY
            if ours and grab(handle, sure=True):
                (folder / name).unlink(missing_ok=True)
        finally:
            os.close(handle)


def write_into(path: Path, write: Callable[[str], Any]) -> None:
    """Write into a character device or a pipe, which stay what they are."""
    mode = path.stat().st_mode
    if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        what = "a folder" if stat.S_ISDIR(mode) else "no file, device or pipe"
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"{path} is {what}; choose another path")
    with tempfile.TemporaryDirectory() as folder:
        temporary = os.path.join(folder, path.name)
        write(temporary)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)    # a pipe that nobody reads would wait for ever
        except OSError as error:
            raise OSError(error.errno, f"{path} cannot be written: nobody reads from it") if error.errno == errno.ENXIO else error from None
        os.set_blocking(handle, True)
        with open(temporary, "rb") as source, open(handle, "wb") as target:
            shutil.copyfileobj(source, target)


# ---- one writer ----

def grab(handle: int, sure: bool = False) -> bool:
    """Lock an open file for this process, if nobody else holds it. Where a file system knows no locks everybody gets it, but who
    must be `sure`."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        return not sure
    return True


def lock(folder: str | Path, wait: Callable[[str], Any] | None = None) -> None:
    """Be the only process that writes into a folder, until `unlock` or the end of this process, however it ends.

    When another one does, ValueError names it; with `wait` that is called with the same words once, and then waits.
    """
    key = os.path.realpath(folder)
    if key in held:
        return
    if os.path.exists(key) and not os.path.isdir(key):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), key)
    os.makedirs(key, exist_ok=True)
    path = os.path.join(key, LOCK)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not grab(handle):
            other = os.pread(handle, 400, 0).decode(errors="replace").strip() or "another process"
            found = f"{folder} is being written by {other}"
            if wait is None:
                os.close(handle)
                raise ValueError(f"{found}; wait until it ends, or choose another folder")
            wait(f"{found}; waiting until it ends")
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(handle)):
            break
        os.close(handle)                           # its holder ended and took the file away
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} ({shlex.join(sys.argv)[:200]})\n".encode(errors="replace"), 0)
    held[key] = handle


def unlock(folder: str | Path) -> None:
    """Let others write into a folder again."""
    key = os.path.realpath(folder)
    if key in held:
        os.unlink(os.path.join(key, LOCK))         # before it is let go: whoever opens the path now makes a new one
        os.close(held.pop(key))


def unlock_all() -> None:
    for key in list(held):
        unlock(key)


# ---- damage ----

BLOCK = 512                 # words of 8 bytes


def checksum(data: Any) -> str:
    """Checksum of what holds bytes: 64-bit sums of blocks of 4 KiB, and a CRC of those and of the rest (7 times as fast as one of all)."""
    return f"{zlib.crc32(block_sums(np.frombuffer(data, np.uint8))):08x}"


def block_sums(data: np.ndarray) -> bytes:
    """What the CRC is taken of; of pieces one after the other, all but the last of whole blocks, it is theirs, joined."""
    whole = len(data) // (8 * BLOCK) * 8 * BLOCK
    return np.add.reduce(data[:whole].view(np.uint64).reshape(-1, BLOCK), 1).tobytes() + data[whole:].tobytes()


def file_sum(path: Path) -> list[Any]:
    """Size and checksum of a file, which is read piece by piece: nothing of it stays in memory."""
    size, found = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            size, found = size + len(piece), zlib.crc32(block_sums(np.frombuffer(piece, np.uint8)), found)
    return [size, f"{found:08x}"]


def write_sums(folder: Path, names: Iterable[str] = ()) -> None:
    """Write checksums.json of the files `names` of a folder; without names, add all that it does not list, also those below."""
    path, found, names = folder / SUMS, {}, list(names)
    if not names:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SUMS]
    found |= {name: file_sum(folder / name) for name in names if name not in found}
    text = json.dumps(found, indent=1, sort_keys=True)
    replace_file(path, lambda temporary: Path(temporary).write_text(text + "\n"))


def check_sums(folder: Path, below: bool = True, mapped: Mapping[Path, Callable[[], list[Any]]] | None = None) -> None:
    """Compare files with checksums.json, if there is one; `below`, also those in folders. ValueError names one that differs.
    `mapped`: files that lie in memory already, and what tells their sizes and checksums."""
    path = folder / SUMS
    if not path.is_file():
        return                                     # written by another program, or by an older version
    try:
        found = json.loads(path.read_bytes()).items()
        expected = {name: [int(size), str(known)] for name, (size, known) in found if below or "/" not in name}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); use another checkpoint, or delete it to go without checksums") from None
    for name, known in expected.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; the checkpoint is incomplete, use another one")
        if (mapped or {}).get(folder / name, lambda name=name: file_sum(folder / name))() != known:
            raise ValueError(f"{folder / name} is damaged (its checksum differs from {SUMS}); use another checkpoint; "
                             + f"if you changed it yourself, delete {SUMS}")
