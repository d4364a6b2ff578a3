"""The model: shapes and counts, causality, caching, packing, batching, for every switch of every family."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from tables import CONFIGS, STACK, grid
from torch.utils._python_dispatch import TorchDispatchMode

from families.higgs import HIGGS_V2_3B
from families.moshi import MOSHI_7B
from families.moss import MOSS_9B
from families.qwen import QWEN2_5_1_5B
from kernels.attention import PackedRows
from kernels.rope import rope, rope_tables
from layers.architecture import ModelConfig, StackConfig
from layers.batch_plan import make_plan
from model import Block, MultistreamLM
from options import from_json, to_json

NAMES = list(CONFIGS)


def make(name: str, **changes: object) -> MultistreamLM:
    torch.manual_seed(1)
    model = MultistreamLM(replace(CONFIGS[name], **changes)).eval()
    with torch.no_grad():                                      # norms and biases that are not their initial 1 and 0
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def logits(model: MultistreamLM, tokens: torch.Tensor, **packing: torch.Tensor) -> torch.Tensor:
    """Every logit side by side: (B, S - 1, all)."""
    text, audio = model(tokens, **packing)
    parts = [] if text is None else [text]
    if audio is not None:
        parts.append(audio.permute(0, 2, 1, 3).flatten(2))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(("config", "count"), [(HIGGS_V2_3B, 5_771_283_456), (MOSHI_7B, 7_687_729_152), (MOSS_9B, 9_095_694_336),
                                               (QWEN2_5_1_5B, 1_543_714_304)], ids=["higgs", "moshi", "moss", "qwen"])
def test_published_architectures_have_their_published_size(config: ModelConfig, count: int) -> None:
    with torch.device("meta"):
        assert MultistreamLM(config).count_parameters() == count


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_have_the_shape_of_the_contract(name: str) -> None:
    model, (tokens, _) = make(name), grid(CONFIGS[name])
    text, audio = model(tokens)
    S, table = tokens.shape[2], model.table
    assert (text is None) == (not table.text_out) and (audio is None) == (not table.audio_out)
    if text is not None:
        assert text.shape == (1, S - 1, table.streams[table.text_out[0]].classes)
    if audio is not None:
        assert audio.shape == (1, len(table.audio_out), S - 1, table.streams[table.audio_out[0]].classes)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_future_columns_do_not_change_past_logits(name: str) -> None:
    model, (tokens, _) = make(name), grid(CONFIGS[name])
    at = tokens.shape[2] // 2
    changed = tokens.clone()
    changed[..., at:] = torch.where(changed[..., at:] >= 0, (changed[..., at:] + 1) % 15, changed[..., at:])
    before, after = logits(model, tokens), logits(model, changed)
    same = at - 1 if model.config.depth is None else at - 2    # the depth transformer reads the column that it predicts
    assert same > 0 and torch.equal(before[:, :same], after[:, :same])
    assert not torch.equal(before[:, at:], after[:, at:])


@torch.no_grad()
def test_depth_step_k_reads_only_the_rows_before_it() -> None:
    model, (tokens, _) = make("depth"), grid(CONFIGS["depth"], 3)
    at = tokens.shape[2] - 4
    for row, first in ((0, 0), (1, 1), (2, 2)):                # changing row r of a column changes codebooks r.. of that column
        changed = tokens.clone()
        changed[0, row, at] = (changed[0, row, at].clamp(min=0) + 1) % 15
        before, after = model(tokens)[1][0, :, at - 1], model(changed)[1][0, :, at - 1]
        assert torch.equal(before[:first], after[:first]) and not torch.allclose(before[first], after[first])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cached_decode_equals_full_forward(name: str) -> None:
    model, (tokens, _) = make(name), grid(CONFIGS[name], 2)
    S = tokens.shape[2]
    h_text, h_audio = model.hidden(tokens)
    cache, at, parts = model.cache(1, S, chunk=4), 0, []
    for n in (3, 1, 1, 4, *[1] * S):                           # prompts in pieces, then column by column
        n = min(n, S - at)
        if n:
            parts.append(model.hidden(tokens[..., at : at + n], torch.arange(at, at + n)[None], cache=cache))
        at += n
    for full, pieces in ((h_text, [p[0] for p in parts]), (h_audio, [p[1] for p in parts])):
        assert (torch.cat(pieces, dim=1) - full).abs().max() < 1e-5


@torch.no_grad()
def test_a_ring_cache_of_window_size_equals_full_forward_far_past_the_window() -> None:
    model = make("duplex")
    tokens, _ = grid(CONFIGS["duplex"], columns=60)
    full = model.hidden(tokens)[0]
    cache = model.cache(1, 60, chunk=1)
    assert cache.capacity == 7                                 # window 6, and one more for the column being written
    steps = [model.hidden(tokens[..., s : s + 1], torch.tensor([[s]]), cache=cache)[0] for s in range(60)]
    assert (torch.cat(steps, dim=1) - full).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packed_rows_equal_separate_rows(name: str) -> None:
    model = make(name)
    grids = [grid(CONFIGS[name], seed)[0] for seed in (0, 1, 2)]
    packed = torch.cat(grids, dim=2)
    positions = torch.cat([torch.arange(g.shape[2]) for g in grids])[None]
    segments = torch.cat([torch.full((g.shape[2],), n) for n, g in enumerate(grids)])[None]
    out, at = logits(model, packed, positions=positions, segments=segments), 0
    for g in grids:
        n = g.shape[2] - 1
        assert (out[:, at : at + n] - logits(model, g)).abs().max() < 1e-5
        at += n + 1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packed_sums_equal_the_sum_of_separate_sums(name: str) -> None:
    model = make(name)
    grids = [grid(CONFIGS[name], seed) for seed in (0, 1, 2)]
    tokens, weights = (torch.cat([g[n] for g in grids], dim=2) for n in (0, 1))
    positions = torch.cat([torch.arange(g[0].shape[2]) for g in grids])[None]
    segments = torch.cat([torch.full((g[0].shape[2],), n) for n, g in enumerate(grids)])[None]
    together = model(tokens, weights, positions, segments).stacked()
    assert torch.allclose(together, sum(model(*g).stacked() for g in grids), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_batched_equals_single_with_padding_on_the_right(name: str) -> None:
    model = make(name)
    grids = [grid(CONFIGS[name], seed)[0] for seed in (0, 3)]
    S = max(g.shape[2] for g in grids)
    batch = torch.cat([torch.nn.functional.pad(g, (0, S - g.shape[2]), value=-1) for g in grids])
    segments = torch.stack([torch.where(torch.arange(S) < g.shape[2], 0, -1) for g in grids])
    out = logits(model, batch, positions=torch.arange(S).expand(2, S), segments=segments)
    for b, g in enumerate(grids):
        assert (out[b : b + 1, : g.shape[2] - 1] - logits(model, g)).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient_even_without_targets_of_a_kind(name: str) -> None:
    model, (tokens, weights) = make(name), grid(CONFIGS[name])
    for kept in (weights, torch.zeros_like(weights)):
        model.zero_grad()
        model(tokens, kept).nll.sum().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert missing == [] and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["clone", "dual", "tails", "depth", "fast_forward", "depth_schedule"])
def test_what_is_made_again_in_backward_changes_no_gradient(name: str, scaled: bool) -> None:
    found = []
    for level in range(5):
        model, (tokens, weights) = make(name, checkpoint=level), grid(CONFIGS[name])
        scale = torch.linspace(0.5, 1.5, len(model.table))
        if scaled:
            loss = model(tokens, weights, scale=scale).total
        else:
            loss = (scale * model(tokens, weights).nll).sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for level in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found[0], level, strict=True))


LEVELS = """
from dataclasses import replace
from pathlib import Path
import torch
from model import MultistreamLM
from tables import CONFIGS, grid

def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024

torch.set_num_threads(1)
tokens, weights = grid(CONFIGS["duplex"], columns=500)
small = CONFIGS["duplex"]
small = replace(small, temporal=replace(small.temporal, layers=5, window=0), depth=replace(small.depth, layers=3))
for level in range(5):
    model = MultistreamLM(replace(small, checkpoint=level))
    model(tokens[..., :9], weights[..., :9], scale=torch.ones(len(model.table))).total.backward()     # what libraries keep for themselves
    before = resident()
    total = model(tokens, weights, scale=torch.ones(len(model.table))).total
    print(resident() - before)
    del total, model
"""


def test_each_level_keeps_less_for_the_backward() -> None:
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 15), "MALLOC_TRIM_THRESHOLD_": "0", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run([sys.executable, "-c", LEVELS], env=env, capture_output=True, text=True, timeout=120)
    kept = [float(line) for line in done.stdout.split()]
    assert kept == sorted(kept, reverse=True) and kept[1] < 0.85 * kept[0] and kept[2] < 0.75 * kept[1] and kept[4] < 0.5 * kept[2], kept


@pytest.mark.parametrize(("given", "level"), [(False, 0), (True, 4), (3, 3)])
def test_a_checkpoint_that_was_true_or_false_is_a_level(given: bool | int, level: int) -> None:
    config = replace(CONFIGS["clone"], checkpoint=given)
    again = from_json(ModelConfig, {**to_json(config), "checkpoint": given})
    assert config.checkpoint == again.checkpoint == level and not isinstance(again.checkpoint, bool)


@pytest.mark.parametrize("name", NAMES)
def test_a_known_scale_changes_neither_loss_nor_gradient(name: str) -> None:
    found = []
    for scaled in (False, True):
        model, (tokens, weights) = make(name), grid(CONFIGS[name])
        scale = torch.linspace(0.5, 1.5, len(model.table))
        sums = model(tokens, weights, scale=scale if scaled else None)
        loss = sums.total if scaled else (scale * sums.nll).sum()
        loss.backward()
        found.append([loss.detach(), sums.stacked(), *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["clone", "window", "fast_forward", "mha"])
def test_runs_of_packed_rows_equal_a_mask_over_all_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three examples and padding in one row, one example in the other: every gradient, and no mask of S x S is made."""
    grids = [grid(CONFIGS[name], seed) for seed in (0, 1, 2, 4)]
    pad = torch.nn.functional.pad
    tokens, weights = (torch.cat([g[n] for g in grids[:3]], dim=2) for n in (0, 1))
    S = tokens.shape[2] + 70
    rows = [(tokens, weights), grids[3]]
    tokens, weights = (torch.cat([pad(r[n], (0, S - r[n].shape[2]), value=-1 if n == 0 else 0) for r in rows]) for n in (0, 1))
    lengths = [[g[0].shape[2] for g in grids[:3]], [grids[3][0].shape[2]]]
    positions = torch.stack([pad(torch.cat([torch.arange(n) for n in row]), (0, S - sum(row))) for row in lengths])
    segments = torch.stack([pad(torch.repeat_interleave(torch.tensor(row)), (0, S - sum(row)), value=-1) for row in lengths])
    found = []
    for runs in (False, True):
        model = make(name)
        if runs:
            monkeypatch.undo()
            monkeypatch.setattr("layers.batch_plan.attention_mask", None)
        else:
            monkeypatch.setattr(PackedRows, "from_segments", lambda *_: None)
        sums = model(tokens, weights, positions, segments)
        sums.nll.sum().backward()
        found.append([sums.stacked(), *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("positions", "segments"), [
    ([0, 1, 3, 4], [0, 0, 0, 0]), ([0, 1, 0, 1], [0, 0, 1, 0]), ([-1, 0, 1, 2], [0, 0, 0, 0])], ids=["gap", "two pieces", "negative"])
def test_what_is_no_plain_run_goes_by_a_mask(positions: list[int], segments: list[int]) -> None:
    assert PackedRows.from_segments(torch.tensor([positions]), torch.tensor([segments]), 0) is None


def test_a_plan_from_the_host_is_the_plan() -> None:
    for name in ("dual", "depth", "words"):
        model, (tokens, weights) = make(name), grid(CONFIGS[name])
        plan = make_plan(model.config, tokens, weights).to(torch.device("cpu"))
        assert torch.equal(model(tokens, weights).stacked(), model(tokens, weights, plan=plan).stacked())


@torch.no_grad()
def test_minus_one_embeds_to_exactly_zero() -> None:
    model = make("clone")
    x = model.embed_tokens(torch.full((1, 4, 3), -1))
    assert torch.equal(x, torch.zeros(1, 3, STACK.dim))


@torch.no_grad()
def test_text_rows_never_pass_the_audio_ffn_and_the_other_way_round() -> None:
    model, (tokens, _) = make("dual"), grid(CONFIGS["dual"])
    before = logits(model, tokens[..., :4])                    # four text columns
    for layer in model.temporal.layers:
        layer.audio_ffn.down.weight.fill_(torch.nan)
        layer.audio_ffn_norm.weight.fill_(torch.nan)
    assert torch.equal(before, logits(model, tokens[..., :4]))
    model, audio = make("dual"), tokens[..., 6:10]
    assert (audio[:, 1:] >= 0).all()
    before = logits(model, audio)
    for layer in model.temporal.layers:
        layer.ffn.down.weight.fill_(torch.nan)
    assert torch.equal(before, logits(model, audio))


@torch.no_grad()
def test_fast_forward_layers_pass_audio_by_and_hide_it_from_text() -> None:
    model, (tokens, _) = make("fast_forward"), grid(CONFIGS["fast_forward"])
    inputs = {}
    block = model.temporal.layers[1]
    block.register_forward_hook(lambda m, args, out: inputs.update(x=args[0], y=out))
    model(tokens)
    audio = (tokens[0, 1:, :-1] >= 0).any(0)
    assert torch.equal(inputs["x"][0, audio], inputs["y"][0, audio])
    assert not torch.equal(inputs["x"][0, ~audio], inputs["y"][0, ~audio])


@torch.no_grad()
def test_tails_are_independent() -> None:
    model, (tokens, _) = make("tails"), grid(CONFIGS["tails"])
    text, audio = model(tokens)
    model.temporal.audio_tail[0].ffn.down.weight.add_(1.0)
    assert torch.equal(model(tokens)[0], text) and not torch.equal(model(tokens)[1], audio)


def test_rope_conventions_differ_by_a_permutation_of_the_head() -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.arange(5)[None]
    tables = rope_tables(8, 1e4, (), positions)
    halves = rope(x[..., [0, 2, 4, 6, 1, 3, 5, 7]], tables, interleaved=False)
    assert torch.allclose(rope(x, tables, interleaved=True)[..., [0, 2, 4, 6, 1, 3, 5, 7]], halves, atol=1e-6)


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    at = [rope_tables(8, 1e4, (), torch.tensor([[p]])) for p in (0, 3, 7, 10, 400, 403)]
    score = [float((rope(q, at[n + 1], False) * rope(k, at[n], False)).sum()) for n in (0, 2, 4)]
    assert max(score) - min(score) < 1e-4


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    block, x = Block(StackConfig(dim=8, layers=1, heads=2, ffn=16), dropout=0.3), torch.ones(100, 1001, requires_grad=True)
    y = block.drop(x)
    y.sum().backward()
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.006) and float(y.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(x.grad, y.detach()) and block.eval().drop(x) is x


def test_input_drop_hides_audio_columns_in_training_only() -> None:
    model, (tokens, _) = make("words", input_drop=1.0), grid(CONFIGS["words"])
    full = model.embed_tokens(tokens)
    model.train()
    torch.manual_seed(3)
    seen = torch.stack([model.embed_tokens(tokens) for _ in range(20)])
    changed = (seen - full).abs().amax(dim=(1, 3)) > 0                         # (20, S)
    assert changed.any() and not changed.all() and torch.equal(model.eval().embed_tokens(tokens), full)


def test_tied_head_is_the_embedding() -> None:
    model = make("text")
    assert model.text_head.weight is model.embed["text"].weight


@pytest.mark.parametrize(("change", "message"), [({"dual_ffn": (9,)}, "layer numbers from 0 to"), ({"depth": STACK}, "depth.steps")])
def test_config_checks_itself(change: dict, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        replace(CONFIGS["clone"], **change)


def test_stack_config_rejects_heads_that_do_not_divide() -> None:
    with pytest.raises(AssertionError, match="kv_heads"):
        StackConfig(dim=24, heads=3, kv_heads=2)


class Waits(TorchDispatchMode):
    """Collects the operations that would make a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::_unique2", "aten::masked_select"):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["dual", "depth_schedule", "duplex", "tails", "window"])
def test_a_planned_step_waits_for_nothing(name: str, scaled: bool) -> None:
    """Forward and backward of packed rows read no number back, once the host has made its plan."""
    model, grids = make(name), [grid(CONFIGS[name], seed) for seed in (0, 1)]
    tokens, weights = (torch.cat([g[n] for g in grids], dim=2) for n in (0, 1))
    positions = torch.cat([torch.arange(g[0].shape[2]) for g in grids])[None]
    segments = torch.cat([torch.full((g[0].shape[2],), n) for n, g in enumerate(grids)])[None]
    plan, scale = make_plan(model.config, tokens, weights, positions, segments), torch.ones(len(model.table))
    with Waits() as waits:
        sums = model(tokens, weights, positions, segments, scale=scale if scaled else None, plan=plan)
        (sums.total if scaled else sums.nll.sum()).backward()
    assert waits.found == [] and sums.stacked().abs().sum() > 0


@pytest.mark.parametrize("trained", ["depth.", "temporal.", "embed", "text_head", "audio_head"])
@pytest.mark.parametrize("name", NAMES)
def test_training_a_part_of_a_model_gives_that_part_its_gradient(name: str, trained: str) -> None:
    """A head whose parameters and states are both frozen has no gradient at all, and is no obstacle."""
    whole, part = make(name), make(name)
    for n, p in part.named_parameters():
        p.requires_grad_(n.startswith(trained))
    if not any(p.requires_grad for p in part.parameters()):
        pytest.skip(f"it has no {trained}")
    tokens, weights = grid(whole.config)
    scale = torch.full((len(whole.table),), 1 / 9)
    for model in (whole, part):
        model(tokens, weights, scale=scale).total.backward()
    own = dict(part.named_parameters())
    for n, p in whole.named_parameters():
        if own[n].requires_grad:
            assert p.grad is None and own[n].grad is None or torch.allclose(own[n].grad, p.grad, atol=1e-6), n
        else:
            assert own[n].grad is None, n
