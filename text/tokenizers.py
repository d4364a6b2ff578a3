"""Tokenizers: text <-> ids.

    load_tokenizer("assets/speech/words.json")           .encode, .decode, .size; also "bytes", .model, tokenizer.json
    TextStream(tokenizer).push(id)                       text while its ids arrive, each character once it is complete

Next: word_times.py.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from audio import hub
from options import locate, replace_file

MAX_TOKENIZER = 256 << 20   # bytes


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> ids 0..size-1. `content` is the file it was read from."""

    name: str
    size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    content: bytes = b""
    unknown: int = -1           # the id of the unknown token, -1 = none
    letters: Callable[[int], str] = lambda token: ""       # what a piece of text is an id, "" for marks and where nobody asks

    def save(self, folder: str | Path) -> str:
        """Write its file into a folder; returns the argument of load_tokenizer, relative to that folder."""
        if self.content:
            replace_file(Path(folder) / self.name, lambda temporary: Path(temporary).write_bytes(self.content))
        return self.name


def tokenizer_file(spec: str | Path, local: bool = False) -> Path:
    """The file that a tokenizer is read from: itself, the one in a folder or under a hub id (`local`: if it is cached)."""
    path = locate(spec)
    if hub.is_id(spec):
        try:
            path = hub.snapshot(str(spec), ["tokenizer*.json", "*.model", "config.json", "chat_template.jinja"], local)
        except FileNotFoundError:
            if not local:
                raise
    if path.is_dir() and (path / "config.json").is_file():
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if named := isinstance(about, dict) and about.get("tokenizer_name"):       # Moshi's config says it
            return path / Path(str(named)).name
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
        raise ValueError(f"tokenizer {path} has more than {MAX_TOKENIZER} bytes, too large for a tokenizer; check the path")
    content = path.read_bytes()
    try:
        if path.suffix == ".model":
            return sentencepiece(path.name, content)
        found = json.loads(content)
        if isinstance(found, list):
            return word_list(path.name, content, [str(word) for word in found])
        return tokenizer_json(path.name, content)
    except ImportError as error:
        raise ValueError(f"{path} needs the package {error.name}; pip install {error.name}") from None
    except BaseException as error:      # the libraries raise plain Exception for a broken file, or panic, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tokenizer {path} cannot be read ({error}); restore the file") from None


def sentencepiece(name: str, content: bytes) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor
    pieces = SentencePieceProcessor(model_proto=content)
    size, unknown = pieces.vocab_size(), pieces.unk_id()

    def decode(ids: Sequence[int]) -> str:                  # a model's head may have more ids: they are unknown here
        return pieces.decode([i if 0 <= i < size else unknown for i in ids])

    def letters(i: int) -> str:
        mark = i >= size or pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i) or pieces.id_to_piece(i).startswith("<")
        return "" if mark else pieces.id_to_piece(i)

    return Tokenizer(name, size, pieces.encode, decode, content, unknown, letters)


def tokenizer_json(name: str, content: bytes) -> Tokenizer:
    """A tokenizer.json of Hugging Face."""
    from tokenizers import Tokenizer as Fast
    found, about = Fast.from_str(content.decode()), json.loads(content).get("model") or {}
    found.no_truncation()               # what a trainer or a pipeline left in the file: every text is whole here
    found.no_padding()
    unknown = found.token_to_id(about["unk_token"]) if about.get("unk_token") else about.get("unk_id")
    return Tokenizer(name, found.get_vocab_size(), lambda text: found.encode(text, add_special_tokens=False).ids,
                     lambda ids: found.decode(list(ids)), content, -1 if unknown is None else unknown)


def word_list(name: str, content: bytes, words: list[str]) -> Tokenizer:
    """Whole words as ids 1..n; 0 is "no word"."""
    ids = {word: i for i, word in enumerate(words, 1)}

    def encode(text: str) -> list[int]:
        for word in text.split():
            if word not in ids:
                near = get_close_matches(word, words, 1, 0.0)
                raise ValueError(f"word {word!r} is not in {name}; the nearest known word is {(near or ['none'])[0]!r}")
        return [ids[word] for word in text.split()]

    return Tokenizer(name, len(words) + 1, encode, lambda found: " ".join(words[i - 1] for i in found if 0 < i <= len(words)), content)


class TextStream:
    """Streaming decoder: `push` returns the new text once its bytes are whole characters, `flush` the rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode, self.ids = tokenizer.decode, list[int]()
        self.begin = self.emitted = 0       # ids before `emitted` are decoded; those from `begin` on are decoded again with the next

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self.rest(whole=True)

    def flush(self) -> str:
        return self.rest(whole=False)

    def rest(self, whole: bool) -> str:
        before, now = self.decode(self.ids[self.begin : self.emitted]), self.decode(self.ids[self.begin :])
        if len(now) <= len(before) or (whole and now.endswith("\ufffd")):       # the character is not complete yet
            return ""
        self.begin, self.emitted = self.emitted, len(self.ids)
        return now[len(before) :]
