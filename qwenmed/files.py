"""Files: read as UTF-8, written whole under a temporary name and then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qwenmed.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

LOCK_FILE = ".lock"
UNFINISHED_MARK = ".unfinished"


def require_file(path: Path, what: str = "文件") -> Path:
    """Return `path` if it is a readable file.

    Raises:
        UserError: it does not exist or is no file.
    """
    if not path.exists():
        raise UserError(f"{what}不存在", path, "请检查路径是否拼写正确")
    if not path.is_file():
        raise UserError(f"{what}不是普通文件", path, "请给出文件而不是目录")
    return path


def read_text(path: Path) -> str:
    """Read a UTF-8 text, with or without a byte-order mark, with any line ends.

    Raises:
        UserError: missing, empty, binary, or not UTF-8 (the byte offset is named).
    """
    data = require_file(path).read_bytes()
    _refuse_binary(data[:8192], path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start) from None
    if not text.strip():
        raise _empty(path)
    return text


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text one by one, with their line ends, however large the file is.

    Only a line feed ends a line: U+2028 and U+0085 stand inside of JSON strings.

    Raises:
        UserError: as `read_text`.
    """
    offset, blank = 0, True
    with require_file(path).open("rb") as file:
        _refuse_binary(file.peek(8192)[:8192], path)
        for data in file:
            try:
                line = data.decode("utf-8-sig" if offset == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from None
            offset += len(data)
            blank = blank and not line.strip()
            yield line
    if blank:
        raise _empty(path)


def _refuse_binary(start: bytes, path: Path) -> None:
    if b"\0" in start and not start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError("这是二进制文件，不是文本", path, "支持 JSONL、JSON、CSV 和 Parquet，并按扩展名识别")


def _not_utf8(path: Path, offset: int) -> UserError:
    remedy = "请另存为 UTF-8，例如 iconv -f GB18030 -t UTF-8 原文件 > 新文件"
    return UserError(f"文件不是 UTF-8 编码（第 {offset} 字节起无法解码）", path, remedy)


def _empty(path: Path) -> UserError:
    return UserError("文件是空的", path, "请检查它是否下载或导出完整")


def read_json(path: Path) -> object:
    """Read one JSON document.

    Raises:
        UserError: as `read_text`, or the JSON is broken (line and column are named).
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        remedy = "文件可能不完整，请重新导出或改正这一处"
        raise UserError(f"JSON 格式错误：第 {error.lineno} 行第 {error.colno} 列", path, remedy) from None
    except (ValueError, RecursionError):  # numbers of more than 4300 digits are a plain ValueError
        raise UserError("JSON 嵌套过深，或含有过长的数字", path, "请检查文件内容") from None


@contextlib.contextmanager
def whole_file(path: Path, private: bool = False) -> Iterator[IO[str]]:
    """Open a text file that appears under its name only when the block ends without an error.

    Args:
        private: readable by its owner only (mode 0600).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not private:  # mkstemp makes 0600, which a colleague's job could not read
            temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, name):
            error.filename = str(path)  # the user knows the final name, not the temporary one
        raise


@contextlib.contextmanager
def growing_file(path: Path) -> Iterator[IO[str]]:
    """Open a text file that grows as FILE.partial and takes its name when the block ends without an error.

    Unlike `whole_file`, what was written stays when the work is cut short: a night's answers are not lost.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        yield file
    partial.replace(path)


@contextlib.contextmanager
def whole_folder(target: Path, what: str) -> Iterator[Path]:
    """Fill a folder that appears under its name only when the block ends without an error.

    It grows as .NAME.partial beside the target; what a killed process left there is removed. A folder that has the
    name already is replaced in the end: whoever calls has made sure that it may be.

    Args:
        what: who fills it, for the message.

    Raises:
        UserError: another process that is alive fills it.
    """
    partial, old, lock = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "old", "lock"))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder: Windows renames none in which a file is open.
    with holding(target, what, lock):
        try:
            partial.mkdir(exist_ok=True)
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            for path in partial.rglob("*"):  # safetensors makes 0600, which a colleague's job could not read
                path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.replace(old)
            partial.replace(target)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def check_space(folder: Path, needed: int, remedy: str) -> None:
    """Make sure that a disk has room, before any long work starts.

    Args:
        folder: where it will be written; it need not exist yet.
        needed: bytes.
        remedy: what helps besides another disk.

    Raises:
        UserError: it has not.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(f"磁盘空间不足：需要约 {needed / 1e9:.2f} GB，只剩 {free / 1e9:.2f} GB", folder, remedy)


def write_whole(contents: Mapping[Path, str]) -> None:
    """Write several text files that belong together; none appears unless all could be written."""
    with whole_files(contents) as files:
        for path, text in contents.items():
            files[path].write(text)


@contextlib.contextmanager
def whole_files(paths: Iterable[Path]) -> Iterator[dict[Path, IO[str]]]:
    """Open several text files that belong together; none appears unless the block ends without an error.

    A process killed between two of the renames leaves files of two runs beside each other, and a mark that
    `check_belong_together` finds.
    """
    paths = list(paths)
    if folder := next((path for path in paths if path.is_dir()), None):  # it would fail at the renaming
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder))
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(whole_file(path)) for path in paths}
        yield files
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        marks = {path.with_name(UNFINISHED_MARK) for path in paths}
        for mark in marks:
            mark.touch()
    for mark in marks:
        mark.unlink(missing_ok=True)  # another run beside this one may have removed it


def check_belong_together(path: Path) -> None:
    """Make sure that the files beside `path` stem from one run of `write_whole`.

    Raises:
        UserError: one was cut short between them.
    """
    if path.with_name(UNFINISHED_MARK).exists():
        remedy = "重新运行 data.py；否则验证集里可能有训练过的样本"
        raise UserError("数据准备写到一半被打断，这里的文件可能来自两次准备", path.parent.resolve(), remedy)


def write_json(path: Path, value: object, private: bool = False) -> None:
    """Write one JSON document, readable by a person; `private` as in `whole_file`."""
    with whole_file(path, private) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def to_jsonl(rows: Iterable[object]) -> str:
    """One JSON object a line, Chinese left as it is; what JSON lacks (dates of a Parquet file) as text."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def is_encodable(row: object) -> bool:
    """Whether a row can be written as UTF-8, which has no way to write half a surrogate pair."""
    try:
        to_jsonl([row]).encode()
    except UnicodeEncodeError:
        return False
    return True


def encodable(text: str) -> str:
    """A text with escapes for what can't be written: file names may hold bytes that are no text (GBK on Linux)."""
    return text.encode(errors="backslashreplace").decode()


def check_encodable(text: str, what: str) -> str:
    """Return `text` if it can be written as UTF-8.

    Raises:
        UserError: it holds half a surrogate pair, which is what bytes in another encoding become on a command line.
    """
    if not is_encodable(text):
        raise UserError(
            f"{what}里有无法编码的字符（半个代理对，或不是 UTF-8）", None, "请检查终端的编码，或从文件用管道传入"
        )
    return text


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Let an error of a file without a name (a temporary one) say in which folder it happened."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename if isinstance(error.filename, str | Path) else str(folder)
        raise


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> Path:
    """Make `folder` and prove that a file can be written there, before any long work starts.

    Raises:
        OSError: it can't be made or written (the command line explains it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    return folder


def hold(folder: Path, what: str) -> "FileLock":
    """Take a folder for this process; the system gives it back when the process ends, however it ends.

    Args:
        what: who uses the folder, for the message.

    Returns:
        The lock; it is held as long as this object lives.

    Raises:
        UserError: another process that is still alive has it.
    """
    return _lock(folder / LOCK_FILE, _is_used(folder, what))


@contextlib.contextmanager
def holding(folder: Path, what: str, file: Path | None = None) -> Iterator[None]:
    """Hold a folder, as `hold` does, for the length of the block; no lock file is left.

    Args:
        file: the lock file, where it can't lie in the folder.

    Raises:
        UserError: as `hold`.
    """
    with locked(file or folder / LOCK_FILE, _is_used(folder, what)):
        yield


@contextlib.contextmanager
def locked(file: Path, refusal: UserError) -> Iterator[None]:
    """Hold a lock file for the length of the block and leave none; a killed process holds nothing.

    Raises:
        UserError: the refusal, where another process that is still alive holds it.
    """
    lock = _lock(file, refusal)
    try:
        yield
    finally:
        # While it is still held: later, it could be another's. Windows refuses this; filelock itself removes it there.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()


def _is_used(folder: Path, what: str) -> UserError:
    return UserError(f"另一个{what}正在使用这个目录", folder, "请等它结束，或用 --output-dir 换一个目录")


def _lock(file: Path, refusal: UserError) -> "FileLock":
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise refusal from None
    return lock


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether a failed write failed for lack of space; safetensors and torch raise errors of their own for it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or shutil.disk_usage(folder).free < 2**20


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
