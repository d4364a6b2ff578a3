"""Conversations: messages -> segments of text ids and codes, in the words that a family was trained on.

    system     Generate audio following instruction.  <|scene_desc_start|> A quiet room. <|scene_desc_end|>
    user       what the reference recording says
    assistant  <|audio_out_bos|> its codes <|audio_eos|>                    read: weight 0
    user       what is to be said
    assistant  <|audio_out_bos|> codes <|audio_eos|> <|eot_id|>             trained; a prompt ends behind <|audio_out_bos|>

A message is {"role", "content"}: a text, or a list of texts, {"type": "text", "text"} and {"type": "audio", ...}. How a
family marks turns is a value, a `Template`: Higgs Audio (above), Qwen2.5 and Qwen3 (<|im_start|>role, a line end, content,
<|im_end|>), MOSS-Speech (the same, with speech). `Chat.segments` writes training examples and prompts alike;
streams.chat_grid lays them out. Which turns are targets: those of the assistant from `start` on, headers never.

Sources: boson-multimodal 0.1.1 (prepare_chatml_sample, its collator) and the generation example of its repository; the
chat template that transformers has for Higgs differs (it trims text and has a role `scene`) and is not followed; the
templates beside Qwen2.5 and Qwen3, which are; the processor of MOSS-Speech. Next: cache.py.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
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
SOSP = "<|object_ref_start|>"                       # what MOSS-Speech opens speech with; a mark of pictures in Qwen
THOUGHTS = ("<think>", "</think>")                  # ids of audio columns in MOSS-Speech
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Template:
    """How a family writes turns: header ({role} is filled in), content, close, behind. "" = it has no such mark."""

    family: str                         # for messages
    header: str
    close: str                          # a target where the assistant speaks
    stop: str                           # ends a text that is no conversation
    marks: tuple[str, ...]              # special tokens it writes with; each is one id of the tokenizer
    refused: tuple[str, ...]            # what no text may hold: it would be structure
    behind: str = ""                    # between turns, never a target
    again: str = ""                     # closes an assistant turn that another one follows
    begin: str = ""                     # before the first turn
    recipient: str = ""                 # behind whom an assistant turn is for
    hear: str = ""                      # opens a recording
    speak: str = ""                     # opens the assistant's speech
    end: str = ""                       # follows codes, where no code does
    chooses: bool = False               # the model itself opens speech; otherwise the prompt says which reply it wants
    system: tuple[str, str] = ("", "")  # system turn of conversations that bring none, for a text and for a spoken reply
    thought: str = ""                   # opens a reply that was not thought about
    targets: str = "all"                # of the replies, "all" or the "last"; "clone": the last where one before it is speech
    joint: bool = False                 # header and content become ids as one text


HIGGS = Template(
    "Higgs Audio v2", HEADER + "{role}" + HEADER_END + "\n\n", EOT, END, SPECIALS,
    (BEGIN, END, HEADER, HEADER_END, EOM, EOT, HEAR, AUDIO_END, SPEAK, RECIPIENT, *PLACEHOLDERS), again=EOM, begin=BEGIN,
    recipient=RECIPIENT, hear=HEAR, speak=SPEAK, end=AUDIO_END, chooses=True, targets="clone")
QWEN2 = Template(
    "Qwen2.5", "<|im_start|>{role}\n", "<|im_end|>", "<|endoftext|>", CHATML, (*CHATML, SOSP, *THOUGHTS), behind="\n", joint=True,
    system=("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",) * 2)
# In Qwen3 only the last reply stands behind the empty thought with which it will be asked for: only it is trained.
QWEN3 = replace(QWEN2, family="Qwen3", system=("", ""), thought="<think>\n\n</think>\n\n", targets="last")
MOSS = replace(
    QWEN2, family="MOSS-Speech", marks=(*CHATML, SOSP), hear=SOSP, speak=SOSP, joint=False,
    system=("You are a helpful assistant. Answer the user's questions with text.",
            "You are a helpful voice assistant. Answer the user's questions with spoken responses."))
TEMPLATES = {"chatml": HIGGS, "qwen2": QWEN2, "qwen3": QWEN3, "moss": MOSS}          # by the layout of the stream table
REFUSED = dict.fromkeys(mark for template in TEMPLATES.values() for mark in template.refused)

INSTRUCTION = "Generate audio following instruction."
SPEAKERS = """You are an AI assistant designed to convert text into speech.
If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following text, \
using the specified voice.
If no speaker tag is present, select a suitable voice on your own."""
# How the official generation example draws; RAS looks back 7 columns and redraws what was there twice.
RULES = {"chatml": {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "ras_window": 7, "ras_repeats": 2, "max_frames": 2048},
         "moss": {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_frames": 10, "max_frames": 1000}}
OFFICIAL = {"chatml": {"codec": "bosonai/higgs-audio-v2-tokenizer", "normaliser": "higgs-v1"},      # what goes with official weights
            "moss": {"codec": "fnlp/MOSS-Speech-Codec"}}
SEED_REQUEST = re.compile(r"\s*please generate speech for given text[^:]*:\s*", re.I)
TAG = "<audio>"                     # ms-swift's placeholder
ROLES = ("system", "user", "assistant")


# ---- special ids ----

def resolve(tokenizer: Tokenizer, names: Sequence[str] = SPECIALS, family: str = HIGGS.family) -> dict[str, int]:
    """The id of each special token, read off the tokenizer; ValueError when one is not a single id there."""
    found = {name: tokenizer.encode(name) for name in names}
    missing = [name for name, ids in found.items() if len(ids) != 1]
    if missing:
        listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ValueError(f"tokenizer {tokenizer.name} has no special token {listed}; give the tokenizer.json of {family}")
    return {name: ids[0] for name, ids in found.items()}


def steered(table: StreamTable, tokenizer: Tokenizer) -> StreamTable:
    """A table of conversations whose steering ids are those of a tokenizer."""
    t = TEMPLATES[table.layout]
    ids = resolve(tokenizer, t.marks, t.family) | {"": -1}
    return replace(table, audio_start=ids[t.speak], audio_end=ids[t.end], stop=(ids[t.stop], ids[t.close]))


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
        if message.get("tool_calls") or message.get("reasoning_content"):
            raise ValueError("malformed messages; tool_calls and reasoning_content are not written here: leave them out")
        for part in parts(message["content"]):
            refuse_marks(part if isinstance(part, str) else "", message["role"])
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no assistant turn; the last assistant turn holds what the model should say")
    return messages


def refuse_marks(text: str, role: str, marks: Iterable[str] = tuple(REFUSED)) -> str:
    """The text, which may not open or close turns, nor bring placeholders: what is data never becomes structure."""
    held = next((mark for mark in marks if mark in text), "")
    if held in THOUGHTS:
        raise ValueError(f"reasoning in a turn; the text of a {role} turn holds {held}, keep only what is said behind </think>")
    if held:
        raise ValueError(f"wrong placeholder count; the text of a {role} turn holds {held}, "
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


def untagged(sample: Message) -> Message:
    """An ms-swift sample, <audio> in its texts and the files apart in "audios", as a ChatML sample."""
    messages, files = sample.get("messages"), sample["audios"] if isinstance(sample["audios"], list) else [sample["audios"]]
    messages = messages if isinstance(messages, list) else []
    texts = [m["content"] if isinstance(m, dict) and isinstance(m.get("content"), str) else "" for m in messages]
    marks = sum(text.count(TAG) for text in texts)
    if marks != len(files) or not all(isinstance(file, str) for file in files):
        raise ValueError(f'wrong placeholder count; {marks} times {TAG} in the messages, {len(files)} names in "audios": name each once')
    given, out = iter(files), []
    for message, text in zip(messages, texts, strict=True):
        if TAG in text:
            first, *others = text.split(TAG)
            content = [first, *(part for other in others for part in ({"type": "audio", "audio_url": next(given)}, other))]
            message = message | {"content": [part for part in content if part != ""]}
        out.append(message)
    return {k: v for k, v in sample.items() if k != "audios"} | {"messages": out}


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
    row = {k: sample[k] for k in ("id", "speaker", "language", "split", "group", "start_index") if sample.get(k) not in (None, "")}
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
    """The words of turn i: its own text, the "text" of its recording, or the words of the user turn before it."""
    before = [words(m["content"]) for m in reversed(messages[:i]) if m["role"] == "user"]
    heard = " ".join(str(part["text"]) for part in clips(messages[i]["content"]) if part.get("text"))
    return words(messages[i]["content"]) or heard or next(filter(None, before), "")


def written(messages: list[Message]) -> list[Message]:
    """A conversation for a model that only reads: what its recordings say stands in their place."""
    out = []
    for message in messages:
        lost = [part for part in clips(message["content"]) if not part.get("text")]
        if lost:
            raise ValueError(f'the model reads text only; give the recording {lost[0].get("audio_url", "(inline)")} a "text", what it says')
        spelled = [part if isinstance(part, str) else part["text"] for part in parts(message["content"])]
        out.append(message | {"content": " ".join(spelled)})
    return out


def trained_from(messages: list[Message], targets: str = "clone") -> int:
    """Default `start_index`: the first turn, or the last assistant turn; under "clone", where an earlier one has audio (a reference)."""
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    last = targets == "last" or (targets == "clone" and any(clips(messages[i]["content"]) for i in replies[:-1]))
    return replies[-1] if last and replies else 0


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


def pair_voices(refs: Sequence[str], transcripts: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
    """(recording, transcript) of each voice, or ("", "profile:..."); ValueError when they do not fit each other or the texts."""
    said = iter(transcripts)
    voices = [("", ref) if ref.startswith("profile:") else (ref, next(said, "")) for ref in refs]
    if any(not text.strip() for _, text in voices) or next(said, None) is not None:
        found = f"{sum(bool(ref) for ref, _ in voices)} recordings, {len(transcripts)} transcripts"
        raise ValueError(f"a reference needs both --ref=voice.wav and --ref_text=\"what it says\"; got {found}")
    highest = max((int(n) for text in texts for n in re.findall(r"\[SPEAKER(\d+)\]", text)), default=0)
    if voices and highest >= len(voices):
        raise ValueError(f"the text names [SPEAKER{highest}], there are {len(voices)} voices; give a --ref and a --ref_text to each")
    return voices


def usual_rules(layout: str, given: Collection[str]) -> dict[str, float]:
    """The rules of sampling that a family's official example uses, those that the user gave left out; says so."""
    rules = {name: value for name, value in RULES.get(layout, {}).items() if name not in given}
    if rules:
        print("sampling as the official example does: " + ", ".join(f"{name} {value}" for name, value in rules.items()))
    return rules


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
    scene: str = ""                 # Higgs: scene description of rows that bring none
    in_system: bool = False         # Higgs: reference audio goes into the system message
    template: Template = HIGGS
    system: str = ""                # system turn of conversations that bring none, "" = that of the template
    thinking: bool = False          # prompts leave it to Qwen3 whether it thinks first

    def fit(self, table: StreamTable) -> "Chat":
        """Check that the model steers by the ids of this tokenizer."""
        t = self.template
        ids = resolve(self.tokenizer, t.marks + (SOUNDS if "higgs-v1" in self.normaliser else ()), t.family)
        for name, wanted in ((t.speak, [table.audio_start]), (t.end, [table.audio_end]), (t.close, table.stop)):
            if name and ids[name] not in wanted:
                found = f"{name} is {ids[name]} in tokenizer {self.tokenizer.name}, {', '.join(map(str, wanted))} in the model"
                raise ValueError(f"{found}; use the tokenizer that belongs to the model")
        return self

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.long)

    def segments(self, messages: list[Message], codes: Sequence[Tensor], start: int | None = None, reply: str = "") -> list[Segment]:
        """Write messages with the codes (Q, T) of their audio parts, in reading order; targets begin at message `start`.

        `reply`, "text" or "speech", opens an assistant turn behind them: the grid is then a prompt.
        """
        t = self.template
        wanted = sum(len(clips(m["content"])) for m in messages)
        if wanted != len(codes):
            raise ValueError(f"wrong placeholder count; {wanted} audio parts in the messages, {len(codes)} recordings: name each once")
        start = trained_from(messages, t.targets) if start is None else start
        spoken = reply == "speech" or (not reply and bool(clips(messages[-1]["content"])))
        system = self.system or t.system[spoken]
        if system and messages[0]["role"] != "system":
            messages, start = [{"role": "system", "content": system}, *messages], start + 1
        out: list[Segment] = []
        given = iter(codes)
        for n, message in enumerate(messages):
            role, closing = message["role"], n + 1 == len(messages)
            weight = float(role == "assistant" and n >= start and not reply)
            thought = t.thought if closing and role == "assistant" and any(m["role"] == "user" for m in messages) else ""
            out += self.turn(message, (t.begin if n == 0 else "") + t.header.format(role=role) + thought, given, weight)
            again = t.again and role == "assistant" and not closing and messages[n + 1]["role"] == "assistant"
            out.append((self.encode(t.again if again else t.close), weight))
            out += [(self.encode(t.behind), 0.0)] if t.behind else []
        if not reply:
            return out
        opened = t.speak if reply == "speech" else t.thought if not self.thinking else ""
        return [*out, (self.encode(t.header.format(role="assistant") + opened), 0.0)]

    def turn(self, message: Message, header: str, codes: Iterator[Tensor], weight: float) -> Iterator[Segment]:
        """The header of a turn and its content."""
        t, role, content = self.template, message["role"], list(parts(message["content"]))
        texts = [normalise(part, self.normaliser) if isinstance(part, str) and role != "system" else part for part in content]
        for text in texts:
            refuse_marks(text if isinstance(text, str) else "", role, t.refused)
        head = self.encode(header)
        if t.joint and texts and isinstance(texts[0], str):         # "\n" and a text that begins with it may share an id
            first = texts.pop(0)
            whole = self.encode(header + (first.lstrip("\n") if t.thought and header.endswith(t.thought) else first))
            yield whole[: len(head)], 0.0
            yield whole[len(head) :], weight
        else:
            yield head, 0.0
        if message.get("recipient"):
            if not t.recipient:
                raise ValueError(f"malformed messages; {t.family} has no recipient: leave it out")
            yield self.encode(refuse_marks(str(message["recipient"]), role) + t.recipient), weight
        for part in texts:
            if isinstance(part, str):
                yield self.encode(part), weight
                continue
            yield self.encode(t.speak if role == "assistant" else t.hear), weight * t.chooses
            yield next(codes), weight
            if t.end:
                yield self.encode(t.end), weight

    def spoken(self, text: str, codes: Tensor, references: Sequence[tuple[str, Tensor]] = (), scene: str = "") -> list[Segment]:
        """The training example of a recording: its clone prompt and its codes."""
        messages = clone_messages(text, [said for said, _ in references], scene or self.scene, self.in_system)
        return self.segments([*messages, audio_turn()], [*(c for _, c in references), codes])

    def plain(self, text: str) -> list[Segment]:
        """The training example of a text that is no conversation: all of it, and the mark that ends it."""
        text = refuse_marks(normalise(text, self.normaliser), "plain", self.template.refused)
        return [(self.encode(text + self.template.stop), 1.0)]

    def prompt(self, text: str, references: Sequence[tuple[str, Tensor]] = (), scene: str = "",
               before: Sequence[tuple[str, Tensor]] = (), reply: str = "") -> list[Segment]:
        """What sampling starts from. `before` are turns already spoken, (text, codes): a long text goes on in their voice.

        `reply` is "speech" where the model speaks, and "text" otherwise.
        """
        t = self.template
        if t is not HIGGS and references:
            raise ValueError(f"{t.family} takes no reference recording; leave --ref out")
        turns = [{"role": "user", "content": text}]
        if t is HIGGS:
            turns = clone_messages(text, [said for said, _ in references], scene or self.scene, self.in_system)
        *opening, ask = turns
        for said, _ in before:
            opening += [{"role": "user", "content": said}, audio_turn()]
        voices = [codes for said, codes in references if not said.startswith("profile:")]
        reply = reply or ("speech" if t.speak else "text")
        return self.segments([*opening, ask], [*voices, *(codes for _, codes in before)], reply=reply)
