"""Passages of a folder of documents that belong to a question, by BM25 (the package bm25s): what a short context has no room for.

    documents = Documents("handbook")                  its .txt and .md files, cut into passages of about 100 words
    documents.find("how long do refunds take?")        [Passage("returns.md", 2, "Refunds are paid within ten days ...")]
    passage_turn(found)                                {"role": "system", "content": "passage returns.md, 2: Refunds are ..."}
    unsupported("It takes ten days.", messages)        whether no passage of the messages supports it; None where there is none

A passage supports an answer if it holds half of its words that carry meaning, and if every figure of the answer is in the passages
or in what was said. That counts words, it does not understand them. Next: coverage.py.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from text.conversation import text_of
from text.figures import Known
from text.normalisers import ARABIC, arabic

SUFFIXES, WORDS = (".txt", ".md"), 100
MARK = "passage "
SUPPORT = 0.5               # of the words of an answer that one passage must hold
PLAIN = set("""a about after all also am an and any are as at be been but by can could did do does for from had has have he her here him his
how i if in into is it its just me more my no not of on or our out over please she so some than thank thanks that the their them then there
these they this those to too up us very was we were what when where which who why will with would yes you your
من في على إلى عن هل ما هو هي أن لا نعم هذا هذه مع كم""".split())


class Passage(NamedTuple):
    source: str             # file, from the folder on
    part: int               # number of the passage in it, from 1 on
    text: str


def terms(text: str) -> list[str]:
    """The words of a text that carry meaning, without endings and accents of vowels; digits in Latin script."""
    words = re.findall(r"\w+", re.sub("[\u064b-\u0652]", "", arabic(text).translate(ARABIC).lower().replace("’", "'")).replace("'s", ""))
    return [re.sub(r"(?<=\w{3})(?:ies|y)$|(?<=\w{3})(?:ing|ed|es|s|e)$|^ال(?=\w{3})", lambda m: "i" if m[0] in ("ies", "y") else "", word)
            for word in words if word not in PLAIN]


def cut(text: str) -> Iterator[str]:
    """Passages of about `WORDS` words, cut between paragraphs or else sentences, each with the heading above it."""
    heading, held = "", list[str]()
    for paragraph in [*re.split(r"\n\s*\n|\n(?=#)|(?<=\n)(?=#)", text), "# "]:
        title = re.match(r"\s*#+ *(.*)", paragraph)
        if title and held:
            yield " ".join(filter(None, (heading, *held)))
            held = []
        if title:
            heading, paragraph = title[1].strip().rstrip(".:") + ":" if title[1].strip() else "", paragraph[title.end() :]
        for sentence in re.split(r"(?<=[.!?؟])\s+", " ".join(paragraph.split())):
            words = sentence.split()
            for at in range(0, len(words), WORDS):
                piece = words[at : at + WORDS]
                if held and sum(len(part.split()) for part in held) + len(piece) > WORDS:
                    yield " ".join(filter(None, (heading, *held)))
                    held = []
                held.append(" ".join(piece))


class Documents:
    """The passages of a folder and their index."""

    def __init__(self, folder: str | Path) -> None:
        try:
            import bm25s
        except ModuleNotFoundError:
            raise ValueError('documents need bm25s, which is not installed; run: pip install -e ".[documents]"') from None
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; name one with the documents, text in .txt or .md files")
        files = sorted(p for p in root.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts))
        self.unread = [p.relative_to(root).as_posix() for p in files if p.suffix.lower() not in SUFFIXES]
        self.passages: list[Passage] = []
        for path in files:
            if path.suffix.lower() in SUFFIXES:
                try:
                    parts = cut(path.read_text(encoding="utf-8-sig"))
                    self.passages += [Passage(path.relative_to(root).as_posix(), n, part) for n, part in enumerate(parts, 1)]
                except UnicodeDecodeError:
                    raise ValueError(f"{path} is no UTF-8 text; save it as UTF-8, or take it out of the folder") from None
        held = [terms(passage.text) for passage in self.passages]
        if not any(held):
            raise ValueError(f"{folder} holds no text in .txt or .md files; save the documents as one of these")
        self.index = bm25s.BM25()
        self.index.index(held, show_progress=False)

    def find(self, question: str, most: int = 3) -> list[Passage]:
        """The passages that share words with a question, the best first."""
        asked = [term for term in dict.fromkeys(terms(question)) if term in self.index.vocab_dict]
        if not asked:
            return []
        places, scores = self.index.retrieve([asked], k=min(most, len(self.passages)), show_progress=False, n_threads=0)
        return [self.passages[place] for place, score in zip(places[0].tolist(), scores[0].tolist(), strict=True) if score > 0]


def passage_turn(found: Sequence[Passage]) -> dict[str, str]:
    """The system turn with passages and their sources."""
    return {"role": "system", "content": "\n".join(f"{MARK}{p.source}, {p.part}: {p.text}" for p in found)}


def passages_of(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The passages that the messages before an answer give it."""
    given = [text_of(m["content"]) for m in messages if m["role"] == "system"]
    return [line.partition(": ")[2] for text in given if text.startswith(MARK) for line in text.split("\n")]


def unsupported(reply: str, before: Sequence[dict[str, Any]]) -> bool | None:
    """Whether no passage among the messages before a reply supports it; None where there are none, or where it says nothing."""
    passages, said = passages_of(before), set(terms(reply))
    if not passages or not said:
        return None
    held = max(len(said & set(terms(passage))) / len(said) for passage in passages)
    return held < SUPPORT or bool(Known("\n".join(text_of(m["content"]) for m in before)).missing(reply))


UNSUPPORTED = "answers no passage supports"


def support_parts(reply: str, before: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """A reply in a count: 1 if no passage supports it, and 1 if that can be said."""
    found = unsupported(reply, before)
    return int(found is True), int(found is not None)


def adding_passages(folder: str) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """What gives the messages before a reply the passages of a folder on its question, last, as in chat; "" = nothing."""
    documents = Documents(folder) if folder else None

    def add(before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked = next((text_of(m["content"]) for m in reversed(before) if m["role"] == "user"), "")
        found = documents.find(asked) if documents else []
        return [*before, *([passage_turn(found)] if found else [])]

    return add
