"""What is looked for in a record, which texts are nearly the same, how groups are split, what is held out."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenmed import contamination, findings, lengths, near_duplicates, schemas, splitting
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


def found(question="头痛怎么办？", think="先想一想原因，再说怎么做。", answer="请休息。", **limits):
    record = Record(question, think, answer, row={"question": question, "think": think, "answer": answer})
    return findings.examine(record, findings.Limits(**limits))


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


def test_common_phrase_of_a_short_held_out_text_removes_nothing(tmp_path):
    held_out = contamination.HeldOut([write(tmp_path / "exam.jsonl", [{"question": "什么是高血压病？"}])])
    assert held_out.overlap(Record("什么是高血压病？", "", "a")) is not None
    assert held_out.overlap(Record("别的问题？", "什么是高血压病？先想想。", "a")) is None


ASKED = "最近三天头痛发热还咳嗽，需要去医院看急诊吗？"
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "看。"}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": ASKED, "think": "", "answer": "看。"},
        {"instruction": "你是医生。", "input": ASKED, "output": "看。"},
        {"instruction": ASKED, "input": "", "output": "看。"},
        {"instruction": ASKED, "input": "请简短回答。", "output": "看。"},
        {"instruction": "请回答", "input": ASKED, "output": "看。"},
        {"instruction": ASKED, "response": "看。"},
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "看。"}]},
        {"messages": TURNS},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"Question": ASKED, "Complex_CoT": "想", "Response": "看。"},
        {"query": ASKED, "response": "看。"},
        {"problem": ASKED, "solution": "看。"},
        {"query": ASKED},
        {"problem": ASKED, "options": ["看", "不看"]},
        {"提问": ASKED, "回复": "看。"},
        {"question": "怎么办", "answer": "看。", "history": [[ASKED, "看。"]]},
    ],
)
def test_question_of_an_evaluation_row_is_found_in_every_schema(tmp_path, row):
    mapping = {"question": "提问", "answer": "回复"}
    held_out = contamination.HeldOut([write(tmp_path / "exam.jsonl", [row, {"text": "x" + "别的话" * 9}])], mapping)
    assert held_out.overlap(Record(f"医生您好！{ASKED}", "", "a")) is not None


def test_instruction_that_is_no_question_removes_nothing(tmp_path):
    system = "你是一个医学专家，你需要根据用户的问题，给出带有思考的回答。"
    task = "如果您是医生，请根据患者的描述回答下面的医学问题。"
    exam = [
        {"instruction": text, "input": f"{ASKED}{i}", "output": "看。"} for text in (system, task) for i in range(2)
    ]
    held_out = contamination.HeldOut([write(tmp_path / "exam.jsonl", exam)])
    assert held_out.overlap(Record(f"{system}\n孩子咳嗽。", "", "a")) is None
    assert held_out.overlap(Record(f"{task}\n孩子咳嗽。", "", "a")) is None
    assert held_out.overlap(Record(f"{task}\n{ASKED}", "", "a")) is not None


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


def test_no_example_shows_personal_data():
    phone = "我电话138 1234 5678，"
    record, what, masked = found(question=phone * 2, think="", answer=f"{phone}分两步：\\n1. 休息\ufffd<|im_end|>，")
    assert (
        masked == {"手机号": 3}
        and {"personal_data", "no_thinking", "no_ending", "mojibake", "written_newline"} <= what.keys()
    )
    assert "5678" not in str(what) and "138 1234 5678" in record.question
    record, _, _ = found(question=phone, redact=True)
    assert record.question == record.row["question"] == "我电话[手机号]，"


def test_thinking_inside_of_the_answer_survives_a_repair():
    row = {"question": "头痛？", "answer": "<think>\n想\n</think>\n\n休息。\\n多喝水。"}
    [record] = schemas.parse_row(row, "f:1")
    repaired, _, _ = findings.examine(record, findings.Limits())
    assert repaired.row == {"question": "头痛？", "think": "想", "answer": "休息。\n多喝水。"}
    [again] = schemas.parse_row(repaired.row, "f:1")
    assert (again.think, again.answer) == ("想", "休息。\n多喝水。")
