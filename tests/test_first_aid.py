"""Which first aid an emergency is told: of several rules that fire, the one whose help can't wait."""

import pytest

from prompts import SAMPLE_QUESTIONS
from qwenmed.triage import EMERGENCY, assess

FIRST_AID = {
    "噎住": [
        "我爷爷吃汤圆噎住了，喘不过气来，嘴唇发紫",
        "宝宝被葡萄卡住喉咙，呼吸困难，脸发青",
        "奶奶吃年糕卡住气管，喘不上气，发不出声音",
        "我妈被鸡块噎到，憋得满脸通红说不了话，喘不上来",
        "四岁娃吃糖卡嗓子里了，喘不上气，嘴唇紫了，能不能抠",
        "花生米呛进去 孩子喘不上气",
    ],
    "心肺复苏": [
        "刚满月的宝宝没呼吸了，脸发青",
        "我爸胸口疼，出冷汗，然后倒下了，没心跳了",
        "哮喘发作，喷药没用，现在没呼吸了",
        "爷爷吃药过敏，嗓子肿，现在没气了，摸不到脉",
        "同事抽了一阵，现在不抽了，也没呼吸，嘴唇发紫",
        "吃了一大把安眠药，现在没有心跳了",
        "孩子呛奶，脸发紫，没有呼吸了",
        # gasps of somebody who fell are no breathing
        "同事倒地了，还有点像打呼噜那样一下一下地喘，要不要按胸",
        "爸爸叫不醒，呼吸一停一停的，好像打呼噜",
        "岳父躺地上，偶尔抽一口长气，眼珠子不动",
        "健身房有个人跑步机上摔下来不动了，偶尔张嘴抽一口气，叫他没反应",
    ],
    "溺水": ["被水淹了捞上来没呼吸了", "孩子掉池塘里捞上来，嘴唇发紫，叫不醒"],
    "触电": ["工人被380伏电倒，没有脉搏了", "刚触电被弹开，晕过去一会儿，现在心慌胸口疼"],
    "一氧化碳": [
        "工地下沙井的两个工友倒在里面没动静，能下去拉吗",
        "热水器洗澡洗了半天没出来，撞开门人瘫在地上，脸红扑扑的",
        "家里烧炭取暖，两个小孩说头痛呕吐，老大已经昏过去",
    ],
    "中毒气": ["84和洁厕灵混了，呛得喘不上来，胸口疼"],
    "中毒": [
        "中午吃的河豚，现在嘴麻手麻，舌头不利索",
        "我奶喷了好几次农药，在地里晕倒了，口吐白沫，眼珠子瞳孔特别小",
    ],
    "低血糖": ["糖尿病人打了胰岛素没吃饭，现在浑身发抖说胡话，推他他打人"],
    "高血糖": [
        "我弟一型糖尿病，断了两天胰岛素，吐个不停，喘粗气，嘴里一股烂苹果味",
        "养老院老人三天没怎么喝水，血糖仪只显示HI，现在嗜睡，喊也不答应，尿很多",
        # 2h is no glucose, and HI no 1
        "餐后2h血糖25，恶心呕吐，呼吸深快，嗜睡",
        "老爸糖尿病，餐后2h血糖28.6，人迷迷糊糊，嘴里一股烂苹果味",
        "一型糖尿病，断了两天胰岛素，血糖仪显示HI，一直吐，呼吸又深又快",
    ],
    "眼化学": ["硫酸溅眼睛里了，睁不开", "硫酸溅眼睛里"],
    "电池": ["两岁孩子吞了一颗纽扣电池，现在一直流口水、不肯吃、胸口疼"],
    "呼吸": [
        "喉咙疼得咽不下口水，一直流哈喇子，说话像嘴里含个东西，坐着往前倾才能喘",
        "刚满月的宝宝睡着睡着没呼吸了，脸发青，拍了拍又哭了",
    ],
    "烧伤": ["孩子被热牛奶烫了脸和脖子，起大泡，声音哑了"],
    "休克": ["停了激素药，这两天吐，没力气，血压70/40"],
    "产科": ["孕37周娃一天都没咋动了，拍肚皮也没反应"],
    "肢体": ["右腿突然剧痛，冰凉发白，脚趾动不了，摸不到脉搏"],
    "卒中": ["突然头像被雷劈一样，这辈子没这么疼过，脖子硬，吐了两次"],
}


@pytest.mark.parametrize(("advice", "question"), [(key, each) for key, many in FIRST_AID.items() for each in many])
def test_the_help_that_cannot_wait_is_told(advice, question):
    found = assess(question)
    assert found.level == EMERGENCY and found.advice == advice


def test_emergencies_among_the_sample_questions_get_their_own_first_aid():
    told = {each: found.advice for many in SAMPLE_QUESTIONS.values() for each in many if (found := assess(each)).advice}
    expected = {"噎住": "噎住", "嘴歪": "卒中", "石头压": "心脏", "纽扣电池": "电池", "翻白眼": "抽搐", "变短": "创伤",
                "160/110": "产科", "精神蔫": "婴儿"}  # fmt: skip
    for words, advice in expected.items():
        assert [each for question, each in told.items() if words in question] == [advice]


@pytest.mark.parametrize(
    "question",
    ["孩子把指甲吃进肚子里了要紧吗", "头发吃进肚子里能拉出来吗", "凉气吃进肚子里老放屁", "西瓜籽吃进肚子会发芽吗"],
)
def test_swallowed_trifle_is_no_stab_wound(question):
    # 吃进肚 sounds like 刺进肚.
    assert assess(question).level != EMERGENCY


@pytest.mark.parametrize(
    ("question", "advice"),
    [
        ("孩子把磁力珠吃进肚子里了", "电池"),
        ("孩子把针吃进肚子里了", "中毒"),
        ("刀刺进肚子了", "创伤"),
    ],
)
def test_swallowed_things_get_no_advice_for_wounds(question, advice):
    found = assess(question)
    assert found.level == EMERGENCY and found.advice == advice


def test_snoring_and_a_seizure_are_no_gasps():
    # 一挺一挺 sounds like 一停一停.
    assert assess("睡觉打呼噜，一停一停的，白天困").level != EMERGENCY
    assert assess("她说着说着话眼珠往上一翻，浑身一挺一挺的，叫不应").advice != "心肺复苏"
