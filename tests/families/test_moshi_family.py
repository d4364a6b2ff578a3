"""Hibiki, the recogniser and the speaking model: what golden/make_moshi.py had the moshi package compute, ours computes too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import ROOT, call
from safetensors.torch import load_file
from test_parity import Golden, check, same_tensors, with_adapter
from torch import Tensor

from checkpoint import export, load
from corpus.bundled import demo_dialogues
from families.formats import config_differences
from families.moshi import FORMAT, HIBIKI_1B, HIBIKI_2B, STT_1B, STT_2_6B, TTS_1_6B
from generation.decode_step import SampleConfig
from layers.conditioning import condition_column
from lora import LoraConfig
from loss import LossConfig, loss_scale
from model import MultistreamLM
from options import run_config
from sample import generate, reply
from streams import codebooks, delay

GREEDY = SampleConfig(temperature=0)
CHOICES = dict.fromkeys(("moshi", "moshi_steps", "moshi_lora", "moshi_guided", "stt"), ("", "")) | {
    "hibiki": ("description=very_good", ""), "tts": ("control=ok,cfg=2.0", "cfg=1.0"), "voices": ("control=ok", "control=ok")}


def load_case(name: str, folder: Path) -> tuple[Golden, MultistreamLM]:
    case = Golden(name)
    return case, load(case.write(folder))


def conditions(model: MultistreamLM, name: str) -> Tensor:
    return torch.stack([condition_column(model.table, text) for text in CHOICES[name]])                     # (B, C, 1)


def columns(case: Golden, model: MultistreamLM) -> Tensor:
    """The package's codes (B, 1 + Q, T), its two texts in one, as our grid (B, K, T + 1)."""
    codes, table, size = case["codes"], model.table, model.table.streams[0].vocab
    texts = codes[:, :1]
    if model.config.demux:
        texts = torch.cat([torch.where(texts < 0, -1, texts % size), torch.where(texts < 0, -1, texts // size - 1)], 1)
    held = conditions(model, case.name)
    start = table.column("start").repeat(2, 1, 1)
    start[:, table.conditions] = held
    return delay(torch.cat([texts, held.expand(-1, -1, codes.shape[-1]), codes[:, 1:]], 1), table.delays, start)


# ---- logits ----

@pytest.mark.parametrize("name", ["hibiki", "tts"])
@torch.inference_mode()
def test_logits_equal_moshi(name, tmp_path):
    case, model = load_case(name, tmp_path)
    text, audio = model(columns(case, model))
    check(name, text[case["text_mask"]], case["text_logits"][case["text_mask"]])
    for k, row in enumerate(model.table.audio_out):
        mask = case["mask"][:, k]
        check(name, audio[:, k].roll(-model.table.delays[row], 1)[mask], case["logits"][:, k][mask])


@torch.inference_mode()
def test_the_recogniser_and_its_extra_heads_equal_moshi(tmp_path):
    case, model = load_case("stt", tmp_path)
    grid = columns(case, model)
    check("stt", model(grid)[0], case["text_logits"])
    check("stt, extra heads", model.extra_odds(model.hidden(grid[..., :-1])[0]), case["extra"])
    assert model(grid)[1] is None and not model.extra_head.weight.requires_grad


@torch.inference_mode()
def test_voices_are_heard_as_moshi_hears_them(tmp_path):
    """Logits, greedy frames and guided ones; without features every layer listens to the learnt one."""
    case, model = load_case("voices", tmp_path)
    heard = model.voice(case["features"], torch.ones(2, 5, dtype=torch.bool))
    text, audio = model(columns(case, model), voice=heard)
    check("voices", text[case["text_mask"]], case["text_logits"][case["text_mask"]])
    for k, row in enumerate(model.table.audio_out):
        mask = case["mask"][:, k]
        check("voices", audio[:, k].roll(-model.table.delays[row], 1)[mask], case["logits"][:, k][mask])
    prompt = model.table.column("start").repeat(2, 1, 1)
    prompt[:, model.table.conditions] = conditions(model, "voices")
    for wanted, cfg in (("frames", 1.0), ("guided", 2.0)):
        spoken = list(generate(model, prompt, SampleConfig(temperature=0, cfg=cfg, max_frames=12), voice=case["features"]))
        assert torch.equal(torch.stack(spoken, -1)[:, [0, *model.table.audio_out]], case[wanted])
    nobody = torch.stack(list(generate(model, prompt, SampleConfig(temperature=0, max_frames=12))), -1)
    assert not torch.equal(nobody[:, [0, *model.table.audio_out]], case["frames"])
    adapted = with_adapter(model, LoraConfig(rank=2, targets=("text_head",)))
    with pytest.raises(ValueError, match="no adapters for models that listen to voices"):
        export(adapted, tmp_path / "x", to="moshi-lora")
    assert load(export(adapted, tmp_path / "merged", to="moshi")).config == model.config


@torch.inference_mode()
def test_the_names_of_transformers(tmp_path):
    """Read, computed, written back bit for bit, and turned into the package's own names."""
    case, model = load_case("moshi_hf", tmp_path / "base")
    text, audio = model(case["columns"])
    check("moshi, transformers", text, case["text_logits"])
    check("moshi, transformers", audio.permute(0, 2, 1, 3), case["logits"])
    written = load_file(export(model, tmp_path / "hf", to="hf") / "model.safetensors")
    assert written.keys() == case.weights.keys() and all(torch.equal(t, case.weights[n]) for n, t in written.items())
    for to in ("hf", "moshi"):
        again = load(export(model, tmp_path / to, to=to))
        assert same_tensors(again, model) and not config_differences(again.config, model.config)
    case.weights |= {"audio_encoder.x": torch.zeros(2), "surplus": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"0 tensors missing \[\], 1 unexpected \['surplus'\]"):
        load(case.write(tmp_path / "more"))
    with pytest.raises(ValueError, match="has no name in the layout moshi_hf"):
        export(load_case("hibiki", tmp_path / "hibiki")[1], tmp_path / "x", to="hf")


# ---- greedy frames ----

def test_hibiki_frames_equal_lmgen_with_and_without_guidance(tmp_path):
    case, model = load_case("hibiki", tmp_path)
    given = torch.stack([condition_column(model.table, f"description={value}") for value in ("very_good", "bad")])
    rows = [0, *model.table.audio_out]
    for wanted, cfg in (("frames", 1.0), ("guided", 2.5)):
        frames = reply(model, case["user"], SampleConfig(temperature=0, cfg=cfg), skip_first_frame=True, conditions=given)
        assert torch.equal(frames[:, rows], case[wanted])
        assert torch.equal(frames[:, 1], given[:, 0].expand(-1, frames.shape[-1]))
    assert not torch.equal(case["frames"], case["guided"])
    other = reply(model, case["user"], GREEDY, skip_first_frame=True, conditions=given.flip(0))
    assert not torch.equal(other[:, rows], case["frames"])


def test_recognised_text_equals_lmgen(tmp_path):
    case, model = load_case("stt", tmp_path)
    assert torch.equal(reply(model, case["user"], GREEDY, skip_first_frame=True)[:, :1], case["frames"])


def test_spoken_frames_equal_lmgen_with_a_text_that_lies_ahead(tmp_path):
    """The second text row is given column by column; the package packs it into the first."""
    case, model = load_case("tts", tmp_path)
    given = torch.full((2, len(model.table), 12), -2)
    given[:, 1] = case["ahead"]
    prompt = model.table.column("start").repeat(2, 1, 1)
    prompt[:, model.table.conditions] = conditions(model, "tts")
    frames = torch.stack(list(generate(model, prompt, SampleConfig(temperature=0, max_frames=12), given=given)), -1)
    texts = case["frames"][:, 0]
    assert torch.equal(frames[:, 0], texts % 31) and torch.equal(frames[:, 1], texts // 31 - 1)
    assert torch.equal(frames[:, model.table.audio_out], case["frames"][:, 1:])


def test_guidance_without_text_and_without_first_frames_equals_lmgen(tmp_path):
    """The user's rows have holes: -1 is heard as nothing."""
    case, model = load_case("moshi_guided", tmp_path)
    rows, user = [0, *model.table.audio_out], case["user"]
    assert torch.equal(reply(model, user, GREEDY, skip_first_frame=True)[:, rows], case["plain"])
    frames = reply(model, user, SampleConfig(temperature=0, cfg=3.0, cfg_no_text=True), skip_first_frame=True)
    assert torch.equal(frames[:, rows], case["no_text"]) and not torch.equal(case["no_text"], case["plain"])
    for n, hidden in enumerate((3, 5)):
        frames = reply(model, user[n : n + 1], SampleConfig(temperature=0, cfg=2.0, cfg_hide=hidden), skip_first_frame=True)
        assert torch.equal(frames[:, rows], case["masked"][n : n + 1])


def test_guidance_wants_something_to_leave_out(tmp_path):
    _, model = load_case("moshi_guided", tmp_path)
    with pytest.raises(ValueError, match="has no condition, add --cfg_no_text"):
        next(generate(model, model.table.column("start"), SampleConfig(cfg=2.0)))


def test_given_tokens_are_kept_and_what_is_free_is_drawn(tmp_path):
    """A whole reply given back gives itself; with a text row of its own the rest is what teacher forcing predicts."""
    case, model = load_case("moshi_guided", tmp_path)
    table, user = model.table, case["user"][..., 1:]
    frames = reply(model, user, GREEDY)
    given = delay(frames, table.delays, table.column("start"))[..., 1:]
    assert torch.equal(reply(model, user, GREEDY, given=given), frames)
    forced = torch.full_like(given, -2)
    forced[:, 0], forced[:, 2, 3:6] = 7, -1                            # words of mine; a codebook that is not there for a while
    said = reply(model, user, GREEDY, given=forced)
    assert (said[:, 0] == 7).all() and (said[:, 2, 2:5] == -1).all() and not torch.equal(said[:, 1:4], frames[:, 1:4])
    with torch.inference_mode():
        audio = model(delay(said, table.delays, table.column("start")))[1]
    for k, row in enumerate(table.audio_out):
        lag = table.delays[row]
        kept = said[:, row, : said.shape[-1] - lag]
        assert torch.equal(audio[:, k].argmax(-1)[:, lag:][kept >= 0], kept[kept >= 0])


# ---- an adapter that the package wrote ----

@pytest.mark.parametrize("embeddings", [False, True])
def test_an_adapter_of_moshi_finetune_equals_moshi(embeddings, tmp_path):
    """Unmerged, merged and exported; with `ft_embed` the file holds whole embeddings too."""
    case = Golden("moshi_lora")
    base = Golden("moshi").write(tmp_path / "base")
    if not embeddings:
        case.weights = {n: t for n, t in case.weights.items() if "lora" in n}
    model = load(base, adapter=case.write(tmp_path / "adapter", "lora.safetensors"))
    assert (model.lora.rank, model.lora.alpha, bool(model.lora.train)) == (3, 4.5, embeddings)
    compare(case, model, "embedded_" if embeddings else "", "moshi adapter")
    merged = load(export(model, tmp_path / "merged", to="moshi"))
    compare(case, merged, "fused_" if embeddings else "", "moshi adapter, merged")
    back = export(model, tmp_path / "back", to="moshi-lora")
    written = load_file(back / "lora.safetensors")
    assert written.keys() == case.weights.keys() and all(torch.equal(t, case.weights[n]) for n, t in written.items())
    if not embeddings:
        assert torch.equal(reply(model, case["user"], GREEDY, skip_first_frame=True)[:, [0, *model.table.audio_out]], case["frames"])


@torch.inference_mode()
def compare(case: Golden, model: MultistreamLM, prefix: str, name: str) -> None:
    """Logits up to 8 here: each side is up to 1e-5 from what double precision gives, ours by a way that depends on the processor."""
    text, audio = model(columns(case, model))
    check(name, text, case[f"{prefix}text_logits"], 2e-5)
    for k, row in enumerate(model.table.audio_out):
        mask = case["mask"][:, k]
        check(name, audio[:, k].roll(-model.table.delays[row], 1)[mask], case[f"{prefix}logits"][:, k][mask], 2e-5)


@pytest.mark.parametrize("name", ["moshi", "moshi_steps", "hibiki"])
def test_the_loss_is_that_of_moshi_finetune_on_moshis_logits(name, tmp_path):
    """Its weights: the semantic codebook a hundredfold, padding half, nothing where there is no token."""
    case, model = load_case(name, tmp_path)
    table, codes = model.table, case["codes"]
    wanted = 0.0
    for logits, target, mask, kind in ((case["text_logits"][:, None], codes[:, :1], case["text_mask"], "text"),
                                       (case["logits"], codes[:, 1 : 1 + len(table.audio_out)], case["mask"], "audio")):
        nll = F.cross_entropy(logits.double().movedim(-1, 1), target.clamp(min=0), reduction="none")
        mask = mask[:, None] if kind == "text" else mask
        weight = mask * (torch.where((target == 3) | (target == 0), 0.5, 1.0) if kind == "text" else
                         torch.tensor([100.0] + [1.0] * (target.shape[1] - 1))[:, None])
        wanted += (nll * weight).sum() / weight.sum()
    grid = columns(case, model)
    weights = torch.zeros(grid.shape)
    weights[:, 0, 1:] = torch.where((grid[:, 0, 1:] == 3) | (grid[:, 0, 1:] == 0), 0.5, 1.0) * (grid[:, 0, 1:] >= 0)
    for k, row in enumerate(table.audio_out):
        late = 1 + table.delays[row]
        weights[:, row, late:] = (100.0 if k == 0 else 1.0) * (grid[:, row, late:] >= 0)
    with torch.inference_mode():
        sums = model(grid, weights)
    assert abs(float((sums.nll * loss_scale(sums.weight, table, LossConfig())).sum()) - float(wanted)) < 1e-5


# ---- sizes ----

@pytest.mark.parametrize(("config", "count"), [(HIBIKI_2B, 3_729_761_280 + 32 * 16 + 16 * 2560 + 2560), (STT_1B, 989_253_632),
                                               (STT_2_6B, 2_617_118_720), (HIBIKI_1B, 1_799_907_840),
                                               (TTS_1_6B, 1_836_550_272 - 1024 * 128)])
def test_parameters_are_those_of_the_released_models(config, count):
    """Hibiki 2B: what the package counts, and the condition's table, its Linear and the vector of no choice.

    TTS: the package makes a Linear that it never uses.
    """
    with torch.device("meta"):
        model = MultistreamLM(config)
    assert model.count_parameters() == count
    about = FORMAT.write(config, "bfloat16")
    assert not config_differences(config, FORMAT.read(about, {}))


# ---- files ----

@pytest.mark.parametrize("name", ["hibiki", "stt", "tts", "voices"])
def test_official_files_are_read_and_written_back(name, tmp_path):
    case, model = load_case(name, tmp_path / "base")
    folder = export(model, tmp_path / "back", to="moshi")
    again = load(folder)
    assert same_tensors(again, model) and not config_differences(model.config, again.config)
    assert json.loads((folder / "config.json").read_text())["model_type"] == case.config["model_type"]
    assert same_tensors(load(export(model, tmp_path / "ours")), model)


@pytest.mark.parametrize("name", ["hibiki", "stt", "tts"])
def test_their_adapters_read_back_exactly(name, tmp_path):
    targets = {"hibiki": ("embed.condition_description.out", "depth.*"), "stt": ("extra_head", "text_head"), "tts": ("*.out", "depth.head")}
    case, base = load_case(name, tmp_path / "base")
    model = with_adapter(base, LoraConfig(rank=3, alpha=6.0, targets=targets[name]))
    assert same_tensors(load(tmp_path / "base", adapter=export(model, tmp_path / "lora", to="moshi-lora")), model)


@pytest.mark.parametrize(("change", "words"), [
    ({"fuser": {"sum": [], "cross": ["description"]}}, r"cross = \['description'\]"), ({"fuser": {"sum": []}}, "of which .* are fused"),
    ({"conditioners": {"description": {"type": "tensor"}}}, "type = 'tensor'"), ({"cross_attention": True}, "cross_attention = True")])
def test_what_cannot_be_computed_is_refused_by_name(change, words, tmp_path):
    case = Golden("hibiki")
    case.config |= change
    with pytest.raises(ValueError, match=words):
        load(case.write(tmp_path))


def test_conditions_are_chosen_by_name(tmp_path):
    table = load_case("hibiki", tmp_path)[1].table
    assert condition_column(table, "description=good").tolist() == [[3]] and condition_column(table, "").tolist() == [[7]]
    for text, words in (("description=fine", "choose one of very_bad, bad, neutral"), ("voice=x", "condition 'voice' is unknown")):
        with pytest.raises(ValueError, match=words):
            condition_column(table, text)


def test_narrow_tables_without_a_second_text_take_adapters_too(tmp_path):
    """A single Linear behind the depth transformer's text table: held as a set of one, written as plain matrices."""
    config = load_case("moshi_steps", tmp_path / "base")[1].config
    torch.manual_seed(0)
    model = MultistreamLM(replace(config, depth=replace(config.depth, low_rank=5)))
    folder = export(model, tmp_path / "narrow", to="moshi")
    names = load_file(folder / "model.safetensors")
    assert names["depformer_text_emb.low_rank.weight"].shape == (config.depth.dim, 5) and names["depformer_emb.1.weight"].shape[1] == 5
    assert same_tensors(load(folder), model)
    adapted = with_adapter(model, LoraConfig(rank=2, alpha=4.0, targets=("depth.text.out", "depth.audio.out")))
    assert same_tensors(load(folder, adapter=export(adapted, tmp_path / "lora", to="moshi-lora")), adapted)


def test_a_recogniser_writes_what_it_hears(tmp_path):
    """The command: no wav comes of it, words and their row do; a later word than the recording's end is waited for."""
    torch.manual_seed(1)
    smoke = run_config(ROOT / "configs/moshi_full.py", "smoke").model
    heard = replace(smoke.table, streams=(smoke.table.streams[0], *codebooks(8, 257, 0, 256, name="user")))
    export(MultistreamLM(replace(smoke, table=heard, depth=None, extra_heads=2)), tmp_path / "stt", to="moshi")
    demo_dialogues(tmp_path / "d", 1)
    rc, told, err = call("sample.py", f"--ckpt={tmp_path}/stt", "--codec=tiny", f"--tokenizer={tmp_path}/d/words.json",
                         f"--user={tmp_path}/d/000.wav", f"--out={tmp_path}/x.wav")
    assert rc == 0 and "x.txt" in told and not (tmp_path / "x.wav").exists(), err
    row = json.loads((tmp_path / "x.json").read_text())
    assert abs(len(row["text"]) / row["frame_rate"] - soundfile.info(tmp_path / "d/000.wav").duration - 3.5) < 0.1
