"""The contrastive term against its definition written out sample by sample: value, gradient, who has a part in it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import call
from test_conversation import CHAT, SMALL, codes, grid

from data import collate
from layers.architecture import ModelConfig, StackConfig
from layers.contrastive import TEMPERATURE, contrastive_pairs, info_nce
from loss import LossConfig, loss_scale
from model import MultistreamLM
from training.objective import Contrast

VOICES = {"amal": 7, "badr": 9, "": -1}


def sample(name: str, speaker: str, reference: int, frames: int, seed: int) -> tuple:
    voices = [(f"voice {seed}", codes(reference, seed=seed))] if reference else []
    return name, grid(CHAT.spoken(f"text {seed}", codes(frames, seed=100 + seed), voices)), VOICES[speaker]


def batch(*speakers: str):
    """Two packed rows: samples of 3 + i frames with references of 2 + i; the last one has none."""
    made = [sample(str(i), who, 2 + i, 3 + i, i) for i, who in enumerate(speakers)]
    return collate([[*made[:2], sample("none", "amal", 0, 4, 50)], made[2:]], {})


def spans(found, row: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of a sample's reference and of its own speech, found by walking along the row."""
    own, stretches = (found.segments[row] == number).nonzero().squeeze(1), []
    for s in own.tolist():
        if (found.tokens[row, 1:, s] >= 0).any():
            new = not stretches or stretches[-1][-1] != s - 1
            stretches = [*stretches, [s]] if new else [*stretches[:-1], [*stretches[-1], s]]
    trained = [st for st in stretches if found.weights[row, 1:, st].sum() > 0]
    heard = [st for st in stretches if st not in trained]
    return tuple(torch.tensor([s for st in of for s in st], dtype=torch.long) for of in (heard, trained))


def written_out(h: torch.Tensor, found, speakers: list[str]) -> tuple[torch.Tensor, int]:
    places = [(0, 0), (0, 1), (1, 0), (1, 1)][: len(speakers)]
    vectors = [[F.normalize(h[row][columns].mean(0), dim=0) for columns in spans(found, row, n)] for row, n in places]
    total, count = torch.zeros(()), 0
    for i, (_, y) in enumerate(vectors):
        others = [j for j in range(len(vectors)) if j != i and (speakers[j] != speakers[i] or not speakers[i])]
        if others:
            scores = torch.stack([y @ vectors[j][0] / 0.07 for j in (i, *others)])
            total, count = total - torch.log_softmax(scores, 0)[0], count + 1
    return total, count


@pytest.mark.parametrize("speakers", [["amal", "badr", "amal"], ["amal", "", "", "badr"], ["amal", "amal", "badr"]], ids="-".join)
def test_value_and_gradient_equal_the_definition(speakers: list[str]) -> None:
    found = batch(*speakers)
    h = torch.randn(*found.segments.shape, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ours = info_nce(h, contrastive_pairs(found.tokens, found.weights, found.segments, found.speakers, SMALL))
    wanted, count = written_out(h, found, speakers)
    assert count == len(speakers) == int(contrastive_pairs(found.tokens, found.weights, found.segments, found.speakers, SMALL).count)
    assert torch.allclose(ours, wanted, rtol=1e-5) and float(wanted.detach()) > 0.1 and TEMPERATURE == 0.07
    gradients = [torch.autograd.grad(x, h, retain_graph=True)[0] for x in (ours, wanted)]
    assert torch.allclose(*gradients, atol=1e-5) and float(gradients[1].abs().max()) > 0.01


def test_one_voice_or_no_reference_has_no_part_and_no_gradient() -> None:
    bare = collate([[sample("a", "amal", 0, 4, 1), sample("b", "badr", 0, 3, 2)]], {})
    for found in (batch("amal", "amal", "amal"), bare):
        assert not contrastive_pairs(found.tokens, found.weights, found.segments, found.speakers, SMALL).count
        h = torch.randn(*found.segments.shape, 6, requires_grad=True)
        loss = info_nce(h, contrastive_pairs(found.tokens, found.weights, found.segments, found.speakers, SMALL))
        loss.backward()
        assert float(loss.detach()) == 0 and not h.grad.any()


def test_the_model_adds_the_term_to_its_sums() -> None:
    torch.manual_seed(0)
    found = batch("amal", "badr", "amal")
    model = MultistreamLM(ModelConfig(SMALL, StackConfig(dim=16, layers=2, heads=2, ffn=16), dual_ffn=(0, 1)))
    plain = model(found.tokens, found.weights, found.positions, found.segments)
    sums = model(found.tokens, found.weights, found.positions, found.segments, speakers=found.speakers)
    assert plain.contrast is None and torch.equal(plain.nll, sums.nll)
    h = model.hidden(found.tokens[..., :-1], found.positions[:, :-1], found.segments[:, :-1])[1]
    wanted = written_out(h, found, ["amal", "badr", "amal"])[0]
    assert torch.allclose(sums.contrast, wanted, rtol=1e-4)
    goal = Contrast(SMALL, config := LossConfig(contrastive=0.1))
    counts = goal.count(found.weights, found.segments, found.tokens, found.speakers)
    parts, numbers = goal.sums(model, [found.tokens, found.weights, found.positions, found.segments, found.speakers])
    usual = (plain.nll * loss_scale(plain.weight, SMALL, config)).sum()
    assert torch.allclose((goal.scale(counts, config).float() * parts).sum(), usual + 0.1 * wanted / 3, rtol=1e-4) and counts[-1] == 3
    assert goal.report(numbers)["contrastive_loss"] == pytest.approx(float(wanted.detach()) / 3, rel=1e-4)
    assert numbers.shape == goal.zero().shape
    sums.contrast.backward()
    assert float(model.temporal.layers[0].audio_ffn.up.weight.grad.abs().max()) > 1e-3


def test_the_sum_over_codebooks_is_that_of_transformers() -> None:
    weight = torch.tensor([4.0, 3.0, 3.0, 3.0, 3.0])
    assert LossConfig().audio_reduction == "mean" and LossConfig().contrastive == 0
    mean, total = (loss_scale(weight, SMALL, LossConfig(audio=0.5, audio_reduction=how)) for how in ("mean", "sum"))
    assert torch.allclose(mean, torch.tensor([0.25, *[0.5 / 12] * 4])) and torch.allclose(total, torch.tensor([0.25, *[0.5 / 3] * 4]))
    uneven = loss_scale(torch.tensor([1.0, 2.0, 4.0, 0.0, 1.0]), SMALL, LossConfig(audio_reduction="sum"))
    assert uneven.tolist() == [1.0, 0.5, 0.25, 0.0, 1.0]                            # sum over k of CE_k, each over its own targets
    for wrong in ({"audio_reduction": "max"}, {"groups": "all", "audio_reduction": "sum"}, {"contrastive": -1.0}):
        with pytest.raises(AssertionError, match="neither|needs|negative"):
            LossConfig(**wrong)


def test_a_run_with_the_term_logs_it_and_says_when_it_is_nothing(tmp_path) -> None:
    common = ("train.py", "configs/higgs_ar.py", "--smoke", f"--data.cache={tmp_path}/cache", "--steps=2", "--eval_batches=1",
              "--prompts=", "--listen=0", "--loss.contrastive=0.1")
    for source, nothing in (("arabic", False), ("chat", True)):
        rc, out, err = call(*common, f"--out={tmp_path}/{source}", f"--data.sources=assets/speech/{source}.jsonl")
        assert rc == 0 and ("contrastive loss 0: no micro-batch has two voices" in out) == nothing, out + err
        rows = [json.loads(line) for line in (tmp_path / source / "metrics.jsonl").read_text().splitlines()]
        found = [row["train/contrastive_loss"] for row in rows if "train/loss" in row]
        assert found == [0, 0] if nothing else all(0.01 < loss < math.log(200) + 2 / TEMPERATURE for loss in found)
