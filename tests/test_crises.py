"""Who has taken something or says farewell is told of the helpline; who finished a course of medicine is not."""

import pytest

from qwenmed.triage import EMERGENCY, HELPLINE, ROUTINE, Urgency, assess, emergency_text


@pytest.mark.parametrize(
    "question",
    [
        "没什么意思了，药吃下去了，就这样吧",
        "药都吃完了，就这样吧，没意思",
        "谢谢大家这些年的照顾，我走了，别找我",
        "谢谢你们照顾我这么多年，我走了，不要找我",
    ],
)
def test_farewell_is_a_crisis(question):
    found = assess(question)
    assert found.level == EMERGENCY and found.is_crisis and found.advice == "自伤"


@pytest.mark.parametrize(
    "question",
    [
        "跟老公吵架，赌气吞了四十片安眠药",
        "女儿跟我吵完架把一瓶扑热息痛都吃了",
        "一气之下喝了百草枯，后悔了",
        "吃了三十片对乙酰氨基酚，现在没啥感觉，后悔了",
    ],
)
def test_overdose_in_anger_or_regretted_names_the_helpline(question):
    found = assess(question)
    assert found.level == EMERGENCY and found.is_crisis and found.advice == "中毒"


@pytest.mark.parametrize(
    "question",
    [
        "药吃完了，要再开吗",
        "药都吃完了，就这样吧，谢谢医生",
        "谢谢大家照顾，我走了，新公司见",
        "离职了，谢谢大家这几年的照顾，我走了，以后常联系",
        "跟老公吵完架吃了一粒布洛芬",
    ],
)
def test_end_of_a_course_or_of_a_job_is_none(question):
    found = assess(question)
    assert found.level == ROUTINE and not found.is_crisis


def test_helpline_is_not_promised_round_the_clock():
    # The national notice on 12356 (2024) asks of each region 18 hours a day at least.
    for text in (HELPLINE, *(emergency_text(Urgency(EMERGENCY, ("",), key)) for key in ("自伤", "危机"))):
        assert "12356" in text and "24小时" not in text and "打不通或有危险时，立即拨打120或110" in text
