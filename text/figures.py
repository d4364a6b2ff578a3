"""The figures of a text by value: numbers, money, times, dates, ordinals and dictated digits, written or spoken.

    same_figures("$1,250.00", "twelve hundred fifty dollars")                   True, as 09:00 and 9 am, or ٤٨٢١٣ and 48213
    [f.text for f in read_figures("forty-eight two one three, by 3 June")]      ["48213", "3 june"]
    Known("it comes on 3 June").missing("It comes on the fourth of June.")      ["4"]

Speech leaves open what is meant: "thirty-eight fifty" is 38.50 or 3850, "nine thirty" 9:30, 21:30, 9.30 or 930. A figure
therefore holds every value that it may have, and two figures are the same if they share one. Number words are added only
where grammar adds them: "twelve thirty" is 12:30, 12.30 or 1230 and never 42. Units that both sides name must agree.
Packages for spoken numbers (text2num, word2number) give one reading and cannot say this; a test compares their readings.

English words; digits of any script that text/normalisers.py knows. Next: personal.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import NamedTuple

from evaluation.metrics import ONES, spell, spell_ordinal
from text.normalisers import ARABIC

NUMBERS = {word: n for n, word in enumerate(ONES)} | {spell(n): n for n in range(20, 100, 10)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
ORDINALS = {spell_ordinal(n): n for n in (*range(1, 20), *range(20, 100, 10))}
ZEROS, REPEATS = ("oh", "o", "nought"), {"double": 2, "triple": 3, "treble": 3}
NAMED_TIMES = {"noon": 720, "midday": 720, "midnight": 0}
MONTHS = "january february march april may june july august september october november december".split()
MONTH_NAMES = {name: n for n, name in enumerate(MONTHS, 1)} | {name[:3]: n for n, name in enumerate(MONTHS, 1)} | {"sept": 9}
MONTH_NAMES |= {name: n for n, name in enumerate("يناير فبراير مارس أبريل مايو يونيو يوليو أغسطس سبتمبر أكتوبر نوفمبر ديسمبر".split(), 1)}


class Value(NamedTuple):
    """What a figure may mean: kind number, code, phone, ordinal, time (minutes of a day) or date (year or 0, month, day)."""
    kind: str
    value: str | int | tuple[int, int, int]
    unit: str = ""


@dataclass
class Figure:
    """A figure from `start` to `end` of a text; `text` is its normal form."""

    start: int
    end: int
    text: str
    values: set[Value] = field(default_factory=set)
    atoms: tuple[str, ...] = ()         # the numbers that a spoken one is made of: 48, 2, 1, 3
    ordinal: bool = False

    def names(self) -> list[str]:
        """What it may be called in a table of facts: its digits or its code; nothing for money, times and dates."""
        plain = {str(v.value) for v in self.values if v.kind in ("number", "code") and not v.unit}
        return sorted(plain, key=lambda name: name != self.text)

    def same(self, other: "Figure") -> bool:
        return any(agree(a, b) for a in self.values for b in other.values)


def agree(a: Value, b: Value) -> bool:
    if a.kind == b.kind == "date":
        return a.value[1:] == b.value[1:] and (a.value[0] == b.value[0] or not a.value[0] * b.value[0])
    if {a.kind, b.kind} == {"date", "ordinal"}:                                 # "on the 3rd" of a month that was named before
        day, whole = (a, b) if a.kind == "ordinal" else (b, a)
        return int(str(day.value)) == whole.value[2]
    same_kind = a.kind == b.kind or {a.kind, b.kind} == {"number", "ordinal"}
    return same_kind and a.value == b.value and (a.unit == b.unit or not a.unit or not b.unit)


# ---- numbers in digits ----

def decimal(text: str) -> str:
    """Digits with separators as one number without them: "1,250.00" is 1250, "38,50" 38.5, "4.2.1" and "007" stay."""
    last = max(text.rfind(","), text.rfind("."))
    whole, fraction = (text, "") if last < 0 else (text[:last], text[last + 1 :])
    marks = set(re.findall("[.,]", text))
    if len(marks) == 1 and (text.count(text[last]) > 1 or text[last] == ",") and re.fullmatch(r"\d{1,3}([.,]\d{2,3})*[.,]\d{3}", text):
        whole, fraction = text, ""                                              # 12,000 and 1.250.000; 1.250 is a little over one
    elif len(marks) == 1 and text.count(text[last]) > 1:
        return text                                                             # a version, an address of the internet
    whole, fraction = re.sub("[.,]", "", whole), fraction.rstrip("0")
    return f"{whole}.{fraction}" if fraction else whole


def scaled(number: str, scale: int) -> str:
    """A decimal number times a power of ten: "1.5", 1000 -> "1500"."""
    whole, _, rest = number.partition(".")
    zeros = len(str(scale)) - 1
    return decimal((whole + rest[:zeros].ljust(zeros, "0")).lstrip("0").zfill(1) + ("." + rest[zeros:] if rest[zeros:] else ""))


def of_digits(digits: str) -> set[Value]:
    """A row of digits: a number, a code that may begin with 0, and the phone number that ends so."""
    phone = {Value("phone", digits[-9:])} if len(digits) >= 10 and digits.isdigit() else set()
    return {Value("number", digits)} | phone


def of_times(hour: int, minute: int, half: str = "", exact: bool = False) -> set[Value]:
    """A time of day. Without am or pm ("a", "p") an hour up to 12 may be either, unless it is written as 09."""
    if hour > 24 or minute > 59 or (half and not 1 <= hour <= 12):
        return set() if hour > 24 or minute > 59 else of_times(hour, minute, "", True)
    either = [hour % 24] if exact or not 1 <= hour <= 12 else [hour % 12, hour % 12 + 12]
    return {Value("time", 60 * h + minute) for h in {"a": [hour % 12], "p": [hour % 12 + 12]}.get(half, either)}


def of_dates(year: int, month: int, day: int) -> set[Value]:
    """A date that exists, year 0 = not said; of two digits, of this century or the last."""
    try:
        date(year or 2000, month, day)
    except ValueError:
        return set()
    return {Value("date", (y, month, day)) for y in ([1900 + year, 2000 + year] if 0 < year < 100 else [year])}


WORD = "|".join(sorted((*NUMBERS, *SCALES, *(f"{scale}th" for scale in SCALES), *ORDINALS, *ZEROS, *REPEATS), key=len, reverse=True))
TOKEN = rf"(?:(?:{WORD})\b(?!['’]|\s?clock)|point\b|\d{{1,2}}(?![\w:/%]|[.,]\d))"
SCAN = re.compile(rf"""
    (?P<iso>(?<![\w-])\d{{4}}-\d\d?-\d\d?(?![\w-]))
  | (?P<slash>(?<![\w./])\d\d?[/.]\d\d?[/.](?:\d{{4}}|\d\d)(?![\w/]))
  | (?P<clock>(?<![\w:.])\d\d?:\d\d(?::\d\d)?(?![\d:]))
  | (?P<phone>(?<![\w.])(?:\+\d[\d ()./-]{{5,18}}\d|\(\d{{2,5}}\)[ -]?\d[\d -]{{4,12}}\d|0\d{{1,4}}(?:[ -]\d{{2,8}}){{1,5}}
      |\d{{3}}-\d{{4}}|(?:1[ -])?\d{{3}}[-. ]\d{{3}}[-. ]\d{{4}}|\d{{4}}(?:[ -]\d{{4}}){{2,}}(?:[ -]\d{{1,4}})?
      |\d{{2,4}}(?:-\d{{2,4}}){{2,}})(?!\w))
  | (?P<dictated>(?<![\w.])\d(?:[ -]\d(?![\w.,:/]\d|\w)){{2,}})
  | (?P<scaled>(?<![\w.])(?P<factor>\d+(?:[.,]\d+)*)(?:\s+(?P<scale>hundred|thousand|million|billion)\b|(?P<k>k)\b))
  | (?P<code>(?<![\w])(?:(?:[A-Za-z]{{1,4}}-?\d|[A-Za-z]{{5,12}}-\d{{3}})[A-Za-z\d]*(?:[.-]\d[A-Za-z\d]*)*
      |\d+[A-Za-z]+\d[A-Za-z\d]*|\d+(?-i:[A-Z]{{1,2}}))(?!\w)(?<!\dAM)(?<!\dPM))
  | (?P<fraction>(?<![\w/])\d+/\d+(?![\w/]))
  | (?P<run>(?<!\w)(?:an?\s+(?=hundred|thousand|million|billion))?(?=(?:\d\d?[ -]+)*(?:{WORD}|point\s+(?:{WORD}))\b){TOKEN}
      (?:(?:,?\s+|\s*-\s*|\s+and\s+){TOKEN})*)
  | (?P<named>(?<!\w)(?:noon|midday|midnight)\b)
  | (?P<number>\d+(?:[.,]\d+)*)(?P<nth>(?:st|nd|rd|th)\b)?""", re.I | re.X)


def written(m: re.Match) -> Figure:
    """A figure that is written in digits."""
    said = m[0].lower()
    found = Figure(m.start(), m.end(), said)
    if m["iso"]:
        found.values = of_dates(*map(int, said.split("-")))
    elif m["slash"]:
        one, two, year = map(int, re.split("[/.]", said))
        found.values = of_dates(year, one, two) | of_dates(year, two, one) | {Value("number", said)}
    elif m["clock"]:
        hour, minute = said.split(":")[:2]
        found.values = of_times(int(hour), int(minute), exact=hour[0] == "0")
    elif m["phone"] or m["dictated"]:
        found.text = re.sub(r"\D", "", said.replace("(0)", ""))
        found.values = of_digits(found.text)
    elif m["scaled"]:
        found.text = scaled(decimal(m["factor"]), SCALES["thousand" if m["k"] else m["scale"].lower()])
        found.values = {Value("number", found.text)}
    elif m["code"]:
        found.text = said.replace("-", "")
        found.values = {Value("code", found.text)}
    elif m["named"]:
        found.values = {Value("time", NAMED_TIMES[said])}
    elif m["fraction"]:
        one, two = map(int, said.split("/"))
        found.values = {Value("number", said)} | of_dates(0, one, two) | of_dates(0, two, one)
    else:
        digits, found.ordinal = m["number"], bool(m["nth"])
        comma = re.fullmatch(r"\d+,\d\d?", digits)
        found.text = digits.replace(",", ".") if comma else decimal(digits) if "," in digits else digits
        found.values = {Value("ordinal", digits)} if found.ordinal else of_digits(decimal(digits))
        found.atoms = (digits,)
    return found


# ---- numbers in words ----

class Atom(NamedTuple):
    """A number of a spoken run that grammar keeps together ("forty-eight"), as digits, and what separates it from the one before."""
    digits: str
    start: int
    end: int
    gap: str
    ordinal: bool = False
    dictated: bool = False              # a single digit, or one that is doubled


def atoms_of(m: re.Match) -> list[Atom]:
    """The words of a run, joined to numbers as grammar joins them."""
    found: list[Atom] = []
    total = part = below = biggest = repeat = 0     # a word is added to `part` if it is `below`, a scale to `total` below the `biggest`
    for w in (words := list(re.finditer(r"[a-z]+|\d+", m[0], re.I))):
        word, start, end = w[0].lower(), m.start() + w.start(), m.start() + w.end()
        gap = m.string[found[-1].end : start].strip() if found else ""
        linked = bool(found) and gap in ("", "-", "and") and not found[-1].ordinal
        value = int(word) if word.isdigit() else 0 if word in ZEROS else NUMBERS.get(word, ORDINALS.get(word, -1))
        size, nth = SCALES.get(word.removesuffix("th"), 0), word in ORDINALS or word.removesuffix("th") in SCALES and word[-2:] == "th"
        if word in ("and", "a", "an"):
            continue
        if word in REPEATS:
            repeat, below = REPEATS[word], 0
            found.append(Atom("", start, end, gap, False, True))
            continue
        if repeat and 0 <= value < 10:
            found[-1] = found[-1]._replace(digits=str(value) * repeat, end=end)
        elif linked and gap != "and" and size == 100 and 0 < part < 100:
            part, below = part * 100, 100
        elif linked and gap != "and" and size > 100 and 0 < part < 1000 and size < biggest:
            total, part, below, biggest = total + part * size, 0, 1000, size
        elif linked and 0 < value < below and (gap != "and" or below > 10) and not word.isdigit() and not dictation(words, w, below):
            part, below = part + value, 10 if value >= 20 and value % 10 == 0 else 0
        else:
            total, part, biggest = (size, 0, size) if size > 100 else (0, max(size, value, 0), 10**10)
            below = min(size, 1000) if size else 10 if value >= 20 and value % 10 == 0 and not word.isdigit() else 0
            dot = word == "point"
            found.append(Atom("." if dot else str(total + part), start, end, gap, nth, dot or (size == 0 and value < 10)))
            repeat = 0
            continue
        if not repeat:
            found[-1] = found[-1]._replace(digits=str(total + part), end=end, ordinal=nth, dictated=False)
        repeat = 0
    return [atom for atom in found if atom.digits]


def dictation(words: list[re.Match], at: re.Match, below: int) -> bool:
    """Whether a digit after "hundred" begins a row of digits: "eight hundred, five five five", where nothing is added."""
    row = [word[0].lower() for word in words[words.index(at) : words.index(at) + 2]]
    return below == 100 and len(row) == 2 and all(word in ZEROS or NUMBERS.get(word, 10) < 10 for word in row)


def groups_of(atoms: list[Atom], text: str) -> Iterator[list[Atom]]:
    """Atoms that are said in one breath. A comma stands between dictated digits, and between two numbers."""
    groups: list[list[Atom]] = []
    for atom in atoms:
        before = groups[-1][-1] if groups else None
        near = before is not None and (atom.gap in ("", "-") or (atom.gap == "," and atom.dictated and before.dictated))
        if near and not atom.ordinal and not before.ordinal:
            groups[-1].append(atom)
        else:
            groups.append([atom])
    for group in groups:
        figure = [text[atom.start : atom.end].isdigit() for atom in group]
        listed = any(atom.gap == "," for atom in group[1:]) and sum(len(atom.digits) for atom in group) < 4
        if listed or (len(group) == 2 and figure[0] != figure[1] and "." not in (group[0].digits, group[1].digits)
                      and not 10 <= int(group[1].digits) <= 59):
            yield from ([atom] for atom in group)
        elif len(group) == 2 and text[group[0].start : group[0].end].lower() in ZEROS:          # "oh one moment"
            yield group[1:]
        else:
            yield group


def spoken(m: re.Match) -> Iterator[Figure]:
    """The figures of a run of number words; "oh" alone is none."""
    for group in groups_of(atoms_of(m), m.string):
        start, end, parts = group[0].start, group[-1].end, [atom.digits for atom in group]
        digits = "".join(parts)
        if m.string[start:end].lower() in ZEROS or digits == ".":
            continue
        whole, dot, fraction = digits.partition(".")
        scale = SCALES.get(m.string[start:end].lower().split()[-1], 1) if dot else 1            # one point five million
        name = scaled(f"{whole or 0}.{fraction.removesuffix(str(scale)[1:])}", scale) if fraction else whole
        found = Figure(start, end, name, set(), tuple(parts), group[0].ordinal)
        found.values = {Value("ordinal", digits)} if found.ordinal else of_digits(decimal(found.text))
        two = parts[1:] if len(parts) == 2 else [parts[1] + parts[2]] if len(parts) == 3 and parts[1] == "0" else []
        if two and len(two[0]) == 2 and not dot:                                # 38 50, 9 0 5
            found.values |= {Value("number", decimal(f"{parts[0]}.{two[0]}"))} | of_times(int(parts[0]), int(two[0]))
        yield found


# ---- what stands around a number ----

UNITS = {"$": "usd", "€": "eur", "£": "gbp", "¥": "jpy", "%": "%", "dollar": "usd", "usd": "usd", "euro": "eur", "eur": "eur",
         "pound": "gbp", "quid": "gbp", "gbp": "gbp", "yen": "jpy", "percent": "%", "per cent": "%", "دولار": "usd", "يورو": "eur",
         "دينار": "dinar", "dinar": "dinar", "ريال": "riyal", "riyal": "riyal", "درهم": "dirham", "dirham": "dirham", "جنيه": "egp"}
UNIT = "|".join(sorted(map(re.escape, UNITS), key=len, reverse=True))
UNIT_AFTER = re.compile(rf"\s*-?({UNIT})(?:s\b|(?!\w))", re.I)
UNIT_BEFORE = re.compile(r"([$€£¥]|\b(?:usd|eur|gbp))\s?$", re.I)
CENTS = re.compile(r"\s*(?:cents?|pence|p)\b", re.I)
HALF = re.compile(r"""(?P<clock>\s+o'?\s?clock\b)?(?P<half>\s*(?P<m>[ap])\.?\s?m\b\.? | \s+in\s+the\s+(?P<day>morning|afternoon|evening)\b
                  | \s+at\s+(?P<night>night)\b | \s+(?P<arabic>صباحا|مساء|ظهرا)\w*)?""", re.I | re.X)
PAST = re.compile(r"\b(half|quarter)\s+(past|to|after)\s+$|(?<=\d|\w)\s+(?:minutes?\s+)?(past|to|after)\s+$", re.I)
AT = re.compile(r"\b(?:at|by|until|till|from|before|after|since|between|around|to)\s+(?:about\s+)?$", re.I)
MONTH = rf"(?P<month>{'|'.join(sorted(MONTH_NAMES, key=len, reverse=True))})"
MONTH_BEFORE = re.compile(rf"(?<!\w){MONTH}\.?,?\s+(?:the\s+)?$", re.I)
MONTH_AFTER = re.compile(rf"\s+(?:of\s+)?{MONTH}(?!\w)", re.I)
LETTERS = re.compile(r"(?<![\w.'])((?:[A-Z][ -]?){1,4})$")
WORDS = "|".join((WORD, *MONTH_NAMES, "half", "quarter", "minus", "point"))
GLUE = rf"and|of|the|past|to|after|o|clock|am|pm|[apm]|in|at|morning|afternoon|evening|night|minutes?|cents?|pence|(?:{UNIT})s?"
OPEN = re.compile(rf"(?:(?:\S*\d\S*\s+|[$€£¥]\s*|\b(?:{WORDS})\b\W+)(?:\S*\d\S*\s+|(?:{WORDS}|{GLUE})\b\W+)*)?\S*$", re.I)
"""The end of a text that a figure may still reach: it may go on, or its last word has not ended."""


def with_unit(found: Figure, following: Figure | None, text: str) -> tuple[Figure, bool]:
    """A figure with its currency or percent sign, and whether the cents that follow belong to it."""
    before, after, cents = UNIT_BEFORE.search(text[: found.start]), UNIT_AFTER.match(text, found.end), CENTS.match(text, found.end)
    if more := re.match(r"\s+and\s+a\s+half\b", text[found.end :], re.I) if found.text.isdigit() else None:
        found = Figure(found.start, found.end + more.end(), f"{found.text}.5", {Value("number", f"{found.text}.5")})
    minus = re.search(r"(?:\bminus\s+|(?:^|\s)[-−])$", text[: found.start])
    unit = UNITS[(after or before)[1].lower()] if after or before else ""
    numbers = {v for v in found.values if v.kind == "number"}
    joined = False
    if cents and not unit and re.fullmatch(r"\d\d?", found.text):
        numbers, found.end = {Value("number", decimal(f"0.{int(found.text):02d}"))}, cents.end()
    elif after and following and re.fullmatch(r"\s+(?:and\s+)?", text[after.end() : following.start]) and found.text.isdigit():
        tail = CENTS.match(text, following.end)
        joined = bool(re.fullmatch(r"\d\d?", following.text)) and (bool(tail) or len(following.text) == 2)
        if joined:
            found.text = f"{found.text}.{int(following.text):02d}"
            numbers, found.end = {Value("number", decimal(found.text))}, tail.end() if tail else following.end
    if after and not joined:
        found.end = after.end()
    if unit or cents or minus or joined:
        kept = set() if unit or cents else {v for v in found.values if v.kind != "number"}
        found.values = kept | {Value("number", ("-" if minus else "") + str(v.value), unit) for v in numbers}
    return found, joined


def with_date(found: Figure, following: Figure | None, text: str, done: int) -> tuple[Figure, bool]:
    """A day with the month beside it as a date, and whether the year that follows belongs to it."""
    if not found.atoms or not found.atoms[0].isdigit() or not 1 <= int(found.atoms[0]) <= 31:
        return found, False
    before, after = MONTH_BEFORE.search(text[:found.start]), MONTH_AFTER.match(text, found.end)
    before = None if before and before.start() < done else before
    m = before or (after if len(found.atoms) == 1 else None)
    if m is None or (m["month"] in ("may", "march") and not found.ordinal):          # also verbs
        return found, False
    month, end, year, taken = MONTH_NAMES[m["month"].lower()], max(found.end, m.end() if m is after else 0), "".join(found.atoms[1:]), False
    if following and not year and re.fullmatch(r",?\s+(?:of\s+)?", text[end : following.start]):
        year = next((str(v.value) for v in following.values if re.fullmatch("(?:19|20)\\d\\d", str(v.value))), "")
        taken = bool(year)
    dates = of_dates(int(year or 0), month, int(found.atoms[0])) if re.fullmatch(r"(?:(?:19|20)\d\d)?", year) else set()
    if not dates:
        return found, False
    name = f"{int(found.atoms[0])} {MONTHS[month - 1]} {year}".strip()
    return Figure(m.start() if m is before else found.start, following.end if taken else end, name, dates), taken


def with_time(found: Figure, last: Figure | None, text: str) -> tuple[Figure, bool]:
    """A number as a time of day if the words around it say so, and whether the minutes before it belong to it."""
    past, half, taken = PAST.search(text[:found.start]), HALF.match(text, found.end), False
    hour = int(found.text) if found.text.isdigit() and len(found.text) <= 2 and len(found.atoms) == 1 else -1
    times = {int(v.value) for v in found.values if v.kind == "time"}
    if re.fullmatch(r"\d\d?\.[0-5]\d", found.text) and (half["half"] or AT.search(text[: found.start])):      # at 9.30
        times = {int(v.value) for v in of_times(*map(int, found.text.split(".")))}
    word = (half["m"] or half["day"] or half["night"] or half["arabic"] or "").lower()
    part = {"": "", "a": "a", "morning": "a", "صباحا": "a"}.get(word, "p")
    if past and 0 < hour <= 12:
        minutes = {"half": 30, "quarter": 15}.get((past[1] or "").lower(), 0)
        if not past[1]:
            alone = last is not None and last.end == past.start() and last.text.isdigit() and not AT.search(text[: last.start])
            minutes = int(last.text) if alone and int(last.text) < 60 and (past[3] != "to" or int(last.text) % 5 == 0) else 0
            taken = minutes > 0
        if minutes:
            hour, minutes = (hour - 1 or 12, 60 - minutes) if (past[2] or past[3]) == "to" else (hour, minutes)
            times, found.values, hour = {int(v.value) for v in of_times(hour, minutes)}, set(), -1
            found.start = last.start if taken else past.start()
    if 0 < hour <= 24 and (half["half"] or half["clock"] or AT.search(text[: found.start])):
        times = {int(v.value) for v in of_times(hour, 0)}
        if half["half"] or half["clock"]:
            found.values = set()
    if part and times:
        times, found.values = {t % 720 + 720 * (part == "p") for t in times}, set()
    if times and (half["half"] or half["clock"]):
        found.end = half.end()
    if times and not any(v.kind != "time" for v in found.values):
        found.text = f"{min(times) // 60}:{min(times) % 60:02d}" if part or found.atoms else found.text
    found.values |= {Value("time", t) for t in times}
    return found, taken


def read_figures(text: str) -> list[Figure]:
    """Every figure of a text, in order; "one", "first" and "second" alone are words. Places are those in `text.translate(ARABIC)`."""
    text, raw, found = text.translate(ARABIC), list[Figure](), list[Figure]()
    for m in SCAN.finditer(text):
        raw += spoken(m) if m["run"] else [written(m)]
    skip = False
    for n, (figure, following) in enumerate(zip(raw, [*raw[1:], None], strict=False)):
        if skip:
            skip = False
            continue
        figure, skip = with_date(figure, following, text, found[-1].end if found else 0)
        if not skip and all(v.kind != "date" for v in figure.values):
            figure, taken = with_time(figure, found[-1] if found and n else None, text)
            found = found[:-1] if taken else found
            if letters := LETTERS.search(text[: figure.start]):
                name = re.sub("[ -]", "", letters[1]).lower()
                figure.values |= {Value("code", name + d) for d in [figure.text] if d.isdigit() and name not in ("i", "a")}
            figure, skip = with_unit(figure, following, text)
        found.append(figure)
    return [f for f in found if text[f.start : f.end].lower() not in ("one", "first", "second") or all(v.kind == "time" for v in f.values)]


def figures(text: str) -> list[str]:
    """Every figure of a text in normal form: "4 8 2 1 3" and "48213", "38,50" and "38.50", "E-42" and "e42" are equal."""
    return [figure.text for figure in read_figures(text)]


def same_figures(one: str, other: str) -> bool:
    """Whether two texts hold the same figures, in the same order."""
    a, b = read_figures(one), read_figures(other)
    return len(a) == len(b) > 0 and all(x.same(y) for x, y in zip(a, b, strict=True))


class Known:
    """The figures of a context, such as everything said and looked up before a reply."""

    def __init__(self, context: str) -> None:
        named = read_figures(context)
        self.values = {value for figure in named for value in figure.values}
        self.parts = {part for figure in named for part in figure.text.split()} | set(re.findall(r"\w+", context.lower()))

    def holds(self, figure: Figure) -> bool:
        return any(a in self.values or any(agree(a, b) for b in self.values) for a in figure.values)

    def missing(self, text: str) -> list[str]:
        """The figures of a text that are unknown; of a date the unknown part, or all of it if only its parts are known."""
        strange = [figure.text for figure in read_figures(text) if not self.holds(figure)]
        return [part for name in strange for part in ([p for p in name.split() if p not in self.parts] or [name])]
