"""A full-duplex conversation as files: the user's audio, a dialogue to continue, and the speech and words of both sides.

The left channel is the agent, the right one the user. `UserFeed` feeds the user's codes to the model frame by frame.
evaluation/duplex_measures.py measures the result.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio.wav import load_wav, mix, save_wav
from families.family import family_of
from generation.turns import FREE
from options import read_json, write_text
from streams import StreamTable, delay
from text.normalisers import normalise
from text.tokenizers import Tokenizer
from text.word_times import (
    MAIN,
    Alignment,
    as_json,
    bounded_words,
    check_length,
    interleave,
    row_words,
    timed_transcript,
    timed_words,
    tokenise,
)

LOUDNESS = -24.0            # dB of full scale, root mean square, to which the voice of a role is brought
BEHIND = 3.5                # seconds of silence behind a recording for speech to text that does not say how late its words come
PAUSE = 2, 0                # the extra head and its class that tell that a speaker pauses


def user_rows(table: StreamTable) -> list[int]:
    """The audio rows that are only read; of a model that predicts both speakers, the second half, where what is heard replaces it."""
    return [k for k in table.audio if k not in table.audio_out] or table.audio[len(table.audio) // 2 :]


def behind(frames: Tensor, table: StreamTable) -> tuple[Tensor, Tensor | None]:
    """The prompt of frames (..., K, T) and the ids of the columns after it that their delayed rows fill, FREE elsewhere."""
    T = frames.shape[-1]
    columns = delay(frames, table.delays, table.column("start"), tail=FREE)
    return columns[..., : T + 1], columns[..., T + 1 :] if T and columns.shape[-1] > T + 1 else None


@dataclass
class Persona:
    """A voice and a role in front of a conversation: frames (K, P), and with a stored voice the inputs (n, D) of the first columns."""

    frames: Tensor
    inputs: Tensor | None = None

    def of_batch(self, items: int, skip_first_frame: bool = False) -> tuple[Tensor, Tensor | None]:
        """For all items, without the first frame as the official generator reads them (a stored voice was written by it).   (B, K, P)"""
        frames = self.frames[:, int(skip_first_frame and self.inputs is None) :]
        return frames.expand(items, -1, -1), None if self.inputs is None else self.inputs.expand(items, -1, -1)


def make_persona(role: str, voices: Sequence[str], codec: Any, tokenizer: Tokenizer, table: StreamTable) -> Persona | None:
    """The persona of a role and a voice, a recording or a file that came with the weights; None without either.

    ValueError for a model that takes none.
    """
    family, codes, inputs = family_of(table), torch.zeros(len(table.audio) // 2, 0, dtype=torch.long), None
    if not role.strip() and not voices:
        return None
    if family.persona is None:
        raise ValueError(f"a {family.name} model of this kind takes no role and no voice; leave them out")
    if len(voices) > 1:
        raise ValueError(f"{len(voices)} voices were given, a conversation takes one; leave the others out")
    for voice in voices:
        if family.stored_voice is not None and Path(voice).suffix == ".pt":
            codes, inputs = family.stored_voice(Path(voice), table)
        else:
            codes = voice_codes(voice, codec)
    frames = family.persona(torch.tensor(tokenizer.encode(family.role(role)), dtype=torch.long), codes, table)
    return Persona(frames, inputs)


@torch.inference_mode()
def voice_codes(path: str, codec: Any) -> Tensor:
    """Codes (Q, t) of the recording of a voice, as loud as voices are."""
    wav = load_wav(path, codec.sample_rate, max_seconds=60)[0]
    wav = wav * 10 ** (LOUDNESS / 20) / wav.square().mean().sqrt().clamp(min=1e-4)
    return codec.encode(wav.clamp(-1, 1)[None].to(next(iter(codec.buffers()), torch.zeros(0)).device))[0].cpu().clone()


def dialogue_prompt(path: str | Path, codec: Any, tokenizer: Tokenizer, table: StreamTable, data: Any) -> Tensor:
    """Frames (K, T) of a recorded dialogue to continue; left is the agent, whose words come from the .json beside it, if it exists."""
    wav, rate = load_wav(path, codec.sample_rate, 2)
    with torch.inference_mode():
        sides = codec.encode(wav[:, None]).clone().cpu()                          # (2, Q, T)
    beside, words = Path(path).with_suffix(".json"), list[Alignment]()
    if beside.is_file():
        try:
            words = row_words({"alignments": read_json(beside)})
            check_length(words, wav.shape[1] / rate)
        except ValueError as error:
            raise ValueError(str(error) if str(beside) in str(error) else f"{beside}: {error}; correct it or move it away") from None
    own = [(said, *rest) for word, *rest in words if rest[-1] == MAIN and (said := normalise(word, data.normaliser).strip())]
    tokens = tokenise(own, tokenizer, data.contextual, data.spaces)
    text = interleave(tokens, sides.shape[-1], codec.frame_rate, data.interleaver, table.pad, table.epad)
    held = table.column("start")[1 : table.lead].expand(-1, len(text))
    frames = torch.cat([text[None], held, *sides])
    if len(frames) != len(table):
        raise ValueError(f"two sides of {sides.shape[1]} codebooks are {2 * sides.shape[1]} rows, the model has {len(table.audio)}; "
                         + "only a model that reads one side and generates the other can continue a dialogue")
    return frames


def user_side(path: str, rate: int, dialogue: bool = True) -> Tensor:
    """The user's side of a recording (1, W): of a stereo file the right channel, as in a dialogue, or both."""
    wav = load_wav(path, rate, None)[0]
    if len(wav) > 1:
        print(f"{path} is stereo: {'its right channel is' if dialogue else 'both channels, mixed, are'} heard as the user")
    return wav[-1:] if dialogue else mix(wav)


def conversation_input(job: Any, codec: Any, tokenizer: Tokenizer, table: StreamTable,
                       data: Any) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The input of a conversation: frames (1, K, t) of the dialogue job.prompt or None; the user's codes (1, Q, T) from its
    beginning on, None if the model generates both sides; the user's wav (1, W): job.user, or job.seconds of silence."""
    wav = user_side(job.user, codec.sample_rate) if job.user else torch.zeros(1, round(job.seconds * codec.sample_rate))
    hop = round(codec.sample_rate / codec.frame_rate)
    if not table.audio_out:
        front, back = table.timing.around
        wav = torch.nn.functional.pad(wav, (front * hop, -wav.shape[1] % hop + back * hop if back else round(BEHIND * codec.sample_rate)))
    before, heard = dialogue_prompt(job.prompt, codec, tokenizer, table, data)[None] if job.prompt else None, user_rows(table)
    if not job.user and heard[0] in table.audio_out:
        return before, None, wav
    over = family_of(table).ends is not None and bool(job.user)
    still = -wav.shape[1] % hop + round(job.seconds * codec.frame_rate) * hop if over else 0
    with torch.inference_mode():
        codes = codec.encode(torch.nn.functional.pad(wav, (0, still))[None]).clone().cpu()
    if over:                                                    # a column of start ids says so, then there is silence
        T = -(-wav.shape[1] // hop)
        codes = torch.cat([codes[..., :T], table.column("start", heard)[None], codes[..., T:]], -1)
    return before, codes if before is None else torch.cat([before[:, heard], codes], -1), wav


@torch.inference_mode()
def pauses(model: Any, frames: Tensor, chunk: int = 256) -> list[float]:
    """How probable it is in each frame of (K, T) that the speaker pauses; [] where the model has no head for it."""
    head, kind = PAUSE
    if model.config.extra_heads <= head:
        return []
    table, device, found = model.table, model.text_head.weight.device, []
    grid = delay(frames, table.delays, table.column("start"))[None, :, :-1].to(device)
    cache, places = model.cache(1, grid.shape[2]), torch.arange(grid.shape[2], device=device)[None]
    for columns, at in zip(grid.split(chunk, -1), places.split(chunk, -1), strict=True):
        found.append(model.extra_odds(model.hidden(columns, at, cache=cache)[0])[0, head, :, kind].cpu())
    return torch.cat(found).tolist()


def write_reply(out: str | Path, frames: Tensor, user: Tensor | None, codec: Any, tokenizer: Tokenizer, table: StreamTable,
                paused: Sequence[float] = ()) -> str:
    """Write a conversation, frames (K, T), as a stereo wav: left the agent, right `user` (1, W) or the decoded user rows. Beside it:
    the words as .txt, and the text row with word alignments (Moshi's format) as .json. Returns a line about what was written.

    Of a recogniser the words have the times of the recording, and `paused` is what `pauses` says.
    """
    rows, text, rate, pads = table.audio, frames[0], codec.frame_rate, (table.pad, table.epad)
    sides = [table.audio_out[: codec.num_codebooks], [] if user is not None else rows[len(rows) // 2 :]]
    wavs = [codec.decode(frames[None, side].clamp(max=codec.codebook_size - 1))[0].cpu() for side in sides if side]
    wavs += [user] if user is not None else []
    length = max(wav.shape[1] for wav in wavs)
    wavs = [torch.nn.functional.pad(wav, (0, length - wav.shape[1])) for wav in wavs]
    if len(wavs) == 2:                                                           # a speech-to-text model has no audio to write
        save_wav(out, torch.cat(wavs), codec.sample_rate)
    late = table.timing.silence - min(0.0, table.timing.lead)
    words = bounded_words(text, tokenizer, rate, *pads, late) if late else timed_words(text, tokenizer, rate, *pads)
    row = {"alignments": as_json(words), "frame_rate": rate, "text": text.tolist(), "pads": list(pads)}
    row |= {"pauses": [round(p, 3) for p in paused]} if paused else {}
    for suffix, written in ((".txt", timed_transcript(text, tokenizer, rate, *pads, late)), (".json", json.dumps(row, ensure_ascii=False))):
        write_text(Path(out).with_suffix(suffix), written)
    seconds, txt = frames.shape[1] / rate, Path(out).with_suffix(".txt")
    return f"{out}: {seconds:.1f} s, left the model; its words are in {txt.name} beside it" if len(wavs) == 2 else f"{txt}: {seconds:.1f} s"


class UserFeed:
    """Fill the user's rows with codes (B, Q, T) while sampling, frame by frame; after their end the rows are -1.

    The codes are delayed by the function that lays out training grids. `skip_first_frame`: leave out the first frame as
    moshi's LMGen does, so that every other frame comes one frame earlier.
    """

    def __init__(self, user: Tensor, table: StreamTable, skip_first_frame: bool = False, column: int = 1) -> None:
        self.rows = user_rows(table)
        if user.shape[1] != len(self.rows):
            raise ValueError(f"the codec gives {user.shape[1]} codebooks, the model reads {len(self.rows)}; use the codec it was made for")
        delays = [table.delays[k] for k in self.rows]
        self.columns = delay(user[..., int(skip_first_frame) :], delays, table.column("start", self.rows), tail=-1)      # (B, Q, S)
        self.place = slice(self.rows[0], self.rows[-1] + 1)
        self.column = column                                                    # number of the column that comes next

    def ahead(self, n: int) -> Tensor:
        """The user's codes in the n-th column from now; the next column is 0.   -> (B, Q)"""
        return self.columns[..., min(self.column + n, self.columns.shape[-1] - 1)]

    def __call__(self, column: Tensor) -> Tensor:
        column[:, self.place] = self.ahead(0).to(column)
        self.column += 1
        return column
