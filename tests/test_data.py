"""`data.py` as a user runs it."""

import json
import os
import random
import subprocess
import sys

import pytest
from conftest import ROOT, assert_user_error, run_script

from qwenmed import files

NAMES = ("train.jsonl", "val.jsonl", "train_format.jsonl", "val_format.jsonl")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make(folder, count, name="in.jsonl"):
    rows = [
        {"instruction": "i", "question": f"问题{i}", "think": f"思考{i}", "answer": f"回答{i}"} for i in range(count)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return rows


def test_clean_file_splits_exactly_as_the_original_project_did(tmp_path):
    rows = make(tmp_path, 57)
    done = run_script("data.py", "--source", "in.jsonl", cwd=tmp_path)
    assert done.status == 0, done.err
    random.Random(42).shuffle(rows)
    assert rows_of(tmp_path / "train.jsonl") == rows[:51] and rows_of(tmp_path / "val.jsonl") == rows[51:]


def test_formatted_rows_are_what_the_template_trains(tmp_path):
    make(tmp_path, 10)
    run_script("data.py", "--source", "in.jsonl", cwd=tmp_path)
    raw, formatted = rows_of(tmp_path / "val.jsonl")[0], rows_of(tmp_path / "val_format.jsonl")[0]
    assert formatted == {
        "instruction": "你是一个医学专家，你需要根据用户的问题，给出带有思考的回答。",
        "input": raw["question"],
        "output": f"<think>\n{raw['think']}\n</think>\n\n{raw['answer']}",
    }


def test_dropped_rows_are_named_with_line_and_reason_and_good_ones_kept(tmp_path):
    make(tmp_path, 12)
    lines = (tmp_path / "in.jsonl").read_text(encoding="utf-8").splitlines()
    lines[2] = '{"question": "只有问题", "think": "x"}'
    lines[4] = '{"question": "断了'
    lines[6] = lines[5]
    (tmp_path / "in.jsonl").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8-sig")
    done = run_script("data.py", "--source", "in.jsonl", cwd=tmp_path)
    assert done.status == 3
    assert "in.jsonl:3：缺少 answer" in done.err and "in.jsonl:5：不是合法的 JSON" in done.err
    assert "in.jsonl:7：与 in.jsonl:6 完全重复" in done.err
    assert "无效 2，重复 1，可用 9" in done.out
    assert len(rows_of(tmp_path / "train.jsonl")) + len(rows_of(tmp_path / "val.jsonl")) == 9


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "头痛怎么办", "think": "", "answer": "\\n"}, "缺少 answer"),
        ({"question": "\\n\\n", "think": "", "answer": "休息。"}, "缺少 question"),
        ({"prompt": "头痛怎么办", "response": "<think>\n\n</think>\n\n<think>\n好的，用户头痛"}, "<think>"),
        ({"question": "头痛怎么办", "answer": "\\n<think>\n好的，用户头痛"}, "<think>"),
    ],
)
def test_row_that_is_none_once_it_is_repaired_is_dropped(tmp_path, row, reason):
    make(tmp_path, 20)
    with (tmp_path / "in.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    done = run_script("data.py", "--source", "in.jsonl", cwd=tmp_path)
    assert done.status == 3, done.err
    [dropped] = rows_of(tmp_path / "dropped.jsonl")
    assert dropped["place"] == "in.jsonl:21" and reason in dropped["reason"]
    assert len(rows_of(tmp_path / "train.jsonl") + rows_of(tmp_path / "val.jsonl")) == 20
    assert all((tmp_path / name).exists() for name in NAMES)


def test_formatted_files_are_rebuilt_when_source_or_seed_change(tmp_path):
    make(tmp_path, 20)
    run_script("data.py", "--source", "in.jsonl", cwd=tmp_path)
    before = (tmp_path / "train_format.jsonl").read_text(encoding="utf-8")
    run_script("data.py", "--source", "in.jsonl", "--seed", "7", cwd=tmp_path)
    other_seed = (tmp_path / "train_format.jsonl").read_text(encoding="utf-8")
    text = (tmp_path / "in.jsonl").read_text(encoding="utf-8").replace("回答", "新回答")
    (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
    run_script("data.py", "--source", "in.jsonl", cwd=tmp_path)
    assert before != other_seed
    assert (tmp_path / "train_format.jsonl").read_text(encoding="utf-8") == before.replace("回答", "新回答").replace(
        "带有思考的新回答", "带有思考的回答"
    )


def test_demo_source_counts_tokens_and_spreads_over_the_scenarios(tmp_path):
    done = run_script("data.py", "--source", "demo", cwd=tmp_path)
    assert done.status == 0, done.err
    rows = rows_of(tmp_path / "train.jsonl") + rows_of(tmp_path / "val.jsonl")
    assert len(rows) >= 80 and "token" in done.out and "中位数" in done.out
    assert len({row["scenario"] for row in rows}) == 10
    # In the data the scenario is known, so each record is trained with both of its prompts.
    assert len(rows_of(tmp_path / "train_format.jsonl")) == 2 * len(rows_of(tmp_path / "train.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jsonl", None, ["missing.jsonl", "不存在"]),
        ("empty.jsonl", b"", ["empty.jsonl", "空"]),
        ("binary.jsonl", bytes(range(256)) * 8, ["binary.jsonl", "二进制"]),
        ("gbk.jsonl", '{"question": "头痛", "answer": "休息"}\n'.encode("gbk"), ["gbk.jsonl", "UTF-8"]),
        ("cut.jsonl", '{"question": "头痛", "answer": "休息"}\n{"question": "头'.encode(), ["cut.jsonl:2", "不完整"]),
        ("none.jsonl", '{"question": "头痛"}\n'.encode(), ["none.jsonl", "没有一条可用"]),
        ("cut.json", '[{"question": "头痛", "answer"'.encode(), ["cut.json", "JSON"]),
        ("data.parquet", b"PAR1 nothing", ["data.parquet", "Parquet"]),
        ("table.xlsx", b"PK", ["table.xlsx", "不支持"]),
    ],
)
def test_unusable_source_is_one_line_and_leaves_existing_files(tmp_path, name, content, words):
    for existing in NAMES:
        (tmp_path / existing).write_text("old\n", encoding="utf-8")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_user_error(run_script("data.py", "--source", name, cwd=tmp_path), *words)
    assert all((tmp_path / existing).read_text(encoding="utf-8") == "old\n" for existing in NAMES)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "train.jsonl"], ["train.jsonl", "--output-dir"]),
        (["--source", "."], ["dropped.jsonl", "--output-dir"]),
        (["--source", "in.jsonl", "--decontaminate", "val.jsonl"], ["val.jsonl", "--output-dir"]),
        (["--source", "val_format.jsonl", "--output-dir", "../work"], ["val_format.jsonl", "--output-dir"]),
    ],
)
def test_a_file_that_is_read_is_never_written_over(tmp_path, arguments, words):
    # Each run would move a tenth of the training rows into a val.jsonl that the next one throws away.
    work = tmp_path / "work"
    work.mkdir()
    for name in (*NAMES, "in.jsonl", "dropped.jsonl"):
        make(work, 12, name)
    (work / "val.jsonl").write_text('{"question": "头痛发热三天怎么办", "answer": "休息。"}\n', encoding="utf-8")
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    assert_user_error(run_script("data.py", *arguments, cwd=work), *words)
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
    assert run_script("data.py", "--source", "train.jsonl", "--output-dir", "other", cwd=work).status == 0


def test_two_runs_do_not_write_into_one_folder_at_once(tmp_path):
    make(tmp_path, 10)
    with files.holding(tmp_path, "数据准备"):
        done = run_script("data.py", "--source", "in.jsonl", cwd=tmp_path)
    assert_user_error(done, "另一个数据准备正在使用", "--output-dir")
    assert not [name for name in NAMES if (tmp_path / name).exists()]
    assert run_script("data.py", "--source", "in.jsonl", cwd=tmp_path).status == 0
    assert not list(tmp_path.glob(".*"))


def test_file_names_that_are_no_utf8_are_told_as_far_as_they_can_be(tmp_path):
    make(tmp_path, 12)
    good = (tmp_path / "in.jsonl").read_bytes()
    gbk = os.fsdecode("问诊".encode("gbk"))
    contents = {"jsonl": good + b'{"question": "q"}\n', "csv": b"question,answer\nq,\n", "json": b'[{"question": "q"}]'}
    (tmp_path / "in").mkdir()
    try:
        for suffix, content in contents.items():
            (tmp_path / "in" / f"{gbk}.{suffix}").write_bytes(content)
        (tmp_path / f"{gbk}.jsonl").write_bytes(good + good.replace("问题".encode(), "另有问题".encode()))
        (tmp_path / f"{gbk}.txt").write_text("另有问题3另有问题3\n", encoding="utf-8")
    except (OSError, UnicodeEncodeError):
        pytest.skip("file names are always text here")
    sources = ("--source", "in", f"{gbk}.jsonl", "--decontaminate", f"{gbk}.txt")
    done = run_script("data.py", *sources, "--audit", cwd=tmp_path)
    assert done.status == 3, done.err
    shown = gbk.encode(errors="backslashreplace").decode()
    places = {row["place"] for row in rows_of(tmp_path / "dropped.jsonl")}
    assert {f"in/{shown}.csv:2", f"in/{shown}.json:第1条", f"in/{shown}.jsonl:13"} < places
    report = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert f"in/{shown}.jsonl" in [each["file"] for each in report["sources"]]
    assert shown in (tmp_path / "audit.html").read_text(encoding="utf-8")


def test_scenario_of_the_data_can_not_steer_the_terminal(tmp_path):
    make(tmp_path, 12)
    with (tmp_path / "in.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"question": "头痛？", "answer": "休息。", "scenario": "\x1b[2J\x9b31m"}) + "\n")
    done = run_script("data.py", "--source", "in.jsonl", cwd=tmp_path)
    assert done.status == 0 and "\u241b[2J" in done.out
    assert "\x1b" not in done.out and "\x9b" not in done.out


def test_full_disk_leaves_the_old_files(tmp_path):
    if os.name != "posix" or os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("needs root on Linux to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for existing in NAMES:
            (disk / existing).write_text("old\n", encoding="utf-8")
        make(tmp_path, 500)
        done = run_script("data.py", "--source", "in.jsonl", "--output-dir", disk, cwd=tmp_path)
        assert_user_error(done, "磁盘空间已满", "disk")
        assert all((disk / existing).read_text(encoding="utf-8") == "old\n" for existing in NAMES)
        assert sorted(path.name for path in disk.iterdir()) == sorted(NAMES)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = run_script("data.py", "--source", "in.jsonl", "--output-dir", disk, cwd=tmp_path)
        assert_user_error(done, "只读", "disk")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_output_folder_that_is_a_file_is_refused(tmp_path):
    make(tmp_path, 10)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert_user_error(run_script("data.py", "--source", "in.jsonl", "--output-dir", "file", cwd=tmp_path), "file")


def test_bad_options_are_one_line(tmp_path):
    done = run_script("data.py", "--source", "demo", "--val-ratio", "1.5", cwd=tmp_path)
    assert_user_error(done, "--val-ratio")


def test_runs_from_any_folder_and_under_a_gbk_console(tmp_path):
    make(tmp_path, 10)
    done = run_script(
        "data.py", "--source", "in.jsonl", cwd=tmp_path, env={"PYTHONIOENCODING": "gbk", "PYTHONUTF8": "0"}
    )
    assert done.status == 0 and "可用 10" in done.out
    assert ROOT not in [tmp_path, *tmp_path.parents]
