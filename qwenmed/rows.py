"""Any file of records as a stream of rows: JSONL, JSON, CSV and Parquet, the text ones also gzipped.

A row that can't be read is a Problem with its file and line, and the reading goes on: one bad byte does not cost a
data set. Memory stays flat however large a file is; one line may take `LONGEST_LINE`.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenmed import files, json_list
from qwenmed.errors import UserError
from qwenmed.json_list import parse_json
from qwenmed.records import Problem

TEXT_SUFFIXES = (".jsonl", ".json", ".csv")
DATA_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))

# A record is some kilobytes; what is longer is another kind of file, and would fill the memory.
LONGEST_LINE = 2**24
# By its beginning it is known what a .json file holds; a document that is no list is read whole, up to this size.
HEAD, LARGEST_DOCUMENT = 2**20, 2**28
# Rows that are taken out of a Parquet file at a time.
PARQUET_ROWS = 1024

Rows = Iterator[tuple[str, Any]]


def kind(path: Path) -> str:
    """The suffix that says how a file is read, `.gz` included: ".jsonl", ".csv.gz" …"""
    name = path.name.lower()
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), path.suffix.lower())


def shown(path: Path) -> str:
    """A path as it can be written."""
    return files.encodable(str(path))


def data_files(path: Path) -> list[Path]:
    """The data files at `path`: itself, or those anywhere below a folder, by name.

    Raises:
        UserError: nothing there, or nothing of a known kind.
    """
    if not path.exists():
        raise UserError("数据文件或目录不存在", path, "请检查路径；用 --source demo 可以先试内置的演示数据")
    if path.is_file():
        if kind(path) not in DATA_SUFFIXES:
            raise UserError(
                f"不支持的数据格式 {path.suffix or '（没有扩展名）'}", path, f"支持 {'、'.join(DATA_SUFFIXES)}"
            )
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and kind(file) in DATA_SUFFIXES and not _is_hub_bookkeeping(file.relative_to(path))
    )
    if not found:
        raise UserError("目录里没有数据文件", path, f"支持 {'、'.join(DATA_SUFFIXES)}")
    return found


def _is_hub_bookkeeping(relative: Path) -> bool:
    """Whether a file in a downloaded dataset repository describes the repository rather than holds data."""
    hidden = any(part.startswith(".") for part in relative.parts)
    return hidden or relative.name in {"dataset_infos.json", "configuration.json", "dataset_info.json"}


def read_rows(path: Path) -> Rows:
    """Yield ("file:line", row) for each row of one data file; a row that does not parse is a Problem.

    Raises:
        UserError: the file is missing, empty, binary, wrongly encoded or half-written as a whole.
    """
    plain = kind(path).removesuffix(".gz")
    if plain == ".parquet":
        return _parquet_rows(path)
    if plain == ".csv":
        return _readable(path, _csv_rows(path))
    if plain == ".json" and not _looks_like_jsonl(path):
        return _json_rows(path)
    return _readable(path, _jsonl_rows(path))


def _readable(path: Path, rows: Rows) -> Rows:
    """The rows, unless all there is are unreadable ones: then the file is no text, and that is said once."""
    held: list[tuple[str, Any]] = []
    empty = True
    for place, row in rows:
        empty = False
        if isinstance(row, Problem) and row.unreadable and len(held) < 20:
            held.append((place, row))
            continue
        if len(held) == 20:
            break
        yield from held
        yield place, row
        yield from rows
        return
    if empty:
        raise UserError("文件是空的", path, "请检查它是否下载或导出完整")
    if any("NUL" in problem.reason for _, problem in held):
        raise UserError("这是二进制文件，不是文本", path, "支持 JSONL、JSON、CSV 和 Parquet，并按扩展名识别")
    remedy = "请另存为 UTF-8，例如 iconv -f GB18030 -t UTF-8 原文件 > 新文件"
    raise UserError("文件不是 UTF-8 编码", held[0][0], remedy)


def _opened(path: Path) -> Any:
    """A binary file for reading, unpacked where it is gzipped."""
    files.require_file(path)
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line; None for one that is too long. Only a line feed ends a line."""
    number = 0
    with _opened(path) as file:
        try:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) < LONGEST_LINE or line.endswith(b"\n"):
                    yield number, line
                    continue
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
                yield number, None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            remedy = "文件没有下载完整，请重新获取"
            raise UserError(f"gzip 文件损坏：{error}", f"{path}:{number + 1}", remedy) from None


def _text(data: bytes | None, place: str) -> str | Problem:
    """A line as text, or what is wrong with it."""
    if data is None:
        return Problem(place, f"一行超过 {LONGEST_LINE // 2**20} MB")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        reason = (
            "含有 NUL 字节，也不是 UTF-8" if b"\0" in data else f"不是 UTF-8 编码（这一行的第 {error.start + 1} 字节）"
        )
        return Problem(place, reason, unreadable=True)
    if "\0" in text:
        return Problem(place, "含有 NUL 字节", unreadable=True)
    return text.removeprefix("\ufeff")  # files that were joined have a mark in the middle


def _jsonl_rows(path: Path) -> Rows:
    for number, data in _lines(path):
        place = f"{shown(path)}:{number}"
        text = _text(data, place)
        if isinstance(text, Problem):
            yield place, text
        elif text.strip():
            row = parse_json(text, place)
            if isinstance(row, Problem) and number > 1 and not text.endswith("\n") and "不是合法" in row.reason:
                remedy = "文件没有写完（下载或复制中断？），请重新获取"  # only the last line has no end
                raise UserError("最后一行不完整", place, remedy)
            yield place, row


def _looks_like_jsonl(path: Path) -> bool:
    """Whether a .json file really holds one object a line, as many exports do."""
    with _opened(path) as file:
        try:
            head = file.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return True  # read line by line, it gets its error
    first_line, ended, _ = head.partition(b"\n")
    if not head.startswith(b"{") or not first_line.rstrip().endswith(b"}"):
        return False
    try:
        first = json.loads(first_line)
    except (ValueError, RecursionError):
        return False
    # One line alone may also be a document such as {"data": […]}.
    return bool(ended and head.partition(b"\n")[2].lstrip().startswith(b"{")) or not any(
        isinstance(value, list)
        and value
        and isinstance(value[0], dict)
        and "role" not in value[0]
        and "from" not in value[0]
        for value in first.values()
    )


def _json_rows(path: Path) -> Rows:
    with _opened(path) as file:
        head = file.read(HEAD)
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _document_rows(path)
        return
    with _opened(path) as file:
        for number, row in enumerate(json_list.items(file, path), 1):
            yield f"{shown(path)}:第{number}条", row


def _document_rows(path: Path) -> Rows:
    """The rows of a JSON document that is an object: its only list, or itself."""
    if path.stat().st_size > LARGEST_DOCUMENT:
        raise UserError("JSON 文件太大，又不是一个列表", path, "请存成 JSONL（每行一条）")
    document = files.read_json(path) if path.suffix.lower() != ".gz" else _gzipped_json(path)
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        alone = len(lists) == 1 and not any(
            isinstance(each, dict) and {"role", "from"} & each.keys() for each in lists[0]
        )
        document = lists[0] if alone else [document]
    if not isinstance(document, list):
        raise UserError("JSON 文件应为记录的列表", path, '例如 [{"question": …, "think": …, "answer": …}]')
    for number, row in enumerate(document, 1):
        yield f"{shown(path)}:第{number}条", row


def _gzipped_json(path: Path) -> Any:
    text = b"".join(data or b"" for _, data in _lines(path)).decode(errors="replace")
    row = parse_json(text, str(path))
    if isinstance(row, Problem):
        raise UserError(row.reason, path, "文件可能不完整，请重新导出")
    return row


def _csv_rows(path: Path) -> Rows:
    # The standard library's own limit of 128 kB is one for the whole process; an answer may be longer.
    csv.field_size_limit(LONGEST_LINE)
    # Bytes that are no UTF-8 become half surrogate pairs, by which their row is known.
    lines = (_csv_line(data) for _, data in _lines(path))
    # Strict, or a quote without its other takes all that follows for one answer.
    reader = csv.DictReader(lines, strict=True)
    read = 0
    try:
        for row in reader:
            read = reader.line_num
            place = f"{shown(path)}:{reader.line_num}"
            texts = "".join(text for text in row.values() if isinstance(text, str))
            if None in row:
                yield place, Problem(place, "列数比表头多")
            elif not files.is_encodable(texts):
                yield place, Problem(place, "不是 UTF-8 编码", unreadable=True)
            elif "\0" in texts:
                yield place, Problem(place, "含有 NUL 字节", unreadable=True)
            else:
                yield place, row
    except csv.Error as error:
        what = "最后一条不完整" if "unexpected end" in str(error) else f"CSV 格式错误：{error}"
        remedy = "文件没有写完，或有引号没有配对；请重新获取，或改正这一条"
        raise UserError(what, f"{path}:{read + 1}", remedy) from None


def _csv_line(data: bytes | None) -> str:
    if data is None:
        raise csv.Error(f"一行超过 {LONGEST_LINE // 2**20} MB")
    return data.decode(errors="surrogateescape").removeprefix("\ufeff")


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{shown(path)}:第{number}条", row
    except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"Parquet 文件无法读取：{error}", path, "文件可能不完整，请重新获取") from None
