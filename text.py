"""Text: versioned normalisers, tokenizers, and when each token is said.

    normalise("Dial 49!", "english-v1")                  "dial four nine"; several are joined: "arabic-v1+higgs-v1"
    load_tokenizer("assets/speech/words.json")           .encode, .decode, .size; also "bytes", .model, tokenizer.json
    aligned_ids(row, seconds, tokenizer, "english-v1")   ids, and the second at which each begins
    frame_starts(seconds, 25, ...)                       the codec frame of each

What a normaliser's name means never changes: checkpoints and caches hold on to it. Next: cache.py.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from audio import hub
from options import replace_file

MAX_TOKENIZER = 256 << 20   # bytes
DIGITS = "zero one two three four five six seven eight nine".split()
ARABIC = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹،؛؟٪٫٬۔«»", "01234567890123456789,;?%.,.\"\"", "\u0640")


# ---- normalisers ----

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


HIGGS_SIGNS = (str.maketrans("。：；？！（）()【】《》“”‘’、—·「」『』", ".:;?!    []<>\"\"'',-.\"\"\"\"")
               | str.maketrans({"，": ", ", "…": "..."}))
HIGGS_TAGS = {
    "°F": " degrees Fahrenheit", "°C": " degrees Celsius", "[laugh]": "<SE>[Laughter]</SE>", "[music]": "<SE>[Music]</SE>",
    "[applause]": "<SE>[Applause]</SE>", "[cheering]": "<SE>[Cheering]</SE>", "[cough]": "<SE>[Cough]</SE>",
    "[humming start]": "<SE_s>[Humming]</SE_s>", "[humming end]": "<SE_e>[Humming]</SE_e>",
    "[music start]": "<SE_s>[Music]</SE_s>", "[music end]": "<SE_e>[Music]</SE_e>",
    "[sing start]": "<SE_s>[Singing]</SE_s>", "[sing end]": "<SE_e>[Singing]</SE_e>"}


def higgs(text: str) -> str:
    """What the official Higgs example does to a transcript: plain punctuation, tags of sound events, a full stop at the end."""
    text = text.translate(HIGGS_SIGNS)
    for tag, words in HIGGS_TAGS.items():
        text = text.replace(tag, words)
    text = folded(text)
    return text if not text or text.endswith((".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>")) else text + "."


def folded(text: str) -> str:
    """Single spaces within lines, and no empty line."""
    return "\n".join(line for line in (" ".join(part.split()) for part in text.split("\n")) if line)


NORMALISERS: dict[str, Callable[[str], str]] = {"none": str, "english-v1": english, "arabic-v1": arabic, "higgs-v1": higgs}


def check_normaliser(names: str) -> None:
    """ValueError when one of the names joined by "+" is unknown."""
    for name in names.split("+"):
        if name not in NORMALISERS:
            raise ValueError(f"normaliser {name!r} is unknown; choose one of {', '.join(NORMALISERS)}, or several joined by +")


def normalise(text: str, names: str) -> str:
    """Apply normalisers, "arabic-v1" or "arabic-v1+higgs-v1", and fold white space.

    "none" leaves all as it is. Lines stay apart under "higgs-v1", where a line may begin with its [SPEAKERn].
    """
    check_normaliser(names)
    if names == "none":
        return text
    for name in names.split("+"):
        text = NORMALISERS[name](text)
    return folded(text) if "higgs-v1" in names.split("+") else " ".join(text.split())


# ---- tokenizers ----

@dataclass(frozen=True)
class Tokenizer:
    """Text <-> ids 0..size-1. `content` is the file it was read from."""

    name: str
    size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    content: bytes = b""
    unknown: int = -1           # the id of what it does not have, -1 = it has everything

    def save(self, folder: str | Path) -> str:
        """Write its file into a folder; returns what load_tokenizer wants, relative to that folder."""
        if self.content:
            replace_file(Path(folder) / self.name, lambda temporary: Path(temporary).write_bytes(self.content))
        return self.name


def tokenizer_file(spec: str | Path, local: bool = False) -> Path:
    """The file that a tokenizer is read from: itself, the one in a folder or under a hub id (`local`: if it is cached)."""
    path = Path(spec)
    if hub.is_id(spec):
        try:
            path = hub.snapshot(str(spec), ["tokenizer.json", "*.model"], local)
        except FileNotFoundError:
            if not local:
                raise
    pieces = sorted(path.glob("*.model")) if path.is_dir() and not (path / "tokenizer.json").is_file() else []
    return pieces[0] if len(pieces) == 1 else path / "tokenizer.json" if path.is_dir() else path


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load "bytes", a word list (.json), a SentencePiece .model or a tokenizer.json, a folder with one of them, or a hub id."""
    if str(spec) == "bytes":
        return Tokenizer("bytes", 256, lambda text: list(text.encode()),
                         lambda ids: bytes(i for i in ids if 0 <= i < 256).decode(errors="replace"))
    path = tokenizer_file(spec)
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {spec} does not exist; give \"bytes\", a word list .json, .model, tokenizer.json or hub id")
    if path.stat().st_size > MAX_TOKENIZER:
        raise ValueError(f"tokenizer {path} has more than {MAX_TOKENIZER} bytes; check that it is one")
    content = path.read_bytes()
    try:
        if path.suffix == ".model":
            return sentencepiece(path.name, content)
        found = json.loads(content)
        return word_list(path.name, content, [str(word) for word in found]) if isinstance(found, list) else fast(path.name, content)
    except ImportError as error:
        raise ValueError(f"{path} needs the package {error.name}; pip install {error.name}") from None
    except Exception as error:      # the libraries raise bare Exception and RuntimeError on a broken file
        raise ValueError(f"tokenizer {path} cannot be read ({error}); restore the file") from None


def sentencepiece(name: str, content: bytes) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor
    pieces = SentencePieceProcessor(model_proto=content)
    return Tokenizer(name, pieces.vocab_size(), pieces.encode, lambda ids: pieces.decode(list(ids)), content, pieces.unk_id())


def fast(name: str, content: bytes) -> Tokenizer:
    """A tokenizer.json of Hugging Face."""
    from tokenizers import Tokenizer as Fast
    found, about = Fast.from_str(content.decode()), json.loads(content).get("model") or {}
    unknown = found.token_to_id(about["unk_token"]) if about.get("unk_token") else about.get("unk_id")
    return Tokenizer(name, found.get_vocab_size(), lambda text: found.encode(text, add_special_tokens=False).ids,
                     lambda ids: found.decode(list(ids)), content, -1 if unknown is None else unknown)


def word_list(name: str, content: bytes, words: list[str]) -> Tokenizer:
    """Whole words as ids 1..n; 0 stays free for "no word"."""
    ids = {word: i for i, word in enumerate(words, 1)}

    def encode(text: str) -> list[int]:
        for word in text.split():
            if word not in ids:
                near = get_close_matches(word, words, 1, 0.0)
                raise ValueError(f"word {word!r} is not in {name}; the nearest known word is {(near or ['none'])[0]!r}")
        return [ids[word] for word in text.split()]

    return Tokenizer(name, len(words) + 1, encode, lambda found: " ".join(words[i - 1] for i in found if 0 < i <= len(words)), content)


class TextStream:
    """Spell ids as they come: `push` gives what is new as soon as its bytes are whole characters, `flush` the rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode, self.ids = tokenizer.decode, list[int]()
        self.begin = self.told = 0          # ids before `told` are spelled; those from `begin` on are spelled again with the next

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self.rest(whole=True)

    def flush(self) -> str:
        return self.rest(whole=False)

    def rest(self, whole: bool) -> str:
        before, now = self.decode(self.ids[self.begin : self.told]), self.decode(self.ids[self.begin :])
        if len(now) <= len(before) or (whole and now.endswith("\ufffd")):       # bytes of a character are still to come
            return ""
        self.begin, self.told = self.told, len(self.ids)
        return now[len(before) :]


# ---- when words are said ----

def spread(words: Sequence[str], start: float, end: float) -> list[tuple[str, float]]:
    """Share a span of seconds among words in proportion to their letters."""
    total, place, out = sum(map(len, words)), 0, []
    for word in words:
        out.append((word, start + (end - start) * place / total))
        place += len(word)
    return out


def aligned_ids(row: dict[str, Any], seconds: float, tokenizer: Tokenizer, normaliser: str) -> tuple[list[int], list[float]]:
    """Ids of a row word by word, and the second at which each word begins; rows without word times share by letters."""
    given = row.get("words") or spread(row["text"].split(), 0.0, seconds)
    ends = [start for _, start in given[1:]] + [seconds]
    words = [pair for (word, start), end in zip(given, ends, strict=True)
             for pair in spread(normalise(word, normaliser).split(), start, end)]
    pairs = [(i, start) for word, start in words for i in tokenizer.encode(word)]
    return [i for i, _ in pairs], [start for _, start in pairs]


def frame_starts(times: Sequence[float], frame_rate: float, speed: float, shift: float, frames: int) -> list[int]:
    """Seconds -> first frame of each token: the first at 0, strictly increasing, the last before `frames`."""
    if len(times) > frames:
        raise ValueError(f"{len(times)} text tokens in {frames} frames")
    starts = [round(t * frame_rate / speed + shift) if i else 0 for i, t in enumerate(times)]
    for i in range(1, len(starts)):
        starts[i] = max(starts[i], starts[i - 1] + 1)
    return [min(s, frames - len(starts) + i) for i, s in enumerate(starts)]
