"""Sparse autoencoders: k numbers and their signs, unit rows, a loss worked out by hand, and epochs that are never done twice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import call
from safetensors.torch import load_file

from evaluation import sparse_autoencoder
from evaluation.sparse_autoencoder import Sae, SaeConfig, fit, measure


def test_encoding_keeps_the_k_largest_with_their_signs():
    torch.manual_seed(0)
    sae, x = Sae(6, 20, 3), torch.randn(5, 6)
    full, e = F.normalize(x, dim=-1) @ sae.encoder + sae.bias, sae.encode(x)
    for row, all_of_it in zip(e, full, strict=True):
        kept = row.nonzero().flatten()
        assert len(kept) == 3 and torch.equal(row[kept], all_of_it[kept])
        assert all_of_it[kept].abs().min() >= all_of_it.abs().sort(descending=True).values[3]
    assert torch.allclose(sae.encode(7 * x), e, atol=1e-6) and not sae.encode(torch.zeros(2, 6)).any()


def test_the_loss_is_that_of_k_and_an_eighth_of_that_of_4k():
    torch.manual_seed(1)
    sae, x = Sae(6, 20, 2), torch.randn(4, 6)
    cosines = [F.cosine_similarity(x, sae.encode(x, k) @ sae.decoder, dim=-1).mean() for k in (2, 8)]
    assert float(sae.loss(x).detach()) == pytest.approx(float(((1 - cosines[0]) + (1 - cosines[1]) / 8).detach()), abs=1e-6)
    sae.loss(x).backward()
    sae.tangent()
    assert (sae.decoder.grad * sae.decoder).sum(-1).abs().max() < 1e-6 and sae.decoder.grad.abs().max() > 1e-4
    with torch.no_grad():
        sae.decoder.mul_(3)
    sae.to_sphere()
    assert torch.allclose(sae.decoder.norm(dim=-1), torch.ones(20), atol=1e-6)


def test_it_finds_sparse_directions_and_resumes_exactly(tmp_path: Path):
    g = torch.Generator().manual_seed(2)
    basis = F.normalize(torch.randn(24, 12, generator=g), dim=-1)
    x = torch.stack([torch.randn(2, generator=g) @ basis[torch.randperm(24, generator=g)[:2]] for _ in range(1500)])
    config = SaeConfig(width=24, k=2, epochs=6, batch=64, lr=1e-2)
    untrained = measure(Sae(12, 24, 2), x)["cosine"]
    found = fit(x, config, tmp_path / "whole.safetensors")
    assert found["cosine"] > max(0.85, untrained + 0.1) and found["dead"] < 0.2
    stopped = tmp_path / "stopped.safetensors"

    class Stop(Exception):
        pass

    write, count = sparse_autoencoder.write_tensors, []

    def once(path, tensors):
        write(path, tensors)
        count.append(1)
        if len(count) == 2:
            raise Stop

    sparse_autoencoder.write_tensors = once
    try:
        with pytest.raises(Stop):
            fit(x, config, stopped)
    finally:
        sparse_autoencoder.write_tensors = write
    assert int(load_file(stopped)["epochs"]) == 2 and fit(x, config, stopped) == found
    one, other = load_file(tmp_path / "whole.safetensors"), load_file(stopped)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    with pytest.raises(ValueError, match="another width"):
        fit(x, replace(config, width=30), stopped)


def test_the_command_trains_on_the_states_of_a_run(tiny_run: Path, tmp_path: Path):
    options = (f"--run={tiny_run}", "--states=state", "--columns=300", "--width=16", "--k=2", "--epochs=2", "--batch=32")
    rc, out, err = call("evaluate.py", "sae", "configs/dsaa_ae.py", *options)
    assert rc == 0 and "held-out cosine" in out, err
    assert set(json.loads((tiny_run / "sae/sae.json").read_text())["state"]) == {"cosine", "dead"}
    for wrong, said in (("--states=nothing", "there are layer 0, state"), ("--k=0", "k is in 1..width"),
                        (f"--run={tmp_path}", "holds no checkpoint")):
        rc, _, err = call("evaluate.py", "sae", "configs/dsaa_ae.py", *options, wrong)
        assert rc == 2 and said in err and err.count("\n") == 1, err
