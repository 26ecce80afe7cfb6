"""JSON texts as rows: one object, or the items of a list that is too long to be held at once.

The standard library's decoder does the parsing. What is decided here: a field that stands twice in one object is an
error (which of the two is meant?), and a list is read a piece of the file at a time.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qwenmed.errors import UserError
from qwenmed.records import Problem

PIECE = 2**20
# What a single item may take.
LONGEST_ITEM = 2**26


class Repeated(ValueError):
    """A name stands twice in one JSON object."""


def parse_json(text: str, place: str) -> Any:
    """What a JSON text holds, or a Problem: broken, nested too deeply, or a field that stands twice."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        return Problem(place, f"不是合法的 JSON（第 {error.colno} 列附近）")
    except Repeated as error:
        return Problem(place, str(error))
    except (ValueError, RecursionError):  # numbers of more than 4300 digits are a plain ValueError
        return Problem(place, "JSON 嵌套过深，或含有过长的数字")


def items(file: IO[bytes], path: Path) -> Iterator[Any]:
    """The items of a JSON list, one by one.

    Raises:
        UserError: it is no list, or broken or cut; line and column are named.
    """
    window = _Window(file, path)
    window.take("[")
    if window.sign() != "]":
        yield window.item()
        while window.sign() == ",":
            window.take(",")
            yield window.item()
    window.take("]")
    if window.sign():
        raise window.broken(window.at)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Repeated(f"字段 {next(name for name in names if names.count(name) > 1)} 出现两次，不知道该用哪个")
    return found


class _Window:
    """A part of a text that moves on and, for a long item, grows."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.text, self.at = "", 0
        self._file, self._path = io.TextIOWrapper(file, encoding="utf-8-sig"), path
        self._decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)
        self._lines, self._ended = 0, False

    def sign(self) -> str:
        """The next character that is no blank, which is not taken; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or not self._grow(PIECE):
                return self.text[self.at : self.at + 1]

    def take(self, sign: str) -> None:
        """Go past a character that must come."""
        if self.sign() != sign:
            raise self.broken(self.at)
        self.at += 1

    def item(self) -> Any:
        """The next value."""
        self.sign()
        size = PIECE
        while True:
            try:
                value, after = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) > LONGEST_ITEM or not self._grow(size):
                    raise self.broken(error.pos) from None
            except Repeated as error:
                raise UserError(str(error), self._path, "请改正，或存成 JSONL（那样只丢这一条）") from None
            except (ValueError, RecursionError):
                raise UserError("JSON 嵌套过深，或含有过长的数字", self._path, "请检查文件内容") from None
            else:
                if after < len(self.text) or not self._grow(size):  # a number may go on in the next piece
                    self.at = after
                    return value
            size *= 2  # so that a long item is not parsed again for every piece of it

    def broken(self, position: int) -> UserError:
        """The error for what stands at a position."""
        line = self._lines + self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        remedy = "文件可能不完整，请重新导出或改正这一处"
        return UserError(f"JSON 格式错误：第 {line} 行第 {column} 列", self._path, remedy)

    def _grow(self, size: int) -> bool:
        """Read on, and let go of what was taken; False at the end of the file."""
        if self._ended:
            return False
        try:
            more = self._file.read(size)
        except UnicodeDecodeError:
            remedy = "请另存为 UTF-8，例如 iconv -f GB18030 -t UTF-8 原文件 > 新文件"
            raise UserError("文件不是 UTF-8 编码", self._path, remedy) from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"gzip 文件损坏：{error}", self._path, "文件没有下载完整，请重新获取") from None
        self._lines += self.text.count("\n", 0, self.at)
        self.text, self.at, self._ended = self.text[self.at :] + more, 0, not more
        return bool(more)
