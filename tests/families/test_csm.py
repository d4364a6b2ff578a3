"""CSM: what transformers computes, ours computes; its prefix depth transformer trains on a share of the frames; its turns are the
official ones; the smoke twin runs from training to the official files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, killed_and_resumed
from safetensors.torch import load_file
from test_parity import GATE, Golden, check
from test_sample import overfit

from audio import load_codec
from checkpoint import export, load
from corpus.examples import prompt_example
from families.csm import CSM_1B, TEMPLATE
from families.family import family_of, lay_out
from generation.decode_step import SampleConfig
from model import MultistreamLM
from options import run_config
from sample import generate
from streams import Example
from text.conversation import Chat
from text.tokenizers import load_tokenizer

CASES = ["csm", "csm_wide"]
TOKENIZER = load_tokenizer(ROOT / "assets/tiny_tokenizer.json")
SMOKE = run_config(ROOT / "configs/csm.py", "smoke")


def grid(case: Golden) -> torch.Tensor:
    text, frames = case["text"], case["frames"]
    tokens = torch.full((1, 1 + frames.shape[2], text.shape[1] + frames.shape[1]), -1)
    tokens[0, 0, : text.shape[1]], tokens[0, 1:, text.shape[1] :] = text[0], frames[0].T
    return tokens


@pytest.mark.parametrize("name", CASES)
def test_logits_losses_and_greedy_frames_equal_transformers(name, tmp_path):
    case = Golden(name)
    model, tokens, n = load(case.write(tmp_path)), grid(case), case["text"].shape[1]
    with torch.inference_mode():
        text, audio = model(tokens)
        assert text is None and audio.shape == (1, case["frames"].shape[2], tokens.shape[2] - 1, case["first"].shape[-1])
        check(name, audio[:, 0, n - 1 :], case["first"])
        check(name, audio[0, 1:, n - 1 :].transpose(0, 1), case["rest"])
        weights = (tokens >= 0).float()
        weights[:, 0] = 0
        sums = model(tokens, weights)
    means = torch.stack([sums.nll[1] / sums.weight[1], sums.nll[2:].sum() / sums.weight[2:].sum()])
    assert torch.allclose(means, case["losses"], rtol=0, atol=GATE)
    got = torch.stack([f[0, 1:] for f in generate(model, tokens[..., :n], SampleConfig(temperature=0, max_frames=case["greedy"].shape[1]))])
    assert torch.equal(got, case["greedy"][0])


@pytest.mark.parametrize("name", CASES)
def test_official_files_come_back_bit_for_bit(name, tmp_path):
    case = Golden(name)
    export(load(case.write(tmp_path / "a")), tmp_path / "b", "hf")
    written = load_file(tmp_path / "b" / "model.safetensors")
    names = {"backbone_model.embed_tokens.embed_audio_tokens.weight": "depth_decoder.model.embed_tokens.weight"}     # as save_pretrained
    assert {names.get(k, k) for k in case.weights} == written.keys()
    assert all(torch.equal(written[names.get(k, k)], t) for k, t in case.weights.items())
    assert load(tmp_path / "b").config == load(tmp_path / "a").config


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_transformers_loads_what_we_export(name, tmp_path):
    transformers, case = pytest.importorskip("transformers"), Golden(name)
    folder = export(load(case.write(tmp_path / "a")), tmp_path / "b", "hf")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"codec_config": case.config["codec_config"]}))        # a codec of its size
    theirs, info = transformers.CsmForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not [key for key in [*info["missing_keys"], *info["unexpected_keys"]] if not key.startswith("codec_model.")], info
    greedy = theirs.eval().generate(input_ids=case["text"], max_new_tokens=12, do_sample=False, depth_decoder_do_sample=False)
    assert torch.equal(greedy, case["greedy"])


def test_published_size():
    with torch.device("meta"):
        assert MultistreamLM(CSM_1B).count_parameters() == 1_552_791_552                # of the 1.63 B the codec is the rest


def drawn(seed: int = 0, **changes: object) -> MultistreamLM:
    torch.manual_seed(seed)
    return MultistreamLM(replace(SMOKE.model, **changes))


def frames(model: MultistreamLM, T: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(1, 250, (8, T), generator=torch.Generator().manual_seed(seed))
    chat = Chat(TOKENIZER, TEMPLATE)
    tokens, weights = lay_out(Example(torch.zeros(0, dtype=torch.long), segments=chat.spoken("Hello there.", codes)), model.table)
    return tokens[None], weights[None]


def test_a_share_of_the_frames_gives_the_same_sums_on_average():
    model = drawn(depth_share=0.25)
    tokens, weights = frames(model, 39)                                                    # 40 with the last: 10 of them are drawn
    whole = model.eval()(tokens, weights)
    model.train()
    torch.manual_seed(1)
    shares = [model(tokens, weights) for _ in range(300)]
    for part in shares[:3]:
        assert torch.equal(part.count[2:], torch.full((7,), 10.0)) and part.count[1] == 40
        assert torch.allclose(part.weight, whole.weight)                                   # a frame counts four times
    mean = torch.stack([part.nll for part in shares]).mean(0)
    assert torch.allclose(mean[1], whole.nll[1]) and torch.allclose(mean[2:], whole.nll[2:], rtol=0.02)


def test_gradients_reach_every_part_and_those_of_the_scaled_way_are_equal():
    model = drawn(depth_share=1.0)
    tokens, weights = frames(model, 7)
    scale = torch.tensor([0.0, 0.3, *[0.1] * 7])
    sums = model(tokens, weights)
    (scale * sums.nll).sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g.abs().sum() > 0 for g in plain.values())
    model.zero_grad()
    model(tokens, weights, scale=scale).total.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, plain[name], atol=1e-6, rtol=1e-4), name


def test_cached_frames_equal_the_full_forward():
    """What is drawn greedily is what the full forward finds likeliest, codebook by codebook."""
    model = drawn(3).eval()
    tokens, _ = frames(model, 1)
    prompt = tokens[..., :-2]
    got = list(generate(model, prompt, SampleConfig(temperature=0, max_frames=6)))
    whole = torch.cat([prompt, *(f[:, :, None] for f in got)], 2)
    with torch.inference_mode():
        _, audio = model(whole)
    assert torch.equal(audio[:, :, prompt.shape[2] - 1 :].argmax(-1), whole[:, 1:, prompt.shape[2] :])


def test_a_frame_of_zeros_ends_a_turn_and_a_single_zero_does_not():
    model = drawn(5).eval()
    tokens, _ = frames(model, 1)
    prompt = tokens[..., :-2]
    given = torch.full((1, 9, 4), -2)                       # FREE
    given[:, 1:, 0], given[:, 1, 1], given[:, 1:, 2] = 7, 0, 0
    given[:, 2:, 1] = 9
    got = list(generate(model, prompt, SampleConfig(temperature=0, max_frames=9), given=given))
    assert len(got) == 3 and (got[2] == -1).all() and got[0][0, 1:].tolist() == [7] * 8 and got[1][0, 1:].tolist() == [0, *[9] * 7]


def test_an_overfitted_clip_comes_back_exactly():
    """Behind the voice of a turn before; a frame of zeros ends it."""
    voice, codes = torch.randint(1, 250, (2, 8, 5), generator=torch.Generator().manual_seed(1))
    chat, past = Chat(TOKENIZER, TEMPLATE), [("One two.", voice)]
    none = torch.zeros(0, dtype=torch.long)
    model = overfit(replace(SMOKE.model, depth_share=1.0), Example(none, segments=chat.spoken("Hello there.", codes, past)))
    prompt, _ = lay_out(Example(none, segments=chat.prompt("Hello there.", past)), model.table)
    got = torch.stack(list(generate(model, prompt, SampleConfig(temperature=0, max_frames=20))), -1)[0, 1:]
    assert torch.equal(got[:, :5], codes) and got.shape[1] == 6 and bool((got[:, 5] == -1).all())


def test_turns_are_written_as_the_official_template_writes_them():
    """<|begin_of_text|>[0]text<|end_of_text|> codes, a frame of zeros; voices of the past stand before, numbered."""
    codes = torch.full((8, 3), 5)
    chat = Chat(TOKENIZER, TEMPLATE)
    segments = chat.prompt("Hello.", [("One two.", codes), ("Three.", codes)])
    turns = [f"<|begin_of_text|>[{n}]{said}<|end_of_text|>" for n, said in ((0, "One two."), (1, "Three."), (0, "Hello."))]
    assert [i for ids, _ in segments if ids.dim() == 1 for i in ids.tolist()] == TOKENIZER.encode("".join(turns))
    trained = chat.spoken("Hello.", codes, [("One two.", codes)])
    tokens, weights = lay_out(Example(torch.zeros(0, dtype=torch.long), segments=trained), SMOKE.model.table)
    assert not weights[0].any() and weights[1:].sum(1).tolist() == [4.0] * 8 and tokens[1:, -1].tolist() == [0] * 8
    prompt, _ = lay_out(Example(torch.zeros(0, dtype=torch.long), segments=chat.prompt("Hello.", [("One two.", codes)])), SMOKE.model.table)
    assert torch.equal(tokens[:, : prompt.shape[1]], prompt)
    with pytest.raises(ValueError, match="--scene"):
        chat.prompt("Hello.", [], scene="A room.")


@pytest.mark.slow
def test_smoke_trains_resumes_samples_exports_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "csm"
    options = (f"--data.cache={tmp_path}/cache", "--data.sources=assets/speech/chat.jsonl", "--eval_every=0",
               "--prompts=()", "--listen=0")
    killed_and_resumed("csm", out, *options, whole=True)
    monkeypatch.chdir(ROOT)
    data = replace(SMOKE.data, tokenizer=str(ROOT / SMOKE.data.tokenizer))
    model = load(out)
    prompt = lay_out(prompt_example("thank you", data, TOKENIZER, load_codec("tiny"), table=model.table), model.table)[0]
    rules = SampleConfig(**family_of(model.table).rules(model.table) | {"max_frames": 3})
    assert len(list(generate(model, prompt, rules))) <= 3
    code, text, err = call("sample.py", f"--ckpt={out}", "--text=thank you", "--max_frames=4", f"--out={tmp_path}/x.wav")
    assert code == 0 and (tmp_path / "x.wav").stat().st_size > 1000, err
    export(out, tmp_path / "official", "hf")
    again, merged = load(tmp_path / "official"), load(out)
    import lora
    lora.strip(merged)
    tokens, _ = frames(merged, 3)
    assert torch.allclose(again(tokens)[1], merged(tokens)[1], atol=1e-5)
