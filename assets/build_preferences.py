"""Write assets/ivr/preferences.jsonl: agent turns of the bundled calls, each with a reply that nobody should prefer.

    python assets/build_preferences.py [--seed=0] [--out=assets/ivr]

A row: {"id", "group", "category", "language", "split", "kind", "messages", "chosen", "rejected"}, one of each dialogue of
dialogues.jsonl, at an agent turn drawn from its seed; group and split are those of the dialogue, so no call is on both sides.
The chosen reply is the written one. The rejected one is, in turn,

    made up    the same with other figures or, where it has none, with a claim behind it that nobody looked up
    curt       a few words that help nobody

The builder holds both to what they are: calls.ungrounded finds something in every made-up reply and nothing in a chosen one.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from corpus.phone_calls import ungrounded  # noqa: E402
from options import apply, edge, read_rows, split_arguments, write_rows  # noqa: E402

HERE = ROOT / "assets" / "ivr"
CURT = {"en": "No.|No idea.|Call back later.|Not my job.|Just wait.|Read the website.|So what?|Ask somebody else.".split("|"),
        "ar": "لا.|لا أعرف.|اتصل لاحقا.|هذا ليس عملي.|انتظر.".split("|")}
CLAIMS = {"en": ("Your order {n} comes on {d} May.|That makes {d}.50 euros.|I filed it under {n}.|It takes {d} days.|"
                 + "You have {d} points.").split("|"),
          "ar": "رقم طلبك {n}.|المبلغ {d} دينار.|يستغرق ذلك {d} يوما.".split("|")}


@dataclass(frozen=True)
class Job:
    """What to build."""

    seed: int = 0                # of turns, claims and figures
    out: str = str(HERE)         # folder to write


def made_up(reply: str, context: str, language: str, draw: random.Random) -> str:
    """The reply with figures that the call never named."""
    while True:
        told = re.sub(r"\d", lambda m: str(draw.randint(1, 9)), reply)
        if told == reply:
            told += " " + draw.choice(CLAIMS[language]).format(n=draw.randrange(10**5, 10**7), d=draw.randint(11, 98))
        if ungrounded(told, context):
            return told


def pair(row: dict, number: int, seed: int) -> dict:
    """The preference row of a dialogue; ValueError when what is to be preferred makes something up itself."""
    draw = random.Random(f"{seed}/{row['id']}")
    at = draw.choice([n for n, message in enumerate(row["messages"]) if message["role"] == "assistant"])
    before, chosen = row["messages"][:at], row["messages"][at]["content"]
    context = "\n".join(message["content"] for message in before)
    if ungrounded(chosen, context):
        raise ValueError(f"dialogue {row['id']}: its agent makes up {ungrounded(chosen, context)}; mend families.txt")
    kind = ("made up", "curt")[number % 2]
    rejected = made_up(chosen, context, row["language"], draw) if kind == "made up" else draw.choice(CURT[row["language"]])
    kept = {name: row[name] for name in ("id", "group", "category", "language", "split")}
    return kept | {"kind": kind, "messages": before, "chosen": chosen, "rejected": rejected}


def main() -> None:
    words, given = split_arguments(sys.argv[1:])
    if words:
        raise ValueError(f"unexpected word {words[0]!r}; options are --seed and --out")
    job = apply(Job(), given)
    dialogues = [row for _, row in read_rows(HERE / "dialogues.jsonl", "dialogue")]
    path = Path(job.out) / "preferences.jsonl"
    write_rows(path, [pair(row, n, job.seed) for n, row in enumerate(dialogues)])
    print(f"{path}: {len(dialogues)} pairs, {path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    edge(main)
