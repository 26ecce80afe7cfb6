"""What each lever of the training does, one by one, on a CPU: `make bench-levers` (about 3 minutes).

    python benchmarks/levers.py

- the output layer's memory and time at Qwen3's vocabulary: chunked against whole logits, against torch's own chunks, and
  in bf16 where the CPU has it (resident set, a process each)
- packing: how full the rows are on the real sample, and the loss of a packed row against its samples alone
- 8-bit AdamW (torchao): bytes of its states, and how many bf16 weights move in a step, with and without stochastic
  rounding; torch.compile is switched off for it, which changes no number

Results: benchmarks/results/levers.json and docs/training.md.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from assistant import put_between, where  # noqa: E402
from training import has_fast_bf16  # noqa: E402

from qwenmed import files, shapes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "levers.json"
DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- bench-levers: make bench-levers -->", "<!-- /bench-levers -->"
LENGTH = 2048
LEARNING_RATE = 1e-5


def main() -> None:
    """Measure each in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=sorted(MEASURES))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(MEASURES[args.one]()))
        return
    results: dict[str, Any] = {name: in_a_process(name) for name in MEASURES} | where()
    files.write_json(RESULTS, results)
    put_between(DOCUMENT, BEGIN, END, table(results))
    print(table(results))


def in_a_process(name: str) -> dict[str, Any]:
    """One measure in a fresh process; torchao lies apart, since importing it costs every start half a second."""
    path = os.pathsep.join(filter(None, (str(ROOT / ".cache" / "quant"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(name, found, file=sys.stderr, flush=True)
    return found


def head_whole() -> dict[str, float]:
    """Peak and time of the loss over whole logits."""
    from torch.nn import functional

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        logits = functional.linear(hidden, weight)[:, :-1].float()
        return functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
        )

    return _head(loss)


def head_chunked() -> dict[str, float]:
    """Peak and time of ours."""
    from qwenmed.head import completion_loss

    return _head(completion_loss)


def head_of_torch() -> dict[str, float]:
    """Peak and time of torch's own chunks, of as many rows."""
    from torch.nn import LinearCrossEntropyOptions, functional

    from qwenmed.hardware import HEAD_ROWS

    options = LinearCrossEntropyOptions(batch_chunk_size=HEAD_ROWS, chunking_method=None)

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        return functional.linear_cross_entropy(
            hidden[0, :-1], weight, labels[0, 1:], reduction="sum", options=options, ignore_index=-100
        )

    return _head(loss)


def head_in_bf16() -> dict[str, float]:
    """Peak and time of ours under mixed precision; nothing on a CPU that would take minutes."""
    import torch

    from qwenmed.head import completion_loss

    if not has_fast_bf16():
        return {}
    with torch.autocast("cpu", torch.bfloat16):
        return _head(completion_loss)


def _head(loss: Any) -> dict[str, float]:
    import time

    import torch

    shape = shapes.known("Qwen/Qwen3-0.6B")
    assert shape is not None
    torch.manual_seed(0)
    hidden = torch.randn(1, LENGTH, shape.width, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(shape.words, shape.width) * 0.02)
    labels = torch.randint(0, shape.words, (1, LENGTH))
    labels[:, :60] = -100  # a prompt
    loss(hidden[:, :8], weight, labels[:, 56:64]).backward()  # warms up
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, started = _resident("VmRSS"), time.perf_counter()
    found = loss(hidden, weight, labels)
    found.backward()
    return {
        "peak_gib": (_resident("VmHWM") - before) / 2**30,
        "seconds": time.perf_counter() - started,
        "loss": found.item() / (LENGTH - 60),
    }


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {name} on this system")


def packing() -> dict[str, float]:
    """How full packed rows of the real sample are, with the real tokenizer."""
    from conftest import REAL_SAMPLE
    from datasets import Dataset
    from test_real_sample import CACHE, build_real_tokenizer
    from trl import pack_dataset

    from prompts import GENERAL_PROMPT
    from qwenmed import chat, checkpoints, sources

    tokenizer = checkpoints.load_tokenizer(build_real_tokenizer(CACHE))
    ids = [
        chat.render_sample(tokenizer, chat.training_row(record, GENERAL_PROMPT))[0]
        for record in sources.read_clean_records(REAL_SAMPLE)
    ]
    found: dict[str, float] = {}
    for length in (LENGTH, 2 * LENGTH):
        fitting = [row for row in ids if len(row) <= length]
        packed = pack_dataset(Dataset.from_dict({"input_ids": fitting}), length, strategy="bfd")
        found |= {"samples": len(fitting), f"rows_{length}": len(packed)}
        found[f"filled_{length}"] = sum(map(len, fitting)) / (len(packed) * length)
    return found


def packed_loss() -> dict[str, float]:
    """The loss of a packed row against that of its samples, each alone; a random model of the demo's size, fp32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from qwenmed.head import completion_loss

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=5000, hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config)
    lengths = [700, 300, 900, 148]
    samples = [torch.randint(0, 5000, (1, length)) for length in lengths]

    def loss(ids: Any, places: Any, starts: set[int]) -> Any:
        labels = ids.clone()
        for start in starts:
            labels[:, start] = -100  # the first token of a sample has none before it
        hidden = model.base_model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        return completion_loss(hidden, model.lm_head.weight, labels)

    def gradient() -> Any:
        found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        model.zero_grad()
        return found

    alone = sum(loss(ids, torch.arange(ids.shape[1])[None], {0}) for ids in samples)
    alone.backward()
    of_alone = gradient()
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = {sum(lengths[:number]) for number in range(len(lengths))}
    together = loss(torch.cat(samples, dim=1), places, starts)
    together.backward()
    of_together = gradient()
    return {
        "loss_difference": abs(together.item() / alone.item() - 1),
        "gradient_difference": ((of_together - of_alone).norm() / of_alone.norm()).item(),
    }


def rounding() -> dict[str, Any]:
    """Weights of a bf16 layer that move in one step at a learning rate of 1e-5, and the bytes of the states."""
    import torch
    from torchao.optim import AdamW8bit

    found: dict[str, Any] = {}
    for name, optimizer in {
        "adamw_bf16": lambda weights: torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.0),
        "nearest": lambda weights: AdamW8bit(weights, LEARNING_RATE, weight_decay=0.0),
        "stochastic": lambda weights: AdamW8bit(weights, LEARNING_RATE, weight_decay=0.0, bf16_stochastic_round=True),
    }.items():
        torch.manual_seed(0)
        weight = torch.nn.Parameter((torch.randn(2048, 2048) * 0.02).bfloat16())  # Qwen3's initializer_range
        exact, steps = weight.detach().float(), optimizer([weight])
        for _ in range(10):
            weight.grad = torch.randn_like(weight) * 1e-3
            before = weight.detach().clone()
            steps.step()
        moved = (weight != before).float().mean().item()
        state = steps.state[weight]
        stored = sum(_bytes(value) for value in state.values() if value.dim())
        drift = (weight.detach().float() - exact).abs().mean().item()
        found[name] = {"moved": moved, "bytes_per_parameter": stored / weight.numel(), "drift": drift}
    return found


def _bytes(state: Any) -> int:
    codes = getattr(state, "codes", None)
    if codes is None:
        return state.numel() * state.element_size()
    return codes.numel() + state.scale.numel() * state.scale.element_size()


MEASURES = {
    "head_whole": head_whole,
    "head_chunked": head_chunked,
    "head_of_torch": head_of_torch,
    "head_in_bf16": head_in_bf16,
    "packing": packing,
    "packed_loss": packed_loss,
    "rounding": rounding,
}


def table(results: dict[str, Any]) -> str:
    """The figures as docs/training.md shows them."""
    whole, chunked, filled = results["head_whole"], results["head_chunked"], results["packing"]
    ratio, off = chunked["peak_gib"] / whole["peak_gib"], abs(chunked["loss"] / whole["loss"] - 1)
    packed, moved = results["packed_loss"], results["rounding"]
    heads = [whole, results["head_of_torch"], chunked, results["head_in_bf16"]]
    times = "、".join(f"{head['seconds']:.1f}" if head else "没有量" for head in heads)
    eight = moved["stochastic"]["bytes_per_parameter"]
    return "\n".join(
        [
            f"| {results['machine']}，{results['device']} | 实测 | 目标 |",
            "|---|---|---|",
            f"| 输出层的内存峰值，{LENGTH} 个 token：整个 logits → 分块 | {whole['peak_gib']:.2f} → {chunked['peak_gib']:.2f} GiB，**{ratio:.2f}×**，"
            f"用时 {chunked['seconds'] / whole['seconds']:.2f}× | ≤ 0.35× |",
            f"| 输出层的用时，秒：整个 logits、torch 的分块、我们的、我们的 bf16 | {times} | – |",
            f"| 损失，分块与不分块 | 相差 {off:.0e} | ≤ 1e-5 |",
            f"| 拼接填满的比例（真实样本 {filled['samples']} 条，整条地放），行长 {LENGTH}、{2 * LENGTH} | "
            f"**{filled[f'filled_{LENGTH}']:.1%}**、{filled[f'filled_{2 * LENGTH}']:.1%} | ≥ 95% |",
            f"| 拼接与逐条：损失、梯度 | 相差 {packed['loss_difference']:.0e}、{packed['gradient_difference']:.0e} | ≤ 1e-5 |",
            f"| 8 位 AdamW 的状态，每个参数的字节 | {eight:.3f} | 计划 {2 * (1 + 4 / 256):.3f} |",
            f"| 学习率 1e-5 时一步里动了的 bf16 权重：AdamW、8 位 AdamW、8 位 AdamW 加随机舍入 | "
            f"{moved['adamw_bf16']['moved']:.1%}、{moved['nearest']['moved']:.1%}、**{moved['stochastic']['moved']:.1%}** | – |",
        ]
    )


if __name__ == "__main__":
    main()
