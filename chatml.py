"""Conversations: messages -> segments of text ids and codes, in the words Higgs Audio v2 was trained on.

    system     Generate audio following instruction.  <|scene_desc_start|> A quiet room. <|scene_desc_end|>
    user       what the reference recording says
    assistant  <|audio_out_bos|> its codes <|audio_eos|>                    read: weight 0
    user       what is to be said
    assistant  <|audio_out_bos|> codes <|audio_eos|> <|eot_id|>             trained; a prompt ends behind <|audio_out_bos|>

A message is {"role", "content"}: a text, or a list of texts, {"type": "text", "text"} and {"type": "audio", ...}. Every
turn is <|start_header_id|>role<|end_header_id|>, two line ends, its content and <|eot_id|> (<|eom_id|> when an assistant
turn follows an assistant turn). `Chat.segments` writes training examples and prompts alike; streams.chat_grid lays them
out. Which turns are targets: those of the assistant from `start` on, headers never.

Sources: boson-multimodal 0.1.1 (prepare_chatml_sample, its collator) and the generation example of its repository; the
chat template of transformers differs (it trims text and has a role `scene`) and is not followed. Next: cache.py.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streams import StreamTable
from text import Tokenizer, normalise

Message = dict[str, Any]
Segment = tuple[Tensor, float]      # text ids (n,) or codes (Q, T), and the weight of its targets

BEGIN, END, EOT, EOM = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
SPEAK, HEAR, AUDIO_END = "<|audio_out_bos|>", "<|audio_bos|>", "<|audio_eos|>"      # around codes that are said, or heard
HEADER, HEADER_END, RECIPIENT = "<|start_header_id|>", "<|end_header_id|>", "<|recipient|>"
SCENE, SCENE_END = "<|scene_desc_start|>", "<|scene_desc_end|>"
PLACEHOLDERS = ("<|AUDIO|>", "<|AUDIO_OUT|>")       # one id a clip in the official files; never in our grid
SPECIALS = (BEGIN, END, HEADER, HEADER_END, EOM, EOT, HEAR, AUDIO_END, SPEAK, RECIPIENT, SCENE, SCENE_END)
SOUNDS = ("<SE>", "</SE>", "<SE_s>", "</SE_s>", "<SE_e>", "</SE_e>")                # sound events: text.py writes them
FORBIDDEN = (               # in a text: they would be structure
    BEGIN, END, HEADER, HEADER_END, EOM, EOT, HEAR, AUDIO_END, SPEAK, RECIPIENT, *PLACEHOLDERS)

INSTRUCTION = "Generate audio following instruction."
SPEAKERS = """You are an AI assistant designed to convert text into speech.
If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following text, \
using the specified voice.
If no speaker tag is present, select a suitable voice on your own."""
SEED_REQUEST = re.compile(r"\s*please generate speech for given text[^:]*:\s*", re.I)
ROLES = ("system", "user", "assistant")


# ---- special ids ----

def resolve(tokenizer: Tokenizer, names: Sequence[str] = SPECIALS) -> dict[str, int]:
    """The id of each special token, read off the tokenizer; ValueError when one is not a single id there."""
    found = {name: tokenizer.encode(name) for name in names}
    missing = [name for name, ids in found.items() if len(ids) != 1]
    if missing:
        listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ValueError(f"tokenizer {tokenizer.name} has no special token {listed}; give the tokenizer.json of Higgs Audio v2")
    return {name: ids[0] for name, ids in found.items()}


def steered(table: StreamTable, tokenizer: Tokenizer) -> StreamTable:
    """A chat table whose steering ids are those of a tokenizer."""
    ids = resolve(tokenizer)
    return replace(table, audio_start=ids[SPEAK], audio_end=ids[AUDIO_END], stop=(ids[END], ids[EOT]))


# ---- messages ----

def parts(content: Any) -> Iterator[str | Message]:
    """The content of a message as texts and audio parts; ValueError for anything else."""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif isinstance(part, dict) and part.get("type") == "audio":
            yield part
        else:
            raise ValueError('malformed messages; each message needs "role" and "content" (text, or parts of type "text" or "audio")')


def words(content: Any) -> str:
    return " ".join(part for part in parts(content) if isinstance(part, str)).strip()


def clips(content: Any) -> list[Message]:
    return [part for part in parts(content) if isinstance(part, dict)]


def checked(messages: Any) -> list[Message]:
    """Messages of known roles with readable content; ValueError (reason; fix) otherwise."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") in ROLES and "content" in m for m in messages):
        raise ValueError(f'malformed messages; a list of {{"role", "content"}}, roles {", ".join(ROLES)}')
    for message in messages:
        for part in parts(message["content"]):
            refuse_marks(part if isinstance(part, str) else "", message["role"])
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no assistant turn; the last assistant turn holds what the model should say")
    return messages


def refuse_marks(text: str, role: str) -> str:
    """The text, which may not open or close turns, nor bring placeholders: what is data never becomes structure."""
    held = [mark for mark in FORBIDDEN if mark in text]
    if held:
        raise ValueError(f"wrong placeholder count; the text of a {role} turn holds {held[0]}, "
                         + 'name each recording in a part of type "audio" and leave such marks out')
    return text


def official(messages: list[Message], assistant_text: str = "drop") -> list[Message]:
    """Rewrite the one-turn request [text, audio, "Please generate speech for given text ...: X"] to the clone layout.

    Its answer often repeats X before the speech: `assistant_text` "drop" leaves that out, as official prompts do.
    """
    *before, ask, answer = messages if len(messages) >= 2 else [{}, {}]
    found = list(parts(ask["content"])) if ask.get("role") == "user" and answer.get("role") == "assistant" else []
    if len(found) != 3 or not isinstance(found[1], dict) or not isinstance(found[2], str) or not SEED_REQUEST.match(found[2]):
        return messages
    said = list(parts(answer["content"])) if assistant_text == "keep" else clips(answer["content"])
    turns = [("user", found[0]), ("assistant", found[1]), ("user", SEED_REQUEST.sub("", found[2], count=1)), ("assistant", said)]
    return [*before, *({"role": role, "content": content} for role, content in turns)]


def sample_row(sample: Message, assistant_text: str = "drop") -> Message:
    """A ChatML sample as a manifest row: the last assistant turn with audio is the row, the audio before it its reference.

    `clips` names the audio parts in reading order by a suffix to the row's id ("" is the row itself), `others` holds
    those that are neither.
    """
    messages = official(checked(sample.get("messages")), assistant_text)
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    last = max((i for i in replies if clips(messages[i]["content"])), default=replies[-1])
    heard = [(i, part) for i, m in enumerate(messages) for part in clips(m["content"])]
    own = max((n for n, (i, _) in enumerate(heard) if i == last), default=-1)
    row = {k: sample[k] for k in ("id", "speaker", "language", "split", "start_index") if sample.get(k) not in (None, "")}
    row = {k: v for k, v in row.items() if v == v}                              # tables write NaN for what is missing
    misc = sample.get("misc")
    if "speaker" not in row and isinstance(misc, dict) and misc.get("speaker"):
        row["speaker"] = misc["speaker"]
    row |= {"text": said(messages, last), "messages": [bare(m) for m in messages], "clips": [], "others": {}}
    for n, (i, part) in enumerate(heard):
        about = {"text": said(messages, i), "audio": part.get("audio_url") or "(inline)"}
        about |= {k: part[k] for k in ("offset", "duration", "raw_audio") if part.get(k) is not None}
        row["clips"].append("" if n == own else "#reference" if n == own - 1 else f"#{n}")
        if n == own:
            row |= about | {"text": row["text"]}
        elif n == own - 1:
            row["reference"] = about
        else:
            row["others"][f"#{n}"] = about
    return row


def bare(message: Message) -> Message:
    """A message without inline audio: what is kept of it once its recordings are rows."""
    content = message["content"]
    if isinstance(content, (list, dict)):
        content = [part if isinstance(part, str) else {k: v for k, v in part.items() if k != "raw_audio"}
                   for part in (content if isinstance(content, list) else [content])]
        content = content if isinstance(message["content"], list) else content[0]
    return message | {"content": content}


def said(messages: list[Message], i: int) -> str:
    """The words of turn i: its own text, or that of the user turn before it."""
    before = [words(m["content"]) for m in reversed(messages[:i]) if m["role"] == "user"]
    return words(messages[i]["content"]) or next(filter(None, before), "")


def trained_from(messages: list[Message]) -> int:
    """Default `start_index`: the last assistant turn when an earlier one has audio (a reference), else the first turn."""
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return replies[-1] if any(clips(messages[i]["content"]) for i in replies[:-1]) else 0


# ---- official prompts ----

def audio_turn() -> Message:
    return {"role": "assistant", "content": [{"type": "audio"}]}


def system_turn(text: str, references: Sequence[str | None], scene: str, in_system: bool) -> Message | None:
    """The system message of a clone prompt; `references` holds a transcript or, for a voice in words, "profile:...".

    Without references it is always there; with them only where it has something to say.
    """
    profiles = [str(r).removeprefix("profile:") if str(r).startswith("profile:") else None for r in references]
    if references and (in_system or any(profiles)):
        content: list[Any] = [f"{INSTRUCTION}\n\n{SCENE}\n" + (f"{scene}\n\n" if scene else "")]
        for n, profile in enumerate(profiles):
            content[-1] += f"SPEAKER{n}: {profile or ''}"
            content += [{"type": "audio"}, "\n"] if profile is None else []
            if profile is not None:
                content[-1] += "\n"
        content[-1] += SCENE_END
        return {"role": "system", "content": content}
    tags = sorted(set(re.findall(r"\[(SPEAKER\d+)\]", text)))
    if not references and len(tags) > 1:
        voices = "\n".join(f"{tag}: {('feminine', 'masculine')[n % 2]}" for n, tag in enumerate(tags))
        return {"role": "system", "content": f"{SPEAKERS}\n\n{SCENE}\n" + "\n\n".join(filter(None, (scene, voices))) + f"\n{SCENE_END}"}
    if references and not scene:
        return None
    return {"role": "system", "content": INSTRUCTION + (f"\n\n{SCENE}\n{scene}\n{SCENE_END}" if scene else "")}


def clone_messages(text: str, references: Sequence[str] = (), scene: str = "", in_system: bool = False) -> list[Message]:
    """The official prompt for speaking `text` in the voices of `references`, transcripts whose codes come in the same order."""
    system = system_turn(text, references, scene, in_system)
    in_system = in_system or any(r.startswith("profile:") for r in references)
    messages = [system] if system else []
    for n, transcript in enumerate(() if in_system else references):
        tag = f"[SPEAKER{n}] " if len(references) > 1 else ""
        messages += [{"role": "user", "content": tag + transcript}, audio_turn()]
    return [*messages, {"role": "user", "content": text}]


def chunks(text: str, limit: int) -> list[str]:
    """Cut a long text: at lines that begin with [SPEAKER where there are any, else after `limit` words of a paragraph.

    Turns of speakers are joined while they stay within `limit` words, and never cut.
    """
    if limit <= 0:
        return [text]
    turns = [t.strip() for t in re.split(r"\n(?=\s*\[SPEAKER)", text) if t.strip()]
    if len(turns) > 1:
        out = turns[:1]
        for turn in turns[1:]:
            joined = f"{out[-1]}\n{turn}"
            out = [*out[:-1], joined] if len(joined.split()) <= limit else [*out, turn]
        return out
    paragraphs = [p.split() for p in re.split(r"\n\s*\n", text) if p.strip()]
    return [" ".join(p[at : at + limit]) for p in paragraphs for at in range(0, len(p), limit)]


# ---- messages -> segments ----

@dataclass(frozen=True)
class Chat:
    """How the conversations of a data set or a prompt are written: the tokenizer and the options of DataConfig."""

    tokenizer: Tokenizer
    normaliser: str = "none"
    scene: str = ""                 # scene description of rows that bring none
    in_system: bool = False         # reference audio goes into the system message

    def fit(self, table: StreamTable) -> "Chat":
        """Check that the model steers by the ids of this tokenizer."""
        ids = resolve(self.tokenizer, SPECIALS + (SOUNDS if "higgs-v1" in self.normaliser else ()))
        for name, wanted in ((SPEAK, [table.audio_start]), (AUDIO_END, [table.audio_end]), (EOT, table.stop)):
            if ids[name] not in wanted:
                found = f"{name} is {ids[name]} in tokenizer {self.tokenizer.name}, {', '.join(map(str, wanted))} in the model"
                raise ValueError(f"{found}; use the tokenizer that belongs to the model")
        return self

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.long)

    def segments(self, messages: list[Message], codes: Sequence[Tensor], start: int | None = None, speak: bool = False) -> list[Segment]:
        """Write messages with the codes (Q, T) of their audio parts, in reading order; targets begin at message `start`.

        `speak` opens an assistant turn behind them: the grid is then a prompt, and ends where speech begins.
        """
        wanted = sum(len(clips(m["content"])) for m in messages)
        if wanted != len(codes):
            raise ValueError(f"wrong placeholder count; {wanted} audio parts in the messages, {len(codes)} recordings: name each once")
        start = trained_from(messages) if start is None else start
        out: list[Segment] = []
        given = iter(codes)
        for n, message in enumerate(messages):
            role = message["role"]
            weight = float(role == "assistant" and n >= start and not speak)
            out.append((self.encode((BEGIN if n == 0 else "") + header(role)), 0.0))
            if message.get("recipient"):
                out.append((self.encode(refuse_marks(str(message["recipient"]), role) + RECIPIENT), weight))
            for part in parts(message["content"]):
                if isinstance(part, str):
                    text = normalise(part, self.normaliser) if role != "system" else part
                    out.append((self.encode(refuse_marks(text, role)), weight))
                else:
                    begin = SPEAK if role == "assistant" else HEAR
                    out += [(self.encode(begin), weight), (next(given), weight), (self.encode(AUDIO_END), weight)]
            again = role == "assistant" and n + 1 < len(messages) and messages[n + 1]["role"] == "assistant"
            out.append((self.encode(EOM if again else EOT), weight))
        return [*out, (self.encode(header("assistant") + SPEAK), 0.0)] if speak else out

    def spoken(self, text: str, codes: Tensor, references: Sequence[tuple[str, Tensor]] = (), scene: str = "") -> list[Segment]:
        """The training example of a recording: its clone prompt and its codes."""
        messages = clone_messages(text, [said for said, _ in references], scene or self.scene, self.in_system)
        return self.segments([*messages, audio_turn()], [*(c for _, c in references), codes])

    def prompt(self, text: str, references: Sequence[tuple[str, Tensor]] = (), scene: str = "",
               before: Sequence[tuple[str, Tensor]] = ()) -> list[Segment]:
        """What sampling starts from. `before` are turns already spoken, (text, codes): a long text goes on in their voice."""
        *opening, ask = clone_messages(text, [said for said, _ in references], scene or self.scene, self.in_system)
        for said, _ in before:
            opening += [{"role": "user", "content": said}, audio_turn()]
        voices = [codes for said, codes in references if not said.startswith("profile:")]
        return self.segments([*opening, ask], [*voices, *(codes for _, codes in before)], speak=True)


def header(role: str) -> str:
    return f"{HEADER}{role}{HEADER_END}\n\n"
