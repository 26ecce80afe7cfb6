"""Chooses a scenario for a question by words: `-s auto` and `suggest_scenario`.

The words stand in scenarios.csv, each group with a weight, for anyone to correct. A scenario's points are
those of its heaviest word in the text and a part of each further one's, a longer word hiding the shorter ones within
it; an age counts for the child or the old person. Whom it is about weighs more than what it is about, as at a hospital's reception: a child with a fever is
the paediatrician's. An emergency by the urgency rules counts for the emergency scenario; its fixed text does not
depend on the scenario.

Limits: words, not meaning. Measured in tests/test_scenarios.py.
"""

import csv
import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from qwenmed import triage
from qwenmed.quantities import chinese_to_digits
from qwenmed.signs import normalise

NO_CLUE = "问题里没有明显的线索"

TABLE = Path(__file__).with_name("scenarios.csv")
EMERGENCY_POINTS = 5
# What every word beyond a scenario's heaviest counts.
FURTHER_WORDS = 0.4
AGE_POINTS = 7
CHILD_UNTIL, OLD_FROM = 14, 65

# 父亲75：an age that a relative's name says is one.
_BARE_AGE = re.compile(
    r"(?:父亲|母亲|爸|妈|爷|奶|岳父|岳母|老伴|姑|舅|伯|婶|他|她)(?:今年|都|快|已经)?([6-9][0-9])(?![0-9.%/])"
)
_AGE = re.compile(r"([0-9]{1,3}|[一二两三四五六七八九]?十[一二三四五六七八九]?|[一二两三四五六七八九])(?:多|几|来)?岁")


@dataclass(frozen=True)
class Suggestion:
    """A scenario and why: the words that spoke for it, or that there were none."""

    scenario: str
    reason: str


def suggest(question: str, scenarios: Collection[str], fallback: str) -> Suggestion:
    """The scenario that a question fits best; deterministic.

    Args:
        scenarios: the known ids; of two with equal points the one that stands first in the table wins.
        fallback: what is taken when nothing speaks for any of them.
    """
    text = normalise(question)
    found: dict[str, list[tuple[int, str]]] = {}

    def count(scenario: str, weight: int, word: str) -> None:
        found.setdefault(scenario, []).append((weight, word))

    for scenario, weighted in _table().items():
        here = [word for word in weighted if word in text]
        for word in here:
            if not any(word != other and word in other for other in here):
                count(scenario, weighted[word], word)
    for age in [*_AGE.finditer(text), *_BARE_AGE.finditer(text)]:
        years = int(chinese_to_digits(age[1]))
        if years <= CHILD_UNTIL:
            count("pediatric", AGE_POINTS, age[0])
        elif years >= OLD_FROM:
            count("geriatric", AGE_POINTS, age[0])
    if triage.assess(question).level == triage.EMERGENCY:
        count("emergency", EMERGENCY_POINTS, "可能是急症")
    known = [scenario for scenario in _table() if scenario in scenarios and scenario in found]
    if not known:
        return Suggestion(fallback, NO_CLUE)
    best = max(known, key=lambda scenario: _points([weight for weight, _ in found[scenario]]))
    heaviest = sorted(found[best], key=lambda pair: -pair[0])
    return Suggestion(best, "、".join(word for _, word in heaviest[:4]))


def _points(weights: list[int]) -> float:
    """The heaviest word in full, the others in part: many weak words make no strong one."""
    return max(weights) + FURTHER_WORDS * (sum(weights) - max(weights))


@functools.cache
def _table() -> dict[str, dict[str, int]]:
    """Scenario → word → weight; the heaviest where a word stands twice."""
    table: dict[str, dict[str, int]] = {}
    with TABLE.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            weights = table.setdefault(row["场景"], {})
            for word in row["词"].split("/"):
                word = normalise(word)
                weights[word] = max(int(row["分"]), weights.get(word, 0))
    return table
