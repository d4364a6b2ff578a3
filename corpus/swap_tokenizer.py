"""Replace the tokenizer of a model, for a new language or a smaller embedding table.

    python checkpoint.py swap-tokenizer out/moshi --tokenizer=japanese.model --out=out/japanese

    rows of   embed.text, depth.text, text_head       ids of the old tokenizer            ->  ids of the new one
    a piece that both know, "▁the" or a byte          keeps its row, whichever file format it comes from
    a new piece                                       gets a random row N(mean, 1e-5 cov) of the old rows
    ids above the tokenizer's                         the model's own (Moshi's initial token), stay above it
    Moshi's PAD and EPAD                              keep ids 3 and 0 where these are special pieces, or get two new ids at the end

Pieces are compared as the bytes they stand for, so SentencePiece and tokenizer.json files can replace each other. The draw
is J-Moshi's, which applies it to all embeddings and leaves the head as it was; here the head follows. Next: checkpoint.py.
"""

import json
import re
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from families.family import family_of
from text.tokenizers import Tokenizer

SPREAD = 1e-5                   # of the covariance of the old rows
TABLES = ("embed.text.weight", "depth.text.weight", "text_head.weight")
Key = tuple[str, bytes]         # of a piece: ("text", its bytes), ("byte", one byte) or ("special", its name)


# ---- pieces ----

def piece_keys(tokenizer: Tokenizer) -> list[Key]:
    """The key of every id, comparable between tokenizer formats."""
    if tokenizer.name.endswith(".model"):
        return sentencepiece_keys(tokenizer.content)
    if not tokenizer.content:
        return [("text", bytes([i])) for i in range(tokenizer.size)]         # "bytes"
    found = json.loads(tokenizer.content)
    if isinstance(found, list):
        return [("special", b"no word"), *(("text", f" {word}".encode()) for word in found)]
    return fast_keys(tokenizer, found)


def sentencepiece_keys(content: bytes) -> list[Key]:
    from sentencepiece import SentencePieceProcessor
    pieces = SentencePieceProcessor(model_proto=content)
    special = {i for i in range(pieces.vocab_size()) if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i)}
    return [special_key(pieces.id_to_piece(i)) if i in special else text_key(pieces.id_to_piece(i)) for i in range(pieces.vocab_size())]


def fast_keys(tokenizer: Tokenizer, found: dict[str, Any]) -> list[Key]:
    from tokenizers import Tokenizer as Fast
    names = {i: name for name, i in Fast.from_str(tokenizer.content.decode()).get_vocab(with_added_tokens=True).items()}
    special = {item["id"] for item in found.get("added_tokens", []) if item.get("special")}
    read = byte_level_key if '"ByteLevel"' in json.dumps([found.get("pre_tokenizer"), found.get("decoder")]) else text_key
    return [read(names[i]) if i in names and i not in special else special_key(names.get(i, f"no piece {i}"))
            for i in range(tokenizer.size)]


def special_key(piece: str) -> Key:
    return "special", piece.encode()


def text_key(piece: str) -> Key:
    """A piece with ▁ for a space, or one byte written <0xE3>."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return ("byte", bytes([int(byte[1], 16)])) if byte else ("text", piece.replace("\u2581", " ").encode())


def byte_level_key(piece: str) -> Key:
    """A piece in which every byte is a visible letter (GPT-2's way); an added token is written as it reads."""
    letters = byte_level_alphabet()
    return "text", bytes(letters[c] for c in piece) if all(c in letters for c in piece) else piece.encode()


def match_pieces(before: list[Key], after: list[Key]) -> list[int]:
    """The old id of every new piece, -1 for one that is new. A letter of one byte may stand for that byte, and the reverse."""
    known = {key: i for i, key in reversed([*enumerate(before)])}
    other = {"text": "byte", "byte": "text", "special": "special"}
    return [known.get((kind, what), known.get((other[kind], what), -1)) for kind, what in after]


@cache
def byte_level_alphabet() -> dict[str, int]:
    """The byte of each letter by which byte-level BPE writes one (GPT-2): printable ones stand for themselves."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(moved)}


# ---- rows ----

def swap_tokenizer(config: Any, weights: dict[str, Tensor], old: Tokenizer, new: Tokenizer,
                   seed: int = 0) -> tuple[Any, dict[str, Tensor], int]:
    """ModelConfig and tensors for the ids of `new`, and how many pieces kept their rows.

    ValueError when the model's text rows are not those of a tokenizer, or a control token has no piece in `new`.
    """
    table = config.table
    rows = table.text[: family_of(table).token_rows]
    sizes = {table.streams[k].vocab for k in rows}
    if config.fusion is not None or config.demux or len(sizes) != 1 or min(sizes) < old.size:
        raise ValueError(f"text rows of {sorted(sizes)} ids are not those of {old.name} with {old.size}; name it with --from, "
                         + "and a model with a text tower keeps that tower's tokenizer")
    before, after = piece_keys(old), piece_keys(new)
    source = match_pieces(before, after)
    padding = {}
    if table.monologue:
        free = all(i < len(after) and after[i][0] == "special" for i in (table.pad, table.epad))
        padding = {"pad": table.pad if free else len(after), "epad": table.epad if free else len(after) + (table.pad != table.epad)}
        source += [-1] * (0 if free else 1 + (table.pad != table.epad))
        source[padding["pad"]], source[padding["epad"]] = table.pad, table.epad
    moved = len(source) - old.size                                                  # ids behind the tokenizer's shift by this

    def new_id(i: int) -> int:
        """The id of a control token (start, end, stop) under the new tokenizer."""
        if i < 0 or i >= old.size:
            return i if i < 0 else i + moved
        if i not in source:
            name = before[i][1].decode(errors="replace")
            raise ValueError(f"{new.name} has no piece {name!r}, which the model uses as a control token (id {i}); "
                             + "add it as a special token")
        return source.index(i)

    source += range(old.size, sizes.pop())
    streams = list(table.streams)
    for k in rows:
        s = streams[k]
        streams[k] = replace(s, vocab=len(source), classes=s.classes and s.classes + moved, start=new_id(s.start), end=new_id(s.end))
    steering = {name: new_id(getattr(table, name)) for name in ("audio_start", "audio_end")}
    first, Q, V = table.flat or (-1, 0, 0)
    if table.flat and new_id(first + Q * V - 1) - new_id(first) != Q * V - 1:
        raise ValueError(f"{new.name} does not keep the ids of the codes together; add them as special tokens, one behind the other")
    flat = (new_id(first), Q, V) if table.flat else ()
    table = replace(table, streams=tuple(streams), stop=tuple(map(new_id, table.stop)), flat=flat, **steering, **padding)
    generator = torch.Generator().manual_seed(seed)
    changed = {name: resize(name, weights[name], source, old.size, config.table, table, generator) for name in TABLES if name in weights}
    return replace(config, table=table), weights | changed, sum(0 <= i < old.size for i in source)


def resize(name: str, tensor: Tensor, source: list[int], size: int, old: Any, new: Any, generator: torch.Generator) -> Tensor:
    """The rows of a tensor under the new ids; of a stack of tables, those of each row that was changed."""
    if name == "text_head.weight":
        k = new.text_out[0]
        return gather_rows(tensor, source[: new.streams[k].classes], size, generator) if old.streams[k] != new.streams[k] else tensor
    rows = old.text if name.startswith("embed") else old.text[:1]
    tables = tensor.split([old.streams[k].vocab for k in rows])
    return torch.cat([gather_rows(t, source, size, generator) if old.streams[k] != new.streams[k] else t
                      for k, t in zip(rows, tables, strict=True)])


def gather_rows(rows: Tensor, source: list[int], size: int, generator: torch.Generator) -> Tensor:
    """Rows by number; those numbered -1 are drawn around the mean of the first `size`, N(mean, SPREAD cov).   (V, D) -> (V', D)"""
    known = rows[:size].float()
    mean = known.mean(0)
    values, vectors = torch.linalg.eigh((known - mean).T.cov() * SPREAD)
    at = torch.tensor(source)
    fresh = torch.randn(int((at < 0).sum()), rows.shape[1], generator=generator) * values.clamp(min=0).sqrt() @ vectors.T + mean
    out = rows[at.clamp(min=0)].clone()
    out[at < 0] = fresh.to(rows.dtype)
    return out
