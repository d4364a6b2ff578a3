"""What the official implementations computed, ours computes: tiny models from their files, through `checkpoint.load`.

tests/golden/*.safetensors come from transformers, peft, moshi and boson-multimodal themselves (golden/make.py says how);
none of them is needed here. Gate: logits within 1e-5 in fp32, greedy tokens equal, import(export(x)) == x bit for bit.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora
from checkpoint import export, load
from families.family import export_model, recognise_format
from families.formats import config_differences
from families.higgs import HIGGS_V2_3B
from families.moshi import MOSHI_7B
from families.moss import MOSS_9B
from families.qwen import QWEN2_5_1_5B
from generation.decode_step import SampleConfig
from layers.architecture import StackConfig
from lora import LoraConfig
from model import MultistreamLM
from sample import generate, reply
from streams import delay, undelay

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
GATE = 1e-5
CASES = ["qwen2", "qwen2_tied", "qwen3", "higgs", "boson_list", "boson_forward", "moshi", "moshi_steps", "moss"]
EXPORTS = {"boson_list": "boson", "boson_forward": "boson", "moshi": "moshi", "moshi_steps": "moshi"}
WORST: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def report():
    """Say how close it was: the numbers of the README's table."""
    yield
    print("\nmax |dlogit| " + ", ".join(f"{name} {error:.1e}" for name, error in WORST.items()))


class Golden:
    """One golden file: its config, and its tensors by name; `weights` are the official ones."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        self.name, self.weights = name, {k.removeprefix("weights/"): t for k, t in tensors.items() if k.startswith("weights/")}
        self.tensors = {k: t for k, t in tensors.items() if not k.startswith("weights/")}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def write(self, folder: Path, file: str = "model.safetensors") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.weights, folder / file)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def check(name: str, ours: torch.Tensor, theirs: torch.Tensor, gate: float = GATE) -> None:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    error = float((ours - theirs).abs().max())
    WORST[name] = max(error, WORST.get(name, 0.0))
    assert error <= gate, f"{name}: {error:.2e}"


@torch.inference_mode()
def logits(model: MultistreamLM, grid: torch.Tensor, positions: torch.Tensor | None = None) -> tuple:
    """Logits behind every column of a grid (B, K, S): a last column that nobody reads is added."""
    more = torch.nn.functional.pad(grid, (0, 1), value=-1)
    return model(more, positions=None if positions is None else torch.nn.functional.pad(positions, (0, 1), value=-1))


# ---- Qwen ----

@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied", "qwen3"])
def test_qwen_equals_transformers(name, tmp_path):
    case = Golden(name)
    qwen_checks(case, load(case.write(tmp_path)))


def qwen_checks(case: Golden, model: MultistreamLM) -> None:
    ids, mask = case["ids"], case["mask"].bool()
    check(case.name, logits(model, ids[:, None])[0], case["logits"])
    padded = ids.masked_fill(~mask, -1)[:, None]
    positions = mask.cumsum(1) - 1                                     # padding at -1: never seen
    check(case.name, logits(model, padded, positions)[0][mask], case["padded_logits"][mask])
    tokens = torch.stack(list(generate(model, padded, SampleConfig(temperature=0, max_frames=case["tokens"].shape[1]))), -1)[:, 0]
    stopped = tokens < 0                                               # transformers pads an ended row with 0
    assert torch.equal(tokens.masked_fill(stopped, 0), case["tokens"])


def test_peft_adapter_equals_peft(tmp_path):
    """DoRA, rsLoRA, ranks and alphas of their own, a head trained in full; unmerged, merged, and written back."""
    case = Golden("qwen_peft")
    base, adapter = case.write(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(case.config["adapter"]))
    tensors = {k.removeprefix("adapter/"): t for k, t in case.tensors.items() if k.startswith("adapter/")}
    save_file(tensors, adapter / "adapter_model.safetensors")
    model = load(base, adapter=adapter)
    assert (model.lora.rank, model.lora.dora, model.lora.rslora, model.lora.train) == (3, True, True, ("text_head.weight",))
    assert model.lora.ranks == (("temporal.layers.1.attn.q", 2),) and model.lora.alphas == (("temporal.layers.0.ffn.gate", 7.0),)
    assert model.lora.targets == ("temporal.layers.*.attn.q", "temporal.layers.*.attn.v", "temporal.layers.*.ffn.gate")
    qwen_checks(case, model)
    back = export(model, tmp_path / "back", to="peft")
    written = load_file(back / "adapter_model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[k], tensors[k]) for k in tensors)
    about = json.loads((back / "adapter_config.json").read_text())
    assert about["target_modules"] == ["gate_proj", "q_proj", "v_proj"] and about["modules_to_save"] == ["lm_head"]
    assert about["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 2}
    assert about["alpha_pattern"] == {"model.layers.0.mlp.gate_proj": 7.0}
    again = load(base, adapter=back)
    assert again.lora == model.lora and same_tensors(again, model)
    qwen_checks(case, load(export(model, tmp_path / "merged", to="hf")))


# ---- Higgs Audio ----

def higgs_grid(case: Golden) -> torch.Tensor:
    """(B, S) ids with placeholders and (B, n, Q) columns -> our grid (B, K, S), left padding empty."""
    ids, mask = case["ids"], case["mask"].bool()
    audio = (ids == case.config["audio_token_id"]) | (ids == case.config["audio_delay_token_id"])
    grid = torch.full((len(ids), 1 + case.config["num_codebooks"], ids.shape[1]), -1)
    grid[:, 0] = ids.masked_fill(audio | ~mask, -1)
    grid.transpose(1, 2)[..., 1:][audio] = case["audio"][case["audio_mask"]]
    return grid


def test_higgs_equals_transformers(tmp_path):
    case = Golden("higgs")
    model, mask, grid = load(case.write(tmp_path)), case["mask"].bool(), higgs_grid(case)
    text, audio = logits(model, grid, mask.cumsum(1) - 1)
    check("higgs", text[mask], case["text_logits"][mask])
    check("higgs", audio.transpose(1, 2)[mask], case["audio_logits"][mask])


def test_higgs_greedy_frames_equal_transformers_through_the_end(tmp_path):
    """Both items end, at different times: as many frames, and every code drawn before the two ways of closing part.

    When codebook 0 draws EOS in column c, theirs forces codebook k from column c + k + 1 on, ours from c + k, where
    training had it. A trained model draws that one EOS itself; a random one does not, so codes behind c + 1 may differ.
    """
    case = Golden("higgs")
    model, columns = load(case.write(tmp_path)), case["columns"].transpose(1, 2)                         # -> (B, Q, S)
    frames = torch.stack(list(generate(model, higgs_grid(case), SampleConfig(temperature=0, max_frames=columns.shape[2] + 8))), -1)
    for b, theirs in enumerate(columns):
        end = int((theirs[0] == case.config["audio_stream_eos_id"]).nonzero()[0])                         # column of the first EOS
        wanted = undelay(theirs, range(len(theirs)))[:, : end - 1]
        ours = frames[b, 1:][:, (frames[b, 1:] >= 0).all(0)]
        assert end > 5 and ours.shape == wanted.shape
        drawn = torch.arange(end - 1) + 1 + torch.arange(len(theirs))[:, None] <= end + 1                 # by column
        assert torch.equal(ours[drawn], wanted[drawn])


@pytest.mark.parametrize("name", ["boson_list", "boson_forward"])
def test_higgs_equals_boson(name, tmp_path):
    case = Golden(name)
    model, row, parts = load(case.write(tmp_path)), case["ids"][0], []
    assert (model.config.dual_ffn, model.config.fast_forward) == {"boson_list": ((0, 2), False), "boson_forward": ((1,), True)}[name]
    for token in row.tolist():
        if token in (49, 50):                                                                             # one placeholder a clip
            codes = case["audio_in" if token == 49 else "audio_out"]
            parts.append(torch.cat([torch.full((1, codes.shape[1]), -1), codes]))
        else:
            parts.append(torch.tensor([token, *[-1] * 3])[:, None])
    grid = torch.cat(parts, 1)
    text, audio = logits(model, grid[None])
    check(name, text, case["text_logits"])
    first = int((row == 50).nonzero()) - 1 + case["audio_in"].shape[1]
    check(name, audio[0, :, first : first + case["audio_out"].shape[1]].transpose(0, 1), case["audio_logits"])


# ---- Moshi ----

@pytest.mark.parametrize("name", ["moshi", "moshi_steps"])
def test_moshi_equals_moshi(name, tmp_path):
    """Teacher-forced logits, in the window and beyond; theirs are aligned with frames, ours with columns."""
    case = Golden(name)
    model = load(case.write(tmp_path))
    table, codes = model.table, case["codes"]
    assert model.config.temporal.window < codes.shape[-1]
    with torch.inference_mode():
        text, audio = model(delay(codes, table.delays, table.column("start")))
    check(name, text[case["text_mask"]], case["text_logits"][case["text_mask"]])
    for k, row in enumerate(table.audio_out):
        lag, mask = table.delays[row], case["mask"][:, k]
        frames = audio[:, k].roll(-lag, 1)                              # the last `lag` frames wrap around; the mask drops them
        check(name, frames[mask], case["logits"][:, k][mask])


@pytest.mark.parametrize("name", ["moshi", "moshi_steps"])
def test_moshi_greedy_frames_equal_lmgen(name, tmp_path):
    case = Golden(name)
    model, user, theirs = load(case.write(tmp_path)), case["user"], case["frames"]
    table = model.table
    assert table == replace(MOSHI_7B.table, streams=table.streams)
    frames = reply(model, user, SampleConfig(temperature=0), skip_first_frame=True)
    assert torch.equal(frames[:, [0, *table.audio_out]], theirs)
    heard = [k for k in table.audio if k not in table.audio_out]
    assert torch.equal(frames[:, heard], user[..., 1 : 1 + frames.shape[-1]])       # its first frame is never heard
    ours = reply(model, user[..., 1:], SampleConfig(temperature=0))                 # without the flag nothing is skipped
    assert torch.equal(ours, frames) and ours.shape[-1] == user.shape[-1] - 1
    with torch.inference_mode():                                        # training's forward pass agrees with every greedy token
        text, audio = model(delay(ours, table.delays, table.column("start")))
    assert torch.equal(text.argmax(-1), ours[:, 0])
    for k, row in enumerate(table.audio_out):
        lag = table.delays[row]
        assert torch.equal(audio[:, k].argmax(-1)[:, lag:], ours[:, row, : ours.shape[-1] - lag])


@pytest.mark.parametrize("form", ["in_proj_weight", "in_proj.weight"])
def test_moshi_reads_fused_attention(form, tmp_path):
    case = Golden("moshi")
    plain = load(case.write(tmp_path / "plain"))
    fused = load_file(export(plain, tmp_path / "fused", to="moshi") / "model.safetensors")
    assert fused["depformer.layers.1.self_attn.in_proj_weight"].shape == (3 * 3 * 18, 18) and not any("projs" in n for n in fused)
    case.weights = {n.replace("in_proj_weight", form): t for n, t in fused.items()}
    assert same_tensors(load(case.write(tmp_path / "again")), plain)


# ---- MOSS-Speech ----

def test_moss_equals_two_qwens_with_shared_layers(tmp_path):
    case = Golden("moss")
    model, rows, pad = load(case.write(tmp_path)), case["rows"], case.config["modality_pad_token_id"]
    is_audio = rows[0] == pad
    grid = torch.stack([rows[0].masked_fill(is_audio, -1), rows[1].masked_fill(~is_audio, -1)])[None]
    text, audio = logits(model, grid)
    check("moss", text, case["text_logits"])
    check("moss", audio[:, 0], case["audio_logits"])


# ---- both ways ----

def same_tensors(a: MultistreamLM, b: MultistreamLM) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", CASES)
def test_export_writes_back_what_was_read(name, tmp_path):
    """import(export(x)) == x, and the exported tensors are the official ones again (Moshi: fused, as released)."""
    case = Golden(name)
    model = load(case.write(tmp_path / "official"))
    folder = export(model, tmp_path / "back", to=EXPORTS.get(name, "hf"))
    again = load(folder)
    assert same_tensors(again, model) and not config_differences(model.config, again.config)
    written = load_file(folder / "model.safetensors")
    if "moshi" not in name:
        assert written.keys() == case.weights.keys()
    assert all(torch.equal(written[n], case.weights[n]) for n in written.keys() & case.weights.keys())
    assert same_tensors(load(export(model, tmp_path / "ours")), model)


def test_import_command_writes_a_checkpoint_of_ours(tmp_path):
    base = Golden("moshi").write(tmp_path / "base")
    rc, out, err = call("checkpoint.py", "import", base, f"--out={tmp_path / 'ours'}")
    assert (rc, err) == (0, "") and "wrote" in out and json.loads((tmp_path / "ours/config.json").read_text())["format"] == "multistream"
    assert same_tensors(load(tmp_path / "ours"), load(base))


def test_moshi_without_a_depth_transformer_only_writes_text(tmp_path):
    """The speech recognisers: every audio row is read, none is predicted."""
    case = Golden("moshi")
    case.config["dep_q"] = 0
    case.weights = {n: t for n, t in case.weights.items() if not n.startswith(("depformer", "linears"))}
    model = load(case.write(tmp_path / "base"))
    assert model.table.audio_out == [] and model.config.depth is None
    assert same_tensors(load(export(model, tmp_path / "back", to="moshi")), model)


def test_an_adapter_on_a_tied_head_is_not_merged_into_the_embedding(tmp_path):
    model = with_adapter(load(Golden("qwen2_tied").write(tmp_path)), LoraConfig(rank=2, targets=("attn.q", "text_head")))
    with pytest.raises(ValueError, match="tied head"):
        export(model, tmp_path / "x", to="hf")
    again = load(tmp_path, adapter=export(model, tmp_path / "peft", to="peft"))
    assert same_tensors(again, model)


def test_higgs_layouts_convert_into_each_other(tmp_path):
    model = load(Golden("higgs").write(tmp_path / "hf"))
    boson = load(export(model, tmp_path / "boson", to="boson"))
    assert same_tensors(boson, model) and not config_differences(model.config, boson.config)
    assert same_tensors(load(export(boson, tmp_path / "again", to="hf")), model)


def test_bf16_survives_export_bit_for_bit(tmp_path):
    model = load(Golden("moshi").write(tmp_path / "a"), dtype="bf16")
    assert same_tensors(load(export(model, tmp_path / "b", to="moshi"), dtype="bf16"), model)
    assert load_file(tmp_path / "b" / "model.safetensors")["text_emb.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["qwen2_tied", "higgs", "boson_forward", "moss", "moshi"])
def test_merged_export_equals_the_adapted_model(name, tmp_path):
    case = Golden(name)
    model = with_adapter(load(case.write(tmp_path / "base")), LoraConfig(rank=2, targets=("temporal.*attn.*", "ffn.*"), alpha=4.0))
    grid = torch.randint(0, 10, (1, len(model.table), 9), generator=torch.Generator().manual_seed(0))
    before = logits(model, grid)
    merged = load(export(model, tmp_path / "out", to=EXPORTS.get(name, "hf")))
    assert merged.count_parameters() < model.count_parameters()
    for a, b in zip(logits(merged, grid), before, strict=True):
        assert b is None or float((a - b).abs().max()) < GATE


def with_adapter(model: MultistreamLM, config: LoraConfig) -> MultistreamLM:
    lora.inject(model, config)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize(("name", "config"), [
    ("qwen3", LoraConfig(rank=2, alpha=3.0, targets=("attn.q", "temporal.layers.1.ffn.*"), train=("temporal.norm",))),
    ("higgs", LoraConfig(rank=3, targets=("attn.*", "audio_ffn.*", "audio_head"), rslora=True, ranks=(("audio_head", 1),))),
    ("boson_list", LoraConfig(rank=2, targets=("audio_ffn.down",), train=("audio_head",))),
    ("moss", LoraConfig(rank=2, targets=("audio_tail.*.attn.*",), dora=True, train=("embed.audio", "audio_head")))])
def test_peft_export_reads_back_exactly(name, config, tmp_path):
    base = Golden(name).write(tmp_path / "base")
    model = with_adapter(load(base), config)
    again = load(base, adapter=export(model, tmp_path / "peft", to="peft"))
    assert same_tensors(again, model)
    assert [(p, a.rank, a.scale) for p, _, a in lora.adapters(again)] == [(p, a.rank, a.scale) for p, _, a in lora.adapters(model)]


def test_peft_targets_keep_text_and_audio_networks_apart(tmp_path):
    """`gate_proj` alone would adapt both networks of a dual layer."""
    model = with_adapter(load(Golden("higgs").write(tmp_path / "base")), LoraConfig(targets=("attn.*", "ffn.gate")))
    about = json.loads((export(model, tmp_path / "peft", to="peft") / "adapter_config.json").read_text())
    assert about["target_modules"] == ["k_proj", "mlp.gate_proj", "o_proj", "q_proj", "v_proj"]


def test_moshi_adapter_file_reads_back_exactly(tmp_path):
    """Every Linear has a pair in the file, zero where untrained; those are left out again."""
    base = Golden("moshi").write(tmp_path / "base")
    model = with_adapter(load(base), LoraConfig(rank=3, alpha=6.0, targets=("temporal.layers.*.attn.*", "depth.layers.1.*", "depth.input")))
    folder = export(model, tmp_path / "lora", to="moshi-lora")
    tensors, about = load_file(folder / "lora.safetensors"), json.loads((folder / "config.json").read_text())
    assert (about["lora"], about["lora_rank"], about["lora_scaling"]) == (True, 3, 2.0)
    assert len(tensors) == 2 * (2 * 4 + 1 + 3 + 2 * 4 * 3 + 3) and not tensors["linears.2.lora_B.weight"].any()
    assert same_tensors(load(base, adapter=folder), model)


# ---- files as they come ----

def test_sharded_files_and_generation_config(tmp_path):
    case = Golden("qwen3")
    whole = load(case.write(tmp_path / "whole"))
    folder, names = case.write(tmp_path / "shards"), sorted(case.weights)
    (folder / "model.safetensors").unlink()
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, part in parts.items():
        save_file({name: case.weights[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [57, 58]}))
    model = load(folder)
    assert same_tensors(model, whole) and model.table.stop == (57, 58) and whole.table.stop == (57,)
    index["weight_map"][names[0]] = "../whole/model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        load(folder)


def test_a_file_among_others_is_read_by_name(tmp_path):
    case = Golden("moshi")
    folder = case.write(tmp_path, "lm.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "codec.safetensors")
    assert load(folder / "lm.safetensors").config.depth.steps == 3
    with pytest.raises(ValueError, match="2 weight files"):
        load(folder)


def test_boson_reads_split_tensors_and_heads_written_twice(tmp_path):
    case = Golden("boson_list")
    whole = load(case.write(tmp_path / "whole"))
    table, head = case.weights.pop("embed_tokens.weight"), case.weights.pop("audio_decoder_proj.text_lm_head.weight")
    case.weights |= {"embed_tokens.embedding_frozen.weight": table[:40].clone(),
                     "embed_tokens.embedding_trainable.weight": table[40:].clone(),
                     "audio_decoder_proj.text_lm_head.linear_frozen.weight": head[:60].clone(),
                     "audio_decoder_proj.text_lm_head.linear_trainable.weight": head[60:].clone(),
                     "audio_lm_head.weight": case.weights["audio_decoder_proj.audio_lm_head.weight"].clone(),
                     "audio_codebook_weights": torch.ones(3)}
    assert same_tensors(load(case.write(tmp_path / "split")), whole)
    case.weights["audio_lm_head.weight"] += 1
    with pytest.raises(ValueError, match=r"audio_lm_head.weight differs"):
        load(case.write(tmp_path / "differs"))


def test_higgs_without_a_text_head_only_reads_text(tmp_path):
    case = Golden("higgs")
    del case.weights["text_lm_head.weight"]
    model = load(case.write(tmp_path / "base"))
    assert model.table.text_out == [] and not hasattr(model, "text_head")
    assert same_tensors(load(export(model, tmp_path / "back", to="hf")), model)


def test_a_tied_head_may_be_written_too(tmp_path):
    case = Golden("qwen2_tied")
    case.weights["lm_head.weight"] = case.weights["model.embed_tokens.weight"].clone()
    model = load(case.write(tmp_path))
    assert model.text_head.weight is model.embed["text"].weight
    case.weights["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load(case.write(tmp_path))


@pytest.mark.parametrize("name", CASES)
def test_missing_extra_and_misshapen_tensors_are_named_in_one_line(name, tmp_path):
    case = Golden(name)
    first = sorted(case.weights)[1]
    changes = {"1 tensors missing": {first: None}, "1 unexpected ['surplus']": {"surplus": torch.zeros(2)},
               "its config expects": {first: case.weights[first][..., :-1].contiguous()}}
    for expected, change in changes.items():
        broken = Golden(name)
        broken.weights = {n: t for n, t in (broken.weights | change).items() if t is not None}
        with pytest.raises(ValueError) as caught:
            load(broken.write(tmp_path))
        assert expected in str(caught.value) and "\n" not in str(caught.value) and (expected.endswith("]") or first in str(caught.value))


@pytest.mark.parametrize(("name", "field", "value"), [
    ("qwen2", "use_sliding_window", True), ("qwen3", "attention_bias", True), ("qwen2", "hidden_act", "relu"),
    ("higgs", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}), ("boson_list", "use_rq_transformer", True),
    ("boson_list", "audio_embed_avg", True), ("moshi", "norm", "layer_norm"), ("moshi", "depformer_norm", "rms_norm"),
    ("moshi", "norm_emb", True), ("moshi", "bias_proj", True), ("moss", "num_hidden_layers", 9)])
def test_what_cannot_be_computed_is_refused_by_name(name, field, value, tmp_path):
    case = Golden(name)
    case.config[field] = value
    words = {"rope_parameters": "rope_type = 'yarn'", "hidden_act": "activation 'relu'", "num_hidden_layers": "has 9 layers"}
    with pytest.raises(ValueError, match=words.get(field, field)):
        load(case.write(tmp_path))


def test_a_config_without_a_field_says_which(tmp_path):
    case = Golden("qwen2")
    del case.config["intermediate_size"]
    with pytest.raises(ValueError, match="config.json lacks 'intermediate_size'"):
        load(case.write(tmp_path))


@pytest.mark.parametrize(("name", "field", "value", "words"), [
    ("qwen3", "num_hidden_layers", "3", "damaged"), ("qwen2", "num_attention_heads", 0, "damaged"),
    ("moss", "hidden_size", None, "damaged"), ("higgs", "rope_parameters", 7, "damaged"), ("boson_list", "text_config", None, "damaged"),
    ("moshi", "delays", [0, 0, 1], "3 delays for 6 streams")])
def test_a_damaged_config_is_one_line(name, field, value, words, tmp_path):
    case = Golden(name)
    case.config[field] = value
    with pytest.raises(ValueError, match=words):
        load(case.write(tmp_path))


def test_unknown_layouts_and_targets_are_refused(tmp_path):
    case = Golden("qwen2")
    model = load(case.write(tmp_path))
    with pytest.raises(ValueError, match="choose one of multistream, hf"):
        export(model, tmp_path / "x", to="moshi")
    with pytest.raises(ValueError, match="this model has none"):
        export(model, tmp_path / "x", to="peft")
    case.config["model_type"] = "gpt9"
    with pytest.raises(ValueError, match="'gpt9'"):
        load(case.write(tmp_path))


def test_a_layout_that_cannot_express_a_model_says_why(tmp_path):
    model = MultistreamLM(replace(load(Golden("qwen2").write(tmp_path)).config, temporal=StackConfig(dim=16, layers=1, heads=2, window=3)))
    with pytest.raises(ValueError, match="temporal.window: 3 -> 0"):
        export(model, tmp_path / "x", to="hf")
    higgs = load(Golden("boson_forward").write(tmp_path))
    with pytest.raises(ValueError, match="dual_ffn|fast_forward|no counterpart"):
        export(higgs, tmp_path / "x", to="hf")


def test_a_training_config_may_change_switches_but_no_shape(tmp_path):
    folder = Golden("qwen2").write(tmp_path)
    config = load(folder).config
    assert load(folder, config=replace(config, dropout=0.1)).config.dropout == 0.1
    with pytest.raises(ValueError, match=r"temporal.rope_theta"):
        load(folder, config=replace(config, temporal=replace(config.temporal, rope_theta=500.0)))


def test_peft_refuses_other_adapters(tmp_path):
    case = Golden("qwen_peft")
    base, adapter = case.write(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    tensors = {k.removeprefix("adapter/"): t for k, t in case.tensors.items() if k.startswith("adapter/")}
    save_file(tensors | {"base_model.model.model.vision.lora_A.weight": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(case.config["adapter"]))
    with pytest.raises(ValueError, match="1 tensors have no place"):
        load(base, adapter=adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(case.config["adapter"] | {"corda_config": {"rho": 2.0}}))
    with pytest.raises(ValueError, match="corda_config"):
        load(base, adapter=adapter)


@pytest.mark.parametrize(("config", "to", "tensors", "elements"), [
    (MOSHI_7B, "moshi", 355, 7_687_729_152), (HIGGS_V2_3B, "boson", 397, 5_771_283_456), (MOSS_9B, "hf", 446, 9_095_694_336),
    (QWEN2_5_1_5B, "hf", 338, 1_543_714_304)])
def test_published_architectures_have_the_published_tensors(config, to, tensors, elements):
    """On the meta device: names and sizes of the released files, and a config.json that reads back as the constant."""
    with torch.device("meta"):
        model = MultistreamLM(config)
    about, theirs = export_model(config, model.weights(), to, "bfloat16")
    assert (len(theirs), sum(t.numel() for t in theirs.values())) == (tensors, elements)
    assert recognise_format(about).to == to


def test_golden_files_are_small_and_say_where_they_come_from():
    assert all(f.stat().st_size <= 200_000 for f in GOLDEN.glob("*.safetensors"))
    for file in (GOLDEN / f"{name}.safetensors" for name in (*CASES, "qwen_peft")):
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        assert {"config", "versions", "command"} <= about.keys() and "torch" in json.loads(about["versions"])
