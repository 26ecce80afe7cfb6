"""Files appear whole or not at all, and a text that can't be read says why."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwenmed import cli, files
from qwenmed.errors import UserError

posix = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden temporary files too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path) -> Path:
    """A file that a failed write must leave as it is."""
    path = tmp_path / "a.txt"
    path.write_text("old\n", encoding="utf-8")
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_file_appears_only_when_the_block_ends(old):
    with files.whole_file(old) as file:
        file.write("新\n")
        file.flush()
        assert old.read_text(encoding="utf-8") == "old\n"
    assert old.read_bytes() == "新\n".encode()
    assert names(old.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, cli.Terminated])
def test_failed_block_leaves_the_old_file_and_nothing_else(old, error):
    with pytest.raises(error), files.whole_file(old) as file:
        file.write("half")
        raise error
    assert old.read_text(encoding="utf-8") == "old\n"
    assert names(old.parent) == ["a.txt"]


def test_text_that_utf8_cannot_hold_leaves_the_old_file(old):
    with pytest.raises(UnicodeEncodeError), files.whole_file(old) as file:
        file.write("\ud800")
    assert old.read_text(encoding="utf-8") == "old\n"
    assert names(old.parent) == ["a.txt"]


def test_failed_first_write_leaves_no_file_at_all(tmp_path):
    with pytest.raises(ValueError), files.whole_file(tmp_path / "new.txt"):
        raise ValueError
    assert names(tmp_path) == []


@pytest.fixture
def windows_renaming(monkeypatch):
    """Files can't be removed or renamed, nor folders that hold them, while they are open: as Windows has it."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see what is open")

    def refusing(real):
        def call(path, *arguments, dir_fd=None, **options):
            where = Path(f"/proc/self/fd/{dir_fd}").resolve() / path if dir_fd is not None else Path(path).absolute()
            opened = [Path(os.path.realpath(link)) for link in Path("/proc/self/fd").iterdir()]
            if any(file.is_file() and (file == where or where in file.parents) for file in opened):
                raise PermissionError(errno.EACCES, "open", str(where))
            return real(path, *arguments, **options, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        return call

    for name in ("unlink", "remove", "rename", "replace"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.mark.parametrize("there_before", [False, True])
def test_folder_appears_whole_where_nothing_open_can_be_renamed(tmp_path, windows_renaming, there_before):
    target = tmp_path / "out"
    if there_before:
        target.mkdir()
    with files.whole_folder(target, "导出") as folder:
        (folder / "a").touch()
    assert names(target) == ["a"]
    with files.whole_folder(target, "导出") as folder:
        (folder / "b").touch()
    assert names(target) == ["b"]


def test_missing_folders_are_made(tmp_path):
    files.write_json(tmp_path / "x" / "y" / "a.json", {"名": "值"})
    assert (tmp_path / "x" / "y" / "a.json").read_text(encoding="utf-8") == '{\n  "名": "值"\n}\n'


@posix
def test_private_file_is_its_owners_alone_even_when_it_replaces_an_open_one(old):
    old.chmod(0o644)
    with files.whole_file(old, private=True) as file:
        file.write("secret")
    assert old.stat().st_mode & 0o777 == 0o600
    files.write_json(old.with_name("b.json"), {}, private=True)
    assert old.with_name("b.json").stat().st_mode & 0o777 == 0o600


@posix
def test_other_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
        # Finding the umask means setting it; it has to be put back.
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_several_files_are_written_together(tmp_path):
    files.write_whole({tmp_path / "a": "甲\n", tmp_path / "b": "乙\n"})
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in "ab"] == ["甲\n", "乙\n"]
    assert names(tmp_path) == ["a", "b"]


def test_none_of_several_files_is_written_when_one_has_a_file_for_a_folder(old):
    good = old.with_name("b.txt")
    with pytest.raises(OSError):
        files.write_whole({good: "new", old / "c.txt": "new"})
    assert old.read_text(encoding="utf-8") == "old\n"
    assert names(old.parent) == ["a.txt"]


@pytest.mark.parametrize("folder_first", [True, False])
def test_none_of_several_files_is_written_when_one_name_is_a_folder(old, folder_first):
    # This fails only at the renaming, when every text has been written already.
    folder = old.with_name("folder")
    folder.mkdir()
    pairs = [(folder, "new"), (old, "new")]
    with pytest.raises(OSError):
        files.write_whole(dict(pairs if folder_first else pairs[::-1]))
    assert old.read_text(encoding="utf-8") == "old\n"
    assert names(old.parent) == ["a.txt", "folder"]


def test_none_of_several_files_is_written_when_a_text_cannot_be_encoded(old):
    with pytest.raises(UnicodeEncodeError):
        files.write_whole({old: "new", old.with_name("b.txt"): "\ud800"})
    assert old.read_text(encoding="utf-8") == "old\n"
    assert names(old.parent) == ["a.txt"]


def test_full_disk_leaves_the_old_files_and_names_the_one_that_did_not_fit(small_disk):
    for name in "ab":
        (small_disk / name).write_text("old\n", encoding="utf-8")
    with pytest.raises(OSError) as caught:
        files.write_whole({small_disk / "a": "new\n", small_disk / "b": "长" * 100_000})
    assert caught.value.errno == errno.ENOSPC
    assert files.is_disk_full(caught.value, small_disk)
    # The user knows the final name, not the temporary one.
    assert str(small_disk / "b") in str(cli.explain_os_error(caught.value))
    assert [(small_disk / name).read_text(encoding="utf-8") for name in "ab"] == ["old\n", "old\n"]
    assert names(small_disk) == ["a", "b"]


def test_files_of_a_run_that_was_cut_short_between_them_are_told(tmp_path):
    path = tmp_path / "train.jsonl"
    files.write_whole({path: "a", tmp_path / "val.jsonl": "b"})
    files.check_belong_together(path)
    (tmp_path / files.UNFINISHED_MARK).touch()
    with pytest.raises(UserError, match="data.py"):
        files.check_belong_together(path)
    files.write_whole({path: "a", tmp_path / "val.jsonl": "b"})
    files.check_belong_together(path)


def test_growing_file_takes_its_name_at_the_end(old):
    with files.growing_file(old) as file:
        file.write("一\n")
        file.flush()
        assert old.read_text(encoding="utf-8") == "old\n"
    assert old.read_bytes() == "一\n".encode()
    assert names(old.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, cli.Terminated])
def test_growing_file_cut_short_keeps_what_was_written_and_the_old_file(old, error):
    with pytest.raises(error), files.growing_file(old) as file:
        file.write("一\n")
        raise error
    assert old.read_text(encoding="utf-8") == "old\n"
    assert old.with_name("a.txt.partial").read_bytes() == "一\n".encode()


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("甲\n乙\n".encode(), ["甲", "乙"]),
        ("\ufeff甲\n乙".encode(), ["甲", "乙"]),
        ("甲\r\n乙\r\n".encode(), ["甲", "乙"]),
    ],
)
def test_text_is_read_with_or_without_mark_and_with_any_line_ends(tmp_path, content, lines):
    (tmp_path / "a.txt").write_bytes(content)
    assert files.read_text(tmp_path / "a.txt").splitlines() == lines


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # Not every text will do: 头痛 in GBK happens to be valid UTF-8 for something else.
        (b"abc" + "咳嗽".encode("gbk"), ["UTF-8", "第 3 字节", "iconv"]),
        ("头痛".encode("utf-16"), ["UTF-8", "第 0 字节"]),
        ("头痛。".encode()[:-1], ["UTF-8", "第 6 字节"]),
        (bytes(range(256)), ["二进制"]),
        (b"", ["空"]),
        (b" \r\n\t\n", ["空"]),
        ("\ufeff".encode(), ["空"]),
    ],
)
def test_unreadable_text_says_why_in_one_line(tmp_path, content, words):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        files.read_text(path)
    message = str(caught.value)
    assert all(word in message for word in [*words, str(path)]), message
    assert "\n" not in message


def test_missing_file_and_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"不存在.*nothing\.txt"):
        files.read_text(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match="不是普通文件"):
        files.read_text(tmp_path)


def test_json_is_read_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text('{"名": [1]}', encoding="utf-8-sig")
    assert files.read_json(tmp_path / "a.json") == {"名": [1]}


def test_broken_json_is_named_with_line_and_column(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n  "a": 1,\n  "b": x\n}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"第 3 行第 8 列.*a\.json"):
        files.read_json(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[" + "1" * 5000 + "]"], ids=["too deep", "too long a number"])
def test_json_that_python_itself_refuses_is_a_user_error(tmp_path, text):
    # Python reads no number of more than 4300 digits; that is a plain ValueError, no JSONDecodeError.
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json"):
        files.read_json(path)


def test_jsonl_has_one_line_a_row_and_leaves_chinese_as_it_is():
    assert files.to_jsonl([{"问": "头\n痛"}, {}]) == '{"问": "头\\n痛"}\n{}\n'


def test_folder_is_proved_writable_without_leaving_anything(old):
    assert files.check_writable(old.parent / "x" / "y").is_dir()
    assert names(old.parent / "x" / "y") == []
    with pytest.raises(OSError):
        files.check_writable(old / "x")
