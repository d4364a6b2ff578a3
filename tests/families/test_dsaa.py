"""Two towers: what the reference computes, ours computes; one forward pass for training and for streaming; a start where both were.

golden/dsaa.safetensors comes from slavivo/dsaa itself (golden/make_dsaa.py). The rest needs no reference: causality,
token rate, warm start, and models that do not fit together.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call
from safetensors.torch import load_file, save_file
from test_parity import Golden

import lora
from checkpoint import convert, export, load, save
from families.dsaa import principal_map
from generation.decode_step import SampleConfig
from generation.dialogue import UserFeed
from layers.architecture import FusionConfig, ModelConfig, StackConfig
from layers.fusion import Affine, Projector, Remembered, remember
from loss import LossConfig, loss_scale
from model import MultistreamLM
from sample import generate, reply
from streams import Stream, StreamTable, codebooks, delay
from text.word_times import text_weights

NAMES = {"norm": "norm", "up": "fc1", "down": "fc2", "skip": "skip"}
THEIRS = {"mlp": NAMES, "residual": NAMES, "gated": {k: f"core.{v}" for k, v in NAMES.items()} | {"gate_norm": "gate.0", "gate": "gate.1"},
          "preserve": {"norm": "fusion.0", "up": "fusion.1", "down": "fusion.4"}}
THEIRS["text_residual"] = NAMES
PAD, EPAD, START = 40, 41, 7


def qwen(dim: int = 20, tied: bool = False, vocab: int = 43, layers: int = 2) -> ModelConfig:
    return ModelConfig(StreamTable((Stream("text", "text", vocab, vocab),), "text", stop=(1,)),
                       StackConfig(dim=dim, layers=layers, heads=2, kv_heads=1, ffn=28, norm_eps=1e-6, qkv_bias=True), tied=tied)


def moshi() -> ModelConfig:
    table = StreamTable((Stream("text", "text", 33, 32, start=32), *codebooks(3, 14, 13, 13, delays=(0, 1, 2)),
                         *codebooks(2, 14, 0, 13, delays=(0, 1), name="user")), "duplex", aligned=True)
    return ModelConfig(table, StackConfig(dim=24, layers=2, heads=3, ffn=66, norm_eps=1e-8, rope_interleaved=True, window=40, packed=True),
                       depth=StackConfig(dim=10, layers=2, heads=1, ffn=27, norm_eps=1e-8, rope_theta=0.0, packed=True, steps=3))


def dsaa(**choices) -> MultistreamLM:
    torch.manual_seed(0)
    base = moshi()
    text = replace(base.table.streams[0], vocab=43, classes=43, start=START)
    table = replace(base.table, streams=(text, *base.table.streams[1:]), pad=PAD, epad=EPAD)
    return MultistreamLM(replace(base, table=table, fusion=FusionConfig(qwen(), **{"hidden": 9, "dropout": 0.0} | choices))).eval()


def grid(model: MultistreamLM, B: int = 2, T: int = 11, seed: int = 1) -> torch.Tensor:
    """A training grid (B, K, T + 1): words among padding, all streams delayed."""
    g = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 13, (B, 6, T), generator=g)
    said = torch.rand(B, T, generator=g) < 0.4
    frames[:, 0] = torch.where(said, torch.randint(2, 40, (B, T), generator=g), PAD)
    return delay(frames, model.table.delays, model.table.column("start"))


def targets(model: MultistreamLM, tokens: torch.Tensor) -> torch.Tensor:
    return ((tokens >= 0) & (tokens < model.table.column("classes"))).float()


# ---- the reference ----

@pytest.mark.parametrize("kind", THEIRS)
def test_projectors_equal_the_reference(kind):
    case = Golden("dsaa")
    outputs = case[f"{kind}/y"].shape[-1]
    ours = Projector(kind, (7, 5), 9, outputs).eval()
    renamed = {f"{a}.{p}": case.tensors.pop(f"{kind}/{b}.{p}", None) for a, b in THEIRS[kind].items() for p in ("weight", "bias")}
    if f"{kind}/alpha" in case.tensors:
        renamed["scale"] = case.tensors.pop(f"{kind}/alpha")
    ours.load_state_dict({k: v for k, v in renamed.items() if v is not None})
    assert [k for k in case.tensors if k.startswith(f"{kind}/")] == [f"{kind}/y"]                    # all of theirs was used
    assert (ours(case["projector_x"]) - case[f"{kind}/y"]).abs().max() <= 1e-6


def official(tmp_path: Path, **about) -> tuple[Golden, Path]:
    """The reference's files: its weights, and the text model in a folder of its own."""
    case = Golden("dsaa")
    llm = case.config["text_llm"]
    folder = tmp_path / "llm"
    folder.mkdir()
    save_file({k.removeprefix("llm/"): v for k, v in case.tensors.items() if k.startswith("llm/")}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 4096, "hidden_act": "silu", **llm}))
    case.config |= {"text_llm": {"hf_repo_id": str(folder), "dropout": 0.0}, "moshi_name": "dsaa.safetensors", **about}
    return case, case.write(tmp_path / "dsaa", "dsaa.safetensors")


def test_logits_losses_and_greedy_frames_equal_the_reference(tmp_path):
    case, folder = official(tmp_path)
    model = load(folder)
    table, codes = model.table, case["codes"]
    assert (table.pad, table.epad, table.streams[0].start, table.streams[0].vocab) == (5, 5, 7, 43)
    tokens = delay(codes, table.delays, table.column("start"))
    with torch.inference_mode():
        text, audio = model(tokens)
    rows = case["text_mask"][:, 0]
    assert (text - case["text_logits"][:, 0])[rows].abs().max() <= 1e-5
    seen = 0
    for k, lag in enumerate(table.delays[1:4]):
        T = codes.shape[-1] - lag
        mask = case["mask"][:, k, :T]
        assert (audio[:, k, lag:] - case["logits"][:, k, :T])[mask].abs().max() <= 1e-5
        seen += int(mask.sum())
    assert seen == int(case["mask"].sum()) > 20
    weights = (delay((codes >= 0).float(), table.delays, 0.0) * (table.column("classes") > 0)).float()
    weights[:, 0] *= torch.stack([text_weights(row, 0.5, 5, 5) for row in tokens[:, 0]])
    weights[:, 1] *= 100
    sums = model(tokens, weights)
    assert float(sums.nll[0] / sums.weight[0]) == pytest.approx(float(case["text_loss"]), rel=1e-5)
    assert float(sums.nll[1:4].sum() / sums.weight[1:4].sum()) == pytest.approx(float(case["audio_loss"]), rel=1e-5)
    frames = reply(model, case["user"], SampleConfig(temperature=0), skip_first_frame=True)
    assert torch.equal(frames[:, [0, *table.audio_out]], case["generated"])


def test_export_writes_the_reference_names_and_import_gives_the_same_bits(tmp_path):
    case, folder = official(tmp_path)
    model = load(folder)
    export(model, tmp_path / "again", to="dsaa")
    written = load_file(tmp_path / "again" / "dsaa.safetensors")
    assert written.keys() == case.weights.keys() and all(torch.equal(t, case.weights[n]) for n, t in written.items())
    other = load(tmp_path / "again")
    assert other.config == model.config and all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))
    ours = load(save(model, tmp_path / "ours"))
    assert not any(n.startswith("tower") for n in load_file(tmp_path / "ours" / "model.safetensors"))
    assert torch.equal(ours(grid(ours))[0], model(grid(model))[0])


def test_packed_attention_is_read_too(tmp_path):
    case, _ = official(tmp_path)
    fused: dict[str, list[torch.Tensor]] = {}
    for name, tensor in case.weights.items():
        name = name.replace("out_projs.0.weight", "out_proj.weight") if name.startswith("transformer") else name
        base, *step = name.partition(".in_projs.")
        fused.setdefault(f"{base}.in_proj_weight" if step[1] else name, []).append(tensor)
    model = load(tmp_path / "dsaa")
    case.weights = {n: torch.cat(parts) if len(parts) > 1 else parts[0] for n, parts in fused.items()}
    again = load(case.write(tmp_path / "packed", "dsaa.safetensors"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


# ---- what a column may know ----

@pytest.mark.parametrize("row, audio_from", [(0, (4, 4, 4)), (5, (5, 5, 5)), (1, (5, 4, 4)), (2, (5, 5, 4))])
def test_causality(row, audio_from):
    """A token in column 5 reaches text logits behind it, and audio logits of its own column only in the rows below."""
    model, one = dsaa(), grid(dsaa(), B=1)
    two = one.clone()
    two[0, row, 5] = (two[0, row, 5] + 1) % 13
    (text, audio), (other_text, other_audio) = model(one), model(two)            # row t predicts column t + 1
    changes = [text[0] - other_text[0], *(audio[0] - other_audio[0])]
    firsts = [int((change.abs().amax(-1) > 1e-6).nonzero()[0]) for change in changes]
    assert firsts == [5, *audio_from]
    assert torch.equal(text[0, :5], other_text[0, :5]) and torch.equal(audio[0, :, :4], other_audio[0, :, :4])


@pytest.mark.parametrize("rate", ["frame", "token"])
@pytest.mark.parametrize("more", [{}, {"feed_text": True, "split_norm": True}], ids=["plain", "fed"])
def test_streaming_equals_the_full_pass(rate, more):
    model = dsaa(rate=rate, **more)
    if more:
        torch.nn.init.normal_(model.feed_text.weight)
    tokens = grid(model)
    cache, states = model.cache(2, 12), []
    with torch.inference_mode():
        full = model.hidden(tokens)[1]
        states.append(model.hidden(tokens[..., :5], torch.arange(5).expand(2, 5), cache=cache)[1])
        for s in range(5, 12):
            states.append(model.hidden(tokens[..., s : s + 1], torch.full((2, 1), s), cache=cache)[1])
    assert (torch.cat(states, 1) - full).abs().max() <= 1e-5


@pytest.mark.parametrize("rate", ["frame", "token"])
def test_generation_agrees_with_the_full_pass(rate):
    model = dsaa(rate=rate)
    user = torch.randint(0, 13, (2, 2, 9), generator=torch.Generator().manual_seed(4))
    frames = reply(model, user, SampleConfig(temperature=0))
    with torch.inference_mode():
        text, audio = model(delay(frames, model.table.delays, model.table.column("start")))
    assert torch.equal(text.argmax(-1), frames[:, 0])
    for k, lag in enumerate((0, 1, 2)):
        assert torch.equal(audio[:, k].argmax(-1)[:, lag:], frames[:, 1 + k, : frames.shape[-1] - lag])


@pytest.mark.parametrize("rate", ["frame", "token"])
def test_packed_equals_separate(rate):
    model = dsaa(rate=rate)
    a, b = grid(model, 1, 8, seed=2), grid(model, 1, 6, seed=3)
    packed = torch.cat([a, b, torch.full((1, 6, 2), -1)], -1)
    positions = torch.cat([torch.arange(9), torch.arange(7), torch.tensor([-1, -1])])[None]
    segments = torch.cat([torch.zeros(9), torch.ones(7), torch.full((2,), -1)]).long()[None]
    with torch.inference_mode():
        h = model.hidden(packed, positions, segments)[1]
        for part, at in ((a, 0), (b, 9)):
            assert (h[:, at : at + part.shape[-1]] - model.hidden(part)[1]).abs().max() <= 1e-5


def test_token_rate_reads_words_only():
    model = dsaa(rate="token")
    tokens = grid(model, 1)
    said = (tokens[0, 0] != PAD).nonzero().flatten()
    spoken = model.tower(tokens[:, 0], None, None, None)[0]
    alone = model.tower.body.hidden(tokens[:, :1, said])[0][0]
    for s in range(tokens.shape[-1]):
        assert (spoken[s] - alone[int((said <= s).sum()) - 1]).abs().max() <= 1e-6
    more = torch.cat([tokens[..., :3], tokens[..., 2:3], tokens[..., 3:]], -1)
    more[:, 0, 3] = EPAD
    assert torch.allclose(model.tower(more[:, 0], None, None, None)[0][4:], spoken[3:], atol=1e-6)


def test_an_absent_text_id_is_a_zero_vector_and_no_target():
    model = dsaa()
    tokens = grid(model)
    tokens[:, 0, 4] = -1
    assert not model.tower.embed(tokens[:, 0])[:, 4].any()
    assert torch.equal(model.depth.embed(0, tokens[:, :1, 4]), model.depth.text_map.bias.expand(2, -1))       # as in the reference
    sums = model(tokens, targets(model, tokens))
    assert sums.count[0] == 2 * 11 - 2


# ---- what is trained ----

def test_the_two_losses_train_disjoint_parts_unless_the_text_feeds_the_audio_tower():
    for feed in (False, True):
        model = dsaa(feed_text=feed).requires_grad_(True)
        reached = []
        for rows in (slice(0, 1), slice(1, 4)):
            model.zero_grad()
            model(grid(model), targets(model, grid(model))).nll[rows].sum().backward()
            reached.append({n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        text, audio = reached
        frozen = {n for n in text | audio if n.startswith(("embed.", "temporal.", "feed_text"))}
        assert {"text_head.weight", "text_projector.up.weight"} <= text - audio
        assert {"depth.input.up.weight", "depth.head.weight"} <= audio - text
        assert (text & audio) <= frozen and "temporal.layers.0.attn.qkv.weight" in text & audio     # frozen, nothing is shared
        assert ("feed_text.weight" in text & audio) == feed
    assert not any(p.requires_grad for p in model.tower.body.parameters()) and "tower" not in str(list(model.state_dict()))


def test_adapters_leave_the_tower_alone():
    model = lora.inject(dsaa(), lora.LoraConfig(rank=2, targets=("attn.*", "ffn.*")))
    assert not any(m.adapter for m in model.tower.body.modules() if hasattr(m, "adapter"))
    assert any("temporal" in path for path, *_ in lora.adapters(model))


def test_the_tower_stays_in_eval_mode_and_moves_along():
    model = dsaa().train().to(torch.bfloat16)
    assert not model.tower.body.training and model.tower.body.text_head.weight.dtype == torch.bfloat16


def test_remembered_states_are_those_computed():
    model = dsaa().train()
    a, b = grid(model, 1, 8, seed=2), grid(model, 1, 6, seed=3)
    tokens, swapped = torch.cat([a, b, a[..., :1]], -1), torch.cat([b, a, a[..., :1]], -1)        # the last column is only predicted
    one, other = (torch.cat([torch.zeros(n), torch.ones(17 - n)]).long()[None] for n in (9, 7))
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None]
    fresh = model(tokens, None, positions, one)
    model.remembered = Remembered(1)
    first = model(tokens, None, positions, one)
    assert model.remembered.hits == 0 and all((x - y).abs().max() < 2e-2 for x, y in zip(fresh, first, strict=True))    # fp16 in between
    second = model(swapped, None, None, other)
    assert model.remembered.hits == 2                                                 # wherever its rows were packed
    states, moved = (model.hidden(t[..., :-1], None, s[:, :-1])[1] for t, s in ((tokens, one), (swapped, other)))
    assert torch.equal(states[:, :9], moved[:, 7:16]) and torch.equal(states[:, 9:16], moved[:, :7])
    for x, y in zip(first, second, strict=True):                       # a row of a product is rounded by its place in it
        assert (x[..., :8, :] - y[..., 7:15, :]).abs().max() <= 1e-5 and (x[..., 9:15, :] - y[..., :6, :]).abs().max() <= 1e-5
    assert all(torch.equal(x, y) for x, y in zip(model(tokens, None, positions, one), first, strict=True))
    small = Remembered(0)
    assert small(tokens, one, lambda part: part[:, :1].mT.float()).equal(tokens[:, :1].mT.float()) and not small.kept and small.used == 0


# ---- from Moshi and a text model ----

@pytest.fixture
def parts(tmp_path):
    torch.manual_seed(5)
    for name, config in (("moshi", moshi()), ("llm", qwen(20)), ("wide", qwen(28, tied=True)), ("narrow", qwen(8))):
        save(MultistreamLM(config), tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("llm", ["llm", "wide", "narrow"])
def test_warm_start_is_moshi_and_the_text_model(parts, llm):
    model = load(convert("setup-dsaa", parts / "new", parts / "moshi", parts / llm, hidden=9, split_norm=True))
    ears, body = load(parts / "moshi"), load(parts / llm)
    tokens = grid(model)
    h_a = torch.randn(7, 24)
    h = torch.cat([torch.randn(7, body.config.temporal.dim), h_a], -1)
    e = torch.randn(3, 7, 10)
    whole = slice(0, 3)
    assert (model.depth.join(h, e, whole) - ears.depth.join(h_a, e, whole)).abs().max() <= 1e-5
    text, _ = model(tokens)
    alone = body(tokens[:, :1])[0]
    assert (text - alone).abs().max() <= 1e-5
    assert torch.equal(model.temporal.layers[0].attn.qkv.weight, ears.temporal.layers[0].attn.qkv.weight)
    assert torch.equal(model.depth.head.weight, ears.depth.head.weight)
    assert torch.equal(model.embed["audio"].weight, ears.embed["audio"].weight)
    assert model.table.pad == 41 and model.table.epad == 42 and model.config.fusion.revision


def test_principal_map_keeps_the_main_directions():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(50, 6, generator=g) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) + 4
    weight, bias = principal_map(table, 3)
    centred = table - table.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    assert ((weight @ directions[:3].mT).abs() - torch.eye(3)).abs().max() < 1e-4
    assert ((table @ weight.mT + bias).mean(0)).abs().max() < 1e-4
    wide, _ = principal_map(table, 9)
    assert wide.shape == (9, 6) and not wide[6:].any() and wide[:6].any(1).all()


def test_other_text_models_are_refused_in_one_line(parts):
    folder = convert("setup-dsaa", parts / "new", parts / "moshi", parts / "llm", hidden=9)
    about = json.loads((folder / "config.json").read_text())
    assert about["model"]["fusion"]["source"] == str((parts / "llm").resolve())
    torch.manual_seed(6)
    save(MultistreamLM(qwen(20)), parts / "llm")
    with pytest.raises(ValueError, match="is not the text model that .*new was made with"):
        load(folder)
    (parts / "llm" / "model.safetensors").unlink()
    (parts / "llm" / "config.json").unlink()
    with pytest.raises(ValueError, match="the text model beside .*new cannot be read: .*--model.fusion.source"):
        load(folder)


def test_the_command_makes_new_weights_and_says_what_is_wrong(parts):
    code, out, err = call("checkpoint.py", "setup-dsaa", f"--moshi={parts}/moshi", f"--text-llm={parts}/llm", f"--out={parts}/made",
                          "--hidden=9", "--rate=token")
    assert code == 0, err
    assert load(parts / "made").config.fusion.rate == "token"
    for words, said in ((("--moshi=" + str(parts / "llm"), f"--text-llm={parts}/llm"), "no plain Moshi"),
                        ((f"--moshi={parts}/moshi", f"--text-llm={parts}/moshi"), "no plain text model"),
                        ((f"--moshi={parts}/moshi", f"--text-llm={parts}/nothing"), "does not exist"),
                        ((f"--moshi={parts}/moshi", f"--text-llm={parts}/llm", "--rate=word"), "neither 'frame' nor 'token'"),
                        ((f"--moshi={parts}/moshi", f"--text-llm={parts}/llm", "--padding=space"), "tokenizer.json"),
                        ((f"--moshi={parts}/moshi",), "--text-llm")):
        code, out, err = call("checkpoint.py", "setup-dsaa", *words, f"--out={parts}/other")
        assert code == 2 and said in err and err.count("\n") == 1, err
    assert not (parts / "other").exists()


def test_a_file_of_the_reference_without_a_text_model_says_what_to_add(tmp_path):
    case, folder = official(tmp_path)
    about = json.loads((folder / "config.json").read_text())
    del about["text_llm"]
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="names no text model; add \"text_llm\""):
        load(folder)


def test_only_text_phase_gives_the_audio_streams_no_weight():
    table = dsaa().table
    scale = loss_scale(torch.ones(6), table, LossConfig(audio=0.0))
    assert scale[0] > 0 and not scale[1:].any()
    assert Affine(3, 2, sets=4)(torch.ones(4, 5, 3), slice(0, 4)).shape == (4, 5, 2)
    assert len(list(generate(dsaa(), dsaa().table.column("start"), SampleConfig(temperature=0, max_frames=4),
                             UserFeed(torch.zeros(1, 2, 3, dtype=torch.long), table)))) == 2


# ---- the recipe ----

def test_smoke_from_two_towers_to_the_reference_files_and_back(tmp_path):
    """setup -> text alone -> both -> resume -> a stereo reply -> export -> import."""
    out = tmp_path / "run"
    base = ("configs/dsaa.py", "--smoke", f"--data.cache={tmp_path}/cache", "--schedule=constant")
    for steps, said in ((4, "step 4: held-out"), (12, "stage 2 reads")):
        code, told, err = call("train.py", *base, f"--out={out}", f"--steps={steps}")
        assert code == 0 and said in told, told + err
        if steps == 4:                                     # nothing but the way to the text head has moved
            begun, now = (load_file(p / "model.safetensors") for p in (Path("out/cache/dsaa/new"), out / "ckpt/latest"))
            moved = {n for n in begun if not torch.equal(begun[n], now[n])}
            assert moved == {n for n in begun if n.startswith(("text_projector.", "text_head."))}
    code, told, err = call("train.py", *base, f"--out={tmp_path}/whole")
    assert code == 0, told + err
    one, other, begun = (load_file(p / "model.safetensors") for p in (out / "ckpt/latest", tmp_path / "whole/ckpt/latest",
                                                                      Path("out/cache/dsaa/new")))
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert {n for n in one if torch.equal(one[n], begun[n])} == {n for n in one if n.startswith(("temporal.", "embed."))}
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in losses if "train/loss" in row]
    assert len(losses) == 12 and losses[-1] < losses[0]
    heard = "--user=out/cache/dialogues/001.wav"
    code, told, err = call("sample.py", f"--ckpt={out}", heard, f"--out={tmp_path}/reply.wav", "--temperature=0")
    assert code == 0 and (tmp_path / "reply.txt").is_file(), err
    model, user = load(out), torch.randint(0, 256, (1, 8, 9), generator=torch.Generator().manual_seed(1))
    frames = reply(model, user, SampleConfig(temperature=0))
    export(model, tmp_path / "official", to="dsaa")
    assert reply(load(tmp_path / "official"), user, SampleConfig(temperature=0)).equal(frames)


def test_remembering_states_of_a_trained_tower_is_refused():
    model = dsaa()
    with pytest.raises(ValueError, match="embed.audio.weight is trained; freeze it"):
        remember(model, 8)
    model.requires_grad_(False)
    assert remember(model, 8).room == 8 << 20
