"""Personal numbers are masked in any usual writing; what a doctor needs stays."""

import json
import time

import pytest
from conftest import run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenmed.redact import EMAIL, IDENTITY, LANDLINE, MOBILE, is_identity_number, redact, redact_row

PLACEHOLDERS = {f"[{kind}]" for kind in (MOBILE, LANDLINE, IDENTITY, EMAIL)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("电话13812345678。", "电话[手机号]。"),
        ("电话：138 1234 5678，晚上打", "电话：[手机号]，晚上打"),
        ("138-1234-5678", "[手机号]"),
        ("138－1234－5678", "[手机号]"),
        ("138.1234.5678", "[手机号]"),
        ("138 12345678", "[手机号]"),
        ("1381234 5678", "[手机号]"),
        ("138 123 45678", "[手机号]"),
        ("1 3 8 1 2 3 4 5 6 7 8", "[手机号]"),
        ("１３８１２３４５６７８", "[手机号]"),
        ("+86 138 1234 5678", "[手机号]"),
        ("+8613812345678", "[手机号]"),
        ("＋86－13812345678", "[手机号]"),
        ("8613812345678", "[手机号]"),
        ("0086 13812345678", "[手机号]"),
        ("(+86)13812345678", "[手机号]"),
        ("（打13812345678）", "（打[手机号]）"),
        ("微信同号13812345678或19912345678", "微信同号[手机号]或[手机号]"),
        ("体温38 13812345678", "体温38 [手机号]"),
        ("010-12345678", "010-12345678"),  # no subscriber's number begins with 1
        ("010-62345678", "[固定电话]"),
        ("(010)62345678", "[固定电话]"),
        ("（0755）8234 5678", "[固定电话]"),
        ("0571 8234567", "[固定电话]"),
        ("02162345678", "[固定电话]"),
        ("+86 10 6234 5678", "[固定电话]"),
        ("+86-755-82345678", "[固定电话]"),
        ("身份证11010519491231002X", "身份证[身份证号]"),
        ("身份证11010519491231002x，", "身份证[身份证号]，"),
        ("110105 19491231 002X", "[身份证号]"),
        ("１１０１０５１９４９１２３１００２Ｘ", "[身份证号]"),
        ("110105194912310021", "[身份证号]"),  # a wrong checksum, a possible birth date
        ("写信到wang.li+1@mail.example.com吧", "写信到[邮箱]吧"),
        ("邮箱：13812345678@163.com", "邮箱：[邮箱]"),
        ("ａｂｃ＠ｑｑ．ｃｏｍ", "[邮箱]"),
    ],
)
def test_personal_numbers_are_masked_however_they_are_written(text, expected):
    assert redact(text).text == expected


@pytest.mark.parametrize(
    "text",
    [
        "血压180/110mmHg，心率120次/分，体温38.5℃，血糖33.3mmol/L",
        "血压140 90 120 110，脉搏 150",
        "请立即拨打120，心理援助12356，热线400-810-1234",
        "2024-01-15 13:45 检查，2023年11月8日出院，20231108",
        "肌酐 1380 1234 567 8901",
        "每次0.5 g，一日3次，7 天；INR 2.0-3.0；10^9/L；1500 300 2000 ml",
        "HBV DNA 13812345678901 IU/mL，病历号 123456789012345678",
        "ICD-10 I21.9，国药准字H20051234",
        "a@b，@某人，3 @ 5，user@localhost",
    ],
)
def test_what_a_doctor_needs_stays(text):
    assert redact(text).text == text and not redact(text).counts


def with_checksum(body):
    return next(body + last for last in "0123456789X" if is_identity_number(body + last))


chinese = st.text(st.sampled_from("我的孩子头痛三天了请问怎么办，。：（）、联系"), max_size=8)
mobiles = st.from_regex(r"\A1[3-9][0-9]{9}\Z")
identities = st.from_regex(r"\A[1-9][0-9]{16}\Z").map(with_checksum)
addresses = st.from_regex(r"\A[a-z0-9._%+-]{1,20}@[a-z0-9]{1,10}(\.[a-z]{2,5}){1,2}\Z")
separators = st.sampled_from(["", " ", "-", "－", "  ", " - ", "—"])


def grouped(number, cuts, separator):
    parts = [number[a:b] for a, b in zip([0, *cuts], [*cuts, len(number)], strict=True)]
    return separator.join(parts)


written = st.one_of(
    st.tuples(
        mobiles,
        st.sampled_from([[], [3, 7], [3], [7], [3, 6]]),
        separators,
        st.sampled_from(["", "+86", "+86 ", "86-", "0086 "]),
    ).map(lambda t: (t[3] + grouped(*t[:3]), MOBILE)),
    st.tuples(identities, st.sampled_from([[], [6, 14]]), separators).map(lambda t: (grouped(*t), IDENTITY)),
    addresses.map(lambda address: (address, EMAIL)),
)


@settings(max_examples=150, deadline=None)
@given(before=chinese, number=written, after=chinese)
def test_any_number_in_any_chinese_text_is_masked_and_nothing_else_changes(before, number, after):
    text, kind = number
    masked = redact(before + text + after)
    assert masked.counts == {kind: 1}
    assert masked.text == f"{before}[{kind}]{after}"


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters() | st.sampled_from("0123456789138 -+()@.xX[]号机手"), max_size=60))
def test_redacting_any_text_twice_is_redacting_it_once(text):
    once = redact(text)
    assert redact(once.text).text == once.text
    assert bool(once.counts) == (once.text != text)


@pytest.mark.parametrize(
    "text",
    [
        "a.b@a.b.@c.cn",
        "11010519491231002X138 1234 5143",
        "a@b.cn138 1234 5678",
        "138 1234 5678@163.com",
        "a@b.cn@c.cn@",
    ],
)
def test_numbers_that_touch_each_other_leave_nothing_for_a_second_time(text):
    once = redact(text)
    assert once.counts and redact(once.text).text == once.text


@settings(max_examples=100, deadline=None)
@given(st.from_regex(r"\A[1-9][0-9]{16}\Z"), st.integers(0, 9))
def test_checksum_decides_where_the_birth_date_is_impossible(body, month):
    body = body[:10] + f"{month + 13:02}" + body[12:]  # no such month
    right = with_checksum(body)
    assert redact(right).text == "[身份证号]"
    wrong = body + ("1" if right[-1] != "1" else "2")
    assert redact(wrong).text == wrong


@pytest.mark.parametrize(
    "unit", ["1", "1 ", "a", "a@", "a@b.cn ", "138-", "86 ", "(", "@", "11010519491231002 ", "3-4 "]
)
def test_time_is_linear(unit):
    text = unit * (200_000 // len(unit))

    def seconds(text):
        started = time.perf_counter()
        redact(text)
        return time.perf_counter() - started

    part = min(seconds(text[: len(text) // 10]) for _ in range(3))
    assert seconds(text) < 40 * part + 0.5  # quadratic would be a hundredfold


def test_every_text_of_a_row_is_masked_and_counted():
    from collections import Counter

    counts = Counter()
    row = {"question": "13812345678", "n": 13812345678, "more": [{"x": "a@b.cn"}, None], "13812345678": True}
    assert redact_row(row, counts) == {
        "question": "[手机号]",
        "n": 13812345678,
        "more": [{"x": "[邮箱]"}, None],
        "13812345678": True,
    }
    assert counts == {MOBILE: 1, EMAIL: 1}


PERSONAL = "我叫小王，电话138 1234 5678，邮箱a@b.cn，身份证11010519491231002X。"


def test_training_data_are_masked_in_all_four_files_and_counted(tmp_path):
    rows = [
        {"question": f"{number}？{PERSONAL}", "think": PERSONAL, "answer": PERSONAL, "note": PERSONAL}
        for number in "甲乙"
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = run_script(
        "data.py", "--source", "mine.jsonl", "--val-ratio", "0.5", "--redact", "--near-duplicate", "0", cwd=tmp_path
    )
    assert done.status == 0 and "手机号 8，邮箱 8，身份证号 8" in done.out, done.err
    for name in ("train", "val", "train_format", "val_format"):
        text = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8")
        assert "[手机号]" in text and "小王" in text
        assert "1234 5678" not in text and "a@b.cn" not in text and "19491231" not in text


def test_neither_model_nor_saved_history_nor_batch_rows_see_the_numbers(tokenizer, tmp_path):
    from fakes import Parrot, spoken

    from medical_assistant import MedicalAssistant
    from qwenmed.engine_transformers import TransformersEngine

    asked = []

    class Listener(Parrot):
        def __call__(self, input_ids, **rest):
            asked.append(tokenizer.decode(input_ids[0]))
            return super().__call__(input_ids, **rest)

    engine = TransformersEngine(Listener(spoken(tokenizer, "好的。")), tokenizer)
    talk = MedicalAssistant(redact=True, engine=engine)
    talk.ask_question(PERSONAL)
    kept = talk.save_conversation(tmp_path / "h.json").read_text(encoding="utf-8")
    (row,) = talk.batch([PERSONAL])
    heard = "".join(asked)
    assert heard.count("小王") == 2
    for text in (heard, kept, json.dumps(row, ensure_ascii=False)):
        assert "[手机号]" in text and "小王" in text
        assert "1234 5678" not in text and "a@b.cn" not in text and "19491231" not in text
