"""The questions of a batch, row by row. What is wrong with one row stays with that row."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenmed import files, records
from qwenmed.errors import UserError


@dataclass(frozen=True)
class Request:
    """One question of a batch.

    Attributes:
        id: the row's own id, or its number from 1.
        question: what is asked.
        scenario: a scenario id.
        max_tokens: limit of new tokens.
        error: why the row can't be asked, or None.
    """

    id: Any
    question: str
    scenario: str
    max_tokens: int
    error: str | None = None


def read_requests(path: Path, scenarios: Collection[str], scenario: str, max_tokens: int) -> list[Request]:
    """Read a batch file: a JSON list, JSONL, or CSV of questions (text, or rows with `question`).

    Args:
        scenarios: the known scenario ids.
        scenario, max_tokens: for rows that don't say.

    Raises:
        UserError: the file is missing, empty, broken, or no list.
    """
    rows = _rows(path)
    if not rows:
        raise UserError("批量文件里没有一个问题", path, '应为列表，例如 [{"question": "…", "scenario": "diagnosis"}]')
    return [parse_request(row, number, scenarios, scenario, max_tokens) for number, row in enumerate(rows, 1)]


def parse_request(row: object, number: int, scenarios: Collection[str], scenario: str, max_tokens: int) -> Request:
    """One row as a request; what is wrong with it goes into `error`."""
    if isinstance(row, records.Problem):
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
    elif not isinstance(own_scenario, str) or own_scenario not in scenarios:
        error, own_scenario = f"未知场景 {own_scenario!r}，可选：{'、'.join(scenarios)}", str(own_scenario)
    elif limit is None:
        error = "max_tokens 应为正整数"
    return Request(id_, question.strip(), str(own_scenario), limit or max_tokens, error)


def _rows(path: Path) -> list[object]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".csv"):
        return [row for _, row in records.read_rows(files.require_file(path, "批量文件"))]
    if suffix != ".json":
        files.require_file(path, "批量文件")
        raise UserError(
            f"不支持的批量文件格式 {suffix or '（没有扩展名）'}", path, "支持 .json（列表）、.jsonl 和 .csv"
        )
    document = files.read_json(path)
    if not isinstance(document, list):
        raise UserError("批量文件应是一个列表", path, '例如 [{"question": "…", "scenario": "diagnosis"}]')
    return document


def _whole_number(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        value = int(value.strip())  # int() itself keeps some blanks, such as \x1f
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None
