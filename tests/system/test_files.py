"""Files: whole or not at all, one writer, links and devices stay what they are, and a flipped bit is seen."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from system import files
from system.files import check_sums, checksum, file_sum, lock, replace_file, unlock, write_sums


def other(code: str, *args: object) -> subprocess.Popen:
    """Another process that runs `code` and says a line when it is there."""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


HOLDS = "import sys, time; from system.files import lock; lock(sys.argv[1]); print('ready', flush=True); time.sleep(60)"
WRITES = """
import sys, time
from system.files import replace_file
def write(temporary):
    open(temporary, "w").write("half")
    print("ready", flush=True)
    time.sleep(60)
replace_file(sys.argv[1], write)
"""


def test_a_second_writer_is_refused_by_name_and_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    first = other(HOLDS, tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} is being written by process {first.pid} on .* \(-c .*wait until it ends"):
        lock(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    lock(tmp_path)
    lock(tmp_path)                                  # again by the same process
    unlock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_waits_says_so_once_and_goes_on(tmp_path: Path) -> None:
    first, said = other(HOLDS, tmp_path), []
    threading.Timer(0.3, first.kill).start()
    began = time.time()
    lock(tmp_path, said.append)
    unlock(tmp_path)
    first.wait()
    assert len(said) == 1 and f"process {first.pid}" in said[0] and time.time() - began < 20


def test_what_a_killed_writer_left_is_removed_but_not_what_a_living_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, living = other(WRITES, tmp_path / "a"), other(WRITES, tmp_path / "b")
    dead.kill()
    dead.wait()
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(files, "swept", set())
    replace_file(tmp_path / "c", lambda temporary: Path(temporary).write_text("whole"))
    left = sorted(path.name for path in tmp_path.iterdir())
    living.kill()
    living.wait()
    assert len(left) == 2 and left[0].startswith(".b.") and left[1] == "c"


@pytest.mark.parametrize(("error", "host", "age", "goes"), [
    (None, files.HOST, 0, True), (None, "elsewhere", 0, False), (None, "elsewhere", 2 * files.DAY, True),
    (errno.ENOLCK, files.HOST, 2 * files.DAY, False), (errno.ENOSYS, files.HOST, 0, False)])
def test_what_may_be_a_living_writers_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error, host, age, goes) -> None:
    """Where a file system knows no locks, or the lock of another machine cannot be seen."""
    left = tmp_path / f".model.safetensors.{host}.abcdefgh.part"
    left.write_text("half")
    os.utime(left, (time.time() - age,) * 2)

    def refused(handle: int, how: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(files, "swept", set())
    if error:
        monkeypatch.setattr(files.fcntl, "flock", refused)
    replace_file(tmp_path / "a", lambda temporary: Path(temporary).write_text("whole"))
    assert (tmp_path / "a").read_text() == "whole" and left.exists() != goes and len(list(tmp_path.iterdir())) == 2 - goes


def test_a_link_is_followed_and_a_device_stays_a_device(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    replace_file(tmp_path / "link", lambda temporary: Path(temporary).write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "full", lambda temporary: Path(temporary).write_text("x"))
    assert Path("/dev/full").is_char_device()
    with pytest.raises(OSError, match="is a folder"):
        replace_file(tmp_path, lambda temporary: None)
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="no file, device or pipe"):
            replace_file(tmp_path / "socket", lambda temporary: None)


def test_a_pipe_is_written_into_when_somebody_reads_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="nobody reads from it"):
        replace_file(tmp_path / "pipe", lambda temporary: Path(temporary).write_text("x"))
    reader = other("import sys; print('ready', flush=True); print(open(sys.argv[1]).read(), flush=True)", tmp_path / "pipe")
    for _ in range(200):
        try:
            replace_file(tmp_path / "pipe", lambda temporary: Path(temporary).write_text("through"))
            break
        except OSError:
            time.sleep(0.05)                        # it has not opened the pipe yet
    assert reader.communicate(timeout=20)[0] == "through\n" and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("size", [0, 1, 7, 4096, 4097, 50_000])
def test_a_checksum_sees_every_bit_and_every_block_out_of_place(size: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    known = checksum(data)
    assert known == checksum(data.tobytes()) and len(known) == 8
    for at in range(0, size, max(1, size // 50)):
        for bit in range(8):
            data[at] ^= 1 << bit
            assert checksum(data) != known
            data[at] ^= 1 << bit
    if size > 8192:
        assert checksum(np.concatenate([data[4096:8192], data[:4096], data[8192:]])) != known


@pytest.mark.parametrize("size", [0, 5, 4096, (1 << 20) + 4097, 3 << 20])
def test_the_checksum_of_a_file_is_that_of_its_bytes(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 256, size, np.uint8).tobytes()
    (tmp_path / "x").write_bytes(data)
    assert file_sum(tmp_path / "x") == [size, checksum(data)]


def test_a_flipped_bit_a_missing_file_and_a_damaged_list_are_named(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    for name in ("a", "b", "state/c"):
        (tmp_path / name).write_bytes(name.encode() * 3000)
    write_sums(tmp_path, ["a", "b"])
    write_sums(tmp_path)
    check_sums(tmp_path)
    (tmp_path / "state/c").write_bytes(b"other")
    check_sums(tmp_path, below=False)
    with pytest.raises(ValueError, match=r"state/c is damaged .*use another checkpoint"):
        check_sums(tmp_path)
    (tmp_path / "b").unlink()
    with pytest.raises(FileNotFoundError, match="b does not exist"):
        check_sums(tmp_path)
    (tmp_path / "checksums.json").write_text('{"a": 3}')
    with pytest.raises(ValueError, match=r"checksums\.json is damaged"):
        check_sums(tmp_path)
