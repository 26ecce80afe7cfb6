"""Reading any file of records: good rows survive, bad ones are named, nothing crashes."""

import csv
import datetime
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenmed import files, records, scenarios, schemas, sources, splitting
from qwenmed.errors import UserError
from qwenmed.records import Problem, Record

ROW = {"instruction": "i", "question": "头痛？", "think": "想", "answer": "休息。", "metrics": {"quality_f1": 0.9}}


def read(path):
    found, problems = sources.read_records(path)
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
    back = sources.read_records(path)[0][0]
    assert back == Record("问？", "想\n想", "答。", system="系统")
    assert scenarios.system_prompts(back, "通用", {}, "mixed") == ["系统"]


@pytest.mark.parametrize("count", [2, 10, 57, 120, 2407])
def test_split_is_the_original_project_s(count):
    shuffled = list(range(count))
    random.Random(42).shuffle(shuffled)
    train, val = splitting.split(range(count), 0.1, 42)
    assert list(train) == shuffled[: int(count * 0.9)] and [*train, *val] == shuffled
    assert count != 2407 or (len(train), len(val)) == (2166, 241)


def test_too_few_records_to_split_is_said():
    with pytest.raises(UserError, match="1 条"):
        splitting.split([0], 0.1, 42)


def test_system_prompt_modes():
    known, unknown = Record("q", "", "a", scenario="s"), Record("q", "", "a")
    prompts = {"s": "场景"}
    modes = ("general", "scenario", "mixed")
    assert [scenarios.system_prompts(known, "通用", prompts, m) for m in modes] == [
        ["通用"],
        ["场景"],
        ["通用", "场景"],
    ]
    assert [scenarios.system_prompts(unknown, "通用", prompts, m) for m in modes] == [["通用"]] * 3


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
        found, problems = sources.read_records(path)
    except UserError:
        return
    assert all(isinstance(record, Record) for record in found)
    assert all(isinstance(problem, Problem) for problem in problems)


@pytest.mark.parametrize("missing", ["{}", '{"think": null}', '{"think": ""}', '{"think": NaN}'])
def test_thinking_is_optional(tmp_path, missing):
    row = '{"question": "q", "answer": "a"' + (", " + missing[1:-1] if missing != "{}" else "") + "}\n"
    assert read(write(tmp_path / "a.jsonl", row)) == ([("q", "", "a")], [])


def test_last_line_that_is_whole_needs_no_line_end(tmp_path):
    assert len(read(write(tmp_path / "a.jsonl", line() + "\n" + line(question="二？")))[0]) == 2


def test_problem_in_a_json_list_has_its_number(tmp_path):
    for text in (f"[{line()}, 5, {line(answer='')}]", '{"data": [' + f"{line()}, 5, {line(answer='')}" + "]}"):
        path = write(tmp_path / "a.json", text)
        found, problems = read(path)
        assert len(found) == 1
        assert [problem.place for problem in problems] == [f"{path}:第2条", f"{path}:第3条"]


def test_problem_in_a_csv_file_has_its_line_after_a_row_of_several_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'question,answer\n"一\n二",a\nq,\nq,a,extra\nq,a\n')
    found, problems = read(path)
    assert [question for question, _, _ in found] == ["一\n二", "q"]
    assert [problem.place for problem in problems] == [f"{path}:4", f"{path}:5"]


def test_csv_file_that_ends_inside_of_an_answer_is_no_whole_file(tmp_path):
    # What is lost may be the "不要" of a warning.
    text = 'question,answer\n一,"甲"\n二,"可以先休息，不要自行停药"\n'
    assert len(read(write(tmp_path / "whole.csv", text))[0]) == 2
    with pytest.raises(UserError, match=r"whole\.csv:3.*没有写完"):
        read(write(tmp_path / "whole.csv", text[:-7]))


def test_quote_without_its_other_does_not_swallow_the_rows_behind_it(tmp_path):
    rows = [f'"问题{i}","回答{i}"' for i in range(50)]
    rows[10] = '"问题10","回答10'
    with pytest.raises(UserError, match=r"a\.csv:12.*引号"):
        read(write(tmp_path / "a.csv", "question,answer\n" + "\n".join(rows) + "\n"))


def test_long_answer_in_a_csv_file_is_read(tmp_path):
    answer = "长" * 140_000
    assert read(write(tmp_path / "a.csv", f"question,answer\nq,{answer}\n")) == ([("q", "", answer)], [])


def test_json_that_is_neither_list_nor_object_is_refused(tmp_path):
    with pytest.raises(UserError, match="列表"):
        read(write(tmp_path / "a.json", '"text"'))


def test_broken_parquet_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"Parquet.*a\.parquet"):
        read(write(tmp_path / "a.parquet", "PAR1 cut"))


@pytest.mark.parametrize(
    "row",
    [
        '{"input": "\\ud800", "output": "a"}',
        '{"input": "q", "output": "\\ud800"}',
        '{"instruction": "\\ud800", "input": "q", "output": "a"}',
        '{"question": "q", "think": "\\udfff", "answer": "a"}',
        '{"question": "q", "answer": "a", "scenario": "\\ud800"}',
        '{"question": "q", "answer": "a", "source": {"url": ["\\ud800"]}}',
        '{"question": "q", "answer": "a", "\\ud800": 1}',
    ],
)
def test_half_a_surrogate_pair_anywhere_in_a_row_is_a_problem(tmp_path, row):
    # Rows are written back unchanged as UTF-8, which has no way to write it: all four files would be lost.
    path = write(tmp_path / "a.jsonl", f"{line()}\n{row}\n")
    found, problems = read(path)
    assert len(found) == 1 and [problem.place for problem in problems] == [f"{path}:2"]


def test_whole_surrogate_pair_is_a_character_like_any_other(tmp_path):
    row = '{"question": "\\ud83d\\ude00", "answer": "a"}\n'
    assert read(write(tmp_path / "a.jsonl", row)) == ([("\U0001f600", "", "a")], [])


def test_number_too_long_for_python_to_read_spoils_only_its_row(tmp_path):
    # json raises a plain ValueError, no JSONDecodeError, for more than 4300 digits.
    path = write(tmp_path / "a.jsonl", f'{line()}\n{{"question": {"1" * 5000}}}\n{line(question="后？")}\n')
    found, problems = read(path)
    assert len(found) == 2 and [problem.place for problem in problems] == [f"{path}:2"]


@pytest.mark.parametrize("value", [datetime.datetime(2024, 1, 2), datetime.date(2024, 1, 2), b"\xff"], ids=repr)
def test_parquet_row_with_a_column_that_json_lacks_does_not_stop_the_writing(tmp_path, value):
    import pyarrow
    import pyarrow.parquet

    row = {"question": "q", "think": "", "answer": "a", "extra": value}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    found, problems = sources.read_records(tmp_path / "a.parquet")
    assert len(found) + len(problems) == 1
    files.to_jsonl(record.row for record in found)


def test_parquet_text_that_is_no_utf8_is_told_and_not_thrown(tmp_path):
    import pyarrow
    import pyarrow.parquet

    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
    bad = pyarrow.Array.from_buffers(pyarrow.utf8(), 1, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"question": bad, "answer": ["a"]}), tmp_path / "a.parquet")
    try:
        found, problems = sources.read_records(tmp_path / "a.parquet")
    except UserError as error:
        assert "a.parquet" in str(error)
    else:
        assert not found and len(problems) == 1


def test_folder_is_read_by_name_without_hidden_and_hub_files(tmp_path):
    for name in ("b/2.jsonl", "a/1.JSONL", ".cache/0.jsonl", "dataset_infos.json", "configuration.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, line(question=name) + "\n")
    assert [question for question, _, _ in read(tmp_path)[0]] == ["a/1.JSONL", "b/2.jsonl"]


@pytest.mark.parametrize(("name", "word"), [("nothing", "不存在"), ("a.xlsx", "不支持"), ("empty", "没有数据文件")])
def test_path_without_data_is_a_user_error_that_names_it(tmp_path, name, word):
    write(tmp_path / "a.xlsx", "PK")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{word}.*{name}"):
        read(tmp_path / name)


def test_prepared_file_allows_no_bad_row(tmp_path):
    path = write(tmp_path / "a.jsonl", f"{line()}\n5\n6\n")
    with pytest.raises(UserError, match=r"另有 1 行.*a\.jsonl:2"):
        sources.read_clean_records(path)
    with pytest.raises(UserError, match="data.py"):
        sources.read_clean_records(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="没有一条记录"):
        sources.read_clean_records(write(tmp_path / "a.json", "[]"))


@pytest.mark.parametrize("think", ["想\n\n想", ""])
def test_formatting_writes_exactly_what_it_reads(think):
    record = Record("问？", think, "答。\n\n二。")
    row = records.format_row(record, "系统")
    assert row == {
        "instruction": "系统",
        "input": "问？",
        "output": f"<think>\n{think}\n</think>\n\n答。\n\n二。",
    }
    (again,) = schemas.parse_row(row, "f:1")
    assert (again.question, again.think, again.answer, again.system) == ("问？", think, "答。\n\n二。", "系统")
    assert records.format_row(again, again.system) == row


@pytest.mark.parametrize(("count", "ratio"), [(0, 0.1), (1, 0.1), (5, 0.999), (5, 0.0)])
def test_split_never_leaves_a_side_empty(count, ratio):
    with pytest.raises(UserError, match=f"{count} 条"):
        splitting.split(range(count), ratio, 42)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_split_is_a_partition(count, ratio, seed):
    try:
        train, val = splitting.split(range(count), ratio, seed)
    except UserError:
        return
    assert train and val
    assert sorted([*train, *val]) == list(range(count))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
json_rows = st.fixed_dictionaries(
    {"question": st.just("q") | json_values, "answer": st.just("a") | json_values},
    optional={name: json_values for name in ("think", "scenario", "instruction", "output", "extra")},
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(json_rows | json_values, min_size=1, max_size=4))
def test_whatever_is_accepted_as_a_record_can_be_written_again(tmp_path, rows):
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found, problems = sources.read_records(tmp_path / "a.jsonl")
    assert len(found) + len(problems) == len(rows)
    files.write_whole({tmp_path / "b.txt": files.to_jsonl(record.row for record in found)})
