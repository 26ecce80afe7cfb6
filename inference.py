"""阶段 3：用任意模型回答一个问题。

    python inference.py "高血压患者饮食要注意什么？"
    echo "孩子发热怎么办？" | python inference.py -c best
    python inference.py -c output/Qwen3-0.6B-lora/checkpoint-500 "问题"      # LoRA 适配器，自动识别
    python inference.py -c Qwen3-0.6B的目录 "问题"                          # 没有微调过的基础模型

基础模型、全参数检查点和 LoRA 适配器由目录内容自动区分；基础模型搬过家时用 --base-model 指出新位置。
"""

import sys
import time
from pathlib import Path

from prompts import GENERAL_PROMPT
from qwenmed import chat, checkpoints, cli, controls, files, hardware, triage
from qwenmed.errors import UserError


def main() -> None:
    """Find the checkpoint, load it, answer."""
    args = parse_args()
    question = read_question(args.question)
    if (warning := triage.emergency_text(triage.assess(question))) and not args.json:
        print(f"{warning}\n", flush=True)
    files.check_encodable(args.system, "--system ")
    checkpoint = checkpoints.find(args.checkpoint, base_model=args.base_model)
    device = hardware.pick_device(args.device)
    cli.note(f"正在载入：{checkpoint.kind} {checkpoint.path}")
    engine = load_engine(checkpoint, device, args.seed)
    answer(engine, checkpoint, question, args)


def parse_args():
    """The command line."""
    parser = cli.build_parser("inference.py", __doc__, "[问题] [选项]")
    parser.general.add_argument(
        "question", nargs="?", metavar="QUESTION", help="问题；- 或不给时从管道读取，或当场询问"
    )
    model = parser.add_argument_group("模型")
    model.add_argument(
        "-c",
        "--checkpoint",
        default="best",
        metavar="DIR|latest|best",
        help="检查点或模型目录；best、latest 取最近一次训练的最佳、最新检查点",
    )
    model.add_argument("--base-model", type=Path, metavar="DIR", help="LoRA 的基础模型现在的目录")
    model.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="设备")
    reply = parser.add_argument_group("回答")
    reply.add_argument("--system", default=GENERAL_PROMPT, metavar="TEXT", help="系统提示词")
    reply.add_argument(
        "-m", "--max-tokens", type=cli.positive_int, default=2048, metavar="N", help="最多生成的 token 数"
    )
    reply.add_argument("--seed", type=int, metavar="N", help="固定采样，使结果可以重复")
    reply.add_argument("--json", action="store_true", help="以 JSON 输出结果")
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


def load_engine(checkpoint: checkpoints.Checkpoint, device, seed: int | None):
    """Load the model and put it behind a generating engine."""
    from qwenmed.engine import TransformersEngine

    model, tokenizer = checkpoints.load(checkpoint, hardware.inference_dtype(device))
    return TransformersEngine(model.to(device), tokenizer, seed=seed)


def answer(engine, checkpoint: checkpoints.Checkpoint, question: str, args) -> None:
    """Print thinking and answer as they come, or the finished reply as JSON."""
    from qwenmed.engine import Chunk

    started = time.perf_counter()
    shown = None
    for event in engine.stream(chat.user_messages(question, args.system), args.max_tokens):
        if isinstance(event, Chunk) and not args.json:
            if event.kind != shown:
                print({"thinking": "【思考】", "answer": "\n\n【回答】" if shown else "【回答】"}[event.kind])
                shown = event.kind
            print(controls.printable(event.text), end="", flush=True)
    if args.json:
        print(controls.json_line(as_json(question, event, checkpoint, time.perf_counter() - started)))
        return
    print()
    if event.finish_reason == "length":
        cli.note(f"（到达 {args.max_tokens} 个 token 的上限，回答不完整；可用 -m 增大）")
    if checkpoint.notice:
        print(f"\n{checkpoint.notice}")


def as_json(question: str, generation, checkpoint: checkpoints.Checkpoint, seconds: float) -> dict:
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
        "model": str(checkpoint.path),
        **({"notice": checkpoint.notice} if checkpoint.notice else {}),
    }


if __name__ == "__main__":
    cli.run(main)
