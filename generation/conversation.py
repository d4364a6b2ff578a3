"""Turn-based chat: look-ups, replies streamed piece by piece, history, barge-in, and a log without personal data.

    python sample.py --ckpt out/ivr_qwen --chat --chat.lookup=orders.json
    you: Where is order 48213?
    Order 48213 was shipped and arrives on 3 June.

A line of input is the caller's text or, if the model reads audio, the path of a sound file. `repeat` gives the last reply
again, `agent` transfers to a person, `quit` ends the call; Ctrl-C during a reply cuts it off (barge-in).

Made-up figures are blocked: numbers are looked up as the caller writes or says them ("four oh eight two one"), and an unknown
one of five or more digits gets a fixed sentence. A reply stops before a figure whose value (text/figures.py) occurs neither in
the call nor in a look-up, and asks instead. Words are released one by one,
figures when they are complete. With --chat.documents=FOLDER the passages of its files that belong to a question follow it as a
system turn with their sources (text/passages.py). Only text is checked: neither spoken replies nor numbers in recordings are.

    history    all exchanges, as long as the prompt has at most `budget` columns; then the oldest exchanges are dropped whole and
               the system turn stays. Of a reply that was cut off it contains only the part that was given.
    log        one line a turn: the text of both sides, masked; seconds to the first token, to the first audio and in all

`say` generates: a prompt grid (K, S) -> frames (B, K). sample.py passes `generate`.
"""

import json
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from audio.wav import SOUNDS, WavWriter, load_wav
from corpus.cache import encode
from corpus.data_config import DataConfig
from corpus.examples import reply_example
from corpus.index import fitting_codec
from corpus.phone_calls import lookup_turn
from families.family import family_of, lay_out, special_tokens
from generation.reply_stream import reply_pieces
from options import error_line, read_json, visible
from streams import StreamTable
from text.conversation import Message, text_of
from text.figures import OPEN, Known, read_figures
from text.passages import Documents, passage_turn
from text.personal import masked
from text.tokenizers import load_tokenizer

Say = Callable[[Tensor], Iterator[Tensor]]
Lookup = Callable[[str], Mapping[str, str] | None]      # a number -> what is known of it; None = there is no such number
Piece = tuple[str, str | Tensor]                        # "text", a str; "audio", samples (1, n)

SENTENCES = {
    "en": {"unknown": "I cannot find {numbers}. Please check the number and tell me again.",
           "made up": "I cannot confirm that figure. Could you give me your order number, please?",
           "agent": "I am connecting you with a colleague. Please hold the line.", "quit": "Goodbye.",
           "repeat": "There is nothing to repeat yet."},
    "ar": {"unknown": "لا أجد الرقم {numbers}. من فضلك تحقق من الرقم وأعده.",
           "made up": "لا أستطيع تأكيد هذا الرقم. هل تعطيني رقم طلبك من فضلك؟",
           "agent": "سأحولك إلى زميل. من فضلك انتظر.", "quit": "مع السلامة.", "repeat": "لا يوجد ما أكرره بعد."}}
COMMANDS = ("repeat", "agent", "quit")
NUMBER = re.compile(r"[a-z]{0,4}\d{5,}")                # so a number to look up is written; others are looked up if the table has them


@dataclass(frozen=True)
class ChatConfig:
    """Options of turn-based chat."""

    lookup: str = ""             # JSON file of facts by number, e.g. {"48213": {"order": "48213", "status": "shipped"}}; "" = no look-ups
    documents: str = ""          # folder of .txt and .md files; what they say of a question is given to the model; "" = none
    passages: int = 3            # largest number of passages of documents for a question
    log: str = ""                # JSONL file to which each turn is appended; "" = chat.jsonl in the folder of --out
    budget: int = 2048           # largest prompt in columns; when it is exceeded the oldest exchanges are dropped
    grounded: bool = True        # stop a reply before a figure that occurs neither in the call nor in a look-up
    timeout: float = 0.0         # seconds after which a reply is cut off; 0 = no limit

    def __post_init__(self) -> None:
        assert self.budget > 0, f"budget {self.budget} is not positive"
        assert self.passages > 0, f"passages {self.passages} is not positive"
        assert self.timeout >= 0, f"timeout {self.timeout} is negative"


def read_lookup(path: str) -> Lookup:
    """The look-up table in a JSON file: facts by number; ValueError for anything else."""
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(facts, dict) for facts in found.values()):
        raise ValueError(f'{path} is no table of facts; write {{"48213": {{"order": "48213", "status": "shipped"}}}}')
    table, origin = {}, dict[str, str]()
    for key, facts in found.items():
        figures = read_figures(key)
        name = figures[0].names()[0] if len(figures) == 1 and figures[0].names() else ""
        if not name or re.sub(r"^#|\s", "", key) != re.sub(r"\s", "", key[figures[0].start : figures[0].end]):
            raise ValueError(f"{path}: the key {key!r} is not one number or code, which callers may say; write 48213 or AB-48213")
        if origin.setdefault(name, key) != key:
            raise ValueError(f"{path}: the keys {origin[name]!r} and {key!r} are the same number {name}; keep one of them")
        table[name] = {str(k): str(v) for k, v in facts.items()}
        lookup_turn(table[name])                        # report facts that cannot be written into a turn now, not in a call
    return table.get


# ---- made-up figures ----

class Guard:
    """Releases a streamed text, up to the first figure that `context` does not contain."""

    def __init__(self, context: str) -> None:
        self.known = Known(context)
        self.text, self.released, self.caught = "", 0, ""

    def push(self, piece: str) -> str:
        self.text += piece
        return self.release(OPEN.search(self.text).start())

    def flush(self) -> str:
        return self.release(len(self.text))

    def release(self, end: int) -> str:
        self.caught = self.caught or next(iter(self.known.missing(self.text[:end])), "")
        if self.caught or end <= self.released:
            return ""
        begin, self.released = self.released, end
        return self.text[begin:end]


# ---- the engine ----

@dataclass
class Exchange:
    """The caller's message, its look-ups and the reply; codes (Q, T) of its recordings."""

    messages: list[Message]
    codes: list[Tensor] = field(default_factory=list)


@dataclass
class TurnLog:
    """The log entry of a turn."""

    outcome: str = "reply"       # or "unknown", "repeat", "agent", "quit", "error"
    cut: str = ""                # "barge-in", "length" (max_frames), "timeout" or "made up"
    said: str = ""
    looked_up: int = 0
    passages: list[str] = field(default_factory=list)           # sources of the passages that it was given
    dropped: int = 0             # exchanges that left the history
    columns: int = 0             # of the prompt
    frames: int = 0              # drawn
    samples: int = 0             # of speech
    seconds: dict[str, float] = field(default_factory=dict)


class Session:
    """A conversation with one caller."""

    def __init__(self, table: StreamTable, data: DataConfig, config: ChatConfig, say: Say, lookup: Lookup | None = None,
                 reply: str = "", log: Callable[[dict[str, Any]], None] = lambda row: None,
                 clock: Callable[[], float] = time.perf_counter, codec: Any = None, commands: Sequence[str] = COMMANDS) -> None:
        family = family_of(table)
        if family.template is None:
            fix = "give it a recording with --user=in.wav" if family.user_audio else "give it --text"
            raise ValueError(f"{family.name} has no chat template; {fix} instead of --chat")
        self.table, self.data, self.config, self.say, self.lookup, self.log, self.clock = table, data, config, say, lookup, log, clock
        self.tokenizer = load_tokenizer(data.tokenizer)
        self.documents = Documents(config.documents) if config.documents else None
        self.codec, self.commands = codec or fitting_codec(data.codec, table, self.tokenizer), commands
        self.answer_in(reply or ("speech" if family.template.audio_out else "text"))
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.exchanges: list[Exchange] = []
        self.slots: dict[str, str] = {}
        self.id, self.turns, self.language, self.last = uuid.uuid4().hex[:12], 0, "en", list[Piece]()
        self.cancel = threading.Event()                 # set it from any thread to end the reply at once

    def answer_in(self, reply: str) -> None:
        """Reply with "text" or "speech"."""
        if reply == "speech" and not (family := family_of(self.table)).template.audio_out:
            raise ValueError(f"{family.name} does not speak; ask for text")
        self.reply = reply

    def behind(self, messages: Sequence[Message], say: Say, log: Callable[[dict[str, Any]], None]) -> "Session":
        """Another conversation of the same kind that goes on behind messages of text: the callers' numbers are looked up again."""
        new = copy(self)
        new.begin()
        new.say, new.log = say, log
        for message in messages:
            said = str(message["content"])
            if message["role"] == "system":
                new.data = replace(new.data, system=said)
            elif message["role"] == "user":
                new.exchanges.append(Exchange([{"role": "user", "content": said}]))
                new.look_up(new.exchanges[-1], said, TurnLog())
            elif new.exchanges:
                new.exchanges[-1].messages.append({"role": "assistant", "content": unmarked(said)})
            else:
                raise ValueError("a conversation begins with a message of the user")
        return new

    def fixed(self, kind: str, **values: str) -> str:
        return SENTENCES[self.language][kind].format(**values)

    def hear(self, heard: str, files: bool = True) -> Iterator[Piece]:
        """Answer a line of the caller, piece by piece. Ends early when `cancel` is set or the iterator is closed.

        `files`: a line may be the path of a sound file.
        """
        turn, start = TurnLog(), self.clock()
        self.turns += 1
        self.cancel.clear()
        command, said = heard.strip().lower(), list[Piece]()
        if command not in self.commands and re.search("[\u0600-\u06ff]", heard):
            self.language = "ar"
        try:
            given = self.obey(command, turn) if command in self.commands else self.answer(heard, turn, start, files)
            with closing(given):
                for piece in given:
                    said.append(piece)
                    yield piece
        except GeneratorExit:                           # the consumer stopped reading
            turn.cut = "barge-in"
            raise
        except (ValueError, OSError):
            turn.outcome = "error"
            raise
        finally:
            self.last = said if turn.outcome == "reply" and said else self.last
            turn.said = "".join(piece for kind, piece in said if kind == "text")
            turn.samples = sum(piece.shape[-1] for kind, piece in said if kind == "audio")
            self.write(heard, turn, start)

    def obey(self, command: str, turn: TurnLog) -> Iterator[Piece]:
        turn.outcome = command
        if command == "repeat" and self.last:
            yield from self.last
        else:
            yield "text", self.fixed(command)

    def answer(self, heard: str, turn: TurnLog, start: float, files: bool) -> Iterator[Piece]:
        """Look up the caller's numbers and reply; the part of the reply that is given goes into the history."""
        exchange = self.open(heard, files)
        unknown = self.look_up(exchange, heard, turn)
        self.consult(exchange, turn)
        self.exchanges.append(exchange)
        if unknown:
            turn.outcome, said = "unknown", self.fixed("unknown", numbers=", ".join(unknown))
            exchange.messages.append({"role": "assistant", "content": said})
            yield "text", said
            return
        parts: list[str | Tensor] = []
        try:
            prompt = self.prompt(turn)
            with closing(self.drawn(prompt, turn, start)) as drawn:
                for kind, piece in drawn:
                    parts.append(piece)                 # before the yield, so that the history has everything that was given
                    yield from self.sound(piece, turn, start) if kind == "codes" else [("text", piece)]
                if self.codec is not None and self.decoder is not None and turn.cut != "barge-in":
                    yield "audio", self.decoder.flush()[0]
        except ValueError:
            self.exchanges.remove(exchange)             # a failed turn does not stay in the history
            raise
        finally:
            self.keep(exchange, parts)

    def open(self, heard: str, files: bool) -> Exchange:
        """The caller's side of an exchange: text, or the codes of a sound file."""
        self.decoder = None
        if not files or not heard.strip().lower().endswith(SOUNDS):
            return Exchange([{"role": "user", "content": heard.strip()}])
        if self.codec is None:
            raise ValueError(f"{heard.strip()}: this model reads text only; write what the caller says")
        wav, _ = load_wav(heard.strip(), self.codec.sample_rate)
        content = [{"type": "audio", "audio_url": Path(heard.strip()).name}]
        return Exchange([{"role": "user", "content": content}], [encode(self.codec, wav)])

    def look_up(self, exchange: Exchange, heard: str, turn: TurnLog) -> list[str]:
        """Add a turn of facts for each number that is known; returns those that are not."""
        unknown, known = list[str](), set[str]()
        for figure in read_figures(heard) if self.lookup is not None and not exchange.codes else ():
            name, facts = next(((name, facts) for name in figure.names() if (facts := self.lookup(name)) is not None), ("", None))
            if facts is None:
                unknown += [name for name in figure.names()[:1] if NUMBER.fullmatch(name) and name not in unknown]
            elif name not in known:
                known.add(name)
                turn.looked_up += 1
                self.slots |= facts
                exchange.messages.append(lookup_turn(facts))
        return unknown

    def consult(self, exchange: Exchange, turn: TurnLog) -> None:
        """Add a turn with what the documents say of the caller's words."""
        asked = text_of(exchange.messages[0]["content"])
        if self.documents is not None and (found := self.documents.find(asked, self.config.passages)):
            turn.passages = [f"{passage.source}, {passage.part}" for passage in found]
            exchange.messages.append(passage_turn([passage._replace(text=unmarked(passage.text)) for passage in found]))

    def prompt(self, turn: TurnLog) -> Tensor:
        """The grid (K, S) of the history, cut to the budget; the current exchange always stays."""
        while True:
            messages = [m for exchange in self.exchanges for m in exchange.messages]
            codes = [c for exchange in self.exchanges for c in exchange.codes]
            example = reply_example(messages, codes, self.data, self.tokenizer, self.table, self.reply)
            tokens = lay_out(example, self.table)[0]
            turn.columns = tokens.shape[1]
            if turn.columns <= self.config.budget:
                return tokens
            if len(self.exchanges) == 1:
                fix = "raise it, or say less" + ", or lower chat.passages" * bool(turn.passages)
                raise ValueError(f"this turn alone has {turn.columns} columns, chat.budget is {self.config.budget}; {fix}")
            self.exchanges.pop(0)
            turn.dropped += 1

    def drawn(self, prompt: Tensor, turn: TurnLog, start: float) -> Iterator[tuple[str, str | Tensor]]:
        """Generate a reply: "text" as far as `Guard` releases it, "codes" as they are sampled. Stops when it is cut off."""
        named = [text_of(message["content"]) for exchange in self.exchanges for message in exchange.messages]
        context = "\n".join([*named, self.data.system, *self.slots.values()])
        guard, mark = Guard(context), SENTENCES[self.language]["made up"]
        with closing(self.frames(prompt, turn, start)) as frames:
            for kind, piece in reply_pieces(frames, self.table, self.tokenizer):
                if self.cancel.is_set():
                    turn.cut = "barge-in"
                    return
                if kind == "cut":
                    turn.cut = turn.cut or "length"
                elif kind == "codes":
                    yield kind, piece
                elif text := guard.push(piece) if self.config.grounded else piece:
                    yield kind, text
                if guard.caught:
                    break
        if rest := "" if guard.caught else guard.flush():
            yield "text", rest
        if guard.caught:
            turn.cut = "made up"
            yield "text", (" " if guard.released and not guard.text[: guard.released].endswith((" ", "\n")) else "") + mark

    def frames(self, prompt: Tensor, turn: TurnLog, start: float) -> Iterator[Tensor]:
        """The frames of a reply until it is cut off; none is sampled after that."""
        with closing(self.say(prompt)) as drawn:
            while not self.cancel.is_set() and (frame := next(drawn, None)) is not None:
                past = self.clock() - start
                turn.seconds.setdefault("first_token", past)
                turn.frames += 1
                yield frame
                if 0 < self.config.timeout < past:
                    turn.cut = "timeout"
                    return

    def sound(self, codes: Tensor, turn: TurnLog, start: float) -> Iterator[Piece]:
        """Decode the next codes (Q, n) of a reply."""
        if self.decoder is None:
            self.decoder = self.codec.stream()
        wav = self.decoder.decode(codes[None].clamp(max=self.codec.codebook_size - 1))[0]
        if wav.shape[-1]:
            turn.seconds.setdefault("first_audio", self.clock() - start)
            yield "audio", wav

    def keep(self, exchange: Exchange, parts: list[str | Tensor]) -> None:
        """Add the given part of a reply to an exchange: its text, and its speech if there is any."""
        content: list[Any] = []
        for part in parts:
            if isinstance(part, str) and content and isinstance(content[-1], str):
                content[-1] += part
            elif isinstance(part, str):
                content.append(part)
            elif content and isinstance(content[-1], dict):
                exchange.codes[-1] = torch.cat([exchange.codes[-1], part], 1)
            else:
                content.append({"type": "audio", "audio_url": "(said)"})
                exchange.codes.append(part)
        content = [unmarked(part) if isinstance(part, str) else part for part in content]
        if content:
            spoken = any(isinstance(part, dict) for part in content)
            exchange.messages.append({"role": "assistant", "content": content if spoken else content[0]})

    def write(self, heard: str, turn: TurnLog, start: float) -> None:
        """Log a turn, with its personal data masked."""
        turn.seconds["total"] = self.clock() - start
        rate = self.codec.sample_rate if self.codec is not None else 1
        row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "session": self.id, "turn": self.turns,
               "heard": masked(heard.strip(), self.slots), "said": masked(turn.said, self.slots), "outcome": turn.outcome, "cut": turn.cut,
               "looked_up": turn.looked_up, "passages": turn.passages, "dropped": turn.dropped,
               "columns": turn.columns, "frames": turn.frames,
               "audio_seconds": round(turn.samples / rate, 3), "seconds": {k: round(v, 4) for k, v in turn.seconds.items()}}
        self.log(row)


def unmarked(text: str) -> str:
    """A reply without special tokens: generated as plain text, they would be parsed as structure in the next prompt."""
    for mark in special_tokens():
        text = text.replace(mark, "")
    return text


# ---- the terminal ----

@contextmanager
def barge_in(cancel: threading.Event) -> Iterator[None]:
    """Context in which Ctrl-C only sets `cancel`."""
    before = signal.signal(signal.SIGINT, lambda *_: cancel.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def chat_in_terminal(table: StreamTable, data: DataConfig, config: ChatConfig, say: Say, reply: str = "", out: str = "out/sample.wav",
         lines: TextIO | None = None) -> None:
    """Chat over the terminal or a file of lines. Spoken replies are written as NAME_001.wav, ... beside `out`."""
    lines = lines or sys.stdin
    path = Path(config.log or Path(out).parent / "chat.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        session = Session(table, data, config, say, read_lookup(config.lookup) if config.lookup else None, reply,
                          lambda row: print(json.dumps(row, ensure_ascii=False), file=file, flush=True))
        if session.documents and (unread := session.documents.unread):
            print(visible(f"{config.documents}: not read, as only .txt and .md are: {', '.join(unread[:5])}"
                          + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")), file=sys.stderr)
        for heard in input_lines(lines):
            wav = Path(out).with_name(f"{Path(out).stem}_{session.turns + 1:03d}.wav")
            try:
                with barge_in(session.cancel):
                    print_turn(session.hear(heard), wav, session)
            except (ValueError, OSError) as error:
                if not lines.isatty():                  # a script must see the failure
                    raise
                print(error_line(error))
            if heard.strip().lower() in ("agent", "quit"):
                break
    print(f"{path}: {session.turns} turns of session {session.id}")


def input_lines(lines: TextIO) -> Iterable[str]:
    """The caller's non-blank lines, until the end of the input or Ctrl-C."""
    while True:
        if lines.isatty():
            print("you: ", end="", flush=True)
        try:
            line = lines.readline()
        except KeyboardInterrupt:
            print()
            return
        if not line:
            return
        if line.strip():
            yield line


def print_turn(said: Iterator[Piece], path: Path, session: Session) -> None:
    """Print the text of a reply as it comes and write its speech to `path`."""
    writer, samples = None, 0
    try:
        for kind, piece in said:
            if kind == "text":
                print(visible(piece, "\n\t"), end="", flush=True)
                continue
            writer = writer or WavWriter(path, session.codec.sample_rate)
            writer.append(piece)
            samples += piece.shape[-1]
    finally:
        if writer is not None:
            writer.close()
    print(f"[{path}: {samples / session.codec.sample_rate:.1f} s]" if writer else "")
