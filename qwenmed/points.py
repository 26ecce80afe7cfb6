"""How much a question sounds like an emergency, or like something for a doctor today: for what no rule foresaw.

A table (urgency/points.csv) gives points to phrases of one to three characters. They were fitted by logistic
regression to the labelled questions of tests/triage (benchmarks/fit_points.py): a doctor corrects them by adding
questions there. The points of the phrases in a text, each counted once, are added to those of the empty phrase;
100 points are one unit of log odds, so 0 means as many emergencies as others among the questions of the fit.
"""

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from qwenmed.signs import TABLES, pieces

PHRASE_LENGTH = 3
# The questions of the fit are shorter; of longer texts each piece is weighed, and the most urgent one counts.
LONGEST = 300

TABLE = TABLES / "points.csv"
CRISIS_TABLE = TABLES / "crisis.csv"

_Number = TypeVar("_Number", int, complex)


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
    sums = [_sum(_table(), piece) for piece in pieces(text, LONGEST)]
    return Points(int(max(each.real for each in sums)), int(max(each.imag for each in sums)))


def weigh_crisis(text: str) -> int:
    """For suicide, self-harm or violence against other emergencies: points of a normalised text."""
    return max(_sum(_crisis_table(), piece) for piece in pieces(text, LONGEST))


def _sum(table: Mapping[str, _Number], text: str) -> _Number:
    return sum(filter(None, map(table.get, phrases(text))), table[""])


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
    return {phrase: complex(int(emergency), int(today)) for phrase, emergency, today in _rows(TABLE)}


@functools.cache
def _crisis_table() -> dict[str, int]:
    return {phrase: int(points) for phrase, points in _rows(CRISIS_TABLE)}


def _rows(path: Path) -> list[list[str]]:
    """The rows of a table below its head."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))[1:]
