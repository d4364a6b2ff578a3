"""Higgs Audio: how speech ends, equal to the references column by column; one clip comes back; the smoke twin's whole life."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import save_file
from test_conversation import CHAT, TINY, Golden, codes, grid
from test_parity import Golden as Official
from test_parity import higgs_grid
from test_sample import overfit

from audio import load_codec
from audio.wav import load_wav, resample
from checkpoint import load
from corpus.examples import prompt_example
from families.family import lay_out
from families.higgs import HIGGS_V2_3B
from generation.decode_step import SampleConfig, SamplingNoise, sample_ids
from generation.turns import Undelay, recent_codes
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig, adapters, inject
from model import MultistreamLM
from options import run_config
from sample import generate, speak_long
from streams import Example

CONFIGS = {name: ROOT / f"configs/{name}.py" for name in ("higgs_ar", "higgs_full")}


# ---- how speech ends ----

@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every column (B, K) that is drawn, before it is un-delayed."""
    seen: list[torch.Tensor] = []
    push = Undelay.push
    monkeypatch.setattr(Undelay, "push", lambda self, column: seen.append(column.clone()) or push(self, column))
    return seen


@pytest.fixture(scope="module")
def boson(tmp_path_factory: pytest.TempPathFactory) -> tuple[MultistreamLM, Golden]:
    golden, folder = Golden(), tmp_path_factory.mktemp("boson")
    save_file({k.removeprefix("weights/"): t for k, t in golden.tensors.items() if k.startswith("weights/")}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(golden.config))
    return load(folder), golden


@pytest.mark.parametrize("n", range(32))
def test_greedy_columns_equal_boson_through_the_end(n: int, boson: tuple[MultistreamLM, Golden], columns: list[torch.Tensor]) -> None:
    """Whichever codebook draws its end first; the frames of our own rule are as many."""
    model, golden = boson
    ids, clip, theirs = (golden.tensors[f"prompt{n}/{name}"] for name in ("ids", "clip", "columns"))
    place = int((ids == CHAT.tokenizer.encode("<|AUDIO_OUT|>")[0]).nonzero())
    prompt = torch.full((5, len(ids) - 1 + clip.shape[1]), -1)
    prompt[0, :place], prompt[0, place + clip.shape[1] :] = ids[:place], ids[place + 1 :]
    prompt[1:, place : place + clip.shape[1]] = clip
    frames = list(generate(model, prompt, SampleConfig(temperature=0, max_frames=theirs.shape[1] + 1, closing="boson")))
    ours = torch.stack(columns, -1)[0]                                                # (K, n)
    assert torch.equal(ours[1:, : theirs.shape[1]], theirs)
    assert ours[0, theirs.shape[1]] == model.table.audio_end and ours[1:, theirs.shape[1]].eq(-1).all()
    wanted = theirs.shape[1] - 4 - 1                                                  # (K, L) -> T: their revert, without the edges
    assert sum(bool((f[0, 1:] >= 0).all()) for f in frames) == wanted
    again = list(generate(model, prompt, SampleConfig(temperature=0, max_frames=theirs.shape[1] + 8)))
    assert sum(bool((f[0, 1:] >= 0).all()) for f in again) == wanted


def test_boson_ends_came_from_every_codebook() -> None:
    golden = Golden()
    first = set()
    for n in range(32):
        theirs = golden.tensors[f"prompt{n}/columns"]
        first.add(theirs.shape[1] - (theirs.eq(17).any(0).nonzero()[0].item() + 1))
    assert first == {0, 1, 2, 3}                                                      # columns behind the first end: K - 1 - codebook


def test_greedy_columns_equal_transformers_through_the_end(tmp_path: Path, columns: list[torch.Tensor]) -> None:
    case = Official("higgs")
    model, theirs = load(case.write(tmp_path)), case["columns"].transpose(1, 2)       # -> (B, Q, n)
    config = SampleConfig(temperature=0, max_frames=theirs.shape[2] + 2, closing="hf")
    frames = torch.stack(list(generate(model, higgs_grid(case), config)), -1)
    ours = torch.stack(columns, -1)[:, 1:]
    for b in range(len(theirs)):
        end = int((theirs[b] == 13).all(0).nonzero()[0])                              # the column in which all rows have ended
        assert torch.equal(ours[b, :, : end + 1], theirs[b, :, : end + 1])
        assert int((frames[b, 1:] >= 0).all(0).sum()) == end - len(theirs[b])         # as many as their processor decodes


def test_repetition_looks_back_over_speech_alone() -> None:
    """boson counts start and end ids and the prompt's clips, transformers neither start nor end ids."""
    prompt, _ = grid(CHAT.prompt("x", [("r", codes(1, 8))]), TINY)
    clip = prompt[1:][:, (prompt[1:] >= 0).all(0)]
    assert clip.shape[1] == 1 + 8 + 1 and torch.equal(recent_codes(prompt[None], TINY, 7)[0], clip[:, -7:])
    logits, stuck = torch.tensor([[[5.0, 4.9, 0.0]]]), torch.zeros(1, 1, 7, dtype=torch.long)
    config, cpu = SampleConfig(temperature=0, ras_window=7), torch.device("cpu")
    drawn = [sample_ids(logits, config, slice(0, 1), SamplingNoise(seed, 1, 1, cpu), stuck) for seed in range(80)]
    assert 0.3 < torch.cat(drawn).float().mean() < 0.7


def test_the_closing_rule_has_three_names() -> None:
    with pytest.raises(AssertionError, match="none of frame, boson, hf"):
        SampleConfig(closing="soon")


# ---- a clip comes back ----

def spoken_clip() -> torch.Tensor:
    codec = load_codec("tiny")
    wav, rate = load_wav(ROOT / "assets/speech/synthetic/ar/hello.opus")
    return codec.encode(resample(wav, rate, codec.sample_rate)[None])[0]              # (8, T)


def test_an_overfitted_arabic_clip_comes_back_exactly() -> None:
    model_config, clip = run_config(CONFIGS["higgs_ar"], "smoke").model, spoken_clip()
    voice = ("السلام عليكم", codes(4, 8))
    example = Example(torch.zeros(0), segments=CHAT.spoken("مرحبا", clip, [voice], "A quiet room."))
    model = overfit(model_config, example, 400)
    prompt, _ = grid(CHAT.prompt("مرحبا", [voice], "A quiet room."), model_config.table)
    for closing in ("frame", "boson", "hf"):
        frames = torch.stack(list(generate(model, prompt, SampleConfig(temperature=0, closing=closing))), -1)[0]
        got = frames[1:, (frames[1:] >= 0).all(0)]
        assert torch.equal(got, clip)
        assert [int(i) for i in frames[0] if i >= 0] == CHAT.tokenizer.encode("<|audio_eos|><|eot_id|>")        # and it stops


def test_a_long_text_goes_on_from_the_voice_of_the_piece_before(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    smoke, seen = run_config(CONFIGS["higgs_ar"], "smoke"), []
    model, plain = MultistreamLM(smoke.model), prompt_example
    monkeypatch.setattr("sample.prompt_example", lambda *a: seen.append((a[0], [(t, c.shape[1]) for t, c in a[6]])) or plain(*a))
    data = replace(smoke.data, tokenizer=str(ROOT / smoke.data.tokenizer))
    speech = speak_long(model, "one two three four five", data, SampleConfig(max_frames=30), load_codec("tiny"), 2)
    assert [text for text, _ in seen] == ["one two", "three four", "five."] and [len(before) for _, before in seen] == [0, 1, 1]
    assert [before[0][0] for _, before in seen[1:]] == ["one two", "three four"]
    assert speech.codes.shape[1] == speech.frames > 0 and speech.wav.shape[1] == 640 * speech.frames


# ---- the released model's config, adapters, and the smoke twin ----

def test_the_released_model_has_its_parameters_and_layout() -> None:
    with torch.device("meta"):
        assert MultistreamLM(HIGGS_V2_3B).count_parameters() == 5_771_283_456
    assert HIGGS_V2_3B.table.layout == "chatml"


def test_the_adapter_sets_of_the_recipes_have_their_sizes() -> None:
    found = {}
    for name, trained in (("attention_only", ()), ("audio_focused", ()), ("comprehensive", ()), ("audio_focused", ("audio_head",))):
        with torch.device("meta"):
            model = MultistreamLM(HIGGS_V2_3B)
            inject(model, LoraConfig(rank=16, targets=(name,), train=trained))
        found[name, *trained] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == {("attention_only",): 9_175_040, ("audio_focused",): 15_138_816 + 180_480, ("comprehensive",): 39_452_672 + 180_480,
                     ("audio_focused", "audio_head"): 15_138_816 + 8208 * 3072}
    assert run_config(CONFIGS["higgs_ar"]).lora.targets == ("comprehensive",)


def test_a_set_of_adapters_that_the_model_cannot_have_is_named() -> None:
    plain = MultistreamLM(ModelConfig(TINY, StackConfig(dim=24, layers=1, heads=2, ffn=20)))
    with pytest.raises(ValueError, match=r"audio_ffn\.\*' matches no Linear; choose from .*temporal\.layers\.N\.ffn\.gate"):
        inject(plain, LoraConfig(targets=("audio_focused",)))


def test_a_batch_without_speech_reaches_every_adapter() -> None:
    model = MultistreamLM(ModelConfig(TINY, StackConfig(dim=24, layers=2, heads=2, ffn=20), dual_ffn=(0, 1)))
    inject(model, LoraConfig(rank=2, targets=("audio_ffn.*", "ffn.*")))
    tokens, weights = lay_out(Example(torch.zeros(0), segments=[(torch.arange(9), 1.0)]), TINY)
    sums = model(tokens[None], weights[None])
    sums.nll.sum().backward()
    assert all(p.grad is not None for _, _, a in adapters(model) for p in a.parameters()) and int(sums.count[1:].sum()) == 0


def test_wishes_that_make_no_sense_end_in_one_line(tmp_path: Path) -> None:
    for option, wanted in (("--ref_in=user", "ref_in is assistant or system"),
                           ("--chunk_words=-1", "chunk_words and chunk_buffer are not negative"),
                           ("--closing=soon", "none of frame, boson, hf")):
        rc, _, err = call("sample.py", "--ckpt=out/nothing", "--text=hi", option, f"--out={tmp_path}/x.wav")
        assert rc == 2 and wanted in err and err.count("\n") == 1, err


def run(*args: object) -> str:
    rc, out, err = call(*args)
    assert rc == 0, out + err
    return out + err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["higgs_ar", "higgs_full"])
def test_smoke_trains_resumes_samples_exports_and_reads_back(name: str, tmp_path: Path) -> None:
    common = (f"configs/{name}.py", "--smoke", f"--data.cache={tmp_path}/cache")
    assert "step 12: held-out loss" in run("train.py", *common, f"--out={tmp_path}/whole")
    run("train.py", *common, f"--out={tmp_path}/parts", "--steps=6", "--schedule=constant")
    assert "resuming" in run("train.py", *common, f"--out={tmp_path}/parts")
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in lines if "train/loss" in row} == set(range(12))
    assert all(f"val/cb{k}_loss" in lines[-1] for k in range(1, 9))
    assert list((tmp_path / "whole/samples/step_000012").glob("*.wav"))
    out = run("sample.py", "--ckpt", tmp_path / "whole", "--text", "مرحبا بكم", "--ref", "assets/speech/synthetic/ar/hello.opus",
              "--ref_text", "مرحبا", "--scene", "A quiet room.", "--out", tmp_path / "x.wav", "--max_frames=40")
    assert (tmp_path / "x.wav").stat().st_size > 44 and ("adapter applied" in out) == (name == "higgs_ar")
    model = load(tmp_path / "whole")
    tokens = torch.cat([grid(CHAT.prompt("hi", [("r", codes(3, 8))]), model.table)[0]], 1)[None]
    with torch.inference_mode():
        wanted = model(tokens)
    for layout in ("hf", "boson"):
        run("checkpoint.py", "export", tmp_path / "whole", f"--to={layout}", f"--out={tmp_path}/{layout}")
        run("checkpoint.py", "import", tmp_path / layout, f"--out={tmp_path}/{layout}_back")
        again = load(tmp_path / f"{layout}_back")
        assert again.table.layout == "chatml" and again.table.audio_start == model.table.audio_start
        with torch.inference_mode():
            assert all(float((a - b).abs().max()) < 1e-4 for a, b in zip(again(tokens), wanted, strict=True))
    if name == "higgs_ar":
        run("checkpoint.py", "export", tmp_path / "whole", "--to=peft", f"--out={tmp_path}/peft")
        again = load(tmp_path / "whole/base", adapter=tmp_path / "peft")
        with torch.inference_mode():
            assert all(torch.equal(a, b) for a, b in zip(again(tokens), wanted, strict=True))
