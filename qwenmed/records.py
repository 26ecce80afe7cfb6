"""A record of the data set – question, thinking, answer – and the reading of any file of them."""

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenmed import files
from qwenmed.controls import as_plain_words
from qwenmed.errors import UserError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

# Raise it whenever the text of a formatted row changes.
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        question: what the user asks.
        think: the thinking before the answer; may be empty.
        answer: the answer proper.
        scenario: id of the scenario it belongs to, where the data say so.
        system: a system prompt that the row brings along (rows that are already formatted).
        row: the row as it was read, written back unchanged.
        place: "file:line" for messages.
    """

    question: str
    think: str
    answer: str
    scenario: str | None = None
    system: str | None = None
    row: dict = field(default_factory=dict, compare=False, repr=False)
    place: str = field(default="", compare=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two records the same."""
        return (self.question, self.think, self.answer)


@dataclass(frozen=True)
class Problem:
    """A row that could not be used, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}：{self.reason}"


def read_records(path: Path) -> tuple[list[Record], list[Problem]]:
    """Read every record of a JSONL, JSON, CSV or Parquet file, or of all such files in a folder.

    Returns:
        The usable records in file order, and the rows that are none.

    Raises:
        UserError: the path is missing, or a file is empty, binary, wrongly encoded or half-written.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    for file in data_files(path):
        for place, row in read_rows(file):
            outcome: Any = row if isinstance(row, Problem) else parse_row(row, place)
            (problems if isinstance(outcome, Problem) else records).append(outcome)
    return records, problems


def read_clean_records(path: Path) -> list[Record]:
    """Read a file that `data.py` has written; here a bad row is an error, not a thing to drop.

    Raises:
        UserError: as `read_records`, or any row is unusable, or there is none.
    """
    if not path.exists():
        raise UserError("数据文件不存在", path, "请先运行 python data.py，或用 --train-file / --val-file 指定文件")
    records, problems = read_records(path)
    if problems:
        more = f"，另有 {len(problems) - 1} 行有问题" if len(problems) > 1 else ""
        raise UserError(
            f"{problems[0].reason}{more}", problems[0].place, "请先用 python data.py --source 文件 清洗数据"
        )
    if not records:
        raise UserError("文件里没有一条记录", path, "请先运行 python data.py")
    return records


def data_files(path: Path) -> list[Path]:
    """The data files at `path`: itself, or those anywhere below a folder, by name.

    Raises:
        UserError: nothing there, or nothing of a known kind.
    """
    if not path.exists():
        raise UserError("数据文件或目录不存在", path, "请检查路径；用 --source demo 可以先试内置的演示数据")
    if path.is_file():
        if path.suffix.lower() not in DATA_SUFFIXES:
            raise UserError(
                f"不支持的数据格式 {path.suffix or '（没有扩展名）'}", path, f"支持 {'、'.join(DATA_SUFFIXES)}"
            )
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file.suffix.lower() in DATA_SUFFIXES and not _is_hub_bookkeeping(file.relative_to(path))
    )
    if not found:
        raise UserError("目录里没有数据文件", path, f"支持 {'、'.join(DATA_SUFFIXES)}")
    return found


def _is_hub_bookkeeping(relative: Path) -> bool:
    """Whether a file in a downloaded dataset repository describes the repository rather than holds data."""
    hidden = any(part.startswith(".") for part in relative.parts)
    return hidden or relative.name in {"dataset_infos.json", "configuration.json", "dataset_info.json"}


def read_rows(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    """Yield ("file:line", row) for each row of one data file; a row that does not parse is a Problem."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix == ".csv":
        return _csv_rows(path)
    if suffix == ".json" and not _looks_like_jsonl(files.read_text(path)):
        return _json_rows(path)
    return _jsonl_rows(path)


def parse_row(row: object, place: str) -> Record | Problem:
    """A row in the data set's own schema, or one that is already formatted, as a Record."""
    if not isinstance(row, dict):
        return Problem(place, f"应为一个 JSON 对象，实际是 {type(row).__name__}")
    if not files.is_encodable(row):
        return Problem(place, "含有无法编码的字符（半个代理对）")
    if "output" in row and "answer" not in row:
        return _parse_formatted(row, place)
    texts = {}
    for name, required in (("question", True), ("think", False), ("answer", True)):
        value = row.get(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            value = ""
        if not isinstance(value, str):
            return Problem(place, f"字段 {name} 应为文本，实际是 {type(value).__name__}")
        if required and not value.strip():
            return Problem(place, f"缺少 {name}（为空或没有这个字段）")
        texts[name] = value
    scenario = row.get("scenario")
    return Record(**texts, scenario=scenario if isinstance(scenario, str) and scenario else None, row=row, place=place)


def format_output(record: Record) -> str:
    """The target text of a formatted row – what Qwen3's own template writes after `assistant\\n`.

    Other trainers read these rows, so what looks like a control token in the texts is broken up.
    """
    think, answer = record.think.strip("\n"), record.answer.lstrip("\n")
    return f"<think>\n{as_plain_words(think)}\n</think>\n\n{as_plain_words(answer)}"


def format_row(record: Record, system: str) -> dict[str, str]:
    """A row of `*_format.jsonl`: the system prompt, the question, thinking and answer."""
    return {
        "instruction": as_plain_words(system),
        "input": as_plain_words(record.question),
        "output": format_output(record),
    }


def system_prompts(record: Record, general: str, by_scenario: Mapping[str, str], mode: str) -> list[str]:
    """The system prompts that a record is trained with.

    The assistant uses its scenarios' prompts, so a model must meet them in training; a record can show
    its scenario's prompt only if the data name the scenario.

    Args:
        mode: "general" – always the general prompt; "scenario" – the scenario's where known, else the
            general one; "mixed" – the general one, and besides it the scenario's where known.
    """
    if record.system is not None:
        return [record.system]
    own = by_scenario.get(record.scenario or "")
    if mode == "general" or own is None:
        return [general]
    return [own] if mode == "scenario" else [general, own]


def drop_duplicates(records: Iterable[Record]) -> tuple[list[Record], list[Problem]]:
    """Keep the first of each exactly equal question, thinking and answer."""
    first: dict[tuple[str, str, str], str] = {}
    kept, dropped = [], []
    for record in records:
        if record.key in first:
            dropped.append(Problem(record.place, f"与 {first[record.key]} 完全重复"))
        else:
            first[record.key] = record.place
            kept.append(record)
    return kept, dropped


def split(records: Sequence[Record], val_ratio: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Shuffle by `seed` and cut; at 0.1 and 42 exactly the split of the original project's data.py.

    Raises:
        UserError: too few records to leave at least one on each side.
    """
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    cut = int(len(shuffled) * (1 - val_ratio))
    if cut == 0 or cut == len(shuffled):
        raise UserError(
            f"只有 {len(shuffled)} 条可用记录，无法按 {val_ratio} 划分", None, "请提供更多数据或调整 --val-ratio"
        )
    return shuffled[:cut], shuffled[cut:]


def _parse_formatted(row: dict, place: str) -> Record | Problem:
    question, output, system = row.get("input"), row.get("output"), row.get("instruction")
    if not isinstance(question, str) or not question.strip():
        return Problem(place, "缺少 input（问题）")
    if not isinstance(output, str) or not output.strip():
        return Problem(place, "缺少 output（思考和回答）")
    think, closed, answer = output.partition("</think>")
    if not closed:
        think, answer = "", output
    answer = answer.strip()
    if not answer:
        return Problem(place, "output 里没有回答")
    return Record(
        question=question,
        think=think.strip().removeprefix("<think>").strip(),
        answer=answer,
        system=system if isinstance(system, str) and system.strip() else None,
        row=row,
        place=place,
    )


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    for number, line in enumerate(files.read_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            if number > 1 and not line.endswith("\n"):  # only the last line has no end
                remedy = "文件没有写完（下载或复制中断？），请重新获取"
                raise UserError("最后一行不完整", place, remedy) from None
            yield place, Problem(place, f"不是合法的 JSON（第 {error.colno} 列附近）")
        except (ValueError, RecursionError):
            yield place, Problem(place, "JSON 嵌套过深，或含有过长的数字")


def _looks_like_jsonl(text: str) -> bool:
    """Whether a .json file really holds one object a line, as many exports do."""
    head = text.lstrip()
    first_line = head.split("\n", 1)[0].rstrip()
    if not head.startswith("{") or not first_line.endswith("}"):
        return False
    try:
        first = json.loads(first_line)
    except (ValueError, RecursionError):
        return False
    # One line alone may also be a document such as {"data": […]}.
    return bool({"question", "answer", "input", "output"} & first.keys())


def _json_rows(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    document = files.read_json(path)
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else [document]
    if not isinstance(document, list):
        raise UserError("JSON 文件应为记录的列表", path, '例如 [{"question": …, "think": …, "answer": …}]')
    for number, row in enumerate(document, 1):
        yield f"{path}:第{number}条", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    reader = csv.DictReader(files.read_lines(path))
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row:
                yield place, Problem(place, "列数比表头多")
            else:
                yield place, row
    except csv.Error as error:
        raise UserError(f"CSV 格式错误：{error}", f"{path}:{reader.line_num}", "请重新导出") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:第{number}条", row
    except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"Parquet 文件无法读取：{error}", path, "文件可能不完整，请重新获取") from None
