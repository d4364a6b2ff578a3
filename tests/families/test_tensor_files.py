"""Files of tensors, one at a time: the bytes of safetensors, lazily, with less memory than the file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tables import CONFIGS, random_ids

import checkpoint
from checkpoint import STORED, Extras, export, load, save
from families import tensor_files
from families.tensor_files import NAMES, LazyTensor, all_finite, open_tensors, read_tensors, save_tensors, write_shards
from layers.architecture import ModelConfig, StackConfig
from layers.int8_base import quantizable
from lora import LoraConfig, adapters, inject
from model import MultistreamLM
from options import read_json
from streams import Stream, StreamTable
from system.files import file_sum, write_sums

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.float64, torch.uint8)


def some() -> dict[str, torch.Tensor]:
    made = {f"{n}.{kind}": random_ids(100, (n + 2, 3), n).to(kind) for n, kind in enumerate(TYPES)}
    return made | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.arange(12.0).view(3, 4).mT}


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "ours", some())
    save_file({n: t.contiguous() for n, t in some().items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = read_tensors(tmp_path / "theirs")
    assert found.keys() == some().keys() and all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in some().items())


def test_operations_wait_until_they_are_read(tmp_path: Path) -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4).bfloat16()
    save_file({"x": x, "y": y}, tmp_path / "f")
    a, b = open_tensors(tmp_path / "f").values()
    a, b = (a, b) if a.dtype == x.dtype else (b, a)
    pairs = [(torch.cat([a, b]), torch.cat([x, y])), (torch.stack([a, a]), torch.stack([x, x])), (a.chunk(2)[1], x.chunk(2)[1]),
             (a[None], x[None]), (list(a)[3], x[3]),
             (a.unflatten(0, (-1, 2)).transpose(1, 2).flatten(0, 1), x.view(3, 2, 4).mT.flatten(0, 1)),
             (torch.cat([a, a.new_zeros(1, 4)]), torch.cat([x, torch.zeros(1, 4)])), (b.float(), y.float())]
    for lazy, real in pairs:
        assert isinstance(lazy, LazyTensor) and lazy.shape == real.shape and lazy.dtype == real.dtype and torch.equal(lazy.read(), real)
    assert a.dim() == 2 and len(a) == 6 and torch.equal(a, a) and bool(a.any()) and a.tolist() == x.tolist()


def test_large_models_are_several_files_with_the_index_that_the_hub_knows(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((10, 10), float(n)) for n in range(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    write_shards(tmp_path, "model.safetensors", tensors, 900)
    index = read_json(tmp_path / "model.safetensors.index.json")
    names = [f"model-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 2000 and sorted(set(index["weight_map"].values())) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]       # what lay there before has gone
    assert all(torch.equal(load_file(tmp_path / file)[name], tensors[name]) for name, file in index["weight_map"].items())
    write_shards(tmp_path, "model.safetensors", tensors, 2000)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_export_in_shards_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD", 20_000)
    table = StreamTable((Stream("text", "text", 40, 40),), "qwen2", stop=(0,))
    model = MultistreamLM(ModelConfig(table, StackConfig(dim=24, layers=2, heads=3, kv_heads=1, ffn=40, qkv_bias=True))).bfloat16().eval()
    save(model, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "hf", to="hf")
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 1
    again = load(tmp_path / "hf", dtype=STORED)
    assert all(torch.equal(p, q) and q.dtype == torch.bfloat16 for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_what_is_written_has_the_type_that_was_stored(tmp_path: Path) -> None:
    """Merged in fp32, cast once: a base of bf16 stays one."""
    base = MultistreamLM(CONFIGS["duplex"]).bfloat16()
    save(base, tmp_path / "base")
    model = inject(load(tmp_path / "base", dtype=STORED), LoraConfig(rank=2, targets=("attn.q", "depth.*ffn.down")))
    for _, _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
    model.extras = Extras(base=str(tmp_path / "base"))
    save(model, tmp_path / "tuned")
    merged = read_tensors(export(tmp_path / "tuned", tmp_path / "merged") / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    for path, module, adapter in adapters(model):
        assert torch.equal(merged[f"{path}.weight"], adapter.merged(module.weight).bfloat16())


def test_a_mapped_weight_changes_no_file_and_what_is_trained_owns_its_memory(tmp_path: Path) -> None:
    table = StreamTable((Stream("text", "text", 4000, 4000),), "text", stop=(0,))
    save(MultistreamLM(ModelConfig(table, StackConfig(dim=128, layers=1, heads=2, ffn=256))), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load(tmp_path)
    model.embed["text"].weight.data.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before and load(tmp_path).embed["text"].weight.any()
    trained = load(tmp_path, prepare=lambda model: {"embed.text.weight": torch.float32})
    if Path("/proc/self/maps").is_file():                       # Linux says what stands where
        lines = [line.split()[0].split("-") for line in open("/proc/self/maps") if "model.safetensors" in line]
        held = {n for n, p in trained.named_parameters() if any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in lines)}
        assert held == {"text_head.weight"}                     # the others are small, or trained


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux says what stands where")
def test_official_weights_of_the_wanted_type_are_the_mapped_file(tmp_path: Path) -> None:
    table = StreamTable((Stream("text", "text", 6000, 6000),), "qwen2", stop=(0,))
    model = MultistreamLM(ModelConfig(table, StackConfig(dim=128, layers=1, heads=2, ffn=256, qkv_bias=True))).bfloat16()
    export(model, tmp_path, to="hf")
    loaded = load(tmp_path, dtype="bf16")
    lines = [line.split()[0].split("-") for line in open("/proc/self/maps") if str(tmp_path) in line]
    for p in (loaded.embed["text"].weight, loaded.text_head.weight):
        assert any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in lines)


# ---- one pass over a mapped file ----

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BROKEN = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_all_numbers_of_16_bits_those_are_found_that_are_not_finite(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).short()
    finite = every.view(dtype).isfinite()
    assert all_finite(every[finite].numpy().view(np.uint8), dtype)
    assert not any(all_finite(every[n : n + 1].numpy().view(np.uint8), dtype) for n in torch.where(~finite)[0])


@pytest.mark.parametrize("large", [1.0, 3.0])                  # below and above 2, where the bits are searched again
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_number_among_many_is_found(dtype: torch.dtype, large: float) -> None:
    values = (torch.rand(1000) * 2 - 1).mul(large).to(dtype)
    values[5], values[6] = (torch.finfo(dtype).max, torch.finfo(dtype).min) if large > 2 else (0.0, -0.0)
    held = values.view(torch.uint8).numpy()
    assert all_finite(held, dtype)
    for value in (*BROKEN, -float("nan")):
        for at in (0, 7, 500, 999):
            before, values[at] = values[at].clone(), value
            assert not all_finite(held, dtype)
            values[at] = before
    assert all_finite(held, dtype)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("extra", [0, 8, 8192, 65_536, 100_000])
def test_a_mapped_file_has_the_checksum_of_its_bytes(threads: int, extra: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "workers", lambda: threads)
    monkeypatch.setattr(tensor_files, "PIECE", 1 << 15)
    made = {"x": torch.randn(extra // 4), "y": torch.randn(3, 5).bfloat16(), "z": torch.ones(70_001, dtype=torch.int8)}
    save_tensors(tmp_path / "f", made)
    lazy = open_tensors(tmp_path / "f")
    file, = lazy["y"].files
    x, y = lazy["x"].read(), lazy["y"].read()
    assert not file.finite(y)                                  # nobody has looked
    assert file.file_sum() == file_sum(tmp_path / "f")
    assert file.finite(y) and file.finite(y[1:]) and file.finite(x) == bool(extra)
    assert not any(map(file.finite, (y.clone(), y.mT, y.float(), y.view(torch.float16), lazy["z"].read(), torch.randn(4))))


def test_what_does_not_stand_on_its_boundary_is_not_known(tmp_path: Path) -> None:
    write_odd(tmp_path / "f", {"x": torch.randn(64), "y": torch.ones(2).half()})
    lazy = open_tensors(tmp_path / "f")
    file, = lazy["x"].files
    assert file.file_sum() == file_sum(tmp_path / "f") and not file.spans and not file.finite(lazy["x"].read())


def write_odd(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A file of tensors that begin at odd bytes."""
    header, end = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end := end + t.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    content = (t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but tiny weights stay in their file, which has many pieces."""
    monkeypatch.setattr(checkpoint, "OWN", 1024)
    monkeypatch.setattr(tensor_files, "PIECE", 4096)


def stored_model(folder: Path, dtype: torch.dtype, name: str = "text") -> Path:
    """A checkpoint of one type, some of its numbers larger than 2."""
    config = CONFIGS[name]
    model = MultistreamLM(replace(config, temporal=replace(config.temporal, layers=1)))
    for p in model.parameters():
        p.data.view(-1)[::50] = 5.0
    save(model.to(dtype), folder)
    return folder / "model.safetensors"


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor lies in a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return {name: (start + about["data_offsets"][0], start + about["data_offsets"][1])
            for name, about in json.loads(content[8:start]).items() if name != "__metadata__"}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["text", "depth"])
def test_a_flipped_bit_in_any_tensor_of_a_mapped_file_is_seen(name: str, tmp_path: Path) -> None:
    path = stored_model(tmp_path, torch.bfloat16, name)
    content, places = path.read_bytes(), spans(path)
    assert load(tmp_path, dtype=STORED).temporal.norm.weight.dtype == torch.bfloat16
    for n, (start, stop) in enumerate(places.values()):
        changed = bytearray(content)
        changed[(start, stop - 1, (start + stop) // 2)[n % 3]] ^= 1 << n % 8
        path.write_bytes(changed)
        for dtype in (STORED, "fp32"):
            with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
                load(tmp_path, dtype=dtype)
    path.write_bytes(content)
    load(tmp_path)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weight_that_is_not_finite_is_seen_wherever_it_lies(dtype: torch.dtype, sums: bool, tmp_path: Path) -> None:
    """In every tensor of a file, the tied one too: mapped, copied, cast or put into 8 bits; with the right checksum or without any."""
    path = stored_model(tmp_path, dtype)
    content, places = path.read_bytes(), spans(path)
    load(tmp_path, dtype=STORED)
    (tmp_path / "checksums.json").unlink()
    for n, (name, (start, stop)) in enumerate(places.items()):
        changed = bytearray(content)
        at = (start, stop - dtype.itemsize, start + (stop - start) // dtype.itemsize // 2 * dtype.itemsize)[n % 3]
        changed[at : at + dtype.itemsize] = torch.tensor([BROKEN[n // 3 % 3]], dtype=dtype).view(torch.uint8).numpy().tobytes()
        path.write_bytes(changed)
        if sums:
            write_sums(tmp_path, [path.name])
        for kind in (STORED, ("fp32", "bf16")[n % 2]):
            with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
                load(tmp_path, dtype=kind)
        with pytest.raises(ValueError, match=f"{name.removesuffix('weight')}.* holds NaN or infinite"):
            load(tmp_path, prepare=lambda model: {f"{p}.weight": torch.int8 for p in quantizable(model.requires_grad_(False), ())})


@pytest.mark.usefixtures("small")
def test_a_weight_at_an_odd_place_that_is_not_finite_is_seen(tmp_path: Path) -> None:
    path = stored_model(tmp_path, torch.float32)
    tensors = read_tensors(path)

    def write() -> None:
        write_odd(path, tensors)
        write_sums(tmp_path, [path.name])

    write()
    assert torch.equal(load(tmp_path).temporal.norm.weight, tensors["temporal.norm.weight"])
    for name, t in tensors.items():
        before, t.view(-1)[1] = t.view(-1)[1].clone(), float("nan")
        write()
        t.view(-1)[1] = before
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
            load(tmp_path, dtype=STORED)


@pytest.mark.usefixtures("small")
def test_what_the_pass_over_a_file_has_seen_is_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the base of an adapter only once."""
    stored_model(tmp_path / "base", torch.float32)
    base = load(tmp_path / "base")
    model = inject(load(tmp_path / "base"), LoraConfig(rank=2, targets=("attn.q",)))
    for _, _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.lora_B)
    save(model, tmp_path / "tuned", Extras(base=str(tmp_path / "base")))
    large = {n for n, p in base.named_parameters() if p.nbytes >= 1024}
    every = {n for n, _ in base.named_parameters()}
    added = {n for n, _ in model.named_parameters()} - every
    looked: list[str] = []
    monkeypatch.setattr(checkpoint, "refuse_not_finite", lambda name, *_: looked.append(name))

    def names(folder: str, **options: object) -> list[str]:
        looked.clear()
        load(tmp_path / folder, **options)
        return sorted(looked)

    assert large and names("base") == sorted(every - large)
    assert names("base", dtype="bf16") == sorted(every)        # cast: not what the file holds
    assert names("tuned") == sorted((every - large) | added)
    (tmp_path / "base/checksums.json").unlink()
    assert names("base") == sorted(every) and names("tuned") == sorted(every | added)


LOAD = """
import sys, torch
from checkpoint import load
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
dtype = sys.argv[2]
before = peak()
model = load(sys.argv[1], dtype=dtype)
for p in model.parameters():
    p.sum()
print(peak() - before, sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux says how much memory a process had")
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
def test_loading_holds_the_weights_and_one_tensor(tmp_path: Path, dtype: str) -> None:
    """Of a file of bf16: as it is, widened, and narrowed in another way."""
    table = StreamTable((Stream("text", "text", 20_000, 20_000),), "text", stop=(0,))
    with torch.device("meta"):
        model = MultistreamLM(ModelConfig(table, StackConfig(dim=1024, layers=16, heads=8, ffn=4096)))
    made = {n: torch.ones(t.shape, dtype=torch.bfloat16) for n, t in model.weights().items()}
    checkpoint.write_checkpoint(tmp_path, "model", model.config, made, Extras())
    del made
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), dtype], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, weights, largest = map(int, done.stdout.split())
    assert weights > 500 << 20 and peak <= 1.1 * weights + largest + (300 << 20) * (dtype != "bf16"), (peak / weights, largest / weights)
