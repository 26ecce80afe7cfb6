"""Which sample made a loss or a gradient that is no number."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qwenmed import chat
from qwenmed.errors import UserError

if TYPE_CHECKING:
    import torch

    from qwenmed.callbacks import MedicalSFTTrainer

MOST_NAMED = 8


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite."""


def error(trainer: "MedicalSFTTrainer", what: str, batches: Sequence[dict[str, Any]]) -> NotFinite:
    """What to tell the user: the step, the samples, and what to do.

    Args:
        what: is not finite: the loss or the gradient.
        batches: of the step, as the model gets them; none for an evaluation after it.
    """
    import torch

    step = trainer.state.global_step + (1 if batches else 0)
    remedy = "已有的检查点都没有动：把 --learning-rate 降到三分之一，或改正这些样本，再用 --resume 从最新的检查点继续"
    if any(not weight.isfinite().all() for weight in trainer.model.parameters()):
        return NotFinite(f"第 {step} 步的{what}是 NaN 或无穷大：权重里已有不是数的值", trainer.args.output_dir, remedy)
    found = [sample for batch in batches for sample in samples(batch)]
    with torch.no_grad():
        guilty = [sample for sample in found if not _loss(trainer, *sample).isfinite()] or found
    names = [place_of(trainer, ids.tolist()) for ids, _ in guilty[:MOST_NAMED]]
    where = "、".join(names) + ("等" if len(guilty) > MOST_NAMED else "")
    return NotFinite(f"第 {step} 步的{what}是 NaN 或无穷大", where or trainer.args.output_dir, remedy)


def samples(batch: dict[str, Any]) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """Token ids and labels of each sample of a batch: packed rows taken apart, padding taken away."""
    for number, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        if "position_ids" in batch:
            starts = (batch["position_ids"][number] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                if end - start > 1:  # padding at the end of a row has position 0 throughout
                    yield ids[start:end], labels[start:end]
        else:
            kept = batch["attention_mask"][number].bool()
            yield ids[kept], labels[kept]


def place_of(trainer: "MedicalSFTTrainer", ids: list[int]) -> str:
    """Where a sample stands in its file; its length where it is not found."""
    rows = trainer.rows
    for row, place in zip(rows.train, rows.places, strict=False) if rows else ():
        if "prompt" in row and chat.render_sample(trainer.processing_class, row)[0] == ids:
            return place
    return f"一条 {len(ids)} 个 token 的样本"


def _loss(trainer: "MedicalSFTTrainer", ids: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    from torch.nn import functional

    logits = trainer.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), labels[1:])
