"""Qwen3-TTS: what qwen-tts computes, ours computes, behind every kind of prompt; its frames align where the official script's do not;
official files come back; the smoke twin runs from training to the official files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, killed_and_resumed, write_clips
from safetensors.torch import load_file
from test_parity import GATE, Golden, check

import lora
from audio import load_codec
from audio.wav import save_wav
from checkpoint import export, load, save
from families.family import family_of, lay_out
from families.formats import official_files
from families.qwen_tts import QWEN3_TTS_0_6B, QWEN3_TTS_1_7B, TEMPLATE, chosen
from generation.command_line import load_for_sampling, usual_rules
from generation.decode_step import SampleConfig
from generation.sessions import SessionBatch
from lora import LoraConfig
from model import MultistreamLM
from options import run_config
from sample import generate, speak
from serve import Serve
from streams import Example
from text.conversation import Chat
from text.tokenizers import load_tokenizer

CASES = ["qwen_tts", "qwen_tts_even"]
ASSISTANT, USER, END, NEWLINE = torch.tensor([50, 48, 47]), torch.tensor([50, 46, 47]), torch.tensor([51]), torch.tensor([47])
# kind of prompt: what is chosen, and the options of SampleConfig
KINDS = {"named": ("language=english,speaker=vivian", {}), "dialect": ("speaker=dylan", {"repetition_penalty": 1.0}),
         "streaming": ("streaming=1", {}), "cloned": ("speaker=mine", {}),
         "cloned_streaming": ("streaming=1,language=chinese,speaker=mine", {}), "told": ("", {})}


def example(case: Golden, kind: str, codes: torch.Tensor | None = None) -> Example:
    """Segments as Chat writes them: header, text, <|im_end|>, codes (T, Q), <|im_end|>, newline."""
    def turn(header: torch.Tensor, text: torch.Tensor, spoken: torch.Tensor | None, weight: float = 0.0) -> list:
        return [(header, 0.0), (text, weight), *([] if spoken is None else [(END, 0.0), (spoken.T, weight)]), (END, weight), (NEWLINE, 0.0)]

    before = turn(USER, case["instruct"], None) if kind == "told" else []
    before += turn(ASSISTANT, case["ref_text"], case["ref"]) if kind.startswith("cloned") else []
    return Example(torch.zeros(0, dtype=torch.long), segments=[*before, *turn(ASSISTANT, case["text"], codes, float(codes is not None))])


def own_voice(model: MultistreamLM) -> MultistreamLM:
    """The vector of the golden file stands in a row of codebook 0 that no list names."""
    codes = model.table.streams[2].vocab
    model.table = replace(model.table, ids=(*model.table.ids, ("speaker.mine", codes + 13)))
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_and_losses_equal_qwen_tts_and_not_those_of_its_script(name, tmp_path):
    case = Golden(name)
    model, frames = load(case.write(tmp_path)), case["frames"]
    tokens, weights = (t[None] for t in lay_out(example(case, "named", frames), replace(model.table, choice=KINDS["named"][0])))
    T = len(frames) + 1
    with torch.inference_mode():
        text, audio = model(tokens)
        sums = model(tokens, weights)
    assert text is None and audio.shape == (1, frames.shape[1], tokens.shape[2] - 1, case["first"].shape[-1])
    check(name, audio[0, 0, -T:], case["first"])
    rest = audio[0, 1:, -T:-1].transpose(0, 1)
    check(name, rest[..., : case["rest"].shape[-1]], case["rest"])
    assert bool((rest[..., case["rest"].shape[-1] :] == -torch.inf).all())                  # ids that the smaller heads lack
    means = torch.stack([sums.nll[1] / sums.weight[1], sums.nll[2:].sum() / sums.weight[2:].sum()])
    assert torch.allclose(means, case["losses"], rtol=0, atol=GATE) and sums.weight.tolist() == [0, T, *[T - 1] * (frames.shape[1] - 1)]
    # the official script: the frame after next; the state behind the frame itself; codebook k + 1 in the place of k
    double, leaked, late = (abs(wrong - mean) for wrong, mean in zip(case["wrong"], means[[0, 1, 1]], strict=True))
    assert min(double, leaked, late) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_greedy_frames_equal_qwen_tts_through_the_end(name, kind, tmp_path):
    case, (choice, options) = Golden(name), KINDS[kind]
    model = own_voice(load(case.write(tmp_path)))
    table, theirs = replace(model.table, choice=choice), case[f"greedy_{kind}"]
    asked = example(case, kind)
    prompt = lay_out(asked, table)[0]
    rules = SampleConfig(**{"repetition_penalty": 1.05} | options, temperature=0, min_frames=2, max_frames=25)
    frames = list(generate(model, prompt, rules, family_of(table).feed([asked.text], table)))
    assert len(asked.text) > 0 if kind == "streaming" else True
    got = torch.stack([f[0, 1:] for f in frames])
    assert torch.equal(got[: len(theirs)], theirs)
    assert len(got) == len(theirs) if len(theirs) < 24 else len(got) >= 24                  # of their 25th only the first codebook is drawn


@pytest.mark.parametrize("name", CASES)
def test_official_files_come_back_bit_for_bit(name, tmp_path):
    case = Golden(name)
    export(load(case.write(tmp_path / "a")), tmp_path / "b", "hf")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert case.weights.keys() == written.keys() and all(torch.equal(written[k], t) for k, t in case.weights.items())
    assert load(tmp_path / "b").config == load(tmp_path / "a").config


def test_published_sizes():
    with torch.device("meta"):
        assert MultistreamLM(QWEN3_TTS_0_6B).count_parameters() == 905_788_672             # 0.6B-CustomVoice, 402 tensors
        assert MultistreamLM(QWEN3_TTS_1_7B).count_parameters() == 1_916_676_352           # 1.7B-CustomVoice, 404 tensors


def test_choices_that_a_model_does_not_know_are_refused_by_name():
    table = QWEN3_TTS_0_6B.table
    assert chosen(replace(table, choice="language=German"))["language"] == 2053
    assert "language" not in chosen(replace(table, choice="language=german,language=auto"))
    for wrong in ("language=klingon", "speaker=vivian", "voice=x", "streaming=yes"):
        with pytest.raises(ValueError, match="it takes language=auto.chinese"):
            chosen(replace(table, choice=wrong))


SMOKE = run_config(ROOT / "configs/qwen_tts.py", "smoke")
CHAT = Chat(load_tokenizer(ROOT / SMOKE.data.tokenizer), TEMPLATE)


def spoken(text: str, codes: torch.Tensor, references: list = []) -> Example:  # noqa: B006
    return Example(torch.zeros(0, dtype=torch.long), segments=CHAT.spoken(text, codes, references))


def test_the_grid_is_the_documented_one_and_its_prompt_is_its_beginning():
    codes, table = torch.arange(24).view(8, 3), SMOKE.model.table
    ids = dict(table.ids)
    tokens, weights = lay_out(spoken("one two", codes), table)
    said, role = CHAT.tokenizer.encode("one two"), CHAT.tokenizer.encode("<|im_start|>assistant\n")
    front = [ids[name] for name in ("nothink", "think_bos", "think_eos", "speaker.me", "pad")]
    pad = [ids["text_pad"]]
    assert tokens[0].tolist() == [*role, *pad * 4, ids["text_bos"], *said, ids["text_eos"], *pad * 5]
    assert tokens[1].tolist() == [*[-1] * len(role), *front, *[ids["pad"]] * (len(said) + 1), 270, 0, 1, 2, 271]
    assert tokens[2:, -4:-1].equal(codes[1:]) and (tokens[2:, :-4] == -1).all() and (tokens[2:, -1] == -1).all()
    assert weights[0].sum() == 0 and weights[1].nonzero().flatten().tolist() == list(range(tokens.shape[1] - 4, tokens.shape[1]))
    assert torch.equal(weights[2:, -4:], torch.tensor([1.0, 1, 1, 0]).expand(7, -1)) and not weights[2:, :-4].any()
    prompt = lay_out(Example(codes[0, :0], segments=CHAT.prompt("one two")), table)[0]
    assert torch.equal(prompt, tokens[:, :-4])
    cloned, counts = lay_out(spoken("one two", codes, [("three", codes + 1)]), table)                       # the voice is no target
    assert cloned.shape[1] == tokens.shape[1] + 3 + len(CHAT.tokenizer.encode("three")) and counts.sum() == weights.sum()
    streamed, _ = lay_out(spoken("one two", codes), replace(table, choice="streaming=1"))
    assert streamed[0, -5:].tolist() == ([*said, ids["text_eos"], *pad * 5])[:5] and streamed[1, -5:].tolist() == [270, 0, 1, 2, 271]


@pytest.mark.parametrize("messages, why", [
    ([{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": ["one", {"type": "audio"}]}], "does not listen"),
    ([{"role": "assistant", "content": [{"type": "audio"}]}], "has no text"),
    ([{"role": "assistant", "content": "one"}, {"role": "assistant", "content": ["two", {"type": "audio"}]}], "one recording")])
def test_conversations_that_are_no_speech_are_refused(messages, why):
    codes = [torch.zeros(8, 1, dtype=torch.long)] * sum("audio" in str(m["content"]) for m in messages)
    with pytest.raises(ValueError, match=why):
        lay_out(Example(torch.zeros(0, dtype=torch.long), segments=CHAT.segments(messages, codes)), SMOKE.model.table)


@pytest.mark.slow
def test_smoke_trains_resumes_samples_exports_and_reads_back(tmp_path: Path):
    out = tmp_path / "run"
    options = (f"--data.cache={tmp_path}/cache", f"--data.sources={write_clips(tmp_path)}", "--eval_every=0",
               "--prompts=()", "--listen=0")
    killed_and_resumed("qwen_tts", out, *options)
    code, text, err = call("sample.py", f"--ckpt={out}", "--text=thank you", "--max_frames=4", f"--out={tmp_path}/x.wav")
    assert code == 0 and "repetition_penalty 1.05" in text and (tmp_path / "x.wav").stat().st_size > 1000, err
    code, text, err = call("sample.py", f"--ckpt={out}", "--text=thank you", "--condition=language=klingon", f"--out={tmp_path}/y.wav")
    assert code == 2 and "it takes language=auto" in err and "Traceback" not in err
    with pytest.raises(ValueError, match="embed.audio.weight is several tensors"):          # the recipe's twin trains the tables, too
        export(out, tmp_path / "peft", "peft")
    export(out, tmp_path / "official", "hf")
    again, merged = load(tmp_path / "official"), load(out)
    lora.strip(merged)
    tokens = lay_out(spoken("one two", torch.randint(0, 256, (8, 5))), merged.table)[0][None]
    assert again.table.choice == "speaker=me" and torch.allclose(again(tokens)[1], merged(tokens)[1], atol=1e-5)


def base_folder(folder: Path) -> Path:
    """A Base model as it is released: a speaker encoder among its weights, no speakers, the codec in a folder of its own."""
    case, voice = Golden("qwen_tts"), Golden("qwen_speaker")
    talker = case.config["talker_config"] | {"spk_id": {}, "spk_is_dialect": {}}
    case.config |= voice.config | {"tts_model_type": "base", "talker_config": talker}
    case.weights |= voice.weights
    case.write(folder)
    Golden("qwen_codec").write(folder / "speech_tokenizer")
    (folder / "generation_config.json").write_text(json.dumps({
        "do_sample": True, "temperature": 0.8, "top_k": 40, "repetition_penalty": 1.1, "subtalker_dosample": True,
        "subtalker_temperature": 0.7, "subtalker_top_k": 30, "max_new_tokens": 8192}))
    return folder


def test_a_recording_becomes_a_speaker_and_is_spoken_as_its_vector_is(tmp_path):
    """add-voice writes the vector that the package computes into a free row; the prompt holds that row; the export is a custom voice."""
    base, case = base_folder(tmp_path / "base"), Golden("qwen_speaker")
    save_wav(tmp_path / "me.wav", case["wav"].float()[None], 24000)
    options = (f"--wav={tmp_path}/me.wav", "--speaker=Ann", "--language=english")
    code, _, err = call("checkpoint.py", "add-voice", base, *options, f"--out={tmp_path}/mine")
    assert code == 0, err
    mine, plain = load(tmp_path / "mine"), load(base)
    row = dict(mine.table.ids)["speaker.ann"]
    assert row not in dict(plain.table.ids).values() and mine.table.choice == "speaker=ann,language=english"
    assert torch.allclose(mine.embed["audio"].weight[row], case["vector"], atol=1e-4)                            # of a wav of 16 bits
    rest = torch.arange(len(plain.embed["audio"].weight)) != row
    assert torch.equal(mine.embed["audio"].weight[rest], plain.embed["audio"].weight[rest])
    export(mine, tmp_path / "official", "hf")
    about = json.loads((tmp_path / "official" / "config.json").read_text())
    assert about["tts_model_type"] == "custom_voice" and about["talker_config"]["spk_id"] == {"ann": row}
    assert load(tmp_path / "official").table.choice == "speaker=ann"
    for options, why in (({"--wav": ""}, "needs --wav"), ({"--language": "klingon"}, "it takes language=auto"),
                         ({"--encoder": tmp_path / "official"}, "has no speaker encoder")):
        words = {"--wav": tmp_path / "me.wav", "--speaker": "x", "--out": tmp_path / "no"} | options
        code, _, err = call("checkpoint.py", "add-voice", base, *(f"{key}={value}" for key, value in words.items()))
        assert code == 2 and why in err and "Traceback" not in err


def test_a_base_folder_is_read_with_its_rules_and_written_with_its_codec_and_encoder(tmp_path):
    base = base_folder(tmp_path / "base")
    model = load(base)
    rules = usual_rules(model.table, (), model.extras)
    assert rules["temperature"] == (0.8, *[0.7] * 4) and rules["top_k"] == (40.0, *[30.0] * 4) and rules["repetition_penalty"] == 1.1
    assert official_files(base)["codec"] == str(base / "speech_tokenizer") and load_codec(official_files(base)["codec"]).num_codebooks == 4
    export(model, tmp_path / "again", "hf")
    written, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / "again", base))
    assert written.keys() == wanted.keys() and all(torch.equal(written[name], t) for name, t in wanted.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tts_model_type"] == "base"
    assert load_codec(tmp_path / "again").num_codebooks == 4 and (tmp_path / "again" / "generation_config.json").is_file()


def drawn(seed: int = 0) -> MultistreamLM:
    torch.manual_seed(seed)
    return MultistreamLM(SMOKE.model)


def test_one_clip_is_learnt_and_greedy_frames_give_it_back():
    """With the loss of the recipe; teacher forcing and sampling see the same states, or frames would drift."""
    model, codes = drawn().train(), torch.randint(0, 256, (8, 5), generator=torch.Generator().manual_seed(1))
    example = spoken("one two", codes)
    tokens, weights = (t[None] for t in lay_out(example, model.table))
    parts = torch.tensor(SMOKE.data.stream_weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(40):
        sums = model(tokens, weights)
        loss = (parts * sums.nll).sum() / (parts * sums.weight).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    prompt = lay_out(Example(codes[0, :0], segments=CHAT.prompt("one two")), model.table)[0]
    got = list(generate(model, prompt, SampleConfig(temperature=0, max_frames=12)))
    assert torch.equal(torch.stack([f[0, 1:] for f in got], 1), codes)                  # and it ends behind them


def test_sessions_in_one_batch_get_what_they_get_alone():
    """Each draws with the repetition penalty of its own codes, and reads the text that its streaming prompt has left, then padding."""
    model = drawn(3).eval()
    model.table = replace(model.table, choice="speaker=me,streaming=1")
    rules = [SampleConfig(temperature=0.9, top_k=50, repetition_penalty=1.3, min_frames=2, max_frames=n, seed=n) for n in (9, 6)]
    asked = [Example(torch.zeros(0), segments=CHAT.prompt(text)) for text in ("one two", "three")]
    prompts = [lay_out(example, model.table)[0] for example in asked]
    batch, frames = SessionBatch(model, 2, rules[0], columns=64), [[], []]
    feeds = [family_of(model.table).feed([example.text], model.table) for example in asked for _ in range(2)]
    alone = [torch.stack([f[0] for f in generate(model, prompts[n], rules[n], feeds[2 * n])]) for n in range(2)]
    frames[0].append(batch.begin(0, prompts[0], rules[0], rules[0].seed, feeds[1]))
    for step in range(8):
        if step == 2:
            frames[1].append(batch.begin(1, prompts[1], rules[1], rules[1].seed, feeds[3]))
        for slot, frame in batch.step().items():
            frames[slot].append(frame)
    pad = dict(model.table.ids)["text_pad"]
    for got, wanted, example in zip(frames, alone, asked, strict=True):
        n, left = min(len(got), len(wanted)), example.text.tolist()
        assert n >= 6 and torch.equal(torch.stack(got[:n]), wanted[:n]) and wanted[:, 0].tolist() == (left + [pad] * 9)[: len(wanted)]


def test_batched_prompts_of_different_lengths_equal_single_ones_and_a_plan_is_made(tmp_path):
    model, data = drawn(4).eval(), replace(SMOKE.data, tokenizer=str(ROOT / SMOKE.data.tokenizer))
    rules, codec = SampleConfig(temperature=0, max_frames=6, repetition_penalty=1.05), load_codec("tiny")
    both = speak(model, ["thank you", "one"], data, rules, codec)
    single, pieces = [speak(model, [text], data, rules, codec)[0] for text in ("thank you", "one")], list[torch.Tensor]()
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(both, single, strict=True))
    streamed = speak(model, ["one"], data, rules, codec, on_audio=pieces.append)[0]
    assert torch.allclose(torch.cat(pieces, 1), streamed.wav, atol=1e-4)
    save(model, tmp_path / "ckpt")
    code, text, err = call("sample.py", f"--ckpt={tmp_path}/ckpt", "--text=one", "--plan")
    assert code == 0 and "weights" in text, err
    job = Serve(ckpt=str(tmp_path / "ckpt"), codec="tiny", tokenizer=data.tokenizer, condition="speaker=none")
    assert load_for_sampling(job)[0].table.choice == "speaker=me,speaker=none" and "speaker" not in chosen(load_for_sampling(job)[0].table)


def test_an_adapter_goes_to_peft_and_comes_back(tmp_path):
    case = Golden("qwen_tts")
    model = lora.inject(load(case.write(tmp_path / "base")), LoraConfig(rank=2, alpha=4.0, targets=("temporal.*", "depth.layers.*")))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    export(model, tmp_path / "adapter", "peft")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert "base_model.model.talker.code_predictor.model.layers.1.mlp.down_proj.lora_A.weight" in names
    again = load(tmp_path / "base", adapter=tmp_path / "adapter")
    tokens = lay_out(example(case, "told", case["frames"]), model.table)[0][None]
    assert torch.equal(again(tokens)[1], model(tokens)[1])


def test_an_export_keeps_the_vocabulary_files_of_its_base_where_the_run_used_the_same_pieces(tmp_path):
    base, tokenizer = base_folder(tmp_path / "base"), ROOT / SMOKE.data.tokenizer
    pieces = json.loads(tokenizer.read_text())["model"]["vocab"]
    (base / "merges.txt").write_text("#version: 0.2")
    for vocab, kept in ((pieces, {"vocab.json", "merges.txt"}), (pieces | {"more": 9999}, {"tokenizer.json"})):
        (base / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        model = load(base)
        model.extras.data = {"codec": "tiny", "tokenizer": str(tmp_path / "tokenizer.json")}
        out = export(model, tmp_path / str(len(vocab)), "hf")
        assert {path.name for path in out.iterdir()} & {"vocab.json", "merges.txt", "tokenizer.json"} == kept
