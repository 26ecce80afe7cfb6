"""Numbers that decide: temperature, blood pressure, glucose, oxygen, age, weeks of pregnancy, tablets.

A number counts only beside its word or unit, and each becomes the name of a sign for the urgency rules, e.g.
"体温 39.2" → 高热. The patterns have no nested repetition, so their time grows with the text's length only.
"""

import re
from collections.abc import Iterator

_DIGITS = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
_SCALE = {"十": 10, "百": 100}
_CHINESE = re.compile("[零〇一二两三四五六七八九十百]{1,6}(?:[点][零〇一二三四五六七八九]{1,2})?")
# A number worth reading: 一身冷汗 and 一下子 hold none.
_HAS_NUMBER = re.compile(
    "[0-9]|[零〇一二两三四五六七八九十百](?:[零〇一二两三四五六七八九十百点多几来]|个?[多来几]?[度岁天周月片粒颗日])"
)

# 2点5 is 2.5; 8点30 and 8点5分 are times.
_POINT = re.compile(r"(?<=\d)点(?=\d(?![\d分点钟次]))")

# What a value of another kind is counted in: 血压高,85岁.
_COUNTED = r"\s?[多几来]?(?:周?岁|元|块|斤|公斤|kg|天|年|小时|分钟)"
# Up to the number, a clause's end at most right before it (体温,39.2): the next clause speaks of something else.
_STOP = ",，。；;"
_N = r"(\d{1,4}(?:\.\d{1,2})?)"
_TEMPERATURE = re.compile(
    rf"(?<!\d){_N}\s{{0,2}}(?:度|℃|°c|摄氏度|c\b)(\d)?"
    rf"|(?:烧|热|体温|温度|额温|腋温|肛温|耳温|fever of|temp)[^0-9{_STOP}!?！？]{{0,6}}[,，]?{_N}(?!\d|\.\d|{_COUNTED})"
)
_OTHER_WARMTH = re.compile("水温|室温|气温|温水|热水|洗澡|泡脚|空调|冲奶")
_PRESSURE = re.compile(r"(?<!\d)(\d{2,3})\s{0,2}[/／比、]\s{0,2}(\d{2,3})(?!\d)")
_SYSTOLIC = re.compile(
    rf"(?:高压|收缩压|血压|bp)(?:(?!舒张|下压)[^0-9{_STOP}]){{0,8}}[,，]?(\d{{2,3}})(?!\d|/|{_COUNTED})"
)
# What is counted or named behind 空腹, 餐后 and 血糖 but is no glucose: 餐后2h, 2型, 空腹吃1片.
_NO_GLUCOSE = (
    r"\s?(?:h|hour|个|型|片|粒|颗|杯|米|胎|点|次|针|支|顿|餐|种|月|周|号|口|碗|勺|袋|包|瓶|毫升|ml|单位|mg|样|直|般|起)"
)
_GLUCOSE = re.compile(
    rf"(?:血糖|血唐|血搪|雪糖|餐后(?:[1-3](?:\.5)?(?:h|个?小时|个?钟头))?|空腹|glucose|sugar)"
    rf"(?:[^0-9{_STOP}、天]{{0,8}}[1-9][次遍回个][^0-9{_STOP}]{{0,6}}|(?:(?!胰岛素|c肽|波动|低0\.)[^0-9{_STOP}、天]){{0,10}}[,，]?)"
    rf"{_N}(?!\d|\.|{_COUNTED}|{_NO_GLUCOSE})|(?<!\d){_N}\s{{0,2}}mmol"
)
_GLUCOSE_MG = re.compile(
    rf"(?:血糖|glucose|sugar)[^0-9{_STOP}]{{0,14}}(\d{{2,4}})\s?(?:mg)|(?:sugar|glucose)[^0-9{_STOP}]{{0,14}}(\d{{2,4}})(?!\.|\d)"
)
# What a glucose meter shows beyond its range.
_GLUCOSE_DISPLAY = re.compile(f"血糖[^{_STOP}]{{0,8}}?(hi|lo)(?![a-z])")
_OXYGEN = re.compile(
    r"(?:血氧|脉氧|氧夹|雪氧|血养|氧饱和|饱和度|氧合|spo2|o2|oxygen|sats?\b)((?:(?!心率|脉搏|心跳|血压|体温|呼吸|年龄|\d{1,3}[多来几]?周?岁|烧)[^。；!?！？]){0,32})"
)
# Two digits that are no date, time, age or count: 血氧仪换了2个都显示81.
_PERCENT = re.compile(
    r"(?<![\d.])(\d{2,3})(?![\d.]|\s?(?:岁|天|次|个|分钟|小时|点|度|周|年|月|号|床|升|元|块|斤|kg|min|hour|days|yo|years|/))"
)
_USUAL = re.compile("(?:平时|平常|正常|以前|本来|往常|原来|一般|标准|应该|之前|预算)(?!.*(?:现在|这会|掉|降|跌))")
# 血氧还行,爷爷85: somebody's age.
_OLD = re.compile(
    "(?:还行|还好|正常|没问题|挺好)[,，](?:我|家里)?(?:爷爷|奶奶|爸爸?|妈妈?|外公|外婆|姥爷|姥姥|公公|婆婆|老人|今年)$"
)
_BREATHS = re.compile(
    r"呼吸(?:频率|次数)?(?:每分钟|1分钟|一分钟)?[^0-9，,。；;吸停]{0,6}(\d{2,3})\s?(?:多|几|来)?(?:次|下|/分|回|左右|$|，|,|。)"
)
_AGE = re.compile(
    r"(?<![\d.])(\d{1,3})(天|日龄|周龄|周|个半?月|月龄|月大|岁)(?:大|的|零|多|，|,|男|女|婴|宝|娃|孩|新|了)?"
)
_WEEKS = re.compile(
    rf"(?:孕|怀孕|妊娠|pregnant)[^0-9{_STOP}]{{0,6}}[,，]?(\d{{1,2}})\s{{0,1}}(周|个月|个多月|weeks|w|月)"
    rf"|(\d{{1,2}})\s{{0,1}}(?:周|weeks)[^0-9{_STOP}]{{0,4}}(?:孕|pregnant)"
)
# 羊水破了，才30周: the weeks alone, where something else tells of a pregnancy.
_BARE_WEEKS = re.compile(r"(?<!\d)(\d{1,2})\s?周(?![岁年前])")
_LATE_PREGNANCY = ("羊水", "胎动", "宫缩", "见红", "胎心", "胎儿", "产检", "预产期")
_TABLETS = re.compile(r"(?<!\d)(\d{1,3})(?:多|几|来)?\s{0,2}(?:片|粒|颗|个胶囊|胶囊|tablets|pills)")
_HEART_RATE = re.compile(
    rf"(?:(?<!胎)心率|心跳|脉搏|pulse)(?:1(?:下子|下|直|阵|会|分钟)|[^0-9{_STOP}]){{0,8}}[,，]?(\d{{2,3}})(?!\d|/|{_COUNTED})"
)
# Whose heart beats 100 to 180 times a minute.
_BABY = re.compile(r"新生儿|婴儿|满月|出生|宝宝|早产|月龄|(?<!\d)(?:[1-9]|1[01])个月")
_MOTHER = re.compile("生完|产后|剖|孕")
_DURATION = re.compile("(?:[了第后前烧近这那续吐拉咳院休每隔过药]|[了近]快|已经|差不多)$")
_CHILD = (
    "宝",
    "娃",
    "婴",
    "孩",
    "儿",
    "小家伙",
    "囡",
    "崽",
    "大的",
    "日龄",
    "月龄",
    "出生",
    "生下",
    "早产",
    "喂奶",
    "吃奶",
    "吐奶",
    "吮",
    "囟",
    "脐",
    "baby",
    "妹妹",
    "弟弟",
)


# What a reader of numbers yields: (sign, the words it was read from).
_Signs = Iterator[tuple[str, str]]


def chinese_to_digits(text: str) -> str:
    """三十八度五 → 38度5; only runs that a number word or unit can follow are long enough to matter."""
    return _CHINESE.sub(lambda match: _value(match.group()), text)


def _value(run: str) -> str:
    whole, _, part = run.partition("点")
    if not any(scale in whole for scale in _SCALE):
        number = "".join(str(_DIGITS[sign]) for sign in whole)
    else:
        total = digit = 0
        for sign in whole:
            if sign in _SCALE:
                total, digit = total + (digit or 1) * _SCALE[sign], 0
            else:
                digit = _DIGITS[sign]
        if digit and whole[-2:-1] == "百":  # 一百二 is 120
            digit *= 10
        number = str(total + digit)
    return number + ("." + "".join(str(_DIGITS[sign]) for sign in part) if part else "")


def signs_from_numbers(text: str) -> _Signs:
    """Yield (sign, the words it was read from) for every number that matters.

    Args:
        text: normalised (half-width, lower case).
    """
    if "血糖" in text:
        yield from _glucose_display(text)
    if not _HAS_NUMBER.search(text):
        return
    text = _POINT.sub(".", chinese_to_digits(text))
    for words, read in _READERS:
        for word in words:
            if word in text:
                yield from read(text)
                break


def _glucose_display(text: str) -> _Signs:
    for match in _GLUCOSE_DISPLAY.finditer(text):
        for sign in ("血糖高值", "血糖极高") if match[1] == "hi" else ("血糖低值",):
            yield sign, match[0]


def _temperature(text: str) -> _Signs:
    for match in _TEMPERATURE.finditer(text):
        value = float(match[1] or match[3])
        if match[1] and _OTHER_WARMTH.search(text, max(0, match.start() - 10), match.start()):
            continue
        if match[1] and match[2]:
            value += int(match[2]) / 10
        if 34 < value < 43.5:
            if value >= 38:
                yield "体温38", match[0]
            if value >= 39:
                yield "体温39", match[0]
            if value >= 40.5:
                yield "体温405", match[0]
            if value < 35.5:
                yield "体温低", match[0]


def _blood_pressure(text: str) -> _Signs:
    for match in _PRESSURE.finditer(text):
        high, low = int(match[1]), int(match[2])
        if 60 <= high <= 300 and 30 <= low < high:
            if high >= 180 or low >= 120:
                yield "血压180", match[0]
            if high >= 160 or low >= 110:
                yield "血压160", match[0]
            if high >= 140 or low >= 90:
                yield "血压140", match[0]
            if high < 90 or low < 50:
                yield "血压低", match[0]


def _systolic(text: str) -> _Signs:
    for match in _SYSTOLIC.finditer(text):
        if 180 <= int(match[1]) <= 300:
            yield "血压180", match[0]
        elif 40 < int(match[1]) < 90 and "低压" not in match[0]:
            yield "血压低", match[0]
        if 160 <= int(match[1]) <= 300:
            yield "血压160", match[0]


def _glucose(text: str) -> _Signs:
    for match in _GLUCOSE.finditer(text):
        value = float(match[1] or match[2])
        if value < 3.0 and value >= 0.5:
            yield "血糖低值", match[0]
        if 16.7 <= value <= 60:
            yield "血糖高值", match[0]
        if 33 <= value <= 60:
            yield "血糖极高", match[0]
        if 3.0 <= value < 3.9:
            yield "血糖偏低值", match[0]
    for match in _GLUCOSE_MG.finditer(text):
        value = float(match[1] or match[2]) / 18
        if 10 / 18 <= value < 3.0 and (match[1] or value > 33 / 18):
            yield "血糖低值", match[0]
        elif 16.7 <= value < 60:
            yield "血糖高值", match[0]
        if 33 <= value < 60:
            yield "血糖极高", match[0]


def _saturation(text: str) -> _Signs:
    for match in _OXYGEN.finditer(text):
        yield from _oxygen(match)


def _breaths(text: str) -> _Signs:
    for match in _BREATHS.finditer(text):
        limit = 60 if any(word in text for word in _CHILD) else 30
        if limit <= int(match[1]) <= 120:
            yield "呼吸数快", match[0]


def _weeks_of_pregnancy(text: str) -> _Signs:
    for match in _WEEKS.finditer(text):
        yield from _pregnant(int(match[1] or match[3]) * (4 if match[2] and "月" in match[2] else 1), match[0])


def _bare_weeks(text: str) -> _Signs:
    for match in _BARE_WEEKS.finditer(text):
        yield from _pregnant(int(match[1]), match[0])


def _tablets(text: str) -> _Signs:
    for match in _TABLETS.finditer(text):
        if int(match[1]) >= 8:
            yield "药量大", match[0]


def _heart_rate(text: str) -> _Signs:
    for match in _HEART_RATE.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        slow, fast = (80, 181) if _BABY.search(before) and not _MOTHER.search(before) else (40, 150)
        if int(match[1]) >= fast or int(match[1]) < slow:
            yield "心率危险", match[0]
        if fast - 30 <= int(match[1]) <= 250:
            yield "心率快", match[0]


def _oxygen(match: re.Match[str]) -> _Signs:
    """The last saturation named after the word, usual and normal values left out (平时95，现在82)."""
    tail, value, end = match[1], None, 0
    for number in _PERCENT.finditer(tail):
        before = tail[end : number.start()]
        if 40 <= int(number[1]) <= 100 and not _USUAL.search(before) and not _OLD.search(before):
            value = int(number[1]) - bool(
                re.search("不到|低于|不足|小于|below|under", before) or tail[number.end() :].startswith("以下")
            )
        end = number.end()
    if value is not None and value < 94:
        yield ("血氧低" if value < 90 else "血氧偏低"), match[0]


def _pregnant(weeks: int, words: str) -> _Signs:
    if 20 <= weeks <= 43:
        yield "孕20周", words
    if 20 <= weeks < 37:
        yield "未足月", words


def _ages(text: str) -> _Signs:
    for match in _AGE.finditer(text):
        value, unit = int(match[1]), match[2]
        if unit == "岁":
            if value <= 14:
                yield "儿童", match[0]
            if value >= 65:
                yield "老人", match[0]
            continue
        around = text[max(0, match.start() - 8) : match.end() + 6]
        if "孕" in around or not any(word in around for word in _CHILD):
            continue
        before = text[max(0, match.start() - 4) : match.start()]
        if "龄" not in unit and not re.search("生|龄|产", before) and _DURATION.search(before):
            continue
        days = value * {"天": 1, "日龄": 1, "周龄": 7, "周": 7}.get(unit, 30)
        if days <= 92 and not (unit in ("个月", "个半月") and value >= 3):
            yield "三月内", match[0]
        if days <= 28:
            yield "新生儿", match[0]
        if days <= 1200:
            yield "儿童", match[0]


# Each reader, behind words without which its pattern finds nothing: looking for them is quicker.
_READERS = (
    (("度", "℃", "c", "烧", "热", "温", "fever", "temp"), _temperature),
    (("/", "比", "、"), _blood_pressure),
    (("压", "bp"), _systolic),
    (("糖", "血唐", "血搪", "餐后", "空腹", "glucose", "sugar", "mmol"), _glucose),
    (("氧", "血养", "饱和度", "o2", "oxygen", "sat"), _saturation),
    (("呼吸",), _breaths),
    (("天", "日", "周", "月", "岁"), _ages),
    (("孕", "妊娠", "pregnant"), _weeks_of_pregnancy),
    (_LATE_PREGNANCY, _bare_weeks),
    (("片", "粒", "颗", "胶囊", "tablets", "pills"), _tablets),
    (("心率", "心跳", "脉搏", "pulse"), _heart_rate),
)
