"""A prepared data set while it is being made: rows on disk, numbers in memory, counts for the audit.

What is kept in memory is some 60 bytes a record; the rows themselves and their signatures lie in temporary files
without a name, so that five million rows need no more memory than their numbers, and a killed run leaves nothing
behind.
"""

import array
import collections
import contextlib
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from qwenmed import files, findings, near_duplicates, schemas
from qwenmed.records import Problem, Record
from qwenmed.splitting import Groups

# Why a row is left out, besides the checks that `--drop` names.
INVALID, DUPLICATE, DECONTAMINATED = "invalid", "duplicate", "decontaminated"
# How many places are shown for a finding.
EXAMPLES = 8


@dataclass
class Examined:
    """A record that came through, and all that is to be known of it."""

    place: str
    row: str
    key: bytes
    question_key: int
    signature: bytes | None
    length: int
    scenario: str
    named: bool
    found: dict[str, str]
    masked: Counter


@dataclass(frozen=True)
class Rejected:
    """A row that is left out, and the kind of reason."""

    problem: Problem
    kind: str


@dataclass
class Tally:
    """The counts of the audit.

    Attributes:
        read: rows read, by file.
        schemas: the schema that was recognised, by file.
        found: check → records.
        examples: check → some (place, excerpt).
        dropped: reason → records or rows.
        masked: kind of personal data → how many were found.
        scenarios: scenario → records; "" where none is named and none suggests itself.
        suggested: how many of these were suggested and not named by the data.
    """

    read: Counter = field(default_factory=Counter)
    schemas: dict[str, str] = field(default_factory=dict)
    found: Counter = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: collections.defaultdict(list))
    dropped: Counter = field(default_factory=Counter)
    masked: Counter = field(default_factory=Counter)
    scenarios: Counter = field(default_factory=Counter)
    suggested: int = 0

    def note(self, check: str, place: str, excerpt: str) -> None:
        """Count a finding, and keep it as an example while there are few."""
        self.found[check] += 1
        if len(self.examples[check]) < EXAMPLES:
            self.examples[check].append((place, excerpt))


class Collection:
    """Everything that came through, by number.

    Args:
        folder: where the temporary files lie; the disk of the output, where the room is needed anyway.
        near_duplicate: Jaccard similarity from which on texts are near-duplicates; 0 for no such check.
        drop: checks whose rows are left out.
    """

    def __init__(self, folder: Path, near_duplicate: float, drop: Container[str]) -> None:
        self.tally = Tally()
        self.lengths = array.array("I")
        self._open = stack = contextlib.ExitStack()
        self.dropped: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        self._drop = drop
        self._lines: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        self._offsets, self._sources = array.array("Q"), array.array("H")
        self._keys, self._questions, self._conversations = array.array("Q"), array.array("Q"), array.array("I")
        self._scenarios, self._scenario_names = array.array("I"), {"": 0}
        self._written, self._last_place = 0, ""
        self._kept = bytearray()
        self._near = near_duplicates.Index(folder, near_duplicate) if near_duplicate else None
        if self._near:
            self._open.callback(self._near.close)

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, examined: Examined, source: int) -> None:
        """Take a record."""
        line = f"{examined.row}\t{examined.place}".encode()  # a tab inside of JSON is escaped
        self._lines.write(line)
        new = examined.place != self._last_place
        self._conversations.append(len(self) if new else self._conversations[-1])
        self._last_place = examined.place
        self._offsets.append(self._written)
        self._written += len(line)
        self._sources.append(source)
        self._scenarios.append(self._scenario_names.setdefault(examined.scenario, len(self._scenario_names)))
        self.lengths.append(examined.length)
        self._keys.frombytes(examined.key)
        self._questions.append(examined.question_key)
        if self._near:
            self._near.add(examined.signature)
        tally = self.tally
        tally.masked.update(examined.masked)
        tally.scenarios[examined.scenario] += 1
        tally.suggested += bool(examined.scenario) and not examined.named
        for check, excerpt in examined.found.items():
            tally.note(check, examined.place, excerpt)
        unwanted = next((check for check in examined.found if check in self._drop), None)
        self._kept.append(unwanted is None)
        if unwanted:
            self.drop(Problem(examined.place, findings.BY_KEY[unwanted].title), unwanted)

    def drop(self, problem: Problem, kind: str) -> None:
        """Write down what is left out, and why."""
        self.tally.dropped[kind] += 1
        self.dropped.write(files.to_jsonl([{"place": problem.place, "reason": problem.reason}]).encode())

    def settle(self) -> tuple[array.array, Groups]:
        """Drop duplicates, then find what belongs together; the numbers of the rows that stay, and their groups."""
        self._drop_duplicates()
        groups = Groups(len(self))
        for number, first in enumerate(self._conversations):
            if number != first:
                groups.join(first, number)
        # Joined whether they stay or not: two that stay may have only one in common that does not.
        for first, later in self._equal(self._questions):
            groups.join(first, later)
            if self._kept[first] and self._kept[later]:
                self.tally.note("same_question", self.place(later), f"与 {self.place(first)} 问题相同")
        noted = set()
        for first, later in self._near.pairs() if self._near else ():
            groups.join(first, later)
            if not (self._kept[first] and self._kept[later]) or later in noted:
                continue
            noted.add(later)
            alike = Problem(self.place(later), f"与 {self.place(first)} 近似重复")
            self.tally.note("near_duplicate", alike.place, alike.reason)
            if "near_duplicate" in self._drop:
                self._kept[later] = 0
                self.drop(alike, "near_duplicate")
        return array.array("I", (number for number, kept in enumerate(self._kept) if kept)), groups

    def source(self, number: int) -> int:
        """The number of the source that a record came from."""
        return self._sources[number]

    def place(self, number: int) -> str:
        """Where a record was read."""
        return self._line(number)[0]

    def row(self, number: int) -> tuple[str, Record]:
        """A record's line of JSON as it is written, and the record with its scenario, suggested where none is named."""
        place, line = self._line(number)
        parsed = schemas.parse_row(json.loads(line), place)
        assert isinstance(parsed, list), parsed  # it was parsed, and written by us
        return line, dataclasses.replace(parsed[0], scenario=list(self._scenario_names)[self._scenarios[number]])

    def close(self) -> None:
        """Let the temporary files go."""
        self._open.close()

    def _line(self, number: int) -> tuple[str, str]:
        start, after = self._offsets[number], self._offsets[number + 1] if number + 1 < len(self) else self._written
        self._lines.seek(start)
        line, _, place = self._lines.read(after - start).decode().partition("\t")
        return place, line

    def _drop_duplicates(self) -> None:
        for first, later in self._equal(self._keys):
            if self._kept[later] and self._kept[first]:
                self._kept[later] = 0
                self.drop(Problem(self.place(later), f"与 {self.place(first)} 完全重复"), DUPLICATE)

    def _equal(self, keys: array.array) -> Iterator[tuple[int, int]]:
        """(first, later) numbers of equal keys among the rows that are kept, in the order of the later ones."""
        import numpy

        wide = numpy.frombuffer(keys, dtype=numpy.uint64).reshape(len(self), -1) if len(self) else None
        if wide is None:
            return
        # Of a key's two halves one orders the rows; the other tells apart what has it in common by chance.
        order = numpy.lexsort((wide[:, -1], wide[:, 0]))
        same = (wide[order[1:]] == wide[order[:-1]]).all(axis=1)
        pairs: list[tuple[int, int]] = []
        first = -1
        for place in numpy.flatnonzero(same):
            number, before = int(order[place + 1]), int(order[place])
            first = first if pairs and pairs[-1][1] == before else before
            pairs.append((first, number))
        yield from sorted(pairs, key=lambda pair: pair[1])
