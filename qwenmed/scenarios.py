"""Chooses a scenario for a question by words: `-s auto`, `suggest_scenario`, and the prompts a record is trained with.

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
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenmed import triage
from qwenmed.quantities import chinese_to_digits
from qwenmed.records import Record
from qwenmed.signs import normalise

if TYPE_CHECKING:
    import ahocorasick

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

    present = list(dict.fromkeys(word for _, word in _automaton().iter(text)))
    for scenario, weighted in _table().items():
        here = [word for word in present if word in weighted]
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


def system_prompts(record: Record, general: str, by_scenario: Mapping[str, str], mode: str) -> list[str]:
    """The system prompts that a record is trained with.

    The assistant uses its scenarios' prompts, so a model must meet them in training. A record's scenario is the one
    that the data name, else the one that its question suggests; where nothing speaks for any, it has none.

    Args:
        mode: "general" – always the general prompt; "scenario" – the scenario's where there is one, else the
            general one; "mixed" – the general one, and besides it the scenario's where there is one.
    """
    if record.system is not None:
        return [record.system]
    if mode == "general":
        return [general]
    named = record.scenario if record.scenario is not None else suggested(record.question, by_scenario)
    own = by_scenario.get(named)
    if own is None:
        return [general]
    return [own] if mode == "scenario" else [general, own]


def suggested(question: str, scenarios: Collection[str]) -> str:
    """The scenario that a question's words speak for, or "" where none do."""
    return suggest(question, scenarios, "").scenario


@functools.cache
def _automaton() -> "ahocorasick.Automaton":
    """Finds every word of the table in one pass over a text (a tenth of the time of looking for each)."""
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for weighted in _table().values():
        for word in weighted:
            automaton.add_word(word, word)
    automaton.make_automaton()
    return automaton


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
