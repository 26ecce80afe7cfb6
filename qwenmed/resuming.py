"""Whether a run may go on from a checkpoint: the same data, model and settings, or else the differences."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenmed import cli
from qwenmed.errors import UserError
from qwenmed.settings import TrainSettings

# Settings that change nothing in what is learned: where things are and go, what is shown, kept and planned.
FREE = frozenset(
    {
        "model", "train_file", "val_file", "output_dir", "resume", "force_resume", "device", "gpu_memory", "swanlab",
        "logging_steps", "save_total_limit", "sample_tokens", "eval_steps", "best_by", "early_stopping",
        "gradient_checkpointing", "weights", "optimizer", "optimizer_in_backward",
    }
)  # fmt: skip
NAMES = {
    "method": "训练方法",
    "base_weights_sha256": "起点模型的权重",
    "chat_template_sha256": "对话模板",
}
MOST_LISTED = 8


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path, settings: TrainSettings) -> None:
    """Make sure that a checkpoint and the run that wants to continue it belong together.

    Args:
        before, now: the card of the checkpoint (empty where it has none), and that of this run.

    Raises:
        UserError: they differ, and `--force-resume` is not set; the differences are listed.
    """
    found = list(differences(before, now)) if before else []
    if not found:
        return
    listed = "；".join(found[:MOST_LISTED]) + ("；……" if len(found) > MOST_LISTED else "")
    if not settings.force_resume:
        remedy = "请改回原来的，或用 --output-dir 换一个目录重新训练；明知不同也要继续，加 --force-resume"
        raise UserError(f"检查点的数据或设置与这次不同：{listed}", checkpoint, remedy)
    cli.note(f"与检查点不同，仍然继续（--force-resume）：{listed}")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs, in the user's words."""
    for name, words in NAMES.items():
        if before.get(name) != now.get(name):
            yield f"{words}不同" if name != "method" else f"{words} {before.get(name)} → {now.get(name)}"
    for part, words in (("train", "训练数据"), ("val", "验证数据")):
        old, new = (card.get("data", {}).get(part, {}) for card in (before, now))
        if old.get("sha256") != new.get("sha256"):
            yield f"{words}的内容变了（{old.get('file')} → {new.get('file')}）"
    old, new = (card.get("settings", {}) for card in (before, now))
    for name in sorted((old.keys() | new.keys()) - FREE):
        if old.get(name) != new.get(name):
            yield f"--{name.replace('_', '-')} {old.get(name)} → {new.get(name)}"
