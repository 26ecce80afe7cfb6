"""What `data.py` finds in a data set, what it does about it, and that nothing straddles the split."""

import itertools
import json
import random

import pytest
from conftest import REAL_SAMPLE, assert_user_error, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import rows_of

from qwenmed import contamination, findings, lengths, near_duplicates, splitting
from qwenmed.records import Record

WORDS = "患者血压头痛发热咳嗽休息饮水药物检查医生饮食运动睡眠疼痛感染治疗预防症状每天应该可以需要注意情况"


def sentences(dice, count):
    return "".join("".join(dice.choices(WORDS, k=12)) + "。" for _ in range(count))


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def some_rows(count, seed=0):
    dice = random.Random(seed)
    return [
        {"question": f"{sentences(dice, 1)}？", "think": sentences(dice, 4), "answer": sentences(dice, 4)}
        for _ in range(count)
    ]


def checks_of(folder):
    report = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    return {check["key"]: check["count"] for check in report["checks"]}, report


def found(question="头痛怎么办？", think="先想一想原因，再说怎么做。", answer="请休息。", **limits):
    record = Record(question, think, answer, row={"question": question, "think": think, "answer": answer})
    return findings.examine(record, findings.Limits(**limits))


# Each check: what it finds, and what looks like it and is none.


@pytest.mark.parametrize(
    ("check", "texts"),
    [
        ("no_thinking", {"think": " \n"}),
        ("copied_thinking", {"think": "多喝水，多休息，清淡饮食，注意观察体温变化，如果持续高热不退或者精神变差请及时就医，不要自行用药。",
                             "answer": "建议：多喝水，多休息，清淡饮食，注意观察体温变化，如果持续高热不退或者精神变差请及时就医，不要自行用药。"}),
        ("copied_thinking", {"think": "请休息。", "answer": "请休息。"}),
        ("cited_reference", {"think": "根据用户提供的答案，应该分三点。"}),
        ("cited_reference", {"think": "参考答案已经说明了病因。"}),
        ("cited_reference", {"think": "不过答案里没有提到这些细节。"}),
        ("no_ending", {"answer": "第一，休息；第二，多喝水；第三，如果体温超过"}),
        ("no_ending", {"answer": "请注意以下几点："}),
        ("written_newline", {"answer": "分四类：\\n1. 抗酸药。\\n\\n2. 黏膜保护剂。"}),
        ("mojibake", {"answer": "锟斤拷，请休息。"}),
        ("mojibake", {"question": "头痛\ufffd怎么办？"}),
        ("control_tokens", {"answer": "请休息。<|im_end|>"}),
        ("control_tokens", {"question": "忽略</think>这个。"}),
        ("personal_data", {"question": "我的电话13812345678，头痛怎么办？"}),
    ],
)  # fmt: skip
def test_check_finds(check, texts):
    assert check in found(**texts)[1]


@pytest.mark.parametrize(
    "texts",
    [
        {"think": "答案里需要提到就医的时机，我先想想红旗征象。"},
        {"answer": "建议：\n- 多喝水\n- 多休息"},
        {"answer": "分级如下：\n| 级 | 血压 |\n|---|---|\n| 1 | 140 |"},
        {"answer": "可以。😊"},
        {"answer": "是"},
        {"answer": "用 $\\nu$ 与 \\neq 表示，见 C:\\new\\notes。"},
        {"answer": "血压 140/90 mmHg，脉搏 80，体温 36.5，空腹血糖 5.6，总胆固醇 5.2。"},
        {"answer": "体温<38.5℃时先观察。"},
    ],
)
def test_check_does_not_find_in_what_is_right(texts):
    assert found(**texts)[1] == {}


def test_written_newline_is_repaired_and_nothing_else_is():
    record, _, _ = found(answer="分四类：\\n1. 抗酸药\\r\\n\\n2. 其他，如 \\neq。")
    assert record.answer == "分四类：\n1. 抗酸药\n\n2. 其他，如 \\neq。" == record.row["answer"]


def test_number_that_json_lacks_becomes_null_and_is_counted():
    record = Record(
        "问？",
        "想",
        "答。",
        row={"question": "问？", "think": "想", "answer": "答。", "metrics": {"f1": [1.0, float("nan")]}},
    )
    record, what, _ = findings.examine(record, findings.Limits())
    assert record.row["metrics"] == {"f1": [1.0, None]} and what == {"not_a_number": "metrics"}


# Near-duplicates and the split


def test_signatures_estimate_the_similarity_of_texts():
    dice, signer = random.Random(1), near_duplicates.Signer()
    for share in (0.0, 0.5, 0.9, 1.0):
        one = sentences(dice, 40)
        other = one[: int(len(one) * share)] + sentences(dice, 40)[int(len(one) * share) :]
        texts = [near_duplicates.plain(text) for text in (one, other)]
        pieces = [{text[i : i + 5] for i in range(len(text) - 4)} for text in texts]
        true = len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])
        hashes = [signer.sign(text) for text in texts]
        same = sum(hashes[0][i : i + 4] == hashes[1][i : i + 4] for i in range(0, 512, 4)) / 128
        assert same == pytest.approx(true, abs=0.15), share


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_index_finds_the_similar_pairs_and_no_others(tmp_path, threshold):
    dice, signer = random.Random(2), near_duplicates.Signer()
    texts = [sentences(dice, 30) for _ in range(60)]
    similar = {}
    for number in range(20):  # one word in a text of 390 characters: a similarity of about 0.97
        place = dice.randrange(300)
        similar[len(texts)] = number
        texts.append(texts[number][:place] + "甲乙" + texts[number][place + 2 :])
    index = near_duplicates.Index(tmp_path, threshold)
    for text in texts:
        index.add(signer.sign(near_duplicates.plain(text)))
    index.add(None)
    index.add(None)  # too short for a signature: similar to nothing, to each other neither
    pairs = set(index.pairs())
    index.close()
    assert all(similar.get(later) == first for first, later in pairs)
    assert len(pairs) >= 19 and not list(tmp_path.iterdir())


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(2, 40),
    joins=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=30),
    ratio=st.floats(0.05, 0.5),
    seed=st.integers(0, 99),
)
def test_no_group_straddles_the_split_and_no_row_is_lost(count, joins, ratio, seed):
    groups = splitting.Groups(count)
    for one, other in joins:
        if one < count and other < count:
            groups.join(one, other)
    try:
        train, val = splitting.split(range(count), ratio, seed, groups)
    except splitting.UserError:
        return
    assert sorted([*train, *val]) == list(range(count)) and train and val
    assert not {groups.of(row) for row in train} & {groups.of(row) for row in val}
    assert len(val) <= count - int(count * (1 - ratio)) or len(val) == 1


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


def test_all_records_alike_can_not_be_split_without_a_leak(tmp_path):
    write(tmp_path / "in.jsonl", [{**some_rows(1)[0], "think": f"想{i}"} for i in range(10)])
    assert_user_error(run_script("data.py", "--source", "in.jsonl", cwd=tmp_path), "近似重复", "--near-duplicate 0")


# The whole of data.py


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


def test_common_phrase_of_a_short_held_out_text_removes_nothing(tmp_path):
    held_out = contamination.HeldOut([write(tmp_path / "exam.jsonl", [{"question": "什么是高血压病？"}])])
    assert held_out.overlap(Record("什么是高血压病？", "", "a")) is not None
    assert held_out.overlap(Record("别的问题？", "什么是高血压病？先想想。", "a")) is None


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


def test_quick_lengths_are_those_of_the_rendered_samples(tokenizer):
    from qwenmed import chat

    texts = ["头痛？", "a<b", "<think>", "想\n\n想", "\n想\n", " ", "é", "<|im_end|>", "e\u0301"]
    samples = [
        (Record(question, think, answer, history=history), system)
        for question, think, answer in itertools.product(texts, ["", *texts], texts)
        for history, system in (((), "系统"), ((), "另一个 {{ x }}"))
    ]
    samples.append((Record("问？", "想", "答", history=(("前", "后"),)), "系统"))
    measured = lengths.SampleLengths(tokenizer).of_many(samples)
    assert measured == [len(chat.render_sample(tokenizer, chat.training_row(*sample))[0]) for sample in samples]


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
