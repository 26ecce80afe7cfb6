"""阶段 4：医疗助手——命令行、交互对话、批量和 Python 类。

    python medical_assistant.py                                   # 交互模式，菜单选择场景
    python medical_assistant.py -q "头痛三天了怎么办？" -s diagnosis
    python medical_assistant.py -b sample_questions.json -o answers.jsonl

    from medical_assistant import MedicalAssistant
    assistant = MedicalAssistant(checkpoint_path="best")
    print(assistant.ask_question("头痛三天了怎么办？", scenario_type="diagnosis"))

场景、提示词和示例问题都在 prompts.py 里。思考与回答分开显示，每条回答都以免责声明结束。
"""

import argparse
import contextlib
import dataclasses
import datetime
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompts import MEDICAL_PROMPTS, MEDICAL_SCENARIOS, SAMPLE_QUESTIONS
from qwenmed import cli, controls, files, redact, triage
from qwenmed.answers import AssistantReply, compose, failed_row
from qwenmed.batch import Request, parse_request, read_requests
from qwenmed.errors import UserError

if TYPE_CHECKING:
    pass

DEFAULT_MAX_TOKENS = 2048
# Rows that are sorted by length and generated together; small enough that results come while one waits.
BATCH_WINDOW = 32


class MedicalAssistant:
    """A conversation with a fine-tuned model under one of the medical scenarios.

    Each `ask_question` continues the conversation; `clear` starts a new one – do so for another patient.
    `batch` asks every row by itself.

    Args:
        checkpoint_path: a checkpoint or model folder, "best" or "latest".
        base_model: where a LoRA adapter's base model lies now, if it has moved.
        device: "auto", "cuda", "mps" or "cpu".
        seed: fixes sampling.
        redact: mask phone, identity-card and e-mail in questions, for the model and for what is saved.

    Attributes:
        last_reply: the newest AssistantReply, thinking included; None before the first.
        history: all replies of this conversation.
    """

    def __init__(
        self,
        checkpoint_path: str | Path = "best",
        *,
        base_model: str | Path | None = None,
        device: str = "auto",
        seed: int | None = None,
        redact: bool = False,
    ) -> None:
        self.checkpoint_path = str(checkpoint_path)
        self.base_model = Path(base_model) if base_model else None
        self.device = device
        self.seed = seed
        self.redact = redact
        self.history: list[AssistantReply] = []
        self.last_reply: AssistantReply | None = None
        self._engine = None
        self._checkpoint = None

    def load_model(self) -> "MedicalAssistant":
        """Find and load the checkpoint; does nothing if that has been done.

        Raises:
            UserError: the checkpoint or device is not there or not usable.
        """
        if self._engine is None:
            from qwenmed import checkpoints, hardware

            self._checkpoint = checkpoints.find(self.checkpoint_path, base_model=self.base_model)
            device = hardware.pick_device(self.device)
            cli.note(f"正在载入：{self._checkpoint.kind} {self._checkpoint.path}（{device.type}）")
            from qwenmed.engine import TransformersEngine

            model, tokenizer = checkpoints.load(self._checkpoint, hardware.inference_dtype(device))
            self._engine = TransformersEngine(model.to(device), tokenizer, seed=self.seed)
        return self

    def ask_question(
        self, question: str, scenario_type: str = "diagnosis", max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> str:
        """Ask, and return the answer with its disclaimer; the thinking is in `last_reply`.

        Raises:
            UserError: an empty or over-long question, an unknown scenario, or no usable model.
        """
        for _ in self.stream(question, scenario_type, max_tokens):
            pass
        return self.last_reply.answer

    def stream(
        self, question: str, scenario_type: str = "diagnosis", max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> Iterator[tuple[str, str]]:
        """Ask, and yield ("emergency" | "thinking" | "answer" | "closing", piece) pairs as they come.

        In an emergency its fixed text comes at once, before the model is even loaded, and the model's answer
        only when it is whole and has been checked. The reply joins the conversation when it is complete; an abandoned one leaves no trace.

        Raises:
            UserError: as `ask_question`.
        """
        question = self._redacted(check_question(question))
        check_scenario(scenario_type)
        if max_tokens < 1:
            raise UserError(f"max_tokens 应为正整数，而不是 {max_tokens}")
        before = self.last_reply if self.last_reply and self.last_reply.urgency != triage.EMERGENCY else None
        urgency = triage.assess_conversation(question, before.question if before else None)
        if warning := triage.emergency_text(urgency):
            yield "emergency", warning
        self.load_model()
        from qwenmed.engine import Generation

        shown = ""
        for event in self._engine.stream(self._messages(question, scenario_type, max_tokens), max_tokens):
            if isinstance(event, Generation):
                reply = compose(question, scenario_type, urgency, event, max_tokens, self._checkpoint)
            elif event.kind == "thinking" or not warning:
                shown += event.text if event.kind == "answer" else ""
                yield event.kind, event.text
        self.last_reply = reply
        self.history.append(reply)
        rest = reply.answer.removeprefix(warning).strip()
        if warning and triage.WITHHELD not in reply.cautions and reply.raw_answer:
            yield "answer", (shown := reply.raw_answer)
        yield "closing", rest.removeprefix(shown.strip()).strip()

    def batch(
        self,
        rows: Iterable[Mapping[str, Any] | str | Request],
        scenario_type: str = "diagnosis",
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> Iterator[dict[str, Any]]:
        """Ask many questions, each by itself, in padded batches; yields output rows in input order.

        A row that can't be asked comes back with `error` and spoils no other.

        Args:
            rows: questions, or rows with `question` and optional `scenario`, `max_tokens`, `id`.
            scenario_type, max_tokens: for rows that don't say.
        """
        check_scenario(scenario_type)
        window: list[Request] = []
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Request):
                row = parse_request(row, number, MEDICAL_SCENARIOS, scenario_type, max_tokens)
            window.append(dataclasses.replace(row, question=self._redacted(row.question)))
            if len(window) == BATCH_WINDOW:
                yield from self._answer_window(window)
                window = []
        if window:
            yield from self._answer_window(window)

    def clear(self) -> None:
        """Start a new conversation."""
        self.history.clear()
        self.last_reply = None

    def save_conversation(self, path: str | Path | None = None) -> Path:
        """Write the conversation as JSON, readable by its owner only (mode 0600).

        Args:
            path: where to; by default conversation_<time>.json in the current folder.
        """
        path = Path(path or f"conversation_{datetime.datetime.now():%Y%m%d_%H%M%S}.json")
        conversation = {"disclaimer": triage.DISCLAIMER, "turns": [reply.as_row() for reply in self.history]}
        files.write_json(path, conversation, private=True)
        return path

    def _redacted(self, question: str) -> str:
        return redact.redact(question).text if self.redact else question

    def _messages(self, question: str, scenario: str, max_tokens: int) -> list[dict[str, str]]:
        """The prompt, with as many of the newest turns as leave room for the reply."""
        from qwenmed import chat

        turns = [
            [{"role": "user", "content": reply.question}, {"role": "assistant", "content": reply.said}]
            for reply in self.history
            if reply.said
        ]
        while True:
            earlier = [message for turn in turns for message in turn]
            messages = chat.user_messages(question, MEDICAL_PROMPTS[scenario], earlier)
            if not turns or self._engine.count_tokens(messages) + max_tokens <= self._engine.context_length:
                return messages
            turns.pop(0)

    def _answer_window(self, requests: list[Request]) -> Iterator[dict[str, Any]]:
        from qwenmed import chat

        if any(request.error is None for request in requests):
            self.load_model()
        prompts, errors = {}, {i: request.error for i, request in enumerate(requests) if request.error}
        for i, request in enumerate(requests):
            if i not in errors:
                prompts[i] = chat.user_messages(request.question, MEDICAL_PROMPTS[request.scenario])
        for i, prompt in prompts.items():
            if (tokens := self._engine.count_tokens(prompt)) >= self._engine.context_length:
                errors[i] = f"问题太长：{tokens} 个 token，上下文只有 {self._engine.context_length}"
        asked = [i for i in prompts if i not in errors]
        generated = self._engine.generate([(prompts[i], requests[i].max_tokens) for i in asked]) if asked else []
        replies = dict(zip(asked, generated, strict=True))
        for i, request in enumerate(requests):
            if i in errors:
                yield failed_row(request, errors[i])
                continue
            question, urgency = request.question, triage.assess(request.question)
            reply = compose(question, request.scenario, urgency, replies[i], request.max_tokens, self._checkpoint)
            yield reply.as_row(request.id)


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
    if scenario not in MEDICAL_SCENARIOS:
        valid = "、".join(f"{id_}（{name}）" for id_, name in MEDICAL_SCENARIOS.items())
        raise UserError(f"未知场景 {scenario}", None, f"可选：{valid}")


def main() -> int:
    """The command line."""
    args = parse_args()
    if args.scenario:
        check_scenario(args.scenario)
    if args.question == "-":
        args.question = cli.read_stdin("问题")
    if args.question is not None:
        check_question(args.question)
    if args.triage:
        return classify(args)
    assistant = MedicalAssistant(
        args.checkpoint, base_model=args.base_model, device=args.device, seed=args.seed, redact=args.redact
    )
    if args.batch:
        return answer_batch(assistant, args)
    if args.question is not None:
        return answer_one(assistant, args)
    return converse(assistant, args)


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = cli.build_parser("medical_assistant.py", __doc__)
    ask = parser.add_argument_group("提问（都不给时进入交互模式）")
    ask.add_argument("-q", "--question", metavar="TEXT", help="问一个问题；- 从标准输入读取，命令行里就看不到它")
    ask.add_argument("-b", "--batch", type=Path, metavar="FILE", help="批量：JSON 列表、JSONL 或 CSV")
    ask.add_argument("-o", "--output", type=Path, metavar="FILE.jsonl", help="批量结果写到哪里（默认标准输出）")
    scenarios = "、".join(f"{id_} {name}" for id_, name in MEDICAL_SCENARIOS.items())
    ask.add_argument("-s", "--scenario", metavar="ID", help=f"场景（默认 diagnosis）：{scenarios}")
    ask.add_argument(
        "--triage", action="store_true", help="只判断紧急程度（与 -q 或 -b 一起用），不载入模型，每题输出一行 JSON"
    )
    ask.add_argument(
        "--redact",
        action="store_true",
        help="遮住问题里的手机号、固定电话、身份证号和邮箱；模型和保存的文件只见到遮住的",
    )
    model = parser.add_argument_group("模型")
    model.add_argument(
        "-c", "--checkpoint", default="best", metavar="DIR|latest|best", help="检查点；best、latest 取最近一次训练的"
    )
    model.add_argument("--base-model", type=Path, metavar="DIR", help="LoRA 的基础模型现在的目录")
    model.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="设备")
    reply = parser.add_argument_group("回答")
    reply.add_argument(
        "-m", "--max-tokens", type=cli.positive_int, default=DEFAULT_MAX_TOKENS, metavar="N", help="最多生成的 token 数"
    )
    reply.add_argument("--seed", type=int, metavar="N", help="固定采样，使结果可以重复")
    reply.add_argument("--json", action="store_true", help="以 JSON 输出，每行一个结果")
    reply.add_argument(
        "--save-history",
        nargs="?",
        const="",
        metavar="FILE",
        help="结束时保存对话（默认 conversation_时间.json，仅自己可读）",
    )
    args = parser.parse_args()
    if args.batch and args.question is not None:
        parser.error("-q 和 -b 不能同时使用")
    if args.output and not args.batch:
        parser.error("-o 只用于批量（-b）")
    if args.triage and not args.batch and args.question is None:
        parser.error("--triage 需要 -q 或 -b")
    return args


def classify(args: argparse.Namespace) -> int:
    """`--triage`: how urgent each question is, by the rules alone; exit status 3 if a row can't be read."""
    if args.question is not None:
        requests = [Request(1, check_question(args.question), "diagnosis", args.max_tokens)]
    else:
        requests = read_requests(args.batch, MEDICAL_SCENARIOS, args.scenario or "diagnosis", args.max_tokens)
    with files.growing_file(args.output) if args.output else contextlib.nullcontext(sys.stdout) as out:
        for request in requests:
            urgency = triage.assess(request.question)
            row = {"question": request.question, "urgency": urgency.level, "reasons": urgency.reasons}
            print(controls.json_line({**row, "error": request.error} if request.error else row), file=out)
    return cli.EXIT_SOME_ROWS_FAILED if any(request.error for request in requests) else cli.EXIT_OK


def answer_one(assistant: MedicalAssistant, args: argparse.Namespace) -> int:
    """`-q`: one question."""
    pieces = assistant.stream(args.question, args.scenario or "diagnosis", args.max_tokens)
    if args.json:
        for _ in pieces:
            pass
        print(controls.json_line(assistant.last_reply.as_row()))
    else:
        from qwenmed import terminal

        terminal.print_reply(pieces)
        warn_if_cut(assistant.last_reply, args.max_tokens)
    save_history(assistant, args)
    return cli.EXIT_OK


def answer_batch(assistant: MedicalAssistant, args: argparse.Namespace) -> int:
    """`-b`: a file of questions; exit status 3 if any row failed."""
    from qwenmed import terminal

    requests = read_requests(args.batch, MEDICAL_SCENARIOS, args.scenario or "diagnosis", args.max_tokens)
    if args.output:
        files.check_writable(args.output.parent)
    assistant.load_model()
    failed = 0
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(terminal.batch_progress(len(requests)))
        out = stack.enter_context(files.growing_file(args.output)) if args.output else sys.stdout
        as_line = controls.json_line if args.output or args.json else terminal.batch_row_as_text(MEDICAL_SCENARIOS)
        for row in assistant.batch(requests):
            failed += "error" in row
            print(as_line(row), file=out, flush=True)
            progress.update()
    if args.output:
        cli.note(f"已写入 {args.output}")
    cli.note(f"完成 {len(requests) - failed} 题，失败 {failed} 题")
    return cli.EXIT_SOME_ROWS_FAILED if failed else cli.EXIT_OK


def converse(assistant: MedicalAssistant, args: argparse.Namespace) -> int:
    """The interactive mode."""
    from qwenmed import terminal

    assistant.load_model()

    def ask(question: str, scenario: str) -> Iterator[tuple[str, str]]:
        yield from assistant.stream(question, scenario, args.max_tokens)
        warn_if_cut(assistant.last_reply, args.max_tokens)

    session = terminal.Session(
        MEDICAL_SCENARIOS, SAMPLE_QUESTIONS, ask, assistant.clear, assistant.save_conversation, args.scenario
    )
    try:
        session.run()
    finally:
        save_history(assistant, args)
    return cli.EXIT_OK


def warn_if_cut(reply: AssistantReply, max_tokens: int) -> None:
    """Say when the token limit has cut an answer off."""
    if reply.finish_reason == "length" and reply.raw_answer:
        cli.note(f"（到达 {max_tokens} 个 token 的上限，回答不完整；可用 -m 增大）")


def save_history(assistant: MedicalAssistant, args: argparse.Namespace) -> None:
    """`--save-history`: keep the conversation, only where asked for."""
    if args.save_history is not None and assistant.history:
        cli.note(f"对话已保存：{assistant.save_conversation(args.save_history or None)}")


if __name__ == "__main__":
    cli.run(main)
