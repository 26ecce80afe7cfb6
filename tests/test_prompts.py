"""The scenarios: complete, careful, and extended by editing `prompts.py` alone."""

import json
import shutil
import subprocess
import sys

from conftest import ROOT

from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS, MEDICAL_SCENARIOS, SAMPLE_QUESTIONS
from qwenmed.batch import Requests

TEN = {
    "diagnosis": "症状诊断", "treatment": "治疗方案", "prevention": "疾病预防", "education": "医学教育",
    "emergency": "紧急评估", "nutrition": "营养指导", "mental_health": "心理健康", "pediatric": "儿科咨询",
    "geriatric": "老年健康", "women_health": "女性健康",
}  # fmt: skip


def test_ten_scenarios_in_menu_order():
    assert list(MEDICAL_SCENARIOS.items())[:10] == list(TEN.items())


def test_every_scenario_has_a_prompt_and_sample_questions():
    for scenario in MEDICAL_SCENARIOS:
        assert MEDICAL_PROMPTS[scenario].startswith(GENERAL_PROMPT)
        assert len(SAMPLE_QUESTIONS[scenario]) >= 2


def test_emergency_and_crisis_numbers_stand_where_they_are_needed():
    assert "立即拨打120" in MEDICAL_PROMPTS["emergency"] and "12356" in MEDICAL_PROMPTS["emergency"]
    assert "立即拨打120" in MEDICAL_PROMPTS["mental_health"] and "12356" in MEDICAL_PROMPTS["mental_health"]


def test_sample_file_covers_all_scenarios():
    rows = json.loads((ROOT / "sample_questions.json").read_text(encoding="utf-8"))
    assert len(rows) >= 20 and {row["scenario"] for row in rows} == set(TEN)
    assert len({row["question"] for row in rows}) == len(rows)
    assert all(isinstance(row["max_tokens"], int) and row["max_tokens"] > 0 for row in rows)


def test_demo_records_are_even_over_the_scenarios_and_careful(demo_rows):
    counts = {scenario: sum(row["scenario"] == scenario for row in demo_rows) for scenario in TEN}
    assert len(demo_rows) >= 80 and len(set(counts.values())) == 1
    for row in demo_rows:
        assert row["question"].strip() and row["think"].strip() and row["answer"].strip()
        if row["scenario"] == "emergency":
            assert "立即拨打120" in row["answer"]
        if row["scenario"] in ("pediatric", "women_health"):
            assert "mg" not in row["answer"] and "毫克" not in row["answer"], row["question"]


def test_eleventh_scenario_needs_nothing_but_prompts_py(tmp_path):
    for name in ("medical_assistant.py", "prompts.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "qwenmed", tmp_path / "qwenmed", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "prompts.py").open("a", encoding="utf-8") as file:
        file.write(
            'MEDICAL_SCENARIOS["dental"] = "口腔健康"\n'
            'MEDICAL_PROMPTS["dental"] = GENERAL_PROMPT + "请回答口腔问题。"\n'
            'SAMPLE_QUESTIONS["dental"] = ["牙龈出血怎么办？", "智齿要拔吗？"]\n'
        )
    run = [sys.executable, "medical_assistant.py"]
    shown = subprocess.run([*run, "--help"], cwd=tmp_path, capture_output=True, check=True).stdout.decode()
    assert "dental 口腔健康" in " ".join(shown.split())
    refused = subprocess.run([*run, "-q", "问", "-s", "x"], cwd=tmp_path, capture_output=True, check=False)
    assert refused.returncode == 2 and "dental（口腔健康）" in refused.stderr.decode()

    (tmp_path / "try.py").write_text(
        "from medical_assistant import MedicalAssistant, check_scenario, MEDICAL_SCENARIOS, SAMPLE_QUESTIONS\n"
        "from qwenmed import batch, terminal\n"
        "check_scenario('dental')\n"
        "assert batch.parse_request({'question': '问', 'scenario': 'dental'}, 1, MEDICAL_SCENARIOS, 'x', 9).error is None\n"
        "asked = []\n"
        "def ask(question, scenario):\n"
        "    asked.append((question, scenario)); yield 'answer', '答'\n"
        "terminal.Session(None, ask, MEDICAL_SCENARIOS, SAMPLE_QUESTIONS).run()\n"
        "assert asked == [('智齿要拔吗？', 'dental')], asked\n",
        encoding="utf-8",
    )
    menu = subprocess.run(
        [sys.executable, "try.py"],
        cwd=tmp_path,
        input=b"11\nsamples\n2\nquit\n",
        capture_output=True,
        check=False,
    )
    assert menu.returncode == 0, menu.stderr.decode()
    assert "11. 口腔健康（dental）" in menu.stdout.decode()


def test_the_three_tables_hold_the_same_scenarios():
    assert set(MEDICAL_PROMPTS) == set(SAMPLE_QUESTIONS) == set(MEDICAL_SCENARIOS)


def test_every_prompt_says_more_than_the_general_one_and_its_own():
    assert all(len(prompt) > len(GENERAL_PROMPT) for prompt in MEDICAL_PROMPTS.values())
    assert len(set(MEDICAL_PROMPTS.values())) == len(MEDICAL_PROMPTS)


def test_no_sample_question_is_blank_or_stands_twice():
    questions = [question for samples in SAMPLE_QUESTIONS.values() for question in samples]
    assert len(set(questions)) == len(questions)
    assert all(question and question == question.strip() for question in questions)


def test_batch_reader_accepts_every_row_of_the_sample_file():
    path = ROOT / "sample_questions.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    # The defaults are no valid scenario, so that a row which does not say its own would fail.
    requests = Requests(path, MEDICAL_SCENARIOS, "none", 1)
    assert [request.error for request in requests] == [None] * len(rows)
    assert [(r.question, r.scenario, r.max_tokens) for r in requests] == [
        (row["question"], row["scenario"], row["max_tokens"]) for row in rows
    ]
    assert all(type(row["max_tokens"]) is int for row in rows)
