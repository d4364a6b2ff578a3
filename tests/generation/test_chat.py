"""Conversations: replies as they come, figures that are looked up or not said, cuts, budget, masks; the command line."""

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import call
from test_figures import EQUAL, pairs
from test_moss import Q3, drawn, text_model
from test_qwen import TABLES, TOKENIZER

import checkpoint
from audio.wav import load_wav, save_wav
from checkpoint import converted
from corpus.data_config import DataConfig
from generation.conversation import SENTENCES, ChatConfig, Guard, Session, chat_in_terminal, masked, read_lookup
from generation.decode_step import SampleConfig
from layers.architecture import ModelConfig
from model import MultistreamLM
from sample import generate
from text.tokenizers import load_tokenizer

WORDS = load_tokenizer(str(TOKENIZER))
DATA = DataConfig(tokenizer=str(TOKENIZER), codec="tiny:1")
TABLE = TABLES["qwen2"]
ORDERS = {"48213": {"order": "48213", "status": "shipped", "date": "3 June", "name": "Maria Costa"}}
STOP = TABLE.stop[1]
MARKS = {WORDS.encode(mark)[0]: mark for mark in ("<|im_start|>", "<|im_end|>")}


class Script:
    """A model that says given texts, one a turn, a token at a time; counts what was drawn and keeps the prompts."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.drawn, self.prompts, self.closed = list(texts), 0, [], 0

    def __call__(self, prompt: torch.Tensor) -> Iterator[torch.Tensor]:
        self.prompts.append("".join(MARKS.get(i) or WORDS.decode([i]) for i in prompt[0].tolist()))
        try:
            for token in [*WORDS.encode(self.texts.pop(0)), STOP]:
                self.drawn += 1
                yield torch.tensor([[token]])
        finally:
            self.closed += 1


def session(*texts: str, lookup: object = ORDERS.get, **options: object) -> tuple[Session, Script, list[dict]]:
    rows, script, ticks = [], Script(*texts), iter(range(10**6))
    return Session(TABLE, DATA, ChatConfig(**options), script, lookup, log=rows.append, clock=lambda: float(next(ticks))), script, rows


def said(made: Session, heard: str) -> str:
    return "".join(piece for kind, piece in made.hear(heard) if kind == "text")


# ---- turns ----

def test_a_reply_streams_and_goes_into_the_history() -> None:
    made, script, rows = session("Good day, how can I help?", "Gladly.")
    pieces = [piece for _, piece in made.hear("Hello")]
    assert "".join(pieces) == "Good day, how can I help?" and len(pieces) > 4           # word by word, before the end is known
    assert said(made, "Please do") == "Gladly."
    assert "Hello<|im_end|>" in script.prompts[1] and "Good day, how can I help?<|im_end|>" in script.prompts[1]
    assert script.prompts[1].endswith("Please do<|im_end|>\n<|im_start|>assistant\n")
    assert [row["turn"] for row in rows] == [1, 2] and rows[0]["said"] == "Good day, how can I help?" and rows[0]["cut"] == ""
    assert 0 < rows[0]["seconds"]["first_token"] < rows[0]["seconds"]["total"]
    assert rows[0]["frames"] == len(WORDS.encode(rows[0]["said"])) + 1


def test_numbers_come_from_the_lookup_and_unknown_ones_get_a_fixed_sentence() -> None:
    made, script, rows = session("Order 48213 was shipped and comes on 3 June.")
    assert said(made, "Where is order four eight two one three?") == "Order 48213 was shipped and comes on 3 June."
    assert "lookup: order=48213; status=shipped; date=3 June; name=Maria Costa<|im_end|>" in script.prompts[0]
    assert script.prompts[0].index("four eight") < script.prompts[0].index("lookup:") and made.slots == ORDERS["48213"]
    assert said(made, "And 99999, 77777?") == "I cannot find 99999, 77777. Please check the number and tell me again."
    assert said(made, "أين الطلب ٥٥٥٥٥؟") == SENTENCES["ar"]["unknown"].format(numbers="55555")
    assert len(script.prompts) == 1 and [row["outcome"] for row in rows] == ["reply", "unknown", "unknown"]      # the model was not asked
    assert [row["looked_up"] for row in rows] == [1, 0, 0]


@pytest.mark.parametrize("reply, told, drawn_whole", [
    ("It comes on 4 June by the blue van.", "It comes on I cannot confirm that figure.", False),
    ("It is four eight two one nine now, I think so.", "It is I cannot confirm that figure.", False),
    ("48214", "I cannot confirm that figure.", True),
    ("It comes on 3 June, 48213.", "It comes on 3 June, 48213.", True),
    ("Your number is four eight two one three.", "Your number is four eight two one three.", True),
    ("One moment, this one is here.", "One moment, this one is here.", True)])
def test_a_figure_that_nobody_named_is_not_said(reply: str, told: str, drawn_whole: bool) -> None:
    made, script, rows = session(reply, "Yes.")
    assert said(made, "Where is 48213?").startswith(told)
    assert (script.drawn == len(WORDS.encode(reply)) + 1) == drawn_whole and script.closed == 1
    assert rows[0]["cut"] == ("" if told == reply else "made up")
    said(made, "And?")
    assert reply == told or ("4 June" not in script.prompts[1] and "48214" not in script.prompts[1])
    free, *_ = session(reply, grounded=False)
    assert said(free, "Where is 48213?") == reply


def test_the_guard_lets_words_through_one_by_one_and_figures_whole() -> None:
    guard = Guard("order 48213")
    pieces = ("Yes", ", or", "der 4", "8", "213 is", " here", ".")
    assert [guard.push(piece) for piece in pieces] == ["", "Yes, ", "order ", "", "", "48213 is ", ""]
    assert guard.flush() == "here." and not guard.caught


@pytest.mark.parametrize("one, other", pairs(EQUAL))
def test_a_figure_that_is_said_in_another_way_passes_letter_by_letter(one: str, other: str) -> None:
    for said, known in ((one, other), (other, one)):
        guard, text = Guard(f"lookup: {known}"), f"Yes, it is {said} here, thank you."
        assert "".join([*map(guard.push, text), guard.flush()]) == text and not guard.caught


def test_commands_repeat_hand_over_and_hang_up() -> None:
    made, script, rows = session("It is on its way.", "Yes.")
    assert said(made, "repeat") == "There is nothing to repeat yet."
    said(made, "Where is it?")
    assert said(made, " Repeat \n") == "It is on its way." and said(made, "repeat") == "It is on its way."
    assert said(made, "agent") == SENTENCES["en"]["agent"] and said(made, "quit") == "Goodbye."
    assert len(script.prompts) == 1 and [row["outcome"] for row in rows] == ["repeat", "reply", "repeat", "repeat", "agent", "quit"]
    said(made, "Thanks")
    assert "repeat" not in script.prompts[1] and "colleague" not in script.prompts[1]                    # commands are no turns


# ---- cuts and the budget ----

@pytest.mark.parametrize("way", ["token", "closed"])
def test_barge_in_stops_at_once_and_the_history_keeps_what_was_said(way: str) -> None:
    text = "This is a very long story about the weather and the sea."
    made, script, rows = session(text, "Yes.")
    heard, speech = "", made.hear("Tell me")
    for _, piece in speech:
        heard += piece
        if len(heard) > 12:
            if way == "closed":
                speech.close()
                break
            made.cancel.set()
            before = script.drawn
    assert way == "closed" or script.drawn == before                    # not one more was drawn
    assert script.closed == 1 and text.startswith(heard) and len(heard) < 30 and script.drawn < len(WORDS.encode(text))
    assert rows[0]["cut"] == "barge-in" and rows[0]["said"] == heard
    said(made, "Stop")
    assert f"assistant\n{heard}<|im_end|>" in script.prompts[1] and "weather" not in script.prompts[1]


def test_a_reply_that_takes_too_long_ends_and_keeps_what_was_said() -> None:
    made, script, rows = session("This is a very long story about the weather.", "Yes.", timeout=6.5)        # the clock ticks once a frame
    heard = said(made, "Tell me")
    assert rows[0]["cut"] == "timeout" and rows[0]["frames"] == 7 and script.closed == 1
    assert heard and heard == rows[0]["said"] and "weather" not in heard
    said(made, "And?")
    assert f"assistant\n{heard}<|im_end|>" in script.prompts[1] and rows[1]["cut"] == ""


def test_a_reply_that_is_cut_before_its_first_word_leaves_no_turn() -> None:
    made, script, _ = session("Hello there.", "Yes.")
    inner = made.say
    made.say = lambda prompt: (made.cancel.set(), inner(prompt))[1]
    assert said(made, "Hi") == "" and script.drawn == 0
    made.say = inner
    script.texts.pop(0)
    said(made, "Are you there?")
    assert script.prompts[-1].count("<|im_start|>assistant") == 1 and "Hi<|im_end|>" in script.prompts[-1]


def test_the_oldest_exchanges_are_forgotten_whole_and_the_system_turn_stays() -> None:
    replies = [f"Reply {'abcdefgh'[n]} is here for you." for n in range(8)]
    made, script, rows = session(*replies, budget=120)
    for n in range(8):
        said(made, f"Question {'abcdefgh'[n]}, please?")
    assert all(row["columns"] <= 120 for row in rows) and rows[-1]["dropped"] == 1 and sum(row["dropped"] for row in rows) >= 4
    last = script.prompts[-1]
    kept = [letter for letter in "abcdefgh" if f"Question {letter}" in last]
    assert kept == list("abcdefgh"[-len(kept) :]) and 1 < len(kept) < 6 and "You are Qwen" in last
    assert [letter for letter in "abcdefg" if f"Reply {letter}" in last] == kept[:-1]                # question and reply go together
    with pytest.raises(ValueError, match=r"this turn alone has \d+ columns, chat.budget is 120; raise it, or say less"):
        said(made, "word " * 100)
    script.texts.append("Fine.")
    assert said(made, "Short?") == "Fine." and "word word" not in script.prompts[-1] and rows[-2]["outcome"] == "error"


# ---- masks ----

@pytest.mark.parametrize("text, told", [
    ("I am Maria Costa, order 48213.", "I am <name>, order #####."),
    ("maria.costa+x@mail.example.org called", "<email> called"),
    ("my card is 4929 1234-5678 9012!", "my card is #### ####-#### ####!"),
    ("call +49 (170) 123 45 67", "call +## (###) ### ## ##"),
    ("it is four eight two one three, thanks", "it is <number>, thanks"),
    ("my name is Aisha Rahman and I wait", "my name is <name> and I wait"),
    ("رقم ٤٨٢١٣", "رقم #####"),
    ("Costa wants 12 of 3 June, error E42", "<name> wants 12 of 3 June, error E42")])
def test_personal_data_is_masked(text: str, told: str) -> None:
    assert masked(text, ORDERS["48213"]) == told


def test_the_log_holds_no_personal_data() -> None:
    made, _, rows = session("Maria Costa, order 48213 was shipped.")
    assert said(made, "Where is 48213? Write to m@x.org") == "Maria Costa, order 48213 was shipped."
    assert (rows[0]["heard"], rows[0]["said"]) == ("Where is #####? Write to <email>", "<name>, order ##### was shipped.")


# ---- the command line ----

@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model, one that speaks, and Moshi's kind; a lookup and a recording."""
    folder = tmp_path_factory.mktemp("chat")
    made = {"text": drawn(MultistreamLM(ModelConfig(TABLE, Q3)))}
    made["moss"] = drawn(converted("split-from-qwen", text_model(), tail=1, codes=256, tokenizer=TOKENIZER), 2)
    for name, model in made.items():
        checkpoint.save(model, folder / name, checkpoint.Extras(data={"tokenizer": str(TOKENIZER), "codec": "tiny:1"}))
    (folder / "orders.json").write_text(json.dumps(ORDERS))
    save_wav(folder / "asked.wav", 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)), 16000)
    return folder


def chat(monkeypatch: pytest.MonkeyPatch, models: Path, name: str, lines: str, out: Path, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return call("sample.py", "--ckpt", models / name, "--chat", f"--out={out}/x.wav", "--max_frames=12", *options)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "chat.jsonl").read_text(encoding="utf-8").splitlines()]


def test_lines_of_text_are_answered_in_print_and_logged(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "Hello\n\nWhere is 48213?\nand 99999?\nrepeat\nagent\nnever read\n"
    options = (f"--chat.lookup={models}/orders.json", "--temperature=0", "--chat.grounded=false")
    rc, out, err = chat(monkeypatch, models, "text", lines, tmp_path, *options)
    assert rc == 0, err
    rows = log_of(tmp_path)
    assert [row["outcome"] for row in rows] == ["reply", "reply", "unknown", "repeat", "agent"]
    assert rows[1]["heard"] == "Where is #####?" and rows[1]["looked_up"] == 1 and rows[0]["frames"] == 12 and rows[0]["cut"] == "length"
    assert "I cannot find 99999." in out and SENTENCES["en"]["agent"] in out and f"{tmp_path}/chat.jsonl: 5 turns" in out
    first = rows[0]["said"]
    assert first and masked(first, {}) == first and first in out                     # what was printed is what was logged
    model = checkpoint.load(models / "text")
    made = Session(TABLE, DATA, ChatConfig(grounded=False), lambda p: generate(model, p, SampleConfig(temperature=0, max_frames=12)))
    assert said(made, "Hello") == first


def test_speech_comes_in_pieces_of_five_codes_and_files_are_heard(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rc, out, err = chat(monkeypatch, models, "moss", f"{models}/asked.wav\nhello\nrepeat\n", tmp_path, "--min_frames=12", "--temperature=0")
    assert rc == 0, err
    rows = log_of(tmp_path)
    assert [row["outcome"] for row in rows] == ["reply", "reply", "repeat"] and rows[0]["columns"] > 25          # a second is 25 codes
    for n, row in enumerate(rows, 1):
        wav, rate = load_wav(tmp_path / f"x_{n:03d}.wav")
        assert wav.shape[1] / rate == pytest.approx(12 / 25) == row["audio_seconds"] and f"x_{n:03d}.wav: 0.5 s" in out
    assert rows[0]["seconds"]["first_token"] < rows[0]["seconds"]["first_audio"] < rows[0]["seconds"]["total"]
    model = checkpoint.load(models / "moss")
    made = Session(model.table, DATA, ChatConfig(), lambda p: generate(model, p, SampleConfig(temperature=0, max_frames=12, min_frames=12)))
    given = [piece.shape[-1] for _, piece in made.hear(str(models / "asked.wav"))]
    assert len(given) in (3, 4) and sum(given) == 12 * 640                           # 5, 5 and 2 codes, and what the decoder held back
    assert [codes.shape[1] for codes in made.exchanges[0].codes] == [25, 12]
    made.hear("again")
    for _ in (speech := made.hear("again")):
        made.cancel.set()
    speech.close()
    assert [codes.shape[1] for codes in made.exchanges[1].codes] == [5]               # barge-in: what was given, and no more


def test_control_c_cuts_a_reply_and_the_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script = Script("This is a very long story about the weather.")

    def say(prompt: torch.Tensor) -> Iterator[torch.Tensor]:
        for n, frame in enumerate(script(prompt)):
            if n == 8:
                os.kill(os.getpid(), signal.SIGINT)
            yield frame

    before = signal.getsignal(signal.SIGINT)
    chat_in_terminal(TABLE, DATA, ChatConfig(), say, out=f"{tmp_path}/x.wav", lines=io.StringIO("Hello\nquit\n"))
    rows = log_of(tmp_path)
    assert [row["cut"] for row in rows] == ["barge-in", ""] and 8 <= rows[0]["frames"] <= 10 and signal.getsignal(signal.SIGINT) is before
    out = capsys.readouterr().out
    assert rows[0]["said"] in out and "weather" not in out and "Goodbye." in out


@pytest.mark.parametrize("name, options, lines, told", [
    ("text", ("--chat.lookup=nowhere.json",), "", "nowhere.json does not exist"),
    ("text", ("--chat.lookup={models}/bad.json",), "", "is no table of facts"),
    ("text", ("--chat.lookup={models}/worse.json",), "", "contains ; or = or a line break"),
    ("text", ("--chat.budget=0",), "", "budget 0 is not positive"),
    ("text", ("--chat.budget=10",), "Hello\n", "chat.budget is 10; raise it"),
    ("text", ("--chat.lokup=x",), "", "nearest is --chat.lookup"),
    ("text", ("--text=hello",), "", "--chat reads what is said line by line; leave --text out"),
    ("text", ("--reply=speech",), "", "does not speak"),
    ("text", (), "x.wav\n", "x.wav: this model reads text only"),
    ("text", (), "I say <|im_end|> now\n", "holds <|im_end|>"),
    ("moss", (), "nowhere.wav\n", "nowhere.wav"),
    ("../tiny", (), "", "has no chat template")])
def test_bad_input_is_one_line(name: str, options: tuple[str, ...], lines: str, told: str, models: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch, tiny_run: Path) -> None:
    (models / "bad.json").write_text("[1]")
    (models / "worse.json").write_text('{"48213": {"status": "a;b"}}')
    given = [option.format(models=models) for option in options]
    rc, _, err = chat(monkeypatch, models, name if name != "../tiny" else str(tiny_run), lines, tmp_path, *given)
    assert rc == 2 and told in err and err.count("\n") == 1, err


def test_a_lookup_is_found_under_every_way_of_writing_its_number(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text(json.dumps({"AB-48213": {"status": 1}, "7 7 7 7 7": {"status": "b"}}))
    lookup = read_lookup(str(tmp_path / "o.json"))
    assert lookup("ab48213") == {"status": "1"} and lookup("77777") == {"status": "b"} and lookup("48213") is None


@pytest.mark.parametrize("keys, told", [
    (("48213", "4 8 2 1 3"), "'48213' and '4 8 2 1 3' are the same number 48213; keep one"),
    (("48213", "forty-eight two one three"), "are the same number 48213"), (("AB-48213", "ab48213"), "are the same number ab48213"),
    (("order 48213",), "is not one number or code"), (("48 and 213",), "is not one number or code"), (("maria",), "is not one number")])
def test_a_key_is_one_number_and_no_two_are_the_same(keys: tuple[str, ...], told: str, tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text(json.dumps({key: {"status": "x"} for key in keys}))
    with pytest.raises(ValueError, match=told):
        read_lookup(str(tmp_path / "o.json"))


@pytest.mark.parametrize("heard, found", [
    ("order four oh eight two one please", 1), ("it's forty eight two one three", 0), ("it is A B seven seven one two oh", 2),
    ("error e42", 3), ("I paid $48,213", None), ("it came at 9:30", None), ("twelve thirty", None), ("double four oh eight two", 4)])
def test_spoken_numbers_are_looked_up_whole(heard: str, found: int | None, tmp_path: Path) -> None:
    keys = ["48213", "40821", "AB-77120", "E42", "44082", "482", "42", "30"]
    (tmp_path / "o.json").write_text(json.dumps({key: {"key": key} for key in keys}))
    made, _, rows = session("Yes.", lookup=read_lookup(str(tmp_path / "o.json")))
    assert said(made, heard) == "Yes." and made.slots == ({} if found is None else {"key": keys[found]})


@pytest.mark.skipif(not find_spec("bm25s"), reason="bm25s is not installed")
def test_passages_of_documents_follow_the_question_with_their_source(tmp_path: Path) -> None:
    (tmp_path / "returns.md").write_text("Refunds are paid within 10 days.<|im_end|>\n\n" + "Nothing else is said here. " * 30)
    made, script, rows = session("It takes ten days.", "It takes 11 days.", "Hello.", documents=str(tmp_path), passages=1)
    assert said(made, "How long do refunds take?") == "It takes ten days."                     # a figure that the passage gave
    assert said(made, "And a refund by card?").startswith("It takes I cannot confirm that figure")
    assert said(made, "Good morning!") == "Hello."
    before, after = script.prompts[0].split("refunds take?<|im_end|>\n")
    assert after.startswith("<|im_start|>system\npassage returns.md, 1: Refunds are paid within 10 days.") and "passage" not in before
    assert [row["passages"] for row in rows] == [["returns.md, 1"], ["returns.md, 1"], []]
    small, *_ = session("Yes.", documents=str(tmp_path), budget=60)
    with pytest.raises(ValueError, match=r"chat.budget is 60; raise it, or say less, or lower chat.passages"):
        said(small, "How long do refunds take?")
