"""What a training step holds in memory, and the settings with which it fits: computed, before any weight is loaded.

A step's peak is what stays (weights, gradients, optimizer states) and the largest of what comes and goes: the output
layer's gradient beside all kept activations, one layer that is computed again beside its own gradients, or the
gradient of the word embeddings, which a tied model gets from both of its ends. The first is exact. Bytes per token
and layer depend on how the layers are written; they were counted operation by operation with torch's MemTracker for
the shapes of Qwen3-0.6B and 1.7B (`make bench-plan` counts again and writes the comparison to docs/training.md).
Not in the figures: what the allocator loses between blocks (`SLACK`), and the CUDA context (`CONTEXT`).

No plan has pure fp16 weights: AdamW gives NaN in one step (Qwen3#670). GPUs without native bf16 train fp32 weights under
fp16 mixed precision; a CPU trains in fp32, or in bf16 mixed precision where that is clearly faster (those with AMX are).

Plans are tried in the order in which they cost quality or time: fp32 master weights before bf16 ones, plain AdamW
before 8-bit states, fewer checkpointed layers before more, updating within the backward pass last, because it gives up
accumulation and clipping.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenmed import hardware, processes
from qwenmed.errors import UserError
from qwenmed.hardware import HEAD_ROWS
from qwenmed.settings import LoraSettings, TrainSettings
from qwenmed.shapes import QWEN3, Shape, known

if TYPE_CHECKING:
    import torch

GIB = 2**30
# Taken by the CUDA context, cuBLAS and the kernels; not torch's to give.
CONTEXT = 600 * 2**20
# The interpreter, torch and transformers in a process on a CPU.
PROCESS = 800 * 2**20
# What the CPU's matrix library (oneDNN) keeps besides in bf16, for every shape that it has met; measured: 0.5 GiB for a
# model of 42 M parameters, 1.5 to 2.5 for Qwen3-0.6B.
ONEDNN = 2 * GIB
# The share of the memory that a plan may fill: the allocator's blocks never fit without gaps.
SLACK = 0.95
# A computed figure may be a tenth off: what is so little too large is tried all the same.
NEARLY = 1.1
# Columns of the vocabulary that TRL's output layer scores at a time (trl.trainer.utils), and at most so many rows.
HEAD_COLUMNS, HEAD_MOST_ROWS = 32_768, 4096
# Bytes that TRL's output layer takes for each of these values besides, where torch does Triton's work.
HEAD_FALLBACK = 29
# torchao quantises states in blocks of 256 with a scale each.
STATE_BYTES_8BIT = 1 + 4 / 256
# Bytes of an NF4 weight: four bits, and scales that are quantised themselves.
NF4_BYTES = 0.516
# Bytes that a token leaves in a layer for the backward pass, per unit of the hidden size, of queries and keys together,
# and of the feed-forward part. By (weights, mixed precision, LoRA); counted, see above.
_LAYER = {
    ("fp32", True, False): (25, 13, 8),
    ("bf16", True, False): (17, 12.4, 8),
    ("fp32", False, False): (23, 21.7, 16),
    ("bf16", True, True): (41, 14.8, 11),
    ("fp32", True, True): (49, 15.5, 11),
    ("fp32", False, True): (40, 25, 22),
}
# What is kept around the layers (embeddings, last norm, rotary tables), in hidden states.
_ENDS = {"fp32": 4.6, "bf16": 6.0}
# A layer that is computed again, and the gradients on their way through it, as a multiple of what it leaves.
_BACKWARD = 1.3
# Of how many layers one is computed again in the backward pass; 0: none.
EVERY = (0, 4, 3, 2, 1)


@dataclass(frozen=True)
class Card:
    """What a training would run on.

    Attributes:
        kind: "cuda", "cpu" or "mps".
        room: bytes that a training may take.
        bf16: whether it computes natively in bf16.
        name: for people.
        shards: cards among which weights, gradients and optimizer states are split (FSDP).
        triton: whether a GPU has Triton, by which TRL's output layer needs little.
    """

    kind: str
    room: int
    bf16: bool
    name: str
    shards: int = 1
    triton: bool = True


@dataclass(frozen=True)
class Plan:
    """One way to train, and the memory that it needs.

    Attributes:
        weights: type of the weights that are stored: "fp32", "bf16" or "nf4" (frozen, four bits).
        autocast: "bf16", "fp16" or None.
        optimizer: "adamw" or "adamw_8bit".
        in_backward: each weight is updated as soon as its gradient is there, which then is freed.
        checkpoint_every: of so many layers one is computed again in the backward pass; 0: none.
        tokens: in one forward pass.
        parts: bytes by kind, at the peak.
    """

    lora: bool
    weights: str
    autocast: str | None
    optimizer: str
    in_backward: bool
    checkpoint_every: int
    tokens: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def dtype(self) -> "torch.dtype":
        """The type to load the weights in."""
        import torch

        if self.weights == "fp32":
            return torch.float32
        return torch.float16 if self.autocast == "fp16" else torch.bfloat16

    @property
    def needs_torchao(self) -> bool:
        """Whether the optimizer is torchao's."""
        return self.optimizer == "adamw_8bit"

    def __str__(self) -> str:
        kinds = {"fp32": "fp32", "bf16": "bf16", "nf4": "4 位（NF4）"}
        # trl.SFTTrainer keeps the adapters of a quantised model in bf16, build_trainer in fp32 where that is no use.
        adapters = "bf16" if self.weights == "nf4" and self.autocast == "bf16" else "fp32"
        what = f"{kinds[self.weights]} 冻结权重 + {adapters} LoRA 权重" if self.lora else f"{kinds[self.weights]} 权重"
        if not self.lora and self.weights == "bf16":
            what += "（随机舍入）" if self.needs_torchao else "（小的更新会被舍入掉）"
        words = [what, {"adamw": "AdamW", "adamw_8bit": "8 位 AdamW"}[self.optimizer]]
        if self.autocast:
            words.append(f"{self.autocast} 自动混合精度")
        if self.in_backward:
            words.append("反向传播时更新（不累积、不裁剪）")
        layers = {0: "不重算激活", 1: "每层重算激活"}
        words.append(layers.get(self.checkpoint_every, f"每 {self.checkpoint_every} 层重算一层的激活"))
        return "，".join(words)


# What two plans must share for the optimizer states of the one to serve the other.
STATES = ("weights", "optimizer", "in_backward")


def described(plan: Plan | None) -> dict[str, Any]:
    """What a checkpoint says of the plan that it was trained by."""
    return {name: getattr(plan, name) for name in (*STATES, "autocast")} if plan else {}


def shares_states(plan: Plan | None, before: Mapping[str, Any]) -> bool:
    """Whether a plan can go on with the optimizer states of a checkpoint that was trained by `before`."""
    return all(getattr(plan, name, None) == before.get(name) for name in STATES)


def memory(text: str) -> int:
    """Bytes of a card's size as people write it: 12, 12GB, 11.6GiB; GB counts as GiB, as on the cards' boxes.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GIB)?\s*", text, re.IGNORECASE)
    if not match or not 1 <= float(match[1]) <= 1024:
        raise UserError(f"--gpu-memory 的值 {text!r} 不合适", None, "请写成 12GB 这样，1 到 1024 之间")
    return int(float(match[1]) * GIB)


def imagined_card(size: int, bf16: bool = True, triton: bool = True) -> Card:
    """A GPU of so many bytes that need not be there."""
    kind = "有原生 bf16" if bf16 else "没有原生 bf16"
    name = f"{size / GIB:g} GiB 的显卡（{kind}）"
    return Card("cuda", int((size - CONTEXT) * SLACK), bf16, name, triton=triton)


def plans(shape: Shape, settings: TrainSettings, card: Card, tokens: int) -> list[Plan]:
    """All ways to train that the settings leave open, best first.

    Args:
        tokens: in one forward pass: rows times their length.

    Raises:
        UserError: they leave none on this card.
    """
    found = []
    lora = isinstance(settings, LoraSettings)
    for weights, optimizer, in_backward in _kinds(settings, card):
        for every in _every(settings):
            bare = Plan(lora, weights, _autocast(card), optimizer, in_backward, every, tokens, {})
            found.append(dataclasses.replace(bare, parts=parts(shape, bare, card, _rank(settings))))
    if not found:
        raise _refusal(settings, card)
    return found


def _refusal(settings: TrainSettings, card: Card) -> UserError:
    """Why the settings leave no plan on this card."""
    if isinstance(settings, LoraSettings) and settings.quantize and card.kind != "cuda":
        return UserError("--quantize 需要 NVIDIA GPU", None, "请去掉 --quantize")
    if settings.optimizer_in_backward == "on" and processes.count() > 1:
        return UserError("--optimizer-in-backward on 只能用于一个进程", None, "请去掉它，或不用 accelerate launch")
    if settings.weights == "bf16" and card.bf16 and card.shards > 1:
        return UserError("FSDP 把要训练的 bf16 权重都换成 fp32", None, "请去掉 --weights bf16")
    what = "--weights、--optimizer、--optimizer-in-backward 不能这样合在一起"
    return UserError(what, card.name, "bf16 权重和反向时更新需要有原生 bf16 的 GPU（Ampere 及以后）")


def choose(shape: Shape, settings: TrainSettings, card: Card, tokens: int, torchao: bool) -> list[Plan]:
    """The plan to train with, and behind it those to step down to; each needs less than the one before.

    Args:
        tokens: in one forward pass: rows times their length.
        torchao: whether it is installed.

    Raises:
        UserError: none fits, nor nearly; what would is said.
    """
    found = plans(shape, settings, card, tokens)
    usable = _usable(found, torchao)
    fitting = next((plan for plan in usable if plan.total <= card.room), None)
    if fitting is None:
        with_torchao = any(plan.total <= card.room for plan in found)
        if with_torchao and not usable:
            raise UserError("这样的设置要用 torchao 的 8 位优化器，它还没有装好", None, hardware.how_to_get_8_bit())
        least = min(usable or found, key=lambda plan: plan.total)
        if least in usable and least.total <= card.room * NEARLY:
            return [least]
        what = f"{card.name}放不下：需要 {least.total / GIB:.1f} GiB（计算值），可用 {card.room / GIB:.1f} GiB"
        remedies = []
        if with_torchao:
            remedies.append(f"{hardware.how_to_get_8_bit()}（8 位优化器放得下）")
        remedies += smaller(shape, settings, card, tokens, torchao)
        larger = "请换一块更大的卡" if card.kind == "cuda" else "请关掉别的程序，或换一台内存更大的机器"
        raise UserError(what, str(least), "放得下的：" + "；".join(remedies) if remedies else larger)
    chosen = [fitting]
    for plan in usable[usable.index(fitting) + 1 :]:
        if plan.total < chosen[-1].total:
            chosen.append(plan)
    return chosen


def _usable(found: Iterable[Plan], torchao: bool) -> list[Plan]:
    return [plan for plan in found if torchao or not plan.needs_torchao]


def smaller(shape: Shape, settings: TrainSettings, card: Card, tokens: int, torchao: bool) -> list[str]:
    """What would fit where the wanted training does not: fewer tokens a row, LoRA, a smaller model."""

    def fits(shape: Shape, settings: TrainSettings, tokens: int) -> bool:
        return any(plan.total <= card.room for plan in _usable(plans(shape, settings, card, tokens), torchao))

    words = []
    for length in (1024, 512):
        if length * settings.batch_size < tokens and fits(shape, settings, length * settings.batch_size):
            words.append(f"--max-length {length}")
            break
    if not isinstance(settings, LoraSettings) and fits(shape, LoraSettings(), tokens):
        words.append("train_lora.py")
    for name in reversed(QWEN3):
        other = known(name)
        if other is not None and other.parameters < shape.parameters and fits(other, settings, tokens):
            words.append(name)
            break
    return words


def parts(shape: Shape, plan: Plan, card: Card, rank: int | None) -> dict[str, int]:
    """Bytes at the peak of a step, by kind.

    Args:
        plan: its `parts` are not looked at.
        rank: of LoRA's adapters; None for full fine-tuning.
    """
    stored = "fp32" if plan.weights == "fp32" else "bf16"
    size = 4 if stored == "fp32" else 2
    kept: float = shape.parameters * size
    if plan.weights == "nf4":  # the embeddings and the norms stay bf16
        quantised = shape.layers * shape.linear_parameters
        kept = quantised * NF4_BYTES + (shape.parameters - quantised) * 2
    trained, own = shape.parameters, size
    if rank is not None:
        trained, own = shape.lora_parameters(rank), 4
        kept += trained * own
    state = STATE_BYTES_8BIT if plan.optimizer == "adamw_8bit" else own
    gradients = 0 if plan.in_backward else trained * own
    layer = plan.tokens * layer_bytes(shape, plan)
    again = _recomputed(shape.layers, plan.checkpoint_every)
    casts = shape.linear_parameters * 2 if plan.autocast and plan.weights != "bf16" else 0  # fp32 or four bits to half
    stream = plan.tokens * shape.width * size
    activations = again * stream + (shape.layers - again) * (layer + casts) + _ENDS[stored] * stream
    head = head_bytes(shape, plan, card, frozen=rank is not None)
    # While layers are computed again, a tied embedding's first gradient waits for its second.
    waiting = shape.embedding * size if rank is None else 0
    comes_and_goes = max(head, (waiting + _BACKWARD * layer + casts) if again else 0)
    embeddings = (2 if shape.tied else 1) * shape.embedding * size if rank is None else 0
    gathered = (2 * shape.linear_parameters + shape.embedding) * size
    # The embeddings' gradient is the last: by then no activation is left.
    return {
        # A sharded layer is gathered before its turn, the next one meanwhile; the embeddings stay gathered.
        "权重": int(kept / card.shards + (gathered if card.shards > 1 else 0)),
        "梯度": int(gradients / card.shards),
        "优化器": int(2 * trained * state / card.shards),
        "激活": int(activations),
        "输出层": int(max(comes_and_goes, embeddings - activations)),
        **({"程序": PROCESS + (ONEDNN if plan.autocast else 0)} if card.kind != "cuda" else {}),
    }


def head_bytes(shape: Shape, plan: Plan, card: Card, frozen: bool) -> int:
    """Bytes that the output layer's loss takes beside the activations."""
    if hardware.is_own_head(card.kind, plan.autocast == "fp16", card.triton):
        logits, trained = min(plan.tokens, HEAD_ROWS) * shape.words * 4, 0 if frozen else shape.embedding
        if not plan.autocast:
            return logits + trained * 4
        # In half precision: a copy of the weights and the logits, then the gradient in both types. A CPU makes fp32 of a
        # few rows at a time.
        full = plan.weights == "fp32"
        copy = shape.embedding * 2 if full else 0
        scores = logits // 2 if card.kind == "cpu" else logits // 2 + logits
        return max(copy + scores + trained * 2, trained * (6 if full else 2))
    tile = min(plan.tokens, HEAD_MOST_ROWS) * HEAD_COLUMNS * (2 if card.triton else 2 + HEAD_FALLBACK)
    cast = 2 * HEAD_COLUMNS * shape.width * 2 if plan.weights == "fp32" else 0
    gradient = 0 if frozen else shape.embedding * (4 if plan.weights == "fp32" else 4 + 2)
    return tile + cast + gradient + 2 * plan.tokens * shape.width * 4


def layer_bytes(shape: Shape, plan: Plan) -> int:
    """Bytes that one token leaves in one layer for the backward pass."""
    width, attention, inner = _LAYER["fp32" if plan.weights == "fp32" else "bf16", bool(plan.autocast), plan.lora]
    return int(width * shape.width + attention * (shape.queries + shape.keys) + inner * shape.inner)


def _kinds(settings: TrainSettings, card: Card) -> Iterator[tuple[str, str, bool]]:
    """(weights, optimizer, whether within the backward pass), as far as the settings leave them open; best first."""
    lora = isinstance(settings, LoraSettings)
    if isinstance(settings, LoraSettings):
        wanted = settings.weights if settings.weights != "auto" else "bf16" if card.bf16 else "fp32"
        weights = "nf4" if settings.quantize else wanted
        possible = {"fp32": True, "bf16": card.bf16, "nf4": card.kind == "cuda"}[weights]
        found = [(weights, "adamw", False), (weights, "adamw_8bit", False)] if possible else []
    else:
        found = [("fp32", "adamw", False), ("fp32", "adamw_8bit", False)]
        if card.bf16 and card.shards == 1:  # accelerate makes fp32 of trained weights before it shards them
            found += [("bf16", "adamw", False), ("bf16", "adamw_8bit", False), ("bf16", "adamw_8bit", True)]
    for weights, optimizer, in_backward in found:
        if settings.weights not in ("auto", weights) and not lora:
            continue
        if settings.optimizer not in ("auto", optimizer):
            continue
        # Of what nobody asked for: 8-bit states where they save nothing, and bf16 weights that round updates away.
        idle = optimizer == "adamw_8bit" and (lora or card.kind != "cuda")
        lossy = (weights, optimizer) == ("bf16", "adamw") and not lora
        if settings.optimizer == "auto" and (idle or lossy):
            continue
        # Several processes average their gradients first, and the scaling of fp16 gradients wants them all at once.
        at_once = processes.count() == 1 and _autocast(card) != "fp16"
        if settings.optimizer_in_backward == "on":
            if at_once:
                yield weights, optimizer, True
        elif not in_backward or (at_once and settings.optimizer_in_backward == "auto"):
            yield weights, optimizer, in_backward


def _every(settings: TrainSettings) -> Iterable[int]:
    wanted = settings.gradient_checkpointing
    return {"auto": EVERY, "on": (1,), "off": (0,)}.get(wanted) or (int(wanted),)


def _autocast(card: Card) -> str | None:
    if card.bf16:
        return "bf16"
    return "fp16" if card.kind == "cuda" else None


def _rank(settings: TrainSettings) -> int | None:
    return settings.lora_rank if isinstance(settings, LoraSettings) else None


def _recomputed(layers: int, every: int) -> int:
    """How many layers transformers checkpoints for `every_n_layers`: the first of each `every`."""
    return -(-layers // every) if every else 0
