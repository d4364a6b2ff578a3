"""Passages of documents: cut, found by BM25 as an independent count has it, given with their source; answers held against them."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from text.passages import Documents, Passage, cut, passage_turn, passages_of, terms, unsupported

needs_bm25s = pytest.mark.skipif(not find_spec("bm25s"), reason="bm25s is not installed")
HANDBOOK = {
    "returns.md": """# Returns

Unused goods may be returned within thirty days.

Refunds are paid within 10 days of the return.

## Damaged goods

Send a photo of the damage; a replacement leaves the next day.""",
    "delivery/express.txt": "Express delivery costs 9.50 euros and takes one day.\n\nStandard delivery is free above 50 euros.",
    "عربي.txt": "يمكن إرجاع البضاعة خلال ٣٠ يوما."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in HANDBOOK.items():
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(text, encoding="utf-8")
    return tmp_path / "docs"


def test_passages_keep_their_heading_and_are_not_cut_within_sentences() -> None:
    assert list(cut(HANDBOOK["returns.md"])) == [
        "Returns: Unused goods may be returned within thirty days. Refunds are paid within 10 days of the return.",
        "Damaged goods: Send a photo of the damage; a replacement leaves the next day."]
    long = " ".join(f"Sentence number {n} of the long page ends here." for n in range(60))
    parts = list(cut(long))
    assert " ".join(parts) == long and len(parts) == 6 and all(part.endswith("here.") and len(part.split()) <= 100 for part in parts)
    assert list(cut("word " * 250)) == [" ".join(["word"] * n) for n in (100, 100, 50)] and list(cut("\n\n# \n")) == []


def test_words_lose_their_endings_and_digits_their_script() -> None:
    assert terms("refunds") == terms("refund") == terms("refunded") and terms("deliveries") == terms("delivery")
    assert terms("٣٠ يوماً الإرجاع") == terms("30 يوما إرجاع")


@needs_bm25s
def test_the_best_passage_comes_first_with_its_source(folder: Path) -> None:
    documents = Documents(folder)
    assert documents.find("How long does a refund take?")[0] == Passage("returns.md", 1, next(cut(HANDBOOK["returns.md"])))
    assert documents.find("what does an express delivery cost", 1)[0].source == "delivery/express.txt"
    assert documents.find("كيف إرجاع البضاعة")[0].source == "عربي.txt"
    assert documents.find("is the moon made of cheese") == [] == documents.find("and the?") == documents.find("")
    assert len(documents.find("goods delivery", 1)) == 1


@needs_bm25s
def test_scores_are_those_of_the_formula(folder: Path) -> None:
    """BM25 as Lucene counts it, k1 = 1.5 and b = 0.75."""
    documents = Documents(folder)
    held, asked = [terms(p.text) for p in documents.passages], terms("goods delivery days return")
    mean = sum(map(len, held)) / len(held)

    def score(words: list[str]) -> float:
        total = 0.0
        for term in asked:
            df, tf = sum(term in other for other in held), words.count(term)
            idf = math.log(1 + (len(held) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean)) if tf else 0
        return total

    order = sorted(range(len(held)), key=lambda n: -score(held[n]))
    wanted = [documents.passages[n] for n in order if score(held[n]) > 0]
    assert documents.find("goods, delivery, days, return", 9) == wanted and len(wanted) >= 3


def test_an_answer_is_held_against_its_passages() -> None:
    turn = passage_turn([Passage("returns.md", 1, "Refunds are paid within 10 days."), Passage("x.txt", 2, "Express costs 9.50 euros.")])
    assert turn == {"role": "system", "content": "passage returns.md, 1: Refunds are paid within 10 days.\npassage x.txt, 2: "
                    + "Express costs 9.50 euros."}
    before = [{"role": "user", "content": "When is my refund of order 48213 paid?"}, turn]
    assert passages_of(before) == ["Refunds are paid within 10 days.", "Express costs 9.50 euros."]
    for reply, bad in (("The refund is paid within ten days.", False), ("Your refund, order 48213, is paid within 10 days.", False),
                       ("The refund is paid within 12 days.", True), ("Our lamps are made of Italian glass.", True), ("Yes, it is.", None)):
        assert unsupported(reply, before) is bad, reply
    assert unsupported("The refund is paid.", before[:1]) is None                   # it was given no passage


@needs_bm25s
def test_folders_that_cannot_be_read_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "scan.pdf").write_bytes(b"%PDF")
    assert Documents(folder).unread == ["scan.pdf"]
    (tmp_path / "empty").mkdir()
    (folder / "old.txt").write_bytes("Rückgabe".encode("latin-1"))
    for name, told in ((tmp_path / "nowhere", "is no folder"), (tmp_path / "empty", "holds no text"), (folder, "old.txt is no UTF-8")):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            Documents(name)
