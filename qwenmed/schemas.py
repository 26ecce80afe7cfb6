"""What the rows of other people's data sets mean: any common schema becomes Records of question, thinking and answer.

Recognised by the names of the fields, without being told: the data set's own `question/think/answer`, Alpaca,
ShareGPT, OpenAI messages (also TRL's prompt/completion), HuatuoGPT-o1 and its likes; others with a mapping.
Thinking stands in a field of its own or inline, as `<think>…</think>` before the answer. A conversation becomes one
Record per assistant turn, with the earlier turns as history and their thinking dropped, as Qwen3's template has it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwenmed.records import Problem, Record

# Names by which others call the three fields, compared without case; the first that is there counts.
QUESTION = ("question", "query", "problem", "prompt")
# Together they are the question, where there is no other.
INSTRUCTION = ("instruction", "input", "context")
THINK = (
    "think", "thinking", "reasoning", "reasoning_content", "reasoning (reasoning_content)", "complex_cot", "cot",
    "rationale",
)  # fmt: skip
ANSWER = ("answer", "response", "response (content)", "content", "output", "solution")
# What can be mapped: `--map question=…`.
FIELDS = ("question", "think", "answer", "system", "scenario")

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
}  # fmt: skip

# How an instruction begins that tells the model who it is; others are the question itself.
ROLE_OPENINGS = (
    "你是",
    "您是",
    "现在你是",
    "假设你是",
    "假如你是",
    "请你扮演",
    "请扮演",
    "作为一",
    "you are",
    "as a ",
    "if you are",
)

OWN, FORMATTED, ALPACA = "question/think/answer", "instruction/input/output（instruction 是系统提示词）", "Alpaca"
MESSAGES, SHAREGPT, NAMED, MAPPED = "OpenAI messages", "ShareGPT", "HuatuoGPT-o1 一类（按字段名）", "--map"


class _Unusable(Exception):
    """A row can't be used; the reason is the message."""


def recognise(row: object, mapping: Mapping[str, str] | None = None) -> str | None:
    """The name of a row's schema, or None."""
    if not isinstance(row, dict):
        return None
    if mapping:
        return MAPPED
    if isinstance(row.get("messages"), list) or _is_turns(row.get("prompt")):
        return MESSAGES
    if isinstance(row.get("conversations") or row.get("conversation"), list):
        return SHAREGPT
    if "question" in row or "answer" in row:
        own = not row.keys().isdisjoint(("think", "answer")) or _field(row, ANSWER) is None
        return OWN if own else _named(row)
    if "output" in row and not row.keys().isdisjoint(("instruction", "input")):
        return FORMATTED if _has_system_prompt(row) else ALPACA
    return _named(row)


def parse_row(row: object, place: str, mapping: Mapping[str, str] | None = None) -> list[Record] | Problem:
    """The Records of a row, more than one for a conversation; or why it is none.

    Args:
        mapping: the names of the row's fields by ours ("question", "think", "answer", "system", "scenario").
    """
    if not isinstance(row, dict):
        return Problem(place, f"应为一个 JSON 对象，实际是 {type(row).__name__}")
    try:
        # Rows are written back as UTF-8, which has no way to write half a surrogate pair.
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return Problem(place, "含有无法编码的字符（半个代理对）")
    except (RecursionError, TypeError, ValueError):
        return Problem(place, "JSON 嵌套过深，或有写不成 JSON 的内容")
    schema = recognise(row, mapping)
    if schema is None:
        names = "、".join(map(str, list(row)[:8])) or "（没有字段）"
        return Problem(place, f"认不出这种格式，字段有 {names}；可用 --map question=… think=… answer=… 指出")
    try:
        found = _PARSERS[schema](row, mapping or {})
    except _Unusable as reason:
        return Problem(place, str(reason))
    unchanged = schema in (OWN, FORMATTED)
    return [replace(record, row=row if unchanged else as_row(record), place=place) for record in found]


def as_row(record: Record) -> dict[str, Any]:
    """A Record as a row of the data set's own schema."""
    row: dict[str, Any] = {"question": record.question, "think": record.think, "answer": record.answer}
    if record.scenario:
        row["scenario"] = record.scenario
    if record.system:
        row["system"] = record.system
    if record.history:
        row["history"] = [list(turn) for turn in record.history]
    return row


def with_texts(record: Record, question: str, think: str, answer: str) -> Record:
    """The record with other texts, in its row too."""
    changed = replace(record, question=question, think=think, answer=answer)
    if recognise(record.row) == OWN:
        texts = {"question": question, "think": think, "answer": answer}
        # A thinking that stood inside of the answer has no field yet.
        row = {**record.row, **{name: text for name, text in texts.items() if text or name in record.row}}
    else:
        row = as_row(changed)
    return replace(changed, row=row)


def _own(row: dict[str, Any], mapping: Mapping[str, str]) -> list[Record]:
    answer, think = _text(row, "answer", required=True), _text(row, "think")
    if not think.strip() and answer.lstrip().startswith("<think>"):
        think, answer = _inline(answer)
    question = _text(row, "question", required=True)
    return [Record(question, think, answer, _scenario(row.get("scenario")), _own_system(row), _history(row))]


def _formatted(row: dict[str, Any], mapping: Mapping[str, str]) -> list[Record]:
    """A row of `*_format.jsonl`, or one of its kind."""
    question = _text(row, "input", required=True, called="input（问题）")
    think, answer = _inline(_text(row, "output", required=True, called="output（思考和回答）"))
    if not answer:
        raise _Unusable("output 里没有回答")
    system = row.get("instruction")
    return [Record(question, think, answer, system=system if _filled(system) else None, history=_history(row))]


def _alpaca(row: dict[str, Any], mapping: Mapping[str, str]) -> list[Record]:
    question = "\n".join(part for name in INSTRUCTION[:2] if (part := _text(row, name)).strip())
    if not question:
        raise _Unusable("缺少 instruction（问题）")
    think, answer = _inline(_text(row, "output", required=True))
    think = think or _text_of(_field(row, THINK), "思考")
    if not answer:
        raise _Unusable("output 里没有回答")
    return [Record(question, think, answer, _scenario(row.get("scenario")), _own_system(row), _history(row))]


def _by_names(row: dict[str, Any], mapping: Mapping[str, str]) -> list[Record]:
    question = _text_of(_field(row, QUESTION), "问题")
    if not question:
        question = "\n".join(filter(None, (_text_of(_field(row, (name,)), name) for name in INSTRUCTION)))
    answer, think = _text_of(_field(row, ANSWER), "回答"), _text_of(_field(row, THINK), "思考")
    return [_record(question, think, answer, _scenario(row.get("scenario")), _own_system(row))]


def _mapped(row: dict[str, Any], mapping: Mapping[str, str]) -> list[Record]:
    missing = [name for field, name in mapping.items() if name not in row and field in ("question", "answer")]
    if missing:
        raise _Unusable(f"缺少 {missing[0]}（--map 指出的字段）")
    texts = {field: _text_of(row.get(name), name) for field, name in mapping.items()}
    return [
        _record(
            texts["question"],
            texts.get("think", ""),
            texts["answer"],
            texts.get("scenario") or _scenario(row.get("scenario")),
            texts.get("system") or None,
        )
    ]


def _messages(row: dict[str, Any], mapping: Mapping[str, str]) -> list[Record]:
    turns = row["messages"] if isinstance(row.get("messages"), list) else [*row["prompt"], *_completion(row)]
    return _conversation(turns, row, "role", "content")


def _completion(row: dict[str, Any]) -> list[Any]:
    completion = row.get("completion")
    if not isinstance(completion, list):
        raise _Unusable("prompt 是消息的列表，completion 却不是")
    return completion


def _sharegpt(row: dict[str, Any], mapping: Mapping[str, str]) -> list[Record]:
    turns: list[Any] = row.get("conversations") or row["conversation"]
    openai = bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
    return _conversation(turns, row, *(("role", "content") if openai else ("from", "value")))


def _conversation(turns: Sequence[Any], row: dict[str, Any], role_key: str, text_key: str) -> list[Record]:
    """One Record per assistant turn; several messages of one side in a row are one."""
    system, asked = _own_system(row), ""
    history: list[tuple[str, str]] = []
    found: list[Record] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise _Unusable(f"第 {number} 条消息应为对象，实际是 {type(turn).__name__}")
        role = ROLES.get(str(turn.get(role_key)).lower())
        if role is None or turn.get("tool_calls"):
            raise _Unusable(f"第 {number} 条消息的角色是 {turn.get(role_key)!r}，只支持 system、user、assistant")
        text = _content(turn.get(text_key), number)
        if role == "system":
            system = text if number == 1 or not system else f"{system}\n\n{text}"
        elif role == "user":
            asked = f"{asked}\n\n{text}" if asked else text
        else:
            if not asked.strip():
                raise _Unusable(f"第 {number} 条消息是回答，前面却没有问题")
            think = next((_text_of(turn[key], key) for key in THINK if turn.get(key)), "")
            record = _record(asked, think, text, _scenario(row.get("scenario")), system or None, tuple(history))
            history.append((asked, record.answer))
            asked = ""
            if turn.get("weight", 1) != 0:  # OpenAI's mark for a turn that is not trained
                found.append(record)
    if not found:
        raise _Unusable("对话里没有一条 assistant 的回答")
    return found


def _record(
    question: str,
    think: str,
    answer: str,
    scenario: str | None,
    system: str | None,
    history: tuple[tuple[str, str], ...] = (),
) -> Record:
    if not think.strip():
        think, answer = _inline(answer)
    for name, text in (("问题", question), ("回答", answer)):
        if not text.strip():
            raise _Unusable(f"缺少{name}（为空）")
    return Record(question, think, answer, scenario, system, history)


def _inline(text: str) -> tuple[str, str]:
    """Thinking and answer of a reply that may hold both."""
    think, closed, answer = text.partition("</think>")
    if closed:
        if answer.lstrip().startswith("<think>"):  # which of the two is the thinking?
            raise _Unusable("回答又以 <think> 开头")
        return think.strip().removeprefix("<think>").strip(), answer.strip()
    if text.lstrip().startswith("<think>"):
        raise _Unusable("思考没有结束：有 <think>，没有 </think>")
    return "", text


def _content(content: object, number: int) -> str:
    """A message's text; OpenAI also allows a list of parts."""
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise _Unusable(f"第 {number} 条消息含有文本以外的内容")
        content = "\n".join(_text_of(part.get("text"), "text") for part in content)
    return _text_of(content, f"第 {number} 条消息")


def _text(row: Mapping[str, Any], name: str, required: bool = False, called: str | None = None) -> str:
    text = _text_of(row.get(name), f"字段 {name} ")
    if required and not text.strip():
        raise _Unusable(f"缺少 {called or name}（为空或没有这个字段）")
    return text


def _text_of(value: object, name: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        raise _Unusable(f"{name}应为文本，实际是 {type(value).__name__}")
    return value


def _history(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    turns = row.get("history")
    if not turns or not isinstance(turns, list):
        return ()
    if not all(isinstance(turn, list | tuple) and len(turn) == 2 and all(map(_filled, turn)) for turn in turns):
        raise _Unusable("字段 history 应为 [问题, 回答] 的列表")
    return tuple((asked, answered) for asked, answered in turns)


def _field(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    lower = {str(name).lower(): name for name in row}
    return next((row[lower[name]] for name in names if name in lower), None)


def _named(row: Mapping[str, Any]) -> str | None:
    lower = {str(name).lower() for name in row}
    return NAMED if lower & {*QUESTION, *INSTRUCTION} and lower & set(ANSWER) else None


def _filled(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _scenario(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _own_system(row: Mapping[str, Any]) -> str | None:
    system = row.get("system") or row.get("system_prompt")
    return system if isinstance(system, str) and system.strip() else None


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _has_system_prompt(row: Mapping[str, Any]) -> bool:
    """Whether `instruction` is a system prompt and `input` the question, as in our formatted rows."""
    instruction, question = row.get("instruction"), row.get("input")
    if not _filled(question):
        return not _filled(instruction)
    if not isinstance(instruction, str) or not instruction.strip():
        return True
    output = row.get("output")
    thinks = isinstance(output, str) and output.startswith("<think>\n")
    return thinks or instruction.strip().lower().startswith(ROLE_OPENINGS)


_PARSERS: dict[str, Callable[[dict[str, Any], Mapping[str, str]], list[Record]]] = {
    OWN: _own,
    FORMATTED: _formatted,
    ALPACA: _alpaca,
    MESSAGES: _messages,
    SHAREGPT: _sharegpt,
    NAMED: _by_names,
    MAPPED: _mapped,
}
