"""Figures are compared by value: pairs written by hand, half of them equal; readings of speech; the packages for spoken numbers."""

import random
from importlib.util import find_spec

import pytest

from evaluation.metrics import spell, spell_ordinal
from text.figures import Known, figures, read_figures, same_figures

EQUAL = """
1250.00 = $1,250.00
09:00 = 9 am
38.50 = thirty-eight fifty
48213 = forty-eight two one three
40821 = four oh eight two one
٤٨٢١٣ = forty-eight two one three
the total is 2,499.90 euros = two thousand four hundred ninety-nine euros and ninety cents
£7.05 = seven pounds and five pence
75 cents = seventy-five cents
€1.250,00 = 1250 euros
12,000 points = twelve thousand points
$1.5 million = one million five hundred thousand dollars
19% = nineteen percent
٪١٩ = 19 %
we open at 8 = we open at 08:00
it is 14:45 = it is quarter to three pm
at half past six in the evening = at 18:30
ten past eleven at night = 23:10
between 9 and 17:30 = between nine am and half past five pm
noon = 12:00
9:00 AM = nine a.m.
5:45 PM = quarter to six in the evening
seven o'clock = 7:00
nine oh five = 9:05
٩:٣٠ صباحا = 9:30 a.m.
3 June 2026 = 2026-06-03
the third of June = June 3rd
21/12/2025 = December twenty-first, twenty twenty-five
the twenty second of Oct = October 22
١٢ مارس = March the twelfth
nineteen eighty-four = 1984
two thousand and nine = 2009
twenty oh eight = 2008
3.75 = three point seven five
point five = 0.5
two and a half = 2.5
at 9.30 = at half past nine
one eight hundred five five five oh one nine nine = 1 800 555 0199
the fifth floor = the 5th floor
the 112th call = the hundred and twelfth call
+44 20 7946 0958 = oh two oh seven nine four six oh nine five eight
(415) 555-0132 = four one five five five five oh one three two
double seven four nine oh = 77490
card 4929 1234 5678 9012 = card 4929-1234-5678-9012
order AB-77120 = order A B seven seven one two oh
error E forty-two = error e42
007 = double oh seven
a hundred and five = 105
minus twelve = -12
order 48213 of 3 June for $38.50 = order four eight two one three of the third of June for thirty-eight dollars fifty
"""
UNEQUAL = """
twelve thirty = 42
38.50 = 88
48213 = 4821
48213 = forty-eight two one four
1250.00 = 125000
$38.50 = €38.50
19% = 19 dollars
nine thirty am = 21:30
09:00 = 9 pm
quarter to three pm = 15:15
ten past eleven = 10:11
3 June = 3 July
June third = June thirteenth
3 June 2026 = 3 June 2025
2026-06-03 = the fourth of June
nineteen eighty-four = 103
twenty twenty-six = 46
fifth = fifteenth
three point seven five = 375
12,000 = 12
1.5 million = 1,050,000
007 = 7
double seven four nine oh = 7490
+44 20 7946 0958 = 020 7946 0959
five six = eleven
E42 = E24
minus twelve = 12
seventeen fifty = 70.15
two hundred five = 2005
٤٨٢١٣ = ٤٨٢١٤
fifty cents = fifty dollars
between two and three = 23
ninety-nine euros = 99 cents
order 5 of 3 June = order 3 of 5 June
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [tuple(line.split(" = ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize("one, other", pairs(EQUAL))
def test_these_are_the_same_figures(one: str, other: str) -> None:
    assert same_figures(one, other) and same_figures(other, one)


@pytest.mark.parametrize("one, other", pairs(UNEQUAL))
def test_these_are_other_figures(one: str, other: str) -> None:
    assert not same_figures(one, other) and not same_figures(other, one)
    assert figures(one) and figures(other)                                          # both were read


def test_a_reply_is_held_against_every_value_of_its_context() -> None:
    known = Known("lookup: order=48213; total=$1,250.00; due=2026-06-03; opens=09:00")
    assert known.missing("Order four eight two one three, twelve hundred fifty dollars, due on June 3rd, from 9 am, on the 3rd.") == []
    assert known.missing("It is 1250 euros, due on 4 June, from 10 am, for 48 or 9 pm.") == ["1250", "4", "june", "10:00", "48", "21:00"]


def test_words_that_are_no_figures_stay_words() -> None:
    for text in ("Oh, one moment, this one first.", "you may, and they march on", "wait a second", "a double room", "that is the point",
                 "it's half the price, a quarter of it", "I, O and A"):
        assert figures(text) == [], text
    assert figures("four or five days, maybe six; twelve, thirty or fifty") == ["4", "5", "6", "12", "30", "50"]
    assert figures("oh two oh, then 3 one-way tickets") == ["020", "3"]


def test_every_whole_number_is_read_as_it_is_spelled() -> None:
    draw = random.Random(0)
    for n in [*range(2, 130), *(draw.randrange(2, 10 ** draw.randint(2, 11)) for _ in range(300))]:
        assert figures(spell(n)) == [str(n)] == figures(f"{n:,}") and (n < 4 or same_figures(spell_ordinal(n), f"{n}th")), n


@pytest.mark.skipif(not find_spec("text_to_num"), reason="text2num is not installed")
def test_spoken_numbers_are_read_as_text2num_reads_them() -> None:
    from text_to_num import text2num
    draw = random.Random(1)
    for n in (draw.randrange(3, 10 ** draw.randint(1, 9)) for _ in range(200)):
        words = spell(n)
        assert str(text2num(words, "en")) in {str(v.value) for f in read_figures(words) for v in f.values}
