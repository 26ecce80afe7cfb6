"""Reading any file of records: good rows survive, bad ones are named, nothing crashes."""

import csv
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenmed import files, records
from qwenmed.errors import UserError
from qwenmed.records import Problem, Record

ROW = {"instruction": "i", "question": "头痛？", "think": "想", "answer": "休息。", "metrics": {"quality_f1": 0.9}}


def read(path):
    found, problems = records.read_records(path)
    return [(r.question, r.think, r.answer) for r in found], problems


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def line(**changes):
    return json.dumps({**ROW, **changes}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", line() + "\n"),
        ("a.jsonl", "\ufeff" + line() + "\r\n\r\n"),
        ("a.json", "[" + line() + "]"),
        ("a.json", '{"data": [' + line() + "]}"),
        ("a.json", line() + "\n"),
    ],
)
def test_json_in_all_its_shapes(tmp_path, name, text):
    assert read(write(tmp_path / name, text)) == ([("头痛？", "想", "休息。")], [])


def test_several_json_lines_under_a_json_name(tmp_path):
    path = write(tmp_path / "a.json", line() + "\n" + line(question="二？") + "\n")
    assert len(read(path)[0]) == 2


def test_csv_with_quotes_newlines_and_byte_order_mark(tmp_path):
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["question", "think", "answer"])
        writer.writeheader()
        writer.writerow({"question": '他说"疼"，\n要紧吗？', "think": "", "answer": "去看。"})
    assert read(tmp_path / "a.csv") == ([('他说"疼"，\n要紧吗？', "", "去看。")], [])


def test_parquet_and_a_folder_of_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, {**ROW, "answer": None}]), tmp_path / "b.parquet")
    write(tmp_path / "a.jsonl", line(question="一？") + "\n")
    write(tmp_path / "README.md", "no data")
    found, problems = read(tmp_path)
    assert [question for question, _, _ in found] == ["一？", "头痛？"]
    assert problems[0].place.endswith("b.parquet:第2条") and "answer" in problems[0].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"question": "q"}', "缺少 answer"),
        ('{"question": " ", "answer": "a"}', "缺少 question"),
        ('{"question": 1, "answer": "a"}', "question 应为文本"),
        ('{"question": "q", "answer": ["a"]}', "answer 应为文本"),
        ('{"question": "\\ud800", "answer": "a"}', "代理对"),
        ("[1]", "JSON 对象"),
        ("{bad", "不是合法的 JSON"),
        ("[" * 100_000, "嵌套过深"),
        ('{"input": "q", "output": "<think>\\n想\\n</think>\\n\\n"}', "没有回答"),
    ],
)
def test_bad_row_is_named_with_its_line_and_the_others_are_kept(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", f"{line()}\n{row}\n{line(question='后？')}\n")
    found, problems = read(path)
    assert len(found) == 2 and len(problems) == 1
    assert problems[0].place == f"{path}:2" and reason in problems[0].reason


def test_last_line_cut_off_means_an_incomplete_file(tmp_path):
    path = write(tmp_path / "a.jsonl", line() + "\n" + line()[:-5])
    with pytest.raises(UserError, match=r"最后一行不完整.*a\.jsonl:2"):
        read(path)


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    text = "一\u2028二\u0085三\u000b四"
    path = write(tmp_path / "a.jsonl", line(answer=text) + "\n")
    assert read(path)[0][0][2] == text


def test_formatted_rows_read_back_as_they_were(tmp_path):
    record = Record("问？", "想\n想", "答。")
    row = records.format_row(record, "系统")
    assert row["output"] == "<think>\n想\n想\n</think>\n\n答。"
    path = write(tmp_path / "a.jsonl", files.to_jsonl([row]))
    back = records.read_records(path)[0][0]
    assert back == Record("问？", "想\n想", "答。", system="系统")
    assert records.system_prompts(back, "通用", {}, "mixed") == ["系统"]


def test_first_of_equal_records_stays():
    twins = [Record("q", "t", "a", place="f:1"), Record("q", "t", "b", place="f:2"), Record("q", "t", "a", place="f:3")]
    kept, dropped = records.drop_duplicates(twins)
    assert [record.place for record in kept] == ["f:1", "f:2"]
    assert dropped == [Problem("f:3", "与 f:1 完全重复")]


@pytest.mark.parametrize("count", [2, 10, 57, 120, 2407])
def test_split_is_the_original_project_s(count):
    everything = [Record(str(i), "", "a") for i in range(count)]
    shuffled = list(everything)
    random.Random(42).shuffle(shuffled)
    train, val = records.split(everything, 0.1, 42)
    assert train == shuffled[: int(count * 0.9)] and train + val == shuffled
    assert count != 2407 or (len(train), len(val)) == (2166, 241)


def test_too_few_records_to_split_is_said():
    with pytest.raises(UserError, match="1 条"):
        records.split([Record("q", "", "a")], 0.1, 42)


def test_system_prompt_modes():
    known, unknown = Record("q", "", "a", scenario="s"), Record("q", "", "a")
    prompts = {"s": "场景"}
    modes = ("general", "scenario", "mixed")
    assert [records.system_prompts(known, "通用", prompts, m) for m in modes] == [["通用"], ["场景"], ["通用", "场景"]]
    assert [records.system_prompts(unknown, "通用", prompts, m) for m in modes] == [["通用"]] * 3


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(texts, st.text(st.characters(exclude_categories=["Cs"])), texts), min_size=1))
def test_any_texts_survive_writing_and_reading(tmp_path, rows):
    dicts = [{"question": q, "think": t, "answer": a} for q, t, a in rows]
    files.write_whole({tmp_path / "a.jsonl": files.to_jsonl(dicts)})
    assert read(tmp_path / "a.jsonl") == (rows, [])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(),
        st.lists(
            st.sampled_from(
                ['{"question":"q","answer":"a"}', "\n", "[", "]", "{", '"', ",", "\\", "\0", "NaN", "\ufeff", "q", "\r"]
            )
        ).map(lambda parts: "".join(parts).encode()),
    ),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]),
)
def test_no_bytes_whatever_give_anything_but_records_problems_or_a_user_error(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    try:
        found, problems = records.read_records(path)
    except UserError:
        return
    assert all(isinstance(record, Record) for record in found)
    assert all(isinstance(problem, Problem) for problem in problems)
