"""Records out of files: everything at a path, with the rows that are none; or a file that must be clean."""

from collections.abc import Iterator
from pathlib import Path

from qwenmed import schemas
from qwenmed.errors import UserError
from qwenmed.records import Problem, Record
from qwenmed.rows import data_files, read_rows


def read_records(path: Path) -> tuple[list[Record], list[Problem]]:
    """Read every record of a data file, or of all such files in a folder.

    Returns:
        The usable records in file order, and the rows that are none.

    Raises:
        UserError: the path is missing, or a file is empty, binary, wrongly encoded or half-written.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    for outcome in stream(path):
        if isinstance(outcome, Problem):
            problems.append(outcome)
        else:
            records += outcome
    return records, problems


def stream(path: Path) -> Iterator[list[Record] | Problem]:
    """What each row of a data file is, or of all such files in a folder, row by row; raises as `read_records`."""
    for file in data_files(path):
        for place, row in read_rows(file):
            yield row if isinstance(row, Problem) else schemas.parse_row(row, place)


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
        remedy = "请先用 python data.py --source 文件 --output-dir 新目录 清洗，再用新目录里的文件"
        raise UserError(f"{problems[0].reason}{more}", problems[0].place, remedy)
    if not records:
        raise UserError("文件里没有一条记录", path, "请先运行 python data.py")
    return records
