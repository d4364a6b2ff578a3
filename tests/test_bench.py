"""Measurements are honest: ratios are those of pairs, both sides compute the same, and what was not measured says so."""

import gc
import json

import pytest
import torch
from conftest import call

import bench
import peers
from checkpoint import load, save
from kernels import PAIRS, shapes
from lora import LoraConfig, inject
from sample import SampleConfig, generate


def test_ratios_are_of_pairs():
    row = bench.compare([1.0, 4.0, 3.0], [2.0, 4.0, 12.0], 6)
    assert row["ratio"]["median"] == 0.5 and row["ours"]["ms"]["median"] == 3000 and row["ours"]["per_second"] == 2.0
    assert bench.compare([1.0], [], 1)["ratio"] is None


def test_sides_alternate_and_warming_up_is_not_counted():
    order: list[str] = []
    ours, peer = bench.alternate(lambda: order.append("a"), lambda: order.append("b"), 3, warmup=1)
    assert "".join(order) == "abababab" and len(ours) == len(peer) == 3


def test_a_wrong_answer_is_not_measured():
    a = torch.tensor([1.0, 2.0])
    assert "equal" in bench.check(a, a * (1 + 1e-6), "losses")
    for other in (a + 0.01, a[:1], a * torch.nan):
        with pytest.raises(ValueError, match="losses differ"):
            bench.check(a, other, "losses")
    with pytest.raises(ValueError, match="tokens differ"):
        bench.check(torch.tensor([3, 4]), torch.tensor([3, 5]), "tokens")


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peers, "absent", lambda package: True)
    rc, out, _ = call("bench.py", "decode", "--model=qwen", "--width=32", "--pairs=1", "--peer")
    line, table = out.splitlines()
    row = json.loads(line)
    assert rc == 0 and row["ratio"] is None and row["checked"] == "not measured: pip install transformers peft" and row["checked"] in table
    assert row["ours"]["per_second"] > 0 and row["threads"] == 1 and "peer" not in row


def test_every_op_has_inputs():
    given = shapes.cases(torch.device("cpu"), torch.float32, 8, 64)
    assert given.keys() == PAIRS.keys()
    for name, (op, ref) in PAIRS.items():
        ours, truth = (shapes.op_side(f, given[name])() for f in (op, ref))
        assert len(ours) and torch.allclose(ours, truth, atol=1e-4), name
        assert shapes.moved(given[name], ours) > 4 * len(ours)


def test_a_familys_name_measures_both(monkeypatch):
    monkeypatch.setattr(peers, "absent", lambda package: True)
    rows = bench.bench_model(bench.Job(model="moshi", width=32, pairs=1))
    assert [row["what"] for row in rows] == ["train moshi", "decode moshi"] and [row["target"] for row in rows] == [0.7, 0.5]
    assert all(row["ratio"] is None and "pip install moshi" in row["checked"] for row in rows)


def test_memory_of_a_step_stands_beside_that_of_the_loss(monkeypatch):
    monkeypatch.setattr(bench, "run_peak", lambda which, vocab, streams=1, model="": 3.0 if which == "ours" else 12.0)
    rows = bench.bench_memory(bench.Job(model="moss"))
    assert [row["ratio"] and row["ratio"]["median"] for row in rows] == [0.25, 0.25, None] and "no peer" in rows[2]["checked"]


@pytest.mark.slow
def test_processes_average_and_are_measured():
    row, = bench.bench_scaling(bench.Job(model="higgs", width=32, pairs=1), (2,))
    model = peers.build("higgs", 32)
    inject(model, LoraConfig(rank=16, targets=bench.LORA["higgs"]))
    adapters = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert row["what"] == "2 processes higgs" and row["sent_MiB"] * 2**20 == adapters and row["ours"]["per_second"] > 0


@pytest.mark.parametrize("words", [["train", "--model=moshi"], ["train", "--model=higgs"], ["decode", "--model=moss"]])
def test_our_side_runs_alone(words):
    rc, out, _ = call("bench.py", *words, "--width=32", "--pairs=1", "--json")
    assert rc == 0 and json.loads(out)["checked"].startswith("not measured")


def test_a_command_that_does_not_exist_says_what_does():
    for words in ([], ["speed"], ["train", "decode"], ["train", "--model=gpt"], ["train", "--pairs=0"]):
        assert call("bench.py", *words)[0] == 2
    assert "--pairs" in call("bench.py", "--help")[1]


@pytest.mark.parametrize(("vocab", "streams", "limit"), [(32000, 1, 0.15), (1026, 8, 0.2)])
def test_the_loss_needs_a_fraction_of_the_memory_of_full_logits(vocab, streams, limit):
    ours, naive = (bench.run_peak(which, vocab, streams) for which in ("ours", "peer"))
    assert naive > 300 and ours <= limit * naive, (ours, naive)


def test_fused_weights_are_the_models_own(tmp_path):
    """Generation joins q, k, v in memory: training afterwards changes what the next generation uses, and nothing is held twice."""
    model = peers.build("qwen", 32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = model.cache(1, 8).fast[0].layers[0].qkv[0].mT
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and not any(p.is_inference() for p in model.parameters())
    with torch.no_grad():
        model.temporal.layers[0].attn.k.weight.fill_(7.0)
    again = model.cache(1, 8).fast[0].layers[0].qkv[0].mT
    assert again.data_ptr() == first.data_ptr() and float(again[32:48].min()) == 7.0
    read = load(save(model, tmp_path))                                       # views of one storage are saved and read as any others
    assert all(torch.equal(p, read.get_parameter(n)) for n, p in model.named_parameters() if n != "text_head.weight")
    inject(model, LoraConfig(rank=2, targets=("attn.q",)))
    assert model.cache(1, 8).fast is None      # adapters go block by block


@pytest.mark.parametrize("name", ["higgs", "moshi"])
def test_nothing_piles_up_over_500_frames(name):
    model = peers.build(name, 32).eval()
    prompt = torch.full((1, len(model.table), 1), -1)
    prompt[:, 0] = model.table.audio_start
    prompt = model.table.column("start")[None] if model.table.aligned else prompt
    counts, sizes = [], []
    for n, _ in enumerate(generate(model, prompt, SampleConfig(max_frames=560))):
        if n in (40, 540):
            counts.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
            sizes.append(bench.resident("VmRSS"))
    assert len(counts) == 2 and counts[1] <= counts[0] + 4, counts
    assert sizes[1] - sizes[0] < 2, f"{sizes[1] - sizes[0]:.1f} MiB more after 500 frames"
