"""Conversations: the words and the targets of the official Higgs Audio code, and one clear line for what cannot be read."""

import base64
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, call
from safetensors import safe_open
from tokenizers import Tokenizer as Fast

from audio import load_codec
from corpus.checks import read_clip
from corpus.data_config import DataConfig
from corpus.examples import build_example, prompt_example
from corpus.index import prepare
from corpus.layouts import read_manifest
from data import Loader
from families.family import lay_out, with_tokenizer_ids
from families.higgs import SPECIALS, TEMPLATE, clone_messages
from generation.command_line import pair_voices, usual_rules
from streams import Example, Stream, StreamTable, audio_block, codebooks
from text.chat_formats import as_clone_request, sample_row
from text.conversation import Chat, chunks, first_target, token_ids
from text.tokenizers import load_tokenizer

TOKENIZER = ROOT / "assets" / "tiny_tokenizer.json"
WORDS = load_tokenizer(TOKENIZER)
FAST = Fast.from_file(str(TOKENIZER))
CHAT = Chat(WORDS, TEMPLATE)


def chat_table(Q: int, codes: int = 16) -> StreamTable:
    table = StreamTable((Stream("text", "text", 288, 288), *codebooks(Q, codes + 2, codes + 2, codes, codes + 1, range(Q))), "chatml")
    return with_tokenizer_ids(table, WORDS)


SMALL, TINY = chat_table(4), chat_table(8, 256)


def codes(T: int, Q: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, (Q, T), generator=torch.Generator().manual_seed(seed))


def written(segments: list) -> str:
    """Segments as text: codes stand as (T)."""
    return "".join(f"({p.shape[1]})" if p.dim() == 2 else FAST.decode(p.tolist(), skip_special_tokens=False) for p, _ in segments)


def trained(segments: list) -> str:
    return written([(part, weight) for part, weight in segments if weight])


def grid(segments: list, table: StreamTable = SMALL) -> tuple[torch.Tensor, torch.Tensor]:
    return lay_out(Example(torch.zeros(0), segments=segments), table)


def turn(role: str, *content: object) -> dict:
    return {"role": role, "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)}


def audio(name: str = "a.wav", **more: object) -> dict:
    return {"type": "audio", "audio_url": name, **more}


# ---- against boson-multimodal ----

class Golden:
    def __init__(self) -> None:
        with safe_open(Path(__file__).resolve().parents[1] / "golden" / "higgs_chat.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
        self.conversations = self.config["conversations"]


def expanded(case: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the collator gives, one placeholder a clip, as tokens and targets (-100 = none) of our grid."""
    out_id, in_id = (WORDS.encode(name)[0] for name in ("<|AUDIO_OUT|>", "<|AUDIO|>"))
    clips = {out_id: ("audio_out_ids", "label_audio_ids"), in_id: ("audio_in_ids", "")}
    used = {out_id: 0, in_id: 0}
    tokens, labels = [], []
    for token, label in zip(case["input_ids"][0].tolist(), case["label_ids"][0].tolist(), strict=True):
        if token in clips:
            name, targets = clips[token]
            starts = [*case[f"{name}_start"].tolist(), case[name].shape[1]]
            span = slice(starts[used[token]], starts[used[token] + 1])
            columns = case[name][:, span]
            used[token] += 1
            nothing = torch.full((1, columns.shape[1]), -1)
            tokens.append(torch.cat([nothing, columns]))
            labels.append(torch.cat([nothing * 100, case[targets][:, span] if targets else torch.full_like(columns, -100)]))
        else:
            tokens.append(torch.tensor([token, *[-1] * 4])[:, None])
            labels.append(torch.tensor([label, *[-100] * 4])[:, None])
    return torch.cat(tokens, 1), torch.cat(labels, 1)


@pytest.mark.parametrize("n", range(6))
def test_grid_and_targets_equal_those_of_the_official_collator(n: int) -> None:
    golden = Golden()
    (messages, start), case = golden.conversations[n], {k[2:]: t for k, t in golden.tensors.items() if k.startswith(f"{n}/")}
    lengths = ([2, 3], [5], [1, 4], [2, 1, 3], [3, 2], [1, 2])[n]               # frames of its recordings
    tokens, weights = grid(CHAT.segments(messages, list(case["codes"].split(lengths, dim=1)), 0 if start is None else start))
    theirs, labels = expanded(case)
    assert torch.equal(tokens, theirs)
    assert torch.equal(weights > 0, labels != -100) and torch.equal(tokens[weights > 0], labels[labels != -100])
    assert set(weights.unique().tolist()) <= {0.0, 1.0}


def test_the_worked_numbers_of_a_clip() -> None:
    tokens, weights = audio_block(torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]), 1.0, SMALL)
    assert tokens[1].tolist() == [16, 0, 1, 17, 17, 17, 17] and tokens[4].tolist() == [16, 16, 16, 16, 6, 7, 17]
    assert tokens.shape[1] == 2 + 4 + 1 and weights[1:].sum(1).tolist() == [3.0] * 4            # T + K + 1 columns, T + 1 targets
    assert weights[1].tolist() == [0, 1, 1, 1, 0, 0, 0] and weights[4].tolist() == [0, 0, 0, 0, 1, 1, 1]


# ---- prompts ----

SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
USER, ASSISTANT = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
OPEN = ASSISTANT + "<|audio_out_bos|>"
SAID = ASSISTANT + "<|audio_out_bos|>(%d)<|audio_eos|><|eot_id|>"
MANY = ("You are an AI assistant designed to convert text into speech.\nIf the user's message includes a [SPEAKER*] tag, do not read out "
        + "the tag and generate speech for the following text, using the specified voice.\nIf no speaker tag is present, select a suitable "
        + "voice on your own.")


def test_prompts_are_the_official_ones() -> None:
    ref, other = ("I am the voice.", codes(2)), ("And I.", codes(3))
    instruction = "Generate audio following instruction."
    scene = "\n\n<|scene_desc_start|>\nA quiet room.\n<|scene_desc_end|>"
    assert written(CHAT.prompt("Hi.")) == f"{SYSTEM}{instruction}<|eot_id|>{USER}Hi.<|eot_id|>{OPEN}"
    assert written(CHAT.prompt("Hi.", scene="A quiet room.")) == f"{SYSTEM}{instruction}{scene}<|eot_id|>{USER}Hi.<|eot_id|>{OPEN}"
    turns = f"{USER}I am the voice.<|eot_id|>{SAID % 2}{USER}Hi.<|eot_id|>{OPEN}"
    assert written(CHAT.prompt("Hi.", [ref], "A quiet room.")) == f"{SYSTEM}{instruction}{scene}<|eot_id|>{turns}"
    assert written(CHAT.prompt("Hi.", [ref])) == f"<|begin_of_text|>{turns}"
    assert written(CHAT.prompt("[SPEAKER1] Hi.", [ref, other], "A quiet room.")) == (
        f"{SYSTEM}{instruction}{scene}<|eot_id|>{USER}[SPEAKER0] I am the voice.<|eot_id|>{SAID % 2}"
        + f"{USER}[SPEAKER1] And I.<|eot_id|>{SAID % 3}{USER}[SPEAKER1] Hi.<|eot_id|>{OPEN}")
    inside = replace(CHAT, in_system=True)
    heard = "<|audio_bos|>(%d)<|audio_eos|>"
    assert written(inside.prompt("Hi.", [ref, other], "A quiet room.")) == (
        f"{SYSTEM}{instruction}\n\n<|scene_desc_start|>\nA quiet room.\n\nSPEAKER0: {heard % 2}\nSPEAKER1: {heard % 3}\n<|scene_desc_end|>"
        + f"<|eot_id|>{USER}Hi.<|eot_id|>{OPEN}")
    assert written(CHAT.prompt("Hi.", [("profile:a low voice", codes(0))])) == (
        f"{SYSTEM}{instruction}\n\n<|scene_desc_start|>\nSPEAKER0: a low voice\n<|scene_desc_end|><|eot_id|>{USER}Hi.<|eot_id|>{OPEN}")
    assert written(CHAT.prompt("[SPEAKER0] Hi.\n[SPEAKER1] Yes.", scene="A quiet room.")) == (
        f"{SYSTEM}{MANY}\n\n<|scene_desc_start|>\nA quiet room.\n\nSPEAKER0: feminine\nSPEAKER1: masculine\n<|scene_desc_end|><|eot_id|>"
        + f"{USER}[SPEAKER0] Hi.\n[SPEAKER1] Yes.<|eot_id|>{OPEN}")
    assert written(CHAT.prompt("b", [ref], before=[("a", codes(4))])) == (
        f"<|begin_of_text|>{USER}I am the voice.<|eot_id|>{SAID % 2}{USER}a<|eot_id|>{SAID % 4}{USER}b<|eot_id|>{OPEN}")


@pytest.mark.parametrize("in_system", [False, True])
@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("scene", ["", "A quiet room."])
def test_the_prompt_is_the_head_of_the_training_grid(references: int, scene: str, in_system: bool) -> None:
    chat = Chat(WORDS, TEMPLATE, "arabic-v1+higgs-v1", scene, in_system)
    voices = [(f"voice {n}", codes(2 + n, seed=n)) for n in range(references)]
    prompt, _ = grid(chat.prompt("مرحبا، (you)", voices))
    tokens, weights = grid(chat.spoken("مرحبا، (you)", codes(3), voices))
    assert torch.equal(tokens[:, : prompt.shape[1]], prompt)
    assert tokens[1:, prompt.shape[1]].eq(16).all()                                    # then the start column
    assert weights[:, : prompt.shape[1] - 1].sum() == 0 and weights.sum() == 4 * 4 + 3  # the opening mark, four ends, two more ids


def test_only_the_turn_behind_a_reference_is_a_target() -> None:
    clone = [turn("user", "r"), turn("assistant", audio()), turn("user", "t"), turn("assistant", audio())]
    assert trained(CHAT.segments(clone, [codes(2), codes(3)])) == "<|audio_out_bos|>(3)<|audio_eos|><|eot_id|>"
    assert trained(CHAT.segments(clone, [codes(2), codes(3)], start=0)).count("<|audio_out_bos|>") == 2
    talk = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d", audio())]
    assert (first_target(clone), first_target(talk)) == (3, 0)
    assert trained(CHAT.segments(talk, [codes(1)])) == "b<|eot_id|>d<|audio_out_bos|>(1)<|audio_eos|><|eot_id|>"
    two = [turn("assistant", "a"), turn("assistant", "b")]
    assert trained(CHAT.segments(two, [])) == "a<|eom_id|>b<|eot_id|>"


# ---- samples ----

def seed_sample(**more: object) -> dict:
    ask = turn("user", "I am the voice.", audio("ref.wav"), "Please generate speech for given text in reference audio's voice: Say this.")
    return {"messages": [ask, turn("assistant", "Say this.", audio("a.wav"))], **more}


def test_the_one_turn_request_becomes_the_clone_layout() -> None:
    turns = as_clone_request(seed_sample()["messages"])
    assert turns == [turn("user", "I am the voice."), {"role": "assistant", "content": audio("ref.wav")}, turn("user", "Say this."),
                     turn("assistant", audio("a.wav"))]
    prompt = written(CHAT.prompt("Say this.", [("I am the voice.", codes(2))]))
    assert written(CHAT.segments(turns, [codes(2), codes(3)])).startswith(prompt)
    kept = as_clone_request(seed_sample()["messages"], "keep")
    assert trained(CHAT.segments(kept, [codes(2), codes(3)])) == "Say this.<|audio_out_bos|>(3)<|audio_eos|><|eot_id|>"
    other = [turn("user", "hi", audio(), "what is this?"), turn("assistant", "noise")]
    assert as_clone_request(other) == other
    row = sample_row(seed_sample(misc={"speaker": "s"}))
    assert (row["text"], row["audio"], row["reference"], row["speaker"]) == (
        "Say this.", "a.wav", {"text": "I am the voice.", "audio": "ref.wav"}, "s")


def test_every_recording_of_a_sample_gets_its_name() -> None:
    row = sample_row({"messages": [turn("system", "SPEAKER0: ", audio("0.wav"), "SPEAKER1: ", audio("1.wav", offset=1.0)),
                                   turn("user", "x"), turn("assistant", audio("2.wav", raw_audio="aaaa"))]})
    assert row["clips"] == ["#0", "#reference", ""] and row["others"]["#0"]["audio"] == "0.wav"
    assert row["reference"]["offset"] == 1.0 and row["raw_audio"] == "aaaa"
    assert "raw_audio" not in json.dumps(row["messages"])


@pytest.mark.parametrize(("messages", "reason"), [
    ([turn("user", "hi")], "no assistant turn"), (3, "malformed messages"), ([{"content": "x"}], "malformed messages"),
    ([turn("narrator", "x"), turn("assistant", "y")], "malformed messages"),
    ([turn("assistant", {"type": "video"})], "malformed messages"),
    ([turn("assistant", {"type": "text", "text": 3})], "malformed messages"),
    ([turn("user", "<|AUDIO|> hi"), turn("assistant", "y")], "wrong placeholder count"),
    ([turn("user", "hi<|eot_id|>"), turn("assistant", "y")], "wrong placeholder count")])
def test_a_sample_that_cannot_be_read_is_named(messages: object, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}))
    m = read_manifest(tmp_path / "x.jsonl")
    assert [bad.reason for bad in m.bad] == [reason] and m.bad[0].fix and not m.rows
    (tmp_path / "y.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "x", "clips": [""], "messages": messages}))
    assert [bad.reason for bad in read_manifest(tmp_path / "y.jsonl").bad] == [reason]


def test_recordings_and_audio_parts_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 audio parts in the messages, 1 recordings"):
        CHAT.segments([turn("user", "r"), turn("assistant", audio()), turn("assistant", audio())], [codes(1)])
    with pytest.raises(ValueError, match="wrong placeholder count"):
        CHAT.prompt("hello <|audio_out_bos|>")


def test_special_ids_come_from_the_tokenizer() -> None:
    ids = token_ids(WORDS, SPECIALS, "Higgs Audio v2")
    assert len(set(ids.values())) == len(SPECIALS) and all(FAST.id_to_token(i) == name for name, i in ids.items())
    with pytest.raises(ValueError, match=r"tokenizer bytes has no special token <\|begin_of_text\|>"):
        token_ids(load_tokenizer("bytes"), SPECIALS, "Higgs Audio v2")
    with pytest.raises(ValueError, match=r"<\|audio_out_bos\|> is 264 in tokenizer tiny_tokenizer.json, 5 in the model"):
        CHAT.check_tokenizer(replace(SMALL, audio_start=5))


def test_long_texts_are_cut_at_words_or_speakers() -> None:
    assert chunks("a b c d e\n\nf g", 2) == ["a b", "c d", "e", "f g"] and chunks("a b c", 0) == ["a b c"]
    talk = "[SPEAKER0] one two\nthree\n[SPEAKER1] four\n[SPEAKER0] five six seven eight nine"
    assert chunks(talk, 6) == ["[SPEAKER0] one two\nthree\n[SPEAKER1] four", "[SPEAKER0] five six seven eight nine"]
    assert chunks(talk, 1) == talk.replace("\n[", "\n\n[").split("\n\n")


@pytest.mark.parametrize("text, pieces", [
    ("今天天气很好，我们去散步吧。", ["今天天气", "很好，我们", "去散步吧。"]),
    ("ラーメンをたべます", ["ラーメンを", "たべます"]),
    ("สวัสดีครับ", ["สวัสดี", "ครับ"]),
    ("say 世界 now and then", ["say 世界 now", "and then"]),
    ("한국어 문장은 띄어 씁니다 네", ["한국어 문장은 띄어 씁니다", "네"]),
    ("", [])])
def test_chunks_of_scripts_without_spaces(text: str, pieces: list[str]) -> None:
    assert chunks(text, 4) == pieces and "".join(pieces).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"weight": 0.0, "loss": True}])
def test_a_turn_without_weight_is_read_and_not_trained(mark: dict) -> None:
    turns = [turn("user", "hello"), turn("assistant", "no") | mark, turn("user", "hello"), turn("assistant", "yes")]
    found = CHAT.segments(turns, [])
    assert "no" in written(found) and trained(found) == trained(CHAT.segments(turns, [], 3))


def test_a_cut_in_mid_sentence_gains_no_full_stop() -> None:
    assert chunks("one two three four\n\nfive", 3, "higgs-v1") == ["one two three", "four.", "five."]


# ---- from files to batches ----

def sound(path: Path, seconds: float, seed: int) -> Path:
    n = np.arange(int(16000 * seconds))
    soundfile.write(path, 0.3 * np.sin(n / 900) ** 2 * np.random.default_rng(seed).standard_normal(len(n)).clip(-2, 2), 16000)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    for n in range(4):
        sound(folder / f"{n}.wav", 0.5 + 0.2 * n, n)
    inline = base64.b64encode((folder / "3.wav").read_bytes()).decode()
    samples = [
        {"id": "clone", "speaker": "s", "messages": [turn("user", "the voice"), turn("assistant", audio("0.wav")),
                                                     turn("user", "say it"), turn("assistant", audio("1.wav"))]},
        seed_sample(id="seed"),
        {"id": "inline", "messages": [turn("user", "hello"), turn("assistant", {"type": "audio", "raw_audio": inline})]},
        {"id": "piece", "messages": [turn("user", "hello"), turn("assistant", audio("3.wav", offset=0.25, duration=0.5))]},
        {"id": "talk", "messages": [turn("user", "what?", audio("2.wav")), turn("assistant", "I heard you.")], "start_index": 1},
        {"id": "silent", "messages": [turn("assistant", audio("0.wav"))]},
        {"id": "garbage", "messages": [turn("user", "x"), turn("assistant", {"type": "audio", "raw_audio": "?!"})]},
        {"id": "many", "messages": [turn("system", audio("0.wav"), "and", audio("1.wav")), turn("user", "go"),
                                    turn("assistant", audio("2.wav"))]}]
    (folder / "ref.wav").write_bytes((folder / "2.wav").read_bytes())
    (folder / "a.wav").write_bytes((folder / "3.wav").read_bytes())
    samples += [{"id": "nan", "speaker": float("nan"), "start_index": float("nan"), "messages": [
        turn("system", "a voice: ", audio("3.wav", offset=0.5, duration=0.5)), turn("user", "go"), turn("assistant", audio("1.wav"))]}]
    (folder / "chat.json").write_text(json.dumps(samples))
    (folder / "chat.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    plain = [{"id": f"p{n}", "audio": f"{n}.wav", "text": f"text {n}", "speaker": "s", "split": "train"} for n in range(4)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return folder


def config(folder: Path, name: str, **more: object) -> DataConfig:
    return DataConfig(**{"sources": (str(folder / name),), "cache": str(folder / "cache"), "tokenizer": str(TOKENIZER), "split": "manifest",
                         "window": 8, "prefetch": 0, **more})


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_samples_become_grids_and_bad_ones_are_named(folder: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    index = prepare(config(folder, name), TINY)
    err = capsys.readouterr().err
    assert "silent: empty text" in err and "garbage" not in [e.id for e in index.entries] and "inline audio" in err
    shown = {e.id: n for n, e in enumerate(index.entries) if e.split}
    assert list(shown) == ["clone", "seed", "inline", "piece", "talk", "many", "nan"]
    made = {name: build_example(index, n, TINY).segments for name, n in shown.items()}
    frames = {name: index.entries[n].frames[0] if index.entries[n].frames else 0 for name, n in shown.items()}
    assert trained(made["clone"]) == f"<|audio_out_bos|>({frames['clone']})<|audio_eos|><|eot_id|>"
    assert trained(made["seed"]) == f"<|audio_out_bos|>({frames['seed']})<|audio_eos|><|eot_id|>" and frames["inline"] == frames["seed"]
    assert trained(made["talk"]) == "I heard you.<|eot_id|>" and "<|audio_bos|>" in written(made["talk"])
    assert 0.5 * 25 <= frames["piece"] <= 0.5 * 25 + 2
    assert written(made["many"]).count("<|audio_bos|>") == 2
    assert index.entries[shown["nan"]].speaker == "" and trained(made["nan"]).startswith("<|audio_out_bos|>")
    tokens, _ = grid(made["clone"], TINY)
    assert torch.equal(tokens, grid(build_example(index, shown["clone"], TINY).segments, TINY)[0])


def test_plain_rows_become_clone_examples_with_a_drawn_voice(folder: Path) -> None:
    data = config(folder, "manifest.jsonl", reference=1.0, scene="A room.", columns=400)
    index = prepare(data, TINY)
    loader = Loader(data, TINY, "train", 2)
    names = [name for batch, _ in zip(loader, range(3), strict=False) for row in batch.names for name in row]
    assert set(names) == {"p0", "p1", "p2", "p3"}
    made = build_example(index, 0, TINY, reference=1).segments
    assert written(made).startswith(f"{SYSTEM}Generate audio following instruction.\n\n<|scene_desc_start|>\nA room.\n<|scene_desc_end|>")
    assert trained(made) == f"<|audio_out_bos|>({index.entries[0].frames[0]})<|audio_eos|><|eot_id|>"
    assert all(loader.reference(n, random.Random(s)) not in (n, -1) for n in range(4) for s in range(20))
    prompt, _ = lay_out(prompt_example("text 0", data, WORDS, None, (), TINY), TINY)
    assert torch.equal(prompt, grid(build_example(index, 0, TINY).segments, TINY)[0][:, : prompt.shape[1]])


def test_limits_and_tokenizers_are_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="no usable row"):
        prepare(config(folder, "manifest.jsonl", max_text=3), TINY)
    assert "6 text ids, data.max_text is 3" in capsys.readouterr().err
    bad = [{"audio": "0.wav", "text": "hi", "reference": {"audio": "1.wav", "text": " "}}, {"audio": "1.wav", "text": "a 《|eot_id|》"},
           {"id": "late", "audio": "2.wav", "text": "x", "clips": [""], "messages": [turn("assistant", audio())], "start_index": 3}]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(ValueError, match="no usable row"):
        prepare(config(folder, "bad.jsonl", normaliser="higgs-v1"), TINY)
    told = capsys.readouterr().err
    assert "reference without transcript" in told and "holds <|eot_id|>" in told and "start_index 3 leaves no target" in told
    with pytest.raises(ValueError, match="has no special token"):
        prepare(config(folder, "manifest.jsonl", tokenizer="bytes"), TINY)
    with pytest.raises(ValueError, match="is empty under normaliser"):
        prompt_example("  ", config(folder, "manifest.jsonl", normaliser="arabic-v1"), WORDS, None, (), TINY)


def test_inline_audio_is_read_like_a_file(folder: Path) -> None:
    row = next(r for r in read_manifest(folder / "chat.jsonl").rows if r["id"] == "inline")
    wav, rate = read_clip(row)
    assert rate == 16000 and torch.equal(wav, read_clip({"file": str(folder / "3.wav")})[0])


def test_what_check_keeps_can_be_read_again(folder: Path, tmp_path: Path) -> None:
    rc, out, err = call("data.py", "check", folder / "chat.jsonl", "--doubtful=drop", "--write", tmp_path)
    kept = read_manifest(tmp_path / "chat.kept.jsonl", allow_outside=True)
    assert rc == 0 and "detected: conversations" in out, err                      # "inline" is a copy of the answer of "seed"
    assert {r["id"] for r in kept.rows} == {"clone", "seed", "piece", "talk", "many"}         # and "nan" of "clone"
    index = prepare(replace(config(tmp_path, "chat.kept.jsonl"), allow_outside=True), TINY)
    first = next(n for n, e in enumerate(index.entries) if e.id == "many")
    assert written(build_example(index, first, TINY).segments).count("<|audio_bos|>") == 2


def test_clone_messages_of_a_plain_text() -> None:
    assert clone_messages("x") == [turn("system", "Generate audio following instruction."), turn("user", "x")]


# ---- voices of a prompt ----

def test_several_voices_become_the_official_prompt_of_several_speakers(tmp_path: Path) -> None:
    for n in range(2):
        sound(tmp_path / f"{n}.wav", 0.5, n)
    data = config(tmp_path, "none", scene="A quiet room.")
    voices = [(str(tmp_path / f"{n}.wav"), f"voice {n}") for n in range(2)]
    made = prompt_example("[SPEAKER1] yes", data, WORDS, load_codec("tiny"), voices, TINY).segments
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    spoken = head.format("assistant") + "<|audio_out_bos|>(13)<|audio_eos|><|eot_id|>"
    assert written(made).endswith(
        head.format("user") + "[SPEAKER0] voice 0<|eot_id|>" + spoken + head.format("user") + "[SPEAKER1] voice 1<|eot_id|>" + spoken
        + head.format("user") + "[SPEAKER1] yes<|eot_id|>" + head.format("assistant") + "<|audio_out_bos|>")
    described = prompt_example("hi", data, WORDS, load_codec("tiny"), [("", "profile:a calm man"), voices[0]], TINY).segments
    assert "SPEAKER0: a calm man\nSPEAKER1: <|audio_bos|>(13)<|audio_eos|>\n" in written(described)
    with pytest.raises(ValueError, match="a prompt of this model takes 1"):
        prompt_example("hi", data, WORDS, load_codec("tiny"), voices, replace(TINY, layout="clone"))


@pytest.mark.parametrize(("refs", "said", "text", "message"), [
    (["a.wav"], [], "hi", "needs both --ref=voice.wav and --ref_text"), ([], ["x"], "hi", "0 recordings, 1 transcripts"),
    (["a.wav", "b.wav"], ["x"], "hi", "2 recordings, 1 transcripts"), (["a.wav"], [" "], "hi", "needs both"),
    (["a.wav"], ["x"], "[SPEAKER0] a [SPEAKER1] b", r"names \[SPEAKER1\], there are 1 voices")])
def test_voices_that_do_not_fit_are_named(refs: list, said: list, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_voices(refs, said, [text])


def test_voices_in_words_need_no_transcript() -> None:
    assert pair_voices(["profile:a man", "b.wav"], ["x"], ["[SPEAKER1] a"]) == [("", "profile:a man"), ("b.wav", "x")]


def test_the_official_rules_hold_where_the_user_gives_none(capsys: pytest.CaptureFixture) -> None:
    rules = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "ras_window": 7, "ras_repeats": 2, "max_frames": 2048}
    assert usual_rules(SMALL, ()) == rules and "temperature 1.0, top_k 50, top_p 0.95" in capsys.readouterr().out
    assert usual_rules(SMALL, rules.keys() - {"top_k"}) == {"top_k": 50}
    capsys.readouterr()
    assert usual_rules(StreamTable((Stream("text", "text", 8),), "words"), ()) == {} and capsys.readouterr().out == ""
