"""Our training against the original recipe, alternately on the same rows: `make bench-train`.

    python benchmarks/training.py [--shapes 256,0.6B] [--methods full,lora] [--rounds 1] [--steps N]

The original recipe is what the tutorial scripts do: transformers' Trainer, one row at a time, four of them
accumulated, whole logits, activation checkpointing, bf16 weights and optimizer states, no packing; LoRA r=8, alpha=32,
dropout 0.1. A CPU without bf16 instructions takes minutes for one output layer in bf16, so there the original gets fp32
weights, which is to its favour, and the table says so. Ours is what `train.py` and `train_lora.py` do by themselves on
this machine, with the same four rows a step (two for the 0.6B shape on a CPU). Models have random weights and the true vocabulary: "0.6B" and "1.7B" are
Qwen3's shapes, "256" a small one. Rows are random tokens of the real data's lengths (median 764, 95th percentile 1,111).

On a GPU (about 8 minutes on an H200): 50 steps each of 0.6B and 1.7B, and ours once more under `--gpu-memory`, as on the
card that it is meant for; torch is held to that size, so that finishing proves that it fits.

Each run is a process of its own. Measured: tokens per second (padding does not count) over the optimizer steps behind
the first, and the peak: the resident set of the process on a CPU, allocated and reserved on a GPU. Nothing is downloaded.
Results: benchmarks/results/training-{cpu,cpu-bf16,gpu}.json and docs/training.md.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from assistant import put_between, where  # noqa: E402

from prompts import MEDICAL_PROMPTS  # noqa: E402
from qwenmed import configuration, files, hardware, planner, planning, shapes, training  # noqa: E402
from qwenmed.settings import LoraSettings, TrainSettings  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- bench-train-{kind}: make bench-train -->", "<!-- /bench-train-{kind} -->"
OURS, ORIGINAL = "ours", "original"
ACCUMULATED, PROMPT, LENGTH = 4, 60, 2048
# Rows a step of the larger model. The first step makes the states and takes its memory for the first time: not timed.
FEW_ROWS = 2
SMALL = shapes.Shape(256, 768, 4, 256, 128, 64, 151_936, True)
# Optimizer steps that are measured, and those before them that warm up.
STEPS = {"256": (3, 1), "0.6B": (2, 1)}
GPU_STEPS = (50, 3)
# The cards that ours is meant for; the peaks to reach are the issue's, in GiB.
CARDS = {("0.6B", "full"): "8GB", ("0.6B", "lora"): "4GB", ("1.7B", "full"): "12GB", ("1.7B", "lora"): "8GB"}
PEAKS = {("0.6B", "full"): 5.0, ("0.6B", "lora"): 2.3, ("1.7B", "full"): 11.5, ("1.7B", "lora"): 4.8}
AIMS = {"cpu": {"256": 2.0, "0.6B": 1.8}, "cuda": {"0.6B": 4.0}}


def main() -> None:
    """Measure everything in turns, or, in a process of its own, one run."""
    gpu = hardware.pick_device().type == "cuda"
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="0.6B,1.7B" if gpu else "256,0.6B")
    parser.add_argument("--methods", default="full,lora")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="measured steps, instead of the usual ones")
    parser.add_argument("--one", nargs=4, metavar=("RECIPE", "SHAPE", "METHOD", "CARD"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one, args.steps)))
        return
    results: dict[str, Any] = {"runs": []}
    for shape in args.shapes.split(","):
        for method in args.methods.split(","):
            wanted = [(ORIGINAL, ""), (OURS, "")]
            for number in range(args.rounds):
                for recipe, card in wanted if number % 2 == 0 else wanted[::-1]:
                    results["runs"].append(in_a_process(recipe, shape, method, card, args.steps))
            if gpu:
                results["runs"].append(in_a_process(OURS, shape, method, CARDS[shape, method], args.steps))
    results |= where()
    kind = "gpu" if gpu else "cpu-bf16" if has_fast_bf16() else "cpu"
    files.write_json(RESULTS / f"training-{kind}.json", results)
    put_between(DOCUMENT, BEGIN.format(kind=kind), END.format(kind=kind), table(results))
    print(table(results))


def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices by itself.

    Measured on an AVX2 machine: the backward pass of the head took 315 s in bf16 and 2 s in fp32.
    """
    import torch

    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for dtype in [*seconds] * 2:  # the first time warms up
        left, right = (torch.ones(256, size, dtype=dtype, requires_grad=True) for size in (64, 2048))
        started = time.perf_counter()
        (left.T @ right).sum().backward()
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.bfloat16] < 6 * seconds[torch.float32]


def in_a_process(recipe: str, shape: str, method: str, card: str, steps: int | None) -> dict[str, Any]:
    """One run in a fresh process, so that its peak is its own; one that fails says so in the table."""
    command = [sys.executable, __file__, *([f"--steps={steps}"] if steps else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / ".cache" / "quant")])}
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--one", recipe, shape, method, card], capture_output=True, text=True, check=False, env=environment
    )
    found = {"recipe": recipe, "shape": shape, "method": method, "card": card}
    if done.returncode:
        found["failed"] = (done.stderr.strip().splitlines() or ["?"])[-1][:300]
    else:
        found |= json.loads(done.stdout.strip().splitlines()[-1])
    found["whole_seconds"] = round(time.perf_counter() - started)
    print(found, file=sys.stderr, flush=True)
    return found


def one(recipe: str, shape: str, method: str, card: str, wanted: int | None) -> dict[str, Any]:
    """Train some steps; tokens per second and the peak."""
    import torch

    device = hardware.pick_device()
    gpu = device.type == "cuda"
    steps, warm = GPU_STEPS if gpu else STEPS[shape]
    steps = wanted or steps
    rows_a_step = FEW_ROWS if not gpu and shape == "0.6B" else ACCUMULATED
    settings = settings_of(method, card, steps + warm, rows_a_step)
    planning.cap(device, settings)
    # Packed rows hold two or three samples each; there are enough of them for every step.
    rows = make_rows(rows_a_step * (steps + warm) * (3 if gpu and recipe == OURS else 1))
    with tempfile.TemporaryDirectory() as folder:
        if recipe == OURS:
            trainer, found = ours(shape, settings, rows, Path(folder), device)
        else:
            trainer, found = original(shape, method, rows, Path(folder), settings, device)
        clock = stopwatch(warm)
        trainer.add_callback(clock)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            hardware.keep_freed_memory()
        trainer.train()
    tokens = tokens_trained(trainer, steps)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found |= {
        "tokens": round(tokens), "seconds": clock.seconds, "tokens_per_second": tokens / clock.seconds,
        "peak_gib": hardware.peak_memory_gib(device), "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip
    if gpu:
        found["mfu"] = mfu(shape, tokens / clock.seconds, device)
    return found


def tokens_trained(trainer: Any, steps: int) -> float:
    """Tokens of so many steps. The trainer shuffles: of the rows it took its share is what counts, not which ones."""
    args = trainer.args  # a plan that updates within the backward pass accumulates nothing, whatever the settings say
    taken = args.per_device_train_batch_size * args.gradient_accumulation_steps * steps
    return sum(map(len, trainer.train_dataset["input_ids"])) * taken / len(trainer.train_dataset)


def mfu(shape: str, tokens_per_second: float, device: Any) -> float | None:
    """Share of the GPU's bf16 peak that the model's own arithmetic makes, as TRL counts both; None for an unknown GPU."""
    import torch
    from trl.trainer.utils import compute_flops_per_token, get_peak_flops

    most = get_peak_flops(torch.cuda.get_device_properties(device).name, "bfloat16")
    return compute_flops_per_token(model_config(shape), 764) * tokens_per_second / most if most else None


def settings_of(method: str, card: str, steps: int, rows_a_step: int) -> TrainSettings:
    """Ours: what the scripts do by themselves, and nothing that is not training."""
    kind = LoraSettings if method == "lora" else TrainSettings
    return kind(
        max_length=LENGTH, max_steps=steps, batch_size=1, gradient_accumulation_steps=rows_a_step, logging_steps=1,
        eval_steps=steps, best_by="last", gpu_memory=card or None,
        sft={"eval_strategy": "no", "save_strategy": "no"},
    )  # fmt: skip


def stopwatch(warm: int) -> Any:
    """A trainer callback that times the steps behind the first `warm` ones."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == warm:
                self.started = time.perf_counter()

        def on_train_end(self, args, state, control, **kwargs):
            self.seconds = time.perf_counter() - self.started

    return Clock()


def make_rows(count: int) -> list[dict[str, list[int]]]:
    """Random tokens of the real lengths; the same for every run. A log-normal through the median and the 95th percentile."""
    dice = random.Random(0)
    spread = math.log(1111 / 764) / 1.645
    rows = []
    for _ in range(count):
        length = min(LENGTH, max(2 * PROMPT, round(dice.lognormvariate(math.log(764), spread))))
        ids = [dice.randrange(151_643) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:]})
    return rows


def shape_of(name: str) -> shapes.Shape:
    """The sizes behind a name."""
    found = shapes.known(f"Qwen/Qwen3-{name}")
    return found or SMALL


def model_config(name: str) -> Any:
    """A shape in transformers' words."""
    from transformers import Qwen3Config

    shape = shape_of(name)
    config = Qwen3Config(
        vocab_size=shape.words, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.queries // shape.head, num_key_value_heads=shape.keys // shape.head,
        head_dim=shape.head, tie_word_embeddings=shape.tied, max_position_embeddings=40_960,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def model_of(name: str, dtype: Any) -> Any:
    """A model of a shape with random weights."""
    import torch
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(model_config(name)).to(dtype)


def a_tokenizer() -> Any:
    """Any will do, since the rows are tokens already: the demo model's."""
    from qwenmed import checkpoints, demo

    folder = ROOT / ".cache" / "demo-model"
    if not (folder / "tokenizer.json").is_file():
        demo.build_demo_model(folder, MEDICAL_PROMPTS.values())
    return checkpoints.load_tokenizer(folder)


def ours(shape: str, settings: TrainSettings, rows: list, folder: Path, device: Any) -> tuple[Any, dict[str, Any]]:
    """The trainer that our scripts build, over rows that are tokens already, and its plan."""
    card = planning.card_of(device, settings)
    tokens = planning.tokens_of(settings, card, max(len(row["input_ids"]) for row in rows))
    card = planning.with_faster_type(card, shape_of(shape), tokens)
    plan, *_ = planner.choose(shape_of(shape), settings, card, tokens, planning.has_torchao())
    config = configuration.sft_config(settings, folder, plan, card)
    adapter = configuration.lora_config(settings) if isinstance(settings, LoraSettings) else None
    found = training.Rows(rows, rows[:1], [], {})
    trainer = training.build_trainer(
        model_of(shape, plan.dtype), a_tokenizer(), found, config, {}, (), adapter, plan.in_backward
    )
    trainer.remove_callback(trainer.progress_bar)
    return trainer, {"plan": str(plan), "planned_gib": plan.total / planner.GIB}


def original(
    shape: str, method: str, rows: list, folder: Path, settings: TrainSettings, device: Any
) -> tuple[Any, dict[str, Any]]:
    """The original scripts' trainer."""
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    dtype = torch.bfloat16 if device.type == "cuda" or has_fast_bf16() else torch.float32
    model = model_of(shape, dtype)
    model.enable_input_require_grads()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=names, task_type="CAUSAL_LM")
        )
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation_steps, max_steps=settings.max_steps, learning_rate=1e-4, logging_steps=1, activation_checkpointing=True, save_strategy="no",
        report_to="none", use_cpu=device.type == "cpu", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer=a_tokenizer(), padding=True),
    )
    return trainer, {"weights": str(dtype).removeprefix("torch.")}


def table(results: dict[str, Any]) -> str:
    """The figures as docs/training.md shows them."""
    runs = results["runs"]
    fp32 = any(run.get("weights") == "float32" for run in runs)
    name = "原教程" + ("（这里的 CPU 没有 bf16，给了它 fp32 权重）" if fp32 else "")
    lines = [f"| {results['machine']}，{results['device']} | {name} | 我们 | 倍数 | 目标 |", "|---|---|---|---|---|"]
    labels = {"256": "隐藏层 256", "full": "全参数", "lora": "LoRA"}
    peaks = {"resident": "内存峰值", "gpu_allocated": "显存峰值（分配）", "gpu_reserved": "显存峰值（保留）"}
    aims = AIMS["cpu" if results["device"] == "cpu" else "cuda"]
    for shape, method in dict.fromkeys((run["shape"], run["method"]) for run in runs):
        mine = [run for run in runs if (run["shape"], run["method"]) == (shape, method)]
        label = f"{labels.get(shape, 'Qwen3-' + shape)}，{labels[method]}"
        by_card = {
            card: [run for run in mine if run["card"] == card] for card in dict.fromkeys(r["card"] for r in mine)
        }
        both = {recipe: [run for run in by_card[""] if run["recipe"] == recipe] for recipe in (ORIGINAL, OURS)}
        failed = [run for run in mine if "failed" in run]
        lines += [f"| {label}：{run['recipe']} {run['card']} | 失败：{run['failed']} | | | |" for run in failed]
        if not failed or not any(run["card"] == "" for run in failed):
            speed = {each: statistics.median(run["tokens_per_second"] for run in both[each]) for each in both}
            aim = f"≥ {aims[shape]}×" if shape in aims else "–"
            lines.append(
                f"| {label}：token/s | {speed[ORIGINAL]:,.1f} | {speed[OURS]:,.1f} | "
                f"**{speed[OURS] / speed[ORIGINAL]:.2f}×** | {aim} |"
            )
            for kind in both[OURS][0]["peak_gib"]:
                peak = {each: max(run["peak_gib"][kind] for run in both[each]) for each in both}
                lines.append(
                    f"| {label}：{peaks[kind]}，GiB | {peak[ORIGINAL]:.2f} | {peak[OURS]:.2f} | "
                    f"{peak[OURS] / peak[ORIGINAL]:.2f}× | – |"
                )
            planned = both[OURS][0]
            measured = next(iter(planned["peak_gib"].values()))
            lines.append(
                f"| {label}：计划 → 实测，GiB（{planned['plan']}） | | {planned['planned_gib']:.2f} → {measured:.2f} | "
                f"{measured / planned['planned_gib'] - 1:+.0%} | {'–' if kind == 'resident' else '±10%'} |"
            )
            if planned.get("mfu"):
                lines.append(f"| {label}：MFU | | {planned['mfu']:.0%} | | {'≥ 35%' if shape == '0.6B' else '–'} |")
        for card, (run, *_) in by_card.items():
            if card and "failed" not in run:
                peak = run["peak_gib"]["gpu_allocated"]
                lines.append(
                    f"| {label}，限在 {card} 的卡里：显存峰值，GiB（{run['plan']}；{run['tokens_per_second']:,.0f} token/s） | | "
                    f"{peak:.2f} | 计划 {run['planned_gib']:.2f} | ≤ {PEAKS[shape, method]} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
