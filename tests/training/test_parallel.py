"""Shards in a group of one: cut, gathered, written and filled again; what two ranks hold. What they train is in test_train.py."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from big import make as write_official
from conftest import ROOT
from tables import CONFIGS, grid, random_ids
from torch.distributed.tensor import DTensor

from checkpoint import save, write_tensors
from families.qwen import qwen
from families.tensor_files import read_tensors
from generation.decode_step import SampleConfig
from model import Block, Linear, MultistreamLM
from sample import reply
from training import parallel
from training.run_state import fill_optimizer, optimizer_tensors

CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    parallel.end()


def make(seed: int = 0, frozen: bool = False) -> MultistreamLM:
    """`frozen`: only the blocks of both transformers train."""
    torch.manual_seed(seed)
    model = MultistreamLM(CONFIGS["duplex"])
    blocks = {p for m in model.modules() if isinstance(m, Block) for p in m.parameters()}
    for p in model.parameters():
        p.requires_grad_(not frozen or p in blocks)
    return model


def sharded(model: MultistreamLM) -> MultistreamLM:
    parallel.shard(model, Block, Linear, CPU, torch.float32)
    return model


def step(model: MultistreamLM, optimizer: torch.optim.Optimizer, seed: int) -> float:
    loss = model(*grid(model.config, seed)).nll.sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_alone_nothing_is_cut_and_nothing_is_wrapped(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    parallel.start("cpu", 0)
    model = sharded(make())
    assert parallel.ranks() == (0, 1, 0) and parallel.wrap(model, CPU) is model and not dist.is_initialized()
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    x = torch.arange(3.0)
    assert parallel.whole(x) is x is parallel.part(x) and torch.equal(parallel.all_sum(x, CPU), x) and parallel.place(x, x) is x


def optimizer_of(model: MultistreamLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_shards_train_as_the_whole_does_and_a_checkpoint_is_the_same(group, tmp_path: Path, frozen: bool):
    plain, cut = make(0, frozen), sharded(make(0, frozen))
    assert all(isinstance(p, DTensor) == p.requires_grad for p in cut.parameters()) and parallel.wrap(cut, CPU) is cut
    one, other = optimizer_of(plain), optimizer_of(cut)
    for seed in range(3):
        assert step(plain, one, seed) == pytest.approx(step(cut, other, seed), abs=1e-6)
    for name, model, optimizer in (("plain", plain, one), ("cut", cut, other)):
        save(model, tmp_path / name)
        write_tensors(tmp_path / name / "optimizer.safetensors", optimizer_tensors(model, optimizer))
        save(model, tmp_path / f"none_{name}", write=False)
    assert not (tmp_path / "none_plain").exists()
    assert [p.name for p in (tmp_path / "none_cut").iterdir()] == ["model.rank00000.safetensors"]       # a part of one rank, not the whole
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (read_tensors(tmp_path / name / file) for name in ("plain", "cut"))
        assert a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)
    assert (tmp_path / "plain/config.json").read_text() == (tmp_path / "cut/config.json").read_text()

    again = sharded(make(7, frozen))
    optimizer = optimizer_of(again)
    tensors = read_tensors(tmp_path / "cut/model.safetensors")
    with torch.no_grad():
        for name, target in again.weights().items():
            target.copy_(parallel.place(tensors[name], target))
    fill_optimizer(again, optimizer, read_tensors(tmp_path / "cut/optimizer.safetensors"), "here")
    assert step(again, optimizer, 3) == step(cut, other, 3)
    assert all(torch.equal(parallel.whole(a), parallel.whole(b)) for a, b in zip(again.parameters(), cut.parameters(), strict=True))


@torch.no_grad()
def test_gathered_weights_serve_parts_of_the_model_on_their_own(group):
    """What sampling does: it calls the transformers of the model without its own forward."""
    plain, cut = make().eval(), sharded(make()).eval()
    tokens = grid(plain.config)[0]
    with parallel.gathered(cut):
        for _ in range(2):                                           # the second pass finds the weights still there
            a, b = (m.hidden(tokens)[1] for m in (plain, cut))
            assert torch.equal(a, b) and not isinstance(cut.text_head.weight, DTensor)
        said = [reply(m, random_ids(16, (1, 2, 5), 1), SampleConfig(temperature=0)) for m in (plain, cut)]
    assert torch.equal(*said)
    assert all(isinstance(p, DTensor) for p in cut.parameters())
    assert torch.equal(plain(tokens)[0], cut(tokens)[0])


RANK = """
import json, sys
from pathlib import Path
import torch
from big import peak, train_step
from checkpoint import load
from families.qwen import qwen
from lora import LoraConfig, inject
from model import Block, Linear
from training import parallel
from training.plan import held_types

parallel.start("cpu", 0)
adapters = LoraConfig(rank=8, targets=("attn.*",))

def prepare(model):
    types = held_types(model, adapters, (), "")
    parallel.shard(inject(model, adapters), Block, Linear, torch.device("cpu"), torch.bfloat16)
    return types

for name, sizes in (("small", (1, 64, 64, 1, 1)), ("base", (4, 2048, 4096, 8, 2))):     # with the first the libraries wake up
    before = peak()
    model = inject(load(Path(sys.argv[1]) / name, dtype="bf16", config=qwen(*sizes, generation=2, vocab=8000), prepare=prepare), adapters)
    loaded, had = peak() - before, [0] * 2
    train_step(model, 8)
    torch.distributed.all_gather_object(had, (loaded, peak() - before))
linear = max(2 * m.weight.numel() for b in model.modules() if isinstance(b, Block) for m in b.modules() if isinstance(m, Linear))
frozen, trained = (sum(p.nbytes for p in model.parameters() if p.requires_grad == own) for own in (False, True))
if parallel.ranks()[0] == 0:
    print(json.dumps([*zip(*had), frozen // 2 + max(p.numel() * 2 for p in model.parameters()) + trained, linear]))
parallel.end()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="Linux says how much memory a process had")
def test_no_rank_ever_holds_more_than_its_part_of_the_base(tmp_path: Path):
    """And in a step two Linears more, what one gathers and what it is gathered from, and what the library of products lays out anew."""
    for name, sizes in (("small", (1, 64, 64, 1, 1)), ("base", (4, 2048, 4096, 8, 2))):
        write_official(qwen(*sizes, generation=2, vocab=8000), tmp_path / name)
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "rank.py", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, stepped, most, linear = json.loads(done.stdout.splitlines()[-1])
    whole = (tmp_path / "base/model.safetensors").stat().st_size
    assert most < 0.65 * whole and max(loaded) < most + (8 << 20), (loaded, most, whole)
    assert linear > 12 << 20 and max(stepped) < most + 2 * linear + (48 << 20), (stepped, most, linear)
