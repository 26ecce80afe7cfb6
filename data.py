"""阶段 1：取得、检查、去重、划分并格式化训练数据。

    python data.py                                   # 从 ModelScope 下载 delicate_medical_r1_data
    python data.py --source demo                     # 内置的演示数据
    python data.py --source 我的数据.jsonl           # JSONL、JSON、CSV、Parquet 文件，或含有它们的目录

每条记录含 question（问题）、think（思考，可空）、answer（回答），可选 scenario（场景编号）。
写出 train.jsonl、val.jsonl（原样的记录）和 train_format.jsonl、val_format.jsonl（instruction/input/output）；
四个文件每次都从来源重新生成，要么全部更新，要么全部保持原样。
"""

import argparse
import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS
from qwenmed import chat, checkpoints, cli, demo, files, hub, records, redact
from qwenmed.errors import UserError
from qwenmed.records import Problem, Record

SHOWN_PROBLEMS = 20


def main() -> int:
    """Fetch, validate, dedupe, split, format, report."""
    args = parse_args()
    output_dir = files.check_writable(args.output_dir)
    source = locate(args.source)
    found, invalid = records.read_records(source)
    if args.redact:
        found = mask_personal(found)
    unique, duplicates = records.drop_duplicates(found)
    report_problems(invalid, duplicates)
    if not unique:
        raise UserError("没有一条可用的记录", source, "每条记录需要非空的 question 和 answer")
    train, val = records.split(unique, args.val_ratio, args.seed)
    write(output_dir, train, val, args.system_prompts)
    summarise(output_dir, train, val, args, len(found) + len(invalid), len(invalid), len(duplicates))
    return cli.EXIT_SOME_ROWS_FAILED if invalid else cli.EXIT_OK


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = cli.build_parser("data.py", __doc__)
    source = parser.add_argument_group("来源")
    source.add_argument(
        "--source", default="modelscope", metavar="WHERE", help="modelscope、huggingface、demo，或本地文件/目录"
    )
    source.add_argument(
        "--redact", action="store_true", help="遮住记录里的手机号、固定电话、身份证号和邮箱，并报告个数"
    )
    output = parser.add_argument_group("划分与输出")
    output.add_argument("--output-dir", type=Path, default=Path(), metavar="DIR", help="写到哪个目录")
    output.add_argument("--val-ratio", type=float, default=0.1, metavar="X", help="验证集所占比例")
    output.add_argument("--seed", type=int, default=42, metavar="N", help="打乱顺序的随机种子")
    output.add_argument(
        "--system-prompts",
        default="mixed",
        choices=("general", "scenario", "mixed"),
        help="*_format.jsonl 的系统提示词：通用、记录自己的场景，或两者都写",
    )
    lengths = parser.add_argument_group("长度统计")
    lengths.add_argument("--max-length", type=int, default=2048, metavar="N", help="统计有多少样本超过这么多 token")
    lengths.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="分词器目录（默认 models/Qwen3-0.6B；演示数据用演示模型的）"
    )
    args = parser.parse_args()
    if not 0 < args.val_ratio < 1:
        parser.error(f"--val-ratio 应在 0 与 1 之间，而不是 {args.val_ratio}")
    if args.max_length < 1:
        parser.error("--max-length 至少为 1")
    return args


def locate(source: str) -> Path:
    """The local file or folder of a source; hub data sets are fetched as plain files."""
    if source == "demo":
        return demo.DEMO_DATA
    if source in ("modelscope", "huggingface"):
        return hub.fetch_dataset(
            None, source=source, local_dir=Path("downloads") / "delicate_medical_r1_data", say=cli.note
        )
    return Path(source)


def mask_personal(found: Sequence[Record]) -> list[Record]:
    """The records with phone, identity-card and e-mail masked in every text; says how many there were."""
    counts: Counter[str] = Counter()
    masked: list[Any] = [records.parse_row(redact.redact_row(record.row, counts), record.place) for record in found]
    listed = "，".join(f"{kind} {number}" for kind, number in counts.items()) or "没有发现"
    cli.note(f"遮住个人信息：{listed}")
    return masked


def report_problems(invalid: Sequence[Problem], duplicates: Sequence[Problem]) -> None:
    """Say which rows were dropped and why."""
    for problem in [*invalid, *duplicates][:SHOWN_PROBLEMS]:
        cli.note(f"丢弃 {problem}")
    if (rest := len(invalid) + len(duplicates) - SHOWN_PROBLEMS) > 0:
        kinds = Counter(problem.reason.partition("（")[0] for problem in invalid)
        cli.note(f"…… 另有 {rest} 行被丢弃；无效行按原因：{dict(kinds)}")


def write(output_dir: Path, train: Sequence[Record], val: Sequence[Record], mode: str) -> None:
    """Write all four files, or none."""
    contents = {}
    for name, part in (("train", train), ("val", val)):
        contents[output_dir / f"{name}.jsonl"] = files.to_jsonl(record.row for record in part)
        contents[output_dir / f"{name}_format.jsonl"] = files.to_jsonl(
            records.format_row(record, system)
            for record in part
            for system in records.system_prompts(record, GENERAL_PROMPT, MEDICAL_PROMPTS, mode)
        )
    files.write_whole(contents)


def summarise(output_dir: Path, train: list, val: list, args: Any, read: int, invalid: int, duplicates: int) -> None:
    """Print the table of counts and lengths."""
    measure, unit = length_measure(args.tokenizer, demo_source=args.source == "demo")
    print(f"读到 {read} 行：无效 {invalid}，重复 {duplicates}，可用 {len(train) + len(val)}")
    no_think = sum(not record.think.strip() for record in [*train, *val])
    if no_think:
        print(f"其中 {no_think} 条没有思考过程")
    print(f"长度（完整对话，{unit}）：")
    print_row("", "条数", "中位数", "p95", "最长", f"超过 {args.max_length}")
    for name, part in (("train", train), ("val", val)):
        lengths = sorted(measure(record) for record in part)
        p95 = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
        over = sum(length > args.max_length for length in lengths)
        shown = over if unit == "token" else "未知"
        print_row(name, len(lengths), round(statistics.median(lengths)), p95, lengths[-1], shown)
    names = "train.jsonl、val.jsonl、train_format.jsonl、val_format.jsonl"
    print(f"已写入 {output_dir.resolve()}：{names}")


def print_row(*cells: object) -> None:
    """Print a table row whose columns stay in line; a Chinese character is two columns wide."""
    columns = []
    for cell in map(str, cells):
        width = sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in cell)
        columns.append(" " * (11 - width) + cell)
    print("".join(columns))


def length_measure(tokenizer_dir: Path | None, demo_source: bool) -> tuple[Any, str]:
    """A function that measures a record's full chat, and the unit it measures in."""
    folder = tokenizer_dir or Path("models") / ("demo" if demo_source else "Qwen3-0.6B")
    if tokenizer_dir is None and demo_source and hub.missing_model_files(folder):
        demo.build_demo_model(folder, MEDICAL_PROMPTS.values())
    if tokenizer_dir is None and not folder.is_dir():
        cli.note(f"没有找到分词器 {folder}，长度按字符计（先运行 python download_model.py，或用 --tokenizer 指定）")
        return (lambda record: len(record.question + record.think + record.answer)), "字符，未计 token"
    tokenizer = checkpoints.load_tokenizer(folder)

    def tokens(record: Record) -> int:
        system = record.system or GENERAL_PROMPT
        return len(chat.render_sample(tokenizer, chat.training_row(record, system))[0])

    return tokens, "token"


if __name__ == "__main__":
    cli.run(main)
