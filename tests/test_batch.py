"""Batch files: each row becomes a request, and a bad one says so without spoiling the others."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from conftest import assert_user_error, run_script
from fakes import Instant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenmed import files
from qwenmed.batch import Request, Requests, parse_request, results_file
from qwenmed.errors import UserError

SCENARIOS = {"diagnosis": "症状诊断", "nutrition": "营养指导"}


def read(path):
    return list(Requests(path, SCENARIOS, "diagnosis", 100))


def parse(row, number=1):
    return parse_request(row, number, SCENARIOS, "diagnosis", 100)


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


ROWS = [
    {"question": "头痛？"},
    {"question": " 怎么吃？ ", "scenario": "nutrition", "max_tokens": 7, "id": "甲"},
]
EXPECTED = [Request(1, "头痛？", "diagnosis", 100), Request("甲", "怎么吃？", "nutrition", 7)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, ensure_ascii=False, indent=1).replace("\n", "\r\n")),
        ("A.JSON", json.dumps(ROWS)),
        ("a.jsonl", files.to_jsonl(ROWS)),
        ("a.jsonl", files.to_jsonl(ROWS).replace("\n", "\r\n\r\n")),
        ("a.jsonl", files.to_jsonl(ROWS).rstrip("\n")),
    ],
)
def test_json_and_jsonl_give_the_same_requests(tmp_path, name, text):
    assert read(write(tmp_path, name, text)) == EXPECTED


def test_csv_gives_the_same_requests_and_its_empty_cells_mean_not_given(tmp_path):
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["question", "scenario", "max_tokens", "id"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert read(tmp_path / "a.csv") == EXPECTED


def test_csv_question_may_hold_quotes_commas_and_line_breaks(tmp_path):
    path = write(tmp_path, "a.csv", 'question\n"他说""疼"",\n要紧吗？"\n')
    assert [request.question for request in read(path)] == ['他说"疼",\n要紧吗？']


def test_rows_may_be_plain_texts(tmp_path):
    assert read(write(tmp_path, "a.json", '["头痛？", {"question": "二？"}]')) == [
        Request(1, "头痛？", "diagnosis", 100),
        Request(2, "二？", "diagnosis", 100),
    ]


@pytest.mark.parametrize("document", ['{"question": "头痛？"}', '"头痛？"', "5", "null"])
def test_json_that_is_no_list_is_refused(tmp_path, document):
    with pytest.raises(UserError, match=r"列表.*a\.json"):
        read(write(tmp_path, "a.json", document))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.json", '[{"question": "头'),
        ("a.jsonl", "\n\n"),
        ("a.jsonl", '{"question": "一？"}\n{"question": "二'),
        ("a.csv", "question,scenario\n"),
        ("a.csv", "头痛".encode("gbk")),
        ("a.txt", "头痛？"),
        ("a", "头痛？"),
        ("a.parquet", "PAR1"),
    ],
)
def test_unusable_file_is_a_user_error_that_names_it(tmp_path, name, text):
    path = write(tmp_path, name, text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["no.json", "no.jsonl", "no.csv", "no.txt"])
def test_missing_file_is_said_to_be_missing(tmp_path, name):
    with pytest.raises(UserError, match="不存在"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["folder.json", "folder.jsonl", "folder.csv"])
def test_folder_is_no_batch_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="不是普通文件"):
        read(tmp_path / name)


BAD_ROWS = [
    ({}, "question"),
    ({"scenario": "nutrition"}, "question"),
    ({"question": ""}, "question"),
    ({"question": " \n"}, "question"),
    ({"question": None}, "question"),
    ({"question": 5}, "question"),
    ({"question": ["头痛"]}, "question"),
    ("  ", "question"),
    ({"question": "q", "scenario": "dental"}, "未知场景 'dental'"),
    ({"question": "q", "scenario": 3}, "未知场景 3"),
    ({"question": "q", "scenario": ["diagnosis"]}, "未知场景"),
    ({"question": 5, "max_tokens": -3}, "question"),
    ({"max_tokens": True, "scenario": 5}, "question"),
    ({"question": "q", "max_tokens": "abc"}, "max_tokens"),
    ({"question": "q", "max_tokens": 0}, "max_tokens"),
    ({"question": "q", "max_tokens": "0"}, "max_tokens"),
    ({"question": "q", "max_tokens": -1}, "max_tokens"),
    ({"question": "q", "max_tokens": "-1"}, "max_tokens"),
    ({"question": "q", "max_tokens": True}, "max_tokens"),
    ({"question": "q", "max_tokens": False}, "max_tokens"),
    ({"question": "q", "max_tokens": 1.5}, "max_tokens"),
    ({"question": "q", "max_tokens": "²"}, "max_tokens"),  # isdigit() is true of it, int() refuses it
    ({"question": "q", "max_tokens": [1]}, "max_tokens"),
    (5, "int"),
    (None, "NoneType"),
    (["q"], "list"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_row_says_what_is_wrong_with_it(row, reason):
    request = parse(row, 4)
    assert request.id == 4 and reason in request.error
    assert isinstance(request.question, str) and isinstance(request.scenario, str)
    assert type(request.max_tokens) is int and request.max_tokens > 0


def test_limit_too_long_for_python_to_read_is_a_bad_row_too():
    # int() takes no text of more than 4300 digits.
    assert "max_tokens" in parse({"question": "q", "max_tokens": "9" * 5000}).error


@pytest.mark.parametrize("field", ["question", "scenario", "id"])
def test_half_a_surrogate_pair_is_a_bad_row_that_can_still_be_written_out(tmp_path, field):
    # The results are UTF-8: one such row must not cost the answers of a whole night.
    row = {"question": "q", field: json.loads('"\\ud800"')}
    request = parse(row)
    assert request.error
    with files.growing_file(tmp_path / "out.jsonl") as file:
        file.write(files.to_jsonl([{"id": request.id, "question": request.question, "scenario": request.scenario}]))


def test_bad_rows_leave_the_others_alone_in_order(tmp_path):
    rows = [{"question": "首？"}, *(row for row, _ in BAD_ROWS), {"question": "尾？"}]
    found = read(write(tmp_path, "a.json", json.dumps(rows)))
    assert len(found) == len(rows)
    assert [request.question for request in found if request.error is None] == ["首？", "尾？"]
    assert [request.id for request in found] == list(range(1, len(rows) + 1))


def test_line_that_is_no_json_is_a_bad_row_and_the_others_are_fine(tmp_path):
    found = read(write(tmp_path, "a.jsonl", '{"question": "一？"}\n{bad\n{"question": "三？"}\n'))
    assert [request.error is None for request in found] == [True, False, True]
    assert "JSON" in found[1].error and found[1].id == 2


def test_csv_row_with_too_many_cells_is_a_bad_row_and_the_others_are_fine(tmp_path):
    found = read(write(tmp_path, "a.csv", "question\n一？\n二？,多\n三？\n"))
    assert [request.error is None for request in found] == [True, False, True]


def test_defaults_fill_what_a_row_does_not_say():
    given = parse_request({"question": "q", "scenario": None, "max_tokens": ""}, 3, SCENARIOS, "nutrition", 9)
    assert given == Request(3, "q", "nutrition", 9)


@pytest.mark.parametrize("limit", [50, "50", " 50 ", "50\x1f", "\u300050"])
def test_limit_may_be_a_number_or_the_text_of_one(limit):
    assert parse({"question": "q", "max_tokens": limit}) == Request(1, "q", "diagnosis", 50)


@pytest.mark.parametrize("id_", ["甲", 0, 17, False])
def test_row_keeps_its_own_id(id_):
    assert parse({"question": "q", "id": id_}).id is id_


@pytest.mark.parametrize("id_", [None, ""])
def test_row_without_an_id_is_called_by_its_number(id_):
    assert parse({"question": "q", "id": id_}, 5).id == parse({"question": "q"}, 5).id == 5


def test_unknown_scenario_lists_the_known_ones():
    assert "diagnosis、nutrition" in parse({"question": "q", "scenario": "x"}).error


# Results that survive.


def ask(folder, rows, output="a.jsonl", engine=None, **rest):
    """Run the batch command's core in this process with an instant engine; returns its exit status."""
    from medical_assistant import MedicalAssistant
    from prompts import MEDICAL_SCENARIOS
    from qwenmed import commands

    path = folder / "q.jsonl"
    path.write_text(files.to_jsonl(rows), encoding="utf-8")
    assistant = MedicalAssistant(engine=engine or Instant(), **rest.pop("settings", {}))
    requests = Requests(path, MEDICAL_SCENARIOS, "diagnosis", 100)
    return commands.answer_batch(assistant, requests, folder / output, **rest)


def results(folder, name="a.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


class Dying(Instant):
    """An engine that is killed before its n-th answer."""

    def __init__(self, after):
        super().__init__()
        self._after = after

    def generate(self, prompts):
        for number, result in enumerate(super().generate(prompts)):
            if number == self._after:
                raise KeyboardInterrupt
            yield result


QUESTIONS = [{"id": i, "question": f"头痛{i}天怎么办？"} for i in range(20)]


def test_interrupted_batch_goes_on_where_it_was_and_asks_nothing_twice(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, QUESTIONS, engine=Dying(7))
    assert "完成 7 题" in capsys.readouterr().err.replace("写好", "完成") and not (tmp_path / "a.jsonl").exists()
    with pytest.raises(UserError, match=r"a\.jsonl\.partial.*--resume"):
        ask(tmp_path, QUESTIONS)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, QUESTIONS, engine=Dying(9), resume=True)  # nine rows, the seven known ones among them
    engine = Instant()
    assert ask(tmp_path, QUESTIONS, engine=engine, resume=True) == 0
    assert len(engine.asked) == 20 - 9 and [row["id"] for row in results(tmp_path)] == list(range(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


def test_resumed_rows_are_those_of_an_uninterrupted_run(tmp_path):
    assert ask(tmp_path, QUESTIONS, "whole.jsonl") == 0
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, QUESTIONS, engine=Dying(5))
    with (tmp_path / "a.jsonl.partial").open("a", encoding="utf-8") as file:
        file.write('{"id": 5, "question": "头痛5天怎')  # a line that a kill has cut
    assert ask(tmp_path, QUESTIONS, resume=True) == 0
    assert results(tmp_path) == results(tmp_path, "whole.jsonl")


def test_what_was_asked_otherwise_is_asked_again(tmp_path):
    assert ask(tmp_path, QUESTIONS) == 0
    changed = [dict(row) for row in QUESTIONS]
    changed[3]["question"] = "别的？"
    changed[4]["scenario"] = "nutrition"
    changed[5]["max_tokens"] = 7
    changed.insert(0, {"id": "new", "question": "新的？"})
    engine = Instant()
    assert ask(tmp_path, changed, engine=engine, resume=True) == 0
    assert len(engine.asked) == 4 and [row["id"] for row in results(tmp_path)] == ["new", *range(20)]
    other = Instant()
    assert ask(tmp_path, changed, engine=other, resume=True, settings={"think_budget": 5}) == 0
    assert len(other.asked) == 21
    retrained = Instant()
    retrained.fingerprint = "another model"
    assert ask(tmp_path, changed, engine=retrained, resume=True, settings={"think_budget": 5}) == 0
    assert len(retrained.asked) == 21


def test_rows_whose_system_prompt_has_changed_are_asked_again(tmp_path, monkeypatch):
    from prompts import MEDICAL_PROMPTS

    rows = [*QUESTIONS, {"id": "other", "question": "怎么吃？", "scenario": "nutrition"}]
    assert ask(tmp_path, rows) == 0
    monkeypatch.setitem(MEDICAL_PROMPTS, "nutrition", "你是营养师。")
    engine = Instant()
    assert ask(tmp_path, rows, engine=engine, resume=True) == 0
    assert [prompt.messages[0]["content"] for prompt in engine.asked] == ["你是营养师。"]


def test_failed_rows_are_tried_again_and_others_are_not(tmp_path):
    class Failing(Instant):
        def generate(self, prompts):
            for number, result in enumerate(super().generate(prompts)):
                yield UserError("服务器中途断开") if number % 2 else result

    assert ask(tmp_path, QUESTIONS, engine=Failing()) == 3
    assert sum("error" in row for row in results(tmp_path)) == 10
    engine = Instant()
    assert ask(tmp_path, QUESTIONS, engine=engine, resume=True) == 0
    assert len(engine.asked) == 10 and not any("error" in row for row in results(tmp_path))


def test_engine_that_loses_rows_ends_in_an_error_and_keeps_those_that_came(tmp_path):
    class Losing(Instant):
        def generate(self, prompts):
            yield next(super().generate(prompts))

    with pytest.raises(UserError, match=r"20 题.*1 题.*a\.jsonl.*--resume"):
        ask(tmp_path, QUESTIONS, engine=Losing())
    assert not (tmp_path / "a.jsonl").exists() and len(results(tmp_path, "a.jsonl.partial")) == 1
    assert ask(tmp_path, QUESTIONS, resume=True) == 0


def test_second_run_into_the_same_results_is_refused_and_harms_no_row(tmp_path):
    class Beside(Instant):
        """While it answers, the same batch is started again."""

        def generate(self, prompts):
            for number, result in enumerate(super().generate(prompts)):
                yield result
                if number == 5:
                    for resume in (False, True):
                        with pytest.raises(UserError, match=r"正在写.*a\.jsonl"):
                            ask(tmp_path, QUESTIONS, resume=resume)

    assert ask(tmp_path, QUESTIONS, engine=Beside()) == 0
    assert [row["id"] for row in results(tmp_path)] == list(range(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


def test_triage_masks_what_the_model_would_not_see_either(tmp_path):
    question = "我电话13812345678，邮箱a.b@c.com，胸口剧痛，大汗，左胳膊疼"
    done = run_script("medical_assistant.py", "--triage", "--redact", "-q", question, cwd=tmp_path)
    row = json.loads(done.out)
    assert row["question"] == "我电话[手机号]，邮箱[邮箱]，胸口剧痛，大汗，左胳膊疼" and row["urgency"] == "emergency"
    (tmp_path / "q.jsonl").write_text(files.to_jsonl([{"question": question}]), encoding="utf-8")
    done = run_script("medical_assistant.py", "--triage", "--redact", "-b", "q.jsonl", "-o", "t.jsonl", cwd=tmp_path)
    assert done.status == 0 and results(tmp_path, "t.jsonl") == [row], done.err


def test_triage_takes_no_interrupted_batch_away(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, QUESTIONS, engine=Dying(7))
    kept = results(tmp_path, "a.jsonl.partial")
    triage = ("medical_assistant.py", "--triage", "-b", "q.jsonl", "-o", "a.jsonl")
    assert_user_error(run_script(*triage, cwd=tmp_path), "没有做完", "a.jsonl.partial")
    assert_user_error(run_script(*triage, "--resume", cwd=tmp_path), "--triage", "--resume")
    assert results(tmp_path, "a.jsonl.partial") == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.partial", "q.jsonl"]


@pytest.mark.parametrize("more", [[], ["--resume"], ["--triage"]])
def test_results_never_take_the_place_of_their_questions(tmp_path, more):
    text = json.dumps({"question": "头痛？"}, ensure_ascii=False) + "\n"
    (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
    done = run_script("medical_assistant.py", "-b", "q.jsonl", "-o", "./q.jsonl", *more, cwd=tmp_path)
    assert_user_error(done, "-o", "问题文件")
    assert (tmp_path / "q.jsonl").read_text(encoding="utf-8") == text


def test_folder_as_results_file_is_refused_before_any_question_is_asked(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for resume in (False, True):
        engine = Instant()
        with pytest.raises(UserError, match="目录.*folder"):
            ask(tmp_path, QUESTIONS, "folder", engine=engine, resume=resume)
        assert engine.asked == []
        with pytest.raises(UserError, match="目录"), results_file(Path(), resume):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "q.jsonl"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of the open files")
def test_results_are_renamed_over_no_open_file(tmp_path, monkeypatch):
    # Windows refuses it.
    assert ask(tmp_path, QUESTIONS) == 0
    whole, renamed = Path.replace, []

    def watching(self, target):
        renamed.append(Path(target).name)
        assert str(target) not in [
            str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()
        ]
        return whole(self, target)

    monkeypatch.setattr(Path, "replace", watching)
    assert ask(tmp_path, QUESTIONS, resume=True) == 0
    assert ask(tmp_path, [{"question": "别的？"}], resume=True) == 0
    assert renamed == ["a.jsonl", "a.jsonl"]


def test_same_question_twice_keeps_both_rows(tmp_path):
    rows = [
        {"question": "头痛？"},
        {"question": "头痛？"},
        {"id": "x", "question": "头痛？"},
        {"id": "x", "question": "头痛？"},
    ]
    for resume in (False, True):
        assert ask(tmp_path, rows, resume=resume) == 0
        assert [row["id"] for row in results(tmp_path)] == [1, 2, "x", "x"]


def test_bad_rows_and_mixed_scenarios_in_order(tmp_path):
    from prompts import MEDICAL_PROMPTS

    rows = [{"question": f"第{i}问？", "scenario": scenario} for i, scenario in enumerate(MEDICAL_PROMPTS)]
    rows[4:4] = [{"question": ""}, {"question": "胸口剧痛，大汗，左胳膊疼", "scenario": "surgery"}]
    engine = Instant()
    assert ask(tmp_path, rows, engine=engine) == 3
    assert [prompt.messages[0]["content"] for prompt in engine.asked] == list(MEDICAL_PROMPTS.values())
    found = results(tmp_path)
    assert ["error" in row for row in found] == [False] * 4 + [True, True] + [False] * 6
    assert "立即拨打120" in found[5]["answer"]  # an emergency is told even where the row can't be asked


def test_file_that_breaks_off_in_the_middle_is_found_before_any_question_is_asked(tmp_path):
    engine = Instant()
    (tmp_path / "q.jsonl").write_text('{"question": "一？"}\n{"question": "二', encoding="utf-8")
    with pytest.raises(UserError, match="不完整"):
        Requests(tmp_path / "q.jsonl", SCENARIOS, "diagnosis", 9)
    assert engine.asked == []


def test_many_rows_take_no_more_memory_than_a_window(tmp_path):
    import tracemalloc

    def rows():
        for i in range(600):
            yield {"id": i, "question": f"头痛{i}天怎么办？" * 20}

    from medical_assistant import MedicalAssistant

    class Forgetful(Instant):
        def generate(self, prompts):
            for result in super().generate(prompts):
                self.asked.clear()
                yield result

    assistant = MedicalAssistant(engine=Forgetful())
    for _ in assistant.batch([{"question": "头痛？"}]):
        pass
    tracemalloc.start()
    for _ in assistant.batch(rows()):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19, peak


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(0, 12), max_size=3),
    ids=st.lists(st.sampled_from(["a", "b", 1, 2, None]), min_size=1, max_size=12),
)
def test_any_interruptions_end_in_the_same_file(tmp_path, cuts, ids):
    folder = tmp_path / "x"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = [{"id": id_, "question": f"第{i % 4}问？"} for i, id_ in enumerate(ids)]
    ask(folder, rows, "whole.jsonl")
    for cut in cuts:
        try:
            ask(folder, rows, engine=Dying(cut), resume=True)
        except KeyboardInterrupt:
            continue
    ask(folder, rows, resume=True)
    assert results(folder) == results(folder, "whole.jsonl")
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "q.jsonl", "whole.jsonl"]
