"""Examples: the input of a layout function, made from an entry of an index, or from a text and a voice.

`build_example` makes training examples, `prompt_example` and `reply_example` make prompts. Next: data.py.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from audio.wav import resample
from corpus.cache import Index, encode
from corpus.checks import checked_reference
from corpus.data_config import DataConfig
from corpus.index import new_chat
from families.family import family_of
from streams import Example, StreamTable
from text.conversation import Segment
from text.normalisers import normalise
from text.tokenizers import Tokenizer, load_tokenizer
from text.word_times import text_weights

VOICE = 10.0                # seconds of a dialogue that stand for its agent's voice


def clip_example(index: Index, number: int, version: int, timed: bool) -> Example:
    """One variant of a clip, or a text without audio."""
    entry, text = index.entries[number], index.text(number)
    if not entry.key:
        return Example(text[0], name=entry.id)
    return Example(text[0], index.codes(number, version), text[1 + version] if timed else None, name=entry.id)


def joined_example(index: Index, number: int, versions: Sequence[int], timed: bool) -> Example:
    """A join of clips: codes concatenated (codec frames are local), word starts shifted by the frames before them."""
    entry = index.entries[number]
    clips = [clip_example(index, part, version, timed) for part, version in zip(entry.parts, versions, strict=True)]
    codes = torch.cat([clip.codes for clip in clips], dim=1)                    # (Q, T1) ... -> (Q, T)
    if not timed:
        return Example(index.text(number)[0], codes, name=entry.id)
    before = accumulate((clip.codes.shape[1] for clip in clips), initial=0)     # frames
    starts = torch.cat([clip.starts + frames for clip, frames in zip(clips, before, strict=False)])
    return Example(torch.cat([clip.text for clip in clips]), codes, starts, name=entry.id)


def build_example(index: Index, number: int, table: StreamTable, draw: random.Random | None = None, reference: int = -1) -> Example:
    """Example of an entry, with random variants from `draw`, else the unchanged clips. Its own reference wins over `reference`."""
    entry = index.entries[number]
    if index.chat is not None:
        return chat_example(index, number, draw, reference)
    if entry.chunk:
        prompt = persona_frames(index, entry.role, entry.reference if entry.reference >= 0 else reference, table)
        context = 0 if prompt is not None else max(table.delays) + 1 + abs(table.timing.frames)
        return replace(dialogue_example(index, number, draw_version(index, number, draw), context, table), prompt=prompt)
    versions = [draw_version(index, n, draw) for n in entry.parts or [number]]
    example = (joined_example(index, number, versions, table.timed) if entry.parts
               else clip_example(index, number, versions[0], table.timed))
    if index.info["duplex"] and example.codes is not None:
        example.codes, example.user = example.codes.chunk(2)                    # left is the agent, right the user
    reference = entry.reference if entry.reference >= 0 else reference
    if reference >= 0:
        example.reference = build_example(index, reference, table, draw)
    return example


def draw_version(index: Index, number: int, draw: random.Random | None) -> int:
    return draw.randrange(max(1, len(index.entries[number].frames))) if draw else 0


def dialogue_example(index: Index, number: int, version: int, context: int, table: StreamTable) -> Example:
    """A chunk of a dialogue, preceded by up to `context` frames of the chunk before: left agent, right user; or of one side."""
    entry = index.entries[number]
    n, chunks = entry.chunk
    T, at = entry.frames[version], sum(entry.frames[:version])
    begin, end = T * n // chunks, T * (n + 1) // chunks
    first = max(0, begin - context)
    sides = index.codes(number, version)[:, first:end]
    agent, user = sides.chunk(2) if index.info["duplex"] else (sides, None)
    rows = index.text(number - n)[:, at + first : at + end]             # all chunks share those of the first
    if table.timing.frames > 0 and n + 1 == chunks:                     # the text is over before its speech
        rows, agent = (torch.nn.functional.pad(t, (0, table.timing.frames), value=-1) for t in (rows, agent))
        rows[0, end - first :] = table.pad
    text = rows[0] if len(rows) == 1 else rows
    codes = {"codes": user, "user": agent} if entry.swapped else {"codes": agent, "user": user}
    conditions = torch.tensor(entry.conditions, dtype=torch.long) if entry.conditions else None
    weights = text_weights(text, *index.padding) if table.timing.lead <= 0 else torch.where(rows[-1] == table.epad, 1.0, index.padding[0])
    return Example(text, **codes, weights=weights, conditions=conditions, before=begin - first, name=entry.id)


def persona_frames(index: Index, role: Sequence[int], voice: int, table: StreamTable) -> Tensor | None:
    """The frames (K, P) of a role and of the voice of an entry (-1 = none) in front of a dialogue; None without either."""
    persona = family_of(table).persona
    if persona is None or not role and voice < 0:
        return None
    codes = voice_codes(index, voice, table) if voice >= 0 else torch.zeros(len(table.audio) // 2, 0, dtype=torch.long)
    return persona(torch.tensor(role, dtype=torch.long), codes, table)


def voice_codes(index: Index, number: int, table: StreamTable) -> Tensor:
    """Codes (Q, t) of a voice: a recording, or of a dialogue up to ten seconds from where the agent begins to speak."""
    entry = index.entries[number]
    if not entry.chunk:
        return index.codes(number, 0)
    example, (_, *pads) = dialogue_example(index, number, 0, 0, table), index.padding
    spoken = [t for t, token in enumerate(example.text.tolist()) if token >= 0 and token not in pads]
    first = spoken[0] if spoken else 0
    return example.codes[:, first : first + round(VOICE * index.info["frame_rate"])]


def chat_example(index: Index, number: int, draw: random.Random | None, reference: int) -> Example:
    """An entry as a conversation: its own messages, or the official clone prompt around its transcript and recording."""
    def codes(n: int) -> Tensor:
        return torch.cat([index.codes(part, draw_version(index, part, draw)) for part in index.entries[n].parts or [n]], dim=1)

    entry = index.entries[number]
    if entry.messages:
        return segments_example(index.chat.segments(entry.messages, [codes(n) for n in entry.clips], entry.start), entry.id)
    if index.chat.template.clone_prompt is None:
        return segments_example(index.chat.plain(entry.text), entry.id)
    own, reference = codes(number), entry.reference if entry.reference >= 0 else reference
    references = [(index.entries[reference].text, codes(reference))] if reference >= 0 else []
    return segments_example(index.chat.spoken(entry.text, own, references, entry.scene), entry.id)


def segments_example(segments: list[Segment], name: str) -> Example:
    return Example(torch.zeros(0, dtype=torch.long), segments=segments, name=name)


def prompt_example(text: str, config: DataConfig, tokenizer: Tokenizer, codec: Any = None, voices: Sequence[tuple[str, str]] = (),
                   table: StreamTable | None = None, before: Sequence[tuple[str, Tensor]] = (), reply: str = "") -> Example:
    """Build the prompt of a text and, for cloning, of `voices`: (wav file, its transcript), or ("", "profile:...").

    `table` decides between aligned rows, conversations and plain sequences; `before` are earlier turns of a conversation,
    pairs of text and codes. `reply` selects "text" or "speech" where a model has both.
    """
    timed, chat = table is not None and table.timed, new_chat(config, tokenizer, table)

    def ids(text: str) -> Tensor:
        words = normalise(text, config.normaliser)
        if not words.strip():
            raise ValueError(f"text {text!r} is empty under normaliser {config.normaliser}; give it words to say")
        if table is not None and (spell := family_of(table).spell):
            return torch.tensor(spell(words, tokenizer, table))
        return torch.tensor([i for part in (words.split() if timed else [words]) for i in tokenizer.encode(part)])

    example = Example(ids(text), name="prompt")
    nothing = torch.zeros(0, 0, dtype=torch.long)
    found = [(said, reference_codes(name, said, config, codec) if name else nothing) for name, said in voices]
    if chat is not None:
        return segments_example(chat.prompt(text, found, before=before, reply=reply), "prompt")
    most = 1 if table is None else family_of(table).references
    if len(voices) > most or any(not name for name, _ in voices):
        raise ValueError(f"{len(voices)} voices were given, a prompt of this model takes {most}; "
                         + ("give one recording as --ref" if most else "leave --ref out"))
    for said, codes in found:
        example.reference = Example(ids(said), codes, name=voices[0][0])
    return example


def spoken_prompt(index: Index, number: int, voice: int, config: DataConfig, table: StreamTable) -> Example:
    """The prompt for the text of an entry, in the voice of another entry (-1 = none)."""
    entry = index.entries[number]
    if index.chat is not None:
        voices = [(index.entries[voice].text, index.codes(voice, 0))] if voice >= 0 else []
        return segments_example(index.chat.prompt(entry.text, voices, entry.scene), entry.id)
    example = prompt_example(entry.text, config, load_tokenizer(config.tokenizer), table=table)
    example.reference = clip_example(index, voice, 0, table.timed) if voice >= 0 else None
    return example


def reply_example(messages: list[dict[str, Any]], codes: Sequence[Tensor], config: DataConfig, tokenizer: Tokenizer, table: StreamTable,
                  reply: str = "") -> Example:
    """Build the prompt of a reply to messages. `codes` (Q, T) of their recordings; `reply` "text", "speech", or "" = speech if possible."""
    chat = new_chat(config, tokenizer, table)
    if chat is None:
        raise ValueError(f"{family_of(table).name} has no chat template and cannot reply; use --text")
    return segments_example(chat.segments(messages, codes, reply=reply or ("speech" if chat.template.audio_out else "text")), "prompt")


def reference_codes(name: str, said: str, config: DataConfig, codec: Any) -> Tensor:
    """Codes (Q, T) of a reference recording; ValueError names its fault."""
    wav, rate = checked_reference(name, said, (config.min_seconds, config.max_seconds), config.doubtful)
    return encode(codec, resample(wav, rate, codec.sample_rate).clamp(-1, 1))


def show(tokens: Tensor, weights: Tensor, table: StreamTable, columns: int = 16) -> str:
    """The first columns of a grid (K, S) as text; `*` marks a target."""
    n = min(columns, tokens.shape[1])
    lines = []
    for k, stream in enumerate(table.streams):
        cells = [f"{tokens[k, s].item()}{'*' if weights[k, s] else ' '}".rjust(7) for s in range(n)]
        lines.append(f"{stream.name:<10}" + "".join(cells) + (" ..." if n < tokens.shape[1] else ""))
    return "\n".join(lines)
