"""Write the phone dialogues of assets/ivr from their families: pick wordings, fill slots, split by family.

    python assets/build_ivr.py [--copies=4] [--seed=0] [--out=assets/ivr]
    dialogues.jsonl   train and held-out rows, what configs/ivr_qwen.py reads
    test.jsonl        families that no run ever sees; `python evaluate.py report RUN --sources=assets/ivr/test.jsonl`

A row: {"id", "group", "category", "language", "split", "slots": {name: value}, "messages": [{"role", "content"}]}. Copy
number n of a family takes wording n of each agent line, so every reply occurs, and draws the callers' wordings. A lookup
is a system turn (calls.lookup_turn). Seeded: the same families, copies and seed give the same bytes. A family whose agent
says a slot that neither the caller nor a lookup gave before, or any figure of its own, is refused.
"""

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from corpus.manifest import hash_fraction  # noqa: E402
from corpus.phone_calls import CATEGORIES, SYSTEM, lookup_turn, ungrounded  # noqa: E402
from options import apply, edge, split_arguments, write_rows  # noqa: E402
from text.figures import figures  # noqa: E402

HERE = ROOT / "assets" / "ivr"
MONTHS = "January February March April May June July August September October November December".split()
LISTS = dict(line.split(": ") for line in """\
name: Maria Costa|Jonas Weber|Aisha Rahman|Tom Becker|Elena Petrova|Samuel Okoro|Ingrid Larsen|Karim Haddad|Lucy Chen|Pablo Ruiz
status: packed|shipped|on hold|at customs|being checked
place: garage|front porch|garden shed|back door|bicycle room
reason: heavy snow|a strike|a road closure|a missing part|a public holiday
carrier: Redline Post|Swift Parcel|Blue Van|Northern Freight
device: router|tablet|printer|speaker|headset|camera|phone
item: jacket|lamp|kettle|backpack|armchair|desk|blanket|toaster|pair of boots
city: Lisbon|Bergen|Leeds|Amman|Ghent|Porto|Tallinn|Aarhus|Seville|Turin
country: Norway|Portugal|Jordan|Ireland|Estonia|Belgium|Kuwait
fault: a loose cable|an old driver|a full memory|a weak signal|an overheated fan
shop: corner bakery|station kiosk|flower shop|petrol station""".split("\n"))


@dataclass
class Family:
    """One call in several wordings. A turn is (role, wordings); of a lookup the one wording holds its facts."""

    name: str
    language: str = "en"
    turns: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def category(self) -> str:
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Job:
    """What to build."""

    copies: int = 4              # rows of each family
    seed: int = 0                # of wordings and slots
    out: str = str(HERE)         # folder to write

    def __post_init__(self) -> None:
        assert self.copies > 0, f"copies {self.copies} is not positive"


def read_families(path: Path) -> list[Family]:
    """Parse families.txt; ValueError names the line that is wrong."""
    families: list[Family] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        key, colon, rest = line.partition(": ")
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            families.append(Family(line[1:-1]))
        elif families and colon and key == "language":
            families[-1].language = rest
        elif families and colon and key in ("user", "agent", "lookup"):
            families[-1].turns.append((key, [text.strip() for text in rest.split(" | ")]))
        else:
            raise ValueError(f"{path} line {number}: {line[:40]!r} is neither [category/name] nor user:, agent:, lookup: or language:")
    for family in families:
        check(family)
    return families


def slots_of(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def check(family: Family) -> None:
    """Refuse a family of another category, one that nobody answers, and agents that make something up."""
    if family.category not in CATEGORIES or not any(role == "agent" for role, _ in family.turns):
        raise ValueError(f"family {family.name}: no category of calls.CATEGORIES, or no agent line")
    known: set[str] = set()
    for role, wordings in family.turns:
        given = [slots_of(text) for text in wordings]
        for text, slots in zip(wordings, given, strict=True):
            if role == "agent" and (slots - known or figures(re.sub(r"\{\w+\}", "", text))):
                raise ValueError(f"family {family.name}: the agent makes up {sorted(slots - known) or 'a figure'} in {text!r}")
        if role != "agent":
            known |= set.intersection(*given)


# ---- slots ----

def draw_slots(names: set[str], draw: random.Random, language: str) -> dict[str, str]:
    """A value for every slot; two slots of a row never share one."""
    made: dict[str, str] = {}
    for name in sorted(names):
        made[name] = next(v for v in draws(name, draw, language) if v not in made.values())
    return made


def draws(name: str, draw: random.Random, language: str) -> Iterator[str]:
    kind = name.rstrip("2")
    money = "دينار" if language == "ar" else "euros"
    while True:
        yield draw.choice(LISTS[kind].split("|")) if kind in LISTS else FORMATS[kind](draw).format(money=money)


FORMATS = {
    **dict.fromkeys(("order", "invoice", "case"), lambda draw: str(draw.randrange(10 ** draw.randint(4, 6), 10**7))),
    "date": lambda draw: f"{draw.randint(1, 28)} {draw.choice(MONTHS)}",
    "amount": lambda draw: f"{draw.randint(3, 400)}.{draw.choice('05')}0 {{money}}",
    "tracking": lambda draw: f"TR{draw.randrange(10**7, 10**8)}", "error": lambda draw: f"E{draw.randint(10, 99)}",
    "version": lambda draw: f"{draw.randint(2, 9)}.{draw.randint(0, 9)}",
    "time": lambda draw: f"{draw.randint(8, 20)}:{draw.choice(('15', '30', '45'))}",
    "days": lambda draw: str(draw.randint(3, 30)), "months": lambda draw: str(draw.choice((3, 6, 9, 12, 18, 24))),
    "points": lambda draw: str(draw.randint(120, 9800)), "last4": lambda draw: f"{draw.randrange(10**4):04d}"}


# ---- rows ----

def rows_of(family: Family, split: str, job: Job) -> Iterator[dict]:
    """The copies of a family. Wordings that hold other slots than their neighbours are fine: all are filled alike."""
    for copy in range(job.copies):
        draw = random.Random(f"{job.seed}/{family.name}/{copy}")
        names = {slot for _, wordings in family.turns for text in wordings for slot in slots_of(text)}
        slots = draw_slots(names, draw, family.language)
        messages = [{"role": "system", "content": SYSTEM}]
        for role, wordings in family.turns:
            text = wordings[copy % len(wordings)] if role == "agent" else draw.choice(wordings)
            text = re.sub(r"\{(\w+)\}", lambda m, slots=slots: slots[m[1]], text)
            if role == "lookup":
                facts = dict(pair.split("=", 1) for pair in re.split(r" (?=\w+=)", text))
                messages.append(lookup_turn(facts))
                continue
            before = "\n".join(m["content"] for m in messages)
            made_up = ungrounded(text, before) if role == "agent" else []
            if made_up:
                raise ValueError(f"family {family.name} copy {copy}: the agent makes up {made_up} in {text!r}")
            messages.append({"role": {"agent": "assistant"}.get(role, role), "content": text})
        said = {name: value for name, value in slots.items() if any(value in m["content"] for m in messages)}
        yield {"id": f"{family.name}#{copy}", "group": family.name, "category": family.category, "language": family.language,
               "split": split, "slots": said, "messages": messages}


def splits(families: list[Family]) -> dict[str, str]:
    """Of each category one English family is held out and one is for tests, then two more of several exchanges for each side;
    by hash, never by place in the file."""
    found = {family.name: "train" for family in families}
    for category in CATEGORIES:
        names = sorted((f.name for f in families if f.category == category and f.language == "en"), key=hash_fraction)
        found |= {names[0]: "held-out", names[1]: "test"}
    long = sorted((f.name for f in families if found[f.name] == "train" and sum(role == "agent" for role, _ in f.turns) > 1),
                  key=hash_fraction)
    return found | dict.fromkeys(long[:2], "held-out") | dict.fromkeys(long[2:4], "test")


def save(path: Path, rows: list[dict]) -> None:
    write_rows(path, rows)
    print(f"{path}: {len(rows)} dialogues, {path.stat().st_size // 1024} KB")


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:])
    if words:
        raise ValueError(f"unexpected word {words[0]!r}; options are --copies, --seed and --out")
    job = apply(Job(), pairs)
    families = read_families(HERE / "families.txt")
    side = splits(families)
    rows = [row for family in families for row in rows_of(family, side[family.name], job)]
    save(Path(job.out) / "dialogues.jsonl", [row for row in rows if row["split"] != "test"])
    save(Path(job.out) / "test.jsonl", [row for row in rows if row["split"] == "test"])


if __name__ == "__main__":
    edge(main)
