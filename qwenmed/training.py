"""The named steps of a fine-tuning run; `train.py` and `train_lora.py` put them in order.

TRL's SFTTrainer does the training. What is decided here: rows never lose their end, the loss covers
thinking, answer and `<|im_end|>` only, no pure fp16 weights, and a checkpoint counts only when it is whole.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from qwenmed import (
    chat,
    checkpoints,
    cli,
    demo,
    files,
    hub,
    leaks,
    lengths,
    processes,
    records,
    scenarios,
    sources,
    tracking,
)
from qwenmed.errors import UserError
from qwenmed.settings import TrainSettings
from qwenmed.yaml_settings import Settings, load_settings, recommended

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

    from qwenmed.callbacks import MedicalSFTTrainer


# A data set in which every row has a system prompt of its own does not fill run.json with them.
MOST_PROMPTS = 100


@dataclass(frozen=True)
class Rows:
    """Training and validation rows, and where they came from (for run.json).

    Attributes:
        places: of the training rows: file and line.
        longest: tokens of the longest row of both.
    """

    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    val_records: list[records.Record]
    summary: dict[str, Any]
    places: Sequence[str] = ()
    longest: int = 0


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """What a training script was told.

    Attributes:
        model_folder: what will be trained; need not be there where only the plan is wanted.
        only_plan: print the plan and stop.
    """

    settings: Settings
    model_folder: Path
    only_plan: bool


def read_command_line(prog: str, doc: str, kind: type[Settings], prompts: Iterable[str]) -> Command[Settings]:
    """The merged settings of a training script, and the folder of the model it will train.

    The model is looked up before the other settings, since its folder may recommend some of them. A plan wants neither
    weights nor data, so nothing is fetched for it.

    Args:
        prompts: the system prompts, for the tokenizer of the demo model.

    Raises:
        UserError: a setting is wrong, a data file is missing, or there is no such model.
    """
    parser = cli.build_parser(prog, doc)
    parser.general.add_argument("--config", type=Path, metavar="FILE.yaml", help="从 YAML 读取设置；命令行优先")
    parser.general.add_argument("--plan", action="store_true", help="只打印显存计划，不载入权重，不需要数据")
    cli.add_settings(parser, kind)
    given = vars(parser.parse_args())
    config, only_plan = given.pop("config"), given.pop("plan")
    before = load_settings(kind, given, config, None)
    if only_plan:
        return Command(before, Path(before.model), True)
    check_files(before)
    with processes.first_goes_first():
        model_folder = resolve_model(before.model, prompts)
    advised = recommended(kind, model_folder)
    if advised:
        cli.note(f"采用模型目录推荐的设置：{'，'.join(f'{name}={value}' for name, value in advised.items())}")
    return Command(load_settings(kind, given, config, model_folder), model_folder, False)


def resolve_model(model: str, prompts: Iterable[str] = (), models_root: Path = Path("models")) -> Path:
    """The folder of the model that `--model` names: a folder, `demo`, or an id, which is fetched once.

    Args:
        prompts: the system prompts, for the tokenizer of the demo model.

    Raises:
        UserError: the folder is no model, or the id can't be fetched.
    """
    path = Path(model)
    if path.is_dir():
        if checkpoints.is_run_folder(path):
            path = checkpoints.run_checkpoint(path, "best")
        if (path / checkpoints.ADAPTER_CONFIG).is_file():
            raise UserError("这是 LoRA 适配器，不能当作训练的起点", path, "请给出完整模型的目录")
        return path
    if path.exists():
        raise UserError("模型应是目录，而这是一个文件", path, "请给出含 config.json 的目录、模型 ID 或 demo")
    if model == demo.DEMO_MODEL:
        folder = models_root / demo.DEMO_MODEL
        if hub.missing_model_files(folder):
            cli.note(f"生成演示模型：{folder}")
            demo.build_demo_model(folder, prompts)
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError("模型目录不存在", model, "请检查路径；模型 ID 的形式是 组织/名称，例如 Qwen/Qwen3-0.6B")
    return hub.fetch_model(model, models_root / model.split("/")[-1], source=None, revision=None, say=cli.note)


def check_files(settings: TrainSettings) -> None:
    """Fail at once on data files that are not there, before a model is fetched or loaded.

    Raises:
        UserError: one is missing.
    """
    for name in (settings.train_file, settings.val_file):
        if not Path(name).is_file():
            remedy = "请先运行 python data.py，或用 --train-file / --val-file 指定"
            raise UserError("数据文件不存在", name, remedy)


def open_run_folder(settings: TrainSettings, model_folder: Path, method: str) -> Path:
    """The run's output folder, proved writable.

    Raises:
        UserError: it already holds a finished run and neither `--resume` nor another folder was asked for.
    """
    folder = Path(settings.output_dir or Path("output") / default_run_name(model_folder, method))
    if folder.exists() and not folder.is_dir():
        raise UserError("输出路径是文件而不是目录", folder, "请用 --output-dir 换一个目录")
    if checkpoints.finished_checkpoints(folder) and not settings.resume:
        raise UserError("输出目录里已有检查点", folder, "用 --resume 继续训练，或用 --output-dir 换一个目录")
    return files.check_writable(folder)


def default_run_name(model_folder: Path, method: str) -> str:
    """E.g. models/Qwen3-0.6B, lora → Qwen3-0.6B-lora; a checkpoint is named by its run."""
    name = checkpoints.short_name(model_folder).split("/")[0]
    return f"{name.removesuffix('-full').removesuffix('-lora')}-{method}"


def load_rows(
    settings: TrainSettings, tokenizer: "PreTrainedTokenizerBase", general: str, by_scenario: Mapping[str, str]
) -> Rows:
    """Read both files and fit their rows to `--max-length`.

    Args:
        general: the general system prompt.
        by_scenario: the scenarios' system prompts.

    Raises:
        UserError: a file or a row is unusable, the files stem from two preparations, or no row fits.
    """
    chat.check_template(tokenizer)
    fitted, kept, summary, reports = {}, {}, {}, {}
    for part, name in (("train", settings.train_file), ("val", settings.val_file)):
        path = Path(name)
        files.check_belong_together(path)
        found = sources.read_clean_records(path)
        wanted = samples(settings, found, general, by_scenario)
        rows, report = lengths.fit_rows(tokenizer, wanted, settings.max_length, settings.overlong)
        cli.note(f"{path}：{len(found)} 条记录 → {len(rows)} 个样本（{report}）")
        if not rows:
            raise UserError(
                f"没有一个样本不超过 {settings.max_length} 个 token",
                path,
                "请增大 --max-length 或用 --overlong shorten",
            )
        # A record has a sample for each of its prompts; with one that fits it is trained on.
        left = Counter(record.place for record, _ in wanted) - Counter(report.dropped)
        reports[part] = report
        fitted[part], kept[part] = rows, [record for record in found if left[record.place]]
        summary[part] = {
            "file": str(path),
            "sha256": files.sha256(path),
            "records": len(found),
            "samples": len(rows),
            "shortened": report.shortened,
            "dropped": report.dropped,
            "tokens": sum(report.lengths),
            "system_prompts": _prompts_seen(
                rows, {general: "general", **{text: name for name, text in by_scenario.items()}}
            ),
            **({"texts": leaks.fingerprints(kept[part])} if part == "train" else {}),
        }
    longest = max(max(report.lengths) for report in reports.values())
    return Rows(fitted["train"], fitted["val"], kept["val"], summary, reports["train"].places, longest)


def samples(
    settings: TrainSettings, found: Iterable[records.Record], general: str, by_scenario: Mapping[str, str]
) -> list[tuple[records.Record, str]]:
    """The records with the system prompts that `--system-prompts` wants them trained with."""
    return [
        (record, system)
        for record in found
        for system in scenarios.system_prompts(record, general, by_scenario, settings.system_prompts)
    ]


def _prompts_seen(rows: Iterable[dict[str, Any]], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The system prompts of the samples, by name ("own" for those that rows bring along): their hashes and samples."""
    counts = Counter(row["prompt"][0]["content"] for row in rows if row["prompt"][0]["role"] == "system")
    seen: dict[str, dict[str, Any]] = {}
    for text, count in counts.items():
        entry = seen.setdefault(names.get(text, "own"), {"hashes": [], "samples": 0})
        entry["samples"] += count
        if len(entry["hashes"]) < MOST_PROMPTS:
            entry["hashes"].append(tracking.prompt_hash(text))
    return seen


def build_trainer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Rows,
    config: "SFTConfig",
    card: dict[str, Any],
    callbacks: Iterable["TrainerCallback"] = (),
    peft_config: "LoraConfig | None" = None,
    in_backward: bool = False,
) -> "MedicalSFTTrainer":
    """TRL's trainer over the rows; each checkpoint carries `card`.

    Args:
        in_backward: update each weight within the backward pass.

    Raises:
        UserError: LoRA's target modules are not in the model.
    """
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from qwenmed.callbacks import MedicalSFTTrainer, ProgressBar

    try:
        trainer = MedicalSFTTrainer(
            model=model,
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows.train),
            eval_dataset=Dataset.from_list(rows.val),
            peft_config=peft_config,
            callbacks=list(callbacks),
        )
    except ValueError as error:
        if peft_config is not None and "target modules" in str(error).lower():
            raise UserError(
                f"模型里没有这些层：{peft_config.target_modules}", None, "请用 --target-modules all-linear"
            ) from error
        raise
    if peft_config is not None and not config.bf16:
        # TRL makes the adapters of a quantised model bf16; torch can't unscale such gradients of fp16 training.
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    trainer.card, trainer.rows, trainer.in_backward = card, rows, in_backward
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.progress_bar = ProgressBar()
    trainer.add_callback(trainer.progress_bar)
    return trainer
