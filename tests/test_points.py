"""The points by which a whole question's urgency is weighed."""

import csv
import hashlib
import json

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from qwenmed import points, signs
from qwenmed.triage import DOUBT, EMERGENCY, ROUTINE, URGENT, assess

SETS = ROOT / "tests" / "triage"


def rows(name):
    return [json.loads(line) for line in (SETS / name).read_text(encoding="utf-8").splitlines()]


def weigh(question):
    return points.weigh(signs.normalise(question))


def test_points_are_those_of_the_phrases_each_counted_once():
    total = sum(points._table().get(phrase, 0) for phrase in ("", "脸", "汗", "脸汗"))
    assert points.weigh("脸汗") == (total.real, total.imag)
    assert points.phrases("冷汗冷汗") == {"冷", "汗", "冷汗", "汗冷", "冷汗冷", "汗冷汗"}
    assert max(map(len, points.phrases("一二三四五六"))) == points.PHRASE_LENGTH


def test_table_is_the_fit_of_the_questions_as_they_are():
    summary = json.loads((ROOT / "benchmarks" / "results" / "points.json").read_text(encoding="utf-8"))
    for name, digest in summary["sha256"].items():
        assert hashlib.sha256((SETS / name).read_text(encoding="utf-8").encode()).hexdigest() == digest, (
            f"{name} changed: make fit-points"
        )
    with points.TABLE.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert len(table) == summary["phrases"] + 2 and len({row[0] for row in table}) == len(table)


def test_no_question_of_the_fit_is_held_out():
    def plain(question):
        return "".join(c for c in signs.normalise(question) if c.isalnum())

    held = {
        plain(row["question"])
        for name in ("heldout", "heldout_wide", "heldout_fields")
        for row in rows(f"{name}.jsonl")
    }
    fitted = [plain(row["question"]) for name in ("dev", "dev_wide", "fit") for row in rows(f"{name}.jsonl")]
    assert len(held) > 1400 and len(fitted) > 9000 and held.isdisjoint(fitted)


@pytest.mark.parametrize(
    "question",
    [
        "他坐着坐着就往一边滑，眼睛直勾勾的，怎么拍都不理我",
        "电锯把大腿拉开了，布条勒了三圈还是往外涌",
        "妈妈从早上开始说话颠三倒四，筷子老是掉",
        "他说谢谢大家这些年的照顾，账号都托付给我了，现在人在江边",
    ],
)
def test_emergency_in_words_that_no_rule_knows(question):
    assert assess(question).level == EMERGENCY


@pytest.mark.parametrize(
    ("question", "level"),
    [
        ("头痛", ROUTINE),
        ("你好", ROUTINE),
        ("继续", ROUTINE),
        ("感冒三天了吃什么药", ROUTINE),
        ("脸上长痘", ROUTINE),
        ("这部剧虐得我心都碎了，男主最后倒在血泊里", ROUTINE),
        ("咳嗽有黄痰，发烧三天38.5度，能吃能睡", URGENT),
    ],
)
def test_what_is_no_emergency(question, level):
    assert assess(question).level == level


def test_a_rule_that_stands_alone_is_doubted_but_measured_numbers_are_not():
    doubted = assess("想问一下癫痫发作时口吐白沫怎么护理，我妹妹得了十几年，平时吃药控制得很好，是不是能治好")
    assert doubted.level != EMERGENCY
    assert assess("血氧62，还能撑到天亮吗").level == EMERGENCY


@pytest.mark.parametrize(
    ("question", "advice"),
    [
        ("新生儿发热38.2，不吃奶", "婴儿"),
        ("满月的娃发烧38.3，不肯吃奶", "婴儿"),
        ("出生二十五天的宝宝发烧38.5，不怎么吃奶了", "婴儿"),
        ("咳出来好多鲜红的血，有小半碗，有支扩", "出血"),
        ("一次咳了半碗血", "出血"),
        ("孩子鼻子里塞了个磁力珠，另一个好像吞了两三颗", "电池"),
        ("两岁娃从昨天拉水样便十几次，眼窝凹进去，没眼泪，一天没尿", "婴儿"),
    ],
)
def test_rule_without_a_harmless_reading_is_not_doubted(question, advice):
    assert weigh(question).emergency < DOUBT
    assert assess(question).level == EMERGENCY and assess(question).advice == advice


def test_the_most_urgent_piece_of_a_long_text_counts():
    harmless = "今天去公园散步，天气很好，回来做了两个菜。" * 40
    danger = "我爸突然胸口疼得厉害，左胳膊也疼，出了一身冷汗，脸色发灰。"
    assert weigh(harmless).emergency < 0 < weigh(harmless + danger + harmless).emergency


def test_telling_phrases_speak_for_an_emergency():
    text = signs.normalise("爸爸出了一身冷汗，脸色发灰，叫他没反应")
    told = points.telling(text)
    assert 1 <= len(told) <= 3 and all(p in text and len(p) > 1 and points._table()[p].real > 0 for p in told)


@given(st.text(max_size=700))
def test_any_text_has_its_points(text):
    found = points.weigh(text)
    assert all(isinstance(each, int) for each in found) and found == points.weigh(text)
