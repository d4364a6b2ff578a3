"""What we export, the official classes load without a missing or left-over tensor, and compute the same with it.

Skipped where a package is not installed. The environments are those of golden/make.py, plus pytest and our own
dependencies (pyproject.toml):    python -m pytest tests/families/test_parity_exports.py -rs
"""

import json
import os
from pathlib import Path

import pytest
import torch
from test_moshi_family import columns
from test_parity import GATE, Golden, higgs_grid, logits, with_adapter

import lora
from checkpoint import export, load, save
from generation.decode_step import SampleConfig
from lora import LoraConfig
from sample import reply
from streams import delay
from training.run_state import consolidate

os.environ |= {"NO_TORCH_COMPILE": "1", "NO_CUDA_GRAPH": "1", "HF_HUB_OFFLINE": "1"}      # moshi reads them on import
EAGER = {"attn_implementation": "eager"}
SURPRISES = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def official(kind: type, folder: Path, **options: object) -> torch.nn.Module:
    """Load a folder with an official class; nothing may be missing or left over."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **EAGER, **options)
    assert not any(info[key] for key in SURPRISES), info
    return model.eval()


def needs(package: str, attribute: str) -> object:
    """An official class, or a skip that names what is not installed (older transformers lack the newer models)."""
    found = pytest.importorskip(package)
    if not hasattr(found, attribute):
        pytest.skip(f"this {package} has no {attribute}")
    return getattr(found, attribute)


@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied", "qwen3"])
@torch.no_grad()
def test_transformers_loads_qwen(name, tmp_path):
    needs("transformers", "Qwen3ForCausalLM")
    kind, case = needs("transformers", "AutoModelForCausalLM"), Golden(name)
    folder = export(load(case.write(tmp_path / "base")), tmp_path / "out", to="hf")
    assert error(official(kind, folder)(input_ids=case["ids"]).logits, case["logits"]) <= GATE


def higgs_inputs(case: Golden) -> dict[str, torch.Tensor]:
    return {"input_ids": case["ids"], "attention_mask": case["mask"], "audio_input_ids": case["audio"],
            "audio_input_ids_mask": case["audio_mask"]}


@torch.no_grad()
def test_transformers_loads_higgs(tmp_path):
    kind, case = needs("transformers", "HiggsAudioV2ForConditionalGeneration"), Golden("higgs")
    model = official(kind, export(load(case.write(tmp_path / "base")), tmp_path / "out", to="hf"), use_text_head=True)
    model.config.audio_token_id, model.config.audio_delay_token_id = 50, 52     # placeholders, which our grid does not have
    mask = case["mask"].bool()
    assert error(model(**higgs_inputs(case)).logits.unflatten(-1, (5, 14))[mask], case["audio_logits"][mask]) <= GATE


@pytest.mark.parametrize(("name", "config"), [
    ("qwen2", LoraConfig(rank=2, targets=("attn.q", "temporal.layers.1.ffn.*"), rslora=True, ranks=(("layers.1.attn.q", 3),))),
    ("qwen3", LoraConfig(rank=2, targets=("attn.*",), dora=True, alphas=(("layers.0.attn.v", 5.0),), train=("temporal.norm",))),
    ("higgs", LoraConfig(rank=2, targets=("attn.*", "audio_ffn.*", "audio_head"))),
    ("higgs", LoraConfig(rank=2, targets=("comprehensive",), train=("audio_head",)))])
@torch.no_grad()
def test_peft_loads_adapters(name, config, tmp_path):
    higgs = name == "higgs"
    kind, peft = needs("transformers", "HiggsAudioV2ForConditionalGeneration"), needs("peft", "PeftModel")
    kind, options = (kind, {"use_text_head": True}) if higgs else (needs("transformers", "AutoModelForCausalLM"), {})
    case = Golden(name)
    base = case.write(tmp_path / "base")
    torch.manual_seed(0)                                                        # of lora_A
    model = with_adapter(load(base), config)
    for p in lora.trained_parameters(model, config).values():
        p.mul_(1.1)
    theirs = peft.from_pretrained(official(kind, base, **options), export(model, tmp_path / "out", to="peft")).eval()
    if higgs:
        mask = case["mask"].bool()
        ours = logits(model, higgs_grid(case), mask.cumsum(1) - 1)[1].transpose(1, 2)[mask]
        answer = theirs(**higgs_inputs(case)).logits.unflatten(-1, (5, 14))[mask]
    else:
        ours, answer = logits(model, case["ids"][:, None])[0], theirs(input_ids=case["ids"]).logits
        assert error(answer, case["logits"]) > 0.1                              # the adapter is at work
    assert error(ours, answer) <= 2 * GATE


@pytest.mark.parametrize("name", ["boson_list", "boson_forward"])
@torch.no_grad()
def test_boson_loads_higgs(name, tmp_path):
    kind, case = needs("boson_multimodal.model.higgs_audio", "HiggsAudioModel"), Golden(name)
    model = official(kind, export(load(case.write(tmp_path / "base")), tmp_path / "out", to="boson"))
    model.audio_in_token_idx, model.audio_out_token_idx, ids, start = 49, 50, case["ids"], torch.tensor([0])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), label_ids=ids, audio_in_ids=case["audio_in"], audio_in_ids_start=start,
                audio_out_ids=case["audio_out"], audio_out_ids_start=start)
    assert error(out.logits[:, -case["text_logits"].shape[1] :], case["text_logits"]) <= GATE
    assert error(out.audio_logits.view(-1, 3, 18), case["audio_logits"]) <= GATE


def moshi(weights: Path, about: Path, **options: object) -> torch.nn.Module:
    get = needs("moshi.models.loaders", "get_moshi_lm")
    kwargs = json.loads(about.read_text())
    kwargs.pop("model_type")
    return get(weights, lm_kwargs=kwargs, device="cpu", dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("name", ["moshi", "moshi_steps"])
@torch.no_grad()
def test_moshi_loads_moshi(name, tmp_path):
    case = Golden(name)
    folder = export(load(case.write(tmp_path / "base")), tmp_path / "out", to="moshi")
    out = moshi(folder / "model.safetensors", folder / "config.json")(case["codes"])
    assert error(out.logits.nan_to_num(0.0), case["logits"]) <= GATE and error(out.text_logits[:, 0], case["text_logits"]) <= GATE


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_moshi_loads_our_adapter(fuse, tmp_path):
    case = Golden("moshi")
    base = case.write(tmp_path / "base")
    model = with_adapter(load(base), LoraConfig(rank=3, alpha=6.0, targets=("temporal.layers.*.attn.*", "depth.layers.1.*", "depth.input")))
    folder = export(model, tmp_path / "out", to="moshi-lora")
    adapted = moshi(base / "model.safetensors", folder / "config.json", lora_weights=folder / "lora.safetensors", fuse_lora=fuse)
    theirs = adapted(case["codes"])
    table, mask = model.table, case["text_mask"]
    text, audio = model(delay(case["codes"], table.delays, table.column("start")))
    assert error(text[mask], theirs.text_logits[:, 0][mask]) <= GATE
    for k, row in enumerate(table.audio_out):
        mask = case["mask"][:, k]
        assert error(audio[:, k].roll(-table.delays[row], 1)[mask], theirs.logits[:, k][mask]) <= GATE


@pytest.mark.parametrize("to", ["moshi", "moshi-lora"])
@torch.no_grad()
def test_moshi_loads_our_consolidated_folder(to, tmp_path):
    """The folder of a training run that stands where moshi-finetune's would: a whole model, or its adapter."""
    case = Golden("moshi")
    base = case.write(tmp_path / "base")
    model = with_adapter(load(base), LoraConfig(rank=3, alpha=6.0, targets=("temporal.*", "text_head", "depth.*")))
    run = save(model, tmp_path / "step_000500")
    folder = consolidate(tmp_path, run, to, 3, torch.float32)
    assert folder == tmp_path / "checkpoints/checkpoint_000500/consolidated"
    if to == "moshi":
        theirs = moshi(folder / "consolidated.safetensors", folder / "config.json")
    else:
        theirs = moshi(base / "model.safetensors", folder / "config.json", lora_weights=folder / "lora.safetensors", fuse_lora=False)
    text, _ = model(delay(case["codes"], model.table.delays, model.table.column("start")))
    out, mask = theirs(case["codes"]), case["text_mask"]
    assert error(text[mask], out.text_logits[:, 0][mask]) <= GATE and error(out.text_logits[:, 0][mask], case["text_logits"][mask]) > 0.1


@torch.no_grad()
def test_moshi_says_what_our_adapted_model_replies(tmp_path):
    """Its streaming generator with our adapter file, and `sample.reply`: the same greedy words and codes, both sides live."""
    case, LMGen = Golden("moshi"), needs("moshi.models", "LMGen")
    base = case.write(tmp_path / "base")
    model = with_adapter(load(base), LoraConfig(rank=3, alpha=6.0, targets=("temporal.*", "text_head", "depth.*")))
    folder = export(model, tmp_path / "out", to="moshi-lora")
    adapted = moshi(base / "model.safetensors", folder / "config.json", lora_weights=folder / "lora.safetensors", fuse_lora=False)
    generator, frames, user = LMGen(adapted, use_sampling=False), [], case["user"].flip(-1)
    with generator.streaming(len(user)):
        for t in range(user.shape[-1]):
            frames.append(generator.step(user[:, :, t : t + 1]))
    theirs = torch.cat([frame for frame in frames if frame is not None], -1)
    ours = reply(model, user, SampleConfig(temperature=0), skip_first_frame=True)
    assert torch.equal(ours[:, [0, *model.table.audio_out]], theirs)


def told(kind: type, model: torch.nn.Module, case: Golden) -> dict:
    """The package's condition tensors of a case."""
    return model.condition_provider.prepare_and_provide([kind(text=text) for text in GIVEN[case.name]])


GIVEN = {"hibiki": [{"description": "very_good"}, {"description": None}],
         "tts": [{"control": "ok", "cfg": "2.0"}, {"control": None, "cfg": "1.0"}]}


@pytest.mark.parametrize("fuse", [None, False, True])
@pytest.mark.parametrize("name", ["hibiki", "tts", "stt"])
@torch.no_grad()
def test_moshi_loads_its_relatives_and_their_adapters(name, fuse, tmp_path):
    """Whole models (fuse None), and adapters for every Linear: those of the narrow tables, conditions and extra heads too."""
    case, kind = Golden(name), needs("moshi.conditioners", "ConditionAttributes")
    ours = load(case.write(tmp_path / "base"))
    if fuse is None:
        folder = export(ours, tmp_path / "out", to="moshi")
        theirs = moshi(folder / "model.safetensors", folder / "config.json")
    else:
        ours = with_adapter(ours, LoraConfig(rank=3, alpha=6.0, targets=("*",)))
        folder = export(ours, tmp_path / "out", to="moshi-lora")
        files = (tmp_path / "base/model.safetensors", folder / "config.json")
        theirs = moshi(*files, lora_weights=folder / "lora.safetensors", fuse_lora=fuse)
    grid, table = columns(case, ours), ours.table
    if name == "stt":
        start = theirs._get_initial_token().expand(2, -1, -1)
        h, text = theirs.forward_text(torch.cat([start, case["codes"][..., :-1]], -1))
        extra = torch.stack([head(h).softmax(-1) for head in theirs.extra_heads], 1)
        assert error(ours.extra_odds(ours.hidden(grid[..., :-1])[0]), extra) <= GATE
        assert error(ours(grid)[0], text[:, 0]) <= GATE
        return
    out, (text, audio), mask = theirs(case["codes"], told(kind, theirs, case)), ours(grid), case["text_mask"]
    assert error(text[mask], out.text_logits[:, 0][mask]) <= 2 * GATE
    for k, row in enumerate(table.audio_out):
        mask = case["mask"][:, k]
        assert error(audio[:, k].roll(-table.delays[row], 1)[mask], out.logits[:, k][mask]) <= 2 * GATE


@torch.no_grad()
def test_moshi_loads_a_model_that_listens_to_voices(tmp_path):
    case, conditioners = Golden("voices"), pytest.importorskip("moshi.conditioners")
    ours = load(case.write(tmp_path / "base"))
    folder = export(ours, tmp_path / "out", to="moshi")
    theirs = moshi(folder / "model.safetensors", folder / "config.json")
    known = torch.ones(1, 5, dtype=torch.bool)
    given = theirs.condition_provider.prepare_and_provide([conditioners.ConditionAttributes(
        text={"control": "ok"}, tensor={"speaker_wavs": conditioners.TensorCondition(f[None], known)}) for f in case["features"]])
    out = theirs(case["codes"], given)
    assert error(out.logits.nan_to_num(0.0), case["logits"]) <= GATE and error(out.text_logits[:, 0], case["text_logits"]) <= GATE
