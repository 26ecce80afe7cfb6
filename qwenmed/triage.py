"""Urgency rules and fixed texts: what must not depend on a model.

The rules are a table that a doctor can read and correct (urgency/rules.csv, each with its source); the words
stand in urgency/signs.csv, the marks of denial, past, supposition and knowledge questions in urgency/cues.csv,
what to do and not to do until help comes in urgency/advice.csv. Beside the rules, the whole question is weighed
(urgency/points.csv): that finds emergencies in words that no rule knows, and doubts a rule that stands alone.
`assess` reads a question, `emergency_text` is what an emergency is told before any model is asked, and
`check_answer` looks at what the model then said.
"""

import csv
import functools
import re
from dataclasses import dataclass

from qwenmed.points import telling, weigh, weigh_crisis
from qwenmed.quantities import signs_from_numbers
from qwenmed.signs import TABLES, find_signs, normalise

EMERGENCY, URGENT, ROUTINE = "emergency", "urgent", "routine"

DISCLAIMER = "【免责声明】以上内容由人工智能生成，仅供参考，不能代替医生的诊断和治疗；如有不适请及时就医，紧急情况请立即拨打120。"

# What the fixed text of an emergency begins with.
EMERGENCY_MARK = "【紧急】"

NO_ANSWER = "（模型在 {limit} 个 token 之内没有写完思考，还没有给出回答。请用更大的 -m / max_tokens 再试一次。）"
HELPLINE = "心里难受、撑不住的时候，请拨打心理援助热线12356；打不通或有危险时，立即拨打120或110。"
SEE_A_DOCTOR_TODAY = (
    "【请当天就医】您描述的情况最好今天就去医院看医生；如果加重，或出现胸痛、呼吸困难、意识不清，请立即拨打120。"
)
EMPTY_ANSWER = "（模型没有给出回答。请换一种说法再试一次。）"

# Rules by which danger to life is told even inside a knowledge question.
_ALWAYS = ("魂",)
# And those that count there if somebody is spoken of.
_EVEN_ASKING = ("危",)


@dataclass(frozen=True)
class Urgency:
    """How urgent a question is.

    Attributes:
        level: "emergency" (call 120 now), "urgent" (see a doctor today) or "routine".
        reasons: the rules that fired, each with the words that it was read from.
        advice: key of the fixed text for an emergency, otherwise "".
        is_crisis: whether it is about suicide, self-harm or violence, so that the helpline is named.
    """

    level: str
    reasons: tuple[str, ...] = ()
    advice: str = ""
    is_crisis: bool = False


@dataclass(frozen=True)
class Rule:
    """A row of rules.csv: fires if of each group of signs one is present, and none of `unless`."""

    id: str
    level: str
    name: str
    needs: tuple[tuple[str, ...], ...]
    unless: tuple[str, ...]
    advice: str
    source: str
    certain: bool = False  # its words have no harmless reading, so the points don't doubt it

    @functools.cached_property
    def alternatives(self) -> tuple[frozenset[str], ...]:
        """The groups of `needs` as sets: most rules fail by these alone."""
        return tuple(map(frozenset, self.needs))

    def fired_by(self, present: dict[str, str]) -> str | None:
        """The words that fire it, or None."""
        for alternatives in self.alternatives:
            if alternatives.isdisjoint(present):
                return None
        words: list[str] = []
        for group in self.needs:
            found = next((w for sign in group if (w := present.get(sign)) and not _same(w, words)), None)
            if found is None:
                return None
            words.append(found)
        if any(sign in present for sign in self.unless):
            return None
        return "、".join(dict.fromkeys(words))


def _same(found: str, words: list[str]) -> bool:
    """Whether the same words have fired another part of the rule already: one sign is no combination."""
    return any(found in word or word in found for word in words)


# Points from which a question counts though no rule fired, and below which it doesn't though one did.
ALARM = 0
DOUBT = -200
# An exam's or a lesson's case sounds like an emergency by nature.
ALARM_IN_A_LESSON = 300
# Points of a crisis from which the helpline is named besides other advice, and from which the advice is the crisis's.
CRISIS_BESIDES, CRISIS = -200, -100
_CRISIS_ADVICE = frozenset({"自伤", "伤人", "危机"})
# What outweighs the doubt, beside a rule that is certain: so many rules, or a value that is dangerous by itself.
WITNESSES = 3
_CRITICAL = frozenset({"血氧低", "血压低", "血糖低值", "血糖极高", "体温405", "心率危险", "呼吸数快"})


def assess(question: str) -> Urgency:
    """How urgent a question is; deterministic, in time proportional to its length."""
    text = normalise(question)
    findings = find_signs(text)
    measured = dict(signs_from_numbers(text))
    present = measured | findings.present
    fired = _fired(present, findings.cues)
    weight = weigh(text)
    emergencies = [each for each in fired if each[0].level == EMERGENCY]
    is_certain = len(emergencies) >= WITNESSES or not _CRITICAL.isdisjoint(measured)
    is_certain = is_certain or any(rule.certain for rule, _ in emergencies)
    if emergencies and (is_certain or weight.emergency >= DOUBT):
        # The table stands in the order of need: no breath and a blocked airway come before what else the same words fire.
        advice = emergencies[0][0].advice
        # Who took poison and speaks of dying; beside another first rule a word of self-harm is mostly misread.
        telling_rules = emergencies if advice == "中毒" else emergencies[:1]
        is_crisis = _has_crisis(telling_rules) or weigh_crisis(text) >= CRISIS_BESIDES
        return Urgency(EMERGENCY, _reasons(emergencies), advice, is_crisis)
    alarm = ALARM_IN_A_LESSON if "强求知" in findings.cues else ALARM
    if weight.emergency >= alarm:
        crisis = weigh_crisis(text)
        advice = "危机" if crisis >= CRISIS else _likeliest_advice(present)
        reason = f"分1 整句话像急症（{'、'.join(telling(text))}）"
        return Urgency(EMERGENCY, (reason,), advice, advice in _CRISIS_ADVICE or crisis >= CRISIS_BESIDES)
    if emergencies or (fired and weight.today >= DOUBT):
        reasons = _reasons(emergencies or fired)
    elif weight.today >= alarm:
        reasons = ("分2 整句话像当天要看的病",)
    else:
        return Urgency(ROUTINE)
    # A rule of self-harm that was doubted keeps its helpline.
    is_crisis = _has_crisis(emergencies) or weigh_crisis(text) >= CRISIS
    return Urgency(URGENT, reasons, is_crisis=is_crisis)


def _has_crisis(fired: list[tuple[Rule, str]]) -> bool:
    return any(rule.advice in _CRISIS_ADVICE for rule, _ in fired)


def _fired(present: dict[str, str], cues: frozenset[str]) -> list[tuple[Rule, str]]:
    """The rules that fire, each with its words; the urgent ones only where no emergency does."""
    is_lesson = _asks_for_knowledge(cues)
    # Two danger signs in somebody weigh more than a word such as 疫苗 or 注意什么; an exam's stay an exam's.
    heard = (*_ALWAYS, *(() if "强求知" in cues or "本人" not in cues else _EVEN_ASKING))
    fired: list[tuple[Rule, str]] = []
    for rule in _candidates(present):
        if is_lesson and not rule.id.startswith(heard):
            continue
        if fired and rule.level == URGENT and fired[0][0].level == EMERGENCY:
            break
        words = rule.fired_by(present)
        if words is not None:
            fired.append((rule, words))
    return fired


def _reasons(fired: list[tuple[Rule, str]]) -> tuple[str, ...]:
    return tuple(f"{rule.id} {rule.name}（{words}）" for rule, words in fired)


def _likeliest_advice(present: dict[str, str]) -> str:
    """The advice of the emergency rule of which most is there, its first sign included; else the general one."""
    advice, most = "通用", 0.5
    for rule in _candidates(present):
        share = sum(not group.isdisjoint(present) for group in rule.alternatives) / len(rule.needs)
        if rule.level == EMERGENCY and share >= most and (advice == "通用" or share > most):
            advice, most = rule.advice, share
    return advice


def assess_conversation(question: str, earlier: str | None) -> Urgency:
    """How urgent a message is, read by itself and together with the one before it.

    Signs often come one by one: 胸口疼 – and then 出了一身冷汗.

    Args:
        earlier: the user's message before this one, if it was no emergency already.
    """
    alone = assess(question)
    if alone.level == EMERGENCY or not earlier:
        return alone
    together = assess(f"{earlier}，{question}")
    return together if together.level == EMERGENCY else alone


def _asks_for_knowledge(cues: frozenset[str]) -> bool:
    """Whether the text asks to learn rather than for help: a lesson has no patient in it, or is an exam's."""
    if "强求知" in cues:
        return True
    return "求知" in cues and not ("急性" in cues and "本人" in cues)


def _candidates(present: dict[str, str]) -> list[Rule]:
    first, by_sign = _rules()
    numbers = {number for sign in present for number in by_sign.get(sign, ())}
    return [first[number] for number in sorted(numbers)]


@functools.cache
def _rules() -> tuple[list[Rule], dict[str, tuple[int, ...]]]:
    """The rules, emergencies first as they stand, and for each sign those that need it as their first."""
    with (TABLES / "rules.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = [
            Rule(
                id=row["编号"],
                level=row["级别"],
                name=row["名称"],
                needs=tuple(tuple(group.split("/")) for group in row["条件"].split(" + ")),
                unless=tuple(row["除非"].split("/")) if row["除非"] else (),
                advice=row["处置"],
                source=row["依据"],
                certain=row["不疑"] == "是",
            )
            for row in csv.DictReader(file)
        ]
    rows.sort(key=lambda rule: rule.level != EMERGENCY)
    index: dict[str, tuple[int, ...]] = {}
    for number, rule in enumerate(rows):
        for sign in rule.needs[0]:
            index[sign] = (*index.get(sign, ()), number)
    return rows, index


def emergency_text(urgency: Urgency) -> str:
    """The fixed text that an emergency's reply begins with; "" for everything else."""
    if urgency.level != EMERGENCY:
        return ""
    do, avoid = _advice()[urgency.advice]
    call = "请立即拨打120，并拨打心理援助热线12356" if urgency.is_crisis else "请立即拨打120"
    return f"{EMERGENCY_MARK}{call}！您描述的情况可能有生命危险，请先做下面的事，不要等待网上的回答。\n现在：{do}\n注意：{avoid}"


@dataclass(frozen=True)
class CheckedAnswer:
    """A model's answer after the check.

    Attributes:
        text: the answer, with fixed cautions behind it; "" if it was withheld.
        cautions: names of the cautions added, and `WITHHELD` where the answer was withheld.
    """

    text: str
    cautions: tuple[str, ...] = ()


# The name under which a withheld answer is recorded.
WITHHELD = "contradiction"

# What an answer must not leave uncommented, whatever the question was.
_CAUTIONS = {
    "dose": "【用药提醒】回答里提到了药物剂量，可能有错：请以药品说明书和医生、药师的意见为准，不要照着自行用药。",
    "child": "【用药提醒】儿童用药要按体重由医生决定，请先问儿科医生或药师，不要自行给药。",
    "pregnancy": "【用药提醒】怀孕或哺乳期间，任何药物（包括中成药）都请先问产科医生或药师。",
    "kidney_liver": "【用药提醒】肝肾功能不好时，许多药要减量或不能用，请先问医生或药师。",
    "stopping": "【用药提醒】医生开的药不要自行停用或减量，请先问开药的医生。",
}
_DOSE = re.compile(
    r"[0-9一二两三四五六七八九十百半]\s?[0-9.~～至\-到]{0,8}\s?"
    r"(?:mg|毫克|微克|μg|ug|ml|毫升|克|g|片|粒|颗|滴|支|袋|丸|单位|iu|喷|包|mcg)(?![a-z])"
)
_DRUG = re.compile(
    "药|片|胶囊|颗粒|口服|服用|注射|布洛芬|对乙酰氨基酚|阿司匹林|头孢|青霉素|阿莫西林|胰岛素|激素|抗生素|地平|洛尔|普利|沙坦|"
    "他汀|拉唑|唑仑|沙星|霉素|西林|替丁|泼尼松|地塞米松|二甲双胍|甘油|每日|每天|一日|一次|每次|mg|毫克"
)
_MEDICINE = re.compile(
    "服药|用药|服用|口服|吃药|给药|药物|布洛芬|对乙酰氨基酚|阿司匹林|头孢|青霉素|阿莫西林|退烧药|退热药|止痛药|抗生素|感冒药|胶囊|颗粒|mg|毫克|片"
)
_CHILD = re.compile("宝宝|孩子|儿童|婴儿|幼儿|小儿|新生儿|小孩|[0-9一二两三四五六七八九十]{1,3}(?:个月|岁半|月龄)|患儿")
_PREGNANCY = re.compile("怀孕|孕妇|孕期|妊娠|哺乳|孕早期|孕晚期|备孕|孕[0-9]")
_KIDNEY_LIVER = re.compile("肾病|肾功能|肾衰|透析|尿毒症|肝硬化|肝功能|肝病|肝炎|肾炎")
_STOPPING = re.compile(
    "(?<![不勿别])(?:可以|能|应该|建议|请|应)[^。；，！？不勿]{0,6}(?:停药|停用|停服|停掉|减量|减半|不再吃|不吃药|停止服用|停止用药|不用再吃)"
)
_CONTRADICTION = re.compile(
    "(?:不用|无需|不必|不需要|没必要|没有必要|用不着|不要)(?!自|开|走|独|等|拖|先|以为|因|只|犹豫)[^。；，、！？]{0,6}"
    "(?:去医院|就医|看医生|急诊|(?:打|叫|拨打|呼叫)[^。；，、！？]{0,2}(?:120|急救|救护车)|就诊|送医)"
    "|(?:在家|先)[^。；，！？]{0,4}(?:观察|休息)[^。；！？]{0,10}(?:即可|就好|就行|几天|看看|再说)"
    "|(?:在家|先)[^。；，！？]{0,4}观察[^。；，！？]{0,4}[0-9一二两三半几](?:十|个|到|[0-9]){0,3}(?:小时|钟头|分钟|天)"
    "|(?:明天|过几天|几天后|有空|择期|下周)[^。；，！？]{0,6}(?:去医院|就医|就诊|看医生|再去)"
    "|[等待][^。；，！？]{0,6}(?:加重|严重|恶化)[^。；，！？]{0,3}再[^。；，！？]{0,2}(?:去|到|就医|就诊|看)"
    "|(?:问题|关系)不大|没什么大碍|不严重|[并般常]无大碍|不要紧(?!张)|(?:不是|不算|不属于)急症|喝点热水"
    "|(?:注意|多)休息(?:即可|就好|就行)|(?:不需要|无需|不用|不必)(?:特别|特殊)(?:处理|治疗)"
    "|(?:一般|通常|大多|多数|往往)(?:都|会|能|可|可以){0,2}(?:自行|自己|慢慢)(?:缓解|恢复|好转|消失)"
)
# Right before such words, what turns them into their opposite: 不要等到明天再去医院.
_WARNED = re.compile(
    "(?:不要|切勿|切忌|不能|不可|不得|不应|不宜|不建议|避免|(?<![特分区个级类性])别)"
    "(?:等到?|拖到?|再|以为|认为|觉得|因为?|只是?|自行|自己|抱着|心存|侥幸|继续|留|待|它|他|她|这|症状|病情|想着|打算|选择){0,4}$"
)


def check_answer(answer: str, question: str, urgency: Urgency) -> CheckedAnswer:
    """Look at a model's answer: withhold one that talks an emergency down, add the cautions it calls for.

    Args:
        question: what was asked; a child, a pregnancy or a kidney disease often stands only there.
    """
    if urgency.level == EMERGENCY and talks_down(answer):
        return CheckedAnswer("", (WITHHELD,))
    both = f"{question}\n{answer}"
    lowered = answer.lower()
    cautions = []
    if _DOSE.search(lowered) and _DRUG.search(lowered):
        cautions.append("dose")
    if _MEDICINE.search(lowered):
        groups = (("child", _CHILD), ("pregnancy", _PREGNANCY), ("kidney_liver", _KIDNEY_LIVER))
        cautions += [name for name, pattern in groups if pattern.search(both)]
    if _STOPPING.search(answer):
        cautions.append("stopping")
    return CheckedAnswer("\n\n".join([answer, *(_CAUTIONS[name] for name in cautions)]), tuple(cautions))


_HELP_AT_ONCE = re.compile(
    "(?:拨打|打|呼叫)[^。；，！？\n]{0,4}(?:120|急救|救护车)|叫救护车|120急救|呼叫120"
    "|(?:立即|马上|立刻|赶紧|火速|紧急|第一时间)[^。；，！？\n]{0,8}(?:就医|就诊|送医|去医院|到医院|送医院|急诊|入院|送往)"
    "|(?:去|到|前往|送|挂)[^。；，！？\n]{0,4}急诊"
)


def calls_for_help(answer: str) -> bool:
    """Whether an answer says to seek care at once, and nowhere that there is no need to."""
    return bool(_HELP_AT_ONCE.search(answer)) and not talks_down(answer)


def talks_down(answer: str) -> bool:
    """Whether an answer says that there is no need for help, or that it can wait."""
    found = _CONTRADICTION.finditer(answer)
    return any(not _WARNED.search(answer, max(0, match.start() - 20), match.start()) for match in found)


@functools.cache
def _advice() -> dict[str, tuple[str, str]]:
    with (TABLES / "advice.csv").open(encoding="utf-8-sig", newline="") as file:
        return {row["处置"]: (row["现在做"], row["不要做"]) for row in csv.DictReader(file)}


def close_answer(answer: str, notice: str = "", urgency: Urgency = Urgency(ROUTINE)) -> str:
    """The answer as it is shown.

    An emergency's fixed text comes first; then the answer; the advice to see a doctor today where that is due;
    the model's own notice, if it has one; and the disclaimer, once.
    """
    body = answer.replace(DISCLAIMER, "").strip()
    today = SEE_A_DOCTOR_TODAY if urgency.level == URGENT else ""
    helpline = HELPLINE if urgency.level == URGENT and urgency.is_crisis else ""
    return "\n\n".join(part for part in (emergency_text(urgency), body, today, helpline, notice, DISCLAIMER) if part)


# `NO_ANSWER` as it comes back, whatever the limit was.
_NO_ANSWER = re.compile("[0-9]+".join(map(re.escape, NO_ANSWER.split("{limit}"))))


def models_words(shown: str, notice: str = "") -> str:
    """What the model itself said in an answer that `close_answer` and `check_answer` have made.

    A client that keeps a conversation sends the whole answer back; the fixed texts in it are none of the model's.
    """
    fixed = {SEE_A_DOCTOR_TODAY, HELPLINE, DISCLAIMER, EMPTY_ANSWER, notice, *_CAUTIONS.values()}

    def is_own(part: str) -> bool:
        # An emergency's text by its mark: which one it was may depend on more than the question.
        return part not in fixed and not part.startswith(EMERGENCY_MARK) and not _NO_ANSWER.fullmatch(part)

    return "\n\n".join(part for part in shown.split("\n\n") if is_own(part.strip())).strip()
