"""A batch: questions in, row by row, and a results file that survives a kill.

What is wrong with one row stays with that row. Files are read and written row by row, so that a hundred thousand
questions take no more memory than ten (a JSON list excepted: it is one document and read whole).

The results grow as FILE.partial. `--resume` collects what earlier tries have answered in FILE.answered and finds
each row there by what was asked: id, question, scenario and `settings`, a short hash of model, system prompt and settings.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qwenmed import files, rows
from qwenmed.errors import UserError
from qwenmed.records import Problem

# Stands for a scenario that is chosen by the question.
AUTO = "auto"


@dataclass(frozen=True)
class Request:
    """One question of a batch.

    Attributes:
        id: the row's own id, or its number from 1.
        question: what is asked.
        scenario: a scenario id, or `AUTO`.
        max_tokens: limit of new tokens.
        error: why the row can't be asked, or None.
    """

    id: Any
    question: str
    scenario: str
    max_tokens: int
    error: str | None = None


class Requests:
    """The questions of a file: iterates over them anew each time, and knows how many they are.

    The file is read through once at the beginning, so that what is wrong with it as a whole shows before any work.

    Args:
        path: a JSON list, JSONL, or CSV of questions (text, or rows with `question`).
        scenarios: the known scenario ids.
        scenario, max_tokens: for rows that don't say.

    Raises:
        UserError: the file is missing, empty, broken, or no list.
    """

    def __init__(self, path: Path, scenarios: Collection[str], scenario: str, max_tokens: int) -> None:
        self._path, self._scenarios = path, scenarios
        self._scenario, self._max_tokens = scenario, max_tokens
        self._count = sum(1 for _ in _rows(path))
        if not self._count:
            raise UserError(
                "批量文件里没有一个问题", path, '应为列表，例如 [{"question": "…", "scenario": "diagnosis"}]'
            )

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for number, row in enumerate(_rows(self._path), 1):
            yield parse_request(row, number, self._scenarios, self._scenario, self._max_tokens)


def parse_request(row: object, number: int, scenarios: Collection[str], scenario: str, max_tokens: int) -> Request:
    """One row as a request; what is wrong with it goes into `error`."""
    if isinstance(row, Problem):
        return Request(number, "", scenario, max_tokens, error=row.reason)
    if not files.is_encodable(row):
        return Request(number, "", scenario, max_tokens, error="含有无法编码的字符（半个代理对）")
    if isinstance(row, str):
        row = {"question": row}
    if not isinstance(row, dict):
        return Request(number, "", scenario, max_tokens, error=f"应为文本或对象，实际是 {type(row).__name__}")
    # A CSV has its empty cells as "", a JSON export as null: both mean "not given".
    given = {key: value for key, value in row.items() if value not in (None, "")}
    id_, question = given.get("id", number), given.get("question", "")
    own_scenario, limit = given.get("scenario", scenario), _whole_number(given.get("max_tokens", max_tokens))
    error = None
    if not isinstance(question, str) or not question.strip():
        error, question = "缺少 question（为空或不是文本）", question if isinstance(question, str) else ""
    elif not isinstance(own_scenario, str) or (own_scenario not in scenarios and own_scenario != AUTO):
        error, own_scenario = f"未知场景 {own_scenario!r}，可选：{'、'.join(scenarios)}", str(own_scenario)
    elif limit is None:
        error = "max_tokens 应为正整数"
    return Request(id_, question.strip(), str(own_scenario), limit or max_tokens, error)


class Answered:
    """The rows that earlier tries of a batch have answered, found by what was asked.

    Keeps a short hash and a place in the file for each row, not the rows.
    """

    def __init__(self, paths: Collection[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._places: dict[bytes, tuple[IO[bytes], int]] = {}
        for file in self._files:
            offset = 0
            for line in file:
                row = _parsed(line)
                if row is not None and "error" not in row and "settings" in row:
                    self._places[_key(row)] = (file, offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def find(self, id_: Any, question: str, scenario: str, settings: str) -> dict[str, Any] | None:
        """The row that answers this, or None."""
        asked = {"id": id_, "question": question, "scenario": scenario, "settings": settings}
        if (place := self._places.get(_key(asked))) is None:
            return None
        file, offset = place
        file.seek(offset)
        row = _parsed(file.readline())
        return row if row and all(row.get(name) == value for name, value in asked.items()) else None

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


@contextlib.contextmanager
def results_file(path: Path, resume: bool) -> Iterator[tuple[IO[str], Answered | None]]:
    """Open a batch's results, which take their name when the block ends without an error.

    Args:
        resume: also give the rows that earlier tries have answered.

    Raises:
        UserError: as `check_results_path`, or another process writes them.
    """
    partial, collected = _unfinished(path)
    answered = None
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        refusal = UserError("另一个进程正在写这个结果文件", path, "请等它结束，或换一个文件名")
        stack.enter_context(files.locked(path.parent / f".{path.name}.lock", refusal))
        check_results_path(path, resume)
        if resume:
            _collect(partial, collected)
            answered = Answered([each for each in (path, collected) if each.exists()])
        file = stack.enter_context(files.growing_file(path))
        if answered is not None:
            stack.callback(answered.close)  # before the renaming: Windows replaces no open file
        yield file, answered
    collected.unlink(missing_ok=True)


def check_results_path(path: Path, resume: bool = False) -> None:
    """Make sure that results may be written there, before any work.

    Raises:
        UserError: it is a folder, or an earlier try was cut short and nobody has said what to do with its answers.
    """
    if path.is_dir():  # it would fail at the renaming
        raise UserError("结果要写到文件，而这是目录", path, "请给出文件名")
    left_over = [each for each in _unfinished(path) if each.exists()]
    if left_over and not resume:
        remedy = "加上 --resume 接着做，或先删除它从头开始"
        raise UserError("上一次没有做完，它的结果还在", left_over[0], remedy)


def _unfinished(path: Path) -> tuple[Path, Path]:
    """Where the rows of a try grow, and where those of earlier tries are collected."""
    return path.parent / f"{path.name}.partial", path.parent / f"{path.name}.answered"  # "." has no name


def _collect(partial: Path, collected: Path) -> None:
    """Add a cut-off try's rows to the collected ones; killed in the middle, the next try adds them once more."""
    if not partial.exists():
        return
    with partial.open("rb") as source, collected.open("ab") as target:
        for line in source:
            if line.endswith(b"\n"):
                target.write(line)
    partial.unlink()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the last line of a killed run may be cut
        return None
    return row if isinstance(row, dict) else None


def _key(row: Mapping[str, Any]) -> bytes:
    asked = [row.get(name) for name in ("id", "question", "scenario", "settings")]
    return hashlib.blake2b(json.dumps(asked, ensure_ascii=False, default=str).encode(), digest_size=12).digest()


def _rows(path: Path) -> Iterator[object]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".csv"):
        return (row for _, row in rows.read_rows(files.require_file(path, "批量文件")))
    if suffix != ".json":
        files.require_file(path, "批量文件")
        raise UserError(
            f"不支持的批量文件格式 {suffix or '（没有扩展名）'}", path, "支持 .json（列表）、.jsonl 和 .csv"
        )
    document = files.read_json(path)
    if not isinstance(document, list):
        raise UserError("批量文件应是一个列表", path, '例如 [{"question": "…", "scenario": "diagnosis"}]')
    return iter(document)


def _whole_number(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        value = int(value.strip())  # int() itself keeps some blanks, such as \x1f
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None
