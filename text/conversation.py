"""Conversations: messages -> segments of text ids and codes, in the chat template that a family was trained on.

A message is {"role", "content"}: a text, or a list of texts, {"type": "text", "text"} and {"type": "audio", ...}. The chat
template of a family is a value, a `Template` in its file in families/. `Chat.segments` builds training examples and
prompts alike; a layout function makes their grid. Targets are the assistant's turns from `start` on, without headers.
Next: chat_formats.py.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streams import StreamTable
from text.normalisers import marks_of, normalise
from text.tokenizers import Tokenizer

INLINE = "(inline)"                 # file name of a recording inside a row (base64)
Message = dict[str, Any]
Segment = tuple[Tensor, float]      # text ids (n,) or codes (Q, T), and the weight of its targets


@dataclass(frozen=True)
class Template:
    """The chat template of a family: header ({role} is filled in), content, close, separator. "" = no such token."""

    family: str                             # for messages
    header: str
    close: str                              # ends a turn; a target in the assistant's turns
    stop: str                               # ends a plain text
    marks: tuple[str, ...]                  # its special tokens; each must be one id of the tokenizer
    refused: tuple[str, ...]                # special tokens that are refused inside a text
    separator: str = ""                     # after every turn, never a target
    close_continued: str = ""               # closes an assistant turn that is followed by another one
    begin: str = ""                         # before the first turn
    recipient: str = ""                     # after the recipient of an assistant turn
    audio_in: str = ""                      # before the codes of a recording of the user
    audio_out: str = ""                     # before the codes of the assistant's speech; several marks only where codes are text ids
    audio_end: str = ""                     # after codes; "" where an audio code ends them
    predicts_audio_start: bool = False      # the model generates audio_out itself; otherwise the prompt contains it
    system: tuple[str, str] = ("", "")      # default system message, for a text and for a spoken reply
    empty_thinking: str = ""                # begins a reply without reasoning (Qwen3)
    targets: str = "all"                    # trained replies: "all", "last", or "clone": the last if an earlier one is speech
    joint_header: bool = False              # tokenize header and content as one text
    roles: tuple[tuple[str, str], ...] = () # (role, its name in the header), where they differ
    one_turn: bool = False                  # a text and its speech are one turn
    codes: str = ""                         # the first of the codes that are text ids (StreamTable.flat)
    # (text, transcripts of the voices, scene, references in the system message) -> messages of a prompt
    clone_prompt: Callable[[str, Sequence[str], str, bool], list[Message]] | None = None

    def with_tokenizer_ids(self, table: StreamTable, tokenizer: Tokenizer) -> StreamTable:
        """The table with the ids of audio_start, audio_end and stop taken from a tokenizer."""
        ids = token_ids(tokenizer, self.marks, self.family) | {"": -1}
        stop = tuple(ids[mark] for mark in (self.stop, self.close) if mark)
        flat = (ids[self.codes], *table.flat[1:]) if self.codes else ()
        return replace(table, audio_start=ids.get(self.audio_out, -1), audio_end=ids[self.audio_end], stop=stop, flat=flat)


ROLES = ("system", "user", "assistant")


def token_ids(tokenizer: Tokenizer, names: Sequence[str], family: str) -> dict[str, int]:
    """The id of each special token; ValueError when the tokenizer splits one."""
    found = {name: tokenizer.encode(name) for name in names}
    missing = [name for name, ids in found.items() if len(ids) != 1]
    if missing:
        listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ValueError(f"tokenizer {tokenizer.name} has no special token {listed}; give the tokenizer.json of {family}")
    return {name: ids[0] for name, ids in found.items()}


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


def text_of(content: Any) -> str:
    return " ".join(part for part in parts(content) if isinstance(part, str)).strip()


def clips(content: Any) -> list[Message]:
    return [part for part in parts(content) if isinstance(part, dict)]


def checked(messages: Any, marks: Sequence[str]) -> list[Message]:
    """Check roles and content of messages, and that no text contains `marks`; ValueError "reason; fix" otherwise."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") in ROLES and "content" in m for m in messages):
        raise ValueError(f'malformed messages; a list of {{"role", "content"}}, roles {", ".join(ROLES)}')
    for message in messages:
        if message.get("tool_calls") or message.get("reasoning_content"):
            raise ValueError("malformed messages; tool_calls and reasoning_content are not supported: leave them out")
        for part in parts(message["content"]):
            refuse_marks(part if isinstance(part, str) else "", message["role"], marks)
        loss_weight(message)
        if message["role"] == "assistant" and not clips(message["content"]) and not text_of(message["content"]):
            raise ValueError("empty reply; a turn of the assistant says nothing: write what it says, or remove the turn")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no assistant turn; add one with the reply that the model should learn")
    return messages


def loss_weight(message: Message) -> float:
    """How much a turn of the assistant counts as a target: its "weight" (OpenAI) or "loss" (ms-swift), 1 without either."""
    found = message.get("weight", message.get("loss"))
    if found is not None and not (isinstance(found, (bool, int, float)) and 0 <= found <= 1):
        raise ValueError(f"malformed messages; the weight (or loss) of a turn is {found!r}, expected 0 to 1, true or false")
    return 1.0 if found is None else float(found)


THOUGHTS = ("<think>", "</think>")


def refuse_marks(text: str, role: str, marks: Iterable[str]) -> str:
    """Return the text; ValueError when it contains a special token, which would change the structure of the turns."""
    held = next((mark for mark in marks if mark in text), "")
    if held in THOUGHTS:
        raise ValueError(f"reasoning in a turn; the text of the {role} turn holds {held}, keep only the answer after </think>")
    if held:
        raise ValueError(f"wrong placeholder count; the text of the {role} turn holds {held}, "
                         + 'name each recording in a part of type "audio" and leave such marks out')
    return text


def bare(message: Message) -> Message:
    """A message without its inline audio, which is stored in rows of its own."""
    def stripped(part: Any) -> Any:
        return {k: v for k, v in part.items() if k != "raw_audio"} if isinstance(part, dict) else part

    content = message["content"]
    return message | {"content": [stripped(part) for part in content] if isinstance(content, list) else stripped(content)}


def said(messages: list[Message], i: int) -> str:
    """The transcript of turn i: its own text, the "text" of its recording, or the text of the user turn before it."""
    before = [text_of(m["content"]) for m in reversed(messages[:i]) if m["role"] == "user"]
    recorded = " ".join(str(part["text"]) for part in clips(messages[i]["content"]) if part.get("text"))
    return text_of(messages[i]["content"]) or recorded or next(filter(None, before), "")


def with_transcripts(messages: list[Message]) -> list[Message]:
    """A conversation for a text-only model: recordings are replaced by their transcripts; ValueError without one."""
    out = []
    for message in messages:
        missing = [part for part in clips(message["content"]) if not part.get("text")]
        if missing:
            name = missing[0].get("audio_url", INLINE)
            raise ValueError(f'the model reads text only; give the recording {name} a "text" with its transcript')
        spelled = [part if isinstance(part, str) else part["text"] for part in parts(message["content"])]
        out.append(message | {"content": " ".join(spelled)})
    return out


def audio_turn() -> Message:
    """An assistant turn that is a recording."""
    return {"role": "assistant", "content": [{"type": "audio"}]}


def first_target(messages: list[Message], targets: str = "clone") -> int:
    """Default `start_index`: 0, or the last assistant turn under "last", and under "clone" if an earlier one has audio (a reference)."""
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    last = targets == "last" or (targets == "clone" and any(clips(messages[i]["content"]) for i in replies[:-1]))
    return replies[-1] if last and replies else 0


# A word; of scripts that are written without spaces (Thai, Lao, Burmese, Khmer, Chinese, Japanese) a letter and what clings to it.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CLOSING = "\u0e30-\u0e3a\u0e45-\u0e4e\u0eb0-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b6-\u17d3ー々"
CLOSING += "ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ、。」』】）！？，：；….,!?:;)"
WORD = re.compile(rf"[{UNSPACED}][{CLOSING}]*|[^\s{UNSPACED}]+[{CLOSING}]*")


def chunks(text: str, limit: int, normaliser: str = "none") -> list[str]:
    """Split a long text: at lines that begin with [SPEAKER if there are any, else after `limit` words of a paragraph; normalised before,
    so that a cut inside a sentence gains no full stop.

    Turns of speakers are joined up to `limit` words and never split.
    """
    if limit <= 0:
        return [text]
    turns = [t.strip() for t in re.split(r"\n(?=\s*\[SPEAKER)", text) if t.strip()]
    if len(turns) > 1:
        out = turns[:1]
        for turn in turns[1:]:
            joined = f"{out[-1]}\n{turn}"
            out = [*out[:-1], joined] if len(WORD.findall(joined)) <= limit else [*out, turn]
        return [normalise(turn, normaliser) for turn in out]
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(normalise(paragraph, normaliser).split())
        starts = [word.start() for word in WORD.finditer(paragraph)][::limit]
        pieces += [paragraph[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=False)]
    return pieces


@dataclass(frozen=True)
class Chat:
    """Writes conversations as segments: tokenizer, template and the options of DataConfig."""

    tokenizer: Tokenizer
    template: Template
    normaliser: str = "none"
    scene: str = ""                 # cloned voices: scene description of rows without one
    in_system: bool = False         # cloned voices: reference audio goes into the system message
    system: str = ""                # system message of conversations without one, "" = that of the template
    thinking: bool = False          # Qwen3: prompts do not suppress reasoning

    def check_tokenizer(self, table: StreamTable) -> "Chat":
        """Check that the control tokens of the model have the ids of this tokenizer; ValueError names the first that differs."""
        t = self.template
        ids = token_ids(self.tokenizer, t.marks + marks_of(self.normaliser), t.family)
        ends = table.stop if ids.get(t.stop) not in table.stop else (ids[t.close],)      # a base may know the end of a text only
        steering = ((t.audio_out, [table.audio_start]), (t.audio_end, [table.audio_end]), (t.close, ends), (t.codes, table.flat[:1]))
        for name, wanted in steering:
            if name and ids.get(name, -1) not in wanted:
                found = f"{name} is {ids[name]} in tokenizer {self.tokenizer.name}, {', '.join(map(str, wanted))} in the model"
                raise ValueError(f"{found}; use the tokenizer that belongs to the model")
        return self

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.long)

    def segments(self, messages: list[Message], codes: Sequence[Tensor], start: int | None = None, reply: str = "") -> list[Segment]:
        """Segments of messages with the codes (Q, T) of their audio parts, in reading order; targets begin at message `start`.

        `reply`, "text" or "speech", opens an assistant turn after them: the result is a prompt.
        """
        t = self.template
        wanted = sum(len(clips(m["content"])) for m in messages)
        if wanted != len(codes):
            raise ValueError(f"wrong placeholder count; {wanted} audio parts in the messages, {len(codes)} recordings: name each once")
        start = first_target(messages, t.targets) if start is None else start
        spoken = reply == "speech" or (not reply and bool(clips(messages[-1]["content"])))
        system = self.system or t.system[spoken]
        if system and messages[0]["role"] != "system":
            messages, start = [{"role": "system", "content": system}, *messages], start + 1
        out: list[Segment] = []
        given = iter(codes)
        for n, message in enumerate(messages):
            role, closing = message["role"], n + 1 == len(messages)
            weight = loss_weight(message) if role == "assistant" and n >= start and not reply else 0.0
            thinking = t.empty_thinking if closing and role == "assistant" and any(m["role"] == "user" for m in messages) else ""
            header = t.header.format(role=dict(t.roles).get(role, role))
            out += self.turn(message, (t.begin if n == 0 else "") + header + thinking, given, weight)
            if t.one_turn and closing and reply == "speech":            # the speech of the last text
                return [*out, (self.encode(t.audio_out), 0.0)]
            continued = t.close_continued and role == "assistant" and not closing and messages[n + 1]["role"] == "assistant"
            out.append((self.encode(t.close_continued if continued else t.close), weight))
            out += [(self.encode(t.separator), 0.0)] if t.separator else []
        if not reply:
            return out
        opened = t.audio_out if reply == "speech" else t.empty_thinking if not self.thinking else ""
        return [*out, (self.encode(t.header.format(role="assistant") + opened), 0.0)]

    def turn(self, message: Message, header: str, codes: Iterator[Tensor], weight: float) -> Iterator[Segment]:
        """The header of a turn and its content."""
        t, role, content = self.template, message["role"], list(parts(message["content"]))
        texts = [normalise(part, self.normaliser) if isinstance(part, str) and role != "system" else part for part in content]
        for text in texts:
            refuse_marks(text if isinstance(text, str) else "", role, t.refused)
        head = self.encode(header)
        if t.joint_header and texts and isinstance(texts[0], str):         # "\n" and a text that begins with it may become one id
            first = texts.pop(0)
            whole = self.encode(header + (first.lstrip("\n") if t.empty_thinking and header.endswith(t.empty_thinking) else first))
            yield whole[: len(head)], 0.0
            yield whole[len(head) :], weight
        else:
            yield head, 0.0
        if message.get("recipient"):
            if not t.recipient:
                raise ValueError(f"malformed messages; {t.family} does not support a recipient: leave it out")
            yield self.encode(refuse_marks(str(message["recipient"]), role, t.refused) + t.recipient), weight
        for part in texts:
            if isinstance(part, str):
                yield self.encode(part), weight
                continue
            yield self.encode(t.audio_out if role == "assistant" else t.audio_in), weight * t.predicts_audio_start
            yield next(codes), weight
            if t.audio_end:
                yield self.encode(t.audio_end), weight

    def spoken(self, text: str, codes: Tensor, references: Sequence[tuple[str, Tensor]] = (), scene: str = "") -> list[Segment]:
        """The training example of a recording: its clone prompt and its codes."""
        messages = self.template.clone_prompt(text, [said for said, _ in references], scene or self.scene, self.in_system)
        return self.segments(self.with_speech(messages), [*(c for _, c in references), codes])

    def with_speech(self, messages: list[Message]) -> list[Message]:
        """Messages whose last text is spoken: in a turn of its own, or in the same."""
        if not self.template.one_turn:
            return [*messages, audio_turn()]
        return [*messages[:-1], messages[-1] | {"content": [messages[-1]["content"], *audio_turn()["content"]]}]

    def plain(self, text: str) -> list[Segment]:
        """The training example of a plain text: all of it, and the token that ends it."""
        text = refuse_marks(normalise(text, self.normaliser), "plain", self.template.refused)
        return [(self.encode(text + self.template.stop), 1.0)]

    def prompt(self, text: str, references: Sequence[tuple[str, Tensor]] = (), scene: str = "",
               before: Sequence[tuple[str, Tensor]] = (), reply: str = "") -> list[Segment]:
        """The prompt of a text. `before` are (text, codes) of the chunks of a long text that were spoken already.

        `reply` is "text" or "speech"; by default speech if the model has it.
        """
        t = self.template
        if t.clone_prompt is None and references:
            raise ValueError(f"{t.family} does not take a reference recording; leave --ref out")
        turns = [{"role": "user", "content": text}]
        if t.clone_prompt is not None:
            turns = t.clone_prompt(text, [said for said, _ in references], scene or self.scene, self.in_system)
        *opening, ask = turns
        for said, _ in before:
            opening += self.with_speech([{"role": "assistant" if t.one_turn else "user", "content": said}])
        voices = [codes for said, codes in references if not said.startswith("profile:")]
        reply = reply or ("speech" if t.audio_out else "text")
        return self.segments([*opening, ask], [*voices, *(codes for _, codes in before)], reply=reply)
