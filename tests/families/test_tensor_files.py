"""Files of tensors, one at a time: the bytes of safetensors, lazily, with less memory than the file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tables import CONFIGS, random_ids

import checkpoint
from checkpoint import STORED, Extras, export, load, save
from families.tensor_files import LazyTensor, open_tensors, read_tensors, save_tensors, write_shards
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig, adapters, inject
from model import MultistreamLM
from options import read_json
from streams import Stream, StreamTable

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
