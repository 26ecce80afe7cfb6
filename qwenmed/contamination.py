"""Which training rows repeat what a model will be evaluated on: shared 13-grams, as in GPT-3's appendix C.

A unit is a Chinese character or a run of Latin letters or digits, punctuation left out; 13 of them in a row that
stand in the held-out texts and in a training text are an overlap. A held-out text that is shorter than that (most
questions are) overlaps where the whole of it stands in the row's question, so that a common phrase removes nothing.

Limits: a rewording is not found; a training row may share a guideline's sentence without having been copied.
"""

import collections
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from qwenmed import files, schemas
from qwenmed.errors import UserError
from qwenmed.records import Problem, Record
from qwenmed.rows import DATA_SUFFIXES, data_files, kind, read_rows, shown

NGRAM = 13
# A shorter whole text ("头痛怎么办") says too little.
SHORTEST = 6
# The fields of an evaluation row that hold what must not have been trained on, whatever its schema. `instruction` is
# none of them: it may be a system prompt.
TEXT_FIELDS = (
    "question", "query", "problem", "prompt", "input", "options", "answer", "output", "response", "solution", "text",
    "content", "value",
)  # fmt: skip

_UNIT = re.compile(r"[a-z0-9]+|[^\W_a-z0-9]")


def units(text: str) -> list[str]:
    """A text's characters, and Latin words and numbers as one each."""
    return _UNIT.findall(unicodedata.normalize("NFKC", text).lower())


class HeldOut:
    """The n-grams of what is held out.

    Args:
        paths: evaluation files in any format that can be read, or .txt lists with one n-gram a line.
        mapping: as in `schemas.parse_row`, for rows that are recognised by nothing else.

    Raises:
        UserError: a file is missing or broken, or holds no text.
    """

    def __init__(self, paths: Iterable[Path], mapping: Mapping[str, str] | None = None) -> None:
        self._long: dict[str, str] = {}
        self._short: dict[str, str] = {}
        for path in paths:
            before = len(self)
            for place, text in _texts(path, mapping):
                self._add(units(text), place)
            if len(self) == before:
                raise UserError("没有可以对照的文本", path, f"至少要有 {SHORTEST} 个字")
        self._lengths = sorted({len(key.split()) for key in self._short})

    def __len__(self) -> int:
        return len(self._long) + len(self._short)

    def overlap(self, record: Record) -> tuple[str, str] | None:
        """The first shared piece and where it is held out, or None."""
        asked = units(record.question)
        for text, lengths, known in (
            (asked, [NGRAM], self._long),
            (units(record.think), [NGRAM], self._long),
            (units(record.answer), [NGRAM], self._long),
            (asked, self._lengths, self._short),
        ):
            for length in lengths:
                for start in range(len(text) - length + 1):
                    if place := known.get(" ".join(text[start : start + length])):
                        return "".join(text[start : start + length]), place
        return None

    def _add(self, found: list[str], place: str) -> None:
        if SHORTEST <= len(found) < NGRAM:
            self._short.setdefault(" ".join(found), place)
        for start in range(len(found) - NGRAM + 1):
            self._long.setdefault(" ".join(found[start : start + NGRAM]), place)


def _texts(path: Path, mapping: Mapping[str, str] | None) -> Iterable[tuple[str, str]]:
    if path.suffix.lower() == ".txt":
        for number, line in enumerate(files.read_lines(path), 1):
            yield f"{shown(path)}:{number}", line
        return
    if path.is_file() and kind(path) not in DATA_SUFFIXES:
        raise UserError("不支持的格式", path, f"支持 .txt（每行一段）和 {'、'.join(DATA_SUFFIXES)}")
    tasks: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for file in data_files(path):
        for place, row in read_rows(file):
            if isinstance(row, Problem):
                raise UserError(row.reason, place, "请改正评估文件，否则会漏掉它")
            yield from ((place, text) for text in _strings(row, inside=False))
            for record in _records(row, place, mapping):
                if task := _task(row):
                    tasks[task].append((place, record.question))
                else:
                    yield place, record.question
                yield place, record.answer
                yield from ((place, text) for turn in record.history for text in turn)
    # A task that several rows share ("请根据患者的描述回答") is no question: it would remove every row that has it too.
    yield from (asked[0] for asked in tasks.values() if len(asked) == 1)


def _records(row: object, place: str, mapping: Mapping[str, str] | None) -> list[Record]:
    """What a row asks and answers, where its schema is recognised."""
    parsed = schemas.parse_row(row, place)
    if isinstance(parsed, Problem) and mapping:
        parsed = schemas.parse_row(row, place, mapping)
    return parsed if isinstance(parsed, list) else []


def _task(row: Mapping[str, object]) -> str:
    """The instruction of an Alpaca row that has an input besides; the input counts in any case."""
    both = schemas.recognise(row) == schemas.ALPACA and str(row.get("input") or "").strip()
    return str(row["instruction"]) if both else ""


def _strings(value: object, inside: bool) -> Iterable[str]:
    """The texts of the fields that count, also where they lie deeper (messages, options)."""
    if isinstance(value, str):
        if inside:
            yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, inside or str(name).lower() in TEXT_FIELDS)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, inside)
