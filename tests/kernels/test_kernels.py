"""Every op: value and every gradient of its Triton kernels against the reference in fp64, at sizes that divide no block.

    err(kernel, truth) <= 2 err(reference in the same type, truth) + a rounding of that type

On a machine without CUDA Triton's interpreter runs the kernels; the same cases marked `gpu` run them on the device.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from tables import CONFIGS, grid
from torch import Tensor

from kernels import PAIRS, choice
from kernels.cross_entropy import multistream_ce, multistream_ce_ref, row_nll, row_nll_ref
from kernels.embed_sum import embed_sum
from kernels.int8 import dequantize_rows, int8_linear, quantize_rows
from kernels.sample import counted_noise, sample, sample_ref
from kernels.swiglu import swiglu
from lora import LoraConfig, inject
from model import MultistreamLM

cuda = torch.cuda.is_available()
INTERPRETED = pytest.param("cpu", id="interpreted", marks=pytest.mark.skipif(cuda, reason="the interpreter serves machines without CUDA"))
ON_GPU = pytest.param("cuda", id="cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not cuda, reason="no CUDA device")])
DEVICES = pytest.mark.parametrize("device", [INTERPRETED, ON_GPU])
ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7}       # the interpreter truncates to bf16


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops run their Triton kernels, whatever the device."""
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "MODE", "triton")


class Made:
    """Seeded inputs of one type on one device; `grad` are leaves."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.g, self.dtype, self.device = torch.Generator().manual_seed(seed), dtype, device

    def grad(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.g)).to(self.device, self.dtype).requires_grad_()

    def plain(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.g).to(self.device)

    def ids(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.g).to(self.device)


# ---- the cases: arguments and keywords of an op ----

Case = tuple[tuple, dict]


def norm_case(m: Made, N: int, D: int, residual: bool = False, two: bool = False) -> Case:
    extra = {"residual": m.grad(N, D)} if residual else {}
    return (m.grad(N, D), m.grad(D), 1e-5), extra | ({"other": m.grad(D), "where": m.ids(0, 2, N).bool()} if two else {})


def rope_case(m: Made, B: int, H: int, S: int, d: int, interleaved: bool, shared: bool = False) -> Case:
    angles = 7 * m.plain(1 if shared else B, 1, S, d // 2)
    return (m.grad(B, S, H, d).transpose(1, 2), (angles.cos(), angles.sin()), interleaved), {}


def gate_case(m: Made, rows: tuple[int, ...], D: int, activation: str, packed: bool = False) -> Case:
    return ((m.grad(*rows, 2 * D),) if packed else (m.grad(*rows, D), m.grad(*rows, D))), {"activation": activation}


def embed_case(m: Made, B: int, S: int, D: int, sizes: tuple[int, ...], low: int = -1) -> Case:
    ids = torch.stack([m.ids(low, n, B, S) for n in sizes], 1)
    return (ids, m.grad(sum(sizes), D), [sum(sizes[:k]) for k in range(len(sizes))]), {}


def nothing_case(m: Made, **sizes: object) -> Case:
    (ids, *rest), extra = embed_case(m, **sizes)
    return (torch.full_like(ids, -1), *rest), extra


def depth_case(m: Made, T: int, N: int, H: int, G: int, d: int) -> Case:
    packed = m.grad(T, N, (H + 2 * G) * d)                          # the three are strided views of one product
    return tuple(x.unflatten(-1, (-1, d)) for x in packed.split([H * d, G * d, G * d], -1)), {}


def decode_case(m: Made, B: int, H: int, G: int, C: int, d: int, counts: tuple[int, ...], window: int = 0,
                first: tuple[int, ...] = ()) -> Case:
    store = m.grad(B, 2 * G, C, d).detach()
    q, count = m.grad(B, H, d).detach(), torch.tensor(counts, device=m.device)
    return (q, *store.split(G, 1), count), {"window": window, "first": torch.tensor(first, device=m.device) if first else None}


def int8_case(m: Made, N: int, inputs: int, outputs: int, steps: int = 0) -> Case:
    q, scale = quantize_rows(m.plain(*([steps] if steps else []), outputs, inputs) - 0.5)
    return (m.grad(*([steps] if steps else []), N, inputs), q, scale), {}


def lora_case(m: Made, N: int, inputs: int, outputs: int, R: int, steps: int = 0, bias: bool = False, trained: bool = False,
              int8: bool = False) -> Case:
    sets = [steps] if steps else []
    weight = m.grad(*sets, outputs, inputs, scale=inputs**-0.5)
    extra = {"bias": m.grad(outputs)} if bias else {}
    weight = weight if trained else weight.detach()
    if int8:
        weight, extra["row_scale"] = quantize_rows(weight)
    return (m.grad(*sets, N, inputs), weight, m.grad(*sets, R, inputs), m.grad(*sets, outputs, R), 0.7), extra


def shaped_case(m: Made, rows: tuple[int, ...], **sizes: int) -> Case:
    (x, *rest), extra = lora_case(m, N=math.prod(rows), bias=True, trained=True, **sizes)
    return (x.detach().view(*rows, -1).requires_grad_(), *rest), extra


def untargeted_case(m: Made, **sizes: object) -> Case:
    (h, w, targets, weights), extra = ce_case(m, scaled=True, **sizes)
    return (h, w, torch.full_like(targets, -1).int(), weights), extra


def ce_case(m: Made, M: int, D: int, sizes: tuple[int, ...], own: bool = False, scaled: bool = False, frozen: bool = False,
            z: float = 0.0, weighted: bool = True) -> Case:
    S, equal = len(sizes), len(set(sizes)) == 1
    w = [m.grad(n, D) for n in sizes]
    w = [x.detach() for x in w] if frozen else w
    targets = torch.stack([m.ids(-1, n, M) for n in sizes], 1)
    weights = m.plain(M, S) * (m.plain(M, S) > 0.4)
    weights[::3] = 0                                                # rows that no stream wants
    extra = {"scale": m.plain(S)} if scaled else {}
    h = m.grad(M, S, D) if own else m.grad(M, D)
    return (h, torch.stack(w) if equal else w, targets, weights if weighted else None), {"z_loss": z} | extra


def route_case(m: Made, N: int, D: int) -> Case:
    order = torch.randperm(N, generator=m.g).to(m.device)
    return (m.grad(N, D), order, order.argsort()), {}


CASES: dict[str, list[Callable[[Made], Case]]] = {
    "rms_norm": [partial(norm_case, N=5, D=33), partial(norm_case, N=67, D=7), partial(norm_case, N=3, D=17, residual=True),
                 partial(norm_case, N=9, D=20, two=True), partial(norm_case, N=4, D=9, residual=True, two=True),
                 partial(norm_case, N=0, D=9, residual=True, two=True), partial(norm_case, N=1, D=1)],
    "rope": [partial(rope_case, B=2, H=3, S=5, d=6, interleaved=False), partial(rope_case, B=2, H=3, S=5, d=6, interleaved=True),
             partial(rope_case, B=3, H=1, S=2, d=10, interleaved=True, shared=True),
             partial(rope_case, B=2, H=3, S=0, d=6, interleaved=False), partial(rope_case, B=1, H=35, S=1, d=14, interleaved=False)],
    "swiglu": [partial(gate_case, rows=(3, 5), D=13, activation="silu"),
               partial(gate_case, rows=(7,), D=1100, activation="silu", packed=True),
               partial(gate_case, rows=(2, 3), D=9, activation="gelu", packed=True), partial(gate_case, rows=(4,), D=5, activation="gelu"),
               partial(gate_case, rows=(0, 3), D=5, activation="silu"), partial(gate_case, rows=(), D=7, activation="gelu")],
    "embed_sum": [partial(embed_case, B=2, S=7, D=9, sizes=(11, 3, 5)), partial(embed_case, B=1, S=50, D=131, sizes=(2,)),
                  partial(embed_case, B=1, S=6, D=4, sizes=(5, 3)),
                  partial(embed_case, B=3, S=0, D=5, sizes=(4, 4)), partial(embed_case, B=1, S=1, D=1, sizes=(1,)),
                  partial(nothing_case, B=2, S=3, D=5, sizes=(4, 7))],
    "depth_attention": [partial(depth_case, T=8, N=3, H=2, G=2, d=10), partial(depth_case, T=3, N=5, H=4, G=2, d=6),
                        partial(depth_case, T=1, N=2, H=3, G=1, d=5), partial(depth_case, T=8, N=0, H=2, G=2, d=4),
                        partial(depth_case, T=16, N=2, H=3, G=1, d=7), partial(depth_case, T=17, N=2, H=2, G=2, d=4)],
    "decode_attention": [partial(decode_case, B=2, H=6, G=2, C=21, d=10, counts=(1, 20)),
                         partial(decode_case, B=3, H=3, G=3, C=13, d=5, counts=(14, 13, 100)),
                         partial(decode_case, B=2, H=4, G=1, C=70, d=6, counts=(69, 700), window=66),
                         partial(decode_case, B=3, H=2, G=1, C=70, d=6, counts=(69, 700, 40), window=66, first=(60, 650, 40)),
                         partial(decode_case, B=1, H=1, G=1, C=9, d=3, counts=(0,))],
    "int8_linear": [partial(int8_case, N=5, inputs=37, outputs=19), partial(int8_case, N=70, inputs=9, outputs=67),
                    partial(int8_case, N=3, inputs=11, outputs=6, steps=4), partial(int8_case, N=0, inputs=7, outputs=3)],
    "lora_linear": [partial(lora_case, N=7, inputs=13, outputs=11, R=3),
                    partial(lora_case, N=5, inputs=9, outputs=17, R=2, bias=True, trained=True),
                    partial(lora_case, N=4, inputs=7, outputs=5, R=2, steps=3, bias=True),
                    partial(lora_case, N=6, inputs=12, outputs=9, R=4, int8=True),
                    partial(lora_case, N=3, inputs=8, outputs=6, R=2, steps=2, int8=True),
                    partial(lora_case, N=0, inputs=7, outputs=5, R=2),
                    partial(shaped_case, rows=(), inputs=7, outputs=5, R=3),
                    partial(shaped_case, rows=(2, 1, 3), inputs=6, outputs=4, R=2)],
    "multistream_ce": [partial(ce_case, M=17, D=5, sizes=(37, 37)), partial(ce_case, M=17, D=5, sizes=(37, 37), scaled=True),
                       partial(ce_case, M=13, D=4, sizes=(19, 19, 19), own=True, scaled=True, z=0.01),
                       partial(ce_case, M=13, D=4, sizes=(19, 19, 19), own=True, z=0.01),
                       partial(ce_case, M=11, D=3, sizes=(5, 23, 130), scaled=True, frozen=True),
                       partial(ce_case, M=9, D=6, sizes=(201,), scaled=True, weighted=False),
                       partial(ce_case, M=9, D=6, sizes=(5001,), frozen=True),
                       partial(ce_case, M=5, D=2, sizes=(8193,), scaled=True), partial(untargeted_case, M=7, D=3, sizes=(11, 11)),
                       partial(ce_case, M=4, D=3, sizes=(1, 2), own=True, z=0.1), partial(ce_case, M=2, D=3, sizes=(5,), scaled=True),
                       partial(ce_case, M=0, D=6, sizes=(7, 7), scaled=True), partial(ce_case, M=0, D=6, sizes=(7, 7))],
    "route": [partial(route_case, N=11, D=5), partial(route_case, N=0, D=3)],
}


def converted(value: object, dtype: torch.dtype | None) -> object:
    """Fresh leaves for tensors that want a gradient; with a type, all floating ones have it."""
    if isinstance(value, (list, tuple)):
        return type(value)(converted(v, dtype) for v in value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def results(op: Callable, case: Case, dtype: torch.dtype | None, **more: object) -> tuple[list[Tensor], list[Tensor]]:
    """What an op returns, and the gradients of its leaves against fixed cotangents."""
    args, named = converted(case[0], dtype), {k: converted(v, dtype) for k, v in case[1].items()}
    out = op(*args, **named, **more)
    through = [out.total] if getattr(out, "total", None) is not None else [t for t in tensors(out) if t.requires_grad]
    leaves = [t for t in tensors([*args, *named.values()]) if t.requires_grad]
    g = torch.Generator().manual_seed(0)
    back = [torch.randn(t.shape, generator=g).to(t.device, t.dtype) for t in through]
    grads = torch.autograd.grad(through, leaves, back, allow_unused=True) if through else ()
    return tensors(out), [torch.zeros_like(t) if x is None else x for x, t in zip(grads, leaves, strict=True)] if through else []


def error(a: Tensor, truth: Tensor) -> float:
    return float((a.detach().double() - truth.detach().double()).abs().max()) if truth.numel() else 0.0


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "number"), [(name, n) for name, cases in CASES.items() for n in range(len(cases))])
def test_kernel_equals_reference_in_value_and_every_gradient(name: str, number: int, dtype: torch.dtype, device: str, triton: None,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.rms_norm.ROWS", 16)               # a program has several rows
    agree(name, CASES[name][number](Made(number, dtype, device)), dtype)


@DEVICES
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("decode_attention", "int8_linear")])
def test_kernels_take_tensors_that_are_not_contiguous(name: str, device: str, triton: None) -> None:
    def apart(value: object) -> object:
        if isinstance(value, (list, tuple)):
            return type(value)(apart(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        return torch.stack([value.detach(), value.detach()], -1)[..., 0].requires_grad_(value.requires_grad)

    args, named = CASES[name][4 if name == "rms_norm" else 0](Made(5, torch.float32, device))
    agree(name, (apart(args), {k: apart(v) for k, v in named.items()}), torch.float32)


@pytest.mark.parametrize("name", ["rms_norm", "rope", "embed_sum", "multistream_ce"])
def test_what_a_cpu_trains_with_equals_the_reference(name: str) -> None:
    for number, case in enumerate(CASES[name]):
        args, named = case(Made(number, torch.float32, "cpu"))
        assert choice.trains_on_cpu(next(t for t in tensors(args) if t.requires_grad)) and not choice.trains_on_cpu(torch.zeros(1))
        agree(name, (args, named), torch.float32)


def agree(name: str, case: Case, dtype: torch.dtype) -> None:
    """Values and gradients of an op are as near to the truth as those of its reference."""
    op, ref = PAIRS[name]
    chunks = {"chunk_rows": 5} if name == "multistream_ce" else {}
    ours, truth, same = results(op, case, None, **chunks), results(ref, case, torch.float64), results(ref, case, None)
    assert ours[1] or name == "decode_attention", "no gradient was compared"
    for part, wanted, close in zip(ours, truth, same, strict=True):
        assert len(part) == len(wanted) == len(close)
        for a, t, b in zip(part, wanted, close, strict=True):
            assert a.shape == t.shape and a.dtype == b.dtype, (a.shape, t.shape, a.dtype, b.dtype)
            limit = 2 * error(b, t) + ROUNDING[dtype] * (float(t.detach().abs().max()) if t.numel() else 0.0) + 1e-7
            assert error(a, t) <= limit, (name, tuple(t.shape), error(a, t), error(b, t))


# ---- cross-entropy ----

def test_row_nll_equals_its_definition() -> None:
    """Value, class and gradient, with equal largest logits, a zero gradient, and a layout that is not contiguous."""
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, 3, 37, generator=g)).transpose(0, 1)
    logits[0, 0, 3] = logits[0, 0, 9] = 50.0
    targets, weights = torch.randint(0, 37, (3, 5), generator=g), torch.randn(3, 5, generator=g)
    weights[1, 2] = 0.0
    found = []
    for op in (row_nll, row_nll_ref):
        leaf = logits.clone().requires_grad_()
        nll, top, lse = op(leaf * 1.0, targets)
        ((nll + 0.3 * lse.square()) * weights).sum().backward()
        found.append((nll.detach(), top, lse.detach(), leaf.grad))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert found[0][3][1, 2].abs().max() == 0


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_without_weight_never_reach_the_head_and_logits_are_never_whole(scaled: bool) -> None:
    m, seen = Made(0, torch.float32, "cpu"), []
    h, w, targets, weights = m.grad(101, 4), m.grad(1, 50, 4), m.ids(0, 50, 101, 1), torch.zeros(101, 1)
    weights[[3, 50, 51, 52, 70, 99]] = 1.0

    def head(x: Tensor, inputs: Tensor) -> Tensor:
        seen.append(inputs.flatten().tolist())
        return F.linear(x, w[0])[None]

    numbers = torch.arange(101)[:, None]
    extra = {"scale": torch.ones(1), "parameters": [w]} if scaled else {}
    sums = multistream_ce(h, head, targets, weights, inputs=numbers, chunk_rows=2, **extra)
    assert seen == [[3, 50], [51, 52], [70, 99]] and sums.count.item() == 6
    (sums.total if scaled else sums.nll.sum()).backward()
    assert len(seen) == (3 if scaled else 6)                       # a known scale needs no second look
    assert (h.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [3, 50, 51, 52, 70, 99] and w.grad.abs().sum() > 0


def test_rows_counted_by_the_caller_are_the_rows() -> None:
    m = Made(1, torch.float32, "cpu")
    case = ce_case(m, M=17, D=5, sizes=(37, 37), scaled=True)
    rows = (case[0][3] != 0).any(1).nonzero().squeeze(1)
    for ours, wanted in zip(results(multistream_ce, case, None, rows=rows), results(multistream_ce, case, None), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_a_block_of_banned_classes_and_an_unwanted_one_leave_the_loss_finite(triton: None) -> None:
    m, banned = Made(0, torch.float32, "cpu"), torch.zeros(9001)
    banned[:5000] = -torch.inf
    h, w, targets = m.grad(3, 4), m.grad(9001, 4).detach(), torch.tensor([[5001], [9000], [-1]])
    for scale in (None, torch.ones(1)):
        found = [op(h, lambda x, _: (x @ w.T + banned)[None], targets, torch.ones(3, 1), scale=scale, **more)
                 for op, more in ((multistream_ce, {"chunk_rows": 2}), (multistream_ce_ref, {}))]
        (a, b), (da, db) = zip(*((s.nll, torch.autograd.grad(s.nll.sum() if scale is None else s.total, h)[0]) for s in found), strict=True)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(da, db)
        assert a.isfinite().all() and da[:2].abs().sum() > 0


def test_an_id_beyond_its_table_is_seen_and_not_read(triton: None) -> None:
    m = Made(0, torch.float32, "cpu")
    nll = multistream_ce(m.grad(3, 4), m.grad(1, 7, 4), torch.tensor([[1], [7], [2]])).places
    assert nll.isnan().tolist() == [False, True, False]
    x = embed_sum(torch.tensor([[[0, 4, -1]]]), m.grad(4, 2), [0])[0]
    assert x.isnan().any(1).tolist() == [False, True, False] and x[2].abs().sum() == 0


def test_chunks_of_a_half_precision_head_add_up_in_fp32() -> None:
    """A gradient of many equal parts: in bf16 it would stop growing."""
    h, w = torch.ones(1024, 1, dtype=torch.bfloat16), torch.zeros(1, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    multistream_ce(h, w, torch.zeros(1024, 1, dtype=torch.long), scale=torch.ones(1), chunk_rows=1).total.backward()
    assert w.grad.flatten().tolist() == [-512.0, 512.0]


def test_a_slice_of_rows_keeps_the_others_places() -> None:
    args, named = ce_case(Made(4, torch.float32, "cpu"), M=9, D=4, sizes=(11, 11))
    part, whole = multistream_ce(*args, rows=slice(2, 6), **named).places, multistream_ce(*args, **named).places
    assert part.shape == whole.shape and torch.allclose(part[2:6], whole[2:6]) and part[:2].abs().sum() == part[6:].abs().sum() == 0


@pytest.mark.parametrize("mode", ["ref", "triton"])
def test_spent_logits_refuse_a_second_backward(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "MODE", mode)
    args, named = ce_case(Made(2, torch.float32, "cpu"), M=9, D=4, sizes=(11, 11))
    nll = multistream_ce(*args, **named).nll.sum()
    nll.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        nll.backward()


def test_a_scaled_total_refuses_a_second_backward() -> None:
    total = results_of_total()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        total.backward()


def results_of_total() -> Tensor:
    args, named = ce_case(Made(2, torch.float32, "cpu"), M=9, D=4, sizes=(11, 11), scaled=True)
    return multistream_ce(*args, **named).total


# ---- embeddings ----

def test_gradient_of_embeddings_repeats_bit_by_bit(triton: None) -> None:
    case = embed_case(Made(3, torch.float32, "cpu"), B=2, S=40, D=5, sizes=(3, 2))
    first, second = (results(embed_sum, case, None)[1][0] for _ in range(2))
    assert torch.equal(first, second)


# ---- drawing ----

def sample_inputs(V: int, seed: int, rows: int = 12, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    """Rules that differ from row to row; bf16 makes equal logits common."""
    m = Made(seed, dtype, device)
    logits = m.grad(rows, V, scale=2.0).detach()
    cycle = torch.arange(rows, device=device)
    return (logits, torch.tensor([0.0, 1.0, 0.7], device=device)[cycle % 3], torch.tensor([0, 1, 5, V + 3], device=device)[cycle % 4],
            torch.tensor([1.0, 0.5, 0.05], device=device)[(cycle // 2) % 3], torch.tensor([0.0, 0.2], device=device)[(cycle // 3) % 2],
            cycle + 2**40 + seed, torch.tensor(seed, device=device))


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("V", [5, 1026])
def test_sample_equals_its_reference(V: int, dtype: torch.dtype, device: str, triton: None) -> None:
    inputs = sample_inputs(V, V, dtype=dtype, device=device)
    assert torch.equal(sample(*inputs), sample_ref(*inputs))
    for dropped in ((2,), (3, 4), (2, 3, 4)):                                # rules that no row has
        some = [None if n in dropped else x for n, x in enumerate(inputs)]
        assert torch.equal(sample(*some), sample_ref(*some))
    for rules in ((0.7, 3, None, None), (1.3, 0, 0.6, 0.1), (0.0, 2, None, 0.0)):         # one number for all rows
        same = [torch.full((len(inputs[0]),), 0 if rule is None else rule, device=device) for rule in rules]
        same[2] = torch.ones_like(same[2]) if rules[2] is None else same[2]
        drawn = [f(inputs[0], *those, *inputs[5:]) for f in (sample, sample_ref) for those in (rules, same)]
        assert all(torch.equal(drawn[0], x) for x in drawn)


def test_draws_keep_to_the_rules_and_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]))
    rows = 4000
    drawn = {}
    for name, k, p, least in (("free", 0, 1.0, 0.0), ("top_k", 2, 1.0, 0.0), ("top_p", 0, 0.6, 0.0), ("min_p", 0, 1.0, 0.25)):
        rules = (torch.full((rows,), x) for x in (1.0, k, p, least))
        ids = sample_ref(logits.expand(rows, 5), *rules, torch.arange(rows), torch.tensor(0))
        drawn[name] = torch.bincount(ids, minlength=5) / rows
    assert torch.allclose(drawn["free"], logits.exp(), atol=0.03)
    assert torch.allclose(drawn["top_k"], torch.tensor([5 / 7, 2 / 7, 0, 0, 0]), atol=0.03)
    assert (drawn["top_p"] > 0).tolist() == [True, True, False, False, False]
    assert (drawn["min_p"] > 0).tolist() == [True, True, True, False, False]


def test_noise_depends_on_seed_step_and_place_alone() -> None:
    seeds, step = torch.tensor([5, 6, 5 + 2**32]), torch.tensor(7)
    noise = counted_noise(seeds, step, 4000)
    assert torch.equal(noise[1:2], counted_noise(seeds[1:2], step, 4000)) and torch.equal(noise[:, :9], counted_noise(seeds, step, 9))
    others = [noise[1], noise[2], counted_noise(seeds[:1], step + 1, 4000)[0]]
    assert all(abs(torch.corrcoef(torch.stack([noise[0], x]))[0, 1]) < 0.05 for x in others)
    assert 0 < noise.min() and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.01 and abs(noise.std() - math.sqrt(1 / 12)) < 0.01


# ---- 8 bits ----

def test_eight_bits_keep_a_weight_to_half_a_step() -> None:
    w = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    w[2] = 0
    q, scale = quantize_rows(w)
    assert q.dtype == torch.int8 and q.abs().max() <= 127 and torch.equal(dequantize_rows(q, scale)[2], torch.zeros(33))
    assert ((dequantize_rows(q, scale) - w).abs() <= scale[:, None] / 2 + 1e-7).all()


@pytest.mark.parametrize("inputs", [128, 70])
def test_eight_bits_under_half_precision_on_a_cpu(inputs: int) -> None:
    """Some widths are read as they are, by an op of torch that others would crash."""
    g = torch.Generator().manual_seed(0)
    (q, scale), x = quantize_rows(torch.randn(35, inputs, generator=g)), torch.randn(2, 3, inputs, generator=g).bfloat16()
    y, truth = int8_linear(x, q, scale), x.float() @ dequantize_rows(q, scale).mT
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 35) and (y - truth).abs().max() <= 0.02 * truth.abs().max()
    assert int8_linear(x[:0], q, scale).shape == (0, 3, 35)


# ---- the choice ----

def test_triton_without_cuda_and_without_interpreter_is_one_clear_error() -> None:
    pytest.importorskip("triton")
    run = "import torch; from kernels.swiglu import swiglu; swiglu(torch.ones(2, 4))"
    env = os.environ | {"KERNELS": "triton", "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", run], env=env, capture_output=True, text=True, timeout=120)
    told = "ValueError: KERNELS=triton: tensors are on the CPU; use a CUDA device, KERNELS=auto, or TRITON_INTERPRET=1 to interpret"
    assert done.returncode and done.stderr.strip().splitlines()[-1] == told


@pytest.mark.parametrize(("mode", "interpret", "told"), [("fast", True, "KERNELS=fast is unknown; set auto, ref or"), ("auto", False, ""),
                                                         ("ref", False, ""), ("triton", True, "")])
def test_what_kernels_asks_for_is_there_or_an_error_says_so(mode: str, interpret: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "MODE", mode)
    monkeypatch.setattr(choice, "INTERPRET", interpret)
    if told:
        with pytest.raises(ValueError, match=told):
            choice.use_triton(torch.ones(2))
    else:
        assert choice.use_triton(torch.ones(2)) == (mode == "triton")


def test_without_triton_the_references_serve_and_a_request_for_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "triton", None)
    assert swiglu(torch.ones(2, 4)).shape == (2, 2)
    monkeypatch.setattr(choice, "MODE", "triton")
    with pytest.raises(ValueError, match="Triton is not installed"):
        swiglu(torch.ones(2, 4))


@pytest.mark.parametrize("name", ["dual", "duplex", "qwen"])      # two networks; a depth transformer; biases and norms of heads
def test_a_model_under_triton_equals_a_model_under_ref(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient of a tiny model, adapters included."""
    pytest.importorskip("triton")
    config, (tokens, weights), found = CONFIGS[name], grid(CONFIGS[name]), []
    config = replace(config, temporal=replace(config.temporal, layers=1), dual_ffn=config.dual_ffn[:1],
                     depth=config.depth and replace(config.depth, layers=1))
    tokens, weights = tokens[..., 3:9], weights[..., 3:9]
    for mode in ("ref", "triton"):
        monkeypatch.setattr(choice, "MODE", mode)
        torch.manual_seed(0)
        model = inject(MultistreamLM(config), LoraConfig(rank=2, targets=("attn.*",), train=("*",)))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        sums = model(tokens, weights)
        sums.nll.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        found.append([sums.nll.detach(), sums.hits, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert error(a, b) <= 1e-5 * max(1.0, float(b.abs().max())), (tuple(a.shape), error(a, b), float(b.abs().max()))


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "tests/compile_kernels.py"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = {line.split()[0].split(".")[1] for line in done.stdout.splitlines() if "bytes shared" in line}
    assert compiled == set("rms_norm rope swiglu embed_sum depth_attention decode_attention sample int8 cross_entropy".split())
