"""A reply piece by piece, while it is generated.

    for kind, piece in reply_pieces(generate(model, prompt, config), model.table, tokenizer): ...
        "text"    a str, as soon as its bytes are whole characters
        "codes"   (Q, n) codes of its speech, five frames at a time
        "cut"     "" when max_frames ended it, not the model
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from audio.wav import WavWriter
from options import visible
from streams import StreamTable
from text.tokenizers import TextStream, Tokenizer

CHUNK = 5                                                   # frames


def reply_pieces(frames: Iterable[Tensor], table: StreamTable, tokenizer: Tokenizer) -> Iterator[tuple[str, str | Tensor]]:
    """What the first item of a batch says, out of the frames (B, K) that `generate` yields."""
    words, held, last = TextStream(tokenizer), list[Tensor](), -1
    steering = {*table.stop, table.audio_start, table.audio_end}
    for frame in frames:
        column = frame[0].cpu()
        codes, last = column[table.codes_out], int(column[0])
        if table.codes_out and bool((codes >= 0).all()):
            held.append(codes)
        if held and (len(held) == CHUNK or last >= 0):
            yield "codes", torch.stack(held, 1)
            held = []
        if last >= 0 and last not in steering and not (table.flat and last >= table.flat[0]) and (said := words.push(last)):
            yield "text", said
    if held:
        yield "codes", torch.stack(held, 1)
    if rest := words.flush():
        yield "text", rest
    if last not in table.stop:
        yield "cut", ""


def print_reply(frames: Iterable[Tensor], table: StreamTable, tokenizer: Tokenizer, out: str = "", codec: Any = None) -> None:
    """Give a reply as it comes: text is printed, speech written into the wav file `out`, a few frames at a time."""
    decoder, spoken = codec and codec.stream(), 0
    with WavWriter(out, codec.sample_rate) if out else nullcontext() as writer:
        for kind, piece in reply_pieces(frames, table, tokenizer):
            if kind == "codes" and writer:
                writer.append(decoder.decode(piece[None].clamp(max=codec.codebook_size - 1))[0])
                spoken += piece.shape[1]
            elif kind != "codes":
                print(visible(piece, "\n\t") if kind == "text" else " (cut at --max_frames)", end="", flush=True)
        if spoken:
            writer.append(decoder.flush()[0])
    print(f"{out}: {spoken / codec.frame_rate:.1f} s" if out else "")
