"""The loss: equal to its definition, in chunks, with global normalisers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tables import CONFIGS, aligned_table, clone_table, grid

from kernels import cross_entropy
from loss import LossConfig, cross_entropy_sums, loss_scale
from model import MultistreamLM
from training.monitor import report


def case(N: int, D: int, Q: int, V: int, seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, V, (N, Q), generator=g)
    weights = torch.rand(N, Q, generator=g) * (torch.rand(N, Q, generator=g) > 0.4)
    return (torch.randn(N, D, generator=g), torch.randn(Q * V, D, generator=g), targets, weights)


@pytest.mark.parametrize(("N", "D", "Q", "V"), [(1, 3, 1, 2), (7, 5, 3, 11), (130, 8, 2, 37), (513, 4, 8, 13)])
def test_sums_equal_a_plain_loop(N: int, D: int, Q: int, V: int) -> None:
    h, w, targets, weights = case(N, D, Q, V, N)
    sums = cross_entropy_sums(h, targets, lambda x, _: F.linear(x, w).unflatten(-1, (Q, V)).transpose(0, 1), targets, weights, Q * V)
    for q in range(Q):
        nll = weight = hits = count = 0.0
        for n in range(N):
            if targets[n, q] >= 0 and weights[n, q] > 0:
                scores = (w[q * V : (q + 1) * V] @ h[n]).double()
                nll += float(weights[n, q]) * float(torch.logsumexp(scores, 0) - scores[targets[n, q]])
                weight, count = weight + float(weights[n, q]), count + 1
                hits += float(scores.argmax() == targets[n, q])
        assert sums.nll[q].item() == pytest.approx(nll, rel=1e-5, abs=1e-6) and sums.weight[q].item() == pytest.approx(weight, rel=1e-5)
        assert (sums.hits[q], sums.count[q]) == (hits, count)


def test_chunks_change_neither_value_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    h0, w0, targets, weights = case(200, 6, 3, 17, 0)
    results = []
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)                  # MIN_ROWS rows a chunk: four chunks
    scale = torch.tensor([1.0, 2.0, 3.0])
    for kind in ("whole", "chunks", "scaled"):
        h, w = h0.clone().requires_grad_(), w0.clone().requires_grad_()

        def head(x: torch.Tensor, _: torch.Tensor, w: torch.Tensor = w) -> torch.Tensor:
            return F.linear(x, w).unflatten(-1, (3, 17)).transpose(0, 1)

        if kind == "whole":
            sums = cross_entropy.multistream_ce_ref(h, head, targets, weights)
        else:
            sums = cross_entropy_sums(h, targets, head, targets, weights, 51, scale if kind == "scaled" else None, 0.0, [w])
        (sums.total if kind == "scaled" else (sums.nll * scale).sum()).backward()
        results.append((sums.nll.detach(), sums.hits, h.grad, w.grad))
    for a, b, c in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6) and torch.allclose(a, c, rtol=1e-5, atol=1e-6)


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    seen = []
    h, w, targets, weights = case(1000, 4, 1, 50, 1)
    cross_entropy_sums(h, targets, lambda x, _: seen.append(len(x)) or F.linear(x, w)[None], targets, weights, 50)
    assert max(seen) == cross_entropy.MIN_ROWS


def test_no_rows_give_zero_and_a_gradient() -> None:
    w = torch.randn(5, 3, requires_grad=True)
    none = torch.zeros(0, 1, dtype=torch.long)
    sums = cross_entropy_sums(torch.zeros(0, 3), none, lambda x, _: F.linear(x, w)[None], none, torch.zeros(0, 1), 5)
    sums.nll.sum().backward()
    assert sums.nll.item() == 0 and torch.equal(w.grad, torch.zeros(5, 3))


def test_uniform_logits_cost_ln_of_the_vocabulary() -> None:
    targets = torch.tensor([[3], [5]])
    sums = cross_entropy.multistream_ce_ref(torch.zeros(2, 4), lambda x, _: torch.zeros(1, len(x), 9), targets, torch.ones(2, 1))
    assert sums.nll.item() == pytest.approx(2 * math.log(9))


def test_loss_is_the_lambda_weighted_sum_of_group_means() -> None:
    table, config = clone_table(2), LossConfig(text=0.5, audio=2.0)
    sums = torch.tensor([[6.0, 4.0, 8.0, 0], [3.0, 2.0, 2.0, 0], [1, 1, 0, 0], [3, 2, 2, 0]], dtype=torch.float64)
    assert report(sums, table, config)["loss"] == pytest.approx(0.5 * 6 / 3 + 2.0 * (4 + 8) / (2 + 2))
    assert report(sums, table, replace(config, groups="all"))["loss"] == pytest.approx((0.5 * 6 + 2.0 * 12) / 7)


def test_a_group_without_targets_costs_nothing_and_is_never_nan() -> None:
    table = clone_table(2)
    scale = loss_scale(torch.tensor([0.0, 2.0, 2.0]), table, LossConfig())
    assert scale.tolist() == [0.0, 0.25, 0.25]
    assert loss_scale(torch.zeros(3), table, LossConfig()).tolist() == [0, 0, 0]


def test_report_names_every_predicted_stream() -> None:
    numbers = report(torch.ones(4, 9, dtype=torch.float64), aligned_table(3), LossConfig())
    assert {"advance_loss", "cb1_loss", "cb3_accuracy", "text_loss", "audio_loss", "loss"} <= numbers.keys()
    assert "word_loss" not in numbers


@pytest.mark.parametrize("name", ["clone", "dual", "depth", "tails", "words", "text"])
def test_model_sums_equal_cross_entropy_of_its_logits(name: str) -> None:
    torch.manual_seed(0)
    model, (tokens, weights) = MultistreamLM(CONFIGS[name]).eval(), grid(CONFIGS[name])
    with torch.no_grad():
        text, audio = model(tokens)
        sums = model(tokens, weights)
    table = model.table
    for k in [*table.text_out, *table.audio_out]:
        logits = text[0] if k in table.text_out else audio[0, table.audio_out.index(k)]
        kept = weights[0, k, 1:] > 0
        nll = F.cross_entropy(logits[kept], tokens[0, k, 1:][kept], reduction="none") * weights[0, k, 1:][kept]
        assert sums.nll[k].item() == pytest.approx(nll.sum().item(), rel=1e-5) and sums.count[k].item() == kept.sum().item()


@pytest.mark.parametrize("name", ["dual", "depth", "words"])
def test_split_batches_add_up_to_the_whole_batch(name: str) -> None:
    torch.manual_seed(0)
    model = MultistreamLM(CONFIGS[name])
    grids = [grid(CONFIGS[name], seed) for seed in (0, 6, 12, 18)]
    S = max(g[0].shape[2] for g in grids)
    tokens = torch.cat([F.pad(g[0], (0, S - g[0].shape[2]), value=-1) for g in grids])
    weights = torch.cat([F.pad(g[1], (0, S - g[1].shape[2])) for g in grids])
    scale = loss_scale(weights[..., 1:].sum((0, 2)), model.table, LossConfig(text=0.7))
    (scale * model(tokens, weights).nll).sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for b in range(4):
        (scale * model(tokens[b : b + 1], weights[b : b + 1]).nll).sum().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(whole, model.parameters(), strict=True))


def test_padding_of_the_batch_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    model, (tokens, weights) = MultistreamLM(CONFIGS["dual"]).eval(), grid(CONFIGS["dual"])
    with torch.no_grad():
        padded = model(F.pad(tokens, (0, 5), value=-1), F.pad(weights, (0, 5)))
        assert torch.allclose(padded.stacked(), model(tokens, weights).stacked(), atol=1e-5)


def test_unknown_grouping_is_refused() -> None:
    with pytest.raises(AssertionError, match="modality"):
        LossConfig(groups="each")
