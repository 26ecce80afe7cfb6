"""Numbers that are read, and numbers that are none of the value's: ages, hours, tablets, prices."""

import pytest

from qwenmed.quantities import signs_from_numbers
from qwenmed.signs import normalise
from qwenmed.triage import EMERGENCY, assess


def read(text):
    return dict(signs_from_numbers(normalise(text)))


@pytest.mark.parametrize(
    "question",
    [
        "餐后2h血糖7.8正常吗",
        "餐后2h血糖多少算正常？",
        "餐后2小时血糖正常值",
        "二甲双胍餐后吃1片可以吗",
        "空腹能喝1杯咖啡吗",
        "空腹吃2个鸡蛋会影响抽血吗",
        "血糖高，医生说是2型糖尿病，需要打胰岛素吗",
        "血糖有点高，1米7，180斤，怎么减",
        "孕妇血糖高，2胎，怎么吃",
        "空腹C肽1.1，正常吗",
        "空腹胰岛素2.5，血糖正常，要紧吗",
        "最近血糖波动2个点正常吗",
        "血糖仪测的比静脉血低0.8正常吗",
    ],
)
def test_what_is_counted_beside_glucose_is_no_glucose(question):
    assert not {"血糖低值", "血糖偏低值"} & set(read(question))
    assert assess(question).level != EMERGENCY


@pytest.mark.parametrize(
    "question",
    [
        "血糖1.9，手抖",
        "空腹血糖2.1",
        "血糖测了2次都是2.3",
        "血糖只有2点5",
        "血糖才1点9，手抖心慌",
        "糖尿病人血糖1点8，怎么办",
        "餐后2h血糖2.2，出冷汗",
        "餐后两小时2.4",
        "血糖，2.1",
    ],
)
def test_low_glucose_is_an_emergency(question):
    found = assess(question)
    assert "血糖低值" in read(question) and found.level == EMERGENCY and found.advice == "低血糖"


@pytest.mark.parametrize(
    "question",
    ["餐后2h血糖25，恶心呕吐，呼吸深快，嗜睡", "老爸糖尿病，餐后2h血糖28.6，人迷迷糊糊，嘴里一股烂苹果味"],
)
def test_high_glucose_after_a_meal_is_not_read_as_low(question):
    found = assess(question)
    assert found.level == EMERGENCY and found.advice == "高血糖"


def test_times_are_no_decimals():
    assert "血糖低值" not in read("血糖早上2点测的") and "血糖低值" not in read("血糖，2点30分测的")
