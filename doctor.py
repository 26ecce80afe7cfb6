"""训练之前的体检：在花掉一小时 GPU 之前，找出会让训练白做的毛病。

    python doctor.py                                 # 机器、模型、train.jsonl、两步训练
    python doctor.py --model demo --method full
    python doctor.py --train-file my.jsonl --val-file my_val.jsonl --max-length 1024
    python doctor.py --offline --no-steps            # 不连网，不训练，几秒钟
    python doctor.py --json                          # 给程序读

检查版本、GPU 与驱动、内存和磁盘、模型来源、分词器与对话模板、数据、SwanLab；把一条样本解码出来，
标出哪些 token 参加训练；估算显存；真的训练两步（不留下任何东西）。
最后一张表：✓ 正常，! 能用但要知道，✗ 必须先解决，每一项都写着怎么办。有 ✗ 时退出码为 1，否则为 0。
"""

import argparse
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS
from qwenmed import checkup, checkup_machine, cli
from qwenmed.checkup_training import Sample, TrainingCheckup
from qwenmed.controls import printable
from qwenmed.settings import LoraSettings, TrainSettings

EXIT_ILL = 1
DIM, TRAINED, ALSO_TRAINED, END = "\x1b[2m", "\x1b[30;42m", "\x1b[30;102m", "\x1b[0m"


def main() -> int:
    """Examine, show the sample, show the table."""
    args = parse_args()
    kind = LoraSettings if args.method == "lora" else TrainSettings
    settings = kind(
        model=args.model,
        train_file=args.train_file,
        val_file=args.val_file,
        max_length=args.max_length,
        device=args.device,
    )
    patient = TrainingCheckup(settings, GENERAL_PROMPT, MEDICAL_PROMPTS)
    findings = list(checkup.examine(checks(patient, args), begun))
    if args.json:
        sample = patient.sample and {"place": patient.sample.place, "parts": patient.sample.parts}
        print(json.dumps(checkup.as_json(findings, sample=sample), ensure_ascii=False, indent=2))
    else:
        colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        if patient.sample:
            print(show(patient.sample, colours))
        table = printable(checkup.as_text(findings, shutil.get_terminal_size((100, 24)).columns))
        print(paint(table) if colours else table)
    return cli.EXIT_OK if checkup.is_well(findings) else EXIT_ILL


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = cli.build_parser("doctor.py", __doc__)
    training = parser.add_argument_group("要做的训练")
    training.add_argument("--model", default="Qwen/Qwen3-0.6B", metavar="MODEL", help="模型 ID、本地目录，或 demo")
    training.add_argument("--method", choices=("lora", "full"), default="lora", help="train_lora.py 还是 train.py")
    training.add_argument("--train-file", default="train.jsonl", metavar="FILE", help="训练数据")
    training.add_argument("--val-file", default="val.jsonl", metavar="FILE", help="验证数据")
    training.add_argument("--max-length", type=int, default=2048, metavar="N", help="一条样本的最大 token 数")
    training.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="设备")
    extent = parser.add_argument_group("检查到什么程度")
    extent.add_argument("--offline", action="store_true", help="不试模型来源的网络")
    extent.add_argument("--no-steps", action="store_true", help="不做两步训练")
    extent.add_argument("--json", action="store_true", help="结果写成一个 JSON 对象")
    return parser.parse_args()


def checks(patient: TrainingCheckup, args: argparse.Namespace) -> list[tuple[str, checkup.Check]]:
    """What is looked at, in order."""
    return [
        ("环境", checkup_machine.environment),
        ("GPU", checkup_machine.gpu),
        ("内存与磁盘", partial(checkup_machine.room, Path())),
        *([] if args.offline else [("模型来源", partial(checkup_machine.hubs, patient.needs_hub))]),
        ("模型", patient.model),
        ("分词器", patient.tokenizer),
        ("对话模板", patient.template),
        ("数据", patient.data),
        ("样本", patient.mask),
        ("显存计划", patient.memory),
        *([] if args.no_steps else [("两步训练", patient.steps)]),
        ("SwanLab", checkup_machine.swanlab),
    ]


def begun(name: str) -> None:
    """Say what is being looked at."""
    cli.note(f"检查：{name} …")


def paint(table: str) -> str:
    """The table with its marks in colours."""
    colours = {checkup.GOOD: "\x1b[32m", checkup.MIND: "\x1b[33m", checkup.BAD: "\x1b[31m"}
    lines = table.split("\n")
    return "\n".join(f"{colours[line[0]]}{line[0]}{END}{line[1:]}" if line[:1] in colours else line for line in lines)


def show(sample: Sample, colours: bool) -> str:
    """The sample with its trained part marked: green on a terminal, in brackets elsewhere."""
    lines = [f"一条样本（{sample.place}）："]
    if colours:
        legend = f"{DIM}提示（不算损失）{END} {TRAINED}参加{END}{ALSO_TRAINED}训练{END}（两种绿色隔开相邻的 token）"
        prompt = "".join(f"{DIM}{printable(text)}{END}" for text, trained in sample.parts if not trained)
        shades = (TRAINED, ALSO_TRAINED)
        body = "".join(
            f"{shades[number % 2]}{printable(token).replace(chr(10), f'↵{END}{chr(10)}{shades[number % 2]}')}{END}"
            for number, token in enumerate(sample.tokens)
        )
        lines += [legend, prompt + body]
    else:
        lines += ["⟦…⟧ 里的参加训练，其余是提示，不算损失"]
        lines += ["".join(f"⟦{printable(text)}⟧" if trained else printable(text) for text, trained in sample.parts)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
