"""The memory plan against a count of every operation of a step, with no weights and no GPU: `make bench-plan` (8 minutes).

    python benchmarks/plan.py

torch's MemTracker follows a training step over fake tensors: forward, loss, backward, with gradients and optimizer
states there, as in every step but the first. Peaks of 2 and 6 layers are counted and extended to all layers, along
which memory grows evenly; one plan is counted with all 28 layers as a check. The output layer's loss is TRL's GPU
kernel, replaced here by one that takes the same blocks. A tied model's word embeddings get two gradients; the tracker
adds them out of place, autograd in place (measured: 2.0 of their size, not 3), so that part is left out of the count
and of the comparison where it would be the peak.

Not counted, not measured: what CUDA's allocator and cuBLAS add. On a GPU every run compares by itself: "2 步之后".
Results: benchmarks/results/plan.json and docs/training.md.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from assistant import put_between, where  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402

from qwenmed import files, planner, shapes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- bench-plan: make bench-plan -->", "<!-- /bench-plan -->"
RANK = 16
GPU = planner.Card("cuda", 2**40, True, "any")
# (LoRA, weights, optimizer, layers of which one is computed again)
WAYS = [
    (False, "fp32", "adamw", 0),
    (False, "fp32", "adamw", 1),
    (False, "bf16", "adamw_8bit", 2),
    (False, "bf16", "adamw_8bit", 1),
    (True, "bf16", "adamw", 0),
    (True, "bf16", "adamw", 1),
]
MODELS, LENGTHS, FEW = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"), (512, 2048), (2, 6)
WHOLE = ("Qwen/Qwen3-0.6B", (False, "bf16", "adamw_8bit", 1), 2048)


def main() -> None:
    """Count, compare, write."""
    nothing_to_hook()
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        for way in WAYS:
            for tokens in LENGTHS:
                rows.append(compare(model, way, tokens))
                print(json.dumps(rows[-1], ensure_ascii=False), file=sys.stderr, flush=True)
    model, way, tokens = WHOLE
    shape = shapes.known(model)
    assert shape is not None
    whole = peak(shape, plan_of(way, tokens)) / planner.GIB
    results = {"rows": rows, "whole": {"model": model, "counted_gib": whole}} | where()
    files.write_json(RESULTS, results)
    put_between(DOCUMENT, BEGIN, END, table(results))
    print(table(results))


def compare(model: str, way: tuple, tokens: int) -> dict[str, Any]:
    """What is planned and what is counted for one way to train."""
    shape = shapes.known(model)
    assert shape is not None
    plan, started = plan_of(way, tokens), time.perf_counter()
    few, more = (peak(dataclasses.replace(shape, layers=layers), plan) for layers in FEW)
    counted = more + (more - few) / (FEW[1] - FEW[0]) * (shape.layers - FEW[1])
    parts = planner.parts(shape, plan, GPU, RANK if plan.lora else None)
    return {
        "model": model, "plan": str(plan), "tokens": tokens, "planned_gib": sum(parts.values()) / planner.GIB,
        "counted_gib": counted / planner.GIB, "seconds": round(time.perf_counter() - started),
    }  # fmt: skip


def plan_of(way: tuple, tokens: int) -> planner.Plan:
    """The plan of one of WAYS."""
    lora, weights, optimizer, every = way
    return planner.Plan(lora, weights, "bf16", optimizer, False, every, tokens, {})


def peak(shape: shapes.Shape, plan: planner.Plan) -> int:
    """Bytes at the peak of a step that is not the first, by torch's own count."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(shape, plan)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        states = [state for weight in trained for state in states_of(weight, plan)]
        tracker = MemTracker()
        tracker.track_external(model, *states)
        with tracker:
            for _ in range(2):  # the second finds the gradients of the first
                tracker.reset_mod_stats()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    ids = torch.zeros(1, plan.tokens, dtype=torch.long)
                    places = torch.arange(plan.tokens)[None]
                    hidden = model.base_model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
                    loss = HeadBlocks.apply(hidden.reshape(-1, shape.width), model.get_output_embeddings().weight)
                del hidden
                loss.backward()
                del loss
        (found,) = tracker.get_tracker_snapshot("peak").values()
        return found["Total"]


def fake_model(shape: shapes.Shape, plan: planner.Plan) -> Any:
    """The model without memory behind it, ready for a step of the plan."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.words, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.queries // shape.head, num_key_value_heads=shape.keys // shape.head,
        head_dim=shape.head, tie_word_embeddings=shape.tied, max_position_embeddings=40_960,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(plan.dtype)  # `.to()` fails on fake tensors
    try:
        model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if plan.lora:
        for weight in model.parameters():
            weight.requires_grad_(False)
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(part, name, Adapted(linear))
        model.enable_input_require_grads()
    else:
        words = model.model.embed_tokens.weight
        model.model.embed_tokens.forward = lambda ids: nn.functional.embedding(ids, words.detach()).requires_grad_()
    if plan.checkpoint_every:
        model.activation_checkpointing_enable(every_n_layers=plan.checkpoint_every)
    return model.train()


def states_of(weight: torch.Tensor, plan: planner.Plan) -> list[torch.Tensor]:
    """The optimizer's two states of a weight."""
    if plan.optimizer == "adamw":
        return [torch.zeros_like(weight), torch.zeros_like(weight)]
    return [torch.zeros(round(weight.numel() * planner.STATE_BYTES_8BIT), dtype=torch.uint8) for _ in range(2)]


class Adapted(nn.Module):
    """A frozen linear layer with peft's LoRA beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, RANK, bias=False, dtype=torch.float32)
        self.b = nn.Linear(RANK, base.out_features, bias=False, dtype=torch.float32)
        self.dropout = nn.Dropout(0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of both, as peft computes it."""
        return self.base(x) + self.b(self.a(self.dropout(x.to(torch.float32)))) * 2.0


class HeadBlocks(torch.autograd.Function):
    """Takes the memory that TRL's output layer takes on a GPU (trl/kernels/chunked_logprob.py), and computes nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Take the tile; give any scalar that hangs on the hidden states."""
        ctx.save_for_backward(hidden, weight)
        HeadBlocks.score(hidden, weight)
        return hidden.float().sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Take the gradients in fp32, as the kernel does, then those in the weights' types."""
        hidden, weight = ctx.saved_tensors
        for_hidden = torch.zeros(hidden.shape, dtype=torch.float32)
        for_weight = torch.zeros(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        tile = HeadBlocks.score(hidden, weight)
        found = for_hidden.to(hidden.dtype), None if for_weight is None else for_weight.to(weight.dtype)
        del tile
        return found

    @staticmethod
    def score(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The tile of logits, and the slices of the weight on their way to bf16."""
        tile = torch.empty(min(planner.HEAD_MOST_ROWS, len(hidden)), planner.HEAD_COLUMNS, dtype=torch.bfloat16)
        for start in range(0, len(weight), planner.HEAD_COLUMNS):
            part = weight[start : start + planner.HEAD_COLUMNS].to(torch.bfloat16)  # noqa: F841
        return tile


def nothing_to_hook() -> None:
    """The tracker hooks every parameter, frozen ones as well, which torch refuses."""

    class NoHook:
        def remove(self) -> None:
            """Nothing was hooked."""

    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        hook = getattr(torch.Tensor, name)
        replacement = lambda self, call, hook=hook: hook(self, call) if self.requires_grad else NoHook()  # noqa: E731
        setattr(torch.Tensor, name, replacement)


def table(results: dict[str, Any]) -> str:
    """The comparison as docs/training.md shows it."""
    lines = ["| 做法 | token | 计划 | 逐个操作数出来的 | 差 |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        off = row["planned_gib"] / row["counted_gib"] - 1
        name = f"{row['model'].rpartition('/')[2]}：{row['plan']}"
        lines.append(f"| {name} | {row['tokens']} | {row['planned_gib']:.2f} | {row['counted_gib']:.2f} | {off:+.1%} |")
    worst = max(abs(row["planned_gib"] / row["counted_gib"] - 1) for row in results["rows"])
    lines.append(
        f"\n最大相差 {worst:.1%}。计划和数出来的都是**计算值**（GiB），没有在 GPU 上测过；2 层与 6 层数出来，按层外推到 28 层"
        f"（0.6B 的一项 28 层全数过：{results['whole']['counted_gib']:.2f}）。"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
