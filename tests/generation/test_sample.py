"""Sampling: rules, delays, ends, batches; what was trained comes back."""

from dataclasses import replace

import pytest
import torch
from tables import CONFIGS, END, START, aligned_table, clone_table, example, grid, sequential_example

from families.family import lay_out
from families.tiny import WordFeed
from generation.decode_step import SampleConfig, SamplingNoise, sample_ids
from kernels.sample import kept
from layers.architecture import ModelConfig, StackConfig
from model import MultistreamLM
from sample import generate, pad_left
from streams import Example, StreamTable, undelay

GREEDY = SampleConfig(temperature=0.0, max_frames=40)


def make(name: str) -> MultistreamLM:
    torch.manual_seed(5)
    return MultistreamLM(CONFIGS[name]).eval()


def prompt(table: StreamTable, seed: int) -> torch.Tensor:
    ex = example(table, seed)
    return lay_out(Example(ex.text, None, ex.starts, ex.reference), table)[0]


def frames(model: MultistreamLM, grid: torch.Tensor, config: SampleConfig = GREEDY, feed: object = None) -> torch.Tensor:
    return torch.stack(list(generate(model, grid, config, feed)), dim=-1)          # (B, K, n)


# ---- rules ----

def one(logits: list[float], **rules: float) -> list[bool]:
    """What the rules keep, as one number for all rows and as a number for each."""
    row = torch.tensor(logits)[None]
    left = kept(row, **rules)
    assert torch.equal(left, kept(row, **{name: torch.tensor([[value]]) for name, value in rules.items()}))
    return left[0].tolist()


def test_top_k_keeps_the_k_likeliest() -> None:
    assert one([0.0, 3.0, 1.0, 2.0], top_k=2) == [False, True, False, True]


def test_top_p_keeps_the_smallest_set_that_has_the_probability() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert one(logits, top_p=0.6) == [True, True, False, False] and one(logits, top_p=0.01) == [True, False, False, False]


def test_min_p_drops_what_is_unlikely_beside_the_likeliest() -> None:
    assert one(torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist(), min_p=0.25) == [True, True, True, False]


def test_rules_combine_top_k_before_top_p() -> None:
    assert one(torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist(), top_k=2, top_p=0.5) == [True, False, False, False]


def test_draws_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log()[None, None].expand(20000, 1, 3)
    drawn = sample_ids(logits, SampleConfig(temperature=2.0), slice(0, 1), SamplingNoise(0, 20000, 1, torch.device("cpu")))
    share = drawn.flatten().bincount(minlength=3) / 20000
    expected = torch.tensor([0.7, 0.2, 0.1]).sqrt()
    assert torch.allclose(share, expected / expected.sum(), atol=0.015)


def test_a_rule_may_differ_between_streams() -> None:
    logits = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]).expand(500, 2, 2)
    drawn = sample_ids(logits, SampleConfig(temperature=(9.0, 0.0, 5.0)), slice(1, 3), SamplingNoise(0, 500, 3, torch.device("cpu")))
    assert drawn[:, 0].eq(1).all() and 0.2 < drawn[:, 1].float().mean() < 0.8


def test_a_rule_of_the_wrong_length_is_named() -> None:
    with pytest.raises(ValueError, match="2 values"):
        list(generate(make("clone"), prompt(CONFIGS["clone"].table, 0), SampleConfig(temperature=(1.0, 1.0))))


def test_repetition_aware_sampling_redraws_what_was_drawn_too_often() -> None:
    logits = torch.tensor([5.0, 4.9, 0.0]).expand(400, 1, 3)
    config, noise = SampleConfig(temperature=0.0, ras_window=4, ras_repeats=2), SamplingNoise(0, 400, 1, torch.device("cpu"))
    stuck, fresh = torch.zeros(400, 1, 6, dtype=torch.long), torch.tensor([0, 0, 1, 1, 1, 0]).expand(400, 1, 6)
    assert sample_ids(logits, config, slice(0, 1), noise, fresh).eq(0).all()
    assert 0.3 < sample_ids(logits, config, slice(0, 1), noise, stuck).float().mean() < 0.7


# ---- the generator ----

@pytest.mark.parametrize("name", ["clone", "dual", "dual_list", "fast_forward", "tails", "depth", "depth_schedule", "window", "qwen"])
def test_greedy_sampling_equals_argmax_of_the_full_forward(name: str) -> None:
    model, table = make(name), CONFIGS[name].table
    head = model.depth.head.weight if model.config.depth else model.audio_head.weight.data.view(3, 18, -1)
    head.data[:, [START, END]] = 0.0                             # a logit of 0 never wins: the segment goes on
    start = prompt(table, 1)
    columns = start[None]
    for _ in range(12):                                          # the slow truth: re-read everything for each column
        probe = torch.cat([columns, torch.full((1, len(table), 1), -1)], dim=2)
        column = torch.full((len(table),), -1)
        n = columns.shape[2] - start.shape[1]                    # column of the audio segment, its start column being 0
        for q, k in enumerate(table.audio_out):
            probe[0, :, -1] = column
            best = model(probe)[1][0, q, -1].argmax()
            column[k] = START if n < 1 + q else best
        columns = torch.cat([columns, column[None, :, None]], dim=2)
    truth = undelay(columns[0, 1:, start.shape[1]:], [0, 1, 2])
    got = frames(model, start, SampleConfig(temperature=0.0, max_frames=12))[0, 1:]
    got = got[:, (got >= 0).all(0)]
    assert got.shape[1] == 9 and torch.equal(got, truth)


@pytest.mark.parametrize("name", ["clone", "dual", "fast_forward", "tails", "depth", "depth_schedule", "qwen"])
def test_sampling_under_autocast_computes_the_same(name: str) -> None:
    """As the evaluations of a bf16 run do: weights are fp32, what is not the fast way of a column multiplies in bf16."""
    model, start = make(name), prompt(CONFIGS[name].table, 1)
    with torch.autocast("cpu", torch.bfloat16):
        spoken = frames(model, start, SampleConfig(temperature=0.0, max_frames=12))
    tokens = torch.cat([start[None], spoken.clamp(min=-1)], 2)
    columns, hidden = tokens.shape[2], []
    for half in (True, False):
        cache = model.cache(1, columns)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            hidden.append(torch.cat([model.hidden(tokens[..., n : n + 1], torch.tensor([[n]]), cache=cache)[1] for n in range(columns)], 1))
    assert spoken.shape[2] > 1 and (hidden[0] - hidden[1]).abs().max() < 0.15              # bf16 keeps 8 bits of values near 3, many times


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["clone", "dual", "fast_forward", "tails", "depth"])
def test_batched_sampling_equals_single_sampling(name: str, temperature: float) -> None:
    model, table = make(name), CONFIGS[name].table
    prompts = [prompt(table, seed) for seed in (0, 1, 6)]
    config = SampleConfig(temperature=temperature, max_frames=14)
    together = frames(model, pad_left(prompts), config)
    for b, single in enumerate(prompts):
        alone = frames(model, single, SampleConfig(temperature=temperature, max_frames=14, seed=b))[0]
        assert torch.equal(together[b, :, : alone.shape[1]], alone) and (together[b, :, alone.shape[1]:] == -1).all()


def test_the_same_seed_gives_the_same_frames_and_another_one_others() -> None:
    model, start = make("clone"), prompt(CONFIGS["clone"].table, 0)
    a, b, c = (frames(model, start, SampleConfig(temperature=1.0, max_frames=20, seed=s)) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a[..., :5], c[..., :5])


def test_sampling_leaves_the_models_mode_and_the_global_generator_alone() -> None:
    model = make("clone").train()
    before = torch.get_rng_state()
    frames(model, prompt(model.table, 0), SampleConfig(temperature=1.0, max_frames=5))
    assert model.training and torch.equal(before, torch.get_rng_state())


def overfit(config: ModelConfig, ex: Example, steps: int = 250) -> MultistreamLM:
    torch.manual_seed(0)
    model = MultistreamLM(config)
    tokens, weights = (x[None] for x in lay_out(ex, config.table))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        sums = model(tokens, weights)
        (sums.nll.sum() / sums.weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if sums.nll.sum() / sums.weight.sum() < 1e-3:
            break
    return model


def roomy(config: ModelConfig) -> ModelConfig:
    """A smoke twin wide enough to learn a clip by heart."""
    return replace(config, temporal=replace(config.temporal, dim=64, ffn=128), depth=replace(config.depth, dim=48, ffn=96), dropout=0.0,
                   input_drop=0.0)


SMALL = StackConfig(dim=48, layers=2, heads=4, kv_heads=2, ffn=64)


@pytest.mark.parametrize("variant", ["parallel", "dual", "tails", "depth"])
def test_an_overfitted_clip_comes_back_exactly(variant: str) -> None:
    table = clone_table(3)
    switches = {"parallel": {}, "dual": {"dual_ffn": (0, 1)}, "tails": {"tail": 1},
                "depth": {"depth": StackConfig(dim=32, layers=2, heads=2, ffn=48, rope_theta=0.0, steps=3)}}
    ex = sequential_example(table, 4)
    model = overfit(ModelConfig(table, SMALL, **switches[variant]), ex)
    got = frames(model, lay_out(Example(ex.text, reference=ex.reference), table)[0])
    codes = got[0, 1:, (got[0, 1:] >= 0).all(0)]
    assert torch.equal(codes, ex.codes)
    assert got[0, 0].tolist()[-1] == 31 and (got[0, 0] >= 0).sum() == 1          # then the id that ends speech, once


def test_an_overfitted_aligned_clip_comes_back_exactly() -> None:
    table = aligned_table(3)
    ex = example(table, 3)
    model = overfit(ModelConfig(table, SMALL), ex, 400)
    got = frames(model, lay_out(Example(ex.text), table)[0], feed=WordFeed([ex.text], table))
    codes = got[0, 5:, :]
    assert torch.equal(codes[:, (codes >= 0).all(0)], ex.codes)
    truth, _ = lay_out(ex, table)
    assert torch.equal(got[0, :5], undelay(truth, table.delays)[:5, : got.shape[-1]])     # words advance where they did


def test_a_prompt_inside_a_segment_is_continued() -> None:
    table = clone_table(3)
    ex = sequential_example(table, 4)
    model = overfit(ModelConfig(table, SMALL), ex)
    whole, _ = lay_out(ex, table)
    first = int((whole[0] == 30).nonzero()[-1]) + 1
    for cut in range(first + 2, whole.shape[1] - 3):
        got = frames(model, whole[:, :cut])[0, 1:]
        got = got[:, (got >= 0).all(0)]
        assert got.shape[1] == 0 or torch.equal(got, ex.codes[:, -got.shape[1]:]), cut


def forced_logits(model: MultistreamLM, row_of_step: dict[int, int]) -> None:
    """Make the audio head prefer END in codebook q at its n-th call, and code 1 elsewhere."""
    calls = {"n": 0}

    def head(h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(3, h.shape[0], 18)
        logits[:, :, 1] = 1.0
        if calls["n"] in row_of_step:
            logits[row_of_step[calls["n"]], :, END] = 2.0
        calls["n"] += 1
        return logits

    model.audio_logits = head


@pytest.mark.parametrize(("row", "call", "frames_left"), [(0, 5, 4), (1, 5, 3), (2, 5, 2)])
def test_an_end_in_one_codebook_ends_all_in_the_same_frame(row: int, call: int, frames_left: int) -> None:
    model = make("clone")
    forced_logits(model, {call: row})                    # call n samples column n: codebook q holds frame n - 1 - q there
    got = frames(model, prompt(model.table, 0))[0]
    assert ((got[1:] >= 0).all(0)).sum() == frames_left


def test_length_cap_ends_what_never_ends() -> None:
    model = make("clone")
    forced_logits(model, {})
    assert frames(model, prompt(model.table, 0), SampleConfig(temperature=0.0, max_frames=11)).shape[-1] == 11


def test_words_layout_may_not_end_before_its_last_word() -> None:
    model, table = MultistreamLM(CONFIGS["words"]).eval(), CONFIGS["words"].table

    def head(h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(3, h.shape[0], 18)
        logits[:, :, END] = 1.0                          # would end at once if it were allowed to
        return logits

    model.audio_logits = head
    model.text_head.forward = lambda x: torch.tensor([0.0, 1.0]).expand(*x.shape[:-1], 2)      # advance in every frame
    feed = WordFeed([torch.tensor([5, 6, 7, 8])], table)
    got = frames(model, lay_out(Example(torch.tensor([5, 6, 7, 8])), table)[0], feed=feed)
    assert feed.may_end().all() and got[0, 0].tolist() == [5]          # audio lags: it ends as soon as word 4 is current


def test_generation_of_a_text_family() -> None:
    model = make("text")
    ids = torch.tensor([[3, 4, 5]])
    got = frames(model, ids, SampleConfig(temperature=0.0, max_frames=6))[0, 0]
    for n, token in enumerate(got.tolist()):
        assert token == model(torch.cat([ids[0], got[:n], ids[0, :1]])[None, None])[0][0, -1].argmax()


def test_a_prompt_with_other_rows_is_named() -> None:
    with pytest.raises(ValueError, match="the prompt has 2 rows, the model's table 4"):
        list(generate(make("clone"), torch.zeros(2, 3, dtype=torch.long)))


def test_prompts_of_training_and_sampling_are_the_same_function() -> None:
    tokens, _ = grid(CONFIGS["clone"], 2)
    start = prompt(CONFIGS["clone"].table, 2)
    assert torch.equal(tokens[0, :, : start.shape[1]], start)
