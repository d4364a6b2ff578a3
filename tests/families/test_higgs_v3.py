"""Higgs Audio v3: what transformers' Qwen3 computes on summed embeddings, ours computes; its prompt, delays and end are the official
ones; the smoke twin runs from training to the official files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, killed_and_resumed
from safetensors.torch import load_file
from test_parity import Golden, check
from test_sample import overfit

import lora
from audio import load_codec
from checkpoint import export, load
from corpus.examples import prompt_example
from evaluation.consistency import disagreement
from families.family import family_of, lay_out
from families.higgs_v3 import HIGGS_V3_4B, MARKS, TEMPLATE, stream_table
from generation.decode_step import SampleConfig
from generation.sessions import SessionBatch
from lora import LoraConfig
from model import MultistreamLM
from options import run_config
from sample import generate, speak_examples
from streams import Example
from text.conversation import Chat
from text.tokenizers import load_tokenizer

CASES = ["higgs_v3", "higgs_v3_wide"]
SMOKE = run_config(ROOT / "configs/higgs_v3.py", "smoke")
TOKENIZER = load_tokenizer(ROOT / "assets/tiny_marks_tokenizer.json")
CHAT = Chat(TOKENIZER, TEMPLATE)
RULES = SampleConfig(temperature=0, closing="first", max_frames=60)


def example(segments: list) -> Example:
    return Example(torch.zeros(0), segments=segments)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_frames_equal_the_official_ones_to_the_end(name, tmp_path):
    case = Golden(name)
    model = load(case.write(tmp_path))
    with torch.inference_mode():
        text, audio = model(torch.nn.functional.pad(case["grid"], (0, 1), value=-1)[None])
    assert text is None and model.audio_head.weight is model.embed["audio"].weight
    check(name, audio[0], case["logits"])
    got = torch.stack([f[0, 1:] for f in generate(model, case["grid"][:, : case["prompt"]], RULES) if bool((f[0, 1:] >= 0).all())], 1)
    assert torch.equal(got, case["frames"])


@pytest.mark.parametrize("name", CASES)
def test_official_files_come_back_bit_for_bit(name, tmp_path):
    case = Golden(name)
    model = load(case.write(tmp_path / "a"))
    export(model, tmp_path / "b", "hf")
    written = load_file(tmp_path / "b" / "model.safetensors")
    wanted = {k: t for k, t in case.weights.items() if ".model." not in k}
    assert wanted.keys() == written.keys() and all(torch.equal(written[k], t) for k, t in wanted.items())
    assert load(tmp_path / "b").config == model.config
    case.weights["tied.head.modality_heads.0.weight"] = wanted["tied.embedding.modality_embeddings.0.embedding.weight"] + 1
    with pytest.raises(ValueError, match="ties them"):
        load(case.write(tmp_path / "c"))
    case.config["audio_encoder_config"]["tie_word_embeddings"] = False                      # a head of its own
    apart = load(case.write(tmp_path / "d"))
    assert not apart.config.audio_tied and apart.count_parameters() == model.count_parameters() + model.embed["audio"].weight.numel()
    case.config["text_config"] |= {"rope_theta": None, "rope_parameters": None}             # as released
    assert load(case.write(tmp_path / "e")).config.temporal.rope_theta == 1e6


def test_the_published_model():
    with torch.device("meta"):
        model = MultistreamLM(HIGGS_V3_4B)
    matrices = [p for n, p in model.named_parameters() if n.startswith("temporal") and p.dim() == 2]
    assert len(matrices) == 252 and sum(p.numel() for p in matrices) == 3_633_315_840
    assert model.embed["audio"].weight.shape == (8208, 2560) and model.count_parameters() == 4_043_480_576
    form = family_of(HIGGS_V3_4B.table).formats[0]
    assert form.read(form.write(HIGGS_V3_4B, "bfloat16"), {}) == HIGGS_V3_4B


def test_the_prompt_is_the_official_one_and_training_goes_on_from_it():
    """text_tokenizer.py: <|tts|> <|ref_text|> said <|ref_audio|> T + 7 columns <|text|> text <|audio|>; then T + 7 columns."""
    table = SMOKE.model.table
    tts, ref_text, ref_audio, text, audio = (TOKENIZER.encode(mark)[0] for mark in MARKS)
    voice, codes = (torch.randint(0, 256, (8, n), generator=torch.Generator().manual_seed(n)) for n in (3, 5))
    prompt, _ = lay_out(example(CHAT.prompt("Hello.", [("One.", voice)])), table)
    words = [tts, ref_text, *TOKENIZER.encode("One."), ref_audio, *[-1] * 10, text, *TOKENIZER.encode("Hello."), audio]
    assert prompt[0].tolist() == words
    at = words.index(-1)
    for k in range(8):
        assert prompt[1 + k, at : at + 10].tolist() == [256] * k + voice[k].tolist() + [257] * (7 - k)
    tokens, weights = lay_out(example(CHAT.spoken("Hello.", codes, [("One.", voice)])), table)
    assert torch.equal(tokens[:, : len(words)], prompt) and tokens.shape[1] == len(words) + 12
    assert not weights[:, : len(words)].any() and weights[1:].sum(1).tolist() == [6.0] * 7 + [5.0]         # codes, and an end where it fits
    assert disagreement(table, tokens, weights, prompt) == ""
    assert lay_out(example(CHAT.prompt("Hello.")), table)[0][0].tolist() == [tts, text, *TOKENIZER.encode("Hello."), audio]
    for wrong in ({"references": [("a", voice), ("b", voice)]}, {"scene": "tara"}, {"references": [("profile:x", voice[:, :0])]}):
        with pytest.raises(ValueError, match="one recording of a voice"):
            CHAT.prompt("Hello.", **wrong)
    with pytest.raises(ValueError, match=r"<\|audio\|> is"):
        CHAT.check_tokenizer(replace(table, audio_start=3))


def test_only_the_first_codebook_ends_the_speech():
    torch.manual_seed(0)
    model = MultistreamLM(SMOKE.model).eval()
    prompt, _ = lay_out(example(CHAT.prompt("Hello.")), model.table)
    given = torch.full((1, 9, 30), -2)                          # FREE
    given[0, 1:, 9:] = 5
    given[0, 4, 10], given[0, 1, 14] = 257, 257                 # an end id of the fourth codebook, then of the first
    ended = {}
    for closing in ("frame", "first"):
        got = list(generate(model, prompt, replace(RULES, closing=closing), given=given))
        ended[closing] = sum(bool((f[0, 1:] >= 0).all()) for f in got)
    assert ended == {"frame": 7, "first": 14}                   # column 10 of the fourth is frame 7


def test_an_overfitted_clip_comes_back_alone_and_live():
    codes = torch.randint(0, 16, (8, 5), generator=torch.Generator().manual_seed(1))
    table = stream_table(288, 8, 18, SMOKE.model.table.audio_start)                         # small, so that it learns fast
    model = overfit(replace(SMOKE.model, table=table), example(CHAT.spoken("four", codes)), steps=70)
    codec, asked = load_codec("tiny"), example(CHAT.prompt("four"))
    speech = speak_examples(model, [asked], RULES, codec)[0]
    assert torch.equal(speech.codes, codes) and speech.ended
    prompt, batch = lay_out(asked, model.table)[0], SessionBatch(model, 2, columns=96)
    batch.begin(1, prompt, SampleConfig(max_frames=60), 3)
    frames = [batch.begin(0, prompt, RULES, 0)]
    while not batch.done(0):
        frames.append(batch.step({}).get(0))
    found = [frame[1:] for frame in frames if frame is not None and bool((frame[1:] >= 0).all())]
    assert torch.equal(torch.stack(found, 1), codes)


def test_an_adapter_on_the_tied_head_is_not_merged():
    model = lora.inject(MultistreamLM(SMOKE.model), LoraConfig(rank=2, alpha=2.0, targets=("audio_head",)))
    with pytest.raises(ValueError, match="tied"):
        export(model, "/nowhere", "hf")


@pytest.mark.slow
def test_smoke_trains_resumes_samples_exports_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "higgs_v3"
    options = (f"--data.cache={tmp_path}/cache", "--data.sources=assets/speech/chat.jsonl", "--eval_every=0",
               "--prompts=()", "--listen=0")
    killed_and_resumed("higgs_v3", out, *options)
    monkeypatch.chdir(ROOT)
    data = replace(SMOKE.data, tokenizer=str(ROOT / SMOKE.data.tokenizer))
    model = load(out)
    prompt = lay_out(prompt_example("thank you", data, TOKENIZER, load_codec("tiny"), table=model.table), model.table)[0]
    assert len(list(generate(model, prompt, SampleConfig(**family_of(model.table).rules(model.table) | {"max_frames": 3})))) <= 3
    code, text, err = call("sample.py", f"--ckpt={out}", "--text=thank you", "--max_frames=12", f"--out={tmp_path}/x.wav")
    assert code == 0 and (tmp_path / "x.wav").stat().st_size > 1000, err
    export(out, tmp_path / "official", "hf")
    again, merged = load(tmp_path / "official"), load(out)
    lora.strip(merged)
    codes = torch.randint(0, 256, (8, 4), generator=torch.Generator().manual_seed(0))
    tokens = lay_out(example(CHAT.spoken("Hello.", codes)), merged.table)[0][None]
    assert again.audio_head.weight is again.embed["audio"].weight and torch.allclose(again(tokens)[1], merged(tokens)[1], atol=1e-5)
