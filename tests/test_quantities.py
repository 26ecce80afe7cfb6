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
        "血糖仪2个测得不一样怎么办",
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


def test_times_are_no_decimals():
    assert "血糖低值" not in read("血糖早上2点测的") and "血糖低值" not in read("血糖，2点30分测的")


@pytest.mark.parametrize("age", [38, 41, 75, 82])
@pytest.mark.parametrize(
    "word",
    ["血压", "高压", "收缩压", "心率", "脉搏", "血糖", "空腹", "餐后", "体温", "没有发烧", "不发热", "血氧还行，爷爷"],
)
def test_age_behind_a_word_is_no_value(word, age):
    for text in (f"{word}，{age}岁", f"{word}{age}岁", f"{word}高，{age}多岁", f"{word} {age} 周岁"):
        assert set(read(text)) <= {"老人"}, text


@pytest.mark.parametrize(
    "question",
    [
        "我妈有高血压，82岁，最近有点头晕，要紧吗",
        "奶奶血压高 85岁 头晕",
        "奶奶高血压，81岁，拉肚子一天三次",
        "心率有点慢，35岁，偶尔头晕，要查什么",
        "没有发烧，41岁，嗓子疼",
        "血压舒张压85，有点头晕，正常吗",
        "血氧仪买的85元的，测得准吗",
        "血氧仪哪个牌子好，预算80",
        "血氧还行，爷爷85，咳嗽几声",
        "宝宝刚满月，心率150次/分正常吗",
        "胎心率150，最近有点头晕",
        "给新生儿洗澡，水温38度还是40度好",
    ],
)
def test_ages_prices_and_the_values_of_others_are_no_emergency(question):
    assert assess(question).level != EMERGENCY


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("血压，70/40", "血压低"), ("血压 75，头晕", "血压低"), ("血压，75，头晕", "血压低"), ("高压，185", "血压180"),
        ("体温，39.2", "体温39"), ("发烧39度，82岁", "体温39"), ("心率，160", "心率危险"), ("血糖，28", "血糖高值"),
        ("洗完澡发烧39度", "体温39"), ("怀孕，33周", "孕20周"), ("血氧，85", "血氧低"), ("血氧正常，现在掉到82", "血氧低"),
        ("心跳一下子跳到190", "心率危险"), ("心跳一分钟三十几下", "心率危险"), ("宝宝满月，心率230", "心率危险"),
        ("新生儿心率70", "心率危险"), ("刚生完宝宝，心率160", "心率危险"),
    ],
)  # fmt: skip
def test_values_are_read_though_a_comma_or_an_age_stands_by(text, sign):
    assert sign in read(text)


def test_a_month_and_a_half_is_an_age():
    assert "三月内" in read("宝宝一个半月，烧到38.4，不吃奶") and "三月内" not in read("宝宝三个半月，烧到38.4")
    assert assess("宝宝一个半月，烧到38.4，不吃奶").advice == "婴儿"
