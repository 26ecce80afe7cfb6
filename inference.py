"""阶段 3：用任意模型回答一个问题。

    python inference.py "高血压患者饮食要注意什么？"
    echo "孩子发热怎么办？" | python inference.py -c best                     # PowerShell：见 README 的常见问题
    python inference.py -c output/Qwen3-0.6B-lora/checkpoint-500 "问题"      # LoRA 适配器，自动识别
    python inference.py -c Qwen3-0.6B的目录 "问题"                          # 没有微调过的基础模型

基础模型、全参数检查点和 LoRA 适配器由目录内容自动区分；基础模型搬过家时用 --base-model 指出新位置。
"""

import argparse
import sys
import time

from prompts import GENERAL_PROMPT
from qwenmed import chat, cli, controls, engines, files, triage
from qwenmed.engine import Chunk, Engine, Generation, Prompt
from qwenmed.engines import EngineSettings
from qwenmed.errors import UserError


def main() -> None:
    """Find the model, load it, answer."""
    args = parse_args()
    question = read_question(args.question)
    if (warning := triage.emergency_text(triage.assess(question))) and not args.json:
        print(f"{warning}\n", flush=True)
    files.check_encodable(args.system, "--system ")
    settings = EngineSettings(**cli.given(args, EngineSettings))
    engine = engines.open_engine(settings)
    prompt = Prompt(chat.user_messages(question, args.system), args.max_tokens, settings.think_budget)
    answer(engine, prompt, question, args.json)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = cli.build_parser("inference.py", __doc__, "[问题] [选项]")
    parser.general.add_argument(
        "question", nargs="?", metavar="QUESTION", help="问题；- 或不给时从管道读取，或当场询问"
    )
    reply = parser.add_argument_group("回答")
    reply.add_argument("--system", default=GENERAL_PROMPT, metavar="TEXT", help="系统提示词")
    reply.add_argument(
        "-m", "--max-tokens", type=cli.positive_int, default=2048, metavar="N", help="最多生成的 token 数"
    )
    reply.add_argument("--json", action="store_true", help="以 JSON 输出结果")
    cli.add_settings(parser, EngineSettings)
    return parser.parse_args()


def read_question(given: str | None) -> str:
    """The question from the command line, a pipe, or a prompt.

    Raises:
        UserError: it is empty, or can't be encoded.
    """
    question = given
    if question == "-" or (question is None and sys.stdin is not None and not sys.stdin.isatty()):
        question = cli.read_stdin("问题")
    elif question is None:
        print("请输入问题：", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline() if sys.stdin else ""
    if not question or not question.strip():
        raise UserError("问题是空的", None, '例如 python inference.py "高血压患者饮食要注意什么？"')
    return files.check_encodable(question, "问题").strip()


def answer(engine: Engine, prompt: Prompt, question: str, as_json: bool) -> None:
    """Print thinking and answer as they come, or the finished reply as JSON."""
    started = time.perf_counter()
    shown = None
    for event in engine.stream(prompt):
        if isinstance(event, Chunk) and not as_json:
            if event.kind != shown:
                print({"thinking": "【思考】", "answer": "\n\n【回答】" if shown else "【回答】"}[event.kind])
                shown = event.kind
            print(controls.printable(event.text), end="", flush=True)
    assert isinstance(event, Generation)  # an engine's last
    if as_json:
        print(controls.json_line(reply_row(question, event, engine, time.perf_counter() - started)))
        return
    print()
    if event.finish_reason == "length":
        cli.note(f"（到达 {prompt.max_tokens} 个 token 的上限，回答不完整；可用 -m 增大）")
    elif event.finish_reason == "repetition":
        cli.note("（回答开始原地重复，已停止）")
    if engine.notice:
        print(f"\n{engine.notice}")


def reply_row(question: str, generation: Generation, engine: Engine, seconds: float) -> dict:
    """One reply as a JSON object."""
    return {
        "question": question,
        "urgency": triage.assess(question).level,
        "thinking": generation.reply.thinking,
        "answer": generation.reply.answer,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "thinking_tokens": generation.thinking_tokens,
        "answer_tokens": generation.answer_tokens,
        "seconds": round(seconds, 3),
        "model": engine.name,
        **({"notice": engine.notice} if engine.notice else {}),
    }


if __name__ == "__main__":
    cli.run(main)
