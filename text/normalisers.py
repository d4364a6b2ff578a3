"""Versioned text normalisers, applied before tokenization.

    normalise("Dial 49!", "english-v1")                  "dial four nine"; several are joined: "arabic-v1+higgs-v1"

The meaning of a name never changes, because checkpoints and caches store it. Next: tokenizers.py.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

DIGITS = "zero one two three four five six seven eight nine".split()
ARABIC = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹،؛؟٪٫٬۔«»", "01234567890123456789,;?%.,.\"\"", "\u0640")


def english(text: str) -> str:
    """Lower-case words without punctuation, apostrophes inside words kept, digits spelled one by one."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = re.sub(r"\d", lambda d: f" {DIGITS[int(d[0])]} ", text)
    return re.sub(r"[^\w\s']|_|(?<!\w)'|'(?!\w)", " ", text)


def arabic(text: str) -> str:
    """Fold presentation forms, drop tatweel and bidi or zero-width marks, map digits and punctuation. Letters and
    diacritics stay as they are written."""
    text = re.sub("[\ufb50-\ufdff\ufe70-\ufefc]+", lambda form: unicodedata.normalize("NFKC", form[0]), text)
    text = re.sub("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]", "", text)
    return unicodedata.normalize("NFC", text).translate(ARABIC)


PLAIN_SIGNS = (str.maketrans("。：；？！（）()【】《》“”‘’、—·「」『』", ".:;?!    []<>\"\"'',-.\"\"\"\"")
               | str.maketrans({"，": ", ", "…": "..."}))
SOUND_TAGS = {
    "°F": " degrees Fahrenheit", "°C": " degrees Celsius", "[laugh]": "<SE>[Laughter]</SE>", "[music]": "<SE>[Music]</SE>",
    "[applause]": "<SE>[Applause]</SE>", "[cheering]": "<SE>[Cheering]</SE>", "[cough]": "<SE>[Cough]</SE>",
    "[humming start]": "<SE_s>[Humming]</SE_s>", "[humming end]": "<SE_e>[Humming]</SE_e>",
    "[music start]": "<SE_s>[Music]</SE_s>", "[music end]": "<SE_e>[Music]</SE_e>",
    "[sing start]": "<SE_s>[Singing]</SE_s>", "[sing end]": "<SE_e>[Singing]</SE_e>"}


def script(text: str) -> str:
    """What the official Higgs example does to a transcript: plain punctuation, tags of sound events, a full stop at the end."""
    text = text.translate(PLAIN_SIGNS)
    for tag, words in SOUND_TAGS.items():
        text = text.replace(tag, words)
    text = folded(text)
    return text if not text or text.endswith((".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>")) else text + "."


def folded(text: str) -> str:
    """Single spaces within lines, and no empty line."""
    return "\n".join(line for line in (" ".join(part.split()) for part in text.split("\n")) if line)


SOUNDS = ("<SE>", "</SE>", "<SE_s>", "</SE_s>", "<SE_e>", "</SE_e>")                # the tags that `script` writes


@dataclass(frozen=True)
class Normaliser:
    """A rewriting of texts. Checkpoints and caches store its name, so a change needs a new name."""

    rewrite: Callable[[str], str]
    lines: bool = False                 # keeps line breaks
    marks: tuple[str, ...] = ()         # special tokens that it inserts


NORMALISERS = {"none": Normaliser(str), "english-v1": Normaliser(english), "arabic-v1": Normaliser(arabic),
               "higgs-v1": Normaliser(script, True, SOUNDS)}


def check_normaliser(names: str) -> None:
    """ValueError when one of the names joined by "+" is unknown."""
    for name in names.split("+"):
        if name not in NORMALISERS:
            raise ValueError(f"normaliser {name!r} is unknown; choose one of {', '.join(NORMALISERS)}, or several joined by +")


def normalise(text: str, names: str) -> str:
    """Apply normalisers, "arabic-v1" or "arabic-v1+higgs-v1", and fold white space.

    "none" changes nothing. Line breaks are kept by normalisers whose lines may begin with [SPEAKERn].
    """
    check_normaliser(names)
    if names == "none":
        return text
    chosen = [NORMALISERS[name] for name in names.split("+")]
    for normaliser in chosen:
        text = normaliser.rewrite(text)
    return folded(text) if any(normaliser.lines for normaliser in chosen) else " ".join(text.split())


def marks_of(names: str) -> tuple[str, ...]:
    """The special tokens that normalisers insert; the tokenizer must have them."""
    return tuple(mark for name in names.split("+") for mark in NORMALISERS[name].marks)
