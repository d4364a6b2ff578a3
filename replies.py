"""Dialogues that take turns (Qwen, MOSS-Speech): a reply piece by piece, a speech model out of a text model, bundled calls.

    for kind, piece in pieces(generate(model, prompt, config), model.table, tokenizer): ...
        "text"    a str, as soon as its bytes are whole characters
        "codes"   (Q, n) codes of its speech, five frames at a time: what the decoder of MOSS-Speech takes at once
        "cut"     "" when max_frames ended it, not the model

MOSS-Speech is a text model whose last layers exist twice (arXiv:2510.00499). `split_tails` makes one: the layers before
them are shared, text logits stay what they were. Used by sample.py and checkpoint.py; duplex.py is the other way to talk.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from architectures import ModelConfig, codebooks
from audio.wav import WavWriter, load_wav, save_wav
from options import read_rows, write_rows
from streams import StreamTable
from text import TextStream, Tokenizer

CHUNK = 5                                                   # frames
ASSETS = Path(__file__).resolve().parent / "assets" / "speech"


# ---- a reply, piece by piece ----

def pieces(frames: Iterable[Tensor], table: StreamTable, tokenizer: Tokenizer, chunk: int = CHUNK) -> Iterator[tuple[str, str | Tensor]]:
    """What the first item of a batch says, out of the frames (B, K) that `generate` yields."""
    words, held, last = TextStream(tokenizer), list[Tensor](), -1
    steering = {*table.stop, table.audio_start, table.audio_end}
    for frame in frames:
        column = frame[0].cpu()
        codes, last = column[table.audio_out], int(column[0])
        if table.audio_out and bool((codes >= 0).all()):
            held.append(codes)
        if held and (len(held) == chunk or last >= 0):
            yield "codes", torch.stack(held, 1)
            held = []
        if last >= 0 and last not in steering and (said := words.push(last)):
            yield "text", said
    if held:
        yield "codes", torch.stack(held, 1)
    if rest := words.flush():
        yield "text", rest
    if last not in table.stop:
        yield "cut", ""


def tell(frames: Iterable[Tensor], table: StreamTable, tokenizer: Tokenizer, out: str = "", codec: Any = None) -> None:
    """Give a reply as it comes: text is printed, speech written into the wav file `out`, a few frames at a time."""
    decoder, spoken = codec and codec.stream(), 0
    with WavWriter(out, codec.sample_rate) if out else nullcontext() as writer:
        for kind, piece in pieces(frames, table, tokenizer):
            if kind == "codes" and writer:
                writer.append(decoder.decode(piece[None].clamp(max=codec.codebook_size - 1))[0])
                spoken += piece.shape[1]
            elif kind != "codes":
                print(piece if kind == "text" else " (cut at --max_frames)", end="", flush=True)
        if spoken:
            writer.append(decoder.flush()[0])
    print(f"{out}: {spoken / codec.frame_rate:.1f} s" if out else "")


# ---- a speech model out of a text model ----

def split_tails(config: ModelConfig, weights: dict[str, Tensor], tail: int, codes: int, audio_start: int,
                words: int = 0, seed: int = 0) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Make of a text model one whose last `tail` layers exist for text and for audio, as MOSS-Speech was made of Qwen3-8B.

    ModelConfig and tensors in, both out. `codes` is the size of the codec's table, its end id comes behind; `words` keeps
    so many text ids (0 = all); a tied head becomes a copy. Audio embedding and head are N(0, 0.02); text logits are unchanged.
    """
    text, shared = config.table.streams[0], config.temporal.layers - tail
    words, rows = words or text.vocab, -(-(codes + 1) // 128) * 128
    if config.table.audio or config.depth or config.tail or len(config.table.streams) > 1:
        raise ValueError("only a text model can be split, this one has audio rows; give a Qwen2 or Qwen3 checkpoint")
    if tail < 1 or shared < 1:
        raise ValueError(f"--tail={tail} does not fit {config.temporal.layers} layers; give 1 to {config.temporal.layers - 1}")
    if not 0 <= audio_start < words <= text.vocab or codes < 1:
        raise ValueError(f"id {audio_start} that opens speech must lie below {words} kept text ids, of {text.vocab} in the model, "
                         + "and --codes above 0; give --tokenizer, or other --words")
    stop = tuple(i for i in config.table.stop if i < words)
    table = StreamTable((replace(text, vocab=words, classes=words), *codebooks(1, rows, rows, -1, codes)), "moss",
                        audio_start=audio_start, stop=stop)
    made = {"embed.text.weight": weights["embed.text.weight"][:words],
            "text_head.weight": weights["embed.text.weight" if config.tied else "text_head.weight"][:words]}
    for name, tensor in weights.items():
        if name.startswith("temporal.layers."):
            number, rest = name.removeprefix("temporal.layers.").split(".", 1)
            own = int(number) - shared
            made |= {name: tensor} if own < 0 else {f"temporal.{side}_tail.{own}.{rest}": tensor for side in ("text", "audio")}
    made |= {f"temporal.{side}_norm.weight": weights["temporal.norm.weight"] for side in ("text", "audio")}
    draw = torch.Generator().manual_seed(seed)
    for name in ("embed.audio.weight", "audio_head.weight"):
        made[name] = 0.02 * torch.randn(rows, config.temporal.dim, generator=draw)
    return replace(config, table=table, temporal=replace(config.temporal, layers=shared), tail=tail, tied=False), made


# ---- bundled calls ----

def demo_calls(folder: str | Path, count: int = 40) -> str:
    """Make small calls of the bundled clips, once: a synthetic caller reads a number, Allison says it back.

    Speech and text alternate on both sides, all four ways; a fifth is held out. Returns the path of the manifest.
    """
    folder = Path(folder)
    if (folder / "calls.jsonl").is_file():
        return str(folder / "calls.jsonl")
    rows = {r["id"]: r for r in (row for _, row in read_rows(ASSETS / "manifest.jsonl", "clip"))}
    digits = {who: {r["text"]: r for r in rows.values() if (r["speaker"], r.get("group")) == (who, "digits")} for who in ("allison", "slt")}
    opening = next(r for r in rows.values() if r["speaker"] == "allison" and r["text"] == "the number i have is")
    names = sorted(digits["allison"].keys() & digits["slt"].keys())
    folder.mkdir(parents=True, exist_ok=True)
    calls = []
    for n in range(count):
        number = [names[(7 * n + 3 * k * (n // 10 + 1)) % len(names)] for k in range(2 + n % 2)]
        sides = {"user": [digits["slt"][name] for name in number], "assistant": [opening, *(digits["allison"][name] for name in number)]}
        messages = []
        for place, (role, clips) in enumerate(sides.items()):
            said = " ".join(clip["text"] for clip in clips)
            if n >> place & 1 and n % 8 > 3:                # half the calls are spoken on both sides
                messages.append({"role": role, "content": said})
                continue
            name = f"{n:03d}-{role}.wav"
            wavs = [load_wav(ASSETS / clip["audio"], 16_000) for clip in clips]
            save_wav(folder / name, torch.cat([wav for wav, _ in wavs], dim=1), 16_000)
            messages.append({"role": role, "content": [{"type": "audio", "audio_url": name, "text": said}]})
        calls.append({"id": f"call/{n}", "split": "test" if n % 5 == 4 else "train", "messages": messages})
    write_rows(folder / "calls.jsonl", calls)
    return str(folder / "calls.jsonl")
