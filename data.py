"""阶段 1：取得、检查、审计、去重、划分并格式化训练数据。

    python data.py                                   # 从 ModelScope 下载 delicate_medical_r1_data
    python data.py --source demo                     # 内置的演示数据
    python data.py --source 我的数据.jsonl --audit    # JSONL、JSON、CSV、Parquet（文本的也可以是 .gz），或目录
    python data.py --source a.jsonl b.json --weights 1 0.5
    python data.py --source 其他.csv --map question=提问 think=推理 answer=回复
    python data.py --decontaminate 评估题.jsonl       # 去掉与评估集重叠的行

自动认得 question/think/answer、Alpaca、ShareGPT、OpenAI messages、HuatuoGPT-o1；多轮对话的每个回答是一条记录。
写出 train.jsonl、val.jsonl（本来就是这种格式的行原样写回）和 train_format.jsonl、val_format.jsonl
（instruction/input/output）；四个文件每次都从来源重新生成，要么全部更新，要么全部保持原样。
丢弃的每一行及原因在 dropped.jsonl；--audit 另写 audit.html 和 audit.json。
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS, MEDICAL_SCENARIOS
from qwenmed import (
    audit,
    cli,
    contamination,
    demo,
    files,
    findings,
    hub,
    preparation,
    records,
    scenarios,
    schemas,
    terminal,
)
from qwenmed.collection import INVALID, Collection
from qwenmed.controls import printable
from qwenmed.errors import UserError
from qwenmed.preparation import Plan, Source
from qwenmed.rows import data_files
from qwenmed.splitting import split

SHOWN_PROBLEMS = 20
# What `--drop` can leave out; the other checks are repaired, or are no fault of the row.
DROPPABLE = [check.key for check in findings.CHECKS if not check.done and check.key != "same_question"]
TRAIN, VAL = "train", "val"
DATA_FILES = [f"{part}{suffix}.jsonl" for part in (TRAIN, VAL) for suffix in ("", "_format")]
DROPPED_FILE = "dropped.jsonl"


def main() -> int:
    """Prepare the data, alone in the output folder."""
    args = parse_args()
    output_dir = files.check_writable(args.output_dir)
    with files.holding(output_dir, "数据准备"):
        return prepare(args, output_dir)


def prepare(args: argparse.Namespace, output_dir: Path) -> int:
    """Collect, split, write, report; the exit status."""
    plan = make_plan(args)
    sources = [
        Source(locate(source), weight)
        for source, weight in zip(args.source, args.weights or [1.0] * len(args.source), strict=True)
    ]
    refuse_to_overwrite(
        [*(source.path for source in sources), *args.decontaminate], output_files(output_dir, args.audit)
    )
    workers = args.workers or preparation.workers_for(sources)
    with terminal.reading_progress() as progress, files.naming(output_dir):
        collection = preparation.collect(sources, plan, output_dir, workers, progress)
        kept, groups = collection.settle()
    report_dropped(collection)
    if not kept:
        raise UserError("没有一条可用的记录", args.source[0], "每条记录需要非空的 question 和 answer")
    train, val = split(kept, args.val_ratio, args.seed, groups)
    parts = {TRAIN: weighted(train, collection, sources, args.seed), VAL: val}
    write(output_dir, collection, parts, args.system_prompts)
    summarise(output_dir, collection, parts, plan, args)
    return cli.EXIT_SOME_ROWS_FAILED if collection.tally.dropped[INVALID] else cli.EXIT_OK


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = cli.build_parser("data.py", __doc__)
    source = parser.add_argument_group("来源")
    source.add_argument(
        "--source", nargs="+", default=["modelscope"], metavar="WHERE",
        help="modelscope、huggingface、demo，或本地文件/目录；可以有几个",
    )  # fmt: skip
    source.add_argument(
        "--weights", nargs="+", type=float, metavar="X", help="每个来源的训练样本取几遍，如 1 0.5（默认都是 1）"
    )
    source.add_argument(
        "--map", nargs="+", default=[], metavar="NAME=FIELD",
        help=f"认不出的格式：哪个字段是 {'、'.join(schemas.FIELDS)}，如 question=提问 answer=回复",
    )  # fmt: skip
    cleaning = parser.add_argument_group("清洗与审计")
    cleaning.add_argument("--audit", action="store_true", help="写出 audit.html（含例子）和 audit.json")
    cleaning.add_argument("--drop", nargs="+", default=[], choices=DROPPABLE, metavar="CHECK", help="丢弃有这些问题的记录：" + " ".join(DROPPABLE))  # fmt: skip
    cleaning.add_argument("--redact", action="store_true", help="遮住记录里的手机号、固定电话、身份证号和邮箱")
    cleaning.add_argument(
        "--near-duplicate", type=float, default=0.8, metavar="X",
        help="问题加回答的 Jaccard 相似度达到 X 算近似重复，划分时放在同一边；0 不检查",
    )  # fmt: skip
    cleaning.add_argument(
        "--copied-thinking", type=float, default=findings.COPIED, metavar="X", help="思考有多大部分照抄回答或问题算复制"
    )
    cleaning.add_argument(
        "--decontaminate", nargs="+", type=Path, default=[], metavar="FILE",
        help=f"去掉与这些评估文件（或 .txt，每行一段）有 {contamination.NGRAM} 个字连续相同的行",
    )  # fmt: skip
    output = parser.add_argument_group("划分与输出")
    output.add_argument("--output-dir", type=Path, default=Path(), metavar="DIR", help="写到哪个目录")
    output.add_argument("--val-ratio", type=float, default=0.1, metavar="X", help="验证集所占比例")
    output.add_argument("--seed", type=int, default=42, metavar="N", help="打乱顺序的随机种子")
    output.add_argument(
        "--system-prompts",
        default="mixed",
        choices=("general", "scenario", "mixed"),
        help="*_format.jsonl 的系统提示词：通用、场景的（数据没有指出时由问题推测），或两者都写",
    )
    output.add_argument("--workers", type=int, default=0, metavar="N", help="进程数；0 表示按数据大小决定")
    lengths = parser.add_argument_group("长度统计")
    lengths.add_argument("--max-length", type=int, default=2048, metavar="N", help="统计有多少样本超过这么多 token")
    lengths.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="分词器目录（默认 models/Qwen3-0.6B；演示数据用演示模型的）"
    )
    args = parser.parse_args()
    check_args(parser, args)
    return args


def check_args(parser: cli.Parser, args: argparse.Namespace) -> None:
    """Refuse what can't be meant, before anything is read."""
    if not 0 < args.val_ratio < 1:
        parser.error(f"--val-ratio 应在 0 与 1 之间，而不是 {args.val_ratio}")
    for name in ("near_duplicate", "copied_thinking"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} 应在 0 与 1 之间，而不是 {getattr(args, name)}")
    if args.max_length < 1:
        parser.error("--max-length 至少为 1")
    if not 0 <= args.workers <= 256:
        parser.error("--workers 应在 0 与 256 之间")
    if args.weights and len(args.weights) != len(args.source):
        parser.error(f"--weights 有 {len(args.weights)} 个，--source 有 {len(args.source)} 个")
    if args.weights and not all(0 <= weight <= 100 for weight in args.weights):
        parser.error("--weights 应在 0 与 100 之间")
    pairs = [each.partition("=") for each in args.map]
    args.map = {name: field for name, _, field in pairs}
    if not all(field for _, _, field in pairs) or not args.map.keys() <= set(schemas.FIELDS):
        parser.error(f"--map 的形式是 NAME=FIELD，NAME 可以是 {'、'.join(schemas.FIELDS)}")
    if args.map and not {"question", "answer"} <= args.map.keys():
        parser.error("--map 至少要指出 question 和 answer")


def make_plan(args: argparse.Namespace) -> Plan:
    """How rows are treated.

    Raises:
        UserError: a held-out file is unusable.
    """
    return Plan(
        mapping=args.map,
        limits=findings.Limits(args.copied_thinking, args.redact),
        drop=frozenset(args.drop),
        near_duplicate=args.near_duplicate,
        held_out=contamination.HeldOut(args.decontaminate, args.map) if args.decontaminate else None,
        tokenizer=tokenizer_folder(args.tokenizer, args.source == ["demo"]),
        max_length=args.max_length,
        general=GENERAL_PROMPT,
        scenarios=tuple(MEDICAL_PROMPTS),
    )


def tokenizer_folder(given: Path | None, demo_source: bool) -> Path | None:
    """The tokenizer that measures lengths, or None where there is none yet."""
    folder = given or Path("models") / ("demo" if demo_source else "Qwen3-0.6B")
    if given is None and demo_source and hub.missing_model_files(folder):
        demo.build_demo_model(folder, MEDICAL_PROMPTS.values())
    if given is None and not folder.is_dir():
        cli.note(f"没有找到分词器 {folder}，长度按字符计（先运行 python download_model.py，或用 --tokenizer 指定）")
        return None
    return folder


def locate(source: str) -> Path:
    """The local file or folder of a source; hub data sets are fetched as plain files."""
    if source == "demo":
        return demo.DEMO_DATA
    if source in ("modelscope", "huggingface"):
        return hub.fetch_dataset(
            None, source=source, local_dir=Path("downloads") / "delicate_medical_r1_data", say=cli.note
        )
    return Path(source)


def output_files(output_dir: Path, audited: bool) -> list[Path]:
    """Every file that a run writes or removes."""
    audits = [audit.AUDIT_HTML, audit.AUDIT_JSON] if audited else []
    return [output_dir / name for name in (*DATA_FILES, DROPPED_FILE, *audits)]


def refuse_to_overwrite(read: Iterable[Path], written: Sequence[Path]) -> None:
    """Make sure that nothing is read which will be written over: run by run, validation rows would be lost for good.

    Raises:
        UserError: a file is both.
    """
    there = [path for path in written if path.exists()]
    for path in read:
        for file in [path] if path.is_file() else data_files(path):
            if any(file.samefile(each) for each in there):
                raise UserError("这个文件既要读，又会被结果覆盖", file, "请用 --output-dir 把结果写到另一个目录")


def report_dropped(collection: Collection) -> None:
    """Say which rows were dropped and why; the first ones here, all of them in dropped.jsonl."""
    collection.dropped.seek(0)
    for line, _ in zip(collection.dropped, range(SHOWN_PROBLEMS), strict=False):
        problem = json.loads(line)
        cli.note(f"丢弃 {problem['place']}：{problem['reason']}")
    if (rest := collection.tally.dropped.total() - SHOWN_PROBLEMS) > 0:
        cli.note(f"…… 另有 {rest:,} 行被丢弃，都列在 dropped.jsonl 里")


def weighted(train: Sequence[int], collection: Collection, sources: Sequence[Source], seed: int) -> Sequence[int]:
    """The training rows as often as their sources' weights say; a fraction is a share of them, chosen by the seed."""
    if all(source.weight == 1 for source in sources):
        return train
    dice, taken = random.Random(seed), []
    for number in train:
        whole, part = divmod(sources[collection.source(number)].weight, 1)
        taken += [number] * (int(whole) + (dice.random() < part))
    if not taken:
        raise UserError("按 --weights 没有一条训练样本", None, "请至少给一个来源大于 0 的权重")
    return taken


def write(output_dir: Path, collection: Collection, parts: dict[str, Sequence[int]], mode: str) -> None:
    """Write all four files and dropped.jsonl, or none."""
    dropped = output_dir / DROPPED_FILE
    paths = [output_dir / name for name in DATA_FILES]
    with files.whole_files([*paths, *([dropped] if collection.tally.dropped else [])]) as opened:
        for part, numbers in parts.items():
            raw, formatted = opened[output_dir / f"{part}.jsonl"], opened[output_dir / f"{part}_format.jsonl"]
            for number in numbers:
                line, record = collection.row(number)
                raw.write(line + "\n")
                for system in scenarios.system_prompts(record, GENERAL_PROMPT, MEDICAL_PROMPTS, mode):
                    formatted.write(files.to_jsonl([records.format_row(record, system)]))
        if collection.tally.dropped:
            collection.dropped.seek(0)
            opened[dropped].writelines(line.decode() for line in collection.dropped)
    if not collection.tally.dropped:
        dropped.unlink(missing_ok=True)  # of an earlier run


def summarise(
    output_dir: Path, collection: Collection, parts: dict[str, Sequence[int]], plan: Plan, args: argparse.Namespace
) -> None:
    """Print what was found, and write the audit where it is asked for."""
    settings = {name: value for name, value in vars(args).items() if name != "audit"}
    report = audit.summary(
        collection, parts, settings, MEDICAL_SCENARIOS, "token" if plan.tokenizer else "字符，未计 token"
    )
    print(printable(audit.as_text(report)))
    names = "train.jsonl、val.jsonl、train_format.jsonl、val_format.jsonl"
    if collection.tally.dropped:
        names += "、dropped.jsonl"
    if args.audit:
        audit.write(output_dir, report)
        names += f"、{audit.AUDIT_HTML}、{audit.AUDIT_JSON}"
    print(f"已写入 {output_dir.resolve()}：{names}")


if __name__ == "__main__":
    cli.run(main)
