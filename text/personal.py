"""Personal data in what is said: names, e-mail addresses, numbers that point at one person, addresses, birthdays; written or spoken.

    masked("my name is maria o'neill, oh seven double nine three one")         "my name is <name>, <number>"
    python data.py personal FILE                                               recall and precision on labelled lines

A labelled line is "split: text" with [kind:what] around its personal data, as in assets/ivr/personal.txt. A marked part is found
when every letter of it is masked, a masked part is right when every letter of it is marked. Names are known by what introduces
them ("my name is", "speaking", a title) and by a list of first names where that is weak ("it's maria"); numbers by four and more
digits that are no amount, time, date or quantity (text/figures.py). Whatever is neither introduced nor of such a form stays.
English, and a few phrases of Arabic. Next: passages.py.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from options import split_arguments, visible
from text.figures import MONTH_NAMES, WORD, ZEROS, Figure, read_figures

KINDS = ("email", "birth", "address", "name", "number")         # where parts overlap, the first of these keeps its place


class Span(NamedTuple):
    start: int
    end: int
    kind: str


# ---- names ----

LETTER = r"[^\W\d_]"
NAME = rf"{LETTER}+(?:['’-](?!s\b){LETTER}+)*"
PARTICLES = set("van der den de la le du da di del della von zu al el bin ibn ten ter dos das mac st".split())
FIRST = set("""aaron adam adele ahmed aisha alan alex ali alice alicia amanda amina amir amy ana andrea andrew angela anita ann anna anne
anthony antonio barbara beatrice ben benjamin bernard beth bob brenda brian bruno carl carla carlos carmen caroline catherine cedric
charlotte chen chloe chris christina claire claudia colin craig cynthia daniel danielle david deborah deepak denise dennis derek diana
diego donna doris dorothy edith eduardo edward eleanor elena eli elias elizabeth ella ellen emily emma eric erin esther eva evelyn fatima
felix fernando fiona frances francesca frank gabriel gareth gary george georgia gerald gina giulia gloria gordon greg hannah harold harry
hassan heather hector helen helena henrik henry hugo hussein ian ibrahim ingrid irene isaac isabel ivan jack jacob jake james jan jane
janet jason javier jean jeff jennifer jenny jessica jim joan joanna joe john jonas jonathan jorge jose josé joseph josh joyce juan judith
julia julian julie karen karim karl kate katherine kathleen keith kelly ken kevin kim kumar kyle lars laura lauren leah leila leo leon
leonard liam linda lisa louise lucas lucia lucy luis luke lydia magda maria marie mario martha martin mary matthew maureen megan mehmet
melissa michael michelle miguel mike mohamed mohammed monica nadia nancy naomi natalie nathan neil nicholas nicole nina noah nora noor
nour olga oliver olivia omar oscar pablo pamela patricia patrick paul paula pedro peter phil philip pierre pieter priya rachel rafael raj
rania raymond rebecca ricardo richard rita robert roberto robin roger ron rosa ruth ryan said salma sam samantha samir samuel sandra sara
sarah scott sean sergio sharon sheila simon siobhan sofia sonia sophie stefan stephanie stephen steve steven stuart sunita susan suzanne
tamara tanya tara teresa tessa theresa thomas tim timothy tina tom tomas tomasz tony valerie vanessa victor victoria vincent virginia
walter wendy william yasmin yara yusuf yvonne zainab zoe zoë""".split())
STOP = set("""a about above account address after again ago all almost already also always am an and another any anyone are aren't around
as asked at away back bad be because been before being believe better bit both bought box broken but by call called calling came can can't
cannot card charged check checking come could customer day days dead delivered delivery did didn't do does doesn't done don't down due
each early else enough even ever every everything excuse expecting fine first find for found from get getting give given go going gone
good got had happy has hasn't have having he hello help her here hers hi him his hold home hope how i i'd i'll i'm i've id if ill in
interested into invoice is isn't it it's its just keep know last late later left less let like line little long look looked looking lost
lot made mail make manager maybe me mine misspelled misspelt incorrect different missing moment more most moved much must my near need
never new next no nobody none not nothing now number of off ok okay old on once one only open or order orders our ours out over own page
parcel paid pay phone please probably product quite ready really refund reply right ringing said same saw say see seems send sent service
she shop should shipped since site so some someone sorry spelled spelt spoke speaking still stuck such sure take talk team tell thank
thanks that that's the their them then there these they thing things think this those three through till time to today together tomorrow
too tried trouble try trying two under until up upset urgent us use used very waiting want wanted was wasn't way we we'll we're we've web
website week well went were what what's when where which while who whose why will with without won't wondering work working worried would
wrong yeah yes yesterday yet you you'll you're your yours dot underscore dash hyphen email name bank insurance ltd limited inc support
supply company department desk office group services store warehouse freight post reception sales billing technical ridiculous
unacceptable terrible mr mrs ms miss mister doctor dr sir madam morning afternoon evening""".split())
STOP |= set(MONTH_NAMES) | set("monday tuesday wednesday thursday friday saturday sunday christmas easter".split())
STOP |= set(WORD.split("|"))
ARABIC_STOP = set("من في على إلى عن هنا أريد هو هي".split())
NAMED = re.compile(r"""(?:\b(?:my\s+)?(?:name|surname)(?:\s+on\s+(?:the|my|this)\s+\w+)?
        (?:\s+is|['’]s|\s*:)(?:\s+(?:spelled|spelt|under|just))?
    | \b(?:my|first|last|full|family|given|maiden)\s+name(?:\s+is|['’]s)? | \bsurname | \b(?:in|under)\s+the\s+name(?:\s+of)?
    | \bcall\s+me | \bon\s+behalf\s+of | \b(?:mrs?|ms|miss|mister|dr|doctor|madam)\b\.?
    | (?<!\w)(?:اسمي|معك|السيد|السيدة|الأستاذ|الأستاذة))\s+""", re.I | re.X)
PERHAPS = re.compile(r"""(?:\b(?:(?:this\s+is|i\s+am|i['’]m|it['’]s|it\s+is)(?:\s+not)?|here\s+is|hello|hi|hey|thank\s+you|thanks|dear
    |good\s+\w+|under|wife|husband|partner|son|daughter|brother|sister|mother|father|mum|dad|friend|neighbour|colleague|holder
    |(?:asked|ask)\s+for|reached|(?:speak|speaking|talk|talking)\s+(?:to|with))\b | ^ | [,;.])[,\s]*""", re.I | re.X)
SAYS = re.compile(r"\s+(?:speaking|calling)\b", re.I)
SPELT = re.compile(rf"""(?<![\w'’])(?:{LETTER}(?:[\ -]|,\ )){{3,}}{LETTER}(?!\w)
    | (?:(?<=spelled\ )|(?<=spelt\ ))(?:{LETTER}[\ -]){{2,}}{LETTER}\b""", re.I | re.X)
WORD_AT = re.compile(NAME)


def name_at(text: str, start: int, most: int = 3) -> int:
    """Where the name that begins at `start` ends; `start` itself if none does. Capitals, where there are any, say how far it goes."""
    end, place, words, capital = start, start, 0, text[start : start + 1].isupper()
    while words < most and (m := WORD_AT.match(text, place)):
        word = m[0].lower().replace("’", "'")
        if word in PARTICLES and not (words and capital and m[0][0].isupper()):
            place = m.end() + 1
            continue
        if word in STOP | ARABIC_STOP or (capital and not m[0][0].isupper()) or (words and word[0] == "و"):
            break
        end, words, place = m.end(), words + 1, m.end() + 1
        if text[end : end + 1] != " ":
            break
    return end if words else start


def names(text: str) -> Iterator[Span]:
    """Names that are introduced, that are spelled, or that are first names or capitalised where a name is likely."""
    for m in NAMED.finditer(text):
        end, first = name_at(text, m.end()), text[m.end() :].split(" ")[0]
        word = m[0].strip(" .").lower() in ("miss", "doctor")                       # I miss something
        if end > m.end() and (not word or first[0].isupper() or first.lower() in FIRST):
            yield Span(m.end(), end, "name")
    for m in PERHAPS.finditer(text):
        end, cue = name_at(text, m.end()), m[0].strip(" ,;.").lower()
        first, rest = text[m.end() : end].split(" ")[0], text[end:]
        says = SAYS.match(rest) or (cue.startswith(("good", "hello", "hi", "hey")) and re.match(r"\s+here\b", rest))
        known = first.lower() in FIRST
        if re.match(r"\d| (?!I\b)[A-Z]", rest) and not known:                     # This is Harbour Supply, it is under TR4
            continue
        whole = cue or not known or says or first[0].isupper() or not rest.strip() or rest[0] in ",.;!?"
        if end > m.end() and (known or (cue and first[0].isupper()) or (says and not first.endswith("ing"))):
            yield Span(m.end(), end if whole else m.end() + len(first), "name")
    for m in WORD_AT.finditer(text):                                               # Is Sarah there?
        if m[0].lower() in FIRST - {"said"} and m[0][0].isupper():
            yield Span(m.start(), name_at(text, m.start()), "name")
    yield from (Span(*m.span(), "name") for m in SPELT.finditer(text))


# ---- e-mail ----

PART = r"[^\W_][\w.'+%-]*"
DOT = r"\s+(?:dot|point)\s+"
JOINED = r"(?:dot|point|underscore|dash|hyphen|minus|plus)"
EMAIL = re.compile(rf"(?:{PART}\s?@\s?)[\w-]+(?:(?:\.|{DOT})[\w-]+)+", re.I)
DOMAIN = re.compile(rf"""\s+at\s+((?:(?!(?:at|dot)\b)[\w-]+(?:\s+(?:dash|hyphen|and)\s+|\s+))??
    (?:(?!dot\b)[\w-]+(?:\s+(?:dash|hyphen|and)\s+))*[\w-]+(?:(?:\.|{DOT})[a-z-]{{2,}})+)\b""", re.I | re.X)


def local_part(text: str, end: int) -> int:
    """Where the words before " at some dot com" begin that belong to it: back to a word that is no part of one; `end` without any."""
    start, words = end, list(re.finditer(r"[^\s,;:]+", text[:end]))
    after = ""                                                  # the word behind
    for m in reversed(words):
        word, free = m[0].lower(), text[m.end() : start].strip()
        number = word in WORDS or word in ZEROS
        if free or (word in STOP and not number and not re.fullmatch(JOINED, word) and not re.fullmatch(JOINED, after) and len(word) > 1):
            break
        start, after = m.start(), word
    named = text[start:end].split()
    article = re.search(r"\b(?:an?|the|this|that|your|my|our)\s+$", text[:start], re.I)
    return end if not named or len(named) > 16 or (article and len(named) < 3) else start


def emails(text: str) -> Iterator[Span]:
    yield from (Span(*m.span(), "email") for m in EMAIL.finditer(text))
    for m in DOMAIN.finditer(text):
        if (start := local_part(text, m.start())) < m.start():
            yield Span(start, m.end(), "email")


# ---- numbers ----

WORDS = set(WORD.split("|"))
CUE = re.compile(r"""(?:\b(?:number|no|code|pin|account|order|card|reference|ref|invoice|policy|case|ticket|booking|tracking|phone|mobile
    |cell|telephone|line|id|iban|ssn|social|digits|ending|ends|ended|passport|serial|membership|member|licence|license|reach|text|ring|call|dial
    |on|at|back)\b|\#|رقم|هاتفي|الطلب|رقمي)""", re.I | re.X)
DIRECT = re.compile(r"""(?:\b(?:number|no\.?|code|pin|id|account|iban|reference|ssn|social|digits|ending\ in|ends\ in|booking|order|card)
    (?:\s+on\s+the\s+\w+)?(?:\s+(?:is|in|are|ending|ends))*\s*:?|\#)\s*$""", re.I | re.X)
AMOUNT = re.compile(r"\b(?:costs?|cost me|paid|pay|price|total|charged|worth|about|than|not|over|under|takes?)\s+(?:\w+\s+)?$", re.I)
PLURAL = re.compile(r"\s+(?!(?:is|was|has|does|this|thanks|yes|as|please|us)\b)(?:[a-z]+s|people|percent|kilo|kilometers?|degrees)\b", re.I)
ENDS = re.compile(r"\s*(?:$|[.,;!?]|(?:is|was|please|thanks|and|or|but|that|on|i)\b)", re.I)
LINK = re.compile(r"[\s,./-]{1,2}|\s+(?:dash|slash|hyphen)\s+", re.I)


def pointed(text: str) -> list[tuple[int, int, list[Figure]]]:
    """Figures that may point at a person, those side by side together; no money, times, dates and decimals."""
    found: list[tuple[int, int, list[Figure]]] = []
    for figure in read_figures(text):
        start, end = figure.start, figure.end
        plain = any(v.kind in ("number", "code") and not v.unit for v in figure.values) and not re.search(r"\d[.,/]\d", text[start:end])
        if not plain or figure.ordinal or any(v.kind == "date" for v in figure.values):
            continue
        if lead := re.search(r"(?:(?<![\w'])(?:[A-Z] )+|\bplus |\bdouble )$", text[:start]):
            start = lead.start() if lead[0] not in ("I ", "A ") else start
        before = found[-1] if found else None
        if before and LINK.fullmatch(text[before[1] : start]):
            found[-1] = (before[0], end, [*before[2], figure])
        else:
            found.append((start, end, [figure]))
    return found


def is_pointed(text: str, start: int, end: int, parts: list[Figure]) -> bool:
    """Whether figures side by side are the number of something: by what introduces them, by their length, by how they are said."""
    digits = sum(c.isdigit() for part in parts for c in part.text)
    said = [atom for part in parts for atom in part.atoms]
    spoken = bool(re.search("[a-z]{2}", text[start:end], re.I)) and bool(said)
    cue, direct = CUE.search(text[max(0, start - 40) : start]), DIRECT.search(text[:start])
    whole = len(parts) == 1 and len(said) <= 1                                      # one number, as an amount would be
    year = bool(re.fullmatch(r"(?:19|20)\d\d", parts[0].text)) and len(parts) == 1
    if direct and digits >= 3 and not year and (not PLURAL.match(text, end) or not whole):
        return True
    if whole and (PLURAL.match(text, end) or AMOUNT.search(text[:start])):
        return False
    if spoken:
        return digits >= (3 if cue and len(said) >= 3 else 4) and len(said) >= 3
    return digits >= 5 or (digits == 4 and not year and (bool(cue) or not whole or bool(ENDS.match(text, end))))


IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){3,7}(?: ?[A-Z\d]{1,4})?\b")


def numbers(text: str) -> Iterator[Span]:
    yield from (Span(*m.span(), "number") for m in IBAN.finditer(text))
    yield from (Span(start, end, "number") for start, end, parts in pointed(text) if is_pointed(text, start, end, parts))


# ---- addresses and birthdays ----

STREET = r"street|road|avenue|lane|boulevard|terrace|crescent|gardens|grove|mews|blvd"
VAGUE = r"drive|close|court|square|place|way|row|hill|park|gate|st|rd|ave|dr"         # other words, too: with capitals or behind "live at"
COUNT = "|".join(sorted(WORDS - set(ZEROS), key=len, reverse=True))
HOUSE = rf"(?:\d+\s?[a-z]?|(?:{COUNT})(?:(?:\s+and)?[\s-](?:{COUNT}|oh|o))*)"
FLAT = r"(?:flat|apartment|apt|unit|suite)\s+\w+"
ADDRESS = re.compile(rf"""(?:\b{FLAT},?\s+)?(?<!\w){HOUSE}\s+(?P<name>(?:{NAME}\.?(?:['’]s)?\s+){{1,3}}?)
    (?:(?P<sure>{STREET})|(?P<vague>{VAGUE}))\b(?:\s+(?:{STREET}|{VAGUE})\b)?(?:,?\s+{FLAT})?""", re.I | re.X)
LIVES = re.compile(r"\b(?:live|lives|living|address|deliver|delivered|send|sent|moved|house|home|ship|went|move)\b[^.]{0,24}$", re.I)
OTHERS = re.compile(rf"""{LETTER}+(?:straße|strasse|weg|platz|gasse)\s+\d+\s?[a-z]?\b | \b(?-i:[A-Z]{{1,2}}\d[A-Z\d]?\s\d[A-Z]{{2}})\b
    | شارع\s+\w+(?:\s+\w+)?\s+\d+""", re.I | re.X)
BORN = re.compile(r"""\b(?:born(?:\s+(?:on|in))?|date\s+of\s+birth(?:\s+is|:)?|birth\s?day(?:\s+is|:)?|d\.?o\.?b\.?(?:\s+is|:)?)\s*,?\s*
    (?P<date>(?:on\s+)?(?:the\s+)?)""", re.I | re.X)


def addresses(text: str) -> Iterator[Span]:
    for m in ADDRESS.finditer(text):
        words = re.findall(NAME, m["name"])
        plain = [word for word in words if word.lower() in STOP - {"st"}]
        if not plain and (m["sure"] or all(word[0].isupper() for word in words) or LIVES.search(text[: m.start()])):
            yield Span(*m.span(), "address")
    yield from (Span(*m.span(), "address") for m in OTHERS.finditer(text))


def birthdays(text: str) -> Iterator[Span]:
    for m in BORN.finditer(text):
        end, start = m.end(), m.start("date")
        month = re.match(rf"(?:{'|'.join(MONTH_NAMES)})\w*\.?\s+", text[end:], re.I)
        for figure in read_figures(text):
            begins = figure.start <= end + (month.end() if month else 0) and figure.end > end
            if begins or (end > m.end() and LINK.fullmatch(text[end : figure.start])):
                end = figure.end
        if end > m.end():
            yield Span(start, end, "birth")


# ---- all ----

def personal(text: str) -> list[Span]:
    """The personal data of a text, in order, without overlaps. Tatweel must be gone (`masked` removes it)."""
    found: list[Span] = []
    for span in (span for kind in (emails, birthdays, addresses, numbers, names) for span in kind(text)):
        if not any(span.start < other.end and other.start < span.end for other in found):
            found.append(span)
    return sorted(found)


def masked(text: str, slots: Mapping[str, str]) -> str:
    """The text with its personal data masked: figures as #, the rest as <kind>, and what a slot such as "name" holds as <slot>."""
    text = text.replace("\u0640", "")
    out, place = "", 0
    for start, end, kind in personal(text):
        digits = kind == "number" and any(c.isdigit() for c in text[start:end])
        out, place = out + text[place:start] + (re.sub(r"\d", "#", text[start:end]) if digits else f"<{kind}>"), end
    out += text[place:]
    for slot, value in slots.items():
        if any(word in slot.lower() for word in PRIVATE):
            parts = [re.escape(part) for part in (value, *re.findall(r"\w{3,}", value))]
            out = re.sub(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", f"<{slot}>", out, flags=re.I)
    return out


PRIVATE = ("name", "mail", "phone", "address", "street", "birth", "card", "iban")


# ---- how well ----

MARK = re.compile(r"\[(\w+):([^\]]*)\]")


def unmarked(line: str) -> tuple[str, list[Span]]:
    """A labelled line as its text and the parts that are marked in it."""
    text, spans, place = "", list[Span](), 0
    for m in MARK.finditer(line):
        text += line[place : m.start()]
        spans.append(Span(len(text), len(text) + len(m[2]), m[1]))
        text, place = text + m[2], m.end()
    return text + line[place:], spans


def covered(span: Span, others: Sequence[Span], text: str) -> bool:
    return all(any(o.start <= n < o.end for o in others) for n in range(span.start, span.end) if text[n].isalnum())


def measure(lines: Sequence[str]) -> tuple[int, int, int, int, list[str]]:
    """Labelled lines -> marked parts, those found, masked parts, those right, and the lines with a fault."""
    counts, faults = [0, 0, 0, 0], []
    for line in lines:
        text, marked = unmarked(line)
        found = personal(text)
        hit, right = [covered(span, found, text) for span in marked], [covered(span, marked, text) for span in found]
        counts = [a + b for a, b in zip(counts, (len(hit), sum(hit), len(right), sum(right)), strict=True)]
        if not all(hit + right):
            faults.append(f"{line}    found: {', '.join(text[s.start : s.end] for s in found) or 'nothing'}")
    return *counts, faults


def main(argv: Sequence[str]) -> None:
    words, pairs = split_arguments(list(argv), ("help",))
    if "help" in pairs or not argv:
        return print(__doc__)
    if len(words) != 1 or pairs:
        raise ValueError("personal takes one file of labelled lines; python data.py personal --help shows how they are written")
    if not Path(words[0]).is_file():
        raise FileNotFoundError(f"{words[0]} does not exist; name a file of labelled lines, such as assets/ivr/personal.txt")
    splits: dict[str, list[str]] = {}
    for line in Path(words[0]).read_text(encoding="utf-8").splitlines():
        split, colon, text = line.partition(": ")
        if line.strip() and not line.startswith("#"):
            if not colon or any(m[1] not in KINDS for m in MARK.finditer(text)):
                raise ValueError(f'{words[0]}: {line[:40]!r} is no labelled line; write "split: text", marks are [{"|".join(KINDS)}:...]')
            splits.setdefault(split, []).append(text)
    if not splits:
        raise ValueError(f"{words[0]} holds no labelled line")
    for split, lines in splits.items():
        marked, found, masks, right, faults = measure(lines)
        rates = f"recall {found / max(1, marked):.3f}, precision {right / max(1, masks):.3f}"
        print(f"{split}: {len(lines)} lines, {marked} marked parts, {rates}")
        print(*(visible(f"  {fault}") for fault in faults), sep="\n", end="\n" * bool(faults))
