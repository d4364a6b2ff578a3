"""Phone calls: lookup turns, the intent of a caller, invented facts in a reply, and stereo recordings as conversations.

    lookup_turn({"order": "48213", "status": "shipped"})     {"role": "system", "content": "lookup: order=48213; status=shipped"}
    intent("where is my parcel")                             "order_tracking", by key words; "unknown" without any
    ungrounded("It comes on 4 June.", "lookup: date=3 June") ["4"], which is in neither the call nor the lookup

A reply may name an order, an amount, a date or a person only when the call or a lookup named it before. `entities` finds
them: figures, compared by value (text/figures.py), and capitalised words inside a sentence. The first word of a sentence is
always capitalised and therefore ignored. Used by evaluation/report.py and assets/build_ivr.py.

    python data.py calls FOLDER_OR_WAV ... --out=DIR [--agent=right]     stereo recordings, one speaker a channel -> DIR/calls.jsonl

cuts every call into its turns by loudness (audio/telephone.py), a wav each, and writes one conversation a call that
train.py reads (speech in, speech out). Turns during which the other one speaks too are marked "crosstalk".
Next: swap_tokenizer.py.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

from audio.telephone import turns
from audio.wav import load_wav, save_wav
from options import split_arguments, visible, write_rows
from text.figures import Known, figures, read_figures
from text.normalisers import ARABIC

SYSTEM = """You answer the phone for Harbour Supply. Reply in one or two short sentences. \
Take figures, names and dates from the caller or from a lookup, never from anywhere else."""
CATEGORIES = ("greetings", "order_tracking", "billing", "technical", "returns", "account", "shipping", "complaints", "closing")
UNKNOWN = "unknown"
Message = dict[str, str]


def lookup_turn(facts: Mapping[str, str]) -> Message:
    """The turn with the answer of the order system, in the form of the training rows; ValueError for reserved characters."""
    marked = [f"{name}={value}" for name, value in facts.items() if re.search(r"[;=\n]", f"{name}{value}")]
    if marked:
        raise ValueError(f"the lookup field {marked[0]!r} contains ; or = or a line break; remove it")
    return {"role": "system", "content": "lookup: " + "; ".join(f"{name}={value}" for name, value in facts.items())}


# ---- intent of the caller ----

KEYWORDS = r"""
greetings: hello|hi|hey|good (morning|afternoon|evening)|anyone there|hear me|customer service|help desk
greetings: support|robot|machine|real person|speaking|مرحبا|السلام عليكم|صباح الخير
order_tracking: where is (my|order|the)( order| parcel| package)?|track(ing)?( number)?|my (order|parcel|package)
order_tracking: has .* been sent|was delivered|is late|overdue|carrier|order number|أين طلبي|أتابع الطلب
order_tracking: إرسال الطلب
billing: invoice|bill|charged?( twice)?|pay(ment)?( method)?|instal?ments|late fee|amount|total|الفاتورة|مبلغ
technical: does not (turn on|work)|internet( is down)?|connection|router|error( \w+)?|crash(es)?|the app|update
technical: version|technician|repair|warranty|slow|reset link|switch on|لا يعمل|لا يشتغل|تشغيل الجهاز
returns: return(able)?( the| something| period)?|refund|money for|send back|exchange|swap|arrived broken|damaged
returns: crack|wrong thing|cancel( order)?|got something else
account: (my |an )?account( is locked)?|sign in|password|address|register|points|bonus balance|newsletter
account: advertising|mailing list|hacked|حسابي
shipping: deliver(y)? to|ship(ping)? to|express( delivery| parcel)?|pick-?up shop|neighbour|how fast|upstairs
shipping: the box|what time will|narrow down the time
complaints: complain(t)?|on hold|manager|supervisor|in charge|rude|unfriendly|bad quality|disappointed
complaints: compensation|third time|you promised|hotline|my data|still not solved
closing: (good)?bye|thank you|thanks|that (was|is) (all|everything)|nothing else|no more questions|wrong number
closing: nice weekend|call (back )?(later|again)|hang up|شكرا|مع السلامة
"""


def patterns(table: str) -> dict[str, re.Pattern]:
    """One expression a category from lines "category: word|word", whole words in either case."""
    found: dict[str, list[str]] = {}
    for line in table.split("\n")[1:-1]:
        name, _, words = line.partition(": ")
        found.setdefault(name, []).append(words)
    return {name: re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.I) for name, words in found.items()}


PATTERNS = patterns(KEYWORDS)


def intent(text: str) -> str:
    """The category whose longest key word is the longest of all; "unknown" without any."""
    lengths = {name: max((len(m[0]) for m in pattern.finditer(text)), default=0) for name, pattern in PATTERNS.items()}
    best = max(lengths, key=lambda name: lengths[name])
    return best if lengths[best] else UNKNOWN


# ---- entities of a reply ----

NAME = re.compile(r"(?<![.!?:؟\n])(?<![.!?:؟] )(?<!^)\b[A-Z][a-z]\w*")


def entities(text: str) -> list[str]:
    """The entities of a text: numbers, codes, and capitalised names inside its sentences, in lower case."""
    return [part for figure in figures(text) for part in figure.split()] + names(text)


def names(text: str) -> list[str]:
    """Capitalised words inside the sentences of a text, in lower case, without the months of its dates."""
    text, spans = text.translate(ARABIC), [(figure.start, figure.end) for figure in read_figures(text)]
    return [m[0].lower() for m in NAME.finditer(text) if not any(start <= m.start() < end for start, end in spans)]


def ungrounded(reply: str, context: str) -> list[str]:
    """The entities of a reply that its context (everything said or looked up before) does not contain; figures by value."""
    words = set(re.findall(r"\w+", context.lower()))
    return Known(context).missing(reply) + [name for name in names(reply) if name not in words]


# ---- recordings ----

SIDES = ("left", "right")


def cut_call(path: Path, folder: Path, agent: str = "left") -> dict[str, Any]:
    """Cut a stereo call into turns, written into FOLDER/NAME; returns its conversation, up to the last turn of the agent.

    ValueError names a silent channel: then only one speaker was recorded, or both are on the other channel.
    """
    wav, rate = load_wav(path, channels=2)
    found = turns(wav, rate)
    silent = [side for n, side in enumerate(SIDES) if all(turn.channel != n for turn in found)]
    if silent:
        role = "the agent" if silent[0] == agent else "the caller"
        who = "both channels are" if len(silent) == 2 else f"the {silent[0]} channel, {role}, is"
        raise ValueError(f"{path}: {who} silent; record each speaker on a separate channel, or leave the call out")
    messages: list[dict[str, Any]] = []
    for n, turn in enumerate(found):
        role = "assistant" if SIDES[turn.channel] == agent else "user"
        name = f"{path.stem}/{n:03d}_{role}.wav"
        save_wav(folder / name, wav[turn.channel : turn.channel + 1, round(turn.start * rate) : round(turn.end * rate)], rate)
        part = {"type": "audio", "audio_url": name} | ({"crosstalk": True} if turn.crosstalk else {})
        messages.append({"role": role, "content": [part]})
    kept = list(dropwhile(lambda m: m["role"] != "assistant", reversed(messages)))[::-1]
    return {"id": path.stem, "group": path.stem, "messages": kept}


def main(argv: Sequence[str]) -> None:
    words, pairs = split_arguments(list(argv), ("help",))
    if "help" in pairs or not argv:
        return print(__doc__)
    if not words or "out" not in pairs:
        raise ValueError("calls needs recordings or folders of them, and --out=DIR; python data.py calls --help shows an example")
    agent, out = pairs.get("agent", "left"), Path(pairs["out"])
    if agent not in SIDES or pairs.keys() - {"agent", "out"}:
        raise ValueError(f"--agent is left or right, and --out a folder; got {' '.join(f'--{k}={v}' for k, v in pairs.items())}")
    paths = [path for word in map(Path, words) for path in (sorted(word.rglob("*.wav")) if word.is_dir() else [word])]
    rows, bad = [], 0
    for path in paths:
        try:
            rows.append(cut_call(path, out, agent))
        except (ValueError, FileNotFoundError) as error:
            bad += 1
            print(visible(f"left out: {error}"), file=sys.stderr)
    if not rows:
        raise ValueError(f"none of {len(paths)} recordings is a usable call; fix those listed above, or name a folder of stereo wavs")
    write_rows(out / "calls.jsonl", rows)
    print(f"{out}/calls.jsonl: {len(rows)} calls, {sum(len(row['messages']) for row in rows)} turns, {bad} left out")
