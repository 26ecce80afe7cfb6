"""What can be wrong with a record that is usable all the same: the checks of the audit, and what is repaired.

Each check is a row of CHECKS, with what it means for training and what to do. Only what has one right repair is
repaired (a written-out line break, a number that JSON lacks); the rest is counted, shown, and left to the user.

Limits: words and patterns, not meaning. Thinking that leaks a reference answer in other words is not found; whether
an answer is medically right is not asked.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwenmed import redact, schemas
from qwenmed.controls import as_plain_words
from qwenmed.records import Record


@dataclass(frozen=True)
class Check:
    """Something the audit looks for.

    Attributes:
        key: as in audit.json and `--drop`.
        title: for a person.
        advice: what it does to a model, and what to do.
        done: what has been done about it: "" where the row stays as it is.
    """

    key: str
    title: str
    advice: str
    done: str = ""


CHECKS = (
    Check("no_thinking", "没有思考", "模型会学着不思考；少量无妨，很多时请补上思考或分开训练"),
    Check("copied_thinking", "思考是回答或问题的复制", "教不会推理，还把回答写两遍；建议 --drop copied_thinking"),
    Check(
        "cited_reference",
        "思考引用了看不见的“参考答案”",
        "使用时没有这个答案，模型却会学着引用它；建议 --drop cited_reference，或重新生成这些思考",
    ),
    Check("no_ending", "回答没有结尾", "多半是生成时到了长度上限；模型会学着说一半就停"),
    Check("written_newline", "写成 \\n 两个字符的换行", "模型会把反斜杠写给用户看", "已改成换行"),
    Check("not_a_number", "NaN 或 Infinity", "不是合法的 JSON，别的程序读不了", "已改成 null"),
    Check("mojibake", "乱码", "编码转换出过错，已无法复原；建议 --drop mojibake"),
    Check(
        "control_tokens",
        "文本里有控制 token 的字样",
        "训练时按普通文字处理，不会变成控制 token；看看来源是否混入了模板",
    ),
    Check("personal_data", "像个人信息（手机号、身份证号、邮箱……）", "模型可能背下来并说给别人；请加 --redact 遮住"),
    Check(
        "overlong", "超过 --max-length", "训练时默认丢弃这些样本；可增大 --max-length，或训练时用 --overlong shorten"
    ),
    Check("same_question", "问题相同的其他记录", "同一个问题的记录只会在训练集或验证集的一边"),
    Check("near_duplicate", "与另一条近似重复", "只会在训练集或验证集的一边；去掉它们用 --drop near_duplicate"),
)
BY_KEY = {check.key: check for check in CHECKS}

# How much of a thinking must stand in the answer (or the question) to be a copy of it.
COPIED = 0.6
# Twelve characters that stand in both are no coincidence; fewer pieces than five are too short a text to judge.
COPIED_PIECE, FEWEST_PIECES = 12, 5

# A thinking that speaks of an answer which somebody has given it. "答案里需要提到" plans the model's own.
CITED = re.compile(
    r"参考答案|标准答案|原答案|用户(?:的)?答案|(?:提供|给出|给|提到)的(?:参考)?(?:答案|回答)"
    r"|(?:答案|参考回答)[里中](?:已|没|并没|并未|未|也?提到|也?提及|也?说|用的?是|给出|指出|建议|最后提|还提)"
)
# A line break written as two characters; "\nu" and "\nabla" are LaTeX, "C:\new" is a path.
WRITTEN_NEWLINE = re.compile(r"(?<!\\)(?:(?:\\r)?\\n)+(?![a-z])")
MOJIBAKE = re.compile("\ufffd|锟斤拷|烫烫烫|屯屯屯|[\x80-\x9f]|Ã[\x80-\xbf]|â€|ï»¿|鈥|銆[\ue000-\uf8ff]")
# What these two begin with or hold; most texts are passed by one quick look.
_PERHAPS_MOJIBAKE = re.compile("[\ufffd锟烫屯\x80-\x9fÃâï鈥銆]")
_PERHAPS_CITED = ("答案", "的回答", "参考回答")
_ENDINGS = frozenset("。！？.!?…；;~～)）】』」》”\"'’]}*`|>")
_CUT = frozenset("，、：,:（(【《“-—")
_LISTED = re.compile(r"\s*(?:[-*•·|#]|\d+[.、)）]|[一二三四五六七八九十]+、|（[一二三四五六七八九十\d]+）)")


@dataclass(frozen=True)
class Limits:
    """The thresholds of the checks."""

    copied_thinking: float = COPIED
    redact: bool = False


def examine(record: Record, limits: Limits) -> tuple[Record, dict[str, str], Counter]:
    """The record with its repairs, what was found (check → the place in the text), and how much was masked."""
    found: dict[str, str] = {}
    record = _repaired(record, found)
    # Looked at with personal data masked, so that no example shows any.
    seen, masked = _without_personal_data(record, found)
    if limits.redact and (masked or redact.may_hold_any(str(record.row))):
        record, masked = _masked(record)
    for text in (seen.question, seen.think, seen.answer):
        if (plain := as_plain_words(text)) != text:  # as long: only "<" becomes "＜"
            place = next(i for i, (one, other) in enumerate(zip(text, plain, strict=True)) if one != other)
            found.setdefault("control_tokens", _around(text, place))
        if _PERHAPS_MOJIBAKE.search(text) and (wrong := MOJIBAKE.search(text)):
            found.setdefault("mojibake", _around(text, wrong.start()))
    if not seen.think.strip():
        found["no_thinking"] = seen.question[:60]
    elif any(word in seen.think for word in _PERHAPS_CITED) and (cited := CITED.search(seen.think)):
        found["cited_reference"] = _around(seen.think, cited.start())
    if _is_copied(seen, limits.copied_thinking):
        found["copied_thinking"] = seen.think[:60]
    if not has_ending(seen.answer):
        found["no_ending"] = seen.answer.rstrip()[-60:]
    return record, found, masked


def _without_personal_data(record: Record, found: dict[str, str]) -> tuple[Record, Counter]:
    counts: Counter = Counter()
    texts = {name: getattr(record, name) for name in ("question", "think", "answer")}
    for name, text in texts.items():
        if not redact.may_hold_any(text):
            continue
        redacted = redact.redact(text)
        if redacted.counts:
            counts.update(redacted.counts)
            texts[name] = redacted.text
            kind = next(iter(redacted.counts))
            found.setdefault("personal_data", _around(redacted.text, redacted.text.index(f"[{kind}]")))
    return (replace(record, **texts) if counts else record), counts


def has_ending(answer: str) -> bool:
    """Whether an answer comes to an end: a sentence's end, a closing sign, a list's or a table's last line."""
    text = answer.rstrip()
    last = text[-1:]
    if last in _CUT:
        return False
    line = text.rpartition("\n")[2]
    # Short answers ("是", "B") and signs that end a sentence elsewhere (emoji) are ends too.
    return last in _ENDINGS or len(text) <= 12 or bool(_LISTED.match(line)) or unicodedata.category(last)[0] == "S"


def _is_copied(record: Record, share: float) -> bool:
    think = "".join(record.think.split())
    pieces = [think[i : i + COPIED_PIECE] for i in range(0, len(think) - COPIED_PIECE + 1, COPIED_PIECE)]
    for text in (record.answer, record.question):
        text = "".join(text.split())
        if len(pieces) < FEWEST_PIECES:
            copied = bool(think) and (think == text or (bool(pieces) and think in text))
        else:
            copied = sum(piece in text for piece in pieces) >= share * len(pieces)
        if copied:
            return True
    return False


def _repaired(record: Record, found: dict[str, str]) -> Record:
    texts = {name: getattr(record, name) for name in ("question", "think", "answer")}
    for name, text in texts.items():
        if "\\n" in text and WRITTEN_NEWLINE.search(text):
            shown = redact.redact(text).text
            written = WRITTEN_NEWLINE.search(shown)
            found.setdefault("written_newline", _around(shown, written.start() if written else 0))
            texts[name] = WRITTEN_NEWLINE.sub(lambda match: "\n" * match[0].count("\\n"), text)
    row = _without_nan(record.row)
    if row is not record.row:
        found["not_a_number"] = "、".join(name for name in record.row if record.row[name] is not row[name])
        record = replace(record, row=row)
    return schemas.with_texts(record, **texts) if "written_newline" in found else record


def _without_nan(value: Any) -> Any:
    """The value with None for what JSON has no number for; the same object where there is no such thing."""
    if isinstance(value, float):
        return None if math.isnan(value) or math.isinf(value) else value
    if isinstance(value, Mapping):
        inner = {name: _without_nan(each) for name, each in value.items()}
        return value if all(inner[name] is each for name, each in value.items()) else inner
    if isinstance(value, list):
        items = [_without_nan(each) for each in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    return value


def _masked(record: Record) -> tuple[Record, Counter]:
    counts: Counter = Counter()
    row = redact.redact_row(record.row, counts)
    again = schemas.parse_row(row, record.place)
    # A row that was a record is one with other digits as well.
    return (again[0] if isinstance(again, list) else record), counts


def _around(text: str, place: int) -> str:
    start = max(0, place - 20)
    return ("…" if start else "") + " ".join(text[start : place + 40].split())
