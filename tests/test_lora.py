"""Adapters: zero at first, exact when merged, strict when loaded."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import call
from tables import CONFIGS, grid

import lora
from families.qwen import QWEN2_5_1_5B
from generation.decode_step import SampleConfig
from layers.int8_base import quantize
from lora import LoraConfig, adapters, inject, load_state, matches, merge, norms, state, strip, unmerge
from model import MultistreamLM
from sample import generate

EVERYWHERE = LoraConfig(rank=3, alpha=7.0, targets=("attn.*", "*ffn.*", "*head"))


def make(name: str = "dual", config: LoraConfig | None = None, trained: bool = True) -> MultistreamLM:
    torch.manual_seed(0)
    model = MultistreamLM(CONFIGS[name]).eval()
    if config is not None:
        inject(model, config)
        for _, _, adapter in adapters(model) if trained else ():
            torch.nn.init.normal_(adapter.lora_B, std=0.05)
            if adapter.lora_magnitude is not None:
                adapter.lora_magnitude.data.mul_(1 + 0.2 * torch.rand(adapter.lora_magnitude.shape))
    return model


def out(model: MultistreamLM) -> torch.Tensor:
    with torch.no_grad():
        return model(grid(model.config)[0])[1]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["dual", "depth", "depth_schedule", "tails", "words"])
def test_a_fresh_adapter_changes_nothing(name: str, dora: bool) -> None:
    plain, adapted = make(name), make(name, replace(EVERYWHERE, targets=("*",), dora=dora), trained=False)
    assert torch.allclose(out(plain), out(adapted), atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["dual", "depth", "depth_schedule", "tails", "qwen"])
def test_merged_lora_equals_adapter(name: str, dora: bool, rslora: bool) -> None:
    model = make(name, replace(EVERYWHERE, targets=("*",), dora=dora, rslora=rslora))
    before = out(model)
    merge(model)
    assert (out(model) - before).abs().max() < 1e-5 and (before - out(make(name))).abs().max() > 1e-3


def test_unmerge_restores_every_bit() -> None:
    model = make(config=EVERYWHERE)
    before = {n: p.clone() for n, p in model.named_parameters()}
    unmerge(merge(model))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_merging_twice_is_merging_once() -> None:
    model = merge(make(config=EVERYWHERE))
    once = model.text_head.weight.clone()
    assert torch.equal(merge(model).text_head.weight, once)


def test_strip_leaves_a_plain_model_with_the_same_logits() -> None:
    model = make(config=EVERYWHERE)
    before = out(model)
    assert (out(strip(model)) - before).abs().max() < 1e-5 and not list(adapters(model))
    assert model.state_dict().keys() == make().state_dict().keys()


def test_update_is_scale_times_b_times_a() -> None:
    model = make(config=replace(EVERYWHERE, rslora=True))
    _, linear, adapter = next(adapters(model))
    x = torch.randn(5, linear.weight.shape[1])
    expected = x @ (linear.weight + 7.0 / 3**0.5 * adapter.lora_B @ adapter.lora_A).T
    assert torch.allclose(linear(x), expected, atol=1e-5)


def test_dora_normalises_rows_and_scales_them_by_the_magnitude() -> None:
    model = make(config=replace(EVERYWHERE, dora=True))
    _, linear, adapter = next(adapters(model))
    full = linear.weight + 7.0 / 3 * adapter.lora_B @ adapter.lora_A
    expected = full / full.norm(dim=1, keepdim=True) * adapter.lora_magnitude[:, None]
    assert torch.allclose(linear(torch.eye(linear.weight.shape[1])), expected.T, atol=1e-5)


def test_only_adapters_and_named_modules_train() -> None:
    model = make(config=replace(EVERYWHERE, targets=("attn.q",), train=("audio_head", "embed.audio")))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"audio_head.weight", "embed.audio.weight"}
    assert len([n for n in trained if "lora_" in n]) == 2 * 3


def test_frozen_weights_get_no_gradient() -> None:
    model = make(config=EVERYWHERE)
    model(*grid(model.config)).nll.sum().backward()
    assert model.temporal.layers[0].attn.q.weight.grad is None
    audio_side = [a for path, _, a in adapters(model) if "audio" in path or "attn" in path]
    assert all(a.lora_A.grad.abs().sum() > 0 and a.lora_B.grad.abs().sum() > 0 for a in audio_side)


@pytest.mark.parametrize(("pattern", "path", "hit"), [
    ("attn.*", "temporal.layers.0.attn.q", True), ("ffn.*", "temporal.layers.0.audio_ffn.up", False),
    ("*ffn.*", "temporal.layers.0.audio_ffn.up", True), ("temporal.*attn.q", "temporal.layers.11.attn.q", True),
    ("temporal.*attn.q", "depth.layers.0.attn.q", False), ("text_head", "text_head", True), ("head", "text_head", False),
    ("attn.[qv]", "depth.layers.1.attn.v", True), ("layers.1.attn.q", "temporal.layers.11.attn.q", False)])
def test_patterns_are_globs_that_begin_at_a_dot(pattern: str, path: str, hit: bool) -> None:
    assert matches(path, pattern) is hit


@pytest.mark.parametrize("config", [replace(EVERYWHERE, targets=("attn.w",)), replace(EVERYWHERE, train=("audio_tower",)),
                                    replace(EVERYWHERE, ranks=(("ffn.q", 4),)), replace(EVERYWHERE, targets=("attn.*", "mlp.*"))])
def test_a_pattern_that_hits_nothing_raises_and_lists_what_exists(config: LoraConfig) -> None:
    with pytest.raises(ValueError, match=r"matches no .*temporal\.layers\.N\.attn\.q"):
        inject(make(), config)


def test_rank_and_alpha_patterns() -> None:
    model = make(config=replace(EVERYWHERE, ranks=(("attn.q", 5),), alphas=(("audio_ffn.*", 1.0),)))
    by_path = {path: a for path, _, a in adapters(model)}
    assert by_path["temporal.layers.1.attn.q"].rank == 5 and by_path["temporal.layers.1.attn.k"].rank == 3
    assert by_path["temporal.layers.1.audio_ffn.up"].scale == pytest.approx(1 / 3)
    assert by_path["temporal.layers.1.attn.q"].scale == pytest.approx(7 / 5)


def test_rates_name_parts_beside_adapters_and_the_first_match_holds() -> None:
    model = make(config=LoraConfig(rank=2, targets=("attn.*",), train=("embed.*",)))
    factors = lora.rate_factors(model, (("layers.0.*", 0.0), ("adapter", 0.5), ("embed.text", 0.1)))
    trained = {name: p.requires_grad for name, p in model.named_parameters() if name in factors}
    assert {n: f for n, f in factors.items() if "lora" not in n} == {"embed.text.weight": 0.1, "embed.audio.weight": 1.0}
    assert {f for n, f in factors.items() if "layers.0" in n} == {0.0} and {f for n, f in factors.items() if "layers.1" in n} == {0.5}
    assert trained == {name: factor > 0 for name, factor in factors.items()}
    for rates, words in ((("ffn.*", 0.5),), "matches nothing that is trained"), ((("*", 0.0),), "so nothing is trained"):
        with pytest.raises(ValueError, match=words):
            lora.rate_factors(model, rates)


def test_qwen_attention_adapters_have_their_published_count() -> None:
    with torch.device("meta"):
        model = inject(MultistreamLM(QWEN2_5_1_5B), LoraConfig(rank=8, targets=("attn.*",)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_179_072


def test_norms_report_zero_for_an_idle_adapter() -> None:
    assert set(norms(make(config=EVERYWHERE, trained=False)).values()) == {0.0}
    assert min(norms(make(config=EVERYWHERE)).values()) > 0.01
    assert norms(merge(make(config=EVERYWHERE))) == pytest.approx(norms(make(config=EVERYWHERE)))


def test_dropout_acts_in_training_only() -> None:
    model = make(config=replace(EVERYWHERE, dropout=0.5))
    assert torch.equal(out(model), out(model))
    model.train()
    assert not torch.equal(out(model), out(model))


def test_disabled_adapters_give_the_base_model() -> None:
    model = make(config=EVERYWHERE)
    for _, _, adapter in adapters(model):
        adapter.enabled = False
    assert torch.equal(out(model), out(make()))


def test_state_round_trip() -> None:
    config = replace(EVERYWHERE, dora=True, train=("embed.text",))
    source, target = make(config=config), make(config=config, trained=False)
    load_state(target, config, state(source, config), "memory")
    assert torch.equal(out(source), out(target))


@pytest.mark.parametrize(("harm", "message"), [
    (lambda s: s.pop(next(iter(s))), "1 tensors missing"), (lambda s: s.update(x=torch.zeros(1)), "1 unexpected"),
    (lambda s: s[next(n for n in s if n.endswith("lora_B"))].zero_(), "all zero"),
    (lambda s: s.update({next(iter(s)): torch.zeros(2, 2)}), "rank or base model differ")])
def test_loading_is_strict(harm: object, message: str) -> None:
    model = make(config=EVERYWHERE)
    tensors = {n: t.clone() for n, t in state(model, EVERYWHERE).items()}
    harm(tensors)
    before = out(model)
    with pytest.raises(ValueError, match=message):
        load_state(model, EVERYWHERE, tensors, "memory")
    assert torch.equal(out(model), before)                     # a refused adapter leaves nothing behind


def test_an_untrained_adapter_loads_only_when_asked() -> None:
    model = make(config=EVERYWHERE, trained=False)
    load_state(model, EVERYWHERE, {n: t.clone() for n, t in state(model, EVERYWHERE).items()}, "memory", idle=state(model, EVERYWHERE))


def test_outline_folds_layer_numbers() -> None:
    assert lora.outline({"a.0.q": 1, "a.12.q": 1, "b": 1}) == "a.N.q, b"


# ---- a base of 8 bits ----

def dequantized(model: MultistreamLM) -> MultistreamLM:
    """The same model in fp32, with the weights that 8 bits hold."""
    for module in lora.linears(model).values():
        if module.row_scale is not None:
            held = lora.dequantized(module.weight, module.row_scale)
            module.weight, module.row_scale = torch.nn.Parameter(held, requires_grad=False), None
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["dual", "depth", "depth_schedule", "qwen"])
def test_adapters_on_8_bits_train_as_on_the_weights_that_they_hold(name: str, dora: bool) -> None:
    found = []
    for plain in (False, True):
        model = quantize(make(name, replace(EVERYWHERE, targets=("attn.*", "ffn.*"), dora=dora)))
        assert model.temporal.layers[0].ffn.down.weight.dtype == torch.int8
        model = dequantized(model) if plain else model
        nll = model(*grid(model.config)).nll
        nll.sum().backward()
        found.append([nll.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))
    exact = make(name, replace(EVERYWHERE, targets=("attn.*", "ffn.*"), dora=dora))(*grid(CONFIGS[name])).nll
    assert not torch.equal(exact, found[0][0]) and torch.allclose(exact, found[0][0], rtol=0.05)


@pytest.mark.parametrize("name", ["dual", "depth", "text"])
def test_8_bits_sample_what_the_weights_that_they_hold_sample(name: str) -> None:
    drawn = []
    for plain in (False, True):
        model = quantize(make(name).requires_grad_(False))
        model = dequantized(model) if plain else model
        prompt = grid(CONFIGS[name])[0][0, :, :4]
        drawn.append(torch.stack(list(generate(model, prompt, SampleConfig(temperature=0, max_frames=8))), -1))
    assert torch.equal(*drawn)


def test_what_is_trained_or_shared_is_not_quantized() -> None:
    model = quantize(make("text", LoraConfig(rank=2, targets=("attn.*",), train=("ffn.up",))))
    assert model.text_head.weight is model.embed["text"].weight and model.text_head.row_scale is None       # tied
    ffn = model.temporal.layers[0].ffn
    assert ffn.up.weight.dtype == torch.float32 and ffn.down.weight.dtype == torch.int8
    with pytest.raises(ValueError, match="nothing can be merged"):
        merge(model)
    with pytest.raises(ValueError, match="frozen, and here none is"):
        quantize(make("text"))


def test_a_run_with_a_base_of_8_bits_trains_and_resumes(tiny_run, tmp_path) -> None:
    run = ("train.py", tiny_run.parent / "tiny_run.py", "--lora.rank=2", "--lora.targets=attn.*", "--quantize=int8", f"--out={tmp_path}/q")
    assert call(*run, "--steps=2")[0] == 0 and call(*run)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "q/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    rc, _, err = call("train.py", tiny_run.parent / "tiny_run.py", "--quantize=int8", f"--out={tmp_path}/x")
    assert rc == 2 and "add adapters" in err


def test_a_run_speaks_with_weights_of_8_bits(tiny_run, tmp_path) -> None:
    options = (f"--ckpt={tiny_run}", "--text=one two", f"--out={tmp_path}/x.wav", "--max_frames=6")
    rc, said, wrong = call("sample.py", *options, "--quantize=int8")
    assert rc == 0 and "x.wav" in said and (tmp_path / "x.wav").is_file(), said + wrong
    rc, _, wrong = call("sample.py", *options, "--quantize=int4")
    assert rc == 2 and "neither empty nor int8" in wrong
    rc, _, wrong = call("sample.py", *options, "--graphs=on")
    assert rc == 2 and "graphs=on: the model is not on a CUDA device; use graphs=auto" in wrong
