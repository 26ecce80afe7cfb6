"""The plan of a training on this machine: the card, the tokens of a step, the candidates; see `planner`."""

import dataclasses
import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import checkpoints, cli, demo, hardware, planner, processes, shapes
from qwenmed.controls import display_width
from qwenmed.errors import UserError
from qwenmed.planner import GIB, Card, Plan
from qwenmed.settings import LoraSettings, TrainSettings
from qwenmed.shapes import Shape

if TYPE_CHECKING:
    import torch


def card_of(device: "torch.device", settings: TrainSettings) -> Card:
    """The card that a training runs on, and what of it the training may take.

    Raises:
        UserError: `--gpu-memory` without a GPU.
    """
    free = hardware.free_memory(device)
    if device.type == "cuda":
        import torch

        if settings.gpu_memory:
            free = min(free, planner.memory(settings.gpu_memory) - planner.CONTEXT)
        name = torch.cuda.get_device_properties(device).name
        bf16, triton = hardware.has_native_bf16(device), hardware.has_triton()
        return Card("cuda", int(free * planner.SLACK), bf16, name, processes.shards(), triton)
    if settings.gpu_memory:
        raise UserError("--gpu-memory 需要一块 NVIDIA GPU", None, "只想看别的卡上的计划，请加 --plan")
    name = {"cpu": "这台机器的内存"}.get(device.type, device.type)
    return Card(device.type, int(free * planner.SLACK / processes.count()), False, name, processes.shards())


def cap(device: "torch.device", settings: TrainSettings) -> None:
    """Let torch take no more of the GPU than `--gpu-memory`."""
    if settings.gpu_memory and device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        share = (planner.memory(settings.gpu_memory) - planner.CONTEXT) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))  # of the current GPU: ours has no index


def is_packing(settings: TrainSettings, card: Card) -> bool:
    """Whether several samples share a row. On a CPU rows wait for each other anyway; nothing is won there."""
    return settings.packing == "on" or (settings.packing == "auto" and card.kind == "cuda")


def tokens_of(settings: TrainSettings, card: Card, longest: int | None) -> int:
    """Tokens of one forward pass.

    Args:
        longest: tokens of the longest sample, where it is known.
    """
    row = settings.max_length if longest is None or is_packing(settings, card) else longest
    return settings.batch_size * row


def candidates(settings: TrainSettings, model_folder: Path, card: Card, tokens: int) -> list[Plan]:
    """The plan for a model's folder, and those to step down to, with what is installed here.

    Raises:
        UserError: nothing fits.
    """
    shape = shapes.of_config(checkpoints.read_config(model_folder))
    return planner.choose(shape, settings, card, tokens, has_torchao())


def choose(
    settings: TrainSettings, model_folder: Path, device: "torch.device", longest: int, before: Mapping[str, Any] | None
) -> tuple[Card, list[Plan]]:
    """The card of a run, held to `--gpu-memory`; the plan for it, which is said, and those to step down to.

    Args:
        longest: tokens of the longest sample.
        before: what the checkpoint that is continued from says of its plan.

    Raises:
        UserError: nothing fits, bitsandbytes is missing, or `--gpu-memory` is given without a GPU.
    """
    cap(device, settings)
    card = card_of(device, settings)
    if card.kind == "cpu" and settings.device == "auto" and shutil.which("nvidia-smi"):
        cli.note("这台机器有 nvidia-smi，torch 却找不到 GPU，会在 CPU 上训练；看看为什么：python doctor.py")
    tokens = tokens_of(settings, card, longest)
    card = with_faster_type(card, shapes.of_config(checkpoints.read_config(model_folder)), tokens, before)
    found = candidates(settings, model_folder, card, tokens)
    if isinstance(settings, LoraSettings) and settings.quantize:
        check_bitsandbytes()
    if before:
        alike = [plan for plan in found if planner.shares_states(plan, before)]
        if not alike:
            cli.note("检查点是按另一种做法训练的，优化器的状态接不上：从零累积")
        found = alike or found
    found = processes.agree(found)
    idle = idle_gpus(device)
    if idle:
        cli.note(f"这台机器另有 {idle} 块 GPU，一个进程只用一块；全部用上：accelerate launch，见 docs/scaling.md")
    cli.note(f"{card.name}：{found[0]}")
    cli.note(
        f"计划的峰值 {found[0].total / GIB:.2f} GiB（计算值），可用 {card.room / GIB:.1f} GiB；--plan 列出全部做法"
    )
    if found[0].total > card.room:
        cli.note("计划的比可用的多一点；计算值会有一成的误差，先试试，真的放不下会停下来")
    return card, found


def idle_gpus(device: "torch.device") -> int:
    """How many GPUs are visible that no process of this training uses."""
    import torch

    return max(0, torch.cuda.device_count() - 1) if device.type == "cuda" and processes.count() == 1 else 0


def with_faster_type(card: Card, shape: Shape, tokens: int, before: Mapping[str, Any] | None = None) -> Card:
    """The card, with bf16 switched on for a CPU that computes clearly faster in it; measured, about a second.

    A run that is continued keeps its type, unless it was bf16 and this CPU is slower in that.

    Args:
        before: what the checkpoint that is continued from says of its plan.
    """
    if card.kind != "cpu" or shape.parameters < hardware.SMALL_MODEL:
        return card
    before = before or {}
    if "autocast" in before and before["autocast"] is None:
        return card
    _, factor = hardware.faster_cpu_dtype(min(tokens, MEASURED_ROWS), shape.width, shape.inner)
    cli.note(f"CPU 上量过：bf16 的速度是 fp32 的 {factor:.2f} 倍")
    wanted = 1 if before.get("autocast") == "bf16" else hardware.CLEARLY_FASTER
    return dataclasses.replace(card, bf16=factor >= wanted)


# Enough rows for a CPU to compute rather than to wait for memory, as in training.
MEASURED_ROWS = 256


def has_torchao() -> bool:
    """Whether torchao is installed, and what it needs here besides."""
    return not hardware.missing_for_8_bit()


def check_bitsandbytes() -> None:
    """Make sure that weights can be loaded in four bits.

    Raises:
        UserError: bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--quantize 需要 bitsandbytes", None, "pip install -e '.[quant]'")


def gpu_here() -> tuple[bool, bool]:
    """Whether the GPU of this machine computes in bf16, and has Triton; where there is none, as a new one on Linux."""
    device = hardware.pick_device()
    return (hardware.has_native_bf16(device), hardware.has_triton()) if device.type == "cuda" else (True, True)


def local_folder(model: str) -> Path | None:
    """Where a model lies already; the demo model is built and counts as there."""
    for path in (Path(model), Path("models") / model.split("/")[-1]):
        if path.is_dir():
            return path
    return Path("models") / model if model == demo.DEMO_MODEL else None


def overview(settings: TrainSettings) -> str:
    """What `--plan` prints: every way to train, what it needs, and which would be taken.

    Raises:
        UserError: the model is neither here nor a published Qwen3, or the settings leave no way on this device.
    """
    folder, shape = local_folder(settings.model), shapes.known(settings.model)
    if folder is not None and (folder / "config.json").is_file():
        shape = shapes.of_config(checkpoints.read_config(folder))
    if shape is None:
        remedy = f"可以不下载就计划的有：{'、'.join(shapes.QWEN3)}；别的请先用 download_model.py 下载"
        raise UserError("不知道这个模型的大小", settings.model, remedy)
    if settings.gpu_memory:
        card = planner.imagined_card(planner.memory(settings.gpu_memory), *gpu_here())
    else:
        card = card_of(hardware.pick_device(settings.device), settings)
    tokens = tokens_of(settings, card, None)
    card = with_faster_type(card, shape, tokens)
    chosen, why = None, ""
    try:
        chosen = planner.choose(shape, settings, card, tokens, torchao=True)[0]
    except UserError as error:
        why = str(error)
    method = f"LoRA（r={settings.lora_rank}）" if isinstance(settings, LoraSettings) else "全参数"
    head = (
        f"{settings.model}，{shape.parameters / 1e9:.2f} B 参数，{method}，每步 {tokens} 个 token；"
        f"{card.name}，可用 {card.room / GIB:.1f} GiB"
    )
    rows = table(shape, settings, card, tokens, chosen)
    widths = [max(display_width(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join(" " * (width - display_width(cell)) + cell for cell, width in zip(row, [*widths, 0], strict=True))
        for row in rows
    ]
    said = f"会选：{chosen}" if chosen else why
    if chosen and chosen.needs_torchao and not has_torchao():
        said += f"\n需要先安装：{hardware.how_to_get_8_bit()}"
    return "\n".join([head, *(line.rstrip() for line in lines), said])


def table(shape: Shape, settings: TrainSettings, card: Card, tokens: int, chosen: Plan | None) -> list[list[str]]:
    """The plans for a person to read: a row of words each, the first being the head.

    Of the numbers of checkpointed layers a few will do.
    """
    every = planner.plans(shape, settings, card, tokens)
    found = [plan for plan in every if plan == chosen or plan.checkpoint_every in (0, 1, 2)] or every
    names = list(found[0].parts)
    rows = [["", *names, "合计", "GiB，计算值"]]
    for plan in found:
        sizes = [f"{plan.parts[name] / GIB:.2f}" for name in names]
        mark = "→" if plan == chosen else "✓" if plan.total <= card.room else "✗"
        rows.append([mark, *sizes, f"{plan.total / GIB:.2f}", str(plan)])
    return rows
