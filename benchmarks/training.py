"""Our training against the original recipe, alternately on the same rows: `make bench-train` (about 20 minutes on 2 cores).

    python benchmarks/training.py [--shapes 256,0.6B] [--methods full,lora] [--rounds 1]

The original recipe is what the tutorial scripts do: transformers' Trainer, one row at a time, four of them
accumulated, whole logits, activation checkpointing, bf16 weights and optimizer states, no packing; LoRA r=8, alpha=32,
dropout 0.1. Ours is what `train.py` and `train_lora.py` do on this machine by themselves, with the same four rows a
step. Models have random weights and the true vocabulary: "0.6B" is Qwen3-0.6B's shape, "256" a small one. Rows are
random tokens of the real data's lengths (median 764, 95th percentile 1,111, at most 3,151 tokens).

Each run is a process of its own. Measured: tokens per second (padding does not count) over the optimizer steps, and
the peak: the resident set of the process on a CPU, allocated and reserved on a GPU. Nothing is downloaded.
Results: benchmarks/results/training.json and docs/training.md.
"""

import argparse
import json
import math
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

from assistant import where  # noqa: E402

from qwenmed import files, hardware, training  # noqa: E402
from qwenmed.settings import LoraSettings, TrainSettings  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "training.json"
DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- bench-train: make bench-train -->", "<!-- /bench-train -->"
OURS, ORIGINAL = "ours", "original"
ACCUMULATED, PROMPT = 4, 60
# Optimizer steps that are measured; one more before them warms up, except where a step takes minutes.
STEPS = {"256": (2, 1), "0.6B": (1, 0)}
AIMS = {("256", "full"): 2.0, ("256", "lora"): 2.0, ("0.6B", "full"): 1.8, ("0.6B", "lora"): 1.8}


def main() -> None:
    """Measure everything in turns, or, in a process of its own, one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="256,0.6B")
    parser.add_argument("--methods", default="full,lora")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", nargs=3, metavar=("RECIPE", "SHAPE", "METHOD"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    check_bf16()
    results: dict[str, Any] = {"runs": []}
    for shape in args.shapes.split(","):
        for method in args.methods.split(","):
            for number in range(args.rounds):
                for recipe in (ORIGINAL, OURS) if number % 2 == 0 else (OURS, ORIGINAL):
                    results["runs"].append(in_a_process(recipe, shape, method))
                    print(results["runs"][-1], file=sys.stderr, flush=True)
    results |= where()
    files.write_json(RESULTS, results)
    if BEGIN in DOCUMENT.read_text(encoding="utf-8"):
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
        files.write_whole({DOCUMENT: f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"})
    print(table(results))


def check_bf16() -> None:
    """Refuse a CPU that has no bf16: there the original recipe takes hours, and the ratio would say nothing.

    Measured on an AVX2 machine: the backward pass of the head took 315 s in bf16 and 2 s in fp32.
    """
    import torch

    if hardware.pick_device().type != "cpu":
        return
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for dtype in [*seconds] * 2:  # the first time warms up
        left, right = (torch.ones(256, size, dtype=dtype, requires_grad=True) for size in (64, 2048))
        started = time.perf_counter()
        (left.T @ right).sum().backward()
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    if seconds[torch.bfloat16] > 6 * seconds[torch.float32]:
        raise SystemExit("This CPU has no bf16 of its own: the original recipe can not be measured here.")


def in_a_process(recipe: str, shape: str, method: str) -> dict[str, Any]:
    """One run in a fresh process, so that its peak is its own."""
    command = [sys.executable, __file__, "--one", recipe, shape, method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def one(recipe: str, shape: str, method: str) -> dict[str, Any]:
    """Train some steps; tokens per second and the peak."""
    import torch

    device = hardware.pick_device()
    steps, warm = STEPS[shape]
    rows = make_rows(ACCUMULATED * (steps + warm))
    with tempfile.TemporaryDirectory() as folder:
        build = ours if recipe == OURS else original
        trainer = build(shape, method, rows, Path(folder), steps + warm, device)
        clock = stopwatch(warm)
        trainer.add_callback(clock)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            hardware.keep_freed_memory()
        trainer.train()
    # The trainer shuffles: of the rows it took its share is what counts, not which ones.
    tokens = sum(len(row["input_ids"]) for row in rows) * steps / (steps + warm)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "recipe": recipe, "shape": shape, "method": method, "tokens": round(tokens), "seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds, "peak_gib": hardware.peak_memory_gib(device), "first_loss": losses[0],
    }  # fmt: skip


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
        length = min(3151, max(2 * PROMPT, round(dice.lognormvariate(math.log(764), spread))))
        ids = [dice.randrange(151_643) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:]})
    return rows


def model_of(shape: str, dtype: Any) -> Any:
    """A model of a shape with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                 "num_key_value_heads": 8, "head_dim": 128},
        "256": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 64},
    }[shape]  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=151_936, max_position_embeddings=40_960, tie_word_embeddings=True, **sizes)
    config._attn_implementation = "sdpa"
    return Qwen3ForCausalLM(config).to(dtype)


def ours(shape: str, method: str, rows: list, folder: Path, steps: int, device: Any) -> Any:
    """The trainer that our scripts build, over rows that are tokens already."""
    from qwenmed import checkpoints

    kind = LoraSettings if method == "lora" else TrainSettings
    settings = kind(
        max_length=4096, max_steps=steps, batch_size=1, gradient_accumulation_steps=ACCUMULATED, logging_steps=1,
        eval_steps=steps, best_by="last",
    )  # fmt: skip
    parameters = 751_632_384 if shape == "0.6B" else 0
    precision = hardware.lora_precision(device) if method == "lora" else hardware.full_precision(device, parameters)
    config = configuration.sft_config(settings, folder, device, precision.autocast)
    config.eval_strategy = config.save_strategy = "no"
    model = model_of(shape, precision.weights)
    tokenizer = checkpoints.load_tokenizer(ROOT / ".cache" / "qwen3-tokenizer")
    adapter = configuration.lora_config(settings) if isinstance(settings, LoraSettings) else None
    trainer = training.build_trainer(
        model, tokenizer, training.Rows(rows, rows[:1], [], {}), config, {}, peft_config=adapter
    )
    trainer.remove_callback(trainer.progress_bar)
    return trainer


def original(shape: str, method: str, rows: list, folder: Path, steps: int, device: Any) -> Any:
    """The original scripts' trainer."""
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from qwenmed import checkpoints

    model = model_of(shape, torch.bfloat16)
    model.enable_input_require_grads()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=names, task_type="CAUSAL_LM")
        )
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=ACCUMULATED,
        max_steps=steps, learning_rate=1e-4, logging_steps=1, activation_checkpointing=True, save_strategy="no",
        report_to="none", use_cpu=device.type == "cpu", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = checkpoints.load_tokenizer(ROOT / ".cache" / "qwen3-tokenizer")
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
    )


def table(results: dict[str, Any]) -> str:
    """The figures as docs/training.md shows them."""
    lines = [f"| {results['machine']}，{results['device']} | 原教程 | 我们 | 倍数 | 目标 |", "|---|---|---|---|---|"]
    kinds = dict.fromkeys((run["shape"], run["method"]) for run in results["runs"])
    for shape, method in kinds:
        of = {
            recipe: [
                run
                for run in results["runs"]
                if (run["recipe"], run["shape"], run["method"]) == (recipe, shape, method)
            ]
            for recipe in (ORIGINAL, OURS)
        }
        speed = {recipe: statistics.median(run["tokens_per_second"] for run in runs) for recipe, runs in of.items()}
        name = (
            {"256": "隐藏层 256", "0.6B": "Qwen3-0.6B 的形状"}[shape]
            + "，"
            + {"full": "全参数", "lora": "LoRA"}[method]
        )
        ratio, aim = speed[OURS] / speed[ORIGINAL], AIMS[shape, method]
        lines.append(f"| {name}：token/s | {speed[ORIGINAL]:,.1f} | {speed[OURS]:,.1f} | **{ratio:.2f}×** | ≥ {aim}× |")
        for kind in of[OURS][0]["peak_gib"]:
            peak = {recipe: max(run["peak_gib"][kind] for run in runs) for recipe, runs in of.items()}
            label = {"resident": "内存峰值", "gpu_allocated": "显存峰值（分配）", "gpu_reserved": "显存峰值（保留）"}[
                kind
            ]
            ratio = peak[OURS] / peak[ORIGINAL]
            lines.append(f"| {name}：{label}，GiB | {peak[ORIGINAL]:.2f} | {peak[OURS]:.2f} | {ratio:.2f}× | – |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
