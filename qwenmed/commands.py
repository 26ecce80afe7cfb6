"""What the assistant's command line does: classify, answer one, answer a batch, converse."""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from qwenmed import cli, controls, files, redact, terminal, triage
from qwenmed.answers import AssistantReply
from qwenmed.batch import Request, Requests, check_results_path, results_file
from qwenmed.errors import UserError


def classify(requests: Iterable[Request], output: Path | None, masked: bool = False) -> int:
    """`--triage`: how urgent each question is, by rules and points, without a model; exit status 3 if a row can't be read.

    Args:
        output: results as JSONL; None for stdout.
        masked: whether phone, identity-card and e-mail are masked in what is judged and written.

    Raises:
        UserError: the results can't be written there.
    """
    failed = 0
    if output:
        check_results_path(output)
    with files.whole_file(output) if output else contextlib.nullcontext(sys.stdout) as out:
        for request in requests:
            question = redact.redact(request.question).text if masked else request.question
            urgency = triage.assess(question)
            failed += request.error is not None
            row = {"question": question, "urgency": urgency.level, "reasons": urgency.reasons}
            out.write(controls.json_line({**row, "error": request.error} if request.error else row) + "\n")
    return cli.EXIT_SOME_ROWS_FAILED if failed else cli.EXIT_OK


def answer_one(assistant: terminal.Assistant, question: str, scenario: str, args: argparse.Namespace) -> int:
    """`-q`: one question, streamed, or as one line of JSON."""
    pieces = assistant.stream(question, scenario, args.max_tokens)
    if args.json:
        for _ in pieces:
            pass
        sys.stdout.write(controls.json_line(assistant.history[-1].as_row()) + "\n")
    else:
        terminal.print_reply(pieces, args.think)
        warn_if_cut(assistant.history[-1], args.max_tokens)
    _save_history(assistant, args.save_history)
    return cli.EXIT_OK


def answer_batch(
    assistant: terminal.Assistant,
    requests: Requests,
    output: Path | None,
    *,
    resume: bool = False,
    names: Mapping[str, str] | None = None,
) -> int:
    """`-b`: a file of questions; exit status 3 if any row failed.

    Args:
        output: results as JSONL; None for stdout.
        resume: don't ask again what an earlier try has answered.
        names: scenario id → name, to show the rows to a reader; None for JSON.

    Raises:
        UserError: the results can't be written there, or some rows came back without one.
    """
    written = failed = 0
    with contextlib.ExitStack() as stack:
        out, answered = sys.stdout, None
        if output:
            files.check_writable(output.parent)
            out, answered = stack.enter_context(results_file(output, resume))
        if answered:
            cli.note(f"以前答过 {len(answered)} 题，问题和设置都相同的不再问")
        assistant.load_model(for_batch=True)
        progress = stack.enter_context(terminal.batch_progress(len(requests)))
        as_line = terminal.batch_row_as_text(names) if names else controls.json_line
        try:
            for row in assistant.batch(requests, answered=answered):
                written, failed = written + 1, failed + ("error" in row)
                out.write(as_line(row) + "\n")
                out.flush()
                progress.update()
            _check_complete(written, len(requests), output)
        except BaseException:
            if output:
                progress.close()
                cli.note(f"中断前写好 {written} 题，在 {output}.partial；加上 --resume 接着做")
            raise
    if output:
        cli.note(f"已写入 {output}")
    cli.note(f"完成 {len(requests) - failed} 题，失败 {failed} 题")
    return cli.EXIT_SOME_ROWS_FAILED if failed else cli.EXIT_OK


def _check_complete(written: int, asked: int, output: Path | None) -> None:
    if written != asked:
        remedy = "加上 --resume 接着做" if output else "请再试一次，并用 -o 写到文件"
        raise UserError(f"问了 {asked} 题，只得到 {written} 题的结果", output, remedy)


def converse(
    assistant: terminal.Assistant,
    scenarios: Mapping[str, str],
    samples: Mapping[str, Sequence[str]],
    args: argparse.Namespace,
) -> int:
    """The interactive mode."""
    assistant.load_model()

    def ask(question: str, scenario: str) -> Iterator[tuple[str, str]]:
        yield from assistant.stream(question, scenario, args.max_tokens)
        warn_if_cut(assistant.history[-1], args.max_tokens)

    session = terminal.Session(assistant, ask, scenarios, samples, args.scenario, args.think)
    try:
        session.run()
    finally:
        _save_history(assistant, args.save_history)
    return cli.EXIT_OK


def warn_if_cut(reply: AssistantReply, max_tokens: int) -> None:
    """Say when an answer did not end by itself."""
    if reply.finish_reason == "length" and reply.raw_answer:
        cli.note(f"（到达 {max_tokens} 个 token 的上限，回答不完整；可用 -m 增大）")
    elif reply.finish_reason == "repetition":
        cli.note("（回答开始原地重复，已停止；可换一种问法，或提高 --temperature）")


def _save_history(assistant: terminal.Assistant, wanted: str | None) -> None:
    """`--save-history`: keep the conversation, only where asked for."""
    if wanted is not None and assistant.history:
        cli.note(f"对话已保存：{assistant.save_conversation(wanted or None)}")
