"""Phone calls: what counts as made up, what a caller wants, and that the bundled dialogues keep their promises."""

import json
import re
import runpy
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, call
from test_diarise import composed, needs_weights
from test_telephone import call as stereo

from audio.wav import load_wav, save_wav
from corpus.layouts import read_manifest
from corpus.phone_calls import CATEGORIES, SYSTEM, cut_call, entities, intent, lookup_turn, ungrounded
from text.figures import figures

IVR = ROOT / "assets/ivr"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (IVR / name).read_text(encoding="utf-8").splitlines()]


DIALOGUES = [*rows("dialogues.jsonl"), *rows("test.jsonl")]


# ---- entities ----

@pytest.mark.parametrize("text, found", [
    ("Order 48213 arrives on 3 June.", ["48213", "3", "june"]),
    ("it is four eight two one three", ["48213"]),
    ("It is 4 8 2 1 3.", ["48213"]),
    ("thirty-one days, two hundred five in all", ["31", "205"]),
    ("twelve thousand three hundred", ["12300"]),
    ("one moment, this one", []),
    ("38,50 euros or 38.50 euros.", ["38.50", "38.50"]),
    ("error E-42, e42 and TR99", ["e42", "e42", "tr99"]),
    ("Thank you, Maria. Goodbye, Mr. Costa", ["maria", "mr"]),
    ("رقم ٤٨٢١٣ هنا", ["48213"]),
    ("no figure here. Nothing at all! Really? Yes", [])])
def test_entities_are_figures_codes_and_names_inside_sentences(text: str, found: list[str]) -> None:
    assert entities(text) == found


def test_a_reply_may_name_what_the_call_or_the_lookup_named() -> None:
    context = "\n".join([SYSTEM, "Hello, this is Maria. Order four eight two one three.", lookup_turn({"date": "3 June"})["content"]])
    assert ungrounded("Thank you, Maria. Order 48213 of Harbour Supply comes on 3 June.", context) == []
    assert sorted(ungrounded("Thank you, Anna. Order 48214 comes on 3 July, within 5 days.", context)) == ["48214", "5", "anna", "july"]
    assert ungrounded("It is 482.", "order 48213") == ["482"]                      # a piece of a number is another number


def test_a_lookup_is_one_line_of_facts() -> None:
    assert lookup_turn({"order": "48213", "status": "on hold"}) == {"role": "system", "content": "lookup: order=48213; status=on hold"}
    with pytest.raises(ValueError, match="remove it"):
        lookup_turn({"note": "a; b"})


# ---- intents ----

def test_key_words_find_intents_and_the_longest_wins() -> None:
    assert intent("Where is my parcel?") == "order_tracking"
    assert intent("I want to talk about that invoice") == "billing"
    assert intent("شكرا جزيلا") == "closing"
    assert intent("thanks, but where is my order") == "order_tracking"             # 17 letters against 6
    assert intent("the colour of billiards is green") == "unknown"                 # whole words only


def test_key_words_recognise_most_first_turns_and_refuse_most_others() -> None:
    asked = [(row["category"], row["messages"][1]["content"]) for row in DIALOGUES]
    right = sum(intent(text) == category for category, text in asked) / len(asked)
    others = (IVR / "out_of_scope.txt").read_text().splitlines()
    refused = sum(intent(text) == "unknown" for text in others) / len(others)
    assert 0.5 < right < 1 and refused >= 0.8, (right, refused)                    # a baseline: neither empty nor perfect


# ---- the dialogues ----

def test_the_dialogues_are_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    rc, out, err = call("assets/build_ivr.py", f"--out={tmp_path}")
    assert rc == 0, err
    for name in ("dialogues.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (IVR / name).read_bytes(), f"run python assets/build_ivr.py: {name} is stale"
    rc, out, err = call("assets/build_ivr.py", f"--out={tmp_path}", "--seed=1", "--copies=2")
    assert rc == 0 and len((tmp_path / "test.jsonl").read_text().splitlines()) == 22
    assert (tmp_path / "test.jsonl").read_bytes() != (IVR / "test.jsonl").read_bytes()


def test_nine_categories_and_replies_enough() -> None:
    assert {row["category"] for row in DIALOGUES} == set(CATEGORIES)
    families = (IVR / "families.txt").read_text(encoding="utf-8")
    wordings = [text for line in families.splitlines() if line.startswith("agent: ") for text in line[7:].split(" | ")]
    assert len(set(wordings)) == len(wordings) >= 3 * 65 and all(len(w.split()) >= 4 for w in wordings)
    assert sum(line.startswith("agent: ") for line in families.splitlines()) >= 65
    assert sum(sum(m["role"] == "assistant" for m in row["messages"]) > 1 for row in DIALOGUES) >= 60
    assert {row["language"] for row in DIALOGUES} == {"en", "ar"}


def test_no_family_and_no_reply_is_on_two_sides() -> None:
    sides: dict[str, set[str]] = {}
    for row in DIALOGUES:
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        bare = [" ".join(w for w in text.lower().split() if not any(c.isdigit() for c in w)) for text in said]
        for key in (row["group"], *bare):
            sides.setdefault(key, set()).add(row["split"])
    assert all(len(found) == 1 for found in sides.values()), [key for key, found in sides.items() if len(found) > 1]
    by = {split: {row["group"] for row in DIALOGUES if row["split"] == split} for split in ("train", "held-out", "test")}
    assert {split: len({g.split("/")[0] for g in groups}) for split, groups in by.items()} == {"train": 9, "held-out": 9, "test": 9}
    assert len(by["held-out"]) == len(by["test"]) == 11 and len(by["train"]) == 58
    long = {row["split"] for row in DIALOGUES if sum(m["role"] == "assistant" for m in row["messages"]) > 1}
    assert long == {"train", "held-out", "test"}


def test_replies_of_different_sides_are_no_near_copies() -> None:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}

    said = {split: [shingles(m["content"]) for row in DIALOGUES if (row["split"] == "train") == (split == "train")
                    for m in row["messages"] if m["role"] == "assistant"] for split in ("train", "other")}
    nearest = max(len(a & b) / max(1, len(a | b)) for a in said["other"] for b in said["train"])
    assert nearest < 0.5, nearest


def test_no_reply_of_the_dialogues_makes_anything_up() -> None:
    for row in DIALOGUES:
        for n, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                before = "\n".join(m["content"] for m in row["messages"][:n])
                assert not ungrounded(message["content"], before), row["id"]
        assert all(any(value in m["content"] for m in row["messages"]) for value in row["slots"].values())
    assert sum(len(figures(m["content"])) for row in DIALOGUES for m in row["messages"] if m["role"] == "assistant") > 200


@pytest.mark.parametrize("line, message", [
    ("agent: Order {order} is here.", "makes up ['order']"), ("agent: It takes 3 days.", "makes up a figure"),
    ("bot: hello", "line 3"), ("user: hello", "no agent line")])
def test_a_family_that_breaks_the_rules_is_refused(line: str, message: str, tmp_path: Path) -> None:
    read = runpy.run_path(str(ROOT / "assets/build_ivr.py"))["read_families"]
    (tmp_path / "f.txt").write_text(f"[billing/x]\nuser: hi\n{line}\n")
    with pytest.raises(ValueError) as error:
        read(tmp_path / "f.txt")
    assert message in str(error.value)


# ---- recordings ----

def test_a_stereo_call_becomes_a_conversation_of_its_turns(tmp_path: Path) -> None:
    wav = stereo((0, 0.5, 2), (1, 2.5, 4), (0, 3.8, 6), (1, 6.3, 6.8), (0, 7, 9), (1, 9.2, 9.8), rate=16_000)
    save_wav(tmp_path / "in/7.wav", wav.clamp(-1, 1), 16_000)
    rc, out, err = call("data.py", "calls", tmp_path / "in", f"--out={tmp_path}/out")
    assert rc == 0 and "1 calls, 5 turns, 0 left out" in out, err
    row = json.loads((tmp_path / "out/calls.jsonl").read_text())
    assert [m["role"] for m in row["messages"]] == ["assistant", "user", "assistant", "user", "assistant"]     # the caller's last words go
    parts = [m["content"][0] for m in row["messages"]]
    assert [part.get("crosstalk", False) for part in parts] == [False, True, True, False, False]
    for part, (channel, start, end) in zip(parts, [(0, 0.5, 2), (1, 2.5, 4), (0, 3.8, 6), (1, 6.3, 6.8), (0, 7, 9)], strict=True):
        said, rate = load_wav(tmp_path / "out" / part["audio_url"])
        assert rate == 16_000 and abs(said.shape[1] / rate - (end - start)) <= 0.14
        loudest = wav[channel, int(start * rate) : int(end * rate)].clamp(-1, 1).abs().max()
        assert float(said.abs().max()) == pytest.approx(float(loudest), rel=0.01)
    found = read_manifest(tmp_path / "out/calls.jsonl")
    assert len(found.rows) == 1 and not found.bad and found.kind == "conversations"
    assert cut_call(tmp_path / "in/7.wav", tmp_path / "other", "right")["messages"][-1]["role"] == "assistant"


def test_a_call_with_a_silent_channel_is_named_and_left_out(tmp_path: Path) -> None:
    good = stereo((0, 0.5, 2), (1, 2.5, 4), rate=8000)
    for name, wav in (("good", good), ("mono", good[:1]), ("half", good * torch.tensor([[1.0], [0.0]])), ("mute", 0 * good)):
        save_wav(tmp_path / f"{name}.wav", wav.clamp(-1, 1), 8000)
    rc, out, err = call("data.py", "calls", tmp_path, f"--out={tmp_path}/out", "--agent=right")
    lines = err.splitlines()
    assert rc == 0 and "1 calls, 2 turns, 3 left out" in out and len(lines) == 3
    assert "half.wav: the right channel, the agent, is silent; record each speaker on a separate channel" in lines[0]
    assert "mono.wav" in lines[1] and "mute.wav: both channels are silent" in lines[2]
    rc, out, err = call("data.py", "calls", tmp_path / "half.wav", f"--out={tmp_path}/out")
    assert rc == 2 and "the right channel, the caller, is silent" in err and "none of 1 recordings is a usable call" in err
    rc, _, err = call("data.py", "calls", tmp_path, f"--out={tmp_path}/out", "--agent=up")
    assert rc == 2 and "--agent is left or right" in err


def test_calls_of_equal_names_stay_apart_and_are_read_in_any_format(tmp_path: Path) -> None:
    wav = stereo((0, 0.5, 2), (1, 2.5, 4), (0, 4.5, 6), seconds=7)
    for name in ("mon/7.wav", "tue/7.wav", "tue/8.flac", "tue/8.WAV"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "in" / name, (wav + 0.2).clamp(-1, 1).T.numpy(), 8000)      # with an offset, as some recorders have
    rc, out, err = call("data.py", "calls", tmp_path / "in/mon", tmp_path / "in/tue", tmp_path / "in/mon/7.wav", f"--out={tmp_path}/out")
    made = [json.loads(line) for line in (tmp_path / "out/calls.jsonl").read_text().splitlines()]
    assert rc == 0 and [row["id"] for row in made] == ["mon/7", "tue/7", "tue/8_WAV", "tue/8_flac"], err
    files = [part["audio_url"] for row in made for m in row["messages"] for part in m["content"]]
    assert len(set(files)) == len(files) == 12 and all((tmp_path / "out" / file).is_file() for file in files)
    said, _ = load_wav(tmp_path / "out" / files[0])
    assert abs(float(said.mean())) < 0.01 and abs(said.shape[1] / 8000 - 1.5) < 0.14            # without the offset, turns where they are


def test_one_recording_in_both_channels_is_refused(tmp_path: Path) -> None:
    wav = stereo((0, 0.5, 2), (1, 2.5, 4)).sum(0, keepdim=True)
    for name, two in (("same", wav), ("quieter", 0.3 * wav), ("turned", -wav)):
        save_wav(tmp_path / f"{name}.wav", torch.cat([wav, two]).clamp(-1, 1), 8000)
        with pytest.raises(ValueError, match="both channels hold the same sound"):
            cut_call(tmp_path / f"{name}.wav", tmp_path)


def test_hold_music_is_no_turn(tmp_path: Path) -> None:
    wav = stereo((0, 0.5, 2), (1, 2.5, 4), (0, 24, 26), (1, 27, 28), (0, 28.5, 29.5), seconds=30)
    time = torch.arange(4000) / 8000
    tune = torch.cat([torch.sin(6.2832 * f * time) + torch.sin(6.2832 * 1.25 * f * time) for f in (392, 440, 523, 440) * 8])
    wav[0, 6 * 8000 : 22 * 8000] += 0.1 * tune
    save_wav(tmp_path / "in/x.wav", wav.clamp(-1, 1), 8000)
    rc, out, err = call("data.py", "calls", tmp_path / "in", f"--out={tmp_path}/out")
    row = json.loads((tmp_path / "out/calls.jsonl").read_text())
    seconds = re.search(r"; (\d+) s of hold music are no turn", out)
    assert rc == 0 and 12 < int(seconds[1]) <= 17 and not read_manifest(tmp_path / "out/calls.jsonl").unread, err
    lengths = [load_wav(tmp_path / "out" / m["content"][0]["audio_url"])[0].shape[1] / 8000 for m in row["messages"]]
    assert [m["role"] for m in row["messages"]] == ["assistant", "user", "assistant", "user", "assistant"] and max(lengths) < 2.5


def test_one_channel_is_cut_as_an_rttm_says(tmp_path: Path) -> None:
    save_wav(tmp_path / "in/7.wav", stereo((0, 0.5, 2), (0, 2.5, 4), (0, 4.5, 6)).mean(0, keepdim=True), 8000)
    (tmp_path / "t.rttm").write_text("".join(f"SPEAKER 7 1 {a} {b - a} <NA> <NA> {who} <NA> <NA>\n" for a, b, who in (
        (0.5, 2, "caller"), (2.5, 4, "clerk"), (3.8, 6, "caller"), (6.5, 7, "clerk"))))
    for agent, roles in (("clerk", ["user", "assistant", "user", "assistant"]), ("first", ["assistant", "user", "assistant"])):
        rc, _, err = call("data.py", "calls", tmp_path / "in", f"--out={tmp_path}/out", f"--rttm={tmp_path}/t.rttm", f"--agent={agent}")
        row = json.loads((tmp_path / "out/calls.jsonl").read_text())
        assert rc == 0 and [m["role"] for m in row["messages"]] == roles, err
    assert [m["content"][0].get("crosstalk", False) for m in row["messages"]] == [False, True, True]
    for agent, told in (("nobody", "its RTTM names caller, clerk"), ("left", "its RTTM names caller, clerk")):
        rc, _, err = call("data.py", "calls", tmp_path / "in", f"--out={tmp_path}/out", f"--rttm={tmp_path}/t.rttm", f"--agent={agent}")
        assert rc == 2 and told in err
    save_wav(tmp_path / "in/8.wav", stereo((0, 0.5, 2))[:1], 8000)
    rc, _, err = call("data.py", "calls", tmp_path / "in", f"--out={tmp_path}/out", f"--rttm={tmp_path}/t.rttm")
    assert rc == 0 and "8.wav" in err and "does not name it, only 7" in err


@needs_weights
def test_one_channel_is_cut_by_voice(tmp_path: Path) -> None:
    wav, truth = composed(2, (1, 2))
    save_wav(tmp_path / "7.wav", wav, 8000)
    for agent, first in (("first", "assistant"), ("second", "user")):
        row = cut_call(tmp_path / "7.wav", tmp_path / agent, agent)
        assert row["messages"][0]["role"] == first and len(row["messages"]) in (5, 6)
        assert all(0.5 < m["content"][0]["confidence"] <= 1 for m in row["messages"])
    for agent in ("left", "up"):
        with pytest.raises(ValueError, match="has one channel; say --agent=first"):
            cut_call(tmp_path / "7.wav", tmp_path, agent)
