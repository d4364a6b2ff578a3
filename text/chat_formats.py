"""Conversations as other tools write them -> messages, the rows of a manifest, and the two sides of a pair.

    as_messages(sample)    ShareGPT ("conversations"), prompt and completion, ms-swift ("system", <audio> in the text), OpenAI ("developer")
    sample_row(sample)     the last reply is the row, an earlier turn with audio its reference
    reply_pair(row)        "chosen" and "rejected" (TRL), "rejected_response" (ms-swift)

What cannot be honoured is a ValueError "reason; fix"; `unread_fields` names what is ignored. Next: coverage.py.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from text.conversation import INLINE, Message, bare, checked, clips, loss_weight, parts, said

TAG = "<audio>"                     # ms-swift's placeholder, or <audio>file</audio>
SEED_REQUEST = re.compile(r"\s*please generate speech for given text[^:]*:\s*", re.I)
ROLE_NAMES = {"developer": "system", "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
REFUSED = ("tools", "functions", "images", "videos", "tool_calls")
FIELDS = ("id", "speaker", "language", "split", "group", "start_index", "messages", "conversations", "prompt", "completion", "system",
          "audios", "misc", "chosen", "rejected", "rejected_response", "clips", "others", "reference", "scene", "audio", "text", "offset",
          "duration", "raw_audio", *REFUSED)
TURN_FIELDS = ("role", "content", "from", "value", "recipient", "weight", "loss", "tool_calls", "reasoning_content")
PART_FIELDS = ("type", "text", "audio_url", "raw_audio", "offset", "duration", "start", "end")


def unread_fields(sample: Message) -> Iterator[str]:
    """The fields of a conversation that nothing is done with."""
    yield from (name for name in sample if name not in FIELDS)
    messages = sample.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            yield from (f"messages.{name}" for name in message if name not in TURN_FIELDS)
            content = message.get("content")
            for part in content if isinstance(content, list) else [content]:
                yield from (f"content.{name}" for name in part if name not in PART_FIELDS) if isinstance(part, dict) else ()


def as_messages(sample: Message) -> Message:
    """A sample whose turns are in "messages", with our roles and its recordings in parts of their own."""
    for name in REFUSED:
        if sample.get(name):
            raise ValueError(f'unsupported "{name}"; a model here does not read them: remove the field, or the row')
    if "conversations" in sample and "messages" not in sample:
        turns = sample["conversations"] if isinstance(sample["conversations"], list) else []
        named = [{"role": t.get("from", t.get("role")), "content": t.get("value", t.get("content"))} for t in turns if isinstance(t, dict)]
        sample = sample | {"messages": named}
    if "completion" in sample and "messages" not in sample:
        sample = sample | {"messages": [*turns_of(sample.get("prompt"), "user"), *turns_of(sample["completion"], "assistant")]}
    messages = sample.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return sample                                           # `checked` names the fault
    messages = [m | {"role": ROLE_NAMES.get(str(m.get("role")), m.get("role"))} for m in messages]
    if role := next((m["role"] for m in messages if m["role"] in ("tool", "function", "observation", "function_call")), ""):
        raise ValueError(f'unsupported role; a turn of "{role}" cannot be trained: remove the turns of tools, or the row')
    if sample.get("system"):
        if messages and messages[0]["role"] == "system":
            raise ValueError('two system messages; one in "system", one in "messages": keep one')
        messages = [{"role": "system", "content": sample["system"]}, *messages]
    sample = sample | {"messages": messages}
    marked = any(TAG in m["content"] for m in messages if isinstance(m.get("content"), str))
    return expand_audio_tags(sample) if marked or sample.get("audios") else sample


def turns_of(found: Any, role: str) -> list[Message]:
    """A prompt or a reply as messages: from its content, or from a list of them."""
    if isinstance(found, list) and found and all(isinstance(part, dict) and "role" in part for part in found):
        return found
    return [] if found is None else [{"role": role, "content": found}]


def expand_audio_tags(sample: Message) -> Message:
    """An ms-swift sample, <audio> in its texts and the files apart in "audios", or between <audio> and </audio>, as a ChatML sample."""
    audios = sample.get("audios") or []
    files, messages = list(audios if isinstance(audios, list) else [audios]), sample["messages"]
    texts = [m["content"] if isinstance(m.get("content"), str) else "" for m in messages]
    marks = sum(text.count(TAG) - text.count("</audio>") for text in texts)
    if marks != len(files) or not all(isinstance(file, str) for file in files):
        raise ValueError(f'wrong placeholder count; {marks} times {TAG} in the messages, {len(files)} names in "audios": name each once')
    given, out = iter(files), []
    for message, text in zip(messages, texts, strict=True):
        if TAG in text:
            pieces = re.split(f"{TAG}(?:([^<]*)</audio>)?", text)       # text, file or None, text, ...
            content = [piece if n % 2 == 0 else {"type": "audio", "audio_url": next(given) if piece is None else piece.strip()}
                       for n, piece in enumerate(pieces)]
            message = message | {"content": [part for part in content if part != ""]}
        out.append(message)
    return {k: v for k, v in sample.items() if k != "audios"} | {"messages": out}


def as_clone_request(messages: list[Message], assistant_text: str = "drop") -> list[Message]:
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


def sample_row(sample: Message, assistant_text: str = "drop", marks: Sequence[str] = ()) -> Message:
    """A ChatML sample as a manifest row: the last assistant turn with audio is the row, the audio before it its reference.

    `clips` names the audio parts in reading order by a suffix to the row's id ("" is the row itself), `others` holds
    those that are neither. `marks` are special tokens that no text may hold.
    """
    sample = as_messages(sample)
    messages = as_clone_request(checked(sample.get("messages"), marks), assistant_text)
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    last = max((i for i in replies if clips(messages[i]["content"])), default=replies[-1])
    recordings = [(i, part) for i, m in enumerate(messages) for part in clips(m["content"])]
    own = max((n for n, (i, _) in enumerate(recordings) if i == last), default=-1)
    row = {k: sample[k] for k in ("id", "speaker", "language", "split", "group", "scene") if sample.get(k) not in (None, "")}
    row = {k: v for k, v in row.items() if v == v}                              # tables write NaN for what is missing
    row |= start_of(sample, messages)
    misc = sample.get("misc")
    if "speaker" not in row and isinstance(misc, dict) and misc.get("speaker") not in (None, ""):
        row["speaker"] = misc["speaker"]
    row |= {"text": said(messages, last), "messages": [bare(m) for m in messages], "clips": [], "others": {}}
    for n, (i, part) in enumerate(recordings):
        named = part.get("audio_url") not in (None, "", "placeholder")
        about = {"text": said(messages, i), "audio": part["audio_url"] if named else INLINE}
        about |= {k: part[k] for k in ("offset", "duration", "raw_audio") if part.get(k) is not None} | piece_of(part)
        row["clips"].append("" if n == own else "#reference" if n == own - 1 else f"#{n}")
        if n == own:
            row |= about | {"text": row["text"]}
        elif n == own - 1:
            row["reference"] = about
        else:
            row["others"][f"#{n}"] = about
    return row


def start_of(sample: Message, messages: list[Message]) -> Message:
    """The `start_index` of a row, the first message that is trained; ValueError where no reply is."""
    start = sample.get("start_index")
    start = int(start) if isinstance(start, str) and start.strip().isdecimal() else start
    if start is None or start != start or start == "":
        start = None
    elif isinstance(start, bool) or not isinstance(start, (int, float)) or start != int(start) or start < 0:
        raise ValueError(f"malformed field; start_index is {start!r}, expected the number of the first message that is trained")
    if not any(m["role"] == "assistant" and loss_weight(m) for m in messages[int(start or 0) :]):
        raise ValueError(f"no target; start_index {start or 0} leaves no target: it and the weights of the turns exclude every reply")
    return {} if start is None else {"start_index": int(start)}


def piece_of(part: Message) -> Message:
    """The offset and duration of an audio part that has "start" and "end" in seconds."""
    start, end = part.get("start"), part.get("end")
    if "offset" in part or (start is None and end is None):
        return {}
    if not all(isinstance(t, (int, float)) for t in (start or 0, end or 0)) or (end is not None and end <= (start or 0)):
        raise ValueError("malformed field; start and end of a recording are seconds, the end behind the start")
    return {"offset": start or 0.0} | ({} if end is None else {"duration": end - (start or 0.0)})


# ---- pairs ----

def reply_pair(row: Message) -> tuple[list[Message], list[Message], list[Message]] | None:
    """The messages before two replies, the better and the worse one; None for a row whose sides are recordings of their own.

    The sides may be replies, or whole conversations that share their beginning with each other or with "prompt".
    """
    if "rejected_response" in row:                              # ms-swift: the chosen reply closes the messages
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError('malformed pair; "rejected_response" is another reply to "messages"')
        return messages[:-1], messages[-1:], turns_of(row["rejected_response"], "assistant")
    if not isinstance(row.get("messages", []), list):
        raise ValueError('malformed pair; "messages" is the list of messages before the two replies')
    before = turns_of(row.get("prompt", row.get("messages")), "user")
    sides = [turns_of(row.get(name), "assistant") for name in ("chosen", "rejected")]
    shared = 0
    while shared < min(map(len, sides)) - 1 and sides[0][shared] == sides[1][shared]:
        shared += 1
    opened = sides[0][:shared]
    whole = any(m.get("role") == "user" for m in opened)
    if before and not (whole and any(m.get("content") == before[-1].get("content") for m in opened)):
        return before, *sides
    if whole:
        return opened, sides[0][shared:], sides[1][shared:]
    asked = [m for side in sides for m in side if m.get("role") == "user"]
    if asked:
        raise ValueError("malformed pair; the two sides answer different messages")
    return None


def different(pair: tuple[list[Message], list[Message], list[Message]]) -> tuple[list[Message], list[Message], list[Message]]:
    """The pair; ValueError where nothing can be learned from it."""
    before, better, worse = pair
    if better == worse:
        raise ValueError("identical pair; the chosen and the rejected reply are the same: correct or remove the row")
    if not all(side and side[0].get("role") in ("assistant", "gpt") for side in (better, worse)):
        raise ValueError("malformed pair; each side ends with a reply of the assistant to the same messages")
    return pair
