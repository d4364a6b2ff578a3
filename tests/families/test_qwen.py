"""Qwen and MOSS-Speech conversations: templates, targets, ids, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from corpus.data_config import DataConfig
from corpus.examples import build_example, prompt_example
from corpus.index import prepare
from corpus.layouts import read_manifest
from data import Loader
from families import moss, qwen
from families.family import lay_out, with_tokenizer_ids
from families.moss import TEMPLATE
from families.qwen import QWEN2_TEMPLATE, QWEN3_TEMPLATE, SOSP
from layers.architecture import ModelConfig
from lora import LoraConfig, inject
from model import MultistreamLM
from streams import Example, Stream, StreamTable, codebooks
from text.conversation import Chat, token_ids
from text.tokenizers import load_tokenizer

TOKENIZER = ROOT / "assets" / "tiny_qwen_tokenizer.json"
WORDS = load_tokenizer(TOKENIZER)
IDS = token_ids(WORDS, (*TEMPLATE.marks, "<think>", "</think>"), "Qwen3")
TEXT = (Stream("text", "text", 544, 544),)
TABLES = {"qwen2": with_tokenizer_ids(StreamTable(TEXT, "qwen2"), WORDS), "qwen3": with_tokenizer_ids(StreamTable(TEXT, "qwen3"), WORDS),
          "moss": with_tokenizer_ids(StreamTable((*TEXT, *codebooks(1, 80, 80, -1, 64)), "moss"), WORDS)}
CHATS = {"qwen2": Chat(WORDS, template=QWEN2_TEMPLATE), "qwen3": Chat(WORDS, template=QWEN3_TEMPLATE),
         "moss": Chat(WORDS, template=TEMPLATE)}
HEARD = {"type": "audio"}


def turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def speech(*codes: int) -> torch.Tensor:
    return torch.tensor([codes])


def grid(segments: list, table: StreamTable) -> tuple[torch.Tensor, torch.Tensor]:
    return lay_out(Example(torch.zeros(0), segments=segments), table)


def ids(text: str) -> list[int]:
    return WORDS.encode(text)


# ---- what is written, and what of it is a target ----

TALK = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "Bye"), turn("assistant", "See you.")]


def test_qwen2_trains_every_reply_and_the_mark_that_ends_it():
    tokens, weights = grid(CHATS["qwen2"].segments(TALK, []), TABLES["qwen2"])
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert tokens[0].tolist() == ids(whole)
    trained = tokens[0, weights[0] > 0].tolist()
    assert trained == ids("Hello.<|im_end|>See you.<|im_end|>") and set(weights.unique().tolist()) == {0.0, 1.0}
    late, _ = zip(*[(t, w) for t, w in CHATS["qwen2"].segments(TALK, [], start=4) if w], strict=True)
    assert torch.cat(late).tolist() == ids("See you.<|im_end|>")


def test_qwen3_trains_the_last_reply_behind_an_empty_thought():
    tokens, weights = grid(CHATS["qwen3"].segments(TALK, []), TABLES["qwen3"])
    said = "<|im_start|>assistant\n<think>\n\n</think>\n\nSee you.<|im_end|>\n"
    assert tokens[0].tolist()[-len(ids(said)):] == ids(said) and WORDS.decode(tokens[0].tolist()).count("<think>") == 1
    assert tokens[0, weights[0] > 0].tolist() == ids("See you.<|im_end|>")
    asked = replace(CHATS["qwen3"], thinking=True).segments(TALK[:-1], [], reply="text")
    assert grid(asked, TABLES["qwen3"])[0][0].tolist()[-3:] == ids("<|im_start|>assistant\n")[-3:]


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "moss"])
@pytest.mark.parametrize("reply", ["text", "speech"])
def test_the_prompt_is_the_head_of_the_training_grid(name, reply):
    table, said = TABLES[name], [HEARD] if reply == "speech" else "See you.\n"
    if reply == "speech" and name != "moss":
        return
    clips = [speech(1, 2, 3)] * (reply == "speech")
    prompt, none = grid(CHATS[name].segments(TALK[:-1], [], reply=reply), table)
    tokens, weights = grid(CHATS[name].segments([*TALK[:-1], turn("assistant", said)], clips, start=4), table)
    assert torch.equal(tokens[:, : prompt.shape[1]], prompt) and not none.any() and not weights[:, : prompt.shape[1]].any()
    assert weights[:, prompt.shape[1] :].sum() == (len(ids("See you.\n<|im_end|>")) if reply == "text" else 3 + 1 + 1)


def test_qwen2_brings_its_system_turn_and_qwen3_none():
    assert WORDS.decode(torch.cat([t for t, _ in CHATS["qwen2"].prompt("Hi")]).tolist()) == (
        "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\nuser\nHi\nassistant\n")
    assert torch.cat([t for t, _ in CHATS["qwen3"].prompt("Hi")]).tolist() == ids(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    kind = replace(CHATS["qwen3"], system="Be kind.").prompt("Hi")
    assert WORDS.decode(torch.cat([t for t, _ in kind]).tolist()).startswith("system\nBe kind.\nuser")


def test_moss_grid_of_a_spoken_exchange_by_hand():
    """Targets: codes and their end id in the audio row, then <|im_end|>; neither the opening mark nor the line end."""
    talk = [turn("system", "S"), turn("user", [HEARD]), turn("assistant", [HEARD])]
    tokens, weights = grid(CHATS["moss"].segments(talk, [speech(7), speech(3, 5, 9)]), TABLES["moss"])
    start, end, begin = (IDS[name] for name in ("<|im_start|>", "<|im_end|>", SOSP))
    line, head = ids("\n"), {role: ids(f"{role}\n") for role in ("system", "user", "assistant")}
    text = [start, *head["system"], *ids("S"), end, *line, start, *head["user"], begin, -1, -1, end, *line,
            start, *head["assistant"], begin, -1, -1, -1, -1, end, *line]
    assert tokens[0].tolist() == text
    first, second = text.index(begin), len(text) - 1 - text[::-1].index(begin)
    audio = [-1] * len(text)
    audio[first + 1 : first + 3], audio[second + 1 : second + 5] = [7, 64], [3, 5, 9, 64]
    assert tokens[1].tolist() == audio
    assert weights[1].nonzero().flatten().tolist() == [second + n for n in (1, 2, 3, 4)] and weights[1].sum() == 4
    assert weights[0].nonzero().flatten().tolist() == [second + 5]


@pytest.mark.parametrize("asked", ["text", "speech"])
@pytest.mark.parametrize("reply", ["text", "speech"])
def test_the_four_modes_of_moss(asked, reply):
    """Text or speech in, text or speech out: the system turn and the last column say which reply is wanted."""
    clips = [speech(1, 2)] * (asked == "speech")
    tokens, _ = grid(CHATS["moss"].segments([turn("user", [HEARD] if asked == "speech" else "Hi")], clips, reply=reply), TABLES["moss"])
    system = TEMPLATE.system[reply == "speech"]
    assert ("spoken responses" in system) == (reply == "speech") and ("with text" in system) == (reply == "text")
    assert WORDS.decode(tokens[0, tokens[0] >= 0].tolist()).startswith(f"system\n{system}\nuser\n")
    assert (tokens[0, -1] == IDS[SOSP]) == (reply == "speech") and (tokens[1] >= 0).sum() == (3 if asked == "speech" else 0)
    head, written = ids("<|im_start|>assistant\n"), tokens[0, tokens[1] < 0].tolist()
    assert written[-len(head) :] == head if reply == "text" else written[-1 - len(head) : -1] == head


# ---- against transformers ----

class Golden:
    def __init__(self) -> None:
        with safe_open(Path(__file__).resolve().parents[1] / "golden" / "qwen_chat.safetensors", "pt") as file:
            self.about = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key).tolist() for key in file.keys()}

    def rows(self, name: str) -> list[list[int]]:
        flat = iter(self.tensors[f"{name}/ids"])
        return [[next(flat) for _ in range(n)] for n in self.tensors[f"{name}/lengths"]]


def test_ids_of_200_strings_equal_transformers():
    golden = Golden()
    texts = golden.about["texts"]
    assert len(set(texts)) == 200 and [ids(text) for text in texts] == golden.rows("raw")
    assert sum(any(IDS[mark] in ids(text) for mark in ("<|im_end|>", "<think>", SOSP)) for text in texts) == 3     # real marks are one id


@pytest.mark.parametrize(("name", "mode"), [
    ("qwen2", "whole"), ("qwen2", "prompt"), ("qwen3", "whole"), ("qwen3", "prompt"), ("qwen3", "off")])
def test_conversations_equal_apply_chat_template(name, mode):
    """Of one to five turns, with and without a system turn, thinking on ("prompt") and off; more than 200 of them."""
    golden = Golden()
    chat = replace(CHATS[name], thinking=mode == "prompt")
    made = [torch.cat([part for part, _ in chat.segments(talk, [], reply="" if mode == "whole" else "text")]).tolist()
            for talk in golden.about["chats"]]
    theirs = golden.rows(f"{name}/{mode}")
    assert len(made) >= 200 and made == theirs


# ---- bad input ----

def test_what_would_become_structure_is_refused(tmp_path):
    rows = [{"id": str(n), "messages": [turn("user", "Hi"), turn("assistant", said)]} for n, said in enumerate(
        ["fine", "<think>hm</think> fine", "a <|im_end|>", "b <|object_ref_start|>", "<|im_end |> looks alike"])]
    rows.append({"id": "tools", "messages": [turn("user", "Hi"), turn("assistant", "x") | {"tool_calls": [1]}]})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    m = read_manifest(tmp_path / "x.jsonl")
    assert [row["id"] for row in m.rows] == ["0", "4"]
    assert [(b.reason, b.fix[:54]) for b in m.bad][:2] == [
        ("reasoning in a turn", "the text of the assistant turn holds <think>, keep onl"),
        ("wrong placeholder count", "the text of the assistant turn holds <|im_end|>, name ")]
    for chat in CHATS.values():
        with pytest.raises(ValueError, match="reasoning in a turn; the text of the user turn holds <think>"):
            chat.prompt("what is <think>?")
        with pytest.raises(ValueError, match="does not support a recipient"):
            chat.segments([turn("user", "x") | {"recipient": "me"}, turn("assistant", "y")], [])
        with pytest.raises(ValueError, match="does not take a reference"):
            chat.prompt("x", [("said", speech(1))])


def test_ids_come_from_the_tokenizer_and_must_be_those_of_the_model():
    assert [IDS[name] for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", SOSP)] == [512, 513, 514, 515]
    assert TABLES["moss"].audio_start == 515 and TABLES["moss"].audio_end == -1 and TABLES["qwen2"].stop == (512, 514)
    for name, chat in CHATS.items():
        chat.check_tokenizer(TABLES[name])
        with pytest.raises(ValueError, match=r"<\|im_end\|> is 514 in tokenizer tiny_qwen_tokenizer.json, 1, 2 in the model"):
            chat.check_tokenizer(replace(TABLES[name], stop=(1, 2)))
    with pytest.raises(ValueError, match="is 515 in tokenizer"):
        CHATS["moss"].check_tokenizer(replace(TABLES["moss"], audio_start=7))
    with pytest.raises(ValueError, match="has no special token <|endoftext|>.*tokenizer.json of MOSS-Speech"):
        Chat(load_tokenizer("bytes"), template=TEMPLATE).check_tokenizer(TABLES["moss"])


# ---- from a manifest to batches ----

def config(path: Path, **more: object) -> DataConfig:
    return DataConfig(**{"sources": (str(path),), "cache": str(path.parent / "cache"), "tokenizer": str(TOKENIZER), "split": "manifest",
                         "window": 4, "prefetch": 0, "columns": 256, **more})


def test_rows_of_messages_become_batches(tmp_path, capsys):
    clip = {"type": "audio", "audio_url": "never-opened.wav"}
    rows = [{"id": "talk", "group": "billing", "messages": TALK}, {"id": "held", "split": "test", "messages": TALK[1:3]},
            {"id": "said", "messages": [turn("user", [clip | {"text": "Hi"}]), turn("assistant", "Hello.")]},
            {"id": "mute", "messages": [turn("user", [clip]), turn("assistant", "Hello.")]}]
    path, plain = tmp_path / "calls.jsonl", tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text('{"id": "plain", "text": "No turns here."}\n')
    data, table = replace(config(path), sources=(str(path), str(plain))), TABLES["qwen2"]
    index = prepare(data, table)
    assert 'the model reads text only; give the recording never-opened.wav a "text"' in capsys.readouterr().err
    shown = {e.id: n for n, e in enumerate(index.entries) if e.split}
    assert {e.id: e.split for e in index.entries if e.split} == {"talk": "train", "held": "held-out", "said": "train", "plain": "train"}
    made = {name: lay_out(build_example(index, n, table), table) for name, n in shown.items()}
    assert made["talk"][0][0].tolist() == grid(CHATS["qwen2"].segments(TALK, []), table)[0][0].tolist()
    assert WORDS.decode(made["said"][0][0].tolist()).endswith("user\nHi\nassistant\nHello.\n")
    assert made["plain"][0][0].tolist() == ids("No turns here.<|endoftext|>") and made["plain"][1][0].tolist()[0] == 0
    batch = next(iter(Loader(data, table, "train", 1)))
    assert batch.weights.sum() > 0 and {name for row in batch.names for name in row} <= {"talk", "said", "plain"}
    prompt, _ = lay_out(prompt_example("Hi", data, WORDS, None, (), table), table)
    held, _ = made["held"]
    assert torch.equal(held[:, : prompt.shape[1]], prompt)
    with pytest.raises(ValueError, match="no usable row"):
        table = with_tokenizer_ids(StreamTable((*TEXT, *codebooks(8, 258, 258, 256, 257)), "moss"), WORDS)
        prepare(replace(data, sources=(str(plain),)), table)
    assert 'MOSS-Speech learns from conversations; write the row as {"messages"' in capsys.readouterr().err


# ---- published sizes ----

PUBLISHED = vars(qwen) | vars(moss)


@pytest.mark.parametrize(("name", "count"), {
    "QWEN2_5_0_5B": 494_032_768, "QWEN2_5_1_5B": 1_543_714_304, "QWEN2_5_3B": 3_085_938_688, "QWEN2_5_7B": 7_615_616_512,
    "QWEN3_0_6B": 596_049_920, "QWEN3_1_7B": 1_720_574_976, "QWEN3_4B": 4_022_468_096, "QWEN3_8B": 8_190_735_360,
    "MOSS_9B": 9_095_694_336}.items())
def test_published_sizes_have_exactly_their_parameters(name, count):
    preset: ModelConfig = PUBLISHED[name]
    with torch.device("meta"):
        assert MultistreamLM(preset).count_parameters() == count


@pytest.mark.parametrize(("name", "targets", "rank", "count"), [
    ("QWEN2_5_1_5B", ("attn.*",), 8, 2_179_072), ("QWEN2_5_1_5B", ("attn.*",), 16, 4_358_144),
    ("QWEN2_5_1_5B", ("attn.*", "ffn.*"), 8, 9_232_384), ("QWEN2_5_1_5B", ("attn.q", "attn.v"), 8, 1_089_536),
    ("MOSS_9B", ("attn.*",), 8, 8_519_680), ("MOSS_9B", ("temporal.audio_tail.*attn.*",), 8, 851_968),
    ("MOSS_9B", ("temporal.layers.*attn.*", "temporal.audio_tail.*attn.*"), 8, 7_667_712)])
def test_adapters_of_the_published_sizes(name, targets, rank, count):
    """Adapters follow the official Linears: (in + out) * rank each, narrow keys and values counted as they are."""
    with torch.device("meta"):
        model = inject(MultistreamLM(PUBLISHED[name]), LoraConfig(rank=rank, targets=targets))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
