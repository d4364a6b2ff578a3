"""How well a tokenizer covers the texts of a data set, by script and by character.

    python data.py check data/ar.jsonl --tokenizer=bosonai/higgs-audio-v2-generation-3B-base --normaliser=arabic-v1+higgs-v1

    script        words  letters   tokens  a word  unknown  as bytes  changed
    ARABIC         4120    19311     7402    1.80        0        12        0
    as bytes: U+06D0 ARABIC LETTER E 6 times

unknown   unknown tokens: the model cannot read these characters
as bytes  tokens that are only part of a character: readable, but a letter takes several tokens and was rare in pretraining
changed   words that differ after encode and decode

Each word is encoded on its own, after the normaliser that training will use. A word in several scripts counts under the
script of most of its letters. Good values for a new language: few bytes, nothing unknown, 1 to 3 tokens a word.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from text.normalisers import normalise
from text.tokenizers import Tokenizer

SHOWN = 8       # characters listed in the report


@dataclass
class Script:
    """Sums over the words of a script."""

    words: int = 0
    letters: int = 0
    tokens: int = 0
    unknown: int = 0
    bytes: int = 0
    changed: int = 0


@dataclass
class Coverage:
    """Result of `measure_coverage`: sums by script, most words first, and how often each character is unknown, or bytes."""

    scripts: dict[str, Script] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The report as a table."""
        out = [f"{'script':<12} {'words':>7} {'letters':>8} {'tokens':>8} {'a word':>7} {'unknown':>8} {'as bytes':>9} {'changed':>8}"]
        for name, s in self.scripts.items():
            out.append(f"{name:<12} {s.words:>7} {s.letters:>8} {s.tokens:>8} {s.tokens / s.words:>7.2f} {s.unknown:>8} {s.bytes:>9} "
                       + f"{s.changed:>8}")
        for counts, how in ((self.unknown, "unknown"), (self.bytes, "as bytes")):
            named = [f"U+{ord(c):04X} {unicodedata.name(c, '?')} {n} times" for c, n in counts.most_common(SHOWN)]
            if named:
                out.append(f"{how}: " + ", ".join(named) + (f", and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""))
        return out


def measure_coverage(texts: Iterable[str], tokenizer: Tokenizer, normaliser: str = "none") -> Coverage:
    """Encode every word of the texts with a tokenizer and count."""
    words = Counter(word for text in texts for word in normalise(text, normaliser).split())
    found, characters = Coverage(), Counter()
    for word, count in words.items():
        s = found.scripts.setdefault(script(word), Script())
        tokens, unknown, as_bytes, restored = read(word, tokenizer)
        for name, value in (("words", 1), ("letters", len(word)), ("tokens", tokens), ("unknown", unknown), ("bytes", as_bytes),
                            ("changed", not restored)):
            setattr(s, name, getattr(s, name) + count * value)
        if unknown or as_bytes:
            characters.update({c: count * n for c, n in Counter(word).items()})
    for c, count in characters.items():
        _, unknown, as_bytes, _ = read(c, tokenizer)
        for counts in (found.unknown,) * bool(unknown) + (found.bytes,) * bool(as_bytes):
            counts[c] = count
    found.scripts = dict(sorted(found.scripts.items(), key=lambda item: -item[1].words))
    return found


def read(word: str, tokenizer: Tokenizer) -> tuple[int, int, int, bool]:
    """Tokens of a word, those that are unknown, those that are part of a character, and whether decode restores the word."""
    try:
        ids = tokenizer.encode(word)
    except ValueError:                              # a word list raises for a word that is not in it
        return 1, 1, 0, False
    unknown = sum(i == tokenizer.unknown for i in ids)
    as_bytes = sum("\ufffd" in tokenizer.decode([i]) for i in ids if i != tokenizer.unknown)
    return len(ids), unknown, as_bytes, tokenizer.decode(ids).strip() == word


def script(word: str) -> str:
    """The script of most letters of a word, as Unicode's names begin: ARABIC, LATIN, CJK; OTHER without letters."""
    found = Counter(unicodedata.name(c, "OTHER").split()[0] for c in word if c.isalpha())
    return found.most_common(1)[0][0] if found else "OTHER"
