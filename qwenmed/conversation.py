"""A conversation: what of it goes into a prompt, and how it is saved and loaded.

Earlier turns go in without their thinking, as Qwen3's template prescribes; when the context fills, whole turns
leave, the oldest first. A saved conversation is JSON that only its owner can read.
"""

import bisect
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import chat, files, triage
from qwenmed.answers import AssistantReply
from qwenmed.errors import UserError

if TYPE_CHECKING:
    from qwenmed.engine import Engine


def prompt_messages(
    question: str, system: str, history: Sequence[AssistantReply], engine: "Engine", max_tokens: int, truncate: bool
) -> tuple[list[dict[str, str]], int]:
    """The prompt with as many of the newest turns as leave room for the reply.

    Args:
        truncate: whether older turns may be left out.

    Returns:
        The messages, and how many turns were left out.

    Raises:
        UserError: a turn would have to be left out and may not be.
    """
    turns = [
        [{"role": "user", "content": reply.question}, {"role": "assistant", "content": reply.said}]
        for reply in history
        if reply.said
    ]

    def prompt(left_out: int) -> list[dict[str, str]]:
        return chat.user_messages(question, system, [message for turn in turns[left_out:] for message in turn])

    context, messages = engine.context_length, prompt(0)
    tokens = engine.count_tokens(messages) if context and turns else None
    if tokens is None or context is None or tokens + max_tokens <= context:
        return messages, 0
    if not truncate:
        what = f"对话连同问题有 {tokens} 个 token，加上回答的 {max_tokens} 个超过上下文的 {context} 个"
        raise UserError(what, None, "请开始新的对话，减小 -m，或去掉 --no-truncate-history")
    room = context - max_tokens

    def fits(left_out: int) -> bool:
        return (engine.count_tokens(prompt(left_out)) or 0) <= room

    # Each count renders and tokenises the whole prompt, and a prompt with a turn less is shorter: halve, don't walk.
    left_out = 1 + bisect.bisect_left(range(1, len(turns)), True, key=fits)
    return prompt(left_out), left_out


def earlier_turns(
    turns: Sequence[tuple[str, str]], scenario_of: Callable[[str], str], notice: str = ""
) -> list[AssistantReply]:
    """Turns that only their texts are left of: what a client that keeps the conversation sends back.

    Args:
        turns: the questions, and the answers as they were shown, fixed texts included.
        scenario_of: the scenario of a question.
        notice: the model's.
    """
    replies: list[AssistantReply] = []
    for question, shown in turns:
        before = replies[-1] if replies and replies[-1].urgency != triage.EMERGENCY else None
        urgency = triage.assess_conversation(question, before.question if before else None)
        said = triage.models_words(shown, notice)
        scenario = scenario_of(question)
        replies.append(
            AssistantReply(
                question, scenario, urgency.level, urgency.reasons, "", shown, said, (), "stop", 0, 0, 0, 0.0, ""
            )
        )
    return replies


def save(path: Path, history: Sequence[AssistantReply]) -> None:
    """Write a conversation, readable by its owner only (mode 0600)."""
    turns = [{**reply.as_row(), "said": reply.raw_answer} for reply in history]
    files.write_json(path, {"disclaimer": triage.DISCLAIMER, "turns": turns}, private=True)


def load(path: Path, scenarios: Collection[str]) -> list[AssistantReply]:
    """Read a saved conversation.

    Args:
        scenarios: the known ids.

    Raises:
        UserError: the file is missing, broken, or no saved conversation.
    """
    document = files.read_json(path)
    turns = document.get("turns") if isinstance(document, dict) else None
    if not isinstance(turns, list):
        raise UserError("这不是保存的对话", path, "请给出用 save 或 --save-history 保存的文件")
    return [_turn(turn, number, path, scenarios) for number, turn in enumerate(turns, 1)]


def _turn(turn: Any, number: int, path: Path, scenarios: Collection[str]) -> AssistantReply:
    where = f"{path}:第{number}轮"
    if not isinstance(turn, dict):
        raise UserError("这一轮对话不是一个对象", where, "文件可能被改动过")
    row = {**turn, "raw_answer": turn.get("said", turn.get("answer"))}
    values = {}
    for name, kind in typing.get_type_hints(AssistantReply).items():
        value = row.get(name)
        if kind == tuple[str, ...]:  # JSON has lists only
            kind = tuple
            value = tuple(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else None
        elif kind is float:
            kind = (int, float)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"这一轮对话的 {name} 缺失或类型不对", where, "文件可能被改动过")
        values[name] = value
    if not files.is_encodable(turn):
        raise UserError("这一轮对话里有无法编码的字符", where, "文件可能被改动过")
    if values["scenario"] not in scenarios:
        raise UserError(f"这一轮对话的场景 {values['scenario']} 不认识", where, f"可选：{'、'.join(scenarios)}")
    return AssistantReply(**values)
