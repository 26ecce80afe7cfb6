"""`data.py` over whole files: what is found and what is done about it, and that nothing straddles the split."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import REAL_SAMPLE, ROOT, assert_user_error, run_script
from test_data import rows_of
from test_findings import sentences, some_rows, write

from qwenmed import files


def checks_of(folder):
    report = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    return {check["key"]: check["count"] for check in report["checks"]}, report


def test_near_duplicates_and_same_questions_stay_on_one_side(tmp_path):
    rows = some_rows(60)
    rows += [{**row, "answer": row["answer"][:-3] + "另外。"} for row in rows[:25]]
    rows += [{**row, "answer": sentences(random.Random(i), 4)} for i, row in enumerate(rows[25:40])]
    write(tmp_path / "in.jsonl", rows)
    done = run_script("data.py", "--source", "in.jsonl", "--audit", "--val-ratio", "0.3", cwd=tmp_path)
    assert done.status == 0, done.err
    train, val = (rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "val"))
    assert len(train) + len(val) == 100 and abs(len(val) - 30) <= 1
    assert not {row["question"] for row in train} & {row["question"] for row in val}
    counts, _ = checks_of(tmp_path)
    assert counts["near_duplicate"] == 25 and counts["same_question"] == 40
    done = run_script(
        "data.py", "--source", "in.jsonl", "--drop", "near_duplicate", "--near-duplicate", "0.7", cwd=tmp_path
    )
    assert sum(len(rows_of(tmp_path / f"{name}.jsonl")) for name in ("train", "val")) == 75
    assert "近似重复 25" in done.out and "in.jsonl:61：与 in.jsonl:1 近似重复" in done.err


def test_rows_whose_common_twin_is_dropped_still_stay_together(tmp_path):
    rows = some_rows(200)
    for number in range(0, 180, 3):  # the first of three has no end and goes; the others have its question
        rows[number]["answer"] += "然后"
        for later in (number + 1, number + 2):
            rows[later]["question"] = rows[number]["question"]
    write(tmp_path / "in.jsonl", rows)
    done = run_script("data.py", "--source", "in.jsonl", "--drop", "no_ending", "--val-ratio", "0.4", cwd=tmp_path)
    assert done.status == 0 and "可用 140" in done.out, done.err
    train, val = (rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "val"))
    assert not {row["question"] for row in train} & {row["question"] for row in val}


def test_all_records_alike_can_not_be_split_without_a_leak(tmp_path):
    write(tmp_path / "in.jsonl", [{**some_rows(1)[0], "think": f"想{i}"} for i in range(10)])
    assert_user_error(run_script("data.py", "--source", "in.jsonl", cwd=tmp_path), "近似重复", "--near-duplicate 0")


def test_audit_counts_what_was_planted_and_drops_only_what_it_is_told_to(tmp_path):
    rows = some_rows(40)
    planted = {
        "no_thinking": {"think": ""},
        "cited_reference": {"think": "用户提供的答案提到了休息，所以先解释原因。"},
        "no_ending": {"answer": "首先要多喝水，然后如果体温继续升高就"},
        "written_newline": {"answer": "分两步：\\n1. 休息。\\n2. 就医。"},
        "mojibake": {"answer": "烫烫烫，请休息，多喝水，注意观察。"},
        "control_tokens": {"answer": "请休息，多喝水，注意观察体温。<|im_start|>"},
        "personal_data": {"question": "我叫小王，电话 138 1234 5678，发热三天怎么办？"},
    }
    for number, change in enumerate(planted.values()):
        rows[number] |= change
    write(tmp_path / "in.jsonl", rows)
    done = run_script("data.py", "--source", "in.jsonl", "--audit", cwd=tmp_path)
    assert done.status == 0, done.err
    counts, report = checks_of(tmp_path)
    assert {key: count for key, count in counts.items() if count} == dict.fromkeys(planted, 1)
    assert report["masked"] == {"手机号": 1} and report["parts"] == {"train": 36, "val": 4}
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "in.jsonl:2" in page and "&lt;|im_start|&gt;" in page and "1234 5678" not in page
    repaired = [
        row for row in rows_of(tmp_path / "train.jsonl") + rows_of(tmp_path / "val.jsonl") if "分两步" in row["answer"]
    ]
    assert repaired[0]["answer"] == "分两步：\n1. 休息。\n2. 就医。"
    done = run_script("data.py", "--source", "in.jsonl", "--drop", "cited_reference", "no_ending", cwd=tmp_path)
    dropped = rows_of(tmp_path / "dropped.jsonl")
    assert [row["place"] for row in dropped] == ["in.jsonl:2", "in.jsonl:3"] and "可用 38" in done.out


def test_held_out_questions_and_shared_13_grams_leave_the_data(tmp_path):
    rows = some_rows(30)
    rows[3]["question"] = "请问：高血压 患者，怎么 吃饭？"
    write(tmp_path / "in.jsonl", rows)
    held = [
        {"question": "高血压患者怎么吃饭？", "options": ["x", "y"]},
        {"question": "无关的一个问题啊？", "answer": rows[7]["answer"][:20]},
    ]
    write(tmp_path / "exam.jsonl", held)
    (tmp_path / "list.txt").write_text(rows[9]["think"][5:25] + "\n", encoding="utf-8")
    done = run_script("data.py", "--source", "in.jsonl", "--decontaminate", "exam.jsonl", "list.txt", cwd=tmp_path)
    assert done.status == 0 and "与评估集重叠 3" in done.out, done.out
    dropped = rows_of(tmp_path / "dropped.jsonl")
    assert [row["place"] for row in dropped] == ["in.jsonl:4", "in.jsonl:8", "in.jsonl:10"]
    assert "高血压患者怎么吃饭" in dropped[0]["reason"] and "exam.jsonl:1" in dropped[0]["reason"]
    assert_user_error(
        run_script("data.py", "--source", "in.jsonl", "--decontaminate", "none.jsonl", cwd=tmp_path), "none.jsonl"
    )


def test_sources_are_mixed_by_weight_in_training_only(tmp_path):
    write(tmp_path / "a.jsonl", [{**row, "from": "a"} for row in some_rows(40, 1)])
    write(tmp_path / "b.jsonl", [{**row, "from": "b"} for row in some_rows(40, 2)])
    done = run_script("data.py", "--source", "a.jsonl", "b.jsonl", "--weights", "2", "0.5", cwd=tmp_path)
    assert done.status == 0, done.err
    train, val = (rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "val"))
    counts = [sum(row["from"] == name for row in train) for name in "ab"]
    in_val = [sum(row["from"] == name for row in val) for name in "ab"]
    assert sum(in_val) == 8 and counts[0] == 2 * (40 - in_val[0]) and 10 <= counts[1] <= 26
    for arguments, word in ((["--weights", "1"], "--weights"), (["--weights", "-1", "1"], "--weights")):
        assert_user_error(run_script("data.py", "--source", "a.jsonl", "b.jsonl", *arguments, cwd=tmp_path), word)


def test_workers_give_the_same_files_as_one_process(tmp_path):
    rows = some_rows(700)
    rows[5], rows[300] = {"question": "只有问题"}, rows[2]
    write(tmp_path / "in.jsonl", rows)
    written = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        done = run_script("data.py", "--source", "in.jsonl", "--workers", workers, "--output-dir", out, cwd=tmp_path)
        assert done.status == 3, done.err
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1] and len(written[0]) == 5


def test_unusable_tokenizer_is_the_same_line_with_workers_as_without(tmp_path):
    write(tmp_path / "in.jsonl", some_rows(600))
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}", encoding="utf-8")
    said = []
    for workers in ("1", "2"):
        arguments = ("--source", "in.jsonl", "--tokenizer", "tok", "--workers", workers)
        done = run_script("data.py", *arguments, cwd=tmp_path)
        assert_user_error(done, "tok")
        assert "--workers" not in done.err
        said.append(done.last_line)
    assert said[0] == said[1]


def test_scenario_of_a_question_is_suggested_where_the_data_name_none(tmp_path):
    rows = some_rows(20)
    rows[0]["question"] = "两岁的宝宝发烧三十九度怎么办？"
    write(tmp_path / "in.jsonl", rows)
    run_script("data.py", "--source", "in.jsonl", "--system-prompts", "mixed", cwd=tmp_path)
    formatted = rows_of(tmp_path / "train_format.jsonl") + rows_of(tmp_path / "val_format.jsonl")
    from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS

    mine = [row["instruction"] for row in formatted if row["input"] == rows[0]["question"]]
    assert mine == [GENERAL_PROMPT, MEDICAL_PROMPTS["pediatric"]]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--map", "question"], "--map"),
        (["--map", "question=q"], "answer"),
        (["--map", "x=q", "answer=a"], "--map"),
        (["--near-duplicate", "2"], "--near-duplicate"),
        (["--drop", "everything"], "--drop"),
        (["--workers", "-1"], "--workers"),
        (["--decontaminate", "in.xlsx"], "in.xlsx"),
    ],
)
def test_bad_option_is_one_line(tmp_path, arguments, word):
    write(tmp_path / "in.jsonl", some_rows(12))
    (tmp_path / "in.xlsx").write_text("x")
    assert_user_error(run_script("data.py", "--source", "in.jsonl", *arguments, cwd=tmp_path), word)


@pytest.mark.skipif(not REAL_SAMPLE.is_file(), reason=f"the real sample {REAL_SAMPLE} is not here")
def test_audit_of_the_real_sample(tmp_path):
    done = run_script("data.py", "--source", REAL_SAMPLE, "--audit", cwd=tmp_path)
    assert done.status == 0, done.err
    counts, report = checks_of(tmp_path)
    assert report["rows"] == 120 and report["parts"] == {"train": 108, "val": 12}
    # Four answers hold a written-out line break; every third thinking or so speaks of an answer it was given.
    assert counts["written_newline"] == 4 and 30 <= counts["cited_reference"] <= 60
    assert counts["no_ending"] == counts["mojibake"] == counts["personal_data"] == counts["near_duplicate"] == 0
    written = rows_of(tmp_path / "train.jsonl") + rows_of(tmp_path / "val.jsonl")
    assert not any("\\n" in row["answer"] for row in written)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_ended_run_takes_its_workers_with_it_and_leaves_nothing(tmp_path, how):
    import psutil

    write(tmp_path / "in.jsonl", some_rows(500) * 40)
    command = [sys.executable, ROOT / "data.py", "--source", "in.jsonl", "--workers", "2", "--output-dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while len(children := psutil.Process(process.pid).children()) < 2:
        assert process.poll() is None and time.monotonic() - begun < 60
        time.sleep(0.05)
    process.send_signal(getattr(signal, how))
    assert process.wait(60) == (143 if how == "SIGTERM" else -signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    # A killed process can't remove its lock; the system has given it back all the same.
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == ([] if how == "SIGTERM" else [files.LOCK_FILE])
    with files.holding(tmp_path / "out", "测试"):
        pass
