"""Who has taken something or says farewell is told of the helpline; who finished a course of medicine is not."""

import pytest

from qwenmed.triage import EMERGENCY, HELPLINE, ROUTINE, Urgency, assess, emergency_text

CRISES = {
    # farewells
    "自伤": [
        "没什么意思了，药吃下去了，就这样吧",
        "药都吃完了，就这样吧，没意思",
        "谢谢大家这些年的照顾，我走了，别找我",
        "谢谢你们照顾我这么多年，我走了，不要找我",
    ],
    "中毒": [
        # in anger, or regretted
        "跟老公吵架，赌气吞了四十片安眠药",
        "女儿跟我吵完架把一瓶扑热息痛都吃了",
        "一气之下喝了百草枯，后悔了",
        "吃了三十片对乙酰氨基酚，现在没啥感觉，后悔了",
        # with any word of self-harm
        "十五岁儿子和我吵架后吞了一整瓶对乙酰氨基酚，刚发现空瓶，他说不想活了",
        "我攒了四十片喹硫平刚才就着可乐喝了，遗书也写好了，就是有点怕黑",
        "弟弟喝了洁厕液，满嘴烂了，口水吞不下去，说不想活了",
        "爱人打了远超平时好几倍的胰岛素，说要解脱，现在满头大汗说胡话",
    ],
}


@pytest.mark.parametrize(("advice", "question"), [(key, each) for key, many in CRISES.items() for each in many])
def test_crisis_is_told_its_first_aid_and_the_helpline(advice, question):
    found = assess(question)
    assert found.level == EMERGENCY and found.is_crisis and found.advice == advice


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
