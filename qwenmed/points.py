"""How much a question sounds like an emergency, or like something for a doctor today: for what no rule foresaw.

A table (urgency/points.csv) gives points to phrases of one to three characters. They were fitted by logistic
regression to the labelled questions of tests/triage (benchmarks/fit_points.py): a doctor corrects them by adding
questions there. The points of the phrases in a text, each counted once, are added to those of the empty phrase;
100 points are one unit of log odds, so 0 means as many emergencies as others among the questions of the fit.
"""

import csv
import functools
from typing import NamedTuple

from qwenmed.signs import TABLES, pieces

PHRASE_LENGTH = 3
# The questions of the fit are shorter; of longer texts each piece is weighed, and the most urgent one counts.
LONGEST = 300

TABLE = TABLES / "points.csv"
CRISIS_TABLE = TABLES / "crisis.csv"


class Points(NamedTuple):
    """What a text weighs.

    Attributes:
        emergency: for an emergency against everything else.
        today: for an emergency or a doctor today against everything else.
    """

    emergency: int
    today: int


def weigh(text: str) -> Points:
    """The points of a normalised text, in time proportional to its length."""
    if len(text) <= LONGEST:
        return _weigh(text)
    weights = [_weigh(piece) for piece in pieces(text, LONGEST)]
    return Points(max(w.emergency for w in weights), max(w.today for w in weights))


def _weigh(text: str) -> Points:
    table = _table()
    total = sum(filter(None, map(table.get, phrases(text))), table[""])
    return Points(int(total.real), int(total.imag))


def weigh_crisis(text: str) -> int:
    """For suicide, self-harm or violence against other emergencies: points of a normalised text."""
    table = _crisis_table()
    return max(sum(table.get(phrase, 0) for phrase in phrases(piece)) + table[""] for piece in pieces(text, LONGEST))


def phrases(text: str) -> set[str]:
    """Every stretch of one to three characters."""
    found = set(text)
    for length in range(2, PHRASE_LENGTH + 1):
        found.update([text[i : i + length] for i in range(len(text) - length + 1)])
    return found


def telling(text: str, count: int = 3) -> tuple[str, ...]:
    """The phrases of at least two characters that speak most for an emergency, none inside of another."""
    known = ((phrase, _table().get(phrase, 0j).real) for phrase in phrases(text) if len(phrase) > 1)
    speaking = {phrase: points for phrase, points in known if points > 0}
    chosen: list[str] = []
    for phrase in sorted(speaking, key=lambda phrase: (-speaking[phrase], phrase)):
        if len(chosen) == count:
            break
        if not any(phrase in other or other in phrase for other in chosen):
            chosen.append(phrase)
    return tuple(chosen)


@functools.cache
def _table() -> dict[str, complex]:
    """Phrase → both points as one number, emergency + today·i: one look-up and one addition serve for both."""
    with TABLE.open(encoding="utf-8-sig", newline="") as file:
        return {row[0]: complex(int(row[1]), int(row[2])) for row in list(csv.reader(file))[1:]}


@functools.cache
def _crisis_table() -> dict[str, int]:
    with CRISIS_TABLE.open(encoding="utf-8-sig", newline="") as file:
        return {row[0]: int(row[1]) for row in list(csv.reader(file))[1:]}
