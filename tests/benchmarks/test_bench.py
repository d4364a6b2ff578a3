"""Measurements are honest: ratios are those of pairs, both sides compute the same, and what was not measured says so."""

import gc
import json
import re
from pathlib import Path

import codec_speed
import pytest
import torch
from conftest import ROOT, call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import bench
from audio.mimi import MimiCodec, MimiConfig
from benchmarks import measure, peers, workloads
from checkpoint import load, save
from generation.decode_step import SampleConfig
from kernels import PAIRS, shapes
from lora import LoraConfig, inject
from model import MultistreamLM
from sample import generate

# ---- measuring ----


def test_ratios_are_of_pairs():
    row = measure.compare([1.0, 4.0, 3.0], [2.0, 4.0, 12.0], 6)
    assert row["ratio"]["median"] == 0.5 and row["ours"]["ms"]["median"] == 3000 and row["ours"]["per_second"] == 2.0
    assert measure.compare([1.0], [], 1)["ratio"] is None


def test_sides_alternate_and_warming_up_is_not_counted():
    order: list[str] = []
    ours, peer = measure.alternate(lambda: order.append("a"), lambda: order.append("b"), 3, warmup=1)
    assert "".join(order) == "abababab" and len(ours) == len(peer) == 3


def test_a_wrong_answer_is_not_measured():
    a = torch.tensor([1.0, 2.0])
    assert "equal" in measure.check(a, a * (1 + 1e-6), "losses")
    for other in (a + 0.01, a[:1], a * torch.nan):
        with pytest.raises(ValueError, match="losses differ"):
            measure.check(a, other, "losses")
    with pytest.raises(ValueError, match="tokens differ"):
        measure.check(torch.tensor([3, 4]), torch.tensor([3, 5]), "tokens")
    assert "equal (1e-02)" in measure.check(a, a * 1.01, "losses", half=True)             # bf16 rounds, and greedy tokens part ways
    assert measure.check(torch.tensor([3, 4]), torch.tensor([3, 5]), "tokens", half=True).startswith("50% of tokens")
    with pytest.raises(ValueError, match="losses differ"):
        measure.check(a, a * 1.03, "losses", half=True)


def test_frames_are_timed_one_by_one_behind_those_that_warm_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure, "ON_GPU", False)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def side(columns, tick):
        for n in range(columns):
            clock[0] += 100.0 if n < 3 else n
            tick()

    assert measure.frame_times(side, 8, 4) == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="8 columns gave 8 frames, too few to time 8; lower --frames"):
        measure.frame_times(side, 8, 8)
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0], 1e3, (10, 99)) == {"median": 3000, "p10": 1400, "p99": 4960}


def test_operations_are_counted_by_their_parts_and_views_are_not():
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):            # which show composed operations differently
        with mode:
            assert measure.operations(lambda: (torch.nn.functional.linear(x, w, w[:, 0]) + 1).view(-1)[2:].t()) == {"ops": 2}
    out = torch.empty(2, 4)
    assert measure.operations(lambda: (torch.mm(x, w.mT, out=out), out.copy_(out.clone()))) == {"ops": 3}
    assert measure.per_frame(lambda n: [torch.ones(2) * 2 for _ in range(5 + 3 * n)], 4) == {"ops": 6.0}


def test_a_line_says_where_it_comes_from(monkeypatch):
    told = measure.origin(("torch", "a_package_that_nobody_has"))
    assert told["torch"] == told["versions"]["torch"] == torch.__version__ and told.keys() >= {"commit", "triton", "device", "threads"}
    assert list(told["versions"]) == ["torch"] and told["threads"] == torch.get_num_threads() and told["device"]
    monkeypatch.setattr(measure, "ON_GPU", False)
    monkeypatch.setattr(measure, "CPUS", Path("nowhere"))                                    # a system that tells it elsewhere
    assert " cores, " in measure.origin()["device"]


# ---- what is measured ----


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peers, "absent", lambda package: True)
    rc, out, _ = call("bench.py", "decode", "--model=qwen", "--width=32", "--pairs=1", "--frames=4", "--peer")
    line, table, *frame = out.splitlines()
    row = json.loads(line)
    assert rc == 0 and row["ratio"] is None and row["checked"] == "not measured: pip install transformers peft" and row["checked"] in table
    assert row["ours"]["per_second"] > 0 and row["threads"] == 1 and "peer" not in row and row["commit"] and row["options"]["width"] == 32
    assert json.loads(frame[0])["what"] == "frame qwen" and "positions 34 to 38" in frame[1]


@pytest.mark.parametrize(("model", "options"), [("higgs", {}), ("moshi", {"context": 9, "batch": 2}), ("tiny", {"context": 3}),
                                                ("moss", {"quantize": "int8"}), ("higgs", {"dtype": "bf16"})])
def test_frames_behind_a_prompt_of_any_length_in_batches_and_8_bits(model, options):
    job = workloads.Job(model=model, width=32, pairs=1, frames=5, **options)
    whole, row = bench.bench_decode(job)
    context = job.context or (1 if model in ("moshi", "tiny") else 32)
    assert whole["what"] == f"decode {model}" and row["what"] == f"frame {model}" and row["checked"].startswith("not measured")
    assert row["positions"][1] - row["positions"][0] == 5 and row["positions"][0] > context
    assert 0 < row["ours"]["ms"]["median"] <= row["p99_ms"] and row["prefill_ms"] > 0
    assert row["ours"]["per_second"] == pytest.approx(1e3 * (job.batch or 1) / row["ours"]["ms"]["median"], rel=1e-3)
    assert row["RTF"] == pytest.approx(row["ours"]["ms"]["median"] * {"higgs": 25, "tiny": 25}.get(model, 12.5) / 1e3, rel=1e-3)
    net = workloads.decode_models(job, Path("nowhere"))[0]
    assert (net.temporal.layers[0].attn.o.weight.dtype == torch.int8) == bool(job.quantize)


@pytest.mark.parametrize("model", ["qwen", "higgs", "moshi"])
def test_reading_a_prompt_counts_its_columns(model):
    row, = bench.bench_prefill(workloads.Job(model=model, width=32, layers=2, pairs=1, context=20, batch=3))
    assert row["what"] == f"prefill {model}" and row["target"] == (None if model == "moshi" else 0.9)
    assert row["ours"]["per_second"] == pytest.approx(60e3 / row["ours"]["ms"]["median"], rel=1e-3)
    assert len(workloads.decode_models(workloads.Job(model=model, width=32, layers=2), Path("nowhere"))[0].temporal.layers) == 2


def test_both_sides_of_single_frames_run_in_turns(monkeypatch):
    order: list[str] = []

    def side(name, seconds):
        return lambda columns, tick: [(order.append(name), clock.append(clock[-1] + seconds), tick()) for _ in range(columns)]

    clock = [0.0]
    monkeypatch.setattr(bench, "CLOCKS", {"cpu": lambda: clock[-1]})
    monkeypatch.setattr(bench, "decode_sides", lambda *_: (side("a", 1.0), side("b", 4.0)))
    monkeypatch.setattr(bench, "prefill_side", lambda *_: lambda: None)
    row = bench.frame_row(workloads.Job(model="qwen", clock="cpu", frames=4, pairs=2), peers.build("qwen", 32), None, "")
    assert row["ratio"] == {"median": 0.25, "p10": 0.25, "p90": 0.25} and row["peer"]["ms"]["median"] == 4000
    assert [name for n, name in enumerate(order) if not n or order[n - 1] != name] == ["a", "b", "a", "b"]


def test_a_codec_is_measured_in_both_directions(monkeypatch):
    tiny = MimiConfig(width=2, dim=8, layers=1, heads=2, ffn=8, codebook_size=16, codebook_dim=4)
    monkeypatch.setattr(codec_speed, "CODECS", {"moshi": (lambda: MimiCodec(tiny), "a_package_that_nobody_has")})
    rows = [*codec_speed.rows(workloads.Job(model="moshi", frames=3, batch=2, pairs=1, clock="cpu"))]
    assert [row["what"] for row in rows] == ["encode codec moshi", "decode codec moshi"]
    assert all(row["ratio"] is None and row["checked"].startswith("not measured") and row["target"] == 0.8 for row in rows)
    assert rows[0]["ours"]["per_second"] == pytest.approx(6e3 / rows[0]["ours"]["ms"]["median"], rel=1e-3)
    with pytest.raises(ValueError, match="codec measures those of moshi, not of qwen"):
        next(codec_speed.rows(workloads.Job(model="qwen")))
    with pytest.raises(ValueError, match="decode differ"):
        measure.check(torch.ones(3), torch.ones(3) * (1 + 3e-5), "decode", limit=1e-5)


@pytest.mark.parametrize(("name", "weights", "position"), [("moshi", 14.75, 0.524e-3), ("higgs", 5.69, 115e-6), ("moss", 14.0, 147e-6)])
def test_the_byte_floor_is_that_of_the_published_sizes(name, weights, position):
    """GB that a frame reads in bf16: 14.75 and 0.524 MB a position (Moshi), 5.69 and 115 KB (Higgs), 14.0 (MOSS)."""
    with torch.device("meta"):
        model = MultistreamLM(peers.architecture(name, 0)).to(torch.bfloat16)
    empty, full = (workloads.floor_bytes(model, 1, n) / 1e9 for n in (0, 1000))
    assert empty == pytest.approx(weights, rel=5e-3) and (full - empty) / 1000 == pytest.approx(position, rel=5e-3)
    assert workloads.floor_bytes(model, 16, 750) / 1e9 == pytest.approx(empty + 16 * 750 * position, rel=5e-3)


class Products(TorchDispatchMode):
    """Adds up products, also those in place, but not attention on a CPU. torch's own counter bears no gradient made in a forward."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        out, known = func(*args, **(kwargs or {})), flop_registry.get(getattr(torch.ops.aten, name, None))
        self.total += known(*args, **(kwargs or {}), out_val=out) if known else 0
        return out


def test_useful_operations_are_those_of_the_published_size_and_of_a_counter(tmp_path):
    """Moshi with r=128 on every Linear: 32.8 GFLOP a frame of 1,250. What is made again in the backward does not count."""
    with torch.device("meta"):
        model = MultistreamLM(peers.architecture("moshi", 0))
    inject(model, LoraConfig(rank=128, targets=workloads.LORA["moshi"]))
    tokens, weights = torch.zeros(1, 17, 1251, dtype=torch.long), torch.ones(1, 17, 1251)
    flops = workloads.useful_flops(workloads.Comparison(None, None, "", model, tokens, weights, [1250]))
    assert flops / 1250 == pytest.approx(32.8e9, rel=0.02)
    for name in ("higgs", "qwen", "moshi", "csm"):
        pairs = [workloads.train_workload(workloads.Job(model=name, width=64, columns=64, checkpoint=level), tmp_path) for level in (0, 4)]
        with Products() as counter:
            pairs[0].ours()
        assert workloads.useful_flops(pairs[0]) == workloads.useful_flops(pairs[1]) == pytest.approx(counter.total, rel=0.1), name


def test_what_a_frame_costs_the_host():
    """Operations that are no views: LMGen has 1,423 at this size, transformers 168 for a Llama of 4 layers."""
    counts = {name: bench.bench_ops(workloads.Job(model=name))[0]["ours"]["ops"]["median"] for name in ("moshi", "higgs", "qwen", "tiny")}
    assert counts["tiny"] > 40 and 100 < counts["moshi"] <= 330 and 40 < counts["higgs"] <= 80 and 40 < counts["qwen"] <= 80, counts


def test_a_step_is_compiled_on_request(tmp_path, monkeypatch):
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    model = workloads.train_workload(workloads.Job(model="higgs", width=32, columns=32, compile=True), tmp_path).model
    assert compiled == list(model.temporal.layers)


@pytest.mark.parametrize("name", ["higgs", "qwen"])
def test_a_packed_row_has_the_loss_of_the_padded_sequences(name, tmp_path):
    pair = workloads.train_workload(workloads.Job(model=name, width=32, columns=20, packed=True), tmp_path)
    assert sum(pair.lengths) == 80 == pair.tokens.shape[2] and len(pair.lengths) == 4 < len(set(pair.lengths)) + 1
    tokens, weights = peers.training_batch(pair.model, pair.lengths)
    assert all(bool((row[:, n:] == -1).all() and (row[:, n - 1] >= 0).any()) for row, n in zip(tokens, pair.lengths, strict=True))
    with torch.no_grad():
        sums, whole = pair.model(tokens, weights), pair.model(pair.tokens, pair.weights, *workloads.pack(tokens, weights, pair.lengths)[2:])
    assert torch.allclose(sums.nll, whole.nll, rtol=1e-5) and torch.equal(sums.weight, whole.weight) and float(whole.weight.sum()) > 0
    audio = len(pair.model.table.audio_out)
    means = sums.nll / sums.weight.clamp(min=1e-9)
    expected = means[0] + sums.nll[1:].sum() / sums.weight[1:].sum() * audio if audio else means[0]
    assert float(pair.ours()) == pytest.approx(float(expected), rel=1e-5)


def test_the_losses_of_others_are_those_of_full_logits():
    ours, full, weighed = (peers.loss_side(37, 1, who, 50, 8, weighted=w)() for who, w in (("ours", 0), ("full", 0), ("full", 1)))
    assert torch.allclose(ours, full, rtol=1e-5, atol=1e-6) and not torch.allclose(full, weighed, rtol=1e-2)
    if not peers.missing_loss("torch"):
        assert torch.allclose(peers.loss_side(37, 1, "torch", 50, 8, weighted=False)(), full, rtol=1e-5, atol=1e-6)
    half = peers.loss_side(37, 3, "ours", 50, 8, torch.bfloat16)()
    assert torch.allclose(half[0], peers.loss_side(37, 3, "full", 50, 8)()[0], rtol=1e-2)


def test_a_fused_loss_that_cannot_run_here_says_why(monkeypatch):
    monkeypatch.setattr(bench, "run_peak", lambda job, who, *shape: 1.0)
    monkeypatch.setattr(bench, "loss_shape", lambda job: {"rows": 8, "width": 8})
    rows = bench.bench_loss(workloads.Job(pairs=1))
    assert [row["what"] for row in rows[-2:]] == ["loss time torch", "loss time liger"]
    assert all(row["checked"].startswith("not measured") for row in rows[-2:])
    assert "not measured" in measure.show(rows[-1])
    if not peers.missing_loss("torch"):
        assert bench.bench_loss(workloads.Job(pairs=1, peer=True))[-2]["ratio"]["median"] > 0
    monkeypatch.setattr(peers, "absent", lambda package: True)
    for device, why in ((True, "pip install liger-kernel"), (False, "Liger's kernels need a CUDA device")):
        monkeypatch.setattr(peers, "ON_GPU", device)
        assert peers.missing_loss("liger") == f"not measured: {why}"


def test_every_op_has_inputs():
    given = shapes.cases(torch.device("cpu"), torch.float32, 8, 64)
    assert given.keys() == PAIRS.keys()
    for name, (op, ref) in PAIRS.items():
        ours, truth = (shapes.op_side(f, given[name])() for f in (op, ref))
        assert len(ours) and torch.allclose(ours, truth, atol=1e-4), name
        assert shapes.moved(given[name], ours) > 4 * len(ours)


def test_a_familys_name_measures_both(monkeypatch):
    monkeypatch.setattr(peers, "absent", lambda package: True)
    rows = bench.bench_model(workloads.Job(model="moshi", width=32, pairs=1, frames=3))
    assert [row["what"] for row in rows] == ["train moshi", "decode moshi", "frame moshi", "ops moshi"]
    assert [row.get("target") for row in rows] == [0.7, 0.5, None, None] and rows[-1]["limit"] == 600
    assert all(row["ratio"] is None and "pip install moshi" in row["checked"] for row in rows)


def test_memory_of_a_step_stands_beside_that_of_the_loss(monkeypatch):
    monkeypatch.setattr(bench, "run_peak", lambda job, who, *shape: 3.0 if who == "ours" else 12.0)
    rows = bench.bench_memory(workloads.Job(model="moss"))
    assert [row["ratio"] and row["ratio"]["median"] for row in rows] == [0.25, 0.25, None] and "no peer" in rows[2]["checked"]


@pytest.mark.slow
def test_processes_average_and_are_measured():
    row, = bench.bench_scaling(workloads.Job(model="higgs", width=32, pairs=1), (2,))
    model = peers.build("higgs", 32)
    inject(model, LoraConfig(rank=16, targets=workloads.LORA["higgs"]))
    adapters = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert row["what"] == "2 processes higgs" and row["sent_MiB"] * 2**20 == adapters and row["ours"]["per_second"] > 0


@pytest.mark.parametrize("words", [["train", "--model=moshi"], ["train", "--model=csm"], ["ops", "--model=moss"],
                                   ["train", "--model=higgs", "--dtype=bf16", "--checkpoint=3", "--batch=1", "--columns=40", "--rank=4"],
                                   ["decode", "--model=moss", "--frames=3"]])
def test_our_side_runs_alone(words):
    rc, out, _ = call("bench.py", *words, "--width=32", "--pairs=1", "--json")
    assert rc == 0 and all(json.loads(line)["checked"].startswith("not measured") for line in out.splitlines())


def test_a_command_that_does_not_exist_says_what_does():
    for words in (["speed"], ["train", "decode"], ["train", "--model=gpt"], ["train", "--pairs=0"], ["decode", "--quantize=int4"],
                  ["train", "--model=moshi", "--packed"], ["train", "--model=higgs", "--codec"]):
        assert call("bench.py", *words)[0] == 2
    assert "--pairs" in call("bench.py", "--help")[1]


def test_every_command_of_the_benchmarks_exists():
    text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    kinds = "|".join(bench.WHAT)
    found = re.findall(rf"^\| ([TG]\d+) \| `((?:{kinds})\b[^`]*)`", text, re.M)
    assert [*dict.fromkeys(name for name, _ in found)] == [*(f"T{n}" for n in range(1, 8)), *(f"G{n}" for n in range(1, 11))]
    for command in [command for _, command in found] + re.findall(rf"python bench.py ((?:{kinds})\b[^`]*)`", text):
        words, _ = bench.parse(command.removesuffix("--model=").split())
        assert len(words) == 1 and words[0] in bench.WHAT


@pytest.mark.parametrize(("vocab", "streams", "limit"), [(32000, 1, 0.15), (1026, 8, 0.2)])
def test_the_loss_needs_a_fraction_of_the_memory_of_full_logits(vocab, streams, limit):
    ours, naive = (bench.run_peak(workloads.Job(), who, vocab, streams) for who in ("ours", "full"))
    assert naive > 300 and ours <= limit * naive, (ours, naive)


def test_fused_weights_are_the_models_own(tmp_path):
    """Generation joins q, k, v in memory: training afterwards changes what the next generation uses, and nothing is held twice."""
    model = peers.build("qwen", 32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = model.cache(1, 8).fast[0].layers[0].qkv[0].weight
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and not any(p.is_inference() for p in model.parameters())
    with torch.no_grad():
        model.temporal.layers[0].attn.k.weight.fill_(7.0)
    again = model.cache(1, 8).fast[0].layers[0].qkv[0].weight
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
            sizes.append(measure.resident("VmRSS"))
    assert len(counts) == 2 and counts[1] <= counts[0] + 4, counts
    assert sizes[1] - sizes[0] < 2, f"{sizes[1] - sizes[0]:.1f} MiB more after 500 frames"
