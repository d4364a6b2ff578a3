"""Moshi: the grid against the formulas of its paper's code written as plain loops, its loss by hand, its smoke runs to the end."""

import ast
import json
import math
import re
import shutil
import struct
from dataclasses import replace

import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import ROOT, call
from safetensors.torch import load_file
from tables import CONFIGS, random_ids
from test_parity import with_adapter

from audio.mimi import MimiCodec, MimiConfig
from audio.wav import load_wav
from checkpoint import Extras, export, load, save
from corpus.bundled import demo_dialogues
from corpus.cache import encode
from corpus.examples import build_example
from corpus.index import prepare
from data import Loader
from families.family import lay_out
from families.formats import official_files
from families.moshi import MOSHI_7B
from generation.decode_step import SampleConfig
from generation.dialogue import UserFeed
from loss import LossConfig, loss_scale
from model import MultistreamLM
from options import flatten, run_config
from sample import generate, reply
from streams import Example, StreamTable, delay, undelay
from text.word_times import EPAD, PAD, text_weights
from training.monitor import report
from training.run_state import RunState, consolidate, save_run

TABLE = run_config(ROOT / "configs/moshi_lora.py", "smoke").model.table


def dialogue(table: StreamTable, T: int, seed: int = 0) -> Example:
    """Random codes of both speakers, a text row with padding, and holes where nothing is."""
    Q, U, codes = len(table.audio_out), len(table.audio) - len(table.audio_out), table.streams[-1].vocab - 1
    text = torch.where(random_ids(3, (T,), seed) > 0, PAD, random_ids(table.streams[0].classes, (T,), seed + 1))
    text[random_ids(T, (2,), seed + 2)] = EPAD
    agent, user = random_ids(codes, (Q, T), seed + 3), random_ids(codes, (U, T), seed + 4)
    text[T // 2], agent[1, T // 3], user[0, 2] = -1, -1, -1
    return Example(text, agent, user=user, weights=text_weights(text, 0.5))


# ---- the grid ----

@pytest.mark.parametrize("T", [1, 2, 7, 20])
@pytest.mark.parametrize("table", [TABLE, CONFIGS["duplex"].table], ids=["smoke", "odd"])
def test_the_grid_is_what_the_formulas_say(table, T):
    """d[k, 0..delay_k] = initial, d[k, 1 + delay_k + t] = codes[k, t] while it fits; user rows are no targets."""
    example = dialogue(table, T) if T > 4 else Example(random_ids(9, (T,), 1), random_ids(9, (len(table.audio_out), T), 2),
                                                       user=random_ids(9, (len(table.audio) - len(table.audio_out), T), 3))
    tokens, weights = lay_out(example, table)
    codes = torch.cat([example.text[None], example.codes, example.user])
    assert tokens.shape == weights.shape == (len(table), T + 1)
    for k, stream in enumerate(table.streams):
        for s in range(T + 1):
            t = s - 1 - stream.delay
            assert tokens[k, s] == (stream.start if t < 0 else codes[k, t])
            wanted = float(t >= 0 and codes[k, t] >= 0 and stream.classes > 0)
            if k == 0 and wanted and example.weights is not None:
                wanted *= 0.5 if codes[k, t] in (PAD, EPAD) else 1.0
            assert weights[k, s] == wanted


def test_user_rows_count_when_they_are_predicted():
    streams = tuple(replace(s, classes=256) if s.name.startswith("user") else s for s in TABLE.streams)
    both = replace(TABLE, streams=streams)
    example = dialogue(TABLE, 12)
    assert not lay_out(example, TABLE)[1][9:].any()
    assert lay_out(example, both)[1][9:].sum() == 8 * 12 - 7 - 1        # seven late rows lose a frame, one code is missing


def test_the_prompt_is_the_head_of_the_training_grid():
    example = dialogue(TABLE, 20)
    head = Example(example.text[:9], example.codes[:, :9], user=example.user[:, :9])
    assert lay_out(head, TABLE)[0].equal(lay_out(example, TABLE)[0][:, :10])
    assert lay_out(Example(example.text), TABLE)[0].equal(lay_out(example, TABLE)[0][:, :1])


def test_moshi_7b_is_a_duplex_table():
    assert MOSHI_7B.table.layout == "duplex" and MOSHI_7B.table.delays == [0, 0, *[1] * 7, 0, *[1] * 7]
    assert [s.classes > 0 for s in MOSHI_7B.table.streams] == [True] * 9 + [False] * 8


# ---- the loss ----

def finetune_loss(model: MultistreamLM, examples: list[Example], first: float, padding: float) -> torch.Tensor:
    """moshi-finetune's compute_loss_with_mask over un-delayed logits, as the spec tells it: text, plus audio jointly over rows."""
    table, parts = model.table, {"text": [], "audio": []}
    for example in examples:
        codes = torch.cat([example.text[None], example.codes, example.user])
        T = codes.shape[1]
        d = torch.tensor([[s.start if c - 1 - s.delay < 0 else codes[k, c - 1 - s.delay] for c in range(T + 1)]
                          for k, s in enumerate(table.streams)])
        text, audio = model(d[None])
        for t in range(T):
            if codes[0, t] >= 0:
                weight = padding if codes[0, t] in (PAD, EPAD) else 1.0
                parts["text"].append((weight, F.cross_entropy(text[0, t], codes[0, t])))
            for k, row in enumerate(table.audio_out):
                late = t + table.delays[row]
                if late < T and codes[row, t] >= 0:
                    parts["audio"].append((first if k == 0 else 1.0, F.cross_entropy(audio[0, k, late], codes[row, t])))
    return sum(sum(w * nll for w, nll in group) / sum(w for w, _ in group) for group in parts.values())


def test_the_loss_is_that_of_moshi_finetune():
    """Text padding at half weight, the semantic codebook a hundredfold, one normaliser over the agent's codebooks."""
    torch.manual_seed(0)
    model = MultistreamLM(CONFIGS["duplex"]).double()
    table = model.table
    examples = [dialogue(table, T, seed) for seed, T in enumerate((11, 17))]
    factors = torch.tensor([1.0, 100.0, 1.0, 1.0, 0.0, 0.0])[:, None]
    grids = [lay_out(example, table) for example in examples]
    width = max(tokens.shape[1] for tokens, _ in grids)
    tokens = torch.stack([F.pad(t, (0, width - t.shape[1]), value=-1) for t, _ in grids])
    weights = torch.stack([F.pad(w * factors, (0, width - w.shape[1])) for _, w in grids])
    sums = model(tokens, weights)
    loss = (sums.nll * loss_scale(sums.weight.detach(), table, LossConfig())).sum()
    theirs = finetune_loss(model, examples, 100.0, 0.5)
    assert abs((loss - theirs).item()) < 1e-5
    ours = torch.autograd.grad(loss, model.text_head.weight, retain_graph=True)[0]
    assert torch.allclose(ours, torch.autograd.grad(theirs, model.text_head.weight)[0], atol=1e-5)


def test_classes_are_told_apart():
    """Text words and padding, semantic and acoustic codebooks, own and user, from the logits of a grid that trains both."""
    torch.manual_seed(4)
    config = CONFIGS["duplex"]                                           # text, three codebooks of its own, two of the user
    streams = tuple(replace(s, classes=16) if s.name.startswith("user") else s for s in config.table.streams)
    table = replace(config.table, streams=streams)
    model = MultistreamLM(replace(config, table=table, depth=replace(config.depth, steps=5))).double()
    tokens, weights = (torch.stack(side) for side in zip(*(lay_out(dialogue(config.table, 15, n), table) for n in (1, 2)), strict=True))
    numbers = report(model(tokens, weights).stacked(), table, LossConfig())
    text, audio = model(tokens)
    target, weight = tokens[..., 1:], weights[..., 1:].double()
    nll = [F.cross_entropy(x.flatten(0, 1), target[:, k].clamp(0, x.shape[-1] - 1).flatten(), reduction="none").view_as(target[:, k])
           for k, x in zip([0, *table.audio_out], [text, *audio.unbind(1)], strict=True)]
    hits = [x.argmax(-1) == target[:, k] for k, x in zip([0, *table.audio_out], [text, *audio.unbind(1)], strict=True)]
    padding = (target[:, 0] == PAD) | (target[:, 0] == EPAD)
    assert padding.any() and (weight[:, 0][~padding] > 0).any()
    parts = {"text_pad": [(0, padding)], "text_real": [(0, ~padding)]}
    rows_of = {"semantic": (1, 4), "acoustic": (2, 3, 5), "own": (1, 2, 3), "user": (4, 5)}
    parts |= {name: [(k, True) for k in rows] for name, rows in rows_of.items()}
    for name, rows in parts.items():
        w = [weight[:, k] * where for k, where in rows]
        total, count = sum(x.sum() for x in w), sum((x > 0).sum() for x in w)
        assert abs(sum((x * nll[k]).sum() for x, (k, _) in zip(w, rows, strict=True)) / total - numbers[f"{name}_loss"]) < 1e-5, name
        assert abs(sum((hits[k] & (x > 0)).sum() for x, (k, _) in zip(w, rows, strict=True)) / count - numbers[f"{name}_accuracy"]) < 1e-6


# ---- listening ----

def test_what_is_heard_is_the_user_as_training_lays_him_out():
    table = CONFIGS["duplex"].table
    torch.manual_seed(1)
    model = MultistreamLM(CONFIGS["duplex"])
    user = random_ids(16, (2, 2, 9), 5)
    frames = reply(model, user, SampleConfig(temperature=0.9, seed=3))
    assert frames.shape == (2, len(table), 9) and frames[:, 4:].equal(user) and (frames >= 0).all()
    with pytest.raises(ValueError, match="gives 3 codebooks, the model reads 2"):
        UserFeed(random_ids(16, (1, 3, 4), 0), table)


def test_greedy_frames_are_what_the_full_forward_pass_predicts():
    torch.manual_seed(2)
    model = MultistreamLM(CONFIGS["duplex"]).eval()
    table = model.table
    frames = reply(model, random_ids(16, (1, 2, 12), 6), SampleConfig(temperature=0))
    with torch.inference_mode():
        text, audio = model(delay(frames, table.delays, table.column("start")))
    assert text.argmax(-1).equal(frames[:, 0])
    for k, row in enumerate(table.audio_out):
        lag = table.delays[row]
        assert audio[:, k].argmax(-1)[:, lag:].equal(frames[:, row, : 12 - lag])


def test_a_reply_continues_a_dialogue():
    """The head of a dialogue as the prompt: greedy frames behind it are those of the whole."""
    torch.manual_seed(3)
    model = MultistreamLM(CONFIGS["duplex"])
    table, user = model.table, random_ids(16, (1, 2, 12), 7)
    whole = reply(model, user, SampleConfig(temperature=0))
    columns = delay(whole, table.delays, table.column("start"))
    feed = UserFeed(user, table, column=6)
    later = torch.stack(list(generate(model, columns[..., :6], SampleConfig(temperature=0, max_frames=8), feed)), -1)
    assert later.equal(whole[..., 12 - later.shape[-1] :]) and undelay(columns, table.delays).equal(whole[..., :11])


def test_errors_of_the_command_are_one_line(tiny_run, tmp_path):
    wav = tmp_path / "user.wav"
    soundfile.write(wav, torch.zeros(8000).numpy(), 16000)
    (tmp_path / "bad.wav").write_bytes(struct.pack("<I", 7))
    model = MultistreamLM(replace(run_config(ROOT / "configs/moshi_full.py", "smoke").model))
    ckpt = export(model, tmp_path / "duplex")
    for options, words in (((f"--ckpt={tiny_run}", f"--user={wav}"), "needs a model that listens"),
                           ((f"--ckpt={ckpt}", "--text=hello"), "give it a recording with --user"),
                           ((f"--ckpt={ckpt}", f"--user={tmp_path}/none.wav"), "no sound file at"),
                           ((f"--ckpt={ckpt}", f"--user={tmp_path}/bad.wav"), "cannot be read as sound")):
        rc, _, err = call("sample.py", *options, "--codec=tiny", f"--tokenizer={tiny_run}/ckpt/latest/words.json")
        assert rc == 2 and words in err and err.count("\n") == 1, (options, err)


def test_dialogues_pass_through_mimi_at_twelve_and_a_half_frames(tmp_path, monkeypatch):
    """The codec that Moshi is made for, small: a file of any rate, chunks of a second, and a reply as long as what was heard."""
    torch.manual_seed(5)
    mimi = MimiCodec(MimiConfig(width=4, dim=32, layers=1, heads=4, ffn=32, window=20, num_codebooks=8, codebook_size=256, codebook_dim=16))
    monkeypatch.setattr("corpus.index.load_codec", lambda name, codebooks: mimi)
    smoke = run_config(ROOT / "configs/moshi_full.py", "smoke")
    folder = tmp_path / "d"
    source = demo_dialogues(folder, 2)
    config = replace(smoke.data, sources=(source,), cache=str(tmp_path / "c"), tokenizer=str(folder / "words.json"), chunk_seconds=1.0)
    index, seconds = prepare(config, TABLE), soundfile.info(folder / "000.wav").duration
    chunks = [build_example(index, n, TABLE) for n, e in enumerate(index.entries) if e.id.startswith("000@")]
    assert sum(e.codes.shape[1] - e.before for e in chunks) == math.ceil(seconds * 12.5)
    assert max(e.codes.shape[1] - e.before for e in chunks) <= 12
    wav, _ = load_wav(folder / "000.wav", 24_000, 2)
    whole = encode(mimi, wav)
    assert torch.cat([e.codes[:, e.before :] for e in chunks], 1).equal(whole[:8])
    assert torch.cat([e.user[:, e.before :] for e in chunks], 1).equal(whole[8:])
    frames = reply(MultistreamLM(smoke.model), whole[None, 8:], SampleConfig(temperature=0.5))
    assert frames.shape[-1] == whole.shape[1] and mimi.decode(frames[:, 1:9]).shape[-1] == 1920 * whole.shape[1]


# ---- both speakers predicted ----

def test_a_depth_transformer_of_both_speakers_starts_as_a_copy_and_trims_back(tmp_path):
    torch.manual_seed(4)
    model = MultistreamLM(run_config(ROOT / "configs/moshi_full.py", "smoke").model).eval()
    one = save(model, tmp_path / "one")
    for command, source, out in (("expand-depth", one, "two"), ("trim-depth", tmp_path / "two", "back")):
        rc, told, err = call("checkpoint.py", command, source, f"--out={tmp_path}/{out}")
        assert (rc, err) == (0, ""), err
    both, back = load(tmp_path / "two"), load(tmp_path / "back")
    assert len(both.table.audio_out) == both.config.depth.steps == 16 and back.config == model.config
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in model.state_dict().items())
    tokens, weights = lay_out(dialogue(TABLE, 9), both.table)
    assert weights[9:].any()
    official = load(export(both, tmp_path / "moshi", to="moshi")).state_dict()
    assert all(torch.equal(t, official[n]) for n, t in both.state_dict().items())
    with torch.inference_mode():
        text, audio = both(tokens[None])
        before = model(tokens[None])
    assert torch.equal(text, before[0]) and float((audio[:, :8] - before[1]).abs().max()) < 1e-5
    table = both.depth.audio.weight.view(15, 257, -1)
    assert torch.equal(table[7], table[0]) and torch.equal(table[8:], model.depth.audio.weight.view(7, 257, -1))
    frames = torch.stack(list(generate(both, tokens[:, :6], SampleConfig(max_frames=4))), -1)       # it goes on for both
    assert frames.shape == (1, 17, 4) and (frames[..., 1:] >= 0).all()                               # the first one is the prompt's
    rc, _, err = call("checkpoint.py", "expand-depth", tmp_path / "two", f"--out={tmp_path}/x")
    assert rc == 2 and "16 of 16 audio rows are predicted" in err and err.count("\n") == 1


def test_the_user_is_trained_on_request_and_both_are_the_agent(tmp_path):
    """--preset=both reads what expand-depth writes; each dialogue comes twice, and the user's codebooks are targets as the agent's."""
    config = run_config(ROOT / "configs/moshi_full.py", "smoke_both")
    tiny = MultistreamLM(run_config(ROOT / "configs/moshi_full.py", "smoke").model)
    rc, _, err = call("checkpoint.py", "expand-depth", save(tiny, tmp_path / "one"), f"--out={tmp_path}/both")
    model = load(tmp_path / "both", config=config.model)
    assert rc == 0 and model.config.table == config.model.table, err
    data = replace(config.data, cache=str(tmp_path / "cache"), prefetch=0)
    index = prepare(data, model.table)
    assert sum(entry.swapped for entry in index.entries) == len(index.entries) / 2
    batch = next(iter(Loader(data, model.table, batch_size=2)))
    own, user = batch.weights[:, 1:9], batch.weights[:, 9:]
    assert own.any() and user.equal(own) and set(batch.weights[:, (1, 9)].unique().tolist()) == {0.0, 100.0}
    numbers = report(model(batch.tokens, batch.weights, batch.positions, batch.segments).stacked(), model.table, LossConfig())
    assert abs(numbers["own_loss"] + numbers["user_loss"] - 2 * numbers["audio_loss"]) < 1e-3
    assert {"user_accuracy", "semantic_loss", "acoustic_loss", "text_pad_loss", "user8_loss"} <= numbers.keys()


@pytest.mark.parametrize("to", ["moshi-lora", "moshi"])
def test_checkpoints_stand_where_scripts_of_moshi_finetune_look(to, tmp_path):
    """checkpoints/checkpoint_000500/consolidated holds its two files; they load as the checkpoint does, and old ones go."""
    config = run_config(ROOT / "configs/moshi_lora.py", "smoke")
    model = with_adapter(MultistreamLM(config.model), config.lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    base = {n: t for n, t in model.state_dict().items() if "lora_" not in n}
    plain = MultistreamLM(config.model)
    plain.load_state_dict(base)
    save(plain, tmp_path / "base")
    official = export(plain, tmp_path / "official", to="moshi")
    for step in (500, 1000, 1500):
        folder = save_run(tmp_path, model, optimizer, RunState(step=step), {}, Extras(step, base="base"), None, 0)
        (tmp_path / "checkpoints/.writing_checkpoint_000001").mkdir(parents=True)          # what a kill left behind
        written = consolidate(tmp_path, folder, to, 2, torch.float32)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["checkpoint_001000", "checkpoint_001500"]
    file = "lora.safetensors" if to == "moshi-lora" else "consolidated.safetensors"
    about = json.loads((written / "config.json").read_text())
    assert {p.name for p in written.iterdir()} == {"config.json", file} and about["lora"] is (to == "moshi-lora")
    assert written == tmp_path / "checkpoints/checkpoint_001500/consolidated"
    heard, greedy = random_ids(256, (1, 8, 9), 1), SampleConfig(temperature=0)
    again = load(official, adapter=written) if to == "moshi-lora" else load(written)
    assert reply(again, heard, greedy).equal(reply(load(tmp_path), heard, greedy))


def test_the_files_beside_official_weights_are_found(tmp_path):
    for name in ("model.safetensors", "tokenizer-e351c8d8-checkpoint125.safetensors", "tokenizer_spm_32k_3.model"):
        (tmp_path / name).touch()
    assert official_files(tmp_path) == {"codec": f"{tmp_path}/tokenizer-e351c8d8-checkpoint125.safetensors",
                                        "tokenizer": f"{tmp_path}/tokenizer_spm_32k_3.model"}


# ---- the smoke runs ----

@pytest.mark.slow
@pytest.mark.parametrize("name", ["moshi_lora", "moshi_full"])
def test_smoke_from_training_to_the_package_and_back(name, tmp_path):
    out = tmp_path / "run"
    base = (f"configs/{name}.py", "--smoke", f"--out={out}", f"--data.cache={tmp_path}/cache")
    for options, words in (((*base, "--steps=6", "--schedule=constant"), "step 5"), ((*base, "--schedule=constant"), "resuming")):
        rc, told, err = call("train.py", *options)
        assert rc == 0 and words in told, told + err
    rc, told, err = call("train.py", *base, f"--out={tmp_path}/whole", "--schedule=constant")
    assert rc == 0, told + err
    file = "adapter.safetensors" if name == "moshi_lora" else "model.safetensors"
    one, other = (load_file(folder / "ckpt/latest" / file) for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(one[n], other[n]) for n in one)             # stopped and continued, or never stopped
    losses = [json.loads(line).get("train/loss") for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [x for x in losses if x is not None]
    assert len(losses) == 12 and losses[-1] < losses[0]
    evals = [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "val/loss" in row]
    assert [row["step"] for row in evals] == [6, 12]
    assert all({"val/overlap_ratio", "val/pad_ratio", "val/user_turns"} <= row.keys() for row in evals)
    assert soundfile.info(out / "samples/step_000012/001.wav").channels == 2

    user = ROOT / "out/cache/dialogues/001.wav"
    rc, told, err = call("sample.py", f"--ckpt={out}", f"--user={user}", f"--out={tmp_path}/reply.wav", "--temperature=0")
    assert rc == 0, err
    wav, rate = soundfile.read(tmp_path / "reply.wav")
    seconds = soundfile.info(user).duration
    assert wav.shape[1] == 2 and abs(len(wav) / rate - seconds) < 0.1 and (tmp_path / "reply.txt").is_file()

    greedy = SampleConfig(temperature=0)
    model, heard = load(out), random_ids(256, (1, 8, 9), 1)
    frames = reply(model, heard, greedy)
    folder = export(model, tmp_path / "moshi", to="moshi")
    assert json.loads((folder / "config.json").read_text())["lora"] is False
    assert reply(load(folder), heard, greedy).equal(frames)
    if name == "moshi_lora":
        adapter = export(model, tmp_path / "adapter", to="moshi-lora")
        official = export(load(out / "base"), tmp_path / "base", to="moshi")
        again = load(official, adapter=adapter)
        theirs = again.state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in model.state_dict().items() if n in theirs)
        assert reply(again, heard, greedy).equal(frames)
    shutil.rmtree(out)


# ---- coming from moshi-finetune ----

THEIRS = """data.train_data eval_data data.shuffle run_dir overwrite_run_dir moshi_paths.hf_repo_id mimi_path moshi_path
tokenizer_path config_path first_codebook_weight_multiplier text_padding_weight optim.lr weight_decay optim.pct_start
seed num_microbatches duration_sec batch_size max_norm max_steps log_freq ckpt_freq save_adapters do_ckpt num_ckpt_keep
eval_freq do_eval gradient_checkpointing full_finetuning param_dtype lora.enable rank scaling lora.ft_embed
wandb.project offline key run_name""".split()


def test_the_config_maps_every_field_of_moshi_finetune_to_one_of_ours():
    text = ast.get_docstring(ast.parse((ROOT / "configs/moshi_lora.py").read_text(encoding="utf-8"))).partition("moshi-finetune   ")[2]
    rows = [re.split(r"\s{3,}", row.strip()) for row in text.partition("\n\n")[0].splitlines()[1:]]
    assert all(len(row) == 2 for row in rows), rows
    found = {word.removeprefix("moshi_paths.") for theirs, _ in rows for word in theirs.split(", ")}
    assert found == {word.removeprefix("moshi_paths.") for word in THEIRS}
    ours = {name for _, here in rows for name in re.findall(r"`([\w.]+)`", here)}
    known = {name for name, *_ in flatten(run_config(ROOT / "configs/moshi_lora.py"))}
    assert len(ours) > 25 and not ours - known
