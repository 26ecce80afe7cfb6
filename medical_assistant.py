"""阶段 4：医疗助手——命令行、交互对话、批量和 Python 类。

    python medical_assistant.py                                   # 交互模式，菜单选择场景
    python medical_assistant.py -q "头痛三天了怎么办？" -s auto
    python medical_assistant.py -b sample_questions.json -o answers.jsonl       # 断了用 --resume 接着做
    python medical_assistant.py --engine openai --base-url http://localhost:8000/v1 -q "头痛三天了怎么办？"
    python medical_assistant.py -c model-q8_0.gguf                 # GGUF 文件，由 llama.cpp 生成

    from medical_assistant import MedicalAssistant
    assistant = MedicalAssistant(checkpoint_path="best")
    print(assistant.ask_question("头痛三天了怎么办？", scenario_type="diagnosis"))

场景、提示词和示例问题都在 prompts.py 里。思考与回答分开显示，每条回答都以免责声明结束。
"""

import argparse
import dataclasses
import datetime
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prompts import MEDICAL_PROMPTS, MEDICAL_SCENARIOS, SAMPLE_QUESTIONS
from qwenmed import chat, cli, commands, conversation, engines, files, redact, scenarios, triage
from qwenmed.answers import AssistantReply, compose, failed_row
from qwenmed.batch import AUTO, Answered, Request, Requests, parse_request
from qwenmed.engine import Engine, Generation, Prompt
from qwenmed.engines import EngineSettings
from qwenmed.errors import UserError
from qwenmed.settings import fingerprint

DEFAULT_MAX_TOKENS = 2048
DEFAULT_SCENARIO = "diagnosis"


class MedicalAssistant:
    """A conversation with a fine-tuned model under one of the medical scenarios.

    Each `ask_question` continues the conversation; `clear` starts a new one – do so for another patient.
    `batch` asks every row by itself.

    Args:
        checkpoint_path: a checkpoint or model folder, "best" or "latest"; for llama.cpp a GGUF file.
        engine: "auto" (by what the path is), "transformers", "openai", "llama.cpp", or an engine of your own (`qwenmed.engine.Engine`).
        redact: mask phone, identity-card and e-mail in questions, for the model and for what is saved.
        truncate_history: let the oldest turns go when the context fills; otherwise that is an error.
        settings: the other fields of `qwenmed.engines.EngineSettings`: base_model, device, dtype, base_url, model,
            concurrency, timeout, temperature, top_p, seed, think_budget.

    Attributes:
        history: all replies of this conversation.

    Raises:
        UserError: a setting is outside of its range.
    """

    def __init__(
        self,
        checkpoint_path: str | Path = "best",
        *,
        engine: str | Engine = engines.AUTO,
        redact: bool = False,
        truncate_history: bool = True,
        **settings: Any,
    ) -> None:
        given: dict[str, Any] = {"engine": engine} if isinstance(engine, str) else {}
        self.settings = EngineSettings(checkpoint=str(checkpoint_path), **given, **settings)
        self.redact = redact
        self.truncate_history = truncate_history
        self.history: list[AssistantReply] = []
        self._engine: Engine | None = None if isinstance(engine, str) else engine
        self._trained_prompts: engines.TrainedPrompts | None = None

    @property
    def last_reply(self) -> AssistantReply | None:
        """The newest reply of this conversation, thinking included; None before the first."""
        return self.history[-1] if self.history else None

    def load_model(self, for_batch: bool = False) -> "MedicalAssistant":
        """Find and load what answers; does nothing if that has been done.

        Args:
            for_batch: whether `batch` will be called; on a CPU the best number type depends on it.

        Raises:
            UserError: the checkpoint, server or device is not there or not usable.
        """
        if self._engine is None:
            self._engine = engines.open_engine(self.settings, for_batch)
            self._trained_prompts = engines.TrainedPrompts(self.settings, self._engine)
        return self

    def ask_question(
        self, question: str, scenario_type: str = DEFAULT_SCENARIO, max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> str:
        """Ask, and return the answer with its disclaimer; the thinking is in `last_reply`.

        Raises:
            UserError: an empty or over-long question, an unknown scenario, or no usable model.
        """
        for _ in self.stream(question, scenario_type, max_tokens):
            pass
        return self.history[-1].answer

    def stream(
        self,
        question: str,
        scenario_type: str = DEFAULT_SCENARIO,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        system: str | None = None,
    ) -> Iterator[tuple[str, str]]:
        """Ask, and yield (kind, piece) pairs as they come.

        Args:
            system: a system prompt in place of the scenario's; the urgency rules do not depend on it.

        Kinds: "emergency", "scenario" (the one that "auto" has chosen, and why), "thinking", "answer", "closing".
        In an emergency its fixed text comes at once, before the model is even loaded, and the model's answer
        only when it is whole and has been checked. The reply joins the conversation when it is complete; an
        abandoned one leaves no trace.

        Raises:
            UserError: as `ask_question`, or the engine failed in the middle.
        """
        question = self._redacted(check_question(question))
        check_scenario(scenario_type)
        if max_tokens < 1:
            raise UserError(f"max_tokens 应为正整数，而不是 {max_tokens}")
        before = self.last_reply if self.last_reply and self.last_reply.urgency != triage.EMERGENCY else None
        urgency = triage.assess_conversation(question, before.question if before else None)
        if warning := triage.emergency_text(urgency):
            yield "emergency", warning
        if scenario_type == AUTO:
            chosen = suggest_scenario(question, self.last_reply.scenario if self.last_reply else None)
            scenario_type = chosen.scenario
            yield "scenario", f"{MEDICAL_SCENARIOS[scenario_type]}（{chosen.reason}）"
        self.load_model()
        assert self._engine is not None
        messages = self._messages(question, scenario_type, max_tokens, system)
        prompt = Prompt(messages, max_tokens, self.settings.think_budget)
        shown = ""
        for event in self._engine.stream(prompt):
            if isinstance(event, Generation):
                reply = compose(question, scenario_type, urgency, event, max_tokens, self._engine)
            elif event.kind == "thinking" or not warning:
                shown += event.text if event.kind == "answer" else ""
                yield event.kind, event.text
        self.history.append(reply)
        rest = reply.answer.removeprefix(warning).strip()
        if warning and triage.WITHHELD not in reply.cautions and reply.raw_answer:
            yield "answer", (shown := reply.raw_answer)
        yield "closing", rest.removeprefix(shown.strip()).strip()

    def batch(
        self,
        rows: Iterable[Mapping[str, Any] | str | Request],
        scenario_type: str = DEFAULT_SCENARIO,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        *,
        answered: Answered | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Ask many questions, each by itself; yields output rows in input order, row by row.

        A row that can't be asked comes back with `error` and spoils no other. Rows are taken only as far ahead
        as the engine needs, so that any number of them takes constant memory.

        Args:
            rows: questions, or rows with `question` and optional `scenario`, `max_tokens`, `id`.
            scenario_type, max_tokens: for rows that don't say.
            answered: rows of earlier tries, which are not asked again.
        """
        check_scenario(scenario_type)
        in_flight: deque[Request] = deque()
        settings_of = functools.cache(self._settings_of)

        def prompts() -> Iterator[Prompt | dict[str, Any]]:
            """What is to be asked; rows that are ready or can't be asked pass through the engine in their places."""
            for number, row in enumerate(rows, 1):
                if not isinstance(row, Request):
                    row = parse_request(row, number, MEDICAL_SCENARIOS, scenario_type, max_tokens)
                row = dataclasses.replace(row, question=self._redacted(row.question))
                if row.scenario == AUTO and not row.error:
                    row = dataclasses.replace(row, scenario=suggest_scenario(row.question).scenario)
                in_flight.append(row)
                yield failed_row(row, row.error) if row.error else self._asked(row, answered, settings_of)

        self.load_model(for_batch=True)
        assert self._engine is not None
        for result in self._engine.generate(prompts()):
            row = in_flight.popleft()
            if isinstance(result, UserError):
                yield failed_row(row, str(result))
            elif isinstance(result, Generation):
                urgency = triage.assess(row.question)
                reply = compose(row.question, row.scenario, urgency, result, row.max_tokens, self._engine)
                yield {**reply.as_row(row.id), "settings": settings_of(row.scenario, row.max_tokens)}
            else:
                yield result

    def clear(self) -> None:
        """Start a new conversation."""
        self.history.clear()

    def take_back(self) -> AssistantReply | None:
        """Remove the last turn from the conversation and return it, to ask it again or otherwise."""
        return self.history.pop() if self.history else None

    def save_conversation(self, path: str | Path | None = None) -> Path:
        """Write the conversation as JSON, readable by its owner only (mode 0600).

        Args:
            path: where to; by default conversation_<time>.json in the current folder.
        """
        path = Path(path or f"conversation_{datetime.datetime.now():%Y%m%d_%H%M%S}.json")
        conversation.save(path, self.history)
        return path

    def load_conversation(self, path: str | Path) -> int:
        """Go on with a saved conversation in place of this one; returns how many turns it has.

        Raises:
            UserError: the file is missing, broken, or no saved conversation.
        """
        self.history = conversation.load(Path(path), MEDICAL_SCENARIOS)
        return len(self.history)

    def _redacted(self, question: str) -> str:
        return redact.redact(question).text if self.redact else question

    def _messages(
        self, question: str, scenario: str, max_tokens: int, system: str | None = None
    ) -> list[dict[str, str]]:
        """The prompt, with as many of the newest turns as leave room for the reply."""
        assert self._engine is not None
        if self._trained_prompts and not system:
            self._trained_prompts.warn_of(MEDICAL_PROMPTS[scenario], MEDICAL_SCENARIOS[scenario])
        messages, left_out = conversation.prompt_messages(
            question,
            system or MEDICAL_PROMPTS[scenario],
            self.history,
            self._engine,
            max_tokens,
            self.truncate_history,
        )
        if left_out:
            cli.note(f"（上下文已满，这次没有发送最早的 {left_out} 轮对话）")
        return messages

    def _asked(
        self, row: Request, answered: Answered | None, settings_of: Callable[[str, int], str]
    ) -> Prompt | dict[str, Any]:
        settings = settings_of(row.scenario, row.max_tokens)
        known = answered and answered.find(row.id, row.question, row.scenario, settings)
        if known:
            return known
        if self._trained_prompts:
            self._trained_prompts.warn_of(MEDICAL_PROMPTS[row.scenario], MEDICAL_SCENARIOS[row.scenario])
        messages = chat.user_messages(row.question, MEDICAL_PROMPTS[row.scenario])
        return Prompt(messages, row.max_tokens, self.settings.think_budget)

    def _settings_of(self, scenario: str, max_tokens: int) -> str:
        """What an answer depends on besides question and scenario; the scenario's prompt may be edited meanwhile."""
        assert self._engine is not None
        asked = [MEDICAL_PROMPTS[scenario], max_tokens, self.settings.think_budget, self.redact]
        return fingerprint([self._engine.fingerprint, *asked])


def suggest_scenario(question: str, before: str | None = None) -> scenarios.Suggestion:
    """The scenario among the ten that a question fits best, and why; deterministic, no model.

    Args:
        before: the scenario of the turn before, kept where the question itself has no clue.
    """
    found = scenarios.suggest(question, MEDICAL_SCENARIOS, before or DEFAULT_SCENARIO)
    return dataclasses.replace(found, reason="沿用上一题") if before and found.reason == scenarios.NO_CLUE else found


def check_question(question: object) -> str:
    """The question without blanks around it.

    Raises:
        UserError: it is no text, empty, or can't be encoded.
    """
    if not isinstance(question, str) or not question.strip():
        raise UserError("问题是空的", None, "请写出想问的内容")
    return files.check_encodable(question, "问题").strip()


def check_scenario(scenario: str) -> None:
    """Make sure that a scenario exists.

    Raises:
        UserError: it doesn't; the valid ones are listed.
    """
    if scenario not in MEDICAL_SCENARIOS and scenario != AUTO:
        valid = "、".join(f"{id_}（{name}）" for id_, name in MEDICAL_SCENARIOS.items())
        raise UserError(f"未知场景 {scenario}", None, f"可选：{valid}、auto（自动选择）")


def main() -> int:
    """The command line."""
    args = parse_args()
    if args.scenario:
        check_scenario(args.scenario)
    if args.question == "-":
        args.question = cli.read_stdin("问题")
    if args.question is not None:
        check_question(args.question)
    scenario = args.scenario or DEFAULT_SCENARIO
    requests: Any = Requests(args.batch, MEDICAL_SCENARIOS, scenario, args.max_tokens) if args.batch else []
    if args.triage:
        return commands.classify(
            requests or [Request(1, args.question.strip(), scenario, args.max_tokens)], args.output, args.redact
        )
    settings = cli.given(args, EngineSettings)
    assistant = MedicalAssistant(
        settings.pop("checkpoint", "best"), redact=args.redact, truncate_history=args.truncate_history, **settings
    )
    if args.load:
        cli.note(f"已载入 {assistant.load_conversation(args.load)} 轮对话")
    if args.batch:
        names = None if args.output or args.json else MEDICAL_SCENARIOS
        return commands.answer_batch(assistant, requests, args.output, resume=args.resume, names=names)
    if args.question is not None:
        return commands.answer_one(assistant, args.question, scenario, args)
    return commands.converse(assistant, MEDICAL_SCENARIOS, SAMPLE_QUESTIONS, args)


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = cli.build_parser("medical_assistant.py", __doc__)
    ask = parser.add_argument_group("提问（都不给时进入交互模式）")
    ask.add_argument("-q", "--question", metavar="TEXT", help="问一个问题；- 从标准输入读取，命令行里就看不到它")
    ask.add_argument("-b", "--batch", type=Path, metavar="FILE", help="批量：JSONL、CSV 或 JSON 列表（大文件用前两种）")
    ask.add_argument("-o", "--output", type=Path, metavar="FILE.jsonl", help="批量结果写到哪里（默认标准输出）")
    ask.add_argument("--resume", action="store_true", help="接着做中断的批量：答过的行不再问")
    listed = "、".join(f"{id_} {name}" for id_, name in MEDICAL_SCENARIOS.items())
    ask.add_argument(
        "-s", "--scenario", metavar="ID", help=f"场景（默认 {DEFAULT_SCENARIO}）：{listed}；auto 按问题自动选择"
    )
    ask.add_argument(
        "--triage", action="store_true", help="只判断紧急程度（与 -q 或 -b 一起用），不载入模型，每题输出一行 JSON"
    )
    ask.add_argument(
        "--redact",
        action="store_true",
        help="遮住问题里的手机号、固定电话、身份证号和邮箱；模型和保存的文件只见到遮住的",
    )
    reply = parser.add_argument_group("回答与对话")
    reply.add_argument(
        "-m", "--max-tokens", type=cli.positive_int, default=DEFAULT_MAX_TOKENS, metavar="N", help="最多生成的 token 数"
    )
    reply.add_argument(
        "--think", choices=("show", "hide", "summary"), default="show", help="思考：显示、隐藏，或只显示长短"
    )
    reply.add_argument("--json", action="store_true", help="以 JSON 输出，每行一个结果")
    reply.add_argument("--load", type=Path, metavar="FILE", help="接着以前保存的对话")
    reply.add_argument(
        "--save-history",
        nargs="?",
        const="",
        metavar="FILE",
        help="结束时保存对话（默认 conversation_时间.json，仅自己可读）",
    )
    reply.add_argument(
        "--truncate-history",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="上下文满了就从最早的一轮起不再发送（默认）；--no- 则报错",
    )
    cli.add_settings(parser, EngineSettings)
    args = parser.parse_args()
    if args.batch and args.question is not None:
        parser.error("-q 和 -b 不能同时使用")
    if args.output and not args.batch:
        parser.error("-o 只用于批量（-b）")
    if args.output and args.output.exists() and args.batch.exists() and args.output.samefile(args.batch):
        parser.error("-o 是问题文件自己，会被结果覆盖；请换一个文件名")
    if args.resume and not args.output:
        parser.error("--resume 只用于写到文件的批量（-b 和 -o）")
    if args.triage and not args.batch and args.question is None:
        parser.error("--triage 需要 -q 或 -b")
    if args.triage and args.resume:
        parser.error("--triage 和 --resume 不能同时使用；接着做中断的批量请去掉 --triage")
    return args


if __name__ == "__main__":
    cli.run(main)
