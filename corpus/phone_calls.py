"""Phone calls: lookup turns, the intent of a caller, invented facts in a reply, and stereo recordings as conversations.

    lookup_turn({"order": "48213", "status": "shipped"})     {"role": "system", "content": "lookup: order=48213; status=shipped"}
    intent("where is my parcel")                             "order_tracking", by key words; "unknown" without any
    ungrounded("It comes on 4 June.", "lookup: date=3 June") ["4"], which is in neither the call nor the lookup

A reply may name an order, an amount, a date or a person only when the call or a lookup named it before. `entities` finds
them: figures, compared by value (text/figures.py), and capitalised words inside a sentence. The first word of a sentence is
always capitalised and therefore ignored. Used by evaluation/report.py and assets/build_ivr.py.

    python data.py calls FOLDER_OR_FILE ... --out=DIR [--agent=right]    recordings of any format -> DIR/calls.jsonl
    python data.py calls mono/ --out=DIR --agent=second                  one channel: speakers are told apart by voice
    python data.py calls mono/ --out=DIR --rttm=turns.rttm --agent=SPEAKER_01      or as another tool says

cuts every call into its turns, a wav each, and writes one conversation a call that train.py reads (speech in, speech out).
Two channels hold a speaker each, whose turns are found by loudness (audio/telephone.py); in one channel they are found by
voice (audio/diarise.py), and each turn says how sure that is, "confidence". Turns during which the other one speaks too are
marked "crosstalk"; hold music is no turn. A call is named by its place below the folder that all are in.
Next: swap_tokenizer.py.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

from torch import Tensor

from audio.diarise import diarise, read_rttm
from audio.telephone import held_sounds, spoken, turns_of, without
from audio.wav import SOUNDS, load_wav, mix, save_wav
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

SIDES, ORDER = ("left", "right"), ("first", "second")
SAME = 0.999                # correlation of two channels that hold one recording
Spans = list[tuple[float, float, int]]          # start and end in seconds, 0 the agent or 1 the caller


def cut_call(path: Path, folder: Path, agent: str = "", name: str = "", given: Sequence[tuple[float, float, str]] = ()) -> dict[str, Any]:
    """Cut a call into turns, written into FOLDER/NAME; returns its conversation, up to the last turn of the agent.

    Two channels hold a speaker each; in one channel speakers are told apart by voice, or as `given` by an RTTM file.
    ValueError where that cannot be done: a silent channel, equal channels, a single voice.
    """
    wav, rate = load_wav(path, channels=None)
    name, wav = name or path.stem, wav - wav.mean(1, keepdim=True)
    held = [held_sounds(channel[None], rate) for channel in wav]
    if len(wav) > 2:
        raise ValueError(f"{path} has {len(wav)} channels; choose one, or two with a speaker each")
    if len(wav) == 2 and not given:
        spans, sure = sides(path, wav, rate, agent, held), []
    else:
        wav = mix(wav)
        spans, sure = by_voice(path, wav, rate, agent, held[0], given)
    messages: list[dict[str, Any]] = []
    for n, turn in enumerate(turns_of(spans)):
        role, side = ("user", "assistant")[turn.channel == 0], turn.channel ^ (agent == "right") if len(wav) == 2 else 0
        file = f"{name}/{n:03d}_{role}.wav"
        save_wav(folder / file, wav[side : side + 1, round(turn.start * rate) : round(turn.end * rate)], rate)
        part = {"type": "audio", "audio_url": file} | ({"crosstalk": True} if turn.crosstalk else {})
        parts = [(b - a, c) for (a, b, who), c in zip(spans, sure, strict=False) if who == turn.channel and turn.start <= a < turn.end]
        part |= {"confidence": round(sum(s * c for s, c in parts) / sum(s for s, _ in parts), 3)} if parts else {}
        messages.append({"role": role, "content": [part]})
    kept = list(dropwhile(lambda m: m["role"] != "assistant", reversed(messages)))[::-1]
    if not any(m["role"] == "user" for m in kept):
        raise ValueError(f"{path}: the agent never answers the caller; check which side is the agent (--agent)")
    music = sum(b - a for spans in held for a, b in spans)
    return {"id": name, "group": name, "messages": kept} | ({"hold_music": round(music, 1)} if music else {})


def sides(path: Path, wav: Tensor, rate: int, agent: str, held: Sequence[Sequence[tuple[float, float]]]) -> Spans:
    """The spans of a stereo call (2, W) without hold music."""
    if agent not in ("", *SIDES):
        raise ValueError(f"{path} has two channels; say --agent=left or --agent=right")
    one, two = wav.double()
    if float((one @ two).abs()) > SAME * float(one.norm() * two.norm()) > 0:
        raise ValueError(f"{path}: both channels hold the same sound; save one of them, then speakers are told apart by voice")
    spans = [span for n in (0, 1) for span in without([s for s in spoken(wav, rate) if s[2] == n], held[n])]
    silent = [side for n, side in enumerate(SIDES) if all(channel != n for _, _, channel in spans)]
    if silent:
        role = "the agent" if silent[0] == (agent or "left") else "the caller"
        who = "both channels are" if len(silent) == 2 else f"the {silent[0]} channel, {role}, is"
        music = " (hold music is no speech)" if any(held) else ""
        raise ValueError(f"{path}: {who} silent{music}; record each speaker on a separate channel, or leave the call out")
    return sorted((a, b, channel ^ (agent == "right")) for a, b, channel in spans)


def by_voice(path: Path, wav: Tensor, rate: int, agent: str, held: Sequence[tuple[float, float]],
             given: Sequence[tuple[float, float, str]]) -> tuple[Spans, list[float]]:
    """The spans of the agent and of the others in one channel (1, W), and how sure each is."""
    if given:
        speakers = list(dict.fromkeys(who for _, _, who in sorted(given)))
        chosen = agent if agent in speakers else dict(zip(ORDER, speakers, strict=False)).get(agent or "first", "")
        if not chosen or len(speakers) < 2:
            raise ValueError(f"{path}: its RTTM names {', '.join(speakers)}; --agent is one of them, of two or more")
        seconds = wav.shape[1] / rate
        if (last := max(end for _, end, _ in given)) > seconds + 1:
            raise ValueError(f"{path} lasts {seconds:.1f} s, its RTTM goes on to {last:.1f} s; give the one that belongs to it")
        return sorted((a, min(b, seconds), int(who != chosen)) for a, b, who in given), []
    if agent not in ("", *ORDER):
        raise ValueError(f"{path} has one channel; say --agent=first or --agent=second, whoever speaks first or second")
    try:
        found = diarise(wav, rate, held=held)
    except ValueError as error:
        raise ValueError(f"{path}: one channel: {error}; give the turns of another tool with --rttm, or leave it out") from None
    return [(v.start, v.end, v.speaker ^ (agent == "second")) for v in found], [v.confidence for v in found]


def names_of(words: Sequence[str]) -> dict[Path, str]:
    """The recordings that are named, once each, and a name of their own: their place below the folder that all are in."""
    found = list(dict.fromkeys(path.resolve() for word in map(Path, words) for path in (
        sorted(p for p in word.rglob("*") if p.suffix.lower() in SOUNDS and p.is_file()) if word.is_dir() else [word])))
    root = Path(os.path.commonpath([word.resolve() if word.is_dir() else word.resolve().parent for word in map(Path, words)]))
    places = [path.relative_to(root) for path in found]
    alike = Counter(place.with_suffix("") for place in places)              # 7.wav and 7.flac
    return {path: (bare if alike[bare] == 1 else place.with_name(place.name.replace(".", "_"))).as_posix()
            for path, place in zip(found, places, strict=True) for bare in [place.with_suffix("")]}


def main(argv: Sequence[str]) -> None:
    words, pairs = split_arguments(list(argv), ("help",))
    if "help" in pairs or not argv:
        return print(__doc__)
    if not words or "out" not in pairs:
        raise ValueError("calls needs recordings or folders of them, and --out=DIR; python data.py calls --help shows an example")
    agent, out = pairs.get("agent", ""), Path(pairs["out"])
    if pairs.keys() - {"agent", "out", "rttm"} or (agent not in ("", *SIDES, *ORDER) and "rttm" not in pairs):
        raise ValueError("--agent is left or right (two channels), first or second (one channel) or a speaker of --rttm=FILE, "
                         + f"--out a folder; got {' '.join(f'--{k}={v}' for k, v in pairs.items())}")
    given = read_rttm(pairs["rttm"]) if "rttm" in pairs else {}
    paths = names_of(words)
    rows, bad = [], 0
    for path, name in paths.items():
        try:
            if given and not {name, path.stem} & given.keys():
                raise ValueError(f"{path}: {pairs['rttm']} does not name it, only {', '.join(list(given)[:3])}")
            rows.append(cut_call(path, out, agent, name, given.get(name, given.get(path.stem, ()))))
        except (ValueError, FileNotFoundError) as error:
            bad += 1
            print(visible(f"left out: {error}"), file=sys.stderr)
    if not rows:
        raise ValueError(f"none of {len(paths)} recordings is a usable call; fix those listed above, or name a folder of recordings")
    music = sum(row.pop("hold_music", 0) for row in rows)
    write_rows(out / "calls.jsonl", rows)
    print(f"{out}/calls.jsonl: {len(rows)} calls, {sum(len(row['messages']) for row in rows)} turns, {bad} left out"
          + (f"; {music:.0f} s of hold music are no turn" if music else ""))
