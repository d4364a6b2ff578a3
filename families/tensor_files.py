"""Files of tensors (safetensors), read and written one tensor at a time: nothing is held twice.

    tensors = open_tensors("model.safetensors")        name -> LazyTensor: its shape and type are known, its values not yet read
    both = torch.cat([tensors["a"], tensors["b"]])     operations are remembered
    both.read()                                        and done here

A file is mapped: a tensor that is read as it stands is the file itself, page by page, until something is written into it
(the mapping is private: the file never changes). `save_tensors` writes the same bytes as safetensors.torch.save_file.
Of tensors that are cut among ranks (DTensor) every rank writes what it holds into a file of its own, model.rank00001.safetensors,
and whoever opens model.safetensors gets them joined, on any number of ranks.
"""

import json
import math
import mmap
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from options import FULL, replace_file, write_json
from system.files import block_sums
from system.progress import workers
from training.parallel import first_row, is_cut

# In the order in which safetensors sorts a file, last one first.
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
          "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32,
          "F32": torch.float32, "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}
BITS = {torch.float16: (np.int16, 0x7C00), torch.bfloat16: (np.int16, 0x7F80), torch.float32: (np.int32, 0x7F800000),
        torch.float64: (np.int64, 0x7FF << 52)}            # the bits of a number, and of infinity: those of NaN are larger
OWN = 1 << 20                      # smaller tensors are copied: a page each is no saving
VALUES = {torch.equal, Tensor.tolist, Tensor.item, Tensor.numpy}         # what needs the values at once
PIECE = 1 << 20                    # bytes of a file that stay in the cache of a core; whole blocks of a checksum
KEPT = 192 << 20                   # how much of a file may be in memory before its pages are given back


class LazyTensor:
    """A tensor whose values are read when asked for. `like` has its shape and type, on the meta device."""

    def __init__(self, like: Tensor, make: Callable[[], Tensor], files: frozenset["MappedFile"] = frozenset()) -> None:
        self.like, self.make, self.files = like, make, files

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def read(self) -> Tensor:
        return self.make()

    def __getattr__(self, name: str) -> Any:                # a method of Tensor, done when read
        method = getattr(Tensor, name)
        return lambda *args, **options: self.__torch_function__(method, (), (self, *args), options)

    def __getitem__(self, key: Any) -> Any:
        return self.__torch_function__(Tensor.__getitem__, (), (self, key))

    def __iter__(self) -> Iterator["LazyTensor"]:
        return iter(self.unbind())

    def __len__(self) -> int:
        return len(self.like)

    def __bool__(self) -> bool:
        return bool(self.read())

    def __float__(self) -> float:
        return float(self.read())

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), options: dict | None = None) -> Any:
        options = options or {}
        if function in VALUES:
            return function(*each(args, value), **options)
        like = function(*each(args, lambda t: t.like if isinstance(t, LazyTensor) else t.to("meta")), **options)
        lazies: list[LazyTensor] = []
        each(args, lambda t: lazies.append(t) if isinstance(t, LazyTensor) else None)
        files = frozenset().union(*(t.files for t in lazies))

        def make() -> Any:
            return function(*each(args, value), **options)

        if isinstance(like, Tensor):
            return cls(like, make, files)
        if isinstance(like, (tuple, list)):
            return tuple(cls(part, lambda n=n: make()[n], files) for n, part in enumerate(like))
        return like


def each(args: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments of an operation with every tensor in them changed."""
    if isinstance(args, (LazyTensor, Tensor)):
        return change(args)
    return type(args)(each(a, change) for a in args) if type(args) in (tuple, list) else args


def value(tensor: Tensor | LazyTensor) -> Tensor:
    """The values of a tensor, read now where they were not."""
    return tensor.read() if isinstance(tensor, LazyTensor) else tensor


def computed(like: Tensor, make: Callable[[], Tensor]) -> LazyTensor:
    """A tensor of the shape and type of `like` that is made when it is read."""
    return LazyTensor(torch.empty_like(like, device="meta"), make)


# ---- reading ----

class MappedFile:
    """A file whose bytes are read where they stand."""

    def __init__(self, path: Path) -> None:
        flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_NORESERVE", 0)       # larger than the memory: can be mapped as well
        how = {"flags": flags, "prot": mmap.PROT_READ | mmap.PROT_WRITE} if flags else {"access": mmap.ACCESS_COPY}       # Windows
        with open(path, "rb") as file:
            self.path, self.bytes, self.used = path, mmap.mmap(file.fileno(), 0, **how), 0
        self.address, self.spans = 0, list[SimpleNamespace]()      # of numbers of one type; an address as soon as `file_sum` has looked

    def tensor(self, dtype: torch.dtype, shape: list[int], start: int) -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        self.used += count * dtype.itemsize
        return torch.frombuffer(self.bytes, dtype=dtype, count=count, offset=start).view(shape)

    def file_sum(self) -> list[Any]:
        """Size and checksum of the file, by one pass on all free cores that also looks for NaN: `finite` knows what it found."""
        whole, count = np.frombuffer(self.bytes, np.uint8), workers()

        def look(at: int) -> bytes:                        # a piece comes into the cache as its numbers are searched
            for span in self.spans:
                values = whole[max(at, span.start) : min(at + PIECE, span.stop)]
                if len(values) and not all_finite(values, span.dtype):
                    span.finite = False                    # never set back: other threads look at other pieces
            self.used += PIECE
            self.give_back()
            return block_sums(whole[at : at + PIECE])

        with ThreadPoolExecutor(count) as pool:
            shares = pool.map(lambda n: [look(at) for at in range(n * PIECE, len(whole), count * PIECE)], range(count))
            sums = b"".join(chain.from_iterable(zip_longest(*shares, fillvalue=b"")))
        self.address = whole.ctypes.data
        return [len(whole), f"{zlib.crc32(sums):08x}"]

    def finite(self, t: Tensor) -> bool:
        """Whether a tensor lies in this file, and `file_sum` found nothing but finite values around it."""
        start = t.data_ptr() - self.address
        return self.address > 0 and t.device.type == "cpu" and t.is_contiguous() and any(
            s.finite and s.dtype == t.dtype and s.start <= start and start + t.nbytes <= s.stop for s in self.spans)

    def give_back(self, kept: int = KEPT) -> None:
        """Let go of the pages that were read; who reads them again gets them again. Not after something was written into them."""
        if self.used > kept and hasattr(self.bytes, "madvise"):
            self.bytes.madvise(mmap.MADV_DONTNEED)
            self.used = 0


def open_tensors(path: str | Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, or of what ranks wrote of it; ValueError names it when it is broken."""
    path = Path(path)
    parts = parts_of(path)
    if not parts:
        raise FileNotFoundError(f"{path} does not exist; the checkpoint is incomplete, use another one")
    return open_file(path)[0] if parts == [path] else joined(path, [open_file(part) for part in parts])


def parts_of(path: Path) -> list[Path]:
    """The file, or what ranks wrote of it, one each; nothing when there is neither."""
    return [path] if path.is_file() else sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))


def open_file(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    try:
        with safe_open(str(path), "pt") as file:           # checks the file
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); use another checkpoint, or fetch the file again") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    if unknown := {about["dtype"] for about in header.values()} - DTYPES.keys():
        raise ValueError(f"{path} holds tensors of type {', '.join(sorted(unknown))}, this code reads {', '.join(DTYPES)}")
    mapped = MappedFile(path)
    return {name: stored(mapped, DTYPES[about["dtype"]], about["shape"], 8 + length + about["data_offsets"][0])
            for name, about in header.items()}, metadata


def stored(mapped: MappedFile, dtype: torch.dtype, shape: list[int], start: int) -> LazyTensor:
    like = torch.empty(shape, dtype=dtype, device="meta")
    if mapped.spans and (mapped.spans[-1].stop, mapped.spans[-1].dtype) == (start, dtype):
        mapped.spans[-1].stop += like.nbytes
    elif dtype in BITS and start % dtype.itemsize == 0:    # else it cannot be read in place
        mapped.spans.append(SimpleNamespace(start=start, stop=start + like.nbytes, dtype=dtype, finite=True))
    return LazyTensor(like, lambda: mapped.tensor(dtype, shape, start), frozenset([mapped]))


def joined(path: Path, files: list[tuple[dict[str, LazyTensor], dict[str, str]]]) -> dict[str, LazyTensor]:
    """Whole tensors of the rows that each rank wrote; ValueError when some are missing."""
    pieces: dict[str, list[tuple[int, int, LazyTensor]]] = {}
    for tensors, metadata in files:
        rows = json.loads(metadata.get("rows", "{}"))
        for name, tensor in tensors.items():
            start, total = rows.get(name, (0, len(tensor) if tensor.dim() else 0))
            pieces.setdefault(name, []).append((start, total, tensor))
    result = {}
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece[0])
        if sum(len(t) for _, _, t in found if t.dim()) != found[0][1]:
            raise ValueError(f"{path}: the files of its ranks lack rows of {name}; the checkpoint is incomplete, use another one")
        result[name] = found[0][2] if len(found) == 1 else torch.cat([tensor for _, _, tensor in found])
    return result


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file in memory of their own; ValueError names it when it is broken."""
    return {name: tensor.read().clone() for name, tensor in open_tensors(path).items()}


def all_finite(values: np.ndarray, dtype: torch.dtype) -> bool:
    """Whether bytes hold neither NaN nor infinity. One pass where no exponent has its first bit (between -2 and 2), else three."""
    (kind, infinity), bits, sign = BITS[dtype], values.view(f"u{dtype.itemsize}"), 1 << 8 * dtype.itemsize - 1
    return not np.bitwise_or.reduce(bits) & sign >> 1 or bool(
        np.maximum.reduce(bits.view(kind)) < infinity and np.maximum.reduce(bits) < infinity + sign)


@torch.no_grad()
def refuse_not_finite(name: str, t: Tensor, source: object) -> None:
    """ValueError names a tensor that holds NaN or infinite values: such a model only speaks noise."""
    if not t.is_floating_point() or not t.numel() or t.is_meta or t.dtype.itemsize > 1 and math.isfinite(t.sum()):
        return                                             # one sum, the fastest pass over memory: a sum with NaN or infinity stays so
    if not all(map(math.isfinite, torch.stack(t.aminmax()).tolist())):                   # finite values may overflow a sum
        raise ValueError(f"{source}: {name} holds NaN or infinite values; use an earlier checkpoint, or fetch the file again")


# ---- writing ----

def write_tensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor], write: bool = True) -> None:
    """Write a safetensors file whole; a tensor with two names is stored once by the caller's choice of names.

    Of tensors that are cut among ranks every rank calls it and writes its part; else one with `write`.
    """
    if not any(is_cut(t) for t in tensors.values()):
        if write:
            save_tensors(path, tensors)
        return
    rows, own = {}, {}
    for name, t in tensors.items():
        if is_cut(t):
            if any(t.device_mesh.get_local_rank(n) for n, place in enumerate(t.placements) if place.is_replicate()):
                continue                                   # a rank before this one holds the same part
            own[name], rows[name] = t.detach().to_local(), [first_row(t), len(t)]
        elif write:
            own[name] = t
    if own:
        rank = torch.distributed.get_rank()
        save_tensors(path.with_name(f"{path.stem}.rank{rank:05d}{path.suffix}"), own, {"rows": json.dumps(rows, sort_keys=True)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole, a tensor at a time."""
    names = sorted(tensors, key=lambda name: (-ORDER[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        t = tensors[name]
        start, end = end, end + math.prod(t.shape) * t.dtype.itemsize
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                t = value(tensors[name])
                assert t.dtype == tensors[name].dtype and t.shape == tensors[name].shape, name
                refuse_not_finite(name, t, "nothing is written")
                file.write(memoryview(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
                give_back([tensors[name]])

    try:
        replace_file(path, write)
    except OSError as error:                               # a full disk, for one
        if error.filename is None:
            raise OSError(f"{path} cannot be written ({error}); {FULL}") from None
        raise


def give_back(tensors: Iterable[Tensor | LazyTensor], kept: int = KEPT) -> None:
    """Let go of the pages of files that were read for these tensors, where more than `kept` bytes of a file were."""
    for t in tensors:
        for file in t.files if isinstance(t, LazyTensor) else ():
            file.give_back(kept)


def write_shards(folder: Path, name: str, tensors: Mapping[str, Tensor | LazyTensor], most: int) -> None:
    """Write tensors as one file, or as files of at most `most` bytes and the index that the hub's libraries read."""
    sizes = {n: math.prod(t.shape) * t.dtype.itemsize for n, t in tensors.items()}
    groups: list[list[str]] = [[]]
    room = most
    for n, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = most
        groups[-1].append(n)
        room -= size
    stem, suffix, listed = Path(name).stem, Path(name).suffix, f"{name}.index.json"
    files = [name] if len(groups) == 1 else [f"{stem}-{k:05d}-of-{len(groups):05d}{suffix}" for k in range(1, len(groups) + 1)]
    for file, group in zip(files, groups, strict=True):
        write_tensors(folder / file, {n: tensors[n] for n in group})
    if len(files) > 1:
        index = {n: file for file, group in zip(files, groups, strict=True) for n in group}
        write_json(folder / listed, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index})
        files.append(listed)
    ours = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?{re.escape(suffix)}(\.index\.json)?")
    for old in [path for path in folder.iterdir() if ours.fullmatch(path.name) and path.name not in files]:
        old.unlink()                                       # of an earlier export, in another number of files
